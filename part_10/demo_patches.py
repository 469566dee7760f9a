"""
Part 10: where does the Byte Latent Transformer cut the text, and what does each of its ideas bring
at equal cost?

    python part_10/demo_patches.py                 the world's text, one seed
    python part_10/demo_patches.py --seeds=3       three seeds: how much is chance?
    python part_10/demo_patches.py --data=my.txt   any text
    python part_10/demo_patches.py --sentence="There Mia found the blue kite."

Eight models read equally many bytes and cost about the same number of operations per byte (the
formulas are in train_blt.py): a GPT on BPE tokens; a GPT on bytes, without and with the embeddings
of hashed n-grams that a BLT has; a BLT with each of four rules for cutting; and a BLT without
n-grams. The sizes of the GPTs follow from the cost of the BLT.

The first figure shows the entropies of the small byte model over a sentence, and the patches of
each rule. The second one shows what the models reach.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

import train_blt
from shared import (
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    save_checkpoint,
    save_figure,
    save_metrics,
    set_seed,
)


class Arm(NamedTuple):
    kind: str  # blt, byte or bpe
    options: dict  # fields of BLTConfig that differ from the defaults


ARMS = {
    "GPT on BPE tokens": Arm("bpe", {}),
    "GPT on bytes": Arm("byte", {"ngrams": False}),
    "GPT on bytes, n-grams": Arm("byte", {}),
    "BLT, global rule": Arm("blt", {}),
    "BLT, monotonic rule": Arm("blt", {"patching": "monotonic"}),
    "BLT, static": Arm("blt", {"patching": "static"}),
    "BLT, spaces": Arm("blt", {"patching": "spaces"}),
    "BLT, no n-grams": Arm("blt", {"ngrams": False}),
}


@dataclass
class Config:
    data: str = "stories"  # stories (the built-in world) or a text file
    vocab_size: int = 1024  # tokens of the BPE tokenizer
    steps: int = 150  # optimizer steps of each model
    entropy_steps: int = 200  # optimizer steps of the small byte model whose entropies cut the text
    batch_size: int = 8  # rows of 256 bytes per step
    lr: float = 0.02  # learning rate of Muon
    lr_adamw: float = 8e-3  # learning rate of AdamW
    patch_bytes: float = 4.5  # wanted mean length of a patch in bytes
    eval_bytes: int = 60_000  # bytes of the validation text that are evaluated
    sentence: str = ""  # what the first figure shows; empty: a line of the validation text
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def run(self, seed, kind):
        """The config of train_blt.py for one model."""
        return train_blt.Config(
            data=self.data,
            vocab_size=self.vocab_size,
            kind=kind,
            steps=self.steps,
            entropy_steps=self.entropy_steps,
            batch_size=self.batch_size,
            lr=self.lr,
            lr_adamw=self.lr_adamw,
            eval_bytes=self.eval_bytes,
            seed=seed,
        )


class Result(NamedTuple):
    loss: float  # nats per byte on the validation text
    bytes_per_unit: float  # mean number of bytes of a patch or of a token
    flops: float  # per byte, forward
    params: int
    seconds: float  # of training


# training -----------------------------------------------------------------------------------------


def checkpoint_of(name, seed, out):
    """Where this demo saves a model."""
    return out / "demo_patches" / f"{name.replace(' ', '_').replace(',', '')}.{seed}.pt"


def model_folder(cfg, out):
    """The folder for the models of a run. It does not depend on options that leave the models as
    they are, so that demo_spelling.py finds them."""
    if cfg.out:
        return out
    neutral = {"seed", "seeds", "sentence", "eval_bytes"}
    model_cfg = replace(cfg)
    model_cfg.changed = {}
    for name, value in cfg.changed.items():
        if name not in neutral:
            model_cfg.changed[name] = value
    return output_folder(model_cfg)


class Corpus(NamedTuple):
    """A text, in the two forms that the models read."""

    text: train_blt.Text
    bytes_data: train_blt.Data
    token_data: train_blt.Data


def load_corpus(cfg):
    """Reads the text and trains the tokenizer."""
    run = cfg.run(0, "bpe")
    text = train_blt.load_text(run)
    block_size = train_blt.BLTConfig().block_size
    bytes_data = train_blt.encode_data(text, train_blt.Bytes(), block_size, cfg.data)
    tok = train_blt.bpe_tokenizer(text, cfg.vocab_size)
    token_data = train_blt.encode_data(text, tok, block_size, cfg.data)
    return Corpus(text, bytes_data, token_data)


def train_arm(name, seed, corpus, entropy_model, cfg, device):
    """Trains one of ARMS -> its model and its Result."""
    arm = ARMS[name]
    run = cfg.run(seed, arm.kind)
    blt_cfg = replace(train_blt.BLTConfig(patch_bytes=cfg.patch_bytes), **arm.options)
    data = corpus.token_data if arm.kind == "bpe" else corpus.bytes_data
    made = train_blt.make_model(run, blt_cfg, data, entropy_model, device)

    def batch_of(step):
        return train_blt.get_batch(data, step, run.batch_size, seed)

    start = time.time()
    train_blt.fit(made.model, batch_of, run.steps, run)
    seconds = time.time() - start

    params = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    loss = train_blt.evaluate(made.model, data)
    return made.model, Result(loss, made.bytes_per_unit, made.flops, params, seconds)


def train_all(names, seed, corpus, cfg, out, device):
    """Trains these ARMS with one seed and saves them in a folder -> {name: Result}, and the entropy
    model that the BLTs share."""
    run = cfg.run(seed, "blt")
    blt_cfg = train_blt.BLTConfig()
    entropy_model = train_blt.train_entropy_model(corpus.bytes_data, run, blt_cfg, device)
    results = {}
    for name in names:
        model, result = train_arm(name, seed, corpus, entropy_model, cfg, device)
        results[name] = result
        content = train_blt.to_checkpoint(ARMS[name].kind, model, corpus.token_data.tok)
        path = checkpoint_of(name, seed, out)
        save_checkpoint(path, kind="blt", data=cfg.data, **content)
        print(
            f"seed {seed}  {name:22} {result.loss:.4f} nats per byte, "
            f"{result.bytes_per_unit:.2f} bytes per unit, {result.flops / 1e3:.0f} kFLOPs per "
            f"byte, {result.params:,} parameters, {result.seconds:.0f} s",
            flush=True,
        )
    return results, entropy_model


# the figures --------------------------------------------------------------------------------------


def cut(data, starts):
    """A text (bytes) and where its patches start (a bool for each byte) -> a list of patches."""
    patches = []
    for byte, start in zip(data, starts):
        if start:
            patches.append(b"")
        patches[-1] += bytes([byte])
    return patches


class Cut(NamedTuple):
    """A sentence, cut by the four rules."""

    data: bytes
    entropy: list  # of each byte in nats, given the bytes before it; 0 for the first
    threshold: float  # of the global rule
    starts: dict  # {rule: a bool for each byte}


def default_sentence(text):
    """What the first figure shows: the longest of the first ten lines, cut to 72 bytes. Many texts
    have lines that are empty or very short, and these would show nothing."""
    longest = max(text.split("\n")[:10], key=len)
    return longest.encode()[:72].decode(errors="ignore")


def cut_sentence(sentence, entropy_model, corpus, cfg, device):
    """The patches of a sentence by each rule -> Cut."""
    x, _ = train_blt.get_batch(corpus.bytes_data, 0, 64, cfg.seed + 2)
    data = sentence.encode()
    idx = torch.tensor([list(data)], device=device)
    starts = {}
    for rule in train_blt.RULES:
        blt_cfg = train_blt.BLTConfig(patching=rule, patch_bytes=cfg.patch_bytes)
        patcher = train_blt.Patcher(blt_cfg, entropy_model).to(device)
        patcher.set_threshold(x.to(device), cfg.patch_bytes)
        starts[rule] = patcher(idx)[0, :-1].tolist()
        if rule == "global":
            threshold = patcher.threshold.item()
            entropy = [0.0, *patcher.entropy(idx)[0, :-1].tolist()]
    return Cut(data, entropy, threshold, starts)


def draw_patches(result, path):
    """The entropies over a sentence, and below it the patches of each rule."""
    n = len(result.data)
    lengths = {rule: n / sum(starts) for rule, starts in result.starts.items()}
    title = "Patches start where the next byte is uncertain: "
    title += f"{sum(result.starts['global'])} patches of {lengths['global']:.1f} bytes"
    fig, (top, bottom) = figure(title, rows=2, height=5)

    top.bar(range(n), result.entropy, color="C5", width=0.9)
    above = [i for i in range(n) if result.entropy[i] > result.threshold]
    top.bar(above, [result.entropy[i] for i in above], color="C3", width=0.9)
    label = f"threshold of the global rule, {result.threshold:.2f} nats"
    top.axhline(result.threshold, color="black", linestyle="--", linewidth=1, label=label)
    top.set(ylabel="entropy of the byte\nin nats", xlim=(-0.6, n - 0.4), xticks=[])
    top.legend(fontsize=9)

    # One line of characters for each rule, with a box around every second patch.
    characters = [chr(byte) if 32 <= byte < 127 else "·" for byte in result.data]
    for row, (rule, starts) in enumerate(result.starts.items()):
        number = 0
        for i, start in enumerate(starts):
            number += start
            colour = "#56B4E9" if number % 2 else "#F0E442"
            bottom.barh(row, 1, left=i - 0.5, height=0.8, color=colour, alpha=0.45)
            bottom.text(i, row, characters[i], ha="center", va="center", fontsize=9)
    names = [f"{rule}\n{lengths[rule]:.1f} bytes" for rule in result.starts]
    bottom.set_yticks(range(len(names)), names)
    bottom.set(xlim=(-0.6, n - 0.4), xticks=[], ylim=(len(names) - 0.4, -0.6))
    bottom.grid(False)
    save_figure(fig, path)


def range_text(values, digits=3):
    """The range of several numbers: "0.421 to 0.473", or one number if they look the same."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def finding(losses):
    """The title of the second figure: what do patches bring, and what do n-grams?"""
    blt = [losses[name] for name in losses if name.startswith("BLT") and "no n-" not in name]
    n_grams = losses["BLT, global rule"], losses["BLT, no n-grams"]
    rules = [sum(values) / len(values) for values in blt]
    best = min(losses, key=lambda name: sum(losses[name]) / len(losses[name]))
    lines = [
        f"Lowest loss: {best}, {range_text(losses[best])} nats per byte",
        f"BLT with n-grams {range_text(n_grams[0])}, without {range_text(n_grams[1])}; "
        f"the four rules differ by {max(rules) - min(rules):.3f}",
    ]
    return "\n".join(lines)


