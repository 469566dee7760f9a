"""
Part 4, speedrun: how much faster does our recipe train than nanoGPT's, and what is each change
between the two worth?

    python part_4/demo_speedrun.py
    python part_4/demo_speedrun.py --seeds=3
    python part_4/demo_speedrun.py --data=shakespeare

The start is the recipe that nanoGPT's README gives for a laptop (Karpathy 2022, "I only have a
macbook"): GPT-2's architecture, AdamW, a cosine schedule, batches of 12 rows, and a vocabulary of
single characters, here of bytes. The end is Part 4's model and optimizers. Between them one thing
changes at a time, and each change is measured twice: on top of all changes before it, and alone, on
top of the start. The models are smaller than nanoGPT's, so that all of this takes minutes.

The target is the loss that the start reaches at the end of its budget. The start, the step to Muon
and the end are tuned on the same learning rates, or the comparison would show only the tuning (Wen
et al. 2025). The recipes between them are not tuned again: the others with AdamW have the rate of
the start, the others with Muon that of the step to Muon.

A recipe that learns faster must also let its learning rate fall sooner. So nothing is read off in
the middle of a run. Each recipe is trained with the whole budget, a half, a quarter and so on, or
with twice as much, until one run misses the target and the next one reaches it. The budget that
ends at the target lies between these two. It is counted in rows of text, which makes batches of
different sizes comparable, and it is the same each time for a given seed. The seconds are the steps
times the shortest time of a step, which is measured while all recipes take turns.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import textwrap
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from model import GPT, Attention, GPTConfig
from shared import (
    Log,
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import SPECIAL

N_HEAD = 4  # heads of all models
BYTES = 256 + len(SPECIAL)  # the vocabulary of a tokenizer without merges
SMALLEST_SHARE = 1 / 64  # of the budget, for recipes that are very fast
START = "tuned rate (the start)"
LARGEST_SHARE = 4  # of the budget, for recipes that are slower than the start


@dataclass
class Config:
    data: str = "stories"  # stories (the built-in world), shakespeare (a download) or a text file
    steps: int = 330  # optimizer steps of the start; every recipe may read as many rows as it does
    n_layer: int = 2  # number of blocks
    n_embd: int = 48  # channels of the models
    block_size: int = 32  # tokens per row
    vocab_size: int = 1024  # size of the BPE vocabulary

    # peak learning rates that the start, the step to Muon and the end are tuned on
    rates: str = "0.001,0.003,0.01,0.03,0.1,0.3"

    eval_bytes: int = 15_000  # bytes of the validation text that the losses are measured on
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        even = self.n_embd % (2 * N_HEAD) == 0
        assert even, f"n_embd={self.n_embd} must be divisible by {2 * N_HEAD}"
        assert self.vocab_size > BYTES, (
            f"vocab_size={self.vocab_size} must be above {BYTES}: 256 bytes and special tokens"
        )


# recipes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """All that differs between the two ends. The defaults are nanoGPT's recipe."""

    lr: float = 1e-3  # peak learning rate
    rope: bool = False  # True: rotate queries and keys; False: learn a vector for each position
    rms_norm: bool = False  # True: RMSNorm; False: LayerNorm
    swiglu: bool = False  # True: a gated MLP; False: GELU (of as many parameters)
    separate_head: bool = False  # True: the head is a matrix of its own; False: the embedding's
    qk_norm: bool = False  # True: normalize queries and keys
    zero_init: bool = False  # True: Part 4's initialization; False: GPT-2's
    muon: bool = False  # True: train.py's Muon and AdamW; False: nanoGPT's AdamW
    hold: bool = False  # True: train.py's schedule; False: a cosine
    batch_size: int = 12  # rows per step
    bpe: bool = False  # True: BPE tokens; False: bytes


# The way from nanoGPT to Part 4, after the tuning of the learning rate
CHANGES = {
    "RoPE": {"rope": True},
    "RMSNorm and SwiGLU": {"rms_norm": True, "swiglu": True},
    "separate head": {"separate_head": True},
    "QK-norm": {"qk_norm": True},
    "zero-initialized outputs": {"zero_init": True},
    "Muon": {"muon": True},
    "decay to 0 at the end": {"hold": True},
    f"batch of {train.Config.batch_size}": {"batch_size": train.Config.batch_size},
    "BPE tokens": {"bpe": True},
}


