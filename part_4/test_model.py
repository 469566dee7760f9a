"""
Tests of model.py.

The oracles are `reference`, the forward pass of Qwen3 written down once more in float64, and the
model of Part 3, whose attention is spelled out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

import model as this_model
from model import GPT, MLP, GPTConfig, KVCache, causal_mask, sample
from shared import load_checkpoint, save_checkpoint
from tokenizer import Tokenizer

ROOT = Path(this_model.__file__).resolve().parent.parent
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


def tokens(B, T, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SIZES["vocab_size"], (B, T), generator=generator)


def assert_close(actual, expected, precision=1e-5):
    """The same up to rounding, relative to the largest number."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=precision * scale)


# the oracle ---------------------------------------------------------------------------------------


def reference_norm(x, gain, eps):
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * gain


def reference_rope(x, base):
    """cos and rotate_half as Qwen3 writes them: x (B, H, T, D)."""
    theta = base ** -(torch.arange(0, x.size(-1), 2) / x.size(-1)).double()
    angle = torch.outer(torch.arange(x.size(2)).double(), theta).repeat(1, 2)
    x1, x2 = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-x2, x1], dim=-1) * angle.sin()


def reference_attention(q, k, v, cfg):
    """q (B, H, T, D), k and v (B, G, T, D), none of them rotated yet -> (B, H, T, D)."""
    T = q.size(2)
    q = reference_rope(q, cfg.rope_base)
    k = reference_rope(k, cfg.rope_base)
    k = k.repeat_interleave(cfg.n_head // cfg.n_kv_head, dim=1)
    v = v.repeat_interleave(cfg.n_head // cfg.n_kv_head, dim=1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(cfg.head_dim)
    future = torch.ones(T, T).triu(1).bool()
    return scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v


def reference(model, idx):
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
        y = reference_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), cfg)
        x = x + linear("attn.c_proj", y.transpose(1, 2).reshape(B, T, -1))

        y = reference_norm(x, gain("ln_2"), cfg.norm_eps)
        x = x + linear("mlp.c_proj", F.silu(linear("mlp.c_gate", y)) * linear("mlp.c_fc", y))
    x = reference_norm(x, weights["ln_f.weight"], cfg.norm_eps)
    return x @ weights["lm_head.weight"].T


ARCHITECTURES = [
    {},
    {"n_kv_head": 1},
    {"n_kv_head": 4, "tied": True},
    {"head_dim": 6, "mlp_dim": 20},
    {"rope_base": 50.0},
    {"qk_norm": False, "norm_eps": 0.1},
]


@pytest.mark.parametrize("sizes", ARCHITECTURES, ids=str)
def test_logits_match_qwen3(sizes):
    model = make(**sizes)
    idx = tokens(2, 16)
    logits, loss = model(idx)
    assert loss is None
    assert_close(logits.double(), reference(model, idx))


