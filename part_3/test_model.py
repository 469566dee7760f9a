"""
Tests of model.py and model_streaming.py.

The oracles are torch's own layers, complex numbers, and `reference`: the forward pass of Qwen3 with
the cache of StreamingLLM, written down once more in float64, one query at a time.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model as plain
import model_streaming as streaming
from model import GPT, MLP, GPTConfig, KVCache, RMSNorm, causal_mask, rope, rope_table, sample

SIZES = dict(vocab_size=13, block_size=16, n_layer=2, n_head=4, n_embd=16, n_kv_head=2)


def randomize(module, seed=0, std=0.2):
    """Makes every parameter random; gains stay about 1.

    In a new model the projections that start at zero would hide all that stands before them.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        is_gain = p.ndim == 1
        noise = std * torch.randn(p.shape, generator=generator)
        p.data = noise + 1 if is_gain else noise
    return module


def make(**sizes):
    return randomize(GPT(GPTConfig(**{**SIZES, **sizes}))).requires_grad_(False)


def make_streaming(**sizes):
    cfg = streaming.GPTConfig(**{**SIZES, **sizes})
    return randomize(streaming.GPT(cfg)).requires_grad_(False)


def tokens(B, T, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SIZES["vocab_size"], (B, T), generator=generator)


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected, precision=1e-5):
    """The same up to rounding, relative to the largest number."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=precision * scale)


# --------------------------------------------------------------------------------------------------
# The oracle


def reference_norm(x, gain, eps):
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * gain


def reference_rope(x, pos, base):
    """cos and rotate_half as Qwen3 writes them: x (..., S, D) at positions (S,)."""
    theta = base ** -(torch.arange(0, x.size(-1), 2) / x.size(-1)).double()
    angle = torch.outer(torch.as_tensor(pos, dtype=x.dtype), theta).repeat(1, 2)
    x1, x2 = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-x2, x1], dim=-1) * angle.sin()


def reference_attention(q, k, v, cfg, window, sink):
    """q (B, H, T, D), k and v (B, G, T, D), none of them rotated yet -> (B, H, T, D).

    As StreamingLLM serves it: the cache of query t holds the first `sink` tokens and the last
    `window`, and the position of a token is its place in that cache.
    """
    k = k.repeat_interleave(cfg.n_head // cfg.n_kv_head, dim=1)
    v = v.repeat_interleave(cfg.n_head // cfg.n_kv_head, dim=1)
    rows = []
    for t in range(q.size(2)):
        held = [s for s in range(t + 1) if s < sink or s > t - window]
        query = reference_rope(q[:, :, t : t + 1], [len(held) - 1], cfg.rope_base)
        keys = reference_rope(k[:, :, held], range(len(held)), cfg.rope_base)
        scores = query @ keys.transpose(-2, -1) / math.sqrt(cfg.head_dim)
        rows.append(scores.softmax(dim=-1) @ v[:, :, held])
    return torch.cat(rows, dim=2)


def reference(model, idx, window=10**6, sink=0):
    """The logits (B, T, V) in float64."""
    weights = {name: p.detach().double() for name, p in model.state_dict().items()}
    cfg = model.cfg
    B, T = idx.shape
    x = weights["wte.weight"][idx]
    for layer in range(cfg.n_layer):

        def gain(name, layer=layer):
            return weights[f"h.{layer}.{name}.weight"]

        def linear(name, x, layer=layer):
            return x @ weights[f"h.{layer}.{name}.weight"].T

        y = reference_norm(x, gain("ln_1"), cfg.norm_eps)
        q = linear("attn.c_q", y).view(B, T, cfg.n_head, -1)
        k = linear("attn.c_k", y).view(B, T, cfg.n_kv_head, -1)
        v = linear("attn.c_v", y).view(B, T, cfg.n_kv_head, -1)
        if cfg.qk_norm:
            q = reference_norm(q, gain("attn.q_norm"), cfg.norm_eps)
            k = reference_norm(k, gain("attn.k_norm"), cfg.norm_eps)
        y = reference_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), cfg, window, sink
        )
        x = x + linear("attn.c_proj", y.transpose(1, 2).reshape(B, T, -1))

        y = reference_norm(x, gain("ln_2"), cfg.norm_eps)
        x = x + linear("mlp.c_proj", F.silu(linear("mlp.c_gate", y)) * linear("mlp.c_fc", y))
    x = reference_norm(x, weights["ln_f.weight"], cfg.norm_eps)
    return x @ weights["lm_head.weight"].T


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"n_kv_head": 1},
        {"n_kv_head": 4},
        {"tied": True},
        {"head_dim": 6, "mlp_dim": 20},
        {"rope_base": 50.0},
        {"qk_norm": False},
        {"norm_eps": 0.1},
        {"qk_norm": False, "norm_eps": 0.1},
    ],
    ids=str,
)
def test_logits_match_qwen3(sizes):
    model = make(**sizes)
    idx = tokens(2, 16)
    logits, loss = model(idx)
    assert loss is None
    assert_close(logits.double(), reference(model, idx))


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("sink", [0, 1, 4])
def test_logits_match_streaming_llm_far_beyond_the_window(window, sink):
    model = make_streaming(window=window, sink=sink)
    idx = tokens(2, 40)
    logits, _ = model(idx)
    assert_close(logits.double(), reference(model, idx, window, sink))


def test_streaming_options_match_the_reference():
    idx = tokens(2, 30)
    for sizes in ({"qk_norm": False}, {"norm_eps": 0.1}, {"rope_base": 50.0}, {"tied": True}):
        model = make_streaming(window=5, sink=2, **sizes)
        logits, _ = model(idx)
        assert_close(logits.double(), reference(model, idx, window=5, sink=2))


def test_the_same_weights_give_the_same_logits_within_the_window():
    model = make()
    with_window = make_streaming()
    with_window.load_state_dict(model.state_dict())
    assert with_window.cfg.window == 16
    assert_close(with_window(tokens(2, 16))[0], model(tokens(2, 16))[0])


# --------------------------------------------------------------------------------------------------
# RoPE


def rotate(x, pos, base=10000.0):
    cos, sin = rope_table(torch.as_tensor(pos), x.size(-1), base)
    return rope(x, cos, sin)


@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_rope_is_that_of_the_paper_with_permuted_channels(base):
    """The paper rotates the complex numbers x0 + i x1, x2 + i x3, ...; we pair i with i + D/2."""
    x = normal(2, 3, 9, 8)
    theta = base ** (-np.arange(0, 8, 2) / 8)
    turns = torch.from_numpy(np.exp(1j * np.outer(np.arange(9), theta)))
    rotated = torch.view_as_complex(x.double().view(2, 3, 9, 4, 2)) * turns

    order = [0, 2, 4, 6, 1, 3, 5, 7]
    expected = torch.view_as_real(rotated).flatten(-2)[..., order]
    assert_close(rotate(x[..., order], torch.arange(9), base).double(), expected)


def test_rope_keeps_the_length_of_a_vector():
    q = normal(1, 1, 5, 8)
    rotated = rotate(q, [0, 3, 7, 50, 99])
    assert_close(rotated.norm(dim=-1), q.norm(dim=-1))


def test_two_rotations_add_up():
    """R(m)^T R(n) = R(n - m)."""
    q = normal(1, 1, 5, 8)
    m = torch.tensor([0, 3, 7, 50, 99])
    n = torch.tensor([0, 9, 7, 20, 1])
    assert_close(rotate(rotate(q, n), -m), rotate(q, n - m))
    assert torch.equal(rotate(q, [0, 0, 0, 0, 0]), q)


def test_scores_depend_on_distances_only():
    q = normal(1, 1, 5, 8)
    k = normal(1, 1, 5, 8, seed=2)
    m = torch.tensor([0, 3, 7, 50, 99])
    n = torch.tensor([0, 9, 7, 20, 1])
    scores = (rotate(q, m) * rotate(k, n)).sum(dim=-1)
    moved = (rotate(q, m + 1000) * rotate(k, n + 1000)).sum(dim=-1)
    other = (rotate(q, m + 1) * rotate(k, n)).sum(dim=-1)
    assert_close(moved, scores, precision=1e-3)
    assert (other - scores).abs().max() > 0.1


def test_the_angles_are_precise():
    """fp32 angles stay within 1e-3 of float64's up to position 4096."""
    pos = torch.arange(0, 4097, 64)
    cos, sin = rope_table(pos, 32, 10000.0)
    angle = np.outer(pos, 10000.0 ** (-np.arange(0, 32, 2) / 32))
    assert cos.shape == sin.shape == (65, 16)
    np.testing.assert_allclose(cos, np.cos(angle), atol=1e-3)
    np.testing.assert_allclose(sin, np.sin(angle), atol=1e-3)


