"""Tests of qlinear.py and demo_speed.py: rounding, packing, the kernels, the files, the scripts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import copy
import json
import os
import subprocess

import pytest
import torch
import torch.nn.functional as F
import torch.nn as nn

import demo_speed
import qlinear
from model import GPT, GPTConfig
from qlinear import (
    LAYOUTS,
    Layout,
    QEmbedding,
    QLinear,
    Sizes,
    find_layout,
    load_small,
    pack,
    problem_with,
    quantize_model,
    round_4_bits,
    round_8_bits,
    save_small,
    unpack,
)
from shared import load_checkpoint, parse_args, save_checkpoint
from tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_tokenizer():
    return Tokenizer({bytes([i]): i for i in range(256)})


def make_model(tied=True, n_embd=64, mlp_dim=96):
    """A GPT whose blocks do something: a new one is the identity."""
    torch.manual_seed(0)
    vocab_size = make_tokenizer().vocab_size
    cfg = GPTConfig(vocab_size, 128, 2, 4, n_embd, mlp_dim=mlp_dim, tied=tied)
    model = GPT(cfg)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.15)
    return model.requires_grad_(False).eval()


def make_layer(bits, N=80, K=128, group=32):
    layer = QLinear(K, N, bits, group, find_layout())
    weight = random(N, K)
    layer.fill(weight)
    return layer, weight


# rounding -----------------------------------------------------------------------------------------


def test_round_8_bits_by_hand():
    weight = torch.tensor([[1.27, -0.635, 0.01], [0.0, 0.0, 0.0], [-254.0, 127.0, 3.1]])
    q, scale = round_8_bits(weight)
    assert q.dtype == torch.int8
    assert q.tolist() == [[127, -63, 1], [0, 0, 0], [-127, 64, 2]]
    assert scale.dtype == torch.bfloat16
    assert scale.tolist() == [torch.tensor(0.01).bfloat16().item(), 0, 2]


def test_round_8_bits_is_the_nearest_point_of_the_grid_that_is_used():
    weight = random(20, 64)
    q, scale = round_8_bits(weight)
    error = weight - q * scale.float()[:, None]
    inside = q.abs() < 127  # the largest may be cut off by the rounded scale
    half_step = (scale.float() / 2)[:, None].expand_as(weight)
    assert (error.abs()[inside] <= 1.0001 * half_step[inside]).all()
    assert (q.abs().amax(dim=1) >= 126).all()


def test_round_4_bits_by_hand():
    # A step of 2, from -4 to 26, and a group of equal weights.
    weight = torch.tensor([[-4.0, 26.0, 0.9, 3.2, 5.0, 5.0, 5.0, 5.0]])
    q, scale, zero = round_4_bits(weight, 4)
    assert scale.tolist() == [[2, 0]]
    assert zero.tolist() == [[12, 5]]
    assert q[0, :4].tolist() == [0, 15, 2, 4]
    assert scale.dtype == zero.dtype == torch.bfloat16

    # Equal weights come back exactly, whatever q is.
    value = zero[0, 1].float() + scale[0, 1].float() * (q[0, 4:] - 8)
    assert value.tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("group", [32, 64])
def test_round_4_bits_is_the_nearest_point_of_the_grid_that_is_used(group):
    weight = random(16, 128) + 0.3
    q, scale, zero = round_4_bits(weight, group)
    assert q.min() == 0
    assert q.max() == 15
    levels = torch.arange(16.0) - 8
    for row in range(16):
        for column in range(128):
            g = column // group
            points = zero[row, g].float() + scale[row, g].float() * levels
            distance = (points - weight[row, column]).abs()
            assert distance[q[row, column]] <= distance.min() + 1e-5


def test_smaller_groups_round_better():
    weight = random(64, 256)
    errors = []
    for group in (32, 64, 128, 256):
        layer = QLinear(256, 64, 4, group, find_layout())
        layer.fill(weight)
        errors.append((layer.unpacked() - weight).square().mean().item())
    assert errors == sorted(errors)
    assert errors[0] < 0.7 * errors[-1]


# packing ------------------------------------------------------------------------------------------


def test_pack_by_hand():
    # The example of its docstring, with two columns and two blocks.
    q = torch.tensor([[1, 5], [2, 6], [3, 7], [4, 8], [9, 0], [10, 0], [11, 0], [12, 15]])
    packed = pack(q, Layout(rows=4, distance=2))
    block_0 = [3 * 16 + 1, 4 * 16 + 2, 7 * 16 + 5, 8 * 16 + 6]
    block_1 = [11 * 16 + 9, 12 * 16 + 10, 0, 15 * 16]
    assert packed.dtype == torch.uint8
    assert packed.shape == (8, 1)
    assert packed.flatten().tolist() == block_0 + block_1

    # Neighbouring rows in one byte.
    packed = pack(q[:4], Layout(rows=4, distance=1))
    assert packed.flatten().tolist() == [2 * 16 + 1, 4 * 16 + 3, 6 * 16 + 5, 8 * 16 + 7]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unpack_is_the_inverse(layout):
    q = torch.randint(16, (128, 6), dtype=torch.int32)
    assert torch.equal(unpack(pack(q, layout), layout), q)
    assert pack(q, layout).numel() == q.numel() / 2


def test_the_layout_is_that_of_this_processor():
    q = torch.randint(16, (192, 32), dtype=torch.int32)
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    assert torch.equal(pack(q, find_layout()), expected)


def test_an_unknown_layout_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(qlinear, "LAYOUTS", [Layout(8, 2)])
    with pytest.raises(SystemExit) as end:
        find_layout()
    assert end.value.code == 2
    assert "does not know" in capsys.readouterr().err


# the layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, group", [(8, 32), (4, 32), (4, 64), (4, 128)])
@pytest.mark.parametrize("N", [64, 77, 200])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_kernel_multiplies_with_the_unpacked_matrix(bits, group, N, rows):
    layer, weight = make_layer(bits, N, 256, group)
    x = random(rows, 256, seed=1).bfloat16().float()
    y = layer(x)
    expected = x @ layer.unpacked().T
    assert y.shape == (rows, N)
    assert y.dtype == torch.float32

    # The result is rounded to bf16, which has 8 significant bits.
    assert ((y - expected).abs() <= expected.abs() / 256 + 1e-3).all()

    # And the matrix is about the one that was packed.
    error = (layer.unpacked() - weight).square().mean().sqrt().item()
    assert error < (0.02 if bits == 8 else 0.16)


@pytest.mark.parametrize("bits", [4, 8])
def test_shapes_and_dtypes(bits):
    layer, _ = make_layer(bits)
    x = random(2, 5, 128)
    y = layer(x)
    assert y.shape == (2, 5, 80)
    assert torch.equal(y[1, 3], layer(x[1, 3]))
    assert torch.equal(y, layer(x.bfloat16()).float())
    assert layer(x.bfloat16()).dtype == torch.bfloat16

    # A part of a tensor that does not lie in one piece.
    assert torch.equal(layer(x[:, ::2]), y[:, ::2])
    for dtype in (torch.float32, torch.bfloat16):
        columns = random(128, 5, seed=2).to(dtype)
        assert torch.equal(layer(columns.T), layer(columns.T.contiguous()))


@pytest.mark.parametrize(
    "bits, n_bytes", [(8, 80 * 128 + 2 * 80), (4, 128 * 128 / 2 + 4 * 128 * 4)]
)
def test_the_buffers(bits, n_bytes):
    layer, _ = make_layer(bits)
    assert list(layer.parameters()) == []
    assert sorted(layer.state_dict()) == ["packed", "scales"]
    if bits == 4 and layer.layout.rows != 64:
        return  # the rows are padded to another number
    assert demo_speed.bytes_of_weights(layer) == n_bytes


def test_what_the_kernels_cannot_have():
    assert problem_with(64, 8, 64) is None
    assert problem_with(60, 8, 64) == "60 inputs are not divisible by 16"
    assert problem_with(128, 4, 64) is None
    assert problem_with(96, 4, 64) == "96 inputs are not divisible by the group of 64"


# the model ----------------------------------------------------------------------------------------


def test_quantize_model_replaces_all_that_it_can(capsys):
    model = make_model()
    left = quantize_model(model, Sizes(4, 64, 8))
    assert left == {
        f"h.{i}.mlp.c_proj": "96 inputs are not divisible by the group of 64" for i in (0, 1)
    }
    for name, module in model.named_modules():
        if name in left:
            assert type(module) is nn.Linear
        elif name.startswith("h.") and ".c_" in name:
            assert module.bits == 4
    assert model.lm_head.bits == 8
    qlinear.say_what_is_left(left)
    line = capsys.readouterr().out
    assert line == (
        "2 matrices stay as they are, because 96 inputs are not divisible by the group of 64: "
        "c_proj\n"
    )


@pytest.mark.parametrize("bits, head_bits, limit", [(8, 8, 0.03), (4, 8, 0.4), (4, 4, 0.4)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_nearly_the_same(bits, head_bits, limit, tied):
    model = make_model(tied)
    small = copy.deepcopy(model)
    assert quantize_model(small, Sizes(bits, 32, head_bits)) == {}
    idx = torch.randint(200, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = model(idx)[0]
    actual = small(idx)[0]
    error = (actual - expected).norm() / expected.norm()
    assert 0.001 < error < limit

    # It is exactly the model with the unpacked matrices, up to the rounding of inputs to bf16.
    for name, module in small.named_modules():
        if isinstance(module, QLinear):
            model.get_submodule(name).weight = nn.Parameter(module.unpacked())
    if tied and head_bits == 4:
        model.wte.weight = nn.Parameter(small.wte.weight)
    expected = model(idx)[0]
    assert (actual - expected).norm() / expected.norm() < 0.02


def test_the_embedding_shares_the_memory_of_the_head():
    model = make_model()
    quantize_model(model, Sizes(4, 32, 8))
    assert isinstance(model.wte, QEmbedding)
    assert model.wte.packed.data_ptr() == model.lm_head.packed.data_ptr()
    idx = torch.tensor([[3, 7], [250, 0]])
    assert torch.equal(model.wte(idx), model.lm_head.unpacked()[idx])
    assert demo_speed.bytes_of_weights(model) < demo_speed.bytes_of_weights(make_model()) / 3

    # With 4 bits it keeps its own, and so does that of a model that is not tied.
    for tied, head_bits in [(True, 4), (True, 32), (False, 8)]:
        model = make_model(tied)
        quantize_model(model, Sizes(4, 32, head_bits))
        assert type(model.wte) is nn.Embedding


@pytest.mark.parametrize("sizes", [Sizes(8, 32, 8), Sizes(4, 32, 8), Sizes(4, 32, 4)])
def test_generate_with_a_cache_is_generate_without(sizes):
    model = make_model()
    quantize_model(model, sizes)
    idx = torch.randint(200, (3, 6), generator=torch.Generator().manual_seed(0))
    written = model.generate(idx, 8, temperature=0)
    for t in range(6, 14):
        logits = model(written[:, :t])[0][:, -1]
        chosen = logits.gather(1, written[:, t : t + 1])[:, 0]

        # A sum in another order may decide between two tokens that are nearly equal.
        assert (logits.amax(dim=1) - chosen < 0.02 * logits.std()).all()


# files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits, head_bits", [(32, 8), (16, 8), (8, 8), (4, 8), (4, 4), (8, 32)])
def test_a_saved_model_is_the_same(bits, head_bits, tied, tmp_path):
    sizes = Sizes(bits, 32, head_bits)
    model = make_model(tied)
    qlinear.make_small(model, sizes)
    path = tmp_path / "small.pt"
    save_small(path, model, make_tokenizer(), sizes)
    loaded, tok = load_small(load_checkpoint(path, "small"))

    idx = torch.tensor([tok.encode("a kite")])
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    if bits == 8 and head_bits == 8 and tied:
        assert loaded.wte.packed.data_ptr() == loaded.lm_head.packed.data_ptr()
    assert demo_speed.bytes_of_weights(loaded) == demo_speed.bytes_of_weights(model)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert not any(tensor.requires_grad for tensor in loaded.parameters())
    assert path.stat().st_size < demo_speed.bytes_of_weights(model) + 60_000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_from_another_processor(layout, tmp_path):
    sizes = Sizes(4, 32, 8)
    model = make_model()
    quantize_model(model, sizes)
    save_small(tmp_path / "small.pt", model, make_tokenizer(), sizes)
    checkpoint = load_checkpoint(tmp_path / "small.pt", "small")
    # What the other processor would have written: other blocks, with other padding.
    for name, module in model.named_modules():
        if isinstance(module, QLinear) and module.bits == 4:
            padding = -module.out_features % layout.rows
            q = unpack(module.packed, module.layout)[: module.out_features]
            packed = pack(F.pad(q, (0, 0, 0, padding)), layout)
            scales = F.pad(module.scales[:, : module.out_features], (0, 0, 0, padding))
            checkpoint["weights"][f"{name}.packed"] = packed
            checkpoint["weights"][f"{name}.scales"] = scales
    checkpoint["layout"] = layout._asdict()

    loaded, tok = load_small(checkpoint)
    idx = torch.tensor([tok.encode("a kite")])
    assert torch.equal(loaded(idx)[0], model(idx)[0])


def test_resident_memory_grows_with_what_is_used():
    before = qlinear.resident_memory()
    held = torch.ones(30_000_000)
    assert held.numel() * 4 * 0.9 < qlinear.resident_memory() - before < 200_000_000


# the measurement ----------------------------------------------------------------------------------


def test_summarize_by_hand():
    rounds = {"fp32": [2.0, 4.0, 6.0], "4 bits": [1.0, 1.0, 3.0]}
    summary = demo_speed.summarize(rounds, batch=8, length=5, reference="fp32")
    assert summary["fp32"] == {"tokens_per_second": 10, "ratio": 1, "lowest": 1, "highest": 1}
    assert summary["4 bits"] == {"tokens_per_second": 40, "ratio": 2, "lowest": 2, "highest": 4}


def test_seconds_to_write_counts_the_tokens_and_not_the_prompt():
    ticks = []

    class Model(GPT):
        def forward(self, idx, targets=None, cache=None):
            ticks.append(idx.size(1))
            return super().forward(idx, targets, cache)

    torch.manual_seed(0)
    model = Model(make_model().cfg)
    seconds = demo_speed.seconds_to_write(model, [1, 2, 3], 2, 4, lambda: len(ticks))
    assert ticks == [3, 1, 1, 1, 1]
    assert seconds == 4


def row(ratio):
    return {"tokens_per_second": 1, "ratio": ratio, "lowest": ratio, "highest": ratio}


def test_the_title_says_what_came_out():
    speeds = {
        "1": {"fp32": row(1), "8 bits": row(1.5), "4 bits": row(2.5), demo_speed.PEER: row(0.8)},
        "8": {"fp32": row(1), "8 bits": row(0.7), "4 bits": row(0.9), demo_speed.PEER: row(0.8)},
    }
    assert demo_speed.finding(speeds).split("\n") == [
        "4 bits: 2.5 times our fp32 at batch 1",
        "nothing beats our fp32 at batch 8",
        "4 bits: 3.1 times transformers' fp32 at batch 1",
    ]


# the scripts --------------------------------------------------------------------------------------


def run(script, *options):
    command = [sys.executable, str(FOLDER / script), *options]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def test_the_scripts(tmp_path):
    model = make_model()
    big = tmp_path / "big.pt"
    tok = make_tokenizer()
    save_checkpoint(big, kind="base", tokenizer=tok.state(), **model.to_checkpoint())

    options = [f"--out={tmp_path}", "--max_new_tokens=4", "--prompt=Hi"]
    small = tmp_path / "small.pt"
    done = run("qlinear.py", f"--model={big}", f"--save={small}", "--group=32", *options)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "qlinear.json").read_text())
    assert metrics["bits"] == 4
    assert 0 < metrics["tokens"] <= 4

    # demo_speed.py opens a small file of each variant in a process of its own.
    options = ["--length=2", "--repeats=1", "--batch=1,2", "--held_out=1", "--block_size=16"]
    options += [f"--out={tmp_path}", "--group=32"]
    done = run("demo_speed.py", f"--model={big}", *options)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "demo_speed.json").read_text())
    assert list(metrics["speeds"]) == ["1", "2"]
    assert list(metrics["speeds"]["1"]) == ["fp32", "bf16", "8 bits", "4 bits"]
    weights = [row["weights"] for row in metrics["table"].values()]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] == 2 * weights[1]
    losses = [row["loss"] for row in metrics["table"].values()]
    assert max(losses) - min(losses) < 0.5
    assert (tmp_path / "demo_speed.png").read_bytes().startswith(b"\x89PNG")


def test_the_comparison_needs_the_large_weights(tmp_path, capsys):
    path = tmp_path / "small.pt"
    save_checkpoint(path, kind="small")
    with pytest.raises(SystemExit) as end:
        demo_speed.open_large(str(path))
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {path} is a 'small' checkpoint")


@pytest.mark.parametrize(
    "module, option, message",
    [
        (qlinear, "--bits=5", "bits=5 must be 4, 8, 16 or 32"),
        (qlinear, "--head_bits=16", "head_bits=16 must be 4, 8 or 32"),
        (qlinear, "--group=48", "group=48 must be one of (32, 64, 128, 256)"),
        (qlinear, "--bits=0", "bits=0 must be at least 1"),
        (demo_speed, "--group=16", "group=16 must be one of"),
        (demo_speed, "--batch=1,x", "batch=1,x must be like 1,8"),
        (demo_speed, "--batch=0", "batch=0 must be like 1,8"),
        (demo_speed, "--repeats=0", "repeats=0 must be at least 1"),
    ],
)
def test_bad_options_end_in_one_line(module, option, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(module.Config, argv=[option])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_model_and_a_missing_peer_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        qlinear.open_model(str(tmp_path / "none.pt"), Sizes(4, 32, 8))
    assert end.value.code == 2
    with pytest.raises(SystemExit) as end:
        demo_speed.open_peer(str(tmp_path / "none"))
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_without_the_package_transformers_there_is_no_comparison(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_speed.importlib.util, "find_spec", lambda name: None)
    assert demo_speed.open_peer(str(tmp_path)) is None
    assert capsys.readouterr().out == (
        "no comparison with transformers: the package is not installed\n"
    )
