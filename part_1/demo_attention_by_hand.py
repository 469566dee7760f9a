"""
Part 1, attention by hand: which numbers stand between three tokens and the output of one head?

    python part_1/demo_attention_by_hand.py
    python part_1/demo_attention_by_hand.py --tokens="once upon time" --seed=3

Attention is softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1). The scores of later tokens are
set to minus infinity first, so that their weights become 0. Here every step is computed in numpy,
from embeddings and weights that are small round numbers, and is printed and drawn. At the end the
result must agree with model.py, both with attention() and with the whole Attention module.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from model import Attention, GPTConfig, attention, causal_mask
from shared import figure, output_folder, parse_args, save_figure, save_metrics

# The steps whose rows are queries and whose columns are keys. All others have channels as columns.
BY_KEY = ["q k^T: products", "scores: / sqrt(D)", "masked", "exp", "softmax: weights"]


@dataclass
class Config:
    tokens: str = "the cat sat"  # words with spaces between them; each word is a token
    n_embd: int = 4  # C, channels of the stream, and of the one head
    seed: int = 0  # seed of all random numbers
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.tokens.split(), f"tokens={self.tokens!r} must have at least one word"
        assert self.n_embd > 0, f"n_embd={self.n_embd} must be at least 1"
        assert self.seed >= 0, f"seed={self.seed} must not be negative"


class Inputs(NamedTuple):
    """The numbers that everything else is computed from."""

    x: np.ndarray  # (T, C), embeddings: multiples of 1/2 between -1 and 1
    Wq: np.ndarray  # (C, C), the weights of the queries: -1, 0 or 1
    Wk: np.ndarray  # (C, C), the weights of the keys
    Wv: np.ndarray  # (C, C), the weights of the values


def make_inputs(T, C, seed):
    """Random numbers that are short enough to calculate with -> Inputs."""
    generator = np.random.default_rng(seed)
    x = generator.integers(-2, 3, (T, C)) / 2
    Wq = generator.choice([-1.0, 0, 0, 1], (C, C))
    Wk = generator.choice([-1.0, 0, 0, 1], (C, C))
    Wv = generator.choice([-1.0, 0, 0, 1], (C, C))
    return Inputs(x, Wq, Wk, Wv)


def attend_by_hand(inputs):
    """Causal attention with one head -> {name of the step: its matrix}, in order."""
    x = inputs.x
    q = x @ inputs.Wq  # (T, D)
    k = x @ inputs.Wk  # (T, D)
    v = x @ inputs.Wv  # (T, D)

    # Row t compares the query of token t with the keys of all tokens.
    T, D = q.shape
    products = q @ k.T  # (T, T)
    scores = products / np.sqrt(D)

    # Token t may see itself and the tokens before it.
    allowed = np.tri(T, dtype=bool)
    masked = np.where(allowed, scores, -np.inf)

    # Subtracting the largest score of a row changes no weight and keeps exp from overflowing.
    largest = masked.max(axis=1, keepdims=True)
    exponentials = np.exp(masked - largest)
    weights = exponentials / exponentials.sum(axis=1, keepdims=True)
    return {
        "x: embeddings": x,
        "q = x Wq": q,
        "k = x Wk": k,
        "v = x Wv": v,
        "q k^T: products": products,
        "scores: / sqrt(D)": scores,
        "masked": masked,
        "exp": exponentials,
        "softmax: weights": weights,
        "output = weights v": weights @ v,
    }


class Differences(NamedTuple):
    """The largest differences between the calculation by hand and model.py."""

    output: float  # of attention()'s output
    weights: float  # of attention()'s weights
    module: float  # of the Attention module's output


def compare_with_model(inputs, steps):
    """Does model.py give the same numbers? -> Differences"""
    x = torch.from_numpy(inputs.x)[None]  # (1, T, C)
    T, C = inputs.x.shape
    mask = causal_mask(torch.arange(T), torch.arange(T))

    # attention() wants a batch and a head in front: (1, 1, T, D).
    q = torch.from_numpy(steps["q = x Wq"])[None, None]
    k = torch.from_numpy(steps["k = x Wk"])[None, None]
    v = torch.from_numpy(steps["v = x Wv"])[None, None]
    y, weights = attention(q, k, v, mask)

    # A Linear multiplies by the transpose of its weight. The last projection changes nothing here.
    module = Attention(GPTConfig(n_embd=C, n_head=1)).double()
    module.c_q.weight.data = torch.from_numpy(inputs.Wq.T.copy())
    module.c_k.weight.data = torch.from_numpy(inputs.Wk.T.copy())
    module.c_v.weight.data = torch.from_numpy(inputs.Wv.T.copy())
    module.c_proj.weight.data = torch.eye(C, dtype=torch.double)
    module_output = module(x, mask).detach()

    return Differences(
        output=np.abs(y[0, 0].numpy() - steps["output = weights v"]).max().item(),
        weights=np.abs(weights[0, 0].numpy() - steps["softmax: weights"]).max().item(),
        module=np.abs(module_output[0].numpy() - steps["output = weights v"]).max().item(),
    )


def change_last_token(inputs, steps):
    """How far does each token's output move if the last token gets another embedding? -> (T,)"""
    x = inputs.x.copy()
    x[-1] += 1
    changed = attend_by_hand(inputs._replace(x=x))
    return np.abs(changed["output = weights v"] - steps["output = weights v"]).max(axis=1)