def test_rope_keeps_the_dtype():
    x = normal(1, 1, 5, 8).bfloat16()
    assert rotate(x, torch.arange(5)).dtype == torch.bfloat16


class ShiftedGPT(GPT):
    """The whole text stands 1000 positions further on."""

    def positions(self, T, cache, device):
        mask, _, _ = super().positions(T, cache, device)
        pos = torch.arange(T, device=device) + 1000
        cos, sin = rope_table(pos, self.cfg.head_dim, self.cfg.rope_base)
        return mask, cos, sin


def test_the_model_sees_distances_not_positions():
    idx = tokens(2, 8)
    shifted = randomize(ShiftedGPT(GPTConfig(**SIZES)))
    assert_close(shifted(idx)[0], make()(idx)[0], precision=1e-4)


def test_the_model_sees_the_order_of_the_tokens():
    model = make()
    logits, _ = model(torch.tensor([[1, 2, 3, 4]]))
    swapped, _ = model(torch.tensor([[2, 1, 3, 4]]))
    assert (logits[0, -1] - swapped[0, -1]).abs().max() > 0.01 * logits.abs().max()


# --------------------------------------------------------------------------------------------------
# RMSNorm, SwiGLU, grouped queries, QK-norm


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_matches_torch(eps):
    norm = randomize(RMSNorm(32, eps))
    expected = nn.RMSNorm(32, eps=eps)
    expected.load_state_dict(norm.state_dict())
    x = 3 * normal(4, 5, 32) + 7
    assert_close(norm(x), expected(x))


