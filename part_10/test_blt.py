"""
Tests of train_blt.py, demo_patches.py and demo_spelling.py. The oracles are arithmetic by hand,
slower statements of the same mathematics with a loop over bytes and patches, PyTorch's counter of
operations, and the promise of causality: what comes later must not move a single bit of what comes
before.
"""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import demo_patches
import demo_spelling
import train_blt
from model import GPT, GPTConfig
from shared import load_checkpoint, save_checkpoint
from tokenizer import Tokenizer
from train_blt import BLT, BLTConfig, ByteGPT

FOLDER = Path(__file__).resolve().parent
TINY = BLTConfig(
    block_size=48, hash_rows=32, n_local=16, n_query=2, n_layer=2, n_head=2, patch_bytes=3
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
for variable in ("RANK", "WORLD_SIZE"):
    ENVIRONMENT.pop(variable, None)


def randomised(model, seed=0, std=0.2):
    """The model with random parameters, and gains near 1. The projections of a new model are zero,
    and a zero would hide everything that stands before it."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = std * torch.randn(p.shape, generator=generator)
        is_gain = p.ndim == 1 and p.data.mean() > 0.5
        p.data = 1 + noise if is_gain else noise
    return model


def random_text(B, T, seed=0):
    """Random letters and blanks (B, T)."""
    letters = torch.tensor(list(b"aeiou, "))
    generator = torch.Generator().manual_seed(seed)
    return letters[torch.randint(len(letters), (B, T), generator=generator)]


def make_blt(rule="global", seed=0, **options):
    """A BLT with random weights, whose patches have about three bytes."""
    cfg = replace(TINY, patching=rule, **options)
    entropy_model = None
    if rule in ("global", "monotonic"):
        entropy_model = GPT(GPTConfig(256, cfg.block_size, n_layer=1, n_head=2, n_embd=16))
    model = randomised(BLT(cfg, entropy_model), seed)
    model.patcher.set_threshold(random_text(16, cfg.block_size, seed=9), cfg.patch_bytes)
    return model


def as_bools(text):
    """ "10 1" -> [True, False, True]"""
    return [character == "1" for character in text if character != " "]


# hashes and rules, by hand ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 6])
def test_the_hash_is_a_polynomial_modulo_two_to_the_64(n):
    data = list("größe".encode())
    rows = train_blt.hash_ngram(torch.tensor([data]), n, 1000)[0].tolist()
    for i, row in enumerate(rows):
        total = 0
        for j in range(n):
            byte = data[i - j] if j <= i else 0
            total += byte * train_blt.PRIME**j
        total %= 2**64
        signed = total - 2**64 if total >= 2**63 else total
        assert row == signed % 1000, (i, n)


def test_the_hash_sees_no_later_byte():
    idx = random_text(1, 12)
    before = train_blt.hash_ngram(idx, 4, 4096)
    idx[0, 7] = 200
    after = train_blt.hash_ngram(idx, 4, 4096)
    changed = (before != after)[0].tolist()
    assert changed == [7 <= i < 11 for i in range(12)]


def test_entropy_of_known_distributions():
    logits = torch.full((1, 2, 256), -1000.0)
    logits[0, 0] = 3.0  # all bytes are equally likely
    logits[0, 1, [5, 9]] = torch.tensor([1.0, 1.0]).log()  # one of two
    entropy = train_blt.next_byte_entropy(logits)[0]
    assert entropy[0].item() == pytest.approx(torch.tensor(256.0).log().item(), rel=1e-6)
    assert entropy[1].item() == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)


def test_entropy_rules_by_hand():
    """Entry i is about byte i + 1, so an entropy above the threshold starts the patch one place
    further on. Bytes 0 and 1 always start one."""
    entropy = torch.tensor([[0.1, 0.9, 0.2, 2.0, 2.5, 1.9]])
    starts = train_blt.global_starts(entropy, 1.95)
    assert starts[0].tolist() == as_bools("11 0 0 1 1 0")
    starts = train_blt.monotonic_starts(entropy, 0.6)  # rises: 0, 0.8, -0.7, 1.8, 0.5, -0.6
    assert starts[0].tolist() == as_bools("11 1 0 1 0 0")


def test_static_and_space_rules_by_hand():
    idx = torch.tensor([list(b"It is,  so")])
    assert train_blt.static_starts(idx, 3)[0].tolist() == as_bools("11 0 0 1 0 0 1 0 0 1")

    # "It |is,|  so": behind a space-like byte, but not behind the second and third in a row
    assert train_blt.space_starts(idx)[0].tolist() == as_bools("11 0 1 0 0 1 0 0 0 0")

    # A letter of two bytes is no space.
    idx = torch.tensor([list("é a".encode())])
    assert train_blt.space_starts(idx)[0].tolist() == as_bools("11 0 1 0")


def test_patch_numbers_and_complete_patches_by_hand():
    """Patches 0 | 1 1 1 | 2, and byte 5 is yet to come. Byte 1 is predicted from patch 0, and so
    are the bytes that are in patch 1 with it."""
    patch_of = train_blt.patch_numbers(torch.tensor([as_bools("11 0 0 1 0")]))
    assert patch_of.tolist() == [[0, 1, 1, 1, 2, 2]]
    assert train_blt.complete_patches(patch_of).tolist() == [[0, 0, 0, 1, 1]]


@pytest.mark.parametrize("rule", train_blt.RULES)
def test_a_rule_decides_from_the_bytes_before(rule):
    patcher = make_blt(rule).patcher
    idx = random_text(1, 24)
    before = patcher(idx)
    moved = 0
    for t in range(24):
        other = idx.clone()
        other[0, t] = ord(",") if idx[0, t] != ord(",") else ord("a")
        after = patcher(other)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1]), t
        moved += not torch.equal(before, after)
    assert moved > 0 or rule == "static"


@pytest.mark.parametrize("rule", ["global", "monotonic"])
def test_the_threshold_gives_patches_of_the_wanted_length(rule):
    model = make_blt(rule)
    starts = model.patcher(random_text(16, 48, seed=9))[:, 2:]
    assert starts.float().mean().item() == pytest.approx(1 / 3, rel=0.03)


# no leak ------------------------------------------------------------------------------------------


def first_changes(model, T=24):
    """Changes each byte t of a text -> for each t the first position whose logits change by a bit.

    A second row keeps the number of patches, and so all shapes, the same: it has more patches than
    any version of the first.
    """
    idx = random_text(2, T)
    starts_of = type(model.patcher).forward

    def forward(patcher, idx):
        starts = starts_of(patcher, idx)
        starts[1] = True
        return starts

    first = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(model.patcher), "forward", forward)
        before, _ = model(idx)
        for t in range(T):
            other = idx.clone()
            other[0, t] = ord(",") if idx[0, t] != ord(",") else ord("a")
            after, _ = model(other)
            changed = (before[0] != after[0]).any(dim=-1).nonzero()
            first.append(changed[0].item())
    return first


@pytest.mark.parametrize("rule", train_blt.RULES)
def test_no_logits_move_before_the_byte_that_changed(rule):
    """Bit by bit. Those of the changed byte itself do move."""
    assert first_changes(make_blt(rule)) == list(range(24))


@pytest.mark.parametrize("rule", train_blt.RULES)
def test_reading_the_patch_that_a_byte_is_in_would_be_a_leak(rule, monkeypatch):
    """The classic bug, planted: the test above finds it."""
    monkeypatch.setattr(train_blt, "complete_patches", lambda patch_of: patch_of[:, :-1])
    first = first_changes(make_blt(rule))
    assert any(position < t for t, position in enumerate(first))


def test_reading_the_patch_of_the_byte_to_come_would_be_a_leak(monkeypatch):
    def next_patch(patch_of):
        return patch_of[:, 1:].clamp(max=patch_of[:, :-1].max())

    monkeypatch.setattr(train_blt, "complete_patches", next_patch)
    first = first_changes(make_blt("spaces"))
    assert any(position < t for t, position in enumerate(first))


# parity with slower statements --------------------------------------------------------------------


def attend(queries, keys, values, n_head):
    """Attention of queries (n, C) over keys and values (m, C), head by head."""
    outputs = []
    for q, k, v in zip(
        queries.chunk(n_head, dim=-1), keys.chunk(n_head, dim=-1), values.chunk(n_head, dim=-1)
    ):
        weights = (q @ k.T / q.size(-1) ** 0.5).softmax(dim=-1)
        outputs.append(weights @ v)
    return torch.cat(outputs, dim=-1)


def slow_forward(model, idx):
    """One text (T,) -> logits (T, 256), patch by patch and byte by byte."""
    cfg = model.cfg
    starts = model.patcher(idx[None])[0].tolist()
    T = len(idx)
    x = model.encoder(model.wte(idx[None]))[0]  # (T, C)

    # Each patch reads its own bytes.
    reader = model.patch_reader
    borders = [i for i in range(T) if starts[i]] + [T]
    patches = []
    for first, last in zip(borders, borders[1:]):
        own = x[first:last]
        vectors = reader.pool_proj(own.max(dim=0).values).view(cfg.n_query, -1)  # (K, C)
        inside = reader.ln_kv(own)
        queries = reader.c_q(reader.ln_q(vectors))
        read = attend(queries, reader.c_k(inside), reader.c_v(inside), cfg.n_head)
        patches.append(vectors + reader.c_proj(read))
    patches = torch.stack(patches)  # (P, K, C)
    patches = model.trunk(patches.flatten(1)[None])[0].view(patches.shape)

    # Each byte reads the last patch that ends at this byte or before it.
    reader = model.byte_reader
    y = []
    for i in range(T):
        complete = 0
        for number, last in enumerate(borders[1:]):
            if last <= i + 1 and starts[last]:
                complete = number
        vectors = reader.ln_kv(patches[complete])
        query = reader.c_q(reader.ln_q(x[i : i + 1]))
        read = attend(query, reader.c_k(vectors), reader.c_v(vectors), cfg.n_head)
        y.append(x[i] + reader.c_proj(read)[0])
    y = model.decoder(torch.stack(y)[None])
    return model.lm_head(model.ln_f(y))[0]


@pytest.mark.parametrize("rule", train_blt.RULES)
def test_forward_is_the_slow_forward(rule):
    """Two texts with different numbers of patches, so that one has empty patches at its end."""
    model = make_blt(rule).double()
    idx = random_text(2, 31)
    idx[1, 5:25] = ord("a")
    with torch.no_grad():
        logits, _ = model(idx)
        for row in range(2):
            expected = slow_forward(model, idx[row])
            difference = (logits[row] - expected).abs().max() / expected.abs().max()
            assert difference < 1e-12


def test_single_precision_is_near_double():
    model = make_blt("static")
    idx = random_text(2, 40)
    with torch.no_grad():
        single, _ = model(idx)
        double, _ = model.double()(idx)
    assert (single - double).abs().max() < 1e-4 * double.abs().max()


# generation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", train_blt.RULES)
def test_generation_is_the_forward_pass_of_training(rule):
    """Byte by byte, with the patches of the text so far, as when the whole text is known."""
    model = make_blt(rule)
    prompt = random_text(1, 9)[0].tolist()
    [new] = train_blt.generate(model, [prompt], 20)
    text = torch.tensor([prompt + new])
    with torch.no_grad():
        whole, _ = model(text)
        for end in range(len(prompt), text.size(1)):
            part, _ = model(text[:, :end])
            difference = (part[0, -1] - whole[0, end - 1]).abs().max()
            assert difference < 1e-4 * whole.abs().max()
            assert part[0, -1].argmax() == text[0, end]


def test_prompts_of_any_lengths_stand_in_one_batch():
    model = make_blt()
    prompts = [random_text(1, n, seed=n)[0].tolist() for n in (3, 11, 7)]
    together = train_blt.generate(model, prompts, 12)
    alone = [train_blt.generate(model, [prompt], 12)[0] for prompt in prompts]
    assert together == alone

    # A row ends with its first stop byte.
    stop = together[0][4]
    stopped = train_blt.generate(model, prompts, 12, stop=lambda i: i == stop)
    for full, short in zip(together, stopped):
        end = full.index(stop) + 1 if stop in full else 12
        assert short == full[:end]


# learning -----------------------------------------------------------------------------------------


def test_every_parameter_has_a_gradient_but_those_of_the_entropy_model():
    model = make_blt()
    idx = random_text(4, 48)
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    for name, p in model.named_parameters():
        if name.startswith("patcher."):
            assert p.grad is None and not p.requires_grad
        else:
            assert p.grad.abs().max() > 0, name


def test_a_batch_is_learned_by_heart():
    """A new model, trained on two texts, then writes them."""
    torch.manual_seed(0)
    texts = [b"The fox found a red kite in Rome.", b"The fish met one old king at sea."]
    idx = torch.tensor([list(text) for text in texts])
    idx = torch.cat([torch.tensor([[1], [2]]), idx], dim=1)  # the first byte says which text
    model = BLT(replace(TINY, patching="spaces"))
    cfg = train_blt.Config(lr=0.05, lr_adamw=0.02)
    losses = []
    train_blt.fit(
        model,
        lambda step: (idx[:, :-1], idx[:, 1:]),
        120,
        cfg,
        lambda step, loss: losses.append(loss),
    )
    assert losses[0] == pytest.approx(5.545, abs=0.1), "a new model guesses: ln 256"
    assert losses[-1] < 0.05
    new = train_blt.generate(model, [[1], [2]], len(texts[0]))
    assert [bytes(row) for row in new] == texts


def test_the_schedule_by_hand():
    cfg = train_blt.Config(warmup=0.2, decay=0.5)
    scales = [train_blt.lr_scale(step, 10, cfg) for step in range(10)]
    assert scales == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("kind", train_blt.KINDS)
def test_a_checkpoint_gives_the_same_model(tmp_path, kind):
    tok = Tokenizer(train_blt.train_ranks("one kite, one kite", 5))
    gpt_cfg = GPTConfig(tok.vocab_size, 48, n_layer=1, n_head=2, n_embd=16)
    model = {
        "blt": make_blt,
        "byte": lambda: randomised(ByteGPT(replace(gpt_cfg, vocab_size=256), rows=32)),
        "bpe": lambda: randomised(GPT(gpt_cfg)),
    }[kind]()
    path = tmp_path / "m.pt"
    save_checkpoint(path, kind="blt", **train_blt.to_checkpoint(kind, model, tok))
    again, again_tok = train_blt.load_model(load_checkpoint(path, "blt"))
    idx = random_text(2, 20)
    assert torch.equal(model(idx)[0], again(idx)[0])
    expected = tok if kind == "bpe" else train_blt.Bytes()
    assert again_tok.encode("one kite") == expected.encode("one kite")
    assert again_tok.decode(again_tok.encode("kite, é")) == "kite, é"


# the cost of a byte -------------------------------------------------------------------------------


def counted_flops(model, idx):
    """What PyTorch counts as the operations of matrix products. Attention is not among them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(idx)
    total = 0
    for op, flops in counter.get_flop_counts()["Global"].items():
        if "attention" not in str(op):
            total += flops
    return total


def test_the_formula_of_a_gpt_is_what_pytorch_counts():
    cfg = GPTConfig(300, 32, n_layer=3, n_head=4, n_embd=24, n_kv_head=2)
    attention = cfg.n_layer * 4 * 24 * 16.5
    formula = train_blt.gpt_flops(cfg, 32, 1) - attention
    assert counted_flops(GPT(cfg), random_text(2, 32)) == pytest.approx(64 * formula)
    assert train_blt.gpt_flops(cfg, 32, 4) == train_blt.gpt_flops(cfg, 32, 1) / 4


def test_the_formula_of_a_blt_is_what_pytorch_counts():
    """Its attention by hand: a key of each of the two local transformers costs 4 C operations, and
    a key of the global one 4 K C for each patch; the two cross-attentions cost 4 C K each."""
    model = make_blt("static", patch_bytes=4, n_encoder=2)
    cfg = model.cfg
    idx = random_text(2, 45)  # patches of 1, 4, 4, ... bytes: 12
    cfg = replace(cfg, block_size=45)
    C, K = cfg.n_local, cfg.n_query
    local_attention = (cfg.n_encoder + cfg.n_decoder) * 4 * C * 23
    cross_attention = 2 * 4 * C * K
    global_attention = cfg.n_layer * 4 * K * C * (12 + 1) / 2 * 12 / 45
    formula = train_blt.blt_flops(cfg, 45 / 12)
    formula -= local_attention + cross_attention + global_attention
    assert counted_flops(model, idx) == pytest.approx(2 * 45 * formula)

    # The entropy model is a GPT, and its operations are added.
    entropy_cfg = train_blt.entropy_config(cfg)
    both = train_blt.blt_flops(cfg, 45 / 12, entropy_cfg)
    alone = train_blt.blt_flops(cfg, 45 / 12)
    assert both - alone == pytest.approx(train_blt.gpt_flops(entropy_cfg, 45, 1))


def test_no_other_size_of_a_gpt_is_nearer_to_the_cost():
    cfg = train_blt.match_gpt(100_000, 64, 4.0, 500)
    distance = abs(train_blt.gpt_flops(cfg, 64, 4.0) - 100_000)
    for n_embd in (cfg.n_embd - 8, cfg.n_embd + 8):
        other = GPTConfig(500, 64, 4, 4, n_embd, n_kv_head=4)
        assert abs(train_blt.gpt_flops(other, 64, 4.0) - 100_000) >= distance


# text ---------------------------------------------------------------------------------------------


def test_merges_by_hand():
    ranks = train_blt.train_ranks("aaabdaaabac", 3)
    assert list(ranks)[256:] == [b"aa", b"ab", b"aaab"]


def make_text():
    documents = [f"Fox number {i} found a kite.\n\n" for i in range(60)]
    return train_blt.Text("".join(documents), "".join(documents[:7]), True, None)


def test_rows_of_the_world_start_with_a_blank_line():
    text = make_text()
    data = train_blt.encode_data(text, train_blt.Bytes(), 40)
    x, y = train_blt.get_batch(data, 3, 5, seed=0)
    assert x.shape == y.shape == (5, 40)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert all(bytes(row).startswith(b"\nFox") for row in x.tolist())

    tok = Tokenizer(train_blt.train_ranks(text.train, 20))
    tokens = train_blt.encode_data(text, tok, 40)
    assert tokens.block_size == round(40 / tokens.bytes_per_id) < 40
    x, _ = train_blt.get_batch(tokens, 3, 5, seed=0)
    ends_before = [tok.decode(row).partition("Fox")[0] for row in x.tolist()]
    assert all(before.endswith("\n") and not before.strip(".\n") for before in ends_before)


def test_evaluate_is_the_sum_over_the_rows():
    text = make_text()
    data = train_blt.encode_data(text, train_blt.Bytes(), 25)
    model = make_blt("spaces")
    nats = 0.0
    edges = data.edges.tolist()
    assert max(b - a for a, b in zip(edges, edges[1:])) == 25
    with torch.no_grad():
        for first, last in zip(edges, edges[1:]):
            logits, _ = model(data.val_ids[None, first:last])
            target = data.val_ids[first + 1 : last + 1]
            nats += F.cross_entropy(logits[0], target, reduction="sum").item()
    expected = nats / len(text.val.encode())
    assert train_blt.evaluate(model, data) == pytest.approx(expected, rel=1e-5)

    # Mean patch length: bytes over patches, in the same rows.
    patches = 0
    for first, last in zip(edges, edges[1:]):
        patches += train_blt.space_starts(data.val_ids[None, first:last])[0, :-1].sum().item()
    measured = train_blt.mean_patch_bytes(model.patcher, data)
    assert measured == pytest.approx((len(data.val_ids) - 1) / patches)


# demo_patches -------------------------------------------------------------------------------------


def test_the_sentence_of_the_first_figure_is_never_empty():
    """The validation text of a play may begin with an empty line, or have only one line."""
    assert demo_patches.default_sentence("?\n\nGREMIO:\nGood morrow, neighbour.") == (
        "Good morrow, neighbour."
    )
    assert demo_patches.default_sentence("one line") == "one line"
    assert demo_patches.default_sentence("\u00fc" * 100) == "\u00fc" * 36  # of two bytes each


def test_cut_by_hand():
    assert demo_patches.cut(b"There", as_bools("11 0 1 0")) == [b"T", b"he", b"re"]


def test_the_finding_is_computed():
    losses = {name: [0.3, 0.4] for name in demo_patches.ARMS}
    losses["GPT on bytes"] = [0.1, 0.2]
    losses["BLT, spaces"] = [0.35, 0.45]
    losses["BLT, no n-grams"] = [0.7, 0.7]
    text = demo_patches.finding(losses)
    assert "GPT on bytes, 0.100 to 0.200" in text
    assert "0.300 to 0.400, without 0.700" in text
    assert "differ by 0.050" in text


# demo_spelling ------------------------------------------------------------------------------------


def test_exercises_by_hand():
    rng = random.Random(0)
    assert demo_spelling.exercise("spell", "Lucy", rng).answer == "L-u-c-y"
    assert demo_spelling.exercise("reverse", "Lucy", rng).answer == "ycuL"
    assert demo_spelling.exercise("swap", "kite", rng).answer == "eitk"
    expected = {"spoon": {"0", "1", "2"}, "drum": {"0", "1"}, "Anna": {"0", "2"}}
    for word in expected:
        answers = set()
        for _ in range(60):
            item = demo_spelling.exercise("count", word, rng)
            letter = item.request.split()[3]
            assert item.request == f"How often is {letter} in {word}?"
            assert item.answer == str(word.lower().count(letter))
            answers.add(item.answer)
        assert answers == expected[word]


def test_held_out_words_are_not_trained_on(monkeypatch):
    monkeypatch.setattr(demo_spelling, "official_words", lambda: ["kite"])
    text = train_blt.Text("the fox saw the kite and the red ball, an owl", "", True, None)
    cfg = demo_spelling.Config(share=0.4)
    words = demo_spelling.split_words(text, cfg, 0)
    assert words.official == ["kite"]
    assert "kite" in words.held_out
    assert not set(words.train) & set(words.held_out)
    everything = {"the", "fox", "saw", "kite", "and", "red", "ball", "owl"}
    assert set(words.train) | set(words.held_out) == everything
    assert len(words.held_out) == 3

    # No made-up word is a word of the text.
    rng = random.Random(0)
    made_up = {demo_spelling.made_up_word(rng, set()) for _ in range(5_000)}
    again = {demo_spelling.made_up_word(rng, made_up) for _ in range(5_000)}
    assert len(made_up) > 2_000 and not made_up & again
    assert words.known == everything
    trained_on = set()
    for _ in range(300):
        item = demo_spelling.draw_exercise(words, rng)
        trained_on.add(item.request.removesuffix(".").removesuffix("?").split()[-1])
    assert set(words.train) <= trained_on
    assert not set(words.held_out) & trained_on
    assert len(trained_on) > 100


def test_only_the_answer_is_a_target():
    tok = train_blt.Bytes()
    item = demo_spelling.Exercise("Spell the word ox.", "o-x")
    pair = demo_spelling.encode_exercise(item, tok)
    short = (tok.encode("ab"), tok.encode("c"))
    x, y = demo_spelling.collate([pair, short])
    assert bytes(x[0].tolist()) == b"\n\nSpell the word ox.\no-x"
    assert y[0].tolist() == [-100] * 20 + list(b"o-x\n")
    assert x[1].tolist()[:3] == list(b"abc") and y[1].tolist()[:2] == [-100, ord("c")]
    assert (y[1, 2:] == -100).all()


def test_typing_errors_replace_letters_only():
    text = "The fox, 12 kites. " * 200
    typed = demo_spelling.mistype(text, 0.05, seed=1)
    assert len(typed) == len(text)
    changed = [(a, b) for a, b in zip(text, typed) if a != b]
    assert all(a.isalpha() and b in demo_spelling.ALPHABET for a, b in changed)
    letters = sum(character.isalpha() for character in text)
    assert len(changed) / letters == pytest.approx(0.05 * 25 / 26, rel=0.25)
    assert demo_spelling.mistype(text, 0.0, seed=1) == text


def test_the_best_guess_is_the_most_frequent_answer():
    items = [demo_spelling.Exercise("", answer) for answer in "1012"]
    assert demo_spelling.best_guess(items) == 0.5


def test_share_right():
    items = [demo_spelling.Exercise("", "o-x"), demo_spelling.Exercise("", "2")]
    assert demo_spelling.share_right(items, ["o-x", "22"]) == 0.5


def test_answers_end_with_their_line(monkeypatch):
    def generate(model, rows, max_new, stop):
        assert [bytes(row) for row in rows] == [b"\n\nSpell\n"]
        assert stop(ord("\n")) and not stop(ord("o"))
        return [list(b"o-x\n")]

    monkeypatch.setattr(train_blt, "generate", generate)
    assert demo_spelling.answers_to(None, train_blt.Bytes(), ["Spell"]) == ["o-x"]


def test_part_6s_model_is_asked_in_its_own_format(monkeypatch, tmp_path, capsys):
    tok = Tokenizer(train_blt.train_ranks("Spell the word fox. Spell the word", 12))
    torch.manual_seed(0)
    model = GPT(GPTConfig(tok.vocab_size, 64, n_layer=1, n_head=2, n_embd=16))
    path = tmp_path / "sft.pt"
    save_checkpoint(path, kind="sft", tokenizer=tok.state(), **model.to_checkpoint())
    monkeypatch.setattr(demo_spelling, "require", lambda name: path)
    seen = []

    def generate(model, rows, max_new, stop):
        seen.extend(rows)
        return [[*tok.encode("f-o-x"), tok.special["<|end|>"]] for _ in rows]

    monkeypatch.setattr(train_blt, "generate", generate)
    assert demo_spelling.ask_sft_model(["fox", "ox"], "cpu") == 0.5
    assert tok.decode(seen[0]) == "<|user|>Spell the word fox.<|assistant|>"


# the scripts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blt")
    rng = random.Random(0)
    words = "the fox saw a red kite near one old lake while nobody else looked at Anna".split()
    lines = []
    for _ in range(400):
        lines.append(" ".join(rng.choice(words) for _ in range(8)) + ".")
    (folder / "my.txt").write_text("\n".join(lines))
    (folder / "short.txt").write_text("too short")
    (folder / "words.txt").write_text("kite " * 2000)
    return folder


def run(folder, script, *options):
    command = [sys.executable, str(FOLDER / script), "--device=cpu", *options]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


SMALL = ["--data=my.txt", "--steps=2", "--batch_size=2", "--eval_bytes=600"]


@pytest.mark.parametrize("kind", train_blt.KINDS)
def test_train_blt_as_a_script(folder, kind):
    sizes = ["--n_local=16", "--n_layer=1", "--block_size=32", "--hash_rows=16"]
    options = [*SMALL, *sizes, "--entropy_steps=1", "--vocab_size=270", f"--kind={kind}"]
    done = run(folder, "train_blt.py", *options, f"--out=train_{kind}")
    assert done.returncode == 0, done.stderr
    out = folder / f"train_{kind}"
    metrics = json.loads((out / "train_blt.json").read_text())
    assert 4 < metrics["val_loss"] * (1 if kind != "bpe" else metrics["bytes_per_unit"]) < 6
    assert len((out / "train_blt.jsonl").read_text().splitlines()) == 2
    assert (out / "train_blt.png").read_bytes().startswith(b"\x89PNG")
    model, _ = train_blt.load_model(load_checkpoint(out / "blt.pt", "blt"))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == metrics["params"]


def test_both_demos_as_scripts(folder):
    done = run(folder, "demo_patches.py", *SMALL, "--entropy_steps=1", "--out=patches")
    assert done.returncode == 0, done.stderr
    out = folder / "patches"
    results = json.loads((out / "demo_patches.json").read_text())
    assert list(results["results"]) == list(demo_patches.ARMS)
    for name in ("demo_patches", "demo_patches_arms"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    done = run(
        folder, "demo_spelling.py", *SMALL, "--asked=3", "--models=patches", "--out=spelling"
    )
    assert done.returncode == 0, done.stderr
    assert "training" not in done.stdout.split("held out")[0], "all models are there"
    out = folder / "spelling"
    results = json.loads((out / "demo_spelling.json").read_text())
    assert list(results["accuracy"]) == demo_spelling.ARMS
    assert set(results["accuracy"]["BLT, global rule"][0]) == set(demo_spelling.TASKS)
    assert (out / "demo_spelling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "script, options, words",
    [
        ("train_blt.py", ["--data=short.txt"], "too short"),
        ("train_blt.py", ["--data=no.txt"], "no file"),
        ("train_blt.py", ["--kind=word"], "must be one of blt, byte, bpe"),
        ("train_blt.py", ["--patching=random"], "must be one of global"),
        ("train_blt.py", ["--patch_bytes=1"], "must be above 1"),
        ("train_blt.py", ["--n_local=0"], "at least 1"),
        ("train_blt.py", ["--n_local=60"], "divisible by"),
        ("train_blt.py", ["--vocab_size=100"], "at least 260"),
        ("demo_patches.py", ["--sentence=" + "a" * 257], "at most 256 bytes"),
        ("demo_spelling.py", ["--share=1"], "between 0 and 1"),
        ("demo_spelling.py", ["--data=short.txt"], "too short"),
        ("demo_spelling.py", ["--data=words.txt"], "only 1 different words"),
    ],
)
def test_bad_input_ends_in_one_line(folder, script, options, words):
    done = run(folder, script, *options)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert words in line
