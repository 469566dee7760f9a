"""
Part 0's tests: shared.py (options, files, the judge, the log), then the tools that read the other parts.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hashlib
import inspect
import json
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass

import pytest
import torch

import shared

SCRIPT = '''
import sys, time
sys.path.insert(0, {root!r})
from dataclasses import dataclass
from shared import cli, save_checkpoint, setup

@dataclass
class Config:
    wait: float = 0.0
    out: str = ""

cfg = cli(Config())
setup(cfg)
print("waiting", flush=True)
time.sleep(cfg.wait)
'''


@dataclass
class Config:
    steps: int = 20  # optimizer steps
    lr: float = 0.1
    out: str = ""
    resume: bool = False
    seed: int = 0
    device: str = "cpu"
    dtype: str = ""


@dataclass
class Sizes:
    n_embd: int = 128
    n_head: int = 4
    head_dim: int = 0

    def __post_init__(self):
        assert self.n_embd % self.n_head == 0, f"n_embd={self.n_embd} does not divide by n_head={self.n_head}"
        self.head_dim = self.head_dim or self.n_embd // self.n_head


@pytest.fixture
def tiny(tmp_path):
    """A script, to be run in a process of its own."""
    (tmp_path / "tiny.py").write_text(SCRIPT.format(root=str(shared.ROOT)))
    return [sys.executable, str(tmp_path / "tiny.py")]


def error_of(capsys, f, *args, code=2, **kwargs):
    """Call f, which must end the program with this code and exactly one line on stderr; returns the line."""
    with pytest.raises(SystemExit) as stop:
        f(*args, **kwargs)
    line = capsys.readouterr().err
    assert stop.value.code == code and line.startswith("error: ") and line.count("\n") == 1, line
    return line


# ---------------------------------------------------------------------------------------------------------------------
# options

def test_cli_fills_by_type():
    cfg, sizes = shared.cli(Config(), Sizes(), argv=["--steps", "5", "--lr=-1e-3", "--resume", "--n_embd=64"])
    assert (cfg.steps, cfg.lr, cfg.resume, sizes.n_embd) == (5, -1e-3, True, 64)
    assert sizes.head_dim == 16, "what __post_init__ derived from n_embd=128 must not outlive it"
    assert cfg.changed == sizes.changed == {"steps": 5, "lr": -1e-3, "n_embd": 64}, "resume cannot change a result"
    assert shared.cli(Config(), argv=["--resume=FALSE", "--steps=20"]).changed == {}, "a default given is no change"
    assert shared.cli(Sizes(head_dim=8), argv=["--n_embd=64"]).head_dim == 8, "an explicit value stays"


@pytest.mark.parametrize("argv, says", [
    (["--stpes=3"], "did you mean --steps"), (["steps=3"], "no option steps"), (["--steps=abc"], "an int, got 'abc'"),
    (["--steps"], "--steps wants a value"), (["--out", "--lr=1"], "--out wants a value"), (["--lr=x"], "a float"),
    (["--resume=maybe"], "a bool, got 'maybe'"), (["--n_embd=65"], "n_embd=65 does not divide by n_head=4"),
    (["--n_head=0"], "a size is 0"),
])
def test_cli_refuses_in_one_line(capsys, argv, says):
    assert says in error_of(capsys, shared.cli, Config(), Sizes(), argv=argv)


def test_other_settings_go_to_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "getfile", lambda cls: str(tmp_path / "train.py"))
    monkeypatch.chdir(tmp_path)

    def out(*argv):
        cfg = shared.cli(Config(), argv=argv)
        shared.setup(cfg)
        return os.path.relpath(cfg.out, tmp_path)
    assert out() == out("--resume") == out("--steps=20") == "out"
    assert out("--seed=7", "--steps=2") == os.path.join("out", "steps=2,seed=7")
    assert out("--seed=7", "--out=mine") == "mine" and (tmp_path / "mine").is_dir()


def test_setup(tmp_path, capsys):
    def setup(**knobs):
        return shared.setup(Config(out=str(tmp_path), **knobs))
    device, autocast = setup(seed=3)
    drawn = torch.rand(1)
    setup(seed=3)
    assert device.type == "cpu" and torch.equal(drawn, torch.rand(1))
    x = torch.ones(2, 2)
    with autocast():
        assert (x @ x).dtype == torch.float32
    with setup(dtype="bf16")[1]():
        assert (x @ x).dtype == torch.bfloat16
    assert "on a GPU, fp16" in error_of(capsys, setup, dtype="fp16")
    assert "--dtype=fp8" in error_of(capsys, setup, dtype="fp8")
    assert "--device=cuda:99 is not available" in error_of(capsys, setup, device="cuda:99")
    (tmp_path / "file").write_text("")
    assert "is a file" in error_of(capsys, shared.setup, Config(out=str(tmp_path / "file")))


def test_help(capsys, monkeypatch):
    doc = "A trainer.\n\n    python t.py --steps=9    nine steps\n\nFrom nowhere: not for --help.\n"
    monkeypatch.setattr(sys.modules[__name__], "__doc__", doc)
    with pytest.raises(SystemExit) as stop:
        shared.cli(Config(), argv=["--help"])
    said = capsys.readouterr().out
    assert not stop.value.code and "A trainer." in said and "--steps=9    nine steps" in said
    assert re.search(r"--steps=20 +optimizer steps", said) and "nowhere" not in said


def test_oserror_is_one_line(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run([*tiny, "--out=file/x"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Not a directory" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_full_disk_is_one_line(tiny):
    with open("/dev/full", "w") as full:
        done = subprocess.run(tiny, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "No space left" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_interrupt(tiny):
    child = subprocess.Popen([*tiny, "--wait=60"], stdout=-1, stderr=-1, text=True)
    while "waiting" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 130 and said.count("\n") == 1 and "interrupted" in said, said


# ---------------------------------------------------------------------------------------------------------------------
# files

def test_checkpoint_comes_back_and_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a" / "x.pt"
    shared.save_checkpoint(path, kind="base", model={"w": torch.arange(3)}, merges=[(1, 2)])
    assert torch.equal(shared.load_checkpoint(path, ("sft", "base"))["model"]["w"], torch.arange(3))

    def full(fd):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        shared.save_checkpoint(path, kind="base", model={})
    assert os.listdir(path.parent) == ["x.pt"], "the temporary file stayed"
    assert "w" in shared.load_checkpoint(path, "base")["model"], "the old checkpoint is gone"


def test_broken_checkpoints(tmp_path, capsys):
    good = tmp_path / "good.pt"
    shared.save_checkpoint(good, kind="rm", w=torch.zeros(1000))
    assert "'rm' checkpoint, wanted is 'base' or 'x'" in error_of(capsys, shared.load_checkpoint, good, ("base", "x"))
    assert "no checkpoint at" in error_of(capsys, shared.load_checkpoint, tmp_path / "none.pt", "rm")
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    torch.save({"kind": "rm", "model": torch.nn.Linear(2, 2)}, tmp_path / "code.pt")  # weights_only refuses classes
    for name in ("cut", "text", "empty", "tensor", "foreign", "code"):
        assert "not a checkpoint" in error_of(capsys, shared.load_checkpoint, tmp_path / f"{name}.pt", None), name


def test_require_builds_refuses_and_passes_a_failure_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shared, "ROOT", tmp_path)
    maker = tmp_path / "part_4" / "train.py"
    maker.parent.mkdir()
    maker.write_text("import os; assert 'MASTER_ADDR' not in os.environ; raise SystemExit(7)")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(SystemExit) as stop:
        shared.require("part_4/out/base.pt")
    assert stop.value.code == 7
    build = "import sys; sys.path.insert(0, {!r}); import shared; shared.save_checkpoint({!r}, kind='base', changed={})"
    path = tmp_path / "part_4" / "out" / "base.pt"
    root = str(Path(shared.__file__).parent)
    maker.write_text(build.format(root, str(path), {}))
    assert shared.require("part_4/out/base.pt") == path
    maker.write_text("raise SystemExit('built twice')")
    assert shared.require("part_4/out/base.pt") == path
    shared.save_checkpoint(path, kind="base", changed={"steps": 5})
    assert "made with --steps=5" in error_of(capsys, shared.require, "part_4/out/base.pt")
    assert shared.require(path) == path, "a path of the user's own may be any run"
    assert "there is no nowhere.pt" in error_of(capsys, shared.require, "nowhere.pt")


def test_torchrun_waits_for_rank_0(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "ROOT", tmp_path)
    monkeypatch.setattr(shared, "RANK", 1)
    path = tmp_path / "data" / "stories" / "facts.json"
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    monkeypatch.setattr(time, "sleep", sleep)
    assert shared.require("data/stories") == path.parent and len(naps) == 1


def test_read_jsonl(tmp_path, capsys):
    path = tmp_path / "a.jsonl"

    def says(text, *fields):
        path.write_text(text)
        return error_of(capsys, shared.read_jsonl, path, fields)
    path.write_text('{"a": "x\u2028y"}\n\n{"a": 2}\n')
    assert shared.read_jsonl(path, ["a"]) == [{"a": "x\u2028y"}, {"a": 2}]
    path.write_text(json.dumps([{"a": "x"}, {"a": "y"}], indent=1))
    assert [r["a"] for r in shared.read_jsonl(path, ["a"])] == ["x", "y"]
    assert "line 2: field 'b' is missing" in says('{"a": 1, "b": 1}\n{"a": 1}\n', "a", "b")
    assert "line 1: field 'a' is missing or not text" in says('{"a": null}', "a")
    assert "record 2: field 'a'" in says('[{"a": 1}, {}]', "a")
    assert "line 3: " in says('{"a": 1}\n\n{"a": \n', "a") and "line 2: " in says('[{"a": 1},\n{"a" 1}]', "a")
    assert "an object with a is wanted" in says('3\n', "a")
    assert "is empty" in says(" \n", "a") and "no records" in says("[]", "a")
    path.write_bytes(b"caf\xe9")
    assert "not UTF-8" in error_of(capsys, shared.read_text, path)
    assert "there is no file" in error_of(capsys, shared.read_text, tmp_path / "none.txt")


def test_shakespeare_is_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shared, "ROOT", tmp_path)
    (tmp_path / "served").write_text("To be")
    monkeypatch.setattr(shared, "SHAKESPEARE", (tmp_path / "served").as_uri())
    assert "cannot download" in error_of(capsys, shared.read_text, "shakespeare"), "the checksum is wrong"
    assert list((tmp_path / "data" / "shakespeare").iterdir()) == []
    monkeypatch.setattr(shared, "SHAKESPEARE_SHA256", hashlib.sha256(b"To be").hexdigest())
    assert shared.read_text("shakespeare") == "To be"
    monkeypatch.setattr(shared, "SHAKESPEARE", "file:///nowhere")
    assert shared.read_text("shakespeare") == "To be", "once is enough"
    (tmp_path / "data" / "shakespeare" / "input.txt").unlink()
    assert "without a network" in error_of(capsys, shared.read_text, "shakespeare")


# ---------------------------------------------------------------------------------------------------------------------
# log

def test_log(tmp_path, capsys):
    cfg = Config(out=str(tmp_path))
    log = shared.Log(cfg, 5)
    for step in range(5):
        log(step, loss=torch.tensor(2.0), load=[1, 2])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines] == [["step 0/5", "loss 2.000"], ["step 4/5", "loss 2.000"]]
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 2, "lo')  # a crash tore the last line
    shared.Log(cfg, 5, resume_step=3)(3, loss=1.0)
    read = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in read] == [(0, 2.0), (1, 2.0), (2, 2.0), (3, 1.0)]
    assert read[0]["load"] == [1, 2]
    capsys.readouterr()
    assert "loss is nan at step 4: lower --lr" in error_of(capsys, log, 4, loss=torch.tensor(float("nan")))


def test_plot_log_and_metrics(tmp_path):
    log = shared.Log(Config(out=str(tmp_path)), 3)
    for step in range(3):
        log(step, loss=1.0, **({"val_loss": 2.0} if step == 2 else {}))
    shared.plot_log(tmp_path, ("loss", "val_loss"), "never_logged")
    png = (tmp_path / "log.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") == 800
    shared.save_metrics(tmp_path, name="other", loss=torch.tensor(0.5), steps=3)
    assert json.loads((tmp_path / "other.json").read_text()) == {"loss": 0.5, "steps": 3}


# ---------------------------------------------------------------------------------------------------------------------
# the judge

GOOD = "Mia had a ball. Mia lost the ball. Mia was happy."
CHECK = {"must": ["Mia", "ball"], "ends": "happy", "no_repeat": True, "patterns": "tiny"}


@pytest.fixture
def world(tmp_path, monkeypatch):
    name, thing = "(?P<hero>Mia|Tom)", "(?P<thing>ball|kite)"
    patterns = [{"stage": 0, "regex": rf"{name} had a {thing}\.", "end": None},
                {"stage": 1, "regex": rf"{name} lost the {thing}\.", "end": None},
                {"stage": 1, "regex": rf"{name} slept\.", "end": None},
                {"stage": 2, "regex": rf"{name} was happy\.", "end": "happy"},
                {"stage": 2, "regex": rf"{name} was sad\.", "end": "sad"}]
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    (tmp_path / "data" / "tiny" / "facts.json").write_text(json.dumps({"patterns": patterns}))
    monkeypatch.setattr(shared, "ROOT", tmp_path)


@pytest.mark.parametrize("answer, failing", [
    (GOOD, ""),
    ("  " + GOOD + "\n", ""),
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
])
def test_judge_of_stories(world, answer, failing):
    checks, share, passed = shared.judge({"check": CHECK}, answer)
    assert {name for name, holds in checks.items() if not holds} == set(failing.split())
    assert set(checks) == {"has:Mia", "has:ball", "ends", "patterns", "agree", "no_repeat", "end"}
    assert share == pytest.approx(1 - len(failing.split()) / 7) and passed == (failing == "")


def test_judge_of_answers_and_of_cut_ones(world):
    assert shared.judge({"check": {"answer": "7"}}, " 7\n") == ({"answer": True}, 1.0, True)
    assert shared.judge({"check": {"answer": "7"}}, "77")[2] is False
    checks, share, passed = shared.judge({"check": CHECK}, GOOD, ended=False)
    assert not checks["end"] and share == pytest.approx(6 / 7) and not passed
    assert shared.judge({"check": {"answer": "7"}}, "7", ended=False)[2] is False
    assert shared.judge({"output": "x"}, "x") is None
