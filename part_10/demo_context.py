"""
Part 10, the context vector: which way does it go through a story, what does it know, and which
heads does it turn?

    python part_10/demo_context.py                   the model of train_context.py
    python part_10/demo_context.py --seeds=3         and two more, which are trained now
    python part_10/demo_context.py --text="A fox named Mia saw the red hat. Mia was happy."

The model is the one with FiLM and a short window. After each sentence its context vector moves. The
first figure shows the way of three held-out stories in the plane in which the vectors of all
stories differ most (their first two principal components). Beside it: how often a linear readout
finds the hero, the thing and so on in the vector. It is fitted to training stories.

The second figure asks of each head what the vector does to it. The vector of another story takes
the place of the right one in this head alone. How far does its attention move, and how many nats
does the whole model lose?
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

import train_context
from shared import (
    fail,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    read_facts,
    require,
    save_figure,
    save_metrics,
    set_seed,
)
from model import rope_table
from train_context import ContextGPT, load_data, pad, range_text, window_mask

SENTENCES = 7  # of a story: two of the brief, then five
SLOTS = ("hero", "animal", "place", "colour", "thing", "ends")
FIT = 10  # times as many training stories are there to fit the readout
RIDGE = 1e-2  # keeps the readout's weights small


@dataclass
class Config:
    init: str = ""  # checkpoint of train_context.py; empty: part_10/out/context.pt
    samples: int = 200  # held-out stories that are looked at
    text: str = ""  # a text of your own, whose path is drawn, too
    seeds: int = 1  # number of models: that of the checkpoint, and others that are trained now
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.samples > 1, (
            f"samples={self.samples} must be at least 2: contexts are exchanged"
        )
        assert self.seeds > 0, f"seeds={self.seeds} must be at least 1"


# the path of the vector ---------------------------------------------------------------------------


@torch.no_grad()
def story_contexts(model, documents, device):
    """The contexts of stories after each sentence -> (N, SENTENCES + 1, K); before the first one
    the context is 0."""
    contexts = []
    for i in range(0, len(documents), 64):
        x, _ = pad(documents[i : i + 64])
        contexts.append(model.contexts(x.to(device)).cpu()[:, : SENTENCES + 1])
    return torch.cat(contexts)


@torch.no_grad()
def text_contexts(model, text, data, device):
    """The contexts of a text after each sentence -> (S + 1, K)."""
    border = data.tok.special["<|endoftext|>"]
    ids = torch.tensor([[border, *data.tok.encode(text), border]], device=device)
    return model.contexts(ids)[0].cpu()


class Plane(NamedTuple):
    center: torch.Tensor  # (K,)
    axes: torch.Tensor  # (2, K)
    share: float  # share of the variance that lies in the plane


def principal_plane(vectors):
    """The plane in which vectors (N, K) differ most: their first two principal components."""
    center = vectors.mean(dim=0)
    _, singular, axes = torch.linalg.svd(vectors - center, full_matrices=False)
    variance = singular**2
    return Plane(center, axes[:2], (variance[:2].sum() / variance.sum()).item())


def project(vectors, plane):
    """Vectors (..., K) -> their places in the plane (..., 2)."""
    return (vectors - plane.center) @ plane.axes.T


# what the vector knows ----------------------------------------------------------------------------


def slots_of(text, patterns):
    """The hero, the thing and so on of a story, by the patterns of its sentences -> a dict."""
    slots = {}
    for sentence in re.split(r"(?<=[.!?])\s", text):
        for pattern in patterns:
            match = re.fullmatch(pattern["regex"], sentence)
            if match:
                slots.update({name: value for name, value in match.groupdict().items() if value})
                if pattern["end"]:
                    slots["ends"] = pattern["end"]
                break
    return slots


def fit_readout(vectors, labels, n_labels):
    """Linear least squares from vectors (N, K) to the one-hot forms of labels (N,)
    -> weights (K + 1, n_labels)."""
    ones = torch.ones(len(vectors), 1)
    x = torch.cat([vectors, ones], dim=1).double()
    y = F.one_hot(labels, n_labels).double()
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.size(1), dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ y)


def read_out(vectors, weights):
    """The label that a readout finds in vectors (N, K) -> (N,)."""
    ones = torch.ones(len(vectors), 1)
    return (torch.cat([vectors, ones], dim=1).double() @ weights).argmax(dim=1)


def knowledge(model, data, fit_documents, test_documents, device):
    """How often is a slot read out of the vector, after each sentence? -> {slot: shares}"""
    facts = read_facts(require("data/stories") / "facts.json")
    fit = story_contexts(model, fit_documents, device)
    test = story_contexts(model, test_documents, device)
    fit_slots = [
        slots_of(text_of(document, data.tok), facts["patterns"]) for document in fit_documents
    ]
    test_slots = [
        slots_of(text_of(document, data.tok), facts["patterns"]) for document in test_documents
    ]

    shares = {}
    for slot in SLOTS:
        values = facts["vocabulary"][slot]
        fit_labels = torch.tensor([values.index(slots[slot]) for slots in fit_slots])
        test_labels = torch.tensor([values.index(slots[slot]) for slots in test_slots])
        shares[slot] = []
        for s in range(1, SENTENCES + 1):
            weights = fit_readout(fit[:, s], fit_labels, len(values))
            found = read_out(test[:, s], weights) == test_labels
            shares[slot].append(found.float().mean().item())
    return shares


def text_of(document, tok):
    """The text of a document, without the special tokens at its ends."""
    return tok.decode(document.ids[1:-1])


# which heads it turns -----------------------------------------------------------------------------


def head_rows(attn, head):
    """The outputs of attn.film that belong to the query and to the key of a head."""
    width = attn.film.out_features // (attn.n_head + attn.n_kv_head)
    group = head * attn.n_kv_head // attn.n_head
    rows = list(range(head * width, (head + 1) * width))
    first = (attn.n_head + group) * width
    return rows + list(range(first, first + width))


def disturb(model, layers_and_heads, idx, donor):
    """Hooks that give some heads, pairs (layer, head), the contexts of donor. Remove them after
    use."""
    other = model.context_of_tokens(idx, donor)  # (B, T, K)
    hooks = []
    for layer, head in layers_and_heads:
        attn = model.h[layer].attn
        rows = head_rows(attn, head)

        def hook(module, inputs, output, rows=rows):
            output = output.clone()
            output[..., rows] = F.linear(other, module.weight[rows])
            return output

        hooks.append(attn.film.register_forward_hook(hook))
    return hooks


@torch.no_grad()
def attention_weights(model, idx, donor):
    """The attention of all heads, if the contexts of donor turn them and idx enters them
    -> (layers, B, H, T, T). The stream between the layers is that of the undisturbed model."""
    own = model.context_of_tokens(idx, idx)
    other = model.context_of_tokens(idx, donor)
    T = idx.size(1)
    mask = window_mask(T, model.window, idx.device)
    cos, sin = rope_table(
        torch.arange(T, device=idx.device), model.cfg.head_dim, model.cfg.rope_base
    )
    x = model.wte(idx)
    weights = []
    for block in model.h:
        q, k = block.attn.queries_and_keys(block.ln_1(x), other, cos, sin)
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # (B, H, T, D)
        scores = q @ k.transpose(2, 3) / model.cfg.head_dim**0.5  # (B, H, T, T)
        weights.append(scores.masked_fill(~mask, float("-inf")).softmax(dim=-1))
        x = block(x, own, mask, cos, sin)
    return torch.stack(weights)


@torch.no_grad()
def attention_moved(model, documents, device):
    """How far another story's context moves the attention of each head -> (layers, H): the share of
    the attention that goes to other tokens (total variation), the mean over a story's tokens."""
    x, y = pad(documents)
    x = x.to(device)
    own = attention_weights(model, x, x)
    other = attention_weights(model, x, x.roll(1, dims=0))
    moved = (own - other).abs().sum(dim=-1).cpu() / 2  # (layers, B, H, T)

    return moved.transpose(2, 3)[:, in_story(documents, y)].mean(dim=1)


