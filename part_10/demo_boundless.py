"""
Part 10, BoundlessBPE: what do merges across words buy, in bytes per token, in the balance of the
vocabulary, and in the loss of a language model at equal compute?

    python part_10/demo_boundless.py
    python part_10/demo_boundless.py --seeds=3
    python part_10/demo_boundless.py --data=shakespeare --vocab_size=4096

Starts here. Takes from part_4/demo_bpe.py: draw_boxes; from part_4/train.py: lr_scale.

Three tokenizers learn from the same text: plain BPE, BoundlessBPE, and BoundlessBPE with deletions.
For a growing vocabulary the demo measures, on held-out text, the bytes per token and the Renyi
efficiency, which says how evenly the tokens of the vocabulary are used. The paper claims that both
grow (Schmidt et al. 2025, arXiv 2504.00178).

Then one small language model is trained on the tokens of each of the first two. Both get the same
number of floating point operations (FLOPs), and are compared in nats per byte of held-out text. A
token costs about the same whatever it stands for, so the model with the longer tokens reads more
text for the same FLOPs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import time
from collections import Counter
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

import torch

from boundless import (
    Tokenizer,
    bytes_per_token,
    load_texts,
    superwords_by_use,
)
from model import GPT, GPTConfig
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

# The sizes of the vocabulary that are compared, as shares of --vocab_size
SHARES = [1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1, 3 / 2, 2]
SMALLEST = 320  # below this there are hardly any merges

LINE = 70  # letters of the text that is drawn

BPE, BOUNDLESS, DELETIONS = "BPE", "BoundlessBPE", "BoundlessBPE with deletions"
BOX_COLOURS = ["#9CC9E8", "#F6CF86", "#9FDCC3", "#EFB38F", "#E5C3D8"]


@dataclass
class Config:
    # text and tokenizers
    data: str = "stories"  # stories (the built-in world), shakespeare (a download) or a text file

    # the vocabulary of the language models; the curves go from an eighth of it to twice as many
    vocab_size: int = 1024

    # deletions: delete a token when one merge uses up at least this share of its occurrences
    delete_at: float = 0.9

    # the text that is drawn as tokens; empty: a line of the held-out text with two superwords
    text: str = ""

    # language models
    steps: int = 300  # optimizer steps with BPE; BoundlessBPE gets the same number of FLOPs
    batch_size: int = 16  # rows per step
    row: int = 256  # bytes of text in a row
    n_layer: int = 2  # number of blocks
    n_embd: int = 128  # channels of the models
    lr: float = 2e-3  # largest learning rate of AdamW
    # run
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.vocab_size >= SMALLEST, (
            f"vocab_size={self.vocab_size} must be at least {SMALLEST}"
        )
        assert self.delete_at > 0, f"delete_at={self.delete_at} must be above 0"
        assert self.n_embd % 8 == 0, (
            f"n_embd={self.n_embd} must be divisible by 8: four heads with pairs of channels"
        )


# tokenizers ---------------------------------------------------------------------------------------


def cut(tok, vocab_size):
    """The tokenizer that the same training gives if it stops earlier. An event never changes those
    before it, so the first ones are all it takes."""
    size = 256 + len(tok.special)
    for index, event in enumerate(tok.events):
        # The deletions that follow a merge belong to it.
        if event.kind == "delete":
            size -= 1
            continue
        if size == vocab_size:
            return Tokenizer(tok.events[:index], list(tok.special))
        size += 1
    return tok


def sizes_of(vocab_size):
    """The sizes of the vocabulary to compare, from an eighth of vocab_size to its double."""
    sizes = [round(share * vocab_size) for share in SHARES]
    return [size for size in sizes if size >= SMALLEST]


def renyi_efficiency(ids, vocab_size, alpha=2.5):
    """How evenly the tokens of a text use the vocabulary: from 0 (all tokens are the same) to 1
    (all tokens of the vocabulary occur equally often).

    It is the Renyi entropy of the tokens' shares p, ln(sum_i p_i^alpha) / (1 - alpha), divided by
    its largest possible value, ln V (Zouhar et al. 2023, eq. 12). With alpha = 2.5, as there, the
    most frequent tokens decide.
    """
    counts = torch.tensor(list(Counter(ids).values()), dtype=torch.float64)
    p = counts / counts.sum()
    entropy = p.pow(alpha).sum().log() / (1 - alpha)
    return entropy.item() / math.log(vocab_size)


def heaviest_tokens(tok, ids, alpha=2.5, n=3):
    """The tokens that weigh most in the sum of p^alpha -> [(token, its share of the sum)]."""
    weights = {i: count**alpha for i, count in Counter(ids).items()}
    total = sum(weights.values())
    heaviest = sorted(weights, key=weights.get, reverse=True)[:n]
    return [(repr(tok.decode([i])), weights[i] / total) for i in heaviest]


class Curve(NamedTuple):
    """One tokenizer at growing sizes of the vocabulary, measured on held-out text."""

    sizes: list  # what the vocabulary really has; a small text may give less than was asked for
    bytes_per_token: list
    renyi: list


def measure_curve(tok, sizes, text):
    """The tokenizer, cut to each of these sizes, on a text -> Curve."""
    curve = Curve([], [], [])
    n_bytes = len(text.encode("utf-8"))
    for size in sizes:
        smaller = cut(tok, size)
        ids = smaller.encode(text)
        curve.sizes.append(smaller.vocab_size)
        curve.bytes_per_token.append(n_bytes / len(ids))
        curve.renyi.append(renyi_efficiency(ids, smaller.vocab_size))
    return curve


def gains(of, over):
    """By what share the values of one list are above those of another -> a list."""
    return [a / b - 1 for a, b in zip(of, over)]


def line_with_superwords(tok, text):
    """The first line of 40 to LINE letters in which two tokens are superwords. If there is none, it
    is the beginning of the text."""
    for line in text.split("\n"):
        if 40 <= len(line) <= LINE:
            tokens = [tok.token_bytes(i) for i in tok.encode(line)]
            if sum(token in tok.superwords for token in tokens) >= 2:
                return line
    return text[:LINE]


# language models ----------------------------------------------------------------------------------


def lr_scale(step, steps):
    """The learning rate of a step (0, 1, ...) as a share of its peak: it rises over the first tenth
    of the steps, holds, and falls linearly to 0 over the last half."""
    rise = (step + 1) / max(1.0, 0.1 * steps)
    fall = (steps - step) / max(1.0, 0.5 * steps)
    return min(1.0, rise, fall)


def get_batch(ids, T, batch_size, seed, step):
    """Inputs (batch_size, T), which start at any token, and targets, the same text shifted by one.
    They depend on the seed and the step alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(ids) - T, (batch_size, 1), generator=generator)
    window = ids[starts + torch.arange(T + 1)]  # (batch_size, T + 1)
    return window[:, :-1], window[:, 1:]


