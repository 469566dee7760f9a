"""
Part 8: PPO's ablations. What is each of PPO's details worth, and which bugs does only the ratio
check notice?

    python part_8/demo_details.py
    python part_8/demo_details.py --seeds=3 --steps=40 --batch_size=128 --kl_horizon=4000
                                                runs as long as those of train_ppo.py

Huang et al. (2023) went through the details of the first PPO for language models. Here some of them
are left out, one at a time, in runs of an eighth of train_ppo.py's length. All runs start from the
same SFT policy, use the same reward model and answer the same prompts.

The last two runs have a bug: the log-probability that the sampler notes is not the one that the
loss computes. Such a run still learns something, so its curves look harmless. But its very first
ratio of new to old probability is not 1, and train_ppo.py would stop with an assertion.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

import torch

from model import GPT, ActorCritic, RewardModel
from shared import (
    Log,
    fail,
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
from train_ppo import Config as PPOConfig
from train_ppo import (
    answer_logp,
    encode_records,
    evaluate,
    gae,
    get_batch,
    learn,
    load_data,
    lr_scale,
    make_optimizer,
    next_kl_coef,
    rollout,
    score_answers,
    shape_rewards,
    whiten,
)

RATIO_LIMIT = 1e-4  # train_ppo.py stops if the first ratio is farther from 1


@dataclass
class Config:
    init: str = "part_6/out/sft.pt"  # checkpoint of the SFT model that all runs start from
    rm: str = "part_7/out/rm.pt"  # checkpoint of the reward model
    steps: int = 10  # iterations of each run
    batch_size: int = 64  # answers per iteration
    kl_horizon: float = 500.0  # answers in which beta grows or shrinks by at most 20 %
    prompts: int = 256  # held-out prompts that are answered and judged after each run
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "prompts", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"


# the variants -------------------------------------------------------------------------------------


class SampledColder(ActorCritic):
    """A bug: it samples at temperature 0.7, but the loss is computed at temperature 1."""

    def generate(self, *args, **options):
        return super().generate(*args, temperature=0.7, **options)


class ScoredLate(ActorCritic):
    """A bug: it scores each token in the state after it, not in the one in which it was chosen."""

    def act(self, idx, mask):
        x = self.trunk(idx).roll(-1, dims=1)
        return self.lm_head(x[mask]), self.v_head(x).squeeze(-1)


class Variant(NamedTuple):
    options: dict  # the options of train_ppo.py that differ
    policy: type = ActorCritic
    whiten: bool = True  # False: the advantages are used as they are
    is_bug: bool = False


# max_kl would stop the two bugs at their first minibatch, because their ratios are far from 1.
VARIANTS = {
    "all details": Variant({}),
    "no KL": Variant({"kl_coef": 0.0, "kl_target": 0.0}),
    "fixed KL coefficient": Variant({"kl_target": 0.0}),
    "no whitening": Variant({}, whiten=False),
    "no value clip": Variant({"vf_clip": 1e9}),
    "one epoch": Variant({"epochs": 1}),
    "lambda 0.95": Variant({"lam": 0.95}),
    "bug: sampled at 0.7": Variant({"max_kl": 1e9}, SampledColder, is_bug=True),
    "bug: scored one late": Variant({"max_kl": 1e9}, ScoredLate, is_bug=True),
}


def train(variant, sft, reference, rm, tok, prompts, ppo_cfg, device):
    """train_ppo.py's loop, with its draws of random numbers -> the trained policy, and the largest
    distance of a first ratio from 1."""
    generator = torch.Generator().manual_seed(ppo_cfg.seed)
    prompts = [prompts[i] for i in torch.randperm(len(prompts), generator=generator)]
    policy = variant.policy.load(sft).to(device)
    optimizer = make_optimizer(policy, ppo_cfg)

    torch.manual_seed(ppo_cfg.seed)
    beta = ppo_cfg.kl_coef
    largest_error = 0.0
    for step in range(ppo_cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_scale(step, ppo_cfg)

        # rollout and score
        records = get_batch(prompts, step, ppo_cfg)
        batch = rollout(policy, tok, records, ppo_cfg, device)
        score = score_answers(rm, batch, ppo_cfg)  # (B,)
        with torch.no_grad():
            kl = batch.logp - answer_logp(reference, batch)  # (B, T)
            _, values = policy.act(batch.ids[:, :-1], batch.mask)  # (B, T)
        rewards = shape_rewards(kl, score, batch.mask, beta)

        # advantage
        advantages, returns = gae(rewards, values, batch.mask, ppo_cfg.gamma, ppo_cfg.lam)
        if variant.whiten:
            advantages = whiten(advantages, batch.mask)

        # update
        stats = learn(policy, optimizer, batch, advantages, values, returns, ppo_cfg, generator)
        largest_error = max(largest_error, stats["first_ratio_error"])
        if ppo_cfg.kl_target > 0:
            mean_kl = kl.sum(dim=1).mean().item()
            beta = next_kl_coef(
                beta, mean_kl, ppo_cfg.kl_target, ppo_cfg.batch_size, ppo_cfg.kl_horizon
            )
    return policy, largest_error


# what came out ------------------------------------------------------------------------------------


@dataclass
class Result:
    """What one variant reached; every list has one entry per seed."""

    gold: list = field(default_factory=list)  # share of held-out answers that pass all checks
    kl: list = field(default_factory=list)  # KL(pi || pi_sft) in nats per answer
    ratio: list = field(default_factory=list)  # largest distance of a first ratio from 1


def gold_interval(gold, n):
    """Gold of every seed -> (low, high). Of several seeds it is their range, of one seed two
    standard errors over its n prompts to either side."""
    error = 0.0
    if len(gold) == 1:
        error = 2 * (gold[0] * (1 - gold[0]) / n) ** 0.5
    return min(gold) - error, max(gold) + error


def changed_variants(results, n):
    """The names of the variants, bugs left out, whose interval of gold does not touch that of the
    run with all details."""
    low, high = gold_interval(results["all details"].gold, n)
    names = []
    for name, result in results.items():
        variant_low, variant_high = gold_interval(result.gold, n)
        is_apart = variant_high < low or variant_low > high
        if is_apart and not name.startswith("bug"):
            names.append(name)
    return names


def make_title(results, n):
    """Which details change gold by more than the noise, and which runs would the check stop?"""
    changed = [f"{name} {fmean(results[name].gold):.2f}" for name in changed_variants(results, n)]
    if not changed:
        changed = ["no detail changes it by more than the noise"]
    stopped = [name for name, result in results.items() if max(result.ratio) >= RATIO_LIMIT]
    if not stopped:
        stopped = ["nothing"]
    return (
        f"Gold with all details {fmean(results['all details'].gold):.2f}; {', '.join(changed)}\n"
        f"The ratio check stops: {', '.join(stopped)}"
    )


def draw(results, sft_gold, n, path):
    """A row of bars for each variant: gold, KL and the first ratio."""
    fig, axes = figure(make_title(results, n), columns=3, height=4.6)
    gold_axis, kl_axis, ratio_axis = axes

    seeds = len(results["all details"].gold)
    line_label = "range over seeds" if seeds > 1 else "two standard errors over prompts"
    for y, (name, result) in enumerate(results.items()):
        colour = "C0"
        if name == "all details":
            colour = "0.6"
        elif name.startswith("bug"):
            colour = "C3"

        gold_axis.barh(y, fmean(result.gold), color=colour)
        kl_axis.barh(y, fmean(result.kl), color=colour)
        ratio_axis.barh(y, fmean(result.ratio), color=colour)

        label = line_label if y == 0 else ""
        gold_axis.plot(gold_interval(result.gold, n), [y, y], "k", linewidth=1.5, label=label)
        kl_axis.plot([min(result.kl), max(result.kl)], [y, y], "k", linewidth=1.5)
        ratio_axis.plot([min(result.ratio), max(result.ratio)], [y, y], "k", linewidth=1.5)

    gold_axis.axvline(sft_gold, color="black", linestyle="--", label="SFT")
    ratio_axis.axvline(RATIO_LIMIT, color="black", linestyle=":", label="limit of the check")
    ratio_axis.set_xscale("log")
    gold_axis.set(xlabel="gold, share of answers")
    kl_axis.set(xlabel="KL, nats per answer")
    ratio_axis.set(xlabel="largest first |ratio - 1|")
    for ax in axes:
        ax.set_yticks(range(len(results)), [])
        ax.invert_yaxis()
    gold_axis.set_yticks(range(len(results)), results)
    fig.legend(fontsize=8, loc="outside lower center", ncols=3)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # models
    sft = load_checkpoint(require(cfg.init), "sft")
    scorer = load_checkpoint(require(cfg.rm), "rm")
    if scorer["tokenizer"] != sft["tokenizer"]:
        fail("the reward model has another tokenizer: train --rm from the checkpoint of --init")
    reference = GPT.load(sft).to(device).requires_grad_(False)
    rm = RewardModel.load(scorer, **scorer["head"]).to(device).requires_grad_(False)
    tok = Tokenizer.load(sft["tokenizer"])
    out = output_folder(cfg)

    # prompts
    defaults = PPOConfig()
    train_records, val = load_data(defaults)
    prompts = encode_records(train_records, tok, reference.cfg.block_size, defaults.max_new_tokens)
    val = encode_records(val, tok, reference.cfg.block_size, defaults.max_new_tokens)
    val = val[: cfg.prompts]
    sft_gold = evaluate(reference, reference, rm, tok, val, defaults, device).gold

    # every variant with every seed
    results = {name: Result() for name in VARIANTS}
    log = Log(out, len(VARIANTS) * cfg.seeds, name="demo_details")
    run = 0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for name, variant in VARIANTS.items():
            ppo_cfg = PPOConfig(
                steps=cfg.steps,
                batch_size=cfg.batch_size,
                kl_horizon=cfg.kl_horizon,
                critic="head",
                seed=seed,
                **variant.options,
            )
            policy, ratio = train(variant, sft, reference, rm, tok, prompts, ppo_cfg, device)

            # A bug of the training must not be one of the evaluation, too.
            trained = GPT.load(policy.to_checkpoint()).to(device)
            torch.manual_seed(seed)
            after = evaluate(trained, reference, rm, tok, val, defaults, device)
            results[name].gold.append(after.gold)
            results[name].kl.append(after.kl)
            results[name].ratio.append(ratio)
            log(
                run,
                variant=name,
                seed=seed,
                gold=after.gold,
                reward=after.reward,
                kl=after.kl,
                ratio=ratio,
            )
            run += 1

    # what came out
    print(make_title(results, len(val)))
    draw(results, sft_gold, len(val), out / "demo_details.png")
    metrics = {}
    for name, result in results.items():
        metrics[f"{name}: gold"] = result.gold
        metrics[f"{name}: kl"] = result.kl
        metrics[f"{name}: ratio"] = result.ratio
    save_metrics(
        out,
        name="demo_details",
        sft_gold=sft_gold,
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        prompts=len(val),
        seeds=cfg.seeds,
        seed=cfg.seed,
        **metrics,
    )
