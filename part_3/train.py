"""
Part 3 - train the modern GPT on the same bytes, then let it stream, far past its window in constant memory.

    python part_3/train.py                                    the world's stories -> part_3/out/gpt.pt
    python part_3/train.py --window=48 --sink=4               a sliding window with attention sinks
    python part_3/train.py --data=my.txt --steps=500          your own text; its last 10 % are for validation

From part_2/train.py
    New      stream
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import time
from dataclasses import asdict, dataclass

import torch

from model import GPT, GPTConfig, KVCache
from shared import (Log, cli, fail, figure, read_jsonl, read_text, require, save_checkpoint, save_figure, save_metrics,
                    setup)

SAMPLING = {  # ways to draw the next byte from the same probabilities
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "temperature 0.8, top-k 10": {"temperature": 0.8, "top_k": 10},
    "top-p 0.9": {"top_p": 0.9},
}

@dataclass
class Config:
    # data
    data: str = "stories"  # "stories" (the built-in world), "shakespeare" (a download), or the path of a text file
    # optimization
    steps: int = 600  # optimizer steps
    batch_size: int = 8  # sequences per step
    lr: float = 1e-3  # AdamW's
    # run
    eval_every: int = 200  # steps between evaluations on the whole validation split
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "eval_every"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"

# data ----------------------------------------------------------------------------------------------------------------

def encode(text):
    """Text -> the numbers of its UTF-8 bytes: "né" -> [110, 195, 169]."""
    return list(text.encode("utf-8", "replace"))  # half a surrogate pair has no UTF-8, it becomes "?"

def decode(ids):
    """The inverse: decode(encode(text)) == text. Bytes that are no UTF-8, as a model may say them, become U+FFFD."""
    return bytes(ids).decode("utf-8", "replace")

def load_data(cfg, gpt_cfg):
    """-> training ids (N,), validation ids (M,), true nats per byte or None."""
    entropy = None
    if cfg.data == "stories":
        folder = require("data/stories")
        train, val = read_text(folder / "train.txt"), read_text(folder / "val.txt")
        entropy = json.loads(read_text(folder / "facts.json"))["true_nats_per_byte"]
    else:
        text = read_text(cfg.data)
        train, val = text[:int(0.9 * len(text))], text[int(0.9 * len(text)):]
    train_ids, val_ids = torch.tensor(encode(train)), torch.tensor(encode(val))
    if min(len(train_ids), len(val_ids)) <= gpt_cfg.block_size:
        fail(f"--data={cfg.data}: {len(val_ids)} bytes to validate on, but one block is {gpt_cfg.block_size} + 1: "
             "take a longer text or a smaller --block_size")
    if gpt_cfg.vocab_size < 256:
        fail(f"--vocab_size={gpt_cfg.vocab_size}: there are 256 bytes")
    return train_ids, val_ids, entropy

def get_batch(ids, step, cfg, block_size):
    """The batch of a step depends on seed and step alone: (batch_size, T) inputs, and the same shifted by one."""
    g = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    starts = torch.randint(len(ids) - block_size, (cfg.batch_size, 1), generator=g)
    window = ids[starts + torch.arange(block_size + 1)]  # (batch_size, T + 1)
    return window[:, :-1], window[:, 1:]

# evaluate, sample ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, ids, block_size, device):
    """The whole validation split in blocks -> nats per byte, next-byte accuracy."""
    nats = right = count = 0
    for i in range(0, len(ids) - 1, 64 * block_size):
        piece = ids[i:i + 64 * block_size + 1]
        full = (len(piece) - 1) // block_size * block_size
        blocks = [(piece[:full].view(-1, block_size), piece[1:full + 1].view(-1, block_size))] if full else []
        rest = [(piece[None, full:-1], piece[None, full + 1:])] if full < len(piece) - 1 else []
        for x, y in blocks + rest:
            logits, loss = model(x.to(device), y.to(device))
            nats += loss.item() * y.numel()
            right += (logits.argmax(dim=-1).cpu() == y).sum().item()
            count += y.numel()
    return nats / count, right / count

def show_samples(title, model, prompt):
    """Prints how the model goes on from prompt (1, T), in each way of sampling."""
    print(f"\n{title}, from {decode(prompt[0].tolist())!r}:")
    for name, knobs in SAMPLING.items():
        text = decode(model.generate(prompt, 120, **knobs)[0, prompt.size(1):].tolist())
        print(f"  {name:26} {text!r}")
    print(flush=True)

@torch.no_grad()
def stream(model, prompt, ids, windows=20):
    """Reads `windows` windows of ids token by token through the ring -> nats per byte, ms per token, ring's bytes."""
    window = model.cfg.window or model.cfg.block_size
    cache, nats, start = KVCache(model.cfg, 1, ids.device), 0.0, time.time()
    size = cache.k.numel() + cache.v.numel()
    ids = torch.cat([prompt[0], ids])[:windows * window + 1]
    for t in range(len(ids) - 1):
        logits, _ = model(ids[None, t:t + 1], cache=cache)
        nats -= logits[0, 0].log_softmax(dim=-1)[ids[t + 1]].item()
    assert cache.k.numel() + cache.v.numel() == size, "the ring grew"
    return nats / (len(ids) - 1), 1000 * (time.time() - start) / (len(ids) - 1), 4 * size

