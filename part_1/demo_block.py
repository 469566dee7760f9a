"""
Part 1 - why a block has norms and residuals: its stream and its gradients by layer and by depth, with and without.

    python part_1/demo_block.py
    python part_1/demo_block.py --depths=2,4,8,16,32

Post-norm is LN(x + f(x)), pre-norm x + f(LN(x)) with a last LN. At the start of training the last layer's gradient does
not depend on the depth L in post-norm and falls as 1 / sqrt(L) in pre-norm (Xiong et al. 2020, theorem 1): slopes of 0
and -1/2 on log-log axes. Without residuals all tokens become the same (Dong et al. 2021, theorem 2.2).
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Block, GPTConfig, LayerNorm, causal_mask
from shared import cli, figure, load_checkpoint, need, require, save_figure, save_metrics, setup
from train import GPT, get_batch

KINDS = ("pre-norm", "post-norm", "no residual", "no residual, no norm")

@dataclass
class Config:
    init: str = ""  # a checkpoint of train.py; "": part_1/out/gpt.pt
    depths: str = "2,4,8,16"  # numbers of layers, comma-separated
    n_embd: int = 64  # C, channels of the stacks
    batch_size: int = 8  # sequences of 32 random tokens, and words for the trained stack
    seeds: int = 3  # random networks behind each point; mean, lowest and highest are drawn
    threads: int = 1  # CPU threads; matrices as small as these gain nothing from more
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def measure(x):
    """(B, T, C) -> the mean length of a token, the mean cosine of two tokens of a sequence."""
    u = F.normalize(x.detach(), dim=-1)
    others = ~torch.eye(x.size(1), dtype=torch.bool, device=x.device)
    return x.norm(dim=-1).mean().item(), (u @ u.mT)[:, others].mean().item()

def forward(blocks, x, mask, kind):
    """-> the last x, and after the input and every block a token's mean length, and two tokens' mean cosine."""
    seen = [measure(x)]
    for b in blocks:
        if kind == "pre-norm":
            x = b(x, mask)
        elif kind == "post-norm":
            x = b.ln_1(x + b.attn(x, mask))
            x = b.ln_2(x + b.mlp(x))
        elif kind == "no residual":
            x = b.mlp(b.ln_2(b.attn(b.ln_1(x), mask)))
        else:
            x = b.mlp(b.attn(x, mask))
        seen.append(measure(x))
    return x, *zip(*seen)

def at_start(kind, depth, cfg, seed, device):
    """A new stack with every matrix random -> the stream's lengths and cosines, gradient norms of each MLP's c_proj."""
    torch.manual_seed(seed)
    C = cfg.n_embd
    blocks = nn.ModuleList(Block(GPTConfig(n_embd=C)) for _ in range(depth))
    head = nn.Linear(C, 256, bias=False)
    for p in (*blocks.parameters(), head.weight):
        p.ndim == 2 and nn.init.xavier_normal_(p)  # as in the paper; model.py's own zeros would hide the depth
    x, y = torch.randn(cfg.batch_size, 32, C).to(device), torch.randint(256, (cfg.batch_size * 32,)).to(device)
    pos = torch.arange(32, device=device)
    x, lengths, cosines = forward(blocks.to(device), x, causal_mask(pos, pos), kind)
    x = x if kind == "post-norm" else LayerNorm(C).to(device)(x)
    F.cross_entropy(head.to(device)(x).flatten(0, 1), y).backward()
    return lengths, cosines, [b.mlp.c_proj.weight.grad.norm().item() for b in blocks]

def slope(x, y):
    """Of the straight line through the points on log-log axes: y ~ x^slope."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])

def band(ax, x, runs, label):
    runs = np.array(runs)
    line, = ax.plot(x, runs.mean(axis=0), ".-", label=label)
    ax.fill_between(x, runs.min(axis=0), runs.max(axis=0), alpha=0.2, color=line.get_color())

