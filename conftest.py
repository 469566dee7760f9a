"""
Lets one pytest run all parts: `pytest` from the root, `pytest part_3`, `pytest part_6 part_7`.

Eleven modules are named `model` and several `train` and `tokenizer`. Before a test module is imported, and again before
each of its tests (which may import on their own), its folder comes first on sys.path and only its modules are in
sys.modules. They are kept, not imported anew: a class that a test file imported at its top is the same class that a
test imports later.
"""
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
kept = {}  # folder -> {name: module} of the parts that are not being tested right now
current = None


def part_of(module):
    """The part's folder that a module was loaded from, or None: torch, shared, ..."""
    file = getattr(module, "__file__", None)
    folder = Path(file).parent if file else None
    return folder if folder and folder.parent == ROOT and folder.name.startswith("part_") else None


def enter(folder):
    """Make `import model` mean folder/model.py."""
    global current
    if folder == current:
        return
    current = folder
    for name, module in list(sys.modules.items()):
        home = part_of(module)
        if home is not None:
            kept.setdefault(home, {})[name] = sys.modules.pop(name)
    sys.modules.update(kept.pop(folder, {}))
    others = [p for p in sys.path if Path(p or ".").resolve().parent != ROOT or not Path(p).name.startswith("part_")]
    sys.path[:] = [str(folder)] + [p for p in others if p != str(ROOT)] + [str(ROOT)]


def pytest_collectstart(collector):
    if isinstance(collector, pytest.Module):
        enter(collector.path.parent)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    enter(item.path.parent)
