"""
Part 0: the page of diff_parts.py. It is one HTML file that needs no other file: side by side on a
wide screen, inline on a phone.
"""

import ast
import difflib
import html
import re
from pathlib import Path
from typing import NamedTuple

CONTEXT = 4  # unchanged lines that stay visible around a change
SHORTEST_FOLD = 4  # unchanged lines are folded away only if they are at least this many
TOO_DIFFERENT = 0.7  # above this share of differing tokens, marks would be everywhere

KEYWORDS = """and as assert break class continue def del elif else False for from global if import
in is lambda None not or pass raise return True while with yield self"""

# The group that matches is the colour of the token: string, comment, keyword or number.
TOKEN = re.compile(
    r'''
      (?P<s> [rbf]?"""[\s\S]*?""" | [rbf]?"(?:\\.|[^"\\\n])*" | [rbf]?'(?:\\.|[^'\\\n])*' )
    | (?P<c> \#[^\n]* )
    | (?P<k> \b(?:KEYWORDS)\b )
    | (?P<n> \b\d[\w.]* )
    | \w+ | \n | [^\S\n]+ | .
    '''.replace("KEYWORDS", "|".join(KEYWORDS.split())),
    re.VERBOSE,
)

STYLE = """
:root {
  color-scheme: light dark;
  --bg: #fff; --ink: #1c2128; --dim: #656d76; --line: #d8dee4; --card: #f6f8fa;
  --add: #e0f5e5; --add2: #a6e4b4; --del: #ffe9e7; --del2: #ffc1bc;
  --k: #a0309c; --s: #0b5394; --c: #6a737d; --n: #9a4b00;
  --new: #1a7f37; --chg: #9a6700; --gone: #cf222e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #0f1318; --ink: #d9e0e8; --dim: #8d96a0; --line: #2c333b; --card: #171c23;
    --add: #12301c; --add2: #1f6a37; --del: #3a1a1c; --del2: #7c2a2e;
    --k: #d69be6; --s: #8fc1ff; --c: #8b949e; --n: #e8a866;
    --new: #4ac26b; --chg: #d4a72c; --gone: #ff7b72;
  }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; max-width: 1500px; padding: 24px 16px 64px;
  background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px }
h2 { font-size: 1.1rem; margin: 48px 0 4px; overflow-wrap: anywhere }
p { margin: 4px 0 }
a { color: inherit }
pre {
  margin: 0; padding: 0 12px; min-height: 1.55em;
  font: 13px/1.55 ui-monospace, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.dim { color: var(--dim) }
.about { padding: 12px; margin: 12px 0; background: var(--card); border-radius: 8px }

/* the list of units at the top of a file */
.list a { display: inline-block; margin: 0 12px 2px 0; font: 13px ui-monospace, monospace }
.list b { display: inline-block; width: 5.5em }
.New { color: var(--new) }
.Changed { color: var(--chg) }
.Removed { color: var(--gone) }

/* one unit, and in it one row per stretch of lines, with the old and the new side */
.unit { border: 1px solid var(--line); border-radius: 8px; margin: 12px 0; overflow: hidden }
.unit > summary {
  padding: 6px 12px; background: var(--card); cursor: pointer; overflow-wrap: anywhere;
  font: 600 14px ui-monospace, monospace;
}
summary span { font-weight: 400 }
.row { display: grid; grid-template-columns: 1fr 1fr }
.row > * { min-width: 0 }
.row .old { border-right: 1px solid var(--line) }
.edit .old, .gone { background: var(--del) }
.edit .new, .add { background: var(--add) }
.edit > :empty { background: none }
mark { color: inherit; border-radius: 3px; background: var(--add2) }
.old mark { background: var(--del2) }
.fold > summary {
  padding: 2px 12px; background: var(--card); color: var(--dim); cursor: pointer; font-size: 13px;
}

/* colours of the syntax */
.k { color: var(--k) }
.s { color: var(--s) }
.c { color: var(--c); font-style: italic }
.n { color: var(--n) }

/* a narrow screen has no room for two sides, so the old lines stand above the new ones */
@media (max-width: 900px) {
  .row { grid-template-columns: 1fr }
  .row.same .old, .edit > :empty { display: none }
  .row .old { border-right: 0 }
  pre { font-size: 12px; padding: 0 8px }
}
"""


class PageFile(NamedTuple):
    """What the page shows of one file."""

    path: Path
    changes: list  # diff_parts.Change: kind, name, old and new source lines
    title: str
    summary: str  # the line below the title


class Token(NamedTuple):
    colour: str  # s, c, k, n, or None for ordinary text
    text: str


# --------------------------------------------------------------------------------------------------
# Source lines as HTML


def tokenize(lines):
    """Split source lines into tokens: one list of Tokens per line.

    The lines are read as one text, because a docstring may go over several of them.
    """
    rows = [[]]
    for match in TOKEN.finditer("\n".join(lines)):
        for number, text in enumerate(match.group().split("\n")):
            if number > 0:
                rows.append([])
            if text:
                rows[-1].append(Token(match.lastgroup, text))
    return rows


def flatten(rows):
    """All tokens of all lines as one list."""
    return [token for row in rows for token in row]


def to_html(rows, marked=()):
    """Lines of tokens as HTML. `marked` has the numbers of the tokens to mark, counted over all
    lines."""
    html_lines = []
    number = 0
    for row in rows:
        line = ""
        for token in row:
            piece = html.escape(token.text)
            if token.colour:
                piece = f'<span class="{token.colour}">{piece}</span>'
            if number in marked and token.text.strip():
                piece = f"<mark>{piece}</mark>"
            line += piece
            number += 1
        html_lines.append(line)
    return "\n".join(html_lines)


