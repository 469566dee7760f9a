"""
Tests of context-modulated attention: the context against slow sums by hand, the identity at the
start and causality to the bit, gradients, and a tiny run of both scripts.
"""

import ast
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.nn.functional as F

import demo_context
import train_context
from model import GPT, GPTConfig
from shared import ROOT, load_checkpoint, parse_args, read_facts, require, save_checkpoint
from tokenizer import Tokenizer
from train_context import KINDS, WITH_CONTEXT, ContextGPT, Data, Document

FOLDER = Path(__file__).resolve().parent
TINY = GPTConfig(vocab_size=12, block_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=16)
END = 11  # the token that ends a sentence in these tests

# The scripts must not believe that they run under torchrun, and they are too small for threads.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
for variable in ("RANK", "WORLD_SIZE"):
    ENVIRONMENT.pop(variable, None)


def ends():
    return torch.arange(TINY.vocab_size) == END


def random_model(kind, window=0, seed=0):
    """A model whose weights are all random, also those that start at zero."""
    torch.manual_seed(seed)
    model = ContextGPT(TINY, ends(), kind, window, context_dim=8)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def random_text(B=3, seed=1):
    """B texts of four sentences with six tokens each."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(END, (B, 24), generator=generator)
    idx[:, 5::6] = END
    return idx


def assert_near(actual, expected, rtol=1e-4):
    difference = (actual - expected).norm().item()
    assert difference < rtol * expected.norm().item(), f"{difference} of {expected.norm().item()}"


# the context --------------------------------------------------------------------------------------


def test_sentence_numbers():
    idx = torch.tensor([[1, 2, END, 3, END, END, 4]])
    assert train_context.sentence_numbers(idx, ends()).tolist() == [[0, 0, 0, 1, 1, 2, 3]]


def slow_context(vectors, sentence):
    """The same by loops: the running mean, updated sentence by sentence."""
    B, T, C = vectors.shape
    S = int(sentence.max()) + 1
    contexts = torch.zeros(B, S + 1, C, dtype=vectors.dtype)
    for b in range(B):
        c = torch.zeros(C, dtype=vectors.dtype)
        for s in range(S + 1):
            contexts[b, s] = c
            tokens = [vectors[b, t] for t in range(T) if sentence[b, t] == s]
            if tokens:
                z = sum(tokens) / len(tokens)
                c = c + (z - c) / (s + 1)
    return contexts


def test_the_running_mean_sentence_by_sentence():
    torch.manual_seed(0)
    vectors = torch.randn(3, 10, 5, dtype=torch.float64)
    sentence = torch.tensor(
        [[0, 0, 1, 1, 1, 2, 3, 3, 3, 3], [0] * 10, [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]]
    )
    expected = slow_context(vectors, sentence)
    actual = train_context.running_context(vectors, sentence)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert (actual[:, 0] == 0).all()

    # fp32 is as exact as it can be.
    assert_near(train_context.running_context(vectors.float(), sentence).double(), expected, 1e-6)


@pytest.mark.parametrize("kind", WITH_CONTEXT)
def test_the_context_of_a_sentence_comes_from_earlier_ones_only(kind):
    """Change a token in sentence 2: no context up to that of sentence 2 moves by a bit."""
    model = random_model(kind)
    idx = random_text()
    before = model.contexts(idx)
    for position in range(12, 17):
        changed = idx.clone()
        changed[:, position] = (idx[:, position] + 1) % END
        after = model.contexts(changed)
        assert torch.equal(before[:, :3], after[:, :3])
        assert not torch.allclose(before[:, 3], after[:, 3])


def test_a_change_far_too_large_to_be_subtracted_again_does_not_leak():
    """(a + z) - z is not a if z is large: a context made in this way would fail here."""
    torch.manual_seed(0)
    vectors = torch.randn(1, 6, 4)
    sentence = torch.tensor([[0, 0, 1, 1, 2, 2]])
    before = train_context.running_context(vectors, sentence)
    vectors[:, 2:] *= 1e9
    assert torch.equal(before[:, :2], train_context.running_context(vectors, sentence)[:, :2])


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_the_future(kind, window):
    model = random_model(kind, window)
    idx = random_text()
    before = model(idx, idx)
    for position in (8, 13, 17):
        changed = idx.clone()
        changed[:, position] = 7 if position != 17 else 3  # 17 ends a sentence, and now it does not
        changed[0, position] = 5
        after = model(changed, changed)
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.allclose(before[:, position:], after[:, position:])


def test_only_the_context_reaches_beyond_the_window():
    """Two layers with a window of 3 reach back 4 tokens. Token 2 is out of reach at position 12,
    unless a context carries it there."""
    idx = random_text()
    changed = idx.clone()
    changed[:, 2] = (idx[:, 2] + 1) % END
    for kind in KINDS:
        model = random_model(kind, window=3)
        before, after = model(idx, idx), model(changed, changed)
        assert torch.equal(before[:, 7:], after[:, 7:]) == (kind not in WITH_CONTEXT)
        assert not torch.allclose(before[:, 6], after[:, 6])


def test_the_context_of_another_text():
    idx, other = random_text(seed=1), random_text(seed=2)
    for kind in KINDS:
        model = random_model(kind)
        same = torch.equal(model(idx, idx), model(idx, other))
        assert same == (kind not in WITH_CONTEXT)

        # In the first sentence nobody has a context yet.
        assert torch.equal(model(idx, idx)[:, :6], model(idx, other)[:, :6])

    # A shorter text has no context of its own for the last sentences.
    assert random_model("film")(idx, other[:, :12]).shape == (3, 24, 12)


# the models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["film", "adaln", "add", "constant"])
def test_a_new_model_is_the_plain_one_to_the_bit(kind):
    plain = random_model("plain")
    torch.manual_seed(5)
    model = ContextGPT(TINY, ends(), kind, 0, context_dim=8)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected
    idx = random_text()
    assert torch.equal(model(idx, idx), plain(idx, idx))

    # and it does not stay so when the context gets weights
    for name, p in model.named_parameters():
        if name in missing:
            p.data += 0.3 * torch.randn_like(p)
    assert not torch.allclose(model(idx, idx), plain(idx, idx))


def test_the_plain_model_is_the_gpt_of_model_py():
    plain = random_model("plain")
    gpt = GPT(TINY)
    weights = plain.state_dict()
    weights.pop("is_end")
    gpt.load_state_dict(weights)
    idx = random_text()
    assert_near(plain(idx, idx), gpt(idx)[0], 1e-6)


def test_film_attention_head_by_head():
    """The same in float64 by a loop over heads and tokens."""
    model = random_model("film").double()
    attn = model.h[1].attn
    B, T, H, G, D = 2, 7, 4, 2, 4
    x = torch.randn(B, T, 16, dtype=torch.float64)
    context = torch.randn(B, T, 8, dtype=torch.float64)
    positions = torch.arange(T)
    theta = TINY.rope_base ** (-torch.arange(0, D, 2) / D)
    angle = (positions[:, None] * theta).double()
    cos, sin = angle.cos(), angle.sin()
    mask = train_context.window_mask(T, 3, x.device)
    actual = attn(x, context, mask, cos, sin)

    def turned(vector, film_row, gain, t):
        """One query or key: normalized, modulated, rotated."""
        vector = vector / (vector.square().mean() + TINY.norm_eps).sqrt() * gain
        vector = vector * (1 + film_row[:D]) + film_row[D:]
        a, b = vector[: D // 2], vector[D // 2 :]
        return torch.cat([a * cos[t] - b * sin[t], b * cos[t] + a * sin[t]])

    expected = torch.zeros(B, T, 16, dtype=torch.float64)
    for b, h in product(range(B), range(H)):
        g = h // (H // G)
        rows = (x[b] @ attn.c_q.weight.T).view(T, H, D), (x[b] @ attn.c_k.weight.T).view(T, G, D)
        v = (x[b] @ attn.c_v.weight.T).view(T, G, D)
        film = (context[b] @ attn.film.weight.T).view(T, H + G, 2 * D)
        for t in range(T):
            q = turned(rows[0][t, h], film[t, h], attn.q_norm.weight, t)
            seen = range(max(0, t - 2), t + 1)
            keys = [turned(rows[1][s, g], film[s, H + g], attn.k_norm.weight, s) for s in seen]
            scores = torch.stack([q @ k / D**0.5 for k in keys])
            y = sum(p * v[s, g] for p, s in zip(scores.softmax(dim=0), seen))
            expected[b, t] += attn.c_proj.weight[:, h * D : (h + 1) * D] @ y
    assert_near(actual, expected, 1e-6)


@pytest.mark.parametrize("kind", WITH_CONTEXT)
def test_fp32_is_close_to_float64(kind):
    model = random_model(kind, window=4)
    idx = random_text()
    single = model(idx, idx)
    double = model.double()(idx, idx)
    assert_near(single.double(), double, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_after_a_few_steps(kind):
    """Projections that start at zero wait for each other, but none may wait forever."""
    torch.manual_seed(0)
    model = ContextGPT(TINY, ends(), kind, 0, context_dim=8)
    cfg = train_context.Config(steps=4)
    optimizers = train_context.make_optimizers(model, cfg)
    assert sum(len(g["params"]) for o in optimizers for g in o.param_groups) == len(
        list(model.parameters())
    )
    idx = random_text()
    for step in range(5):
        model.zero_grad()
        F.cross_entropy(model(idx, idx)[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_equal_parameters(kind):
    tok = Tokenizer({bytes([i]): i for i in range(256)})
    data = Data(tok, train_context.sentence_ends(tok), [], [], None)
    cfg = train_context.Config()
    counts = {
        k: train_context.count_parameters(train_context.build_model(k, 8, data, cfg)) for k in KINDS
    }
    assert counts[kind] == pytest.approx(counts["adaln"], rel=2e-3)


def test_it_learns_a_batch_by_heart():
    torch.manual_seed(0)
    idx = random_text(B=4)
    documents = [Document(row, 1, [0] * len(row)) for row in idx.tolist()]
    data = Data(None, ends(), documents, documents, None)
    model = ContextGPT(TINY, ends(), "film", 3, context_dim=8)
    cfg = train_context.Config(steps=150, batch_size=16, lr=0.03, lr_adamw=0.02)
    train_context.train(model, data, 0, cfg, torch.device("cpu"))

    # Within the first sentence there is no context, and the texts begin in different ways.
    predicted = model(idx, idx).argmax(dim=-1)[:, 5:-1]
    assert (predicted == idx[:, 6:]).float().mean() > 0.95


def test_what_is_copied_from_part_4_is_a_copy():
    def functions(path):
        tree = ast.parse(path.read_text())
        found = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                found[node.name] = [ast.dump(line) for line in node.body[1:]]
        return found

    here = functions(FOLDER / "train_context.py")
    there = functions(ROOT / "part_4" / "train.py")
    for name in ("lr_scale", "orthogonalize", "set_lr"):
        assert here[name] == there[name], name


# data and evaluation ------------------------------------------------------------------------------


def test_last_mention():
    assert train_context.last_mention([5, 7, 5, 5, 7], rare={5}) == [0, 0, 2, 1, 0]


def test_the_true_entropy_by_enumeration():
    """All outcomes of what a brief leaves open, with their probabilities."""
    facts = read_facts(require("data/stories") / "facts.json")
    sizes = {name: len(values) for name, values in facts["vocabulary"].items()}
    nats = 0.0
    total = 0.0
    for brief_p, brief in facts["briefs"]:
        open_slots = [slot for slot in ("place", "colour", "thing") if f"{{{slot}}}" not in brief]
        draws = 3 * 3 * 3  # the wordings of opening, finding and ending
        for slot in open_slots:
            draws *= sizes[slot]
        for event in facts["events"]:
            for following, p in event["next"].items():
                outcomes = draws
                if "{helper}" in event["sentence"] or "{helper}" in following:
                    outcomes *= sizes["helper"]
                joint = event["p"] * p
                nats -= brief_p * joint * math.log(joint / outcomes)
                total += brief_p * joint
    assert total == pytest.approx(1)
    assert train_context.true_story_nats(facts) == pytest.approx(nats, rel=1e-9)


def test_evaluation_by_hand():
    """Nats of what comes after the start, and those of repeated tokens by their distance."""
    documents = [
        Document([0, 1, END, 1, 2, 1, 8], 3, [0, 0, 0, 2, 0, 2, 0]),
        Document([0, 3, 4, 5, 6, 7, 3], 2, [0, 0, 0, 0, 0, 0, 5]),
    ]
    model = random_model("adaln", window=4)
    nats = []
    for document in documents:
        ids = torch.tensor([document.ids])
        logp = model(ids, ids)[0].log_softmax(dim=-1)
        nats.append([0.0] + [-logp[t, i].item() for t, i in enumerate(document.ids[1:])])

    evaluation = train_context.evaluate(model, documents, 2, torch.device("cpu"))
    assert evaluation.nats == pytest.approx((sum(nats[0][3:]) + sum(nats[1][2:])) / 2, rel=1e-4)
    assert evaluation.counts == [2, 0, 1, 0, 0, 0]
    assert evaluation.by_distance[0] == pytest.approx((nats[0][3] + nats[0][5]) / 2, rel=1e-4)
    assert evaluation.by_distance[2] == pytest.approx(nats[1][6], rel=1e-4)

    # Two documents exchange their contexts.
    shuffled = train_context.evaluate(model, documents, 2, torch.device("cpu"), shuffled=True)
    x = torch.tensor([documents[0].ids])
    donor = torch.tensor([documents[1].ids[:-1]])
    logp = model(x, donor)[0].log_softmax(dim=-1)
    assert shuffled.by_distance[0] == pytest.approx(-(logp[2, 1] + logp[4, 1]).item() / 2, rel=1e-4)


def test_cost_outside_of_the_window():
    """A window of 8 has bins of 4: the first two are inside."""
    run = {"counts": [5, 5, 3, 1, 0, 0], "by_distance": [9.0, 9.0, 1.0, 3.0, 0.0, 0.0]}
    assert train_context.cost_outside(run, 8) == pytest.approx((3 * 1 + 1 * 3) / 4)

    # A window of 3 has bins of 1.
    assert train_context.cost_outside(run, 3) == pytest.approx(3.0)


# demo_context -------------------------------------------------------------------------------------


def test_disturbing_all_heads_is_the_context_of_another_text():
    model = random_model("film")
    idx, other = random_text(seed=1), random_text(seed=2)
    everything = list(product(range(2), range(4)))
    undisturbed = model(idx, idx)
    hooks = demo_context.disturb(model, everything, idx, other)
    assert torch.equal(model(idx, idx), model(idx, other))
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(idx, idx), undisturbed)

    rows = set()
    for head in range(4):
        rows |= set(demo_context.head_rows(model.h[0].attn, head))
    assert rows == set(range(model.h[0].attn.film.out_features))


def test_attention_weights_are_those_of_the_model():
    """With them the values give what the module gives."""
    model = random_model("film", window=3)
    idx = random_text()
    weights = demo_context.attention_weights(model, idx, idx)[0]  # (B, H, T, T)
    assert_near(weights.sum(dim=-1), torch.ones(3, 4, 24), 1e-5)

    attn = model.h[0].attn
    x = model.h[0].ln_1(model.wte(idx))
    v = attn.c_v(x).view(3, 24, 2, 4).transpose(1, 2).repeat_interleave(2, dim=1)
    y = attn.c_proj((weights @ v).transpose(1, 2).reshape(3, 24, 16))
    context = model.context_of_tokens(idx, idx)
    cos, sin = train_context.rope_table(torch.arange(24), 4, TINY.rope_base)
    mask = train_context.window_mask(24, 3, idx.device)
    assert_near(y, attn(x, context, mask, cos, sin), 1e-4)


def test_principal_plane():
    """Points that lie in a plane of a space of five dimensions, apart from a little noise."""
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(5, 2)).Q.T  # (2, 5)
    places = torch.randn(200, 2) * torch.tensor([3.0, 1.0])
    vectors = places @ axes + 7 + 1e-3 * torch.randn(200, 5)
    plane = demo_context.principal_plane(vectors)
    assert plane.share > 0.999
    found = demo_context.project(vectors, plane)
    assert_near(torch.cdist(found, found), torch.cdist(places, places), 1e-2)


def test_readout():
    torch.manual_seed(0)
    labels = torch.randint(3, (300,))
    vectors = torch.eye(3, 6)[labels] + 0.05 * torch.randn(300, 6)
    weights = demo_context.fit_readout(vectors[:200], labels[:200], 3)
    assert (demo_context.read_out(vectors[200:], weights) == labels[200:]).float().mean() > 0.98


# the scripts --------------------------------------------------------------------------------------


def run_script(name, *options):
    command = [sys.executable, str(FOLDER / name), *options]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def save_base(path):
    """A base model whose tokens are bytes."""
    tok = Tokenizer({bytes([i]): i for i in range(256)})
    cfg = replace(TINY, vocab_size=tok.vocab_size)
    save_checkpoint(path, kind="base", **GPT(cfg).to_checkpoint(), tokenizer=tok.state())


SMALL = dict(n_layer=1, n_head=2, n_embd=8, context_dim=4, mlp_dim=8, steps=2, batch_size=2)


def test_training_as_a_script(tmp_path):
    require("data/stories")
    save_base(tmp_path / "base.pt")
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    options += [f"--init={tmp_path}/base.pt", f"--out={tmp_path}", "--device=cpu"]
    options += ["--longest=60", "--kinds=plain,film", "--eval_every=2"]
    done = run_script("train_context.py", *options)
    assert done.returncode == 0, done.stderr

    metrics = json.loads((tmp_path / "train_context.json").read_text())
    assert list(metrics["results"])[-1] == "film, window of 8"
    assert metrics["results"]["film, window of 8"][0]["shuffled_nats"] > 0
    lines = [json.loads(line) for line in open(tmp_path / "train_context.jsonl")]
    assert [line["step"] for line in lines] == list(range(8))
    assert ["val_nats" in line for line in lines] == [False, True] * 4
    for name in ("train_context", "train_context_distance"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    # The checkpoint is the model that it describes.
    checkpoint = load_checkpoint(tmp_path / "context.pt", "context")
    model = ContextGPT.load(checkpoint)
    assert (model.kind, model.window) == ("film", 8)
    assert model.h[0].attn.film.weight.shape == (32, 4)


def test_the_demo_as_a_script(tmp_path):
    require("data/stories")
    save_base(tmp_path / "base.pt")
    cfg = train_context.Config(init=f"{tmp_path}/base.pt", longest=400, **SMALL)
    tok = Tokenizer({bytes([i]): i for i in range(256)})
    data = Data(tok, train_context.sentence_ends(tok), [], [], None)
    model = train_context.build_model("film", 8, data, cfg)
    save_checkpoint(
        tmp_path / "context.pt", kind="context", config=asdict(cfg), **model.to_checkpoint()
    )
    options = [f"--init={tmp_path}/context.pt", f"--out={tmp_path}", "--device=cpu"]
    options += ["--samples=6", "--seeds=2", "--text=A fox saw a hat. It was red."]
    done = run_script("demo_context.py", *options)
    assert done.returncode == 0, done.stderr

    metrics = json.loads((tmp_path / "demo_context.json").read_text())
    assert len(metrics["results"]) == 2
    assert metrics["results"][0]["lost"] == [[0.0, 0.0]], "a new model does not use its context"
    assert len(metrics["results"][1]["read_out"]["hero"]) == 7
    for name in ("path", "heads"):
        assert (tmp_path / f"demo_context_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_text_of_your_own(tmp_path):
    save_base(tmp_path / "base.pt")
    text = "A cat sat. It slept.\n\n" * 12
    (tmp_path / "my.txt").write_text(text)
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    options += [f"--init={tmp_path}/base.pt", f"--out={tmp_path}", "--kinds=add", "--device=cpu"]
    done = run_script("train_context.py", f"--data={tmp_path}/my.txt", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "train_context.json").read_text())["true_nats"] is None


def test_all_of_a_text_of_your_own_counts(tmp_path):
    """Only a document of the world begins with a brief, which is given."""
    save_base(tmp_path / "base.pt")
    (tmp_path / "my.txt").write_text("The first line.\nThe end.\n\n" * 20)
    cfg = train_context.Config(data=f"{tmp_path}/my.txt", init=f"{tmp_path}/base.pt")
    data = train_context.load_data(cfg)
    assert [document.start for document in data.val] == [1, 1]


def assert_one_line(printed, message):
    assert message in printed
    assert printed.count("\n") == 1


def test_bad_files_end_in_one_line(tmp_path, capsys):
    save_base(tmp_path / "base.pt")
    (tmp_path / "one.txt").write_text("Only one document.")
    (tmp_path / "empty.txt").write_text(" \n\n")
    for name, message in (("one", "at least 11 are needed"), ("empty", "is empty")):
        cfg = train_context.Config(data=f"{tmp_path}/{name}.txt", init=f"{tmp_path}/base.pt")
        with pytest.raises(SystemExit) as end:
            train_context.load_data(cfg)
        assert end.value.code == 2
        assert_one_line(capsys.readouterr().err, message)

    done = run_script("demo_context.py", f"--init={tmp_path}/base.pt")
    assert done.returncode == 2
    assert_one_line(done.stderr, "expected 'context'")


@pytest.mark.parametrize(
    "module, option, message",
    [
        (train_context, "--kinds=plain,magic", "kinds=plain,magic must be some of"),
        (train_context, "--window=0", "window=0 must be at least 1"),
        (train_context, "--context_dim=0", "context_dim=0 must be at least 1"),
        (train_context, "--n_head=5", "must be divisible by 2 * n_head = 10"),
        (train_context, "--seeds=0", "seeds=0 must be at least 1"),
        (demo_context, "--samples=1", "samples=1 must be at least 2"),
    ],
)
def test_bad_options_end_in_one_line(module, option, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(module.Config, argv=[option])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
