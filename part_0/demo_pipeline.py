"""
Part 0, the whole course in one picture: what each stage learns from, which loss it minimizes, and
which file it leaves for the next one.

    python part_0/demo_pipeline.py      data/stories -> part_0/out/demo_pipeline.png and .json

The network stays the same from stage to stage. Only the data and the loss change. First the network
predicts the next token of any text, then the tokens of good answers. A copy of it learns which of
two answers is better. At the end it learns from its own answers, weighted by their reward: that of
this copy, or that of a judge who checks the answer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import re
import textwrap
from dataclasses import dataclass
from typing import NamedTuple

from shared import (
    COLOURS,
    figure,
    judge,
    output_folder,
    parse_args,
    read_jsonl,
    read_text,
    require,
    save_figure,
    save_metrics,
)

WIDTH = 800  # of the figure, in pixels
HEIGHT = 956
LINE = 19  # distance between two lines of text, in pixels


@dataclass
class Config:
    out: str = ""  # output folder; empty: out/ beside this script


class World(NamedTuple):
    """The files of data/stories that the picture speaks of."""

    text: str  # train.txt
    instructions: list
    held_out: list  # instructions for validation
    pairs: list
    facts: dict


class Row(NamedTuple):
    """One text in a box."""

    label: str
    text: str
    in_loss: bool  # is the loss computed on this text?


class Stage(NamedTuple):
    """One box of the picture."""

    title: str
    data: str  # what the stage learns from
    rows: list
    formula: str
    file: str  # what the stage leaves


def read_world(folder):
    return World(
        text=read_text(folder / "train.txt"),
        instructions=read_jsonl(folder / "instructions.jsonl", ["instruction", "output", "task"]),
        held_out=read_jsonl(folder / "instructions_val.jsonl", ["instruction", "task"]),
        pairs=read_jsonl(folder / "preferences.jsonl", ["prompt", "chosen", "rejected"]),
        facts=json.loads(read_text(folder / "facts.json")),
    )


def obeys(record):
    """Does the demonstration do all that its instruction asks for?"""
    return judge(record, record["output"]).passed


def count(world):
    """The numbers in the picture, counted from the files themselves: {name: number}."""
    documents = [part for part in world.text.split("\n\n") if part.strip()]
    stories = [record for record in world.instructions if record["task"] == "story"]

    # In a world of so few words, a trained tokenizer makes about one token of each word and mark.
    tokens = re.findall(r"\w+|[^\w\s]", world.text)

    right_stories = sum(obeys(record) for record in stories)
    right_labels = sum(pair["gap"] > 0 for pair in world.pairs)
    return {
        "documents": len(documents),
        "bytes": len(world.text.encode()),
        "tokens": len(tokens),
        "distinct_tokens": len(set(tokens)),
        "true_nats_per_byte": world.facts["true_nats_per_byte"],
        "instructions": len(world.instructions),
        "story_instructions": len(stories),
        "demonstrations_right": right_stories / len(stories),
        "pairs": len(world.pairs),
        "labels_right": right_labels / len(world.pairs),
        "bayes_accuracy": world.facts["bayes_accuracy"],
    }


def short_story(world):
    """The shortest document that has a brief above its story."""
    documents = [part for part in world.text.split("\n\n") if part.startswith("Write")]
    return min(documents, key=len).strip()


def right_demonstration(world):
    """The first demonstration of a story that obeys its brief."""
    for record in world.instructions:
        if record["task"] == "story" and obeys(record):
            return record


def clear_pair(world):
    """A pair in which both answers are whole stories of about two lines, and the chosen one is
    better by two checks."""
    story = re.compile(r"(One day,|Once there was|Long ago,) a .* named .*\.")
    candidates = []
    for pair in world.pairs:
        if pair["gap"] == 2 and story.fullmatch(pair["rejected"]):
            candidates.append(pair)

    def distance_from_two_lines(pair):
        return abs(len(pair["chosen"]) - 165) + abs(len(pair["rejected"]) - 165)

    return min(candidates, key=distance_from_two_lines)


def hard_prompt(world):
    """The shortest brief of the highest level among those held out."""
    prompts = []
    for record in world.held_out:
        if record["task"] == "story" and record["level"] == 3:
            prompts.append(record["instruction"])
    return min(prompts, key=len)


def make_stages(world, numbers):
    """The five boxes, each with an example from the data -> [Stage]."""
    raw = Stage(
        title="Raw text",
        data=f"Part 0: {numbers['documents']:,} documents, {numbers['tokens']:,} tokens, "
        f"{numbers['distinct_tokens']} different ones",
        rows=[Row("", line, False) for line in short_story(world).split("\n")],
        formula="No model can get below the entropy of the text, "
        f"{numbers['true_nats_per_byte']:.3f} nats per byte",
        file="data/stories/train.txt",
    )

    story = short_story(world).split("\n")[1]
    words = story.split()
    pretraining = Stage(
        title="Pretraining",
        data="Parts 2 to 5: the next token, at every position",
        rows=[
            Row("reads", " ".join(words[:9]), False),
            Row("predicts", " ".join(words[1:10]), True),
        ],
        formula=r"$L = -\frac{1}{T}\,\sum_t\ \log\,p(x_{t+1}\,|\,x_{\leq t})$",
        file="part_4/out/base.pt",
    )

    demonstration = right_demonstration(world)
    tuning = Stage(
        title="Instruction tuning (SFT)",
        data=f"Part 6: {numbers['instructions']:,} demonstrations; "
        f"{numbers['demonstrations_right']:.0%} of the stories obey their prompt",
        rows=[
            Row("prompt", demonstration["instruction"], False),
            Row("answer", demonstration["output"], True),
        ],
        formula=r"$L = -\frac{1}{|answer|}\,\sum_{t\,\in\,answer}\ "
        r"\log\,p(x_t\,|\,prompt,\,x_{<t})$",
        file="part_6/out/sft.pt",
    )

    pair = clear_pair(world)
    reward = Stage(
        title="Reward model",
        data=f"Part 7: {numbers['pairs']:,} pairs; "
        f"{numbers['labels_right']:.0%} of the labels prefer the better answer",
        rows=[
            Row("prompt", pair["prompt"], False),
            Row("chosen", pair["chosen"], True),
            Row("rejected", pair["rejected"], True),
        ],
        formula=r"$L = -\log\,\sigma(\,r_{chosen} - r_{rejected}\,)$",
        file="part_7/out/rm.pt",
    )

    reinforcement = Stage(
        title="REINFORCE, PPO and GRPO",
        data=f"Parts 8 and 9: {numbers['story_instructions']:,} prompts; "
        "the model writes the answers itself",
        rows=[
            Row("prompt", hard_prompt(world), False),
            Row(
                "answer",
                "sampled from the model; the reward model (GRPO: the judge) gives it the reward r",
                True,
            ),
            Row("A", r"REINFORCE: $r - \beta\,KL$, minus the mean;  $L = -A\,\log\,p$", False),
            Row("", r"PPO: $r - \beta\,KL$, minus the value that a critic expects", False),
            Row("", r"GRPO: $r$, minus the mean over the answers to the same prompt", False),
        ],
        formula=r"PPO, GRPO:  $L = -\min(\,\rho A,\ "
        r"clip(\rho,\,1\!-\!\epsilon,\,1\!+\!\epsilon)\,A\,)$",
        file="part_8/out/ppo.pt, part_9/out/grpo.pt",
    )
    return [raw, pretraining, tuning, reward, reinforcement]


def draw_box(ax, top, colour, stage):
    """One stage as a box below y = top, in pixels -> the y of its lower edge."""
    from matplotlib.patches import FancyBboxPatch

    # A long text takes several lines, and its label stands beside the first.
    lines = []
    for row in stage.rows:
        for number, text in enumerate(textwrap.wrap(row.text, 95)):
            label = row.label if number == 0 else ""
            lines.append(Row(label, text, row.in_loss))

    height = 46 + LINE * len(lines) + 44
    bottom = top - height
    box = FancyBboxPatch(
        (10, bottom),
        WIDTH - 20,
        height,
        boxstyle="round,pad=0,rounding_size=9",
        edgecolor=colour,
        facecolor="white",
        linewidth=2,
    )
    ax.add_patch(box)

    # From top to bottom: the title and the data, the examples, the formula and the file.
    right = WIDTH - 24
    ax.text(24, top - 18, stage.title, weight="bold", size=12.5, color=colour, va="center")
    ax.text(right, top - 18, stage.data, size=9.5, ha="right", va="center")

    for number, line in enumerate(lines):
        y = top - 45 - LINE * number
        text_colour = colour if line.in_loss else "black"
        ax.text(24, y, line.label, size=9.5, style="italic", color="gray", va="center")
        ax.text(90, y, line.text, size=9.5, color=text_colour, va="center")

    formula_size = 11 if "$" in stage.formula else 9.5
    ax.text(24, bottom + 24, stage.formula, size=formula_size, va="center")
    ax.text(right, bottom + 24, stage.file, size=9, family="monospace", ha="right", va="center")
    return bottom


def draw(stages, path):
    """The five boxes below each other, with arrows between them."""
    title = "One network, five stages. The loss is computed on the coloured text."
    fig, ax = figure(title, height=HEIGHT / 100)  # 100 pixels per inch
    fig.set_layout_engine("none")
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), position=(0, 0, 1, 1))  # 1 pixel is 1 unit
    ax.axis("off")

    colours = ["#555555", COLOURS[0], COLOURS[3], COLOURS[2], COLOURS[4]]
    arrow = {"arrowstyle": "-|>", "lw": 2, "color": "gray"}
    gap = 24
    top = HEIGHT - 42
    for stage, colour in zip(stages, colours):
        if stage is not stages[0]:
            ax.annotate("", (WIDTH / 2, top + 2), (WIDTH / 2, top + gap - 1), arrowprops=arrow)
        top = draw_box(ax, top, colour, stage) - gap
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    out = output_folder(cfg)

    world = read_world(require("data/stories"))
    numbers = count(world)
    draw(make_stages(world, numbers), out / "demo_pipeline.png")
    save_metrics(out, name="demo_pipeline", **numbers)

    for name, value in numbers.items():
        text = f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
        print(f"{name:22} {text}")
