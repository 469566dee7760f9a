"""
Part 8 - over-optimisation: the harder one picks by a reward model's score, the less the score means.

    python part_8/demo_overoptimization.py --seeds=3
    python part_8/demo_overoptimization.py --pairs=64,256,1024,12000,0 --prompts=64     smoother, some minutes

Gao, Schulman & Hilton 2022 in small, for best-of-n; demo_kl_penalty.py is about PPO. The best of n answers by a reward
model is log n - (n - 1) / n nats from the policy, without any training. With d = sqrt(KL) the paper fits gold's gain by
d (a - b d), highest at d = a / 2b. All n share one set of samples, and the mean is over all its subsets of n, so the
curve is unbiased (Nakano et al. 2021). Here a reward model trains for seconds, from the SFT policy's trunk.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import train_ppo
from model import GPT, RewardModel
from shared import Log, cli, figure, judge, load_checkpoint, read_jsonl, require, save_figure, save_metrics, setup
from tokenizer import Tokenizer

@dataclass
class Config:
    init: str = "part_6/out/sft.pt"  # the policy that answers, and the trunk of the reward models
    pairs: str = "64,256,1024,0"  # pairs that each reward model sees; 0: Part 7's, of all pairs and the policy's own
    rm_steps: int = 60  # fewest steps of its training, 16 pairs each; with more pairs it is one pass
    prompts: int = 24  # held-out prompts
    samples: int = 256  # answers to each: the largest n
    seed: int = 0
    seeds: int = 1  # how many seeds; the README quotes 3
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def kl_of(n):
    """KL(best of n || policy) in nats, if no two answers score the same."""
    return math.log(n) - (n - 1) / n

def best_of(n, proxy, gold):
    """(P, N) twice -> (P,): gold of the best of n by proxy, over all subsets of n of the N answers.
    Answer i, counted from 0 and the worst, is the best of C(i, n - 1) of the C(N, n) subsets."""
    N = proxy.size(1)
    weight = torch.tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)])
    return gold.gather(1, proxy.argsort(dim=1)) @ weight

def fit(d, gain):
    """Least squares of gain = d (a - b d) -> a, b, R2."""
    basis = torch.stack([d, -d * d], dim=1)
    ab = torch.linalg.lstsq(basis, gain[:, None]).solution[:, 0]
    return *ab.tolist(), 1 - ((basis @ ab - gain).var(correction=0) / gain.var(correction=0)).item()

def train_rm(saved, tok, records, cfg, device):
    """Bradley-Terry: -log sigmoid(r_chosen - r_rejected), one pass or rm_steps."""
    model, n, steps = RewardModel.load(saved).to(device), len(records), max(cfg.rm_steps, len(records) // 16)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    order = [i for _ in range(16 * steps // n + 1) for i in torch.randperm(n).tolist()]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min((step + 1) / 5, 1 - step / steps)
        pairs = [records[i] for i in order[16 * step:16 * step + 16]]
        asked = [train_ppo.encode({"instruction": r["prompt"], "input": ""}, tok) for r in pairs] * 2
        said = [tok.encode(r[side]) + [tok.special["<|end|>"]] for side in ("chosen", "rejected") for r in pairs]
        rows = [torch.tensor(a + b)[:model.cfg.block_size] for a, b in zip(asked, said)]  # the stories' pairs all fit
        starts, lengths = (torch.tensor([len(row) for row in z], device=device) for z in (asked, rows))
        chosen, rejected = model(torch.nn.utils.rnn.pad_sequence(rows, True).to(device), starts, lengths).chunk(2)
        optimizer.zero_grad(set_to_none=True)
        F.softplus(rejected - chosen).mean().backward()
        optimizer.step()
    return model

def answer(policy, tok, record, n, device):
    """n answers to one prompt, as a batch for the reward models, with their gold (n,)."""
    end, start = tok.special["<|end|>"], len(record["prompt"])
    ids, logp = policy.generate(torch.tensor([record["prompt"]] * n, device=device), 72, stop=end, return_logp=True)
    lengths = start + logp.isfinite().sum(dim=1)
    ended = ids.gather(1, lengths[:, None] - 1)[:, 0] == end
    batch = {"ids": ids, "starts": torch.full_like(lengths, start), "lengths": lengths, "ended": ended}
    return {**batch, "gold": torch.tensor([float(judge(record, *said)[2]) for said in train_ppo.texts(batch, tok)])}

@torch.no_grad()
def score(rm, pool):
    """Rewards (P, N) of the pool, in its standard deviations; -2 without an end, as in train_ppo.py."""
    raw = torch.stack([rm(batch["ids"], batch["starts"], batch["lengths"]) for batch in pool])
    return ((raw - raw.mean()) / raw.std()).where(torch.stack([batch["ended"] for batch in pool]), -2.0).cpu()

def summary(proxy, gold, ns):
    """Best-of-n's score and gold (rows, ns), a row per prompt -> their means, the fit, the n where gold is highest,
    what is lost from there to the last n, and two standard errors of that over the rows."""
    d, mean = torch.tensor([kl_of(n) ** 0.5 for n in ns]), gold.mean(dim=0)
    (a, b, r2), lost = fit(d, mean - mean[0]), gold[:, mean.argmax()] - gold[:, -1]
    return {"d": d, "score": proxy.mean(dim=0), "gold": mean, "fit": mean[0] + d * (a - b * d), "a": a, "b": b,
            "r2": r2, "best_n": ns[mean.argmax()], "lost": lost.mean(), "noise": 2 * (lost.var() / len(lost)).sqrt()}

def finding(found):
    """The title: for each reward model where gold is highest, and whether the loss after that is more than noise."""
    said = [f"{name} n = {of['best_n']}" + (f", then -{of['lost']:.3f}{' (noise)' * (of['lost'] <= of['noise'])}" if
            of["lost"] else "") for name, of in found.items()]
    return "Gold is highest at: " + ";\n".join("; ".join(said[i:i + 2]) for i in range(0, len(said), 2))

def draw(found, path):
    fig, axes = figure(finding(found), "d = square root of KL, nats", columns=2, height=4.8)
    for i, (name, of) in enumerate(found.items()):
        axes[0].plot(of["d"], of["score"], f"C{i}.-", label=name)
        axes[1].plot(of["d"], of["gold"], f"C{i}o", markersize=4, label=f"{name}, R2 {of['r2']:.2f}")
        axes[1].plot(of["d"], of["fit"], f"C{i}", linewidth=1)
    for ax, label in zip(axes, ("score, SD of the policy's answers", "gold, share; lines: d (a - b d)")):
        ax.set_ylabel(label)
        ax.legend(fontsize=8)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    saved, sizes = load_checkpoint(require(cfg.init), "sft"), [int(n) for n in cfg.pairs.split(",")]
    last = load_checkpoint(require("part_7/out/rm.pt"), "rm") if 0 in sizes else {}
    policy, tok = GPT.load(saved).to(device), Tokenizer.load(saved["tokenizer"])
    asked = train_ppo.load_data(train_ppo.Config(prompts=cfg.prompts), tok, policy.cfg.block_size)[1]
    records = read_jsonl(require("data/stories") / "preferences.jsonl", ["prompt", "chosen", "rejected"])
    ns, rows = [2 ** i for i in range(cfg.samples.bit_length())], {n: [] for n in sizes}
    log, step = Log(cfg, cfg.seeds * (len(asked) + len(sizes)), name="demo_overoptimization"), itertools.count()
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        torch.manual_seed(seed)
        pool = []
        for record in asked:
            pool.append(answer(policy, tok, record, cfg.samples, device))
            log(next(step))
        gold = torch.stack([batch["gold"] for batch in pool])
        for n in sizes:
            some = [records[k] for k in torch.randperm(len(records))[:n]]
            rm = train_rm(saved, tok, some, cfg, device) if n else RewardModel.load(last, **last["head"]).to(device)
            proxy = score(rm, pool)
            rows[n].append([torch.stack([best_of(m, proxy, z) for m in ns], dim=1) for z in (proxy, gold)])
            log(next(step), pairs=n, gold=rows[n][-1][1].mean(dim=0)[-1].item())
    found = {f"{n:,} pairs" if n else "Part 7's": summary(*map(torch.cat, zip(*rows[n])), ns) for n in sizes}
    draw(found, Path(cfg.out) / "demo_overoptimization.png")
    save_metrics(cfg, name="demo_overoptimization", n=ns, prompts=len(asked), seeds=cfg.seeds, seed=cfg.seed, **{
        f"{name}: {key}": value for name, of in found.items() for key, value in of.items()})
