"""
Tests of Part 5's demos: their mathematics against slower statements of it, and a tiny run of each
in a process of its own.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import os
import random
import subprocess

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import demo_hybrid
from demo_moe import count_visits, information, route
from demo_routing import Balanced
from model import GPT, GPTConfig, MoE
from train import max_violation

HERE = Path(__file__).resolve().parent
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def make_moe():
    """A mixture whose experts do not start at zero, and an input for it."""
    torch.manual_seed(0)
    layer = MoE(GPTConfig(n_embd=16, n_head=2, mlp_dim=8, n_expert=4))
    for expert in layer.experts:
        torch.nn.init.normal_(expert.c_proj.weight, std=0.1)
    return layer, torch.randn(3, 5, 16)


def run(name, folder, *options):
    """Runs a demo on a small text -> the numbers that it writes."""
    words = "the a fox dog né Mia Tom ran sat hid 言 ate red big old".split()
    rng = random.Random(0)
    lines = [" ".join(rng.choices(words, k=7)) for _ in range(400)]
    text = folder / "text.txt"
    text.write_text(".\n".join(lines), encoding="utf-8")
    command = [sys.executable, HERE / f"{name}.py", f"--data={text}", f"--out={folder}", *options]
    result = subprocess.run(command, env=ENV, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    pictures = list(folder.glob("*.png"))
    assert pictures
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / f"{name}.json").read_text())


# demo_moe -----------------------------------------------------------------------------------------


def test_information():
    """If the expert is the kind, it tells one bit. If they are independent, it tells nothing."""
    kinds = torch.tensor([0, 0, 1, 1])
    same = count_visits(kinds, kinds[:, None], 2)
    assert information(same) == pytest.approx(1)
    independent = count_visits(kinds, torch.tensor([[0], [1], [0], [1]]), 2)
    assert information(independent) == pytest.approx(0, abs=1e-12)


def test_route_names_the_experts_that_each_layer_used():
    torch.manual_seed(0)
    sizes = dict(vocab_size=13, block_size=8, n_layer=3, n_head=2, n_kv_head=1, n_embd=16)
    model = GPT(GPTConfig(**sizes, mlp_dim=8, n_expert=4, moe_every=2))
    ids = torch.randint(13, (5, 8))
    layers = route(model, ids)
    assert len(layers) == 1  # layer 2 of 3
    model(ids)
    load = layers[0].flatten().bincount(minlength=4) / layers[0].numel()
    torch.testing.assert_close(load, model.h[1].mlp.load)


# demo_routing -------------------------------------------------------------------------------------


def test_with_no_remedy_it_is_the_moe():
    layer, x = make_moe()
    twin = Balanced(layer, aux=0.5)
    torch.testing.assert_close(twin(x), layer(x))
    assert torch.equal(twin.load, layer.load)
    torch.testing.assert_close(twin.balance, 0.5 * layer.balance)


def test_the_bias_chooses_and_does_not_weigh():
    layer, x = make_moe()
    p = layer.router(x.flatten(0, 1)).softmax(dim=-1)
    twin = Balanced(layer)
    twin.bias += torch.tensor([9.0, 0.0, 9.0, 0.0])  # every token goes to experts 0 and 2
    y = twin(x)
    assert twin.load.tolist() == [0.5, 0, 0.5, 0]
    assert (twin.gate[:, [1, 3]] == 0).all()

    share = p[:, 0] / (p[:, 0] + p[:, 2])
    first = layer.experts[0](x.flatten(0, 1))
    second = layer.experts[2](x.flatten(0, 1))
    by_hand = share[:, None] * first + (1 - share)[:, None] * second
    torch.testing.assert_close(y.flatten(0, 1), by_hand, rtol=1e-4, atol=1e-6)


def test_the_bias_moves_against_the_load_and_evens_it():
    layer, _ = make_moe()
    x = torch.randn(200, 4, 16) + 4 * layer.router.weight[0].detach()  # expert 0 is the favourite
    twin = Balanced(layer, u=0.01)
    twin(x)
    before = max_violation(twin.load[None])
    twin.move_bias()
    direction = (0.25 - twin.load).sign()
    torch.testing.assert_close(twin.bias, 0.01 * direction)

    for _ in range(100):
        twin(x)
        twin.move_bias()
    assert before > 0.5
    assert max_violation(twin.load[None]) < 0.2 * before


def test_z_loss_by_hand():
    layer, x = make_moe()
    twin = Balanced(layer, z=0.1)
    twin(x)
    logits = layer.router(x.flatten(0, 1))
    by_hand = 0.1 * logits.exp().sum(dim=-1).log().pow(2).mean()
    torch.testing.assert_close(twin.balance, by_hand)


def test_demo_routing(tmp_path):
    numbers = run("demo_routing", tmp_path, "--steps=3", "--batch_size=2")
    assert set(numbers["max_vio"]) == {"none", "auxiliary loss", "loss-free bias", "z-loss"}
    for values in numbers["max_vio"].values():
        assert 0 <= values[0] <= 3
    losses = {values[0] for values in numbers["val_loss"].values()}
    assert len(losses) == 4  # every remedy changes the training


# demo_hybrid --------------------------------------------------------------------------------------

SIZES = dict(vocab_size=30, block_size=12, n_layer=2, n_head=2, n_embd=16, n_kv_head=1)


@pytest.mark.parametrize("moe_every", [0, 1, 2])
def test_flops_against_torchs_counter(moe_every):
    gpt_cfg = GPTConfig(**SIZES)
    model = demo_hybrid.make_model(moe_every, 16, 0.5, gpt_cfg)
    x = torch.randint(30, (4, 12))
    with FlopCounterMode(display=False) as counter:
        _, loss = model(x, x)
        loss.backward()
    products = 0
    for operation, flops in counter.get_flop_counts()["Global"].items():
        if str(operation) in ("aten.mm", "aten.addmm"):
            products += flops
    attention = 12 * gpt_cfg.n_layer * gpt_cfg.block_size * gpt_cfg.n_head * model.cfg.head_dim
    tokens = 4 * 12
    assert products == tokens * (demo_hybrid.flops_per_token(model) - attention)


def test_a_token_costs_the_same_in_all_three():
    flops = {}
    for moe_every in (0, 1, 2):
        model = demo_hybrid.make_model(moe_every, 16, 0.5, GPTConfig(**SIZES))
        flops[moe_every] = demo_hybrid.flops_per_token(model)
    router = 6 * 8 * 16
    assert flops[2] == flops[0] + router
    assert flops[1] == flops[0] + 2 * router


def test_verdict():
    losses = {
        "dense": [3.0, 3.2],
        "low": [1.0, 2.0],
        "high": [3.3, 3.4],
        "inside": [3.05, 3.15],
        "across": [2.0, 3.1],
    }
    expected = "low -1.600, high +0.250, inside no difference, across no difference"
    assert demo_hybrid.verdict(losses) == expected


def test_demo_hybrid(tmp_path):
    options = ["--steps=4", "--eval_every=2", "--batch_size=2", "--width=16", "--seeds=2"]
    numbers = run("demo_hybrid", tmp_path, *options)
    assert set(numbers["at_equal"]) == {"steps", "GFLOPs", "seconds"}
    for table in numbers["at_equal"].values():
        for values in table.values():
            assert len(values) == 2
    flops = numbers["gflops_per_step"]
    assert flops["dense"] < flops["every second layer"] < flops["every layer"]
    assert flops["every layer"] < 1.05 * flops["dense"]
