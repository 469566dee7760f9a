"""
Part 9: one SFT checkpoint, and five ways to better answers: best-of-n, DPO, PPO, GRPO with a reward
model, and GRPO with the judge.

    python part_9/demo_methods.py              one seed
    python part_9/demo_methods.py --seeds=3    three seeds: how much is chance?

What is equal? PPO and both GRPOs sample equally many answers in training. Best-of-n trains nothing:
it samples as many answers to the held-out prompts, and keeps those that the reward model likes
best. DPO samples none, and gets the seconds that GRPO with the judge took. Only the judge of the
last GRPO is gold itself; all others see it through noisy preferences.

The runs have half of the scripts' default steps or less. Memory is the peak of the whole process.
The KL of best-of-n is a bound, log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3). The
intervals are Wilson's (1927).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import subprocess
import time
from dataclasses import dataclass
from resource import RUSAGE_SELF, getrusage
from typing import NamedTuple

import torch

import train_dpo
import train_grpo
from model import GPT
from shared import (
    ROOT,
    as_json,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    read_log,
    require,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import Tokenizer


class Method(NamedTuple):
    script: str  # the train script, relative to ROOT
    options: dict  # options of its own


METHODS = {
    "PPO": Method("part_8/train_ppo.py", {}),
    "GRPO, model": Method("part_9/train_grpo.py", {"reward": "model"}),
    "GRPO, judge": Method("part_9/train_grpo.py", {}),
    "DPO": Method("part_9/train_dpo.py", {"eval_every": 9999}),
}

# What the figure shows: {field of Result: unit}
PANELS = {
    "gold": "share of answers, with 95 % interval",
    "kl": "nats per answer",
    "seconds": "s",
    "memory": "MB at the peak",
}

# getrusage counts bytes on a Mac and kilobytes elsewhere.
MEGABYTES = (1 if sys.platform == "darwin" else 1024) / 1e6

# Runs a command and prints its peak memory. The peak of a child starts at that of the process which
# starts it, so this small process stands between the demo, which is large, and the script.
MEASURE_PEAK = """
import subprocess, sys
from resource import RUSAGE_CHILDREN, getrusage
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(getrusage(RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


@dataclass
class Config:
    init: str = ""  # checkpoint of the SFT model; empty: part_6/out/sft.pt
    rm: str = ""  # checkpoint of the reward model; empty: part_7/out/rm.pt
    steps: int = 16  # iterations of PPO and of both GRPOs
    batch_size: int = 128  # answers per iteration, divisible by 16
    prompts: int = 256  # held-out stories that every method answers
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "prompts", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.batch_size % 16 == 0, f"batch_size={self.batch_size} must be divisible by 16"


class Result(NamedTuple):
    gold: float  # share of the held-out answers that pass all checks
    kl: float  # KL(pi || pi_sft), nats per answer
    seconds: float  # of training, or of sampling for best-of-n
    memory: float  # MB at the peak
    tokens: int  # tokens that were sampled


def wilson(share, n, z=1.96):
    """The 95 % interval of a share that was measured on n cases -> its two ends.

    0 of 10 -> (0, 0.28): unlike share +- z * deviation, the interval is never a single point.
    """
    middle = share + z * z / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (middle - half_width) / scale, (middle + half_width) / scale


# the methods --------------------------------------------------------------------------------------


class BestOfN(NamedTuple):
    gold: float  # share of the kept answers that pass all checks
    tokens: int  # tokens that were sampled


def best_of_n(policy, tok, records, n, reward_of, run, device):
    """Samples n answers to each record and keeps the one with the highest reward -> BestOfN."""
    repeated = []
    for record in records:
        repeated.extend([record] * n)

    answers = []
    rewards = []
    tokens = 0
    for i in range(0, len(repeated), 128):
        part = repeated[i : i + 128]
        batch = train_grpo.rollout(policy, tok, part, run, device)
        part_answers = train_grpo.answers_of(batch, tok)
        answers += part_answers
        rewards.append(reward_of(part, batch, part_answers))
        tokens += batch.mask.sum().item()

    best = torch.cat(rewards).view(-1, n).argmax(dim=1).tolist()
    kept = [answers[n * i + choice] for i, choice in enumerate(best)]
    passed = train_grpo.passed(records, kept)
    return BestOfN(sum(passed) / len(passed), tokens)


class Run(NamedTuple):
    policy: GPT
    seconds: float
    memory: float  # MB at the peak
    tokens: int  # tokens that were sampled


def run_script(script, out, device, **options):
    """Runs a train script in a process of its own -> Run. What it prints goes to stderr."""
    options = {"out": out, "device": device.type, **options}
    command = [sys.executable, "-c", MEASURE_PEAK, sys.executable, str(ROOT / script)]
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(done.returncode)  # the script has already printed why

    # Each script writes one checkpoint, one file of metrics and one log.
    checkpoint = load_checkpoint(next(out.glob("*.pt")), None)
    metrics = json.loads(next(out.glob("*.json")).read_text())
    log = read_log(out, next(out.glob("*.jsonl")).stem)

    # The log has the mean length of each batch of answers. DPO samples no answers.
    mean_lengths = [record.get("length", 0) for record in log]
    tokens = round(sum(mean_lengths) * checkpoint["config"]["batch_size"])
    policy = GPT.load(checkpoint).to(device)
    return Run(policy, metrics["seconds"], int(done.stdout) * MEGABYTES, tokens)


def dpo_steps_within(seconds, policy, tok, device):
    """How many steps of train_dpo.py take so many seconds? Measured on five of them."""
    defaults = train_dpo.Config()
    train, _ = train_dpo.load_data(defaults)
    pairs = train_dpo.encode_records(train[: defaults.batch_size], tok, policy.cfg.block_size)
    train_dpo.add_reference_logp(policy, pairs, device)

    start = time.time()
    for _ in range(5):
        loss, _ = train_dpo.pair_loss(policy, pairs, defaults.beta, device)
        loss.backward()
    seconds_per_step = (time.time() - start) / 5
    return max(1, round(seconds / seconds_per_step))


# the figure ---------------------------------------------------------------------------------------


def draw(title, results, n, path):
    """results: {method: [Result of each seed]}, on n held-out stories."""
    fig, axes = figure(title, rows=2, columns=2, height=6.5)
    for ax, (field, unit) in zip(axes.flat, PANELS.items()):
        for i, (name, rows) in enumerate(results.items()):
            values = [getattr(result, field) for result in rows]
            mean = sum(values) / len(values)
            ax.barh(name, mean, color="gray" if name == "SFT" else f"C{i - 1}")
            ax.plot(values, [name] * len(values), "k.")  # a dot per seed
            if field == "gold":
                ax.plot(wilson(mean, n), [name, name], "k-")
        ax.invert_yaxis()
        ax.set(title=field, xlabel=unit)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # the SFT model and the reward model
    init = cfg.init or require("part_6/out/sft.pt")
    rm = cfg.rm or require("part_7/out/rm.pt")
    sft = load_checkpoint(init, "sft")
    tok = Tokenizer.load(sft["tokenizer"])
    reference = GPT.load(sft).to(device).requires_grad_(False)
    run = train_grpo.Config(reward="model", rm=str(rm))
    reward_of = train_grpo.load_reward(run, tok, reference.cfg.block_size, device)
    out = output_folder(cfg)

    # Prompts that ask for stories. The scripts read those for training from a file.
    train, val = train_grpo.load_data(run)
    train = [record for record in train if record["task"] == "story"]
    val = [record for record in val if record["task"] == "story"]
    val = train_grpo.encode_records(val, tok, reference.cfg.block_size, run.max_new_tokens)
    val = val[: cfg.prompts]
    data = out / "demo_methods.data"
    data.write_text(as_json(train))

    n = max(1, cfg.steps * cfg.batch_size // len(val))
    best_of = f"best of {n}"
    results = {name: [] for name in ("SFT", best_of, *METHODS)}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        # the SFT model as it is, and the best of its answers
        torch.manual_seed(seed)
        evaluation = train_grpo.evaluate(reference, reference, tok, val, run, device)
        results["SFT"].append(Result(evaluation.gold["story"], 0.0, 0.0, 0.0, 0))
        start = time.time()
        best = best_of_n(reference, tok, val, n, reward_of, run, device)
        seconds = time.time() - start

        # A process's peak never falls. From the second seed on it would be that of everything.
        if seed == cfg.seed:
            peak = getrusage(RUSAGE_SELF).ru_maxrss * MEGABYTES
        kl_bound = math.log(n) - (n - 1) / n
        results[best_of].append(Result(best.gold, kl_bound, seconds, peak, best.tokens))

        # the train scripts, and what their policies answer
        for name, method in METHODS.items():
            options = {"init": init, "steps": cfg.steps, "seed": seed, "prompts": 8}
            if name == "DPO":
                budget = results["GRPO, judge"][-1].seconds
                policy = GPT.load(sft).to(device)
                options["steps"] = dpo_steps_within(budget, policy, tok, device)
            else:
                options |= {"rm": rm, "data": data, "batch_size": cfg.batch_size}
            options |= method.options
            folder = out / f"demo_methods.{name}.{seed}"
            trained = run_script(method.script, folder, device, **options)

            # Every policy gets the same random numbers to sample its answers with.
            torch.manual_seed(seed)
            evaluation = train_grpo.evaluate(trained.policy, reference, tok, val, run, device)
            results[name].append(
                Result(
                    evaluation.gold["story"],
                    evaluation.kl,
                    trained.seconds,
                    trained.memory,
                    trained.tokens,
                )
            )

    # the table: means over the seeds
    means = {}
    intervals = {}
    print(f"{'':12}  gold  95 % interval     KL  seconds  MB peak  tokens sampled")
    for name, rows in results.items():
        mean = Result(*[sum(values) / len(rows) for values in zip(*rows)])
        low, high = wilson(mean.gold, len(val))
        means[name] = mean
        intervals[name] = (low, high)
        print(
            f"{name:12} {mean.gold:5.3f}  {low:.3f} to {high:.3f} {mean.kl:6.2f} "
            f"{mean.seconds:8.1f} {mean.memory:8.0f} {mean.tokens:15,.0f}"
        )

    # what it says: of the methods that do not train on gold, is the best one clearly ahead?
    rivals = [name for name in results if name not in ("SFT", "GRPO, judge")]
    rivals.sort(key=lambda name: -means[name].gold)
    first, second = rivals[:2]
    verdict = "ahead of"
    if intervals[first][0] <= intervals[second][1]:
        verdict = "no difference from"
    title = (
        f"Gold: SFT {means['SFT'].gold:.2f}, GRPO with the judge "
        f"{means['GRPO, judge'].gold:.2f}; without the judge\n"
        f"{first} {means[first].gold:.2f}, {verdict} {second} {means[second].gold:.2f}"
    )
    print(title)
    save_metrics(
        out,
        name="demo_methods",
        columns=Result._fields,
        **results,
        gold_intervals=intervals,
        prompts=len(val),
        seeds=cfg.seeds,
    )
    draw(title, results, len(val), out / "demo_methods.png")
