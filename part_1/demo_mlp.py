"""
Part 1 - the MLP of a block: what GELU and widening are good for, on a task that a matrix cannot do.

    python part_1/demo_mlp.py
    python part_1/demo_mlp.py --seeds=3

The task is to multiply: channel i of the input times channel order[i]. A matrix cannot, and two without anything
between them are one matrix. But gelu(z) + gelu(-z) is about z^2 near 0 (Hendrycks & Gimpel 2016), and
ab = ((a + b)^2 - (a - b)^2) / 4, so one product takes four hidden channels: C of them fit into an MLP that is 4C wide.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass
from statistics import mean

import torch
import torch.nn as nn
import torch.nn.functional as F

from shared import Log, cli, figure, save_figure, save_metrics, setup

@dataclass
class Config:
    n_embd: int = 16  # C, channels
    widths: str = "0.5,1,2,4,8"  # of the hidden layer, in multiples of C
    steps: int = 400  # of Adam for each MLP
    batch_size: int = 256  # new random inputs per step
    lr: float = 1e-2  # Adam's, falling to 0
    seeds: int = 1  # how many seeds; the README quotes 3
    threads: int = 1  # CPU threads; matrices as small as these gain nothing from more
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

ACTS = {"GELU": nn.GELU, "ReLU": nn.ReLU, "nothing": nn.Identity}

def products(x, order):
    """(B, C) -> (B, C): every channel times the one that `order` pairs it with."""
    return x * x[:, order]

def fit(width, act, cfg, seed, device):
    """Train C -> width -> C on products -> its error in the last tenth, as a share of the targets' variance."""
    torch.manual_seed(seed)
    C, missed = cfg.n_embd, []
    order = torch.arange(C).roll(1)
    mlp = nn.Sequential(nn.Linear(C, width, bias=False), act, nn.Linear(width, C, bias=False)).to(device)
    optimizer = torch.optim.Adam(mlp.parameters(), lr=cfg.lr)
    g = torch.Generator().manual_seed(seed)  # wide and narrow ones see the same batches
    for step in range(cfg.steps):
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - step / cfg.steps)
        x = torch.randn(cfg.batch_size, C, generator=g)
        y = products(x, order)
        loss = F.mse_loss(mlp(x.to(device)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        missed.append(loss.item() / y.var().item())
    return mean(missed[-max(1, cfg.steps // 10):])  # every batch is new: nothing here was learned by heart

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    widths = [float(w) for w in cfg.widths.split(",")]
    log, error = Log(cfg, len(ACTS) * len(widths), name="demo_mlp"), {}
    for i, (name, w) in enumerate((name, w) for name in ACTS for w in widths):
        hidden = max(1, round(w * cfg.n_embd))
        error[name, w] = [fit(hidden, ACTS[name](), cfg, s, device) for s in range(cfg.seed, cfg.seed + cfg.seeds)]
        log(i, between=name, width=w, missed=mean(error[name, w]))
    print("\nshare of the variance missed (lowest to highest seed)")
    for (name, w), v in error.items():
        print(f"  {name:8} {w:4g} C  {mean(v):.3f} ({min(v):.3f} to {max(v):.3f})")
    near = min(widths, key=lambda w: abs(w - 4))
    narrow, wide, matrix = (mean(error[key]) for key in (("GELU", widths[0]), ("GELU", near), ("nothing", near)))
    said = (f"An MLP {near:g}C wide misses {wide:.0%} of the products, one {widths[0]:g}C wide {narrow:.0%},\n"
            f"one {near:g}C wide with nothing between its matrices {matrix:.0%}")

    # figure
    fig, (left, right) = figure(said, columns=2)
    z = torch.linspace(-3, 3, 121)
    for y, name in ((F.gelu(z), "gelu(z)"), (F.relu(z), "relu(z)"), (F.gelu(z) + F.gelu(-z), "gelu(z) + gelu(-z)")):
        left.plot(z, y, label=name)
    left.set(xlabel="z", ylabel="value")
    for name, style in zip(ACTS, ("o-", "s--", "v:")):
        runs = [error[name, w] for w in widths]
        right.plot(widths, [mean(v) for v in runs], style, label=name)
        right.fill_between(widths, [min(v) for v in runs], [max(v) for v in runs], alpha=0.2)
    right.set(xscale="log", yscale="log", xlabel="hidden channels / C", ylabel="share of the variance missed")
    right.set_xticks(widths, [f"{w:g}" for w in widths])
    right.minorticks_off()
    left.legend(fontsize=9)
    right.legend(title="between the matrices", fontsize=9)
    save_figure(fig, Path(cfg.out) / "demo_mlp.png")
    save_metrics(cfg, name="demo_mlp", missed={f"{name}_{w:g}C": v for (name, w), v in error.items()},
                 seed=cfg.seed, seeds=cfg.seeds, steps=cfg.steps)
