"""
Part 10: what tokens cannot see. Models on tokens, on bytes and on patches learn to spell, to count
letters, to swap and to reverse them. Then they are asked about words that were not in training.

    python part_10/demo_spelling.py                 the world's words, one seed
    python part_10/demo_spelling.py --seeds=3       three seeds: how much is chance?
    python part_10/demo_spelling.py --data=my.txt   the words of any text

    Spell the word drum.        d-r-u-m
    How often is o in spoon?    2
    Swap the ends of kite.      eitk
    Reverse the word kite.      etik

To a model on tokens "drum" is a single number. Nothing in it says that the word has an r in it, so
each spelling has to be learned by heart. A model on bytes reads the letters, and can copy them.

The models are those that demo_patches.py has trained; the missing ones are trained first. All are
tuned on the same exercises in the same order. Half of these are about words of the text, and half
about words that are made up, each of them new: a few words could be learned by heart by any model,
and only new ones force it to learn the skill. Two arms have no embeddings of hashed n-grams: these
say at once which word this is, but not which letters it has.

The world has a skill of this kind, too: "Spell the word fox." The models of Parts 6 to 9 never
learn it, because they are asked about words whose spelling they have not seen. These words are held
out here as well, and Part 6's model is asked beside the others.

The second panel of the figure is about typing errors: how much does the loss on the text rise if a
share of its letters is replaced by random ones?
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

import demo_patches
import train_blt
from model import GPT
from shared import (
    fail,
    figure,
    judge,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    read_jsonl,
    require,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import Tokenizer

TASKS = ("spell", "count", "swap", "reverse")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
LONGEST_WORD = 12  # letters
MOST_WORDS = 2200  # the most frequent ones of a text
LONGEST_ANSWER = 2 * LONGEST_WORD + 1  # ids, with the line end


# Those of demo_patches.ARMS that are tuned.
ARMS = [
    "GPT on BPE tokens",
    "GPT on bytes",
    "GPT on bytes, n-grams",
    "BLT, global rule",
    "BLT, no n-grams",
]


@dataclass
class Config:
    data: str = "stories"  # stories (the built-in world) or a text file
    vocab_size: int = 1024  # tokens of the BPE tokenizer
    models: str = ""  # folder with the models of demo_patches.py; empty: where its default run is
    steps: int = 240  # optimizer steps of the tuning
    batch_size: int = 48  # exercises per step
    lr: float = 0.02  # learning rate of Muon
    lr_adamw: float = 3e-3  # learning rate of AdamW
    share: float = 0.2  # share of the words that are held out, and only asked about in the end
    asked: int = 50  # most held-out words that are asked about, in each task
    wrong: float = 0.05  # share of the letters that a typing error replaces
    eval_bytes: int = 60_000  # bytes of text on which typing errors are measured
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "asked", "eval_bytes", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert 0 < self.share < 1, f"share={self.share} must be between 0 and 1"


# words and exercises ------------------------------------------------------------------------------


class Words(NamedTuple):
    train: list
    held_out: list
    official: list  # those held-out words that the world's own skill asks about
    known: set  # all words of the text in small letters; no made-up word is one of them


def official_words():
    """The words whose spelling the world's instructions ask about only in validation."""
    folder = require("data/stories")
    words = set()
    for record in read_jsonl(folder / "instructions_val.jsonl", ["instruction", "task"]):
        if record["task"] == "spell":
            words.add(record["instruction"].removesuffix(".").split()[-1])
    return sorted(words)


def split_words(text, cfg, seed):
    """The most frequent words of the training text, in two random parts -> Words. The world's
    official words are always held out."""
    counts = Counter(re.findall(rf"\b[A-Za-z]{{3,{LONGEST_WORD}}}\b", text.train))
    words = [word for word, _ in counts.most_common(MOST_WORDS)]
    if len(words) < 8:
        fail(f"--data={cfg.data} has only {len(words)} different words of three letters or more")
    official = official_words() if cfg.data == "stories" else []

    rng = random.Random(seed)
    others = [word for word in words if word not in official]
    rng.shuffle(others)
    n_held_out = max(1, round(cfg.share * len(words)) - len(official))
    known = {word.lower() for word in counts}
    return Words(others[n_held_out:], official + others[:n_held_out], official, known)


