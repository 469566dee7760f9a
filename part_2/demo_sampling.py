"""
Part 2 - how the next byte is drawn: one distribution under three knobs, and what quality costs in variety.

    python part_2/demo_sampling.py
    python part_2/demo_sampling.py --init=my/gpt.pt --prompt="Once there was a dog named "

Temperature divides the logits before the softmax; top-k keeps the k likeliest; top-p keeps the fewest that reach p
together (Holtzman et al. 2020, section 3.1). Quality: the share of whole words that the training text has, and of whole
sentences that one of the world's patterns makes. Variety: distinct-2, the share of word pairs that are different ones
(Li et al. 2016, section 5). Repeating one good sentence is all quality and no variety.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import re
from dataclasses import dataclass

import torch

from model import GPT, GPTConfig, sample
from shared import (Log, cli, figure, load_checkpoint, read_text, require, save_figure, save_metrics, setup,
                    story_patterns)
from train import decode, encode

BARS = {
    "temperature 1": {},
    "temperature 0.5": {"temperature": 0.5},
    "top-k 3": {"top_k": 3},
    "top-p 0.7": {"top_p": 0.7},
}
FAMILIES = {  # each ends in plain sampling, where all three meet
    "temperature": [0.4, 0.6, 0.8, 1.0, 1.3],
    "top_k": [2, 4, 8, 256],
    "top_p": [0.4, 0.6, 0.8, 0.9, 1.0],
}

@dataclass
class Config:
    init: str = "part_2/out/gpt.pt"  # a checkpoint of part_2/train.py
    prompt: str = "Once there was a "  # what every sample goes on from
    samples: int = 64  # continuations per setting
    length: int = 40  # bytes of a continuation
    draws: int = 20000  # bytes drawn per picture of the distribution
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        assert self.prompt, "prompt is empty: the first byte needs one before it"
        assert min(self.samples, self.length, self.draws) > 0, "samples, length and draws must be at least 1"

def shares(logits, draws, **knobs):
    """logits (V,) -> how often sample() draws each of them, (V,)."""
    return sample(logits.expand(draws, -1), **knobs).bincount(minlength=len(logits)) / draws

def words_of(text):
    """The whole words of a continuation; its last word may be cut off."""
    return re.findall(r"\w+(?=\W)", text)

def share(good, items):
    return sum(map(good, items)) / max(1, len(items))

def distinct(texts, n=2):
    """Distinct-n: different n-grams of words over all n-grams of words."""
    grams = [tuple(words[i:i + n]) for words in map(words_of, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))

def score(prompt, texts, known, patterns):
    """Continuations -> shares of real words and of whole sentences that fit a pattern, distinct-2."""
    words = [word for text in texts for word in words_of(text)]
    ends = [(prompt + text).rpartition(".") for text in texts]
    sentences = [s for whole, dot, _ in ends if dot for s in re.split(r"(?<=\.)\s+", (whole + dot).strip())]
    fits = share(lambda s: any(regex.fullmatch(s) for _, regex, _ in patterns), sentences)
    return {"words": share(known.__contains__, words), "sentences": fits, "distinct": distinct(texts)}

def draw_bars(bars, plain, said, path, shown=12):
    """bars: {setting: shares (V,)}; plain (V,) is the model's own distribution, drawn as an outline."""
    top = plain.topk(min(shown, len(plain))).indices
    fig, axes = figure(said, "next byte", "share of the draws", rows=2, columns=2, height=6)
    names = [repr(chr(i))[1:-1].replace(" ", "\u2423") if i < 128 else f"{i:02x}" for i in top.tolist()]
    for ax, (name, found) in zip(axes.flat, bars.items()):
        ax.bar(range(len(top)), found[top].tolist(), color="C0", alpha=0.7, label="drawn")
        ax.bar(range(len(top)), plain[top].tolist(), facecolor="none", edgecolor="black", label="the model's softmax")
        ax.set_title(f"{name}: {(found > 0).sum()} different bytes came", fontsize=10)
        ax.set_xticks(range(len(top)), names)
        ax.set_ylim(0, 1.1 * max(each.max() for each in bars.values()))
    axes[0, 0].legend(fontsize=9)
    save_figure(fig, path)

def draw_scores(scores, said, path):
    """scores: {(knob, value): {...}}, one line per knob."""
    fig, axes = figure(said, "distinct-2, share of word pairs that are different", columns=2, height=5)
    for ax, kind, label in zip(axes, ("words", "sentences"), ("words that exist", "sentences that fit a pattern")):
        for knob, values in FAMILIES.items():
            found = [scores[knob, value] for value in values]
            ax.plot([s["distinct"] for s in found], [100 * s[kind] for s in found], "o-", label=knob.replace("_", "-"))
            for value, s in zip(values[:-1], found):
                ax.annotate(value, (s["distinct"], 100 * s[kind]), (4, 4), textcoords="offset points", fontsize=8)
        ax.set(ylabel=f"{label}, %", ylim=(-3, 103))
        ax.xaxis.label.set_size(9)
    axes[0].legend()
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    saved = load_checkpoint(require(cfg.init), "gpt")
    model = GPT(GPTConfig(**saved["gpt_config"])).to(device)
    model.load_state_dict(saved["weights"])
    prompt = torch.tensor([encode("\n\n" + cfg.prompt)], device=device)  # a blank line stands between stories

    # one distribution
    logits = model(prompt[:, -model.cfg.block_size:])[0][0, -1].detach()
    bars, plain = {name: shares(logits, cfg.draws, **knobs).cpu() for name, knobs in BARS.items()}, logits.softmax(-1)
    n, likeliest = {name: (found > 0).sum().item() for name, found in bars.items()}, plain.argmax().item()
    said = f"After {cfg.prompt!r}: top-k 3 leaves {n['top-k 3']} bytes, top-p 0.7 leaves {n['top-p 0.7']},\n"
    said += f"temperature 0.5 moves the likeliest from {plain[likeliest]:.0%} "
    said += f"to {bars['temperature 0.5'][likeliest]:.0%}"
    draw_bars(bars, plain.cpu(), said, Path(cfg.out) / "demo_sampling_bars.png")

    # quality against variety
    folder = require("data/stories")
    known, patterns = set(words_of(read_text(folder / "train.txt"))), story_patterns(folder / "facts.json")
    settings = [(knob, value) for knob, values in FAMILIES.items() for value in values]
    log, scores = Log(cfg, len(settings), name="demo_sampling"), {}
    for i, (knob, value) in enumerate(settings):
        torch.manual_seed(cfg.seed)
        rows = model.generate(prompt.expand(cfg.samples, -1), cfg.length, **{knob: value})[:, prompt.size(1):]
        scores[knob, value] = score(cfg.prompt, [decode(row) for row in rows.tolist()], known, patterns)
        log(i, **{knob: value}, **scores[knob, value])
    (knob, value), best = max(scores.items(), key=lambda item: item[1]["words"])
    plain, fit = scores["temperature", 1.0], max(s["sentences"] for s in scores.values())
    said = f"Plain sampling: {plain['words']:.0%} real words, distinct-2 {plain['distinct']:.2f}. {knob} {value}: "
    said += f"{best['words']:.0%} and {best['distinct']:.2f}\nSentences that fit a pattern: at best {fit:.0%}"
    print(said)
    draw_scores(scores, said, Path(cfg.out) / "demo_sampling.png")
    save_metrics(cfg, name="demo_sampling", seed=cfg.seed, seconds=log.seconds, samples=cfg.samples, kept=n,
                 scores={f"{knob}={value}": found for (knob, value), found in scores.items()})
