"""
Part 8: what does a critic know, and what is it worth? PPO with three critics from the same start.

    python part_8/demo_critics.py
    python part_8/demo_critics.py --seeds=3 --steps=40

none   every value is 0, so an advantage is the return to go, as in REINFORCE
head   a linear layer on the policy's trunk, which starts at zero (the usual form in games)
rm     a trunk of its own, which starts as the reward model (the usual form for language models,
       Ouyang et al. 2022)

A critic's quality is the share of the returns' variance that its values explain: 1 if it foresees
every return, 0 if it knows no more than their mean. A critic that explains nothing costs nothing
but time, because the advantages are whitened. One that explains much takes noise out of them.

train_ppo.py runs as it is, in a process of its own. The figure shows the answers of its rollouts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import subprocess
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shared import (
    ROOT,
    figure,
    output_folder,
    parse_args,
    pick_device,
    read_log,
    require,
    save_figure,
    save_metrics,
)


@dataclass
class Config:
    init: str = "part_6/out/sft.pt"  # checkpoint of the SFT model
    rm: str = "part_7/out/rm.pt"  # checkpoint of the reward model
    steps: int = 16  # iterations of PPO
    batch_size: int = 128  # answers per iteration
    prompts: int = 512  # held-out prompts that are answered and judged after each run
    lam: float = 0.95  # lambda of GAE for the critic rm; the two others have 1
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.steps >= 3, f"steps={self.steps} must be at least 3"
        assert self.batch_size % 2 == 0, f"batch_size={self.batch_size} must be even"


# The options of train_ppo.py for each critic. Without a value loss the head stays at zero. A critic
# that knows nothing needs lambda 1: a smaller one would discount the score, which comes last.
CRITICS = {
    "none": {"critic": "head", "vf_coef": 0.0, "lam": 1.0},
    "head": {"critic": "head", "lam": 1.0},
    "rm": {"critic": "rm", "lr_value": 1e-3},
}
LABELS = {"none": "no critic", "head": "head on the policy's trunk", "rm": "from the reward model"}


class Run(NamedTuple):
    """One run of train_ppo.py; the arrays have one entry per iteration."""

    explained: np.ndarray  # share of the returns' variance that the values explain
    gold: np.ndarray  # share of the rollout's answers that pass all checks
    seconds: np.ndarray  # time since the start, at the end of the iteration
    val_gold: float  # gold on held-out prompts after the run


def run_ppo(cfg, init, rm, critic, seed, folder, device):
    """train_ppo.py with one critic -> Run. What it prints goes to stderr."""
    options = {
        "init": init,
        "rm": rm,
        "out": folder,
        "steps": cfg.steps,
        "batch_size": cfg.batch_size,
        "prompts": cfg.prompts,
        "lam": cfg.lam,
        "seed": seed,
        "device": device.type,
        **CRITICS[critic],
    }
    command = [sys.executable, str(ROOT / "part_8/train_ppo.py")]
    for name, value in options.items():
        command.append(f"--{name}={value}")

    # The child has already printed why it failed.
    child = subprocess.run(command, stdout=sys.stderr)
    if child.returncode != 0:
        sys.exit(child.returncode)

    records = read_log(folder)
    seconds = [record["rollout_s"] + record["score_s"] + record["update_s"] for record in records]
    return Run(
        explained=np.array([record["explained_variance"] for record in records]),
        gold=np.array([record["gold"] for record in records]),
        seconds=np.cumsum(seconds),
        val_gold=json.loads((folder / "metrics.json").read_text())["ppo_gold"],
    )


def smooth(values, width=3):
    """The mean of each entry and its neighbours, along the last axis; at the ends of fewer."""
    kernel = np.ones(width)
    counts = np.convolve(np.ones(values.shape[-1]), kernel, mode="same")
    sums = np.apply_along_axis(np.convolve, -1, values, kernel, mode="same")
    return sums / counts


def make_title(runs):
    """{critic: [Run of each seed]} -> what the critics explain, and what the policies reached."""
    parts = []
    for critic, results in runs.items():
        half = max(1, len(results[0].explained) // 2)
        explained = np.mean([run.explained[:half].mean() for run in results])
        gold = np.mean([run.val_gold for run in results])
        seconds = np.mean([run.seconds[-1] for run in results])
        parts.append(f"{critic} {explained:.2f}, gold {gold:.2f} in {seconds:.0f} s")
    return "Explained variance in the first half: " + parts[0] + "\n" + "; ".join(parts[1:])


def draw(runs, title, path):
    """Left what the critics explain, right the gold of the rollouts over the time that they took.
    Thin lines are seeds, thick lines their means."""
    fig, (left, right) = figure(title, columns=2, height=4.6)
    for i, (critic, results) in enumerate(runs.items()):
        style = dict(color=f"C{i}", linestyle=["-", "--", "-."][i])
        explained = smooth(np.stack([run.explained for run in results]))  # (seeds, steps)
        gold = smooth(np.stack([run.gold for run in results]))
        seconds = np.mean([run.seconds for run in results], axis=0)  # (steps,)
        for row in range(len(results)):
            left.plot(explained[row], alpha=0.3, linewidth=0.8, **style)
            right.plot(seconds, gold[row], alpha=0.3, linewidth=0.8, **style)
        left.plot(explained.mean(axis=0), linewidth=2, label=LABELS[critic], **style)
        right.plot(seconds, gold.mean(axis=0), linewidth=2, **style)
    left.axhline(0, color="gray", linewidth=0.8)
    left.set(xlabel="iteration", ylabel="share of the returns' variance explained", ylim=(-1, 1))
    right.set(xlabel="seconds", ylabel="gold, share of the rollout's answers")
    fig.legend(loc="outside lower center", ncols=3, fontsize=9)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    init = require(cfg.init)
    rm = require(cfg.rm)
    out = output_folder(cfg)

    runs = {critic: [] for critic in CRITICS}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for critic in CRITICS:
            folder = out / f"demo_critics.{critic}.{seed}"
            runs[critic].append(run_ppo(cfg, init, rm, critic, seed, folder, device))

    # what came out
    title = make_title(runs)
    print(title)
    draw(runs, title, out / "demo_critics.png")
    metrics = {}
    for critic, results in runs.items():
        metrics[f"{critic}: explained"] = [run.explained for run in results]
        metrics[f"{critic}: gold"] = [run.gold for run in results]
        metrics[f"{critic}: seconds"] = [run.seconds for run in results]
        metrics[f"{critic}: val_gold"] = [run.val_gold for run in results]
    save_metrics(
        out,
        name="demo_critics",
        steps=cfg.steps,
        lam=cfg.lam,
        seeds=cfg.seeds,
        seed=cfg.seed,
        **metrics,
    )
