"""
Part 6: does the order of the demonstrations matter? Easy first, random or hardest first, on clean
and on noisy demonstrations, with a large and with a small budget.

    python part_6/demo_curriculum.py
    python part_6/demo_curriculum.py --seeds=3

Bengio et al. 2009 proposed to begin with easy examples. Wu, Dyer and Neyshabur 2021 ("When Do
Curricula Work?") tried all orders: random is as good, unless the budget is small or the labels are
noisy.

The demonstrations are stories. The level of a story is the number of things that its brief asks
for. Clean demonstrations pass all of their own checks. Noisy ones are as many, drawn from all
demonstrations, of which seven in ten fail a check.

A sorted order is walked through from end to end whatever the budget is, and each budget has a
complete learning rate schedule. A small budget leaves out demonstrations evenly.

The trainings are short: 192 steps of 8 demonstrations at most, instead of train_sft.py's 440 of 32.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from model import GPT
from shared import (
    Log,
    autocast_for,
    fail,
    figure,
    judge,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    pick_dtype,
    require,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import Tokenizer
from train_sft import Config as SFTConfig
from train_sft import (
    encode_records,
    get_batch,
    load_data,
    lr_scale,
    make_optimizers,
    order,
    respond,
    set_lr,
)

ORDERS = {"easy_first": "easy first", "random": "random", "anti": "hardest first"}
KINDS = ["clean", "noisy"]  # of demonstrations


@dataclass
class Config:
    init: str = "part_4/out/base.pt"  # checkpoint of the base model

    # stories or a JSONL file with instruction, input, output, task, level and check
    data: str = "stories"

    block_size: int = 128  # longest prompt and answer, in tokens
    steps: int = 192  # optimizer steps of the large budget
    small: float = 0.25  # the small budget, as a share of the large one
    batch_size: int = 8  # demonstrations per step
    prompts: int = 384  # held-out stories that each model writes and that are judged
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "prompts", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert 0 < self.small < 1, f"small={self.small} must be between 0 and 1"


# data ---------------------------------------------------------------------------------------------


def checked_stories(records):
    """The stories with a check: only these can be judged."""
    stories = []
    for record in records:
        if record.get("check") and record.get("task", "story") == "story":
            stories.append(record)
    return stories


def clean_and_noisy(records, seed):
    """-> a dict: "clean" are the demonstrations that pass their own checks, and "noisy" are as
    many, drawn from all."""
    clean = [record for record in records if judge(record, record["output"]).passed]
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(len(records), generator=generator)[: len(clean)].tolist()
    noisy = [records[i] for i in indices]
    return {"clean": clean, "noisy": noisy}


# short trainings ----------------------------------------------------------------------------------


def train(model, records, sft_cfg, device, autocast, log, first_step, kind):
    """train_sft.py's loop without evaluations, in the order of sft_cfg.curriculum. Several runs
    share one log, in which this one's steps count from first_step."""
    optimizers = make_optimizers(model, sft_cfg)
    records = [records[i] for i in order(records, sft_cfg)]
    for step in range(sft_cfg.steps):
        set_lr(optimizers, lr_scale(step, sft_cfg))

        inputs, targets = get_batch(records, step, sft_cfg)
        with autocast():
            _, loss = model(inputs.to(device), targets.to(device))
        loss.backward()

        torch.nn.utils.clip_grad_norm_(model.parameters(), sft_cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log(first_step + step, kind=kind, order=sft_cfg.curriculum, loss=loss.item())


def gold(model, tok, records, max_new_tokens):
    """The share of sampled answers that pass all checks."""
    answers = respond(model, tok, records, max_new_tokens)
    passed = []
    for record, answer in zip(records, answers):
        passed.append(judge(record, answer.text, answer.ended).passed)
    return float(np.mean(passed))


# comparing orders ---------------------------------------------------------------------------------


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def interval(shares, n):
    """Shares of n answers, one share per seed -> Interval.

    It is the range of the seeds, but never less than the 95 % interval of a share of all these
    answers: a few lucky answers must not make a difference between two trainings.
    """
    mean = float(np.mean(shares))
    variance = max(mean * (1 - mean), 1 / n)  # at 0 and 1 the formula would claim certainty
    half = 1.96 * (variance / (n * len(shares))) ** 0.5
    low = max(0.0, min(*shares, mean - half))
    high = min(1.0, max(*shares, mean + half))
    return Interval(mean, low, high)


def verdict(shares, reference, n):
    """Is one order better than another? The shares of both, one per seed -> "better", "worse", or
    "no difference" if their intervals overlap."""
    a = interval(shares, n)
    b = interval(reference, n)
    if a.low > b.high:
        return "better"
    if a.high < b.low:
        return "worse"
    return "no difference"


# figure -------------------------------------------------------------------------------------------


def draw(shares, budgets, n, title, path):
    """shares[kind, steps, order] has one number per seed. One panel for clean and one for noisy
    demonstrations, with a bar for each budget and order. Dots are seeds."""
    fig, axes = figure(title, columns=2, height=4.2)
    highest = max(max(values) for values in shares.values())
    for ax, kind in zip(axes, KINDS):
        for i, (name, label) in enumerate(ORDERS.items()):
            positions = np.arange(len(budgets)) + 0.28 * (i - 1)
            intervals = [interval(shares[kind, steps, name], n) for steps in budgets]
            means = np.array([one.mean for one in intervals])
            below = means - [one.low for one in intervals]
            above = [one.high for one in intervals] - means
            ax.bar(positions, means, 0.26, yerr=[below, above], capsize=3, alpha=0.8, label=label)
            for x, steps in zip(positions, budgets):
                values = shares[kind, steps, name]
                ax.plot([x] * len(values), values, "k.", markersize=4)
        ax.set_xticks(range(len(budgets)), [f"{steps} steps" for steps in budgets])
        ax.set(xlabel="budget", ylabel="share of stories that pass")
        ax.set(ylim=(0, 1.1 * max(highest, 0.1) + 0.05))
        ax.set_title(f"{kind} demonstrations", fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, title="order", loc="outside lower center", ncols=3)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    autocast = autocast_for(device, pick_dtype("", device))

    # data first: a broken file must not wait for a base model to be built
    train_records, val_records = load_data(cfg)
    train_records = checked_stories(train_records)
    val_records = checked_stories(val_records)
    if not train_records or not val_records:
        fail(f"--data={cfg.data} needs stories with checks, for training and for validation")

    # model
    base = load_checkpoint(require(cfg.init), "base")
    base["gpt_config"]["block_size"] = cfg.block_size
    tok = Tokenizer.load(base["tokenizer"])
    train_records = encode_records(train_records, tok, cfg.block_size)
    val_records = encode_records(val_records, tok, cfg.block_size)[: cfg.prompts]
    demonstrations = clean_and_noisy(train_records, cfg.seed)
    n_clean = len(demonstrations["clean"])
    if n_clean == 0:
        fail(f"--data={cfg.data}: no demonstration passes its own checks")
    print(f"{n_clean:,} of {len(train_records):,} demonstrations are clean")
    out = output_folder(cfg)

    # twelve trainings per seed
    budgets = [max(1, round(cfg.small * cfg.steps)), cfg.steps]
    total_steps = cfg.seeds * len(KINDS) * len(ORDERS) * sum(budgets)
    log = Log(out, total_steps, name="demo_curriculum")
    shares = {}
    for kind in KINDS:
        for steps in budgets:
            for name in ORDERS:
                shares[kind, steps, name] = []
    first_step = 0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for kind, steps, name in shares:
            sft_cfg = SFTConfig(steps=steps, batch_size=cfg.batch_size, curriculum=name, seed=seed)
            model = GPT.load(base).to(device)
            records = demonstrations[kind]
            train(model, records, sft_cfg, device, autocast, log, first_step, kind)
            first_step += steps

            # All models draw the same random numbers when they answer.
            torch.manual_seed(seed)
            share = gold(model, tok, val_records, sft_cfg.max_new_tokens)
            shares[kind, steps, name].append(share)

    # how do the two sorted orders compare with random?
    n = len(val_records)
    verdicts = {"easy_first": [], "anti": []}
    for kind in KINDS:
        for steps in budgets:
            texts = []
            for name in ORDERS:
                one = interval(shares[kind, steps, name], n)
                texts.append(f"{name} {one.mean:.3f} ({one.low:.3f} to {one.high:.3f})")
            print(f"{kind}, {steps:4} steps   {'   '.join(texts)}")
            for name in verdicts:
                random_shares = shares[kind, steps, "random"]
                verdicts[name].append(verdict(shares[kind, steps, name], random_shares, n))

    mean = {}
    for kind in KINDS:
        mean[kind] = np.mean([values for key, values in shares.items() if key[0] == kind])
    clean_minus_noisy = mean["clean"] - mean["noisy"]
    easy = verdicts["easy_first"]
    hard = verdicts["anti"]
    title = (
        "Compared with random order, in 4 settings:\n"
        f"easy first is better in {easy.count('better')} and worse in {easy.count('worse')}, "
        f"hardest first better in {hard.count('better')} and worse in {hard.count('worse')}\n"
        f"Stories that pass, clean minus noisy demonstrations: {clean_minus_noisy:+.2f}"
    )
    print(title)
    draw(shares, budgets, n, title, out / "demo_curriculum.png")

    numbers = {}
    for (kind, steps, name), values in shares.items():
        numbers[f"{kind}_{steps}_steps_{name}"] = values
    save_metrics(
        out,
        name="demo_curriculum",
        clean_minus_noisy=clean_minus_noisy,
        **numbers,
        seeds=cfg.seeds,
        seed=cfg.seed,
    )