class Exercise(NamedTuple):
    request: str
    answer: str


def exercise(task, word, rng):
    """One exercise about a word."""
    if task == "spell":
        return Exercise(f"Spell the word {word}.", "-".join(word))
    if task == "swap":
        swapped = word[-1] + word[1:-1] + word[0]
        return Exercise(f"Swap the ends of {word}.", swapped)
    if task == "reverse":
        return Exercise(f"Reverse the word {word}.", word[::-1])

    # A random letter would hardly ever occur, and "0" would be a good guess. So the count is drawn
    # first: 0, 1 or 2 with equal probability, if the word has a letter that occurs so often.
    lower = word.lower()
    letters_of = {}
    for letter in ALPHABET:
        letters_of.setdefault(lower.count(letter), []).append(letter)
    wanted = rng.choice([count for count in (0, 1, 2) if count in letters_of])
    letter = rng.choice(letters_of[wanted])
    return Exercise(f"How often is {letter} in {word}?", str(wanted))


def made_up_word(rng, known):
    """A word of one to three syllables, such as "lorbimo", that is none of the known ones. Some end
    with a doubled letter, so that there are twos to count."""
    while True:
        word = ""
        for _ in range(rng.choice([1, 2, 2, 3])):
            word += rng.choice(CONSONANTS) + rng.choice(VOWELS)
            if rng.random() < 0.5:
                word += rng.choice(CONSONANTS)
        if len(word) == 2 or rng.random() < 0.25:
            word += word[-1]
        if word not in known:
            return word


def draw_exercise(words, rng):
    """A random exercise, about a word of the text or about one that is made up. Spelling comes
    twice as often as each of the other tasks, because it is the one that everything turns on."""
    word = rng.choice(words.train)
    if rng.random() < 0.5:
        word = made_up_word(rng, words.known)
    return exercise(rng.choice([*TASKS, "spell"]), word, rng)


def encode_exercise(item, tok):
    """An exercise in the form of the text's documents -> the ids of the request and of the answer.
    A blank line comes first, and the answer ends with its line."""
    return tok.encode(f"\n\n{item.request}\n"), tok.encode(f"{item.answer}\n")


def collate(pairs):
    """Pairs of ids (request, answer) -> inputs (B, T), and targets (B, T) that are -100 where the
    next id is not part of an answer."""
    longest = max(len(request) + len(answer) for request, answer in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)
    targets = torch.full((len(pairs), longest), -100)
    for row, (request, answer) in enumerate(pairs):
        end = len(request) + len(answer)
        ids[row, :end] = torch.tensor(request + answer)
        targets[row, len(request) : end] = torch.tensor(answer)
    return ids[:, :-1], targets[:, 1:]


# training and examination -------------------------------------------------------------------------


def tune(model, tok, words, cfg, seed):
    """Trains the model in place on random exercises. Every model gets the same
    ones: they depend on the seed and the step alone."""
    run = train_blt.Config(lr=cfg.lr, lr_adamw=cfg.lr_adamw)

    def batch_of(step):
        rng = random.Random(f"{seed} {step}")
        items = [draw_exercise(words, rng) for _ in range(cfg.batch_size)]
        return collate([encode_exercise(item, tok) for item in items])

    train_blt.fit(model, batch_of, cfg.steps, run)


def answers_to(model, tok, requests):
    """The likeliest answers to requests (texts), up to their line ends -> texts."""
    line_ends = {i for i in range(tok.vocab_size) if "\n" in tok.decode([i])}
    rows = [tok.encode(f"\n\n{request}\n") for request in requests]
    new = train_blt.generate(model, rows, LONGEST_ANSWER, stop=line_ends.__contains__)
    return [tok.decode(ids).split("\n")[0] for ids in new]


def share_right(items, answers):
    """What share of the answers is right? By the judge of the world."""
    right = 0
    for item, answer in zip(items, answers):
        right += judge({"check": {"answer": item.answer}}, answer).passed
    return right / len(items)


