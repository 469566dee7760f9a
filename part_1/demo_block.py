"""
Part 1, block: why does a block have norms and residuals?

    python part_1/demo_block.py
    python part_1/demo_block.py --depths=2,4,8,16,32

Stacks of several depths are built in four ways, with random weights, as at the start of training:

    pre-norm              x + f(LN(x)), and a last LN after the stack
    post-norm             LN(x + f(x))
    no residual           f(LN(x))
    no residual, no norm  f(x)

The demo measures how long the tokens of the stream are, how alike, and how large the gradients. In
theory the gradient of the last layer does not depend on the depth L in post-norm, and it falls like
1 / sqrt(L) in pre-norm (Xiong et al. 2020, theorem 1). On log-log axes these are slopes of 0 and
-1/2. Without residuals all tokens become alike (Dong et al. 2021, theorem 2.2).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Block, GPTConfig, LayerNorm, causal_mask
from shared import (
    fail,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    require,
    save_figure,
    save_metrics,
)
from train import GPT, get_batch

KINDS = ["pre-norm", "post-norm", "no residual", "no residual, no norm"]
T = 32  # tokens in a random sequence
V = 256  # classes of the random targets


@dataclass
class Config:
    init: str = "part_1/out/gpt.pt"  # checkpoint of part_1/train.py
    depths: str = "2,4,8,16"  # numbers of layers, with commas between them
    n_embd: int = 64  # C, channels of the random stacks
    batch_size: int = 8  # random sequences, and words for the trained stack
    seeds: int = 3  # number of random networks behind each point: seed, seed + 1, ...
    threads: int = 1  # CPU threads; more are no faster with matrices as small as these
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("batch_size", "seeds", "threads"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        head_count = GPTConfig.n_head
        divisible = self.n_embd > 0 and self.n_embd % head_count == 0
        assert divisible, f"n_embd={self.n_embd} must be divisible by {head_count}, the heads"


def parse_depths(text):
    """ "4,2,8" -> [2, 4, 8]. Stops with an error if there are fewer than two depths."""
    depths = set()
    for word in text.split(","):
        if not word.strip().isdecimal() or int(word) == 0:
            fail(f"--depths={text} must be whole numbers above 0 with commas between them")
        depths.add(int(word))
    if len(depths) < 2:
        fail(f"--depths={text} must have at least two different depths, or there is no slope")
    return sorted(depths)


# the stacks ---------------------------------------------------------------------------------------


def mean_length(x):
    """x (B, T, C) -> the mean length of a token."""
    return x.norm(dim=-1).mean().item()


def mean_cosine(x):
    """x (B, T, C) -> the mean cosine of two different tokens of a sequence: 1 if all are alike."""
    directions = F.normalize(x, dim=-1)
    cosines = directions @ directions.mT  # (B, T, T)
    different = ~torch.eye(x.size(1), dtype=torch.bool, device=x.device)
    return cosines[:, different].mean().item()


def apply_block(block, x, mask, kind):
    """One of KINDS, built from the parts of a Block."""
    if kind == "pre-norm":
        return block(x, mask)
    if kind == "post-norm":
        x = block.ln_1(x + block.attn(x, mask))
        return block.ln_2(x + block.mlp(x))
    if kind == "no residual":
        x = block.attn(block.ln_1(x), mask)
        return block.mlp(block.ln_2(x))
    return block.mlp(block.attn(x, mask))


def run_stack(blocks, x, mask, kind):
    """-> the stream after the input and after each block, as a list of (B, T, C)."""
    streams = [x]
    for block in blocks:
        x = apply_block(block, x, mask, kind)
        streams.append(x)
    return streams


class Stack(NamedTuple):
    """What was measured in one random stack."""

    lengths: list  # mean length of a token, after the input and after each block
    cosines: list  # mean cosine of two tokens, after the input and after each block
    gradients: list  # gradient norm of the MLP's c_proj in each block


def measure_new_stack(kind, depth, cfg, seed, device):
    """Builds a random stack and lets it classify random sequences -> Stack."""
    torch.manual_seed(seed)
    C = cfg.n_embd
    blocks = nn.ModuleList([Block(GPTConfig(n_embd=C)) for _ in range(depth)])
    head = nn.Linear(C, V, bias=False)

    # As in the paper. In model.py the last matrices start at 0, which would hide the depth.
    for p in [*blocks.parameters(), head.weight]:
        if p.ndim == 2:
            nn.init.xavier_normal_(p)
    blocks.to(device)
    head.to(device)

    # forward
    x = torch.randn(cfg.batch_size, T, C).to(device)
    y = torch.randint(V, (cfg.batch_size * T,)).to(device)
    pos = torch.arange(T, device=device)
    streams = run_stack(blocks, x, causal_mask(pos, pos), kind)

    # backward; post-norm has its last norm inside the last block
    output = streams[-1]
    if kind != "post-norm":
        output = LayerNorm(C).to(device)(output)
    logits = head(output)  # (B, T, V)
    F.cross_entropy(logits.flatten(0, 1), y).backward()

    return Stack(
        lengths=[mean_length(stream.detach()) for stream in streams],
        cosines=[mean_cosine(stream.detach()) for stream in streams],
        gradients=[block.mlp.c_proj.weight.grad.norm().item() for block in blocks],
    )


@torch.no_grad()
def measure_trained_stack(path, cfg, device):
    """-> the mean length of a token in train.py's model, after the input and each block."""
    saved = load_checkpoint(path, "gpt")
    if "positions" not in saved:
        fail(f"--init={cfg.init} must be a checkpoint of part_1/train.py")
    model = GPT(GPTConfig(**saved["gpt_config"]), saved["positions"]).to(device)
    model.load_state_dict(saved["weights"])

    block_size = len(model.wpe)
    idx, _ = get_batch(-1, cfg, block_size)
    x = model.wte(idx.to(device)) + model.wpe  # (B, T, C)
    pos = torch.arange(block_size, device=device)
    streams = run_stack(model.h, x, causal_mask(pos, pos), "pre-norm")
    return [mean_length(stream) for stream in streams]


