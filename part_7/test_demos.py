"""
Tests of Part 7's demos. What they compute is compared with pairs counted by hand and with the
reward model itself; then each script runs once, on tiny models and pairs that are made here.
"""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import demo_losses
import demo_preferences
import demo_sanity
from model import GPT, GPTConfig, RewardModel
from shared import ROOT, Log, load_checkpoint, save_checkpoint
from tokenizer import Tokenizer
from train_rm import Config as RMConfig
from train_rm import collate, evaluate, get_batch

TOK = Tokenizer({bytes([i]): i for i in range(256)})
CONFIG = GPTConfig(vocab_size=260, block_size=40, n_layer=1, n_head=2, n_embd=16)
TINY = GPTConfig(vocab_size=13, block_size=24, n_layer=2, n_head=4, n_embd=16, mlp_dim=12)
END = 12


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def logit(p):
    return math.log(p / (1 - p))


def random_reward_model(head="mean", bidirectional=False):
    torch.manual_seed(0)
    model = RewardModel(TINY, head, bidirectional)
    for p in model.parameters():
        p.data = torch.randn(p.shape) * 0.3
    model.shift.fill_(0.7)
    model.scale.fill_(1.3)
    return model


# demo_preferences ---------------------------------------------------------------------------------


def test_words_that_differ():
    first = "the red fox ran".split()
    second = "the old red dog ran".split()
    first_differs, second_differs = demo_preferences.differing(first, second)
    assert first_differs == [False, False, True, False]
    assert second_differs == [False, True, False, True, False]
    assert demo_preferences.differing(first, first) == ([False] * 4, [False] * 4)


def test_labels_by_gap_and_the_bayes_accuracy():
    gaps = [1, 1, 1, -1, 2, 2, -5]
    table = demo_preferences.by_gap(gaps, 0.5)
    assert list(table) == [1, 2, 5]
    assert table[1] == (4, 0.75, pytest.approx(sigmoid(2)))
    assert table[2] == (2, 1.0, pytest.approx(sigmoid(4)))
    assert table[5] == (1, 0.0, pytest.approx(sigmoid(10)))
    expected = (4 * sigmoid(2) + 2 * sigmoid(4) + sigmoid(10)) / 7
    assert demo_preferences.bayes_accuracy(gaps, 0.5) == pytest.approx(expected)


def test_checks_passed_and_failed():
    check = {"must": ["fox", "Rome"], "no_repeat": True}
    record = {"check": check, "chosen": "a fox in Rome.", "rejected": "a fox. a fox."}
    assert demo_preferences.checks_of(record, "chosen").failed == []
    rejected = demo_preferences.checks_of(record, "rejected")
    assert rejected.failed == ["has:Rome", "no_repeat"]
    assert "has:fox" in rejected.passed


# demo_losses --------------------------------------------------------------------------------------


def test_overlapping_intervals_are_no_difference():
    assert demo_losses.compare([0.5], [0.6], 100) == "no difference"
    assert demo_losses.compare([0.5], [0.6], 10_000) == "+0.100"
    assert demo_losses.compare([0.6], [0.5], 10_000) == "-0.100"
    two_seeds = demo_losses.compare([0.5, 0.7], [0.6, 0.8], 10_000)
    assert two_seeds == "no difference", "the ranges of the seeds overlap"
    assert demo_losses.half_interval([0.5], 100) == pytest.approx(1.96 * 0.05, rel=0.03)
    assert demo_losses.half_interval([1.0], 100) > 0


def test_each_arm_is_a_setting_of_the_trainer():
    cfg = demo_losses.Config(batch_size=4)
    for name in demo_losses.ARMS:
        rm_cfg = demo_losses.arm_config(name, cfg, pairs=400, seed=7)
        assert rm_cfg.seed == 7
        assert rm_cfg.batch_size == 4
    defaults = demo_losses.arm_config("Bradley-Terry", cfg, 400, 0)
    assert defaults.loss == "bt"
    assert defaults.center == 0
    assert defaults.head == "implicit"
    assert demo_losses.arm_config("linear mean", cfg, 400, 0).head == "mean"
    assert defaults.bidirectional is False
    assert defaults.steps == 100
    assert demo_losses.arm_config("margin", cfg, 400, 0).loss == "margin"
    assert demo_losses.arm_config("centred", cfg, 400, 0).center == 0.01
    assert demo_losses.arm_config("linear last", cfg, 400, 0).head == "last"
    assert demo_losses.arm_config("encoder", cfg, 400, 0).bidirectional is True
    assert demo_losses.arm_config("10 %", cfg, 400, 0).steps == 10
    assert demo_losses.arm_config("30 %", cfg, 400, 0).steps == 30


