"""
Tests of train_grpo.py, train_grpo_ddp.py and train_dpo.py. The oracles are arithmetic by hand, sums
over a vocabulary of seven words, losses and rollouts computed again one token at a time, and runs
of the scripts on tiny checkpoints that are made here.
"""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import train_dpo
import train_grpo
import train_grpo_ddp
from model import GPT, GPTConfig, RewardModel
from shared import ROOT, load_checkpoint, parse_args, save_checkpoint
from tokenizer import Tokenizer
from train_grpo import (
    Config,
    Rollout,
    aggregate,
    group_advantage,
    kl_penalty,
    lr_scale,
    ppo_loss,
)

FOLDER = Path(__file__).resolve().parent
END = 12
TINY = GPTConfig(vocab_size=13, block_size=24, n_layer=2, n_head=4, n_embd=16, mlp_dim=12)

# The part of a tokenizer that a rollout needs. It decodes [3, 4] to "[3, 4]".
STUB = SimpleNamespace(end=END, decode=str)


def randomised(model, seed=0, std=0.2):
    """The model with random parameters, and gains near 1. The projections of a new model are zero,
    and a zero would hide everything that stands before it."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = std * torch.randn(p.shape, generator=generator)
        is_gain = p.ndim == 1 and p.data.mean() > 0.5
        p.data = 1 + noise if is_gain else noise
    return model


def make_policy():
    return randomised(GPT(TINY))


def make_reference():
    """The policy's neighbour: the same numbers, but a little smaller."""
    return randomised(GPT(TINY), std=0.17).requires_grad_(False)


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_near(actual, expected, rtol=1e-4):
    """Equal up to rounding, which grows with the size of the numbers."""
    actual = torch.as_tensor(actual).detach().double()
    expected = torch.as_tensor(expected).detach().double()
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol / 10 * scale)


# group_advantage ----------------------------------------------------------------------------------


def test_group_advantage_by_hand():
    reward = torch.tensor([1.0, 0, 0, 1, 3, 1, 2, 2])
    expected = [0.5, -0.5, -0.5, 0.5, 1, -1, 0, 0]
    assert group_advantage(reward, 4, scale_std=False).tolist() == expected
    assert group_advantage(reward, 2, scale_std=False).tolist() == expected

    # The unbiased standard deviations of the two groups are sqrt(1/3) and sqrt(2/3).
    scaled = group_advantage(reward, 4, scale_std=True).tolist()
    expected = [0.866, -0.866, -0.866, 0.866, 1.2247, -1.2247, 0, 0]
    assert scaled == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("scale_std", [False, True])
@pytest.mark.parametrize("group", [3, 6, 7, 8, 11, 16])
def test_a_group_of_equal_rewards_is_exactly_zero(group, scale_std):
    """Also where the mean of equal numbers is not that number in fp32. Divided by the deviation,
    such an error of rounding would be a large advantage."""
    values = torch.rand(500, generator=torch.Generator().manual_seed(0))
    equal = values[:, None].expand(500, group)
    advantages = group_advantage(equal.flatten(), group, scale_std)
    assert (advantages == 0).all()

    # One reward that differs is enough to make all advantages of its group count.
    other = equal.clone()
    other[:, -1] += 1
    assert (group_advantage(other.flatten(), group, scale_std) != 0).all()


def test_group_advantage_is_proportional_to_leave_one_out():
    """RLOO (Ahmadian et al. 2024) compares with the mean of the other answers:
    r_i - mean of the others = G / (G - 1) * (r_i - mean of all)."""
    reward = normal(15)
    G = 5
    expected = []
    for group in reward.view(3, G).tolist():
        for r in group:
            mean_of_others = (sum(group) - r) / (G - 1)
            expected.append(r - mean_of_others)
    assert_near(group_advantage(reward, G, scale_std=False) * G / (G - 1), expected)


# lr_scale, aggregate and ppo_loss -----------------------------------------------------------------


