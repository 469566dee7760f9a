"""
Tests of speculative.py. The oracles are the paper's numbers, exact probabilities of all texts that
a tiny model can write, plain decoding without a cache, and examples by hand.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import compression
import speculative
from model import GPT, GPTConfig, sample
from shared import parse_args, save_checkpoint
from speculative import (
    Config,
    LookupDraft,
    ModelDraft,
    check,
    expected_speedup,
    expected_tokens,
    look_up,
    make_cache,
    mark_guesses,
    probabilities,
    read,
    residual,
    write,
)
from tokenizer import SPECIAL, Tokenizer

FOLDER = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
V = 3


def make_model(seed, vocab_size=V, n_layer=1, scale=0.6, block_size=32, n_embd=8):
    """A small model in float64 with random weights. Those of a new model have zeros, which would
    hide what stands before them."""
    cfg = GPTConfig(vocab_size, block_size, n_layer, n_head=2, n_kv_head=1, n_embd=n_embd)
    model = GPT(cfg).double()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim == 2:
            p.data = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


def make_draft(kind, vocab_size=V):
    if kind == "lookup":
        return LookupDraft(vocab_size, 2)
    return ModelDraft(make_model(7, vocab_size))


def chi_squared(counts, expected):
    """Pearson's statistic. With n outcomes it is n - 1 on average, give or take sqrt(2 (n - 1))."""
    return ((counts - expected).square() / expected).sum().item()


def too_large(n):
    """A statistic that chance exceeds in fewer than one of 10,000 cases."""
    freedom = n - 1
    return freedom + 5 * (2 * freedom) ** 0.5


# the mathematics ----------------------------------------------------------------------------------


def test_probabilities_by_hand():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert probabilities(logits, 0).tolist() == [[0, 1, 0]]
    expected = torch.tensor([[1.0, 2.718281828, 1.648721271]])  # e^(x / 2)
    torch.testing.assert_close(probabilities(logits, 2.0), expected / expected.sum())


def test_residual_by_hand():
    p = torch.tensor([0.5, 0.3, 0.2])
    q = torch.tensor([0.2, 0.7, 0.1])
    torch.testing.assert_close(residual(p, q), torch.tensor([0.75, 0.0, 0.25]))
    torch.testing.assert_close(residual(p, p), p)


@pytest.mark.parametrize("seed", range(3))
def test_accepted_and_replaced_guesses_together_are_the_target(seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.rand(2, 20, generator=generator, dtype=torch.float64).softmax(dim=-1)
    accepted = torch.minimum(p, q)
    together = accepted + (1 - accepted.sum()) * residual(p, q)
    torch.testing.assert_close(together, p)


def count_check(p, q, n):
    """What check makes of n guesses from q -> counts of the first token (V,), share accepted."""
    counts = torch.zeros(len(p), dtype=torch.float64)
    n_accepted = 0
    two_places = torch.stack([p, p])
    for guess in torch.multinomial(q, n, replacement=True).tolist():
        checked = check([guess], q[None], two_places)
        first = guess if checked.n_accepted == 1 else checked.token
        counts[first] += 1
        n_accepted += checked.n_accepted
    return counts, n_accepted / n


def test_check_by_counting(monkeypatch):
    torch.manual_seed(0)
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    n = 4000
    counts, accepted = count_check(p, q, n)
    assert chi_squared(counts, n * p) < too_large(4)
    assert accepted == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.03)

    # The same count finds the mistake of drawing the replacement from p itself.
    monkeypatch.setattr(speculative, "residual", lambda p, q: p)
    counts, _ = count_check(p, q, n)
    assert chi_squared(counts, n * p) > 5 * too_large(4)


def test_check_stops_at_the_first_rejection_and_gives_a_token_for_free():
    certain = torch.eye(4, dtype=torch.float64)
    q = certain[[1, 2, 3]]
    assert check([1, 2, 3], q, certain[[1, 2, 3, 0]]) == (3, 0)
    assert check([1, 2, 3], q, certain[[1, 0, 3, 0]]) == (1, 0)
    assert check([1, 2, 3], q, certain[[2, 2, 3, 0]]) == (0, 2)


def test_the_papers_table_1():
    """Leviathan et al. 2022, table 1: alpha, gamma, speed with a draft that costs nothing."""
    table = [(0.6, 2, 1.96), (0.7, 3, 2.53), (0.8, 2, 2.44), (0.8, 5, 3.69), (0.9, 10, 6.86)]
    for alpha, k, speed in table:
        assert expected_speedup(alpha, k, 0) == pytest.approx(speed, abs=0.005)
        assert expected_tokens(alpha, k) == pytest.approx(sum(alpha**i for i in range(k + 1)))
    assert expected_tokens(1, 4) == 5
    assert expected_tokens(0, 4) == 1
    assert expected_speedup(1, 4, 0.25) == pytest.approx(2.5)
    assert expected_speedup(1, 4, 0.25, 1.5) == pytest.approx(2)


