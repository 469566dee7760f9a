"""
Part 0, this machine: what it has, how fast it multiplies matrices, and where the time of one
training step goes.

    python part_0/demo_environment.py
    python part_0/demo_environment.py --device=cpu --threads=1

A training step consists mostly of matrix products. The first figure shows their speed by size and
precision. A small product never reaches the speed that a machine is sold for, because starting it
takes longer than computing it. The second figure is a profile of one training step of a small
transformer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import os
import platform
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from shared import (
    DTYPES,
    figure,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
    set_seed,
)


@dataclass
class Config:
    sizes: str = "64,128,256,512,1024,2048"  # sizes of the square matrices, separated by commas
    seconds: float = 0.3  # seconds to spend on each size and precision
    batch_size: int = 32  # sequences per step
    block_size: int = 128  # tokens per sequence
    n_embd: int = 128  # channels of the transformer
    n_layer: int = 4  # layers of the transformer
    threads: int = 0  # CPU threads; 0: as many as torch chooses
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for word in self.sizes.split(","):
            assert word.isdigit() and int(word) > 0, (
                f"sizes={self.sizes} must be numbers above 0 with commas between them"
            )
        assert self.n_embd % 4 == 0, (
            f"n_embd={self.n_embd} must be divisible by 4, the number of heads"
        )


def machine_facts(device):
    """What this machine has: {name: value}."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes, on Linux and Mac
    return {
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
    }


def wait(device):
    """Wait until the device is done. A GPU works in the background, and the clock would stop
    before it has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def gflops(n, dtype, device, seconds):
    """Speed of the product of two (n, n) matrices, in 10^9 operations per second.

    A product takes 2 n^3 operations: n multiplications and n additions for each of n^2 results.
    """
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    a @ b  # the first call also allocates memory and chooses a kernel

    # Other programs can only slow us down, so the best of three trials is the fairest.
    best = 0.0
    for _ in range(3):
        products = 0
        start = time.perf_counter()
        while time.perf_counter() - start < seconds / 3:
            a @ b
            wait(device)
            products += 1
        elapsed = time.perf_counter() - start
        best = max(best, products * 2 * n**3 / elapsed / 1e9)
    return best


def gflops_by_size(sizes, dtype, device, seconds):
    """The speed of gflops() for each size. NaN where one product would take over half a second: a
    processor that only emulates a precision needs minutes for a large matrix."""
    speeds = []
    slowest = math.inf  # the speed of the size before, as far as it was measured
    for n in sizes:
        if 2 * n**3 / (slowest * 1e9) > 0.5:
            speeds.append(math.nan)
            continue
        slowest = gflops(n, dtype, device, seconds)
        speeds.append(slowest)
    return speeds


def make_training_step(cfg, device):
    """Build a small transformer from torch's layers -> (a function that does one training step with
    AdamW, the number of parameters)."""
    layer = nn.TransformerEncoderLayer(
        cfg.n_embd,
        nhead=4,
        dim_feedforward=4 * cfg.n_embd,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    blocks = nn.TransformerEncoder(layer, cfg.n_layer, enable_nested_tensor=False)
    model = nn.Sequential(blocks, nn.Linear(cfg.n_embd, 256)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())

    # The profile does not depend on what is learned, so the data is random.
    x = torch.randn(cfg.batch_size, cfg.block_size, cfg.n_embd, device=device)  # (B, T, C)
    y = torch.randint(256, (cfg.batch_size * cfg.block_size,), device=device)  # (B * T,)

    def step():
        logits = model(x).flatten(0, 1)  # (B * T, 256)
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(device)

    params = sum(p.numel() for p in model.parameters())
    return step, params


class Operation(NamedTuple):
    name: str
    ms: float  # milliseconds of all calls, without the operations that it calls in turn
    calls: int


def profile_step(step):
    """Profile one call of step() -> [Operation], the slowest first."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()

    operations = []
    for event in profiler.key_averages():
        operations.append(Operation(event.key, event.self_cpu_time_total / 1000, event.count))
    return sorted(operations, key=lambda operation: operation.ms, reverse=True)


def draw_speed(sizes, speed, device, path):
    """GFLOP/s by matrix size, one curve per precision."""
    ratio = max(speed["fp32"]) / speed["fp32"][0]
    title = f"{device}: fp32 products of {sizes[0]} reach 1/{ratio:.0f} of the best speed"
    fig, ax = figure(title, "matrix size n", "GFLOP/s")
    for (name, values), marker in zip(speed.items(), "osv"):
        ax.plot(sizes, values, marker=marker, label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.legend()
    save_figure(fig, path)


def draw_step(operations, step_ms, path):
    """The ten operations of a training step that take the most time."""
    slowest = operations[0]
    share = slowest.ms / sum(operation.ms for operation in operations)
    fig, ax = figure(
        f"A training step: {step_ms:.0f} ms, {share:.0%} of it in {slowest.name}", "ms"
    )

    # barh draws from the bottom up. Long names are told apart by their ends.
    top = operations[:10][::-1]
    names = [operation.name[-34:] for operation in top]
    ax.barh(names, [operation.ms for operation in top])
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    out = output_folder(cfg)
    if cfg.threads > 0:
        torch.set_num_threads(cfg.threads)

    facts = machine_facts(device)
    for name, value in facts.items():
        print(f"{name:12} {value}")

    # The speed of matrix products, by size and precision.
    sizes = [int(size) for size in cfg.sizes.split(",")]
    print()
    print("GFLOP/s       " + "".join(f"{n:>8}" for n in sizes))
    speed = {}
    for name, dtype in DTYPES.items():
        speed[name] = gflops_by_size(sizes, dtype, device, cfg.seconds)
        print(f"{name:14}" + "".join(f"{value:8.0f}" for value in speed[name]), flush=True)
    draw_speed(sizes, speed, device, out / "demo_environment_matmul.png")

    # The time of one training step. The first one is slower, because it allocates the memory.
    step, params = make_training_step(cfg, device)
    step()
    start = time.perf_counter()
    step()
    step_ms = 1000 * (time.perf_counter() - start)
    print()
    print(f"one training step takes {step_ms:.0f} ms: {params:,} parameters,", end=" ")
    print(f"{cfg.batch_size} sequences of {cfg.block_size} tokens")

    # Where this time goes.
    operations = profile_step(step)
    total = sum(operation.ms for operation in operations)
    for name, ms, calls in operations[:12]:
        print(f"  {name[:44]:44} {ms:8.1f} ms {ms / total:6.1%} {calls:5} calls")
    draw_step(operations, step_ms, out / "demo_environment_step.png")

    metrics = {**facts, "step_ms": step_ms, "params": params}
    for name, values in speed.items():
        for n, value in zip(sizes, values):
            if not math.isnan(value):
                metrics[f"{name}_gflops_{n}"] = value
    save_metrics(out, name="demo_environment", **metrics)
