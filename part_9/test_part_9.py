"""
Tests of Part 9's mathematics: pytest part_9. The oracles: arithmetic by hand, sums over a 7-word vocabulary, rollouts
recomputed one row at a time, and a two-armed bandit that GRPO must solve. The scripts are in test_train_9.py.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import functools
import math
from types import SimpleNamespace

import pytest
import torch

import model as this
from model import GPT, GPTConfig
from tokenizer import Tokenizer
from train_dpo import answer_logp, collate, dpo_loss, loss_of, reference_logp
from train_grpo import (Config, aggregate, evaluate, group_advantage, judged, kl_penalty, learn, log_probs, pick,
                        ppo_loss, rollout, texts)

TINY = dict(vocab_size=13, block_size=24, n_layer=2, n_head=4, n_embd=16, n_kv_head=2, mlp_dim=12)
END = 12
STUB = SimpleNamespace(special={"<|end|>": END}, decode=str)

def randomised(model, seed=0, std=0.2):
    """Every parameter random, gains about 1: a projection that starts at zero would hide all that stands before it."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = (p.ndim == 1 and p.data.mean() > 0.5) + std * torch.randn(p.shape, generator=g)
    return model

def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def ragged(lengths, T):
    """Rows whose answers start at index b and have `lengths` tokens, as a (B, T) mask."""
    pos, first = torch.arange(T), torch.arange(len(lengths))[:, None]
    return (pos >= first) & (pos < first + torch.tensor(lengths)[:, None])

@pytest.fixture(scope="module")
def models():
    """Policy and reference, not alike."""
    return randomised(GPT(GPTConfig(**TINY))), randomised(GPT(GPTConfig(**TINY)), 0, 0.17)

def roll(models, **knobs):
    """16 answers to 4 prompts of 2 to 5 tokens, groups of 4; equal seeds give equal answers."""
    torch.manual_seed(0)
    records = [{"prompt": [1 + i] * (2 + i)} for i in range(4) for _ in range(4)]
    cfg = Config(**{"max_new_tokens": 8, "batch_size": 16, "group": 4, **knobs})
    return cfg, rollout(*models, STUB, records, cfg, "cpu")

# the advantage -------------------------------------------------------------------------------------------------------

def test_group_advantage_by_hand():
    reward = torch.tensor([1.0, 0, 0, 1, 3, 1, 2, 2])
    assert group_advantage(reward, 4, False).tolist() == [0.5, -0.5, -0.5, 0.5, 1, -1, 0, 0]
    assert group_advantage(reward, 2, False).tolist() == [0.5, -0.5, -0.5, 0.5, 1, -1, 0, 0]
    scaled = group_advantage(reward, 4, True)  # unbiased deviations: sqrt(1/3), sqrt(2/3)
    assert scaled.tolist() == pytest.approx([0.866, -0.866, -0.866, 0.866, 1.2247, -1.2247, 0, 0], abs=1e-3)

def test_an_equal_group_is_exactly_0():
    """Also where the mean of equal numbers is not that number in fp32: 0.1 summed 6 times is 0.6000000238."""
    for scale_std in (False, True):
        for value in (0.1, 1 / 3, 0.7, 1e-8):
            found = group_advantage(torch.tensor([value] * 6 + [0.0] * 5 + [1.0]), 6, scale_std)
            assert (found[:6] == 0).all() and found[6:].abs().min() > 0

def test_group_advantage_is_rloo_scaled():
    """Leave-one-out (Ahmadian et al. 2024): r_i - mean of the others = G / (G - 1) (r_i - mean of all)."""
    reward, G = normal(15), 5
    rloo = [r - (sum(group) - r) / (G - 1) for group in reward.view(3, G).tolist() for r in group]
    assert (group_advantage(reward, G, False) * G / (G - 1)).tolist() == pytest.approx(rloo, abs=1e-6)

# the loss ------------------------------------------------------------------------------------------------------------

