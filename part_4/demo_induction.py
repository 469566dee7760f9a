"""
Part 4, induction heads: when does a model begin to copy from its brief, and which heads do that?

    python part_4/demo_induction.py
    python part_4/demo_induction.py --seeds=3
    python part_4/demo_induction.py --layers=2,4 --steps=400

A story's brief names the animal, the hero, the thing with its colour and the place, and the story
must take them from there. Nothing else in the text says which name it will be. So the loss at the
first mention of such a word is high, about the logarithm of the number of names, until the model
has learned to look into the brief.

An induction head (Olsson et al. 2022, "In-context Learning and Induction Heads") is one way to do
it. Asked what follows "named", it looks for an earlier "named", attends to the token after that,
and raises that token's logit. It needs two layers: a head in the first tells each token which token
stands before it, and a head in the second searches for that. The demo measures both halves on
random tokens, where there is nothing else to go by:

    prefix matching   the attention to the token after the earlier occurrence of the present token
    copying           how far the head raises the logits of the tokens that it attends to

The brief has a simpler answer, too. It contains only one name, so that a single layer can attend
to whatever is a name. The demo tells the two apart: by random tokens, and by a brief with a second
name in a place where a name never stands.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import itertools
import math
import random
import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import NamedTuple

import torch
import torch.nn.functional as F

import train
from model import GPT, GPTConfig, rope
from shared import (
    Log,
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    read_facts,
    read_text,
    require,
    save_figure,
    save_metrics,
    set_seed,
)

SLOTS = ["animal", "hero", "colour", "thing", "place"]  # what a brief may name

# The kinds of tokens whose losses are measured apart. IGNORED are padding and the brief itself.
COPIED = "named in the brief, first mention"
GUESSED = "not named in the brief, first mention"
REPEATED = "later mentions"
OTHER = "all other tokens of the story"
IGNORED = "ignored"
KINDS = [IGNORED, COPIED, GUESSED, REPEATED, OTHER]

REPEAT = 25  # random tokens in a row, as in the paper
REMOVED = 2  # heads that are taken out together
DRAWS = 6  # random choices of other heads that are taken out for comparison


@dataclass
class Config:
    layers: str = "1,2,3"  # numbers of layers of the models, with commas between them
    steps: int = 400  # optimizer steps of each model
    batch_size: int = 16  # sequences per step
    n_embd: int = 64  # channels of the models
    n_head: int = 4  # attention heads per layer
    eval_every: int = 20  # steps between evaluations
    samples: int = 160  # validation stories with a brief that are evaluated
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script


def parse_layers(text):
    """ "3,1" -> [1, 3]. Stops with an error if these are not numbers of layers."""
    words = text.split(",")
    if not all(word.isdigit() and 1 <= int(word) <= 12 for word in words):
        fail(f"--layers={text} must be numbers from 1 to 12 with commas between them")
    return sorted({int(word) for word in words})


# stories with a brief -----------------------------------------------------------------------------


class Rows(NamedTuple):
    """Stories as rows of tokens, with what a model has to do at each of them."""

    ids: torch.Tensor  # (n, T + 1), padded with 0 on the right
    kind: torch.Tensor  # (n, T), index into KINDS of the token that follows each position
    slot: torch.Tensor  # (n, T), index into SLOTS of the word that it begins; -1: none
    source: torch.Tensor  # (n, T), where the brief names a COPIED token; -1: nowhere


class Mark(NamedTuple):
    """A word of a story that belongs to a slot."""

    start: int  # bytes from the beginning of the document
    kind: str
    slot: str
    source: int  # where the brief has the word, for COPIED; otherwise -1


def briefed(text):
    """The documents that are a brief and its story, without the blank lines between them."""
    found = []
    for document in text.strip().split("\n\n"):
        if document.startswith("Write a story") and "\n" in document:
            found.append(document)
    return found


def mark(document, slot_of):
    """A list of Marks, one for each word of the story that is a key of slot_of, {word: slot}."""
    end_of_brief = document.index("\n")
    named = {}  # slot -> (word, start) of its first mention in the brief
    seen = set()  # slots that the story has mentioned
    marks = []
    for match in re.finditer(r"\w+", document):
        word = match[0]
        slot = slot_of.get(word)
        if slot is None:
            continue
        start = len(document[: match.start()].encode())
        if match.start() < end_of_brief:
            named.setdefault(slot, (word, start))
            continue

        name, source = named.get(slot, (None, -1))
        if slot in seen:
            marks.append(Mark(start, REPEATED, slot, -1))
        elif name == word:
            marks.append(Mark(start, COPIED, slot, source))
        else:
            marks.append(Mark(start, GUESSED, slot, -1))
        seen.add(slot)
    return marks


def make_rows(tok, documents, slot_of, block_size):
    """Documents as rows that start with the blank line before them, as in training -> Rows.

    A word of several tokens counts at its first one, which decides; the others only spell it out.
    """
    before = ".\n\n"
    n = len(documents)
    rows = Rows(
        ids=torch.zeros(n, block_size + 1, dtype=torch.long),
        kind=torch.full((n, block_size), KINDS.index(IGNORED)),
        slot=torch.full((n, block_size), -1),
        source=torch.full((n, block_size), -1),
    )
    for i, document in enumerate(documents):
        ids = tok.encode(before + document + "\n\n")[: block_size + 1]
        rows.ids[i, : len(ids)] = torch.tensor(ids)

        # Position t predicts token t + 1. A token belongs to the story if it ends there.
        ends = torch.tensor(tok.n_bytes)[ids].cumsum(0) - len(before)  # bytes of the document
        in_story = ends > len(document[: document.index("\n") + 1].encode())
        rows.kind[i, : len(ids) - 1][in_story[1:]] = KINDS.index(OTHER)

        # A word begins in the first token that ends after the word's first byte has begun.
        for each in mark(document, slot_of):
            token = int((ends <= each.start).sum())
            if token == len(ids):
                break  # the row ends before this word
            rows.kind[i, token - 1] = KINDS.index(each.kind)
            rows.slot[i, token - 1] = SLOTS.index(each.slot)
            if each.kind == COPIED:
                rows.source[i, token - 1] = int((ends <= each.source).sum())
    return rows


def add_second_names(documents, slot_of, names, generator):
    """Puts another name in the place of the colour in each brief: "a cow named Finn and the Otto
    hammer" -> (the documents that have a colour, and the name that was added to each)."""
    changed = []
    added = []
    for document in documents:
        brief, story = document.split("\n", 1)
        words = re.findall(r"\w+", brief)
        colours = [word for word in words if slot_of.get(word) == "colour"]
        heroes = [word for word in words if slot_of.get(word) == "hero"]
        if not colours or not heroes:
            continue
        other = generator.choice([name for name in names if name != heroes[0]])
        changed.append(brief.replace(f" {colours[0]} ", f" {other} ") + "\n" + story)
        added.append(other)
    return changed, added


