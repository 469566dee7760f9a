"""
Part 1, heads: how are channels split into heads and joined again, and what does the model lose
without a head?

    python part_1/demo_heads.py

Many heads cost no more than one. The C channels of q, k and v are cut into H pieces of D = C / H,
each piece attends on its own, and the pieces stand side by side again (Vaswani et al. 2017, section
3.2.2). What is one head worth? In the model that train.py has trained, the D channels of a head are
set to 0 before c_proj, and the letters that are still right are counted. Michel et al. (2019,
section 3.2) do this to large models.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import GPTConfig, attention, causal_mask
from shared import (
    fail,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    require,
    save_figure,
    save_metrics,
)
from train import GPT, get_batch


@dataclass
class Config:
    init: str = "part_1/out/gpt.pt"  # checkpoint of part_1/train.py
    batch_size: int = 1000  # words, none of which was trained on
    threads: int = 1  # CPU threads; more are no faster with matrices as small as these
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.threads > 0, f"threads={self.threads} must be at least 1"
        assert self.batch_size > 1, f"batch_size={self.batch_size} must be at least 2"


def load_model(cfg, path, device):
    """The trained model and its GPTConfig."""
    saved = load_checkpoint(path, "gpt")
    if "positions" not in saved:
        fail(f"--init={cfg.init} must be a checkpoint of part_1/train.py")
    gpt_cfg = GPTConfig(**saved["gpt_config"])
    model = GPT(gpt_cfg, saved["positions"]).to(device)
    model.load_state_dict(saved["weights"])
    return model, gpt_cfg


# split, attend, join ------------------------------------------------------------------------------


class Step(NamedTuple):
    """One step of Attention.forward."""

    name: str  # what is done
    layout: str  # one letter for each dimension of the tensor, such as BTHD
    tensor: torch.Tensor  # what comes out


def trace(attn, x, mask):
    """Attention.forward, one operation at a time: x (B, T, C) -> a list of Steps."""
    B, T, C = x.shape
    H = attn.n_head

    q = attn.c_q(x)  # (B, T, C)
    q_pieces = q.view(B, T, H, C // H)  # (B, T, H, D)
    q_heads = q_pieces.transpose(1, 2)  # (B, H, T, D)
    k_heads = attn.c_k(x).view(B, T, H, C // H).transpose(1, 2)  # (B, H, T, D)
    v_heads = attn.c_v(x).view(B, T, H, C // H).transpose(1, 2)  # (B, H, T, D)

    y, weights = attention(q_heads, k_heads, v_heads, mask)
    y_pieces = y.transpose(1, 2)  # (B, T, H, D)
    joined = y_pieces.reshape(B, T, C)
    return [
        Step("x: the stream", "BTC", x),
        Step("c_q: q (k and v likewise)", "BTC", q),
        Step("view: cut C into H pieces", "BTHD", q_pieces),
        Step("transpose: heads before tokens", "BHTD", q_heads),
        Step("softmax(q k^T / sqrt(D))", "BHTS", weights),
        Step("weights @ v", "BHTD", y),
        Step("transpose back", "BTHD", y_pieces),
        Step("reshape: side by side", "BTC", joined),
        Step("c_proj: mix the heads", "BTC", attn.c_proj(joined)),
    ]


def attend_head_by_head(attn, x, mask):
    """The same without view and transpose: each head alone with its own rows of the weights, and
    all results put side by side. x (B, T, C) -> (B, T, C)"""
    D = x.size(-1) // attn.n_head
    heads = []
    for h in range(attn.n_head):
        rows = slice(h * D, (h + 1) * D)
        q = x @ attn.c_q.weight[rows].T  # (B, T, D)
        k = x @ attn.c_k.weight[rows].T  # (B, T, D)
        v = x @ attn.c_v.weight[rows].T  # (B, T, D)
        y, _ = attention(q, k, v, mask)
        heads.append(y)
    return attn.c_proj(torch.cat(heads, dim=-1))


# silence heads ------------------------------------------------------------------------------------


def silence(head, D):
    """A hook for c_proj that sets the D channels of one head to 0 before they are mixed."""

    def hook(module, inputs):
        (y,) = inputs  # (B, T, C)
        y = y.clone()
        y[..., head * D : (head + 1) * D] = 0
        return (y,)

    return hook


@torch.no_grad()
def correct_letters(model, x, y, silent=()):
    """Which letters are right without the heads in `silent`, which are pairs (layer, head)?

    x (B, T) and y (B, n) are a batch of train.py -> (B, n) bool
    """
    hooks = []
    for layer, head in silent:
        attn = model.h[layer].attn
        D = attn.c_proj.in_features // attn.n_head
        hooks.append(attn.c_proj.register_forward_pre_hook(silence(head, D)))

    n = y.size(1)
    correct = model(x)[:, -n:].argmax(dim=-1) == y

    for hook in hooks:
        hook.remove()
    return correct


class Accuracy(NamedTuple):
    share: float  # share of letters right
    two_errors: float  # twice the standard error of this share


def mean_and_error(correct):
    """correct (B, n) bool -> Accuracy. The error is that of the mean over words, because letters of
    one word go wrong together."""
    words = correct.float().mean(dim=1)  # (B,)
    standard_error = words.std().item() / len(words) ** 0.5
    return Accuracy(words.mean().item(), 2 * standard_error)


def list_cases(layers, heads):
    """Each head alone, all heads of a layer but one, and a whole layer -> {name: silent heads}"""
    cases = {"nothing": []}
    for layer in range(layers):
        for head in range(heads):
            cases[f"layer {layer + 1}, head {head + 1}"] = [(layer, head)]
    for layer in range(layers):
        for head in range(heads):
            others = [(layer, other) for other in range(heads) if other != head]
            cases[f"all of layer {layer + 1} but head {head + 1}"] = others
    for layer in range(layers):
        cases[f"all of layer {layer + 1}"] = [(layer, head) for head in range(heads)]
    return cases


def count_spared(accuracies, cases):
    """The number of heads whose removal alone makes no difference within two standard errors."""
    whole = accuracies["nothing"]
    spared = 0
    for name, accuracy in accuracies.items():
        if name.startswith("layer"):
            difference = abs(accuracy.share - whole.share)
            if difference <= accuracy.two_errors + whole.two_errors:
                spared += 1
    return spared


# draw ---------------------------------------------------------------------------------------------


def as_picture(step):
    """The first sequence of a step as a matrix with a row for each token. Heads stand beside each
    other, with an empty column between them."""
    tensor = step.tensor[0].detach().cpu()
    if tensor.dim() == 2:
        return tensor
    if step.layout[1] == "H":
        tensor = tensor.transpose(0, 1)  # (T, H, D)
    padded = F.pad(tensor, (0, 1), value=float("nan"))  # (T, H, D + 1)
    return padded.flatten(1)[:, :-1]


def draw_shapes(title, steps, path):
    """Each step as a picture, with its shape. A black line stands between two heads."""
    xlabels = {"C": "channel", "D": "head, channel", "S": "head, key"}
    fig, axes = figure(title, rows=3, columns=3, height=8)
    for ax, step in zip(axes.flat, steps):
        picture = as_picture(step)
        largest = step.tensor[0].abs().max().item()
        ax.imshow(
            picture,
            cmap="RdBu",
            vmin=-largest,
            vmax=largest,
            aspect="auto",
            interpolation="nearest",
        )
        layout = ", ".join(step.layout)
        ax.set_title(f"{step.name}\n({layout}) = {tuple(step.tensor.shape)}", fontsize=9)
        ax.set(xlabel=xlabels[step.layout[-1]], ylabel="token")
        ax.set(xticks=[], yticks=[], facecolor="black")
        ax.grid(False)
    save_figure(fig, path)


def draw_ablation(title, accuracies, cases, path):
    """A bar for each case. One colour each for no head, one head and several heads silenced."""
    colours = []
    for name in accuracies:
        silent_heads = min(len(cases[name]), 2)
        colours.append(f"C{silent_heads}")
    shares = [accuracy.share for accuracy in accuracies.values()]
    errors = [accuracy.two_errors for accuracy in accuracies.values()]

    xlabel = "share of letters right, and two standard errors"
    fig, ax = figure(title, xlabel, "silenced heads", height=7)
    ax.barh(list(accuracies), shares, xerr=errors, color=colours)
    ax.axvline(1 / 26, color="black", linestyle="--", label="a random letter, 1/26")
    ax.invert_yaxis()
    fig.legend(loc="outside lower right")
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    torch.set_num_threads(cfg.threads)
    device = pick_device(cfg.device)
    model, gpt_cfg = load_model(cfg, require(cfg.init), device)
    out = output_folder(cfg)

    # new words
    x, y = get_batch(-1, cfg, gpt_cfg.block_size)
    x = x.to(device)
    y = y.to(device)

    # what the first block does to eight of them
    attn = model.h[0].attn
    pos = torch.arange(gpt_cfg.block_size, device=device)
    mask = causal_mask(pos, pos)
    embedded = model.wte(x[:8]) + model.wpe  # (8, T, C)
    stream = model.h[0].ln_1(embedded).detach()
    steps = trace(attn, stream, mask)
    for step in steps:
        print(f"{step.name:32} {tuple(step.tensor.shape)}")

    # two other ways to compute the same
    expected = attn(stream, mask)
    by_steps = (steps[-1].tensor - expected).abs().max().item()
    by_heads = (attend_head_by_head(attn, stream, mask) - expected).abs().max().item()
    largest = max(by_steps, by_heads)
    assert largest < 1e-4, f"step by step or head by head the output differs by {largest}"
    print(
        "Largest difference from the module: "
        f"step by step {by_steps:.1g}, head by head {by_heads:.1g}\n"
    )
    D = gpt_cfg.n_embd // gpt_cfg.n_head
    title = (
        f"{gpt_cfg.n_head} heads of {D} channels: split, attend, join\n"
        f"Computed head by head, the output differs by {by_heads:.1g}"
    )
    draw_shapes(title, steps, out / "demo_heads_shapes.png")

    # silence heads
    cases = list_cases(gpt_cfg.n_layer, gpt_cfg.n_head)
    accuracies = {}
    for name, silent in cases.items():
        accuracy = mean_and_error(correct_letters(model, x, y, silent))
        accuracies[name] = accuracy
        print(
            f"silenced: {name:26} {accuracy.share:.3f} +- {accuracy.two_errors:.3f} "
            "of the letters right"
        )

    # figure and numbers
    spared = count_spared(accuracies, cases)
    worst = min(accuracies, key=accuracies.get)
    title = (
        f"Silencing one head makes no difference for {spared} of "
        f"{gpt_cfg.n_layer * gpt_cfg.n_head} heads\n"
        f"Letters right: {accuracies['nothing'].share:.0%} with all heads, "
        f"{accuracies[worst].share:.0%} without {worst}"
    )
    draw_ablation(title, accuracies, cases, out / "demo_heads_ablation.png")
    save_metrics(
        out,
        name="demo_heads",
        right={name: accuracy.share for name, accuracy in accuracies.items()},
        seed=cfg.seed,
        two_errors={name: accuracy.two_errors for name, accuracy in accuracies.items()},
        words=len(x),
        spared=spared,
        difference_steps=by_steps,
        difference_heads=by_heads,
    )
