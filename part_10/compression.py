"""
Part 10: what the scripts share that make a model small: the models, the texts on which they are
measured, and what flows into each of their matrices.

Starts here. document_ends and row_edges are those of part_4/train.py. quantize.py, prune.py,
lowrank.py and lora.py import this file.

Two models are made small, because they teach different things:

    base      our model of Part 4. Its text has a known true entropy, so every loss can be compared
              with the lowest possible one.
    smollm2   SmolLM2-135M-Instruct, a real model. It is bound by memory, and behind its norms some
              channels are far larger than all others. Our model is not bound by memory, and has
              such channels only inside its MLPs.

A method may look at the calibration text. The loss is measured on a held-out text. For base these
are the training and the validation text of the world. For smollm2 they are two halves of Python's
own documentation, which every machine with Python has (other versions of Python have slightly
different texts).

Shapes: N rows, T tokens in a row, C channels of an input, V vocabulary.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import re
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn as nn

from model import GPT
from shared import fail, load_checkpoint, read_text, require
from tokenizer import Tokenizer

# The names under which the command line knows the two models. Anything else is a path.
MODELS = {"base": "part_4/out/base.pt", "smollm2": "part_10/out/smollm2.pt"}

# The kinds of checkpoints that hold a language model and its tokenizer.
LANGUAGE_MODELS = ("base", "sft", "reinforce", "ppo", "grpo", "dpo")


# texts --------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Pieces of a text, as a model reads them."""

    idx: torch.Tensor  # (N, T) token ids; a shorter row is followed by what comes next in the text
    targets: torch.Tensor  # (N, T) the next tokens; -100 for padding, which does not count
    bytes: int  # bytes of all targets together


class Texts(NamedTuple):
    calibration: Rows
    held_out: Rows

    # The true entropy of the held-out text in nats per token, None if unknown. It is that of the
    # whole validation text, so with a few of its rows it is only approximately that of the rows.
    entropy: float


def paragraphs(page):
    """The paragraphs of a page that are long enough to be recognised, each longer than a line."""
    return [paragraph for paragraph in page.split("\n\n") if len(paragraph) > 80]


def documentation():
    """Python's own documentation, in two halves -> (calibration, held out).

    These are the pages that help() shows: every second one is held out, in alphabetical order.
    Many sections stand on two pages, such as the one about "for" also on the page "compound". A
    method must not see what is held out, so a page is left out if other pages already have more
    than half of it.
    """
    pages = {name: topics[name] for name in sorted(topics)}
    for name in sorted(topics):
        elsewhere = set()
        for other in pages:
            if other != name:
                elsewhere.update(paragraphs(pages[other]))

        total = sum(len(paragraph) for paragraph in paragraphs(pages[name]))
        repeated = sum(len(text) for text in paragraphs(pages[name]) if text in elsewhere)
        if repeated > total / 2:
            del pages[name]

    kept = list(pages.values())
    return "\n".join(kept[1::2]), "\n".join(kept[0::2])


def document_ends(tok, ids, text):
    """The positions in ids of the tokens that end with the blank line between two documents."""
    bytes_after = torch.tensor(tok.n_bytes)[ids].cumsum(0)  # bytes up to and including each token
    blank_lines = [match.end() for match in re.finditer(b"\n\n", text.encode())]
    return torch.isin(bytes_after, torch.tensor(blank_lines)).nonzero()[:, 0]


def row_edges(ends, n, block_size):
    """Where the rows of an evaluation start and end: at every document's end, and after every
    block_size tokens in between, up to the last of n tokens."""
    edges = [0]
    for end in sorted({*ends, n - 1}):
        edges.extend(range(edges[-1] + block_size, end, block_size))
        edges.append(end)
    return torch.tensor(edges)


def cut_rows(tok, ids, edges, n_rows):
    """At most n_rows of the rows between the edges, evenly spread over the text -> Rows."""
    chosen = range(len(edges) - 1)
    if n_rows < len(chosen):
        step = len(chosen) / n_rows
        chosen = [int(step * i) for i in range(n_rows)]

    first = edges[:-1][chosen, None]  # (N, 1)
    last = edges[1:][chosen, None]  # (N, 1)
    position = first + torch.arange((last - first).max())  # (N, T)
    padding = position >= last
    idx = ids[position.clamp(max=len(ids) - 1)]
    targets = ids[(position + 1).clamp(max=len(ids) - 1)]

    n_bytes = torch.tensor(tok.n_bytes)[targets][~padding].sum().item()
    return Rows(idx, targets.masked_fill(padding, -100), n_bytes)


def world_rows(tok, path, block_size, n_rows):
    """Documents of the world, one to a row, as Part 4 evaluates them -> Rows."""
    text = read_text(path)
    ids = torch.tensor(tok.encode(text))
    ends = document_ends(tok, ids, text).tolist()
    return cut_rows(tok, ids, row_edges(ends, len(ids), block_size), n_rows)


