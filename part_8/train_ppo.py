"""
Part 8: PPO. REINFORCE with a critic that says what to expect, and several careful updates per
rollout.

    python part_8/train_ppo.py                     from a fresh clone to an aligned model
    python part_8/train_ppo.py --critic=rm --lr_value=1e-3 --lam=0.95 --steps=28
                                                   a critic that starts as the reward model
    python part_8/train_ppo.py --kl_coef=0 --kl_target=0 --score_clip=99
                                                   no penalty: watch reward and gold part
    python part_8/train_ppo.py --data=my.jsonl     your own prompts, with Alpaca's fields
                                                   instruction and input

From part_8/train_reinforce.py
    New      whiten, gae, ppo_loss, value_loss, next_kl_coef, make_optimizer
    Changed  Config, learn, draw, main body
    Removed  returns_to_go, reinforce_loss

What PPO adds (Schulman et al. 2017; for language models Ziegler et al. 2019, Ouyang et al. 2022):

    a critic       V(s_t), what to expect from here; advantages are measured against it (gae)
    reuse          several epochs of minibatches per rollout; the ratio of new to old probability
                   corrects for the policy that moves on, and its clipping keeps it near (ppo_loss)
    a KL target    the controller moves beta up while the policy is further than a chosen distance
                   from the SFT model, and down while it is nearer (next_kl_coef)

Gold, the share of answers that pass all checks of the world, is never trained on, only looked at.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from model import GPT, ActorCritic, RewardModel
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
    steps: int = 40  # iterations: each samples answers, scores them and updates the policy
    batch_size: int = 128  # answers per iteration
    max_new_tokens: int = 72  # longest answer, in tokens
    missing_end: float = -2.0  # score of an answer that does not end
    score_clip: float = 1.5  # largest size of a score; the reward model's have about mean 0, SD 1
    kl_coef: float = 0.05  # beta, the reward that a nat of KL costs, at the first iteration
    kl_target: float = 3.0  # KL in nats per answer above which beta grows; 0: beta stays fixed
    kl_horizon: float = 4000.0  # answers in which beta grows or shrinks by at most 20 %
    # advantage

    # head (the critic is a linear layer on the policy's trunk) or rm (the critic has a trunk of its
    # own and starts as the reward model)
    critic: str = "head"

    gamma: float = 1.0  # discount of a later reward
    lam: float = 1.0  # lambda of GAE; smaller values rely more on the critic
    # update
    epochs: int = 2  # passes over each rollout
    minibatches: int = 2  # updates per pass
    clip: float = 0.2  # a ratio further than this from 1, in its advantage's direction, is clipped
    vf_clip: float = 0.2  # a value that moved further than this towards its return is clipped, too
    vf_coef: float = 0.1  # weight of the value loss

    # a rollout's updates stop once the policy is this far from the one that sampled, nats per token
    max_kl: float = 0.02

    lr: float = 7e-4  # peak of AdamW's learning rate; from there it falls linearly to 0
    lr_value: float = 2e-3  # peak of the critic's learning rate; 1e-3 suits --critic=rm
    warmup: float = 0.2  # share of the iterations in which the learning rate rises to its peak
    grad_clip: float = 1.0  # largest norm of the gradient
    # run
    eval_every: int = 0  # iterations between evaluations on held-out prompts; 0: only at the end
    prompts: int = 512  # held-out prompts that are answered and judged in an evaluation
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        sizes = ("steps", "batch_size", "max_new_tokens", "epochs", "minibatches", "prompts")
        for name in sizes:
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.critic in ("head", "rm"), f"critic={self.critic} must be head or rm"
        assert self.batch_size % self.minibatches == 0, (
            f"batch_size={self.batch_size} must be divisible by minibatches={self.minibatches}"
        )
        assert self.kl_horizon > 0.2 * self.batch_size, (
            f"kl_horizon={self.kl_horizon} must be above 0.2 * batch_size: beta would turn negative"
        )


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
# belongs to the answer (mask), the reward for choosing it, its advantage, and the value of the
# state, tokens 0 to t, in which it was chosen.


def gather_logp(all_logp, ids):
    """Log-probabilities of all tokens (..., V) -> those of the tokens ids (...)."""
    return all_logp.gather(-1, ids[..., None]).squeeze(-1)


def masked_mean(x, mask):
    """The mean of x over the entries of the mask."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """x, shifted and scaled to mean 0 and variance 1 over the entries of the mask.

    For advantages: what the critic misses on average is no signal, and the size of an update should
    not depend on the unit of the rewards.
    """
    x = x - masked_mean(x, mask)
    variance = masked_mean(x**2, mask)
    return x * torch.rsqrt(variance + 1e-8) * mask


def shape_rewards(kl, score, mask, beta):
    """-beta * KL at every token of the answer, plus the score (B,) at its last token -> (B, T)
    (Ziegler et al. 2019, eq. 2). kl (B, T) is log pi - log pi_sft of the sampled tokens."""
    rewards = -beta * kl * mask
    last = mask.cumsum(dim=1).argmax(dim=1)  # (B,), where the count of tokens becomes complete
    return rewards.scatter_add(1, last[:, None], score[:, None])


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), all (B, T)
    -> advantages, and returns = advantages + values, the targets of the critic.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lambda A_{t+1}, from the last
    token of an answer back to its first. After the last token nothing more is expected: V = 0.
    With gamma = lambda = 1 the advantage is REINFORCE's return to go, minus the value. A smaller
    lambda trusts the critic instead of the rewards that were sampled later.
    """
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[:, 0])  # (B,)
    next_value = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = advantage

        # The loop meets the padding first: both stay 0 until the answer's last token. What it
        # computes in the prompt is masked away below.
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return advantages * mask, (advantages + values) * mask


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


