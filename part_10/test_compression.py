"""
Tests of compression.py. The oracles are loops over single rows and single channels.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import compression
from compression import (
    InputStatistics,
    cut_rows,
    document_ends,
    documentation,
    load_model,
    load_texts,
    matrices,
    mean_loss,
    paragraphs,
    prose_rows,
    row_edges,
    watch_inputs,
)
from model import GPT, GPTConfig
from shared import save_checkpoint
from tokenizer import Tokenizer

BYTES = {bytes([i]): i for i in range(256)}
WORD_RANKS = {**BYTES, b"th": 256, b"the": 257, b"\n\n": 258}
TOK = Tokenizer(WORD_RANKS)
MATRICES = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_gate", "mlp.c_fc"]


def make_model(seed=0, **options):
    """A small model with random weights, also where a new model has zeros."""
    cfg = GPTConfig(TOK.vocab_size, 16, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, **options)
    model = GPT(cfg).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim == 2:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return model


def save_model(path, model, tok=TOK, **content):
    save_checkpoint(path, kind="base", tokenizer=tok.state(), **model.to_checkpoint(), **content)


# texts --------------------------------------------------------------------------------------------


def test_the_halves_of_the_documentation_are_large_and_hardly_share_a_paragraph():
    calibration, held_out = documentation()
    assert min(len(calibration), len(held_out)) > 100_000
    assert "for_stmt" in calibration + held_out

    seen = set(paragraphs(calibration))
    assert len(seen) > 100
    shared = sum(len(text) for text in paragraphs(held_out) if text in seen)
    assert shared < 0.01 * len(held_out)


def test_rows_are_the_text_and_padding_does_not_count():
    text = "the cat\n\nthe dog barks\n\nno"
    ids = torch.tensor(TOK.encode(text))
    ends = document_ends(TOK, ids, text).tolist()
    rows = cut_rows(TOK, ids, row_edges(ends, len(ids), 8), 100)

    # Every token but the first one is a target exactly once, in the order of the text.
    targets = rows.targets[rows.targets >= 0]
    assert targets.tolist() == ids[1:].tolist()
    assert rows.bytes == len(text.encode()) - len(TOK.token_bytes(ids[0]))

    # An input stands one place before its target.
    for row in range(len(rows.idx)):
        n = (rows.targets[row] >= 0).sum()
        assert rows.idx[row, 1:n].tolist() == rows.targets[row, : n - 1].tolist()
        assert n <= 8

    # A document starts a row: its blank line is the first input, and is never among the others.
    assert (rows.idx[1:, 0] == 258).sum() == 2
    assert rows.idx[:, 1:][rows.targets[:, 1:] >= 0].tolist().count(258) == 0


def test_fewer_rows_are_spread_over_the_text():
    text = "".join(chr(97 + i) * 4 for i in range(20))
    everything = prose_rows(TOK, text, 4, 1000)
    assert len(everything.idx) == 20
    rows = prose_rows(TOK, text, 4, 5)
    assert rows.idx[:, 0].tolist() == everything.idx[[0, 4, 8, 12, 16], 0].tolist()
    assert rows.bytes == 20


def test_a_text_of_one_token_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        prose_rows(TOK, "a", 4, 5)
    assert error.value.code == 2
    assert "too short" in capsys.readouterr().err


def test_the_texts_of_another_model_are_the_documentation():
    model = make_model()
    texts = load_texts("my.pt", model, TOK, 1000, 3, 2)
    assert texts.calibration.idx.shape == (3, 16), "rows are as long as the model can read"
    assert texts.held_out.idx.shape == (2, 16)
    assert texts.entropy is None
    first = TOK.decode(texts.held_out.idx[0].tolist())
    assert documentation()[1].startswith(first)


def test_the_texts_of_base_are_the_world_with_its_entropy(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("the fox\n\nthe hen\n\n" * 9)
    (tmp_path / "val.txt").write_text("the owl\n\nthe elk\n\n" * 9)
    (tmp_path / "facts.json").write_text('{"true_nats_per_byte": 0.5}')
    monkeypatch.setattr(compression, "require", lambda path: tmp_path)
    texts = load_texts("base", make_model(), TOK, 1000, 4, 1000)
    assert "fox" in TOK.decode(texts.calibration.idx[0].tolist())
    assert "owl" in TOK.decode(texts.held_out.idx[0].tolist())

    # The documents have 9 bytes each: the word "the", 4 letters or spaces, and the blank line.
    n_tokens = (texts.held_out.targets >= 0).sum().item()
    assert n_tokens == 18 * 6 - 1
    assert texts.entropy == pytest.approx(0.5 * (18 * 9 - 3) / n_tokens)


# models -------------------------------------------------------------------------------------------


def test_a_model_and_its_tokenizer_come_back(tmp_path):
    model = make_model()
    save_model(tmp_path / "my.pt", model)
    loaded, tok = load_model(str(tmp_path / "my.pt"), "cpu")
    assert tok.encode("the end") == TOK.encode("the end")
    for name, p in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], p)


def test_a_checkpoint_that_cannot_be_made_small_is_refused(tmp_path, capsys):
    save_model(tmp_path / "moe.pt", make_model(n_expert=2))
    with pytest.raises(SystemExit) as error:
        load_model(str(tmp_path / "moe.pt"), "cpu")
    assert error.value.code == 2
    assert "has experts" in capsys.readouterr().err

    save_checkpoint(tmp_path / "none.pt", kind="sonar", weights={})
    with pytest.raises(SystemExit) as error:
        load_model(str(tmp_path / "none.pt"), "cpu")
    assert error.value.code == 2
    assert "is a 'sonar' checkpoint, expected 'base' or" in capsys.readouterr().err


def test_the_matrices_are_those_of_the_blocks():
    names = list(matrices(make_model()))
    per_block = [*MATRICES, "mlp.c_proj"]
    assert names == [f"h.{layer}.{name}" for layer in (0, 1) for name in per_block]


def test_mean_loss_is_the_mean_over_all_tokens():
    model = make_model()
    text = "the cat\n\nthe dog barks at the owl\n\nno"
    ids = torch.tensor(TOK.encode(text))
    ends = document_ends(TOK, ids, text).tolist()
    rows = cut_rows(TOK, ids, row_edges(ends, len(ids), 12), 100)

    nats = []
    for idx, targets in zip(rows.idx, rows.targets):
        n = (targets >= 0).sum()
        logits, _ = model(idx[None, :n])
        nats.extend(F.cross_entropy(logits[0], targets[:n], reduction="none").tolist())
    expected = sum(nats) / len(nats)
    for batch_size in (1, 2, 8):
        assert mean_loss(model, rows, batch_size) == pytest.approx(expected, rel=1e-5)


# what flows into a matrix -------------------------------------------------------------------------


def test_statistics_of_inputs_by_hand():
    statistics = InputStatistics(2, "cpu")
    statistics.add(torch.tensor([[1.0, -2.0]]))
    statistics.add(torch.tensor([[3.0, 0.0], [-5.0, 1.0]]))
    assert statistics.count == 3
    assert statistics.gram.tolist() == [[35.0, -7.0], [-7.0, 5.0]]
    assert statistics.absolute_mean.tolist() == [3.0, 1.0]
    assert statistics.absolute_max.tolist() == [5.0, 2.0]
    assert torch.allclose(statistics.norm, torch.tensor([35.0, 5.0]).sqrt())


def test_watching_sees_what_flows_into_each_matrix_without_padding():
    model = make_model()
    text = "the cat\n\nthe dog barks\n\nno"
    ids = torch.tensor(TOK.encode(text))
    ends = document_ends(TOK, ids, text).tolist()
    rows = cut_rows(TOK, ids, row_edges(ends, len(ids), 16), 100)
    statistics = watch_inputs(model, rows, batch_size=2)
    assert list(statistics) == list(matrices(model))

    # The first matrices read the normalized embeddings of all targets' inputs.
    tokens = rows.idx[rows.targets >= 0]
    x = model.h[0].ln_1(model.wte(tokens)).detach()
    first = statistics["h.0.attn.c_q"]
    assert first.count == len(tokens)
    assert torch.allclose(first.gram, x.T @ x, atol=1e-4)
    assert torch.allclose(first.absolute_max, x.abs().amax(dim=0), atol=1e-5)

    # The watching is over: the model computes as before, and nothing is counted any more.
    model(rows.idx)
    assert first.count == len(tokens)


def test_only_the_named_matrices_are_watched():
    model = make_model()
    rows = prose_rows(TOK, "the cat and the dog", 8, 10)
    statistics = watch_inputs(model, rows, names=["h.1.mlp.c_proj"])
    assert list(statistics) == ["h.1.mlp.c_proj"]
    width = model.h[1].mlp.c_proj.in_features
    assert statistics["h.1.mlp.c_proj"].gram.shape == (width, width)


def test_the_statistics_predict_the_error_of_an_output():
    """The gram matrix is all that is needed to know how far a changed matrix is off."""
    linear = nn.Linear(6, 4, bias=False)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    statistics = InputStatistics(6, "cpu")
    statistics.add(x)
    change = 0.1 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        error = (x @ (linear.weight + change).T - linear(x)).square().sum()
    predicted = (change @ statistics.gram @ change.T).trace()
    assert torch.allclose(error, predicted, rtol=1e-3)
