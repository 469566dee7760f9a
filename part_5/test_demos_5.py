"""
Tests of Part 5's demo_routing.py and demo_hybrid.py: pytest part_5/test_demos_5.py. Their mathematics against slower
statements of it, and a tiny run of each in a process of its own.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import os
import random
import runpy
import traceback

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import demo_hybrid
from demo_routing import Balanced, max_vio
from model import GPTConfig, MoE

HERE = Path(__file__).resolve().parent


def moe():
    torch.manual_seed(0)
    layer = MoE(GPTConfig(n_embd=16, n_head=2, mlp_dim=8, n_expert=4))
    for expert in layer.experts:
        torch.nn.init.normal_(expert.c_proj.weight, std=0.1)
    return layer, torch.randn(3, 5, 16)


def in_child():
    torch.set_num_threads(1)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0


def result(name, tmp_path, *options):
    words, rng = "the a fox dog hen Mia Tom ran sat hid saw ate red big old".split(), random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text(".\n".join(" ".join(rng.choices(words, k=7)) for _ in range(400)))
    if not (child := os.fork()):  # it has imported torch already
        sys.argv = [str(HERE / f"{name}.py"), f"--data={text}", f"--out={tmp_path}", "--device=cpu", *options]
        sys.stdout = sys.stderr = open(tmp_path / "said.txt", "w")
        os._exit(in_child())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, (tmp_path / "said.txt").read_text()
    for png in tmp_path.glob("*.png"):
        assert png.read_bytes().startswith(b"\x89PNG")
    return json.loads((tmp_path / f"{name}.json").read_text())


def test_with_no_remedy_it_is_the_moe():
    layer, x = moe()
    twin = Balanced(layer, aux=0.5)
    torch.testing.assert_close(twin(x), layer(x))
    assert torch.equal(twin.load, layer.load)
    torch.testing.assert_close(twin.balance, 0.5 * layer.balance)


def test_the_bias_chooses_and_does_not_weigh():
    layer, x = moe()
    twin, p = Balanced(layer), layer.router(x.flatten(0, 1)).softmax(dim=-1)
    twin.bias += torch.tensor([9.0, 0.0, 9.0, 0.0])  # everybody goes to 0 and 2
    y = twin(x)
    assert twin.load.tolist() == [0.5, 0, 0.5, 0] and (twin.gate[:, [1, 3]] == 0).all()
    share = p[:, 0] / (p[:, 0] + p[:, 2])
    first, second = (layer.experts[e](x.flatten(0, 1)) for e in (0, 2))
    by_hand = share[:, None] * first + (1 - share)[:, None] * second
    torch.testing.assert_close(y.flatten(0, 1), by_hand)


def test_the_bias_moves_against_the_load_and_evens_it():
    layer, x = moe()
    x = torch.randn(200, 4, 16) + 4 * layer.router.weight[0].detach()  # a favourite
    twin = Balanced(layer, u=0.01)
    twin(x)
    before = max_vio(twin.load[None])
    twin.move_bias()
    sign = (0.25 - twin.load).sign()
    torch.testing.assert_close(twin.bias, 0.01 * sign)
    for _ in range(100):
        twin(x)
        twin.move_bias()
    assert before > 0.5 and max_vio(twin.load[None]) < 0.2 * before


def test_z_loss_by_hand():
    layer, x = moe()
    twin = Balanced(layer, z=0.1)
    twin(x)
    logits = layer.router(x.flatten(0, 1))
    torch.testing.assert_close(twin.balance, 0.1 * logits.exp().sum(dim=-1).log().pow(2).mean())


def test_max_vio():
    assert max_vio(torch.tensor([[5.0, 5, 5, 5], [8, 4, 4, 4]])) == pytest.approx(0.6)
    assert max_vio(torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0]])) == 3


@pytest.mark.parametrize("every", [0, 1, 2])
def test_flops_against_torchs_counter(every):
    sizes = GPTConfig(vocab_size=30, block_size=12, n_layer=2, n_head=2, n_embd=16, n_kv_head=1)
    model = demo_hybrid.make(every, 16, 0.5, sizes)
    x = torch.randint(30, (4, 12))
    with FlopCounterMode(display=False) as counter:
        model(x, x)[1].backward()
    attention = 12 * sizes.n_layer * sizes.block_size * sizes.n_head * model.cfg.head_dim
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    assert products == 48 * (demo_hybrid.flops_per_token(model) - attention)


def test_a_token_works_alike_in_all_three():
    sizes = GPTConfig(vocab_size=30, block_size=12, n_layer=2, n_head=2, n_embd=16, n_kv_head=1)
    dense, half, full = (demo_hybrid.flops_per_token(demo_hybrid.make(every, 16, 0.5, sizes)) for every in (0, 2, 1))
    router = 6 * 8 * 16
    assert half == dense + router and full == dense + 2 * router


def test_verdict():
    losses = {"dense": [3.0, 3.2], "low": [1.0, 2.0], "high": [3.3, 3.4], "in it": [3.05, 3.15], "across": [2.0, 3.1]}
    assert demo_hybrid.verdict(losses) == "low -1.600, high +0.250, in it no difference, across no difference"


def test_demo_routing(tmp_path):
    found = result("demo_routing", tmp_path, "--steps=3", "--batch_size=2")
    assert set(found["max_vio"]) == {"none", "auxiliary loss", "loss-free bias", "z-loss"}
    assert all(0 <= v[0] <= 3 for v in found["max_vio"].values())
    assert len({v[0] for v in found["val_loss"].values()}) == 4


def test_demo_hybrid(tmp_path):
    options = "--steps=4", "--eval_every=2", "--batch_size=2", "--width=16", "--seeds=2"
    found = result("demo_hybrid", tmp_path, *options)
    assert set(found["at_equal"]) == {"steps", "GFLOPs", "seconds"}
    assert all(len(values) == 2 for table in found["at_equal"].values() for values in table.values())
    flops = found["gflops_per_step"]
    assert flops["dense"] < flops["every second layer"] < flops["every layer"] < 1.05 * flops["dense"]
