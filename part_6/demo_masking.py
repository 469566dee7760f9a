"""
Part 6 - what the loss counts: answers alone or prompts too, on short and on long answers; the end token in it or not.

    python part_6/demo_masking.py
    python part_6/demo_masking.py --seeds=3

Six short trainings from the base model. With the prompt in the loss, its tokens share the gradient with the answer's:
that is most of a short answer's loss and a third of a story's. Masking is the custom, not a law: Shi et al. 2024
("Instruction Tuning With Loss Over Instructions") find the opposite for few examples with short answers.
The end token is one label of many, and the only one that teaches to stop.
Reduced: 100 steps of 32 instead of 400, and one model per kind of answer.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass

import numpy as np
import torch

from model import GPT
from shared import Log, cli, fail, figure, judge, load_checkpoint, require, save_figure, save_metrics, setup
from tokenizer import Tokenizer
from train_sft import Config as SFTConfig, evaluate, get_batch, load_data, lr_scale, make_optimizers, order, respond

ARMS = ["answers only", "prompts too", "without the end token"]

@dataclass
class Config:
    init: str = "part_4/out/base.pt"  # the base model's checkpoint
    data: str = "stories"  # or the path of a JSONL file with instruction, input, output and check
    short: int = 16  # an answer of at most so many tokens is short
    block_size: int = 128  # longest prompt and answer, in tokens
    steps: int = 100  # optimizer steps per training
    batch_size: int = 32  # demonstrations per step
    prompts: int = 256  # held-out answers of each kind that are sampled and judged
    seeds: int = 1  # how many seeds; the README quotes 3
    seed: int = 0  # the first of them
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script
    def __post_init__(self):
        assert min(self.steps, self.batch_size, self.prompts, self.seeds) > 0, "steps, batch_size, prompts, seeds: >= 1"

def relabel(records, arm):
    """The same tokens. get_batch labels what stands under "answer"; nothing could predict the first token."""
    if arm != "prompts too":
        return records
    return [{"prompt": r["prompt"][:1], "answer": r["prompt"][1:] + r["answer"]} for r in records]

def batch(records, step, sft, arm, end):
    """One step's x (B, T) and labels (B, T), -100 where the loss does not look."""
    x, y = get_batch(records, step, sft)
    return x, y.masked_fill(y == end, -100) if arm == "without the end token" else y

def train(model, records, arm, sft, end, device, autocast, log, first):
    """SFT of `model`, in place, with the labels of `arm`."""
    optimizers, records = make_optimizers(model, sft), relabel(records, arm)
    for step in range(sft.steps):
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * lr_scale(step, sft)
        x, y = batch(records, step, sft, arm, end)
        with autocast():
            loss = model(x.to(device), y.to(device))[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), sft.grad_clip)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        log(first + step, arm=arm, loss=loss.item())

def score(model, tok, records, sft, prompts, device, autocast):
    """-> nats per held-out answer token, share of sampled answers that pass, share that end."""
    asked = [r for r in records if "check" in r][:prompts]
    answers = respond(model, tok, asked, sft)
    passed = [judge(r, tok.decode(ids), ended)[2] for r, (ids, ended) in zip(asked, answers)]
    return evaluate(model, records, sft, device, autocast), np.mean(passed), np.mean([ended for _, ended in answers])

def difference(a, b):
    """Two arms, a value per seed -> words: b's mean minus a's, or that the seeds do not agree on its sign."""
    d = np.subtract(b, a)
    return f"{d.mean():+.3f} nats" if (d > 0).all() or (d < 0).all() else "no difference"

