"""
Part 3 - reading without end: loss, memory and ms per token of five ways to go on where the training length is over.

    python part_3/demo_streaming.py

StreamingLLM's table (Xiao et al. 2023, table 1). Weights sum to 1, so a head with nothing to say puts them on the first
tokens, which every query sees: attention sinks. A window that drops those should fail, with 4 sinks do as well as if
each window were computed anew. Beside Part 3's model stands a small one whose rows all began with the same token.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timeit
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, KVCache
from shared import Log, cli, figure, load_checkpoint, read_text, require, save_figure, save_metrics, setup
from train import encode, get_batch

BEGIN = 256  # the small model's first token, one past the bytes
WAYS = ["dense", "window", "window + sinks", "recomputation"]
NAMES = ["Part 3's GPT", "small GPT, begin token"]

@dataclass
class Config:
    init: str = "part_3/out/gpt.pt"  # a checkpoint of train.py
    windows: int = 20  # length of the stream, in training lengths
    sink: int = 4  # first tokens that stay; the window shrinks by as many, so that the memory is equal
    streams: int = 8  # different texts that are read
    steps: int = 800  # optimizer steps of the small model
    batch_size: int = 16  # rows of such a step
    block_size: int = 64  # its training length, in tokens
    seeds: int = 1  # how many small models; the README quotes 3
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def train_small(cfg, ids, log, first, device):
    """Two layers on rows that begin with BEGIN."""
    torch.manual_seed(cfg.seed)
    T = cfg.block_size
    model = GPT(GPTConfig(vocab_size=257, block_size=T, n_layer=2, n_embd=64)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(cfg.steps):
        x, y = get_batch(ids, step, cfg, T - 1)
        x, y = F.pad(x, (1, 0), value=BEGIN), torch.cat([x[:, :1], y], dim=1)
        _, loss = model(x.to(device), y.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log(first + step, loss=loss.item(), seed=cfg.seed)
    return model

def ways(model, cfg):
    """One set of weights, the masks of WAYS. A window and its sinks take the memory of one training length T."""
    T, models = model.cfg.block_size, []
    for sizes in ({"block_size": cfg.windows * T}, {"window": T}, {"window": T - cfg.sink, "sink": cfg.sink}, {}):
        models.append(GPT(replace(model.cfg, **sizes)).to(model.wte.weight.device))
        models[-1].load_state_dict(model.state_dict())
    return models

def read(model, rows, chunk):
    """Streams rows (B, N + 1) through the cache, chunk tokens at a time -> loss (B, N), and the cache."""
    cache, found = KVCache(model.cfg, len(rows), rows.device), []
    for x, y in zip(rows[:, :-1].split(chunk, dim=1), rows[:, 1:].split(chunk, dim=1)):
        found.append(F.cross_entropy(model(x, cache=cache)[0].transpose(1, 2), y, reduction="none"))
    return torch.cat(found, dim=1), cache

def recompute(model, rows, at, first):
    """The loss (B, P) after positions at (P,), nothing cached: of the last T tokens, or `first` and the last others."""
    T, found = model.cfg.block_size, []
    for t in at.tolist():
        x = rows[:, :t + 1] if t < T else torch.cat([rows[:, :first], rows[:, t + 1 - T + first:t + 1]], dim=1)
        found.append(F.cross_entropy(model(x)[0][:, -1], rows[:, t + 1], reduction="none"))
    return torch.stack(found, dim=1)

def gaps(losses):
    """losses (4, B) of WAYS -> (4, 3): mean, mean distance to recomputation, and two standard errors of that over B."""
    gap = losses - losses[-1]
    return torch.stack([losses.mean(dim=1), gap.mean(dim=1), 2 * gap.std(dim=1) / gap.size(1) ** 0.5], dim=1).tolist()

def to_first(model, rows, sink):
    """Each head's weight on a row's first tokens, mean over the queries of the row's second half."""
    model(rows)
    weights = torch.cat([b.attn.weights for b in model.h], dim=1)  # (B, L * H, T, T)
    return weights[:, :, rows.size(1) // 2:, :sink].sum(dim=-1).mean(dim=(0, 2)).cpu()

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    saved = load_checkpoint(require(cfg.init), "gpt")
    base = GPT(GPTConfig(**saved["gpt_config"])).to(device)
    base.load_state_dict(saved["weights"])
    ids, val = (torch.tensor(encode(read_text(require("data/stories") / f"{name}.txt"))) for name in ("train", "val"))
    log = Log(cfg, cfg.steps * cfg.seeds, name="demo_streaming")
    small = [train_small(replace(cfg, seed=cfg.seed + i), ids, log, cfg.steps * i, device) for i in range(cfg.seeds)]
    torch.set_grad_enabled(False)
    fig, axes = figure("", "position (training lengths)", "nats per byte", rows=2, height=7)
    (picture, panels), found = figure("", "head, of all layers", f"weight on first {cfg.sink} tokens", columns=2), []
    for i, models in enumerate(([base], small)):
        T = models[0].cfg.block_size
        N, at = cfg.windows * T, torch.arange(1, 8 * cfg.windows + 1) * T // 8 - 1  # eight positions a window
        starts = torch.arange(cfg.streams)[:, None] * ((len(val) - N - 1) // cfg.streams)
        rows = F.pad(val[starts + torch.arange(N + 1 - i)], (i, 0), value=BEGIN).to(device)  # (streams, N + 1)
        losses = torch.cat([torch.stack([*(read(m, rows, T)[0][:, at] for m in ways(model, cfg)[:3]),
                                         recompute(model, rows, at, i)]) for model in models], dim=1).cpu()
        table, four = gaps(losses[:, :, at >= 2 * T].mean(dim=2)), ways(models[0], cfg)
        for way, m, row in zip(WAYS, four, table):
            cache = read(m, rows[:1, :-16], T)[1] if m is not four[-1] else None
            x = rows[:1, :1] if cache else rows[:1, :T]
            took = timeit.repeat(lambda: m(x, cache=cache)[0].sum().item(), number=1, repeat=9)
            row += [1000 * min(took), (cache.k.nbytes + cache.v.nbytes) / 2**10 if cache else 0.0]  # noise only adds
            print("{}, {:14}: {:.3f} nats per byte past two lengths, {:+.3f} (+- {:.3f}) against recomputation; "
                  "{:.1f} ms per token, {:.0f} KiB".format(NAMES[i], way, *row), flush=True)
        one, _ = read(four[2], rows[:1], 1)
        whole = F.cross_entropy(four[2](rows[:1, :-1])[0][0], rows[0, 1:], reduction="none")
        found.append((table, (one[0] - whole).abs().max().item(), to_first(models[0], rows[:, :T], cfg.sink)))
        print(f"{NAMES[i]}, rolling buffer: {N} tokens one by one, {one.mean():.3f} nats per byte, {found[i][1]:.0e} "
              f"from no cache; heads give the first tokens {found[i][2].min():.1%} to {found[i][2].max():.1%}")
        for way, row, line in zip(WAYS, table, losses.unflatten(2, (cfg.windows, -1)).mean(dim=(1, 3))):
            said = "{}: {:+.3f}, {:.1f} ms, {:.0f} KiB".format(way, row[1], *row[3:])
            axes[i].semilogy(torch.arange(cfg.windows) + 0.5, line, label=said)
        axes[i].legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.68))
        panels[i].bar(range(1, 1 + len(found[i][2])), found[i][2])
        panels[i].axhline((cfg.sink / torch.arange(T // 2 + 1, T + 1)).mean(), color="black", linestyle="--")
        axes[i].set_title(f"{NAMES[i]}: nats per byte beyond recomputation, ms per token, cache", fontsize=10)
        panels[i].set(title=NAMES[i], xticks=range(2, 1 + len(found[i][2]), 2))
    lost = [f"{row[1]:+.3f}" if abs(row[1]) > row[2] else "nothing" for table, *_ in found for row in table[:2]]
    fig.suptitle("Against recomputation dense reading costs {}, a window without sinks {}\n"
                 "(nats per byte in Part 3's GPT); in the small one {} and {}".format(*lost))
    save_figure(fig, Path(cfg.out) / "demo_streaming_loss.png")
    picture.suptitle(f"The first {cfg.sink} tokens get at most {found[0][2].max():.1%} of a head's weight in Part 3's "
                     f"GPT,\n{found[1][2].max():.1%} in the small one (dashed: an even share)")
    save_figure(picture, Path(cfg.out) / "demo_streaming_attention.png")
    save_metrics(cfg, name="demo_streaming", ways=WAYS, columns=["loss", "gap", "two_errors", "ms", "kib"],
                 seed=cfg.seed, **{f"{key}_{which}": value for which, values in zip(("part_3", "small"), found)
                    for key, value in zip(("table", "ring_difference", "to_first"), values)})
