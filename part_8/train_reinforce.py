"""
Part 8: REINFORCE with a KL penalty, the smallest reinforcement learning from human feedback that
works. The policy writes answers, the reward model scores them, and what scored above average
becomes more likely.

    python part_8/train_reinforce.py                    the SFT model -> part_8/out/reinforce.pt
    python part_8/train_reinforce.py --kl_coef=0        no penalty: watch reward and gold part
    python part_8/train_reinforce.py --data=my.jsonl    your own prompts, with Alpaca's fields
                                                        instruction and input

Starts here. chat_prompt, pad and Answer are those of part_7/train_rm.py.

An answer is an episode, and each of its tokens is an action. The reward is the reward model's score
at the last token, and -beta * (log pi - log pi_sft) at every token, which keeps the policy near the
SFT model (Ziegler et al. 2019; Ouyang et al. 2022). Gold, the share of answers that pass all checks
of the world, is only looked at and never trained on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
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
    rm: str = ""  # checkpoint of the reward model; empty: part_7/out/rm.pt
    # rollout and reward
    steps: int = 80  # iterations: each samples answers, scores them and updates the policy
    batch_size: int = 128  # answers per iteration
    max_new_tokens: int = 72  # longest answer, in tokens
    missing_end: float = -2.0  # score of an answer that does not end
    score_clip: float = 1.5  # largest size of a score; the reward model's have about mean 0, SD 1
    kl_coef: float = 0.05  # beta, the reward that a nat of KL costs
    # update
    lr: float = 1e-3  # peak of AdamW's learning rate; from there it falls linearly to 0
    warmup: float = 0.2  # share of the iterations in which the learning rate rises to its peak
    grad_clip: float = 1.0  # largest norm of the gradient
    # run
    eval_every: int = 0  # iterations between evaluations on held-out prompts; 0: only at the end
    prompts: int = 512  # held-out prompts that are answered and judged in an evaluation
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        sizes = ("steps", "batch_size", "max_new_tokens", "prompts")
        for name in sizes:
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"


# data ---------------------------------------------------------------------------------------------


def load_data(cfg):
    """Reads and checks the prompts -> training and held-out records."""
    fields = ["instruction", "input"]
    if cfg.data == "stories":
        folder = require("data/stories")
        train = read_jsonl(folder / "instructions.jsonl", [*fields, "task"])
        val = read_jsonl(folder / "instructions_val.jsonl", [*fields, "task"])
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
    """The records whose prompts are answered at a step. The steps go round and round."""
    first = step * cfg.batch_size
    return [records[i % len(records)] for i in range(first, first + cfg.batch_size)]


# the lesson's mathematics -------------------------------------------------------------------------
#
# In all (B, T) tensors index t is about the choice of token t + 1: its log-probability, whether it
# belongs to the answer (mask), the reward for choosing it, and its advantage.


def gather_logp(all_logp, ids):
    """Log-probabilities of all tokens (..., V) -> those of the tokens ids (...)."""
    return all_logp.gather(-1, ids[..., None]).squeeze(-1)


def masked_mean(x, mask):
    """The mean of x over the entries of the mask."""
    return (x * mask).sum() / mask.sum()


def shape_rewards(kl, score, mask, beta):
    """-beta * KL at every token of the answer, plus the score (B,) at its last token -> (B, T)
    (Ziegler et al. 2019, eq. 2). kl (B, T) is log pi - log pi_sft of the sampled tokens."""
    rewards = -beta * kl * mask
    last = mask.cumsum(dim=1).argmax(dim=1)  # (B,), where the count of tokens becomes complete
    return rewards.scatter_add(1, last[:, None], score[:, None])


def returns_to_go(rewards, mask):
    """The sum of the rewards from each token to the end of the answer, (B, T)."""
    return rewards.flip(1).cumsum(dim=1).flip(1) * mask


def reinforce_loss(logp, advantages):
    """-log pi(token) * advantage, for each token (B, T) (Williams 1992).

    Summed over an answer, its gradient estimates that of -(expected reward) without bias, whatever
    baseline was subtracted, as long as the baseline does not depend on the sampled token or on
    later ones. It may depend on all that came before. The mean over a large batch is almost such a
    baseline.
    """
    return -logp * advantages


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


def answer_logp(model, batch):
    """The log-probabilities that a model gives to the answers' tokens, (B, T), 0 elsewhere."""
    all_logp = log_probs(model, batch.ids[:, :-1], batch.mask)  # (N, V)
    tokens = batch.ids[:, 1:][batch.mask]  # (N,)
    return torch.zeros_like(batch.logp).masked_scatter(batch.mask, gather_logp(all_logp, tokens))


