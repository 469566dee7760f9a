"""
Part 1: one transformer block. Causal attention from first principles, several heads, an MLP,
layer normalization and residual connections.

You can read it from the bottom up. A Block takes a stream of C numbers per token and adds to it
first what Attention gathers from the past, then what an MLP makes of it. Everything else is detail.

Shapes: B batch, T time (queries), S time (keys), C channels (= n_embd), H heads,
        D head size (= C / H).
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
    n_layer: int = 2  # number of blocks
    n_head: int = 4  # attention heads per block
    n_embd: int = 64  # C, channels of the residual stream

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
