"""
Tests of bench.py and measure.py: the counts of operations against torch's own counter, the clocks
against a clock that the test moves, the comparison of two runs, and the scripts as a user runs
them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ast
import json
import re
import subprocess
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import bench
import measure
from bench import Run, Trainer, best_and_spread, compare, roofline
from measure import Meter
from shared import ROOT, parse_args

HERE = Path(__file__).resolve().parent


def run_script(name, *options):
    command = [sys.executable, str(HERE / name), *options]
    return subprocess.run(command, capture_output=True, text=True)


class FakeClock:
    """A clock that only moves when the test says so."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


# --------------------------------------------------------------------------------------------------
# The bound


def test_the_roofline_is_the_slower_of_arithmetic_and_memory():
    assert roofline(flops=600, n_bytes=10, peak=100, bandwidth=5) == (6.0, "arithmetic")
    assert roofline(flops=600, n_bytes=40, peak=100, bandwidth=5) == (8.0, "memory")


# A small process that has Part 9's model prints what torch counts.
COUNT = """
import json, sys
sys.path[:0] = [ROOT + "/part_9", ROOT + "/part_0"]
import torch
from torch.utils.flop_counter import FlopCounterMode
import measure
import model

cfg = model.GPTConfig(vocab_size=50, block_size=40, n_layer=2, n_head=4, n_embd=24, n_kv_head=2)
gpt = model.GPT(cfg).requires_grad_(False)
found = {"weights": sum(m.weight.numel() for m in gpt.modules() if type(m) is torch.nn.Linear)}
found["used_weights"] = measure.used_weights(cfg)

cache = model.KVCache(cfg, 3)
gpt(torch.zeros(3, 9, dtype=torch.long), cache=cache)
with FlopCounterMode(display=False) as counter:
    gpt(torch.zeros(3, 1, dtype=torch.long), cache=cache)
found["counted"] = counter.get_total_flops()
found["decode"] = measure.decode_work(cfg, 3, 10)
found["prefill"] = measure.prefill_work(cfg, 3, 10)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counted():
    code = COUNT.replace("ROOT", repr(str(ROOT)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_used_weights_are_those_of_the_model(counted):
    assert counted["used_weights"] == counted["weights"]


def test_the_work_of_decoding_is_what_torch_counts(counted):
    flops, n_bytes = counted["decode"]
    attention = 4 * 2 * 3 * 4 * 10 * 6  # 4, layers, B, H, S, D
    assert flops == 2 * 3 * counted["weights"] + attention

    # torch's counter may not know the fused attention of a processor.
    assert counted["counted"] in (flops, flops - attention)

    keys_and_values = 2 * 2 * 3 * 2 * 10 * 6  # k and v, layers, B, G, S, D
    assert n_bytes == 4 * (counted["weights"] + keys_and_values)


def test_a_prefill_is_one_decoding_step_per_token_without_the_head(counted):
    flops, n_bytes = counted["prefill"]
    head = 24 * 50
    attention = 4 * 2 * 3 * 4 * 55 * 6  # 1 + 2 + ... + 10 = 55 pairs of tokens
    assert flops == 2 * 30 * (counted["weights"] - head) + 2 * 3 * head + attention
    assert n_bytes == 4 * counted["weights"]


# --------------------------------------------------------------------------------------------------
# Counting what a trainer does


@pytest.fixture
def meter(monkeypatch):
    """A Meter that counts; torch's layers are put back afterwards."""
    monkeypatch.setattr(nn.Linear, "forward", nn.Linear.forward)
    monkeypatch.setattr(nn.Embedding, "forward", nn.Embedding.forward)
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)
    meter = Meter(FakeClock())
    measure.count_work(meter)
    return meter


