"""
Part 10: context-modulated attention. A running vector, which says what the text was about so far,
scales and shifts the queries and keys. Does attention need to be told what it could look up?

    python part_10/train_context.py                    one seed, about 4 min
    python part_10/train_context.py --seeds=3          three seeds: how much is chance?
    python part_10/train_context.py --window=16        a window of 16 tokens instead of 8
    python part_10/train_context.py --kinds=plain,film only two of the arms
    python part_10/train_context.py --data=my.txt      your own text, documents between blank lines

Starts here. The optimizers (lr_scale, orthogonalize, Muon, make_optimizers, set_lr) are those of
part_4/train.py. FilmAttention.queries_and_keys and FilmAttention.forward are together
Attention.forward of model.py, with one paragraph more.

The context of a sentence is the running mean of the vectors of all sentences before it. Five kinds
of models use it in different ways:

    plain      not at all
    film       it scales and shifts queries and keys (FiLM: Perez et al. 2018)
    adaln      it scales and shifts what enters the blocks, and scales what leaves them
               (AdaLN-zero: Peebles & Xie 2023)
    add        it is added to the token embeddings
    constant   like film, but with one learned vector in place of the context

Each kind is trained twice: once every token sees all tokens before it, and once it sees only a
short window. All models have the same number of parameters up to a rounding of the MLP's width.
After training, the models with a context are also tested with the context of another story. If a
model gains from what the vector says, and not only from the additional layers, this must hurt.

Shapes: B batch, T time, S sentences, C channels, H heads, D head size, K channels of the context,
        V vocabulary.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Attention, Block, GPTConfig, RMSNorm, rope, rope_table
from shared import (
    Log,
    fail,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    read_facts,
    read_text,
    require,
    save_checkpoint,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import Tokenizer

KINDS = ("plain", "film", "adaln", "add", "constant")
WITH_CONTEXT = ("film", "adaln", "add")  # the kinds that another story's context can disturb
RARE = 0.2  # a token is rare if it is in less than this share of the documents
BINS = 6  # the last bin of the distances holds all that are longer


@dataclass
class Config:
    # data
    data: str = "stories"  # stories (the world's stories with a brief) or a text file
    init: str = ""  # checkpoint with the tokenizer; empty: part_4/out/base.pt
    longest: int = 96  # tokens of a document; what is longer is cut off
    # models
    kinds: str = ",".join(KINDS)  # which kinds of models are trained, separated by commas
    window: int = 8  # tokens that a token sees in the models with a short window, itself included
    n_layer: int = 2  # number of blocks
    n_head: int = 4  # heads per block
    n_embd: int = 96  # channels of the residual stream
    mlp_dim: int = 128  # hidden channels of the MLP in adaln; the other kinds get more
    context_dim: int = 64  # channels of the context vector
    # optimization
    steps: int = 300  # optimizer steps for each model
    batch_size: int = 24  # documents per step
    lr: float = 0.02  # learning rate of Muon, for the matrices of the blocks
    lr_adamw: float = 3e-3  # learning rate of AdamW, for everything else
    warmup: float = 0.05  # share of the steps in which the learning rate rises to its peak
    decay: float = 0.5  # share of the steps, at the end, in which it falls linearly to 0
    grad_clip: float = 1.0  # largest norm of the gradient
    # run
    eval_every: int = 0  # steps between evaluations on held-out documents; 0: only at the end
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "longest",
            "context_dim",
            "mlp_dim",
            "n_layer",
            "seeds",
        ):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.window > 0, f"window={self.window} must be at least 1: a token sees itself"
        assert self.n_embd % (2 * self.n_head) == 0, (
            f"n_embd={self.n_embd} must be divisible by 2 * n_head = {2 * self.n_head}"
        )
        for kind in self.kinds.split(","):
            assert kind in KINDS, f"kinds={self.kinds} must be some of {','.join(KINDS)}"


# data ---------------------------------------------------------------------------------------------


class Document(NamedTuple):
    ids: list  # tokens, with <|endoftext|> at both ends
    start: int  # position in ids of the first token that counts: a story starts after its brief
    distance: list  # for each token of ids: that to its last mention, see last_mention; or empty


class Data(NamedTuple):
    tok: Tokenizer
    is_end: torch.Tensor  # (V,) bool: does this token end a sentence?
    train: list  # Documents
    val: list
    entropy: float  # true nats per story, or None if nobody knows them


def sentence_ends(tok):
    """Which tokens end a sentence? Those whose text ends with ".", "!" or "?" -> (V,) bool."""
    is_end = torch.zeros(tok.vocab_size, dtype=torch.bool)
    for i in range(len(tok.ranks)):
        is_end[i] = tok.token_bytes(i).rstrip().endswith((b".", b"!", b"?"))
    return is_end


def split_documents(cfg):
    """The text that cfg.data names -> documents for training, and documents for validation."""
    if cfg.data == "stories":
        folder = require("data/stories")
        texts = [read_text(folder / name) for name in ("train.txt", "val.txt")]
        parts = []
        for text in texts:
            # The world's text has statements and problems, too. A story with a brief is a document
            # in which early sentences say what the later ones will be about.
            documents = text.strip().split("\n\n")
            parts.append([d for d in documents if d.startswith("Write a story")])
        return parts

    documents = []
    for document in read_text(cfg.data).split("\n\n"):
        if document.strip():
            documents.append(document.strip())
    split = int(0.9 * len(documents))
    if len(documents) - split < 2:
        fail(
            f"--data={cfg.data} has {len(documents)} documents, between blank lines: at least 11 "
            "are needed, so that two are held out and one can get the context of the other"
        )
    return documents[:split], documents[split:]


def last_mention(ids, rare):
    """For each token: how many tokens ago was it last used? 0 if it is new, or not rare.

    [5, 7, 5, 5] with 5 rare -> [0, 0, 2, 1]
    """
    seen = {}
    distance = []
    for position, i in enumerate(ids):
        distance.append(position - seen[i] if i in seen and i in rare else 0)
        seen[i] = position
    return distance


def load_data(cfg):
    """Reads and encodes the documents -> Data.

    The distance to the last mention is kept for rare tokens only: names, colours and things, which
    a model must look up. Words like "the" can be written without looking back.
    """
    base = load_checkpoint(cfg.init or require("part_4/out/base.pt"), "base")
    tok = Tokenizer.load(base["tokenizer"])
    border = tok.special["<|endoftext|>"]
    parts = []
    for documents in split_documents(cfg):
        encoded = []
        for document in documents:
            encoded.append([border, *tok.encode(document), border][: cfg.longest + 1])
        parts.append(encoded)

    # In how many documents is each token?
    count = Counter()
    for ids in parts[0]:
        count.update(set(ids))
    rare = {i for i in range(tok.vocab_size) if count[i] < RARE * len(parts[0])}

    # A story of the world starts after the line break that ends its brief. Any other text counts
    # entirely. Only the evaluation asks for distances.
    has_break = [b"\n" in tok.token_bytes(i) for i in range(tok.vocab_size)]
    data = []
    for encoded, is_val in zip(parts, (False, True)):
        documents = []
        for ids in encoded:
            breaks = [position for position, i in enumerate(ids) if has_break[i]]
            has_brief = cfg.data == "stories" and len(breaks) > 0
            start = breaks[0] + 1 if has_brief else 1
            distance = last_mention(ids, rare) if is_val else []
            documents.append(Document(ids, start, distance))
        data.append(documents)

    entropy = None
    if cfg.data == "stories":
        entropy = true_story_nats(read_facts(require("data/stories") / "facts.json"))
    return Data(tok, sentence_ends(tok), *data, entropy)


def entropy_of(probabilities):
    return -sum(p * math.log(p) for p in probabilities)


def true_story_nats(facts):
    """The entropy of a story given its brief, in nats: the loss that no model can beat.

    It is a sum over the draws that the brief leaves open.
    """
    vocabulary = facts["vocabulary"]

    # Three of the five sentences have wordings that are equally likely.
    wordings = Counter((pattern["stage"], pattern["end"]) for pattern in facts["patterns"])
    nats = math.log(wordings[0, None]) + math.log(wordings[1, None])
    nats += math.log(wordings[4, "happy"])

    # What happens, what the hero does next, and who helps or takes the thing, if anybody does.
    nats += entropy_of([event["p"] for event in facts["events"]])
    for event in facts["events"]:
        nats += event["p"] * entropy_of(event["next"].values())
        for sentence, p in event["next"].items():
            if "{helper}" in event["sentence"] + sentence:
                nats += event["p"] * p * math.log(len(vocabulary["helper"]))

    # A short brief does not name the place, or the thing and its colour either.
    for p, sentence in facts["briefs"]:
        for slot in ("colour", "thing", "place"):
            if "{" + slot + "}" not in sentence:
                nats += p * math.log(len(vocabulary[slot]))
    return nats


def pad(documents):
    """Documents -> inputs (B, T) and targets (B, T), padded on the right. Targets of -100 do not
    count."""
    T = max(len(document.ids) for document in documents) - 1
    border = documents[0].ids[0]
    x = torch.full((len(documents), T), border)
    y = torch.full((len(documents), T), -100)
    for row, document in enumerate(documents):
        n = len(document.ids) - 1
        x[row, :n] = torch.tensor(document.ids[:-1])
        y[row, :n] = torch.tensor(document.ids[1:])
    return x, y


def get_batch(documents, step, seed, batch_size):
    """The batch of a step: inputs and targets (batch_size, T). It depends on the seed and the step
    alone, so all kinds of models see the same documents in the same order."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    choice = torch.randint(len(documents), (batch_size,), generator=generator)
    return pad([documents[i] for i in choice.tolist()])


