"""
Part 9 - the KL estimators under a microscope: what k1, k2 and k3 are worth as numbers, as gradients, and as leashes.

    python part_9/demo_kl_estimators.py --seeds=3

As a number k1 is right on average, k2 is not (Schulman 2020). As a loss it is the other way round: k1's gradient is on
average that of a sum of probabilities, 0, and holds nothing; k2's is KL's own; k3's (Shao et al. 2024, eq. 4) is that
of KL(pi_sft || pi). After a rollout's first update k1's is that of -KL(pi_old || pi): a push away from the rollout.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass

import torch

import train_grpo as g
from model import GPT
from shared import Log, cli, figure, load_checkpoint, require, save_figure, save_metrics, setup
from tokenizer import Tokenizer

COLOUR = {"none": "0.7", "k1": "C3", "k2": "C0", "k3": "C1", "exact": "C2"}
KINDS = list(COLOUR)[1:]

@dataclass
class Config:
    init: str = ""  # the SFT model's checkpoint; "": part_6/out/sft.pt
    kl_coef: float = 0.2  # beta, the same for all
    lr: float = 1.5e-3  # AdamW's rate at first; train_grpo.py, which runs longer, has less
    steps: int = 20  # GRPO iterations of each run
    batch_size: int = 64  # answers per iteration
    epochs: int = 2  # updates per rollout in the second comparison; the first has 1
    prompts: int = 256  # held-out stories, a multiple of 32: answers under the microscope, and each run's exact KL
    seed: int = 0
    seeds: int = 1  # how many seeds; the README quotes 3
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

def grpo(sft, reference, tok, records, run, device, log, first):
    """A run of train_grpo.py's loop from the SFT model -> policy. The lines of log begin at number first."""
    policy = GPT.load(sft).to(device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.lr, eps=1e-5, weight_decay=0.0)
    torch.manual_seed(run.seed)  # equal seeds: equal prompts, and equal random numbers behind the answers
    generator = torch.Generator().manual_seed(run.seed)
    order, n = torch.randperm(len(records), generator=generator).tolist(), run.batch_size // run.group
    for step in range(run.steps):
        optimizer.param_groups[0]["lr"] = run.lr * (1 - step / run.steps)
        asked = [records[order[i % len(order)]] for i in range(step * n, step * n + n) for _ in range(run.group)]
        batch = g.rollout(policy, reference, tok, asked, run, device)
        reward = g.judged(asked, g.texts(batch, tok)).to(device)
        g.learn(policy, optimizer, batch, g.group_advantage(reward, run.group, False), run, generator)
        log(first + step, penalty=run.kl if run.kl_coef else "none", updates=run.epochs, reward=reward.mean().item())
    return policy

def over_vocabulary(now, then, kind):
    """The estimator's value at every token that might have come: (N, V), (N, V) -> (N, V)."""
    return g.kl_penalty(now[..., None], then[..., None], torch.zeros_like(now, dtype=torch.long), kind)

def moments(now, then, kind):
    """Mean and standard deviation of one token's estimate, by summing over the vocabulary instead of sampling."""
    now, then = now.double(), then.double()  # k3 squared is huge where pi is tiny
    k = over_vocabulary(now, then, kind)
    mean = (now.exp() * k).sum(dim=-1, keepdim=True)
    return mean.mean().item(), (now.exp() * (k - mean) ** 2).sum(dim=-1).mean().sqrt().item()

def gradients(policy, batch):
    """-> gradients (7, P) of the summed penalty: of KINDS, then k1 to k3's averages over what might have come."""
    mask, then, params = batch["mask"], batch["then"], list(policy.parameters())
    now, came = g.log_probs(policy, batch["ids"][:, :-1], mask), batch["ids"][:, 1:][mask]
    losses = [g.kl_penalty(now, then, came, kind) for kind in KINDS]
    pi = now.exp().detach()  # a sampled loss has no gradient through the sampling either
    losses += [pi * over_vocabulary(now, then, kind) for kind in KINDS[:3]]
    rows = [torch.autograd.grad(loss.sum(), params, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([x.flatten() for x in row]) for row in rows])

def microscope(policy, reference, tok, records, run, device):
    """-> {kind: (mean, sd) of a token}, and for [32, 64, ...] answers the cosines (n, 7) of gradients()' rows with the
    exact gradient on all answers, and their norms over its norm (n, 7)."""
    batches = [g.rollout(policy, reference, tok, records[i:i + 32], run, device) for i in range(0, len(records), 32)]
    with torch.no_grad():
        now = torch.cat([g.log_probs(policy, b["ids"][:, :-1], b["mask"]) for b in batches])
        then = torch.cat([b["then"] for b in batches])
    values = {kind: moments(now, then, kind) for kind in KINDS[:3]}
    values["exact"] = (g.kl_penalty(now, then, None, "exact").mean().item(), 0.0)  # no sampling, no spread
    tokens = torch.tensor([b["mask"].sum() for b in batches], device=device).cumsum(dim=0)[:, None, None]
    means = torch.stack([gradients(policy, b) for b in batches]).cumsum(dim=0) / tokens  # (batches, 7, P)
    at = [2 ** j for j in range(len(batches).bit_length())]  # 32, 64, ... answers
    goal, means = means[-1, 3], means[[n - 1 for n in at]]
    cosine = torch.nn.functional.cosine_similarity(means, goal, dim=-1)
    return values, [32 * n for n in at], cosine.tolist(), (means.norm(dim=-1) / goal.norm()).tolist()

