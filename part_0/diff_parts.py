"""
Part 0: how to read a diff. It shows what a part changes in the code that it continues, unit by
unit, and it checks what the headers of the files say about these changes.

    python part_0/diff_parts.py 7                     # every file of Part 7
    python part_0/diff_parts.py 7 --file=model.py     # one file of Part 7
    python part_0/diff_parts.py 7 --html=part_7.html  # the same as a page, side by side
    python part_0/diff_parts.py 7 --color=1 | less -R
    python part_0/diff_parts.py --check               # is every header of every part true?
    python part_0/diff_parts.py --table               # all steps of the course and their sizes

A unit is a function, a `Class.method` or a `Class` (its bases and its fields). What is left of a
file is in the units `imports`, `constants` (all other statements at the top level) and `main body`
(the block under `if __name__ == "__main__":`). Two units are the same when their syntax trees are
the same, so comments, docstrings and layout do not count.

A header is the manifest of a file. It names what the file continues, and every unit that differs:

    From part_6/model.py
        New      GPT.trunk, RewardModel
        Changed  GPT.forward (a remark in parentheses is not checked)

A class stands for its fields. It also stands for all its methods, if all of them came, changed or
went. The header need not name `imports`, `constants` and `main body`. A file that continues no
other says `Starts here`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ast
import difflib
import os
import re
import signal
import subprocess
from dataclasses import dataclass
from typing import NamedTuple

from diff_page import PageFile, page
from shared import ROOT, fail, parse_args

CHAIN = ("model", "tokenizer", "train")  # the names of files that every part copies forward
OPTIONAL = ("imports", "constants", "main body")  # units that a header need not name
KINDS = ("New", "Changed", "Removed")
WORDS = {"New": "is new", "Changed": "changed", "Removed": "was removed", "Same": "is the same"}


@dataclass
class Config:
    part: int = -1  # number of the part; -1: all parts (for --check and --table only)
    file: str = ""  # show only this file of the part, for example model.py
    html: str = ""  # write a page to this file instead of printing
    color: str = ""  # 1: always, 0: never; empty: on a terminal, unless NO_COLOR is set
    check: bool = False  # check the headers of all parts (or of one part) against the code
    table: bool = False  # print one line per step: its units and its lines

    def __post_init__(self):
        assert self.color in ("", "0", "1"), f"--color must be 0 or 1, got {self.color}"


class Unit(NamedTuple):
    lines: list  # its source lines
    code: str  # its program without comments, docstrings and layout


class Source(NamedTuple):
    """A Python file, cut into its docstring and its units."""

    header: str
    units: dict  # {name: Unit}, in the order of the file


class Change(NamedTuple):
    """What became of one unit between two files."""

    kind: str  # New, Changed, Removed or Same
    name: str
    old: list  # source lines; empty if the unit is new
    new: list  # source lines; empty if the unit was removed


class Header(NamedTuple):
    """What the docstring of a file says about the file that it continues."""

    origin: str  # the path behind From, for example "part_6/model.py"; empty if there is none
    starts_here: bool
    claims: list  # [(kind, name)], for example [("New", "GPT.trunk")]
    stray: list  # words of the manifest that stand before New, Changed or Removed


class Step(NamedTuple):
    """One file, the file that it continues (None if it starts here), and what changed."""

    origin: Path
    path: Path
    changes: list


# --------------------------------------------------------------------------------------------------
# Cutting a file into units


def remove_docstrings(tree):
    """Remove the docstrings of all functions and classes in place."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]


def unit_name(node):
    """The name of the unit that a statement at the top level belongs to."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return "imports"

    code = ast.unparse(node)
    if code.startswith("sys.path.insert("):
        return "imports"  # it tells Python where to find shared.py
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        return "main body"
    return "constants"


def line_numbers(node, lines):
    """The set of line numbers (from 0) of a node. Its decorators and the comments directly above
    it belong to it. A line of dashes is a heading, and belongs to nothing."""
    first = node.lineno
    for decorator in getattr(node, "decorator_list", []):
        first = min(first, decorator.lineno)
    first -= 1

    while first > 0:
        above = lines[first - 1].strip()
        if not above.startswith("#") or "----" in above:
            break
        first -= 1
    return set(range(first, node.end_lineno))


def make_unit(nodes, numbers, lines):
    """A Unit from its statements and from its line numbers."""
    source = [lines[i] for i in sorted(numbers)]
    while source and not source[-1].strip():
        source.pop()
    return Unit(source, "\n".join(ast.unparse(node) for node in nodes))


def class_units(node, lines):
    """The units of a class: itself without its methods, then each of its methods."""
    methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
    numbers = line_numbers(node, lines)
    method_units = {}
    for method in methods:
        method_numbers = line_numbers(method, lines)
        method_units[f"{node.name}.{method.name}"] = make_unit([method], method_numbers, lines)
        numbers -= method_numbers

    node.body = [child for child in node.body if child not in methods] or [ast.Pass()]
    return {node.name: make_unit([node], numbers, lines), **method_units}


def read_source(path):
    """Read a Python file -> Source."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    tree = ast.parse(text)
    header = ast.get_docstring(tree) or ""
    if header:
        tree.body = tree.body[1:]
    remove_docstrings(tree)

    # Imports and constants may stand in several places, so their statements are gathered first.
    statements = {}
    for node in tree.body:
        statements.setdefault(unit_name(node), []).append(node)

    units = {}
    for name, nodes in statements.items():
        if isinstance(nodes[0], ast.ClassDef):
            units.update(class_units(nodes[0], lines))
        else:
            numbers = set().union(*[line_numbers(node, lines) for node in nodes])
            units[name] = make_unit(nodes, numbers, lines)
    return Source(header, units)


