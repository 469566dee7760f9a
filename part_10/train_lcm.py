"""
Part 10: a Large Concept Model. It predicts the next sentence, as a vector, instead of the next
token.

    python part_10/train_lcm.py                    two towers: diffusion -> out/lcm.pt
    python part_10/train_lcm.py --kind=base        regression with the mean squared error
    python part_10/train_lcm.py --kind=quant       residual quantization and cross-entropy
    python part_10/train_lcm.py --kind=token       for comparison: a GPT on the same stories
    python part_10/train_sonar.py --data=my.txt --out=my
    python part_10/train_lcm.py --data=my.txt --sonar=my/sonar.pt --given=1
                                                   your own text, after its autoencoder

Starts here. The optimizers and the loading of the text come from train_sonar.py.

The sentences of a document become vectors (train_sonar.py), and a transformer reads them as another
one reads tokens. What is hard is the output. A model of tokens gives every token a probability, but
the sentences cannot be counted, so there is no softmax over them. Barrault et al. 2024, "Large
Concept Models", compare several answers. Three of them are here:

    Base-LCM    a regression: the mean squared error to the vector of the next sentence. If several
                sentences may follow, the best answer is their mean, which is no sentence.
    Two-Tower   diffusion: one transformer reads the past (the contextualiser), and a second one
                turns noise into the next vector in several steps (the denoiser).
    Quant-LCM   each vector is written as a sum of code vectors, from coarse to fine, and each code
                is drawn from a softmax.

The paper has two more, which are not here: the One-Tower diffusion model, and a Quant-LCM that
predicts the vector instead of the codes.

Vectors are standardised: each of their numbers has mean 0 and variance 1 over the training text
(the paper's PreNet and PostNet). The first `given` sentences are the brief and never targets.

Shapes: B batch, S sentences of the past, Q queries, C channels (= n_embd), H heads, L levels of the
        quantization, K codes of a level, D numbers in a sentence vector, T noise levels.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, MLP, Block, GPTConfig, RMSNorm, causal_mask, rope, rope_table, sample
from shared import (
    Log,
    fail,
    figure,
    judge,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    read_jsonl,
    read_log,
    require,
    save_checkpoint,
    save_figure,
    save_metrics,
    set_seed,
)
from train_sonar import (
    THE_END,
    Sonar,
    load_documents,
    lr_scale,
    make_optimizers,
    pad,
    set_lr,
    split_sentences,
    update,
)

KINDS = ("base", "two_tower", "quant", "token")
STOP_COSINE = 0.9  # a vector that is nearer to THE_END or to the last sentence ends the document
MOST_SENTENCES = 12  # a document without an end is cut off after so many new sentences
LONGEST_STORY = 90  # tokens of a story that the token model writes


class Recipe(NamedTuple):
    """What suits one kind of model. Tried out, for about equal sizes."""

    steps: int
    batch_size: int
    n_embd: int
    n_layer: int
    lr: float


RECIPES = {
    "base": Recipe(steps=400, batch_size=128, n_embd=128, n_layer=3, lr=0.02),
    "two_tower": Recipe(steps=600, batch_size=64, n_embd=96, n_layer=2, lr=0.02),
    "quant": Recipe(steps=400, batch_size=64, n_embd=96, n_layer=2, lr=0.02),
    "token": Recipe(steps=800, batch_size=24, n_embd=128, n_layer=3, lr=0.01),
}


@dataclass
class Config:
    kind: str = "two_tower"  # base, two_tower, quant, or token (a GPT)
    # data
    data: str = "stories"  # stories (the built-in world) or a text file, blank lines between texts
    sonar: str = ""  # checkpoint of the sentence autoencoder; empty: part_10/out/sonar.pt
    given: int = 2  # sentences at the beginning of a document that are given and never predicted
    sentences: int = 32  # most sentences of a document; longer ones are cut into pieces
    # model and training; 0 means what suits the kind
    n_layer: int = 0  # blocks of Base and of GPT, or of each of the two towers; 0: by kind
    n_embd: int = 0  # C, channels; 0: by kind
    steps: int = 0  # optimizer steps; 0: by kind
    batch_size: int = 0  # documents per step; 0: by kind
    lr: float = 0.0  # learning rate of Muon, for the blocks' matrices; 0: by kind
    lr_adamw: float = 3e-3  # learning rate of AdamW, for everything else
    warmup: float = 0.03  # share of the steps in which the learning rate rises to its peak
    decay: float = 0.5  # share of the steps, at the end, in which it falls linearly to 0
    grad_clip: float = 1.0  # largest norm of the gradient; a larger one is scaled down
    # diffusion
    draws: int = 4  # noises per sentence and step: the context is computed once for all of them
    drop: float = 0.15  # share of documents whose context is hidden, for the sake of guidance
    # quantization
    levels: int = 8  # L, codes of a sentence, from coarse to fine
    codes: int = 64  # K, code vectors of each level
    # run
    prompts: int = 200  # held-out briefs that are answered and judged at the end
    eval_every: int = 100  # steps between evaluations on held-out documents; 0: only at the end
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.kind in KINDS, f"--kind={self.kind} must be one of {', '.join(KINDS)}"
        for name, value in RECIPES[self.kind]._asdict().items():
            if getattr(self, name) == 0:
                setattr(self, name, value)

        for name in ("given", "n_layer", "n_embd", "steps", "batch_size", "draws", "levels"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.data == "stories" or self.sonar, (
            f"data={self.data} needs --sonar: an autoencoder of this text, by train_sonar.py"
        )
        assert self.codes > 1, f"codes={self.codes} must be at least 2"
        assert self.prompts > 0, f"prompts={self.prompts} must be at least 1"
        assert 0 <= self.drop < 1, f"drop={self.drop} must be at least 0 and below 1"
        assert self.n_embd % 8 == 0, (
            f"n_embd={self.n_embd} must be divisible by 8: 4 heads of pairs"
        )
        assert self.sentences > self.given, (
            f"sentences={self.sentences} must be above given={self.given}: or nothing is predicted"
        )


# Base-LCM: regression -----------------------------------------------------------------------------


def masked_mse(predicted, target, is_target):
    """The mean squared error per number, over the vectors (..., D) where is_target (...) holds."""
    squares = (predicted - target).square().mean(dim=-1)
    return squares[is_target].mean()


class Context(nn.Module):
    """A causal transformer over sentence vectors: (B, S, D) -> hidden states (B, S, C)."""

    def __init__(self, cfg, dim):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Linear(dim, cfg.n_embd)
        self.blocks = nn.ModuleList([Block(cfg, layer) for layer in range(cfg.n_layer)])
        self.norm = RMSNorm(cfg.n_embd, cfg.norm_eps)

    def forward(self, x):
        positions = torch.arange(x.size(1), device=x.device)
        mask = causal_mask(positions, positions)
        cos, sin = rope_table(positions, self.cfg.head_dim, self.cfg.rope_base)
        x = self.embed(x)  # (B, S, C)
        for block in self.blocks:
            x = block(x, mask, cos, sin, None)
        return self.norm(x)


class BaseLCM(nn.Module):
    """The vector after each sentence, by regression."""

    def __init__(self, cfg, dim):
        super().__init__()
        self.context = Context(cfg, dim)
        self.head = nn.Linear(cfg.n_embd, dim)

    def loss(self, x, is_target):
        """x (B, S, D) standardised vectors; is_target (B, S) says which of them count."""
        predicted = self.head(self.context(x[:, :-1]))  # (B, S - 1, D)
        return masked_mse(predicted, x[:, 1:], is_target[:, 1:])

    @torch.no_grad()
    def next_vectors(self, x, only_last=False):
        """x (B, S, D) -> the vector that follows each of them, (B, S, D), or only that after the
        last one, (B, 1, D). The one after sentence i depends on the sentences up to i alone."""
        h = self.context(x)
        if only_last:
            h = h[:, -1:]
        return self.head(h)


# Two-Tower LCM: diffusion -------------------------------------------------------------------------


def cosine_schedule(T, s=0.008):
    """How much signal and noise a vector has after t = 0 .. T steps -> two tensors (T + 1,).

    x_t = signal[t] x_0 + noise[t] n, with signal^2 + noise^2 = 1 (Nichol & Dhariwal 2021, eq. 17).
    At t = T no signal is left at all, so writing may start from pure noise.
    """
    t = torch.arange(T + 1, dtype=torch.float64) / T
    angle = (t + s) / (1 + s) * math.pi / 2
    signal = angle.cos() / math.cos(s / (1 + s) * math.pi / 2)
    signal[-1] = 0.0  # cos(pi / 2) up to rounding
    noise = (1 - signal.square()).clamp(min=0).sqrt()
    return signal.float(), noise.float()


def ddim_step(x, x0, t, t_next, signal, noise):
    """One deterministic step from t to a smaller t_next, given the model's guess x0 of the clean
    vector (Song et al. 2021, DDIM, eq. 12 with sigma = 0).

    The guess says which noise is in x. The same noise, but less of it, is put back on the guess.
    """
    direction = (x - signal[t] * x0) / noise[t]
    return signal[t_next] * x0 + noise[t_next] * direction


def guide(conditional, unconditional, scale):
    """Classifier-free guidance (Ho & Salimans 2022): away from what one would guess without the
    context. Scale 1 is the conditional guess itself."""
    return unconditional + scale * (conditional - unconditional)


class CrossAttention(nn.Module):
    """Queries x (B, Q, C) look at the hidden states h (B, S, C) of the past, or at a learned null
    key, which is always there: without a context there would be nothing to look at."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.null = nn.Parameter(torch.randn(cfg.n_embd))
        self.c_q = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.c_k = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.c_v = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def split_heads(self, x):
        """(B, T, C) -> (B, H, T, C / H)"""
        return x.unflatten(-1, (self.cfg.n_head, -1)).transpose(1, 2)

    def forward(self, x, h, place, visible):
        """place (Q,) is the position of the sentence that each query predicts, and visible
        (B, Q, S) says which sentences it may see."""
        B, Q, C = x.shape
        S = h.size(1)
        null = self.null.expand(B, 1, C)
        h = torch.cat([null, h], dim=1)  # (B, 1 + S, C)

        q = self.q_norm(self.split_heads(self.c_q(x)))  # (B, H, Q, C / H)
        k = self.k_norm(self.split_heads(self.c_k(h)))  # (B, H, 1 + S, C / H)
        v = self.split_heads(self.c_v(h))

        # RoPE: a query must know which of the sentences is the last one before it. The null key
        # stands before the first sentence.
        key_place = torch.arange(-1, S, device=x.device)
        q = rope(q, *rope_table(place, self.cfg.head_dim, self.cfg.rope_base))
        k = rope(k, *rope_table(key_place, self.cfg.head_dim, self.cfg.rope_base))

        mask = F.pad(visible, (1, 0), value=True)[:, None]  # (B, 1, Q, 1 + S)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, Q, C)


