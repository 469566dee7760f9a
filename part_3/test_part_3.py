"""
Tests of Part 3: pytest part_3. The oracles are torch's own layers, complex numbers, and `reference`, Qwen3's forward
with StreamingLLM's cache written down once more in float64, a query at a time.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, MLP, GPTConfig, KVCache, RMSNorm, causal_mask, rope, rope_table, sample

TINY = dict(vocab_size=13, block_size=16, n_layer=2, n_head=4, n_embd=16, n_kv_head=2)


def randomised(model, seed=0, std=0.2):
    """Every parameter random, gains about 1: a projection that starts at zero would hide all that stands before it."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = (p.ndim == 1 and p.data.mean() > 0.5) + std * torch.randn(p.shape, generator=g)
    return model


def make(**sizes):
    return randomised(GPT(GPTConfig(**{**TINY, **sizes}))).requires_grad_(False)


def tokens(B, T, seed=1):
    return torch.randint(TINY["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# the oracle ----------------------------------------------------------------------------------------------------------

def rms(x, gain):
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * gain


def turned(x, pos, base):
    """cos and rotate_half as Qwen3 writes them: x (..., S, D) at positions (S,)."""
    theta = base ** -(torch.arange(0, x.size(-1), 2) / x.size(-1)).double()
    angle = torch.outer(torch.as_tensor(pos, dtype=x.dtype), theta).repeat(1, 2)
    x1, x2 = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-x2, x1], dim=-1) * angle.sin()


