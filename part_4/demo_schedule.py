"""
Part 4, schedule and optimizer: does the learning rate have to fall, and in which way? Is Muon
better than AdamW?

    python part_4/demo_schedule.py
    python part_4/demo_schedule.py --seeds=3

The schedules are none, linear, cosine (Loshchilov & Hutter 2017, eq. 5) and warmup-stable-decay (Hu
et al. 2024, section 4). All of them warm up. All but the cosine are train.py's formula, each with
another share of steps in which the learning rate falls.

In the second figure AdamW takes the blocks' matrices over from Muon. Every schedule and optimizer
is shown at the learning rate that suits it best, and all are tuned on the same rates: a tuned
optimizer against an untuned one would show only the tuning (Wen et al. 2025).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import NamedTuple

import torch

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

WSD = "warmup-stable-decay"
SCHEDULES = ["none", "linear", WSD, "cosine"]
OPTIMIZERS = ["Muon", "AdamW"]


@dataclass
class Config:
    data: str = "stories"  # stories (the built-in world), shakespeare (a download) or a text file
    steps: int = 80  # optimizer steps of each run
    batch_size: int = 16  # sequences per step

    # peak learning rates, times train.py's; the schedules leave out the lowest and the highest
    rates: str = "0.3,1,3,10,30"

    n_embd: int = 64  # channels of the models
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "n_embd", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.n_embd % 4 == 0, (
            f"n_embd={self.n_embd} must be divisible by 4: two heads, and RoPE rotates pairs"
        )


def parse_rates(text):
    """ "3,0.3,1" -> [0.3, 1.0, 3.0]. Stops with an error if there are less than three rates."""
    rates = set()
    for word in text.split(","):
        digits = word.replace(".", "", 1)
        if not digits.isdigit() or float(word) == 0:
            fail(f"--rates={text} must be positive numbers with commas between them")
        rates.add(float(word))
    if len(rates) < 3:
        fail(f"--rates={text} must have at least three different rates")
    return sorted(rates)


def schedule_scale(step, schedule, cfg):
    """The learning rate of a step (0, 1, ...) as a share of its peak, by one of SCHEDULES. cfg is a
    config of train.py."""
    if schedule == WSD:
        return train.lr_scale(step, cfg)
    if schedule == "linear":
        return train.lr_scale(step, replace(cfg, decay=1.0))

    warm = train.lr_scale(step, replace(cfg, decay=0.0))  # rise, then stay at 1
    if schedule == "none":
        return warm

    # Half a turn of the cosine, from 1 to nearly 0: the last step still learns.
    warmup_steps = cfg.warmup * cfg.steps
    turn = max(0.0, step - warmup_steps) / max(1.0, cfg.steps - warmup_steps)
    return warm * (1 + math.cos(math.pi * min(1.0, turn))) / 2


def build_optimizers(model, cfg, kind):
    """train.py's Muon and AdamW, or for kind "AdamW" two AdamW with the same learning rate."""
    muon, adamw = train.make_optimizers(model, cfg)
    if kind == "Muon":
        return [muon, adamw]

    hidden = torch.optim.AdamW(
        muon.param_groups[0]["params"],
        lr=cfg.lr_adamw,
        betas=(0.9, 0.95),
        weight_decay=cfg.weight_decay,
    )
    hidden.param_groups[0]["peak_lr"] = cfg.lr_adamw
    return [hidden, adamw]


class Run(NamedTuple):
    """One training of a model."""

    val_loss: float  # nats per byte
    seconds_per_step: float


def train_model(data, gpt_cfg, cfg, schedule, kind, device):
    """train.py's loop with one of SCHEDULES and one of OPTIMIZERS -> Run. cfg is a config of
    train.py."""
    torch.manual_seed(cfg.seed)
    model = GPT(gpt_cfg).to(device)
    optimizers = build_optimizers(model, cfg, kind)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    start = time.time()
    for step in range(cfg.steps):
        train.set_lr(optimizers, schedule_scale(step, schedule, cfg))
        x, y = train.get_batch(data.train_ids, data.starts, step, cfg, gpt_cfg.block_size)
        train.backward(model, x.to(device), y.to(device), cfg, nullcontext, scaler)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    seconds = time.time() - start

    val = train.evaluate(model, data.val_ids, data.edges, data.val_bytes, device, nullcontext)
    return Run(val.loss, seconds / cfg.steps)


def best_rate(losses):
    """The rate whose mean over the seeds is lowest. losses: {rate: [one loss per seed]}"""
    return min(losses, key=lambda rate: mean(losses[rate]))


def compare(losses):
    """A sentence about two lists of losses, {name: [one loss per seed]}. Where their ranges
    overlap, there is no winner."""
    better, worse = sorted(losses, key=lambda name: mean(losses[name]))
    sentence = (
        f"{better} {mean(losses[better]):.3f}, {worse} {mean(losses[worse]):.3f} nats per byte"
    )
    if max(losses[better]) >= min(losses[worse]):
        sentence += ": no difference"
    return sentence


