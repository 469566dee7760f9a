"""
Part 10: low rank. A large matrix becomes the product of two thin ones. How thin can they be, and
should the weights or the outputs be kept as they are?

    python part_10/lowrank.py                                          both models, both methods
    python part_10/lowrank.py --model=smollm2 --method=whitened --share=0.8
                                                                       one setting
    python part_10/lowrank.py --model=base --rank=16,32,64             the same rank everywhere
    python part_10/lowrank.py --model=my.pt                            your own checkpoint

Starts here. The models, the texts and what flows into each matrix come from compression.py, and the
error of the outputs is that of prune.py.

A matrix W (m, n) of rank r can be written as A B with A (m, r) and B (r, n). These are r (m + n)
numbers instead of m n, and as many multiplications for each token. It saves something only if
r < m n / (m + n), which is half of the rank for a square matrix. The matrices of a language model
have full rank, so W has to be replaced by a matrix W' of rank r that is close to it. Close in which
sense?

    svd        the weights: |W - W'|^2 is as small as possible. By the theorem of Eckart and Young
               (1936) W' keeps the r largest singular values of W
    whitened   the outputs on the calibration text: |W X - W' X|^2 is as small as possible

The second problem can be reduced to the first one. Let X (n, N) have the inputs of the text as
columns, G = X X^T, and let S be a square root of G, S S^T = G, such as its Cholesky factor. Then

    |(W - W') X|^2 = trace((W - W') G (W - W')^T) = |W S - W' S|^2

W' S has at most rank r, so it cannot be closer to W S than the best matrix of rank r is. This one
is U_r U_r^T W S, where U_r (m, r) has the first r left singular vectors of W S as columns. The
choice W' = U_r U_r^T W reaches it. So A = U_r and B = U_r^T W, and nothing has to be inverted.

SVD-LLM (Wang et al. 2024, section 3.2) writes the same W' as U_r Sigma_r V_r^T S^-1. The name
"whitened" comes from there: S^-1 makes inputs that have no correlation. There is another way to see
it. (W S) (W S)^T = W G W^T = sum y y^T over all outputs y. So the columns of U_r are the principal
directions of the outputs, and W' x is y projected onto them. svd does the same for inputs that have
no correlation and are all equally loud.

Shapes: W (m, n), m outputs and n inputs; r rank, N inputs of the text, T tokens in a row.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
import torch.nn as nn

from compression import load_model, load_texts, matrices, mean_loss, watch_inputs
from model import KVCache
from prune import BASE_ROWS, output_energy, output_error, weights_of
from shared import figure, output_folder, parse_args, pick_device, save_figure, save_metrics

METHODS = ("svd", "whitened")


@dataclass
class Config:
    model: str = "base,smollm2"  # models, separated by commas: base, smollm2, or paths
    method: str = ",".join(METHODS)  # methods, separated by commas
    share: str = "0.9,0.8,0.6,0.4"  # shares of a matrix's parameters that are kept, with commas
    rank: str = ""  # the same ranks for all matrices, instead of shares; separated by commas
    rows: int = 16  # rows of the calibration text (base: 32 times as many)
    held_out: int = 8  # rows of the held-out text (base: 32 times as many)
    block_size: int = 128  # longest row, in tokens
    repeats: int = 8  # how often the time of 8 tokens is measured; each time beside the dense model
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for method in self.method.split(","):
            assert method in METHODS, f"method={self.method} must be some of {','.join(METHODS)}"
        for text in self.share.split(","):
            is_number = text.replace(".", "", 1).isdigit()
            assert is_number and 0 < float(text) <= 2, (
                f"share={self.share} must be numbers above 0 and at most 2, with commas"
            )
        for text in self.rank.split(",") if self.rank else []:
            assert text.isdigit() and int(text) > 0, (
                f"rank={self.rank} must be integers above 0, with commas"
            )


# the lesson's mathematics -------------------------------------------------------------------------


def square_root(gram, damping=1e-4):
    """S (n, n) with S S^T = gram (n, n), its lower Cholesky factor.

    A text with fewer tokens than inputs has a singular gram matrix. So a share of the mean of the
    diagonal is added to the diagonal, and float64 is used.
    """
    device = gram.device
    gram = gram.cpu().double()  # some GPUs have no float64
    noise = damping * gram.diagonal().mean()
    S = torch.linalg.cholesky(gram + torch.diag(noise.expand(len(gram))))
    return S.float().to(device)


class Directions(NamedTuple):
    """What a singular value decomposition says about a matrix."""

    U: torch.Tensor  # (m, min(m, n)) orthonormal columns, the most important one first
    values: torch.Tensor  # (min(m, n),) singular values, the largest one first


def weight_directions(W):
    """The directions of the weights W (m, n)."""
    U, values, _ = torch.linalg.svd(W, full_matrices=False)
    return Directions(U, values)


def output_directions(W, gram):
    """The directions of the outputs y = W x, from the gram matrix (n, n) = sum x x^T."""
    return weight_directions(W @ square_root(gram))


class Factors(NamedTuple):
    """W' = up @ down, a matrix of rank r."""

    up: torch.Tensor  # (m, r)
    down: torch.Tensor  # (r, n)