def compare(old, new):
    """What became of every unit -> [Change], in the order of the new file, with the removed ones
    at the end. `old` and `new` are {name: Unit}."""
    changes = []
    for name, unit in new.items():
        if name not in old:
            changes.append(Change("New", name, [], unit.lines))
        elif old[name].code == unit.code:
            changes.append(Change("Same", name, old[name].lines, unit.lines))
        else:
            changes.append(Change("Changed", name, old[name].lines, unit.lines))

    for name, unit in old.items():
        if name not in new:
            changes.append(Change("Removed", name, unit.lines, []))
    return changes


# --------------------------------------------------------------------------------------------------
# Headers, and the files that they connect


def read_header(docstring):
    """Read a docstring -> Header. Only the indented lines directly below From are its manifest."""
    starts_here = re.search(r"^Starts here\b", docstring, re.MULTILINE) is not None
    match = re.search(r"^From (\S+\.py)\n((?:    .*\n)*)", docstring + "\n", re.MULTILINE)
    if match is None:
        return Header("", starts_here, [], [])

    # A remark may contain parentheses of its own, so the innermost ones go first.
    manifest = match[2]
    while re.search(r"\([^()]*\)", manifest):
        manifest = re.sub(r"\([^()]*\)", " ", manifest)
    manifest = " ".join(manifest.split())

    kind = None
    claims = []
    stray = []
    for name in re.findall(r"main body|[A-Za-z_][\w.]*", manifest):
        if name in KINDS:
            kind = name
        elif kind is None:
            stray.append(name)
        else:
            claims.append((kind, name))
    return Header(match[1], starts_here, claims, stray)


def short(path):
    """part_7/model.py"""
    return f"{path.parent.name}/{path.name}"


def origin_of(path):
    """The Path of the file that this one continues, or None. It may not exist."""
    header = read_header(read_source(path).header)
    if not header.origin:
        return None
    return path.parent.parent / header.origin


def depth(path):
    """How many files of the same part this one builds on: 1 for a train_ppo.py that continues the
    train_reinforce.py beside it."""
    seen = [path]
    origin = origin_of(path)
    while origin is not None and origin.parent == path.parent and origin not in seen:
        if not origin.is_file():
            break
        seen.append(origin)
        origin = origin_of(origin)
    return len(seen) - 1


def part_numbers(root=ROOT):
    """The numbers of all parts: [0, 1, 2, ...]."""
    names = [folder.name.removeprefix("part_") for folder in root.glob("part_*")]
    return sorted(int(name) for name in names if name.isdigit())


def in_chain(path):
    """Is this a file that every part copies forward: a model, a tokenizer, a trainer?"""
    return path.name.startswith(CHAIN)


def reading_order(path):
    """Sort key of the files of a part: models, tokenizers, trainers, then all others. A file comes
    after the one beside it that it continues."""
    for rank, name in enumerate(CHAIN):
        if path.name.startswith(name):
            break
    else:
        rank = len(CHAIN)
    return rank, depth(path), path.name


def files_of(part, root=ROOT):
    """The files of a part that have a header or should have one, in the order to read them."""
    paths = []
    for path in (root / f"part_{part}").glob("*.py"):
        header = read_header(read_source(path).header)
        if header.origin or header.starts_here or in_chain(path):
            paths.append(path)
    return sorted(paths, key=reading_order)


def read_step(path):
    """Compare a file with the one that it continues -> Step."""
    origin = origin_of(path)
    if origin is not None and not origin.is_file():
        fail(f"{short(path)} says From {short(origin)}, but there is no such file")

    old = {}
    if origin is not None:
        old = read_source(origin).units
    return Step(origin, path, compare(old, read_source(path).units))


# --------------------------------------------------------------------------------------------------
# Checking a header


