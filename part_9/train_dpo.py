"""
Part 9: DPO. No reward model and no sampling: the policy itself plays the reward model, and pairs of
answers train it.

    python part_9/train_dpo.py                     the SFT model and the world's pairs -> out/dpo.pt
    python part_9/train_dpo.py --beta=0.05         let it go further from the SFT model
    python part_9/train_dpo.py --data=my.jsonl     your own pairs, with TRL's fields prompt, chosen
                                                   and rejected

From part_7/train_rm.py
    New      gather_logp, log_probs, answer_logp, dpo_loss, add_reference_logp, pair_loss,
             gold_share, answer_kl
    Changed  Config, get_batch, lr_scale, Evaluation, evaluate, draw, main body
    Removed  with_end, sample_pairs, pair_length, preference_loss, orthogonalize, Muon,
             make_optimizers, set_lr, rewards, against_truth

The best policy for the reward r minus beta times the KL to the SFT model has
r = beta * log(pi / pi_sft), up to a term that depends on the prompt alone. With this reward in the
Bradley-Terry loss, the loss on rewards becomes a loss on log-probabilities (Rafailov et al. 2023,
eq. 7).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import GPT
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
from tokenizer import Tokenizer


@dataclass
class Config:
    # data
    data: str = "stories"  # stories (the built-in world) or a JSON or JSONL file, TRL's fields
    init: str = ""  # checkpoint of the SFT model; empty: part_6/out/sft.pt
    # optimization
    beta: float = 0.1  # reward that a nat is worth; smaller lets the policy go further from SFT
    steps: int = 240  # optimizer steps
    batch_size: int = 32  # pairs per step
    lr: float = 4e-4  # peak of AdamW's learning rate; from there it falls linearly to 0
    warmup: float = 0.2  # share of the steps in which the learning rate rises to its peak
    grad_clip: float = 1.0  # largest norm of the gradient
    # run
    eval_every: int = 60  # steps between evaluations on the validation data
    prompts: int = 512  # held-out stories that are answered and judged at the end
    max_new_tokens: int = 72  # longest of these answers, in tokens
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "eval_every", "prompts", "max_new_tokens"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.beta > 0, f"beta={self.beta} must be positive"


# data ---------------------------------------------------------------------------------------------


def load_data(cfg):
    """Reads and checks the preferences -> training and validation records."""
    fields = ["prompt", "chosen", "rejected"]
    if cfg.data == "stories":
        folder = require("data/stories")
        train = read_jsonl(folder / "preferences.jsonl", fields)
        val = read_jsonl(folder / "preferences_val.jsonl", fields)
        return train, val

    records = read_jsonl(cfg.data, fields)
    split = int(0.9 * len(records))
    if split == 0:
        fail(f"--data={cfg.data} has {len(records)} pair; at least 2 are needed, one to validate")
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
    """Adds "prompt_ids", and "chosen_ids" and "rejected_ids" with their end tokens, to each record
    -> the pairs that fit in block_size. The others are counted and left out: answers that are cut
    before they differ teach nothing."""
    end = tok.end
    kept = []
    for record in records:
        prompt_ids = chat_prompt(record, tok)
        chosen_ids = [*tok.encode(record["chosen"]), end]
        rejected_ids = [*tok.encode(record["rejected"]), end]
        longest = len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))
        if longest <= block_size:
            ids = {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
            kept.append({**record, **ids})
    if len(kept) < len(records):
        left_out = len(records) - len(kept)
        print(f"{left_out} of {len(records)} pairs are longer than {block_size} tokens: left out")
    if not kept:
        fail(f"no pair fits in the SFT model's {block_size} tokens")
    return kept


def story_prompts(path, tok):
    """The records of an instruction file that ask for a story, each with its "prompt_ids"."""
    stories = []
    for record in read_jsonl(path, ["instruction", "input", "task"]):
        if record["task"] == "story":
            stories.append({**record, "prompt_ids": chat_prompt(record, tok)})
    return stories


def pad(rows, value):
    """Lists of different lengths -> one tensor (B, T), padded on the right."""
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def collate(pairs):
    """B pairs -> ids (2B, T), and where the answers start and end, (2B,) each: first all chosen
    answers, then all rejected ones."""
    rows = [pair["prompt_ids"] + pair["chosen_ids"] for pair in pairs]
    rows += [pair["prompt_ids"] + pair["rejected_ids"] for pair in pairs]
    starts = [len(pair["prompt_ids"]) for pair in pairs]
    lengths = [len(row) for row in rows]
    return pad(rows, 0), torch.tensor(starts + starts), torch.tensor(lengths)


def get_batch(pairs, step, cfg):
    """The pairs of a step. The steps go round and round."""
    first = step * cfg.batch_size
    return [pairs[i % len(pairs)] for i in range(first, first + cfg.batch_size)]


# the lesson's mathematics -------------------------------------------------------------------------


def gather_logp(all_logp, ids):
    """Log-probabilities of all tokens (..., V) -> those of the tokens ids (...)."""
    return all_logp.gather(-1, ids[..., None]).squeeze(-1)


def log_probs(model, ids, mask):
    """Log-probabilities (N, V) of all tokens, at the N positions of ids (B, T) where the mask is
    True. The head is the costly part, so it computes nothing else."""
    x = model.trunk(ids)  # (B, T, C)
    return model.lm_head(x[mask]).log_softmax(dim=-1)


def answer_logp(model, ids, starts, lengths):
    """The log-probabilities (B,), in nats, of the answers ids[b, starts[b]:lengths[b]] (B, T)."""
    positions = torch.arange(1, ids.size(1), device=ids.device)  # of the tokens to be predicted
    mask = (positions >= starts[:, None]) & (positions < lengths[:, None])  # (B, T - 1)
    all_logp = log_probs(model, ids[:, :-1], mask)  # (N, V)
    logp = gather_logp(all_logp, ids[:, 1:][mask])  # (N,)
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, logp).sum(dim=1)


def dpo_loss(logp, reference_logp, beta):
    """Log-probabilities (2B,) of the chosen, then of the rejected answers, under the policy and
    under the SFT model -> the mean loss, and the margins (B,) (Rafailov et al. 2023, eq. 7).

    The reward of an answer is beta * (log pi - log pi_sft), the margin is the difference of a
    pair's rewards, and the loss is -log sigmoid(margin). Where pi = pi_sft it is ln 2.
    """
    reward = beta * (logp - reference_logp)  # (2B,)
    chosen, rejected = reward.chunk(2)  # (B,) each
    margin = chosen - rejected
    return F.softplus(-margin).mean(), margin


@torch.no_grad()
def add_reference_logp(reference, pairs, device):
    """Adds "reference_logp", the SFT model's log-probabilities of the two answers, to each pair.
    They never change, so they are computed once."""
    for i in range(0, len(pairs), 64):
        part = pairs[i : i + 64]
        ids, starts, lengths = collate(part)
        logp = answer_logp(reference, ids.to(device), starts.to(device), lengths.to(device))
        chosen, rejected = logp.chunk(2)
        for pair, chosen_logp, rejected_logp in zip(part, chosen.tolist(), rejected.tolist()):
            pair["reference_logp"] = (chosen_logp, rejected_logp)


def pair_loss(policy, pairs, beta, device):
    """The DPO loss of pairs that have their reference_logp -> the mean loss, and the margins
    (B,)."""
    ids, starts, lengths = collate(pairs)
    logp = answer_logp(policy, ids.to(device), starts.to(device), lengths.to(device))  # (2B,)
    chosen = [pair["reference_logp"][0] for pair in pairs]
    rejected = [pair["reference_logp"][1] for pair in pairs]
    reference_logp = torch.tensor(chosen + rejected, device=device)  # (2B,)
    return dpo_loss(logp, reference_logp, beta)


def lr_scale(step, cfg):
    """The learning rate of a step (0, 1, ...) as a share of its peak: warm up, then decay linearly
    to 0."""
    rise = (step + 1) / max(1.0, cfg.warmup * cfg.steps)
    fall = 1 - step / cfg.steps
    return min(rise, fall)


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


class Evaluation(NamedTuple):
    loss: float  # nats per pair
    accuracy: float  # share of pairs with a positive margin
    margin: float  # mean margin, in units of reward


@torch.no_grad()
def evaluate(policy, pairs, beta, device):
    """The policy on held-out pairs that have their reference_logp -> Evaluation."""
    margins = []
    for i in range(0, len(pairs), 64):
        _, margin = pair_loss(policy, pairs[i : i + 64], beta, device)
        margins.append(margin)
    margin = torch.cat(margins)
    loss = F.softplus(-margin).mean().item()
    accuracy = (margin > 0).float().mean().item()
    return Evaluation(loss, accuracy, margin.mean().item())


def gold_share(records, answers):
    """Gold: the share of answers that pass all checks."""
    passed = 0
    for record, answer in zip(records, answers):
        passed += judge(record, answer.text, answer.ended).passed
    return passed / len(records)


@torch.no_grad()
def answer_kl(policy, reference, records, answers, end, device):
    """KL(pi || pi_sft) in nats per answer of the policy, exact at every token."""
    kl = 0.0
    for i in range(0, len(records), 128):
        rows = []
        masks = []
        for record, answer in zip(records[i : i + 128], answers[i : i + 128]):
            answer_ids = [*answer.ids, end] if answer.ended else answer.ids
            prompt_ids = record["prompt_ids"]
            rows.append(prompt_ids + answer_ids)
            masks.append([False] * (len(prompt_ids) - 1) + [True] * len(answer_ids))
        ids = pad(rows, end).to(device)
        mask = pad(masks, False).to(device)
        policy_logp = log_probs(policy, ids[:, :-1], mask)  # (N, V)
        reference_logp = log_probs(reference, ids[:, :-1], mask)
        kl += (policy_logp.exp() * (policy_logp - reference_logp)).sum().item()
    return kl / len(records)


def draw(records, title, path):
    """Loss, accuracy and margin over training."""
    fig, axes = figure(title, columns=3, height=3.5)
    units = {"loss": "nats per pair", "accuracy": "share of pairs", "margin": "reward"}
    steps = [record["step"] for record in records]
    evaluations = [record for record in records if "val_loss" in record]
    val_steps = [record["step"] for record in evaluations]
    for ax, name in zip(axes, units):
        ax.plot(steps, [record[name] for record in records], alpha=0.6, label="training batch")
        values = [record[f"val_{name}"] for record in evaluations]
        ax.plot(val_steps, values, "o-", label="held out")
        ax.set(title=name, xlabel="optimizer step", ylabel=units[name])
    axes[0].axhline(math.log(2), color="gray", linestyle="--", label="ln 2: no preference")
    axes[0].legend(fontsize=8)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # data first: a broken file must not wait for an SFT model to be built
    train, val = load_data(cfg)

    # models
    sft = load_checkpoint(cfg.init or require("part_6/out/sft.pt"), "sft")
    tok = Tokenizer.load(sft["tokenizer"])
    policy = GPT.load(sft).to(device)
    reference = GPT.load(sft).to(device).requires_grad_(False)
    out = output_folder(cfg)

    # pairs, in a random order and no more than are needed
    train = encode_records(train, tok, policy.cfg.block_size)
    val = encode_records(val, tok, policy.cfg.block_size)
    generator = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(train), generator=generator).tolist()
    train = [train[i] for i in order[: cfg.steps * cfg.batch_size]]
    print(
        f"{len(train):,} pairs, {len(val):,} held out; the SFT model reads them once ...",
        flush=True,
    )
    add_reference_logp(reference, train + val, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, eps=1e-5, weight_decay=0.0)

    # training loop
    log = Log(out, cfg.steps, name="train_dpo")
    for step in range(cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * lr_scale(step, cfg)

        # forward and backward
        loss, margin = pair_loss(policy, get_batch(train, step, cfg), cfg.beta, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()

        # update, with the gradient's norm limited
        torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        optimizer.step()

        # once in a while: evaluate
        values = {
            "loss": loss.item(),
            "accuracy": (margin > 0).float().mean().item(),
            "margin": margin.mean().item(),
        }
        last_step = step + 1 == cfg.steps
        if (step + 1) % cfg.eval_every == 0 or last_step:
            val_result = evaluate(policy, val, cfg.beta, device)
            values["val_loss"] = val_result.loss
            values["val_accuracy"] = val_result.accuracy
            values["val_margin"] = val_result.margin
        log(step, **values)
    seconds = log.seconds

    save_checkpoint(
        out / "dpo.pt",
        kind="dpo",
        changed=cfg.changed,
        step=cfg.steps,
        config=asdict(cfg),
        tokenizer=tok.state(),
        **policy.to_checkpoint(),
    )

    # how good is it? on held-out pairs, and gold on the world's held-out stories
    title = f"DPO puts {val_result.accuracy:.3f} of the held-out pairs in the order of their labels"
    metrics = {"accuracy": val_result.accuracy, "margin": val_result.margin}
    if cfg.data == "stories":
        path = require("data/stories") / "instructions_val.jsonl"
        stories = story_prompts(path, tok)[: cfg.prompts]
        answers = respond(reference, tok, stories, cfg.max_new_tokens)
        metrics["sft_gold"] = gold_share(stories, answers)
        answers = respond(policy, tok, stories, cfg.max_new_tokens)
        metrics["dpo_gold"] = gold_share(stories, answers)
        end = tok.end
        metrics["kl"] = answer_kl(policy, reference, stories, answers, end, device)
        title = (
            f"DPO: held-out gold {metrics['sft_gold']:.2f} -> {metrics['dpo_gold']:.2f} "
            f"at {metrics['kl']:.1f} nats of KL"
        )
    save_metrics(out, name="train_dpo", **metrics, seconds=seconds, steps=cfg.steps, seed=cfg.seed)
    draw(read_log(out, "train_dpo"), title, out / "train_dpo.png")
    print(f"{title}; {seconds:.0f} s")
