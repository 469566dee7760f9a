"""
Part 5: how can the load of the experts be balanced? A router left alone, and three remedies: how
even the load becomes, and what that costs in loss.

    python part_5/demo_routing.py
    python part_5/demo_routing.py --seeds=3      what the README quotes

MaxVio is how much more than its even share the busiest expert gets (Wang et al. 2024, eq. 4). The
paper takes the mean over the layers, and we take the worst layer.

    auxiliary loss    pulls on the router's gradient (Fedus et al. 2021, eq. 4)
    loss-free bias    is added to the probabilities when experts are chosen, never when they are
                      weighted; after each batch it moves by u towards the experts that had too
                      little (Wang et al. 2024, algorithm 1)
    z-loss            the mean of logsumexp(logits)^2 keeps the logits small (Zoph et al. 2022,
                      eq. 5)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import fmean

import torch

import train
from model import GPT, GPTConfig, MoE
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


@dataclass
class Config:
    data: str = "stories"  # stories (the built-in world), shakespeare (a download) or a text file
    steps: int = 100  # optimizer steps of each run
    batch_size: int = 16  # sequences per step
    lr_adamw: float = 3e-3  # learning rate of AdamW, which trains the router, too
    aux: float = 0.01  # weight of the auxiliary loss
    u: float = 0.01  # step of the loss-free bias; the paper's 0.001 is for long runs
    z: float = 0.001  # weight of the z-loss
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"


class Balanced(MoE):
    """The router and experts of an MoE, with all remedies; each is off at 0. `balance` is what the
    training loss gets."""

    def __init__(self, moe, aux=0.0, u=0.0, z=0.0):
        torch.nn.Module.__init__(self)  # not MoE's: router and experts exist already
        self.top_k = moe.top_k
        self.router = moe.router
        self.experts = moe.experts
        self.aux = aux
        self.u = u
        self.z = z
        self.register_buffer("bias", torch.zeros(len(moe.experts)))

    def forward(self, x):
        B, T, C = x.shape
        n_expert = len(self.experts)
        x = x.flatten(0, 1)  # (N, C)

        # Route: the bias takes part in the choice, but not in the weights.
        logits = self.router(x).float()
        p = logits.softmax(dim=-1)  # (N, E)
        chosen = (p + self.bias).topk(self.top_k, dim=-1).indices  # (N, top_k)
        gate = torch.zeros_like(p).scatter(1, chosen, p.gather(1, chosen))  # (N, E)
        gate = gate / gate.sum(dim=-1, keepdim=True)
        self.gate = gate

        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = gate[:, e].nonzero()[:, 0]
            y = y.index_add(0, token, gate[token, e, None] * expert(x[token]))

        self.load = chosen.flatten().bincount(minlength=n_expert) / chosen.numel()  # (E,)
        aux_loss = n_expert * (self.load * p.mean(dim=0)).sum()
        z_loss = logits.logsumexp(dim=-1).square().mean()
        self.balance = self.aux * aux_loss + self.z * z_loss
        return y.view(B, T, C)

    def move_bias(self):
        """One step of the loss-free bias: up for experts with too little, down for the others."""
        self.bias += self.u * (self.load.mean() - self.load).sign()


def run(data, gpt_cfg, train_cfg, remedy, device):
    """The training loop of train.py with one remedy -> the model."""
    torch.manual_seed(train_cfg.seed)
    model = GPT(gpt_cfg).to(device)
    for block in model.h:
        block.mlp = Balanced(block.mlp, **remedy).to(device)
    optimizers = train.make_optimizers(model, train_cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    for step in range(train_cfg.steps):
        train.set_lr(optimizers, train.lr_scale(step, train_cfg))
        x, y = train.get_batch(data.train_ids, data.starts, step, train_cfg, gpt_cfg.block_size)
        train.backward(model, x.to(device), y.to(device), train_cfg, nullcontext, scaler)
        torch.nn.utils.clip_grad_norm_(model.parameters(), train_cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for block in model.h:
            block.mlp.move_bias()
    return model


@torch.no_grad()
def gates(model, rows):
    """Rows of tokens (N, T) -> the weight that each token gives to each expert, of shape
    (layers, N * T, E)."""
    model(rows)
    return torch.stack([block.mlp.gate for block in model.h]).cpu()


def draw_text(panels, words, title, path):
    """For each remedy, the weights (T, E) that the tokens of one text give to the experts."""
    fig, axes = figure(title, rows=len(panels), height=2 + 1.6 * len(panels))
    for ax, (name, gate) in zip(axes, panels.items()):
        picture = ax.imshow(gate.T, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        ax.set_title(name, fontsize=10)
        ax.set(ylabel="expert", xticks=range(len(words)), xticklabels=[])
        ax.grid(False)
    ax.set_xticklabels(words, rotation=90, fontsize=8)
    fig.colorbar(picture, ax=axes, shrink=0.5, label="weight of the expert's output")
    save_figure(fig, path)


def draw_remedies(panels, title, path):
    """A point per seed for each remedy. panels: {label: {remedy: values}}."""
    fig, axes = figure(title, columns=len(panels))
    for ax, (label, table) in zip(axes, panels.items()):
        for name, values in table.items():
            ax.plot([name] * len(values), values, "o")
        ax.set_ylabel(label)
        ax.tick_params(axis="x", rotation=30)
    axes[0].set_ylim(bottom=0)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # The remedies bring their own weights, so the loss takes them as they are: balance=1.
    remedies = {
        "none": {},
        "auxiliary loss": {"aux": cfg.aux},
        "loss-free bias": {"u": cfg.u},
        "z-loss": {"z": cfg.z},
    }
    gpt_cfg = GPTConfig(
        vocab_size=512,
        block_size=72,
        n_layer=2,
        n_head=2,
        n_embd=64,
        n_kv_head=1,
        mlp_dim=44,
        n_expert=8,
    )
    train_cfg = train.Config(
        data=cfg.data,
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        lr_adamw=cfg.lr_adamw,
        balance=1.0,
        warmup=0.03,
    )
    data = train.load_data(train_cfg, gpt_cfg)
    out = output_folder(cfg)
    block_size = gpt_cfg.block_size
    full_rows = len(data.val_ids) // block_size
    rows = data.val_ids[: full_rows * block_size].view(-1, block_size)[:256].to(device)

    # every remedy, every seed
    max_vio = {name: [] for name in remedies}
    val_loss = {name: [] for name in remedies}
    texts = {}  # of the first seed: the gates of the first words of the validation text
    log = Log(out, len(remedies) * cfg.seeds, name="demo_routing")
    number = 0
    for name, remedy in remedies.items():
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            model = run(data, gpt_cfg, replace(train_cfg, seed=seed), remedy, device)
            gate = gates(model, rows)  # (layers, tokens, E)
            visits = (gate > 0).float().sum(dim=1)  # (layers, E)
            max_vio[name].append(train.max_violation(visits))
            result = train.evaluate(
                model, data.val_ids, data.edges, data.val_bytes, device, nullcontext
            )
            val_loss[name].append(result.loss)
            if name not in texts:
                texts[name] = gate[-1, :30]
            log(number, remedy=name, max_vio=max_vio[name][-1], val_loss=result.loss)
            number += 1

    # figures
    shares = []
    for name, gate in texts.items():
        visits = (gate > 0).float().sum(dim=0)  # (E,)
        shares.append(f"{name} {1 + train.max_violation(visits[None]):.1f}")
    title = "Even shares that the busiest expert of one text gets:\n" + ", ".join(shares)
    words = [data.tok.decode([i]) for i in rows[0, :30].tolist()]
    draw_text(texts, words, title, out / "demo_routing_text.png")

    means = [f"{name} {fmean(values):.2f}" for name, values in max_vio.items()]
    title = "MaxVio: " + ", ".join(means)
    print(title)
    panels = {
        "MaxVio of the worse layer, new text": max_vio,
        "validation loss, nats per byte": val_loss,
    }
    for label, table in panels.items():
        for name, values in table.items():
            spread = f"from {min(values):.4f} to {max(values):.4f}"
            print(f"{label}, {name}: {fmean(values):.4f}, {spread}")
    draw_remedies(panels, title, out / "demo_routing.png")
    save_metrics(
        out,
        name="demo_routing",
        max_vio=max_vio,
        val_loss=val_loss,
        seed=cfg.seed,
        seeds=cfg.seeds,
        steps=cfg.steps,
    )
