"""
Part 4 - train the GPT at scale: BPE, accumulation, mixed precision, schedule, Muon, checkpoints, resume, DDP.

    python part_4/train.py                                        the world's stories -> part_4/out/base.pt
    python part_4/train.py --data=my.txt --steps=500              your own text; its last 10 % are for validation
    python part_4/train.py --data=shakespeare --target_loss=1.88  stop at a loss, print the seconds
    python part_4/train.py --resume=1                             go on after a crash, to the bit on a CPU
    python part_4/train.py --batch_size=64 --accum=4              a big batch in four micro-batches
    torchrun --nproc_per_node=2 part_4/train.py                   the same batch shared by two processes
    tensorboard --logdir=part_4/out

From part_3/train.py
    New      document_ends, lr_scale, make_optimizers, backward, save
    Changed  Config, load_data, get_batch, evaluate
    Removed  encode, decode, show_samples, stream
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import os
import re
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from model import GPT, GPTConfig
from shared import (Log, cli, fail, figure, load_checkpoint, read_jsonl, read_text, require, save_checkpoint,
                    save_figure, save_metrics, setup)
from tokenizer import SPECIAL, Tokenizer

@dataclass
class Config:
    # data
    data: str = "stories"  # "stories" (the built-in world), "shakespeare" (a download), or the path of a text file
    # optimization
    steps: int = 400  # optimizer steps
    batch_size: int = 24  # sequences per step, over all micro-batches and processes
    accum: int = 1  # micro-batches per step: the same gradient in 1/accum of the memory
    lr: float = 0.01  # Muon's, for the hidden matrices; an update's RMS is 0.2 lr
    lr_adamw: float = 3e-3  # AdamW's, for embedding, head, router and gains
    weight_decay: float = 0.0  # of both: nothing is seen often enough here to be learned by heart
    warmup: float = 0.03  # share of the steps in which the rate rises to its peak
    decay: float = 0.5  # share of the steps, at the end, in which it falls linearly to 0
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    # run
    dtype: str = ""  # fp32, bf16 or fp16 (CUDA, with a GradScaler); "": fp32 on a CPU, bf16 on CUDA
    eval_every: int = 100  # steps between evaluations on the whole validation split
    save_every: int = 100  # steps between resume points, out/resume.pt
    resume: int = 0  # 1: go on from out/resume.pt
    target_loss: float = 0.0  # stop when the whole validation split is at this many nats per byte; 0: never
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "accum", "eval_every", "save_every"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        share = self.accum * int(os.environ.get("WORLD_SIZE", 1))
        assert self.batch_size % share == 0, f"batch_size={self.batch_size}: no multiple of accum * processes = {share}"

# data ----------------------------------------------------------------------------------------------------------------

def document_ends(tok, ids, text):
    """-> the positions in ids of the tokens that end with the empty line between two documents."""
    after = torch.tensor(tok.n_bytes)[ids].cumsum(0)  # bytes up to and with each token
    return torch.isin(after, torch.tensor([m.end() for m in re.finditer(b"\n\n", text.encode())])).nonzero()[:, 0]

def load_data(cfg, gpt_cfg):
    """-> tokenizer, training ids (N,), positions where a row may start, validation ids (M,), the edges of its rows, its
    bytes, true entropy. The world's rows start with the blank line before a document, in training as in evaluation: a
    story that has lost its brief cannot teach copying from it.
    """
    extra, entropy = "", None
    if cfg.data == "stories":
        folder = require("data/stories")
        train, val = read_text(folder / "train.txt"), read_text(folder / "val.txt")
        records = read_jsonl(folder / "instructions.jsonl", ["instruction", "input", "output"])
        extra = "\n".join(" ".join([r["instruction"], r["input"], r["output"]]) for r in records)  # Part 6's words too
        entropy = json.loads(read_text(folder / "facts.json"))["true_nats_per_byte"]
    else:
        text = read_text(cfg.data)
        train, val = text[:int(0.9 * len(text))], text[int(0.9 * len(text)):]
    least = 256 + len(SPECIAL)
    if gpt_cfg.vocab_size < least or min(gpt_cfg.block_size, gpt_cfg.n_layer) < 1:
        fail(f"vocab_size must be at least {least} (bytes and special tokens), block_size and n_layer at least 1")
    tok = Tokenizer.train(train + extra, gpt_cfg.vocab_size)
    gpt_cfg.vocab_size = tok.vocab_size  # what was really merged: a small world has fewer words than asked for
    train_ids, val_ids = torch.tensor(tok.encode(train)), torch.tensor(tok.encode(val))
    if min(len(train_ids), len(val_ids)) <= gpt_cfg.block_size:
        fail(f"--data={cfg.data}: {len(val_ids)} tokens to validate on, but one block is {gpt_cfg.block_size} + 1: "
             "take a longer text or a smaller --block_size")
    starts, ends = torch.arange(len(train_ids) - gpt_cfg.block_size), []
    if cfg.data == "stories":
        starts = document_ends(tok, train_ids[:len(starts)], train)
        ends = document_ends(tok, val_ids, val).tolist()
    edges = [0]
    for end in sorted({*ends, len(val_ids) - 1}):
        edges += [*range(edges[-1] + gpt_cfg.block_size, end, gpt_cfg.block_size), end]
    return tok, train_ids, starts, val_ids, torch.tensor(edges), len(val.encode()), entropy

def get_batch(ids, starts, step, cfg, block_size):
    """The batch of a step depends on seed and step alone: (batch_size, T) inputs, and the same shifted by one.

    So a resumed run needs no generator's state, and each process of a DDP run takes its rows of the one batch.
    """
    g = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    rows = starts[torch.randint(len(starts), (cfg.batch_size, 1), generator=g)]
    window = ids[rows + torch.arange(block_size + 1)]  # (batch_size, T + 1)
    return window[:, :-1], window[:, 1:]

# learning rate, optimizers, gradients --------------------------------------------------------------------------------

def lr_scale(step, cfg):
    """Warmup, stable, linear decay (WSD, Hu et al. 2024): the rate's share of its peak, for steps 0, 1, ..."""
    rise = (step + 1) / max(1.0, cfg.warmup * cfg.steps)  # step 0 learns already
    fall = (cfg.steps - step) / max(1.0, cfg.decay * cfg.steps)  # and the last step still does
    return max(0.0, min(1.0, rise, fall))  # 0 for ever after

