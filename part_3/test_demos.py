"""Tests of Part 3's demos: their mathematics against an independent statement of it, and a tiny run
of each."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import subprocess
from dataclasses import asdict

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import demo_kv_cache
import demo_norms
import demo_rope
import demo_streaming
import demo_swiglu
import model_streaming
from model import GPT, GPTConfig, RMSNorm
from shared import parse_args, save_checkpoint
from train import Data, get_batch

HERE = Path(demo_norms.__file__).resolve().parent
SIZES = dict(block_size=8, n_layer=1, n_head=2, n_embd=16)
BEGIN_SIZES = dict(vocab_size=257, block_size=8, n_layer=2, n_head=4, n_kv_head=2, n_embd=16)

# One process runs all the demos, because importing torch takes longer than they do.
RUNNER = """
import json, runpy, sys, torch
folder, jobs = sys.argv[1:]
sys.path.insert(0, folder)
for name, *options in json.loads(jobs):
    print(f"=== {name}")
    sys.argv = [name, *options]
    torch.set_grad_enabled(True)
    runpy.run_path(f"{folder}/demo_{name}.py", run_name="__main__")
"""


def as_options(**values):
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder with the output of all demos, and what they printed."""
    folder = tmp_path_factory.mktemp("demos")
    (folder / "text.txt").write_text("the fox ran. Tom hid the né dog. " * 40)

    cfg = GPTConfig(vocab_size=256, block_size=8, n_layer=2, n_head=2, n_embd=16)
    weights = make_model(cfg).state_dict()
    save_checkpoint(folder / "gpt.pt", kind="gpt", gpt_config=asdict(cfg), weights=weights)

    common = as_options(out=folder, device="cpu")
    training = as_options(data=folder / "text.txt", steps=10, batch_size=2, seeds=2, **SIZES)
    streaming = as_options(windows=4, streams=2, steps=2, batch_size=2, block_size=8, sink=2)
    jobs = [
        ("norms", *common, *training),
        ("rope", *common, *training),
        ("swiglu", *common, *training),
        (
            "kv_cache",
            *common,
            *as_options(positions=32, n_embd=32, n_head=4, batch_size=2, repeats=1),
        ),
        ("streaming", *common, f"--init={folder / 'gpt.pt'}", *streaming),
    ]
    command = [sys.executable, "-c", RUNNER, str(HERE), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def read_metrics(made, name):
    return json.loads((made[0] / f"demo_{name}.json").read_text())


def make_model(cfg=None, kind=GPT):
    """A model whose output projections are not zero."""
    torch.manual_seed(0)
    model = kind(cfg or GPTConfig(**SIZES))
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    return model.requires_grad_(False)


def make_streaming():
    return make_model(model_streaming.GPTConfig(**BEGIN_SIZES), model_streaming.GPT)


def tokens(*shape):
    return torch.randint(257, shape, generator=torch.Generator().manual_seed(1))


def assert_close(actual, expected, precision=1e-5):
    """The same up to rounding, relative to the largest number."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=precision * scale)


class RecordingLog:
    """Keeps what a training logs."""

    def __init__(self):
        self.records = []

    def __call__(self, step, **values):
        self.records.append({"step": step, **values})


def make_data():
    ids = torch.tensor(list("the fox ran. Tom hid the né dog. ".encode() * 20))
    return Data(train_ids=ids, val_ids=ids[:100], entropy=None)


def train_by_hand(model, data, cfg, block_size):
    """The loss of each step of plain training with AdamW."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    losses = []
    for step in range(cfg.steps):
        x, y = get_batch(data.train_ids, step, cfg, block_size)
        _, loss = model(x, y)
        for p in model.parameters():
            p.grad = None
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --------------------------------------------------------------------------------------------------
# demo_norms


def test_layer_norm_matches_torch():
    x = 3 + 2 * torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    assert_close(demo_norms.LayerNorm(16)(x), nn.LayerNorm(16)(x))


def count(model, kind):
    return sum(isinstance(part, kind) for part in model.modules())


def test_the_two_models_differ_in_their_norms_only():
    cfg = GPTConfig(**SIZES)
    rms = demo_norms.build_model("RMSNorm", cfg, seed=3)
    layer = demo_norms.build_model("LayerNorm", cfg, seed=3)
    assert count(rms, RMSNorm) == count(layer, demo_norms.LayerNorm) == 5
    assert count(rms, demo_norms.LayerNorm) == count(layer, RMSNorm) == 0
    for name, p in rms.named_parameters():
        assert torch.equal(p, layer.get_parameter(name)), name


def test_layer_gradients():
    model = GPT(GPTConfig(**{**SIZES, "n_layer": 2}))
    idx = tokens(2, 9) % 256
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    norms = demo_norms.layer_gradients(model)
    assert len(norms) == 2
    for norm, block in zip(norms, model.h):
        matrices = [part for part in block.modules() if isinstance(part, nn.Linear)]
        gradient = torch.cat([matrix.weight.grad.flatten() for matrix in matrices])
        assert norm == pytest.approx(gradient.norm().item(), rel=1e-5)
        assert norm > 0


def test_the_norms_are_trained_as_by_hand():
    """Timing the norm alone must leave no trace in the training."""
    cfg = demo_norms.Config(steps=12, batch_size=2, lr=0.02, seed=3)
    gpt_cfg = GPTConfig(**SIZES)
    log = RecordingLog()
    runs = demo_norms.train(make_data(), cfg, gpt_cfg, torch.device("cpu"), log, first_step=5)
    for norm in demo_norms.NORMS:
        model = demo_norms.build_model(norm, gpt_cfg, seed=3)
        losses = train_by_hand(model, make_data(), cfg, block_size=8)
        assert runs[norm].losses == pytest.approx(losses, rel=1e-4)
        assert [record[norm] for record in log.records] == runs[norm].losses
        assert len(runs[norm].step_ms) == len(runs[norm].norm_ms) == 12
    assert [record["step"] for record in log.records] == list(range(5, 17))


def test_the_verdict_on_the_norms():
    assert demo_norms.verdict([1.0], [2.0]) == "one seed"
    assert demo_norms.verdict([1.0, 1.5], [1.4, 2.0]) == "2 seeds, no difference"
    assert demo_norms.verdict([1.0, 1.2], [1.4, 2.0]) == "2 seeds, they differ"
    assert demo_norms.verdict([1.4, 2.0], [1.0, 1.2]) == "2 seeds, they differ"


def test_demo_norms_runs(made):
    metrics = read_metrics(made, "norms")
    assert metrics["RMSNorm_ms"] > metrics["RMSNorm_alone"] > 0
    assert len(metrics["LayerNorm_val"]) == len(metrics["RMSNorm_val"]) == 2
    assert metrics["LayerNorm_val"] != metrics["RMSNorm_val"]
    assert len(metrics["RMSNorm_grads"]) == 1
    assert (made[0] / "demo_norms.png").exists()

    # Both models learn, and the two seeds are two different runs.
    lines = (made[0] / "demo_norms.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert [record["step"] for record in log] == list(range(20))
    for norm in demo_norms.NORMS:
        assert log[9][norm] < log[0][norm] - 0.02
    assert log[0]["RMSNorm"] != log[10]["RMSNorm"]


# --------------------------------------------------------------------------------------------------
# demo_rope


def test_rotate_matches_complex_numbers():
    x = torch.randn(16, generator=torch.Generator().manual_seed(1))
    pos = torch.tensor([0, 1, 7, 100])
    theta = 10000.0 ** (-torch.arange(8) / 8)
    turns = torch.polar(torch.ones(4, 8), pos[:, None] * theta)
    expected = torch.complex(x[:8], x[8:]) * turns
    expected = torch.cat([expected.real, expected.imag], dim=-1)
    assert_close(demo_rope.rotate(x, pos, 10000.0), expected)


def test_the_shift_error_is_rounding(monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, 32)
    assert 0 < demo_rope.shift_error(q, k, 10000.0) < 1e-2

    # Positions that are added instead of rotated do not pass.
    def add(x, pos, base):
        return x + pos[:, None].float().sin()

    monkeypatch.setattr(demo_rope, "rotate", add)
    assert demo_rope.shift_error(q, k, 10000.0) > 1


@pytest.mark.parametrize("kind", demo_rope.KINDS)
def test_without_positions_the_order_of_the_past_is_not_seen(kind):
    torch.manual_seed(0)
    model = demo_rope.PositionGPT(GPTConfig(**SIZES), kind)
    for name, p in model.named_parameters():
        if name != "table":
            p.data += 0.2 * torch.randn(p.shape)
    logits, _ = model(torch.tensor([[1, 2, 3, 4, 5, 6]]))
    permuted, _ = model(torch.tensor([[4, 3, 1, 2, 5, 6]]))
    sees_order = (logits[0, -1] - permuted[0, -1]).abs().max() > 1e-4
    assert sees_order == (kind != "none")
    assert model.table.requires_grad == (kind == "learned")


@pytest.mark.parametrize("kind", demo_rope.KINDS)
def test_only_rope_rotates(kind):
    model = demo_rope.PositionGPT(GPTConfig(**SIZES), kind)
    _, cos, sin = model.positions(6, None, torch.device("cpu"))
    rotates = bool((cos != 1).any() or (sin != 0).any())
    assert rotates == (kind == "RoPE")


@pytest.mark.parametrize("kind", demo_rope.KINDS)
def test_tables_are_as_large_as_the_embeddings(kind):
    model = demo_rope.PositionGPT(GPTConfig(block_size=64), kind)
    assert model.table.shape == (64, 128)
    assert model.table.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.05)


def test_with_rope_it_is_the_model():
    expected = make_model()
    model = demo_rope.PositionGPT(GPTConfig(**SIZES), "RoPE")
    model.load_state_dict(expected.state_dict(), strict=False)
    idx = tokens(2, 8) % 256
    assert_close(model(idx)[0], expected(idx)[0])


def test_loss_by_position():
    model = make_model()
    ids = tokens(8 * 20 + 5) % 256
    expected = torch.zeros(8)
    for start in range(0, 160, 8):
        logits, _ = model(ids[None, start : start + 8])
        targets = ids[start + 1 : start + 9]
        expected += F.cross_entropy(logits[0], targets, reduction="none") / 20
    assert_close(demo_rope.loss_by_position(model, ids, 8, "cpu"), expected)


@pytest.mark.parametrize("kind", demo_rope.KINDS)
def test_the_positions_are_trained_as_by_hand(kind):
    """On blocks of the trained length, and then read on longer ones."""
    cfg = demo_rope.Config(steps=12, batch_size=2, lr=0.02, longer=3, seed=3)
    gpt_cfg = GPTConfig(**SIZES)
    log = RecordingLog()
    loss = demo_rope.train(kind, make_data(), cfg, gpt_cfg, "cpu", log, first_step=0)

    torch.manual_seed(3)
    model = demo_rope.PositionGPT(GPTConfig(**{**SIZES, "block_size": 24}), kind)
    losses = train_by_hand(model, make_data(), cfg, block_size=8)
    assert [record["loss"] for record in log.records] == pytest.approx(losses, rel=1e-4)
    expected = demo_rope.loss_by_position(model, make_data().val_ids, 24, "cpu")
    assert loss.shape == (24,)
    assert_close(loss, expected, precision=1e-3)


def test_demo_rope_runs(made):
    metrics = read_metrics(made, "rope")
    assert metrics["trained_length"] == 8
    assert metrics["read_length"] == 32
    assert list(metrics["past"]) == list(metrics["inside"]) == demo_rope.KINDS
    values = [tuple(loss) for loss in metrics["past"].values()]
    assert len(set(values)) == 4  # the four kinds are four different models
    assert all(len(loss) == 2 and loss[0] != loss[1] for loss in values)
    assert (made[0] / "demo_rope.png").exists()
    assert (made[0] / "demo_rope_length.png").exists()


# --------------------------------------------------------------------------------------------------
# demo_swiglu


def test_all_kinds_have_equal_parameters_and_an_equal_rest():
    models = [demo_swiglu.build_model(kind, GPTConfig(**SIZES), 0) for kind in demo_swiglu.KINDS]
    params = [sum(p.numel() for p in model.parameters()) for model in models]
    assert len(set(params)) == 1
    for name, p in models[0].named_parameters():
        if ".mlp." not in name:
            for model in models[1:]:
                assert torch.equal(p, model.get_parameter(name)), name


def test_plain_mlps():
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    activations = {
        "ReLU": lambda z: z.clamp(min=0),
        "ReLU squared": lambda z: z.clamp(min=0) ** 2,
        "GELU": lambda z: z * torch.special.ndtr(z),
    }
    assert set(activations) == set(demo_swiglu.ACTIVATIONS)
    for kind, activation in activations.items():
        mlp = demo_swiglu.build_mlp(kind, GPTConfig(**SIZES))
        nn.init.normal_(mlp.c_proj.weight)
        expected = activation(x @ mlp.c_fc.weight.T) @ mlp.c_proj.weight.T
        assert_close(mlp(x), expected)


@pytest.mark.parametrize("kind", demo_swiglu.KINDS)
def test_the_mlps_are_trained_as_by_hand(kind):
    cfg = demo_swiglu.Config(steps=12, batch_size=2, lr=0.02, seed=3)
    gpt_cfg = GPTConfig(**SIZES)
    run = demo_swiglu.train(kind, make_data(), cfg, gpt_cfg, "cpu", RecordingLog(), first_step=0)
    model = demo_swiglu.build_model(kind, gpt_cfg, seed=3)
    losses = train_by_hand(model, make_data(), cfg, block_size=8)
    assert run.losses == pytest.approx(losses, rel=1e-4)
    assert run.params == sum(p.numel() for p in model.parameters())


def test_the_verdict_on_the_mlps():
    assert demo_swiglu.verdict([1.0], [2.0]) == "one seed, no verdict"
    assert demo_swiglu.verdict([1.0, 1.5], [1.4, 2.0]) == "no difference"
    assert demo_swiglu.verdict([1.0, 1.2], [1.4, 2.0]) == "better"
    assert demo_swiglu.verdict([1.4, 2.0], [1.0, 1.2]) == "worse"


def test_demo_swiglu_runs(made):
    metrics = read_metrics(made, "swiglu")
    assert list(metrics["val"]) == demo_swiglu.KINDS
    values = [tuple(losses) for losses in metrics["val"].values()]
    assert len(set(values)) == 4
    assert all(len(losses) == 2 and losses[0] != losses[1] for losses in values)
    assert set(metrics["swiglu_against"]) == set(demo_swiglu.ACTIVATIONS)
    assert (made[0] / "demo_swiglu.png").exists()


# --------------------------------------------------------------------------------------------------
# demo_kv_cache


def test_peak_memory_adds_up_what_is_alive_at_one_time():
    with demo_kv_cache.PeakMemory() as memory:
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100) + 1  # 8000 with a: the view has no memory of its own
        del b
        c = a * 2  # 8000
        part = c[:5]
        del c  # but its slice keeps the memory alive
        torch.ones(500)  # 10000 for a moment
    assert memory.peak == 10000
    assert memory.current == 8000
    assert len(part) == 5


