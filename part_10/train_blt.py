"""
Part 10: the Byte Latent Transformer (Pagnoni et al. 2024). A language model without a tokenizer: it
reads and writes bytes, but its large transformer works on patches, which are short runs of bytes.

    python part_10/train_blt.py                      the world's stories -> part_10/out/blt.pt
    python part_10/train_blt.py --data=my.txt        any text; its last 10 % are held out
    python part_10/train_blt.py --patching=spaces    cut the text behind spaces
    python part_10/train_blt.py --ngrams=false       without the embeddings of hashed n-grams
    python part_10/train_blt.py --kind=byte          a GPT on bytes, with as many FLOPs per byte
    python part_10/train_blt.py --kind=bpe           a GPT on tokens, with as many FLOPs per byte

Starts here. Copied from Part 4, some of it a little shorter: split, pairs, merge and train_ranks
(tokenizer.py); document_ends, row_edges, get_batch, lr_scale, orthogonalize, Muon, make_optimizers,
evaluate (train.py).

Where do patches come from? A small byte model reads the text first, and says at each byte how
uncertain it is about the next one. Where its entropy is high, a new patch starts: a patch is what
can be guessed once its first byte is known. Predictable text gets long patches and little
computation, surprising text short ones and much computation.

    bytes      T h e r e   S a m   f o u n d   t h e   r e d   k i t e .
    patches   |T|h e r e  |S a m   f|o u n d   t h e  |r e d  |k|i t e .

    local encoder        a narrow transformer on the bytes; then each patch reads its own bytes
    global transformer   a wide transformer on the patches, which does most of the work
    local decoder        each byte reads the last patch that is complete; a narrow transformer on
                         the bytes then predicts the next byte

Shapes: B batch, T bytes, P patches, K sub-vectors of a patch, C channels of a byte (= n_local),
        H heads, D head size. The channels of a patch are K * C.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import regex  # not re: \p{L} and \p{N} are Unicode's letters and numbers
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, Block, GPTConfig, RMSNorm, causal_mask, rope_table, sample
from shared import (
    Log,
    fail,
    figure,
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
from tokenizer import PATTERN, SPECIAL, Tokenizer

KINDS = ("blt", "byte", "bpe")
RULES = ("global", "monotonic", "static", "spaces")
NGRAMS = (3, 4, 5, 6)  # lengths of the byte sequences that have embeddings of their own
PRIME = 1_000_000_007  # the multiplier of the rolling hash


@dataclass
class Config:
    # data
    data: str = "stories"  # stories (the built-in world) or a text file
    vocab_size: int = 1024  # tokens of the BPE tokenizer, for --kind=bpe
    # what is trained
    kind: str = "blt"  # blt, byte (a GPT on bytes) or bpe (a GPT on tokens)
    # optimization
    steps: int = 450  # optimizer steps
    entropy_steps: int = 200  # optimizer steps of the small byte model whose entropies cut the text
    batch_size: int = 8  # rows of text per step
    lr: float = 0.02  # learning rate of Muon, for the hidden matrices
    lr_adamw: float = 8e-3  # learning rate of AdamW, for everything else
    warmup: float = 0.1  # share of the steps in which the learning rate rises to its peak
    decay: float = 0.5  # share of the steps, at the end, in which it falls linearly to 0
    grad_clip: float = 1.0  # largest norm of the gradient; a larger one is scaled down
    # run
    eval_every: int = 150  # steps between evaluations on the validation text
    eval_bytes: int = 60_000  # bytes of the validation text that are evaluated
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "entropy_steps", "batch_size", "eval_every", "eval_bytes"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.kind in KINDS, f"kind={self.kind} must be one of {', '.join(KINDS)}"


@dataclass
class BLTConfig:
    block_size: int = 256  # T, longest text, in bytes
    patching: str = "global"  # the rule that cuts the text: global, monotonic, static or spaces
    patch_bytes: float = 4.5  # wanted mean length of a patch in bytes; spaces does not use it
    ngrams: bool = True  # add embeddings of hashed n-grams to those of the bytes
    hash_rows: int = 4096  # rows of the table of each n-gram length
    n_local: int = 64  # C, channels of a byte
    n_encoder: int = 1  # layers of the local encoder
    n_decoder: int = 1  # layers of the local decoder
    n_query: int = 2  # K, sub-vectors of a patch; a patch has n_query * n_local channels
    n_layer: int = 4  # layers of the global transformer
    n_head: int = 4  # H, heads of every attention

    def __post_init__(self):
        for name in ("block_size", "hash_rows", "n_local", "n_query", "n_layer", "n_head"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        for name in ("n_encoder", "n_decoder"):
            assert getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative"
        assert self.patching in RULES, f"patching={self.patching} must be one of {', '.join(RULES)}"
        assert self.patch_bytes > 1, f"patch_bytes={self.patch_bytes} must be above 1"
        assert self.n_local % (2 * self.n_head) == 0, (
            f"n_local={self.n_local} must be divisible by 2 * n_head = {2 * self.n_head}"
        )

    def transformer(self, n_layer, n_embd):
        """The config of a stack of model.py's blocks."""
        return GPTConfig(
            vocab_size=256,
            block_size=self.block_size,
            n_layer=n_layer,
            n_head=self.n_head,
            n_embd=n_embd,
            n_kv_head=self.n_head,
        )