def attend(q, k, v, cfg):
    """q (B, H, T, D), k and v (B, G, T, D), none turned yet -> (B, H, T, D), as StreamingLLM serves it: the cache of
    query t holds the first `sink` tokens and the last `window`, and a token's position is its place in that cache."""
    k, v = (z.repeat_interleave(cfg.n_head // cfg.n_kv_head, dim=1) for z in (k, v))
    rows = []
    for t in range(q.size(2)):
        held = [s for s in range(t + 1) if s < cfg.sink or s > t - (cfg.window or cfg.block_size)]
        query = turned(q[:, :, t:t + 1], [len(held) - 1], cfg.rope_base)
        scores = query @ turned(k[:, :, held], range(len(held)), cfg.rope_base).transpose(-2, -1)
        rows.append((scores / math.sqrt(cfg.head_dim)).softmax(dim=-1) @ v[:, :, held])
    return torch.cat(rows, dim=2)


def reference(model, idx):
    w, cfg = {name: p.detach().double() for name, p in model.state_dict().items()}, model.cfg
    B, T = idx.shape
    x = w["wte.weight"][idx]
    for i in range(cfg.n_layer):
        def linear(name, x):
            return x @ w[f"h.{i}.{name}.weight"].T
        y = rms(x, w[f"h.{i}.ln_1.weight"])
        q = rms(linear("attn.c_q", y).view(B, T, cfg.n_head, -1), w[f"h.{i}.attn.q_norm.weight"])
        k = rms(linear("attn.c_k", y).view(B, T, cfg.n_kv_head, -1), w[f"h.{i}.attn.k_norm.weight"])
        v = linear("attn.c_v", y).view(B, T, cfg.n_kv_head, -1)
        y = attend(*(z.transpose(1, 2) for z in (q, k, v)), cfg)
        x = x + linear("attn.c_proj", y.transpose(1, 2).reshape(B, T, -1))
        y = rms(x, w[f"h.{i}.ln_2.weight"])
        x = x + linear("mlp.c_proj", F.silu(linear("mlp.c_gate", y)) * linear("mlp.c_fc", y))
    return rms(x, w["ln_f.weight"]) @ w["lm_head.weight"].T


def close(logits, exact):
    """fp32 against float64: within 1e-5 of the largest value."""
    assert (logits - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("sizes", [{}, {"n_kv_head": 1}, {"n_kv_head": 4}, {"tied": 1}, {"head_dim": 6, "mlp_dim": 20},
                                   {"rope_base": 50.0}])
def test_logits_against_qwen3(sizes):
    model, idx = make(**sizes), tokens(2, 16)
    logits, loss = model(idx)
    assert loss is None
    close(logits, reference(model, idx))


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("sink", [0, 1, 4])
def test_logits_against_streaming_llm(window, sink):
    """Far beyond the window: a sink is seen from nearby, everything else from where it is."""
    model, idx = make(window=window, sink=sink), tokens(2, 40)
    close(model(idx)[0], reference(model, idx))


# RoPE, RMSNorm, SwiGLU, grouped queries ------------------------------------------------------------------------------

def turn(x, pos, base=10000.0):
    return rope(x, *rope_table(torch.as_tensor(pos), x.size(-1), base))


@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_rope_is_the_papers_interleaved_one_permuted(base):
    """The paper turns the complex numbers x0 + i x1, x2 + i x3, ...; ours pairs channel i with i + D/2."""
    x, pos = normal(2, 3, 9, 8), torch.arange(9)
    theta = base ** (-np.arange(0, 8, 2) / 8)
    z = torch.view_as_complex(x.double().view(2, 3, 9, 4, 2)) * torch.from_numpy(np.exp(1j * np.outer(pos, theta)))
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    expected = torch.view_as_real(z).flatten(-2)[..., order]
    torch.testing.assert_close(turn(x[..., order], pos, base).double(), expected, atol=1e-5, rtol=0)


def test_rope_turns():
    q, k = normal(1, 1, 5, 8), normal(1, 1, 5, 8, seed=2)
    m, n = torch.tensor([0, 3, 7, 50, 99]), torch.tensor([0, 9, 7, 20, 1])
    torch.testing.assert_close(turn(q, m).norm(dim=-1), q.norm(dim=-1))  # the norm is preserved
    torch.testing.assert_close(turn(turn(q, n), -m), turn(q, n - m), atol=1e-5, rtol=0)  # R(m)^T R(n) = R(n - m)
    products = (turn(q, m) * turn(k, n)).sum(dim=-1)
    torch.testing.assert_close((turn(q, m + 1000) * turn(k, n + 1000)).sum(dim=-1), products, atol=1e-3, rtol=0)
    assert torch.equal(turn(q, 5 * [0]), q)


def test_rope_precision():
    """fp32 angles stay within 1e-3 of float64's up to position 4096."""
    pos = torch.arange(0, 4097, 64)
    cos, sin = rope_table(pos, 32, 10000.0)
    angle = np.outer(pos, 10000.0 ** (-np.arange(0, 32, 2) / 32))
    np.testing.assert_allclose(cos, np.cos(np.c_[angle, angle]), atol=1e-3)
    np.testing.assert_allclose(sin, np.sin(np.c_[-angle, angle]), atol=1e-3)
    x = normal(1, 1, 65, 32).bfloat16()
    assert turn(x, pos).dtype == torch.bfloat16


def test_the_model_sees_distances_not_addresses():
    """The same tokens at positions 5, 6, ... of a cache whose first five keys nobody may see."""
    model, idx = make(), tokens(2, 8)
    cache = KVCache(model.cfg, 2)
    cache.t, cache.pos[:5] = 5, 1000
    torch.testing.assert_close(model(idx, cache=cache)[0], model(idx)[0], atol=1e-5, rtol=1e-4)


def test_rms_norm_against_torch():
    ours, theirs = randomised(RMSNorm(32)), nn.RMSNorm(32, eps=1e-6)
    theirs.load_state_dict(ours.state_dict())
    x = 3 * normal(4, 5, 32) + 7
    torch.testing.assert_close(ours(x), theirs(x))
    assert RMSNorm(32)(torch.zeros(1, 32)).isfinite().all()
    large = torch.full((1, 32), 300.0, dtype=torch.float16)  # its square is beyond fp16
    torch.testing.assert_close(RMSNorm(32).half()(large), torch.ones_like(large))


@pytest.mark.parametrize("C", [64, 128, 192, 256, 384, 768])
def test_swiglu_has_the_parameters_of_the_gelu_mlp(C):
    count = sum(p.numel() for p in MLP(GPTConfig(n_embd=C)).parameters())
    assert count == pytest.approx(2 * C * 4 * C, rel=0.02)


@pytest.mark.parametrize("G", [1, 2])
def test_grouped_queries_are_repeated_heads(G):
    few, all_ = make(n_kv_head=G), make(n_kv_head=4)
    weights = few.state_dict()
    for name in weights:
        if "c_k" in name or "c_v" in name:
            weights[name] = weights[name].view(G, 4, 16).repeat_interleave(4 // G, dim=0).flatten(0, 1)
    all_.load_state_dict(weights)
    torch.testing.assert_close(few(tokens(2, 9))[0], all_(tokens(2, 9))[0], atol=1e-6, rtol=1e-5)


def test_loss_and_its_start():
    torch.manual_seed(0)
    for tied in (0, 1):
        model, idx, targets = GPT(GPTConfig(tied=tied)), torch.randint(256, (4, 64)), torch.randint(256, (4, 64))
        logits, loss = model(idx, targets)
        by_hand = -logits.double().log_softmax(dim=-1).gather(-1, targets[..., None]).mean()
        assert loss.item() == pytest.approx(by_hand.item(), abs=1e-5)
        assert loss.item() == pytest.approx(math.log(256), abs=0.2)


@pytest.mark.parametrize("sizes, message", [
    ({"n_head": 4, "n_kv_head": 3}, "n_head=4"),
    ({"n_embd": 30, "n_head": 4}, "n_embd=30"),
    ({"n_embd": 20, "n_head": 4}, "head_dim=5"),
])
def test_sizes_that_do_not_divide(sizes, message):
    with pytest.raises(AssertionError, match=message):
        GPTConfig(**sizes)


def test_too_long_a_text_is_refused():
    with pytest.raises(AssertionError, match="17 tokens do not fit into block_size=16"):
        make()(tokens(1, 17))


# causality, window, sink ---------------------------------------------------------------------------------------------

def test_causal_mask_with_window_and_sink():
    q_pos, k_pos = [6, 9, 2], [4, 0, 3, 9, 5, 1, 6, 7]
    for window in (0, 1, 3, 20):
        for sink in (0, 1, 2):
            mask = causal_mask(torch.tensor(q_pos), torch.tensor(k_pos), window, sink)
            expected = [[k <= q and (not window or q - k < window or k < sink) for k in k_pos] for q in q_pos]
            assert mask.tolist() == expected, (window, sink)


@pytest.mark.parametrize("window, sink", [(0, 0), (4, 0), (4, 1), (3, 2)])
def test_causality(window, sink):
    model, idx = make(window=window, sink=sink), tokens(1, 10)
    for t in range(10):
        edited = idx.clone()
        edited[0, t] = (edited[0, t] + 1) % TINY["vocab_size"]
        moved = (model(idx)[0] != model(edited)[0]).any(dim=-1)[0]
        assert not moved[:t].any() and moved[t], t


def test_what_one_layer_sees_through_a_window():
    model = make(n_layer=1, window=3, sink=1).requires_grad_()
    idx = torch.arange(8)[None]
    model(idx)[0][0, 7].logsumexp(dim=-1).backward()
    seen = model.wte.weight.grad.abs().sum(dim=-1) > 0
    assert seen.nonzero().flatten().tolist() == [0, 5, 6, 7]
    weights = model.h[0].attn.weights  # (B, H, T, S)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 4, 8))
    assert (weights[0, :, 7] > 0).all(dim=0).tolist() == [True] + 4 * [False] + 3 * [True]


# the cache -----------------------------------------------------------------------------------------------------------

def served(model, idx, chunks):
    """The logits of a stream that comes in chunks of these lengths, the last of them repeated."""
    cache, logits, t = KVCache(model.cfg, len(idx)), [], 0
    while t < idx.size(1):
        n = chunks[min(len(logits), len(chunks) - 1)]
        logits.append(model(idx[:, t:t + n], cache=cache)[0])
        t += n
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("window", [1, 2, 5, 16])
@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize("chunks", [[1], [2, 1], [7, 1], [19, 1], [3], [1, 5], [4, 11, 2], [40]], ids=str)
def test_rolling_cache_is_a_banded_mask(window, sink, chunks):
    """Whatever the prompt's length and however it is cut: before, at and beyond the point where the ring closes."""
    model, idx = make(window=window, sink=sink), tokens(2, 40)
    torch.testing.assert_close(served(model, idx, chunks), model(idx)[0], atol=2e-5, rtol=1e-4)


def test_without_a_window_the_context_is_the_window():
    model, idx = make(), tokens(2, 16)
    torch.testing.assert_close(served(model, idx, [5, 1]), model(idx)[0], atol=2e-5, rtol=1e-4)
    windowed, idx = make(window=16), tokens(2, 60)
    torch.testing.assert_close(served(model, idx, [5, 1]), windowed(idx)[0], atol=2e-5, rtol=1e-4)


def test_streaming_needs_constant_memory():
    """20 windows past the window: the same storage, 2 n_layer B G size D floats, and still the banded mask's logits."""
    model, idx = make(window=6, sink=2), tokens(3, 8 + 20 * 6)
    cache, logits = KVCache(model.cfg, 3), []
    places = cache.k.data_ptr(), cache.v.data_ptr(), cache.pos.data_ptr()
    for t in range(idx.size(1)):
        logits.append(model(idx[:, t:t + 1], cache=cache)[0])
        assert places == (cache.k.data_ptr(), cache.v.data_ptr(), cache.pos.data_ptr())
        n_bytes = cache.k.untyped_storage().nbytes() + cache.v.untyped_storage().nbytes()
        assert n_bytes == 2 * 2 * 3 * 2 * (6 + 2) * 4 * 4  # 2 n_layer B G size D, four bytes each
    torch.testing.assert_close(torch.cat(logits, dim=1), model(idx)[0], atol=2e-5, rtol=1e-4)
    assert sorted(cache.pos.tolist()) == [0, 1, *range(122, 128)]


@pytest.mark.parametrize("sizes", [{"window": 4, "sink": 1}, {"window": 5}, {}])
def test_generate_streams(sizes):
    """Greedy, from a prompt longer than the window, against the uncached forward of all that went before."""
    model, idx = make(**sizes), tokens(2, 9)
    out = model.generate(idx, 60, temperature=0)
    uncached = make(**sizes or {"window": 16})(out[:, :-1])[0].argmax(dim=-1)
    assert out.shape == (2, 69) and torch.equal(out[:, :9], idx)
    assert torch.equal(out[:, 9:], uncached[:, 8:])


# gradient flow, sampling, learning -----------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [0, 1])
def test_gradient_flow(tied):
    model = make(tied=tied, window=3, sink=1).requires_grad_()
    model(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[2, 3, 4, 5, 6]]))[1].backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    rows = model.wte.weight.grad.abs().sum(dim=-1) > 0
    assert rows.sum() == (13 if tied else 5)  # a tied table is the head too, and a softmax pushes every row
    assert len(list(model.parameters())) == 2 * 11 + 2 + (not tied)


def test_sampling():
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.5, 0.4]).log().expand(500, -1)
    drawn = lambda **options: sorted(set(sample(logits, **options).tolist()))
    assert drawn() == [0, 1, 2] and drawn(temperature=0) == [1]
    assert drawn(top_p=0.8) == [1, 2] and drawn(top_p=0.95) == [0, 1, 2]  # it keeps the token that crosses p
    assert drawn(top_k=2) == [1, 2] and drawn(top_k=2, top_p=0.5) == [1]


def test_overfit_one_batch():
    torch.manual_seed(0)
    model, batch = GPT(GPTConfig(**{**TINY, "n_embd": 32, "window": 4, "sink": 1})), tokens(4, 13)
    batch[:, 0] = torch.arange(4)  # the first token, a sink, says which of the four it is
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        loss = model(batch[:, :-1], batch[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert torch.equal(model.generate(batch[:, :1], 12, temperature=0), batch)
