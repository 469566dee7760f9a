"""
Part 6 - instruction tuning: the base model learns to answer, from demonstrations.

    python part_6/train_sft.py                                 the world's instructions -> part_6/out/sft.pt
    python part_6/train_sft.py --curriculum=easy_first         or random, or anti (hardest first)
    python part_6/train_sft.py --data=my.json --block_size=512 your own, with Alpaca's fields instruction, input, output

The chat template is <|user|>instruction, a line break, input<|assistant|>answer<|end|>. The loss counts the answer and
its end token only; without the end token in the loss a model never learns to stop.

From part_5/train.py
    New      encode, pad, order, respond, gold, token_f1, draw
    Changed  Config, load_data, get_batch, evaluate
    Removed  document_ends, balance_loss, expert_load, backward, save (resume and several processes: for long runs)
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass

import torch

from model import GPT
from shared import (Log, cli, fail, figure, judge, load_checkpoint, read_jsonl, require, save_checkpoint, save_figure,
                    save_metrics, setup)
from tokenizer import Tokenizer

@dataclass
class Config:
    # data
    data: str = "stories"  # "stories" (the built-in world) or the path of a JSON or JSONL file with Alpaca's fields
    init: str = ""  # the base model's checkpoint; "": part_4/out/base.pt
    block_size: int = 128  # longest prompt and answer, in tokens; RoPE lets it be more than the base model's
    curriculum: str = "random"  # order of the demonstrations: easy_first, random or anti
    # optimization
    steps: int = 400  # optimizer steps
    batch_size: int = 32  # demonstrations per step
    lr: float = 0.01  # Muon's, for the hidden matrices; an update's RMS is 0.2 lr
    lr_adamw: float = 3e-3  # AdamW's, for embedding, head, router and gains
    weight_decay: float = 0.0  # of both
    warmup: float = 0.05  # share of the steps in which the rate rises
    decay: float = 0.5  # share of the steps, at the end, in which it falls to 0
    grad_clip: float = 1.0  # largest norm of the gradient
    # run
    eval_every: int = 100  # steps between evaluations of the loss
    prompts: int = 512  # held-out stories that are answered and judged at the end
    max_new_tokens: int = 72  # longest answer, in tokens
    dtype: str = ""  # fp32 or bf16; "": fp32 on a CPU, bf16 on CUDA
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        assert min(self.steps, self.batch_size, self.eval_every) > 0, "steps, batch_size, eval_every must be at least 1"
        known = ("easy_first", "random", "anti")
        assert self.curriculum in known, f"curriculum={self.curriculum} must be one of {', '.join(known)}"

# data ----------------------------------------------------------------------------------------------------------------

def encode(record, tok):
    """-> prompt ids (with the template's tokens) and answer ids (with the end token)."""
    text = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
    prompt = [tok.special["<|user|>"], *tok.encode(text), tok.special["<|assistant|>"]]
    return prompt, [*tok.encode(record["output"]), tok.special["<|end|>"]]

def load_data(cfg, tok, block_size):
    """-> training and validation records with "prompt" and "answer" ids. What does not fit is counted, not cut."""
    fields = ["instruction", "input", "output"]
    if cfg.data == "stories":
        folder = require("data/stories")
        splits = [read_jsonl(folder / f"instructions{split}.jsonl", fields) for split in ("", "_val")]
    else:
        records = read_jsonl(cfg.data, fields)
        splits = [records[:int(0.9 * len(records))], records[int(0.9 * len(records)):]]
    kept = []
    for records in splits:
        for r in records:
            r["prompt"], r["answer"] = encode(r, tok)
        kept.append([r for r in records if len(r["prompt"]) + len(r["answer"]) <= block_size])
        if len(kept[-1]) < len(records):
            print(f"{len(records) - len(kept[-1])} of {len(records)} records have over {block_size} tokens: left out")
        if not kept[-1]:
            fail(f"--data={cfg.data}: no record is left: take a larger --block_size")
    return kept

def pad(rows, value):
    """Lists of different lengths -> (B, T), padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

def order(records, cfg):
    """The order of presentation: shuffled, or by level with ties shuffled."""
    g = torch.Generator().manual_seed(cfg.seed)
    perm = torch.randperm(len(records), generator=g).tolist()
    sign = {"easy_first": 1, "random": 0, "anti": -1}[cfg.curriculum]
    return sorted(perm, key=lambda i: sign * records[i].get("level", 0))  # a stable sort: ties keep the shuffle

def get_batch(records, step, cfg):
    """Records of one step -> x (B, T) and targets (B, T), -100 where the next token is not part of an answer.

    The last prompt token predicts the first answer token. A curriculum walks through the data once in its order,
    however many steps there are; random order goes round.
    """
    first = step * cfg.batch_size
    if cfg.curriculum != "random":
        first = int(step / max(1, cfg.steps - 1) * max(0, len(records) - cfg.batch_size))
    rows = [records[(first + i) % len(records)] for i in range(cfg.batch_size)]
    ids = pad([r["prompt"] + r["answer"] for r in rows], 0)
    targets = pad([[-100] * len(r["prompt"]) + r["answer"] for r in rows], -100)
    return ids[:, :-1], targets[:, 1:]

# learning rate and optimizer -----------------------------------------------------------------------------------------

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

# answer, evaluate ----------------------------------------------------------------------------------------------------

def respond(model, tok, records, cfg, temperature=1.0, batch=128):
    """Answers each record's prompt -> list of (answer ids without the end token, whether it ended)."""
    end, device, answers = tok.special["<|end|>"], next(model.parameters()).device, []
    for i in range(0, len(records), batch):
        prompts = [r["prompt"] for r in records[i:i + batch]]
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        out = model.generate(pad(prompts, end).to(device), cfg.max_new_tokens, temperature, lengths=lengths, stop=end)
        for row, prompt in zip(out.tolist(), prompts):
            answer = row[len(prompt):len(prompt) + cfg.max_new_tokens]
            ended = end in answer
            answers.append((answer[:answer.index(end)] if ended else answer, ended))
    return answers

def token_f1(answer, gold):
    """Overlap of two bags of words: the harmonic mean of precision and recall (SQuAD, Rajpurkar et al. 2016)."""
    answer, gold = answer.split(), gold.split()
    same = sum((Counter(answer) & Counter(gold)).values())
    return 2 * same / (len(answer) + len(gold)) if answer or gold else 1.0

def gold(records, texts):
    """Judged answers -> {"story": share that passes, "story level 1": ..., "check ends": share that holds it, ...}."""
    shares = defaultdict(list)
    for r, (text, ended) in zip(records, texts):
        verdict = judge(r, text, ended)
        if verdict:
            checks, share, passed = verdict
            task = r.get("task", "story")
            shares[task].append(passed)
            shares[f"{task} level {r.get('level', 0)}"].append(passed)
            for name, held in checks.items():
                shares["check " + name.split(":")[0]].append(held)
        shares["exact match"].append(text == r["output"])
        shares["token F1"].append(token_f1(text, r["output"]))
    return {name: sum(v) / len(v) for name, v in sorted(shares.items())}

@torch.no_grad()
def evaluate(model, records, cfg, device, autocast):
    """Nats per answer token over all records."""
    nats = count = 0
    for i in range(0, len(records), 64):
        part = records[i:i + 64]
        ids = pad([r["prompt"] + r["answer"] for r in part], 0)
        targets = pad([[-100] * len(r["prompt"]) + r["answer"] for r in part], -100)[:, 1:]
        with autocast():
            loss = model(ids[:, :-1].to(device), targets.to(device))[1]
        n = (targets != -100).sum().item()
        nats, count = nats + loss.item() * n, count + n
    return nats / count

def draw(records, shares, path):
    """The loss, and the share of held-out answers that pass, by task."""
    tasks = [name for name in shares if " " not in name]
    fig, axes = figure(f"SFT: {shares['story']:.2f} of held-out stories hold all checks", columns=2, height=3.8)
    seen = [r for r in records if "val_loss" in r]
    axes[0].plot([r["step"] for r in records], [r["loss"] for r in records], alpha=0.6, label="training batch")
    axes[0].plot([r["step"] for r in seen], [r["val_loss"] for r in seen], "o-", label="held out")
    axes[0].set(xlabel="step", ylabel="nats per answer token", ylim=(0, None))
    axes[0].legend()
    axes[1].barh(tasks, [shares[name] for name in tasks], color="C2")
    axes[1].set(xlabel="share that passes, sampled at temperature 1", xlim=(0, 1))
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, autocast = setup(cfg)

    # model, data and optimizers
    base = load_checkpoint(cfg.init or require("part_4/out/base.pt"), "base")
    tok = Tokenizer.load(base["tokenizer"])
    base["gpt_config"]["block_size"] = cfg.block_size
    model = GPT.load(base).to(device)
    train, val = load_data(cfg, tok, model.cfg.block_size)
    train = [train[i] for i in order(train, cfg)]
    optimizers = make_optimizers(model, cfg)
    log = Log(cfg, cfg.steps)
    print(f"{len(train):,} demonstrations, {len(val):,} to validate on, {device} {cfg.dtype}")

    # loop
    start = time.time()
    for step in range(cfg.steps):
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * lr_scale(step, cfg)
        x, y = get_batch(train, step, cfg)
        with autocast():
            loss = model(x.to(device), y.to(device))[1]  # the mean over the whole batch's answer tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        values = {"loss": loss.item(), "lr": cfg.lr * lr_scale(step, cfg), "grad_norm": norm.item()}
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            values["val_loss"] = val_loss = evaluate(model, val, cfg, device, autocast)
        log(step, **values)
    seconds = time.time() - start
    save_checkpoint(Path(cfg.out) / "sft.pt", kind="sft", changed=cfg.changed, step=cfg.steps, config=asdict(cfg),
                    **model.to_checkpoint(), tokenizer=tok.state())

    # what it answers: held-out compositions, sampled at temperature 1
    stories = [r for r in val if r.get("task", "story") == "story"][:cfg.prompts]
    asked = stories + [r for r in val if r.get("task", "story") != "story"][:cfg.prompts]
    texts = [(tok.decode(ids), ended) for ids, ended in respond(model, tok, asked, cfg)]
    shares = gold(asked, texts)
    for name, share in shares.items():
        print(f"{name:24} {share:6.3f}")
    for r, (text, ended) in list(zip(asked, texts))[:3]:
        print(f"\n{r['instruction']}\n  -> {text}{'' if ended else ' ...'}")
    known = "story" in shares
    print(f"\nall checks hold on {shares['story']:.3f} of {len(stories)} held-out stories" if known else "\ngold: n/a")
    save_metrics(cfg, gold_pass=shares.get("story"), val_loss=val_loss, seconds=seconds, steps=cfg.steps, seed=cfg.seed,
                 ended=sum(ended for _, ended in texts) / len(texts),
                 **{name.replace(" ", "_"): share for name, share in shares.items()})
    if known:
        draw(read_jsonl(Path(cfg.out) / "log.jsonl", ["step"]), shares, Path(cfg.out) / "train_sft.png")
