"""
Part 9 - GRPO: several answers to one prompt, each judged against the mean of its group. No critic, and no model of
reward where the answer itself can be checked.

    python part_9/train_grpo.py                         the reward is verifiable: 1 where all checks hold, else 0
    python part_9/train_grpo.py --reward=model          Part 7's reward model instead
    python part_9/train_grpo.py --data=my.jsonl --reward=my.py:score      your own score(record, answer) -> float
    torchrun --nproc_per_node=2 part_9/train_grpo.py    each process answers and learns from its half of the prompts

An answer's advantage is its reward less its group's mean, the same for all its tokens; the KL to the SFT model is a
term of the loss (Shao et al. 2024, DeepSeekMath, eq. 3). The default reward is gold itself: here it is trained on.

From part_8/train_ppo.py
    New      aggregate, kl_penalty, group_advantage, log_probs, load_reward
    Changed  Config, load_data, ppo_loss, rollout, judged, learn, evaluate, draw
    Removed  whiten, shape_rewards, gae, value_loss, next_kl_coef (the critic's, and the shaped reward's)
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import os
import runpy
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from model import GPT, RewardModel
from shared import (Log, cli, fail, figure, judge, load_checkpoint, need, read_jsonl, require, save_checkpoint,
                    save_figure, save_metrics, setup)
from tokenizer import Tokenizer

@dataclass
class Config:
    # data
    data: str = "stories"  # "stories" (the built-in world) or the path of a JSON or JSONL file with Alpaca's fields
    init: str = ""  # the SFT model's checkpoint; "": part_6/out/sft.pt
    rm: str = ""  # the reward model's checkpoint, for --reward=model; "": part_7/out/rm.pt
    # rollout and reward
    reward: str = "judge"  # "judge" (all checks hold: 1, else 0), "model", or FILE.py:FUNCTION of (record, answer)
    steps: int = 120  # iterations: one rollout, one scoring, a few updates
    batch_size: int = 128  # answers per rollout
    group: int = 8  # answers per prompt
    max_new_tokens: int = 72  # longest answer, in tokens
    # loss and update
    kl: str = "exact"  # per token: exact (over the whole vocabulary), or the estimators k1, k2, k3
    kl_coef: float = 0.02  # beta, the weight of the KL in the loss
    scale_std: bool = False  # divide by the group's standard deviation too: prompts of hardly any spread count most
    loss_norm: str = "sequence"  # mean of each answer, then of answers; tokens: over all; or constant (length free)
    epochs: int = 1  # passes over each rollout
    minibatches: int = 2  # updates per pass
    clip: float = 0.2  # a ratio may leave 1 by this much
    lr: float = 6e-4  # AdamW's rate at first, eps 1e-5; it falls linearly to 0 over the run
    grad_clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 0  # iterations between evaluations on held-out prompts; 0: only at the end
    prompts: int = 512  # held-out stories, and as many held-out skills, that are answered and judged at the end
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script

    def __post_init__(self):
        share = self.minibatches * self.group * int(os.environ.get("WORLD_SIZE", 1))
        assert self.steps > 0 and self.group > 1, "steps must be at least 1, group at least 2"
        assert self.batch_size % share == 0, f"batch_size={self.batch_size}: no multiple of group * minibatches * ranks"
        assert self.kl in ("exact", "k1", "k2", "k3"), f"kl={self.kl}: it is exact, k1, k2 or k3"
        assert self.loss_norm in ("tokens", "sequence", "constant"), "loss_norm is tokens, sequence or constant"

# data ----------------------------------------------------------------------------------------------------------------

def encode(record, tok):
    """-> prompt ids, with the template's tokens."""
    text = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
    return [tok.special["<|user|>"], *tok.encode(text), tok.special["<|assistant|>"]]

def load_data(cfg, tok, block_size):
    """-> training and held-out prompts. What leaves no room for an answer is counted and left out."""
    if cfg.data == "stories":
        paths = [require("data/stories") / f"instructions{split}.jsonl" for split in ("", "_val")]
        splits = [read_jsonl(path, ["instruction", "input"]) for path in paths]
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
    story = lambda r: r.get("task", "story") == "story"
    return kept[0], [*filter(story, kept[1])][:cfg.prompts] + [r for r in kept[1] if not story(r)][:cfg.prompts]

# the lesson's mathematics. In all (B, T) arrays index t is about token t + 1: its log-probability, whether it is part
# of the answer (mask), and the advantage of choosing it.

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

