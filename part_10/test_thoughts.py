"""
Tests of train_thoughts.py and demo_thoughts.py. The oracles are problems by hand, thoughts computed
again without a cache, in float64, derivatives by small differences, and runs of the scripts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.nn.functional as F

import demo_thoughts
import train_thoughts
from model import GPT, GPTConfig, RMSNorm
from shared import load_checkpoint, parse_args, save_checkpoint
from train_thoughts import (
    ANSWER,
    KINDS,
    PAUSE,
    SPECIAL,
    Config,
    GrowingCache,
    Problem,
    Problems,
    Thinker,
    encode,
    loss_of,
    n_replaced,
    n_thoughts,
    parse_problem,
    stage,
)

FOLDER = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
VOCABULARY = {word: i for i, word in enumerate(SPECIAL + [str(i) for i in range(12)])}
L = 3


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch):
    """RMSNorm computes in float32, whatever the model's dtype is. That would be too coarse for
    derivatives by small differences."""

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)

    monkeypatch.setattr(RMSNorm, "forward", forward)


def make_model(kind, seed=0):
    """A small model in float64 with random weights. Those of a new model have zeros, which would
    hide what stands before them."""
    cfg = GPTConfig(len(VOCABULARY), 24, n_layer=2, n_head=2, n_kv_head=2, n_embd=16)
    model = Thinker(cfg, kind, VOCABULARY).double()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim == 2:
            p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


def make_problems(B=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    numbers = [len(SPECIAL), len(VOCABULARY)]
    return Problems(
        torch.randint(*numbers, (B, 4), generator=generator),
        torch.randint(*numbers, (B, L), generator=generator),
        torch.full((B,), L),
    )


def vectors_of(model, question, n):
    """The inputs of a model that has thought n times, without a cache: for each thought all that
    came before is read again -> (B, Q + n, C)."""
    x = model.wte(question)
    for _ in range(n):
        if model.kind == "pause":
            vector = model.wte(torch.full((len(question), 1), VOCABULARY[PAUSE]))
        else:
            vector = model.read(x, GrowingCache())[:, -1:]
        x = torch.cat([x, vector], dim=1)
    return x


def assert_near(actual, expected, rtol=1e-9):
    """Equal up to rounding, which grows with the size of the numbers."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * scale)


# data ---------------------------------------------------------------------------------------------


def test_parse_problem_by_hand():
    problem = parse_problem(["7-2=5", "5+5=10", "10*2=20"])
    assert problem == Problem(["7", "-2", "+5", "*2"], ["5", "10", "20"])
    assert parse_problem(["7-2=5", "6+5=11"]) is None


def test_encode_by_hand():
    vocabulary = {".": 0, "?": 1, "7": 2, "-2": 3, "5": 4, "+5": 5, "10": 6}
    problems = [parse_problem(["7-2=5"]), parse_problem(["7-2=5", "5+5=10"])]
    encoded = encode(problems, vocabulary, 3)
    assert encoded.question.tolist() == [[2, 3, 0, 0, 1], [2, 3, 5, 0, 1]]
    assert encoded.results.tolist() == [[4, 4, 4], [4, 6, 6]]
    assert encoded.level.tolist() == [1, 2]


def test_no_held_out_problem_is_in_training():
    train, val = train_thoughts.read_problems(Config())
    words_of_train = {tuple(problem.words) for problem in train}
    words_of_val = {tuple(problem.words) for problem in val}
    assert not words_of_train & words_of_val
    assert 0.08 < len(val) / (len(train) + len(val)) < 0.12
    assert {len(problem.results) for problem in val} == {1, 2, 3, 4}

    # The results are those of an independent calculation.
    for problem in val:
        value = problem.words[0]
        for operation, result in zip(problem.words[1:], problem.results):
            value = str(eval(value + operation))
            assert value == result


