"""
Part 0 - what fp32, bf16 and fp16 lose: in a sum, in a softmax, in a training step; and what autocast keeps in fp32.

    python part_0/demo_precision.py
    python part_0/demo_precision.py --lr=1e-4  smaller updates: more of them are lost

A float has a sign, an exponent and a fraction: fp32 8 and 23 bits, bf16 8 and 7, fp16 5 and 10. Few fraction bits: a
small number added to a large one is lost. Few exponent bits: a small gradient becomes 0, a large exp infinite. So the
weights stay in fp32, autocast multiplies in 16 bits, and fp16 scales its loss (Micikevicius et al. 2018, section 3).
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, product
from statistics import mean

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector as flat

from shared import DTYPES, Log, cli, figure, save_figure, save_metrics, setup

WAYS = {  # of training: the type of the weights, autocast's or none, and by how much the loss is multiplied
    "fp32": ("fp32", None, 1), "autocast bf16": ("fp32", "bf16", 1), "autocast fp16": ("fp32", "fp16", 1),
    "fp16, loss x 2^14": ("fp32", "fp16", 2**14), "weights bf16": ("bf16", None, 1), "weights fp16": ("fp16", None, 1),
}

@dataclass
class Config:
    terms: int = 4000  # ones that are added up
    steps: int = 400  # optimizer steps of each training
    lr: float = 1e-3  # Adam's
    batch_size: int = 512  # rows per step
    n_embd: int = 64  # channels of the small network
    seeds: int = 1  # how many seeds; the README quotes 3
    threads: int = 1  # CPU threads; matrices as small as these gain nothing from more
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def running_sum(n, dtype):
    """1 + 1 + 1 + ..., rounded after each addition, as a loop that adds up a loss would do: n values."""
    return [x.item() for x in accumulate([torch.ones((), dtype=dtype)] * n)]

def softmax_error(size, dtype, subtract, seed):
    """How much probability stands in the wrong place (0 to 1), mean over 200 rows of 50 logits from -size to size."""
    g = torch.Generator().manual_seed(seed)
    z = size * (2 * torch.rand(200, 50, generator=g, dtype=torch.float64) - 1)
    exact, z = z.softmax(dim=-1), z.to(dtype)
    e = (z - z.amax(dim=-1, keepdim=True) if subtract else z).exp()
    return (e / e.sum(dim=-1, keepdim=True) - exact).abs().sum(dim=-1).mean().item() / 2

def train(way, cfg, seed, device):
    """A network learns to name another's largest output: losses, share of gradients that are 0, of weights unmoved."""
    (weights, inner, scale), C = WAYS[way], cfg.n_embd
    torch.manual_seed(seed)
    teacher, model = (nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C)).to(device) for _ in range(2))
    params = list(model.to(DTYPES[weights]).parameters())
    optimizer = torch.optim.Adam(params, lr=cfg.lr)
    losses, zeros, still = [], 0.0, 0.0
    for _ in range(cfg.steps):
        x = torch.randn(cfg.batch_size, C).to(device)
        y = teacher(x).argmax(dim=-1)
        with torch.autocast(device.type, DTYPES[inner]) if inner else nullcontext():
            loss = F.cross_entropy(model(x.to(DTYPES[weights])), y)
        optimizer.zero_grad()
        (loss * scale).backward()
        for p in params:
            p.grad /= scale  # in the weights' type: in fp32 nothing is lost
        zeros += (flat([p.grad for p in params]) == 0).float().mean().item() / cfg.steps
        before = flat(params)
        optimizer.step()
        still += (flat(params) == before).float().mean().item() / cfg.steps
        losses.append(loss.item())
    return losses, zeros, still

def autocast_types(device, dtype):
    """The type of each operation's result under autocast, given fp32 and given `dtype`: {name: (type, type)}."""
    layer, target = nn.Linear(8, 8).to(device), torch.zeros(4, dtype=torch.long, device=device)
    ops = {"linear": layer, "x @ y": lambda x: x @ x.mT, "gelu": F.gelu, "sum": torch.sum, "softmax": nn.Softmax(-1),
           "layer norm": nn.LayerNorm(8).to(device), "cross-entropy": lambda x: F.cross_entropy(x, target)}
    given = [torch.ones(4, 8, device=device).to(t) for t in (torch.float32, dtype)]
    with torch.autocast(device.type, dtype):
        return {name: tuple(op(x).dtype for x in given) for name, op in ops.items()}