def prose_rows(tok, text, block_size, n_rows):
    """Pieces of block_size tokens of any text -> Rows."""
    ids = torch.tensor(tok.encode(text))
    if len(ids) < 2:
        fail("the text is too short: it has fewer than two tokens")
    return cut_rows(tok, ids, row_edges([], len(ids), block_size), n_rows)


def load_texts(name, model, tok, block_size, calibration_rows, held_out_rows):
    """The texts for a model by its name in MODELS or its path -> Texts, in rows of at most
    block_size tokens. Base is measured on the world, and any other model on Python's
    documentation."""
    block_size = min(block_size, model.cfg.block_size)
    if name == "base":
        folder = require("data/stories")
        calibration = world_rows(tok, folder / "train.txt", block_size, calibration_rows)
        held_out = world_rows(tok, folder / "val.txt", block_size, held_out_rows)
        per_byte = json.loads(read_text(folder / "facts.json"))["true_nats_per_byte"]
        n_targets = (held_out.targets >= 0).sum().item()
        return Texts(calibration, held_out, per_byte * held_out.bytes / n_targets)

    one_half, other_half = documentation()
    calibration = prose_rows(tok, one_half, block_size, calibration_rows)
    held_out = prose_rows(tok, other_half, block_size, held_out_rows)
    return Texts(calibration, held_out, None)


# models -------------------------------------------------------------------------------------------


def load_model(name, device):
    """A model by its name in MODELS or by the path of a checkpoint -> (model, tokenizer)."""
    path = require(MODELS.get(name, name))
    checkpoint = load_checkpoint(path, LANGUAGE_MODELS)
    if checkpoint["gpt_config"].get("n_expert", 0) > 0:
        fail(f"{path} has experts: this script works on models without them")

    model = GPT.load(checkpoint).to(device).eval()
    return model, Tokenizer.load(checkpoint["tokenizer"])


def matrices(model):
    """The matrices of the blocks -> {name: nn.Linear}, such as "h.0.attn.c_q", in the order in
    which the model uses them. The embedding and the head are not among them."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("h."):
            found[name] = module
    return found


@torch.no_grad()
def mean_loss(model, rows, batch_size=8):
    """The mean loss of a model on the rows, in nats per token."""
    device = model.wte.weight.device
    nats = 0.0
    for start in range(0, len(rows.idx), batch_size):
        idx = rows.idx[start : start + batch_size].to(device)
        targets = rows.targets[start : start + batch_size].to(device)
        _, loss = model(idx, targets)
        nats += loss.item() * (targets >= 0).sum().item()
    return nats / (rows.targets >= 0).sum().item()


# what flows into a matrix -------------------------------------------------------------------------


class InputStatistics:
    """What is known about the inputs x of one matrix after the calibration text."""

    def __init__(self, n_channels, device):
        self.count = 0  # inputs seen
        self.gram = torch.zeros(n_channels, n_channels, device=device)  # (C, C), the sum of x x^T
        self.absolute_sum = torch.zeros(n_channels, device=device)  # (C,), the sum of |x|
        self.absolute_max = torch.zeros(n_channels, device=device)  # (C,), the largest |x|

    def add(self, x):
        """Adds the inputs x (N, C)."""
        x = x.float()
        self.count += len(x)
        self.gram += x.T @ x
        self.absolute_sum += x.abs().sum(dim=0)
        self.absolute_max = torch.maximum(self.absolute_max, x.abs().amax(dim=0))

    @property
    def absolute_mean(self):
        """The mean |x| of each channel, (C,)."""
        return self.absolute_sum / self.count

    @property
    def norm(self):
        """The length sqrt(sum x^2) of each channel over all inputs, (C,)."""
        return self.gram.diagonal().sqrt()


@torch.no_grad()
def watch_inputs(model, rows, names=None, batch_size=8):
    """Runs the model over the rows and watches what flows into its matrices
    -> {name: InputStatistics}. names: only these matrices; None: all of them.

    Padding is not counted.
    """
    device = model.wte.weight.device
    statistics = {}
    hooks = []
    counts = None  # (B, T), the places of the current batch that are not padding

    def watch(name):
        def hook(module, inputs):
            statistics[name].add(inputs[0][counts])

        return hook

    for name, linear in matrices(model).items():
        if names is None or name in names:
            statistics[name] = InputStatistics(linear.in_features, device)
            hooks.append(linear.register_forward_pre_hook(watch(name)))

    for start in range(0, len(rows.idx), batch_size):
        idx = rows.idx[start : start + batch_size].to(device)
        counts = rows.targets[start : start + batch_size].to(device) >= 0
        model.trunk(idx)

    for hook in hooks:
        hook.remove()
    return statistics
