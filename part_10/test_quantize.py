"""
Tests of quantize.py. The oracles are loops over single weights, least squares for what GPTQ does to
the columns that are left, the numbers of bitsandbytes, and runs of the script.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.nn as nn

import quantize
from compression import InputStatistics, Rows, Texts, load_model, matrices, mean_loss, watch_inputs
from model import GPT, GPTConfig
from quantize import (
    Claim,
    QuantizedLinear,
    Setting,
    absmax_grid,
    awq_scale,
    bits_per_weight,
    check_claims,
    decode,
    distinct_inputs,
    encode,
    input_name,
    label_of,
    load_packed,
    mean_and_error,
    measure,
    minmax_grid,
    nf4_grid,
    nf4_levels,
    output_error,
    outliers,
    pack,
    pack_bits,
    quantize_awq,
    quantize_gptq,
    quantize_in_sequence,
    quantize_matrix,
    quantize_model,
    quantize_round,
    remember,
    restore,
    round_activations,
    row_losses,
    smooth_scale,
    unpack_bits,
    weight_of,
)
from shared import parse_args, save_checkpoint
from tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TOK = Tokenizer({**{bytes([i]): i for i in range(256)}, b"th": 256, b"the": 257})

# bitsandbytes 0.49, functional.create_normal_map(offset=0.9677083)
NF4 = """-1 -.696193 -.525073 -.394917 -.284441 -.184773 -.09105 0
    .07958 .16093 .246112 .337915 .44071 .562617 .722957 1"""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(N, C, seed=0):
    """Inputs whose channels are mixtures of a few common causes, (N, C)."""
    causes = random(N, C // 4, seed=seed)
    return causes @ random(C // 4, C, seed=seed + 1) + 0.3 * random(N, C, seed=seed + 2)


def statistics_of(x):
    seen = InputStatistics(x.size(1), x.device)
    seen.add(x)
    return seen


def make_model(seed=0, block_size=32):
    """A small model with random weights, also where a new model has zeros."""
    cfg = GPTConfig(TOK.vocab_size, block_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    model = GPT(cfg).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim == 2:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return model


def make_rows(N=12, T=10, seed=0):
    """Random tokens, of which the last ones of every second row are padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (N, T + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[::2, T - 3 :] = -100
    return Rows(ids[:, :-1], targets, 0)


# levels -------------------------------------------------------------------------------------------


def test_absmax_by_hand():
    w = torch.tensor([[-1.27, 0.5, 0.004, 0.006], [0.0, 2.54, -0.01, 1.0]])
    grid = absmax_grid(w, 8, 4)
    codes = encode(w, grid)
    assert (codes.int() - 127).tolist() == [[-127, 50, 0, 1], [0, 127, 0, 50]]
    torch.testing.assert_close(decode(codes, grid)[0, 1].item(), 0.5, atol=1e-3, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [4, 5, 100])
def test_rounding_against_loops(bits, group):
    """Groups of neighbouring weights of a row, and a last group with fewer than the others."""
    w = random(3, 13)
    w[1, :4] = w[1, :4].abs() + 1  # a group without a negative weight
    w[2, :5] = 0
    n = 2**bits - 1
    minmax = weight_of(quantize_round(w, minmax_grid(w, bits, group)))
    absmax = weight_of(quantize_round(w, absmax_grid(w, bits, group)))
    for r in range(3):
        for start in range(0, 13, group):
            part = w[r, start : start + group].tolist()
            low, high = min(*part, 0), max(*part, 0)
            scale = torch.tensor((high - low) / n).half().item() if high > low else 1.0
            zero = round(-low / scale)
            size = max(abs(value) for value in part)
            size = torch.tensor(size / (2 ** (bits - 1) - 1)).half().item() if size else 1.0
            for i, value in enumerate(part):
                code = min(max(round(value / scale) + zero, 0), n)
                assert minmax[r, start + i].item() == pytest.approx((code - zero) * scale, abs=1e-6)
                assert absmax[r, start + i].item() == pytest.approx(
                    round(value / size) * size, abs=1e-6
                )


def test_nf4_has_the_levels_of_bitsandbytes():
    golden = torch.tensor([float(level) for level in NF4.split()])
    torch.testing.assert_close(nf4_levels(), golden, atol=1e-6, rtol=0)


def test_nf4_takes_the_nearest_level():
    w = random(4, 150)
    rounded = weight_of(quantize_round(w, nf4_grid(w, 64)))
    for start in (0, 64, 128):
        part = w[:, start : start + 64]
        largest = part.abs().amax(dim=1).half().float()
        levels = nf4_levels() * largest[:, None]  # (R, 16)
        nearest = (part[:, :, None] - levels[:, None]).abs().argmin(dim=2)
        expected = levels.gather(1, nearest)
        torch.testing.assert_close(rounded[:, start : start + 64], expected)


def test_nf4_is_nearer_to_normal_weights_than_uniform_levels():
    """Root mean square errors in groups of 64: about 0.092 against 0.108."""
    w = random(256, 256)
    errors = []
    for grid in (nf4_grid(w, 64), absmax_grid(w, 4, 64)):
        errors.append((weight_of(quantize_round(w, grid)) - w).square().mean().sqrt().item())
    assert errors[0] == pytest.approx(0.092, abs=0.002)
    assert errors[0] < 0.95 * errors[1]


def test_zero_is_always_a_level():
    w = random(8, 32) + 3
    w[:, 7] = 0
    for grid in (minmax_grid(w, 3, 8), absmax_grid(w, 3, 8), nf4_grid(w, 8)):
        assert (weight_of(quantize_round(w, grid))[:, 7] == 0).all()


def test_more_bits_and_smaller_groups_are_nearer():
    w = random(16, 128)
    for make in (absmax_grid, minmax_grid):
        errors = []
        for bits, group in [(2, 64), (3, 64), (4, 64), (4, 16), (8, 16)]:
            error = weight_of(quantize_round(w, make(w, bits, group))) - w
            errors.append(error.square().mean().item())
        assert errors == sorted(errors, reverse=True)


# GPTQ ---------------------------------------------------------------------------------------------


def slow_gptq(w, hessian, bits, group):
    """GPTQ without its tricks, in 64 bits: after each column the inverse of the Hessian of those
    that are left is computed anew (the paper's equation 2)."""
    w = w.double()
    hessian = hessian.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    C = w.size(1)
    grid = minmax_grid(w.float(), bits, C)
    codes = []
    for j in range(C):
        if group < C and j % group == 0:
            grid = minmax_grid(w[:, j : j + group].float(), bits, group)
        code = encode(w[:, j : j + 1].float(), grid)
        error = w[:, j] - decode(code, grid)[:, 0].double()
        inverse = hessian[j:, j:].inverse()
        w[:, j:] -= error[:, None] / inverse[0, 0] * inverse[0]
        codes.append(code)
    return torch.cat(codes, dim=1)


@pytest.mark.parametrize("group", [8, 9, 40, 100])
@pytest.mark.parametrize("lazy", [7, 128])
def test_gptq_against_the_slow_one(group, lazy, monkeypatch):
    monkeypatch.setattr(quantize, "LAZY_COLUMNS", lazy)
    x = correlated_inputs(200, 40)
    w = random(12, 40, seed=5)
    kept = w.clone()
    quantized = quantize_gptq(w, x.T @ x, 200, 3, group)
    expected = slow_gptq(w, 2 / 200 * x.T @ x, 3, group)
    assert torch.equal(quantized.codes, expected)
    assert torch.equal(w, kept)


@pytest.mark.parametrize("group", [16, 20, 64])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_rounding_if_the_inputs_are_not_correlated(group, act_order):
    w = random(12, 64)
    quantized = quantize_gptq(w, torch.eye(64), 2, 3, group, act_order)
    expected = weight_of(quantize_round(w, minmax_grid(w, 3, group)))
    assert torch.equal(weight_of(quantized), expected)


def test_gptq_is_better_the_more_the_inputs_are_correlated():
    w = random(32, 64, seed=9)
    for x, low, high in [
        (random(4000, 64, seed=8), 0.9, 1.1),
        (correlated_inputs(4000, 64), 0.1, 0.6),
    ]:
        seen = statistics_of(x)
        plain = weight_of(quantize_round(w, minmax_grid(w, 3, 64)))
        better = weight_of(quantize_gptq(w, seen.gram, seen.count, 3, 64))
        errors = [output_error(q - w, seen.gram, seen.count).item() for q in (better, plain)]
        assert low < errors[0] / errors[1] < high


def test_act_order_is_gptq_on_sorted_columns():
    x = correlated_inputs(300, 24) * torch.arange(1, 25)
    w = random(8, 24)
    order = x.square().sum(dim=0).argsort(descending=True)
    with_order = weight_of(quantize_gptq(w, x.T @ x, 300, 3, 8, act_order=True))
    x = x[:, order]
    by_hand = weight_of(quantize_gptq(w[:, order], x.T @ x, 300, 3, 8))
    torch.testing.assert_close(with_order[:, order], by_hand)


def test_a_channel_that_is_always_0_gets_weights_of_0():
    x = correlated_inputs(100, 16)
    x[:, [3, 11]] = 0
    w = random(4, 16)
    result = weight_of(quantize_gptq(w, x.T @ x, 100, 4, 16))
    assert (result[:, [3, 11]] == 0).all()
    assert (result[:, 0] != 0).any()

    # The others are those of a matrix without these channels.
    alive = [c for c in range(16) if c not in (3, 11)]
    x = x[:, alive]
    damped = output_error(result[:, alive] - w[:, alive], x.T @ x, 100)
    plain = weight_of(quantize_round(w, minmax_grid(w, 4, 16)))[:, alive]
    assert damped < output_error(plain - w[:, alive], x.T @ x, 100)


def test_output_error_against_the_outputs():
    x = random(50, 6)
    delta = random(3, 6, seed=1)
    expected = (x @ delta.T).square().mean()
    torch.testing.assert_close(output_error(delta, x.T @ x, 50), expected)


# AWQ and SmoothQuant ------------------------------------------------------------------------------


def test_awq_takes_the_best_exponent():
    x = random(500, 32) * (1 + 30 * (torch.arange(32) % 8 == 0))
    w = random(16, 32, seed=3)
    seen = statistics_of(x)
    errors = {}
    for alpha in quantize.ALPHAS:
        s = awq_scale(x.abs().mean(dim=0), alpha)
        rounded = weight_of(quantize_round(w * s, minmax_grid(w * s, 3, 16))) / s
        errors[alpha] = (x @ (rounded - w).T).square().mean().item()
    result = weight_of(quantize_awq(w, seen, 3, 16))
    error = (x @ (result - w).T).square().mean().item()
    assert error == pytest.approx(min(errors.values()), rel=1e-3)
    assert error < 0.7 * errors[0.0]
    assert 0 < min(errors, key=errors.get) < 1


def test_awq_scale_by_hand():
    s = awq_scale(torch.tensor([1.0, 4.0, 16.0]), 0.5)  # 1, 2, 4 over their middle, 2
    assert s.tolist() == [0.5, 1.0, 2.0]
    assert awq_scale(torch.tensor([1.0, 4.0, 16.0]), 0.0).tolist() == [1.0, 1.0, 1.0]


def test_smooth_scale_balances_inputs_and_weights():
    x = random(100, 8) * torch.arange(1, 9) ** 2
    w = random(5, 8, seed=1)
    x_max = x.abs().amax(dim=0)
    s = smooth_scale(x_max, w, 0.5)
    torch.testing.assert_close(x_max / s, (w * s).abs().amax(dim=0), rtol=0.01, atol=0)
    torch.testing.assert_close(smooth_scale(x_max, w, 1.0), x_max, rtol=1e-3, atol=0)
    w_max = w.abs().amax(dim=0)
    torch.testing.assert_close(smooth_scale(x_max, w, 0.0), 1 / w_max, rtol=1e-3, atol=0)


def test_round_activations_by_hand():
    x = torch.tensor([[1.27, 0.504, -3.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[1.27, 0.50, -1.27], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(round_activations(x, torch.tensor(1.27)), expected)
    largest = x.abs().amax(dim=-1, keepdim=True)
    rounded = round_activations(x, largest)
    assert rounded[0, 2].item() == pytest.approx(-3.0)
    assert rounded[0, 1].item() == pytest.approx(round(0.504 / 3 * 127) * 3 / 127)
    assert (rounded[1] == 0).all()


def errors_of_8_bits(x, w):
    """The errors of the outputs with 8 bits everywhere -> {(method, activations): error}."""
    seen = statistics_of(x)
    errors = {}
    for method in ("w8a8", "smoothquant"):
        quantized = quantize_matrix(w, Setting(method, 8), seen)
        s = quantized.channel_scale
        if s is None:
            s = torch.ones(x.size(1))
        for activations, largest in [("tensor", (x / s).abs().max()), ("token", None)]:
            linear = QuantizedLinear(decode(quantized.codes, quantized.grid), s, largest)
            error = linear(x) - x @ w.T
            errors[method, activations] = error.square().mean().item()
    return errors


def test_smoothquant_takes_the_harm_out_of_outliers():
    x = random(200, 64)
    w = random(32, 64, seed=1)
    plain = errors_of_8_bits(x, w)
    x[:, 5] *= 100
    errors = errors_of_8_bits(x, w)
    assert errors["w8a8", "tensor"] > 20 * plain["w8a8", "tensor"]
    assert errors["w8a8", "token"] < 0.7 * errors["w8a8", "tensor"]
    assert errors["smoothquant", "tensor"] < 0.1 * errors["w8a8", "tensor"]
    assert errors["smoothquant", "token"] < 0.1 * errors["w8a8", "token"]


# on disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_codes_are_a_string_of_bits(bits):
    codes = torch.randint(2**bits, (3, 7), generator=torch.Generator().manual_seed(bits))
    codes = codes.to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert len(packed) == math.ceil(21 * bits / 8)
    assert torch.equal(unpack_bits(packed, bits, (3, 7)), codes)

    # The first code is in the lowest bits of the whole number.
    number = int.from_bytes(bytes(packed.tolist()), "little")
    for i, code in enumerate(codes.flatten().tolist()):
        assert number >> (i * bits) & (2**bits - 1) == code


SETTINGS = [
    Setting("absmax", 8),
    Setting("absmax", 4, 8),
    Setting("round", 3, 24),
    Setting("round", 2),
    Setting("nf4", 4, 16),
    Setting("awq", 3, 8),
    Setting("gptq", 3, 8),
    Setting("gptq", 2),
    Setting("gptq", 3, 8, act_order=True),
    Setting("w8a8", 8, 0, False, "token"),
    Setting("w8a8", 8, 0, False, "tensor"),
    Setting("smoothquant", 8, 0, False, "token"),
    Setting("smoothquant", 8, 0, False, "tensor"),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=label_of)
def test_the_file_has_exactly_the_rounded_weights(setting, tmp_path):
    model = make_model()
    rows = make_rows()
    statistics = watch_inputs(model, rows, distinct_inputs(model))
    originals = remember(model)
    quantized = quantize_model(model, setting, rows, statistics)
    inside = {name: linear.weight.data for name, linear in matrices(model).items()}
    restore(model, originals)

    packed = {name: pack(matrix) for name, matrix in quantized.items()}
    save_checkpoint(tmp_path / "q.pt", kind="quantized", matrices=packed)
    loaded = load_packed(tmp_path / "q.pt")
    assert list(loaded) == list(matrices(model))
    for name, weight in loaded.items():
        assert torch.equal(weight, weight_of(quantized[name]))
        if not setting.activations:
            assert torch.equal(weight, inside[name])


def test_bits_per_weight_by_hand():
    """3 bits for the code, and for a group of 8 a scale of 16 bits and a zero point of 3."""
    w = random(16, 32)
    packed = {"a": pack(quantize_round(w, minmax_grid(w, 3, 8)))}
    assert bits_per_weight(packed) == 3 + (16 + 3) / 8
    packed["b"] = pack(quantize_round(w, absmax_grid(w, 8, 32)))
    assert bits_per_weight(packed) == (3 + 19 / 8 + 8 + 16 / 32) / 2
    seen = statistics_of(random(50, 32))
    assert bits_per_weight({"c": pack(quantize_awq(w, seen, 4, 32))}) == 4 + 20 / 32 + 16 / 16


# whole models -------------------------------------------------------------------------------------


def test_matrices_with_the_same_input():
    model = make_model()
    all_statistics = watch_inputs(model, make_rows())
    for name in matrices(model):
        assert torch.equal(all_statistics[name].gram, all_statistics[input_name(name)].gram)
    assert len(distinct_inputs(model)) == 8


def test_gptq_sees_the_quantized_layers_before():
    """The second block's weights are those that GPTQ gives for its inputs in a model whose first
    block is already rounded."""
    model = make_model()
    rows = make_rows()
    setting = Setting("gptq", 3, 8)
    originals = remember(model)
    quantized = quantize_in_sequence(model, setting, rows)
    restore(model, originals)

    for layer in range(2):
        statistics = watch_inputs(model, rows)
        for name, linear in matrices(model).items():
            if not name.startswith(f"h.{layer}."):
                continue
            seen = statistics[name]
            expected = quantize_gptq(linear.weight.detach(), seen.gram, seen.count, 3, 8)
            assert (expected.codes == quantized[name].codes).float().mean() > 0.995
            linear.weight.data = weight_of(quantized[name])

    # With the unrounded first block they would be other ones.
    restore(model, originals)
    name = "h.1.mlp.c_proj"
    seen = watch_inputs(model, rows)[name]
    weight = matrices(model)[name].weight.detach()
    other = quantize_gptq(weight, seen.gram, seen.count, 3, 8)
    assert (other.codes == quantized[name].codes).float().mean() < 0.99


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
def test_padding_teaches_nothing(method):
    setting = Setting(method, 8 if method == "smoothquant" else 3)
    rows = make_rows()
    results = []
    for value in (0, 7):
        idx = rows.idx.masked_fill(rows.targets < 0, value)
        changed = Rows(idx, rows.targets, 0)
        model = make_model()
        statistics = watch_inputs(model, changed, distinct_inputs(model))
        results.append(quantize_model(model, setting, changed, statistics))
    for name in results[0]:
        assert torch.equal(results[0][name].codes, results[1][name].codes)


@pytest.mark.parametrize("method", ["w8a8", "smoothquant"])
def test_the_scale_of_the_tensor_is_that_of_the_calibration_text(method):
    model = make_model()
    rows = make_rows()
    statistics = watch_inputs(model, rows)
    weights = {name: linear.weight for name, linear in matrices(model).items()}
    quantize_model(model, Setting(method, 8, 0, False, "tensor"), rows, statistics)
    for name, weight in weights.items():
        x_max = statistics[name].absolute_max
        if method == "smoothquant":
            x_max = x_max / smooth_scale(x_max, weight, 0.5)
        torch.testing.assert_close(model.get_submodule(name).largest, x_max.max())


@pytest.mark.parametrize("setting", [SETTINGS[6], SETTINGS[-1]], ids=label_of)
def test_measure_leaves_the_model_as_it_was(setting, tmp_path):
    model = make_model()
    rows = make_rows()
    texts = Texts(rows, rows, None)
    statistics = watch_inputs(model, rows, distinct_inputs(model))
    before = row_losses(model, rows)
    result = measure(model, setting, texts, statistics, tmp_path / "q.pt", keep=True)
    assert torch.equal(row_losses(model, rows), before)
    assert not torch.equal(result["sums"], before)
    assert result["bytes"] == (tmp_path / "q.pt").stat().st_size
    assert all(isinstance(linear, nn.Linear) for linear in matrices(model).values())


def test_8_bits_lose_almost_nothing_and_2_bits_do():
    model = make_model()
    rows = make_rows()
    before = mean_loss(model, rows)
    originals = remember(model)
    losses = {}
    for setting in (Setting("absmax", 8), Setting("round", 2)):
        quantize_model(model, setting, rows, {})
        losses[setting.bits] = mean_loss(model, rows)
        restore(model, originals)
    assert losses[8] == pytest.approx(before, rel=0.005)
    assert abs(losses[2] - before) > 10 * abs(losses[8] - before)


def test_row_losses_against_mean_loss():
    model = make_model()
    rows = make_rows()
    n_targets = (rows.targets >= 0).sum().item()
    sums = row_losses(model, rows, batch_size=5)
    assert sums.sum().item() / n_targets == pytest.approx(mean_loss(model, rows), rel=1e-5)
    for i in (0, 11):
        alone = Rows(rows.idx[i : i + 1], rows.targets[i : i + 1], 0)
        n = (alone.targets >= 0).sum().item()
        assert sums[i].item() / n == pytest.approx(mean_loss(model, alone), rel=1e-5)


# what came out ------------------------------------------------------------------------------------


def test_mean_and_error_by_hand():
    """Three rows of four tokens: the mean of their means and its standard error."""
    result = mean_and_error(torch.tensor([4.0, 8.0, 12.0]), torch.tensor([4, 4, 4]))
    assert result["mean"] == pytest.approx(2.0)
    assert result["error"] == pytest.approx(1 / math.sqrt(3))

    # Rows of different lengths with the same loss per token say exactly what it is.
    result = mean_and_error(torch.tensor([2.0, 10.0, 6.0]), torch.tensor([1, 5, 3]))
    assert result["mean"] == pytest.approx(2.0)
    assert result["error"] == pytest.approx(0.0, abs=1e-6)


def test_claims_come_out_only_beyond_their_noise():
    a, b, c = Setting("gptq", 3), Setting("awq", 3), Setting("round", 3)
    noise = random(40)
    measured = {
        a: {"sums": torch.full((40,), 10.0) + noise},
        b: {"sums": torch.full((40,), 12.0) + noise + 0.1 * random(40, seed=1)},
        c: {"sums": torch.full((40,), 12.0) + noise},
    }
    claims = [
        Claim("1", a, c),
        Claim("2", c, a),
        Claim("3", b, c),
        Claim("4", a, Setting("nf4", 4)),
    ]
    checked = check_claims(claims, measured, torch.full((40,), 10))
    assert [row["verdict"] for row in checked] == [
        "came out",
        "the opposite came out",
        "no difference",
    ]
    assert checked[0]["mean"] == pytest.approx(-0.2)


def test_outliers_by_hand():
    x = torch.ones(10, 5)
    x[3, 2] = 9.0
    wild = torch.ones(10, 5)
    wild[:, 0] = -20.0
    statistics = {
        "h.0.mlp.c_proj": statistics_of(x),
        "h.1.mlp.c_proj": statistics_of(wild),
        "h.0.attn.c_q": statistics_of(x),
    }
    found = outliers(statistics)
    assert sorted(found) == ["h.0.attn.c_q", "h.1.mlp.c_proj"]
    assert found["h.0.attn.c_q"]["ratio"] == 9
    assert found["h.0.attn.c_q"]["ratio_of_means"] == pytest.approx(1.8)
    assert found["h.1.mlp.c_proj"]["ratio_of_means"] == 20
    assert found["h.1.mlp.c_proj"]["over_median"].tolist() == [20, 1, 1, 1, 1]


def test_heaviest_tokens_against_all_inputs():
    model = make_model()
    rows = make_rows()
    name = "h.1.mlp.c_proj"
    inputs = []
    hook = matrices(model)[name].register_forward_pre_hook(lambda m, x: inputs.append(x[0]))
    model.trunk(rows.idx)
    hook.remove()
    places = {}
    for row in range(12):
        for position in range(10):
            if rows.targets[row, position] >= 0:
                places[row, position] = inputs[0][row, position].abs().max().item()

    tokens, median = quantize.heaviest_tokens(model, TOK, rows, name, n=3)
    ranked = sorted(places, key=places.get, reverse=True)
    for token, place in zip(tokens, ranked):
        assert token.largest == pytest.approx(places[place])
        assert token.position == place[1]
        assert token.text == TOK.decode([rows.idx[place].item()])
    assert median == pytest.approx(torch.tensor(list(places.values())).median().item())


# the script ---------------------------------------------------------------------------------------


def run(*options):
    command = [sys.executable, str(FOLDER / "quantize.py"), "--device=cpu", *options]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def save_model(path):
    save_checkpoint(path, kind="base", tokenizer=TOK.state(), **make_model().to_checkpoint())


def test_the_script(tmp_path):
    save_model(tmp_path / "tiny.pt")
    options = [f"--model={tmp_path / 'tiny.pt'}", f"--out={tmp_path}", "--rows=3", "--held_out=4"]
    done = run(*options)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "quantize.json").read_text())["results"]["tiny"]
    assert {found["setting"]["method"] for found in result["measured"]} == set(quantize.METHODS)
    assert len(result["claims"]) == 10
    assert not list(tmp_path.glob("quantize_tiny*"))
    for name in ("quantize", "quantize_outliers"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    # A single setting, whose file is kept: its weights give the loss that was printed.
    done = run(*options, "--method=gptq", "--bits=3", "--group=8", "--act_order", "--save")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "quantize.json").read_text())["results"]["tiny"]
    [found] = result["measured"]
    assert found["label"] == "gptq, 3 bits, groups of 8, act-order"
    [path] = tmp_path.glob("quantize_tiny*.pt")
    assert path.stat().st_size == found["bytes"]

    model, tok = load_model(str(tmp_path / "tiny.pt"), "cpu")
    texts = quantize.load_texts("tiny", model, tok, 256, 3, 4)
    assert mean_loss(model, texts.held_out) == pytest.approx(result["fp32"]["mean"], abs=1e-5)
    weights = load_packed(path)
    for name, linear in matrices(model).items():
        linear.weight.data = weights[name]
    assert mean_loss(model, texts.held_out) == pytest.approx(found["nats"], abs=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--method=magic"], "method=magic must be one of absmax, round, nf4"),
        (["--bits=1"], "bits=1 must be from 2 to 8"),
        (["--bits=9"], "bits=9 must be from 2 to 8"),
        (["--bits=0"], "--bits=0 must be at least 1"),
        (["--group=0"], "--group=0 must be at least 1"),
        (["--method=nf4", "--bits=3"], "method=nf4 has 4 bits: give --bits=4"),
        (["--method=w8a8"], "method=w8a8 has 8 bits: give --bits=8"),
        (["--activations=row"], "activations=row must be token or tensor"),
        (["--migration=2"], "--migration=2.0 must be from 0 to 1"),
        (["--held_out=1"], "held_out=1 must be at least 2"),
    ],
)
def test_bad_options_end_in_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(quantize.Config, argv=options)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_option_of_one_method_needs_the_method(tmp_path):
    done = run("--bits=2", f"--out={tmp_path}")
    assert done.returncode == 2
    assert done.stderr == "error: --bits belongs to one method: add --method\n"


def test_a_checkpoint_that_is_missing(tmp_path):
    done = run(f"--model={tmp_path / 'nothing.pt'}", f"--out={tmp_path}")
    assert done.returncode == 2
    assert done.stderr == f"error: there is no {tmp_path / 'nothing.pt'}\n"
