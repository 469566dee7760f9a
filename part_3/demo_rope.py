"""
Part 3 - RoPE: pairs of channels turn, scores see distances only, and what happens past the trained length.

    python part_3/demo_rope.py
    python part_3/demo_rope.py --seeds=3

Pair i of a query at position m turns by m * base^(-2i/D) (Su et al. 2021, eq. 15), so scores depend on m - n alone.
That does not say that distances never trained will work. So four ways of telling positions train on blocks of T bytes
and read longer ones: none (the causal mask alone), a learned table (its rows past T are as they were drawn),
sinusoids (Vaswani et al. 2017), RoPE.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, GPTConfig, rope, rope_table
from shared import Log, cli, figure, save_figure, save_metrics, setup
from train import get_batch, load_data

KINDS = ["none", "learned", "sinusoidal", "RoPE"]

@dataclass
class Config:
    data: str = "stories"  # "stories", "shakespeare", or the path of a text file
    steps: int = 400  # optimizer steps per run
    batch_size: int = 16  # sequences per step
    lr: float = 3e-3  # AdamW's
    longer: int = 4  # read blocks that are so many times the trained length
    seeds: int = 1  # how many seeds; the README quotes 3
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        assert self.longer > 1 and self.steps > 0 and self.seeds > 0, "longer is at least 2, steps and seeds at least 1"

def turned(x, pos, base):
    """One vector (D,) at each of the positions (N,) -> (N, D)."""
    return rope(x.expand(len(pos), -1), *rope_table(pos, len(x), base))

def shift_error(q, k, base, far=1000, reach=64):
    """The most that a score at distance 0..reach-1 moves when query and key both move on by up to far places."""
    pos, first = torch.arange(reach), torch.arange(1)
    rows = [turned(q, pos + s, base) @ turned(k, first + s, base)[0] for s in range(0, far + 1, 50)]
    return (torch.stack(rows) - rows[0]).abs().max().item()

class Placed(GPT):
    """The model with another way of telling positions: RoPE's turn is by angle 0, a table is added to the input."""
    def __init__(self, cfg, kind):
        super().__init__(cfg)
        self.kind, C = kind, cfg.n_embd
        angle = torch.arange(cfg.block_size)[:, None] * 10000 ** (-torch.arange(0, C, 2) / C)
        waves, drawn = torch.cat([angle.sin(), angle.cos()], dim=-1) * 2 ** 0.5, torch.randn(cfg.block_size, C)
        table = 0.02 * (drawn if kind == "learned" else waves)  # as large as the embeddings
        self.table = nn.Parameter(table, requires_grad=kind == "learned")
        if kind in ("learned", "sinusoidal"):
            self.wte.register_forward_hook(lambda _, idx, x: x + self.table[:x.size(1)])
    def positions(self, T, cache, device):
        mask, (cos, sin), far = super().positions(T, cache, device)
        return mask, (cos, sin) if self.kind == "RoPE" else (torch.ones_like(cos), torch.zeros_like(sin)), far

@torch.no_grad()
def loss_by_position(model, ids, T, device):
    """ids (N,) cut into rows of T wherever the cut falls -> mean nats at each position, (T,)."""
    rows, total = (len(ids) - 1) // T, torch.zeros(T)
    x, y = ids[:rows * T].view(rows, T), ids[1:rows * T + 1].view(rows, T)
    for part, targets in zip(x.split(16), y.split(16)):
        logits, _ = model(part.to(device))
        total += F.cross_entropy(logits.transpose(1, 2), targets.to(device), reduction="none").sum(dim=0).cpu()
    return total / rows

