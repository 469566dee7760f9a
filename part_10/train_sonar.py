"""
Part 10: a sentence becomes one vector, and the vector becomes the same sentence again.

    python part_10/train_sonar.py                  sentences of the world's stories -> out/sonar.pt
    python part_10/train_sonar.py --noise=0        without noise on the vectors: what is lost?
    python part_10/train_sonar.py --data=my.txt --steps=2000     sentences of your own text

Starts here. orthogonalize, Muon, lr_scale and set_lr are those of part_4/train.py, and
make_optimizers is nearly its.

A Large Concept Model (Barrault et al. 2024) predicts the next sentence instead of the next token.
It never sees a token: it reads and writes vectors, one for each sentence. So something must turn
sentences into vectors and vectors into sentences. In the paper this is SONAR (Duquenne et al.
2023), an encoder and a decoder trained on 200 languages. Here it is a small autoencoder:

    encoder   tokens -> one block, every token sees all others -> mean over the tokens -> vector
    decoder   the vector is added to every token's embedding -> one causal block -> next token

Noise is added to the vector in training, so that the decoder also understands vectors that no
sentence has exactly. Those are what a model writes that predicts vectors. The noise comes late: a
decoder that cannot read the vectors yet would learn to ignore them.

train_lcm.py is the model that predicts the vectors, and demo_semantic_space.py draws their space.

Shapes: B batch, T time, C channels (= n_embd), D numbers in a sentence vector (= dim).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Block, GPTConfig, KVCache, RMSNorm, causal_mask, rope_table
from shared import (
    Log,
    fail,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    read_log,
    read_text,
    require,
    save_checkpoint,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import Tokenizer

THE_END = "The end."  # the sentence after the last one of every document


@dataclass
class Config:
    # data
    data: str = "stories"  # stories (the built-in world) or a text file, blank lines between texts
    init: str = ""  # checkpoint whose tokenizer is used; empty: part_4/out/base.pt
    longest: int = 48  # tokens of a sentence; longer ones are cut
    # model
    n_layer: int = 1  # blocks of the encoder, and as many of the decoder
    n_embd: int = 64  # C, channels of the encoder and of the decoder
    dim: int = 64  # D, numbers in the vector of a sentence
    # training
    steps: int = 500  # optimizer steps
    batch_size: int = 128  # sentences per step, drawn as often as they occur in the text
    lr: float = 0.02  # learning rate of Muon, for the blocks' matrices; an update has RMS 0.2 lr
    lr_adamw: float = 5e-3  # learning rate of AdamW, for everything else
    warmup: float = 0.03  # share of the steps in which the learning rate rises to its peak
    decay: float = 0.5  # share of the steps, at the end, in which it falls linearly to 0
    grad_clip: float = 1.0  # largest norm of the gradient; a larger one is scaled down

    # largest standard deviation of the noise on a vector, whose numbers have mean square 1
    noise: float = 0.7

    # run
    eval_every: int = 100  # steps between evaluations on held-out sentences; 0: only at the end
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "longest", "n_layer", "n_embd", "dim"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.n_embd % 8 == 0, (
            f"n_embd={self.n_embd} must be divisible by 8: 4 heads of pairs"
        )
        assert self.noise >= 0, f"noise={self.noise} must not be negative"


# data ---------------------------------------------------------------------------------------------


def split_sentences(text):
    """ "Tom ran. Tom fell." -> ["Tom ran.", "Tom fell."]. A line break also ends a sentence."""
    parts = re.split(r"(?<=[.!?]) +|\n+", text.strip())
    return [part.strip() for part in parts if part.strip()]


def load_documents(data):
    """The documents for training and for validation, each a list of sentences with THE_END as its
    last one -> (train, val).

    Of the world's text these are the stories with a brief: two sentences of the brief, five of the
    story, and the end. Of any other text the last tenth of the documents is held out.
    """
    if data == "stories":
        folder = require("data/stories")
        train, val = [], []
        for documents, name in ((train, "train.txt"), (val, "val.txt")):
            for text in read_text(folder / name).split("\n\n"):
                if text.startswith("Write a story"):
                    documents.append([*split_sentences(text), THE_END])
        return train, val

    documents = []
    for text in re.split(r"\n\s*\n", read_text(data)):
        sentences = split_sentences(text)
        if sentences:
            documents.append([*sentences, THE_END])
    split = int(0.9 * len(documents))
    if split == 0:
        fail(f"--data={data}: one document is not enough, put blank lines between several")
    return documents[:split], documents[split:]


def pad(rows, value):
    """Lists of token ids -> ids (B, T), padded on the right, and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), value)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, lengths


# the model ----------------------------------------------------------------------------------------


