"""
Part 7 - is the reward model sane? Length alone, shuffled labels, and its score along a good and a bad story.

    python part_7/demo_shaping.py
    python part_7/demo_shaping.py --pair=3     another held-out pair's stories, token by token

A reward model may learn a shortcut: answers that people prefer tend to be longer (Singhal et al. 2023). So length alone
is asked first. Labels turned round at random must teach nothing: the control for a leak of the answer into the input.
The reward is the mean of the answer's token scores, so it can be drawn where it arises; the model is causal, so a token
is judged by what stands before it and by itself. The two trainings are short: 48 steps of 16 instead of 500 of 24.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass

import numpy as np
import torch

from model import RewardModel
from shared import Log, cli, fail, figure, load_checkpoint, require, save_figure, save_metrics, setup
from tokenizer import Tokenizer
from train_rm import (Config as RMConfig, evaluate, get_batch, length_probe, load_data, lr_scale, make_optimizers,
                      preference_loss, rewards, shuffled)

@dataclass
class Config:
    init: str = "part_6/out/sft.pt"  # the SFT model, where the two short trainings start
    rm: str = "part_7/out/rm.pt"  # the reward model that is looked at
    data: str = "stories"  # or the path of a JSONL file with prompt, chosen, rejected
    pair: int = 0  # which held-out pair is drawn token by token
    steps: int = 48  # optimizer steps with right and with shuffled labels
    batch_size: int = 16  # pairs per step
    held_out: int = 500  # pairs to evaluate on
    seed: int = 0
    device: str = ""  # cuda, mps or cpu; "": the best there is
    out: str = ""  # "": out/ beside this script
    def __post_init__(self):
        assert min(self.steps, self.batch_size, self.held_out) > 0, "steps, batch_size, held_out must be at least 1"

def train(model, pairs, rm, device, log, first, labels):
    optimizers = make_optimizers(model, rm)
    for step in range(rm.steps):
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * lr_scale(step, rm)
        chosen, rejected = model(*(z.to(device) for z in get_batch(pairs, step, rm))).chunk(2)
        loss = preference_loss(chosen, rejected, rm.loss, rm.margin, rm.center)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), rm.grad_clip)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        log(first + step, labels=labels, loss=loss.item())

@torch.no_grad()
def along(model, pair, side, device):
    """The normalised score of each token of one answer, its end token too: their mean is the answer's reward."""
    ids = torch.tensor([pair["prompt"] + pair[side]], device=device)
    scores = model.token_scores(ids, torch.tensor([ids.size(1)], device=device))[0, len(pair["prompt"]):]
    return ((scores - model.shift) * model.scale).cpu()

def spread(share, n):
    """95 % of a share of n: half of its interval."""
    return 1.96 * (share * (1 - share) / n) ** 0.5

def draw_checks(accuracy, n, lengths, reward, said, path):
    """Left: accuracy of each way to choose. Right: reward against length, of the preferred and of the other answers."""
    fig, (left, right) = figure(said, columns=2, height=4)
    share = np.array(list(accuracy.values()))
    left.barh(list(accuracy), share, xerr=spread(share, n), color="C0", alpha=0.8, capsize=3)
    left.axvline(0.5, color="black", linestyle="--", label="chance")
    left.set(xlabel="share of held-out labels", xlim=(0.3, 1))
    left.legend(fontsize=8)
    for side, colour in ((1, "C3"), (0, "C2")):
        right.plot(lengths[side], reward[side], ".", color=colour, markersize=4, alpha=0.5,
                   label=("preferred", "not preferred")[side])
    right.set(xlabel="length of the answer, in tokens", ylabel="reward, in sd of the policy's answers")
    right.legend(fontsize=8)
    save_figure(fig, path)

