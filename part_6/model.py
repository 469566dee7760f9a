"""
Part 6: a model that takes instructions. The loss can leave out tokens, and generate() answers
prompts of different lengths at once, stops at a stop token, and can say how likely each token was.

From part_5/model.py
    Changed  sample (one random number per row), GPT.forward (ignored targets), GPT.generate

Shapes: B batch, T time (queries), S time (keys), C channels (= n_embd), H query heads,
        G key/value heads, D head size, V vocabulary, E experts.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 256  # V, number of different tokens
    block_size: int = 64  # longest sequence, in tokens
    n_layer: int = 4  # number of blocks
    n_head: int = 4  # H, query heads per block
    n_embd: int = 128  # C, channels of the residual stream

    # G, key/value heads; each serves H / G query heads (H: multi-head, 1: multi-query attention)
    n_kv_head: int = 2

    head_dim: int = 0  # D, channels per head; 0: n_embd / n_head

    # hidden channels of the MLP; 0: 8/3 n_embd, which gives SwiGLU the parameters of a 4 n_embd MLP
    mlp_dim: int = 0

    rope_base: float = 10000.0  # base of RoPE's angles; larger rotates more slowly
    tied: bool = False  # use the token embedding's matrix as the head
    qk_norm: bool = True  # normalize queries and keys per head (Qwen3); 0: do not (Llama)
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    n_expert: int = 0  # E, experts per layer; 0: one plain MLP. Both have mlp_dim hidden channels
    top_k_experts: int = 2  # experts that each token visits

    # layer i has experts when (i + 1) is divisible by this; 1: every layer, 2: every second one
    moe_every: int = 1

    def __post_init__(self):
        whole_groups = self.n_head % self.n_kv_head == 0
        assert whole_groups, f"n_head={self.n_head} must be divisible by n_kv_head={self.n_kv_head}"
        if self.head_dim == 0:
            divisible = self.n_embd % self.n_head == 0
            assert divisible, f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}"
            self.head_dim = self.n_embd // self.n_head
        assert self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: RoPE rotates pairs"
        if self.mlp_dim == 0:
            self.mlp_dim = round(self.n_embd / 3) * 8
        if self.n_expert > 0:
            assert 1 <= self.top_k_experts <= self.n_expert, (
                f"top_k_experts={self.top_k_experts} must be from 1 to n_expert={self.n_expert}"
            )
            assert self.moe_every >= 1, f"moe_every={self.moe_every} must be at least 1"


def causal_mask(q_pos, k_pos):
    """Which query may see which key? A token sees itself and the tokens before it.

    q_pos (T,) and k_pos (S,) are positions -> (T, S) bool, True where the query may look.
    For positions 0, 1, 2 against themselves: [[1, 0, 0], [1, 1, 0], [1, 1, 1]].
    """
    return k_pos[None, :] <= q_pos[:, None]


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

    # Draw one uniform number per row, and take the first token at which the cumulative
    # probability exceeds it. torch.multinomial draws V random numbers per row: for 128 rows and
    # 724 tokens it takes 3 ms, this 0.24 ms. From here on we sample millions of tokens.
    cdf = logits.float().softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    u = torch.rand_like(cdf[:, :1]) * cdf[:, -1:]  # the last entry is 1 up to rounding
    drawn = torch.searchsorted(cdf, u, right=True).squeeze(-1)  # (B,)
    return drawn.clamp(max=cdf.size(-1) - 1)  # NaN logits must not give an id outside of the table


def rope_table(pos, dim, base):
    """The rotation angles of RoPE: positions (T,) -> their cosines and sines, (T, D/2) each."""
    theta = base ** (-torch.arange(0, dim, 2, device=pos.device) / dim)  # (D/2,)
    angle = pos[:, None] * theta  # (T, D/2), in fp32 whatever the model's dtype
    return angle.cos(), angle.sin()


def rope(x, cos, sin):
    """Rotates the pairs (x1, x2) of x (B, H, T, D) by their angles, cos and sin (T, D/2).

    Channel i is paired with channel i + D/2 (the half-split layout of Llama's and Qwen's weights).
    """
    x1, x2 = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    rotated = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
    return rotated.type_as(x)


class RMSNorm(nn.Module):
    """LayerNorm without the mean and the bias: x / rms(x), times a learned gain
    (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        y = x.float()  # half precision would lose the small squares
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


class KVCache:
    """The keys and values of all tokens so far, for every layer.

    A new token then needs only its own query, key and value: the keys and values of the past do
    not change. Memory: 2 * n_layer * B * G * block_size * D numbers.
    """

    def __init__(self, cfg, B, device=None, dtype=None):
        shape = (cfg.n_layer, B, cfg.n_kv_head, cfg.block_size, cfg.head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)  # nobody reads beyond `length`
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens stored so far; GPT.forward adds to it after the last layer

    def update(self, layer, k, v):
        """Appends one layer's new keys and values (B, G, T, D) -> all so far, (B, G, S, D)."""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Attention(nn.Module):
    """Grouped-query causal self-attention: H query heads share G key/value heads
    (Ainslie et al. 2023). Queries and keys are normalized per head, then rotated."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.layer = layer
        self.n_head = cfg.n_head
        self.n_kv_head = cfg.n_kv_head
        self.qk_norm = cfg.qk_norm
        self.c_q = nn.Linear(cfg.n_embd, cfg.n_head * cfg.head_dim, bias=False)
        self.c_k = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.c_v = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        if cfg.qk_norm:  # keeps the scores from growing without bound (Dehghani et al. 2023)
            self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
            self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
        self.c_proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=False)
        nn.init.zeros_(self.c_proj.weight)  # a new block starts as the identity

    def forward(self, x, mask, cos, sin, cache):
        B, T, C = x.shape

        # Project to queries, keys and values, and give each head its own D channels.
        q = self.c_q(x).view(B, T, self.n_head, -1)  # (B, T, H, D)
        k = self.c_k(x).view(B, T, self.n_kv_head, -1)  # (B, T, G, D)
        v = self.c_v(x).view(B, T, self.n_kv_head, -1)  # (B, T, G, D)
        if self.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = rope(q.transpose(1, 2), cos, sin)  # (B, H, T, D)
        k = rope(k.transpose(1, 2), cos, sin)  # (B, G, T, D)
        v = v.transpose(1, 2)  # (B, G, T, D)

        # Keys are cached after RoPE: a token's rotation never changes.
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, G, S, D)

        # softmax(q k^T / sqrt(D)) v, without ever writing the (T, S) weights to memory. With
        # enable_gqa each key/value head serves a group of H / G query heads.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

        # Put the heads side by side again and mix them.
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H * D)
        return self.c_proj(y)


class MLP(nn.Module):
    """Works on each token alone. SwiGLU: one projection gates the other (Shazeer 2020, eq. 6)."""

    def __init__(self, cfg):
        super().__init__()
        self.c_gate = nn.Linear(cfg.n_embd, cfg.mlp_dim, bias=False)
        self.c_fc = nn.Linear(cfg.n_embd, cfg.mlp_dim, bias=False)
        self.c_proj = nn.Linear(cfg.mlp_dim, cfg.n_embd, bias=False)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x):
        gate = F.silu(self.c_gate(x))  # (B, T, mlp_dim)
        x = gate * self.c_fc(x)
        return self.c_proj(x)  # (B, T, C)


class MoE(nn.Module):
    """A mixture of experts: each token visits top_k of the E experts, and their outputs are added
    with the router's probabilities as weights, renormalized to sum to 1 if there are several (as
    in Qwen3-MoE).

    A router left alone sends more and more tokens to the experts that it already prefers. The
    load-balancing loss (Fedus et al. 2021, eq. 4) works against that: E * sum_e f_e P_e, where f_e
    is the share of assignments that expert e gets and P_e is its mean probability. It is 1 when all
    experts get the same share, and E / top_k when the same top_k experts get everything.
    """

    def __init__(self, cfg):
        super().__init__()
        self.top_k = cfg.top_k_experts
        self.router = nn.Linear(cfg.n_embd, cfg.n_expert, bias=False)
        self.experts = nn.ModuleList([MLP(cfg) for _ in range(cfg.n_expert)])

    def forward(self, x):
        B, T, C = x.shape
        n_expert = len(self.experts)
        x = x.flatten(0, 1)  # (N, C), N = B * T tokens

        # Route: the top_k likeliest experts of each token. In fp32 also under autocast, because a
        # rounding error between two nearly equal experts would change which one computes.
        with torch.autocast(x.device.type, enabled=False):
            p = self.router(x.float()).softmax(dim=-1)  # (N, E)
        weight, chosen = p.topk(self.top_k, dim=-1)  # (N, top_k)

        # The weights of several experts sum to 1. A single expert keeps its probability as weight
        # (Fedus et al. 2021, eq. 2), or else the text would not teach the router anything.
        if self.top_k > 1:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        weight = weight.type_as(x)

        # Each expert computes its own tokens, and its outputs are added at their places. An expert
        # without tokens computes an empty batch, so its gradient is zero and not missing.
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, rank = (chosen == e).nonzero(as_tuple=True)
            output = weight[token, rank, None] * expert(x[token])  # (tokens of e, C)
            y = y.index_add(0, token, output)

        # Kept for the trainer: the load f (E,), which sums to 1, and the load-balancing loss.
        counts = chosen.flatten().bincount(minlength=n_expert)
        self.load = counts / chosen.numel()
        self.balance = n_expert * (self.load * p.mean(dim=0)).sum()
        return y.view(B, T, C)


class Block(nn.Module):
    """Pre-norm: only the branches are normalized, never the residual stream x itself, so gradients
    reach every layer unscaled."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.ln_1 = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.attn = Attention(cfg, layer)
        self.ln_2 = RMSNorm(cfg.n_embd, cfg.norm_eps)
        has_experts = cfg.n_expert > 0 and (layer + 1) % cfg.moe_every == 0
        self.mlp = MoE(cfg) if has_experts else MLP(cfg)

    def forward(self, x, mask, cos, sin, cache):
        x = x + self.attn(self.ln_1(x), mask, cos, sin, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """Token embedding, n_layer blocks, a final norm and a head. Positions enter in the attention.

    The final norm is part of pre-norm: nothing else ever normalizes the residual stream.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.h = nn.ModuleList([Block(cfg, layer) for layer in range(cfg.n_layer)])
        self.ln_f = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)

        # Small weights give small logits, so the first loss is that of a uniform guess, ln V.
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        if cfg.tied:
            self.lm_head.weight = self.wte.weight

    def positions(self, T, cache, device):
        """What all layers share for the next T tokens: the causal mask (T, S) or None, and RoPE's
        cosines and sines (T, D/2)."""
        start = 0 if cache is None else cache.length
        end = start + T
        assert end <= self.cfg.block_size, (
            f"{end} tokens do not fit in block_size={self.cfg.block_size}"
        )
        k_pos = torch.arange(end, device=device)
        q_pos = k_pos[start:]
        mask = None  # a single new token may see all that came before it
        if T > 1:
            mask = causal_mask(q_pos, k_pos)
        cos, sin = rope_table(q_pos, self.cfg.head_dim, self.cfg.rope_base)
        return mask, cos, sin

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) token ids, targets (B, T) = idx shifted by one
        -> logits (B, T, V), and the mean loss in nats per token (None without targets).
        Targets of -100 do not count: prompts and padding.

        With a cache, idx are the T tokens after those that the cache holds: one, a whole prompt,
        or any chunk.
        """
        B, T = idx.shape
        mask, cos, sin = self.positions(T, cache, idx.device)

        x = self.wte(idx)  # (B, T, C)
        for block in self.h:
            x = block(x, mask, cos, sin, cache)
        if cache is not None:
            cache.length += T
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)

        if targets is None:
            return logits, None
        logits_flat = logits.flatten(0, 1).float()
        loss = F.cross_entropy(logits_flat, targets.flatten(), ignore_index=-100)
        return logits, loss

    @torch.no_grad()
    def generate(
        self,
        idx,
        max_new_tokens,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        lengths=None,
        stop=-1,
        return_logp=False,
    ):
        """Continues each row of idx (B, T) by at most max_new_tokens tokens, up to and including
        its stop token, and never beyond block_size -> ids (B, at most T + max_new_tokens).
        temperature, top_k and top_p are sample's.

        Prompts of different lengths are padded on the right, with their lengths (B,). Generation
        starts at the end of the shortest prompt; a row still inside its prompt takes the prompt's
        next token instead of the sampled one. So there is no padding mask anywhere.

        return_logp: also return the log-probability (nats) of each token when it was sampled, in a
        tensor of the ids' shape that is NaN at all other places. It is that of the whole vocabulary
        at this temperature (at temperature 1 if greedy), so it excludes top_k and top_p.
        """
        B, T = idx.shape
        assert T <= self.cfg.block_size, (
            f"{T} tokens do not fit in block_size={self.cfg.block_size}"
        )
        assert not return_logp or (top_k == 0 and top_p == 1.0), (
            "return_logp needs top_k=0 and top_p=1: sampling must be from the whole vocabulary"
        )
        if lengths is None:
            lengths = torch.full((B,), T, device=idx.device)
        assert lengths.min() > 0, "a prompt is empty: the first token needs one before it"
        end = min(T + max_new_tokens, self.cfg.block_size)  # no row grows beyond this
        limits = (lengths + max_new_tokens).clamp(max=end)  # (B,), where each row must stop
        out = F.pad(idx, (0, end - T), value=max(stop, 0))  # (B, end)
        logp = torch.full(out.shape, float("nan"), device=idx.device)
        alive = lengths < limits  # rows that still want tokens
        cache = KVCache(self.cfg, B, idx.device, self.wte.weight.dtype)

        t = int(lengths.min())  # the position of the next token
        while alive.any():
            logits, _ = self(out[:, cache.length : t], cache=cache)
            logits = logits[:, -1]  # (B, V)
            drawn = sample(logits, temperature, top_k, top_p)  # (B,)

            # A row keeps the drawn token if it is past its prompt and has not stopped.
            sampled = alive & (t >= lengths)
            out[:, t] = torch.where(sampled, drawn, out[:, t])
            if return_logp:
                scaled = logits.float() / (temperature if temperature > 0 else 1.0)
                drawn_logp = scaled.log_softmax(dim=-1).gather(1, drawn[:, None]).squeeze(1)
                logp[:, t] = drawn_logp.masked_fill(~sampled, float("nan"))

            stopped = sampled & (drawn == stop)
            t += 1
            alive = alive & ~stopped & (t < limits)

        t = max(t, T)
        if return_logp:
            return out[:, :t], logp[:, :t]
        return out[:, :t]

    def to_checkpoint(self):
        """The model as plain data, for save_checkpoint: its config and its weights."""
        return {"gpt_config": asdict(self.cfg), "weights": self.state_dict()}

    @classmethod
    def load(cls, checkpoint):
        """The model that to_checkpoint() described."""
        model = cls(GPTConfig(**checkpoint["gpt_config"]))
        model.load_state_dict(checkpoint["weights"])
        return model
