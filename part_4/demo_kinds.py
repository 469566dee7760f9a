"""
Part 4, kinds of text: what has the base model learned, and what not yet?

    python part_4/demo_kinds.py
    python part_4/demo_kinds.py --init=part_4/out/steps=2000/base.pt    a longer training

The text of the world has three kinds of documents: stories, statements about the taxonomy, and
solved problems. The true entropy of each kind is known, so the distance of a model's loss from it
says what is missing: for statements it is knowledge, and for the solutions of problems, which are
certain, it is arithmetic. One number for the whole text would hide that.

Losses are in nats per document. A problem has two parts, the request and its solution, and the loss
of the solution is shown alone, too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import GPT
from shared import (
    fail,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    read_facts,
    read_text,
    require,
    save_figure,
    save_metrics,
)
from tokenizer import Tokenizer

KINDS = ["story", "statement", "problem"]


@dataclass
class Config:
    init: str = ""  # checkpoint of the base model; empty: part_4/out/base.pt
    longest: int = 128  # tokens of a document; longer ones are left out
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script


def kind_of(document):
    """Is a document a story, a few statements, or a solved problem?"""
    if "Think step by step.\n" in document:
        return "problem"
    return "story" if " named " in document else "statement"


class Loss(NamedTuple):
    """The loss of a model on one document."""

    nats: float  # of the whole document
    last_part: float  # nats after its line break: a story after its brief, or a solution
    size: int  # bytes


@torch.no_grad()
def document_loss(model, tok, document, device):
    """The document stands alone, with the blank lines around it as in the text -> Loss."""
    # The token before a document is the end of another one, as in training.
    before = tok.encode("The end.\n\n")[-1:]
    ids = before + tok.encode(document + "\n\n")
    idx = torch.tensor([ids], device=device)
    logits, _ = model(idx[:, :-1], idx[:, 1:])
    nats = F.cross_entropy(logits[0], idx[0, 1:], reduction="none").tolist()

    # Where does the part after the line break begin? Token i ends after ends[i] bytes.
    first_byte = len(document.partition("\n")[0].encode()) + 1
    ends = torch.tensor(tok.n_bytes)[ids[1:]].cumsum(0).tolist()
    last_part = sum(value for value, end in zip(nats, ends) if end > first_byte)
    return Loss(sum(nats), last_part, len(document.encode()))


def draw(title, measured, true, path):
    """Measured and true nats per document, by kind."""
    fig, ax = figure(title, ylabel="nats per document, held out", height=4.2)
    names = list(measured)
    for i, name in enumerate(names):
        for shift, values, colour, label in (
            (-0.2, true, "gray", "true entropy"),
            (0.2, measured, "C0", "loss of the model"),
        ):
            ax.bar(i + shift, values[name], 0.38, color=colour, label=None if i else label)
            ax.text(i + shift, values[name] + 0.5, f"{values[name]:.1f}", ha="center", fontsize=10)
    ax.set_xticks(range(len(names)), names)
    ax.legend()
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    base = load_checkpoint(cfg.init or require("part_4/out/base.pt"), "base")
    base["gpt_config"]["block_size"] = cfg.longest
    model = GPT.load(base).to(device)
    tok = Tokenizer.load(base["tokenizer"])
    folder = require("data/stories")
    facts = read_facts(folder / "facts.json")
    out = output_folder(cfg)

    # the loss of each document of the validation text
    losses = defaultdict(list)
    left_out = 0
    for document in read_text(folder / "val.txt").split("\n\n"):
        if len(tok.encode(document)) + 2 > cfg.longest:
            left_out += 1
            continue
        losses[kind_of(document)].append(document_loss(model, tok, document, device))
    if left_out:
        print(f"{left_out} documents are longer than {cfg.longest} tokens: left out")

    # The true entropy is known per byte. A solution is certain, so all of a problem's entropy is in
    # the request.
    measured = {}
    true = {}
    for kind in KINDS:
        of_kind = losses[kind]
        if not of_kind:
            fail(f"--longest={cfg.longest} leaves out every {kind}: use a larger one")
        size = sum(loss.size for loss in of_kind) / len(of_kind)
        true[kind] = facts["true_nats_per_byte_by_kind"][kind] * size
        measured[kind] = sum(loss.nats for loss in of_kind) / len(of_kind)
    solution = sum(loss.last_part for loss in losses["problem"]) / len(losses["problem"])
    true["solution of a\nproblem alone"] = 0.0
    measured["solution of a\nproblem alone"] = solution

    for name in measured:
        label = name.replace("\n", " ")
        print(f"{label:30} loss {measured[name]:6.2f}   true {true[name]:6.2f} nats per document")
    above = {kind: measured[kind] - true[kind] for kind in KINDS}
    title = (
        f"Above the truth: {above['story']:.1f} nats for a story, {above['statement']:.1f} for six "
        f"statements,\n{above['problem']:.1f} for a problem, {solution:.1f} of them in its solution"
    )
    print(title)
    save_metrics(out, name="demo_kinds", measured=measured, true=true, left_out=left_out)
    draw(title, measured, true, out / "demo_kinds.png")