def draw(sums, sizes, errors, runs, types, said, path):
    fig, ((a, b), (c, d)) = figure(said, rows=2, columns=2, height=8.5)
    for i, name in enumerate(DTYPES):
        a.plot(sums[name], ["-", "--", ":"][i], linewidth=2, label=name)
        b.plot(sizes, errors[name, True], color=f"C{i}", label=f"{name}, the largest subtracted")
        b.plot(sizes, errors[name, False], "x", color=f"C{i}", label=f"{name}, not subtracted")
    a.set(title="a sum", xlabel="ones added", ylabel="their sum")
    b.set(title="a softmax", xlabel="largest logit", ylabel="probability misplaced", xscale="log", yscale="log")
    for i, (way, (losses, _, _)) in enumerate(runs.items()):
        ratio = 100 * (torch.tensor(losses) / torch.tensor(runs["fp32"][0]) - 1)
        c.plot(ratio, ["-", "--", ":"][i % 3], label=way if ratio[-1].isfinite() else f"{way}: not a number")
    c.set(title="a training", xlabel="optimizer step", ylabel="loss above fp32's, %")
    for ax in (a, b, c):
        ax.legend(fontsize=8)
    d.imshow([[t == torch.float32 for t in pair] for pair in types.values()], cmap="Blues", vmax=2, aspect="auto")
    for (row, pair), column in product(enumerate(types.values()), (0, 1)):
        d.text(column, row, str(pair[column]).removeprefix("torch."), ha="center", va="center")
    d.set(title="autocast: type of a result", xlabel="given", yticks=range(len(types)), yticklabels=types)
    d.set_xticks((0, 1), ("fp32", "bf16"))
    d.grid(False)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    sums = {name: running_sum(cfg.terms, dtype) for name, dtype in DTYPES.items()}
    sizes = [2 ** (i / 2) for i in range(15)]  # 1 to 128
    errors = {(k, s): [softmax_error(z, DTYPES[k], s, cfg.seed) for z in sizes] for k in DTYPES for s in (True, False)}
    for k, info in ((k, torch.finfo(t)) for k, t in DTYPES.items()):
        print(f"{k}: {cfg.terms} ones make {sums[k][-1]:.0f}, x + 1 is x from {2 / info.eps:,.0f}, exp infinite from "
              f"{math.log(info.max):.1f}; a softmax misplaces up to {max(errors[k, True]):.2g}")
    types = autocast_types(device, torch.bfloat16)
    held = [op for op, pair in types.items() if pair[1] == torch.float32]
    print(f"given bf16, autocast on {device.type} gives fp32 in: {', '.join(held) or 'none of the operations tried'}\n")

    runs, log = {way: [] for way in WAYS}, Log(cfg, cfg.seeds * len(WAYS), name="demo_precision")
    for i, (seed, way) in enumerate(product(range(cfg.seed, cfg.seed + cfg.seeds), WAYS)):
        runs[way].append(train(way, cfg, seed, device))
        log(i, way=way)
    final = {way: [mean(losses[-20:]) for losses, _, _ in many] for way, many in runs.items()}
    zeros, still = ({way: mean(run[i] for run in many) for way, many in runs.items()} for i in (1, 2))
    for way, v in final.items():
        print(f"{way:18} loss {mean(v):.4f} ({min(v):.4f} to {max(v):.4f}), {zeros[way]:.4%} of a step's gradients "
              f"are 0, {still[way]:.2%} of its updates are lost")
    same, worse = ([b / a - 1 for a, b in zip(final["fp32"], final[f"{k} bf16"])] for k in ("autocast", "weights"))
    said = (f"{cfg.terms:,} ones make {sums['bf16'][-1]:.0f} in bf16. Loss against fp32's: autocast {mean(same):+.1%},"
            f"\nweights in bf16 {mean(worse):+.1%}, with {still['weights bf16']:.0%} of their updates lost")
    draw(sums, sizes, errors, {k: v[0] for k, v in runs.items()}, types, said, Path(cfg.out) / "demo_precision.png")
    save_metrics(cfg, name="demo_precision", **{f"{k}_sum": v[-1] for k, v in sums.items()}, fp32_under_autocast=held,
                 loss={k: [f"{x:.6f}" for x in v] for k, v in final.items()}, zero_gradients=zeros, unmoved=still,
                 bf16_autocast=same, bf16_weights=worse, seed=cfg.seed, seeds=cfg.seeds, steps=cfg.steps)
