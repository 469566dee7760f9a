"""
Part 5 - dense, a hybrid, experts in every layer: the loss per step, per operation and per second, side by side.

    python part_5/demo_hybrid.py
    python part_5/demo_hybrid.py --share=1        experts as wide as the dense MLP: more operations per token
    python part_5/demo_hybrid.py --seeds=3        what the README quotes

A token visits 2 of 8 experts of half the width, so all three do the same arithmetic on it, but for the router's (the
comparison of Fedus et al. 2021, section 3). Operations are counted as 6 per weight that works on a token plus
12 T H D per layer for the attention (Chowdhery et al. 2022, appendix B); seconds are measured: there the many small
products, the sorting of tokens and Muon's work on experts that a token does not visit show up.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import fmean, median

import numpy as np
import torch

import train
from model import GPT, GPTConfig, MLP, MoE
from shared import Log, cli, figure, save_figure, save_metrics, setup

ARMS = {"dense": 0, "every second layer": 2, "every layer": 1}  # name: moe_every, 0 for no experts

@dataclass
class Config:
    data: str = "stories"  # "stories" (the built-in world), "shakespeare" (a download), or the path of a text file
    steps: int = 400  # optimizer steps of each run
    eval_every: int = 40  # steps between evaluations, whose seconds do not count
    batch_size: int = 16  # sequences per step
    width: int = 176  # hidden channels of the dense MLP
    share: float = 0.5  # width of an expert, in widths of the dense MLP; 0.5: the same work on a token
    seed: int = 0
    seeds: int = 1  # how many seeds; the README quotes 3
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def make(every, width, share, sizes):
    """A GPT whose experts, in every so many layers, are `share` as wide as its other layers' MLP."""
    some = replace(sizes, n_expert=8 if every else 0, moe_every=every or 1, mlp_dim=round(share * width))
    model = GPT(some)
    for block in model.h:
        if not isinstance(block.mlp, MoE):
            block.mlp = MLP(replace(some, mlp_dim=width))
    return model

def flops_per_token(model):
    """Multiplications and additions of a step: 2 per weight forward, 4 backward, and the attention's own."""
    idle = [m.experts[m.top_k:] for m in model.modules() if isinstance(m, MoE)]  # as many as a token does not visit
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.wte.weight.numel()  # a look-up is free
    weights -= sum(p.numel() for experts in idle for p in experts.parameters())
    cfg = model.cfg
    return 6 * weights + 12 * cfg.n_layer * cfg.block_size * cfg.n_head * cfg.head_dim

def run(data, model, cfg, device):
    """train.py's loop -> steps and validation losses at the evaluations, seconds of a step."""
    tok, ids, starts, val_ids, edges, _, _ = data
    edges = edges[:201]  # 200 rows are enough for a curve
    val_ids = val_ids[:edges[-1] + 1]
    val_bytes = torch.tensor(tok.n_bytes)[val_ids].sum().item()
    opts, scaler = train.make_optimizers(model, cfg), torch.amp.GradScaler(device.type, enabled=False)
    seconds, steps, losses = [], [], []
    for step in range(cfg.steps):
        start = time.time()
        for group in (group for opt in opts for group in opt.param_groups):
            group["lr"] = group["peak"] * train.lr_scale(step, cfg)
        x, y = train.get_batch(ids, starts, step, cfg, model.cfg.block_size)
        loss, _ = train.backward(model, x.to(device), y.to(device), 1, nullcontext, scaler, cfg.balance)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        loss.item()  # waits for a GPU
        seconds.append(time.time() - start)
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            steps.append(step + 1)
            losses.append(train.evaluate(model, val_ids, edges, val_bytes, device, nullcontext)[0])
    return np.array(steps), losses, median(seconds)  # a hiccup of the machine counts for nothing

def verdict(table):
    """{name: losses over seeds} -> what each arm's mean is above the first one's, unless their ranges overlap."""
    (_, plain), *others = table.items()
    apart = {name: min(v) > max(plain) or max(v) < min(plain) for name, v in others}
    return ", ".join(name + (f" {fmean(v) - fmean(plain):+.3f}" if apart[name] else " no difference")
                     for name, v in others)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    sizes = GPTConfig(512, 72, n_layer=2, n_head=2, n_embd=64, n_kv_head=1)
    # no decay: a curve that is still to fall cannot be compared with one that has fallen
    plain = train.Config(data=cfg.data, steps=cfg.steps, batch_size=cfg.batch_size, eval_every=cfg.eval_every, decay=0)
    data = train.load_data(plain, sizes)

    # every run
    flops, seconds, losses = {}, {}, {}
    log = Log(cfg, len(ARMS) * cfg.seeds, name="demo_hybrid")
    for i, (name, seed) in enumerate((name, cfg.seed + s) for name in ARMS for s in range(cfg.seeds)):
        torch.manual_seed(seed)
        model = make(ARMS[name], cfg.width, cfg.share, sizes).to(device)
        flops[name] = flops_per_token(model) * cfg.batch_size * sizes.block_size / 1e9
        steps, curve, s = run(data, model, replace(plain, seed=seed), device)
        seconds.setdefault(name, []).append(s)
        losses.setdefault(name, []).append(curve)
        log(i, model=name, val_loss=curve[-1], gflops_per_step=flops[name], seconds_per_step=s)

    # three columns: what one step costs in each
    costs = {"steps": dict.fromkeys(ARMS, 1), "GFLOPs": flops, "seconds": {k: median(v) for k, v in seconds.items()}}
    tables = {}
    for unit, cost in costs.items():
        budget = steps[-1] * min(cost.values())  # what the cheapest spends in all
        tables[unit] = {k: [float(np.interp(budget, steps * cost[k], c)) for c in losses[k]] for k in ARMS}
        for name, found in tables[unit].items():
            print(f"{budget:8.1f} {unit:8} {name:20} {fmean(found):.4f}, from {min(found):.4f} to {max(found):.4f}")
    head = "Nats per byte more than dense" + (", one seed: no verdict" if cfg.seeds == 1 else f", {cfg.seeds} seeds")
    said = "\n".join([head, *(f"per {u[:-1]}: {verdict(t)}" for u, t in tables.items())])
    print(said)
    fig, axes = figure(said, columns=3, height=5)
    for ax, (unit, cost) in zip(axes, costs.items()):
        for name in ARMS:
            ax.plot(steps * cost[name], np.mean(losses[name], axis=0), label=name)
            ax.fill_between(steps * cost[name], np.min(losses[name], axis=0), np.max(losses[name], axis=0), alpha=0.2)
        ax.axvline(steps[-1] * min(cost.values()), color="gray", ls=":")
        ax.set_xlabel(unit)
    axes[0].set_ylabel("validation loss, nats per byte")
    axes[0].legend(fontsize=9)
    save_figure(fig, Path(cfg.out) / "demo_hybrid.png")
    save_metrics(cfg, name="demo_hybrid", at_equal=tables, gflops_per_step=flops, seconds_per_step=costs["seconds"],
                 steps=cfg.steps, seed=cfg.seed, seeds=cfg.seeds)