def mark_differences(old_rows, new_rows):
    """Both sides of one edit as HTML. The tokens that differ are marked -> (old, new)."""
    old = flatten(old_rows)
    new = flatten(new_rows)
    old_marks = set()
    new_marks = set()
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for kind, old_start, old_end, new_start, new_end in matcher.get_opcodes():
        if kind != "equal":
            old_marks.update(range(old_start, old_end))
            new_marks.update(range(new_start, new_end))

    # Between two sides that have little in common, marks would cover nearly everything.
    differing = len(old_marks) + len(new_marks)
    if not old_rows or not new_rows or differing >= TOO_DIFFERENT * (len(old) + len(new)):
        return to_html(old_rows), to_html(new_rows)
    return to_html(old_rows, old_marks), to_html(new_rows, new_marks)


# --------------------------------------------------------------------------------------------------
# One unit


def side_by_side(kind, old, new):
    """One row with two columns. kind: "edit" or "same". old, new: HTML, which may be empty."""
    left = "<div></div>"
    if old:
        left = f'<pre class="old">{old}</pre>'
    right = "<div></div>"
    if new:
        right = f'<pre class="new">{new}</pre>'
    return f'<div class="row {kind}">{left}{right}</div>'


def same_rows(old_rows, new_rows, is_first, is_last):
    """Unchanged lines as HTML. A long stretch is folded away, except for the lines near an edit.

    is_first, is_last: is this the beginning, or the end, of the unit?
    """
    # At the beginning of a unit one line is enough: its `def`.
    visible_above = 1 if is_first else CONTEXT
    visible_below = 0 if is_last else CONTEXT
    head = min(visible_above, len(new_rows))
    tail = max(len(new_rows) - visible_below, head)
    hidden = tail - head
    if hidden < SHORTEST_FOLD:
        return side_by_side("same", to_html(old_rows), to_html(new_rows))

    def part(start, end):
        return side_by_side("same", to_html(old_rows[start:end]), to_html(new_rows[start:end]))

    pieces = [
        part(0, head),
        f'<details class="fold"><summary>{hidden} unchanged lines</summary>',
        part(head, tail),
        "</details>",
    ]
    if tail < len(new_rows):
        pieces.append(part(tail, len(new_rows)))
    return "".join(pieces)


def unit_body(change):
    """The lines of one unit as HTML. A changed unit is shown side by side."""
    old_rows = tokenize(change.old)
    new_rows = tokenize(change.new)
    if change.kind == "New":
        return f'<pre class="add">{to_html(new_rows)}</pre>'
    if change.kind == "Removed":
        return f'<pre class="gone">{to_html(old_rows)}</pre>'

    pieces = []
    matcher = difflib.SequenceMatcher(None, change.old, change.new, autojunk=False)
    for kind, old_start, old_end, new_start, new_end in matcher.get_opcodes():
        old = old_rows[old_start:old_end]
        new = new_rows[new_start:new_end]
        if kind == "equal":
            is_last = new_end == len(change.new)
            pieces.append(same_rows(old, new, is_first=new_start == 0, is_last=is_last))
        else:
            pieces.append(side_by_side("edit", *mark_differences(old, new)))
    return "".join(pieces)


# --------------------------------------------------------------------------------------------------
# One file, and the page


def anchor(file, name):
    """The id of a unit on the page, for links."""
    return f"{file.path.stem}:{name.replace(' ', '-')}"


def unit_html(file, change):
    """One unit as a block that can be closed."""
    if change.kind == "Changed":
        size = f"{len(change.old)} -> {len(change.new)} lines"
    else:
        size = f"{len(change.old or change.new)} lines"
    summary = f'<b class="{change.kind}">{change.kind}</b> {change.name}'
    return (
        f'<details class="unit" open id="{anchor(file, change.name)}">'
        f'<summary>{summary} <span class="dim">{size}</span></summary>'
        f"{unit_body(change)}</details>"
    )


def section(file):
    """One file of the page: its heading, the list of its units, then each unit."""
    pieces = [
        f'<h2 id="{file.path.stem}">{html.escape(file.title)}</h2>',
        f'<p class="dim">{file.summary}</p>',
        '<div class="list">',
    ]
    for kind in ("New", "Changed", "Removed"):
        links = ""
        for change in file.changes:
            if change.kind == kind:
                links += f'<a href="#{anchor(file, change.name)}">{change.name}</a>'
        if links:
            pieces.append(f'<p><b class="{kind}">{kind}</b>{links}</p>')
    pieces.append("</div>")

    for change in file.changes:
        pieces.append(unit_html(file, change))
    return "\n".join(pieces)


def page(part, files):
    """The whole diff of a part as one HTML page. files: list of PageFile. Returns a str."""
    # The docstring of the first file, which is the model where there is one, introduces the part.
    tree = ast.parse(files[0].path.read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree) or f"Part {part}"
    title, _, about = docstring.partition("\n")
    title = html.escape(title)
    about = html.escape(about.strip())

    links = [f'<a href="#{file.path.stem}">{file.path.name}</a>' for file in files]
    sections = [section(file) for file in files]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="dim">What Part {part} changes in the code that it continues: {" · ".join(links)}</p>
<pre class="about">{about}</pre>
{"".join(sections)}
</body>
</html>
"""
