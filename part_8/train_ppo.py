"""
Part 8 - PPO: the policy writes, the reward model scores, and what scored above expectation becomes likelier.

    python part_8/train_ppo.py                     from a fresh clone to an aligned model: builds all that it needs
    python part_8/train_ppo.py --kl_coef=0 --kl_target=0 --score_clip=99      no leash: watch reward and gold part
    python part_8/train_ppo.py --data=my.jsonl     your own prompts (instruction, input); gold needs a "check"
    torchrun --nproc_per_node=2 part_8/train_ppo.py      each process answers and learns from its half of the prompts

An answer is an episode, a token an action. The reward is -beta * (log pi - log pi_sft) at every token, and the reward
model's score at the last one (Ziegler et al. 2019; Ouyang et al. 2022). Gold is only looked at, never trained on.

From part_7/train_rm.py
    New      encode, pick, total, masked_mean, whiten, shape_rewards, gae, ppo_loss, value_loss, next_kl_coef
             rollout, texts, judged, learn
    Changed  Config, load_data, evaluate, draw
    Removed  pad, lr_scale, make_pair, story_prompts, shuffled, sample_pairs, collate, get_batch, preference_loss
             make_optimizers, respond, rewards, calibration, length_probe, padding_error, against_truth
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import os
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from model import GPT, ActorCritic, RewardModel
from shared import (Log, cli, fail, figure, judge, load_checkpoint, read_jsonl, require, save_checkpoint, save_figure,
                    save_metrics, setup)
from tokenizer import Tokenizer

@dataclass
class Config:
    # data
    data: str = "stories"  # "stories" (the built-in world) or the path of a JSON or JSONL file with Alpaca's fields
    init: str = ""  # the SFT model's checkpoint; "": part_6/out/sft.pt
    rm: str = ""  # the reward model's checkpoint; "": part_7/out/rm.pt
    # rollout and reward
    steps: int = 40  # iterations: one rollout, one scoring, a few updates
    batch_size: int = 128  # answers per rollout
    max_new_tokens: int = 72  # longest answer, in tokens
    kl_budget: float = 40.0  # nats; an answer is cut where its running KL passes this
    missing_end: float = -2.0  # score of an answer that does not end
    score_clip: float = 1.5  # scores beyond this many of SFT's standard deviations are the reward model's errors
    kl_coef: float = 0.05  # beta, reward lost per nat of KL, at the start
    kl_target: float = 3.0  # nats per answer that the controller steers to; 0: beta stays fixed
    kl_horizon: float = 4000.0  # answers in which the controller corrects a full error; a run has about 5,000
    gamma: float = 1.0  # discount
    lam: float = 1.0  # GAE's lambda; below 1 it trusts the critic, and this one cannot see a wrong word coming
    # update
    epochs: int = 2  # passes over each rollout
    minibatches: int = 2  # updates per pass
    clip: float = 0.2  # a ratio may leave 1 by this much
    vf_clip: float = 0.2  # and a value its old one
    vf_coef: float = 0.5  # weight of the value loss
    max_kl: float = 0.02  # nats per token between rollout's policy and updated one at which a rollout's updates stop
    lr: float = 6e-4  # AdamW's rate at first, eps 1e-5; it falls linearly to 0 over the run
    lr_value: float = 3e-3  # and the value head's: the return that it follows moves fast
    grad_clip: float = 1.0  # largest norm of the gradient
    # run
    eval_every: int = 0  # iterations between evaluations on held-out prompts; 0: only at the end
    prompts: int = 512  # held-out stories that are answered and judged at the end
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        share = self.minibatches * int(os.environ.get("WORLD_SIZE", 1))
        fits = self.steps > 0 and self.batch_size % share == 0
        assert fits, f"steps must be at least 1, batch_size={self.batch_size} a multiple of minibatches * processes"

# data ----------------------------------------------------------------------------------------------------------------

def encode(record, tok):
    """-> prompt ids, with the template's tokens."""
    text = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
    return [tok.special["<|user|>"], *tok.encode(text), tok.special["<|assistant|>"]]

def load_data(cfg, tok, block_size):
    """-> training and held-out prompts. What leaves no room for an answer is counted and left out."""
    if cfg.data == "stories":
        paths = [require("data/stories") / f"instructions{split}.jsonl" for split in ("", "_val")]
        splits = [[r for r in read_jsonl(path, ["instruction", "input"]) if r["task"] == "story"] for path in paths]
    else:
        records = read_jsonl(cfg.data, ["instruction", "input"])
        splits = [records[:int(0.9 * len(records))], records[int(0.9 * len(records)):]]
    room = block_size - cfg.max_new_tokens
    asked = [[{**r, "prompt": encode(r, tok)} for r in records] for records in splits]
    kept = [[r for r in records if len(r["prompt"]) <= room] for records in asked]
    if kept != asked:
        print(f"prompts of over {room} tokens, left out: {len(sum(asked, [])) - len(sum(kept, []))}")
    if not all(kept):
        fail(f"--data={cfg.data}: no prompt has at most {room} tokens: take a smaller --max_new_tokens")
    return kept[0], kept[1][:cfg.prompts]

