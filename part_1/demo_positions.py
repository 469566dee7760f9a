"""
Part 1, positions: how do sinusoidal and learned positions differ, and what does training learn?

    python part_1/demo_positions.py
    python part_1/demo_positions.py --seeds=3

The dot product of two sinusoids is a sum of cos(speed x distance), so it depends on their distance
only (Vaswani et al. 2017, section 3.5). Learned positions start as noise: no two of them are
related. The task of train.py needs pairs of positions, because each letter of the answer comes from
one place in the word. The demo trains learned positions on this task and asks two questions. Do
they become alike if they are near each other? And does a head put the positions into pairs?
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass, replace
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import GPTConfig, causal_mask
from shared import (
    Log,
    figure,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
)
from train import ALPHABET, GPT, evaluate, get_batch, sinusoids


@dataclass
class Config:
    steps: int = 300  # optimizer steps, as in train.py
    batch_size: int = 64  # words per step
    lr: float = 3e-3  # learning rate of AdamW
    block_size: int = 16  # number of positions; half of them are the word
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    threads: int = 1  # CPU threads; more are no faster with matrices as small as these
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "seeds", "threads"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        is_possible = self.block_size >= 4 and self.block_size % 2 == 0
        assert is_possible, f"block_size={self.block_size} must be even and at least 4"


# what is measured ---------------------------------------------------------------------------------


def cosines(table):
    """Position embeddings (T, C) -> (T, T): 1 for the same direction, 0 for unrelated ones."""
    directions = F.normalize(table, dim=-1)
    return directions @ directions.T


def explained_by_distance(table):
    """How much of the variance of the cosines do distances explain? -> a share, at most 1

    table (T, C). For each pair of positions, the prediction is the mean cosine of all pairs at the
    same distance. The share is 1 if it is always right. Random embeddings reach expected_of_noise.
    """
    all_cosines = cosines(table)
    T = len(table)
    row, column = torch.triu_indices(T, T, offset=1)  # each pair once
    cosine = all_cosines[row, column]  # (pairs,)

    means = [all_cosines.diagonal(distance).mean() for distance in range(1, T)]
    predicted = torch.stack(means)[column - row - 1]  # (pairs,)
    unexplained = (cosine - predicted).square().sum()
    total = (cosine - cosine.mean()).square().sum()
    return (1 - unexplained / total).item()


def expected_of_noise(T):
    """What explained_by_distance finds in random embeddings on average: T - 1 means, fitted to
    T (T - 1) / 2 numbers, explain a part of them by chance."""
    pairs = T * (T - 1) / 2
    return (T - 2) / (pairs - 1)


@torch.no_grad()
def position_scores(model):
    """The scores of the first block's heads if all letters were alike -> (H, T, T), with the keys
    that a query may not see at minus infinity."""
    attn = model.h[0].attn
    T = len(model.wpe)
    average_letter = model.wte.weight.mean(dim=0)  # (C,)
    x = model.h[0].ln_1(model.wpe + average_letter)  # (T, C)

    q = attn.c_q(x).view(T, attn.n_head, -1).transpose(0, 1)  # (H, T, D)
    k = attn.c_k(x).view(T, attn.n_head, -1).transpose(0, 1)  # (H, T, D)
    scores = q @ k.mT / q.size(-1) ** 0.5  # (H, T, T)

    pos = torch.arange(T, device=x.device)
    return scores.masked_fill(~causal_mask(pos, pos), float("-inf"))


def share_paired(scores):
    """scores (H, T, T) -> for each head the share of the answer's rows with the highest score on
    the letter to say (H,).

    Row n is the bar. It says letter n - 1 of the word, and row n + i says letter n - 1 - i.
    """
    T = scores.size(-1)
    n = T // 2
    i = torch.arange(n)
    favourite = scores[:, n + i].argmax(dim=-1).cpu()  # (H, n)
    is_paired = favourite == n - 1 - i
    return is_paired.float().mean(dim=-1)


# train --------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One training with learned positions."""

    start: torch.Tensor  # (T, C), the positions before training
    end: torch.Tensor  # (T, C), the positions after it
    scores: torch.Tensor  # (H, T, T), position_scores after training
    paired_before: float  # share_paired of the best head before training
    paired_after: float  # share_paired of the best head after it
    accuracy: float  # share of letters right in new words


def train(cfg, gpt_cfg, device, log, first_step):
    """The training loop of train.py, with learned positions -> Run"""
    torch.manual_seed(cfg.seed)
    model = GPT(gpt_cfg, "learned").to(device)
    start = model.wpe.detach().cpu().clone()
    paired_before = share_paired(position_scores(model)).max().item()

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    n = cfg.block_size // 2
    for step in range(cfg.steps):
        x, y = get_batch(step, cfg, cfg.block_size)
        logits = model(x.to(device))[:, n:]  # (B, n, V)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten().to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        length = model.wpe.norm(dim=-1).mean().item()
        log(first_step + step, loss=loss.item(), length=length)

    scores = position_scores(model).cpu()
    return Run(
        start=start,
        end=model.wpe.detach().cpu(),
        scores=scores,
        paired_before=paired_before,
        paired_after=share_paired(scores).max().item(),
        accuracy=evaluate(model, cfg, cfg.block_size, device),
    )


