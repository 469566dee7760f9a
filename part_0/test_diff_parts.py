"""
Tests of diff_parts.py. The headers of the repository tell the truth, the check notices a header
that does not, and the script shows what a part changes. Also, no part imports another.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import re
import shutil
import subprocess

import pytest

import diff_parts
from diff_page import mark_differences, tokenize
from shared import ROOT

FILES = sorted(ROOT.glob("part_*/*.py"))


def name_of(path):
    return f"{path.parent.name}/{path.name}"


def files_with_header():
    paths = []
    for part in diff_parts.part_numbers():
        paths += diff_parts.files_of(part)
    return paths


# --------------------------------------------------------------------------------------------------
# The repository


@pytest.mark.parametrize("path", files_with_header(), ids=name_of)
def test_header_is_true(path):
    assert diff_parts.check_file(path) == []


def test_every_file_of_the_chain_says_where_it_comes_from():
    names = set()
    for path in FILES:
        is_chain_file = path.name in ("model.py", "tokenizer.py") or path.name.startswith("train")
        if is_chain_file and int(path.parent.name.removeprefix("part_")) >= 2:
            header = diff_parts.read_header(diff_parts.read_source(path).header)
            assert header.origin or header.starts_here, name_of(path)
            names.add(name_of(path))

    # The two ends of the chain, to be sure that the loop has seen the files.
    assert {"part_2/model.py", "part_8/train_ppo.py", "part_9/tokenizer.py"} <= names


def test_a_part_never_imports_another():
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) part_\d", text, re.MULTILINE), name_of(path)


# --------------------------------------------------------------------------------------------------
# Small made-up files

OLD = '''
"""The old file."""
import math

SIZE = 1


def f():
    return 1


def g():
    return 2


class A:
    x = 1

    def __init__(self):
        self.y = 1

    def forward(self):
        return self.y


class B:
    def forward(self):
        return 1


if __name__ == "__main__":
    print(f())
'''

CHANGED_BODY = ("        return self.y\n", "        return self.y + 1\n")


@pytest.fixture
def make(tmp_path):
    """make(header, (old, new), ...) writes part_6/model.py and a part_7/model.py that continues it,
    with this header and with these replacements, and returns the path of the latter."""

    def write(header, *replacements):
        text = OLD.lstrip()
        for part in ("part_6", "part_7"):
            (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / "part_6/model.py").write_text(text)
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        text = text.replace('"""The old file."""', f'"""\nPart 7.\n\n{header}\n"""')
        (tmp_path / "part_7/model.py").write_text(text)
        return tmp_path / "part_7/model.py"

    return write


def test_read_header():
    header = diff_parts.read_header(
        """Part 7.

From part_6/model.py
    New      maintain, main
             body (its loop (all of it), too), GPT.trunk
    Removed  f

    not_in_the_manifest
"""
    )
    assert header.origin == "part_6/model.py" and not header.starts_here
    assert header.claims == [
        ("New", "maintain"),
        ("New", "main body"),
        ("New", "GPT.trunk"),
        ("Removed", "f"),
    ]
    assert diff_parts.read_header("Part 8.\n\nStarts here.").starts_here


def test_a_verbatim_copy_needs_no_more_than_from(make):
    assert diff_parts.check_file(make("From part_6/model.py")) == []


def test_comments_docstrings_and_layout_are_no_changes(make):
    path = make(
        "From part_6/model.py",
        ("def f():\n", '# A comment.\ndef f():\n    """Says more."""\n\n'),
        ("    return 2", "    return (2)  # the same"),
    )
    assert diff_parts.check_file(path) == []
    assert {change.kind for change in diff_parts.read_step(path).changes} == {"Same"}


def test_a_true_header(make):
    header = """From part_6/model.py
    New      h
    Changed  A (its fields, and
             more (much more)), A.forward,
             main body, constants
    Removed  g, B (h takes its place)