# BPE, to compare with -----------------------------------------------------------------------------


def split(text):
    """The pre-tokens of a text. Joined, they are the text again."""
    return regex.findall(PATTERN, text)


def pairs(word):
    """The neighbouring pairs in one word, a list of tokens: one entry per possible merge."""
    found = []
    previous = None
    for pair in zip(word, word[1:]):
        if pair == previous:  # a run of one token: the previous pair already uses the left one
            previous = None
        else:
            found.append(pair)
            previous = pair
    return found


def merge(word, pair):
    """Replaces every occurrence of the pair in a word by one token, from left to right."""
    left, right = pair
    merged = []
    for token in word:
        if token == right and merged and merged[-1] == left:
            merged[-1] += token  # now longer than left, so it cannot be merged twice
        else:
            merged.append(token)
    return merged


def train_ranks(text, n_merges):
    """Learns up to n_merges merges -> ranks, a dict token -> id: first the 256 bytes, then the
    merges in order. Part 4's trainer: each step merges the most frequent pair."""
    ranks = {bytes([i]): i for i in range(256)}

    # Count every pair of neighbours, once for each time that its word occurs.
    words = []  # each different pre-token, as a list of tokens
    freqs = []  # how often it occurs
    counts = defaultdict(int)  # pair -> how often it occurs in the text
    where = defaultdict(set)  # pair -> indices of the words that contain it
    for w, (word, freq) in enumerate(Counter(split(text)).most_common()):
        words.append([bytes([b]) for b in word.encode()])
        freqs.append(freq)
        for pair in pairs(words[w]):
            counts[pair] += freq
            where[pair].add(w)

    # Python's heap gives the smallest first, so the counts in it are negative.
    heap = [(-count, pair) for pair, count in counts.items() if count > 1]
    heapify(heap)

    while heap and len(ranks) < 256 + n_merges:
        count, best = heappop(heap)
        if -count != counts[best]:
            continue  # stale: the count has changed since this entry was pushed

        # The new token is always a new key: the same bytes are never merged in two ways.
        ranks[best[0] + best[1]] = len(ranks)

        # Rewrite the words that contain the pair, and note how the counts of pairs change.
        changed = defaultdict(int)
        for w in where.pop(best):
            for pair in pairs(words[w]):
                changed[pair] -= freqs[w]
            words[w] = merge(words[w], best)
            for pair in pairs(words[w]):
                changed[pair] += freqs[w]
                where[pair].add(w)

        for pair, difference in changed.items():
            counts[pair] += difference
            if difference and counts[pair] > 1:
                heappush(heap, (-counts[pair], pair))
    return ranks


class Bytes:
    """No tokenizer: the ids of a text are its bytes. It has the methods of Tokenizer that the
    trainer uses, so that all models are trained by the same code."""

    vocab_size = 256
    n_bytes = [1] * 256

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


# data ---------------------------------------------------------------------------------------------


class Text(NamedTuple):
    train: str
    val: str
    documents: bool  # True if blank lines separate documents, and a row should start at one
    entropy: float  # the true entropy in nats per byte, or None if nobody knows it


class Data(NamedTuple):
    """A text as the ids of one kind of model."""

    tok: object  # Bytes or Tokenizer
    block_size: int  # ids per row
    bytes_per_id: float  # mean number of bytes that an id stands for
    train_ids: torch.Tensor  # (N,)
    starts: torch.Tensor  # positions in train_ids where a training row may start
    val_ids: torch.Tensor  # (M,)
    edges: torch.Tensor  # positions in val_ids where the rows of the evaluation start and end
    val_bytes: int  # bytes of the validation text


def load_text(cfg):
    """Reads the text -> Text. Of the validation text it keeps cfg.eval_bytes bytes."""
    entropy = None
    if cfg.data == "stories":
        folder = require("data/stories")
        train = read_text(folder / "train.txt")
        val = read_text(folder / "val.txt")
        entropy = json.loads(read_text(folder / "facts.json"))["true_nats_per_byte"]
    else:
        text = read_text(cfg.data)
        train = text[: int(0.9 * len(text))]
        val = text[len(train) :]
    val = val.encode()[: cfg.eval_bytes].decode("utf-8", errors="ignore")
    return Text(train, val, cfg.data == "stories", entropy)


def document_ends(tok, ids, text):
    """The positions in ids of the ids that end with the blank line between two documents."""
    bytes_after = torch.tensor(tok.n_bytes)[ids].cumsum(0)  # bytes up to and including each id
    blank_lines = [match.end() for match in re.finditer(b"\n\n", text.encode())]
    return torch.isin(bytes_after, torch.tensor(blank_lines)).nonzero()[:, 0]


