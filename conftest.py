"""
Lets one pytest run test all parts: `pytest`, `pytest part_3`, `pytest part_6 part_7`.

Eleven modules are named `model`, and several are named `train` or `tokenizer`. Therefore, before a
test file is imported and again before each of its tests (which may import, too), its folder comes
first on sys.path, and sys.modules contains no module of another part.

The modules of the other parts are kept and put back later. If they were imported a second time, a
class that a test file imported at its top would differ from the class that a test imports later.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent

# {folder: {name: module}} of the parts that are not being tested at the moment
kept_modules = {}
current_folder = None


def is_part(folder):
    return folder.parent == ROOT and folder.name.startswith("part_")


def part_of(module):
    """The folder of the part that a module was loaded from; None for torch, shared and so on."""
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    folder = Path(file).parent
    return folder if is_part(folder) else None


def enter(folder):
    """Make `import model` mean folder/model.py."""
    global current_folder
    if folder == current_folder:
        return
    current_folder = folder

    # Put the modules of the previous part away, and those of this part back.
    for name, module in list(sys.modules.items()):
        home = part_of(module)
        if home is not None:
            kept_modules.setdefault(home, {})[name] = sys.modules.pop(name)
    sys.modules.update(kept_modules.pop(folder, {}))

    # This part comes first and the root, with shared.py, comes last.
    other_paths = []
    for path in sys.path:
        resolved = Path(path or ".").resolve()
        if resolved != ROOT and not is_part(resolved):
            other_paths.append(path)
    sys.path[:] = [str(folder), *other_paths, str(ROOT)]


def pytest_collectstart(collector):
    if isinstance(collector, pytest.Module):
        enter(collector.path.parent)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    enter(item.path.parent)