@pytest.mark.parametrize("sizes", ARCHITECTURES[:3], ids=str)
def test_logits_under_autocast_are_within_the_precision_of_bf16(sizes):
    model = make(**sizes)
    idx = tokens(2, 16)
    exact = reference(model, idx)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(idx, idx)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert (logits - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("sizes", ARCHITECTURES, ids=str)
def test_the_fused_attention_equals_the_one_that_part_3_spells_out(sizes):
    spec = importlib.util.spec_from_file_location("part_3_model", ROOT / "part_3/model.py")
    part_3 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(part_3)
    model = make(**sizes)
    expected = part_3.GPT(part_3.GPTConfig(**{**SIZES, **sizes}))
    expected.load_state_dict(model.state_dict())
    assert_close(model(tokens(2, 16))[0], expected(tokens(2, 16))[0].detach())


# the loss and the configuration -------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_starts_at_that_of_a_uniform_guess(tied):
    torch.manual_seed(0)
    model = GPT(GPTConfig(tied=tied))
    idx = torch.randint(256, (4, 64))
    targets = torch.randint(256, (4, 64))
    logits, loss = model(idx, targets)
    by_hand = -logits.double().log_softmax(dim=-1).gather(-1, targets[..., None]).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert loss.item() == pytest.approx(math.log(256), rel=0.04)


def test_the_loss_leaves_out_masked_targets():
    model = make()
    idx = tokens(2, 9)
    targets = tokens(2, 9, seed=2)
    kept = torch.rand(2, 9, generator=torch.Generator().manual_seed(3)) < 0.5
    logits, loss = model(idx, targets.masked_fill(~kept, -100))
    logp = logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
    assert loss.item() == pytest.approx(-logp[kept].mean().item(), rel=1e-5)


@pytest.mark.parametrize("C", [64, 128, 192, 768])
def test_swiglu_has_as_many_parameters_as_the_gelu_mlp(C):
    params = sum(p.numel() for p in MLP(GPTConfig(n_embd=C)).parameters())
    assert params == pytest.approx(2 * C * 4 * C, rel=0.02)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"n_head": 4, "n_kv_head": 3}, "n_head=4 must be divisible by n_kv_head=3"),
        ({"n_embd": 30, "n_head": 4}, "n_embd=30 must be divisible by n_head=4"),
        ({"n_embd": 20, "n_head": 4}, "head_dim=5 must be even"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(AssertionError, match=message):
        GPTConfig(**sizes)


def test_too_long_a_text_is_refused():
    model = make()
    with pytest.raises(AssertionError, match="17 tokens do not fit in block_size=16"):
        model(tokens(1, 17))

    cache = KVCache(model.cfg, 1)
    model(tokens(1, 12), cache=cache)
    with pytest.raises(AssertionError, match="18 tokens do not fit in block_size=16"):
        model(tokens(1, 6), cache=cache)


# causality and the cache --------------------------------------------------------------------------


def test_causal_mask():
    q_pos = torch.tensor([6, 9, 2])
    k_pos = torch.tensor([4, 0, 3, 9, 5, 1, 6, 7])
    expected = [[k <= q for k in k_pos.tolist()] for q in q_pos.tolist()]
    assert causal_mask(q_pos, k_pos).tolist() == expected


def test_causality():
    """A changed token changes the logits at its position, and nothing before it."""
    model = make()
    idx = tokens(1, 10)
    logits, _ = model(idx)
    for t in range(10):
        edited = idx.clone()
        edited[0, t] = (edited[0, t] + 1) % SIZES["vocab_size"]
        difference = (model(edited)[0] - logits).abs().amax(dim=-1)[0] / logits.abs().max()
        changed = difference > 1e-5
        assert not changed[:t].any(), t
        assert changed[t], t


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


@pytest.mark.parametrize("sizes", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("lengths", [[1], [5, 1], [16], [3], [1, 7], [4, 11, 1]], ids=str)
def test_cached_equals_uncached(sizes, lengths):
    model = make(**sizes)
    idx = tokens(2, 16)
    cache = KVCache(model.cfg, 2)
    assert_close(read_in_chunks(model, cache, idx, lengths), model(idx)[0])
    assert cache.length == 16


def test_the_rows_of_a_cache_do_not_mix():
    model = make()
    together = read_in_chunks(model, KVCache(model.cfg, 3), tokens(3, 12), [5, 1])
    for row in range(3):
        idx = tokens(3, 12)[row : row + 1]
        alone = read_in_chunks(model, KVCache(model.cfg, 1), idx, [5, 1])
        assert_close(together[row : row + 1], alone)


# generating ---------------------------------------------------------------------------------------


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
        logits = model(out[:, start:t])[0][:, -1]

        # The chosen token is the likeliest, or as likely up to rounding.
        chosen = logits.gather(-1, out[:, t : t + 1])[:, 0]
        gap = logits.amax(dim=-1) - chosen
        assert (gap <= 1e-4 * logits.abs().max()).all(), t


def test_generate_samples_as_its_options_say():
    model = make()
    idx = tokens(4, 3)
    greedy = model.generate(idx, 10, temperature=0)
    torch.manual_seed(0)
    assert not torch.equal(model.generate(idx, 10), greedy)
    assert torch.equal(model.generate(idx, 10, top_k=1), greedy)
    assert torch.equal(model.generate(idx, 10, top_p=1e-6), greedy)
    assert torch.equal(model.generate(idx, 10, top_p=0.0), greedy)
    assert torch.equal(model.generate(idx, 10, temperature=1e-4), greedy)
    assert torch.equal(model.generate(idx, 0), idx)


def test_generate_in_half_precision():
    out = make().bfloat16().generate(tokens(2, 5), 20, temperature=0)
    assert out.shape == (2, 25)


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


# gradients and checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_gets_a_gradient(tied):
    model = make(tied=tied).requires_grad_()
    _, loss = model(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[2, 3, 4, 5, 6]]))
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name

    # A tied embedding is the head, too, and a softmax moves the logits of all tokens.
    rows = model.wte.weight.grad.abs().sum(dim=-1) > 0
    assert rows.sum() == (13 if tied else 5)


def test_a_checkpoint_gives_the_same_model_and_tokenizer(tmp_path):
    model = make(tied=True, head_dim=6, qk_norm=False, norm_eps=0.01)
    tok = Tokenizer.train("the cat and the hat né " * 9, 270)
    content = {**model.to_checkpoint(), "tokenizer": tok.state()}
    save_checkpoint(tmp_path / "base.pt", kind="base", **content)

    checkpoint = load_checkpoint(tmp_path / "base.pt", "base")
    loaded = GPT.load(checkpoint)
    assert loaded.cfg == model.cfg
    assert torch.equal(loaded(tokens(2, 16))[0], model(tokens(2, 16))[0])
    assert loaded.lm_head.weight is loaded.wte.weight
    loaded_tok = Tokenizer.load(checkpoint["tokenizer"])
    assert loaded_tok.encode("the hat né") == tok.encode("the hat né")
