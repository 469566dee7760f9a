"""
Part 6 - what instruction tuning taught: which tasks and levels the SFT model passes, and which checks its answers fail.

    python part_6/demo_gold.py
    python part_6/demo_gold.py --temperature=0     greedy answers instead of samples

The world knows the truth of every answer, so shared.judge is the gold score: an answer passes when all its checks hold.
Of the demonstrations' stories seven in ten are wrong on purpose. SFT maximises the likelihood of its demonstrations, so
sampled at temperature 1 it can at best be as good as they are: their own score stands beside the model's.
Bars carry 95 % intervals of a share (Wilson 1927); the demonstrations are those that the model was trained on.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from model import GPT
from shared import cli, fail, figure, judge, load_checkpoint, require, save_figure, save_metrics, setup
from tokenizer import Tokenizer
from train_sft import load_data, respond

@dataclass
class Config:
    init: str = "part_6/out/sft.pt"  # a checkpoint of train_sft.py
    data: str = "stories"  # or the path of a JSONL file with instruction, input, output and check
    prompts: int = 512  # held-out stories that are answered, and as many other tasks
    examples: int = 2  # right and wrong answers that are printed per task
    temperature: float = 1.0  # of the samples; 0: greedy
    max_new_tokens: int = 72  # longest answer, in tokens
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def failures(record, text, ended=True):
    """The names of the checks that an answer fails, [] where it passes."""
    return [name for name, held in judge(record, text, ended)[0].items() if not held]

def group(records, failed):
    """The failed checks of each record -> {(task, level): [passed, ...]}, {check of a story: share that fails it}."""
    passed, stories = defaultdict(list), defaultdict(list)
    for r, names in zip(records, failed):
        passed[r.get("task", "story"), r.get("level", 0)].append(not names)
        if r.get("task", "story") == "story":
            kinds = {name.split(":")[0] for name in names}
            for kind in ("has", "ends", "agree", "patterns", "no_repeat", "end"):
                stories[kind].append(kind in kinds)
    return passed, {kind: float(np.mean(v)) for kind, v in stories.items()}

def wilson(k, n, z=1.96):
    """The 95 % interval of a share, k of n (Wilson 1927): sensible at 0 and 1 too."""
    centre, half = k + z * z / 2, z * (k * (n - k) / n + z * z / 4) ** 0.5
    return (centre - half) / (n + z * z), (centre + half) / (n + z * z)

def show(records, texts, failed, n):
    """Prints n right and n wrong answers of each task, the wrong ones with what they fail."""
    for task in sorted({r.get("task", "story") for r in records}, key=lambda t: (t != "story", t)):
        for right in (True, False):
            rows = [i for i, r in enumerate(records) if r.get("task", "story") == task and right == (not failed[i])]
            for i in rows[:n]:
                asked = " / ".join(filter(None, (records[i]["instruction"], records[i]["input"])))
                print(f"\n{task}, {'right' if right else 'wrong'}: {asked}\n  -> {texts[i][0]}")
                right or print(f"  fails {', '.join(failed[i])}" + (f"; wanted {records[i]['check']['answer']}"
                                                                   if "answer" in records[i]["check"] else ""))

def draw(passed, teachers, checks, teachers_checks, said, path):
    """Left: a bar per task and level, and the demonstrations' own share. Right: the checks that stories fail."""
    keys = sorted(passed, key=lambda key: (key[0] == "story", key[0], -key[1]))
    tasks = list(dict.fromkeys(task for task, _ in keys))
    y = np.arange(len(keys)) + [0.8 * tasks.index(task) for task, _ in keys]  # a space between tasks
    share = np.array([np.mean(passed[key]) for key in keys])
    ends = np.array([wilson(sum(passed[key]), len(passed[key])) for key in keys]).T
    fig, (left, right) = figure(said, columns=2, height=6)
    left.barh(y, share, xerr=np.abs(ends - share), color="C2", error_kw={"elinewidth": 1}, label="SFT model")
    left.plot([np.mean(teachers.get(key, np.nan)) for key in keys], y, "kd", markersize=4, label="its demonstrations")
    left.set_yticks(y, [f"{task} {level}" for task, level in keys], fontsize=8)
    left.set(xlabel="share of answers that pass", ylabel="task and level", xlim=(-0.02, 1.05))
    left.legend(fontsize=8, loc="center", bbox_to_anchor=(0.66, 0.62))  # between the intervals and the diamonds
    kinds = sorted(checks, key=checks.get)
    right.barh(range(len(kinds)), [checks[kind] for kind in kinds], color="C3", label="SFT model")
    right.plot([teachers_checks[kind] for kind in kinds], range(len(kinds)), "kd", label="its demonstrations")
    right.set_yticks(range(len(kinds)), kinds)
    right.set(xlabel="share of stories that fail the check", ylabel="check")
    right.legend(fontsize=8, loc="lower right")
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    checkpoint = load_checkpoint(require(cfg.init), "sft")
    model, tok = GPT.load(checkpoint).to(device), Tokenizer.load(checkpoint["tokenizer"])
    train, val = ([r for r in part if "check" in r] for part in load_data(cfg, tok, model.cfg.block_size))
    train and val or fail(f"--data={cfg.data}: no record has a check, so nothing can be judged")
    stories = [r for r in val if r.get("task", "story") == "story"][:cfg.prompts]
    records = stories + [r for r in val if r.get("task", "story") != "story"][:cfg.prompts]

    # answers
    texts = [(tok.decode(ids), ended) for ids, ended in respond(model, tok, records, cfg, cfg.temperature)]
    failed = [failures(r, *text) for r, text in zip(records, texts)]
    show(records, texts, failed, cfg.examples)
    passed, checks = group(records, failed)
    teachers, teachers_checks = group(train, [failures(r, r["output"]) for r in train])

    # numbers
    total = {}
    for who, table in (("model", passed), ("demonstrations", teachers)):
        for kind in ("story", "skill"):
            held = [p for (task, _), v in table.items() if (task == "story") == (kind == "story") for p in v]
            total[f"{who}_{kind}"], total[f"{who}_{kind}_n"] = float(np.mean(held)) if held else float("nan"), len(held)
    print("\ntask, level            passes            of   demonstrations")
    for (task, level), held in sorted(passed.items()):
        low, high = wilson(sum(held), len(held))
        own = np.mean(teachers.get((task, level), np.nan))
        print(f"{task:10} {level}  {np.mean(held):7.3f} ({low:.2f} to {high:.2f}) {len(held):5}   {own:.3f}")
    n = total["model_story_n"]
    low, high = wilson(total["model_story"] * n, n) if n else (0, 1)
    other = total["demonstrations_story"]
    verdict = "worse than" if high < other else "better than" if low > other else "no different from"
    said = (f"Stories that pass: {total['model_story']:.2f}, {verdict} the demonstrations' {other:.2f};\n"
            f"other tasks {total['model_skill']:.2f}, demonstrations {total['demonstrations_skill']:.2f}")
    print("\n" + said)
    draw(passed, teachers, checks, teachers_checks, said, Path(cfg.out) / "demo_gold.png")
    save_metrics(cfg, name="demo_gold", **total, temperature=cfg.temperature, seed=cfg.seed,
                 **{f"{task}_level_{level}": np.mean(v) for (task, level), v in sorted(passed.items())},
                 **{f"fails_{kind}": v for kind, v in checks.items()})
