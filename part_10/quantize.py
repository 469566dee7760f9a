"""
Part 10: quantization. A weight of 32 bits is rounded to one of a few levels: 256, 16, 8 or 4. How
many levels does a model need, where should they lie, and what can be done about the errors?

    python part_10/quantize.py                    the table: all methods on both models, 10 minutes
                                                  of processor time
    python part_10/quantize.py --model=base       only our model of Part 4, half a minute
    python part_10/quantize.py --model=smollm2 --method=gptq --bits=3 --group=64
                                                  one setting on the real model
    python part_10/quantize.py --model=base --method=round --bits=2 --per_row
    python part_10/quantize.py --model=my.pt --method=nf4 --save
                                                  a model of your own, measured on Python's
                                                  documentation; the packed file is kept

Starts here. The models and the texts are those of compression.py.

A group of weights shares a scale s and a zero point z. The code of a weight w is a small integer
c = round(w / s) + z, and what the model computes with afterwards is (c - z) s. The methods:

    absmax       the levels are symmetric around 0, the largest |w| gets the last one
    round        the levels reach from the smallest weight to the largest
    nf4          16 levels that lie closer together where normally distributed weights are dense
    gptq         column after column; the columns to the right make up for the error of each
    awq          input channels with large activations get finer levels
    w8a8         8 bits for the weights and for the activations
    smoothquant  the same, after the outliers of the activations have been moved to the weights

The matrices of the blocks are quantized. The embedding, the head and the norms stay as they are.
To measure the loss, the rounded weights are put back into the model as 32-bit numbers: this shows
what is lost, and not what is gained in speed. The size is real: codes, scales and zero points are
packed into bytes and written to a file.

Shapes: R rows (outputs) and C columns (input channels) of a matrix, G groups in a row, N inputs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import re
import time
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from compression import (
    MODELS,
    InputStatistics,
    Rows,
    load_model,
    load_texts,
    matrices,
    watch_inputs,
)
from shared import (
    COLOURS,
    fail,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    save_checkpoint,
    save_figure,
    save_metrics,
)

METHODS = ("absmax", "round", "nf4", "gptq", "awq", "w8a8", "smoothquant")
WITH_ACTIVATIONS = ("w8a8", "smoothquant")  # these quantize the activations, too

# These matrices have the same input as another one, so its statistics need to be taken only once.
SAME_INPUT = {"attn.c_k": "attn.c_q", "attn.c_v": "attn.c_q", "mlp.c_fc": "mlp.c_gate"}

DAMPING = 0.01  # of GPTQ, as a share of the mean diagonal of the Hessian
LAZY_COLUMNS = 128  # GPTQ updates the columns to the right after so many columns
ALPHAS = [i / 10 for i in range(11)]  # the exponents that AWQ tries
BASE_ROWS = 16  # base's rows are short documents, so it gets so many times as many of them


@dataclass
class Config:
    # what is quantized
    # base, smollm2 or the path of a checkpoint, which is measured on Python's documentation; empty:
    # base and smollm2
    model: str = ""

    method: str = ""  # absmax, round, nf4, gptq, awq, w8a8 or smoothquant; empty: all settings
    bits: int = 4  # bits of a code, from 2 to 8
    group: int = 64  # neighbouring weights of a row that share a scale and a zero point
    per_row: bool = False  # all weights of a row share them, whatever the group is
    act_order: bool = False  # gptq: quantize the columns with the largest inputs first
    activations: str = "token"  # w8a8, smoothquant: one scale for each token, or for the tensor
    migration: float = 0.5  # smoothquant: how much of the outliers moves to the weights (alpha)
    # texts
    rows: int = 16  # rows of 256 tokens for calibration; 16 times as many, but shorter, for base
    held_out: int = 16  # rows on which the loss is measured; 16 times as many for base
    block_size: int = 256  # tokens in a row
    # run
    save: bool = False  # keep the packed files; otherwise they are deleted once they are measured
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.method in ("", *METHODS), (
            f"method={self.method} must be one of {', '.join(METHODS)}"
        )
        assert 2 <= self.bits <= 8, f"bits={self.bits} must be from 2 to 8"
        assert self.method != "nf4" or self.bits == 4, "method=nf4 has 4 bits: give --bits=4"
        assert self.method not in WITH_ACTIVATIONS or self.bits == 8, (
            f"method={self.method} has 8 bits: give --bits=8"
        )
        assert self.held_out > 1, (
            f"held_out={self.held_out} must be at least 2: the rows say how much is chance"
        )
        assert self.activations in ("token", "tensor"), (
            f"activations={self.activations} must be token or tensor"
        )


# levels -------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """The levels to which the weights of each group are rounded."""

    # One number for each group, (R, G). The scale is one that 16 bits can hold, because it is
    # stored with 16 bits.
    scale: torch.Tensor

    # The code that stands for 0. (R, G), or None if it is the same one in all groups.
    zero: torch.Tensor

    bits: int
    group: int  # columns in a group; the last group of a row may have fewer

    # "minmax" (uniform, with a zero point), "absmax" (uniform and symmetric) or "nf4"
    kind: str


def by_groups(w, group):
    """(R, C) -> (R, G, group). A last group that is not full is filled up with zeros, which change
    neither the largest |w| nor a smallest and a largest value that include 0."""
    missing = -w.size(1) % group
    return F.pad(w, (0, missing)).unflatten(1, (-1, group))


def storable(scale):
    """The nearest scale that fits into 16 bits. A group of zeros gets the scale 1."""
    scale = scale.half().float()
    return torch.where(scale > 0, scale, 1.0)


def absmax_grid(w, bits, group):
    """Symmetric levels -m s, ..., 0, ..., m s, with m = 2^(bits - 1) - 1 (127 for 8 bits)."""
    largest = by_groups(w, group).abs().amax(dim=2)  # (R, G)
    scale = largest / (2 ** (bits - 1) - 1)
    return Grid(storable(scale), None, bits, group, "absmax")


def minmax_grid(w, bits, group):
    """Levels from the smallest weight of a group to the largest. 0 is always one of them."""
    groups = by_groups(w, group)
    low = groups.amin(dim=2).clamp(max=0)  # (R, G)
    high = groups.amax(dim=2).clamp(min=0)
    last_code = 2**bits - 1
    scale = storable((high - low) / last_code)
    zero = (-low / scale).round().clamp(0, last_code)
    return Grid(scale, zero, bits, group, "minmax")


def nf4_levels():
    """The 16 levels of NF4 (Dettmers et al. 2023, QLoRA, appendix E) -> (16,), from -1 to 1.

    They are quantiles of the normal distribution. Sixteen levels could be eight negative and eight
    positive ones, but then 0 would not be among them. So there are 7 negative levels, the 0, and 8
    positive ones. The offset is that of bitsandbytes: the outermost quantile cannot be that of
    probability 1, which is infinite.
    """
    offset = 0.9677083
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(offset, 0.5, 9).tolist()[:-1]]
    negative = [-quantile(p) for p in torch.linspace(offset, 0.5, 8).tolist()[:-1]]
    levels = torch.tensor(negative + [0.0] + positive).sort().values
    return levels / levels.max()


def nf4_grid(w, group):
    """NF4's levels times the largest |w| of each group."""
    largest = by_groups(w, group).abs().amax(dim=2)
    return Grid(storable(largest), None, 4, group, "nf4")


