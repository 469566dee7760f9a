"""
Part 9: GRPO. Several answers to each prompt, and each is compared with the mean of its group. No
critic, and no reward model where the answer itself can be checked.

    python part_9/train_grpo.py                    a verifiable reward: 1 if all checks pass, else 0
    python part_9/train_grpo.py --reward=model     Part 7's reward model instead
    python part_9/train_grpo.py --data=my.jsonl --reward=my.py:score
                                                   your own prompts, and your own function
                                                   score(record, answer) -> float

From part_8/train_ppo.py
    New      aggregate, group_advantage, kl_penalty, call_user_code, load_function, load_reward,
             passed, gold_by_task
    Changed  Config, load_data, get_batch, learn, Evaluation, evaluate, draw, main body
    Removed  whiten, shape_rewards, gae, value_loss, next_kl_coef, make_optimizer, answer_logp,
             score_answers, gold_share

What changes against PPO (Shao et al. 2024, DeepSeekMath, eq. 3):

    the critic goes      the mean reward of the group takes its place (group_advantage), and all
                         tokens of an answer have the same advantage
    the KL moves         from the reward into the loss, where it has a gradient of its own
                         (kl_penalty)

The default reward is gold itself: here it is trained on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import numbers
import runpy
import time
import traceback
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from model import GPT, RewardModel
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
    data: str = "stories"  # stories (the built-in world) or a JSON or JSONL file, Alpaca's fields
    init: str = ""  # checkpoint of the SFT model; empty: part_6/out/sft.pt
    rm: str = ""  # checkpoint of the reward model, for --reward=model; empty: part_7/out/rm.pt
    # rollout and reward
    reward: str = "judge"  # judge (1 if all checks pass, else 0), model, or FILE.py:FUNCTION
    steps: int = 120  # iterations: each samples answers, scores them and updates the policy
    batch_size: int = 128  # answers per iteration
    group: int = 8  # answers per prompt
    max_new_tokens: int = 72  # longest answer, in tokens
    # loss
    kl: str = "exact"  # KL per token: exact (over the whole vocabulary), or estimated: k1, k2, k3
    kl_coef: float = 0.04  # beta, the weight of the KL in the loss
    scale_std: bool = False  # also divide advantages by the group's standard deviation

    # how token losses are averaged: tokens (over all tokens of the batch), sequence (in each
    # answer, then over the answers) or constant (the sum over batch_size * max_new_tokens)
    loss_norm: str = "tokens"

    # update
    epochs: int = 1  # passes over each rollout
    minibatches: int = 2  # updates per pass
    clip: float = 0.2  # a ratio further than this from 1, in its advantage's direction, is clipped
    lr: float = 5e-4  # peak of AdamW's learning rate; from there it falls linearly to 0
    warmup: float = 0.2  # share of the iterations in which the learning rate rises to its peak
    grad_clip: float = 1.0  # largest norm of the gradient
    # run
    eval_every: int = 0  # iterations between evaluations on held-out prompts; 0: only at the end
    prompts: int = 512  # held-out stories, and as many other tasks, that are answered and judged
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        sizes = ("steps", "batch_size", "max_new_tokens", "epochs", "minibatches", "prompts")
        for name in sizes:
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.group > 1, f"group={self.group} must be at least 2: answers are compared"
        parts = self.group * self.minibatches
        assert self.batch_size % parts == 0, (
            f"batch_size={self.batch_size} must be divisible by group * minibatches = {parts}"
        )
        assert self.kl in ("exact", "k1", "k2", "k3"), f"kl={self.kl} must be exact, k1, k2 or k3"
        assert self.loss_norm in ("tokens", "sequence", "constant"), (
            f"loss_norm={self.loss_norm} must be tokens, sequence or constant"
        )


# data ---------------------------------------------------------------------------------------------


def load_data(cfg):
    """Reads and checks the prompts -> training and held-out records."""
    fields = ["instruction", "input"]
    if cfg.data == "stories":
        folder = require("data/stories")
        train = read_jsonl(folder / "instructions.jsonl", [*fields, "task"])
        val = read_jsonl(folder / "instructions_val.jsonl", [*fields, "task"])

        # Part 7's reward model has learned from stories alone.
        if cfg.reward == "model":
            train = [record for record in train if record["task"] == "story"]
            val = [record for record in val if record["task"] == "story"]
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


def encode_records(records, tok, block_size, max_new_tokens):
    """Adds "prompt_ids" to each record -> the records that leave room for an answer. The others are
    counted and left out."""
    room = block_size - max_new_tokens
    kept = []
    for record in records:
        prompt_ids = chat_prompt(record, tok)
        if len(prompt_ids) <= room:
            kept.append({**record, "prompt_ids": prompt_ids})
    if len(kept) < len(records):
        left_out = len(records) - len(kept)
        print(f"{left_out} of {len(records)} prompts are longer than {room} tokens: left out")
    if not kept:
        fail(f"no prompt fits in {room} tokens: use a smaller --max_new_tokens")
    return kept


def pad(rows, value):
    """Lists of different lengths -> one tensor (B, T), padded on the right."""
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def get_batch(records, step, cfg):
    """The records whose prompts are answered at a step, each cfg.group times in a row. The steps go
    round and round."""
    prompts = cfg.batch_size // cfg.group
    first = step * prompts
    batch = []
    for i in range(first, first + prompts):
        batch.extend([records[i % len(records)]] * cfg.group)
    return batch


# the lesson's mathematics -------------------------------------------------------------------------
#
# In all (B, T) tensors index t is about the choice of token t + 1: its log-probability, whether it
# belongs to the answer (mask), and its advantage.


def gather_logp(all_logp, ids):
    """Log-probabilities of all tokens (..., V) -> those of the tokens ids (...)."""
    return all_logp.gather(-1, ids[..., None]).squeeze(-1)


def masked_mean(x, mask):
    """The mean of x over the entries of the mask."""
    return (x * mask).sum() / mask.sum()


def aggregate(x, mask, norm, longest):
    """Terms of the loss for each token (B, T) -> one number.

    tokens: the mean over all tokens of the batch, so all tokens count the same (Yu et al. 2025,
    DAPO). sequence: the mean of each answer, then the mean over the answers (Shao et al. 2024); a
    token of a long answer counts less. constant: the sum over B * longest, which does not depend on
    the lengths that happened to come (Liu et al. 2025, Dr. GRPO).
    """
    if norm == "tokens":
        return masked_mean(x, mask)
    totals = (x * mask).sum(dim=1)  # (B,)
    if norm == "sequence":
        return (totals / mask.sum(dim=1)).mean()
    return (totals / longest).mean()


def group_advantage(reward, group, scale_std):
    """Rewards (B,) of answers whose groups stand together -> reward minus the mean of its group
    (B,); exactly 0 where all rewards of a group are equal.

    [1, 0, 0, 1] in groups of 2 -> [.5, -.5, -.5, .5]. scale_std also divides by the standard
    deviation of the group, which gives more weight to groups whose rewards hardly differ.
    """
    reward = reward.view(-1, group)  # (prompts, group)
    advantage = reward - reward.mean(dim=1, keepdim=True)
    if scale_std:
        advantage = advantage / (reward.std(dim=1, keepdim=True) + 1e-4)
    all_equal = (reward == reward[:, :1]).all(dim=1, keepdim=True)
    return advantage.masked_fill(all_equal, 0.0).flatten()


def kl_penalty(logp, reference_logp, tokens, kind):
    """KL(pi || pi_sft) at N tokens -> (N,), from the log-probabilities (N, V) of both models and
    the tokens (N,) that were sampled.

    exact sums over the vocabulary. The estimators (Schulman 2020) use the sampled token only, with
    d = log pi - log pi_sft. As a loss, their gradient at tokens that pi itself has sampled is, on
    average, zero for k1 = d, that of the exact KL for k2 = d^2 / 2, and that of KL(pi_sft || pi)
    for k3 = e^-d - 1 + d, DeepSeekMath's. From a rollout's second update on, the tokens are those
    of an older policy, and k1 then pushes pi away from that one.
    """
    if kind == "exact":
        return (logp.exp() * (logp - reference_logp)).sum(dim=-1)
    d = gather_logp(logp, tokens) - gather_logp(reference_logp, tokens)
    if kind == "k1":
        return d
    if kind == "k2":
        return d**2 / 2
    return (-d).exp() - 1 + d


def ppo_loss(logp, old_logp, advantages, clip):
    """The clipped surrogate (Schulman et al. 2017, eq. 7) -> the loss of each token, and whether
    the clip acts on it, (B, T) each.

    At ratio 1 its gradient is that of -log pi * advantage. Later the ratio corrects for tokens that
    the old policy sampled. A token whose probability has moved by more than `clip` in the direction
    of its advantage gets no further gradient; the max keeps the gradient of one that has moved
    against it.
    """
    ratio = (logp - old_logp).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.max(unclipped, clipped), clipped > unclipped


def lr_scale(step, cfg):
    """The learning rate of an iteration (0, 1, ...) as a share of its peak: warm up, then decay
    linearly to 0.

    AdamW's first updates are as large as its later ones, although they rest on few answers. Without
    a warm-up they carry the policy away from the SFT model before it has learned anything.
    """
    rise = (step + 1) / max(1.0, cfg.warmup * cfg.steps)
    fall = 1 - step / cfg.steps
    return min(rise, fall)


# rollout, score, learn ----------------------------------------------------------------------------


@dataclass
class Rollout:
    """One sampled answer to each of B prompts."""

    ids: torch.Tensor  # (B, T + 1) prompt and answer, padded on the right
    starts: torch.Tensor  # (B,) where the answer starts
    lengths: torch.Tensor  # (B,) where it ends, its end token included
    ended: torch.Tensor  # (B,) bool, False if it was cut off before its end token
    mask: torch.Tensor  # (B, T) bool, True where the next token belongs to the answer
    logp: torch.Tensor  # (B, T) log-probability of the next token when it was sampled, else 0


@torch.no_grad()
def rollout(policy, tok, records, cfg, device):
    """The policy answers each record's prompt_ids -> Rollout.

    It samples at temperature 1 from the whole vocabulary: the log-probabilities that the loss uses
    must be those of the distribution that the tokens came from.
    """
    end = tok.end
    prompts = [record["prompt_ids"] for record in records]
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids, logp = policy.generate(
        pad(prompts, end).to(device),
        cfg.max_new_tokens,
        lengths=starts,
        stop=end,
        return_logp=True,
    )
    sampled = logp.isfinite()  # (B, T + 1): neither prompt nor padding
    lengths = starts + sampled.sum(dim=1)
    last_token = ids.gather(1, lengths[:, None] - 1).squeeze(1)
    return Rollout(
        ids=ids,
        starts=starts,
        lengths=lengths,
        ended=last_token == end,
        mask=sampled[:, 1:],
        logp=logp[:, 1:].nan_to_num(),
    )


class Answer(NamedTuple):
    ids: list  # tokens, without the end token
    text: str
    ended: bool  # False if it was cut off before its end token


def answers_of(batch, tok):
    """The answers of a rollout -> a list of Answer."""
    answers = []
    rows = zip(
        batch.ids.tolist(), batch.starts.tolist(), batch.lengths.tolist(), batch.ended.tolist()
    )
    for row, start, length, ended in rows:
        ids = row[start:length]
        if ended:
            ids = ids[:-1]
        answers.append(Answer(ids, tok.decode(ids), ended))
    return answers


def log_probs(model, ids, mask):
    """Log-probabilities (N, V) of all tokens, at the N positions of ids (B, T) where the mask is
    True. The head is the costly part, so it computes nothing else."""
    x = model.trunk(ids)  # (B, T, C)
    return model.lm_head(x[mask]).log_softmax(dim=-1)


def call_user_code(reward, function, *arguments):
    """function(*arguments). It runs the user's own code, and any error there ends in one line."""
    try:
        return function(*arguments)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = type(error).__name__
        fail(f"--reward={reward}: {kind}: {error} ({place.filename} line {place.lineno})")


