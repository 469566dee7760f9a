"""
Part 2 - what a batch is: a row of bytes, the same row one place later, and a loss at every position of it.

    python part_2/demo_batches.py
    python part_2/demo_batches.py --data=my.txt --steps=1200

One row of T bytes holds T exercises: position t sees x[0..t] and must say y[t] = x[t + 1]. The causal mask is what lets
all of them be solved in one forward pass. Position 1 has one byte to go by, so it cannot beat the entropy of the next
byte given one, H(y | x) (Shannon 1948); the last position has them all. An untrained model guesses: ln 256 everywhere.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from shared import Log, cli, figure, save_figure, save_metrics, setup
from train import get_batch, load_data

@dataclass
class Config:
    data: str = "stories"  # "stories", "shakespeare", or the path of a text file
    steps: int = 800  # optimizer steps
    batch_size: int = 16  # sequences per step
    lr: float = 3e-3  # AdamW's
    shown: int = 20  # bytes of a row that are drawn
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        assert self.steps >= 10, f"steps={self.steps} must be at least 10: a tenth of them is 'early'"
        assert self.shown > 1, f"shown={self.shown} must be at least 2"

def name_of(byte):
    """What a cell says: a letter, or a sign for what has no letter."""
    return {10: "\u21b5", 32: "\u2423"}.get(byte, chr(byte) if 33 <= byte < 127 else f"{byte:02x}")

@torch.no_grad()
def loss_by_position(model, ids, T, device):
    """ids (N,) cut into rows of T wherever the cut falls -> mean nats at each position, (T,)."""
    rows = (len(ids) - 1) // T
    x, y = ids[:rows * T].view(rows, T), ids[1:rows * T + 1].view(rows, T)
    total = torch.zeros(T)
    for part, targets in zip(x.split(64), y.split(64)):
        logits, _ = model(part.to(device))
        total += F.cross_entropy(logits.transpose(1, 2), targets.to(device), reduction="none").sum(dim=0).cpu()
    return total / rows

def entropy_after_one(ids):
    """H(y | x) in nats: what the next byte still hides from the best guess that knows one byte."""
    pairs = (256 * ids[:-1] + ids[1:]).bincount(minlength=65536).view(256, 256).double()
    joint = pairs / pairs.sum()
    return (torch.special.entr(joint).sum() - torch.special.entr(joint.sum(dim=1)).sum()).item()

def cell(ax, column, row, byte, colour):
    ax.text(column, row, name_of(byte), ha="center", va="center", family="monospace",
            bbox={"boxstyle": "square,pad=0.25", "facecolor": colour, "edgecolor": "none", "alpha": 0.35})

def draw_row(x, y, said, path, exercises=7):
    """x and y as two rows of cells with the shift between them; below, the first exercises that they hold."""
    n = len(x)
    fig, (shift, steps) = figure(said, rows=2, height=5.6)
    for t in range(n):
        cell(shift, t, 1, x[t], "C0")
        cell(shift, t, 0, y[t], "C1")
        if t:
            shift.plot([t, t - 1], [0.75, 0.25], color="gray", linewidth=1, label="the same byte" if t == 1 else "")
    for t in range(min(exercises, n)):
        for s in range(t + 1):
            cell(steps, s, -t, x[s], "C0")
        cell(steps, t + 1, -t, y[t], "C1")
        steps.text(n - 0.5, -t, f"sees {t + 1}, must say {name_of(y[t])}", ha="right", va="center", size=9)
    shift.legend(loc="upper right", fontsize=8)
    shift.set(ylim=(-0.6, 2.2), yticks=[0, 1], yticklabels=["y, targets", "x, inputs"], xlabel="position in the row")
    steps.set(ylim=(-exercises + 0.3, 0.7), yticks=[], ylabel="one row, many exercises", xlabel="position in the row")
    for ax in (shift, steps):
        ax.set(xlim=(-0.7, n - 0.3), xticks=range(0, n, 2), xticklabels=range(1, n + 1, 2))
        ax.grid(False)
    save_figure(fig, path)

def draw_losses(losses, after_one, said, path):
    """losses: {steps of training: (T,) nats}."""
    fig, ax = figure(said, "position in the row (bytes it may look at)", "validation loss, nats per byte")
    for steps, loss in losses.items():
        ax.plot(range(1, len(loss) + 1), loss, marker=".", label=f"after {steps} steps")
    ax.axhline(math.log(256), color="black", linestyle="--", label="guessing, ln 256")
    ax.axhline(after_one, color="gray", linestyle=":", label=f"best with one byte, H(y|x) = {after_one:.2f}")
    ax.set_ylim(0, None)
    fig.legend(loc="outside lower center", ncols=3)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg, gpt_cfg = cli(Config(), GPTConfig(n_layer=2, n_embd=64))
    device, _ = setup(cfg)
    T = gpt_cfg.block_size
    train_ids, val_ids, _ = load_data(cfg, gpt_cfg)

    # a row
    x, y = get_batch(train_ids, 0, cfg, T)
    same = (x[:, 1:] == y[:, :-1]).sum().item()
    said = f"A row of {T} bytes is {T} exercises: y is x one place later\n"
    said += f"({same:,} of {len(x) * (T - 1):,} shared places of a batch agree)"
    draw_row(x[0, :cfg.shown].tolist(), y[0, :cfg.shown].tolist(), said, Path(cfg.out) / "demo_batches.png")

    # training
    model = GPT(gpt_cfg).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    log, losses = Log(cfg, cfg.steps, name="demo_batches"), {}
    for step in range(cfg.steps + 1):
        if step in (0, cfg.steps // 10, cfg.steps):
            losses[step] = loss_by_position(model, val_ids, T, device)
        if step < cfg.steps:
            x, y = get_batch(train_ids, step, cfg, T)
            _, loss = model(x.to(device), y.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log(step, loss=loss.item())

    # what context is worth
    after_one = entropy_after_one(val_ids)
    worth = {steps: (loss[0] - loss[-(T // 4):].mean()).item() for steps, loss in losses.items()}
    said = f"What {T - T // 8} more bytes of context are worth: " + ", ".join(
        f"{nats:.2f} nats after {steps} steps" for steps, nats in worth.items())
    print(said)
    for steps, loss in losses.items():
        print(f"after {steps} steps: position 1 {loss[0]:.3f}, position 2 {loss[1]:.3f}, last {loss[-1]:.3f} nats")
    print(f"guessing costs {math.log(256):.3f} nats, the best guess that knows one byte {after_one:.3f}")
    said = said.replace(": ", ":\n")
    draw_losses(losses, after_one, said, Path(cfg.out) / "demo_batches_loss.png")
    save_metrics(cfg, name="demo_batches", uniform=math.log(256), entropy_after_one=after_one, seed=cfg.seed,
                 seconds=log.seconds, **{f"{where}_after_{s}": loss[i].item() for s, loss in losses.items()
                                         for where, i in (("first", 0), ("last", -1))},
                 **{f"worth_after_{s}": nats for s, nats in worth.items()})
