"""
Tests of Part 4's demo_bpe.py and demo_accumulation.py: pytest part_4/test_demos_4.py. Their mathematics against slower
statements of it, and a tiny run of each in a process of its own.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import os
import subprocess

import torch
import torch.nn.functional as F

import demo_accumulation
import demo_bpe
from model import GPT, GPTConfig
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
TEXT = "the cat sat on the mat. the dog sat on the log.\n\na cat and a dog and a log.\n\n" * 40


def run(name, out, *options):
    command = [sys.executable, HERE / f"{name}.py", f"--out={out}", "--device=cpu", *options]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((out / f"{name}.json").read_text())


def small(cfg=None):
    cfg = cfg or demo_accumulation.Config(batch_size=8, block_size=6, n_layer=1, n_embd=16)
    x, y = torch.randint(256, (2, 8, 6), generator=torch.Generator().manual_seed(1))
    return demo_accumulation.make(cfg, 16, torch.device("cpu")), x, y


def test_smaller_tokenizer_is_an_earlier_end_of_the_training():
    tok = Tokenizer.train(TEXT, 290)
    for size in demo_bpe.sizes(260, tok.vocab_size):
        assert demo_bpe.smaller(tok, size).encode(TEXT) == Tokenizer.train(TEXT, size).encode(TEXT)


def test_sizes_begin_and_end_where_they_should():
    sizes = demo_bpe.sizes(260, 791)
    assert sizes[0] == 260 and sizes[-1] == 791 and sizes == sorted(set(sizes)) and len(sizes) <= 8


def test_flops_of_a_step():
    model, x, y = small()
    cfg, tokens = model.cfg, x.numel()
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "wte" not in n)
    inside = demo_bpe.step_flops(model, x, y) * 1e12 - 6 * matrices * tokens  # 2 forward, 4 backward
    products = 2 * cfg.n_layer * tokens * x.size(1) * cfg.n_head * cfg.head_dim * 2  # q k and w v, whole squares
    assert 0 <= inside <= 4 * products
    assert all(p.grad is None for p in model.parameters())


def test_micro_batches_have_the_gradient_of_the_mean_loss():
    model, x, y = small()
    model.double()
    logits, _ = model(x)
    loss = F.nll_loss(logits.log_softmax(dim=-1).flatten(0, 1), y.flatten())
    whole = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    for accum in (1, 2, 8):
        assert demo_accumulation.difference(demo_accumulation.gradient(model, x, y, accum), whole) < 1e-6
    assert demo_accumulation.difference(demo_accumulation.gradient(model, x, y.flip(0), 2), whole) > 0.1


def test_saved_counts_storages_once_and_no_weights():
    a, w = torch.ones(10), torch.nn.Linear(10, 10, bias=False)
    saved = demo_accumulation.Saved(w)
    with saved:
        for _ in range(2):  # the second micro-batch does not add to the first
            h = w(a)  # keeps a, 40 bytes, and the weight
            z = h * h  # keeps h, 40 bytes, once
            z.exp().sum().backward()  # keeps exp's result, 40 bytes
    assert saved.most == 120


def test_saved_shrinks_with_the_micro_batch():
    model, x, y = small()
    most = []
    for accum in (1, 2, 4):
        saved = demo_accumulation.Saved(model)
        with saved:
            demo_accumulation.step(model, x, y, accum)
        most.append(saved.most)
    assert 1.7 < most[0] / most[1] <= 2 and 1.5 < most[1] / most[2] <= 2


def test_demo_bpe_runs(tmp_path):
    (tmp_path / "my.txt").write_text(TEXT)
    options = "--steps=10", "--row=24", "--n_embd=16", "--batch_size=4", "--vocab_size=300"
    found = run("demo_bpe", tmp_path, f"--data={tmp_path / 'my.txt'}", *options)
    assert found["vocabulary"][0] == 260 and found["bytes_per_token_val"][0] == 1
    assert found["bytes_per_token_val"] == sorted(found["bytes_per_token_val"])
    steps = found["steps"][0]
    assert steps[0] == 10 < steps[2], "shorter rows must give more steps"
    assert {p.name for p in tmp_path.glob("*.png")} == {"demo_bpe_tokens.png", "demo_bpe_loss.png"}


def test_demo_accumulation_runs(tmp_path):
    options = "--batch_size=4", "--block_size=8", "--n_layer=1", "--n_embd=16", "--widths=16,32", "--repeats=1"
    found = run("demo_accumulation", tmp_path, *options)
    assert max(found["gradient_float64"]) < 1e-12 and max(found["gradient_float32"]) < 1e-4
    assert found["saved_mib"] == sorted(found["saved_mib"], reverse=True) and len(found["bf16_gain"]) == 2
    assert {p.name for p in tmp_path.glob("*.png")} == {"demo_accumulation.png", "demo_accumulation_bf16.png"}
