"""
Part 9 - DPO: no reward model and no sampling. The policy itself is the reward model, and pairs of answers train it.

    python part_9/train_dpo.py                       the SFT model and the world's preferences -> part_9/out/dpo.pt
    python part_9/train_dpo.py --beta=0.05           a longer leash: beta is the price of a nat of KL
    python part_9/train_dpo.py --data=my.jsonl       your own pairs, with TRL's fields prompt, chosen, rejected

The best policy under reward minus beta KL has reward beta log(pi / pi_sft), up to what depends on the prompt alone. Put
that into Bradley-Terry, and the loss on rewards becomes a loss on log-probabilities (Rafailov et al. 2023, eq. 7).

From part_7/train_rm.py
    New      answer_logp, dpo_loss, reference_logp, loss_of
    Changed  Config, get_batch, evaluate, draw
    Removed  story_prompts, shuffled, sample_pairs, preference_loss, respond, rewards, calibration, length_probe
             padding_error, against_truth, lr_scale, make_optimizers (AdamW, and the rate falls linearly as in GRPO)
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

import train_grpo
from model import GPT
from shared import (Log, cli, fail, figure, load_checkpoint, read_jsonl, require, save_checkpoint, save_figure,
                    save_metrics, setup)
from tokenizer import Tokenizer

@dataclass
class Config:
    # data
    data: str = "stories"  # "stories" (the built-in world) or the path of a JSONL file with prompt, chosen, rejected
    init: str = ""  # the SFT model's checkpoint; "": part_6/out/sft.pt
    # optimization
    beta: float = 0.1  # reward per nat: the smaller, the further the policy may go from SFT
    steps: int = 240  # optimizer steps
    batch_size: int = 32  # pairs per step
    lr: float = 6e-4  # AdamW's rate at first, eps 1e-5; it falls linearly to 0 over the run
    grad_clip: float = 1.0  # largest norm of the gradient
    # run
    eval_every: int = 60  # steps between evaluations on held-out pairs
    prompts: int = 512  # held-out stories that are answered and judged at the end
    max_new_tokens: int = 72  # longest of these answers, in tokens
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        assert min(self.steps, self.batch_size, self.eval_every) > 0, "steps, batch_size, eval_every must be at least 1"

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

def pad(rows, value):
    """Lists of different lengths -> (B, T), padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

def collate(pairs):
    """Pairs -> ids (2B, T), where the answers start and end (2B,): first all chosen, then all rejected."""
    rows = [p["prompt"] + p[side] for side in ("chosen", "rejected") for p in pairs]
    starts = torch.tensor([len(p["prompt"]) for p in pairs] * 2)
    return pad(rows, 0), starts, torch.tensor([len(row) for row in rows])

def get_batch(pairs, step, cfg):
    """The pairs of a step: in the order in which they were shuffled, round and round."""
    first = step * cfg.batch_size
    return [pairs[i % len(pairs)] for i in range(first, first + cfg.batch_size)]

# the lesson's mathematics --------------------------------------------------------------------------------------------

def answer_logp(model, ids, starts, lengths):
    """ids (B, T) whose answers are ids[b, starts[b]:lengths[b]] -> their log-probabilities (B,), in nats."""
    at = torch.arange(1, ids.size(1), device=ids.device)  # the place of each predicted token
    mask = (at >= starts[:, None]) & (at < lengths[:, None])  # (B, T - 1)
    logp = train_grpo.pick(train_grpo.log_probs(model, ids[:, :-1], mask), ids[:, 1:][mask])
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, logp).sum(dim=1)

def dpo_loss(logp, reference, beta):
    """Log-probabilities (2B,) of the chosen, then of the rejected answers -> loss, margins (B,) of reward.

    margin = beta (log pi/pi_sft of the chosen - of the rejected), loss = mean of -log sigmoid(margin). At pi = pi_sft
    every margin is 0 and the loss is ln 2.
    """
    chosen, rejected = (beta * (logp - reference)).chunk(2)
    margin = chosen - rejected
    return F.softplus(-margin).mean(), margin

@torch.no_grad()
def reference_logp(model, pairs, device):
    """Writes the SFT model's log-probabilities (chosen, rejected) into each pair, once."""
    for i in range(0, len(pairs), 64):
        part = pairs[i:i + 64]
        logp = answer_logp(model, *(x.to(device) for x in collate(part))).view(2, -1)
        for p, both in zip(part, logp.T.tolist()):
            p["reference"] = both

