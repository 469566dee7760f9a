"""
Part 4, scaling laws: how does the loss fall with the size of the model and with the amount of
text, and how far can the law be trusted?

    python part_4/demo_scaling.py
    python part_4/demo_scaling.py --seeds=3
    python part_4/demo_scaling.py --sizes=1x24,1x48,2x64,3x80 --lengths=50,100,200,400

The law of Hoffmann et al. (2022, "Training Compute-Optimal Large Language Models", approach 3):

    L(N, D) = E + A / N^alpha + B / D^beta

N is the number of parameters and D the number of tokens seen in training. E is what no model can
get below: the entropy of the text. For real text nobody knows it. Here it is known, so that the
demo can ask of a fit what is never asked: is its E the true one? It also holds the largest runs
out and predicts them from the smaller ones.

N counts the matrices of the blocks and the head, without the embedding. A row of the embedding is
looked up, while each of the other weights is multiplied once per token, so that training costs
6 N D floating point operations (Kaplan et al. 2020, section 2.1), apart from the attention.

Each length is a run of its own, with its own decay of the learning rate. The loss in the middle of
a longer run would be higher, because the rate has not fallen there, and the law would blame that on
the small amount of text (Hoffmann et al. 2022, section 2).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import itertools
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

import train
from model import GPT, GPTConfig
from shared import (
    Log,
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
    set_seed,
)

# The grid of starting points for a fit (Hoffmann et al. 2022, appendix D.4). Their a and b are the
# logarithms of A and B. Here A and B belong to a run of middle size, so that fewer numbers will do.
STARTS = {
    "a": [-4.0, -2.0, 0.0],
    "b": [-4.0, -2.0, 0.0],
    "e": [-4.0, -2.5, -1.0],
    "alpha": [0.2, 0.5, 1.0, 2.0],
    "beta": [0.2, 0.5, 1.0, 2.0],
}
DESCENTS = 8  # starting points, the best of the grid, from which L-BFGS descends
HUBER = 1e-3  # where the loss of the fit becomes linear, in units of log L


@dataclass
class Config:
    sizes: str = "1x24,1x40,2x48,2x64,3x80"  # models as layers x channels, with commas
    lengths: str = "60,120,240,480"  # optimizer steps of the runs, with commas between them
    batch_size: int = 16  # sequences per step
    draws: int = 40  # bootstrap samples for the error bars
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script


def parse_sizes(text):
    """ "1x24,2x48" -> [(1, 24), (2, 48)]. Stops with an error unless there are at least four
    different models of at least one layer and one channel."""
    sizes = []
    for word in text.split(","):
        match = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,4})", word)
        if not match:
            fail(f"--sizes={text} must be layers x channels with commas between, such as 1x24,2x48")
        sizes.append((int(match[1]), int(match[2])))
    if len(set(sizes)) < 4:  # without the largest, there must be runs enough for a fit
        fail(f"--sizes={text} must have at least four different models")
    return list(dict.fromkeys(sizes))


def parse_lengths(text):
    """ "200,50,100" -> [50, 100, 200]. Stops with an error unless there are at least four
    different numbers of steps."""
    words = text.split(",")
    if not all(word.isdigit() and 1 <= int(word) <= 10**6 for word in words):
        fail(f"--lengths={text} must be positive numbers of steps with commas between them")
    lengths = sorted({int(word) for word in words})
    if len(lengths) < 4:
        fail(f"--lengths={text} must have at least four different lengths")
    return lengths


# the runs -----------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One trained model."""

    N: int  # parameters that are multiplied
    D: int  # tokens seen in training
    loss: float  # nats per byte of validation text
    seed: int


def count_parameters(model):
    """The weights that each token is multiplied by: all matrices but the embedding."""
    total = 0
    for name, p in model.named_parameters():
        if p.ndim == 2 and not name.startswith("wte."):
            total += p.numel()
    return total


