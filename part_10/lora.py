"""
Part 10, teach a real model something: LoRA. The weights of the model stay as they are, and a small
correction is learned beside some of its matrices.

    python part_10/lora.py                            SmolLM2 learns one of the world's skills
    python part_10/lora.py --merge                    and a checkpoint to talk to, out/merged.pt
    python part_6/chat.py --model=part_10/out/merged.pt
    python part_10/lora.py --task=story               another skill
    python part_10/lora.py --method=full              all weights are trained, for comparison
    python part_10/lora.py --matrices=q,v --rank=1    a smaller correction
    python part_10/lora.py --adapter=part_10/out/lora.pt --merge --out=part_10/out
                                                      an adapter of an earlier run, no training
    python part_10/lora.py --data=my.json             your own demonstrations, with Alpaca's fields
                                                      instruction, input, output

Starts here. chat_prompt, encode_records, pad, collate, lr_scale, Answer and respond are those of
part_6/train_sft.py, the last one with the likeliest token at each step instead of a drawn one. The
model, the texts and mean_loss come from compression.py.

Full fine-tuning changes all W. LoRA (Hu et al. 2021, "LoRA: low-rank adaptation of large language
models", eq. 3) keeps W and learns two thin matrices beside it:

    y = W x + (alpha / r) B A x         A is (r, in), B is (out, r), and r is small

B starts at zero, so the model is at first the one it was. Since B A is a matrix of the shape of W,
it can be added to W after training. Then the adapted model costs nothing more than the old one.

A demonstration is laid out by the chat template of the model, and only the answer counts in the
loss. What was learned is measured on held-out records (the judge's gold, and the loss on the right
answers), and what was forgotten on a text that has nothing to do with them: for SmolLM2 Python's
own documentation.

Shapes: B batch, T time, N answer tokens, C channels, V vocabulary, r rank.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hashlib
import importlib.util
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from compression import load_model, load_texts, matrices, mean_loss
from shared import (
    Log,
    fail,
    figure,
    judge,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    read_jsonl,
    read_log,
    require,
    save_checkpoint,
    save_figure,
    save_metrics,
    set_seed,
)

# The matrices of a block by the names that papers use. --matrices=all means all of them.
MATRICES = {
    "q": "attn.c_q",
    "k": "attn.c_k",
    "v": "attn.c_v",
    "o": "attn.c_proj",
    "gate": "mlp.c_gate",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}

# The learning rate for each method. Those of lora and full are the best ones of a small grid for
# SmolLM2 (see the README), the other two were not tuned.
LEARNING_RATES = {"lora": 1e-3, "full": 1e-4, "norms": 1e-2, "head": 1e-3}


@dataclass
class Config:
    # the model and what it learns
    model: str = "smollm2"  # smollm2, base (the model of Part 4), or the path of a checkpoint
    data: str = "stories"  # stories (the built-in world) or a JSON or JSONL file, Alpaca's fields

    # which of the world's tasks is learned: story, problem, problem_at_once, is_a, qa, count, sum,
    # reverse, sort, spell or all
    task: str = "is_a"

    block_size: int = 256  # longest prompt and answer, in tokens; longer records are left out
    # what is trained
    method: str = "lora"  # lora, full (all weights), norms (only their gains) or head (only that)
    matrices: str = "all"  # which matrices get an adapter: some of q,k,v,o,gate,up,down, or all
    rank: int = 8  # r, the rank of a correction
    alpha: float = 16.0  # the correction is multiplied by alpha / rank
    # optimization
    steps: int = 80  # optimizer steps
    batch_size: int = 4  # demonstrations per step
    accum: int = 1  # parts of a batch that are computed one after the other, which saves memory
    lr: float = 0.0  # peak learning rate of AdamW; 0: that of LEARNING_RATES, which is for SmolLM2
    warmup: float = 0.1  # share of the steps in which the learning rate rises to its peak
    decay: float = 0.5  # share of the steps, at the end, in which it falls linearly to 0
    grad_clip: float = 1.0  # largest norm of the gradient
    # evaluation
    eval_every: int = 20  # steps between evaluations; 0: only before and after training
    asked: int = 64  # held-out records that are answered before and after training
    held_out: int = 16  # pieces of 128 tokens of the text that tells what is forgotten
    # run
    adapter: str = ""  # adapter file of an earlier run, instead of training; empty: train
    merge: bool = False  # also write merged.pt, a checkpoint with the correction in the weights
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        known = ", ".join(LEARNING_RATES)
        assert self.method in LEARNING_RATES, f"method={self.method} must be one of {known}"
        if self.matrices != "all":
            for name in self.matrices.split(","):
                assert name in MATRICES, (
                    f"matrices={self.matrices} must be all or some of {','.join(MATRICES)}"
                )
        assert not self.adapter or self.method == "lora", "--adapter needs --method=lora"
        assert self.accum <= self.batch_size, (
            f"accum={self.accum} must be at most batch_size={self.batch_size}"
        )


# data ---------------------------------------------------------------------------------------------


class Records(NamedTuple):
    train: list
    val: list


def load_data(cfg):
    """Reads and checks the demonstrations -> Records.

    Many demonstrations of the world have faults, so that later parts have something to improve.
    Here only those are kept that pass the judge.
    """
    fields = ["instruction", "input", "output"]
    if cfg.data != "stories":
        records = read_jsonl(cfg.data, fields)
        split = int(0.9 * len(records))
        if split == 0:
            fail(f"--data={cfg.data} has {len(records)} record; at least 2 are needed")
        return Records(records[:split], records[split:])

    folder = require("data/stories")
    both = []
    for name in ("instructions.jsonl", "instructions_val.jsonl"):
        records = read_jsonl(folder / name, fields)
        tasks = sorted({record["task"] for record in records})
        if cfg.task not in [*tasks, "all"]:
            fail(f"--task={cfg.task} must be one of {', '.join(tasks)} or all")
        if cfg.task != "all":
            records = [record for record in records if record["task"] == cfg.task]
        both.append([record for record in records if judge(record, record["output"]).passed])
    return Records(*both)


def chat_prompt(record, tok):
    """The request in the chat template -> token ids. The answer comes right after them."""
    if record["input"]:
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


def n_tokens(record):
    return len(record["prompt_ids"]) + len(record["answer_ids"])


def make_batches(records, cfg):
    """The batches of all steps -> a list of lists of records.

    Records of similar length come into the same batch, because padding costs as much time as text.
    They are shuffled, and each group of eight batches is sorted by length and cut into batches,
    which are shuffled again. When all records were used, the next round begins.
    """
    generator = torch.Generator().manual_seed(cfg.seed)

    def shuffled(items):
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    batches = []
    pool = []
    while len(batches) < cfg.steps:
        while len(pool) < 8 * cfg.batch_size:
            pool += shuffled(records)
        group = sorted(pool[: 8 * cfg.batch_size], key=n_tokens)
        pool = pool[8 * cfg.batch_size :]

        starts = range(0, len(group), cfg.batch_size)
        batches += shuffled([group[start : start + cfg.batch_size] for start in starts])
    return batches[: cfg.steps]


# the lesson's mathematics -------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A linear layer with a correction of rank r: y = W x + (alpha / r) B A x (Hu et al. 2021,
    eq. 3). Only A and B are trained.

    B starts at zero and A does not. If both were zero, neither would ever get a gradient, because
    that of B contains A and that of A contains B.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.scale = alpha / rank
        weight = linear.weight
        self.A = nn.Parameter(weight.new_empty(rank, linear.in_features))  # (r, in)
        self.B = nn.Parameter(weight.new_zeros(linear.out_features, rank))  # (out, r)
        nn.init.normal_(self.A, std=linear.in_features**-0.5)  # A x is about as large as x

    def forward(self, x):
        low = x @ self.A.T  # (B, T, r)
        return self.linear(x) + self.scale * (low @ self.B.T)

    @torch.no_grad()
    def merged(self):
        """The linear layer with the weight W + (alpha / r) B A, which computes the same."""
        self.linear.weight += self.scale * (self.B @ self.A)
        return self.linear


def replace_module(model, name, module):
    """Puts another module in the place of model.NAME, such as "h.0.attn.c_q"."""
    parent_name, _, last_name = name.rpartition(".")
    setattr(model.get_submodule(parent_name), last_name, module)


def add_adapters(model, chosen, rank, alpha):
    """Puts an adapter beside the chosen matrices ("q,v" or "all") of every block."""
    names = list(MATRICES) if chosen == "all" else chosen.split(",")
    endings = tuple(MATRICES[name] for name in names)
    for name, linear in matrices(model).items():
        if name.endswith(endings):
            replace_module(model, name, LoRALinear(linear, rank, alpha))


def adapters(model):
    """{name: LoRALinear}, such as "h.0.attn.c_q"."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            found[name] = module
    return found


