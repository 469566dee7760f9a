"""
Part 0 - the page of diff_parts.py: one self-contained HTML file, side by side on a desk, inline on a phone.
"""
import ast
import difflib
import html
import re

FOLD = 4  # lines of unchanged code that stay visible around a change

WORDS = """and as assert break class continue def del elif else False for from global if import in is lambda None not or
pass raise return True while with yield self"""
TOKEN = re.compile(r'(?P<s>[rbf]?"""[\s\S]*?"""|[rbf]?"(?:\\.|[^"\\\n])*"|[rbf]?\'(?:\\.|[^\'\\\n])*\')|(?P<c>#[^\n]*)'
                   rf"|(?P<k>\b(?:{'|'.join(WORDS.split())})\b)|(?P<n>\b\d[\w.]*)|\w+|\n|[^\S\n]+|.")
STYLE = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1c2128; --dim: #656d76; --line: #d8dee4; --card: #f6f8fa;
  --add: #e0f5e5; --add2: #a6e4b4; --del: #ffe9e7; --del2: #ffc1bc;
  --k: #a0309c; --s: #0b5394; --c: #6a737d; --n: #9a4b00; --new: #1a7f37; --chg: #9a6700; --gone: #cf222e }
@media (prefers-color-scheme: dark) { :root { --bg: #0f1318; --ink: #d9e0e8; --dim: #8d96a0; --line: #2c333b;
  --card: #171c23; --add: #12301c; --add2: #1f6a37; --del: #3a1a1c; --del2: #7c2a2e;
  --k: #d69be6; --s: #8fc1ff; --c: #8b949e; --n: #e8a866; --new: #4ac26b; --chg: #d4a72c; --gone: #ff7b72 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1500px; padding: 24px 16px 64px; background: var(--bg); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px }
h2 { font-size: 1.1rem; margin: 48px 0 4px; overflow-wrap: anywhere }
p { margin: 4px 0 }
a { color: inherit }
pre { margin: 0; padding: 0 12px; min-height: 1.55em; font: 13px/1.55 ui-monospace, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere }
.dim { color: var(--dim) }
.about { padding: 12px; margin: 12px 0; background: var(--card); border-radius: 8px }
.list a { display: inline-block; margin: 0 12px 2px 0; font: 13px ui-monospace, monospace }
.list b { display: inline-block; width: 5.5em }
.New { color: var(--new) } .Changed { color: var(--chg) } .Removed { color: var(--gone) }
.unit { border: 1px solid var(--line); border-radius: 8px; margin: 12px 0; overflow: hidden }
.unit > summary { padding: 6px 12px; background: var(--card); cursor: pointer; overflow-wrap: anywhere;
  font: 600 14px ui-monospace, monospace }
summary span { font-weight: 400 }
.row { display: grid; grid-template-columns: 1fr 1fr }
.row > * { min-width: 0 }
.row .old { border-right: 1px solid var(--line) }
.edit .old, .gone { background: var(--del) }
.edit .new, .add { background: var(--add) }
.edit > :empty { background: none }
mark { color: inherit; border-radius: 3px; background: var(--add2) }
.old mark { background: var(--del2) }
.fold > summary { padding: 2px 12px; background: var(--card); color: var(--dim); cursor: pointer; font-size: 13px }
.k { color: var(--k) } .s { color: var(--s) } .c { color: var(--c); font-style: italic } .n { color: var(--n) }
@media (max-width: 900px) {
  .row { grid-template-columns: 1fr }
  .row.same .old, .edit > :empty { display: none }
  .row .old { border-right: 0 }
  pre { font-size: 12px; padding: 0 8px }
}
"""


def tokens(lines):
    """Each source line as a list of (class, text); strings are found in the whole unit, so that a docstring is one."""
    rows = [[]]
    for m in TOKEN.finditer("\n".join(lines)):
        for i, text in enumerate(m.group().split("\n")):
            if i:
                rows.append([])
            if text:
                rows[-1].append((m.lastgroup, text))
    return rows


def colour(rows, marked=()):
    """Rows of tokens as HTML; `marked` holds the numbers of the tokens, counted over all rows, that differ."""
    out, i = [], 0
    for row in rows:
        line = ""
        for kind, text in row:
            span = f'<span class="{kind}">{html.escape(text)}</span>' if kind else html.escape(text)
            line += f"<mark>{span}</mark>" if i in marked and text.strip() else span
            i += 1
        out.append(line)
    return "\n".join(out)


def edited(old, new):
    """One edit, both sides as HTML, with the words that differ marked."""
    a, b = [t for row in old for t in row], [t for row in new for t in row]
    ops = [op for op in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes() if op[0] != "equal"]
    left, right = ({i for op in ops for i in range(op[k], op[k + 1])} for k in (1, 3))
    alike = old and new and len(left) + len(right) < 0.7 * (len(a) + len(b))  # else marks on everything only dazzle
    return colour(old, left if alike else ()), colour(new, right if alike else ())


def row(kind, old, new):
    left = f'<pre class="old">{old}</pre>' if old else "<div></div>"
    right = f'<pre class="new">{new}</pre>' if new else "<div></div>"
    return f'<div class="row {kind}">{left}{right}</div>'


def body(c):
    """The lines of one unit as HTML: whole when it came or went, side by side with folded sameness when it changed."""
    old, new = tokens(c.old), tokens(c.new)
    if c.kind != "Changed":
        return f'<pre class="add">{colour(new)}</pre>' if c.kind == "New" else f'<pre class="gone">{colour(old)}</pre>'
    out = []
    for op, i, j, k, l in difflib.SequenceMatcher(None, c.old, c.new, autojunk=False).get_opcodes():
        if op != "equal":
            out.append(row("edit", *edited(old[i:j], new[k:l])))
            continue
        head = min(FOLD if k else 1, l - k)
        tail = max(l - FOLD if l < len(c.new) else l, k + head)
        hidden = tail - k - head
        head, tail = (head, tail) if hidden > 3 else (l - k, l)
        out.append(row("same", colour(old[i:i + head]), colour(new[k:k + head])))
        if hidden > 3:
            inner = row("same", colour(old[i + head:i + tail - k]), colour(new[k + head:tail]))
            out.append(f'<details class="fold"><summary>{hidden} unchanged lines</summary>{inner}</details>')
            out.append(row("same", colour(old[i + tail - k:j]), colour(new[tail:l])) if tail < l else "")
    return "".join(out)


def section(path, changes, title, line):
    """One file of the page: heading, list of its units, each unit."""
    key = path.stem
    out = [f'<h2 id="{key}">{html.escape(title)}</h2><p class="dim">{line}</p><div class="list">']
    for kind in ("New", "Changed", "Removed"):
        names = [c.name for c in changes if c.kind == kind]
        links = "".join(f'<a href="#{key}:{n.replace(" ", "-")}">{n}</a>' for n in names)
        out.append(f'<p><b class="{kind}">{kind}</b>{links}</p>' if names else "")
    out.append("</div>")
    for c in changes:
        size = f"{len(c.old)} -> {len(c.new)} lines" if c.kind == "Changed" else f"{len(c.old or c.new)} lines"
        out.append(f'<details class="unit" open id="{key}:{c.name.replace(" ", "-")}"><summary><b class="{c.kind}">'
                   f'{c.kind}</b> {c.name} <span class="dim">{size}</span></summary>{body(c)}</details>')
    return "\n".join(out)


def page(part, found):
    """The whole diff as one HTML page (str). found: [(path, changes to show, title, line of counts)]."""
    doc = ast.get_docstring(ast.parse(found[0][0].read_text(encoding="utf-8"))) or f"Part {part}"
    title, _, about = doc.partition("\n")
    links = " · ".join(f'<a href="#{path.stem}">{path.name}</a>' for path, *_ in found)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>\n'
            f'<h1>{html.escape(title)}</h1><p class="dim">What Part {part} changes in the code it continues: {links}'
            f'</p><pre class="about">{html.escape(about.strip())}</pre>\n'
            + "\n".join(section(*f) for f in found) + "\n</body></html>\n")
