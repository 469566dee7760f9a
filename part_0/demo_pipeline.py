"""
Part 0 - the whole way in one picture: what each stage eats, what it minimises, and which file it leaves.

    python part_0/demo_pipeline.py      data/stories -> part_0/out/demo_pipeline.png and .json

The same network all along. Only the data and the loss change: next tokens of any text, then of good answers, then which
of two answers is better, then its own answers, weighted by what the reward model thinks of them.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import re
import textwrap
from dataclasses import dataclass

from shared import COLOURS, cli, figure, judge, read_jsonl, read_text, require, save_figure, save_metrics, setup


@dataclass
class Config:
    out: str = ""  # "": out/ beside this script


def count(text, instructions, pairs, facts):
    """What there is, counted from the files themselves."""
    stories = [r for r in instructions if r["task"] == "story"]
    tokens = re.findall(r"\w+|[^\w\s]", text)  # words and marks: about what a tokenizer makes of so few words
    return {
        "stories": len([part for part in text.split("\n\n") if part.strip()]), "bytes": len(text.encode()),
        "tokens": len(tokens), "distinct_tokens": len(set(tokens)), "true_nats_per_byte": facts["true_nats_per_byte"],
        "instructions": len(instructions), "story_instructions": len(stories),
        "demonstrations_right": sum(judge(r, r["output"])[2] for r in stories) / len(stories),
        "pairs": len(pairs), "labels_right": sum(p["gap"] > 0 for p in pairs) / len(pairs),
        "bayes_accuracy": facts["bayes_accuracy"],
    }


def examples(text, instructions, pairs, held_out):
    """One short, real record per stage."""
    story = min((s for s in text.split("\n\n") if s.startswith("Write")), key=len)
    words = story.strip().split("\n")[1].split()
    demonstration = next(r for r in instructions if r["task"] == "story" and judge(r, r["output"])[2])
    opening = re.compile(r"(One day,|Once there was|Long ago,) a .* named .*\.")
    whole = [p for p in pairs if p["gap"] == 2 and opening.fullmatch(p["rejected"])]
    pair = min(whole, key=lambda p: abs(len(p["chosen"]) - 165) + abs(len(p["rejected"]) - 165))
    prompt = min((r["instruction"] for r in held_out if r["task"] == "story" and r["level"] == 3), key=len)
    return {
        "raw": story.strip().split("\n"), "x": " ".join(words[:9]), "y": " ".join(words[1:10]),
        "demonstration": [demonstration["instruction"], demonstration["output"]],
        "pair": [pair["prompt"], pair["chosen"], pair["rejected"]], "prompt": prompt,
    }


def stages(n, example):
    """(title, what it eats, [(label, text, is it what the loss counts)], formula, file) per box."""
    prompt, answer = example["demonstration"]
    asked, chosen, rejected = example["pair"]
    return [
        ("Raw text", f"Part 0: {n['stories']:,} stories, {n['tokens']:,} tokens, {n['distinct_tokens']} different",
         [("", line, False) for line in example["raw"]],
         f"no loss can get below its entropy, {n['true_nats_per_byte']:.3f} nats per byte", "data/stories/train.txt"),
        ("Pretraining", "Parts 2 to 5: the next token, at every position",
         [("reads", example["x"], False), ("predicts", example["y"], True)],
         r"$L = -\frac{1}{T}\,\sum_t\ \log\,p(x_{t+1}\,|\,x_{\leq t})$", "part_4/out/base.pt"),
        ("Instruction tuning (SFT)", f"Part 6: {n['instructions']:,} demonstrations; of their stories "
         f"{n['demonstrations_right']:.0%} obey", [("prompt", prompt, False), ("answer", answer, True)],
         r"$L = -\frac{1}{|answer|}\,\sum_{t\,\in\,answer}\ \log\,p(x_t\,|\,prompt,\,x_{<t})$", "part_6/out/sft.pt"),
        ("Reward model", f"Part 7: {n['pairs']:,} pairs; {n['labels_right']:.0%} of the labels prefer the better one",
         [("prompt", asked, False), ("chosen", chosen, True), ("rejected", rejected, True)],
         r"$L = -\log\,\sigma(\,r_{chosen} - r_{rejected}\,)$", "part_7/out/rm.pt"),
        ("PPO and GRPO", f"Parts 8 and 9: {n['story_instructions']:,} prompts, no answers: the model writes them",
         [("prompt", example["prompt"], False), ("answer", "sampled from the model; the reward model says r", True),
          ("A", r"PPO: from $r - \beta\,KL$, less a critic's guess.   GRPO: $r$ less the mean of its group", False)],
         r"$L = -\min(\,\rho A,\ clip(\rho,\,1\!-\!\epsilon,\,1\!+\!\epsilon)\,A\,)$",
         "part_8/out/ppo.pt, part_9/out/grpo.pt"),
    ]


def draw_box(ax, top, colour, stage):
    """One stage as a box from y = top downwards, in pixels -> the y of its lower edge."""
    from matplotlib.patches import FancyBboxPatch
    title, eats, rows, formula, file = stage
    lines = [(label if i == 0 else "", line, counts) for label, text, counts in rows
             for i, line in enumerate(textwrap.wrap(text, 95))]
    height = 46 + 19 * len(lines) + 44
    look = {"boxstyle": "round,pad=0,rounding_size=9", "edgecolor": colour, "facecolor": "white", "linewidth": 2}
    ax.add_patch(FancyBboxPatch((10, top - height), 780, height, **look))
    ax.text(24, top - 18, title, weight="bold", size=12.5, color=colour, va="center")
    ax.text(776, top - 18, eats, size=9.5, ha="right", va="center")
    for i, (label, line, counts) in enumerate(lines):
        y = top - 45 - 19 * i
        ax.text(24, y, label, size=9.5, style="italic", color="gray", va="center")
        ax.text(90, y, line, size=9.5, color=colour if counts else "black", va="center")
    ax.text(24, top - height + 24, formula, size=11 if formula.startswith("$") else 9.5, va="center")
    ax.text(776, top - height + 24, file, size=9, family="monospace", ha="right", va="center")
    return top - height


if __name__ == "__main__":
    cfg = cli(Config())
    setup(cfg)

    # the data
    folder = require("data/stories")
    text = read_text(folder / "train.txt")
    instructions = read_jsonl(folder / "instructions.jsonl", ["instruction", "output", "task"])
    held_out = read_jsonl(folder / "instructions_val.jsonl", ["instruction", "task"])
    pairs = read_jsonl(folder / "preferences.jsonl", ["prompt", "chosen", "rejected", "gap"])
    n = count(text, instructions, pairs, json.loads(read_text(folder / "facts.json")))
    boxes = stages(n, examples(text, instructions, pairs, held_out))

    # the figure: in colour what the loss counts
    fig, ax = figure("One network, five stages. In colour: what the loss counts", height=9.2)
    fig.set_layout_engine("none")
    ax.set(xlim=(0, 800), ylim=(0, 920), position=(0, 0, 1, 1))  # data coordinates are pixels
    ax.axis("off")
    y = 875
    for i, (colour, stage) in enumerate(zip(["#555555", *(COLOURS[k] for k in (0, 3, 2, 4))], boxes)):
        bottom = draw_box(ax, y, colour, stage)
        y = bottom - 26
        if i < len(boxes) - 1:
            ax.annotate("", (400, y + 2), (400, bottom - 1), arrowprops={"arrowstyle": "-|>", "lw": 2, "color": "gray"})
    save_figure(fig, Path(cfg.out) / "demo_pipeline.png")
    save_metrics(cfg, "demo_pipeline", **n)
    for name, value in n.items():
        print(f"{name:22} {value:,.3f}" if isinstance(value, float) else f"{name:22} {value:,}")
