"""
Part 5: what do the experts do? How even is their load over the training, and which kinds of token
go to which expert?

    python part_5/demo_moe.py

No loss asks an expert to specialise. How far it does so can be measured: by the mutual information
of expert and kind of token, in bits (Shannon 1948). At 0 bits the expert tells nothing about the
kind. An estimate from counts is slightly above 0 even then, so the same estimate with the kinds
shuffled stands beside it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
from dataclasses import dataclass

import numpy as np
import torch

from model import GPT
from shared import (
    fail,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    read_log,
    read_text,
    require,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import Tokenizer
from train import moe_layers

# The lists of words in data/stories/facts.json, and the kinds of token that we tell apart.
LISTS = ["hero", "animal", "colour", "thing", "place", "helper"]
KINDS = ["name", *LISTS[1:], "function word", "other word", "punctuation"]
FUNCTION_WORDS = (
    "a about after all and at but for in into it one so soon that the then there to was without"
).split()


@dataclass
class Config:
    init: str = "part_5/out/gpt.pt"  # checkpoint of part_5/train.py, with its log beside it
    last: int = 100  # training steps at the end whose mean load counts as the final one
    shuffles: int = 20  # how often the kinds are shuffled to estimate the chance level
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script


def kind_of(text, vocabulary):
    """A token's text -> its index in KINDS."""
    word = text.strip()
    for i, name in enumerate(LISTS):
        if word in vocabulary[name]:
            return i
    if word.lower() in FUNCTION_WORDS:
        return KINDS.index("function word")
    if word.isalpha():
        return KINDS.index("other word")
    return KINDS.index("punctuation")


def visit_recorder(top_k, visits):
    """A hook that appends the experts which a router chooses to the list `visits`."""

    def hook(module, inputs, logits):
        # The logits are in the order of the probabilities, so their top_k are the experts.
        visits.append(logits.topk(top_k, dim=-1).indices.cpu())

    return hook


@torch.no_grad()
def route(model, ids):
    """Rows of tokens (N, T) -> for each layer with experts, the experts (N * T, top_k) that the
    tokens visit."""
    layers = moe_layers(model)
    visits = [[] for _ in layers]
    for layer, parts in zip(layers, visits):
        layer.router.register_forward_hook(visit_recorder(layer.top_k, parts))
    for rows in ids.split(64):
        model(rows)
    return [torch.cat(parts) for parts in visits]


def count_visits(kinds, chosen, n_expert):
    """How often each kind went to each expert: kinds (M,), chosen (M, top_k) -> (kinds, E)."""
    cell = kinds[:, None] * n_expert + chosen  # (M, top_k)
    counts = cell.flatten().bincount(minlength=len(KINDS) * n_expert)
    return counts.view(len(KINDS), n_expert).double()


def entropy(counts):
    """The entropy of a distribution given by counts of any shape, in bits."""
    p = counts / counts.sum()
    return torch.special.entr(p).sum().item() / math.log(2)


def information(counts):
    """The mutual information of row and column, I(a; b) = H(a) + H(b) - H(a, b), in bits."""
    return entropy(counts.sum(dim=1)) + entropy(counts.sum(dim=0)) - entropy(counts)


def chance_information(kinds, chosen, n_expert, times):
    """The largest information that `times` random relabellings of the tokens reach, in bits."""
    largest = 0.0
    for _ in range(times):
        shuffled = kinds[torch.randperm(len(kinds))]
        largest = max(largest, information(count_visits(shuffled, chosen, n_expert)))
    return largest