# the lesson's mathematics. In all (B, T) arrays index t is about token t + 1: its log-probability, whether it is part
# of the answer (mask), the reward for choosing it, and the value of the state, tokens 0 to t, in which it was chosen.

def pick(logp, ids):
    """Log-probabilities of all tokens (..., V), and the ids (...) that came -> theirs."""
    return logp.gather(-1, ids[..., None]).squeeze(-1)

def total(x):
    """A tensor's sum over all processes, on each of them: itself where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x

def masked_mean(x, mask):
    """The mean over the mask's entries. Of several processes each gets its share: the total is the mean over all."""
    return (x * mask).sum() / total(mask.sum())

def whiten(x, mask):
    """To mean 0 and variance 1 over the mask's entries; the variance is the biased one, as in OpenAI's code."""
    x = x - total(masked_mean(x, mask))
    return x * torch.rsqrt(total(masked_mean(x ** 2, mask)) + 1e-8) * mask

def shape_rewards(kl, score, mask, beta):
    """-beta * KL at every token of the answer, and the score (B,) at its last one (Ziegler et al. 2019, eq. 2)."""
    last = mask.cumsum(dim=1).argmax(dim=1)  # the first index at which the count of tokens is complete
    return (-beta * kl * mask).scatter_add(1, last[:, None], score[:, None])

def gae(rewards, values, mask, last_value, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), from the last token back to the first:
    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}. After an answer's last token V is
    last_value (B,): 0 where it ended, the critic's V where it was cut. -> advantages, returns = advantages + values.
    """
    advantages, running, after = torch.zeros_like(rewards), torch.zeros_like(last_value), last_value
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * after - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, running)
        after = torch.where(mask[:, t], values[:, t], after)
        advantages[:, t] = running
    return advantages * mask, (advantages + values) * mask

def ppo_loss(logp, old_logp, advantages, mask, clip):
    """The clipped surrogate (Schulman et al. 2017, eq. 7) -> loss, share of tokens at which the clip acts."""
    ratio = (logp - old_logp).exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.max(free, held), mask), masked_mean((held > free).float(), mask)

def value_loss(values, old_values, returns, mask, clip):
    """Half the squared error of the value, or of the value held within +-clip of the old one, whichever is worse."""
    held = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (held - returns) ** 2), mask)

def next_kl_coef(coef, kl, target, n, horizon):
    """The adaptive controller (Ziegler et al. 2019, section 2.2): proportional, its error held within +-20 %."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * n / horizon)

# rollout, learn, evaluate ---------------------------------------------------------------------------------------------

@torch.no_grad()
def rollout(policy, reference, rm, tok, records, cfg, device):
    """One answer to each record at temperature 1, from the whole vocabulary: what is scored is what was sampled."""
    end, start = tok.special["<|end|>"], time.time()
    starts = torch.tensor([len(r["prompt"]) for r in records], device=device)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r["prompt"]) for r in records], True, end).to(device)
    ids, logp = policy.generate(ids, cfg.max_new_tokens, lengths=starts, stop=end, return_logp=True)
    seconds = time.time() - start
    sampled = logp.isfinite()  # (B, T): not the prompt, not the padding
    lengths = starts + sampled.sum(dim=1)
    ended = ids.gather(1, lengths[:, None] - 1).squeeze(1) == end
    mask, logp, at = sampled[:, 1:], logp[:, 1:].nan_to_num(), sampled.roll(-1, dims=1)  # at: the states before them
    logits, values = policy.act(ids, at)  # V of every state, that after the last token included
    now, then = (z.log_softmax(dim=-1) for z in (logits, reference.lm_head(reference.trunk(ids)[at])))  # (N, V)
    exact_kl = torch.zeros_like(logp).masked_scatter(mask, (now.exp() * (now - then)).sum(dim=-1)).sum(dim=1)  # (B,)
    kl = logp - logp.masked_scatter(mask, pick(then, ids[sampled]))  # (B, T): the same, on the sampled token alone
    over = (kl.cumsum(dim=1) > cfg.kl_budget) & mask & (ids[:, 1:] != end)  # an end is no place to cut
    cut = over.any(dim=1)
    mask = mask & (over.cumsum(dim=1) <= over.int())  # up to and with the token that passes the budget
    score = rm(ids, starts, lengths).clamp(-cfg.score_clip, cfg.score_clip)
    score = score.where(ended, torch.full_like(score, cfg.missing_end)).masked_fill(cut, 0.0)  # cut: unknown, not bad
    after = values.gather(1, starts[:, None] + mask.sum(dim=1, keepdim=True) - 1).squeeze(1)
    return {
        "ids": ids, "starts": starts, "lengths": lengths, "ended": ended, "cut": cut, "mask": mask, "logp": logp,
        "kl": kl * mask, "exact_kl": exact_kl, "values": values[:, :-1], "last_value": after * cut, "score": score,
        "seconds": [seconds, time.time() - start - seconds],
    }