# drafts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, ngram, k, expected",
    [
        ([1, 2, 3, 9, 1, 2], 2, 2, [3, 9]),
        ([1, 2, 3, 9, 1, 2], 2, 9, [3, 9, 1, 2]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 2, 1, [4]),  # the latest place counts
        ([1, 2, 3, 8, 2, 4, 1, 2], 2, 1, [3]),  # more tokens count more than a later place
        ([1, 2, 3, 8, 2, 4, 1, 2], 1, 1, [4]),
        ([1, 2, 3, 4], 2, 3, []),
        ([5, 5, 5], 2, 4, [5]),  # it may overlap with itself
        ([5], 2, 3, []),
        ([], 2, 3, []),
    ],
)
def test_look_up_by_hand(tokens, ngram, k, expected):
    assert look_up(tokens, ngram, k) == expected


def test_guesses_have_the_probabilities_of_the_draft():
    draft = make_draft("model")
    prompt = [0, 2, 1]
    draft.start(prompt, 20)
    drafted, q = draft.propose(prompt, 3, 0.7)
    assert q.shape == (3, V)
    logits, _ = draft.model(torch.tensor([prompt + drafted]))
    torch.testing.assert_close(q, (logits[0, 2:5] / 0.7).softmax(dim=-1))

    # After a rejection it goes on from another token as if nothing had happened.
    draft.roll_back(4)
    tokens = [*prompt, drafted[0], 2]
    drafted, q = draft.propose(tokens, 1, 0.7)
    logits, _ = draft.model(torch.tensor([tokens]))
    torch.testing.assert_close(q, (logits[0, -1:] / 0.7).softmax(dim=-1))


def test_read_in_pieces():
    model = make_model(0, vocab_size=9)
    tokens = [3, 1, 4, 1, 5, 2, 6]
    whole, _ = model(torch.tensor([tokens]))
    cache = make_cache(model, 7)
    assert cache.k.size(3) == 7
    torch.testing.assert_close(read(model, tokens[:4], cache), whole[0, 3:4])
    torch.testing.assert_close(read(model, tokens, cache, 3), whole[0, 4:])
    cache.length = 2
    torch.testing.assert_close(read(model, tokens[:5], cache, 2), whole[0, 3:5])


# decoding -----------------------------------------------------------------------------------------


def exact_distribution(model, prompt, n, temperature):
    """The probability of every text of n tokens, (V^n,), without a cache."""
    texts = torch.cartesian_prod(*[torch.arange(V)] * n).view(-1, n)
    idx = torch.cat([torch.tensor([prompt]).expand(len(texts), -1), texts], dim=1)
    logits, _ = model(idx)
    logp = (logits[:, len(prompt) - 1 : -1] / temperature).log_softmax(dim=-1)
    return logp.gather(2, texts[..., None]).sum(dim=(1, 2)).exp()


def count_texts(model, draft, prompt, n, k, temperature, repeats):
    """How often is each text of n tokens written? -> (V^n,)."""
    counts = torch.zeros(V**n, dtype=torch.float64)
    for _ in range(repeats):
        number = 0
        for token in write(model, draft, prompt, n, k, temperature).tokens:
            number = V * number + token
        counts[number] += 1
    return counts


@pytest.mark.parametrize("kind", ["model", "lookup"])
def test_the_distribution_is_that_of_plain_sampling(kind):
    torch.manual_seed(1)
    model = make_model(0)
    prompt = [0, 1, 2, 0, 1]
    n, temperature, repeats = 3, 1.3, 800
    expected = repeats * exact_distribution(model, prompt, n, temperature).detach()
    counts = count_texts(model, make_draft(kind), prompt, n, 2, temperature, repeats)
    assert chi_squared(counts, expected) < too_large(V**n)


def always_accept(drafted, q, p):
    return speculative.Checked(len(drafted), speculative.draw_token(p[-1]))


@pytest.mark.parametrize("name, wrong", [("residual", lambda p, q: p), ("check", always_accept)])
def test_the_count_finds_a_wrong_rule(name, wrong, monkeypatch):
    monkeypatch.setattr(speculative, name, wrong)
    torch.manual_seed(1)
    model = make_model(0)
    prompt = [0, 1, 2, 0, 1]
    expected = 400 * exact_distribution(model, prompt, 3, 1.3).detach()
    counts = count_texts(model, make_draft("model"), prompt, 3, 2, 1.3, 400)
    assert chi_squared(counts, expected) > 1.5 * too_large(27)


