"""
Part 0 - how to read a diff: what a part changes in the code it continues, unit by unit.

    python part_0/diff_parts.py 7                       # every file of Part 7 against the one its header names
    python part_0/diff_parts.py 7 --file=model.py
    python part_0/diff_parts.py 7 --html=part_7.html    # the same as a page: side by side, inline on a phone
    python part_0/diff_parts.py 7 --color=1 | less -R

A unit is a function, a `Class.method`, or a `Class` (its bases and fields); what is left of a file is its
`module level` (imports, constants) and its `main body` (under the guard). Two units are the same when their syntax
trees are: comments, docstrings and layout do not count. Units are New, Changed or Removed; the rest is only counted.
"""
import ast
import copy
import difflib
import os
import re
import signal
from collections import namedtuple
from dataclasses import dataclass

import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diff_page import page
from shared import ROOT, cli, fail

Unit = namedtuple("Unit", "lines code")  # its source, and its program in normal form
Change = namedtuple("Change", "kind name old new")  # kind: New, Changed, Removed or Same; old and new: source lines
Pair = namedtuple("Pair", "source path changes")  # one file and the one it continues (None: it starts here)


def parts():
    """Numbers of the parts that have a predecessor or start the chain: 1, 2, ..."""
    return sorted(int(p.name[5:]) for p in ROOT.glob("part_*") if p.name[5:].isdigit() and p.name != "part_0")


@dataclass
class Config:
    part: int = 0  # the part to read, 1 to 10: the first argument
    file: str = ""  # only this file, e.g. model.py
    html: str = ""  # write the page to this file instead of printing
    color: str = ""  # 1: always, 0: never; empty: on a terminal, unless NO_COLOR is set

    def __post_init__(self):
        assert self.color in ("", "0", "1"), f"--color is 0 or 1, not {self.color}"


# ---------------------------------------------------------------------------------------------------------------------
# units

def normal_form(node):
    """The program of a syntax tree without comments, docstrings and layout, as text."""
    node = copy.deepcopy(node)
    for n in ast.walk(node):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(n) is not None:
            n.body = n.body[1:] or [ast.Pass()]
    return ast.unparse(node)


def is_guard(node):
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def span(node, lines):
    """Line numbers (from 0) of a node with its decorators and the comments right above it."""
    first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])]) - 1
    while first > 0 and lines[first - 1].lstrip().startswith("#") and "----" not in lines[first - 1]:
        first -= 1
    return range(first, node.end_lineno)


