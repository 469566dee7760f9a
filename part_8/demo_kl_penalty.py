"""
Part 8: what is the KL penalty for? PPO against a weak reward model, with the penalty and without.

    python part_8/demo_kl_penalty.py --seeds=3
    python part_8/demo_kl_penalty.py --pairs=0     the reward model of Part 7, which is not weak

A reward model that has learned from few pairs is right about what the SFT policy writes, and wrong
about what PPO finds. Its score goes on rising while gold falls. This is over-optimization. The weak
reward model has a linear head, because an implicit reward is hard to exploit.

With d = sqrt(KL), Gao, Schulman and Hilton (2022) fit the gold that RL gains by d (a - b ln d). It
is highest at d = exp(a / b - 1). They find that a penalty does not lift this curve: PPO only stops
earlier on it.

train_rm.py and train_ppo.py run as they are, each in a process of its own. The figure shows the
answers of PPO's rollouts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import subprocess
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import NamedTuple

import torch

from shared import (
    ROOT,
    as_json,
    figure,
    output_folder,
    parse_args,
    pick_device,
    read_jsonl,
    read_log,
    require,
    save_figure,
    save_metrics,
    set_seed,
)


@dataclass
class Config:
    init: str = "part_6/out/sft.pt"  # checkpoint of the SFT model

    # preferences that the reward model learns from; 0: take the reward model of Part 7
    pairs: int = 256

    rm_steps: int = 60  # optimizer steps of the reward model, 24 pairs each
    betas: str = "0,0.05,0.2"  # KL coefficients, the reward that a nat of KL costs
    steps: int = 24  # iterations of PPO
    batch_size: int = 64  # answers per iteration
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("rm_steps", "steps", "batch_size", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.pairs >= 0, f"pairs={self.pairs} must not be negative"
        for word in self.betas.split(","):
            is_number = word.strip().replace(".", "", 1).isdigit()
            assert is_number, f"betas={self.betas} must be numbers with commas between them"


# the runs -----------------------------------------------------------------------------------------


def launch(script, out, **options):
    """Runs a train script in a process of its own. What it prints goes to stderr."""
    command = [sys.executable, str(ROOT / script), f"--out={out}"]
    for name, value in options.items():
        command.append(f"--{name}={value}")
    child = subprocess.run(command, stdout=sys.stderr)

    # The child has already printed why it failed.
    if child.returncode != 0:
        sys.exit(child.returncode)


def weak_reward_model(cfg, init, seed, folder, device):
    """The path of a reward model that has learned from cfg.pairs preferences, drawn by the seed."""
    if cfg.pairs == 0:
        return require("part_7/out/rm.pt")

    # train_rm.py holds out a tenth of the pairs.
    path = require("data/stories") / "preferences.jsonl"
    records = read_jsonl(path, ["prompt", "chosen", "rejected"])
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    drawn = [records[i] for i in order[: math.ceil(cfg.pairs / 0.9)]]

    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "pairs.jsonl"
    data.write_text(as_json(drawn))
    # Linear: an implicit reward starts from what the SFT model knows, and is hard to exploit.
    launch(
        "part_7/train_rm.py",
        folder,
        head="mean",
        init=init,
        data=data,
        steps=cfg.rm_steps,
        seed=seed,
        device=device.type,
    )
    return folder / "rm.pt"


def run_ppo(cfg, init, rm, beta, seed, folder, device):
    """train_ppo.py with a fixed beta -> (3, steps): d, score and gold of the answers of every
    iteration."""
    launch(
        "part_8/train_ppo.py",
        folder,
        init=init,
        rm=rm,
        kl_coef=beta,
        kl_target=0,
        score_clip=1e9,
        prompts=8,
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        seed=seed,
        device=device.type,
    )
    rows = []
    for record in read_log(folder):
        # The KL of sampled tokens is an estimate, and near 0 it may be negative.
        d = max(record["kl"], 0.0) ** 0.5
        rows.append([d, record["reward"], record["gold"]])
    return torch.tensor(rows).T


# what came out ------------------------------------------------------------------------------------


class Fit(NamedTuple):
    a: float
    b: float
    r2: float  # share of the gain's variance that the curve explains


def fit(d, gain):
    """Least squares of gain = d (a - b ln d) -> Fit."""
    basis = torch.stack([d, -torch.special.xlogy(d, d)], dim=1)  # (N, 2)
    solution = torch.linalg.lstsq(basis, gain[:, None]).solution[:, 0]
    residuals = basis @ solution - gain
    r2 = 1 - residuals.var(correction=0) / gain.var(correction=0)
    a, b = solution.tolist()
    return Fit(a, b, r2.item())


@dataclass
class Summary:
    """What PPO reached with one beta; every list has one entry per seed."""

    start: float  # gold of the first iteration's answers, the SFT policy's own, over all seeds
    a: float  # the curve d (a - b ln d) through the gains of all iterations and seeds
    b: float
    r2: float
    best: list  # highest gold, or `start` if gold never rises
    end: list  # gold at the end
    kl: list  # KL of the last iteration, in nats per answer
    score: list  # the reward model's score in the last iteration


def summarize(curves):
    """curves (seeds, 3, steps) of one beta -> Summary. Best and end are means of 4 iterations."""
    d, score, gold = curves.unbind(dim=1)  # (seeds, steps) each
    window = min(4, gold.size(1))
    smooth = gold.unfold(1, window, 1).mean(dim=2)  # (seeds, steps - window + 1)
    start = gold[:, :1].mean()
    curve = fit(d.flatten(), (gold - start).flatten())
    return Summary(
        start=start.item(),
        a=curve.a,
        b=curve.b,
        r2=curve.r2,
        best=smooth.max(dim=1).values.clamp(min=start).tolist(),
        end=smooth[:, -1].tolist(),
        kl=(d[:, -1] ** 2).tolist(),
        score=score[:, -1].tolist(),
    )


def make_title(summaries, n):
    """{beta: Summary} -> one line for each beta. Gold "fell" if in every seed it lost more than
    noise: two standard errors of a difference between two means of n answers."""
    noise = 2 * (2 * 0.25 / n) ** 0.5
    lines = []
    for beta, summary in summaries.items():
        best = fmean(summary.best)
        line = f"beta {beta:g}: gold {summary.start:.2f}"
        if best > summary.start:
            line += f" to {best:.2f}"
        if all(b - e > noise for b, e in zip(summary.best, summary.end)):
            line += f", then {fmean(summary.end):.2f}"
        lines.append(f"{line}, at {fmean(summary.kl):.1f} nats")
    return "\n".join(lines)


def draw(summaries, curves, pairs, title, path):
    """Left the score of the reward model, right the truth, both over d."""
    fig, (left, right) = figure(title, "d = square root of KL, nats", columns=2, height=5)
    for i, (beta, summary) in enumerate(summaries.items()):
        d, score, gold = curves[beta].unbind(dim=1)  # (seeds, steps) each
        style = dict(color=f"C{i}", marker="osv^"[i % 4], markersize=4, linestyle="")
        left.plot(d.flatten(), score.flatten(), label=f"beta {beta:g}", **style)
        right.plot(d.flatten(), gold.flatten(), **style)

        line = torch.linspace(0, d.max().item(), 100)
        gain = summary.a * line - summary.b * torch.special.xlogy(line, line)
        right.plot(line, summary.start + gain, color=f"C{i}")

    left_title = f"reward model of {pairs:,} pairs" if pairs > 0 else "reward model of Part 7"
    left.set(title=left_title, ylabel="its score, in standard deviations")
    right.set(title="the truth", ylabel="gold, share; lines: d (a - b ln d)", ylim=(0, None))
    left.legend(fontsize=9)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    betas = [float(word) for word in cfg.betas.split(",")]
    init = require(cfg.init)
    out = output_folder(cfg)

    # a reward model for each seed, and PPO against it with each beta
    curves = {beta: [] for beta in betas}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        folder = out / f"demo_kl_penalty.rm.{seed}"
        rm = weak_reward_model(cfg, init, seed, folder, device)
        for beta in betas:
            folder = out / f"demo_kl_penalty.ppo.{beta:g}.{seed}"
            curves[beta].append(run_ppo(cfg, init, rm, beta, seed, folder, device))
    curves = {beta: torch.stack(runs) for beta, runs in curves.items()}  # (seeds, 3, steps) each
    summaries = {beta: summarize(runs) for beta, runs in curves.items()}

    # what came out
    metrics = {}
    for beta, summary in summaries.items():
        for key, value in asdict(summary).items():
            metrics[f"beta {beta:g}: {key}"] = value
    title = make_title(summaries, n=4 * cfg.batch_size)
    print(title)
    draw(summaries, curves, cfg.pairs, title, out / "demo_kl_penalty.png")
    save_metrics(
        out,
        name="demo_kl_penalty",
        pairs=cfg.pairs,
        seeds=cfg.seeds,
        seed=cfg.seed,
        **metrics,
    )
