"""
Tests of train.py and train_ddp.py: their functions, and the scripts as a user runs them. Some runs
are killed and resumed, interrupted, run by two processes, or given bad input.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import os
import random
import signal
import socket
import subprocess
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
import train_ddp
from model import GPT, GPTConfig
from shared import load_checkpoint, parse_args, save_checkpoint
from tokenizer import Tokenizer
from train import Config, Muon, make_optimizers, orthogonalize

PART = Path(train.__file__).resolve().parent
CPU = torch.device("cpu")
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
SIZES = dict(vocab_size=13, block_size=16, n_layer=2, n_head=4, n_embd=16, n_kv_head=2)


def make_model(seed=0, **sizes):
    """A model whose parameters are all random, its output projections, too."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(GPTConfig(**{**SIZES, **sizes}))
    for p in model.parameters():
        is_gain = p.ndim == 1
        noise = 0.2 * torch.randn(p.shape, generator=generator)
        p.data = noise + 1 if is_gain else noise
    return model


def tokens(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SIZES["vocab_size"], shape, generator=generator)


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected, precision=1e-5):
    """The same up to rounding, relative to the largest number."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=precision * scale)


# the data -----------------------------------------------------------------------------------------


def write_world(folder, stories):
    """A world in which the validation text has the training stories in reverse order, one word
    ("zqzqzq") more, and the instructions have a word ("jxjxjx") that no story has."""
    (folder / "train.txt").write_text("\n\n".join(stories))
    (folder / "val.txt").write_text("\n\n".join([*stories[::-1], "zqzqzq zqzqzq"]))
    (folder / "facts.json").write_text('{"true_nats_per_byte": 0.5}')
    record = {"instruction": "Say jxjxjx jxjxjx.", "input": "", "output": "No jxjxjx."}
    (folder / "instructions.jsonl").write_text(json.dumps(record))


@pytest.fixture
def stories(tmp_path, monkeypatch):
    """Twelve stories, whose folder load_data reads as the world."""
    stories = []
    for name in ("Mia", "Tomé", "言言"):
        for thing in ("fox", "dog", "hen", "cat"):
            stories.append(f"{name} saw a {thing}.")
    write_world(tmp_path, stories)
    monkeypatch.setattr(train, "require", lambda path: tmp_path)
    return stories


@pytest.mark.parametrize("vocab_size", [280, 260])
def test_rows_start_where_a_story_starts(stories, vocab_size):
    """Also when nothing is merged, and the blank line between two stories is several tokens."""
    gpt_cfg = GPTConfig(vocab_size=vocab_size, block_size=4)
    data = train.load_data(Config(), gpt_cfg)
    train_text = "\n\n".join(stories)
    val_text = "\n\n".join([*stories[::-1], "zqzqzq zqzqzq"])
    ids = data.train_ids.tolist()
    val_ids = data.val_ids.tolist()
    assert data.tok.decode(ids) == train_text
    assert data.tok.decode(val_ids) == val_text
    assert data.val_bytes == len(val_text.encode()) > len(val_text)
    assert data.entropy == 0.5
    assert gpt_cfg.vocab_size == data.tok.vocab_size == vocab_size

    # A row starts with the last token of a blank line, and all stories but the first and those that
    # are too near to the end have one.
    rows = []
    for start in data.starts.tolist():
        assert data.tok.decode(ids[: start + 1]).endswith("\n\n")
        rows.append(data.tok.decode(ids[start + 1 :]))
    expected = ["\n\n".join(stories[i:]) for i in range(1, len(stories))]
    assert rows == expected[: len(rows)]
    assert len(rows) >= len(expected) - 1

    # The rows of the evaluation cover the text, and end where a story ends.
    edges = data.edges.tolist()
    lengths = [end - start for start, end in zip(edges, edges[1:])]
    assert edges[0] == 0
    assert edges[-1] == len(val_ids) - 1
    assert min(lengths) >= 1
    assert max(lengths) <= 4
    beginnings = {data.tok.decode(val_ids[: edge + 1]) for edge in edges}
    for i in range(1, len(stories) + 1):
        assert "\n\n".join(stories[::-1][:i]) + "\n\n" in beginnings


def test_the_tokenizer_learns_from_training_text_and_instructions_only(stories):
    data = train.load_data(Config(), GPTConfig(vocab_size=400, block_size=4))
    assert len(data.tok.encode("zqzqzq")) == 6
    assert len(data.tok.encode(" jxjxjx")) == 1
    assert len(data.tok.encode(" saw")) == 1


def test_the_last_tenth_of_a_users_text_is_held_out(tmp_path):
    """The split is made in characters, so that none of them is cut."""
    train_text = "né eins zwei drei 言. " * 108
    val_text = "zqzqzq 言 " * 28
    assert len(train_text) == 9 * len(val_text)
    (tmp_path / "my.txt").write_text(train_text + val_text)
    gpt_cfg = GPTConfig(vocab_size=300, block_size=8)
    data = train.load_data(Config(data=str(tmp_path / "my.txt")), gpt_cfg)

    assert data.tok.decode(data.train_ids.tolist()) == train_text
    assert data.tok.decode(data.val_ids.tolist()) == val_text
    assert data.val_bytes == len(val_text.encode())
    assert data.entropy is None
    assert len(data.tok.encode("zqzqzq")) == 6  # the tokenizer has not seen the validation text

    # Rows start anywhere. The last row's last target is the last token.
    assert data.starts.tolist() == list(range(len(data.train_ids) - 8))
    lengths = data.edges.diff().tolist()
    assert set(lengths[:-1]) == {8}
    assert data.edges[-1] == len(data.val_ids) - 1


def test_row_edges_by_hand():
    assert train.row_edges([], 10, 4).tolist() == [0, 4, 8, 9]
    assert train.row_edges([3, 4, 13], 20, 4).tolist() == [0, 3, 4, 8, 12, 13, 17, 19]
    assert train.row_edges([19], 20, 100).tolist() == [0, 19]


def test_a_batch_is_text_and_the_same_text_one_token_later():
    ids = torch.arange(40)
    starts = torch.tensor([0, 3, 17, 31])
    x, y = train.get_batch(ids, starts, 7, Config(batch_size=64), 8)
    assert x.shape == (64, 8)
    assert torch.equal(y, x + 1)
    assert torch.equal(x[:, 1:], x[:, :-1] + 1)
    assert set(x[:, 0].tolist()) == {0, 3, 17, 31}
    assert y.max() == 39


def test_a_batch_depends_on_seed_and_step_alone():
    ids = torch.arange(10_000)
    starts = torch.arange(9_000)
    first, _ = train.get_batch(ids, starts, 7, Config(seed=3), 8)
    torch.manual_seed(5)
    again, _ = train.get_batch(ids, starts, 7, Config(seed=3), 8)
    assert torch.equal(first, again)

    # With seed + step as the seed of a batch, neighbouring seeds would see the same batches.
    seen = set()
    for seed in range(4):
        for step in range(4):
            x, _ = train.get_batch(ids, starts, step, Config(seed=seed), 8)
            seen.add(tuple(x[:, 0].tolist()))
    assert len(seen) == 16


# the schedule -------------------------------------------------------------------------------------


def test_lr_scale_warms_up_holds_and_decays():
    cfg = Config(steps=100, warmup=0.1, decay=0.5)
    scale = [train.lr_scale(step, cfg) for step in range(300)]
    assert scale[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert scale[9:51] == [1.0] * 42
    assert scale[50:101] == pytest.approx([1 - i / 50 for i in range(51)])
    assert scale[99] > 0
    assert scale[100:] == [0.0] * 200  # it never rises again


def test_lr_scale_without_warmup_and_decay_is_flat():
    cfg = Config(steps=3, warmup=0.0, decay=0.0)
    assert [train.lr_scale(step, cfg) for step in range(5)] == [1, 1, 1, 0, 0]


def test_set_lr_scales_every_optimizer_from_its_own_peak():
    optimizers = make_optimizers(make_model(), Config(lr=0.5, lr_adamw=0.25))
    for scale in (0.5, 0.1, 1.0):  # never from the last rate
        train.set_lr(optimizers, scale)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert rates == [0.5 * scale, 0.25 * scale, 0.25 * scale]


# Muon ---------------------------------------------------------------------------------------------


def newton_schulz_by_hand(matrix):
    """The same in float64 and by the definition: keep the singular vectors, and apply the
    polynomial to each singular value five times."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ vh