class Sonar(nn.Module):
    """The autoencoder of sentences, in SONAR's place. Both halves share the embedding table."""

    def __init__(self, cfg, dim, tok):
        super().__init__()
        self.cfg = cfg
        self.dim = dim
        self.tok = tok
        self.start = tok.special["<|endoftext|>"]  # the decoder's first input
        self.end = tok.special["<|end|>"]  # stands after the last token of a sentence

        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.encoder = nn.ModuleList([Block(cfg, layer) for layer in range(cfg.n_layer)])
        self.to_vector = nn.Linear(cfg.n_embd, dim)
        self.from_vector = nn.Linear(dim, cfg.n_embd)
        self.decoder = nn.ModuleList([Block(cfg, layer) for layer in range(cfg.n_layer)])
        self.ln_f = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def encode(self, ids, lengths):
        """Token ids (B, T), padded on the right, and their lengths (B,) -> vectors (B, D).

        The numbers of a vector have mean 0 and mean square 1.
        """
        positions = torch.arange(ids.size(1), device=ids.device)
        is_token = positions < lengths[:, None]  # (B, T)
        cos, sin = rope_table(positions, self.cfg.head_dim, self.cfg.rope_base)

        # Every token sees all tokens of its sentence, but not the padding.
        x = self.wte(ids)  # (B, T, C)
        for block in self.encoder:
            x = block(x, is_token[:, None, None, :], cos, sin, None)

        # The mean over the tokens of the sentence.
        x = x * is_token[:, :, None]
        x = x.sum(dim=1) / lengths[:, None]  # (B, C)
        return F.layer_norm(self.to_vector(x), (self.dim,))

    def decode(self, vectors, ids, cache=None):
        """Vectors (B, D) and the decoder's inputs (B, T), the first of which is `start`
        -> logits (B, T, V) of the next tokens.

        With a cache, ids are the inputs after those that the cache holds.
        """
        start = 0 if cache is None else cache.length
        k_pos = torch.arange(start + ids.size(1), device=ids.device)
        q_pos = k_pos[start:]
        cos, sin = rope_table(q_pos, self.cfg.head_dim, self.cfg.rope_base)
        mask = causal_mask(q_pos, k_pos)

        x = self.wte(ids) + self.from_vector(vectors)[:, None, :]  # (B, T, C)
        for block in self.decoder:
            x = block(x, mask, cos, sin, cache)
        if cache is not None:
            cache.length += ids.size(1)
        return self.lm_head(self.ln_f(x))

    @torch.no_grad()
    def generate(self, vectors):
        """Vectors (B, D) -> ids (B, T): the likeliest token, again and again, up to `end` or up to
        the longest sentence. Behind its end a row has only `end`."""
        B = vectors.size(0)
        cache = KVCache(self.cfg, B, vectors.device, vectors.dtype)
        token = torch.full((B, 1), self.start, device=vectors.device)
        ended = torch.zeros(B, dtype=torch.bool, device=vectors.device)
        tokens = []
        for _ in range(self.cfg.block_size):
            token = self.decode(vectors, token, cache)[:, -1:].argmax(dim=-1)  # (B, 1)
            token = token.masked_fill(ended[:, None], self.end)
            tokens.append(token)
            ended = ended | (token[:, 0] == self.end)
            if ended.all():
                break
        return torch.cat(tokens, dim=1)

    def token_rows(self, sentences):
        """Sentences -> lists of token ids, cut to the longest that the model reads."""
        return [self.tok.encode(sentence)[: self.cfg.block_size - 1] for sentence in sentences]

    @torch.no_grad()
    def vectors_of(self, sentences):
        """A list of N sentences -> their vectors (N, D)."""
        device = self.wte.weight.device
        vectors = []
        for i in range(0, len(sentences), 1024):
            ids, lengths = pad(self.token_rows(sentences[i : i + 1024]), self.end)
            vectors.append(self.encode(ids.to(device), lengths.to(device)))
        return torch.cat(vectors)

    @torch.no_grad()
    def sentences_of(self, vectors):
        """Vectors (N, D) -> a list of N sentences."""
        sentences = []
        for part in vectors.split(1024):
            for row in self.generate(part).tolist():
                if self.end in row:
                    row = row[: row.index(self.end)]
                sentences.append(self.tok.decode(row))
        return sentences

    def to_checkpoint(self):
        """The model as plain data, for save_checkpoint."""
        return {
            "gpt_config": asdict(self.cfg),
            "dim": self.dim,
            "tokenizer": self.tok.state(),
            "weights": self.state_dict(),
        }

    @classmethod
    def load(cls, checkpoint):
        """The model that to_checkpoint() described."""
        tok = Tokenizer.load(checkpoint["tokenizer"])
        model = cls(GPTConfig(**checkpoint["gpt_config"]), checkpoint["dim"], tok)
        model.load_state_dict(checkpoint["weights"])
        return model


