"""Tests of Part 4's demos: their mathematics against an independent statement of it, and a tiny run
of each."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import os
import random
import subprocess

import pytest
import torch
import torch.nn.functional as F

import demo_accumulation
import demo_bpe
import demo_resume
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
    jobs = [
        ("accumulation", *common, *accumulation),
        ("bpe", *common, f"--data={folder / 'short.txt'}", *bpe),
        ("resume", *common, f"--data={folder / 'long.txt'}", *resume),
        ("schedule", *common, f"--data={folder / 'long.txt'}", *schedule),
        # Bad input, which must be refused
        ("schedule", *common, f"--data={folder / 'long.txt'}", "--rates=1,2"),
        ("schedule", *common, "--rates=1,2,x"),
        ("accumulation", *common, "--widths=12"),
        ("bpe", *common, f"--data={folder / 'short.txt'}", "--row=24", "--vocab_size=261"),
        ("accumulation", *common, "--batch_size=6"),
        ("resume", *common, "--kill=10", "--save_every=20"),
        ("resume", *common, "--kill=59", "--steps=60"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(HERE), json.dumps(jobs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("=== ")][1::2]
    assert codes == ["=== 0"] * 4 + ["=== 2"] * 7, done.stderr
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
