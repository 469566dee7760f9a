"""
Part 3: train the modern GPT on the same bytes, and measure what the KV cache saves.

    python part_3/train.py                              the world's stories -> part_3/out/gpt.pt
    python part_3/train.py --qk_norm=0                  Llama's architecture
    python part_3/train.py --n_kv_head=4                as many key/value heads as query heads
    python part_3/train.py --data=my.txt --steps=500    your own text; its last 10 % are held out

From part_2/train.py
    New      generate_without_cache, time_generation
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from model import GPT, GPTConfig
from shared import (
    Log,
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    read_log,
    read_text,
    require,
    save_checkpoint,
    save_figure,
    save_metrics,
    set_seed,
)

# Ways to draw the next byte from the same probabilities.
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "temperature 0.8, top-k 10": {"temperature": 0.8, "top_k": 10},
    "top-p 0.9": {"top_p": 0.9},
}


@dataclass
class Config:
    # data
    data: str = "stories"  # stories (the built-in world), shakespeare (a download) or a text file
    # optimization
    steps: int = 600  # optimizer steps
    batch_size: int = 8  # sequences per step
    lr: float = 1e-3  # learning rate of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; a larger one is scaled down
    # run
    eval_every: int = 200  # steps between evaluations on the validation data
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "eval_every"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"


# data ---------------------------------------------------------------------------------------------


def encode(text):
    """Text -> the numbers of its UTF-8 bytes: "né" -> [110, 195, 169]."""
    # Half a surrogate pair has no UTF-8 form: it becomes "?".
    return list(text.encode("utf-8", "replace"))


def decode(ids):
    """The inverse: decode(encode(text)) == text. Bytes that are not valid UTF-8 become U+FFFD."""
    return bytes(ids).decode("utf-8", "replace")


class Data(NamedTuple):
    train_ids: torch.Tensor  # (N,)
    val_ids: torch.Tensor  # (M,)
    entropy: float  # the true entropy in nats per byte, or None if nobody knows it


def load_data(cfg, gpt_cfg):
    """The text as ids of bytes -> Data."""
    entropy = None
    if cfg.data == "stories":
        folder = require("data/stories")
        train_text = read_text(folder / "train.txt")
        val_text = read_text(folder / "val.txt")
        entropy = json.loads(read_text(folder / "facts.json"))["true_nats_per_byte"]
    else:
        text = read_text(cfg.data)
        split = int(0.9 * len(text))
        train_text = text[:split]
        val_text = text[split:]

    train_ids = torch.tensor(encode(train_text))
    val_ids = torch.tensor(encode(val_text))
    if min(len(train_ids), len(val_ids)) <= gpt_cfg.block_size:
        fail(
            f"--data={cfg.data}: {len(val_ids)} bytes of validation text do not fill one block of "
            f"{gpt_cfg.block_size} + 1 bytes: use a longer text or a smaller --block_size"
        )
    if gpt_cfg.block_size < 2:
        fail(f"--block_size={gpt_cfg.block_size} must be at least 2")
    if gpt_cfg.vocab_size != 256:
        fail(f"--vocab_size={gpt_cfg.vocab_size} must be 256, the number of different bytes")
    return Data(train_ids, val_ids, entropy)


def get_batch(ids, step, cfg, block_size):
    """The batch of a step: inputs (batch_size, T), and targets, the same text shifted by one.

    It depends on the seed and the step alone, so a run can be repeated or resumed anywhere.
    """
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    starts = torch.randint(len(ids) - block_size, (cfg.batch_size, 1), generator=generator)
    window = ids[starts + torch.arange(block_size + 1)]  # (batch_size, T + 1)
    return window[:, :-1], window[:, 1:]


# evaluate, sample, draw ---------------------------------------------------------------------------


class Evaluation(NamedTuple):
    loss: float  # nats per byte
    accuracy: float  # share of next bytes that the model finds likeliest


def split_blocks(ids, block_size):
    """Ids (n + 1,) -> a list of (inputs, targets): the full blocks as one batch, then the rest."""
    n = len(ids) - 1
    full = n // block_size * block_size
    batches = []
    if full > 0:
        x = ids[:full].view(-1, block_size)
        y = ids[1 : full + 1].view(-1, block_size)
        batches.append((x, y))
    if full < n:
        batches.append((ids[None, full:-1], ids[None, full + 1 :]))
    return batches


@torch.no_grad()
def evaluate(model, ids, block_size, device):
    """The model on the whole validation text, in blocks -> Evaluation."""
    nats = 0.0
    correct = 0
    count = 0
    for start in range(0, len(ids) - 1, 64 * block_size):
        piece = ids[start : start + 64 * block_size + 1]
        for x, y in split_blocks(piece, block_size):
            logits, loss = model(x.to(device), y.to(device))
            nats += loss.item() * y.numel()
            correct += (logits.argmax(dim=-1).cpu() == y).sum().item()
            count += y.numel()
    return Evaluation(nats / count, correct / count)


def show_samples(title, model, prompt):
    """Prints how the model continues the prompt (1, T), once for each way of sampling."""
    print(f"\n{title}, the model continues {decode(prompt[0].tolist())!r} with:")
    for name, options in SAMPLING.items():
        ids = model.generate(prompt, 120, **options)[0, prompt.size(1) :]
        print(f"  {name:26} {decode(ids.tolist())!r}")
    print(flush=True)


@torch.no_grad()
def generate_without_cache(model, idx, max_new_tokens):
    """Part 2's way, greedily: read the whole context again for every new token."""
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -model.cfg.block_size :])
        new = logits[:, -1].argmax(dim=-1)  # (B,)
        idx = torch.cat([idx, new[:, None]], dim=1)
    return idx


