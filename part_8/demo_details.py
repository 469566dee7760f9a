"""
Part 8 - what PPO's details are worth: each left out in turn, and two bugs that only the ratio check would notice.

    python part_8/demo_details.py
    python part_8/demo_details.py --seeds=3 --steps=40 --batch_size=128 --kl_horizon=4000     as long as train_ppo.py's

Huang et al. 2023 list 37 details of the first PPO for language models. Here some of them are switched off in runs of an
eighth of train_ppo.py's length, all from the same SFT policy and reward model, on the same prompts. Both bugs make the
old log-probability one of another distribution: the first ratio is not 1, and train_ppo.py would have stopped.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass
from statistics import fmean

import torch

import train_ppo
from model import GPT, ActorCritic, RewardModel
from shared import Log, cli, figure, load_checkpoint, require, save_figure, save_metrics, setup
from tokenizer import Tokenizer
from train_ppo import evaluate, gae, learn, load_data, next_kl_coef, rollout, shape_rewards, whiten

@dataclass
class Config:
    init: str = "part_6/out/sft.pt"  # the policy that all runs start from
    rm: str = "part_7/out/rm.pt"  # their reward model
    steps: int = 10  # iterations of a run
    batch_size: int = 64  # answers per iteration
    kl_horizon: float = 500.0  # answers in which the KL controller corrects a full error
    prompts: int = 256  # held-out prompts that are answered at the end
    seeds: int = 1  # how many seeds; the README quotes 3
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

class Cold(ActorCritic):
    """The bug: samples at temperature 0.7, which generate() notes, and is scored at temperature 1."""
    def generate(self, *args, **options):
        return super().generate(*args, temperature=0.7, **options)

class Late(ActorCritic):
    """The bug: scores each token in the state after it, not in the one in which it was chosen."""
    def act(self, idx, mask=...):
        x = self.trunk(idx).roll(-1, dims=1)
        return self.lm_head(x[mask]), self.v_head(x).squeeze(-1)

VARIANTS = {  # name: (class of the policy, knobs of train_ppo.py that differ)
    "all details": (ActorCritic, {}),
    "no KL": (ActorCritic, {"kl_coef": 0.0, "kl_target": 0.0}),
    "fixed KL coefficient": (ActorCritic, {"kl_target": 0.0}),
    "no whitening": (ActorCritic, {}),
    "no value clip": (ActorCritic, {"vf_clip": 1e9}),
    "one epoch": (ActorCritic, {"epochs": 1}),
    "lambda 0.95": (ActorCritic, {"lam": 0.95}),
    "bug: sampled at 0.7": (Cold, {"max_kl": 1e9}),  # max_kl would stop these at their first minibatch
    "bug: scored one late": (Late, {"max_kl": 1e9}),
}

def train(name, saved, reference, rm, tok, prompts, cfg, seed, device):
    """A run of train_ppo.py's loop -> the policy, and its largest first_ratio_error."""
    kind, own = VARIANTS[name]
    knobs = train_ppo.Config(steps=cfg.steps, batch_size=cfg.batch_size, kl_horizon=cfg.kl_horizon, **own)
    torch.manual_seed(seed)
    policy, generator = kind.load(saved).to(device), torch.Generator().manual_seed(seed)
    groups = [{"params": [p], "lr": (knobs.lr, knobs.lr_value)["v_head" in n]} for n, p in policy.named_parameters()]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / cfg.steps)
    beta, errors = knobs.kl_coef, []
    for step in range(cfg.steps):
        asked = [prompts[i] for i in torch.randint(len(prompts), (cfg.batch_size,), generator=generator)]
        batch = rollout(policy, reference, rm, tok, asked, knobs, device)
        rewards = shape_rewards(batch["kl"], batch["score"], batch["mask"], beta)
        advantages, returns = gae(rewards, batch["values"], batch["mask"], batch["last_value"], knobs.gamma, knobs.lam)
        advantages = advantages if name == "no whitening" else whiten(advantages, batch["mask"])
        errors.append(learn(policy, optimizer, batch, advantages, returns, knobs, generator)["first_ratio_error"])
        decay.step()
        if knobs.kl_target:
            beta = next_kl_coef(beta, batch["exact_kl"].mean().item(), knobs.kl_target, len(asked), knobs.kl_horizon)
    return policy, max(errors)

