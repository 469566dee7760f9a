"""
Part 7 - a reward model: from pairs of answers, one of which a judge preferred, to a number for any answer.

    python part_7/train_rm.py                                    the world's pairs and the policy's -> part_7/out/rm.pt
    python part_7/train_rm.py --head=last                        score at the end token instead of the mean over tokens
    python part_7/train_rm.py --bidirectional=1                  an encoder: every token sees the whole answer
    python part_7/train_rm.py --loss=margin                      hinge, not Bradley-Terry
    python part_7/train_rm.py --data=my.jsonl --policy_pairs=0   your own, with TRL's fields prompt, chosen, rejected

The labels are noisy: the judge prefers the truly better answer with probability sigmoid(gap / tau). Nobody can agree
with such labels more often than the Bayes accuracy. A policy goes wherever the reward model is wrong, so that is also
shown pairs of the policy's own making (--policy_pairs).

From part_6/train_sft.py
    New      make_pair, story_prompts, shuffled, sample_pairs, collate, preference_loss, rewards, calibration
             length_probe, padding_error, against_truth
    Changed  Config, load_data, get_batch, evaluate, draw
    Removed  encode, order, gold, token_f1
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import random
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from model import GPT, RewardModel
from shared import (Log, cli, fail, figure, judge, load_checkpoint, read_jsonl, read_text, require, save_checkpoint,
                    save_figure, save_metrics, setup)
from tokenizer import Tokenizer

@dataclass
class Config:
    # data
    data: str = "stories"  # "stories" (the built-in world) or the path of a JSONL file with prompt, chosen, rejected
    init: str = ""  # the SFT model's checkpoint; "": part_6/out/sft.pt
    policy_pairs: int = 1280  # pairs of the SFT policy's own answers, labelled by the same noisy judge; 0: none
    shuffle_labels: int = 0  # 1: the control: labels that mean nothing must teach nothing
    # reward model
    head: str = "mean"  # mean over the answer's tokens, or last: the end token's score
    bidirectional: int = 0  # 1: an encoder
    loss: str = "bt"  # bt (Bradley-Terry) or margin (hinge)
    margin: float = 1.0  # of the hinge
    center: float = 0.01  # weight of (r_chosen + r_rejected)^2 (Eisenstein et al. 2023): keeps rewards near 0
    # optimization
    steps: int = 500  # optimizer steps
    batch_size: int = 24  # pairs per step
    lr: float = 0.003  # Muon's peak rate
    lr_adamw: float = 1e-3  # AdamW's
    weight_decay: float = 0.0  # of both
    warmup: float = 0.05  # share of the steps in which the rate rises
    decay: float = 0.4  # share of the steps, at the end, in which it falls to 0
    grad_clip: float = 1.0  # largest norm of the gradient
    # run
    eval_every: int = 100  # steps between evaluations
    max_new_tokens: int = 72  # longest sampled answer, in tokens
    dtype: str = ""  # fp32 or bf16; "": fp32 on a CPU, bf16 on CUDA
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        assert min(self.steps, self.batch_size, self.eval_every) > 0, "steps, batch_size, eval_every must be at least 1"
        assert self.head in ("mean", "last"), f"head={self.head}: mean or last"
        assert self.loss in ("bt", "margin"), f"loss={self.loss}: bt or margin"

# data ----------------------------------------------------------------------------------------------------------------

def make_pair(record, tok):
    """TRL's fields -> "prompt", "chosen" and "rejected" as ids, with the template's tokens and the end token."""
    end = tok.special["<|end|>"]
    prompt = [tok.special["<|user|>"], *tok.encode(record["prompt"]), tok.special["<|assistant|>"]]
    chosen, rejected = ([*tok.encode(record[side]), end] for side in ("chosen", "rejected"))
    return {**record, "prompt": prompt, "chosen": chosen, "rejected": rejected}

def load_data(cfg, tok, block_size):
    """-> training and validation pairs. What does not fit is left out: cut before they differ, they teach nothing."""
    fields = ["prompt", "chosen", "rejected"]
    if cfg.data == "stories":
        folder = require("data/stories")
        splits = [read_jsonl(folder / f"preferences{split}.jsonl", fields) for split in ("", "_val")]
    else:
        records = read_jsonl(cfg.data, fields)
        splits = [records[:int(0.9 * len(records))], records[int(0.9 * len(records)):]]
    kept = []
    for records in splits:
        pairs = [make_pair(r, tok) for r in records]
        kept.append([p for p in pairs if len(p["prompt"]) + max(len(p["chosen"]), len(p["rejected"])) <= block_size])
        if len(kept[-1]) < len(pairs):
            print(f"{len(pairs) - len(kept[-1])} of {len(pairs)} pairs have over {block_size} tokens: left out")
        if not kept[-1]:
            fail(f"--data={cfg.data}: no pair is left that fits into block_size={block_size} tokens")
    return kept

def story_prompts(path, tok):
    """The records of an instruction file that ask for a story, each with its "prompt" ids."""
    records = [r for r in read_jsonl(path, ["instruction", "task"]) if r["task"] == "story"]
    return [{**make_pair({**r, "prompt": r["instruction"], "chosen": "", "rejected": ""}, tok)} for r in records]

def shuffled(pairs, seed):
    """Half of the labels the other way round: a control that nothing can be learned from."""
    flip = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)) < 0.5
    return [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} if f else p for p, f in zip(pairs, flip)]

def sample_pairs(model, tok, records, cfg, tau):
    """Two answers of the policy to each record's prompt, labelled by the noisy judge -> pairs. Ties are left out."""
    twice = [r for r in records for _ in range(2)]
    answers, pairs, rng = respond(model, tok, twice, cfg), [], random.Random(cfg.seed)
    for i in range(0, len(twice), 2):
        score = [sum(judge(twice[i], tok.decode(ids), ended)[0].values()) for ids, ended in answers[i:i + 2]]
        ids = [a + [tok.special["<|end|>"]] * ended for a, ended in answers[i:i + 2]]
        gap = score[0] - score[1]
        if gap:
            first = rng.random() < 1 / (1 + math.exp(-gap / tau))
            chosen, rejected = ids if first else ids[::-1]
            gap = gap if first else -gap
            pairs.append({"prompt": twice[i]["prompt"], "chosen": chosen, "rejected": rejected, "gap": gap})
    return pairs

