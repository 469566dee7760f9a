"""
Part 6: instruction tuning. The base model learns to answer, from demonstrations.

    python part_6/train_sft.py                             the world's instructions -> out/sft.pt
    python part_6/train_sft.py --curriculum=easy_first     easy demonstrations first
    python part_6/train_sft.py --data=my.json --block_size=512
                                                           your own, with Alpaca's fields
                                                           instruction, input, output

From part_5/train.py
    New      chat_prompt, encode_records, pad, collate, order, Answer, respond, token_f1, grade
    Changed  Config, load_data, get_batch, evaluate, draw
    Removed  Data, document_ends, row_edges, moe_layers, balance_loss, expert_load, max_violation,
             active_parameters, backward, Evaluation, fingerprint, save_resume_point,
             load_resume_point, resume_from (accumulation and resuming are for runs that take longer
             than a minute)

A demonstration is laid out by the chat template:

    <|user|>instruction, a line break, input<|assistant|>answer<|end|>

Only the answer and its end token count in the loss. Without the end token in the loss a model would
never learn to stop.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from model import GPT
from shared import (
    Log,
    autocast_for,
    fail,
    figure,
    judge,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    pick_dtype,
    read_jsonl,
    read_log,
    require,
    save_checkpoint,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import Tokenizer


@dataclass
class Config:
    # data
    data: str = "stories"  # stories (the built-in world) or a JSON or JSONL file, Alpaca's fields
    init: str = ""  # checkpoint of the base model; empty: part_4/out/base.pt
    block_size: int = 128  # longest prompt and answer, in tokens; may exceed the base model's
    curriculum: str = "random"  # order of demonstrations: easy_first, random or anti (hard first)
    # optimization
    steps: int = 440  # optimizer steps
    batch_size: int = 32  # demonstrations per step

    # learning rate of Muon, for the hidden matrices; an update has RMS 0.2 lr. With a higher rate
    # the model forgets more of what the text has taught it.
    lr: float = 0.002

    lr_adamw: float = 1.5e-3  # learning rate of AdamW, for everything else
    weight_decay: float = 0.0  # decay of the weights in all matrices; gains do not decay
    warmup: float = 0.05  # share of the steps in which the learning rate rises to its peak
    decay: float = 0.5  # share of the steps, at the end, in which it falls linearly to 0
    grad_clip: float = 1.0  # largest norm of the gradient
    # run
    dtype: str = ""  # fp32 or bf16; empty: bf16 on CUDA, fp32 elsewhere
    eval_every: int = 100  # steps between evaluations on the validation data
    prompts: int = 512  # held-out stories, and as many other tasks, that are answered at the end
    max_new_tokens: int = 72  # longest answer, in tokens
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "eval_every", "prompts", "max_new_tokens"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.dtype in ("", "fp32", "bf16"), f"dtype={self.dtype} must be fp32 or bf16"
        known = ("easy_first", "random", "anti")
        assert self.curriculum in known, (
            f"curriculum={self.curriculum} must be one of {', '.join(known)}"
        )


# data ---------------------------------------------------------------------------------------------


def load_data(cfg):
    """Reads and checks the demonstrations -> training and validation records."""
    fields = ["instruction", "input", "output"]
    if cfg.data == "stories":
        folder = require("data/stories")
        train = read_jsonl(folder / "instructions.jsonl", fields)
        val = read_jsonl(folder / "instructions_val.jsonl", fields)
        return train, val

    records = read_jsonl(cfg.data, fields)
    split = int(0.9 * len(records))
    if split == 0:
        fail(f"--data={cfg.data} has {len(records)} record; at least 2 are needed, one to validate")
    return records[:split], records[split:]


def chat_prompt(record, tok):
    """The request in the chat template -> token ids. The answer comes right after them.

    A record has Alpaca's fields (instruction and input) or TRL's field (prompt).
    """
    if "instruction" not in record:
        text = record["prompt"]
    elif record["input"]:
        text = record["instruction"] + "\n" + record["input"]
    else:
        text = record["instruction"]
    return tok.chat_prompt(text)


def encode_records(records, tok, block_size):
    """Adds "prompt_ids", and "answer_ids" with the end token, to each record -> those that fit in
    block_size. The others are counted and left out: a demonstration without its end teaches the
    model not to stop."""
    kept = []
    for record in records:
        prompt_ids = chat_prompt(record, tok)
        answer_ids = [*tok.encode(record["output"]), tok.end]
        if len(prompt_ids) + len(answer_ids) <= block_size:
            kept.append({**record, "prompt_ids": prompt_ids, "answer_ids": answer_ids})
    if len(kept) < len(records):
        left_out = len(records) - len(kept)
        print(f"{left_out} of {len(records)} records are longer than {block_size} tokens: left out")
    if not kept:
        fail(f"no record fits in {block_size} tokens: use a larger --block_size")
    return kept


def pad(rows, value):
    """Lists of different lengths -> one tensor (B, T), padded on the right."""
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def collate(records):
    """Records -> inputs (B, T), and targets (B, T) that are -100 where the next token is not part
    of an answer. The last token of the prompt predicts the first token of the answer."""
    ids = pad([r["prompt_ids"] + r["answer_ids"] for r in records], 0)
    targets = pad([[-100] * len(r["prompt_ids"]) + r["answer_ids"] for r in records], -100)
    return ids[:, :-1], targets[:, 1:]


def order(records, cfg):
    """The order of presentation, a list of indices: shuffled, or by level with ties shuffled."""
    generator = torch.Generator().manual_seed(cfg.seed)
    indices = torch.randperm(len(records), generator=generator).tolist()
    if cfg.curriculum == "random":
        return indices

    # Python's sort is stable: records of the same level keep their shuffled order.
    sign = 1 if cfg.curriculum == "easy_first" else -1
    return sorted(indices, key=lambda i: sign * records[i].get("level", 0))


def get_batch(records, step, cfg):
    """The batch of a step: inputs and targets, as collate makes them.

    In random order the steps go round and round through the records. A curriculum moves through
    them once, from the first to the last, however many steps there are: with few steps it skips
    records, and with many it repeats some.
    """
    first = step * cfg.batch_size
    if cfg.curriculum != "random":
        progress = step / max(1, cfg.steps - 1)  # 0 at the first step, 1 at the last
        first = int(progress * max(0, len(records) - cfg.batch_size))
    rows = [records[(first + i) % len(records)] for i in range(cfg.batch_size)]
    return collate(rows)


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

    Muon suits matrices in the middle of the network. The rows of the embedding, of the head and of
    a router are looked up or compared one by one, and gains are vectors: these are for AdamW.
    """
    hidden = []
    tables = []
    gains = []
    for name, p in model.named_parameters():
        if p.ndim < 2:
            gains.append(p)
        elif name.startswith("h.") and "router" not in name:
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