# random tokens ------------------------------------------------------------------------------------


def common_tokens(ids, vocab_size):
    """The tokens that occur in ids, without the most and the least frequent tenth of them."""
    counts = ids.bincount(minlength=vocab_size)
    order = counts.argsort()
    order = order[counts[order] > 0]
    tenth = len(order) // 10
    return order[tenth : len(order) - tenth]


def repeated_tokens(tokens, n, first, generator):
    """n rows: the token `first`, REPEAT different random tokens, and the same ones again
    -> (n, 1 + 2 * REPEAT)."""
    rows = []
    for _ in range(n):
        order = torch.randperm(len(tokens), generator=generator)
        chosen = tokens[order[:REPEAT]]
        rows.append(torch.cat([torch.tensor([first]), chosen, chosen]))
    return torch.stack(rows)


# looking into the model ---------------------------------------------------------------------------


class Trace(NamedTuple):
    """A forward pass with what happens inside of it."""

    logits: torch.Tensor  # (B, T, V)
    attention: torch.Tensor  # (n_layer, B, H, T, T), the weights that the fused call hides
    heads: torch.Tensor  # (n_layer, B, H, T, D), what each head gives to the output projection


@torch.no_grad()
def trace(model, idx, replaced=None):
    """The forward pass of a GPT, with the attention weights written out -> Trace. idx (B, T).

    replaced is {(layer, head): vector (D,) or 0}. What these heads give is replaced by that, at
    every position.
    """
    replaced = replaced or {}
    mask, cos, sin = model.positions(idx.size(1), None, idx.device)
    all_weights = []
    all_heads = []
    x = model.wte(idx)  # (B, T, C)
    for layer, block in enumerate(model.h):
        weights, heads = attend(block.attn, block.ln_1(x), mask, cos, sin)
        for (at_layer, head), vector in replaced.items():
            if at_layer == layer:
                heads[:, head] = vector
        all_weights.append(weights)
        all_heads.append(heads)
        x = x + block.attn.c_proj(heads.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    logits = model.lm_head(model.ln_f(x))
    return Trace(logits, torch.stack(all_weights), torch.stack(all_heads))


def attend(attn, x, mask, cos, sin):
    """The first half of Attention.forward, x (B, T, C) -> weights (B, H, T, T) and what each head
    reads with them (B, H, T, D)."""
    B, T, _ = x.shape
    q = attn.c_q(x).view(B, T, attn.n_head, -1)
    k = attn.c_k(x).view(B, T, attn.n_kv_head, -1)
    v = attn.c_v(x).view(B, T, attn.n_kv_head, -1)
    if attn.qk_norm:
        q = attn.q_norm(q)
        k = attn.k_norm(k)
    q = rope(q.transpose(1, 2), cos, sin)  # (B, H, T, D)
    k = rope(k.transpose(1, 2), cos, sin)  # (B, G, T, D)

    # Each key/value head serves H / G query heads.
    served = attn.n_head // attn.n_kv_head
    k = k.repeat_interleave(served, dim=1)  # (B, H, T, D)
    v = v.transpose(1, 2).repeat_interleave(served, dim=1)
    scores = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)  # (B, H, T, T)
    return weights, weights @ v


