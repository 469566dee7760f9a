"""
Part 5: are experts worth it? A dense model, a hybrid and experts in every layer: the loss per step,
per operation and per second, side by side.

    python part_5/demo_hybrid.py
    python part_5/demo_hybrid.py --share=1        experts as wide as the dense MLP
    python part_5/demo_hybrid.py --seeds=3        what the README quotes

A token visits 2 of 8 experts of half the width, so all three models do the same arithmetic for a
token, apart from the router's (the comparison of Fedus et al. 2021, section 3). Operations are
counted as 6 per weight that works on a token, plus 12 T H D per layer for the attention (Chowdhery
et al. 2022, appendix B). Seconds are measured: there the many small products, the sorting of tokens
and Muon's work on experts that a token does not visit show up.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import NamedTuple

import numpy as np
import torch

import train
from model import GPT, MLP, GPTConfig, MoE
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

# Each model's name and its moe_every; 0: no experts.
ARMS = {"dense": 0, "every second layer": 2, "every layer": 1}


@dataclass
class Config:
    data: str = "stories"  # stories (the built-in world), shakespeare (a download) or a text file
    steps: int = 400  # optimizer steps of each run
    eval_every: int = 40  # steps between evaluations on the validation data
    batch_size: int = 16  # sequences per step
    width: int = 176  # hidden channels of the dense MLP
    share: float = (
        0.5  # width of an expert as a share of the dense MLP's; 0.5: equal work per token
    )
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "eval_every", "batch_size", "width", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"


def make_model(moe_every, width, share, gpt_cfg):
    """A GPT with experts in every moe_every-th layer (0: none). Experts are `share` as wide as the
    MLP of the other layers."""
    expert_width = round(share * width)
    if moe_every > 0:
        cfg = replace(gpt_cfg, n_expert=8, moe_every=moe_every, mlp_dim=expert_width)
    else:
        cfg = replace(gpt_cfg, n_expert=0, mlp_dim=expert_width)
    model = GPT(cfg)
    for block in model.h:
        if not isinstance(block.mlp, MoE):
            block.mlp = MLP(replace(cfg, mlp_dim=width))
    return model


def flops_per_token(model):
    """Multiplications and additions of a training step per token: 2 for each weight forward, 4
    backward, and the attention's own."""
    # The embedding is a look-up, which costs nothing. Experts that a token does not visit rest.
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    weights -= model.wte.weight.numel()
    for layer in train.moe_layers(model):
        for expert in layer.experts[layer.top_k :]:
            weights -= sum(p.numel() for p in expert.parameters())
    cfg = model.cfg
    attention = 12 * cfg.n_layer * cfg.block_size * cfg.n_head * cfg.head_dim
    return 6 * weights + attention


class Run(NamedTuple):
    steps: list  # steps of the evaluations
    losses: list  # their validation losses, nats per byte
    step_seconds: float  # median seconds of a step: a pause of the machine does not count