def value_loss(values, old_values, returns, clip):
    """Half the squared error of each value, or of the value clipped to within `clip` of the old
    one, whichever is larger, (B, T)."""
    clipped_values = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.max((values - returns) ** 2, (clipped_values - returns) ** 2)
    return 0.5 * error


def next_kl_coef(coef, kl, target, n, horizon):
    """The adaptive controller (Ziegler et al. 2019, section 2.2) -> the next beta. It grows while
    the mean KL of n answers is above its target and shrinks while it is below, by at most 20 % in
    `horizon` answers."""
    error = kl / target - 1
    error = min(max(error, -0.2), 0.2)
    return coef * (1 + error * n / horizon)


def lr_scale(step, cfg):
    """The learning rate of an iteration (0, 1, ...) as a share of its peak: warm up, then decay
    linearly to 0.

    AdamW's first updates are as large as its later ones, although they rest on few answers. Without
    a warm-up they carry the policy away from the SFT model before it has learned anything.
    """
    rise = (step + 1) / max(1.0, cfg.warmup * cfg.steps)
    fall = 1 - step / cfg.steps
    return min(rise, fall)


# optimizer ----------------------------------------------------------------------------------------


def make_optimizer(policy, cfg):
    """AdamW, with a learning rate of its own for the critic."""
    policy_params = []
    value_params = []
    for name, p in policy.named_parameters():
        if name.startswith(("v_head.", "critic.")):
            value_params.append(p)
        else:
            policy_params.append(p)
    groups = [  # the training loop sets "lr" from "peak_lr"
        {"params": policy_params, "peak_lr": cfg.lr},
        {"params": value_params, "peak_lr": cfg.lr_value},
    ]
    return torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)


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


