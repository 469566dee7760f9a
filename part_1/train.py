"""
Part 1: train a small stack of blocks to say a word backwards, with no positions, with learned
positions and with sinusoidal positions.

    python part_1/train.py                  "backward|" -> "drawkcab" -> part_1/out/gpt.pt
    python part_1/train.py --seeds=3        mean and standard deviation over three seeds
    python part_1/train.py --block_size=24  words of 12 letters

Attention is a weighted mean over the tokens so far, and a mean does not depend on the order of what
it averages. So without positions a word is only a bag of letters to a block: "dog" and "god" look
the same. The best answer is then the most frequent letter that is still left in the bag. How often
that answer is right is the dashed line of the figure. To do better, the model must be told where
each letter stands. A table of learned vectors can tell it, and so can a fixed table of sinusoids.

A second block could do a little better than that without positions, because in the first block each
token has averaged over a different past. Large models learn to use this (Haviv et al. 2022). This
small one does not.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import mean, stdev

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Block, GPTConfig, LayerNorm, causal_mask
from shared import (
    Log,
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    read_log,
    save_checkpoint,
    save_figure,
    save_metrics,
    set_seed,
)

# The bar ends the word. After it the model says the word backwards.
ALPHABET = "abcdefghijklmnopqrstuvwxyz|"

POSITIONS = ["none", "learned", "sinusoidal"]


@dataclass
class Config:
    # optimization
    steps: int = 300  # optimizer steps of each model
    batch_size: int = 64  # sequences per step
    lr: float = 3e-3  # learning rate of AdamW
    # run
    eval_every: int = 30  # steps between evaluations on 1,000 new words
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "eval_every", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"


# data ---------------------------------------------------------------------------------------------


def encode(text):
    """Text -> the numbers of its letters: "cab|" -> [2, 0, 1, 26]."""
    return [ALPHABET.index(letter) for letter in text]


def decode(ids):
    """The inverse: decode(encode(text)) == text."""
    return "".join(ALPHABET[i] for i in ids)


def get_batch(step, cfg, block_size):
    """The batch of a step: inputs (batch_size, T), and the n = T/2 letters to say (batch_size, n).

    A row of the inputs is a random word of n letters, the bar, and the reversed word without its
    last letter. The targets are the reversed word. For the word "dog":

        input    d  o  g  |  g  o
        target            g  o  d

    The batch depends on the seed and the step alone, so a run can be repeated.
    """
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    word = torch.randint(26, (cfg.batch_size, block_size // 2), generator=generator)
    bar = torch.full((cfg.batch_size, 1), ALPHABET.index("|"))
    y = word.flip(1)  # (batch_size, n)
    x = torch.cat([word, bar, y[:, :-1]], dim=1)  # (batch_size, T)
    return x, y


# positions and the stack --------------------------------------------------------------------------


def sinusoids(T, C):
    """A vector of C sines and cosines for each of T positions -> (T, C).

    Channels 2i and 2i + 1 are sin and cos(t / 10000^(2i/C)) (Vaswani et al. 2017, section 3.5).
    They are like the hands of a clock: the first pair turns fast, the last one hardly moves.
    """
    t = torch.arange(T)[:, None]  # (T, 1)
    angle = t / 10000 ** (torch.arange(0, C, 2) / C)  # (T, C/2)
    pairs = torch.stack([angle.sin(), angle.cos()], dim=-1)  # (T, C/2, 2)

    # If C is odd, the last cosine has no channel.
    return pairs.flatten(1)[:, :C]


class GPT(nn.Module):
    """Token embeddings plus one of POSITIONS, n_layer blocks, a final norm and a head.

    Part 2 makes a language model of it.
    """

    def __init__(self, cfg, positions):
        super().__init__()
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.h = nn.ModuleList([Block(cfg) for _ in range(cfg.n_layer)])
        self.ln_f = LayerNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)

        # Small weights give small logits, so the first loss is that of a uniform guess, ln V.
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.lm_head.weight, std=0.02)

        # The positions are as large as the token embeddings. Only the learned ones are trained.
        table = torch.zeros(cfg.block_size, cfg.n_embd)
        if positions == "learned":
            table = torch.randn(cfg.block_size, cfg.n_embd)
        elif positions == "sinusoidal":
            table = sinusoids(cfg.block_size, cfg.n_embd)
        self.wpe = nn.Parameter(0.02 * table, requires_grad=positions == "learned")

    def forward(self, idx):
        """idx (B, T) ids of letters -> logits (B, T, V)."""
        B, T = idx.shape
        assert T <= len(self.wpe), f"{T} tokens do not fit in block_size={len(self.wpe)}"
        pos = torch.arange(T, device=idx.device)
        mask = causal_mask(pos, pos)

        x = self.wte(idx) + self.wpe[:T]  # (B, T, C)
        for block in self.h:
            x = block(x, mask)
        return self.lm_head(self.ln_f(x))  # (B, T, V)


# evaluate, draw -----------------------------------------------------------------------------------


def bag_guess(y):
    """How often is the best guess right if only the bag of the letters left is known?

    y (B, n) are the letters to say, in order -> the share of right guesses. If m letters are left
    and the most frequent of them is there c times, guessing it is right with probability c / m. For
    a word of n different letters this is (1/n + ... + 1/2 + 1) / n on average.
    """
    # Count from the end, so that row m - 1 belongs to the moment when m letters are left.
    counts = F.one_hot(y.flip(1)).cumsum(dim=1)  # (B, n, 26)
    most_frequent = counts.amax(dim=-1)  # (B, n)
    letters_left = torch.arange(1, y.size(1) + 1)  # (n,)
    return (most_frequent / letters_left).mean().item()


@torch.no_grad()
def evaluate(model, cfg, block_size, device):
    """The share of letters that the model gets right in 1,000 words.

    They are the batch of step -1, which is never trained on.
    """
    x, y = get_batch(-1, replace(cfg, batch_size=1000), block_size)
    n = block_size // 2
    logits = model(x.to(device))[:, n:]  # (1000, n, V)
    correct = logits.argmax(dim=-1).cpu() == y  # (1000, n)
    return correct.float().mean().item()


def draw(records, title, bag, path):
    """The accuracy on new words over training. A band shows the range over the seeds."""
    fig, ax = figure(title, "optimizer step", "share of letters right")
    for positions in POSITIONS:
        # {step: the accuracies of all seeds at this step}
        accuracies = {}
        for record in records:
            if record["positions"] == positions and "val_accuracy" in record:
                step = record["trained_steps"]
                accuracies.setdefault(step, []).append(record["val_accuracy"])

        steps = list(accuracies)
        means = [mean(values) for values in accuracies.values()]
        lowest = [min(values) for values in accuracies.values()]
        highest = [max(values) for values in accuracies.values()]
        ax.plot(steps, means, ".-", label=positions)
        ax.fill_between(steps, lowest, highest, alpha=0.2)

    ax.axhline(bag, color="black", linestyle="--", label="best guess from a bag of letters")
    ax.set_ylim(0, 1.02)
    ax.legend(loc="center right", bbox_to_anchor=(1, 0.65))
    save_figure(fig, path)


if __name__ == "__main__":
    cfg, gpt_cfg = parse_args(Config, GPTConfig, vocab_size=len(ALPHABET), block_size=16)
    block_size = gpt_cfg.block_size
    if block_size < 2 or block_size % 2 != 0:
        fail(
            f"--block_size={block_size} must be even and at least 2: one half is for the word, "
            "the other for the reversed word"
        )
    if gpt_cfg.vocab_size != len(ALPHABET):
        fail(f"--vocab_size={gpt_cfg.vocab_size} must be {len(ALPHABET)}: 26 letters and the bar")
    device = pick_device(cfg.device)
    out = output_folder(cfg)

    # one model for each seed and each kind of positions
    runs = list(product(range(cfg.seed, cfg.seed + cfg.seeds), POSITIONS))
    accuracies = {positions: [] for positions in POSITIONS}
    answers = {}

    # a word that each model has to reverse at the end, as long as the words that it trains on
    n = block_size // 2
    question = ("backward" * n)[:n] + "|"

    log = Log(out, len(runs) * cfg.steps)
    seconds = 0.0
    for i, (seed, positions) in enumerate(runs):
        # model and optimizer: the three models of a seed start from the same weights
        run_cfg = replace(cfg, seed=seed)
        set_seed(seed)
        model = GPT(gpt_cfg, positions).to(device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0
        )

        # training loop
        for step in range(cfg.steps):
            start = time.time()

            # forward and backward; nobody can predict a random word, so the loss starts at the bar
            x, y = get_batch(step, run_cfg, block_size)
            logits = model(x.to(device))[:, n:]  # (B, n, V)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten().to(device))
            loss.backward()

            # update
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds += time.time() - start

            # once in a while: evaluate
            values = {"positions": positions, "loss": loss.item()}
            last_step = step + 1 == cfg.steps
            if (step + 1) % cfg.eval_every == 0 or last_step:
                values["trained_steps"] = step + 1
                values["val_accuracy"] = evaluate(model, run_cfg, block_size, device)
            log(i * cfg.steps + step, **values)
        accuracies[positions].append(values["val_accuracy"])

        # let it reverse the word: each letter that it says becomes a part of its next input
        idx = torch.tensor([encode(question)], device=device)  # (1, n + 1)
        for _ in range(n):
            letter = model(idx)[:, -1:].argmax(dim=-1)  # (1, 1)
            idx = torch.cat([idx, letter], dim=1)
        answers[positions] = decode(idx[0, n + 1 :].tolist())

        # save one model; the demos look into it
        if positions == "learned" and seed == cfg.seed:
            save_checkpoint(
                out / "gpt.pt",
                kind="gpt",
                changed=cfg.changed,
                step=cfg.steps,
                config=asdict(cfg),
                gpt_config=asdict(gpt_cfg),
                weights=model.state_dict(),
                positions=positions,
            )

    # compare with the bag of letters, for 10,000 words
    _, y = get_batch(-1, replace(cfg, batch_size=10_000), block_size)
    bag = bag_guess(y)

    # save what they reached; one seed has no standard deviation
    means = {positions: mean(values) for positions, values in accuracies.items()}
    deviations = {}
    for positions, values in accuracies.items():
        deviations[f"{positions}_sd"] = stdev(values) if cfg.seeds > 1 else None
    params = sum(p.numel() for p in model.parameters())
    save_metrics(
        out,
        **means,
        **deviations,
        bag_guess=bag,
        seconds=seconds,
        steps=cfg.steps,
        params=params,
        seed=cfg.seed,
        seeds=cfg.seeds,
    )

    # show what they learned
    print(f"\nShare of letters right in new words, and how the last models answer {question!r}:")
    for positions in POSITIONS:
        spread = ""
        if cfg.seeds > 1:
            spread = f" +- {deviations[f'{positions}_sd']:.3f}"
        print(f"  {positions:12} {means[positions]:.3f}{spread}   {answers[positions]}")
    print(f"  {'bag':12} {bag:.3f}   the best guess if one knows only which letters are left")
    print(f"{params:,} parameters per model, {seconds:.0f} s of training in all")

    shares = ", ".join(f"{positions} {means[positions]:.0%}" for positions in POSITIONS)
    title = f"Letters right when saying a word backwards, by kind of positions:\n{shares}"
    records = read_log(out)
    draw(records, title, bag, out / "train.png")
