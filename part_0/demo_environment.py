"""
Part 0 - this machine: what it has, how fast it multiplies matrices, and where one training step spends its time.

    python part_0/demo_environment.py
    python part_0/demo_environment.py --device=cpu --threads=1

A training step is mostly matrix products. The first figure is their speed by size and precision: small matrices never
reach the speed that the machine is sold for. The second is a profile of one step of a small transformer.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import os
import platform
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.profiler import ProfilerActivity, profile

from shared import cli, figure, save_figure, save_metrics, setup

@dataclass
class Config:
    sizes: str = "64,128,256,512,1024,2048"  # of the square matrices, comma-separated
    seconds: float = 0.3  # spent on each size and precision
    batch_size: int = 32  # sequences of the profiled step
    block_size: int = 128  # tokens in each
    n_embd: int = 128  # channels
    n_layer: int = 4  # layers
    threads: int = 0  # CPU threads; 0: as many as torch takes
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def wait(device):
    """Accelerators work on in the background; a clock must wait for them."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()

def gflops(n, dtype, device, seconds):
    """Speed of (n, n) @ (n, n): 2 n^3 operations each, in 10^9 per second; the best of three thirds of `seconds`."""
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    a @ b
    best = 0.0
    for _ in range(3):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds / 3:
            a @ b
            wait(device)
            count += 1
        best = max(best, count * 2 * n**3 / (time.perf_counter() - start) / 1e9)
    return best

def training_step(cfg, device):
    """A function that does one step of a small transformer with AdamW, built from torch's own layers."""
    layer = nn.TransformerEncoderLayer(cfg.n_embd, 4, 4 * cfg.n_embd, 0.0, "gelu", batch_first=True, norm_first=True)
    blocks = nn.TransformerEncoder(layer, cfg.n_layer, enable_nested_tensor=False)
    model = nn.Sequential(blocks, nn.Linear(cfg.n_embd, 256)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(cfg.batch_size, cfg.block_size, cfg.n_embd, device=device)
    y = torch.randint(256, (cfg.batch_size * cfg.block_size,), device=device)

    def step():
        nn.functional.cross_entropy(model(x).flatten(0, 1), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(device)
    return step, sum(p.numel() for p in model.parameters())

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes; Linux and Mac
    facts = {"system": platform.platform(terse=True), "python": platform.python_version(), "torch": torch.__version__,
             "device": str(device), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
             "memory_gib": round(memory / 2**30, 1)}
    for name, value in facts.items():
        print(f"{name:12} {value}")

    # matrix products
    sizes, speed = [int(n) for n in cfg.sizes.split(",")], {}
    print("\nGFLOP/s       " + "".join(f"{n:>8}" for n in sizes))
    for name in ("fp32", "bf16", "fp16"):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        speed[name] = [gflops(n, dtype, device, cfg.seconds) for n in sizes]
        print(f"{name:14}" + "".join(f"{v:8.0f}" for v in speed[name]), flush=True)
    ratio = max(speed["fp32"]) / speed["fp32"][0]
    title = f"{device}: fp32 products of {sizes[0]} reach 1/{ratio:.0f} of the best speed"
    fig, ax = figure(title, "matrix size n", "GFLOP/s")
    for (name, values), marker in zip(speed.items(), "osv"):
        ax.plot(sizes, values, marker + "-", label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.legend()
    save_figure(fig, Path(cfg.out) / "demo_environment_matmul.png")

    # one training step
    step, params = training_step(cfg, device)
    step()
    start = time.perf_counter()
    step()
    ms = 1000 * (time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        step()
    ops = sorted(prof.key_averages(), key=lambda op: -op.self_cpu_time_total)
    total = sum(op.self_cpu_time_total for op in ops)
    print(f"\none training step: {params:,} parameters, {cfg.batch_size} x {cfg.block_size} tokens, {ms:.0f} ms")
    for op in ops[:12]:
        spent = op.self_cpu_time_total
        print(f"  {op.key[:44]:44} {spent / 1000:8.1f} ms {spent / total:6.1%} {op.count:5} calls")
    top = ops[:10][::-1]
    share = ops[0].self_cpu_time_total / total
    fig, ax = figure(f"A training step: {ms:.0f} ms, {share:.0%} of it in {ops[0].key}", "ms")
    ax.barh([op.key[-34:] for op in top], [op.self_cpu_time_total / 1000 for op in top])
    save_figure(fig, Path(cfg.out) / "demo_environment_step.png")
    save_metrics(cfg, name="demo_environment", **facts, step_ms=ms, params=params,
                 **{f"{name}_gflops_{n}": v for name, values in speed.items() for n, v in zip(sizes, values)})
