"""
Tests of Part 4's model and of the functions of train.py: pytest part_4. The oracles are `reference`, Qwen3's forward
written down once more in float64, loops and direct sums. The script itself is run in test_part_4_script.py.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import importlib.util
import json
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import train
from model import GPT, GPTConfig, KVCache, sample
from shared import load_checkpoint, save_checkpoint
from tokenizer import Tokenizer
from train import Config, backward, evaluate, get_batch, load_data, lr_scale, make_optimizers

TRAIN = Path(__file__).resolve().parent / "train.py"
TINY = dict(vocab_size=13, block_size=16, n_layer=2, n_head=4, n_embd=16, n_kv_head=2)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def randomised(model, seed=0, std=0.2):
    """Every parameter random, gains about 1: a projection that starts at zero would hide all that stands before it."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = (p.ndim == 1 and p.data.mean() > 0.5) + std * torch.randn(p.shape, generator=g)
    return model


def make(**sizes):
    return randomised(GPT(GPTConfig(**{**TINY, **sizes})))


def tokens(*shape, seed=1):
    return torch.randint(TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# the model -----------------------------------------------------------------------------------------------------------

def rms(x, gain):
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * gain


def turned(x, base):
    theta = base ** -(torch.arange(0, x.size(-1), 2) / x.size(-1)).double()
    angle = torch.outer(torch.arange(x.size(2)).double(), theta).repeat(1, 2)
    x1, x2 = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-x2, x1], dim=-1) * angle.sin()


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
        x = x + linear("mlp.c_proj", F.silu(linear("mlp.c_gate", y)) * linear("mlp.c_fc", y))
    return rms(x, w["ln_f.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("sizes", [{}, {"n_kv_head": 1}, {"n_kv_head": 4, "tied": 1}, {"head_dim": 6, "mlp_dim": 20}])
def test_logits_against_qwen3(sizes):
    """fp32 against float64: within 1e-5 of the largest logit; autocast to bf16: within 5 %."""
    model, idx = make(**sizes), tokens(2, 16)
    exact = reference(model, idx)
    assert (model(idx)[0] - exact).abs().max() < 1e-5 * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(idx)[0] - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("sizes", [{}, {"n_kv_head": 1}, {"window": 4}, {"window": 3, "sink": 2}])
def test_fused_attention_is_part_3s(sizes):
    """Part 3 spells the softmax out, its tests compare that with loops, and with StreamingLLM where there are sinks."""
    spec = importlib.util.spec_from_file_location("part_3_model", TRAIN.parent.parent / "part_3/model.py")
    part_3 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(part_3)
    ours, theirs, idx = make(**sizes), part_3.GPT(part_3.GPTConfig(**TINY | sizes)), tokens(2, 16)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(idx)[0], theirs(idx)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window, sink", [(0, 0), (4, 0), (3, 2)])
def test_causality(window, sink):
    model, idx = make(window=window, sink=sink), tokens(1, 10)
    for t in range(10):
        edited = idx.clone()
        edited[0, t] = (edited[0, t] + 1) % TINY["vocab_size"]
        moved = (model(idx)[0] - model(edited)[0]).abs().amax(dim=-1)[0] > 1e-6
        assert not moved[:t].any() and moved[t], t


@pytest.mark.parametrize("window, sink", [(1, 0), (5, 0), (5, 1), (4, 3), (16, 2)])
@pytest.mark.parametrize("chunks", [[1], [7, 1], [19, 1], [1, 5], [40]], ids=str)
def test_rolling_cache_is_a_banded_mask(window, sink, chunks):
    model, idx = make(window=window, sink=sink).requires_grad_(False), tokens(2, 40)
    cache, logits, t = KVCache(model.cfg, 2), [], 0
    while t < 40:
        n = chunks[min(len(logits), len(chunks) - 1)]
        logits.append(model(idx[:, t:t + n], cache=cache)[0])
        t += n
    torch.testing.assert_close(torch.cat(logits, dim=1), model(idx)[0], atol=2e-5, rtol=1e-4)


def test_gradient_flow():
    model = make()
    model(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[2, 3, 4, 5, 6]]))[1].backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    assert (model.wte.weight.grad.abs().sum(dim=-1) > 0).nonzero().flatten().tolist() == [1, 2, 3, 4, 5]


