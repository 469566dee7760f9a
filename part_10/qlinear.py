"""
Part 10, small weights that are also fast: matrices of 8 or 4 bits, multiplied without unpacking.

    python part_10/qlinear.py                              SmolLM2 in 4 bits answers a question
    python part_10/qlinear.py --prompt="Why is the sky blue? Answer in one sentence."
    python part_10/qlinear.py --bits=8                     8 bits; 16: bf16; 32: as it is
    python part_10/qlinear.py --save=small.pt              write the small model to a file
    python part_10/qlinear.py --model=small.pt             and open this file
    python part_10/demo_speed.py                           how fast, how small and how good?

Starts here. model.py, tokenizer.py and compression.py are used as they are.

To write one token, a model reads every weight once and uses it for one multiplication. Fetching a
weight from memory takes longer than multiplying it. So at batch 1 the number of bytes limits how
fast a model writes, and a weight of 4 bits could be read eight times as fast as one of 32. This
works only if the matrix is never unpacked in memory. A kernel (the innermost loop of an operation,
written for one kind of processor) reads the packed bytes, and unpacks them in the processor's
registers. PyTorch has two such kernels for CPUs. This file prepares what they need:

    8 bits   w = scale * q                with one scale for each row, q from -127 to 127
    4 bits   w = zero + scale * (q - 8)   with one scale and one zero for each group of
                                          neighbouring weights of a row, q from 0 to 15

Both kernels are fast only if the inputs and the scales are bf16. With fp32 they run loops that the
compiler did not vectorize, and these are slower than a plain product in fp32. So QLinear rounds its
input to bf16 and gives back what it was given. Everything between the matrices stays in fp32.

Shapes: N outputs (rows), K inputs (columns), B batch, T time, V vocabulary.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import resource
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from compression import MODELS, load_model, matrices
from model import GPT, GPTConfig
from shared import (
    fail,
    load_checkpoint,
    output_folder,
    parse_args,
    save_checkpoint,
    save_metrics,
    set_seed,
)
from tokenizer import Tokenizer

GROUPS = (32, 64, 128, 256)  # the sizes of a group that the kernel for 4 bits knows


@dataclass
class Config:
    # model
    model: str = "smollm2"  # smollm2, base, or a checkpoint (also one that --save has written)
    bits: int = 4  # bits of a weight: 4, 8, 16 (bf16) or 32 (fp32, nothing changes)
    group: int = 64  # weights of a row that share a scale, with 4 bits: 32, 64, 128 or 256

    # bits of the head, if the other matrices have 4 or 8: 4, 8, or 32 to leave it as it is
    head_bits: int = 8

    # question
    prompt: str = "What is the capital of France?"  # question to the model; empty: none
    max_new_tokens: int = 60  # longest answer, in tokens
    # run
    threads: int = 1  # threads of the processor; 0: what torch chooses
    save: str = ""  # file to write the small model to; empty: none
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        check_sizes(Sizes(self.bits, self.group, self.head_bits))


class Sizes(NamedTuple):
    """How small the matrices of a model are: the three options of these names."""

    bits: int
    group: int
    head_bits: int


def check_sizes(sizes):
    """The conditions on the sizes, for two scripts."""
    assert sizes.bits in (4, 8, 16, 32), f"bits={sizes.bits} must be 4, 8, 16 or 32"
    assert sizes.head_bits in (4, 8, 32), f"head_bits={sizes.head_bits} must be 4, 8 or 32"
    assert sizes.group in GROUPS, f"group={sizes.group} must be one of {GROUPS}"


# rounding -----------------------------------------------------------------------------------------


def round_8_bits(weight):
    """A matrix (N, K) -> q (N, K) int8 and one scale for each row (N,) bf16; w is about scale * q.

    The largest absolute value of a row becomes 127 ("absmax"). The scale is rounded to bf16 before
    it is used, so that q fits the scale with which the kernel will multiply.
    """
    largest = weight.abs().amax(dim=1)  # (N,)
    scale = (largest / 127).bfloat16()
    divisor = scale.float().clamp(min=1e-30)  # a row of zeros stays a row of zeros
    q = (weight / divisor[:, None]).round().clamp(-127, 127)
    return q.to(torch.int8), scale


def round_4_bits(weight, group):
    """A matrix (N, K) -> q (N, K) int32 from 0 to 15, and scale and zero of each group,
    (N, K / group) each, bf16; w is about zero + scale * (q - 8).

    The smallest weight of a group becomes 0 and the largest 15.
    """
    grouped = weight.unflatten(1, (-1, group))  # (N, K / group, group)
    smallest = grouped.amin(dim=2)
    largest = grouped.amax(dim=2)

    # Here too, what follows uses the rounded numbers, because the kernel does.
    scale = ((largest - smallest) / 15).bfloat16()
    zero = (smallest + 8 * scale.float()).bfloat16()

    divisor = scale.float().clamp(min=1e-30)  # the scale of equal weights is 0
    q = (grouped - zero.float()[..., None]) / divisor[..., None] + 8
    q = q.round().clamp(0, 15).int()
    return q.flatten(1), scale, zero


# packing ------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How the kernel for 4 bits wants its bytes; it depends on the processor.

    The rows of a matrix are cut into blocks. A byte holds two weights of the same column: row i of
    the block in the lower four bits, and row i + distance in the upper four.
    """

    rows: int  # in a block
    distance: int  # between the two rows of a byte