def test_rms_norm_survives_extreme_numbers():
    assert torch.equal(RMSNorm(32, 1e-6)(torch.zeros(1, 32)), torch.zeros(1, 32))
    large = torch.full((1, 32), 300.0, dtype=torch.float16)  # its square is beyond fp16
    torch.testing.assert_close(RMSNorm(32, 1e-6).half()(large), torch.ones_like(large))


def test_every_norm_has_the_eps_of_the_configuration():
    for model in (make(norm_eps=0.25), make_streaming(norm_eps=0.25)):
        names = [name for name, part in model.named_modules() if type(part).__name__ == "RMSNorm"]
        assert len(names) == 4 * 2 + 1  # ln_1, ln_2, q_norm and k_norm of each layer, and ln_f
        for name in names:
            assert model.get_submodule(name).eps == 0.25, name


def test_qk_norm_bounds_the_scores():
    """With QK-norm the size of the query's weights does not matter; without, it does."""
    idx = tokens(2, 9)
    for qk_norm in (True, False):
        model = make(qk_norm=qk_norm)
        logits, _ = model(idx)
        for block in model.h:
            block.attn.c_q.weight *= 100
        enlarged, _ = model(idx)
        difference = (enlarged - logits).abs().max() / logits.abs().max()
        assert (difference < 1e-3) == qk_norm
        assert ("h.0.attn.q_norm.weight" in model.state_dict()) == qk_norm


@pytest.mark.parametrize("C", [64, 128, 192, 256, 384, 768])
def test_swiglu_has_as_many_parameters_as_the_gelu_mlp(C):
    params = sum(p.numel() for p in MLP(GPTConfig(n_embd=C)).parameters())
    assert params == pytest.approx(2 * C * 4 * C, rel=0.02)


@pytest.mark.parametrize("G", [1, 2])
def test_grouped_queries_are_repeated_heads(G):
    few = make(n_kv_head=G)
    weights = few.state_dict()
    for name, weight in weights.items():
        if "c_k" in name or "c_v" in name:
            heads = weight.view(G, 4, 16)
            weights[name] = heads.repeat_interleave(4 // G, dim=0).flatten(0, 1)
    many = make(n_kv_head=4)
    many.load_state_dict(weights)
    assert_close(few(tokens(2, 9))[0], many(tokens(2, 9))[0])


# --------------------------------------------------------------------------------------------------
# The loss and the configuration


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_starts_at_that_of_a_uniform_guess(tied):
    torch.manual_seed(0)
    model = GPT(GPTConfig(tied=tied))
    idx = torch.randint(256, (4, 64))
    targets = torch.randint(256, (4, 64))
    logits, loss = model(idx, targets)
    by_hand = -logits.double().log_softmax(dim=-1).gather(-1, targets[..., None]).mean()
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-5)
    assert loss.item() == pytest.approx(math.log(256), abs=0.2)