def test_the_cache_has_the_size_of_the_formula():
    cfg = GPTConfig(**BEGIN_SIZES)
    model = make_model(cfg)
    idx = tokens(3, 7)
    cache, logits = demo_kv_cache.read_context(model, idx)
    bytes_kept = demo_kv_cache.kept_mib(cache) * 2**20
    assert bytes_kept == 2 * 2 * 3 * 2 * 7 * 4 * 4  # k and v, layers, B, G, tokens, D, bytes
    assert_close(logits, model(idx)[0][:, -1])


def test_every_block_of_the_untrained_model_does_something():
    model = demo_kv_cache.make_model(GPTConfig(**SIZES), "cpu")
    for block in model.h:
        assert block.attn.c_proj.weight.std().item() == pytest.approx(0.05, rel=0.2)
        assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.05, rel=0.2)


def test_demo_kv_cache_runs(made):
    metrics = read_metrics(made, "kv_cache")
    assert metrics["positions"] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert metrics["worst_logit_difference"] < 1e-4
    assert metrics["kv_heads"] == [4, 2, 1]
    assert metrics["mib_by_kv_heads"][0] == 4 * metrics["mib_by_kv_heads"][2]
    assert metrics["mib_kept"][-1] == 8 * metrics["mib_kept"][0]
    assert metrics["mib_kept"][-1] < metrics["peak_mib_with"][-1]
    assert metrics["peak_mib_with"][-1] < metrics["peak_mib_without"][-1]
    assert (made[0] / "demo_kv_cache.png").exists()
    assert (made[0] / "demo_kv_cache_heads.png").exists()


