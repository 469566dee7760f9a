"""
Tests of Part 7's model: the trunk is Part 6's, and the reward model reads the right scores from it.
The oracle is `reference_scores`: the whole network once more in float64, for one answer at a time
and without padding.
"""

import ast
import importlib.util
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, RewardModel
from shared import ROOT
from train_rm import collate, preference_loss, rewards

END = 12
CONFIG = GPTConfig(vocab_size=13, block_size=24, n_layer=2, n_head=4, n_embd=16, mlp_dim=12)
KINDS = [("implicit", False), ("mean", False), ("last", False), ("mean", True), ("last", True)]


def randomised(model, seed=0):
    """The model with random parameters, and gains near 1. The projections of a new model are zero,
    and a zero would hide everything that stands before it."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = 0.2 * torch.randn(p.shape, generator=generator)
        is_gain = p.ndim == 1 and p.data.mean() > 0.5
        p.data = 1 + noise if is_gain else noise
    return model


def make_model(head="implicit", bidirectional=False):
    return randomised(RewardModel(CONFIG, head, bidirectional))


def make_pairs(n=7, seed=0):
    """n pairs of random prompts and answers of different lengths. Id 0 never occurs in them."""
    rng = random.Random(seed)

    def words(shortest, longest):
        return [rng.randrange(1, END) for _ in range(rng.randint(shortest, longest))]

    pairs = []
    for _ in range(n):
        pair = {"prompt_ids": words(2, 7)}
        pair["chosen_ids"] = [*words(1, 9), END]
        pair["rejected_ids"] = [*words(1, 9), END]
        pairs.append(pair)
    return pairs


def assert_near(actual, expected, rtol=1e-4):
    """Equal up to rounding, which grows with the size of the numbers."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-5 * scale)


# the reference ------------------------------------------------------------------------------------


def reference_norm(x, gain):
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + CONFIG.norm_eps).sqrt() * gain


def reference_rope(x):
    """x (H, T, D): each pair of channels is turned by position * base ** (-2i / D)."""
    T, D = x.shape[-2:]
    theta = CONFIG.rope_base ** -(torch.arange(0, D, 2) / D).double()  # (D/2,)
    angle = torch.outer(torch.arange(T).double(), theta)  # (T, D/2)
    x1, x2 = x.chunk(2, dim=-1)
    turned = torch.cat([-x2, x1], dim=-1)
    return x * angle.cos().repeat(1, 2) + turned * angle.sin().repeat(1, 2)