def train_model(data, gpt_cfg, cfg, device):
    """Trains a model with train.py's recipe, its whole schedule in cfg.steps -> Run. cfg is a
    config of train.py."""
    torch.manual_seed(cfg.seed)
    model = GPT(gpt_cfg).to(device)
    optimizers = train.make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    for step in range(cfg.steps):
        train.set_lr(optimizers, train.lr_scale(step, cfg))
        x, y = train.get_batch(data.train_ids, data.starts, step, cfg, gpt_cfg.block_size)
        train.backward(model, x.to(device), y.to(device), cfg, nullcontext, scaler)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    val = train.evaluate(model, data.val_ids, data.edges, data.val_bytes, device, nullcontext)
    D = cfg.steps * cfg.batch_size * gpt_cfg.block_size
    return Run(count_parameters(model), D, val.loss, cfg.seed)


# the law ------------------------------------------------------------------------------------------


class Law(NamedTuple):
    """L(N, D) = E + A (N0 / N)^alpha + B (D0 / D)^beta, in nats per byte.

    This is the law of Hoffmann et al. with other units: N0 and D0 are a run in the middle of those
    that the law was fitted to, so that A and B say what each term costs there.
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    N0: float
    D0: float

    def loss(self, N, D):
        """The predicted loss in nats per byte."""
        return self.E + self.A * (self.N0 / N) ** self.alpha + self.B * (self.D0 / D) ** self.beta

    def best_size(self, C):
        """The N with the lowest loss among all runs of C = 6 N D operations (Hoffmann et al. 2022,
        eq. 4). There, a larger model would gain what the lack of tokens would lose."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        balance = ratio ** (1 / (self.alpha + self.beta))
        relative_c = C / (6 * self.N0 * self.D0)
        return self.N0 * balance * relative_c ** self.size_exponent()

    def size_exponent(self):
        """The best size grows with C to this power."""
        return self.beta / (self.alpha + self.beta)


def log_law(point, log_n, log_d):
    """The logarithm of the law, as in Hoffmann et al. (2022, eq. 3).

    point (..., 5) holds a, b, e, alpha and beta, with A = exp(a), B = exp(b) and E = exp(e), which
    keeps these three positive. log_n and log_d (runs,) are the logarithms of N / N0 and D / D0
    -> (..., runs).
    """
    a, b, e, alpha, beta = point[..., None].unbind(dim=-2)  # (..., 1) each
    terms = [a - alpha * log_n, b - beta * log_d, e.expand_as(alpha * log_n)]
    return torch.logsumexp(torch.stack(terms), dim=0)


def fit_error(point, log_n, log_d, log_loss, weight):
    """The weighted sum over the runs of the Huber loss of log L (Hoffmann et al. 2022, eq. 3).

    It must be a sum: a mean is so small that L-BFGS takes it for converged (Besiroglu et al. 2024,
    "Chinchilla Scaling: A replication attempt").
    """
    predicted = log_law(point, log_n, log_d)
    target = log_loss.expand_as(predicted)
    errors = F.huber_loss(predicted, target, delta=HUBER, reduction="none")
    return (weight * errors).sum(dim=-1)


def descend(start, free, log_n, log_d, log_loss, weight):
    """L-BFGS from one starting point (5,) -> the point it ends at, and its error. Only the
    coordinates where `free` (5,) is true move."""
    start = start.clone()
    moving = start[free].clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [moving], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def current_point():
        return start.masked_scatter(free, moving)

    def closure():
        optimizer.zero_grad()
        # The factor makes the numbers large enough for L-BFGS's tolerances.
        error = fit_error(current_point(), log_n, log_d, log_loss, weight) / HUBER
        error.backward()
        return error

    optimizer.step(closure)
    point = current_point().detach()
    return point, fit_error(point, log_n, log_d, log_loss, weight).item()


