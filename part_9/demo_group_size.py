"""
Part 9: how large should a group be? 2, 4, 8 or 16 answers to each prompt, and the same number of
answers in all.

    python part_9/demo_group_size.py              one seed
    python part_9/demo_group_size.py --seeds=3    three seeds: how much is chance?

A large group knows its mean better, and it happens less often that all its answers get the same
reward and teach nothing. With small groups there are more prompts in a batch.

The figure shows pass@k, the probability that at least one of k answers is right (Chen et al. 2021).
It also shows what it means to divide by the group's standard deviation (Shao et al. 2024): prompts
that are nearly always or nearly never solved get more weight (Liu et al. 2025, section 3.1).

The runs are shorter than those of train_grpo.py, and all prompts ask for stories.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

import train_grpo
from model import GPT
from shared import (
    Log,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    require,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import Tokenizer

# What is compared: {name: options of train_grpo.py}
SIZES = ["2", "4", "8", "16"]
RUNS = {
    "2": {"group": 2},
    "4": {"group": 4},
    "8": {"group": 8},
    "16": {"group": 16},
    "8, std": {"group": 8, "scale_std": True},
}

MAX_K = 16  # pass@1 to pass@16


@dataclass
class Config:
    init: str = ""  # checkpoint of the SFT model; empty: part_6/out/sft.pt
    steps: int = 15  # GRPO iterations of each run
    batch_size: int = 128  # answers per iteration, divisible by 32
    prompts: int = 48  # held-out stories for pass@k
    samples: int = 32  # answers to each of these stories, divisible by 8 and at least 16
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "prompts", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.batch_size % 32 == 0, f"batch_size={self.batch_size} must be divisible by 32"
        assert self.samples >= MAX_K and self.samples % 8 == 0, (
            f"samples={self.samples} must be divisible by 8 and at least {MAX_K}"
        )


# pass@k -------------------------------------------------------------------------------------------


def pass_at(n, c, k):
    """pass@k from n answers of which c are right: the probability that k of the n answers, drawn
    without replacement, contain a right one (Chen et al. 2021, eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def solve(policy, tok, records, cfg, device):
    """cfg.samples answers to each record -> whether they pass all checks, 1.0 or 0.0, (prompts,
    samples). Every policy gets the same random numbers."""
    torch.manual_seed(cfg.seed)
    repeated = []
    for record in records:
        repeated.extend([record] * cfg.samples)

    passed = []
    for i in range(0, len(repeated), 128):
        part = repeated[i : i + 128]
        batch = train_grpo.rollout(policy, tok, part, train_grpo.Config(), device)
        passed += train_grpo.passed(part, train_grpo.answers_of(batch, tok))
    return torch.tensor(passed).view(len(records), cfg.samples)


class Curve(NamedTuple):
    pass_at: torch.Tensor  # (MAX_K,) pass@1 to pass@MAX_K, the mean over the prompts
    half_width: float  # of the 95 % interval of pass@1, from its spread over the prompts


def pass_curve(passed):
    """What solve returned, (prompts, samples) -> Curve."""
    samples = passed.size(1)
    rows = []
    for right in passed.sum(dim=1).int().tolist():
        rows.append([pass_at(samples, right, k) for k in range(1, MAX_K + 1)])
    rows = torch.tensor(rows)  # (prompts, MAX_K)

    # The answers to one prompt are alike, so the spread over prompts is what counts.
    half_width = 1.96 * rows[:, 0].std().item() / len(rows) ** 0.5
    return Curve(rows.mean(dim=0), half_width)


# the runs -----------------------------------------------------------------------------------------


def train(sft, tok, records, run, device, log, first_step, name):
    """The training loop of train_grpo.py from the SFT model -> the policy, and the mean share of
    groups whose rewards are all equal."""
    policy = GPT.load(sft).to(device)
    reference = GPT.load(sft).to(device).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.lr, eps=1e-5, weight_decay=0.0)
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    records = [records[i] for i in torch.randperm(len(records), generator=generator)]

    equal_shares = []
    for step in range(run.steps):
        optimizer.param_groups[0]["lr"] = run.lr * train_grpo.lr_scale(step, run)
        asked = train_grpo.get_batch(records, step, run)
        batch = train_grpo.rollout(policy, tok, asked, run, device)
        passed = train_grpo.passed(asked, train_grpo.answers_of(batch, tok))
        reward = torch.tensor(passed, device=device)
        advantages = train_grpo.group_advantage(reward, run.group, run.scale_std)
        train_grpo.learn(policy, reference, optimizer, batch, advantages, run, generator)

        equal_groups = (advantages.view(-1, run.group) == 0).all(dim=1)
        equal_shares.append(equal_groups.float().mean().item())
        log(
            first_step + step,
            run=name,
            reward=reward.mean().item(),
            equal_groups=equal_shares[-1],
        )
    return policy, sum(equal_shares) / len(equal_shares)


class Weights(NamedTuple):
    weight: torch.Tensor  # (9,) mean |advantage| by right answers, relative to the largest, or NaN
    share: torch.Tensor  # (9,) share of the groups with so many right answers
    extremes: float  # share of all weight that lies on groups with 1 or 7 right answers


def prompt_weights(passed, scale_std):
    """How much weight does a prompt get? By the number of right answers in its group of 8
    -> Weights."""
    reward = passed.view(-1, 8)  # (groups, 8)
    advantages = train_grpo.group_advantage(reward.flatten(), 8, scale_std)
    weight = advantages.view(-1, 8).abs().mean(dim=1)  # (groups,)

    right = F.one_hot(reward.sum(dim=1).long(), 9).float()  # (groups, 9)
    total = weight @ right  # (9,)
    count = right.sum(dim=0)  # (9,)
    mean = total / count  # NaN where no group had so many right answers
    largest = mean.nan_to_num().max()
    extremes = (total[1] + total[7]) / total.sum()
    return Weights(mean / largest, count / count.sum(), extremes.item())


