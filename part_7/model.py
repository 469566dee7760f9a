"""
Part 7 - a reward model: the same trunk, one scalar instead of V logits.

From part_6/model.py
    New      GPT.trunk, RewardModel
    Changed  GPT.forward (its first half is now trunk), GPT.load (a head may be new)

Shapes: B batch, T queries, S keys, C n_embd, H query heads, G key/value heads, D head size, V words, E experts.
"""
from dataclasses import asdict, dataclass

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
    n_kv_head: int = 2  # G, key/value heads; each serves H / G query heads (= n_head: multi-head, 1: multi-query)
    head_dim: int = 0  # D, channels per head; 0: n_embd / n_head
    mlp_dim: int = 0  # hidden channels of the MLP; 0: 8/3 n_embd, as many parameters as a GELU MLP of 4 n_embd
    rope_base: float = 10000.0  # slowest clock hand turns once in about 2 pi base tokens
    tied: int = 0  # 1: the head is the embedding's matrix
    window: int = 0  # a query sees itself and window - 1 tokens before it; 0: everything in block_size
    sink: int = 0  # first tokens that stay visible on top of the window
    n_expert: int = 0  # E, MLPs in a mixture-of-experts layer, each of mlp_dim; 0: every layer has one MLP
    top_k_experts: int = 2  # experts that each token visits
    moe_every: int = 1  # layer i has experts when (i + 1) % moe_every == 0: 1 all, 2 every second (a hybrid)
    def __post_init__(self):
        assert self.n_head % self.n_kv_head == 0, f"n_head={self.n_head} is no multiple of n_kv_head={self.n_kv_head}"
        fits = self.head_dim or self.n_embd % self.n_head == 0
        assert fits, f"n_embd={self.n_embd} is no multiple of n_head={self.n_head}"
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        assert self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: RoPE turns pairs of channels"
        self.mlp_dim = self.mlp_dim or round(self.n_embd / 3) * 8
        fits = not self.n_expert or 1 <= self.top_k_experts <= self.n_expert and self.moe_every >= 1
        assert fits, f"top_k_experts={self.top_k_experts} must be from 1 to n_expert={self.n_expert}, moe_every >= 1"

def causal_mask(q_pos, k_pos, window=0, sink=0):
    """May the query at position q see the key at position k? Only k <= q. (T,) and (S,) positions -> (T, S) bool.
    0,1,2 with itself: [[1,0,0], [1,1,0], [1,1,1]]. A window asks for k > q - window too, or k < sink."""
    mask = k_pos[None, :] <= q_pos[:, None]
    if window:
        mask &= (k_pos[None, :] > q_pos[:, None] - window) | (k_pos[None, :] < sink)
    return mask

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

def rope_table(pos, dim, base):
    """Positions (T,) -> cos and sin (T, D), in the half-split layout: channel i is paired with channel i + D/2."""
    angle = pos[:, None] * base ** (-torch.arange(0, dim, 2, device=pos.device) / dim)  # (T, D/2), always fp32
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

def rope(x, cos, sin):
    """Turns each pair (x1, x2) of x (B, H, T, D) by its angle: (x1 cos - x2 sin, x2 cos + x1 sin)."""
    return (x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin).type_as(x)

class RMSNorm(nn.Module):
    """LayerNorm without the mean and the bias (Zhang & Sennrich 2019, eq. 4): x / rms(x), times a learned gain."""
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)).type_as(x) * self.weight