def merge_adapters(model):
    """Adds every correction to its matrix. Afterwards it is a plain model again."""
    for name, module in adapters(model).items():
        replace_module(model, name, module.merged())


@torch.no_grad()
def merge_and_compare(model, records, device):
    """Merges the adapters -> the largest difference that this makes to a logit of these records. It
    is a rounding error."""
    idx, _ = collate(records)
    adapted, _ = model(idx.to(device))
    merge_adapters(model)
    merged, _ = model(idx.to(device))
    return (merged - adapted).abs().max().item()


def choose_parameters(model, cfg):
    """Prepares the model for a method, and freezes what it does not train -> the parameters that
    are trained.

    A frozen weight needs no gradient and no moments of Adam. The gradient still flows through it to
    the layers below, but the product that would give the weight its own gradient is left out. With
    method=head nothing flows into the blocks at all.
    """
    model.requires_grad_(False)
    if cfg.method == "lora":
        add_adapters(model, cfg.matrices, cfg.rank, cfg.alpha)
        chosen = [p for module in adapters(model).values() for p in (module.A, module.B)]
    elif cfg.method == "norms":
        chosen = [p for p in model.parameters() if p.ndim == 1]
    elif cfg.method == "head":
        # A tied head is the table of embeddings. The embeddings must stay, so it gets a copy.
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.cfg.tied = False
        chosen = [model.lm_head.weight]
    else:
        chosen = list(model.parameters())
    for p in chosen:
        p.requires_grad_(True)
    return chosen


