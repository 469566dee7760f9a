"""
Tests of part_1/train.py: what a batch holds, what the models may know and train, and tiny runs in a
process of their own, which a training loop written here must reproduce.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import os
import subprocess
from statistics import mean, stdev

import pytest
import torch
import torch.nn.functional as F

from model import GPTConfig
from shared import load_checkpoint
from train import (
    ALPHABET,
    GPT,
    POSITIONS,
    Config,
    bag_guess,
    decode,
    encode,
    evaluate,
    get_batch,
    sinusoids,
)

SCRIPT = Path(__file__).resolve().parent / "train.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
CPU = torch.device("cpu")

# The sizes of the tiny runs. Words have N letters.
SIZES = dict(vocab_size=len(ALPHABET), block_size=8, n_layer=1, n_head=2, n_embd=16)
N = 4


def run(folder, *options):
    command = [sys.executable, SCRIPT, f"--out={folder}", "--device=cpu", *options]
    return subprocess.run(command, env=ENV, text=True, capture_output=True)


def make(positions, **sizes):
    """A model whose output projections do not start at zero, which would hide the attention."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, **sizes}), positions)
    for name, p in model.named_parameters():
        if name.endswith("weight") and p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
    return model


# data ---------------------------------------------------------------------------------------------


def test_encode_and_decode():
    assert encode("cab|") == [2, 0, 1, 26]
    assert decode(encode(ALPHABET)) == ALPHABET


def test_a_batch_holds_words_and_the_same_words_backwards():
    """The input of the place where a letter is asked for must not contain that letter yet."""
    x, y = get_batch(3, Config(batch_size=50), block_size=10)
    assert x.shape == (50, 10)
    assert y.shape == (50, 5)
    for row, target in zip(x.tolist(), y.tolist()):
        word = decode(row[:5])
        backwards = word[::-1]
        assert word.isalpha()
        assert decode(row) == word + "|" + backwards[:-1]
        assert decode(target) == backwards

        # Place 5 + i has seen the first i letters of the answer and has to say the next one.
        for i in range(5):
            answer_so_far = decode(row[6 : 5 + i + 1])
            assert answer_so_far + ALPHABET[target[i]] == backwards[: i + 1]


def test_a_batch_depends_on_seed_and_step_alone():
    x, _ = get_batch(3, Config(seed=1), block_size=16)
    torch.rand(5)  # the global random numbers play no part
    again, _ = get_batch(3, Config(seed=1), block_size=16)
    assert torch.equal(x, again)
    other_step, _ = get_batch(4, Config(seed=1), block_size=16)
    assert not torch.equal(x, other_step)
    other_seed, _ = get_batch(3, Config(seed=2), block_size=16)
    assert not torch.equal(x, other_seed)

    # Nor do the batches of seed + 1 repeat those of this seed one step later.
    next_seed, _ = get_batch(2, Config(seed=2), block_size=16)
    assert not torch.equal(x, next_seed)


def test_every_letter_occurs():
    x, _ = get_batch(0, Config(batch_size=1000), block_size=16)
    assert set(x[:, :8].flatten().tolist()) == set(range(26))


# positions and the stack --------------------------------------------------------------------------


@pytest.mark.parametrize("C", [8, 7])
def test_sinusoids_by_the_papers_formula(C):
    table = sinusoids(6, C)
    assert table.shape == (6, C)
    for t in range(6):
        for i in range(C):
            angle = t / 10000 ** (2 * (i // 2) / C)
            value = math.sin(angle) if i % 2 == 0 else math.cos(angle)
            assert table[t, i].item() == pytest.approx(value, abs=1e-5)


def test_a_new_model_guesses_uniformly():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES), "learned")
    idx = torch.randint(26, (64, 8))
    loss = F.cross_entropy(model(idx).flatten(0, 1), idx.flatten())
    assert loss.item() == pytest.approx(math.log(len(ALPHABET)), abs=0.03)


@pytest.mark.parametrize("positions", POSITIONS)
def test_only_the_learned_positions_are_trained(positions):
    model = make(positions)
    before = model.wpe.detach().clone()
    if positions == "none":
        assert (before == 0).all()
    if positions == "sinusoidal":
        assert torch.equal(before, 0.02 * sinusoids(8, 16))

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x, y = get_batch(0, Config(), 8)
    F.cross_entropy(model(x)[:, N:].flatten(0, 1), y.flatten()).backward()
    optimizer.step()
    is_trained = not torch.equal(model.wpe, before)
    assert is_trained == (positions == "learned")


