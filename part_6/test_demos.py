"""
Tests of Part 6's demos. What they compute is compared with targets and shares counted by hand; then
each script runs once, on tiny models and demonstrations that are made here.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
import torch

import demo_curriculum
import demo_gold
import demo_masking
from demo_gold import Total
from model import GPT, GPTConfig
from shared import ROOT, Log, save_checkpoint
from tokenizer import Tokenizer
from train_sft import Answer, collate, get_batch, order
from train_sft import Config as SFTConfig

TOK = Tokenizer({bytes([i]): i for i in range(256)})
END = 9


def make_record(output, answer, task="story", level=1):
    """A demonstration that is right if output and answer are the same."""
    record = {"instruction": "say né", "input": "", "output": output, "task": task, "level": level}
    return {**record, "check": {"answer": answer}}


# demo_gold ----------------------------------------------------------------------------------------


def test_failed_checks():
    story = {"check": {"must": ["fox", "red hat"]}}
    assert demo_gold.failed_checks(story, "a fox and a red hat") == []
    failed = demo_gold.failed_checks(story, "a fox and a hat", ended=False)
    assert failed == ["has:red hat", "end"]


def test_groups_by_task_and_by_check():
    """A story that lacks two words fails "has" once, and a count is no story."""
    story = {"level": 2}
    count = {"task": "count", "level": 1}
    records = [story, story, count]
    failed = [[], ["has:fox", "has:red hat", "end"], ["answer"]]
    groups = demo_gold.by_task(records, failed)
    assert groups == {("story", 2): [True, False], ("count", 1): [False]}
    assert demo_gold.total(groups, stories=True) == Total(0.5, 2)
    assert demo_gold.total(groups, stories=False) == Total(0.0, 1)

    shares = demo_gold.by_check(records, failed)
    assert shares == {
        "has": 0.5,
        "end": 0.5,
        "ends": 0,
        "agree": 0,
        "patterns": 0,
        "no_repeat": 0,
    }
    assert demo_gold.by_check([count], [["answer"]]) == {}


@pytest.mark.parametrize("k, n", [(0, 10), (3, 10), (10, 10), (250, 1000)])
def test_wilson(k, n):
    """By definition, the observed share is 1.96 standard deviations away from both ends."""
    low, high = demo_gold.wilson(k, n)
    assert low <= k / n <= high
    for p in (low, high):
        standard_deviation = (max(p * (1 - p), 0) / n) ** 0.5
        assert abs(k / n - p) == pytest.approx(1.96 * standard_deviation, abs=1e-6)


@pytest.mark.parametrize(
    "share, words",
    [(0.2, "worse than"), (0.45, "no different from"), (0.9, "better than")],
)
def test_compare(share, words):
    text = demo_gold.compare(Total(share, 100), Total(0.5, 1000))
    assert text == f"{share:.2f}, {words} the demonstrations' 0.50"


def test_compare_without_answers():
    assert demo_gold.compare(Total(float("nan"), 0), Total(0.5, 9)) == "there are none"


def test_show_prints_right_and_wrong_answers(capsys):
    right = make_record("3", "3", task="count")
    wrong = {**make_record("4", "4", task="count"), "input": "é"}
    records = [wrong, right, right]
    texts = ["5", "3", "three"]
    answers = [Answer([], text, ended=True) for text in texts]
    demo_gold.show(records, answers, [["answer"], [], []], n=1)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "count, right: say né",
        "  -> 3",
        "",
        "count, wrong: say né / é",
        "  -> 5",
        "  fails answer",
        "  expected 4",
    ]


# demo_masking -------------------------------------------------------------------------------------

RECORDS = [
    {"prompt_ids": [1, 2, 3], "answer_ids": [4, END]},
    {"prompt_ids": [5, 6], "answer_ids": [7, 8, 1, END]},
]


@pytest.mark.parametrize(
    "arm, expected",
    [
        ("answers only", [[-100, -100, 4, END, -100], [-100, 7, 8, 1, END]]),
        ("prompts too", [[2, 3, 4, END, -100], [6, 7, 8, 1, END]]),
        ("without the end token", [[-100, -100, 4, -100, -100], [-100, 7, 8, 1, -100]]),
    ],
)
def test_what_counts_in_the_loss(arm, expected):
    records = demo_masking.relabel(RECORDS, arm)
    inputs, targets = demo_masking.get_arm_batch(records, 0, SFTConfig(batch_size=2), arm, END)
    assert targets.tolist() == expected
    assert torch.equal(inputs, collate(RECORDS)[0]), "all arms read the same"


def test_answer_share():
    """Of 4 and 5 targets, 2 and 4 are of the answer."""
    assert demo_masking.answer_share(RECORDS) == pytest.approx(6 / 9)


def test_difference_needs_seeds_that_agree():
    assert demo_masking.difference([1.0, 2.0], [1.5, 2.25]) == "+0.375 nats"
    assert demo_masking.difference([1.0, 2.0], [0.5, 1.75]) == "-0.375 nats"
    assert demo_masking.difference([1.0, 2.0], [1.5, 1.75]) == "no difference"


TINY = GPTConfig(vocab_size=13, block_size=24, n_layer=1, n_head=2, n_embd=16)
TINY_TASK = [{"prompt_ids": [i, 10], "answer_ids": [i, END]} for i in range(8)]


def next_token(model, ids):
    logits, _ = model(torch.tensor([ids]))
    return logits[0, -1].argmax().item()


@pytest.mark.parametrize("arm", demo_masking.ARMS)
def test_a_model_learns_what_counts(arm, tmp_path):
    """All arms learn to repeat the token. Only without the end token they do not learn to stop,
    and only with prompts they learn that 10 comes second."""
    torch.manual_seed(0)
    model = GPT(TINY)
    cfg = SFTConfig(steps=60, batch_size=8, lr=0.01, lr_adamw=3e-3)
    log = Log(tmp_path, 100)
    demo_masking.train(model, TINY_TASK, arm, cfg, END, "cpu", nullcontext, log, 40, "short")
    for i in range(8):
        assert next_token(model, [i, 10]) == i
    stops = [next_token(model, [i, 10, i]) == END for i in range(8)]
    knows_prompts = [next_token(model, [i]) == 10 for i in range(8)]
    assert all(stops) if arm != "without the end token" else not any(stops)
    assert all(knows_prompts) if arm == "prompts too" else not any(knows_prompts)

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(40, 100))


# demo_curriculum ----------------------------------------------------------------------------------


def test_clean_demonstrations_pass_and_noisy_are_as_many():
    records = []
    for i in range(30):
        records.append(make_record("yes" if i % 3 > 0 else "no", "yes", level=i))
    sets = demo_curriculum.clean_and_noisy(records, seed=0)
    assert [record["level"] for record in sets["clean"]] == [i for i in range(30) if i % 3 > 0]
    noisy = sets["noisy"]
    assert len(noisy) == 20
    assert len({record["level"] for record in noisy}) == 20, "none may be drawn twice"
    assert 0 < sum(record["output"] == "no" for record in noisy) < 10
    assert demo_curriculum.clean_and_noisy(records, seed=1)["noisy"] != noisy


def test_only_stories_with_checks_are_used():
    story = make_record("a", "a")
    count = make_record("3", "3", task="count")
    without_check = {"instruction": "", "input": "", "output": ""}
    without_task = {**without_check, "check": {"answer": "a"}}
    records = [story, count, without_check, without_task]
    assert demo_curriculum.checked_stories(records) == [story, without_task]


def test_interval():
    """100 answers: 1.96 * sqrt(0.5 * 0.5 / 100) = 0.098. With many answers the seeds' range is the
    larger one. At a share of 0 the interval does not shrink to a point."""
    assert demo_curriculum.interval([0.5], 100) == pytest.approx((0.5, 0.402, 0.598), abs=1e-3)
    assert demo_curriculum.interval([0.2, 0.8], 10**6) == pytest.approx((0.5, 0.2, 0.8))
    at_zero = demo_curriculum.interval([0.0], 10)
    assert at_zero.low == 0
    assert at_zero.high == pytest.approx(0.196, abs=1e-3)


def test_verdict():
    assert demo_curriculum.verdict([0.8], [0.5], 100) == "better"
    assert demo_curriculum.verdict([0.5], [0.8], 100) == "worse"
    assert demo_curriculum.verdict([0.6], [0.5], 100) == "no difference"
    assert demo_curriculum.verdict([0.3, 0.9], [0.5, 0.5], 10**6) == "no difference"


@pytest.mark.parametrize("curriculum", demo_curriculum.ORDERS)
def test_a_short_training_follows_the_curriculum(curriculum, tmp_path, monkeypatch):
    records = []
    for i in range(12):
        records.append({"prompt_ids": [i % 5], "answer_ids": [i, END], "level": i % 3})
    cfg = SFTConfig(steps=4, batch_size=3, curriculum=curriculum)
    batches = []

    def spy(records, step, cfg):
        batch = get_batch(records, step, cfg)
        batches.append(batch)
        return batch

    monkeypatch.setattr(demo_curriculum, "get_batch", spy)
    model = GPT(GPTConfig(vocab_size=13, block_size=24, n_layer=1, n_head=2, n_embd=16))
    log = Log(tmp_path, 4)
    demo_curriculum.train(model, records, cfg, "cpu", nullcontext, log, 0, "clean")
    in_order = [records[i] for i in order(records, cfg)]
    for step in range(4):
        expected = get_batch(in_order, step, cfg)
        assert torch.equal(batches[step][0], expected[0])
        assert torch.equal(batches[step][1], expected[1])


# the scripts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Demonstrations with short and with long answers, some of them wrong, and two models."""
    folder = tmp_path_factory.mktemp("demos")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=260, block_size=64, n_layer=1, n_head=2, n_embd=16))
    for kind in ("base", "sft"):
        path = folder / f"{kind}.pt"
        save_checkpoint(path, kind=kind, **model.to_checkpoint(), tokenizer=TOK.state())

    texts = ["thé dog", "the red fox saw the old dog and ran"]
    records = []
    for i in range(60):
        text = texts[i % 2]
        answer = "another" if i % 5 == 0 else text
        records.append(make_record(text, answer, level=i % 3))
    lines = [json.dumps(record) for record in records]
    (folder / "data.jsonl").write_text("\n".join(lines))
    (folder / "broken.jsonl").write_text("\n".join([*lines[:4], lines[4][:-5], *lines[5:]]))
    for record in records:
        record.pop("check")
    (folder / "unchecked.jsonl").write_text("\n".join(json.dumps(record) for record in records))
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
    script = ROOT / f"part_6/demo_{name}.py"
    result = run(script, f"--data={folder}/data.jsonl", f"--out={out}", *argv)
    assert result.returncode == 0, result.stderr
    assert (out / f"demo_{name}.png").read_bytes()[:4] == b"\x89PNG"
    return json.loads((out / f"demo_{name}.json").read_text())


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