def growth(run):
    """How many times as long are the positions after training?"""
    return (run.end.norm(dim=-1).mean() / run.start.norm(dim=-1).mean()).item()


# draw ---------------------------------------------------------------------------------------------


def draw_matrices(title, tables, path):
    """The numbers of each table. tables: {name: (T, C)}"""
    fig, axes = figure(title, rows=len(tables), height=7)
    for ax, (name, table) in zip(axes, tables.items()):
        largest = table.abs().max()
        image = ax.imshow(table, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
        ax.set_title(name, fontsize=11)
        ax.set(ylabel="position")
        ax.grid(False)
        fig.colorbar(image, ax=ax)
    axes[-1].set_xlabel("channel")
    save_figure(fig, path)


def draw_cosines(ax, name, table):
    image = ax.imshow(cosines(table), cmap="RdBu", vmin=-1, vmax=1)
    ax.figure.colorbar(image, ax=ax, shrink=0.6)
    ax.set_title(f"{name}: cosines", fontsize=11)
    ax.set(xlabel="position", ylabel="position")
    ax.grid(False)


def draw_distances(ax, tables):
    """The cosines by distance: their mean as a line, and their range as a band."""
    for name, table in tables.items():
        diagonals = [cosines(table).diagonal(distance) for distance in range(len(table))]
        means = [values.mean() for values in diagonals]
        lowest = [values.min() for values in diagonals]
        highest = [values.max() for values in diagonals]
        ax.plot(means, ".-", label=name)
        ax.fill_between(range(len(table)), lowest, highest, alpha=0.2)
    ax.set(xlabel="distance in positions", ylabel="cosine: mean, lowest, highest")
    ax.legend(fontsize=8)


def draw_scores(ax, scores, head):
    """The scores (T, T) of one head. What is masked is gray."""
    visible = scores.masked_fill(scores.isinf(), float("nan"))
    image = ax.imshow(visible, cmap="viridis")
    ax.figure.colorbar(image, ax=ax, label="q k / sqrt(D), layer 1", shrink=0.6)
    ax.set_title(f"learned, trained: scores of head {head + 1}", fontsize=11)
    ax.set(xlabel="position of the key", ylabel="position of the query")
    ax.set_facecolor("lightgray")
    ax.grid(False)


def draw_products(title, tables, scores, path):
    """The cosines of the first and the last table, the cosines of all tables by distance, and the
    scores of the head that pairs best. tables: {name: (T, C)}, scores (H, T, T)"""
    fig, axes = figure(title, rows=2, columns=2, height=8)
    names = list(tables)
    draw_cosines(axes[0, 0], names[0], tables[names[0]])
    draw_cosines(axes[0, 1], names[-1], tables[names[-1]])
    draw_distances(axes[1, 0], tables)
    head = share_paired(scores).argmax().item()
    draw_scores(axes[1, 1], scores[head], head)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    torch.set_num_threads(cfg.threads)
    device = pick_device(cfg.device)
    gpt_cfg = GPTConfig(vocab_size=len(ALPHABET), block_size=cfg.block_size)
    out = output_folder(cfg)

    # train with every seed
    log = Log(out, cfg.seeds * cfg.steps, name="demo_positions")
    runs = []
    for i in range(cfg.seeds):
        seed_cfg = replace(cfg, seed=cfg.seed + i)
        runs.append(train(seed_cfg, gpt_cfg, device, log, first_step=i * cfg.steps))

    # what came out
    fixed = sinusoids(cfg.block_size, gpt_cfg.n_embd)
    explained_fixed = explained_by_distance(fixed)
    noise = expected_of_noise(cfg.block_size)
    numbers = {
        "distance_before": [explained_by_distance(run.start) for run in runs],
        "distance_after": [explained_by_distance(run.end) for run in runs],
        "longer": [growth(run) for run in runs],
        "paired_before": [run.paired_before for run in runs],
        "paired_after": [run.paired_after for run in runs],
        "accuracy": [run.accuracy for run in runs],
    }
    print(
        f"\nShare of the variance of the cosines that distances explain: "
        f"sinusoids {explained_fixed:.0%}, noise {noise:.0%} on average"
    )
    for name, values in numbers.items():
        print(f"{name:16} {mean(values):.3f}  ({min(values):.3f} to {max(values):.3f})")

    # the tables themselves
    tables = {
        "sinusoids": fixed,
        "learned, at the start": runs[0].start,
        "learned, trained": runs[0].end,
    }
    title = (
        f"Training makes the learned positions {mean(numbers['longer']):.1f} times as long; "
        "the sinusoids are fixed"
    )
    draw_matrices(title, tables, out / "demo_positions_matrices.png")

    # their cosines, and the head that pairs positions
    title = (
        f"Variance of the cosines that distances explain: sinusoids {explained_fixed:.0%}, "
        f"learned {mean(numbers['distance_after']):.0%}, noise {noise:.0%}\n"
        f"Positions that the best head pairs as the task needs: "
        f"{mean(numbers['paired_after']):.0%}, before training {mean(numbers['paired_before']):.0%}"
    )
    draw_products(title, tables, runs[0].scores, out / "demo_positions_products.png")

    save_metrics(
        out,
        name="demo_positions",
        **numbers,
        distance_sinusoids=explained_fixed,
        noise=noise,
        seed=cfg.seed,
        seeds=cfg.seeds,
        steps=cfg.steps,
    )