def answer_loss(model, idx, targets):
    """The sum of the losses of all answer tokens, in nats: idx and targets (B, T).

    GPT.forward computes logits at all T positions. Those of the prompt and of the padding do not
    count, and with a vocabulary of 49,000 tokens the head is a fifth of the work. So it is only
    applied where there is a target.
    """
    counts = targets >= 0  # (B, T)
    states = model.trunk(idx)[counts]  # (N, C)
    logits = model.lm_head(states)  # (N, V)
    return F.cross_entropy(logits.float(), targets[counts], reduction="sum")


# adapter files ------------------------------------------------------------------------------------


def fingerprint(model):
    """A text that tells the weights of a model from those of any other: their SHA-256."""
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_adapter(path, model, base, cfg):
    """Writes the matrices A and B, and which weights they correct (base, a fingerprint)."""
    weights = {}
    for name, module in adapters(model).items():
        weights[f"{name}.A"] = module.A.detach()
        weights[f"{name}.B"] = module.B.detach()
    save_checkpoint(
        path,
        kind="lora",
        changed=cfg.changed,
        model=cfg.model,
        base=base,
        matrices=cfg.matrices,
        rank=cfg.rank,
        alpha=cfg.alpha,
        weights=weights,
    )


def read_adapter(path, base):
    """The content of an adapter file, if it belongs to the weights with this fingerprint."""
    content = load_checkpoint(path, "lora")
    if content["base"] != base:
        fail(f"{path} is an adapter of other weights than these: it belongs to {content['model']}")
    return content


def load_adapter(content, model):
    """Puts the adapters of a file beside the matrices of the model -> their parameters."""
    add_adapters(model, content["matrices"], content["rank"], content["alpha"])
    parameters = []
    for name, module in adapters(model).items():
        module.A.data.copy_(content["weights"][f"{name}.A"])
        module.B.data.copy_(content["weights"][f"{name}.B"])
        parameters += [module.A, module.B]
    return parameters


def save_merged(path, model, tok, block_size, cfg):
    """Writes a model without adapters as a checkpoint that part_6/chat.py and weights.py open."""
    content = model.to_checkpoint()
    content["gpt_config"]["block_size"] = block_size
    save_checkpoint(path, kind="sft", changed=cfg.changed, tokenizer=tok.state(), **content)


# train --------------------------------------------------------------------------------------------


def lr_scale(step, cfg):
    """The learning rate of a step (0, 1, ...) as a share of its peak: warm up, hold, then decay
    linearly to 0 (WSD, Hu et al. 2024)."""
    rise = (step + 1) / max(1.0, cfg.warmup * cfg.steps)  # the first step learns already
    fall = (cfg.steps - step) / max(1.0, cfg.decay * cfg.steps)  # and the last step still does
    return max(0.0, min(1.0, rise, fall))


def backward(model, records, accum, device):
    """Adds up the gradient of the mean loss of all answer tokens of a batch -> the loss in nats per
    token. The batch is computed in accum parts, which gives the same gradient with less memory."""
    total = sum(len(record["answer_ids"]) for record in records)
    nats = 0.0
    for part in range(accum):
        idx, targets = collate(records[part::accum])
        loss = answer_loss(model, idx.to(device), targets.to(device)) / total
        loss.backward()
        nats += loss.item()
    return nats