def reference_scores(model, ids, causal):
    """One row of T ids without padding -> the raw score of each token (T,), in float64."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    T = len(ids)
    may_see = torch.ones(T, T, dtype=torch.bool)
    if causal:
        may_see = may_see.tril()

    x = weights["wte.weight"][ids]  # (T, C)
    for layer in range(CONFIG.n_layer):
        block = {}
        for name, tensor in weights.items():
            if name.startswith(f"h.{layer}."):
                block[name.removeprefix(f"h.{layer}.").removesuffix(".weight")] = tensor

        # attention: queries and keys are normalized and rotated, each key serves two queries
        y = reference_norm(x, block["ln_1"])
        q = (y @ block["attn.c_q"].T).view(T, -1, CONFIG.head_dim).transpose(0, 1)  # (H, T, D)
        k = (y @ block["attn.c_k"].T).view(T, -1, CONFIG.head_dim).transpose(0, 1)  # (G, T, D)
        v = (y @ block["attn.c_v"].T).view(T, -1, CONFIG.head_dim).transpose(0, 1)  # (G, T, D)
        q = reference_rope(reference_norm(q, block["attn.q_norm"]))
        k = reference_rope(reference_norm(k, block["attn.k_norm"]))
        group = CONFIG.n_head // CONFIG.n_kv_head
        k = k.repeat_interleave(group, dim=0)  # (H, T, D)
        v = v.repeat_interleave(group, dim=0)  # (H, T, D)
        scores = q @ k.transpose(1, 2) / math.sqrt(CONFIG.head_dim)  # (H, T, T)
        scores = scores.masked_fill(~may_see, -math.inf)
        y = scores.softmax(dim=-1) @ v
        x = x + y.transpose(0, 1).reshape(T, -1) @ block["attn.c_proj"].T

        # MLP
        y = reference_norm(x, block["ln_2"])
        gate = F.silu(y @ block["mlp.c_gate"].T)
        x = x + gate * (y @ block["mlp.c_fc"].T) @ block["mlp.c_proj"].T

    # The heads: a linear layer on the state after the token, or the log-probability of the token
    # in the state before it.
    x = reference_norm(x, weights["ln_f.weight"])
    if model.head != "implicit":
        return x @ weights["score_head.weight"][0]
    before = torch.cat([torch.zeros(1, CONFIG.n_embd), x[:-1]])
    logits = before @ weights["lm_head.weight"].T  # (T, V)
    chosen = logits[torch.arange(T), ids]
    return RewardModel.BETA * (chosen - logits.exp().sum(dim=-1).log())


# the trunk ----------------------------------------------------------------------------------------


def load_part_6():
    spec = importlib.util.spec_from_file_location("part_6_model", ROOT / "part_6/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_trunk_is_part_6s():
    part_6 = load_part_6()
    this = randomised(GPT(CONFIG))
    before = part_6.GPT(CONFIG)
    before.load_state_dict(this.state_dict())

    ids, _, _ = collate(make_pairs())
    logits, loss = this(ids, ids)
    logits_before, loss_before = before(ids, ids)
    assert_near(logits, logits_before)
    assert_near(loss, loss_before)
    generated = this.generate(ids, 6, temperature=0)
    assert torch.equal(generated, before.generate(ids, 6, temperature=0))


def test_no_other_definition_changed():
    definitions = {}
    for part in ("part_6", "part_7"):
        tree = ast.parse((ROOT / part / "model.py").read_text())
        nodes = [node for node in tree.body if hasattr(node, "name")]
        definitions[part] = {node.name: ast.dump(node) for node in nodes}
    changed = set()
    for name, code in definitions["part_7"].items():
        if definitions["part_6"].get(name) != code:
            changed.add(name)
    assert changed == {"GPT", "RewardModel"}


def test_loading_an_sft_model_adds_only_the_heads():
    sft = randomised(GPT(CONFIG)).to_checkpoint()
    model = RewardModel.load(sft, head="last", bidirectional=True)
    assert model.head == "last"
    assert model.bidirectional is True

    state = model.state_dict()
    buffers = {"beta", "shift", "scale"}
    assert set(state) - set(sft["weights"]) == {"score_head.weight", *buffers}
    assert set(RewardModel.load(sft).state_dict()) - set(sft["weights"]) == buffers
    for name, tensor in sft["weights"].items():
        assert torch.equal(state[name], tensor), f"{name} must be the SFT model's"


@pytest.mark.parametrize("missing", ["h.0.ln_1.weight", "wte.weight", "ln_f.weight"])
def test_a_trunk_with_a_missing_weight_is_refused(missing):
    checkpoint = GPT(CONFIG).to_checkpoint()
    weights = dict(checkpoint["weights"])
    del weights[missing]
    with pytest.raises(AssertionError, match=f"does not fit the trunk.*{missing}"):
        RewardModel.load({**checkpoint, "weights": weights})


def test_a_trunk_with_too_many_layers_is_refused():
    checkpoint = GPT(CONFIG).to_checkpoint()
    checkpoint["gpt_config"]["n_layer"] = 1
    with pytest.raises(AssertionError, match="does not fit the trunk.*h.1.attn"):
        RewardModel.load(checkpoint)


def test_a_checkpoint_comes_back():
    model = make_model("last", bidirectional=True)
    model.shift.fill_(0.3)
    model.scale.fill_(1.7)
    loaded = RewardModel.load(model.to_checkpoint(), head="last", bidirectional=True)
    batch = collate(make_pairs())
    assert torch.equal(loaded(*batch), model(*batch))


# rewards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head, bidirectional", KINDS)
def test_rewards_against_the_reference(head, bidirectional):
    """Only the answer's tokens count, and the other rows of a batch change nothing."""
    model = make_model(head, bidirectional)
    model.shift.fill_(0.5)
    model.scale.fill_(2.0)
    pairs = make_pairs()
    chosen, rejected = rewards(model, pairs, "cpu")
    for side, actual in (("chosen_ids", chosen), ("rejected_ids", rejected)):
        expected = []
        for pair in pairs:
            ids = pair["prompt_ids"] + pair[side]
            scores = reference_scores(model, ids, causal=not bidirectional)
            answer_scores = scores[len(pair["prompt_ids"]) :]
            raw = answer_scores[-1] if head == "last" else answer_scores.mean()
            expected.append((raw - 0.5) * 2)
        assert_near(actual, torch.stack(expected).float())


@pytest.mark.parametrize("head, bidirectional", KINDS)
def test_padding_changes_nothing(head, bidirectional):
    model = make_model(head, bidirectional)
    ids, starts, lengths = collate(make_pairs())
    expected = model(ids, starts, lengths)

    # Wider rows, and random tokens instead of zeros behind the answers.
    generator = torch.Generator().manual_seed(1)
    junk = torch.randint(13, (len(ids), 24), generator=generator)
    is_text = torch.arange(24) < lengths[:, None]
    wide = torch.where(is_text, F.pad(ids, (0, 24 - ids.size(1))), junk)
    assert_near(model(wide, starts, lengths), expected)

    # Each row alone and without padding.
    alone = []
    for b, length in enumerate(lengths.tolist()):
        row = ids[b : b + 1, :length]
        alone.append(model(row, starts[b : b + 1], lengths[b : b + 1]))
    assert_near(torch.cat(alone), expected)