def factorize(W, directions, rank):
    """W (m, n) projected onto its first directions -> Factors."""
    up = directions.U[:, :rank].contiguous()
    return Factors(up, up.T @ W)


def rank_for_share(share, m, n):
    """The largest rank, at least 1, with at most share * m * n parameters."""
    rank = int(share * m * n / (m + n) + 1e-6)
    return min(max(rank, 1), m, n)


class LowRank(nn.Module):
    """Two linear layers in the place of one: x (..., n) -> (..., m)."""

    def __init__(self, factors):
        super().__init__()
        m, r = factors.up.shape
        n = factors.down.size(1)
        self.down = nn.Linear(n, r, bias=False)
        self.up = nn.Linear(r, m, bias=False)
        self.down.weight = nn.Parameter(factors.down)
        self.up.weight = nn.Parameter(factors.up)

    def forward(self, x):
        return self.up(self.down(x))


# models -------------------------------------------------------------------------------------------


def install(model, modules):
    """Puts the modules {name: module} into their places in the model."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def count_parameters(modules):
    return sum(p.numel() for module in modules.values() for p in module.parameters())


@torch.no_grad()
def seconds_of_tokens(model, n_tokens):
    """The processor time of n_tokens steps of generation at batch 1, in seconds."""
    device = model.wte.weight.device
    idx = torch.zeros(1, 1, dtype=torch.long, device=device)
    cache = KVCache(model.cfg, 1, device)
    start = time.process_time()
    for _ in range(n_tokens):
        model(idx, cache=cache)
    return time.process_time() - start


def time_per_token(model, dense, modules, repeats, n_tokens=8):
    """How long a token takes with the modules, as a multiple of the dense model's time, and how
    long it takes in the dense model -> (ratio, milliseconds). The two take turns, and medians are
    taken, so that other programs disturb both alike."""
    n_tokens = min(n_tokens, model.cfg.block_size)
    seconds_dense = []
    ratios = []
    for repeat in range(repeats + 1):
        install(model, dense)
        of_dense = seconds_of_tokens(model, n_tokens)
        install(model, modules)
        of_modules = seconds_of_tokens(model, n_tokens)

        # the first turn warms the caches up and does not count
        if repeat > 0:
            seconds_dense.append(of_dense)
            ratios.append(of_modules / of_dense)
    return median(ratios), 1000 * median(seconds_dense) / n_tokens


# the experiment -----------------------------------------------------------------------------------


def spectrum(directions, n_points=101):
    """The share of the energy (squared singular values) in the first values, at n_points between no
    value and all of them. {name: Directions} -> a list of n_points tensors' values for each name.
    """
    lines = {}
    for name, found in directions.items():
        energy = found.values.cpu().double().square()
        total = torch.cat([energy.new_zeros(1), energy.cumsum(0)]) / energy.sum()
        at = torch.linspace(0, len(energy), n_points, device=total.device).round().long()
        lines[name] = total[at].tolist()
    return lines


def ranks_asked(cfg):
    """The settings that the user asked for: labels such as "0.8" or "rank 64"."""
    if cfg.rank:
        return [f"rank {text}" for text in cfg.rank.split(",")]
    return cfg.share.split(",")


def rank_of(label, m, n):
    """The rank that a label stands for, in a matrix (m, n)."""
    if label.startswith("rank "):
        return min(int(label.removeprefix("rank ")), m, n)
    return rank_for_share(float(label), m, n)


@torch.no_grad()
def all_directions(weights, statistics, method):
    """The directions of all matrices -> {name: Directions}."""
    directions = {}
    for name, W in weights.items():
        if method == "svd":
            directions[name] = weight_directions(W)
        else:
            directions[name] = output_directions(W, statistics[name].gram)
    return directions


def examine(name, cfg, device):
    """Factorizes one model by all methods at all ranks -> a dict for the JSON file."""
    model, tok = load_model(name, device)
    factor = BASE_ROWS if name == "base" else 1
    sizes = [factor * cfg.rows, factor * cfg.held_out]
    texts = load_texts(name, model, tok, cfg.block_size, *sizes)
    loss = mean_loss(model, texts.held_out)
    weights = weights_of(model)
    dense = dict(matrices(model))
    n_tokens = (texts.held_out.targets >= 0).sum().item()
    print(f"\n{name}: {n_tokens:,} held-out tokens, dense {loss:.4f} nats per token")
    if texts.entropy is not None:
        print(f"    the true entropy is {texts.entropy:.4f}")

    statistics = watch_inputs(model, texts.calibration)
    energy = output_energy(weights, statistics)
    settings = []
    spectra = {}
    times = {}  # {label: (ratio, milliseconds of the dense model)}
    for method in cfg.method.split(","):
        start = time.process_time()
        directions = all_directions(weights, statistics, method)
        spectra[method] = spectrum(directions)
        seconds = time.process_time() - start
        print(f"    {method}: {seconds:.0f} s for all decompositions")

        for label in ranks_asked(cfg):
            modules = {}
            products = {}
            for matrix, W in weights.items():
                factors = factorize(W, directions[matrix], rank_of(label, *W.shape))
                modules[matrix] = LowRank(factors)
                products[matrix] = factors.up @ factors.down

            # the time depends on the rank alone, so it is measured for the first method only
            install(model, modules)
            nats = mean_loss(model, texts.held_out)
            if label not in times:
                times[label] = time_per_token(model, dense, modules, cfg.repeats)

            setting = {"method": method, "label": label, "nats": nats}
            setting["share"] = count_parameters(modules) / count_parameters(dense)
            setting["error"] = output_error(weights, products, statistics, energy)
            setting["time"], setting["dense_milliseconds"] = times[label]
            settings.append(setting)
            print(
                f"    {method:8}  {label:>8}  {setting['share']:.3f} of the parameters  "
                f"{nats:.4f} nats  error {setting['error']:.4f}  time {setting['time']:.2f}",
                flush=True,
            )

    return {
        "dense": loss,
        "entropy": texts.entropy,
        "tokens": n_tokens,
        "settings": settings,
        "spectra": spectra,
    }


# what came out ------------------------------------------------------------------------------------


def line_of(result, method):
    """The settings of a method, ordered by their share of the parameters."""
    settings = [setting for setting in result["settings"] if setting["method"] == method]
    return sorted(settings, key=lambda setting: setting["share"])


def finding(results, cfg):
    """The title of the figure: what the largest share below 1 costs."""
    lines = []
    for name, result in results.items():
        parts = []
        for method in cfg.method.split(","):
            settings = line_of(result, method)
            saving = [setting for setting in settings if setting["share"] < 1]
            setting = saving[-1] if saving else settings[0]
            parts.append(f"{method} {setting['nats'] - result['dense']:+.3f}")
        share = f"{setting['share']:.0%} of the parameters"
        lines.append(f"{Path(name).stem}, {share}: " + ", ".join(parts))
    return "Nats per token that a low rank costs\n" + "\n".join(lines)


def draw_curves(title, results, cfg, path):
    """One panel for each model: nats per token over the share of the parameters."""
    fig, axes = figure(title, "share of the parameters that is left", columns=len(results))
    for ax, (name, result) in zip([axes] if len(results) == 1 else axes, results.items()):
        for method, marker in zip(cfg.method.split(","), "os"):
            settings = line_of(result, method)
            shares = [setting["share"] for setting in settings]
            nats = [setting["nats"] for setting in settings]
            ax.plot(shares, nats, marker=marker, label=method)
        ax.axhline(result["dense"], color="black", linestyle="--", linewidth=1, label="dense")
        if result["entropy"] is not None:
            ax.axhline(result["entropy"], color="black", linestyle=":", label="true entropy")
        ax.set(ylabel="nats per token")
        ax.set_title(Path(name).stem, fontsize=11)
        ax.legend(fontsize=9)
    save_figure(fig, path)


def mean_line(lines):
    """{name: a list of numbers} -> the mean, the lowest and the highest value at each place."""
    table = torch.tensor(list(lines.values()))
    return table.mean(dim=0), table.amin(dim=0), table.amax(dim=0)


def draw_spectra(results, path):
    """One panel for each model: how much energy is in the first singular values?"""
    parts = []
    for name, result in results.items():
        halves = []
        for method, lines in result["spectra"].items():
            mean, _, _ = mean_line(lines)
            halves.append(f"{method} {mean[len(mean) // 2]:.1%}")
        parts.append(f"{Path(name).stem}: " + ", ".join(halves))
    title = "Energy in the first half of the singular values, mean of all matrices\n"
    title += "; ".join(parts)

    fig, axes = figure(title, "share of the singular values", columns=len(results))
    labels = {"svd": "of the weights W", "whitened": "of the outputs, W S"}
    for ax, (name, result) in zip([axes] if len(results) == 1 else axes, results.items()):
        for (method, lines), style in zip(result["spectra"].items(), ("-", "--")):
            mean, low, high = mean_line(lines)
            x = torch.linspace(0, 1, len(mean))
            [line] = ax.plot(x, mean, linestyle=style, label=labels[method])
            ax.fill_between(x, low, high, alpha=0.15, color=line.get_color())
        ax.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":", label="all equal")
        ax.set(ylabel="share of the energy", ylim=(0, 1.03))
        ax.set_title(Path(name).stem, fontsize=11)
        ax.legend(fontsize=9, loc="lower right")
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    out = output_folder(cfg)

    results = {}
    for name in cfg.model.split(","):
        results[name] = examine(name, cfg, device)

    title = finding(results, cfg)
    save_metrics(out, name="lowrank", results=results, finding=title)
    draw_curves(title, results, cfg, out / "lowrank.png")
    draw_spectra(results, out / "lowrank_spectra.png")
