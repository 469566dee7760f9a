"""
Part 7: what matters when a reward model is trained? The loss, the number of pairs, and the head.

    python part_7/demo_losses.py
    python part_7/demo_losses.py --seeds=3

Losses    Bradley-Terry (Ouyang et al. 2022, eq. 1) fits probabilities: sigmoid(r_a - r_b) is a
          claim, and here it can be compared with the true probability, sigmoid(gap / tau). A hinge
          loss only ranks, so nothing keeps its differences of rewards at that scale. Both ignore a
          constant that is added to all rewards; centring (Eisenstein et al. 2023, eq. 2) pulls the
          rewards towards 0.
Pairs     10 %, 30 % and all of the pairs, each seen once. So fewer pairs are also fewer steps.
Head      The implicit reward, which has no new layer; a linear layer on every token of the answer,
          or on the end token alone; and a linear layer in an encoder, in which each token sees the
          whole text.

Each training sees 2,560 pairs of the world once. train_rm.py makes 7,200 visits, and adds pairs
that the policy writes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from demo_sanity import Calibration, calibration, load_records, train
from model import RewardModel
from shared import (
    Log,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    read_text,
    require,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import Tokenizer
from train_rm import Config as RMConfig
from train_rm import against_truth, encode_records, rewards


@dataclass
class Config:
    init: str = "part_6/out/sft.pt"  # checkpoint of the SFT model, where each training starts
    data: str = "stories"  # stories or a JSONL file with prompt, chosen, rejected and gap

    # pairs of one training; a multiple of 8 * batch_size uses each pair exactly once
    pairs: int = 2560

    batch_size: int = 16  # pairs per step
    held_out: int = 500  # pairs of the validation data to evaluate on
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("pairs", "batch_size", "held_out", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"


@dataclass
class Arm:
    options: dict = field(default_factory=dict)  # what differs from Bradley-Terry without centring
    share: float = 1.0  # share of the pairs that are used


ARMS = {
    "Bradley-Terry": Arm(),
    "margin": Arm({"loss": "margin"}),
    "centred": Arm({"center": 0.01}),
    "linear mean": Arm({"head": "mean"}),
    "linear last": Arm({"head": "last"}),
    "encoder": Arm({"head": "mean", "bidirectional": True}),
    "10 %": Arm(share=0.1),
    "30 %": Arm(share=0.3),
}
BASELINE = "Bradley-Terry"
LOSSES = ["Bradley-Terry", "margin", "centred"]
SIZES = ["10 %", "30 %", "Bradley-Terry"]
HEADS = ["Bradley-Terry", "linear mean", "linear last", "encoder"]


class Result(NamedTuple):
    metrics: dict  # {name: number}
    calibrated: Calibration


def arm_config(name, cfg, pairs, seed):
    """train_rm.py's Config of an arm. Its steps are as many as use each of its pairs once."""
    arm = ARMS[name]
    steps = max(1, round(pairs * arm.share) // cfg.batch_size)
    options = {"center": 0.0, **arm.options}
    return RMConfig(steps=steps, batch_size=cfg.batch_size, seed=seed, **options)


def choose(pairs, rm_cfg):
    """As many pairs as a training uses, drawn with its seed. All arms of a seed draw in the same
    order, so that the smaller sets are parts of the larger ones."""
    generator = torch.Generator().manual_seed(rm_cfg.seed)
    order = torch.randperm(len(pairs), generator=generator).tolist()
    return [pairs[i] for i in order[: rm_cfg.steps * rm_cfg.batch_size]]


def measure(model, val, tau, device):
    """The reward model on held-out pairs -> Result. Its rewards are not normalized."""
    chosen, rejected = rewards(model, val, device)
    gap = chosen - rejected
    true_gap = torch.tensor([float(pair["gap"]) for pair in val])
    calibrated = calibration(gap, true_gap, tau)
    metrics = {
        "accuracy": (gap > 0).float().mean().item(),
        "mean_size": torch.cat([chosen, rejected]).abs().mean().item(),
        "calibration_error": calibrated.error,
        **against_truth(gap, val, tau),
    }
    return Result(metrics, calibrated)


def half_interval(shares, n):
    """Shares of n pairs each, one per seed -> half of the interval around their mean: the range of
    the seeds, but not less than the 95 % interval of a share of all pairs."""
    mean = np.mean(shares)
    total = n * len(shares)
    largest_distance = np.abs(np.array(shares) - mean).max()

    # 1 / total^2 keeps the interval from vanishing when all pairs or none are right.
    sampling = 1.96 * (mean * (1 - mean) / total + 1 / total**2) ** 0.5
    return max(largest_distance, sampling)


def compare(first, second, n):
    """How much higher the second mean is, as text; "no difference" if the intervals overlap."""
    difference = np.mean(second) - np.mean(first)
    if abs(difference) <= half_interval(first, n) + half_interval(second, n):
        return "no difference"
    return f"{difference:+.3f}"


def draw_bars(ax, results, arms, key, labels=None):
    """A bar for the mean of each arm, with its value in the label."""
    means = [results[arm][key].mean() for arm in arms]
    ax.bar(range(len(arms)), means, color=["C0", "C1", "C2", "C3"][: len(arms)], alpha=0.8)
    tick_labels = [f"{label}\n{mean:.2f}" for label, mean in zip(labels or arms, means)]
    ax.set_xticks(range(len(arms)), tick_labels, fontsize=8)


def draw_accuracies(ax, results, arms, n, labels=None):
    """Bars with the interval of each accuracy on n pairs, beside the Bayes accuracy."""
    draw_bars(ax, results, arms, "accuracy", labels)
    means = [results[arm]["accuracy"].mean() for arm in arms]
    halves = [half_interval(results[arm]["accuracy"], n) for arm in arms]
    ax.errorbar(range(len(arms)), means, halves, fmt="none", color="black", capsize=4)
    bayes = results[BASELINE]["bayes_accuracy"].mean()
    ax.axhline(bayes, color="gray", linestyle="--")
    ax.set(ylabel="accuracy (dashed: Bayes)", ylim=(0.5, 1))


def draw(results, curves, pairs_of, n, title, path):
    """results[arm][key] are arrays with one number per seed, curves[arm] is a Calibration,
    pairs_of[arm] the number of pairs of a training, n that of the held-out pairs."""
    fig, axes = figure(title, rows=2, columns=3, height=7.5)
    (losses, calibrations, sizes), (pairs, gaps, heads) = axes

    # upper row: the three losses
    draw_accuracies(losses, results, LOSSES, n)
    calibrations.axline([0, 0], [1, 1], color="gray", linestyle="--")
    for arm in LOSSES:
        error = results[arm]["calibration_error"].mean()
        label = f"{arm}: off by {error:.3f}"
        calibrations.plot(curves[arm].claimed, curves[arm].true, ".-", label=label)
    calibrations.set(xlabel="claimed probability", xlim=(0, 1))
    calibrations.set(ylabel="true probability", ylim=(0, 1))
    calibrations.legend(fontsize=7, loc="lower right")
    draw_bars(sizes, results, LOSSES, "mean_size")
    sizes.set(ylabel="mean size of a reward")

    # lower row: the number of pairs, the size of the gap, and the head
    x = [pairs_of[arm] for arm in SIZES]
    means = [results[arm]["accuracy"].mean() for arm in SIZES]
    halves = [half_interval(results[arm]["accuracy"], n) for arm in SIZES]
    pairs.errorbar(x, means, halves, fmt="o-", capsize=3)
    pairs.set(xlabel="pairs, each seen once", ylabel="accuracy", xticks=x, ylim=(0.5, 1))

    gap_sizes = (1, 2, 3, 4)
    in_order = [results[BASELINE][f"true_order_gap_{gap}"].mean() for gap in gap_sizes]
    gaps.bar(gap_sizes, in_order, color="C4")
    gaps.set(xlabel="gap, in checks passed", ylabel="share of pairs in true order")
    gaps.set(xticks=gap_sizes, ylim=(0.5, 1))

    labels = ["implicit", "linear,\nmean", "linear,\nlast", "linear,\nencoder"]
    draw_accuracies(heads, results, HEADS, n, labels)
    heads.set_xlabel("head of the reward model")
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # data first: a broken file must not wait for a model to be built
    world, val = load_records(cfg)
    sft = load_checkpoint(require(cfg.init), "sft")
    tok = Tokenizer.load(sft["tokenizer"])
    tau = json.loads(read_text(require("data/stories") / "facts.json"))["tau"]
    world = encode_records(world, tok, sft["gpt_config"]["block_size"])
    val = encode_records(val, tok, sft["gpt_config"]["block_size"])[: cfg.held_out]
    pairs = min(cfg.pairs, len(world))
    out = output_folder(cfg)

    # eight trainings per seed, from the same pairs
    steps_of = {arm: arm_config(arm, cfg, pairs, cfg.seed).steps for arm in ARMS}
    log = Log(out, cfg.seeds * sum(steps_of.values()), name="demo_losses")
    first_step = 0
    metrics_of = {arm: [] for arm in ARMS}
    curves = {}  # of the last seed
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for arm in ARMS:
            rm_cfg = arm_config(arm, cfg, pairs, seed)
            torch.manual_seed(seed)
            model = RewardModel.load(sft, head=rm_cfg.head, bidirectional=rm_cfg.bidirectional)
            model = model.to(device)
            train(model, choose(world, rm_cfg), rm_cfg, device, log, first_step, arm)
            first_step += rm_cfg.steps

            result = measure(model, val, tau, device)
            metrics_of[arm].append(result.metrics)
            curves[arm] = result.calibrated

    # one array per arm and metric, over the seeds
    results = {}
    for arm, rows in metrics_of.items():
        results[arm] = {key: np.array([row[key] for row in rows]) for key in rows[0]}

    # what came out
    for arm, metrics in results.items():
        numbers = [f"{key} {values.mean():.3f}" for key, values in metrics.items()]
        print(f"{arm:14}", *numbers, sep="  ")

    n = len(val)
    pairs_of = {arm: steps_of[arm] * cfg.batch_size for arm in SIZES}
    error = {arm: results[arm]["calibration_error"].mean() for arm in LOSSES}
    size = {arm: results[arm]["mean_size"].mean() for arm in LOSSES}
    effect = {}
    for arm in ARMS:
        effect[arm] = compare(results[BASELINE]["accuracy"], results[arm]["accuracy"], n)
    few = pairs_of["10 %"]
    many = pairs_of[BASELINE]
    title = (
        f"Claimed probabilities are off by {error['Bradley-Terry']:.2f} (Bradley-Terry), "
        f"{error['margin']:.2f} (margin), {error['centred']:.2f} (centred)\n"
        f"Centring: mean size of a reward {size['Bradley-Terry']:.1f} to {size['centred']:.1f}, "
        f"accuracy {effect['centred']}\n"
        f"Accuracy with {few} pairs instead of {many}: {effect['10 %']}\n"
        f"Linear layer instead of log-probability: {effect['linear mean']}, "
        f"on the end token only: {effect['linear last']}"
    )
    print(title)
    draw(results, curves, pairs_of, n, title, out / "demo_losses.png")

    metrics_by_name = {}
    for arm, metrics in results.items():
        for key, values in metrics.items():
            metrics_by_name[f"{arm} {key}".replace(" ", "_")] = values.tolist()
    save_metrics(
        out,
        name="demo_losses",
        pairs=pairs,
        held_out=n,
        seeds=cfg.seeds,
        seed=cfg.seed,
        **metrics_by_name,
    )