def spread(per_group, grid, C):
    """One number for each group (R, G) -> the number of each weight's group (R, C), or (R, 1) if
    there is only one group."""
    if per_group.size(1) == 1:
        return per_group
    group_of_column = torch.arange(C, device=per_group.device) // grid.group
    return per_group[:, group_of_column]


def zero_of(grid, C):
    """The code that stands for 0, for each weight or for all of them."""
    if grid.zero is None:
        return 2 ** (grid.bits - 1) - 1
    return spread(grid.zero, grid, C)


def encode(w, grid):
    """Weights (R, C) -> the codes of their nearest levels, (R, C) uint8."""
    C = w.size(1)
    scaled = w / spread(grid.scale, grid, C)
    if grid.kind == "nf4":
        levels = nf4_levels().to(w.device)
        midpoints = (levels[1:] + levels[:-1]) / 2
        return torch.bucketize(scaled, midpoints).to(torch.uint8)
    codes = scaled.round() + zero_of(grid, C)
    return codes.clamp(0, 2**grid.bits - 1).to(torch.uint8)


def decode(codes, grid):
    """Codes (R, C) -> the weights for which they stand, (R, C)."""
    C = codes.size(1)
    if grid.kind == "nf4":
        units = nf4_levels().to(codes.device)[codes.long()]
    else:
        units = codes.float() - zero_of(grid, C)
    return units * spread(grid.scale, grid, C)


# a quantized matrix -------------------------------------------------------------------------------


class Quantized(NamedTuple):
    """A matrix with R rows and C columns."""

    codes: torch.Tensor  # (R, C) uint8
    grid: Grid

    # The columns were multiplied by these numbers before they were rounded; (C,) or None.
    channel_scale: torch.Tensor = None

    # Column i of the codes is column order[i] of the matrix; (C,) or None.
    order: torch.Tensor = None


def weight_of(quantized):
    """The rounded weights, (R, C)."""
    w = decode(quantized.codes, quantized.grid)
    if quantized.order is not None:
        w = w[:, quantized.order.argsort()]
    if quantized.channel_scale is not None:
        w = w / quantized.channel_scale
    return w


def quantize_round(w, grid):
    """Each weight goes to its nearest level, independently of all others."""
    return Quantized(encode(w, grid), grid)


def output_error(delta, gram, count):
    """The mean squared error of an output if the weights are wrong by delta (R, C).

    gram is the sum of x x^T over count inputs, (C, C). For one row d of delta the error of the
    output is d x, so the sum of its squares is d gram d^T.
    """
    return ((delta @ gram) * delta).sum() / (count * len(delta))


# GPTQ ---------------------------------------------------------------------------------------------


