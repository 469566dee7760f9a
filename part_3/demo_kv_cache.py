"""
Part 3, the KV cache: what does it cost to make one more token, with the cache and without it? And
what do fewer key/value heads save?

    python part_3/demo_kv_cache.py
    python part_3/demo_kv_cache.py --positions=2048 --n_embd=256

Without a cache, a new token needs a forward pass over all tokens before it. With a cache, only the
new token passes through the model, but 2 * n_layer * G * D numbers of each older token are kept.
With grouped queries (Ainslie et al. 2023), H query heads share G key/value heads, so the cache is
H / G times smaller. model.py copies the keys and values for every query head before it multiplies.
So here grouped queries save memory, but not necessarily time.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
import weakref
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, GPTConfig, KVCache
from shared import (
    figure,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
    set_seed,
)

MIB = 2**20  # bytes


@dataclass
class Config:
    positions: int = 1024  # tokens of the longest context
    n_head: int = 8  # H, query heads
    n_embd: int = 128  # C, channels of the residual stream
    batch_size: int = 16  # texts side by side where the numbers of key/value heads are compared
    repeats: int = 5  # how often each time is measured
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.positions >= 8, f"positions={self.positions} must be at least 8"
        assert self.repeats > 0, f"repeats={self.repeats} must be at least 1"
        assert self.batch_size > 0, f"batch_size={self.batch_size} must be at least 1"
        assert self.n_head > 0, f"n_head={self.n_head} must be at least 1"
        assert self.n_embd > 0 and self.n_embd % (2 * self.n_head) == 0, (
            f"n_embd={self.n_embd} must be divisible by 2 * n_head = {2 * self.n_head}"
        )


def make_model(gpt_cfg, device):
    """An untrained model in which every block does something.

    The output projections of a new GPT are zero, so a wrong cache could not change its logits.
    """
    model = GPT(gpt_cfg)
    for block in model.h:
        torch.nn.init.normal_(block.attn.c_proj.weight, std=0.05)
        torch.nn.init.normal_(block.mlp.c_proj.weight, std=0.05)
    return model.to(device)


# measure ------------------------------------------------------------------------------------------


def fastest_ms(repeats, model, idx, cache=None):
    """The milliseconds of the fastest of several forward passes, because noise only adds time.

    With a cache, every pass is one token further on.
    """
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        logits, _ = model(idx, cache=cache)
        logits[0, 0, 0].item()  # waits for a GPU, which is still busy when the call returns
        times.append(1000 * (time.perf_counter() - start))
    return min(times[1:])  # the first pass warms up


def storages(tree):
    """{id: storage} of all tensors in nested lists, tuples and dicts. Views share a storage."""
    result = {}
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            result[id(storage)] = storage
    return result


class PeakMemory(TorchDispatchMode):
    """Counts the bytes that operators allocate and release, on any device:

    with PeakMemory() as memory:
        ...
    print(memory.peak)
    """

    def __init__(self):
        super().__init__()
        self.current = 0
        self.peak = 0

    def release(self, size):
        self.current -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)

        # A view or an in-place operation returns the storage of one of its arguments.
        existing = storages((args, kwargs))
        for key, storage in storages(out).items():
            if key not in existing:
                size = storage.nbytes()
                self.current += size
                weakref.finalize(storage, self.release, size)
        self.peak = max(self.peak, self.current)
        return out


def peak_mib(model, idx, cache=None):
    """The most memory that a forward pass allocates, on top of the weights and of the cache."""
    with PeakMemory() as memory:
        model(idx, cache=cache)
    return memory.peak / MIB


def read_context(model, idx):
    """Reads idx (B, T) -> a cache that holds all of it, and the last token's logits (B, V)."""
    cache = KVCache(model.cfg, len(idx), idx.device)

    # In chunks, because the scores of all tokens at once need much memory. The last token comes
    # alone, as it does when a text is generated.
    for chunk in idx[:, :-1].split(128, dim=1):
        model(chunk, cache=cache)
    logits, _ = model(idx[:, -1:], cache=cache)
    return cache, logits[:, -1]


def kept_mib(cache):
    """The size of the keys and values of the tokens so far. The cache reserves block_size."""
    total = 0
    for stored in (cache.k, cache.v):
        filled = stored[:, :, :, : cache.length]  # (n_layer, B, G, length, D)
        total += filled.numel() * filled.element_size()
    return total / MIB


class Measurement(NamedTuple):
    """What one more token costs at a position."""

    ms_with: float  # milliseconds with the cache
    ms_without: float  # milliseconds without it
    kept: float  # MiB of keys and values in the cache
    peak_with: float  # most MiB in use with the cache, which is included
    peak_without: float  # most MiB in use without it
    difference: float  # largest difference of a logit with and without the cache


def measure(model, context, repeats):
    """The cost of the token that comes after the context (1, T) -> Measurement."""
    cache, logits = read_context(model, context)
    logits_without, _ = model(context)
    difference = (logits_without[:, -1] - logits).abs().max().item()

    token = context[:, :1]
    kept = kept_mib(cache)
    peak = peak_mib(model, token, cache)
    return Measurement(
        ms_with=fastest_ms(8 * repeats, model, token, cache),  # short, so it is measured more often
        ms_without=fastest_ms(repeats, model, context),
        kept=kept,
        peak_with=kept + peak,
        peak_without=peak_mib(model, context),
        difference=difference,
    )


class HeadTimes(NamedTuple):
    """Milliseconds per token for each number of key/value heads."""

    low: list
    median: list
    high: list


