"""
Part 9 - how large should a group be? 2, 4, 8 or 16 answers per prompt, and the same number of answers in all.

    python part_9/demo_group_size.py --seeds=3

A large group knows its mean better and is less often all alike; a small one sees more prompts. pass@k is the chance
that one of k answers is right: of n with c right, 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, eq. 1). Dividing by the
deviation (Shao et al. 2024) turns up the prompts nearly always or nearly never solved (Liu et al. 2025, section 3.1).
Runs shorter than train_grpo.py's, on stories alone.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
from dataclasses import dataclass

import torch

import train_grpo as g
from model import GPT
from shared import Log, cli, figure, load_checkpoint, require, save_figure, save_metrics, setup
from tokenizer import Tokenizer

RUNS = {str(k): {"group": k} for k in (2, 4, 8, 16)} | {"8, std": {"group": 8, "scale_std": True}}

@dataclass
class Config:
    init: str = ""  # the SFT model's checkpoint; "": part_6/out/sft.pt
    steps: int = 15  # GRPO iterations of each run
    batch_size: int = 128  # answers per iteration, a multiple of 32
    prompts: int = 48  # held-out stories for pass@k
    samples: int = 32  # answers to each of them, a multiple of 8 and at least 16
    seed: int = 0
    seeds: int = 1  # how many seeds; the README quotes 3
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        assert self.samples >= 16 and self.samples % 8 == 0, f"samples={self.samples}: no multiple of 8 from 16 on"

def pass_at(n, c, k):
    """The chance that k of n answers, drawn without putting back, hold one of the c right ones."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def solve(policy, reference, tok, records, cfg, device):
    """cfg.samples answers to each record, the same random numbers for every policy -> 1 or 0, (prompts, samples)."""
    torch.manual_seed(cfg.seed)
    asked, held = [r for r in records for _ in range(cfg.samples)], []
    for i in range(0, len(asked), 128):
        part = asked[i:i + 128]
        held.append(g.judged(part, g.texts(g.rollout(policy, reference, tok, part, g.Config(), device), tok)))
    return torch.cat(held).view(len(records), cfg.samples)

def curve(held):
    """-> pass@1 to pass@16, (16,), and the half-width of pass@1's 95 % interval: over prompts, their answers tell."""
    n, counts = held.size(1), held.sum(dim=1).int().tolist()
    each = torch.tensor([[pass_at(n, c, k) for k in range(1, 17)] for c in counts])  # (prompts, 16)
    return each.mean(dim=0), 1.96 * each[:, 0].std().item() / len(each) ** 0.5

def grpo(sft, reference, tok, records, run, device, log, first, name):
    """A run of train_grpo.py's loop from the SFT model -> policy, mean share of groups that were all alike."""
    policy, alike = GPT.load(sft).to(device), []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.lr, eps=1e-5, weight_decay=0.0)
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    order, n = torch.randperm(len(records), generator=generator).tolist(), run.batch_size // run.group
    for step in range(run.steps):
        optimizer.param_groups[0]["lr"] = run.lr * (1 - step / run.steps)
        asked = [records[order[i % len(order)]] for i in range(step * n, step * n + n) for _ in range(run.group)]
        batch = g.rollout(policy, reference, tok, asked, run, device)
        reward = g.judged(asked, g.texts(batch, tok)).to(device)
        advantages = g.group_advantage(reward, run.group, run.scale_std)
        g.learn(policy, optimizer, batch, advantages, run, generator)
        alike.append((advantages.view(-1, run.group) == 0).all(dim=1).float().mean().item())
        log(first + step, run=name, reward=reward.mean().item(), equal_groups=alike[-1])
    return policy, sum(alike) / len(alike)

def weights(held, scale_std):
    """Groups of 8 from held -> by their number right, (9,): mean |advantage| over the largest, and share of groups;
    and of all weight, the share where 1 or 7 were right."""
    reward = held.view(-1, 8)
    each = g.group_advantage(reward.flatten(), 8, scale_std).view(-1, 8).abs().mean(dim=1)
    count = torch.nn.functional.one_hot(reward.sum(dim=1).long(), 9).float()  # (groups, 9)
    by, n = each @ count, count.sum(dim=0)  # by / n is NaN where no group had so many right
    return by / n / (by / n).nan_to_num().max(), n / n.sum(), ((by[1] + by[7]) / by.sum()).item()