def plain_greedy(model, prompt, n):
    """The likeliest token, n times, without a cache."""
    tokens = list(prompt)
    for _ in range(n):
        logits, _ = model(torch.tensor([tokens]))
        tokens.append(sample(logits[:, -1], temperature=0).item())
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ["model", "lookup"])
@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_greedy_text_is_that_of_plain_decoding(kind, k):
    for seed in range(3):
        model = make_model(seed, vocab_size=6, n_layer=2)
        prompt = [5, seed, 2]
        written = write(model, make_draft(kind, 6), prompt, 20, k, 0)
        assert written.tokens == plain_greedy(model, prompt, 20)
        assert len(written.guessed) == 20
        if k == 0:
            assert written.passes == 20
            assert written.n_checked == 0


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_accepts_its_own_guesses(temperature):
    model = make_model(0, vocab_size=6)
    written = write(model, ModelDraft(model), [1], 20, 4, temperature)
    assert written.passes == 4  # five tokens each
    assert written.n_accepted == written.n_checked == 16
    assert written.guessed == [True, True, True, True, False] * 4


def test_what_is_counted():
    """Each pass chooses one token itself. A pass in which a guess was rejected has checked one
    guess more than it accepted."""
    torch.manual_seed(0)
    model = make_model(0, vocab_size=6)
    written = write(model, make_draft("model", 6), [1], 30, 3, 1.0)
    assert len(written.tokens) == written.passes + written.n_accepted == 30
    assert sum(written.guessed) == written.n_accepted
    rejected = written.n_checked - written.n_accepted
    assert 0 < rejected < written.passes


@pytest.mark.parametrize("k", [0, 4])
def test_a_text_never_outgrows_its_limits(k):
    model = make_model(0, vocab_size=6, block_size=16)
    draft = make_draft("model", 6)
    for n in (1, 2, 3, 7):
        assert len(write(model, draft, [1, 2], n, k, 1.0).tokens) == n
    assert len(write(model, draft, [1, 2], 99, k, 1.0).tokens) == 14


@pytest.mark.parametrize("k", [0, 1, 4])
def test_a_text_ends_with_its_stop_token(k):
    model = make_model(0, vocab_size=6, n_layer=2)
    for draft in (make_draft("model", 6), ModelDraft(model)):
        all_tokens = plain_greedy(model, [1, 2], 20)
        stop = all_tokens[2]
        end = all_tokens.index(stop) + 1
        written = write(model, draft, [1, 2], 20, k, 0, stop)
        assert written.tokens == all_tokens[:end]
        assert len(written.guessed) == end


# measuring ----------------------------------------------------------------------------------------


def test_compare_counts_and_times(monkeypatch):
    model = make_model(0, vocab_size=6)
    ticks = iter(range(10**6))
    monkeypatch.setattr(speculative.time, "process_time", lambda: next(ticks))  # 1 s for each text
    speeds = speculative.compare(model, ModelDraft(model), [[1], [2, 3]], [1, 4], 10, 0, 2)
    assert [speed.k for speed in speeds] == [0, 1, 4]
    assert [speed.tokens_per_pass for speed in speeds] == [1, 2, 5]
    assert [speed.acceptance for speed in speeds[1:]] == [1, 1]
    assert [speed.tokens_per_second for speed in speeds] == [10, 10, 10]
    assert [speed.speedup for speed in speeds] == [1, 1, 1]
    assert [speed.same for speed in speeds] == [1, 1, 1]


def test_costs(monkeypatch):
    """A clock that counts the tokens that the target and the draft read. A guess reads 1 token of a
    model that costs 3, and a check of k guesses reads k + 1 tokens."""
    model = make_model(0, vocab_size=6)
    draft = ModelDraft(make_model(1, vocab_size=6))
    clock = [0.0]

    def counting(module, inputs):
        clock[0] += inputs[0].numel() * (3 if module is draft.model.wte else 1)

    model.wte.register_forward_pre_hook(counting)
    draft.model.wte.register_forward_pre_hook(counting)
    monkeypatch.setattr(speculative.time, "process_time", lambda: clock[0])
    costs = speculative.measure_costs(model, draft, 10, [1, 4], 1.0, repeats=3)
    assert costs == (1, 3, {1: 2, 4: 5})