def pad(rows, value):
    """Lists of different lengths -> (B, T), padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

def collate(pairs):
    """Pairs -> ids (2B, T), where the answers start and end (2B,): first all chosen, then all rejected."""
    rows = [p["prompt"] + p[side] for side in ("chosen", "rejected") for p in pairs]
    starts = torch.tensor([len(p["prompt"]) for p in pairs] * 2)
    return pad(rows, 0), starts, torch.tensor([len(row) for row in rows])

def get_batch(pairs, step, cfg, group=8):
    """The pairs of a step: shuffled each time round, every 8 batches sorted by length, so that little is padding."""
    size = min(group * cfg.batch_size, len(pairs))
    per_epoch = max(1, len(pairs) // size)
    epoch, i = divmod(step // group, per_epoch)
    perm = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(cfg.seed * 1_000_003 + epoch))
    part = [pairs[k] for k in perm[i * size:(i + 1) * size].tolist()]
    part.sort(key=lambda p: len(p["prompt"]) + max(len(p["chosen"]), len(p["rejected"])))
    first = step % group * cfg.batch_size % size
    return collate(part[first:first + cfg.batch_size])

# the lesson's mathematics --------------------------------------------------------------------------------------------

def preference_loss(chosen, rejected, kind="bt", margin=1.0, center=0.0):
    """Rewards (B,) of the preferred and of the other answer -> loss, a scalar.

    bt: -log sigmoid(r_c - r_r), Bradley-Terry (InstructGPT, eq. 1). It fixes only differences, so `center` pulls the
    sum of a pair towards 0. margin: max(0, margin - (r_c - r_r)), no probability: it stops to care at the margin.
    """
    gap = chosen - rejected
    loss = F.softplus(-gap) if kind == "bt" else F.relu(margin - gap)
    return (loss + center * (chosen + rejected).pow(2)).mean()

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

@torch.no_grad()
def rewards(model, pairs, device, batch=64):
    """-> rewards of the preferred answers (N,) and of the others (N,)."""
    parts = [collate(pairs[i:i + batch]) for i in range(0, len(pairs), batch)]
    both = [model(*(z.to(device) for z in part)).cpu().chunk(2) for part in parts]
    return tuple(torch.cat(side) for side in zip(*both))

def evaluate(model, pairs, device):
    """-> the share of pairs in which the preferred answer gets more, and the differences of reward (N,)."""
    chosen, rejected = rewards(model, pairs, device)
    return (chosen > rejected).float().mean().item(), chosen - rejected

def calibration(gap, true_gap, tau, bins=10):
    """Differences of reward (N,) and of true scores (N,) -> mean claimed and true probability in bins of the claimed
    one, and their mean distance weighted by the bins' sizes: expected calibration error against known probabilities."""
    claimed, true = gap.sigmoid(), (true_gap / tau).sigmoid()
    which = (claimed * bins).long().clamp(max=bins - 1)
    count = torch.bincount(which, minlength=bins).float()
    claimed, true = (torch.bincount(which, weights=z, minlength=bins) / count for z in (claimed, true))
    error = ((claimed - true).abs() * count).nansum() / count.sum()
    return claimed, true, error.item()

