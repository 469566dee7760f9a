"""
Part 4, resuming: what does a kill -9 in the middle of a run cost, what does --resume bring back,
and what do the files hold?

    python part_4/demo_resume.py
    python part_4/demo_resume.py --kill=50 --save_every=10

Three real runs of train.py: one that nothing disturbs, one that is killed, and the killed one
resumed. A batch depends on the seed and the step alone, so the weights, the states of the
optimizers and the number of the step are all that a resume needs. On a CPU the two curves must
agree to the last bit.

The second figure reads the event files of the killed run and of the resumed one, as TensorBoard
does. The resumed run tells it to forget what came after the resume point (purge_step).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared import (
    fail,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    read_log,
    save_figure,
    save_metrics,
    set_seed,
)

TRAIN = Path(__file__).resolve().parent / "train.py"


@dataclass
class Config:
    data: str = "stories"  # stories (the built-in world), shakespeare (a download) or a text file
    steps: int = 60  # optimizer steps of each run
    save_every: int = 20  # steps between resume points, out/resume.pt
    kill: int = 33  # the step after which the second run is killed
    n_embd: int = 64  # channels of the model
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert 0 < self.save_every <= self.kill, (
            f"save_every={self.save_every} must be from 1 to kill={self.kill}: "
            "without a resume point nothing can be resumed"
        )
        assert self.kill < self.steps - 1, (
            f"kill={self.kill} must be less than {self.steps - 1}, the last step"
        )


# the three runs -----------------------------------------------------------------------------------


def train_command(cfg, out, resume=False):
    """The command line of a run of train.py that writes to `out`."""
    command = [sys.executable, str(TRAIN), f"--out={out}"]
    command += ["--n_layer=2", "--vocab_size=512", "--eval_every=20"]
    for name in ("data", "steps", "save_every", "n_embd", "seed", "device"):
        command.append(f"--{name}={getattr(cfg, name)}")
    if resume:
        command.append("--resume")
    return command


def run_to_the_end(cfg, out, resume=False):
    """Runs train.py from start to end -> the records of its log. What it prints goes to stderr."""
    command = train_command(cfg, out, resume)
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        fail(f"train.py ended with code {done.returncode}: {done.stderr}")
    return read_log(out)


class KilledRun(NamedTuple):
    records: list  # of its log, up to the moment when it was killed
    resume_step: int  # the step that a resume would go on with


def run_and_kill(cfg, out):
    """Runs train.py and kills it as soon as its log has a line of step cfg.kill -> KilledRun."""
    child = subprocess.Popen(train_command(cfg, out), stdout=sys.stderr, stderr=subprocess.DEVNULL)
    log = out / "log.jsonl"
    beginning = f'{{"step": {cfg.kill},'
    while child.poll() is None:
        if log.exists() and beginning in log.read_text():
            break
        time.sleep(0.002)

    # kill -9: no handler runs and no file is closed.
    child.kill()
    if child.wait() != -9:
        fail("the run ended before it could be killed: ask for a smaller --kill or more --steps")

    lines = log.read_text().split("\n")[:-1]  # the last line may be torn
    records = [json.loads(line) for line in lines]
    resume_point = load_checkpoint(out / "resume.pt", "resume")
    return KilledRun(records, resume_point["step"])


def largest_difference(records, other_records):
    """The largest difference of two logs, over all numbers in them."""
    keys = [set(record) for record in records]
    other_keys = [set(record) for record in other_records]
    assert keys == other_keys, "the two logs have different steps or different values"

    largest = 0.0
    for record, other in zip(records, other_records):
        for name, value in record.items():
            largest = max(largest, abs(value - other[name]))
    return largest


def largest_weight_difference(path, other_path):
    """The largest difference of two checkpoints, over all weights in them."""
    weights = load_checkpoint(path, "base")["weights"]
    other_weights = load_checkpoint(other_path, "base")["weights"]
    largest = 0.0
    for name, weight in weights.items():
        difference = (weight - other_weights[name]).abs().max().item()
        largest = max(largest, difference)
    return largest


# what the files hold ------------------------------------------------------------------------------


def size_in_bytes(value):
    """The bytes of what a checkpoint holds, nested or not. A number counts as 8."""
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(size_in_bytes(key) + size_in_bytes(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return sum(size_in_bytes(item) for item in value)
    if isinstance(value, (str, bytes)):
        return len(value)
    return 8


def checkpoint_contents(path):
    """The bytes of each part of a checkpoint -> {part: bytes}. They add up to the file's size."""
    saved = load_checkpoint(path, None)
    muon, adamw = saved.get("optimizers", [{}, {}])
    contents = {
        "weights": size_in_bytes(saved["weights"]),
        "Muon: momentum": size_in_bytes(muon),
        "AdamW: two moments": size_in_bytes(adamw),
        "tokenizer": size_in_bytes(saved.get("tokenizer", {})),
    }
    contents["options, step"] = size_in_bytes(saved) - sum(contents.values())
    contents["file format"] = path.stat().st_size - sum(contents.values())
    return contents


