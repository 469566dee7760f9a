"""
Part 4, accumulation and mixed precision: what does a step cost in several micro-batches, and what
does bf16 gain?

    python part_4/demo_accumulation.py
    python part_4/demo_accumulation.py --batch_size=128 --widths=256,1024

The mean loss of a batch is the mean of the mean losses of its equal micro-batches, and so is its
gradient. In exact arithmetic nothing changes. In floating point the sums are done in another order;
float64 beside float32 shows that the rest is rounding. What a forward pass keeps for the backward
pass shrinks with the micro-batch.

Autocast keeps the weights in fp32 and multiplies in bf16, which has 8 bits of precision instead of
24. Whether that is faster depends on the machine and on the width of the model.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from model import GPT, GPTConfig
from shared import (
    autocast_for,
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
    set_seed,
)
from train import backward


@dataclass
class Config:
    batch_size: int = 64  # sequences of the whole batch, a power of two
    block_size: int = 64  # tokens per sequence
    n_layer: int = 3  # number of blocks
    n_embd: int = 128  # channels of the model whose gradients and memory are measured
    widths: str = "64,128,256,512"  # channels of the models that compare fp32 with bf16
    repeats: int = 3  # number of times that each step is timed
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("block_size", "n_layer", "n_embd", "repeats"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.n_embd % 8 == 0, (
            f"n_embd={self.n_embd} must be divisible by 8: four heads, and RoPE rotates pairs"
        )
        is_power = self.batch_size > 1 and self.batch_size.bit_count() == 1
        assert is_power, f"batch_size={self.batch_size} must be a power of two, at least 2"


def parse_widths(text):
    """ "64,128" -> [64, 128]"""
    widths = []
    for word in text.split(","):
        if not word.isdigit() or int(word) == 0 or int(word) % 8 != 0:
            fail(f"--widths={text} must be multiples of 8 with commas between them")
        widths.append(int(word))
    return widths


def build_model(cfg, n_embd, device):
    """A GPT whose output projections are not zero: zeros would hide most of the gradient."""
    torch.manual_seed(cfg.seed)
    model = GPT(GPTConfig(block_size=cfg.block_size, n_layer=cfg.n_layer, n_embd=n_embd))
    for block in model.h:
        torch.nn.init.normal_(block.attn.c_proj.weight, std=0.02)
        torch.nn.init.normal_(block.mlp.c_proj.weight, std=0.02)
    return model.to(device)


def compute_gradient(model, x, y, accum=1, autocast=nullcontext):
    """The gradient of one optimizer step in accum micro-batches, by train.py's own function."""
    model.zero_grad(set_to_none=True)
    scaler = torch.amp.GradScaler(x.device.type, enabled=False)
    backward(model, x, y, SimpleNamespace(accum=accum), autocast, scaler)


def flat_gradient(model, x, y, accum):
    """The gradients of all parameters as one vector."""
    compute_gradient(model, x, y, accum)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def relative_difference(gradient, expected):
    """The length of the difference of two vectors as a share of the second one's length."""
    return ((gradient - expected).norm() / expected.norm()).item()


