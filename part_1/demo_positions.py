"""
Part 1 - sinusoidal and learned positions side by side, their dot products by distance, and what training learns.

    python part_1/demo_positions.py
    python part_1/demo_positions.py --seeds=3

Clock hands that run at fixed speeds: the dot product of two sinusoids is a sum of cos(speed x distance), so it depends
on the distance alone ("Attention Is All You Need", section 3.5). Learned positions start as noise, unrelated to each
other. The toy task of train.py pairs them: who says letter i of the answer must look back to letter n - i. Whether the
trained embeddings resemble each other by distance, and whether a head pairs them, is measured here.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass, replace
from statistics import mean

import torch
import torch.nn.functional as F

from model import GPTConfig
from shared import Log, cli, figure, save_figure, save_metrics, setup
from train import ALPHABET, GPT, evaluate, get_batch, sinusoids

@dataclass
class Config:
    steps: int = 300  # optimizer steps, as in train.py
    batch_size: int = 64  # words per step
    lr: float = 3e-3  # AdamW's
    block_size: int = 16  # positions; half of them are the word
    seeds: int = 1  # how many seeds; the README quotes 3
    threads: int = 1  # CPU threads; matrices as small as these gain nothing from more
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def cosines(table):
    """(T, C) embeddings -> (T, T): 1 for the same direction, 0 for unrelated ones."""
    table = F.normalize(table, dim=-1)
    return table @ table.T

def explained(c):
    """How much of the variance of the cosines of different positions their distance explains: 1 = all, and by chance
    (noise instead of embeddings) the number of distances less 1 over the number of pairs less 1."""
    t, s = torch.triu_indices(len(c), len(c), 1)
    value = c[t, s]
    own = torch.stack([c.diagonal(d).mean() for d in range(1, len(c))])[s - t - 1]  # the mean of one's own distance
    return (1 - (value - own).square().sum() / (value - value.mean()).square().sum()).item()

@torch.no_grad()
def position_scores(model):
    """What the heads of the first block would score if all letters were alike: (H, T, T), later keys at -inf."""
    attn, T = model.h[0].attn, len(model.wpe)
    x = model.h[0].ln_1(model.wpe + model.wte.weight.mean(dim=0))
    q, k = (f(x).view(T, attn.n_head, -1).transpose(0, 1) for f in (attn.c_q, attn.c_k))  # (H, T, D)
    return (q @ k.mT / q.size(-1) ** 0.5).masked_fill(torch.ones(T, T, device=x.device).triu(1).bool(), float("-inf"))

def paired(scores):
    """(H, T, T) -> per head the share of the answer's rows whose highest score is on the letter to be said next."""
    T = scores.size(-1)
    rows = torch.arange(T // 2, T)
    return (scores[:, rows].argmax(dim=-1).cpu() == T - 1 - rows).float().mean(dim=-1)  # row n + i, letter n - 1 - i

def train(cfg, seed, device, log):
    """train.py's loop with learned positions -> the model, its positions at the start, its accuracy."""
    torch.manual_seed(seed)
    gpt_cfg, run, n = GPTConfig(len(ALPHABET), cfg.block_size), replace(cfg, seed=seed), cfg.block_size // 2
    model = GPT(gpt_cfg, "learned").to(device)
    start, scores = model.wpe.detach().cpu().clone(), position_scores(model).cpu()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(cfg.steps):
        x, y = get_batch(step, run, cfg.block_size)
        loss = F.cross_entropy(model(x.to(device))[:, n:].flatten(0, 1), y.flatten().to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log((seed - cfg.seed) * cfg.steps + step, loss=loss.item(), length=model.wpe.norm(dim=-1).mean().item())
    return model, start, paired(scores).max().item(), evaluate(model, run, cfg.block_size, device)

def draw_matrices(tables, said, path):
    fig, axes = figure(said, rows=len(tables), height=7)
    for ax, (name, table) in zip(axes, tables.items()):
        picture = ax.imshow(table, cmap="RdBu", vmin=-table.abs().max(), vmax=table.abs().max(), aspect="auto")
        ax.set_title(name, fontsize=11)
        ax.set(ylabel="position")
        ax.grid(False)
        fig.colorbar(picture, ax=ax)
    axes[-1].set_xlabel("channel")
    save_figure(fig, path)

def draw_products(tables, scores, head, said, path):
    """Cosines of the first and the last table, all tables' cosines by distance, and one head's scores."""
    fig, ((a, b), (c, d)) = figure(said, rows=2, columns=2, height=8)
    names = list(tables)
    for ax, name in ((a, names[0]), (b, names[-1])):
        fig.colorbar(ax.imshow(cosines(tables[name]), cmap="RdBu", vmin=-1, vmax=1), ax=ax, shrink=0.6)
        ax.set_title(f"{name}: cosines", fontsize=11)
        ax.set(xlabel="position", ylabel="position")
        ax.grid(False)
    for name, table in tables.items():
        rows = [cosines(table).diagonal(k) for k in range(len(table))]
        line, = c.plot([row.mean() for row in rows], label=name)
        c.fill_between(range(len(rows)), *zip(*((row.min(), row.max()) for row in rows)), alpha=0.2)
        line.set_marker(".")
    c.set(xlabel="distance, positions", ylabel="cosine: mean, lowest, highest")
    c.legend(fontsize=8)
    shown = scores[head].masked_fill(scores[head].isinf(), float("nan"))
    fig.colorbar(d.imshow(shown, cmap="viridis"), ax=d, label="q k / sqrt(D), layer 1", shrink=0.6)
    d.set_title(f"learned: scores of head {head + 1}", fontsize=11)
    d.set(xlabel="key's position", ylabel="query's position", facecolor="lightgray")
    d.grid(False)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    T = cfg.block_size
    log = Log(cfg, cfg.seeds * cfg.steps, name="demo_positions")
    runs = [train(cfg, seed, device, log) for seed in range(cfg.seed, cfg.seed + cfg.seeds)]
    fixed, ends = sinusoids(T, 64), [model.wpe.detach().cpu() for model, *_ in runs]
    longer = [(end.norm(dim=-1).mean() / start.norm(dim=-1).mean()).item() for end, (_, start, *_) in zip(ends, runs)]
    before, after = [explained(cosines(start)) for _, start, *_ in runs], [explained(cosines(end)) for end in ends]
    scores = [position_scores(model).cpu() for model, *_ in runs]
    pairs, unpaired, accuracy = [paired(s).max().item() for s in scores], *zip(*(run[2:] for run in runs))
    chance = (T - 2) / (T * (T - 1) / 2 - 1)
    print(f"distance explains of the cosines: sinusoids {explained(cosines(fixed)):.0%}, noise {chance:.0%} on average")
    numbers = {"distance_before": before, "distance_after": after, "longer": longer, "paired_before": unpaired,
               "paired_after": pairs, "accuracy": accuracy}
    for name, v in numbers.items():
        print(f"{name:24} {mean(v):.3f}  ({min(v):.3f} to {max(v):.3f})")
    tables = {"sinusoids": fixed, "learned, at the start": runs[0][1], "learned, trained": ends[0]}
    said = f"Training made the learned positions {mean(longer):.1f} times as long; the sinusoids are fixed"
    draw_matrices(tables, said, Path(cfg.out) / "demo_positions_matrices.png")
    said = (f"Distance explains {explained(cosines(fixed)):.0%} of the sinusoids' cosines, {mean(after):.0%} of the "
            f"learned (noise {chance:.0%})\nThe best head pairs {mean(pairs):.0%} of positions as the task asks, "
            f"{mean(unpaired):.0%} before training")
    head = paired(scores[0]).argmax().item()
    draw_products(tables, scores[0], head, said, Path(cfg.out) / "demo_positions_products.png")
    save_metrics(cfg, name="demo_positions", **numbers, distance_sinusoids=explained(cosines(fixed)), noise=chance,
                 seed=cfg.seed, seeds=cfg.seeds, steps=cfg.steps)
