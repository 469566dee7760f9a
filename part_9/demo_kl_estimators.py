"""
Part 9: the KL estimators k1, k2 and k3. What are they worth as numbers, as losses, and as leashes
that keep the policy near the SFT model?

    python part_9/demo_kl_estimators.py              one seed
    python part_9/demo_kl_estimators.py --seeds=3    three seeds: how much is chance?

As a number, k1 is right on average and k2 is not (Schulman 2020). As a loss it is the other way
round. The gradient of k1 is zero on average, so it holds nothing. That of k2 is the gradient of the
KL itself. That of k3 (Shao et al. 2024, eq. 4) is the gradient of KL(pi_sft || pi).

If a rollout serves for more than one update, k1 even does harm: its gradient is then on average
that of -KL(pi_old || pi), which pushes the policy away from the one that sampled.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

import train_grpo
from model import GPT
from shared import (
    Log,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    require,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import Tokenizer

ESTIMATORS = ["k1", "k2", "k3"]
KINDS = [*ESTIMATORS, "exact"]
PENALTIES = ["none", *KINDS]
COLOUR = {"none": "0.7", "k1": "C3", "k2": "C0", "k3": "C1", "exact": "C2"}


@dataclass
class Config:
    init: str = ""  # checkpoint of the SFT model; empty: part_6/out/sft.pt
    kl_coef: float = 0.2  # beta, the weight of every penalty
    lr: float = 1.5e-3  # learning rate of AdamW at the first iteration; it falls linearly to 0
    steps: int = 20  # GRPO iterations of each run
    batch_size: int = 64  # answers per iteration, divisible by 8
    epochs: int = 2  # updates per rollout in the second comparison; in the first it is 1
    prompts: int = 256  # held-out stories, divisible by 32, for the gradients and for each run's KL
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "prompts", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.epochs > 1, f"epochs={self.epochs} must be at least 2"
        assert self.batch_size % 8 == 0, f"batch_size={self.batch_size} must be divisible by 8"
        assert self.prompts % 32 == 0, f"prompts={self.prompts} must be divisible by 32"


# as numbers and as losses -------------------------------------------------------------------------


def over_vocabulary(logp, reference_logp, kind):
    """The estimator's value for every token that might have been sampled -> (N, V), from the
    log-probabilities (N, V) of both models."""
    # kl_penalty reads one token per row. Here each entry becomes a row with a vocabulary of one
    # token, so all of them are read.
    tokens = torch.zeros_like(logp, dtype=torch.long)
    return train_grpo.kl_penalty(logp[..., None], reference_logp[..., None], tokens, kind)


def moments(logp, reference_logp, kind):
    """The mean of one token's estimate and its standard deviation. Both sum over the vocabulary, so
    nothing is sampled."""
    # fp64, because the square of k3 is huge where pi is tiny
    logp = logp.double()
    reference_logp = reference_logp.double()
    values = over_vocabulary(logp, reference_logp, kind)  # (N, V)
    mean = (logp.exp() * values).sum(dim=-1, keepdim=True)  # (N, 1)
    variance = (logp.exp() * (values - mean) ** 2).sum(dim=-1)  # (N,)
    return mean.mean().item(), variance.mean().sqrt().item()


def gradients(policy, reference, batch):
    """The gradients of the penalties, summed over the tokens of a rollout -> {name: (P,)}.

    "k1" is the gradient on the tokens that were sampled. "average k1" is its mean over all tokens
    that might have been sampled at the same places. "exact" needs no sample.
    """
    ids = batch.ids
    params = list(policy.parameters())
    logp = train_grpo.log_probs(policy, ids[:, :-1], batch.mask)  # (N, V)
    with torch.no_grad():
        reference_logp = train_grpo.log_probs(reference, ids[:, :-1], batch.mask)  # (N, V)
    tokens = ids[:, 1:][batch.mask]  # (N,)

    losses = {}
    for kind in KINDS:
        losses[kind] = train_grpo.kl_penalty(logp, reference_logp, tokens, kind)

    # A loss on stored samples does not differentiate the sampling, so pi is detached here.
    p = logp.exp().detach()
    for kind in ESTIMATORS:
        losses[f"average {kind}"] = p * over_vocabulary(logp, reference_logp, kind)

    flat = {}
    for name, loss in losses.items():
        parts = torch.autograd.grad(loss.sum(), params, retain_graph=True)
        flat[name] = torch.cat([part.flatten() for part in parts])
    return flat


class Microscope(NamedTuple):
    moments: dict  # {kind: (mean, standard deviation) of one token's estimate}
    answers: list  # numbers of answers: 32, 64, ...
    cosine: dict  # {name: [cosine with the exact gradient on all answers, by number of answers]}
    norm: dict  # {name: [norm over that of the exact gradient on all answers]}


def microscope(policy, reference, tok, records, run, device):
    """Compares the estimators on what the policy answers to the records -> Microscope."""
    batches = []
    for i in range(0, len(records), 32):
        batches.append(train_grpo.rollout(policy, tok, records[i : i + 32], run, device))

    # as numbers
    logp = []
    reference_logp = []
    with torch.no_grad():
        for batch in batches:
            logp.append(train_grpo.log_probs(policy, batch.ids[:, :-1], batch.mask))
            reference_logp.append(train_grpo.log_probs(reference, batch.ids[:, :-1], batch.mask))
    logp = torch.cat(logp)  # (N, V)
    reference_logp = torch.cat(reference_logp)  # (N, V)
    values = {kind: moments(logp, reference_logp, kind) for kind in ESTIMATORS}
    exact = train_grpo.kl_penalty(logp, reference_logp, None, "exact").mean().item()
    values["exact"] = (exact, 0.0)

    # as losses: the mean gradient of a token, on more and more answers
    totals = {}
    n_tokens = 0
    means = {}  # {number of answers: {name: (P,)}}
    for i, batch in enumerate(batches, start=1):
        n_tokens += batch.mask.sum().item()
        for name, gradient in gradients(policy, reference, batch).items():
            totals[name] = totals.get(name, 0) + gradient
        is_power_of_2 = i & (i - 1) == 0
        if is_power_of_2 or i == len(batches):
            means[32 * i] = {name: total / n_tokens for name, total in totals.items()}

    # against the exact gradient on all answers
    target = means[len(records)]["exact"]
    cosine = {name: [] for name in totals}
    norm = {name: [] for name in totals}
    for mean in means.values():
        for name, gradient in mean.items():
            cosine[name].append(F.cosine_similarity(gradient, target, dim=0).item())
            norm[name].append((gradient.norm() / target.norm()).item())
    return Microscope(values, list(means), cosine, norm)


# as leashes ---------------------------------------------------------------------------------------


def train(sft, tok, records, run, device, log, first_step):
    """The training loop of train_grpo.py from the SFT model -> the policy."""
    policy = GPT.load(sft).to(device)
    reference = GPT.load(sft).to(device).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.lr, eps=1e-5, weight_decay=0.0)

    # Runs with equal seeds get equal prompts, and equal random numbers to sample answers with.
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    records = [records[i] for i in torch.randperm(len(records), generator=generator)]
    for step in range(run.steps):
        optimizer.param_groups[0]["lr"] = run.lr * train_grpo.lr_scale(step, run)
        asked = train_grpo.get_batch(records, step, run)
        batch = train_grpo.rollout(policy, tok, asked, run, device)
        passed = train_grpo.passed(asked, train_grpo.answers_of(batch, tok))
        reward = torch.tensor(passed, device=device)
        advantages = train_grpo.group_advantage(reward, run.group, run.scale_std)
        train_grpo.learn(policy, reference, optimizer, batch, advantages, run, generator)

        penalty = run.kl if run.kl_coef > 0 else "none"
        log(first_step + step, penalty=penalty, updates=run.epochs, reward=reward.mean().item())
    return policy


def run_config(penalty, updates, seed, cfg):
    """The options of train_grpo.py for one run."""
    kind = penalty
    kl_coef = cfg.kl_coef
    if penalty == "none":
        kind = "exact"
        kl_coef = 0.0
    return train_grpo.Config(
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        minibatches=1,
        epochs=updates,
        lr=cfg.lr,
        loss_norm="tokens",
        kl=kind,
        kl_coef=kl_coef,
        seed=seed,
    )


# the figure ---------------------------------------------------------------------------------------


def draw(title, scope, kls, path):
    """kls: {(penalty, updates per rollout): [KL of each seed]}."""
    fig, axes = figure(title, rows=2, columns=2, height=7.5)

    # as a number, and as a loss
    left, right = axes[0]
    exact = scope.moments["exact"][0]
    for kind in KINDS:
        mean, deviation = scope.moments[kind]
        left.bar(f"{kind}\nsd {deviation / exact:.0f} KL", mean / exact, color=COLOUR[kind])
        right.plot(scope.answers, scope.cosine[kind], "o-", color=COLOUR[kind], label=kind)
    left.set(title="as a number: mean of one token", xlabel="estimator and its deviation")
    left.set(ylabel="estimate / exact KL")
    right.set(title="as a loss: direction of the gradient", xlabel="answers")
    right.set(ylabel="cosine with the exact gradient", xticks=scope.answers, ylim=(-1, 1))
    right.legend(loc="lower right", fontsize=8)

    # as a leash, with a dot per seed
    for (penalty, updates), values in kls.items():
        ax = axes[1, 0] if updates == 1 else axes[1, 1]
        ax.bar(penalty, sum(values) / len(values), color=COLOUR[penalty])
        ax.plot([penalty] * len(values), values, "k.")
        ax.set(title=f"as a leash: updates per rollout {updates}", xlabel="penalty")
        ax.set(ylabel="KL, nats per answer")
    axes[1, 1].set_yscale("log")  # k1 may be a hundred times the others
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # the SFT model, and prompts that ask for stories
    sft = load_checkpoint(cfg.init or require("part_6/out/sft.pt"), "sft")
    tok = Tokenizer.load(sft["tokenizer"])
    reference = GPT.load(sft).to(device).requires_grad_(False)
    out = output_folder(cfg)
    defaults = train_grpo.Config()
    stories = []
    for records in train_grpo.load_data(defaults):
        records = [record for record in records if record["task"] == "story"]
        stories.append(
            train_grpo.encode_records(
                records, tok, reference.cfg.block_size, defaults.max_new_tokens
            )
        )
    train_stories, val_stories = stories
    val_stories = val_stories[: cfg.prompts]

    # every penalty with one update per rollout, and three of them with more
    plan = [(penalty, 1) for penalty in PENALTIES]
    plan += [(penalty, cfg.epochs) for penalty in ("none", "k1", "exact")]
    kls = {key: [] for key in plan}
    scope = None
    log = Log(out, len(plan) * cfg.seeds * cfg.steps, name="demo_kl_estimators")
    first_step = 0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for penalty, updates in plan:
            run = run_config(penalty, updates, seed, cfg)
            policy = train(sft, tok, train_stories, run, device, log, first_step)
            first_step += cfg.steps
            result = train_grpo.evaluate(policy, reference, tok, val_stories, run, device)
            kls[penalty, updates].append(result.kl)
            print(
                f"seed {seed}, penalty {penalty}, {updates} updates per rollout: "
                f"{result.kl:.2f} nats, gold {result.gold['story']:.3f}",
                flush=True,
            )
            # The first policy, which had no penalty, goes under the microscope.
            if scope is None:
                scope = microscope(policy, reference, tok, val_stories, run, device)

    # numbers and losses
    for name in scope.cosine:
        print(
            f"{name:10}: on {scope.answers[-1]} answers the cosine with the exact gradient is "
            f"{scope.cosine[name][-1]:.3f} and the norm is {scope.norm[name][-1]:.3f} of its norm"
        )
    for kind, (mean, deviation) in scope.moments.items():
        print(f"{kind:10}: one token's estimate has mean {mean:.4f} and deviation {deviation:.4f}")

    # leashes: the KL as a share of that without a penalty
    shares = {}
    for (penalty, updates), values in kls.items():
        shares[f"{penalty}_{updates}"] = sum(values) / sum(kls["none", updates])
    texts = []
    for kind in KINDS:
        text = f"{kind} {shares[f'{kind}_1']:.2f}"
        # Do the ranges over the seeds, with this penalty and without one, overlap?
        largest_minimum = max(min(kls[kind, 1]), min(kls["none", 1]))
        smallest_maximum = min(max(kls[kind, 1]), max(kls["none", 1]))
        if largest_minimum <= smallest_maximum:
            text += " (no difference)"
        texts.append(text)
    title = (
        f"KL as a share of that without a penalty\n{', '.join(texts)}\n"
        f"with {cfg.epochs} updates per rollout: k1 {shares[f'k1_{cfg.epochs}']:.3g}, "
        f"exact {shares[f'exact_{cfg.epochs}']:.3g}"
    )
    print(title)
    save_metrics(
        out,
        name="demo_kl_estimators",
        share_of_none=shares,
        **{f"kl_{penalty}_{updates}": values for (penalty, updates), values in kls.items()},
        token_mean_and_deviation=scope.moments,
        answers=scope.answers,
        cosine=scope.cosine,
        norm=scope.norm,
        seconds=log.seconds,
        seeds=cfg.seeds,
    )
    draw(title, scope, kls, out / "demo_kl_estimators.png")