# --------------------------------------------------------------------------------------------------
# demo_streaming

STREAMING = demo_streaming.Config(windows=5, sink=2)


def test_reading_in_chunks_is_reading_one_by_one():
    rows = tokens(2, 41)
    readers = demo_streaming.make_readers(make_streaming(), STREAMING)
    for way in demo_streaming.WAYS[:3]:
        logits, _ = readers[way](rows[:, :-1])
        expected = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        for chunk in (1, 8):
            losses, _ = demo_streaming.read(readers[way], rows, chunk)
            assert_close(losses, expected, precision=1e-4)


def test_the_ways_differ_beyond_the_trained_length_only():
    rows = tokens(2, 41)
    readers = demo_streaming.make_readers(make_streaming(), STREAMING)
    dense, dense_cache = demo_streaming.read(readers["dense"], rows, 8)
    window, window_cache = demo_streaming.read(readers["window"], rows, 8)
    sinks, sinks_cache = demo_streaming.read(readers["window + sinks"], rows, 8)
    for losses in (window, sinks):
        assert_close(losses[:, :8], dense[:, :8], precision=1e-4)
        assert (losses[:, 8:] - dense[:, 8:]).abs().max() > 1e-3
    assert (window - sinks).abs().max() > 1e-3

    # The window takes the memory of the trained length, with sinks or without.
    assert window_cache.k.size(3) == sinks_cache.k.size(3) == 8
    assert dense_cache.k.size(3) == 40


