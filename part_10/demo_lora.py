"""
Part 10, LoRA against the other ways to teach a real model something: who learns how much, what does
it forget, and what does it cost?

    python part_10/demo_lora.py                          lora, full, norms and head, one seed
    python part_10/demo_lora.py --runs=lora,qv,mlp,rank1,rank32
                                                         which matrices, and which rank?
    python part_10/demo_lora.py --model=base --seeds=3   on our own model: a matter of minutes

Each run is lora.py in a process of its own, because the peak memory of a process never falls. All
runs with the same seed see the same demonstrations in the same order.

Two claims are tested. LoRA learns as much as full fine-tuning with a small share of the weights (Hu
et al. 2021). LoRA learns less and forgets less than full fine-tuning (Biderman et al. 2024).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import subprocess
from dataclasses import dataclass

from shared import (
    COLOURS,
    fail,
    figure,
    output_folder,
    parse_args,
    read_log,
    read_text,
    save_figure,
    save_metrics,
)

# The runs by the names that --runs knows, and the options of lora.py that they stand for.
RUNS = {
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "norms": {"method": "norms"},
    "head": {"method": "head"},
    "qv": {"matrices": "q,v"},
    "attention": {"matrices": "q,k,v,o"},
    "mlp": {"matrices": "gate,up,down"},
    "rank1": {"rank": 1},
    "rank32": {"rank": 32},
}


@dataclass
class Config:
    runs: str = "lora,full,norms,head"  # also qv, attention, mlp, rank1 and rank32
    model: str = "smollm2"  # smollm2, base (the model of Part 4), or the path of a checkpoint
    task: str = "is_a"  # which of the world's tasks is learned, as in lora.py
    steps: int = 80  # optimizer steps of each run
    batch_size: int = 4  # demonstrations per step
    eval_every: int = 20  # steps between evaluations
    asked: int = 64  # held-out records that are answered before and after training
    held_out: int = 16  # pieces of 128 tokens of the text that tells what is forgotten
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in self.runs.split(","):
            assert name in RUNS, f"runs={self.runs} must be some of {','.join(RUNS)}"


def run_lora(name, seed, cfg, out):
    """One run of lora.py -> what it measured, with the evaluations in the course of training."""
    folder = out / "demo_lora" / f"{name},seed={seed}"
    options = {field: getattr(cfg, field) for field in ("model", "task", "steps", "batch_size")}
    options |= {field: getattr(cfg, field) for field in ("eval_every", "asked", "held_out")}
    options |= {"seed": seed, "out": folder} | RUNS[name]
    command = [sys.executable, str(Path(__file__).with_name("lora.py"))]
    command += [f"--{option}={value}" for option, value in options.items()]

    # The run has already printed why it failed.
    done = subprocess.run(command)
    if done.returncode != 0:
        sys.exit(done.returncode)
    result = json.loads(read_text(folder / "lora.json"))
    result["log"] = [line for line in read_log(folder, "lora") if "val_loss" in line]
    return result


def forgotten(result):
    """How much worse the text of another kind has become, in nats per token."""
    return result["after"]["text_loss"] - result["before"]["text_loss"]


def range_text(values, digits=2):
    """The range of several numbers: "0.42 to 0.47", or one number if they are the same."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def compare(name, ours, theirs):
    """A sentence about two lists of numbers, one for each seed. Overlapping ranges are no
    difference, and one or two seeds are not enough to say that there is one."""
    if len(ours) < 3:
        return f"{name}: LoRA {range_text(ours)}, full {range_text(theirs)}"
    if min(ours) > max(theirs):
        return f"{name}: LoRA more"
    if max(ours) < min(theirs):
        return f"{name}: LoRA less"
    return f"{name}: no difference"


def finding(results):
    """The title of the figure."""
    if "lora" not in results or "full" not in results:
        return "What is learned and what is forgotten"
    lora, full = results["lora"], results["full"]
    learned = compare(
        "learned", [run["after"]["gold"] for run in lora], [run["after"]["gold"] for run in full]
    )
    lost = compare("forgotten", [forgotten(r) for r in lora], [forgotten(r) for r in full])
    share = f"LoRA with {lora[0]['share']:.1%} of the weights against full fine-tuning"
    n_seeds = len(lora)
    return f"{share}\n{learned}, {lost} ({n_seeds} seed{'s' if n_seeds > 1 else ''})"


def draw(results, title, path):
    """Left: the held-out loss in the course of training. Right: what is forgotten against what is
    learned so far, one point for each evaluation after the start."""
    fig, (left, right) = figure(title, columns=2, height=4.3)
    markers = "osD^vPX*h"
    for number, (name, runs) in enumerate(results.items()):
        style = {
            "marker": markers[number % len(markers)],
            "color": COLOURS[number % len(COLOURS)],
            "markersize": 5,
            "label": name,
        }
        for run in runs:
            steps = [line["step"] + 1 for line in run["log"]]
            losses = [line["val_loss"] for line in run["log"]]
            before = run["before"]
            left.plot([0, *steps], [before["val_loss"], *losses], **style)
            lost = [line["text_loss"] - before["text_loss"] for line in run["log"]]
            right.plot(losses, lost, **style)
            style["label"] = None  # each name stands once in the legend

    left.set(xlabel="optimizer step", ylabel="nats per held-out answer token", yscale="log")
    left.legend()
    right.axhline(0, color="black", linestyle=":")
    right.set(
        xlabel="nats per held-out answer token",
        ylabel="nats per token lost on another text",
    )
    right.invert_xaxis()  # who learns goes to the right
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    out = output_folder(cfg)

    # the runs, seed by seed
    results = {name: [] for name in cfg.runs.split(",")}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for name in results:
            print(f"--- {name}, seed {seed}", flush=True)
            result = run_lora(name, seed, cfg, out)
            if result["after"]["gold"] is None:
                fail(f"--task={cfg.task} has no checks, so there is nothing to compare")
            results[name].append(result)

    # what came out
    header = f"{'':10} {'share':>8} {'gold':>14} {'held-out nats':>14} {'forgotten':>18}"
    print(f"\n{header} {'s per step':>11} {'MB counted':>11} {'MB peak':>8}")
    for name, runs in results.items():
        first = runs[0]
        columns = [
            f"{name:10} {first['share']:8.2%}",
            f"{range_text([run['after']['gold'] for run in runs]):>14}",
            f"{range_text([run['after']['val_loss'] for run in runs]):>14}",
            f"{range_text([forgotten(run) for run in runs], 3):>18}",
            f"{range_text([run['seconds_per_step'] for run in runs]):>11}",
            f"{first['megabytes']:11.0f} {first['peak_megabytes'] or float('nan'):8.0f}",
        ]
        print(" ".join(columns))
    title = finding(results)
    print(f"\n{title}")
    save_metrics(
        out, name="demo_lora", results=results, finding=title, model=cfg.model, task=cfg.task
    )
    draw(results, title, out / "demo_lora.png")