def methods_of(owner, kinds, kind):
    """The methods that a class stands for under one heading of the manifest: under New those of the
    new file, under Removed those of the old file, under Changed those that are in both files."""
    methods = [name for name in kinds if name.startswith(owner + ".")]
    if kind == "New":
        return [name for name in methods if kinds[name] != "Removed"]
    if kind == "Removed":
        return [name for name in methods if kinds[name] != "New"]
    return [name for name in methods if kinds[name] not in ("New", "Removed")]


def stands_for_methods(owner, kinds, kind):
    """Did all methods of this class come, change or go?"""
    methods = methods_of(owner, kinds, kind)
    return len(methods) > 0 and all(kinds[name] == kind for name in methods)


def false_claims(claims, kinds):
    """What the header says and the code does not -> list of sentences. `kinds` is {name: kind}."""
    problems = []
    for kind, name in claims:
        if kinds.get(name) == kind or stands_for_methods(name, kinds, kind):
            continue

        said = f'the header says that "{name}" {WORDS[kind]}, but'
        if name not in kinds:
            problems.append(f"{said} there is no such unit")
            continue

        others = [method for method in methods_of(name, kinds, kind) if kinds[method] != kind]
        if others:
            problems.append(f'{said} "{others[0]}" {WORDS[kinds[others[0]]]}')
        else:
            problems.append(f"{said} it {WORDS[kinds[name]]}")
    return problems


def missing_claims(claims, kinds):
    """What the code changes and the header does not say -> list of sentences."""
    problems = []
    for name, kind in kinds.items():
        if kind == "Same" or name in OPTIONAL or (kind, name) in claims:
            continue

        owner = name.split(".")[0]
        if owner != name:
            owner_is_named = (kind, owner) in claims
            if owner_is_named and stands_for_methods(owner, kinds, kind):
                continue
            # When a whole class came or went, one line about the class is enough.
            if kinds[owner] == kind and kind in ("New", "Removed"):
                continue
        problems.append(f'"{name}" {WORDS[kind]} but the header does not say so')
    return problems


def order_problems(old, new):
    """Definitions that both files have must stand in the same order -> list of sentences."""
    old_order = [name for name in old if name in new and name not in OPTIONAL]
    new_order = [name for name in new if name in old and name not in OPTIONAL]
    for before, after in zip(old_order, new_order):
        if before != after:
            return [f'"{after}" now stands before "{before}": definitions must keep their order']
    return []


def check_file(path):
    """All untrue statements of the header of a file -> list of sentences."""
    source = read_source(path)
    header = read_header(source.header)
    if not header.origin:
        part = int(path.parent.name.removeprefix("part_"))
        if in_chain(path) and part >= 2 and not header.starts_here:
            return ['the header has neither a From line nor "Starts here"']
        return []

    origin = path.parent.parent / header.origin
    if not origin.is_file():
        return [f"the header says From {header.origin}, but there is no such file"]

    old = read_source(origin).units
    kinds = {change.name: change.kind for change in compare(old, source.units)}
    problems = [f'"{word}" stands before New, Changed or Removed' for word in header.stray]
    problems += false_claims(header.claims, kinds)
    problems += missing_claims(header.claims, kinds)
    problems += order_problems(old, source.units)
    return problems


def check_all(parts, root=ROOT):
    """Check every header of these parts -> (number of headers, problems with the file in front)."""
    number = 0
    problems = []
    for part in parts:
        for path in files_of(part, root):
            header = read_header(read_source(path).header)
            if header.origin or header.starts_here:
                number += 1
            problems += [f"{short(path)}: {problem}" for problem in check_file(path)]
    return number, problems


# --------------------------------------------------------------------------------------------------
# Showing a step


def without_same(changes):
    """The changes that a reader wants to see. A class that came or went is shown as one piece."""
    whole_classes = {change.name for change in changes if change.kind in ("New", "Removed")}
    shown = []
    for change in changes:
        if change.kind == "Same":
            continue

        # The class stands directly before its methods.
        owner = change.name.split(".")[0]
        if owner != change.name and owner in whole_classes:
            piece = shown[-1]
            if change.old:
                piece.old.extend(["", *change.old])
            if change.new:
                piece.new.extend(["", *change.new])
        else:
            shown.append(Change(change.kind, change.name, list(change.old), list(change.new)))
    return shown


def count_units(changes):
    """{kind: number of units}"""
    counts = {"Same": 0, "Changed": 0, "New": 0, "Removed": 0}
    for change in changes:
        counts[change.kind] += 1
    return counts


def diff_lines(change):
    """The unified diff of one unit without its two lines of file names."""
    return list(difflib.unified_diff(change.old, change.new, lineterm=""))[2:]


