"""
Tests of part_5/model.py. The oracles are `reference`, Qwen3-MoE's forward pass written once more in
float64 with one token at a time in its experts, and Part 4's model.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

from model import GPT, MLP, GPTConfig, KVCache, MoE, sample

TINY = dict(vocab_size=13, block_size=16, n_layer=2, n_head=4, n_embd=16, n_kv_head=2, mlp_dim=12)
MIXED = TINY | dict(n_expert=4, top_k_experts=2)


def randomised(model, seed=0, std=0.2):
    """Makes every parameter random, with gains near 1. A projection that starts at zero would hide
    everything before it."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        is_gain = p.ndim == 1
        p.data = float(is_gain) + std * torch.randn(p.shape, generator=generator)
    return model


def make(**sizes):
    return randomised(GPT(GPTConfig(**{**MIXED, **sizes})))


def tokens(*shape, seed=1):
    return torch.randint(TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def balance(model):
    """The load-balancing loss of the last forward pass, the mean over the layers with experts."""
    losses = [block.mlp.balance for block in model.h if isinstance(block.mlp, MoE)]
    return torch.stack(losses).mean()


def close(actual, expected, relative=1e-5):
    """Are two tensors equal up to rounding, relative to the size of the numbers in them?"""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=relative, atol=relative * scale)


# parity ------------------------------------------------------------------------------------------


def rms(x, gain):
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * gain


def turned(x, base):
    theta = base ** -(torch.arange(0, x.size(-1), 2) / x.size(-1)).double()
    angle = torch.outer(torch.arange(x.size(2)).double(), theta).repeat(1, 2)
    x1, x2 = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-x2, x1], dim=-1) * angle.sin()


def expert(w, prefix, x):
    gate = w[f"{prefix}c_gate.weight"] @ x
    up = w[f"{prefix}c_fc.weight"] @ x
    return w[f"{prefix}c_proj.weight"] @ (F.silu(gate) * up)


def mixture(w, prefix, x, top_k):
    """Qwen3-MoE, one token at a time: softmax over all experts, the best top_k, and their weights
    scaled to sum to 1, unless there is only one (norm_topk_prob=False, Switch Transformers)."""
    if f"{prefix}router.weight" not in w:
        return torch.stack([expert(w, prefix, token) for token in x])
    rows = []
    for token in x:
        p = (w[f"{prefix}router.weight"] @ token).softmax(dim=-1)
        best = sorted(range(len(p)), key=lambda e: -p[e])[:top_k]
        total = sum(p[e] for e in best) if top_k > 1 else 1
        outputs = [p[e] / total * expert(w, f"{prefix}experts.{e}.", token) for e in best]
        rows.append(sum(outputs))
    return torch.stack(rows)


def reference(model, idx):
    w = {name: p.detach().double() for name, p in model.state_dict().items()}
    cfg = model.cfg
    B, T = idx.shape
    x = w["wte.weight"][idx]
    for i in range(cfg.n_layer):

        def linear(name, x, i=i):
            return x @ w[f"h.{i}.{name}.weight"].T

        y = rms(x, w[f"h.{i}.ln_1.weight"])
        q = rms(linear("attn.c_q", y).view(B, T, cfg.n_head, -1), w[f"h.{i}.attn.q_norm.weight"])
        k = rms(linear("attn.c_k", y).view(B, T, cfg.n_kv_head, -1), w[f"h.{i}.attn.k_norm.weight"])
        v = linear("attn.c_v", y).view(B, T, cfg.n_kv_head, -1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

        # each key/value head serves a group of query heads
        group = cfg.n_head // cfg.n_kv_head
        k = turned(k, cfg.rope_base).repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
        scores = turned(q, cfg.rope_base) @ k.transpose(-2, -1) / math.sqrt(cfg.head_dim)
        future = torch.ones(T, T).triu(1).bool()
        y = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v
        x = x + linear("attn.c_proj", y.transpose(1, 2).reshape(B, T, -1))
        y = rms(x, w[f"h.{i}.ln_2.weight"])
        x = x + mixture(w, f"h.{i}.mlp.", y.flatten(0, 1), cfg.top_k_experts).view_as(x)
    return rms(x, w["ln_f.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"top_k_experts": 1},
        {"top_k_experts": 4},
        {"n_expert": 7, "top_k_experts": 3},
        {"moe_every": 2},
        {"n_expert": 0},
    ],
    ids=str,
)
def test_logits_against_qwen3_moe(sizes):
    """fp32 against float64: within 1e-5 of the largest logit."""
    model = make(**sizes)
    idx = tokens(2, 16)
    exact = reference(model, idx)
    logits, _ = model(idx)
    assert (logits - exact).abs().max() < 1e-5 * exact.abs().max()


def test_without_experts_it_is_part_4():
    path = Path(__file__).resolve().parent.parent / "part_4/model.py"
    spec = importlib.util.spec_from_file_location("part_4_model", path)
    part_4 = importlib.util.module_from_spec(spec)
    sys.modules["part_4_model"] = part_4  # dataclasses look their module up
    spec.loader.exec_module(part_4)
    ours = make(n_expert=0)
    theirs = part_4.GPT(part_4.GPTConfig(**TINY))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())

    idx = tokens(2, 16)
    our_logits, our_loss = ours(idx, idx)
    their_logits, their_loss = theirs(idx, idx)
    assert torch.equal(our_logits, their_logits)
    assert torch.equal(our_loss, their_loss)