# answer, evaluate, draw ---------------------------------------------------------------------------


class Answer(NamedTuple):
    ids: list  # tokens, without the end token
    text: str
    ended: bool  # False if it was cut off before its end token


def respond(model, tok, records, max_new_tokens, temperature=1.0):
    """The model answers each record's prompt_ids -> a list of Answer."""
    device = next(model.parameters()).device
    end = tok.end
    answers = []
    for i in range(0, len(records), 128):
        prompts = [record["prompt_ids"] for record in records[i : i + 128]]
        idx = pad(prompts, end).to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        out = model.generate(idx, max_new_tokens, temperature, lengths=lengths, stop=end)

        for row, prompt in zip(out.tolist(), prompts):
            ids = row[len(prompt) : len(prompt) + max_new_tokens]
            ended = end in ids
            if ended:
                ids = ids[: ids.index(end)]
            answers.append(Answer(ids, tok.decode(ids), ended))
    return answers


def token_f1(answer, reference):
    """The overlap of two texts as bags of words: the harmonic mean of precision and recall
    (SQuAD, Rajpurkar et al. 2016)."""
    answer_words = answer.split()
    reference_words = reference.split()
    if not answer_words and not reference_words:
        return 1.0
    common = sum((Counter(answer_words) & Counter(reference_words)).values())
    return 2 * common / (len(answer_words) + len(reference_words))


def grade(records, answers):
    """What share of the answers is right? -> a dict. "story" is the gold score: the share of
    stories that pass all checks. "story level 1" is the same for one level, and the other tasks
    have the same two kinds of entries. "check has" is the share of the checks of this kind that
    hold: a story that must have three things counts three times. Records without checks get only
    "exact match" and "token F1"."""
    results = defaultdict(list)
    for record, answer in zip(records, answers):
        verdict = judge(record, answer.text, answer.ended)
        if verdict is not None:
            task = record.get("task", "story")
            results[task].append(verdict.passed)
            results[f"{task} level {record.get('level', 0)}"].append(verdict.passed)
            for name, passed in verdict.checks.items():
                kind = name.split(":")[0]  # "has:red ball" counts under "has"
                results[f"check {kind}"].append(passed)
        results["exact match"].append(answer.text == record["output"])
        results["token F1"].append(token_f1(answer.text, record["output"]))

    shares = {}
    for name, values in sorted(results.items()):
        shares[name] = sum(values) / len(values)
    return shares