def step_title(step):
    """part_6/model.py -> part_7/model.py"""
    if step.origin is None:
        return f"{short(step.path)} starts here"
    return f"{short(step.origin)} -> {short(step.path)}"


def step_summary(step):
    """How many units are the same, changed, new and removed, and how many lines differ in those
    that are not the same."""
    added = 0
    removed = 0
    for change in step.changes:
        if change.kind == "Same":
            continue
        for line in diff_lines(change):
            added += line.startswith("+")
            removed += line.startswith("-")

    counts = count_units(step.changes)
    units = ", ".join(f"{number} {kind.lower()}" for kind, number in counts.items())
    return f"{units}   (+{added} -{removed} lines)"


ANSI = {"bold": 1, "New": 32, "Removed": 31, "Changed": 33, "+": 32, "-": 31, "@": 36}


def paint(text, style, color):
    """Text with the escape codes of a terminal around it, if color is True."""
    if not color or style not in ANSI:
        return text
    return f"\033[{ANSI[style]}m{text}\033[0m"


def show(step, color):
    """Print one step: which units came, changed and went, then the diff of each."""
    changes = without_same(step.changes)
    print(paint(step_title(step), "bold", color))
    print(f"    {step_summary(step)}")
    for kind in KINDS:
        names = [change.name for change in changes if change.kind == kind]
        if names:
            print(f"    {paint(f'{kind:8}', kind, color)} {', '.join(names)}")

    for change in changes:
        print()
        print(paint(f"{change.kind} {change.name}", change.kind, color))
        lines = diff_lines(change)
        if change.kind != "Changed":
            lines = lines[1:]  # all lines came or went, so the line numbers say nothing
        for line in lines:
            print(paint(line, line[0], color))
    print()


def git_numstat(old, new):
    """Lines added and removed between two files, as git counts them."""
    command = ["git", "diff", "--no-index", "--numstat", str(old), str(new)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode > 1:  # 0: the files are equal, 1: they differ
        fail(f"git could not compare {short(old)} and {short(new)}: {done.stderr}")
    if not done.stdout:
        return 0, 0
    added, removed, _ = done.stdout.split("\t", 2)
    return int(added), int(removed)


def print_table(parts, root=ROOT):
    """Print one line per step: its units and its lines."""
    print(f"{'step':56} {'same':>5} {'changed':>8} {'new':>4} {'removed':>8}   lines")
    for part in parts:
        for path in files_of(part, root):
            step = read_step(path)
            if step.origin is None:
                continue
            counts = count_units(step.changes)
            added, removed = git_numstat(step.origin, step.path)
            print(
                f"{step_title(step):56} {counts['Same']:5} {counts['Changed']:8} {counts['New']:4}"
                f" {counts['Removed']:8}   +{added} -{removed}"
            )


def write_page(path, part, steps):
    """Write the steps of a part as an HTML page."""
    files = []
    for step in steps:
        changes = without_same(step.changes)
        files.append(PageFile(step.path, changes, step_title(step), step_summary(step)))
    Path(path).write_text(page(part, files), encoding="utf-8")
    print(f"wrote {path}")


def wants_color(option):
    """Should the output have colours? The option decides, else whether it goes to a terminal."""
    if option:
        return option == "1"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


if __name__ == "__main__":
    # The number of the part may stand alone: `diff_parts.py 7` means `diff_parts.py --part=7`.
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--part={sys.argv[1]}"
    cfg = parse_args(Config)

    # `diff_parts.py 7 | head` closes the pipe early, which is no error.
    if os.name == "posix":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)

    parts = part_numbers()
    if cfg.part in parts:
        chosen = [cfg.part]
    elif cfg.part == -1 and (cfg.check or cfg.table):
        chosen = parts
    else:
        numbers = " ".join(str(part) for part in parts)
        fail(f"write python part_0/diff_parts.py N, where N is one of {numbers}")

    if cfg.check:
        number, problems = check_all(chosen)
        for problem in problems:
            print(problem)
        if problems:
            sys.exit(1)
        print(f"{number} headers are true")
        sys.exit(0)

    if cfg.table:
        print_table(chosen)
        sys.exit(0)

    # The files to show.
    paths = files_of(cfg.part)
    if not paths:
        fail(f"part {cfg.part} has no model, tokenizer or train script to compare")
    if cfg.file:
        names = [path.name for path in paths]
        if cfg.file not in names:
            fail(f"part {cfg.part} has no {cfg.file} to compare; it has {', '.join(names)}")
        paths = [path for path in paths if path.name == cfg.file]

    steps = [read_step(path) for path in paths]
    if cfg.html:
        write_page(cfg.html, cfg.part, steps)
    else:
        color = wants_color(cfg.color)
        for step in steps:
            show(step, color)