@pytest.mark.parametrize("has_begin", [False, True])
def test_recomputation_sees_the_last_tokens_and_nothing_else(has_begin):
    model = make_streaming()
    rows = tokens(3, 21)
    losses = demo_streaming.read_again(model, rows, torch.tensor([3, 15]), has_begin)

    logits, _ = model(rows[:, :4])
    expected = F.cross_entropy(logits[:, -1], rows[:, 4], reduction="none")
    assert_close(losses[:, 0], expected)

    last = rows[:, 8:16]
    if has_begin:
        last = rows[:, [0, 9, 10, 11, 12, 13, 14, 15]]
    logits, _ = model(last)
    expected = F.cross_entropy(logits[:, -1], rows[:, 16], reduction="none")
    assert_close(losses[:, 1], expected)


@pytest.mark.parametrize("has_begin", [False, True])
def test_rows_are_pieces_of_the_text(has_begin):
    cfg = demo_streaming.Config(windows=3, streams=4)
    rows = demo_streaming.cut_rows(torch.arange(300), cfg, 8, has_begin)
    assert rows.shape == (4, 25)
    pieces = rows[:, 1:] if has_begin else rows
    assert torch.equal(pieces[:, 1:], pieces[:, :-1] + 1)
    assert len(set(pieces[:, 0].tolist())) == 4
    assert pieces[0, 0] == 0
    if has_begin:
        assert (rows[:, 0] == demo_streaming.BEGIN).all()


