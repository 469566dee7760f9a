"""
Part 8: over-optimization. The harder we select by a reward model's score, the less the score means.

    python part_8/demo_overoptimization.py --seeds=3
    python part_8/demo_overoptimization.py --pairs=64,256,1024,12000,0 --prompts=64
                                                smoother, takes some minutes

A small version of Gao, Schulman and Hilton (2022) for best-of-n; demo_kl_penalty.py is about PPO.
Take the best of n answers by a reward model: that is optimization without any training, and its
distance from the policy is known, log n - (n - 1) / n nats. With d = sqrt(KL) the paper fits the
gold that it gains by d (a - b d), which is highest at d = a / 2b.

All n share one set of N samples. The gold of the best of n is averaged over all subsets of n of
them, so that the curve is unbiased and smooth (Nakano et al. 2021). The reward models train for
seconds, from the trunk of the SFT policy. They have a linear head, because an implicit reward is
hard to exploit: it starts from what the SFT model knows. Part 7's is there for comparison.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

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
    require,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import Tokenizer
from train_ppo import Config as PPOConfig
from train_ppo import answers_of, chat_prompt, encode_records, load_data, pad, rollout

RM_BATCH = 16  # pairs per step of a reward model


@dataclass
class Config:
    # checkpoint of the policy that answers; the reward models start from its trunk
    init: str = "part_6/out/sft.pt"

    # pairs that each reward model learns from; 0: the reward model of Part 7, which learned from
    # all pairs and from answers of the policy
    pairs: str = "64,256,1024,0"

    rm_steps: int = 60  # fewest optimizer steps of a reward model; with more pairs it is one pass
    prompts: int = 24  # held-out prompts
    samples: int = 256  # N, answers to each prompt, and the largest n
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("rm_steps", "prompts", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        for word in self.pairs.split(","):
            is_number = word.strip().isdigit()
            assert is_number, f"pairs={self.pairs} must be whole numbers with commas between them"
        assert self.samples >= 4, f"samples={self.samples} must be at least 4, for a curve to fit"


# best of n ----------------------------------------------------------------------------------------


def best_of_n_kl(n):
    """KL(best of n || policy) in nats, if no two answers have the same score."""
    return math.log(n) - (n - 1) / n


def best_of(n, score, gold):
    """score (P, N), gold (P, N) -> (P,): gold of the best of n by score, averaged over all subsets
    of n of the N answers.

    Of the C(N, n) subsets, the answer of rank i (0 is the worst) is the best in C(i, n - 1): those
    whose other n - 1 members all rank below it.
    """
    N = score.size(1)
    subsets = math.comb(N, n)
    weights = torch.tensor([math.comb(i, n - 1) / subsets for i in range(N)])  # (N,)
    gold_by_rank = gold.gather(1, score.argsort(dim=1))
    return gold_by_rank @ weights


class Fit(NamedTuple):
    a: float
    b: float
    r2: float  # share of the gain's variance that the curve explains


def fit(d, gain):
    """Least squares of gain = d (a - b d) -> Fit."""
    basis = torch.stack([d, -(d**2)], dim=1)  # (n, 2)
    solution = torch.linalg.lstsq(basis, gain[:, None]).solution[:, 0]
    residuals = basis @ solution - gain
    r2 = 1 - residuals.var(correction=0) / gain.var(correction=0)
    a, b = solution.tolist()
    return Fit(a, b, r2.item())


# reward models and answers ------------------------------------------------------------------------


def pair_batch(records, tok, block_size, device):
    """ids (2B, T), starts (2B,) and lengths (2B,): first all chosen, then all rejected answers."""
    rows = []
    starts = []
    for side in ("chosen", "rejected"):
        for record in records:
            prompt = chat_prompt({"prompt": record["prompt"]}, tok)
            answer = [*tok.encode(record[side]), tok.end]
            rows.append((prompt + answer)[:block_size])  # pairs of the stories always fit
            starts.append(len(prompt))
    lengths = [len(row) for row in rows]
    return (
        pad(rows, 0).to(device),
        torch.tensor(starts, device=device),
        torch.tensor(lengths, device=device),
    )


def train_reward_model(sft, tok, records, rm_steps, device):
    """A reward model that learns from these pairs by -log sigmoid(r_chosen - r_rejected)
    (Bradley-Terry). It makes one pass, or rm_steps if that is more."""
    # Linear: an implicit reward starts from what the SFT model knows, and is hard to exploit.
    model = RewardModel.load(sft, head="mean").to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    steps = max(rm_steps, len(records) // RM_BATCH)

    # as many random passes as the steps need
    order = []
    while len(order) < RM_BATCH * steps:
        order += torch.randperm(len(records)).tolist()

    for step in range(steps):
        warmup = (step + 1) / 5
        decay = 1 - step / steps
        optimizer.param_groups[0]["lr"] = 1e-3 * min(warmup, decay)

        chunk = order[RM_BATCH * step : RM_BATCH * (step + 1)]
        batch = pair_batch([records[i] for i in chunk], tok, model.cfg.block_size, device)
        chosen, rejected = model(*batch).chunk(2)
        optimizer.zero_grad(set_to_none=True)
        F.softplus(rejected - chosen).mean().backward()
        optimizer.step()
    return model


def sample_answers(policy, tok, record, n, device):
    """n answers to one prompt -> Rollout, and their gold (n,), 1 if an answer passes all checks."""
    batch = rollout(policy, tok, [record] * n, PPOConfig(), device)
    gold = []
    for answer in answers_of(batch, tok):
        gold.append(float(judge(record, answer.text, answer.ended).passed))
    return batch, torch.tensor(gold)


@torch.no_grad()
def score_pool(rm, pool, missing_end=-2.0):
    """The scores (P, N) of P rollouts of N answers, in standard deviations of all of them. An
    answer without an end gets missing_end, as in train_ppo.py."""
    raw = torch.stack([rm(batch.ids, batch.starts, batch.lengths) for batch in pool])
    ended = torch.stack([batch.ended for batch in pool])
    score = (raw - raw.mean()) / raw.std()
    return score.masked_fill(~ended, missing_end).cpu()


# what came out ------------------------------------------------------------------------------------


@dataclass
class Summary:
    """Best-of-n by one reward model; a tensor (ns,) has one entry for each n."""

    d: torch.Tensor  # (ns,) square root of the KL
    score: torch.Tensor  # (ns,) mean score of the best of n
    gold: torch.Tensor  # (ns,) its mean gold
    curve: torch.Tensor  # (ns,) the curve d (a - b d) that was fitted to gold
    a: float
    b: float
    r2: float
    best_n: int  # the n at which gold is highest
    lost: float  # gold that is lost from there to the largest n
    noise: float  # two standard errors of `lost`


def summarize(score, gold, ns):
    """score and gold (rows, ns) of the best of n, one row for each prompt and seed -> Summary."""
    d = torch.tensor([best_of_n_kl(n) ** 0.5 for n in ns])
    mean_gold = gold.mean(dim=0)
    curve = fit(d, mean_gold - mean_gold[0])

    best = mean_gold.argmax().item()
    lost = gold[:, best] - gold[:, -1]  # (rows,)
    standard_error = (lost.var() / len(lost)).sqrt()
    return Summary(
        d=d,
        score=score.mean(dim=0),
        gold=mean_gold,
        curve=mean_gold[0] + d * (curve.a - curve.b * d),
        a=curve.a,
        b=curve.b,
        r2=curve.r2,
        best_n=ns[best],
        lost=lost.mean().item(),
        noise=2 * standard_error.item(),
    )


def make_title(summaries):
    """For each reward model: where is gold highest, and is the loss after that more than noise?"""
    parts = []
    for name, summary in summaries.items():
        part = f"{name}: n = {summary.best_n}"
        if summary.lost > 0:
            part += f", then -{summary.lost:.3f}"
            if summary.lost <= summary.noise:
                part += " (noise)"
        parts.append(part)

    # two reward models on each line
    lines = ["; ".join(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return "Gold is highest at\n" + ";\n".join(lines)


def draw(summaries, path):
    """Left the score of the reward models, right the truth, both over d."""
    title = make_title(summaries)
    fig, (left, right) = figure(title, "d = square root of KL, nats", columns=2, height=5)
    for i, (name, summary) in enumerate(summaries.items()):
        left.plot(summary.d, summary.score, f"C{i}.-", label=name)
        label = f"{name}, R2 {summary.r2:.2f}"
        right.plot(summary.d, summary.gold, f"C{i}o", markersize=4, label=label)
        right.plot(summary.d, summary.curve, f"C{i}", linewidth=1)
    left.set(ylabel="score, standard deviations of all answers")
    right.set(ylabel="gold, share; lines: d (a - b d)")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    sizes = [int(word) for word in cfg.pairs.split(",")]

    # models
    sft = load_checkpoint(require(cfg.init), "sft")
    policy = GPT.load(sft).to(device)
    tok = Tokenizer.load(sft["tokenizer"])
    part_7_rm = None
    if 0 in sizes:
        checkpoint = load_checkpoint(require("part_7/out/rm.pt"), "rm")
        if checkpoint["tokenizer"] != sft["tokenizer"]:
            fail("part_7/out/rm.pt has another tokenizer than --init: leave 0 out of --pairs")
        part_7_rm = RewardModel.load(checkpoint, **checkpoint["head"]).to(device)
    out = output_folder(cfg)

    # prompts and preferences
    ppo_cfg = PPOConfig()
    _, val = load_data(ppo_cfg)
    val = encode_records(val, tok, policy.cfg.block_size, ppo_cfg.max_new_tokens)[: cfg.prompts]
    path = require("data/stories") / "preferences.jsonl"
    records = read_jsonl(path, ["prompt", "chosen", "rejected"])
    ns = [2**i for i in range(cfg.samples.bit_length())]  # 1, 2, 4, ..., at most N

    scores = {size: [] for size in sizes}
    golds = {size: [] for size in sizes}
    log = Log(out, cfg.seeds * (len(val) + len(sizes)), name="demo_overoptimization")
    step = 0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        torch.manual_seed(seed)

        # one pool of answers for all reward models
        pool = []
        gold_rows = []
        for record in val:
            batch, gold = sample_answers(policy, tok, record, cfg.samples, device)
            pool.append(batch)
            gold_rows.append(gold)
            log(step)
            step += 1
        gold = torch.stack(gold_rows)  # (P, N)

        # each reward model picks from it
        for size in sizes:
            rm = part_7_rm
            if size > 0:
                drawn = [records[i] for i in torch.randperm(len(records))[:size]]
                rm = train_reward_model(sft, tok, drawn, cfg.rm_steps, device)
            score = score_pool(rm, pool)  # (P, N)
            best_score = torch.stack([best_of(n, score, score) for n in ns], dim=1)  # (P, ns)
            best_gold = torch.stack([best_of(n, score, gold) for n in ns], dim=1)
            scores[size].append(best_score)
            golds[size].append(best_gold)
            log(step, pairs=size, gold=best_gold[:, -1].mean().item())
            step += 1

    # what came out
    summaries = {}
    for size in sizes:
        name = f"{size:,} pairs" if size > 0 else "Part 7's"
        summaries[name] = summarize(torch.cat(scores[size]), torch.cat(golds[size]), ns)
    print(make_title(summaries))
    draw(summaries, out / "demo_overoptimization.png")
    metrics = {}
    for name, summary in summaries.items():
        for key, value in vars(summary).items():
            metrics[f"{name}: {key}"] = value
    save_metrics(
        out,
        name="demo_overoptimization",
        n=ns,
        prompts=len(val),
        seeds=cfg.seeds,
        seed=cfg.seed,
        **metrics,
    )