class MemoryMeter(torch.autograd.graph.saved_tensors_hooks):
    """`with meter:` measures what the forward passes keep for their backward passes.

    Afterwards meter.peak is the largest number of bytes kept at a time. Tensors that share a
    storage count once, and the parameters do not count: they are there in any case.
    """

    def __init__(self, model):
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.kept = {}  # address of a storage -> its bytes
        self.peak = 0
        super().__init__(self.on_save, self.on_use)

    def on_save(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.kept[storage.data_ptr()] = storage.nbytes()
            self.peak = max(self.peak, sum(self.kept.values()))
        return tensor

    def on_use(self, tensor):
        # A backward pass has begun. All that was kept is free before the next micro-batch.
        self.kept = {}
        return tensor


def measure_peak(model, x, y, accum):
    """The most bytes that a step in accum micro-batches keeps at a time."""
    meter = MemoryMeter(model)
    with meter:
        compute_gradient(model, x, y, accum)
    return meter.peak


def time_step(model, x, y, repeats, accum=1, autocast=nullcontext):
    """The milliseconds of forward and backward: the best of some runs, since noise only adds.

    The first run warms up. If it takes more than 2 s, warming up does not matter and it is the only
    one: a CPU without bf16 units can take very long.
    """
    milliseconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        compute_gradient(model, x, y, accum, autocast)
        if x.is_cuda:
            torch.cuda.synchronize()
        milliseconds.append(1000 * (time.perf_counter() - start))
        if milliseconds[0] > 2000:
            break
    return min(milliseconds[1:] or milliseconds)


def draw(title, sizes, memory, step_ms, path):
    """Memory and time of a step over the number of sequences in a micro-batch."""
    fig, (left, right) = figure(title, "sequences in a micro-batch", columns=2)
    left.loglog(sizes, memory, "o-", base=2)
    left.set_ylabel("kept for the backward pass, at most (MiB)")
    right.semilogx(sizes, step_ms, "o-", base=2)
    right.set(ylabel=f"time of a step of {sizes[0]} sequences (ms)", ylim=(0, None))
    save_figure(fig, path)


def draw_bf16(title, widths, fp32_ms, bf16_ms, sequences, path):
    """The time of a step in both precisions over the width of the model."""
    fig, ax = figure(title, "width (channels)", f"time of a step of {sequences} sequences (ms)")
    ax.loglog(widths, fp32_ms, "o-", base=2, label="fp32")
    ax.loglog(widths, bf16_ms, "o-", base=2, label="bf16 autocast")
    ax.legend()
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    widths = parse_widths(cfg.widths)
    out = output_folder(cfg)

    # A batch of random tokens, and the numbers of micro-batches: 1, 2, 4, ..., batch_size.
    model = build_model(cfg, cfg.n_embd, device)
    x, y = torch.randint(256, (2, cfg.batch_size, cfg.block_size), device=device)
    accums = [2**i for i in range(cfg.batch_size.bit_length())]

    # The gradient stays the same.
    models = {"float32": model}
    if device.type != "mps":  # MPS has no float64
        models["float64"] = build_model(cfg, cfg.n_embd, device).double()
    differences = {}
    for name, copy in models.items():
        whole = flat_gradient(copy, x, y, accum=1)
        differences[name] = []
        for accum in accums[1:]:
            gradient = flat_gradient(copy, x, y, accum)
            differences[name].append(relative_difference(gradient, whole))
        largest = max(differences[name])
        print(f"{name}: micro-batches change the gradient by at most {largest:.1e} of its length")

    # The memory shrinks, and the time grows.
    memory = []
    step_ms = []
    for accum in accums:
        memory.append(measure_peak(model, x, y, accum) / 2**20)
        step_ms.append(time_step(model, x, y, cfg.repeats, accum))
        size = cfg.batch_size // accum
        print(
            f"{accum:3} micro-batches of {size:3}: {memory[-1]:8.2f} MiB, "
            f"{step_ms[-1]:7.1f} ms a step"
        )

    title = (
        f"A batch of {cfg.batch_size} in micro-batches of one: {memory[0] / memory[-1]:.0f} times "
        f"less kept, {step_ms[-1] / step_ms[0]:.1f} times the time,\nand the gradient changes "
        f"by {max(differences['float32']):.0e} of its length"
    )
    if "float64" in differences:
        title += f" (in float64 by {max(differences['float64']):.0e})"
    sizes = [cfg.batch_size // accum for accum in accums]
    draw(title, sizes, memory, step_ms, out / "demo_accumulation.png")

    # fp32 against bf16. A quarter of the batch is enough to see the effect of the width.
    quarter = max(1, cfg.batch_size // 4)
    bf16 = autocast_for(device, "bf16")
    fp32_ms = []
    bf16_ms = []
    for width in widths:
        model = build_model(cfg, width, device)
        fp32_ms.append(time_step(model, x[:quarter], y[:quarter], cfg.repeats))
        bf16_ms.append(time_step(model, x[:quarter], y[:quarter], cfg.repeats, autocast=bf16))
        print(
            f"width {width:4}: a step takes {fp32_ms[-1]:7.1f} ms in fp32, "
            f"{bf16_ms[-1]:7.1f} ms with bf16 autocast"
        )

    gain = [fp32 / half for fp32, half in zip(fp32_ms, bf16_ms)]
    title = (
        f"bf16 autocast: {gain[0]:.2f} times fp32's speed at width {widths[0]}, "
        f"{gain[-1]:.2f} at {widths[-1]}"
    )
    print(title)
    draw_bf16(title, widths, fp32_ms, bf16_ms, quarter, out / "demo_accumulation_bf16.png")

    save_metrics(
        out,
        name="demo_accumulation",
        micro_batches=accums,
        gradient_float32=differences["float32"],
        gradient_float64=differences.get("float64"),
        saved_mib=memory,
        step_ms=step_ms,
        widths=widths,
        ms_fp32=fp32_ms,
        ms_bf16=bf16_ms,
        bf16_gain=gain,
        seed=cfg.seed,
    )