def draw_arms(results, entropy, path):
    """results: {name: [Result of each seed]}."""
    losses = {name: [result.loss for result in rows] for name, rows in results.items()}
    fig, ax = figure(finding(losses), "nats per byte on the validation text", height=5)
    colours = {"bpe": "C1", "byte": "C2", "blt": "C0"}
    for name, values in losses.items():
        mean = sum(values) / len(values)
        rows = results[name]
        flops = sum(result.flops for result in rows) / len(rows) / 1e3
        size = sum(result.bytes_per_unit for result in rows) / len(rows)
        ax.barh(name, mean, color=colours[ARMS[name].kind], alpha=0.8)
        ax.plot(values, [name] * len(values), "k.")  # a dot per seed
        text = f"  {mean:.3f}  ({flops:.0f} kFLOPs, {size:.1f} bytes per unit)"
        ax.text(max(values), name, text, va="center", fontsize=9)
    if entropy:
        ax.axvline(entropy, color="black", linestyle="--", linewidth=1, label="true entropy")
        fig.legend(loc="outside lower right", fontsize=9)
    highest = max(max(values) for values in losses.values())
    ax.set(xlim=(0, 1.9 * highest))
    ax.invert_yaxis()
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    if cfg.sentence and len(cfg.sentence.encode()) > train_blt.BLTConfig().block_size:
        fail(f"--sentence must have at most {train_blt.BLTConfig().block_size} bytes")
    corpus = load_corpus(cfg)
    out = output_folder(cfg)

    results = {name: [] for name in ARMS}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        folder = model_folder(cfg, out)
        of_seed, entropy_model = train_all(ARMS, seed, corpus, cfg, folder, device)
        for name, result in of_seed.items():
            results[name].append(result)

        # the sentence, cut by the first seed's entropy model
        if seed == cfg.seed:
            sentence = cfg.sentence or default_sentence(corpus.text.val)
            sentence_cut = cut_sentence(sentence, entropy_model, corpus, cfg, device)

    print("\npatches of one sentence")
    for rule, starts in sentence_cut.starts.items():
        patches = cut(sentence_cut.data, starts)
        print(f"{rule:10}", "|".join(p.decode("utf-8", errors="replace") for p in patches))
    losses = {name: [result.loss for result in rows] for name, rows in results.items()}
    print("\n" + finding(losses))

    save_metrics(
        out,
        name="demo_patches",
        columns=Result._fields,
        results=results,
        true_nats_per_byte=corpus.text.entropy,
        sentence=sentence,
        starts=sentence_cut.starts,
        threshold=sentence_cut.threshold,
        steps=cfg.steps,
        seeds=cfg.seeds,
    )
    draw_patches(sentence_cut, out / "demo_patches.png")
    draw_arms(results, corpus.text.entropy, out / "demo_patches_arms.png")