def fit(runs, E=None, weight=None, starts=None):
    """Fits the law to a list of Runs -> (Law, point). With E, that is fixed and only the other four
    numbers are fitted.

    weight: how often each run counts; starts: points to descend from instead of the grid's best.
    """
    log_n = torch.tensor([math.log(run.N) for run in runs]).double()
    log_d = torch.tensor([math.log(run.D) for run in runs]).double()
    log_loss = torch.tensor([math.log(run.loss) for run in runs]).double()
    mean_n = log_n.mean()
    mean_d = log_d.mean()
    if weight is None:
        weight = torch.ones(len(runs))
    problem = (log_n - mean_n, log_d - mean_d, log_loss, weight.double())

    # Look at all points of the grid, and descend from the best.
    free = torch.tensor([True] * 5)
    if starts is None:
        grid = torch.tensor(list(itertools.product(*STARTS.values()))).double()  # (points, 5)
        if E is not None:
            grid[:, 2] = math.log(E)
        order = fit_error(grid, *problem).argsort()
        starts = grid[order].unique_consecutive(dim=0)[:DESCENTS]
    if E is not None:
        free[2] = False
    ends = [descend(start, free, *problem) for start in starts]
    point, _ = min(ends, key=lambda end: end[1])

    a, b, e, alpha, beta = point.tolist()
    law = Law(
        E=math.exp(e),
        A=math.exp(a),
        alpha=alpha,
        B=math.exp(b),
        beta=beta,
        N0=mean_n.exp().item(),
        D0=mean_d.exp().item(),
    )
    return law, point


def bootstrap(runs, point, draws, seed, E=None):
    """Fits the law to `draws` samples of the runs, drawn with replacement -> a list of Laws. Their
    spread says how much the fit depends on which runs were made (Efron 1979)."""
    generator = torch.Generator().manual_seed(seed)
    laws = []
    for _ in range(draws):
        drawn = torch.randint(len(runs), (len(runs),), generator=generator)
        weight = drawn.bincount(minlength=len(runs))
        law, _ = fit(runs, E, weight, starts=[point])
        laws.append(law)
    return laws


def interval(values):
    """The range of the middle 90 % of the values -> (lowest, highest)."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.quantile(0.05).item(), values.quantile(0.95).item()


def hold_out(runs):
    """Splits runs into those of the smaller models and lengths, and those of the largest."""
    largest_n = max(run.N for run in runs)
    largest_d = max(run.D for run in runs)
    small = []
    large = []
    for run in runs:
        is_large = run.N == largest_n or run.D == largest_d
        (large if is_large else small).append(run)
    return small, large


class Fit(NamedTuple):
    """A law, how sure it is of itself, and what it says of the runs that were held out."""

    law: Law
    draws: list  # the Laws of the bootstrap
    errors: list  # measured minus predicted loss of each held-out run, in nats per byte
    low: list  # the range of the errors if the bootstrap's laws were to predict
    high: list


def examine(runs, held_out, cfg, E=None):
    """Fits the law to the runs and predicts those that were held out -> Fit."""
    law, point = fit(runs, E)
    draws = bootstrap(runs, point, cfg.draws, cfg.seed, E)
    errors = []
    low = []
    high = []
    for run in held_out:
        errors.append(run.loss - law.loss(run.N, run.D))
        lowest, highest = interval([run.loss - each.loss(run.N, run.D) for each in draws])
        low.append(lowest)
        high.append(highest)
    return Fit(law, draws, errors, low, high)


def misses(found):
    """How many of the held-out runs are outside of the fit's error bars."""
    outside = 0
    for lowest, highest in zip(found.low, found.high):
        outside += not lowest <= 0 <= highest
    return outside


def typical_error(errors):
    """The root mean square of errors."""
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


# figures ------------------------------------------------------------------------------------------


def amount(number):
    """33792 -> "34k", 1234567 -> "1.2M": a number of parameters or tokens for a label."""
    if number >= 1e6:
        return f"{number / 1e6:.1f}M"
    return f"{number / 1e3:.0f}k"


def sizes_of(runs):
    """The different numbers of parameters, from small to large."""
    return sorted({run.N for run in runs})


