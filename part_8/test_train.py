"""
Tests of train_reinforce.py and train_ppo.py. The oracles are slow: loops over tokens in float64,
rollouts recomputed one row at a time, an enumeration of all answers of a tiny policy, and
arithmetic by hand. The scripts run on tiny checkpoints and a data set that are made here.
"""

import functools
import itertools
import json
import math
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import shared
import train_ppo
import train_reinforce
from model import GPT, ActorCritic, GPTConfig, RewardModel
from shared import ROOT, load_checkpoint, save_checkpoint
from tokenizer import Tokenizer
from train_ppo import Config, gae, make_optimizer, next_kl_coef, ppo_loss, value_loss, whiten
from train_reinforce import reinforce_loss, returns_to_go

HERE = Path(__file__).resolve().parent
END = 12
CONFIG = GPTConfig(vocab_size=13, block_size=24, n_layer=2, n_head=4, n_embd=16, mlp_dim=12)
TOK = Tokenizer({bytes([i]): i for i in range(256)})
STUB_TOK = SimpleNamespace(end=END, decode=str)  # for the vocabulary of 13

# The two scripts share their data, rollout, scoring and evaluation.
both_scripts = pytest.mark.parametrize(
    "script", [train_reinforce, train_ppo], ids=["reinforce", "ppo"]
)


def randomised(model, seed=0, std=0.2):
    """The model with random parameters, and gains near 1. The projections of a new model are zero,
    and a zero would hide everything that stands before it."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = std * torch.randn(p.shape, generator=generator)
        is_gain = p.ndim == 1 and p.data.mean() > 0.5
        p.data = 1 + noise if is_gain else noise
    return model


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ragged(lengths, T):
    """A (B, T) mask. The answer of row b starts at index b and has lengths[b] tokens."""
    mask = torch.zeros(len(lengths), T, dtype=torch.bool)
    for b, length in enumerate(lengths):
        mask[b, b : b + length] = True
    return mask


def assert_near(actual, expected, rtol=1e-4):
    """Equal up to rounding, which grows with the size of the numbers."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-5 * scale)


MASK = ragged([1, 8, 3, 5], T=12)


# the mathematics ----------------------------------------------------------------------------------


@both_scripts
def test_log_probabilities_of_the_sampled_tokens(script):
    logits = normal(2, 5, 13)
    ids = torch.randint(13, (2, 5), generator=torch.Generator().manual_seed(1))
    logp = script.gather_logp(logits.log_softmax(dim=-1), ids)
    for b, t in itertools.product(range(2), range(5)):
        total = sum(math.exp(logit) for logit in logits[b, t].tolist())
        expected = math.log(math.exp(logits[b, t, ids[b, t]].item()) / total)
        assert logp[b, t].item() == pytest.approx(expected, rel=1e-5)


@both_scripts
def test_masked_mean(script):
    x = normal(4, 12)
    assert script.masked_mean(x, MASK).item() == pytest.approx(x[MASK].mean().item(), rel=1e-5)


@both_scripts
def test_rewards_are_the_cost_of_kl_and_the_score_at_the_end(script):
    kl = normal(4, 12, seed=2)
    score = normal(4, seed=3)
    rewards = script.shape_rewards(kl, score, MASK, beta=0.5)
    expected = torch.zeros(4, 12)
    for b in range(4):
        positions = MASK[b].nonzero()[:, 0].tolist()
        for t in positions:
            expected[b, t] = -0.5 * kl[b, t]
        expected[b, positions[-1]] += score[b]
    assert_near(rewards, expected)


def test_returns_to_go_against_a_loop():
    rewards = normal(4, 12) * MASK
    returns = returns_to_go(rewards, MASK)
    for b, t in itertools.product(range(4), range(12)):
        expected = rewards[b, t:].double().sum().item() if MASK[b, t] else 0.0
        assert returns[b, t].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_reinforce_loss_by_hand():
    logp = torch.tensor([[-1.0, -0.5]], requires_grad=True)
    loss = reinforce_loss(logp, torch.tensor([[2.0, -3.0]]))
    assert loss.tolist() == [[2.0, -1.5]]
    loss.sum().backward()
    assert logp.grad.tolist() == [[-2.0, 3.0]], "the gradient is minus the advantage"


def all_answers(vocab_size, end, longest, prompt):
    """A Rollout of every answer that can be given to one prompt, each of them once."""
    answers = []
    for length in range(1, longest + 1):
        for tokens in itertools.product(range(vocab_size), repeat=length):
            stops_early = end in tokens[:-1]
            is_complete = tokens[-1] == end or length == longest
            if is_complete and not stops_early:
                answers.append(list(tokens))

    T = len(prompt) + longest - 1
    ids = torch.zeros(len(answers), T + 1, dtype=torch.long)
    mask = torch.zeros(len(answers), T, dtype=torch.bool)
    for b, answer in enumerate(answers):
        row = prompt + answer
        ids[b, : len(row)] = torch.tensor(row)
        mask[b, len(prompt) - 1 : len(row) - 1] = True
    return train_reinforce.Rollout(
        ids=ids,
        starts=torch.full((len(answers),), len(prompt)),
        lengths=len(prompt) + mask.sum(dim=1),
        ended=torch.tensor([answer[-1] == end for answer in answers]),
        mask=mask,
        logp=torch.zeros(len(answers), T, dtype=torch.float64),
    )


@pytest.mark.parametrize("baseline", [0.0, 3.0])
def test_reinforce_has_the_gradient_of_the_expected_reward(baseline):
    """A policy with 3 tokens gives 15 answers of at most 3 tokens. The mean of REINFORCE's gradient
    over all of them, weighted by their probabilities, must be the gradient of
    -E[score - beta * KL], whatever the baseline."""
    sizes = dict(vocab_size=3, block_size=8, n_layer=1, n_head=2, n_kv_head=1, n_embd=8)
    policy = randomised(GPT(GPTConfig(**sizes)), seed=0, std=0.5).double()
    reference = randomised(GPT(GPTConfig(**sizes)), seed=1, std=0.5).double()
    batch = all_answers(vocab_size=3, end=2, longest=3, prompt=[0, 1])
    assert len(batch.ids) == 15
    score = normal(15).double()
    beta = 0.7

    logp = train_reinforce.answer_logp(policy, batch)  # (15, T)
    with torch.no_grad():
        reference_logp = train_reinforce.answer_logp(reference, batch)
    probability = logp.sum(dim=1).exp()  # (15,)
    assert probability.sum().item() == pytest.approx(1)

    # the truth: the expected reward, differentiated as a whole
    kl = (logp - reference_logp).sum(dim=1)
    expected_reward = (probability * (score - beta * kl)).sum()
    truth = torch.autograd.grad(-expected_reward, policy.parameters(), retain_graph=True)

    # REINFORCE: rewards and probabilities are constants
    sampled_kl = (logp - reference_logp).detach()
    rewards = train_reinforce.shape_rewards(sampled_kl, score, batch.mask, beta)
    advantages = (returns_to_go(rewards, batch.mask) - baseline) * batch.mask
    losses = reinforce_loss(logp, advantages).sum(dim=1)  # (15,)
    estimate = torch.autograd.grad((probability.detach() * losses).sum(), policy.parameters())

    # Parts of the model compute in fp32, whatever its dtype.
    largest = max(gradient.abs().max().item() for gradient in truth)
    assert largest > 0.1
    for actual, expected in zip(estimate, truth):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * largest)