SIZES = ["--init={0}/base.pt", "--steps=4", "--batch_size=4", "--block_size=64", "--prompts=4"]


def test_demo_gold_runs(folder, tmp_path):
    """11 of the 54 demonstrations are wrong."""
    argv = ["--init={0}/sft.pt", "--prompts=4", "--max_new_tokens=4"]
    metrics = run_demo("gold", folder, tmp_path, *argv)
    assert metrics["demonstrations_story"] == pytest.approx(43 / 54)
    assert metrics["demonstrations_story_n"] == 54
    assert metrics["model_story_n"] == 4
    assert metrics["model_skill_n"] == 0


def test_demo_masking_runs(folder, tmp_path):
    metrics = run_demo("masking", folder, tmp_path, *SIZES, "--short=10", "--seeds=2")
    assert metrics["steps"] == 4
    for kind in ("short", "long"):
        for arm in ("answers_only", "prompts_too", "without_the_end_token"):
            nats = metrics[f"{kind}_{arm}_nats"]
            assert len(nats) == 2
            assert np.isfinite(nats).all()
    lines = read_log(tmp_path / "demo_masking.jsonl")
    assert [line["step"] for line in lines] == list(range(2 * 6 * 4))

    # Each training has its own records: short and long answers have different first losses.
    first = {(line["kind"], line["arm"]): line["loss"] for line in lines[::4][:6]}
    assert len(first) == 6
    assert first["short", "answers only"] != first["long", "answers only"]