def draw_law(title, runs, law, true_entropy, path):
    """Above: loss against tokens, for each size. Below: loss against computation, and the lowest
    loss that the law gives for each amount of it."""
    fig, (above, below) = figure(title, rows=2, height=9)
    lengths = sorted({run.D for run in runs})
    tokens = torch.logspace(math.log10(lengths[0]), math.log10(lengths[-1]), 50).tolist()

    for i, N in enumerate(sizes_of(runs)):
        of_size = [run for run in runs if run.N == N]
        measured = [run.loss for run in of_size]
        predicted = [law.loss(N, D) for D in tokens]
        (line,) = above.plot([run.D for run in of_size], measured, "o", label=f"N = {amount(N)}")
        above.plot(tokens, predicted, color=line.get_color())
        below.plot([6 * run.N * run.D for run in of_size], measured, "o")
    above.plot([], [], color="gray", label="the fitted law")

    # The frontier: the law's best size for each amount of computation
    operations = [6 * run.N * run.D for run in runs]
    steps = torch.logspace(math.log10(min(operations)), math.log10(max(operations)), 50).tolist()
    lowest = []
    for C in steps:
        N = law.best_size(C)
        lowest.append(law.loss(N, C / (6 * N)))
    below.plot(steps, lowest, color="black", label="the law's best size for each C")

    for ax in (above, below):
        ax.axhline(true_entropy, color="gray", linestyle="--", label="true entropy of the world")
        ax.set(xscale="log", yscale="log", ylabel="validation loss, nats per byte")
        ticks = [0.1, 0.2, 0.4, 0.8]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.legend(fontsize=9)
    above.set_xticks(lengths, [amount(D) for D in lengths])
    above.set_xlabel("D, tokens seen in training")
    below.set_xlabel("C = 6 N D, floating point operations of training")
    save_figure(fig, path)


def draw_trust(title, fits, held_out, true_entropy, path):
    """Above: measured minus predicted loss of the runs that were held out. Below: each fit's E.

    fits: {name: Fit}; those that predict nothing have no errors and stand below only.
    """
    fig, (above, below) = figure(title, rows=2, height=8)
    # Runs that differ in their seed alone stand at one place.
    names = list(dict.fromkeys(f"{amount(run.N)}\n{amount(run.D)}" for run in held_out))
    width = 0.2
    predicting = [name for name in fits if fits[name].errors]
    for i, name in enumerate(predicting):
        found = fits[name]
        shift = (i - 0.5 * (len(predicting) - 1)) * width
        places = []
        for run in held_out:
            places.append(names.index(f"{amount(run.N)}\n{amount(run.D)}") + shift)
        above.vlines(places, found.low, found.high, color=f"C{i}", linewidth=3, alpha=0.5)
        above.plot(places, found.errors, "o", color=f"C{i}", label=name)
    above.axhline(0, color="gray", linestyle="--", label="predicted exactly")
    above.set_xticks(range(len(names)), names, fontsize=9)
    above.set_xlabel("held-out run: N and D")
    above.set_ylabel("measured - predicted,\nnats per byte")
    above.legend(fontsize=9)

    free = [name for name in fits if "free" in name]
    for i, name in enumerate(free):
        colour = f"C{list(fits).index(name)}"
        lowest, highest = interval([law.E for law in fits[name].draws])
        below.hlines(i, lowest, highest, color=colour, linewidth=3, alpha=0.5)
        below.plot(fits[name].law.E, i, "o", color=colour)
    below.axvline(true_entropy, color="gray", linestyle="--", label="true entropy of the world")
    below.set_yticks(range(len(free)), free)
    below.set_ylim(-0.7, len(free) - 0.3)
    below.set_xlabel("E of the fit, nats per byte; lines: 90 % of the bootstrap")
    below.legend(fontsize=9)
    save_figure(fig, path)


def entropy_title(law, draws, true_entropy, residual):
    """What the fit says of the entropy, whether that is true, and how well the law describes the
    runs that it was fitted to. residual: the root mean square of what it misses them by."""
    lowest, highest = interval([each.E for each in draws])
    verdict = "does not contain" if not lowest <= true_entropy <= highest else "contains"
    return (
        f"The fit's E is {law.E:.3f} nats per byte, and its error bar, {lowest:.3f} to "
        f"{highest:.3f},\n{verdict} the true entropy, {true_entropy:.3f}. "
        f"The law misses its own runs by {residual:.3f}"
    )


