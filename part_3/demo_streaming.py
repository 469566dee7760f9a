"""
Part 3, streaming: how can a model go on reading when the text is longer than those it was trained
on? Five ways, by loss, memory and milliseconds per token.

    python part_3/demo_streaming.py
    python part_3/demo_streaming.py --seeds=3

These are the four ways of figure 1 of StreamingLLM (Xiao et al. 2023), and the ring buffer:

    dense           keep all keys: the cache grows, and distances occur that training never showed
    window          keep the last T keys, where T is the trained length
    window + sinks  keep the first 4 keys and the last T - 4
    recomputation   keep nothing: read the last T tokens again for each new token
    rolling buffer  window + sinks, one token at a time through a ring in constant memory

Attention weights sum to 1. So a head that has nothing to say must put its weight somewhere, and
large models put it on the first tokens, which every query sees: attention sinks. There a window
without sinks fails, and one with 4 sinks reads as well as recomputation. Are there sinks in Part
3's model, too? Beside it stands a small model whose training sequences all began with the same
token, which is an obvious place for a sink.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model_streaming import GPT, GPTConfig, KVCache
from shared import (
    Log,
    fail,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    read_text,
    require,
    save_figure,
    save_metrics,
    set_seed,
)
from train import encode, get_batch

BEGIN = 256  # the first token of every text of the small model, one past the bytes
WAYS = ["dense", "window", "window + sinks", "recomputation"]


@dataclass
class Config:
    init: str = "part_3/out/gpt.pt"  # checkpoint of Part 3's train.py
    windows: int = 20  # length of the texts that are read, in trained lengths

    # first tokens that stay visible; the window is shorter by as many, so that the memory is equal
    sink: int = 4

    streams: int = 8  # number of different texts that are read
    steps: int = 800  # optimizer steps of the small model
    batch_size: int = 16  # sequences per step
    block_size: int = 64  # trained length of the small model, in tokens
    seeds: int = 1  # number of small models to train: seed, seed + 1, ...
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        # The table counts what comes after two trained lengths, and a standard error needs two.
        assert self.windows >= 3, f"windows={self.windows} must be at least 3"
        assert self.streams >= 2, f"streams={self.streams} must be at least 2"
        assert self.block_size >= 8, f"block_size={self.block_size} must be at least 8"
        assert self.sink > 0, f"sink={self.sink} must be at least 1"
        assert self.steps > 0, f"steps={self.steps} must be at least 1"
        assert self.seeds > 0, f"seeds={self.seeds} must be at least 1"
        assert self.batch_size > 0, f"batch_size={self.batch_size} must be at least 1"


# two models ---------------------------------------------------------------------------------------


def load_model(cfg, device):
    """The model of a checkpoint of train.py, with the attention of model_streaming.py."""
    saved = load_checkpoint(require(cfg.init), "gpt")

    # model.py's configuration has no window and no sinks. The weights are the same.
    names = {field.name for field in fields(GPTConfig)}
    optional = {"window", "sink"}
    if set(saved["gpt_config"]) | optional != names:
        fail(f"--init={cfg.init} must be a checkpoint of part_3/train.py")
    model = GPT(GPTConfig(**saved["gpt_config"])).to(device)
    model.load_state_dict(saved["weights"])
    if cfg.sink >= model.cfg.block_size:
        fail(f"--sink={cfg.sink} must be smaller than {model.cfg.block_size}, the trained length")
    return model


def train_small(ids, cfg, device, log, first_step):
    """Trains two layers on sequences that all begin with BEGIN -> the model."""
    torch.manual_seed(cfg.seed)
    T = cfg.block_size
    model = GPT(GPTConfig(vocab_size=257, block_size=T, n_layer=2, n_embd=64)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(cfg.steps):
        x, y = get_batch(ids, step, cfg, T - 1)  # (batch_size, T - 1) each
        first_target = x[:, :1]  # BEGIN is followed by the first byte
        x = F.pad(x, (1, 0), value=BEGIN)  # (batch_size, T)
        y = torch.cat([first_target, y], dim=1)  # (batch_size, T)
        _, loss = model(x.to(device), y.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log(first_step + step, loss=loss.item(), seed=cfg.seed)
    return model


def with_attention(model, window, sink):
    """A copy of the model that sees another window."""
    copy = GPT(replace(model.cfg, window=window, sink=sink)).to(model.wte.weight.device)
    copy.load_state_dict(model.state_dict())
    return copy


def make_readers(model, cfg):
    """{way: model} for WAYS. A window with its sinks takes the memory of one trained length."""
    T = model.cfg.block_size
    return {
        "dense": with_attention(model, window=cfg.windows * T, sink=0),
        "window": with_attention(model, window=T, sink=0),
        "window + sinks": with_attention(model, window=T - cfg.sink, sink=cfg.sink),
        "recomputation": with_attention(model, window=T, sink=0),
    }


# read ---------------------------------------------------------------------------------------------


def cut_rows(ids, cfg, T, has_begin):
    """Evenly spaced pieces of the text -> (streams, windows * T + 1). With has_begin, the first
    token of each is BEGIN."""
    begin = 1 if has_begin else 0
    length = cfg.windows * T + 1
    free = len(ids) - length
    if free < 0:
        fail(f"--windows={cfg.windows} of {T} bytes are longer than the validation text: lower it")
    starts = torch.arange(cfg.streams) * (free // cfg.streams)
    rows = ids[starts[:, None] + torch.arange(length - begin)]
    return F.pad(rows, (begin, 0), value=BEGIN)


def read(model, rows, chunk):
    """Reads rows (B, N + 1) through the cache, `chunk` tokens at a time -> the loss of each token
    (B, N), and the cache."""
    cache = KVCache(model.cfg, len(rows), rows.device)
    losses = []
    inputs = rows[:, :-1].split(chunk, dim=1)
    targets = rows[:, 1:].split(chunk, dim=1)
    for x, y in zip(inputs, targets):
        logits, _ = model(x, cache=cache)
        losses.append(F.cross_entropy(logits.transpose(1, 2), y, reduction="none"))  # (B, chunk)
    return torch.cat(losses, dim=1), cache


def read_again(model, rows, positions, has_begin):
    """Recomputation: the loss of the tokens that follow `positions` (P,), each from the T tokens
    before it -> (B, P). With has_begin, the row's first token replaces the oldest of the T."""
    T = model.cfg.block_size
    begin = 1 if has_begin else 0
    losses = []
    for t in positions.tolist():
        x = rows[:, : t + 1]
        if t >= T:
            newest = rows[:, t + 1 - T + begin : t + 1]
            x = torch.cat([rows[:, :begin], newest], dim=1)  # (B, T)
        logits, _ = model(x)
        losses.append(F.cross_entropy(logits[:, -1], rows[:, t + 1], reduction="none"))  # (B,)
    return torch.stack(losses, dim=1)


