"""
Tests of Part 8's model: everything but ActorCritic is Part 7's, the policy is the SFT model until
it is trained, and the critic sees no more than the actor.
"""

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

from model import GPT, ActorCritic, GPTConfig, RewardModel
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


def random_ids(B, T, seed=1):
    return torch.randint(END, (B, T), generator=torch.Generator().manual_seed(seed))


def everywhere(ids):
    return torch.ones_like(ids, dtype=torch.bool)


def assert_near(actual, expected, rtol=1e-4):
    """Equal up to rounding, which grows with the size of the numbers."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-5 * scale)


def test_only_the_actor_critic_is_new():
    definitions = {}
    for part in ("part_7", "part_8"):
        tree = ast.parse((ROOT / part / "model.py").read_text())
        nodes = [node for node in tree.body if hasattr(node, "name")]
        definitions[part] = {node.name: ast.dump(node) for node in nodes}
    assert definitions["part_8"].pop("ActorCritic")
    assert definitions["part_8"] == definitions["part_7"]


def test_loading_an_sft_model_adds_a_value_head_that_is_zero():
    sft = randomised(GPT(CONFIG))
    policy = ActorCritic.load(sft.to_checkpoint())
    new = set(policy.state_dict()) - set(sft.state_dict())
    assert new == {"v_head.weight"}
    assert policy.v_head.bias is None

    ids = random_ids(2, 6)
    logits, values = policy.act(ids, everywhere(ids))
    assert torch.equal(values, torch.zeros(2, 6)), "a random critic would be noise"
    assert_near(logits.view(2, 6, 13), sft(ids)[0])


def test_what_was_trained_writes_without_its_critic():
    policy = randomised(ActorCritic(CONFIG))
    ids = random_ids(2, 6)
    logits, values = policy.act(ids, everywhere(ids))

    writer = GPT.load(policy.to_checkpoint())
    assert_near(writer(ids)[0].flatten(0, 1), logits)
    with_critic = ActorCritic.load(policy.to_checkpoint())
    assert torch.equal(with_critic.act(ids, everywhere(ids))[1], values)
    assert values.abs().min() > 0


def test_logits_are_those_of_the_masked_positions_in_order():
    policy = randomised(ActorCritic(CONFIG))
    ids = random_ids(3, 5)
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 1, 0]]).bool()
    logits, values = policy.act(ids, mask)
    expected_logits = policy(ids)[0]
    expected = [expected_logits[b, t] for b, t in [(0, 1), (0, 2), (1, 4), (2, 0), (2, 3)]]
    assert_near(logits, torch.stack(expected))
    assert values.shape == (3, 5), "values are those of all positions"
    assert_near(values, policy.trunk(ids) @ policy.v_head.weight[0])


def test_a_changed_token_moves_nothing_before_it():
    """The critic may know no more than the actor: the tokens so far."""
    policy = randomised(ActorCritic(CONFIG))
    ids = random_ids(1, 10)
    logits, values = policy.act(ids, everywhere(ids))
    for t in range(10):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % END
        new_logits, new_values = policy.act(changed, everywhere(changed))
        logits_moved = (new_logits - logits).abs().amax(dim=1) > 1e-6 * logits.abs().max()
        values_moved = (new_values - values)[0].abs() > 1e-6 * values.abs().max()
        assert torch.equal(logits_moved, torch.arange(10) >= t), f"logits, position {t}"
        assert torch.equal(values_moved, torch.arange(10) >= t), f"values, position {t}"


def test_at_zero_the_critic_learns_first_and_leaves_the_trunk_alone():
    torch.manual_seed(0)
    policy = ActorCritic(CONFIG)
    ids = random_ids(3, 9)
    _, values = policy.act(ids, everywhere(ids))
    (values - 1).square().mean().backward()
    touched = set()
    for name, p in policy.named_parameters():
        if p.grad is not None and p.grad.any():
            touched.add(name)
    assert touched == {"v_head.weight"}


@pytest.mark.parametrize("seed", [0, 1])
def test_every_parameter_gets_a_gradient(seed):
    policy = randomised(ActorCritic(CONFIG), seed)
    ids = random_ids(3, 9)
    logits, values = policy.act(ids, everywhere(ids))
    loss = logits.log_softmax(dim=-1)[:, 3].mean() + (values - 1).square().mean()
    loss.backward()
    for name, p in policy.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


# the critic that starts as the reward model -------------------------------------------------------


def make_pair_of_models(head):
    policy = randomised(ActorCritic(CONFIG, RewardModel(CONFIG, head), answer_length=5.0))
    policy.critic.shift.fill_(-0.5)
    policy.critic.scale.fill_(2.0)
    return policy


HEADS = ["implicit", "mean", "last"]


@pytest.mark.parametrize("head", HEADS)
def test_a_critic_of_its_own_leaves_the_policy_alone(head):
    policy = make_pair_of_models(head)
    assert not hasattr(policy, "v_head")
    ids = random_ids(2, 8)
    logits, values = policy.act(ids, everywhere(ids))
    assert_near(logits.view(2, 8, 13), policy(ids)[0])
    values.sum().backward()
    for name, p in policy.named_parameters():
        if not name.startswith("critic."):
            assert p.grad is None, f"the value loss must not move the policy: {name}"


@pytest.mark.parametrize("head", HEADS)
def test_the_first_guess_is_the_reward_of_what_has_been_read(head):
    """An answer of as many tokens as answer_length has, at its end, the reward that the reward
    model gives it. Before its first token it has the mean reward, 0."""
    policy = make_pair_of_models(head)
    ids = random_ids(2, 9)
    starts = torch.tensor([3, 4])
    lengths = torch.tensor([8, 9])  # five tokens each
    position = torch.arange(9)
    mask = (position >= starts[:, None] - 1) & (position < lengths[:, None] - 1)
    _, values = policy.act(ids, mask)
    reward = policy.critic(ids, starts, lengths)
    assert_near(values[[0, 1], lengths - 1], reward)
    assert torch.equal(values[[0, 1], starts - 1], torch.zeros(2))

    # half way the tokens to come count as average ones
    if head != "last":
        half = policy.critic(ids, starts, starts + 2) * 2 / 5
        assert_near(values[[0, 1], starts + 1], half)


@pytest.mark.parametrize("head", HEADS)
def test_a_critic_of_its_own_knows_nothing_of_what_comes(head):
    policy = make_pair_of_models(head)
    ids = random_ids(1, 10)
    mask = torch.arange(10)[None] >= 2
    _, values = policy.act(ids, mask)
    for t in range(10):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % END
        _, new_values = policy.act(changed, mask)
        moved = (new_values - values)[0].abs() > 1e-6 * values.abs().max()
        assert not moved[:t].any(), f"a change at {t} moved an earlier value"
        if t >= 3:
            assert moved[t], f"position {t}"
