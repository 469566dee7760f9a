"""
Part 9 - one SFT checkpoint, five ways to better answers: best-of-n, DPO, PPO, GRPO by reward model, GRPO by judge.

    python part_9/demo_methods.py --seeds=3

PPO and both GRPOs write equally many answers; best-of-n writes as many, to the held-out prompts, and keeps what the
reward model likes best; DPO writes none, and has the seconds of GRPO by judge. Only that judge is gold itself. Runs are
half of the scripts' defaults or less. Memory is the process's peak, its program included. Best-of-n's KL is a bound,
log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3). Intervals are Wilson's (1927).
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import subprocess
import time
from dataclasses import dataclass
from resource import RUSAGE_SELF, getrusage

import torch

import train_dpo
import train_grpo as g
from model import GPT
from shared import ROOT, as_json, cli, figure, load_checkpoint, read_jsonl, require, save_figure, save_metrics, setup
from tokenizer import Tokenizer

PANELS = {"gold": "share, with 95 % interval", "kl": "nats per answer", "seconds": "s", "memory": "MB, peak"}
SCRIPTS = {"PPO": ("part_8/train_ppo.py", {}), "GRPO, model": ("part_9/train_grpo.py", {"reward": "model"}),
           "GRPO, judge": ("part_9/train_grpo.py", {}), "DPO": ("part_9/train_dpo.py", {"eval_every": 9999})}
MB = (1 if sys.platform == "darwin" else 1024) / 1e6  # of ru_maxrss: bytes there, else kilobytes
# a small process in between, because a child's peak begins with that of the process which starts it
PEAK = ("import subprocess, sys; from resource import RUSAGE_CHILDREN, getrusage; code = subprocess.call(sys.argv[1:], "
        "stdout=2); print(getrusage(RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)")

@dataclass
class Config:
    init: str = ""  # the SFT model's checkpoint; "": part_6/out/sft.pt
    rm: str = ""  # the reward model's checkpoint; "": part_7/out/rm.pt
    steps: int = 16  # iterations of PPO and of GRPO
    batch_size: int = 128  # answers per iteration
    prompts: int = 256  # held-out stories that every method answers
    seed: int = 0
    seeds: int = 1  # how many seeds; the README quotes 3
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def wilson(p, n, z=1.96):
    """A share p of n -> the ends of its interval. 0 of 10 -> (0, .28): unlike p +- z sd it is never a point."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

def best_of_n(policy, tok, records, n, score, run, device):
    """The best of n answers to each record -> gold, tokens that were sampled."""
    asked, scores, answers, tokens = [r for r in records for _ in range(n)], [], [], 0
    for i in range(0, len(asked), 128):
        batch = g.rollout(policy, policy, tok, asked[i:i + 128], run, device)
        answers += g.texts(batch, tok)
        scores.append(score(asked[i:i + 128], batch, None))
        tokens += batch["mask"].sum().item()
    best = torch.cat(scores).view(-1, n).argmax(dim=1).tolist()
    return g.judged(records, [answers[i * n + j] for i, j in enumerate(best)]).mean().item(), tokens

def launch(script, out, device, **options):
    """A train script in a process of its own -> its policy, seconds, peak MB, tokens that were sampled."""
    options = [f"--{key}={value}" for key, value in {"out": out, "device": device.type, **options}.items()]
    child = [sys.executable, "-c", PEAK, sys.executable, str(ROOT / script), *options]
    done = subprocess.run(child, stdout=subprocess.PIPE, text=True)  # what it prints goes to stderr
    done.returncode == 0 or sys.exit(done.returncode)  # it has said why
    checkpoint, metrics, log = (next(out.glob(f"*.{kind}")) for kind in ("pt", "json", "jsonl"))
    made, lengths = load_checkpoint(checkpoint, None), [r.get("length", 0) for r in read_jsonl(log, ["step"])]
    tokens = round(sum(lengths) * made["config"]["batch_size"])  # from the rollouts' mean lengths; DPO has none
    return GPT.load(made).to(device), json.loads(metrics.read_text())["seconds"], int(done.stdout) * MB, tokens

def steps_within(seconds, model, tok, device):
    """How many of train_dpo.py's steps take so long, from five of them."""
    knobs = train_dpo.Config()
    pairs = train_dpo.load_data(knobs, tok, model.cfg.block_size)[0][:knobs.batch_size]
    train_dpo.reference_logp(model, pairs, device)
    start = time.time()
    for _ in range(5):
        train_dpo.loss_of(model, pairs, knobs.beta, device)[0].backward()
    return max(1, round(5 * seconds / (time.time() - start)))