def test_aggregate_by_hand():
    """Answers of 1, 3 and 2 tokens, at most 4."""
    x, mask = torch.arange(1.0, 16).view(3, 5), ragged([1, 3, 2], 5)
    assert aggregate(x, mask, "tokens", 4).item() == pytest.approx((1 + 7 + 8 + 9 + 13 + 14) / 6)
    assert aggregate(x, mask, "sequence", 4).item() == pytest.approx((1 + 8 + 13.5) / 3)
    assert aggregate(x, mask, "constant", 4).item() == pytest.approx((1 + 24 + 27) / 12)
    for norm in ("tokens", "sequence", "constant"):  # prompts and padding are no matter
        assert aggregate(x.where(mask, -77.0), mask, norm, 4) == aggregate(x, mask, norm, 4)

@pytest.mark.parametrize("norm", ["tokens", "sequence", "constant"])
def test_at_the_first_update_it_is_the_policy_gradient(norm):
    """d loss / d logp = -A / (number of tokens, or B x length, or B x longest)."""
    mask, advantages, logp = ragged([1, 8, 3, 5], 12), normal(4, 1), normal(4, 12, seed=2).requires_grad_()
    losses, share = ppo_loss(logp, logp.detach(), advantages, mask, 0.2)
    aggregate(losses, mask, norm, 9).backward()
    n = mask.sum(dim=1, keepdim=True)
    wanted = -advantages * mask / {"tokens": mask.sum(), "sequence": 4 * n, "constant": 36}[norm]
    torch.testing.assert_close(logp.grad, wanted)
    assert share == 0

def test_clip():
    """clip 0.2; it acts where the ratio has left [0.8, 1.2] in the direction that the advantage likes."""
    one = torch.ones(1, 1, dtype=torch.bool)
    for ratio, advantage, wanted, acts in [(1.5, 1, -1.2, 1), (0.5, 1, -0.5, 0), (1.5, -1, 1.5, 0), (0.5, -1, 0.8, 1)]:
        logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
        loss, share = ppo_loss(logp, torch.zeros(1, 1), torch.tensor([[float(advantage)]]), one, 0.2)
        loss.sum().backward()
        assert (loss.item(), share.item()) == (pytest.approx(wanted), acts)
        assert logp.grad.item() == pytest.approx(0 if acts else -advantage * ratio)  # held: no gradient

# the KL on seven words, where every expectation is a sum --------------------------------------------------------------

def seven():
    """Logits of pi (to be differentiated), log pi_sft, both over 7 words, in float64."""
    return normal(7).double().requires_grad_(), normal(7, seed=2).double().log_softmax(dim=-1)

def expected(kind, weight=None):
    """The mean of an estimator over the words that pi may draw -> value, gradient. The draw itself is not
    differentiated, as in a loss on stored samples. weight multiplies each word's term."""
    logits, then = seven()
    now = logits.log_softmax(dim=-1)
    each = kl_penalty(now.expand(7, 7), then.expand(7, 7), torch.arange(7), kind)
    value = (now.detach().exp() * (1 if weight is None else weight(now.detach() - then)) * each).sum()
    value.backward()
    return value.item(), logits.grad

def exact():
    logits, then = seven()
    now = logits.log_softmax(dim=-1)
    kl = sum(p.exp() * (p - q) for p, q in zip(now, then))
    kl.backward()
    return kl.item(), logits.grad

def test_exact_kl():
    value, grad = expected("exact")
    assert value == pytest.approx(exact()[0], rel=1e-9)
    torch.testing.assert_close(grad, exact()[1])

def test_values_of_the_estimators():
    """k1 and k3 are unbiased; k2 is not, and k3 is never negative."""
    kl, _ = exact()
    assert expected("k1")[0] == pytest.approx(kl) == expected("k3")[0]
    assert abs(expected("k2")[0] - kl) > 0.05 * kl
    logits, then = seven()
    each = kl_penalty(logits.log_softmax(-1).expand(7, 7), then.expand(7, 7), torch.arange(7), "k3")
    assert each.min() >= 0

def test_gradients_of_the_estimators():
    """As a loss: k1 pulls nowhere, k2 exactly as the KL itself, k3 as KL(pi_sft || pi): pi - pi_sft."""
    _, wanted = exact()
    assert expected("k1")[1].abs().max() < 1e-12
    torch.testing.assert_close(expected("k2")[1], wanted)
    logits, then = seven()
    torch.testing.assert_close(expected("k3")[1], (logits.softmax(dim=-1) - then.exp()).detach())
    assert (expected("k3")[1] - wanted).abs().max() > 0.01