def test_all_kinds_see_the_same_batches():
    problems = make_problems(50)
    first = train_thoughts.get_batch(problems, 3, 0, 8)
    torch.manual_seed(1)
    again = train_thoughts.get_batch(problems, 3, 0, 8)
    assert (first.question == again.question).all()
    assert (first.results == again.results).all()
    other = train_thoughts.get_batch(problems, 4, 0, 8)
    assert (first.question != other.question).any()


# the model ----------------------------------------------------------------------------------------


def test_read_is_the_trunk_of_the_gpt():
    model = make_model("steps")
    question = make_problems().question
    cache = GrowingCache()
    whole = model.read(model.wte(question), cache)
    assert cache.length == question.size(1)
    assert_near(whole, GPT.trunk(model, question))

    # In pieces it is the same.
    cache = GrowingCache()
    pieces = [model.read(model.wte(part), cache) for part in question.split([2, 1, 1], dim=1)]
    assert_near(torch.cat(pieces, dim=1), whole)


@pytest.mark.parametrize("kind", ["pause", "thoughts"])
@pytest.mark.parametrize("n", [0, 1, 4])
def test_thinking_against_reading_all_again(kind, n):
    model = make_model(kind)
    question = make_problems().question
    states, cache = model.think(question, n)
    Q = question.size(1)
    x = vectors_of(model, question, n)
    expected = model.read(x, GrowingCache())[:, Q - 1 :]
    assert states.shape == (5, n + 1, 16)
    assert_near(states, expected)
    assert cache.length == Q + n
    if kind == "thoughts" and n > 0:
        assert_near(states[:, :n], x[:, Q:])  # what is fed back is the state itself


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("replaced", [0, 2, 3])
def test_logits_against_reading_all_again(kind, replaced):
    model = make_model(kind)
    problems = make_problems()
    n = n_thoughts(kind, replaced, Config(per_step=2))
    assert n == (2 * replaced if kind in ("pause", "thoughts") else 0)
    written = problems.results[:, replaced:]
    W = L - replaced
    logits = model(problems.question, written, n)

    answer_token = torch.full((5, 1), VOCABULARY[ANSWER])
    tail = torch.cat([written, answer_token], dim=1)
    x = torch.cat([vectors_of(model, problems.question, n), model.wte(tail)], dim=1)
    all_logits = model.lm_head(model.read(x, GrowingCache()))
    before_answer = all_logits[:, -1:]
    before_written = all_logits[:, -W - 2 : -2]
    assert_near(logits, torch.cat([before_written, before_answer], dim=1))


def test_no_number_is_seen_before_it_is_predicted():
    model = make_model("thoughts").float()
    problems = make_problems()
    logits = model(problems.question, problems.results, 2)
    for j in range(L):
        changed = problems.results.clone()
        changed[:, j] = len(SPECIAL) + (changed[:, j] + 1) % 12
        other = model(problems.question, changed, 2)
        assert torch.equal(other[:, : j + 1], logits[:, : j + 1])
        assert (other[:, j + 1 :] != logits[:, j + 1 :]).any(dim=-1).all()


def test_a_problem_does_not_depend_on_its_batch():
    problems = make_problems()
    for kind in KINDS:
        model = make_model(kind)
        together = model(problems.question, problems.results[:, 1:], 2)
        alone = model(problems.question[2:3], problems.results[2:3, 1:], 2)
        assert_near(together[2:3], alone)


def test_the_gradient_flows_back_through_the_thoughts():
    """The derivative of the loss in the direction of random weights, by a small difference. If a
    thought were cut off from the graph, the two would differ."""
    model = make_model("thoughts")
    problems = make_problems()
    loss_of(model, problems, L, Config()).backward()
    generator = torch.Generator().manual_seed(1)
    steps = []
    expected = 0.0
    for p in model.parameters():
        step = 1e-6 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        steps.append(step)
        expected += (p.grad * step).sum().item()

    losses = []
    for sign in (1, -2):  # from the weights to one side, and from there to the other
        with torch.no_grad():
            for p, step in zip(model.parameters(), steps):
                p += sign * step
            losses.append(loss_of(model, problems, L, Config()).item())
    assert (losses[0] - losses[1]) / 2 == pytest.approx(expected, rel=1e-5)