def row_edges(ends, n, block_size):
    """Where the rows of an evaluation start and end: at every document's end, and after every
    block_size ids in between, up to the last of n ids."""
    edges = [0]
    for end in sorted({*ends, n - 1}):
        edges.extend(range(edges[-1] + block_size, end, block_size))
        edges.append(end)
    return torch.tensor(edges)


def encode_data(text, tok, block_bytes, data=""):
    """The text as ids -> Data. A row holds block_bytes bytes, or as many tokens as stand for so
    many bytes on average."""
    train_ids = torch.tensor(tok.encode(text.train))
    val_ids = torch.tensor(tok.encode(text.val))
    bytes_per_id = len(text.train.encode()) / max(1, len(train_ids))
    block_size = round(block_bytes / bytes_per_id)
    if min(len(train_ids), len(val_ids)) <= block_size + 1:
        fail(
            f"--data={data}: the text is too short for a row of {block_bytes} bytes in its first "
            "90 % and another one in its last 10 %: use a longer text or a smaller --block_size"
        )

    starts = torch.arange(len(train_ids) - block_size)
    ends = []
    if text.documents:
        starts = document_ends(tok, train_ids[: len(starts)], text.train)
        ends = document_ends(tok, val_ids, text.val).tolist()
    edges = row_edges(ends, len(val_ids), block_size)
    val_bytes = len(text.val.encode())
    return Data(tok, block_size, bytes_per_id, train_ids, starts, val_ids, edges, val_bytes)