# 64 rows fill four registers of AVX-512, and 32 rows four registers of AVX2. The last two are for
# processors without either: they put neighbouring rows together.
LAYOUTS = [Layout(64, 32), Layout(32, 16), Layout(32, 1), Layout(16, 1)]


def pack(q, layout):
    """q (N, K) from 0 to 15, N divisible by layout.rows -> bytes (N, K / 2), two weights in each.

    The kernel computes all rows of a block together. It walks over the columns, and for each of
    them it loads one weight of every row. So these come side by side in memory:

        block 0: column 0 of its rows, column 1 of its rows, ...; then block 1, ...

    With Layout(rows=4, distance=2) and the column [a, b, c, d] of a block, the two bytes are
    (c a) and (d b), the upper four bits written first. The shape (N, K / 2) only says how many
    bytes there are.
    """
    N, K = q.shape
    pairs = layout.rows // (2 * layout.distance)
    blocks = q.view(-1, pairs, 2, layout.distance, K)
    lower = blocks[:, :, 0]  # (blocks, pairs, distance, K)
    upper = blocks[:, :, 1]

    both = lower + 16 * upper
    columns_first = both.flatten(1, 2).transpose(1, 2)  # (blocks, K, rows / 2)
    return columns_first.to(torch.uint8).contiguous().view(N, K // 2)


def unpack(packed, layout):
    """The inverse of pack: bytes (N, K / 2) -> q (N, K)."""
    N = packed.size(0)
    K = 2 * packed.size(1)
    both = packed.view(-1, K, layout.rows // 2).transpose(1, 2)  # (blocks, rows / 2, K)
    both = both.unflatten(1, (-1, layout.distance))  # (blocks, pairs, distance, K)
    blocks = torch.stack([both % 16, both // 16], dim=2)  # (blocks, pairs, 2, distance, K)
    return blocks.reshape(N, K).int()


def find_layout():
    """The layout of this processor: the one with which pack gives the bytes that PyTorch gives."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(16, (64, 64), generator=generator, dtype=torch.int32)
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    for layout in LAYOUTS:
        if torch.equal(pack(q, layout), expected):
            return layout
    fail("PyTorch packs 4 bits on this processor in a way that qlinear.py does not know: --bits=8")


# the layer ----------------------------------------------------------------------------------------


def problem_with(in_features, bits, group):
    """Why the kernel cannot multiply a matrix with so many inputs; None if it can.

    The kernel for 8 bits reads 16 inputs at a time and does not look where the row ends: with
    another number of inputs it reads a wrong address and the whole program may crash.
    """
    if bits == 8 and in_features % 16 != 0:
        return f"{in_features} inputs are not divisible by 16"
    if bits == 4 and in_features % group != 0:
        return f"{in_features} inputs are not divisible by the group of {group}"
    return None


class QLinear(nn.Module):
    """A linear layer without bias whose weights have 8 or 4 bits, in the place of nn.Linear. It has
    no gradient: it is for models that are only used.

    packed and scales are buffers, so they are in the state_dict and no optimizer sees them:

               packed                       scales, bf16
    8 bits     (N, K) int8                  (N,)
    4 bits     (N padded, K / 2) uint8      (K / group, N padded, 2): scale and zero

    The number of rows is padded to full blocks with rows of zeros, and their outputs are cut off.
    """

    def __init__(self, in_features, out_features, bits, group, layout, device="cpu"):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group = group
        self.layout = layout
        if bits == 8:
            packed_shape = (out_features, in_features)
            scales_shape = (out_features,)
            dtype = torch.int8
        else:
            rows = out_features + -out_features % layout.rows
            packed_shape = (rows, in_features // 2)
            scales_shape = (in_features // group, rows, 2)
            dtype = torch.uint8
        packed = torch.empty(packed_shape, dtype=dtype, device=device)
        scales = torch.empty(scales_shape, dtype=torch.bfloat16, device=device)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)

    @torch.no_grad()
    def fill(self, weight):
        """Rounds a matrix (N, K), packs it and keeps it."""
        weight = weight.float()
        if self.bits == 8:
            q, scale = round_8_bits(weight)
            self.packed.copy_(q)
            self.scales.copy_(scale)
            return

        padding = len(self.packed) - len(weight)
        weight = F.pad(weight, (0, 0, 0, padding))
        q, scale, zero = round_4_bits(weight, self.group)
        scales = torch.stack([scale, zero], dim=2)  # (N padded, K / group, 2)
        self.packed.copy_(pack(q, self.layout))
        self.scales.copy_(scales.transpose(0, 1))

    def unpacked(self):
        """The matrix (N, K) that the kernel multiplies with, in fp32."""
        if self.bits == 8:
            return self.packed.float() * self.scales.float()[:, None]

        q = unpack(self.packed, self.layout)
        grouped = q.unflatten(1, (-1, self.group)).float()  # (N padded, K / group, group)
        scale, zero = self.scales.float().transpose(0, 1).unbind(dim=2)  # (N padded, K / group)
        weight = scale[..., None] * (grouped - 8) + zero[..., None]
        return weight.flatten(1)[: self.out_features]

    def forward(self, x):
        """x (..., K) -> (..., N), of x's dtype."""
        # The kernels want rows that lie one after the other in memory.
        rows = x.reshape(-1, self.in_features).bfloat16().contiguous()
        if self.bits == 8:
            y = torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.scales)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows, self.packed, self.group, self.scales
            )
            y = y[:, : self.out_features]
        return y.type_as(x).reshape(*x.shape[:-1], self.out_features)


class QEmbedding(nn.Module):
    """An embedding that reads its rows from the 8-bit matrix of a head. In a tied model both are
    the same matrix, so there is one copy of it in memory."""

    def __init__(self, head):
        super().__init__()
        self.register_buffer("packed", head.packed)
        self.register_buffer("scales", head.scales)

        # GPT.generate asks the embedding's weight which dtype the keys and values should have.
        self.register_buffer("weight", torch.empty(0), persistent=False)

    def forward(self, idx):
        """Token ids (B, T) -> (B, T, C) in fp32."""
        scale = self.scales[idx].float()
        return self.packed[idx].float() * scale[..., None]


# the model ----------------------------------------------------------------------------------------


def quantize_model(model, sizes, fill=True, layout=None):
    """Replaces the matrices of a GPT in its place by QLinear, with 8 or 4 bits. fill=False: the new
    layers stay without memory (on the device "meta"), because their content will be loaded. layout:
    that of the bytes with 4 bits; None: this processor's.

    -> {name: why} of the matrices that stay as they are, because the kernel cannot have them.
    """
    left = {}
    device = "cpu" if fill else "meta"
    bits_of = dict.fromkeys(matrices(model), sizes.bits)
    if sizes.head_bits != 32:
        bits_of["lm_head"] = sizes.head_bits

    # A layer of 8 bits has the same bytes on all processors.
    if layout is None and 4 in bits_of.values():
        layout = find_layout()

    for name, bits in bits_of.items():
        linear = model.get_submodule(name)
        problem = problem_with(linear.in_features, bits, sizes.group)
        if problem:
            left[name] = problem
            continue
        shape = (linear.in_features, linear.out_features)
        small = QLinear(*shape, bits, sizes.group, layout, device)
        if fill:
            small.fill(linear.weight)
        model.set_submodule(name, small)

    # From 4 bits the embedding cannot read a single row: a block of rows lies mixed in memory. Then
    # it keeps its own matrix.
    head = model.lm_head
    if model.cfg.tied and isinstance(head, QLinear) and head.bits == 8:
        model.wte = QEmbedding(head)
    return left


def make_small(model, sizes):
    """Gives a GPT these sizes, in its place -> {name: why} of the matrices that are left out."""
    model.requires_grad_(False)
    if sizes.bits == 16:
        model.bfloat16()
    if sizes.bits < 16:
        return quantize_model(model, sizes)
    return {}


def say_what_is_left(left):
    """One line for each reason why matrices were left out."""
    for reason in sorted(set(left.values())):
        names = [name for name, why in left.items() if why == reason]
        kinds = sorted({name.rpartition(".")[2] for name in names})
        print(f"{len(names)} matrices stay as they are, because {reason}: {', '.join(kinds)}")


# files --------------------------------------------------------------------------------------------


def save_small(path, model, tok, sizes):
    """Writes a model that make_small has changed. The layout of its bytes is written down, too,
    because another processor may want another one."""
    layout = find_layout() if 4 in (sizes.bits, sizes.head_bits) else LAYOUTS[0]
    save_checkpoint(
        path,
        kind="small",
        gpt_config=asdict(model.cfg),
        weights=model.state_dict(),
        tokenizer=tok.state(),
        sizes=sizes._asdict(),
        layout=layout._asdict(),
    )


def load_small(checkpoint):
    """What save_small wrote -> (model, tokenizer).

    On the device "meta" a tensor has a shape and no memory. So the large matrices are never made:
    the model takes the tensors of the file as its own. Two tensors that share their memory, like
    those of a tied embedding and head, do so in the file and behind it, too.
    """
    sizes = Sizes(**checkpoint["sizes"])
    with torch.device("meta"):
        model = GPT(GPTConfig(**checkpoint["gpt_config"]))
    layout_of_file = Layout(**checkpoint["layout"])
    if sizes.bits < 16:
        quantize_model(model, sizes, fill=False, layout=layout_of_file)
    model.load_state_dict(checkpoint["weights"], assign=True)

    for module in model.modules():
        if isinstance(module, QLinear) and module.bits == 4:
            change_layout(module, find_layout())
    return model.requires_grad_(False).eval(), Tokenizer.load(checkpoint["tokenizer"])


def change_layout(linear, layout):
    """Packs a layer again if its bytes came from a processor with another layout. Its blocks may
    have another number of rows, and so the matrix another number of padded ones."""
    if layout != linear.layout:
        q = unpack(linear.packed, linear.layout)[: linear.out_features]
        padding = -linear.out_features % layout.rows
        linear.packed = pack(F.pad(q, (0, 0, 0, padding)), layout)
        scales = linear.scales[:, : linear.out_features]
        linear.scales = F.pad(scales, (0, 0, 0, padding))
        linear.layout = layout


def open_model(name, sizes):
    """A model of MODELS or a checkpoint -> (model, tokenizer, sizes). What save_small has written
    keeps its own sizes."""
    if name not in MODELS:
        checkpoint = load_checkpoint(Path(name), None)
        if checkpoint["kind"] == "small":
            return *load_small(checkpoint), Sizes(**checkpoint["sizes"])

    model, tok = load_model(name, "cpu")
    say_what_is_left(make_small(model, sizes))
    return model, tok, sizes


# memory -------------------------------------------------------------------------------------------


def resident_memory():
    """The bytes of memory that this process occupies now. Where the system does not say (only Linux
    has /proc), the most that it has ever occupied."""
    path = Path("/proc/self/statm")
    if path.exists():
        pages = int(path.read_text().split()[1])
        return pages * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# main ---------------------------------------------------------------------------------------------


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(0)
    if cfg.threads > 0:
        torch.set_num_threads(cfg.threads)
    out = output_folder(cfg)

    before = resident_memory()
    sizes = Sizes(cfg.bits, cfg.group, cfg.head_bits)
    model, tok, sizes = open_model(cfg.model, sizes)
    if cfg.save:
        path = Path(cfg.save).expanduser().resolve()
        save_small(path, model, tok, sizes)
        print(f"wrote {path}, {path.stat().st_size / 1e6:.0f} MB")

    answer = ""
    n_tokens = 0
    seconds = 0.0
    if cfg.prompt:
        prompt = tok.chat_prompt(cfg.prompt)
        if len(prompt) >= model.cfg.block_size:
            fail(f"the prompt has {len(prompt)} tokens, the model reads {model.cfg.block_size}")

        # A stop of -1 is no token, so a base model writes on.
        stop = -1 if tok.end is None else tok.end
        start = time.time()
        ids = model.generate(torch.tensor([prompt]), cfg.max_new_tokens, temperature=0, stop=stop)
        seconds = time.time() - start
        n_tokens = ids.size(1) - len(prompt)
        answer = tok.decode(ids[0, len(prompt) :].tolist())
        print(f"> {cfg.prompt}")
        print(answer)
        print(f"{n_tokens} tokens, {n_tokens / seconds:.1f} per second with {sizes.bits} bits")

    after = resident_memory()
    print(
        f"memory: {after / 1e6:.0f} MB, of which Python and PyTorch had {before / 1e6:.0f} MB "
        "before the model"
    )
    save_metrics(
        out,
        "qlinear",
        bits=sizes.bits,
        answer=answer,
        tokens=n_tokens,
        seconds=seconds,
        memory=after,
        memory_before=before,
    )
