"""
Tests of Part 6's model: targets that do not count, and the new generate. The oracles are the loss
written down token by token in float64, `slow_generate`, which answers one prompt at a time without
a cache, and Part 5's model.
"""

import importlib.util
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, sample
from shared import ROOT
from train_sft import collate, pad

END = 12
TINY = dict(vocab_size=13, block_size=24, n_layer=2, n_head=4, n_embd=16, n_kv_head=2, mlp_dim=12)


def make_model(std=0.3, **sizes):
    """A model with random parameters, and gains near 1. The projections of a new model are zero,
    and a zero would hide everything that stands before it."""
    model = GPT(GPTConfig(**{**TINY, **sizes}))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise = std * torch.randn(p.shape, generator=generator)
        is_gain = p.ndim == 1
        p.data = 1 + noise if is_gain else noise
    return model


def make_tokens(*shape):
    return torch.randint(END, shape, generator=torch.Generator().manual_seed(1))


def make_records(n=7, seed=0):
    """Prompts and answers of many lengths. Prompts hold the ids 0 to 9."""
    rng = random.Random(seed)
    records = []
    for _ in range(n):
        prompt = [rng.randrange(10) for _ in range(rng.randint(2, 9))]
        answer = [rng.randrange(END) for _ in range(rng.randint(0, 9))]
        records.append({"prompt_ids": prompt, "answer_ids": [*answer, END]})
    return records


def make_prompts():
    """12 prompts of 2 to 9 tokens -> a list of lists, and their lengths (12,)."""
    prompts = [record["prompt_ids"] for record in make_records(12, seed=3)]
    return prompts, torch.tensor([len(prompt) for prompt in prompts])


def assert_near(actual, expected):
    """Equal up to rounding, which grows with the size of the numbers."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * scale)


# the loss -----------------------------------------------------------------------------------------


def answer_nats(model, record):
    """-log p of each answer token, for one record alone, in float64."""
    prompt = record["prompt_ids"]
    ids = prompt + record["answer_ids"]
    logits, _ = model(torch.tensor([ids[:-1]]))
    logp = logits[0].double().log_softmax(dim=-1)
    nats = []
    for t in range(len(prompt), len(ids)):
        nats.append(-logp[t - 1, ids[t]].item())
    return nats


def test_the_loss_is_the_mean_over_all_answer_tokens():
    """It is not the mean of the rows' means, which differs when lengths differ."""
    model = make_model()
    records = make_records()
    rows = [answer_nats(model, record) for record in records]
    mean = sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    mean_of_means = sum(sum(row) / len(row) for row in rows) / len(rows)

    _, loss = model(*collate(records))
    assert loss.item() == pytest.approx(mean, rel=1e-5)
    assert abs(mean - mean_of_means) > 1e-3


def test_padding_on_the_right_changes_nothing():
    model = make_model()
    x, y = collate(make_records())
    logits, loss = model(x, y)
    wide_x = torch.cat([x, make_tokens(7, 4)], dim=1)
    wide_y = F.pad(y, (0, 4), value=-100)
    wide_logits, wide_loss = model(wide_x, wide_y)
    assert_near(wide_logits[:, : x.size(1)], logits)
    assert wide_loss.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"n_expert": 3}, {"tied": True}, {"qk_norm": False}])
def test_without_ignored_targets_it_is_part_5(sizes):
    spec = importlib.util.spec_from_file_location("part_5_model", ROOT / "part_5/model.py")
    part_5 = importlib.util.module_from_spec(spec)
    sys.modules["part_5_model"] = part_5  # dataclasses look their module up
    spec.loader.exec_module(part_5)
    this = make_model(**sizes)
    before = part_5.GPT(part_5.GPTConfig(**TINY, **sizes))
    assert list(this.state_dict()) == list(before.state_dict())
    before.load_state_dict(this.state_dict())

    idx = make_tokens(2, 16)
    logits, loss = this(idx, idx)
    logits_before, loss_before = before(idx, idx)
    assert torch.equal(logits, logits_before)
    assert_near(loss, loss_before)
    generated = this.generate(idx, 8, temperature=0)
    assert torch.equal(generated, before.generate(idx, 8, temperature=0))


