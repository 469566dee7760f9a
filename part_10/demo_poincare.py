"""
Part 10: how much of a tree fits into a disk? The same tree, embedded in the hyperbolic plane and in
the flat one, and a taxonomy with its words.

    python part_10/demo_poincare.py                     the taxonomy of the built-in world
    python part_10/demo_poincare.py --data=edges.tsv    your own: lines "child TAB parent"

Starts here. It trains with train() of part_10/train_hyperbolic.py, in two dimensions.

demo_poincare.png shows the taxonomy in the Poincare disk. Edges are drawn as what they are in this
space, straight lines, which look like arcs that would meet the boundary at right angles. The root
is moved to the middle: that is a motion of the whole space, and no distance changes.
demo_poincare_planes.png shows a balanced tree of 364 nodes in both planes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

import train_hyperbolic
from hyperbolic import Euclid, Poincare
from shared import (
    COLOURS,
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
    set_seed,
)

# The names of leaves stand outside of the circle, at this distance from its middle, and nowhere is
# one closer to the next than this angle allows.
LABEL_RADIUS = 1.09
LABEL_HEIGHT = 0.047

# What one letter of such a name takes, and how many letters of a name are shown.
LETTER_WIDTH = 0.028
MOST_LETTERS = 24

# A picture of more nodes than this would only be a black rim.
MOST_NODES = 3000

# With more leaves than fit around the circle, none of them gets a name.
MOST_LEAVES = int(2 * math.pi * LABEL_RADIUS / LABEL_HEIGHT)


@dataclass
class Config:
    data: str = "stories"  # stories (the built-in taxonomy), tree, or lines "child TAB parent"
    steps: int = 4000  # steps of training in each space
    lr: float = 0.1  # learning rate in the Poincare disk
    lr_flat: float = 0.3  # learning rate in the flat plane
    warmup: float = 0.4  # share of the steps with a tenth of it: branches find their directions
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...; the figures show the best one
    device: str = ""  # cuda, mps or cpu; empty: cpu, which is fast enough for small graphs
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        is_tree = self.data not in ("all", "ring", "random")
        assert is_tree, f"data={self.data} is no tree: choose stories, tree or a file"
        assert self.warmup < 1, f"warmup={self.warmup} must be below 1: no step would be left"


# geometry of the picture --------------------------------------------------------------------------


def centred(points, root):
    """Moves the whole space so that the root comes to the origin (N, 2): x -> add(-root, x), which
    is an isometry."""
    return Poincare.add(-points[root], points)


def geodesic(x, y, steps=200):
    """Points on the straight line of the disk from x to y (steps, 2)."""
    shares = torch.linspace(0, 1, steps, dtype=x.dtype)[:, None]
    return Poincare.exp(x, shares * Poincare.log(x, y))


def children_of(graph):
    """For each node the list of its children."""
    children = [[] for _ in graph.names]
    for child, parent in graph.edges.tolist():
        children[parent].append(child)
    return children


def branch_of(graph):
    """For each node the number of the branch that it hangs in; -1 for a root.

    A branch is a child of a root, with everything below it.
    """
    parent_of = {}
    for child, parent in graph.edges.tolist():
        parent_of.setdefault(child, parent)

    number_of = {}
    branches = []
    for node in range(len(graph.names)):
        top = node
        while top in parent_of and parent_of[top] in parent_of:
            top = parent_of[top]
        if node not in parent_of:
            branches.append(-1)
            continue
        branches.append(number_of.setdefault(top, len(number_of)))
    return branches


def spread_angles(angles, gap):
    """Angles on a circle -> angles close to them, of which no two are closer than the gap.

    They keep their order. Neighbours that are too close push each other away, each by a half of
    what is missing, until nobody moves.
    """
    n = len(angles)
    assert n * gap <= 2 * math.pi, f"{n} angles with a gap of {gap} do not fit on a circle"
    order = np.argsort(angles)
    placed = np.array(angles, dtype=float)[order]
    if n < 2:
        return np.array(angles, dtype=float)

    for _ in range(20_000):
        after = np.roll(placed, -1)
        after[-1] += 2 * math.pi
        missing = gap - (after - placed)
        if missing.max() < 1e-6:
            break
        push = 0.5 * missing.clip(min=0)
        placed = placed - push + np.roll(push, 1)
    result = np.empty(n)
    result[order] = placed
    return result


def depth_correlation(points, depth):
    """The correlation of a node's depth with its distance from the origin of the disk."""
    radius = Poincare.distance(torch.zeros_like(points), points)
    return float(np.corrcoef(radius.numpy(), depth.numpy())[0, 1])


# the figures --------------------------------------------------------------------------------------