def test_too_short_a_text_is_refused(capsys):
    cfg = demo_streaming.Config(windows=40, streams=4)
    with pytest.raises(SystemExit):
        demo_streaming.cut_rows(torch.arange(300), cfg, 8, has_begin=False)
    assert "--windows=40" in capsys.readouterr().err


def test_the_comparison_is_paired():
    losses = torch.tensor([[3.0, 5.0], [1.0, 3.0], [1.0, 3.5], [1.0, 3.0]])
    table = demo_streaming.compare(losses).tolist()
    assert table[0] == [4.0, 2.0, 0.0]
    assert table[1] == [2.0, 0.0, 0.0]
    assert table[2] == pytest.approx([2.25, 0.25, 2 * 0.125**0.5 / 2**0.5])
    assert table[3] == [2.0, 0.0, 0.0]


def test_the_weight_on_the_first_tokens_is_a_share():
    model = make_streaming()
    rows = tokens(4, 8)
    everything = demo_streaming.weight_on_first(model, rows, sink=8)
    assert_close(everything, torch.ones(8))  # each row of weights sums to 1

    share = demo_streaming.weight_on_first(model, rows, sink=2)
    by_hand = model.h[1].attn.weights[:, 3, 4:, :2].sum(dim=-1).mean()
    assert share.shape == (8,)
    assert_close(share[7], by_hand)
    assert share.min() > 0
    assert share.max() < 1