def cumulative_recipes(lr, muon_lr, end_lr):
    """{name: recipe}: nanoGPT's recipe, the start, which is the same with the tuned rate lr, and
    each change on top of all before. Muon and the end have rates of their own."""
    recipe = Recipe(lr=lr)
    recipes = {"nanoGPT's learning rate": Recipe(), START: recipe}
    for name, change in CHANGES.items():
        recipe = replace(recipe, **change)
        if name == "Muon":
            recipe = replace(recipe, lr=muon_lr)
        recipes[f"+ {name}"] = recipe
    recipes[f"+ {name}"] = replace(recipe, lr=end_lr)
    return recipes


def alone_recipes(lr, muon_lr):
    """{name: recipe}: each change alone, on top of the start."""
    recipes = {}
    for name, change in CHANGES.items():
        recipes[name] = replace(Recipe(lr=lr), **change)
    recipes["Muon"] = replace(recipes["Muon"], lr=muon_lr)
    return recipes


# model: GPT-2's units in the place of Part 4's ----------------------------------------------------


class LearnedPositions(nn.Embedding):
    """A token embedding that also adds a learned vector for each position (GPT-2)."""

    def __init__(self, cfg):
        super().__init__(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        nn.init.normal_(self.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)

    def forward(self, idx):
        positions = torch.arange(idx.size(1), device=idx.device)
        return super().forward(idx) + self.wpe(positions)  # (B, T, C)


class UnrotatedAttention(Attention):
    """Part 4's attention without RoPE. It does not pay for rotations that it does not need."""

    def forward(self, x, mask, cos, sin, cache):
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, -1)  # (B, T, H, D)
        k = self.c_k(x).view(B, T, self.n_kv_head, -1)  # (B, T, G, D)
        v = self.c_v(x).view(B, T, self.n_kv_head, -1)  # (B, T, G, D)
        if self.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)

        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H * D)
        return self.c_proj(y)


class GeluMLP(nn.Module):
    """GPT-2's MLP without biases, as nanoGPT has it."""

    def __init__(self, cfg):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=False)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x):
        x = F.gelu(self.c_fc(x))  # (B, T, 4 C)
        return self.c_proj(x)  # (B, T, C)


def initialize_like_gpt2(model):
    """Small random weights, and still smaller ones in the output projections, because all blocks
    add to one residual stream (Radford et al. 2019, section 2.3)."""
    n_outputs = 2 * len(model.h)
    for name, p in model.h.named_parameters():
        if p.ndim < 2:
            continue
        std = 0.02
        if "c_proj" in name:
            std = 0.02 / math.sqrt(n_outputs)
        nn.init.normal_(p, std=std)


def build_model(recipe, gpt_cfg):
    """Part 4's GPT. Where the recipe lacks a change, the older unit takes the newer one's place."""
    cfg = replace(gpt_cfg, qk_norm=recipe.qk_norm, tied=not recipe.separate_head)
    model = GPT(cfg)

    if not recipe.rope:
        model.wte = LearnedPositions(cfg)
        if cfg.tied:
            model.lm_head.weight = model.wte.weight
        for layer, block in enumerate(model.h):
            block.attn = UnrotatedAttention(cfg, layer)

    if not recipe.rms_norm:
        model.ln_f = nn.LayerNorm(cfg.n_embd, bias=False)
        for block in model.h:
            block.ln_1 = nn.LayerNorm(cfg.n_embd, bias=False)
            block.ln_2 = nn.LayerNorm(cfg.n_embd, bias=False)

    if not recipe.swiglu:
        for block in model.h:
            block.mlp = GeluMLP(cfg)

    if not recipe.zero_init:
        initialize_like_gpt2(model)
    return model


# optimizers and schedule --------------------------------------------------------------------------


def build_optimizers(model, recipe):
    """train.py's Muon and AdamW, whose rates keep their proportion, or nanoGPT's single AdamW."""
    if recipe.muon:
        cfg = train.Config()
        cfg = replace(cfg, lr=recipe.lr, lr_adamw=recipe.lr * cfg.lr_adamw / cfg.lr)
        return train.make_optimizers(model, cfg)

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": gains, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99))
    for group in adamw.param_groups:
        group["peak_lr"] = recipe.lr
    return [adamw]


