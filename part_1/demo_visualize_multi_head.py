"""
Part 1 - what the heads of a trained stack look at: every layer, every head, with the causal mask in sight.

    cd part_1 && python3 demo_visualize_multi_head.py

The stack of train.py says a word backwards: "backward|" -> "drawkcab". To say letter i of the answer it must look back
to letter n - i of the word, further and further: an anti-diagonal in the picture. A panel's title is the share of its
weight, over the answer's rows and 200 random words, that lies on the letter to be said next, and on the token itself.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass

import torch

from model import GPTConfig
from shared import cli, figure, load_checkpoint, require, save_figure, save_metrics, setup
from train import GPT, encode, get_batch

@dataclass
class Config:
    init: str = ""  # a checkpoint of train.py; "": part_1/out/gpt.pt
    word: str = "backward"  # the word that is drawn; as long as the stack's words
    batch_size: int = 200  # random words behind the shares in the titles
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def heads(model, idx):
    """One forward of idx (B, T) -> every layer's attention weights, (L, B, H, T, T)."""
    model(idx)
    return torch.stack([block.attn.weights for block in model.h])

def shares(weights, n):
    """Mean weight (L, H) on the letter to be said next, and on the token itself, over the rows that answer.

    Row n + i (the | is row n) must say letter n - 1 - i of the word.
    """
    rows = torch.arange(n, 2 * n)
    wanted = weights[:, :, :, rows, n - 1 - torch.arange(n)].mean(dim=(1, 3))
    itself = weights[:, :, :, rows, rows].mean(dim=(1, 3))
    return wanted, itself

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    saved = load_checkpoint(cfg.init or require("part_1/out/gpt.pt"), "gpt")
    gpt_cfg = GPTConfig(**saved["gpt_config"])
    n = gpt_cfg.block_size // 2
    assert len(cfg.word) == n, f"--word={cfg.word} must have {n} letters, as the words of the stack"
    model = GPT(gpt_cfg, saved["positions"]).to(device)
    model.load_state_dict(saved["weights"])

    # numbers: over many random words
    x, _ = get_batch(-2, cfg, gpt_cfg.block_size)
    wanted, itself = (share.cpu() for share in shares(heads(model, x.to(device)), n))

    # picture: one word
    text = cfg.word + "|" + cfg.word[::-1][:-1]
    weights = heads(model, torch.tensor([encode(text)], device=device))[:, 0].cpu()  # (L, H, T, T)
    L, H, T, _ = weights.shape
    layer, head = divmod(wanted.argmax().item(), H)
    title = f"Layer {layer + 1}, head {head + 1} reads backwards: {wanted.max():.0%} of its weight on the letter to say"
    fig, axes = figure(title, rows=L, columns=H, height=1.2 + 2.2 * L)
    masked = torch.ones(T, T).triu(1).bool()
    for i, ax in enumerate(axes.flat):
        layer, head = divmod(i, H)
        shown = weights[layer, head].masked_fill(masked, float("nan"))  # not zero: it may not be looked at
        picture = ax.imshow(shown, vmin=0, vmax=1, cmap="viridis")
        ax.set_facecolor("lightgray")
        said = f"letter to say {wanted[layer, head]:.0%}, itself {itself[layer, head]:.0%}"
        ax.set_title(f"layer {layer + 1}, head {head + 1}\n{said}", fontsize=8)
        ax.set_xticks(range(T), text, fontsize=6)
        ax.set_yticks(range(T), text, fontsize=6)
        ax.grid(False)
    for ax in axes[-1]:
        ax.set_xlabel("looks at (key)", fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("from (query)", fontsize=8)
    fig.colorbar(picture, ax=axes, shrink=0.6, label="attention weight; gray: masked")
    save_figure(fig, Path(cfg.out) / "demo_visualize_multi_head.png")
    save_metrics(cfg, name="demo_visualize_multi_head", seed=cfg.seed, words=cfg.batch_size, **{
        f"layer_{l + 1}_head_{h + 1}_{kind}": share[l, h].item()
        for kind, share in (("next_letter", wanted), ("itself", itself)) for l in range(L) for h in range(H)
    })