def get_batch(data, step, batch_size, seed):
    """The batch of a step: inputs (B, T), and targets, the same text shifted by one.

    It depends on the seed and the step alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    choice = torch.randint(len(data.starts), (batch_size, 1), generator=generator)
    window = data.train_ids[data.starts[choice] + torch.arange(data.block_size + 1)]  # (B, T + 1)
    return window[:, :-1], window[:, 1:]


# patches: where do they start? --------------------------------------------------------------------
#
# Each rule says for the bytes 0, 1, ..., T-1 of a text, and for the byte T that is yet to come,
# whether a patch starts there: a bool tensor (B, T + 1). To decide about byte i + 1 a rule may look
# at the bytes up to i only. Otherwise the cut itself would tell the model what comes next, and a
# text could not be cut while it is being written.
#
# The first patch holds a single byte. Thus byte 1 already has a complete patch before it.


def next_byte_entropy(logits):
    """Logits (B, T, 256) -> the entropy in nats of each next byte, (B, T). Entry i says how
    uncertain byte i + 1 is after bytes 0 to i."""
    logp = logits.float().log_softmax(dim=-1)
    return -(logp.exp() * logp).sum(dim=-1)


def start_after(condition):
    """A condition on each byte (B, T) -> starts (B, T + 1): a patch starts behind every byte for
    which the condition holds, and at bytes 0 and 1."""
    starts = F.pad(condition, (1, 0), value=True)
    starts[:, 1] = True
    return starts


def rise(entropy):
    """How much more uncertain a byte is than the one before it, (B, T). The first has none before
    it: 0."""
    return F.pad(entropy[:, 1:] - entropy[:, :-1], (1, 0))


def global_starts(entropy, threshold):
    """A patch starts at byte i + 1 if its entropy, entry i, exceeds the threshold (section 2.3)."""
    return start_after(entropy > threshold)


def monotonic_starts(entropy, threshold):
    """A patch starts at byte i + 1 if its entropy is higher than that of byte i by more than the
    threshold. Inside of a word the entropy falls from byte to byte; a rise says that something new
    begins (section 2.3)."""
    return start_after(rise(entropy) > threshold)


def static_starts(idx, stride):
    """A patch starts every `stride` bytes, whatever the text is."""
    position = torch.arange(idx.size(1), device=idx.device)
    return start_after((position % stride == 0).expand(idx.shape))


def space_starts(idx):
    """A patch starts behind a space-like byte (neither a letter, nor a digit, nor a part of a
    longer UTF-8 character), unless the byte before it is space-like, too: a word with its space, or
    with its comma (section 2.2)."""
    # Small and capital letters differ in one bit, 32. With it set, every letter is a small one.
    small = idx | 32
    letter = (small >= ord("a")) & (small <= ord("z"))
    digit = (idx >= ord("0")) & (idx <= ord("9"))
    space = ~(letter | digit | (idx >= 128))
    before = F.pad(space[:, :-1], (1, 0), value=False)
    return start_after(space & ~before)


class Patcher(nn.Module):
    """Cuts a text by one of the four rules. It is not trained with the model: the entropies come
    from a small byte model that has been trained before."""

    def __init__(self, cfg, entropy_model=None):
        super().__init__()
        self.rule = cfg.patching
        self.stride = max(1, round(cfg.patch_bytes))
        self.entropy_model = entropy_model
        self.register_buffer("threshold", torch.zeros(()))

    @property
    def needs_entropy(self):
        return self.rule in ("global", "monotonic")

    @torch.no_grad()
    def entropy(self, idx):
        """The entropy of each next byte of idx (B, T) -> (B, T)."""
        logits, _ = self.entropy_model(idx)
        return next_byte_entropy(logits)

    def forward(self, idx):
        """idx (B, T) -> starts (B, T + 1)."""
        if self.rule == "static":
            return static_starts(idx, self.stride)
        if self.rule == "spaces":
            return space_starts(idx)
        if self.rule == "monotonic":
            return monotonic_starts(self.entropy(idx), self.threshold)
        return global_starts(self.entropy(idx), self.threshold)

    def set_threshold(self, idx, patch_bytes):
        """Chooses the threshold so that the patches of idx (B, T) have patch_bytes bytes on
        average: the share of bytes above it is 1 / patch_bytes."""
        if not self.needs_entropy:
            return
        signal = self.entropy(idx)
        if self.rule == "monotonic":
            signal = rise(signal)
        self.threshold.copy_(signal[:, 1:].flatten().quantile(1 - 1 / patch_bytes))


def patch_numbers(starts):
    """starts (B, T + 1) -> the number of the patch that each byte belongs to, (B, T + 1)."""
    return starts.cumsum(dim=1) - 1


def complete_patches(patch_of):
    """Which patch may be read where byte i + 1 is predicted? patch_of (B, T + 1) -> (B, T).

    The one before the patch of byte i + 1. All of its bytes are known, because the rules decide
    from the bytes up to i whether byte i + 1 starts a patch. A byte must never read the patch that
    it is in: that patch may hold the very byte which is to be predicted.
    """
    return patch_of[:, 1:] - 1


# the model ----------------------------------------------------------------------------------------


def hash_ngram(idx, n, rows):
    """A row of a table for the n bytes that end at each position: idx (B, T) -> (B, T).

    The rolling polynomial hash of the paper (section 3.2.1): the newest byte plus PRIME times the
    one before it, and so on. It overflows on purpose, which is arithmetic modulo 2^64. Zeros stand
    in for what is before the first byte. Different n-grams may share a row.
    """
    T = idx.size(1)
    padded = F.pad(idx, (n - 1, 0))  # (B, n - 1 + T)
    total = torch.zeros_like(idx)
    for j in range(n):
        total = total * PRIME + padded[:, j : j + T]
    return total % rows


class ByteEmbedding(nn.Module):
    """An embedding of each byte, plus the embeddings of the n-grams that end with it (section
    3.2.1).

    A byte alone says little. Its n-grams tell a narrow model at once which word it is in, and a
    lookup costs no multiplication, however large the tables are.
    """

    def __init__(self, dim, rows):
        """rows: of the table of each n-gram length; 0: no n-grams."""
        super().__init__()
        self.rows = rows
        self.wte = nn.Embedding(256, dim)
        lengths = NGRAMS if rows > 0 else ()
        self.tables = nn.ModuleList([nn.Embedding(rows, dim) for _ in lengths])
        for table in [self.wte, *self.tables]:
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, idx):
        x = self.wte(idx)  # (B, T, dim)
        for n, table in zip(NGRAMS, self.tables):
            x = x + table(hash_ngram(idx, n, self.rows))
        return x


class Transformer(nn.Module):
    """Blocks of model.py, on vectors instead of tokens. Each position sees itself and the ones
    before it."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.h = nn.ModuleList([Block(cfg, layer) for layer in range(cfg.n_layer)])

    def forward(self, x):
        position = torch.arange(x.size(1), device=x.device)
        mask = causal_mask(position, position)
        cos, sin = rope_table(position, self.cfg.head_dim, self.cfg.rope_base)
        for block in self.h:
            x = block(x, mask, cos, sin, None)
        return x


