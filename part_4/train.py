"""
Part 4: train the GPT at scale. BPE, Muon, a learning-rate schedule, gradient accumulation, mixed
precision, resuming, and TensorBoard. (Several processes: train_ddp.py.)

    python part_4/train.py                             the world's stories -> part_4/out/base.pt
    python part_4/train.py --data=my.txt --steps=500   your own text; its last 10 % are held out
    python part_4/train.py --target_loss=0.1           stop at a validation loss, print the seconds
    python part_4/train.py --resume                    go on after a crash, to the bit on a CPU
    python part_4/train.py --batch_size=64 --accum=4   a large batch in four micro-batches
    tensorboard --logdir=part_4/out

From part_3/train.py
    New      document_ends, row_edges, lr_scale, orthogonalize, Muon, make_optimizers, set_lr,
             backward, fingerprint, save_resume_point, load_resume_point, resume_from
    Changed  Config, Data, load_data, get_batch, evaluate, draw
    Removed  encode, decode (tokenizer.py takes their place), split_blocks, show_samples,
             generate_without_cache, time_generation

The ideas stand in places of their own, and each can be read alone:

    BPE and rows      load_data, get_batch      a row starts where a document starts
    schedule          lr_scale, set_lr          warm up, hold, decay
    Muon              orthogonalize, Muon, make_optimizers
    accumulation      backward                  the gradient of a batch that does not fit in memory
    mixed precision   backward (autocast and scaler), and "update" in the loop
    clipping          "update" in the loop
    resuming          fingerprint, save_resume_point, load_resume_point, resume_from
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hashlib
import json
import re
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch.utils.tensorboard import SummaryWriter

from model import GPT, GPTConfig
from shared import (
    Log,
    autocast_for,
    fail,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    pick_dtype,
    read_jsonl,
    read_log,
    read_text,
    require,
    save_checkpoint,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import SPECIAL, Tokenizer


@dataclass
class Config:
    # data
    data: str = "stories"  # stories (the built-in world), shakespeare (a download) or a text file
    # optimization
    steps: int = 620  # optimizer steps
    batch_size: int = 24  # sequences per step, over all micro-batches
    accum: int = 1  # micro-batches per step; the gradient is the same, in 1/accum of the memory
    lr: float = 0.0035  # learning rate of Muon, for the hidden matrices; an update has RMS 0.2 lr
    lr_adamw: float = 3e-3  # learning rate of AdamW, for everything else

    # decay of the weights in all matrices; 0, because there is too little repetition to overfit
    weight_decay: float = 0.0

    warmup: float = 0.1  # share of the steps in which the learning rate rises to its peak
    decay: float = 0.5  # share of the steps, at the end, in which it falls linearly to 0
    grad_clip: float = 1.0  # largest norm of the gradient; a larger one is scaled down
    # run
    dtype: str = ""  # fp32, bf16 or fp16 (GPU only); empty: bf16 on CUDA, fp32 elsewhere
    eval_every: int = 100  # steps between evaluations on the validation data
    save_every: int = 100  # steps between resume points, out/resume.pt
    resume: bool = False  # go on from out/resume.pt
    target_loss: float = 0.0  # stop at this validation loss, in nats per byte; 0: never
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "accum", "eval_every", "save_every"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.batch_size % self.accum == 0, (
            f"batch_size={self.batch_size} must be divisible by accum={self.accum}"
        )


# data ---------------------------------------------------------------------------------------------


class Data(NamedTuple):
    tok: Tokenizer
    train_ids: torch.Tensor  # (N,)
    starts: torch.Tensor  # positions in train_ids where a training row may start
    val_ids: torch.Tensor  # (M,)
    edges: torch.Tensor  # positions in val_ids where the rows of the evaluation start and end
    val_bytes: int  # bytes of the validation text
    entropy: float  # the true entropy in nats per byte, or None if nobody knows it


def document_ends(tok, ids, text):
    """The positions in ids of the tokens that end with the blank line between two documents."""
    bytes_after = torch.tensor(tok.n_bytes)[ids].cumsum(0)  # bytes up to and including each token
    blank_lines = [match.end() for match in re.finditer(b"\n\n", text.encode())]
    return torch.isin(bytes_after, torch.tensor(blank_lines)).nonzero()[:, 0]


def row_edges(ends, n, block_size):
    """Where the rows of an evaluation start and end: at every document's end, and after every
    block_size tokens in between, up to the last of n tokens."""
    edges = [0]
    for end in sorted({*ends, n - 1}):
        edges.extend(range(edges[-1] + block_size, end, block_size))
        edges.append(end)
    return torch.tensor(edges)


def load_data(cfg, gpt_cfg):
    """Trains the tokenizer and encodes the text -> Data. Sets gpt_cfg.vocab_size to what the
    tokenizer really has.

    A row of the world starts with the blank line before a document, in training as in evaluation:
    a story that has lost its brief cannot teach copying from it. In any other text a row may start
    at any token.
    """
    least = 256 + len(SPECIAL)
    if gpt_cfg.vocab_size < least:
        fail(f"--vocab_size must be at least {least}: 256 bytes and {len(SPECIAL)} special tokens")

    extra = ""  # text that only the tokenizer learns from
    entropy = None
    if cfg.data == "stories":
        folder = require("data/stories")
        train_text = read_text(folder / "train.txt")
        val_text = read_text(folder / "val.txt")
        entropy = json.loads(read_text(folder / "facts.json"))["true_nats_per_byte"]

        # The tokenizer must know the words of Part 6's instructions, too.
        records = read_jsonl(folder / "instructions.jsonl", ["instruction", "input", "output"])
        lines = []
        for record in records:
            lines.append(" ".join([record["instruction"], record["input"], record["output"]]))
        extra = "\n".join(lines)
    else:
        text = read_text(cfg.data)
        split = int(0.9 * len(text))
        train_text = text[:split]
        val_text = text[split:]

    tok = Tokenizer.train(train_text + extra, gpt_cfg.vocab_size)
    gpt_cfg.vocab_size = tok.vocab_size  # a small text has fewer pairs to merge than asked for
    train_ids = torch.tensor(tok.encode(train_text))
    val_ids = torch.tensor(tok.encode(val_text))
    if min(len(train_ids), len(val_ids)) <= gpt_cfg.block_size:
        fail(
            f"--data={cfg.data}: {len(val_ids)} tokens of validation text do not fill one block of "
            f"{gpt_cfg.block_size} + 1 tokens: use a longer text or a smaller --block_size"
        )

    starts = torch.arange(len(train_ids) - gpt_cfg.block_size)
    ends = []
    if cfg.data == "stories":
        starts = document_ends(tok, train_ids[: len(starts)], train_text)
        ends = document_ends(tok, val_ids, val_text).tolist()
    edges = row_edges(ends, len(val_ids), gpt_cfg.block_size)
    return Data(tok, train_ids, starts, val_ids, edges, len(val_text.encode()), entropy)


def get_batch(ids, starts, step, cfg, block_size):
    """The batch of a step: inputs (batch_size, T), and targets, the same text shifted by one.

    It depends on the seed and the step alone, so a run can be repeated or resumed anywhere.
    """
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    choice = torch.randint(len(starts), (cfg.batch_size, 1), generator=generator)
    window = ids[starts[choice] + torch.arange(block_size + 1)]  # (batch_size, T + 1)
    return window[:, :-1], window[:, 1:]


# learning rate and optimizers ---------------------------------------------------------------------


def lr_scale(step, cfg):
    """The learning rate of a step (0, 1, ...) as a share of its peak: warm up, hold, then decay
    linearly to 0 (WSD, Hu et al. 2024)."""
    rise = (step + 1) / max(1.0, cfg.warmup * cfg.steps)  # the first step learns already
    fall = (cfg.steps - step) / max(1.0, cfg.decay * cfg.steps)  # and the last step still does
    return max(0.0, min(1.0, rise, fall))


def orthogonalize(matrix):
    """Brings the singular values of a matrix (rows, columns) near 1 and keeps its singular vectors:
    five steps of a Newton-Schulz iteration (Jordan et al. 2024). Afterwards they are between 0.7
    and 1.2, apart from those that were below 1/500 of the norm of the matrix.

    Each step applies f(s) = a s + b s^3 + c s^5 to every singular value s. The constants are tuned
    to let small values grow as fast as possible; the price is that f does not converge to 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    dtype = torch.bfloat16 if matrix.is_cuda else torch.float32  # many CPUs only emulate bf16
    x = matrix.to(dtype)

    # The wide form makes the products x x^T small. Scaling brings all singular values below 1.
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)

    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x

    if tall:
        x = x.T
    return x.to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024, "Muon"). All directions of a matrix get updates
    of the same size, also those in which its gradient is weak.

    An update has RMS 0.2 lr, about that of AdamW, so that learning rates and weight decay carry
    over (Liu et al. 2025, "Muon is scalable", eq. 4). For hidden matrices only.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue

                # Nesterov momentum: the running mean of the gradients, one step ahead.
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(state["momentum"], group["momentum"])

                # An orthogonal matrix has RMS 1 / sqrt(its longer side). Bring it to 0.2.
                update = orthogonalize(ahead) * 0.2 * max(p.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * update)


