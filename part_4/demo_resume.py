"""
Part 4 - kill -9 in the middle of a run: what is lost, what --resume=1 brings back, and what lies in the files.

    python part_4/demo_resume.py
    python part_4/demo_resume.py --kill=50 --save_every=10      another accident

Three real runs of train.py: one in peace, one killed, and the killed one resumed. A batch depends on seed and step
alone, so weights, the optimizers' states and the number of the step are all that a resume needs, and on a CPU the two
curves must agree to the last bit. The second figure reads the event files as TensorBoard does, the killed run's and the
resumed one's in one folder: the resumed one tells it to forget what came after the resume point (purge_step).
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import shutil
import subprocess
import time
from dataclasses import dataclass

import torch

from shared import cli, fail, figure, load_checkpoint, need, read_jsonl, save_figure, save_metrics, setup

TRAIN = str(Path(__file__).resolve().parent / "train.py")

@dataclass
class Config:
    data: str = "stories"  # "stories" (the built-in world), "shakespeare" (a download), or the path of a text file
    steps: int = 60  # optimizer steps of a run
    save_every: int = 20  # steps between resume points
    kill: int = 33  # the step in whose log line the killer finds its moment
    n_embd: int = 64  # channels
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def command(cfg, out, *more):
    same = [f"--{k}={getattr(cfg, k)}" for k in ("data", "steps", "save_every", "n_embd", "seed", "device")]
    return [sys.executable, TRAIN, "--n_layer=2", "--vocab_size=512", "--eval_every=20", *same, f"--out={out}", *more]

def run(cfg, out, *more):
    """train.py from start to end -> the lines of its log."""
    done = subprocess.run(command(cfg, out, *more), capture_output=True, text=True)
    need(done.returncode == 0, f"train.py ended with {done.returncode}: {done.stderr.strip()}")
    return read_jsonl(out / "log.jsonl", ["step", "loss"])

def run_and_kill(cfg, out):
    """The same, killed once the log has the line of step cfg.kill -> its lines, and the step of its resume point."""
    child = subprocess.Popen(command(cfg, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, sign = out / "log.jsonl", f'{{"step": {cfg.kill},'
    while child.poll() is None and not (log.exists() and sign in log.read_text()):
        time.sleep(0.002)
    child.kill()  # kill -9: no handler runs, no file is closed
    child.wait() == -9 or fail("the run was over before it could be killed: a smaller --kill, or more --steps")
    whole = log.read_text().split("\n")[:-1]  # the last line may be torn
    return [json.loads(line) for line in whole], load_checkpoint(out / "resume.pt", "resume")["step"]

def largest_difference(a, b):
    """Of two logs, over every number in them."""
    need([set(r) for r in a] == [set(r) for r in b], "the two logs have different steps or keys")
    return max(float(abs(x[k] - y[k])) for x, y in zip(a, b) for k in x)

def size(value):
    """Bytes of what a checkpoint holds: 8 for a number, nested or not."""
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(size(k) + size(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return sum(map(size, value))
    return len(value) if isinstance(value, (str, bytes)) else 8

def contents(path):
    """A checkpoint -> {what: bytes}. What is left over is the file format's."""
    saved = load_checkpoint(path, None)
    muon, adamw = saved.get("optimizers", [{}, {}])
    parts = {"weights": size(saved["weights"]), "Muon: momentum": size(muon), "AdamW: two moments": size(adamw)}
    parts["tokenizer"] = size(saved.get("tokenizer", {}))
    parts["options, step"] = size(saved) - sum(parts.values())
    parts["file format"] = path.stat().st_size - sum(parts.values())
    return parts

def board(out):
    """The event files of a run, as TensorBoard joins them -> {key: (steps, values)}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(out)).Reload()
    points = {key: events.Scalars(key) for key in events.Tags()["scalars"]}
    return {key: ([p.step for p in found], [p.value for p in found]) for key, found in points.items()}

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    folders = [Path(cfg.out) / f"demo_resume_{name}" for name in ("straight", "killed")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # an older run's resume point would do too well
    print(f"three runs of train.py, {cfg.steps} steps each", flush=True)
    straight = run(cfg, folders[0])
    killed, point = run_and_kill(cfg, folders[1])
    print(f"killed after step {killed[-1]['step']}, its resume point is of step {point}", flush=True)
    resumed = run(cfg, folders[1], "--resume=1")
    gap = largest_difference(straight, resumed)
    a, b = (load_checkpoint(folder / "base.pt", "base")["weights"] for folder in folders)
    gap_weights = max((a[k] - b[k]).abs().max().item() for k in a)

    # curves, and what the checkpoints hold
    same = "the same to the last bit" if gap == gap_weights == 0 else f"NOT the same, {max(gap, gap_weights):.1e} apart"
    said = f"Killed at step {killed[-1]['step']}, resumed from {point}: {same}"
    print(f"{said}. Largest difference: {gap} in the logs, {gap_weights} in the weights")
    fig, (above, below) = figure(said, rows=2, height=7)
    for log, name, look in ((straight, "never killed", {"lw": 6, "alpha": 0.4}), (killed, "killed", {"lw": 2}),
                            (resumed[point:], "resumed", {"ls": "--", "color": "black"})):
        above.plot([r["step"] for r in log], [r["loss"] for r in log], label=name, **look)
    above.axvline(point, color="gray", ls=":", label="resume point")
    above.set(xlabel="step", ylabel="training loss, nats per token")
    parts = {file: contents(folders[1] / file) for file in ("resume.pt", "base.pt")}
    for i, (file, held) in enumerate(parts.items()):
        bars = below.barh([y + 0.4 * i for y in range(len(held))], [n / 1000 for n in held.values()], 0.4, label=file)
        below.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    below.set(xlabel="kB", yticks=[y + 0.2 for y in range(len(held))], yticklabels=list(held))
    below.invert_yaxis()
    above.legend()
    below.legend()
    save_figure(fig, Path(cfg.out) / "demo_resume.png")

    # TensorBoard
    points = board(folders[1])
    steps, again = points["loss"][0], len(killed) - point
    said = f"{again} steps ran twice: TensorBoard shows {len(steps)} points for {len({*steps})} of {cfg.steps} steps"
    print(said)
    fig, axes = figure(said, "step", rows=2, columns=2, height=6)
    for ax, key in zip(axes.flat, ("loss", "lr", "grad_norm", "val_loss")):
        ax.plot(*points[key], ".-", label="event files, smoothing 0")
        ax.set_ylabel(key)
    axes[0, 0].legend(fontsize=9)
    save_figure(fig, Path(cfg.out) / "demo_resume_tensorboard.png")
    save_metrics(cfg, name="demo_resume", difference=gap, difference_weights=gap_weights, killed_at=killed[-1]["step"],
                 resumed_from=point, run_twice=again, in_tensorboard=len({*steps}), in_log=len(resumed), seed=cfg.seed,
                 bytes={f"{file}: {what}": n for file, held in parts.items() for what, n in held.items()})