def trust_title(free, fixed):
    """How well the two fits predict the runs that were held out."""
    parts = []
    for name, found in (("E free", free), ("E fixed at the truth", fixed)):
        parts.append(
            f"{name}: {typical_error(found.errors):.3f} nats per byte off, "
            f"{misses(found)} of {len(found.errors)} outside of its error bar"
        )
    return "The largest runs, predicted from the smaller ones\n" + "\n".join(parts)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    sizes = parse_sizes(cfg.sizes)
    lengths = parse_lengths(cfg.lengths)
    recipe = train.Config(batch_size=cfg.batch_size)

    # All models have heads of 32 channels: narrower ones learn to copy from the brief much later.
    gpt_cfg = GPTConfig(vocab_size=1024, block_size=72, n_head=2, n_kv_head=1, head_dim=32)
    data = train.load_data(recipe, gpt_cfg)
    out = output_folder(cfg)

    # Train every size with every length and every seed.
    runs = []
    arms = list(itertools.product(range(cfg.seeds), sizes, lengths))
    log = Log(out, len(arms), name="demo_scaling")
    for i, (j, (n_layer, n_embd), steps) in enumerate(arms):
        arm_gpt_cfg = replace(gpt_cfg, n_layer=n_layer, n_embd=n_embd, mlp_dim=0)
        arm_cfg = replace(recipe, steps=steps, seed=cfg.seed + j)
        run = train_model(data, arm_gpt_cfg, arm_cfg, device)
        runs.append(run)
        log(i, seed=run.seed, N=run.N, D=run.D, val_loss=run.loss)

    # Fit the law to all runs: is its E the true entropy?
    small, held_out = hold_out(runs)
    print(f"fitting the law, with {cfg.draws} bootstrap samples for each error bar", flush=True)
    everything = examine(runs, [], cfg)
    everything_fixed = examine(runs, [], cfg, E=data.entropy)

    # Fit it to the small runs, and predict the largest.
    free = examine(small, held_out, cfg)
    fixed = examine(small, held_out, cfg, E=data.entropy)
    fits = {
        f"{len(small)} smaller runs, E free": free,
        f"{len(small)} smaller runs, E fixed": fixed,
        f"all {len(runs)} runs, E free": everything,
        f"all {len(runs)} runs, E fixed": everything_fixed,
    }
    exponents = {}
    for name, found in fits.items():
        law = found.law
        exponents[name] = law.size_exponent()
        ranges = {}
        for field in ("E", "alpha", "beta"):
            lowest, highest = interval([getattr(each, field) for each in found.draws])
            ranges[field] = f"{getattr(law, field):.3f} ({lowest:.3f} to {highest:.3f})"
        lowest, highest = interval([each.size_exponent() for each in found.draws])
        print(
            f"{name:26}  E {ranges['E']}, alpha {ranges['alpha']}, beta {ranges['beta']}, "
            f"best N grows as C^{exponents[name]:.2f} ({lowest:.2f} to {highest:.2f})"
        )
    residual = typical_error([run.loss - everything.law.loss(run.N, run.D) for run in runs])
    title = entropy_title(everything.law, everything.draws, data.entropy, residual)
    print(title)
    draw_law(title, runs, everything.law, data.entropy, out / "demo_scaling.png")
    title = trust_title(free, fixed)
    print(title)
    draw_trust(title, fits, held_out, data.entropy, out / "demo_scaling_trust.png")

    save_metrics(
        out,
        name="demo_scaling",
        true_nats_per_byte=data.entropy,
        runs=[run._asdict() for run in runs],
        held_out=[run._asdict() for run in held_out],
        laws={name: found.law._asdict() for name, found in fits.items()},
        intervals={name: interval([law.E for law in found.draws]) for name, found in fits.items()},
        best_size_exponent=exponents,
        errors={name: found.errors for name, found in fits.items()},
        errors_low={name: found.low for name, found in fits.items()},
        errors_high={name: found.high for name, found in fits.items()},
        outside={name: misses(found) for name, found in fits.items()},
        residual=residual,
        seed=cfg.seed,
        seeds=cfg.seeds,
    )
