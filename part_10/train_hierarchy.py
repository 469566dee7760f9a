"""
Part 10: attention that knows the hierarchy. A head may compare a query with a key by their distance
in curved space, and a head may look at words, at whole sentences, or at the story.

    python part_10/train_hierarchy.py                     a tree, and hyperbolic distance
    python part_10/train_hierarchy.py --kind=dot          the usual score, for comparison
    python part_10/train_hierarchy.py --data=edges.tsv    your own tree: child, tab, parent
    python part_10/train_hierarchy.py --task=map          nearest points of a map: no tree anywhere
    python part_10/train_hierarchy.py --task=brackets     which bracket is open, and how deep?
    python part_10/train_hierarchy.py --task=stories --scales=words,sentences,story,story

Starts here.

Two ideas, and both change only which key a query prefers.

    the score   dot: beta <q, k> / sqrt(D). euclidean: -beta |q - k|. hyperbolic: -beta d(q, k),
                with the distance on the hyperboloid (Gulcehre et al. 2019, "Hyperbolic Attention
                Networks"). Our tree has three times as many nodes at every level. A circle in the
                plane grows only in proportion to its radius, but a circle in hyperbolic space grows
                exponentially, so there is room for the tree.
    the scale   a head for the words of the sentence, a head for summaries of the sentences before
                it, a head for the whole story. Yang et al. 2016 ("Hierarchical Attention Networks")
                stack an encoder of sentences on an encoder of words. Here the levels are heads side
                by side in one causal language model.

Every variant has exactly the same parameters. demo_hierarchy.py compares them.

Shapes: B batch, T time (queries), S keys, C channels, H heads, D channels of a query or key,
        N nodes of the tree or sentences of the story, K candidates of a question, V vocabulary.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from shared import (
    COLOURS,
    Log,
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    read_facts,
    read_log,
    read_text,
    require,
    save_figure,
    save_metrics,
    set_seed,
)

KINDS = ["dot", "euclidean", "hyperbolic"]
SCALES = ["words", "sentences", "story"]
TASKS = ["tree", "map", "brackets", "stories"]

# The largest distance of a lifted point from the origin. fp32 keeps 7 digits of -<x, y>, which
# reaches cosh(6)^2 = 40,000 there, so distances below about 0.1 are lost. With a radius of 9, all
# distances below about 2 would be.
LARGEST_RADIUS = 6.0

# Added to the square of a small distance. The gradient of a distance is undefined at 0, as that of
# sqrt is, and this makes it smooth.
SMOOTHING = 1e-3


@dataclass
class Config:
    # what is compared
    task: str = "tree"  # tree, map, brackets or stories
    kind: str = "hyperbolic"  # how a query is compared with a key: dot, euclidean or hyperbolic
    head_dim: int = 2  # D, channels of a query and of a key; values always have n_embd / n_head

    # for --task=stories: what each head sees, one name per head: words (of the sentence so far),
    # sentences (summaries of those before it) or story (every word so far)
    scales: str = "story,story,story,story"
    data: str = ""  # for --task=tree: a file of lines CHILD<tab>PARENT; empty: a tree of 364 nodes
    # sizes
    n_embd: int = 64  # C, channels of the residual stream, or of a node's embedding
    n_layer: int = 2  # blocks, for the tasks brackets and stories
    # training
    steps: int = 0  # optimizer steps; 0: what the task needs
    batch_size: int = 0  # questions or sequences per step; 0: what the task needs
    # learning rate of Adam at the first step, from where it falls linearly to 0; 0: the tuned one
    lr: float = 0.0
    # run
    eval_every: int = 0  # steps between evaluations; 0: only at the end
    seed: int = 0  # seed of all random numbers, also of the map
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.task in TASKS, f"task={self.task} must be one of {', '.join(TASKS)}"
        assert self.kind in KINDS, f"kind={self.kind} must be one of {', '.join(KINDS)}"
        assert self.head_dim > 0, f"head_dim={self.head_dim} must be at least 1"
        for scale in self.scales.split(","):
            assert scale in SCALES, f"scales={self.scales}: {scale!r} is not one of {SCALES}"
        assert self.task == "tree" or not self.data, "data is a tree: it needs task=tree"
        n_head = head_count(self)
        divisible = self.n_embd % n_head == 0
        assert divisible, f"n_embd={self.n_embd} must be divisible by the number of heads, {n_head}"


def head_count(cfg):
    """One head can answer a question about a pair. Brackets need two: depth, and what is open."""
    if cfg.task == "stories":
        return len(cfg.scales.split(","))
    return 2 if cfg.task == "brackets" else 1


# the lesson's mathematics: distances --------------------------------------------------------------


def lift(v):
    """Vectors (..., D) -> points of the hyperboloid (..., D + 1), first coordinate in front.

    The exponential map at the origin o = (1, 0, ..., 0): walk from o in the direction of v for the
    length |v|, and arrive at (cosh |v|, sinh |v| v / |v|). A length above LARGEST_RADIUS is cut.
    """
    length = v.norm(dim=-1, keepdim=True).clamp(min=1e-6)  # (..., 1), never divide by 0
    radius = length.clamp(max=LARGEST_RADIUS)
    return torch.cat([radius.cosh(), radius.sinh() / length * v], dim=-1)


def lorentz_inner(x, y):
    """The Lorentz inner product of all pairs, x (..., T, D + 1), y (..., S, D + 1) -> (..., T, S).

    <x, y> = -x_0 y_0 + x_1 y_1 + ... + x_D y_D. The hyperboloid is where <x, x> = -1 and x_0 > 0.
    """
    sign = torch.ones_like(y[..., :1, :])
    sign[..., 0] = -1.0
    return x @ (sign * y).transpose(-2, -1)


def hyperbolic_distance(x, y):
    """d(x, y) = arcosh(-<x, y>) of all pairs of points of the hyperboloid -> (..., T, S).

    With u = -<x, y> - 1 it is log(1 + u + sqrt(u (u + 2))), about sqrt(2 u) where u is small.
    """
    u = (-lorentz_inner(x, y) - 1).clamp(min=0) + SMOOTHING / 2
    return torch.log1p(u + (u * (u + 2)).sqrt())


def euclidean_distance(x, y):
    """|x - y| of all pairs, x (..., T, D) and y (..., S, D) -> (..., T, S). It is what the
    hyperbolic distance becomes for vectors near the origin, with the same SMOOTHING."""
    squares_x = x.square().sum(dim=-1)[..., :, None]  # (..., T, 1)
    squares_y = y.square().sum(dim=-1)[..., None, :]  # (..., 1, S)
    square = squares_x + squares_y - 2 * x @ y.transpose(-2, -1)
    return (square.clamp(min=0) + SMOOTHING).sqrt()


def attention_scores(q, k, kind, beta):
    """How much each query likes each key, q (..., T, D) and k (..., S, D) -> (..., T, S).

    The paper's score is -beta d(q, k) - c. A constant c changes nothing in a softmax, so it is left
    out. beta > 0 is learned for every head and for all kinds, the dot product included: no kind has
    a parameter that another lacks.
    """
    if kind == "dot":
        return beta * (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    if kind == "euclidean":
        return -beta * euclidean_distance(q, k)
    return -beta * hyperbolic_distance(lift(q), lift(k))


# the lesson's mathematics: scales -----------------------------------------------------------------


def sentence_index(is_end):
    """is_end (B, T), True at the last token of a sentence -> the number of each token's sentence
    (B, T), counted from 0. A full stop belongs to the sentence that it ends."""
    ends = is_end.long()
    return ends.cumsum(dim=1) - ends


def summary_weights(sentence, n_sentence):
    """sentence (B, T) -> weights (B, N, T) with which the tokens of each sentence are averaged: row
    n is 1 / length at the tokens of sentence n, and 0 elsewhere."""
    numbers = torch.arange(n_sentence, device=sentence.device)
    member = (sentence[:, None, :] == numbers[:, None]).float()  # (B, N, T)
    return member / member.sum(dim=-1, keepdim=True).clamp(min=1)


def scale_mask(sentence, scales, n_sentence):
    """Which keys may each head's queries see? -> (B, H, T, T + N) bool: first the T tokens, then
    the N summaries.

    words      the tokens of the own sentence, up to the query
    sentences  the query's own token, and the summaries of all sentences that have ended before its
               sentence began. The summary of the own sentence would give away its later words.
    story      all tokens up to the query
    """
    B, T = sentence.shape
    positions = torch.arange(T, device=sentence.device)
    numbers = torch.arange(n_sentence, device=sentence.device)
    causal = (positions[None, :] <= positions[:, None]).expand(B, T, T)
    own_token = torch.eye(T, dtype=torch.bool, device=sentence.device).expand(B, T, T)
    same_sentence = sentence[:, :, None] == sentence[:, None, :]  # (B, T, T)
    no_summary = torch.zeros(B, T, n_sentence, dtype=torch.bool, device=sentence.device)
    finished = numbers < sentence[:, :, None]  # (B, T, N)

    masks = {
        "words": torch.cat([causal & same_sentence, no_summary], dim=2),
        "sentences": torch.cat([own_token, finished], dim=2),
        "story": torch.cat([causal, no_summary], dim=2),
    }
    return torch.stack([masks[scale] for scale in scales], dim=1)  # (B, H, T, T + N)


# models -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention. Queries and keys have D channels per head, values C / H."""

    def __init__(self, cfg, n_head):
        super().__init__()
        self.kind = cfg.kind
        self.n_head = n_head
        self.c_q = nn.Linear(cfg.n_embd, n_head * cfg.head_dim, bias=False)
        self.c_k = nn.Linear(cfg.n_embd, n_head * cfg.head_dim, bias=False)
        self.c_v = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.log_beta = nn.Parameter(torch.zeros(n_head, 1, 1))
        nn.init.zeros_(self.c_proj.weight)  # a new block starts as the identity

        # Queries and keys start with a length of about 1, whatever D is. Further out, hyperbolic
        # distances depend on lengths more than on directions, and a head learns slowly.
        for layer in (self.c_q, self.c_k):
            nn.init.normal_(layer.weight, std=(cfg.n_embd * cfg.head_dim) ** -0.5)

    def forward(self, x, mask, summary):
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = self.c_k(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        v = self.c_v(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, C/H)

        # A sentence's summary is the mean of its tokens' keys, and the mean of their values. It
        # needs no parameters of its own.
        if summary is not None:
            k = torch.cat([k, summary[:, None] @ k], dim=2)  # (B, H, T + N, D)
            v = torch.cat([v, summary[:, None] @ v], dim=2)  # (B, H, T + N, C/H)

        scores = attention_scores(q, k, self.kind, self.log_beta.exp())  # (B, H, T, S)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        y = (weights @ v).transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)


class Block(nn.Module):
    def __init__(self, cfg, n_head):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd)
        self.attn = Attention(cfg, n_head)
        self.ln_2 = nn.LayerNorm(cfg.n_embd)
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x, mask, summary):
        x = x + self.attn(self.ln_1(x), mask, summary)
        x = x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))
        return x