def units(path):
    """All units of a Python file by name, in the order of the source: {name: Unit(lines, code)}."""
    lines = path.read_text(encoding="utf-8").splitlines()
    tree = ast.parse("\n".join(lines))
    found, spans = {}, {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            spans[node.name], found[node.name] = span(node, lines), normal_form(node)
        elif isinstance(node, ast.ClassDef):
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
            fields = copy.copy(node)
            fields.body = [m for m in node.body if m not in methods] or [ast.Pass()]
            spans[node.name], found[node.name] = span(node, lines), normal_form(fields)
            for m in methods:
                spans[f"{node.name}.{m.name}"], found[f"{node.name}.{m.name}"] = span(m, lines), normal_form(m)
        elif is_guard(node):
            spans["main body"], found["main body"] = span(node, lines), normal_form(node)
    named = (ast.FunctionDef, ast.ClassDef)
    rest = ast.Module([n for n in tree.body if not isinstance(n, named) and not is_guard(n)], [])
    doc = range(tree.body[0].end_lineno) if ast.get_docstring(tree) is not None else range(0)
    taken = set(doc).union(*spans.values())
    loose = [text for i, text in enumerate(lines) if i not in taken and text.strip() and "# ----" not in text]
    result = {"module level": Unit(loose, normal_form(rest))}
    for name, code in found.items():
        inner = [set(spans[m]) for m in spans if m.startswith(name + ".")]
        mine = [lines[i] for i in spans[name] if i not in set().union(*inner)]
        while inner and mine and not mine[-1].strip():
            mine.pop()
        result[name] = Unit(mine, code)
    return result


def source_of(path):
    """What the header says this file continues: the Path behind its `From` line, or None."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    m = re.search(r"^From (\S+?)[:,.]?$", doc, re.M)
    if m is None:
        return None
    if not (ROOT / m.group(1)).is_file():
        fail(f"{path.relative_to(ROOT)} says From {m.group(1)}, which is not there")
    return ROOT / m.group(1)


def compare(old, new):
    """What became of every unit, in the order of the new file, then what was removed: [Change]."""
    changes = []
    for name, unit in new.items():
        before = old.get(name)
        kind = "New" if before is None else "Same" if before.code == unit.code else "Changed"
        changes.append(Change(kind, name, before.lines if before else [], unit.lines))
    return changes + [Change("Removed", name, unit.lines, []) for name, unit in old.items() if name not in new]


def whole(changes):
    """What there is to read: no unit that is the same, and a class that came or went as one piece."""
    owners = {c.name: c for c in changes if c.kind in ("New", "Removed")}
    shown = []
    for c in changes:
        owner = owners.get(c.name.split(".")[0])
        if owner is None or owner.name == c.name:
            shown += [Change(c.kind, c.name, list(c.old), list(c.new))] if c.kind != "Same" else []
        else:  # its class stands right before its methods
            shown[-1].old.extend(["", *c.old] if c.old else [])
            shown[-1].new.extend(["", *c.new] if c.new else [])
    return shown


def pairs(part, only=""):
    """The files of a part that continue another one, or begin a chain (model, tokenizer, train): [Pair]."""
    folder = ROOT / f"part_{part}"
    born = ("model.py", "tokenizer.py", "train")
    paths = [p for p in folder.glob("*.py") if source_of(p) or p.name.startswith(born)]
    paths.sort(key=lambda p: (*[not p.name.startswith(b) for b in born], p.name))
    if only and only not in [p.name for p in paths]:
        fail(f"part {part} has no {only} to compare; it has: {', '.join(p.name for p in paths) or 'nothing yet'}")
    chosen = [p for p in paths if only in ("", p.name)]
    return [Pair(source_of(p), p, compare(units(source_of(p)) if source_of(p) else {}, units(p))) for p in chosen]


def counts(pair):
    """{kind: units}, and the lines that were added and removed in units whose program is not the same."""
    kinds = [c.kind for c in pair.changes]
    diff = [line for c in pair.changes if c.kind != "Same" for line in list(difflib.unified_diff(c.old, c.new))[2:]]
    lines = [sum(line.startswith(sign) for line in diff) for sign in "+-"]
    return {kind: kinds.count(kind) for kind in ("Same", "Changed", "New", "Removed")}, *lines


def heading(pair):
    """`part_6/model.py -> part_7/model.py` and a line of counts."""
    by_kind, added, gone = counts(pair)
    name = str(pair.path.relative_to(ROOT))
    title = f"{pair.source.relative_to(ROOT)} -> {name}" if pair.source else f"{name} starts here"
    return title, ", ".join(f"{n} {kind.lower()}" for kind, n in by_kind.items()) + f"   (+{added} -{gone} lines)"


# ---------------------------------------------------------------------------------------------------------------------
# the terminal

INK = {"bold": "1", "New": "32", "Removed": "31", "Changed": "33", "+": "32", "-": "31", "@": "36"}


def show(pair, color):
    """Print one file: what happened to which unit, then the diff of each."""
    def paint(text, ink):
        return f"\033[{INK[ink]}m{text}\033[0m" if color and ink in INK else text

    title, line = heading(pair)
    changes = whole(pair.changes)
    print(paint(title, "bold") + f"\n    {line}")
    for kind in ("New", "Changed", "Removed"):
        names = [c.name for c in changes if c.kind == kind]
        if names:
            print(f"    {paint(f'{kind:8}', kind)} {', '.join(names)}")
    for c in changes:
        print("\n" + paint(f"{c.kind} {c.name}", c.kind))
        for text in list(difflib.unified_diff(c.old, c.new, lineterm=""))[2 if c.kind == "Changed" else 3:]:
            print(paint(text, text[0]))
    print()


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--part={sys.argv[1]}"
    cfg = cli(Config())

    if cfg.part not in parts():
        fail(f"no part {cfg.part}: python part_0/diff_parts.py N, with N one of {' '.join(map(str, parts()))}")
    found = pairs(cfg.part, cfg.file)
    if not found:
        fail(f"part {cfg.part} has no model, tokenizer or train script to compare yet")
    if cfg.html:
        text = page(cfg.part, [(pair.path, whole(pair.changes), *heading(pair)) for pair in found])
        Path(cfg.html).write_text(text, encoding="utf-8")
        print(f"wrote {cfg.html}")
    else:
        if os.name == "posix":
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
        color = cfg.color == "1" or cfg.color == "" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        for pair in found:
            show(pair, color)