class KVCache:
    """The keys and values of the tokens so far, per layer: a ring that keeps the first `sink` and the last `window`.
    Position p lives in slot p while p < sink, then in slot sink + (p - sink) % window (0: block_size). Keys are stored
    turned. Memory: 2 * n_layer * B * G * size * D numbers, however long the stream."""
    def __init__(self, cfg, B, device=None, dtype=None):
        self.sink, self.window = cfg.sink, cfg.window or cfg.block_size
        self.size = self.sink + self.window
        shape = (cfg.n_layer, B, cfg.n_kv_head, self.size, cfg.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.pos = torch.full((self.size,), -1, device=device)  # which position each slot holds
        self.t = 0  # tokens seen

    def begin(self, T):
        """T new tokens come in: -> their positions (T,), and the positions (S,) of all keys that update() hands out."""
        t, self.t = self.t, self.t + T
        new = torch.arange(t, self.t, device=self.pos.device)
        self.old, self.used = min(t, self.size), min(self.t, self.size)
        # a chunk may overwrite keys that its own first queries still see: then it attends before it writes
        self.wraps = T > 1 and self.t > self.size  # one token never does: what it replaces has just left the window
        if not self.wraps:
            first = t if t < self.size else self.sink + (t - self.sink) % self.window
            self.slot = slice(first, first + T)
            self.pos[self.slot] = new
            return new, self.pos[:self.used]
        seen = torch.cat([self.pos[:self.old], new])
        self.keep = (new < self.sink) | (new >= self.t - self.window)
        self.slot = torch.where(new < self.sink, new, self.sink + (new - self.sink) % self.window)[self.keep]
        self.pos[self.slot] = new[self.keep]
        return new, seen

    def update(self, layer, k, v):
        """One layer's new keys and values (B, G, T, D) -> all that its queries may see, (B, G, S, D)."""
        K, V = self.k[layer], self.v[layer]
        if not self.wraps:
            K[:, :, self.slot], V[:, :, self.slot] = k, v
            return K[:, :, :self.used], V[:, :, :self.used]
        seen = torch.cat([K[:, :, :self.old], k], dim=2), torch.cat([V[:, :, :self.old], v], dim=2)
        K[:, :, self.slot], V[:, :, self.slot] = k[:, :, self.keep], v[:, :, self.keep]
        return seen

class Attention(nn.Module):
    """H query heads share G key/value heads (Ainslie et al. 2023). Queries and keys are normed, then turned."""
    def __init__(self, cfg, layer):
        super().__init__()
        self.n_head, self.n_kv_head, self.layer = cfg.n_head, cfg.n_kv_head, layer
        self.c_q = nn.Linear(cfg.n_embd, cfg.n_head * cfg.head_dim, bias=False)
        self.c_k = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.c_v = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.q_norm = RMSNorm(cfg.head_dim)  # per head: scores cannot grow without bound (Dehghani et al. 2023)
        self.k_norm = RMSNorm(cfg.head_dim)
        self.c_proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=False)
        nn.init.zeros_(self.c_proj.weight)  # a new block changes nothing: depth costs no stability at the start
    def forward(self, x, mask, rot, far, cache):
        B, T, C = x.shape
        q = self.q_norm(self.c_q(x).view(B, T, self.n_head, -1)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.c_k(x).view(B, T, self.n_kv_head, -1)).transpose(1, 2)  # (B, G, T, D)
        v = self.c_v(x).view(B, T, self.n_kv_head, -1).transpose(1, 2)
        near, k = rope(q, *rot), rope(k, *rot)
        if cache:
            k, v = cache.update(self.layer, k, v)  # (B, G, S, D)
        if far:  # two products side by side: a sink answers only q as turned from nearby, (B, H, T, 2D)
            cos, sin, is_sink = far
            near, k = torch.cat([near, rope(q, cos, sin)], dim=-1), torch.cat([k * ~is_sink, k * is_sink], dim=-1)
        # softmax(q k^T / sqrt(D)) v without ever writing the weights to memory; H / G queries share a key in place
        y = F.scaled_dot_product_attention(near, k, v, attn_mask=mask, scale=v.size(-1) ** -0.5, enable_gqa=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))

class MLP(nn.Module):
    """Each token alone: SwiGLU (Shazeer 2020, eq. 6): one half is the gate of the other."""
    def __init__(self, cfg):
        super().__init__()
        self.c_gate = nn.Linear(cfg.n_embd, cfg.mlp_dim, bias=False)
        self.c_fc = nn.Linear(cfg.n_embd, cfg.mlp_dim, bias=False)
        self.c_proj = nn.Linear(cfg.mlp_dim, cfg.n_embd, bias=False)
        nn.init.zeros_(self.c_proj.weight)
    def forward(self, x):
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))