def examination(task, words, seed):
    """One exercise about each of the words."""
    rng = random.Random(f"{seed} {task}")
    return [exercise(task, word, rng) for word in words]


def best_guess(items):
    """The share of the exercises that one and the same answer would be right for."""
    answers = Counter(item.answer for item in items)
    return max(answers.values()) / len(items)


def examine(model, tok, words, seed):
    """One exercise of each task about each of the words -> {task: share of right answers}."""
    shares = {}
    for task in TASKS:
        items = examination(task, words, seed)
        shares[task] = share_right(items, answers_to(model, tok, [i.request for i in items]))
    return shares


def ask_sft_model(words, device):
    """Part 6's model spells these words, in its own chat format -> the share of right answers. It
    has been tuned on the world's instructions, among them the spelling of other words."""
    checkpoint = load_checkpoint(require("part_6/out/sft.pt"), "sft")
    model = GPT.load(checkpoint).to(device)
    tok = Tokenizer.load(checkpoint["tokenizer"])
    items = [exercise("spell", word, None) for word in words]
    rows = []
    for item in items:
        request = tok.encode(item.request)
        rows.append([tok.special["<|user|>"], *request, tok.special["<|assistant|>"]])
    end = tok.special["<|end|>"]
    new = train_blt.generate(model, rows, LONGEST_ANSWER, stop=lambda i: i == end)
    answers = [tok.decode(ids).removesuffix("<|end|>") for ids in new]
    for item, answer in zip(items, answers):
        print(f"    {item.request} -> {answer}")
    return share_right(items, answers)


# typing errors ------------------------------------------------------------------------------------


def mistype(text, share, seed):
    """Replaces this share of the letters by random small letters."""
    rng = random.Random(seed)
    typed = []
    for character in text:
        if character.isalpha() and rng.random() < share:
            character = rng.choice(ALPHABET)
        typed.append(character)
    return "".join(typed)


def loss_under_errors(model, data, text, cfg, seed):
    """How much the loss on the validation text rises with typing errors, in nats per byte. data is
    the text as ids of the model."""
    typed = text._replace(train=text.train[:100_000], val=mistype(text.val, cfg.wrong, seed))
    typed_data = train_blt.encode_data(typed, data.tok, train_blt.BLTConfig().block_size)
    return train_blt.evaluate(model, typed_data) - train_blt.evaluate(model, data)


# the figure ---------------------------------------------------------------------------------------


def mean(values):
    return sum(values) / len(values)


def finding(accuracy):
    """The title of the figure."""
    parts = []
    for name in ("GPT on bytes", "BLT, global rule", "GPT on BPE tokens"):
        shares = [row["spell"] for row in accuracy[name]]
        parts.append(f"{name} {demo_patches.range_text(shares, 2)}")
    return "Right spellings of words that were not in training:\n" + ", ".join(parts)


def draw(title, accuracy, errors, cfg, path):
    """Shares of right answers by task and arm, and the rise of the loss under typing errors."""
    fig, (left, right) = figure(title, columns=2, height=5)
    height = 0.8 / len(accuracy)
    for i, (name, rows) in enumerate(accuracy.items()):
        positions = [task + (i - len(accuracy) / 2 + 0.5) * height for task in range(len(TASKS))]
        means = [mean([row[task] for row in rows]) for task in TASKS]
        left.barh(positions, means, height=height, color=f"C{i}", label=name)
        for row in rows:
            left.plot([row[task] for task in TASKS], positions, "k.", markersize=3)
    left.set_yticks(range(len(TASKS)), TASKS)
    left.set(xlabel="share right, held-out words", xlim=(0, 1.03))
    left.invert_yaxis()

    for name, values in errors.items():
        right.barh(name, mean(values), color=f"C{ARMS.index(name)}")
        right.plot(values, [name] * len(values), "k.")
    right.invert_yaxis()
    right.set(
        title=f"{100 * cfg.wrong:g} % of the letters replaced",
        xlabel="rise of the loss, nats per byte",
    )
    right.tick_params(axis="y", labelsize=9)
    fig.legend(loc="outside lower center", ncols=3, fontsize=9)
    save_figure(fig, path)