def in_story(documents, y):
    """Where is the next token one of the story, not of its brief and not padding? (B, T) bool"""
    starts = torch.tensor([document.start for document in documents])
    return (torch.arange(y.size(1)) >= starts[:, None] - 1) & (y != -100)


@torch.no_grad()
def nats_if_disturbed(model, documents, layers_and_heads, device):
    """Nats per story if these heads get the context of another story."""
    x, y = pad(documents)
    x = x.to(device)
    hooks = disturb(model, layers_and_heads, x, x.roll(1, dims=0))
    logits = model(x, x).cpu()
    for hook in hooks:
        hook.remove()
    losses = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")  # (B, T)
    return losses[in_story(documents, y)].sum().item() / len(documents)


def nats_lost(model, documents, device):
    """The nats per story that the model loses if one head alone gets another story's context
    -> (layers, H)."""
    undisturbed = nats_if_disturbed(model, documents, [], device)
    lost = torch.zeros(model.cfg.n_layer, model.cfg.n_head)
    for layer in range(model.cfg.n_layer):
        for head in range(model.cfg.n_head):
            disturbed = nats_if_disturbed(model, documents, [(layer, head)], device)
            lost[layer, head] = disturbed - undisturbed
    return lost


# the figures --------------------------------------------------------------------------------------