def load_function(reward):
    """The function that --reward=FILE.py:FUNCTION names."""
    file, _, name = reward.rpartition(":")
    if not Path(file).is_file():
        fail(f"--reward={reward} must be judge, model, or FILE.py:FUNCTION of an existing file")
    function = call_user_code(reward, runpy.run_path, file).get(name)
    if not callable(function):
        fail(f"--reward={reward}: {file} has no function {name}")
    return function


def load_reward(cfg, tok, block_size, device):
    """The reward that cfg.reward names -> a function (records, batch, answers) -> rewards (B,)."""
    if cfg.reward == "judge":

        def judge_reward(records, batch, answers):
            return torch.tensor(passed(records, answers), device=device)

        return judge_reward

    if cfg.reward == "model":
        scorer = load_checkpoint(cfg.rm or require("part_7/out/rm.pt"), "rm")
        if scorer["tokenizer"] != tok.state():
            fail("the reward model has another tokenizer: train --rm from the checkpoint of --init")
        if scorer["gpt_config"]["block_size"] < block_size:
            fail("the reward model has a shorter context: train --rm from the checkpoint of --init")
        rm = RewardModel.load(scorer, **scorer["head"]).to(device).requires_grad_(False)

        def model_reward(records, batch, answers):
            # Clipped, and with a fixed low score for an answer without an end, as in Part 8.
            score = rm(batch.ids, batch.starts, batch.lengths).clamp(-1.5, 1.5)
            return score.masked_fill(~batch.ended, -2.0)

        return model_reward

    function = load_function(cfg.reward)

    def user_reward(records, batch, answers):
        scores = []
        for record, answer in zip(records, answers):
            score = call_user_code(cfg.reward, function, record, answer.text)
            if not isinstance(score, numbers.Real) or not math.isfinite(score):
                fail(
                    f"--reward={cfg.reward} must return a finite number, but it returned {score!r}"
                )
            scores.append(float(score))
        return torch.tensor(scores, device=device)

    return user_reward


