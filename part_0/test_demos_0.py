"""Part 0's demo of precision: its numbers against the definitions of the formats, and the script as a user runs it."""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import subprocess

import pytest
import torch

from demo_precision import WAYS, Config, autocast_types, running_sum, softmax_error, train

HERE = Path(__file__).resolve().parent

@pytest.mark.parametrize("dtype, fraction_bits", [(torch.bfloat16, 7), (torch.float16, 10)])
def test_a_sum_stops_where_the_next_number_is_two_away(dtype, fraction_bits):
    stop = 2 ** (fraction_bits + 1)
    assert running_sum(stop + 50, dtype) == [*range(1, stop + 1), *[stop] * 50]

def test_fp32_counts_on():
    assert running_sum(3000, torch.float32) == list(range(1, 3001))

def test_softmax_errors():
    fine = [softmax_error(8.0, dtype, True, 0) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert 0 < fine[0] < 1e-6 < fine[1] < fine[2] / 3 < 0.01  # by the bits of the fraction: 23, 10, 7
    assert softmax_error(8.0, torch.float64, True, 0) < 1e-15
    assert math.isnan(softmax_error(20.0, torch.float16, False, 0))  # exp(12) is more than fp16 holds
    assert softmax_error(20.0, torch.float16, True, 0) < 0.01

def test_autocast_computes_products_in_16_bits_and_the_loss_in_32():
    types = autocast_types(torch.device("cpu"), torch.bfloat16)
    assert types["linear"] == types["x @ y"] == (torch.bfloat16, torch.bfloat16)
    assert types["cross-entropy"] == (torch.float32, torch.float32)

def test_training_loses_what_the_theory_says():
    cfg = Config(steps=12, n_embd=32, batch_size=64)
    runs = {way: train(way, cfg, 0, torch.device("cpu")) for way in WAYS}
    exact = runs["fp32"][0]
    assert exact[-1] < exact[0] - 0.02 and runs["fp32"][1] == 0
    assert abs(runs["autocast bf16"][0][0] - exact[0]) < 0.01  # the same weights and the same batch
    assert runs["weights bf16"][2] > 0.02 > 10 * runs["autocast bf16"][2]  # updates below half a step of bf16
    assert runs["fp16, loss x 2^14"][1] <= runs["autocast fp16"][1]
    assert not math.isfinite(runs["weights fp16"][0][-1])  # Adam's epsilon, 1e-8, is 0 in fp16

def test_smoke(tmp_path):
    options = ["--terms=300", "--steps=3", "--n_embd=16", "--batch_size=16", "--device=cpu", f"--out={tmp_path}"]
    done = subprocess.run([sys.executable, str(HERE / "demo_precision.py"), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "demo_precision.json").read_text())
    assert (numbers["bf16_sum"], numbers["fp32_sum"]) == (256, 300) and set(numbers["loss"]) == set(WAYS)
    assert (tmp_path / "demo_precision.png").stat().st_size > 10_000