@pytest.mark.parametrize("positions", POSITIONS)
def test_only_a_model_with_positions_knows_the_order(positions):
    model = make(positions)
    model.wpe.data *= 50  # as large as the tokens here
    first = model(torch.tensor([encode("dogs|")]))[0, -1]
    second = model(torch.tensor([encode("gsod|")]))[0, -1]
    difference = (first - second).abs().max() / first.abs().max()
    if positions == "none":
        assert difference < 1e-4
    else:
        assert difference > 1e-2


def test_a_model_cannot_see_later_letters():
    model = make("learned", n_layer=2)
    idx = torch.randint(26, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = idx.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 26
    moved = (model(idx) != model(changed)).any(dim=-1)[0]
    assert not moved[:5].any()
    assert moved[5:].all()


def test_a_sequence_that_is_too_long():
    with pytest.raises(AssertionError, match="9 tokens do not fit in block_size=8"):
        make("none")(torch.zeros(1, 9, dtype=torch.long))


# evaluate -----------------------------------------------------------------------------------------


def test_bag_guess_against_a_count_of_the_letters_left():
    words = ["level", "abcde", "aaaaa", "abbaa", "zzazz"]
    shares = []
    for word in words:
        for said in range(len(word)):
            letters_left = word[said:]
            most = max(letters_left.count(letter) for letter in letters_left)
            shares.append(most / len(letters_left))
    y = torch.tensor([encode(word) for word in words])
    assert bag_guess(y) == pytest.approx(mean(shares), rel=1e-5)


def test_bag_guess_of_different_letters():
    """The docstring's formula: (1/n + ... + 1/2 + 1) / n."""
    y = torch.tensor([encode("abcd")])
    assert bag_guess(y) == pytest.approx((1 / 4 + 1 / 3 + 1 / 2 + 1) / 4)


class Oracle:
    """Answers like a model, and knows the word. Every `wrong_every`-th word is said wrongly."""

    def __init__(self, wrong_every=0):
        self.wrong_every = wrong_every

    def __call__(self, x):
        self.x = x
        n = x.size(1) // 2
        answer = x[:, :n].flip(1).clone()
        if self.wrong_every:
            answer[:: self.wrong_every, 0] = ALPHABET.index("|")

        # Before the bar it says bars, which are never right.
        ids = torch.full_like(x, ALPHABET.index("|"))
        ids[:, n:] = answer
        return F.one_hot(ids, len(ALPHABET)).float()


def test_evaluate_counts_the_letters_that_are_right():
    assert evaluate(Oracle(), Config(), 8, CPU) == 1
    accuracy = evaluate(Oracle(wrong_every=5), Config(), 8, CPU)
    assert accuracy == pytest.approx(1 - 200 / 4000)  # the first letter of 200 of 1,000 words


@pytest.mark.parametrize("batch_size", [64, 1000])
def test_evaluate_uses_new_words(batch_size):
    """None of the 1,000 words is one of the words of the first steps."""
    cfg = Config(batch_size=batch_size)
    oracle = Oracle()
    evaluate(oracle, cfg, 16, CPU)
    words = {decode(row[:8]) for row in oracle.x.tolist()}
    assert len(words) == 1000
    for step in range(5):
        x, _ = get_batch(step, cfg, 16)
        train_words = {decode(row[:8]) for row in x.tolist()}
        assert not words & train_words


# the script ---------------------------------------------------------------------------------------


STEPS = 6
EVAL_EVERY = 4
LR = 0.02


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Two seeds of a tiny training -> (folder, metrics, log, what it prints)."""
    folder = tmp_path_factory.mktemp("run")
    options = [f"--steps={STEPS}", f"--eval_every={EVAL_EVERY}", f"--lr={LR}", "--batch_size=16"]
    options += [f"--{name}={value}" for name, value in SIZES.items()]
    result = run(folder, *options, "--seed=3", "--seeds=2")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((folder / "metrics.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return folder, metrics, log, result.stdout


def accuracy_letter_by_letter(model, seed):
    """The share of letters right in the words that evaluate() asks for."""
    x, y = get_batch(-1, Config(seed=seed, batch_size=1000), 8)
    with torch.no_grad():
        logits = model(x)
    correct = 0
    for i in range(N):
        guess = logits[:, N + i].argmax(dim=-1)
        correct += (guess == y[:, i]).sum().item()
    return correct / y.numel()


def train_again(positions, seed):
    """The training of one model, written independently of the script
    -> model, losses, {step: accuracy}.

    The loss is summed letter by letter: place N + i says letter i of the word backwards.
    """
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SIZES), positions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    accuracies = {}
    for step in range(STEPS):
        x, y = get_batch(step, Config(seed=seed, batch_size=16), 8)
        logp = model(x).log_softmax(dim=-1)
        loss = 0.0
        for row in range(16):
            for i in range(N):
                loss = loss - logp[row, N + i, y[row, i]]
        loss = loss / (16 * N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step + 1 in (EVAL_EVERY, STEPS):
            accuracies[step + 1] = accuracy_letter_by_letter(model, seed)
    return model, losses, accuracies


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("seed", [3, 4])
def test_the_script_trains_as_it_says(tiny_run, seed, positions):
    _, _, log, _ = tiny_run
    assert [record["step"] for record in log] == list(range(2 * 3 * STEPS))
    first = ((seed - 3) * 3 + POSITIONS.index(positions)) * STEPS
    records = log[first : first + STEPS]
    assert {record["positions"] for record in records} == {positions}

    _, losses, accuracies = train_again(positions, seed)
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-3)
    logged = {}
    for record in records:
        if "val_accuracy" in record:
            logged[record["trained_steps"]] = record["val_accuracy"]
    assert logged == pytest.approx(accuracies, abs=0.01)


def test_metrics_are_means_over_the_seeds(tiny_run):
    folder, metrics, log, printed = tiny_run
    for positions in POSITIONS:
        last = []
        for record in log:
            if record["positions"] == positions and record.get("trained_steps") == STEPS:
                last.append(record["val_accuracy"])
        assert len(last) == 2
        assert metrics[positions] == pytest.approx(mean(last))
        assert metrics[f"{positions}_sd"] == pytest.approx(stdev(last))
        assert f"{metrics[positions]:.3f} +- " in printed
    _, y = get_batch(-1, Config(seed=3, batch_size=10_000), 8)
    assert metrics["bag_guess"] == pytest.approx(bag_guess(y))
    assert metrics["params"] == sum(p.numel() for p in make("none").parameters())
    assert (folder / "train.png").read_bytes().startswith(b"\x89PNG")


def test_the_checkpoint_holds_the_trained_model(tiny_run):
    """It is the model with learned positions of the first seed, after the last step."""
    folder, _, log, _ = tiny_run
    saved = load_checkpoint(folder / "gpt.pt", "gpt")
    assert saved["positions"] == "learned"
    assert saved["gpt_config"] == SIZES
    model = GPT(GPTConfig(**saved["gpt_config"]), saved["positions"])
    model.load_state_dict(saved["weights"])

    last = log[2 * STEPS - 1]  # "learned" is the second of the three models
    assert last["positions"] == "learned"
    accuracy = accuracy_letter_by_letter(model, seed=3)
    assert accuracy == pytest.approx(last["val_accuracy"], abs=0.002)

    # Adam makes rounding errors larger, so this compares roughly. Other seeds differ by far more.
    x, _ = get_batch(0, Config(), 8)
    expected, _, _ = train_again("learned", seed=3)
    with torch.no_grad():
        logits = model(x)
        expected_logits = expected(x)
    difference = (logits - expected_logits).abs().max() / expected_logits.abs().max()
    assert difference < 0.05


def test_it_learns_to_say_short_words_backwards(tmp_path):
    """With learned positions two blocks soon reverse words of two letters, and say so."""
    sizes = ["--block_size=4", "--n_layer=1", "--n_head=2", "--n_embd=32"]
    result = run(tmp_path, "--steps=60", "--batch_size=64", "--lr=0.01", "--eval_every=60", *sizes)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["learned"] > 0.95
    assert metrics["none"] < metrics["bag_guess"] + 0.05
    assert metrics["none_sd"] is None
    learned = [line for line in result.stdout.splitlines() if line.startswith("  learned")]
    assert learned[0].split()[-1] == "ab"  # the answer to "ba|"


# One process tries all of them, because importing torch takes longer.
BAD_RUNNER = """
import json, runpy, sys
script, options = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
for option in json.loads(options):
    sys.argv = [script, option]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        print(error.code)
"""


def test_bad_input_is_one_line():
    messages = {
        "--n_head=3": "n_head=3",
        "--block_size=7": "block_size=7",
        "--block_size=0": "block_size=0",
        "--vocab_size=26": "vocab_size=26",
        "--steps=0": "steps=0",
        "--stepz=3": "--steps",
        "--steps=x": "int",
    }
    command = [sys.executable, "-c", BAD_RUNNER, str(SCRIPT), json.dumps(list(messages))]
    result = subprocess.run(command, env=ENV, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["2"] * len(messages)

    lines = result.stderr.splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages.values()):
        assert line.startswith("error: ")
        assert message in line