@pytest.mark.parametrize("module", [plain, streaming], ids=["model", "model_streaming"])
def test_a_new_block_is_the_identity(module):
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(**SIZES))
    logits, _ = model(tokens(2, 9))
    expected = model.lm_head(model.ln_f(model.wte(tokens(2, 9))))
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("module", [plain, streaming], ids=["model", "model_streaming"])
@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"n_head": 4, "n_kv_head": 3}, "n_head=4 must be divisible by n_kv_head=3"),
        ({"n_embd": 30, "n_head": 4}, "n_embd=30 must be divisible by n_head=4"),
        ({"n_embd": 20, "n_head": 4}, "head_dim=5 must be even"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(module, sizes, message):
    with pytest.raises(AssertionError, match=message):
        module.GPTConfig(**sizes)


def test_too_long_a_text_is_refused():
    model = make()
    with pytest.raises(AssertionError, match="17 tokens do not fit in block_size=16"):
        model(tokens(1, 17))

    cache = KVCache(model.cfg, 1)
    model(tokens(1, 12), cache=cache)
    with pytest.raises(AssertionError, match="18 tokens do not fit in block_size=16"):
        model(tokens(1, 6), cache=cache)


# --------------------------------------------------------------------------------------------------
# Causality, window, sinks


def test_causal_mask():
    q_pos = torch.tensor([6, 9, 2])
    k_pos = torch.tensor([4, 0, 3, 9, 5, 1, 6, 7])
    expected = [[k <= q for k in k_pos.tolist()] for q in q_pos.tolist()]
    assert causal_mask(q_pos, k_pos).tolist() == expected


@pytest.mark.parametrize("window", [1, 3, 20])
@pytest.mark.parametrize("sink", [0, 1, 2])
def test_causal_mask_with_a_window_and_sinks(window, sink):
    q_pos = [6, 9, 2]
    k_pos = [4, 0, 3, 9, 5, 1, 6, 7]
    mask = streaming.causal_mask(torch.tensor(q_pos), torch.tensor(k_pos), window, sink)
    for row, q in zip(mask.tolist(), q_pos):
        for visible, k in zip(row, k_pos):
            assert visible == (k <= q and (q - k < window or k < sink)), (q, k)


def assert_causal(model):
    """A changed token changes the logits at its position, and nothing before it."""
    idx = tokens(1, 10)
    logits, _ = model(idx)
    for t in range(10):
        edited = idx.clone()
        edited[0, t] = (edited[0, t] + 1) % SIZES["vocab_size"]
        changed = (model(edited)[0] != logits).any(dim=-1)[0]
        assert not changed[:t].any(), t
        assert changed[t], t


def test_causality():
    assert_causal(make())


@pytest.mark.parametrize("window, sink", [(0, 0), (4, 0), (4, 1), (3, 2)])
def test_causality_of_streaming(window, sink):
    assert_causal(make_streaming(window=window, sink=sink))


def test_what_one_layer_sees_through_a_window():
    model = make_streaming(n_layer=1, window=3, sink=1).requires_grad_()
    idx = torch.arange(8)[None]
    model(idx)[0][0, 7].logsumexp(dim=-1).backward()
    seen = model.wte.weight.grad.abs().sum(dim=-1) > 0
    assert seen.nonzero().flatten().tolist() == [0, 5, 6, 7]

    weights = model.h[0].attn.weights  # (B, H, T, S)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 4, 8))
    last = (weights[0, :, 7] > 0).all(dim=0)
    assert last.tolist() == [True, False, False, False, False, True, True, True]


# --------------------------------------------------------------------------------------------------
# The cache of model.py


def read_in_chunks(model, cache, idx, lengths):
    """The logits of a text that comes in chunks of these lengths, the last of them repeated."""
    logits = []
    start = 0
    while start < idx.size(1):
        length = lengths[min(len(logits), len(lengths) - 1)]
        chunk = idx[:, start : start + length]
        logits.append(model(chunk, cache=cache)[0])
        start += length
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("sizes", [{}, {"n_kv_head": 1}, {"qk_norm": False}], ids=str)
@pytest.mark.parametrize("lengths", [[1], [5, 1], [16], [3], [1, 7], [4, 11, 1]], ids=str)
def test_cached_equals_uncached(sizes, lengths):
    model = make(**sizes)
    idx = tokens(2, 16)
    cache = KVCache(model.cfg, 2)
    assert_close(read_in_chunks(model, cache, idx, lengths), model(idx)[0])
    assert cache.length == 16


def test_the_cache_holds_the_keys_and_values_of_every_layer():
    model = make()
    cache = KVCache(model.cfg, 3)
    assert cache.k.shape == cache.v.shape == (2, 3, 2, 16, 4)  # layers, B, G, block_size, D

    # What was not written yet may be anything, and no query reads it.
    cache.k.fill_(math.nan)
    cache.v.fill_(math.nan)
    logits, _ = model(tokens(3, 5), cache=cache)
    assert logits.isfinite().all()
    for stored in (cache.k, cache.v):
        assert stored[:, :, :, :5].isfinite().all()
        assert stored[:, :, :, 5:].isnan().all()


def test_the_rows_of_a_cache_do_not_mix():
    model = make()
    together = read_in_chunks(model, KVCache(model.cfg, 3), tokens(3, 12), [5, 1])
    for row in range(3):
        idx = tokens(3, 12)[row : row + 1]
        alone = read_in_chunks(model, KVCache(model.cfg, 1), idx, [5, 1])
        assert_close(together[row : row + 1], alone)


# --------------------------------------------------------------------------------------------------
# The ring


@pytest.mark.parametrize("window", [1, 2, 5, 16])
@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize(
    "lengths", [[1], [2, 1], [7, 1], [19, 1], [3], [1, 5], [4, 11, 2], [40]], ids=str
)
def test_the_ring_equals_the_banded_mask(window, sink, lengths):
    """However the text is cut: before, at and beyond the point where the ring closes."""
    model = make_streaming(window=window, sink=sink)
    idx = tokens(2, 40)
    cache = streaming.KVCache(model.cfg, 2)
    assert_close(read_in_chunks(model, cache, idx, lengths), model(idx)[0], precision=2e-5)


def test_without_a_window_option_the_window_is_block_size():
    model = make_streaming()
    idx = tokens(2, 60)
    logits = read_in_chunks(model, streaming.KVCache(model.cfg, 2), idx, [5, 1])
    assert_close(logits.double(), reference(model, idx, window=16))


def test_streaming_needs_constant_memory():
    """20 windows further on, the cache is the same storage of 2 n_layer B G (sink + window) D
    floats, and it holds the sinks and the last window."""
    model = make_streaming(window=6, sink=2)
    idx = tokens(3, 8 + 20 * 6)
    cache = streaming.KVCache(model.cfg, 3)
    places = (cache.k.data_ptr(), cache.v.data_ptr(), cache.pos.data_ptr())
    logits = []
    for t in range(idx.size(1)):
        logits.append(model(idx[:, t : t + 1], cache=cache)[0])
        assert places == (cache.k.data_ptr(), cache.v.data_ptr(), cache.pos.data_ptr())
        size = cache.k.untyped_storage().nbytes() + cache.v.untyped_storage().nbytes()
        assert size == 4 * 2 * 2 * 3 * 2 * (6 + 2) * 4
    assert_close(torch.cat(logits, dim=1), model(idx)[0], precision=2e-5)
    assert sorted(cache.pos.tolist()) == [0, 1, 122, 123, 124, 125, 126, 127]


# --------------------------------------------------------------------------------------------------
# Generating


def assert_likeliest(chosen, logits):
    """chosen (B,) are the likeliest tokens by logits (B, V), or as likely up to rounding."""
    gap = logits.amax(dim=-1) - logits.gather(-1, chosen[:, None])[:, 0]
    assert (gap <= 1e-4 * logits.abs().max()).all()


@pytest.mark.parametrize("prompt_length", [1, 9, 16, 30])
@pytest.mark.parametrize("block_size", [16, 5, 1])
def test_generate_goes_on_when_the_cache_is_full(prompt_length, block_size):
    """The context grows to block_size tokens, and is then cut to the newer half of them."""
    model = make(block_size=block_size)
    idx = tokens(2, prompt_length)
    out = model.generate(idx, 40, temperature=0)
    assert out.shape == (2, prompt_length + 40)
    assert torch.equal(out[:, :prompt_length], idx)

    start = max(0, prompt_length - block_size)
    for t in range(prompt_length, prompt_length + 40):
        if t - start > block_size:
            start = t - max(1, block_size // 2)
        logits, _ = model(out[:, start:t])
        assert_likeliest(out[:, t], logits[:, -1])


def test_generate_reads_each_token_once_while_the_cache_has_room(monkeypatch):
    model = make()
    lengths = []
    forward = model.forward

    def counting_forward(idx, targets=None, cache=None):
        lengths.append(idx.size(1))
        return forward(idx, targets, cache)

    monkeypatch.setattr(model, "forward", counting_forward)
    model.generate(tokens(2, 7), 12, temperature=0)
    # A prompt of 7 and 9 new tokens fill the cache of 16. The last 8 are read again.
    assert lengths == [7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 8, 1]


@pytest.mark.parametrize("sizes", [{"window": 4, "sink": 1}, {"window": 5}, {}], ids=str)
def test_streaming_generates_without_end(sizes):
    """From a prompt longer than the window, against the uncached forward pass of everything."""
    model = make_streaming(**sizes)
    idx = tokens(2, 9)
    out = model.generate(idx, 60, temperature=0)
    assert out.shape == (2, 69)
    assert torch.equal(out[:, :9], idx)
    logits, _ = model(out[:, :-1])
    for t in range(9, 69):
        assert_likeliest(out[:, t], logits[:, t - 1])


@pytest.mark.parametrize("build", [make, make_streaming])
def test_generate_samples_as_its_options_say(build):
    model = build()
    idx = tokens(4, 3)
    greedy = model.generate(idx, 10, temperature=0)
    torch.manual_seed(0)
    assert not torch.equal(model.generate(idx, 10), greedy)
    assert torch.equal(model.generate(idx, 10, top_k=1), greedy)
    assert torch.equal(model.generate(idx, 10, top_p=1e-6), greedy)
    assert torch.equal(model.generate(idx, 10, top_p=0.0), greedy)
    assert torch.equal(model.generate(idx, 10, temperature=1e-4), greedy)
    assert torch.equal(model.generate(idx, 0), idx)


@pytest.mark.parametrize("build", [make, make_streaming])
def test_generate_in_half_precision(build):
    model = build().bfloat16()
    out = model.generate(tokens(2, 5), 20, temperature=0)
    assert out.shape == (2, 25)


# --------------------------------------------------------------------------------------------------
# Sampling


def draws(**options):
    """The set of tokens that come up in 500 draws from the probabilities .1, .5 and .4."""
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.5, 0.4]).log().expand(500, -1)
    return sorted(set(sample(logits, **options).tolist()))