def inverse_factor(hessian):
    """The upper triangular U with U^T U = inverse of the damped Hessian, (C, C).

    In 64 bits: the Hessian of a layer with outliers is badly conditioned.
    """
    damped = hessian.cpu().double()  # some GPUs have no 64 bits
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float().to(hessian.device)


def quantize_gptq(w, gram, count, bits, group, act_order=False):
    """GPTQ (Frantar et al. 2022, algorithm 1) -> Quantized.

    Rounding minimises the error of each weight. GPTQ minimises the error of the outputs, which are
    sums over the columns. The columns are rounded from left to right. What one column gets wrong
    can be made up for by the columns to its right if their inputs are correlated with its own. With
    H = 2 / N sum x x^T the best way to do this is known in closed form (equation 2 of the paper):

        e = (w_j - rounded w_j) / U_jj        w_k -= e U_jk  for all k > j

    gram is the sum of x x^T, (C, C). The levels of a group are chosen when its first column is
    reached, from the weights as they are then. For group = C they are chosen before the start.
    act_order: the columns with the largest inputs first, while there are many others left that can
    make up for their errors.
    """
    R, C = w.shape
    w = w.clone()
    hessian = 2 / count * gram

    # A channel that is always 0 says nothing about its weights. They are of no use, either.
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    w[:, dead] = 0

    order = None
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        w = w[:, order]
        hessian = hessian[order][:, order]

    U = inverse_factor(hessian)
    row_grid = minmax_grid(w, bits, C)
    step = group if group < C else LAZY_COLUMNS
    codes = []
    grids = []
    for start in range(0, C, step):
        part = w[:, start : start + step]  # the weights to round next: a view, not a copy
        n = part.size(1)
        end = start + n
        grid = minmax_grid(part, bits, n) if group < C else row_grid
        grids.append(grid)

        # Inside the part each column is corrected at once.
        errors = []
        for j in range(n):
            column = part[:, j : j + 1]  # (R, 1)
            code = encode(column, grid)
            error = (column - decode(code, grid)) / U[start + j, start + j]
            part[:, j + 1 :] -= error * U[start + j, start + j + 1 : end]
            codes.append(code)
            errors.append(error)

        # The columns behind it need the sum of all corrections only when their turn comes.
        w[:, end:] -= torch.cat(errors, dim=1) @ U[start:end, end:]

    grid = row_grid
    if group < C:
        scale = torch.cat([part_grid.scale for part_grid in grids], dim=1)
        zero = torch.cat([part_grid.zero for part_grid in grids], dim=1)
        grid = Grid(scale, zero, bits, group, "minmax")
    return Quantized(torch.cat(codes, dim=1), grid, order=order)


# AWQ and SmoothQuant ------------------------------------------------------------------------------


def awq_scale(absolute_mean, alpha):
    """s = mean|x|^alpha for each channel (C,), with a geometric middle of 1.

    A constant factor would change nothing but the size of the numbers.
    """
    s = absolute_mean.clamp(min=1e-4) ** alpha
    s = s / (s.max() * s.min()).sqrt()
    return s.half().float()  # stored in 16 bits


def quantize_awq(w, statistics, bits, group):
    """AWQ (Lin et al. 2023, section 3.2) -> Quantized.

    W x = (W s) (x / s) for any scale s > 0 of the channels. If a column is multiplied by more than
    the others of its group, its rounding error counts less after the division. So channels with
    large inputs get a large s. How large is tried out: of all alphas the one with the smallest
    error of the outputs is taken. alpha = 0 is plain rounding.

    Usually 1/s is folded into the operation before the matrix, such as the gain of a norm. Here s
    is stored with the matrix and counts in its size, and the weights that compute are Q(W s) / s.
    """
    best = None
    best_error = math.inf
    for alpha in ALPHAS:
        s = awq_scale(statistics.absolute_mean, alpha)
        scaled = w * s
        grid = minmax_grid(scaled, bits, group)
        candidate = Quantized(encode(scaled, grid), grid, channel_scale=s)
        delta = weight_of(candidate) - w
        error = output_error(delta, statistics.gram, statistics.count).item()
        if error < best_error:
            best = candidate
            best_error = error
    return best


def smooth_scale(x_max, w, migration):
    """SmoothQuant (Xiao et al. 2022, equation 4): s_j = max|x_j|^a / max|w_j|^(1 - a), (C,).

    The inputs are divided by s and the columns of the weights are multiplied by it. With a = 1/2
    both then have the same largest value in each channel. x_max is the largest |x| of the channels.
    """
    w_max = w.abs().amax(dim=0)
    s = x_max.clamp(min=1e-5) ** migration / w_max.clamp(min=1e-5) ** (1 - migration)
    return s.clamp(max=60_000).half().float()  # 16 bits hold numbers up to 65,504


def round_activations(x, largest):
    """Activations rounded to 8 bits, symmetrically. largest: the |x| that gets the code 127, for
    all of them or for each token, (..., 1)."""
    scale = (largest / 127).clamp(min=1e-12)
    return (x / scale).round().clamp(-127, 127) * scale