def make_optimizers(model, cfg):
    """Muon for the blocks' matrices, AdamW for all other parameters -> a list of both.

    Muon suits matrices in the middle of the network. The rows of the embedding and of the head are
    looked up or compared one by one, and gains are vectors: these are for AdamW.
    """
    hidden = []
    tables = []
    gains = []
    for name, p in model.named_parameters():
        if p.ndim < 2:
            gains.append(p)
        elif name.startswith("h."):
            hidden.append(p)
        else:
            tables.append(p)

    # Weight decay is for matrices. A gain is best near 1, so pulling it to 0 makes no sense.
    muon = Muon(hidden, lr=cfg.lr, weight_decay=cfg.weight_decay)
    groups = [
        {"params": tables, "weight_decay": cfg.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=cfg.lr_adamw, betas=(0.9, 0.95))
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def set_lr(optimizers, scale):
    """Sets every learning rate to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


# gradients ----------------------------------------------------------------------------------------


def backward(model, x, y, cfg, autocast, scaler):
    """Adds up the gradient of the batch's mean loss over cfg.accum micro-batches of equal size
    -> the loss (nats per token)."""
    total_loss = 0.0
    micro_batches = zip(x.chunk(cfg.accum), y.chunk(cfg.accum))
    for micro_x, micro_y in micro_batches:
        with autocast():
            _, loss = model(micro_x, micro_y)
        loss = loss / cfg.accum  # the mean of the micro-batches' means is the batch's mean
        scaler.scale(loss).backward()  # scaled up, so that fp16 gradients do not vanish
        total_loss += loss.detach()
    return total_loss


# evaluate, draw -----------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    loss: float  # nats per byte, which tokenizers of any size can be compared by
    accuracy: float  # share of next tokens that the model finds likeliest


@torch.no_grad()
def evaluate(model, ids, edges, n_bytes, device, autocast):
    """The model on the whole validation text, one row from each edge to the next -> Evaluation."""
    nats = 0.0
    correct = 0
    for i in range(0, len(edges) - 1, 64):
        some = edges[i : i + 65]  # 64 rows have 65 edges
        first = some[:-1, None]  # (rows, 1)
        last = some[1:, None]  # (rows, 1)

        # Rows of different lengths: positions after a row's last token are not targets. Some of
        # them lie beyond the end of the text, so they are moved back to where there is a token.
        position = first + torch.arange((last - first).max())  # (rows, T)
        x = ids[position.clamp(max=len(ids) - 2)]
        y = ids[(position + 1).clamp(max=len(ids) - 1)]
        y = y.masked_fill(position >= last, -100)  # cross-entropy leaves out -100

        with autocast():
            logits, loss = model(x.to(device), y.to(device))
        nats += loss.item() * (last - first).sum().item()
        correct += (logits.argmax(dim=-1).cpu() == y).sum().item()
    return Evaluation(nats / n_bytes, correct / (len(ids) - 1))


def draw(records, title, entropy, path):
    """The training loss per token, and the validation loss per byte beside the true entropy."""
    fig, ax = figure(title, "optimizer step", "nats per token")
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    ax.plot(steps, losses, alpha=0.6, label="training batch, per token")

    per_byte = ax.twinx()
    evaluations = [record for record in records if "val_loss" in record]
    steps = [record["step"] for record in evaluations]
    losses = [record["val_loss"] for record in evaluations]
    per_byte.plot(steps, losses, "o-", color="C1", label="validation text, per byte")
    if entropy:
        label = f"true entropy of the world, {entropy:.3f} per byte"
        per_byte.axhline(entropy, color="C2", linestyle="--", label=label)
    per_byte.set(ylabel="nats per byte", ylim=(0, 1.1 * max(losses)))
    fig.legend(loc="outside lower center", ncols=2)
    save_figure(fig, path)


# resume -------------------------------------------------------------------------------------------


def fingerprint(data):
    """A hash that changes if any token of the training or validation text does."""
    digest = hashlib.sha256()
    digest.update(data.train_ids.numpy().tobytes())
    digest.update(data.val_ids.numpy().tobytes())
    return digest.hexdigest()


def save_resume_point(out, step, seconds, cfg, data, model, optimizers, scaler):
    """Writes out/resume.pt: all that a run needs to go on at this step, besides the data."""
    save_checkpoint(
        out / "resume.pt",
        kind="resume",
        changed=cfg.changed,
        step=step,
        seconds=seconds,
        config=asdict(cfg),
        optimizers=[optimizer.state_dict() for optimizer in optimizers],
        scaler=scaler.state_dict(),
        tokenizer=data.tok.state(),
        fingerprint=fingerprint(data),
        **model.to_checkpoint(),
    )


def load_resume_point(out, cfg, gpt_cfg, data):
    """Reads out/resume.pt -> its content. Stops with an error if this run has other data or other
    options."""
    point = load_checkpoint(out / "resume.pt", "resume")

    # The file may have moved, but another text would have another tokenizer and another loss.
    if point["tokenizer"] != data.tok.state() or point["fingerprint"] != fingerprint(data):
        fail(
            "--resume: out/resume.pt was trained on another text or with another --vocab_size; "
            "repeat the options of that command"
        )

    # Options that do not change the model or the order of the data.
    free = ["data", "steps", "eval_every", "save_every", "resume", "target_loss", "device", "out"]
    saved = point["config"]
    current = asdict(cfg)
    for name in free:
        saved.pop(name)
        current.pop(name)
    if saved != current or point["gpt_config"] != asdict(gpt_cfg):
        fail("--resume: out/resume.pt was written with other options; repeat those of that command")
    if point["step"] >= cfg.steps:
        fail(
            f"--resume: {out}/resume.pt is already at step {point['step']}; to go on, ask for more "
            f"--steps and add --out={out}"
        )
    return point


def resume_from(point, model, optimizers, scaler):
    """Puts everything back as it was at the resume point -> the step to go on with."""
    model.load_state_dict(point["weights"])
    for optimizer, state in zip(optimizers, point["optimizers"]):
        optimizer.load_state_dict(state)
    scaler.load_state_dict(point["scaler"])
    return point["step"]


if __name__ == "__main__":
    cfg, gpt_cfg = parse_args(Config, GPTConfig, vocab_size=1024, block_size=72, n_layer=3)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    autocast = autocast_for(device, dtype)

    # data
    data = load_data(cfg, gpt_cfg)
    out = output_folder(cfg)

    # model and optimizers; the scaler does nothing unless the dtype is fp16
    model = GPT(gpt_cfg).to(device)
    optimizers = make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    first_step = 0
    seconds = 0.0  # of training, in all runs up to here
    if cfg.resume:
        point = load_resume_point(out, cfg, gpt_cfg, data)
        first_step = resume_from(point, model, optimizers, scaler)
        seconds = point["seconds"]
    params = sum(p.numel() for p in model.parameters())
    print(
        f"{params:,} parameters, vocabulary {data.tok.vocab_size}, "
        f"{len(data.train_ids):,} training tokens, {device} {dtype}"
    )

    # training loop
    log = Log(out, cfg.steps, resume_step=first_step)
    board = SummaryWriter(out, purge_step=first_step)
    for step in range(first_step, cfg.steps):
        start = time.time()
        set_lr(optimizers, lr_scale(step, cfg))

        # forward and backward
        x, y = get_batch(data.train_ids, data.starts, step, cfg, gpt_cfg.block_size)
        loss = backward(model, x.to(device), y.to(device), cfg, autocast, scaler)

        # update, with the gradient's norm limited; it must be unscaled to be measured
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)

        # One gradient that overflowed in fp16 makes the common norm infinite, and clipping by it
        # spoils all others. Such a step is left out, and the scaler's factor becomes smaller.
        overflow = dtype == "fp16" and not grad_norm.isfinite()
        for optimizer in optimizers:
            if not overflow:
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        seconds += time.time() - start

        # once in a while: evaluate
        values = {
            "loss": loss.item(),
            "lr": cfg.lr * lr_scale(step, cfg),
            "grad_norm": grad_norm.item(),
        }
        last_step = step + 1 == cfg.steps
        reached = False
        if (step + 1) % cfg.eval_every == 0 or last_step:
            val = evaluate(model, data.val_ids, data.edges, data.val_bytes, device, autocast)
            values["val_loss"] = val.loss
            values["val_accuracy"] = val.accuracy
            reached = val.loss <= cfg.target_loss
        log(step, **values)
        for name, value in values.items():
            board.add_scalar(name, value, step)

        # once in a while: save what a resume needs
        if (step + 1) % cfg.save_every == 0 and not last_step:
            save_resume_point(out, step + 1, seconds, cfg, data, model, optimizers, scaler)
        if reached:
            break
    board.close()
    steps_done = step + 1

    if cfg.target_loss > 0:
        verb = "reached" if reached else "NOT reached"
        print(
            f"target {cfg.target_loss} {verb}: {val.loss:.4f} nats per byte after {steps_done} "
            f"steps, {seconds:.1f} s of training"
        )

    # save the model and what it reached; the resume point comes last, so that a run that dies
    # before it can be resumed from an earlier one
    save_checkpoint(
        out / "base.pt",
        kind="base",
        changed=cfg.changed,
        step=steps_done,
        config=asdict(cfg),
        tokenizer=data.tok.state(),
        **model.to_checkpoint(),
    )
    save_resume_point(out, steps_done, seconds, cfg, data, model, optimizers, scaler)
    save_metrics(
        out,
        val_loss=val.loss,
        val_accuracy=val.accuracy,
        true_nats_per_byte=data.entropy,
        seconds=seconds,
        steps=steps_done,
        params=params,
        vocab_size=data.tok.vocab_size,
        seed=cfg.seed,
    )

    # show what it learned: a brief of the world, or else the start of the validation text
    prompt = data.val_ids[:16].tolist()
    if cfg.data == "stories":
        prompt = data.tok.encode(".\n\nWrite a story about a fox named Mia")
    ids = model.generate(torch.tensor([prompt], device=device), 80, temperature=0.8)
    print(data.tok.decode(ids[0].tolist()).removeprefix(".\n\n"))
    title = f"{val.loss:.3f} nats per byte on new text after {seconds:.0f} s"
    records = read_log(out)
    draw(records, title, data.entropy, out / "train.png")
