"""The house: headers that tell the truth about the diff, sizes, no imports across parts; and the tools that show it."""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(ROOT.glob("part_*/*.py"))
SIZES = {"model.py": 320, "tokenizer.py": 170, "prepare_data.py": 400, "train": 320, "demo": 140, "test": 400}

def program(node):
    """A syntax tree without docstrings, as text: comments and layout are gone already."""
    for n in ast.walk(node):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(n) is not None:
            n.body = n.body[1:] or [ast.Pass()]
    return ast.unparse(node)

def units(path):
    """{name: program} of functions, Class.method, and classes without their methods, in the file's order."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = program(node)
        if isinstance(node, ast.ClassDef):
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
            node.body = [m for m in node.body if m not in methods] or [ast.Pass()]
            found[node.name] = program(node)
            found |= {f"{node.name}.{m.name}": program(m) for m in methods}
    return found

def manifest(path):
    """A file's header -> (the file it continues or None, {"New": names, "Changed": names, "Removed": names})."""
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    found = re.search(r"^From (\S+)\n((?:    .*\n?)*)", doc, re.M)
    if not found:
        return None, {}
    said, kind = {"New": set(), "Changed": set(), "Removed": set()}, None
    for word in re.findall(r"[A-Za-z_][\w.]*", re.sub(r"\([^)]*\)", "", found.group(2))):
        if word in said:
            kind = word
        else:
            said[kind].add(word)
    return ROOT / found.group(1), said

def truth(old, new):
    return {
        "New": {n for n in new if n not in old}, "Removed": {n for n in old if n not in new},
        "Changed": {n for n in new if n in old and old[n] != new[n]},
    }

@pytest.mark.parametrize("path", [p for p in FILES if manifest(p)[0]], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_header_names_exactly_what_differs(path):
    source, said = manifest(path)
    old, new = units(source), units(path)
    for kind, names in truth(old, new).items():
        pool = {n for n in {**old, **new} if (n in new) >= (kind != "Removed") and (n in old) >= (kind != "New")}
        for name in names:  # a class may stand for its methods
            assert {name, name.split(".")[0]} & said[kind], f"{kind.lower()} and not in the header: {name}"
        for name in said[kind]:  # ... but only if all of them came, went or changed
            methods = {n for n in pool if n.startswith(name + ".")}
            assert name in names or methods and methods <= names, f"not {kind.lower()}, as the header says: {name}"
    common = [n for n in old if n in new]
    assert common == [n for n in new if n in old], "definitions stand in another order"

def test_every_file_of_the_chain_says_where_it_comes_from():
    for n in range(2, 9):
        for path in (ROOT / f"part_{n}").glob("*.py"):
            if path.name == "model.py" or path.name.startswith("train") or path.name == "tokenizer.py" and n > 4:
                assert manifest(path)[0], f"{path} has no From line"

def test_manifest_notices_a_lie(tmp_path):
    (tmp_path / "old.py").write_text("def f():\n    return 1\n")
    (tmp_path / "new.py").write_text("def f():\n    return 2\n\ndef g():\n    pass\n")
    found = truth(units(tmp_path / "old.py"), units(tmp_path / "new.py"))
    assert found == {"New": {"g"}, "Removed": set(), "Changed": {"f"}}
    (tmp_path / "new.py").write_text('def f():\n    """Says more."""\n    return 1  # the same\n')
    assert truth(units(tmp_path / "old.py"), units(tmp_path / "new.py"))["Changed"] == set()

@pytest.mark.parametrize("path", FILES + [ROOT / "shared.py"], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_sizes(path):
    lines = path.read_text().splitlines()
    allowed = next((n for name, n in SIZES.items() if path.name.startswith(name)), 300)
    assert len(lines) <= allowed, f"{len(lines)} lines, the house allows {allowed}"
    assert max(map(len, lines), default=0) <= 120
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 45, f"{node.name} is too long"

def test_a_part_never_imports_another():
    for path in FILES:
        assert not re.search(r"^\s*(from|import) part_\d", path.read_text(), re.M), path

def run(*argv, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, text=True)

def test_diff_parts_shows_the_lesson(tmp_path):
    shown = run(ROOT / "part_0/diff_parts.py", 8, "--file=model.py", "--color=0")
    assert shown.returncode == 0 and "New      ActorCritic" in shown.stdout
    assert "+class ActorCritic(GPT):" in shown.stdout
    page = run(ROOT / "part_0/diff_parts.py", 8, f"--html={tmp_path / 'page.html'}")
    assert page.returncode == 0 and "ActorCritic" in (tmp_path / "page.html").read_text()
    wrong = run(ROOT / "part_0/diff_parts.py", 77)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "Traceback" not in wrong.stderr

def test_generate_screenshots_collects_and_says_what_is_missing(tmp_path):
    for name in ("shared.py", "generate_screenshots.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "part_1/out").mkdir(parents=True)
    (tmp_path / "part_1/demo_a.py").write_text("")
    (tmp_path / "part_1/demo_b.py").write_text("")
    code = ("import sys; sys.path.insert(0, '.'); import shared; fig, ax = shared.figure('It is <so>');"
            "shared.save_figure(fig, shared.Path('part_1/out/demo_a.png'))")
    assert run("-c", code, cwd=tmp_path).returncode == 0
    (tmp_path / "part_1/out/demo_a.json").write_text('{"share": 0.25}')
    shown = run("generate_screenshots.py", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "1 figures" in shown.stdout and "part_1/demo_b.py" in shown.stdout and "demo_a.py" not in shown.stdout
    text = (tmp_path / "screenshots/index.html").read_text()
    assert (tmp_path / "screenshots/part_1_demo_a.png").exists()
    assert "It is &lt;so&gt;" in text and "<td>share</td><td>0.25</td>" in text and "http" not in text
