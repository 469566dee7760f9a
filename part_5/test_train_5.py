"""
Tests of Part 5's train.py and demo_moe.py: pytest part_5/test_train_5.py. A tiny run in a process of its own, and the
load-balancing loss at work on a router that starts out with a favourite.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import os
import random
import subprocess
from contextlib import nullcontext

import pytest
import torch

from demo_moe import information, table
from model import GPT, GPTConfig, MoE
from shared import load_checkpoint
from tokenizer import Tokenizer
from train import Config, backward, balance_loss, expert_load, make_optimizers

TRAIN = Path(__file__).resolve().parent / "train.py"
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
TINY = dict(vocab_size=13, block_size=16, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, mlp_dim=8, n_expert=4)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def make(**sizes):
    """A model whose output projections do not start at zero: they would hide the experts."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, **sizes}))
    for name, p in model.named_parameters():
        if "c_proj" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def batch(rows=8):
    return torch.randint(TINY["vocab_size"], (2, rows, 16), generator=torch.Generator().manual_seed(1))


def run(out, *more):
    """The script on a small text of its own."""
    text = out.parent / "text.txt"
    words = "the a fox dog hen Mia Tom ran sat hid saw ate red big old".split()
    rng = random.Random(0)
    text.write_text(".\n".join(" ".join(rng.choices(words, k=7)) for _ in range(150)))
    sizes = "--n_layer=3 --n_head=2 --n_kv_head=1 --n_embd=16 --mlp_dim=8 --block_size=16 --vocab_size=280".split()
    options = [f"--data={text}", f"--out={out}", "--steps=20", "--eval_every=10", "--batch_size=4", *sizes, *more]
    return subprocess.run([sys.executable, TRAIN, *options], env=ENV, text=True, capture_output=True)


def test_smoke(tmp_path):
    out = tmp_path / "out"
    done = run(out, "--n_expert=4", "--accum=2")
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log] == list(range(20)) and log[-1]["loss"] < log[0]["loss"] - 0.5
    for r in log:
        load = torch.tensor(r["load"])
        assert load.shape == (3, 4) and (load >= 0).all()
        torch.testing.assert_close(load.sum(dim=1), torch.ones(3))
        assert r["max_vio"] == pytest.approx(4 * load.max().item() - 1, abs=1e-5)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["params"] - metrics["active_params"] == 3 * 2 * 3 * 8 * 16  # layers, idle experts, matrices
    assert metrics["max_vio"] == log[-1]["max_vio"] and metrics["val_loss"] == log[-1]["val_loss"]
    checkpoint = load_checkpoint(out / "gpt.pt", "gpt")
    assert sum(isinstance(m, MoE) for m in GPT.load(checkpoint).modules()) == 3
    assert Tokenizer.load(checkpoint["tokenizer"]).vocab_size == 280


def test_bad_number_of_experts_is_one_line(tmp_path):
    done = run(tmp_path / "out", "--n_expert=1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "top_k_experts=2" in done.stderr, done.stderr


@pytest.mark.parametrize("moe_every, layers", [(1, 2), (2, 1), (3, 0)])
def test_balance_and_load_are_of_the_layers_with_experts(moe_every, layers):
    model = make(moe_every=moe_every)
    with torch.no_grad():
        model(batch()[0])
    moes = [block.mlp for block in model.h if isinstance(block.mlp, MoE)]
    assert len(moes) == layers
    assert float(balance_loss(model)) == pytest.approx(sum(m.balance.item() for m in moes) / max(1, layers))
    assert expert_load(model).shape == ((layers, 4) if layers else (1, 1))
    torch.testing.assert_close(expert_load(model).sum(dim=1), torch.ones(max(1, layers)))


def test_backward_adds_the_balance_loss_to_the_gradient_alone():
    model, (x, y) = make(), batch()
    loss, load = backward(model, x, y, 1, nullcontext, NO_SCALER, balance=0.5)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    wanted = model(x, y)[1]
    (wanted + 0.5 * balance_loss(model)).backward()
    assert loss.item() == wanted.item() and torch.equal(load, expert_load(model))
    for p, grad in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_load_of_a_batch_in_micro_batches_is_the_load_of_the_batch():
    model, (x, y) = make(), batch()
    loss, load = backward(model, x, y, 1, nullcontext, NO_SCALER)
    loss_in_micro_batches, load_in_micro_batches = backward(model, x, y, 4, nullcontext, NO_SCALER)
    torch.testing.assert_close(load_in_micro_batches, load)
    torch.testing.assert_close(loss_in_micro_batches, loss)


def unfair(balance, steps=60):
    """max_vio before and after training from a router that sends nearly all to expert 0."""
    model, (x, y) = make(top_k_experts=1), batch()
    direction = torch.randn(16, generator=torch.Generator().manual_seed(2))
    for block in model.h:  # a gain of ones: adding c to every input adds c . router to the logits
        block.mlp.router.weight.data.mul_(0.1)
        block.mlp.router.weight.data[0] += 0.5 * direction
    model.wte.weight.data += direction
    optimizers = make_optimizers(model, Config(lr=3e-3, lr_adamw=1e-2))
    vio = []
    for _ in range(steps):
        _, load = backward(model, x, y, 1, nullcontext, NO_SCALER, balance)
        vio.append(4 * load.max().item() - 1)
        for opt in optimizers:
            opt.step()
            opt.zero_grad()
    return vio[0], sum(vio[-5:]) / 5


def test_balance_loss_spreads_the_load():
    (start, left_alone), (start_too, balanced) = unfair(0), unfair(0.05)
    assert start == start_too > 2.5  # 3: one expert takes all
    assert balanced < 0.5 * left_alone, (balanced, left_alone)


def test_information():
    """Expert = kind: one bit. Independent: none."""
    kinds = torch.tensor([0, 0, 1, 1])
    assert information(table(kinds, kinds[:, None], 2)) == pytest.approx(1)
    assert information(table(kinds, torch.tensor([[0], [1], [0], [1]]), 2)) == pytest.approx(0, abs=1e-12)
