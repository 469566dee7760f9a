"""
Tests of Part 5: pytest part_5. The oracles are `reference`, Qwen3-MoE's forward written down once more in float64
with one token at a time in its experts, and Part 4's model.
"""
import sys; from pathlib import Path
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
    """Every parameter random, gains about 1: a projection that starts at zero would hide all that stands before it."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = (p.ndim == 1 and p.data.mean() > 0.5) + std * torch.randn(p.shape, generator=g)
    return model


def make(**sizes):
    return randomised(GPT(GPTConfig(**{**MIXED, **sizes})))


def tokens(*shape, seed=1):
    return torch.randint(TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def balance(model):
    """The load-balancing loss of the last forward, mean over the layers with experts."""
    return torch.stack([block.mlp.balance for block in model.h if isinstance(block.mlp, MoE)]).mean()


# parity --------------------------------------------------------------------------------------------------------------

def rms(x, gain):
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * gain


def turned(x, base):
    theta = base ** -(torch.arange(0, x.size(-1), 2) / x.size(-1)).double()
    angle = torch.outer(torch.arange(x.size(2)).double(), theta).repeat(1, 2)
    x1, x2 = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-x2, x1], dim=-1) * angle.sin()


def expert(w, prefix, x):
    gate, up, down = (w[f"{prefix}{name}.weight"] for name in ("c_gate", "c_fc", "c_proj"))
    return down @ (F.silu(gate @ x) * (up @ x))


def mixture(w, prefix, x, top_k):
    """Qwen3-MoE, a token at a time: softmax over all experts, the best top_k, their weights scaled to sum to 1."""
    if f"{prefix}router.weight" not in w:
        return torch.stack([expert(w, prefix, token) for token in x])
    rows = []
    for token in x:
        p = (w[f"{prefix}router.weight"] @ token).softmax(dim=-1)
        best = sorted(range(len(p)), key=lambda e: -p[e])[:top_k]
        rows.append(sum(p[e] * expert(w, f"{prefix}experts.{e}.", token) for e in best) / sum(p[e] for e in best))
    return torch.stack(rows)


def reference(model, idx):
    w, cfg = {name: p.detach().double() for name, p in model.state_dict().items()}, model.cfg
    B, T = idx.shape
    x = w["wte.weight"][idx]
    for i in range(cfg.n_layer):
        def linear(name, x):
            return x @ w[f"h.{i}.{name}.weight"].T
        y = rms(x, w[f"h.{i}.ln_1.weight"])
        q = rms(linear("attn.c_q", y).view(B, T, cfg.n_head, -1), w[f"h.{i}.attn.q_norm.weight"]).transpose(1, 2)
        k = rms(linear("attn.c_k", y).view(B, T, cfg.n_kv_head, -1), w[f"h.{i}.attn.k_norm.weight"]).transpose(1, 2)
        v = linear("attn.c_v", y).view(B, T, cfg.n_kv_head, -1).transpose(1, 2)
        k, v = (z.repeat_interleave(cfg.n_head // cfg.n_kv_head, dim=1) for z in (turned(k, cfg.rope_base), v))
        scores = turned(q, cfg.rope_base) @ k.transpose(-2, -1) / math.sqrt(cfg.head_dim)
        y = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(dim=-1) @ v
        x = x + linear("attn.c_proj", y.transpose(1, 2).reshape(B, T, -1))
        y = rms(x, w[f"h.{i}.ln_2.weight"])
        x = x + mixture(w, f"h.{i}.mlp.", y.flatten(0, 1), cfg.top_k_experts).view_as(x)
    return rms(x, w["ln_f.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("sizes", [{}, {"top_k_experts": 1}, {"top_k_experts": 4}, {"n_expert": 7, "top_k_experts": 3},
                                   {"moe_every": 2}, {"n_expert": 0}])
def test_logits_against_qwen3_moe(sizes):
    """fp32 against float64: within 1e-5 of the largest logit."""
    model, idx = make(**sizes), tokens(2, 16)
    exact = reference(model, idx)
    assert (model(idx)[0] - exact).abs().max() < 1e-5 * exact.abs().max()


def test_without_experts_it_is_part_4():
    path = Path(__file__).resolve().parent.parent / "part_4/model.py"
    spec = importlib.util.spec_from_file_location("part_4_model", path)
    part_4 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(part_4)
    ours, theirs, idx = make(n_expert=0), part_4.GPT(part_4.GPTConfig(**TINY)), tokens(2, 16)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(idx, idx)[0], theirs(idx, idx)[0]) and torch.equal(ours(idx, idx)[1], theirs(idx, idx)[1])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_identical_experts_are_one_mlp(top_k):
    """Whatever the router says: its weights sum to 1."""
    cfg = GPTConfig(**MIXED | dict(top_k_experts=top_k))
    moe, mlp, x = randomised(MoE(cfg)), randomised(MLP(cfg), seed=5), normal(3, 9, 16)
    for e in moe.experts:
        e.load_state_dict(mlp.state_dict())
    torch.testing.assert_close(moe(x), mlp(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_an_expert_gets_only_the_tokens_that_chose_it(top_k):
    moe = randomised(MoE(GPTConfig(**MIXED | dict(top_k_experts=top_k))))
    x, asked = normal(3, 9, 16), []
    for e in moe.experts:
        e.register_forward_hook(lambda module, given, result: asked.append(len(given[0])))
    moe(x)
    best = (x.flatten(0, 1) @ moe.router.weight.T).argsort(dim=-1, descending=True)[:, :top_k]
    assert asked == [(best == e).sum().item() for e in range(4)] and sum(asked) == 27 * top_k
    torch.testing.assert_close(moe.load, torch.tensor(asked) / (27 * top_k))


def test_moe_every():
    for every, wanted in ((1, "11111"), (2, "01010"), (3, "00100"), (9, "00000")):
        model = GPT(GPTConfig(**MIXED | dict(n_layer=5, moe_every=every)))
        assert "".join(str(int(isinstance(block.mlp, MoE))) for block in model.h) == wanted
        assert all(len(block.mlp.experts) == 4 for block in model.h if isinstance(block.mlp, MoE))


@pytest.mark.parametrize("sizes", [{"top_k_experts": 5}, {"top_k_experts": 0}, {"moe_every": 0}])
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(AssertionError, match="top_k_experts=|moe_every="):
        GPTConfig(**MIXED | sizes)


# the load-balancing loss ---------------------------------------------------------------------------------------------

def routed(tokens_per_expert, top_k=1, sure=50.0):
    """A mixture whose router sends as many one-hot tokens to each expert as asked for."""
    moe = MoE(GPTConfig(**MIXED | dict(top_k_experts=top_k)))
    moe.router.weight.data = sure * torch.eye(4, 16)
    moe(torch.eye(16)[None, [e for e, n in enumerate(tokens_per_expert) for _ in range(n)]])
    return moe


def test_balance_is_1_when_even_and_E_when_collapsed():
    even, collapsed, half = routed([5, 5, 5, 5]), routed([0, 20, 0, 0]), routed([10, 10, 0, 0])
    assert even.balance.item() == pytest.approx(1, abs=1e-5) and even.load.tolist() == [0.25] * 4
    assert collapsed.balance.item() == pytest.approx(4, abs=1e-5) and collapsed.load.tolist() == [0, 1, 0, 0]
    assert half.balance.item() == pytest.approx(2, abs=1e-5)


def test_balance_against_its_formula():
    """E sum_e f_e P_e of each layer apart: a collapse in one cannot hide behind another's."""
    model, idx, seen = make(), tokens(3, 11), []
    for block in model.h:
        block.mlp.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach().flatten(0, 1)))
    model(idx)
    layers = []
    for block, x in zip(model.h, seen):
        p = (x @ block.mlp.router.weight.T).softmax(dim=-1)
        f = F.one_hot(p.topk(2).indices, 4).sum(dim=(0, 1)) / (2 * len(x))
        layers.append(sum(4 * f[e] * p[:, e].mean() for e in range(4)))
    assert abs(layers[0] - layers[1]) > 1e-3
    torch.testing.assert_close([block.mlp.balance for block in model.h], layers)


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
    assert before > 0.45 and moe.load.max() < 0.35 and moe.balance < 1.1