# the lesson's mathematics -------------------------------------------------------------------------


def sentence_numbers(idx, is_end):
    """The number of the sentence that each token of idx (B, T) is in -> (B, T).

    A token that ends a sentence still belongs to it: "A cat. A dog." -> 0 0 0 1 1 1.
    """
    ends = is_end[idx].long()
    return ends.cumsum(dim=1) - ends


def running_context(vectors, sentence):
    """Token vectors (B, T, K) and the sentences that they are in (B, T) -> the context of each
    sentence, and of one that would follow (B, S + 1, K): the mean of the vectors of all sentences
    before it, and 0 for the first.

    The vector of a sentence is the mean of its tokens. In other words, after each sentence the
    context moves towards its vector z by a share that becomes smaller: c += (z - c) / (s + 1).
    """
    B, T, K = vectors.shape
    S = int(sentence.max()) + 1
    total = vectors.new_zeros(B, S, K)
    total = total.scatter_add(1, sentence[:, :, None].expand(B, T, K), vectors)  # (B, S, K)
    count = vectors.new_zeros(B, S).scatter_add(1, sentence, torch.ones_like(vectors[:, :, 0]))
    z = total / count.clamp(min=1)[:, :, None]  # (B, S, K)

    # Shift the sums by one sentence. To subtract z from the sum instead would let the sentence
    # leak into its own context through the rounding error: (a + z) - z is not always a.
    earlier = F.pad(z.cumsum(dim=1), (0, 0, 1, 0))  # (B, S + 1, K)
    exists = (count > 0).to(vectors.dtype)
    n_earlier = F.pad(exists.cumsum(dim=1), (1, 0))  # (B, S + 1)
    return earlier / n_earlier.clamp(min=1)[:, :, None]