def time_models(models, caches, token, repeats):
    """The time of one more token (B, 1) in each model, of several measurements -> HeadTimes."""
    rows = []
    for _ in range(repeats):
        # All models take their turn in each round, so that all meet the same noise.
        rows.append([fastest_ms(8, model, token, cache) for model, cache in zip(models, caches)])
    quantiles = torch.tensor([0.0, 0.5, 1.0])
    low, median, high = torch.tensor(rows).quantile(quantiles, dim=0).tolist()
    return HeadTimes(low, median, high)


# draw ---------------------------------------------------------------------------------------------


def draw_positions(title, positions, rows, path):
    """Left: milliseconds per token. Right: memory. rows: a Measurement for each position."""
    fig, (left, right) = figure(title, "position (tokens)", columns=2)
    left.plot(positions, [row.ms_without for row in rows], "o-")
    left.plot(positions, [row.ms_with for row in rows], "o-")
    left.set(ylabel="ms per token", yscale="log")

    right.plot(positions, [row.peak_without for row in rows], "o-", label="without the cache")
    right.plot(positions, [row.peak_with for row in rows], "o-", label="with the cache")
    right.plot(positions, [row.kept for row in rows], "--", label="the cache alone")
    right.set(ylabel="most memory in use for a token (MiB)", yscale="log")

    handles, labels = right.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3)
    save_figure(fig, path)


def draw_heads(title, heads, sizes, times, cfg, path):
    """Left: the size of the cache. Right: the time per token. One bar per number of heads."""
    fig, (left, right) = figure(title, "key/value heads G", columns=2)
    names = [str(G) for G in heads]
    left.bar(names, sizes)
    left.set_ylabel(f"cache of {cfg.batch_size} texts of {cfg.positions} tokens (MiB)")

    below = [median - low for median, low in zip(times.median, times.low)]
    above = [high - median for median, high in zip(times.median, times.high)]
    right.bar(names, times.median, yerr=[below, above], capsize=4, color="C1")
    right.set_ylabel(f"ms per token of {cfg.batch_size} texts (median, range)")
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    out = output_folder(cfg)
    torch.set_grad_enabled(False)

    # The measurements read a few tokens after the last position, too.
    gpt_cfg = GPTConfig(
        block_size=cfg.positions + 16 * cfg.repeats,
        n_head=cfg.n_head,
        n_kv_head=cfg.n_head,
        n_embd=cfg.n_embd,
    )
    model = make_model(gpt_cfg, device)
    idx = torch.randint(gpt_cfg.vocab_size, (cfg.batch_size, cfg.positions), device=device)

    # One text, with and without the cache.
    positions = [cfg.positions * (i + 1) // 8 for i in range(8)]
    rows = []
    for position in positions:
        row = measure(model, idx[:1, :position], cfg.repeats)
        rows.append(row)
        print(
            f"position {position:5}: {row.ms_with:6.2f} ms per token with the cache, "
            f"{row.ms_without:7.2f} without; {row.kept:.2f} MiB kept, "
            f"at most {row.peak_with:.2f} in use with it and {row.peak_without:.2f} without",
            flush=True,
        )
    difference = max(row.difference for row in rows)
    print(f"largest difference of a logit with and without the cache: {difference:.1e}")

    last = rows[-1]
    title = (
        f"Token {cfg.positions}: {last.ms_with:.1f} ms and {last.peak_with:.1f} MiB with the "
        f"cache,\n{last.ms_without:.0f} ms and {last.peak_without:.0f} MiB without"
    )
    draw_positions(title, positions, rows, out / "demo_kv_cache.png")

    # Many texts, with fewer and fewer key/value heads.
    heads = [G for G in range(cfg.n_head, 0, -1) if cfg.n_head % G == 0]
    models = [make_model(replace(gpt_cfg, n_kv_head=G), device) for G in heads]
    caches = []
    for grouped_model in models:
        cache, _ = read_context(grouped_model, idx)
        caches.append(cache)
    sizes = [kept_mib(cache) for cache in caches]
    times = time_models(models, caches, idx[:, :1], cfg.repeats)
    for i, G in enumerate(heads):
        print(
            f"{G} key/value heads for {cfg.n_head} query heads: {sizes[i]:.1f} MiB kept, "
            f"{times.median[i]:.1f} ms per token ({times.low[i]:.1f} to {times.high[i]:.1f})"
        )

    # Ranges that overlap are no evidence of a difference.
    overlap = times.low[0] <= times.high[-1] and times.low[-1] <= times.high[0]
    speed = f"{times.median[0] / times.median[-1]:.1f} times the speed"
    if overlap:
        speed = "no difference in speed"
    title = (
        f"1 key/value head instead of {cfg.n_head}: "
        f"a cache {sizes[0] / sizes[-1]:.0f} times smaller, {speed}"
    )
    draw_heads(title, heads, sizes, times, cfg, out / "demo_kv_cache_heads.png")

    save_metrics(
        out,
        name="demo_kv_cache",
        positions=positions,
        ms_with=[row.ms_with for row in rows],
        ms_without=[row.ms_without for row in rows],
        mib_kept=[row.kept for row in rows],
        peak_mib_with=[row.peak_with for row in rows],
        peak_mib_without=[row.peak_without for row in rows],
        worst_logit_difference=difference,
        kv_heads=heads,
        mib_by_kv_heads=sizes,
        ms_by_kv_heads=times.median,
        streams=cfg.batch_size,
        seed=cfg.seed,
    )
