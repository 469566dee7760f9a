"""
Tests of the model and the tokenizer of Part 10, which are those of Part 9, word for word.

What Part 9 tests of them therefore holds here. What is left to test is that they are equal, and
that no token sees the future, because most scripts of this part build on it.
"""

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

from model import GPT, GPTConfig
from shared import ROOT


def code_without_docstring(path):
    tree = ast.parse(path.read_text())
    return [ast.dump(node) for node in tree.body[1:]]


@pytest.mark.parametrize("name", ["model.py", "tokenizer.py"])
def test_the_file_is_that_of_part_9(name):
    here = code_without_docstring(ROOT / "part_10" / name)
    there = code_without_docstring(ROOT / "part_9" / name)
    assert here == there


def test_no_token_sees_the_future():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=13, block_size=24, n_layer=2, n_head=4, n_embd=16))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(13, (1, 20))
    changed = ids.clone()
    changed[0, 10] = (ids[0, 10] + 1) % 13

    before = model(ids)[0]
    after = model(changed)[0]

    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])