@torch.no_grad()
def nats_per_byte(model, ids, T, n_bytes, device):
    """The loss on a whole text (N tokens), which is read in rows of T tokens. n_bytes (V,) are the
    bytes of each token."""
    n_rows = (len(ids) - 1) // T
    x = ids[: n_rows * T].view(n_rows, T)
    y = ids[1 : n_rows * T + 1].view(n_rows, T)
    nats = 0.0
    for i in range(0, n_rows, 32):
        _, loss = model(x[i : i + 32].to(device), y[i : i + 32].to(device))
        nats += loss.item() * y[i : i + 32].numel()
    return nats / n_bytes[y].sum().item()


def step_flops(model, batch_size):
    """The floating point operations of a forward and a backward pass over batch_size rows of
    block_size tokens, in units of 10^12 (Chowdhery et al. 2022, appendix B).

    Each weight of a matrix costs 6 per token: a multiplication and an addition forward, and twice
    as much backward. Queries times keys, and weights times values, cost 12 T per token and channel
    in each layer. The embedding is looked up and costs nothing.
    """
    cfg = model.cfg
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    weights -= model.wte.weight.numel()
    channels = cfg.n_head * cfg.head_dim
    per_token = 6 * weights + 12 * cfg.n_layer * channels * cfg.block_size
    return per_token * batch_size * cfg.block_size / 1e12


class Tokens(NamedTuple):
    """What a language model reads."""

    train_ids: torch.Tensor  # (N,)
    val_ids: torch.Tensor  # (M,)
    T: int  # tokens in a row