@torch.no_grad()
def score_answers(rm, batch, cfg):
    """The reward model's scores (B,), clipped, because the policy would exploit its large errors.
    An answer without an end gets a fixed low score."""
    score = rm(batch.ids, batch.starts, batch.lengths)
    score = score.clamp(-cfg.score_clip, cfg.score_clip)
    return score.masked_fill(~batch.ended, cfg.missing_end)


def learn(policy, optimizer, batch, advantages, cfg):
    """One update with the whole rollout -> a dict of numbers for the log."""
    all_logp = log_probs(policy, batch.ids[:, :-1], batch.mask)  # (N, V)
    tokens = batch.ids[:, 1:][batch.mask]  # (N,)
    logp = batch.logp.masked_scatter(batch.mask, gather_logp(all_logp, tokens))  # (B, T)

    loss = masked_mean(reinforce_loss(logp, advantages), batch.mask)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
    optimizer.step()

    # A check only: logp was computed by the policy that sampled, so it must equal the rollout's.
    ratio = (logp.detach() - batch.logp).exp()
    entropy = torch.special.entr(all_logp.detach().exp()).sum(dim=-1)  # (N,)
    return {
        "loss": loss.item(),
        "entropy": entropy.mean().item(),
        "first_ratio_error": (ratio - 1).abs().max().item(),
    }


# evaluate, draw -----------------------------------------------------------------------------------


def gold_share(records, answers):
    """Gold: the share of answers that pass all checks. NaN if a record has no checks."""
    passed = []
    for record, answer in zip(records, answers):
        verdict = judge(record, answer.text, answer.ended)
        if verdict is None:
            return float("nan")
        passed.append(verdict.passed)
    return sum(passed) / len(passed)


class Evaluation(NamedTuple):
    gold: float  # share of answers that pass all checks
    reward: float  # mean score of the reward model, clipped as in training
    kl: float  # KL(pi || pi_sft) in nats per answer, exact at every token
    answers: list  # of Answer


@torch.no_grad()
def evaluate(policy, reference, rm, tok, records, cfg, device):
    """The policy answers held-out prompts -> Evaluation."""
    answers = []
    score = 0.0
    kl = 0.0
    for i in range(0, len(records), 128):
        batch = rollout(policy, tok, records[i : i + 128], cfg, device)
        answers += answers_of(batch, tok)
        score += score_answers(rm, batch, cfg).sum().item()

        # The exact KL sums over the whole vocabulary at each token of the answers.
        policy_logp = log_probs(policy, batch.ids[:, :-1], batch.mask)  # (N, V)
        reference_logp = log_probs(reference, batch.ids[:, :-1], batch.mask)
        kl += (policy_logp.exp() * (policy_logp - reference_logp)).sum().item()
    n = len(records)
    return Evaluation(gold_share(records, answers), score / n, kl / n, answers)


