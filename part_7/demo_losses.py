"""
Part 7 - Bradley-Terry, margin ranking and centring; more pairs; the score at the last token, the mean, or an encoder.

    python part_7/demo_losses.py
    python part_7/demo_losses.py --seeds=3

Bradley-Terry (InstructGPT, eq. 1) fits probabilities: sigmoid(r_a - r_b) can be held against this world's true ones,
sigmoid(gap / tau). The hinge only ranks; what its differences of reward claim as probabilities is nowhere in its loss.
Both are blind to a constant added to all rewards; Eisenstein et al. 2023 (eq. 2) pull them towards 0.
Reduced: 2560 of the world's pairs, each seen once, instead of 12,000 visits; fewer pairs are fewer steps too.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import itertools
import json
from dataclasses import dataclass

import numpy as np
import torch

from model import RewardModel
from shared import Log, cli, figure, load_checkpoint, read_text, require, save_figure, save_metrics, setup
from tokenizer import Tokenizer
from train_rm import (Config as RMConfig, against_truth, get_batch, load_data, lr_scale, make_optimizers,
                      preference_loss, rewards)

ARMS = {  # name -> what differs from Bradley-Terry on the mean of a causal model's scores; 10 % and 30 %: of its pairs
    "Bradley-Terry": {}, "margin": {"loss": "margin"}, "centred": {"center": 0.01},
    "last token": {"head": "last"}, "encoder": {"bidirectional": 1}, "10 %": {}, "30 %": {}}
BT, *_ = LOSSES = list(ARMS)[:3]

@dataclass
class Config:
    init: str = "part_6/out/sft.pt"  # the SFT model's checkpoint
    data: str = "stories"  # or the path of a JSONL file with prompt, chosen, rejected and gap
    pairs: int = 2560  # pairs of a training; 128 are one round of get_batch's sorting
    batch_size: int = 16  # pairs per step
    held_out: int = 500  # pairs to evaluate on
    seeds: int = 1  # how many seeds; the README quotes 3
    seed: int = 0  # the first of them
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script
    def __post_init__(self):
        assert min(self.pairs, self.batch_size, self.held_out, self.seeds) > 0, "sizes must be at least 1"

def train(model, pairs, rm, device, log, first, arm):
    optimizers = make_optimizers(model, rm)
    for step in range(rm.steps):
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * lr_scale(step, rm)
        chosen, rejected = model(*(z.to(device) for z in get_batch(pairs, step, rm))).chunk(2)
        loss = preference_loss(chosen, rejected, rm.loss, rm.margin, rm.center)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), rm.grad_clip)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        log(first + step, arm=arm, loss=loss.item())

def spread(shares, n):
    """Shares of n pairs, one per seed -> half of their interval: the seeds' range, but never less than 95 %."""
    mean, m = np.mean(shares), n * len(shares)
    return max(np.abs(shares - mean).max(), 1.96 * (mean * (1 - mean) / m + 1 / m**2) ** 0.5)

def compare(a, b, n):
    d = np.mean(b) - np.mean(a)
    return f"{d:+.3f}" if abs(d) > spread(a, n) + spread(b, n) else "no difference"

def bars(ax, found, arms, key, n=0):
    """A bar per arm: its mean; with n, the interval of a share of n."""
    mean = [found[arm][key].mean() for arm in arms]
    half = [spread(found[arm][key], n) for arm in arms] if n else None
    ax.bar(arms, mean, color=["C0", "C1", "C2"], alpha=0.8, capsize=4, yerr=half)
    ax.set_xticks(range(len(arms)), [f"{arm}\n{value:.2f}" for arm, value in zip(arms, mean)], fontsize=8)
    if n:
        ax.axhline(found[arms[0]]["bayes_accuracy"].mean(), color="gray", linestyle="--")
        ax.set(ylabel="accuracy on labels (dashed: Bayes)", ylim=(0.5, 1))