def test_pause_tokens_are_the_same_for_all_problems_and_thoughts_are_not():
    question = make_problems().question
    Q = question.size(1)
    pauses = vectors_of(make_model("pause"), question, 2)[:, Q:]
    thoughts = vectors_of(make_model("thoughts"), question, 2)[:, Q:]
    assert (pauses == pauses[:1, :1]).all()
    assert ((thoughts[1:] - thoughts[:1]).abs().amax(dim=(1, 2)) > 0.01).all()


def test_what_a_pause_token_computes_is_read_from_the_second_block_on():
    """Its keys and values in the first block are the same for all problems."""
    question = make_problems().question
    Q = question.size(1)
    for kind, first_is_equal in (("pause", True), ("thoughts", False)):
        _, cache = make_model(kind).think(question, 2)
        for layer, (_, v) in cache.kv.items():
            spread = (v[:, :, Q:] - v[:1, :, Q:]).abs().max().item()
            is_equal = spread < 1e-9 * v.abs().max().item()
            assert is_equal == (first_is_equal and layer == 0)


@pytest.mark.parametrize("kind, replaced", [("steps", 0), ("thoughts", 2), ("at_once", 3)])
def test_solve_says_the_likeliest_numbers(kind, replaced):
    model = make_model(kind)
    question = make_problems().question
    n = n_thoughts(kind, replaced, Config())
    numbers = model.solve(question, n, L - replaced)
    assert numbers.shape == (5, L - replaced + 1)
    logits = model(question, numbers[:, :-1], n)
    assert (logits.argmax(dim=-1) == numbers).all()


# the curriculum -----------------------------------------------------------------------------------


