"""
Part 5 - what the experts do: how even their load was over the training, and which kinds of token go to which of them.

    python part_5/demo_moe.py

No loss asks an expert to specialise. How far it does is a number: the mutual information of expert and kind of token
in bits (Shannon 1948). At 0 the expert says nothing of the kind. An estimate from counts is a little more even then,
so the same estimate with the kinds shuffled stands beside it.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
from dataclasses import dataclass

import torch

from model import GPT, MoE
from shared import cli, fail, figure, load_checkpoint, read_jsonl, read_text, require, save_figure, save_metrics, setup
from tokenizer import Tokenizer

LISTS = ["hero", "animal", "colour", "thing", "place", "helper"]  # of data/stories/facts.json
KINDS = ["name", *LISTS[1:], "function word", "other word", "punctuation"]
FUNCTION = "a about after all and at but for in into it one so soon that the then there to was without".split()

@dataclass
class Config:
    init: str = "part_5/out/gpt.pt"  # a checkpoint of part_5/train.py
    last: int = 100  # training steps at the end whose load counts as the final one
    shuffles: int = 20  # times that the kinds are shuffled
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def kind_of(text, vocabulary):
    """A token's text -> its index in KINDS."""
    word = text.strip()
    for i, name in enumerate(LISTS):
        if word in vocabulary[name]:
            return i
    if word.lower() in FUNCTION:
        return KINDS.index("function word")
    return KINDS.index("other word" if word.isalpha() else "punctuation")

@torch.no_grad()
def route(model, ids):
    """Rows of tokens (N, T) -> the experts that each token visits, one (N * T, top_k) per layer with experts."""
    chosen, layers = [], [m for m in model.modules() if isinstance(m, MoE)]
    for m in layers:  # logits stand in the order of their softmax
        m.router.register_forward_hook(lambda _, x, logits, k=m.top_k: chosen.append(logits.topk(k, dim=-1).indices))
    for rows in ids.split(64):
        model(rows)
    return [torch.cat(chosen[i::len(layers)]).cpu() for i in range(len(layers))]

def table(kinds, chosen, E):
    """How often each kind went to each expert: kinds (M,), chosen (M, top_k) -> (kinds, E)."""
    cell = kinds[:, None] * E + chosen
    return cell.flatten().bincount(minlength=len(KINDS) * E).view(len(KINDS), E).double()

def entropy(n):
    """Counts of any shape -> bits."""
    return torch.special.entr(n / n.sum()).sum().item() / math.log(2)

def information(n):
    """Counts (A, B) -> I(a; b) = H(a) + H(b) - H(a, b), in bits."""
    return entropy(n.sum(dim=1)) + entropy(n.sum(dim=0)) - entropy(n)

def shuffled(kinds, chosen, E, times):
    """The largest information that `times` random relabellings of the tokens reach."""
    return max(information(table(kinds[torch.randperm(len(kinds))], chosen, E)) for _ in range(times))

def draw_load(load, said, path):
    """load (steps, layers, E): one batch is noisy, so ten in a row are averaged."""
    steps, layers, E = load.shape
    width = min(10, steps)
    lines = load[:steps // width * width].unflatten(0, (-1, width)).mean(dim=1)
    fig, axes = figure(said, rows=layers, height=1.2 + 1.7 * layers)
    for i, ax in enumerate(axes if layers > 1 else [axes]):
        ax.axhline(1 / E, color="black", linestyle="--")
        curves = ax.plot([width * (j + 0.5) for j in range(len(lines))], lines[:, i])
        ax.set(ylabel=f"layer {i + 1}", ylim=(0, 1.05 * lines.max()))
    ax.set_xlabel("training step")
    fig.supylabel("share of the layer's load", fontsize=11)
    fig.legend(curves, range(E), title="expert", loc="outside lower center", ncols=8)
    save_figure(fig, path)

def draw_kinds(tables, bits, said, path):
    """A heat map per layer: of each kind's visits, the percentage that each expert gets."""
    fig, axes = figure(said, columns=len(tables), height=4.8)
    for i, ax in enumerate(axes if len(tables) > 1 else [axes]):
        share = tables[i] / tables[i].sum(dim=1, keepdim=True).clamp(min=1)
        order = share.argmax(dim=0).argsort(stable=True)  # experts with the same favourite kind side by side
        ax.imshow(share[:, order], vmin=0, vmax=0.5, cmap="Blues", aspect="auto")
        for k, row in enumerate(share[:, order].tolist()):
            for e, p in enumerate(row):
                ax.text(e, k, f"{100 * p:.0f}", ha="center", va="center", size=8, color="white" if p > 0.3 else "black")
        ax.set_title(f"layer {i + 1}: {bits[i]:.2f} bits", fontsize=11)
        ax.set(xlabel="expert", xticks=range(len(order)), xticklabels=order.tolist(), yticks=range(len(KINDS)))
        ax.set_yticklabels([] if i else KINDS)
        ax.grid(False)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    path = require(cfg.init)
    checkpoint = load_checkpoint(path, "gpt")
    model, tok = GPT.load(checkpoint).to(device), Tokenizer.load(checkpoint["tokenizer"])
    E = model.cfg.n_expert
    E or fail(f"{path} has no experts: train it with --n_expert=8")

    # load
    load = torch.tensor([r["load"] for r in read_jsonl(path.parent / "log.jsonl", ["step"])])  # (steps, layers, E)
    vio = [(E * part.mean(dim=0).max() - 1).item() for part in (load[:10], load[-cfg.last:])]  # rows of load sum to 1
    said = f"The busiest of {E} experts: {1 + vio[0]:.2f} of an even share at first, {1 + vio[1]:.2f} at the end"
    print(said)
    draw_load(load, said, Path(cfg.out) / "demo_moe_load.png")

    # kinds
    folder, T = require("data/stories"), model.cfg.block_size
    vocabulary = json.loads(read_text(folder / "facts.json"))["vocabulary"]
    kind = torch.tensor([kind_of(tok.decode([i]), vocabulary) for i in range(tok.vocab_size)])
    ids = torch.tensor(tok.encode(read_text(folder / "val.txt")))
    N = (len(ids) - 1) // T
    layers = route(model, ids[:N * T].view(N, T).to(device))
    read, following = kind[ids[:N * T]], kind[ids[1:N * T + 1]]
    tables = [table(read, chosen, E) for chosen in layers]
    bits = [information(n) for n in tables]
    ahead = [information(table(following, chosen, E)) for chosen in layers]
    chance = max(shuffled(read, chosen, E, cfg.shuffles) for chosen in layers)
    whole = entropy(tables[0].sum(dim=1))
    for i in range(len(layers)):
        print(f"layer {i + 1}: an expert tells {bits[i]:.3f} bits of its token's kind, {ahead[i]:.3f} of the next")
    print(f"a kind has {whole:.3f} bits; with kinds shuffled, an expert tells at most {chance:.4f}")
    best = bits.index(max(bits))
    said = f"Layer {best + 1}: experts tell {bits[best]:.2f} of a kind's {whole:.2f} bits; kinds shuffled: {chance:.3f}"
    draw_kinds(tables, bits, said, Path(cfg.out) / "demo_moe_kinds.png")
    save_metrics(cfg, name="demo_moe", max_vio_first=vio[0], max_vio_last=vio[1], bits=bits, bits_next=ahead,
                 bits_shuffled=chance, bits_of_kind=whole, tokens=N * T, experts=E, seed=cfg.seed)
