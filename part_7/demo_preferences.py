"""
Part 7: what does preference data look like, and how often can a label be predicted at all?

    python part_7/demo_preferences.py
    python part_7/demo_preferences.py --pair=3     another held-out pair

A label says which of two answers a judge preferred, not how good either is. In this world the judge
counts the checks that each answer passes. The difference of the two counts is the gap, and the
better answer is preferred with probability sigmoid(gap / tau) (Bradley and Terry 1952).

So the judge errs, and a model that knew every gap would still disagree with some of the labels. Its
accuracy, the mean of sigmoid(|gap| / tau), is called the Bayes accuracy: no model can do better.
Human labels are noisy, too. InstructGPT's labellers agreed with one another in about 73 % of the
pairs (Ouyang et al. 2022).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np

from shared import (
    fail,
    figure,
    judge,
    output_folder,
    parse_args,
    read_jsonl,
    read_text,
    require,
    save_figure,
    save_metrics,
)


@dataclass
class Config:
    pair: int = 0  # which held-out pair is printed and drawn
    width: int = 92  # characters per line in the picture of the pair
    out: str = ""  # output folder; empty: out/ beside this script


class Checks(NamedTuple):
    passed: list  # names of the checks that an answer passes
    failed: list  # names of those that it fails


class GapRow(NamedTuple):
    pairs: int  # how many pairs have this gap
    right: float  # share of them in which the better answer is preferred
    ceiling: float  # the expected share, sigmoid(gap / tau)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def differing(first, second):
    """Two lists of words -> for each list, flags that are True where the other has no such word at
    that place (the matching of Ratcliff and Obershelp)."""
    first_differs = [True] * len(first)
    second_differs = [True] * len(second)
    matcher = SequenceMatcher(None, first, second, autojunk=False)
    for i, j, length in matcher.get_matching_blocks():
        first_differs[i : i + length] = [False] * length
        second_differs[j : j + length] = [False] * length
    return first_differs, second_differs


def checks_of(record, side):
    """What the judge finds in the answer record[side] -> Checks."""
    checks = judge(record, record[side]).checks
    passed = [name for name, holds in checks.items() if holds]
    failed = [name for name, holds in checks.items() if not holds]
    return Checks(passed, failed)


def by_gap(gaps, tau):
    """The gaps of labelled pairs -> {size of the gap: GapRow}. A gap is negative if the judge
    preferred the worse answer."""
    count = Counter(gaps)
    table = {}
    for size in sorted({abs(gap) for gap in gaps}):
        pairs = count[size] + count[-size]
        table[size] = GapRow(pairs, count[size] / pairs, sigmoid(size / tau))
    return table


def bayes_accuracy(gaps, tau):
    """The accuracy of a model that knows every gap: the mean of sigmoid(|gap| / tau)."""
    return float(np.mean([sigmoid(abs(gap) / tau) for gap in gaps]))


def write_words(ax, words, marked, line, width, colour):
    """Writes words from this line on, at most `width` characters per line; the marked ones are bold
    and in colour -> the next free line."""
    column = 0
    for word, is_marked in zip(words, marked):
        if column + len(word) > width:
            line += 1
            column = 0
        ax.text(
            column / width,
            line,
            word,
            family="monospace",
            size=9.5,
            va="center",
            color=colour if is_marked else "black",
            weight="bold" if is_marked else "normal",
        )
        column += len(word) + 1
    return line + 1


def draw_pair(record, width, title, path):
    """The prompt, both answers with the words in which they differ, and the checks they fail."""
    prompt = record["prompt"].split()
    chosen = record["chosen"].split()
    rejected = record["rejected"].split()
    chosen_marked, rejected_marked = differing(chosen, rejected)

    fig, ax = figure(title, height=4.2)
    line = write_words(ax, prompt, [False] * len(prompt), 0, width, "black") + 0.6
    answers = [
        ("chosen", chosen, chosen_marked, "C2"),
        ("rejected", rejected, rejected_marked, "C3"),
    ]
    for side, words, marked, colour in answers:
        ax.text(0, line, side, size=11, weight="bold", va="center", color=colour)
        line = write_words(ax, words, marked, line + 1, width, colour)
        failed = ", ".join(checks_of(record, side).failed) or "none"
        ax.text(0, line, f"failed checks: {failed}", size=9.5, style="italic", va="center")
        line += 1.6
    ax.set(xlim=(0, 1), ylim=(line - 0.5, -0.8))
    ax.axis("off")
    save_figure(fig, path)


def draw_gaps(table, best, tau, title, path):
    """Left: how many pairs have each gap, and how many of them are labelled wrong. Right: the share
    of right labels by gap, beside what is expected."""
    sizes = np.array(list(table))
    pairs = np.array([row.pairs for row in table.values()])
    right_share = np.array([row.right for row in table.values()])
    fig, (left, right) = figure(title, columns=2, height=4)

    preferred = pairs * right_share
    left.bar(sizes, preferred, color="C2", label="better answer preferred")
    left.bar(sizes, pairs - preferred, bottom=preferred, color="C3", label="worse preferred")
    left.set(xlabel="gap, in checks passed", ylabel="pairs", xticks=sizes)
    left.legend(fontsize=9)

    x = np.linspace(0, sizes.max(), 200)
    right.plot(x, 1 / (1 + np.exp(-x / tau)), color="gray", label=f"sigmoid(gap / {tau:g})")
    half_interval = 1.96 * np.sqrt(right_share * (1 - right_share) / pairs)
    right.errorbar(
        sizes, right_share, half_interval, fmt="o", color="C0", capsize=3, label="labels, 95 %"
    )
    right.axhline(best, color="black", linestyle="--", label=f"Bayes accuracy {best:.3f}")
    right.set(xlabel="gap, in checks passed", ylabel="share of right labels", ylim=(0.45, 1.02))
    right.legend(fontsize=9, loc="lower right")
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    folder = require("data/stories")
    tau = json.loads(read_text(folder / "facts.json"))["tau"]
    fields = ["prompt", "chosen", "rejected"]
    train = read_jsonl(folder / "preferences.jsonl", fields)
    val = read_jsonl(folder / "preferences_val.jsonl", fields)
    if not 0 <= cfg.pair < len(val):
        fail(f"--pair={cfg.pair} must be from 0 to {len(val) - 1}")
    out = output_folder(cfg)

    # one pair
    record = val[cfg.pair]
    print(record["prompt"])
    for side in ("chosen", "rejected"):
        checks = checks_of(record, side)
        failed = ", ".join(checks.failed) or "none"
        print(f"  {side}: {record[side]}")
        print(f"    passes {len(checks.passed)} checks; failed checks: {failed}")
    which = "better" if record["gap"] > 0 else "worse"
    probability = sigmoid(record["gap"] / tau)
    title = (
        f"The judge prefers the {which} answer (gap {abs(record['gap'])}, "
        f"probability {probability:.2f})"
    )
    print(title)
    draw_pair(record, cfg.width, title, out / "demo_preferences_pair.png")

    # all pairs
    gaps = [record["gap"] for record in train]
    table = by_gap(gaps, tau)
    best = bayes_accuracy(gaps, tau)
    print("\ngap   pairs   right label   expected")
    for size, row in table.items():
        print(f"{size:3} {row.pairs:7} {row.right:13.3f} {row.ceiling:10.3f}")

    labels_right = float(np.mean(np.array(gaps) > 0))
    title = (
        f"The judge prefers the better answer in {labels_right:.1%} of {len(gaps):,} pairs\n"
        f"(expected: {best:.1%}); with gap 1 in {table[1].right:.1%}, "
        f"with gap 2 in {table[2].right:.1%}"
    )
    print(title)
    draw_gaps(table, best, tau, title, out / "demo_preferences_gaps.png")

    label_right_by_gap = {f"label_right_gap_{size}": row.right for size, row in table.items()}
    save_metrics(
        out,
        name="demo_preferences",
        labels_right=labels_right,
        bayes_accuracy=best,
        bayes_accuracy_val=bayes_accuracy([record["gap"] for record in val], tau),
        pairs=len(gaps),
        tau=tau,
        mean_gap=float(np.mean(np.abs(gaps))),
        **label_right_by_gap,
    )