def draw_path(title, contexts, paths, shares, path):
    """The paths of some texts in the plane of all contexts (N, S, K), and what can be read out of
    the vector after each sentence. paths: {label: contexts of this text (S, K)}"""
    plane = principal_plane(contexts[:, 1:].flatten(0, 1))
    fig, (left, right) = figure(title, columns=2, height=5)
    cloud = project(contexts[:, 1:], plane)  # (N, S - 1, 2)
    left.plot(*cloud.flatten(0, 1).T, ".", color="lightgray", markersize=2, zorder=0)
    for (label, vectors), colour in zip(paths.items(), ("C0", "C1", "C2", "C3")):
        points = project(vectors, plane)
        left.plot(*points.T, "-", color=colour, alpha=0.6, label=label)
        for number, point in enumerate(points.tolist()):
            left.text(
                *point,
                str(number),
                color="white",
                fontsize=8,
                ha="center",
                va="center",
                bbox={"boxstyle": "circle,pad=0.15", "facecolor": colour, "edgecolor": "none"},
            )
    left.set(xlabel="first principal component", ylabel="second principal component")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=9)

    for (slot, values), marker in zip(shares.items(), "os^Dvx"):
        right.plot(range(1, len(values) + 1), values, marker=marker, label=slot)
    right.axvline(2.5, color="gray", linestyle=":")
    right.set(xlabel="sentences so far (two are the brief)", ylim=(0, 1.03))
    right.set_ylabel("share of held-out stories read rightly")
    right.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=9)
    save_figure(fig, path)


def draw_heads(title, moved, lost, path):
    """Two maps, layers by heads, with the numbers written into them."""
    fig, axes = figure(title, "head", columns=2, height=4)
    panels = [("share of its attention that moves", moved), ("nats per story lost", lost)]
    for ax, (name, values) in zip(axes, panels):
        ax.imshow(values, cmap="Blues", vmin=0, vmax=1.3 * values.max().item(), aspect="auto")
        for layer in range(values.size(0)):
            for head in range(values.size(1)):
                rounded = round(values[layer, head].item(), 2) + 0.0  # no "-0.00"
                ax.text(head, layer, f"{rounded:.2f}", ha="center", va="center")
        ax.set_title(name, fontsize=11)
        ax.set_xticks(range(values.size(1)), range(1, values.size(1) + 1))
        ax.set_yticks(range(values.size(0)), range(1, values.size(0) + 1))
        ax.grid(False)
    axes[0].set_ylabel("layer")
    save_figure(fig, path)


def whole_stories(documents, n, data):
    """The first n documents that have all sentences of a story with a brief, to the end."""
    whole = []
    for document in documents:
        ids = torch.tensor(document.ids)
        if data.is_end[ids].sum() == SENTENCES and document.ids[-1] == document.ids[0]:
            whole.append(document)
        if len(whole) == n:
            break
    return whole