def test_demo_curriculum_runs(folder, tmp_path):
    metrics = run_demo("curriculum", folder, tmp_path, *SIZES, "--small=0.5", "--seeds=2")
    for kind in ("clean", "noisy"):
        for steps in (2, 4):
            for name in ("easy_first", "random", "anti"):
                assert len(metrics[f"{kind}_{steps}_steps_{name}"]) == 2
    lines = read_log(tmp_path / "demo_curriculum.jsonl")
    assert [line["step"] for line in lines] == list(range(2 * 2 * 3 * (2 + 4)))


def make_clone(folder):
    """A fresh clone, with neither data/ nor any checkpoint -> its files."""
    ignore = shutil.ignore_patterns("out", "__pycache__")
    shutil.copytree(ROOT / "part_6", folder / "part_6", ignore=ignore)
    shutil.copy(ROOT / "shared.py", folder)
    return files_in(folder)


def files_in(folder):
    """All files but Python's cache."""
    files = {path for path in folder.rglob("*") if path.is_file()}
    return {path for path in files if path.suffix != ".pyc"}


@pytest.mark.parametrize(
    "name, file, message",
    [
        ("gold", "broken.jsonl", "broken.jsonl line 5:"),
        ("masking", "broken.jsonl", "broken.jsonl line 5:"),
        ("curriculum", "broken.jsonl", "broken.jsonl line 5:"),
        ("gold", "unchecked.jsonl", "needs records with checks"),
        ("curriculum", "unchecked.jsonl", "needs stories with checks"),
    ],
)
def test_a_bad_file_is_found_before_anything_is_built(folder, tmp_path, name, file, message):
    before = make_clone(tmp_path)
    result = run(tmp_path / f"part_6/demo_{name}.py", f"--data={folder / file}")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert result.stdout == ""
    assert files_in(tmp_path) == before


def test_masking_needs_short_and_long_answers(folder, tmp_path):
    options = [option.format(folder) for option in SIZES]
    options += [f"--data={folder}/data.jsonl", "--short=1000", f"--out={tmp_path}"]
    result = run(ROOT / "part_6/demo_masking.py", *options)
    assert result.returncode == 2
    assert "--short=1000 leaves no long answers to train on" in result.stderr
    assert not list(tmp_path.iterdir())