Shapes: these words, and B, are not part of it."""
    path = make(
        header,
        ("SIZE = 1", "SIZE = 2"),
        ("    x = 1", "    x = 2"),
        CHANGED_BODY,
        ("def g():\n    return 2", "def h():\n    return 2"),
        ("class B:\n    def forward(self):\n        return 1\n", ""),
        ("print(f())", "print(h())"),
    )
    assert diff_parts.check_file(path) == []


@pytest.mark.parametrize(
    "manifest, replacement, problem",
    [
        ("", CHANGED_BODY, '"A.forward" changed but the header does not say so'),
        ("", ("    x = 1", "    x = 2"), '"A" changed but the header does not say so'),
        ("", ("def f", "def h"), '"h" is new but the header does not say so'),
        ("", ("def g():\n    return 2", ""), '"g" was removed but the header does not say so'),
        ("Changed  f", ("", ""), 'the header says that "f" changed, but it is the same'),
        ("New f", ("", ""), 'the header says that "f" is new, but it is the same'),
        ("Removed f", ("", ""), 'the header says that "f" was removed, but it is the same'),
        ("New  h", ("", ""), 'the header says that "h" is new, but there is no such unit'),
        ("Changed main body", ("", ""), 'the header says that "main body" changed, but it is the'),
        ("Changed constants", ("", ""), 'the header says that "constants" changed, but it is the'),
        ("f", ("", ""), '"f" stands before New, Changed or Removed'),
        # All methods of B changed, but only one of A's.
        ("Changed  A", CHANGED_BODY, 'says that "A" changed, but "A.__init__" is the same'),
    ],
)
def test_a_lie_is_noticed(make, manifest, replacement, problem):
    path = make(f"From part_6/model.py\n    {manifest}", replacement)
    problems = diff_parts.check_file(path)
    assert any(problem in line for line in problems), problems


def test_a_class_stands_for_its_methods_if_all_of_them_changed(make):
    replacement = (
        "class B:\n    def forward(self):\n        return 1\n",
        "class B:\n    def forward(self):\n        return 2\n",
    )
    assert diff_parts.check_file(make("From part_6/model.py\n    Changed  B", replacement)) == []


def test_a_class_stands_for_all_that_came_and_for_all_that_went(make):
    replacement = ("class B:\n    def forward", "class B:\n    def call")
    header = "From part_6/model.py\n    New  B\n    Removed  B"
    assert diff_parts.check_file(make(header, replacement)) == []


def test_a_class_whose_fields_changed_does_not_hide_a_changed_method(make):
    header = "From part_6/model.py\n    Changed  A"
    problems = diff_parts.check_file(make(header, ("    x = 1", "    x = 2"), CHANGED_BODY))
    assert problems == ['"A.forward" changed but the header does not say so']


def test_a_whole_new_class_is_one_line(make):
    replacement = ("class B:", "class C(A):\n    def f(self):\n        return 1\n\n\nclass B:")
    problems = diff_parts.check_file(make("From part_6/model.py", replacement))
    assert problems == ['"C" is new but the header does not say so']


def test_main_body_constants_and_imports_need_not_be_named(make):
    path = make(
        "From part_6/model.py",
        ("import math", "import json"),
        ("SIZE = 1", "SIZE = 2"),
        ("print(f())", "print(g())"),
    )
    assert diff_parts.check_file(path) == []
    kinds = {change.name: change.kind for change in diff_parts.read_step(path).changes}
    changed = {name for name, kind in kinds.items() if kind == "Changed"}
    assert changed == {"imports", "constants", "main body"}


def test_definitions_keep_their_order(make):
    f = "def f():\n    return 1\n\n\n"
    g = "def g():\n    return 2\n\n\n"
    problems = diff_parts.check_file(make("From part_6/model.py", (f + g, g + f)))
    assert problems == ['"g" now stands before "f": definitions must keep their order']


def test_the_file_behind_from_must_exist(make, capsys):
    path = make("From part_5/model.py")
    problem = "the header says From part_5/model.py, but there is no such file"
    assert diff_parts.check_file(path) == [problem]

    with pytest.raises(SystemExit) as stopped:
        diff_parts.read_step(path)
    assert stopped.value.code == 2
    assert "From part_5/model.py, but there is no such file" in capsys.readouterr().err


def test_a_file_of_the_chain_needs_a_header(make):
    assert diff_parts.check_file(make("It says nothing.")) == [
        'the header has neither a From line nor "Starts here"'
    ]
    path = make("Starts here. Takes from part_6/train.py: respond, collate.")
    assert diff_parts.check_file(path) == []
    assert diff_parts.read_step(path).origin is None


def test_check_all_counts_the_headers_and_names_the_files(make, tmp_path):
    make("From part_6/model.py", CHANGED_BODY)
    number, problems = diff_parts.check_all([6, 7], tmp_path)
    assert number == 1
    assert problems == [
        'part_6/model.py: the header has neither a From line nor "Starts here"',
        'part_7/model.py: "A.forward" changed but the header does not say so',
    ]


def test_files_of_a_part_may_continue_each_other(tmp_path):
    headers = {
        "model.py": "Starts here",
        "model_streaming.py": "From part_8/model.py",
        "train_ppo.py": "From part_8/train_reinforce.py",
        "train_reinforce.py": "Starts here",
        "bench.py": "From part_8/train_ppo.py",
        "demo_rollout.py": "This is a demo.",
    }
    (tmp_path / "part_8").mkdir()
    for name, header in headers.items():
        (tmp_path / "part_8" / name).write_text(f'"""\nPart 8.\n\n{header}\n"""\n')

    names = [path.name for path in diff_parts.files_of(8, tmp_path)]
    assert names == [
        "model.py",
        "model_streaming.py",
        "train_reinforce.py",
        "train_ppo.py",
        "bench.py",
    ]
    step = diff_parts.read_step(tmp_path / "part_8/train_ppo.py")
    assert step.origin == tmp_path / "part_8/train_reinforce.py"


def test_units_have_their_own_lines():
    source = diff_parts.read_source(ROOT / "part_0/prepare_data.py")
    units = source.units
    assert units["pick"].lines[0] == "def pick(rng, options):"
    assert units["Config.__post_init__"].lines[0] == "    def __post_init__(self):"
    assert "    seed: int = 0  # seed of all random numbers" in units["Config"].lines
    assert "class Config:" not in units["Config.__post_init__"].lines
    assert "    def __post_init__(self):" not in units["Config"].lines
    assert "import json" in units["imports"].lines
    assert any(line.startswith("sys.path.insert") for line in units["imports"].lines)
    assert any(line.startswith("P_BRIEF = ") for line in units["constants"].lines)
    assert units["main body"].lines[0] == 'if __name__ == "__main__":'


# --------------------------------------------------------------------------------------------------
# The table and the page


def test_the_table_counts_as_git_does(make, tmp_path, capsys):
    make("From part_6/model.py", CHANGED_BODY, ("def g():\n    return 2\n", ""))
    diff_parts.print_table([6, 7], tmp_path)
    _, line = capsys.readouterr().out.splitlines()
    # Same: imports, constants, f, A, A.__init__, B, B.forward and the main body.
    assert line.split() == "part_6/model.py -> part_7/model.py 8 1 0 1 +6 -4".split()


def test_the_page_marks_the_words_that_differ():
    old, new = mark_differences(tokenize(["x = a + b  # sum"]), tokenize(["x = a + c  # sum"]))
    assert old.replace('<span class="c"># sum</span>', "#") == "x = a + <mark>b</mark>  #"
    assert new.replace('<span class="c"># sum</span>', "#") == "x = a + <mark>c</mark>  #"

    # Two lines that have nothing in common get no marks.
    old, new = mark_differences(tokenize(["alpha"]), tokenize(["beta = 1 < 2"]))
    assert "<mark>" not in old + new
    assert "&lt;" in new


# --------------------------------------------------------------------------------------------------
# The script


def run(*options, root=ROOT):
    command = [sys.executable, root / "part_0/diff_parts.py", *options]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def test_the_script_shows_a_part():
    done = run(8, "--file=model.py", "--color=1")
    assert done.returncode == 0, done.stderr
    assert "\033[32mNew     \033[0m ActorCritic" in done.stdout
    assert "\033[32m+class ActorCritic(GPT):\033[0m" in done.stdout


def test_colours_can_be_left_out(make, capsys):
    path = make("From part_6/model.py", CHANGED_BODY)
    diff_parts.show(diff_parts.read_step(path), color=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "part_6/model.py -> part_7/model.py"
    assert lines[1].endswith("9 same, 1 changed, 0 new, 0 removed   (+1 -1 lines)")
    assert lines[2] == "    Changed  A.forward"
    assert "-        return self.y" in lines and "+        return self.y + 1" in lines


def test_the_script_writes_a_page(tmp_path):
    done = run(8, f"--html={tmp_path / 'page.html'}")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert "ActorCritic" in page
    assert page.count("<details") == page.count("</details>")
    assert page.count("<pre") == page.count("</pre>")
    assert "http" not in page.split("</style>")[0], "the page must need no other file"


def test_the_script_checks_the_headers(make, tmp_path):
    (tmp_path / "part_0").mkdir()
    shutil.copy(ROOT / "shared.py", tmp_path)
    for name in ("diff_parts.py", "diff_page.py"):
        shutil.copy(ROOT / "part_0" / name, tmp_path / "part_0")

    # The made-up part_6/model.py continues nothing, so it would need a header, too.
    path = make("From part_6/model.py", CHANGED_BODY)
    done = run(7, "--check", root=tmp_path)
    assert done.returncode == 1
    assert done.stdout == 'part_7/model.py: "A.forward" changed but the header does not say so\n'

    header = "From part_6/model.py\n    Changed  A.forward"
    path.write_text(path.read_text().replace("From part_6/model.py", header))
    done = run(7, "--check", root=tmp_path)
    assert done.returncode == 0
    assert done.stdout == "1 headers are true\n"


@pytest.mark.parametrize("options", [["77"], ["7", "--file=none.py"]])
def test_a_wrong_option_is_one_line(options):
    done = run(*options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