def test_smaller_sets_are_parts_of_the_larger_ones():
    cfg = demo_losses.Config(batch_size=4)
    sets = []
    for arm in demo_losses.SIZES:
        rm_cfg = demo_losses.arm_config(arm, cfg, pairs=400, seed=0)
        chosen = demo_losses.choose(list(range(500)), rm_cfg)
        assert len(chosen) == len(set(chosen)) == rm_cfg.steps * 4
        sets.append(set(chosen))
    assert sets[0] < sets[1] < sets[2]


def test_measured_gaps_are_chosen_minus_rejected():
    model = random_reward_model()
    pair = {"prompt_ids": [1], "chosen_ids": [2, 3, END], "rejected_ids": [4, END], "gap": 2}
    chosen, rejected = model(*collate([pair])).tolist()
    result = demo_losses.measure(model, [pair], 0.5, "cpu")
    assert result.metrics["accuracy"] == float(chosen > rejected)
    assert result.metrics["mean_size"] == pytest.approx((abs(chosen) + abs(rejected)) / 2, rel=1e-4)
    error = abs(sigmoid(chosen - rejected) - sigmoid(4))
    assert result.metrics["calibration_error"] == pytest.approx(error, rel=1e-3)


# demo_sanity: the checks --------------------------------------------------------------------------


def test_perfect_calibration():
    tau = 0.5
    true = torch.tensor([logit(0.75), logit(0.75), logit(0.15), logit(0.95)]) * tau
    result = demo_sanity.calibration(true / tau, true, tau)
    assert result.error == pytest.approx(0, abs=1e-6)
    assert result.claimed[7].item() == pytest.approx(0.75)
    assert result.pairs.tolist() == [0, 1, 0, 0, 0, 0, 0, 2, 0, 1]
    assert result.claimed.isnan().sum() == 7, "empty bins have no mean"


def test_calibration_error_by_hand():
    """Two pairs claim 0.25 where 0.75 is true, and one claims 1 where 0.95 is true."""
    tau = 0.5
    true = torch.tensor([logit(0.75), logit(0.75), logit(0.15), logit(0.95)]) * tau
    gap = torch.tensor([logit(0.25), logit(0.25), logit(0.15), 99.0])
    result = demo_sanity.calibration(gap, true, tau)
    assert result.error == pytest.approx((2 * 0.5 + 0 + 0.05) / 4, abs=1e-5)
    assert result.true[2].item() == pytest.approx(0.75)
    assert result.true[9].item() == pytest.approx(0.95), "a claim of 1 is in the last bin"


def test_length_probe_learns_from_the_training_data_alone():
    def pair(chosen, rejected):
        return {"chosen_ids": [0] * chosen, "rejected_ids": [0] * rejected}

    longer = pair(5, 2)
    shorter = pair(1, 2)
    equal = pair(3, 3)
    val = [longer, longer, shorter, equal]
    assert demo_sanity.length_probe([longer] * 3 + [shorter], val) == 0.625
    assert demo_sanity.length_probe([shorter] * 3 + [longer], val) == 0.375


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_error_is_rounding(bidirectional):
    pair = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, END], "rejected_ids": [8, END]}
    model = random_reward_model(bidirectional=bidirectional)
    assert demo_sanity.padding_error(model, [pair], "cpu") < 1e-4


def test_padding_error_finds_a_model_that_counts_padding():
    """This one averages over all tokens of the row. The scores are 1, so a longer row has more."""

    class Careless(RewardModel):
        def forward(self, idx, starts, lengths):
            return torch.full((len(idx),), float(idx.size(1)))

    pair = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, END], "rejected_ids": [8, END]}
    error = demo_sanity.padding_error(Careless(TINY), [pair], "cpu")
    assert error == pytest.approx((24 - 6) / 6)


