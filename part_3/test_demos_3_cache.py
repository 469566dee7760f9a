"""
Tests of Part 3's demo_kv_cache.py and demo_streaming.py: pytest part_3/test_demos_3_cache.py. Their mathematics against
slower statements of it, and a tiny run of each in a process of its own.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import os
import subprocess
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

import demo_kv_cache
import demo_streaming
from model import GPT, GPTConfig
from shared import save_checkpoint

HERE = Path(__file__).resolve().parent
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
TINY = GPTConfig(vocab_size=257, block_size=8, n_layer=2, n_head=4, n_kv_head=2, n_embd=16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def run(name, out, *options):
    command = [sys.executable, HERE / f"{name}.py", f"--out={out}", "--device=cpu", *options]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((out / f"{name}.json").read_text()), done.stdout


def make():
    torch.manual_seed(0)
    return demo_kv_cache.make(TINY, CPU)


def tokens(*shape):
    return torch.randint(257, shape, generator=torch.Generator().manual_seed(1))


def test_peak_adds_up_what_lives_at_one_time():
    with demo_kv_cache.Peak() as peak:
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100) + 1  # 8000 with it: the view is no memory of its own
        del b
        c = a * 2  # 8000
        d = c[:5]
        del c  # its slice keeps it
        torch.ones(500)  # 10000 for a moment
    assert peak.most == 10000 and len(d) == 5


def test_kept_mib_is_the_formula():
    model, idx = make(), tokens(3, 7)
    cache, logits = demo_kv_cache.prefilled(model, idx)
    assert demo_kv_cache.kept_mib(cache) * 2**20 == 2 * 2 * 3 * 2 * 7 * 4 * 4  # k and v, layers, B, G, tokens, D, bytes
    torch.testing.assert_close(logits, model(idx)[0][:, -1], atol=1e-5, rtol=1e-4)


def nats(model, x, y):
    """-log p of the token y after each row's x, from the plain forward pass."""
    return -model(x)[0][:, -1].log_softmax(dim=-1).gather(1, y[:, None])[:, 0]


def test_reading_in_chunks_is_reading_one_by_one():
    rows = tokens(2, 41)
    for model in demo_streaming.ways(make(), demo_streaming.Config(windows=5, sink=2))[:3]:
        whole = F.cross_entropy(model(rows[:, :-1])[0].transpose(1, 2), rows[:, 1:], reduction="none")
        for chunk in (1, 8):
            torch.testing.assert_close(demo_streaming.read(model, rows, chunk)[0], whole, atol=1e-4, rtol=1e-4)


def test_ways_differ_only_beyond_the_training_length_and_weigh_the_same():
    rows = tokens(2, 41)
    dense, window, sinks = (demo_streaming.read(model, rows, 8) for model in
                            demo_streaming.ways(make(), demo_streaming.Config(windows=5, sink=2))[:3])
    for loss, _ in (window, sinks):
        torch.testing.assert_close(loss[:, :8], dense[0][:, :8], atol=1e-4, rtol=1e-4)
        assert (loss[:, 8:] - dense[0][:, 8:]).abs().max() > 1e-3
    assert window[1].k.shape == sinks[1].k.shape and dense[1].k.size(3) == 40


@pytest.mark.parametrize("first", [0, 1])
def test_recompute_sees_the_last_tokens_and_nothing_else(first):
    model, rows = make(), tokens(3, 21)
    found = demo_streaming.recompute(model, rows, torch.tensor([3, 15]), first)
    torch.testing.assert_close(found[:, 0], nats(model, rows[:, :4], rows[:, 4]))
    last = rows[:, [0, *range(9, 16)]] if first else rows[:, 8:16]
    torch.testing.assert_close(found[:, 1], nats(model, last, rows[:, 16]))


def test_gaps_are_paired():
    losses = torch.tensor([[3.0, 5.0], [1.0, 3.0], [1.0, 3.5], [1.0, 3.0]])
    table = demo_streaming.gaps(losses)
    assert table[0] == [4.0, 2.0, 0.0] and table[1] == [2.0, 0.0, 0.0] and table[3][1:] == [0.0, 0.0]
    assert table[2] == pytest.approx([2.25, 0.25, 2 * 0.125**0.5 / 2**0.5])


def test_to_first_is_a_share():
    model, rows = make(), tokens(4, 8)
    assert torch.allclose(demo_streaming.to_first(model, rows, 8), torch.ones(8))  # all keys: every row sums to 1
    share = demo_streaming.to_first(model, rows, 2)
    by_hand = model.h[1].attn.weights[:, 3, 4:, :2].sum(dim=-1).mean()
    assert share.shape == (8,) and torch.allclose(share[7], by_hand) and 0 < share.min() and share.max() < 1


def test_demo_kv_cache_runs(tmp_path):
    options = "--positions=32", "--n_embd=32", "--n_head=4", "--batch_size=2", "--repeats=1"
    found, _ = run("demo_kv_cache", tmp_path, *options)
    assert found["worst_logit_difference"] < 1e-4 and found["kv_heads"] == [4, 2, 1]
    assert found["mib_by_kv_heads"][0] == 4 * found["mib_by_kv_heads"][2]
    assert found["peak_mib_with"][-1] < found["peak_mib_without"][-1]
    assert {p.name for p in tmp_path.glob("*.png")} == {"demo_kv_cache.png", "demo_kv_cache_heads.png"}


def test_demo_streaming_runs(tmp_path):
    model = make()
    save_checkpoint(tmp_path / "gpt.pt", kind="gpt", gpt_config=asdict(TINY), weights=model.state_dict())
    options = "--windows=4", "--streams=2", "--steps=2", "--batch_size=2", "--block_size=8", "--sink=2"
    found, said = run("demo_streaming", tmp_path, f"--init={tmp_path / 'gpt.pt'}", *options)
    assert found["ring_difference_part_3"] < 1e-3 and found["ring_difference_small"] < 1e-3
    table = dict(zip(found["ways"], found["table_part_3"]))
    assert table["recomputation"][1:3] == [0, 0] and table["window"][4] == table["window + sinks"][4]
    assert table["dense"][4] == 4 * table["window"][4] and "rolling buffer" in said
    assert {p.name for p in tmp_path.glob("*.png")} == {"demo_streaming_loss.png", "demo_streaming_attention.png"}