def head_logits(model, heads):
    """What each head alone adds to the logits, along the direct path: through its part of the
    output projection and the unembedding. heads (n_layer, B, H, T, D) -> (n_layer, B, H, T, V).

    The final norm divides by the length of the whole residual stream. That factor is left out: it
    is positive and the same for all tokens, so that it cancels in the copying score.
    """
    added = []
    for block, of_layer in zip(model.h, heads):
        n_head, D = of_layer.size(1), of_layer.size(3)
        projection = block.attn.c_proj.weight.view(-1, n_head, D)  # (C, H, D)
        added.append(torch.einsum("bhtd,chd->bhtc", of_layer, projection))
    return model.lm_head(torch.stack(added) * model.ln_f.weight)


# scores of heads ----------------------------------------------------------------------------------


def prefix_matching(attention):
    """The score of each head (n_layer, H): the attention of a token in the second copy to the token
    after its first occurrence, "head activation evaluators" in Olsson et al. (2022).

    attention (n_layer, B, H, T, T) is of repeated_tokens. The paper repeats 25 tokens four times;
    two copies are what fits into the context here.
    """
    query = torch.arange(1 + REPEAT, 2 * REPEAT)  # the last token has no successor in the text
    key = query - REPEAT + 1
    return attention[:, :, :, query, key].mean(dim=(1, 3))


def copying(attention, logits, ids):
    """The score of each head (n_layer, H), from -1 to 1: how much of what it adds to the logits
    goes to the tokens that it attends to (Olsson et al. 2022, "head activation evaluators").

    attention (n_layer, B, H, T, T), logits (n_layer, B, H, T, V) of head_logits, and ids (B, T),
    all different. The logits lose their mean, and what is below 0 becomes 0. Then the score
    compares two sums over the tokens of the sample: of all, and weighted with the attention. The
    paper leaves open how the latter is done for attention that is spread over several tokens.
    """
    raised = (logits - logits.mean(dim=-1, keepdim=True)).relu()
    n_layer, B, H, T, _ = logits.shape
    index = ids[None, :, None, None, :].expand(n_layer, B, H, T, T)
    raised = raised.gather(-1, index)  # (n_layer, B, H, T, T): query, token of the sample
    attended = (attention * raised).sum(dim=-1)
    share = attended / raised.sum(dim=-1).clamp_min(1e-9)  # 0 if nothing is raised
    return 2 * share.mean(dim=(1, 3)) - 1