# the loss -----------------------------------------------------------------------------------------


def noise_level(step, cfg):
    """The largest noise of a step: none in the first fifth of the steps, then more and more, and
    all of cfg.noise from three fifths on."""
    share = (step / cfg.steps - 0.2) / 0.4
    return cfg.noise * min(1.0, max(0.0, share))


def add_noise(vectors, level):
    """Vectors (B, D) + normal noise. How strong it is differs from row to row, from 0 to level."""
    strength = level * torch.rand_like(vectors[:, :1])  # (B, 1)
    return vectors + strength * torch.randn_like(vectors)


def reconstruction_loss(model, rows, level):
    """Lists of token ids -> the mean loss in nats per token of writing the same sentences again,
    each with its end, from vectors with noise up to this level."""
    device = model.wte.weight.device
    ids, lengths = pad(rows, model.end)
    vectors = model.encode(ids.to(device), lengths.to(device))  # (B, D)
    vectors = add_noise(vectors, level)

    # The decoder reads the sentence one token late: `start`, then the tokens.
    inputs, _ = pad([[model.start, *row] for row in rows], model.end)
    targets, _ = pad([[*row, model.end] for row in rows], -100)  # cross-entropy leaves out -100
    logits = model.decode(vectors, inputs.to(device))  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten(), ignore_index=-100)


# learning rate and optimizers ---------------------------------------------------------------------


def lr_scale(step, cfg):
    """The learning rate of a step (0, 1, ...) as a share of its peak: warm up, hold, then decay
    linearly to 0 (WSD, Hu et al. 2024)."""
    rise = (step + 1) / max(1.0, cfg.warmup * cfg.steps)  # the first step learns already
    fall = (cfg.steps - step) / max(1.0, cfg.decay * cfg.steps)  # and the last step still does
    return max(0.0, min(1.0, rise, fall))


def orthogonalize(matrix):
    """Brings the singular values of a matrix (rows, columns) near 1 and keeps its singular vectors:
    five steps of a Newton-Schulz iteration (Jordan et al. 2024). Afterwards they are between 0.7
    and 1.2, apart from those that were below 1/500 of the norm of the matrix.

    Each step applies f(s) = a s + b s^3 + c s^5 to every singular value s. The constants are tuned
    to let small values grow as fast as possible; the price is that f does not converge to 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    dtype = torch.bfloat16 if matrix.is_cuda else torch.float32  # many CPUs only emulate bf16
    x = matrix.to(dtype)

    # The wide form makes the products x x^T small. Scaling brings all singular values below 1.
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)

    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x

    if tall:
        x = x.T
    return x.to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024, "Muon"). All directions of a matrix get updates
    of the same size, also those in which its gradient is weak.

    An update has RMS 0.2 lr, about that of AdamW, so that learning rates and weight decay carry
    over (Liu et al. 2025, "Muon is scalable", eq. 4). For hidden matrices only.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue

                # Nesterov momentum: the running mean of the gradients, one step ahead.
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(state["momentum"], group["momentum"])

                # An orthogonal matrix has RMS 1 / sqrt(its longer side). Bring it to 0.2.
                update = orthogonalize(ahead) * 0.2 * max(p.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * update)


def make_optimizers(model, cfg):
    """Muon for the blocks' matrices, AdamW for all other parameters -> a list of both.

    Blocks stand in lists, so the names of their parameters have a number, as in
    encoder.0.attn.c_q.weight.
    """
    hidden = []
    others = []
    for name, p in model.named_parameters():
        in_block = re.search(r"\.\d+\.", name) is not None
        if in_block and p.ndim == 2:
            hidden.append(p)
        else:
            others.append(p)

    muon = Muon(hidden, lr=cfg.lr)
    adamw = torch.optim.AdamW(others, lr=cfg.lr_adamw, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def set_lr(optimizers, scale):
    """Sets every learning rate to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


def update(model, loss, optimizers, grad_clip):
    """One optimizer step along the gradient of this loss -> the norm that the gradient had."""
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return grad_norm.item()


# evaluate, draw -----------------------------------------------------------------------------------


@torch.no_grad()
def exact_share(model, sentences, noise=0.0):
    """The share of sentences that come back without any change, with noise of this standard
    deviation on their vectors."""
    vectors = model.vectors_of(sentences)
    vectors = vectors + noise * torch.randn_like(vectors)
    pairs = zip(sentences, model.sentences_of(vectors))
    return sum(before == after for before, after in pairs) / len(sentences)


class HeldOut(NamedTuple):
    """Held-out sentences: as often as they occur, those that training never showed, and by their
    place in the document."""

    all: list
    new: list
    by_place: dict