def run(data, model, train_cfg, device):
    """The training loop of train.py -> Run."""
    # 200 rows of the validation text are enough for a curve.
    edges = data.edges[:201]
    val_ids = data.val_ids[: edges[-1] + 1]
    val_bytes = torch.tensor(data.tok.n_bytes)[val_ids].sum().item()

    optimizers = train.make_optimizers(model, train_cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    seconds = []
    steps = []
    losses = []
    for step in range(train_cfg.steps):
        start = time.time()
        train.set_lr(optimizers, train.lr_scale(step, train_cfg))
        x, y = train.get_batch(data.train_ids, data.starts, step, train_cfg, model.cfg.block_size)
        loss, _ = train.backward(model, x.to(device), y.to(device), train_cfg, nullcontext, scaler)
        torch.nn.utils.clip_grad_norm_(model.parameters(), train_cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for a GPU
        seconds.append(time.time() - start)

        if (step + 1) % train_cfg.eval_every == 0 or step + 1 == train_cfg.steps:
            result = train.evaluate(model, val_ids, edges, val_bytes, device, nullcontext)
            steps.append(step + 1)
            losses.append(result.loss)
    return Run(steps, losses, median(seconds))


def verdict(losses):
    """{name: losses over seeds} -> how far the mean of each is above that of the first one, or "no
    difference" where their ranges overlap."""
    names = list(losses)
    base = losses[names[0]]
    parts = []
    for name in names[1:]:
        values = losses[name]
        if min(values) > max(base) or max(values) < min(base):
            parts.append(f"{name} {fmean(values) - fmean(base):+.3f}")
        else:
            parts.append(f"{name} no difference")
    return ", ".join(parts)


def draw(runs, costs, budgets, title, path):
    """Validation loss over steps, operations and seconds; the dotted line is the equal budget."""
    fig, axes = figure(title, columns=len(costs), height=5)
    for ax, (unit, cost) in zip(axes, costs.items()):
        for name in ARMS:
            spent = np.array(runs[name][0].steps) * cost[name]
            losses = np.array([result.losses for result in runs[name]])
            ax.plot(spent, losses.mean(axis=0), label=name)
            ax.fill_between(spent, losses.min(axis=0), losses.max(axis=0), alpha=0.2)
        ax.axvline(budgets[unit], color="gray", linestyle=":")
        ax.set_xlabel(unit)
    axes[0].set_ylabel("validation loss, nats per byte")
    axes[0].legend(fontsize=9)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    gpt_cfg = GPTConfig(vocab_size=512, block_size=72, n_layer=2, n_head=2, n_embd=64, n_kv_head=1)

    # No decay: a curve that has not fallen yet cannot be compared with one that has.
    train_cfg = train.Config(
        data=cfg.data,
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        eval_every=cfg.eval_every,
        warmup=0.03,
        decay=0.0,
    )
    data = train.load_data(train_cfg, gpt_cfg)
    out = output_folder(cfg)

    # every model, every seed
    flops = {}  # billions of operations per step
    runs = {name: [] for name in ARMS}
    log = Log(out, len(ARMS) * cfg.seeds, name="demo_hybrid")
    number = 0
    for name, moe_every in ARMS.items():
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            torch.manual_seed(seed)
            model = make_model(moe_every, cfg.width, cfg.share, gpt_cfg).to(device)
            flops[name] = flops_per_token(model) * cfg.batch_size * gpt_cfg.block_size / 1e9
            result = run(data, model, replace(train_cfg, seed=seed), device)
            runs[name].append(result)
            log(
                number,
                model=name,
                val_loss=result.losses[-1],
                gflops_per_step=flops[name],
                seconds_per_step=result.step_seconds,
            )
            number += 1

    # what one step costs, in three units, and the losses at what the cheapest model spends in all
    seconds = {}
    for name in ARMS:
        seconds[name] = median(result.step_seconds for result in runs[name])
    costs = {"steps": dict.fromkeys(ARMS, 1), "GFLOPs": flops, "seconds": seconds}
    budgets = {}
    at_equal = {}
    for unit, cost in costs.items():
        budgets[unit] = cfg.steps * min(cost.values())
        at_equal[unit] = {}
        for name in ARMS:
            losses = []
            for result in runs[name]:
                spent = np.array(result.steps) * cost[name]
                losses.append(float(np.interp(budgets[unit], spent, result.losses)))
            at_equal[unit][name] = losses
            spread = f"from {min(losses):.4f} to {max(losses):.4f}"
            print(f"{budgets[unit]:8.1f} {unit:8} {name:20} {fmean(losses):.4f}, {spread}")

    # the finding
    lines = [f"Nats per byte more than dense, {cfg.seeds} seeds"]
    if cfg.seeds == 1:
        lines = ["Nats per byte more than dense (one seed is no evidence of a difference)"]
    for unit, table in at_equal.items():
        lines.append(f"at equal {unit}: {verdict(table)}")
    title = "\n".join(lines)
    print(title)
    draw(runs, costs, budgets, title, out / "demo_hybrid.png")
    save_metrics(
        out,
        name="demo_hybrid",
        at_equal=at_equal,
        gflops_per_step=flops,
        seconds_per_step=seconds,
        steps=cfg.steps,
        seed=cfg.seed,
        seeds=cfg.seeds,
    )
