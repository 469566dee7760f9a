"""
Part 10: embeds a tree in curved and in flat space, and asks how many dimensions each of them needs.

    python part_10/train_hyperbolic.py                     two trees, and two graphs that are none
    python part_10/train_hyperbolic.py --seeds=3           how much is chance?
    python part_10/train_hyperbolic.py --data=edges.tsv    your own: lines "child TAB parent"

Starts here. The spaces are in part_10/hyperbolic.py.

Every node is a point. It should be close to its ancestors and far from all other nodes. Nickel and
Kiela (2017, eq. 6) train this with a softmax: of one ancestor and some random other nodes, which is
the ancestor? The logit of a node is its negative distance. How well the points remember the graph
is measured on the same graph (reconstruction): there is no held-out data.

The same loss trains all spaces. Only the distance and the step differ. Each space gets the same
number of learning rates, which are trained side by side as runs of one tensor, and the best one is
reported. Each space's best is taken after the fact, so no space has an advantage from it.

Shapes: R runs (learning rates), N nodes, D numbers per point, B pairs in a batch, K candidates.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from hyperbolic import Euclid, EuclidSquared, Lorentz, Poincare
from shared import (
    Log,
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    read_text,
    require,
    save_checkpoint,
    save_figure,
    save_metrics,
    set_seed,
)


class Space(NamedTuple):
    geometry: type  # one of the classes of hyperbolic.py: distance, descend, start
    learning_rates: list  # all that are tried


# The best rate depends on the graph: a tree wants large steps, and a random graph the smallest of
# these. Six rates for each space, so that none has more tries. Where distances are squared,
# gradients grow with the distance, and the largest rate diverges.
SPACES = {
    "Poincare": Space(Poincare, [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]),
    "Lorentz": Space(Lorentz, [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]),
    "Euclid": Space(Euclid, [0.003, 0.03, 0.3, 1.0, 3.0, 10.0]),
    "Euclid, squared": Space(EuclidSquared, [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]),
}

# More pairs of a node and an ancestor than this do not fit into memory with everything else.
LARGEST_CLOSURE = 10_000_000

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}

# Steps between lines in the log
LOG_EVERY = 100

# Distances are evaluated in parts of at most this many numbers.
LARGEST_PART = 10_000_000


@dataclass
class Config:
    # The graphs: tree (balanced, 364 nodes), stories (the taxonomy of the built-in world), ring and
    # random (no trees), all (the tree in all dimensions and the others in the first), or a file of
    # lines "child TAB parent".
    data: str = "all"
    dims: str = "2,5,10,50"  # dimensions of the spaces, separated by commas
    steps: int = 4000  # steps of training in each space and dimension
    batch_size: int = 128  # pairs of a node and one of its ancestors per step
    negatives: int = 10  # random other nodes that each pair is compared with
    lr: float = 0.0  # learning rate of all spaces; 0: several are tried and the best is reported
    warmup: float = 0.1  # share of the steps, at the start, with a tenth of the learning rate
    dtype: str = "fp64"  # fp64 or fp32: the precision of the points
    eval_every: int = 0  # steps between evaluations; 0: only at the end
    rows: int = 1000  # at most so many nodes are evaluated, each against all others
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: cpu, which is fast enough for small graphs
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for dim in self.dims.split(","):
            is_size = dim.isdecimal() and 1 <= int(dim) <= 10_000
            assert is_size, f"dims={self.dims} must be numbers from 1, such as 2,5,10: got {dim!r}"
        assert self.warmup < 1, f"warmup={self.warmup} must be below 1: no step would be left"
        assert self.dtype in ("fp32", "fp64"), f"dtype={self.dtype} must be fp32 or fp64"


# graphs -------------------------------------------------------------------------------------------


@dataclass
class Graph:
    names: list  # of the N nodes
    edges: torch.Tensor  # (E, 2) child and parent, or two neighbours
    pairs: torch.Tensor  # (P, 2) a node, and one that shall be close to it; sorted
    depth: torch.Tensor  # (N,) steps to the nearest root; 0 everywhere in a graph without a root

    def __post_init__(self):
        # One number per pair. It is looked up by binary search.
        self.keys = self.pairs[:, 0] * len(self.names) + self.pairs[:, 1]

    def has_pair(self, u, v):
        """Is (u, v) a pair? For tensors of nodes that broadcast."""
        keys = u * len(self.names) + v
        places = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return self.keys[places] == keys

    def pair_mask(self, nodes):
        """Sorted nodes (rows,) -> which of all nodes are their pairs, (rows, N) bool."""
        mask = torch.zeros(len(nodes), len(self.names), dtype=torch.bool, device=nodes.device)
        pairs = self.pairs[torch.isin(self.pairs[:, 0], nodes)]
        mask[torch.searchsorted(nodes, pairs[:, 0].contiguous()), pairs[:, 1]] = True
        return mask

    def to(self, device):
        return Graph(
            self.names, self.edges.to(device), self.pairs.to(device), self.depth.to(device)
        )


def read_edges(path):
    """Lines "child TAB parent" -> a list of (child, parent). Empty lines are skipped."""
    edges = []
    for line_number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != 2 or not all(cells):
            shown = line.strip()[:60]
            fail(f"{path} line {line_number}: expected a child, a tab and a parent, got {shown!r}")
        edges.append((cells[0], cells[1]))
    return edges


def hierarchy(edges, source):
    """(child, parent) names -> Graph. A node may have several parents. Its pairs are all its
    ancestors (the transitive closure). source says in an error where the edges come from."""
    # number the nodes in the order in which they occur
    number_of = {}
    for edge in edges:
        for name in edge:
            number_of.setdefault(name, len(number_of))
    names = list(number_of)

    parents = [[] for _ in names]
    children = [[] for _ in names]
    # dict.fromkeys drops edges that occur twice, and keeps the order
    numbered = list(dict.fromkeys((number_of[child], number_of[parent]) for child, parent in edges))
    for child, parent in numbered:
        parents[child].append(parent)
        children[parent].append(child)

    # Parents come before their children (Kahn 1962): a node is ready when all its parents are done.
    # Its ancestors are then its parents and what was found for them.
    waiting = [len(mine) for mine in parents]
    ready = deque(node for node, count in enumerate(waiting) if count == 0)
    depth = [0] * len(names)
    ancestors = [None] * len(names)
    total = 0
    while ready:
        node = ready.popleft()
        found = [ancestors[parent] for parent in parents[node]]
        found.append(np.array(parents[node], dtype=np.int64))
        ancestors[node] = np.unique(np.concatenate(found))
        if parents[node]:
            depth[node] = 1 + min(depth[parent] for parent in parents[node])

        total += len(ancestors[node])
        if total > LARGEST_CLOSURE:
            fail(
                f"{source}: its {len(names):,} nodes have more than {LARGEST_CLOSURE:,} ancestors "
                "in all, which is too many: leave out the deepest levels"
            )
        for child in children[node]:
            waiting[child] -= 1
            if waiting[child] == 0:
                ready.append(child)

    stuck = [node for node, mine in enumerate(ancestors) if mine is None]
    if stuck:
        cycle = find_cycle(parents, stuck)
        shown = " -> ".join(names[node] for node in cycle[:6])
        if len(cycle) > 6:
            shown += " -> ..."
        fail(f"{source} has a cycle, so it is no hierarchy: {shown}")

    counts = torch.tensor([len(mine) for mine in ancestors])
    nodes = torch.arange(len(names)).repeat_interleave(counts)
    pairs = torch.stack([nodes, torch.from_numpy(np.concatenate(ancestors))], dim=1)
    return Graph(names, torch.tensor(numbered), pairs, torch.tensor(depth))


def find_cycle(parents, stuck):
    """The nodes of one cycle, the first one again at the end. Each stuck node has a parent that is
    stuck, too, so a walk from parent to parent must come back to where it was."""
    is_stuck = set(stuck)
    place_of = {}
    walk = []
    node = stuck[0]
    while node not in place_of:
        place_of[node] = len(walk)
        walk.append(node)
        node = next(parent for parent in parents[node] if parent in is_stuck)
    return walk[place_of[node] :] + [node]


def balanced_tree(branching=3, levels=5):
    """A tree in which each node above the lowest level has so many children. 3 and 5: 364 nodes."""
    edges = []
    level = ["root"]
    for _ in range(levels):
        next_level = []
        for parent in level:
            for i in range(branching):
                child = f"{i}" if parent == "root" else f"{parent}.{i}"
                edges.append((child, parent))
                next_level.append(child)
        level = next_level
    return hierarchy(edges, "tree")


def network(nodes, edges):
    """Neighbours instead of ancestors: each edge is a pair in both directions -> Graph."""
    edges = torch.tensor(edges)
    both = torch.cat([edges, edges.flip(1)])
    pairs = torch.unique(both, dim=0)  # sorts them, too
    names = [str(node) for node in range(nodes)]
    return Graph(names, edges, pairs, torch.zeros(nodes, dtype=torch.long))


def ring(nodes=364, reach=2):
    """A ring in which each node is a neighbour of the next ones in both directions."""
    edges = []
    for node in range(nodes):
        for distance in range(1, reach + 1):
            edges.append((node, (node + distance) % nodes))
    return network(nodes, edges)


def random_graph(nodes=364, edges=728, seed=0):
    """So many different edges between nodes that were drawn by chance (Erdos and Renyi 1959)."""
    generator = np.random.default_rng(seed)
    found = {}
    while len(found) < edges:
        a, b = generator.integers(nodes, size=2).tolist()
        if a != b:
            found[(min(a, b), max(a, b))] = True
    return network(nodes, list(found))


def load_graphs(data):
    """What --data names -> {name: Graph}."""
    built_in = {
        "tree": balanced_tree,
        "stories": lambda: read_hierarchy(require("data/stories") / "taxonomy.tsv"),
        "ring": ring,
        "random": random_graph,
    }
    if data == "all":
        return {name: make() for name, make in built_in.items()}
    if data in built_in:
        return {data: built_in[data]()}
    return {Path(data).stem: read_hierarchy(data)}


def read_hierarchy(path):
    """A file of lines "child TAB parent" -> Graph."""
    return hierarchy(read_edges(path), path)


# the lesson's mathematics -------------------------------------------------------------------------


def softmax_loss(distance, is_wrong):
    """distance (..., K) from a node to its candidates, of which the first is the ancestor ->
    -log softmax(-distance) of the first (...) (Nickel and Kiela 2017, eq. 6). Candidates for which
    is_wrong (..., K) is true are left out: they were drawn by chance and are ancestors, too."""
    logits = (-distance).masked_fill(is_wrong, -math.inf)
    return -logits.log_softmax(dim=-1)[..., 0]


def get_batch(graph, batch_size, negatives, generator):
    """Random pairs and random other nodes -> nodes (B,), candidates (B, K) of which the first is
    the ancestor, and is_wrong (B, K), true where a random node is related or the node itself."""
    chosen = torch.randint(len(graph.pairs), (batch_size,), generator=generator)
    pairs = graph.pairs[chosen.to(graph.pairs.device)]
    random_nodes = torch.randint(len(graph.names), (batch_size, negatives), generator=generator)
    candidates = torch.cat([pairs[:, 1:], random_nodes.to(pairs.device)], dim=1)

    nodes = pairs[:, :1]
    is_wrong = graph.has_pair(nodes, candidates) | (candidates == nodes)
    is_wrong[:, 0] = False
    return nodes.squeeze(1), candidates, is_wrong


def learning_rate_factor(step, steps, warmup):
    """A tenth in the first part, in which the points find the right directions from the origin
    (the paper's burn-in). Then from 1 linearly to 0, so that the random candidates average out."""
    first = int(warmup * steps)
    if step < first:
        return 0.1
    return 1 - (step - first) / (steps - first)


def train_step(geometry, points, batch, lr):
    """One step of (Riemannian) SGD on all runs, in place -> the mean loss of each run (R,).

    points is (R, N, D) and lr (R, 1, 1). Only the nodes of the batch are read and written, so that
    a step costs the same however many nodes there are.
    """
    nodes, candidates, is_wrong = batch
    R, _, D = points.shape
    B, K = candidates.shape

    # the rows of the batch, each once, so that their gradients add up
    both = torch.cat([nodes, candidates.flatten()])
    rows, place = torch.unique(both, return_inverse=True)
    leaf = points[:, rows].requires_grad_()
    u = leaf.index_select(1, place[:B]).view(R, B, 1, D)
    v = leaf.index_select(1, place[B:]).view(R, B, K, D)

    # The sum, not the mean: then a good learning rate does not depend on the size of the batch.
    loss = softmax_loss(geometry.distance(u, v), is_wrong)  # (R, B)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    with torch.no_grad():
        points[:, rows] = geometry.descend(leaf, gradient, lr)
    return loss.detach().mean(dim=1)


# evaluation ---------------------------------------------------------------------------------------


class Quality(NamedTuple):
    mean_rank: float  # of the ancestors among the nodes that are none; 1 is perfect
    map: float  # mean average precision; 1 is perfect


def reconstruction(distance, is_pair, is_self):
    """Distances (rows, N) from some nodes to all -> rank (rows, A), precision (rows, A) and
    is_real (rows, A), for each of the at most A ancestors from the nearest to the furthest.

    The rank of an ancestor counts the nodes that are not related and not further away. Ancestors do
    not compete with one another. Its precision is the share of ancestors among all nodes up to it.
    A tie counts against the ancestor: if all points are at one place, the rank is the worst.
    """
    most = int(is_pair.sum(dim=1).max())
    ancestors = distance.masked_fill(~is_pair, math.inf)
    ancestors = ancestors.topk(most, dim=1, largest=False).values  # (rows, A), ascending

    # For every other node: the first ancestor that is not closer. The node stands before this one
    # and before all that follow. There are few ancestors, so this is cheaper than to sort N nodes.
    others = distance.masked_fill(is_pair | is_self, math.inf)
    first_after = torch.searchsorted(ancestors, others)  # (rows, N)
    counts = torch.zeros(len(distance), most + 1, dtype=torch.long, device=distance.device)
    counts.scatter_add_(1, first_after, torch.ones_like(first_after))
    closer = counts[:, :most].cumsum(dim=1)  # (rows, A)

    found = torch.arange(1, most + 1, device=distance.device)
    is_real = found <= is_pair.sum(dim=1, keepdim=True)
    return 1 + closer, found.double() / (found + closer), is_real


@torch.no_grad()
def evaluate(geometry, points, graph, rows):
    """Mean rank and mean average precision of each run's points (R, N, D) -> a list of Quality.

    Nickel and Kiela (2017), section 4.1. rows are the nodes to evaluate, each of which has a pair.
    A run that has diverged gets the worst numbers.
    """
    R, N, D = points.shape
    everyone = torch.arange(N, device=points.device)
    is_finite = points.isfinite().all(dim=2).all(dim=1).tolist()
    rank_sums = [0.0] * R
    precision_sums = [0.0] * R
    ancestors = 0

    for part in rows.split(max(1, LARGEST_PART // (N * D))):
        is_pair = graph.pair_mask(part)  # (rows, N)
        is_self = part[:, None] == everyone
        counts = is_pair.sum(dim=1)
        ancestors += counts.sum().item()
        for r in range(R):
            if not is_finite[r]:
                continue
            distance = geometry.distance(points[r, part, None], points[r, None])  # (rows, N)
            rank, precision, is_real = reconstruction(distance, is_pair, is_self)
            rank_sums[r] += (rank * is_real).sum().item()
            precision_sums[r] += ((precision * is_real).sum(dim=1) / counts).sum().item()

    qualities = []
    for r in range(R):
        quality = Quality(rank_sums[r] / ancestors, precision_sums[r] / len(rows))
        qualities.append(quality if is_finite[r] else Quality(float(N), 0.0))
    return qualities


def rows_to_evaluate(graph, most, seed):
    """The nodes that have a pair, or `most` of them chosen by chance (rows,)."""
    nodes = graph.pairs[:, 0].unique()
    order = torch.randperm(len(nodes), generator=torch.Generator().manual_seed(seed))
    return nodes[order[:most].sort().values.to(nodes.device)]


# training -----------------------------------------------------------------------------------------


class Trained(NamedTuple):
    points: torch.Tensor  # (R, N, D) or, for Lorentz, (R, N, D + 1)
    qualities: list  # Quality of each run


def train(geometry, graph, dim, learning_rates, cfg, seed, report=None):
    """Embeds the graph once with each learning rate -> Trained.

    report(step, loss, qualities) is called now and then; qualities is None between evaluations.
    """
    # Random numbers come from the CPU: then every device trains on the same ones.
    device = graph.pairs.device
    generator = torch.Generator().manual_seed(seed)
    start = geometry.start(len(graph.names), dim, generator).to(device, DTYPES[cfg.dtype])
    points = start.repeat(len(learning_rates), 1, 1)  # (R, N, D)
    lr = torch.tensor(learning_rates, device=device, dtype=points.dtype)[:, None, None]
    rows = rows_to_evaluate(graph, cfg.rows, seed)

    qualities = None
    for step in range(cfg.steps):
        batch = get_batch(graph, cfg.batch_size, cfg.negatives, generator)
        factor = learning_rate_factor(step, cfg.steps, cfg.warmup)
        loss = train_step(geometry, points, batch, lr * factor)

        is_last = step + 1 == cfg.steps
        is_time = cfg.eval_every > 0 and (step + 1) % cfg.eval_every == 0
        if is_last or is_time:
            qualities = evaluate(geometry, points, graph, rows)
        if report and (is_last or is_time or step % LOG_EVERY == 0):
            report(step, loss, qualities if is_last or is_time else None)
    return Trained(points, qualities)


def reporter(log, first_step, **job):
    """A function report(step, loss, qualities) for train(), which writes lines to the log."""

    def report(step, loss, qualities):
        # Runs that have diverged are not part of the loss.
        values = {}
        finite = loss[loss.isfinite()]
        if len(finite) > 0:
            values["loss"] = finite.min().item()
        if qualities:
            values["map"] = max(quality.map for quality in qualities)
        log(first_step + step, **job, **values)

    return report


class Row(NamedTuple):
    """All runs of one space in one dimension on one graph, over S seeds."""

    graph: str
    dim: int
    space: str
    learning_rates: list  # (R,)
    maps: list  # (S, R) mean average precision
    mean_ranks: list  # (S, R)

    @property
    def best(self):
        """The index of the learning rate whose mean MAP over the seeds is the highest."""
        return int(np.mean(self.maps, axis=0).argmax())

    @property
    def map(self):
        """MAP at the best learning rate, one number per seed."""
        return [maps[self.best] for maps in self.maps]

    @property
    def mean_rank(self):
        """Mean rank at the best learning rate, one number per seed."""
        return [ranks[self.best] for ranks in self.mean_ranks]


def compare(rows):
    """Curved against flat, for each graph and dimension -> a list of dicts.

    Curved is Poincare, and flat is the better one of Euclid's two. A difference counts only if the
    ranges over the seeds do not overlap.
    """
    found = []
    places = dict.fromkeys((row.graph, row.dim) for row in rows)
    for graph, dim in places:
        here = {row.space: row for row in rows if (row.graph, row.dim) == (graph, dim)}
        curved = here["Poincare"].map
        flat = max(here["Euclid"].map, here["Euclid, squared"].map, key=np.mean)
        winner = "no difference"
        if min(curved) > max(flat):
            winner = "curved"
        if min(flat) > max(curved):
            winner = "flat"
        found.append(
            {
                "graph": graph,
                "dim": dim,
                "curved_map": float(np.mean(curved)),
                "flat_map": float(np.mean(flat)),
                "difference": float(np.mean(curved) - np.mean(flat)),
                "winner": winner,
            }
        )
    return found


def summary(comparisons):
    """The finding in one or two lines, from the numbers alone."""
    first, *others = comparisons
    lines = [
        f"{first['graph']} in {first['dim']} dimensions: MAP {first['curved_map']:.2f} curved, "
        f"{first['flat_map']:.2f} flat"
    ]
    last = [row for row in others if row["graph"] == first["graph"]][-1:]
    for row in last:
        lines[0] += f"; in {row['dim']}: {row['curved_map']:.2f} and {row['flat_map']:.2f}"
    rest = [row for row in others if row["graph"] != first["graph"]]
    if rest:
        shown = [f"{row['graph']} {row['difference']:+.2f}" for row in rest]
        lines.append(f"curved minus flat in {rest[0]['dim']} dimensions: {', '.join(shown)}")
    return "\n".join(lines)


def spread(values):
    """One value, or the lowest and the highest of several, as text."""
    low, high = min(values), max(values)
    if len(values) == 1:
        return f"{low:.3f}"
    return f"{low:.3f} to {high:.3f}"


# the figure ---------------------------------------------------------------------------------------

# The two curved spaces agree so well that a full line would hide the other one.
LINE_STYLES = {"Lorentz": "--"}


def draw_sweep(ax, rows):
    """MAP against the learning rate, one line per space with its range over the seeds."""
    for i, row in enumerate(rows):
        maps = np.array(row.maps)
        style = LINE_STYLES.get(row.space, "-")
        ax.plot(row.learning_rates, maps.mean(axis=0), "o", ls=style, color=f"C{i}", markersize=4)
        ax.fill_between(row.learning_rates, maps.min(0), maps.max(0), color=f"C{i}", alpha=0.2)
    ax.set(xscale="log", ylim=(0, 1.03), xlabel="learning rate", ylabel="MAP")
    ax.set_title(f"{rows[0].graph}, {rows[0].dim} dimensions: the sweep", fontsize=11)


def draw(title, rows, path):
    """Above: MAP by dimension and by graph, at the best learning rates. Below: two sweeps."""
    fig, axes = figure(title, rows=2, columns=2, height=7)
    (by_dim, by_graph), sweeps = axes
    main_graph = rows[0].graph
    dims = list(dict.fromkeys(row.dim for row in rows if row.graph == main_graph))
    graphs = list(dict.fromkeys(row.graph for row in rows))

    for i, space in enumerate(SPACES):
        mine = [row for row in rows if row.space == space]
        line = [row.map for row in mine if row.graph == main_graph]
        means = np.array([np.mean(values) for values in line])
        lows = np.array([min(values) for values in line])
        highs = np.array([max(values) for values in line])
        error = [means - lows, highs - means]
        style = LINE_STYLES.get(space, "-")
        by_dim.errorbar(dims, means, error, fmt="o", ls=style, ms=4, capsize=3, label=space)

        # a group of bars for each graph
        bars = [row.map for row in mine if row.dim == dims[0]]
        for place, values in enumerate(bars):
            x = place + (i - 1.5) * 0.2
            by_graph.bar(x, np.mean(values), 0.2, color=f"C{i}")
            by_graph.plot([x] * len(values), values, "k.", markersize=4)

    by_dim.set(xscale="log", ylim=(0, 1.03), xlabel="dimensions of the space", ylabel="MAP")
    by_dim.set_xticks(dims, [str(dim) for dim in dims])
    by_dim.minorticks_off()
    by_dim.legend(fontsize=9, loc="lower right")
    by_dim.set_title(f"{main_graph}: best learning rate of each", fontsize=11)
    by_graph.set(ylim=(0, 1.03), ylabel="MAP")
    by_graph.set_xticks(range(len(graphs)), graphs)
    by_graph.set_title(f"all graphs, {dims[0]} dimensions", fontsize=11)

    for ax, dim in zip(sweeps, (dims[0], dims[-1])):
        draw_sweep(ax, [row for row in rows if (row.graph, row.dim) == (main_graph, dim)])
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device or "cpu")
    if device.type == "mps" and cfg.dtype == "fp64":
        fail("--device=mps has no 64-bit numbers: add --dtype=fp32, or use --device=cpu")

    # the graphs: the first one in all dimensions, the others in the first dimension
    graphs = load_graphs(cfg.data)
    out = output_folder(cfg)
    dims = [int(dim) for dim in cfg.dims.split(",")]
    jobs = []
    for i, (name, graph) in enumerate(graphs.items()):
        print(
            f"{name}: {len(graph.names):,} nodes, {len(graph.edges):,} edges, "
            f"{len(graph.pairs):,} pairs to remember"
        )
        for dim in dims if i == 0 else dims[:1]:
            for space in SPACES:
                jobs.append((name, dim, space))

    log = Log(out, len(jobs) * cfg.seeds * cfg.steps, name="train_hyperbolic")
    rows = []
    best_points = {}
    first_step = 0
    for name, dim, space in jobs:
        geometry, learning_rates = SPACES[space]
        if cfg.lr > 0:
            learning_rates = [cfg.lr]
        row = Row(name, dim, space, learning_rates, [], [])
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            report = reporter(log, first_step, graph=name, dim=dim, space=space, seed=seed)
            trained = train(
                geometry, graphs[name].to(device), dim, learning_rates, cfg, seed, report
            )
            first_step += cfg.steps
            row.maps.append([quality.map for quality in trained.qualities])
            row.mean_ranks.append([quality.mean_rank for quality in trained.qualities])
            if seed == cfg.seed:
                points = trained.points
        best_points[f"{name} {dim} {space}"] = points[row.best].float().cpu()
        rows.append(row)

    # the table
    width = max(len(name) for name in graphs)
    print(f"{'graph':{width}}  dim  {'space':15}  best lr  MAP                 mean rank")
    for row in rows:
        lr = row.learning_rates[row.best]
        print(
            f"{row.graph:{width}}  {row.dim:3}  {row.space:15}  {lr:7}  {spread(row.map):18}  "
            f"{spread(row.mean_rank)}"
        )

    comparisons = compare(rows)
    title = summary(comparisons)
    print(title)
    save_metrics(
        out,
        name="train_hyperbolic",
        comparisons=comparisons,
        rows=[{**row._asdict(), "best": row.best} for row in rows],
        seeds=cfg.seeds,
        seconds=log.seconds,
    )
    save_checkpoint(
        out / "hyperbolic.pt",
        kind="hyperbolic",
        names={name: graph.names for name, graph in graphs.items()},
        points=best_points,
        changed=cfg.changed,
    )
    draw(title, rows, out / "train_hyperbolic.png")