def scale_and_shift(x, scale, shift):
    """FiLM, feature-wise linear modulation (Perez et al. 2018, eq. 2), written so that a scale and
    a shift of 0 change nothing, not even the last bit."""
    return x * (1 + scale) + shift


def window_mask(T, window, device):
    """Which query may see which key? (T, T) bool, True where it may. A token sees itself and the
    window - 1 tokens before it; a window of 0 has no limit."""
    pos = torch.arange(T, device=device)
    distance = pos[:, None] - pos[None, :]
    mask = distance >= 0
    if window > 0:
        mask = mask & (distance < window)
    return mask


# models -------------------------------------------------------------------------------------------


class PlainBlock(Block):
    """A block that takes the context and does not use it."""

    def forward(self, x, context, mask, cos, sin):
        return super().forward(x, mask, cos, sin, None)


class FilmAttention(Attention):
    """Attention whose queries and keys are scaled and shifted by the context.

    The projection of the context starts at zero. So the model starts as the plain one.
    """

    def __init__(self, cfg, layer, context_dim):
        super().__init__(cfg, layer)
        n_modulated = (cfg.n_head + cfg.n_kv_head) * cfg.head_dim
        self.film = nn.Linear(context_dim, 2 * n_modulated, bias=False)
        nn.init.zeros_(self.film.weight)

    def queries_and_keys(self, x, context, cos, sin):
        """x (B, T, C) and context (B, T, K) -> q (B, H, T, D) and k (B, G, T, D)."""
        B, T, C = x.shape
        q = self.q_norm(self.c_q(x).view(B, T, self.n_head, -1))  # (B, T, H, D)
        k = self.k_norm(self.c_k(x).view(B, T, self.n_kv_head, -1))  # (B, T, G, D)

        # Each head gets a scale and a shift of its own. This is after the norm, which would take
        # a common scale out again, and before RoPE, so that it says what to look for, not where.
        modulation = self.film(context).view(B, T, self.n_head + self.n_kv_head, -1)
        scale, shift = modulation.chunk(2, dim=-1)  # (B, T, H + G, D) each
        q = scale_and_shift(q, scale[:, :, : self.n_head], shift[:, :, : self.n_head])
        k = scale_and_shift(k, scale[:, :, self.n_head :], shift[:, :, self.n_head :])

        return rope(q.transpose(1, 2), cos, sin), rope(k.transpose(1, 2), cos, sin)

    def forward(self, x, context, mask, cos, sin):
        B, T, C = x.shape
        q, k = self.queries_and_keys(x, context, cos, sin)
        v = self.c_v(x).view(B, T, self.n_kv_head, -1).transpose(1, 2)  # (B, G, T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H * D)
        return self.c_proj(y)


