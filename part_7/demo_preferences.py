"""
Part 7 - what preference data is: one pair word by word, how large the gaps are, and how often a label can be guessed.

    python part_7/demo_preferences.py
    python part_7/demo_preferences.py --pair=3     another held-out pair

A label says which of two answers a judge preferred, not how good either is. This world's judge counts the checks that
each answer holds; the difference is the gap. It then labels by Bradley and Terry's rule (1952): the better answer wins
with probability sigmoid(gap / tau). So even who knows all gaps is right only in the mean of sigmoid(|gap| / tau): the
Bayes accuracy. People agree with one another in about 73 % of pairs (InstructGPT, Ouyang et al. 2022).
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

from shared import cli, fail, figure, judge, read_jsonl, read_text, require, save_figure, save_metrics, setup

@dataclass
class Config:
    pair: int = 0  # which held-out pair is printed and drawn
    width: int = 92  # characters a line in the picture of the pair
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def differing(a, b):
    """Two lists of words -> for each, which of its words the other lacks there (Ratcliff and Obershelp's matching)."""
    own = [[True] * len(a), [True] * len(b)]
    for i, j, n in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks():
        own[0][i:i + n] = own[1][j:j + n] = [False] * n
    return own

def by_gap(gaps, tau):
    """Signed gaps of labelled pairs -> {|gap|: (pairs, share with the better answer preferred, the ceiling)}."""
    count = Counter(gaps)
    sizes = sorted({abs(gap) for gap in gaps})
    total = {g: count[g] + count[-g] for g in sizes}
    return {g: (total[g], count[g] / total[g], 1 / (1 + math.exp(-g / tau))) for g in sizes}

def bayes(gaps, tau):
    """The accuracy of who knows every gap: the mean of sigmoid(|gap| / tau)."""
    return float(np.mean([1 / (1 + math.exp(-abs(gap) / tau)) for gap in gaps]))

def held(record, side):
    """-> the names of the checks that an answer holds, and of those it fails. A gap is a difference of two counts."""
    checks = judge(record, record[side])[0]
    return [name for name, ok in checks.items() if ok], [name for name, ok in checks.items() if not ok]

def write_words(ax, words, marked, line, width, colour):
    """Words on a grid of characters, from line on; the marked ones bold and in colour -> the next free line."""
    column = 0
    for word, mark in zip(words, marked):
        if column + len(word) > width:
            line, column = line + 1, 0
        ax.text(column / width, line, word, family="monospace", size=9.5, va="center",
                color=colour if mark else "black", weight="bold" if mark else "normal")
        column += len(word) + 1
    return line + 1

def draw_pair(record, width, said, path):
    words = {side: record[side].split() for side in ("chosen", "rejected")}
    marked = dict(zip(words, differing(*words.values())))
    fig, ax = figure(said, height=4.2)
    line = write_words(ax, record["prompt"].split(), [False] * 99, 0, width, "black") + 0.6
    for side, colour in (("chosen", "C2"), ("rejected", "C3")):
        ax.text(0, line, side, size=11, weight="bold", va="center", color=colour)
        line = write_words(ax, words[side], marked[side], line + 1, width, colour)
        wrong = ", ".join(held(record, side)[1]) or "nothing"
        ax.text(0, line, f"fails: {wrong}", size=9.5, style="italic", va="center")
        line += 1.6
    ax.set(xlim=(0, 1), ylim=(line - 0.5, -0.8))
    ax.axis("off")
    save_figure(fig, path)

def draw_gaps(gaps, table, best, tau, said, path):
    """Left: how many pairs have each gap, wrong labels apart. Right: labels that are right, by gap, and the ceiling."""
    fig, (left, right) = figure(said, columns=2, height=4)
    sizes = np.array(list(table))
    n, share, _ = np.array(list(table.values())).T
    left.bar(sizes, n * share, color="C2", label="better answer preferred")
    left.bar(sizes, n * (1 - share), bottom=n * share, color="C3", label="worse answer preferred")
    left.set(xlabel="gap, in checks held", ylabel="pairs", xticks=sizes)
    left.legend(fontsize=9)
    x = np.linspace(0, sizes.max(), 200)
    right.plot(x, 1 / (1 + np.exp(-x / tau)), color="gray", label=f"ceiling, sigmoid(gap / {tau:g})")
    right.errorbar(sizes, share, 1.96 * np.sqrt(share * (1 - share) / n), fmt="o", color="C0", capsize=3,
                   label="these labels, 95 %")
    right.axhline(best, color="black", linestyle="--", label=f"Bayes accuracy {best:.3f}")
    right.set(xlabel="gap, in checks held", ylabel="share of labels that are right", ylim=(0.45, 1.02))
    right.legend(fontsize=9, loc="lower right")
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    setup(cfg)
    folder = require("data/stories")
    tau = json.loads(read_text(folder / "facts.json"))["tau"]
    train, val = (read_jsonl(folder / f"preferences{split}.jsonl", ["prompt", "chosen", "rejected", "gap"])
                  for split in ("", "_val"))
    0 <= cfg.pair < len(val) or fail(f"--pair={cfg.pair} must be from 0 to {len(val) - 1}")

    # one pair
    record = val[cfg.pair]
    p = 1 / (1 + math.exp(-record["gap"] / tau))
    print(record["prompt"])
    for side in ("chosen", "rejected"):
        right, wrong = held(record, side)
        print(f"  {side}: {record[side]}\n    holds {len(right)} checks, fails {', '.join(wrong) or 'none'}")
    who = "better" if record["gap"] > 0 else "worse"
    said = f"A pair with gap {abs(record['gap'])}: the judge preferred the {who} answer, probability {p:.2f}"
    print(said)
    draw_pair(record, cfg.width, said, Path(cfg.out) / "demo_preferences_pair.png")

    # all pairs
    gaps = [r["gap"] for r in train]
    table, best = by_gap(gaps, tau), bayes(gaps, tau)
    print("\ngap   pairs   label right   ceiling")
    for g, (n, share, ceiling) in table.items():
        print(f"{g:3} {n:7} {share:13.3f} {ceiling:9.3f}")
    right = float(np.mean(np.array(gaps) > 0))
    said = (f"{right:.1%} of {len(gaps):,} labels prefer the better answer (expected: {best:.1%});\n"
            f"of the pairs with gap 1, {table[1][1]:.1%}, of those with gap 2, {table[2][1]:.1%}")
    print(said)
    draw_gaps(gaps, table, best, tau, said, Path(cfg.out) / "demo_preferences_gaps.png")
    save_metrics(cfg, name="demo_preferences", labels_right=right, bayes_accuracy=best, bayes_accuracy_val=bayes(
        [r["gap"] for r in val], tau), pairs=len(gaps), tau=tau, mean_gap=float(np.mean(np.abs(gaps))), seed=cfg.seed,
                 **{f"label_right_gap_{g}": share for g, (_, share, _) in table.items()})
