"""
Part 3, norms: does RMSNorm train as well as LayerNorm, and how much time does it save?

    python part_3/demo_norms.py
    python part_3/demo_norms.py --seeds=3

RMSNorm is LayerNorm without the mean and the bias (Zhang & Sennrich 2019, eq. 4). The paper claims
equal quality in less time. Both norms are written by hand, so that the clock compares like with
like. Two models, which differ in their norms only, start from the same weights and read the same
batches. They take their steps in turn, so that other work on the machine slows both down.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import NamedTuple

import torch
import torch.nn as nn

from model import GPT, GPTConfig, RMSNorm
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
from train import evaluate, get_batch, load_data

NORMS = ["LayerNorm", "RMSNorm"]


@dataclass
class Config:
    data: str = "stories"  # stories (the built-in world), shakespeare (a download) or a text file
    steps: int = 400  # optimizer steps of each model
    batch_size: int = 8  # sequences per step
    lr: float = 1e-3  # learning rate of AdamW
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.steps >= 10, f"steps={self.steps} must be at least 10"
        assert self.seeds > 0, f"seeds={self.seeds} must be at least 1"
        assert self.batch_size > 0, f"batch_size={self.batch_size} must be at least 1"


class LayerNorm(nn.Module):
    """Part 2's norm: shifts and scales each token's C channels to mean 0 and variance 1, then
    applies a learned gain and bias (Ba et al. 2016, eq. 4)."""

    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        x = x - x.mean(dim=-1, keepdim=True)
        var = x.square().mean(dim=-1, keepdim=True)
        return x * torch.rsqrt(var + self.eps) * self.weight + self.bias


def use_layer_norm(module):
    """Replaces every RMSNorm inside the module by a new LayerNorm of the same size."""
    for name, child in module.named_children():
        if isinstance(child, RMSNorm):
            setattr(module, name, LayerNorm(len(child.weight)))
        else:
            use_layer_norm(child)


def build_model(norm, gpt_cfg, seed):
    """A GPT with one of NORMS. Norms draw no random numbers, so all other weights are the same."""
    torch.manual_seed(seed)
    model = GPT(gpt_cfg)
    if norm == "LayerNorm":
        use_layer_norm(model)
    return model


def layer_gradients(model):
    """The norm of the gradient of each block's matrices, as a list with one number per layer."""
    norms = []
    for block in model.h:
        squares = [p.grad.square().sum().item() for p in block.parameters() if p.ndim == 2]
        norms.append(sum(squares) ** 0.5)
    return norms