def draw_depth(runs, depths, slopes, trained, said, path):
    """runs[kind][depth]: a (lengths, cosines, gradients) per seed."""
    fig, ((a, b), (c, d)) = figure(said, rows=2, columns=2, height=8)
    deep, layers = depths[-1], range(1, depths[-1] + 1)
    for kind in KINDS:
        lengths, cosines, gradients = zip(*runs[kind][deep])
        band(a, range(deep + 1), lengths, kind)
        band(b, range(deep + 1), cosines, kind)
        band(c, layers, gradients, kind)
        last = list(zip(*([g[-1] for *_, g in runs[kind][depth]] for depth in depths)))
        band(d, depths, last, f"{kind}: slope {slopes[kind]:+.2f}")
    a.plot(trained, "k.--", label="train.py's stack, trained")
    a.set(yscale="log", xlabel="layer", ylabel="mean length of a token")
    b.set(xlabel="layer", ylabel="mean cosine of two tokens")
    c.set(yscale="log", xlabel="layer", ylabel="gradient norm of the MLP's c_proj")
    d.set(xscale="log", yscale="log", xlabel="depth, layers", ylabel="the last layer's gradient norm")
    d.set_xticks(depths, depths)
    d.xaxis.minorticks_off()
    for ax in (a, d):
        ax.legend(fontsize=7)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    depths = sorted(int(depth) for depth in cfg.depths.split(","))
    need(len(depths) > 1 and depths[0] > 0, f"--depths={cfg.depths}: at least two numbers of layers, for a slope")
    deep, seeds = depths[-1], range(cfg.seed, cfg.seed + cfg.seeds)

    # at the start
    runs, slopes, numbers = {}, {}, {}
    for kind in KINDS:
        runs[kind] = {depth: [at_start(kind, depth, cfg, seed, device) for seed in seeds] for depth in depths}
        each = [slope(depths, [runs[kind][depth][i][2][-1] for depth in depths]) for i in range(cfg.seeds)]
        slopes[kind] = float(np.mean(each))
        first, last = (float(np.mean([run[2][i] for run in runs[kind][deep]])) for i in (0, -1))
        cosine = float(np.mean([run[1][-1] for run in runs[kind][deep]]))
        print(f"{kind:20} slope {slopes[kind]:+.2f} ({min(each):+.2f} to {max(each):+.2f}); {deep} layers: gradient "
              f"{first:.2g} in the first, {last:.2g} in the last, cosine of two tokens {cosine:.3f}")
        numbers[kind] = {"slope": each, "first_gradient": first, "last_gradient": last, "cosine": cosine}

    # trained: train.py's stack
    saved = load_checkpoint(cfg.init or require("part_1/out/gpt.pt"), "gpt")
    model = GPT(GPTConfig(**saved["gpt_config"]), saved["positions"]).to(device)
    model.load_state_dict(saved["weights"])
    pos = torch.arange(len(model.wpe), device=device)
    with torch.no_grad():
        x = model.wte(get_batch(-1, cfg, len(pos))[0].to(device)) + model.wpe
        trained = forward(model.h, x, causal_mask(pos, pos), "pre-norm")[1]
    print("train.py's stack: tokens of length " + ", ".join(f"{n:.2f}" for n in trained) + " from layer to layer")
    said = (f"Last gradient by depth: slope {slopes['pre-norm']:+.2f} in pre-norm (theory -0.50), "
            f"{slopes['post-norm']:+.2f} in post-norm (0)\nCosine of two tokens after {deep} layers: "
            f"{numbers['no residual']['cosine']:.2f} without residuals, {numbers['pre-norm']['cosine']:.2f} pre-norm")
    draw_depth(runs, depths, slopes, trained, said, Path(cfg.out) / "demo_block.png")
    save_metrics(cfg, name="demo_block", **{k.replace(", ", "_").replace(" ", "_"): v for k, v in numbers.items()},
                 lengths_trained=trained, depths=depths, seed=cfg.seed, seeds=cfg.seeds)