def texts(batch, tok):
    """-> list of (answer, whether it ended)."""
    rows = zip(*(batch[name].tolist() for name in ("ids", "starts", "lengths", "ended")))
    return [(tok.decode(ids[start:length - ended]), ended) for ids, start, length, ended in rows]

def judged(records, answers):
    """The share of answers on which all checks hold: gold. NaN without checks."""
    verdicts = [judge(r, text, ended) for r, (text, ended) in zip(records, answers)]
    return sum(v[2] for v in verdicts) / len(verdicts) if None not in verdicts else float("nan")

def learn(policy, optimizer, batch, advantages, returns, cfg, generator):
    """The updates of one rollout: epochs x minibatches, until the policy is max_kl nats per token from where it was."""
    stats = {"loss": [], "clip_fraction": [], "entropy": []}
    for _ in range(cfg.epochs):
        for rows in torch.randperm(len(returns), generator=generator).chunk(cfg.minibatches):
            old, mask, ids = batch["logp"][rows], batch["mask"][rows], batch["ids"][rows]
            logits, values = policy.act(ids[:, :-1], mask)
            all_logp = logits.log_softmax(dim=-1)  # (N, V): only where the answers' tokens are chosen
            logp = old.masked_scatter(mask, pick(all_logp, ids[:, 1:][mask]))
            if "first_ratio_error" not in stats:
                stats["first_ratio_error"] = (((logp - old).exp() - 1).abs() * mask).max().item()
            log_ratio = (logp - old).detach()
            stats["step_kl"] = total(masked_mean(log_ratio.exp() - 1 - log_ratio, mask)).item()  # k3: never negative
            if stats["step_kl"] > cfg.max_kl:
                return stats
            policy_part, clipped = ppo_loss(logp, old, advantages[rows], mask, cfg.clip)
            value_part = value_loss(values, batch["values"][rows], returns[rows], mask, cfg.vf_clip)
            optimizer.zero_grad(set_to_none=True)
            (policy_part + cfg.vf_coef * value_part).backward()
            for p in policy.parameters():
                total(p.grad)  # the losses are shares of one mean
            torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
            optimizer.step()
            entropy = torch.special.entr(all_logp.detach().exp()).sum() / total(mask.sum())
            for name, value in (("loss", policy_part), ("clip_fraction", clipped), ("entropy", entropy)):
                stats[name].append(total(value.detach()).item())
    return stats

def evaluate(policy, reference, rm, tok, records, cfg, device):
    """Answers to held-out prompts -> gold, mean reward, exact KL in nats per answer, and the answers."""
    parts = [rollout(policy, reference, rm, tok, records[i:i + 128], cfg, device) for i in range(0, len(records), 128)]
    answers = [answer for part in parts for answer in texts(part, tok)]
    score, kl = (torch.cat([part[name] for part in parts]).mean().item() for name in ("score", "exact_kl"))
    return judged(records, answers), score, kl, answers