def test_causality():
    model = make_model()
    idx = make_tokens(1, 16)
    before, _ = model(idx)
    for t in range(16):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 1) % END
        after, _ = model(changed)
        moved = (after - before).abs().amax(dim=-1)[0] > 1e-6 * before.abs().max()
        assert torch.equal(moved, torch.arange(16) >= t), f"position {t}"


def test_gradients_come_from_the_answers_alone():
    model = make_model()
    x, y = collate(make_records())
    kept = []

    def keep(module, inputs, logits):
        logits.retain_grad()
        kept.append(logits)

    model.lm_head.register_forward_hook(keep)
    _, loss = model(x, y)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name

    # A position gets a gradient if and only if the next token belongs to an answer.
    has_gradient = kept[0].grad.abs().sum(dim=-1) > 0
    assert torch.equal(has_gradient, y != -100)

    # An embedding gets one if and only if its token is read before some answer token is predicted.
    is_read = (y != -100).flip(1).cumsum(dim=1).flip(1) > 0
    was_read = torch.zeros(13, dtype=torch.bool)
    was_read[x[is_read]] = True
    assert not was_read.all()
    assert torch.equal(model.wte.weight.grad.abs().sum(dim=1) > 0, was_read)


def test_the_loss_is_in_fp32_under_autocast():
    model = make_model(std=0.1)
    batch = collate(make_records())
    _, exact = model(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, rough = model(*batch)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=2e-2)


# sample -------------------------------------------------------------------------------------------