def draw_losses(ax, losses, label):
    """The mean over the seeds at each rate, with its range. losses: {rate: [one loss per seed]}"""
    rates = sorted(losses)
    means = [mean(losses[rate]) for rate in rates]
    lowest = [min(losses[rate]) for rate in rates]
    highest = [max(losses[rate]) for rate in rates]
    (line,) = ax.plot(rates, means, "o-", label=label)
    ax.vlines(rates, lowest, highest, color=line.get_color())
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    ax.set_xlabel("peak learning rate, times train.py's")
    ax.set_ylabel("validation loss, nats per byte")
    ax.legend(fontsize=9)


def draw_schedules(title, losses, cfg, path):
    """Above: the schedules. Below: what they reach at each rate.

    losses: {schedule: {rate: [one loss per seed]}}, cfg: a config of train.py
    """
    fig, (above, below) = figure(title, rows=2, height=7)
    for schedule in losses:
        scales = [schedule_scale(step, schedule, cfg) for step in range(cfg.steps)]
        above.plot(scales, label=schedule)
        draw_losses(below, losses[schedule], schedule)
    above.set(xlabel="step", ylabel="share of the peak learning rate")
    save_figure(fig, path)


def draw_optimizers(title, losses, seconds, path):
    """What the optimizers reach at each rate.

    losses: {optimizer: {rate: [one loss per seed]}}, seconds: {optimizer: seconds per step}
    """
    fig, ax = figure(title)
    for kind in losses:
        draw_losses(ax, losses[kind], f"{kind}, {1000 * seconds[kind]:.0f} ms a step")
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    rates = parse_rates(cfg.rates)
    middle_rates = rates[1:-1]
    gpt_cfg = GPTConfig(
        vocab_size=512, block_size=72, n_layer=2, n_head=2, n_kv_head=1, n_embd=cfg.n_embd
    )
    recipe = train.Config(data=cfg.data, steps=cfg.steps, batch_size=cfg.batch_size)
    data = train.load_data(recipe, gpt_cfg)
    out = output_folder(cfg)

    # What is compared: all schedules with Muon, and both optimizers with train.py's schedule.
    arms = []
    for schedule in SCHEDULES:
        for rate in rates if schedule == WSD else middle_rates:
            arms.append((schedule, "Muon", rate))
    for rate in rates:
        arms.append((WSD, "AdamW", rate))

    # Train every arm with every seed.
    losses = {}  # (schedule, optimizer) -> {rate: [one loss per seed]}
    seconds = {kind: [] for kind in OPTIMIZERS}
    log = Log(out, len(arms) * cfg.seeds, name="demo_schedule")
    for i, (schedule, kind, rate) in enumerate(arms):
        by_rate = losses.setdefault((schedule, kind), {})
        by_rate[rate] = []
        for j in range(cfg.seeds):
            arm_cfg = replace(
                recipe,
                lr=rate * recipe.lr,
                lr_adamw=rate * recipe.lr_adamw,
                seed=cfg.seed + j,
            )
            run = train_model(data, gpt_cfg, arm_cfg, schedule, kind, device)
            by_rate[rate].append(run.val_loss)
            seconds[kind].append(run.seconds_per_step)
            log(
                i * cfg.seeds + j,
                schedule=schedule,
                optimizer=kind,
                rate=rate,
                seed=arm_cfg.seed,
                val_loss=run.val_loss,
            )

    # The schedules, each at its best rate
    schedule_losses = {}
    best_losses = {}
    for schedule in SCHEDULES:
        by_rate = losses[schedule, "Muon"]
        schedule_losses[schedule] = {rate: by_rate[rate] for rate in middle_rates}
        best_losses[schedule] = by_rate[best_rate(schedule_losses[schedule])]
        print(f"{schedule:20} at its best rate: {mean(best_losses[schedule]):.4f} nats per byte")
    falling = [schedule for schedule in SCHEDULES if schedule != "none"]
    best_falling = min(falling, key=lambda schedule: mean(best_losses[schedule]))
    pair = {name: best_losses[name] for name in (best_falling, "none")}
    title = f"Each schedule at its best rate:\n{compare(pair)}"
    print(title)
    draw_schedules(title, schedule_losses, recipe, out / "demo_schedule.png")

    # The optimizers, each at its best rate
    optimizer_losses = {}
    optimizer_rates = {}
    best_losses = {}
    seconds_per_step = {}
    for kind in OPTIMIZERS:
        optimizer_losses[kind] = losses[WSD, kind]
        optimizer_rates[kind] = best_rate(losses[WSD, kind])
        best_losses[kind] = losses[WSD, kind][optimizer_rates[kind]]
        seconds_per_step[kind] = median(seconds[kind])
        if optimizer_rates[kind] in (rates[0], rates[-1]):
            print(
                f"{kind} is best at the last of its rates, {optimizer_rates[kind]:g}: "
                "it is not tuned yet, ask for more --rates"
            )
    title = f"Each at its best rate: {compare(best_losses)}"
    print(title)
    draw_optimizers(title, optimizer_losses, seconds_per_step, out / "demo_schedule_muon.png")

    all_losses = {}
    for (schedule, kind), by_rate in losses.items():
        for rate, values in by_rate.items():
            all_losses[f"{schedule}, {kind}, {rate:g}"] = values
    save_metrics(
        out,
        name="demo_schedule",
        best_schedule=best_falling,
        best_rate=optimizer_rates,
        seconds_per_step=seconds_per_step,
        val_loss=all_losses,
        seed=cfg.seed,
        seeds=cfg.seeds,
    )