# the figure ---------------------------------------------------------------------------------------


def draw(title, curves, equal_groups, plain, scaled, path):
    """curves: {name: [Curve of each seed]}, equal_groups: {name: [share of each seed]}."""
    fig, axes = figure(title, rows=2, columns=2, height=7.5)

    # pass@1 with a dot per seed, and pass@k
    left, right = axes[0]
    for i, (name, results) in enumerate(curves.items()):
        mean = torch.stack([curve.pass_at for curve in results]).mean(dim=0)
        colour = "gray" if name == "SFT" else f"C{i - 1}"
        left.bar(name, mean[0].item(), color=colour)
        for curve in results:
            left.plot(name, curve.pass_at[0].item(), "k.")
        right.plot(range(1, MAX_K + 1), mean, color=colour, label=name)
    left.set(title="one answer", xlabel="group size", ylabel="pass@1, held out")
    right.set(title="k answers", xlabel="k", ylabel="pass@k, held out")
    right.set(ylim=(0, 1), xticks=(1, 4, 8, 16))
    right.legend(fontsize=8)

    # groups that teach nothing, and the weight of a prompt
    left, right = axes[1]
    for i, (name, shares) in enumerate(equal_groups.items()):
        left.bar(name, sum(shares) / len(shares), color=f"C{i}")
    left.set(title="groups that teach nothing", xlabel="group size")
    left.set(ylabel="share with equal rewards")
    right.bar(range(9), plain.share, color="lightgray", label="share of the SFT model's groups")
    right.plot(range(9), plain.weight, "o-", label="reward - mean")
    right.plot(range(9), scaled.weight, "s--", label="(reward - mean) / deviation")
    right.set(title="weight of a prompt", xlabel="right answers of 8")
    right.set(ylabel="mean |advantage| / largest", ylim=(0, 1.6))
    right.legend(fontsize=8, loc="upper center")
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # the SFT model, and prompts that ask for stories
    sft = load_checkpoint(cfg.init or require("part_6/out/sft.pt"), "sft")
    tok = Tokenizer.load(sft["tokenizer"])
    reference = GPT.load(sft).to(device).requires_grad_(False)
    out = output_folder(cfg)
    defaults = train_grpo.Config()
    stories = []
    for records in train_grpo.load_data(defaults):
        records = [record for record in records if record["task"] == "story"]
        stories.append(
            train_grpo.encode_records(
                records, tok, reference.cfg.block_size, defaults.max_new_tokens
            )
        )
    train_stories, val_stories = stories
    val_stories = val_stories[: cfg.prompts]

    # the SFT model, and then every run from it
    sft_passed = solve(reference, tok, val_stories, cfg, device)
    curves = {"SFT": [pass_curve(sft_passed)]}
    curves |= {name: [] for name in RUNS}
    equal_groups = {name: [] for name in RUNS}
    log = Log(out, cfg.seeds * len(RUNS) * cfg.steps, name="demo_group_size")
    first_step = 0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for name, options in RUNS.items():
            run = train_grpo.Config(
                steps=cfg.steps, batch_size=cfg.batch_size, seed=seed, **options
            )
            policy, share = train(sft, tok, train_stories, run, device, log, first_step, name)
            curves[name].append(pass_curve(solve(policy, tok, val_stories, cfg, device)))
            equal_groups[name].append(share)
            first_step += cfg.steps

    # pass@1: its mean, and its range over the seeds, or its interval where there is only one
    pass_1 = {}
    pass_16 = {}
    for name, results in curves.items():
        values = [curve.pass_at[0].item() for curve in results]
        half_width = results[0].half_width if len(results) == 1 else 0.0
        pass_1[name] = (
            sum(values) / len(values),
            min(values) - half_width,
            max(values) + half_width,
        )
        pass_16[name] = [curve.pass_at[MAX_K - 1].item() for curve in results]
        mean, low, high = pass_1[name]
        print(
            f"{name:6}  pass@1 {mean:.3f}, from {low:.3f} to {high:.3f}; "
            f"pass@16 {sum(pass_16[name]) / len(results):.3f}"
        )

    # what it says: is the best size above the worst by more than chance?
    def mean_pass_1(name):
        return pass_1[name][0]

    best = max(SIZES, key=mean_pass_1)
    worst = min(SIZES, key=mean_pass_1)
    remark = ""
    if pass_1[best][1] <= pass_1[worst][2]:
        remark = " (no difference)"
    plain = prompt_weights(sft_passed, scale_std=False)
    scaled = prompt_weights(sft_passed, scale_std=True)
    title = (
        f"pass@1: SFT {mean_pass_1('SFT'):.2f}, groups of {best} {mean_pass_1(best):.2f}, "
        f"of {worst} {mean_pass_1(worst):.2f}{remark}\n"
        f"prompts with 1 or 7 right answers of 8 have {plain.extremes:.0%} of all weight, "
        f"and {scaled.extremes:.0%} after dividing"
    )
    print(title)
    save_metrics(
        out,
        name="demo_group_size",
        pass_at_1=pass_1,
        pass_at_16=pass_16,
        equal_groups=equal_groups,
        weight_of_extremes=[plain.extremes, scaled.extremes],
        seconds=log.seconds,
        seeds=cfg.seeds,
    )
    draw(title, curves, equal_groups, plain, scaled, out / "demo_group_size.png")
