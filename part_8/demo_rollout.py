"""
Part 8: one answer, token by token. Its KL, its rewards, what the critic expected, its advantages.

    python part_8/demo_rollout.py
    python part_8/demo_rollout.py --init=part_6/out/sft.pt
                                        before PPO: no KL yet, and a critic that knows nothing

The score of the reward model comes once, at the last token. On the way, every token costs
beta * (log pi - log pi_sft) (Ouyang et al. 2022, eq. 2). Generalized advantage estimation (Schulman
et al. 2016, eq. 16) hands both back to the tokens that earned them. With gamma = lambda = 1 the
advantage of a token is all the reward that is still to come, minus what the critic expected.

The cost of one sampled token may be negative. Its mean over the vocabulary, the exact KL, never is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass

import torch

from model import GPT, ActorCritic, RewardModel
from shared import (
    fail,
    figure,
    judge,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    require,
    save_figure,
    save_metrics,
    set_seed,
)
from tokenizer import Tokenizer
from train_ppo import Config as PPOConfig
from train_ppo import (
    answer_logp,
    answers_of,
    encode_records,
    gae,
    load_data,
    log_probs,
    rollout,
    score_answers,
    shape_rewards,
)

MOVED = 0.01  # nats per answer; below it a policy counts as not moved from the SFT model


@dataclass
class Config:
    init: str = "part_8/out/ppo.pt"  # checkpoint of the policy: of train_ppo.py, or the SFT model
    sft: str = "part_6/out/sft.pt"  # checkpoint of the SFT model, from which KL is measured
    rm: str = "part_7/out/rm.pt"  # checkpoint of the reward model
    prompts: int = 64  # held-out prompts that are answered
    show: int = 0  # which of the answers is drawn, counted from 0
    beta: float = 0.05  # the reward that a nat of KL costs
    lam: float = 1.0  # lambda of GAE; smaller values rely more on the critic
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.prompts >= 2, f"prompts={self.prompts} must be at least 2"
        assert 0 <= self.show < self.prompts, (
            f"show={self.show} must be from 0 to prompts - 1 = {self.prompts - 1}"
        )


# what to look at ----------------------------------------------------------------------------------


@torch.no_grad()
def exact_kl(policy, reference, batch):
    """KL(pi || pi_sft) of the next token over the whole vocabulary, in each state in which a token
    of an answer was chosen, (B, T), 0 elsewhere."""
    policy_logp = log_probs(policy, batch.ids[:, :-1], batch.mask)  # (N, V)
    reference_logp = log_probs(reference, batch.ids[:, :-1], batch.mask)
    kl = (policy_logp.exp() * (policy_logp - reference_logp)).sum(dim=-1)  # (N,)
    return torch.zeros_like(batch.logp).masked_scatter(batch.mask, kl)


def carriers(kl, share=0.5):
    """The smallest number of tokens that hold this share of the sum of kl (T,)."""
    running_sum = kl.sort(descending=True).values.cumsum(dim=0)
    return int((running_sum < share * running_sum[-1]).sum()) + 1


def mean_carrier_share(kl, mask):
    """On what share of its tokens does half of an answer's KL lie? The mean over the answers that
    have moved from the SFT model, or None if none has."""
    shares = []
    for row, row_mask in zip(kl, mask):
        answer_kl = row[row_mask]
        if answer_kl.sum() > MOVED:
            shares.append(carriers(answer_kl) / len(answer_kl))
    return sum(shares) / len(shares) if shares else None


def explained(returns, values):
    """1 - Var(return - value) / Var(return), over answers. A constant value explains 0, a perfect
    one 1."""
    return (1 - (returns - values).var() / returns.var()).item()


def critic_r2(rewards, values, mask):
    """How much of the reward still to come the critic explains at the first, the middle and the
    last token of the answers -> {name: R2}."""
    to_come = rewards.flip(1).cumsum(dim=1).flip(1)  # (B, T)
    first = mask.int().argmax(dim=1)  # (B,)
    last = mask.cumsum(dim=1).argmax(dim=1)
    places = {"first": first, "middle": (first + last) // 2, "last": last}
    r2 = {}
    for name, place in places.items():
        place = place[:, None]  # (B, 1)
        r2[name] = explained(to_come.gather(1, place), values.gather(1, place))
    return r2


def token_names(ids, tok):
    """The text of each token. A space becomes a middle dot, because nobody would see it."""
    special_names = {i: name for name, i in tok.special.items()}
    names = []
    for i in ids:
        name = special_names.get(i)
        if name is None:
            name = tok.decode([i]).replace(" ", "·")
        if not name.isprintable():
            name = repr(name)[1:-1]  # a line end is written as \n
        names.append(name)
    return names


def draw(answer, names, title, path):
    """answer: a dict of arrays (n,), with one entry for each token of the answer."""
    fig, axes = figure(title, rows=4, height=8.5)
    kl_axis, reward_axis, return_axis, advantage_axis = axes
    x = range(len(names))

    kl_axis.bar(x, answer["kl"], label="of the sampled token")
    kl_axis.plot(x, answer["exact_kl"], "k.", markersize=4, label="exact, over the vocabulary")
    kl_axis.set_ylabel("KL, nats")

    # The KL of one token costs about a hundredth of the score.
    reward_axis.bar(x, answer["reward"], color="C1", label="-beta KL, and the score at the end")
    reward_axis.set_yscale("symlog", linthresh=0.01)
    reward_axis.set_ylabel("reward, log\nbeyond 0.01")

    return_label = "return: reward from here to the end"
    return_axis.plot(x, answer["return"], "C7", drawstyle="steps-mid", label=return_label)
    value_label = "value: what the critic expects before the token"
    return_axis.plot(x, answer["value"], "C2.-", label=value_label)
    return_axis.set_ylabel("return")

    colours = ["C3" if advantage < 0 else "C0" for advantage in answer["advantage"]]
    advantage_label = "advantage; red: less came than the critic expected"
    advantage_axis.bar(x, answer["advantage"], color=colours, label=advantage_label)
    advantage_axis.set_ylabel("advantage")

    for ax in axes:
        ax.set_xticks(x, [])
        ax.set_xlim(-0.7, len(names) - 0.3)
        ax.axhline(0, color="black", linewidth=0.5)
        ax.legend(fontsize=8)
    advantage_axis.set_xticks(x, names, rotation=90, fontsize=8)
    advantage_axis.set_xlabel("token of the answer")
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    device = pick_device(cfg.device)

    # models
    checkpoint = load_checkpoint(require(cfg.init), ("ppo", "sft"))
    sft = load_checkpoint(require(cfg.sft), "sft")
    scorer = load_checkpoint(require(cfg.rm), "rm")
    for name, other in (("sft", sft), ("rm", scorer)):
        if other["tokenizer"] != checkpoint["tokenizer"]:
            fail(f"the checkpoint of --{name} has another tokenizer than the one of --init")
    if any(name.startswith("critic.") for name in checkpoint["weights"]):
        fail("--init has a critic of its own (--critic=rm); this demo draws the one on the trunk")
    policy = ActorCritic.load(checkpoint).to(device)
    reference = GPT.load(sft).to(device)
    rm = RewardModel.load(scorer, **scorer["head"]).to(device)
    tok = Tokenizer.load(checkpoint["tokenizer"])
    out = output_folder(cfg)

    # held-out prompts
    ppo_cfg = PPOConfig()
    _, val = load_data(ppo_cfg)
    val = encode_records(val, tok, policy.cfg.block_size, ppo_cfg.max_new_tokens)[: cfg.prompts]
    if cfg.show >= len(val):
        fail(f"--show={cfg.show} must be below {len(val)}, the number of held-out prompts")

    # a rollout, scored as in train_ppo.py
    torch.manual_seed(cfg.seed)
    batch = rollout(policy, tok, val, ppo_cfg, device)
    mask = batch.mask
    score = score_answers(rm, batch, ppo_cfg)  # (B,)
    with torch.no_grad():
        kl = batch.logp - answer_logp(reference, batch)  # (B, T)
        _, values = policy.act(batch.ids[:, :-1], mask)  # (B, T)
    rewards = shape_rewards(kl, score, mask, cfg.beta)
    advantages, returns = gae(rewards, values, mask, ppo_cfg.gamma, cfg.lam)
    exact = exact_kl(policy, reference, batch)

    # all answers: where is the KL, and when does the critic know?
    mean_reward = rewards.sum(dim=1).mean().item()
    mean_kl = exact.sum(dim=1).mean().item()
    carrier_share = mean_carrier_share(exact, mask)
    r2 = critic_r2(rewards, values, mask)
    print(f"{len(val)} answers: reward {mean_reward:.3f}, KL {mean_kl:.2f} nats")
    if carrier_share is not None:
        print(f"half of an answer's KL lies on {carrier_share:.0%} of its tokens")
    print(
        "the critic explains, of the reward still to come, "
        f"{r2['first']:.2f} at the first token, {r2['middle']:.2f} in the middle, "
        f"{r2['last']:.2f} at the last token"
    )

    # one answer
    row_mask = mask[cfg.show].cpu()
    tensors = {
        "kl": kl,
        "exact_kl": exact,
        "reward": rewards,
        "return": returns,
        "value": values,
        "advantage": advantages,
    }
    answer = {name: x[cfg.show].cpu()[row_mask].numpy() for name, x in tensors.items()}
    n_tokens = len(answer["kl"])
    answer_score = score[cfg.show].item()
    kl_paid = float(answer["kl"].sum())
    kl_exact = float(answer["exact_kl"].sum())
    reward = answer_score - cfg.beta * kl_paid

    written = answers_of(batch, tok)[cfg.show]
    verdict = judge(val[cfg.show], written.text, written.ended)
    print(f"\n{val[cfg.show]['instruction']}\n  {written.text}")
    print(f"  it passes {verdict.share:.0%} of its checks")

    where = "it has no KL"
    if kl_exact > MOVED:
        count = carriers(torch.from_numpy(answer["exact_kl"]))
        where = f"half of the exact KL lies on {count} of {n_tokens} tokens"
    title = (
        f"Reward {reward:.2f} = score {answer_score:.2f} - {cfg.beta:g} x {kl_paid:.1f} nats; "
        f"{where}\nThe critic explains {r2['first']:.2f} of the reward at the first token, "
        f"{r2['last']:.2f} at the last"
    )
    names = token_names(batch.ids[cfg.show, 1:].cpu()[row_mask].tolist(), tok)
    draw(answer, names, title, out / "demo_rollout.png")
    save_metrics(
        out,
        name="demo_rollout",
        reward=reward,
        score=answer_score,
        kl_paid=kl_paid,
        tokens=n_tokens,
        kl_exact=kl_exact,
        half_kl_share=carrier_share,
        critic_first=r2["first"],
        critic_middle=r2["middle"],
        critic_last=r2["last"],
        mean_reward=mean_reward,
        mean_kl=mean_kl,
        checks_held=verdict.share,
        prompts=len(val),
        seed=cfg.seed,
    )