def schedule_scale(step, steps, recipe):
    """The learning rate of a step (0, 1, ...) as a share of its peak."""
    if recipe.hold:
        return train.lr_scale(step, train.Config(steps=steps))

    # nanoGPT warms up for 5 % of its steps, and its cosine ends at a tenth of the peak.
    warmup_steps = 0.05 * steps
    if step + 1 <= warmup_steps:
        return (step + 1) / warmup_steps
    turn = (step - warmup_steps) / max(1.0, steps - warmup_steps)
    cosine = (1 + math.cos(math.pi * max(0.0, turn))) / 2
    return 0.1 + 0.9 * cosine


# training -----------------------------------------------------------------------------------------


def load_texts(cfg, gpt_cfg):
    """The text in bytes and in BPE tokens -> {bpe: train.Data}, for Recipe.bpe."""
    texts = {}
    for bpe in (False, True):
        vocab_size = cfg.vocab_size if bpe else BYTES
        data = train.load_data(train.Config(data=cfg.data), replace(gpt_cfg, vocab_size=vocab_size))

        # A row of so few tokens does not hold a story. So rows start anywhere, in any text.
        starts = torch.arange(len(data.train_ids) - gpt_cfg.block_size)
        texts[bpe] = first_part(data._replace(starts=starts), cfg.eval_bytes)
    return texts


def first_part(data, n_bytes):
    """train.Data whose validation text is cut to whole rows of at most n_bytes bytes."""
    bytes_after = torch.tensor(data.tok.n_bytes)[data.val_ids].cumsum(0)  # up to and with a token
    edges = data.edges[bytes_after[data.edges] <= n_bytes]
    if len(edges) < 2:
        fail(f"--eval_bytes={n_bytes} must hold at least one row of tokens")
    last = edges[-1]
    return data._replace(
        val_ids=data.val_ids[: last + 1],
        edges=edges,
        val_bytes=bytes_after[last].item(),
    )


def unigram_loss(data):
    """What a model reaches that knows only how frequent each token is, in nats per byte."""
    counts = torch.bincount(data.train_ids, minlength=data.tok.vocab_size) + 1  # none is 0
    logp = (counts / counts.sum()).log()
    return -logp[data.val_ids[1:]].sum().item() / data.val_bytes


