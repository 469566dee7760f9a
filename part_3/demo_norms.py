"""
Part 3 - LayerNorm against RMSNorm in the same model: gradients per layer, convergence, time per step.

    python part_3/demo_norms.py
    python part_3/demo_norms.py --seeds=3

RMSNorm is LayerNorm without the mean and the bias (Zhang & Sennrich 2019, eq. 4); the paper's claim is equal quality in
less time. Both are written by hand here, so that the clock compares like with like. The two models start from the same
weights, read the same batches and take their steps in turn: a busy machine is busy for both.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from model import GPT, GPTConfig, RMSNorm
from shared import Log, cli, figure, save_figure, save_metrics, setup
from train import evaluate, get_batch, load_data

@dataclass
class Config:
    data: str = "stories"  # "stories", "shakespeare", or the path of a text file
    steps: int = 400  # optimizer steps of each model
    batch_size: int = 8  # sequences per step
    lr: float = 1e-3  # AdamW's
    seeds: int = 1  # how many seeds; the README quotes 3
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        assert self.steps >= 10 and self.seeds > 0, "steps must be at least 10, seeds at least 1"

class LayerNorm(nn.Module):
    """Part 2's: each token's channels to mean 0 and variance 1, then a gain and a bias (Ba et al. 2016, eq. 4)."""
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps
    def forward(self, x):
        x = x - x.mean(dim=-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight + self.bias

NORMS = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}

def swap(module, Norm):
    """Every RMSNorm inside becomes a Norm. Norms draw no random numbers, so all other weights stay equal."""
    for name, child in module.named_children():
        if isinstance(child, RMSNorm):
            setattr(module, name, Norm(len(child.weight)))
        else:
            swap(child, Norm)
    return module

def layer_grads(model):
    """The norm of the gradient of each block's matrices, [L numbers]."""
    return [sum(p.grad.square().sum().item() for p in block.parameters() if p.ndim == 2) ** 0.5 for block in model.h]

def timed(device, work):
    """-> what work() returns, and its milliseconds."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return result, 1000 * (time.perf_counter() - start)

def update(model, optimizer, x, y):
    _, loss = model(x, y)
    loss.backward()
    optimizer.step()
    return loss

def run(train_ids, val_ids, cfg, gpt_cfg, device, log, done):
    """Both models, step by step in turn -> {norm: its losses, ms and gradients (L) per step, ms of the norm alone}."""
    found = {name: {"loss": [], "ms": [], "grads": [], "alone": []} for name in NORMS}
    models, T = {}, gpt_cfg.block_size
    for name, Norm in NORMS.items():
        torch.manual_seed(cfg.seed)
        model = swap(GPT(gpt_cfg), Norm).to(device)
        models[name] = model, torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(cfg.steps):
        x, y = (z.to(device) for z in get_batch(train_ids, step, cfg, T))
        for name, (model, optimizer) in models.items():
            loss, ms = timed(device, lambda: update(model, optimizer, x, y))
            inside = torch.randn(x.numel(), gpt_cfg.n_embd, device=device, requires_grad=True)
            _, alone = timed(device, lambda: model.ln_f(inside).sum().backward())
            for key, value in (("loss", loss.item()), ("ms", ms), ("alone", alone), ("grads", layer_grads(model))):
                found[name][key].append(value)
            optimizer.zero_grad(set_to_none=True)
        log(done + step, **{name: each["loss"][-1] for name, each in found.items()})
    return {name: {"val": torch.tensor(evaluate(models[name][0], val_ids, T, device)[0]),
                   **{key: torch.tensor(value) for key, value in each.items()}} for name, each in found.items()}

def draw(runs, said, path):
    """Left the loss over the training, the mean of 10 steps and of all seeds; right each layer's gradient."""
    fig, (left, right) = figure(said, columns=2, height=5)
    for i, (name, each) in enumerate(runs.items()):
        steps = each["loss"].size(1) // 10 * 10
        lines = each["loss"][:, :steps].unflatten(1, (-1, 10)).mean(dim=2)
        left.plot(range(5, steps, 10), lines.mean(dim=0), color=f"C{i}", label=name)
        left.fill_between(range(5, steps, 10), lines.amin(dim=0), lines.amax(dim=0), color=f"C{i}", alpha=0.2)
        for style, when, part in ((":o", "first", slice(10)), ("-o", "last", slice(-10, None))):
            grads = each["grads"][:, part].mean(dim=(0, 1))
            right.plot(range(1, len(grads) + 1), grads, style, color=f"C{i}", label=f"{name}, {when} 10 steps")
    left.set(xlabel="optimizer step", ylabel="training loss, nats per byte")
    right.set(xlabel="layer", ylabel="norm of the gradient, nats per unit of weight", yscale="log")
    right.set_xticks(range(1, len(grads) + 1))
    left.legend()
    right.legend(fontsize=8)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg, gpt_cfg = cli(Config(), GPTConfig(n_embd=64))
    device, _ = setup(cfg)
    train_ids, val_ids, _ = load_data(cfg, gpt_cfg)
    log = Log(cfg, cfg.seeds * cfg.steps, name="demo_norms")
    every = [run(train_ids, val_ids, replace(cfg, seed=cfg.seed + j), gpt_cfg, device, log, j * cfg.steps)
             for j in range(cfg.seeds)]
    runs = {name: {key: torch.stack([r[name][key] for r in every]) for key in every[0][name]} for name in NORMS}
    for name, r in runs.items():
        print(f"{name:9}: validation {r['val'].mean():.3f} ({r['val'].min():.3f} to {r['val'].max():.3f}) nats, "
              f"{r['ms'].median():.1f} ms a step, {r['alone'].median():.3f} ms the norm alone; gradient of layer 1 "
              f"to the last {[round(g, 3) for g in r['grads'][:, -10:].mean(dim=(0, 1)).tolist()]}")
    a, b = (runs[name] for name in NORMS)
    apart = a["val"].min() > b["val"].max() or b["val"].min() > a["val"].max()
    verdict = "one seed" if cfg.seeds == 1 else f"{cfg.seeds} seeds, {'they differ' if apart else 'no difference'}"
    said = f"LayerNorm {a['val'].mean():.3f}, RMSNorm {b['val'].mean():.3f} nats per byte ({verdict})\nRMSNorm: "
    said += ", ".join(f"{b[key].median() / a[key].median() - 1:+.0%} {what}" for key, what in (
        ("ms", "time per step"), ("alone", "time of the norm alone")))
    print(said)
    draw(runs, said, Path(cfg.out) / "demo_norms.png")
    save_metrics(cfg, name="demo_norms", seed=cfg.seed, seeds=cfg.seeds, steps=cfg.steps, seconds=log.seconds, **{
        f"{name}_{key}": (r[key] if key == "val" else r[key].median() if key != "grads" else r[key][:, -10:].mean(
            dim=(0, 1))).tolist() for name, r in runs.items() for key in ("val", "ms", "alone", "grads")})