def learn(policy, reference, optimizer, batch, advantages, cfg, generator):
    """Several epochs of minibatches over the rollout -> a dict of numbers for the log. Only the
    first update is on-policy; the ratio and its clipping are for the others."""
    losses = []
    clip_fractions = []
    entropies = []
    kls = []
    first_ratio_error = None
    for _ in range(cfg.epochs):
        order = torch.randperm(len(advantages), generator=generator)
        for rows in order.chunk(cfg.minibatches):
            ids = batch.ids[rows]
            mask = batch.mask[rows]
            old_logp = batch.logp[rows]

            # what the policy and the reference say now
            all_logp = log_probs(policy, ids[:, :-1], mask)  # (N, V)
            with torch.no_grad():
                reference_logp = log_probs(reference, ids[:, :-1], mask)  # (N, V)
            tokens = ids[:, 1:][mask]  # (N,)
            logp = old_logp.masked_scatter(mask, gather_logp(all_logp, tokens))  # (B, T)

            # Before the first update the policy is the sampler, so every ratio is 1.
            ratio = (logp - old_logp).detach().exp()
            if first_ratio_error is None:
                first_ratio_error = (ratio - 1).abs().max().item()

            policy_losses, clipped = ppo_loss(logp, old_logp, advantages[rows, None], cfg.clip)
            token_kl = kl_penalty(all_logp, reference_logp, tokens, cfg.kl)  # (N,)
            kl = torch.zeros_like(old_logp).masked_scatter(mask, token_kl)  # (B, T)
            token_losses = policy_losses + cfg.kl_coef * kl
            loss = aggregate(token_losses, mask, cfg.loss_norm, cfg.max_new_tokens)

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
            optimizer.step()

            losses.append(loss.item())
            clip_fractions.append(masked_mean(clipped.float(), mask).item())
            entropy = torch.special.entr(all_logp.detach().exp()).sum(dim=-1)  # (N,)
            entropies.append(entropy.mean().item())
            exact_kl = kl_penalty(all_logp.detach(), reference_logp, tokens, "exact")  # (N,)
            kls.append(exact_kl.sum().item() / len(rows))

    return {
        "kl": sum(kls) / len(kls),
        "loss": sum(losses) / len(losses),
        "entropy": sum(entropies) / len(entropies),
        "first_ratio_error": first_ratio_error,
        "clip_fraction": sum(clip_fractions) / len(clip_fractions),
    }