def attention_to_brief(attention, rows):
    """The attention of each head (n_layer, H) from the position before a COPIED token to where the
    brief names it. attention (n_layer, B, H, T, T) is of rows."""
    row, query = (rows.source >= 0).nonzero().T
    key = rows.source[row, query]
    by_head = attention.transpose(1, 2)  # (n_layer, H, B, T, T)
    return by_head[:, :, row, query, key].mean(dim=-1)


# losses -------------------------------------------------------------------------------------------


def token_losses(logits, targets):
    """Logits (B, T, V) and targets (B, T) -> nats (B, T)."""
    return F.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")


def losses_by_kind(losses, rows):
    """The mean of losses (n, T) over the tokens of each kind -> {kind: nats per token}."""
    means = {}
    for i, kind in enumerate(KINDS):
        if kind != IGNORED:
            means[kind] = losses[rows.kind == i].mean().item()
    return means


def losses_by_slot(losses, rows):
    """The mean of losses (n, T) over the COPIED tokens of each slot -> {slot: nats per token}."""
    copied = rows.kind == KINDS.index(COPIED)
    means = {}
    for i, slot in enumerate(SLOTS):
        means[slot] = losses[copied & (rows.slot == i)].mean().item()
    return means


def induction_gain(losses):
    """How much lower the loss is on the second copy of repeated_tokens than on the first, in nats
    per token. losses (B, 2 * REPEAT) of all tokens but the first.

    The first token of the second copy is left out: nothing before it says that a copy begins.
    """
    first = losses[:, 1:REPEAT].mean()
    second = losses[:, REPEAT + 1 :].mean()
    return (first - second).item()


def right_name_share(logits, rows, wrong):
    """With two names in the brief, the probability of the right one as a share of both: 0.5 if the
    model takes any name. logits (n, T, V), wrong (n,) the token of each added name."""
    is_hero = (rows.kind == KINDS.index(COPIED)) & (rows.slot == SLOTS.index("hero"))
    row, position = is_hero.nonzero().T
    right = rows.ids[row, position + 1]
    probabilities = logits[row, position].softmax(dim=-1)
    p_right = probabilities[torch.arange(len(row)), right]
    p_wrong = probabilities[torch.arange(len(row)), wrong[row]]
    return (p_right / (p_right + p_wrong)).mean().item()


# training and measuring ---------------------------------------------------------------------------


class Probes(NamedTuple):
    """What the models are measured on."""

    rows: Rows  # stories with their briefs
    repeats: torch.Tensor  # (B, 1 + 2 * REPEAT), random tokens twice
    words: torch.Tensor  # the same with random words that a brief may name
    named_twice: Rows  # the stories whose brief got a second name
    wrong: torch.Tensor  # (n,), the token of that name
    guess: dict  # {slot: loss of one who knows only which words may stand there}


def make_probes(tok, train_ids, cfg, block_size, device):
    """Builds the Probes from the validation stories and the training text's tokens."""
    folder = require("data/stories")
    vocabulary = read_facts(folder / "facts.json")["vocabulary"]
    slot_of = {}
    for slot in SLOTS:
        for word in vocabulary[slot]:
            slot_of[word] = slot
    documents = briefed(read_text(folder / "val.txt"))[: cfg.samples]
    rows = make_rows(tok, documents, slot_of, block_size)

    generator = random.Random(0)
    changed, added = add_second_names(documents, slot_of, vocabulary["hero"], generator)
    named_twice = make_rows(tok, changed, slot_of, block_size)
    wrong = torch.tensor([tok.encode(" " + name)[0] for name in added])

    first = tok.encode(".\n\n")[0]
    tokens = common_tokens(train_ids, tok.vocab_size)
    tokens = tokens[tokens != first]
    random_order = torch.Generator().manual_seed(0)
    repeats = repeated_tokens(tokens, 32, first, random_order)
    beginnings = sorted({tok.encode(" " + word)[0] for word in slot_of})
    words = repeated_tokens(torch.tensor(beginnings), 32, first, random_order)

    guess = {slot: math.log(len(vocabulary[slot])) for slot in SLOTS}
    rows = Rows(*[tensor.to(device) for tensor in rows])
    named_twice = Rows(*[tensor.to(device) for tensor in named_twice])
    return Probes(rows, repeats.to(device), words.to(device), named_twice, wrong.to(device), guess)