def loss_of(policy, pairs, beta, device):
    reference = torch.tensor([p["reference"] for p in pairs], device=device).T.flatten()
    return dpo_loss(answer_logp(policy, *(x.to(device) for x in collate(pairs))), reference, beta)

# evaluate ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(policy, pairs, beta, device):
    """Held-out pairs -> mean loss, accuracy (margin above 0), mean margin."""
    parts = [loss_of(policy, pairs[i:i + 64], beta, device)[1] for i in range(0, len(pairs), 64)]
    margin = torch.cat(parts)
    return F.softplus(-margin).mean().item(), (margin > 0).float().mean().item(), margin.mean().item()

def draw(records, said, path):
    """Loss, accuracy and margin over the run."""
    fig, axes = figure(said, columns=3, height=3.5)
    seen = [r for r in records if "val_loss" in r]
    for ax, key, unit in zip(axes, ("loss", "accuracy", "margin"), ("nats per pair", "share of pairs", "reward")):
        ax.plot([r["step"] for r in records], [r[key] for r in records], alpha=0.6, label="training batch")
        ax.plot([r["step"] for r in seen], [r[f"val_{key}"] for r in seen], "o-", label="held out")
        ax.set(title=key, xlabel="step", ylabel=unit)
    axes[0].axhline(math.log(2), color="gray", linestyle="--", label="ln 2: no preference")
    axes[0].legend(fontsize=8)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)

    # data and models
    sft = load_checkpoint(cfg.init or require("part_6/out/sft.pt"), "sft")
    tok = Tokenizer.load(sft["tokenizer"])
    policy, reference = GPT.load(sft).to(device), GPT.load(sft).to(device)
    pairs, val_pairs = load_data(cfg, tok, policy.cfg.block_size)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(cfg.seed)).tolist()
    pairs = [pairs[i] for i in order[:cfg.steps * cfg.batch_size]]  # no more than are needed
    print(f"{len(pairs):,} pairs, {len(val_pairs):,} held out; the SFT model's log-probabilities, once ...", flush=True)
    reference_logp(reference, pairs + val_pairs, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, eps=1e-5, weight_decay=0.0)
    log = Log(cfg, cfg.steps, name="train_dpo")

    # loop
    for step in range(cfg.steps):
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - step / cfg.steps)
        loss, margin = loss_of(policy, get_batch(pairs, step, cfg), cfg.beta, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        optimizer.step()
        values = {"loss": loss.item(), "accuracy": (margin > 0).float().mean().item(), "margin": margin.mean().item()}
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            found = evaluate(policy, val_pairs, cfg.beta, device)
            values |= dict(zip(("val_loss", "val_accuracy", "val_margin"), found))
        log(step, **values)
    seconds = log.seconds
    save_checkpoint(Path(cfg.out) / "dpo.pt", kind="dpo", changed=cfg.changed, step=cfg.steps, config=asdict(cfg),
                    **policy.to_checkpoint(), tokenizer=tok.state())

    # what came of it: gold on the world's held-out stories, before and after
    said = f"DPO: {values['val_accuracy']:.3f} of held-out pairs in the labels' order"
    metrics = {"accuracy": values["val_accuracy"], "margin": values["val_margin"], "seconds": seconds}
    if cfg.data == "stories":
        asked = train_grpo.Config(prompts=cfg.prompts, max_new_tokens=cfg.max_new_tokens)
        stories = [r for r in train_grpo.load_data(asked, tok, policy.cfg.block_size)[1] if r["task"] == "story"]
        before, _, _ = train_grpo.evaluate(reference, reference, tok, stories, asked, device)
        after, kl, _ = train_grpo.evaluate(policy, reference, tok, stories, asked, device)
        said = f"DPO: held-out gold {before['story']:.2f} -> {after['story']:.2f} at {kl:.1f} nats of KL"
        metrics |= {"sft_gold": before["story"], "dpo_gold": after["story"], "kl": kl}
    print(f"{said}; {seconds:.0f} s")
    save_metrics(cfg, name="train_dpo", **metrics, steps=cfg.steps, seed=cfg.seed)
    draw(read_jsonl(Path(cfg.out) / "train_dpo.jsonl", ["step"]), said, Path(cfg.out) / "train_dpo.png")
