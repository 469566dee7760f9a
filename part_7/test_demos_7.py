"""
Tests of Part 7's demos: pytest part_7/test_demos_7.py. Their mathematics against pairs counted by hand and the reward
model itself; then each script runs once, on tiny models and pairs that are made here.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import os
import subprocess

import pytest
import torch

import demo_losses
import demo_preferences
import demo_shaping
from model import GPT, GPTConfig, RewardModel
from shared import save_checkpoint
from tokenizer import Tokenizer
from train_rm import Config as RMConfig, collate

HERE = Path(__file__).resolve().parent
TOK = Tokenizer.train("the red fox saw the old dog. the dog ran to the fox. say it again. count to three. " * 4, 300)
SIZES = dict(vocab_size=TOK.vocab_size, block_size=24, n_layer=1, n_head=2, n_embd=16)

def sigmoid(x):
    return 1 / (1 + math.exp(-x))

# demo_preferences ----------------------------------------------------------------------------------------------------

def test_differing_words():
    a, b = "the red fox ran".split(), "the old red dog ran".split()
    assert demo_preferences.differing(a, b) == [[False, False, True, False], [False, True, False, True, False]]
    assert demo_preferences.differing(a, a) == [[False] * 4] * 2

def test_labels_by_gap_and_the_ceiling():
    gaps = [1, 1, 1, -1, 2, 2, -5]
    table = demo_preferences.by_gap(gaps, 0.5)
    assert table == {1: (4, 0.75, sigmoid(2)), 2: (2, 1.0, sigmoid(4)), 5: (1, 0.0, sigmoid(10))}
    by_hand = (4 * sigmoid(2) + 2 * sigmoid(4) + sigmoid(10)) / 7
    assert demo_preferences.bayes(gaps, 0.5) == pytest.approx(by_hand)

def test_checks_held_and_failed():
    check = {"must": ["fox", "Rome"], "no_repeat": True}
    record = {"check": check, "chosen": "a fox in Rome.", "rejected": "a fox. a fox."}
    assert demo_preferences.held(record, "chosen")[1] == []
    assert demo_preferences.held(record, "rejected")[1] == ["has:Rome", "no_repeat"]

# demo_losses ---------------------------------------------------------------------------------------------------------

def test_no_difference_while_the_intervals_overlap():
    assert demo_losses.compare([0.5], [0.6], 100) == "no difference"
    assert demo_losses.compare([0.5], [0.6], 10_000) == "+0.100"
    assert demo_losses.compare([0.5, 0.7], [0.6, 0.8], 10_000) == "no difference"  # the seeds' ranges do
    assert demo_losses.spread([0.5], 100) == pytest.approx(1.96 * 0.05, rel=0.03)

@pytest.mark.parametrize("arm", demo_losses.ARMS)
def test_every_arm_is_a_setting_of_the_trainer(arm):
    RMConfig(**demo_losses.ARMS[arm])
    assert set(demo_losses.ARMS[arm]) <= {"loss", "center", "head", "bidirectional"}

# demo_shaping --------------------------------------------------------------------------------------------------------

def test_the_mean_of_the_scores_along_a_story_is_its_reward():
    torch.manual_seed(0)
    model = RewardModel(GPTConfig(**SIZES))
    for p in model.parameters():
        p.data = torch.randn(p.shape) * 0.3
    model.shift.fill_(0.7), model.scale.fill_(1.3)
    pair = {"prompt": [1, 2, 3], "chosen": [4, 5, 6, 7], "rejected": [8, 9]}
    chosen, rejected = model(*collate([pair])).tolist()
    assert demo_shaping.along(model, pair, "chosen", "cpu").mean().item() == pytest.approx(chosen, rel=1e-4)
    scores = demo_shaping.along(model, pair, "rejected", "cpu")
    assert len(scores) == 2 and scores.mean().item() == pytest.approx(rejected, rel=1e-4)
    assert abs(chosen - rejected) > 1e-3

# the scripts ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs, an SFT model and a reward model."""
    folder = tmp_path_factory.mktemp("demos")
    torch.manual_seed(0)
    head = {"head": "mean", "bidirectional": 0}
    save_checkpoint(folder / "sft.pt", kind="sft", **GPT(GPTConfig(**SIZES)).to_checkpoint(), tokenizer=TOK.state())
    rm = RewardModel(GPTConfig(**SIZES), **head)
    save_checkpoint(folder / "rm.pt", kind="rm", head=head, **rm.to_checkpoint(), tokenizer=TOK.state())
    texts = ["the red fox ran", "the dog saw it", "the old dog saw the fox"]
    lines = [{"prompt": "say", "chosen": texts[i % 3], "rejected": texts[(i + 1) % 3], "gap": i % 4 + 1}
             for i in range(80)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return folder

DATA = ["--data={0}/data.jsonl", "--init={0}/sft.pt"]

@pytest.mark.parametrize("name, options, pictures, numbers", [
    ("preferences", ["--pair=3"], ["_pair", "_gaps"], {"pairs": 12000}),
    ("losses", [*DATA, "--pairs=40", "--batch_size=4"], [""], {"pairs": 40, "held_out": 8}),
    ("shaping", [*DATA, "--rm={0}/rm.pt", "--steps=2", "--batch_size=4"], ["_checks", "_tokens"], {"held_out": 8}),
])
def test_smoke(folder, tmp_path, name, options, pictures, numbers):
    options = [option.format(folder) for option in options] + [f"--out={tmp_path}"]
    run = subprocess.run([sys.executable, HERE / f"demo_{name}.py", *options], capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert numbers.items() <= json.loads((tmp_path / f"demo_{name}.json").read_text()).items()
    for picture in pictures:
        assert (tmp_path / f"demo_{name}{picture}.png").read_bytes()[:4] == b"\x89PNG"