def patches_config(cfg):
    """The config with which demo_patches.py trains the models of this demo."""
    argv = [f"--data={cfg.data}", f"--vocab_size={cfg.vocab_size}"]
    argv.append(f"--eval_bytes={cfg.eval_bytes}")
    if cfg.models:
        argv.append(f"--out={cfg.models}")
    return parse_args(demo_patches.Config, argv=argv)


def train_missing(patches_cfg, corpus, seed, device):
    """Trains those models that demo_patches.py has not left behind for this text and this seed
    -> the folder with all of them."""
    folder = demo_patches.model_folder(patches_cfg, output_folder(patches_cfg))
    missing = []
    for name in ARMS:
        if not demo_patches.checkpoint_of(name, seed, folder).exists():
            missing.append(name)
    if missing:
        print(f"seed {seed}: training {len(missing)} models, as demo_patches.py does", flush=True)
        demo_patches.train_all(missing, seed, corpus, patches_cfg, folder, device)
    return folder


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    patches_cfg = patches_config(cfg)
    corpus = demo_patches.load_corpus(patches_cfg)
    split_words(corpus.text, cfg, cfg.seed)  # a text with too few words ends here
    out = output_folder(cfg)

    accuracy = {name: [] for name in ARMS}  # on held-out words
    train_accuracy = {name: [] for name in ARMS}  # on words that were in training
    official = {name: [] for name in ARMS}  # the world's own held-out words
    guesses = []  # what the same answer to all questions for a count would reach
    errors = {name: [] for name in ARMS}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        folder = train_missing(patches_cfg, corpus, seed, device)
        words = split_words(corpus.text, cfg, seed)
        print(f"seed {seed}: {len(words.train)} words, {len(words.held_out)} held out", flush=True)
        asked = words.held_out[: cfg.asked]
        guesses.append(best_guess(examination("count", asked, seed)))
        for name in ARMS:
            path = demo_patches.checkpoint_of(name, seed, folder)
            model, tok = train_blt.load_model(load_checkpoint(path, "blt"))
            model = model.to(device)
            data = corpus.token_data if tok.vocab_size > 256 else corpus.bytes_data
            errors[name].append(loss_under_errors(model, data, corpus.text, cfg, seed))
            tune(model, tok, words, cfg, seed)
            accuracy[name].append(examine(model, tok, asked, seed))
            train_accuracy[name].append(examine(model, tok, words.train[: cfg.asked // 2], seed))
            if words.official:
                items = [exercise("spell", word, None) for word in words.official]
                answers = answers_to(model, tok, [item.request for item in items])
                official[name].append(share_right(items, answers))
            shares = "  ".join(f"{t} {s:.2f}" for t, s in accuracy[name][-1].items())
            known = "  ".join(f"{t} {s:.2f}" for t, s in train_accuracy[name][-1].items())
            print(f"{name:26} held out: {shares}   training words: {known}", flush=True)

    if words.official:
        print("\nthe world's own skill, on its held-out words: share of right answers")
        for name, values in official.items():
            print(f"{name:26} {demo_patches.range_text(values, 2)}")
        print("Part 6's model:")
        official["Part 6, SFT"] = [ask_sft_model(words.official, device)]
        print(f"{'Part 6, SFT':26} {official['Part 6, SFT'][0]:.2f}")
    print(f"\n{100 * cfg.wrong:g} % of the letters replaced: nats per byte more than without")
    for name, values in errors.items():
        print(f"{name:26} {demo_patches.range_text(values)}")

    guess = demo_patches.range_text(guesses, 2)
    print(f"\nalways the same answer to a question for a count: {guess} right")
    title = finding(accuracy)
    print(title)
    save_metrics(
        out,
        name="demo_spelling",
        accuracy=accuracy,
        train_accuracy=train_accuracy,
        official=official,
        count_guess=guesses,
        typing_errors=errors,
        words=len(words.train),
        held_out=len(words.held_out),
        steps=cfg.steps,
        seeds=cfg.seeds,
    )
    draw(title, accuracy, errors, cfg, out / "demo_spelling.png")