# evaluate -----------------------------------------------------------------------------------------


@torch.no_grad()
def val_loss(model, records, device):
    """The loss on held-out demonstrations, in nats per answer token."""
    nats = 0.0
    total = 0
    for start in range(0, len(records), 16):
        batch = records[start : start + 16]
        idx, targets = collate(batch)
        nats += answer_loss(model, idx.to(device), targets.to(device)).item()
        total += sum(len(record["answer_ids"]) for record in batch)
    return nats / total


class Answer(NamedTuple):
    text: str
    ended: bool  # False if it was cut off before its end token


def respond(model, tok, records, max_new_tokens, device):
    """The model answers each record's prompt_ids, always with the likeliest token -> a list of
    Answer."""
    answers = []
    for start in range(0, len(records), 16):
        prompts = [record["prompt_ids"] for record in records[start : start + 16]]
        idx = pad(prompts, tok.end).to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        out = model.generate(idx, max_new_tokens, 0, lengths=lengths, stop=tok.end)

        for row, prompt in zip(out.tolist(), prompts):
            ids = row[len(prompt) : len(prompt) + max_new_tokens]
            ended = tok.end in ids
            if ended:
                ids = ids[: ids.index(tok.end)]
            answers.append(Answer(tok.decode(ids), ended))
    return answers


def share_passed(records, answers):
    """The share of answers that pass all checks of the judge, None if the records have none."""
    passed = []
    for record, answer in zip(records, answers):
        verdict = judge(record, answer.text, answer.ended)
        if verdict is not None:
            passed.append(verdict.passed)
    return sum(passed) / len(passed) if passed else None


class Evaluation(NamedTuple):
    """What a model knows before or after training."""

    answers: list  # of Answer, to the held-out records
    gold: float  # share of the answers that pass all checks, None if the records have none
    val_loss: float  # nats per token of the right answers
    text_loss: float  # nats per token of a text of another kind


def evaluate(model, tok, records, text, max_new_tokens, device):
    """records are held out. text is a Rows of compression.py -> Evaluation."""
    answers = respond(model, tok, records, max_new_tokens, device)
    gold = share_passed(records, answers)
    learned = val_loss(model, records, device)
    return Evaluation(answers, gold, learned, mean_loss(model, text, batch_size=2))


# memory, the figure -------------------------------------------------------------------------------


