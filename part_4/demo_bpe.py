"""
Part 4 - what BPE buys: tokens that grow, bytes per token by vocabulary size, and nats per byte at equal compute.

    python part_4/demo_bpe.py
    python part_4/demo_bpe.py --data=my.txt --vocab_size=2048

A merge makes every later text shorter (Sennrich et al. 2016), and a token costs about the same whatever it stands for.
So here rows hold the same number of bytes and steps the same number of rows: the fewer tokens, the more steps fit into
the same FLOPs. Losses per token of different vocabularies cannot be compared, nats per byte can.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from shared import Log, cli, figure, save_figure, save_metrics, setup
from tokenizer import SPECIAL, Tokenizer
from train import Config as Recipe, evaluate, get_batch, load_data, lr_scale, make_optimizers

SHADES = ["#9CC9E8", "#F6CF86", "#9FDCC3", "#EFB38F", "#E5C3D8"]
BYTES = 256 + len(SPECIAL)  # the smallest vocabulary: no merge at all

@dataclass
class Config:
    data: str = "stories"  # "stories" (the built-in world), "shakespeare" (a download), or the path of a text file
    vocab_size: int = 1024  # largest vocabulary; a small world has fewer words than that
    sentence: str = "Once there was a fox named Mia in Paris. Mia found the red ball."  # what is drawn
    steps: int = 100  # optimizer steps of the byte model; the others get as many as the same FLOPs allow
    batch_size: int = 16  # rows per step
    row: int = 192  # bytes of text in a row
    n_embd: int = 96  # channels of the models, which have two layers
    seeds: int = 1  # how many seeds; the README quotes 3
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def sizes(first, last):
    """At most eight vocabulary sizes; the number of merges grows by the same factor from one to the next."""
    return sorted({first, *(first + round((last - first) ** (i / 6)) for i in range(7))})

def smaller(tok, vocab_size):
    """The tokenizer that an earlier end of the same training gives: a merge never changes those before it."""
    return Tokenizer(dict(list(tok.ranks.items())[:vocab_size - len(SPECIAL)]))

def step_flops(model, x, y):
    """10^12 floating point operations of a forward and a backward, counted while they run."""
    with FlopCounterMode(display=False) as counter:
        model(x, y)[1].backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / 1e12

def learn(cfg, recipe, tok, train, val, budget, device):
    """For `budget` * 10^12 FLOPs (0: cfg.steps) -> (FLOPs, nats per byte) of batches, nats per byte of val, seconds."""
    ids, val_ids, n_bytes = (torch.tensor(z) for z in (tok.encode(train), tok.encode(val), tok.n_bytes))
    T = round(cfg.row * len(ids) / len(train.encode()))  # tokens in a row
    torch.manual_seed(recipe.seed)
    model = GPT(GPTConfig(tok.vocab_size, T, n_layer=2, n_embd=cfg.n_embd)).to(device)
    starts = torch.arange(len(ids) - T)
    flops = step_flops(model, *(z.to(device) for z in get_batch(ids, starts, 0, recipe, T)))
    recipe = replace(recipe, steps=round(budget / flops) if budget else cfg.steps)
    optimizers, curve, log = make_optimizers(model, recipe), [], Log(cfg, recipe.steps, name="demo_bpe")
    for step in range(recipe.steps):
        for group in (group for opt in optimizers for group in opt.param_groups):
            group["lr"] = group["peak"] * lr_scale(step, recipe)
        x, y = get_batch(ids, starts, step, recipe, T)
        _, loss = model(x.to(device), y.to(device))
        loss.backward()
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        curve.append((flops * (step + 1), loss.item() * y.numel() / n_bytes[y].sum().item()))
        log(step, nats_per_token=loss.item(), nats_per_byte=curve[-1][1])
    seconds, edges = log.seconds, torch.tensor([*range(0, len(val_ids) - 1, T), len(val_ids) - 1])
    return torch.tensor(curve), evaluate(model, val_ids, edges, len(val.encode()), device, nullcontext)[0], seconds

def draw_tokens(ax, toks, sentence):
    """The sentence once per tokenizer, a coloured box per token."""
    for row, tok in enumerate(toks):
        x = 0
        for i, token in enumerate(map(tok.token_bytes, tok.encode(sentence))):
            text = token.decode(errors="replace")
            ax.barh(-row, len(text), left=x, height=0.8, color=SHADES[i % len(SHADES)], edgecolor="white")
            for j, letter in enumerate(text):
                ax.text(x + j + 0.5, -row, letter, ha="center", va="center", size=7, family="monospace")
            x += len(text)
    ax.set(yticks=[-row for row in range(len(toks))], yticklabels=[tok.vocab_size for tok in toks], xticks=[],
           xlim=(0, x), ylabel="vocabulary", xlabel="one box is one token")

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    recipe = Recipe(data=cfg.data, batch_size=cfg.batch_size)
    tok, ids, _, val_ids, _, _, entropy = load_data(recipe, GPTConfig(vocab_size=cfg.vocab_size, block_size=cfg.row))
    train, val = tok.decode(ids.tolist()), tok.decode(val_ids.tolist())
    V = sizes(BYTES, tok.vocab_size)
    toks = [smaller(tok, n) for n in V]

    # tokens
    for n in V[1:]:
        print(f"merge {n - BYTES:4}: {tok.token_bytes(n - len(SPECIAL) - 1)}")
    rate = [[len(text.encode()) / len(t.encode(text)) for t in toks] for text in (train, val)]
    n, N = len(tok.encode(cfg.sentence)), len(cfg.sentence.encode())
    said = f"Vocabulary {tok.vocab_size}: {rate[1][-1]:.2f} bytes per token of new text; here {n} tokens for {N} bytes"
    fig, (ax, below) = figure(said, rows=2, height=5.5)
    draw_tokens(ax, toks, cfg.sentence)
    below.plot(V, rate[0], "o-", V, rate[1], "o--")
    below.legend(["training text", "new text"])
    below.set(xlabel="vocabulary (tokens)", ylabel="bytes per token")
    save_figure(fig, Path(cfg.out) / "demo_bpe_tokens.png")

    # losses
    fig, ax = figure("", "training compute (10^12 FLOPs)", "nats per byte (diamonds: new text)")
    runs = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        budget = 0
        for i, t in enumerate((toks[0], toks[-2], toks[-1])):
            curve, loss, seconds = learn(cfg, replace(recipe, seed=seed), t, train, val, budget, device)
            budget = budget or curve[-1, 0].item()
            runs.append((loss, seconds, len(curve)))
            print(f"vocabulary {t.vocab_size}: {loss:.3f} nats per byte after {len(curve)} steps, {seconds:.0f} s")
            x, y = curve[:len(curve) // 10 * 10].view(-1, 10, 2).mean(dim=1).T  # one batch is noisy
            ax.plot(x, y, color=f"C{i}", label="" if seed > cfg.seed else f"vocabulary {t.vocab_size}")
            ax.plot(budget, loss, "D", color=f"C{i}")
    loss, seconds, steps = torch.tensor(runs).view(cfg.seeds, 3, 3).unbind(dim=-1)  # (seeds, arms)
    low, mean, high = loss.amin(dim=0), loss.mean(dim=0), loss.amax(dim=0)
    said = "no difference" if cfg.seeds > 1 and low[0] <= high[2] and low[2] <= high[0] else "bytes against BPE"
    fig.suptitle(f"Equal FLOPs, {said}: {mean[0]:.3f} and {mean[2]:.3f} nats per byte of new text")
    if entropy:
        ax.axhline(entropy, color="black", linestyle="--", label="true entropy")
    ax.semilogy()
    fig.legend(loc="outside lower center", ncols=4)
    save_figure(fig, Path(cfg.out) / "demo_bpe_loss.png")
    save_metrics(cfg, name="demo_bpe", vocabulary=V, bytes_per_token_train=rate[0],
                 bytes_per_token_val=rate[1], arms=[V[0], V[-2], V[-1]], tera_flops=budget, nats_per_byte=loss,
                 seconds=seconds, steps=steps, true_nats_per_byte=entropy, seed=cfg.seed)
