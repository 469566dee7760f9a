"""
Tests of Part 6's demos: pytest part_6/test_demos_6.py. Their mathematics against labels and shares counted by hand;
then each script runs once, on a tiny model and data set that are made here.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import os
import subprocess

import pytest
import torch

import demo_curriculum
import demo_gold
import demo_masking
from model import GPT, GPTConfig
from shared import save_checkpoint
from tokenizer import Tokenizer
from train_sft import Config as SFTConfig

HERE = Path(__file__).resolve().parent
TOK = Tokenizer.train("the red fox saw the old dog. the dog ran to the fox. say it again. count to three. " * 4, 300)
END = 9
ROWS = [{"prompt": [1, 2, 3], "answer": [4, END]}, {"prompt": [5, 6], "answer": [7, 8, 1, END]}]

def check(answer, output, task="story", level=1):
    record = {"instruction": "say", "input": "", "output": output, "task": task, "level": level}
    return {**record, "check": {"answer": answer}}

# demo_gold -----------------------------------------------------------------------------------------------------------

def test_failures_and_groups():
    story = {"task": "story", "level": 2, "check": {"must": ["fox", "red hat"]}}
    assert demo_gold.failures(story, "a fox and a red hat") == []
    assert demo_gold.failures(story, "a fox and a hat", ended=False) == ["has:red hat", "end"]
    skill = check("3", "3", "count", 1)
    passed, checks = demo_gold.group([story, story, skill], [[], ["has:fox", "has:red hat", "end"], ["answer"]])
    assert dict(passed) == {("story", 2): [True, False], ("count", 1): [False]}
    assert checks["has"] == 0.5 and checks["end"] == 0.5 and checks["ends"] == 0  # two missing words: one failed story

@pytest.mark.parametrize("k, n", [(0, 10), (3, 10), (10, 10), (250, 1000)])
def test_wilson_holds_the_shares_that_could_have_made_k(k, n):
    """From either end p, the observed share is 1.96 standard deviations away: the interval's definition."""
    for p in demo_gold.wilson(k, n):
        assert abs(k / n - p) == pytest.approx(1.96 * (p * (1 - p) / n) ** 0.5, abs=1e-9)

# demo_masking --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arm, counted", [
    ("answers only", [[4, END], [7, 8, 1, END]]),
    ("prompts too", [[2, 3, 4, END], [6, 7, 8, 1, END]]),
    ("without the end token", [[4], [7, 8, 1]]),
])
def test_what_the_loss_counts(arm, counted):
    sft = SFTConfig(batch_size=2)
    x, y = demo_masking.batch(demo_masking.relabel(ROWS, arm), 0, sft, arm, END)
    assert [row[row != -100].tolist() for row in y] == counted
    for row, r in zip(x.tolist(), ROWS):  # the input is the same in all arms
        assert row[:len(r["prompt"] + r["answer"]) - 1] == (r["prompt"] + r["answer"])[:-1]
    assert all(y[b, t] == x[b, t + 1] for b, t in (y[:, :-1] != -100).nonzero().tolist())

def test_masking_says_no_difference_when_the_seeds_disagree():
    assert demo_masking.difference([1.0, 2.0], [1.5, 2.25]) == "+0.375 nats"
    assert demo_masking.difference([1.0, 2.0], [1.5, 1.75]) == "no difference"

# demo_curriculum -----------------------------------------------------------------------------------------------------

def test_clean_demonstrations_pass_and_noisy_are_as_many():
    records = [check("yes", "yes" if i % 3 else "no", level=i) for i in range(30)]
    clean, noisy = demo_curriculum.clean_and_noisy(records, 0)
    assert [r["level"] for r in clean] == [i for i in range(30) if i % 3]
    assert len(noisy) == 20 and 0 < sum(r["output"] == "no" for r in noisy) < 10
    assert len({r["level"] for r in noisy}) == 20  # none twice
    assert demo_curriculum.clean_and_noisy(records, 1)[1] != noisy

def test_verdict():
    mean, low, high = demo_curriculum.interval([0.5], 100)
    assert (mean, low, high) == pytest.approx((0.5, 0.402, 0.598), abs=1e-3)
    assert demo_curriculum.interval([0.2, 0.8], 10**6)[1:] == (0.2, 0.8)  # the seeds' range is wider
    assert demo_curriculum.interval([0.0], 10)[1] == 0
    assert demo_curriculum.verdict([0.8], [0.5], 100) == "better"
    assert demo_curriculum.verdict([0.5], [0.8], 100) == "worse"
    assert demo_curriculum.verdict([0.6], [0.5], 100) == "no difference"

# the scripts ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Short and long answers, each with a check, and a base and an SFT model."""
    folder = tmp_path_factory.mktemp("demos")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=TOK.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=16))
    for kind in ("base", "sft"):
        save_checkpoint(folder / f"{kind}.pt", kind=kind, **model.to_checkpoint(), tokenizer=TOK.state())
    texts = ["the dog", "the red fox saw the old dog. the dog ran to the fox."]
    records = [check(texts[i % 2], texts[i % 2], level=i % 3) for i in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder

TRAINED = ["--init={0}/base.pt", "--steps=8", "--batch_size=4", "--block_size=32", "--prompts=4"]

@pytest.mark.parametrize("name, options, numbers", [
    ("gold", ["--init={0}/sft.pt", "--prompts=4", "--max_new_tokens=4"], {"demonstrations_story": 1.0}),
    ("masking", [*TRAINED, "--short=8"], {"steps": 8, "seeds": 1}),
    ("curriculum", TRAINED, {"seeds": 1}),
])
def test_smoke(folder, tmp_path, name, options, numbers):
    options = [option.format(folder) for option in [*options, "--data={0}/data.jsonl"]] + [f"--out={tmp_path}"]
    run = subprocess.run([sys.executable, HERE / f"demo_{name}.py", *options], capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / f"demo_{name}.json").read_text())
    assert numbers.items() <= found.items()
    assert (tmp_path / f"demo_{name}.png").read_bytes()[:4] == b"\x89PNG"
    if name == "masking":
        assert all(0 <= found[f"{kind}_answers_only_end"][0] <= 1 for kind in ("short", "long"))
