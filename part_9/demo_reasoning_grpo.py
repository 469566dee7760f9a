"""
Part 9, reinforcement learning with a verifiable reward: what does it add to a model that thinks
before it answers? When only the answer is rewarded, do the steps stay right?

    python part_9/demo_reasoning_grpo.py              one seed
    python part_9/demo_reasoning_grpo.py --seeds=3    three seeds: how much is chance?

Three runs of GRPO start from the models of demo_reasoning.py, which are trained first if they are
missing:

    in steps, outcome reward    1 if the answer is right (DeepSeek-AI 2025, "R1")
    in steps, process reward    the share of right steps, the answer being one of them
                                (Lightman et al. 2023 reward steps, too, by a learned model)
    at once, outcome reward     the same reward for a model that answers at once

pass@1 is the share of right answers. pass@16 is the share of problems for which at least one of 16
answers is right (Chen et al. 2021, "Codex"). If training raises pass@1 but not pass@16, it made the
model choose better among answers that it could already give (Yue et al. 2025).

On real data nobody can check all the steps. Here the judge knows them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass
from typing import NamedTuple

import torch

import train_grpo
from demo_reasoning import (
    IN_STEPS,
    LONGEST_ANSWER,
    SAME_TOKENS,
    Samples,
    at_once,
    build_solver,
    by_level,
    examination,
    load_problems,
    range_text,
    sample,
    spread,
)
from model import GPT
from shared import (
    figure,
    judge,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
)

OUTCOME = "in steps, outcome reward"
PROCESS = "in steps, process reward"
AT_ONCE = "at once, outcome reward"
ARMS = {OUTCOME: IN_STEPS, PROCESS: IN_STEPS, AT_ONCE: SAME_TOKENS}

SAMPLES = 16  # answers to each held-out problem, for pass@1 and pass@16
LEVEL = 3  # number of operations of the problems that the figure and the claims are about


@dataclass
class Config:
    steps: int = 60  # iterations of GRPO: each samples answers, scores them and updates the policy
    batch_size: int = 128  # answers per iteration
    group: int = 8  # answers per problem
    minibatches: int = 2  # updates per iteration
    lr: float = 6e-4  # peak of AdamW's learning rate, which rises and falls as in train_grpo.py
    prompts: int = 20  # held-out problems of each number of operations
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.group > 1, f"group={self.group} must be at least 2: answers are compared"
        parts = self.group * self.minibatches
        assert self.batch_size % parts == 0, (
            f"batch_size={self.batch_size} must be divisible by group * minibatches = {parts}"
        )


# rewards ------------------------------------------------------------------------------------------


def reward_of(record, answer, process):
    """The reward of one answer, from 0 to 1.

    Outcome: is the number right? Process: the share of right steps, the number being one of them.
    """
    verdict = judge(record, answer.text, answer.ended)
    if not process:
        return float(verdict.passed)
    parts = [*verdict.steps, verdict.passed]
    return sum(parts) / len(parts)


# training and examination -------------------------------------------------------------------------


class Score(NamedTuple):
    """What 16 answers to each problem of one kind say about a model."""

    pass_1: float  # share of right answers
    pass_16: float  # share of problems with at least one right answer
    steps_right: float  # share of the right answers whose steps are all right
    length: float  # tokens per answer


def score(records, samples: Samples, level):
    """The answers to the problems with this number of operations -> Score."""
    rows = [i for i, record in enumerate(records) if record["level"] == level]
    right = samples.right[rows]
    steps_right = samples.steps_right[rows] & right
    return Score(
        pass_1=right.float().mean().item(),
        pass_16=right.any(dim=1).float().mean().item(),
        steps_right=(steps_right.sum() / right.sum().clamp(min=1)).item(),
        length=samples.length[rows].float().mean().item(),
    )


def train_policy(solver, records, process, cfg, seed, device):
    """GRPO on these problems, in place -> one dict of numbers for each iteration."""
    run = train_grpo.Config(
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        group=cfg.group,
        minibatches=cfg.minibatches,
        max_new_tokens=LONGEST_ANSWER,
        lr=cfg.lr,
        seed=seed,
    )
    policy, tok = solver
    reference = GPT.load(policy.to_checkpoint()).to(device).requires_grad_(False)
    records = train_grpo.encode_records(records, tok, policy.cfg.block_size, LONGEST_ANSWER)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, eps=1e-5, weight_decay=0.0)

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    log = []
    for step in range(cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * train_grpo.lr_scale(step, run)

        # rollout and reward
        batch_records = train_grpo.get_batch(records, step, run)
        batch = train_grpo.rollout(policy, tok, batch_records, run, device)
        answers = train_grpo.answers_of(batch, tok)
        pairs = list(zip(batch_records, answers))
        rewards = [reward_of(record, answer, process) for record, answer in pairs]

        # update
        advantages = train_grpo.group_advantage(
            torch.tensor(rewards, device=device), cfg.group, run.scale_std
        )
        stats = train_grpo.learn(policy, reference, optimizer, batch, advantages, run, generator)

        # report: of the right answers, how many have right steps throughout?
        verdicts = [judge(record, answer.text, answer.ended) for record, answer in pairs]
        right = [verdict for verdict in verdicts if verdict.passed]
        line = {
            "right": len(right) / len(verdicts),
            "length": batch.mask.sum(dim=1).float().mean().item(),
            "kl": stats["kl"],
        }
        if right and right[0].steps is not None:
            line["steps_right"] = sum(all(verdict.steps) for verdict in right) / len(right)
        log.append(line)
        if step % 5 == 0 or step + 1 == cfg.steps:
            texts = [f"{name} {value:.3f}" for name, value in line.items()]
            print(f"    iteration {step:3}: " + "  ".join(texts), flush=True)
    return log


# the figure ---------------------------------------------------------------------------------------


def draw(title, results, logs, path):
    """Left: pass@1 and pass@16 before and after. Right: are the steps of right answers right?"""
    fig, (left, right) = figure(title, columns=2, height=4.6)

    # one pair of bars for pass@1 and one for pass@16, for each run
    names = list(ARMS)
    for i, name in enumerate(names):
        for j, measure in enumerate(["pass_1", "pass_16"]):
            for when, shift, colour in (("before", -0.2, "gray"), ("after", 0.2, f"C{j}")):
                values = [getattr(result, measure) for result in results[name][when]]
                mean = sum(values) / len(values)
                position = 2.4 * i + j + shift
                label = None
                if i == 0:
                    label = f"{measure.replace('_', '@')} {when} GRPO"
                left.bar(position, mean, width=0.38, color=colour, label=label)
                left.vlines(position, min(values), max(values), color="black")
    left.set(ylabel=f"share, problems of {LEVEL} operations", ylim=(0, 1.35))
    left.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    left.set_xticks([2.4 * i + 0.5 for i in range(len(names))])
    left.set_xticklabels([name.replace(", ", "\n").replace(" reward", "") for name in names])
    left.legend(fontsize=8, ncols=2, loc="upper center")

    # over training, the mean over the seeds and their range
    for i, name in enumerate([OUTCOME, PROCESS]):
        runs = [[line.get("steps_right", 0.0) for line in log] for log in logs[name]]
        means, lows, highs = spread(runs)
        iterations = range(len(means))
        right.plot(iterations, means, color=f"C{i}", label=name)
        right.fill_between(iterations, lows, highs, color=f"C{i}", alpha=0.2)
    right.set(xlabel="iteration of GRPO", ylabel="share of right answers with right steps")
    right.set(ylim=(0, 1.03))
    right.legend(fontsize=8, loc="lower right")
    save_figure(fig, path)


def finding(results):
    """The title of the figure."""
    before = [result.pass_1 for result in results[OUTCOME]["before"]]
    after = [result.pass_1 for result in results[OUTCOME]["after"]]
    steps_right = [result.steps_right for result in results[OUTCOME]["after"]]
    return (
        f"GRPO, answer rewarded, {LEVEL} operations: {range_text(before)} -> {range_text(after)} "
        f"right;\n{range_text(steps_right)} of the right answers have right steps throughout"
    )


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    out = output_folder(cfg)
    train = load_problems("problems")
    val = examination(cfg.prompts)

    results = {name: {"before": [], "after": []} for name in ARMS}
    levels = {name: {"before": [], "after": []} for name in ARMS}
    logs = {name: [] for name in ARMS}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for name, start in ARMS.items():
            print(f"seed {seed}, {name}", flush=True)
            solver = build_solver(start, seed, device)
            problems = train
            asked = val
            if name == AT_ONCE:
                problems = [at_once(record) for record in train]
                asked = [at_once(record) for record in val]

            # examine, train, examine again with the same random numbers
            for when in ("before", "after"):
                if when == "after":
                    log = train_policy(solver, problems, name == PROCESS, cfg, seed, device)
                    logs[name].append(log)
                torch.manual_seed(seed)
                samples = sample(solver, asked, SAMPLES, device)
                result = score(asked, samples, LEVEL)
                results[name][when].append(result)
                levels[name][when].append(by_level(asked, samples.right))
                print(
                    f"    {when:6}: pass@1 {result.pass_1:.2f}, pass@16 {result.pass_16:.2f}, "
                    f"steps right {result.steps_right:.2f}, {result.length:.0f} tokens",
                    flush=True,
                )

    # what came out
    print(f"\n{'problems of ' + str(LEVEL) + ' operations':28} pass@1  pass@16  tokens")
    for name in ARMS:
        for when in ("before", "after"):
            means, _, _ = spread(results[name][when])
            row = Score(*means)
            print(
                f"{name + ', ' + when:34} {row.pass_1:.2f}     {row.pass_16:.2f}    "
                f"{row.length:4.0f}"
            )
    title = finding(results)
    print(title)
    save_metrics(
        out,
        name="demo_reasoning_grpo",
        columns=Score._fields,
        results=results,
        levels=levels,
        logs=logs,
        seeds=cfg.seeds,
    )
    draw(title, results, logs, out / "demo_reasoning_grpo.png")
