"""
Part 1 - attention by hand: three tokens, one head, numpy, and every number on the way printed and drawn.

    python part_1/demo_attention_by_hand.py
    python part_1/demo_attention_by_hand.py --tokens="once upon time" --seed=3

Small round numbers stand for embeddings and weights. "Attention Is All You Need", eq. 1: softmax(q k^T / sqrt(D)) v,
with the scores of later tokens at minus infinity, so that their weight is 0. At the end the numbers must be those of
model.py, from attention() and from the whole Attention module, or the script stops.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass

import numpy as np
import torch

from model import Attention, GPTConfig, attention, causal_mask
from shared import cli, figure, need, save_figure, save_metrics, setup

@dataclass
class Config:
    tokens: str = "the cat sat"  # words, each one token
    n_embd: int = 4  # C, channels, and of the one head
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def inputs(T, C, seed):
    """Embeddings x (T, C), halves from -1 to 1, and the weights of q, k, v (C, C), each -1, 0 or 1."""
    g = np.random.default_rng(seed)
    x = g.integers(-2, 3, (T, C)) / 2
    return x, *(g.choice([-1.0, 0, 0, 1], (C, C)) for _ in range(3))

def by_hand(x, Wq, Wk, Wv):
    """Every step of causal attention by name, in order."""
    T, D = len(x), Wk.shape[1]
    step = {"x": x, "q = x Wq": x @ Wq, "k = x Wk": x @ Wk, "v = x Wv": x @ Wv}
    q, k, v = list(step.values())[1:]
    step["q k^T"] = q @ k.T  # (T, T): row t holds the products of token t's question with every key
    step["scores: / sqrt(D)"] = scores = step["q k^T"] / np.sqrt(D)
    step["masked"] = masked = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    step["exp"] = e = np.exp(masked - masked.max(axis=1, keepdims=True))  # less the row's largest: e^0 = 1 at most
    step["softmax"] = weights = e / e.sum(axis=1, keepdims=True)
    step["output"] = weights @ v
    return step

def differences(step, Wq, Wk, Wv):
    """The largest differences between by_hand and model.py: (attention's output, its weights, the module's output)."""
    x, q, k, v = (torch.from_numpy(a)[None, None] for a in list(step.values())[:4])  # (1, 1, T, C): one row, one head
    T, C = x.shape[-2:]
    mask = causal_mask(torch.arange(T), torch.arange(T))
    y, weights = attention(q, k, v, mask)
    module = Attention(GPTConfig(n_embd=C, n_head=1)).double()
    for layer, W in ((module.c_q, Wq), (module.c_k, Wk), (module.c_v, Wv), (module.c_proj, np.eye(C))):
        layer.weight.data = torch.from_numpy(W.T.copy())  # a Linear multiplies by its weight transposed
    found = (y[0, 0], step["output"]), (weights[0, 0], step["softmax"]), (module(x[0], mask)[0], step["output"])
    return [float(np.abs(ours.detach().numpy() - hand).max()) for ours, hand in found]

def draw(step, tokens, said, path):
    """Every matrix with its numbers in it; what is masked is gray."""
    fig, axes = figure(said, rows=4, columns=3, height=9)
    names = list(step)  # x, q, k, v, five tables of query by key, output
    for ax, name in zip(axes.flat, [names[0], None, None, *names[1:]]):
        if name is None:
            ax.axis("off")
            continue
        a = step[name]
        finite = np.where(np.isfinite(a), a, np.nan)
        top = np.nanmax(np.abs(finite)) or 1
        ax.imshow(finite, cmap="RdBu", vmin=-1.6 * top, vmax=1.6 * top, aspect="auto")
        for (row, column), value in np.ndenumerate(a):
            short = value in (round(value, 1), -np.inf)
            ax.text(column, row, f"{value:.4g}" if short else f"{value:.2f}", ha="center", va="center")
        square = name in names[4:-1]
        ax.set_title(name, fontsize=11)
        ax.set(facecolor="lightgray", yticks=range(len(tokens)), yticklabels=tokens)
        ax.set_xticks(range(a.shape[1]), tokens if square else range(1, a.shape[1] + 1))
        ax.set_xlabel("key" if square else "channel", fontsize=9)
        ax.grid(False)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    setup(cfg)
    tokens = cfg.tokens.split()
    need(tokens, "--tokens wants at least one word")
    T = len(tokens)
    x, *W = inputs(T, cfg.n_embd, cfg.seed)
    step = by_hand(x, *W)
    for name, a in {"Wq": W[0], "Wk": W[1], "Wv": W[2], **step}.items():
        print(name)
        for label, row in zip(tokens if name in step else [""] * len(a), a):
            print(f"  {label:8}" + "".join(f"{value:9.3f}" for value in row))

    # the last token's sum, written out
    w, v = step["softmax"], step["v = x Wv"]
    print(f"\n{tokens[-1]}'s first number: " + " + ".join(f"{w[-1, s]:.3f} x {v[s, 0]:g}" for s in range(T))
          + f" = {step['output'][-1, 0]:.3f}")

    # the same numbers from model.py, and what a change of the last token moves
    apart = differences(step, *W)
    need(max(apart) < 1e-9, f"attention by hand and in model.py differ by {max(apart)}")
    other = by_hand(np.vstack([x[:-1], x[-1:] + 1]), *W)
    moved = np.abs(other["output"] - step["output"]).max(axis=1)
    need(moved[:-1].max(initial=0) == 0, "a later token changed an earlier one: the mask leaks")
    print(f"largest difference from model.py: attention {apart[0]:.1e}, weights {apart[1]:.1e}, module {apart[2]:.1e}")
    print("another last token moves: " + ", ".join(f"{t} by {m:.2f}" for t, m in zip(tokens, moved)))
    s = w[-1].argmax()
    source = "itself" if s == T - 1 else f'"{tokens[s]}"'
    said = f'"{tokens[-1]}" gives {w[-1, s]:.0%} of its weight to {source}; model.py agrees within {max(apart):.0e}'
    draw(step, tokens, said, Path(cfg.out) / "demo_attention_by_hand.png")
    save_metrics(cfg, name="demo_attention_by_hand", tokens=tokens, seed=cfg.seed, weights=w, output=step["output"],
                 difference_attention=apart[0], difference_weights=apart[1], difference_module=apart[2], moved=moved)
