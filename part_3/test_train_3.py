"""Part 3's script, as a user runs it: a smoke run with tiny sizes, and what it says of bad input."""
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent / "train.py"

def run(*options):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, options)], capture_output=True, text=True)

TINY = ["--steps=6", "--eval_every=3", "--batch_size=4", "--n_layer=1", "--n_embd=16", "--n_head=2", "--n_kv_head=1",
        "--block_size=16"]

@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    (tmp_path / "text.txt").write_text(" ".join(rng.choices("the a fox dog né Mia Tom ran 言 hid".split(), k=900)))
    return tmp_path / "text.txt"

def test_smoke(tmp_path, text):
    out = tmp_path / "out"
    done = run(f"--data={text}", f"--out={out}", *TINY)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"val_loss", "seconds", "params"} <= set(metrics) and 0 < metrics["val_loss"] < 6
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log] == list(range(6)) and "val_loss" in log[-1]
    assert (out / "gpt.pt").exists() and (out / "train.png").exists()

def test_bad_input_is_one_line(tmp_path, text):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("too short")
    for option, said in [(f"--data={tmp_path / 'no.txt'}", "no.txt"), (f"--data={tmp_path / 'empty.txt'}", "empty"),
                         (f"--data={tmp_path / 'short.txt'}", "block"), ("--n_head=3", "n_head=3")]:
        done = run(f"--data={text}", *TINY, option, f"--out={tmp_path / 'out'}")
        assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
