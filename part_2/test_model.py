"""
Tests of part_2/model.py. The oracles are torch's own layers and numpy, never our code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math

import numpy as np
import pytest
import torch
import torch.nn as nn

from model import GPT, GPTConfig, sample

TINY = dict(vocab_size=13, block_size=8, n_layer=2, n_head=2, n_embd=16)


def randomised(model, seed=0, std=0.2):
    """Makes every parameter random, with gains near 1. A projection that starts at zero would hide
    everything before it."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        is_gain = p.ndim == 1 and p.data.mean() > 0.5
        p.data = float(is_gain) + std * torch.randn(p.shape, generator=generator)
    return model


def make(**sizes):
    return randomised(GPT(GPTConfig(**{**TINY, **sizes})))


def tokens(B, T, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TINY["vocab_size"], (B, T), generator=generator)


def close(actual, expected, relative=1e-5):
    """Are two tensors equal up to rounding, relative to the size of the numbers in them?"""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=relative, atol=relative * scale)


# parity ------------------------------------------------------------------------------------------


def reference(model, idx):
    """The same GPT, made of torch's own encoder layers without their biases."""
    cfg = model.cfg
    T = idx.size(1)
    x = model.wte.weight[idx] + model.wpe.weight[:T]
    for block in model.h:
        layer = nn.TransformerEncoderLayer(
            cfg.n_embd,
            cfg.n_head,
            4 * cfg.n_embd,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        ).to(x.dtype)
        a = block.attn
        m = block.mlp
        weights = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
        weights |= {
            "self_attn.in_proj_weight": torch.cat([a.c_q.weight, a.c_k.weight, a.c_v.weight]),
            "self_attn.out_proj.weight": a.c_proj.weight,
            "linear1.weight": m.c_fc.weight,
            "linear2.weight": m.c_proj.weight,
        }
        for i, ln in ((1, block.ln_1), (2, block.ln_2)):
            weights |= {f"norm{i}.weight": ln.weight, f"norm{i}.bias": ln.bias}
        layer.load_state_dict(weights)
        x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(T, dtype=x.dtype))
    x = nn.functional.layer_norm(x, (cfg.n_embd,), model.ln_f.weight, model.ln_f.bias)
    return x @ model.lm_head.weight.T


@pytest.mark.parametrize("T", [1, 5, 8])
def test_logits_against_torch(T):
    model = make()
    idx = tokens(3, T)
    logits, loss = model(idx)
    assert loss is None
    assert logits.shape == (3, T, TINY["vocab_size"])
    close(logits, reference(model, idx))


def test_loss_against_numpy():
    model = make()
    targets = tokens(3, 8, seed=2)
    logits, loss = model(tokens(3, 8), targets)
    z = logits.detach().double().numpy()
    nats = []
    for b, t in np.ndindex(3, 8):
        nats.append(math.log(np.exp(z[b, t]).sum()) - z[b, t, targets[b, t]])
    assert loss.item() == pytest.approx(np.mean(nats), rel=1e-5)