class Point(NamedTuple):
    """A model in the course of its training."""

    step: int  # optimizer steps made
    by_kind: dict  # nats per token
    by_slot: dict  # nats per COPIED token
    gain: float  # nats per token on the second copy of random tokens
    matching: float  # prefix matching of the best head


@torch.no_grad()
def measure(model, step, probes):
    """What a model can do after this number of steps -> Point."""
    logits, _ = model(probes.rows.ids[:, :-1])
    losses = token_losses(logits, probes.rows.ids[:, 1:])
    repeats = trace(model, probes.repeats[:, :-1])
    gain = induction_gain(token_losses(repeats.logits, probes.repeats[:, 1:]))
    return Point(
        step,
        losses_by_kind(losses, probes.rows),
        losses_by_slot(losses, probes.rows),
        gain,
        prefix_matching(repeats.attention).max().item(),
    )


def train_model(data, gpt_cfg, cfg, eval_every, probes, device, log, first_step):
    """Trains a model with train.py's recipe -> the model and a list of Points. cfg is a config of
    train.py."""
    torch.manual_seed(cfg.seed)
    model = GPT(gpt_cfg).to(device)
    optimizers = train.make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    points = []
    for step in range(cfg.steps):
        train.set_lr(optimizers, train.lr_scale(step, cfg))
        x, y = train.get_batch(data.train_ids, data.starts, step, cfg, gpt_cfg.block_size)
        loss = train.backward(model, x.to(device), y.to(device), cfg, nullcontext, scaler)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        values = {}
        if (step + 1) % eval_every == 0 or step + 1 == cfg.steps:
            point = measure(model, step + 1, probes)
            points.append(point)
            values = {"copied": point.by_kind[COPIED], "other": point.by_kind[OTHER]}
        log(first_step + step, layers=gpt_cfg.n_layer, seed=cfg.seed, loss=loss.item(), **values)
    return model, points


def halfway(points, slot, guess):
    """The step at which the loss of a slot falls below half of guessing, or None."""
    for point in points:
        if point.by_slot[slot] < 0.5 * guess:
            return point.step
    return None


def fall_time(points, slot, guess):
    """How many steps the loss of a slot takes from the last evaluation above 80 % of guessing to
    the first one below 20 %, or None if it does not get there."""
    start = 0
    for point in points:
        if point.by_slot[slot] > 0.8 * guess:
            start = point.step
        if point.by_slot[slot] < 0.2 * guess:
            return point.step - start
    return None


class Heads(NamedTuple):
    """The scores of all heads of a model, (n_layer, H) each."""

    brief: torch.Tensor  # attention into the brief
    matching: torch.Tensor  # prefix matching on random tokens
    copying: torch.Tensor  # copying of random tokens
    word_matching: torch.Tensor  # prefix matching on random words that a brief may name
    word_copying: torch.Tensor  # copying of such words


def score_heads(model, probes):
    """The scores of each head -> Heads."""
    stories = trace(model, probes.rows.ids[:, :-1])
    matching = []
    copied = []
    for ids in (probes.repeats, probes.words):
        matching.append(prefix_matching(trace(model, ids).attention))

        # The paper measures copying where nothing is repeated: on the first copy.
        once = ids[:, : 1 + REPEAT]
        single = trace(model, once)
        with torch.no_grad():
            logits = head_logits(model, single.heads)
        copied.append(copying(single.attention, logits, once))
    brief = attention_to_brief(stories.attention, probes.rows)
    return Heads(brief, matching[0], copied[0], matching[1], copied[1])