def aggregate(x, mask, norm, longest):
    """Terms per token (B, T) -> one number. "tokens": their mean over the batch. "sequence": each answer's mean, then
    the mean of the answers, as Shao et al. wrote it; a token of a long answer counts less. "constant": their sum over
    B * longest, so that no length counts (Liu et al. 2025, Dr. GRPO). Of several processes each gets its share."""
    if norm == "tokens":
        return masked_mean(x, mask)
    each = (x * mask).sum(dim=1) / (mask.sum(dim=1) if norm == "sequence" else longest)
    return each.sum() / total(torch.tensor(len(each), device=x.device))

def group_advantage(reward, group, scale_std):
    """Rewards (B,) of answers whose groups stand together -> reward - mean of its group, (B,); exactly 0 where all of
    a group are equal. [1, 0, 0, 1], group 2 -> [.5, -.5, -.5, .5]. scale_std: over the group's standard deviation."""
    r = reward.view(-1, group)
    advantage = r - r.mean(dim=1, keepdim=True)
    if scale_std:
        advantage = advantage / (r.std(dim=1, keepdim=True) + 1e-4)
    return advantage.masked_fill((r == r[:, :1]).all(dim=1, keepdim=True), 0.0).flatten()

def kl_penalty(now, then, ids, kind):
    """KL(pi || pi_sft) at N tokens: log-probabilities now and then (N, V), and the ids (N,) that came -> (N,).
    exact sums over the vocabulary. With d = log pi - log pi_sft of the token that came (Schulman 2020): k1 = d, which
    as a loss has gradient 0 on average; k2 = d^2 / 2, whose gradient is the exact one's on average; k3 = e^-d - 1 + d.
    """
    if kind == "exact":
        return (now.exp() * (now - then)).sum(dim=-1)
    d = pick(now, ids) - pick(then, ids)
    return {"k1": d, "k2": d ** 2 / 2, "k3": (-d).exp() - 1 + d}[kind]

def ppo_loss(logp, old_logp, advantages, mask, clip):
    """The clipped surrogate (Schulman et al. 2017, eq. 7) -> (B, T) losses, share of tokens at which the clip acts."""
    ratio = (logp - old_logp).exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.max(free, held), masked_mean((held > free).float(), mask)

# rollout, reward, learn, evaluate -------------------------------------------------------------------------------------

def log_probs(model, ids, mask):
    """Log-probabilities (N, V) at the N positions of ids (B, T) whose next token is an answer's."""
    return model.lm_head(model.trunk(ids)[mask]).log_softmax(dim=-1)

@torch.no_grad()
def rollout(policy, reference, tok, records, cfg, device):
    """One answer to each record at temperature 1, from the whole vocabulary: what is scored is what was sampled."""
    end = tok.special["<|end|>"]
    starts = torch.tensor([len(r["prompt"]) for r in records], device=device)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r["prompt"]) for r in records], True, end).to(device)
    ids, logp = policy.generate(ids, cfg.max_new_tokens, lengths=starts, stop=end, return_logp=True)
    sampled = logp.isfinite()  # (B, T): not the prompt, not the padding
    lengths = starts + sampled.sum(dim=1)
    ended = ids.gather(1, lengths[:, None] - 1).squeeze(1) == end
    mask = sampled[:, 1:]
    return {
        "ids": ids, "starts": starts, "lengths": lengths, "ended": ended, "mask": mask,
        "logp": logp[:, 1:].nan_to_num(), "then": log_probs(reference, ids[:, :-1], mask),
    }

def texts(batch, tok):
    """-> list of (answer, whether it ended)."""
    rows = zip(*(batch[name].tolist() for name in ("ids", "starts", "lengths", "ended")))
    return [(tok.decode(ids[start:length - ended]), ended) for ids, start, length, ended in rows]

def judged(records, answers):
    """1.0 where all checks hold, else 0.0: gold. NaN where a record has no checks."""
    verdicts = [judge(r, text, ended) for r, (text, ended) in zip(records, answers)]
    return torch.tensor([float("nan") if v is None else float(v[2]) for v in verdicts])

