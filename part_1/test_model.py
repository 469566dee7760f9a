"""
Tests of part_1/model.py against numpy loops and torch's own layers, never against our own code.
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

from model import MLP, Attention, Block, GPTConfig, LayerNorm, attention, causal_mask

CFG = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=4, n_embd=32)


def randomize(module, seed=0, std=0.2):
    """Makes every parameter random. A new block's projections are zero, which would hide whatever
    stands before them. Gains stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = std * torch.randn(p.shape, generator=generator)
        is_gain = p.ndim == 1 and name.endswith("weight")
        p.data = 1 + noise if is_gain else noise
    return module


def past(T):
    """The mask of T tokens that look at themselves and the tokens before them."""
    return causal_mask(torch.arange(T), torch.arange(T))


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected, tolerance=1e-5):
    """The tolerance is relative to the largest number."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=tolerance * scale)


# against slower or other implementations ----------------------------------------------------------


def test_causal_mask():
    assert past(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]

    # two queries at positions 2 and 3, against five keys
    later = causal_mask(torch.tensor([2, 3]), torch.arange(5))
    assert later.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


def test_attention_against_loops():
    B, H, T, D = 2, 3, 5, 4
    q = normal(B, H, T, D, seed=0)
    k = normal(B, H, T, D, seed=1)
    v = normal(B, H, T, D, seed=2)
    y, weights = attention(q, k, v, past(T))
    for b, h, t in np.ndindex(B, H, T):
        scores = [float(q[b, h, t] @ k[b, h, s]) / math.sqrt(D) for s in range(t + 1)]
        share = np.exp(scores) / np.exp(scores).sum()
        expected = np.zeros(D)
        for s in range(t + 1):
            expected += share[s] * v[b, h, s].numpy()
        np.testing.assert_allclose(y[b, h, t], expected, atol=1e-5)
        padded = np.append(share, np.zeros(T - 1 - t))  # no weight on later tokens
        np.testing.assert_allclose(weights[b, h, t], padded, atol=1e-6)


def test_attention_against_torch():
    q = normal(2, 4, 7, 8, seed=0)
    k = normal(2, 4, 7, 8, seed=1)
    v = normal(2, 4, 7, 8, seed=2)
    y, weights = attention(q, k, v, past(7))
    assert_close(y, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert_close(weights.sum(dim=-1), torch.ones(2, 4, 7))
    assert (weights.triu(1) == 0).all()


@pytest.mark.parametrize("D", [4, 256])
def test_the_scores_keep_their_variance(D):
    """Without 1 / sqrt(D) the softmax of a wide head would put nearly all its weight on one key."""
    q = normal(1, 64, 8, D)
    k = normal(1, 64, 8, D, seed=2)
    _, weights = attention(q, k, k, past(8))
    largest = weights[:, :, -1].amax(dim=-1)
    assert 0.2 < largest.mean() < 0.6


def test_layer_norm_against_torch():
    layer = randomize(LayerNorm(32))
    reference = nn.LayerNorm(32)
    reference.load_state_dict(layer.state_dict())
    x = 3 * normal(4, 5, 32) + 7  # far from mean 0 and variance 1
    assert_close(layer(x), reference(x))


def test_layer_norm_gives_mean_0_and_variance_1():
    y = LayerNorm(32)(3 * normal(4, 5, 32) + 7)
    torch.testing.assert_close(y.mean(dim=-1), torch.zeros(4, 5), atol=1e-5, rtol=0)
    variance = y.var(dim=-1, unbiased=False)
    torch.testing.assert_close(variance, torch.ones(4, 5), atol=1e-4, rtol=0)


def test_layer_norm_of_equal_channels_is_finite():
    assert LayerNorm(32)(torch.full((1, 32), 5.0)).isfinite().all()


def test_attention_module_against_torch():
    layer = randomize(Attention(CFG))
    reference = nn.MultiheadAttention(CFG.n_embd, CFG.n_head, bias=False, batch_first=True)
    projections = [layer.c_q.weight, layer.c_k.weight, layer.c_v.weight]
    reference.in_proj_weight.data = torch.cat(projections).data
    reference.out_proj.weight.data = layer.c_proj.weight.data

    x = normal(3, 8, CFG.n_embd)
    y, weights = reference(x, x, x, attn_mask=~past(8), average_attn_weights=False)
    assert_close(layer(x, past(8)), y)
    assert_close(layer.weights, weights)


def test_mlp_against_numpy():
    mlp = randomize(MLP(CFG))
    x = normal(6, CFG.n_embd)
    hidden = x.numpy() @ mlp.c_fc.weight.detach().numpy().T
    assert hidden.shape == (6, 4 * CFG.n_embd)
    phi = 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))  # Hendrycks & Gimpel, eq. 1
    expected = (hidden * phi) @ mlp.c_proj.weight.detach().numpy().T
    assert_close(mlp(x).detach(), torch.from_numpy(expected).float())


def test_block_against_torch():
    block = randomize(Block(CFG))
    reference = nn.TransformerEncoderLayer(
        CFG.n_embd,
        CFG.n_head,
        4 * CFG.n_embd,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    attn = block.attn
    weights = {
        "self_attn.in_proj_weight": torch.cat([attn.c_q.weight, attn.c_k.weight, attn.c_v.weight]),
        "self_attn.in_proj_bias": torch.zeros(3 * CFG.n_embd),
        "self_attn.out_proj.weight": attn.c_proj.weight,
        "self_attn.out_proj.bias": torch.zeros(CFG.n_embd),
        "linear1.weight": block.mlp.c_fc.weight,
        "linear1.bias": torch.zeros(4 * CFG.n_embd),
        "linear2.weight": block.mlp.c_proj.weight,
        "linear2.bias": torch.zeros(CFG.n_embd),
        "norm1.weight": block.ln_1.weight,
        "norm1.bias": block.ln_1.bias,
        "norm2.weight": block.ln_2.weight,
        "norm2.bias": block.ln_2.bias,
    }
    reference.load_state_dict(weights)
    x = normal(3, 8, CFG.n_embd)
    assert_close(block(x, past(8)), reference(x, src_mask=~past(8)))


def test_a_new_block_changes_nothing():
    x = normal(2, 8, CFG.n_embd)
    assert torch.equal(Block(CFG)(x, past(8)), x)


# what a token may know ----------------------------------------------------------------------------


@pytest.mark.parametrize("t", range(8))
def test_a_change_at_t_reaches_t_and_later_tokens_only(t):
    before = normal(1, 8, CFG.n_embd)
    after = before.clone()
    after[0, t] += 1
    for seed in range(2):
        block = randomize(Block(CFG), seed)
        before = block(before, past(8))
        after = block(after, past(8))
    moved = (before != after).any(dim=-1)[0]
    assert not moved[:t].any()
    assert moved[t:].all()


def test_a_block_does_not_know_the_order_of_the_past():
    """The last token sees the past as a set. The positions must come with the input."""
    block = randomize(Block(CFG))
    x = normal(1, 8, CFG.n_embd)
    shuffled = x[:, [3, 0, 6, 1, 5, 2, 4, 7]]
    assert_close(block(shuffled, past(8))[:, -1], block(x, past(8))[:, -1])


# gradients and precision --------------------------------------------------------------------------


def parameters_with_gradient(block):
    """The names of the parameters whose gradient is not zero everywhere."""
    y = block(normal(2, 8, CFG.n_embd), past(8))
    (y * normal(2, 8, CFG.n_embd, seed=2)).sum().backward()
    names = set()
    for name, p in block.named_parameters():
        assert p.grad.isfinite().all()
        if p.grad.abs().max() > 0:
            names.add(name)
    return names


def test_every_parameter_gets_a_gradient():
    block = randomize(Block(CFG))
    assert parameters_with_gradient(block) == set(block.state_dict())


def test_in_a_new_block_only_the_output_projections_get_a_gradient():
    assert parameters_with_gradient(Block(CFG)) == {"attn.c_proj.weight", "mlp.c_proj.weight"}


def test_the_residual_stream_carries_the_gradient_unscaled():
    """Through 16 new blocks the derivative of the output by the input is 1, because in pre-norm no
    norm stands on the stream itself."""
    x = normal(1, 8, CFG.n_embd).requires_grad_()
    y = x
    for _ in range(16):
        y = Block(CFG)(y, past(8))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_fp32_is_close_to_float64():
    x = normal(4, 8, CFG.n_embd)
    exact = x.double()
    for seed in range(2):
        block = randomize(Block(CFG), seed)
        x = block(x, past(8))
        exact = block.double()(exact, past(8))
    assert x.dtype == torch.float32
    assert exact.dtype == torch.float64
    assert (x - exact).abs().max() < 1e-5 * exact.abs().max()


def test_large_scores_do_not_overflow():
    q = 1e4 * normal(1, 1, 6, 8)
    k = 1e4 * normal(1, 1, 6, 8, seed=2)
    y, weights = attention(q, k, normal(1, 1, 6, 8), past(6))
    assert y.isfinite().all()
    assert weights.isfinite().all()


# two blocks can learn -----------------------------------------------------------------------------


class Tiny(nn.Module):
    """Two blocks with as little around them as possible."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(CFG.vocab_size, CFG.n_embd)
        self.wpe = nn.Embedding(CFG.block_size, CFG.n_embd)
        self.h = nn.ModuleList([Block(CFG) for _ in range(CFG.n_layer)])
        self.head = nn.Linear(CFG.n_embd, CFG.vocab_size)

    def forward(self, idx):
        T = idx.size(1)
        x = self.wte(idx) + self.wpe(torch.arange(T))
        for block in self.h:
            x = block(x, past(T))
        return self.head(x)


def test_two_blocks_learn_a_batch_by_heart():
    torch.manual_seed(0)
    batch = torch.randint(CFG.vocab_size, (4, CFG.block_size + 1))
    batch[:, 0] = torch.arange(4)  # the first token says which of the four rows it is
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05

    # From the first token on, the model says each row itself.
    idx = batch[:, :1]
    while idx.size(1) < batch.size(1):
        token = model(idx)[:, -1:].argmax(dim=-1)
        idx = torch.cat([idx, token], dim=1)
    assert torch.equal(idx, batch)


def test_the_channels_must_be_divisible_by_the_heads():
    with pytest.raises(AssertionError, match="n_embd=30 must be divisible by n_head=4"):
        GPTConfig(n_embd=30, n_head=4)