# evaluate, draw -----------------------------------------------------------------------------------


def passed(records, answers):
    """1.0 for each answer that passes all checks, else 0.0 (gold); NaN for a record without."""
    values = []
    for record, answer in zip(records, answers):
        verdict = judge(record, answer.text, answer.ended)
        values.append(math.nan if verdict is None else float(verdict.passed))
    return values


def gold_by_task(records, answers):
    """The share of answers that pass all checks -> {task: gold}."""
    values = defaultdict(list)
    for record, value in zip(records, passed(records, answers)):
        values[record.get("task", "story")].append(value)
    return {task: sum(results) / len(results) for task, results in values.items()}


class Evaluation(NamedTuple):
    gold: dict  # {task: share of answers that pass all checks}
    kl: float  # KL(pi || pi_sft) of the stories in nats per answer, exact at every token
    answers: list  # of Answer


@torch.no_grad()
def evaluate(policy, reference, tok, records, cfg, device):
    """The policy answers held-out prompts -> Evaluation."""
    answers = []
    kls = []
    for i in range(0, len(records), 128):
        batch = rollout(policy, tok, records[i : i + 128], cfg, device)
        answers += answers_of(batch, tok)

        policy_logp = log_probs(policy, batch.ids[:, :-1], batch.mask)  # (N, V)
        reference_logp = log_probs(reference, batch.ids[:, :-1], batch.mask)
        token_kl = kl_penalty(policy_logp, reference_logp, None, "exact")  # (N,)
        kl = torch.zeros_like(batch.logp).masked_scatter(batch.mask, token_kl)  # (B, T)
        kls += kl.sum(dim=1).tolist()

    story_kls = []
    for record, kl in zip(records, kls):
        if record.get("task", "story") == "story":
            story_kls.append(kl)
    mean_kl = sum(story_kls) / max(1, len(story_kls))
    return Evaluation(gold_by_task(records, answers), mean_kl, answers)