def test_sampling():
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.5, 0.4]).log().expand(500, -1)
    drawn = lambda **options: sorted(set(sample(logits, **options).tolist()))
    assert drawn() == [0, 1, 2] and drawn(temperature=0) == [1]
    assert drawn(top_p=0.8) == [1, 2] and drawn(top_k=2) == [1, 2] and drawn(top_k=2, top_p=0.5) == [1]


def test_checkpoint_round_trip(tmp_path):
    model, idx = make(tied=1, head_dim=6, window=5, sink=1), tokens(2, 30)
    tok = Tokenizer.train("the cat and the hat " * 9, 270)
    save_checkpoint(tmp_path / "x.pt", kind="base", changed={}, **model.to_checkpoint(), tokenizer=tok.state())
    checkpoint = load_checkpoint(tmp_path / "x.pt", "base")
    again = GPT.load(checkpoint)
    assert again.cfg == model.cfg and torch.equal(again(idx)[0], model(idx)[0])
    assert again.lm_head.weight is again.wte.weight
    assert Tokenizer.load(checkpoint["tokenizer"]).encode("the hat") == tok.encode("the hat")


# the functions of train.py -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("accum", [2, 4])
def test_accumulation_is_the_big_batch(accum):
    x, y = tokens(8, 16), tokens(8, 16, seed=2)
    one, many, direct = make(), make(), make()
    direct_loss = F.cross_entropy(direct(x)[0].transpose(1, 2), y)
    direct_loss.backward()
    losses = [backward(m, x, y, n, nullcontext, NO_SCALER) for m, n in ((one, 1), (many, accum))]
    torch.testing.assert_close(torch.stack(losses), direct_loss.detach().expand(2), atol=1e-6, rtol=1e-5)
    for a, b, c in zip(one.parameters(), many.parameters(), direct.parameters()):
        torch.testing.assert_close(a.grad, c.grad, atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(b.grad, c.grad, atol=1e-7, rtol=1e-4)


def test_lr_scale():
    cfg = Config(steps=100, warmup=0.1, decay=0.5)
    scale = [lr_scale(step, cfg) for step in range(300)]
    assert scale[0] == pytest.approx(0.1) and scale[9:51] == 42 * [1.0] and scale[75] == pytest.approx(0.5)
    assert all(a > b for a, b in zip(scale[50:100], scale[51:101])) and scale[99] == pytest.approx(0.02)
    assert scale[100:] == 200 * [0.0]  # it never climbs again
    flat = Config(steps=3, warmup=0.0, decay=0.0)
    assert [lr_scale(step, flat) for step in range(5)] == [1, 1, 1, 0, 0]


def test_get_batch_depends_on_seed_and_step_alone():
    ids, starts, cfg = torch.arange(40), torch.tensor([0, 3, 17, 31]), Config(batch_size=64, seed=3)
    x, y = get_batch(ids, starts, 7, cfg, 8)
    torch.manual_seed(5)
    get_batch(ids, starts, 6, cfg, 8)
    again = get_batch(ids, starts, 7, cfg, 8)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert x.shape == (64, 8) and torch.equal(y, x + 1) and set(x[:, 0].tolist()) == {0, 3, 17, 31}
    assert not torch.equal(x, get_batch(ids, starts, 8, cfg, 8)[0])
    assert not torch.equal(x, get_batch(ids, starts, 7, Config(batch_size=64, seed=4), 8)[0])


@pytest.mark.parametrize("vocab_size", [280, 260])
def test_rows_start_where_a_story_does(tmp_path, monkeypatch, vocab_size):
    """Also when no merge was learned, and the gap between two stories is several tokens."""
    stories = [f"{name} saw a {thing}." for name in ("Mia", "Tom", "Ann") for thing in ("fox", "dog", "hen", "cat")]
    (tmp_path / "train.txt").write_text("\n\n".join(stories))
    (tmp_path / "val.txt").write_text("\n\n".join(stories[::-1]))
    (tmp_path / "facts.json").write_text('{"true_nats_per_byte": 0.5}')
    (tmp_path / "instructions.jsonl").write_text(json.dumps({"instruction": "Say no.", "input": "", "output": "No."}))
    monkeypatch.setattr(train, "require", lambda path: tmp_path)
    gpt_cfg = GPTConfig(vocab_size=vocab_size, block_size=4)
    tok, ids, starts, val_ids, edges, n_bytes, entropy = load_data(Config(), gpt_cfg)
    assert tok.decode(ids.tolist()) == "\n\n".join(stories) and n_bytes == len("\n\n".join(stories)) and entropy == 0.5
    assert gpt_cfg.vocab_size == tok.vocab_size == vocab_size
    assert all(tok.decode(ids[:s + 1].tolist()).endswith("\n\n") for s in starts)  # as in evaluate, from edge to edge
    rows = [tok.decode(ids[s + 1:].tolist()) for s in starts]
    wanted = ["\n\n".join(stories[i:]) for i in range(len(stories))]
    assert set(rows) <= set(wanted) and len(set(rows)) == len(rows) >= len(stories) - 2
    assert edges[0] == 0 and edges[-1] == len(val_ids) - 1 and 1 <= edges.diff().min() and edges.diff().max() <= 4
    ends = [tok.decode(val_ids[:e + 1].tolist()) for e in edges]  # a row stops where a document does
    assert {"\n\n".join([*stories[::-1][:i], ""]) for i in range(1, len(stories))} <= set(ends)


def test_rows_of_a_users_text_start_anywhere(tmp_path):
    (tmp_path / "my.txt").write_text("one two three four five six seven. " * 20)
    _, ids, starts, *_ = load_data(Config(data=str(tmp_path / "my.txt")), GPTConfig(vocab_size=260, block_size=8))
    assert starts.tolist() == list(range(len(ids) - 8))  # the last row's last target is the last token


@pytest.mark.parametrize("tied", [0, 1])
def test_muon_has_the_blocks_matrices_and_adamw_the_rest(tied):
    model = make(tied=tied)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = ([names[id(p)] for group in opt.param_groups for p in group["params"]]
                   for opt in make_optimizers(model, Config()))
    matrices = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_gate", "mlp.c_fc", "mlp.c_proj"]
    assert sorted(muon) == sorted(f"h.{i}.{m}.weight" for i in range(2) for m in matrices)
    assert sorted(muon + adamw) == sorted(names.values())


def test_muon_moves_all_directions_alike():
    """Gradients whose singular values span 1 to 10 become updates with all in [.5, 1.5], and an RMS of .2 lr."""
    model, cfg = make(), Config(lr=0.1)
    muon, _ = make_optimizers(model, cfg)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        U, S, V = torch.linalg.svd(p.detach().view(p.size(0), -1), full_matrices=False)
        p.grad = (U * torch.linspace(1, 10, len(S)) @ V).view_as(p)
    muon.step()
    for name, p in model.named_parameters():
        moved = before[name] - p.detach()
        if p.ndim == 2 and name.startswith("h."):
            values = torch.linalg.svdvals(moved) / (0.2 * cfg.lr * math.sqrt(max(p.shape)))
            assert 0.5 < values.min() and values.max() < 1.5, (name, values)
            assert moved.pow(2).mean().sqrt() == pytest.approx(0.2 * cfg.lr, rel=0.25)
        else:
            assert not moved.any(), name


@pytest.mark.parametrize("n", [2, 9, 16 * 64 + 1, 16 * 64 + 2, 16 * 150 + 5])
def test_evaluate_against_a_direct_sum(n):
    model, ids, nats, right = make().requires_grad_(False), tokens(n), 0.0, 0
    for i in range(0, n - 1, 16):  # blocks of 16, each without what came before it
        x, y = ids[i:min(i + 16, n - 1)], ids[i + 1:i + 17]
        logits = model(x[None])[0][0]
        nats -= logits.double().log_softmax(dim=-1)[torch.arange(len(y)), y].sum().item()
        right += (logits.argmax(dim=-1) == y).sum().item()
    edges = torch.tensor([*range(0, n - 1, 16), n - 1])
    found = evaluate(model, ids, edges, 777, torch.device("cpu"), nullcontext)
    assert found == (pytest.approx(nats / 777, rel=1e-5), pytest.approx(right / (n - 1)))


def test_overfit_one_batch():
    torch.manual_seed(0)
    model, batch = GPT(GPTConfig(**{**TINY, "n_embd": 32})), tokens(4, 13)
    batch[:, 0] = torch.arange(4)  # the first token says which of the four it is
    optimizers = make_optimizers(model, Config(lr=0.05, lr_adamw=0.01))
    for _ in range(80):
        loss = backward(model, batch[:, :-1], batch[:, 1:], 2, nullcontext, NO_SCALER)
        for opt in optimizers:
            opt.step()
            opt.zero_grad()
    assert loss < 0.05
    assert torch.equal(model.generate(batch[:, :1], 12, temperature=0), batch)