# summarize and draw -------------------------------------------------------------------------------


def fit_slope(x, y):
    """The slope of the straight line through the points on log-log axes: y ~ x^slope."""
    slope, _ = np.polyfit(np.log(x), np.log(y), deg=1)
    return float(slope)


class Summary(NamedTuple):
    """All stacks of one kind together. The gradients and the cosine are those of the deepest ones,
    as means over the seeds."""

    slopes: list  # slope of the last layer's gradient over the depth, one per seed
    first_gradient: float  # of the first layer
    last_gradient: float  # of the last layer
    cosine: float  # of two tokens after the last layer


def summarize(stacks, depths):
    """stacks: {depth: [Stack, one per seed]} -> Summary"""
    deepest = stacks[depths[-1]]
    slopes = []
    for i in range(len(deepest)):
        last_gradients = [stacks[depth][i].gradients[-1] for depth in depths]
        slopes.append(fit_slope(depths, last_gradients))
    return Summary(
        slopes=slopes,
        first_gradient=float(np.mean([stack.gradients[0] for stack in deepest])),
        last_gradient=float(np.mean([stack.gradients[-1] for stack in deepest])),
        cosine=float(np.mean([stack.cosines[-1] for stack in deepest])),
    )


def draw_band(ax, x, runs, label):
    """The mean over the seeds as a line, and their range as a band. runs (seeds, len(x))"""
    runs = np.array(runs)
    (line,) = ax.plot(x, runs.mean(axis=0), ".-", label=label)
    ax.fill_between(x, runs.min(axis=0), runs.max(axis=0), alpha=0.2, color=line.get_color())