def best_heads(scores):
    """The REMOVED heads with the highest scores (n_layer, H) -> a list of (layer, head)."""
    order = scores.flatten().argsort(descending=True)[:REMOVED].tolist()
    return [divmod(index, scores.size(1)) for index in order]


def take_out(model, heads, probes, means=None):
    """The losses by kind without these heads. They give 0, or their mean where `means`
    (n_layer, H, D) is given."""
    replaced = {}
    for layer, head in heads:
        replaced[layer, head] = 0 if means is None else means[layer, head]
    logits = trace(model, probes.rows.ids[:, :-1], replaced).logits
    return losses_by_kind(token_losses(logits, probes.rows.ids[:, 1:]), probes.rows)


def ablate(model, scores, probes, generator):
    """What is lost without the best heads, and without others
    -> {name: {kind: rise of the loss in nats per token}}."""
    whole = trace(model, probes.rows.ids[:, :-1])
    inside = probes.rows.kind != KINDS.index(IGNORED)
    by_head = whole.heads.permute(0, 2, 1, 3, 4)  # (n_layer, H, B, T, D)
    means = by_head[:, :, inside].mean(dim=2)  # (n_layer, H, D)
    intact = take_out(model, [], probes)

    # Random pairs of those heads that are not the best readers of the brief
    best = best_heads(scores.brief)
    n_layer, H = scores.brief.shape
    others = [head for head in itertools.product(range(n_layer), range(H)) if head not in best]
    pairs = list(itertools.combinations(others, min(REMOVED, len(others))))
    pairs = generator.sample(pairs, min(DRAWS, len(pairs)))

    rises = {}
    choices = {
        "best in the brief": [best],
        "best at prefix matching": [best_heads(scores.matching)],
        "random others": pairs,
    }
    for name, groups in choices.items():
        for how, replacement in (("0", None), ("mean", means)):
            lost = {kind: [] for kind in intact}
            for heads in groups:
                losses = take_out(model, heads, probes, replacement)
                for kind, loss in losses.items():
                    lost[kind].append(loss - intact[kind])
            rises[f"{name}, {how}"] = {kind: mean(values) for kind, values in lost.items()}
    return rises


# figures ------------------------------------------------------------------------------------------


def draw_training(title, curves, guess, path):
    """Above: the loss at what the brief names, for each number of layers, and at all other tokens.
    Below: the same for each slot, of the first seed.

    curves: {layers: [list of Points per seed]}, guess: {slot: loss of guessing}
    """
    depths = list(curves)
    rows = 1 + math.ceil(len(depths) / 2)
    fig, axes = figure(title, "optimizer step", "nats per token", rows, 2, height=1 + 3.2 * rows)
    axes = axes.flatten()
    for ax, kind in zip(axes, (COPIED, OTHER)):
        for i, depth in enumerate(depths):
            for j, points in enumerate(curves[depth]):
                steps = [point.step for point in points]
                losses = [point.by_kind[kind] for point in points]
                label = layers_name(depth)
                ax.plot(steps, losses, color=f"C{i}", label=label if j == 0 else None)
        ax.set_title(kind, fontsize=11)
        ax.legend(fontsize=9)
        ax.set_ylim(0, 5)
    axes[0].axhline(mean(guess.values()), color="gray", linestyle="--", label="guessing")
    axes[0].legend(fontsize=9)

    for ax, depth in zip(axes[2:], depths):
        points = curves[depth][0]
        for i, slot in enumerate(SLOTS):
            steps = [point.step for point in points]
            ax.plot(steps, [point.by_slot[slot] for point in points], label=slot)
            ax.axhline(guess[slot], color=f"C{i}", linestyle="--", linewidth=0.8)
        ax.set_title(f"each slot, {layers_name(depth)}", fontsize=11)
        ax.set_ylim(0, 5)
        ax.legend(fontsize=9)
    for ax in axes[2 + len(depths) :]:
        ax.set_axis_off()
    save_figure(fig, path)