SHAPES = [(8, 64), (64, 8), (32, 96), (96, 32), (96, 256), (1, 7), (7, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalize_brings_all_singular_values_near_1(shape, scale):
    for seed in range(5):
        matrix = scale * normal(*shape, seed=seed)
        result = orthogonalize(matrix)
        assert result.shape == matrix.shape
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.6, (seed, values)
        assert values.max() < 1.3, (seed, values)


@pytest.mark.parametrize("shape", [*SHAPES, (48, 48)], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalize_applies_the_polynomial_to_the_singular_values(shape, scale):
    """In fp32 on a CPU: bf16 would miss this tolerance by far."""
    matrix = scale * normal(*shape)
    result = orthogonalize(matrix)
    assert result.dtype == torch.float32
    difference = (result - newton_schulz_by_hand(matrix)).norm() / result.norm()
    assert difference < 0.002


def test_orthogonalize_of_badly_conditioned_matrices():
    """Singular values between 1/100 of the norm and the norm come near 1, and the order of the rows
    and columns does not matter."""
    u, _, vh = torch.linalg.svd(normal(24, 40), full_matrices=False)
    matrix = u * torch.logspace(-2, 0, 24) @ vh
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert_close(orthogonalize(matrix.T), orthogonalize(matrix).T, precision=1e-4)
    assert_close(orthogonalize(-matrix), -orthogonalize(matrix), precision=1e-4)


def test_orthogonalize_of_zero_is_zero():
    assert torch.equal(orthogonalize(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_orthogonalize_keeps_the_dtype():
    assert orthogonalize(normal(3, 5).bfloat16()).dtype == torch.bfloat16
    assert orthogonalize(normal(3, 5).double()).dtype == torch.float64


def gradients_of_a_run(shape, steps):
    """One gradient per step, of different sizes, and related as the gradients of a run are."""
    common = normal(*shape, seed=100)
    return [(step + 1) * (common + normal(*shape, seed=step)) for step in range(steps)]


def apply(optimizer_class, shape, steps=6, lr=0.1, **options):
    """The weights (rows, columns) after some steps, from weights that are known."""
    p = torch.nn.Parameter(normal(*shape, seed=7))
    optimizer = optimizer_class([p], lr=lr, **options)
    for gradient in gradients_of_a_run(shape, steps):
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_muon_matches_its_equations(shape, weight_decay):
    """In float64: Nesterov momentum, the polynomial, an RMS of 0.2 lr, decoupled weight decay."""
    weights = normal(*shape, seed=7).double()
    mean = torch.zeros(shape, dtype=torch.float64)
    for gradient in gradients_of_a_run(shape, steps=6):
        mean = 0.9 * mean + 0.1 * gradient
        ahead = 0.9 * mean + 0.1 * gradient
        update = 0.2 * math.sqrt(max(shape)) * newton_schulz_by_hand(ahead)
        weights = weights - 0.1 * weight_decay * weights - 0.1 * update
    result = apply(Muon, shape, momentum=0.9, weight_decay=weight_decay)
    assert_close(result.double(), weights, precision=1e-3)


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_muon_matches_torch_within_the_precision_of_bf16(shape, weight_decay):
    """torch.optim.Muon computes the iteration in bf16."""
    theirs = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    expected = apply(theirs, shape, weight_decay=weight_decay)
    result = apply(Muon, shape, weight_decay=weight_decay)
    start = normal(*shape, seed=7)
    difference = (result - expected).norm() / (expected - start).norm()
    assert difference < 0.03


def test_an_update_of_muon_has_the_size_of_one_of_adamw():
    for shape in ((64, 64), (32, 96), (96, 32)):
        start = normal(*shape, seed=7)
        update = apply(Muon, shape, steps=1) - start
        assert update.square().mean().sqrt().item() == pytest.approx(0.2 * 0.1, rel=0.25)


def test_muon_leaves_parameters_without_a_gradient_alone():
    p = torch.nn.Parameter(normal(3, 5))
    Muon([p], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(p, normal(3, 5))


def names_of(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("tied", [False, True])
def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(tied):
    model = make_model(tied=tied)
    muon, adamw = make_optimizers(model, Config())
    matrices = []
    for layer in range(2):
        for name in ("c_q", "c_k", "c_v", "c_proj"):
            matrices.append(f"h.{layer}.attn.{name}.weight")
        for name in ("c_gate", "c_fc", "c_proj"):
            matrices.append(f"h.{layer}.mlp.{name}.weight")
    assert sorted(names_of(muon, model)) == sorted(matrices)
    all_names = [name for name, _ in model.named_parameters()]
    assert sorted(names_of(muon, model) + names_of(adamw, model)) == sorted(all_names)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_optimizers_get_their_options(weight_decay):
    """AdamW's own default is a weight decay of 0.01."""
    cfg = Config(lr=0.5, lr_adamw=0.25, weight_decay=weight_decay)
    muon, adamw = make_optimizers(make_model(), cfg)
    assert isinstance(muon, Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    for optimizer, lr in ((muon, 0.5), (adamw, 0.25)):
        for group in optimizer.param_groups:
            assert group["lr"] == group["peak_lr"] == lr
            are_gains = all(p.ndim == 1 for p in group["params"])
            assert group["weight_decay"] == (0 if are_gains else weight_decay)
    assert muon.param_groups[0]["momentum"] == 0.95
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95)


# gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accum", [1, 2, 4, 8])
def test_micro_batches_give_the_loss_and_gradient_of_the_whole_batch(accum):
    x = tokens(8, 16)
    y = tokens(8, 16, seed=2)
    expected = make_model()
    logits, _ = expected(x)
    expected_loss = F.cross_entropy(logits.transpose(1, 2), y)
    expected_loss.backward()

    model = make_model()
    loss = train.backward(model, x, y, Config(batch_size=8, accum=accum), nullcontext, NO_SCALER)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert not loss.requires_grad
    for p, expected_p in zip(model.parameters(), expected.parameters()):
        assert_close(p.grad, expected_p.grad)


def test_a_micro_batch_has_its_share_of_the_rows():
    model = make_model()
    shapes = []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    cfg = Config(batch_size=8, accum=4)
    train.backward(model, tokens(8, 16), tokens(8, 16), cfg, nullcontext, NO_SCALER)
    assert shapes == [(2, 16)] * 4


def test_the_forward_pass_runs_under_autocast():
    dtypes = []
    model = make_model()
    model.lm_head.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    cfg = Config(batch_size=4, accum=2)
    train.backward(model, tokens(4, 16), tokens(4, 16, seed=2), cfg, autocast, NO_SCALER)
    assert dtypes == [torch.bfloat16] * 2
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}

    dtypes.clear()
    edges = torch.tensor([0, 16])
    train.evaluate(model, tokens(17), edges, 17, CPU, autocast)
    assert dtypes == [torch.bfloat16]


def test_the_scaler_scales_the_gradient_but_not_the_loss():
    plain = make_model()
    scaled = make_model()
    batch = (tokens(4, 16), tokens(4, 16, seed=2), Config(batch_size=4, accum=2), nullcontext)
    loss = train.backward(plain, *batch, NO_SCALER)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_loss = train.backward(scaled, *batch, scaler)
    assert scaled_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for p, scaled_p in zip(plain.parameters(), scaled.parameters()):
        assert_close(scaled_p.grad, 1024 * p.grad)


def test_the_model_learns_a_batch_by_heart_and_generates_it():
    """With Muon in fp32 on a CPU. The first token says which of the four rows it is."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, "n_embd": 32}))
    batch = tokens(4, 13)
    batch[:, 0] = torch.arange(4)
    cfg = Config(batch_size=4, accum=2, lr=0.05, lr_adamw=0.01)
    optimizers = make_optimizers(model, cfg)
    for _ in range(80):
        loss = train.backward(model, batch[:, :-1], batch[:, 1:], cfg, nullcontext, NO_SCALER)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss < 0.05
    assert torch.equal(model.generate(batch[:, :1], 12, temperature=0), batch)


# evaluation ---------------------------------------------------------------------------------------


def evaluate_by_hand(model, ids, edges, n_bytes):
    """Row by row: the sum of -log p in float64, and the number of right guesses."""
    nats = 0.0
    correct = 0
    for start, end in zip(edges, edges[1:]):
        with torch.no_grad():
            logits, _ = model(ids[None, start:end])
        logits = logits[0].double()
        y = ids[start + 1 : end + 1]
        nats -= logits.log_softmax(dim=-1)[torch.arange(len(y)), y].sum().item()
        correct += (logits.argmax(dim=-1) == y).sum().item()
    return nats / n_bytes, correct / (len(ids) - 1)


@pytest.mark.parametrize("n", [2, 9, 16 * 64 + 1, 16 * 64 + 2, 16 * 150 + 5])
@pytest.mark.parametrize("ends", [[], [1], [5, 7, 700]], ids=str)
def test_evaluate_against_a_direct_sum(n, ends):
    """Also with rows of different lengths, and with several batches of rows."""
    model = make_model()
    ids = tokens(n)
    edges = train.row_edges([end for end in ends if end < n - 1], n, 16)
    loss, accuracy = evaluate_by_hand(model, ids, edges.tolist(), 777)
    val = train.evaluate(model, ids, edges, 777, CPU, nullcontext)
    assert val.loss == pytest.approx(loss, rel=1e-5)
    assert val.accuracy == pytest.approx(accuracy)


# resume points ------------------------------------------------------------------------------------


def test_a_resume_point_brings_everything_back(tmp_path):
    cfg, gpt_cfg = parse_args(Config, GPTConfig, argv=["--batch_size=4", "--steps=9"], **SIZES)
    model = GPT(gpt_cfg)
    optimizers = make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    train.set_lr(optimizers, 0.5)
    train.backward(model, tokens(4, 16), tokens(4, 16, seed=2), cfg, nullcontext, NO_SCALER)
    for optimizer in optimizers:
        optimizer.step()
    data = make_data("some text, " * 9)
    train.save_resume_point(tmp_path, 5, 1.5, cfg, data, model, optimizers, scaler)

    fresh = make_model(seed=3)
    fresh_optimizers = make_optimizers(fresh, cfg)
    fresh_scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    point = train.load_resume_point(tmp_path, cfg, gpt_cfg, data)
    assert point["seconds"] == 1.5
    assert train.resume_from(point, fresh, fresh_optimizers, fresh_scaler) == 5
    for name, p in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], p), name
    for optimizer, fresh_optimizer in zip(optimizers, fresh_optimizers):
        assert str(fresh_optimizer.state_dict()) == str(optimizer.state_dict())
    assert fresh_scaler.get_scale() == 8.0


def make_data(text):
    """What load_data makes of a text, as far as a resume point needs it."""
    tok = Tokenizer.train(text, 270)
    ids = torch.tensor(tok.encode(text))
    return train.Data(tok, ids, None, ids[:5], None, 0, None)


@pytest.mark.parametrize("part", ["tok", "train_ids", "val_ids"])
def test_a_resume_point_belongs_to_its_text_and_tokenizer(tmp_path, capsys, part):
    cfg, gpt_cfg = parse_args(Config, GPTConfig, argv=["--batch_size=4", "--steps=9"], **SIZES)
    model = GPT(gpt_cfg)
    data = make_data("some text, " * 9)
    train.save_resume_point(tmp_path, 5, 1.5, cfg, data, model, [], NO_SCALER)
    assert train.load_resume_point(tmp_path, cfg, gpt_cfg, data)["step"] == 5

    other = make_data("other words; " * 9)
    with pytest.raises(SystemExit) as error:
        changed = data._replace(**{part: getattr(other, part)})
        train.load_resume_point(tmp_path, cfg, gpt_cfg, changed)
    assert error.value.code == 2
    assert "was trained on another text" in capsys.readouterr().err


# the scripts --------------------------------------------------------------------------------------
# Importing torch takes seconds. So one process imports it, and makes a child for each run. `scaled`
# switches the GradScaler on, which the script itself does on a GPU only.

SERVER = """
import atexit
import functools
import json
import os
import runpy
import sys

import matplotlib.figure
import tiktoken
import torch
import torch._dynamo
import torch.utils.tensorboard

for line in sys.stdin:
    folder, script, scaled, argv = json.loads(line)
    child = os.fork()
    if child == 0:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
        if scaled:
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            torch.amp.GradScaler = lambda *args, **options: scaler
        sys.argv = [script, *argv]
        sys.path.insert(0, os.path.dirname(script))
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = 1
            sys.excepthook(*sys.exc_info())
        # As Python ends, but without taking torch down piece by piece.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code or 0)
    print(child, flush=True)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""

STEPS = 30
TINY = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=16, block_size=16, vocab_size=280)
TRAINING = dict(steps=STEPS, batch_size=4, eval_every=10, save_every=4)

# torchrun's variables must not reach a run that is not meant to have them.
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1")
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
    ENVIRONMENT.pop(name, None)


def make_text():
    words = "the a né dog hen Mia Tom 言 sat hid saw ate red big old".split()
    generator = random.Random(0)
    sentences = [" ".join(generator.choices(words, k=7)) for _ in range(150)]
    return ".\n".join(sentences)


def as_options(**values):
    return [f"--{name}={value}" for name, value in values.items()]


def options_for(out, *more):
    """A run of seconds on a text that stands beside `out`. Later options win."""
    text = out.parent / "text.txt"
    if not text.exists():
        text.write_text(make_text())
    return [*as_options(data=text, out=out, device="cpu", **TINY, **TRAINING), *more]


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=ENVIRONMENT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    yield process
    process.kill()
    process.communicate()


def start(server, out, *more, script="train.py", scaled=False):
    """Starts the script -> its process id. finish() waits for it."""
    request = [str(out.parent), str(PART / script), scaled, options_for(out, *more)]
    print(json.dumps(request), file=server.stdin, flush=True)
    return int(server.stdout.readline())


def finish(server, out):
    """Waits for the script that was started -> its exit code, stdout and stderr."""
    code = int(server.stdout.readline())
    return code, (out.parent / "stdout").read_text(), (out.parent / "stderr").read_text()


def run(server, out, *more, **how):
    """Runs the script, which must succeed -> its stdout."""
    start(server, out, *more, **how)
    code, stdout, stderr = finish(server, out)
    assert code == 0, stderr
    return stdout


def read_log(out):
    """The records of the log. The last line may still be in the making."""
    path = out / "log.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def column(records, name):
    return [record[name] for record in records if name in record]


@pytest.fixture(scope="module")
def straight(server, tmp_path_factory):
    """A run that nothing disturbs -> its folder and its stdout."""
    out = tmp_path_factory.mktemp("straight") / "out"
    stdout = run(server, out)
    return out, stdout


def test_it_learns_and_logs_every_step(straight):
    out, stdout = straight
    records = read_log(out)
    val_losses = column(records, "val_loss")
    assert column(records, "step") == list(range(STEPS))
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert [record["step"] for record in records if "val_loss" in record] == [9, 19, 29]
    assert val_losses[2] < val_losses[0]
    assert "elapsed" in stdout
    assert "cpu fp32" in stdout
    assert (out / "train.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob(".*")), "a temporary file was left"

    events = EventAccumulator(str(out)).Reload()
    for name in ("loss", "lr", "grad_norm", "val_loss", "val_accuracy"):
        logged = [event.value for event in events.Scalars(name)]
        assert logged == pytest.approx(column(records, name), rel=1e-6), name


def test_the_checkpoint_has_the_loss_that_the_metrics_state(straight):
    """Loaded from the disk, and evaluated by hand on the last tenth of the text."""
    out, _ = straight
    metrics = json.loads((out / "metrics.json").read_text())
    checkpoint = load_checkpoint(out / "base.pt", "base")
    model = GPT.load(checkpoint)
    tok = Tokenizer.load(checkpoint["tokenizer"])
    text = make_text()
    val_text = text[int(0.9 * len(text)) :]
    assert len(val_text.encode()) > len(val_text)

    ids = torch.tensor(tok.encode(val_text))
    edges = [*range(0, len(ids) - 1, 16), len(ids) - 1]
    loss, accuracy = evaluate_by_hand(model, ids, edges, len(val_text.encode()))
    assert metrics["val_loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["val_loss"] == read_log(out)[-1]["val_loss"]
    assert metrics["val_accuracy"] == pytest.approx(accuracy, abs=0.01)
    assert metrics["steps"] == checkpoint["step"] == STEPS
    assert metrics["params"] == sum(p.numel() for p in model.parameters())
    assert metrics["vocab_size"] == tok.vocab_size == model.cfg.vocab_size == 280
    assert metrics["true_nats_per_byte"] is None
    assert metrics["seconds"] > 0


def train_by_hand(cfg, gpt_cfg):
    """The loop of train.py once more, without accumulation, with the schedule, the clipping and
    AdamW's options written out -> [{"loss", "grad_norm", "lr"}] of all steps."""
    text = make_text()
    train_text = text[: int(0.9 * len(text))]
    tok = Tokenizer.train(train_text, gpt_cfg.vocab_size)
    ids = torch.tensor(tok.encode(train_text))
    starts = torch.arange(len(ids) - gpt_cfg.block_size)

    torch.manual_seed(cfg.seed)
    model = GPT(gpt_cfg)
    hidden = [p for name, p in model.named_parameters() if name[0] == "h" and p.ndim == 2]
    tables = [model.wte.weight, model.lm_head.weight]
    gains = [p for p in model.parameters() if p.ndim == 1]
    muon = Muon(hidden, lr=0.0, weight_decay=cfg.weight_decay)
    adamw = torch.optim.AdamW(tables, lr=0.0, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    adamw.add_param_group({"params": gains, "weight_decay": 0.0})

    records = []
    for step in range(cfg.steps):
        scale = 1.0
        if step + 1 < cfg.warmup * cfg.steps:
            scale = (step + 1) / (cfg.warmup * cfg.steps)
        if cfg.steps - step < cfg.decay * cfg.steps:
            scale = (cfg.steps - step) / (cfg.decay * cfg.steps)
        muon.param_groups[0]["lr"] = scale * cfg.lr
        for group in adamw.param_groups:
            group["lr"] = scale * cfg.lr_adamw

        x, y = train.get_batch(ids, starts, step, cfg, gpt_cfg.block_size)
        logits, _ = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        model.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        if norm > cfg.grad_clip:
            for p in model.parameters():
                p.grad *= cfg.grad_clip / norm
        muon.step()
        adamw.step()
        records.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": scale * cfg.lr})
    return records


HYPERPARAMETERS = dict(
    steps=12,
    batch_size=8,
    accum=2,
    lr=0.02,
    lr_adamw=0.01,
    weight_decay=1.0,
    warmup=0.25,
    decay=0.5,
    grad_clip=1.8,
    seed=3,
)


@pytest.mark.parametrize("grad_clip", [1.8, 1e9])
@pytest.mark.parametrize("scaled", [False, True])
def test_every_step_is_the_one_computed_by_hand(server, tmp_path, grad_clip, scaled):
    """Also with a scaler, which must have no effect in fp32: the gradient is unscaled before it is
    measured and clipped."""
    values = {**HYPERPARAMETERS, "grad_clip": grad_clip}
    out = tmp_path / "out"
    run(server, out, *as_options(**values), scaled=scaled)

    expected = train_by_hand(Config(**values), GPTConfig(**TINY))
    if grad_clip < 1e9:
        clipped = [record["grad_norm"] > grad_clip for record in expected]
        assert 2 < sum(clipped) < 12, "the test needs steps of both kinds"
    for name in ("loss", "grad_norm", "lr"):
        logged = column(read_log(out), name)
        assert logged == pytest.approx(column(expected, name), rel=1e-3), name


def test_bf16_is_used_and_trains_as_well(server, straight, tmp_path):
    out = tmp_path / "out"
    stdout = run(server, out, "--dtype=bf16")
    assert "cpu bf16" in stdout
    losses = column(read_log(out), "loss")
    fp32_losses = column(read_log(straight[0]), "loss")
    assert losses[0] == pytest.approx(fp32_losses[0], rel=0.01)
    assert losses[0] != pytest.approx(fp32_losses[0], rel=1e-7)
    assert losses[-1] == pytest.approx(fp32_losses[-1], rel=0.1)
    weights = load_checkpoint(out / "base.pt", "base")["weights"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_target_loss_stops_at_that_validation_loss(server, straight, tmp_path):
    """Training losses are nats per token, and far above it."""
    records = read_log(straight[0])
    val_losses = column(records, "val_loss")
    target = (val_losses[0] + val_losses[1]) / 2
    assert target < min(column(records, "loss"))

    out = tmp_path / "out"
    stdout = run(server, out, f"--target_loss={target}")
    assert f"target {target} reached: {val_losses[1]:.4f} nats per byte after 20 steps" in stdout
    assert len(read_log(out)) == 20
    assert load_checkpoint(out / "base.pt", "base")["step"] == 20
    assert json.loads((out / "metrics.json").read_text())["val_loss"] == val_losses[1]

    # A target between the validation loss and the training losses is reached at once.
    target = (max(val_losses) + min(column(records, "loss"))) / 2
    assert "after 10 steps" in run(server, tmp_path / "easy", f"--target_loss={target}")


def test_a_target_loss_that_is_not_reached(server, tmp_path):
    stdout = run(server, tmp_path / "out", "--steps=5", "--target_loss=0.01")
    assert "target 0.01 NOT reached" in stdout


def wait_for_step(out, step):
    for _ in range(60_000):
        if any(record["step"] >= step for record in read_log(out)):
            return
        time.sleep(0.005)
    pytest.fail((out.parent / "stderr").read_text())


def test_resuming_after_a_kill_gives_the_same_bits(server, straight, tmp_path):
    out = tmp_path / "out"
    child = start(server, out)
    wait_for_step(out, 5)
    os.kill(child, signal.SIGKILL)
    code, _, _ = finish(server, out)
    assert code == -signal.SIGKILL
    killed = load_checkpoint(out / "resume.pt", "resume")
    assert 4 <= killed["step"] < STEPS
    assert not (out / "base.pt").exists()

    # The second run cannot take 1,000 seconds by itself.
    point = torch.load(out / "resume.pt", weights_only=True)
    torch.save({**point, "seconds": 1000.0}, out / "resume.pt")
    run(server, out, "--resume")
    expected = load_checkpoint(straight[0] / "resume.pt", "resume")
    resumed = load_checkpoint(out / "resume.pt", "resume")
    for name, weight in expected["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
    assert str(resumed["optimizers"]) == str(expected["optimizers"])
    assert killed["seconds"] > 0
    assert resumed["seconds"] > 1000, "the seconds are those of both runs"
    assert read_log(out) == read_log(straight[0])


def test_ctrl_c_is_one_line_and_leaves_a_resume_point(server, tmp_path):
    out = tmp_path / "out"
    child = start(server, out, "--steps=100000", "--save_every=1")
    wait_for_step(out, 3)
    os.kill(child, signal.SIGINT)
    code, _, stderr = finish(server, out)
    assert code == 130
    assert stderr.startswith("error: interrupted")
    assert stderr.count("\n") == 1
    assert load_checkpoint(out / "resume.pt", "resume")["step"] >= 3
    assert not list(out.glob(".*")), "a temporary file was left"


# bad input ----------------------------------------------------------------------------------------

# {name: (options, a part of the one line)}; "FOLDER" is the folder of the files below.
BAD_INPUT = {
    "unknown": (["--stepz=3"], "no option --stepz, did you mean --steps?"),
    "type": (["--steps=three"], "--steps wants an int, got 'three'"),
    "accum": (["--accum=3"], "batch_size=4 must be divisible by accum=3"),
    "heads": (["--n_head=3"], "n_embd=16 must be divisible by n_head=3"),
    "layers": (["--n_layer=0"], "--n_layer=0 must be at least 1"),
    "device": (["--device=tpu"], "--device=tpu is not available here"),
    "dtype": (["--dtype=fp8"], "--dtype=fp8 is not possible"),
    "fp16": (["--dtype=fp16"], "--dtype=fp16 is not possible"),
    "missing": (["--data=nowhere.txt"], "there is no file nowhere.txt"),
    "empty": (["--data=FOLDER/empty.txt"], "empty.txt is empty"),
    "binary": (["--data=FOLDER/binary.txt"], "binary.txt is not UTF-8 text"),
    "short": (["--data=FOLDER/short.txt"], "do not fill one block of 16 + 1 tokens"),
    "vocabulary": (["--vocab_size=100"], "--vocab_size must be at least 260"),
    "never": (["--eval_every=0"], "eval_every=0 must be at least 1"),
    "file": (["--out=FOLDER/empty.txt"], "is a file, but it must be a folder"),
    "nan": (["--lr=1e20", "--lr_adamw=1e20"], "loss is nan at step"),
    "nothing": (["--resume"], "no checkpoint at"),
    "truncated": (["--resume"], "truncated or not a checkpoint of this project"),
    "foreign": (["--resume"], "truncated or not a checkpoint of this project"),
    "kind": (["--resume"], "is a 'base' checkpoint, expected 'resume'"),
    "sizes": (["--resume", "--n_layer=1"], "was written with other options"),
    "seed": (["--resume", "--seed=1", "--steps=60"], "was written with other options"),
    "rate": (["--resume", "--lr=0.5", "--steps=60"], "was written with other options"),
    "batch": (["--resume", "--batch_size=8", "--steps=60"], "was written with other options"),
    "text": (["--resume", "--data=FOLDER/other.txt", "--steps=60"], "was trained on another text"),
    "done": (["--resume"], "is already at step 30"),
}


@pytest.fixture(scope="module")
def bad_files(straight, tmp_path_factory):
    """A folder with every bad file that BAD_INPUT names; each case writes to its own NAME/out."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "short.txt").write_text("only a few words, " * 3)
    (folder / "other.txt").write_text(make_text().replace("e", "o"))

    for name in BAD_INPUT:
        (folder / name / "out").mkdir(parents=True)
    resume_point = (straight[0] / "resume.pt").read_bytes()
    for name in ("sizes", "seed", "rate", "batch", "text", "done"):
        (folder / name / "out/resume.pt").write_bytes(resume_point)
    half = resume_point[: len(resume_point) // 2]
    (folder / "truncated/out/resume.pt").write_bytes(half)
    torch.save([1, 2, 3], folder / "foreign/out/resume.pt")
    save_checkpoint(folder / "kind/out/resume.pt", kind="base")
    return folder


def assert_one_line(result, message):
    code, _, stderr = result
    assert code == 2, stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, stderr
    assert message in stderr


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_in_one_line(server, bad_files, name):
    options, message = BAD_INPUT[name]
    out = bad_files / name / "out"
    start(server, out, *[option.replace("FOLDER", str(bad_files)) for option in options])
    assert_one_line(finish(server, out), message)
    left = {path.name for path in out.iterdir() if "tfevents" not in path.name}
    assert left <= {"resume.pt", "log.jsonl"}


def test_the_distributed_script_without_torchrun_ends_in_one_line(server, tmp_path):
    out = tmp_path / "out"
    start(server, out, script="train_ddp.py")
    assert_one_line(finish(server, out), "start this script with torchrun")


# two processes ------------------------------------------------------------------------------------


def test_the_processes_share_the_rows_of_a_batch():
    batch = tokens(12, 5)
    for world in (1, 2, 3):
        shares = [train_ddp.share_of(batch, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat(shares), batch)
        assert {len(share) for share in shares} == {12 // world}


def test_a_batch_must_be_divisible_by_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    train_ddp.Config(batch_size=8, accum=4)
    with pytest.raises(AssertionError, match=r"batch_size=6 must be divisible by .* = 4"):
        train_ddp.Config(batch_size=6, accum=2)


# Each process has the gradient of the same stored batches.
WORKER = """
import os
import sys
from contextlib import nullcontext

sys.path[:0] = sys.argv[1:3]
import torch
import torch.distributed as dist
import train_ddp
from model import GPT

folder = sys.argv[3]
stored = torch.load(f"{folder}/stored.pt")
dist.init_process_group("gloo")
rank = dist.get_rank()
world = dist.get_world_size()
model = GPT.load(stored)
ddp_model = torch.nn.parallel.DistributedDataParallel(model)
scaler = torch.amp.GradScaler("cpu", enabled=False)

results = []
for x, y, accum in stored["batches"]:
    cfg = train_ddp.Config(batch_size=len(x), accum=accum)
    x = train_ddp.share_of(x, rank, world)
    y = train_ddp.share_of(y, rank, world)
    model.zero_grad()
    loss = train_ddp.backward(ddp_model, x, y, cfg, nullcontext, scaler)
    results.append((loss, [p.grad.clone() for p in model.parameters()]))
torch.save(results, f"{folder}/results.{rank}.pt")
dist.destroy_process_group()
"""


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """The batches have 8 rows, in 1, 2 and 4 micro-batches per process, and their rows differ."""
    batches = []
    for seed, accum in enumerate((1, 2, 4)):
        batches.append((tokens(8, 16, seed=seed), tokens(8, 16, seed=seed + 10), accum))
    model = make_model()
    torch.save({**model.to_checkpoint(), "batches": batches}, tmp_path / "stored.pt")
    (tmp_path / "worker.py").write_text(WORKER)

    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2")
    command = [sys.executable, tmp_path / "worker.py", PART, PART.parent, tmp_path]
    workers = []
    for rank in (0, 1):
        environment = {**ENVIRONMENT, **address, "RANK": str(rank)}
        worker = subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)
        workers.append(worker)
    for worker in workers:
        _, stderr = worker.communicate(timeout=240)
        assert worker.returncode == 0, stderr

    results = [torch.load(tmp_path / f"results.{rank}.pt") for rank in (0, 1)]
    for i, (x, y, _) in enumerate(batches):
        model.zero_grad()
        cfg = Config(batch_size=8)
        expected_loss = train.backward(model, x, y, cfg, nullcontext, NO_SCALER)
        losses = [results[rank][i][0] for rank in (0, 1)]
        assert_close(sum(losses) / 2, expected_loss)
        for rank in (0, 1):
            for p, gradient in zip(model.parameters(), results[rank][i][1], strict=True):
                assert_close(gradient, p.grad)


def test_the_script_under_torchrun(straight, tmp_path):
    """Two processes with two micro-batches each do the steps of one process, and each step is
    logged once."""
    out = tmp_path / "out"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    launcher += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    script = str(PART / "train_ddp.py")
    command = [sys.executable, *launcher, script, *options_for(out, "--accum=2")]
    done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 1

    records = read_log(out)
    expected = read_log(straight[0])
    assert column(records, "step") == list(range(STEPS))
    for name in ("loss", "grad_norm"):
        first = column(records, name)[:3]
        assert first == pytest.approx(column(expected, name)[:3], rel=1e-3), name
    losses = column(records, "val_loss")
    assert losses == pytest.approx(column(expected, "val_loss"), rel=0.02)
    checkpoint = load_checkpoint(out / "base.pt", "base")
    assert checkpoint["step"] == STEPS
    assert (out / "train.png").exists()
    assert (out / "metrics.json").exists()
