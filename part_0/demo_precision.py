"""
Part 0, precision: what fp32, bf16 and fp16 lose in a sum, in a softmax and in training, and which
operations autocast keeps in fp32.

    python part_0/demo_precision.py
    python part_0/demo_precision.py --lr=1e-4  smaller updates: more of them are lost

A floating-point number has a sign, an exponent and a fraction. fp32 has 8 bits for the exponent and
23 for the fraction, bf16 has 8 and 7, fp16 has 5 and 10. With few fraction bits, a small number is
lost when it is added to a large one. With few exponent bits, a small gradient becomes 0 and a large
exponential becomes infinite. So the weights stay in fp32, autocast multiplies in 16 bits, and fp16
needs a loss that is scaled up (Micikevicius et al. 2018, section 3).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

from shared import (
    DTYPES,
    Log,
    figure,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
    set_seed,
)


@dataclass
class Config:
    terms: int = 4000  # number of ones to add up
    steps: int = 400  # optimizer steps
    lr: float = 1e-3  # learning rate of Adam
    batch_size: int = 512  # examples per step
    n_embd: int = 64  # channels of the small network
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    threads: int = 1  # CPU threads; more are no faster with matrices as small as these
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script


class Method(NamedTuple):
    """One way to train in lower precision."""

    weights: str  # type of the weights, their gradients and the state of the optimizer
    autocast: str  # type that autocast multiplies in, or None without autocast
    loss_scale: int  # the loss is multiplied by this before the backward pass


METHODS = {
    "fp32": Method("fp32", None, 1),
    "autocast bf16": Method("fp32", "bf16", 1),
    "autocast fp16": Method("fp32", "fp16", 1),
    "fp16, loss x 2^14": Method("fp32", "fp16", 2**14),
    "weights bf16": Method("bf16", None, 1),
    "weights fp16": Method("fp16", None, 1),
}


class Run(NamedTuple):
    """What one training lost."""

    losses: list  # one per step
    zero_gradients: float  # share of the gradients that are exactly 0
    lost_updates: float  # share of the weights that a step leaves as they were


# --------------------------------------------------------------------------------------------------
# A sum and a softmax


def running_sum(n, dtype):
    """1 + 1 + 1 + ..., rounded after every addition, as in a loop that adds up a loss.

    Returns all n sums as floats.
    """
    one = torch.ones((), dtype=dtype)
    total = torch.zeros((), dtype=dtype)
    sums = []
    for _ in range(n):
        total = total + one
        sums.append(total.item())
    return sums


def softmax_error(size, dtype, subtract_max, seed):
    """How much probability a softmax puts in the wrong place, from 0 to 1.

    It is half of the absolute difference to a softmax in fp64, and the mean over 200 rows of 50
    logits between -size and size.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(200, 50, generator=generator, dtype=torch.float64)
    logits = size * (2 * uniform - 1)
    exact = logits.softmax(dim=-1)

    # The largest logit cancels out, but without it exp() cannot overflow.
    logits = logits.to(dtype)
    if subtract_max:
        logits = logits - logits.amax(dim=-1, keepdim=True)
    exps = logits.exp()
    probabilities = exps / exps.sum(dim=-1, keepdim=True)
    return (probabilities - exact).abs().sum(dim=-1).mean().item() / 2


# --------------------------------------------------------------------------------------------------
# A training


def make_network(channels):
    """An MLP from `channels` numbers to `channels` logits."""
    return nn.Sequential(
        nn.Linear(channels, 4 * channels),
        nn.GELU(),
        nn.Linear(4 * channels, channels),
    )


def autocast_for(method, device):
    if method.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, DTYPES[method.autocast])


