"""
Part 8 - what the KL penalty is for: PPO against a weak reward model, with and without it.

    python part_8/demo_kl_penalty.py --seeds=3
    python part_8/demo_kl_penalty.py --pairs=0                Part 7's reward model, which is not weak

A reward model of few pairs is right about what the SFT policy writes and wrong about what PPO finds. Its score goes on
rising while gold falls: over-optimisation. With d = sqrt(KL), Gao, Schulman & Hilton 2022 fit what RL gains of gold by
d (a - b ln d), highest at d = exp(a / b - 1). There a penalty does not lift the curve, PPO only stops earlier on it.
train_rm.py and train_ppo.py run as they are; what is drawn is the answers of PPO's rollouts.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import subprocess
from dataclasses import dataclass

import torch

from shared import ROOT, as_json, cli, figure, read_jsonl, require, save_figure, save_metrics, setup

@dataclass
class Config:
    init: str = ""  # the SFT model's checkpoint; "": part_6/out/sft.pt
    pairs: int = 256  # preferences that the reward model learns from; 0: Part 7's reward model
    rm_steps: int = 60  # steps of its training, 24 pairs each
    betas: str = "0,0.05,0.2"  # KL coefficients, reward lost per nat
    steps: int = 24  # PPO's iterations
    batch_size: int = 64  # answers per iteration
    seed: int = 0
    seeds: int = 1  # how many seeds; the README quotes 3
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def launch(script, out, **knobs):
    """A train script in a process of its own; what it prints goes to stderr."""
    options = [f"--{key}={value}" for key, value in {"out": out, **knobs}.items()]
    done = subprocess.run([sys.executable, str(ROOT / script), *options], stdout=sys.stderr)
    done.returncode == 0 or sys.exit(done.returncode)  # it has said why

def weak_reward_model(cfg, init, seed, folder, device):
    """The path of a reward model of cfg.pairs preferences, drawn by the seed."""
    if cfg.pairs == 0:
        return require("part_7/out/rm.pt")
    records = read_jsonl(require("data/stories") / "preferences.jsonl", ["prompt", "chosen", "rejected"])
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    some = [records[i] for i in order[:math.ceil(cfg.pairs / 0.9)]]  # train_rm.py holds out a tenth
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.jsonl").write_text(as_json(some))
    launch("part_7/train_rm.py", folder, init=init, data=folder / "pairs.jsonl", steps=cfg.rm_steps, seed=seed,
           device=device.type)
    return folder / "rm.pt"

def ppo(cfg, init, rm, beta, seed, folder, device):
    """train_ppo.py with a fixed beta -> d, score and gold of every iteration's answers, (3, steps)."""
    launch("part_8/train_ppo.py", folder, init=init, rm=rm, kl_coef=beta, kl_target=0, score_clip=1e9, prompts=8,
           steps=cfg.steps, batch_size=cfg.batch_size, seed=seed, device=device.type)
    rows = read_jsonl(folder / "log.jsonl", ["step"])
    return torch.tensor([(max(r["kl"], 0.0) ** 0.5, r["reward"], r["gold"]) for r in rows]).T

def fit(d, gain):
    """Least squares of gain = d (a - b ln d) -> a, b, R2."""
    basis = torch.stack([d, -torch.special.xlogy(d, d)], dim=1)
    ab = torch.linalg.lstsq(basis, gain[:, None]).solution[:, 0]
    return *ab.tolist(), 1 - ((basis @ ab - gain).var(correction=0) / gain.var(correction=0)).item()

def summary(curves):
    """(seeds, 3, steps) of one beta -> the fit over all points, the best of gold (its start, if it never rises) and
    where it ends, each a list of seeds; smoothed over 4 iterations."""
    d, gold = curves[:, 0], curves[:, 2]
    smooth = gold.unfold(1, min(4, gold.size(1)), 1).mean(dim=2)
    start = gold[:, :1].mean()
    a, b, r2 = fit(d.flatten(), (gold - start).flatten())
    return {"start": start.item(), "a": a, "b": b, "r2": r2, "best": smooth.max(dim=1).values.clamp(min=start).tolist(),
            "end": smooth[:, -1].tolist(), "kl": (d[:, -1] ** 2).tolist(), "score": curves[:, 1, -1].tolist()}

def finding(found, answers):
    """found: {beta: summary} -> the title. Gold fell if in every seed it lost more than noise, two standard errors of
    a difference between two means of so many answers."""
    said, noise = [], 2 * (2 * 0.25 / answers) ** 0.5
    for beta, of in found.items():
        best, end, kl = (sum(of[key]) / len(of[key]) for key in ("best", "end", "kl"))
        fell = all(b - e > noise for b, e in zip(of["best"], of["end"]))
        rise, fall = f" to {best:.2f}" * (best > of["start"]), f", then {end:.2f}" * fell
        said.append(f"beta {beta:g}: gold {of['start']:.2f}{rise}{fall}, {kl:.1f} nats")
    return "\n".join(said)

def draw(found, curves, pairs, said, path):
    fig, (left, right) = figure(said, "d = square root of KL, nats", columns=2, height=5)
    for i, (beta, of) in enumerate(found.items()):
        d, score, gold = curves[beta].unbind(dim=1)  # (seeds, steps) each
        for ax, y in ((left, score), (right, gold)):
            ax.plot(d.flatten(), y.flatten(), f"C{i}{'osv^'[i % 4]}", markersize=4, label=f"beta {beta:g}")
        line = torch.linspace(0, d.max().item(), 100)
        right.plot(line, of["start"] + of["a"] * line - of["b"] * torch.special.xlogy(line, line), f"C{i}")
    left.set(title=f"reward model of {pairs:,} pairs" if pairs else "Part 7's reward model", ylabel="its score, SD")
    right.set(title="the truth", ylabel="gold, share; lines: d (a - b ln d)", ylim=(0, None))
    left.legend(fontsize=9)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    init, out = Path(cfg.init or require("part_6/out/sft.pt")).resolve(), Path(cfg.out)
    betas, curves = [float(beta) for beta in cfg.betas.split(",")], {}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        rm = weak_reward_model(cfg, init, seed, out / f"demo_kl_penalty.rm.{seed}", device)
        for beta in betas:
            curve = ppo(cfg, init, rm, beta, seed, out / f"demo_kl_penalty.ppo.{beta:g}.{seed}", device)
            curves.setdefault(beta, []).append(curve)
    curves = {beta: torch.stack(each) for beta, each in curves.items()}
    found = {beta: summary(each) for beta, each in curves.items()}

    # what it says
    for beta, of in found.items():
        print(f"beta {beta:g}:", ", ".join(f"{key} {value}" for key, value in of.items()))
    said = finding(found, 4 * cfg.batch_size)
    print(said)
    save_metrics(cfg, name="demo_kl_penalty", pairs=cfg.pairs, seeds=cfg.seeds, seed=cfg.seed, **{
        f"beta {beta:g}: {key}": value for beta, of in found.items() for key, value in of.items()})
    draw(found, curves, cfg.pairs, said, out / "demo_kl_penalty.png")
