"""
Tests of part_5/train.py: a tiny run in a process of its own, and the load-balancing loss at work on
a router that starts with a favourite.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import os
import random
import subprocess
from contextlib import nullcontext

import pytest
import torch

from model import GPT, GPTConfig, MoE
from shared import load_checkpoint
from tokenizer import Tokenizer
from train import (
    Config,
    active_parameters,
    backward,
    balance_loss,
    evaluate,
    expert_load,
    load_data,
    make_optimizers,
    max_violation,
)

SCRIPT = Path(__file__).resolve().parent / "train.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
TINY = dict(
    vocab_size=13, block_size=16, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, mlp_dim=8, n_expert=4
)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def make(**sizes):
    """A model whose output projections do not start at zero, which would hide the experts."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, **sizes}))
    for name, p in model.named_parameters():
        if "c_proj" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def batch(rows=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(TINY["vocab_size"], (2, rows, 16), generator=generator)


def config(accum=1, balance=0.0, **options):
    return Config(batch_size=8, accum=accum, balance=balance, **options)


def write_text(path):
    words = "the a fox dog né Mia Tom ran sat hid 言 ate red big old".split()
    rng = random.Random(0)
    lines = [" ".join(rng.choices(words, k=7)) for _ in range(150)]
    path.write_text(".\n".join(lines), encoding="utf-8")


def run(out, *more):
    """The script on a small text of its own."""
    text = out.parent / "text.txt"
    write_text(text)
    sizes = (
        "--n_layer=3 --n_head=2 --n_kv_head=1 --n_embd=16 --mlp_dim=8 --block_size=16 "
        "--vocab_size=280 --steps=20 --eval_every=10 --batch_size=4"
    ).split()
    command = [sys.executable, SCRIPT, f"--data={text}", f"--out={out}", *sizes, *more]
    return subprocess.run(command, env=ENV, text=True, capture_output=True)


def test_smoke(tmp_path):
    out = tmp_path / "out"
    result = run(out, "--n_expert=4", "--accum=2")
    assert result.returncode == 0, result.stderr

    # the log: the loss falls, and the load of every layer sums to 1
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(20))
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    for record in log:
        load = torch.tensor(record["load"])
        assert load.shape == (3, 4)
        assert (load >= 0).all()
        torch.testing.assert_close(load.sum(dim=1), torch.ones(3))
        assert record["max_vio"] == pytest.approx(4 * load.max().item() - 1, abs=1e-5)

    # the metrics
    metrics = json.loads((out / "metrics.json").read_text())
    idle = 3 * 2 * 3 * 8 * 16  # layers, experts that rest, matrices of an expert
    assert metrics["params"] - metrics["active_params"] == idle
    assert metrics["max_vio"] == log[-1]["max_vio"]
    assert metrics["val_loss"] == log[-1]["val_loss"]

    # the checkpoint on disk has the loss that the metrics state
    checkpoint = load_checkpoint(out / "gpt.pt", "gpt")
    model = GPT.load(checkpoint)
    assert sum(isinstance(module, MoE) for module in model.modules()) == 3
    assert Tokenizer.load(checkpoint["tokenizer"]).vocab_size == 280
    cfg = Config(data=str(out.parent / "text.txt"))
    data = load_data(cfg, GPTConfig(vocab_size=280, block_size=16))
    device = torch.device("cpu")
    result = evaluate(model, data.val_ids, data.edges, data.val_bytes, device, nullcontext)
    assert result.loss == pytest.approx(metrics["val_loss"], rel=1e-4)


def test_the_balance_option_acts(tmp_path):
    """A huge weight of the balance loss changes the training, and the logged loss is the text's."""
    first = run(tmp_path / "a", "--n_expert=4", "--balance=0")
    second = run(tmp_path / "b", "--n_expert=4", "--balance=100")
    assert first.returncode == 0 and second.returncode == 0
    logs = []
    for name in ("a", "b"):
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    assert logs[0][0]["loss"] == logs[1][0]["loss"]  # the balance loss is not part of it
    assert logs[0][-1]["loss"] != logs[1][-1]["loss"]


def test_bad_number_of_experts_is_one_line(tmp_path):
    result = run(tmp_path / "out", "--n_expert=1")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert "top_k_experts=2" in result.stderr


def test_experts_in_no_layer_are_one_line(tmp_path):
    result = run(tmp_path / "out", "--moe_every=9")
    assert result.returncode == 2
    assert "--moe_every=9: none of 3 layers has experts" in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("moe_every, layers", [(1, 2), (2, 1), (3, 0)])