def branch_colour(branch):
    """A colour that is dark enough to write with."""
    from matplotlib.colors import to_rgb

    if branch < 0:
        return (0, 0, 0)
    bright = to_rgb([COLOURS[i] for i in (0, 3, 2, 4, 1, 5)][branch % 6])
    return tuple(0.8 * part for part in bright)


def draw_disk(ax, graph, points, width):
    """The boundary, the edges as geodesics and the nodes. The deeper a node is, the smaller."""
    from matplotlib.patches import Circle

    branches = branch_of(graph)
    ax.add_patch(Circle((0, 0), 1, facecolor="#f5f7fa", edgecolor="#444444", linewidth=1, zorder=0))
    for child, parent in graph.edges.tolist():
        arc = geodesic(points[child], points[parent])
        colour = branch_colour(branches[child])
        ax.plot(arc[:, 0], arc[:, 1], color=colour, linewidth=width, alpha=0.6, zorder=1)

    colours = [branch_colour(branch) for branch in branches]
    sizes = [18 * width * 0.75**depth for depth in graph.depth.tolist()]
    ax.scatter(points[:, 0], points[:, 1], s=sizes, c=colours, linewidths=0, zorder=2)
    ax.set_aspect("equal")
    ax.axis("off")


def shown_name(name):
    """A name that is not too long for the picture."""
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"


def label_leaves(ax, graph, points, leaves):
    """Writes the names of the leaves around the disk, along its rays -> the texts. The longest one
    decides how much room the disk leaves them."""
    branches = branch_of(graph)
    longest = max(len(shown_name(graph.names[node])) for node in leaves)
    reach = LABEL_RADIUS + 0.04 + LETTER_WIDTH * longest
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach))
    angles = torch.atan2(points[leaves, 1], points[leaves, 0]).numpy()
    gap = LABEL_HEIGHT / LABEL_RADIUS
    texts = []
    for node, angle in zip(leaves, spread_angles(angles, gap)):
        colour = branch_colour(branches[node])
        x, y = math.cos(angle), math.sin(angle)

        # a thin line from the leaf to its name
        ax.plot(
            [points[node, 0], 1.02 * x, (LABEL_RADIUS - 0.01) * x],
            [points[node, 1], 1.02 * y, (LABEL_RADIUS - 0.01) * y],
            color=colour,
            linewidth=0.5,
            alpha=0.5,
            zorder=1,
        )

        # The left half would stand on its head.
        is_left = x < 0
        text = ax.text(
            LABEL_RADIUS * x,
            LABEL_RADIUS * y,
            shown_name(graph.names[node]),
            rotation=math.degrees(angle) + (180 if is_left else 0),
            rotation_mode="anchor",
            ha="right" if is_left else "left",
            va="center",
            fontsize=12 / reach,
            color=colour,
            parse_math=False,
        )
        texts.append(text)
    return texts


