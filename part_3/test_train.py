"""Tests of train.py: its data, its evaluation, its clock, and the script as a user runs it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import random
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from model import GPT, GPTConfig
from shared import load_checkpoint

SCRIPT = Path(train.__file__)
CPU = torch.device("cpu")

SIZES = dict(block_size=16, n_layer=1, n_embd=16, n_head=2, n_kv_head=1)
TRAINING = dict(steps=6, eval_every=4, batch_size=4, lr=0.03, grad_clip=0.05, seed=5)


def make_text():
    """900 words. Some of their characters have two or three bytes."""
    words = "the a fox dog né Mia Tom ran 言 hid".split()
    return " ".join(random.Random(0).choices(words, k=900))


def as_options(**values):
    return [f"--{name}={value}" for name, value in values.items()]


def run(*options):
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True)


def make_model(seed=0, **sizes):
    """A model whose output projections are not zero, so that its attention matters."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SIZES, **sizes}))
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    return model.requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("text", ["", "abc", "né 言\n", "\x00\U0001f600"])
def test_decode_inverts_encode(text):
    assert train.encode(text) == list(text.encode())
    assert train.decode(train.encode(text)) == text


def test_what_has_no_utf8_is_replaced():
    assert train.decode(train.encode("a\ud800b")) == "a?b"
    assert train.decode([97, 195]) == "a\ufffd"


def test_the_last_tenth_of_a_users_text_is_held_out(tmp_path):
    text = make_text()
    (tmp_path / "text.txt").write_text(text)
    cfg = train.Config(data=str(tmp_path / "text.txt"))
    data = train.load_data(cfg, GPTConfig(**SIZES))

    split = len(text) * 9 // 10  # in characters, so that none of them is cut
    assert bytes(data.train_ids.tolist()) == text[:split].encode()
    assert bytes(data.val_ids.tolist()) == text[split:].encode()
    assert data.entropy is None


def test_the_world_has_a_text_of_its_own_for_validation(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("train né " * 30)
    (tmp_path / "val.txt").write_text("held out 言 " * 30)
    (tmp_path / "facts.json").write_text('{"true_nats_per_byte": 0.125}')
    monkeypatch.setattr(train, "require", lambda path: tmp_path)
    data = train.load_data(train.Config(), GPTConfig(**SIZES))
    assert bytes(data.train_ids.tolist()) == ("train né " * 30).encode()
    assert bytes(data.val_ids.tolist()) == ("held out 言 " * 30).encode()
    assert data.entropy == 0.125


def test_a_batch_is_text_and_the_same_text_one_byte_later():
    ids = torch.arange(1000)
    x, y = train.get_batch(ids, 3, train.Config(batch_size=50), 16)
    assert x.shape == y.shape == (50, 16)
    assert torch.equal(y, x + 1)
    assert torch.equal(x[:, 1:], x[:, :-1] + 1)


def test_a_batch_depends_on_seed_and_step_alone():
    ids = torch.arange(1000)
    first, _ = train.get_batch(ids, 3, train.Config(), 16)
    torch.manual_seed(7)
    again, _ = train.get_batch(ids, 3, train.Config(), 16)
    assert torch.equal(first, again)

    # With seed + step as the seed of a batch, neighbouring seeds would see the same batches.
    seen = set()
    for seed in range(4):
        for step in range(4):
            x, _ = train.get_batch(ids, step, train.Config(seed=seed), 16)
            seen.add(tuple(x[:, 0].tolist()))
    assert len(seen) == 16


def test_batches_reach_the_first_and_the_last_byte():
    ids = torch.arange(20)
    x, y = train.get_batch(ids, 0, train.Config(batch_size=200), 16)
    assert x.min() == 0
    assert y.max() == 19


# --------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("length", [2, 9, 16, 17, 18, 33, 40])
def test_the_blocks_cover_every_byte_once(length):
    ids = torch.arange(length)
    targets = []
    for x, y in train.split_blocks(ids, 16):
        assert torch.equal(y, x + 1)
        targets += y.flatten().tolist()
    assert targets == list(range(1, length))


def evaluate_by_hand(model, ids, block_size):
    """The loss and the accuracy, block by block, with every block alone."""
    losses = []
    hits = []
    for start in range(0, len(ids) - 1, block_size):
        block = ids[start : start + block_size + 1]
        logits, _ = model(block[None, :-1])
        losses.append(F.cross_entropy(logits[0], block[1:], reduction="none"))
        hits.append(logits[0].argmax(dim=-1) == block[1:])
    return torch.cat(losses).mean().item(), torch.cat(hits).float().mean().item()


@pytest.mark.parametrize("length", [10, 17, 64 * 16 + 1, 64 * 16 + 2, 2500])
def test_evaluation_is_the_mean_over_all_bytes(length):
    """Also where the last block is not full, and where the text needs several batches."""
    model = make_model()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(97, 101, (length,), generator=generator)
    model.lm_head.weight[97:101] += 0.2  # so that some guesses are right
    loss, accuracy = evaluate_by_hand(model, ids, 16)
    val = train.evaluate(model, ids, 16, CPU)
    assert val.loss == pytest.approx(loss, rel=1e-4)
    assert val.accuracy == pytest.approx(accuracy, abs=1.5 / length)


# --------------------------------------------------------------------------------------------------
# What the cache saves


def test_generating_without_the_cache_reads_the_whole_context_again():
    model = make_model()
    prompt = torch.randint(256, (2, 5), generator=torch.Generator().manual_seed(1))
    lengths = []
    forward = model.forward

    def recording_forward(idx, targets=None, cache=None):
        assert cache is None
        lengths.append(idx.size(1))
        return forward(idx, targets, cache)

    model.forward = recording_forward
    out = train.generate_without_cache(model, prompt, 14)
    assert lengths == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 16, 16]

    model.forward = forward
    assert torch.equal(out[:, :16], model.generate(prompt, 11, temperature=0))