def read_all_ways(model, rows, positions, cfg, has_begin):
    """The losses after `positions` (P,) in each of WAYS -> (4, B, P)."""
    readers = make_readers(model, cfg)
    losses = []
    for way in WAYS[:3]:
        loss, _ = read(readers[way], rows, chunk=model.cfg.block_size)
        losses.append(loss[:, positions])
    losses.append(read_again(readers["recomputation"], rows, positions, has_begin))
    return torch.stack(losses)


def compare(losses):
    """losses (4, B), of WAYS and texts -> (4, 3): the mean, the mean difference to recomputation,
    and two standard errors of that difference.

    The texts are the same for all ways, so the differences vary less than the losses do.
    """
    differences = losses - losses[-1]
    errors = differences.std(dim=1) / differences.size(1) ** 0.5
    return torch.stack([losses.mean(dim=1), differences.mean(dim=1), 2 * errors], dim=1)


class Cost(NamedTuple):
    ms: float  # milliseconds for one more token
    kib: float  # size of the cache


def measure_cost(way, reader, rows):
    """What one more token costs at the end of the first text -> Cost."""
    T = reader.cfg.block_size
    if way == "recomputation":
        cache = None
        x = rows[:1, :T]
        kib = 0.0
    else:
        _, cache = read(reader, rows[:1, :-16], chunk=T)
        x = rows[:1, :1]
        kib = (cache.k.nbytes + cache.v.nbytes) / 2**10

    # The fastest of nine, because noise only adds time.
    times = []
    for _ in range(9):
        start = time.perf_counter()
        logits, _ = reader(x, cache=cache)
        logits.sum().item()  # waits for a GPU
        times.append(1000 * (time.perf_counter() - start))
    return Cost(min(times), kib)


