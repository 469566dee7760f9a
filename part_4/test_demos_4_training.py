"""
Tests of Part 4's demo_schedule.py and demo_resume.py: pytest part_4/test_demos_4_training.py. Their mathematics against
slower statements of it, and a tiny run of each in a process of its own.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import os
import random
import runpy
import subprocess
import tempfile
import traceback
from types import SimpleNamespace

import pytest
import torch

import demo_resume
import demo_schedule
import train
from model import GPT, GPTConfig
from shared import save_checkpoint

HERE = Path(__file__).resolve().parent


class Forked:
    """What a demo needs of subprocess.Popen, for a script of ours: a child that has imported torch already."""
    def __init__(self, command, **_):
        self.errors = Path(tempfile.mkstemp(suffix=".err")[1])
        self.pid, self.code = os.fork(), None
        if not self.pid:
            sys.stdout, sys.stderr = open(os.devnull, "w"), open(self.errors, "w")
            os._exit(in_child(command[1:]))
    def poll(self, flags=os.WNOHANG):
        if self.code is None and (ended := os.waitpid(self.pid, flags))[0]:
            self.code = os.waitstatus_to_exitcode(ended[1])
        return self.code
    def wait(self):
        return self.poll(0)
    def kill(self):
        os.kill(self.pid, 9)


def in_child(argv):
    subprocess.Popen, subprocess.run, sys.argv = Forked, run_forked, argv
    torch.set_num_threads(1)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()
    return 0


def run_forked(command, **_):
    child = Forked(command)
    child.wait()
    stderr = child.errors.read_text()
    child.errors.unlink()
    return SimpleNamespace(returncode=child.code, stderr=stderr)


def run(name, tmp_path, *options):
    words, rng = "the a fox dog hen Mia Tom ran sat hid saw ate red big old".split(), random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text(".\n".join(" ".join(rng.choices(words, k=7)) for _ in range(400)))
    script = str(HERE / f"{name}.py")
    return run_forked([sys.executable, script, f"--data={text}", f"--out={tmp_path}", "--device=cpu", *options])


def result(name, tmp_path, *options):
    done = run(name, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    for png in tmp_path.glob("*.png"):
        assert png.read_bytes().startswith(b"\x89PNG")
    return json.loads((tmp_path / f"{name}.json").read_text())


def test_schedules_by_hand():
    cfg = train.Config(steps=10, warmup=0.2, decay=0.5)
    shares = {name: [demo_schedule.share(s, name, cfg) for s in range(10)] for name in demo_schedule.SCHEDULES}
    assert shares["none"] == [0.5] + [1.0] * 9
    assert shares["linear"] == pytest.approx([0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert shares["warmup-stable-decay"] == pytest.approx([0.5] + [1.0] * 5 + [0.8, 0.6, 0.4, 0.2])
    cosine = [0.5, 1.0] + [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert shares["cosine"] == pytest.approx(cosine)
    assert min(map(min, shares.values())) > 0  # every step learns


def test_adamw_takes_over_what_was_muons():
    model = GPT(GPTConfig(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_kv_head=1, n_embd=8))
    cfg = train.Config(lr=0.5, lr_adamw=0.25)
    muon, _ = demo_schedule.optimizers(model, cfg, "Muon")
    hidden, others = demo_schedule.optimizers(model, cfg, "AdamW")
    assert isinstance(muon, torch.optim.Muon) and isinstance(hidden, torch.optim.AdamW)
    assert [id(p) for p in hidden.param_groups[0]["params"]] == [id(p) for p in muon.param_groups[0]["params"]]
    assert hidden.param_groups[0]["peak"] == others.param_groups[0]["peak"] == 0.25
    assert sum(len(g["params"]) for o in (hidden, others) for g in o.param_groups) == len(list(model.parameters()))


def test_verdict_names_a_winner_only_where_ranges_are_apart():
    assert demo_schedule.tuned({1: [3.0, 1.0], 2: [1.5, 1.7]}) == (2, [1.5, 1.7])
    assert demo_schedule.verdict(("a", [2.0, 2.2]), ("b", [1.0, 1.2])) == "b 1.100, a 2.100 nats per byte"
    assert demo_schedule.verdict(("a", [1.1, 1.3]), ("b", [1.0, 1.2])).endswith("no difference")


def test_size_and_contents(tmp_path):
    content = {"a": torch.zeros(3, 5), "b": [1, 2.5, b"xyz", "uv"]}
    assert demo_resume.size(content) == 60 + 8 + 8 + 3 + 2 + len("ab")
    path = tmp_path / "x.pt"
    states = [{"m": torch.zeros(7)}, {"v": torch.zeros(2, 9), "step": 1}]
    save_checkpoint(path, kind="resume", weights={"w": torch.zeros(100)}, optimizers=states, tokenizer=b"12345")
    parts = demo_resume.contents(path)
    assert sum(parts.values()) == path.stat().st_size and min(parts.values()) > 0
    assert list(parts.values())[:4] == [401, 29, 72 + 1 + 4 + 8, 5]


def test_largest_difference():
    a = [{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0}]
    assert demo_resume.largest_difference(a, [dict(r) for r in a]) == 0.0
    assert demo_resume.largest_difference(a, [a[0], {"step": 1, "loss": 1.25}]) == 0.25
    with pytest.raises(SystemExit):
        demo_resume.largest_difference(a, a[:1])


def test_demo_schedule(tmp_path):
    found = result("demo_schedule", tmp_path, "--steps=3", "--batch_size=2", "--n_embd=16", "--rates=0.5,2,4")
    assert len(found["val_loss"]) == 4 + 2 + 3 and all(len(v) == 1 for v in found["val_loss"].values())
    assert found["val_loss"]["none, Muon, 2"] != found["val_loss"]["linear, Muon, 2"]
    assert "at least three" in run("demo_schedule", tmp_path, "--rates=1,2").stderr


def test_demo_resume(tmp_path):
    found = result("demo_resume", tmp_path, "--steps=40", "--save_every=4", "--kill=9", "--n_embd=16")
    assert found["difference"] == found["difference_weights"] == 0.0
    assert 9 <= found["killed_at"] < 39 and 4 <= found["resumed_from"] <= found["killed_at"] + 1
    assert found["in_log"] == found["in_tensorboard"] == 40
    weights, adamw = found["bytes"]["resume.pt: weights"], found["bytes"]["resume.pt: AdamW: two moments"]
    assert weights == pytest.approx(found["bytes"]["base.pt: weights"]) and adamw < 2 * weights