# the model: Part 8's without the critic -------------------------------------------------------------------------------

def test_actor_critic_is_gone():
    assert not hasattr(this, "ActorCritic") and {"GPT", "RewardModel", "KVCache", "MoE"} <= set(vars(this))

def test_causality(models):
    idx = torch.randint(END, (1, 10), generator=torch.Generator().manual_seed(1))
    before = models[0](idx)[0]
    for t in range(10):
        other = idx.clone()
        other[0, t] = (idx[0, t] + 1) % END
        moved = (models[0](other)[0] - before).abs().amax(dim=-1)[0] > 0
        assert torch.equal(moved, torch.arange(10) >= t)

def test_cached_generation_and_precision(models):
    """Greedy with the cache = greedy without; logits in fp32 within 1e-4 of float64."""
    idx = torch.randint(END, (3, 5), generator=torch.Generator().manual_seed(1))
    out, slow = models[0].generate(idx, 8, temperature=0), idx
    for _ in range(8):
        slow = torch.cat([slow, models[0](slow)[0][:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(out, slow)
    exact = randomised(GPT(GPTConfig(**TINY))).double()(idx)[0]
    assert (models[0](idx)[0] - exact).abs().max() < 1e-4

def test_gradient_flow(models):
    policy, (cfg, batch) = randomised(GPT(GPTConfig(**TINY))), roll(models)
    update(policy, cfg, batch, normal(16), lr=0.0)
    for name, p in policy.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name
    cfg.kl_coef = 0.0
    update(policy, cfg, batch, torch.zeros(16), lr=0.0)  # equal groups and no KL: nothing is learned
    assert all((p.grad == 0).all() for p in policy.parameters())

# rollout, learn ------------------------------------------------------------------------------------------------------

def update(policy, cfg, batch, advantages, lr=1e-3):
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    return learn(policy, optimizer, batch, advantages, cfg, torch.Generator().manual_seed(0))

@torch.no_grad()
def test_rollout_row_by_row(models):
    """Within 1e-4 of a walk along each row alone."""
    cfg, batch = roll(models)
    then = iter(batch["then"])
    for b, (ids, n) in enumerate(zip(batch["ids"].tolist(), batch["starts"].tolist())):
        end = next((t + 1 for t in range(n, n + 8) if ids[t] == END), n + 8)  # one past the answer
        assert (batch["lengths"][b], batch["ended"][b]) == (end, ids[end - 1] == END)
        assert batch["mask"][b].nonzero()[:, 0].tolist() == list(range(n - 1, end - 1))
        logp, other = (m(torch.tensor([ids[:end]]))[0][0].log_softmax(dim=-1) for m in models)
        for t in range(n - 1, end - 1):
            assert batch["logp"][b, t].item() == pytest.approx(logp[t, ids[t + 1]].item(), abs=1e-4)
            torch.testing.assert_close(next(then), other[t], atol=1e-4, rtol=0)
    assert next(then, None) is None

def test_minibatches_see_their_own_reference(models):
    """The mean of two minibatches' KL is the batch's: each row is compared with its own reference log-probabilities."""
    cfg, batch = roll(models, kl_coef=1.0)
    policy, found = randomised(GPT(GPTConfig(**TINY))), []
    for kind in ("exact", "k3"):
        cfg.kl = kind
        now = log_probs(policy, batch["ids"][:, :-1], batch["mask"])
        wanted = kl_penalty(now, batch["then"], batch["ids"][:, 1:][batch["mask"]], kind)
        each = torch.zeros_like(batch["logp"]).masked_scatter(batch["mask"], wanted)
        cfg.loss_norm = "sequence"  # equal weights for answers: the mean of two halves is the whole
        losses = update(policy, cfg, batch, torch.zeros(16), lr=0.0)["loss"]
        found.append(sum(losses) / 2)
        assert len(losses) == 2
        assert found[-1] == pytest.approx(aggregate(each, batch["mask"], "sequence", 8).item(), rel=1e-4)
    assert found[0] != found[1]

def test_the_first_ratio_is_1_unless_sampler_and_scorer_differ(models):
    policy = randomised(GPT(GPTConfig(**TINY)))
    assert update(policy, *roll(models), normal(16))["first_ratio_error"] < 1e-4
    policy.generate = functools.partial(policy.generate, temperature=0.7)
    assert update(policy, *roll((policy, models[1])), normal(16))["first_ratio_error"] > 0.05

def test_evaluate_by_task(models):
    tasks = ["story", "sum", "story", "sum", "sum"]
    records = [{"prompt": [1 + i], "task": t, "check": {"answer": "x"}} for i, t in enumerate(tasks)]
    torch.manual_seed(0)
    gold, kl, answers = evaluate(*models, STUB, records, Config(max_new_tokens=3), "cpu")
    assert gold == {"story": 0.0, "sum": 0.0} and kl > 0 and len(answers) == 5
    assert judged([{"check": {"answer": "7"}}, {}], [("7", True)] * 2).tolist()[0] == 1.0

def test_it_learns_what_is_rewarded_and_then_says_it():
    """One batch of prompts, reward for "7, end", and greedy generation returns it."""
    torch.manual_seed(0)
    policy, reference = GPT(GPTConfig(**TINY)), GPT(GPTConfig(**TINY))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3, eps=1e-5, weight_decay=0.0)
    cfg = Config(max_new_tokens=5, kl_coef=0.0, group=8)
    records, generator = [{"prompt": [1 + i] * (1 + i)} for i in range(6) for _ in range(8)], torch.Generator()
    for _ in range(60):
        batch = rollout(policy, reference, STUB, records, cfg, "cpu")
        first = batch["ids"].gather(1, batch["starts"][:, None])[:, 0] == 7
        reward = first.float() - 0.2 * (batch["lengths"] - batch["starts"] - 2).abs()
        learn(policy, optimizer, batch, group_advantage(reward, 8, False), cfg, generator)
    policy.generate = functools.partial(policy.generate, temperature=0)
    assert texts(rollout(policy, reference, STUB, records[::8], cfg, "cpu"), STUB) == [("[7]", True)] * 6

# DPO -----------------------------------------------------------------------------------------------------------------

def pairs():
    rows = [([1, 2], [3, 4, END], [5, END]), ([1], [6, END], [7, 8, 9, END]), ([2, 2, 2], [3, END], [4, END])]
    return [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows]

def test_answer_logp_is_the_sum_over_the_answer(models):
    ids, starts, lengths = collate(pairs())
    found = answer_logp(models[0], ids, starts, lengths).tolist()
    for row, n, end, sum_ in zip(ids.tolist(), starts, lengths, found):
        logp = models[0](torch.tensor([row[:end]]))[0][0].log_softmax(dim=-1)
        assert sum_ == pytest.approx(sum(logp[t - 1, row[t]].item() for t in range(n, end)), abs=1e-4)

def test_dpo_loss_at_the_start_is_ln_2(models):
    mine = pairs()
    reference_logp(models[0], mine, "cpu")
    loss, margin = loss_of(models[0], mine, 0.1, "cpu")
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6) and margin.abs().max() < 1e-5

def test_dpo_loss_and_its_gradient_by_hand():
    """loss = -log sigmoid(beta ((c - rc) - (r - rr))); d / d logp of the chosen = -beta sigmoid(-margin)."""
    logp, reference = torch.tensor([-3.0, -5.0], requires_grad=True), torch.tensor([-4.0, -4.5])
    loss, margin = dpo_loss(logp, reference, 0.5)
    loss.backward()
    assert margin.item() == pytest.approx(0.5 * (1 + 0.5))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.75)))
    slope = 0.5 / (1 + math.exp(0.75))
    assert logp.grad.tolist() == pytest.approx([-slope, slope])

def test_dpo_overfits_one_batch_and_says_it(models):
    policy, mine = randomised(GPT(GPTConfig(**TINY))), pairs()
    reference_logp(models[0], mine, "cpu")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        loss, margin = loss_of(policy, mine, 0.3, "cpu")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 and (margin > 1).all()
    for p in mine:  # it prefers the chosen, though it need not say it: the loss knows differences alone
        c, r = answer_logp(policy, *collate([p])).tolist()
        assert c - p["reference"][0] > r - p["reference"][1]
