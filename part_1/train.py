"""
Part 1 - train a stack of blocks to say a word backwards, with no, learned and sinusoidal positions.

    python part_1/train.py                  "backward|" -> "drawkcab", three times -> part_1/out/gpt.pt
    python part_1/train.py --seeds=3        mean and standard deviation
    python part_1/train.py --block_size=24  words of 12 letters

Attention is a weighted mean over the past, and a mean does not know who came first. To one block without positions a
word is a bag of letters: `dog` and `god` are the same. The best guess from a bag is its most frequent letter; how often
that is right is the dashed line of the figure. (Above a first block the causal mask leaks some order, because every
token has averaged a past of its own. Large models learn to use that, Haviv et al. 2022; this one does not get there.)
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import mean, stdev

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Block, GPTConfig, LayerNorm, causal_mask
from shared import Log, cli, fail, figure, read_jsonl, save_checkpoint, save_figure, save_metrics, setup

ALPHABET = "abcdefghijklmnopqrstuvwxyz|"  # | says: now backwards
POSITIONS = ("none", "learned", "sinusoidal")

@dataclass
class Config:
    # optimization
    steps: int = 300  # optimizer steps
    batch_size: int = 64  # sequences per step
    lr: float = 3e-3  # AdamW's
    seeds: int = 1  # each kind of positions is trained with so many seeds: seed, seed + 1, ...
    # run
    eval_every: int = 30  # steps between evaluations on 1,000 new words
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "seeds", "eval_every"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"

# data ----------------------------------------------------------------------------------------------------------------

def encode(text):
    """Text -> the numbers of its letters: "cab|" -> [2, 0, 1, 26]."""
    return [ALPHABET.index(letter) for letter in text]

def decode(ids):
    """The inverse: decode(encode(text)) == text."""
    return "".join(ALPHABET[i] for i in ids)

def get_batch(step, cfg, block_size):
    """The batch of a step depends on seed and step alone: (batch_size, T) inputs, the (batch_size, T/2) letters to say.

    A random word of n = T/2 letters, the |, and the word backwards but for its last letter, which nobody reads:
    "dog|go" in, and from the | on "god" is asked.
    """
    g = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    word = torch.randint(26, (cfg.batch_size, block_size // 2), generator=g)
    bar = torch.full((cfg.batch_size, 1), ALPHABET.index("|"))
    y = word.flip(1)
    return torch.cat([word, bar, y[:, :-1]], dim=1), y

# positions, and the stack --------------------------------------------------------------------------------------------

def sinusoids(T, C):
    """Positions as clock hands, "Attention Is All You Need", section 3.5: (T, C) of sin and cos(t / 10000^(2i/C))."""
    angle = torch.arange(T)[:, None] / 10000 ** (torch.arange(0, C, 2) / C)  # (T, C/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :C]  # interleaved, as in the paper

class GPT(nn.Module):
    """Letters in, blocks, letters out. Part 2 makes a language model of it."""

    def __init__(self, cfg, positions):
        super().__init__()
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.h = nn.ModuleList([Block(cfg) for _ in range(cfg.n_layer)])
        self.ln_f = LayerNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        for table in (self.wte, self.lm_head):
            nn.init.normal_(table.weight, std=0.02)  # small logits: the first loss is ln V
        shape = (cfg.block_size, cfg.n_embd)
        tables = {"none": torch.zeros(shape), "learned": torch.randn(shape), "sinusoidal": sinusoids(*shape)}
        self.wpe = nn.Parameter(0.02 * tables[positions], requires_grad=positions == "learned")  # as loud as wte

    def forward(self, idx):
        """idx (B, T) ids -> logits (B, T, V)."""
        B, T = idx.shape
        pos = torch.arange(T, device=idx.device)
        mask = causal_mask(pos, pos)
        x = self.wte(idx) + self.wpe[:T]  # (B, T, C)
        for block in self.h:
            x = block(x, mask)
        return self.lm_head(self.ln_f(x))  # (B, T, V)

# evaluate ------------------------------------------------------------------------------------------------------------

def bag_guess(y):
    """The best that a bag of letters allows: (B, n) letters to say -> share right, guessing the commonest one left.

    A word of n different letters: (1/n + ... + 1/2 + 1) / n.
    """
    left = F.one_hot(y.flip(1)).cumsum(dim=1)  # (B, n, 26) how many of each letter among the last 1, 2, ..., n
    return (left.amax(dim=-1) / torch.arange(1, y.size(1) + 1)).mean().item()

@torch.no_grad()
def evaluate(model, cfg, block_size, device):
    """-> share of the letters right, in 1,000 words that no step trains on."""
    x, y = get_batch(-1, replace(cfg, batch_size=1000), block_size)
    logits = model(x.to(device))[:, block_size // 2:]  # (1000, n, V)
    return (logits.argmax(dim=-1).cpu() == y).float().mean().item()

if __name__ == "__main__":
    cfg, gpt_cfg = cli(Config(), GPTConfig(vocab_size=len(ALPHABET), block_size=16))
    if gpt_cfg.block_size < 2 or gpt_cfg.block_size % 2:
        fail(f"--block_size={gpt_cfg.block_size} must be even: half of it is the word, half the word backwards")
    if gpt_cfg.vocab_size < len(ALPHABET):
        fail(f"--vocab_size={gpt_cfg.vocab_size}: there are {len(ALPHABET)} letters, with the |")
    device, _ = setup(cfg)
    n = gpt_cfg.block_size // 2
    question = ("backward" * n)[:n] + "|"
    log = Log(cfg, cfg.seeds * len(POSITIONS) * cfg.steps)

    # loop: each seed, each kind of positions
    accuracy = {positions: [] for positions in POSITIONS}
    answers, seconds, past = {}, 0.0, 0
    for seed, positions in product(range(cfg.seed, cfg.seed + cfg.seeds), POSITIONS):
        run = replace(cfg, seed=seed)
        torch.manual_seed(seed)  # all three start from the same weights
        model = GPT(gpt_cfg, positions).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(cfg.steps):
            start = time.time()
            x, y = get_batch(step, run, gpt_cfg.block_size)
            logits = model(x.to(device))[:, n:]  # (B, n, V): the word itself cannot be foretold, nobody is asked to
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten().to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds += time.time() - start

            # once in a while: evaluate
            values = {"positions": positions, "loss": loss.item()}
            if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
                values |= {"at": step + 1, "val_accuracy": evaluate(model, run, gpt_cfg.block_size, device)}
            log(past + step, **values)
        past += cfg.steps

        # what it learned
        accuracy[positions].append(values["val_accuracy"])
        idx = torch.tensor([encode(question)], device=device)
        for _ in range(n):
            idx = torch.cat([idx, model(idx)[:, -1:].argmax(dim=-1)], dim=1)  # its own letters are its next input
        answers[positions] = decode(idx[0, n + 1:].tolist())
        if positions == "learned" and seed == cfg.seed:
            path = Path(cfg.out) / "gpt.pt"
            save_checkpoint(path, kind="gpt", changed=cfg.changed, step=cfg.steps, config=asdict(cfg),
                            gpt_config=asdict(gpt_cfg), weights=model.state_dict(), positions=positions)

    # what they learned
    bag = bag_guess(get_batch(-1, replace(cfg, batch_size=10_000), gpt_cfg.block_size)[1])
    spread = {f"{p}_sd": stdev(a) if len(a) > 1 else None for p, a in accuracy.items()}
    params = sum(p.numel() for p in model.parameters())
    save_metrics(cfg, **{p: mean(a) for p, a in accuracy.items()}, **spread, bag_guess=bag, seconds=seconds,
                 steps=cfg.steps, params=params, seed=cfg.seed, seeds=cfg.seeds)
    print(f"\nletters right in new words, and how the last model goes on from {question}")
    for positions in POSITIONS:
        sd = f" +- {spread[f'{positions}_sd']:.3f}" if cfg.seeds > 1 else ""
        print(f"  {positions:12} {mean(accuracy[positions]):.3f}{sd}   {answers[positions]}")
    print(f"  {'(a bag)':12} {bag:.3f}   the best guess for who knows the letters left but no order")
    print(f"{params:,} parameters, {seconds:.0f} s of training in all")

    # figure
    records = [r for r in read_jsonl(Path(cfg.out) / "log.jsonl", ["step", "loss"]) if "val_accuracy" in r]
    said = ", ".join(f"{p} {mean(a):.0%}" for p, a in accuracy.items())
    title = f"A word backwards, letters right: {said}"
    fig, ax = figure(title, "optimizer step", "share of letters right")
    for positions in POSITIONS:
        mine = [r for r in records if r["positions"] == positions]
        steps = sorted({r["at"] for r in mine})
        runs = [[r["val_accuracy"] for r in mine if r["at"] == step] for step in steps]
        ax.plot(steps, [mean(values) for values in runs], ".-", label=positions)
        ax.fill_between(steps, [min(values) for values in runs], [max(values) for values in runs], alpha=0.2)
    ax.axhline(bag, color="black", linestyle="--", label="best guess from a bag of letters")
    ax.set_ylim(0, 1.02)
    ax.legend(loc="center right")
    save_figure(fig, Path(cfg.out) / "train.png")