def draw(records, before, after, path):
    """The run as one figure: curves over the iterations, and the evaluations before and after."""
    title = (
        f"REINFORCE: gold on held-out prompts {before.gold:.2f} -> {after.gold:.2f} "
        f"at {after.kl:.1f} nats of KL"
    )
    fig, axes = figure(title, rows=2, columns=3, height=5)
    panels = {
        "gold": "share of answers",
        "reward": "SD of SFT's rewards",
        "kl": "nats per answer",
        "entropy": "nats per token",
        "length": "tokens per answer",
        "ended": "share of answers",
    }
    steps = [record["step"] for record in records]
    for i, (ax, name) in enumerate(zip(axes.flat, panels)):
        ax.plot(steps, [record[name] for record in records], color=f"C{i}")
        ax.set(title=name.replace("_", " "), ylabel=panels[name], xlabel="iteration")
    for ax, name in zip(axes[0], ("gold", "reward", "kl")):
        ax.axhline(getattr(before, name), color="gray", linestyle="--", label="SFT, held out")
        ax.plot(steps[-1], getattr(after, name), "ko", label="after training, held out")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=2)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # data first: a broken file must not wait for models to be built
    train, val = load_data(cfg)

    # models; the user's own files are opened before anything is built
    for path, kind in ((cfg.init, "sft"), (cfg.rm, "rm")):
        if path:
            load_checkpoint(path, kind)
    sft = load_checkpoint(cfg.init or require("part_6/out/sft.pt"), "sft")
    scorer = load_checkpoint(cfg.rm or require("part_7/out/rm.pt"), "rm")
    if scorer["tokenizer"] != sft["tokenizer"]:
        fail("the reward model has another tokenizer: train --rm from the checkpoint of --init")
    if scorer["gpt_config"]["block_size"] < sft["gpt_config"]["block_size"]:
        fail("the reward model has a shorter context: train --rm from the checkpoint of --init")
    policy = GPT.load(sft).to(device)
    reference = GPT.load(sft).to(device).requires_grad_(False)
    rm = RewardModel.load(scorer, **scorer["head"]).to(device).requires_grad_(False)
    tok = Tokenizer.load(sft["tokenizer"])
    out = output_folder(cfg)

    # prompts, in a random order
    train = encode_records(train, tok, policy.cfg.block_size, cfg.max_new_tokens)
    val = encode_records(val, tok, policy.cfg.block_size, cfg.max_new_tokens)[: cfg.prompts]
    generator = torch.Generator().manual_seed(cfg.seed)
    train = [train[i] for i in torch.randperm(len(train), generator=generator)]
    before = evaluate(policy, reference, rm, tok, val, cfg, device)
    print(
        f"{len(train):,} prompts, {len(val):,} held out; "
        f"SFT has gold {before.gold:.3f} and reward {before.reward:.3f}"
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, eps=1e-5, weight_decay=0.0)

    # training loop
    torch.manual_seed(cfg.seed)
    log = Log(out, cfg.steps, name="train_reinforce")
    for step in range(cfg.steps):
        start = time.time()
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * lr_scale(step, cfg)

        # rollout: one answer to each prompt
        records = get_batch(train, step, cfg)
        batch = rollout(policy, tok, records, cfg, device)
        rollout_end = time.time()

        # score: the reward model judges the whole answer, the reference model each token
        score = score_answers(rm, batch, cfg)  # (B,)
        with torch.no_grad():
            kl = batch.logp - answer_logp(reference, batch)  # (B, T)
        rewards = shape_rewards(kl, score, batch.mask, cfg.kl_coef)
        score_end = time.time()

        # advantage: how much better than the average token's return?
        returns = returns_to_go(rewards, batch.mask)
        baseline = masked_mean(returns, batch.mask)
        advantages = (returns - baseline) * batch.mask

        # update
        stats = learn(policy, optimizer, batch, advantages, cfg)
        update_end = time.time()

        # report
        report = {
            "reward": score.mean().item(),
            "gold": gold_share(records, answers_of(batch, tok)),
            "kl": kl.sum(dim=1).mean().item(),
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
                evaluation = evaluate(policy, reference, rm, tok, val, cfg, device)
            report["val_gold"] = evaluation.gold
            report["val_kl"] = evaluation.kl
        log(step, **report)

        # the loss must use the very probabilities that the tokens were sampled with
        error = stats["first_ratio_error"]
        assert error < 1e-4, f"sampler and scorer disagree about a probability by {error}"
    seconds = log.seconds

    # save the policy and what it reached
    after = evaluate(policy, reference, rm, tok, val, cfg, device)
    log_records = read_log(out, "train_reinforce")
    save_checkpoint(
        out / "reinforce.pt",
        kind="reinforce",
        changed=cfg.changed,
        step=cfg.steps,
        config=asdict(cfg),
        tokenizer=tok.state(),
        **policy.to_checkpoint(),
    )
    save_metrics(
        out,
        name="train_reinforce",
        sft_gold=before.gold,
        reinforce_gold=after.gold,
        sft_reward=before.reward,
        reinforce_reward=after.reward,
        kl=after.kl,
        seconds=seconds,
        completions_per_s=cfg.steps * cfg.batch_size / seconds,
        first_ratio_error=max(record["first_ratio_error"] for record in log_records),
        steps=cfg.steps,
        seed=cfg.seed,
    )
    draw(log_records, before, after, out / "train_reinforce.png")

    # show what it learned: five prompts side by side, then the table
    for i in range(min(5, len(val))):
        print(f"\n{val[i]['instruction']}")
        print(f"  SFT:       {before.answers[i].text}")
        print(f"  REINFORCE: {after.answers[i].text}")
    print(f"\n{len(val)} held-out prompts    gold  reward   KL (nats per answer)")
    for name, result in (("SFT", before), (f"REINFORCE, {seconds:.0f} s", after)):
        print(f"{name:22} {result.gold:6.3f}  {result.reward:6.3f}   {result.kl:6.2f}")