def draw(records, before, after, path):
    """The run as one figure: curves over the iterations, and gold by task before and after."""
    task = next(iter(before.gold))
    title = (
        f"GRPO: held-out gold of task {task} {before.gold[task]:.2f} -> {after.gold[task]:.2f} "
        f"at {after.kl:.1f} nats of KL"
    )
    fig, axes = figure(title, rows=2, columns=3, height=5)
    panels = {
        "reward": "mean reward",
        "kl": "nats per answer",
        "entropy": "nats per token",
        "equal_groups": "share of groups",
        "length": "tokens per answer",
    }
    steps = [record["step"] for record in records]
    for i, (ax, name) in enumerate(zip(axes.flat, panels)):
        ax.plot(steps, [record[name] for record in records], color=f"C{i}")
        ax.set(title=name.replace("_", " "), ylabel=panels[name], xlabel="iteration")

    bars = axes[1, 2]
    positions = torch.arange(len(before.gold))
    bars.barh(positions + 0.2, before.gold.values(), height=0.4, color="gray", label="SFT")
    bars.barh(positions - 0.2, after.gold.values(), height=0.4, color="C2", label="GRPO")
    bars.set(title="held-out gold", xlabel="share of answers", xlim=(0, 1))
    bars.set_yticks(positions, list(before.gold))
    bars.legend(fontsize=8)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # data first: a broken file must not wait for models to be built
    train, val = load_data(cfg)
    if cfg.reward not in ("judge", "model"):
        load_function(cfg.reward)
    if cfg.reward == "judge" and not all(record.get("check") for record in train):
        fail(
            f'--data={cfg.data}: the judge needs a "check" in every record; '
            "use --reward=FILE.py:FUNCTION or --reward=model"
        )

    # models and reward; the user's own files are opened before anything is built
    for path, kind in ((cfg.init, "sft"), (cfg.rm, "rm")):
        if path:
            load_checkpoint(path, kind)
    sft = load_checkpoint(cfg.init or require("part_6/out/sft.pt"), "sft")
    policy = GPT.load(sft).to(device)
    reference = GPT.load(sft).to(device).requires_grad_(False)
    tok = Tokenizer.load(sft["tokenizer"])
    reward_of = load_reward(cfg, tok, policy.cfg.block_size, device)
    out = output_folder(cfg)

    # prompts, in a random order
    train = encode_records(train, tok, policy.cfg.block_size, cfg.max_new_tokens)
    val = encode_records(val, tok, policy.cfg.block_size, cfg.max_new_tokens)
    stories = [record for record in val if record.get("task", "story") == "story"]
    others = [record for record in val if record.get("task", "story") != "story"]
    val = stories[: cfg.prompts] + others[: cfg.prompts]
    generator = torch.Generator().manual_seed(cfg.seed)
    train = [train[i] for i in torch.randperm(len(train), generator=generator)]
    before = evaluate(policy, reference, tok, val, cfg, device)
    print(f"{len(train):,} prompts, {len(val):,} held out")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, eps=1e-5, weight_decay=0.0)

    # training loop
    torch.manual_seed(cfg.seed)
    taught = defaultdict(list)  # {task: for each group, whether it taught anything}
    log = Log(out, cfg.steps)
    for step in range(cfg.steps):
        start = time.time()
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * lr_scale(step, cfg)

        # rollout: a group of answers to each prompt
        records = get_batch(train, step, cfg)
        batch = rollout(policy, tok, records, cfg, device)
        answers = answers_of(batch, tok)
        rollout_end = time.time()

        # score: each answer gets one reward
        reward = reward_of(records, batch, answers)  # (B,)
        score_end = time.time()

        # advantage: how much better than the other answers to the same prompt?
        advantages = group_advantage(reward, cfg.group, cfg.scale_std)  # (B,)

        # update
        stats = learn(policy, reference, optimizer, batch, advantages, cfg, generator)
        update_end = time.time()

        # report; a group whose rewards are all equal teaches nothing
        equal_groups = (advantages.view(-1, cfg.group) == 0).all(dim=1)
        for record, is_equal in zip(records[:: cfg.group], equal_groups.tolist()):
            taught[record.get("task", "story")].append(not is_equal)
        report = {
            "reward": reward.mean().item(),
            "gold": sum(passed(records, answers)) / len(records),
            "equal_groups": equal_groups.float().mean().item(),
            "length": batch.mask.sum(dim=1).float().mean().item(),
            "ended": batch.ended.float().mean().item(),
            **stats,
            "rollout_s": rollout_end - start,
            "score_s": score_end - rollout_end,
            "update_s": update_end - score_end,
            "completions_per_s": cfg.batch_size / (time.time() - start),
        }
        if cfg.eval_every > 0 and (step + 1) % cfg.eval_every == 0:
            with torch.random.fork_rng():  # an evaluation must not change what training samples
                evaluation = evaluate(policy, reference, tok, val, cfg, device)
            report["val_kl"] = evaluation.kl
            for task, gold in evaluation.gold.items():
                report[f"val_{task}"] = gold
        log(step, **report)

        # the loss must use the very probabilities that the tokens were sampled with
        error = stats["first_ratio_error"]
        assert error < 1e-4, f"sampler and scorer disagree about a probability by {error}"
    seconds = log.seconds

    # save the policy and what it reached
    after = evaluate(policy, reference, tok, val, cfg, device)
    log_records = read_log(out)
    save_checkpoint(
        out / "grpo.pt",
        kind="grpo",
        changed=cfg.changed,
        step=cfg.steps,
        config=asdict(cfg),
        tokenizer=tok.state(),
        **policy.to_checkpoint(),
    )
    save_metrics(
        out,
        sft_gold=before.gold.get("story"),
        grpo_gold=after.gold.get("story"),
        kl=after.kl,
        seconds=seconds,
        completions_per_s=cfg.steps * cfg.batch_size / seconds,
        first_ratio_error=max(record["first_ratio_error"] for record in log_records),
        steps=cfg.steps,
        seed=cfg.seed,
        **{f"sft_{task}": gold for task, gold in before.gold.items()},
        **{f"grpo_{task}": gold for task, gold in after.gold.items()},
    )
    draw(log_records, before, after, out / "train_grpo.png")

    # show what it learned: five prompts side by side, then the table
    for i in range(min(5, len(val))):
        print(f"\n{val[i]['instruction']}")
        print(f"  SFT:  {before.answers[i].text}")
        print(f"  GRPO: {after.answers[i].text}")
    print(f"\n{seconds:.0f} s, {after.kl:.2f} nats of KL per story")
    print(f"{'gold on held-out prompts':26} {'SFT':>6} {'GRPO':>6}  groups that taught anything")
    for task in before.gold:
        share = sum(taught[task]) / max(1, len(taught[task]))
        print(
            f"{task:26} {before.gold[task]:6.3f} {after.gold[task]:6.3f}  "
            f"{share:.2f} of {len(taught[task])}"
        )
    if after.gold.get("spell", 1) < 0.5:
        print("(spelling stays hard for this model: a token does not show its letters)")