def length_probe(train, val):
    """Accuracy on val of "longer wins" or "shorter wins", whichever is better on train; equal lengths count half."""
    longer = [torch.tensor([len(p["chosen"]) - len(p["rejected"]) for p in pairs]).sign() for pairs in (train, val)]
    return 0.5 + 0.5 * (longer[0].sum().sign() * longer[1]).float().mean().item()

@torch.no_grad()
def padding_error(model, pairs, device):
    """The largest change of a reward when its row is padded to the whole context: rounding, or a bug."""
    ids, *ends = (z.to(device) for z in collate(pairs))
    padded = F.pad(ids, (0, model.cfg.block_size - ids.size(1)))
    return (model(ids, *ends) - model(padded, *ends)).abs().max().item()

def against_truth(gap, pairs, tau):
    """What only a world with a known judge can say: Bayes accuracy, true order overall and by gap, calibration."""
    true = torch.tensor([float(p["gap"]) for p in pairs])
    right = ((gap > 0) == (true > 0)).float()
    claimed, known, error = calibration(gap, true, tau)
    return {
        "bayes_accuracy": (true.abs() / tau).sigmoid().mean().item(), "true_order": right.mean().item(),
        **{f"true_order_gap_{n}": right[true.abs() == n].mean().item() for n in (1, 2, 3, 4)},
        "calibration_error": error,
    }, (claimed, known)