def test_shuffled_labels():
    pairs = []
    for i in range(400):
        pairs.append({"prompt_ids": [i], "chosen_ids": [1], "rejected_ids": [2], "gap": 3})
    result = demo_sanity.shuffled(pairs, seed=0)
    assert [pair["prompt_ids"] for pair in result] == [pair["prompt_ids"] for pair in pairs]
    turned = 0
    for pair in result:
        if pair["chosen_ids"] == [2]:
            assert (pair["rejected_ids"], pair["gap"]) == ([1], -3)
            turned += 1
        else:
            assert (pair["chosen_ids"], pair["rejected_ids"], pair["gap"]) == ([1], [2], 3)
    assert abs(turned - 200) < 4 * 10, "half of them, within 4 standard errors"
    assert demo_sanity.shuffled(pairs, seed=1) != result
    assert all(pair["chosen_ids"] == [1] for pair in pairs), "the originals must not change"


@pytest.mark.parametrize("head", ["mean", "last"])
@pytest.mark.parametrize("side, index", [("chosen", 0), ("rejected", 1)])
def test_answer_scores_add_up_to_the_reward(head, side, index):
    model = random_reward_model(head)
    pair = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6, 7], "rejected_ids": [8, 9]}
    reward = model(*collate([pair])).tolist()[index]
    scores = demo_sanity.answer_scores(model, pair, side, "cpu")
    assert len(scores) == len(pair[f"{side}_ids"])
    total = scores.mean() if head == "mean" else scores[-1]
    assert total.item() == pytest.approx(reward, rel=1e-4)


# demo_sanity: the short trainings -----------------------------------------------------------------


def make_pairs(n, seed, good):
    """n pairs of random answers. Each preferred answer has the `good` token, no other text has."""
    rng = random.Random(seed)
    plain = [i for i in range(1, END) if i != good]
    pairs = []
    for _ in range(n):
        pair = {"prompt_ids": rng.choices(plain, k=rng.randint(2, 7))}
        for side in ("chosen_ids", "rejected_ids"):
            pair[side] = [*rng.choices(plain, k=rng.randint(1, 9)), END]
        place = rng.randrange(len(pair["chosen_ids"]) - 1)
        pair["chosen_ids"][place] = good
        pairs.append(pair)
    return pairs


@pytest.mark.parametrize("head", ["mean", "last"])
def test_right_labels_teach_and_shuffled_labels_do_not(head, tmp_path):
    """The control: a model that beats chance by more than 4 standard errors on shuffled labels sees
    the label somewhere, in the order of the batch for example."""
    pairs = make_pairs(200, seed=1, good=5)
    val = make_pairs(200, seed=2, good=5)
    rm_cfg = RMConfig(steps=60, batch_size=16, lr_adamw=1e-2)
    log = Log(tmp_path, 120)
    accuracy = {}
    runs = [(0, "right", pairs), (60, "shuffled", demo_sanity.shuffled(pairs, seed=3))]
    for first_step, name, data in runs:
        torch.manual_seed(0)
        model = RewardModel(TINY, head)
        demo_sanity.train(model, data, rm_cfg, "cpu", log, first_step, name)
        held_out = val if name == "right" else demo_sanity.shuffled(val, 4)
        accuracy[name] = evaluate(model, held_out, "cpu").accuracy
    assert accuracy["right"] > 0.85
    assert abs(accuracy["shuffled"] - 0.5) < 4 * 0.036

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(120))
    assert [line["run"] for line in lines] == ["right"] * 60 + ["shuffled"] * 60


def test_a_short_training_obeys_its_options(tmp_path):
    """The loss of the first step is that of train_rm.py's options, and the rate follows steps."""
    pairs = make_pairs(40, seed=1, good=5)
    losses = {}
    for name, options in (("bt", {}), ("margin", {"loss": "margin", "margin": 3.0})):
        torch.manual_seed(0)
        model = RewardModel(TINY)
        rm_cfg = RMConfig(steps=1, batch_size=4, center=0.5, **options)
        chosen, rejected = model(*get_batch(pairs, 0, rm_cfg)).chunk(2)
        if name == "bt":
            loss = torch.nn.functional.softplus(rejected - chosen)
        else:
            loss = (3 - (chosen - rejected)).relu()
        expected = (loss + 0.5 * (chosen + rejected) ** 2).mean().item()
        demo_sanity.train(model, pairs, rm_cfg, "cpu", Log(tmp_path, 1), 0, name)
        line = json.loads((tmp_path / "log.jsonl").read_text())
        assert line["loss"] == pytest.approx(expected, rel=1e-4)
        losses[name] = line["loss"]
    assert losses["bt"] != losses["margin"]


