"""
Tests of shared.py: options, device and seed, files, the log and the judge.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hashlib
import inspect
import json
import os
import random
import re
import signal
import subprocess
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import shared

SCRIPT = """
import sys
import time
from dataclasses import dataclass

sys.path.insert(0, {root!r})
from shared import output_folder, parse_args


@dataclass
class Config:
    wait: float = 0.0  # seconds to sleep
    out: str = ""  # output folder


cfg = parse_args(Config)
out = output_folder(cfg)
print("waiting", flush=True)
time.sleep(cfg.wait)
"""


@dataclass
class Config:
    steps: int = 20  # optimizer steps, 100% of them

    # step size of the optimizer,
    # which is AdamW
    lr: float = 0.1

    # This comment is about the next three fields and must not appear.
    colour: str = "#fff"  # colour of the curve
    out: str = ""  # output folder; empty: out/ beside this script
    resume: bool = False  # continue a run
    seed: int = 0  # seed of all random numbers


@dataclass
class Sizes:
    n_embd: int = 128  # channels
    n_head: int = 4  # attention heads
    head_dim: int = 0  # channels per head; 0: n_embd / n_head

    def __post_init__(self):
        divisible = self.n_embd % self.n_head == 0
        assert divisible, f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}"
        self.head_dim = self.head_dim or self.n_embd // self.n_head


@pytest.fixture
def script(tmp_path):
    """The command of a script that runs in a process of its own."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(shared.ROOT)))
    return [sys.executable, str(path)]


def error_of(capsys, function, *args, code=2, **kwargs):
    """Call a function that must exit with this code and one line on stderr -> that line."""
    with pytest.raises(SystemExit) as stop:
        function(*args, **kwargs)
    line = capsys.readouterr().err
    assert stop.value.code == code
    assert line.startswith("error: ") and line.count("\n") == 1, line
    return line


def is_one_error_line(text):
    return text.startswith("error: ") and text.count("\n") == 1


# ------------------------------------------------------------------------------------------
# Options


def test_options_are_converted_to_the_types_of_the_fields():
    argv = ["--steps", "5", "--lr=1e-3", "--resume", "--n_embd=64", "--colour=a=b"]
    cfg, sizes = shared.parse_args(Config, Sizes, argv=argv)
    assert (cfg.steps, cfg.lr, cfg.resume, cfg.colour) == (5, 1e-3, True, "a=b")
    assert sizes.n_embd == 64
    assert shared.parse_args(Config, argv=["--seed", "1"]).seed == 1
    assert shared.parse_args(Config, argv=["--colour="]).colour == ""


@pytest.mark.parametrize(
    "argv, value",
    [
        ([], False),
        (["--resume"], True),
        (["--resume", "--steps=3"], True),
        (["--resume=1"], True),
        (["--resume=TRUE"], True),
        (["--resume", "true"], True),
        (["--resume=0"], False),
        (["--resume", "false"], False),
    ],
)
def test_flags(argv, value):
    assert shared.parse_args(Config, argv=argv).resume is value


def test_post_init_sees_the_final_values():
    assert shared.parse_args(Sizes, argv=["--n_embd=64"]).head_dim == 16
    assert shared.parse_args(Sizes, argv=["--n_embd=64", "--head_dim=8"]).head_dim == 8


def test_a_default_of_0_can_be_typed():
    """Where the default is 0, the script chooses a value by itself."""

    @dataclass
    class Free:
        steps: int = 0

    assert shared.parse_args(Free, argv=["--steps=0"]).steps == 0


def test_keyword_arguments_replace_defaults():
    cfg, sizes = shared.parse_args(Config, Sizes, argv=["--steps=3"], steps=7, n_embd=64)
    assert (cfg.steps, sizes.n_embd, sizes.head_dim) == (3, 64, 16)
    assert shared.parse_args(Sizes, argv=["--n_embd=64"], head_dim=8).head_dim == 8
    with pytest.raises(AssertionError, match="no_such_field"):
        shared.parse_args(Config, argv=[], no_such_field=1)


