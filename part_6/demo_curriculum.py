"""
Part 6 - the order of the demonstrations: easy first, random or hardest first, on clean and noisy ones, in two budgets.

    python part_6/demo_curriculum.py
    python part_6/demo_curriculum.py --seeds=3

Bengio et al. 2009 proposed easy examples first. Wu, Dyer and Neyshabur 2021 ("When Do Curricula Work?") tried all
orders: random is as good, unless the budget is small or the labels are noisy. Here: stories, whose level is the number
of things that the brief asks for. Clean demonstrations pass shared.judge; noisy ones are as many, drawn from all.
Reduced: 192 steps of 8 at full budget instead of 400 of 32. Every order sees each demonstration at most once; a sorted
one is walked through from end to end in any budget, its own learning rate schedule included.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass

import numpy as np
import torch

from model import GPT
from shared import Log, cli, fail, figure, judge, load_checkpoint, require, save_figure, save_metrics, setup
from tokenizer import Tokenizer
from train_sft import Config as SFTConfig, get_batch, load_data, lr_scale, make_optimizers, order, respond

ORDERS = ["easy_first", "random", "anti"]

@dataclass
class Config:
    init: str = "part_4/out/base.pt"  # the base model's checkpoint
    data: str = "stories"  # or the path of a JSONL file with instruction, input, output, task, level and check
    block_size: int = 128  # longest prompt and answer, in tokens
    steps: int = 192  # optimizer steps of the full budget
    small: float = 0.25  # the small budget, as a share of it
    batch_size: int = 8  # demonstrations per step
    prompts: int = 384  # held-out stories that are sampled and judged per training
    seeds: int = 1  # how many seeds; the README quotes 3
    seed: int = 0  # the first of them
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script
    def __post_init__(self):
        assert min(self.steps, self.batch_size, self.prompts, self.seeds) > 0, "steps, batch_size, prompts, seeds: >= 1"
        assert 0 < self.small <= 1, f"small={self.small} must be a share of the steps"

def clean_and_noisy(records, seed):
    """-> the demonstrations that pass their own checks, and as many drawn from all."""
    clean = [r for r in records if judge(r, r["output"])[2]]
    picked = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[:len(clean)]
    return clean, [records[i] for i in picked.tolist()]

def train(model, records, sft, device, autocast, log, first):
    """SFT of `model`, in place, through `records` in the order of sft.curriculum."""
    optimizers, records = make_optimizers(model, sft), [records[i] for i in order(records, sft)]
    for step in range(sft.steps):
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * lr_scale(step, sft)
        x, y = get_batch(records, step, sft)
        with autocast():
            loss = model(x.to(device), y.to(device))[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), sft.grad_clip)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        log(first + step, order=sft.curriculum, loss=loss.item())

def gold(model, tok, records, sft):
    """The share of sampled answers that hold all checks."""
    answers = respond(model, tok, records, sft)
    return np.mean([judge(r, tok.decode(ids), ended)[2] for r, (ids, ended) in zip(records, answers)])

def interval(shares, n):
    """Shares of n answers, one per seed -> mean, low, high: the seeds' range, but never less than sampling alone
    leaves open (95 %): two trainings on one seed are not told apart by a few lucky answers."""
    mean = np.mean(shares)
    half = 1.96 * (max(mean * (1 - mean), 1 / n) / (n * len(shares))) ** 0.5
    return mean, max(0, min(*shares, mean - half)), min(1, max(*shares, mean + half))

def verdict(a, b, n):
    """Shares of two orders, a value per seed -> "better", "worse" or "no difference": their intervals overlap."""
    (mean_a, low_a, high_a), (mean_b, low_b, high_b) = interval(a, n), interval(b, n)
    return "better" if low_a > high_b else "worse" if high_a < low_b else "no difference"

def draw(found, budgets, n, said, path):
    """found (seeds, clean or noisy, budget, order): a panel each for clean and noisy, a bar per budget and order."""
    fig, axes = figure(said, columns=2, height=4.2)
    for kind, ax in enumerate(axes):
        for i, name in enumerate(ORDERS):
            mean, low, high = np.array([interval(found[:, kind, b, i], n) for b in range(2)]).T
            x = np.arange(2) + 0.28 * (i - 1)
            ax.bar(x, mean, 0.26, yerr=[mean - low, high - mean], capsize=3, alpha=0.8, label=name)
            ax.plot(np.tile(x, (len(found), 1)), found[:, kind, :, i], "k.", markersize=4)
        ax.set_xticks([0, 1], [f"{steps} steps" for steps in budgets])
        ax.set(xlabel="budget", ylabel="share of stories that pass", ylim=(0, 1.1 * max(found.max(), 0.1) + 0.05))
        ax.set_title(f"{('clean', 'noisy')[kind]} demonstrations", fontsize=11)
    fig.legend(*ax.get_legend_handles_labels(), title="order", loc="outside lower center", ncols=3)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, autocast = setup(cfg)
    base = load_checkpoint(require(cfg.init), "base")
    tok = Tokenizer.load(base["tokenizer"])
    base["gpt_config"]["block_size"] = cfg.block_size
    splits = load_data(cfg, tok, cfg.block_size)
    train_records, val = ([r for r in part if "check" in r and r.get("task", "story") == "story"] for part in splits)
    val = val[:cfg.prompts]
    sets = clean_and_noisy(train_records, cfg.seed)
    sets[0] and val or fail(f"--data={cfg.data}: stories are wanted whose own checks hold, and some to validate on")
    print(f"{len(sets[0]):,} of {len(train_records):,} demonstrations are clean, {len(val)} held-out stories to write")

    # twelve trainings per seed
    budgets = [max(1, round(cfg.small * cfg.steps)), cfg.steps]
    log, first = Log(cfg, 6 * cfg.seeds * sum(budgets), name="demo_curriculum"), 0
    found = np.zeros((cfg.seeds, 2, 2, 3))
    for seed, kind, b, i in np.ndindex(cfg.seeds, 2, 2, 3):
        sft = SFTConfig(steps=budgets[b], batch_size=cfg.batch_size, curriculum=ORDERS[i], seed=cfg.seed + seed)
        model = GPT.load(base).to(device)
        train(model, sets[kind], sft, device, autocast, log, first)
        torch.manual_seed(sft.seed)
        found[seed, kind, b, i], first = gold(model, tok, val, sft), first + budgets[b]

    # what came out
    words = {0: [], 2: []}  # how easy first and hardest first compare with random
    for kind, b in np.ndindex(2, 2):
        for i in words:
            words[i].append(verdict(found[:, kind, b, i], found[:, kind, b, 1], len(val)))
        shown = "   ".join("{} {:.3f} ({:.3f} to {:.3f})".format(name, *interval(found[:, kind, b, i], len(val)))
                           for i, name in enumerate(ORDERS))
        print(f"{('clean', 'noisy')[kind]}, {budgets[b]:4} steps   {shown}")
    quality = found[:, 0].mean() - found[:, 1].mean()
    said = ("In 4 settings, easy first is better than random in {}, worse in {};\nhardest first better in {}, worse in "
            "{}; clean demonstrations: {:+.2f} of the stories pass").format(
        *(words[i].count(w) for i in words for w in ("better", "worse")), quality)
    print(said)
    draw(found, budgets, len(val), said, Path(cfg.out) / "demo_curriculum.png")
    numbers = {f"{('clean', 'noisy')[kind]}_{budgets[b]}_steps_{name}": found[:, kind, b, i].tolist()
               for kind, b in np.ndindex(2, 2) for i, name in enumerate(ORDERS)}
    save_metrics(cfg, name="demo_curriculum", clean_minus_noisy=quality, **numbers, seeds=cfg.seeds, seed=cfg.seed)