def test_stages_by_hand():
    cfg = Config(steps=10)
    assert [stage(step, cfg, 4) for step in range(10)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert stage(10, cfg, 4) == 4
    assert [stage(step, cfg, 1) for step in (0, 4, 5, 9)] == [0, 0, 1, 1]
    assert stage(0, Config(steps=10, curriculum=False), 4) == 4
    replaced = {kind: [n_replaced(kind, step, cfg, 4) for step in (0, 4, 9)] for kind in KINDS}
    assert replaced["steps"] == [0, 0, 0]
    assert replaced["at_once"] == [4, 4, 4]
    for kind in ("internalized", "pause", "thoughts"):
        assert replaced[kind] == [0, 2, 4]


def test_the_loss_counts_what_is_written_and_the_answer():
    model = make_model("thoughts")
    problems = make_problems()
    logits = model(problems.question, problems.results[:, 2:], 2)  # (B, 2, V): a step, the answer
    total = 0.0
    for row in range(5):
        for position, target in enumerate([problems.results[row, 2], problems.results[row, -1]]):
            total -= logits[row, position].log_softmax(dim=-1)[target].item()
    assert loss_of(model, problems, 2, Config()).item() == pytest.approx(total / 10)


@pytest.mark.parametrize("kind", ["pause", "thoughts", "steps"])
def test_a_few_problems_are_learned_by_heart(kind):
    problems = [parse_problem([f"{a}+1={a + 1}", f"{a + 1}-{a}=1"]) for a in range(2, 8)]
    problems += [parse_problem([f"{a}+2={a + 2}"]) for a in range(2, 8)]
    words = sorted({word for problem in problems for word in problem.words + problem.results})
    vocabulary = {word: i for i, word in enumerate(SPECIAL + words)}
    encoded = encode(problems, vocabulary, 2)
    data = train_thoughts.Data(vocabulary, encoded, encoded)
    cfg = Config(steps=150, batch_size=24, n_embd=32, lr=1e-2)
    torch.manual_seed(0)
    model = train_thoughts.build_model(kind, data, cfg)
    train_thoughts.train(model, data, 0, cfg, torch.device("cpu"))
    replaced = n_replaced(kind, cfg.steps, cfg, 2)
    assert train_thoughts.examine(model, encoded, replaced, cfg) == {1: 1.0, 2: 1.0}


# the demo -----------------------------------------------------------------------------------------


def test_the_probe_reads_what_is_there_and_nothing_else():
    """The first state holds the first result, the second holds nothing."""
    generator = torch.Generator().manual_seed(0)
    results = torch.randint(4, (600, 2), generator=generator)
    directions = torch.randn(4, 8, generator=generator)
    noise = 0.1 * torch.randn(600, 2, 8, generator=generator)
    states = noise.clone()
    states[:, 0] += directions[results[:, 0]]
    cfg = demo_thoughts.Config(probe_steps=100, batch_size=64)
    predict = demo_thoughts.train_probe(states[:400], results[:400], 4, cfg, generator)
    table = demo_thoughts.share_right(predict(states[400:]), results[400:])
    assert table[0][0] > 0.95
    for share in (table[0][1], table[1][0], table[1][1]):
        assert share < 0.45


def test_share_right_by_hand():
    predicted = torch.tensor([[[1, 2], [3, 4]], [[1, 0], [3, 0]]])  # (N, S, L)
    results = torch.tensor([[1, 4], [3, 0]])
    assert demo_thoughts.share_right(predicted, results) == [[0.5, 0.5], [0.5, 1.0]]


def test_diagonal_by_hand():
    table = [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]  # four thoughts and the last state
    assert demo_thoughts.diagonal(table, 1) == [1, 4]
    assert demo_thoughts.diagonal(table, 2) == [3, 8]


def test_exchange_against_reading_all_again():
    model = make_model("thoughts")
    question = make_problems().question
    n, Q = 3, question.size(1)
    plain = model.solve(question, n, 0).squeeze(1)
    assert (demo_thoughts.solve_with_exchange(model, question, n, 0) == plain).all()

    others = vectors_of(model, question.roll(-1, dims=0), n)[:, Q:]
    for exchanged in range(1, n + 1):
        x = model.wte(question)
        for i in range(1, n + 1):
            vector = model.read(x, GrowingCache())[:, -1:]
            if i == exchanged:
                vector = others[:, i - 1 : i]
            x = torch.cat([x, vector], dim=1)
        x = torch.cat([x, model.embed(ANSWER, len(question))], dim=1)
        expected = model.lm_head(model.read(x, GrowingCache())[:, -1]).argmax(dim=-1)
        actual = demo_thoughts.solve_with_exchange(model, question, n, exchanged)
        assert (actual == expected).all()

    # Among equal problems there is nothing to exchange.
    same = question[:1].expand(4, -1)
    for exchanged in range(n + 1):
        answers = demo_thoughts.solve_with_exchange(model, same, n, exchanged)
        assert (answers == plain[0]).all()


def test_answer_with_other_result_by_hand():
    problems = [["7-2=5", "5+5=10", "10*2=20"], ["3*2=6", "6-1=5"], ["9+1=10"]]
    problems = [parse_problem(equations) for equations in problems]
    words = ["30", "12", "15", "19"]
    for problem in problems:
        words += problem.words + problem.results
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *sorted(set(words))])}
    encoded = encode(problems, vocabulary, 3)
    word_of = {i: word for word, i in vocabulary.items()}
    found = []
    for step in (1, 2, 3):
        answers = demo_thoughts.answer_with_other_result(encoded, step, vocabulary)
        found.append([word_of.get(i) for i in answers.tolist()])
    # (6 + 5) * 2 = 22 is not in the vocabulary
    assert found == [[None, "9", "5"], ["10", "10", "10"], ["5", "10", "20"]]


# the scripts --------------------------------------------------------------------------------------


