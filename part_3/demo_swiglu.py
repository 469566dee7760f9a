"""
Part 3 - the MLP's nonlinearity at equal parameters: ReLU, GELU, ReLU squared and SwiGLU in the same model.

    python part_3/demo_swiglu.py
    python part_3/demo_swiglu.py --seeds=3

A gated MLP has three matrices where the others have two, so its hidden layer is 2/3 as wide: 3 C h = 2 C (3/2 h).
Shazeer 2020, table 1, has SwiGLU 0.04 nats better than GELU after 65,536 steps of a large model; ReLU squared (So et
al. 2021) is the cheap rival. One learning rate serves all. Everything but the MLP starts from the same weights.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, GPTConfig, MLP
from shared import Log, cli, figure, save_figure, save_metrics, setup
from train import evaluate, get_batch, load_data

@dataclass
class Config:
    data: str = "stories"  # "stories", "shakespeare", or the path of a text file
    steps: int = 400  # optimizer steps per run
    batch_size: int = 8  # sequences per step
    lr: float = 1e-3  # AdamW's
    seeds: int = 1  # how many seeds; the README quotes 3
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        assert self.steps >= 10 and self.seeds > 0, "steps must be at least 10, seeds at least 1"

class Plain(nn.Module):
    """Widen, one nonlinearity, back: two matrices. 3/2 of SwiGLU's hidden channels make as many parameters."""
    def __init__(self, cfg, act):
        super().__init__()
        assert cfg.mlp_dim % 2 == 0, f"mlp_dim={cfg.mlp_dim} must be even: the others' is 3/2 of it"
        self.c_fc = nn.Linear(cfg.n_embd, 3 * cfg.mlp_dim // 2, bias=False)
        self.c_proj = nn.Linear(3 * cfg.mlp_dim // 2, cfg.n_embd, bias=False)
        nn.init.zeros_(self.c_proj.weight)
        self.act = act
    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))

def squared_relu(x):
    return F.relu(x).square()

KINDS = {
    "ReLU": lambda cfg: Plain(cfg, F.relu),
    "GELU": lambda cfg: Plain(cfg, F.gelu),
    "ReLU squared": lambda cfg: Plain(cfg, squared_relu),
    "SwiGLU": MLP,
}

def build(kind, cfg, seed):
    """A GPT whose MLPs are of a kind; the seed of the MLPs is their own, so the rest is equal for all kinds."""
    torch.manual_seed(seed)
    model = GPT(cfg)
    torch.manual_seed(seed + 1)
    for block in model.h:
        block.mlp = KINDS[kind](cfg)
    return model

def run(kind, train_ids, val_ids, cfg, gpt_cfg, device, log, done):
    """One training -> batch losses (steps,), validation loss, parameters."""
    model = build(kind, gpt_cfg, cfg.seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(cfg.steps):
        x, y = get_batch(train_ids, step, cfg, gpt_cfg.block_size)
        _, loss = model(x.to(device), y.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        log(done + step, kind=kind, loss=losses[-1])
    val_loss, _ = evaluate(model, val_ids, gpt_cfg.block_size, device)
    return torch.tensor(losses), val_loss, sum(p.numel() for p in model.parameters())

def verdict(ours, theirs):
    """Two lists of losses, a seed each -> what may be said of ours."""
    if len(ours) < 2:
        return "one seed, no verdict"
    if max(ours) < min(theirs):
        return "better"
    return "worse" if min(ours) > max(theirs) else "no difference"

def draw(losses, val, said, path):
    """losses {kind: (seeds, steps)}, val {kind: [a number per seed]}."""
    fig, (left, right) = figure(said, columns=2, height=5)
    for i, kind in enumerate(losses):
        steps = losses[kind].size(1) // 10 * 10
        line = losses[kind][:, :steps].unflatten(1, (-1, 10)).mean(dim=(0, 2))
        left.plot(range(5, steps, 10), line, color=f"C{i}", label=kind)
        right.vlines(i, min(val[kind]), max(val[kind]), color=f"C{i}")
        right.plot([i] * len(val[kind]), val[kind], "o", color=f"C{i}")
    left.set(xlabel="optimizer step (mean of ten)", ylabel="training loss, nats per byte")
    right.set(xlabel="nonlinearity (a dot per seed)", ylabel="validation loss, nats per byte", xlim=(-0.6, 3.6))
    right.set_xticks(range(len(val)), val, fontsize=9)
    left.legend()
    save_figure(fig, path)

if __name__ == "__main__":
    cfg, gpt_cfg = cli(Config(), GPTConfig(n_layer=2, n_embd=64))
    device, _ = setup(cfg)
    train_ids, val_ids, _ = load_data(cfg, gpt_cfg)

    # runs
    log = Log(cfg, len(KINDS) * cfg.seeds * cfg.steps, name="demo_swiglu")
    losses, val, params = {}, {}, {}
    for i, kind in enumerate(KINDS):
        runs = [run(kind, train_ids, val_ids, replace(cfg, seed=cfg.seed + j), gpt_cfg, device, log,
                    (i * cfg.seeds + j) * cfg.steps) for j in range(cfg.seeds)]
        losses[kind], val[kind], params[kind] = torch.stack([r[0] for r in runs]), [r[1] for r in runs], runs[0][2]
    assert len(set(params.values())) == 1, f"not equal parameters: {params}"

    # what came out
    mean = {kind: sum(found) / len(found) for kind, found in val.items()}
    for kind, found in val.items():
        against = "" if kind == "SwiGLU" else f"; SwiGLU against it: {verdict(val['SwiGLU'], found)}"
        print(f"{kind:12}: {mean[kind]:.3f} ({min(found):.3f} to {max(found):.3f}) nats per byte{against}")
    rival = min((kind for kind in KINDS if kind != "SwiGLU"), key=mean.get)
    said = f"SwiGLU {mean['SwiGLU']:.3f} nats; against GELU {mean['GELU']:.3f}: {verdict(val['SwiGLU'], val['GELU'])}\n"
    said += f"against the best of the others, {rival} {mean[rival]:.3f}: {verdict(val['SwiGLU'], val[rival])}"
    print(f"{params['SwiGLU']:,} parameters each; {said}".replace("\n", ", "))
    draw(losses, val, said, Path(cfg.out) / "demo_swiglu.png")
    save_metrics(cfg, name="demo_swiglu", seed=cfg.seed, seeds=cfg.seeds, steps=cfg.steps, seconds=log.seconds,
                 params=params["SwiGLU"], val=val, swiglu_against={k: verdict(val["SwiGLU"], val[k]) for k in KINDS})