def test_sample_keeps_the_tokens_that_its_options_allow():
    assert draws() == [0, 1, 2]
    assert draws(temperature=0) == [1]
    assert draws(top_k=2) == [1, 2]
    assert draws(top_k=2, top_p=0.5) == [1]
    assert draws(top_p=0.8) == [1, 2]
    assert draws(top_p=0.95) == [0, 1, 2]  # the token that crosses p is kept


def test_sample_draws_with_the_probabilities_of_the_temperature():
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.5, 0.4]).log()
    ids = sample(logits.expand(20000, -1), temperature=2.0)
    shares = ids.bincount(minlength=3) / 20000
    torch.testing.assert_close(shares, (logits / 2).softmax(dim=-1), rtol=0, atol=0.02)


# --------------------------------------------------------------------------------------------------
# Gradients and learning


@pytest.mark.parametrize("build", [make, make_streaming])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_gets_a_gradient(build, tied):
    model = build(tied=tied).requires_grad_()
    _, loss = model(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[2, 3, 4, 5, 6]]))
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name

    # A tied embedding is the head, too, and a softmax moves the logits of all tokens.
    rows = model.wte.weight.grad.abs().sum(dim=-1) > 0
    assert rows.sum() == (13 if tied else 5)
    separate_head = 0 if tied else 1
    assert len(list(model.parameters())) == 2 * 11 + 2 + separate_head


def overfit(model, batch):
    """Trains on one batch (B, T + 1) -> the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        _, loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def rows_to_learn():
    """Four texts. The first token says which of the four it is."""
    batch = tokens(4, 13)
    batch[:, 0] = torch.arange(4)
    return batch


def test_the_model_learns_a_batch_by_heart_and_generates_it():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, "n_embd": 32}))
    batch = rows_to_learn()
    assert overfit(model, batch) < 0.05
    assert torch.equal(model.generate(batch[:, :1], 12, temperature=0), batch)


def test_with_a_short_window_the_sink_tells_the_rows_apart():
    torch.manual_seed(0)
    cfg = streaming.GPTConfig(**{**SIZES, "n_embd": 32, "window": 4, "sink": 1})
    model = streaming.GPT(cfg)
    batch = rows_to_learn()
    assert overfit(model, batch) < 0.05
    assert torch.equal(model.generate(batch[:, :1], 12, temperature=0), batch)