def run(script, *options):
    command = [sys.executable, str(FOLDER / script), "--device=cpu", *options]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def test_the_scripts(tmp_path):
    options = ["--steps=6", "--batch_size=8", "--n_embd=16", "--eval_every=3", "--per_step=2"]
    done = run("train_thoughts.py", f"--out={tmp_path}", "--seeds=2", *options)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "train_thoughts.json").read_text())
    assert list(metrics["results"]) == list(KINDS)
    for runs in metrics["results"].values():
        assert [list(run["right"]) for run in runs] == [["1", "2", "3", "4"]] * 2
    assert len((tmp_path / "train_thoughts.jsonl").read_text().splitlines()) == 6 * 5 * 2
    checkpoint = load_checkpoint(tmp_path / "thoughts.pt", "thoughts")
    assert sorted(checkpoint["models"]) == [0, 1]

    options = [f"--out={tmp_path}", f"--init={tmp_path / 'thoughts.pt'}", "--probe_steps=2"]
    done = run("demo_thoughts.py", "--seeds=2", *options)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "demo_thoughts.json").read_text())
    for runs in metrics["tables"].values():
        assert torch.tensor(runs).shape == (2, 9, 4)
    assert torch.tensor(metrics["exchanges"]).shape == (2, 9, 2)
    for name in ("train_thoughts", "demo_thoughts", "demo_thoughts_exchange"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    # A seed that was not trained is one line.
    done = run("demo_thoughts.py", "--seed=7", *options)
    assert done.returncode == 2
    assert done.stderr == (
        "error: the checkpoint has no model 'thoughts' of seed 7: train it with this seed, and "
        "with all --kinds\n"
    )


@pytest.mark.parametrize(
    "checks, message",
    [
        ([None], 'my.jsonl record 1: "check" has no "steps"'),
        ([{"steps": ["7-2=5"]}, {"number": "3"}], 'my.jsonl record 2: "check" has no "steps"'),
        ([{"steps": ["7-2=5", "6+1=7"]}], "a step must begin with the result of the one before"),
        ([{"steps": ["7-2=5"]}], "both need at least 1"),
        ([{"steps": ["7-2"]}], "\"check\" 'steps' must be a list of equations"),
    ],
)
def test_bad_problems_end_in_one_line(checks, message, tmp_path, capsys):
    path = tmp_path / "my.jsonl"
    records = [{"check": check} if check else {} for check in checks]
    path.write_text("\n".join(json.dumps(record) for record in records))
    with pytest.raises(SystemExit) as end:
        train_thoughts.load_data(Config(data=str(path)))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_problems_of_the_users_own(tmp_path):
    path = tmp_path / "my.jsonl"
    lines = []
    for a in range(100, 160):
        steps = [f"{a} + 5 = {a + 5}", f"{a + 5} - 3 = {a + 2}"]
        lines.append(json.dumps({"check": {"steps": steps}}))
    path.write_text("\n".join(lines))
    data = train_thoughts.load_data(Config(data=str(path)))
    assert data.train.results.shape[1] == 2
    assert len(data.train.level) + len(data.val.level) == 60
    assert "-3" in data.vocabulary


@pytest.mark.parametrize(
    "module, option, message",
    [
        (train_thoughts, "--kinds=steps,words", "kinds=steps,words must be some of at_once,"),
        (train_thoughts, "--n_embd=20", "n_embd=20 must be divisible by 2 * n_head = 8"),
        (train_thoughts, "--per_step=0", "per_step=0 must be at least 1"),
        (train_thoughts, "--longest=0", "longest=0 must be at least 1"),
        (train_thoughts, "--curriculum=2", "wants true or false"),
        (demo_thoughts, "--probe_steps=0", "probe_steps=0 must be at least 1"),
        (demo_thoughts, "--seeds=0", "seeds=0 must be at least 1"),
    ],
)
def test_bad_options_end_in_one_line(module, option, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(module.Config, argv=[option])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_kind(tmp_path, capsys):
    save_checkpoint(tmp_path / "base.pt", kind="base")
    with pytest.raises(SystemExit) as end:
        demo_thoughts.find_checkpoint(demo_thoughts.Config(init=str(tmp_path / "base.pt")))
    assert end.value.code == 2
    assert "is a 'base' checkpoint, expected 'thoughts'" in capsys.readouterr().err
