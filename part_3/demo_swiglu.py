"""
Part 3, the MLP: which nonlinearity is best at the same number of parameters? ReLU, GELU, ReLU
squared and SwiGLU, in the same model.

    python part_3/demo_swiglu.py
    python part_3/demo_swiglu.py --seeds=3

A gated MLP has three matrices where the others have two. So that all have the same number of
parameters, its hidden layer is 2/3 as wide: 3 C h = 2 C (3/2 h). In Shazeer 2020, table 1, SwiGLU
is 0.04 nats better than GELU after 65,536 steps of a large model. ReLU squared (So et al. 2021) is
a cheap rival. All use one learning rate, and everything but the MLP starts from the same weights.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass, replace
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, MLP, GPTConfig
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


def squared_relu(x):
    return F.relu(x).square()


# The MLPs with two matrices, by the function between them. SwiGLU is model.py's MLP.
ACTIVATIONS = {"ReLU": F.relu, "GELU": F.gelu, "ReLU squared": squared_relu}
KINDS = [*ACTIVATIONS, "SwiGLU"]


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


class PlainMLP(nn.Module):
    """Two matrices with one nonlinearity between them, without a gate.

    3/2 of SwiGLU's hidden channels make as many parameters.
    """

    def __init__(self, cfg, activation):
        super().__init__()
        assert cfg.mlp_dim % 2 == 0, (
            f"mlp_dim={cfg.mlp_dim} must be even: a plain MLP has 3/2 of it"
        )
        hidden = 3 * cfg.mlp_dim // 2
        self.c_fc = nn.Linear(cfg.n_embd, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, cfg.n_embd, bias=False)
        nn.init.zeros_(self.c_proj.weight)
        self.activation = activation

    def forward(self, x):
        x = self.activation(self.c_fc(x))  # (B, T, hidden)
        return self.c_proj(x)  # (B, T, C)


def build_mlp(kind, cfg):
    if kind == "SwiGLU":
        return MLP(cfg)
    return PlainMLP(cfg, ACTIVATIONS[kind])


def build_model(kind, cfg, seed):
    """A GPT with MLPs of one of KINDS. The MLPs have a seed of their own, so that all other weights
    are the same for every kind."""
    torch.manual_seed(seed)
    model = GPT(cfg)
    torch.manual_seed(seed + 1)
    for block in model.h:
        block.mlp = build_mlp(kind, cfg)
    return model


class Run(NamedTuple):
    """One training of a model."""

    losses: list  # one per step, nats per byte
    val_loss: float  # nats per byte
    params: int  # number of parameters


def train(kind, data, cfg, gpt_cfg, device, log, first_step):
    """Trains a model with MLPs of one of KINDS -> Run."""
    model = build_model(kind, gpt_cfg, cfg.seed).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    losses = []
    for step in range(cfg.steps):
        x, y = get_batch(data.train_ids, step, cfg, gpt_cfg.block_size)
        _, loss = model(x.to(device), y.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        log(first_step + step, kind=kind, loss=losses[-1])

    val = evaluate(model, data.val_ids, gpt_cfg.block_size, device)
    params = sum(p.numel() for p in model.parameters())
    return Run(losses, val.loss, params)


def verdict(losses, rival_losses):
    """What may be said of a list of losses, one per seed, against those of a rival?"""
    if len(losses) == 1:
        return "one seed, no verdict"
    if max(losses) < min(rival_losses):
        return "better"
    if min(losses) > max(rival_losses):
        return "worse"
    return "no difference"


def draw(title, runs, path):
    """Left: the training loss. Right: the validation loss of every seed. runs: {kind: [Run]}"""
    fig, (left, right) = figure(title, columns=2, height=5)
    for i, (kind, kind_runs) in enumerate(runs.items()):
        losses = torch.tensor([run.losses for run in kind_runs])  # (seeds, steps)
        steps = losses.size(1) // 10 * 10
        tens = losses[:, :steps].unflatten(1, (-1, 10)).mean(dim=(0, 2))  # (steps / 10,)
        left.plot(range(5, steps, 10), tens, color=f"C{i}", label=kind)

        val_losses = [run.val_loss for run in kind_runs]
        right.vlines(i, min(val_losses), max(val_losses), color=f"C{i}")
        right.plot([i] * len(val_losses), val_losses, "o", color=f"C{i}")

    left.set(xlabel="optimizer step (mean of 10)", ylabel="training loss, nats per byte")
    right.set(xlabel="nonlinearity (one dot per seed)", ylabel="validation loss, nats per byte")
    right.set_xlim(-0.6, len(runs) - 0.4)
    right.set_xticks(range(len(runs)), list(runs), fontsize=9)
    left.legend()
    save_figure(fig, path)


if __name__ == "__main__":
    cfg, gpt_cfg = parse_args(Config, GPTConfig, n_layer=2, n_embd=64)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    data = load_data(cfg, gpt_cfg)
    out = output_folder(cfg)

    # Train every kind with every seed.
    log = Log(out, len(KINDS) * cfg.seeds * cfg.steps, name="demo_swiglu")
    runs = {kind: [] for kind in KINDS}
    first_step = 0
    for kind in KINDS:
        for i in range(cfg.seeds):
            seed_cfg = replace(cfg, seed=cfg.seed + i)
            runs[kind].append(train(kind, data, seed_cfg, gpt_cfg, device, log, first_step))
            first_step += cfg.steps

    params = {kind: runs[kind][0].params for kind in KINDS}
    assert len(set(params.values())) == 1, f"the numbers of parameters must be equal: {params}"

    # What came out
    val_losses = {}
    means = {}
    verdicts = {}
    for kind in KINDS:
        val_losses[kind] = [run.val_loss for run in runs[kind]]
        means[kind] = mean(val_losses[kind])
    print(f"{params['SwiGLU']:,} parameters each")
    for kind in KINDS:
        line = (
            f"{kind:12}: {means[kind]:.3f} nats per byte on new text "
            f"({min(val_losses[kind]):.3f} to {max(val_losses[kind]):.3f})"
        )
        if kind != "SwiGLU":
            verdicts[kind] = verdict(val_losses["SwiGLU"], val_losses[kind])
            line += f"; SwiGLU against it: {verdicts[kind]}"
        print(line)

    rival = min(ACTIVATIONS, key=means.get)
    title = (
        f"SwiGLU {means['SwiGLU']:.3f} nats per byte. "
        f"Against GELU, {means['GELU']:.3f}: {verdicts['GELU']}.\n"
        f"Against the best of the others, {rival}, {means[rival]:.3f}: {verdicts[rival]}"
    )
    print(title)
    draw(title, runs, out / "demo_swiglu.png")

    save_metrics(
        out,
        name="demo_swiglu",
        seed=cfg.seed,
        seeds=cfg.seeds,
        steps=cfg.steps,
        seconds=log.seconds,
        params=params["SwiGLU"],
        val=val_losses,
        swiglu_against=verdicts,
    )