# causality, the cache ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [{}, {"window": 4, "sink": 1}, {"moe_every": 2, "top_k_experts": 1}])
def test_causality(sizes):
    """A token is routed by itself: no other token, and no later one, can push it off its expert."""
    model, idx = make(**sizes), tokens(1, 10)
    for t in range(10):
        edited = idx.clone()
        edited[0, t] = (edited[0, t] + 1) % TINY["vocab_size"]
        moved = (model(idx)[0] - model(edited)[0]).abs().amax(dim=-1)[0] > 1e-6
        assert not moved[:t].any() and moved[t], t


@pytest.mark.parametrize("window, sink", [(1, 0), (5, 1), (4, 3)])
@pytest.mark.parametrize("chunks", [[1], [7, 1], [19, 1], [40]], ids=str)
def test_rolling_cache_is_a_banded_mask(window, sink, chunks):
    model, idx = make(window=window, sink=sink).requires_grad_(False), tokens(2, 40)
    cache, logits, t = KVCache(model.cfg, 2), [], 0
    while t < 40:
        n = chunks[min(len(logits), len(chunks) - 1)]
        logits.append(model(idx[:, t:t + n], cache=cache)[0])
        t += n
    torch.testing.assert_close(torch.cat(logits, dim=1), model(idx)[0], atol=2e-5, rtol=1e-4)