def train(name, cfg, seed, device):
    """Train a network by one of METHODS to name the largest output of another network -> Run."""
    method = METHODS[name]
    weight_dtype = DTYPES[method.weights]
    torch.manual_seed(seed)
    teacher = make_network(cfg.n_embd).to(device)
    model = make_network(cfg.n_embd).to(device).to(weight_dtype)
    params = list(model.parameters())
    optimizer = torch.optim.Adam(params, lr=cfg.lr)

    losses = []
    zero_gradients = 0.0
    lost_updates = 0.0
    for _ in range(cfg.steps):
        x = torch.randn(cfg.batch_size, cfg.n_embd).to(device)  # (B, C)
        y = teacher(x).argmax(dim=-1)  # (B,)
        with autocast_for(method, device):
            logits = model(x.to(weight_dtype))  # (B, C)
            loss = F.cross_entropy(logits, y)

        # The scale is taken out again in the type of the weights. In fp32 that loses nothing.
        optimizer.zero_grad()
        (loss * method.loss_scale).backward()
        for p in params:
            p.grad /= method.loss_scale

        gradient = parameters_to_vector([p.grad for p in params])
        weights = parameters_to_vector(params)
        optimizer.step()
        unmoved = parameters_to_vector(params) == weights

        losses.append(loss.item())
        zero_gradients += (gradient == 0).float().mean().item() / cfg.steps
        lost_updates += unmoved.float().mean().item() / cfg.steps
    return Run(losses, zero_gradients, lost_updates)


def final_loss(run):
    """The mean of the last 20 losses."""
    return mean(run.losses[-20:])


# --------------------------------------------------------------------------------------------------
# Autocast


def autocast_types(device, dtype):
    """Which type does an operation return under autocast?

    -> {name: (type of the result given fp32, type of the result given dtype)}
    """
    target = torch.zeros(4, dtype=torch.long, device=device)

    def matmul(x):
        return x @ x.mT

    def cross_entropy(x):
        return F.cross_entropy(x, target)

    operations = {
        "linear": nn.Linear(8, 8).to(device),
        "x @ y": matmul,
        "gelu": F.gelu,
        "sum": torch.sum,
        "softmax": nn.Softmax(-1),
        "layer norm": nn.LayerNorm(8).to(device),
        "cross-entropy": cross_entropy,
    }
    x32 = torch.ones(4, 8, device=device)
    x16 = x32.to(dtype)

    types = {}
    with torch.autocast(device.type, dtype):
        for name, operation in operations.items():
            types[name] = (operation(x32).dtype, operation(x16).dtype)
    return types


# --------------------------------------------------------------------------------------------------
# The figure

LINE_STYLES = ["-", "--", ":"]


def draw_sums(ax, sums):
    for (name, values), style in zip(sums.items(), LINE_STYLES):
        ax.plot(values, style, linewidth=2, label=name)
    ax.set(title="a sum", xlabel="ones added", ylabel="their sum")
    ax.legend(fontsize=8)


def draw_softmax_errors(ax, sizes, errors):
    for i, name in enumerate(DTYPES):
        colour = f"C{i}"
        ax.plot(sizes, errors[name, True], color=colour, label=f"{name}, largest logit subtracted")
        ax.plot(sizes, errors[name, False], "x", color=colour, label=f"{name}, not subtracted")
    ax.set(title="a softmax", xlabel="largest logit", ylabel="probability in the wrong place")
    ax.set(xscale="log", yscale="log")
    ax.legend(fontsize=8)


def draw_losses(ax, runs):
    """How far the loss of each method lies above the loss in fp32. runs: {name of a method: Run}"""
    reference = torch.tensor(runs["fp32"].losses)
    for i, (name, run) in enumerate(runs.items()):
        percent = 100 * (torch.tensor(run.losses) / reference - 1)
        label = name
        if not percent[-1].isfinite():
            label = f"{name}: not a number"
        ax.plot(percent, LINE_STYLES[i % 3], label=label)
    ax.set(title="a training", xlabel="optimizer step", ylabel="loss above that in fp32, %")
    ax.legend(fontsize=8)


def draw_types(ax, types):
    """A table: one row per operation, one column per type that it is given. fp32 is darker."""
    shades = []
    for row, (given_fp32, given_bf16) in enumerate(types.values()):
        shades.append([given_fp32 == torch.float32, given_bf16 == torch.float32])
        ax.text(0, row, str(given_fp32).removeprefix("torch."), ha="center", va="center")
        ax.text(1, row, str(given_bf16).removeprefix("torch."), ha="center", va="center")
    ax.imshow(shades, cmap="Blues", vmax=2, aspect="auto")
    ax.set(title="autocast: type of the result", xlabel="type of the input")
    ax.set_xticks([0, 1], ["fp32", "bf16"])
    ax.set_yticks(range(len(types)), list(types))
    ax.grid(False)


