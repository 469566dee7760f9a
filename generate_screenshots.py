"""
Collects every figure of every part in screenshots/, and makes a page of them that opens from disk.

    python3 generate_screenshots.py         collects the figures, and lists the scripts without one
    python3 generate_screenshots.py --all   first runs every train script and demo without a figure
"""

import html
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

from PIL import Image  # comes with matplotlib

from shared import MAKERS, ROOT, parse_args, write_atomic


@dataclass
class Config:
    all: bool = False  # first run every train script and demo that has no figure yet
    out: str = "screenshots"  # folder to write, inside the repository


TITLE = "A large language model from nothing"

# The number of measured values that stand under a figure. The others are folded away.
ROWS_SHOWN = 8

# For the estimate that --all prints. A demo takes about a minute on two cores.
TRAIN_SECONDS = {maker.script: maker.seconds for maker in MAKERS.values()}
OTHER_SECONDS = 60

# The exit code of a script that the user has stopped with Ctrl-C
INTERRUPTED = 130

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1b1f24; --paper: #fff; --soft: #6a737d; --card: #f6f8fa;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --soft: #8b949e; --card: #161b22 }
}
body {
  font: 16px/1.5 system-ui, sans-serif;
  margin: 0 auto; max-width: 1280px; padding: 1rem;
  color: var(--ink); background: var(--paper);
}
nav a { margin-right: 1rem }
a { color: #0072b2 }
.part {
  display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr));
}
figure { margin: 0; padding: 1rem; background: var(--card); border-radius: 8px; min-width: 0 }
@media (max-width: 480px) {
  figure { padding: .6rem }
  body { padding: .6rem }
  nav a { display: inline-block }
}
img { width: 100%; height: auto; background: #fff; border-radius: 4px }
figcaption { font-weight: 600; margin: .5rem 0 }
code { color: var(--soft); overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: 14px }
td { padding: .1rem .8rem .1rem 0; overflow-wrap: anywhere }
"""


# ------------------------------------------------------------------------------------------
# What there is


def part_number(script):
    """The 7 of part_7/train_rm.py."""
    return int(script.parent.name.split("_")[1])


def find_scripts():
    """Every script that draws a figure, in order: part by part, training before demos."""
    candidates = [*ROOT.glob("part_*/train*.py"), *ROOT.glob("part_*/demo_*.py")]

    # Some scripts have a name of their own, such as part_10/quantize.py.
    for path in ROOT.glob("part_*/*.py"):
        has_other_name = not path.name.startswith(("train", "demo_", "test_"))
        if has_other_name and "save_figure(" in path.read_text():
            candidates.append(path)

    # The trainers for several processes are started by torchrun, and they draw nothing.
    scripts = [path for path in candidates if "_ddp" not in path.stem]

    def order(path):
        is_demo = path.name.startswith("demo")
        is_training = path.name.startswith("train")
        return part_number(path), is_demo, not is_training, path

    return sorted(scripts, key=order)


def find_figures(script):
    """The figures that a script has drawn: out/NAME.png and out/NAME_*.png."""
    figures = []
    for path in sorted((script.parent / "out").glob("*.png")):
        if path.stem == script.stem or path.stem.startswith(f"{script.stem}_"):
            figures.append(path)
    return figures


def read_title(figure):
    """The finding that shared.save_figure wrote into the file."""
    return Image.open(figure).info.get("Title", figure.stem.replace("_", " "))


def read_numbers(script):
    """{name: value} of what the script measured: texts and numbers, but no lists."""
    out = script.parent / "out"
    path = out / f"{script.stem}.json"

    # Only the part's main train script calls its file metrics.json.
    if script.name.startswith("train") and not path.exists():
        path = out / "metrics.json"
    if not path.exists():
        return {}

    values = json.loads(path.read_text())
    return {name: value for name, value in values.items() if isinstance(value, (int, float, str))}


# ------------------------------------------------------------------------------------------
# The page


def make_table(numbers):
    """The HTML of a table with a row for each number."""
    rows = []
    for name, value in numbers:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>")
    return "<table>" + "".join(rows) + "</table>"


def make_card(script, figure, file_name):
    """The HTML of one figure, with the script that drew it and what the script measured."""
    numbers = list(read_numbers(script).items())
    tables = make_table(numbers[:ROWS_SHOWN])
    folded = numbers[ROWS_SHOWN:]
    if folded:
        summary = f"<summary>{len(folded)} more numbers</summary>"
        tables += f"<details>{summary}{make_table(folded)}</details>"

    title = html.escape(read_title(figure))
    image = f'<img src="{file_name}" alt="{title}" loading="lazy">'
    return (
        f'<figure><a href="{file_name}">{image}</a>'
        f"<figcaption>{title}</figcaption>"
        f"<code>python {script.relative_to(ROOT)}</code>"
        f"{tables}</figure>"
    )


def make_page(cards):
    """The HTML of the whole page from {part: its cards}."""
    links = ""
    body = ""
    for part in sorted(cards):
        links += f'<a href="#part_{part}">Part {part}</a>'
        body += f'<h2 id="part_{part}">Part {part}</h2>'
        body += f'<div class="part">{"".join(cards[part])}</div>'

    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{TITLE}</title><style>{STYLE}</style>"
        f"<h1>{TITLE}</h1><nav>{links}</nav>{body}</html>\n"
    )


def collect_figures(folder):
    """Copy every figure to the folder and write index.html there -> the number of figures."""
    folder.mkdir(parents=True, exist_ok=True)
    cards = {}
    count = 0
    for script in find_scripts():
        part = part_number(script)
        for figure in find_figures(script):
            file_name = f"part_{part}_{figure.name}"
            shutil.copyfile(figure, folder / file_name)
            cards.setdefault(part, []).append(make_card(script, figure, file_name))
            count += 1

    write_atomic(folder / "index.html", make_page(cards).encode())
    return count


# ------------------------------------------------------------------------------------------
# --all


def estimate_seconds(scripts):
    seconds = 0
    for script in scripts:
        seconds += TRAIN_SECONDS.get(str(script.relative_to(ROOT)), OTHER_SECONDS)
    return seconds


def run_scripts(scripts):
    """Run these scripts one after the other -> the list of those that failed."""
    minutes = estimate_seconds(scripts) / 60
    print(
        f"{len(scripts)} scripts to run, one after the other: "
        f"about {minutes:.0f} minutes on two cores"
    )

    failed = []
    for i, script in enumerate(scripts, start=1):
        print(f"\n[{i}/{len(scripts)}] {script.relative_to(ROOT)}", flush=True)
        start = time.time()

        # An earlier script may have needed this one's checkpoint, and so it has run already.
        if not find_figures(script):
            code = subprocess.run([sys.executable, script]).returncode
            if code == INTERRUPTED:
                sys.exit(code)
            if code != 0:
                failed.append(script)
        print(f"{time.time() - start:.0f} s")
    return failed


if __name__ == "__main__":
    cfg = parse_args(Config)
    without_figure = [script for script in find_scripts() if not find_figures(script)]

    failed = []
    if cfg.all and without_figure:
        failed = run_scripts(without_figure)
        without_figure = [script for script in without_figure if not find_figures(script)]

    count = collect_figures(ROOT / cfg.out)
    print(f"{count} figures in {cfg.out}/, open {cfg.out}/index.html")
    for script in without_figure:
        print(f"  not run yet: python {script.relative_to(ROOT)}")
    for script in failed:
        print(f"  FAILED: python {script.relative_to(ROOT)}")
    if failed:
        sys.exit(1)