class FilmBlock(Block):
    """A block with FilmAttention. Its MLP does not see the context."""

    def __init__(self, cfg, layer, context_dim):
        super().__init__(cfg, layer)
        self.attn = FilmAttention(cfg, layer, context_dim)

    def forward(self, x, context, mask, cos, sin):
        x = x + self.attn(self.ln_1(x), context, mask, cos, sin)
        x = x + self.mlp(self.ln_2(x))
        return x


class AdaLNBlock(Block):
    """The context scales and shifts what enters attention and MLP, and scales what they add to the
    stream (Peebles & Xie 2023, "adaLN-Zero").

    In the paper the last scale, the gate, starts at 0, so that a block starts as the identity. Our
    blocks are that already, because c_proj starts at 0. Two factors of 0 would never get a
    gradient, so here the gate starts at 1.
    """

    def __init__(self, cfg, layer, context_dim):
        super().__init__(cfg, layer)
        self.adaln = nn.Linear(context_dim, 6 * cfg.n_embd, bias=False)
        nn.init.zeros_(self.adaln.weight)

    def forward(self, x, context, mask, cos, sin):
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = self.adaln(context).chunk(6, dim=-1)
        entering = scale_and_shift(self.ln_1(x), scale_1, shift_1)  # (B, T, C)
        x = x + (1 + gate_1) * self.attn(entering, mask, cos, sin, None)
        entering = scale_and_shift(self.ln_2(x), scale_2, shift_2)
        x = x + (1 + gate_2) * self.mlp(entering)
        return x