def test_changed_has_what_differs_from_the_defaults_and_can_change_a_result():
    argv = ["--seed=0", "--n_embd=64", "--lr=0.2", "--steps=5"]
    cfg, sizes = shared.parse_args(Config, Sizes, argv=argv)
    assert cfg.changed == sizes.changed == {"steps": 5, "lr": 0.2, "n_embd": 64}
    assert list(cfg.changed) == ["steps", "lr", "n_embd"], "in the order of the fields"

    def changed(*argv, **defaults):
        return shared.parse_args(Config, Sizes, argv=argv, **defaults)[0].changed

    assert changed() == {}
    assert changed("--resume", "--out=elsewhere") == {}, "these cannot change a result"
    assert changed("--steps=7", steps=7) == {}
    assert changed("--steps=20", steps=7) == {"steps": 20}
    assert changed("--head_dim=32") == {}, "this is what __post_init__ derives anyway"
    assert changed("--head_dim=16") == {"head_dim": 16}


def test_classes_that_share_a_field_share_the_option():
    @dataclass
    class Other:
        steps: int = 1  # steps of another kind

    cfg, other = shared.parse_args(Config, Other, argv=["--steps=3"])
    assert cfg.steps == other.steps == 3


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--stpes=3"], "no option --stpes, did you mean --steps?"),
        (["--stpes", "3"], "did you mean --steps?"),
        (["--step=3"], "no option --step, did you mean --steps?"),
        (["--n_heads=3"], "did you mean --n_head?"),
        (["steps=3"], "no option steps, did you mean --steps?"),
        (["--steps=3", "9"], "no option 9"),
        (["--steps=abc"], "--steps wants an int, got 'abc'"),
        (["--lr=x"], "--lr wants a float, got 'x'"),
        (["--resume=maybe"], "--resume wants true or false, got 'maybe'"),
        (["--steps"], "--steps wants a value"),
        (["--out", "--lr=1"], "--out wants a value"),
        (["--lr", "-1e-3"], "--lr wants a value: --lr=..."),
        (["--n_embd=65"], "n_embd=65 must be divisible by n_head=4"),
        (["--n_head=0"], "--n_head=0 must be at least 1"),
    ],
)
def test_a_wrong_option_ends_in_one_line(capsys, argv, message):
    assert message in error_of(capsys, shared.parse_args, Config, Sizes, argv=argv)


def test_help(capsys, monkeypatch):
    docstring = """
    A trainer.

        python t.py --steps=9    nine steps
        OMP_NUM_THREADS=1 torchrun t.py

    From nowhere: python is not a command here.
    """
    monkeypatch.setattr(sys.modules[__name__], "__doc__", docstring)
    with pytest.raises(SystemExit) as stop:
        shared.parse_args(Config, Sizes, argv=["--help"], n_embd=64)
    assert not stop.value.code

    text = capsys.readouterr().out
    assert "A trainer." in text
    assert "    python t.py --steps=9    nine steps\n    OMP_NUM_THREADS=1 torchrun t.py\n" in text
    assert "nowhere" not in text
    assert re.search(r"--steps INT +optimizer steps, 100% of them \(default: 20\)", text)
    assert re.search(r"--lr FLOAT +step size of the optimizer, which is AdamW", text)
    assert re.search(r"--colour STR +colour of the curve \(default: #fff\)", text)
    assert re.search(r"--n_embd INT +channels \(default: 64\)", text)
    assert "next three fields" not in text