def test_sample_draws_one_uniform_number_per_row():
    """The first token at which the cumulative probability exceeds it."""
    logits = torch.randn(50, 13, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    drawn = sample(logits, temperature=0.7)
    torch.manual_seed(7)
    uniform = torch.rand(50, 1)[:, 0].tolist()
    for row, u, token in zip(logits.double(), uniform, drawn.tolist()):
        p = (row / 0.7).softmax(dim=-1)
        assert p[:token].sum() <= u + 1e-6
        assert u - 1e-6 < p[: token + 1].sum()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_sample_never_draws_a_token_of_probability_zero(monkeypatch, uniform):
    """Also when the random number is the smallest or the largest that there is."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, uniform))
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.5, 0.0], [0.0, 1.0, 9.0, 8.5, 1.0]])
    drawn = sample(logits, top_k=2)
    expected = [1, 2] if uniform == 0 else [3, 3]
    assert drawn.tolist() == expected


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"top_k": 2}, [0, 5 / 9, 4 / 9, 0]),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 0.8}, [0, 5 / 9, 4 / 9, 0]),
        ({"top_p": 0.95}, [0.07 / 0.97, 0.5 / 0.97, 0.4 / 0.97, 0]),
        ({"temperature": 2.0}, [0.1528, 0.4085, 0.3653, 0.1000]),
        ({"temperature": 0}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_sample_follows_its_options(options, expected):
    """Frequencies of 20,000 draws from [.07, .5, .4, .03], within 4 standard errors."""
    torch.manual_seed(0)
    logits = torch.tensor([0.07, 0.5, 0.4, 0.03]).log().expand(20000, 4)
    share = sample(logits, **options).bincount(minlength=4) / 20000
    for actual, p in zip(share.tolist(), expected):
        assert abs(actual - p) <= 4 * (p * (1 - p) / 20000) ** 0.5 + 1e-4


# generate -----------------------------------------------------------------------------------------


def slow_generate(model, prompt, max_new_tokens, stop):
    """Greedy, one row, no cache, no padding -> the new tokens."""
    answer = []
    while len(answer) < max_new_tokens and len(prompt) + len(answer) < model.cfg.block_size:
        logits, _ = model(torch.tensor([prompt + answer]))
        answer.append(logits[0, -1].argmax().item())
        if answer[-1] == stop:
            break
    return answer


@pytest.mark.parametrize(
    "sizes",
    [{}, {"n_expert": 4}, {"n_kv_head": 1}, {"qk_norm": False}, {"block_size": 14}],
    ids=str,
)
def test_rows_of_a_batch_are_each_row_alone(sizes):
    model = make_model(**{"block_size": 32, **sizes})
    prompts, lengths = make_prompts()
    stop = slow_generate(model, prompts[0], 12, stop=-1)[3]  # a token that the model likes to write
    expected = [slow_generate(model, prompt, 12, stop) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 2, "some rows must stop early"
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, expected))

    # What the padding is made of must not matter, not even if it is the stop token.
    for padding in (stop, 0):
        idx = pad(prompts, padding)
        out = model.generate(idx, 12, temperature=0, lengths=lengths, stop=stop)
        assert out.size(1) == max(width, idx.size(1)), "it must end with the last row"
        for row, prompt, answer in zip(out.tolist(), prompts, expected):
            length = len(prompt) + len(answer)
            assert row[:length] == prompt + answer
            assert set(row[length:]) <= {stop, padding}, "nothing is written after the stop token"


def test_without_a_stop_token_rows_grow_by_as_many_tokens_each():
    model = make_model(block_size=32)
    prompts, lengths = make_prompts()
    out = model.generate(pad(prompts, 0), 12, temperature=0, lengths=lengths)
    for row, prompt in zip(out.tolist(), prompts):
        answer = slow_generate(model, prompt, 12, stop=-1)
        assert len(answer) == 12
        assert row[: len(prompt) + 12] == prompt + answer


def test_no_row_grows_beyond_the_context():
    model = make_model(block_size=10)
    prompts, lengths = make_prompts()
    out = model.generate(pad(prompts, 0), 100, temperature=0, lengths=lengths)
    assert out.shape == (12, 10)
    for row, prompt in zip(out.tolist(), prompts):
        assert row == prompt + slow_generate(model, prompt, 100, stop=-1)

    full = make_tokens(2, 10)
    assert torch.equal(model.generate(full, 5), full), "a full context leaves no room"
    with pytest.raises(AssertionError, match="11 tokens do not fit in block_size=10"):
        model.generate(make_tokens(2, 11), 1)


def test_no_new_tokens():
    model = make_model()
    prompts, lengths = make_prompts()
    idx = pad(prompts, 0)
    assert torch.equal(model.generate(idx, 0, lengths=lengths), idx)


def test_generate_reads_each_token_once():
    """With the cache, the prompt is one chunk and then every pass reads one token."""
    model = make_model()
    widths = []
    model.wte.register_forward_hook(lambda module, inputs, output: widths.append(output.size(1)))
    model.generate(make_tokens(2, 5), 6)
    assert widths == [5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_logp_is_what_a_forward_pass_says(temperature):
    """At the temperature of the sampling (greedy: 1). It is NaN in the prompt and after the end."""
    torch.manual_seed(0)
    model = make_model()
    prompts, lengths = make_prompts()
    idx = pad(prompts, END)
    ids, logp = model.generate(idx, 10, temperature, lengths=lengths, stop=END, return_logp=True)
    assert logp.shape == ids.shape
    logits, _ = model(ids[:, :-1])
    scores = (logits / (temperature or 1)).log_softmax(dim=-1)
    scores = scores.gather(2, ids[:, 1:, None]).squeeze(2)  # (12, T - 1), of the tokens 1 to T - 1

    ended = 0
    for b, start in enumerate(lengths.tolist()):
        answer = ids[b, start : start + 10].tolist()
        if END in answer:
            answer = answer[: answer.index(END) + 1]
            ended += 1
        stop = start + len(answer)
        assert logp[b, :start].isnan().all()
        assert logp[b, stop:].isnan().all()
        assert_near(logp[b, start:stop], scores[b, start - 1 : stop - 1])
    if temperature > 0:
        assert 0 < ended < 12, "the test needs rows that end and rows that do not"


def test_generated_tokens_follow_the_models_distribution():
    """Frequencies of the first token after two prompts of different lengths, 2,000 rows each,
    within 4 standard errors."""
    torch.manual_seed(1)
    model = make_model()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    idx = pad(prompts * 2000, 0)
    lengths = torch.tensor([3, 5] * 2000)
    out = model.generate(idx, 1, lengths=lengths)
    for i, prompt in enumerate(prompts):
        logits, _ = model(torch.tensor([prompt]))
        p = logits[0, -1].softmax(dim=-1)
        share = out[i::2, len(prompt)].bincount(minlength=13) / 2000
        standard_error = (p * (1 - p) / 2000).sqrt()
        assert ((share - p).abs() < 4 * standard_error + 1e-3).all()


def test_a_checkpoint_comes_back():
    model = make_model(n_expert=3)
    loaded = GPT.load(model.to_checkpoint())
    assert loaded.cfg == model.cfg
    idx = make_tokens(2, 8)
    assert torch.equal(loaded(idx)[0], model(idx)[0])
