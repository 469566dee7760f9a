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

import pytest
import torch
import torch.nn.functional as F

import demo_accumulation
import demo_bpe
import demo_induction
import demo_resume
import demo_scaling
import demo_schedule
import train
from model import GPT, GPTConfig
from shared import save_checkpoint
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
    jobs = [
        ("accumulation", *common, *accumulation),
        ("bpe", *common, f"--data={folder / 'short.txt'}", *bpe),
        ("induction", *common, *induction, "--samples=20"),
        ("resume", *common, f"--data={folder / 'long.txt'}", *resume),
        ("schedule", *common, f"--data={folder / 'long.txt'}", *schedule),
        ("scaling", *common, *scaling),
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
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(HERE), json.dumps(jobs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("=== ")][1::2]
    assert codes == ["=== 0"] * 6 + ["=== 2"] * 10, done.stderr
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
    ],
)
def test_bad_input_ends_in_one_line(made, message):
    lines = [line for line in (made / "stderr").read_text().splitlines() if message in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


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
