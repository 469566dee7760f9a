"""
Part 2: a GPT. Embeddings in front of the blocks, a head behind them, a loss, and a way to sample.

From part_1/model.py
    New      sample, GPT
    Changed  GPTConfig (larger defaults)

Shapes: B batch, T time (queries), S time (keys), C channels (= n_embd), H heads,
        D head size (= C / H), V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 256  # V, number of different tokens
    block_size: int = 64  # longest sequence, in tokens
    n_layer: int = 4  # number of blocks
    n_head: int = 4  # attention heads per block
    n_embd: int = 128  # C, channels of the residual stream

    def __post_init__(self):
        divisible = self.n_embd % self.n_head == 0
        assert divisible, f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}"


def causal_mask(q_pos, k_pos):
    """Which query may see which key? A token sees itself and the tokens before it.

    q_pos (T,) and k_pos (S,) are positions -> (T, S) bool, True where the query may look.
    For positions 0, 1, 2 against themselves: [[1, 0, 0], [1, 1, 0], [1, 1, 1]].
    """
    return k_pos[None, :] <= q_pos[:, None]


def attention(q, k, v, mask):
    """Scaled dot-product attention: softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1).

    q (B, H, T, D), k and v (B, H, S, D), mask (T, S) bool
    -> y (B, H, T, D) and the attention weights (B, H, T, S).
    """
    # The variance of a dot product grows with D. Without the division the softmax would saturate.
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)  # each row sums to 1
    return weights @ v, weights


def sample(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Draws the next token from logits (B, V) -> ids (B,). Temperature 0 is greedy: the likeliest.

    top_k keeps the k likeliest tokens (0: all). top_p keeps the smallest set of likeliest tokens
    whose probability reaches p (Holtzman et al. 2020): of [.5, .4, .1], p = .8 keeps two.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature

    if top_k > 0:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))

    if top_p < 1:
        p, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        before = p.cumsum(dim=-1) - p  # the probability of all likelier tokens
        drop = before >= top_p
        drop[:, 0] = False  # the likeliest token stays, even if p is 0
        drop = drop.scatter(-1, order, drop)  # from sorted order back to vocabulary order
        logits = logits.masked_fill(drop, float("-inf"))

    probs = logits.float().softmax(dim=-1)
    return torch.multinomial(probs, num_samples=1).squeeze(-1)


class LayerNorm(nn.Module):
    """Shifts and scales each token's C channels to mean 0 and variance 1, then applies a learned
    gain and bias (Ba et al. 2016, eq. 4)."""

    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        x = x - x.mean(dim=-1, keepdim=True)
        var = x.pow(2).mean(dim=-1, keepdim=True)  # the biased estimate, as in the paper
        return x * torch.rsqrt(var + self.eps) * self.weight + self.bias


class Attention(nn.Module):
    """Multi-head causal self-attention. Each of the H heads looks back on its own, in its own
    D channels; c_proj mixes what they found."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.c_q = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.c_k = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.c_v = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        nn.init.zeros_(self.c_proj.weight)  # a new block starts as the identity

    def forward(self, x, mask):
        B, T, C = x.shape

        # Project to queries, keys and values, and give each head its own D channels.
        q = self.c_q(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = self.c_k(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        v = self.c_v(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)

        y, weights = attention(q, k, v, mask)
        self.weights = weights.detach()  # (B, H, T, S), kept for the pictures

        # Put the heads side by side again and mix them.
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Works on each token alone: widen to 4C channels, apply GELU, return to C."""

    def __init__(self, cfg):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=False)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4C)
        x = F.gelu(x)
        return self.c_proj(x)  # (B, T, C)


class Block(nn.Module):
    """Pre-norm: only the branches are normalized, never the residual stream x itself, so gradients
    reach every layer unscaled."""

    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = LayerNorm(cfg.n_embd)
        self.attn = Attention(cfg)
        self.ln_2 = LayerNorm(cfg.n_embd)
        self.mlp = MLP(cfg)

    def forward(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """Token and position embeddings, n_layer blocks, a final norm and a head.

    The final norm is part of pre-norm: nothing else ever normalizes the residual stream.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.h = nn.ModuleList([Block(cfg) for _ in range(cfg.n_layer)])
        self.ln_f = LayerNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)

        # Small weights give small logits, so the first loss is that of a uniform guess, ln V.
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(self, idx, targets=None):
        """idx (B, T) token ids, targets (B, T) = idx shifted by one
        -> logits (B, T, V), and the mean loss in nats per token (None without targets)."""
        B, T = idx.shape
        assert T <= self.cfg.block_size, (
            f"{T} tokens do not fit in block_size={self.cfg.block_size}"
        )
        pos = torch.arange(T, device=idx.device)
        mask = causal_mask(pos, pos)

        x = self.wte(idx) + self.wpe(pos)  # (B, T, C)
        for block in self.h:
            x = block(x, mask)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)

        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0):
        """Continues each row: idx (B, T) -> (B, T + max_new_tokens). The options are sample's."""
        assert idx.size(1) > 0, "the prompt is empty: the first token needs one before it"
        for _ in range(max_new_tokens):
            context = idx[:, -self.cfg.block_size :]  # the model sees no further back
            logits, _ = self(context)
            new = sample(logits[:, -1], temperature, top_k, top_p)  # (B,)
            idx = torch.cat([idx, new[:, None]], dim=1)
        return idx