def draw(records, sft, ppo, path):
    """The run as one figure: log records, and (gold, reward, KL) on held-out prompts before and after."""
    title = f"PPO: held-out gold {sft[0]:.2f} -> {ppo[0]:.2f} at {ppo[2]:.1f} nats of KL"
    fig, axes = figure(title, rows=2, columns=3, height=5)
    panels = {"gold": "share", "reward": "in SD of SFT", "kl": "nats per answer",
              "entropy": "nats per token", "explained_variance": "share", "length": "tokens"}
    for i, (ax, key) in enumerate(zip(axes.flat, panels)):
        ax.plot([r["step"] for r in records], [r[key] for r in records], color=f"C{i}")
        ax.set(title=key.replace("_", " "), ylabel=panels[key], xlabel="iteration")
        if i < 3:
            ax.axhline(sft[i], color="gray", linestyle="--", label="SFT, held out")
            ax.plot(records[-1]["step"], ppo[i], "ko", label="PPO, held out")
    axes[0, 0].legend(fontsize=8)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # data and models
    sft = load_checkpoint(cfg.init or require("part_6/out/sft.pt"), "sft")
    scorer = load_checkpoint(cfg.rm or require("part_7/out/rm.pt"), "rm")
    tok = Tokenizer.load(sft["tokenizer"])
    short = scorer["gpt_config"]["block_size"] < sft["gpt_config"]["block_size"]
    if short or scorer["tokenizer"] != sft["tokenizer"]:
        fail("the reward model has another tokenizer or a shorter context: train --rm from the checkpoint of --init")
    policy = ActorCritic.load(sft).to(device)
    reference = GPT.load(sft).to(device)
    rm = RewardModel.load(scorer, **scorer["head"]).to(device)
    train, val = load_data(cfg, tok, policy.cfg.block_size)
    before = evaluate(policy, reference, rm, tok, val, cfg, device)
    torch.manual_seed(cfg.seed + rank)  # from here on each process draws answers of its own
    head = {"params": [policy.v_head.weight], "peak": cfg.lr_value}
    rest = {"params": [p for p in policy.parameters() if p is not policy.v_head.weight], "peak": cfg.lr}
    optimizer = torch.optim.AdamW([rest, head], eps=1e-5, weight_decay=0.0)
    generator = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(train), generator=generator).tolist()
    log = Log(cfg, cfg.steps)
    print(f"{len(train):,} prompts, {len(val):,} held out; SFT gold {before[0]:.3f}, reward {before[1]:.3f}")

    # loop
    beta = cfg.kl_coef
    for step in range(cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 - step / cfg.steps)
        start, first = time.time(), step * cfg.batch_size + rank
        asked = [train[order[i % len(order)]] for i in range(first, first + cfg.batch_size, world)]  # round and round
        batch = rollout(policy, reference, rm, tok, asked, cfg, device)
        rewards = shape_rewards(batch["kl"], batch["score"], batch["mask"], beta)
        advantages, returns = gae(rewards, batch["values"], batch["mask"], batch["last_value"], cfg.gamma, cfg.lam)
        middle = time.time()
        stats = learn(policy, optimizer, batch, whiten(advantages, batch["mask"]), returns, cfg, generator)
        batch["seconds"].append(time.time() - middle)
        assert stats["first_ratio_error"] < 1e-4, f"sampler and scorer disagree by {stats['first_ratio_error']}"

        # report
        mean = lambda x: total(x.float().mean()).item() / world  # over all processes' answers
        got, expected = returns[batch["mask"]], batch["values"][batch["mask"]]
        values = {
            "reward": mean(batch["score"]), "gold": mean(torch.tensor(judged(asked, texts(batch, tok)))),
            "kl": mean(batch["exact_kl"]), "beta": beta, "length": mean(batch["mask"].sum(dim=1)),
            **{k: sum(v) / max(len(v), 1) if isinstance(v, list) else v for k, v in stats.items()},
            "explained_variance": mean(1 - (got - expected).var() / got.var()),
            "ended": mean(batch["ended"]), "cut": mean(batch["cut"]),
            **dict(zip(("rollout_s", "score_s", "update_s"), batch["seconds"])),
            "completions_per_s": cfg.batch_size / (time.time() - start),
        }
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            values["val_gold"], _, values["val_kl"], _ = evaluate(policy, reference, rm, tok, val, cfg, device)
        log(step, **values)
        if cfg.kl_target:
            beta = next_kl_coef(beta, values["kl"], cfg.kl_target, cfg.batch_size, cfg.kl_horizon)
    world == 1 or dist.destroy_process_group()
    rank == 0 or sys.exit(0)

    # what came of it: the table, five prompts side by side, the figure
    seconds, records = log.seconds, read_jsonl(Path(cfg.out) / "log.jsonl", ["step"])
    after = evaluate(policy, reference, rm, tok, val, cfg, device)
    save_checkpoint(Path(cfg.out) / "ppo.pt", kind="ppo", changed=cfg.changed, step=cfg.steps, config=asdict(cfg),
                    **policy.to_checkpoint(), tokenizer=tok.state())
    save_metrics(cfg, sft_gold=before[0], ppo_gold=after[0], sft_reward=before[1], ppo_reward=after[1], kl=after[2],
                 seconds=seconds, completions_per_s=sum(r["completions_per_s"] for r in records) / cfg.steps,
                 first_ratio_error=max(r["first_ratio_error"] for r in records), steps=cfg.steps, seed=cfg.seed)
    draw(records, before, after, Path(cfg.out) / "train_ppo.png")
    for r, (old, _), (new, _) in list(zip(val, before[3], after[3]))[:5]:
        print(f"\n{r['instruction']}\n  SFT: {old}\n  PPO: {new}")
    print(f"\n{len(val)} held-out prompts    gold  reward   KL (nats per answer)")
    for name, (gold, reward, kl, _) in (("SFT", before), (f"PPO, {seconds:.0f} s", after)):
        print(f"{name:22} {gold:6.3f}  {reward:6.3f}   {kl:6.2f}")
