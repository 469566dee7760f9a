"""
Tests of Part 1: pytest part_1. The oracles are numpy loops and torch's own layers, never our code.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import MLP, Attention, Block, GPTConfig, LayerNorm, attention, causal_mask

CFG = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=4, n_embd=32)


def randomised(module, seed=0, std=0.2):
    """Every parameter random, gains about 1: a projection that starts at zero would hide all that stands before it."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = (p.ndim == 1 and p.data.mean() > 0.5) + std * torch.randn(p.shape, generator=g)
    return module


def past(T):
    return causal_mask(torch.arange(T), torch.arange(T))


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# parity --------------------------------------------------------------------------------------------------------------

def test_causal_mask():
    assert past(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    later = causal_mask(torch.tensor([2, 3]), torch.arange(5))  # two queries further on, against five keys
    assert later.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


def test_attention_against_loops():
    B, H, T, D = 2, 3, 5, 4
    q, k, v = (normal(B, H, T, D, seed=s) for s in range(3))
    y, weights = attention(q, k, v, past(T))
    for b, h, t in np.ndindex(B, H, T):
        scores = [float(q[b, h, t] @ k[b, h, s]) / math.sqrt(D) for s in range(t + 1)]
        e = np.exp(scores)
        expected = sum(w * v[b, h, s].numpy() for s, w in enumerate(e / e.sum()))
        np.testing.assert_allclose(y[b, h, t], expected, atol=1e-5)
        np.testing.assert_allclose(weights[b, h, t], np.append(e / e.sum(), np.zeros(T - 1 - t)), atol=1e-6)


def test_attention_against_torch():
    q, k, v = (normal(2, 4, 7, 8, seed=s) for s in range(3))
    y, weights = attention(q, k, v, past(7))
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 7))
    assert weights.triu(1).eq(0).all()


def test_scores_keep_their_variance():
    """Without 1 / sqrt(D) a softmax over wide heads would put nearly all its weight on one key."""
    for D in (4, 256):
        _, weights = attention(normal(1, 64, 8, D), normal(1, 64, 8, D, seed=2), normal(1, 64, 8, D), past(8))
        assert 0.2 < weights[:, :, -1].max(dim=-1).values.mean() < 0.6


