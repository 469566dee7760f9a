"""
Part 2: what is a batch? A row of bytes, the same row shifted by one place, and a loss at every
position of it.

    python part_2/demo_batches.py
    python part_2/demo_batches.py --data=my.txt --steps=1200

One row of T bytes holds T exercises: position t sees x[0..t] and must predict y[t] = x[t + 1]. The
causal mask lets the model solve all of them in one forward pass. Position 1 has seen one byte only,
so it cannot beat the entropy of the next byte given one byte, H(y | x) (Shannon 1948). The last
position has seen the whole row. An untrained model guesses: ln 256 everywhere.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from shared import (
    Log,
    figure,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
    set_seed,
)
from train import get_batch, load_data


@dataclass
class Config:
    data: str = "stories"  # stories (the built-in world), shakespeare (a download) or a text file
    steps: int = 800  # optimizer steps
    batch_size: int = 16  # sequences per step
    lr: float = 3e-3  # learning rate of AdamW
    shown: int = 20  # bytes of a row that are drawn
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.steps >= 10, f"steps={self.steps} must be at least 10, to have a tenth"
        assert self.batch_size > 0, f"batch_size={self.batch_size} must be at least 1"
        assert self.shown > 1, f"shown={self.shown} must be at least 2"


def label_of(byte):
    """What a cell of the picture shows: a letter, or a sign for a byte without one."""
    if byte == ord("\n"):
        return "\u21b5"
    if byte == ord(" "):
        return "\u2423"
    if 33 <= byte < 127:
        return chr(byte)
    return f"{byte:02x}"


@torch.no_grad()
def loss_by_position(model, ids, block_size, device):
    """ids (N,), cut into rows of block_size -> the mean loss at each position (T,), in nats."""
    rows = (len(ids) - 1) // block_size
    x = ids[: rows * block_size].view(rows, block_size)
    y = ids[1 : rows * block_size + 1].view(rows, block_size)
    total = torch.zeros(block_size)
    for inputs, targets in zip(x.split(64), y.split(64)):
        logits, _ = model(inputs.to(device))  # (B, T, V)
        logits = logits.transpose(1, 2)  # (B, V, T), as cross_entropy wants them
        losses = F.cross_entropy(logits, targets.to(device), reduction="none")  # (B, T)
        total += losses.sum(dim=0).cpu()
    return total / rows


def entropy_after_one(ids):
    """H(y | x) in nats: the loss of the best guess for the next byte that knows one byte."""
    pairs = (256 * ids[:-1] + ids[1:]).bincount(minlength=256 * 256)
    joint = pairs.view(256, 256).double() / pairs.sum()
    joint_entropy = torch.special.entr(joint).sum()
    first_entropy = torch.special.entr(joint.sum(dim=1)).sum()
    return (joint_entropy - first_entropy).item()


def draw_cell(ax, column, row, byte, colour):
    box = {"boxstyle": "square,pad=0.25", "facecolor": colour, "edgecolor": "none", "alpha": 0.35}
    ax.text(column, row, label_of(byte), ha="center", va="center", family="monospace", bbox=box)


def draw_row(x, y, title, path):
    """x and y as two rows of cells with the shift between them; below, the first exercises."""
    n = len(x)
    exercises = min(7, n)
    fig, (shift, steps) = figure(title, rows=2, height=5.6)

    # above: the inputs, the targets, and lines between the same bytes
    for t in range(n):
        draw_cell(shift, t, 1, x[t], "C0")
        draw_cell(shift, t, 0, y[t], "C1")
        if t > 0:
            label = "the same byte" if t == 1 else ""
            shift.plot([t, t - 1], [0.75, 0.25], color="gray", linewidth=1, label=label)
    shift.legend(loc="upper right", fontsize=8)
    shift.set(ylim=(-0.6, 2.2), yticks=[0, 1], yticklabels=["y, targets", "x, inputs"])

    # below: what each of the first positions sees, and what it must predict
    for t in range(exercises):
        for s in range(t + 1):
            draw_cell(steps, s, -t, x[s], "C0")
        draw_cell(steps, t + 1, -t, y[t], "C1")
        text = f"sees {t + 1}, must predict {label_of(y[t])}"
        steps.text(n - 0.5, -t, text, ha="right", va="center", size=9)
    steps.set(ylim=(-exercises + 0.3, 0.7), yticks=[], ylabel="one row, many exercises")

    for ax in (shift, steps):
        ax.set(xlim=(-0.7, n - 0.3), xlabel="position in the row")
        ax.set(xticks=range(0, n, 2), xticklabels=range(1, n + 1, 2))
        ax.grid(False)
    save_figure(fig, path)


def draw_losses(losses, after_one, title, path):
    """losses: {steps of training: the loss at each position (T,)}."""
    xlabel = "position in the row (number of bytes it sees)"
    fig, ax = figure(title, xlabel, "validation loss, nats per byte")
    for steps, loss in losses.items():
        ax.plot(range(1, len(loss) + 1), loss, marker=".", label=f"after {steps} steps")
    ax.axhline(math.log(256), color="black", linestyle="--", label="guessing, ln 256")
    label = f"best with one byte, H(y|x) = {after_one:.2f}"
    ax.axhline(after_one, color="gray", linestyle=":", label=label)
    ax.set_ylim(0, None)
    fig.legend(loc="outside lower center", ncols=3)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg, gpt_cfg = parse_args(Config, GPTConfig, n_layer=2, n_embd=64)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    data = load_data(cfg, gpt_cfg)
    out = output_folder(cfg)
    block_size = gpt_cfg.block_size

    # a row of a batch
    x, y = get_batch(data.train_ids, 0, cfg, block_size)
    same = (x[:, 1:] == y[:, :-1]).sum().item()
    overlap = len(x) * (block_size - 1)
    title = (
        f"A row of {block_size} bytes is {block_size} exercises: y is x, shifted by one place\n"
        f"(in this batch they agree on {same:,} of the {overlap:,} bytes where they overlap)"
    )
    first_x = x[0, : cfg.shown].tolist()
    first_y = y[0, : cfg.shown].tolist()
    draw_row(first_x, first_y, title, out / "demo_batches.png")

    # training, with a look at the loss by position at the start, after a tenth, and at the end
    model = GPT(gpt_cfg).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    log = Log(out, cfg.steps, name="demo_batches")
    losses = {}
    for step in range(cfg.steps + 1):
        if step in (0, cfg.steps // 10, cfg.steps):
            losses[step] = loss_by_position(model, data.val_ids, block_size, device)
        if step == cfg.steps:
            break
        x, y = get_batch(data.train_ids, step, cfg, block_size)
        _, loss = model(x.to(device), y.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log(step, loss=loss.item())

    # what context is worth: the first position against the last quarter of the row
    after_one = entropy_after_one(data.val_ids)
    worth = {}
    for steps, loss in losses.items():
        worth[steps] = (loss[0] - loss[-(block_size // 4) :].mean()).item()
        print(
            f"after {steps} steps: position 1 {loss[0]:.3f}, position 2 {loss[1]:.3f}, "
            f"last {loss[-1]:.3f} nats"
        )
    print(f"guessing costs {math.log(256):.3f} nats, the best guess from one byte {after_one:.3f}")
    parts = [f"{nats:.2f} nats after {steps} steps" for steps, nats in worth.items()]
    more_bytes = block_size - block_size // 8
    title = f"{more_bytes} more bytes of context are worth:\n" + ", ".join(parts)
    print(title.replace("\n", " "))
    draw_losses(losses, after_one, title, out / "demo_batches_loss.png")

    numbers = {}
    for steps, loss in losses.items():
        numbers[f"first_after_{steps}"] = loss[0].item()
        numbers[f"last_after_{steps}"] = loss[-1].item()
        numbers[f"worth_after_{steps}"] = worth[steps]
    save_metrics(
        out,
        name="demo_batches",
        uniform=math.log(256),
        entropy_after_one=after_one,
        seed=cfg.seed,
        seconds=log.seconds,
        **numbers,
    )