class ContextGPT(nn.Module):
    """A GPT that knows what the text was about so far. kind is one of KINDS, and window is the
    number of tokens that a token sees (0: all)."""

    def __init__(self, cfg, is_end, kind, window, context_dim):
        super().__init__()
        self.cfg = cfg
        self.kind = kind
        self.window = window
        self.context_dim = context_dim
        self.register_buffer("is_end", is_end)  # (V,)

        blocks = []
        for layer in range(cfg.n_layer):
            if kind in ("film", "constant"):
                blocks.append(FilmBlock(cfg, layer, context_dim))
            elif kind == "adaln":
                blocks.append(AdaLNBlock(cfg, layer, context_dim))
            else:
                blocks.append(PlainBlock(cfg, layer))
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.h = nn.ModuleList(blocks)
        self.ln_f = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.lm_head.weight, std=0.02)

        # Where the context comes from.
        if kind in WITH_CONTEXT:
            self.words = nn.Embedding(cfg.vocab_size, context_dim)
        if kind == "constant":
            self.constant = nn.Parameter(torch.randn(context_dim))
        if kind == "add":
            self.added = nn.Linear(context_dim, cfg.n_embd, bias=False)
            nn.init.zeros_(self.added.weight)

    def contexts(self, idx):
        """idx (B, T) -> the context of each sentence, and of one that would follow (B, S + 1, K):
        the running mean, divided by its root mean square. That of the first sentence is 0."""
        sentence = sentence_numbers(idx, self.is_end)
        mean = running_context(self.words(idx), sentence)  # (B, S + 1, K)
        return F.rms_norm(mean, (self.context_dim,), eps=1e-8)

    def context_of_tokens(self, idx, donor):
        """The context of each token of idx (B, T) -> (B, T, K), or None if this kind has none. It
        is made from the texts donor (B, any length)."""
        B, T = idx.shape
        if self.kind == "plain":
            return None
        if self.kind == "constant":
            return self.constant.expand(B, T, -1)
        contexts = self.contexts(donor)  # (B, S + 1, K)
        sentence = sentence_numbers(idx, self.is_end).clamp(max=contexts.size(1) - 1)
        return contexts.gather(1, sentence[:, :, None].expand(B, T, self.context_dim))

    def forward(self, idx, donor):
        """idx (B, T) -> logits (B, T, V), with the contexts of the texts donor (B, any length).

        donor is idx itself, unless somebody wants to know what another story's context does.
        """
        context = self.context_of_tokens(idx, donor)
        positions = torch.arange(idx.size(1), device=idx.device)
        cos, sin = rope_table(positions, self.cfg.head_dim, self.cfg.rope_base)
        mask = window_mask(idx.size(1), self.window, idx.device)

        x = self.wte(idx)  # (B, T, C)
        if self.kind == "add":
            x = x + self.added(context)
        for block in self.h:
            x = block(x, context, mask, cos, sin)
        return self.lm_head(self.ln_f(x))

    def to_checkpoint(self):
        """The model as plain data, for save_checkpoint."""
        return {
            "gpt_config": asdict(self.cfg),
            "kind_of_model": self.kind,
            "window": self.window,
            "context_dim": self.context_dim,
            "weights": self.state_dict(),
        }

    @classmethod
    def load(cls, checkpoint):
        """The model that to_checkpoint() described."""
        is_end = checkpoint["weights"]["is_end"]
        sizes = [checkpoint[name] for name in ("kind_of_model", "window", "context_dim")]
        model = cls(GPTConfig(**checkpoint["gpt_config"]), is_end, *sizes)
        model.load_state_dict(checkpoint["weights"])
        return model


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def build_model(kind, window, data, cfg):
    """A new model of this kind. Its MLP is so wide that all kinds have equally many parameters:
    those of the largest, which is adaln, with an MLP of cfg.mlp_dim."""
    gpt_cfg = GPTConfig(
        vocab_size=data.tok.vocab_size,
        block_size=cfg.longest,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        n_kv_head=cfg.n_head,
        n_embd=cfg.n_embd,
        mlp_dim=cfg.mlp_dim,
    )
    largest = ContextGPT(gpt_cfg, data.is_end, "adaln", window, cfg.context_dim)
    model = ContextGPT(gpt_cfg, data.is_end, kind, window, cfg.context_dim)
    missing = count_parameters(largest) - count_parameters(model)

    # One more channel of the MLP costs a row or a column in three matrices of every layer.
    gpt_cfg.mlp_dim += round(missing / (3 * cfg.n_embd * cfg.n_layer))
    return ContextGPT(gpt_cfg, data.is_end, kind, window, cfg.context_dim)