class Transformer(nn.Module):
    """A small causal transformer with learned positions. RoPE would turn the queries and keys, and
    with two channels it would leave little else in them."""

    def __init__(self, cfg, vocab_size, block_size, n_out, n_sentence=0):
        super().__init__()
        self.scales = cfg.scales.split(",")
        self.n_sentence = n_sentence
        n_head = head_count(cfg)
        self.wte = nn.Embedding(vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(block_size, cfg.n_embd)
        self.h = nn.ModuleList([Block(cfg, n_head) for _ in range(cfg.n_layer)])
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        self.head = nn.Linear(cfg.n_embd, n_out)
        nn.init.normal_(self.wte.weight, std=0.1)
        nn.init.normal_(self.wpe.weight, std=0.1)

    def forward(self, idx, is_end=None):
        """idx (B, T) -> (B, T, n_out). is_end (B, T) says which tokens end a sentence. Without it,
        every head sees all tokens so far."""
        positions = torch.arange(idx.size(1), device=idx.device)
        summary = None
        if is_end is None:
            mask = positions[None, :] <= positions[:, None]  # (T, T)
        else:
            sentence = sentence_index(is_end)  # (B, T)
            summary = summary_weights(sentence, self.n_sentence)  # (B, N, T)
            mask = scale_mask(sentence, self.scales, self.n_sentence)  # (B, H, T, T + N)

        x = self.wte(idx) + self.wpe(positions)  # (B, T, C)
        for block in self.h:
            x = block(x, mask, summary)
        return self.head(self.ln_f(x))


class Pointer(nn.Module):
    """One attention head and nothing else. Its weights are the answer: it must point at the right
    one of several candidates (a pointer network, Vinyals et al. 2015). So whatever the score cannot
    express, nothing else makes up for it."""

    def __init__(self, cfg, n_node):
        super().__init__()
        self.kind = cfg.kind
        self.wte = nn.Embedding(n_node, cfg.n_embd)
        self.c_q = nn.Linear(cfg.n_embd, cfg.head_dim, bias=False)
        self.c_k = nn.Linear(cfg.n_embd, cfg.head_dim, bias=False)
        self.log_beta = nn.Parameter(torch.zeros(()))
        nn.init.normal_(self.wte.weight, std=0.1)  # all points start near the origin

    def forward(self, query, candidates):
        """query (B,) and candidates (B, K) -> scores (B, K)."""
        q = self.c_q(self.wte(query))[:, None, :]  # (B, 1, D)
        k = self.c_k(self.wte(candidates))  # (B, K, D)
        scores = attention_scores(q, k, self.kind, self.log_beta.exp())  # (B, 1, K)
        return scores.squeeze(1)


# the tasks tree and map: questions about pairs ----------------------------------------------------


def balanced_tree(branches=3, depth=5):
    """Each node has `branches` children down to `depth` -> {child: parent}; the root is node 0.
    The default has 1 + 3 + 9 + 27 + 81 + 243 = 364 nodes."""
    n_inner = sum(branches**level for level in range(depth))
    parents = {}
    for node in range(1, branches * n_inner + 1):
        parents[node] = (node - 1) // branches
    return parents


def read_tree(path):
    """A file of lines CHILD<tab>PARENT -> {child: parent}, with nodes numbered from 0."""
    numbers = {}
    parents = {}
    for line_number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path} line {line_number}"
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) != 2 or not all(columns):
            fail(f"{where}: expected CHILD<tab>PARENT")

        child, parent = [numbers.setdefault(name, len(numbers)) for name in columns]
        if child in parents:
            fail(f"{where}: {columns[0]!r} already has a parent, and a tree allows only one")
        parents[child] = parent

    for start in parents:
        if len(ancestors(start, parents)) > len(parents):
            fail(f"{path}: there is a cycle, some node is an ancestor of itself")
    return parents