class Stream(NamedTuple):
    """A text that was read one token at a time."""

    loss: float  # mean over all tokens, in nats
    difference: float  # largest difference of a token's loss to that without a cache
    ms: float  # milliseconds per token
    bytes: int  # size of the cache


def stream(reader, row):
    """The rolling buffer: reads row (1, N + 1) one token at a time in constant memory -> Stream."""
    empty = KVCache(reader.cfg, 1, row.device)
    size = empty.k.nbytes + empty.v.nbytes

    start = time.perf_counter()
    losses, cache = read(reader, row, chunk=1)  # (1, N)
    mean = losses.mean().item()  # waits for a GPU
    seconds = time.perf_counter() - start
    end_size = cache.k.nbytes + cache.v.nbytes
    assert end_size == size, f"the cache grew from {size} to {end_size} bytes"

    # The same attention without a cache: one forward pass with a banded mask over the whole text.
    logits, _ = reader(row[:, :-1])
    whole = F.cross_entropy(logits.transpose(1, 2), row[:, 1:], reduction="none")
    difference = (losses - whole).abs().max().item()
    return Stream(mean, difference, 1000 * seconds / losses.size(1), size)


def weight_on_first(model, rows, sink):
    """The attention weight of each head on the first tokens of rows (B, T), as the mean over the
    queries in the second half -> (n_layer * H,)."""
    model(rows)
    weights = torch.cat([block.attn.weights for block in model.h], dim=1)  # (B, heads, T, T)
    second_half = weights[:, :, rows.size(1) // 2 :]
    return second_half[..., :sink].sum(dim=-1).mean(dim=(0, 2)).cpu()


class Result(NamedTuple):
    """What was measured of one model; the small one may stand for several seeds."""

    table: torch.Tensor  # (4, 3), see compare()
    costs: list  # a Cost for each of WAYS
    curves: torch.Tensor  # (4, windows), the mean loss in each trained length of text
    stream: Stream
    to_first: torch.Tensor  # (heads,), see weight_on_first()


def examine(models, val_ids, cfg, has_begin, device):
    """All measurements of one model, or of several that differ in their seeds only -> Result."""
    T = models[0].cfg.block_size
    rows = cut_rows(val_ids, cfg, T, has_begin).to(device)

    # Recomputation is slow, so the losses are taken at eight positions per trained length.
    positions = torch.arange(1, 8 * cfg.windows + 1) * T // 8 - 1
    losses = [read_all_ways(model, rows, positions, cfg, has_begin) for model in models]
    losses = torch.cat(losses, dim=1).cpu()  # (4, streams * models, positions)
    beyond = losses[:, :, positions >= 2 * T]

    readers = make_readers(models[0], cfg)
    return Result(
        table=compare(beyond.mean(dim=2)),
        costs=[measure_cost(way, readers[way], rows) for way in WAYS],
        curves=losses.unflatten(2, (cfg.windows, -1)).mean(dim=(1, 3)),
        stream=stream(readers["window + sinks"], rows[:1]),
        to_first=weight_on_first(models[0], rows[:, :T], cfg.sink),
    )


# print and draw -----------------------------------------------------------------------------------


def print_result(name, result, cfg):
    print(f"\n{name}, after two trained lengths:")
    for way, (loss, gap, errors), cost in zip(WAYS, result.table.tolist(), result.costs):
        print(
            f"  {way:14}: {loss:.3f} nats per byte, {gap:+.3f} (+- {errors:.3f}) against "
            f"recomputation; {cost.ms:.1f} ms per token, {cost.kib:.0f} KiB of cache"
        )
    print(
        f"  rolling buffer: {cfg.windows} trained lengths, one token at a time: "
        f"{result.stream.loss:.3f} nats and {result.stream.ms:.1f} ms per byte, "
        f"always {result.stream.bytes:,} bytes of cache; "
        f"losses within {result.stream.difference:.0e} of those without a cache"
    )
    print(
        f"  the heads put {result.to_first.min():.1%} to {result.to_first.max():.1%} of their "
        f"weight on the first {cfg.sink} tokens",
        flush=True,
    )


def draw_losses(results, path):
    """The loss by position for both models. results: {name: Result}"""
    title = "Nats per byte more than recomputation, with two standard errors"
    for name, result in results.items():
        gap = result.table[:, 1]
        errors = result.table[:, 2]
        title += (
            f"\n{name}: dense {gap[0]:+.2f} ± {errors[0]:.2f}, "
            f"window without sinks {gap[1]:+.3f} ± {errors[1]:.3f}"
        )
    fig, axes = figure(title, "position (trained lengths)", "nats per byte", rows=2, height=8)
    for ax, (name, result) in zip(axes, results.items()):
        middles = torch.arange(result.curves.size(1)) + 0.5
        for way, curve, row, cost in zip(WAYS, result.curves, result.table, result.costs):
            label = f"{way}: {row[1]:+.3f}, {cost.ms:.1f} ms, {cost.kib:.0f} KiB"
            ax.semilogy(middles, curve, label=label)
        ax.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
        subtitle = f"{name} (nats per byte more than recomputation, ms per token, cache)"
        ax.set_title(subtitle, fontsize=10)
    save_figure(fig, path)


def draw_attention(results, lengths, sink, path):
    """How much weight each head puts on the first tokens. lengths: the models' trained lengths."""
    most = [f"{result.to_first.max():.1%}" for result in results.values()]
    title = (
        f"The first {sink} tokens get at most {most[0]} of a head's weight in Part 3's GPT\n"
        f"and {most[1]} in the small one (dashed: if all visible tokens got the same)"
    )
    ylabel = f"weight on the first {sink} tokens"
    fig, axes = figure(title, "head, of all layers", ylabel, columns=2)
    for ax, (name, result), T in zip(axes, results.items(), lengths):
        heads = range(1, len(result.to_first) + 1)
        ax.bar(heads, result.to_first)
        even_share = (sink / torch.arange(T // 2 + 1, T + 1)).mean()
        ax.axhline(even_share, color="black", linestyle="--")
        ax.set(title=name, xticks=heads[1::2])
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    model = load_model(cfg, device)
    stories = require("data/stories")
    train_ids = torch.tensor(encode(read_text(stories / "train.txt")))
    val_ids = torch.tensor(encode(read_text(stories / "val.txt")))
    out = output_folder(cfg)

    # A model that has an obvious place for a sink
    log = Log(out, cfg.steps * cfg.seeds, name="demo_streaming")
    small_models = []
    for i in range(cfg.seeds):
        seed_cfg = replace(cfg, seed=cfg.seed + i)
        small = train_small(train_ids, seed_cfg, device, log, first_step=i * cfg.steps)
        small_models.append(small)

    # Read in all ways.
    torch.set_grad_enabled(False)
    result = examine([model], val_ids, cfg, has_begin=False, device=device)
    print_result("Part 3's GPT", result, cfg)
    small_result = examine(small_models, val_ids, cfg, has_begin=True, device=device)
    print_result("Small GPT with a begin token", small_result, cfg)

    results = {"Part 3's GPT": result, "Small GPT, begin token": small_result}
    lengths = [model.cfg.block_size, cfg.block_size]
    draw_losses(results, out / "demo_streaming_loss.png")
    draw_attention(results, lengths, cfg.sink, out / "demo_streaming_attention.png")

    metrics = {}
    for key, each in {"part_3": result, "small": small_result}.items():
        table = []
        for row, cost in zip(each.table.tolist(), each.costs):
            table.append([*row, cost.ms, cost.kib])
        metrics[f"table_{key}"] = table
        metrics[f"ring_difference_{key}"] = each.stream.difference
        metrics[f"stream_loss_{key}"] = each.stream.loss
        metrics[f"stream_ms_{key}"] = each.stream.ms
        metrics[f"ring_bytes_{key}"] = each.stream.bytes
        metrics[f"to_first_{key}"] = each.to_first
    save_metrics(
        out,
        name="demo_streaming",
        ways=WAYS,
        columns=["loss", "gap", "two_errors", "ms", "kib"],
        seed=cfg.seed,
        **metrics,
    )