def run(kind, train_ids, val_ids, cfg, gpt_cfg, T, device, log, done):
    """One training on blocks of T -> loss by position on blocks of block_size."""
    torch.manual_seed(cfg.seed)
    model = Placed(gpt_cfg, kind).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(cfg.steps):
        x, y = get_batch(train_ids, step, cfg, T)
        _, loss = model(x.to(device), y.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log(done + step, kind=kind, loss=loss.item())
    return loss_by_position(model, val_ids[:65536], gpt_cfg.block_size, device)

def draw_turn(q, k, base, said, path):
    """Left: three pairs of q (D,) at positions 0 to 9; right: the score of q at m and k at n, for all m and n."""
    fig, (plane, heat) = figure(said, columns=2, height=5)
    half, many = len(q) // 2, torch.arange(48)
    for i in (0, half // 4, half // 2):
        points = turned(q, many[:10], base)[:, [i, i + half]]
        plane.plot(*points.T, "o-", markersize=4, label=f"pair {i}: {base ** (-i / half):.2g} radians a place")
    plane.set(xlabel="channel i", ylabel="channel i + D/2", aspect="equal")
    plane.legend(fontsize=8)
    picture = heat.imshow(turned(q, many, base) @ turned(k, many, base).T, cmap="viridis")
    heat.set(xlabel="position n of the key", ylabel="position m of the query")
    fig.colorbar(picture, ax=heat, shrink=0.7, label="score q . k")
    save_figure(fig, path)

def draw_lengths(losses, T, said, path):
    """losses {kind: (seeds, positions)}, a quarter of T averaged; a band is the range over the seeds."""
    fig, ax = figure(said, "position in the block", "validation loss, nats per byte")
    at = torch.arange(0, len(losses["RoPE"][0]), max(1, T // 4)) + T / 8
    for i, (kind, found) in enumerate(losses.items()):
        bins = torch.stack([part.mean(dim=1) for part in found.split(max(1, T // 4), dim=1)], dim=1)
        ax.plot(at, bins.mean(dim=0), "o-", markersize=4, color=f"C{i}", label=kind)
        ax.fill_between(at, bins.amin(dim=0), bins.amax(dim=0), color=f"C{i}", alpha=0.2)
    ax.axvline(T, color="black", linestyle="--", label="trained length")
    ax.legend()
    save_figure(fig, path)

if __name__ == "__main__":
    cfg, gpt_cfg = cli(Config(), GPTConfig(n_layer=2, n_embd=64))
    device, _ = setup(cfg)
    q, k = torch.randn(2, 32)
    error, size = shift_error(q, k, gpt_cfg.rope_base), (q.norm() * k.norm()).item()
    print(said := f"Query and key 1,000 places further on: the score moves by {error:.0e}, of {size:.0f} possible")
    draw_turn(q, k, gpt_cfg.rope_base, said, Path(cfg.out) / "demo_rope.png")
    train_ids, val_ids, _ = load_data(cfg, gpt_cfg)
    T, long = gpt_cfg.block_size, replace(gpt_cfg, block_size=cfg.longer * gpt_cfg.block_size)
    log, losses = Log(cfg, len(KINDS) * cfg.seeds * cfg.steps, name="demo_rope"), {}
    for i, kind in enumerate(KINDS):
        losses[kind] = torch.stack([run(kind, train_ids, val_ids, replace(cfg, seed=cfg.seed + j), long, T, device, log,
                                        (i * cfg.seeds + j) * cfg.steps) for j in range(cfg.seeds)])
    inside, past = ({kind: found[:, part].mean(dim=1) for kind, found in losses.items()}
                    for part in (slice(T // 2, T), slice(-T, None)))  # a number per seed
    rise = {kind: past[kind] - inside[kind] for kind in KINDS}
    for kind, more in rise.items():
        print(f"{kind:10}: {inside[kind].mean():.3f} nats at {T // 2 + 1} to {T}, {past[kind].mean():.3f} in the last "
              f"{T} of {cfg.longer * T}: {more.mean():+.3f} ({more.min():+.3f} to {more.max():+.3f})")
    said = f"Nats more at {cfg.longer} times the trained length:\n"
    said += ", ".join(f"{kind} {more.mean():+.2f}" for kind, more in rise.items())
    draw_lengths(losses, T, said, Path(cfg.out) / "demo_rope_length.png")
    save_metrics(cfg, name="demo_rope", shift_error=error, seed=cfg.seed, seeds=cfg.seeds, seconds=log.seconds,
                 trained_length=T, read_length=cfg.longer * T, inside=inside, past=past)