def slow_gae(rewards, values, mask, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, as a double loop in float64."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for b in range(len(mask)):
        positions = mask[b].nonzero()[:, 0].tolist()
        answer_values = [values[b, t].item() for t in positions] + [0.0]
        deltas = []
        for i, t in enumerate(positions):
            deltas.append(rewards[b, t].item() + gamma * answer_values[i + 1] - answer_values[i])
        for i, t in enumerate(positions):
            for j in range(i, len(positions)):
                advantages[b, t] += (gamma * lam) ** (j - i) * deltas[j]
    return advantages


@pytest.mark.parametrize("gamma, lam", [(1, 0.95), (0.9, 0.7), (1, 1), (1, 0)])
def test_gae_against_a_double_loop(gamma, lam):
    rewards = normal(4, 12, seed=1)
    values = normal(4, 12, seed=2)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    assert_near(advantages, slow_gae(rewards, values, MASK, gamma, lam).float())
    assert_near(returns, (advantages + values) * MASK)

    # What stands in prompts and padding does not matter.
    other = gae(rewards.masked_fill(~MASK, 99.0), values.masked_fill(~MASK, 99.0), MASK, gamma, lam)
    assert torch.equal(other[0], advantages)
    assert torch.equal(other[1], returns)


def test_gae_with_lambda_1_is_the_return_minus_the_value():
    """Without a critic, this is REINFORCE."""
    rewards = normal(4, 12, seed=1) * MASK
    values = normal(4, 12, seed=2)
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    expected = returns_to_go(rewards, MASK)
    assert_near(returns, expected)
    assert_near(advantages, (expected - values) * MASK)


def test_whiten():
    x = 3 * normal(4, 12) + 7
    white = whiten(x, MASK)
    assert white[MASK].mean().abs() < 1e-6
    assert white[MASK].var(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert (white[~MASK] == 0).all()
    assert torch.equal(whiten(x.masked_fill(~MASK, -50.0), MASK), white)


def test_whiten_divides_by_the_biased_variance():
    """The example of Huang et al. (2023). There the mean is kept, and the first entry is .0508.
    With the unbiased variance it would be .1394."""
    x = torch.arange(1.2, 2.05, 0.1).view(3, 3)
    white = whiten(x, torch.ones(3, 3, dtype=torch.bool))
    assert (white + 1.6)[0, 0].item() == pytest.approx(0.0508, abs=1e-4)


@pytest.mark.parametrize(
    "ratio, advantage, expected, acts",
    [
        (1.5, 1, -1.2, True),
        (0.5, 1, -0.5, False),
        (1.5, -1, 1.5, False),
        (0.5, -1, 0.8, True),
        (1.1, 1, -1.1, False),
        (0.9, -1, 0.9, False),
    ],
)
def test_ppo_loss_by_hand(ratio, advantage, expected, acts):
    """The clip is 0.2. It acts where the ratio has left [0.8, 1.2] in the direction that the
    advantage asks for, and there the gradient is zero."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    advantages = torch.tensor([[float(advantage)]])
    loss, clipped = ppo_loss(logp, torch.zeros(1, 1), advantages, clip=0.2)
    assert loss.item() == pytest.approx(expected)
    assert clipped.tolist() == [[acts]]
    loss.sum().backward()
    slope = 0 if acts else -advantage * ratio
    assert logp.grad.item() == pytest.approx(slope)


def test_ppo_loss_against_a_loop():
    logp = 0.5 * normal(4, 12, seed=1)
    old_logp = 0.5 * normal(4, 12, seed=2)
    advantages = normal(4, 12, seed=3)
    losses, clipped = ppo_loss(logp, old_logp, advantages, clip=0.3)
    assert 0 < clipped.float().mean() < 1
    for b, t in itertools.product(range(4), range(12)):
        ratio = math.exp(logp[b, t].item() - old_logp[b, t].item())
        held = min(max(ratio, 0.7), 1.3)
        advantage = advantages[b, t].item()
        objective = min(ratio * advantage, held * advantage)
        assert losses[b, t].item() == pytest.approx(-objective, rel=1e-4)
        assert clipped[b, t].item() == (held * advantage < ratio * advantage)


def test_before_the_first_update_ppo_has_the_gradient_of_reinforce():
    advantages = normal(4, 12)
    gradients = []
    for name in ("ppo", "reinforce"):
        logp = normal(4, 12, seed=2).requires_grad_()
        if name == "ppo":
            losses, clipped = ppo_loss(logp, logp.detach(), advantages, clip=0.2)
            assert not clipped.any()
        else:
            losses = reinforce_loss(logp, advantages)
        losses.sum().backward()
        gradients.append(logp.grad)
    assert_near(gradients[0], gradients[1])


@pytest.mark.parametrize(
    "value, target, expected, slope",
    [(1.0, 0.0, 0.5, 1.0), (1.0, 1.0, 0.32, 0.0), (0.1, 1.0, 0.405, -0.9), (-1.0, -1.0, 0.32, 0.0)],
)
def test_value_loss_by_hand(value, target, expected, slope):
    """The clip is 0.2 and the old value 0. The larger of two errors counts: the value's, and that
    of the value held within 0.2 of the old one. The second has no gradient."""
    values = torch.tensor([[value]], requires_grad=True)
    loss = value_loss(values, torch.zeros(1, 1), torch.tensor([[target]]), clip=0.2)
    assert loss.item() == pytest.approx(expected)
    loss.sum().backward()
    assert values.grad.item() == pytest.approx(slope)


def test_value_loss_against_a_loop():
    values = normal(4, 12, seed=1)
    old_values = normal(4, 12, seed=2)
    returns = normal(4, 12, seed=3)
    losses = value_loss(values, old_values, returns, clip=0.5)
    for b, t in itertools.product(range(4), range(12)):
        value = values[b, t].item()
        old = old_values[b, t].item()
        target = returns[b, t].item()
        held = min(max(value, old - 0.5), old + 0.5)
        expected = 0.5 * max((value - target) ** 2, (held - target) ** 2)
        assert losses[b, t].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "kl, error", [(6, 0), (6.6, 0.1), (12, 0.2), (600, 0.2), (5.4, -0.1), (0, -0.2)]
)
def test_adaptive_controller(kl, error):
    """The numbers of Ziegler et al. (2019): beta 0.15, target 6, horizon 10,000, and here 64
    answers at a time."""
    expected = 0.15 * (1 + error * 0.0064)
    assert next_kl_coef(0.15, kl, 6, 64, 10_000) == pytest.approx(expected, rel=1e-9)


# data ---------------------------------------------------------------------------------------------


def write_jsonl(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")


@both_scripts
def test_prompts_follow_the_chat_template(script):
    user = TOK.special["<|user|>"]
    assistant = TOK.special["<|assistant|>"]
    record = {"instruction": "füge an <|end|>", "input": ""}
    assert script.chat_prompt(record, TOK) == [user, *"füge an <|end|>".encode(), assistant]
    record["input"] = "é 🦊"
    expected = [user, *"füge an <|end|>\né 🦊".encode(), assistant]
    assert script.chat_prompt(record, TOK) == expected
    assert script.chat_prompt({"prompt": "é"}, TOK) == [user, *"é".encode(), assistant]


@both_scripts
def test_prompts_without_room_for_an_answer_are_left_out(script, capsys):
    """The prompts have 2 + 2 + 2 * 3 = 10 tokens and one more."""
    fits = {"instruction": "ab" + "é" * 3, "input": ""}
    too_long = {"instruction": "abc" + "é" * 3, "input": ""}
    kept = script.encode_records([too_long, fits], TOK, block_size=16, max_new_tokens=6)
    assert [record["instruction"] for record in kept] == [fits["instruction"]]
    assert kept[0]["prompt_ids"] == script.chat_prompt(fits, TOK)
    assert "1 of 2 prompts are longer than 10 tokens: left out" in capsys.readouterr().out


@both_scripts
def test_a_users_file_is_split_without_overlap(script, tmp_path):
    records = [{"instruction": f"é{i}", "input": ""} for i in range(20)]
    write_jsonl(tmp_path / "data.jsonl", records)
    train, val = script.load_data(script.Config(data=str(tmp_path / "data.jsonl")))
    assert train == records[:18]
    assert val == records[18:]


@both_scripts
def test_only_stories_are_trained_on(script, tmp_path, monkeypatch):
    for name in ("instructions", "instructions_val"):
        records = []
        for task in ("story", "count", "story"):
            records.append({"instruction": f"{name} {task}", "input": "", "task": task})
        write_jsonl(tmp_path / f"{name}.jsonl", records)
    monkeypatch.setattr(script, "require", lambda path: tmp_path)
    train, val = script.load_data(script.Config())
    assert [record["instruction"] for record in train] == ["instructions story"] * 2
    assert [record["instruction"] for record in val] == ["instructions_val story"] * 2


@both_scripts
def test_batches_go_round_and_round(script):
    cfg = script.Config(batch_size=4)
    records = list(range(10))
    batches = [script.get_batch(records, step, cfg) for step in range(3)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


# rollout and score --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    """A policy, a reference near it, and a reward model."""
    policy = randomised(ActorCritic(CONFIG), seed=0)
    reference = randomised(GPT(CONFIG), seed=0, std=0.17)
    rm = randomised(RewardModel(CONFIG), seed=2)
    return policy, reference, rm


def make_records(n):
    """Prompts of 2 to 7 tokens."""
    return [{"prompt_ids": [1 + i % 11] * (2 + i % 6)} for i in range(n)]


def roll(script, policy, n=16, **options):
    """n answers to n prompts -> the config and the Rollout. The draws are always the same."""
    torch.manual_seed(0)
    cfg = script.Config(**{"max_new_tokens": 8, "batch_size": n, **options})
    return cfg, script.rollout(policy, STUB_TOK, make_records(n), cfg, "cpu")


@torch.no_grad()
@both_scripts
def test_a_rollout_row_by_row(script, models):
    policy, reference, rm = models
    cfg, batch = roll(script, policy, missing_end=-3.0)
    reference_logp = script.answer_logp(reference, batch)
    raw_score = rm(batch.ids, batch.starts, batch.lengths)
    cfg.score_clip = raw_score[batch.ended].abs().median().item()
    score = script.score_answers(rm, batch, cfg)
    prompts = [record["prompt_ids"] for record in make_records(16)]

    seen = set()
    for b, ids in enumerate(batch.ids.tolist()):
        start = len(prompts[b])
        assert ids[:start] == prompts[b]
        assert batch.starts[b] == start

        # The answer goes to its first end token, or to the 8th token.
        end = start
        while ids[end] != END and end < start + 7:
            end += 1
        end += 1
        ended = ids[end - 1] == END
        assert batch.lengths[b] == end
        assert batch.ended[b] == ended
        expected_mask = list(range(start - 1, end - 1))
        assert batch.mask[b].nonzero()[:, 0].tolist() == expected_mask

        # The log-probabilities of the row alone; index t is about token t + 1.
        row = torch.tensor([ids[:end]])
        for model, actual in ((policy, batch.logp), (reference, reference_logp)):
            all_logp = model(row)[0][0].log_softmax(dim=-1)
            expected = torch.zeros(batch.mask.size(1))
            for t in expected_mask:
                expected[t] = all_logp[t, ids[t + 1]]
            assert_near(actual[b], expected)

        raw = rm(row, torch.tensor([start]), torch.tensor([end])).item()
        expected_score = min(max(raw, -cfg.score_clip), cfg.score_clip) if ended else -3.0
        assert score[b].item() == pytest.approx(expected_score, rel=1e-4, abs=1e-5)
        seen.add("ended" if ended else "cut off")
        if ended:
            seen.add("clipped" if abs(raw) > cfg.score_clip else "not clipped")
    assert seen == {"ended", "cut off", "clipped", "not clipped"}


@both_scripts
def test_the_policy_samples_at_temperature_1_from_the_whole_vocabulary(script, models):
    """The frequencies of the first tokens of 4,000 answers, within 4.5 standard errors."""
    policy = models[0]
    torch.manual_seed(0)
    cfg = script.Config(max_new_tokens=1)
    batch = script.rollout(policy, STUB_TOK, [{"prompt_ids": [3, 5]}] * 4000, cfg, "cpu")
    counts = torch.bincount(batch.ids[:, 2], minlength=13)
    probability = policy(torch.tensor([[3, 5]]))[0][0, -1].softmax(dim=-1)
    error = (probability * (1 - probability) / 4000).sqrt()
    assert ((counts / 4000 - probability).abs() < 4.5 * error).all()


@both_scripts
def test_answers_and_gold(script, models):
    _, batch = roll(script, models[0])
    answers = script.answers_of(batch, STUB_TOK)
    for b, answer in enumerate(answers):
        row = batch.ids[b, batch.starts[b] : batch.lengths[b]].tolist()
        assert answer.ended == (row[-1] == END)
        assert answer.ids == (row[:-1] if answer.ended else row)
        assert answer.text == str(answer.ids)

    record = {"check": {"answer": "7"}}
    answers = [script.Answer([], text, True) for text in ("7", "8", "7 ")]
    answers.append(script.Answer([], "7", False))
    assert script.gold_share([record] * 4, answers) == 0.5
    assert math.isnan(script.gold_share([record, {}], answers[:2]))


@torch.no_grad()
@both_scripts
def test_an_evaluation_is_over_all_records(script, models):
    """130 records are two batches. The exact KL is summed token by token in float64."""
    policy, reference, rm = models
    records = make_records(130)
    cfg = script.Config(max_new_tokens=3)
    torch.manual_seed(0)
    result = script.evaluate(policy, reference, rm, STUB_TOK, records, cfg, "cpu")
    assert math.isnan(result.gold)

    torch.manual_seed(0)
    answers = []
    score = 0.0
    kl = 0.0
    for part in (records[:128], records[128:]):
        batch = script.rollout(policy, STUB_TOK, part, cfg, "cpu")
        answers += script.answers_of(batch, STUB_TOK)
        score += script.score_answers(rm, batch, cfg).double().sum().item()
        p = policy(batch.ids[:, :-1])[0].double().softmax(dim=-1)
        q = reference(batch.ids[:, :-1])[0].double().softmax(dim=-1)
        token_kl = (p * (p / q).log()).sum(dim=-1)
        kl += token_kl[batch.mask].sum().item()
    assert result.answers == answers
    assert result.reward == pytest.approx(score / 130, rel=1e-4)
    assert result.kl == pytest.approx(kl / 130, rel=1e-3)
    assert result.kl > 0.01


@both_scripts
def test_the_kl_of_a_policy_with_itself_is_0(script, models):
    policy = models[0]
    _, batch = roll(script, policy)
    difference = batch.logp - script.answer_logp(policy, batch)
    assert difference.abs().max() < 1e-5 * batch.logp.abs().max()


# learn --------------------------------------------------------------------------------------------


def new_policy(script):
    kind = GPT if script is train_reinforce else ActorCritic
    return randomised(kind(CONFIG))


def update(script, policy, cfg, batch, optimizer=None):
    """One call of learn, with random advantages."""
    if optimizer is None:
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, eps=1e-5, weight_decay=0.0)
    advantages = normal(*batch.mask.shape) * batch.mask
    if script is train_reinforce:
        return script.learn(policy, optimizer, batch, advantages, cfg)
    with torch.no_grad():
        _, values = policy.act(batch.ids[:, :-1], batch.mask)
    returns = (advantages + values) * batch.mask
    generator = torch.Generator().manual_seed(0)
    return script.learn(policy, optimizer, batch, advantages, values, returns, cfg, generator)


@both_scripts
def test_the_first_ratio_is_1_unless_sampler_and_scorer_differ(script):
    policy = new_policy(script)
    cfg, batch = roll(script, policy)
    assert update(script, policy, cfg, batch)["first_ratio_error"] < 1e-4

    options = {} if script is train_reinforce else {"max_kl": 1e9}
    policy = new_policy(script)
    policy.generate = functools.partial(policy.generate, temperature=0.7)
    cfg, batch = roll(script, policy, **options)
    assert update(script, policy, cfg, batch)["first_ratio_error"] > 0.05

    policy = new_policy(script)
    cfg, batch = roll(script, policy, **options)
    batch.logp = batch.logp.roll(1, dims=1) * batch.mask
    assert update(script, policy, cfg, batch)["first_ratio_error"] > 0.05


@both_scripts
@pytest.mark.parametrize("grad_clip", [1e9, 0.01])
def test_one_update_is_one_step_along_the_gradient(script, grad_clip):
    """SGD with learning rate 1 subtracts the clipped gradient itself."""
    policy = new_policy(script)
    options = {"grad_clip": grad_clip}
    if script is train_ppo:
        options |= {"epochs": 1, "minibatches": 1, "vf_coef": 0.25}
    cfg, batch = roll(script, policy, **options)
    before = [p.detach().clone() for p in policy.parameters()]

    # the loss again, from the whole network's output
    logits = policy(batch.ids[:, :-1])[0]
    logp = logits.log_softmax(dim=-1).gather(2, batch.ids[:, 1:, None]).squeeze(-1)
    advantages = normal(*batch.mask.shape)
    ratio = (logp - logp.detach()).exp()
    loss = -(advantages * ratio)[batch.mask].mean()
    if script is train_ppo:
        values = policy.act(batch.ids[:, :-1], batch.mask)[1]
        returns = advantages + values.detach()
        loss = loss + 0.25 * 0.5 * ((values - returns) ** 2)[batch.mask].mean()
    gradients = torch.autograd.grad(loss, policy.parameters())
    norm = sum(gradient.square().sum() for gradient in gradients).sqrt()
    scale = min(1.0, grad_clip / norm.item())

    # a gradient of the past must not be added
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    update(script, policy, cfg, batch, torch.optim.SGD(policy.parameters(), lr=1.0))
    largest = scale * max(gradient.abs().max().item() for gradient in gradients)
    for p, old, gradient in zip(policy.parameters(), before, gradients):
        torch.testing.assert_close(
            p.detach() - old, -scale * gradient, rtol=1e-3, atol=2e-4 * largest + 1e-6
        )


@both_scripts
def test_the_numbers_of_the_log(script):
    policy = new_policy(script)
    options = {} if script is train_reinforce else {"epochs": 1, "minibatches": 1}
    cfg, batch = roll(script, policy, **options)
    p = policy(batch.ids[:, :-1])[0][batch.mask].double().softmax(dim=-1)
    entropy = -(p * p.log()).sum(dim=-1).mean().item()
    advantages = normal(*batch.mask.shape)
    stats = update(script, policy, cfg, batch)
    assert stats["entropy"] == pytest.approx(entropy, rel=1e-4)
    if script is train_reinforce:
        expected = -(batch.logp * advantages)[batch.mask].mean().item()
    else:
        expected = -advantages[batch.mask].mean().item()  # all ratios are 1
        assert stats["clip_fraction"] == 0
        assert stats["updates"] == 1
    assert stats["loss"] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_each_epoch_of_ppo_takes_each_answer_once_in_a_new_order():
    policy = new_policy(train_ppo)
    cfg, batch = roll(train_ppo, policy, epochs=3, minibatches=4, max_kl=1e9)
    all_rows = batch.ids[:, :-1].tolist()
    minibatches = []
    act = policy.act

    def spy(ids, mask):
        minibatches.append(ids.tolist())
        return act(ids, mask)

    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    with torch.no_grad():
        _, values = policy.act(batch.ids[:, :-1], batch.mask)
    policy.act = spy
    generator = torch.Generator().manual_seed(0)
    zeros = torch.zeros_like(values)
    stats = train_ppo.learn(policy, optimizer, batch, zeros, values, zeros, cfg, generator)

    assert stats["updates"] == len(minibatches) == 12
    assert [len(rows) for rows in minibatches] == [4] * 12
    epochs = []
    for first in (0, 4, 8):
        epochs.append(list(itertools.chain(*minibatches[first : first + 4])))
    for epoch in epochs:
        assert sorted(epoch) == sorted(all_rows)
    assert epochs[0] != epochs[1] != epochs[2]


def test_every_update_clips_around_the_values_of_the_rollout(monkeypatch):
    """Not around those of the critic as it is now, or else the clip would never act."""
    old_values = []
    value_loss = train_ppo.value_loss

    def spy(values, old, returns, clip):
        old_values.append(old)
        return value_loss(values, old, returns, clip)

    monkeypatch.setattr(train_ppo, "value_loss", spy)
    policy = new_policy(train_ppo)
    cfg, batch = roll(train_ppo, policy, epochs=2, minibatches=2, max_kl=1e9)
    with torch.no_grad():
        _, values = policy.act(batch.ids[:, :-1], batch.mask)
    update(train_ppo, policy, cfg, batch, torch.optim.AdamW(policy.parameters(), lr=0.01))
    assert len(old_values) == 4
    for epoch in (old_values[:2], old_values[2:]):
        assert sorted(torch.cat(epoch).tolist()) == sorted(values.tolist())


def test_max_kl_stops_the_updates():
    policy = new_policy(train_ppo)
    cfg, batch = roll(train_ppo, policy, epochs=3, minibatches=4, max_kl=0.05)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    stats = update(train_ppo, policy, cfg, batch, optimizer)
    assert stats["updates"] == 1, "the first step alone goes too far"
    assert stats["step_kl"] > 0.05


def test_the_clip_acts_once_the_policy_has_moved():
    policy = new_policy(train_ppo)
    cfg, batch = roll(train_ppo, policy, epochs=8, max_kl=1e9)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.02)
    assert update(train_ppo, policy, cfg, batch, optimizer)["clip_fraction"] > 0.05

    policy = new_policy(train_ppo)
    cfg, batch = roll(train_ppo, policy, epochs=8, max_kl=1e9, clip=1e6)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.02)
    stats = update(train_ppo, policy, cfg, batch, optimizer)
    assert stats["clip_fraction"] < 0.5, "with a huge clip only ratios near 0 could be clipped"


def test_the_critic_has_a_learning_rate_of_its_own():
    policy = ActorCritic(CONFIG)
    optimizer = make_optimizer(policy, Config(lr=0.25, lr_value=0.5))
    trunk, head = optimizer.param_groups
    assert [p.shape for p in head["params"]] == [policy.v_head.weight.shape]
    assert head["params"][0] is policy.v_head.weight
    assert len(trunk["params"]) == len(list(policy.parameters())) - 1
    assert (trunk["peak_lr"], head["peak_lr"]) == (0.25, 0.5)
    assert trunk["weight_decay"] == head["weight_decay"] == 0


@both_scripts
def test_it_learns_what_is_rewarded_and_then_says_it(script):
    """The reward is for "7, end". After training, greedy generation answers that."""
    torch.manual_seed(0)
    policy = GPT(CONFIG) if script is train_reinforce else ActorCritic(CONFIG)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3, eps=1e-5, weight_decay=0.0)
    options = {"max_new_tokens": 5, "missing_end": -1.0}
    if script is train_ppo:
        options["max_kl"] = 0.5
    cfg = script.Config(**options)
    records = [{"prompt_ids": [1 + i % 4] * (1 + i % 3)} for i in range(48)]
    generator = torch.Generator().manual_seed(0)

    def rm(ids, starts, lengths):
        starts_with_7 = ids.gather(1, starts[:, None])[:, 0] == 7
        too_long = lengths - starts - 2
        return starts_with_7.float() - 0.2 * too_long

    for _ in range(40 if script is train_ppo else 120):
        batch = script.rollout(policy, STUB_TOK, records, cfg, "cpu")
        score = script.score_answers(rm, batch, cfg)
        rewards = script.shape_rewards(torch.zeros_like(batch.logp), score, batch.mask, beta=0.0)
        if script is train_reinforce:
            returns = returns_to_go(rewards, batch.mask)
            baseline = script.masked_mean(returns, batch.mask)
            script.learn(policy, optimizer, batch, (returns - baseline) * batch.mask, cfg)
        else:
            with torch.no_grad():
                _, values = policy.act(batch.ids[:, :-1], batch.mask)
            advantages, returns = gae(rewards, values, batch.mask, 1.0, 0.95)
            advantages = whiten(advantages, batch.mask)
            script.learn(policy, optimizer, batch, advantages, values, returns, cfg, generator)

    policy.generate = functools.partial(policy.generate, temperature=0)
    batch = script.rollout(policy, STUB_TOK, records[:4], cfg, "cpu")
    for answer in script.answers_of(batch, STUB_TOK):
        assert (answer.text, answer.ended) == ("[7]", True)


# the scripts --------------------------------------------------------------------------------------
# They run in this process, because importing torch takes seconds and because a test can then look
# at what the models and the optimizers got.

SCRIPTS = ["train_reinforce", "train_ppo"]
N_TRAIN = 36
N_VAL = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An SFT model, a reward model, prompts, and the bad files that BAD_INPUT names."""
    folder = tmp_path_factory.mktemp("inputs")
    cfg = GPTConfig(vocab_size=TOK.vocab_size, block_size=40, n_layer=1, n_head=2, n_embd=16)
    sft = randomised(GPT(cfg), seed=0)
    sft.lm_head.weight.data[TOK.special["<|end|>"]] *= 4  # some answers end, others do not
    save_checkpoint(folder / "sft.pt", kind="sft", tokenizer=TOK.state(), **sft.to_checkpoint())

    rm = randomised(RewardModel(cfg, "last"), seed=1).to_checkpoint()
    head = {"head": "last", "bidirectional": False}
    save_checkpoint(folder / "rm.pt", kind="rm", tokenizer=TOK.state(), head=head, **rm)
    other = {**TOK.state(), "special": ["<|user|>", "<|assistant|>", "<|end|>", "<|other|>"]}
    save_checkpoint(folder / "other.pt", kind="rm", tokenizer=other, head=head, **rm)
    short = RewardModel(
        GPTConfig(vocab_size=260, block_size=20, n_layer=1, n_head=2, n_embd=16), "last"
    )
    save_checkpoint(
        folder / "short.pt", kind="rm", tokenizer=TOK.state(), head=head, **short.to_checkpoint()
    )
    (folder / "half.pt").write_bytes((folder / "sft.pt").read_bytes()[:9000])

    # Every prompt is different, so that a test can tell which were answered.
    records = []
    for i in range(N_TRAIN + N_VAL):
        record = {"instruction": f"é{i:02}", "input": "ß" if i % 2 else ""}
        records.append({**record, "check": {"must": ["e"]}})
    write_jsonl(folder / "data.jsonl", records)
    lines = (folder / "data.jsonl").read_text(encoding="utf-8").split("\n")
    (folder / "broken.jsonl").write_text("\n".join([*lines[:4], lines[4][:-5], *lines[5:]]))
    (folder / "field.jsonl").write_text("\n".join([*lines[:6], '{"instruction": "say it"}']))
    (folder / "one.jsonl").write_text(lines[0])
    (folder / "empty.jsonl").write_text("")
    return folder


def options(folder, out, *more):
    return [
        f"--data={folder}/data.jsonl",
        f"--init={folder}/sft.pt",
        f"--rm={folder}/rm.pt",
        f"--out={out}",
        "--steps=3",
        "--batch_size=8",
        "--max_new_tokens=6",
        "--prompts=3",
        "--device=cpu",
        *more,
    ]


@pytest.fixture
def run(monkeypatch, capsys):
    """run(name, options) -> the variables of the script when it ended, as attributes.

    The figure is drawn but not saved, which would take most of the time.
    """
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(shared, "save_figure", lambda fig, path: None)

    def run(name, argv):
        script = str(HERE / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [script, *argv])
        return SimpleNamespace(**runpy.run_path(script, run_name="__main__"))

    yield run
    signal.signal(signal.SIGINT, handler)


def read_log(out, name):
    file_name = "train_reinforce" if name == "train_reinforce" else "log"
    lines = (out / f"{file_name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_metrics(out, name):
    file_name = "train_reinforce" if name == "train_reinforce" else "metrics"
    return json.loads((out / f"{file_name}.json").read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_as_a_user_starts_it(name, folder, tmp_path):
    """In a process of its own, from another folder."""
    given = (folder / "sft.pt").read_bytes()
    argv = options(folder, tmp_path / "out", "--eval_every=2")
    command = [sys.executable, str(HERE / f"{name}.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    log = read_log(tmp_path / "out", name)
    assert [record["step"] for record in log] == [0, 1, 2]
    keys = "reward gold kl entropy length ended loss rollout_s score_s update_s"
    if name == "train_ppo":
        keys += " clip_fraction explained_variance beta step_kl updates"
    for record in log:
        assert set(keys.split()) <= set(record)
    assert [("val_gold" in record, "val_kl" in record) for record in log] == [
        (False, False),
        (True, True),
        (False, False),
    ]

    kind = "reinforce" if name == "train_reinforce" else "ppo"
    metrics = read_metrics(tmp_path / "out", name)
    assert {"sft_gold", f"{kind}_gold", "sft_reward", f"{kind}_reward", "kl"} <= set(metrics)
    assert metrics["first_ratio_error"] < 1e-4
    assert metrics["kl"] > 0
    assert "36 prompts, 3 held out" in done.stdout
    for record in log:
        assert math.isfinite(record["loss"])

    files = {path.name for path in (tmp_path / "out").iterdir()}
    log_name = "train_reinforce" if name == "train_reinforce" else "log"
    metrics_name = "train_reinforce" if name == "train_reinforce" else "metrics"
    expected = {f"{kind}.pt", f"{log_name}.jsonl", f"{metrics_name}.json", f"{name}.png"}
    assert files == expected
    assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "sft.pt").read_bytes() == given


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_checkpoint_is_the_trained_policy_and_the_metrics_are_its_own(
    name, folder, run, tmp_path
):
    kind = "reinforce" if name == "train_reinforce" else "ppo"
    result = run(name, options(folder, tmp_path, "--lr=0.01"))
    checkpoint = load_checkpoint(tmp_path / f"{kind}.pt", kind)
    weights = result.policy.state_dict()
    for key, tensor in checkpoint["weights"].items():
        assert torch.equal(tensor, weights[key])
    assert checkpoint["tokenizer"] == TOK.state()
    assert checkpoint["config"]["lr"] == 0.01

    # Only the policy has learned.
    sft = load_checkpoint(folder / "sft.pt", "sft")["weights"]
    for key, tensor in result.reference.state_dict().items():
        assert torch.equal(tensor, sft[key]), f"the reference has moved: {key}"
    for key, tensor in load_checkpoint(folder / "rm.pt", "rm")["weights"].items():
        assert torch.equal(tensor, result.rm.state_dict()[key]), f"the reward model moved: {key}"
    for key, tensor in sft.items():
        assert not torch.equal(tensor, weights[key]), f"the policy has not moved: {key}"

    # The KL that metrics.json states is that of the checkpoint on disk and the SFT model.
    policy = GPT.load(checkpoint)
    kl = 0.0
    for record, answer in zip(result.val, result.after.answers, strict=True):
        ids = record["prompt_ids"] + answer.ids
        if answer.ended:
            ids = [*ids, TOK.special["<|end|>"]]
        states = slice(len(record["prompt_ids"]) - 1, len(ids) - 1)
        row = torch.tensor([ids])
        with torch.no_grad():
            logp = policy(row)[0][0, states].log_softmax(dim=-1)
            reference_logp = result.reference(row)[0][0, states].log_softmax(dim=-1)
        kl += (logp.exp() * (logp - reference_logp)).sum().item() / len(result.val)
    metrics = read_metrics(tmp_path, name)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-3)
    assert metrics["kl"] > 1e-3
    assert metrics[f"{kind}_gold"] == result.after.gold
    assert metrics[f"{kind}_reward"] == result.after.reward
    assert metrics["sft_gold"] == result.before.gold


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_kl_of_the_log_is_measured_from_the_sft_model(name, folder, run, tmp_path):
    """At the first iteration the policy is the SFT model, later it is not. The sampled KL is also
    what the last rollout's rewards paid for."""
    result = run(name, options(folder, tmp_path, "--lr=0.01", "--steps=6"))
    log = read_log(tmp_path, name)
    assert abs(log[0]["kl"]) < 1e-4
    assert max(abs(record["kl"]) for record in log[2:]) > 1e-3

    beta = result.cfg.kl_coef if name == "train_reinforce" else log[-1]["beta"]
    batch = result.batch
    with torch.no_grad():
        reference_logp = result.answer_logp(GPT.load(result.sft), batch)
    kl = (batch.logp - reference_logp).sum(dim=1)
    expected = result.score - beta * kl
    assert_near(result.rewards.sum(dim=1), expected)
    assert log[-1]["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert log[-1]["reward"] == pytest.approx(result.score.mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_penalty_is_subtracted(name, folder, run, tmp_path):
    """A huge beta keeps the policy nearer to the SFT model than none."""
    kl = {}
    for beta in ("0", "20"):
        argv = options(folder, tmp_path / beta, "--lr=0.003", "--steps=12", f"--kl_coef={beta}")
        if name == "train_ppo":
            argv.append("--kl_target=0")
        run(name, argv)
        kl[beta] = read_metrics(tmp_path / beta, name)["kl"]
    assert kl["20"] < 0.5 * kl["0"]


def test_the_advantages_of_reinforce(folder, run, tmp_path):
    """The returns to go, less their mean over the tokens of all answers."""
    result = run("train_reinforce", options(folder, tmp_path))
    returns = returns_to_go(result.rewards, result.batch.mask)
    mean = returns[result.batch.mask].mean()
    assert_near(result.advantages, (returns - mean) * result.batch.mask)
    assert result.advantages.abs().max() > 0.1


def test_a_critic_of_zeros_explains_nothing(folder, run, tmp_path):
    run("train_ppo", options(folder, tmp_path))
    log = read_log(tmp_path, "train_ppo")
    assert log[0]["explained_variance"] == pytest.approx(0, abs=1e-5)


def test_the_critic_starts_as_the_reward_model_and_then_learns(folder, run, tmp_path):
    result = run("train_ppo", options(folder, tmp_path, "--critic=rm"))
    scorer = load_checkpoint(folder / "rm.pt", "rm")
    critic = dict(result.policy.critic.named_parameters())
    moved = {name for name, p in critic.items() if not torch.equal(p, scorer["weights"][name])}
    assert len(moved) > len(critic) / 2
    for name, p in result.rm.named_parameters():
        assert torch.equal(p, scorer["weights"][name]), "the judge of the answers must not learn"

    answers = result.before.answers
    assert result.policy.answer_length == sum(len(a.ids) + 1 for a in answers) / len(answers)


def test_policy_and_critic_are_clipped_apart(folder, run, tmp_path, monkeypatch):
    """Each update limits the norm of two sets of parameters, which together are all of them."""
    clipped = []
    clip = torch.nn.utils.clip_grad_norm_

    def record(params, max_norm):
        params = list(params)
        clipped.append({id(p) for p in params})
        return clip(params, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    result = run("train_ppo", options(folder, tmp_path, "--critic=rm"))
    critic = {id(p) for p in result.policy.critic.parameters()}
    actor = {id(p) for p in result.policy.parameters()} - critic
    assert len(clipped) >= 6 and len(clipped) % 2 == 0
    assert clipped[0::2] == [actor] * (len(clipped) // 2)
    assert clipped[1::2] == [critic] * (len(clipped) // 2)


def test_the_critic_has_a_learning_rate_of_its_own_in_a_trunk_of_its_own():
    critic = RewardModel(CONFIG)
    policy = ActorCritic(CONFIG, critic)
    optimizer = make_optimizer(policy, Config(lr=0.25, lr_value=0.5))
    actor_group, critic_group = optimizer.param_groups
    assert {id(p) for p in critic_group["params"]} == {id(p) for p in critic.parameters()}
    assert len(actor_group["params"]) == len(list(GPT(CONFIG).parameters()))
    assert (actor_group["peak_lr"], critic_group["peak_lr"]) == (0.25, 0.5)


def test_the_advantages_of_ppo(folder, run, tmp_path):
    result = run("train_ppo", options(folder, tmp_path, "--gamma=0.9", "--lam=0.7"))
    mask = result.batch.mask
    expected = slow_gae(result.rewards, result.values, mask, 0.9, 0.7).float()
    assert_near(result.advantages, whiten(expected, mask))
    assert_near(result.returns, (expected + result.values) * mask)
    assert result.values[mask].abs().max() > 0, "the critic has learned in the first iterations"

    # What the critic explains is the variance of the returns that came, without its own values.
    observed = slow_gae(result.rewards, torch.zeros_like(result.values), mask, 0.9, 1.0).float()
    residuals = (observed - result.values)[mask]
    explained = 1 - residuals.var() / observed[mask].var()
    log = read_log(tmp_path, "train_ppo")
    assert log[-1]["explained_variance"] == pytest.approx(explained.item(), abs=1e-4)


def test_beta_adapts(folder, run, tmp_path):
    """Each beta follows from the one before and from the KL of the log."""
    argv = options(folder, tmp_path, "--steps=5", "--lr=0.01", "--kl_target=0.5")
    run("train_ppo", [*argv, "--kl_horizon=100"])
    log = read_log(tmp_path, "train_ppo")
    assert log[0]["beta"] == 0.05
    for previous, record in itertools.pairwise(log):
        expected = next_kl_coef(previous["beta"], previous["kl"], 0.5, 8, 100)
        assert record["beta"] == pytest.approx(expected)
        assert record["beta"] != previous["beta"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_evaluation_changes_nothing(name, folder, run, tmp_path):
    logs = []
    for more in ("--eval_every=0", "--eval_every=1"):
        out = tmp_path / more
        run(name, options(folder, out, "--lr=0.01", more))
        logs.append(read_log(out, name))
    for without, with_evaluations in zip(*logs):
        assert "val_kl" in with_evaluations
        assert with_evaluations["reward"] == without["reward"]
        assert with_evaluations["kl"] == without["kl"]


def test_beta_cannot_turn_negative():
    with pytest.raises(AssertionError, match="must be above 0.2"):
        train_ppo.Config(kl_horizon=20.0, batch_size=128)


def test_beta_stays_fixed_without_a_target(folder, run, tmp_path):
    run("train_ppo", options(folder, tmp_path, "--lr=0.01", "--kl_target=0"))
    log = read_log(tmp_path, "train_ppo")
    assert [record["beta"] for record in log] == [0.05] * 3


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_learning_rate_falls_linearly(name, folder, run, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def spy(optimizer, *args, **kwargs):
        rates.append([group["lr"] for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            assert group["eps"] == 1e-5
            assert group["weight_decay"] == 0
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    argv = options(folder, tmp_path, "--steps=4", "--lr=1e-4")
    if name == "train_reinforce":
        run(name, argv)
        expected = [[1e-4 * share] for share in (1, 0.75, 0.5, 0.25)]
    else:
        run(name, [*argv, "--lr_value=1e-3", "--epochs=2", "--minibatches=1", "--max_kl=9"])
        expected = []
        for share in (1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25):
            expected.append([1e-4 * share, 1e-3 * share])
    assert len(rates) == len(expected)
    for actual, wanted in zip(rates, expected):
        assert actual == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_trains_on_training_prompts_and_evaluates_on_held_out_ones(
    name, folder, run, tmp_path, monkeypatch
):
    calls = []
    generate = GPT.generate

    def spy(self, idx, max_new_tokens, lengths, **kwargs):
        prompts = []
        for row, length in zip(idx.tolist(), lengths.tolist()):
            prompts.append(TOK.decode(row[1 : length - 1]))
        calls.append(prompts)
        assert max_new_tokens == 6
        return generate(self, idx, max_new_tokens, lengths=lengths, **kwargs)

    monkeypatch.setattr(GPT, "generate", spy)
    run(name, options(folder, tmp_path, "--steps=5", "--prompts=512"))

    prompts = []
    for i in range(N_TRAIN + N_VAL):
        prompts.append(f"é{i:02}\nß" if i % 2 else f"é{i:02}")
    held_out = prompts[N_TRAIN:]
    assert len(calls) == 7
    assert calls[0] == calls[-1] == held_out
    seen = list(itertools.chain(*calls[1:-1]))
    assert [len(batch) for batch in calls[1:-1]] == [8] * 5
    assert set(seen) == set(prompts[:N_TRAIN]), "5 batches of 8 go once through 36 prompts"
    assert seen[:N_TRAIN] != prompts[:N_TRAIN], "in a random order"
    assert seen[N_TRAIN:] == seen[:4], "and then begin again"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_sampler_that_the_loss_does_not_know_stops_the_run(
    name, folder, run, tmp_path, monkeypatch
):
    generate = GPT.generate

    def colder(self, *args, **kwargs):
        return generate(self, *args, temperature=0.7, **kwargs)

    monkeypatch.setattr(GPT, "generate", colder)
    argv = options(folder, tmp_path)
    if name == "train_ppo":
        argv.append("--max_kl=1e9")
    with pytest.raises(AssertionError, match="sampler and scorer disagree"):
        run(name, argv)


@pytest.mark.parametrize("name", SCRIPTS)
def test_equal_seeds_give_equal_runs(name, folder, run, tmp_path):
    rewards = {}
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(name, options(folder, tmp_path / out, f"--seed={seed}"))
        rewards[out] = [record["reward"] for record in read_log(tmp_path / out, name)]
    assert rewards["a"] == rewards["b"]
    assert rewards["a"] != rewards["c"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_evaluations_do_not_need_checks(name, folder, run, tmp_path):
    """Prompts of a user have no checks. Gold is then unknown, and everything else works."""
    records = [{"instruction": f"é{i}", "input": ""} for i in range(20)]
    write_jsonl(tmp_path / "plain.jsonl", records)
    run(name, options(folder, tmp_path, f"--data={tmp_path}/plain.jsonl"))
    assert math.isnan(read_log(tmp_path, name)[-1]["gold"])
    assert math.isfinite(read_metrics(tmp_path, name)["kl"])


# what is wrong: (options, what the one line says)
BAD_INPUT = {
    "unknown option": (["--stepz=3"], "no option --stepz, did you mean --steps?"),
    "type": (["--lr=small"], "--lr wants a float, got 'small'"),
    "no steps": (["--steps=0"], "steps=0 must be at least 1"),
    "no data": (["--data=nowhere.jsonl"], "there is no file nowhere.jsonl"),
    "empty": (["--data={0}/empty.jsonl"], "empty.jsonl is empty"),
    "broken": (["--data={0}/broken.jsonl"], "broken.jsonl line 5:"),
    "field": (["--data={0}/field.jsonl"], "field.jsonl line 7: field 'input' is missing"),
    "one record": (["--data={0}/one.jsonl"], "at least 2 are needed"),
    "no room": (["--max_new_tokens=39"], "smaller --max_new_tokens"),
    "no model": (["--init=nowhere.pt"], "no checkpoint at nowhere.pt"),
    "no reward model": (["--rm=nowhere.pt"], "no checkpoint at nowhere.pt"),
    "truncated": (["--init={0}/half.pt"], "half.pt is truncated or not a checkpoint"),
    "foreign": (["--rm={0}/data.jsonl"], "data.jsonl is truncated or not a checkpoint"),
    "kind": (["--rm={0}/sft.pt"], "sft.pt is a 'sft' checkpoint, expected 'rm'"),
    "tokenizer": (["--rm={0}/other.pt"], "another tokenizer"),
    "short context": (["--rm={0}/short.pt"], "a shorter context"),
}
BAD_INPUT_OF_PPO = {
    "divergence": (["--lr=1e30", "--max_kl=1e30"], "loss is nan at step"),
    "minibatches": (["--minibatches=3"], "batch_size=8 must be divisible by minibatches=3"),
    "no epochs": (["--epochs=0"], "epochs=0 must be at least 1"),
}
CASES = [(name, bad) for name in SCRIPTS for bad in BAD_INPUT]
CASES += [("train_ppo", bad) for bad in BAD_INPUT_OF_PPO]


@pytest.mark.parametrize("name, bad", CASES)
def test_bad_input_ends_in_one_line(name, bad, folder, run, tmp_path, capsys):
    more, expected = (BAD_INPUT | BAD_INPUT_OF_PPO)[bad]
    argv = options(folder, tmp_path / "out", *[option.format(folder) for option in more])
    with pytest.raises(SystemExit) as stop:
        run(name, argv)
    assert stop.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert expected in stderr
    for path in (tmp_path / "out").glob("*"):
        assert path.suffix == ".jsonl", "only a log may be left"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_broken_file_on_a_fresh_clone_builds_nothing(name, folder, tmp_path):
    """Without data/ and out/ there is no world and no checkpoint, and none must be made."""
    (tmp_path / "part_8").mkdir()
    shutil.copy(ROOT / "shared.py", tmp_path)
    for file in HERE.glob("*.py"):
        shutil.copy(file, tmp_path / "part_8")
    before = sorted(tmp_path.rglob("*"))

    start = time.time()
    command = [sys.executable, "-B", f"part_8/{name}.py", f"--data={folder}/broken.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "broken.jsonl line 5:" in done.stderr
    assert done.stdout == ""
    assert time.time() - start < 60
    assert sorted(tmp_path.rglob("*")) == before