def ancestors(node, parents):
    """The parent of a node, its grandparent and so on, up to the root. In a cycle the list stops
    when it is longer than any path of a tree can be."""
    path = []
    while node in parents and len(path) <= len(parents):
        node = parents[node]
        path.append(node)
    return path


def tree_ranks(parents):
    """{child: parent} -> ranks (N, N): entry [q, c] is the number of steps up from q to c, and
    infinite if c is not an ancestor of q."""
    n_node = 1 + max(max(parents), max(parents.values()))
    ranks = torch.full((n_node, n_node), math.inf)
    for node in range(n_node):
        for steps, ancestor in enumerate(ancestors(node, parents), start=1):
            ranks[node, ancestor] = steps
    return ranks


def map_ranks(n_node, seed):
    """Points drawn uniformly from a square -> ranks (N, N): entry [q, c] is r if c is the r-th
    nearest neighbour of q, for its five nearest neighbours, and infinite for the other points."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(n_node, 2, generator=generator)
    distances = torch.cdist(points, points)
    distances.fill_diagonal_(math.inf)
    order = distances.argsort(dim=1)[:, :5]  # (N, 5)
    ranks = torch.full((n_node, n_node), math.inf)
    return ranks.scatter(1, order, torch.arange(1.0, 6.0).expand(n_node, 5))


class PairTask:
    """Questions "which of these candidates is the closest to the query?", where the finite entries
    of a matrix of ranks say what is close.

    Some pairs never occur together in a training question. Only the place that a node has among all
    others can say how these belong together.
    """

    CANDIDATES = 12
    HELD_OUT = 0.1  # share of the pairs that training never shows
    QUESTIONS = 4000  # for the evaluation, half of them about held-out pairs

    def __init__(self, cfg):
        if cfg.task == "map":
            self.parents = {}
            self.ranks = map_ranks(364, cfg.seed)
        else:
            self.parents = read_tree(cfg.data) if cfg.data else balanced_tree()
            self.ranks = tree_ranks(self.parents)

        # A parent is never held out: without it nothing would say where a leaf belongs.
        generator = torch.Generator().manual_seed(cfg.seed)
        may_go = self.ranks.isfinite() & (self.ranks > 1)
        if not may_go.any():
            fail(f"--data={cfg.data}: no node has a grandparent, so there is no pair to hold out")

        # In a small tree chance may choose none, so the pair with the lowest number always goes.
        chance = torch.rand(self.ranks.shape, generator=generator)
        is_lowest = chance == chance[may_go].min()
        self.hidden = may_go & ((chance < self.HELD_OUT) | is_lowest)
        self.seen_pairs = (self.ranks.isfinite() & ~self.hidden).nonzero()  # (pairs, 2)
        self.hidden_pairs = self.hidden.nonzero()

        # The close nodes of each node in one row, padded with the node itself.
        width = int(self.ranks.isfinite().sum(dim=1).max())
        order = self.ranks.argsort(dim=1)[:, :width]  # (N, width)
        own = torch.arange(len(self.ranks))[:, None].expand_as(order)
        self.close = torch.where(self.ranks.gather(1, order).isfinite(), order, own)

        generator = torch.Generator().manual_seed(cfg.seed + 1000)
        self.val_seen = self.questions(self.seen_pairs, self.QUESTIONS // 2, generator)
        self.val_hidden = self.questions(self.hidden_pairs, self.QUESTIONS // 2, generator)

    def questions(self, pairs, n, generator):
        """n random questions -> queries (n,) and candidates (n, K). The right one comes first. The
        head has no positions, so it cannot see that.

        A third of the wrong candidates are close to the query, but less close than the answer. For
        a tree these are higher ancestors. A third are close to some other node, so it does not help
        to prefer nodes that many others are close to. The rest are any nodes.
        """
        N = len(self.ranks)
        chosen = pairs[torch.randint(len(pairs), (n,), generator=generator)]
        query, answer = chosen[:, 0], chosen[:, 1]
        wrong = self.CANDIDATES - 1
        other_query = torch.randint(N, (n,), generator=generator)
        from_own = self.sample_close(query, wrong // 3, generator)
        from_other = self.sample_close(other_query, wrong // 3, generator)
        anything = torch.randint(N, (n, wrong - 2 * (wrong // 3)), generator=generator)
        candidates = torch.cat([from_own, from_other, anything], dim=1)  # (n, K - 1)

        # A wrong candidate must be less close than the answer, and must not be a hidden pair.
        rows = query[:, None].expand_as(candidates)
        limit = self.ranks[query, answer][:, None]
        while True:
            bad = (self.ranks[rows, candidates] <= limit) | self.hidden[rows, candidates]
            if not bad.any():
                break
            fresh = torch.randint(N, candidates.shape, generator=generator)
            candidates = torch.where(bad, fresh, candidates)
        return query, torch.cat([answer[:, None], candidates], dim=1)

    def sample_close(self, query, n, generator):
        """n nodes close to each of the queries (B,) -> (B, n)."""
        columns = torch.randint(self.close.size(1), (len(query), n), generator=generator)
        return self.close[query].gather(1, columns)

    def make_model(self, cfg):
        return Pointer(cfg, len(self.ranks))

    def batch(self, n, generator):
        return self.questions(self.seen_pairs, n, generator)

    def loss(self, model, batch):
        scores = model(*batch)  # (B, K)
        return -scores.log_softmax(dim=-1)[:, 0].mean()

    @torch.no_grad()
    def evaluate(self, model):
        """The share of questions in which the head likes the right candidate best."""
        device = model.log_beta.device
        questions = {"seen": self.val_seen, "held_out": self.val_hidden}
        result = {}
        for name, (query, candidates) in questions.items():
            scores = model(query.to(device), candidates.to(device))
            # the right candidate is the first one
            best_wrong = scores[:, 1:].amax(dim=1)
            right = scores[:, 0] > best_wrong
            result[name] = right.float().mean().item()
        return result


# the task brackets --------------------------------------------------------------------------------


class BracketTask:
    """Which type has the innermost bracket that is still open, and how many are open? To know it
    after a closing bracket, one must look back past everything that has been closed since.

    Tokens 0 to 3 open a bracket of four types, and tokens 4 to 7 close them (a Dyck language).
    """

    TYPES = 4
    DEPTH = 8  # brackets open at most
    LENGTH = 40
    SEQUENCES = 500  # for the evaluation

    def __init__(self, cfg):
        generator = torch.Generator().manual_seed(cfg.seed + 1000)
        self.val = self.batch(self.SEQUENCES, generator)

    def make_model(self, cfg):
        n_out = self.TYPES + 1 + self.DEPTH + 1  # four types or nothing, and the depths 0 to 8
        return Transformer(cfg, 2 * self.TYPES, self.LENGTH, n_out)

    def batch(self, n, generator):
        """n random sequences -> tokens, types and depths (n, T). Type 4 means that none is open."""
        tokens = torch.zeros(n, self.LENGTH, dtype=torch.long)
        types = torch.zeros(n, self.LENGTH, dtype=torch.long)
        depths = torch.zeros(n, self.LENGTH, dtype=torch.long)
        rows = torch.arange(n)
        stack = torch.full((n, self.DEPTH + 1), self.TYPES)  # entry 0 stands for "none is open"
        depth = torch.zeros(n, dtype=torch.long)

        for t in range(self.LENGTH):
            opens = torch.rand(n, generator=generator) < 0.5
            opens = (opens | (depth == 0)) & (depth < self.DEPTH)
            new_type = torch.randint(self.TYPES, (n,), generator=generator)
            top = stack[rows, depth]
            tokens[:, t] = torch.where(opens, new_type, self.TYPES + top)
            depth = torch.where(opens, depth + 1, depth - 1)
            stack[rows, depth] = torch.where(opens, new_type, stack[rows, depth])
            types[:, t] = stack[rows, depth]
            depths[:, t] = depth
        return tokens, types, depths

    def loss(self, model, batch):
        tokens, types, depths = batch
        logits = model(tokens).flatten(0, 1)  # (B * T, n_out)
        type_logits, depth_logits = logits.split([self.TYPES + 1, self.DEPTH + 1], dim=-1)
        type_loss = F.cross_entropy(type_logits, types.flatten())
        return type_loss + F.cross_entropy(depth_logits, depths.flatten())

    @torch.no_grad()
    def evaluate(self, model):
        """type: the share of right types where it is hard, after a closing bracket with another one
        still open. depth: the share of right depths everywhere."""
        tokens, types, depths = [x.to(model.head.weight.device) for x in self.val]
        type_logits, depth_logits = model(tokens).split([self.TYPES + 1, self.DEPTH + 1], dim=-1)
        hard = (tokens >= self.TYPES) & (types < self.TYPES)
        right = type_logits.argmax(dim=-1) == types
        return {
            "type": right[hard].float().mean().item(),
            "depth": (depth_logits.argmax(dim=-1) == depths).float().mean().item(),
        }


# the task stories ---------------------------------------------------------------------------------


class StoryTask:
    """Language modelling, word by word: a brief ("Write a story about ...") and the story."""

    PAD = 0
    BEGIN = 1
    SENTENCES = 8  # a brief has two and a story five, and padding counts as one more
    BLOCK_SIZE = 72
    STORIES = 520  # for the evaluation

    def __init__(self, cfg):
        folder = require("data/stories")
        slots = read_facts(folder / "facts.json")["vocabulary"]
        train = self.split(read_text(folder / "train.txt"))
        val = self.split(read_text(folder / "val.txt"))[: self.STORIES]

        words = sorted({word for text in train + val for word in text})
        self.number = {"<pad>": self.PAD, "<begin>": self.BEGIN}
        for word in words:
            self.number[word] = len(self.number)
        self.slot_words = set()
        for name in ("hero", "animal", "place", "colour", "thing"):
            self.slot_words |= {self.number[word] for word in slots[name] if word in self.number}
        self.stops = torch.tensor([self.number["."]])

        self.train = self.encode(train)
        self.val = self.encode(val)
        self.val_copied = self.copied(self.val)

    @staticmethod
    def split(text):
        """A file of stories -> a list of lists of words, for all stories that have a brief. The
        line break between brief and story is a word, too."""
        stories = []
        for block in text.split("\n\n"):
            if block.startswith("Write a story"):
                stories.append(re.findall(r"\w+|[^\w ]", block.strip()))
        return stories

    def encode(self, stories):
        """Lists of words -> ids (stories, BLOCK_SIZE + 1), padded on the right."""
        rows = torch.full((len(stories), self.BLOCK_SIZE + 1), self.PAD)
        for row, story in zip(rows, stories):
            ids = [self.BEGIN] + [self.number[word] for word in story]
            assert len(ids) < self.BLOCK_SIZE, f"a story of {len(ids)} words is too long"
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def copied(self, rows):
        """Which targets name a hero, animal, place, colour or thing that an earlier sentence has
        named? -> (stories, BLOCK_SIZE) bool. They need more than the sentence so far."""
        result = torch.zeros(len(rows), self.BLOCK_SIZE, dtype=torch.bool)
        sentences = sentence_index(torch.isin(rows, self.stops)).tolist()
        for i, row in enumerate(rows.tolist()):
            first_named = {}
            for t, word in enumerate(row):
                if word in self.slot_words:
                    first = first_named.setdefault(word, sentences[i][t])
                    result[i, t - 1] = first < sentences[i][t]
        return result

    def make_model(self, cfg):
        vocab_size = len(self.number)
        return Transformer(cfg, vocab_size, self.BLOCK_SIZE, vocab_size, self.SENTENCES)

    def batch(self, n, generator):
        rows = torch.randint(len(self.train), (n,), generator=generator)
        return (self.train[rows],)

    def word_losses(self, model, rows):
        """rows (B, T + 1) -> nats (B, T) for each target, 0 where it is padding."""
        idx, targets = rows[:, :-1], rows[:, 1:]
        logits = model(idx, torch.isin(idx, self.stops.to(idx.device)))  # (B, T, V)
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=self.PAD, reduction="none"
        )
        return losses.view(targets.shape)

    def loss(self, model, batch):
        (rows,) = batch
        return self.word_losses(model, rows).sum() / (rows[:, 1:] != self.PAD).sum()

    @torch.no_grad()
    def evaluate(self, model):
        """Mean nats of the words of held-out texts: all of them, and those that must be copied."""
        device = model.head.weight.device
        chunks = [self.word_losses(model, rows.to(device)) for rows in self.val.split(130)]
        losses = torch.cat(chunks).cpu()
        return {
            "nats": losses[self.val[:, 1:] != self.PAD].mean().item(),
            "nats_copied": losses[self.val_copied].mean().item(),
        }


# training -----------------------------------------------------------------------------------------

MAKE_TASK = {"tree": PairTask, "map": PairTask, "brackets": BracketTask, "stories": StoryTask}
STEPS = {"tree": 1200, "map": 1200, "brackets": 400, "stories": 300}
BATCH_SIZE = {"tree": 256, "map": 256, "brackets": 32, "stories": 32}

# The learning rates that `demo_hierarchy.py --sweep` found to be best: for head sizes up to 4 (it
# tries 2), and for larger ones (it tries 8).
LR = {
    "tree": {"dot": (1e-2, 1e-1), "euclidean": (3e-1, 3e-2), "hyperbolic": (1e-2, 3e-3)},
    "map": {"dot": (1e-1, 3e-1), "euclidean": (3e-1, 3e-3), "hyperbolic": (3e-2, 3e-1)},
    "brackets": {"dot": (3e-3, 3e-3), "euclidean": (3e-3, 3e-3), "hyperbolic": (3e-3, 3e-3)},
    "stories": {"dot": (1e-2, 1e-2), "euclidean": (1e-2, 1e-2), "hyperbolic": (1e-2, 1e-2)},
}


def tuned_rate(cfg):
    """The learning rate of LR for this task, kind and head size."""
    small, large = LR[cfg.task][cfg.kind]
    return small if cfg.head_dim <= 4 else large


def train(model, task, cfg, device, log=None):
    """Trains the model on its task -> what it reached on held-out questions, as a dict."""
    steps = cfg.steps or STEPS[cfg.task]
    batch_size = cfg.batch_size or BATCH_SIZE[cfg.task]
    lr = cfg.lr or tuned_rate(cfg)
    generator = torch.Generator().manual_seed(cfg.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        batch = [x.to(device) for x in task.batch(batch_size, generator)]
        loss = task.loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        if log is not None:
            report = {"loss": loss.item()}
            if cfg.eval_every > 0 and (step + 1) % cfg.eval_every == 0:
                report |= task.evaluate(model)
            log(step, **report)
    return task.evaluate(model)


# the figure ---------------------------------------------------------------------------------------


@torch.no_grad()
def flat_points(model, parents):
    """Where a pointer with D = 2 has put all nodes -> (N, 2), in the Poincare disk or, if its
    distance is not hyperbolic, in the plane.

    It is the key of a node that can be an answer. A leaf of a tree is never one, so nothing teaches
    its key anything, and its query is shown. The disk is the hyperboloid as seen from the point
    (-1, 0, 0): p = (x_1, x_2) / (1 + x_0).
    """
    points = model.c_k(model.wte.weight)  # (N, 2)
    leaves = [node for node in parents if node not in set(parents.values())]
    points[leaves] = model.c_q(model.wte.weight)[leaves]
    if model.kind == "hyperbolic":
        x = lift(points)  # (N, 3)
        points = x[:, 1:] / (1 + x[:, :1])
    return points.cpu()


def draw_nodes(ax, points, parents):
    """The points (N, 2) and the edges of the tree, coloured by the level of the child."""
    for child, parent in parents.items():
        level = len(ancestors(child, parents))
        ends = points[[child, parent]]
        colour = COLOURS[level % len(COLOURS)]
        ax.plot(ends[:, 0], ends[:, 1], color=colour, linewidth=0.8, zorder=-level)
    ax.scatter(points[:, 0], points[:, 1], s=4, color="black")
    ax.set(aspect="equal")
    ax.axis("off")


def draw(cfg, model, task, records, result, path):
    """The loss over the steps, and beside it the keys of all nodes or what was reached."""
    reached = ", ".join(f"{name} {value:.2f}" for name, value in result.items())
    title = f"{cfg.task}, {cfg.kind}, head size {cfg.head_dim}: {reached}"
    fig, (left, right) = figure(title, columns=2, height=4.2)
    losses = torch.tensor([record["loss"] for record in records])
    left.plot(losses, color="C0", alpha=0.3)

    # The loss of one batch is noisy, so a line shows the mean of 20 steps.
    if len(losses) >= 20:
        means = losses.unfold(0, 20, 1).mean(dim=1)
        left.plot(range(10, 10 + len(means)), means, color="C0")
    left.set(xlabel="step", ylabel="loss of the batch (nats)")

    if isinstance(task, PairTask) and cfg.head_dim == 2:
        draw_nodes(right, flat_points(model, task.parents), task.parents)
        where = "in the plane"
        if cfg.kind == "hyperbolic":
            where = "in the Poincare disk"
            angle = torch.linspace(0, 2 * math.pi, 200)
            right.plot(angle.cos(), angle.sin(), color="gray")
        right.set_title(f"all nodes, {where}", fontsize=11)
    else:
        right.bar(list(result), list(result.values()), color=COLOURS[: len(result)])
        unit = "nats per word" if cfg.task == "stories" else "share that is right"
        right.set(title="held-out questions", ylabel=unit)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # data first: a broken file ends the run here
    task = MAKE_TASK[cfg.task](cfg)
    out = output_folder(cfg)
    model = task.make_model(cfg).to(device)
    n_parameter = sum(p.numel() for p in model.parameters())
    print(f"task {cfg.task}, scores {cfg.kind}, {n_parameter:,} parameters")

    # train
    steps = cfg.steps or STEPS[cfg.task]
    log = Log(out, steps, name="train_hierarchy")
    result = train(model, task, cfg, device, log)
    seconds = log.seconds

    # what came out
    save_metrics(
        out,
        name="train_hierarchy",
        task=cfg.task,
        kind=cfg.kind,
        head_dim=cfg.head_dim,
        scales=cfg.scales,
        **result,
        params=n_parameter,
        seconds=seconds,
        steps=steps,
        seed=cfg.seed,
    )
    records = read_log(out, "train_hierarchy")
    draw(cfg, model, task, records, result, out / "train_hierarchy.png")
    for name, value in result.items():
        print(f"{name:12} {value:.3f}")
    print(f"{seconds:.0f} s")