def load_reward(cfg, tok, device):
    """-> a function of (records, batch, answers) that gives the rewards (B,)."""
    if cfg.reward == "judge":
        return lambda records, batch, answers: judged(records, answers).to(device)
    if cfg.reward == "model":
        scorer = load_checkpoint(cfg.rm or require("part_7/out/rm.pt"), "rm")
        need(scorer["tokenizer"] == tok.state(), "the reward model and the policy have different tokenizers")
        rm = RewardModel.load(scorer, **scorer["head"]).to(device).requires_grad_(False)
        return lambda records, batch, answers: rm(  # clipped, and with a penalty for no end, as in Part 8
            batch["ids"], batch["starts"], batch["lengths"]).clamp(-1.5, 1.5).masked_fill(~batch["ended"], -2.0)
    file, _, name = cfg.reward.rpartition(":")
    need(Path(file).is_file(), f"--reward={cfg.reward}: it is judge, model, or FILE.py:FUNCTION of a file that exists")
    function = runpy.run_path(file).get(name) or fail(f"--reward: {file} has no function {name}")
    return lambda records, batch, answers: torch.tensor(
        [float(function(r, text)) for r, (text, _) in zip(records, answers)], device=device)

def learn(policy, optimizer, batch, advantages, cfg, generator):
    """The updates of one rollout: epochs x minibatches. Only the first one is on-policy; clipping is for the others."""
    stats = {"loss": [], "clip_fraction": [], "entropy": []}
    row_of = batch["mask"].nonzero()[:, 0]  # (N,) whose answer each of batch["then"]'s tokens is in
    for _ in range(cfg.epochs):
        for rows in torch.randperm(len(advantages), generator=generator).chunk(cfg.minibatches):
            rows = rows.sort().values.to(row_of.device)  # in the order in which their tokens stand
            old, mask, ids = batch["logp"][rows], batch["mask"][rows], batch["ids"][rows]
            came, then = ids[:, 1:][mask], batch["then"][torch.isin(row_of, rows)]
            all_logp = log_probs(policy, ids[:, :-1], mask)
            logp = old.masked_scatter(mask, pick(all_logp, came))
            if "first_ratio_error" not in stats:
                stats["first_ratio_error"] = (((logp - old).exp() - 1).abs() * mask).max().item()
            policy_part, clipped = ppo_loss(logp, old, advantages[rows, None], mask, cfg.clip)
            kl = torch.zeros_like(old).masked_scatter(mask, kl_penalty(all_logp, then, came, cfg.kl))
            loss = aggregate(policy_part + cfg.kl_coef * kl, mask, cfg.loss_norm, cfg.max_new_tokens)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for p in policy.parameters():
                total(p.grad)  # the losses are shares of one mean
            torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
            optimizer.step()
            entropy = torch.special.entr(all_logp.detach().exp()).sum() / total(mask.sum())
            for name, value in (("loss", loss), ("clip_fraction", clipped), ("entropy", entropy)):
                stats[name].append(total(value.detach()).item())
    return stats

@torch.no_grad()
def evaluate(policy, reference, tok, records, cfg, device):
    """Answers to held-out prompts -> {task: gold}, the stories' exact KL in nats per answer, and the answers."""
    answers, kls, tasks = [], [], [r.get("task", "story") for r in records]
    for i in range(0, len(records), 128):
        batch = rollout(policy, reference, tok, records[i:i + 128], cfg, device)
        mask, now = batch["mask"], log_probs(policy, batch["ids"][:, :-1], batch["mask"])
        exact = torch.zeros_like(batch["logp"]).masked_scatter(mask, kl_penalty(now, batch["then"], None, "exact"))
        kls += exact.sum(dim=1).tolist()
        answers += texts(batch, tok)
    held, kl = judged(records, answers).tolist(), sum(kl for kl, task in zip(kls, tasks) if task == "story")
    gold = {task: sum(h for h, t in zip(held, tasks) if t == task) / tasks.count(task) for task in dict.fromkeys(tasks)}
    return gold, kl / max(1, tasks.count("story")), answers