class MoE(nn.Module):
    """Each token visits top_k of E experts; the router's probabilities, renormalised, weight their answers.
    Left alone, a router feeds its favourites. Load-balancing loss (Fedus et al. 2021, eq. 4): E sum_e f_e P_e, with f_e
    the share of assignments to expert e, counted, and P_e its mean probability. 1: all alike; E: one takes all.
    """
    def __init__(self, cfg):
        super().__init__()
        self.top_k = cfg.top_k_experts
        self.router = nn.Linear(cfg.n_embd, cfg.n_expert, bias=False)
        self.experts = nn.ModuleList([MLP(cfg) for _ in range(cfg.n_expert)])
    def forward(self, x):
        B, T, C = x.shape
        x = x.flatten(0, 1)  # (N, C)
        p = self.router(x).float().softmax(dim=-1)  # (N, E), in fp32: near ties decide who computes
        weight, chosen = p.topk(self.top_k, dim=-1)  # (N, top_k)
        weight = (weight / weight.sum(dim=-1, keepdim=True)).type_as(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, rank = (chosen == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, weight[token, rank, None] * expert(x[token]))  # no token: zero gradient, not none
        self.load = chosen.flatten().bincount(minlength=len(self.experts)) / chosen.numel()  # (E,) f_e, sums to 1
        self.balance = len(self.experts) * (self.load * p.mean(dim=0)).sum()
        return y.view(B, T, C)

class Block(nn.Module):
    """Pre-norm: the residual stream x itself is never normalised, so gradients reach every layer unscaled."""
    def __init__(self, cfg, layer):
        super().__init__()
        self.ln_1 = RMSNorm(cfg.n_embd)
        self.attn = Attention(cfg, layer)
        self.ln_2 = RMSNorm(cfg.n_embd)
        self.mlp = MoE(cfg) if cfg.n_expert and (layer + 1) % cfg.moe_every == 0 else MLP(cfg)
    def forward(self, x, mask, rot, far, cache):
        x = x + self.attn(self.ln_1(x), mask, rot, far, cache)
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    """Token embedding, n_layer blocks, a final norm (pre-norm needs it), a head. Positions enter in the attention."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.h = nn.ModuleList([Block(cfg, layer) for layer in range(cfg.n_layer)])
        self.ln_f = RMSNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        for table in (self.wte, self.lm_head):
            nn.init.normal_(table.weight, std=0.02)  # small logits: the first loss is ln V
        if cfg.tied:
            self.lm_head.weight = self.wte.weight

    def positions(self, T, cache, device):
        """What all layers share: mask (T, S), RoPE's cos and sin (T, D), and those of queries that look at sinks."""
        cfg, window = self.cfg, self.cfg.window or self.cfg.block_size
        assert cache or cfg.window or T <= window, f"{T} tokens do not fit into block_size={cfg.block_size}"
        q_pos, k_pos = cache.begin(T) if cache else [torch.arange(T, device=device)] * 2
        mask = causal_mask(q_pos, k_pos, window, cfg.sink) if T > 1 or not cache else None  # all it holds
        rot = rope_table(q_pos, cfg.head_dim, cfg.rope_base)
        if not cfg.sink:
            return mask, rot, None
        near = rope_table(q_pos.clamp(max=cfg.sink + window - 1), cfg.head_dim, cfg.rope_base)
        return mask, rot, (*near, (k_pos < cfg.sink)[:, None])

    def trunk(self, idx, cache=None, mask=None):
        """Everything but the head: idx (B, T) -> (B, T, C). `mask` (B, 1, T, T) replaces the causal one."""
        causal, rot, far = self.positions(idx.size(1), cache, idx.device)
        x = self.wte(idx)  # (B, T, C)
        for block in self.h:
            x = block(x, causal if mask is None else mask, rot, far, cache)
        return self.ln_f(x)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) ids, targets (B, T) = idx shifted by one -> logits (B, T, V), loss in nats per token or None.

        The loss is the mean over all targets but -100: prompts and padding. With a cache, idx are its next T tokens.
        """
        logits = self.lm_head(self.trunk(idx, cache))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, lengths=None, stop=-1,
                 return_logp=False):
        """Continues each row by max_new_tokens, or up to and with its stop token: (B, T) -> (B, at most T + max).
        Prompts of mixed length are padded on the right, with lengths (B,): all rows walk on from the shortest's end,
        one in its prompt takes its own next token. return_logp: also the sampled tokens' log-probabilities (or NaN)."""
        B, T = idx.shape
        lengths = torch.full((B,), T, device=idx.device) if lengths is None else lengths
        out = F.pad(idx, (0, max_new_tokens), value=max(stop, 0))
        logp = torch.full(out.shape, float("nan"), device=idx.device)
        alive = torch.ones(B, dtype=torch.bool, device=idx.device)
        cache = KVCache(self.cfg, B, idx.device, self.wte.weight.dtype)
        done, t = 0, int(lengths.min())
        while alive.any() and t < T + max_new_tokens:
            logits = self(out[:, done:t], cache=cache)[0][:, -1]  # (B, V)
            drawn = sample(logits, temperature, top_k, top_p)
            own = alive & (t >= lengths)  # rows whose token t is sampled, neither prompt nor past the end
            out[:, t] = torch.where(own, drawn, out[:, t])
            if return_logp:
                all_logp = (logits.float() / (temperature or 1.0)).log_softmax(dim=-1)
                logp[:, t] = all_logp.gather(1, drawn[:, None])[:, 0].masked_fill(~own, float("nan"))
            alive = alive & ~(own & (drawn == stop)) & (t + 1 < lengths + max_new_tokens)
            done, t = t, t + 1
        return (out[:, :t], logp[:, :t]) if return_logp else out[:, :t]

    def to_checkpoint(self):
        return {"gpt_config": asdict(self.cfg), "weights": self.state_dict()}

    @classmethod
    def load(cls, checkpoint, **head):
        """The model that to_checkpoint() described. A head that the file lacks starts new; the trunk must be there."""
        model = cls(GPTConfig(**checkpoint["gpt_config"]), **head)
        missing, extra = model.load_state_dict(checkpoint["weights"], strict=False)
        wrong = [key for key in missing + extra if key.startswith(("wte.", "h.", "ln_f."))]
        assert not wrong, f"the checkpoint's trunk does not fit: {wrong}"
        return model