def test_the_learning_rate_rises_and_falls():
    cfg = Config(steps=10, warmup=0.4)
    expected = [0.25, 0.5, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert [lr_scale(step, cfg) for step in range(10)] == pytest.approx(expected)
    without = [lr_scale(step, Config(steps=4, warmup=0.0)) for step in range(4)]
    assert without == pytest.approx([1, 0.75, 0.5, 0.25])


def ragged_mask(lengths, T):
    """A (B, T) mask: row b has `lengths[b]` tokens, and they start at index b."""
    mask = torch.zeros(len(lengths), T, dtype=torch.bool)
    for b, length in enumerate(lengths):
        mask[b, b : b + length] = True
    return mask


def test_aggregate_by_hand():
    """Three answers of 1, 3 and 2 tokens. The longest possible answer has 4."""
    x = torch.arange(1.0, 16).view(3, 5)
    mask = ragged_mask([1, 3, 2], 5)  # the entries 1; 7, 8, 9; 13, 14
    assert aggregate(x, mask, "tokens", 4).item() == pytest.approx((1 + 24 + 27) / 6)
    assert aggregate(x, mask, "sequence", 4).item() == pytest.approx((1 + 8 + 13.5) / 3)
    assert aggregate(x, mask, "constant", 4).item() == pytest.approx((1 + 24 + 27) / (3 * 4))


@pytest.mark.parametrize("norm", ["tokens", "sequence", "constant"])
def test_aggregate_ignores_prompts_and_padding(norm):
    x = torch.arange(1.0, 16).view(3, 5)
    mask = ragged_mask([1, 3, 2], 5)
    other = torch.where(mask, x, torch.tensor(-77.0))
    assert aggregate(other, mask, norm, 4) == aggregate(x, mask, norm, 4)


@pytest.mark.parametrize("norm", ["tokens", "sequence", "constant"])
def test_the_first_update_is_the_policy_gradient(norm):
    """Where all ratios are 1, the gradient of a token's log-probability is -A over a count: of all
    tokens, of B times the answer's tokens, or of B times the longest possible answer."""
    mask = ragged_mask([1, 8, 3, 5], 12)
    advantages = normal(4, 1)
    logp = normal(4, 12, seed=2).requires_grad_()
    losses, clipped = ppo_loss(logp, logp.detach(), advantages, 0.2)
    aggregate(losses, mask, norm, 9).backward()

    lengths = mask.sum(dim=1, keepdim=True)
    count = {"tokens": mask.sum(), "sequence": 4 * lengths, "constant": 4 * 9}[norm]
    assert_near(logp.grad, -advantages * mask / count)
    assert not clipped.any()


@pytest.mark.parametrize(
    "ratio, advantage, expected, is_clipped",
    [
        (1.5, 1.0, -1.2, True),  # already more likely by more than 20 %
        (0.5, 1.0, -0.5, False),
        (1.5, -1.0, 1.5, False),
        (0.5, -1.0, 0.8, True),  # already less likely by more than 20 %
    ],
)
def test_the_clip_by_hand(ratio, advantage, expected, is_clipped):
    """It acts where the ratio has left [0.8, 1.2] in the direction of the advantage."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, clipped = ppo_loss(logp, torch.zeros(1, 1), torch.tensor([[advantage]]), 0.2)
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected)
    assert clipped.item() == is_clipped

    # A clipped token has no gradient.
    expected_gradient = 0 if is_clipped else -advantage * ratio
    assert logp.grad.item() == pytest.approx(expected_gradient)


# kl_penalty, on seven words, where every expectation is a sum ------------------------------------


def seven_words():
    """The logits of pi, to be differentiated, and log pi_sft, (7,) each, in fp64."""
    logits = normal(7).double().requires_grad_()
    reference_logp = normal(7, seed=2).double().log_softmax(dim=-1)
    return logits, reference_logp


def expected_penalty(kind):
    """The mean of an estimator over the words that pi may sample -> value, gradient (7,).

    Sampling is not differentiated, because in a loss on stored samples it is not, either.
    """
    logits, reference_logp = seven_words()
    logp = logits.log_softmax(dim=-1)
    every_word = torch.arange(7)
    penalty = kl_penalty(logp.expand(7, 7), reference_logp.expand(7, 7), every_word, kind)
    value = (logp.detach().exp() * penalty).sum()
    value.backward()
    return value.item(), logits.grad


def exact_kl():
    """KL(pi || pi_sft) as the plain sum of p (log p - log q) -> value, gradient (7,)."""
    logits, reference_logp = seven_words()
    logp = logits.log_softmax(dim=-1)
    kl = sum(p.exp() * (p - q) for p, q in zip(logp, reference_logp))
    kl.backward()
    return kl.item(), logits.grad


def test_the_exact_kl():
    value, gradient = expected_penalty("exact")
    assert value == pytest.approx(exact_kl()[0], rel=1e-9)
    assert_near(gradient, exact_kl()[1], rtol=1e-9)


def test_as_numbers_k1_and_k3_are_unbiased_and_k2_is_not():
    kl, _ = exact_kl()
    assert expected_penalty("k1")[0] == pytest.approx(kl)
    assert expected_penalty("k3")[0] == pytest.approx(kl)
    assert abs(expected_penalty("k2")[0] - kl) > 0.05 * kl

    logits, reference_logp = seven_words()
    logp = logits.log_softmax(dim=-1)
    penalty = kl_penalty(logp.expand(7, 7), reference_logp.expand(7, 7), torch.arange(7), "k3")
    assert (penalty >= 0).all()


def test_as_losses_k2_is_right_k1_is_nothing_and_k3_is_the_reverse_kl():
    _, exact_gradient = exact_kl()
    scale = exact_gradient.abs().max()
    assert expected_penalty("k1")[1].abs().max() < 1e-12 * scale
    assert_near(expected_penalty("k2")[1], exact_gradient, rtol=1e-9)

    # The gradient of KL(pi_sft || pi) with respect to the logits is pi - pi_sft.
    logits, reference_logp = seven_words()
    reverse = logits.softmax(dim=-1) - reference_logp.exp()
    assert_near(expected_penalty("k3")[1], reverse, rtol=1e-9)
    assert (expected_penalty("k3")[1] - exact_gradient).abs().max() > 0.01 * scale


# data ---------------------------------------------------------------------------------------------


def test_a_batch_holds_whole_groups_and_goes_round():
    cfg = Config(batch_size=8, group=4, minibatches=1)
    batches = [train_grpo.get_batch(["a", "b", "c"], step, cfg) for step in range(3)]
    assert batches[0] == ["a"] * 4 + ["b"] * 4
    assert batches[1] == ["c"] * 4 + ["a"] * 4
    assert batches[2] == ["b"] * 4 + ["c"] * 4


def test_processes_share_the_prompts_of_a_batch():
    cfg = Config(batch_size=24, group=4, minibatches=1)
    records = list(range(100, 107))
    for step in range(4):
        whole = train_grpo.get_batch(records, step, cfg)
        shares = [train_grpo_ddp.get_batch(records, step, cfg, rank, 2) for rank in (0, 1)]
        assert sorted(shares[0] + shares[1]) == sorted(whole)
        for share in shares:
            assert len(share) == 12
            for i in range(0, 12, 4):
                assert share[i : i + 4] == [share[i]] * 4, "a group must not be split"


def byte_tokenizer():
    """The 256 bytes and two merges; ids 258 to 261 are the special tokens."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks[b"th"] = 256
    ranks[b" th"] = 257
    return Tokenizer(ranks)


def test_prompts_without_room_for_an_answer_are_left_out(capsys):
    tok = byte_tokenizer()
    records = [{"instruction": "a" * n, "input": ""} for n in (1, 8, 9)]
    kept = train_grpo.encode_records(records, tok, block_size=20, max_new_tokens=10)
    assert kept == [
        {**record, "prompt_ids": [259, *record["instruction"].encode(), 260]}
        for record in records[:2]
    ]
    assert "1 of 3 prompts are longer than 10 tokens" in capsys.readouterr().out


# rollout, evaluate --------------------------------------------------------------------------------


def tiny_rollout(policy, **options):
    """16 answers to 4 prompts of 2 to 5 tokens -> config, Rollout. Equal models give equal ones."""
    torch.manual_seed(0)
    records = []
    for i in range(4):
        records += [{"prompt_ids": [1 + i] * (2 + i)}] * 4
    cfg = Config(**{"max_new_tokens": 8, "batch_size": 16, "group": 4, **options})
    return cfg, train_grpo.rollout(policy, STUB, records, cfg, "cpu")


def test_a_rollout_row_by_row():
    policy = make_policy()
    cfg, batch = tiny_rollout(policy)
    assert batch.ended.any() and not batch.ended.all(), "both kinds of answers must be tested"

    for b in range(16):
        ids = batch.ids[b].tolist()
        start = 2 + b // 4
        end = start
        while end < start + 8 and END not in ids[start:end]:
            end += 1
        assert ids[:start] == [1 + b // 4] * start
        assert batch.starts[b] == start
        assert batch.lengths[b] == end
        assert batch.ended[b] == (ids[end - 1] == END)

        # Index t of mask and logp is about token t + 1.
        assert batch.mask[b].nonzero()[:, 0].tolist() == list(range(start - 1, end - 1))
        all_logp = policy(torch.tensor([ids[:end]]))[0][0].log_softmax(dim=-1)  # (T, V)
        expected = torch.zeros(batch.mask.size(1))
        for t in range(start - 1, end - 1):
            expected[t] = all_logp[t, ids[t + 1]].item()
        assert_near(batch.logp[b], expected)


def test_answers_are_text_without_the_end_token():
    _, batch = tiny_rollout(make_policy())
    answers = train_grpo.answers_of(batch, STUB)
    for b, answer in enumerate(answers):
        ids = batch.ids[b, batch.starts[b] : batch.lengths[b]].tolist()
        assert answer.ended == (ids[-1] == END)
        assert answer.ids == [i for i in ids if i != END]
        assert answer.text == str(answer.ids)


def test_evaluate_reports_gold_by_task_and_the_kl_of_stories():
    policy, reference = make_policy(), make_reference()
    records = []
    for i, task in enumerate(["story", "sum", "story", "sum", "sum"]):
        # Any answer passes the check of the "sum" records if it has ended.
        check = {"answer": "x"} if task == "story" else {"no_repeat": True}
        records.append({"prompt_ids": [1 + i], "task": task, "check": check})

    cfg = Config(max_new_tokens=8)
    torch.manual_seed(0)
    result = train_grpo.evaluate(policy, reference, STUB, records, cfg, "cpu")
    torch.manual_seed(0)
    batch = train_grpo.rollout(policy, STUB, records, cfg, "cpu")
    assert result.answers == train_grpo.answers_of(batch, STUB)
    ended = batch.ended.tolist()
    assert result.gold == {"story": 0.0, "sum": pytest.approx((ended[1] + ended[3] + ended[4]) / 3)}

    # The exact KL is a sum over the tokens of an answer and over the vocabulary.
    kls = []
    for b in (0, 2):
        ids = batch.ids[b : b + 1, : batch.lengths[b]]
        logp = policy(ids)[0][0].log_softmax(dim=-1)
        reference_logp = reference(ids)[0][0].log_softmax(dim=-1)
        kl = 0.0
        for t in range(batch.starts[b] - 1, batch.lengths[b] - 1):
            for p, q in zip(logp[t].tolist(), reference_logp[t].tolist()):
                kl += math.exp(p) * (p - q)
        kls.append(kl)
    assert_near(result.kl, sum(kls) / 2)
    assert result.kl > 0.001


def test_gold_of_a_record_without_a_check_is_nan():
    answers = [train_grpo.Answer([], text, True) for text in ("7", "8", "9")]
    checked = {"check": {"answer": "7"}}
    values = train_grpo.passed([checked, checked, {}], answers)
    assert values[:2] == [1.0, 0.0]
    assert math.isnan(values[2])


# learn --------------------------------------------------------------------------------------------


def learn(policy, cfg, batch, advantages, lr=0.0, reference=None):
    """One call of learn with plain SGD. lr=0 keeps the policy, and leaves the gradient in it."""
    reference = reference or make_reference()
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    return train_grpo.learn(policy, reference, optimizer, batch, advantages, cfg, generator)


def select(batch, rows):
    """Some rows of a Rollout."""
    return Rollout(**{name: value[rows] for name, value in vars(batch).items()})


@pytest.mark.parametrize("kind", ["exact", "k1", "k2", "k3"])
@pytest.mark.parametrize("norm", ["tokens", "sequence", "constant"])
def test_the_loss_token_by_token(norm, kind):
    """At the first update all ratios are 1, so a token's loss is -A + beta * KL."""
    policy, reference = make_policy(), make_reference()
    cfg, batch = tiny_rollout(policy, minibatches=1, kl=kind, loss_norm=norm, kl_coef=0.7)
    advantages = normal(16)
    stats = learn(policy, cfg, batch, advantages)

    sums = []
    lengths = []
    total_kl = 0.0
    for b in range(16):
        ids = batch.ids[b : b + 1, : batch.lengths[b]]
        logp = policy(ids)[0][0].log_softmax(dim=-1)
        reference_logp = reference(ids)[0][0].log_softmax(dim=-1)
        answer_loss = 0.0
        for t in range(batch.starts[b] - 1, batch.lengths[b] - 1):
            kl = (logp[t].exp() * (logp[t] - reference_logp[t])).sum().item()
            total_kl += kl
            d = (logp[t] - reference_logp[t])[ids[0, t + 1]].item()
            penalty = {"exact": kl, "k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]
            answer_loss += -advantages[b].item() + 0.7 * penalty
        sums.append(answer_loss)
        lengths.append((batch.lengths[b] - batch.starts[b]).item())

    means = [total / length for total, length in zip(sums, lengths)]
    expected = {
        "tokens": sum(sums) / sum(lengths),
        "sequence": sum(means) / 16,
        "constant": sum(sums) / (16 * 8),
    }
    assert stats["loss"] == pytest.approx(expected[norm], rel=1e-3, abs=1e-4)
    assert stats["kl"] == pytest.approx(total_kl / 16, rel=1e-3), "the log shows the exact KL"


def test_every_parameter_learns_and_the_reference_does_not():
    policy, reference = make_policy(), make_reference()
    cfg, batch = tiny_rollout(policy)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    learn(policy, cfg, batch, normal(16), lr=0.1, reference=reference)
    for name, p in policy.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, before[name]), name
    for p, q in zip(reference.parameters(), make_reference().parameters()):
        assert torch.equal(p, q)


def test_nothing_is_learned_from_equal_groups_without_a_kl():
    policy = make_policy()
    cfg, batch = tiny_rollout(policy, kl_coef=0.0)
    learn(policy, cfg, batch, torch.zeros(16))
    for name, p in policy.named_parameters():
        assert (p.grad == 0).all(), name


def test_each_minibatch_has_a_gradient_of_its_own():
    """After two minibatches the gradient is that of the second alone, not the sum of both."""
    policy, other = make_policy(), make_policy()
    cfg, batch = tiny_rollout(policy, grad_clip=1e9)
    advantages = normal(16)
    learn(policy, cfg, batch, advantages)

    rows = torch.randperm(16, generator=torch.Generator().manual_seed(0))[8:]
    cfg = Config(**{**vars(cfg), "minibatches": 1})
    learn(other, cfg, select(batch, rows), advantages[rows])
    for p, q in zip(policy.parameters(), other.parameters()):
        assert_near(p.grad, q.grad)


def test_the_gradient_is_clipped():
    policy = make_policy()
    before = torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
    cfg, batch = tiny_rollout(policy, minibatches=1, grad_clip=0.01)
    learn(policy, cfg, batch, 100 * normal(16), lr=1.0)
    after = torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-2)


def test_later_epochs_are_off_policy_and_clipped():
    policy = make_policy()
    cfg, batch = tiny_rollout(policy, epochs=4, clip=0.05)
    stats = learn(policy, cfg, batch, normal(16), lr=1.0)
    assert stats["first_ratio_error"] < 1e-4
    assert stats["clip_fraction"] > 0.05

    # With one epoch of one minibatch every ratio is 1.
    policy = make_policy()
    cfg, batch = tiny_rollout(policy, epochs=1, minibatches=1, clip=0.05)
    assert learn(policy, cfg, batch, normal(16), lr=1.0)["clip_fraction"] == 0


def test_a_sampler_at_another_temperature_is_noticed():
    policy = make_policy()
    policy.generate = functools.partial(policy.generate, temperature=0.7)
    cfg, batch = tiny_rollout(policy)
    assert learn(policy, cfg, batch, normal(16))["first_ratio_error"] > 0.05


def test_it_learns_what_is_rewarded():
    """The reward is for "7, end", and after 60 iterations greedy generation answers just that."""
    torch.manual_seed(0)
    policy, reference = GPT(TINY), GPT(TINY)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3, eps=1e-5, weight_decay=0.0)
    cfg = Config(max_new_tokens=5, kl_coef=0.0, group=8, batch_size=48)
    prompts = [{"prompt_ids": [1 + i] * (1 + i)} for i in range(6)]
    records = train_grpo.get_batch(prompts, 0, cfg)
    generator = torch.Generator().manual_seed(0)

    for _ in range(60):
        batch = train_grpo.rollout(policy, STUB, records, cfg, "cpu")
        first_token = batch.ids.gather(1, batch.starts[:, None])[:, 0]
        length = batch.lengths - batch.starts
        reward = (first_token == 7).float() - 0.2 * (length - 2).abs()
        advantages = group_advantage(reward, 8, scale_std=False)
        train_grpo.learn(policy, reference, optimizer, batch, advantages, cfg, generator)

    policy.generate = functools.partial(policy.generate, temperature=0)
    batch = train_grpo.rollout(policy, STUB, prompts, cfg, "cpu")
    for answer in train_grpo.answers_of(batch, STUB):
        assert (answer.text, answer.ended) == ("[7]", True)


