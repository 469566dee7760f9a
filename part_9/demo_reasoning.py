"""
Part 9, thinking before answering: is a problem in arithmetic easier if the model may write down the
steps of its solution?

    python part_9/demo_reasoning.py              one seed
    python part_9/demo_reasoning.py --seeds=3    three seeds: how much is chance?

    Tom had 7 plums. Tom gave 2 to Anna. Tom found 5 more. How many plums did Tom have in the end?
    at once    The answer is 10.
    in steps   7-2=5. 5+5=10. The answer is 10.

A transformer does a fixed amount of computation for each token. An answer that is given at once
must be found in one pass through the layers, however many operations it takes. With steps the model
reads its own intermediate results, so every pass has one operation to do (Wei et al. 2022, "Chain
of thought").

Three models start from the base model and are tuned by Part 6's trainer on data/stories/problems:

    in steps                      the demonstrations as they are
    at once, as many problems     the same problems in the same order, the answer alone
    at once, as many tokens       more problems, until it has read as many tokens

The problems for training have 1 to 4 operations, and those for the examination up to 6.
demo_reasoning_grpo.py and demo_test_time.py go on from the models of this demo.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import os
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch

import train_grpo
from model import GPT
from shared import (
    ROOT,
    as_json,
    figure,
    judge,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    read_jsonl,
    require,
    save_figure,
    save_metrics,
    write_atomic,
)
from tokenizer import Tokenizer

OUT = Path(__file__).resolve().parent / "out"  # where this demo writes with its defaults
LONGEST_ANSWER = 72  # tokens; six steps with numbers of two digits take fewer than 66
BLOCK_SIZE = 160  # tokens of a problem and its solution
STEP_BY_STEP = " Think step by step."  # the request for a solution in steps ends like this
CONCLUSION = "The answer is"
IN_STEPS = "in steps"
SAME_PROBLEMS = "at once, as many problems"
SAME_TOKENS = "at once, as many tokens"
ARMS = [IN_STEPS, SAME_PROBLEMS, SAME_TOKENS]


@dataclass
class Config:
    init: str = ""  # checkpoint of the base model; empty: part_4/out/base.pt
    steps: int = 800  # optimizer steps of the model that solves problems in steps
    batch_size: int = 16  # demonstrations per step
    lr: float = 0.02  # learning rate of Muon
    lr_adamw: float = 3e-3  # learning rate of AdamW
    prompts: int = 60  # held-out problems of each number of operations
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "prompts", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"


# problems and their two forms ---------------------------------------------------------------------


def at_once(record):
    """The same problem, but with the request and the demonstration of the answer alone."""
    output = record["output"]
    return {
        **record,
        "instruction": record["instruction"].removesuffix(STEP_BY_STEP),
        "output": output[output.index(CONCLUSION) :],
        "check": {"number": record["check"]["number"]},
    }


def load_problems(name):
    """The records of data/stories/NAME.jsonl, solved in steps."""
    folder = require("data/stories")
    return read_jsonl(folder / f"{name}.jsonl", ["instruction", "input", "output"])


def examination(per_level):
    """The held-out problems: this many of each number of operations."""
    chosen = defaultdict(list)
    for record in load_problems("problems_val"):
        if len(chosen[record["level"]]) < per_level:
            chosen[record["level"]].append(record)

    records = []
    for level in sorted(chosen):
        records += chosen[level]
    return records


def mean_tokens(records, tok):
    """The mean number of tokens of a demonstration, request and answer together."""
    total = 0
    for record in records:
        total += len(tok.encode(record["instruction"])) + len(tok.encode(record["output"])) + 3
    return total / len(records)


# training and examination -------------------------------------------------------------------------


def checkpoint_of(arm, seed, out):
    """Where this demo saves a model."""
    return out / f"demo_reasoning.{arm.replace(' ', '_').replace(',', '')}.{seed}" / "sft.pt"


def model_folder(cfg, out):
    """The folder for the models of a run. The two other demos look for them in OUT, whatever the
    number of seeds or of held-out problems was."""
    changed = set(cfg.changed) - {"seed", "seeds", "prompts"}
    return out if cfg.out or changed else OUT


def start_tuning(records, steps, seed, path, init, cfg, device, threads):
    """Starts Part 6's trainer on these demonstrations, in a process of its own -> the process. It
    leaves its checkpoint at `path`."""
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)

    # The trainer keeps a tenth of the file for validation and shuffles the rest by the seed, so
    # both forms of the problems come in the same order. If there are more steps than
    # demonstrations, it begins again.
    data = folder / "data.json"
    write_atomic(data, as_json(records).encode())
    options = {
        "data": data,
        "init": init,
        "out": folder,
        "device": device.type,
        "block_size": BLOCK_SIZE,
        "steps": steps,
        "batch_size": cfg.batch_size,
        "lr": cfg.lr,
        "lr_adamw": cfg.lr_adamw,
        "eval_every": 10 * steps,  # only at the end
        "prompts": 8,
        "seed": seed,
    }
    command = [sys.executable, str(ROOT / "part_6/train_sft.py")]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


def wait_for(processes):
    """Waits until all processes have ended. If one fails, the others are stopped, too."""
    try:
        for process in processes:
            if process.wait() != 0:
                sys.exit(process.returncode)  # the trainer has already printed why
    finally:
        for process in processes:
            process.terminate()  # does nothing to one that has ended


def recipe(arm, tok, cfg):
    """The demonstrations for one of ARMS, and for how many steps it is trained on them."""
    train = load_problems("problems")
    if arm == IN_STEPS:
        return train, cfg.steps

    train_at_once = [at_once(record) for record in train]
    if arm == SAME_PROBLEMS:
        return train_at_once, cfg.steps
    ratio = mean_tokens(train, tok) / mean_tokens(train_at_once, tok)
    return train_at_once, math.ceil(ratio * cfg.steps)


def train_arms(arms, seed, out, cfg, device):
    """Trains some of ARMS from the base model, all at the same time: small models train faster
    beside each other than one after the other with all threads."""
    init = cfg.init or require("part_4/out/base.pt")
    tok = Tokenizer.load(load_checkpoint(init, "base")["tokenizer"])
    threads = max(1, torch.get_num_threads() // len(arms))
    processes = []
    for arm in arms:
        records, steps = recipe(arm, tok, cfg)
        path = checkpoint_of(arm, seed, out)
        print(f"seed {seed}, {arm}: {steps} steps of {cfg.batch_size} demonstrations", flush=True)
        processes.append(start_tuning(records, steps, seed, path, init, cfg, device, threads))
    wait_for(processes)


class Solver(NamedTuple):
    """A model that solves problems."""

    policy: GPT
    tok: Tokenizer


def load_solver(path, device):
    checkpoint = load_checkpoint(path, None)
    policy = GPT.load(checkpoint).to(device)
    return Solver(policy, Tokenizer.load(checkpoint["tokenizer"]))


def build_solver(arm, seed, device):
    """The model of one of ARMS that this demo has trained with its defaults. If its checkpoint is
    missing, it is trained now, in two or three minutes."""
    path = checkpoint_of(arm, seed, OUT)
    if not path.exists():
        train_arms([arm], seed, OUT, Config(), device)
    return load_solver(path, device)


class Samples(NamedTuple):
    """K answers to each of N problems."""

    right: torch.Tensor  # (N, K) bool: is the answer's number right?
    steps_right: torch.Tensor  # (N, K) bool: are all its steps right, too?
    length: torch.Tensor  # (N, K) tokens of the answer
    numbers: list  # N lists of K texts: the last number of each answer, or ""
    answers: list  # N lists of K Answers


def sample(solver, records, k, device, longest=LONGEST_ANSWER):
    """The model answers every problem k times, at temperature 1 -> Samples."""
    run = train_grpo.Config(max_new_tokens=longest)
    block_size = solver.policy.cfg.block_size
    records = train_grpo.encode_records(records, solver.tok, block_size, longest)
    repeated = []
    for record in records:
        repeated.extend([record] * k)

    answers = []
    for i in range(0, len(repeated), 256):
        batch = train_grpo.rollout(solver.policy, solver.tok, repeated[i : i + 256], run, device)
        answers += train_grpo.answers_of(batch, solver.tok)

    right = []
    steps_right = []
    numbers = []
    for record, answer in zip(repeated, answers):
        verdict = judge(record, answer.text, answer.ended)
        right.append(verdict.passed)
        steps_right.append(verdict.steps is not None and all(verdict.steps))
        numbers.append(last_number(answer.text))

    shape = (len(records), k)
    rows = range(0, len(repeated), k)
    return Samples(
        right=torch.tensor(right).view(shape),
        steps_right=torch.tensor(steps_right).view(shape),
        length=torch.tensor([len(answer.ids) for answer in answers]).view(shape),
        numbers=[numbers[i : i + k] for i in rows],
        answers=[answers[i : i + k] for i in rows],
    )


def last_number(text):
    """ "7-2=5. The answer is 5." -> "5". The empty text if there is no number."""
    number = ""
    for word in text.replace("=", " ").replace(".", " ").split():
        if word.isdigit():
            number = word
    return number


def by_level(records, values):
    """The mean of values (N, K) over the problems of each number of operations -> {level: mean}."""
    values = values.float().mean(dim=1)
    groups = defaultdict(list)
    for record, value in zip(records, values.tolist()):
        groups[record["level"]].append(value)
    return {level: sum(group) / len(group) for level, group in sorted(groups.items())}


# the figure ---------------------------------------------------------------------------------------


def spread(rows):
    """Rows of equal length -> (means, lowest values, highest values), column by column."""
    columns = list(zip(*rows))
    means = [sum(column) / len(column) for column in columns]
    return means, [min(column) for column in columns], [max(column) for column in columns]


def draw(title, accuracy, longest_trained, path):
    """The share of right answers by number of operations, one line for each model."""
    fig, ax = figure(title, "operations in the problem", "share of right answers, temperature 1")
    for arm, marker in zip(ARMS, "os^"):
        levels = list(accuracy[arm][0])
        means, lows, highs = spread([list(run.values()) for run in accuracy[arm]])
        [line] = ax.plot(levels, means, marker=marker, label=arm)
        ax.fill_between(levels, lows, highs, alpha=0.2, color=line.get_color())
    ax.axvline(longest_trained + 0.5, color="gray", linestyle=":")
    ax.text(longest_trained + 0.55, 0.6, "longer than any\nin training", fontsize=9)
    ax.set(ylim=(0, 1.03))
    ax.legend(loc="upper right")
    save_figure(fig, path)


def finding(accuracy, longest_trained):
    """The title of the figure: how far are the steps ahead at three operations, and do they help
    with problems that are longer than any in training?"""
    steps = [run[3] for run in accuracy[IN_STEPS]]
    rivals = [run[3] for arm in (SAME_PROBLEMS, SAME_TOKENS) for run in accuracy[arm]]
    title = f"Three operations: {range_text(steps)} right in steps, {range_text(rivals)} at once"
    if min(steps) <= max(rivals):
        title += " (no difference)"
    longer = [run[longest_trained + 1] for run in accuracy[IN_STEPS]]
    return f"{title};\n{longest_trained + 1}, more than in training: {range_text(longer)} in steps"


def range_text(values):
    """The range of several numbers: "0.42 to 0.47", or one number if they are the same."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    if cfg.init:
        load_checkpoint(cfg.init, "base")  # a wrong file ends here, before anything slow
    out = output_folder(cfg)
    val = examination(cfg.prompts)
    val_at_once = [at_once(record) for record in val]

    accuracy = {arm: [] for arm in ARMS}
    all_steps_right = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        folder = model_folder(cfg, out)
        train_arms(ARMS, seed, folder, cfg, device)

        for arm in ARMS:
            torch.manual_seed(seed)
            asked = val if arm == IN_STEPS else val_at_once
            solver = load_solver(checkpoint_of(arm, seed, folder), device)
            samples = sample(solver, asked, 4, device)
            shares = by_level(asked, samples.right)
            accuracy[arm].append(shares)
            texts = [f"{level}: {share:.2f}" for level, share in shares.items()]
            print(f"{arm:28}" + "  ".join(texts), flush=True)
            if arm == IN_STEPS:
                all_steps_right.append(by_level(asked, samples.steps_right))

    # what came out
    print("\nshare of right answers by number of operations, mean over the seeds")
    for arm in ARMS:
        means, _, _ = spread([list(run.values()) for run in accuracy[arm]])
        print(f"{arm:28}" + "  ".join(f"{mean:.2f}" for mean in means))
    longest_trained = max(record["level"] for record in load_problems("problems"))
    title = finding(accuracy, longest_trained)
    print(title)
    save_metrics(
        out,
        name="demo_reasoning",
        accuracy=accuracy,
        all_steps_right=all_steps_right,
        steps=cfg.steps,
        seeds=cfg.seeds,
    )
    draw(title, accuracy, longest_trained, out / "demo_reasoning.png")