def interval(shares, prompts):
    """Gold of every seed -> (low, high): their range, or of one seed two standard errors over its prompts."""
    error = 2 * (shares[0] * (1 - shares[0]) / prompts) ** 0.5 if len(shares) == 1 else 0
    return min(shares) - error, max(shares) + error

def finding(found, prompts):
    """-> the title: which details move gold by more than the noise, and which runs the ratio check stops."""
    own = {name: interval(of["gold"], prompts) for name, of in found.items()}
    low, high = own["all details"]
    moved = [f"{name} {fmean(found[name]['gold']):.2f}" for name in found
             if not name.startswith("bug") and (own[name][1] < low or own[name][0] > high)]
    stopped = ", ".join(name for name, of in found.items() if max(of["ratio"]) >= 1e-4) or "nothing"
    said = ", ".join(moved) or "no difference beyond the noise"
    return f"Gold {fmean(found['all details']['gold']):.2f}; changed: {said}\nThe ratio check stops: {stopped}"

def draw(found, sft, said, prompts, path):
    fig, axes = figure(said, columns=3, height=4.6)
    labels = {"gold": "held-out gold, share", "kl": "KL, nats per answer", "ratio": "largest first |ratio - 1|"}
    for ax, key in zip(axes, labels):
        for y, (name, of) in enumerate(found.items()):
            low, high = interval(of[key], prompts) if key == "gold" else (min(of[key]), max(of[key]))
            ax.barh(y, fmean(of[key]), color="C3" if name.startswith("bug") else "C0" if y else "0.6")
            ax.plot([low, high], [y, y], "k", linewidth=1.5, label="" if y or ax is not axes[0] else
                    "range over seeds" if len(of[key]) > 1 else "two standard errors over prompts")
        ax.set(xlabel=labels[key], yticks=range(len(found)), yticklabels=[] if key != "gold" else found)
        ax.invert_yaxis()
    axes[0].axvline(sft, color="black", linestyle="--", label="SFT")
    axes[2].axvline(1e-4, color="black", linestyle=":", label="limit")
    axes[2].set_xscale("log")
    fig.legend(fontsize=8, loc="outside lower center", ncols=3)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    saved, scorer = load_checkpoint(require(cfg.init), "sft"), load_checkpoint(require(cfg.rm), "rm")
    tok, reference = Tokenizer.load(saved["tokenizer"]), GPT.load(saved).to(device)
    rm = RewardModel.load(scorer, **scorer["head"]).to(device)
    knobs = train_ppo.Config(prompts=cfg.prompts)
    prompts, val = load_data(knobs, tok, reference.cfg.block_size)
    sft = evaluate(ActorCritic.load(saved).to(device), reference, rm, tok, val, knobs, device)[0]
    found = {name: {"gold": [], "kl": [], "ratio": []} for name in VARIANTS}
    log = Log(cfg, len(VARIANTS) * cfg.seeds, name="demo_details")
    for i in range(len(VARIANTS) * cfg.seeds):
        seed, name = cfg.seed + i // len(VARIANTS), list(VARIANTS)[i % len(VARIANTS)]
        policy, ratio = train(name, saved, reference, rm, tok, prompts, cfg, seed, device)
        sound = ActorCritic.load(policy.to_checkpoint()).to(device)  # a bug of the training, not of the test
        torch.manual_seed(seed)
        gold, reward, kl, _ = evaluate(sound, reference, rm, tok, val, knobs, device)
        values = {"gold": gold, "kl": kl, "ratio": ratio}
        log(i, variant=name, seed=seed, reward=reward, **values)
        for key in values:
            found[name][key].append(values[key])
    draw(found, sft, finding(found, len(val)), len(val), Path(cfg.out) / "demo_details.png")
    flat = {f"{name}: {key}": values for name, of in found.items() for key, values in of.items()}
    save_metrics(cfg, name="demo_details", sft_gold=sft, steps=cfg.steps, batch_size=cfg.batch_size, prompts=len(val),
                 seeds=cfg.seeds, seed=cfg.seed, **flat)