def draw(found, curves, sizes, n, said, path):
    fig, ((ax, middle, right), (pairs, gaps, heads)) = figure(said, rows=2, columns=3, height=7.5)
    bars(ax, found, LOSSES, "accuracy", n)
    middle.axline([0, 0], [1, 1], color="gray", linestyle="--")
    for arm in LOSSES:
        middle.plot(*curves[arm], ".-", label=f"{arm}: off by {found[arm]['calibration_error'].mean():.3f}")
    middle.set(xlabel="claimed probability", ylabel="true probability")
    middle.legend(fontsize=7, loc="lower right")
    bars(right, found, LOSSES, "mean_size")
    right.set(ylabel="mean |reward|, raw")
    x, accuracy = list(sizes.values()), [found[arm]["accuracy"] for arm in sizes]
    pairs.errorbar(x, np.mean(accuracy, axis=1), [spread(a, n) for a in accuracy], fmt="o-", capsize=3)
    pairs.set(xlabel="pairs, each seen once", ylabel="accuracy on labels", xticks=x, ylim=(0.5, 1))
    gaps.bar([1, 2, 3, 4], [found[BT][f"true_order_gap_{g}"].mean() for g in (1, 2, 3, 4)], color="C4")
    gaps.set(xlabel="gap, in checks held", ylabel="share in true order", xticks=[1, 2, 3, 4], ylim=(0.5, 1))
    bars(heads, {"mean": found[BT], **found}, ["mean", "last token", "encoder"], "accuracy", n)
    heads.set_xlabel("where the score is read")
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    sft = load_checkpoint(require(cfg.init), "sft")
    tok = Tokenizer.load(sft["tokenizer"])
    tau = json.loads(read_text(require("data/stories") / "facts.json"))["tau"]
    world, val = load_data(cfg, tok, sft["gpt_config"]["block_size"])
    val, N = val[:cfg.held_out], min(cfg.pairs, len(world))
    steps = {arm: max(1, round(N * {"10 %": 0.1, "30 %": 0.3}.get(arm, 1)) // cfg.batch_size) for arm in ARMS}

    # seven trainings per seed: the same pairs, the same start of the head
    log, first = Log(cfg, cfg.seeds * sum(steps.values()), name="demo_losses"), 0
    rows, curves = {arm: [] for arm in ARMS}, {}
    for seed, (arm, how) in itertools.product(range(cfg.seed, cfg.seed + cfg.seeds), ARMS.items()):
        perm = torch.randperm(len(world), generator=torch.Generator().manual_seed(seed)).tolist()
        rm = RMConfig(**{"center": 0.0, **how}, steps=steps[arm], batch_size=cfg.batch_size, seed=seed)
        torch.manual_seed(seed)
        model = RewardModel.load(sft, head=rm.head, bidirectional=rm.bidirectional).to(device)
        train(model, [world[i] for i in perm[:rm.steps * rm.batch_size]], rm, device, log, first, arm)
        both = torch.stack(rewards(model, val, device))
        truth, curves[arm] = against_truth(both[0] - both[1], val, tau)
        accuracy, size = (both[0] > both[1]).float().mean().item(), both.abs().mean().item()
        rows[arm].append({"accuracy": accuracy, "mean_size": size, **truth})
        first += rm.steps
    found = {arm: {key: np.array([m[key] for m in ms]) for key in ms[0]} for arm, ms in rows.items()}

    # what came out
    for arm, m in found.items():
        print(f"{arm:14}", *(f"{key} {v.mean():.3f}" for key, v in m.items()), sep="  ")
    n, sizes = len(val), {arm: steps[arm] * cfg.batch_size for arm in ("10 %", "30 %", BT)}
    off, size = ([found[arm][key].mean() for arm in LOSSES] for key in ("calibration_error", "mean_size"))
    against = {arm: compare(found[BT]["accuracy"], m["accuracy"], n) for arm, m in found.items()}
    said = (f"Probabilities off by {off[0]:.2f} (Bradley-Terry), {off[1]:.2f} (margin), {off[2]:.2f} (centred)\n"
            f"Centring: mean |reward| {size[0]:.1f} to {size[2]:.1f}; accuracy: {against['centred']}\n"
            f"{sizes['10 %']} pairs, not {sizes[BT]}: {against['10 %']}; last token: {against['last token']}; "
            f"encoder: {against['encoder']}")
    print(said)
    draw(found, curves, sizes, n, said, Path(cfg.out) / "demo_losses.png")
    save_metrics(cfg, name="demo_losses", pairs=N, held_out=n, seeds=cfg.seeds, seed=cfg.seed,
                 **{f"{arm} {key}".replace(" ", "_"): v.tolist() for arm, m in found.items() for key, v in m.items()})