def test_first_loss_is_that_of_guessing():
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    idx = torch.randint(256, (4, 65))
    _, loss = model(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(math.log(256), abs=0.05)


def test_too_long_a_text_is_refused():
    with pytest.raises(AssertionError, match="9 tokens do not fit in block_size=8"):
        make()(tokens(1, 9))


def test_sizes_that_do_not_divide():
    with pytest.raises(AssertionError, match="n_embd=30"):
        GPTConfig(n_embd=30, n_head=4)


# causality ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", range(8))
def test_causality(t):
    model = make()
    idx = tokens(1, 8)
    edited = idx.clone()
    edited[0, t] = (edited[0, t] + 1) % TINY["vocab_size"]
    moved = (model(idx)[0] != model(edited)[0]).any(dim=-1)[0]
    assert not moved[:t].any()
    assert moved[t:].all()


def test_a_longer_text_begins_with_the_same_logits():
    model = make()
    idx = tokens(2, 8)
    close(model(idx)[0][:, :5], model(idx[:, :5])[0])


def test_position_matters():
    model = make()
    idx = tokens(1, 8)
    shuffled = idx[:, [3, 0, 6, 1, 5, 2, 4, 7]]
    assert (model(idx)[0][:, -1] - model(shuffled)[0][:, -1]).abs().max() > 1e-3


# gradient flow, precision ------------------------------------------------------------------------


def test_gradient_flow():
    model = make()
    idx = torch.tensor([[1, 2, 3, 4, 5]])
    targets = torch.tensor([[2, 3, 4, 5, 6]])
    model(idx, targets)[1].backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name
    rows = model.wte.weight.grad.abs().sum(dim=-1) > 0
    assert rows.nonzero().flatten().tolist() == [1, 2, 3, 4, 5]  # only tokens that were read
    positions = model.wpe.weight.grad.abs().sum(dim=-1) > 0
    assert positions.tolist() == 5 * [True] + 3 * [False]


def test_gradient_stays_in_its_row():
    """A loss on row 0 of a batch says nothing about row 1."""
    model = make()
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    model(idx)[0][0].logsumexp(dim=-1).sum().backward()
    rows = model.wte.weight.grad.abs().sum(dim=-1) > 0
    assert rows.nonzero().flatten().tolist() == [1, 2, 3]


def test_precision():
    """fp32 against float64: logits within 1e-5 of the largest one."""
    idx = tokens(4, 8)
    logits, _ = make()(idx)
    exact, _ = make().double()(idx)
    assert logits.dtype == torch.float32
    assert exact.dtype == torch.float64
    assert (logits - exact).abs().max() < 1e-5 * exact.abs().max()


# sampling ----------------------------------------------------------------------------------------


def drawn(p, n=2000, **options):
    """The share of n draws from the probabilities p that each token gets."""
    torch.manual_seed(0)
    logits = torch.tensor(p).log().expand(n, -1)
    return (sample(logits, **options).bincount(minlength=len(p)) / n).tolist()


def test_top_p_keeps_the_token_that_crosses_p():
    share = drawn([0.5, 0.4, 0.1], top_p=0.8)  # keeps two, renormalized
    assert share[2] == 0
    assert share[0] == pytest.approx(5 / 9, abs=0.04)

    def kept(p, top_p):
        return [share > 0 for share in drawn(p, top_p=top_p)]

    assert kept([0.1, 0.5, 0.4], top_p=0.45) == [False, True, False]  # wherever it stands
    assert kept([0.5, 0.4, 0.1], top_p=0.95) == [True, True, True]
    assert kept([0.2, 0.5, 0.3], top_p=1e-6) == [False, True, False]  # at least one is left


def test_top_k():
    share = drawn([0.1, 0.2, 0.3, 0.4], top_k=2)
    assert share[:2] == [0, 0]
    assert share[2] == pytest.approx(3 / 7, abs=0.04)
    assert drawn([0.1, 0.2, 0.3, 0.4], top_k=1) == [0, 0, 0, 1]
    assert drawn([0.1, 0.2, 0.3, 0.4], top_k=99) == drawn([0.1, 0.2, 0.3, 0.4])


def test_top_k_then_top_p():
    """Of the two that top_k leaves, renormalized to [.56, .44], p = .5 keeps one."""
    share = drawn([0.5, 0.4, 0.1], top_k=2, top_p=0.5)
    assert [s > 0 for s in share] == [True, False, False]


def test_temperature():
    p = np.array([0.1, 0.2, 0.7])
    for temperature in (0.5, 1.0, 2.0):
        expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
        share = drawn(p.tolist(), n=20000, temperature=temperature)
        np.testing.assert_allclose(share, expected, atol=0.02)
    assert drawn(p.tolist(), temperature=0) == [0, 0, 1]


def test_each_row_is_sampled_from_its_own_distribution():
    logits = torch.full((5, 5), -100.0).fill_diagonal_(0)
    assert sample(logits, top_k=3, top_p=0.9).tolist() == [0, 1, 2, 3, 4]


def test_generate_slides_its_window():
    """Past block_size it goes on with the last block_size tokens, at positions from 0 on."""
    model = make()
    idx = tokens(3, 5)
    out = model.generate(idx, 20, temperature=0)
    assert out.shape == (3, 25)
    assert torch.equal(out[:, :5], idx)
    for t in range(5, 25):
        logits = reference(model, out[:, max(0, t - 8) : t])
        assert torch.equal(out[:, t], logits[:, -1].argmax(dim=-1)), t
    alone = model.generate(idx[1:2], 20, temperature=0)
    assert torch.equal(alone[0], out[1])


def test_generate_draws_from_the_model():
    """Each new token of 4,000 equal prompts comes as often as the softmax says."""
    model = make()
    idx = tokens(1, 6)
    torch.manual_seed(0)
    new = model.generate(idx.expand(4000, -1), 1)[:, -1]
    p = reference(model, idx)[0, -1].softmax(dim=-1)
    torch.testing.assert_close(new.bincount(minlength=13) / 4000, p.detach(), atol=0.03, rtol=0)


def test_overfit_one_batch():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, "n_embd": 32}))
    batch = tokens(4, 9)
    batch[:, 0] = torch.arange(4)  # the first token says which of the four it is
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        _, loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert torch.equal(model.generate(batch[:, :1], 8, temperature=0), batch)