@torch.no_grad()
def evaluate(model, records, device, autocast):
    """The loss on held-out demonstrations, in nats per answer token."""
    nats = 0.0
    count = 0
    for i in range(0, len(records), 64):
        x, y = collate(records[i : i + 64])
        with autocast():
            _, loss = model(x.to(device), y.to(device))
        targets = (y != -100).sum().item()
        nats += loss.item() * targets
        count += targets
    return nats / count


def draw(records, shares, path):
    """The loss over training, and the share of held-out answers that pass, by task."""
    title = f"SFT: {shares['story']:.2f} of held-out stories pass all checks"
    fig, (left, right) = figure(title, columns=2, height=3.8)

    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    left.plot(steps, losses, alpha=0.6, label="training batch")
    evaluations = [record for record in records if "val_loss" in record]
    steps = [record["step"] for record in evaluations]
    losses = [record["val_loss"] for record in evaluations]
    left.plot(steps, losses, "o-", label="held out")
    left.set(xlabel="optimizer step", ylabel="nats per answer token", ylim=(0, None))
    left.legend()

    tasks = [name for name in shares if " " not in name]
    right.barh(tasks, [shares[task] for task in tasks], color="C2")
    right.set(xlabel="share of answers that pass, temperature 1", xlim=(0, 1))
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    autocast = autocast_for(device, dtype)

    # data first: a broken file must not wait for a base model to be built
    train, val = load_data(cfg)

    # model; its weights do not depend on the block size, because RoPE needs no table of positions
    base = load_checkpoint(cfg.init or require("part_4/out/base.pt"), "base")
    base["gpt_config"]["block_size"] = cfg.block_size
    model = GPT.load(base).to(device)
    tok = Tokenizer.load(base["tokenizer"])
    out = output_folder(cfg)

    # demonstrations in the order of the curriculum
    train = encode_records(train, tok, cfg.block_size)
    val = encode_records(val, tok, cfg.block_size)
    train = [train[i] for i in order(train, cfg)]
    optimizers = make_optimizers(model, cfg)
    print(f"{len(train):,} demonstrations, {len(val):,} held out, {device} {dtype}")

    # training loop
    log = Log(out, cfg.steps)
    for step in range(cfg.steps):
        set_lr(optimizers, lr_scale(step, cfg))

        # forward and backward: the mean loss over all answer tokens of the batch
        x, y = get_batch(train, step, cfg)
        with autocast():
            _, loss = model(x.to(device), y.to(device))
        loss.backward()

        # update, with the gradient's norm limited
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # once in a while: evaluate
        values = {
            "loss": loss.item(),
            "lr": cfg.lr * lr_scale(step, cfg),
            "grad_norm": grad_norm.item(),
        }
        last_step = step + 1 == cfg.steps
        if (step + 1) % cfg.eval_every == 0 or last_step:
            val_loss = evaluate(model, val, device, autocast)
            values["val_loss"] = val_loss
        log(step, **values)
    seconds = log.seconds

    save_checkpoint(
        out / "sft.pt",
        kind="sft",
        changed=cfg.changed,
        step=cfg.steps,
        config=asdict(cfg),
        tokenizer=tok.state(),
        **model.to_checkpoint(),
    )

    # let it answer held-out requests, sampled at temperature 1
    stories = [record for record in val if record.get("task", "story") == "story"]
    others = [record for record in val if record.get("task", "story") != "story"]
    asked = stories[: cfg.prompts] + others[: cfg.prompts]
    answers = respond(model, tok, asked, cfg.max_new_tokens)
    shares = grade(asked, answers)
    ended = sum(answer.ended for answer in answers) / len(answers)
    save_metrics(
        out,
        gold_pass=shares.get("story"),
        val_loss=val_loss,
        seconds=seconds,
        steps=cfg.steps,
        seed=cfg.seed,
        ended=ended,
        **{name.replace(" ", "_"): share for name, share in shares.items()},
    )

    # show what it learned
    for name, share in shares.items():
        print(f"{name:24} {share:6.3f}")
    if shares.get("spell", 1) < 0.5:
        print("(spelling stays hard for this model: a token does not show its letters)")
    for record, answer in list(zip(asked, answers))[:3]:
        dots = "" if answer.ended else " ..."
        print(f"\n{record['instruction']}\n  -> {answer.text}{dots}")
    if "story" in shares:
        count = len(stories[: cfg.prompts])
        print(f"\n{shares['story']:.3f} of {count} held-out stories pass all checks (gold)")
        draw(read_log(out), shares, out / "train_sft.png")
    else:
        print("\nno gold score: the records have no checks")
