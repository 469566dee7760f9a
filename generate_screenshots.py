"""
Collects every figure of every part into screenshots/, and makes a page of them that opens from disk.

    python3 generate_screenshots.py         what there is now, and what has not been run yet
    python3 generate_screenshots.py --all   runs every train script and demo that has no figure yet, then collects
"""
import html
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image  # comes with matplotlib

from shared import MAKERS, ROOT, cli, write_atomic

@dataclass
class Config:
    all: bool = False  # also run what has no figure yet (a train script builds what it needs)
    out: str = "screenshots"  # folder to write, in the repository

SECONDS = dict(MAKERS.values())  # of each train script, on two cores; a demo takes about 60

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #6a737d; --card: #f6f8fa }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --soft: #8b949e; --card: #161b22 } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1280px; padding: 1rem; color: var(--ink);
       background: var(--paper) }
nav a { margin-right: 1rem } a { color: #0072b2 }
.part { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr)); gap: 1rem;
        align-items: start }
figure { margin: 0; padding: 1rem; background: var(--card); border-radius: 8px; min-width: 0 }
@media (max-width: 480px) { figure { padding: .6rem } body { padding: .6rem } nav a { display: inline-block } }
img { width: 100%; height: auto; background: #fff; border-radius: 4px }
figcaption { font-weight: 600; margin: .5rem 0 } code { color: var(--soft); overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: 14px } td { padding: .1rem .8rem .1rem 0; overflow-wrap: anywhere }
"""

def scripts():
    """Every script that draws, part by part: [(part, path)]."""
    found = [*ROOT.glob("part_*/train*.py"), *ROOT.glob("part_*/demo_*.py")]
    pairs = [(int(p.parent.name.split("_")[1]), p) for p in found]
    return sorted(pairs, key=lambda pair: (pair[0], "demo" in pair[1].name, pair[1]))

def figures(script):
    """The figures that a script has drawn: out/NAME.png or out/NAME_*.png."""
    return sorted(p for p in (script.parent / "out").glob("*.png") if re.fullmatch(rf"{script.stem}(_.*)?", p.stem))

def title(path):
    """The finding that shared.save_figure wrote into the file."""
    return Image.open(path).info.get("Title", path.stem.replace("_", " "))

def numbers(script):
    """What the script measured: out/NAME.json, or metrics.json of a train script."""
    path = script.parent / "out" / ("metrics.json" if script.name.startswith("train") else f"{script.stem}.json")
    values = json.loads(path.read_text()) if path.exists() else {}
    return {k: v for k, v in values.items() if isinstance(v, (int, float, str))}

def card(script, path, name):
    shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in numbers(script).items()}
    rows = [f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in shown.items()]
    first, rest = ("<table>" + "".join(part) + "</table>" for part in (rows[:8], rows[8:]))
    more = f"<details><summary>{len(rows) - 8} more numbers</summary>{rest}</details>" if len(rows) > 8 else ""
    said = html.escape(title(path))
    return (f'<figure><a href="{name}"><img src="{name}" alt="{said}" loading="lazy"></a>'
            f"<figcaption>{said}</figcaption><code>python {script.relative_to(ROOT)}</code>{first}{more}</figure>")

def page(cards):
    parts = sorted(cards)
    nav = "".join(f'<a href="#part_{n}">Part {n}</a>' for n in parts)
    body = "".join(f'<h2 id="part_{n}">Part {n}</h2><div class="part">{"".join(cards[n])}</div>' for n in parts)
    return ('<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>A large language model from nothing</title><style>{STYLE}</style>"
            f"<h1>A large language model from nothing</h1><nav>{nav}</nav>{body}</html>\n")

if __name__ == "__main__":
    cfg = cli(Config())
    missing = [path for _, path in scripts() if not figures(path)]
    broken = []
    if cfg.all and missing:
        minutes = sum(SECONDS.get(str(path.relative_to(ROOT)), 60) for path in missing) / 60
        print(f"{len(missing)} scripts to run, one after the other: about {minutes:.0f} minutes on two cores")
        for i, path in enumerate(missing):
            start = time.time()
            print(f"\n[{i + 1}/{len(missing)}] {path.relative_to(ROOT)}", flush=True)
            if not figures(path):  # an earlier one may have built it
                code = subprocess.run([sys.executable, path]).returncode
                if code == 130:  # Ctrl-C
                    sys.exit(code)
                broken += [path] if code else []
            print(f"{time.time() - start:.0f} s")
        missing = [path for path in missing if not figures(path)]
    folder, cards = ROOT / cfg.out, {}
    folder.mkdir(parents=True, exist_ok=True)
    for n, script in scripts():
        for path in figures(script):
            name = f"part_{n}_{path.name}"
            shutil.copyfile(path, folder / name)
            cards.setdefault(n, []).append(card(script, path, name))
    write_atomic(folder / "index.html", page(cards).encode())
    print(f"{sum(map(len, cards.values()))} figures in {cfg.out}/, open {cfg.out}/index.html")
    for path in missing:
        print(f"  not run yet: python {path.relative_to(ROOT)}")
    for path in broken:
        print(f"  FAILED: python {path.relative_to(ROOT)}")
    sys.exit(1 if broken else 0)