def memory_of_training(model, chosen):
    """What the numbers of a training run take, in MB: all weights, and for each weight that is
    trained its gradient and Adam's two moments. What a batch leaves for the backward pass comes on
    top of it."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in chosen)
    return (weights + 3 * trained) / 1e6


def peak_memory():
    """The largest memory of this process so far, in MB, or None on Windows."""
    if importlib.util.find_spec("resource") is None:
        return None
    from resource import RUSAGE_SELF, getrusage

    # getrusage counts bytes on a Mac and kilobytes elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return getrusage(RUSAGE_SELF).ru_maxrss * unit / 1e6


def finding(before, after, records):
    """The title of the figure: what was learned, and what was forgotten."""
    learned = f"held-out loss {before.val_loss:.2f} to {after.val_loss:.2f} nats per token"
    if after.gold is not None:
        checked = sum("check" in record for record in records)
        learned = f"{before.gold:.2f} to {after.gold:.2f} of {checked} held-out answers right"
    change = after.text_loss - before.text_loss
    kept = f"{change:+.3f} nats per token on a text that was not trained on"
    return f"Learned: {learned}\nForgotten: {kept}"


def draw(before, records, title, path):
    """What is learned and what is forgotten in the course of training."""
    fig, (left, right) = figure(title, "optimizer step", columns=2, height=4)
    steps = [record["step"] + 1 for record in records]
    losses = [record["loss"] for record in records]
    left.plot(steps, losses, alpha=0.5, label="training batch")

    # the evaluations, of which the first is before training
    steps = [0]
    val_losses = [before.val_loss]
    text_losses = [before.text_loss]
    for record in records:
        if "val_loss" in record:
            steps.append(record["step"] + 1)
            val_losses.append(record["val_loss"])
            text_losses.append(record["text_loss"])
    left.plot(steps, val_losses, "o-", label="held out")
    left.set(ylabel="nats per answer token", ylim=(0, None))
    left.legend()

    right.plot(steps, text_losses, "s-", color="C3", label="text that was not trained on")
    right.axhline(before.text_loss, color="black", linestyle=":", label="before training")
    right.set(ylabel="nats per token")
    right.margins(y=0.3)
    right.legend()
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # data first: a broken file must not wait for a model
    records = load_data(cfg)

    # model; its longest sequence is cut, because the cache reserves memory for it
    model, tok = load_model(cfg.model, device)
    whole_block_size = model.cfg.block_size
    model.cfg.block_size = min(cfg.block_size, whole_block_size)
    n_weights = sum(p.numel() for p in model.parameters())
    if tok.end is None:
        fail(f"--model={cfg.model} has no end token in its chat template: it cannot learn to stop")

    # an adapter of an earlier run must belong to this model
    base = fingerprint(model)
    if cfg.adapter:
        adapter = read_adapter(cfg.adapter, base)

    # demonstrations, and a text that has nothing to do with them
    train = encode_records(records.train, tok, model.cfg.block_size)
    val = encode_records(records.val, tok, model.cfg.block_size)[: cfg.asked]
    text = load_texts(cfg.model, model, tok, 128, 1, cfg.held_out).held_out
    longest = max(len(record["answer_ids"]) for record in train)  # longer answers are cut off
    out = output_folder(cfg)
    print(f"{len(train):,} demonstrations, {len(val)} held-out records, {device}")

    # before training
    before = evaluate(model, tok, val, text, longest, device)
    metrics = {}
    if cfg.adapter:
        trained = load_adapter(adapter, model)
    else:
        trained = choose_parameters(model, cfg)
    n_trained = sum(p.numel() for p in trained)
    share = n_trained / n_weights
    print(f"{cfg.method}: {n_trained:,} trained weights, {share:.2%} of {n_weights:,}", flush=True)

    # training loop
    if not cfg.adapter:
        lr = cfg.lr
        if lr == 0:
            lr = LEARNING_RATES[cfg.method]
        optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        log = Log(out, cfg.steps, name="lora")
        step_seconds = []
        for step, batch in enumerate(make_batches(train, cfg)):
            start = time.process_time()  # of all cores together; other programs do not count
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_scale(step, cfg)

            # forward, backward, update
            loss = backward(model, batch, cfg.accum, device)
            grad_norm = torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step_seconds.append(time.process_time() - start)

            # once in a while: evaluate, and after the last step with answers
            values = {"loss": loss, "grad_norm": grad_norm.item()}
            is_last = step + 1 == cfg.steps
            is_due = cfg.eval_every > 0 and (step + 1) % cfg.eval_every == 0
            if is_last:
                after = evaluate(model, tok, val, text, longest, device)
                values |= {"val_loss": after.val_loss, "text_loss": after.text_loss}
            elif is_due:
                values["val_loss"] = val_loss(model, val, device)
                values["text_loss"] = mean_loss(model, text, batch_size=2)
            log(step, **values)

        step_seconds.sort()
        metrics["lr"] = lr
        metrics["seconds_per_step"] = step_seconds[len(step_seconds) // 2]
        metrics["megabytes"] = memory_of_training(model, trained)
        metrics["peak_megabytes"] = peak_memory()
    else:
        after = evaluate(model, tok, val, text, longest, device)

    # the adapter file, and the model with the corrections in its weights
    if cfg.method == "lora":
        if not cfg.adapter:
            save_adapter(out / "lora.pt", model, base, cfg)
            size = (out / "lora.pt").stat().st_size / 1e6
            print(f"wrote {out / 'lora.pt'}, {size:.1f} MB", flush=True)
        difference = merge_and_compare(model, val[:4], device)
        print(f"merged, the logits differ by at most {difference:.1g}")
        metrics["merged_difference"] = difference
    if cfg.merge:
        save_merged(out / "merged.pt", model, tok, whole_block_size, cfg)
        print(f"wrote {out / 'merged.pt'}: python part_6/chat.py --model={out / 'merged.pt'}")

    # what came out
    for record, old, new in list(zip(val, before.answers, after.answers))[:3]:
        print(f"\n{record['instruction']} {record['input']}".rstrip())
        print(f"  before -> {old.text!r}\n  after  -> {new.text!r}")
    title = finding(before, after, val)
    print(f"\n{title}")
    for name, evaluation in (("before", before), ("after", after)):
        metrics[name] = {
            "gold": evaluation.gold,
            "val_loss": evaluation.val_loss,
            "text_loss": evaluation.text_loss,
        }
    save_metrics(
        out,
        name="lora",
        **metrics,
        trained=n_trained,
        share=share,
        held_out_records=len(val),
        finding=title,
        **{name: getattr(cfg, name) for name in ("method", "steps", "batch_size", "seed")},
    )
    if not cfg.adapter:
        draw(before, read_log(out, "lora"), title, out / "lora.png")
