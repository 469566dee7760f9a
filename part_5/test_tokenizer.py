"""
Tests of part_5/tokenizer.py, a verbatim copy of Part 4's, where its tests are.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokenizer import Tokenizer

TEXT = "the red fox saw the old dog. né, 言: the dog ran to the fox. " * 20


def test_round_trip_and_state():
    tok = Tokenizer.train(TEXT, 300)
    ids = tok.encode(TEXT)
    assert tok.decode(ids) == TEXT
    assert len(ids) < len(TEXT.encode()) / 2
    again = Tokenizer.load(tok.state())
    assert again.encode(TEXT) == ids
    assert tok.encode_slow(TEXT) == ids
