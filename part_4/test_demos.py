"""Tests of Part 4's demos: their mathematics against an independent statement of it, and a tiny run
of each."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import os
import random
import re
import subprocess
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import demo_accumulation
import demo_bpe
import demo_induction
import demo_kinds
import demo_resume
import demo_scaling
import demo_schedule
import demo_speedrun
import model as part_4_model
import train
from model import GPT, GPTConfig
from shared import parse_args, require, save_checkpoint
from tokenizer import Tokenizer

HERE = Path(demo_bpe.__file__).resolve().parent
CPU = torch.device("cpu")
TEXT = "the cat sat on the mat. the né dog sat on the log.\n\na cat and a dog and a log.\n\n" * 40

# One process runs all the demos, because importing torch takes longer than they do. For the same
# reason the runs of train.py that demo_resume starts are children of this process, made by fork():
# they have imported torch already. The demo can still kill them.
RUNNER = """
import json
import os
import runpy
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import tiktoken
import torch
import torch._dynamo
import torch.utils.tensorboard


class Popen:
    def __init__(self, command, **options):
        self.returncode = None
        self.stderr = tempfile.mktemp()
        self.pid = os.fork()
        if self.pid == 0:
            sys.stdout = open(os.devnull, "w")
            sys.stderr = open(self.stderr, "w", buffering=1)
            os._exit(run_script(command[1:]))

    def poll(self, flags=os.WNOHANG):
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, flags)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self):
        return self.poll(flags=0)

    def kill(self):
        os.kill(self.pid, 9)


def run(command, **options):
    child = Popen(command)
    child.wait()
    return SimpleNamespace(returncode=child.returncode, stderr=open(child.stderr).read())


def run_script(argv):
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


folder, jobs = sys.argv[1:]
sys.path.insert(0, folder)
subprocess.Popen = Popen
subprocess.run = run
for name, *options in json.loads(jobs):
    print(f"=== {name}", flush=True)
    code = run_script([f"{folder}/demo_{name}.py", *options])
    print(f"=== {code}", flush=True)