def test_balance_and_load_are_of_the_layers_with_experts(moe_every, layers):
    model = make(moe_every=moe_every)
    with torch.no_grad():
        model(batch()[0])
    moes = [block.mlp for block in model.h if isinstance(block.mlp, MoE)]
    assert len(moes) == layers

    mean = sum(moe.balance.item() for moe in moes) / max(1, layers)
    assert float(balance_loss(model)) == pytest.approx(mean)
    load = expert_load(model)
    assert load.shape == ((layers, 4) if layers else (1, 1))
    torch.testing.assert_close(load.sum(dim=1), torch.ones(max(1, layers)))


def test_max_violation():
    loads = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.4, 0.2, 0.2, 0.2]])
    assert max_violation(loads) == pytest.approx(0.6)
    assert max_violation(torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0]])) == 3


def test_active_parameters_against_a_model_with_fewer_experts():
    """A token meets as many parameters as a model has whose experts all work, plus the router."""
    small = make(n_expert=2)
    extra_router_rows = 2 * 2 * 16  # layers, rows, channels
    assert active_parameters(make()) == active_parameters(small) + extra_router_rows
    assert active_parameters(small) == sum(p.numel() for p in small.parameters())


def test_muon_gets_the_experts_and_adamw_the_router():
    model = make()
    muon, adamw = make_optimizers(model, config())
    in_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    in_adamw = {id(p) for group in adamw.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        hidden = name.startswith("h.") and p.ndim == 2 and "router" not in name
        assert (id(p) in in_muon) == hidden, name
        assert (id(p) in in_adamw) != hidden, name


def test_backward_adds_the_balance_loss_to_the_gradient_alone():
    model = make()
    x, y = batch()
    loss, load = backward(model, x, y, config(balance=0.5), nullcontext, NO_SCALER)
    grads = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    _, expected = model(x, y)
    (expected + 0.5 * balance_loss(model)).backward()
    assert loss.item() == expected.item()
    assert torch.equal(load, expert_load(model))
    for p, grad in zip(model.parameters(), grads):
        torch.testing.assert_close(p.grad, grad)


def test_micro_batches_give_the_loss_and_load_of_the_batch():
    model = make()
    x, y = batch()
    loss, load = backward(model, x, y, config(), nullcontext, NO_SCALER)
    loss_in_parts, load_in_parts = backward(model, x, y, config(accum=4), nullcontext, NO_SCALER)
    torch.testing.assert_close(load_in_parts, load)
    torch.testing.assert_close(loss_in_parts, loss)


def test_micro_batches_give_the_mean_gradient_of_their_balance_losses():
    """Four micro-batches: the gradient of the mean of their losses and of their balance losses."""
    model = make()
    x, y = batch()
    backward(model, x, y, config(accum=4, balance=0.5), nullcontext, NO_SCALER)
    grads = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    total = 0.0
    for rows in range(0, 8, 2):
        _, loss = model(x[rows : rows + 2], y[rows : rows + 2])
        total = total + (loss + 0.5 * balance_loss(model)) / 4
    total.backward()
    for p, grad in zip(model.parameters(), grads):
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-5 * scale)


def train_unfair(balance, steps=60):
    """max_vio before and after training from a router that sends nearly everything to expert 0."""
    model = make(top_k_experts=1)
    x, y = batch()

    # Adding a direction to every input adds its product with the router's rows to the logits.
    direction = torch.randn(16, generator=torch.Generator().manual_seed(2))
    for block in model.h:
        block.mlp.router.weight.data.mul_(0.1)
        block.mlp.router.weight.data[0] += 0.5 * direction
    model.wte.weight.data += direction

    cfg = config(balance=balance, lr=3e-3, lr_adamw=1e-2)
    optimizers = make_optimizers(model, cfg)
    violations = []
    for _ in range(steps):
        _, load = backward(model, x, y, cfg, nullcontext, NO_SCALER)
        violations.append(max_violation(load))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return violations[0], sum(violations[-5:]) / 5


def test_balance_loss_spreads_the_load():
    start, left_alone = train_unfair(balance=0.0)
    same_start, balanced = train_unfair(balance=0.05)
    assert start == same_start
    assert start > 2.5  # 3 would mean that one expert gets everything
    assert balanced < 0.5 * left_alone, (balanced, left_alone)
