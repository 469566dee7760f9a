"""
Part 7: can the reward model be trusted? Five checks that need no other model.

    python part_7/demo_sanity.py
    python part_7/demo_sanity.py --pair=3     another held-out pair's answers, token by token

Length           People tend to prefer longer answers, and a reward model may learn just that
                 (Singhal et al. 2023). How many labels does length alone predict?
Shuffled labels  A model trained on random labels must learn nothing about held-out pairs. If it
                 does, the label leaks into the input, for example by the order in the batch.
                 (It starts above chance: untrained, an implicit reward is the mean
                 log-probability that the SFT model gives to the answer.)
Calibration      Bradley-Terry claims that sigmoid(difference of rewards) is the probability of the
                 label. In this world the true probability is known.
Padding          Empty places after an answer must not change its reward.
Token by token   The reward is the mean of the token scores, so one can see where it arises. The
                 model is causal: a token is judged by itself and by what stands before it.

The two trainings, with shuffled and with right labels, are short: 48 steps of 16 pairs instead of
train_rm.py's 300 steps of 24.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from model import RewardModel
from shared import (
    Log,
    fail,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    read_text,
    require,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import Tokenizer
from train_rm import Config as RMConfig
from train_rm import (
    collate,
    encode_records,
    evaluate,
    get_batch,
    load_data,
    lr_scale,
    make_optimizers,
    preference_loss,
    rewards,
    set_lr,
)


@dataclass
class Config:
    # checkpoint of the SFT model, from which the two short trainings start
    init: str = "part_6/out/sft.pt"

    rm: str = "part_7/out/rm.pt"  # checkpoint of the reward model that is checked
    data: str = "stories"  # stories or a JSONL file with prompt, chosen, rejected and gap
    pair: int = 0  # which held-out pair is drawn token by token
    steps: int = 48  # optimizer steps of each short training
    batch_size: int = 16  # pairs per step
    held_out: int = 500  # pairs of the validation data to evaluate on
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "held_out"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"


# the checks ---------------------------------------------------------------------------------------


class Calibration(NamedTuple):
    claimed: torch.Tensor  # (bins,) mean claimed probability in each bin, NaN if it is empty
    true: torch.Tensor  # (bins,) mean true probability of the same pairs
    pairs: torch.Tensor  # (bins,) number of pairs
    error: float  # mean distance of the two over all pairs


def calibration(gap, true_gap, tau, bins=10):
    """gap (N,) are differences of rewards, true_gap (N,) those of the checks passed -> Calibration.

    The claimed probability is sigmoid(gap), the true one sigmoid(true_gap / tau). Pairs are put
    into bins of equal width by what is claimed. The error is the expected calibration error
    (Naeini et al. 2015), with known probabilities instead of labels.
    """
    claimed = gap.sigmoid()
    true = (true_gap / tau).sigmoid()
    bin_of = (claimed * bins).long().clamp(max=bins - 1)  # a claim of exactly 1 is in the last bin

    pairs = torch.bincount(bin_of, minlength=bins).float()
    claimed_mean = torch.bincount(bin_of, weights=claimed, minlength=bins) / pairs
    true_mean = torch.bincount(bin_of, weights=true, minlength=bins) / pairs
    distance = (claimed_mean - true_mean).abs()
    error = (distance * pairs).nansum() / pairs.sum()
    return Calibration(claimed_mean, true_mean, pairs, error.item())


def length_differences(pairs):
    """1, 0 or -1 for each pair: is the preferred answer longer, equally long or shorter? (N,)"""
    differences = [len(pair["chosen_ids"]) - len(pair["rejected_ids"]) for pair in pairs]
    return torch.tensor(differences).sign()


def length_probe(train, val):
    """The accuracy on val of a judge who sees only lengths. Training data decides whether the
    longer or the shorter answer wins; equal lengths count as half right."""
    winner = length_differences(train).sum().sign()  # 1: the longer answer
    agreement = winner * length_differences(val)  # 1: right, -1: wrong
    return 0.5 + 0.5 * agreement.float().mean().item()


@torch.no_grad()
def padding_error(model, pairs, device):
    """The largest change of a reward when its row is padded to the whole context, as a share of the
    largest reward. Rounding gives about 1e-6; much more is a bug."""
    ids, starts, lengths = collate(pairs)
    ids = ids.to(device)
    starts = starts.to(device)
    lengths = lengths.to(device)
    padded_ids = F.pad(ids, (0, model.cfg.block_size - ids.size(1)))

    reward = model(ids, starts, lengths)
    padded_reward = model(padded_ids, starts, lengths)
    change = (padded_reward - reward).abs().max()
    return (change / reward.abs().max()).item()


def shuffled(pairs, seed):
    """The pairs with random labels: about half of them are turned round, gap included."""
    flips = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)) < 0.5
    result = []
    for pair, flip in zip(pairs, flips.tolist()):
        if flip:
            pair = {**pair, "chosen_ids": pair["rejected_ids"], "rejected_ids": pair["chosen_ids"]}
            if "gap" in pair:
                pair["gap"] = -pair["gap"]
        result.append(pair)
    return result


@torch.no_grad()
def answer_scores(model, pair, side, device):
    """The normalized score of each token of one answer, "chosen" or "rejected", end token included:
    (T,). Their mean is the reward, unless the head is "last"."""
    prompt = pair["prompt_ids"]
    ids = torch.tensor([prompt + pair[f"{side}_ids"]], device=device)  # (1, T)
    lengths = torch.tensor([ids.size(1)], device=device)
    answer = torch.ones_like(ids, dtype=torch.bool)
    answer[:, : len(prompt)] = False
    scores = model.token_scores(ids, answer, lengths)[0, len(prompt) :]
    return ((scores - model.shift) * model.scale).cpu()


def half_interval(share, n):
    """Half of the 95 % interval of a share of n pairs."""
    return 1.96 * (share * (1 - share) / n) ** 0.5


# short trainings ----------------------------------------------------------------------------------


def load_records(cfg):
    """train_rm.py's training and validation records. Each must have a gap, because the checks ask
    for the truth."""
    train_records, val_records = load_data(cfg)
    for number, record in enumerate(train_records + val_records, start=1):
        if not isinstance(record.get("gap"), (int, float)):
            fail(f"--data={cfg.data} record {number}: field 'gap' is missing or not a number")
    return train_records, val_records


def train(model, pairs, rm_cfg, device, log, first_step, run):
    """train_rm.py's loop without evaluations. Several runs share one log: this one's steps count
    from first_step, and `run` is its name."""
    optimizers = make_optimizers(model, rm_cfg)
    for step in range(rm_cfg.steps):
        set_lr(optimizers, lr_scale(step, rm_cfg))

        ids, starts, lengths = get_batch(pairs, step, rm_cfg)
        reward = model(ids.to(device), starts.to(device), lengths.to(device))  # (2B,)
        chosen, rejected = reward.chunk(2)  # (B,) each
        loss = preference_loss(chosen, rejected, rm_cfg.loss, rm_cfg.margin, rm_cfg.center)
        loss.backward()

        torch.nn.utils.clip_grad_norm_(model.parameters(), rm_cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log(first_step + step, run=run, loss=loss.item())


# figures ------------------------------------------------------------------------------------------


def draw_checks(accuracy, lengths, reward, calibrated, title, path):
    """Accuracy of each way to choose, reward against length, and the calibration curve with the
    number of pairs behind each of its points. lengths and reward are (2, N): chosen, rejected."""
    fig, axes = figure(title, rows=2, columns=2, height=7)
    (bars, scatter), (curve, histogram) = axes

    names = list(accuracy)
    shares = np.array(list(accuracy.values()))
    n = reward.size(1)
    bars.barh(names, shares, xerr=half_interval(shares, n), color="C0", alpha=0.8, capsize=3)
    bars.axvline(0.5, color="black", linestyle="--", label="chance")
    bars.set(xlabel="accuracy on held-out labels, 95 %", xlim=(0.3, 1))
    bars.legend(fontsize=8)

    for side, label, colour in ((1, "not preferred", "C3"), (0, "preferred", "C2")):
        scatter.plot(
            lengths[side], reward[side], ".", color=colour, markersize=4, alpha=0.5, label=label
        )
    scatter.set(xlabel="length of the answer, in tokens")
    scatter.set(ylabel="reward (1 = standard deviation\nof the policy's answers)")
    scatter.legend(fontsize=8)

    # A point that stands for few pairs says little, so the counts are drawn under the curve.
    curve.axline([0, 0], [1, 1], color="gray", linestyle="--", label="perfect")
    curve.plot(calibrated.claimed, calibrated.true, "o-", color="C3", label="this model")
    curve.set(xlabel="claimed probability", ylabel="true probability", xlim=(0, 1), ylim=(0, 1))
    curve.legend(fontsize=8)
    bins = len(calibrated.pairs)
    centres = (np.arange(bins) + 0.5) / bins
    histogram.bar(centres, calibrated.pairs, width=0.9 / bins, color="C3", alpha=0.8)
    histogram.set(xlabel="claimed probability", ylabel="pairs", xlim=(0, 1))
    save_figure(fig, path)


def draw_tokens(words, scores, title, path):
    """words and scores are dicts with the keys "chosen" and "rejected". One bar per token."""
    fig, axes = figure(title, rows=2, height=6)
    lowest = min(side_scores.min().item() for side_scores in scores.values())
    highest = max(side_scores.max().item() for side_scores in scores.values())
    longest = max(len(side_words) for side_words in words.values())

    for ax, side in zip(axes, scores):
        mean = scores[side].mean()
        colours = ["C2" if score > 0 else "C3" for score in scores[side]]
        ax.bar(range(len(colours)), scores[side], color=colours)
        ax.axhline(mean, color="black", linestyle="--", label=f"mean {mean:+.2f}")
        ax.set_xticks(range(len(colours)), words[side], rotation=90, fontsize=8)
        ax.set(ylabel=f"token score, {side}", xlim=(-1, longest))
        ax.set(ylim=(min(lowest, 0) * 1.1, max(highest, 0) * 1.1 + 0.1))
        ax.legend(fontsize=8, loc="upper center")
    axes[1].set_xlabel("token of the answer")
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # data first: a broken file must not wait for a model to be built
    world, val = load_records(cfg)
    rm = load_checkpoint(require(cfg.rm), "rm")
    sft = load_checkpoint(require(cfg.init), "sft")
    model = RewardModel.load(rm, **rm["head"]).to(device)
    tok = Tokenizer.load(rm["tokenizer"])
    tau = json.loads(read_text(require("data/stories") / "facts.json"))["tau"]
    world = encode_records(world, tok, model.cfg.block_size)
    val = encode_records(val, tok, model.cfg.block_size)[: cfg.held_out]
    if not 0 <= cfg.pair < len(val):
        fail(f"--pair={cfg.pair} must be from 0 to {len(val) - 1}")
    out = output_folder(cfg)

    # length alone, and two short trainings: with labels that mean nothing, and with the right ones
    log = Log(out, 2 * cfg.steps, name="demo_sanity")
    rm_cfg = RMConfig(steps=cfg.steps, batch_size=cfg.batch_size, seed=cfg.seed)
    accuracy = {"length alone": length_probe(world, val)}
    training_data = {"shuffled labels": shuffled(world, cfg.seed), "right labels": world}
    for i, (name, pairs) in enumerate(training_data.items()):
        torch.manual_seed(cfg.seed)
        new_model = RewardModel.load(sft).to(device)
        # Not trained yet, it scores a token by how probable the SFT model finds it.
        accuracy["untrained"] = evaluate(new_model, val, device).accuracy
        train(new_model, pairs, rm_cfg, device, log, i * cfg.steps, name)
        accuracy[name] = evaluate(new_model, val, device).accuracy

    # the reward model itself
    chosen, rejected = rewards(model, val, device)
    reward = torch.stack([chosen, rejected])  # (2, N)
    accuracy["rm.pt"] = (chosen > rejected).float().mean().item()
    chosen_lengths = [len(pair["chosen_ids"]) for pair in val]
    rejected_lengths = [len(pair["rejected_ids"]) for pair in val]
    lengths = torch.tensor([chosen_lengths, rejected_lengths]).float()  # (2, N)
    correlation = torch.corrcoef(torch.stack([lengths.flatten(), reward.flatten()]))[0, 1].item()
    padding = padding_error(model, val[:8], device)

    # Rewards are normalized after training. Claimed probabilities need the differences before that.
    true_gap = torch.tensor([float(pair["gap"]) for pair in val])
    raw_gap = (chosen - rejected) / model.scale.item()
    calibrated = calibration(raw_gap, true_gap, tau)

    # what came out
    for name, share in accuracy.items():
        print(f"{name:16} accuracy {share:.3f} +- {half_interval(share, len(val)):.3f}")
    print(f"calibration: claimed and true probabilities differ by {calibrated.error:.3f}")
    print(f"padding: rewards change by at most {padding:.1e} of the largest reward")

    leak = accuracy["shuffled labels"] - max(0.5, accuracy["untrained"])
    verdict = "teach SOMETHING" if leak > half_interval(0.5, len(val)) else "teach nothing"
    title = (
        f"Shuffled labels {verdict}: accuracy {accuracy['shuffled labels']:.2f}, "
        f"right labels {accuracy['right labels']:.2f}, untrained {accuracy['untrained']:.2f}\n"
        f"Length alone predicts {accuracy['length alone']:.2f}; "
        f"length and reward correlate by {correlation:+.2f}\n"
        f"Claimed and true probabilities differ by {calibrated.error:.3f} on average"
    )
    print(title)
    draw_checks(accuracy, lengths, reward, calibrated, title, out / "demo_sanity_checks.png")

    # where in a story does the reward arise?
    pair = val[cfg.pair]
    scores = {}
    words = {}
    title_lines = []
    print(tok.decode(pair["prompt_ids"]))
    for side in ("chosen", "rejected"):
        scores[side] = answer_scores(model, pair, side, device)
        words[side] = [tok.decode([i]) for i in pair[f"{side}_ids"]]
        lowest_word = words[side][scores[side].argmin().item()]
        line = (
            f'{side}: mean score {scores[side].mean():+.2f}, lowest at "{lowest_word.strip()}" '
            f"({scores[side].min():+.2f})"
        )
        print(f"  {line}")
        title_lines.append(line)
    draw_tokens(words, scores, "\n".join(title_lines), out / "demo_sanity_tokens.png")

    accuracy_by_name = {name.replace(" ", "_"): share for name, share in accuracy.items()}
    save_metrics(
        out,
        name="demo_sanity",
        **accuracy_by_name,
        length_correlation=correlation,
        calibration_error=calibrated.error,
        padding_error=padding,
        reward_chosen=scores["chosen"].mean().item(),
        reward_rejected=scores["rejected"].mean().item(),
        held_out=len(val),
        steps=cfg.steps,
        seed=cfg.seed,
    )