class RewardModel(GPT):
    """One number for an answer: the mean of its tokens' scores (head "mean": length alone gains nothing), or its end
    token's ("last", InstructGPT). Causal; bidirectional=1 makes an encoder: every token sees the whole text. A token is
    scored by the state after it, x_t, and by how it suits the state before it: x_{t-1} times its row of lm_head."""
    def __init__(self, cfg, head="mean", bidirectional=0):
        super().__init__(cfg)
        self.head, self.bidirectional = head, bidirectional
        self.after, self.suits = nn.Linear(cfg.n_embd, 1, bias=False), nn.Linear(cfg.n_embd, 1, bias=False)
        nn.init.normal_(self.after.weight, std=(cfg.n_embd + 1) ** -0.5)
        nn.init.constant_(self.suits.weight, 0.1)  # times 10: the token's logit, what the policy expects
        self.register_buffer("shift", torch.zeros(()))  # set after training: rewards of mean 0
        self.register_buffer("scale", torch.ones(()))  # and variance 1 on what the SFT policy writes

    def token_scores(self, idx, lengths):
        """idx (B, T) padded on the right, with lengths (B,) -> the raw score at every token, (B, T)."""
        real = torch.arange(idx.size(1), device=idx.device) < lengths[:, None]
        x = self.trunk(idx, mask=real[:, None, None, :] if self.bidirectional else None)  # no pad keys
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]  # (B, T, C): the state in which each token was chosen
        return 10 * (self.after(x) + self.suits(before * F.embedding(idx, self.lm_head.weight))).squeeze(-1)

    def forward(self, idx, starts, lengths):
        """Rewards (B,) of the answers idx[b, starts[b]:lengths[b]], the end token included."""
        pos = torch.arange(idx.size(1), device=idx.device)
        first = starts if self.head == "mean" else lengths - 1
        counts = (pos >= first[:, None]) & (pos < lengths[:, None])  # (B, T)
        reward = (self.token_scores(idx, lengths) * counts).sum(dim=1) / counts.sum(dim=1)
        return (reward - self.shift) * self.scale