"""


def as_options(**values):
    return [f"--{name}={value}" for name, value in values.items()]


def make_text():
    """Sentences in random order, so that there is something left to learn."""
    words = "the a fox dog hen Mia Tom né sat hid saw ate red big old".split()
    generator = random.Random(0)
    sentences = [" ".join(generator.choices(words, k=7)) for _ in range(400)]
    return ".\n".join(sentences)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder with the output of all demos."""
    folder = tmp_path_factory.mktemp("demos")
    (folder / "short.txt").write_text(TEXT)
    (folder / "long.txt").write_text(make_text())
    common = as_options(out=folder, device="cpu")

    model = dict(block_size=8, n_layer=1, n_embd=16)
    accumulation = as_options(batch_size=4, widths="16,32", repeats=1, **model)
    bpe = as_options(steps=10, row=24, n_embd=16, batch_size=4, vocab_size=300)
    resume = as_options(steps=40, save_every=4, kill=9, n_embd=16)
    schedule = as_options(steps=3, batch_size=2, n_embd=16, rates="0.5,2,4", seeds=2)
    scaling = as_options(sizes="1x8,1x12,1x16,2x8", lengths="1,2,3,4", batch_size=2, draws=2)
    induction = as_options(layers="1,2", steps=3, eval_every=2, batch_size=2, n_embd=8, seeds=2)
    speedrun = as_options(
        steps=4, block_size=8, n_layer=1, n_embd=8, vocab_size=300, eval_bytes=300, seeds=2
    )
    jobs = [
        ("accumulation", *common, *accumulation),
        ("bpe", *common, f"--data={folder / 'short.txt'}", *bpe),
        ("induction", *common, *induction, "--samples=20"),
        ("resume", *common, f"--data={folder / 'long.txt'}", *resume),
        ("schedule", *common, f"--data={folder / 'long.txt'}", *schedule),
        ("scaling", *common, *scaling),
        ("speedrun", *common, f"--data={folder / 'long.txt'}", *speedrun),
        # Bad input, which must be refused
        ("schedule", *common, f"--data={folder / 'long.txt'}", "--rates=1,2"),
        ("schedule", *common, "--rates=1,2,x"),
        ("accumulation", *common, "--widths=12"),
        ("bpe", *common, f"--data={folder / 'short.txt'}", "--row=24", "--vocab_size=261"),
        ("accumulation", *common, "--batch_size=6"),
        ("resume", *common, "--kill=10", "--save_every=20"),
        ("resume", *common, "--kill=59", "--steps=60"),
        ("induction", *common, "--layers=1,0"),
        ("scaling", *common, "--sizes=1x8,1x16,2x8"),
        ("scaling", *common, "--lengths=1,2,2,3"),
        ("speedrun", *common, "--rates=0.1,0.2"),
        ("speedrun", *common, "--n_embd=12"),
        ("speedrun", *common, "--vocab_size=260"),
        ("speedrun", *common, f"--data={folder / 'long.txt'}", "--eval_bytes=3"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(HERE), json.dumps(jobs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("=== ")][1::2]
    assert codes == ["=== 0"] * 7 + ["=== 2"] * 14, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


def read_metrics(folder, name):
    """The metrics of a demo, which must have drawn its figures."""
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG"), path
    return json.loads((folder / f"demo_{name}.json").read_text())


@pytest.mark.parametrize(
    "message",
    [
        "--rates=1,2 must have at least three",
        "--rates=1,2,x must be positive numbers",
        "--widths=12 must be multiples of 8",
        "--vocab_size=261: at least two merges are needed",
        "batch_size=6 must be a power of two",
        "save_every=20 must be from 1 to kill=10",
        "kill=59 must be less than 59",
        "--layers=1,0 must be numbers from 1 to 12",
        "--sizes=1x8,1x16,2x8 must have at least four",
        "--lengths=1,2,2,3 must have at least four",
        "--rates=0.1,0.2 must have at least three",
        "n_embd=12 must be divisible by 8",
        "vocab_size=260 must be above 260",
        "--eval_bytes=3 must hold at least one row",
    ],
)
def test_bad_input_ends_in_one_line(made, message):
    lines = [line for line in (made / "stderr").read_text().splitlines() if message in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


@pytest.mark.parametrize(
    "demo, n_embd", [(demo_bpe, 97), (demo_accumulation, 100), (demo_schedule, 63)]
)
def test_a_size_that_cannot_be_divided_is_one_line(demo, n_embd, capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(demo.Config, argv=[f"--n_embd={n_embd}"])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: n_embd={n_embd} must be divisible by")
    assert message.count("\n") == 1


# demo_bpe -----------------------------------------------------------------------------------------


def test_a_cut_tokenizer_is_one_whose_training_stopped_earlier():
    tok = Tokenizer.train(TEXT, 290)
    for size in demo_bpe.vocabulary_sizes(260, tok.vocab_size):
        smaller = demo_bpe.cut(tok, size)
        assert smaller.vocab_size == size
        assert smaller.encode(TEXT) == Tokenizer.train(TEXT, size).encode(TEXT)


@pytest.mark.parametrize("last", [791, 263, 262])
def test_vocabulary_sizes_go_from_the_first_to_the_last(last):
    sizes = demo_bpe.vocabulary_sizes(260, last)
    assert sizes[0] == 260
    assert sizes[-1] == last
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= 8


def test_bytes_per_token_counts_bytes_not_characters():
    assert demo_bpe.bytes_per_token(Tokenizer.train("", 260), "né 言") == 1


def make_small_model():
    """A model, and inputs and targets (8, 6)."""
    cfg = demo_accumulation.Config(batch_size=8, block_size=6, n_layer=1)
    model = demo_accumulation.build_model(cfg, 16, CPU)
    x, y = torch.randint(256, (2, 8, 6), generator=torch.Generator().manual_seed(1))
    return model, x, y


def test_step_flops():
    """Six for each weight and token: two in the forward pass and four in the backward pass. Then
    there are the products inside the attention, of which a kernel may leave out some."""
    model, x, y = make_small_model()
    weights = 0
    for name, p in model.named_parameters():
        if p.ndim == 2 and "wte" not in name:
            weights += p.numel()
    inside = demo_bpe.step_flops(model, x, y) * 1e12 - 6 * weights * x.numel()

    cfg = model.cfg
    products = 2 * cfg.n_layer * x.numel() * x.size(1) * cfg.n_head * cfg.head_dim * 2
    assert 0 <= inside <= 4 * products
    assert all(p.grad is None for p in model.parameters())


def test_the_title_names_no_winner_where_ranges_overlap():
    assert "no difference" in demo_bpe.losses_title([1.0, 3.0], [2.0, 4.0])
    assert "no difference" in demo_bpe.losses_title([2.0, 4.0], [1.0, 3.0])
    assert "bytes against BPE: 3.500 and 1.500" in demo_bpe.losses_title([3, 4], [1, 2])
    assert "no difference" not in demo_bpe.losses_title([1.0], [1.0])


def test_demo_bpe(made):
    metrics = read_metrics(made, "bpe")
    sizes = metrics["compared"]
    assert metrics["vocabulary"][0] == sizes[0] == 260
    assert metrics["bytes_per_token_val"][0] == 1
    assert metrics["bytes_per_token_val"] == sorted(metrics["bytes_per_token_val"])
    steps = [metrics["steps"][str(size)] for size in sizes]
    assert steps[0] == 10
    assert steps[2] > steps[0], "shorter rows must give more steps"
    assert all(len(losses) == 1 for losses in metrics["nats_per_byte"].values())
    assert metrics["true_nats_per_byte"] is None
    for name in ("demo_bpe_tokens.png", "demo_bpe_loss.png"):
        assert (made / name).exists()


# demo_accumulation --------------------------------------------------------------------------------


def test_micro_batches_have_the_gradient_of_the_mean_loss():
    model, x, y = make_small_model()
    model.double()
    logits, _ = model(x)
    loss = F.nll_loss(logits.log_softmax(dim=-1).flatten(0, 1), y.flatten())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.cat([gradient.flatten() for gradient in gradients])
    for accum in (1, 2, 8):
        gradient = demo_accumulation.flat_gradient(model, x, y, accum)
        assert demo_accumulation.relative_difference(gradient, expected) < 1e-6
    other = demo_accumulation.flat_gradient(model, x, y.flip(0), 2)
    assert demo_accumulation.relative_difference(other, expected) > 0.1


def test_the_memory_meter_counts_storages_once_and_no_weights():
    linear = torch.nn.Linear(10, 10, bias=False)
    x = torch.ones(10, requires_grad=True)  # only then is the weight needed, too
    meter = demo_accumulation.MemoryMeter(linear)
    with meter:
        for _ in range(2):  # the second micro-batch does not add to the first
            h = linear(x)  # keeps x, 40 bytes, and the weight
            squares = h * h  # keeps h, 40 bytes, once
            squares.exp().sum().backward()  # keeps the result of exp, 40 bytes
    assert meter.peak == 120


def test_the_peak_shrinks_with_the_micro_batch():
    model, x, y = make_small_model()
    peaks = [demo_accumulation.measure_peak(model, x, y, accum) for accum in (1, 2, 4)]
    assert 1.7 < peaks[0] / peaks[1] <= 2
    assert 1.5 < peaks[1] / peaks[2] <= 2


def test_parse_widths():
    assert demo_accumulation.parse_widths("64,128") == [64, 128]
    for text in ("64,x", "12", "0", ""):
        with pytest.raises(SystemExit):
            demo_accumulation.parse_widths(text)


def test_demo_accumulation(made):
    metrics = read_metrics(made, "accumulation")
    assert metrics["micro_batches"] == [1, 2, 4]
    assert max(metrics["gradient_float64"]) < 1e-12
    assert max(metrics["gradient_float32"]) < 1e-4
    assert metrics["saved_mib"] == sorted(metrics["saved_mib"], reverse=True)
    assert len(metrics["bf16_gain"]) == 2
    for name in ("demo_accumulation.png", "demo_accumulation_bf16.png"):
        assert (made / name).exists()


# demo_schedule ------------------------------------------------------------------------------------


def test_schedules_by_hand():
    cfg = train.Config(steps=10, warmup=0.2, decay=0.5)
    scales = {}
    for schedule in demo_schedule.SCHEDULES:
        steps = range(10)
        scales[schedule] = [demo_schedule.schedule_scale(step, schedule, cfg) for step in steps]
    assert scales["none"] == [0.5] + [1.0] * 9
    linear = [0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert scales["linear"] == pytest.approx(linear)
    stable = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert scales["warmup-stable-decay"] == pytest.approx(stable)
    cosine = [0.5, 1.0] + [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert scales["cosine"] == pytest.approx(cosine)
    for schedule in demo_schedule.SCHEDULES:
        assert min(scales[schedule]) > 0, "every step must learn"


@pytest.mark.parametrize("kind", demo_schedule.OPTIMIZERS)
def test_both_arms_train_the_same_parameters(kind):
    sizes = dict(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_kv_head=1, n_embd=8)
    model = GPT(GPTConfig(**sizes))
    cfg = train.Config(lr=0.5, lr_adamw=0.25, weight_decay=0.125)
    hidden, others = demo_schedule.build_optimizers(model, cfg, kind)
    muon, _ = train.make_optimizers(model, cfg)

    def identities(optimizer):
        return {id(p) for group in optimizer.param_groups for p in group["params"]}

    assert identities(hidden) == identities(muon)
    assert identities(hidden) | identities(others) == {id(p) for p in model.parameters()}
    assert type(hidden) is (train.Muon if kind == "Muon" else torch.optim.AdamW)
    (group,) = hidden.param_groups
    assert group["peak_lr"] == (0.5 if kind == "Muon" else 0.25)
    assert group["weight_decay"] == 0.125
    assert others.param_groups[0]["peak_lr"] == 0.25


def test_compare_names_a_winner_only_where_ranges_are_apart():
    assert demo_schedule.best_rate({1: [3.0, 1.0], 2: [1.5, 1.7]}) == 2
    sentence = demo_schedule.compare({"a": [2.0, 2.2], "b": [1.0, 1.2]})
    assert sentence == "b 1.100, a 2.100 nats per byte"
    sentence = demo_schedule.compare({"a": [1.1, 1.3], "b": [1.0, 1.2]})
    assert sentence.endswith("no difference")


def test_parse_rates():
    assert demo_schedule.parse_rates("3,0.3,1") == [0.3, 1.0, 3.0]
    for text in ("1,2", "1,1,2", "1,2,x", "1,2,-3", "0,1,2"):
        with pytest.raises(SystemExit):
            demo_schedule.parse_rates(text)


def test_demo_schedule(made):
    """Four schedules at the one middle rate. With one of them, both optimizers at three rates."""
    metrics = read_metrics(made, "schedule")
    losses = metrics["val_loss"]
    assert len(losses) == 4 + 2 + 3
    assert all(len(values) == 2 for values in losses.values())
    assert losses["none, Muon, 2"] != losses["linear, Muon, 2"]
    assert losses["warmup-stable-decay, Muon, 2"] != losses["warmup-stable-decay, AdamW, 2"]
    for name in ("demo_schedule.png", "demo_schedule_muon.png"):
        assert (made / name).exists()


# demo_resume --------------------------------------------------------------------------------------


def test_size_in_bytes():
    content = {"a": torch.zeros(3, 5), "b": [1, 2.5, b"xyz", "uv"]}
    assert demo_resume.size_in_bytes(content) == 60 + 8 + 8 + 3 + 2 + len("ab")


def test_the_contents_add_up_to_the_size_of_the_file(tmp_path):
    path = tmp_path / "x.pt"
    states = [{"m": torch.zeros(7)}, {"v": torch.zeros(2, 9), "step": 1}]
    weights = {"w": torch.zeros(100)}
    save_checkpoint(path, kind="resume", weights=weights, optimizers=states, tokenizer=b"12345")
    contents = demo_resume.checkpoint_contents(path)
    assert sum(contents.values()) == path.stat().st_size
    assert min(contents.values()) > 0
    assert contents["weights"] == 400 + len("w")
    assert contents["Muon: momentum"] == 28 + len("m")
    assert contents["AdamW: two moments"] == 72 + len("v") + len("step") + 8
    assert contents["tokenizer"] == 5


def test_largest_difference_of_two_logs():
    records = [{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0}]
    assert demo_resume.largest_difference(records, [dict(record) for record in records]) == 0
    other = [records[0], {"step": 1, "loss": 1.25}]
    assert demo_resume.largest_difference(records, other) == 0.25
    with pytest.raises(AssertionError, match="different steps"):
        demo_resume.largest_difference(records, records[:1])


def test_largest_difference_of_two_checkpoints(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.5)):
        weights = {"w": torch.full((3,), value), "v": torch.ones(2)}
        save_checkpoint(tmp_path / name, kind="base", weights=weights)
    assert demo_resume.largest_weight_difference(tmp_path / "a", tmp_path / "a") == 0
    assert demo_resume.largest_weight_difference(tmp_path / "a", tmp_path / "b") == 0.5


def test_demo_resume(made):
    metrics = read_metrics(made, "resume")
    assert metrics["difference"] == 0
    assert metrics["difference_weights"] == 0
    assert 9 <= metrics["killed_at"] < 39
    assert 4 <= metrics["resumed_from"] <= metrics["killed_at"] + 1
    assert metrics["run_twice"] == metrics["killed_at"] + 1 - metrics["resumed_from"]
    assert metrics["in_log"] == metrics["in_tensorboard"] == 40
    sizes = metrics["bytes"]
    assert sizes["resume.pt: weights"] == sizes["base.pt: weights"]
    assert sizes["base.pt: Muon: momentum"] < 10 < sizes["resume.pt: Muon: momentum"]
    assert sizes["resume.pt: tokenizer"] == sizes["base.pt: tokenizer"] > 10
    for name in ("demo_resume.png", "demo_resume_tensorboard.png"):
        assert (made / name).exists()


# demo_scaling -------------------------------------------------------------------------------------


def test_the_parameters_are_those_that_a_token_is_multiplied_by():
    sizes = dict(vocab_size=20, n_layer=2, n_head=2, n_kv_head=1, n_embd=8, head_dim=4, mlp_dim=24)
    model = GPT(GPTConfig(**sizes))
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
    assert demo_scaling.count_parameters(model) == 2 * (attention + 3 * 8 * 24) + 8 * 20


def make_runs(law):
    """Runs of four sizes and four lengths that obey a law exactly."""
    runs = []
    for N in (30e3, 60e3, 150e3, 400e3):
        for D in (50e3, 100e3, 200e3, 500e3):
            runs.append(demo_scaling.Run(int(N), int(D), law.loss(N, D), seed=0))
    return runs


LAW = demo_scaling.Law(E=0.085, A=0.1, alpha=0.5, B=0.2, beta=0.8, N0=1e5, D0=2e5)


def test_the_law_is_a_sum_of_three_terms():
    assert LAW.loss(25_000, 400_000) == pytest.approx(0.085 + 0.1 * 2 + 0.2 / 2**0.8)
    a, b, e = math.log(LAW.A), math.log(LAW.B), math.log(LAW.E)
    point = torch.tensor([[a, b, e, LAW.alpha, LAW.beta]] * 2).double()
    log_n = torch.tensor([-1.0, 0.0, 2.0]).double()
    log_d = torch.tensor([0.5, 1.0, -0.5]).double()
    expected = []
    for n, d in zip(log_n.tolist(), log_d.tolist()):
        expected.append(LAW.loss(1e5 * math.exp(n), 2e5 * math.exp(d)))
    losses = demo_scaling.log_law(point, log_n, log_d).exp()  # (2, 3)
    torch.testing.assert_close(losses, torch.tensor([expected] * 2).double())


def assert_same_law(law, expected):
    """The units of two laws may differ, so their exponents and predictions are compared."""
    for field in ("E", "alpha", "beta"):
        assert getattr(law, field) == pytest.approx(getattr(expected, field), rel=0.01)
    for N, D in ((1e4, 1e5), (1e6, 1e6), (1e5, 1e4)):
        assert law.loss(N, D) == pytest.approx(expected.loss(N, D), rel=0.01)


def test_the_fit_finds_the_law_that_made_the_runs():
    law, point = demo_scaling.fit(make_runs(LAW))
    assert_same_law(law, LAW)
    again, _ = demo_scaling.fit(make_runs(LAW), starts=[point])
    assert_same_law(again, LAW)


def test_one_run_that_went_wrong_moves_the_fit_little():
    runs = make_runs(LAW)
    runs[5] = runs[5]._replace(loss=2 * runs[5].loss)
    law, _ = demo_scaling.fit(runs)
    assert_same_law(law, LAW)


def test_a_fixed_entropy_stays_and_the_rest_is_fitted():
    law, _ = demo_scaling.fit(make_runs(LAW), E=LAW.E)
    assert law.E == pytest.approx(LAW.E, rel=1e-12)
    assert_same_law(law, LAW)
    wrong, _ = demo_scaling.fit(make_runs(LAW), E=0.2)
    assert wrong.E == pytest.approx(0.2, rel=1e-12)
    assert wrong.alpha != pytest.approx(LAW.alpha, rel=0.05)


def test_a_run_of_weight_two_counts_like_two_runs():
    generator = torch.Generator().manual_seed(0)
    log_n, log_d, log_loss = torch.randn(3, 4, generator=generator).double()
    point = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).double()
    weight = torch.tensor([2.0, 1.0, 0.0, 1.0]).double()
    index = torch.tensor([0, 0, 1, 3])
    error = demo_scaling.fit_error(point, log_n, log_d, log_loss, weight)
    ones = torch.ones(4).double()
    repeated = demo_scaling.fit_error(point, log_n[index], log_d[index], log_loss[index], ones)
    torch.testing.assert_close(error, repeated)


def test_the_best_size_is_that_of_a_search():
    C = 1e11
    sizes = [10 ** (3 + 0.001 * i) for i in range(4000)]
    best = min(sizes, key=lambda N: LAW.loss(N, C / (6 * N)))
    assert LAW.best_size(C) == pytest.approx(best, rel=0.01)


def test_hold_out_takes_the_largest_models_and_the_longest_runs():
    runs = make_runs(LAW)
    small, large = demo_scaling.hold_out(runs)
    assert len(small) == 9 and len(large) == 7
    assert sorted(small + large) == sorted(runs)
    assert max(run.N for run in small) == 150_000
    assert max(run.D for run in small) == 200_000


def test_misses_counts_error_bars_without_zero():
    found = demo_scaling.Fit(LAW, [], [0.1, 0.1, -0.1], low=[0.05, -1, -0.2], high=[0.2, 1, -0.05])
    assert demo_scaling.misses(found) == 2
    assert demo_scaling.typical_error([3.0, -4.0]) == pytest.approx(12.5**0.5)
    low, high = demo_scaling.interval(list(range(101)))
    assert (low, high) == (5, 95)


def test_the_title_says_whether_the_truth_is_inside_the_error_bar():
    draws = [LAW._replace(E=0.05 + 0.01 * i) for i in range(5)]
    assert "\ncontains the true" in demo_scaling.entropy_title(LAW, draws, 0.08, 0.5)
    assert "\ndoes not contain the true" in demo_scaling.entropy_title(LAW, draws, 0.2, 0.5)


def test_parse_sizes_and_lengths():
    assert demo_scaling.parse_sizes("1x24,2x48,1x24,1x8,3x8") == [(1, 24), (2, 48), (1, 8), (3, 8)]
    assert demo_scaling.parse_lengths("30,10,10,20,40") == [10, 20, 30, 40]
    for text in ("1x24,2x48,1x8", "1x24,2x48,1x8,0x8", "1x24,2x48,1x8,x", ""):
        with pytest.raises(SystemExit):
            demo_scaling.parse_sizes(text)
    for text in ("1,2,3", "1,2,3,0", "1,2,3,x", ""):
        with pytest.raises(SystemExit):
            demo_scaling.parse_lengths(text)


def test_demo_scaling(made):
    metrics = read_metrics(made, "scaling")
    assert len(metrics["runs"]) == 16
    assert len(metrics["held_out"]) == 7
    assert len(metrics["laws"]) == len(metrics["best_size_exponent"]) == 4
    fixed = [law["E"] for name, law in metrics["laws"].items() if "fixed" in name]
    assert fixed == pytest.approx([metrics["true_nats_per_byte"]] * 2)
    errors = [errors for errors in metrics["errors"].values() if errors]
    assert [len(each) for each in errors] == [7, 7]
    for name in ("demo_scaling.png", "demo_scaling_trust.png"):
        assert (made / name).exists()


# demo_induction -----------------------------------------------------------------------------------

SLOT_OF = {"cow": "animal", "Finn": "hero", "Mia": "hero", "blue": "colour", "kite": "thing"}
SLOT_OF |= {"Rome": "place", "Cairo": "place"}
DOCUMENT = (
    "Write a story about a cow named Finn and the blue kite. End it sadly.\n"
    "One day, a cow named Finn was in Rome. Then Mia saw the blue kite. Finn lost the blue kite."
)


def test_marks_tell_first_mentions_from_later_ones():
    marks = demo_induction.mark(DOCUMENT, SLOT_OF)
    words = [re.match(r"\w+", DOCUMENT[each.start :])[0] for each in marks]
    assert words == ["cow", "Finn", "Rome", "Mia", "blue", "kite", "Finn", "blue", "kite"]
    copied, guessed, repeated = (
        demo_induction.COPIED,
        demo_induction.GUESSED,
        demo_induction.REPEATED,
    )
    kinds = [each.kind for each in marks]
    assert kinds == [copied] * 2 + [guessed, repeated] + [copied] * 2 + [repeated] * 3
    for word, each in zip(words, marks):
        assert each.slot == SLOT_OF[word]
        if each.kind == copied:
            assert each.source == DOCUMENT.index(word)
        else:
            assert each.source == -1


def test_only_documents_with_a_brief_are_measured():
    text = f"{DOCUMENT}\n\nA fox is a wild animal.\n\nTom had 7 plums.\n7-2=5.\n\n{DOCUMENT}\n"
    assert demo_induction.briefed(text) == [DOCUMENT, DOCUMENT]


@pytest.mark.parametrize("vocab_size", [260, 400])
def test_rows_point_at_the_first_token_of_each_word(vocab_size):
    """With bytes as tokens and with longer ones: the token at the source must be the same as the
    one that is to be copied, and begin the same word."""
    tok = Tokenizer.train(DOCUMENT * 3, vocab_size)
    rows = demo_induction.make_rows(tok, [DOCUMENT, DOCUMENT], SLOT_OF, 300)
    ids = tok.encode(".\n\n" + DOCUMENT + "\n\n")
    assert rows.ids[1, : len(ids)].tolist() == ids

    found = []
    for t in (rows.slot[0] >= 0).nonzero()[:, 0].tolist():
        rest = tok.decode(ids[t + 1 :]).lstrip()
        found.append(re.match(r"\w+", rest)[0])
        assert demo_induction.SLOTS[rows.slot[0, t]] == SLOT_OF[found[-1]]
        is_copied = rows.kind[0, t] == demo_induction.KINDS.index(demo_induction.COPIED)
        assert (rows.source[0, t] >= 0) == is_copied
        if is_copied:
            source = rows.source[0, t]
            assert ids[source] == ids[t + 1]
            assert tok.decode(ids[source:]).lstrip().startswith(found[-1])
            assert source < t
    assert found == ["cow", "Finn", "Rome", "Mia", "blue", "kite", "Finn", "blue", "kite"]

    # Everything else: the brief and the padding are ignored, the story is not.
    ignored = rows.kind[0] == demo_induction.KINDS.index(demo_induction.IGNORED)
    counted = tok.decode(torch.tensor(ids[1:])[~ignored[: len(ids) - 1]].tolist())
    assert counted.strip() == DOCUMENT.split("\n")[1]


def test_a_row_that_ends_early_has_no_marks_beyond_it():
    tok = Tokenizer.train("", 260)
    rows = demo_induction.make_rows(tok, [DOCUMENT], SLOT_OF, 100)
    assert rows.ids.shape == (1, 101)
    kinds = (rows.kind == demo_induction.KINDS.index(demo_induction.COPIED)).sum()
    assert kinds == 2, "only cow and Finn are within the first hundred bytes"


def test_second_names():
    no_colour = "Write a story about a cow named Finn.\nOne day, a cow."
    changed, added = demo_induction.add_second_names(
        [DOCUMENT, no_colour], SLOT_OF, ["Finn", "Mia"], random.Random(0)
    )
    assert added == ["Mia"]
    brief, story = changed[0].split("\n")
    assert brief == "Write a story about a cow named Finn and the Mia kite. End it sadly."
    assert story == DOCUMENT.split("\n")[1]
    first = demo_induction.mark(changed[0], SLOT_OF)[1]
    assert (first.kind, first.source) == (demo_induction.COPIED, DOCUMENT.index("Finn"))


def make_looked_at(**options):
    """A model whose heads all do something, and inputs (2, 12)."""
    sizes = dict(vocab_size=40, block_size=60, n_layer=2, n_head=4, n_kv_head=2, n_embd=16)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**sizes, **options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model, torch.randint(40, (2, 12))


@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_trace_is_the_models_own_forward_pass(qk_norm):
    model, idx = make_looked_at(qk_norm=qk_norm)
    found = demo_induction.trace(model, idx)
    logits, _ = model(idx)
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)
    assert found.attention.shape == (2, 2, 4, 12, 12)
    assert found.heads.shape == (2, 2, 4, 12, 4)
    torch.testing.assert_close(found.attention.sum(dim=-1), torch.ones(2, 2, 4, 12))
    assert found.attention.triu(1).abs().max() == 0, "no token may look ahead"


def test_the_weights_of_the_trace_are_those_of_the_fused_call(monkeypatch):
    """The fused call returns its weights if the values are the unit vectors."""
    model, idx = make_looked_at()
    fused = F.scaled_dot_product_attention
    seen = []

    def spy(q, k, v, **options):
        positions = torch.eye(v.size(2)).expand(*v.shape[:2], -1, -1)
        seen.append(fused(q, k, positions, **options))
        return fused(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        model(idx)
    found = demo_induction.trace(model, idx)
    torch.testing.assert_close(found.attention, torch.stack(seen), rtol=1e-4, atol=1e-6)


def test_a_head_that_is_taken_out_is_one_whose_projection_is_zero():
    model, idx = make_looked_at()
    without = demo_induction.trace(model, idx, {(1, 2): 0}).logits
    by_mean = demo_induction.trace(model, idx, {(1, 2): torch.full((4,), 0.5)}).logits
    with torch.no_grad():
        columns = model.h[1].attn.c_proj.weight[:, 8:12]
        constant = columns.sum(dim=1) * 0.5
        columns.zero_()
        expected, _ = model(idx)
        torch.testing.assert_close(without, expected, rtol=1e-4, atol=1e-5)
    assert (by_mean - without).abs().max() > 0.01
    assert constant.abs().max() > 0


def test_the_heads_logits_add_up_along_the_direct_path():
    """Without MLPs and with a single layer, the logits are those of the embedding and of the heads,
    divided by the length of the stream."""
    model, idx = make_looked_at()
    del model.h[1]
    torch.nn.init.zeros_(model.h[0].mlp.c_proj.weight)
    found = demo_induction.trace(model, idx)
    with torch.no_grad():
        added = demo_induction.head_logits(model, found.heads)[0].sum(dim=1)  # (B, T, V)
        start = model.lm_head(model.wte(idx) * model.ln_f.weight)
        x = model.wte(idx)
        stream = x + model.h[0].attn(model.h[0].ln_1(x), *model.positions(12, None, CPU), None)
        rms = (stream.square().mean(dim=-1, keepdim=True) + model.cfg.norm_eps).sqrt()
    torch.testing.assert_close((start + added) / rms, found.logits, rtol=1e-3, atol=1e-4)


def test_random_tokens_are_repeated_once_and_differ():
    tokens = demo_induction.common_tokens(torch.arange(50).repeat_interleave(torch.arange(50)), 60)
    assert tokens.tolist() == list(range(5, 46)), "49 tokens occur, and 4 at each end are left out"
    rows = demo_induction.repeated_tokens(tokens, 3, 7, torch.Generator().manual_seed(0))
    n = demo_induction.REPEAT
    assert rows.shape == (3, 1 + 2 * n)
    assert (rows[:, 0] == 7).all()
    torch.testing.assert_close(rows[:, 1 : n + 1], rows[:, n + 1 :])
    for row in rows.tolist():
        assert len(set(row[1 : n + 1])) == n


def test_prefix_matching_of_a_perfect_head_is_one():
    n = demo_induction.REPEAT
    attention = torch.zeros(1, 1, 3, 1 + 2 * n, 1 + 2 * n)
    for t in range(n + 1, 2 * n):
        attention[0, 0, 0, t, t - n + 1] = 1  # the token after the earlier occurrence
        attention[0, 0, 1, t, t - n] = 1  # the earlier occurrence
        attention[0, 0, 2, t, t - 1] = 1  # the previous token
    assert demo_induction.prefix_matching(attention).tolist() == [[1, 0, 0]]


def test_copying_is_one_if_only_the_attended_token_is_raised():
    ids = torch.tensor([[4, 2, 9]])
    attention = torch.eye(3).expand(1, 1, 3, 3, 3).clone()
    logits = torch.zeros(1, 1, 3, 3, 12)
    for t, token in enumerate(ids[0]):
        logits[:, :, 0, t, token] = 5  # raises what it attends to
        logits[:, :, 1, t, ids[0, t - 1]] = 5  # raises another token of the sample
        logits[:, :, 2, t, ids[0]] = 5  # raises all of the sample
    scores = demo_induction.copying(attention, logits, ids)
    torch.testing.assert_close(scores, torch.tensor([[1.0, -1.0, -1 / 3]]))


def test_attention_to_brief_is_read_at_the_source():
    tok = Tokenizer.train("", 260)
    rows = demo_induction.make_rows(tok, [DOCUMENT, DOCUMENT], SLOT_OF, 250)
    T = rows.kind.size(1)
    attention = torch.zeros(1, 2, 2, T, T)
    for i in range(2):
        for t in range(T):
            attention[0, i, 0, t, rows.source[i, t]] = 0.25 + 0.5 * i
            attention[0, i, 1, t, rows.source[i, t] + 1] = 1
    assert demo_induction.attention_to_brief(attention, rows).tolist() == [[0.5, 0]]


def test_losses_are_means_over_their_tokens():
    tok = Tokenizer.train("", 260)
    rows = demo_induction.make_rows(tok, [DOCUMENT], SLOT_OF, 250)
    losses = rows.kind * 1.0
    for i, kind in enumerate(demo_induction.KINDS[1:], start=1):
        assert demo_induction.losses_by_kind(losses, rows)[kind] == i
    losses = rows.slot * 1.0
    losses[rows.kind != demo_induction.KINDS.index(demo_induction.COPIED)] = 99
    by_slot = demo_induction.losses_by_slot(losses, rows)
    assert by_slot["animal"] == 0 and by_slot["thing"] == 3
    assert math.isnan(by_slot["place"]), "the brief names no place"

    n = demo_induction.REPEAT
    losses = torch.full((2, 2 * n), 3.0)
    losses[:, n + 1 :] = 1.0
    losses[:, n] = 50.0
    assert demo_induction.induction_gain(losses) == 2


def test_the_right_names_share():
    tok = Tokenizer.train("", 260)
    rows = demo_induction.make_rows(tok, [DOCUMENT], SLOT_OF, 250)
    logits = torch.zeros(1, 250, 260)
    position = tok.encode(".\n\n" + DOCUMENT)
    index = tok.decode(position).index("Finn was")
    logits[0, index - 1, position[index]] = math.log(3)
    wrong = torch.tensor([ord("x")])
    assert demo_induction.right_name_share(logits, rows, wrong) == pytest.approx(0.75)
    assert demo_induction.right_name_share(0 * logits, rows, wrong) == pytest.approx(0.5)


def test_when_a_slot_is_copied():
    points = []
    for step, loss in ((10, 2.0), (20, 1.9), (30, 0.9), (40, 0.5), (50, 0.1)):
        points.append(demo_induction.Point(step, {}, {"hero": loss}, 0, 0))
    assert demo_induction.halfway(points, "hero", 2.0) == 30
    assert demo_induction.fall_time(points, "hero", 2.0) == 50 - 20
    assert demo_induction.halfway(points[:2], "hero", 2.0) is None
    assert demo_induction.fall_time(points[:4], "hero", 2.0) is None


def test_best_heads():
    scores = torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.0, 0.8]])
    assert demo_induction.best_heads(scores) == [(0, 1), (1, 2)]


def test_parse_layers():
    assert demo_induction.parse_layers("3,1,3") == [1, 3]
    for text in ("", "0", "1,x", "13", "-1"):
        with pytest.raises(SystemExit):
            demo_induction.parse_layers(text)


def test_demo_induction(made):
    metrics = read_metrics(made, "induction")
    assert metrics["curves"].keys() == {"1", "2"}
    for depth in ("1", "2"):
        curves = metrics["curves"][depth]
        assert [[point["step"] for point in points] for points in curves] == [[2, 3]] * 2
        assert len(metrics["scores"][depth][0]["brief"]) == int(depth)
        for rise in metrics["rises"][depth]:
            assert len(rise) == 6
    for name in ("demo_induction.png", "demo_induction_heads.png"):
        assert (made / name).exists()


# demo_speedrun ------------------------------------------------------------------------------------

SMALL = GPTConfig(vocab_size=20, block_size=8, n_layer=2, n_head=4, n_kv_head=4, n_embd=16)
LADDER = demo_speedrun.cumulative_recipes(0.25, 0.5, 0.75)
ALONE = demo_speedrun.alone_recipes(0.25, 0.5)


def test_the_last_recipe_is_part_4s_model():
    recipe = list(LADDER.values())[-1]
    torch.manual_seed(5)
    model = demo_speedrun.build_model(recipe, SMALL)
    torch.manual_seed(5)
    expected = GPT(SMALL)

    assert [type(module) for module in model.modules()] == [
        type(module) for module in expected.modules()
    ]
    for module in model.modules():
        assert type(module).__module__ != "demo_speedrun"
    assert list(model.state_dict()) == list(expected.state_dict())
    ids = torch.arange(16).view(2, 8)
    assert torch.equal(model(ids)[0], expected(ids)[0])
    for p, q in zip(model.parameters(), expected.parameters()):
        assert torch.equal(p, q), "the initialization is Part 4's, too"


def test_the_last_recipe_is_trained_as_train_py_does():
    defaults = train.Config()
    recipe = replace(list(LADDER.values())[-1], lr=defaults.lr)
    assert recipe.batch_size == defaults.batch_size
    model = demo_speedrun.build_model(recipe, SMALL)
    optimizers = demo_speedrun.build_optimizers(model, recipe)
    expected = train.make_optimizers(model, defaults)
    assert [type(optimizer) for optimizer in optimizers] == [train.Muon, torch.optim.AdamW]
    for optimizer, other in zip(optimizers, expected):
        for group, other_group in zip(optimizer.param_groups, other.param_groups):
            assert [id(p) for p in group["params"]] == [id(p) for p in other_group["params"]]
            for name in group.keys() - {"params"}:
                assert group[name] == pytest.approx(other_group[name]), name

    cfg = train.Config(steps=20)
    for step in range(20):
        scale = demo_speedrun.schedule_scale(step, 20, recipe)
        assert scale == train.lr_scale(step, cfg)


def gpt2_by_hand(weights, ids, n_layer, n_head):
    """GPT-2's logits without biases (Radford et al. 2019), from the weights and plain functions."""
    B, T = ids.shape
    C = weights["wte.weight"].size(1)
    D = C // n_head

    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        deviation = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * weights[f"{name}.weight"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T

    x = weights["wte.weight"][ids] + weights["wte.wpe.weight"][:T]
    for layer in range(n_layer):
        h = norm(x, f"h.{layer}.ln_1")
        heads = []
        for i in range(n_head):
            part = slice(i * D, (i + 1) * D)
            q = linear(h, f"h.{layer}.attn.c_q")[..., part]
            k = linear(h, f"h.{layer}.attn.c_k")[..., part]
            v = linear(h, f"h.{layer}.attn.c_v")[..., part]
            scores = q @ k.transpose(1, 2) / D**0.5
            later = torch.ones(T, T).triu(1).bool()
            heads.append(scores.masked_fill(later, float("-inf")).softmax(dim=-1) @ v)
        x = x + linear(torch.cat(heads, dim=-1), f"h.{layer}.attn.c_proj")

        h = linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
        h = h * (1 + torch.erf(h / 2**0.5)) / 2
        x = x + linear(h, f"h.{layer}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].T


def test_the_first_recipe_is_gpt2():
    model = demo_speedrun.build_model(demo_speedrun.Recipe(), SMALL)
    for p in model.parameters():  # large enough that each part of the model matters
        torch.nn.init.normal_(p, std=0.5)
    ids = torch.randint(20, (3, 8), generator=torch.Generator().manual_seed(0))
    expected = gpt2_by_hand(model.state_dict(), ids, SMALL.n_layer, SMALL.n_head)
    torch.testing.assert_close(model(ids)[0], expected, rtol=1e-4, atol=1e-4)


def test_gpt2s_initialization():
    """The output projections are smaller by the square root of the number of branches."""
    cfg = replace(SMALL, n_embd=128, n_head=4)
    model = demo_speedrun.build_model(demo_speedrun.Recipe(), cfg)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = 0.02 / 2 if "c_proj" in name else 0.02  # two layers have four branches
            assert p.std().item() == pytest.approx(std, rel=0.1), name
    assert model.lm_head.weight is model.wte.weight


def test_nanogpts_optimizer():
    recipe = demo_speedrun.Recipe()
    model = demo_speedrun.build_model(recipe, SMALL)
    (adamw,) = demo_speedrun.build_optimizers(model, recipe)
    matrices, gains = adamw.param_groups
    assert matrices["weight_decay"] == 0.1
    assert gains["weight_decay"] == 0
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in gains["params"]} == {1}
    together = [*matrices["params"], *gains["params"]]
    assert {id(p) for p in together} == {id(p) for p in model.parameters()}
    assert matrices["betas"] == (0.9, 0.99)
    assert matrices["peak_lr"] == gains["peak_lr"] == 1e-3


def test_nanogpts_schedule_by_hand():
    scales = [demo_speedrun.schedule_scale(k, 40, demo_speedrun.Recipe()) for k in range(40)]
    assert scales[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert scales[21] == pytest.approx(0.55), "half way down the cosine"
    assert scales[39] == pytest.approx(0.1, abs=0.01)
    assert scales[1:] == sorted(scales[1:], reverse=True)


def test_each_step_of_the_ladder_changes_one_thing():
    recipes = list(LADDER.values())
    assert recipes[0] == demo_speedrun.Recipe()
    assert recipes[1] == demo_speedrun.Recipe(lr=0.25)
    assert recipes[-1].lr == 0.75
    for previous, recipe, change in zip(recipes[1:], recipes[2:], demo_speedrun.CHANGES.values()):
        assert replace(previous, **change, lr=recipe.lr) == recipe
    for name, change in demo_speedrun.CHANGES.items():
        recipe = ALONE[name]
        assert replace(recipes[1], **change, lr=recipe.lr) == recipe
        assert recipe.lr == (0.5 if name == "Muon" else 0.25)


@pytest.mark.parametrize("name", demo_speedrun.CHANGES)
def test_each_change_builds_what_it_says(name):
    recipe = ALONE[name]
    model = demo_speedrun.build_model(recipe, SMALL)
    block = model.h[0]
    rotated = type(block.attn) is part_4_model.Attention
    assert rotated == recipe.rope
    assert (type(model.wte) is torch.nn.Embedding) == recipe.rope
    for norm in (block.ln_1, block.ln_2, model.ln_f):
        assert (type(norm) is part_4_model.RMSNorm) == recipe.rms_norm
    assert (type(block.mlp) is part_4_model.MLP) == recipe.swiglu
    assert block.attn.qk_norm == recipe.qk_norm
    assert (model.lm_head.weight is not model.wte.weight) == recipe.separate_head
    is_zero = [not block.attn.c_proj.weight.any(), not block.mlp.c_proj.weight.any()]
    assert is_zero == [recipe.zero_init] * 2
    logits, loss = model(torch.arange(8)[None], torch.arange(8)[None])
    assert logits.shape == (1, 8, 20)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("recipe", [LADDER["+ RoPE"], demo_speedrun.Recipe()])
def test_no_recipe_sees_the_future(recipe):
    model = demo_speedrun.build_model(recipe, SMALL)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    ids = torch.arange(8)[None]
    changed = ids.clone()
    changed[0, 5] = 19
    difference = (model(ids)[0] - model(changed)[0]).abs().amax(dim=-1)[0]
    assert difference[:5].max() < 1e-5
    assert difference[5:].min() > 1e-3


@pytest.mark.parametrize("first_share", [1 / 16, 0.25, 1.0])
@pytest.mark.parametrize("answer", [0.03, 0.125, 0.3, 1.0, 3.3])
def test_the_budget_that_ends_at_the_target_is_found(answer, first_share):
    """Where the loss falls with the logarithm of the budget, the answer is exact."""
    asked = []

    def loss_of(share):
        asked.append(share)
        return 2.0 - 0.3 * math.log(share)

    target = 2.0 - 0.3 * math.log(answer)
    share = demo_speedrun.find_share(loss_of, target, first_share)
    assert share == pytest.approx(answer)
    assert len(asked) == len(set(asked))


def test_the_search_for_the_budget_ends():
    smallest = demo_speedrun.SMALLEST_SHARE
    assert demo_speedrun.find_share(lambda share: 1.0, 2.0) == smallest
    assert demo_speedrun.find_share(lambda share: 3.0, 2.0) == math.inf
    assert demo_speedrun.find_share(lambda share: 3.0, 2.0, smallest) == math.inf
    diverged = {1.0: 1.9, 0.5: math.inf}
    assert demo_speedrun.find_share(diverged.get, 2.0) == 1.0
    for share, power in ((0.3, 0.25), (0.4, 0.5), (3.0, 1.0), (1e-9, smallest), (math.inf, 1.0)):
        assert demo_speedrun.nearest_power(share) == power


def make_result(seconds):
    return demo_speedrun.Result(seconds, seconds, seconds, seconds)


def test_changes_whose_ranges_overlap_make_no_difference():
    start = make_result([4.0, 6.0])
    results = {"a": make_result([1.0, 4.0]), "b": make_result([1.0, 1.5])}
    results["c"] = make_result([math.inf, math.inf])
    assert demo_speedrun.same_as(start, results) == "Alone no difference: a."
    results.pop("a")
    assert demo_speedrun.same_as(start, results) == ""
    results["rows"] = make_result([1.0, 1.5])._replace(budgets=[3.0, 5.0])
    results["seconds"] = make_result([1.0, 1.5])._replace(seconds=[3.0, 5.0])
    assert demo_speedrun.same_as(start, results) == "Alone no difference: rows, seconds."
    one_seed = make_result([4.0])
    assert demo_speedrun.same_as(one_seed, {"a": one_seed}) == ""


def test_the_title_says_what_the_ends_need():
    ladder = {demo_speedrun.START: make_result([4.0, 6.0])}
    ladder["+ Muon"] = make_result([1.0, 2.0])
    ladder["+ BPE tokens"] = make_result([0.5, 0.7])._replace(
        budgets=[demo_speedrun.SMALLEST_SHARE] * 2
    )
    title = demo_speedrun.describe_ends(ladder, 1.5, 2.0)
    assert "tuned, 5.0 s; ours 1.50 s with bytes, less than 0.60 s with BPE (2 seeds)" in title
    assert "no difference" not in title
    assert "frequencies" not in title
    ladder["+ Muon"] = make_result([1.0, 4.5])
    title = demo_speedrun.describe_ends(ladder, 1.5, 1.1)
    assert "no difference with bytes" in title
    assert "The frequencies of BPE tokens alone give 1.10." in title


def test_a_missed_target_is_null_in_json():
    plain = demo_speedrun.as_plain(make_result([math.inf, 2.0]))
    assert plain["seconds"] == [None, 2.0]


def test_the_evaluated_part_of_the_text(made):
    """Whole rows of at most so many bytes, for bytes as well as for tokens; and a unigram model's
    loss on it, by hand."""
    cfg = demo_speedrun.Config(data=str(made / "long.txt"), vocab_size=300, eval_bytes=200)
    texts = demo_speedrun.load_texts(cfg, SMALL)
    text = (made / "long.txt").read_text()
    val_text = text[int(0.9 * len(text)) :]
    for bpe, size in ((False, 260), (True, 300)):
        data = texts[bpe]
        assert data.tok.vocab_size == size
        decoded = data.tok.decode(data.val_ids.tolist())
        assert val_text.startswith(decoded)
        assert len(decoded.encode()) == data.val_bytes
        assert 150 < data.val_bytes <= 200
        assert data.edges[-1] == len(data.val_ids) - 1

        train_ids = data.train_ids.tolist()
        nats = 0.0
        for token in data.val_ids.tolist()[1:]:
            nats -= math.log((train_ids.count(token) + 1) / (len(train_ids) + size))
        expected = nats / data.val_bytes
        assert demo_speedrun.unigram_loss(data) == pytest.approx(expected, rel=1e-4)


def test_a_training_learns_and_repeats(made):
    cfg = demo_speedrun.Config(data=str(made / "long.txt"), vocab_size=300, eval_bytes=300)
    texts = demo_speedrun.load_texts(cfg, SMALL)
    losses = []
    for _ in range(2):
        trainer = demo_speedrun.Trainer(texts, SMALL, rows=24 * 20, device=CPU)
        losses.append(trainer.loss(replace(LADDER["+ BPE tokens"], lr=0.05), 0))
        untrained = trainer.loss(replace(LADDER["+ BPE tokens"], lr=1e-9), 0)
    assert losses[0] == losses[1] < untrained - 0.3


def test_demo_speedrun(made):
    metrics = read_metrics(made, "speedrun")
    assert list(metrics["ladder"]) == list(LADDER)
    assert list(metrics["alone"]) == list(ALONE)
    for result in [*metrics["ladder"].values(), *metrics["alone"].values()]:
        assert all(len(values) == 2 for values in result.values())
    assert metrics["ladder"]["+ RoPE"] == metrics["alone"]["RoPE"]
    start = metrics["ladder"][demo_speedrun.START]
    assert metrics["target"] == pytest.approx(sum(start["losses"]) / 2)
    assert (made / "demo_speedrun.png").exists()


# demo_kinds ---------------------------------------------------------------------------------------

A_PROBLEM = "Tom had 7 plums. Tom lost 2. How many? Think step by step.\n7-2=5. The answer is 5."


@pytest.fixture(scope="module")
def byte_model():
    torch.manual_seed(0)
    tok = Tokenizer({bytes([i]): i for i in range(256)})
    cfg = GPTConfig(vocab_size=tok.vocab_size, block_size=400, n_layer=1, n_head=2, n_embd=8)
    model = GPT(cfg)
    torch.nn.init.normal_(model.lm_head.weight)
    return model, tok


def test_the_kind_of_a_document():
    assert (
        demo_kinds.kind_of("Write a story about a cow named Tom.\nA cow named Tom ...") == "story"
    )
    assert demo_kinds.kind_of("One day, a cow named Tom was in Rome. ...") == "story"
    assert demo_kinds.kind_of("A cow is a farm animal. We call a hat a garment.") == "statement"
    assert demo_kinds.kind_of(A_PROBLEM) == "problem"


def test_the_loss_of_a_document_is_that_of_its_bytes_one_by_one(byte_model):
    model, tok = byte_model
    ids = list(b"\n" + A_PROBLEM.encode() + b"\n\n")
    logits, _ = model(torch.tensor([ids]), torch.tensor([ids]))
    logp = logits[0].double().log_softmax(dim=-1)
    nats = [-logp[i - 1, ids[i]].item() for i in range(1, len(ids))]

    loss = demo_kinds.document_loss(model, tok, A_PROBLEM, "cpu")
    assert loss.nats == pytest.approx(sum(nats), rel=1e-5)
    assert loss.size == len(A_PROBLEM)
    solution = len(A_PROBLEM.split("\n")[1]) + 2  # with the blank line after it
    assert loss.last_part == pytest.approx(sum(nats[-solution:]), rel=1e-5)


def test_demo_kinds_as_a_script(byte_model, tmp_path):
    require("data/stories")
    model, tok = byte_model
    save_checkpoint(
        tmp_path / "base.pt", kind="base", tokenizer=tok.state(), **model.to_checkpoint()
    )
    options = ["--device=cpu", f"--init={tmp_path}/base.pt", "--longest=260", f"--out={tmp_path}"]
    done = subprocess.run(
        [sys.executable, str(HERE / "demo_kinds.py"), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "demo_kinds.json").read_text())
    for kind in demo_kinds.KINDS:
        assert metrics["measured"][kind] > metrics["true"][kind] > 10
    assert 0 < metrics["left_out"] < 300
    assert (tmp_path / "demo_kinds.png").exists()

    # No story has so few bytes.
    options[2] = "--longest=50"
    done = subprocess.run(
        [sys.executable, str(HERE / "demo_kinds.py"), *options], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--longest=50 leaves out every story" in done.stderr
