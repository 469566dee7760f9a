"""
Part 10: pruning. Half of the weights become zeros. Which half can a model do without, and what is a
zero worth?

    python part_10/prune.py                                        both models, all methods
    python part_10/prune.py --model=base --draws=3                 three draws of the calibration
                                                                   text: how much is chance?
    python part_10/prune.py --model=smollm2 --method=wanda --sparsity=0.5
                                                                   one setting
    python part_10/prune.py --model=smollm2 --method=wanda --sparsity=2:4
                                                                   two zeros among four neighbours
    python part_10/prune.py --model=base --in_order                block after block, see below
    python part_10/prune.py --model=my.pt                          your own checkpoint

Starts here. The models, the texts and what flows into each matrix come from compression.py.

A matrix computes y = W x. Four methods choose which weights become zero. Nothing is trained.

    magnitude       those with the smallest |W_ij| of the whole matrix
    magnitude_row   those with the smallest |W_ij| in each row, which means: for each output
    wanda           those with the smallest |W_ij| * ||X_j|| in each row. ||X_j|| is the length of
                    input channel j over the calibration text (Sun et al. 2023, "A simple and
                    effective pruning approach for large language models", eq. 1)
    sparsegpt       goes through the columns from left to right, and each time it removes weights it
                    changes the ones to the right, so that they make up for the error (Frantar &
                    Alistarh 2023, "SparseGPT", algorithm 1). The update is that of GPTQ

Why Wanda's score? If only the weight W_ij is removed, the output y_i changes by W_ij x_j for each
input x. Squared and summed over the text, this is W_ij^2 ||X_j||^2. A small weight on a loud
channel may matter more than a large weight on a quiet one.

What is left can be any set of weights (unstructured), or two of each four neighbours in a row
(2:4), which is the pattern that some GPUs compute faster.

Shapes: W (m, n), m outputs and n inputs; N rows of a text, T tokens in a row, C channels.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
import warnings
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
import torch.nn as nn

from compression import (
    InputStatistics,
    Rows,
    load_model,
    load_texts,
    matrices,
    mean_loss,
    watch_inputs,
)
from shared import fail, figure, output_folder, parse_args, pick_device, save_figure, save_metrics

METHODS = ("magnitude", "magnitude_row", "wanda", "sparsegpt")
CALIBRATED = ("wanda", "sparsegpt")  # the methods that look at the calibration text
TWO_OF_FOUR = "2:4"

# The documents of the world are short, and base is fast. It gets more rows than the other models.
BASE_ROWS = 32


@dataclass
class Config:
    model: str = "base,smollm2"  # models, separated by commas: base, smollm2, or paths
    method: str = ",".join(METHODS)  # methods, separated by commas
    sparsity: str = "0.3,0.5,0.6,2:4"  # shares of zeros and 2:4, separated by commas

    # prune block after block, each with the inputs that come out of the pruned blocks before it;
    # false: all blocks with the inputs of the dense model
    in_order: bool = False

    draws: int = 1  # number of calibration texts, which have no row in common
    rows: int = 16  # rows of a calibration text (base: 32 times as many)
    held_out: int = 8  # rows of the held-out text (base: 32 times as many)
    block_size: int = 128  # longest row, in tokens
    repeats: int = 40  # how often a matrix product is timed
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for method in self.method.split(","):
            assert method in METHODS, f"method={self.method} must be some of {','.join(METHODS)}"
        for text in self.sparsity.split(","):
            is_number = text.replace(".", "", 1).isdigit()
            assert text == TWO_OF_FOUR or (is_number and 0 < float(text) < 1), (
                f"sparsity={self.sparsity} must be 2:4 or numbers between 0 and 1, with commas"
            )


# the lesson's mathematics -------------------------------------------------------------------------


def keep_of_matrix(score, sparsity):
    """Which weights stay, if the scores of the whole matrix are compared?

    score (m, n) -> (m, n) bool, False for the int(sparsity * m * n) smallest scores.
    """
    return keep_of_rows(score.flatten()[None, :], sparsity).view_as(score)


def keep_of_rows(score, sparsity):
    """Which weights stay, if scores are compared within each row?

    score (m, n) -> (m, n) bool, False for the int(sparsity * n) smallest scores of each row.
    """
    # A product such as 0.29 * 100 = 28.999... must not be rounded down to 28.
    n_zeros = int(sparsity * score.size(1) + 1e-6)
    smallest = score.topk(n_zeros, dim=1, largest=False, sorted=False).indices
    return torch.ones_like(score, dtype=torch.bool).scatter(1, smallest, False)


def keep_two_of_four(score):
    """The larger two scores of each four neighbours in a row stay: score (m, n) -> (m, n) bool."""
    m, n = score.shape
    return keep_of_rows(score.reshape(m * n // 4, 4), 0.5).view(m, n)


def wanda_score(W, norm):
    """|W_ij| * ||X_j|| (Sun et al. 2023, eq. 1): W (m, n), norm (n,) -> (m, n)."""
    return W.abs() * norm


def inverse_factor(gram, damping=0.01):
    """The upper triangular U (n, n) with U^T U = H^-1, where H is the damped gram matrix (n, n).

    damping is a share of the mean of the diagonal. It is added to the diagonal, so that H can be
    inverted although the text may have fewer tokens than a matrix has inputs.
    """
    diagonal = gram.diagonal()
    H = gram + torch.diag((damping * diagonal.mean()).expand(len(gram)))
    H_inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return torch.linalg.cholesky(H_inverse, upper=True)


def sparsegpt(W, gram, sparsity, width=128):
    """SparseGPT (Frantar & Alistarh 2023, algorithm 1): W (m, n), gram (n, n) = sum x x^T -> the
    pruned W, a new tensor. sparsity is a share or "2:4". Weights are chosen for `width` columns at
    a time, which are 4 for 2:4.

    Let w be a weight that becomes zero. The other weights of its row that are still free can change
    so that the outputs on the calibration text change as little as possible. The solution of this
    least-squares problem (Hassibi & Stork 1993, "Optimal brain surgeon", eq. 5) has the row change
    by -w / (H^-1)_jj times row j of H^-1, and the squared error grows by w^2 / (H^-1)_jj. So this
    is the score of a weight. Only the weights to the right of column j are still free. Then H^-1 is
    the inverse of the rest of H, whose row is U_jj U[j, j:] and whose corner is U_jj^2.
    """
    W = W.clone()
    U = inverse_factor(gram)
    if sparsity == TWO_OF_FOUR:
        width = 4

    for start in range(0, W.size(1), width):
        end = min(start + width, W.size(1))
        w = W[:, start:end].clone()  # (m, width)
        u = U[start:end, start:end]

        # Choose by the weights as they are now, after all updates from the left.
        score = w.square() / u.diagonal().square()
        if sparsity == TWO_OF_FOUR:
            keep = keep_two_of_four(score)
        else:
            keep = keep_of_matrix(score, sparsity)

        # Within these columns every zero changes the columns to its right at once.
        errors = torch.zeros_like(w)
        for j in range(end - start):
            errors[:, j] = w[:, j].masked_fill(keep[:, j], 0) / u[j, j]
            w[:, j:] -= errors[:, j, None] * u[j, j:]
        W[:, start:end] = w.masked_fill(~keep, 0)

        # The columns behind them get all updates in one product.
        W[:, end:] -= errors @ U[start:end, end:]
    return W


def prune(W, statistics, method, sparsity):
    """One matrix W (m, n) with the InputStatistics of its inputs -> the pruned W, a new tensor.
    statistics may be None for magnitudes. sparsity is a share or "2:4"."""
    if method == "sparsegpt":
        return sparsegpt(W, statistics.gram, sparsity)

    score = W.abs()
    if method == "wanda":
        score = wanda_score(W, statistics.norm)

    # Four neighbours are in the same row, so for 2:4 the two magnitudes are the same.
    if sparsity == TWO_OF_FOUR:
        keep = keep_two_of_four(score)
    elif method == "magnitude":
        keep = keep_of_matrix(score, sparsity)
    else:
        keep = keep_of_rows(score, sparsity)
    return W.masked_fill(~keep, 0)


# models -------------------------------------------------------------------------------------------


@torch.no_grad()
def prune_model(model, statistics, method, sparsity):
    """Prunes all matrices of the blocks in place. statistics is {name: InputStatistics}."""
    for name, linear in matrices(model).items():
        linear.weight.copy_(prune(linear.weight, statistics.get(name), method, sparsity))


@torch.no_grad()
def prune_in_order(model, rows, method, sparsity):
    """Prunes block after block in place, as the code of Wanda and SparseGPT does. What flows into
    a block is computed by the blocks before it, which are already pruned. So a block can make up
    for the errors of those before it, and its statistics are about inputs that it will really get.
    """
    x = model.wte(rows.idx.to(model.wte.weight.device))  # (N, T, C)
    counts = rows.targets.to(x.device) >= 0  # (N, T), padding does not count
    mask, cos, sin = model.positions(x.size(1), None, x.device)

    for block in model.h:
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        statistics = []
        hooks = []
        for linear in linears:
            watched = InputStatistics(linear.in_features, x.device)
            statistics.append(watched)
            hooks.append(linear.register_forward_pre_hook(watcher(watched, counts)))

        # once to watch, with the weights as they are, and once more with the pruned ones
        block(x, mask, cos, sin, None)
        for linear, watched, hook in zip(linears, statistics, hooks):
            hook.remove()
            linear.weight.copy_(prune(linear.weight, watched, method, sparsity))
        x = block(x, mask, cos, sin, None)


def watcher(statistics, counts):
    """A hook that adds the inputs of a matrix, where counts (N, T) is true, to its statistics."""

    def hook(module, inputs):
        statistics.add(inputs[0][counts])

    return hook


def weights_of(model):
    """A copy of the matrices of the blocks -> {name: (m, n)}."""
    return {name: linear.weight.detach().clone() for name, linear in matrices(model).items()}


@torch.no_grad()
def restore(model, weights):
    """Puts back what weights_of has copied."""
    for name, linear in matrices(model).items():
        linear.weight.copy_(weights[name])


def share_of_zeros(model):
    """The share of zeros in the matrices of the blocks."""
    weights = [linear.weight for linear in matrices(model).values()]
    zeros = sum((weight == 0).sum().item() for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


# what a zero is worth -----------------------------------------------------------------------------


class Bitmap(NamedTuple):
    """A matrix without its zeros."""

    bits: torch.Tensor  # (m * n / 8,) bytes; bit i says whether weight i is there
    values: torch.Tensor  # the weights that are there, row by row


def pack_bitmap(W):
    """W (m, n) -> Bitmap. The size m * n must be divisible by 8."""
    there = (W != 0).flatten()
    powers = 2 ** torch.arange(8, device=W.device)
    bits = (there.view(-1, 8) * powers).sum(dim=1).to(torch.uint8)
    return Bitmap(bits, W.flatten()[there])


def unpack_bitmap(bitmap, shape):
    """Bitmap -> W of this shape."""
    powers = 2 ** torch.arange(8, device=bitmap.bits.device)
    there = (bitmap.bits[:, None] & powers != 0).flatten()
    W = torch.zeros(there.shape, dtype=bitmap.values.dtype, device=there.device)
    W[there] = bitmap.values
    return W.view(shape)


def bits_per_weight(bitmap, value_bits):
    """The effective bits per weight, if each value takes value_bits."""
    n_bits = 8 * bitmap.bits.numel()
    return (n_bits + value_bits * bitmap.values.numel()) / n_bits


def time_products(weights, x, repeats):
    """The processor time of y = W x for a list of weights (m, n) and their inputs -> {label:
    {"time": as a multiple of the dense one, "memory": likewise}}.

    x is {n: (n, 1)}. Magnitude chooses the zeros. Zeros in a dense matrix are compared with the CSR
    format, which stores only the other weights, each with its column. The variants take turns, and
    the medians of the ratios are taken, so that other programs disturb all of them alike.
    """
    variants = {"dense": weights}
    for sparsity in (0.5, 0.9):
        zeros = [prune(W, None, "magnitude", sparsity) for W in weights]
        variants[f"{sparsity:.0%} zeros, dense"] = zeros
        variants[f"{sparsity:.0%} zeros, CSR"] = [compressed_rows(W) for W in zeros]

    seconds = {label: [] for label in variants}
    for repeat in range(repeats + 1):
        for label, variant in variants.items():
            start = time.process_time()
            for W in variant:
                W @ x[W.shape[1]]
            seconds[label].append(time.process_time() - start)

    result = {}
    dense_bytes = sum(n_bytes(W) for W in variants["dense"])
    for label, variant in variants.items():
        # the first turn warms the caches up and does not count
        ratios = [a / b for a, b in zip(seconds[label][1:], seconds["dense"][1:])]
        memory = sum(n_bytes(W) for W in variant) / dense_bytes
        result[label] = {"time": median(ratios), "memory": memory}
    return result


def compressed_rows(W):
    """W (m, n) in the CSR format, with indices of 4 bytes."""
    # PyTorch warns that sparse matrices may still change, and that it does not check indices.
    warnings.filterwarnings("ignore", message="Sparse")
    csr = W.to_sparse_csr()
    rows, columns = csr.crow_indices().int(), csr.col_indices().int()
    return torch.sparse_csr_tensor(rows, columns, csr.values(), size=W.shape)


def n_bytes(W):
    """The bytes of a matrix, dense or in the CSR format."""
    if W.layout == torch.strided:
        parts = [W]
    else:
        parts = [W.crow_indices(), W.col_indices(), W.values()]
    return sum(part.numel() * part.element_size() for part in parts)


# the experiment -----------------------------------------------------------------------------------


def draw_rows(rows, draw, draws):
    """Every draws-th row, from row number draw on -> Rows. bytes stays that of all rows."""
    return Rows(rows.idx[draw::draws], rows.targets[draw::draws], rows.bytes)


def as_sparsity(text):
    """A word of --sparsity -> a share or "2:4"."""
    return text if text == TWO_OF_FOUR else float(text)


@torch.no_grad()
def output_energy(weights, statistics):
    """{name: |W X|^2}, the squared outputs on the calibration text, of weights {name: (m, n)}."""
    energy = {}
    for name, W in weights.items():
        energy[name] = ((W @ statistics[name].gram) * W).sum().item()
    return energy


def output_error(weights, pruned, statistics, energy):
    """The mean over the matrices of |(W - W') X|^2 / |W X|^2, with the inputs X of the dense
    model. weights and pruned are {name: (m, n)}, and energy is that of weights."""
    difference = {name: W - pruned[name] for name, W in weights.items()}
    lost = output_energy(difference, statistics)
    shares = [lost[name] / energy[name] for name in weights]
    return sum(shares) / len(shares)


def examine(name, cfg, device):
    """Prunes one model with all methods and sparsities -> a dict for the JSON file."""
    model, tok = load_model(name, device)
    for matrix, linear in matrices(model).items():
        if linear.in_features % 4 > 0:
            fail(f"{matrix} has {linear.in_features} inputs: 2:4 needs a multiple of 4")

    factor = BASE_ROWS if name == "base" else 1
    n_calibration = factor * cfg.rows * cfg.draws
    n_held_out = factor * cfg.held_out
    texts = load_texts(name, model, tok, cfg.block_size, n_calibration, n_held_out)
    if len(texts.calibration.idx) < cfg.draws:
        fail(f"--draws={cfg.draws} needs as many rows, the text has {len(texts.calibration.idx)}")

    # the dense model
    dense = mean_loss(model, texts.held_out)
    weights = weights_of(model)
    n_tokens = (texts.held_out.targets >= 0).sum().item()
    print(f"\n{name}: {n_tokens:,} held-out tokens, dense {dense:.4f} nats per token")
    if texts.entropy is not None:
        print(f"    the true entropy is {texts.entropy:.4f}")

    settings = []
    for draw in range(cfg.draws):
        rows = draw_rows(texts.calibration, draw, cfg.draws)
        statistics = watch_inputs(model, rows)
        energy = output_energy(weights, statistics)
        for method in cfg.method.split(","):
            # a method that does not look at the calibration text has the same result every time
            if draw > 0 and method not in CALIBRATED:
                continue

            for text in cfg.sparsity.split(","):
                start = time.process_time()
                if cfg.in_order:
                    prune_in_order(model, rows, method, as_sparsity(text))
                else:
                    prune_model(model, statistics, method, as_sparsity(text))
                seconds = time.process_time() - start

                setting = {"method": method, "sparsity": text, "draw": draw, "seconds": seconds}
                setting["nats"] = mean_loss(model, texts.held_out)
                setting["zeros"] = share_of_zeros(model)
                setting["error"] = output_error(weights, weights_of(model), statistics, energy)
                print_setting(setting)
                settings.append(setting)
                restore(model, weights)

    return {
        "dense": dense,
        "entropy": texts.entropy,
        "tokens": n_tokens,
        "settings": settings,
        "worth": examine_worth(list(weights.values()), cfg.repeats),
        "loudest": loudest_channels(statistics),
    }


def print_setting(setting):
    """One line for one pruned model."""
    print(
        f"    {setting['method']:13}  {setting['sparsity']:>4}  draw {setting['draw']}  "
        f"{setting['nats']:.4f} nats  error {setting['error']:.4f}  "
        f"{setting['zeros']:.3f} zeros  {setting['seconds']:.1f} s",
        flush=True,
    )


def loudest_channels(statistics):
    """How much louder is the loudest input channel of a matrix than the median one? -> {name:
    ratio of the norms}"""
    ratios = {}
    for name, watched in statistics.items():
        ratios[name] = (watched.norm.max() / watched.norm.median()).item()
    return ratios


def examine_worth(weights, repeats):
    """What zeros save in time and memory, for up to 60 matrices of the model."""
    chosen = [W.cpu() for W in weights[:60]]
    generator = torch.Generator().manual_seed(0)
    x = {W.size(1): torch.randn(W.size(1), 1, generator=generator) for W in chosen}
    worth = {"products": time_products(chosen, x, repeats)}

    # a bitmap beside 16-bit and 4-bit values
    for pattern in ("0.5", TWO_OF_FOUR):
        bitmap = pack_bitmap(prune(chosen[0], None, "magnitude", as_sparsity(pattern)))
        bits = {value_bits: bits_per_weight(bitmap, value_bits) for value_bits in (16, 4)}
        worth[f"bits, {pattern}"] = bits
    return worth


# what came out ------------------------------------------------------------------------------------


def nats_of(result, method, text):
    """The nats per token of a method at a sparsity, one number for each draw."""
    found = []
    for setting in result["settings"]:
        if setting["method"] == method and setting["sparsity"] == text:
            found.append(setting["nats"])
    return found


def range_text(values):
    """ "0.512", or "0.512 to 0.517" if there are several draws."""
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def print_table(result, cfg):
    """Nats per token: a row for each method, a column for each sparsity."""
    words = cfg.sparsity.split(",")
    print(f"\n    {'zeros':13}" + "".join(f"{text:>18}" for text in words))
    for method in cfg.method.split(","):
        cells = [f"{range_text(nats_of(result, method, text)):>18}" for text in words]
        print(f"    {method:13}" + "".join(cells))


def print_worth(result):
    """What the zeros save."""
    print("\n    time and memory of the matrix products of one token, dense = 1")
    for label, ratios in result["worth"]["products"].items():
        print(f"    {label:18} time {ratios['time']:.2f}  memory {ratios['memory']:.2f}")


def finding(results, cfg):
    """The title of the figure: the best and the worst method with half of the weights zero."""
    shares = [text for text in cfg.sparsity.split(",") if text != TWO_OF_FOUR]
    text = min(shares, key=lambda share: abs(float(share) - 0.5)) if shares else TWO_OF_FOUR
    lines = []
    for name, result in results.items():
        means = {}
        for method in cfg.method.split(","):
            nats = nats_of(result, method, text)
            means[method] = sum(nats) / len(nats) - result["dense"]
        best = min(means, key=means.get)
        worst = max(means, key=means.get)
        line = f"{Path(name).stem}: {best} {means[best]:+.3f}"
        if worst != best:
            line += f", {worst} {means[worst]:+.3f}"
        lines.append(line)
    zeros = text if text == TWO_OF_FOUR else f"{float(text):.0%}"
    return f"Nats per token that {zeros} zeros cost\n" + "\n".join(lines)


def draw_curves(title, results, cfg, path):
    """One panel for each model: nats per token over the share of zeros. 2:4 is drawn at 0.5."""
    fig, axes = figure(title, "share of zeros", "nats per token", columns=len(results))
    shares = [text for text in cfg.sparsity.split(",") if text != TWO_OF_FOUR]
    shares.sort(key=float)
    has_two_of_four = TWO_OF_FOUR in cfg.sparsity.split(",")

    for ax, (name, result) in zip([axes] if len(results) == 1 else axes, results.items()):
        for method, marker in zip(cfg.method.split(","), "osD^"):
            columns = [nats_of(result, method, text) for text in shares]
            means = [sum(column) / len(column) for column in columns]
            x = [0.0, *[float(text) for text in shares]]
            [line] = ax.plot(x, [result["dense"], *means], marker=marker, label=method)
            if has_two_of_four:
                nats = nats_of(result, method, TWO_OF_FOUR)
                style = {"color": line.get_color(), "marker": marker, "markerfacecolor": "white"}
                ax.plot([0.5], [sum(nats) / len(nats)], linestyle="", markersize=9, **style)

        ax.axhline(result["dense"], color="black", linestyle="--", linewidth=1, label="dense")
        if result["entropy"] is not None:
            ax.axhline(result["entropy"], color="black", linestyle=":", label="true entropy")
        if has_two_of_four:
            style = {"color": "black", "marker": "o", "markerfacecolor": "white", "markersize": 9}
            ax.plot([], [], linestyle="", label="2:4", **style)
        ax.set_title(Path(name).stem, fontsize=11)
        ax.legend(fontsize=9)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    out = output_folder(cfg)

    results = {}
    for name in cfg.model.split(","):
        results[name] = examine(name, cfg, device)
        print_table(results[name], cfg)
        print_worth(results[name])

    title = finding(results, cfg)
    save_metrics(out, name="prune", results=results, finding=title)
    draw_curves(title, results, cfg, out / "prune.png")