def draw(title, stacks, summaries, depths, trained_lengths, path):
    """Three panels show the deepest stacks layer by layer, and the last one compares the depths.
    stacks: {kind: {depth: [Stack, one per seed]}}"""
    fig, axes = figure(title, rows=2, columns=2, height=8)
    (length_ax, cosine_ax), (gradient_ax, depth_ax) = axes
    deepest = depths[-1]
    for kind in KINDS:
        runs = stacks[kind][deepest]
        layers = range(deepest + 1)
        draw_band(length_ax, layers, [stack.lengths for stack in runs], kind)
        draw_band(cosine_ax, layers, [stack.cosines for stack in runs], kind)
        draw_band(gradient_ax, layers[1:], [stack.gradients for stack in runs], kind)

        # One row per seed, one column per depth.
        last_gradients = []
        for i in range(len(runs)):
            last_gradients.append([stacks[kind][depth][i].gradients[-1] for depth in depths])
        label = f"{kind}: slope {np.mean(summaries[kind].slopes):+.2f}"
        draw_band(depth_ax, depths, last_gradients, label)

    length_ax.plot(trained_lengths, "k.--", label="train.py's stack, trained")
    length_ax.set(yscale="log", xlabel="layer", ylabel="mean length of a token")
    cosine_ax.set(xlabel="layer", ylabel="mean cosine of two tokens")
    gradient_ax.set(yscale="log", xlabel="layer", ylabel="gradient norm of the MLP's c_proj")
    gradient_ax.xaxis.get_major_locator().set_params(integer=True)
    depth_ax.set(xscale="log", yscale="log", xlabel="depth in layers")
    depth_ax.set_ylabel("gradient norm in the last layer")
    depth_ax.set_xticks(depths, depths)
    depth_ax.xaxis.minorticks_off()
    length_ax.legend(fontsize=7)
    depth_ax.legend(fontsize=7)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    torch.set_num_threads(cfg.threads)
    device = pick_device(cfg.device)
    depths = parse_depths(cfg.depths)
    deepest = depths[-1]
    init = require(cfg.init)
    out = output_folder(cfg)

    # random stacks, as at the start of training
    stacks = {}
    summaries = {}
    for kind in KINDS:
        stacks[kind] = {}
        for depth in depths:
            runs = []
            for seed in range(cfg.seed, cfg.seed + cfg.seeds):
                runs.append(measure_new_stack(kind, depth, cfg, seed, device))
            stacks[kind][depth] = runs

        summary = summarize(stacks[kind], depths)
        summaries[kind] = summary
        print(
            f"{kind:20} slope {np.mean(summary.slopes):+.2f} "
            f"({min(summary.slopes):+.2f} to {max(summary.slopes):+.2f}); "
            f"{deepest} layers: gradient {summary.first_gradient:.2g} in the first and "
            f"{summary.last_gradient:.2g} in the last layer, "
            f"cosine of two tokens {summary.cosine:.3f}"
        )

    # the stack that train.py has trained
    trained_lengths = measure_trained_stack(init, cfg, device)
    listed = ", ".join(f"{length:.2f}" for length in trained_lengths)
    print(f"train.py's stack: mean length of a token from layer to layer {listed}")

    # figure and numbers
    pre_norm = summaries["pre-norm"]
    post_norm = summaries["post-norm"]
    title = (
        "How the gradient of the last layer changes with the depth, as a power of it:\n"
        f"pre-norm {np.mean(pre_norm.slopes):+.2f} (theory -0.5), "
        f"post-norm {np.mean(post_norm.slopes):+.2f} (theory 0)\n"
        f"Cosine of two tokens after {deepest} layers: "
        f"{summaries['no residual'].cosine:.2f} without residuals, "
        f"{pre_norm.cosine:.2f} with pre-norm"
    )
    draw(title, stacks, summaries, depths, trained_lengths, out / "demo_block.png")

    metrics = {}
    for kind, summary in summaries.items():
        key = kind.replace(", ", "_").replace(" ", "_")
        metrics[key] = {
            "slope": summary.slopes,
            "first_gradient": summary.first_gradient,
            "last_gradient": summary.last_gradient,
            "cosine": summary.cosine,
        }
    save_metrics(
        out,
        name="demo_block",
        **metrics,
        lengths_trained=trained_lengths,
        depths=depths,
        seed=cfg.seed,
        seeds=cfg.seeds,
    )