def clock(device):
    """The time in milliseconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * time.perf_counter()


class Run(NamedTuple):
    """One training of a model."""

    losses: list  # one per step, nats per byte
    step_ms: list  # milliseconds of each step
    norm_ms: list  # milliseconds of one norm alone, forward and backward, measured at each step
    gradients: list  # for each step a list with one number per layer
    val_loss: float  # nats per byte


def train(data, cfg, gpt_cfg, device, log, first_step):
    """Trains both models, step by step in turn -> {norm: Run}."""
    block_size = gpt_cfg.block_size
    models = {}
    optimizers = {}
    runs = {}
    for norm in NORMS:
        models[norm] = build_model(norm, gpt_cfg, cfg.seed).to(device)
        optimizers[norm] = torch.optim.AdamW(
            models[norm].parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        runs[norm] = Run([], [], [], [], 0.0)

    for step in range(cfg.steps):
        x, y = get_batch(data.train_ids, step, cfg, block_size)
        x = x.to(device)
        y = y.to(device)
        for norm, model in models.items():
            run = runs[norm]

            # A step of training
            start = clock(device)
            _, loss = model(x, y)
            loss.backward()
            optimizers[norm].step()
            run.step_ms.append(clock(device) - start)
            run.losses.append(loss.item())
            run.gradients.append(layer_gradients(model))

            # The norm alone, on as many tokens
            inputs = torch.randn(x.numel(), gpt_cfg.n_embd, device=device, requires_grad=True)
            start = clock(device)
            model.ln_f(inputs).sum().backward()
            run.norm_ms.append(clock(device) - start)

            # This also removes what timing the norm has added to its gradient.
            optimizers[norm].zero_grad(set_to_none=True)
        log(first_step + step, **{norm: run.losses[-1] for norm, run in runs.items()})

    for norm, model in models.items():
        val = evaluate(model, data.val_ids, block_size, device)
        runs[norm] = runs[norm]._replace(val_loss=val.loss)
    return runs


class Summary(NamedTuple):
    """All seeds of one norm together."""

    losses: torch.Tensor  # (seeds, steps)
    gradients: torch.Tensor  # (seeds, steps, layers)
    val_losses: list  # one per seed
    step_ms: float  # median over the steps of all seeds
    norm_ms: float  # median over the steps of all seeds


def summarize(runs):
    """A list of Runs, one per seed -> Summary."""
    step_ms = []
    norm_ms = []
    for run in runs:
        step_ms.extend(run.step_ms)
        norm_ms.extend(run.norm_ms)
    return Summary(
        losses=torch.tensor([run.losses for run in runs]),
        gradients=torch.tensor([run.gradients for run in runs]),
        val_losses=[run.val_loss for run in runs],
        step_ms=median(step_ms),
        norm_ms=median(norm_ms),
    )


def verdict(first, second):
    """May one say that two lists of losses, one per seed, differ? Only if their ranges do."""
    seeds = len(first)
    if seeds == 1:
        return "one seed"
    if min(first) > max(second) or min(second) > max(first):
        return f"{seeds} seeds, they differ"
    return f"{seeds} seeds, no difference"


def draw(title, summaries, path):
    """Left: the training loss. Right: the gradient of each layer at the start and at the end."""
    fig, (left, right) = figure(title, columns=2, height=5)
    for i, (norm, summary) in enumerate(summaries.items()):
        colour = f"C{i}"

        # Means of 10 steps are smooth enough to compare. The band is the range over the seeds.
        steps = summary.losses.size(1) // 10 * 10
        tens = summary.losses[:, :steps].unflatten(1, (-1, 10)).mean(dim=2)  # (seeds, steps / 10)
        middles = range(5, steps, 10)
        left.plot(middles, tens.mean(dim=0), color=colour, label=norm)
        left.fill_between(middles, tens.amin(dim=0), tens.amax(dim=0), color=colour, alpha=0.2)

        first = summary.gradients[:, :10].mean(dim=(0, 1))  # (layers,)
        last = summary.gradients[:, -10:].mean(dim=(0, 1))  # (layers,)
        layers = range(1, len(first) + 1)
        right.plot(layers, first, ":o", color=colour, label=f"{norm}, first 10 steps")
        right.plot(layers, last, "-o", color=colour, label=f"{norm}, last 10 steps")

    left.set(xlabel="optimizer step (mean of 10)", ylabel="training loss, nats per byte")
    right.set(xlabel="layer", ylabel="norm of the gradient of its matrices", yscale="log")
    right.set_xticks(layers)
    left.legend()
    right.legend(fontsize=8)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg, gpt_cfg = parse_args(Config, GPTConfig, n_embd=64)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    data = load_data(cfg, gpt_cfg)
    out = output_folder(cfg)

    # Train both models with every seed.
    log = Log(out, cfg.seeds * cfg.steps, name="demo_norms")
    runs = {norm: [] for norm in NORMS}
    for i in range(cfg.seeds):
        seed_cfg = replace(cfg, seed=cfg.seed + i)
        results = train(data, seed_cfg, gpt_cfg, device, log, first_step=i * cfg.steps)
        for norm, run in results.items():
            runs[norm].append(run)

    # What came out
    summaries = {}
    gradients = {}
    for norm in NORMS:
        summary = summarize(runs[norm])
        summaries[norm] = summary
        gradients[norm] = summary.gradients[:, -10:].mean(dim=(0, 1)).tolist()
        listed = ", ".join(f"{gradient:.3f}" for gradient in gradients[norm])
        print(
            f"{norm:9}: {mean(summary.val_losses):.3f} nats per byte on new text "
            f"({min(summary.val_losses):.3f} to {max(summary.val_losses):.3f}), "
            f"{summary.step_ms:.1f} ms per step, {summary.norm_ms:.3f} ms for the norm alone; "
            f"gradients from the first layer to the last: {listed}"
        )

    layer = summaries["LayerNorm"]
    rms = summaries["RMSNorm"]
    title = (
        f"LayerNorm {mean(layer.val_losses):.3f}, RMSNorm {mean(rms.val_losses):.3f} nats per byte "
        f"({verdict(layer.val_losses, rms.val_losses)})\n"
        f"RMSNorm: {rms.step_ms / layer.step_ms - 1:+.0%} time per step, "
        f"{rms.norm_ms / layer.norm_ms - 1:+.0%} time of the norm alone"
    )
    print(title)
    draw(title, summaries, out / "demo_norms.png")

    metrics = {}
    for norm, summary in summaries.items():
        metrics[f"{norm}_val"] = summary.val_losses
        metrics[f"{norm}_ms"] = summary.step_ms
        metrics[f"{norm}_grads"] = gradients[norm]
        metrics[f"{norm}_alone"] = summary.norm_ms
    save_metrics(
        out,
        name="demo_norms",
        seed=cfg.seed,
        seeds=cfg.seeds,
        steps=cfg.steps,
        seconds=log.seconds,
        **metrics,
    )