def time_generation(model, prompt):
    """Fills the context greedily -> milliseconds per token with the cache, and without it."""
    new_tokens = model.cfg.block_size - prompt.size(1)
    start = time.time()
    with_cache = model.generate(prompt, new_tokens, temperature=0.0).cpu()  # .cpu() waits for a GPU
    middle = time.time()
    without_cache = generate_without_cache(model, prompt, new_tokens).cpu()
    end = time.time()
    if not torch.equal(with_cache, without_cache):
        print("the texts with and without the cache differ: two tokens were equally likely")
    return 1000 * (middle - start) / new_tokens, 1000 * (end - middle) / new_tokens


def draw(records, title, train_ids, entropy, path):
    """The losses over training, between the loss of knowing only how frequent each byte is and
    the true entropy."""
    fig, ax = figure(title, "optimizer step", "nats per byte")
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    ax.plot(steps, losses, alpha=0.6, label="training batch")

    evaluations = [record for record in records if "val_loss" in record]
    steps = [record["step"] for record in evaluations]
    losses = [record["val_loss"] for record in evaluations]
    ax.plot(steps, losses, "o-", color="C1", label="validation text")

    share = train_ids.bincount() / len(train_ids)
    unigram = torch.special.entr(share).sum()
    ax.axhline(unigram, color="C3", linestyle=":", label="knowing only the frequency of each byte")
    if entropy:
        label = f"true entropy of the world, {entropy:.3f}"
        ax.axhline(entropy, color="C2", linestyle="--", label=label)
    ax.set_ylim(0, None)
    fig.legend(loc="outside lower center", ncols=2)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg, gpt_cfg = parse_args(Config, GPTConfig, vocab_size=256, block_size=128)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # data
    data = load_data(cfg, gpt_cfg)
    out = output_folder(cfg)
    print(
        f"data {cfg.data}: {len(data.train_ids):,} bytes to train on, {len(data.val_ids):,} to "
        f"validate on; one step reads {cfg.batch_size * gpt_cfg.block_size:,}"
    )

    # model and optimizer
    model = GPT(gpt_cfg).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    params = sum(p.numel() for p in model.parameters())
    print(f"{params:,} parameters on {device}")

    prompt_length = min(32, gpt_cfg.block_size // 2)
    prompt = data.val_ids[None, :prompt_length].to(device)  # the start of the validation text
    show_samples("Before training", model, prompt)

    # training loop
    log = Log(out, cfg.steps)
    seconds = 0.0
    for step in range(cfg.steps):
        start = time.time()

        # forward and backward
        x, y = get_batch(data.train_ids, step, cfg, gpt_cfg.block_size)
        _, loss = model(x.to(device), y.to(device))
        loss.backward()

        # update, with the gradient's norm limited
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.time() - start

        # once in a while: evaluate
        values = {"loss": loss.item()}
        last_step = step + 1 == cfg.steps
        if (step + 1) % cfg.eval_every == 0 or last_step:
            val = evaluate(model, data.val_ids, gpt_cfg.block_size, device)
            values["val_loss"] = val.loss
            values["val_accuracy"] = val.accuracy
        log(step, **values)

    # what does the cache save?
    cached_ms, uncached_ms = time_generation(model, prompt)

    # save the model and what it reached
    save_checkpoint(
        out / "gpt.pt",
        kind="gpt",
        changed=cfg.changed,
        step=cfg.steps,
        config=asdict(cfg),
        gpt_config=asdict(gpt_cfg),
        weights=model.state_dict(),
    )
    save_metrics(
        out,
        val_loss=val.loss,
        perplexity=math.exp(val.loss),
        val_accuracy=val.accuracy,
        true_nats_per_byte=data.entropy,
        seconds=seconds,
        steps=cfg.steps,
        params=params,
        seed=cfg.seed,
        cached_ms=cached_ms,
        uncached_ms=uncached_ms,
    )

    # show what it learned
    show_samples(f"After {cfg.steps} steps", model, prompt)
    print(
        f"{val.loss:.3f} nats per byte on new text (perplexity {math.exp(val.loss):.2f} of 256), "
        f"{val.accuracy:.1%} of next bytes right, after {seconds:.0f} s of training"
    )
    print(f"generation: {cached_ms:.2f} ms per byte with the cache, {uncached_ms:.2f} ms without")
    title = f"{val.loss:.3f} nats per byte on new text after {seconds:.0f} s"
    records = read_log(out)
    draw(records, title, data.train_ids, data.entropy, out / "train.png")