class QuantizedLinear(nn.Module):
    """A matrix whose inputs are rounded to 8 bits before it is applied.

    largest: None for one scale per token, from the token itself; or the largest |x / s| of the
    calibration text for one scale of the whole tensor, which has to be known in advance.
    """

    def __init__(self, weight, channel_scale, largest):
        super().__init__()
        self.register_buffer("weight", weight)  # (R, C), the rounded W s
        self.register_buffer("channel_scale", channel_scale)  # (C,)
        self.register_buffer("largest", largest)

    def forward(self, x):
        x = x / self.channel_scale
        largest = self.largest
        if largest is None:
            largest = x.abs().amax(dim=-1, keepdim=True)
        return F.linear(round_activations(x, largest), self.weight)


# on disk ------------------------------------------------------------------------------------------


def pack_bits(codes, bits):
    """Codes of any shape -> bytes without gaps, (ceil(n * bits / 8),) uint8."""
    places = torch.arange(bits, dtype=torch.uint8)
    single_bits = (codes.cpu().flatten()[:, None] >> places) & 1  # (n, bits)
    single_bits = single_bits.flatten()
    missing = -len(single_bits) % 8  # bits up to the next full byte
    single_bits = F.pad(single_bits, (0, missing)).view(-1, 8)
    values = single_bits << torch.arange(8, dtype=torch.uint8)
    return values.sum(dim=1).to(torch.uint8)


def unpack_bits(packed, bits, shape):
    """The inverse of pack_bits."""
    single_bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    n = math.prod(shape)
    single_bits = single_bits.flatten()[: n * bits].view(n, bits)
    values = single_bits << torch.arange(bits, dtype=torch.uint8)
    return values.sum(dim=1).to(torch.uint8).view(shape)


def pack(quantized):
    """A quantized matrix as it is stored -> a dict of tensors and numbers."""
    grid = quantized.grid
    packed = {
        "codes": pack_bits(quantized.codes, grid.bits),
        "scale": grid.scale.half().cpu(),
        "shape": list(quantized.codes.shape),
        "bits": grid.bits,
        "group": grid.group,
        "kind": grid.kind,
    }
    if grid.zero is not None:
        packed["zero"] = pack_bits(grid.zero.to(torch.uint8), grid.bits)
    if quantized.channel_scale is not None:
        packed["channel_scale"] = quantized.channel_scale.half().cpu()
    if quantized.order is not None:
        packed["order"] = quantized.order.short().cpu()
    return packed


def unpack(packed):
    """What pack wrote -> Quantized."""
    bits = packed["bits"]
    scale = packed["scale"].float()
    zero = None
    if "zero" in packed:
        zero = unpack_bits(packed["zero"], bits, scale.shape).float()
    grid = Grid(scale, zero, bits, packed["group"], packed["kind"])

    channel_scale = None
    if "channel_scale" in packed:
        channel_scale = packed["channel_scale"].float()
    order = None
    if "order" in packed:
        order = packed["order"].long()
    codes = unpack_bits(packed["codes"], bits, packed["shape"])
    return Quantized(codes, grid, channel_scale, order)


def bits_per_weight(packed):
    """All that is stored of some matrices, in bits, for each of their weights.

    packed is {name: what pack returned}. This counts codes, scales, zero points and so on, but not
    the names and the frame of the file."""
    n_bytes = 0
    n_weights = 0
    for matrix in packed.values():
        n_weights += math.prod(matrix["shape"])
        for value in matrix.values():
            if isinstance(value, torch.Tensor):
                n_bytes += value.numel() * value.element_size()
    return 8 * n_bytes / n_weights


def load_packed(path):
    """A file that --save has kept -> {name: the rounded weights}."""
    packed = load_checkpoint(path, "quantized")["matrices"]
    return {name: weight_of(unpack(matrix)) for name, matrix in packed.items()}


# a whole model ------------------------------------------------------------------------------------


class Setting(NamedTuple):
    method: str
    bits: int
    group: int = 0  # 0: the whole row
    act_order: bool = False  # gptq
    activations: str = ""  # w8a8, smoothquant: "token" or "tensor"
    migration: float = 0.5  # smoothquant


def label_of(setting):
    """A setting in words, for example "gptq, 3 bits, groups of 64"."""
    groups = f"groups of {setting.group}" if setting.group else "per row"
    label = f"{setting.method}, {setting.bits} bits, {groups}"
    if setting.act_order:
        label += ", act-order"
    if setting.activations:
        label += f", activations per {setting.activations}"
    return label


def input_name(name):
    """The matrix whose statistics hold for this one: h.0.attn.c_k -> h.0.attn.c_q."""
    _, layer, matrix = name.split(".", 2)
    return f"h.{layer}.{SAME_INPUT.get(matrix, matrix)}"


def distinct_inputs(model):
    """The names of the matrices of which none has the input of another one."""
    return {input_name(name) for name in matrices(model)}


