"""
Tests of part_2/train.py: what a batch holds, what an evaluation reads, and the script as a user
runs it, with tiny sizes and with bad input.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import os
import random
import subprocess

import pytest
import torch
import torch.nn.functional as F

import train
from model import GPT, GPTConfig
from shared import load_checkpoint, parse_args
from train import Config, decode, encode, evaluate, get_batch, load_data, split_blocks

SCRIPT = Path(__file__).resolve().parent / "train.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
SIZES = dict(n_layer=1, n_embd=16, n_head=2, block_size=16)
TINY = ["--steps=6", "--batch_size=4"]
TINY += [f"--{name}={value}" for name, value in SIZES.items()]
CPU = torch.device("cpu")


def run(*options):
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=ENV)


@pytest.fixture
def text(tmp_path):
    words = "the a fox dog né Mia Tom ran 言 hid".split()
    content = " ".join(random.Random(0).choices(words, k=900))
    path = tmp_path / "text.txt"
    path.write_text(content, encoding="utf-8")
    return path


def tiny_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES))
    for p in model.parameters():  # projections that start at zero would hide the attention
        p.data += 0.2 * torch.randn(p.shape)
    return model


# data ---------------------------------------------------------------------------------------------


def test_encode_and_decode_any_text():
    assert encode("né") == [110, 195, 169]
    for text in ("", "né 言 \n", "\U0001f600"):
        assert decode(encode(text)) == text
    assert decode([195]) == "\ufffd"  # half a character


def test_validation_text_follows_the_training_text(text):
    data = load_data(Config(data=str(text)), GPTConfig(**SIZES))
    whole = text.read_text(encoding="utf-8")
    split = int(0.9 * len(whole))
    assert decode(data.train_ids.tolist()) == whole[:split]
    assert decode(data.val_ids.tolist()) == whole[split:]
    assert data.entropy is None


def test_the_built_in_world_has_its_own_validation_text(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("né 言 " * 30, encoding="utf-8")
    (tmp_path / "val.txt").write_text("Mia ran. " * 30, encoding="utf-8")
    (tmp_path / "facts.json").write_text('{"true_nats_per_byte": 0.25}')
    monkeypatch.setattr(train, "require", lambda path: tmp_path)
    data = load_data(Config(), GPTConfig(**SIZES))
    assert bytes(data.train_ids.tolist()) == ("né 言 " * 30).encode()
    assert bytes(data.val_ids.tolist()) == b"Mia ran. " * 30
    assert data.entropy == 0.25


def test_targets_are_the_inputs_shifted_by_one():
    ids = torch.arange(1000)
    x, y = get_batch(ids, 3, Config(batch_size=5), 16)
    assert x.shape == y.shape == (5, 16)
    assert torch.equal(y, x + 1)  # the byte after n is n + 1 in this text
    assert torch.equal(x[:, 1:], x[:, :-1] + 1)  # a row is one piece of the text


def test_a_batch_depends_on_seed_and_step_alone():
    ids = torch.arange(1000)
    first, _ = get_batch(ids, 3, Config(batch_size=5), 16)
    torch.rand(7)  # other random numbers must not matter
    again, _ = get_batch(ids, 3, Config(batch_size=5), 16)
    next_step, _ = get_batch(ids, 4, Config(batch_size=5), 16)
    next_seed, _ = get_batch(ids, 3, Config(batch_size=5, seed=1), 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, next_step)
    assert not torch.equal(first, next_seed)
    assert not torch.equal(next_step, next_seed)  # seed 1 is not seed 0, one step later


def test_batches_reach_every_position():
    ids = torch.arange(40)
    seen = set()
    for step in range(200):
        _, y = get_batch(ids, step, Config(batch_size=4), 16)
        seen |= set(y.flatten().tolist())
    assert seen == set(range(1, 40))  # only the first byte is never a target


# evaluation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 15, 16, 17, 40])
def test_blocks_predict_every_byte_but_the_first_once(n):
    ids = torch.arange(n + 1)
    targets = []
    for x, y in split_blocks(ids, 16):
        assert torch.equal(y, x + 1)
        assert x.size(1) <= 16
        targets += y.flatten().tolist()
    assert targets == list(range(1, n + 1))


def test_evaluate_against_one_block_at_a_time():
    """Every byte counts once, those of the last, shorter block too."""
    model = tiny_model()
    n = 64 * 16 + 53  # more than one piece, and a rest
    ids = torch.randint(256, (n,), generator=torch.Generator().manual_seed(1))
    nats = 0.0
    correct = 0
    for start in range(0, n - 1, 16):
        x = ids[None, start : min(start + 16, n - 1)]
        y = ids[None, start + 1 : start + 17]
        logits, _ = model(x)
        nats += F.cross_entropy(logits[0], y[0], reduction="sum").item()
        correct += (logits.argmax(dim=-1) == y).sum().item()
    result = evaluate(model, ids, 16, CPU)
    assert result.loss == pytest.approx(nats / (n - 1), rel=1e-5)
    assert result.accuracy == pytest.approx(correct / (n - 1), abs=2e-3)


# the script ---------------------------------------------------------------------------------------


def test_show_samples(capsys):
    """One line for each way of sampling. It continues the prompt and does not repeat it."""
    model = tiny_model()
    prompt = torch.tensor([encode("né 言")])  # 7 bytes
    train.show_samples("After 6 steps", model, prompt)
    printed = capsys.readouterr().out
    assert "After 6 steps, the model continues 'né 言' with:" in printed
    for name in train.SAMPLING:
        assert f"  {name} " in printed
    continuation = model.generate(prompt, 120, temperature=0.0)[0, 7:]
    assert repr(decode(continuation.tolist())) in printed


def test_draw(tmp_path, monkeypatch):
    """The lines are the losses, the loss of knowing only the frequencies, and the true entropy."""
    figures = []
    monkeypatch.setattr(train, "save_figure", lambda fig, path: figures.append(fig))
    records = [
        {"step": 0, "loss": 5.0},
        {"step": 1, "loss": 4.0, "val_loss": 4.5},
        {"step": 2, "loss": 3.0},
    ]
    ids = torch.tensor(encode("aabc"))  # a half, a quarter, a quarter: 1.5 bits
    train.draw(records, "title", ids, 0.25, tmp_path / "train.png")
    train.draw(records, "title", ids, None, tmp_path / "train.png")

    lines = figures[0].axes[0].lines
    assert lines[0].get_xydata().tolist() == [[0, 5.0], [1, 4.0], [2, 3.0]]
    assert lines[1].get_xydata().tolist() == [[1, 4.5]]
    assert float(lines[2].get_ydata()[0]) == pytest.approx(1.5 * math.log(2), rel=1e-5)
    assert float(lines[3].get_ydata()[0]) == 0.25
    assert len(figures[1].axes[0].lines) == 3  # nobody knows the entropy of a user's text


def replay(cfg, data, gpt_cfg):
    """The same training once more, written plainly -> its losses, and the model's evaluation on the
    validation text after each step."""
    torch.manual_seed(cfg.seed)
    model = GPT(gpt_cfg)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    losses = []
    evaluations = []
    for step in range(cfg.steps):
        x, y = get_batch(data.train_ids, step, cfg, gpt_cfg.block_size)
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        if norm > cfg.grad_clip:
            for p in model.parameters():
                p.grad *= cfg.grad_clip / norm
        optimizer.step()
        losses.append(loss.item())
        evaluations.append(evaluate(model, data.val_ids, gpt_cfg.block_size, CPU))
    return losses, evaluations


RUNS = {
    "defaults": {},
    "other options": {"lr": 0.03, "seed": 5, "grad_clip": 0.05},
    "no clipping": {"lr": 0.03, "grad_clip": 1e9},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_a_run_is_the_training_that_it_says(tmp_path, text, options):
    out = tmp_path / "out"
    given = [f"--{name}={value}" for name, value in options.items()]
    result = run(f"--data={text}", f"--out={out}", "--eval_every=4", *given, *TINY)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert (out / "train.png").exists()

    # the losses are those of the same steps, replayed
    cfg = Config(data=str(text), steps=6, batch_size=4, **options)
    gpt_cfg = GPTConfig(vocab_size=256, **SIZES)
    data = load_data(cfg, gpt_cfg)
    losses, evaluations = replay(cfg, data, gpt_cfg)
    assert [record["step"] for record in log] == list(range(6))
    assert [record["loss"] for record in log] == pytest.approx(losses, rel=1e-4)

    # evaluations read the validation text, after every fourth step and after the last one
    evaluated = [record for record in log if "val_loss" in record]
    assert [record["step"] for record in evaluated] == [3, 5]
    assert evaluated[0]["val_loss"] == pytest.approx(evaluations[3].loss, rel=1e-4)
    assert evaluated[1]["val_loss"] == pytest.approx(evaluations[5].loss, rel=1e-4)
    assert evaluated[1]["val_accuracy"] == pytest.approx(evaluations[5].accuracy, abs=5e-3)

    # the checkpoint on disk holds the model that metrics.json describes
    checkpoint = load_checkpoint(out / "gpt.pt", "gpt")
    saved = GPT(GPTConfig(**checkpoint["gpt_config"]))
    saved.load_state_dict(checkpoint["weights"])
    val = evaluate(saved, data.val_ids, gpt_cfg.block_size, CPU)
    assert metrics["val_loss"] == pytest.approx(val.loss, rel=1e-5)
    assert metrics["val_accuracy"] == pytest.approx(val.accuracy, abs=5e-3)
    assert metrics["perplexity"] == pytest.approx(math.exp(val.loss), rel=1e-4)
    assert metrics["params"] == sum(p.numel() for p in saved.parameters())
    assert checkpoint["step"] == metrics["steps"] == 6
    assert checkpoint["config"]["seed"] == metrics["seed"] == cfg.seed
    assert checkpoint["changed"]["batch_size"] == 4

    # the samples continue the start of the validation text
    prompt = repr(decode(data.val_ids[:8].tolist()))
    assert f"Before training, the model continues {prompt}" in result.stdout
    assert f"After 6 steps, the model continues {prompt}" in result.stdout


def check_error(capsys, message):
    """The last thing printed is one line of error with this message in it."""
    error = capsys.readouterr().err
    assert error.startswith("error: "), error
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("option", ["n_head=3", "steps=0", "batch_size=0", "eval_every=0"])
def test_bad_options_are_one_line(capsys, option):
    with pytest.raises(SystemExit) as exit_info:
        parse_args(Config, GPTConfig, argv=[f"--{option}"])
    assert exit_info.value.code == 2
    check_error(capsys, option)


CASES = [("missing.txt", "missing.txt"), ("empty.txt", "empty"), ("short.txt", "block")]


@pytest.mark.parametrize("name, message", CASES)
def test_a_bad_text_is_one_line(tmp_path, capsys, name, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(SystemExit) as exit_info:
        load_data(Config(data=str(tmp_path / name)), GPTConfig(**SIZES))
    assert exit_info.value.code == 2
    check_error(capsys, message)


def test_a_small_vocabulary_is_one_line(text, capsys):
    with pytest.raises(SystemExit) as exit_info:
        load_data(Config(data=str(text)), GPTConfig(vocab_size=99, **SIZES))
    assert exit_info.value.code == 2
    check_error(capsys, "vocab_size=99")


def test_the_script_ends_with_one_line_and_writes_nothing(tmp_path):
    out = tmp_path / "out"
    result = run(f"--data={tmp_path / 'missing.txt'}", f"--out={out}", *TINY)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not out.exists()
