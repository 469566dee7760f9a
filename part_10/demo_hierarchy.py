"""
Part 10, attention that knows the hierarchy: does a head need a curved space for a tree, and does it
help to give heads a sentence or a story to look at?

    python part_10/demo_hierarchy.py                      one seed
    python part_10/demo_hierarchy.py --seeds=3            three seeds: how much is chance?
    python part_10/demo_hierarchy.py --tasks=tree,map     some of the tasks only
    python part_10/demo_hierarchy.py --sweep              learning rates, one seed

Starts here.

The first figure compares three scores at head sizes 2 to 16, with equal parameters: the dot
product, the negative Euclidean distance and the negative hyperbolic distance. Why three? If the
hyperbolic head beats the dot product, nobody knows yet whether curvature has helped or any distance
would. The Euclidean head is the control.

    tree        which of 12 candidates is the closest ancestor? 364 nodes, memorized
    map         which of 12 candidates is the nearest point? No tree: here curvature should not help
    brackets    which bracket is innermost, after a closing bracket? A tree inside of the context

The second figure compares what heads may look at, in a small language model of the world's stories.
Every arm has its own learning rate (LR in train_hierarchy.py). It is the best one of --sweep, which
tries every arm with several rates, on a seed that the comparison does not use.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import train_hierarchy
from shared import (
    figure,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
    set_seed,
)
from train_hierarchy import KINDS, MAKE_TASK, TASKS

SIZES = [2, 4, 8, 16]  # channels of a query and a key
SWEEP_SEED = 100


class Panel(NamedTuple):
    """One panel of the first figure."""

    task: str
    measure: str  # the number of train_hierarchy's evaluation that it shows
    title: str


PANELS = [
    Panel("tree", "seen", "tree: closest ancestor"),
    Panel("tree", "held_out", "tree: pairs never seen in training"),
    Panel("map", "seen", "map (no tree): nearest point"),
    Panel("brackets", "type", "brackets: innermost open type"),
]

# What the four heads of each layer see
SCALES = {
    "plain": "story,story,story,story",
    "words, story": "words,words,story,story",
    "all three": "words,sentences,story,story",
}

# The learning rates that --sweep tries, and the head sizes for which it does
RATES = {
    "tree": [3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
    "map": [3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
    "brackets": [3e-3, 1e-2],
    "stories": [3e-3, 1e-2, 3e-2],
}
SWEEP_SIZES = [2, 8]


@dataclass
class Config:
    tasks: str = "tree,map,brackets,stories"  # which of these tasks to run
    sweep: bool = False  # try several learning rates instead, on a seed that the comparison lacks
    steps: int = 0  # optimizer steps of each model; 0: what the task needs
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for task in self.tasks.split(","):
            assert task in TASKS, f"tasks={self.tasks}: {task!r} is not one of {', '.join(TASKS)}"


def arms_of(task, sizes):
    """The arms of a task -> {name: options of train_hierarchy.Config}."""
    arms = {}
    if task == "stories":
        for name, scales in SCALES.items():
            arms[name] = {"task": task, "kind": "dot", "head_dim": 16, "scales": scales}
        return arms
    for kind in KINDS:
        for size in sizes:
            arms[f"{kind} {size}"] = {"task": task, "kind": kind, "head_dim": size}
    return arms


def run(device, **options):
    """Trains one model -> what it reached on held-out questions, with its seconds."""
    cfg = train_hierarchy.Config(**options)
    set_seed(cfg.seed)
    start = time.time()
    task = MAKE_TASK[cfg.task](cfg)
    model = task.make_model(cfg).to(device)
    result = train_hierarchy.train(model, task, cfg, device)
    return {**result, "seconds": time.time() - start}


def describe(result):
    return "  ".join(f"{name} {value:.3f}" for name, value in result.items())


# what came out ------------------------------------------------------------------------------------


def compare(first, second):
    """Values of several seeds each -> "above", "below", or "no difference from" if they overlap."""
    if min(first) > max(second):
        return "above"
    if max(first) < min(second):
        return "below"
    return "no difference from"


def range_text(values, digits=2):
    """The range of several numbers: "0.42 to 0.47", or one number if they are the same."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def values_of(results, task, arm, measure):
    return [result[measure] for result in results[task][arm]]


def distance_finding(results, panels):
    """The title of the first figure: the hyperbolic head against the Euclidean one, head size 2."""
    lines = ["Head size 2, share of right answers: hyperbolic against Euclidean"]
    for panel in panels:
        curved = values_of(results, panel.task, "hyperbolic 2", panel.measure)
        flat = values_of(results, panel.task, "euclidean 2", panel.measure)
        name = "tree, pairs never seen" if panel.measure == "held_out" else panel.task
        verdict = compare(curved, flat)
        lines.append(f"{name}: {range_text(curved)}, {verdict} {range_text(flat)}")
    return "\n".join(lines)