def quantize_matrix(w, setting, statistics):
    """One matrix (R, C), for all methods in which the matrices do not depend on one another."""
    C = w.size(1)
    group = setting.group if setting.group else C
    if setting.method == "awq":
        return quantize_awq(w, statistics, setting.bits, group)
    if setting.method == "smoothquant":
        s = smooth_scale(statistics.absolute_max, w, setting.migration)
        scaled = w * s
        grid = absmax_grid(scaled, setting.bits, group)
        return Quantized(encode(scaled, grid), grid, channel_scale=s)
    if setting.method == "round":
        return quantize_round(w, minmax_grid(w, setting.bits, group))
    if setting.method == "nf4":
        return quantize_round(w, nf4_grid(w, group))
    return quantize_round(w, absmax_grid(w, setting.bits, group))


@torch.no_grad()
def quantize_in_sequence(model, setting, rows):
    """GPTQ on a whole model, block after block -> {name: Quantized}. The model's weights are
    replaced by the rounded ones.

    The inputs of a block are computed with the blocks before it already rounded, so a block also
    makes up for the errors of those before it.
    """
    device = model.wte.weight.device
    counts = rows.targets.to(device) >= 0  # (N, T), what is not padding
    mask, cos, sin = model.positions(rows.idx.size(1), None, device)
    x = model.wte(rows.idx.to(device))  # (N, T, C)

    quantized = {}
    for layer, block in enumerate(model.h):
        linears = {}
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                linears[f"h.{layer}.{name}"] = module
        statistics = watch_block(block, linears, x, counts, mask, cos, sin)

        for name, linear in linears.items():
            seen = statistics[input_name(name)]
            group = setting.group if setting.group else linear.in_features
            result = quantize_gptq(
                linear.weight, seen.gram, seen.count, setting.bits, group, setting.act_order
            )
            linear.weight.data = weight_of(result)
            quantized[name] = result
        x = torch.cat([block(part, mask, cos, sin, None) for part in x.split(8)])
    return quantized


def watch_block(block, linears, x, counts, mask, cos, sin):
    """What flows into the matrices of one block -> {name: InputStatistics}. linears is {name:
    nn.Linear}, x (N, T, C) are the inputs of the block, counts (N, T) is False for padding."""
    statistics = {}
    hooks = []
    current = None  # the counts of the current batch; the hooks read what the loop below sets

    def watch(name):
        def hook(module, inputs):
            statistics[name].add(inputs[0][current])

        return hook

    for name in {input_name(name) for name in linears}:
        statistics[name] = InputStatistics(linears[name].in_features, x.device)
        hooks.append(linears[name].register_forward_pre_hook(watch(name)))
    for part, current in zip(x.split(8), counts.split(8)):
        block(part, mask, cos, sin, None)
    for hook in hooks:
        hook.remove()
    return statistics


@torch.no_grad()
def quantize_model(model, setting, rows, statistics):
    """Replaces the matrices of a model by quantized ones -> {name: Quantized}.

    rows are the calibration text and statistics what watch_inputs saw in it. Only GPTQ, AWQ,
    SmoothQuant, and activations with one scale per tensor look at them.
    """
    if setting.method == "gptq":
        return quantize_in_sequence(model, setting, rows)

    quantized = {}
    for name, linear in matrices(model).items():
        seen = statistics.get(input_name(name))
        result = quantize_matrix(linear.weight, setting, seen)
        quantized[name] = result
        if setting.method not in WITH_ACTIVATIONS:
            linear.weight.data = weight_of(result)
            continue

        s = result.channel_scale
        if s is None:
            s = torch.ones(linear.in_features, device=linear.weight.device)
        largest = None
        if setting.activations == "tensor":
            largest = (seen.absolute_max / s).max()
        replace(model, name, QuantizedLinear(decode(result.codes, result.grid), s, largest))
    return quantized