@pytest.mark.parametrize("top_k", [2, 3])
def test_identical_experts_are_one_mlp(top_k):
    """Whatever the router says, its weights sum to 1."""
    cfg = GPTConfig(**MIXED | dict(top_k_experts=top_k))
    moe = randomised(MoE(cfg))
    mlp = randomised(MLP(cfg), seed=5)
    for e in moe.experts:
        e.load_state_dict(mlp.state_dict())
    x = normal(3, 9, 16)
    close(moe(x), mlp(x))


def test_router_softmax_is_in_fp32_under_autocast():
    """A rounding error of bf16 must not decide which expert computes."""
    moe = randomised(MoE(GPTConfig(**MIXED)))
    seen = []
    softmax = torch.Tensor.softmax

    def spy(x, *args, **kwargs):
        seen.append(x.dtype)
        return softmax(x, *args, **kwargs)

    torch.Tensor.softmax = spy
    try:
        with torch.autocast("cpu", torch.bfloat16):
            moe(normal(3, 9, 16))
    finally:
        torch.Tensor.softmax = softmax
    assert seen == [torch.float32]
    assert moe.balance.dtype == torch.float32


@pytest.mark.parametrize("top_k", [1, 2])
def test_an_expert_gets_only_the_tokens_that_chose_it(top_k):
    moe = randomised(MoE(GPTConfig(**MIXED | dict(top_k_experts=top_k))))
    x = normal(3, 9, 16)
    asked = []
    for e in moe.experts:
        e.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0])))
    moe(x)

    logits = x.flatten(0, 1) @ moe.router.weight.T
    best = logits.argsort(dim=-1, descending=True)[:, :top_k]
    assert asked == [(best == e).sum().item() for e in range(4)]
    assert sum(asked) == 27 * top_k
    torch.testing.assert_close(moe.load, torch.tensor(asked) / (27 * top_k))


def test_moe_every():
    for every, wanted in ((1, "11111"), (2, "01010"), (3, "00100"), (9, "00000")):
        model = GPT(GPTConfig(**MIXED | dict(n_layer=5, moe_every=every)))
        has_experts = [isinstance(block.mlp, MoE) for block in model.h]
        assert "".join(str(int(has)) for has in has_experts) == wanted
        for block in model.h:
            if isinstance(block.mlp, MoE):
                assert len(block.mlp.experts) == 4


@pytest.mark.parametrize("sizes", [{"top_k_experts": 5}, {"top_k_experts": 0}, {"moe_every": 0}])
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(AssertionError, match="top_k_experts=|moe_every="):
        GPTConfig(**MIXED | sizes)


# the load-balancing loss -------------------------------------------------------------------------