def scale_finding(results):
    """The title of the second figure."""
    plain = values_of(results, "stories", "plain", "nats")
    scales = values_of(results, "stories", "all three", "nats")
    verdict = compare(scales, plain)
    return (
        f"Heads for words, sentences and story: {range_text(scales, 3)} nats per word,\n"
        f"{verdict} plain attention with {range_text(plain, 3)}"
    )


def draw_distances(results, panels, path):
    """The share of right answers over the head size, one line per score, one panel per measure."""
    rows = 1 if len(panels) <= 2 else 2
    columns = math.ceil(len(panels) / rows)
    title = distance_finding(results, panels)
    fig, axes = figure(title, rows=rows, columns=columns, height=2.2 + 2.6 * rows)
    axes = np.ravel(axes)
    for ax, panel in zip(axes, panels):
        for kind, marker in zip(KINDS, "os^"):
            shares = []
            for size in SIZES:
                shares.append(values_of(results, panel.task, f"{kind} {size}", panel.measure))
            means = [sum(values) / len(values) for values in shares]
            lows = [min(values) for values in shares]
            highs = [max(values) for values in shares]
            [line] = ax.plot(SIZES, means, marker=marker, label=kind)
            ax.fill_between(SIZES, lows, highs, alpha=0.2, color=line.get_color())
        ax.set_xscale("log", base=2)
        ax.set_xticks(SIZES, SIZES)
        ax.set_title(panel.title, fontsize=11)
        ax.set(xlabel="head size D", ylabel="share right")
    for ax in axes[len(panels) :]:
        ax.axis("off")
    axes[0].legend(fontsize=9)
    save_figure(fig, path)


def draw_scales(results, path):
    """Nats per word, of all words and of those that must be copied from an earlier sentence."""
    fig, axes = figure(scale_finding(results), columns=2, height=3.6)
    panels = {"nats": "all words", "nats_copied": "names that an earlier sentence gave"}
    for ax, (measure, title) in zip(axes, panels.items()):
        for i, arm in enumerate(SCALES):
            values = values_of(results, "stories", arm, measure)
            ax.bar(arm, sum(values) / len(values), color=f"C{i}")
            ax.plot([arm] * len(values), values, "k.")  # a dot per seed
        ax.set_title(title, fontsize=10)
    axes[0].set_ylabel("held-out nats per word")
    save_figure(fig, path)


def quality(task, result):
    """One number by which --sweep compares learning rates: the mean of the shares of right answers,
    or minus the nats per word."""
    if task == "stories":
        return -result["nats"]
    shares = [value for name, value in result.items() if name != "seconds"]
    return sum(shares) / len(shares)


def sweep(tasks, cfg, device):
    """Every arm with several learning rates -> {task: {arm: {rate: result}}}."""
    table = {}
    for task in tasks:
        table[task] = {}
        for arm, options in arms_of(task, SWEEP_SIZES).items():
            table[task][arm] = {}
            for rate in RATES[task]:
                result = run(device, seed=SWEEP_SEED, steps=cfg.steps, lr=rate, **options)
                table[task][arm][rate] = result
                print(f"{task:9} {arm:14} lr {rate:g}  {describe(result)}", flush=True)
            rates = table[task][arm]
            best = max(rates, key=lambda rate: quality(task, rates[rate]))
            print(f"{task:9} {arm:14} best: {best:g}", flush=True)
    return table


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    out = output_folder(cfg)
    tasks = cfg.tasks.split(",")

    if cfg.sweep:
        table = sweep(tasks, cfg, device)
        save_metrics(out, name="demo_hierarchy_sweep", **table)
        sys.exit()

    # {task: {arm: [result of each seed]}}
    results = {task: {arm: [] for arm in arms_of(task, SIZES)} for task in tasks}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for task in tasks:
            for arm, options in arms_of(task, SIZES).items():
                result = run(device, seed=seed, steps=cfg.steps, **options)
                results[task][arm].append(result)
                print(f"seed {seed} {task:9} {arm:14} {describe(result)}", flush=True)

    save_metrics(out, name="demo_hierarchy", **results, seeds=cfg.seeds)
    panels = [panel for panel in PANELS if panel.task in tasks]
    if panels:
        print(distance_finding(results, panels))
        draw_distances(results, panels, out / "demo_hierarchy.png")
    if "stories" in tasks:
        print(scale_finding(results))
        draw_scales(results, out / "demo_hierarchy_scales.png")
