"""
Part 1, MLP: what are GELU and the wide hidden layer good for?

    python part_1/demo_mlp.py
    python part_1/demo_mlp.py --seeds=3

MLPs of several widths learn to multiply: output i is channel i of the input times another channel.
A matrix cannot do this, and two matrices with nothing between them are one matrix. With GELU
(Hendrycks & Gimpel 2016) they can: gelu(z) + gelu(-z) is about 0.8 z^2 near 0, and
ab = ((a + b)^2 - (a - b)^2) / 4. So one product takes four hidden channels, and C products fit into
an MLP that is 4C wide.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass
from statistics import mean

import torch
import torch.nn as nn
import torch.nn.functional as F

from shared import (
    Log,
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
)

# What stands between the two matrices.
ACTIVATIONS = {"GELU": nn.GELU, "ReLU": nn.ReLU, "nothing": nn.Identity}


@dataclass
class Config:
    n_embd: int = 16  # C, channels of the input and the output
    widths: str = "0.5,1,2,4,8"  # widths of the hidden layer in multiples of C, with commas
    steps: int = 400  # optimizer steps of each MLP
    batch_size: int = 256  # new random inputs per step
    lr: float = 1e-2  # learning rate of Adam, which falls to 0
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    threads: int = 1  # CPU threads; more are no faster with matrices as small as these
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "seeds", "threads"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.n_embd > 1, f"n_embd={self.n_embd} must be at least 2"


def parse_widths(text):
    """ "4,0.5" -> [0.5, 4.0]"""
    widths = set()
    for word in text.split(","):
        digits = word.strip().replace(".", "", 1)
        if not digits.isdecimal() or float(word) == 0:
            fail(f"--widths={text} must be numbers above 0 with commas between them")
        widths.add(float(word))
    return sorted(widths)


def products(x):
    """x (B, C) -> (B, C): every channel times the channel before it."""
    return x * x.roll(1, dims=-1)


def fit(hidden, activation, cfg, seed, device):
    """Trains an MLP with `hidden` hidden channels to multiply -> the share of the targets' variance
    that it misses, as a mean over the last tenth of the steps."""
    torch.manual_seed(seed)
    mlp = nn.Sequential(
        nn.Linear(cfg.n_embd, hidden, bias=False),
        activation,
        nn.Linear(hidden, cfg.n_embd, bias=False),
    ).to(device)
    optimizer = torch.optim.Adam(mlp.parameters(), lr=cfg.lr)

    # All MLPs see the same batches. Each batch is new, so nothing can be learned by heart.
    generator = torch.Generator().manual_seed(seed)
    missed = []
    for step in range(cfg.steps):
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - step / cfg.steps)
        x = torch.randn(cfg.batch_size, cfg.n_embd, generator=generator)
        y = products(x)
        loss = F.mse_loss(mlp(x.to(device)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        missed.append(loss.item() / y.var().item())

    last_tenth = max(1, cfg.steps // 10)
    return mean(missed[-last_tenth:])


def draw_activations(ax):
    """GELU, ReLU, and the square that two GELUs make."""
    z = torch.linspace(-3, 3, 121)
    ax.plot(z, F.gelu(z), label="gelu(z)")
    ax.plot(z, F.relu(z), label="relu(z)")
    ax.plot(z, F.gelu(z) + F.gelu(-z), label="gelu(z) + gelu(-z)")
    ax.set(xlabel="z", ylabel="value")
    ax.legend(fontsize=9)


def draw_widths(ax, missed, widths):
    """The share missed by width: the mean over the seeds as a line, and their range as a band."""
    styles = ["o-", "s--", "v:"]
    for activation, style in zip(ACTIVATIONS, styles):
        runs = [missed[activation, width] for width in widths]
        means = [mean(values) for values in runs]
        lowest = [min(values) for values in runs]
        highest = [max(values) for values in runs]
        ax.plot(widths, means, style, label=activation)
        ax.fill_between(widths, lowest, highest, alpha=0.2)
    ax.set(xscale="log", yscale="log")
    ax.set(xlabel="hidden channels / C", ylabel="share of the variance missed")
    ax.set_xticks(widths, [f"{width:g}" for width in widths])
    ax.minorticks_off()
    ax.legend(title="between the matrices", fontsize=9)


def draw(title, missed, widths, path):
    fig, (left, right) = figure(title, columns=2)
    draw_activations(left)
    draw_widths(right, missed, widths)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    torch.set_num_threads(cfg.threads)
    device = pick_device(cfg.device)
    widths = parse_widths(cfg.widths)
    out = output_folder(cfg)

    # train an MLP for each activation, each width and each seed
    log = Log(out, len(ACTIVATIONS) * len(widths), name="demo_mlp")
    missed = {}
    for name, activation in ACTIVATIONS.items():
        for width in widths:
            hidden = max(1, round(width * cfg.n_embd))
            shares = []
            for seed in range(cfg.seed, cfg.seed + cfg.seeds):
                shares.append(fit(hidden, activation(), cfg, seed, device))
            log(len(missed), activation=name, width=width, missed=mean(shares))
            missed[name, width] = shares

    print("\nShare of the variance missed (lowest to highest seed)")
    for (name, width), shares in missed.items():
        spread = f"({min(shares):.3f} to {max(shares):.3f})"
        print(f"  {name:8} {width:4g} C  {mean(shares):.3f} {spread}")

    # the claim of the figure: the usual width, the narrowest one, and no activation
    usual = min(widths, key=lambda width: abs(width - 4))
    narrowest = widths[0]
    title = (
        f"With GELU, an MLP {usual:g}C wide misses {mean(missed['GELU', usual]):.0%} of the "
        f"products, one {narrowest:g}C wide {mean(missed['GELU', narrowest]):.0%}\n"
        f"With nothing between its matrices, an MLP {usual:g}C wide misses "
        f"{mean(missed['nothing', usual]):.0%}"
    )
    draw(title, missed, widths, out / "demo_mlp.png")
    save_metrics(
        out,
        name="demo_mlp",
        missed={f"{name}_{width:g}C": shares for (name, width), shares in missed.items()},
        seed=cfg.seed,
        seeds=cfg.seeds,
        steps=cfg.steps,
    )