def held_out_sentences(train, val):
    """The sentences of the validation documents -> HeldOut."""
    known = {sentence for document in train for sentence in document}
    sentences = []
    by_place = defaultdict(list)
    for document in val:
        for place, sentence in enumerate(document):
            sentences.append(sentence)
            by_place[place].append(sentence)
    new = [sentence for sentence in sentences if sentence not in known]
    return HeldOut(sentences, new, by_place)


def draw(records, exact, path):
    """The loss and the noise over the steps, and how many held-out sentences come back."""
    title = f"{exact:.3f} of the held-out sentences come back from their vector without any change"
    fig, (left, right) = figure(title, "optimizer step", columns=2, height=3.8)
    steps = [record["step"] for record in records]
    left.plot(steps, [record["loss"] for record in records], label="loss, nats per token")
    left.plot(steps, [record["noise"] for record in records], label="largest noise on a vector")
    left.set(ylim=(0, 7), ylabel="nats per token; standard deviation")
    left.legend()

    evaluations = [record for record in records if "exact" in record]
    steps = [record["step"] for record in evaluations]
    right.plot(steps, [record["exact"] for record in evaluations], "o-", label="without noise")
    right.plot(steps, [record["exact_noisy"] for record in evaluations], "s-", label="noise 0.3")
    right.set(ylim=(0, 1.03), ylabel="share of sentences that come back")
    right.legend(loc="lower right")
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # data
    train, val = load_documents(cfg.data)
    base = load_checkpoint(cfg.init or require("part_4/out/base.pt"), None)
    tok = Tokenizer.load(base["tokenizer"])
    out = output_folder(cfg)
    held_out = held_out_sentences(train, val)
    sentences = [sentence for document in train for sentence in document]

    # model and optimizers
    gpt_cfg = GPTConfig(
        vocab_size=tok.vocab_size,
        block_size=cfg.longest + 1,
        n_layer=cfg.n_layer,
        n_embd=cfg.n_embd,
    )
    model = Sonar(gpt_cfg, cfg.dim, tok).to(device)
    optimizers = make_optimizers(model, cfg)
    rows = model.token_rows(sentences)
    params = sum(p.numel() for p in model.parameters())
    print(
        f"{params:,} parameters, {len(sentences):,} sentences, {len(set(sentences)):,} of them "
        f"different; {len(held_out.all):,} held out, {len(held_out.new):,} of them new"
    )

    # training loop
    log = Log(out, cfg.steps, name="train_sonar")
    generator = torch.Generator().manual_seed(cfg.seed)
    for step in range(cfg.steps):
        set_lr(optimizers, lr_scale(step, cfg))
        level = noise_level(step, cfg)
        choice = torch.randint(len(rows), (cfg.batch_size,), generator=generator)
        loss = reconstruction_loss(model, [rows[i] for i in choice.tolist()], level)
        grad_norm = update(model, loss, optimizers, cfg.grad_clip)

        values = {"loss": loss.item(), "noise": level, "grad_norm": grad_norm}
        last_step = step + 1 == cfg.steps
        if last_step or (cfg.eval_every > 0 and (step + 1) % cfg.eval_every == 0):
            values["exact"] = exact_share(model, held_out.all)
            values["exact_noisy"] = exact_share(model, held_out.all, noise=0.3)
        log(step, **values)
    seconds = log.seconds

    # save the model and what it reached
    by_place = []
    for place, of_place in sorted(held_out.by_place.items()):
        by_place.append(exact_share(model, of_place))
    exact_new = exact_share(model, held_out.new) if held_out.new else None
    save_checkpoint(
        out / "sonar.pt",
        kind="sonar",
        changed=cfg.changed,
        step=cfg.steps,
        config=asdict(cfg),
        seconds=seconds,
        **model.to_checkpoint(),
    )
    save_metrics(
        out,
        name="train_sonar",
        exact=values["exact"],
        exact_noisy=values["exact_noisy"],
        exact_new=exact_new,
        exact_by_place=by_place,
        held_out=len(held_out.all),
        held_out_new=len(held_out.new),
        params=params,
        seconds=seconds,
        steps=cfg.steps,
        seed=cfg.seed,
    )
    draw(read_log(out, "train_sonar"), values["exact"], out / "train_sonar.png")

    # show what it does
    for sentence in held_out.new[:4] or held_out.all[:4]:
        [copy] = model.sentences_of(model.vectors_of([sentence]))
        print(f"\n{sentence}\n{copy}")
    print(f"\n{seconds:.0f} s; share of held-out sentences that come back exactly:")
    print(f"all {values['exact']:.3f}, with noise 0.3 on the vector {values['exact_noisy']:.3f}")
    if exact_new is not None:
        print(f"sentences that training never showed {exact_new:.3f}")