def routed(tokens_per_expert, top_k=1, sure=50.0):
    """A mixture whose router sends as many one-hot tokens to each expert as asked for."""
    moe = MoE(GPTConfig(**MIXED | dict(top_k_experts=top_k)))
    moe.router.weight.data = sure * torch.eye(4, 16)
    experts = []
    for e, count in enumerate(tokens_per_expert):
        experts.extend([e] * count)
    moe(torch.eye(16)[None, experts])
    return moe


def test_balance_is_1_when_even_and_E_when_collapsed():
    even = routed([5, 5, 5, 5])
    assert even.balance.item() == pytest.approx(1, abs=1e-5)
    assert even.load.tolist() == [0.25] * 4

    collapsed = routed([0, 20, 0, 0])
    assert collapsed.balance.item() == pytest.approx(4, abs=1e-5)
    assert collapsed.load.tolist() == [0, 1, 0, 0]

    half = routed([10, 10, 0, 0])
    assert half.balance.item() == pytest.approx(2, abs=1e-5)


def test_balance_of_two_experts_that_take_everything():
    """With top_k = 2 of 4 experts, a collapse has balance E / top_k = 2."""
    moe = MoE(GPTConfig(**MIXED))
    moe.router.weight.data.zero_()
    moe.router.weight.data[0, 0] = 50.0
    moe.router.weight.data[1, 0] = 50.0
    moe(torch.eye(16)[None, [0] * 20])
    assert moe.load.tolist() == [0.5, 0.5, 0, 0]
    assert moe.balance.item() == pytest.approx(2, abs=1e-5)


def test_balance_against_its_formula():
    """E sum_e f_e P_e for each layer on its own: a collapse in one layer cannot hide behind the
    balance of another."""
    model = make()
    seen = []
    for block in model.h:
        block.mlp.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0].detach().flatten(0, 1))
        )
    model(tokens(3, 11))
    layers = []
    for block, x in zip(model.h, seen):
        p = (x @ block.mlp.router.weight.T).softmax(dim=-1)
        f = F.one_hot(p.topk(2).indices, 4).sum(dim=(0, 1)) / (2 * len(x))
        layers.append(sum(4 * f[e] * p[:, e].mean() for e in range(4)))
    assert abs(layers[0] - layers[1]) > 1e-3
    balances = [block.mlp.balance for block in model.h]
    torch.testing.assert_close(balances, layers, rtol=1e-4, atol=1e-5)


def test_descending_on_balance_balances():
    moe = randomised(MoE(GPTConfig(**MIXED)))
    moe.router.weight.data[0] += 2
    x = normal(8, 32, 16) + 0.5
    optimizer = torch.optim.Adam(moe.parameters(), lr=0.03)
    moe(x)
    before = moe.load.max().item()
    for _ in range(60):
        optimizer.zero_grad()
        moe(x)
        moe.balance.backward()
        optimizer.step()
    assert before > 0.45
    assert moe.load.max() < 0.35
    assert moe.balance < 1.1


# causality, the cache ----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"moe_every": 2, "top_k_experts": 1}], ids=str)
def test_causality(sizes):
    """A token is routed alone: no later token can push it away from its expert."""
    model = make(**sizes)
    idx = tokens(1, 10)
    logits, _ = model(idx)
    for t in range(10):
        edited = idx.clone()
        edited[0, t] = (edited[0, t] + 1) % TINY["vocab_size"]
        edited_logits, _ = model(edited)
        change = (logits - edited_logits).abs().amax(dim=-1)[0]
        moved = change > 1e-6 * logits.abs().max()
        assert not moved[:t].any(), t
        assert moved[t], t


@pytest.mark.parametrize("chunks", [[1] * 16, [7, 1, 1, 7], [15, 1], [16]], ids=str)
def test_cached_equals_uncached(chunks):
    model = make().requires_grad_(False)
    idx = tokens(2, 16)
    cache = KVCache(model.cfg, 2)
    parts = []
    start = 0
    for length in chunks:
        logits, _ = model(idx[:, start : start + length], cache=cache)
        parts.append(logits)
        start += length
    expected, _ = model(idx)
    close(torch.cat(parts, dim=1), expected)


