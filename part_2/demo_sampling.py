"""
Part 2: how is the next byte drawn? One distribution under three knobs, and what quality costs in
variety.

    python part_2/demo_sampling.py
    python part_2/demo_sampling.py --init=my/gpt.pt --prompt="Once there was a dog named "

Temperature divides the logits before the softmax. Top-k keeps the k likeliest bytes. Top-p keeps
the fewest bytes whose probability reaches p together (Holtzman et al. 2020, section 3.1).

Quality is the share of whole words that occur in the training text, and of whole sentences that one
of the world's patterns can make. Variety is distinct-2, the share of word pairs that are different
from each other (Li et al. 2016, section 5). Repeating one good sentence for ever has quality and no
variety.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import re
from dataclasses import dataclass

import torch

from model import sample
from sample import load_model
from shared import (
    Log,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    read_text,
    require,
    save_figure,
    save_metrics,
    set_seed,
    story_patterns,
)
from train import decode, encode

# Settings whose effect on one distribution is drawn.
BARS = {
    "temperature 1": {},
    "temperature 0.5": {"temperature": 0.5},
    "top-k 3": {"top_k": 3},
    "top-p 0.7": {"top_p": 0.7},
}

# Settings with which whole texts are sampled. Three of them are plain sampling, so the lines of the
# figure meet there: temperature 1, top_k 256 and top_p 1.
FAMILIES = {
    "temperature": [0.4, 0.6, 0.8, 1.0, 1.3],
    "top_k": [2, 4, 8, 256],
    "top_p": [0.4, 0.6, 0.8, 0.9, 1.0],
}


@dataclass
class Config:
    init: str = "part_2/out/gpt.pt"  # checkpoint of part_2/train.py
    prompt: str = "Once there was a "  # the text that every sample continues
    samples: int = 64  # continuations per setting
    length: int = 40  # bytes of a continuation
    draws: int = 20000  # bytes drawn for each picture of the distribution
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.prompt, "prompt is empty: the first byte needs one before it"
        for name in ("samples", "length", "draws"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"


def draw_shares(logits, draws, **options):
    """logits (V,) -> how often sample() draws each byte, as shares (V,)."""
    drawn = sample(logits.expand(draws, -1), **options)
    return drawn.bincount(minlength=len(logits)) / draws


def whole_words(text):
    """The whole words of a continuation. Its last word may be cut off, so it does not count."""
    return re.findall(r"\w+(?=\W)", text)


def whole_sentences(prompt, text):
    """The whole sentences of the prompt and its continuation."""
    before, dot, _ = (prompt + text).rpartition(".")
    if not dot:
        return []
    return re.split(r"(?<=\.)\s+", (before + dot).strip())


def distinct(texts, n=2):
    """Distinct-n: the number of different n-grams of words over the number of all of them."""
    grams = []
    for text in texts:
        words = whole_words(text)
        for i in range(len(words) - n + 1):
            grams.append(tuple(words[i : i + n]))
    return len(set(grams)) / max(1, len(grams))


def score(prompt, texts, known_words, patterns):
    """Continuations -> the share of words that exist, the share of whole sentences that fit a
    pattern of the world, and distinct-2."""
    words = []
    sentences = []
    for text in texts:
        words += whole_words(text)
        sentences += whole_sentences(prompt, text)
    existing = [word in known_words for word in words]
    fitting = []
    for sentence in sentences:
        fitting.append(any(pattern.regex.fullmatch(sentence) for pattern in patterns))
    return {
        "words": sum(existing) / max(1, len(existing)),
        "sentences": sum(fitting) / max(1, len(fitting)),
        "distinct": distinct(texts),
    }


def label_of(byte):
    """What the axis shows for a byte."""
    if byte == ord(" "):
        return "\u2423"
    if byte < 128:
        return repr(chr(byte))[1:-1]
    return f"{byte:02x}"


def draw_bars(bars, plain, title, path):
    """bars: {setting: shares (V,)}. plain (V,), the model's own distribution, is the outline."""
    top = plain.topk(min(12, len(plain))).indices
    fig, axes = figure(title, "next byte", "share of the draws", rows=2, columns=2, height=6)
    highest = max(shares.max() for shares in bars.values())
    labels = [label_of(byte) for byte in top.tolist()]
    positions = range(len(top))
    for ax, (name, shares) in zip(axes.flat, bars.items()):
        ax.bar(positions, shares[top].tolist(), color="C0", alpha=0.7, label="drawn")
        outline = {"facecolor": "none", "edgecolor": "black", "label": "the model's softmax"}
        ax.bar(positions, plain[top].tolist(), **outline)
        ax.set_title(f"{name}: {(shares > 0).sum()} different bytes were drawn", fontsize=10)
        ax.set_xticks(positions, labels)
        ax.set_ylim(0, 1.1 * highest)
    axes[0, 0].legend(fontsize=9)
    save_figure(fig, path)