class Modulation(nn.Module):
    """AdaLN-zero (Peebles & Xie 2023): the condition chooses how a branch is shifted, scaled and
    weighted. All three start at 0, so that a new block is the identity."""

    def __init__(self, channels):
        super().__init__()
        self.linear = nn.Linear(channels, 3 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition):
        """(B, Q, C) -> shift, scale and gate, (B, Q, C) each."""
        return self.linear(F.silu(condition)).chunk(3, dim=-1)


class DenoiserBlock(nn.Module):
    """Cross-attention to the past and an MLP, both with AdaLN-zero. There is no self-attention: the
    sentences that are predicted in parallel must not see each other."""

    def __init__(self, cfg):
        super().__init__()
        self.norm_1 = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.modulation_1 = Modulation(cfg.n_embd)
        self.attn = CrossAttention(cfg)
        self.norm_2 = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.modulation_2 = Modulation(cfg.n_embd)
        self.mlp = MLP(cfg)

        # The MLP's output begins at zero in all other parts. Here the gate does already, and the
        # gradient of a product of two zeros is zero: the branch would never learn.
        nn.init.normal_(self.mlp.c_proj.weight, std=cfg.mlp_dim**-0.5)

    def forward(self, x, h, place, visible, condition):
        shift, scale, gate = self.modulation_1(condition)
        x = x + gate * self.attn(self.norm_1(x) * (1 + scale) + shift, h, place, visible)
        shift, scale, gate = self.modulation_2(condition)
        x = x + gate * self.mlp(self.norm_2(x) * (1 + scale) + shift)
        return x


