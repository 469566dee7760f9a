"""
Part 5 - a router left alone, and three remedies: how even the experts' load gets, and what that costs in loss.

    python part_5/demo_routing.py
    python part_5/demo_routing.py --seeds=3      what the README quotes

MaxVio is the busiest expert's load over an even share, less 1 (Wang et al. 2024, section 2.2). The auxiliary loss pulls
on the router's gradient (Fedus et al. 2021, eq. 4). The loss-free bias does not: it is added to the probabilities only
to choose experts, never to weigh them, and after each batch it moves by u towards those that had too little (Wang et
al. 2024, algorithm 1). The z-loss, the mean of logsumexp(logits)^2, keeps logits small (Zoph et al. 2022, eq. 5).
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import fmean

import torch

import train
from model import GPT, GPTConfig, MoE
from shared import Log, cli, figure, save_figure, save_metrics, setup

@dataclass
class Config:
    data: str = "stories"  # "stories" (the built-in world), "shakespeare" (a download), or the path of a text file
    steps: int = 100  # optimizer steps of each run
    batch_size: int = 16  # sequences per step
    lr_adamw: float = 3e-3  # AdamW's rate, the router's too
    aux: float = 0.01  # weight of the auxiliary loss
    u: float = 0.01  # step of the loss-free bias; the paper's 0.001 is for long runs
    z: float = 0.001  # weight of the z-loss
    seed: int = 0
    seeds: int = 1  # how many seeds; the README quotes 3
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

class Balanced(MoE):
    """An MoE's own router and experts, and the remedies, each off at 0. `balance` is what the loss gets."""
    def __init__(self, moe, aux=0.0, u=0.0, z=0.0):
        torch.nn.Module.__init__(self)
        self.top_k, self.router, self.experts = moe.top_k, moe.router, moe.experts
        self.aux, self.u, self.z = aux, u, z
        self.register_buffer("bias", torch.zeros(len(moe.experts)))
    def forward(self, x):
        shape, x = x.shape, x.flatten(0, 1)  # (N, C)
        logits = self.router(x).float()
        p = logits.softmax(dim=-1)  # (N, E)
        chosen = (p + self.bias).topk(self.top_k, dim=-1).indices
        gate = torch.zeros_like(p).scatter(1, chosen, p.gather(1, chosen))  # without the bias
        self.gate = gate = gate / gate.sum(dim=-1, keepdim=True)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = gate[:, e].nonzero()[:, 0]
            y = y.index_add(0, token, gate[token, e, None] * expert(x[token]))
        self.load = chosen.flatten().bincount(minlength=len(self.experts)) / chosen.numel()
        even = len(self.experts) * (self.load * p.mean(dim=0)).sum()
        self.balance = self.aux * even + self.z * logits.logsumexp(dim=-1).square().mean()
        return y.view(shape)
    def move_bias(self):
        self.bias += self.u * (self.load.mean() - self.load).sign()

def run(data, gpt_cfg, cfg, remedy, device):
    """train.py's loop -> the model."""
    torch.manual_seed(cfg.seed)
    model = GPT(gpt_cfg).to(device)
    for block in model.h:
        block.mlp = Balanced(block.mlp, **remedy).to(device)
    opts, scaler = train.make_optimizers(model, cfg), torch.amp.GradScaler(device.type, enabled=False)
    for step in range(cfg.steps):
        for group in (group for opt in opts for group in opt.param_groups):
            group["lr"] = group["peak"] * train.lr_scale(step, cfg)
        x, y = train.get_batch(data[1], data[2], step, cfg, gpt_cfg.block_size)
        train.backward(model, x.to(device), y.to(device), 1, nullcontext, scaler, balance=1.0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        for block in model.h:
            block.mlp.move_bias()
    return model

def max_vio(load):
    """Counts (layers, E) -> the worst layer's. 0: all alike; E / top_k - 1: the same few do everything."""
    return (load / load.mean(dim=1, keepdim=True)).max().item() - 1

@torch.no_grad()
def gates(model, rows):
    """Rows of tokens (N, T) -> what each token gives to each expert, (layers, N * T, E)."""
    model(rows)
    return torch.stack([block.mlp.gate for block in model.h]).cpu()

def draw_text(panels, words, said, path):
    """{remedy: gates (T, E)} of one text: what each token gives to each expert."""
    fig, axes = figure(said, rows=len(panels), height=2 + 1.6 * len(panels))
    for ax, (name, gate) in zip(axes, panels.items()):
        picture = ax.imshow(gate.T, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        ax.set_title(name, fontsize=10)
        ax.set(ylabel="expert", xticks=range(len(words)), xticklabels=[])
        ax.grid(False)
    ax.set_xticklabels(words, rotation=90, fontsize=8)
    fig.colorbar(picture, ax=axes, shrink=0.5, label="weight of the expert's answer")
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    remedies = {"none": {}, "auxiliary loss": {"aux": cfg.aux}, "loss-free bias": {"u": cfg.u}, "z-loss": {"z": cfg.z}}
    gpt_cfg = GPTConfig(512, 72, n_layer=2, n_head=2, n_embd=64, n_kv_head=1, mlp_dim=44, n_expert=8)
    plain = train.Config(data=cfg.data, steps=cfg.steps, batch_size=cfg.batch_size, lr_adamw=cfg.lr_adamw)
    tok, _, _, val_ids, edges, val_bytes, _ = data = train.load_data(plain, gpt_cfg)
    rows = val_ids[:len(val_ids) // 72 * 72].view(-1, 72)[:256].to(device)
    vio, loss, texts = {}, {}, {}
    log = Log(cfg, len(remedies) * cfg.seeds, name="demo_routing")
    for i, (name, seed) in enumerate((name, cfg.seed + s) for name in remedies for s in range(cfg.seeds)):
        model = run(data, gpt_cfg, replace(plain, seed=seed), remedies[name], device)
        given = gates(model, rows)
        vio.setdefault(name, []).append(max_vio((given > 0).float().sum(dim=1)))
        loss.setdefault(name, []).append(train.evaluate(model, val_ids, edges, val_bytes, device, nullcontext)[0])
        texts.setdefault(name, given[-1, :30])
        log(i, remedy=name, max_vio=vio[name][-1], val_loss=loss[name][-1])

    # figures
    busiest = {name: 1 + max_vio((gate > 0).float().sum(dim=0)[None]) for name, gate in texts.items()}
    said = "A text's busiest expert, in even shares:\n" + ", ".join(f"{name} {n:.1f}" for name, n in busiest.items())
    draw_text(texts, [tok.decode([i]) for i in rows[0, :30].tolist()], said, Path(cfg.out) / "demo_routing_text.png")
    said = "MaxVio: " + ", ".join(f"{name} {fmean(v):.2f}" for name, v in vio.items())
    print(said)
    fig, axes = figure(said, columns=2)
    for ax, table, label in zip(axes, (vio, loss), ("MaxVio, worse layer, new text", "validation loss, nats per byte")):
        for name, values in table.items():
            ax.plot([name] * len(values), values, "o")
            print(f"{label}, {name}: {fmean(values):.4f}, from {min(values):.4f} to {max(values):.4f}")
        ax.set_ylabel(label)
        ax.tick_params(axis="x", rotation=30)
    axes[0].set_ylim(bottom=0)
    save_figure(fig, Path(cfg.out) / "demo_routing.png")
    save_metrics(cfg, name="demo_routing", max_vio=vio, val_loss=loss, seed=cfg.seed, seeds=cfg.seeds, steps=cfg.steps)