def finding_heads(results):
    """The title of the second figure: the heads of which layer are turned most, and how far?"""
    means = sum(result["moved"].mean(dim=1) for result in results)  # (layers,)
    layer = means.argmax().item()
    moved = [value for result in results for value in result["moved"][layer].tolist()]
    single = [result["lost"].max().item() for result in results]
    together = [result["lost_all_heads"] for result in results]
    return (
        f"Another story's context moves {range_text(moved)} of layer {layer + 1}'s attention.\n"
        f"One head with it costs up to {range_text(single)} nats, all heads {range_text(together)}"
    )


def short_name(document, tok, patterns):
    """ "the yellow coat of Nina, a bear", as a label."""
    slots = slots_of(text_of(document, tok), patterns)
    return "{hero}, a {animal}, and the {colour} {thing}".format(**slots)


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    checkpoint = load_checkpoint(cfg.init or require("part_10/out/context.pt"), "context")
    run = train_context.Config(**checkpoint["config"])
    if run.data != "stories":
        fail("this demo reads the slots of the world's stories: use a model that has read them")
    data = load_data(run)
    out = output_folder(cfg)
    patterns = read_facts(require("data/stories") / "facts.json")["patterns"]

    # whole stories, with as many sentences as all others
    documents = whole_stories(data.val, cfg.samples, data)
    fit_documents = whole_stories(data.train, FIT * cfg.samples, data)
    if len(documents) < 2:
        fail("the model has read stories that are cut off: train it with a larger --longest")

    results = []
    for seed in range(run.seed, run.seed + cfg.seeds):
        if seed == run.seed:
            model = ContextGPT.load(checkpoint).to(device)
        else:
            print(f"training another model, with seed {seed}", flush=True)
            set_seed(seed)
            model = train_context.build_model("film", run.window, data, run).to(device)
            train_context.train(model, data, seed, run, device)

        shares = knowledge(model, data, fit_documents, documents, device)
        moved = attention_moved(model, documents, device)
        lost = nats_lost(model, documents, device)
        everything = [(i, j) for i in range(run.n_layer) for j in range(run.n_head)]
        undisturbed = nats_if_disturbed(model, documents, [], device)
        all_heads = nats_if_disturbed(model, documents, everything, device) - undisturbed
        results.append(
            {"read_out": shares, "moved": moved, "lost": lost, "lost_all_heads": all_heads}
        )
        print(f"seed {seed}: nats per story lost by a head with another story's context")
        for layer, row in enumerate(lost.tolist(), start=1):
            print(f"    layer {layer}: " + "  ".join(f"{value:6.2f}" for value in row))

        if seed == run.seed:
            contexts = story_contexts(model, documents, device)
            paths = {}
            for document in documents[:3]:
                paths[short_name(document, data.tok, patterns)] = contexts[len(paths)]
            if cfg.text:
                paths["your text"] = text_contexts(model, cfg.text, data, device)

    # what came out: the readout after the brief and after the whole story, and the heads
    def readings(slot, sentences):
        return range_text([result["read_out"][slot][sentences - 1] for result in results])

    print(f"\n{'read out of the vector':24} {'after the brief':>16} {'after the story':>16}")
    for slot in SLOTS:
        print(f"{slot:24} {readings(slot, 2):>16} {readings(slot, SENTENCES):>16}")
    share = principal_plane(contexts[:, 1:].flatten(0, 1)).share
    read = [f"{slot} {readings(slot, SENTENCES)}" for slot in ("hero", "thing", "place")]
    title = (
        f"The context vector: {share:.0%} of its variance is in this plane.\n"
        f"Read from it after the story: {', '.join(read)}"
    )
    print(title)
    draw_path(title, contexts, paths, results[0]["read_out"], out / "demo_context_path.png")

    title = finding_heads(results)
    print(title)
    draw_heads(title, results[0]["moved"], results[0]["lost"], out / "demo_context_heads.png")
    save_metrics(
        out,
        name="demo_context",
        results=results,
        variance_in_plane=share,
        samples=len(documents),
        seeds=cfg.seeds,
    )
