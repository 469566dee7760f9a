"""
Tests of Part 2's demos: their mathematics against an independent statement, and a tiny run of
each.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import re
import subprocess
from dataclasses import asdict

import pytest
import torch

import demo_batches
import demo_overfit
import demo_sampling
from model import GPT, GPTConfig
from shared import StoryPattern, save_checkpoint
from train import evaluate, get_batch, load_data

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
SIZES = dict(block_size=8, n_layer=1, n_head=2, n_embd=16)
TINY = ["--steps=10", "--batch_size=2", *(f"--{key}={value}" for key, value in SIZES.items())]

RUNNER = """
import json, runpy, sys
folder, jobs = sys.argv[1:]
sys.path.insert(0, folder)
for name, *options in json.loads(jobs):
    sys.argv = [name, *options]
    runpy.run_path(f"{folder}/demo_{name}.py", run_name="__main__")
"""


def tiny_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES))
    for p in model.parameters():  # projections that start at zero would hide the attention
        p.data += 0.2 * torch.randn(p.shape)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs all demos with tiny sizes -> their output folder. One process runs them, because
    importing torch takes longer than they do."""
    folder = tmp_path_factory.mktemp("demos")
    text = "the fox ran. Tom hid the né dog. " * 40
    (folder / "text.txt").write_text(text, encoding="utf-8")
    common = [f"--out={folder}", f"--data={folder / 'text.txt'}", *TINY]
    model = tiny_model()
    save_checkpoint(
        folder / "gpt.pt", kind="gpt", gpt_config=asdict(model.cfg), weights=model.state_dict()
    )
    jobs = [
        ("batches", *common),
        ("overfit", *common, "--sizes=50,0", "--seeds=2"),
        (
            "sampling",
            f"--out={folder}",
            f"--init={folder / 'gpt.pt'}",
            "--samples=2",
            "--length=6",
            "--draws=200",
        ),
    ]
    command = [sys.executable, "-c", RUNNER, str(HERE), json.dumps(jobs)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def numbers(made, name):
    return json.loads((made / f"demo_{name}.json").read_text())


def test_loss_by_position_against_one_row_at_a_time():
    model = tiny_model()
    ids = torch.randint(256, (8 * 70 + 5,))
    losses = demo_batches.loss_by_position(model, ids, 8, CPU)
    expected = torch.zeros(8)
    for row in range(70):
        start = 8 * row
        logits, _ = model(ids[None, start : start + 8])
        logp = logits[0].log_softmax(dim=-1)
        for t in range(8):
            expected[t] -= logp[t, ids[start + t + 1]].item() / 70
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_entropy_after_one():
    """a is followed by b or c, equally often, and both by a: one bit, half of the time."""
    ids = torch.tensor(list(b"abac" * 5000 + b"a"))
    assert demo_batches.entropy_after_one(ids) == pytest.approx(math.log(2) / 2, abs=1e-6)
    assert demo_batches.entropy_after_one(torch.tensor(list(b"ab" * 50))) == pytest.approx(
        0, abs=1e-9
    )


def test_parting_step():
    rows = [[0, 5.0, 5.0], [10, 4.0, 4.3], [20, 3.0, 3.05], [30, 2.0, 2.2], [40, 1.0, 2.5]]
    evaluations = torch.tensor(rows)
    assert demo_overfit.parting_step(evaluations, 0.1) == 30  # at 20 they are close again
    assert demo_overfit.parting_step(evaluations, 0.25) == 40
    assert demo_overfit.parting_step(evaluations, 2.0) is None
    assert demo_overfit.parting_step(evaluations, -1.0) == 0


def test_run_evaluates_both_texts():
    """One row per evaluation: step, loss on the training text, loss on the validation text."""
    ids = torch.randint(256, (60,))
    val_ids = torch.randint(256, (40,))
    cfg = demo_overfit.Config(steps=5, batch_size=2, eval_every=2, eval_bytes=30, seed=3)
    logged = []

    def log(step, **values):
        logged.append(step)

    rows = demo_overfit.run(ids, val_ids, cfg, GPTConfig(**SIZES), CPU, log, steps_before=100)
    assert rows[:, 0].tolist() == [0, 2, 4, 5]
    assert logged == [100, 101, 102, 103, 104]

    # Before the first step the model is the one that the seed makes.
    torch.manual_seed(3)
    model = GPT(GPTConfig(**SIZES))
    train_loss = evaluate(model, ids[:30], 8, CPU).loss
    val_loss = evaluate(model, val_ids[:30], 8, CPU).loss
    assert rows[0, 1:].tolist() == pytest.approx([train_loss, val_loss], rel=1e-5)

    # Random text can only be learned by heart.
    assert rows[-1, 1] < rows[0, 1] - 0.02
    assert rows[-1, 2] > rows[-1, 1]


def test_descriptions():
    """Two seeds: the losses part at step 10 in the first run, and never in the second."""
    first = [[0, 5.0, 5.0], [10, 4.0, 4.5], [20, 3.0, 5.0]]
    second = [[0, 5.0, 5.0], [10, 4.0, 4.0], [20, 3.0, 3.0]]
    runs = torch.tensor([first, second])
    assert demo_overfit.final_gaps(runs).tolist() == [2.0, 0.0]
    text = demo_overfit.describe(1234, runs, 0.1)
    assert "1,234 bytes: parted at step 10, never parted; gap 1.000 (0.000 to 2.000)" in text
    assert "validation 4.000 at the end, 3.750 at its best" in text

    # A gap that rounds to zero has no minus sign.
    almost = torch.tensor([[[0, 5.0, 5.0], [20, 3.0, 2.998]]])
    text = demo_overfit.describe_briefly(50, almost, 0.1)
    assert text == "50 bytes: never parted, 0.00 nats apart at the end"


def check_shares(expected, **options):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    shares = demo_sampling.draw_shares(p.log(), 40000, **options)
    expected = torch.tensor(expected) / sum(expected)
    torch.testing.assert_close(shares, expected, atol=0.012, rtol=0)


def test_shares_against_softmax():
    torch.manual_seed(0)
    check_shares([0.5, 0.3, 0.15, 0.05])
    check_shares([0.25, 0.09, 0.0225, 0.0025], temperature=0.5)
    check_shares([0.5, 0.3, 0.15, 0.0], top_k=3)
    check_shares([0.5, 0.3, 0.0, 0.0], top_p=0.7)


def test_scores_of_texts():
    patterns = [StoryPattern(0, re.compile(r"A (fox|dog) ran\."), None, None)]

    # After "A " two sentences fit the pattern, one does not, and one has no end.
    texts = ["fox ran. It", "dog ran. Bo", "fix ran. It", "fox r"]
    scores = demo_sampling.score("A ", texts, {"fox", "dog", "ran"}, patterns)
    assert scores["sentences"] == pytest.approx(2 / 3)

    # The words are fox ran dog ran fix ran fox; the last word of a text may be cut off.
    assert scores["words"] == pytest.approx(6 / 7)


def test_distinct():
    texts = ["a b a b .", "a b ."]  # the pairs are ab, ba, ab and ab
    assert demo_sampling.distinct(texts) == pytest.approx(2 / 4)
    assert demo_sampling.distinct(["x"]) == 0


def test_smoke_batches(made):
    """Its losses are those of the same training, replayed, and they are on the validation text."""
    result = numbers(made, "batches")
    cfg = demo_batches.Config(data=str(made / "text.txt"), batch_size=2)
    gpt_cfg = GPTConfig(**SIZES)
    data = load_data(cfg, gpt_cfg)
    torch.manual_seed(0)
    model = GPT(gpt_cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(11):
        if step in (0, 1, 10):
            losses = demo_batches.loss_by_position(model, data.val_ids, 8, CPU)
            worth = losses[0] - losses[-2:].mean()
            assert result[f"first_after_{step}"] == pytest.approx(losses[0].item(), rel=1e-4)
            assert result[f"last_after_{step}"] == pytest.approx(losses[-1].item(), rel=1e-4)
            assert result[f"worth_after_{step}"] == pytest.approx(worth.item(), abs=1e-3)
        _, loss = model(*get_batch(data.train_ids, step, cfg, 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert result["uniform"] == pytest.approx(math.log(256))
    after_one = demo_batches.entropy_after_one(data.val_ids)
    assert result["entropy_after_one"] == pytest.approx(after_one)
    assert result["last_after_10"] < result["last_after_0"]
    assert (made / "demo_batches.png").exists()
    assert (made / "demo_batches_loss.png").exists()


def test_smoke_overfit(made):
    result = numbers(made, "overfit")
    assert result["sizes"] == [50, 1224]  # 90 % of the bytes of the text
    assert [len(gap) for gap in result["gap"]] == [2, 2]
    for losses in result["val_end"]:
        assert losses[0] != losses[1]  # two seeds are two runs
    assert (made / "demo_overfit.png").exists()


def test_smoke_sampling(made):
    result = numbers(made, "sampling")
    assert result["kept"]["top-k 3"] <= 3
    scores = result["scores"]
    assert len(scores) == 14
    assert scores["temperature=1.0"] == scores["top_p=1.0"] == scores["top_k=256"]
    for score in scores.values():
        for share in score.values():
            assert 0 <= share <= 1
    assert (made / "demo_sampling.png").exists()
    assert (made / "demo_sampling_bars.png").exists()