def test_a_trained_weight_counts_6_times_and_a_read_one_twice(meter):
    linear = nn.Linear(5, 7, bias=False)
    x = torch.randn(2, 3, 5, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        linear(x).sum().backward()
    assert meter.work["flops"] == counter.get_total_flops() == 6 * 35 * 6

    with torch.no_grad():
        linear(x)
    assert meter.work["flops"] == 6 * 35 * 6 + 2 * 35 * 6

    # A frozen model that a trainer only reads needs no backward pass.
    linear.requires_grad_(False)
    linear(x.detach())
    assert meter.work["flops"] == 6 * 35 * 6 + 2 * (2 * 35 * 6)


def test_attention_counts_queries_times_keys(meter):
    q = torch.randn(2, 4, 3, 6, requires_grad=True)  # (B, H, T, D)
    k = torch.randn(2, 4, 5, 6)
    F.scaled_dot_product_attention(q, k, k)
    assert meter.work["flops"] == 12 * 2 * 4 * 3 * 5 * 6
    F.scaled_dot_product_attention(q.detach(), k, k)
    assert meter.work["flops"] == (12 + 4) * 2 * 4 * 3 * 5 * 6


def test_tokens_are_trained_or_read(meter):
    table = nn.Embedding(10, 4)
    table(torch.zeros(2, 3, dtype=torch.long))
    table(torch.arange(7))  # positions are not tokens
    with torch.no_grad():
        table(torch.zeros(5, 1, dtype=torch.long))
    assert meter.work["trained_tokens"] == 6
    assert meter.work["read_tokens"] == 5


# --------------------------------------------------------------------------------------------------
# Clocks


def worker(clock, seconds, inner=None):
    """A function that takes so many seconds of a FakeClock, half before and half after another."""

    def work():
        clock.time += seconds / 2
        if inner is not None:
            inner()
        clock.time += seconds / 2
        return "done"

    return work


def test_a_stage_does_not_contain_the_stages_that_it_calls():
    clock = FakeClock()
    meter = Meter(clock)
    inner = meter.clocked(worker(clock, 1.0), "judge")
    outer = meter.clocked(worker(clock, 4.0, inner), "update")
    clock.time += 0.5
    assert outer() == "done"
    clock.time += 0.25
    meter.end_step()
    inner()
    meter.end_step()
    assert meter.steps[0]["seconds"] == {"other": 0.75, "update": 4.0, "judge": 1.0}
    assert meter.steps[1]["seconds"] == {"judge": 1.0, "other": 0.0}


def test_an_evaluation_keeps_all_that_it_calls(meter):
    clock = meter.clock
    linear = nn.Linear(5, 7)
    table = nn.Embedding(10, 4)

    def forward():
        linear(torch.zeros(5))
        table(torch.zeros(1, 1, dtype=torch.long))
        clock.time += 3.0

    inner = meter.clocked(forward, "sampling")
    meter.clocked(worker(clock, 1.0, inner), "evaluation")()
    meter.end_step()
    assert meter.steps[0]["seconds"] == {"other": 0.0, "evaluation": 4.0}
    assert meter.steps[0]["flops"] == meter.steps[0]["read_tokens"] == 0
    assert meter.steps[0]["trained_tokens"] == 0


def test_a_forward_pass_with_gradient_belongs_to_its_caller():
    clock = FakeClock()
    meter = Meter(clock)
    forward = meter.clocked(worker(clock, 1.0), "critic", without_gradient=True)
    forward()
    with torch.no_grad():
        forward()
    meter.end_step()
    assert meter.steps[0]["seconds"] == {"other": 1.0, "critic": 1.0}


SCRIPT = """
from shared import Log


class ActorCritic:
    def act(self):
        return 2


def rollout():
    return 1


if __name__ == "__main__":
    import sys
    out = sys.argv[1].removeprefix("--out=")
    log = Log(out, 3)
    for step in range(3):
        rollout()
        log(step, loss=1.0)
    print(ActorCritic().act(), __name__, __file__)
"""


def test_a_script_runs_with_clocks_as_if_python_had_started_it(tmp_path, monkeypatch, capsys):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    for name in ("argv", "path"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setitem(sys.modules, "model", types.ModuleType("model"))
    monkeypatch.setattr(nn.Linear, "forward", nn.Linear.forward)
    monkeypatch.setattr(nn.Embedding, "forward", nn.Embedding.forward)
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)

    found = measure.train_script(path, [f"--out={tmp_path}"], measure.Config())
    assert capsys.readouterr().out.endswith(f"2 __main__ {path}\n")
    assert len(found["steps"]) == 3
    for step in found["steps"]:
        assert set(step["seconds"]) == {"sampling", "other"}
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert 0 < found["memory_before"] <= found["memory"]


def names_of(path):
    """The functions of a script and of the model.py beside it, and their methods as Class.name."""
    names = set()
    for file in (path, path.parent / "model.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            if isinstance(node, ast.ClassDef):
                methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
                names.update(f"{node.name}.{method.name}" for method in methods)
    return names


def test_every_clock_has_a_function_and_every_stage_a_colour():
    found = set()
    for trainer in bench.TRAINERS:
        found |= names_of(ROOT / trainer.script)
    assert set(measure.STAGES) <= found
    assert set(measure.STAGES.values()) | {"other"} == set(bench.STAGES) | {"evaluation"}

    # What the figure speaks of. `evaluate` runs between the steps of each trainer.
    ppo = names_of(ROOT / "part_8/train_ppo.py")
    assert {"rollout", "score_answers", "answer_logp", "ActorCritic.act", "gae", "learn"} <= ppo
    grpo = names_of(ROOT / "part_9/train_grpo.py")
    assert {"rollout", "passed", "log_probs", "group_advantage", "learn"} <= grpo
    for trainer in bench.TRAINERS:
        assert "evaluate" in names_of(ROOT / trainer.script)


def test_every_trainer_has_the_options_that_it_is_given():
    written = {"data"}
    for trainer in bench.TRAINERS:
        source = (ROOT / trainer.script).read_text()
        options = re.findall(r"--(\w+)=", trainer.options + " --steps= --device= --out=")
        for option in options:
            assert re.search(rf"^    {option}: ", source, re.MULTILINE), (trainer, option)

        # It reads only what another trainer has written before.
        for name, file in re.findall(r"{(part_\d/\w+)}/(\w+\.pt)", trainer.options):
            assert name in written
            assert f'out / "{file}"' in (ROOT / f"{name}.py").read_text()
        written.add(trainer.script.removesuffix(".py"))
    assert len(bench.TRAINERS) == 11


# --------------------------------------------------------------------------------------------------
# Numbers


def test_the_best_of_several_times_and_how_far_the_median_is():
    assert best_and_spread([3.0, 2.0, 4.0], higher_is_better=False) == (2.0, 0.5)
    assert best_and_spread([3.0, 2.0, 6.0], higher_is_better=True) == (6.0, 1.0)
    assert measure.timing([3.0, 2.0, 4.0]) == (2.0, 0.5)


def test_short_calls_are_measured_several_at_a_time(monkeypatch):
    clock = FakeClock()
    monkeypatch.setitem(measure.CLOCKS, "wall", clock)
    calls = []

    def function():
        calls.append(clock.time)
        clock.time += 0.0005

    found = measure.measure(function, measure.Config(seconds=0.001))
    assert found.best == pytest.approx(0.0005)
    assert found.spread == pytest.approx(0, abs=1e-9)
    assert len(calls) == 2 + 5 * 4  # two to warm up, then 5 times the calls that fill 2 ms


def number(value, unit="s", spread=0.0):
    return {"value": value, "unit": unit, "spread": spread}


@pytest.mark.parametrize(
    "old, new, ratio, verdict",
    [
        (number(1.0), number(1.09), 1.09, ""),
        (number(1.0), number(1.5), 1.5, "WORSE"),
        (number(1.0), number(0.5), 0.5, "BETTER"),
        (number(1.0, "token/s"), number(1.5, "token/s"), 1.5, "BETTER"),
        (number(1.0, "of the peak"), number(0.5, "of the peak"), 0.5, "WORSE"),
        (number(1.0, "MiB"), number(2.0, "MiB"), 2.0, "WORSE"),
        (number(1.0, spread=0.6), number(1.5), 1.5, "within the spread"),
        (number(1.0), number(0.7, spread=0.5), 0.7, "within the spread"),
        (number(1.0, spread=0.3), number(1.5, spread=0.3), 1.5, "WORSE"),
    ],
)
def test_a_difference_counts_beyond_10_percent_and_beyond_the_spread(old, new, ratio, verdict):
    assert compare(old, new) == (ratio, verdict)


MADE_UP = Run(
    steps=[
        {
            "seconds": {"sampling": 1.0, "update": 2.0, "evaluation": 9.0, "other": 1.0},
            "trained_tokens": 400,
            "read_tokens": 0,
            "flops": 2000,
        },
        {
            "seconds": {"sampling": 3.0, "update": 1.0, "other": 4.0},
            "trained_tokens": 400,
            "read_tokens": 0,
            "flops": 2000,
        },
    ],
    memory_before=2 * bench.MIB,
    memory=5 * bench.MIB,
)


def test_the_numbers_of_a_trainer():
    numbers = bench.trainer_numbers(MADE_UP, peak=1000)
    assert numbers["step"] == number(4.0, "s", 0.5)  # 4 s and 8 s: the evaluation does not count
    assert numbers["trained_tokens"]["value"] == 100
    assert "read_tokens" not in numbers
    assert numbers["share"]["value"] == 0.5
    assert numbers["memory"]["value"] == 5
    assert numbers["memory_over_imports"]["value"] == 3
    assert "share" not in bench.trainer_numbers(MADE_UP, peak=0)


def test_the_stages_of_an_iteration():
    numbers = bench.stage_numbers(MADE_UP)
    assert list(numbers) == ["sampling", "update", "other"]
    assert numbers["sampling"] == number(1.0, "s", 1.0)
    assert numbers["update"]["value"] == 1.0
    assert bench.total_seconds(numbers) == 3.0


def test_a_small_model_is_bound_by_the_cache_and_a_large_one_by_the_memory():
    rows = {
        "small": {"flops": 1, "bytes": 2**20},
        "large": {"flops": 1, "bytes": 2**30},
    }
    bench.add_bounds(rows, 1e9, {"read 4 MiB": 2**30, "read 256 MiB": 2**29})
    assert rows["small"]["bound"] == (2**-10, "memory")
    assert rows["large"]["bound"] == (2.0, "memory")


# --------------------------------------------------------------------------------------------------
# The scripts


def test_bench_writes_its_numbers_and_compares_them(tmp_path):
    numbers = {
        "judge: stories": number(1.0, "answer/s"),
        "judge: other answers": number(1e12, "answer/s"),
    }
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"machine": {"cores": 1000}, "numbers": numbers}))
    options = ["--sections=judge", "--seconds=0.001", f"--out={tmp_path}", f"--against={old}"]
    done = run_script("bench.py", *options)
    assert done.returncode == 0, done.stderr

    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["machine"]["cores"] >= 1
    assert found["numbers"]["judge: stories"]["unit"] == "answer/s"
    assert found["numbers"]["judge: stories"]["value"] > 100
    assert found["settings"]["seconds"] == 0.001
    assert found["processor_seconds"] > 0

    assert f"cores: 1000 -> {found['machine']['cores']}" in done.stdout
    assert re.search(r"judge: stories .* BETTER\n", done.stdout)
    assert re.search(r"judge: other answers .* WORSE\n", done.stdout)
    assert "2 numbers differ by more than 10 %" in done.stdout