# gradient flow, learning -------------------------------------------------------------------------


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_gradient_flow():
    """The text's loss reaches every parameter; it reaches a router through the weights of the
    experts that it chose."""
    model = make()
    _, loss = model(tokens(4, 16), tokens(4, 16, seed=2))
    for name, grad in gradients(loss, model).items():
        assert grad.isfinite().all(), name
        assert grad.abs().max() > 0, name


def test_balance_teaches_routers_and_what_feeds_them_never_experts():
    model = make(n_layer=1)
    model(tokens(4, 16))
    flows = {}
    for name, grad in gradients(balance(model), model).items():
        flows[name] = grad is not None and grad.abs().max().item() > 0
    assert flows["h.0.mlp.router.weight"]
    assert flows["wte.weight"]
    for name in flows:
        if "experts" in name or "lm_head" in name:
            assert not flows[name], name


def test_an_expert_that_nobody_chose_has_a_zero_gradient():
    """Zero and not None, because optimizers and distributed training expect one everywhere."""
    model = make(n_layer=1)
    _, loss = model(torch.tensor([[5]]), torch.tensor([[6]]))  # one token visits two experts
    grads = gradients(loss, model)
    chosen = model.h[0].mlp.load > 0
    assert chosen.sum() == 2
    for e in range(4):
        g = grads[f"h.0.mlp.experts.{e}.c_proj.weight"]
        assert g is not None
        assert bool(g.abs().max() > 0) == chosen[e]


def test_router_of_the_best_one_alone_learns_from_the_text():
    """With top_k_experts=1 the weight is the probability. If it were renormalized, it would be 1
    whatever the router says, and the loss would have no gradient for the router."""
    model = make(top_k_experts=1)
    _, loss = model(tokens(4, 16), tokens(4, 16, seed=2))
    assert gradients(loss, model)["h.1.mlp.router.weight"].abs().max() > 0

    x = torch.randn(2, 3, model.cfg.n_embd)
    moe = model.h[1].mlp
    p = moe.router(x).softmax(dim=-1)  # (2, 3, E)
    best = p.argmax(dim=-1)
    expected = torch.zeros_like(x)
    for b in range(2):
        for t in range(3):
            e = best[b, t]
            expected[b, t] = p[b, t, e] * moe.experts[e](x[b, t])
    torch.testing.assert_close(moe(x), expected, rtol=1e-4, atol=1e-6)


def test_router_stays_in_fp32_under_autocast():
    """In bf16 the two best experts of many tokens could not be told apart."""
    moe = make(top_k_experts=2).h[1].mlp
    x = torch.randn(64, 8, moe.router.in_features)
    moe(x)
    load = moe.load
    balance = moe.balance
    with torch.autocast("cpu", torch.bfloat16):
        moe(x)
    assert torch.equal(moe.load, load)
    torch.testing.assert_close(moe.balance, balance, rtol=1e-6, atol=0)


def test_sampling():
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.5, 0.4]).log().expand(500, -1)

    def drawn(**options):
        return sorted(set(sample(logits, **options).tolist()))

    assert drawn() == [0, 1, 2]
    assert drawn(temperature=0) == [1]
    assert drawn(top_p=0.8) == [1, 2]
    assert drawn(top_p=0.0) == [1]
    assert drawn(top_k=2) == [1, 2]
    assert drawn(top_k=2, top_p=0.5) == [1]


def test_checkpoint_round_trip():
    model = make(tied=True, moe_every=2)
    again = GPT.load(model.to_checkpoint())
    idx = tokens(2, 9)
    assert again.cfg == model.cfg
    assert torch.equal(again(idx)[0], model(idx)[0])


def test_overfit_one_batch():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**MIXED | dict(n_embd=32)))
    batch = tokens(4, 13)
    batch[:, 0] = torch.arange(4)  # the first token says which of the four it is
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        _, text = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        (text + 0.01 * balance(model)).backward()
        optimizer.step()
    assert text < 0.05
    assert balance(model) < 1.5
    assert torch.equal(model.generate(batch[:, :1], 12, temperature=0), batch)