def draw_tokens(words, scores, said, path):
    """words and scores: of the preferred and of the other answer. A bar per token."""
    fig, axes = figure(said, rows=2, height=6)
    limits = min(s.min() for s in scores.values()) * 1.1, max(s.max() for s in scores.values()) * 1.1
    for (side, s), ax in zip(scores.items(), axes):
        ax.bar(range(len(s)), s, color=["C2" if value > 0 else "C3" for value in s])
        ax.axhline(s.mean(), color="black", linestyle="--", label=f"mean = the reward, {s.mean():+.2f}")
        ax.set_xticks(range(len(s)), words[side], rotation=90, fontsize=8)
        ax.set(ylabel=f"score, {side}", ylim=limits, xlim=(-1, max(map(len, words.values()))))
        ax.legend(fontsize=8, loc="upper center")
    axes[1].set_xlabel("token of the answer")
    save_figure(fig, path)

if __name__ == "__main__":
    cfg = cli(Config())
    device, _ = setup(cfg)
    saved, sft = load_checkpoint(require(cfg.rm), "rm"), load_checkpoint(require(cfg.init), "sft")
    model, tok = RewardModel.load(saved, **saved["head"]).to(device), Tokenizer.load(saved["tokenizer"])
    world, val = load_data(cfg, tok, model.cfg.block_size)
    val = val[:cfg.held_out]
    0 <= cfg.pair < len(val) or fail(f"--pair={cfg.pair} must be from 0 to {len(val) - 1}")

    # what length alone knows, and labels that mean nothing
    log, accuracy = Log(cfg, 2 * cfg.steps, name="demo_shaping"), {"length alone": length_probe(world, val)}
    rm = RMConfig(steps=cfg.steps, batch_size=cfg.batch_size, seed=cfg.seed)
    for i, labels in enumerate(("shuffled labels", "right labels")):
        torch.manual_seed(cfg.seed)
        new = RewardModel.load(sft).to(device)
        accuracy["untrained"] = evaluate(new, val, device)[0]  # its head starts with what the policy expects
        train(new, world if i else shuffled(world, cfg.seed), rm, device, log, i * cfg.steps, labels)
        accuracy[labels] = evaluate(new, val, device)[0]
    reward = torch.stack(rewards(model, val, device))
    accuracy["rm.pt"] = (reward[0] > reward[1]).float().mean().item()
    lengths = torch.tensor([[len(p[side]) for p in val] for side in ("chosen", "rejected")]).float()
    r = torch.corrcoef(torch.stack([lengths.flatten(), reward.flatten()]))[0, 1].item()
    for name, share in accuracy.items():
        print(f"{name:16} accuracy {share:.3f} +- {spread(share, len(val)):.3f}")
    learned = accuracy["shuffled labels"] - max(0.5, accuracy["untrained"]) > spread(0.5, len(val))
    said = (f"Shuffled labels teach {'SOMETHING' if learned else 'nothing'}: {accuracy['shuffled labels']:.2f}, "
            f"untrained {accuracy['untrained']:.2f}, right labels {accuracy['right labels']:.2f};\n"
            f"length alone {accuracy['length alone']:.2f}; reward and length correlate {r:+.2f}")
    print(said)
    draw_checks(accuracy, len(val), lengths, reward, said, Path(cfg.out) / "demo_shaping_checks.png")

    # where in a story the reward arises
    pair = val[cfg.pair]
    scores = {side: along(model, pair, side, device) for side in ("chosen", "rejected")}
    words = {side: [tok.decode([i]) for i in pair[side]] for side in scores}
    low = {side: s.argmin().item() for side, s in scores.items()}
    print(tok.decode(pair["prompt"]))
    for side, s in scores.items():
        print(f"  {side}: {s.mean():+.2f}, lowest at {words[side][low[side]]!r} ({s.min():+.2f})")
    said = "\n".join(f"{side}: reward {s.mean():+.2f}, lowest token \"{words[side][low[side]].strip()}\" {s.min():+.2f}"
                     for side, s in scores.items())
    draw_tokens(words, scores, said, Path(cfg.out) / "demo_shaping_tokens.png")
    save_metrics(cfg, name="demo_shaping", **{k.replace(" ", "_"): v for k, v in accuracy.items()},
                 length_correlation=r, reward_chosen=scores["chosen"].mean().item(),
                 reward_rejected=scores["rejected"].mean().item(), held_out=len(val), steps=cfg.steps, seed=cfg.seed)