def make_optimizers(model, cfg):
    """Muon (Jordan et al. 2024) for the blocks' matrices, AdamW for all else.

    Muon replaces a matrix's momentum by the nearest orthogonal one: all its directions move alike. That suits matrices
    in the middle of the net, not tables whose rows are looked up or compared one by one.
    """
    inside = {n for n, p in model.named_parameters() if n.startswith("h.") and p.ndim == 2 and "router" not in n}
    hidden = [p for n, p in model.named_parameters() if n in inside]
    others = [p for n, p in model.named_parameters() if n not in inside]
    muon = torch.optim.Muon(hidden, lr=cfg.lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=cfg.lr_adamw, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    for opt in (muon, adamw):
        for group in opt.param_groups:
            group["peak"] = group["lr"]
    return muon, adamw

def backward(model, x, y, accum, autocast, scaler):
    """The gradient of the batch's mean loss, in accum equal micro-batches -> the loss."""
    total = 0.0
    for i, (xb, yb) in enumerate(zip(x.chunk(accum), y.chunk(accum))):
        last = i == accum - 1
        with nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            with autocast():
                loss = model(xb, yb)[1] / accum  # means of equal micro-batches: their mean is the batch's
            scaler.scale(loss).backward()
        total += loss.detach()
    return total

# evaluate, save ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, ids, edges, n_bytes, device, autocast):
    """The whole validation split, a row from each edge to the next -> nats per byte (comparable between tokenizers),
    next-token accuracy."""
    nats = right = 0
    for i in range(0, len(edges) - 1, 64):
        first, last = edges[i:i + 65][:-1, None], edges[i:i + 65][1:, None]
        pos = first + torch.arange((last - first).max())  # (rows, T)
        x, y = ids[pos.clamp(max=len(ids) - 2)], ids[(pos + 1).clamp(max=len(ids) - 1)]
        y = y.masked_fill(pos >= last, -100)  # what cross-entropy leaves out
        with autocast():
            logits, loss = model(x.to(device), y.to(device))
        nats += loss.item() * (last - first).sum().item()
        right += (logits.argmax(dim=-1).cpu() == y).sum().item()
    return nats / n_bytes, right / (len(ids) - 1)

def save(cfg, step, model, optimizers, scaler):
    """What only a resume needs, in out/resume.pt."""
    save_checkpoint(
        Path(cfg.out) / "resume.pt", kind="resume", changed=cfg.changed, step=step, config=asdict(cfg),
        **model.to_checkpoint(), optimizers=[opt.state_dict() for opt in optimizers], scaler=scaler.state_dict(),
    )

if __name__ == "__main__":
    cfg, gpt_cfg = cli(Config(), GPTConfig(vocab_size=1024, block_size=72, n_layer=3))
    device, autocast = setup(cfg)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # data
    tok, train_ids, starts, val_ids, edges, val_bytes, entropy = load_data(cfg, gpt_cfg)
    mine = slice(rank * cfg.batch_size // world, (rank + 1) * cfg.batch_size // world)  # this process's rows of a batch

    # model and optimizers
    model = GPT(gpt_cfg).to(device)
    optimizers = make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")
    first = 0
    if cfg.resume:
        point = load_checkpoint(Path(cfg.out) / "resume.pt", "resume")
        free = {"data", "steps", "eval_every", "save_every", "resume", "target_loss", "device", "out"}  # data may move
        then, now = ({k: v for k, v in z.items() if k not in free} for z in (point["config"], asdict(cfg)))
        if point["gpt_config"] != asdict(gpt_cfg) or then != now:
            fail("--resume: out/resume.pt was written with other options: repeat those of that command")
        model.load_state_dict(point["weights"])
        for opt, state in zip(optimizers, point["optimizers"]):
            opt.load_state_dict(state)
        scaler.load_state_dict(point["scaler"])
        first = point["step"]
        if first >= cfg.steps:
            fail(f"--resume: out/resume.pt is at step {first} already: ask for more --steps")
    net = DistributedDataParallel(model) if world > 1 else model
    params = sum(p.numel() for p in model.parameters())
    log = Log(cfg, cfg.steps, resume_step=first)
    board = SummaryWriter(cfg.out, purge_step=first) if rank == 0 else None
    if rank == 0:
        print(f"{params:,} parameters, vocabulary {tok.vocab_size}, {len(train_ids):,} tokens, {device} {cfg.dtype}")

    # loop
    val_loss, seconds, reached = float("nan"), 0.0, False
    for step in range(first, cfg.steps):
        start = time.time()
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * lr_scale(step, cfg)
        x, y = get_batch(train_ids, starts, step, cfg, gpt_cfg.block_size)
        loss = backward(net, x[mine].to(device), y[mine].to(device), cfg.accum, autocast, scaler)
        for opt in optimizers:
            scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float("inf"))
        for opt in optimizers:
            scaler.step(opt)
            opt.zero_grad(set_to_none=True)
        scaler.update()
        if world > 1:
            dist.all_reduce(loss, dist.ReduceOp.AVG if device.type == "cuda" else dist.ReduceOp.SUM)
            loss = loss if device.type == "cuda" else loss / world
        seconds += time.time() - start

        # once in a while: evaluate, save
        values = {"loss": loss.item(), "lr": cfg.lr * lr_scale(step, cfg), "grad_norm": norm.item()}
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            val_loss, accuracy = evaluate(model, val_ids, edges, val_bytes, device, autocast)
            values |= {"val_loss": val_loss, "val_accuracy": accuracy}
            reached = val_loss <= cfg.target_loss
        log(step, **values)
        if rank == 0:
            for key, value in values.items():
                board.add_scalar(key, value, step)
            if (step + 1) % cfg.save_every == 0 and step + 1 < cfg.steps:
                save(cfg, step + 1, model, optimizers, scaler)
        if reached:
            break
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        sys.exit(0)
    board.close()

    # what it learned
    if cfg.target_loss:
        said = f"reached {val_loss:.4f} nats per byte" if reached else f"NOT reached: {val_loss:.4f} nats per byte"
        print(f"target {cfg.target_loss}: {said} after {step + 1} steps, {seconds:.1f} s of training")
    path = Path(cfg.out) / "base.pt"
    save_checkpoint(path, kind="base", changed=cfg.changed, step=cfg.steps, config=asdict(cfg), **model.to_checkpoint(),
                    tokenizer=tok.state())
    save(cfg, step + 1, model, optimizers, scaler)  # last: a run that dies before this point can be resumed before it
    save_metrics(cfg, val_loss=val_loss, val_accuracy=accuracy, true_nats_per_byte=entropy, seconds=seconds,
                 steps=step + 1, params=params, vocab_size=tok.vocab_size, seed=cfg.seed)
    start = torch.tensor([tok.encode(".\n\nWrite a story about a fox named Mia")], device=device)
    print(tok.decode(model.generate(start, 80, temperature=0.8)[0].tolist())[3:])

    # figure
    records = read_jsonl(Path(cfg.out) / "log.jsonl", ["step", "loss"])
    fig, ax = figure(f"{val_loss:.3f} nats per byte on new text after {seconds:.0f} s", "step", "nats per token")
    ax.plot([r["step"] for r in records], [r["loss"] for r in records], alpha=0.6, label="training batch, per token")
    evals = [r for r in records if "val_loss" in r]
    right = ax.twinx()
    right.plot([r["step"] for r in evals], [r["val_loss"] for r in evals], "o-", color="C1", label="new text, per byte")
    if entropy:
        right.axhline(entropy, color="C2", linestyle="--", label=f"the world's true entropy, {entropy:.3f}")
    right.set(ylabel="nats per byte", ylim=(0, None))
    fig.legend(loc="outside lower center", ncols=3)
    save_figure(fig, Path(cfg.out) / "train.png")