def draw_heads(title, scores, rises, path):
    """Above: each head's attention into the brief against its other two scores. Below: what the
    loss rises by without the best heads.

    scores: {layers: [Heads per seed]}, rises: {layers: [what ablate returns, per seed]}
    """
    fig, axes = figure(title, rows=2, columns=2, height=8)
    for i, depth in enumerate(scores):
        for heads in scores[depth]:
            brief = heads.brief.flatten()
            label = layers_name(depth) if heads is scores[depth][0] else None
            style = dict(color=f"C{i}", alpha=0.7, label=label)
            axes[0, 0].plot(heads.matching.flatten(), brief, "o", **style)
            axes[0, 1].plot(heads.word_copying.flatten(), brief, "o", **style)
    for ax in axes[0]:
        ax.set(ylim=(0, 1), ylabel="attention into the brief")
        ax.legend(fontsize=9)
    axes[0, 0].set(xlim=(-0.02, 1), xlabel="prefix matching on random tokens")
    axes[0, 1].set(xlim=(-1.05, 1.05), xlabel="copying score on words of the world")

    depths = list(rises)
    names = ["best in the brief", "best at prefix matching", "random others"]
    shown = []
    for runs in rises.values():
        for rise in runs:
            shown.extend(rise[f"{name}, 0"][kind] for name in names for kind in (COPIED, OTHER))
    lowest = min(shown)
    highest = max(shown)
    width = 0.25
    for ax, kind in zip(axes[1], (COPIED, OTHER)):
        for i, name in enumerate(names):
            lost = []
            for depth in depths:
                lost.append([rise[f"{name}, 0"][kind] for rise in rises[depth]])
            places = [j + (i - 1) * width for j in range(len(depths))]
            ax.bar(places, [mean(values) for values in lost], width, color=f"C{i}", label=name)
            low = [min(values) for values in lost]
            high = [max(values) for values in lost]
            ax.vlines(places, low, high, color="black")
        ax.set_title(kind, fontsize=11)
        ax.set_xticks(range(len(depths)), [str(depth) for depth in depths])
        ax.set(xlabel="layers", ylabel=f"rise of the loss without\n{REMOVED} heads, nats per token")
        ax.set_ylim(min(0, lowest), 1.4 * highest)  # room for the legend
        ax.legend(fontsize=9)
    save_figure(fig, path)


def spread(values, digits=2):
    """ "0.52", or with several different values "0.49 to 0.55": their range for a text."""
    # Adding 0 makes "0.00" of "-0.00".
    low = f"{round(min(values), digits) + 0:.{digits}f}"
    high = f"{round(max(values), digits) + 0:.{digits}f}"
    return low if low == high else f"{low} to {high}"


def training_title(curves, guess):
    """How suddenly the slots are copied, and at which steps: a sentence from the numbers."""
    falls = []
    arrivals = []
    missing = 0
    for runs in curves.values():
        for points in runs:
            for slot in SLOTS:
                arrival = halfway(points, slot, guess[slot])
                fall = fall_time(points, slot, guess[slot])
                if arrival is None:
                    missing += 1
                else:
                    arrivals.append(arrival)
                if fall is not None:
                    falls.append(fall)
    if not falls:
        return "No slot of the brief was copied in so few steps"
    sentence = (
        f"Copying arrives slot by slot, between steps {min(arrivals)} and {max(arrivals)}.\n"
        f"Each falls from 80 % to 20 % of guessing in {median(falls):.0f} steps (median)"
    )
    if missing > 0:
        sentence += f"; {missing} of {missing + len(arrivals)} have not arrived"
    return sentence


def heads_title(scores, rises):
    """Which heads copy and whether they are induction heads: sentences from the numbers."""
    best = []
    others = []
    matching = []
    for depth in scores:
        best.append(spread([each["best in the brief, 0"][COPIED] for each in rises[depth]], 1))
        others.append(spread([each["random others, 0"][COPIED] for each in rises[depth]], 1))
        matching.extend(heads.matching.max().item() for heads in scores[depth])
    layers = ", ".join(str(depth) for depth in scores)
    return (
        f"Models of {layers} layers: without the {REMOVED} heads that read the brief\n"
        f"copying costs {', '.join(best)} nats more,\n"
        f"without {REMOVED} others {', '.join(others)}.\n"
        f"Prefix matching on random tokens is at most {max(matching):.2f} of 1"
    )