def draw(found, said, path):
    """found (seeds, short or long, arm, measure): bars of the means, a dot per seed."""
    fig, axes = figure(said, columns=3, height=4.4)
    drawn, panels = {}, [("nats per answer token, held out", [0, 1]),
                         ("share of answers that pass", [0, 1]),
                         ("share of answers that end", [0, 2])]
    for measure, (ax, (label, arms)) in enumerate(zip(axes, panels)):
        for i, arm in enumerate(arms):
            x = np.arange(2) + 0.4 * i - 0.2
            drawn[ARMS[arm]] = ax.bar(x, found[:, :, arm, measure].mean(axis=0), 0.38, color=f"C{arm}", alpha=0.8)
            ax.plot(np.tile(x, (len(found), 1)), found[:, :, arm, measure], "k.", markersize=4)
            for at, value in zip(x, found[:, :, arm, measure].mean(axis=0)):
                ax.annotate(f"{value:.2f}", (at, value), ha="center", va="bottom", fontsize=8)
        top = max(0.1, 1.15 * found[:, :, arms, measure].max())
        ax.set(xlabel="answers", ylabel=label, ylim=(0, top), xticks=[0, 1], xticklabels=["short", "long"])
    fig.legend(drawn.values(), drawn, title="the loss counts", loc="outside lower center", ncols=3)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, autocast = setup(cfg)
    base = load_checkpoint(require(cfg.init), "base")
    tok = Tokenizer.load(base["tokenizer"])
    base["gpt_config"]["block_size"] = cfg.block_size
    splits = load_data(cfg, tok, cfg.block_size)
    kinds = [[[r for r in part if (len(r["answer"]) <= cfg.short) == short] for part in splits] for short in (1, 0)]
    for name, (demos, val) in zip(("short", "long"), kinds):
        demos and any("check" in r for r in val) or fail(f"--short={cfg.short}: no {name} answers with a check")
        share = sum(len(r["answer"]) for r in demos) / sum(len(r["prompt"]) + len(r["answer"]) - 1 for r in demos)
        print(f"{name}: {len(demos):,} demonstrations, {share:.0%} of their labels are the answer's")

    # six trainings per seed: the same base, the same batches
    log = Log(cfg, 6 * cfg.seeds * cfg.steps, name="demo_masking")
    found = np.zeros((cfg.seeds, 2, 3, 3))
    for i, (seed, kind, arm) in enumerate(np.ndindex(cfg.seeds, 2, 3)):
        sft = SFTConfig(steps=cfg.steps, batch_size=cfg.batch_size, seed=cfg.seed + seed)
        demos, val = kinds[kind]
        model = GPT.load(base).to(device)
        demos = [demos[j] for j in order(demos, sft)]
        train(model, demos, ARMS[arm], sft, tok.special["<|end|>"], device, autocast, log, i * cfg.steps)
        torch.manual_seed(sft.seed)  # the arms draw the same random numbers
        found[seed, kind, arm] = score(model, tok, val, sft, cfg.prompts, device, autocast)

    # what came out
    print("answers  the loss counts          nats/token  pass   end")
    for kind, arm in np.ndindex(2, 3):
        means = found[:, kind, arm].mean(axis=0)
        print(f"{('short', 'long')[kind]:8} {ARMS[arm]:24} {means[0]:9.3f} {means[1]:6.3f} {means[2]:6.3f}")
    short, long = (difference(found[:, kind, 0, 0], found[:, kind, 1, 0]) for kind in (0, 1))
    ended, not_ended, one = found[:, :, 0, 2].mean(), found[:, :, 2, 2].mean(), " (one seed)" * (cfg.seeds == 1)
    said = (f"Prompts in the loss too: short answers {short}, long answers {long};\n"
            f"answers that end: {ended:.2f}; without the end token in the loss {not_ended:.2f}{one}")
    print(said)
    draw(found, said, Path(cfg.out) / "demo_masking.png")
    numbers = {f"{('short', 'long')[kind]} {ARMS[arm]} {name}".replace(" ", "_"): found[:, kind, arm, m].tolist()
               for kind, arm in np.ndindex(2, 3) for m, name in enumerate(("nats", "pass", "end"))}
    save_metrics(cfg, name="demo_masking", **numbers, steps=cfg.steps, seeds=cfg.seeds, seed=cfg.seed)