def label_inner(fig, ax, graph, points, nodes, texts):
    """Writes the names of inner nodes beside them, each at the first of several places where it
    covers no other name -> all texts. A name without such a place is left out."""
    from matplotlib.patheffects import withStroke

    renderer = fig.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in texts]
    branches = branch_of(graph)
    texts = list(texts)
    for node in nodes:
        for place in range(16):
            angle = place * math.pi / 4
            distance = 9 if place < 8 else 16  # points of the page, between node and name
            text = ax.annotate(
                shown_name(graph.names[node]),
                points[node].tolist(),
                xytext=(distance * math.cos(angle), distance * math.sin(angle)),
                textcoords="offset points",
                ha=("left", "center", "right")[1 - round(math.cos(angle))],
                va=("bottom", "center", "top")[1 - round(math.sin(angle))],
                fontsize=11 if graph.depth[node] < 2 else 9.5,
                fontweight="bold",
                color=branch_colour(branches[node]),
                zorder=4,
                parse_math=False,
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
            box = text.get_window_extent(renderer).padded(3)
            if not any(box.overlaps(other) for other in boxes):
                boxes.append(box)
                texts.append(text)
                break
            text.remove()
    return texts


def write_names(fig, ax, graph, points):
    """The names of all leaves, if they fit around the disk, and of as many inner nodes as fit into
    it -> the texts, of which no two overlap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    children = children_of(graph)
    leaves = [node for node, mine in enumerate(children) if not mine]
    inner = [node for node, mine in enumerate(children) if mine]
    inner.sort(key=lambda node: graph.depth[node].item())
    texts = []
    ax.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05))
    if len(leaves) <= MOST_LEAVES:
        texts = label_leaves(ax, graph, points, leaves)

    # From here on the layout is final, and the boxes of texts can be compared.
    FigureCanvasAgg(fig).draw()
    return label_inner(fig, ax, graph, points, inner[:60], texts)


def draw_poster(title, graph, points, path):
    """The disk with all names that fit -> how many names there are."""
    fig, ax = figure(title, height=8.3)
    draw_disk(ax, graph, points, width=1.6)
    texts = write_names(fig, ax, graph, points)
    save_figure(fig, path)
    return len(texts)


def draw_planes(title, graph, disk, flat, path):
    """The same tree in the hyperbolic and in the flat plane."""
    fig, (left, right) = figure(title, columns=2, height=4.9)
    draw_disk(left, graph, disk.points, width=0.8)
    left.set_title("hyperbolic plane", fontsize=11)

    branches = branch_of(graph)
    for child, parent in graph.edges.tolist():
        line = flat.points[[child, parent]]
        colour = branch_colour(branches[child])
        right.plot(line[:, 0], line[:, 1], color=colour, linewidth=0.6, alpha=0.5, zorder=1)
    colours = [branch_colour(branch) for branch in branches]
    sizes = [14 * 0.75**depth for depth in graph.depth.tolist()]
    right.scatter(flat.points[:, 0], flat.points[:, 1], s=sizes, c=colours, linewidths=0, zorder=2)
    middle = (flat.points.max(dim=0).values + flat.points.min(dim=0).values) / 2
    half = 1.05 * (flat.points - middle).abs().max().item()
    x, y = middle.tolist()
    right.set(xlim=(x - half, x + half), ylim=(y - half, y + half))
    right.set_aspect("equal")
    right.axis("off")
    right.set_title("flat plane, same loss", fontsize=11)
    save_figure(fig, path)


# training -----------------------------------------------------------------------------------------


class Embedded(NamedTuple):
    points: torch.Tensor  # (N, 2) in float64, on the CPU
    map: float  # mean average precision
    mean_rank: float


def embed(geometry, graph, lr, cfg, seed):
    """One space in two dimensions -> Embedded. In the disk the root is in the middle."""
    run = train_hyperbolic.Config(steps=cfg.steps, warmup=cfg.warmup)
    trained = train_hyperbolic.train(geometry, graph, 2, [lr], run, seed)
    quality = trained.qualities[0]
    points = trained.points[0].cpu().double()
    if geometry is Poincare:
        root = int(graph.depth.argmin())
        points = centred(points, root)
    return Embedded(points, quality.map, quality.mean_rank)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device or "cpu")
    ((name, words),) = train_hyperbolic.load_graphs(cfg.data).items()
    if len(words.names) > MOST_NODES:
        fail(f"--data={cfg.data} has {len(words.names):,} nodes, a picture shows {MOST_NODES:,}")
    out = output_folder(cfg)
    graphs = {name: words.to(device), "balanced tree": train_hyperbolic.balanced_tree().to(device)}

    # train each graph in both planes
    maps = {}
    correlations = {}
    shown = {}
    for graph_name, graph in graphs.items():
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            disk = embed(Poincare, graph, cfg.lr, cfg, seed)
            flat = embed(Euclid, graph, cfg.lr_flat, cfg, seed)
            correlation = depth_correlation(disk.points, graph.depth.cpu())
            print(
                f"{graph_name}, seed {seed}: MAP {disk.map:.3f} in the disk, {flat.map:.3f} in the "
                f"flat plane; correlation of depth and distance from the middle {correlation:.2f}",
                flush=True,
            )
            maps.setdefault(f"{graph_name}, disk", []).append(disk.map)
            maps.setdefault(f"{graph_name}, flat", []).append(flat.map)
            correlations.setdefault(graph_name, []).append(correlation)
            if graph_name not in shown or disk.map > shown[graph_name][0].map:
                shown[graph_name] = (disk, flat)

    # the figures show the seed that is best in the disk
    disk, flat = shown[name]
    nodes = len(words.names)
    title = (
        f"{nodes} words in the hyperbolic plane: MAP {disk.map:.2f}, in a flat one {flat.map:.2f}"
    )
    print(title)
    names_drawn = draw_poster(title, words, disk.points, out / "demo_poincare.png")

    disk, flat = shown["balanced tree"]
    tree = train_hyperbolic.balanced_tree()
    title = (
        f"A tree of {len(tree.names)} nodes: MAP {disk.map:.2f} in the hyperbolic plane, "
        f"{flat.map:.2f} in the flat one"
    )
    draw_planes(title, tree, disk, flat, out / "demo_poincare_planes.png")
    save_metrics(
        out,
        name="demo_poincare",
        map=maps,
        depth_correlation=correlations,
        names_drawn=names_drawn,
        nodes=nodes,
        seeds=cfg.seeds,
    )