def print_matrix(name, matrix, labels):
    print(name)
    for label, row in zip(labels, matrix):
        numbers = "".join(f"{value:9.3f}" for value in row)
        print(f"  {label:8}{numbers}")


def write_number(value):
    """A number that fits into a cell: short ones are exact, the others have two decimals."""
    is_short = value in (round(value, 1), -np.inf)
    return f"{value:.4g}" if is_short else f"{value:.2f}"


def draw_matrix(ax, name, matrix, tokens):
    """A matrix with its numbers in it. What is masked is gray."""
    finite = np.where(np.isfinite(matrix), matrix, np.nan)
    largest = np.nanmax(np.abs(finite)) or 1
    ax.imshow(finite, cmap="RdBu", vmin=-1.6 * largest, vmax=1.6 * largest, aspect="auto")
    for (row, column), value in np.ndenumerate(matrix):
        ax.text(column, row, write_number(value), ha="center", va="center")

    columns = range(matrix.shape[1])
    if name in BY_KEY:
        ax.set_xticks(columns, tokens)
        ax.set_xlabel("key", fontsize=9)
    else:
        ax.set_xticks(columns, [column + 1 for column in columns])
        ax.set_xlabel("channel", fontsize=9)
    ax.set_yticks(range(len(tokens)), tokens)
    ax.set_title(name, fontsize=11)
    ax.set_facecolor("lightgray")
    ax.grid(False)


def draw(title, steps, tokens, path):
    """All steps in order. The embeddings have the first row for themselves."""
    fig, axes = figure(title, rows=4, columns=3, height=9)
    axes[0, 1].axis("off")
    axes[0, 2].axis("off")
    places = [axes[0, 0], *axes[1:].flat]
    for ax, (name, matrix) in zip(places, steps.items()):
        draw_matrix(ax, name, matrix, tokens)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    tokens = cfg.tokens.split()
    out = output_folder(cfg)

    # every number on the way
    inputs = make_inputs(len(tokens), cfg.n_embd, cfg.seed)
    steps = attend_by_hand(inputs)
    for name in ("Wq", "Wk", "Wv"):
        print_matrix(name, getattr(inputs, name), labels=[""] * cfg.n_embd)
    for name, matrix in steps.items():
        print_matrix(name, matrix, labels=tokens)

    # one number of the output as a sum
    weights = steps["softmax: weights"]
    values = steps["v = x Wv"]
    terms = [f"{w:.3f} x {v:g}" for w, v in zip(weights[-1], values[:, 0])]
    total = steps["output = weights v"][-1, 0]
    print(f"\nThe first channel of {tokens[-1]!r}: {' + '.join(terms)} = {total:.3f}")

    # the same numbers from model.py
    differences = compare_with_model(inputs, steps)
    largest = max(differences)
    assert largest < 1e-9, f"attention by hand and in model.py differ by {largest}"
    print(
        f"Largest difference from model.py: output {differences.output:.1e}, "
        f"weights {differences.weights:.1e}, module {differences.module:.1e}"
    )

    # the mask: another last token moves no output but its own
    moved = change_last_token(inputs, steps)
    assert not moved[:-1].any(), f"a later token changed an earlier one by {moved[:-1].max()}"
    listed = ", ".join(f"{token} by {distance:.2f}" for token, distance in zip(tokens, moved))
    print(f"With another last token the outputs change: {listed}")

    # figure and numbers
    favourite = weights[-1].argmax()
    target = "itself" if favourite == len(tokens) - 1 else f'"{tokens[favourite]}"'
    title = (
        f'"{tokens[-1]}" gives {weights[-1, favourite]:.0%} of its attention to {target}; '
        f"model.py agrees within {largest:.0e}"
    )
    draw(title, steps, tokens, out / "demo_attention_by_hand.png")
    save_metrics(
        out,
        name="demo_attention_by_hand",
        tokens=tokens,
        seed=cfg.seed,
        weights=weights,
        output=steps["output = weights v"],
        difference_attention=differences.output,
        difference_weights=differences.weights,
        difference_module=differences.module,
        moved=moved,
    )