def test_layer_norm_against_torch():
    ours, theirs = randomised(LayerNorm(32)), nn.LayerNorm(32)
    theirs.load_state_dict(ours.state_dict())
    x = 3 * normal(4, 5, 32) + 7  # far from mean 0 and variance 1
    torch.testing.assert_close(ours(x), theirs(x))
    y = LayerNorm(32)(x)
    torch.testing.assert_close(y.mean(dim=-1), torch.zeros(4, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(dim=-1, unbiased=False), torch.ones(4, 5), atol=1e-4, rtol=0)
    assert LayerNorm(32)(torch.zeros(1, 32)).isfinite().all()  # a constant row: eps saves it


def test_attention_module_against_torch():
    ours = randomised(Attention(CFG))
    theirs = nn.MultiheadAttention(CFG.n_embd, CFG.n_head, bias=False, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([ours.c_q.weight, ours.c_k.weight, ours.c_v.weight]).data
    theirs.out_proj.weight.data = ours.c_proj.weight.data
    x = normal(3, 8, CFG.n_embd)
    y, weights = theirs(x, x, x, attn_mask=~past(8), average_attn_weights=False)
    torch.testing.assert_close(ours(x, past(8)), y)
    torch.testing.assert_close(ours.weights, weights)


def test_mlp_against_numpy():
    mlp = randomised(MLP(CFG))
    x = normal(6, CFG.n_embd)
    h = x.numpy() @ mlp.c_fc.weight.detach().numpy().T
    assert h.shape == (6, 4 * CFG.n_embd)
    h = 0.5 * h * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    np.testing.assert_allclose(mlp(x).detach(), h @ mlp.c_proj.weight.detach().numpy().T, atol=1e-5)


def test_block_against_torch():
    ours = randomised(Block(CFG))
    theirs = nn.TransformerEncoderLayer(CFG.n_embd, CFG.n_head, 4 * CFG.n_embd, dropout=0.0, activation="gelu",
                                        batch_first=True, norm_first=True)
    a, m = ours.attn, ours.mlp
    theirs.load_state_dict({
        "self_attn.in_proj_weight": torch.cat([a.c_q.weight, a.c_k.weight, a.c_v.weight]),
        "self_attn.in_proj_bias": torch.zeros(3 * CFG.n_embd),
        "self_attn.out_proj.weight": a.c_proj.weight,
        "self_attn.out_proj.bias": torch.zeros(CFG.n_embd),
        "linear1.weight": m.c_fc.weight,
        "linear1.bias": torch.zeros(4 * CFG.n_embd),
        "linear2.weight": m.c_proj.weight,
        "linear2.bias": torch.zeros(CFG.n_embd),
        **{f"norm{i}.{name}": p for i, ln in ((1, ours.ln_1), (2, ours.ln_2)) for name, p in ln.named_parameters()},
    })
    x = normal(3, 8, CFG.n_embd)
    torch.testing.assert_close(ours(x, past(8)), theirs(x, src_mask=~past(8)), atol=1e-5, rtol=1e-5)


def test_new_block_changes_nothing():
    x = normal(2, 8, CFG.n_embd)
    assert torch.equal(Block(CFG)(x, past(8)), x)


# causality -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("t", range(8))
def test_causality(t):
    blocks = [randomised(Block(CFG), seed) for seed in range(2)]
    before = after = normal(1, 8, CFG.n_embd)
    after = after.clone()
    after[0, t] += 1
    for block in blocks:
        before, after = block(before, past(8)), block(after, past(8))
    moved = (before != after).any(dim=-1)[0]
    assert not moved[:t].any() and moved[t:].all()


def test_attention_alone_does_not_know_the_order():
    """The last token sees the past as a set. Position must come from somewhere: Part 2 adds it to the embedding."""
    block = randomised(Block(CFG))
    x = normal(1, 8, CFG.n_embd)
    shuffled = x[:, [3, 0, 6, 1, 5, 2, 4, 7]]
    torch.testing.assert_close(block(x, past(8))[:, -1], block(shuffled, past(8))[:, -1], atol=1e-5, rtol=1e-5)


# gradient flow, precision --------------------------------------------------------------------------------------------

def gradients(block):
    x = normal(2, 8, CFG.n_embd)
    (block(x, past(8)) * normal(2, 8, CFG.n_embd, seed=2)).sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())
    return {name: p.grad.abs().max() > 0 for name, p in block.named_parameters()}


def test_gradient_flow():
    assert all(gradients(randomised(Block(CFG))).values())
    new = gradients(Block(CFG))
    assert {name for name, flows in new.items() if flows} == {"attn.c_proj.weight", "mlp.c_proj.weight"}


def test_the_residual_stream_carries_the_gradient_whole():
    """d(out)/d(x) through many new blocks is 1: pre-norm leaves a road without any norm on it."""
    x = normal(1, 8, CFG.n_embd).requires_grad_()
    y = x
    for _ in range(16):
        y = Block(CFG)(y, past(8))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_precision():
    """fp32 against float64: two blocks of random weights stay within 1e-5 of the largest value."""
    x = normal(4, 8, CFG.n_embd)
    exact = x.double()
    for seed in range(2):
        block = randomised(Block(CFG), seed)
        x = block(x, past(8))
        exact = block.double()(exact, past(8))
    assert x.dtype == torch.float32 and exact.dtype == torch.float64
    assert (x - exact).abs().max() < 1e-5 * exact.abs().max()


def test_large_scores_do_not_overflow():
    y, weights = attention(1e4 * normal(1, 1, 6, 8), 1e4 * normal(1, 1, 6, 8, seed=2), normal(1, 1, 6, 8), past(6))
    assert y.isfinite().all() and weights.isfinite().all()


# it learns -----------------------------------------------------------------------------------------------------------

class Tiny(nn.Module):
    """The least around two blocks that can say a sequence by heart."""

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


def test_overfit_one_batch():
    torch.manual_seed(0)
    batch = torch.randint(CFG.vocab_size, (4, CFG.block_size + 1))
    batch[:, 0] = torch.arange(4)  # the first token says which of the four it is
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    idx = batch[:, :1]
    while idx.size(1) < batch.size(1):
        idx = torch.cat([idx, model(idx)[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(idx, batch)


def test_sizes_that_do_not_divide():
    with pytest.raises(AssertionError, match="n_embd=30"):
        GPTConfig(n_embd=30, n_head=4)