def layers_name(depth):
    return "1 layer" if depth == 1 else f"{depth} layers"


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    depths = parse_layers(cfg.layers)
    # With 1024 tokens each name is one token. QK-norm gives a query and a key the length sqrt(D) at
    # first, so a score q k / sqrt(D) is at most sqrt(D). With D = 32 that is enough to attend
    # sharply.
    gpt_cfg = GPTConfig(
        vocab_size=1024,
        block_size=72,
        n_head=cfg.n_head,
        n_kv_head=1,
        n_embd=cfg.n_embd,
        head_dim=32,
    )
    recipe = train.Config(steps=cfg.steps, batch_size=cfg.batch_size)
    data = train.load_data(recipe, gpt_cfg)
    probes = make_probes(data.tok, data.train_ids, cfg, gpt_cfg.block_size, device)
    out = output_folder(cfg)

    # Train a model of each depth with each seed, and look at its heads.
    curves = {depth: [] for depth in depths}
    scores = {depth: [] for depth in depths}
    rises = {depth: [] for depth in depths}
    names = {depth: [] for depth in depths}
    runs = list(itertools.product(range(cfg.seeds), depths))
    log = Log(out, len(runs) * cfg.steps, name="demo_induction")
    for i, (j, depth) in enumerate(runs):
        run_cfg = replace(recipe, seed=cfg.seed + j)
        run_gpt_cfg = replace(gpt_cfg, n_layer=depth)
        model, points = train_model(
            data, run_gpt_cfg, run_cfg, cfg.eval_every, probes, device, log, i * cfg.steps
        )
        heads = score_heads(model, probes)
        curves[depth].append(points)
        scores[depth].append(heads)
        rises[depth].append(ablate(model, heads, probes, random.Random(j)))
        logits = trace(model, probes.named_twice.ids[:, :-1]).logits
        names[depth].append(right_name_share(logits, probes.named_twice, probes.wrong))

    # What came out, as a table
    print(f"guessing costs {mean(probes.guess.values()):.2f} nats per token that the brief names")
    for depth in depths:
        last = [points[-1] for points in curves[depth]]
        print(layers_name(depth))
        for kind in KINDS:
            if kind != IGNORED:
                print(f"    {kind:40} {spread([point.by_kind[kind] for point in last])}")
        print(f"    {'random tokens, gain on the second copy':40} {spread([p.gain for p in last])}")
        print(f"    {'best prefix matching':40} {spread([p.matching for p in last])}")
        for name in ("copying", "word_matching", "word_copying"):
            best = [getattr(heads, name).max().item() for heads in scores[depth]]
            print(f"    {f'best {name}':40} {spread(best)}")
        print(f"    {'right name, if the brief has two':40} {spread(names[depth])}")
        for name in rises[depth][0]:
            copied = spread([rise[name][COPIED] for rise in rises[depth]])
            other = spread([rise[name][OTHER] for rise in rises[depth]])
            print(f"    without {name:32} {copied} at copied tokens, {other} at others")
        for slot in SLOTS:
            steps = [halfway(points, slot, probes.guess[slot]) for points in curves[depth]]
            print(f"    {slot} below half of guessing at step {steps}")

    title = training_title(curves, probes.guess)
    print(title)
    draw_training(title, curves, probes.guess, out / "demo_induction.png")
    title = heads_title(scores, rises)
    print(title)
    draw_heads(title, scores, rises, out / "demo_induction_heads.png")

    arrivals = {}
    for depth in depths:
        arrivals[depth] = []
        for points in curves[depth]:
            of_run = {slot: halfway(points, slot, probes.guess[slot]) for slot in SLOTS}
            arrivals[depth].append(of_run)
    save_metrics(
        out,
        name="demo_induction",
        curves={n: [[p._asdict() for p in points] for points in curves[n]] for n in depths},
        arrivals=arrivals,
        scores={n: [heads._asdict() for heads in scores[n]] for n in depths},
        rises=rises,
        right_name_share=names,
        guess=probes.guess,
        seed=cfg.seed,
        seeds=cfg.seeds,
    )