def test_oserror_is_one_line(script, tmp_path):
    (tmp_path / "file").write_text("")
    command = [*script, "--out=file/folder"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Not a directory" in done.stderr and is_one_error_line(done.stderr), done.stderr


def test_full_disk_is_one_line(script):
    with open("/dev/full", "w") as full_disk:
        done = subprocess.run(script, stdout=full_disk, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "No space left" in done.stderr and is_one_error_line(done.stderr), done.stderr


def test_interrupt_is_one_line(script):
    command = [*script, "--wait=60"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "waiting" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "interrupted" in stderr and is_one_error_line(stderr), stderr


STUBBORN_SCRIPT = """
import sys
import time

sys.path.insert(0, {root!r})
import shared

shared.GRACE = 0.5


class Object:
    def __del__(self):
        time.sleep(60)


shared.signal.signal(shared.signal.SIGINT, shared.on_interrupt)
print("waiting", flush=True)
thing = Object()
del thing
time.sleep(60)
"""


def test_interrupt_ends_a_run_that_ignores_the_exception(tmp_path):
    """Python ignores what is raised while an object is deleted, and would go on."""
    path = tmp_path / "stubborn.py"
    path.write_text(STUBBORN_SCRIPT.format(root=str(shared.ROOT)))
    command = [sys.executable, path]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "waiting" in child.stdout.readline()
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=30)
    assert child.returncode == 130
    assert stderr.startswith("error: interrupted")


# ------------------------------------------------------------------------------------------
# Setting up a run


def test_set_seed_repeats_every_kind_of_random_number():
    def draw(seed):
        shared.set_seed(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(3) == draw(3)
    assert not set(draw(3)) & set(draw(4))
    draw(-1)  # numpy alone would refuse it


def test_pick_device(capsys):
    assert shared.pick_device("cpu") == torch.device("cpu")
    assert shared.pick_device("").type in ("cpu", "cuda", "mps")
    message = error_of(capsys, shared.pick_device, "cuda:99")
    assert "--device=cuda:99 is not available here" in message
    assert "--device=tpu is not available here" in error_of(capsys, shared.pick_device, "tpu")


def test_pick_dtype(capsys):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert shared.pick_dtype("", cpu) == "fp32"
    assert shared.pick_dtype("", gpu) == "bf16"
    assert shared.pick_dtype("bf16", cpu) == "bf16"
    assert shared.pick_dtype("fp16", gpu) == "fp16"
    assert "on a GPU, fp16" in error_of(capsys, shared.pick_dtype, "fp16", cpu)
    assert "--dtype=fp8" in error_of(capsys, shared.pick_dtype, "fp8", gpu)


@pytest.mark.parametrize("dtype, expected", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_for(dtype, expected):
    autocast = shared.autocast_for(torch.device("cpu"), dtype)
    x = torch.ones(2, 2)
    for _ in range(2):  # one function makes a new context each time
        with autocast():
            assert (x @ x).dtype == expected


def test_changed_settings_go_to_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "getfile", lambda cls: str(tmp_path / "train.py"))
    monkeypatch.chdir(tmp_path)

    def output_folder(*argv):
        return shared.output_folder(shared.parse_args(Config, argv=argv))

    default = tmp_path / "out"
    assert output_folder() == output_folder("--resume") == output_folder("--steps=20") == default
    assert output_folder("--seed=7", "--steps=2") == default / "steps=2,seed=7"
    assert output_folder("--colour=a/b c") == default / "colour=a_b_c"
    assert output_folder("--seed=7", "--out=elsewhere") == tmp_path / "elsewhere"
    assert (tmp_path / "elsewhere").is_dir()
    assert shared.output_folder(Config(steps=2)) == default, "this one has no `changed`"


def test_output_folder_refuses_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cfg = Config(out=str(tmp_path / "file"))
    assert "is a file, but it must be a folder" in error_of(capsys, shared.output_folder, cfg)


# ------------------------------------------------------------------------------------------
# Files


def test_a_checkpoint_comes_back_and_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new_folder" / "x.pt"
    weights = {"w": torch.arange(3)}
    shared.save_checkpoint(path, kind="base", model=weights, merges=[(1, 2)])
    content = shared.load_checkpoint(path, ("sft", "base"))
    assert torch.equal(content["model"]["w"], weights["w"])
    assert content["merges"] == [(1, 2)]
    assert content["changed"] == {}
    assert shared.load_checkpoint(path, None)["kind"] == "base"

    def full_disk(file_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        shared.save_checkpoint(path, kind="base", model={})
    assert os.listdir(path.parent) == ["x.pt"], "the temporary file must not stay"
    assert "w" in shared.load_checkpoint(path, "base")["model"], "the old checkpoint must stay"


def test_broken_checkpoints(tmp_path, capsys):
    def error(path, kind):
        return error_of(capsys, shared.load_checkpoint, path, kind)

    good = tmp_path / "good.pt"
    shared.save_checkpoint(good, kind="rm", w=torch.zeros(1000))
    assert "is a 'rm' checkpoint, expected 'base'" in error(good, "base")
    assert "is a 'rm' checkpoint, expected 'base' or 'x'" in error(good, ("base", "x"))
    assert "no checkpoint at" in error(tmp_path / "none.pt", "rm")

    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")

    # weights_only=True refuses to load classes, because they could run code.
    torch.save({"kind": "rm", "model": torch.nn.Linear(2, 2)}, tmp_path / "code.pt")

    for name in ("cut", "text", "empty", "tensor", "foreign", "code"):
        assert "not a checkpoint of this project" in error(tmp_path / f"{name}.pt", None), name


@pytest.fixture
def maker(tmp_path, monkeypatch):
    """The script that makes part_4/out/base.pt, in a repository of its own."""
    monkeypatch.setattr(shared, "ROOT", tmp_path)
    path = tmp_path / "part_4" / "train.py"
    path.parent.mkdir()
    return path


def test_require_passes_a_failure_on(maker, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    maker.write_text("import os\nassert 'MASTER_ADDR' not in os.environ\nraise SystemExit(7)")
    with pytest.raises(SystemExit) as stop:
        shared.require("part_4/out/base.pt")
    assert stop.value.code == 7


def test_require_builds_once(maker):
    path = maker.parent / "out" / "base.pt"
    folder_of_shared = str(Path(shared.__file__).parent)
    maker.write_text(
        f"import sys\nsys.path.insert(0, {folder_of_shared!r})\nimport shared\n"
        f"shared.save_checkpoint({str(path)!r}, kind='base')\n"
    )
    assert shared.require("part_4/out/base.pt") == path
    maker.write_text("raise SystemExit('it was built twice')")
    assert shared.require("part_4/out/base.pt") == path


def test_require_refuses_what_was_not_made_with_the_defaults(maker, capsys):
    path = maker.parent / "out" / "base.pt"
    shared.save_checkpoint(path, kind="base", changed={"steps": 5})
    assert "made with --steps=5" in error_of(capsys, shared.require, "part_4/out/base.pt")
    assert shared.require(path) == path, "a path of the user's own may be any run"
    assert "there is no nowhere.pt" in error_of(capsys, shared.require, "nowhere.pt")


def test_under_torchrun_the_others_wait_for_process_0(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "ROOT", tmp_path)
    monkeypatch.setattr(shared, "RANK", 1)
    path = tmp_path / "data" / "stories" / "facts.json"
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"patterns": [{"after": null}]}')

    monkeypatch.setattr(time, "sleep", sleep)
    assert shared.require("data/stories") == path.parent
    assert len(naps) == 1


def test_every_maker_is_a_script_of_the_part_it_writes_to():
    for path, maker in shared.MAKERS.items():
        assert (shared.ROOT / maker.script).is_file(), maker
        if path.startswith("part_"):
            assert path.split("/")[0] == maker.script.split("/")[0]


def test_read_text(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9")
    assert shared.read_text(path) == "caf\u00e9", "a byte order mark is no part of the text"
    path.write_bytes(b"caf\xe9")
    assert "is not UTF-8" in error_of(capsys, shared.read_text, path)
    path.write_text(" \n")
    assert "is empty" in error_of(capsys, shared.read_text, path)
    assert "there is no file" in error_of(capsys, shared.read_text, tmp_path / "none.txt")


def test_read_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x\u2028y"}\n\n{"a": "", "b": 2}\n')
    assert shared.read_jsonl(path, ["a"]) == [{"a": "x\u2028y"}, {"a": "", "b": 2}]
    path.write_text(json.dumps([{"a": "x"}, {"a": "y"}], indent=1))
    assert shared.read_jsonl(path, ["a"]) == [{"a": "x"}, {"a": "y"}]


@pytest.mark.parametrize(
    "text, fields, message",
    [
        ('{"a": "x", "b": "y"}\n{"a": "x"}\n', ["a", "b"], "line 2: field 'b' is missing"),
        ('{"a": null}', ["a"], "line 1: field 'a' must be a string, got null"),
        ('{"a": 7}', ["a"], "line 1: field 'a' must be a string, got 7"),
        ('{"a": ["x"]}', ["a"], "line 1: field 'a' must be a string, got [\"x\"]"),
        ('[{"a": "x"}, {}]', ["a"], "record 2: field 'a'"),
        ('{"a": "x"}\n\n{"a": \n', ["a"], "line 3: "),
        ('[{"a": "x"},\n{"a" 1}]', ["a"], "line 2: "),
        ('{"check": "7"}', [], 'line 1: "check" must be an object with some of answer'),
        ('{"check": {"must": "cat"}}', [], "'must' must be a list of strings, got \"cat\""),
        ('{"check": {"must": [7]}}', [], "'must' must be a list of strings, got [7]"),
        ('{"check": {"must": null}}', [], "'must' must be a list of strings, got null"),
        ('{"check": {"answer": 7}}', [], "'answer' must be a string, got 7"),
        ('{"check": {"ends": true}}', [], "'ends' must be a string, got true"),
        ('{"check": {"no_repeat": 1}}', [], "'no_repeat' must be true or false, got 1"),
        ('{"check": {"anser": "7"}}', [], "no rule 'anser', did you mean 'answer'?"),
        ('{"check": {"patterns": "mars"}}', [], "names the world 'mars', but there is no"),
        ("3\n", ["a"], "line 1: expected an object with a"),
        (" \n", ["a"], "is empty"),
        ("[]", ["a"], "has no records"),
    ],
)
def test_broken_jsonl_is_reported_with_its_line(tmp_path, capsys, text, fields, message):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    assert message in error_of(capsys, shared.read_jsonl, path, fields)


def test_shakespeare_is_downloaded_once_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shared, "ROOT", tmp_path)
    served = tmp_path / "served"
    served.write_text("To be")
    monkeypatch.setattr(shared, "SHAKESPEARE", served.as_uri())

    # The checksum is wrong.
    assert "cannot download" in error_of(capsys, shared.read_text, "shakespeare")
    assert list((tmp_path / "data" / "shakespeare").iterdir()) == []

    # It is right.
    monkeypatch.setattr(shared, "SHAKESPEARE_SHA256", hashlib.sha256(b"To be").hexdigest())
    assert shared.read_text("shakespeare") == "To be"

    # Without a network the first download is still there.
    monkeypatch.setattr(shared, "SHAKESPEARE", "file:///nowhere")
    assert shared.read_text("shakespeare") == "To be"
    (tmp_path / "data" / "shakespeare" / "input.txt").unlink()
    assert "without a network" in error_of(capsys, shared.read_text, "shakespeare")


def test_save_metrics(tmp_path):
    shared.save_metrics(tmp_path, loss=torch.tensor(0.5), steps=3)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"loss": 0.5, "steps": 3}
    shared.save_metrics(tmp_path, name="other", mean=np.float32(0.5), curve=torch.ones(2))
    assert json.loads((tmp_path / "other.json").read_text()) == {"mean": 0.5, "curve": [1, 1]}


# ------------------------------------------------------------------------------------------
# The log


def read_log(folder, name="log"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_log_writes_every_step_and_prints_a_few(tmp_path, capsys):
    log = shared.Log(tmp_path, 5)
    for step in range(5):
        log(step, loss=torch.tensor(2.0), load=[1, 2], **({"val_loss": 3} if step == 2 else {}))
    assert read_log(tmp_path)[1] == {"step": 1, "loss": 2.0, "load": [1, 2]}
    assert [record["step"] for record in read_log(tmp_path)] == [0, 1, 2, 3, 4]

    # The first step, the one with a value that was not there before, and the last.
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 0/5 | loss 2.000 | 0:00 elapsed, 0:00 left",
        "step 2/5 | loss 2.000 | val_loss 3 | 0:00 elapsed, 0:00 left",
        "step 4/5 | loss 2.000 | 0:00 elapsed, 0:00 left",
    ]


def test_log_says_how_much_time_is_left(tmp_path, capsys):
    log = shared.Log(tmp_path, 104, resume_step=100)
    log.start_time -= 75
    log(100, loss=1.0)
    assert "step 100/104 | loss 1.000 | 1:15 elapsed, 3:45 left" in capsys.readouterr().out
    assert log.seconds == pytest.approx(75, abs=5)


def test_log_resumes_after_a_crash(tmp_path):
    log = shared.Log(tmp_path, 5, name="other")
    for step in range(5):
        log(step, loss=2.0)

    # The crash has torn the last line.
    with open(tmp_path / "other.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    shared.Log(tmp_path, 5, resume_step=3, name="other")(3, loss=1.0)
    records = [(record["step"], record["loss"]) for record in read_log(tmp_path, "other")]
    assert records == [(0, 2.0), (1, 2.0), (2, 2.0), (3, 1.0)]


def test_log_stops_at_a_loss_that_is_not_finite(tmp_path, capsys):
    log = shared.Log(tmp_path, 5)
    message = error_of(capsys, log, 4, loss=torch.tensor(float("nan")))
    assert "loss is nan at step 4: lower --lr" in message


def test_plot_log(tmp_path):
    log = shared.Log(tmp_path, 3)
    for step in range(3):
        log(step, loss=1.0, **({"val_loss": 2.0} if step == 2 else {}))
    shared.plot_log(tmp_path, ("loss", "val_loss"), "never_logged")
    png = (tmp_path / "log.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width = int.from_bytes(png[16:20], "big")
    assert width == 800


# ------------------------------------------------------------------------------------------
# The judge

GOOD = "Mia had a ball. Mia lost the ball. Mia was happy."
CHECK = {"must": ["Mia", "ball"], "ends": "happy", "no_repeat": True, "patterns": "tiny"}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A world with stories of three sentences."""
    hero, thing = "(?P<hero>Mia|Tom)", "(?P<thing>ball|kite)"
    patterns = [
        {"stage": 0, "regex": rf"{hero} had a {thing}\.", "end": None},
        {"stage": 1, "regex": rf"{hero} lost the {thing}\.", "end": None},
        {"stage": 1, "regex": rf"{hero} slept\.", "end": None},
        {"stage": 2, "regex": rf"{hero} was happy\.", "end": "happy"},
        {"stage": 2, "regex": rf"{hero} was sad\.", "end": "sad"},
        {"stage": 2, "regex": rf"{hero} woke up happy\.", "end": "happy"},
    ]
    for pattern in patterns:
        pattern["after"] = None
    patterns[-1]["after"] = [patterns[2]["regex"]]  # only who slept can wake up
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    (folder / "facts.json").write_text(json.dumps({"patterns": patterns}))
    monkeypatch.setattr(shared, "ROOT", tmp_path)


@pytest.mark.parametrize(
    "answer, failing",
    [
        (GOOD, ""),
        ("  " + GOOD + "\n", ""),
        (GOOD.replace(". ", ".\n"), ""),
        (GOOD.replace(". ", ".\r\n\r\n"), ""),
        (GOOD.replace(" ", "  "), ""),
        ("Mia had a ball. Mia slept. Mia woke up happy.", ""),
        ("Mia had a ball. Mia lost the ball. Mia woke up happy.", "patterns"),
        (GOOD.replace("happy", "sad"), "ends"),
        (GOOD.replace("lost the ball", "lost the kite"), "agree"),
        (GOOD.replace("Mia lost", "Tom lost"), "agree"),
        (GOOD.replace("ball", "kite"), "has:ball"),
        (GOOD.replace("ball", "balls"), "has:ball patterns"),
        ("Mia had a ball. Mia was happy.", "patterns"),
        ("Mia lost the ball. Mia had a ball. Mia was happy.", "patterns"),
        ("Mia had a ball. Mia lost the ball. Mia slept. Mia was happy.", "patterns"),
        ("Mia had a ball. Mia slept. Mia slept. Mia was happy.", "patterns no_repeat"),
        (GOOD + " Mia", "patterns ends"),
        ("Mia ball happy", "patterns agree ends"),
        ("", "has:Mia has:ball patterns agree ends no_repeat"),
    ],
)
def test_judge_of_stories(world, answer, failing):
    verdict = shared.judge({"check": CHECK}, answer)
    names = ["has:Mia", "has:ball", "no_repeat", "ends", "patterns", "agree", "end"]
    assert list(verdict.checks) == names
    failed = {name for name, holds in verdict.checks.items() if not holds}
    assert failed == set(failing.split())
    assert verdict.share == pytest.approx(1 - len(failed) / 7)
    assert verdict.passed == (failing == "")


def test_judge_of_exact_answers():
    record = {"check": {"answer": "7"}}
    assert shared.judge(record, " 7\n") == shared.Verdict({"answer": True}, 1.0, True)
    assert not shared.judge(record, "77").passed
    assert not shared.judge(record, "7", ended=False).passed
    assert shared.judge(record, "7.").passed
    assert not shared.judge(record, "7 .").passed
    assert not shared.judge(record, "").passed
    assert shared.judge({"check": {"answer": "yes"}}, "Yes.").passed
    assert shared.judge({"check": {"answer": "a ball, a kite"}}, "a ball,\n a kite").passed
    assert not shared.judge({"check": {"answer": "a ball, a kite"}}, "a kite, a ball").passed
    assert shared.judge({"output": "x"}, "x") is None


SOLVED = {"check": {"number": "10", "steps": ["7-2=5", "5*2=10"]}}


@pytest.mark.parametrize(
    "answer, passed, steps",
    [
        ("7-2=5. 5*2=10. The answer is 10.", True, [True, True]),
        ("7 - 2 = 5. 2*5=10. The answer is 10", True, [True, True]),
        ("2-7=5. 5*2=10. The answer is 10.", True, [False, True]),
        ("7-2=6. 6*2=12. The answer is 12.", False, [False, False]),
        ("7-2=5. 5*2=11. The answer is 10.", True, [True, False]),
        ("7-2=5. 5*2=10. 1+1=2. The answer is 10.", True, [True, True, False]),
        ("5*2=10. 7-2=5. The answer is 10.", True, [False, False]),
        ("7-2=5. The answer is 10.", True, [True, False]),
        ("10", True, [False, False]),
        ("The answer is 100.", False, [False, False]),
        ("7-2=5. 5*2=10. The answer is 12.", False, [True, True]),
        ("Ten.", False, [False, False]),
        ("7-2=5. 1+1=" + "9" * 5000, False, [True, False]),
        ("", False, [False, False]),
    ],
)
def test_judge_of_problems(answer, passed, steps):
    verdict = shared.judge(SOLVED, answer)
    assert verdict.passed == passed
    assert verdict.steps == steps


def test_a_right_number_must_have_ended_and_needs_no_steps():
    assert not shared.judge(SOLVED, "The answer is 10", ended=False).passed
    verdict = shared.judge({"check": {"number": "10"}}, "7-2=5. The answer is 10.")
    assert verdict.passed and verdict.steps is None


@pytest.mark.parametrize(
    "check, message",
    [
        ({"number": 10}, "'number' must be a string of digits, got 10"),
        ({"number": "ten"}, "'number' must be a string of digits"),
        ({"number": "1", "steps": "0+1=1"}, "'steps' must be a list of equations like 7-2=5"),
        ({"number": "1", "steps": ["0+1"]}, "'steps' must be a list of equations like 7-2=5"),
        ({"number": "1", "steps": [1]}, "'steps' must be a list of equations like 7-2=5"),
    ],
)
def test_a_wrong_check_of_a_problem_is_one_line(check, message):
    assert message in shared.check_problem(check)
    assert shared.check_problem(SOLVED["check"]) is None


def test_judge_splits_at_every_mark_that_ends_a_sentence():
    record = {"check": {"no_repeat": True}}
    assert not shared.judge(record, "Go! Go! Go!").passed
    assert not shared.judge(record, "Why?\nNo. Why?").passed
    assert shared.judge(record, "Go! Stop! Go on.").passed


def test_judge_of_an_answer_that_was_cut_off(world):
    verdict = shared.judge({"check": CHECK}, GOOD, ended=False)
    assert not verdict.checks["end"]
    assert verdict.share == pytest.approx(6 / 7)
    assert not verdict.passed


# ------------------------------------------------------------------------------------------
# Ranges of options, and what killed runs leave behind


@dataclass
class Ranges:
    steps: int = 3
    grad_clip: float = 1.0
    weight_decay: float = 0.0
    warmup: float = 0.1
    seed: int = 0
    resume: bool = False
    data: str = ""


@pytest.mark.parametrize(
    "option, message",
    [
        ("--steps=0", "--steps=0 must be at least 1"),
        ("--steps=-3", "--steps=-3 must be at least 1"),
        ("--grad_clip=-1", "--grad_clip=-1.0 must be above 0"),
        ("--grad_clip=0", "--grad_clip=0.0 must be above 0"),
        ("--weight_decay=-0.1", "--weight_decay=-0.1 must not be negative"),
        ("--warmup=nan", "--warmup wants a finite number, got 'nan'"),
        ("--warmup=1.1", "--warmup=1.1 must be from 0 to 1"),
        ("--warmup=-0.1", "--warmup=-0.1 must be from 0 to 1"),
        ("--grad_clip=inf", "--grad_clip wants a finite number, got 'inf'"),
        ("--seed=-1", "--seed=-1 must not be negative"),
        ("--seed=99999999999999999999", "--seed wants at most 1,000,000,000,000, got"),
    ],
)
def test_an_option_out_of_its_range_is_one_line(capsys, option, message):
    assert message in error_of(capsys, lambda: shared.parse_args(Ranges, argv=[option]))


@pytest.mark.parametrize(
    "option", ["--steps=1", "--grad_clip=99", "--weight_decay=0", "--warmup=1", "--seed=999999999"]
)
def test_the_ends_of_a_range_belong_to_it(option):
    shared.parse_args(Ranges, argv=[option])


def test_every_number_of_every_script_has_a_range():
    """A new option of a script must be named in shared.py, or here if it may be negative."""
    free = {"missing_end", "part", "pair", "short", "show", "shown", "turns", "u", "z"}
    known = " ".join([shared.AT_LEAST_1, shared.ABOVE_0, shared.AT_LEAST_0, shared.UP_TO_1]).split()
    assert len(known) == len(set(known)), "no option has two ranges"
    for path in shared.ROOT.glob("part_*/*.py"):
        if path.name.startswith("test_"):
            continue
        for found in re.finditer(r"^    (\w+): (?:int|float) = ", path.read_text(), re.MULTILINE):
            assert found[1] in free.union(known), f"{path}: {found[1]} has no range"


def test_old_temporary_files_are_swept_away(tmp_path):
    old = tmp_path / ".log.json.17.tmp"
    young = tmp_path / ".log.json.18.tmp"
    other = tmp_path / ".other.json.17.tmp"
    for path in (old, young, other):
        path.write_text("x")
    for path in (old, other):
        os.utime(path, (0, 0))
    shared.write_atomic(tmp_path / "log.json", b"{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, other.name, "log.json"]

    folder = tmp_path / ".prepare_data.x"
    folder.mkdir()
    (folder / "train.txt").touch()
    os.utime(folder, (0, 0))
    shared.sweep(tmp_path, ".prepare_data.*")
    assert not folder.exists()


def test_a_text_may_hold_the_replacement_character_but_not_endless_blanks(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text("caf\ufffd", encoding="utf-8")
    assert shared.read_text(path) == "caf\ufffd"
    path.write_text("a" + " " * 600_000 + "b")
    assert "blanks in a row" in error_of(capsys, shared.read_text, path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"patterns": [{"stage": 0}]}'])
def test_a_broken_world_is_one_line(tmp_path, capsys, text):
    path = tmp_path / "facts.json"
    path.write_text(text)
    assert "is broken or of an older version" in error_of(capsys, shared.read_facts, path)