def read_tensorboard(out):
    """The event files of a folder, joined as TensorBoard joins them -> {name: (steps, values)}."""
    events = EventAccumulator(str(out)).Reload()
    curves = {}
    for name in events.Tags()["scalars"]:
        points = events.Scalars(name)
        steps = [point.step for point in points]
        values = [point.value for point in points]
        curves[name] = (steps, values)
    return curves


# figures ------------------------------------------------------------------------------------------


def draw_curve(ax, records, label, **style):
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    ax.plot(steps, losses, label=label, **style)


def draw(title, straight, killed, resumed, contents, path):
    """Above: the three training curves. Below: what the checkpoints hold.

    straight and resumed are the records of logs, killed is a KilledRun, and contents is
    {file: {part: bytes}}.
    """
    fig, (above, below) = figure(title, rows=2, height=7)
    draw_curve(above, straight, "never killed", linewidth=6, alpha=0.4)
    draw_curve(above, killed.records, "killed", linewidth=2)
    draw_curve(above, resumed[killed.resume_step :], "resumed", linestyle="--", color="black")
    above.axvline(killed.resume_step, color="gray", linestyle=":", label="resume point")
    above.set(xlabel="step", ylabel="training loss, nats per token")
    above.legend()

    for i, (file, parts) in enumerate(contents.items()):
        places = [place + 0.4 * i for place in range(len(parts))]
        kilobytes = [size / 1000 for size in parts.values()]
        bars = below.barh(places, kilobytes, 0.4, label=file)
        below.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    below.set_yticks([place + 0.2 for place in range(len(parts))], list(parts))
    below.set_xlabel("kB")
    below.margins(x=0.1)  # room for the numbers
    below.invert_yaxis()
    below.legend()
    save_figure(fig, path)


def draw_tensorboard(title, curves, path):
    """Four of the curves that TensorBoard shows. curves: {name: (steps, values)}"""
    fig, axes = figure(title, "step", rows=2, columns=2, height=6)
    for ax, name in zip(axes.flat, ("loss", "lr", "grad_norm", "val_loss")):
        steps, values = curves[name]
        ax.plot(steps, values, ".-", label="event files, smoothing 0")
        ax.set_ylabel(name)
    axes[0, 0].legend(fontsize=9)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    pick_device(cfg.device)
    out = output_folder(cfg)

    # An older run's resume point would spoil the experiment.
    straight_out = out / "demo_resume_straight"
    killed_out = out / "demo_resume_killed"
    shutil.rmtree(straight_out, ignore_errors=True)
    shutil.rmtree(killed_out, ignore_errors=True)

    # Three runs
    print(f"three runs of train.py, {cfg.steps} steps each", flush=True)
    straight = run_to_the_end(cfg, straight_out)
    killed = run_and_kill(cfg, killed_out)
    killed_step = killed.records[-1]["step"]
    print(
        f"killed after step {killed_step}, its resume point is at step {killed.resume_step}",
        flush=True,
    )
    resumed = run_to_the_end(cfg, killed_out, resume=True)

    # Are they the same?
    log_difference = largest_difference(straight, resumed)
    weight_difference = largest_weight_difference(straight_out / "base.pt", killed_out / "base.pt")
    if log_difference == 0 and weight_difference == 0:
        finding = "the same to the last bit"
    else:
        finding = f"NOT the same, {max(log_difference, weight_difference):.1e} apart"
    title = f"Killed at step {killed_step}, resumed from {killed.resume_step}: {finding}"
    print(
        f"{title}. Largest difference: {log_difference} in the logs, "
        f"{weight_difference} in the weights"
    )
    contents = {}
    for file in ("resume.pt", "base.pt"):
        contents[file] = checkpoint_contents(killed_out / file)
    draw(title, straight, killed, resumed, contents, out / "demo_resume.png")

    # What TensorBoard shows of the killed run and the resumed one
    curves = read_tensorboard(killed_out)
    steps, _ = curves["loss"]
    run_twice = len(killed.records) - killed.resume_step
    title = (
        f"{run_twice} steps ran twice: TensorBoard shows {len(steps)} points "
        f"for {len(set(steps))} of {cfg.steps} steps"
    )
    print(title)
    draw_tensorboard(title, curves, out / "demo_resume_tensorboard.png")

    flat_contents = {}
    for file, parts in contents.items():
        for part, size in parts.items():
            flat_contents[f"{file}: {part}"] = size
    save_metrics(
        out,
        name="demo_resume",
        difference=log_difference,
        difference_weights=weight_difference,
        killed_at=killed_step,
        resumed_from=killed.resume_step,
        run_twice=run_twice,
        in_tensorboard=len(set(steps)),
        in_log=len(resumed),
        bytes=flat_contents,
        seed=cfg.seed,
    )