# DPO ----------------------------------------------------------------------------------------------


def make_pairs():
    rows = [
        ([1, 2], [3, 4, END], [5, END]),
        ([1], [6, END], [7, 8, 9, END]),
        ([2, 2, 2], [3, END], [4, END]),
    ]
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in rows
    ]


def slow_answer_logp(model, prompt_ids, answer_ids):
    """The log-probability of one answer: a sum over its tokens."""
    ids = prompt_ids + answer_ids
    logp = model(torch.tensor([ids]))[0][0].log_softmax(dim=-1)  # (T, V)
    total = 0.0
    for t in range(len(prompt_ids), len(ids)):
        total += logp[t - 1, ids[t]].item()
    return total


def slow_margins(policy, reference, pairs, beta):
    margins = []
    for pair in pairs:
        rewards = []
        for key in ("chosen_ids", "rejected_ids"):
            logp = slow_answer_logp(policy, pair["prompt_ids"], pair[key])
            reference_logp = slow_answer_logp(reference, pair["prompt_ids"], pair[key])
            rewards.append(beta * (logp - reference_logp))
        margins.append(rewards[0] - rewards[1])
    return margins


def test_answer_logp_is_the_sum_over_the_answer():
    policy = make_policy()
    pairs = make_pairs()
    ids, starts, lengths = train_dpo.collate(pairs)
    expected = []
    for key in ("chosen_ids", "rejected_ids"):
        expected += [slow_answer_logp(policy, pair["prompt_ids"], pair[key]) for pair in pairs]
    assert_near(train_dpo.answer_logp(policy, ids, starts, lengths), expected)