if __name__ == "__main__":
    cfg, gpt_cfg = cli(Config(), GPTConfig(vocab_size=256, block_size=128))
    device, _ = setup(cfg)

    # data
    train_ids, val_ids, entropy = load_data(cfg, gpt_cfg)
    print(f"data {cfg.data}: {len(train_ids):,} bytes to train on, {len(val_ids):,} to validate on, "
          f"{len(train_ids.unique())} different ones; a step reads {cfg.batch_size * gpt_cfg.block_size:,}")

    # model and optimizer
    model = GPT(gpt_cfg).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    params = sum(p.numel() for p in model.parameters())
    log = Log(cfg, cfg.steps)
    print(f"{params:,} parameters, {device}")
    prompt = val_ids[None, :32].to(device)  # how the text that it never sees begins
    show_samples("before training", model, prompt)

    # loop
    seconds = 0.0
    for step in range(cfg.steps):
        start = time.time()
        x, y = get_batch(train_ids, step, cfg, gpt_cfg.block_size)
        _, loss = model(x.to(device), y.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.time() - start

        # once in a while: evaluate
        values = {"loss": loss.item()}
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            val_loss, accuracy = evaluate(model, val_ids, gpt_cfg.block_size, device)
            values |= {"val_loss": val_loss, "val_accuracy": accuracy}
        log(step, **values)

    # what it learned
    path = Path(cfg.out) / "gpt.pt"
    save_checkpoint(path, kind="gpt", changed=cfg.changed, step=cfg.steps, config=asdict(cfg),
                    gpt_config=asdict(gpt_cfg), weights=model.state_dict())
    stream_loss, stream_ms, ring = stream(model, prompt, val_ids[32:].to(device))
    save_metrics(cfg, val_loss=val_loss, perplexity=math.exp(val_loss), val_accuracy=accuracy,
                 true_nats_per_byte=entropy, seconds=seconds, steps=cfg.steps, params=params, seed=cfg.seed,
                 stream_loss=stream_loss, stream_ms=stream_ms, ring_bytes=ring)
    show_samples(f"after {cfg.steps} steps", model, prompt)
    print(f"{val_loss:.3f} nats per byte on new text, perplexity {math.exp(val_loss):.2f} of 256, "
          f"{accuracy:.1%} of next bytes right; {seconds:.0f} s of training")
    print(f"streaming 20 windows: {stream_loss:.3f} nats and {stream_ms:.2f} ms per byte, cache always {ring:,} bytes")

    # figure
    records = read_jsonl(Path(cfg.out) / "log.jsonl", ["step", "loss"])
    title = f"{val_loss:.3f} nats per byte on new text after {seconds:.0f} s"
    fig, ax = figure(title, "optimizer step", "nats per byte")
    ax.plot([r["step"] for r in records], [r["loss"] for r in records], alpha=0.6, label="training batch")
    evals = [r for r in records if "val_loss" in r]
    ax.plot([r["step"] for r in evals], [r["val_loss"] for r in evals], "o-", color="C1", label="validation")
    share = train_ids.bincount() / len(train_ids)
    ax.axhline(torch.special.entr(share).sum(), color="C3", linestyle=":", label="how often each byte occurs, no more")
    if entropy:
        ax.axhline(entropy, color="C2", linestyle="--", label=f"the world's true entropy, {entropy:.3f}")
    ax.set_ylim(0, None)
    fig.legend(loc="outside lower center", ncols=2)
    save_figure(fig, Path(cfg.out) / "train.png")