def test_the_two_times_are_not_mixed_up():
    """A model whose cached way takes 10 ms per token, and the other one 40 ms."""

    class SlowModel:
        cfg = SimpleNamespace(block_size=6)

        def generate(self, idx, max_new_tokens, temperature):
            time.sleep(0.01 * max_new_tokens)
            return torch.cat([idx, torch.zeros(1, max_new_tokens, dtype=torch.long)], dim=1)

        def __call__(self, idx):
            time.sleep(0.04)
            return F.one_hot(torch.zeros_like(idx), 3).float(), None

    cached_ms, uncached_ms = train.time_generation(SlowModel(), torch.zeros(1, 2, dtype=torch.long))
    assert 10 <= cached_ms < 40 <= uncached_ms


# --------------------------------------------------------------------------------------------------
# The script


def train_by_hand(text, gpt_cfg, cfg, clip=True):
    """The same training, written down once more -> the model, and the loss of each step."""
    split = len(text) * 9 // 10
    ids = torch.tensor(list(text[:split].encode()))
    torch.manual_seed(cfg.seed)
    model = GPT(gpt_cfg)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    losses = []
    for step in range(cfg.steps):
        x, y = train.get_batch(ids, step, cfg, gpt_cfg.block_size)
        logits, _ = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        for p in model.parameters():
            p.grad = None
        loss.backward()
        if clip:
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            for p in model.parameters():
                p.grad *= min(1, cfg.grad_clip / norm)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One run of the script: the process, and its output folder."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "text.txt").write_text(make_text())
    options = as_options(**SIZES, **TRAINING)
    done = run(f"--data={folder / 'text.txt'}", f"--out={folder}", *options)
    assert done.returncode == 0, done.stderr
    return done, folder


@pytest.fixture(scope="module")
def checkpoint(made):
    return load_checkpoint(made[1] / "gpt.pt", "gpt")


@pytest.fixture(scope="module")
def trained(checkpoint):
    """The model in the checkpoint."""
    model = GPT(GPTConfig(**checkpoint["gpt_config"]))
    model.load_state_dict(checkpoint["weights"])
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def metrics(made):
    return json.loads((made[1] / "metrics.json").read_text())


