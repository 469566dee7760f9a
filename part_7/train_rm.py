"""
Part 7: a reward model. From pairs of answers, one of which a judge preferred, to a number for any
answer.

    python part_7/train_rm.py                      the world's pairs and the policy's -> out/rm.pt
    python part_7/train_rm.py --head=last          a linear layer on the end token, as InstructGPT
    python part_7/train_rm.py --head=mean --bidirectional
                                                   an encoder: every token sees the whole answer
    python part_7/train_rm.py --loss=margin        a hinge loss instead of Bradley-Terry
    python part_7/train_rm.py --data=my.jsonl      your own pairs, with TRL's fields prompt, chosen
                                                   and rejected

From part_6/train_sft.py
    New      story_prompts, with_end, sample_pairs, pair_length, preference_loss, rewards,
             Evaluation, against_truth
    Changed  Config, load_data, encode_records, collate, get_batch, make_optimizers (the head has a
             learning rate of its own), evaluate, draw
    Removed  order, token_f1, grade

The labels are noisy: the judge prefers the truly better answer with probability sigmoid(gap / tau).
No reward model can agree with such labels more often than the Bayes accuracy. And a policy goes
wherever the reward model is wrong, so the model is also shown pairs that the SFT policy itself
wrote (--policy_pairs). demo_sanity.py asks whether the result can be trusted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import random
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import GPT, RewardModel
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
    read_text,
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

    # prompts that the SFT policy answers twice, for the noisy judge to compare; pairs of equally
    # good answers are left out; 0: none
    policy_pairs: int = 1280

    # reward model

    # implicit (the mean log-probability of the answer's tokens), mean (of a linear layer on each of
    # its tokens) or last (the same layer on the end token)
    head: str = "implicit"

    bidirectional: bool = False  # an encoder: every token sees the whole text; for mean and last
    loss: str = "bt"  # bt (Bradley-Terry) or margin (hinge)
    margin: float = 1.0  # difference of rewards at which the hinge loss becomes zero

    # weight of (chosen + rejected)^2, which keeps the rewards near 0 (Eisenstein et al. 2023)
    center: float = 0.01

    # optimization
    steps: int = 300  # optimizer steps
    batch_size: int = 24  # pairs per step
    lr: float = 0.003  # learning rate of Muon, for the hidden matrices; an update has RMS 0.2 lr
    lr_adamw: float = 1e-3  # learning rate of AdamW, for everything else
    lr_head: float = 0.01  # learning rate of AdamW for the linear layer of the heads mean and last
    weight_decay: float = 0.0  # decay of the weights in all matrices; gains do not decay
    warmup: float = 0.05  # share of the steps in which the learning rate rises to its peak
    decay: float = 0.4  # share of the steps, at the end, in which it falls linearly to 0
    grad_clip: float = 1.0  # largest norm of the gradient
    # run
    dtype: str = ""  # fp32 or bf16; empty: bf16 on CUDA, fp32 elsewhere
    eval_every: int = 100  # steps between evaluations on the validation data
    max_new_tokens: int = 72  # longest answer of the SFT policy, in tokens
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "eval_every", "max_new_tokens"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.dtype in ("", "fp32", "bf16"), f"dtype={self.dtype} must be fp32 or bf16"
        assert self.head in ("implicit", "mean", "last"), (
            f"head={self.head} must be implicit, mean or last"
        )
        assert not (self.bidirectional and self.head == "implicit"), (
            "bidirectional needs --head=mean or last: a token that is seen need not be predicted"
        )
        assert self.loss in ("bt", "margin"), f"loss={self.loss} must be bt or margin"


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


def with_end(answer, end):
    """An answer's tokens, with the end token if it ended."""
    if answer.ended:
        return [*answer.ids, end]
    return answer.ids


def sample_pairs(policy, tok, records, cfg, tau):
    """The policy answers each record's prompt_ids twice, and the noisy judge labels the two answers
    -> pairs. Answers that are equally good are left out."""
    end = tok.end
    rng = random.Random(cfg.seed)
    twice = [record for record in records for _ in range(2)]
    answers = respond(policy, tok, twice, cfg.max_new_tokens)

    pairs = []
    for record, first, second in zip(records, answers[0::2], answers[1::2]):
        # How many more checks does the first answer pass?
        first_checks = judge(record, first.text, first.ended).checks
        second_checks = judge(record, second.text, second.ended).checks
        gap = sum(first_checks.values()) - sum(second_checks.values())
        if gap == 0:
            continue

        # The judge prefers the first with probability sigmoid(gap / tau). exp() would overflow if
        # tau were tiny, hence the limit.
        p_first = 1 / (1 + math.exp(min(-gap / tau, 700)))
        if rng.random() < p_first:
            chosen, rejected = first, second
        else:
            chosen, rejected = second, first
            gap = -gap
        pairs.append(
            {
                "prompt_ids": record["prompt_ids"],
                "chosen_ids": with_end(chosen, end),
                "rejected_ids": with_end(rejected, end),
                "gap": gap,
            }
        )
    return pairs


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