def test_dpo_loss_and_its_gradient_by_hand():
    """loss = -log sigmoid(margin), and the gradient of the chosen answer's log-probability is
    -beta * sigmoid(-margin)."""
    logp = torch.tensor([-3.0, -5.0], requires_grad=True)
    reference_logp = torch.tensor([-4.0, -4.5])
    loss, margin = train_dpo.dpo_loss(logp, reference_logp, beta=0.5)
    loss.backward()
    assert margin.item() == pytest.approx(0.5 * (1 + 0.5))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.75)))
    slope = 0.5 / (1 + math.exp(0.75))
    assert logp.grad.tolist() == pytest.approx([-slope, slope])


def test_dpo_starts_at_ln_2():
    policy = make_policy()
    pairs = make_pairs()
    train_dpo.add_reference_logp(policy, pairs, "cpu")
    loss, margin = train_dpo.pair_loss(policy, pairs, 0.1, "cpu")
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert margin.abs().max() < 1e-4


def test_dpo_evaluate_against_a_walk_along_each_answer():
    policy, reference = make_policy(), make_reference()
    pairs = make_pairs() * 30  # more than one batch of 64
    train_dpo.add_reference_logp(reference, pairs, "cpu")
    result = train_dpo.evaluate(policy, pairs, 0.3, "cpu")
    margins = slow_margins(policy, reference, make_pairs(), 0.3)
    losses = [math.log(1 + math.exp(-margin)) for margin in margins]
    assert result.loss == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert result.margin == pytest.approx(sum(margins) / 3, rel=1e-3, abs=1e-5)
    assert result.accuracy == pytest.approx(sum(margin > 0 for margin in margins) / 3)


def test_dpo_overfits_one_batch():
    policy, reference = make_policy(), make_policy().requires_grad_(False)
    pairs = make_pairs()
    train_dpo.add_reference_logp(reference, pairs, "cpu")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        loss, _ = train_dpo.pair_loss(policy, pairs, 0.3, "cpu")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert min(slow_margins(policy, reference, pairs, 0.3)) > 1


def test_dpo_answer_kl_against_a_sum():
    """Answers that end, one that is cut off, and an empty one."""
    policy, reference = make_policy(), make_reference()
    records = [{"prompt_ids": [1, 2]}, {"prompt_ids": [3]}, {"prompt_ids": [4, 4, 4]}]
    answers = [
        train_dpo.Answer([5, 6], "", True),
        train_dpo.Answer([7, 8, 9], "", False),
        train_dpo.Answer([], "", True),
    ]
    kl = train_dpo.answer_kl(policy, reference, records, answers, END, "cpu")

    expected = 0.0
    for record, answer in zip(records, answers):
        ids = record["prompt_ids"] + answer.ids + [END] * answer.ended
        logp = policy(torch.tensor([ids]))[0][0].log_softmax(dim=-1)
        reference_logp = reference(torch.tensor([ids]))[0][0].log_softmax(dim=-1)
        for t in range(len(record["prompt_ids"]) - 1, len(ids) - 1):
            expected += (logp[t].exp() * (logp[t] - reference_logp[t])).sum().item()
    assert kl == pytest.approx(expected / 3, rel=1e-3)
    assert kl > 0.001


# the scripts --------------------------------------------------------------------------------------

