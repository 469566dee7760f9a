"""
Part 4 - a big batch in micro-batches: the same gradient, less memory; and what bf16 gains by width.

    python part_4/demo_accumulation.py
    python part_4/demo_accumulation.py --batch_size=128 --widths=256,1024

The mean loss of a batch is the mean of the mean losses of its equal micro-batches, and so is its gradient: in exact
arithmetic nothing changes. In floating point the sums are done in another order; float64 beside float32 shows that
nothing but rounding is left. What a forward pass keeps for the backward pass shrinks with the micro-batch. Autocast has
weights in fp32 and multiplies in bf16, 8 bits of mantissa: whether that is faster depends on the machine and the width.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from model import GPT, GPTConfig
from shared import cli, figure, save_figure, save_metrics, setup
from train import backward

@dataclass
class Config:
    batch_size: int = 64  # sequences of the big batch, a power of two
    block_size: int = 64  # tokens per sequence
    n_layer: int = 3  # blocks
    n_embd: int = 128  # channels where gradients and memory are measured
    widths: str = "64,128,256,512,1024"  # channels where fp32 meets bf16
    repeats: int = 3  # how often a step is timed
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        power = self.batch_size > 1 and self.batch_size & (self.batch_size - 1) == 0
        assert power, f"batch_size={self.batch_size} must be a power of two from 2 on"
        assert all(w.isdigit() and int(w) % 8 == 0 for w in self.widths.split(",")), "widths: multiples of 8, commas"

def make(cfg, n_embd, device):
    """A model whose output projections do not start at zero: they would hide most of the gradient."""
    torch.manual_seed(cfg.seed)
    model = GPT(GPTConfig(block_size=cfg.block_size, n_layer=cfg.n_layer, n_embd=n_embd))
    for proj in (z for block in model.h for z in (block.attn.c_proj, block.mlp.c_proj)):
        torch.nn.init.normal_(proj.weight, std=0.02)
    return model.to(device)

def step(model, x, y, accum=1, autocast=nullcontext):
    """The gradient of one optimizer step, by train.py's own function -> the loss."""
    model.zero_grad(set_to_none=True)
    return backward(model, x, y, accum, autocast, torch.amp.GradScaler(x.device.type, enabled=False)).item()

def gradient(model, x, y, accum):
    step(model, x, y, accum)
    return torch.cat([p.grad.flatten() for p in model.parameters()])

def difference(g, whole):
    """|g - whole| / |whole|."""
    return ((g - whole).norm() / whole.norm()).item()

class Saved(torch.autograd.graph.saved_tensors_hooks):
    """After `with saved:` saved.most is the most bytes that were kept for a backward pass at a time: distinct storages,
    parameters aside. Those of a micro-batch are freed before the next one."""
    def __init__(self, model):
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.most, self.now = 0, {}
        super().__init__(self.keep, self.give)
    def keep(self, z):
        storage = z.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.now[storage.data_ptr()] = storage.nbytes()
            self.most = max(self.most, sum(self.now.values()))
        return z
    def give(self, z):
        self.now = {}  # the backward pass has begun
        return z

def step_ms(model, x, y, repeats, **how):
    took = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        step(model, x, y, **how)
        took.append(1000 * (time.perf_counter() - start))
    return min(took[1:])  # noise only adds

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    model = make(cfg, cfg.n_embd, device)
    x, y = torch.randint(256, (2, cfg.batch_size, cfg.block_size), device=device)
    accums = [2**i for i in range(cfg.batch_size.bit_length())]  # 1, 2, ..., batch_size

    # the same gradient
    apart = {}
    for name, net in (("float32", model), ("float64", make(cfg, cfg.n_embd, device).double())):
        whole = gradient(net, x, y, 1)
        apart[name] = [difference(gradient(net, x, y, accum), whole) for accum in accums[1:]]
        print(f"{name}: micro-batches change the gradient by {max(apart[name]):.1e} of its length at most")

    # less memory
    memory, ms = [], []
    for accum in accums:
        saved = Saved(model)
        with saved:
            step(model, x, y, accum)
        memory.append(saved.most / 2**20)
        ms.append(step_ms(model, x, y, cfg.repeats, accum=accum))
        print(f"{accum:3} micro-batches of {cfg.batch_size // accum:3}: {memory[-1]:8.2f} MiB, {ms[-1]:7.1f} ms a step")
    said = (f"A batch of {cfg.batch_size} in micro-batches of one: {memory[0] / memory[-1]:.0f} times less kept, "
            f"{ms[-1] / ms[0]:.1f} times the time,\nand the gradient changes by {max(apart['float32']):.0e} "
            f"of its length (in float64 by {max(apart['float64']):.0e})")
    fig, (left, right) = figure(said, "sequences in a micro-batch", columns=2)
    rows = [cfg.batch_size // accum for accum in accums]
    left.loglog(rows, memory, "o-", base=2)
    left.set_ylabel("kept for the backward pass, peak (MiB)")
    right.semilogx(rows, ms, "o-", base=2)
    right.set(ylabel=f"time of a step of {cfg.batch_size} sequences (ms)", ylim=(0, None))
    save_figure(fig, Path(cfg.out) / "demo_accumulation.png")

    # bf16
    widths, times = [int(w) for w in cfg.widths.split(",")], []
    bf16 = partial(torch.autocast, device.type, torch.bfloat16)
    part = slice(max(1, cfg.batch_size // 4))  # enough to see the width's effect
    for w in widths:
        model = make(cfg, w, device)
        times.append([step_ms(model, x[part], y[part], cfg.repeats, autocast=how) for how in (nullcontext, bf16)])
        print(f"width {w:4}: a step takes {times[-1][0]:7.1f} ms in fp32, {times[-1][1]:7.1f} ms with bf16 autocast")
    gain = [a / b for a, b in times]
    said = f"bf16 autocast: {gain[0]:.2f} times fp32's speed at width {widths[0]}, {gain[-1]:.2f} at {widths[-1]}"
    fig, ax = figure(said, "width (channels)", f"ms per step of {len(x[part])} sequences")
    for values, label in zip(zip(*times), ("fp32", "bf16 autocast")):
        ax.loglog(widths, values, "o-", base=2, label=label)
    ax.legend()
    save_figure(fig, Path(cfg.out) / "demo_accumulation_bf16.png")
    save_metrics(cfg, name="demo_accumulation", micro_batches=accums, gradient_float32=apart["float32"],
                 gradient_float64=apart["float64"], saved_mib=memory, step_ms=ms, widths=widths, ms_fp32_bf16=times,
                 bf16_gain=gain, seed=cfg.seed)
