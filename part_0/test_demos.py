"""
Tests of the demos: the numbers of demo_precision.py against the definitions of the formats, and
each script as a user runs it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import subprocess

import pytest
import torch

import demo_pipeline
import prepare_data
from demo_environment import make_training_step, profile_step
from demo_environment import Config as EnvironmentConfig
from demo_precision import METHODS, Config, autocast_types, running_sum, softmax_error, train
from shared import judge, parse_args

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")


def run_demo(name, out, *options):
    """Run a demo with small sizes -> the numbers that it wrote."""
    command = [sys.executable, str(HERE / f"{name}.py"), *options, "--device=cpu", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((out / f"{name}.json").read_text())


# --------------------------------------------------------------------------------------------------
# demo_precision.py


@pytest.mark.parametrize("dtype, fraction_bits", [(torch.bfloat16, 7), (torch.float16, 10)])
def test_a_sum_stops_where_the_next_number_is_two_away(dtype, fraction_bits):
    stop = 2 ** (fraction_bits + 1)
    expected = list(range(1, stop + 1)) + [stop] * 50
    assert running_sum(stop + 50, dtype) == expected


def test_fp32_counts_on():
    assert running_sum(3000, torch.float32) == list(range(1, 3001))


def test_the_error_of_a_softmax_depends_on_the_fraction_bits():
    fp32 = softmax_error(8.0, torch.float32, True, 0)  # 23 bits
    fp16 = softmax_error(8.0, torch.float16, True, 0)  # 10 bits
    bf16 = softmax_error(8.0, torch.bfloat16, True, 0)  # 7 bits
    assert 0 < fp32 < 1e-6 < fp16 < bf16 / 3 < 0.01
    assert softmax_error(8.0, torch.float64, True, 0) < 1e-14


def test_a_softmax_overflows_unless_the_largest_logit_is_subtracted():
    # fp16 cannot hold exp(12), and the largest logits are near 20.
    assert math.isnan(softmax_error(20.0, torch.float16, False, 0))
    assert softmax_error(20.0, torch.float16, True, 0) < 0.01


def test_autocast_computes_products_in_16_bits_and_the_loss_in_32():
    types = autocast_types(CPU, torch.bfloat16)
    assert types["linear"] == (torch.bfloat16, torch.bfloat16)
    assert types["x @ y"] == (torch.bfloat16, torch.bfloat16)
    assert types["cross-entropy"] == (torch.float32, torch.float32)


def test_training_loses_what_the_theory_says():
    cfg = Config(steps=12, n_embd=32, batch_size=64)
    runs = {name: train(name, cfg, 0, CPU) for name in METHODS}
    exact = runs["fp32"]
    assert exact.losses[-1] < exact.losses[0] - 0.02
    assert exact.zero_gradients == 0

    # The first loss is of the same weights and the same batch.
    assert runs["autocast bf16"].losses[0] == pytest.approx(exact.losses[0], rel=0.003)

    # bf16 loses updates that are smaller than half of its distance to the next number.
    assert runs["weights bf16"].lost_updates > 0.02
    assert runs["autocast bf16"].lost_updates < 0.002

    # Small gradients become 0 in fp16, but fewer of them when the loss is scaled up. Without
    # weights in fp32 even Adam's epsilon, 1e-8, is 0.
    assert runs["fp16, loss x 2^14"].zero_gradients <= runs["autocast fp16"].zero_gradients
    assert not math.isfinite(runs["weights fp16"].losses[-1])


def test_precision_runs(tmp_path):
    options = ["--terms=300", "--steps=3", "--n_embd=16", "--batch_size=16"]
    numbers = run_demo("demo_precision", tmp_path, *options)
    assert numbers["bf16_sum"] == 256
    assert numbers["fp32_sum"] == 300
    assert set(numbers["loss"]) == set(METHODS)
    assert (tmp_path / "demo_precision.png").stat().st_size > 10_000


# --------------------------------------------------------------------------------------------------
# demo_environment.py


def test_a_training_step_learns_and_its_profile_finds_the_products():
    cfg = EnvironmentConfig(batch_size=2, block_size=8, n_embd=16, n_layer=1)
    step, params = make_training_step(cfg, CPU)

    # Attention, MLP, two norms and the head, all with biases.
    C = cfg.n_embd
    attention = 4 * C * C + 4 * C
    mlp = 8 * C * C + 5 * C
    norms = 4 * C
    head = 256 * C + 256
    assert params == attention + mlp + norms + head

    operations = profile_step(step)
    times = [operation.ms for operation in operations]
    assert times == sorted(times, reverse=True)
    calls = {operation.name: operation.calls for operation in operations}
    assert calls["aten::addmm"] >= 3, "a product for each of two MLP layers and for the head"


def test_environment_runs(tmp_path):
    options = ["--sizes=8,64", "--seconds=0.02", "--batch_size=2", "--block_size=8"]
    numbers = run_demo("demo_environment", tmp_path, *options, "--n_embd=16", "--n_layer=1")
    assert numbers["fp32_gflops_64"] > numbers["fp32_gflops_8"] > 0
    assert numbers["step_ms"] > 0
    assert (tmp_path / "demo_environment_matmul.png").stat().st_size > 10_000
    assert (tmp_path / "demo_environment_step.png").stat().st_size > 10_000


# --------------------------------------------------------------------------------------------------
# demo_pipeline.py


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A small world, judged by its own patterns."""
    cfg = parse_args(prepare_data.Config, argv=["--scale=0.05"])
    prepare_data.write_world(cfg, tmp_path)

    def judge_here(record, answer):
        check = {**record["check"], "patterns": str(tmp_path)}
        return judge({"check": check}, answer)

    monkeypatch.setattr(demo_pipeline, "judge", judge_here)
    return demo_pipeline.read_world(tmp_path)


def test_the_pipeline_counts_what_the_generator_wrote(world):
    numbers = demo_pipeline.count(world)
    counts = world.facts["counts"]
    assert numbers["documents"] == counts["train"]
    assert numbers["story_instructions"] == counts["stories"]
    assert numbers["instructions"] == counts["stories"] + counts["skills"] + counts["problems"]
    assert numbers["pairs"] == world.facts["counts"]["preferences"]
    assert 0.15 < numbers["demonstrations_right"] < 0.45
    assert 0.85 < numbers["labels_right"] < 1


def test_the_pipeline_draws_five_stages(world, tmp_path):
    stages = demo_pipeline.make_stages(world, demo_pipeline.count(world))
    assert len(stages) == 5

    # The prediction is the text shifted by one word.
    reads, predicts = stages[1].rows
    assert reads.text.split()[1:] == predicts.text.split()[:-1]
    assert not reads.in_loss and predicts.in_loss

    demo_pipeline.draw(stages, tmp_path / "pipeline.png")
    assert (tmp_path / "pipeline.png").stat().st_size > 50_000