def draw_scores(scores, title, path):
    """Quality against variety, a line per knob. scores: {(knob, value): what score() returns}."""
    xlabel = "distinct-2, share of word pairs that are different"
    fig, axes = figure(title, xlabel, columns=2, height=5)
    kinds = {"words": "words that exist, %", "sentences": "sentences that fit a pattern, %"}
    for ax, (kind, label) in zip(axes, kinds.items()):
        for knob, values in FAMILIES.items():
            x = [scores[knob, value]["distinct"] for value in values]
            y = [100 * scores[knob, value][kind] for value in values]
            ax.plot(x, y, "o-", label=knob.replace("_", "-"))
            for i, value in enumerate(values):
                # The three lines meet at plain sampling, which needs one label only.
                if (knob, value) in (("top_k", 256), ("top_p", 1.0)):
                    continue
                text = "plain" if (knob, value) == ("temperature", 1.0) else value
                offset = {"xytext": (4, 4), "textcoords": "offset points"}
                ax.annotate(text, (x[i], y[i]), **offset, fontsize=8)
        ax.set(ylabel=label, ylim=(-3, 103))
        ax.xaxis.label.set_size(9)
    axes[0].legend()
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    out = output_folder(cfg)

    # model and prompt; a blank line stands between two stories
    checkpoint = load_checkpoint(require(cfg.init), "gpt")
    model = load_model(checkpoint, cfg.init).to(device)
    prompt = torch.tensor([encode("\n\n" + cfg.prompt)], device=device)

    # one distribution under four settings
    with torch.no_grad():
        logits, _ = model(prompt[:, -model.cfg.block_size :])
    logits = logits[0, -1]  # (V,)
    plain = logits.softmax(dim=-1)
    bars = {}
    different = {}
    for name, options in BARS.items():
        bars[name] = draw_shares(logits, cfg.draws, **options).cpu()
        different[name] = (bars[name] > 0).sum().item()
    likeliest = plain.argmax().item()
    title = (
        f"After {cfg.prompt!r}: top-k 3 leaves {different['top-k 3']} bytes, top-p 0.7 leaves "
        f"{different['top-p 0.7']},\ntemperature 0.5 raises the likeliest from "
        f"{plain[likeliest]:.0%} to {bars['temperature 0.5'][likeliest]:.0%}"
    )
    draw_bars(bars, plain.cpu(), title, out / "demo_sampling_bars.png")

    # quality against variety
    folder = require("data/stories")
    known_words = set(whole_words(read_text(folder / "train.txt")))
    patterns = story_patterns(folder / "facts.json")
    settings = []
    for knob, values in FAMILIES.items():
        settings += [(knob, value) for value in values]
    log = Log(out, len(settings), name="demo_sampling")
    scores = {}
    for i, (knob, value) in enumerate(settings):
        torch.manual_seed(cfg.seed)
        prompts = prompt.expand(cfg.samples, -1)
        rows = model.generate(prompts, cfg.length, **{knob: value})[:, prompt.size(1) :]
        texts = [decode(row) for row in rows.tolist()]
        scores[knob, value] = score(cfg.prompt, texts, known_words, patterns)
        log(i, **{knob: value}, **scores[knob, value])

    # the finding
    knob, value = max(scores, key=lambda setting: scores[setting]["words"])
    best = scores[knob, value]
    plain_score = scores["temperature", 1.0]
    best_fit = max(numbers["sentences"] for numbers in scores.values())
    title = (
        f"Plain sampling: {plain_score['words']:.0%} real words, distinct-2 "
        f"{plain_score['distinct']:.2f}. {knob} {value}: {best['words']:.0%} and "
        f"{best['distinct']:.2f}\nSentences that fit a pattern: {best_fit:.0%} at best"
    )
    print(title)
    draw_scores(scores, title, out / "demo_sampling.png")
    save_metrics(
        out,
        name="demo_sampling",
        seed=cfg.seed,
        seconds=log.seconds,
        samples=cfg.samples,
        kept=different,
        scores={f"{knob}={value}": numbers for (knob, value), numbers in scores.items()},
    )