def test_products_and_memory_have_a_speed_for_every_size():
    cfg = measure.Config(seconds=0.001)
    products = measure.products(cfg)
    for n in measure.SIZES:
        assert products[f"fp32 {n}"]["value"] > 0
    assert {row["unit"] for row in products.values()} == {"GFLOP/s"}
    assert {row["unit"] for row in measure.memory(cfg).values()} == {"GB/s"}


def test_a_trainer_runs_with_clocks(tmp_path):
    trainer = Trainer("part_1/train.py", "steps", "")
    cfg = bench.Config(steps=4, threads=1, clock="cpu")
    found = bench.run_trainer(trainer, cfg, tmp_path)
    assert len(found.steps) == 3 * 4 - 1  # three models, and the first step does not count

    # Between two models the script lets one of them reverse a word. That is in steps 3 and 7.
    usual = [step for i, step in enumerate(found.steps) if i not in (3, 7)]
    for step in usual:
        assert step["trained_tokens"] == 64 * 16
        assert step["read_tokens"] == 0
        assert step["seconds"]["other"] > 0

    # 6 N of the linear layers, whose biases are no products, and 12 L H D T for each token.
    weights = 2 * 12 * 64**2 + 64 * 27
    for step in usual:
        assert step["flops"] == 64 * 16 * (6 * weights + 12 * 2 * 64 * 16)

    numbers = bench.trainer_numbers(found, peak=1e12)
    assert 0 < numbers["share"]["value"] < 1
    assert numbers["memory_over_imports"]["value"] > 0