def draw(values, n, cosine, kls, said, path):
    """kls: {(kind, updates per rollout): [KL of each seed]}."""
    fig, ((number, loss), leashes) = figure(said, rows=2, columns=2, height=7.5)
    for i, kind in enumerate(KINDS):
        mean, sd = (x / values["exact"][0] for x in values[kind])
        number.bar(f"{kind}\nsd {sd:.0f} KL", mean, color=COLOUR[kind])
        loss.plot(n, [row[i] for row in cosine], "o-", color=COLOUR[kind], label=kind)
    number.set(title="as a number: one token's mean", ylabel="estimate over exact KL", xlabel="estimator, its spread")
    loss.set(title="as a loss: its direction", ylabel="cosine with exact", xlabel="answers", xticks=n, ylim=(-1, 1))
    loss.legend(loc="lower right", fontsize=8)
    for (kind, many), y in kls.items():
        ax = leashes[int(many > 1)]
        ax.bar(kind, sum(y) / len(y), color=COLOUR[kind])
        ax.plot([kind] * len(y), y, "k.")  # a dot per seed
        ax.set(title=f"as a leash, updates per rollout: {many}", xlabel="penalty", ylabel="KL, nats per answer",
               yscale="log" if many > 1 else "linear")  # k1 may be a hundred times the others
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    sft = load_checkpoint(cfg.init or require("part_6/out/sft.pt"), "sft")
    tok, reference = Tokenizer.load(sft["tokenizer"]), GPT.load(sft).to(device)
    train, val = ([r for r in records if r["task"] == "story"]
                  for records in g.load_data(g.Config(), tok, reference.cfg.block_size))
    plan = [(kind, 1) for kind in COLOUR] + [(kind, cfg.epochs) for kind in ("none", "k1", "exact")]
    kls, log = {key: [] for key in plan}, Log(cfg, len(plan) * cfg.seeds * cfg.steps, name="demo_kl_estimators")
    for i, (seed, (kind, many)) in enumerate((s, p) for s in range(cfg.seed, cfg.seed + cfg.seeds) for p in plan):
        run = g.Config(steps=cfg.steps, batch_size=cfg.batch_size, minibatches=1, epochs=many, lr=cfg.lr, seed=seed,
                       loss_norm="tokens", kl=kind.replace("none", "exact"), kl_coef=cfg.kl_coef * (kind != "none"))
        policy = grpo(sft, reference, tok, train, run, device, log, i * cfg.steps)
        gold, kl, _ = g.evaluate(policy, reference, tok, val[:cfg.prompts], run, device)
        kls[kind, many].append(kl)
        print(f"seed {seed}, {kind}, {many} updates per rollout: {kl:.2f} nats, gold {gold['story']:.3f}", flush=True)
        if i == 0:  # the policy without a leash goes under the microscope
            values, n, cosine, norm = microscope(policy, reference, tok, val[:cfg.prompts], run, device)

    # what it says
    for j, name in enumerate([*KINDS, "average k1", "average k2", "average k3"]):
        print(f"{name:10} {n[-1]} answers' gradient: cosine {cosine[-1][j]:.3f}, norm {norm[-1][j]:.3f} of the exact "
              f"one's; mean and sd of a token {values.get(name, 'are as above')}")
    of_none = {f"{k}_{u}": sum(y) / sum(kls["none", u]) for (k, u), y in kls.items()}
    meet = max(min(kls[k, 1]) for k in ("none", "k1")) <= min(max(kls[k, 1]) for k in ("none", "k1"))
    shares = ", ".join(f"{k} {of_none[f'{k}_1']:.2f}" + " (no difference)" * (k == "k1" and meet) for k in KINDS)
    many = of_none[f"k1_{cfg.epochs}"]
    print(said := f"KL over that of no penalty: {shares};\nwith {cfg.epochs} updates per rollout: k1 {many:.3g}")
    save_metrics(cfg, name="demo_kl_estimators", **{f"kl_{k}_{u}": y for (k, u), y in kls.items()}, of_none=of_none,
                 token_mean_sd=values, answers=n, cosine=cosine, norm=norm, seconds=log.seconds, seeds=cfg.seeds)
    draw(values, n, cosine, kls, said, Path(cfg.out) / "demo_kl_estimators.png")