class PatchReader(nn.Module):
    """The end of the local encoder: each patch reads its own bytes by cross-attention, K queries
    for each patch (section 3.2.2)."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_local
        self.n_query = cfg.n_query
        self.n_head = cfg.n_head
        self.pool_proj = nn.Linear(C, cfg.n_query * C, bias=False)
        self.ln_q = RMSNorm(C, 1e-6)
        self.ln_kv = RMSNorm(C, 1e-6)
        self.c_q = nn.Linear(C, C, bias=False)
        self.c_k = nn.Linear(C, C, bias=False)
        self.c_v = nn.Linear(C, C, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x, patch_of):
        """Bytes x (B, T, C) and the patch of each (B, T) -> patches (B, P, K, C). A text with fewer
        than P patches gets empty ones at its end, which nobody reads."""
        B, T, C = x.shape
        P = int(patch_of.max()) + 1
        K, H = self.n_query, self.n_head

        # A patch starts as the maximum of its bytes, channel by channel; an empty one as 0.
        index = patch_of[:, :, None].expand(B, T, C)
        pooled = x.new_zeros(B, P, C).scatter_reduce(1, index, x, "amax", include_self=False)
        patches = self.pool_proj(pooled).view(B, P * K, C)

        # Which byte may which query see? Those of its own patch. An empty patch sees byte 0,
        # because a softmax over nothing is not a number.
        numbers = torch.arange(P, device=x.device)
        own = patch_of[:, None, :] == numbers[None, :, None]  # (B, P, T)
        empty = ~own.any(dim=2)  # (B, P)
        own[:, :, 0] |= empty
        mask = own.repeat_interleave(K, dim=1)[:, None]  # (B, 1, P * K, T)

        q = self.c_q(self.ln_q(patches)).view(B, P * K, H, -1).transpose(1, 2)  # (B, H, P * K, D)
        bytes_in = self.ln_kv(x)
        k = self.c_k(bytes_in).view(B, T, H, -1).transpose(1, 2)  # (B, H, T, D)
        v = self.c_v(bytes_in).view(B, T, H, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.transpose(1, 2).reshape(B, P * K, C)
        return (patches + self.c_proj(y)).view(B, P, K, C)


class ByteReader(nn.Module):
    """The beginning of the local decoder: each byte reads the K sub-vectors of one patch by
    cross-attention (section 3.3)."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_local
        self.n_head = cfg.n_head
        self.ln_q = RMSNorm(C, 1e-6)
        self.ln_kv = RMSNorm(C, 1e-6)
        self.c_q = nn.Linear(C, C, bias=False)
        self.c_k = nn.Linear(C, C, bias=False)
        self.c_v = nn.Linear(C, C, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x, patches, read):
        """Bytes x (B, T, C), patches (B, P, K, C), and the patch that each byte reads, (B, T)
        -> what is added to the bytes, (B, T, C)."""
        B, T, C = x.shape
        H = self.n_head

        # Keys and values are computed once for each patch, and then copied to its readers.
        patches = self.ln_kv(patches)
        row = torch.arange(B, device=x.device)[:, None]  # (B, 1)
        k = self.c_k(patches)[row, read].view(B, T, -1, H, C // H)  # (B, T, K, H, D)
        v = self.c_v(patches)[row, read].view(B, T, -1, H, C // H)

        q = self.c_q(self.ln_q(x)).view(B, T, 1, H, C // H)
        scores = (q * k).sum(dim=-1, keepdim=True) * (C // H) ** -0.5  # (B, T, K, H, 1)
        y = (scores.softmax(dim=2) * v).sum(dim=2)  # (B, T, H, D)
        return self.c_proj(y.reshape(B, T, C))


class BLT(nn.Module):
    """The Byte Latent Transformer: bytes -> patches -> bytes. It has the interface of GPT."""

    def __init__(self, cfg, entropy_model=None):
        super().__init__()
        self.cfg = cfg
        rows = cfg.hash_rows if cfg.ngrams else 0
        self.patcher = Patcher(cfg, entropy_model)
        self.wte = ByteEmbedding(cfg.n_local, rows)
        self.encoder = Transformer(cfg.transformer(cfg.n_encoder, cfg.n_local))
        self.patch_reader = PatchReader(cfg)
        self.trunk = Transformer(cfg.transformer(cfg.n_layer, cfg.n_query * cfg.n_local))
        self.byte_reader = ByteReader(cfg)
        self.decoder = Transformer(cfg.transformer(cfg.n_decoder, cfg.n_local))
        self.ln_f = RMSNorm(cfg.n_local, 1e-6)
        self.lm_head = nn.Linear(cfg.n_local, 256, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        self.patcher.requires_grad_(False)

    def forward(self, idx, targets=None):
        """idx (B, T) bytes, targets (B, T) -> logits (B, T, 256), and the mean loss in nats per
        byte (None without targets). Targets of -100 do not count."""
        patch_of = patch_numbers(self.patcher(idx))  # (B, T + 1)

        # local encoder
        x = self.encoder(self.wte(idx))  # (B, T, C)
        patches = self.patch_reader(x, patch_of[:, :-1])  # (B, P, K, C)

        # global transformer; a patch is one vector of K * C channels
        patches = self.trunk(patches.flatten(2)).view(patches.shape)  # (B, P, K, C)

        # local decoder
        x = x + self.byte_reader(x, patches, complete_patches(patch_of))  # (B, T, C)
        x = self.decoder(x)
        logits = self.lm_head(self.ln_f(x))  # (B, T, 256)

        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        return logits, loss


class ByteGPT(GPT):
    """Part 9's GPT, on bytes and with the embeddings of hashed n-grams if rows > 0."""

    def __init__(self, cfg, rows):
        super().__init__(cfg)
        self.wte = ByteEmbedding(cfg.n_embd, rows)


@torch.no_grad()
def generate(model, rows, max_new, temperature=0.0, stop=None):
    """Continues each of the rows, lists of ids of any lengths -> lists of the new ids.

    Every step runs the whole text through the model again, so that the numbers are those of
    training. (A BLT that is used in earnest keeps the keys and values of all layers, and runs its
    global transformer only when a patch is complete.) All rows grow at the same time and are padded
    on the right, where a causal model does not look. A row ends with the first id for which
    stop(id) is True.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    padded = [torch.tensor(row) for row in rows]
    ids = nn.utils.rnn.pad_sequence(padded, batch_first=True).to(device)
    ids = F.pad(ids, (0, max_new))
    alive = [True] * len(rows)
    new = [[] for _ in rows]
    index = torch.arange(len(rows), device=device)
    for _ in range(max_new):
        logits, _ = model(ids[:, : int(lengths.max())])
        drawn = sample(logits[index, lengths - 1], temperature)  # (B,)
        ids[index, lengths] = drawn
        lengths = lengths + 1
        for i, token in enumerate(drawn.tolist()):
            if alive[i]:
                new[i].append(token)
                alive[i] = stop is None or not stop(token)
        if not any(alive):
            break
    return new


# the cost of a byte -------------------------------------------------------------------------------
#
# Floating-point operations of the forward pass for each byte of text. A multiplication and an
# addition are two operations. A matrix of n parameters thus costs 2 n at each position, and
# attention costs 4 times its channels for each key: once for the score, once for the sum of values.
# In a causal text of T positions a query has (T + 1) / 2 keys on average. Embeddings, norms and
# softmax are not counted. Training costs three times as much.


def transformer_flops(cfg, T):
    """Operations of one position in a stack of blocks, without embedding and head."""
    q_dim = cfg.n_head * cfg.head_dim
    kv_dim = cfg.n_kv_head * cfg.head_dim
    matrices = cfg.n_embd * (2 * q_dim + 2 * kv_dim) + 3 * cfg.n_embd * cfg.mlp_dim
    keys = (T + 1) / 2
    return cfg.n_layer * (2 * matrices + 4 * q_dim * keys)


def gpt_flops(cfg, T, bytes_per_id):
    """Operations of a GPT per byte, in rows of T ids."""
    per_id = transformer_flops(cfg, T) + 2 * cfg.n_embd * cfg.vocab_size
    return per_id / bytes_per_id


def blt_flops(cfg, bytes_per_patch, entropy_cfg=None):
    """Operations of a BLT per byte, in rows of cfg.block_size bytes. With the config of an entropy
    model its operations are counted, too.

    A byte passes through the local transformers, has a key and a value for the K queries of its
    patch, a query for the K sub-vectors that it reads, and a head of 256 rows. What a patch costs
    (its pooled vector, its queries, the global transformer, its keys and values) is shared by its
    bytes.
    """
    C, K, T = cfg.n_local, cfg.n_query, cfg.block_size
    local = cfg.transformer(cfg.n_encoder + cfg.n_decoder, C)
    per_byte = transformer_flops(local, T)
    per_byte += 2 * 2 * C * C + 4 * C * K  # local encoder: keys and values; attention of K queries
    per_byte += 2 * 2 * C * C + 4 * C * K  # local decoder: query and projection; attention
    per_byte += 2 * C * 256
    if entropy_cfg is not None:
        per_byte += gpt_flops(entropy_cfg, T, 1)

    per_patch = 2 * C * K * C  # the pooled vector becomes K sub-vectors
    per_patch += K * 2 * 2 * C * C  # local encoder: queries and projections
    per_patch += K * 2 * 2 * C * C  # local decoder: keys and values
    per_patch += transformer_flops(cfg.transformer(cfg.n_layer, K * C), T / bytes_per_patch)
    return per_byte + per_patch / bytes_per_patch


def match_gpt(flops, T, bytes_per_id, vocab_size, n_layer=4, n_head=4):
    """The config of the GPT whose cost per byte is nearest to so many operations."""
    best = None
    best_distance = float("inf")
    for n_embd in range(2 * n_head, 1024, 2 * n_head):
        cfg = GPTConfig(vocab_size, T, n_layer, n_head, n_embd, n_kv_head=n_head)
        distance = abs(gpt_flops(cfg, T, bytes_per_id) - flops)
        if distance < best_distance:
            best = cfg
            best_distance = distance
    return best


# train, evaluate, draw ----------------------------------------------------------------------------


def lr_scale(step, steps, cfg):
    """The learning rate of a step (0, 1, ...) as a share of its peak: warm up, hold, then decay
    linearly to 0."""
    up = (step + 1) / max(1.0, cfg.warmup * steps)
    down = (steps - step) / max(1.0, cfg.decay * steps)
    return max(0.0, min(1.0, up, down))


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
    """Muon for the matrices inside of the model; AdamW for embeddings, the head and the gains of
    norms -> a list of both. A part of the model that is frozen gets neither."""
    hidden = []
    others = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim == 2 and "wte" not in name and "lm_head" not in name:
            hidden.append(p)
        else:
            others.append(p)

    muon = Muon(hidden, lr=cfg.lr)
    adamw = torch.optim.AdamW(others, lr=cfg.lr_adamw, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def fit(model, batch_of, steps, cfg, after_step=None):
    """Trains the model in place. batch_of(step) gives inputs and targets, and after_step(step,
    loss) is called when a step is done."""
    device = next(model.parameters()).device
    optimizers = make_optimizers(model, cfg)
    for step in range(steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_scale(step, steps, cfg)

        x, y = batch_of(step)
        _, loss = model(x.to(device), y.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if after_step is not None:
            after_step(step, loss.item())


def entropy_config(blt_cfg):
    """The small byte model whose entropies cut the text: one layer with 32 channels."""
    return GPTConfig(256, blt_cfg.block_size, n_layer=1, n_head=2, n_embd=32)


def train_entropy_model(data, cfg, blt_cfg, device):
    """Trains the small byte model on the text, and freezes it."""
    torch.manual_seed(cfg.seed)
    model = GPT(entropy_config(blt_cfg)).to(device)

    def batch_of(step):
        return get_batch(data, step, 2 * cfg.batch_size, cfg.seed + 1)

    fit(model, batch_of, cfg.entropy_steps, cfg)
    return model.requires_grad_(False)


class Made(NamedTuple):
    model: nn.Module
    bytes_per_unit: float  # mean number of bytes of a patch or of an id
    flops: float  # per byte, forward


@torch.no_grad()
def mean_patch_bytes(patcher, data):
    """The mean number of bytes per patch on the validation text, in the rows of the evaluation."""
    n_bytes = 0
    n_patches = 0
    device = patcher.threshold.device
    for first, last in zip(data.edges.tolist(), data.edges.tolist()[1:]):
        row = data.val_ids[first:last].to(device)
        n_bytes += len(row)
        n_patches += patcher(row[None])[:, :-1].sum().item()
    return n_bytes / n_patches


def make_model(cfg, blt_cfg, data, entropy_model, device):
    """A new model of the kind cfg.kind -> Made. The BLT's size is that of blt_cfg. A GPT gets the
    size with which it costs as much per byte as a BLT with patches of the wanted length."""
    entropy_cfg = entropy_config(blt_cfg)
    torch.manual_seed(cfg.seed)
    if cfg.kind == "blt":
        model = BLT(blt_cfg, entropy_model).to(device)
        x, _ = get_batch(data, 0, 64, cfg.seed + 2)
        model.patcher.set_threshold(x.to(device), blt_cfg.patch_bytes)
        bytes_per_patch = mean_patch_bytes(model.patcher, data)
        counted = entropy_cfg if model.patcher.needs_entropy else None
        return Made(model, bytes_per_patch, blt_flops(blt_cfg, bytes_per_patch, counted))

    budget = blt_flops(blt_cfg, blt_cfg.patch_bytes, entropy_cfg)
    gpt_cfg = match_gpt(budget, data.block_size, data.bytes_per_id, data.tok.vocab_size)
    flops = gpt_flops(gpt_cfg, data.block_size, data.bytes_per_id)
    if cfg.kind == "byte":
        model = ByteGPT(gpt_cfg, blt_cfg.hash_rows if blt_cfg.ngrams else 0)
    else:
        model = GPT(gpt_cfg)
    return Made(model.to(device), data.bytes_per_id, flops)


@torch.no_grad()
def evaluate(model, data):
    """The loss on the whole validation text in nats per byte, which models with different units can
    be compared by. One row goes from each edge to the next."""
    device = next(model.parameters()).device
    nats = 0.0
    for i in range(0, len(data.edges) - 1, 32):
        edges = data.edges[i : i + 33]
        first = edges[:-1, None]  # (rows, 1)
        last = edges[1:, None]  # (rows, 1)

        # Rows of different lengths: positions after a row's last id are not targets.
        position = first + torch.arange((last - first).max())  # (rows, T)
        x = data.val_ids[position.clamp(max=len(data.val_ids) - 2)]
        y = data.val_ids[(position + 1).clamp(max=len(data.val_ids) - 1)]
        y = y.masked_fill(position >= last, -100)
        _, loss = model(x.to(device), y.to(device))
        nats += loss.item() * (last - first).sum().item()
    return nats / data.val_bytes


def bpe_tokenizer(text, vocab_size):
    return Tokenizer(train_ranks(text.train, vocab_size - 256 - len(SPECIAL)))


def to_checkpoint(kind, model, tok):
    """A trained model as plain data, for save_checkpoint and load_model."""
    content = {
        "model_kind": kind,
        "model_config": asdict(model.cfg),
        "weights": model.state_dict(),
    }
    if kind == "bpe":
        content["tokenizer"] = tok.state()
    if kind == "byte":
        content["rows"] = model.wte.rows
    if kind == "blt" and model.patcher.needs_entropy:
        content["entropy_config"] = asdict(model.patcher.entropy_model.cfg)
    return content


def load_model(checkpoint):
    """What to_checkpoint described -> the model and its tokenizer."""
    kind = checkpoint["model_kind"]
    tok = Bytes()
    if kind == "blt":
        entropy_model = None
        if "entropy_config" in checkpoint:
            entropy_model = GPT(GPTConfig(**checkpoint["entropy_config"]))
        model = BLT(BLTConfig(**checkpoint["model_config"]), entropy_model)
    elif kind == "byte":
        model = ByteGPT(GPTConfig(**checkpoint["model_config"]), checkpoint["rows"])
    else:
        model = GPT(GPTConfig(**checkpoint["model_config"]))
        tok = Tokenizer.load(checkpoint["tokenizer"])
    model.load_state_dict(checkpoint["weights"])
    return model, tok


def draw(records, title, entropy, bytes_per_id, path):
    """The losses over training, both in nats per byte, and the true entropy."""
    fig, ax = figure(title, "optimizer step", "nats per byte")
    steps = [record["step"] for record in records]
    losses = [record["loss"] / bytes_per_id for record in records]
    ax.plot(steps, losses, alpha=0.6, label="training batch")
    evaluations = [record for record in records if "val_loss" in record]
    steps = [record["step"] for record in evaluations]
    losses = [record["val_loss"] for record in evaluations]
    ax.plot(steps, losses, "o-", label="validation text")
    if entropy:
        label = f"true entropy of the world, {entropy:.3f}"
        ax.axhline(entropy, color="C2", linestyle="--", label=label)
    ax.set(ylim=(0, 4 * losses[-1]))
    ax.legend()
    save_figure(fig, path)


if __name__ == "__main__":
    cfg, blt_cfg = parse_args(Config, BLTConfig)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # data: the bytes of the text, and for a GPT on tokens its tokens
    if cfg.vocab_size < 256 + len(SPECIAL):
        fail(f"--vocab_size={cfg.vocab_size} must be at least {256 + len(SPECIAL)}")
    text = load_text(cfg)
    data = encode_data(text, Bytes(), blt_cfg.block_size, cfg.data)
    if cfg.kind == "bpe":
        tok = bpe_tokenizer(text, cfg.vocab_size)
        data = encode_data(text, tok, blt_cfg.block_size, cfg.data)
    out = output_folder(cfg)

    # model
    entropy_model = None
    if cfg.kind == "blt" and blt_cfg.patching in ("global", "monotonic"):
        print("training the small byte model whose entropies cut the text", flush=True)
        entropy_model = train_entropy_model(data, cfg, blt_cfg, device)
        print(f"it reaches {evaluate(entropy_model, data):.3f} nats per byte", flush=True)
    model, bytes_per_unit, flops = make_model(cfg, blt_cfg, data, entropy_model, device)
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    unit = "patch" if cfg.kind == "blt" else "id"
    print(
        f"{params:,} parameters, {flops / 1e3:.0f} kFLOPs per byte, {bytes_per_unit:.2f} bytes per "
        f"{unit}, {len(data.train_ids):,} ids of training text"
    )

    # training
    log = Log(out, cfg.steps, name="train_blt")

    def batch_of(step):
        return get_batch(data, step, cfg.batch_size, cfg.seed)

    def after_step(step, loss):
        values = {"loss": loss, "lr": cfg.lr * lr_scale(step, cfg.steps, cfg)}
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            values["val_loss"] = evaluate(model, data)
        log(step, **values)

    fit(model, batch_of, cfg.steps, cfg, after_step)
    seconds = log.seconds

    # save the model and what it reached
    records = read_log(out, "train_blt")
    val_loss = records[-1]["val_loss"]
    save_checkpoint(
        out / "blt.pt",
        kind="blt",
        changed=cfg.changed,
        step=cfg.steps,
        config=asdict(cfg),
        **to_checkpoint(cfg.kind, model, data.tok),
    )
    save_metrics(
        out,
        name="train_blt",
        val_loss=val_loss,
        true_nats_per_byte=text.entropy,
        flops_per_byte=flops,
        bytes_per_unit=bytes_per_unit,
        seconds=seconds,
        params=params,
        steps=cfg.steps,
        seed=cfg.seed,
    )

    # show what it learned
    prompt = data.val_ids[: max(1, data.block_size // 3)].tolist()
    [new] = generate(model, [prompt], data.block_size - len(prompt), temperature=0.8)
    print(data.tok.decode(prompt + new))
    print(f"{val_loss:.4f} nats per byte after {seconds:.0f} s")
    name = {"blt": "BLT", "byte": "GPT on bytes", "bpe": "GPT on tokens"}[cfg.kind]
    title = f"{name}: {val_loss:.3f} nats per byte at {bytes_per_unit:.1f} bytes per {unit}"
    draw(records, title, text.entropy, data.bytes_per_id, out / "train_blt.png")
