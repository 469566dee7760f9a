"""
Part 6: what did instruction tuning teach? The share of right answers by task and level, and the
checks that wrong stories fail.

    python part_6/demo_gold.py
    python part_6/demo_gold.py --temperature=0     greedy answers instead of samples

This world knows which answers are right: the gold score is the share of answers that pass all
checks of shared.judge.

Seven in ten of the stories in the training data are wrong on purpose. Training maximizes the
likelihood of these demonstrations, so a model that samples at temperature 1 imitates their faults,
too. For comparison, the figure also shows the score of the demonstrations themselves.

The error bars are 95 % intervals of a share (Wilson 1927).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from model import GPT
from shared import (
    fail,
    figure,
    judge,
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
from train_sft import encode_records, load_data, respond

# The checks of a story, as shared.judge names them.
STORY_CHECKS = ("has", "ends", "agree", "patterns", "no_repeat", "end")


@dataclass
class Config:
    init: str = "part_6/out/sft.pt"  # checkpoint of train_sft.py
    data: str = "stories"  # stories or a JSONL file with instruction, input, output and check
    prompts: int = 512  # held-out stories, and as many other tasks, that are answered
    examples: int = 2  # right answers, and as many wrong ones, that are printed for each task
    temperature: float = 1.0  # of the samples; 0: greedy
    max_new_tokens: int = 72  # longest answer, in tokens
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("prompts", "max_new_tokens"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert self.temperature >= 0, f"temperature={self.temperature} must not be negative"


# judging ------------------------------------------------------------------------------------------


def is_story(record):
    return record.get("task", "story") == "story"


def failed_checks(record, text, ended=True):
    """The names of the checks that an answer fails: an empty list if it is right."""
    verdict = judge(record, text, ended)
    return [name for name, passed in verdict.checks.items() if not passed]


def by_task(records, failed):
    """failed[i] are the checks that the answer to records[i] fails -> for each (task, level) a list
    that says of each answer whether it is right."""
    groups = defaultdict(list)
    for record, names in zip(records, failed):
        key = (record.get("task", "story"), record.get("level", 0))
        groups[key].append(not names)
    return dict(groups)


def by_check(records, failed):
    """The share of stories that fail each kind of check; an empty dict if there are no stories."""
    groups = defaultdict(list)
    for record, names in zip(records, failed):
        if not is_story(record):
            continue
        # "has:fox" and "has:red hat" are two checks of one kind. A story fails the kind once.
        failed_kinds = {name.split(":")[0] for name in names}
        for kind in STORY_CHECKS:
            groups[kind].append(kind in failed_kinds)
    return {kind: float(np.mean(values)) for kind, values in groups.items()}


class Total(NamedTuple):
    share: float  # share of right answers, NaN if there are no answers
    answers: int  # number of answers


def total(groups, stories):
    """All answers of by_task's groups together: those to stories, or those to all other tasks."""
    right = []
    for (task, _), values in groups.items():
        if (task == "story") == stories:
            right.extend(values)
    share = float(np.mean(right)) if right else float("nan")
    return Total(share, len(right))


def wilson(k, n, z=1.96):
    """The 95 % interval of a share, k of n -> (low, high). It holds all shares p for which k / n is
    at most z standard deviations away from p (Wilson 1927), so it makes sense at 0 and 1, too."""
    centre = k + z * z / 2
    half = z * (k * (n - k) / n + z * z / 4) ** 0.5
    return (centre - half) / (n + z * z), (centre + half) / (n + z * z)


def compare(model, demonstrations):
    """Two Totals -> how the model compares with the demonstrations, as words for the title."""
    if model.answers == 0:
        return "there are none"
    low, high = wilson(model.share * model.answers, model.answers)
    words = "no different from"
    if high < demonstrations.share:
        words = "worse than"
    elif low > demonstrations.share:
        words = "better than"
    return f"{model.share:.2f}, {words} the demonstrations' {demonstrations.share:.2f}"


# showing ------------------------------------------------------------------------------------------


def show(records, answers, failed, n):
    """Prints n right and n wrong answers for each task, and what is wrong with the latter."""
    others = {record["task"] for record in records if not is_story(record)}
    for task in ["story", *sorted(others)]:
        right = []
        wrong = []
        for i, record in enumerate(records):
            if record.get("task", "story") != task:
                continue
            if failed[i]:
                wrong.append(i)
            else:
                right.append(i)

        for i in right[:n] + wrong[:n]:
            record = records[i]
            request = record["instruction"]
            if record["input"]:
                request += " / " + record["input"]
            print(f"\n{task}, {'wrong' if failed[i] else 'right'}: {request}")
            print(f"  -> {answers[i].text}")
            if failed[i]:
                print(f"  fails {', '.join(failed[i])}")
            if failed[i] and "answer" in record["check"]:
                print(f"  expected {record['check']['answer']}")


