"""
Part 6: which tokens should count in the loss? Only the answers or the prompts too, for short and
for long answers, and with or without the end token.

    python part_6/demo_masking.py
    python part_6/demo_masking.py --seeds=3

It trains six models from the base model: each of the three losses, on short and on long answers.

If the prompt counts, its tokens share the gradient with the answer's. They are most of the loss if
answers are short, and a third if the answer is a story. To leave them out is a custom, not a law:
Shi et al. 2024 ("Instruction Tuning With Loss Over Instructions") find that counting them helps
when the prompts are long, the answers short and the demonstrations few.

The end token is one target of many, but the only one that teaches the model to stop.

The trainings are short: 100 steps instead of train_sft.py's 440.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from model import GPT
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
    require,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import Tokenizer
from train_sft import Config as SFTConfig
from train_sft import (
    encode_records,
    evaluate,
    get_batch,
    load_data,
    lr_scale,
    make_optimizers,
    order,
    respond,
    set_lr,
)

KINDS = ["short", "long"]  # of answers
ARMS = ["answers only", "prompts too", "without the end token"]  # what counts in the loss


@dataclass
class Config:
    init: str = "part_4/out/base.pt"  # checkpoint of the base model
    data: str = "stories"  # stories or a JSONL file with instruction, input, output and check
    short: int = 16  # an answer of at most this many tokens is short
    block_size: int = 128  # longest prompt and answer, in tokens
    steps: int = 100  # optimizer steps of each training
    batch_size: int = 32  # demonstrations per step
    prompts: int = 256  # held-out requests of each kind that are answered and judged
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("steps", "batch_size", "prompts", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"


# what counts in the loss --------------------------------------------------------------------------


def relabel(records, arm):
    """get_batch makes targets of the tokens in "answer_ids". For "prompts too" the prompt moves
    there, without its first token, because nothing stands before it to predict it."""
    if arm != "prompts too":
        return records
    relabelled = []
    for record in records:
        prompt = record["prompt_ids"]
        answer = record["answer_ids"]
        moved = {"prompt_ids": prompt[:1], "answer_ids": prompt[1:] + answer}
        relabelled.append({**record, **moved})
    return relabelled


def get_arm_batch(records, step, sft_cfg, arm, end):
    """The inputs (B, T) and targets (B, T) of a step, with targets of -100 where the loss of this
    arm does not count. The records must come from relabel."""
    inputs, targets = get_batch(records, step, sft_cfg)
    if arm == "without the end token":
        targets = targets.masked_fill(targets == end, -100)
    return inputs, targets


def answer_share(records):
    """The share of the answers in all targets if prompts count, too."""
    answer_tokens = sum(len(record["answer_ids"]) for record in records)
    prompt_tokens = sum(len(record["prompt_ids"]) - 1 for record in records)
    return answer_tokens / (prompt_tokens + answer_tokens)


# short trainings ----------------------------------------------------------------------------------


def train(model, records, arm, sft_cfg, end, device, autocast, log, first_step, kind):
    """train_sft.py's loop without evaluations. Several runs share one log, in which this one's
    steps count from first_step."""
    optimizers = make_optimizers(model, sft_cfg)
    records = relabel(records, arm)
    for step in range(sft_cfg.steps):
        set_lr(optimizers, lr_scale(step, sft_cfg))

        inputs, targets = get_arm_batch(records, step, sft_cfg, arm, end)
        with autocast():
            _, loss = model(inputs.to(device), targets.to(device))
        loss.backward()

        torch.nn.utils.clip_grad_norm_(model.parameters(), sft_cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log(first_step + step, kind=kind, arm=arm, loss=loss.item())


class Score(NamedTuple):
    nats: float  # loss per held-out answer token; the end token counts, whatever the training did
    passes: float  # share of sampled answers that pass all checks
    ends: float  # share of sampled answers that end


def score(model, tok, records, sft_cfg, prompts, device, autocast):
    """Measures a model on held-out records -> Score."""
    asked = [record for record in records if record.get("check")][:prompts]
    answers = respond(model, tok, asked, sft_cfg.max_new_tokens)
    passed = []
    for record, answer in zip(asked, answers):
        passed.append(judge(record, answer.text, answer.ended).passed)
    nats = evaluate(model, records, device, autocast)
    ends = [answer.ended for answer in answers]
    return Score(nats, float(np.mean(passed)), float(np.mean(ends)))


def difference(before, after):
    """Two lists of nats, one value per seed -> the mean difference as text, or "no difference" if
    the seeds do not agree on its sign."""
    differences = np.subtract(after, before)
    same_sign = (differences > 0).all() or (differences < 0).all()
    return f"{differences.mean():+.3f} nats" if same_sign else "no difference"


# figure -------------------------------------------------------------------------------------------


def draw(values, title, path):
    """values[measure][kind, arm] is an array with one number per seed. One panel per measure: bars
    are means, dots are seeds."""
    panels = [
        ("nats", "nats per answer token, held out", ["answers only", "prompts too"]),
        ("passes", "share of answers that pass", ["answers only", "prompts too"]),
        ("ends", "share of answers that end", ["answers only", "without the end token"]),
    ]
    fig, axes = figure(title, columns=3, height=4.6)
    bars = {}
    for ax, (measure, label, arms) in zip(axes, panels):
        highest = 0.0
        for i, arm in enumerate(arms):
            for k, kind in enumerate(KINDS):
                seeds = values[measure][kind, arm]
                mean = seeds.mean()
                x = k + 0.4 * i - 0.2
                colour = f"C{ARMS.index(arm)}"
                bars[arm] = ax.bar(x, mean, width=0.38, color=colour, alpha=0.8)
                ax.plot([x] * len(seeds), seeds, "k.", markersize=4)
                ax.annotate(f"{mean:.2f}", (x, mean), ha="center", va="bottom", fontsize=8)
                highest = max(highest, seeds.max())
        ax.set_xticks([0, 1], KINDS)
        ax.set(xlabel="answers", ylabel=label, ylim=(0, max(0.1, 1.15 * highest)))
    fig.legend(
        bars.values(),
        bars.keys(),
        title="what counts in the loss",
        loc="outside lower center",
        ncols=3,
    )
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)
    autocast = autocast_for(device, pick_dtype("", device))

    # data first: a broken file must not wait for a base model to be built
    train_records, val_records = load_data(cfg)
    base = load_checkpoint(require(cfg.init), "base")
    base["gpt_config"]["block_size"] = cfg.block_size
    tok = Tokenizer.load(base["tokenizer"])
    end = tok.end
    train_records = encode_records(train_records, tok, cfg.block_size)
    val_records = encode_records(val_records, tok, cfg.block_size)

    # short and long answers, the end token included
    train_of = {"short": [], "long": []}
    val_of = {"short": [], "long": []}
    for records, records_of in ((train_records, train_of), (val_records, val_of)):
        for record in records:
            kind = "short" if len(record["answer_ids"]) <= cfg.short else "long"
            records_of[kind].append(record)
    for kind in KINDS:
        has_checks = any(record.get("check") for record in val_of[kind])
        if not train_of[kind] or not has_checks:
            fail(f"--short={cfg.short} leaves no {kind} answers to train on, or none with a check")
        share = answer_share(train_of[kind])
        print(f"{kind}: {len(train_of[kind]):,} demonstrations, answers are {share:.0%} of tokens")
    out = output_folder(cfg)

    # six trainings per seed: the arms start from the same model and see the same batches
    log = Log(out, cfg.seeds * len(KINDS) * len(ARMS) * cfg.steps, name="demo_masking")
    scores = {(kind, arm): [] for kind in KINDS for arm in ARMS}
    first_step = 0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        sft_cfg = SFTConfig(steps=cfg.steps, batch_size=cfg.batch_size, seed=seed)
        for kind, arm in scores:
            model = GPT.load(base).to(device)
            records = [train_of[kind][i] for i in order(train_of[kind], sft_cfg)]
            train(model, records, arm, sft_cfg, end, device, autocast, log, first_step, kind)
            first_step += cfg.steps

            # The arms draw the same random numbers when they answer.
            torch.manual_seed(seed)
            result = score(model, tok, val_of[kind], sft_cfg, cfg.prompts, device, autocast)
            scores[kind, arm].append(result)

    # what came out
    values = {}
    for measure in Score._fields:
        values[measure] = {}
        for key, results in scores.items():
            values[measure][key] = np.array([getattr(result, measure) for result in results])

    print("answers  what counts in the loss  nats/token   pass    end")
    for kind, arm in scores:
        means = [values[measure][kind, arm].mean() for measure in Score._fields]
        print(f"{kind:8} {arm:24} {means[0]:9.3f} {means[1]:6.3f} {means[2]:6.3f}")

    nats = values["nats"]
    change = {kind: difference(nats[kind, ARMS[0]], nats[kind, ARMS[1]]) for kind in KINDS}
    ends = values["ends"]
    with_end = np.mean([ends[kind, "answers only"] for kind in KINDS])
    without_end = np.mean([ends[kind, "without the end token"] for kind in KINDS])
    title = (
        "Held-out loss if prompts count, too:\n"
        f"short answers {change['short']}, long answers {change['long']}\n"
        f"Share of answers that end: {with_end:.2f}; "
        f"without the end token in the loss: {without_end:.2f}"
    )
    if cfg.seeds == 1:
        title += " (one seed)"
    print(title)
    draw(values, title, out / "demo_masking.png")

    short_names = {"nats": "nats", "passes": "pass", "ends": "end"}
    numbers = {}
    for kind, arm in scores:
        for measure, name in short_names.items():
            key = f"{kind} {arm} {name}".replace(" ", "_")
            numbers[key] = values[measure][kind, arm].tolist()
    save_metrics(
        out, name="demo_masking", **numbers, steps=cfg.steps, seeds=cfg.seeds, seed=cfg.seed
    )