def timestep_features(t, channels):
    """Steps t (B, Q) -> (B, Q, channels): sines and cosines of many frequencies, as for positions
    in Vaswani et al. 2017."""
    frequency = 1000.0 ** -torch.linspace(0, 1, channels // 2, device=t.device)
    angle = t[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TwoTowerLCM(nn.Module):
    """Diffusion over the next vector. The contextualiser reads the past once, and the denoiser
    looks at it in each of its steps. The denoiser predicts the clean vector x_0, not the noise."""

    T = 100  # noise levels in training; writing uses a part of them

    def __init__(self, cfg, dim, draws=4, drop=0.15):
        super().__init__()
        self.draws = draws
        self.drop = drop
        self.context = Context(cfg, dim)
        self.embed = nn.Linear(dim, cfg.n_embd)
        self.time = nn.Sequential(
            nn.Linear(cfg.n_embd, cfg.n_embd), nn.SiLU(), nn.Linear(cfg.n_embd, cfg.n_embd)
        )
        self.denoiser = nn.ModuleList([DenoiserBlock(cfg) for _ in range(cfg.n_layer)])
        self.norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.head = nn.Linear(cfg.n_embd, dim)
        signal, noise = cosine_schedule(self.T)
        self.register_buffer("signal", signal, persistent=False)
        self.register_buffer("noise", noise, persistent=False)

    def denoise(self, x, t, h, place, visible):
        """Noisy vectors x (B, Q, D) at steps t (B, Q) -> guesses of the clean ones (B, Q, D)."""
        y = self.embed(x)  # (B, Q, C)
        condition = self.time(timestep_features(t, y.size(-1)))  # (B, Q, C)
        for block in self.denoiser:
            y = block(y, h, place, visible, condition)
        return self.head(self.norm(y))

    def loss(self, x, is_target):
        """x (B, S, D) standardised vectors; is_target (B, S) says which of them count."""
        B, S, D = x.shape
        h = self.context(x[:, :-1])  # (B, S - 1, C), once for all draws

        # Several noises for each sentence. The copies stand behind each other in the queries' axis.
        place = torch.arange(1, S, device=x.device).repeat(self.draws)  # (Q,)
        clean = x[:, place]  # (B, Q, D)
        t = torch.randint(1, self.T + 1, clean.shape[:2], device=x.device)  # (B, Q)
        signal = self.signal[t][..., None]
        noise = self.noise[t][..., None]
        noisy = signal * clean + noise * torch.randn_like(clean)

        # Some documents hide their context, so that the model can also guess without one.
        visible = causal_mask(place - 1, torch.arange(S - 1, device=x.device))  # (Q, S - 1)
        keep = torch.rand(B, device=x.device) >= self.drop
        visible = visible & keep[:, None, None]  # (B, Q, S - 1)
        guess = self.denoise(noisy, t, h, place, visible)
        return masked_mse(guess, clean, is_target[:, place])

    @torch.no_grad()
    def next_vectors(self, x, only_last=False, denoising_steps=20, guidance=1.0):
        """x (B, S, D) -> a sample of the vector that follows each of them, (B, S, D), or only of
        that after the last one, (B, 1, D)."""
        B, S, D = x.shape
        h = self.context(x)
        place = torch.arange(1, S + 1, device=x.device)  # (Q,)
        if only_last:
            place = place[-1:]
        visible = causal_mask(place - 1, torch.arange(S, device=x.device))  # (Q, S)
        visible = visible.expand(B, -1, -1)
        hidden = torch.zeros_like(visible)

        # From pure noise at T down to 0 in equal strides.
        y = torch.randn(B, len(place), D, device=x.device)
        stops = torch.linspace(self.T, 0, denoising_steps + 1).round().long().tolist()
        for now, after in zip(stops, stops[1:]):
            t = torch.full(y.shape[:2], now, device=x.device)
            guess = self.denoise(y, t, h, place, visible)
            if guidance != 1:
                guess = guide(guess, self.denoise(y, t, h, place, hidden), guidance)
            y = ddim_step(y, guess, now, after, self.signal, self.noise)
        return y


# Quant-LCM: residual quantization -----------------------------------------------------------------


def nearest(vectors, centroids):
    """For each vector (N, D) the index (N,) of the nearest centroid (K, D)."""
    # |v - c|^2 = |v|^2 - 2 v c + |c|^2, and |v|^2 is the same for all centroids.
    distance = centroids.square().sum(dim=1) - 2 * vectors @ centroids.T  # (N, K)
    return distance.argmin(dim=1)


def k_means(vectors, k, rounds, generator):
    """Lloyd's algorithm: vectors (N, D) -> centroids (k, D). A centroid without vectors stays."""
    choice = torch.randperm(len(vectors), generator=generator)[:k]
    centroids = vectors[choice].clone()
    if len(choice) < k:  # fewer vectors than centroids: the others are never the nearest
        far = torch.full((k - len(choice), vectors.size(1)), 1e4)
        centroids = torch.cat([centroids, far.to(vectors)])

    for _ in range(rounds):
        index = nearest(vectors, centroids)
        counts = torch.bincount(index, minlength=k)
        sums = torch.zeros_like(centroids).index_add(0, index, vectors)
        means = sums / counts.clamp(min=1)[:, None]
        centroids = torch.where(counts[:, None] > 0, means, centroids)
    return centroids


def fit_codebooks(vectors, levels, codes, generator, rounds=15):
    """Residual quantization (Juang & Gray 1982): the first level's centroids describe the vectors,
    those of each further level what the levels before have left over -> (L, K, D)."""
    residual = vectors
    codebooks = []
    for _ in range(levels):
        centroids = k_means(residual, codes, rounds, generator)
        codebooks.append(centroids)
        residual = residual - centroids[nearest(residual, centroids)]
    return torch.stack(codebooks)


def quantize(vectors, codebooks):
    """Vectors (N, D) -> their codes (N, L): at each level the code that is nearest to the rest."""
    residual = vectors
    codes = []
    for centroids in codebooks:
        index = nearest(residual, centroids)
        codes.append(index)
        residual = residual - centroids[index]
    return torch.stack(codes, dim=1)


class QuantLCM(nn.Module):
    """The next vector as a sum of code vectors, one from each level. The second tower sees the sum
    so far in place of a noisy vector, and the level in place of the time. It gives the codes of the
    next level their probabilities (the paper's Quant-LCM-d)."""

    def __init__(self, cfg, dim, levels=8, codes=64):
        super().__init__()
        self.levels = levels
        self.codes = codes
        self.context = Context(cfg, dim)
        self.embed = nn.Linear(dim, cfg.n_embd)
        self.level = nn.Embedding(levels, cfg.n_embd)
        self.denoiser = nn.ModuleList([DenoiserBlock(cfg) for _ in range(cfg.n_layer)])
        self.norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.head = nn.Linear(cfg.n_embd, levels * codes)
        self.register_buffer("codebooks", torch.zeros(levels, codes, dim))

    def logits(self, partial, level, h, place, visible):
        """Sums so far (B, Q, D), and the levels (Q,) that come next -> logits (B, Q, K)."""
        x = self.embed(partial)  # (B, Q, C)
        condition = self.level(level).expand(x.shape)
        for block in self.denoiser:
            x = block(x, h, place, visible, condition)
        all_levels = self.head(self.norm(x)).unflatten(-1, (self.levels, self.codes))
        index = level[None, :, None, None].expand(x.size(0), -1, 1, self.codes)
        return all_levels.gather(2, index).squeeze(2)

    def loss(self, x, is_target):
        """x (B, S, D) standardised vectors; is_target (B, S) says which of them count. The loss is
        in nats per code."""
        B, S, D = x.shape
        h = self.context(x[:, :-1])  # (B, S - 1, C)
        codes = quantize(x[:, 1:].flatten(0, 1), self.codebooks)  # (B * (S - 1), L)
        codes = codes.view(B, S - 1, self.levels)

        # the code vector that each level adds
        chosen = []
        for level in range(self.levels):
            chosen.append(self.codebooks[level][codes[:, :, level]])  # (B, S - 1, D)
        chosen = torch.stack(chosen, dim=1)  # (B, L, S - 1, D)

        # All levels at once: each one sees the sum of the true codes of the levels before it.
        partial = chosen.cumsum(dim=1) - chosen
        partial = partial.flatten(1, 2)  # (B, Q, D), Q = L * (S - 1)

        place = torch.arange(1, S, device=x.device).repeat(self.levels)  # (Q,)
        level = torch.arange(self.levels, device=x.device).repeat_interleave(S - 1)  # (Q,)
        visible = causal_mask(place - 1, torch.arange(S - 1, device=x.device))
        visible = visible.expand(B, -1, -1)
        logits = self.logits(partial, level, h, place, visible)  # (B, Q, K)
        targets = codes.transpose(1, 2).flatten(1)  # (B, Q)
        counts = is_target[:, place]
        return F.cross_entropy(logits[counts], targets[counts])

    @torch.no_grad()
    def next_vectors(self, x, only_last=False, temperature=1.0):
        """x (B, S, D) -> a sample of the vector that follows each of them, (B, S, D), or only of
        that after the last one, (B, 1, D)."""
        B, S, D = x.shape
        h = self.context(x)
        place = torch.arange(1, S + 1, device=x.device)
        if only_last:
            place = place[-1:]
        visible = causal_mask(place - 1, torch.arange(S, device=x.device)).expand(B, -1, -1)

        partial = torch.zeros(B, len(place), D, device=x.device)
        for level in range(self.levels):
            index = torch.full((len(place),), level, device=x.device)
            logits = self.logits(partial, index, h, place, visible)
            drawn = sample(logits.flatten(0, 1), temperature).view(B, len(place))
            partial = partial + self.codebooks[level][drawn]
        return partial


# data ---------------------------------------------------------------------------------------------


def cut(documents, longest, given):
    """Cuts long documents into pieces. A piece with nothing to predict is left out."""
    pieces = []
    for document in documents:
        for i in range(0, len(document), longest):
            piece = document[i : i + longest]
            if len(piece) > given:
                pieces.append(piece)
    return pieces


class Vectors(NamedTuple):
    """Documents as sentence vectors, padded on the right."""

    x: torch.Tensor  # (N, S, D), as the encoder gives them
    is_target: torch.Tensor  # (N, S) bool: is this a sentence that the model must predict?


def vectorize(sonar, documents, given):
    """Lists of sentences -> Vectors."""
    counts = torch.tensor([len(document) for document in documents])
    places = torch.arange(int(counts.max()))
    is_sentence = places < counts[:, None]  # (N, S)
    sentences = [sentence for document in documents for sentence in document]

    x = torch.zeros(*is_sentence.shape, sonar.dim)
    x[is_sentence] = sonar.vectors_of(sentences).cpu()
    return Vectors(x, is_sentence & (places >= given))


def token_row(tok, document, given):
    """A document as token ids, and how many of them are its given sentences. A line break ends the
    brief, and the special token <|end|> the document, if this piece of it has the end."""
    prompt = tok.encode(" ".join(document[:given]) + "\n")
    is_whole = document[-1] == THE_END
    sentences = document[given:-1] if is_whole else document[given:]
    row = [*prompt, *tok.encode(" ".join(sentences))]
    if is_whole:
        row.append(tok.special["<|end|>"])
    return row, len(prompt)


def token_loss(model, tok, documents, given, longest):
    """The mean loss of a GPT in nats per token, on all tokens after the given sentences."""
    inputs = []
    targets = []
    for document in documents:
        ids, start = token_row(tok, document, given)
        inputs.append(ids[:-1][:longest])
        target = [-100] * (start - 1) + ids[start:]
        targets.append(target[:longest])
    device = model.wte.weight.device
    idx, _ = pad(inputs, tok.special["<|end|>"])
    target_ids, _ = pad(targets, -100)
    _, loss = model(idx.to(device), target_ids.to(device))
    return loss


# writing ------------------------------------------------------------------------------------------


class Writer(NamedTuple):
    """A trained model with all that it needs to read and to write."""

    kind: str  # one of KINDS
    model: nn.Module
    sonar: Sonar
    mean: torch.Tensor  # (D,) of the sentence vectors of the training text
    std: torch.Tensor  # (D,)

    def next_vectors(self, vectors, **options):
        """Like the model's own, but of sentence vectors that are not standardised."""
        x = (vectors - self.mean) / self.std
        return self.model.next_vectors(x, **options) * self.std + self.mean


class Stories(NamedTuple):
    """What a model wrote, for each of N prompts."""

    sentences: list  # lists of sentences, without the prompt and without THE_END
    ended: list  # whether the story has ended, or was cut off
    end_cosines: list  # the cosine to THE_END of each new vector, with the one that ended the story
    seconds: float  # for all prompts together
    positions: int  # vectors or tokens that were written in all stories together


def write(writer, prompts, snap=False, **options):
    """Continues documents, sentence by sentence. prompts are N lists of equally many sentences
    -> Stories.

    A document ends when the new vector is nearer than STOP_COSINE to that of THE_END or to the last
    sentence, as in the paper. snap: the next step reads the vector of the sentence that was
    decoded, not the vector that the model wrote.
    """
    if writer.kind == "token":
        return write_tokens(writer, prompts, **options)

    start = time.time()
    sonar = writer.sonar
    [the_end] = sonar.vectors_of([THE_END])
    vectors = sonar.vectors_of([sentence for prompt in prompts for sentence in prompt])
    context = vectors.view(len(prompts), -1, sonar.dim)  # (N, S, D)

    sentences = [[] for _ in prompts]
    end_cosines = [[] for _ in prompts]
    ended = [False] * len(prompts)
    positions = 0
    for _ in range(MOST_SENTENCES):
        new = writer.next_vectors(context, only_last=True, **options)[:, 0]  # (N, D)
        to_end = F.cosine_similarity(new, the_end[None], dim=1).tolist()
        to_last = F.cosine_similarity(new, context[:, -1], dim=1).tolist()
        decoded = sonar.sentences_of(new)
        for i in range(len(prompts)):
            if ended[i]:
                continue
            positions += 1
            end_cosines[i].append(to_end[i])
            if max(to_end[i], to_last[i]) > STOP_COSINE:
                ended[i] = True
            else:
                sentences[i].append(decoded[i])
        if all(ended):
            break

        if snap:
            new = sonar.vectors_of(decoded)
        context = torch.cat([context, new[:, None]], dim=1)
    return Stories(sentences, ended, end_cosines, time.time() - start, positions)


def write_tokens(writer, prompts, temperature=1.0):
    """The same with the token model -> Stories."""
    start = time.time()
    tok = writer.sonar.tok
    end = tok.special["<|end|>"]
    device = writer.model.wte.weight.device
    idx, lengths = pad([tok.encode(" ".join(prompt) + "\n") for prompt in prompts], end)

    sentences = []
    ended = []
    positions = 0
    for part, part_lengths in zip(idx.split(256), lengths.split(256)):
        written = writer.model.generate(
            part.to(device),
            LONGEST_STORY,
            temperature=temperature,
            lengths=part_lengths.to(device),
            stop=end,
        )
        for row, length in zip(written.tolist(), part_lengths.tolist()):
            answer = row[length:]
            has_end = end in answer
            if has_end:
                answer = answer[: answer.index(end)]
            positions += len(answer) + has_end
            sentences.append(split_sentences(tok.decode(answer)))
            ended.append(has_end)
    return Stories(sentences, ended, [], time.time() - start, positions)


def make_model(kind, gpt_cfg, dim, cfg):
    """A new model of this kind."""
    if kind == "base":
        return BaseLCM(gpt_cfg, dim)
    if kind == "two_tower":
        return TwoTowerLCM(gpt_cfg, dim, cfg.draws, cfg.drop)
    if kind == "quant":
        return QuantLCM(gpt_cfg, dim, cfg.levels, cfg.codes)
    return GPT(gpt_cfg)


def load_writer(path, device="cpu"):
    """The Writer in a checkpoint of this script."""
    checkpoint = load_checkpoint(path, "lcm")
    cfg = Config(**checkpoint["config"])
    sonar = Sonar.load(checkpoint["sonar"]).to(device)
    model = make_model(cfg.kind, GPTConfig(**checkpoint["gpt_config"]), sonar.dim, cfg)
    model.load_state_dict(checkpoint["weights"])
    mean = checkpoint["mean"].to(device)
    std = checkpoint["std"].to(device)
    return Writer(cfg.kind, model.to(device).requires_grad_(False), sonar, mean, std)


# evaluate, draw -----------------------------------------------------------------------------------


def story_records(number):
    """The first held-out briefs of data/stories with their checks, as many as asked for."""
    folder = require("data/stories")
    records = read_jsonl(folder / "instructions_val.jsonl", ["instruction", "output"])
    return [record for record in records if record["task"] == "story"][:number]


def prompts_of(records):
    """The briefs of records as lists of two sentences each."""
    return [split_sentences(record["instruction"]) for record in records]


def verdicts(records, stories):
    """The judge's verdict of each story."""
    results = []
    for record, sentences, ended in zip(records, stories.sentences, stories.ended):
        results.append(judge(record, " ".join(sentences), ended))
    return results


def gold_of(records, stories):
    """The share of stories that pass all checks."""
    results = verdicts(records, stories)
    return sum(verdict.passed for verdict in results) / len(results)


@torch.no_grad()
def distance(writer, vectors, **options):
    """The root mean square, per number, of the difference between the predicted and the true vector
    of each target (l2), with the true sentences as context."""
    device = writer.mean.device
    squares = []
    for x, is_target in zip(vectors.x.split(256), vectors.is_target.split(256)):
        predicted = writer.next_vectors(x[:, :-1].to(device), **options).cpu()
        of_targets = (predicted - x[:, 1:])[is_target[:, 1:]]  # (N, D)
        squares.append(of_targets.square().mean(dim=1).sqrt())
    return torch.cat(squares).mean().item()


def draw(records, title, unit, path):
    """The training and the validation loss over the steps."""
    fig, ax = figure(title, "optimizer step", unit)
    steps = [record["step"] for record in records]
    ax.plot(steps, [record["loss"] for record in records], alpha=0.6, label="training batch")
    evaluations = [record for record in records if "val_loss" in record]
    steps = [record["step"] for record in evaluations]
    losses = [record["val_loss"] for record in evaluations]
    ax.plot(steps, losses, "o-", label="held-out documents")
    ax.set(yscale="log")
    ax.legend()
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # data and the frozen autoencoder
    train, val = load_documents(cfg.data)
    train = cut(train, cfg.sentences, cfg.given)
    val = cut(val, cfg.sentences, cfg.given)
    if not train or not val:
        fail(f"--data={cfg.data}: no document has more than --given={cfg.given} sentences")
    sonar_checkpoint = load_checkpoint(cfg.sonar or require("part_10/out/sonar.pt"), "sonar")
    sonar = Sonar.load(sonar_checkpoint).to(device).requires_grad_(False)
    tok = sonar.tok
    out = output_folder(cfg)

    # Every sentence becomes a vector once, before the training.
    start = time.time()
    train_vectors = vectorize(sonar, train, cfg.given)
    val_vectors = vectorize(sonar, val, cfg.given)
    seconds_to_encode = time.time() - start
    is_sentence = train_vectors.x.abs().sum(dim=-1) > 0
    mean = train_vectors.x[is_sentence].mean(dim=0)
    std = train_vectors.x[is_sentence].std(dim=0).clamp(min=1e-3)
    train_x = (train_vectors.x - mean) / std
    val_x = (val_vectors.x - mean) / std

    # model and optimizers
    gpt_cfg = GPTConfig(
        vocab_size=tok.vocab_size,
        block_size=256,
        n_layer=cfg.n_layer,
        n_embd=cfg.n_embd,
        n_kv_head=2 if cfg.kind == "token" else 4,
    )
    model = make_model(cfg.kind, gpt_cfg, sonar.dim, cfg).to(device)
    generator = torch.Generator().manual_seed(cfg.seed)
    if cfg.kind == "quant":
        some = torch.randperm(int(is_sentence.sum()), generator=generator)[:20_000]
        codebooks = fit_codebooks(train_x[is_sentence][some], cfg.levels, cfg.codes, generator)
        model.codebooks.copy_(codebooks)
    optimizers = make_optimizers(model, cfg)
    writer = Writer(cfg.kind, model, sonar, mean.to(device), std.to(device))
    params = sum(p.numel() for p in model.parameters())
    print(
        f"{cfg.kind}: {params:,} parameters, {len(train):,} documents of at most "
        f"{train_x.size(1)} sentences, {len(val):,} held out"
    )

    def batch_loss(documents, x, is_target):
        if cfg.kind == "token":
            return token_loss(model, tok, documents, cfg.given, gpt_cfg.block_size)
        return model.loss(x.to(device), is_target.to(device))

    # training loop
    log = Log(out, cfg.steps, name="train_lcm")
    seconds = 0.0
    for step in range(cfg.steps):
        start = time.time()
        set_lr(optimizers, lr_scale(step, cfg))
        choice = torch.randint(len(train), (cfg.batch_size,), generator=generator)
        documents = [train[i] for i in choice.tolist()]
        loss = batch_loss(documents, train_x[choice], train_vectors.is_target[choice])
        grad_norm = update(model, loss, optimizers, cfg.grad_clip)
        seconds += time.time() - start

        # once in a while: the held-out documents, with the same noise each time
        values = {"loss": loss.item(), "grad_norm": grad_norm}
        last_step = step + 1 == cfg.steps
        if last_step or (cfg.eval_every > 0 and (step + 1) % cfg.eval_every == 0):
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(0)
                val_loss = batch_loss(val, val_x, val_vectors.is_target)
            values["val_loss"] = val_loss.item()
        log(step, **values)

    # save the model; the autoencoder goes with it, because no other one reads its vectors
    save_checkpoint(
        out / "lcm.pt",
        kind="lcm",
        changed=cfg.changed,
        step=cfg.steps,
        config=asdict(cfg),
        gpt_config=asdict(gpt_cfg),
        weights=model.state_dict(),
        mean=mean,
        std=std,
        sonar=sonar_checkpoint,
    )
    metrics = {
        "kind": cfg.kind,
        "val_loss": values["val_loss"],
        "seconds": seconds,
        "seconds_to_encode": seconds_to_encode,
        "params": params,
        "steps": cfg.steps,
        "seed": cfg.seed,
    }
    if cfg.kind != "token":
        metrics["l2"] = distance(writer, val_vectors)

    # show what it learned: documents that it continues, and the judge's opinion of them
    if cfg.data == "stories" and cfg.given == 2:
        records = story_records(cfg.prompts)
        prompts = prompts_of(records)
    else:
        prompts = [document[: cfg.given] for document in val[: cfg.prompts]]
    stories = write(writer, prompts)
    for prompt, sentences in list(zip(prompts, stories.sentences))[:3]:
        print(f"\n{' '.join(prompt)}\n  {' '.join(sentences)}")
    title = f"{cfg.kind}: held-out loss {values['val_loss']:.3f} after {seconds:.0f} s of training"
    if cfg.data == "stories" and cfg.given == 2:
        metrics["gold"] = gold_of(records, stories)
        title += f", gold {metrics['gold']:.2f}"
    save_metrics(out, name="train_lcm", **metrics)
    print(f"\n{title}")
    in_nats = cfg.kind in ("quant", "token")
    unit = "loss, nats per code or token" if in_nats else "loss, mean squared error per number"
    draw(read_log(out, "train_lcm"), title, unit, out / "train_lcm.png")