@pytest.mark.parametrize(
    "config, option, message",
    [
        (bench.Config, "--sections=products,colour", "sections=products,colour must be some of"),
        (bench.Config, "--steps=3", "steps=3 must be at least 4"),
        (bench.Config, "--clock=cpu", "use it with --threads=1"),
        (bench.Config, "--clock=sun", "clock=sun must be wall or cpu"),
        (measure.Config, "--clock=cpu", "use it with --threads=1"),
        (measure.Config, "--clock=sun", "clock=sun must be wall or cpu"),
    ],
)
def test_a_wrong_option_is_one_line(capsys, config, option, message):
    with pytest.raises(SystemExit) as stopped:
        parse_args(config, argv=[option])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_measurement_is_one_line():
    done = run_script("measure.py", "--what=colour")
    assert done.returncode == 2
    assert "--what=colour must be one of machine, products" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_earlier_run_that_is_missing_is_found_out_at_once(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.read_earlier("missing.json")
    assert stopped.value.code == 2
    assert "there is no file missing.json" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '{"numbers": {}}'])
def test_a_foreign_file_cannot_be_compared_with(tmp_path, capsys, text):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        bench.read_earlier(str(path))
    assert stopped.value.code == 2
    assert "old.json" in capsys.readouterr().err


def test_a_measurement_that_fails_says_why(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.run("part_1/train.py", bench.Config(), tmp_path, ["--steps=none"])
    assert stopped.value.code == 2
    expected = "error: the measurement of part_1/train.py failed: error: --steps wants an int"
    assert capsys.readouterr().err.startswith(expected)
