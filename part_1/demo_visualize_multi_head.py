"""
Part 1, what heads look at: the attention weights of every head in every layer of a trained model.

    cd part_1 && python3 demo_visualize_multi_head.py

The model of train.py says a word backwards: "backward|" -> "drawkcab". Each letter that it says
stands one place further left in the word than the one before. So a head that finds it looks further
and further back, which is a diagonal from the upper right to the lower left in the picture. Above
each panel is the share of the head's weight on the letter to say and on the token itself, as a mean
over the rows of the answer and over 200 random words.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass

import torch

from model import GPTConfig
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
from train import GPT, encode, get_batch


@dataclass
class Config:
    init: str = "part_1/out/gpt.pt"  # checkpoint of part_1/train.py
    word: str = "backward"  # the word that is drawn; it must be as long as the trained words
    batch_size: int = 200  # random words behind the shares in the titles
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.batch_size > 0, f"batch_size={self.batch_size} must be at least 1"
        has_letters_only = self.word.isascii() and self.word.isalpha() and self.word.islower()
        assert has_letters_only, f"word={self.word} must have letters from a to z only"


def load_model(cfg, path, device):
    """The trained model, and the number of letters in the words that it was trained on."""
    saved = load_checkpoint(path, "gpt")
    if "positions" not in saved:
        fail(f"--init={cfg.init} must be a checkpoint of part_1/train.py")
    gpt_cfg = GPTConfig(**saved["gpt_config"])
    model = GPT(gpt_cfg, saved["positions"]).to(device)
    model.load_state_dict(saved["weights"])
    return model, gpt_cfg.block_size // 2


@torch.no_grad()
def attention_weights(model, idx):
    """The weights of every layer and head for the rows idx (B, T) -> (L, B, H, T, T)."""
    model(idx)
    return torch.stack([block.attn.weights for block in model.h])


def share_on_letter(weights, n):
    """weights (L, B, H, T, T) -> the mean share of weight on the letter to say (L, H).

    Row n is the bar. It says letter n - 1 of the word, and row n + i says letter n - 1 - i.
    """
    i = torch.arange(n)
    on_letter = weights[:, :, :, n + i, n - 1 - i]  # (L, B, H, n)
    return on_letter.mean(dim=(1, 3))


def share_on_itself(weights, n):
    """weights (L, B, H, T, T) -> the mean share of weight on the token itself (L, H)."""
    rows = n + torch.arange(n)
    on_itself = weights[:, :, :, rows, rows]  # (L, B, H, n)
    return on_itself.mean(dim=(1, 3))


def draw(title, weights, on_letter, on_itself, text, path):
    """One panel for each head. weights (L, H, T, T) belong to the text, on_letter and on_itself
    (L, H) are shares over many words."""
    L, H, T, _ = weights.shape
    fig, axes = figure(title, rows=L, columns=H, height=0.8 + 2.1 * L)
    axes = axes.reshape(L, H)

    # A masked key is not a key of weight 0, so it is drawn in gray.
    masked = torch.ones(T, T).triu(1).bool()
    weights = weights.masked_fill(masked, float("nan"))
    for layer in range(L):
        for head in range(H):
            ax = axes[layer, head]
            image = ax.imshow(weights[layer, head], vmin=0, vmax=1, cmap="viridis")
            ax.set_facecolor("lightgray")
            ax.set_title(
                f"layer {layer + 1}, head {head + 1}\nletter to say "
                f"{on_letter[layer, head]:.0%}, itself {on_itself[layer, head]:.0%}",
                fontsize=8,
            )
            ax.set_xticks(range(T), text, fontsize=6)
            ax.set_yticks(range(T), text, fontsize=6)
            ax.grid(False)

    for ax in axes[-1]:
        ax.set_xlabel("looks at (key)", fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("from (query)", fontsize=8)
    fig.colorbar(image, ax=axes, shrink=0.6, label="attention weight; gray: masked")
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    model, n = load_model(cfg, require(cfg.init), device)
    if len(cfg.word) != n:
        fail(f"--word={cfg.word} must have {n} letters, like the words that the model has learned")
    out = output_folder(cfg)

    # the shares, over many random words that were not trained on
    x, _ = get_batch(-2, cfg, block_size=2 * n)
    weights = attention_weights(model, x.to(device)).cpu()
    on_letter = share_on_letter(weights, n)
    on_itself = share_on_itself(weights, n)

    # the picture, for one word
    text = cfg.word + "|" + cfg.word[::-1][:-1]
    idx = torch.tensor([encode(text)], device=device)  # (1, T)
    weights = attention_weights(model, idx)[:, 0].cpu()  # (L, H, T, T)
    layer, head = divmod(on_letter.argmax().item(), on_letter.size(1))
    title = (
        f"Layer {layer + 1}, head {head + 1} reads backwards: "
        f"{on_letter.max():.0%} of its weight is on the letter to say"
    )
    draw(title, weights, on_letter, on_itself, text, out / "demo_visualize_multi_head.png")

    # the numbers
    metrics = {}
    for name, shares in [("next_letter", on_letter), ("itself", on_itself)]:
        for layer in range(len(shares)):
            for head in range(shares.size(1)):
                key = f"layer_{layer + 1}_head_{head + 1}_{name}"
                metrics[key] = shares[layer, head].item()
    save_metrics(
        out, name="demo_visualize_multi_head", seed=cfg.seed, words=cfg.batch_size, **metrics
    )