def draw(records, sft, grpo, path):
    """The run as one figure: log records, and gold by task on held-out prompts before and after."""
    task = next(iter(sft[0]))
    title = f"GRPO: held-out gold on {task} {sft[0][task]:.2f} -> {grpo[0][task]:.2f} at {grpo[1]:.1f} nats of KL"
    fig, axes = figure(title, rows=2, columns=3, height=5)
    panels = {"reward": "mean", "kl": "nats per answer", "entropy": "nats per token",
              "equal_groups": "share of groups", "length": "tokens"}
    for i, (ax, key) in enumerate(zip(axes.flat, panels)):
        ax.plot([r["step"] for r in records], [r[key] for r in records], color=f"C{i}")
        ax.set(title=key.replace("_", " "), ylabel=panels[key], xlabel="iteration")
    last, at = axes[1, 2], torch.arange(len(sft[0]))
    last.barh(at + 0.2, sft[0].values(), height=0.4, color="gray", label="SFT")
    last.barh(at - 0.2, grpo[0].values(), height=0.4, color="C2", label="GRPO")
    last.set(title="held-out gold", xlabel="share", yticks=at, yticklabels=sft[0], xlim=(0, 1))
    last.legend(fontsize=8)
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # data and models
    sft = load_checkpoint(cfg.init or require("part_6/out/sft.pt"), "sft")
    tok = Tokenizer.load(sft["tokenizer"])
    policy, reference = GPT.load(sft).to(device), GPT.load(sft).to(device)
    score = load_reward(cfg, tok, device)
    train, val = load_data(cfg, tok, policy.cfg.block_size)
    if cfg.reward == "judge" and not all("check" in r for r in train):
        fail(f'--data={cfg.data}: the judge wants a "check" in every record: take --reward=FILE.py:FUNCTION')
    before = evaluate(policy, reference, tok, val, cfg, device)
    torch.manual_seed(cfg.seed + rank)  # from here on each process draws answers of its own
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, eps=1e-5, weight_decay=0.0)
    generator = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(train), generator=generator).tolist()
    log = Log(cfg, cfg.steps)
    print(f"{len(train):,} prompts, {len(val):,} held out")

    # loop
    n = cfg.batch_size // cfg.group  # prompts
    for step in range(cfg.steps):
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - step / cfg.steps)
        start, mine = time.time(), range(step * n + rank, step * n + n, world)
        asked = [train[order[i % len(order)]] for i in mine for _ in range(cfg.group)]  # round and round
        batch = rollout(policy, reference, tok, asked, cfg, device)
        answers = texts(batch, tok)
        reward = score(asked, batch, answers)
        advantages = group_advantage(reward, cfg.group, cfg.scale_std)
        middle = time.time()
        stats = learn(policy, optimizer, batch, advantages, cfg, generator)
        assert stats["first_ratio_error"] < 1e-4, f"sampler and scorer disagree by {stats['first_ratio_error']}"

        # report
        mask, mean = batch["mask"], lambda x: total(x.float().mean()).item() / world  # over all processes' answers
        kl = batch["logp"] - batch["logp"].masked_scatter(mask, pick(batch["then"], batch["ids"][:, 1:][mask]))  # k1
        values = {
            "reward": mean(reward), "gold": mean(judged(asked, answers)), "kl": mean(kl.sum(dim=1)),
            **{k: sum(v) / max(len(v), 1) if isinstance(v, list) else v for k, v in stats.items()},
            "equal_groups": mean((advantages.view(-1, cfg.group) == 0).all(dim=1)),  # they teach nothing
            "length": mean(mask.sum(dim=1)), "ended": mean(batch["ended"]),
            "rollout_s": middle - start, "update_s": time.time() - middle,
            "completions_per_s": cfg.batch_size / (time.time() - start),
        }
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            golds, values["val_kl"], _ = evaluate(policy, reference, tok, val, cfg, device)
            values |= {f"val_{task}": share for task, share in golds.items()}
        log(step, **values)
    world == 1 or dist.destroy_process_group()
    rank == 0 or sys.exit(0)

    # what came of it: five prompts side by side, the table, the figure
    seconds, records = log.seconds, read_jsonl(Path(cfg.out) / "log.jsonl", ["step"])
    after = evaluate(policy, reference, tok, val, cfg, device)
    save_checkpoint(Path(cfg.out) / "grpo.pt", kind="grpo", changed=cfg.changed, step=cfg.steps, config=asdict(cfg),
                    **policy.to_checkpoint(), tokenizer=tok.state())
    golds = {f"{name}_{task}": g for name, by in (("sft", before), ("grpo", after)) for task, g in by[0].items()}
    save_metrics(cfg, sft_gold=before[0].get("story"), grpo_gold=after[0].get("story"), kl=after[1], **golds,
                 completions_per_s=sum(r["completions_per_s"] for r in records) / cfg.steps,
                 first_ratio_error=max(r["first_ratio_error"] for r in records), seconds=seconds, seed=cfg.seed)
    draw(records, before, after, Path(cfg.out) / "train_grpo.png")
    for r, (old, _), (new, _) in list(zip(val, before[2], after[2]))[:5]:
        print(f"\n{r['instruction']}\n  SFT:  {old}\n  GRPO: {new}")
    print(f"\n{'gold on held-out prompts':26} {'SFT':>6} {'GRPO':>6}   {seconds:.0f} s, {after[1]:.2f} nats per story")
    for task in before[0]:
        print(f"{task:26} {before[0][task]:6.3f} {after[0][task]:6.3f}")