def pair_length(pair):
    """The tokens of the longer of a pair's two rows."""
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def get_batch(pairs, step, cfg, group=8):
    """The batch of a step, as collate makes it.

    The pairs are shuffled anew in every pass. Each `group` batches are then sorted by length among
    themselves, so that little of a batch is padding.
    """
    group_size = min(group * cfg.batch_size, len(pairs))
    groups_per_pass = max(1, len(pairs) // group_size)
    number_of_pass, number_of_group = divmod(step // group, groups_per_pass)

    seed = cfg.seed * 1_000_003 + number_of_pass
    shuffled = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    first = number_of_group * group_size
    members = [pairs[i] for i in shuffled[first : first + group_size]]
    members.sort(key=pair_length)

    # This step's batch in the group. A group of few pairs begins again.
    place = ((step % group) * cfg.batch_size) % group_size
    return collate(members[place : place + cfg.batch_size])


# the lesson's mathematics -------------------------------------------------------------------------


def preference_loss(chosen, rejected, kind="bt", margin=1.0, center=0.0):
    """The rewards (B,) of the preferred and of the other answers -> the mean loss.

    bt: -log sigmoid(chosen - rejected), the Bradley-Terry model (Ouyang et al. 2022, eq. 1).
    margin: max(0, margin - (chosen - rejected)), zero once the difference reaches the margin.
    Both fix only differences of rewards; `center` pulls the sum of a pair towards 0.
    """
    difference = chosen - rejected
    if kind == "bt":
        loss = F.softplus(-difference)  # = -log sigmoid(difference)
    else:
        loss = F.relu(margin - difference)
    return (loss + center * (chosen + rejected).pow(2)).mean()


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
    head = []
    for name, p in model.named_parameters():
        if p.ndim < 2:
            gains.append(p)
        elif name.startswith("score_head."):
            head.append(p)
        elif name.startswith("h.") and "router" not in name:
            hidden.append(p)
        else:
            tables.append(p)

    # Weight decay is for matrices. A gain is best near 1, so pulling it to 0 makes no sense.
    muon = Muon(hidden, lr=cfg.lr, weight_decay=cfg.weight_decay)
    groups = [
        {"params": tables, "weight_decay": cfg.weight_decay},
        {"params": gains, "weight_decay": 0.0},
        {"params": head, "weight_decay": cfg.weight_decay, "lr": cfg.lr_head},
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


@torch.no_grad()
def rewards(model, pairs, device):
    """The rewards (N,) of the preferred answers, and those (N,) of the others."""
    chosen = []
    rejected = []
    for i in range(0, len(pairs), 64):
        ids, starts, lengths = collate(pairs[i : i + 64])
        reward = model(ids.to(device), starts.to(device), lengths.to(device)).cpu()
        half = len(reward) // 2
        chosen.append(reward[:half])
        rejected.append(reward[half:])
    return torch.cat(chosen), torch.cat(rejected)


class Evaluation(NamedTuple):
    accuracy: float  # share of pairs in which the preferred answer gets the higher reward
    gap: torch.Tensor  # (N,) reward of the preferred answer minus that of the other


def evaluate(model, pairs, device):
    """The reward model on labelled pairs -> Evaluation."""
    chosen, rejected = rewards(model, pairs, device)
    accuracy = (chosen > rejected).float().mean().item()
    return Evaluation(accuracy, chosen - rejected)


def against_truth(gap, pairs, tau):
    """What only a world with a known judge can tell. gap (N,) are differences of reward -> a dict:
    the Bayes accuracy, and the share of pairs in their true order, overall and by how many more
    checks the better answer passes."""
    true_gap = torch.tensor([float(pair["gap"]) for pair in pairs])
    in_order = ((gap > 0) == (true_gap > 0)).float()
    truth = {
        "bayes_accuracy": (true_gap.abs() / tau).sigmoid().mean().item(),
        "true_order": in_order.mean().item(),
    }
    for checks in (1, 2, 3, 4):
        truth[f"true_order_gap_{checks}"] = in_order[true_gap.abs() == checks].mean().item()
    return truth


def draw(records, metrics, path):
    """Loss and accuracy over training, and true order by size of the gap."""
    title = (
        f"The reward model agrees with {metrics['accuracy']:.3f} of the noisy labels, "
        f"{metrics['bayes_accuracy']:.3f} is possible"
    )
    fig, (left, middle, right) = figure(title, columns=3, height=3.8)

    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    left.plot(steps, losses)
    left.set(xlabel="optimizer step", ylabel="training loss, nats per pair", ylim=(0, None))

    evaluations = [record for record in records if "accuracy" in record]
    steps = [record["step"] for record in evaluations]
    accuracies = [record["accuracy"] for record in evaluations]
    middle.plot(steps, accuracies, "o-", color="C1", label="reward model")
    bayes = metrics["bayes_accuracy"]
    middle.axhline(bayes, color="gray", linestyle="--", label="Bayes accuracy")
    middle.set(xlabel="optimizer step", ylabel="accuracy on held-out labels", ylim=(0.5, 1))
    middle.legend(fontsize=8)

    gaps = (1, 2, 3, 4)
    right.bar(gaps, [metrics[f"true_order_gap_{gap}"] for gap in gaps], color="C2")
    right.set(xlabel="checks that the better\nanswer passes more")
    right.set(ylabel="share of pairs in true order", ylim=(0.5, 1), xticks=gaps)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    autocast = autocast_for(device, dtype)

    # data first: a broken file must not wait for an SFT model to be built
    train, val = load_data(cfg)

    # models: the reward model starts from the SFT model, which is also the policy that writes pairs
    sft = load_checkpoint(cfg.init or require("part_6/out/sft.pt"), "sft")
    tok = Tokenizer.load(sft["tokenizer"])
    model = RewardModel.load(sft, head=cfg.head, bidirectional=cfg.bidirectional).to(device)
    policy = GPT.load(sft).to(device)
    out = output_folder(cfg)
    train = encode_records(train, tok, model.cfg.block_size)
    val = encode_records(val, tok, model.cfg.block_size)

    # pairs of the policy's own answers; only the built-in world has a judge for them
    policy_train = []
    policy_val = []
    if cfg.data == "stories":
        folder = require("data/stories")
        tau = json.loads(read_text(folder / "facts.json"))["tau"]
        prompts = story_prompts(folder / "instructions.jsonl", tok)[: cfg.policy_pairs]
        policy_train = sample_pairs(policy, tok, prompts, cfg, tau)
        prompts = story_prompts(folder / "instructions_val.jsonl", tok)[:256]
        policy_val = sample_pairs(policy, tok, prompts, cfg, tau)
    train = train + policy_train
    optimizers = make_optimizers(model, cfg)
    print(
        f"{len(train):,} pairs, {len(policy_train):,} of them written by the policy, and "
        f"{len(val):,} held out, {device} {dtype}"
    )

    # training loop
    log = Log(out, cfg.steps)
    for step in range(cfg.steps):
        set_lr(optimizers, lr_scale(step, cfg))

        # forward and backward: the preferred answers of the pairs come first, then the others
        ids, starts, lengths = get_batch(train, step, cfg)
        with autocast():
            reward = model(ids.to(device), starts.to(device), lengths.to(device))  # (2B,)
            chosen, rejected = reward.chunk(2)  # (B,) each
            loss = preference_loss(chosen, rejected, cfg.loss, cfg.margin, cfg.center)
        loss.backward()

        # update, with the gradient's norm limited
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # once in a while: evaluate
        values = {
            "loss": loss.item(),
            "train_accuracy": (chosen > rejected).float().mean().item(),
            "lr": cfg.lr * lr_scale(step, cfg),
            "grad_norm": grad_norm.item(),
        }
        last_step = step + 1 == cfg.steps
        if (step + 1) % cfg.eval_every == 0 or last_step:
            val_result = evaluate(model, val, device)
            values["accuracy"] = val_result.accuracy
        log(step, **values)
    seconds = log.seconds

    # Bradley-Terry fixes the differences of the rewards and not their zero. PPO's settings also
    # need rewards of a known size. So shift and scale them: the answers of the policy's held-out
    # pairs get mean 0 and standard deviation 1.
    chosen, rejected = rewards(model, policy_val or val, device)
    all_rewards = torch.cat([chosen, rejected])
    model.shift.copy_(all_rewards.mean())
    model.scale.copy_(1 / all_rewards.std())

    save_checkpoint(
        out / "rm.pt",
        kind="rm",
        changed=cfg.changed,
        step=cfg.steps,
        config=asdict(cfg),
        head={"head": cfg.head, "bidirectional": cfg.bidirectional},
        tokenizer=tok.state(),
        **model.to_checkpoint(),
    )

    # how good is it? on the labels, and, where the judge is known, against the truth
    metrics = {"accuracy": val_result.accuracy}
    if cfg.data == "stories":
        metrics.update(against_truth(val_result.gap, val, tau))
        policy_result = evaluate(model, policy_val, device)
        metrics["policy_accuracy"] = policy_result.accuracy
        metrics["policy_true_order"] = against_truth(policy_result.gap, policy_val, tau)[
            "true_order"
        ]
        draw(read_log(out), metrics, out / "train_rm.png")
    save_metrics(out, **metrics, seconds=seconds, steps=cfg.steps, seed=cfg.seed)
    for name, value in metrics.items():
        print(f"{name:20} {value:.4f}")
