"""
Tests of the model of Part 9, which is that of Part 8 without the critic. GRPO and DPO build on
three of its promises: no token sees the future, generate() says with which probability it drew each
token, and every parameter gets a gradient.
"""

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import model as this
from model import GPT, GPTConfig, RewardModel
from shared import ROOT

END = 12
CONFIG = GPTConfig(vocab_size=13, block_size=24, n_layer=2, n_head=4, n_embd=16, mlp_dim=12)


def randomised(model, seed=0):
    """The model with random parameters, and gains near 1. The projections of a new model are zero,
    and a zero would hide everything that stands before it."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = 0.2 * torch.randn(p.shape, generator=generator)
        is_gain = p.ndim == 1 and p.data.mean() > 0.5
        p.data = 1 + noise if is_gain else noise
    return model


@pytest.fixture(scope="module")
def gpt():
    return randomised(GPT(CONFIG))


def random_ids(*shape, seed=1):
    return torch.randint(END, shape, generator=torch.Generator().manual_seed(seed))


def assert_near(actual, expected, rtol=1e-4):
    """Equal up to rounding, which grows with the size of the numbers."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-5 * scale)


# a copy -------------------------------------------------------------------------------------------


def definitions(part):
    """{name: code} of the classes and functions of a model.py."""
    tree = ast.parse((ROOT / part / "model.py").read_text())
    return {node.name: ast.dump(node) for node in tree.body if hasattr(node, "name")}


def test_only_the_critic_is_gone():
    before = definitions("part_8")
    after = definitions("part_9")
    assert set(before) - set(after) == {"ActorCritic"}
    assert {name for name in after if after[name] != before[name]} == set()
    assert not hasattr(this, "ActorCritic")


def test_a_checkpoint_comes_back(gpt):
    loaded = GPT.load(gpt.to_checkpoint())
    assert loaded.cfg == gpt.cfg
    ids = random_ids(2, 7)
    assert torch.equal(loaded(ids)[0], gpt(ids)[0])


def test_a_checkpoint_with_another_trunk_is_refused(gpt):
    checkpoint = gpt.to_checkpoint()
    weights = dict(checkpoint["weights"])
    del weights["h.1.attn.c_q.weight"]
    with pytest.raises(AssertionError, match="h.1.attn.c_q.weight"):
        GPT.load({**checkpoint, "weights": weights})


# what the trainers build on -----------------------------------------------------------------------


def test_no_token_sees_the_future(gpt):
    ids = random_ids(1, 10)
    before = gpt(ids)[0][0]  # (T, V)
    for t in range(10):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % END
        after = gpt(changed)[0][0]

        # Positions before t cannot move at all, t and those after it must.
        moved = (after - before).abs().amax(dim=-1) > 1e-4
        assert torch.equal(moved, torch.arange(10) >= t), f"position {t}"


def test_the_cache_changes_nothing(gpt):
    ids = random_ids(3, 5)
    expected = ids
    for _ in range(8):
        next_ids = gpt(expected)[0][:, -1:].argmax(dim=-1)
        expected = torch.cat([expected, next_ids], dim=1)
    assert torch.equal(gpt.generate(ids, 8, temperature=0), expected)


def test_fp32_is_near_fp64(gpt):
    ids = random_ids(3, 5)
    exact = randomised(GPT(CONFIG)).double()(ids)[0]
    assert_near(gpt(ids)[0], exact.float())


def test_generate_states_the_probability_of_each_token(gpt):
    """In a batch of prompts of different lengths, against a walk along each row alone."""
    prompts = random_ids(4, 5)
    lengths = torch.tensor([2, 5, 3, 4])
    torch.manual_seed(0)
    ids, logp = gpt.generate(prompts, 8, lengths=lengths, stop=END, return_logp=True)

    for row, row_logp, length in zip(ids, logp, lengths.tolist()):
        sampled = row_logp.isfinite().nonzero()[:, 0].tolist()
        end = sampled[-1] + 1
        assert sampled == list(range(length, end)), "an answer has no holes"
        assert end - length == 8 or row[end - 1] == END, "it goes on until it stops"
        assert END not in row[length : end - 1], "nothing comes after the stop token"

        all_logp = gpt(row[None, :end])[0][0].log_softmax(dim=-1)  # (T, V)
        expected = all_logp[range(length - 1, end - 1), row[length:end]]
        assert_near(row_logp[length:end], expected.detach())


def test_every_parameter_gets_a_gradient():
    gpt = randomised(GPT(CONFIG))
    ids = random_ids(4, 9)
    _, loss = gpt(ids[:, :-1], ids[:, 1:])
    loss.backward()
    for name, p in gpt.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name


def test_a_reward_is_the_mean_over_the_answer():
    """The reward is the mean over the answer's tokens, and padding cannot change it."""
    rm = randomised(RewardModel(CONFIG))
    ids = random_ids(2, 9)
    starts = torch.tensor([2, 3])
    lengths = torch.tensor([6, 9])
    reward = rm(ids, starts, lengths)

    scores = rm.token_scores(ids, torch.ones_like(ids, dtype=torch.bool))  # (B, T)
    expected = torch.stack([scores[0, 2:6].mean(), scores[1, 3:9].mean()])
    assert_near(reward, expected)

    padded = ids.clone()
    padded[0, 6:] = END
    assert_near(rm(padded, starts, lengths), reward)