class Run(NamedTuple):
    """One training of a language model."""

    flops: list  # spent up to and including each step, in units of 10^12
    losses: list  # of the training batches, in nats per byte
    val_loss: float  # on the held-out text, in nats per byte
    bytes_read: int
    seconds: float


def train_model(cfg, seed, tok, tokens, budget, device, out):
    """Trains a model on Tokens for `budget` * 10^12 FLOPs, or for cfg.steps steps if the budget is
    0 -> Run."""
    train_ids, val_ids, T = tokens
    n_bytes = torch.tensor(tok.n_bytes)
    torch.manual_seed(seed)
    gpt_cfg = GPTConfig(tok.vocab_size, T, n_layer=cfg.n_layer, n_embd=cfg.n_embd)
    model = GPT(gpt_cfg).to(device)

    # A step costs the same every time, so its cost tells how many fit into the budget.
    flops = step_flops(model, cfg.batch_size)
    steps = cfg.steps
    if budget > 0:
        steps = max(1, round(budget / flops))

    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    spent = []
    losses = []
    bytes_read = 0
    log = Log(out, steps, name="demo_boundless")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * lr_scale(step, steps)

        x, y = get_batch(train_ids, T, cfg.batch_size, seed, step)
        _, loss = model(x.to(device), y.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # The loss is a mean over tokens. Their bytes turn it into nats per byte.
        batch_bytes = n_bytes[y].sum().item()
        bytes_read += batch_bytes
        spent.append(flops * (step + 1))
        losses.append(loss.item() * y.numel() / batch_bytes)
        log(step, seed=seed, loss=loss.item(), nats_per_byte=losses[-1])
    seconds = log.seconds

    val_loss = nats_per_byte(model, val_ids, T, n_bytes, device)
    return Run(spent, losses, val_loss, bytes_read, seconds)


# figures ------------------------------------------------------------------------------------------


def draw_boxes(ax, tokenizers, text):
    """The text once for each tokenizer, in a row of its own with one coloured box per token."""
    for row, (name, tok) in enumerate(tokenizers.items()):
        left = 0
        for i, token_id in enumerate(tok.encode(text)):
            letters = tok.token_bytes(token_id).decode("utf-8", errors="replace")
            colour = BOX_COLOURS[i % len(BOX_COLOURS)]
            ax.barh(-row, len(letters), left=left, height=0.8, color=colour, edgecolor="white")
            for j, letter in enumerate(letters):
                shown = "\u21b5" if letter == "\n" else letter
                ax.text(left + j + 0.5, -row, shown, ha="center", va="center", family="monospace")
            left += len(letters)
    ax.set_yticks([-row for row in range(len(tokenizers))], list(tokenizers))
    ax.set(xticks=[], xlim=(0, left), xlabel="one box is one token")
    ax.tick_params(length=0)
    ax.grid(False)


def draw_tokens(title, compared, line, curves, path):
    """Above: a line of text as tokens. In the middle: bytes per token over the vocabulary. Below:
    by how many per cent both measures differ from those of BPE.

    compared: {name: Tokenizer}. curves: {name: Curve}.
    """
    fig, (above, middle, below) = figure(title, rows=3, height=8)
    draw_boxes(above, compared, line)

    for marker, (name, curve) in zip("os^", curves.items()):
        middle.plot(curve.sizes, curve.bytes_per_token, f"{marker}-", label=name)
    middle.set(ylabel="bytes per token")
    middle.legend()

    plain = curves[BPE]
    for i, style, name in ((1, "s", BOUNDLESS), (2, "^", DELETIONS)):
        curve = curves[name]
        rate_gain = [100 * gain for gain in gains(curve.bytes_per_token, plain.bytes_per_token)]
        renyi_gain = [100 * gain for gain in gains(curve.renyi, plain.renyi)]
        below.plot(curve.sizes, rate_gain, f"{style}-", color=f"C{i}")
        below.plot(curve.sizes, renyi_gain, f"{style}:", color=f"C{i}")
    below.plot([], [], "k-", label="bytes per token")
    below.plot([], [], "k:", label="Renyi efficiency")
    below.axhline(0, color="C0")
    below.set(ylabel="difference from BPE (%)")
    below.legend()

    for ax in (middle, below):
        ax.set_xscale("log", base=2)
        ax.set_xticks(curve.sizes, curve.sizes)
        ax.minorticks_off()
        ax.set(xlabel="vocabulary (tokens)")
    save_figure(fig, path)


def tokens_title(rate_gain, renyi_gain, vocab_size):
    """What the tokenizers' figure says: the gains of BoundlessBPE over BPE, as shares."""
    rate_word = "more" if rate_gain > 0 else "fewer"
    renyi_word = "higher" if renyi_gain > 0 else "lower"
    return (
        f"Vocabulary {vocab_size}, held-out text: a token of BoundlessBPE holds "
        f"{abs(rate_gain):.1%} {rate_word}\nbytes than one of BPE, and the Renyi efficiency is "
        f"{abs(renyi_gain):.1%} {renyi_word}"
    )


def draw_losses(title, runs, path):
    """Training losses over the compute spent, and at its end the loss on held-out text.
    runs: {tokenizer's name: [Run of each seed]}."""
    fig, ax = figure(title, "training compute (10^12 FLOPs)", "nats per byte")
    lowest = min(run.val_loss for of_seeds in runs.values() for run in of_seeds)
    for i, (name, of_seeds) in enumerate(runs.items()):
        for run in of_seeds:
            # One batch is noisy: draw means of ten steps.
            flops = []
            losses = []
            for start in range(0, len(run.losses), 10):
                flops.append(mean(run.flops[start : start + 10]))
                losses.append(mean(run.losses[start : start + 10]))
            label = f"{name}, training batches" if run is of_seeds[0] else None
            ax.plot(flops, losses, color=f"C{i}", alpha=0.6, label=label)
            label = f"{name}, held-out text" if run is of_seeds[0] else None
            ax.plot(run.flops[-1], run.val_loss, "Do"[i], color=f"C{i}", label=label)

    # The first steps would hide the rest: leave out what is far above the end.
    ax.set_ylim(top=min(ax.get_ylim()[1], 2.5 * lowest))
    fig.legend(loc="outside lower center", ncols=2)
    save_figure(fig, path)


def losses_title(bpe_losses, boundless_losses, vocab_size):
    """What may be said of two lists of losses, one per seed. Where their ranges overlap, there is
    no winner."""
    if len(bpe_losses) == 1:
        finding = "one seed"
    elif max(boundless_losses) < min(bpe_losses):
        finding = "BoundlessBPE is better"
    elif max(bpe_losses) < min(boundless_losses):
        finding = "BPE is better"
    else:
        finding = "no difference"
    return (
        f"Language models at equal FLOPs, vocabulary {vocab_size}: {finding}\n"
        f"nats per byte of held-out text: BPE {mean(bpe_losses):.3f}, "
        f"BoundlessBPE {mean(boundless_losses):.3f}"
    )


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    train_text, val_text = load_texts(cfg.data)

    # One training of the largest tokenizer of each kind gives all the smaller ones.
    sizes = sizes_of(cfg.vocab_size)
    start = time.process_time()
    largest = {
        BPE: Tokenizer.train(train_text, sizes[-1], supermerges=False),
        BOUNDLESS: Tokenizer.train(train_text, sizes[-1]),
        DELETIONS: Tokenizer.train(train_text, sizes[-1], delete_at=cfg.delete_at),
    }
    tokenizer_seconds = time.process_time() - start
    if not largest[BOUNDLESS].superwords:
        fail(f"--data={cfg.data}: no two words stand side by side twice, use a longer text")
    compared = {name: cut(largest[name], cfg.vocab_size) for name in (BPE, BOUNDLESS)}
    boundless = compared[BOUNDLESS]

    # the tokens that the language models read
    texts = {}
    for name, tok in compared.items():
        T = max(1, round(cfg.row / bytes_per_token(tok, train_text)))  # tokens in a row
        train_ids = torch.tensor(tok.encode(train_text))
        val_ids = torch.tensor(tok.encode(val_text))
        if min(len(train_ids), len(val_ids)) <= T:
            fail(f"--data={cfg.data} is too short for rows of --row={cfg.row} bytes")
        texts[name] = Tokens(train_ids, val_ids, T)
    out = output_folder(cfg)

    # bytes per token and Renyi efficiency over the vocabulary
    curves = {name: measure_curve(tok, sizes, val_text) for name, tok in largest.items()}
    rate_gains = {}
    renyi_gains = {}
    for name in (BOUNDLESS, DELETIONS):
        rate_gains[name] = gains(curves[name].bytes_per_token, curves[BPE].bytes_per_token)
        renyi_gains[name] = gains(curves[name].renyi, curves[BPE].renyi)
    print("held-out text   bytes per token           Renyi efficiency")
    print("vocabulary    BPE  Boundless   gain    BPE  Boundless   gain   gains with deletions")
    for i, size in enumerate(sizes):
        plain = curves[BPE]
        joined = curves[BOUNDLESS]
        print(
            f"{size:10} {plain.bytes_per_token[i]:6.3f} {joined.bytes_per_token[i]:10.3f} "
            f"{rate_gains[BOUNDLESS][i]:+6.1%} {plain.renyi[i]:6.3f} {joined.renyi[i]:10.3f} "
            f"{renyi_gains[BOUNDLESS][i]:+6.1%} {rate_gains[DELETIONS][i]:+10.1%} "
            f"{renyi_gains[DELETIONS][i]:+6.1%}"
        )

    if curves[BPE].sizes[-1] < sizes[-1]:
        print(f"BPE ends at {curves[BPE].sizes[-1]} tokens: no pair inside of words occurs twice")

    # which phrases it finds, and which tokens decide the Renyi efficiency
    first = [(e.left + e.right).decode() for e in boundless.events if e.kind == "supermerge"]
    longest = sorted(first, key=len, reverse=True)
    by_use = superwords_by_use(boundless, val_text)
    print(f"{len(first)} superwords among {boundless.vocab_size} tokens")
    print("the first:", *[repr(superword) for superword in first[:8]])
    print("the longest:", *[repr(superword) for superword in longest[:4]])
    print("the most frequent in held-out text:", *[f"{s!r} {n}" for s, n in by_use[:8]])
    heaviest = {}
    for name, tok in compared.items():
        heaviest[name] = heaviest_tokens(tok, texts[name].val_ids.tolist())
        shares = ", ".join(f"{token} {share:.2f}" for token, share in heaviest[name])
        print(f"{name}: shares in the sum that makes the Renyi efficiency: {shares}")

    at = sizes.index(cfg.vocab_size)
    title = tokens_title(rate_gains[BOUNDLESS][at], renyi_gains[BOUNDLESS][at], cfg.vocab_size)
    print(title)
    line = cfg.text or line_with_superwords(boundless, val_text)
    draw_tokens(title, compared, line, curves, out / "demo_boundless.png")

    # language models at equal compute
    runs = {BPE: [], BOUNDLESS: []}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        budget = 0.0  # the model with BPE comes first and sets it
        for name, tok in compared.items():
            run = train_model(cfg, seed, tok, texts[name], budget, device, out)
            budget = run.flops[-1]
            runs[name].append(run)
            print(
                f"seed {seed}, {name}: {run.val_loss:.4f} nats per byte after {len(run.losses)} "
                f"steps, {run.bytes_read:,} bytes read, {run.seconds:.0f} s"
            )

    losses = {name: [run.val_loss for run in of_seeds] for name, of_seeds in runs.items()}
    title = losses_title(losses[BPE], losses[BOUNDLESS], cfg.vocab_size)
    print(title)
    draw_losses(title, runs, out / "demo_boundless_loss.png")

    save_metrics(
        out,
        name="demo_boundless",
        vocabulary=sizes,
        curves={name: curve._asdict() for name, curve in curves.items()},
        bytes_per_token_gain=rate_gains,
        renyi_gain=renyi_gains,
        gain_grows=rate_gains[BOUNDLESS] == sorted(rate_gains[BOUNDLESS]),
        superwords=len(first),
        first=first[:50],
        longest=longest[:50],
        most_frequent=by_use[:50],
        heaviest=heaviest,
        nats_per_byte=losses,
        tera_flops=budget,
        steps={name: len(of_seeds[0].losses) for name, of_seeds in runs.items()},
        bytes_read={name: of_seeds[0].bytes_read for name, of_seeds in runs.items()},
        seconds={name: [run.seconds for run in of_seeds] for name, of_seeds in runs.items()},
        tokenizer_seconds=tokenizer_seconds,
        seed=cfg.seed,
        seeds=cfg.seeds,
    )
