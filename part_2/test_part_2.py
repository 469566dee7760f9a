"""
Tests of Part 2: pytest part_2. The oracles are torch's own layers and numpy, never our code.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math

import numpy as np
import pytest
import torch
import torch.nn as nn

from model import GPT, GPTConfig, sample

TINY = dict(vocab_size=13, block_size=8, n_layer=2, n_head=2, n_embd=16)


def randomised(model, seed=0, std=0.2):
    """Every parameter random, gains about 1: a projection that starts at zero would hide all that stands before it."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = (p.ndim == 1 and p.data.mean() > 0.5) + std * torch.randn(p.shape, generator=g)
    return model


def make(**sizes):
    return randomised(GPT(GPTConfig(**{**TINY, **sizes})))


def tokens(B, T, seed=1):
    return torch.randint(TINY["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


# parity --------------------------------------------------------------------------------------------------------------

def reference(model, idx):
    """The same GPT out of torch's own encoder layers, without their biases."""
    cfg, T = model.cfg, idx.size(1)
    x = model.wte.weight[idx] + model.wpe.weight[:T]
    for block in model.h:
        layer = nn.TransformerEncoderLayer(cfg.n_embd, cfg.n_head, 4 * cfg.n_embd, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True).to(x.dtype)
        a, m = block.attn, block.mlp
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
    model, idx = make(), tokens(3, T)
    logits, loss = model(idx)
    assert loss is None and logits.shape == (3, T, TINY["vocab_size"])
    torch.testing.assert_close(logits, reference(model, idx), atol=1e-5, rtol=1e-5)


def test_loss_against_numpy():
    model, idx, targets = make(), tokens(3, 8), tokens(3, 8, seed=2)
    logits, loss = model(idx, targets)
    z = logits.detach().double().numpy()
    nats = [math.log(np.exp(z[b, t]).sum()) - z[b, t, targets[b, t]] for b, t in np.ndindex(3, 8)]
    assert abs(loss.item() - np.mean(nats)) < 1e-5


def test_first_loss_is_that_of_guessing():
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    idx = torch.randint(256, (4, 65))
    assert abs(model(idx[:, :-1], idx[:, 1:])[1].item() - math.log(256)) < 0.05


def test_too_long_a_text_is_refused():
    with pytest.raises(AssertionError, match="9 tokens do not fit into block_size=8"):
        make()(tokens(1, 9))


def test_sizes_that_do_not_divide():
    with pytest.raises(AssertionError, match="n_embd=30"):
        GPTConfig(n_embd=30, n_head=4)


# causality -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("t", range(8))
def test_causality(t):
    model, idx = make(), tokens(1, 8)
    edited = idx.clone()
    edited[0, t] = (edited[0, t] + 1) % TINY["vocab_size"]
    moved = (model(idx)[0] != model(edited)[0]).any(dim=-1)[0]
    assert not moved[:t].any() and moved[t:].all()


def test_a_longer_text_begins_with_the_same_logits():
    model, idx = make(), tokens(2, 8)
    torch.testing.assert_close(model(idx)[0][:, :5], model(idx[:, :5])[0], atol=1e-6, rtol=1e-5)


def test_position_matters():
    model, idx = make(), tokens(1, 8)
    shuffled = idx[:, [3, 0, 6, 1, 5, 2, 4, 7]]
    assert (model(idx)[0][:, -1] - model(shuffled)[0][:, -1]).abs().max() > 1e-3


# gradient flow, precision --------------------------------------------------------------------------------------------

def test_gradient_flow():
    model = make()
    idx, targets = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[2, 3, 4, 5, 6]])
    model(idx, targets)[1].backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    rows = model.wte.weight.grad.abs().sum(dim=-1) > 0
    assert rows.nonzero().flatten().tolist() == [1, 2, 3, 4, 5]  # only tokens that were read
    assert (model.wpe.weight.grad.abs().sum(dim=-1) > 0).tolist() == 5 * [True] + 3 * [False]


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
    logits, exact = make()(idx)[0], make().double()(idx)[0]
    assert logits.dtype == torch.float32 and exact.dtype == torch.float64
    assert (logits - exact).abs().max() < 1e-5 * exact.abs().max()


# sampling ------------------------------------------------------------------------------------------------------------

def drawn(p, n=2000, **options):
    """Which tokens come, and how often, of n draws from the probabilities p."""
    torch.manual_seed(0)
    logits = torch.tensor(p).log().expand(n, -1)
    return (sample(logits, **options).bincount(minlength=len(p)) / n).tolist()


def test_top_p_keeps_the_token_that_crosses_p():
    share = drawn([0.5, 0.4, 0.1], top_p=0.8)
    assert share[2] == 0 and share[0] == pytest.approx(5 / 9, abs=0.04)  # p = .8 keeps two, renormalised
    assert [s > 0 for s in drawn([0.1, 0.5, 0.4], top_p=0.45)] == [False, True, False]  # wherever it stands
    assert all(s > 0 for s in drawn([0.5, 0.4, 0.1], top_p=0.95))
    assert [s > 0 for s in drawn([0.2, 0.5, 0.3], top_p=1e-6)] == [False, True, False]  # never nothing


def test_top_k():
    share = drawn([0.1, 0.2, 0.3, 0.4], top_k=2)
    assert share[:2] == [0, 0] and share[2] == pytest.approx(3 / 7, abs=0.04)
    assert drawn([0.1, 0.2, 0.3, 0.4], top_k=1) == [0, 0, 0, 1]
    assert drawn([0.1, 0.2, 0.3, 0.4], top_k=99) == drawn([0.1, 0.2, 0.3, 0.4])


def test_top_k_then_top_p():
    """Of the two that top_k leaves, renormalised to [.56, .44], p = .5 keeps one."""
    assert [s > 0 for s in drawn([0.5, 0.4, 0.1], top_k=2, top_p=0.5)] == [True, False, False]


def test_temperature():
    p = np.array([0.1, 0.2, 0.7])
    for temperature in (0.5, 1.0, 2.0):
        expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
        np.testing.assert_allclose(drawn(p.tolist(), n=20000, temperature=temperature), expected, atol=0.02)
    assert drawn(p.tolist(), temperature=0) == [0, 0, 1]


def test_rows_are_sampled_each_from_its_own():
    logits = torch.full((5, 5), -100.0).fill_diagonal_(0)
    assert sample(logits, top_k=3, top_p=0.9).tolist() == [0, 1, 2, 3, 4]


def test_generate_slides_its_window():
    """Past block_size it goes on with the last block_size tokens, at positions 0 to block_size - 1."""
    model, idx = make(), tokens(3, 5)
    out = model.generate(idx, 20, temperature=0)
    assert out.shape == (3, 25) and torch.equal(out[:, :5], idx)
    for t in range(5, 25):
        logits = reference(model, out[:, max(0, t - 8):t])
        assert torch.equal(out[:, t], logits[:, -1].argmax(dim=-1)), t
    alone = model.generate(idx[1:2], 20, temperature=0)
    assert torch.equal(alone[0], out[1])


def test_generate_draws_from_the_model():
    """One new token of 4000 equal prompts comes as often as the softmax says."""
    model, idx = make(), tokens(1, 6)
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
        loss = model(batch[:, :-1], batch[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert torch.equal(model.generate(batch[:, :1], 8, temperature=0), batch)