def test_speedup_is_plain_seconds_by_seconds(monkeypatch):
    plain = speculative.Written([1, 2, 3, 4], [False] * 4, 4, 0, 0, seconds=8.0)
    fast = speculative.Written([1, 2], [True, False], 1, 2, 1, seconds=1.0)
    monkeypatch.setattr(speculative, "write", lambda *a: fast if a[4] == 3 else plain)
    speeds = speculative.compare(None, None, [[1]], [3], 4, 0, 1)
    assert speeds[1].speedup == 4  # two seconds per token against half a second
    assert speeds[1].acceptance == 0.5
    assert speeds[1].tokens_per_pass == 2
    assert speeds[1].same == 0


def test_guesses_are_marked():
    tok = make_tokenizer()
    written = speculative.Written(
        list(b"abcdef"), [False, True, True, False, True, True], 0, 0, 0, 0
    )
    assert mark_guesses(tok, written) == "a[bc]d[ef]"


# the script ---------------------------------------------------------------------------------------


def make_tokenizer(special=SPECIAL):
    return Tokenizer({bytes([i]): i for i in range(256)}, special)


def save_model(path, block_size=80, seed=0, tok=None):
    """A tiny model over bytes as a checkpoint -> its path."""
    tok = tok or make_tokenizer()
    model = make_model(seed, tok.vocab_size, block_size=block_size).float()
    save_checkpoint(path, kind="base", tokenizer=tok.state(), **model.to_checkpoint())
    return path


def run(*options):
    command = [sys.executable, str(FOLDER / "speculative.py"), "--device=cpu", *options]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def test_the_experiment_with_base(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(compression.MODELS, "base", save_model(tmp_path / "base.pt"))
    monkeypatch.setitem(speculative.DRAFTS, "distill", save_model(tmp_path / "draft.pt", seed=1))
    cfg = Config(k=2, prompts=2, repeats=1, max_new_tokens=10)
    base = speculative.try_base(cfg, torch.device("cpu"))
    assert [speed["k"] for speed in base["speeds"]] == [0, 1, 2]
    assert len(base["formula"]) == len(base["corrected"]) == 2
    title = speculative.finding({"base": base})
    speculative.draw(title, {"base": base}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "speed-up by the paper's formula" in capsys.readouterr().out


def test_the_script(tmp_path):
    path = save_model(tmp_path / "tiny.pt", block_size=1024)
    options = [f"--model={path}", "--max_new_tokens=6", "--k=4", "--repeats=1"]
    done = run(f"--out={tmp_path}", *options)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "speculative.json").read_text())["results"]
    for speeds in results["copying"]["tasks"].values():
        assert [speed["k"] for speed in speeds] == [0, 2, 4]
        assert [speed["same"] for speed in speeds] == [1, 1, 1]
    assert (tmp_path / "speculative.png").read_bytes().startswith(b"\x89PNG")

    done = run("--prompt=abcabcabc", f"--draft={path}", "--temperature=0", *options)
    assert done.returncode == 0, done.stderr
    assert "6 tokens in 2 passes, 4 of 4 checked guesses accepted" in done.stdout


@pytest.mark.parametrize(
    "option, message",
    [
        ("--k=0", "k=0 must be at least 1"),
        ("--ngram=0", "ngram=0 must be at least 1"),
        ("--prompts=0", "prompts=0 must be at least 1"),
        ("--temperature=-1", "temperature=-1.0 must not be negative"),
        ("--prompt=hello", "prompt=hello needs --model"),
        ("--draft=lookup", "draft=lookup needs --model"),
    ],
)
def test_bad_options_end_in_one_line(option, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(Config, argv=[option])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def fails_with(capsys, call, *arguments):
    with pytest.raises(SystemExit) as end:
        call(*arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_draft_with_another_tokenizer_and_a_long_prompt(tmp_path, capsys):
    other = make_tokenizer(["<|other|>", *SPECIAL[1:]])
    path = save_model(tmp_path / "other.pt", tok=other)
    cpu = torch.device("cpu")
    target = make_model(0, make_tokenizer().vocab_size, block_size=80)
    arguments = (target, make_tokenizer(), Config(), cpu)
    error = fails_with(capsys, speculative.load_draft, str(path), *arguments)
    assert "has another tokenizer than the model" in error

    path = save_model(tmp_path / "short.pt", block_size=40)
    error = fails_with(capsys, speculative.load_draft, str(path), *arguments)
    assert "reads 40 tokens, and the model 80: the draft must not be shorter" in error

    cfg = Config(model=str(save_model(tmp_path / "model.pt")), prompt="x" * 100)
    error = fails_with(capsys, speculative.answer_once, cfg, cpu)
    assert "a prompt of 102 tokens: this model accepts from 1 to 79" in error

    cfg = Config(model=str(tmp_path / "missing.pt"), prompt="x")
    assert "there is no" in fails_with(capsys, speculative.answer_once, cfg, cpu)