def replace(model, name, module):
    """Puts a module in the place of the one with this name, such as "h.0.attn.c_q"."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class Originals(NamedTuple):
    """What is needed to undo a quantization."""

    linears: dict  # {name: nn.Linear}
    weights: dict  # {name: its weights}


def remember(model):
    linears = matrices(model)
    weights = {name: linear.weight.data for name, linear in linears.items()}
    return Originals(linears, weights)


def restore(model, originals):
    for name, linear in originals.linears.items():
        linear.weight.data = originals.weights[name]
        replace(model, name, linear)


# measure ------------------------------------------------------------------------------------------


@torch.no_grad()
def row_losses(model, rows, batch_size=8):
    """The sum of the losses of each row in nats, (N,). mean_loss of compression.py is their sum,
    divided by the number of targets. Here the rows are kept apart, to know how much is chance."""
    device = model.wte.weight.device
    sums = []
    for start in range(0, len(rows.idx), batch_size):
        idx = rows.idx[start : start + batch_size].to(device)
        targets = rows.targets[start : start + batch_size].to(device)
        logits, _ = model(idx)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        sums.append(losses.sum(dim=1).cpu())
    return torch.cat(sums)


def mean_and_error(sums, counts):
    """The sums of the losses of N rows and their numbers of tokens, (N,) each -> the mean per token
    and its standard error over the rows (that of a ratio: a long row may lose more)."""
    n_tokens = counts.sum().item()
    mean = sums.sum().item() / n_tokens
    error = (sums - mean * counts).std().item() * math.sqrt(len(sums)) / n_tokens
    return {"mean": mean, "error": error}


def measure(model, setting, texts, statistics, path, keep):
    """Quantizes the model, measures it and restores it -> the results as a dict.

    path: where the packed matrices are written; keep: whether the file stays.
    """
    originals = remember(model)
    start = time.process_time()
    quantized = quantize_model(model, setting, texts.calibration, statistics)
    seconds = time.process_time() - start

    sums = row_losses(model, texts.held_out)
    restore(model, originals)

    packed = {name: pack(matrix) for name, matrix in quantized.items()}
    save_checkpoint(path, kind="quantized", setting=setting._asdict(), matrices=packed)
    n_bytes = path.stat().st_size
    if not keep:
        path.unlink()
    return {
        "setting": setting,
        "sums": sums,
        "bits_per_weight": bits_per_weight(packed),
        "bytes": n_bytes,
        "seconds": seconds,
    }


def settings_of(cfg, name):
    """The settings to measure on a model -> a list of Setting."""
    if cfg.method:
        group = 0 if cfg.per_row or cfg.method in WITH_ACTIVATIONS else cfg.group
        activations = cfg.activations if cfg.method in WITH_ACTIVATIONS else ""
        act_order = cfg.act_order and cfg.method == "gptq"
        return [Setting(cfg.method, cfg.bits, group, act_order, activations, cfg.migration)]

    settings = [Setting("absmax", 8), Setting("absmax", 4, 64), Setting("nf4", 4, 64)]
    settings.append(Setting("round", 4))
    for bits in (4, 3):
        for method in ("round", "awq", "gptq"):
            settings.append(Setting(method, bits, 64))

    # On the real model each setting takes half a minute of processor time, on others a second.
    if name != "smollm2":
        for group in (0, 32, 128):
            settings.append(Setting("round", 3, group))
        settings.append(Setting("gptq", 3))
        settings.append(Setting("gptq", 3, 64, act_order=True))
        for method in ("round", "awq", "gptq"):
            settings.append(Setting(method, 2, 64))

    for method in WITH_ACTIVATIONS:
        for activations in ("tensor", "token"):
            settings.append(Setting(method, 8, 0, False, activations, cfg.migration))
    return settings


# outliers -----------------------------------------------------------------------------------------


def largest_over_median(values):
    """How far does the largest channel stick out? Its value over that of the median channel."""
    return (values.max() / values.median()).item()


def over_median(values):
    """The values of all channels over that of the median channel, the largest first."""
    return (values / values.median()).sort(descending=True).values


def outliers(statistics):
    """The matrix of each kind whose inputs have the largest outlier -> {name: a dict}."""
    found = {}
    for name, seen in statistics.items():
        kind = name.split(".", 2)[2]
        ratio = largest_over_median(seen.absolute_max)
        if kind in found and found[kind]["ratio"] >= ratio:
            continue
        found[kind] = {
            "name": name,
            "ratio": ratio,  # of the largest |x| of the channels
            "ratio_of_means": largest_over_median(seen.absolute_mean),
            "largest": seen.absolute_max.max().item(),
            "over_median": over_median(seen.absolute_max),
        }
    return {found[kind]["name"]: found[kind] for kind in sorted(found)}


class Token(NamedTuple):
    text: str
    position: int  # in its row
    largest: float  # the largest |x| of all channels


@torch.no_grad()
def heaviest_tokens(model, tok, rows, name, n=5):
    """The tokens at which the inputs of a matrix are largest -> (n Tokens, and the median over all
    tokens of the largest |x|). Are outliers the matter of a few tokens, or of all of them?"""
    seen = []
    hook = matrices(model)[name].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].abs().amax(dim=2))
    )
    model.trunk(rows.idx.to(model.wte.weight.device))
    hook.remove()

    counts = rows.targets >= 0  # (N, T)
    largest = seen[0].cpu().masked_fill(~counts, -1)
    n = min(n, counts.sum().item())
    found = []
    for place in largest.flatten().topk(n).indices.tolist():
        row, position = divmod(place, largest.size(1))
        text = tok.decode([rows.idx[row, position].item()])
        found.append(Token(text, position, largest[row, position].item()))
    return found, largest[counts].median().item()


def print_tokens(name, tokens, median):
    print(f"the tokens with the largest |x| in {name} (the median token has {median:.1f}):")
    for token in tokens:
        print(f"    {token.largest:8.1f}   position {token.position:3}   {token.text!r}")


def print_outliers(found):
    print("\nlargest |x| of a channel over that of the median channel, in the worst layer:")
    for name, outlier in found.items():
        print(
            f"    {name:18} {outlier['ratio']:7.1f}   the same with mean |x|:"
            f"{outlier['ratio_of_means']:7.1f}   largest |x|: {outlier['largest']:.1f}"
        )


def draw_outliers(results, path):
    """The channels of each matrix by their largest |x|, one panel for each model."""
    parts = []
    for name, result in results.items():
        worst = max(result["outliers"].values(), key=lambda outlier: outlier["ratio"])
        parts.append(f"{name} {worst['ratio']:.0f} times in {worst['name']}")
    title = "The largest channel over the median one:\n" + ", ".join(parts)

    fig, axes = figure(
        title, "rank of the channel", "largest |x| / median channel", columns=len(results)
    )
    axes = [axes] if len(results) == 1 else list(axes)
    for ax, (name, result) in zip(axes, results.items()):
        for (matrix, outlier), style in zip(result["outliers"].items(), ("-", "--", "-.", ":")):
            heights = outlier["over_median"].tolist()
            ranks = range(1, len(heights) + 1)
            ax.plot(ranks, heights, style, linewidth=2, label=matrix)
        ax.set(xscale="log", yscale="log", title=name)
        ax.legend(title="inputs of", fontsize=9)
    for ax in axes[1:]:
        ax.set_ylabel("")
    share_y_range(axes)
    save_figure(fig, path)


def share_y_range(axes):
    """The same range for the y axis of all panels."""
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, high)


# what came out ------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """What a paper, or this lesson, says: the first setting has a lower loss than the second."""

    text: str
    better: Setting
    worse: Setting


def claims_for(cfg):
    """The claims that the table can test -> a list of Claim."""
    claims = [Claim("NF4 below 4-bit absmax", Setting("nf4", 4, 64), Setting("absmax", 4, 64))]
    for bits in (4, 3, 2):
        for method in ("gptq", "awq"):
            better = Setting(method, bits, 64)
            text = f"{method} below rounding at {bits} bits"
            claims.append(Claim(text, better, Setting("round", bits, 64)))
    for activations in ("tensor", "token"):
        better = Setting("smoothquant", 8, 0, False, activations, cfg.migration)
        worse = Setting("w8a8", 8, 0, False, activations, cfg.migration)
        text = f"SmoothQuant below W8A8, one scale per {activations}"
        claims.append(Claim(text, better, worse))
    per_token = Setting("w8a8", 8, 0, False, "token", cfg.migration)
    per_tensor = Setting("w8a8", 8, 0, False, "tensor", cfg.migration)
    claims.append(Claim("W8A8 per token below per tensor", per_token, per_tensor))
    return claims


def verdict(difference):
    """difference: mean and standard error of the better one's loss minus the worse one's."""
    if difference["mean"] < -2 * difference["error"]:
        return "came out"
    if difference["mean"] > 2 * difference["error"]:
        return "the opposite came out"
    return "no difference"


def check_claims(claims, measured, counts):
    """Compares settings on the same rows -> a list of dicts. measured is {Setting: result}. Claims
    of which a setting was not measured are left out."""
    tested = []
    for claim in claims:
        if claim.better not in measured or claim.worse not in measured:
            continue
        sums = measured[claim.better]["sums"] - measured[claim.worse]["sums"]
        difference = mean_and_error(sums, counts)
        tested.append({"claim": claim.text, **difference, "verdict": verdict(difference)})
    return tested


def run_model(name, cfg, device, out):
    """Measures all settings on one model, and prints them -> a dict."""
    model, tok = load_model(name, device)
    times = BASE_ROWS if name == "base" else 1
    texts = load_texts(name, model, tok, cfg.block_size, times * cfg.rows, times * cfg.held_out)
    counts = (texts.held_out.targets >= 0).sum(dim=1)  # (N,), the tokens of each row
    n_targets = counts.sum().item()

    start = time.process_time()
    statistics = watch_inputs(model, texts.calibration, distinct_inputs(model))
    seconds_to_watch = time.process_time() - start

    short_name = Path(name).stem
    n_weights = sum(linear.weight.numel() for linear in matrices(model).values())
    plain = row_losses(model, texts.held_out)
    loss = mean_and_error(plain, counts)
    print(
        f"\n{short_name}: {n_weights:,} weights in matrices of blocks, {4 * n_weights:,} bytes\n"
        f"{loss['mean']:.4f} nats per token in fp32, on {n_targets:,} held-out tokens in "
        f"{len(plain)} rows (standard error {loss['error']:.4f})"
    )
    if texts.entropy is not None:
        print(f"the true entropy is {texts.entropy:.4f}")
    print(f"{seconds_to_watch:.1f} s of processor time to watch the calibration text\n")
    print(
        f"{'':52}{'nats':>8}  {'more than fp32':18}{'bits/weight':>11}{'bytes':>13}{'seconds':>9}"
    )

    measured = {}
    for setting in settings_of(cfg, name):
        label = label_of(setting)
        file_name = re.sub(r"\W+", "_", f"quantize {short_name} {label}")
        path = out / f"{file_name}.pt"
        result = measure(model, setting, texts, statistics, path, cfg.save)
        result["label"] = label
        result["nats"] = result["sums"].sum().item() / n_targets
        result["more"] = mean_and_error(result["sums"] - plain, counts)
        measured[setting] = result
        print_result(result)

    tested = check_claims(claims_for(cfg), measured, counts)
    for claim in tested:
        print(f"    {claim['claim']}: {claim['verdict']} ({interval(claim)} nats)")
    found = outliers(statistics)
    print_outliers(found)

    # a few rows are enough to see which tokens they are
    worst = max(found.values(), key=lambda outlier: outlier["ratio"])["name"]
    few = Rows(texts.calibration.idx[: 4 * times], texts.calibration.targets[: 4 * times], 0)
    tokens, median = heaviest_tokens(model, tok, few, worst)
    print_tokens(worst, tokens, median)
    return {
        "fp32": loss,
        "entropy": texts.entropy,
        "n_targets": n_targets,
        "n_weights": n_weights,
        "seconds_to_watch": seconds_to_watch,
        "measured": measured,
        "claims": tested,
        "outliers": found,
        "heaviest_tokens": {"name": worst, "median": median, "tokens": tokens},
    }


def interval(difference):
    """A difference with its standard error in words: "+0.0123 +- 0.0045"."""
    return f"{difference['mean']:+.4f} +- {difference['error']:.4f}"


def print_result(result):
    print(
        f"{result['label']:52}{result['nats']:8.4f}  {interval(result['more']):18}"
        f"{result['bits_per_weight']:11.2f}{result['bytes']:13,}{result['seconds']:9.1f}",
        flush=True,
    )


def curves(measured):
    """{line: its settings} for the figure: one line for each method, and a second one for those
    that share a scale over the whole row. Activations are not in it."""
    if len(measured) == 1:
        setting = next(iter(measured))
        return {label_of(setting): [setting]}

    lines = {}
    for setting in measured:
        if setting.method in WITH_ACTIVATIONS or setting.act_order:
            continue
        if setting.group not in (0, 64):
            continue
        line = setting.method if setting.group else f"{setting.method}, per row"
        lines.setdefault(line, []).append(setting)
    return lines


MARKERS = {
    "absmax": "v",
    "round": "o",
    "nf4": "D",
    "gptq": "s",
    "awq": "^",
    "w8a8": "P",
    "smoothquant": "X",
}


def draw(results, path):
    """Nats above the loss in fp32 against effective bits, one panel for each model."""
    fig, axes = figure(
        curves_title(results), "effective bits per weight", "nats per token", columns=len(results)
    )
    axes = [axes] if len(results) == 1 else list(axes)
    for ax, (name, result) in zip(axes, results.items()):
        measured = result["measured"]
        for line, settings in curves(measured).items():
            settings = sorted(settings, key=lambda setting: setting.bits)
            method = settings[0].method
            bits = [measured[setting]["bits_per_weight"] for setting in settings]
            nats = [measured[setting]["nats"] for setting in settings]
            ax.plot(
                bits,
                nats,
                ":" if settings[0].group == 0 else "-",
                marker=MARKERS[method],
                color=COLOURS[list(MARKERS).index(method)],
                fillstyle="none" if settings[0].group == 0 else "full",
                label=line,
            )
        ax.axhline(result["fp32"]["mean"], color="black", linewidth=1, label="fp32")
        if result["entropy"] is not None:
            ax.axhline(result["entropy"], color="gray", linestyle="--", label="true entropy")
        ax.set(title=name)
        ax.legend(fontsize=9)
    for ax in axes[1:]:
        ax.set_ylabel("")
    save_figure(fig, path)


def curves_title(results):
    """The finding: what the methods lose at 3 bits, or if there are none, the smallest loss."""
    lines = []
    for name, result in results.items():
        parts = []
        for method in ("round", "awq", "gptq"):
            found = result["measured"].get(Setting(method, 3, 64))
            if found is not None:
                parts.append(f"{method} {found['more']['mean']:+.3f}")
        if parts:
            lines.append(f"{name}, 3 bits: " + ", ".join(parts))
        else:
            best = min(result["measured"].values(), key=lambda found: found["nats"])
            lines.append(f"{name}, {best['label']}: {best['more']['mean']:+.3f}")
    return "Nats per token above the loss in fp32\n" + "\n".join(lines)


def for_json(result):
    """The results of a model without Settings as keys."""
    measured = []
    for setting, found in result["measured"].items():
        measured.append({**found, "setting": setting._asdict()})
    return {**result, "measured": measured}


if __name__ == "__main__":
    cfg = parse_args(Config)
    for name in ("bits", "group", "per_row", "act_order", "activations", "migration"):
        if name in cfg.changed and not cfg.method:
            fail(f"--{name} belongs to one method: add --method")
    device = pick_device(cfg.device)
    out = output_folder(cfg)

    # base by its name, or a checkpoint by its path
    names = [cfg.model] if cfg.model else list(MODELS)
    results = {}
    for name in names:
        results[Path(name).stem] = run_model(name, cfg, device, out)

    saved = {name: for_json(result) for name, result in results.items()}
    save_metrics(out, name="quantize", results=saved)
    draw(results, out / "quantize.png")
    draw_outliers(results, out / "quantize_outliers.png")
