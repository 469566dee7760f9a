"""
Part 2: when does a model learn its text by heart? The same model and the same steps on less and
less text.

    python part_2/demo_overfit.py
    python part_2/demo_overfit.py --seeds=3
    python part_2/demo_overfit.py --sizes=1000,100000 --steps=1000

A model that has read a text often enough knows it by heart, which does not help with the next text.
The loss on the training text keeps falling, while the loss on new text turns and rises. The step at
which the two losses part depends on how often each byte was read: steps * batch_size * T / bytes.
Both losses are measured in the same way, on the same state of the model.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass, replace

import torch

from model import GPT, GPTConfig
from shared import (
    Log,
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
    set_seed,
)
from train import evaluate, get_batch, load_data


@dataclass
class Config:
    data: str = "stories"  # stories (the built-in world), shakespeare (a download) or a text file
    sizes: str = "2000,16000,128000,0"  # bytes to train on, one run each; 0: all there are
    steps: int = 800  # optimizer steps of each run
    batch_size: int = 8  # sequences per step
    lr: float = 3e-3  # learning rate of AdamW
    eval_every: int = 80  # steps between evaluations on training and validation text
    eval_bytes: int = 16000  # longest piece of each text that an evaluation reads
    gap: float = 0.1  # nats by which the two losses must stay apart to count as parted
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for size in self.sizes.split(","):
            assert size.strip().isdigit(), f"sizes={self.sizes} must be numbers with commas between"
        for name in ("steps", "batch_size", "eval_every", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.eval_bytes > 1, f"eval_bytes={self.eval_bytes} must be at least 2"


def run(ids, val_ids, cfg, gpt_cfg, device, log, steps_before):
    """One training on ids -> its evaluations, a tensor (E, 3) of step, training and validation
    loss."""
    torch.manual_seed(cfg.seed)
    block_size = gpt_cfg.block_size
    model = GPT(gpt_cfg).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    evaluations = []
    for step in range(cfg.steps + 1):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            train_loss = evaluate(model, ids[: cfg.eval_bytes], block_size, device).loss
            val_loss = evaluate(model, val_ids[: cfg.eval_bytes], block_size, device).loss
            evaluations.append([step, train_loss, val_loss])
        if step == cfg.steps:
            break
        x, y = get_batch(ids, step, cfg, block_size)
        _, loss = model(x.to(device), y.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log(steps_before + step, bytes=len(ids), loss=loss.item())
    return torch.tensor(evaluations)


def parting_step(evaluations, gap):
    """evaluations (E, 3) -> the first step from which the validation loss stays more than gap above
    the training loss, or None if it does not."""
    parted = None
    for step, train_loss, val_loss in reversed(evaluations.tolist()):
        if val_loss - train_loss <= gap:
            break
        parted = int(step)
    return parted


def final_gaps(runs):
    """runs (seeds, E, 3) -> validation minus training loss at the end, (seeds,)."""
    return runs[:, -1, 2] - runs[:, -1, 1]


def describe_parting(step):
    if step is None:
        return "never parted"
    return f"parted at step {step}"


def describe(size, runs, gap):
    """runs (seeds, E, 3) of one size -> a line: when the losses part, and how far."""
    outcomes = []
    for evaluations in runs:
        outcome = describe_parting(parting_step(evaluations, gap))
        if outcome not in outcomes:
            outcomes.append(outcome)
    gaps = final_gaps(runs)
    spread = f" ({gaps.min():.3f} to {gaps.max():.3f})" if len(runs) > 1 else ""
    final = runs[:, -1, 2].mean()
    best = runs[:, :, 2].min(dim=1).values.mean()
    return (
        f"{size:>9,} bytes: {', '.join(outcomes)}; gap {gaps.mean():.3f}{spread}, validation "
        f"{final:.3f} at the end, {best:.3f} at its best"
    )


def describe_briefly(size, runs, gap):
    """The same for the title of the figure, from the mean over the seeds."""
    outcome = describe_parting(parting_step(runs.mean(dim=0), gap))
    final_gap = round(final_gaps(runs).mean().item(), 2) + 0.0  # adding 0 turns -0.0 into 0.0
    return f"{size:,} bytes: {outcome}, {final_gap:.2f} nats apart at the end"


def draw(results, gap, title, path):
    """Left the losses over training, right the final gap by size of the text.

    results: {bytes: evaluations (seeds, E, 3)}.
    """
    fig, (left, right) = figure(title, columns=2, height=5)
    for i, (size, runs) in enumerate(results.items()):
        step, train_loss, val_loss = runs.mean(dim=0).T
        left.plot(step, val_loss, color=f"C{i}", label=f"{size:,} bytes")
        left.plot(step, train_loss, color=f"C{i}", linestyle="--")
        if len(runs) > 1:
            low = runs[:, :, 2].amin(dim=0)
            high = runs[:, :, 2].amax(dim=0)
            left.fill_between(step, low, high, color=f"C{i}", alpha=0.2)
        gaps = final_gaps(runs)
        right.plot([size] * len(gaps), gaps, "o", color=f"C{i}")

    left.plot([], [], color="black", label="new text")
    left.plot([], [], color="black", linestyle="--", label="training text")
    left.set(xlabel="optimizer step", ylabel="nats per byte", ylim=(0, None))
    right.axhline(gap, color="black", linestyle=":", label=f"counts as parted: {gap} nats")
    right.set(xlabel="bytes to train on", xscale="log")
    right.set_ylabel("validation - training loss at the end, nats")
    right.legend()
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg, gpt_cfg = parse_args(Config, GPTConfig, n_layer=2, n_embd=64)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    data = load_data(cfg, gpt_cfg)

    # sizes: 0 means everything, and none is larger than that
    everything = len(data.train_ids)
    sizes = set()
    for text in cfg.sizes.split(","):
        size = int(text)
        if size == 0 or size > everything:
            size = everything
        sizes.add(size)
    sizes = sorted(sizes)
    if sizes[0] <= gpt_cfg.block_size:
        fail(f"--sizes={cfg.sizes}: one block is {gpt_cfg.block_size} + 1 bytes; use larger sizes")
    out = output_folder(cfg)

    # every size, every seed
    log = Log(out, len(sizes) * cfg.seeds * cfg.steps, name="demo_overfit")
    results = {}
    steps_before = 0
    for size in sizes:
        runs = []
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            run_cfg = replace(cfg, seed=seed)
            ids = data.train_ids[:size]
            runs.append(run(ids, data.val_ids, run_cfg, gpt_cfg, device, log, steps_before))
            steps_before += cfg.steps
        results[size] = torch.stack(runs)

    # what came out
    for size, runs in results.items():
        times = cfg.steps * cfg.batch_size * gpt_cfg.block_size / size
        print(f"{describe(size, runs, cfg.gap)}; each byte was read {times:,.1f} times")
    smallest = describe_briefly(sizes[0], results[sizes[0]], cfg.gap)
    largest = describe_briefly(sizes[-1], results[sizes[-1]], cfg.gap)
    draw(results, cfg.gap, f"{smallest}\n{largest}", out / "demo_overfit.png")
    save_metrics(
        out,
        name="demo_overfit",
        sizes=sizes,
        parted_at=[parting_step(runs.mean(dim=0), cfg.gap) for runs in results.values()],
        seed=cfg.seed,
        seeds=cfg.seeds,
        gap=[final_gaps(runs).tolist() for runs in results.values()],
        seconds=log.seconds,
        val_end=[runs[:, -1, 2].tolist() for runs in results.values()],
        val_best=[runs[:, :, 2].min(dim=1).values.tolist() for runs in results.values()],
    )
