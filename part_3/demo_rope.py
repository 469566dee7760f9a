"""
Part 3, RoPE: what does the rotation do to a score, and can a model read texts longer than those it
was trained on?

    python part_3/demo_rope.py
    python part_3/demo_rope.py --seeds=3

RoPE rotates pair i of a query at position m by the angle m * base^(-2i/D) (Su et al. 2021, eq. 15),
so a score depends on the distance m - n only. This does not mean that distances work that training
never showed. So four ways to tell positions are trained on blocks of T bytes, and then read longer
ones: none (the causal mask is all there is), a learned table (its rows beyond T stay as they were
drawn), sinusoids (Vaswani et al. 2017) and RoPE.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, GPTConfig, rope, rope_table
from shared import (
    Log,
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
    set_seed,
)
from train import get_batch, load_data

KINDS = ["none", "learned", "sinusoidal", "RoPE"]


@dataclass
class Config:
    data: str = "stories"  # stories (the built-in world), shakespeare (a download) or a text file
    steps: int = 400  # optimizer steps of each model
    batch_size: int = 16  # sequences per step
    lr: float = 3e-3  # learning rate of AdamW
    longer: int = 4  # length of the blocks that are read after training, in trained lengths
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.longer > 1, f"longer={self.longer} must be at least 2"
        assert self.steps > 0, f"steps={self.steps} must be at least 1"
        assert self.seeds > 0, f"seeds={self.seeds} must be at least 1"
        assert self.batch_size > 0, f"batch_size={self.batch_size} must be at least 1"


# the rotation -------------------------------------------------------------------------------------


def rotate(x, pos, base):
    """One vector x (D,) at each of the positions pos (N,) -> (N, D)."""
    cos, sin = rope_table(pos, len(x), base)
    return rope(x.expand(len(pos), -1), cos, sin)


def shift_error(q, k, base, max_shift=1000, max_distance=64):
    """How much does a score change if the query and the key both move by the same shift?

    -> the largest change over all distances below max_distance and shifts up to max_shift, in steps
    of 50. In exact arithmetic it would be 0.
    """
    distances = torch.arange(max_distance)
    start = torch.arange(1)  # the key stands at position 0
    rows = []
    for shift in range(0, max_shift + 1, 50):
        key = rotate(k, start + shift, base)[0]  # (D,)
        rows.append(rotate(q, distances + shift, base) @ key)  # (max_distance,)
    scores = torch.stack(rows)
    return (scores - scores[0]).abs().max().item()


# four ways to tell positions ----------------------------------------------------------------------


class PositionGPT(GPT):
    """model.py's GPT with one of KINDS instead of RoPE.

    A table, learned or of sinusoids, is added to the embeddings. Without RoPE all angles are 0.
    """

    def __init__(self, cfg, kind):
        super().__init__(cfg)
        self.kind = kind
        if kind == "learned":
            table = torch.randn(cfg.block_size, cfg.n_embd)
        else:
            pos = torch.arange(cfg.block_size)
            theta = 10000 ** (-torch.arange(0, cfg.n_embd, 2) / cfg.n_embd)  # (C/2,)
            angle = pos[:, None] * theta  # (T, C/2)
            table = 2**0.5 * torch.cat([angle.sin(), angle.cos()], dim=-1)  # mean square 1

        # As large as the embeddings, whose standard deviation is 0.02.
        self.table = nn.Parameter(0.02 * table, requires_grad=kind == "learned")
        self.wte.register_forward_hook(self.add_table)

    def add_table(self, module, inputs, embeddings):
        """Runs after the token embedding: embeddings (B, T, C) -> (B, T, C)."""
        if self.kind in ("learned", "sinusoidal"):
            return embeddings + self.table[: embeddings.size(1)]
        return embeddings

    def positions(self, T, cache, device):
        mask, cos, sin = super().positions(T, cache, device)
        if self.kind != "RoPE":
            cos = torch.ones_like(cos)
            sin = torch.zeros_like(sin)
        return mask, cos, sin


@torch.no_grad()
def loss_by_position(model, ids, T, device):
    """Cuts ids (N,) into blocks of T, wherever the cuts fall -> the mean loss at each of the T
    positions (T,), in nats."""
    blocks = (len(ids) - 1) // T
    x = ids[: blocks * T].view(blocks, T)
    y = ids[1 : blocks * T + 1].view(blocks, T)
    total = torch.zeros(T)
    for inputs, targets in zip(x.split(16), y.split(16)):
        logits, _ = model(inputs.to(device))
        losses = F.cross_entropy(logits.transpose(1, 2), targets.to(device), reduction="none")
        total += losses.sum(dim=0).cpu()
    return total / blocks


def train(kind, data, cfg, gpt_cfg, device, log, first_step):
    """Trains one of KINDS on blocks of block_size -> its loss at each position (longer * T,) of
    longer blocks."""
    T = gpt_cfg.block_size
    long_cfg = replace(gpt_cfg, block_size=cfg.longer * T)
    torch.manual_seed(cfg.seed)
    model = PositionGPT(long_cfg, kind).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    for step in range(cfg.steps):
        x, y = get_batch(data.train_ids, step, cfg, T)
        _, loss = model(x.to(device), y.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log(first_step + step, kind=kind, loss=loss.item())
    return loss_by_position(model, data.val_ids[:65536], cfg.longer * T, device)


# draw ---------------------------------------------------------------------------------------------


def draw_rotation(title, q, k, base, path):
    """Left: three pairs of the query at positions 0 to 9. Right: the score of the query at m and
    the key at n, for all m and n."""
    fig, (plane, heat) = figure(title, columns=2, height=5)
    pairs = len(q) // 2
    rotated = rotate(q, torch.arange(10), base)  # (10, D)
    for i in (0, pairs // 4, pairs // 2):
        angle = base ** (-i / pairs)
        label = f"pair {i}: {angle:.2g} rad per position"
        plane.plot(rotated[:, i], rotated[:, i + pairs], "o-", markersize=4, label=label)
    plane.set(xlabel="channel i", ylabel="channel i + D/2", aspect="equal")

    pos = torch.arange(48)
    scores = rotate(q, pos, base) @ rotate(k, pos, base).T  # (48, 48)
    image = heat.imshow(scores, cmap="viridis")
    heat.set(xlabel="position n of the key", ylabel="position m of the query")
    heat.grid(False)
    fig.colorbar(image, ax=heat, shrink=0.7, label="score q . k")
    fig.legend(loc="outside lower center", ncols=3, fontsize=9)
    save_figure(fig, path)


def draw_lengths(title, losses, T, path):
    """The loss by position. losses: {kind: (seeds, positions)}; a band is the range over seeds."""
    fig, ax = figure(title, "position in the block", "validation loss, nats per byte")
    width = max(1, T // 4)  # positions that are averaged into one point
    for i, (kind, loss) in enumerate(losses.items()):
        parts = [part.mean(dim=1) for part in loss.split(width, dim=1)]
        points = torch.stack(parts, dim=1)  # (seeds, positions / width)
        middles = width * (torch.arange(points.size(1)) + 0.5)
        ax.plot(middles, points.mean(dim=0), "o-", markersize=4, color=f"C{i}", label=kind)
        ax.fill_between(middles, points.amin(dim=0), points.amax(dim=0), color=f"C{i}", alpha=0.2)
    ax.axvline(T, color="black", linestyle="--", label="trained length")
    ax.legend()
    save_figure(fig, path)


if __name__ == "__main__":
    cfg, gpt_cfg = parse_args(Config, GPTConfig, n_layer=2, n_embd=64)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    data = load_data(cfg, gpt_cfg)
    T = gpt_cfg.block_size
    read_length = cfg.longer * T
    if len(data.val_ids) <= read_length:
        fail(
            f"--data={cfg.data}: {len(data.val_ids)} bytes of validation text do not fill a block "
            f"of --longer={cfg.longer} times {T} bytes"
        )
    out = output_folder(cfg)

    # Scores depend on distances only.
    q, k = torch.randn(2, 32)
    error = shift_error(q, k, gpt_cfg.rope_base)
    largest = (q.norm() * k.norm()).item()
    title = (
        f"A query and a key move on by up to 1,000 positions:\n"
        f"their score, at most {largest:.0f} in size, changes by at most {error:.0e}"
    )
    print(title)
    draw_rotation(title, q, k, gpt_cfg.rope_base, out / "demo_rope.png")

    # Train every kind with every seed, and read longer blocks.
    log = Log(out, len(KINDS) * cfg.seeds * cfg.steps, name="demo_rope")
    losses = {}
    first_step = 0
    for kind in KINDS:
        seed_losses = []
        for i in range(cfg.seeds):
            seed_cfg = replace(cfg, seed=cfg.seed + i)
            loss = train(kind, data, seed_cfg, gpt_cfg, device, log, first_step)
            seed_losses.append(loss)
            first_step += cfg.steps
        losses[kind] = torch.stack(seed_losses)  # (seeds, read_length)

    # The second half of the trained length against the last trained length of the long block
    inside = {}
    past = {}
    rise = {}
    for kind, loss in losses.items():
        inside[kind] = loss[:, T // 2 : T].mean(dim=1)  # (seeds,)
        past[kind] = loss[:, -T:].mean(dim=1)  # (seeds,)
        rise[kind] = past[kind] - inside[kind]
        print(
            f"{kind:10}: {inside[kind].mean():.3f} nats per byte at positions {T // 2 + 1} to {T}, "
            f"{past[kind].mean():.3f} in the last {T} of {read_length}: "
            f"{rise[kind].mean():+.3f} ({rise[kind].min():+.3f} to {rise[kind].max():+.3f})"
        )
    listed = ", ".join(f"{kind} {rise[kind].mean():+.2f}" for kind in KINDS)
    title = f"Change of the loss at {cfg.longer} times the trained length, nats per byte:\n{listed}"
    draw_lengths(title, losses, T, out / "demo_rope_length.png")

    save_metrics(
        out,
        name="demo_rope",
        shift_error=error,
        seed=cfg.seed,
        seeds=cfg.seeds,
        seconds=log.seconds,
        trained_length=T,
        read_length=read_length,
        inside=inside,
        past=past,
    )
