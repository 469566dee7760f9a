"""
Part 1 - one transformer block: causal attention from first principles, several heads, an MLP, layer norm, residuals.

Read it from the bottom up if you like: a Block adds what Attention gathered from the past, then what an MLP
makes of it, to a stream of C numbers per token. Everything else is detail.

Shapes: B batch, T time (queries), S time (keys), C channels (= n_embd), H heads, D head size (= C / H).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

@dataclass
class GPTConfig:
    vocab_size: int = 256  # V, number of token ids
    block_size: int = 64  # longest sequence, in tokens
    n_layer: int = 2  # blocks
    n_head: int = 4  # attention heads per block
    n_embd: int = 64  # C, channels of the residual stream
    def __post_init__(self):
        assert self.n_embd % self.n_head == 0, f"n_embd={self.n_embd} is no multiple of n_head={self.n_head}"

def causal_mask(q_pos, k_pos):
    """May the query at position q see the key at position k? Only k <= q. (T,) and (S,) positions -> (T, S) bool.
    0,1,2 with itself: [[1,0,0], [1,1,0], [1,1,1]].
    """
    return k_pos[None, :] <= q_pos[:, None]

def attention(q, k, v, mask):
    """Scaled dot-product attention, "Attention Is All You Need", eq. 1: softmax(q k^T / sqrt(D)) v.

    q (B, H, T, D), k and v (B, H, S, D), mask (T, S) bool -> y (B, H, T, D) and the weights (B, H, T, S).
    Without 1/sqrt(D) the scores' variance grows with D and the softmax saturates.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(v.size(-1))  # (B, H, T, S)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)  # every row sums to 1
    return weights @ v, weights

class LayerNorm(nn.Module):
    """Each token's C channels to mean 0 and variance 1, then a learned gain and bias (Ba et al. 2016, eq. 4)."""
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps
    def forward(self, x):
        x = x - x.mean(dim=-1, keepdim=True)
        var = x.pow(2).mean(dim=-1, keepdim=True)  # biased, as in the paper
        return x * torch.rsqrt(var + self.eps) * self.weight + self.bias

class Attention(nn.Module):
    """H heads look back independently, each in its own D channels; c_proj mixes what they found."""
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.c_q = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.c_k = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.c_v = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        nn.init.zeros_(self.c_proj.weight)  # a new block changes nothing: depth costs no stability at the start
    def forward(self, x, mask):
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = self.c_k(x).view(B, T, self.n_head, -1).transpose(1, 2)
        v = self.c_v(x).view(B, T, self.n_head, -1).transpose(1, 2)
        y, weights = attention(q, k, v, mask)
        self.weights = weights.detach()  # (B, H, T, S), kept for the pictures
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))

class MLP(nn.Module):
    """Each token alone: widen to 4C, GELU, back to C."""
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=False)
        nn.init.zeros_(self.c_proj.weight)
    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))

class Block(nn.Module):
    """Pre-norm: the residual stream x itself is never normalised, so gradients reach every layer unscaled."""
    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = LayerNorm(cfg.n_embd)
        self.attn = Attention(cfg)
        self.ln_2 = LayerNorm(cfg.n_embd)
        self.mlp = MLP(cfg)

    def forward(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))
