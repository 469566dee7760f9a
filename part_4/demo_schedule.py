"""
Part 4 - four schedules of the learning rate and two optimizers, each at the rate that suits it best.

    python part_4/demo_schedule.py
    python part_4/demo_schedule.py --seeds=3              what the README quotes

Warmup-stable-decay (Hu et al. 2024, section 4), linear and none are one formula, that of train.py: only the share of
the steps in which the rate falls is .5, 1 or 0. Cosine: Loshchilov & Hutter 2017, eq. 5. In the second figure
AdamW takes the blocks' matrices over from Muon, at its own rate. Both are tuned on the same grid: a tuned optimizer
against an untuned one shows the tuning (Wen et al. 2025).
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import fmean, median

import torch

import train
from model import GPT, GPTConfig
from shared import Log, cli, figure, need, save_figure, save_metrics, setup

SCHEDULES = ["none", "linear", WSD := "warmup-stable-decay", "cosine"]

@dataclass
class Config:
    data: str = "stories"  # "stories" (the built-in world), "shakespeare" (a download), or the path of a text file
    steps: int = 80  # optimizer steps of each run
    batch_size: int = 16  # sequences per step
    rates: str = "0.3,1,3,10,30"  # peak rates, times train.py's; the schedules skip the lowest and the highest
    n_embd: int = 64  # channels
    seed: int = 0
    seeds: int = 1  # how many seeds; the README quotes 3
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def share(step, schedule, cfg):
    """The rate's share of its peak at steps 0, 1, ...; cfg is train.py's."""
    if schedule != "cosine":
        decay = {"none": 0.0, "linear": 1.0, WSD: cfg.decay}[schedule]
        return train.lr_scale(step, replace(cfg, decay=decay))
    warm = cfg.warmup * cfg.steps
    turn = max(0.0, step - warm) / max(1.0, cfg.steps - warm)  # 0 to nearly 1: the last step still learns
    return train.lr_scale(step, replace(cfg, decay=0.0)) * (1 + math.cos(math.pi * min(1.0, turn))) / 2

def optimizers(model, cfg, kind):
    """train.py's pair, or AdamW at one rate for everything."""
    muon, adamw = train.make_optimizers(model, cfg)
    if kind == "AdamW":
        muon = torch.optim.AdamW(muon.param_groups[0]["params"], lr=cfg.lr_adamw, betas=(0.9, 0.95), weight_decay=0.0)
        muon.param_groups[0]["peak"] = cfg.lr_adamw
    return muon, adamw

def run(data, gpt_cfg, cfg, schedule, kind, device):
    """train.py's loop -> validation loss in nats per byte, seconds of a step."""
    _, ids, starts, val_ids, edges, val_bytes, _ = data
    torch.manual_seed(cfg.seed)
    model = GPT(gpt_cfg).to(device)
    opts, scaler = optimizers(model, cfg, kind), torch.amp.GradScaler(device.type, enabled=False)
    start = time.time()
    for step in range(cfg.steps):
        for group in (group for opt in opts for group in opt.param_groups):
            group["lr"] = group["peak"] * share(step, schedule, cfg)
        x, y = train.get_batch(ids, starts, step, cfg, gpt_cfg.block_size)
        train.backward(model, x.to(device), y.to(device), 1, nullcontext, scaler)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
    seconds = (time.time() - start) / cfg.steps
    return train.evaluate(model, val_ids, edges, val_bytes, device, nullcontext)[0], seconds

def tuned(table):
    """{rate: losses over seeds} -> the rate whose mean is lowest, those losses."""
    return min(table.items(), key=lambda item: fmean(item[1]))

def verdict(a, b):
    """Two names with their losses over seeds -> what a title may say: no winner where the ranges overlap."""
    (low, x), (high, y) = sorted((a, b), key=lambda item: fmean(item[1]))
    return f"{low} {fmean(x):.3f}, {high} {fmean(y):.3f} nats per byte{': no difference' * (max(x) >= min(y))}"