def draw(records, metrics, curve, path):
    """Accuracy while it trained, accuracy by how much better the better answer is, claimed against true probability."""
    title = f"Reward model: {metrics['accuracy']:.3f} of the labels, Bayes {metrics['bayes_accuracy']:.3f}"
    fig, (left, middle, right) = figure(title, columns=3, height=3.6)
    seen = [r for r in records if "accuracy" in r]
    left.plot([r["step"] for r in records], [r["loss"] for r in records], alpha=0.4, label="loss, nats per pair")
    left.plot([r["step"] for r in seen], [r["accuracy"] for r in seen], "o-", label="held-out accuracy")
    left.axhline(metrics["bayes_accuracy"], color="gray", linestyle="--", label="Bayes accuracy")
    left.set(xlabel="step", ylim=(0, 1))
    left.legend(fontsize=8)
    middle.bar([1, 2, 3, 4], [metrics[f"true_order_gap_{n}"] for n in (1, 2, 3, 4)], color="C2")
    middle.set(xlabel="gap in checks held", ylabel="share in true order", ylim=(0.4, 1))
    right.plot([0, 1], [0, 1], color="gray", linestyle="--", label="perfect")
    right.plot(*curve, "o-", color="C3", label="this model")
    right.set(xlabel="claimed probability", ylabel="true probability")
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, autocast = setup(cfg)

    # models and data
    sft = load_checkpoint(cfg.init or require("part_6/out/sft.pt"), "sft")
    tok = Tokenizer.load(sft["tokenizer"])
    model = RewardModel.load(sft, head=cfg.head, bidirectional=cfg.bidirectional).to(device)
    policy = GPT.load(sft).to(device)
    start = time.time()
    train, val = load_data(cfg, tok, model.cfg.block_size)
    own, own_val, known = [], [], cfg.data == "stories"
    if known:
        folder = require("data/stories")
        tau = json.loads(read_text(folder / "facts.json"))["tau"]
        own = sample_pairs(policy, tok, story_prompts(folder / "instructions.jsonl", tok)[:cfg.policy_pairs], cfg, tau)
        own_val = sample_pairs(policy, tok, story_prompts(folder / "instructions_val.jsonl", tok)[:256], cfg, tau)
    train = shuffled(train + own, cfg.seed) if cfg.shuffle_labels else train + own
    optimizers = make_optimizers(model, cfg)
    log = Log(cfg, cfg.steps)
    print(f"{len(train):,} pairs, {len(own):,} of them the policy's, and {len(val):,} held out, {device} {cfg.dtype}")

    # loop
    for step in range(cfg.steps):
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * lr_scale(step, cfg)
        with autocast():
            chosen, rejected = model(*(z.to(device) for z in get_batch(train, step, cfg))).chunk(2)
            loss = preference_loss(chosen, rejected, cfg.loss, cfg.margin, cfg.center)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        values = {"loss": loss.item(), "train_accuracy": (chosen > rejected).float().mean().item(),
                  "lr": cfg.lr * lr_scale(step, cfg), "grad_norm": norm.item()}
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            values["accuracy"], gap = evaluate(model, val, device)
        log(step, **values)
    seconds = time.time() - start

    # normalise: mean 0 and variance 1 on what the SFT policy writes; Bradley-Terry fixes neither
    answers = torch.cat(rewards(model, own_val or val, device))
    model.shift.copy_(answers.mean())
    model.scale.copy_(1 / answers.std())
    save_checkpoint(Path(cfg.out) / "rm.pt", kind="rm", changed=cfg.changed, step=cfg.steps, config=asdict(cfg),
                    head={"head": cfg.head, "bidirectional": cfg.bidirectional}, **model.to_checkpoint(),
                    tokenizer=tok.state())

    # how good it is: against the labels, against the truth, on the policy's own answers, and what it must not use
    metrics = {"accuracy": values["accuracy"], "length_probe": length_probe(train, val), "padding_error":
               padding_error(model, val[:8], device), "shuffled": evaluate(model, shuffled(val, cfg.seed), device)[0]}
    if known:
        truth, curve = against_truth(gap.cpu(), val, tau)
        metrics["policy_accuracy"], own_gap = evaluate(model, own_val, device)
        metrics["policy_true_order"] = against_truth(own_gap.cpu(), own_val, tau)[0]["true_order"]
        metrics |= truth
        draw(read_jsonl(Path(cfg.out) / "log.jsonl", ["step"]), metrics, curve, Path(cfg.out) / "train_rm.png")
    for name, value in metrics.items():
        print(f"{name:20} {value:.4f}")
    save_metrics(cfg, **metrics, seconds=seconds, steps=cfg.steps, seed=cfg.seed)