def draw_load(load, title, path):
    """The load of each expert over training. load is (steps, layers, E)."""
    steps, layers, n_expert = load.shape

    # One batch is noisy, so ten in a row are averaged.
    width = min(10, steps)
    means = load[: steps // width * width].unflatten(0, (-1, width)).mean(dim=1)
    middles = [width * (i + 0.5) for i in range(len(means))]

    fig, axes = figure(title, rows=layers, height=1.2 + 1.7 * layers)
    for i, ax in enumerate(np.ravel(axes)):
        even = ax.axhline(1 / n_expert, color="black", linestyle="--")
        curves = ax.plot(middles, means[:, i])
        ax.set(ylabel=f"layer {i + 1}", ylim=(0, 1.05 * means.max()))
    ax.set_xlabel("optimizer step")
    fig.supylabel("share of the layer's visits", fontsize=11)
    labels = [*range(n_expert), "even"]
    fig.legend([*curves, even], labels, title="expert", loc="outside lower center", ncols=9)
    save_figure(fig, path)


def draw_kinds(tables, bits, title, path):
    """A heat map per layer: of each kind's visits, the percentage that each expert gets."""
    fig, axes = figure(title, columns=len(tables), height=4.8)
    for i, ax in enumerate(np.ravel(axes)):
        share = tables[i] / tables[i].sum(dim=1, keepdim=True).clamp(min=1)  # (kinds, E)

        # Experts with the same favourite kind stand side by side.
        order = share.argmax(dim=0).argsort(stable=True)
        share = share[:, order]
        ax.imshow(share, vmin=0, vmax=0.5, cmap="Blues", aspect="auto")
        for row, shares in enumerate(share.tolist()):
            for column, value in enumerate(shares):
                color = "white" if value > 0.3 else "black"
                text = f"{100 * value:.0f}"
                ax.text(column, row, text, ha="center", va="center", size=8, color=color)
        ax.set_title(f"layer {i + 1}: {bits[i]:.2f} bits", fontsize=11)
        ax.set(xlabel="expert", xticks=range(len(order)), xticklabels=order.tolist())
        ax.set_yticks(range(len(KINDS)), KINDS if i == 0 else [])
        ax.grid(False)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    out = output_folder(cfg)

    # model
    path = require(cfg.init)
    checkpoint = load_checkpoint(path, "gpt")
    model = GPT.load(checkpoint).to(device)
    tok = Tokenizer.load(checkpoint["tokenizer"])
    n_expert = model.cfg.n_expert
    if n_expert == 0:
        fail(f"{path} has no experts: train it with --n_expert=8")

    # the load over training, from the log of the run
    records = read_log(path.parent)
    load = torch.tensor([record["load"] for record in records])  # (steps, layers, E)
    first = n_expert * load[:10].mean(dim=0).max().item()
    last = n_expert * load[-cfg.last :].mean(dim=0).max().item()
    title = (
        f"The busiest of {n_expert} experts gets {first:.2f} even shares at first, "
        f"{last:.2f} at the end"
    )
    print(title)
    draw_load(load, title, out / "demo_moe_load.png")

    # the kind of every token of the validation text, and the experts that it visits
    folder = require("data/stories")
    vocabulary = json.loads(read_text(folder / "facts.json"))["vocabulary"]
    kind = torch.tensor([kind_of(tok.decode([i]), vocabulary) for i in range(tok.vocab_size)])
    ids = torch.tensor(tok.encode(read_text(folder / "val.txt")))
    block_size = model.cfg.block_size
    tokens = (len(ids) - 1) // block_size * block_size
    layers = route(model, ids[:tokens].view(-1, block_size).to(device))

    # how much does an expert tell about its token, and about the token after it?
    token_kind = kind[ids[:tokens]]
    next_kind = kind[ids[1 : tokens + 1]]
    tables = [count_visits(token_kind, chosen, n_expert) for chosen in layers]
    bits = [information(table) for table in tables]
    bits_next = [information(count_visits(next_kind, chosen, n_expert)) for chosen in layers]
    chance = max(
        chance_information(token_kind, chosen, n_expert, cfg.shuffles) for chosen in layers
    )
    kind_bits = entropy(tables[0].sum(dim=1))
    for i in range(len(layers)):
        print(
            f"layer {i + 1}: an expert tells {bits[i]:.3f} bits about the kind of its token, "
            f"{bits_next[i]:.3f} about the next one's"
        )
    print(
        f"a kind has {kind_bits:.3f} bits; with kinds shuffled an expert tells {chance:.4f} at most"
    )

    best = bits.index(max(bits))
    title = (
        f"In layer {best + 1} experts tell {bits[best]:.2f} of the {kind_bits:.2f} bits of a kind "
        f"(kinds shuffled: {chance:.3f})"
    )
    draw_kinds(tables, bits, title, out / "demo_moe_kinds.png")
    save_metrics(
        out,
        name="demo_moe",
        max_vio_first=first - 1,
        max_vio_last=last - 1,
        bits=bits,
        bits_next=bits_next,
        bits_shuffled=chance,
        bits_of_kind=kind_bits,
        tokens=tokens,
        experts=n_expert,
        seed=cfg.seed,
    )