# learning rate and optimizers ---------------------------------------------------------------------


def lr_scale(step, cfg):
    """The learning rate of a step (0, 1, ...) as a share of its peak: warm up, hold, then decay
    linearly to 0 (WSD, Hu et al. 2024)."""
    rise = (step + 1) / max(1.0, cfg.warmup * cfg.steps)  # the first step learns already
    fall = (cfg.steps - step) / max(1.0, cfg.decay * cfg.steps)  # and the last step still does
    return max(0.0, min(1.0, rise, fall))


def orthogonalize(matrix):
    """Brings the singular values of a matrix (rows, columns) near 1 and keeps its singular vectors:
    five steps of a Newton-Schulz iteration (Jordan et al. 2024)."""
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

    An update has RMS 0.2 lr, about that of AdamW (Liu et al. 2025, "Muon is scalable", eq. 4).
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

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
                p.sub_(group["lr"] * update)


def make_optimizers(model, cfg):
    """Muon for the blocks' matrices, AdamW for all other parameters -> a list of both."""
    hidden = []
    others = []
    for name, p in model.named_parameters():
        if p.ndim == 2 and name.startswith(("h.", "added.")):
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


# train, evaluate ----------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    nats: float  # per story, without its brief; the mean over the held-out documents
    by_distance: list  # nats per rare token, by the distance to its last mention in BINS bins
    counts: list  # number of tokens in each bin