def draw(curves, alike, plain, scaled, said, path):
    """curves: {name: [pass@1..16 of each seed]}; plain, scaled: what weights() gave."""
    fig, ((one, many), (equal, weight)) = figure(said, rows=2, columns=2, height=7.5)
    for i, (name, found) in enumerate(curves.items()):
        mean, colour = torch.stack(found).mean(dim=0), "gray" if name == "SFT" else f"C{i - 1}"
        one.bar(name, mean[0].item(), color=colour)
        one.plot([name] * len(found), [x[0].item() for x in found], "k.")
        many.plot(range(1, 17), mean, color=colour, label=name)
    equal.bar(list(alike), [sum(y) / len(y) for y in alike.values()], color=[f"C{i}" for i in range(len(alike))])
    one.set(title="one answer", xlabel="group size", ylabel="pass@1, held out")
    many.set(title="k answers", xlabel="k", ylabel="pass@k, held out", ylim=(0, 1), xticks=(1, 4, 8, 16))
    many.legend(fontsize=8)
    equal.set(title="groups that teach nothing", xlabel="group size", ylabel="share, all alike")
    weight.plot(range(9), plain[0], "o-", label="reward - mean")
    weight.plot(range(9), scaled[0], "s--", label="over the deviation too")
    weight.bar(range(9), plain[1], color="lightgray", label="share of SFT's groups")
    weight.set(title="a prompt's weight", xlabel="right answers of 8", ylabel="mean |advantage| / largest")
    weight.legend(fontsize=8)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    sft = load_checkpoint(cfg.init or require("part_6/out/sft.pt"), "sft")
    tok, reference = Tokenizer.load(sft["tokenizer"]), GPT.load(sft).to(device)
    splits = g.load_data(g.Config(prompts=cfg.prompts), tok, reference.cfg.block_size)
    train, val = ([r for r in records if r["task"] == "story"] for records in splits)
    found = solve(reference, reference, tok, val, cfg, device)
    y, half = curve(found)
    curves, alike, halves = {"SFT": [y]}, {}, {"SFT": half}
    log = Log(cfg, cfg.seeds * len(RUNS) * cfg.steps, name="demo_group_size")
    for i, (seed, name) in enumerate((s, name) for s in range(cfg.seed, cfg.seed + cfg.seeds) for name in RUNS):
        run = g.Config(steps=cfg.steps, batch_size=cfg.batch_size, seed=seed, **RUNS[name])
        policy, equal = grpo(sft, reference, tok, train, run, device, log, i * cfg.steps, name)
        y, halves[name] = curve(solve(policy, reference, tok, val, cfg, device))
        curves.setdefault(name, []).append(y)
        alike.setdefault(name, []).append(equal)

    # what it says
    plain, scaled = weights(found, False), weights(found, True)
    ends = {}  # each size's pass@1: mean, and its range over seeds, or over prompts where there is one seed
    for name, y in curves.items():
        ones, half = [x[0].item() for x in y], halves[name] * (len(y) == 1)
        ends[name] = (sum(ones) / len(ones), min(ones) - half, max(ones) + half)
        print("{:6}  pass@1 {:.3f}, from {:.3f} to {:.3f};".format(name, *ends[name]),
              f"pass@16 {sum(x[15].item() for x in y) / len(y):.3f}, groups all alike {alike.get(name, [])}")
    best, worst = (pick(list(RUNS)[:4], key=lambda name: ends[name][0]) for pick in (max, min))
    equal = "" if ends[best][1] > ends[worst][2] else " (no difference)"
    said = (f"pass@1: SFT {ends['SFT'][0]:.2f}, groups of {best} {ends[best][0]:.2f}, of {worst} {ends[worst][0]:.2f}"
            f"{equal};\n1 or 7 right of 8: {plain[2]:.0%} of all weight, {scaled[2]:.0%} over the deviation")
    print(said)
    save_metrics(cfg, name="demo_group_size", pass_at_1=ends, alike=alike, weight_of_extremes=[plain[2], scaled[2]],
                 pass_at_16={name: [x[15].item() for x in y] for name, y in curves.items()}, seconds=log.seconds)
    draw(curves, alike, plain, scaled, said, Path(cfg.out) / "demo_group_size.png")
