"""
Part 9, test-time compute: a model that may try several times. How much does it help to sample more
answers, and how should one of them be chosen?

    python part_9/demo_test_time.py              one seed
    python part_9/demo_test_time.py --seeds=3    three seeds: how much is chance?

The models are those of demo_reasoning.py, which are trained first if they are missing. Each of them
gives k answers to a problem. One is chosen in three ways:

    majority vote          the number that most of the answers end with (Wang et al. 2022, "Self-
                           consistency"); of equally frequent ones the first
    best by reward model   the answer with the highest reward of a model that has learned to tell
                           right from wrong solutions (Cobbe et al. 2021, "Training verifiers")
    best by the judge      right if any of the k answers is right: pass@k, the limit of every choice

The reward model is Part 7's, trained on pairs of a right and a wrong solution that the model in
steps has written to problems of the training data.

Answers at once are shorter, so the second panel compares at equal numbers of tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import subprocess
from collections import Counter
from dataclasses import dataclass

import torch

import train_grpo
from demo_reasoning import (
    IN_STEPS,
    OUT,
    SAME_TOKENS,
    at_once,
    build_solver,
    checkpoint_of,
    examination,
    load_problems,
    range_text,
    sample,
    spread,
)
from model import RewardModel
from shared import (
    ROOT,
    as_json,
    fail,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
    write_atomic,
)

VOTE = "majority vote"
REWARD = "best by reward model"
JUDGE = "best by the judge"
AT_ONCE_VOTE = "majority vote, at once"
CURVES = [VOTE, REWARD, JUDGE, AT_ONCE_VOTE]
DRAWS = 20  # random choices of k answers, of which the mean is taken


@dataclass
class Config:
    samples: int = 32  # answers to each held-out problem
    prompts: int = 16  # held-out problems of each number of operations that stands in training
    pairs: int = 800  # pairs of a right and a wrong solution for the reward model, at most
    rm_steps: int = 150  # optimizer steps of the reward model
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.samples > 1, f"samples={self.samples} must be at least 2: one is chosen"


# the reward model ---------------------------------------------------------------------------------


def make_pairs(records, samples, most):
    """Sampled answers -> records with a prompt, a right answer (chosen) and a wrong one (rejected).
    A problem gives as many pairs as it has both right and wrong answers."""
    pairs = []
    for record, right, answers in zip(records, samples.right.tolist(), samples.answers):
        good = [answer.text for answer, is_right in zip(answers, right) if is_right]
        bad = [answer.text for answer, is_right in zip(answers, right) if not is_right]
        for chosen, rejected in zip(good, bad):
            pairs.append({"prompt": record["instruction"], "chosen": chosen, "rejected": rejected})
    return pairs[:most]


def train_reward_model(solver, seed, cfg, out, device):
    """Part 7's trainer on pairs that the solver has written -> RewardModel."""
    training = load_problems("problems")[: cfg.pairs]
    torch.manual_seed(seed)
    pairs = make_pairs(training, sample(solver, training, 4, device), cfg.pairs)
    if len(pairs) < 20:
        fail(f"only {len(pairs)} pairs of a right and a wrong solution: use a larger --pairs")

    folder = out / f"demo_test_time.rm.{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "pairs.json"
    write_atomic(data, as_json(pairs).encode())
    init = checkpoint_of(IN_STEPS, seed, OUT)
    options = {
        "data": data,
        "init": init,
        "out": folder,
        "device": device.type,
        "steps": cfg.rm_steps,
        "policy_pairs": 0,
        "seed": seed,
    }
    command = [sys.executable, str(ROOT / "part_7/train_rm.py")]
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        sys.exit(done.returncode)  # the trainer has already printed why

    checkpoint = load_checkpoint(folder / "rm.pt", "rm")
    return RewardModel.load(checkpoint, **checkpoint["head"]).to(device).requires_grad_(False)


@torch.no_grad()
def rewards_of(rm, tok, records, answers, device):
    """The reward of each of K answers to N problems -> (N, K)."""
    end = tok.end
    rows = []
    starts = []
    for record, group in zip(records, answers):
        prompt = train_grpo.chat_prompt(record, tok)
        for answer in group:
            rows.append(prompt + answer.ids + [end])
            starts.append(len(prompt))

    rewards = []
    for i in range(0, len(rows), 256):
        part = rows[i : i + 256]
        ids = train_grpo.pad(part, end).to(device)
        lengths = torch.tensor([len(row) for row in part], device=device)
        rewards.append(rm(ids, torch.tensor(starts[i : i + 256], device=device), lengths).cpu())
    return torch.cat(rewards).view(len(records), -1)


# ways to choose -----------------------------------------------------------------------------------


def vote(numbers):
    """The index of an answer whose number is the most frequent one.

    ["5", "10", "10"] -> 1. Of equally frequent numbers the first is taken. An answer without a
    number ("") has no vote.
    """
    counts = Counter(number for number in numbers if number)
    if not counts:
        return 0
    winner, _ = counts.most_common(1)[0]
    return numbers.index(winner)


