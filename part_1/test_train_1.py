"""Part 1's script, as a user runs it: a smoke run with tiny sizes, and what it says of bad input."""
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent / "train.py"

def run(*options):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, options)], capture_output=True, text=True)

def test_smoke(tmp_path):
    out = tmp_path / "out"
    sizes = ["--batch_size=4", "--n_layer=1", "--n_embd=16", "--block_size=8"]
    done = run("--steps=4", "--eval_every=2", *sizes, f"--out={out}")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"none", "learned", "sinusoidal", "bag_guess"} <= set(metrics) and 0 <= metrics["none"] <= 1
    assert len((out / "log.jsonl").read_text().splitlines()) == 12  # three kinds of positions, 4 steps each
    assert (out / "gpt.pt").exists() and (out / "train.png").exists()

@pytest.mark.parametrize("option, said", [
    ("--n_head=3", "n_head=3"), ("--block_size=7", "block_size=7"), ("--stepz=3", "--steps"), ("--steps=x", "int"),
])
def test_bad_input_is_one_line(tmp_path, option, said):
    done = run(option, f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1
