"""
Part 0, a benchmark: what this machine can do, and how much of it the scripts of this course use.

    python part_0/bench.py                              everything -> part_0/out/bench.json
    python part_0/bench.py --against=OLD.json           also the ratios to an earlier run
    python part_0/bench.py --sections=products,generation
                                                        only some of it
    python part_0/bench.py --threads=1 --clock=cpu      on a machine that others use, too

Seconds say little about another machine. So this script first measures what the machine can do at
best: how many operations per second in a large matrix product (the peak), and how many bytes per
second come from memory (the bandwidth). Everything else is compared with these two. A computation
that needs F operations and B bytes takes at least

    max(F / peak, B / bandwidth)                        (the roofline, Williams et al. 2009)

and a trainer needs, for each token that it learns from,

    6 N + 12 L H D T   operations

for N weights, L layers, and H heads of size D that look at T tokens. 6 N are the 2 operations of
each weight in the forward pass and the 4 in the backward pass (Kaplan et al. 2020, section 2.1).
The rest is the attention, masked positions included. A token that is only read needs a third of
it. The products inside an optimizer such as Muon do not count. They are a price of the method, so
they make the share of the peak smaller.

The measurements are in measure.py. Each runs in a process of its own. The checkpoints of the course
are not needed: every trainer runs for a few steps and leaves a checkpoint for the next one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import resource
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

from shared import (
    COLOURS,
    ROOT,
    as_json,
    fail,
    figure,
    output_folder,
    parse_args,
    read_foreign,
    read_jsonl,
    read_text,
    require,
    save_figure,
    save_metrics,
)

SECTIONS = ("products", "memory", "generation", "tokenizer", "checkpoint", "judge", "trainers")
MIB = 2**20
CACHE = 16 * MIB  # what is smaller stays in the cache of most processors
ANSWERS = 128  # answers in an iteration of PPO and its kind, their default


@dataclass
class Config:
    sections: str = ",".join(SECTIONS)  # which measurements, separated by commas
    against: str = ""  # the bench.json of an earlier run, to compare with
    seconds: float = 0.3  # seconds to spend on each number
    steps: int = 8  # optimizer steps of each trainer; half as many iterations of PPO and its kind
    clock: str = "wall"  # wall (what a user waits) or cpu (processor time; for a busy machine)
    threads: int = 0  # CPU threads; 0: as many as torch chooses
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for section in self.sections.split(","):
            known = ", ".join(SECTIONS)
            assert section in SECTIONS, f"sections={self.sections} must be some of {known}"
        assert self.steps >= 4, f"steps={self.steps} must be at least 4: the first does not count"
        assert self.clock in ("wall", "cpu"), f"clock={self.clock} must be wall or cpu"
        assert self.clock == "wall" or self.threads == 1, (
            "clock=cpu adds up the time of all threads: use it with --threads=1"
        )


class Trainer(NamedTuple):
    script: str
    kind: str  # steps: it takes optimizer steps; iterations: it also samples answers

    # {data} is the folder of the data, {part_4/train} that of another trainer's output
    options: str


# What several trainers have in common. The answers have 48 tokens, because those of a trained model
# have 44 on average.
TEXT = "--data={data}/text.txt"
PAIRS = "--data={data}/pairs.jsonl --init={part_6/train_sft}/sft.pt"
STORIES = "--data={data}/stories.jsonl --prompts=8"
SAMPLING = STORIES + " --max_new_tokens=48 --init={part_6/train_sft}/sft.pt"
REWARD = " --rm={part_7/train_rm}/rm.pt"

# Each finds the checkpoints that it needs, because those who write them come first. The large
# max_kl lets PPO do all its updates, however far a hardly trained policy moves.
TRAINERS = [
    Trainer("part_1/train.py", "steps", ""),
    Trainer("part_2/train.py", "steps", TEXT),
    Trainer("part_3/train.py", "steps", TEXT),
    Trainer("part_4/train.py", "steps", TEXT),
    Trainer("part_5/train.py", "steps", TEXT),
    Trainer("part_6/train_sft.py", "steps", STORIES + " --init={part_4/train}/base.pt"),
    Trainer("part_7/train_rm.py", "steps", PAIRS),
    Trainer("part_8/train_reinforce.py", "iterations", SAMPLING + REWARD),
    Trainer("part_8/train_ppo.py", "iterations", SAMPLING + REWARD + " --max_kl=99"),
    Trainer("part_9/train_grpo.py", "iterations", SAMPLING),
    Trainer("part_9/train_dpo.py", "steps", PAIRS + " --prompts=8"),
]

# Those whose iterations are looked into.
METHODS = {
    "part_8/train_reinforce.py": "REINFORCE",
    "part_8/train_ppo.py": "PPO",
    "part_9/train_grpo.py": "GRPO",
}

# The stages of an iteration, in their order, with the colours of the figure.
STAGES = {
    "sampling": COLOURS[0],
    "reward model": COLOURS[1],
    "reference model": COLOURS[2],
    "critic": COLOURS[3],
    "advantages": COLOURS[4],
    "update": COLOURS[5],
    "judge": COLOURS[6],
    "other": COLOURS[7],
}


# the mathematics ----------------------------------------------------------------------------------


class Bound(NamedTuple):
    seconds: float  # no program can be faster
    limit: str  # what makes it so: "memory" or "arithmetic"


def roofline(flops, n_bytes, peak, bandwidth):
    """The least time for so many operations and bytes -> Bound. peak and bandwidth are per
    second."""
    arithmetic = flops / peak
    memory = n_bytes / bandwidth
    if arithmetic > memory:
        return Bound(arithmetic, "arithmetic")
    return Bound(memory, "memory")


def best_and_spread(values, higher_is_better):
    """The best of several measurements of one thing, and how far their median is from it: 0.1 is
    10 %. Other programs can only make a measurement worse, so the best is the fairest."""
    best = max(values) if higher_is_better else min(values)
    median = statistics.median(values)
    spread = best / median - 1 if higher_is_better else median / best - 1
    return best, spread


def higher_is_better(unit):
    return unit.endswith("/s") or unit == "of the peak"


def compare(old, new):
    """Two measurements of one thing -> (ratio new / old, what to think of it).

    A difference of up to 10 % is nothing on a machine with a clock that changes, and neither is
    one within the spread of the two measurements.
    """
    ratio = new["value"] / old["value"]
    difference = max(ratio, 1 / ratio) - 1
    if difference <= 0.10:
        return ratio, ""
    if difference <= max(old["spread"], new["spread"]):
        return ratio, "within the spread"
    is_better = (ratio > 1) == higher_is_better(new["unit"])
    return ratio, "BETTER" if is_better else "WORSE"


def add_bounds(results, peak, bandwidths):
    """Adds the Bound of each measurement of generation. A small model stays in the cache."""
    for row in results.values():
        source = "read 4 MiB" if row["bytes"] < CACHE else "read 256 MiB"
        row["bound"] = roofline(row["flops"], row["bytes"], peak, bandwidths[source])


# running the measurements -------------------------------------------------------------------------


def run(what, cfg, folder, options=()):
    """Run measure.py in a process of its own -> its results."""
    path = folder / "results.json"
    command = [sys.executable, str(ROOT / "part_0/measure.py"), f"--what={what}", f"--out={path}"]
    command += [f"--seconds={cfg.seconds}", f"--clock={cfg.clock}", f"--threads={cfg.threads}"]
    command += ["--", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last_line = done.stderr.strip().rpartition("\n")[2]
        fail(f"the measurement of {what} failed: {last_line}")
    return json.loads(path.read_text())


def write_data(folder):
    """Small files of the world's data for the trainers. Reading all of it takes longer than the
    steps that are measured."""
    world = require("data/stories")
    records = read_jsonl(world / "instructions.jsonl", ["instruction", "input", "output", "task"])
    pairs = read_jsonl(world / "preferences.jsonl", ["prompt", "chosen", "rejected"])
    stories = [record for record in records if record["task"] == "story"]

    # The tokenizer learns from this text, and it must know the words of the instructions.
    lines = [record["instruction"] + " " + record["output"] for record in records[:3000]]
    text = read_text(world / "train.txt")[:400_000] + "\n\n" + "\n".join(lines)
    (folder / "text.txt").write_text(text)
    for name, chosen in (("stories", stories[:1000]), ("pairs", pairs[:500])):
        rows = [as_json(record) + "\n" for record in chosen]
        (folder / f"{name}.jsonl").write_text("".join(rows))


class Run(NamedTuple):
    """What one trainer did. The first of its steps is left out, because it warms up."""

    steps: list  # of dicts: {"seconds": {stage: seconds}, "trained_tokens", "read_tokens", "flops"}
    memory_before: int  # bytes, before it started to work
    memory: int  # bytes, the peak


def run_trainer(trainer, cfg, folder):
    """Run a train script for a few steps -> Run. Its checkpoint stays in the folder."""
    outputs = {}
    for other in TRAINERS:
        name = other.script.removesuffix(".py")
        outputs[name] = folder / name.replace("/", "_")
    out = outputs[trainer.script.removesuffix(".py")]

    steps = cfg.steps if trainer.kind == "steps" else cfg.steps // 2
    options = trainer.options.format(data=folder, **outputs).split()
    options += [f"--steps={steps}", "--device=cpu", f"--out={out}"]
    found = run(trainer.script, cfg, folder, options)
    return Run(found["steps"][1:], found["memory_before"], found["memory"])


# what a trainer's steps say -----------------------------------------------------------------------


def step_seconds(step):
    """The seconds of a step, without an evaluation."""
    stages = step["seconds"].items()
    return sum(seconds for stage, seconds in stages if stage != "evaluation")


def trainer_numbers(run, peak):
    """The numbers of one trainer: {name: result}. peak is in operations per second."""
    numbers = {}

    def add(name, unit, values):
        value, spread = best_and_spread(values, higher_is_better(unit))
        numbers[name] = {"value": value, "unit": unit, "spread": spread}

    seconds = [step_seconds(step) for step in run.steps]
    add("step", "s", seconds)
    for name in ("trained_tokens", "read_tokens"):
        speeds = [step[name] / step_seconds(step) for step in run.steps]
        if max(speeds) > 0:
            add(name, "token/s", speeds)
    if peak:
        add("share", "of the peak", [s["flops"] / step_seconds(s) / peak for s in run.steps])
    numbers["memory"] = {"value": run.memory / MIB, "unit": "MiB", "spread": 0.0}
    over_imports = (run.memory - run.memory_before) / MIB
    numbers["memory_over_imports"] = {"value": over_imports, "unit": "MiB", "spread": 0.0}
    return numbers


def stage_numbers(run):
    """The stages of an iteration: {stage: result in seconds}, for the stages that occur."""
    numbers = {}
    for stage in STAGES:
        seconds = [step["seconds"].get(stage, 0.0) for step in run.steps]
        if min(seconds) > 0:
            value, spread = best_and_spread(seconds, higher_is_better=False)
            numbers[stage] = {"value": value, "unit": "s", "spread": spread}
    return numbers


def total_seconds(numbers):
    return sum(row["value"] for row in numbers.values())


# tables -------------------------------------------------------------------------------------------


def print_rows(title, results):
    """Numbers of one section, one per line."""
    print(f"\n{title}")
    for name, row in results.items():
        print(f"  {name:24} {row['value']:14,.1f} {row['unit']:10} +-{row['spread']:4.0%}")


def print_generation(results):
    """The speed of generation, and how many times the bound it takes."""
    print("\ngeneration, of a model with 3 MB (small) and one with 540 MB (large)")
    print(
        f"  {'':20}{'tokens/s':>10}{'ms':>9}{'+-':>6}{'operations':>12}{'bound, ms':>11}"
        f"{'times':>8}  because of"
    )
    for name, row in results.items():
        print(
            f"  {name:20}{row['value']:10,.0f}{1000 * row['seconds']:9.2f}{row['spread']:6.0%}"
            f"{row['operations']:12}",
            end="",
        )
        if "bound" in row:
            times = row["seconds"] / row["bound"].seconds
            print(f"{1000 * row['bound'].seconds:11.3f}{times:8.1f}  {row['bound'].limit}", end="")
        print()


def print_trainers(all_numbers):
    """One line for each trainer."""
    print("\ntrainers: tokens per second, the share of the peak that their 6 N + 12 L H D T use")
    print(
        f"  {'':24}{'trained/s':>10}{'read/s':>9}{'of peak':>9}{'+-':>5}{'ms/step':>9}"
        f"{'peak MiB':>10}{'over imports':>14}"
    )
    for script, numbers in all_numbers.items():
        share = f"{numbers['share']['value']:9.1%}" if "share" in numbers else f"{'':9}"
        read = ""
        if "read_tokens" in numbers:
            read = f"{numbers['read_tokens']['value']:,.0f}"
        print(
            f"  {script:24}{numbers['trained_tokens']['value']:10,.0f}{read:>9}{share}"
            f"{numbers['step']['spread']:5.0%}{1000 * numbers['step']['value']:9.1f}"
            f"{numbers['memory']['value']:10.0f}{numbers['memory_over_imports']['value']:14.0f}"
        )


def print_stages(name, numbers):
    """Where the time of an iteration goes."""
    total = total_seconds(numbers)
    print(
        f"\none iteration of {name}, the best of each stage: {1000 * total:.0f} ms for "
        f"{ANSWERS} answers"
    )
    print(f"  {'':18}{'ms':>9}{'share':>8}{'+-':>6}{'answers/s':>12}")
    for stage, row in numbers.items():
        print(
            f"  {stage:18}{1000 * row['value']:9.1f}{row['value'] / total:8.1%}"
            f"{row['spread']:6.0%}{ANSWERS / row['value']:12,.0f}"
        )
    print(f"  {'all':18}{1000 * total:9.1f}{1:8.0%}{'':6}{ANSWERS / total:12,.0f}")


def print_comparison(old, new):
    """The ratio of each number to the one of the earlier run."""
    print("\nagainst the earlier run (ratio new / old; spread: how far its repeats were apart)")
    for name, value in new["machine"].items():
        if old["machine"].get(name) != value:
            print(f"  {name}: {old['machine'].get(name)} -> {value}")

    flagged = 0
    for name, row in new["numbers"].items():
        if name not in old["numbers"]:
            print(f"  {name:48} is new")
            continue
        before = old["numbers"][name]
        ratio, verdict = compare(before, row)
        spread = max(before["spread"], row["spread"])
        print(f"  {name:48}{ratio:8.2f}  +-{spread:4.0%}  {verdict}")
        flagged += verdict in ("BETTER", "WORSE")
    print(f"{flagged} numbers differ by more than 10 % and by more than their spread")


def draw(stages, path):
    """Where the time of an iteration goes, one bar for each method. stages: {method: {stage:
    result}}"""
    ppo = stages["PPO"]
    seconds = total_seconds(ppo)
    largest = max(ppo, key=lambda stage: ppo[stage]["value"])
    share = ppo[largest]["value"] / seconds
    title = (
        f"The stages of an iteration of PPO, each at its fastest: {seconds:.1f} s together.\n"
        f"The largest is the {largest} ({share:.0%})"
    )
    fig, ax = figure(title, f"ms for {ANSWERS} answers", height=3.4)

    for position, (method, numbers) in enumerate(stages.items()):
        left = 0.0
        total = total_seconds(numbers)
        for stage, row in numbers.items():
            width = 1000 * row["value"]
            ax.barh(position, width, left=left, height=0.6, color=STAGES[stage], edgecolor="white")

            # A narrow piece has no room for a text.
            if row["value"] > 0.06 * total:
                text = f"{row['value'] / total:.0%}"
                colour = "white" if stage == "sampling" else "black"
                middle = left + width / 2
                ax.text(middle, position, text, color=colour, ha="center", va="center", size=9)
            left += width
    ax.set_yticks(range(len(stages)), list(stages))
    ax.invert_yaxis()

    # one entry for each stage that occurs in any of the methods
    for stage, colour in STAGES.items():
        if any(stage in numbers for numbers in stages.values()):
            ax.barh(0, 0, color=colour, label=stage)
    fig.legend(loc="outside lower center", ncols=4)
    save_figure(fig, path)


# --------------------------------------------------------------------------------------------------


def read_earlier(path):
    """The bench.json of an earlier run."""
    text = read_text(path)
    earlier = read_foreign(json.loads, text, name=path)
    if not isinstance(earlier, dict) or "numbers" not in earlier or "machine" not in earlier:
        fail(f"--against={path} is not a bench.json of this script")

    # Nobody should wait for the whole benchmark to hear that the old file is damaged.
    is_sound = isinstance(earlier["numbers"], dict) and isinstance(earlier["machine"], dict)
    if is_sound:
        for row in earlier["numbers"].values():
            is_row = isinstance(row, dict) and {"value", "unit", "spread"} <= row.keys()
            is_sound = is_sound and is_row and row["value"] != 0
    if not is_sound:
        fail(f"--against={path} is damaged: a number of it is missing or 0")
    return earlier


def flat(group, results):
    """{name: result} -> {"group: name": value, unit and spread}, as bench.json has them."""
    numbers = {}
    for name, row in results.items():
        numbers[f"{group}: {name}"] = {key: row[key] for key in ("value", "unit", "spread")}
    return numbers


if __name__ == "__main__":
    cfg = parse_args(Config)
    earlier = read_earlier(cfg.against) if cfg.against else None
    out = output_folder(cfg)
    start = time.time()
    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    sections = cfg.sections.split(",")
    numbers = {}

    # the machine
    facts = run("machine", cfg, folder)
    for name, value in facts.items():
        print(f"{name:14} {value}")
    if facts["load"] > 0.5:
        print("Other programs are running. They make the spreads larger and some numbers worse.")

    # what it can do at best: the peak, and the bandwidth of the memory and of the cache
    peak = 0.0
    bandwidths = {}
    if "products" in sections:
        found = run("products", cfg, folder)
        print_rows("matrix products", found)
        numbers |= flat("products", found)
        peak = 1e9 * max(row["value"] for name, row in found.items() if name.startswith("fp32"))
    if "memory" in sections:
        found = run("memory", cfg, folder)
        print_rows("memory", found)
        numbers |= flat("memory", found)
        bandwidths = {name: 1e9 * row["value"] for name, row in found.items()}

    # generation, beside what these two allow
    if "generation" in sections:
        found = run("generation", cfg, folder)
        if peak and bandwidths:
            add_bounds(found, peak, bandwidths)
        print_generation(found)
        numbers |= flat("generation", found)

    for section in ("tokenizer", "checkpoint", "judge"):
        if section in sections:
            found = run(section, cfg, folder)
            print_rows(section, found)
            numbers |= flat(section, found)

    # the trainers, and for two of them where an iteration's time goes
    stages = {}
    if "trainers" in sections:
        write_data(folder)
        all_numbers = {}
        for trainer in TRAINERS:
            print(f"running {trainer.script} ...", flush=True)
            trainer_run = run_trainer(trainer, cfg, folder)
            all_numbers[trainer.script] = trainer_numbers(trainer_run, peak)
            numbers |= flat(trainer.script, all_numbers[trainer.script])
            if trainer.script in METHODS:
                method = METHODS[trainer.script]
                stages[method] = stage_numbers(trainer_run)
                numbers |= flat(method, stages[method])
        print_trainers(all_numbers)
        for method in ("PPO", "GRPO"):
            print_stages(method, stages[method])
        draw(stages, out / "bench.png")

    temporary.cleanup()
    seconds = time.time() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor_seconds = used.ru_utime + used.ru_stime
    settings = asdict(cfg)
    save_metrics(
        out,
        name="bench",
        machine=facts,
        settings=settings,
        numbers=numbers,
        seconds=seconds,
        processor_seconds=processor_seconds,
    )
    print(
        f"\n{len(numbers)} numbers in {out / 'bench.json'}, {seconds:.0f} s "
        f"({processor_seconds:.0f} s of processor time)"
    )
    if earlier is not None:
        print_comparison(earlier, {"machine": facts, "numbers": numbers})