# the scripts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs, an SFT model, a reward model, and two bad files of pairs."""
    folder = tmp_path_factory.mktemp("demos")
    torch.manual_seed(0)
    sft = GPT(CONFIG)
    save_checkpoint(folder / "sft.pt", kind="sft", **sft.to_checkpoint(), tokenizer=TOK.state())
    head = {"head": "mean", "bidirectional": False}
    rm = RewardModel(CONFIG, **head)
    rm.scale.fill_(0.5)
    save_checkpoint(
        folder / "rm.pt", kind="rm", head=head, **rm.to_checkpoint(), tokenizer=TOK.state()
    )

    texts = ["the réd fox ran", "the dog saw it", "an old dog saw the fox"]
    lines = []
    for i in range(80):
        pair = {"prompt": "say", "chosen": texts[i % 3], "rejected": texts[(i + 1) % 3]}
        lines.append(json.dumps({**pair, "gap": i % 4 + 1}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    (folder / "broken.jsonl").write_text("\n".join([*lines[:4], lines[4][:-5]]))
    without_gap = lines[2].replace('"gap"', '"distance"')
    (folder / "no_gap.jsonl").write_text("\n".join([*lines[:2], without_gap, *lines[3:]]))
    return folder


def run(script, *argv):
    return subprocess.run(
        [sys.executable, script, *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run_demo(name, folder, out, *argv):
    """Runs a demo, which must succeed -> what it saved as JSON."""
    argv = [option.format(folder) for option in argv]
    result = run(ROOT / f"part_7/demo_{name}.py", *argv, f"--out={out}")
    assert result.returncode == 0, result.stderr
    return json.loads((out / f"demo_{name}.json").read_text())


def assert_is_picture(path):
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_demo_preferences_runs(folder, tmp_path):
    metrics = run_demo("preferences", folder, tmp_path, "--pair=3")
    assert metrics["pairs"] == 12000
    assert metrics["labels_right"] == pytest.approx(metrics["bayes_accuracy"], abs=0.01)
    assert_is_picture(tmp_path / "demo_preferences_pair.png")
    assert_is_picture(tmp_path / "demo_preferences_gaps.png")


DATA = ["--data={0}/data.jsonl", "--init={0}/sft.pt", "--batch_size=4"]


def test_demo_losses_runs(folder, tmp_path):
    metrics = run_demo("losses", folder, tmp_path, *DATA, "--pairs=40", "--seeds=2")
    assert metrics["pairs"] == 40
    assert metrics["held_out"] == 8
    assert len(metrics["linear_last_accuracy"]) == 2
    assert_is_picture(tmp_path / "demo_losses.png")
    lines = [json.loads(line) for line in (tmp_path / "demo_losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))


def test_demo_sanity_runs(folder, tmp_path):
    metrics = run_demo("sanity", folder, tmp_path, *DATA, "--rm={0}/rm.pt", "--steps=2")
    assert metrics["held_out"] == 8
    assert metrics["padding_error"] < 1e-3
    assert_is_picture(tmp_path / "demo_sanity_checks.png")
    assert_is_picture(tmp_path / "demo_sanity_tokens.png")

    # The probabilities are those of the rewards before they were normalized.
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    val = demo_sanity.encode_records(records[72:], TOK, 40)
    model = RewardModel.load(load_checkpoint(folder / "rm.pt", "rm"), head="mean")
    model.scale.fill_(1)
    gap = evaluate(model, val, "cpu").gap
    true_gap = torch.tensor([float(pair["gap"]) for pair in val])
    expected = demo_sanity.calibration(gap, true_gap, 0.5).error
    assert metrics["calibration_error"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "name, file, message",
    [
        ("losses", "broken.jsonl", "broken.jsonl line 5:"),
        ("sanity", "no_gap.jsonl", "record 3: field 'gap' is missing or not a number"),
    ],
)
def test_a_bad_file_is_found_before_anything_is_built(folder, tmp_path, name, file, message):
    """On a fresh clone, with neither data/ nor any checkpoint."""
    ignore = shutil.ignore_patterns("out", "__pycache__")
    shutil.copytree(ROOT / "part_7", tmp_path / "part_7", ignore=ignore)
    shutil.copy(ROOT / "shared.py", tmp_path)
    result = run(tmp_path / f"part_7/demo_{name}.py", f"--data={folder / file}")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "part_7/out").exists()
