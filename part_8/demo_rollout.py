"""
Part 8 - one answer token by token: its KL, the reward at every token, what the critic expected, and the advantage.

    python part_8/demo_rollout.py
    python part_8/demo_rollout.py --init=part_6/out/sft.pt      before PPO: no KL yet, and a critic without an opinion

The score comes once, at the end; every token pays beta * (log pi - log pi_sft) on its way (Ouyang et al. 2022, eq. 2).
Generalized advantage estimation (Schulman et al. 2016, eq. 16) hands both back to the tokens that earned them. With
gamma = lambda = 1 the advantage is all that is still to come less what the critic expected. What one sampled token pays
may be negative; its mean over the vocabulary, the exact KL, never is.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass

import torch

import train_ppo
from model import GPT, ActorCritic, RewardModel
from shared import cli, figure, judge, load_checkpoint, require, save_figure, save_metrics, setup
from tokenizer import Tokenizer
from train_ppo import gae, load_data, rollout, shape_rewards, texts

@dataclass
class Config:
    init: str = "part_8/out/ppo.pt"  # the policy: a checkpoint of train_ppo.py, or of Part 6
    sft: str = "part_6/out/sft.pt"  # the policy that KL is measured from
    rm: str = "part_7/out/rm.pt"  # the reward model
    prompts: int = 64  # held-out prompts that are answered
    show: int = 0  # which of the answers is drawn
    beta: float = 0.05  # reward lost per nat of KL
    lam: float = 1.0  # GAE's lambda
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        assert 0 <= self.show < self.prompts, f"show={self.show} must be below prompts={self.prompts}"

@torch.no_grad()
def exact_kl(policy, reference, ids):
    """KL(pi || pi_sft) of the next token in every state of ids (B, T), over the whole vocabulary -> (B, T - 1)."""
    now, then = (model(ids[:, :-1])[0].log_softmax(dim=-1) for model in (policy, reference))
    return (now.exp() * (now - then)).sum(dim=-1)

def carriers(kl, share=0.5):
    """How many of the tokens, the dearest first, hold this share of the sum of kl (T,)."""
    part = kl.sort(descending=True).values.cumsum(dim=0)
    return int((part < share * part[-1]).sum()) + 1

def explained(returns, values):
    """1 - Var(return - value) / Var(return), over answers. 0: no better than a constant, 1: it knows."""
    return (1 - (returns - values).var() / returns.var()).item()

def token_names(ids, tok):
    """The text of each token; a space is a middle dot, or nobody would see it."""
    special = {i: name for name, i in tok.special.items()}
    return [special.get(i) or tok.decode([i]).replace(" ", "·").replace("\n", "\\n") for i in ids]

def draw(one, names, said, path):
    """one: a dict of (n,) arrays, an entry per token of the answer."""
    fig, axes = figure(said, rows=4, height=8.5)
    x = range(len(names))
    axes[0].bar(x, one["kl"], label="of the token that came")
    axes[0].plot(x, one["exact"], "k.", markersize=4, label="exact: mean over the vocabulary")
    axes[0].set_ylabel("KL, nats")
    axes[1].bar(x, one["reward"], color="C1", label="-beta KL, and the score at the last token; log beyond 0.01")
    axes[1].set_ylabel("reward")
    axes[1].set_yscale("symlog", linthresh=0.01)  # one token's KL costs a hundredth of the score
    axes[2].plot(x, one["return"], "C7", drawstyle="steps-mid", label="return: reward from here to the end")
    axes[2].plot(x, one["value"], "C2.-", label="value: what the critic expects before the token")
    axes[2].set_ylabel("return")
    colours = ["C3" if a < 0 else "C0" for a in one["advantage"]]
    axes[3].bar(x, one["advantage"], color=colours, label="advantage; red: less came than was expected")
    axes[3].set_ylabel("advantage")
    for ax in axes:
        ax.set_xticks(x, [])
        ax.set_xlim(-0.7, len(names) - 0.3)
        ax.axhline(0, color="black", linewidth=0.5)
        ax.legend(fontsize=8)
    axes[3].set_xticks(x, names, rotation=90, fontsize=8)
    axes[3].set_xlabel("token of the answer")
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    saved = load_checkpoint(require(cfg.init), ("ppo", "sft"))
    scorer = load_checkpoint(require(cfg.rm), "rm")
    tok = Tokenizer.load(saved["tokenizer"])
    policy = ActorCritic.load(saved).to(device)
    reference = GPT.load(load_checkpoint(require(cfg.sft), "sft")).to(device)
    rm = RewardModel.load(scorer, **scorer["head"]).to(device)
    knobs = train_ppo.Config(prompts=cfg.prompts)
    asked = load_data(knobs, tok, policy.cfg.block_size)[1]

    # a rollout as train_ppo.py makes it
    batch = rollout(policy, reference, rm, tok, asked, knobs, device)
    mask = batch["mask"]
    rewards = shape_rewards(batch["kl"], batch["score"], mask, cfg.beta)
    advantages, returns = gae(rewards, batch["values"], mask, batch["last_value"], knobs.gamma, cfg.lam)
    per_token = exact_kl(policy, reference, batch["ids"]) * mask

    # all answers: where the KL is, and when the critic knows
    half = [carriers(kl[m]) / len(kl[m]) for kl, m in zip(per_token, mask) if kl.sum() > 0.01]
    half = sum(half) / len(half) if half else None  # a policy that has not moved has no KL to share out
    first, last = mask.int().argmax(dim=1, keepdim=True), mask.cumsum(dim=1).argmax(dim=1, keepdim=True)
    togo = rewards.flip(1).cumsum(dim=1).flip(1)  # whatever lambda is
    sees = [explained(togo.gather(1, at), batch["values"].gather(1, at)) for at in (first, (first + last) // 2, last)]
    mean = [togo[:, 0].mean().item(), per_token.sum(dim=1).mean().item()]
    print(f"{len(asked)} answers: reward {mean[0]:.3f}, KL {mean[1]:.2f} nats" +
          (f", half of it on {half:.0%} of the tokens" if half else ""))
    print("the critic's R2 of what is still to come, at the first, middle and last token:", *(f"{s:.2f}" for s in sees))

    # one answer
    text, ended = texts(batch, tok)[cfg.show]
    on = mask[cfg.show].cpu()
    arrays = {"kl": batch["kl"], "exact": per_token, "reward": rewards, "return": returns, "value": batch["values"],
              "advantage": advantages}
    one = {name: array[cfg.show].cpu()[on].numpy() for name, array in arrays.items()}
    n, paid, score = len(one["kl"]), float(one["kl"].sum()), batch["score"][cfg.show].item()
    verdict = judge(asked[cfg.show], text, ended)
    print(f"\n{asked[cfg.show]['instruction']}\n  {text}\n  checks held: {verdict[1]:.0%}")
    moved = float(one["exact"].sum()) > 0.01
    where = f"half of the exact KL lies on {carriers(torch.tensor(one['exact']))} of {n} tokens" if moved else "no KL"
    said = f"Reward {score - cfg.beta * paid:.2f} = score {score:.2f} - {cfg.beta:g} x {paid:.1f} nats; {where}\n" \
        f"The critic's R2 over {len(asked)} answers: {sees[0]:.2f} at the first token, {sees[2]:.2f} at the last"
    draw(one, token_names(batch["ids"][cfg.show, 1:].cpu()[on].tolist(), tok), said, Path(cfg.out) / "demo_rollout.png")
    save_metrics(cfg, name="demo_rollout", reward=score - cfg.beta * paid, score=score, kl_paid=paid, tokens=n,
                 kl_exact=float(one["exact"].sum()), half_kl_share=half, critic_first=sees[0], critic_middle=sees[1],
                 critic_last=sees[2], mean_reward=mean[0], mean_kl=mean[1], checks_held=verdict[1], prompts=cfg.prompts,
                 seed=cfg.seed)
