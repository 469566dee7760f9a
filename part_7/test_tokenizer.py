"""
Tests of Part 7's tokenizer. It is the tokenizer of Part 6, so one test says so, and two more say
that it still loads and gives every text back.
"""

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest

from shared import ROOT
from tokenizer import SPECIAL, Tokenizer

TEXTS = [
    "",
    "the thin thing",
    "  two spaces,\n\na blank line\t and a tab ",
    "Zoë drinks 3 cafés' crème — 12345 €",
    "漢字 and 🦊",
    "<|end|> typed by a user",
]


@pytest.fixture(scope="module")
def tok():
    """The 256 bytes and three merges."""
    ranks = {bytes([i]): i for i in range(256)}
    for merge in (b"th", b" th", b"in"):
        ranks[merge] = len(ranks)
    return Tokenizer(ranks)


def test_it_is_part_6s_tokenizer():
    trees = []
    for part in ("part_6", "part_7"):
        tree = ast.parse((ROOT / part / "tokenizer.py").read_text())
        trees.append([ast.dump(statement) for statement in tree.body[1:]])
    assert trees[0] == trees[1], "only the docstring at the top may differ"


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert all(i < 259 for i in ids), "a text never becomes a special token"


def test_load_gives_the_same_tokenizer(tok):
    loaded = Tokenizer.load(tok.state())
    assert loaded.vocab_size == 256 + 3 + len(SPECIAL)
    assert loaded.special == {name: 259 + i for i, name in enumerate(SPECIAL)}
    for text in TEXTS:
        assert loaded.encode(text) == tok.encode(text)
    assert loaded.encode("thin") == [256, 258], "the merges must be used"