def draw(ax, table, name):
    """Mean over seeds at each rate, with its range."""
    rates = sorted(table)
    means = [fmean(table[r]) for r in rates]
    ax.plot(rates, means, "o-", label=name)
    ax.vlines(rates, [min(table[r]) for r in rates], [max(table[r]) for r in rates], color=ax.lines[-1].get_color())
    ax.set(xscale="log", xlabel="peak rate, times train.py's", ylabel="final validation loss, nats per byte")
    ax.legend(fontsize=9)
    print(f"{name:20}", *(f"rate {r:g}: {m:.4f}" for r, m in zip(rates, means)), sep="  ")

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    need(cfg.rates.count(",") > 1, f"--rates={cfg.rates}: at least three are wanted")
    lowest, *few, highest = rates = sorted(float(r) for r in cfg.rates.split(","))
    gpt_cfg = GPTConfig(vocab_size=512, block_size=72, n_layer=2, n_head=2, n_kv_head=1, n_embd=cfg.n_embd)
    plain = train.Config(data=cfg.data, steps=cfg.steps, batch_size=cfg.batch_size)
    data = train.load_data(plain, gpt_cfg)

    # every run
    arms = [(name, "Muon", r) for name in SCHEDULES for r in (rates if name == WSD else few)]
    arms += [(WSD, "AdamW", r) for r in rates]
    table, seconds = {}, {}
    log = Log(cfg, len(arms) * cfg.seeds, name="demo_schedule")
    for i, (name, kind, rate) in enumerate(arm for arm in arms for _ in range(cfg.seeds)):
        one = replace(plain, lr=rate * plain.lr, lr_adamw=rate * plain.lr_adamw, seed=cfg.seed + i % cfg.seeds)
        val_loss, s = run(data, gpt_cfg, one, name, kind, device)
        table.setdefault((name, kind), {}).setdefault(rate, []).append(val_loss)
        seconds.setdefault(kind, []).append(s)
        log(i, schedule=name, optimizer=kind, rate=rate, val_loss=val_loss)
    at_few = {name: {r: table[name, "Muon"][r] for r in few} for name in SCHEDULES}
    best = {name: tuned(at_few[name])[1] for name in SCHEDULES}
    first = min(SCHEDULES[1:], key=lambda name: fmean(best[name]))
    said = "Each schedule at its best rate:\n" + verdict((first, best[first]), ("none", best["none"]))
    print(said)
    fig, (above, below) = figure(said, rows=2, height=7)
    for name in SCHEDULES:
        above.plot([share(s, name, plain) for s in range(cfg.steps)], label=name)
        draw(below, at_few[name], name)
    above.set(xlabel="step", ylabel="share of the peak rate")
    save_figure(fig, Path(cfg.out) / "demo_schedule.png")

    # Muon against AdamW
    pair = {kind: tuned(table[WSD, kind]) for kind in seconds}
    said = "Each at its best rate: " + verdict(*((kind, values) for kind, (_, values) in pair.items()))
    print(said)
    fig, ax = figure(said)
    for kind, (rate, _) in pair.items():
        draw(ax, table[WSD, kind], f"{kind}, {1000 * median(seconds[kind]):.0f} ms a step")
        if rate in (lowest, highest):
            print(f"{kind} is best at the edge of its rates, {rate:g}: it is not tuned, ask for more --rates")
    save_figure(fig, Path(cfg.out) / "demo_schedule_muon.png")
    save_metrics(cfg, name="demo_schedule", best_schedule=first, best_rate={k: rate for k, (rate, _) in pair.items()},
                 seconds_per_step={k: median(s) for k, s in seconds.items()}, seed=cfg.seed, seeds=cfg.seeds,
                 val_loss={f"{n}, {k}, {r:g}": v for (n, k), t in table.items() for r, v in t.items()})