def test_the_rolling_buffer_reads_20_windows_in_constant_memory(monkeypatch):
    row = tokens(1, 161)
    cfg = demo_streaming.Config(windows=20, sink=2)
    reader = demo_streaming.make_readers(make_streaming(), cfg)["window + sinks"]
    result = demo_streaming.stream(reader, row)
    assert result.bytes == 2 * 2 * 1 * 2 * 8 * 4 * 4  # k and v, layers, B, G, tokens, D, bytes
    logits, _ = reader(row[:, :-1])
    assert result.loss == pytest.approx(F.cross_entropy(logits[0], row[0, 1:]).item(), rel=1e-4)
    assert result.difference < 1e-4 * result.loss

    # A cache that grows does not pass.
    read = demo_streaming.read

    def read_and_grow(*args, **kwargs):
        losses, cache = read(*args, **kwargs)
        cache.k = torch.cat([cache.k, cache.k], dim=3)
        return losses, cache

    monkeypatch.setattr(demo_streaming, "read", read_and_grow)
    with pytest.raises(AssertionError, match="the cache grew"):
        demo_streaming.stream(reader, row)


def test_the_small_model_learns_what_follows_the_begin_token():
    """The text is "abcabc...". After BEGIN any letter may come, and then the next one is known."""
    cfg = demo_streaming.Config(steps=60, block_size=8, batch_size=8)
    ids = torch.arange(600) % 3 + 97
    model = demo_streaming.train_small(ids, cfg, "cpu", RecordingLog(), first_step=0)
    logits, _ = model(torch.tensor([[demo_streaming.BEGIN, 97, 98, 99]]))
    probabilities = logits[0].softmax(dim=-1)
    assert probabilities[0, 97:100].min() > 0.15
    assert probabilities[1:].argmax(dim=-1).tolist() == [98, 99, 97]
    assert probabilities[2, 99] > 0.9


def test_a_size_that_cannot_be_divided_is_one_line(capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(demo_kv_cache.Config, argv=["--n_embd=100"])
    assert error.value.code == 2
    message = "error: n_embd=100 must be divisible by 2 * n_head = 16\n"
    assert capsys.readouterr().err == message


def test_a_checkpoint_of_another_part_is_refused(tmp_path, capsys):
    save_checkpoint(tmp_path / "gpt.pt", kind="gpt", gpt_config={"n_layer": 2}, weights={})
    cfg = demo_streaming.Config(init=str(tmp_path / "gpt.pt"))
    with pytest.raises(SystemExit):
        demo_streaming.load_model(cfg, "cpu")
    assert "must be a checkpoint of part_3/train.py" in capsys.readouterr().err


def test_the_checkpoint_of_train_is_loaded(tmp_path):
    cfg = GPTConfig(**SIZES)
    model = make_model(cfg)
    weights = model.state_dict()
    save_checkpoint(tmp_path / "gpt.pt", kind="gpt", gpt_config=asdict(cfg), weights=weights)
    loaded = demo_streaming.load_model(demo_streaming.Config(init=str(tmp_path / "gpt.pt")), "cpu")
    assert loaded.cfg.window == 8
    idx = tokens(2, 8) % 256
    assert_close(loaded(idx)[0], model(idx)[0])


def test_demo_streaming_runs(made):
    metrics = read_metrics(made, "streaming")
    assert metrics["ways"] == demo_streaming.WAYS
    for key in ("part_3", "small"):
        assert metrics[f"ring_difference_{key}"] < 1e-3
        table = dict(zip(metrics["ways"], metrics[f"table_{key}"]))
        assert table["recomputation"][1:3] == [0, 0]
        assert table["window"][4] == table["window + sinks"][4]
        assert table["dense"][4] == 4 * table["window"][4]
        assert all(row[3] > 0 for row in table.values())
    assert metrics["table_part_3"] != metrics["table_small"]
    assert metrics["ring_bytes_part_3"] == 2 * 2 * 2 * 8 * 8 * 4
    assert "rolling buffer" in made[1]
    assert (made[0] / "demo_streaming_loss.png").exists()
    assert (made[0] / "demo_streaming_attention.png").exists()