def draw(rows, n, said, path):
    """rows: {method: [numbers in the order of PANELS, and tokens; one tuple per seed]}."""
    fig, axes = figure(said, rows=2, columns=2, height=6.5)
    for j, (ax, key) in enumerate(zip(axes.flat, PANELS)):
        for i, (name, row) in enumerate(rows.items()):
            mean = sum(r[j] for r in row) / len(row)
            ax.barh(name, mean, color="gray" if name == "SFT" else f"C{i - 1}")
            ax.plot([r[j] for r in row], [name] * len(row), "k.")  # a dot per seed
            ax.plot(wilson(mean, n) if key == "gold" else [], [name] * (2 * (key == "gold")), "k-")
        ax.invert_yaxis()
        ax.set(title=key, xlabel=PANELS[key])
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    paths = {"init": cfg.init or require("part_6/out/sft.pt"), "rm": cfg.rm or require("part_7/out/rm.pt")}
    sft, run = load_checkpoint(paths["init"], "sft"), g.Config(reward="model", prompts=cfg.prompts, **paths)
    tok, reference = Tokenizer.load(sft["tokenizer"]), GPT.load(sft).to(device)
    score, splits = g.load_reward(run, tok, device), g.load_data(run, tok, reference.cfg.block_size)
    train, val = ([r for r in records if r["task"] == "story"] for records in splits)
    data, n = Path(cfg.out) / "demo_methods.data", max(1, cfg.steps * cfg.batch_size // len(val))
    data.write_text(as_json(train))
    rows, peak = {name: [] for name in ("SFT", f"best of {n}", *SCRIPTS)}, 0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        torch.manual_seed(seed)
        gold = g.evaluate(reference, reference, tok, val, run, device)[0]["story"]
        rows["SFT"].append((gold, 0.0, 0.0, 0.0, 0))
        start, (gold, tokens) = time.time(), best_of_n(reference, tok, val, n, score, run, device)
        peak = peak or getrusage(RUSAGE_SELF).ru_maxrss * MB  # later it would be that of all before it
        rows[f"best of {n}"].append((gold, math.log(n) - (n - 1) / n, time.time() - start, peak, tokens))
        for name, (script, more) in SCRIPTS.items():
            knobs = {"init": paths["init"], "steps": cfg.steps, "seed": seed, "prompts": 8, **more}
            if name == "DPO":
                knobs["steps"] = steps_within(rows["GRPO, judge"][-1][2], GPT.load(sft).to(device), tok, device)
            else:
                knobs |= {"rm": paths["rm"], "data": data, "batch_size": cfg.batch_size}
            policy, *costs = launch(script, Path(cfg.out) / f"demo_methods.{name}.{seed}", device, **knobs)
            torch.manual_seed(seed)  # the same random numbers behind every policy's answers
            gold, kl, _ = g.evaluate(policy, reference, tok, val, run, device)
            rows[name].append((gold["story"], kl, *costs))

    # what it says
    mean = {name: [sum(x) / len(x) for x in zip(*row)] for name, row in rows.items()}
    ends = {name: wilson(x[0], len(val)) for name, x in mean.items()}
    print(f"{'':12}  gold  95 % interval     KL  seconds  MB peak  tokens sampled")
    for name, (gold, *x) in mean.items():
        print("{:12} {:5.3f}  {:.3f} to {:.3f} {:6.2f} {:8.1f} {:8.0f} {:15,.0f}".format(name, gold, *ends[name], *x))
    first, second, *_ = sorted(set(rows) - {"SFT", "GRPO, judge"}, key=lambda name: -mean[name][0])
    link = "no difference from" if ends[first][0] <= ends[second][1] else "ahead of"
    said = (f"Gold: SFT {mean['SFT'][0]:.2f}, GRPO by the judge {mean['GRPO, judge'][0]:.2f}; "
            f"without it\n{first} {mean[first][0]:.2f}, {link} {second} {mean[second][0]:.2f}")
    print(said)
    save_metrics(cfg, name="demo_methods", columns=[*PANELS, "tokens"], **rows, gold_intervals=ends, prompts=len(val))
    draw(rows, len(val), said, Path(cfg.out) / "demo_methods.png")