def draw(title, sums, sizes, errors, runs, types, path):
    fig, axes = figure(title, rows=2, columns=2, height=8.5)
    draw_sums(axes[0, 0], sums)
    draw_softmax_errors(axes[0, 1], sizes, errors)
    draw_losses(axes[1, 0], runs)
    draw_types(axes[1, 1], types)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    out = output_folder(cfg)
    if cfg.threads > 0:
        torch.set_num_threads(cfg.threads)

    # A sum and a softmax in each type.
    sums = {name: running_sum(cfg.terms, dtype) for name, dtype in DTYPES.items()}
    sizes = [2 ** (i / 2) for i in range(15)]  # 1 to 128
    errors = {}
    for name, dtype in DTYPES.items():
        for subtract_max in (True, False):
            errors[name, subtract_max] = [
                softmax_error(size, dtype, subtract_max, cfg.seed) for size in sizes
            ]

    for name, dtype in DTYPES.items():
        # From 2 / eps on, the next number is x + 2, so x + 1 is rounded.
        info = torch.finfo(dtype)
        print(
            f"{name}: {cfg.terms} ones add up to {sums[name][-1]:.0f}; "
            f"x + 1 may be x from {2 / info.eps:,.0f} on; "
            f"exp(x) is infinite from {math.log(info.max):.1f} on; "
            f"a softmax puts up to {max(errors[name, True]):.2g} in the wrong place"
        )

    # What autocast does with operations that lose too much in 16 bits.
    types = autocast_types(device, torch.bfloat16)
    kept_in_fp32 = []
    for name, (_, given_bf16) in types.items():
        if given_bf16 == torch.float32:
            kept_in_fp32.append(name)
    listed = ", ".join(kept_in_fp32) or "none of the operations tried"
    print(f"given bf16, autocast on {device.type} returns fp32 from: {listed}")
    print()

    # Train by every method from the same weights and with the same batches.
    runs = {name: [] for name in METHODS}
    log = Log(out, cfg.seeds * len(METHODS), name="demo_precision")
    trained = 0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for name in METHODS:
            runs[name].append(train(name, cfg, seed, device))
            log(trained, method=name)
            trained += 1

    losses = {}
    zero_gradients = {}
    lost_updates = {}
    for name, results in runs.items():
        losses[name] = [final_loss(run) for run in results]
        zero_gradients[name] = mean(run.zero_gradients for run in results)
        lost_updates[name] = mean(run.lost_updates for run in results)
        print(
            f"{name:18} loss {mean(losses[name]):.4f} "
            f"({min(losses[name]):.4f} to {max(losses[name]):.4f}), "
            f"{zero_gradients[name]:.4%} of a step's gradients are 0, "
            f"{lost_updates[name]:.2%} of its updates are lost"
        )

    # How far the losses lie above those of the same seeds in fp32.
    def excess(name):
        return [loss / exact - 1 for loss, exact in zip(losses[name], losses["fp32"])]

    title = (
        f"{cfg.terms:,} ones add up to {sums['bf16'][-1]:.0f} in bf16. "
        f"Loss against fp32: {mean(excess('autocast bf16')):+.1%} with autocast,\n"
        f"{mean(excess('weights bf16')):+.1%} with weights in bf16, "
        f"which lose {lost_updates['weights bf16']:.0%} of their updates"
    )
    first_runs = {name: results[0] for name, results in runs.items()}
    draw(title, sums, sizes, errors, first_runs, types, out / "demo_precision.png")

    last_sums = {f"{name}_sum": values[-1] for name, values in sums.items()}
    save_metrics(
        out,
        name="demo_precision",
        **last_sums,
        fp32_under_autocast=kept_in_fp32,
        loss={name: [f"{loss:.6f}" for loss in values] for name, values in losses.items()},
        zero_gradients=zero_gradients,
        unmoved=lost_updates,
        bf16_autocast=excess("autocast bf16"),
        bf16_weights=excess("weights bf16"),
        seed=cfg.seed,
        seeds=cfg.seeds,
        steps=cfg.steps,
    )