def draw(model_groups, data_groups, model_checks, data_checks, title, path):
    """Left: the share of right answers, a bar for each task and level. Right: the share of stories
    that fail each check. Diamonds show the same for the demonstrations."""
    fig, (left, right) = figure(title, columns=2, height=6)

    # Other tasks are below and stories on top, with a gap between tasks.
    keys = sorted(model_groups, key=lambda key: (key[0] == "story", key[0], -key[1]))
    heights = []
    height = 0.0
    for i, (task, _) in enumerate(keys):
        if i > 0:
            height += 1.0 if task == keys[i - 1][0] else 1.8
        heights.append(height)

    shares = np.array([np.mean(model_groups[key]) for key in keys])
    intervals = np.array([wilson(sum(model_groups[key]), len(model_groups[key])) for key in keys])
    errors = np.abs(intervals - shares[:, None]).T  # (2, bars): to the left, to the right
    data_shares = [np.mean(data_groups.get(key, np.nan)) for key in keys]
    left.barh(
        heights, shares, xerr=errors, color="C2", error_kw={"elinewidth": 1}, label="SFT model"
    )
    left.plot(data_shares, heights, "kd", markersize=4, label="its demonstrations")
    left.set_yticks(heights, [f"{task} {level}" for task, level in keys], fontsize=8)
    left.set(xlabel="share of answers that pass", ylabel="task and level", xlim=(-0.02, 1.05))
    left.legend(fontsize=8, loc="center", bbox_to_anchor=(0.66, 0.71))  # no bars are there

    kinds = sorted(model_checks, key=model_checks.get)
    right.barh(kinds, [model_checks[kind] for kind in kinds], color="C3", label="SFT model")
    right.plot(
        [data_checks.get(kind, np.nan) for kind in kinds], kinds, "kd", label="its demonstrations"
    )
    right.set(xlabel="share of stories that fail the check", ylabel="check")
    right.legend(fontsize=8, loc="lower right")
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # data first: a broken file must not wait for a model to be built
    train_records, val_records = load_data(cfg)
    train_records = [record for record in train_records if record.get("check")]
    val_records = [record for record in val_records if record.get("check")]
    if not train_records or not val_records:
        fail(f"--data={cfg.data} needs records with checks, for training and for validation")

    # model
    checkpoint = load_checkpoint(require(cfg.init), "sft")
    model = GPT.load(checkpoint).to(device)
    tok = Tokenizer.load(checkpoint["tokenizer"])
    train_records = encode_records(train_records, tok, model.cfg.block_size)
    val_records = encode_records(val_records, tok, model.cfg.block_size)
    out = output_folder(cfg)

    # the model answers held-out requests
    stories = [record for record in val_records if is_story(record)]
    others = [record for record in val_records if not is_story(record)]
    records = stories[: cfg.prompts] + others[: cfg.prompts]
    answers = respond(model, tok, records, cfg.max_new_tokens, cfg.temperature)
    failed = []
    for record, answer in zip(records, answers):
        failed.append(failed_checks(record, answer.text, answer.ended))
    show(records, answers, failed, cfg.examples)

    # the model's answers and the demonstrations, judged by the same rules
    data_failed = [failed_checks(record, record["output"]) for record in train_records]
    model_groups = by_task(records, failed)
    data_groups = by_task(train_records, data_failed)
    model_checks = by_check(records, failed)
    data_checks = by_check(train_records, data_failed)

    print("\ntask, level            passes            of   demonstrations")
    for (task, level), values in sorted(model_groups.items()):
        low, high = wilson(sum(values), len(values))
        interval = f"{np.mean(values):7.3f} ({low:.2f} to {high:.2f}) {len(values):5}"
        data_share = np.mean(data_groups.get((task, level), np.nan))
        print(f"{task:10} {level}  {interval}   {data_share:.3f}")

    model_story = total(model_groups, stories=True)
    model_other = total(model_groups, stories=False)
    data_story = total(data_groups, stories=True)
    data_other = total(data_groups, stories=False)
    title = (
        f"Stories that pass: {compare(model_story, data_story)}\n"
        f"Other tasks: {compare(model_other, data_other)}"
    )
    print("\n" + title)
    draw(model_groups, data_groups, model_checks, data_checks, title, out / "demo_gold.png")

    numbers = {}
    for (task, level), values in sorted(model_groups.items()):
        numbers[f"{task}_level_{level}"] = np.mean(values)
    for kind, share in model_checks.items():
        numbers[f"fails_{kind}"] = share
    save_metrics(
        out,
        name="demo_gold",
        model_story=model_story.share,
        model_story_n=model_story.answers,
        model_skill=model_other.share,
        model_skill_n=model_other.answers,
        demonstrations_story=data_story.share,
        demonstrations_story_n=data_story.answers,
        demonstrations_skill=data_other.share,
        demonstrations_skill_n=data_other.answers,
        temperature=cfg.temperature,
        seed=cfg.seed,
        **numbers,
    )
