"""
Part 4, byte-pair encoding: how do the tokens grow with the vocabulary, and what does that buy at
equal compute?

    python part_4/demo_bpe.py
    python part_4/demo_bpe.py --seeds=3
    python part_4/demo_bpe.py --data=my.txt --vocab_size=2048

A merge makes every later text shorter (Sennrich et al. 2016), and a token costs about the same
whatever it stands for. Here all rows hold the same number of bytes and all steps the same number of
rows, so a larger vocabulary has fewer tokens in a step and can take more steps with the same number
of floating point operations (FLOPs). Losses per token of different vocabularies cannot be compared.
Nats per byte can.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import mean
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import train
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
from tokenizer import SPECIAL, Tokenizer

BYTES = 256 + len(SPECIAL)  # the smallest vocabulary, without any merge
BOX_COLOURS = ["#9CC9E8", "#F6CF86", "#9FDCC3", "#EFB38F", "#E5C3D8"]


@dataclass
class Config:
    data: str = "stories"  # stories (the built-in world), shakespeare (a download) or a text file
    vocab_size: int = 1024  # largest vocabulary; a small text has fewer pairs to merge than that

    # the text that is drawn as tokens
    sentence: str = "Once there was a fox named Mia in Paris. Mia found the red ball."

    steps: int = 100  # optimizer steps of the byte model; the others get the same number of FLOPs
    batch_size: int = 16  # rows per step
    row: int = 192  # bytes of text in a row
    n_embd: int = 96  # channels of the models, which have two layers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("batch_size", "row", "n_embd", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.steps >= 10, f"steps={self.steps} must be at least 10"
        assert self.sentence, "sentence must not be empty"
        assert self.n_embd % 8 == 0, (
            f"n_embd={self.n_embd} must be divisible by 8: four heads, and RoPE rotates pairs"
        )


def vocabulary_sizes(first, last):
    """At most eight sizes from first to last. From the second on, the number of merges grows by the
    same factor from each to the next: 1, ..., last - first."""
    sizes = {first}
    for i in range(7):
        merges = (last - first) ** (i / 6)
        sizes.add(first + round(merges))
    return sorted(sizes)


def cut(tok, vocab_size):
    """The tokenizer that the same training gives if it stops earlier. A merge never changes those
    before it, so the first ones are all it takes."""
    tokens = list(tok.ranks.items())[: vocab_size - len(SPECIAL)]
    return Tokenizer(dict(tokens))


def bytes_per_token(tok, text):
    return len(text.encode()) / len(tok.encode(text))


def step_flops(model, x, y):
    """The floating point operations of a forward and a backward pass, in units of 10^12. They are
    counted while the passes run."""
    with FlopCounterMode(display=False) as counter:
        _, loss = model(x, y)
        loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / 1e12


class Run(NamedTuple):
    """One training of a model."""

    flops: torch.Tensor  # (steps,) spent up to and including each step, in units of 10^12
    losses: torch.Tensor  # (steps,) of the training batches, in nats per byte
    val_loss: float  # of the whole validation text, in nats per byte
    seconds: float


def train_model(cfg, recipe, tok, train_text, val_text, budget, device, out):
    """Trains a model on the tokens of tok for `budget` * 10^12 FLOPs, or for cfg.steps steps if the
    budget is 0 -> Run. recipe is a config of train.py."""
    train_ids = torch.tensor(tok.encode(train_text))
    val_ids = torch.tensor(tok.encode(val_text))
    n_bytes = torch.tensor(tok.n_bytes)
    T = max(1, round(cfg.row / bytes_per_token(tok, train_text)))  # tokens in a row
    starts = torch.arange(len(train_ids) - T)

    torch.manual_seed(recipe.seed)
    gpt_cfg = GPTConfig(tok.vocab_size, T, n_layer=2, n_embd=cfg.n_embd)
    model = GPT(gpt_cfg).to(device)

    # A step costs the same every time, so its cost tells how many fit into the budget.
    x, y = train.get_batch(train_ids, starts, 0, recipe, T)
    flops = step_flops(model, x.to(device), y.to(device))
    steps = cfg.steps
    if budget > 0:
        steps = max(1, round(budget / flops))
    recipe = replace(recipe, steps=steps)

    optimizers = train.make_optimizers(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    losses = []
    log = Log(out, steps, name="demo_bpe")
    for step in range(steps):
        train.set_lr(optimizers, train.lr_scale(step, recipe))
        x, y = train.get_batch(train_ids, starts, step, recipe, T)
        loss = train.backward(model, x.to(device), y.to(device), recipe, nullcontext, scaler)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # The loss is a mean over tokens. Their bytes turn it into nats per byte.
        nats = loss.item() * y.numel()
        losses.append(nats / n_bytes[y].sum().item())
        log(step, vocab_size=tok.vocab_size, loss=loss.item(), nats_per_byte=losses[-1])
    seconds = log.seconds

    edges = train.row_edges([], len(val_ids), T)
    val_bytes = len(val_text.encode())
    val = train.evaluate(model, val_ids, edges, val_bytes, device, nullcontext)
    spent = flops * torch.arange(1, steps + 1)
    return Run(spent, torch.tensor(losses), val.loss, seconds)


def draw_boxes(ax, tokenizers, sentence):
    """The sentence once for each tokenizer, in a row of its own with one coloured box per token."""
    for row, tok in enumerate(tokenizers):
        left = 0
        for i, token_id in enumerate(tok.encode(sentence)):
            text = tok.token_bytes(token_id).decode(errors="replace")
            colour = BOX_COLOURS[i % len(BOX_COLOURS)]
            ax.barh(-row, len(text), left=left, height=0.8, color=colour, edgecolor="white")
            for j, letter in enumerate(text):
                ax.text(
                    left + j + 0.5,
                    -row,
                    letter,
                    ha="center",
                    va="center",
                    size=7,
                    family="monospace",
                )
            left += len(text)
    ax.set_yticks([-row for row in range(len(tokenizers))])
    ax.set_yticklabels([tok.vocab_size for tok in tokenizers])
    ax.set(xticks=[], xlim=(0, left), ylabel="vocabulary", xlabel="one box is one token")


def draw_tokens(title, tokenizers, sentence, train_rates, val_rates, path):
    """Above: a sentence as tokens. Below: bytes per token over the size of the vocabulary."""
    fig, (above, below) = figure(title, rows=2, height=5.5)
    draw_boxes(above, tokenizers, sentence)
    sizes = [tok.vocab_size for tok in tokenizers]
    below.plot(sizes, train_rates, "o-", label="training text")
    below.plot(sizes, val_rates, "o--", label="new text")
    below.set(xlabel="vocabulary (tokens)", ylabel="bytes per token")
    below.legend()
    save_figure(fig, path)


def draw_losses(title, runs, entropy, path):
    """Training losses over the compute spent, and the loss on new text at the end of it.
    runs: {vocabulary size: [Run]}, one run per seed."""
    fig, ax = figure(title, "training compute (10^12 FLOPs)", "nats per byte (diamonds: new text)")
    for i, (size, size_runs) in enumerate(runs.items()):
        for run in size_runs:
            # One batch is noisy: draw means of ten steps.
            whole_tens = len(run.losses) // 10 * 10
            flops = run.flops[:whole_tens].view(-1, 10).mean(dim=1)
            losses = run.losses[:whole_tens].view(-1, 10).mean(dim=1)
            label = f"vocabulary {size}" if run is size_runs[0] else None
            ax.plot(flops, losses, color=f"C{i}", label=label)
            ax.plot(run.flops[-1], run.val_loss, "D", color=f"C{i}")
    if entropy is not None:
        ax.axhline(entropy, color="black", linestyle="--", label="true entropy")
    ax.set_yscale("log")
    fig.legend(loc="outside lower center", ncols=4)
    save_figure(fig, path)


def losses_title(byte_losses, bpe_losses):
    """What may be said of two lists of losses, one per seed. Where their ranges overlap, there is
    no winner."""
    finding = "bytes against BPE"
    overlap = min(byte_losses) <= max(bpe_losses) and min(bpe_losses) <= max(byte_losses)
    if len(byte_losses) > 1 and overlap:
        finding = "no difference"
    return (
        f"Equal FLOPs, {finding}: {mean(byte_losses):.3f} and {mean(bpe_losses):.3f} "
        f"nats per byte of new text"
    )


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # One training of the largest tokenizer gives all the smaller ones.
    recipe = train.Config(data=cfg.data, batch_size=cfg.batch_size)
    data = train.load_data(recipe, GPTConfig(vocab_size=cfg.vocab_size, block_size=cfg.row))
    tok = data.tok
    if tok.vocab_size < BYTES + 2:
        fail(f"--data={cfg.data} --vocab_size={cfg.vocab_size}: at least two merges are needed")
    out = output_folder(cfg)
    train_text = tok.decode(data.train_ids.tolist())
    val_text = tok.decode(data.val_ids.tolist())
    sizes = vocabulary_sizes(BYTES, tok.vocab_size)
    tokenizers = [cut(tok, size) for size in sizes]

    # How the tokens grow
    for size in sizes[1:]:
        newest = tok.token_bytes(size - len(SPECIAL) - 1)
        print(f"merge {size - BYTES:4}: {newest}")
    train_rates = [bytes_per_token(smaller, train_text) for smaller in tokenizers]
    val_rates = [bytes_per_token(smaller, val_text) for smaller in tokenizers]
    n_tokens = len(tok.encode(cfg.sentence))
    n_bytes = len(cfg.sentence.encode())
    title = (
        f"Vocabulary {tok.vocab_size}: {val_rates[-1]:.2f} bytes per token of new text;\n"
        f"the sentence has {n_bytes} bytes and {n_tokens} tokens"
    )
    print(title)
    path = out / "demo_bpe_tokens.png"
    draw_tokens(title, tokenizers, cfg.sentence, train_rates, val_rates, path)

    # Bytes, the last vocabulary but one, and the largest, at equal compute
    compared = [tokenizers[0], tokenizers[-2], tokenizers[-1]]
    runs = {smaller.vocab_size: [] for smaller in compared}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        budget = 0.0  # the byte model comes first and sets it
        for smaller in compared:
            run = train_model(
                cfg, replace(recipe, seed=seed), smaller, train_text, val_text, budget, device, out
            )
            if budget == 0:
                budget = run.flops[-1].item()
            runs[smaller.vocab_size].append(run)
            print(
                f"vocabulary {smaller.vocab_size}: {run.val_loss:.3f} nats per byte after "
                f"{len(run.losses)} steps, {run.seconds:.0f} s"
            )

    val_losses = {}
    for size, size_runs in runs.items():
        val_losses[size] = [run.val_loss for run in size_runs]
    title = losses_title(val_losses[sizes[0]], val_losses[sizes[-1]])
    print(title)
    draw_losses(title, runs, data.entropy, out / "demo_bpe_loss.png")

    save_metrics(
        out,
        name="demo_bpe",
        vocabulary=sizes,
        bytes_per_token_train=train_rates,
        bytes_per_token_val=val_rates,
        compared=list(runs),
        tera_flops=budget,
        nats_per_byte=val_losses,
        seconds={size: [run.seconds for run in size_runs] for size, size_runs in runs.items()},
        steps={size: len(size_runs[0].losses) for size, size_runs in runs.items()},
        true_nats_per_byte=data.entropy,
        seed=cfg.seed,
        seeds=cfg.seeds,
    )