@pytest.mark.parametrize(
    "head, expected",
    [("implicit", [4.0, 4.0]), ("mean", [4.0, 4.0]), ("last", [5.0, 7.0])],
)
def test_which_token_scores_count(head, expected):
    """The score of position t is t. The answers are 3, 4, 5 and 1, ..., 7."""
    model = make_model(head)
    model.token_scores = lambda idx, answer, lengths: torch.arange(8.0) * answer
    ids = torch.zeros(2, 8, dtype=torch.long)
    reward = model(ids, torch.tensor([3, 1]), torch.tensor([6, 8]))
    assert reward.tolist() == expected


@pytest.mark.parametrize("head, bidirectional", KINDS)
def test_what_a_token_sees(head, bidirectional):
    """A changed token moves its own score and all later ones, in an encoder every score. What
    stands in the padding moves nothing."""
    model = make_model(head, bidirectional)
    lengths = torch.tensor([10])
    ids = torch.randint(END, (1, 12), generator=torch.Generator().manual_seed(1))
    answer = torch.ones_like(ids, dtype=torch.bool)
    before = model.token_scores(ids, answer, lengths)[0, :10]
    for t in range(12):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % END
        after = model.token_scores(changed, answer, lengths)[0, :10]
        moved = (after - before).abs() > 1e-6 * before.abs().max()

        expected = torch.arange(10) >= t
        if bidirectional:
            expected = torch.full((10,), t < 10)
        if head == "implicit" and t == 0:
            expected[0] = False  # nothing stands before it, so every token is equally likely
        assert torch.equal(moved, expected), f"position {t}"


# the heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["mean", "last"])
def test_score_head_is_a_linear_layer_on_the_state_after_the_token(head):
    model = make_model(head)
    ids, starts, lengths = collate(make_pairs())
    answer = torch.arange(ids.size(1)) >= starts[:, None]
    expected = model.trunk(ids) @ model.score_head.weight[0]
    assert_near(model.token_scores(ids, answer), expected * answer)


def test_an_implicit_reward_starts_as_the_sft_models_mean_log_probability():
    """SimPO's reward, beta / |y| log p(y | x), by the SFT model's own loss on the answer alone."""
    sft = randomised(GPT(CONFIG))
    model = RewardModel.load(sft.to_checkpoint())
    ids, starts, lengths = collate(make_pairs())
    reward = model(ids, starts, lengths)
    for b in range(len(ids)):
        row = ids[b : b + 1, : lengths[b]]
        targets = row[:, 1:].clone()
        targets[:, : starts[b] - 1] = -100
        _, loss = sft(row[:, :-1], targets)
        assert_near(reward[b], -RewardModel.BETA * loss)


def test_a_checkpoint_keeps_the_beta_that_it_was_trained_with(monkeypatch):
    """Part 8's PPO would otherwise read the rewards of Exercise 1 with another BETA."""
    sft = randomised(GPT(CONFIG))
    monkeypatch.setattr(RewardModel, "BETA", 5.0)
    trained = RewardModel.load(sft.to_checkpoint())
    monkeypatch.undo()
    loaded = RewardModel.load(trained.to_checkpoint())
    assert_near(loaded(*collate(make_pairs())), trained(*collate(make_pairs())))


def test_score_head_starts_at_the_published_size():
    """N(0, 1 / (C + 1)). With 1,024 channels the standard deviation is known within 7 %."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=2, n_layer=1, n_head=1, n_kv_head=1, head_dim=2, mlp_dim=1)
    model = RewardModel(GPTConfig(n_embd=1024, **sizes), head="mean")
    assert model.score_head.weight.std().item() == pytest.approx(1025**-0.5, rel=0.07)
    assert model.score_head.bias is None


@pytest.mark.parametrize("head, bidirectional", KINDS)
def test_every_parameter_gets_a_gradient(head, bidirectional):
    """And the embedding only for the tokens that were read: padding, id 0, is none of them."""
    model = make_model(head, bidirectional)
    ids, starts, lengths = collate(make_pairs())
    chosen, rejected = model(ids, starts, lengths).chunk(2)
    preference_loss(chosen, rejected, center=0.01).backward()
    for name, p in model.named_parameters():
        if name == "lm_head.weight" and head != "implicit":
            continue  # only an implicit reward reads it
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name

    is_text = torch.arange(ids.size(1)) < lengths[:, None]
    assert (~is_text).any()
    was_read = torch.zeros(13, dtype=torch.bool)
    was_read[ids[is_text]] = True
    assert not was_read[0]
    if head == "implicit":
        was_read[END] = False  # what would come after the end token is nobody's question
    assert torch.equal(model.wte.weight.grad.abs().sum(dim=1) > 0, was_read)


def test_gradients_are_the_same_each_time():
    """To the last bit, with two threads, too. Indexing a table by ids would add up its gradient in
    any order; F.embedding adds it in one."""
    model = make_model()
    batch = collate(make_pairs() * 40)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    gradients = []
    for _ in range(6):
        model.zero_grad()
        model(*batch).sum().backward()
        gradients.append(model.lm_head.weight.grad.clone())
    torch.set_num_threads(threads)
    for gradient in gradients:
        assert torch.equal(gradient, gradients[0])