def share_right(samples, k, choose, generator):
    """The share of problems that are right if one of k answers is chosen.

    choose(row, indices) names one of the k answers with these indices to the problem in this row.
    The k answers are drawn from all answers to a problem, several times.
    """
    n, total = samples.right.shape
    right = 0
    for _ in range(DRAWS):
        for row in range(n):
            indices = torch.randperm(total, generator=generator)[:k].tolist()
            right += samples.right[row, choose(row, indices)].item()
    return right / (DRAWS * n)


def curves_of(samples, rewards, ks, seed):
    """{name of a curve: the share right for each k} of one model. Without rewards there is only the
    vote."""

    def by_vote(row, indices):
        return indices[vote([samples.numbers[row][i] for i in indices])]

    def by_reward(row, indices):
        return max(indices, key=lambda i: rewards[row, i].item())

    def by_judge(row, indices):
        return max(indices, key=lambda i: samples.right[row, i].item())

    choices = {VOTE: by_vote}
    if rewards is not None:
        choices |= {REWARD: by_reward, JUDGE: by_judge}

    # Every way of choosing gets the same draws.
    curves = {}
    for name, choose in choices.items():
        generator = torch.Generator().manual_seed(seed)
        curves[name] = [share_right(samples, k, choose, generator) for k in ks]
    return curves


# the figure ---------------------------------------------------------------------------------------


def draw(title, ks, curves, lengths, path):
    """The share right against k, and against the tokens that were spent."""
    fig, axes = figure(title, columns=2, height=4.6)
    for i, name in enumerate(CURVES):
        means, lows, highs = spread(curves[name])
        length = sum(lengths[name]) / len(lengths[name])
        for ax, xs in ((axes[0], ks), (axes[1], [k * length for k in ks])):
            ax.plot(xs, means, marker="os^D"[i], color=f"C{i}", label=name)
            ax.fill_between(xs, lows, highs, color=f"C{i}", alpha=0.2)
    for ax, label in ((axes[0], "answers to a problem, k"), (axes[1], "tokens for a problem")):
        ax.set(xlabel=label, ylim=(0, 1.05))
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
    axes[0].set(ylabel="share of problems right")
    axes[0].legend(fontsize=8)
    save_figure(fig, path)


def finding(curves, ks):
    """The title of the figure: what do the most answers bring, and how are they chosen best?"""
    single = [curve[0] for curve in curves[VOTE]]
    voted = [curve[-1] for curve in curves[VOTE]]
    chosen = [curve[-1] for curve in curves[REWARD]]
    title = (
        f"One answer {range_text(single)} right; of {ks[-1]}, the vote {range_text(voted)}, "
        f"the reward model {range_text(chosen)}"
    )
    if max(min(voted), min(chosen)) <= min(max(voted), max(chosen)):
        title += "\n(vote and reward model: no difference)"
    return title


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    out = output_folder(cfg)

    # held-out problems that are no longer than those in training
    longest = max(record["level"] for record in load_problems("problems"))
    val = [record for record in examination(cfg.prompts) if record["level"] <= longest]
    val_at_once = [at_once(record) for record in val]
    ks = [2**i for i in range(cfg.samples.bit_length()) if 2**i <= cfg.samples]

    curves = {name: [] for name in CURVES}
    lengths = {name: [] for name in CURVES}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        # the model in steps, and a reward model that learns from its answers
        solver = build_solver(IN_STEPS, seed, device)
        print(f"seed {seed}: training a reward model", flush=True)
        rm = train_reward_model(solver, seed, cfg, out, device)
        print(f"seed {seed}: {cfg.samples} answers to each of {len(val)} problems", flush=True)
        torch.manual_seed(seed)
        samples = sample(solver, val, cfg.samples, device)
        rewards = rewards_of(rm, solver.tok, val, samples.answers, device)
        found = curves_of(samples, rewards, ks, seed)

        # the model at once
        solver = build_solver(SAME_TOKENS, seed, device)
        torch.manual_seed(seed)
        quick = sample(solver, val_at_once, cfg.samples, device)
        found[AT_ONCE_VOTE] = curves_of(quick, None, ks, seed)[VOTE]

        for name in CURVES:
            curves[name].append(found[name])
            source = quick if name == AT_ONCE_VOTE else samples
            lengths[name].append(source.length.float().mean().item())

    # what came out
    print(f"\n{'share right with k =':24}" + "".join(f"{k:6}" for k in ks))
    for name in CURVES:
        means, _, _ = spread(curves[name])
        print(f"{name:24}" + "".join(f"{mean:6.2f}" for mean in means))
    title = finding(curves, ks)
    print(title)
    save_metrics(
        out, name="demo_test_time", ks=ks, curves=curves, tokens_per_answer=lengths, seeds=cfg.seeds
    )
    draw(title, ks, curves, lengths, out / "demo_test_time.png")
