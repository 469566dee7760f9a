"""
Part 2 - a GPT: embeddings in front of the blocks, a head behind them, a loss, and a way to sample.

From part_1/model.py
    New      sample, GPT
    Changed  GPTConfig

Shapes: B batch, T time (queries), S time (keys), C channels (= n_embd), H heads, D head size (= C / H), V vocabulary.
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
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads per block
    n_embd: int = 128  # C, channels of the residual stream
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

def sample(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Draws the next token from (B, V) logits -> (B,) ids. Temperature 0 is greedy.
    top_k keeps the k likeliest. top_p keeps the likeliest up to and with the one that makes their probability reach p
    (Holtzman et al. 2020): of [.5, .4, .1], p = .8 keeps two.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        p, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        drop = p.cumsum(dim=-1) - p >= top_p  # the tokens before this one reach p already
        logits = logits.masked_fill(drop.scatter(-1, order, drop), float("-inf"))
    cdf = logits.float().softmax(dim=-1).cumsum(dim=-1)  # (B, V); torch.multinomial would draw V random numbers a row
    return torch.searchsorted(cdf, torch.rand_like(cdf[:, :1]) * cdf[:, -1:], right=True).squeeze(-1)

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

class GPT(nn.Module):
    """Token and position embeddings, n_layer blocks, a final norm (pre-norm needs it), a head that is not tied."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.h = nn.ModuleList([Block(cfg) for _ in range(cfg.n_layer)])
        self.ln_f = LayerNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        for table in (self.wte, self.wpe, self.lm_head):
            nn.init.normal_(table.weight, std=0.02)  # small logits: the first loss is ln V

    def forward(self, idx, targets=None):
        """idx (B, T) ids, targets (B, T) = idx shifted by one -> logits (B, T, V), loss in nats per token or None."""
        B, T = idx.shape
        assert T <= self.cfg.block_size, f"{T} tokens do not fit into block_size={self.cfg.block_size}"
        pos = torch.arange(T, device=idx.device)
        mask = causal_mask(pos, pos)
        x = self.wte(idx) + self.wpe(pos)  # (B, T, C)
        for block in self.h:
            x = block(x, mask)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0):
        """Continues each row: idx (B, T) -> (B, T + max_new_tokens). It sees the last block_size tokens."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.cfg.block_size:])
            new = sample(logits[:, -1], temperature, top_k, top_p)
            idx = torch.cat([idx, new[:, None]], dim=1)
        return idx