class Training:
    """A model in training: train.py's loop with any recipe, step by step."""

    def __init__(self, recipe, steps, seed, texts, gpt_cfg, device):
        torch.manual_seed(seed)
        self.recipe = recipe
        self.steps = steps
        self.data = texts[recipe.bpe]
        self.device = device
        cfg = replace(gpt_cfg, vocab_size=self.data.tok.vocab_size)
        self.model = build_model(recipe, cfg).to(device)
        self.optimizers = build_optimizers(self.model, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.cfg = train.Config(batch_size=recipe.batch_size, seed=seed)

    def step(self, step):
        data = self.data
        train.set_lr(self.optimizers, schedule_scale(step, self.steps, self.recipe))
        block_size = self.model.cfg.block_size
        x, y = train.get_batch(data.train_ids, data.starts, step, self.cfg, block_size)
        x, y = x.to(self.device), y.to(self.device)
        train.backward(self.model, x, y, self.cfg, nullcontext, self.scaler)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def loss(self):
        """Nats per byte on the validation text; infinite if the training has diverged."""
        data = self.data
        val = train.evaluate(
            self.model, data.val_ids, data.edges, data.val_bytes, self.device, nullcontext
        )
        return val.loss if math.isfinite(val.loss) else math.inf


class Trainer:
    """Trains recipes with shares of the budget, each combination once."""

    def __init__(self, texts, gpt_cfg, rows, device):
        self.texts = texts
        self.gpt_cfg = gpt_cfg
        self.rows = rows  # the whole budget
        self.device = device
        self.losses = {}  # (recipe, seed, share) -> nats per byte

    def loss(self, recipe, seed, share=1.0):
        """The loss that a recipe reaches with this share of the budget, in nats per byte."""
        key = (recipe, seed, share)
        if key not in self.losses:
            steps = max(1, round(share * self.rows / recipe.batch_size))
            training = Training(recipe, steps, seed, self.texts, self.gpt_cfg, self.device)
            for step in range(steps):
                training.step(step)
            self.losses[key] = training.loss()
        return self.losses[key]

    def tune(self, recipe, rates, seed, share):
        """{rate: loss}: the recipe with each learning rate."""
        losses = {}
        for rate in rates:
            losses[rate] = self.loss(replace(recipe, lr=rate), seed, share)
        return losses

    def time_steps(self, recipes, rounds=20, steps=2):
        """{recipe: seconds per step}. The recipes take turns, so that whatever else the machine
        does slows down all of them. The shortest of all steps was disturbed the least."""
        trainings = {}
        times = {}
        for recipe in recipes:
            trainings[recipe] = Training(
                recipe, rounds * steps, 0, self.texts, self.gpt_cfg, self.device
            )
            times[recipe] = []
        for i in range(rounds):
            for recipe, training in trainings.items():
                for step in range(i * steps, (i + 1) * steps):
                    start = time.time()
                    training.step(step)
                    times[recipe].append(time.time() - start)
        return {recipe: min(seconds) for recipe, seconds in times.items()}


# measuring ----------------------------------------------------------------------------------------


def parse_rates(text):
    """ "0.003,0.001,0.01" -> [0.001, 0.003, 0.01]. Stops with an error if there are less than
    three."""
    rates = set()
    for word in text.split(","):
        digits = word.replace(".", "", 1)
        if not digits.isdigit() or float(word) == 0:
            fail(f"--rates={text} must be positive numbers with commas between them")
        rates.add(float(word))
    if len(rates) < 3:
        fail(f"--rates={text} must have at least three different rates")
    return sorted(rates)


def share_at_target(short, short_loss, long, long_loss, target):
    """The share of the budget between a short run, which misses the target, and a long one, which
    reaches it. The loss is taken to fall evenly with the logarithm of the share."""
    part = 1.0
    if math.isfinite(short_loss):
        part = (short_loss - target) / (short_loss - long_loss)
    return short * (long / short) ** part


def find_share(loss_of, target, first_share=1.0):
    """The share of the budget with which a run ends at the target. loss_of(share) -> loss.

    Halves the share while the target is reached, or doubles it until it is. If it is still not
    reached with LARGEST_SHARE, the answer is infinite; if it is with SMALLEST_SHARE, that one.
    """
    share = first_share
    loss = loss_of(share)
    while loss <= target and share > SMALLEST_SHARE:
        shorter = share / 2
        shorter_loss = loss_of(shorter)
        if shorter_loss > target:
            return share_at_target(shorter, shorter_loss, share, loss, target)
        share, loss = shorter, shorter_loss

    while loss > target and share < LARGEST_SHARE:
        longer = 2 * share
        longer_loss = loss_of(longer)
        if longer_loss <= target:
            return share_at_target(share, loss, longer, longer_loss, target)
        share, loss = longer, longer_loss
    return share if loss <= target else math.inf


def nearest_power(share):
    """The power of two nearest to a share of the budget, from SMALLEST_SHARE to 1."""
    if not math.isfinite(share):
        return 1.0
    return min(1.0, max(SMALLEST_SHARE, 2.0 ** round(math.log2(share))))


class Result(NamedTuple):
    """What was measured of a recipe, one number per seed in each list."""

    budgets: list  # rows that end at the target, as a share of the budget
    steps: list  # the same in optimizer steps
    seconds: list  # the same in seconds
    losses: list  # nats per byte after the whole budget


def summarize(recipe, shares, losses, rows, seconds_per_step):
    """The shares of the budget that end at the target and the losses, per seed -> Result. All seeds
    have the same time per step, so seconds vary between them no more than steps do."""
    steps = [share * rows / recipe.batch_size for share in shares]
    seconds = [count * seconds_per_step for count in steps]
    return Result(shares, steps, seconds, losses)


def as_plain(result):
    """A Result as a dict for JSON, which knows no infinity: a target that was missed is null."""
    plain = {}
    for name, values in result._asdict().items():
        plain[name] = [value if math.isfinite(value) else None for value in values]
    return plain


def overlap(a, b):
    """Do the ranges of two lists of numbers overlap?"""
    return max(min(a), min(b)) <= min(max(a), max(b))


def speed_up(start, result):
    """How many times as fast as the start in seconds: the mean over the seeds, the slowest and the
    fastest."""
    before = mean(start.seconds)
    return (
        before / mean(result.seconds),
        before / max(result.seconds),
        before / min(result.seconds),
    )


def describe_ends(ladder, target, bpe_unigram):
    """What the whole ladder is worth, and with bytes what all but its last step is worth.

    ladder: {name: Result}, bpe_unigram: the loss of knowing only the frequencies of BPE tokens
    """
    start = ladder[START]
    *_, with_bytes, end = ladder.values()
    seeds = len(start.seconds)
    number = "one seed" if seeds == 1 else f"{seeds} seeds"
    sign = "less than " if min(end.budgets) == SMALLEST_SHARE else ""
    sentence = (
        f"To {target:.2f} nats per byte: nanoGPT's recipe, tuned, {mean(start.seconds):.1f} s; "
        f"ours {mean(with_bytes.seconds):.2f} s with bytes, "
        f"{sign}{mean(end.seconds):.2f} s with BPE ({number})"
    )
    if seeds > 1 and overlap(start.seconds, with_bytes.seconds):
        sentence += ": no difference with bytes"
    if bpe_unigram <= target:
        sentence += f". The frequencies of BPE tokens alone give {bpe_unigram:.2f}"
    return sentence + "."


def same_as(start, results):
    """The names of the results that cannot be told from the start, in one sentence. Only several
    seeds can show that. results: {name: Result}

    A difference must show in rows as well as in seconds, because seconds are noisy, and because a
    change of the batch size changes the rows in any case.
    """
    same = []
    for name, result in results.items():
        apart_in_rows = not overlap(start.budgets, result.budgets)
        apart_in_seconds = not overlap(start.seconds, result.seconds)
        if len(start.seconds) > 1 and not (apart_in_rows and apart_in_seconds):
            same.append(name)
    if not same:
        return ""
    return f"Alone no difference: {', '.join(same)}."


def print_table(results, start):
    """A line per recipe: the mean, and in parentheses the range of the seeds."""
    print(f"{'':28} times as fast     in rows  steps  seconds  nats per byte")
    for name, result in results.items():
        factor, slowest, fastest = speed_up(start, result)
        in_rows = mean(start.budgets) / mean(result.budgets)
        print(
            f"{name:28} {factor:5.2f} ({slowest:.2f}-{fastest:.2f}) {in_rows:8.2f} "
            f"{mean(result.steps):6.0f} {mean(result.seconds):8.2f}  {mean(result.losses):.3f} "
            f"({min(result.losses):.3f}-{max(result.losses):.3f})"
        )


# figure -------------------------------------------------------------------------------------------


def draw_speed(ax, results, start):
    """Bars: how many times as fast as the start, in seconds. Diamonds: in rows, whatever a row
    costs. A recipe that never reaches the target has no bar."""
    for y, result in enumerate(results.values()):
        factor, slowest, fastest = speed_up(start, result)
        if factor == 0:
            ax.annotate(f"not reached in {LARGEST_SHARE} budgets", (1, y), va="center", fontsize=9)
            continue

        ax.barh(y, factor - 1, left=1, height=0.6, color="C5", label="in seconds")
        ax.plot([slowest, fastest], [y, y], color="C7", label="range of the seeds")
        in_rows = mean(start.budgets) / mean(result.budgets)
        ax.plot(in_rows, y, "D", color="C3", markersize=5, label="in rows")

        # The search for the budget stops at SMALLEST_SHARE.
        sign = ">" if min(result.budgets) == SMALLEST_SHARE else ""
        right = max(1, in_rows, fastest)
        ax.annotate(
            f"{sign}{factor:.2g}x",
            (right, y),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )

    ax.axvline(1, color="C7", linewidth=1)
    ax.set_xscale("log")
    ticks = [0.5, 1, 2, 4, 8, 16, 32, 64]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlim(0.2, 300)  # the search for the budget has limits; the rest is for the numbers
    ax.set_xlabel("times as fast as the start")


def draw_losses(ax, results):
    """The loss after the whole budget: the mean over the seeds, with its range."""
    for y, result in enumerate(results.values()):
        ax.plot([min(result.losses), max(result.losses)], [y, y], color="C7")
        ax.plot(mean(result.losses), y, "o", color="C0")
    ax.set_xlabel("nats per byte after the whole budget")
    ax.set_yticks(range(len(results)), [])


def draw(title, groups, start, path):
    """A row of panels for each group: how much faster, and the loss after the whole budget.

    groups: {title of the panels: {name of the recipe: Result}}
    """
    fig, axes = figure(title, rows=len(groups), columns=2, height=8.5)
    for (left, right), (name, results) in zip(axes, groups.items()):
        left.set_title(name, fontsize=11)
        draw_speed(left, results, start)
        draw_losses(right, results)
        left.set_yticks(range(len(results)), list(results), fontsize=9)
        for ax in (left, right):
            ax.set_ylim(len(results) - 0.4, -0.6)  # from top to bottom
        right.sharex(axes[0, 1])

    # Each kind of mark stands in the legend once.
    handles, labels = axes[0, 0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles))
    fig.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=3)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    rates = parse_rates(cfg.rates)
    gpt_cfg = GPTConfig(
        block_size=cfg.block_size,
        n_layer=cfg.n_layer,
        n_head=N_HEAD,
        n_kv_head=N_HEAD,  # grouped queries are for generation, not for training
        n_embd=cfg.n_embd,
    )
    texts = load_texts(cfg, gpt_cfg)
    out = output_folder(cfg)
    trainer = Trainer(texts, gpt_cfg, cfg.steps * Recipe().batch_size, device)
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)

    # Tune the start with the whole budget. The two others are faster, so they get a quarter of it.
    grid = {}
    best = {}
    for name, share in ((START, 1.0), ("+ Muon", 0.25), ("+ BPE tokens", 0.25)):
        lr = best.get(START, Recipe().lr)
        recipe = cumulative_recipes(lr, 0.0, 0.0)[name]
        grid[name] = trainer.tune(recipe, rates, cfg.seed, share)
        best[name] = min(grid[name], key=grid[name].get)
        for rate, loss in grid[name].items():
            print(f"{name}, learning rate {rate:g}: {loss:.3f} nats per byte", flush=True)
        if best[name] in (rates[0], rates[-1]):
            print(
                f"{name} is best at the last of its rates, {best[name]:g}: "
                "it is not tuned yet, ask for more --rates"
            )

    start_recipe = Recipe(lr=best[START])
    cumulative = cumulative_recipes(best[START], best["+ Muon"], best["+ BPE tokens"])
    alone = alone_recipes(best[START], best["+ Muon"])
    names = [*cumulative, *alone]

    # The target is what the start reaches at the end of its budget, by the mean over the seeds.
    target = mean(trainer.loss(start_recipe, seed) for seed in seeds)
    print(f"target: {target:.3f} nats per byte")
    unigram = {}
    for bpe, name in ((False, "bytes"), (True, "BPE tokens")):
        unigram[name] = unigram_loss(texts[bpe])
        print(f"knowing only how frequent {name} are: {unigram[name]:.3f} nats per byte")

    # Measure every recipe with every seed. On the ladder a recipe needs about as many rows as the
    # one before it, so the search begins there.
    shares = {}  # recipe -> [the share of the budget that ends at the target, per seed]
    first_shares = [1.0] * cfg.seeds
    log = Log(out, len(cumulative) + len(alone), name="demo_speedrun")
    for i, recipe in enumerate([*cumulative.values(), *alone.values()]):
        if i >= len(cumulative):
            first_shares = [1.0] * cfg.seeds
        shares[recipe] = []
        for seed, first_share in zip(seeds, first_shares):
            loss_of = partial(trainer.loss, recipe, seed)
            shares[recipe].append(find_share(loss_of, target, first_share))
        first_shares = [nearest_power(share) for share in shares[recipe]]
        losses = [trainer.loss(recipe, seed) for seed in seeds]
        log(i, name=names[i], val_loss=mean(losses), budgets=mean(shares[recipe]))

    # The speed of all recipes, and the summary
    seconds_per_step = trainer.time_steps(list(shares))
    results = {}
    for recipe in shares:
        losses = [trainer.loss(recipe, seed) for seed in seeds]
        results[recipe] = summarize(
            recipe, shares[recipe], losses, trainer.rows, seconds_per_step[recipe]
        )
    same_work = [seconds_per_step[Recipe()], seconds_per_step[start_recipe]]
    noise = max(same_work) / min(same_work) - 1
    print(f"the first two recipes do the same work, and their times differ by {noise:.0%}")
    ladder = {name: results[recipe] for name, recipe in cumulative.items()}
    single = {name: results[recipe] for name, recipe in alone.items()}
    start = ladder[START]

    print_table(ladder, start)
    print_table(single, start)
    title = describe_ends(ladder, target, unigram["BPE tokens"])
    title = f"{title} {same_as(start, single)}"
    title = textwrap.fill(title, width=76)
    print(title)
    groups = {"each change on top of those above it": ladder, "each change alone": single}
    draw(title, groups, start, out / "demo_speedrun.png")

    save_metrics(
        out,
        name="demo_speedrun",
        target=target,
        tuned_rate=best,
        val_loss_by_rate=grid,
        unigram_nats_per_byte=unigram,
        noise_of_times=noise,
        ladder={name: as_plain(result) for name, result in ladder.items()},
        alone={name: as_plain(result) for name, result in single.items()},
        seed=cfg.seed,
        seeds=cfg.seeds,
    )
