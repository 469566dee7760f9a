"""
Tests of sample.py: its texts are generate's, and bad input is one clear line.
"""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

from model import GPT, GPTConfig
from sample import load_model
from shared import save_checkpoint
from train import decode, encode

SCRIPT = Path(__file__).resolve().parent / "sample.py"
SIZES = {"vocab_size": 256, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}


def make_checkpoint(path, kind="gpt", **changes):
    torch.manual_seed(0)
    cfg = GPTConfig(**SIZES)
    model = GPT(cfg)
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)  # or else all bytes are equally likely
    content = {"gpt_config": asdict(cfg), "weights": model.state_dict(), **changes}
    save_checkpoint(path, kind=kind, **content)
    return model


def run(folder, *argv):
    """The script in this folder -> its exit code, stdout and stderr."""
    process = subprocess.run(
        [sys.executable, str(SCRIPT), *argv],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
    )
    return process.returncode, process.stdout.decode(), process.stderr.decode()


def test_it_writes_what_generate_writes(tmp_path):
    model = make_checkpoint(tmp_path / "gpt.pt")
    options = ["--samples=3", "--length=40", "--temperature=0.7", "--top_k=9", "--top_p=0.9"]
    prompt = "né 🦊"
    argv = ["--init=gpt.pt", f"--prompt={prompt}", "--seed=4", "--device=cpu", *options]
    code, stdout, stderr = run(tmp_path, *argv)
    assert code == 0, stderr

    ids = encode("\n\n" + prompt)
    idx = torch.tensor([ids] * 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(4)
    rows = model.generate(idx, 40, temperature=0.7, top_k=9, top_p=0.9)[:, len(ids) :]
    torch.set_num_threads(threads)
    expected = "".join(prompt + decode(row) + "\n---\n" for row in rows.tolist())
    assert stdout.startswith(expected)
    assert stdout.removeprefix(expected).startswith("120 bytes in ")
    assert stdout.count("\n") == expected.count("\n") + 1


def test_a_beginning_from_a_file(tmp_path):
    """It may be longer than the block: the model sees the last 16 bytes of it."""
    make_checkpoint(tmp_path / "gpt.pt")
    text = "A long beginning, longer than the block.\nÄ"
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    argv = ["--init=gpt.pt", "--temperature=0", "--samples=1", "--length=20"]
    code, from_file, stderr = run(tmp_path, *argv, "--file=my.txt")
    assert code == 0, stderr
    assert from_file.startswith(text)
    _, from_prompt, _ = run(tmp_path, *argv, f"--prompt={text}")
    assert from_file.rpartition("\n---\n")[0] == from_prompt.rpartition("\n---\n")[0]


# Options, and what the one line of the error says.
BAD_INPUT = {
    "no checkpoint": (["--init=nowhere.pt"], "there is no nowhere.pt"),
    "wrong kind": (["--init=sft.pt"], "sft.pt is a 'sft' checkpoint, expected 'gpt'"),
    "no file": (["--init=gpt.pt", "--file=nowhere.txt"], "there is no file nowhere.txt"),
    "no prompt": (["--prompt="], "prompt is empty"),
    "no samples": (["--samples=0"], "--samples=0 must be at least 1"),
    "cold": (["--temperature=-1"], "temperature=-1.0 must not be negative"),
    "no share": (["--top_p=1.5"], "top_p=1.5 must be from 0 to 1"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_in_one_line(tmp_path, name):
    make_checkpoint(tmp_path / "gpt.pt")
    make_checkpoint(tmp_path / "sft.pt", kind="sft")
    argv, message = BAD_INPUT[name]
    code, stdout, stderr = run(tmp_path, *argv)
    assert code == 2, stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert message in stderr
    assert stdout == ""


OTHER_PARTS = {
    "other sizes": {"gpt_config": {**SIZES, "n_kv_head": 2}},
    "other tokens": {"gpt_config": {**SIZES, "vocab_size": 40}},
    "other weights": {"weights": {"wte.weight": torch.zeros(256, 16)}},
}


@pytest.mark.parametrize("name", OTHER_PARTS)
def test_models_of_other_parts_are_refused(tmp_path, capsys, name):
    """They are "gpt" checkpoints, too."""
    model = GPT(GPTConfig(**SIZES))
    checkpoint = {"gpt_config": SIZES, "weights": model.state_dict(), **OTHER_PARTS[name]}
    with pytest.raises(SystemExit) as end:
        load_model(checkpoint, "their.pt")
    assert end.value.code == 2
    assert "their.pt is the model of another part" in capsys.readouterr().err