# One process imports torch, and then runs the script of each line in a child of its own. Afterwards
# it writes what the script's variables hold, so that tests can look at more than its files. Of the
# built-in world it reads 60 records.
SERVER = """
import json, os, runpy, sys
import matplotlib.figure, tiktoken, torch, torch._dynamo

def keep(folder, variables):
    kept = {"reference": variables["reference"].state_dict()}
    kept["policy"] = variables["policy"].state_dict()
    kept["optimizer"] = variables["optimizer"].state_dict()["param_groups"]
    for name in ("train", "val"):
        kept[name] = [record["prompt_ids"] for record in variables[name]]
    torch.save(kept, f"{folder}/variables.pt")

def run(folder, script, argv):
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.argv = [script, *argv]
    sys.path[:0] = [os.path.dirname(script), os.path.dirname(os.path.dirname(script))]
    import shared
    read_jsonl = shared.read_jsonl
    def read_some(path, fields):
        records = read_jsonl(path, fields)
        return records[:60] if "data/stories" in str(path) else records
    shared.read_jsonl = read_some
    try:
        keep(folder, runpy.run_path(script, run_name="__main__"))
        return 0
    except SystemExit as end:
        return end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1

for line in sys.stdin:
    folder, script, *argv = json.loads(line)
    child = os.fork()
    if child == 0:
        code = run(folder, script, argv)
        sys.stdout.flush()
        os._exit(code or 0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""

# The scripts must not believe that they run under torchrun, and they are too small for threads.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
for variable in ("RANK", "WORLD_SIZE"):
    ENVIRONMENT.pop(variable, None)


@pytest.fixture(scope="module")
def run():
    """run(folder, script, *options) -> exit code, stdout, stderr; variables.pt is in the folder."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=ENVIRONMENT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def ask(folder, script, *options):
        line = json.dumps([str(folder), str(FOLDER / script), *options])
        print(line, file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return code, (folder / "stdout").read_text(), (folder / "stderr").read_text()

    yield ask
    server.kill()
    server.communicate()


# A user's rewards. `score` writes down what it was asked.
MY_REWARDS = """
import json, os, pathlib

def score(record, answer):
    line = json.dumps([record["instruction"], record["input"], answer])
    path = pathlib.Path(__file__).with_name("asked" + os.environ.get("RANK", ""))
    with path.open("a") as file:
        file.write(line + "\\n")
    return len(answer) / 10

def brief(record, answer):
    return -len(answer)

def constant(record, answer):
    return 0.1

def raises(record, answer):
    return record["nothing"]

def nan(record, answer):
    return float("nan")

def text(record, answer):
    return "0.5"

width = 3
"""


def write_lines(path, lines):
    path.write_text("\n".join(lines))


def make_sft(tok, block_size):
    """A model that ends an answer at about every sixth token.

    Its embeddings share a large first channel, so the final norm makes that channel about 4, and
    so does the head for the end token.
    """
    torch.manual_seed(0)
    gpt = GPT(
        GPTConfig(vocab_size=tok.vocab_size, block_size=block_size, n_layer=1, n_head=2, n_embd=16)
    )
    with torch.no_grad():
        gpt.wte.weight[:, 0] = 1.0
        gpt.lm_head.weight[tok.special["<|end|>"], 0] = 1.0
    return gpt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts, pairs, models, rewards, and the broken files that the tests of bad input name."""
    folder = tmp_path_factory.mktemp("part_9")
    tok = byte_tokenizer()
    state = tok.state()
    sft = make_sft(tok, 64)
    save_checkpoint(folder / "sft.pt", kind="sft", tokenizer=state, **sft.to_checkpoint())
    wide = make_sft(tok, 400)
    save_checkpoint(folder / "wide.pt", kind="sft", tokenizer=state, **wide.to_checkpoint())
    rm = RewardModel(sft.cfg).to_checkpoint()
    save_checkpoint(folder / "rm.pt", kind="rm", head={}, tokenizer=state, **rm)
    other = Tokenizer({bytes([i]): i for i in range(256)}).state()
    save_checkpoint(folder / "other_rm.pt", kind="rm", head={}, tokenizer=other, **rm)
    (folder / "half.pt").write_bytes((folder / "sft.pt").read_bytes()[:9000])

    # Any text that has ended passes the check. The fourth prompt is too long.
    lines = []
    for i in range(39):
        record = {"instruction": f"sag «{i}»", "input": "the dog" if i % 3 else ""}
        record["task"] = ("story", "echo")[i % 2]
        record["check"] = {"no_repeat": True}
        lines.append(json.dumps(record, ensure_ascii=False))
    long_record = {"instruction": "the " * 40, "input": "", "task": "echo", "check": {"must": []}}
    lines.insert(3, json.dumps(long_record))
    write_lines(folder / "data.jsonl", lines)
    write_lines(folder / "broken.jsonl", [*lines[:4], lines[4][:-5], *lines[5:]])
    write_lines(folder / "empty.jsonl", [])
    write_lines(folder / "one.jsonl", lines[:1])

    bare = json.dumps({"instruction": "say it", "input": ""})
    write_lines(folder / "bare.jsonl", [bare] * 30)
    no_checks = json.dumps({"instruction": "say it", "input": "", "check": {}})
    write_lines(folder / "no_checks.jsonl", [no_checks] * 30)

    pairs = []
    for i in range(40):
        pair = {"prompt": f"sag «{i}»", "chosen": "ein Hündchen", "rejected": "the dog"}
        pairs.append(json.dumps(pair, ensure_ascii=False))
    write_lines(folder / "pairs.jsonl", pairs)
    write_lines(folder / "broken_pairs.jsonl", [*pairs[:6], "{", *pairs[6:]])

    (folder / "my.py").write_text(MY_REWARDS)
    (folder / "syntax.py").write_text("def score(record, answer)\n    return 1\n")
    return folder


def grpo_options(folder, out, *more):
    return [
        f"--data={folder}/data.jsonl",
        f"--init={folder}/sft.pt",
        f"--out={out}",
        "--steps=3",
        "--batch_size=16",
        "--group=4",
        "--max_new_tokens=12",
        "--prompts=4",
        "--device=cpu",
        *[option.format(folder) for option in more],
    ]


def dpo_options(folder, out, *more):
    return [
        f"--data={folder}/pairs.jsonl",
        f"--init={folder}/sft.pt",
        f"--out={out}",
        "--steps=6",
        "--batch_size=8",
        "--eval_every=3",
        "--device=cpu",
        *more,
    ]


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(log):
    kept = []
    for record in log:
        kept.append({key: value for key, value in record.items() if not key.endswith("_s")})
    return kept


def test_the_reward_model_is_asked_about_stories_only():
    for module in (train_grpo, train_grpo_ddp):
        for records in module.load_data(module.Config(reward="model")):
            assert {record["task"] for record in records} == {"story"}
        train, _ = module.load_data(module.Config())
        assert {"story", "is_a", "count"} < {record["task"] for record in train}


def test_an_evaluation_changes_nothing(folder, run, tmp_path):
    logs = []
    for every in (0, 1):
        out = tmp_path / str(every)
        options = grpo_options(folder, out, "--lr=0.01", f"--eval_every={every}")
        code, _, errors = run(tmp_path, "train_grpo.py", *options)
        assert code == 0, errors
        logs.append(read_log(out / "log.jsonl"))
    for without, with_evaluations in zip(*logs):
        assert "val_kl" in with_evaluations
        assert with_evaluations["reward"] == without["reward"]
        assert with_evaluations["loss"] == without["loss"]


def numbers_of(prompts):
    """The i of each prompt "sag «i»"."""
    tok = byte_tokenizer()
    texts = [tok.decode(ids[1:-1]) for ids in prompts]
    return {int(text.partition("«")[2].partition("»")[0]) for text in texts}


@pytest.mark.parametrize(
    "more",
    [
        ["--eval_every=2"],
        ["--reward=model", "--rm={0}/rm.pt", "--kl=k3", "--epochs=2"],
        ["--reward={0}/my.py:brief", "--scale_std", "--loss_norm=constant"],
    ],
    ids=["judge", "model", "user"],
)
def test_grpo_as_a_script(folder, run, tmp_path, more):
    out = tmp_path / "out"
    options = grpo_options(folder, out, *more)
    code, printed, errors = run(tmp_path, "train_grpo.py", *options)
    assert code == 0, errors

    # the log and the metrics
    log = read_log(out / "log.jsonl")
    assert [record["step"] for record in log] == [0, 1, 2]
    expected = {"reward", "gold", "kl", "loss", "entropy", "clip_fraction", "equal_groups"}
    expected |= {"length", "ended", "rollout_s", "score_s", "update_s", "completions_per_s"}
    for record in log:
        assert expected <= set(record)
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"sft_gold", "grpo_gold", "sft_echo", "grpo_echo", "kl", "seconds"} <= set(metrics)
    assert metrics["first_ratio_error"] <= 1e-4
    assert (out / "train_grpo.png").read_bytes().startswith(b"\x89PNG")
    if "--eval_every=2" in more:
        assert all(record["reward"] == record["gold"] for record in log)
        assert max(record["gold"] for record in log) > 0
        assert [step for step, record in enumerate(log) if "val_story" in record] == [1]
        assert "val_kl" in log[1]

    # what it prints
    assert "1 of 36 prompts are longer than 52 tokens: left out" in printed
    assert printed.count("  SFT:  ") == printed.count("  GRPO: ") == 4
    assert "echo" in printed

    # the policy on disk is the one that was trained, and the reference is still the SFT model
    variables = torch.load(tmp_path / "variables.pt")
    sft = load_checkpoint(folder / "sft.pt", "sft")
    grpo = load_checkpoint(out / "grpo.pt", "grpo")
    for name, weight in sft["weights"].items():
        assert torch.equal(variables["reference"][name], weight)
        assert torch.equal(variables["policy"][name], grpo["weights"][name])
    moved = [not torch.equal(w, grpo["weights"][name]) for name, w in sft["weights"].items()]
    assert all(moved), "every parameter must have learned"
    assert log[0]["kl"] < log[-1]["kl"]
    assert metrics["kl"] > 0
    assert grpo["config"]["steps"] == grpo["changed"]["steps"] == 3
    assert grpo["tokenizer"] == sft["tokenizer"]

    # the last learning rate of the schedule, and the split of the data
    (group,) = variables["optimizer"]
    assert group["lr"] == pytest.approx(5e-4 / 3)
    assert group["weight_decay"] == 0
    train, val = numbers_of(variables["train"]), numbers_of(variables["val"])
    assert train == set(range(35)), "the first 90 % of the lines, but for the one too long"
    assert val == {35, 36, 37, 38}
    assert len(variables["train"]) == 35 and len(variables["val"]) == 4


def test_grpo_on_the_built_in_world(folder, run, tmp_path):
    out = tmp_path / "out"
    options = [f"--init={folder}/wide.pt", f"--out={out}", "--steps=1", "--batch_size=16"]
    options += ["--prompts=6", "--max_new_tokens=16", "--device=cpu"]
    code, _, errors = run(tmp_path, "train_grpo.py", *options)
    assert code == 0, errors
    metrics = json.loads((out / "metrics.json").read_text())
    assert "sft_story" in metrics and "grpo_story" in metrics
    assert (out / "train_grpo.png").exists()


def test_the_same_seed_gives_the_same_run_and_another_does_not(folder, run, tmp_path):
    logs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = grpo_options(folder, tmp_path / name, f"--seed={seed}")
        code, _, errors = run(tmp_path, "train_grpo.py", *options)
        assert code == 0, errors
        logs.append(without_times(read_log(tmp_path / name / "log.jsonl")))
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def read_asked(path):
    """What my.py:score was asked: a list of (record's text, answer)."""
    asked = []
    for instruction, text, answer in read_log(path):
        asked.append((instruction + "\n" + text, answer))
    return asked


def test_a_users_reward_gets_records_and_texts(folder, run, tmp_path):
    """Groups stand together, the answers are texts, and no validation prompt is trained on."""
    out = tmp_path / "out"
    shutil.copy(folder / "my.py", tmp_path)
    options = grpo_options(folder, out, f"--reward={tmp_path}/my.py:score")
    code, _, errors = run(tmp_path, "train_grpo.py", *options)
    assert code == 0, errors

    asked = read_asked(tmp_path / "asked")
    log = read_log(out / "log.jsonl")
    assert len(asked) == 3 * 16
    prompts = []
    for i in range(0, len(asked), 4):
        group = asked[i : i + 4]
        assert len({prompt for prompt, _ in group}) == 1
        assert len({answer for _, answer in group}) > 1, "each answer of a group is sampled anew"
        prompts.append(group[0][0])
    assert len(set(prompts)) == 12, "no prompt comes twice in one pass"
    for prompt in prompts:
        number = int(prompt.partition("«")[2].partition("»")[0])
        assert number < 35, "a validation prompt was trained on"

    for step in range(3):
        answers = [answer for _, answer in asked[16 * step : 16 * (step + 1)]]
        assert all(isinstance(answer, str) and "<|end|>" not in answer for answer in answers)
        mean_reward = sum(len(answer) / 10 for answer in answers) / 16
        assert log[step]["reward"] == pytest.approx(mean_reward, rel=1e-4)


def test_a_users_reward_is_maximized(folder, run, tmp_path):
    """Short answers are rewarded, and they become shorter."""
    options = grpo_options(folder, tmp_path / "out", "--reward={0}/my.py:brief", "--kl_coef=0")
    options += ["--steps=25", "--batch_size=32", "--lr=0.01"]
    code, _, errors = run(tmp_path, "train_grpo.py", *options)
    assert code == 0, errors
    rewards = [record["reward"] for record in read_log(tmp_path / "out/log.jsonl")]
    first = sum(rewards[:5]) / 5
    last = sum(rewards[-5:]) / 5
    assert last > first + 1, f"mean reward {first} -> {last}"


def test_a_constant_reward_teaches_nothing(folder, run, tmp_path):
    out = tmp_path / "out"
    options = grpo_options(folder, out, "--reward={0}/my.py:constant", "--kl_coef=0")
    code, _, errors = run(tmp_path, "train_grpo.py", *options)
    assert code == 0, errors
    assert all(record["equal_groups"] == 1 for record in read_log(out / "log.jsonl"))
    before = load_checkpoint(folder / "sft.pt", "sft")["weights"]
    after = load_checkpoint(out / "grpo.pt", "grpo")["weights"]
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name


def test_the_reward_models_score_is_clipped_and_punishes_a_missing_end(folder):
    tok = byte_tokenizer()
    cfg = Config(reward="model", rm=f"{folder}/rm.pt")
    reward_of = train_grpo.load_reward(cfg, tok, 64, torch.device("cpu"))
    records = [{"prompt_ids": [259, 97 + i, 260]} for i in range(16)]
    sft = GPT.load(load_checkpoint(folder / "sft.pt", "sft"))
    torch.manual_seed(0)
    batch = train_grpo.rollout(sft, tok, records, Config(max_new_tokens=6), "cpu")
    assert batch.ended.any() and not batch.ended.all()

    rm = RewardModel.load(load_checkpoint(folder / "rm.pt", "rm"))
    with torch.no_grad():
        score = rm(batch.ids, batch.starts, batch.lengths)
    expected = torch.where(batch.ended, score.clamp(-1.5, 1.5), torch.tensor(-2.0))
    assert_near(reward_of(records, batch, None), expected)


def test_dpo_as_a_script(folder, run, tmp_path):
    out = tmp_path / "out"
    options = dpo_options(folder, out, "--lr=0.01", "--beta=0.5")
    code, printed, errors = run(tmp_path, "train_dpo.py", *options)
    assert code == 0, errors

    # It starts at ln 2 and learns.
    log = read_log(out / "train_dpo.jsonl")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert log[-1]["loss"] < 0.6
    assert [step for step, record in enumerate(log) if "val_loss" in record] == [2, 5]
    assert (out / "train_dpo.png").read_bytes().startswith(b"\x89PNG")

    # All pairs have the same answers, so a batch has nearly the margin of the held-out pairs.
    assert 0.5 < log[-1]["margin"] / log[-1]["val_margin"] < 1.1

    # The policy on disk has the margins that the log and the metrics state.
    variables = torch.load(tmp_path / "variables.pt")
    sft = load_checkpoint(folder / "sft.pt", "sft")
    for name, weight in sft["weights"].items():
        assert torch.equal(variables["reference"][name], weight)
    policy = GPT.load(load_checkpoint(out / "dpo.pt", "dpo"))
    _, records = train_dpo.load_data(SimpleNamespace(data=f"{folder}/pairs.jsonl"))
    val = train_dpo.encode_records(records, byte_tokenizer(), 64)
    margins = slow_margins(policy, GPT.load(sft), val, 0.5)
    metrics = json.loads((out / "train_dpo.json").read_text())
    assert metrics["margin"] == pytest.approx(sum(margins) / 4, rel=1e-3)
    assert metrics["accuracy"] == log[-1]["val_accuracy"] == 1
    losses = [math.log(1 + math.exp(-margin)) for margin in margins]
    assert log[-1]["val_loss"] == pytest.approx(sum(losses) / 4, rel=1e-3)
    assert f"{metrics['accuracy']:.3f} of the held-out pairs" in printed

    # the split of the data and the schedule
    assert numbers_of(variables["train"]) == set(range(36))
    assert numbers_of(variables["val"]) == {36, 37, 38, 39}
    assert variables["optimizer"][0]["lr"] == pytest.approx(0.01 / 6)
    assert variables["optimizer"][0]["weight_decay"] == 0


def test_dpo_on_the_built_in_world(folder, run, tmp_path):
    out = tmp_path / "out"
    options = [f"--init={folder}/wide.pt", f"--out={out}", "--steps=2", "--batch_size=8"]
    options += ["--lr=0.01", "--prompts=6", "--max_new_tokens=16", "--device=cpu"]
    code, printed, errors = run(tmp_path, "train_dpo.py", *options)
    assert code == 0, errors
    metrics = json.loads((out / "train_dpo.json").read_text())
    assert {"sft_gold", "dpo_gold", "accuracy", "margin", "seconds"} <= set(metrics)
    assert metrics["kl"] > 0
    assert "held-out gold" in printed


# two processes ------------------------------------------------------------------------------------

WORKER = """
import os, sys
sys.path[:0] = sys.argv[1:3]
import torch
import torch.distributed as dist
from model import GPT
from train_grpo_ddp import Config, Rollout, learn

dist.init_process_group("gloo")
rank = dist.get_rank()
stored = torch.load(sys.argv[3])
reference = GPT.load(stored["reference"]).requires_grad_(False)
half = {name: value.chunk(2)[rank] for name, value in stored["rollout"].items()}
advantages = half.pop("advantages")

def run(lr, **options):
    policy = GPT.load(stored["policy"])
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    cfg = Config(**stored["options"], **options)
    generator = torch.Generator().manual_seed(0)
    stats = learn(policy, reference, optimizer, Rollout(**half), advantages, cfg, generator)
    return policy, stats

results = {}
for norm in ("tokens", "sequence", "constant"):
    policy, stats = run(lr=0.0, minibatches=1, loss_norm=norm)
    results[norm] = (stats["loss"], [p.grad for p in policy.parameters()])

# After several updates the processes must still have the same weights.
policy, _ = run(lr=0.1, minibatches=2, epochs=2)
results["weights"] = policy.state_dict()
torch.save(results, f"{sys.argv[3]}.{rank}")
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # without destructors: the process that is done first may abort in them
"""


def torchrun(script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), *[str(argument) for argument in arguments]]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


def stored_rollout():
    """Eight answers. The first four have 9 tokens and the others 21, so a mean over the tokens of
    each half would not be the mean over all tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([1, 2, 2, 4, 8, 6, 5, 2])
    positions = torch.arange(11)
    mask = (positions >= 2) & (positions < 2 + lengths[:, None])
    return {
        "ids": torch.randint(13, (8, 12), generator=generator),
        "starts": torch.full((8,), 3),
        "lengths": 3 + lengths,
        "ended": torch.ones(8, dtype=torch.bool),
        "mask": mask,
        "logp": 0.3 * torch.randn(8, 11, generator=generator) - 2.5,
        "advantages": torch.randn(8, generator=generator),
    }


def test_two_processes_have_the_gradient_of_one(tmp_path):
    policy, reference = make_policy(), make_reference()
    rollout = stored_rollout()
    options = {"grad_clip": 1e9, "kl_coef": 0.5, "max_new_tokens": 9}
    stored = {
        "policy": policy.to_checkpoint(),
        "reference": reference.to_checkpoint(),
        "rollout": rollout,
        "options": options,
    }
    torch.save(stored, tmp_path / "stored")
    (tmp_path / "worker.py").write_text(WORKER)
    done = torchrun(tmp_path / "worker.py", FOLDER, ROOT, tmp_path / "stored")
    assert done.returncode == 0, done.stderr
    results = [torch.load(tmp_path / f"stored.{rank}") for rank in (0, 1)]

    advantages = rollout.pop("advantages")
    for norm in ("tokens", "sequence", "constant"):
        cfg = Config(**options, minibatches=1, loss_norm=norm)
        stats = learn(policy, cfg, Rollout(**rollout), advantages)
        losses = [results[rank][norm][0] for rank in (0, 1)]
        assert sum(losses) / 2 == pytest.approx(stats["loss"], rel=1e-4)
        for rank in (0, 1):
            gradients = results[rank][norm][1]
            for (name, p), gradient in zip(policy.named_parameters(), gradients):
                assert p.grad.any(), name
                assert_near(gradient, p.grad)

    for name, weight in results[0]["weights"].items():
        assert torch.equal(weight, results[1]["weights"][name]), name


def test_grpo_in_two_processes_as_a_script(folder, tmp_path):
    out = tmp_path / "out"
    shutil.copy(folder / "my.py", tmp_path)
    options = grpo_options(folder, out, f"--reward={tmp_path}/my.py:score", "--eval_every=2")

    # Prompts of equal length, so that equal random numbers would give nearly equal answers.
    lines = []
    for i in range(10, 40):
        record = {"instruction": f"sag «{i}»", "input": "", "check": {"no_repeat": True}}
        lines.append(json.dumps(record, ensure_ascii=False))
    write_lines(tmp_path / "equal.jsonl", lines)
    options.append(f"--data={tmp_path}/equal.jsonl")
    done = torchrun(FOLDER / "train_grpo_ddp.py", *options)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert done.stdout.count("  GRPO: ") == 3, "only one process prints"

    # Each process answers its own prompts, and logged is the mean over both.
    log = read_log(out / "log.jsonl")
    assert [record["step"] for record in log] == [0, 1, 2]
    assert "val_story" in log[1]
    shares = [read_asked(tmp_path / f"asked{rank}") for rank in (0, 1)]
    for step in range(3):
        answers = []
        prompts = []
        for share in shares:
            part = share[8 * step : 8 * (step + 1)]
            answers += [answer for _, answer in part]
            prompts += [prompt for prompt, _ in part]
        assert len(answers) == 16
        for i in range(0, 16, 4):
            assert len(set(prompts[i : i + 4])) == 1
        assert len(set(prompts)) == 4
        mean_reward = sum(len(answer) / 10 for answer in answers) / 16
        assert log[step]["reward"] == pytest.approx(mean_reward, rel=1e-4)

    same_start = 0
    for (_, first), (_, second) in zip(shares[0][:8], shares[1][:8]):
        same_start += first[:1] == second[:1]
    assert same_start <= 4, "the processes must not draw the same random numbers"
    assert load_checkpoint(out / "grpo.pt", "grpo")["step"] == 3
    assert (out / "train_grpo.png").exists()


def test_the_batch_must_be_divisible_by_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(AssertionError, match="group \\* minibatches \\* processes = 48"):
        train_grpo_ddp.Config(batch_size=128, group=8, minibatches=2)
    train_grpo_ddp.Config(batch_size=96, group=8, minibatches=2)


# bad input ----------------------------------------------------------------------------------------

# options of train_grpo.py, and what its one line says
BAD_INPUT = {
    "unknown option": (["--groups=3"], "no option --groups, did you mean --group?"),
    "wrong type": (["--clip=small"], "--clip wants a float, got 'small'"),
    "group": (["--group=3"], "batch_size=16 must be divisible by group * minibatches = 6"),
    "group of one": (["--group=1"], "group=1 must be at least 2"),
    "kl": (["--kl=k4"], "kl=k4 must be exact, k1, k2 or k3"),
    "loss_norm": (["--loss_norm=words"], "loss_norm=words must be tokens, sequence or constant"),
    "prompts": (["--prompts=0"], "prompts=0 must be at least 1"),
    "missing data": (["--data=nowhere.jsonl"], "there is no file nowhere.jsonl"),
    "empty data": (["--data={0}/empty.jsonl"], "empty.jsonl is empty"),
    "broken data": (["--data={0}/broken.jsonl"], "broken.jsonl line 5:"),
    "one record": (["--data={0}/one.jsonl"], "has 1 record; at least 2 are needed"),
    "no field check": (["--data={0}/bare.jsonl"], 'the judge needs a "check" in every record'),
    "no checks": (["--data={0}/no_checks.jsonl"], 'the judge needs a "check" in every record'),
    "no room": (["--max_new_tokens=63"], "use a smaller --max_new_tokens"),
    "no model": (["--init=nowhere.pt"], "no checkpoint at nowhere.pt"),
    "torn model": (["--init={0}/half.pt"], "half.pt is truncated or not a checkpoint"),
    "wrong kind": (["--init={0}/rm.pt"], "rm.pt is a 'rm' checkpoint, expected 'sft'"),
    "no rm": (["--reward=model", "--rm=nowhere.pt"], "no checkpoint at nowhere.pt"),
    "other rm": (["--reward=model", "--rm={0}/other_rm.pt"], "has another tokenizer"),
    "no reward file": (["--reward=nowhere.py:f"], "must be judge, model, or FILE.py:FUNCTION"),
    "no reward": (["--reward=length"], "must be judge, model, or FILE.py:FUNCTION"),
    "no function": (["--reward={0}/my.py:height"], "my.py has no function height"),
    "not a function": (["--reward={0}/my.py:width"], "my.py has no function width"),
    "syntax": (["--reward={0}/syntax.py:score"], "SyntaxError"),
    "reward raises": (["--reward={0}/my.py:raises"], "KeyError: 'nothing' ({0}/my.py line "),
    "reward is nan": (["--reward={0}/my.py:nan"], "must return a finite number, but it returned"),
    "reward is text": (["--reward={0}/my.py:text"], "a finite number, but it returned '0.5'"),
    "infinite": (["--kl_coef=inf"], "--kl_coef wants a finite number"),
    "diverged": (["--lr=1e30"], "at step 1: lower --lr"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_in_one_line(folder, run, tmp_path, name):
    more, expected = BAD_INPUT[name]
    options = grpo_options(folder, tmp_path / "out", *more)
    code, _, errors = run(tmp_path, "train_grpo.py", *options)
    assert code == 2, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert expected.format(folder) in errors
    written = {path.name for path in (tmp_path / "out").glob("*")}
    assert written <= {"log.jsonl"}


def test_bad_input_of_dpo_ends_in_one_line(folder, run, tmp_path):
    cases = {
        f"--data={folder}/data.jsonl": "data.jsonl line 1: field 'prompt' is missing",
        f"--data={folder}/broken_pairs.jsonl": "broken_pairs.jsonl line 7:",
        "--beta=0": "--beta=0.0 must be above 0",
        "--prompts=0": "prompts=0 must be at least 1",
    }
    for option, expected in cases.items():
        options = dpo_options(folder, tmp_path / "out", option)
        code, _, errors = run(tmp_path, "train_dpo.py", *options)
        assert code == 2, errors
        assert errors.startswith("error: ") and errors.count("\n") == 1, errors
        assert expected in errors


@pytest.mark.parametrize(
    "script, option, expected",
    [
        ("train_grpo.py", "--data={0}/broken.jsonl", "broken.jsonl line 5:"),
        ("train_grpo.py", "--data={0}/bare.jsonl", 'needs a "check" in every record'),
        ("train_grpo.py", "--reward={0}/my.py:height", "my.py has no function height"),
        ("train_dpo.py", "--data={0}/broken_pairs.jsonl", "broken_pairs.jsonl line 7:"),
    ],
)
def test_a_users_file_is_checked_before_anything_is_built(
    folder, run, tmp_path, script, option, expected
):
    """In a clone without data/ and out/ the script must not train an SFT model first."""
    (tmp_path / "part_9").mkdir()
    shutil.copy(ROOT / "shared.py", tmp_path)
    for name in ("model.py", "tokenizer.py", script):
        shutil.copy(FOLDER / name, tmp_path / "part_9")
    data = f"--data={folder}/data.jsonl"
    clone = tmp_path / "part_9" / script
    code, printed, errors = run(tmp_path, clone, data, option.format(folder))
    assert code == 2, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert expected in errors
    assert "running part_" not in printed, "it builds before it checks"


def test_help_and_options_of_all_three():
    for module in (train_grpo, train_grpo_ddp, train_dpo):
        cfg = parse_args(module.Config, argv=["--steps=3"])
        assert cfg.steps == 3
        assert cfg.changed == {"steps": 3}