def bin_width(window):
    """Distances are counted in bins of half a window."""
    return max(1, window // 2)


@torch.no_grad()
def evaluate(model, documents, width, device, shuffled=False):
    """The loss on held-out documents -> Evaluation. A bin has `width` different distances.

    shuffled: each document gets the contexts of another one.
    """
    others = documents[1:] + documents[:1]
    total = 0.0
    sums = torch.zeros(BINS)
    counts = torch.zeros(BINS)
    for i in range(0, len(documents), 64):
        batch = documents[i : i + 64]
        x, y = pad(batch)
        x, y = x.to(device), y.to(device)
        donor = x
        if shuffled:
            donor = pad(others[i : i + 64])[0].to(device)
        logits = model(x, donor)
        losses = F.cross_entropy(logits.transpose(1, 2), y, reduction="none").cpu()  # (B, T)

        for row, document in enumerate(batch):
            # losses[row, t] is about token t + 1.
            nats = losses[row, document.start - 1 : len(document.ids) - 1]
            total += nats.sum().item()
            distance = torch.tensor(document.distance[document.start :])
            is_mentioned = distance > 0
            bins = ((distance[is_mentioned] - 1) // width).clamp(max=BINS - 1)
            sums.index_add_(0, bins, nats[is_mentioned])
            counts += bins.bincount(minlength=BINS)
    by_distance = (sums / counts.clamp(min=1)).tolist()
    return Evaluation(total / len(documents), by_distance, counts.int().tolist())


def train(model, data, seed, cfg, device, log=None, first_step=0, arm=""):
    """Trains a model on data.train. What it logs has the name of the arm, and steps that go on from
    first_step, because several models share a log."""
    optimizers = make_optimizers(model, cfg)
    for step in range(cfg.steps):
        set_lr(optimizers, lr_scale(step, cfg))
        x, y = get_batch(data.train, step, seed, cfg.batch_size)
        x, y = x.to(device), y.to(device)
        logits = model(x, x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100)

        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if log is not None:
            values = {"arm": arm, "seed": seed, "loss": loss.item()}
            if cfg.eval_every > 0 and (step + 1) % cfg.eval_every == 0:
                values["val_nats"] = evaluate(model, data.val, bin_width(cfg.window), device).nats
            log(first_step + step, **values)


# the figures --------------------------------------------------------------------------------------


def mean_of(values):
    return sum(values) / len(values)


def range_text(values):
    """The range of several numbers: "8.41 to 8.64", or one number if they are the same."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def arm_name(kind, window):
    """The name of an arm of the comparison: a kind of model, and what its tokens see."""
    return f"{kind}, window of {window}" if window else f"{kind}, full attention"


def draw_nats(title, results, entropy, path):
    """A bar for each arm: the mean of its nats per story over the seeds. A dot for each seed,
    and a diamond for each seed with the contexts of other stories."""
    fig, ax = figure(title, "nats per held-out story, without its brief (logarithmic)", height=5.5)
    labels = []
    for row, (arm, runs) in enumerate(results.items()):
        nats = [run["nats"] for run in runs]
        labels.append(f"{arm}: {mean_of(nats):.1f}")
        ax.barh(row, mean_of(nats), color="C1" if "window" in arm else "C0", alpha=0.8)
        ax.plot(nats, [row] * len(nats), "k.")
        shuffled = [run["shuffled_nats"] for run in runs if run["shuffled_nats"] is not None]
        ax.plot(shuffled, [row] * len(shuffled), "D", color="C3", markersize=5)

    # Entries of the legend that stand for points in many rows.
    ax.plot([], [], "k.", label="each seed")
    ax.plot([], [], "D", color="C3", markersize=5, label="with the context of another story")
    if entropy is not None:
        label = f"true entropy, {entropy:.2f}"
        ax.axvline(entropy, color="black", linestyle="--", linewidth=1, label=label)
    ax.set_xscale("log")
    ticks = [10, 20, 50, 100, 200]
    ax.set_xticks(ticks, ticks)
    ax.set_xticks([], minor=True)
    ax.set_yticks(range(len(results)), labels)
    ax.invert_yaxis()
    fig.legend(loc="outside lower center", ncols=3)
    save_figure(fig, path)


def bin_labels(width):
    """["1-4", "5-8", ..., "21+"]: the distances in each bin."""
    labels = []
    for i in range(BINS - 1):
        first, last = i * width + 1, (i + 1) * width
        labels.append(f"{first}" if width == 1 else f"{first}-{last}")
    return [*labels, f"{(BINS - 1) * width + 1}+"]


def draw_distance(title, results, cfg, path):
    """Loss of a rare token by the distance to its last mention, a panel for each attention."""
    kinds = cfg.kinds.split(",")
    fig, axes = figure(title, "tokens since the last mention", columns=2, height=4.8)
    for ax, window in zip(axes, (0, cfg.window)):
        ax.set_title(f"window of {window} tokens" if window else "full attention", fontsize=11)
        for kind, marker in zip(kinds, "os^Dv"):
            columns = list(zip(*[run["by_distance"] for run in results[arm_name(kind, window)]]))
            means = [mean_of(column) for column in columns]
            [line] = ax.plot(means, marker=marker, label=kind)
            lows = [min(column) for column in columns]
            highs = [max(column) for column in columns]
            ax.fill_between(range(BINS), lows, highs, alpha=0.2, color=line.get_color())
        if window:
            border = window / bin_width(window) - 0.5
            ax.axvline(border, color="gray", linestyle=":")
            ax.text(
                border + 0.1,
                0.02,
                "outside of the window",
                color="gray",
                fontsize=9,
                transform=ax.get_xaxis_transform(),
            )
        ax.set_xticks(range(BINS), bin_labels(bin_width(cfg.window)))
    axes[0].set_ylabel("nats per rare token, held out")
    axes[0].sharey(axes[1])
    axes[0].legend()
    save_figure(fig, path)


def finding(results, cfg):
    """The title of the first figure: what does the context gain under each attention?"""
    kinds = cfg.kinds.split(",")
    parts = []
    for window in (0, cfg.window):
        name = f"Window of {window}" if window else "Full attention"
        texts = []
        for kind in kinds:
            nats = [run["nats"] for run in results[arm_name(kind, window)]]
            texts.append(f"{kind} {mean_of(nats):.1f}")
        parts.append(f"{name}: " + ", ".join(texts))
    return "\n".join(parts)


def cost_outside(run, window):
    """Nats per rare token in a run, over the bins of distances that are larger than the window."""
    first = math.ceil(window / bin_width(window))
    total = 0.0
    for count, nats in zip(run["counts"][first:], run["by_distance"][first:]):
        total += count * nats
    return total / max(1, sum(run["counts"][first:]))


def finding_distance(results, cfg):
    """The title of the second figure: what does a rare token cost that is outside of the window?"""
    texts = []
    for kind in cfg.kinds.split(","):
        runs = results[arm_name(kind, cfg.window)]
        if kind != "constant":
            costs = [cost_outside(run, cfg.window) for run in runs]
            texts.append(f"{kind} {mean_of(costs):.2f}")
    return (
        f"Nats of a rare token that was last mentioned more than {cfg.window} tokens ago,\n"
        f"with a window of {cfg.window}: " + ", ".join(texts)
    )


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    data = load_data(cfg)
    out = output_folder(cfg)
    print(f"{len(data.train):,} documents for training, {len(data.val)} for validation")

    # the arms: every kind of model with full attention (a window of 0) and with a short window
    arms = []
    for window in (0, cfg.window):
        for kind in cfg.kinds.split(","):
            arms.append((kind, window))

    results = {arm_name(*arm): [] for arm in arms}
    log = Log(out, cfg.seeds * len(arms) * cfg.steps, name="train_context")
    steps_done = 0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for kind, window in arms:
            arm = arm_name(kind, window)
            set_seed(seed)
            model = build_model(kind, window, data, cfg).to(device)
            start = time.time()
            train(model, data, seed, cfg, device, log, steps_done, arm)
            seconds = time.time() - start
            steps_done += cfg.steps

            # the loss with its own context, and with that of another story
            own = evaluate(model, data.val, bin_width(cfg.window), device)
            shuffled_nats = None
            if kind in WITH_CONTEXT:
                shuffled = evaluate(model, data.val, bin_width(cfg.window), device, shuffled=True)
                shuffled_nats = shuffled.nats
            results[arm].append(
                {
                    **own._asdict(),
                    "shuffled_nats": shuffled_nats,
                    "params": count_parameters(model),
                    "seconds": seconds,
                }
            )
            print(f"    seed {seed}, {arm}: {own.nats:.2f} nats per story", flush=True)

            # demo_context.py looks into the model whose heads are turned
            if kind == "film" and window > 0 and seed == cfg.seed:
                save_checkpoint(
                    out / "context.pt",
                    kind="context",
                    changed=cfg.changed,
                    config=asdict(cfg),
                    tokenizer=data.tok.state(),
                    **model.to_checkpoint(),
                )

    # what came out
    print(
        f"\n{'nats per held-out story':28} {'own context':>16} {'of another story':>18}  parameters"
    )
    for arm, runs in results.items():
        shuffled = [run["shuffled_nats"] for run in runs if run["shuffled_nats"] is not None]
        print(
            f"{arm:28} {range_text([run['nats'] for run in runs]):>16} "
            f"{range_text(shuffled) if shuffled else '':>18}  {runs[0]['params']:,}"
        )
    if data.entropy is not None:
        print(f"{'true entropy':28} {data.entropy:16.2f}")
    save_metrics(
        out,
        name="train_context",
        results=results,
        true_nats=data.entropy,
        bins=bin_labels(bin_width(cfg.window)),
        seeds=cfg.seeds,
        **{name: getattr(cfg, name) for name in ("window", "steps", "seed")},
    )
    draw_nats(finding(results, cfg), results, data.entropy, out / "train_context.png")
    draw_distance(finding_distance(results, cfg), results, cfg, out / "train_context_distance.png")