@pytest.fixture(scope="module")
def log(made):
    lines = (made[1] / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_script_trains_as_it_says(log, trained):
    """The losses and the final weights are those of the same training by hand: one step after the
    other, on the right batches, with gradients that are clipped and do not add up."""
    cfg = train.Config(**TRAINING)
    model, losses = train_by_hand(make_text(), GPTConfig(**SIZES), cfg)
    assert [record["step"] for record in log] == list(range(6))
    assert [record["loss"] for record in log] == pytest.approx(losses, rel=1e-4)
    for name, p in model.state_dict().items():
        scale = p.abs().max().item()
        torch.testing.assert_close(trained.state_dict()[name], p, rtol=1e-2, atol=1e-2 * scale)

    # The comparison would notice if the gradients were not clipped.
    _, unclipped = train_by_hand(make_text(), GPTConfig(**SIZES), cfg, clip=False)
    assert losses != pytest.approx(unclipped, rel=1e-3)


def test_it_is_evaluated_on_the_validation_text(log, trained, metrics):
    evaluated = [record["step"] for record in log if "val_loss" in record]
    assert evaluated == [3, 5]  # every 4 steps, and after the last

    text = make_text()
    val_ids = torch.tensor(list(text[len(text) * 9 // 10 :].encode()))
    loss, accuracy = evaluate_by_hand(trained, val_ids, 16)
    assert metrics["val_loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["val_accuracy"] == pytest.approx(accuracy, abs=2 / len(val_ids))
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert log[-1]["val_loss"] == metrics["val_loss"]
    assert metrics["val_loss"] < math.log(256) - 0.5  # it has learned something


def test_the_checkpoint_and_the_metrics_say_how_they_were_made(checkpoint, trained, metrics):
    assert checkpoint["config"]["lr"] == TRAINING["lr"]
    assert checkpoint["step"] == 6
    assert checkpoint["changed"]["n_layer"] == 1
    assert "seed" in checkpoint["changed"]
    assert metrics["params"] == sum(p.numel() for p in trained.parameters())
    assert metrics["seed"] == 5
    assert metrics["steps"] == 6
    assert metrics["seconds"] > 0
    assert metrics["cached_ms"] > 0
    assert metrics["uncached_ms"] > 0


def test_it_shows_what_it_learned(made, metrics):
    done, folder = made
    assert (folder / "train.png").stat().st_size > 0
    assert f"{metrics['val_loss']:.3f} nats per byte on new text" in done.stdout
    assert "with the cache" in done.stdout
    for name in train.SAMPLING:
        assert done.stdout.count(f"  {name} ") == 2  # before and after


def test_options_reach_the_model_and_the_optimizer(tmp_path):
    """Without a limit on the gradient, without QK-norm, with as many key/value heads as heads."""
    (tmp_path / "text.txt").write_text(make_text())
    sizes = {**SIZES, "n_kv_head": 2, "qk_norm": 0, "norm_eps": 0.01}
    training = {**TRAINING, "grad_clip": 1e9, "lr": 0.01, "batch_size": 3, "seed": 1}
    options = as_options(**sizes, **training)
    done = run(f"--data={tmp_path / 'text.txt'}", f"--out={tmp_path}", *options)
    assert done.returncode == 0, done.stderr

    cfg = train.Config(**training)
    gpt_cfg = GPTConfig(**{**sizes, "qk_norm": False})
    model, losses = train_by_hand(make_text(), gpt_cfg, cfg, clip=False)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(losses, rel=1e-4)
    saved = load_checkpoint(tmp_path / "gpt.pt", "gpt")
    assert saved["weights"].keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "option, message",
    [
        ("--data=no.txt", "no.txt"),
        ("--data=empty.txt", "empty"),
        ("--data=short.txt", "do not fill one block"),
        ("--n_head=3", "n_head=3"),
        ("--vocab_size=100", "vocab_size=100"),
        ("--steps=0", "steps=0"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, option, message):
    (tmp_path / "text.txt").write_text(make_text())
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("too short")
    option = option.replace("--data=", f"--data={tmp_path}/")
    options = as_options(**SIZES, data=tmp_path / "text.txt", out=tmp_path / "out")
    done = run(*options, option)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
