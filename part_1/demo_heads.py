"""
Part 1 - one head, then many: how the channels are split and joined again, and what the toy task loses without a head.

    python part_1/demo_heads.py

H heads cost no more than one: the C channels of q, k and v are cut into H pieces of D = C / H, each piece attends for
itself, and the pieces stand side by side again ("Attention Is All You Need", section 3.2.2). To see what a head is
for, its D channels are set to 0 before c_proj, in the trained stack of train.py, and the letters are counted that are
still right (Michel et al. 2019, "Are sixteen heads really better than one?", section 3.2, do it to large models).
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass

import torch

from model import GPTConfig, attention, causal_mask
from shared import cli, figure, load_checkpoint, need, require, save_figure, save_metrics, setup
from train import GPT, get_batch

@dataclass
class Config:
    init: str = ""  # a checkpoint of train.py; "": part_1/out/gpt.pt
    batch_size: int = 1000  # words, none of them trained on
    threads: int = 1  # CPU threads; matrices as small as these gain nothing from more
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def trace(attn, x, mask):
    """Attention.forward, step by step: [(what is done, the tensor)], the last one its result."""
    (B, T, C), H = x.shape, attn.n_head
    steps = [("x: the stream", x), ("c_q: q, and k, v likewise", attn.c_q(x))]
    steps.append(("view: C cut into H pieces", steps[-1][1].view(B, T, H, C // H)))
    q, k, v = (layer(x).view(B, T, H, C // H).transpose(1, 2) for layer in (attn.c_q, attn.c_k, attn.c_v))
    steps.append(("transpose: a head is a batch", q))
    y, weights = attention(q, k, v, mask)
    steps += [("softmax(q k^T / sqrt(D))", weights), ("weights @ v", y), ("transpose back", y.transpose(1, 2))]
    steps.append(("reshape: side by side", y.transpose(1, 2).reshape(B, T, C)))
    return [*steps, ("c_proj: heads mixed", attn.c_proj(steps[-1][1]))]

def one_by_one(attn, x, mask):
    """The same without view and transpose: each head alone, with its own rows of the weights, then concatenated."""
    D, heads = x.size(-1) // attn.n_head, []
    for h in range(attn.n_head):
        q, k, v = (x @ layer.weight[h * D:(h + 1) * D].T for layer in (attn.c_q, attn.c_k, attn.c_v))  # (B, T, D)
        heads.append(attention(q, k, v, mask)[0])
    return attn.c_proj(torch.cat(heads, dim=-1))

@torch.no_grad()
def right(model, x, y, without=()):
    """Which letters are right, (B, n) bool, when the heads (layer, head) in `without` say nothing."""
    hooks = []
    for layer, head in without:
        def silence(_, args, D=model.h[layer].attn.c_proj.in_features // model.h[layer].attn.n_head, h=head):
            kept = torch.arange(args[0].size(-1), device=args[0].device) // D != h
            return (args[0] * kept,)
        hooks.append(model.h[layer].attn.c_proj.register_forward_pre_hook(silence))
    found = model(x)[:, -y.size(1):].argmax(dim=-1) == y
    for hook in hooks:
        hook.remove()
    return found

def mean_and_error(found):
    """Share of letters right, and twice its standard error over words: letters of one word go wrong together."""
    words = found.float().mean(dim=1)
    return words.mean().item(), 2 * words.std().item() / len(words) ** 0.5

def draw_shapes(steps, said, path):
    """Each step's tensor, of the first sequence, as a picture; heads beside each other, black between them."""
    fig, axes = figure(said, rows=3, columns=3, height=8)
    for ax, (name, a) in zip(axes.flat, steps):
        letters = "BTC" if a.dim() == 3 else "BTHD" if name.startswith(("view", "transpose back")) else "BHTD"
        letters = letters.replace("D", "S") if name.startswith("softmax") else letters
        tile = a[0].detach().cpu()
        if a.dim() == 4:
            tile = tile if letters[1] == "T" else tile.transpose(0, 1)  # (T, H, D)
            tile = torch.nn.functional.pad(tile, (0, 1), value=float("nan")).flatten(1)[:, :-1]
        top = a[0].abs().max()
        ax.imshow(tile, cmap="RdBu", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
        ax.set_title(f"{name}\n({', '.join(letters)}) = {tuple(a.shape)}", fontsize=9)
        ax.set(xlabel={"C": "channel", "D": "head, channel", "S": "head, key"}[letters[-1]], ylabel="token")
        ax.set(xticks=[], yticks=[], facecolor="black")
        ax.grid(False)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    saved = load_checkpoint(cfg.init or require("part_1/out/gpt.pt"), "gpt")
    gpt_cfg = GPTConfig(**saved["gpt_config"])
    model = GPT(gpt_cfg, saved["positions"]).to(device)
    model.load_state_dict(saved["weights"])
    L, H, D = gpt_cfg.n_layer, gpt_cfg.n_head, gpt_cfg.n_embd // gpt_cfg.n_head

    # shapes: what the first block does to a few words, and the same head by head
    x, y = (a.to(device) for a in get_batch(-1, cfg, gpt_cfg.block_size))
    pos = torch.arange(x.size(1), device=device)
    attn, mask = model.h[0].attn, causal_mask(pos, pos)
    stream = model.h[0].ln_1(model.wte(x[:8]) + model.wpe[:x.size(1)]).detach()
    steps = trace(attn, stream, mask)
    for name, a in steps:
        print(f"{name:28} {tuple(a.shape)}")
    ways = steps[-1][1], one_by_one(attn, stream, mask)
    apart = [(way - attn(stream, mask)).abs().max().item() for way in ways]
    need(max(apart) < 1e-4, f"the steps and the module differ by {max(apart)}")
    print(f"largest difference from the module: step by step {apart[0]:.0e}, head by head {apart[1]:.0e}\n")
    said = f"{H} heads of {D} channels: split, attend, join; one by one they differ by {apart[1]:.0e}"
    draw_shapes(steps, said, Path(cfg.out) / "demo_heads_shapes.png")

    # ablation
    every = [(layer, head) for layer in range(L) for head in range(H)]
    cases = {"nothing": []} | {f"layer {l + 1}, head {h + 1}": [(l, h)] for l, h in every}
    cases |= {f"all of layer {l + 1} but head {h + 1}": [(l, i) for i in range(H) if i != h] for l, h in every}
    cases |= {f"all of layer {l + 1}": [(l, h) for h in range(H)] for l in range(L)}
    found = {name: mean_and_error(right(model, x, y, without)) for name, without in cases.items()}
    for name, (share, error) in found.items():
        print(f"without {name:24} {share:.3f} +- {error:.3f} of the letters right")
    one = {name: value for name, value in found.items() if name.startswith("layer")}
    spared = sum(abs(share - found["nothing"][0]) <= error + found["nothing"][1] for share, error in one.values())
    worst = min(found, key=found.get)
    said = (f"{spared} of the {len(one)} heads can go, one at a time, with no difference\n"
            f"Without {worst}: {found[worst][0]:.0%} of the letters right, with all heads {found['nothing'][0]:.0%}")
    fig, ax = figure(said, "share of letters right, twice the standard error", "without", height=7)
    ax.barh(list(found), [share for share, _ in found.values()], xerr=[error for _, error in found.values()],
            color=[f"C{bool(without) + (len(without) > 1)}" for without in cases.values()])
    ax.axvline(1 / 26, color="black", linestyle="--", label="any letter, by chance")
    ax.invert_yaxis()
    fig.legend(loc="outside lower right")
    save_figure(fig, Path(cfg.out) / "demo_heads_ablation.png")
    save_metrics(cfg, name="demo_heads", right={name: share for name, (share, _) in found.items()}, seed=cfg.seed,
                 two_errors={name: error for name, (_, error) in found.items()}, words=len(x), spared=spared,
                 difference_steps=apart[0], difference_heads=apart[1])
