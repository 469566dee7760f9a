"""
Part 3 - what the KV cache buys: ms per token and memory against position, with it and without, and with fewer KV heads.

    python part_3/demo_kv_cache.py
    python part_3/demo_kv_cache.py --positions=2048 --n_embd=256

Without a cache each token costs a forward pass over all before it; with it one token passes, and 2 * n_layer * G * D
numbers are kept of each. Grouped queries (Ainslie et al. 2023) share G key/value heads among H query heads: H / G times
less to keep. model.py copies them out for every query head before it multiplies: expect memory of it, not speed.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
import weakref
from dataclasses import dataclass, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, GPTConfig, KVCache
from shared import cli, figure, save_figure, save_metrics, setup

@dataclass
class Config:
    positions: int = 1024  # tokens of the longest context
    n_head: int = 8  # H, query heads
    n_embd: int = 128  # channels
    batch_size: int = 16  # streams side by side where the key/value heads are compared
    repeats: int = 5  # how often a time is measured
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        assert self.positions >= 8 and self.repeats > 0, "positions must be at least 8, and repeats at least 1"

def make(gpt_cfg, device):
    """A model whose output projections do not start at zero: otherwise the cache could not change a logit."""
    model = GPT(gpt_cfg)
    for proj in (z for block in model.h for z in (block.attn.c_proj, block.mlp.c_proj)):
        torch.nn.init.normal_(proj.weight, std=0.05)
    return model.to(device)

def fastest_ms(repeats, model, idx, **cache):
    """Of one forward pass: noise only adds. With a cache each repeat is one token further."""
    took = []
    for _ in range(repeats + 1):  # the first call warms up
        start = time.perf_counter()
        model(idx, **cache)[0][0, 0, 0].item()  # a GPU is still busy when the call returns
        took.append(1000 * (time.perf_counter() - start))
    return min(took[1:])

class Peak(TorchDispatchMode):
    """Inside `with Peak() as peak:` adds up what operators allocate while it lives; peak.most is the peak in bytes."""
    now = most = 0
    def free(self, size):
        self.now -= size
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old, new = ({id(z.untyped_storage()): z.untyped_storage() for z in tree_leaves(tree)
                     if isinstance(z, torch.Tensor)} for tree in ((args, kwargs), out))
        for storage in (new[key] for key in new.keys() - old.keys()):  # a view brings its parent's storage
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

def peak_mib(model, idx, **cache):
    with Peak() as peak:
        model(idx, **cache)
    return peak.most / 2**20

def prefilled(model, idx):
    """A cache that has read idx (B, T): in chunks, for a long one's scores are large, then the last token alone."""
    cache = KVCache(model.cfg, len(idx), idx.device)
    for chunk in (*idx[:, :-1].split(128, dim=1), idx[:, -1:]):
        logits, _ = model(chunk, cache=cache)
    return cache, logits[:, -1]

def kept_mib(cache):
    """Keys and values of the tokens so far. The ring reserves its full size at once."""
    return sum(z[:, :, :, :cache.used].numel() * z.element_size() for z in (cache.k, cache.v)) / 2**20

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    torch.set_grad_enabled(False)
    T, H = cfg.positions, cfg.n_head
    gpt_cfg = GPTConfig(block_size=T + 16 * cfg.repeats, n_head=H, n_embd=cfg.n_embd, n_kv_head=H)  # room to time
    model = make(gpt_cfg, device)
    idx = torch.randint(gpt_cfg.vocab_size, (cfg.batch_size, T), device=device)
    at = [T * (i + 1) // 8 for i in range(8)]

    # with and without the cache, one stream
    rows, worst = [], 0.0
    for t in at:
        context = idx[:1, :t]
        cache, logits = prefilled(model, context)
        worst = max(worst, (model(context)[0][:, -1] - logits).abs().max().item())
        kept, peak = kept_mib(cache), peak_mib(model, idx[:1, :1], cache=cache)
        ms = fastest_ms(8 * cfg.repeats, model, idx[:1, :1], cache=cache)  # short, so it is measured more often
        rows.append((ms, fastest_ms(cfg.repeats, model, context), kept, kept + peak, peak_mib(model, context)))
        print("position {:5}: {:6.2f} ms per token with the cache, {:7.2f} without; "
              "{:.2f} MiB kept, at most {:.2f} with and {:.2f} without".format(t, *rows[-1]), flush=True)
    with_ms, without_ms, kept, peak_with, peak_without = zip(*rows)
    print(f"largest difference of a logit with and without the cache: {worst:.1e}")
    said = "The {}th token: {:.1f} ms and {:.1f} MiB with the cache, {:.0f} ms and {:.0f} MiB without"
    said = said.format(T, with_ms[-1], peak_with[-1], without_ms[-1], peak_without[-1])
    fig, (left, right) = figure(said, "position (tokens)", columns=2)
    left.plot(at, without_ms, "o-", at, with_ms, "o-")
    left.set(ylabel="ms per token", yscale="log")
    curves = right.plot(at, peak_without, "o-", at, peak_with, "o-", at, kept, "--")
    right.set(ylabel="peak memory while a token is made (MiB)", yscale="log")
    fig.legend(curves, ["without the cache", "with the cache", "the cache alone"], loc="outside lower center", ncols=3)
    save_figure(fig, Path(cfg.out) / "demo_kv_cache.png")

    # fewer key/value heads, many streams
    heads = [G for G in range(H, 0, -1) if H % G == 0]
    models = [make(replace(gpt_cfg, n_kv_head=G), device) for G in heads]
    caches = [prefilled(m, idx)[0] for m in models]
    size = [kept_mib(cache) for cache in caches]
    ms = torch.tensor([[fastest_ms(8, m, idx[:, :1], cache=cache) for m, cache in zip(models, caches)]
                       for _ in range(cfg.repeats)])  # (repeats, heads): in turns, so that all meet the same noise
    low, middle, high = ms.quantile(torch.tensor([0.0, 0.5, 1.0]), dim=0)
    for G, *row in zip(heads, size, middle, low, high):
        print("{} key/value heads of {}: {:.1f} MiB kept, {:.1f} ms per token ({:.1f} to {:.1f})".format(G, H, *row))
    overlap = low[0] <= high[-1] and low[-1] <= high[0]
    said = "no difference in speed" if overlap else f"{middle[0] / middle[-1]:.1f} times the speed"
    fig, (left, right) = figure(f"One key/value head instead of {H}: {size[0] / size[-1]:.0f} times less cache, {said}",
                                "key/value heads G", columns=2)
    left.bar([str(G) for G in heads], size)
    left.set_ylabel(f"cache of {cfg.batch_size} streams of {T} tokens (MiB)")
    right.bar([str(G) for G in heads], middle, yerr=[middle - low, high - middle], capsize=4, color="C1")
    right.set_ylabel(f"ms per token of {cfg.batch_size} streams; median and range")
    save_figure(fig, Path(cfg.out) / "demo_kv_cache_heads.png")
    save_metrics(cfg, name="demo_kv_cache", positions=at, ms_with=with_ms, ms_without=without_ms, mib_kept=kept,
                 peak_mib_with=peak_with, peak_mib_without=peak_without, worst_logit_difference=worst, kv_heads=heads,
                 mib_by_kv_heads=size, ms_by_kv_heads=middle, streams=cfg.batch_size, seed=cfg.seed)