def learn(policy, optimizer, batch, advantages, values, returns, cfg, generator):
    """Several epochs of minibatches over the rollout -> a dict of numbers for the log.

    It stops early once the policy is cfg.max_kl nats per token from the one that sampled.
    """
    losses = []
    clip_fractions = []
    entropies = []
    first_ratio_error = None
    for _ in range(cfg.epochs):
        order = torch.randperm(len(advantages), generator=generator)
        for rows in order.chunk(cfg.minibatches):
            ids = batch.ids[rows]
            mask = batch.mask[rows]
            old_logp = batch.logp[rows]

            # what the policy and the critic say now
            logits, new_values = policy.act(ids[:, :-1], mask)
            all_logp = logits.log_softmax(dim=-1)  # (N, V)
            tokens = ids[:, 1:][mask]  # (N,)
            logp = old_logp.masked_scatter(mask, gather_logp(all_logp, tokens))  # (B, T)

            # Before the first update the policy is the sampler, so every ratio is 1.
            log_ratio = (logp - old_logp).detach()
            ratio = log_ratio.exp()
            if first_ratio_error is None:
                first_ratio_error = (ratio - 1).abs().max().item()

            # How far has the policy moved from the one that sampled? Each term of this estimate of
            # the KL is at least 0 (k3, Schulman 2020). This minibatch's own update comes later.
            step_kl = masked_mean(ratio - 1 - log_ratio, mask).item()
            if losses and step_kl > cfg.max_kl:
                break

            policy_losses, clipped = ppo_loss(logp, old_logp, advantages[rows], cfg.clip)
            value_losses = value_loss(new_values, values[rows], returns[rows], cfg.vf_clip)
            policy_part = masked_mean(policy_losses, mask)
            loss = policy_part + cfg.vf_coef * masked_mean(value_losses, mask)

            optimizer.zero_grad(set_to_none=True)
            loss.backward()

            # The critic has a limit of its own, so that its large errors do not shrink the policy's
            # step.
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], cfg.grad_clip)
            optimizer.step()

            losses.append(policy_part.item())
            clip_fractions.append(masked_mean(clipped.float(), mask).item())
            entropy = torch.special.entr(all_logp.detach().exp()).sum(dim=-1)  # (N,)
            entropies.append(entropy.mean().item())
        if step_kl > cfg.max_kl:
            break

    return {
        "loss": sum(losses) / len(losses),
        "entropy": sum(entropies) / len(entropies),
        "first_ratio_error": first_ratio_error,
        "clip_fraction": sum(clip_fractions) / len(clip_fractions),
        "updates": len(losses),
        "step_kl": step_kl,
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
        f"PPO: gold on held-out prompts {before.gold:.2f} -> {after.gold:.2f} "
        f"at {after.kl:.1f} nats of KL"
    )
    fig, axes = figure(title, rows=2, columns=3, height=5)
    panels = {
        "gold": "share of answers",
        "reward": "SD of SFT's rewards",
        "kl": "nats per answer",
        "entropy": "nats per token",
        "explained_variance": "share of variance",
        "length": "tokens per answer",
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
    reference = GPT.load(sft).to(device).requires_grad_(False)
    rm = RewardModel.load(scorer, **scorer["head"]).to(device).requires_grad_(False)
    if cfg.critic == "rm" and scorer["head"]["bidirectional"]:
        fail("--critic=rm needs a reward model that reads from left to right, not an encoder")
    tok = Tokenizer.load(sft["tokenizer"])
    out = output_folder(cfg)

    # prompts, in a random order
    train = encode_records(train, tok, reference.cfg.block_size, cfg.max_new_tokens)
    val = encode_records(val, tok, reference.cfg.block_size, cfg.max_new_tokens)[: cfg.prompts]
    generator = torch.Generator().manual_seed(cfg.seed)
    train = [train[i] for i in torch.randperm(len(train), generator=generator)]
    before = evaluate(reference, reference, rm, tok, val, cfg, device)
    print(
        f"{len(train):,} prompts, {len(val):,} held out; "
        f"SFT has gold {before.gold:.3f} and reward {before.reward:.3f}"
    )

    # policy and critic: a value head on the policy's trunk, or a copy of the reward model
    critic = None
    answer_length = 1.0
    if cfg.critic == "rm":
        critic = RewardModel.load(scorer, **scorer["head"])
        answer_length = sum(len(answer.ids) + 1 for answer in before.answers) / len(val)
    policy = ActorCritic.load(sft, critic=critic, answer_length=answer_length).to(device)
    optimizer = make_optimizer(policy, cfg)

    # training loop
    torch.manual_seed(cfg.seed)
    log = Log(out, cfg.steps)
    beta = cfg.kl_coef
    for step in range(cfg.steps):
        start = time.time()
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_scale(step, cfg)

        # rollout: one answer to each prompt
        records = get_batch(train, step, cfg)
        batch = rollout(policy, tok, records, cfg, device)
        rollout_end = time.time()

        # score: the reward model judges the whole answer, the reference model each token
        score = score_answers(rm, batch, cfg)  # (B,)
        with torch.no_grad():
            kl = batch.logp - answer_logp(reference, batch)  # (B, T)
        rewards = shape_rewards(kl, score, batch.mask, beta)
        score_end = time.time()

        # advantage: how much better than the critic expected?
        with torch.no_grad():
            _, values = policy.act(batch.ids[:, :-1], batch.mask)  # (B, T)
        advantages, returns = gae(rewards, values, batch.mask, cfg.gamma, cfg.lam)
        advantages = whiten(advantages, batch.mask)

        # update
        stats = learn(policy, optimizer, batch, advantages, values, returns, cfg, generator)
        update_end = time.time()

        # report; how much of the variance of the returns that really came did the critic explain?
        # Below lambda 1, `returns` would not do: they contain the critic's own later values.
        observed, _ = gae(rewards, torch.zeros_like(values), batch.mask, cfg.gamma, lam=1.0)
        answer_returns = observed[batch.mask]
        residuals = answer_returns - values[batch.mask]
        report = {
            "reward": score.mean().item(),
            "gold": gold_share(records, answers_of(batch, tok)),
            "kl": kl.sum(dim=1).mean().item(),
            "beta": beta,
            "length": batch.mask.sum(dim=1).float().mean().item(),
            "ended": batch.ended.float().mean().item(),
            "explained_variance": 1 - (residuals.var() / answer_returns.var()).item(),
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

        # the controller steers the next iteration's penalty
        if cfg.kl_target > 0:
            beta = next_kl_coef(beta, report["kl"], cfg.kl_target, cfg.batch_size, cfg.kl_horizon)
    seconds = log.seconds

    # save the policy and what it reached
    after = evaluate(policy, reference, rm, tok, val, cfg, device)
    log_records = read_log(out)
    save_checkpoint(
        out / "ppo.pt",
        kind="ppo",
        changed=cfg.changed,
        step=cfg.steps,
        config=asdict(cfg),
        tokenizer=tok.state(),
        **policy.to_checkpoint(),
    )
    save_metrics(
        out,
        sft_gold=before.gold,
        ppo_gold=after.gold,
        sft_reward=before.reward,
        ppo_reward=after.reward,
        kl=after.kl,
        seconds=seconds,
        completions_per_s=cfg.steps * cfg.batch_size / seconds,
        first_ratio_error=max(record["first_ratio_error"] for record in log_records),
        steps=cfg.steps,
        seed=cfg.seed,
    )
    draw(log_records, before, after, out / "train_ppo.png")

    # show what it learned: five prompts side by side, then the table
    for i in range(min(5, len(val))):
        print(f"\n{val[i]['instruction']}")
        print(f"  SFT: {before.answers[i].text}")
        print(f"  PPO: {after.answers[i].text}")
    print(f"\n{len(val)} held-out prompts    gold  reward   KL (nats per answer)")
    for name, result in (("SFT", before), (f"PPO, {seconds:.0f} s", after)):
        print(f"{name:22} {result.gold:6.3f}  {result.reward:6.3f}   {result.kl:6.2f}")