# gradient flow, learning ---------------------------------------------------------------------------------------------

def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_gradient_flow():
    """The text's loss reaches every parameter, the routers by way of the weights of what they chose."""
    model, idx = make(), tokens(4, 16)
    for name, g in gradients(model(idx, tokens(4, 16, seed=2))[1], model).items():
        assert g.isfinite().all() and g.abs().max() > 0, name


def test_balance_teaches_routers_and_what_feeds_them_never_experts():
    model = make(n_layer=1)
    model(tokens(4, 16))
    grads = [(name, g is not None and g.abs().max() > 0) for name, g in gradients(balance(model), model).items()]
    assert dict(grads)["h.0.mlp.router.weight"] and dict(grads)["wte.weight"]
    assert not any(flows for name, flows in grads if "experts" in name or "lm_head" in name)


def test_an_expert_that_nobody_chose_has_a_zero_gradient():
    """Zero, not None: DDP and a clipped norm want one from every parameter."""
    model = make(n_layer=1)
    grads = gradients(model(torch.tensor([[5]]), torch.tensor([[6]]))[1], model)  # one token, two experts
    chosen = model.h[0].mlp.load > 0
    assert chosen.sum() == 2
    for e in range(4):
        g = grads[f"h.0.mlp.experts.{e}.c_proj.weight"]
        assert g is not None and bool(g.abs().max() > 0) == chosen[e]


def test_router_of_the_best_one_alone_learns_from_balance_only():
    """With top_k_experts=1 the renormalised weight is 1 whatever the router says: the text's loss cannot reach it."""
    model = make(top_k_experts=1)
    grads = gradients(model(tokens(4, 16), tokens(4, 16, seed=2))[1], model)
    assert grads["h.1.mlp.router.weight"].abs().max() < 1e-7
    model(tokens(4, 16))
    assert gradients(balance(model), model)["h.1.mlp.router.weight"].abs().max() > 0


def test_sampling():
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.5, 0.4]).log().expand(500, -1)
    drawn = lambda **options: sorted(set(sample(logits, **options).tolist()))
    assert drawn() == [0, 1, 2] and drawn(temperature=0) == [1]
    assert drawn(top_p=0.8) == [1, 2] and drawn(top_k=2) == [1, 2] and drawn(top_k=2, top_p=0.5) == [1]


def test_checkpoint_round_trip():
    model, idx = make(tied=1, moe_every=2), tokens(2, 9)
    again = GPT.load(model.to_checkpoint())
    assert again.cfg == model.cfg and torch.equal(again(idx)[0], model(idx)[0])


def test_overfit_one_batch():
    torch.manual_seed(0)
    model, batch = GPT(GPTConfig(**MIXED | dict(n_embd=32))), tokens(4, 13)
    batch[:, 0] = torch.arange(4)  # the first token says which of the four it is
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        text = model(batch[:, :-1], batch[:, 1:])[1]
        optimizer.zero_grad()
        (text + 0.01 * balance(model)).backward()
        optimizer.step()
    assert text < 0.05 and balance(model) < 1.5
    assert torch.equal(model.generate(batch[:, :1], 12, temperature=0), batch)
