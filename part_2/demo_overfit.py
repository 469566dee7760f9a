"""
Part 2 - the same model and the same steps on less and less text: when training and validation part.

    python part_2/demo_overfit.py
    python part_2/demo_overfit.py --seeds=3
    python part_2/demo_overfit.py --sizes=1000,100000 --steps=1000

A model that has read a text often enough knows it by heart, and that is no help with the next text: the loss on the
text it trains on keeps falling, the loss on new text turns. When they part depends on how often each byte came by,
steps * batch * T / bytes. Both losses are measured alike, in one state of the model.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass, replace

import torch

from model import GPT, GPTConfig
from shared import Log, cli, fail, figure, save_figure, save_metrics, setup
from train import evaluate, get_batch, load_data

@dataclass
class Config:
    data: str = "stories"  # "stories", "shakespeare", or the path of a text file
    sizes: str = "2000,16000,128000,0"  # bytes to train on, one run each; 0: all there are
    steps: int = 800  # optimizer steps per run
    batch_size: int = 8  # sequences per step
    lr: float = 3e-3  # AdamW's
    eval_every: int = 80  # steps between measurements
    eval_bytes: int = 16000  # of training and of validation text per measurement, at most
    gap: float = 0.1  # nats that validation must stay above training to count as parted
    seeds: int = 1  # how many seeds; the README quotes 3
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        good = all(size.strip().isdigit() for size in self.sizes.split(","))
        assert good, f"sizes={self.sizes} must be numbers of bytes with commas between them"
        assert min(self.steps, self.eval_every, self.seeds) > 0, "steps, eval_every and seeds must be at least 1"

def run(ids, val_ids, cfg, gpt_cfg, device, log, done):
    """One training on ids -> its measurements, a tensor (E, 3) of step, training and validation loss."""
    torch.manual_seed(cfg.seed)
    model, T = GPT(gpt_cfg).to(device), gpt_cfg.block_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    found = []
    for step in range(cfg.steps + 1):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            texts = (ids[:cfg.eval_bytes], val_ids[:cfg.eval_bytes])
            found.append([step, *(evaluate(model, text, T, device)[0] for text in texts)])
        if step < cfg.steps:
            x, y = get_batch(ids, step, cfg, T)
            _, loss = model(x.to(device), y.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log(done + step, bytes=len(ids), loss=loss.item())
    return torch.tensor(found)

def parting(found, gap):
    """Measurements (E, 3) -> the first step from which validation stays more than gap above training, or None."""
    parted = None
    for step, train, val in reversed(found.tolist()):
        if val - train <= gap:
            break
        parted = int(step)
    return parted

def said_of(size, runs, gap):
    """runs (seeds, E, 3) -> one line: when they parted, and how far apart they end."""
    when = [parting(found, gap) for found in runs]
    ends = runs[:, -1, 2] - runs[:, -1, 1]
    best = runs[:, :, 2].min(dim=1).values
    when = ", ".join("never" if step is None else f"at step {step}" for step in dict.fromkeys(when))
    spread = f" ({ends.min():.3f} to {ends.max():.3f})" if len(runs) > 1 else ""
    return (f"{size:>9,} bytes: parted {when}; gap {ends.mean():.3f}{spread}, validation {runs[:, -1, 2].mean():.3f} "
            f"at the end, {best.mean():.3f} at its best")

def draw(results, cfg, said, path):
    """results: {bytes: (seeds, E, 3)}. Left the losses over the training, right the gap at the end over the size."""
    fig, (left, right) = figure(said, columns=2, height=5)
    for i, (size, runs) in enumerate(results.items()):
        step, train, val = runs.mean(dim=0).T
        left.plot(step, val, color=f"C{i}", label=f"{size:,} bytes")
        left.plot(step, train, color=f"C{i}", linestyle="--")
        if len(runs) > 1:
            left.fill_between(step, runs[:, :, 2].amin(dim=0), runs[:, :, 2].amax(dim=0), color=f"C{i}", alpha=0.2)
        ends = runs[:, -1, 2] - runs[:, -1, 1]
        right.plot([size] * len(ends), ends, "o", color=f"C{i}")
    left.plot([], [], color="black", label="new text")
    left.plot([], [], color="black", linestyle="--", label="training text")
    left.set(xlabel="optimizer step", ylabel="nats per byte", ylim=(0, None))
    right.axhline(cfg.gap, color="black", linestyle=":", label=f"parted: {cfg.gap} nats")
    right.set(xlabel="bytes to train on", ylabel="validation - training at the end, nats", xscale="log")
    right.legend()
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg, gpt_cfg = cli(Config(), GPTConfig(n_layer=2, n_embd=64))
    device, _ = setup(cfg)
    T = gpt_cfg.block_size
    train_ids, val_ids, _ = load_data(cfg, gpt_cfg)
    sizes = sorted({min(int(size) or len(train_ids), len(train_ids)) for size in cfg.sizes.split(",")})
    sizes[0] > T or fail(f"--sizes={cfg.sizes}: one block is {T} + 1 bytes, take more")

    # runs
    log, results = Log(cfg, len(sizes) * cfg.seeds * cfg.steps, name="demo_overfit"), {}
    for i, size in enumerate(sizes):
        results[size] = torch.stack([run(train_ids[:size], val_ids, replace(cfg, seed=cfg.seed + j), gpt_cfg, device,
                                         log, (i * cfg.seeds + j) * cfg.steps) for j in range(cfg.seeds)])

    # what came out
    for size, runs in results.items():
        print(f"{said_of(size, runs, cfg.gap)}; a byte came by {cfg.steps * cfg.batch_size * T / size:,.1f} times")
    ends = {size: runs[:, -1, 2] - runs[:, -1, 1] for size, runs in results.items()}
    steps = {size: parting(runs.mean(dim=0), cfg.gap) for size, runs in results.items()}
    said = "\n".join(f"{size:,} bytes: " + (
        f"never parted, {ends[size].mean():.2f} nats apart at the end" if steps[size] is None else
        f"parted at step {steps[size]}, {ends[size].mean():.2f} nats apart at the end")
        for size in (sizes[0], sizes[-1]))
    draw(results, cfg, said, Path(cfg.out) / "demo_overfit.png")
    save_metrics(cfg, name="demo_overfit", sizes=sizes, parted_at=list(steps.values()), seed=cfg.seed, seeds=cfg.seeds,
                 gap=[end.tolist() for end in ends.values()], seconds=log.seconds,
                 val_end=[runs[:, -1, 2].tolist() for runs in results.values()],
                 val_best=[runs[:, :, 2].min(dim=1).values.tolist() for runs in results.values()])
