"""
Part 10, looking into thoughts: can the intermediate results of a problem be read out of a thought
that has no words, and does the model use what is there?

    python part_10/demo_thoughts.py              the models of train_thoughts.py
    python part_10/demo_thoughts.py --seeds=3    three seeds: how much is chance?

The models of train_thoughts.py solve 7-2+5: the result of the first step is 5, and that of the
second is 10. If a thought takes the place of a step, its result could be in it. A *probe* is a
linear classifier that is trained to name a result from a hidden state. It is trained on the
problems for training, and then it reads the states of held-out problems. The model does not change.

A probe alone proves little, because much can be read from any rich vector. There are two controls:

    pause       the states at the same places of the model that reads pause tokens; it has computed
                as much, but it cannot feed anything back
    shuffled    the same states of the model with thoughts, but in training each problem has the
                results of another one; what is left is what can be guessed

What can be read need not be used. So the second figure exchanges a thought: the model reads one
problem, gets one of its thoughts from another problem, and goes on. If it needs what the thought
says, its answer must become wrong. If the thought says just the result of a step, we even know what
the answer must become: the result of the other problem, and then the operations of its own. With
7-2+5, and thought 1 from a problem whose first result is 9, this is 9+5.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import subprocess
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

import train_thoughts
from model import GPTConfig
from shared import (
    ROOT,
    fail,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    pick_device,
    require,
    save_figure,
    save_metrics,
    set_seed,
)
from train_thoughts import GrowingCache, Thinker, mean_of, n_thoughts, range_text

THOUGHTS, PAUSE, SHUFFLED = "thoughts", "pause", "shuffled"


@dataclass
class Config:
    init: str = ""  # checkpoint of train_thoughts.py; empty: part_10/out/thoughts.pt
    probe_steps: int = 400  # optimizer steps of a probe
    batch_size: int = 512  # problems per step
    lr: float = 0.02  # learning rate of AdamW for the probe; it falls linearly to 0
    seed: int = 0  # seed of all random numbers, and the first seed of the models
    seeds: int = 1  # number of seeds to look into: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script


# models -------------------------------------------------------------------------------------------


def find_checkpoint(cfg):
    """The checkpoint with the models of all seeds, which are trained now if they are missing."""
    if cfg.init:
        return load_checkpoint(cfg.init, "thoughts")
    if cfg.seed == 0 and cfg.seeds == 1:
        return load_checkpoint(require("part_10/out/thoughts.pt"), "thoughts")

    # This is where train_thoughts.py writes when it is started with the same two options.
    options = [f"--{name}={getattr(cfg, name)}" for name in ("seed", "seeds")]
    changed = [option for option in options if option not in ("--seed=0", "--seeds=1")]
    folder = Path(__file__).resolve().parent / "out" / ",".join(o[2:] for o in changed)
    path = folder / "thoughts.pt"
    if not path.exists():
        command = [sys.executable, str(ROOT / "part_10/train_thoughts.py"), *changed]
        print(f"{path} is missing: running train_thoughts.py {' '.join(changed)}", flush=True)
        done = subprocess.run(command)
        if done.returncode != 0:
            sys.exit(done.returncode)  # it has already printed why
    return load_checkpoint(path, "thoughts")


def load_model(checkpoint, seed, kind, device):
    """One of the models in a checkpoint of train_thoughts.py."""
    if kind not in checkpoint["models"].get(seed, {}):
        fail(
            f"the checkpoint has no model {kind!r} of seed {seed}: "
            "train it with this seed, and with all --kinds"
        )
    model = Thinker(GPTConfig(**checkpoint["gpt_config"]), kind, checkpoint["vocabulary"])
    model.load_state_dict(checkpoint["models"][seed][kind])
    return model.to(device).requires_grad_(False)


# the probe ----------------------------------------------------------------------------------------


@torch.no_grad()
def states_of(model, problems, n):
    """The hidden states after the question and after each of n thoughts -> (N, n + 1, C)."""
    parts = []
    for question in problems.question.split(512):
        parts.append(model.think(question, n).states)
    return torch.cat(parts)


def train_probe(states, results, n_classes, cfg, generator):
    """Trains a linear classifier for each pair of a state and a result, all at the same time.

    states (N, S, C) and results (N, L), class numbers -> a function from states (M, S, C) to
    predicted results (M, S, L).
    """
    N, S, C = states.shape
    L = results.size(1)
    mean = states.mean(dim=0)
    std = states.std(dim=0) + 1e-6

    weight = torch.zeros(S, L, C, n_classes, device=states.device, requires_grad=True)
    bias = torch.zeros(S, L, n_classes, device=states.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=cfg.lr, weight_decay=0.01)

    def logits_of(states):
        x = (states - mean) / std
        return torch.einsum("nsc,slcv->nslv", x, weight) + bias

    for step in range(cfg.probe_steps):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * (1 - step / cfg.probe_steps)
        rows = torch.randint(N, (cfg.batch_size,), generator=generator).to(states.device)
        logits = logits_of(states[rows])  # (batch, S, L, V)
        targets = results[rows][:, None].expand(-1, S, -1)  # (batch, S, L)

        # A sum over the pairs: the classifiers do not share a parameter, so each of them learns as
        # if it were alone.
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten()) * S * L
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def predict(states):
        return logits_of(states).argmax(dim=-1)

    return predict


def share_right(predicted, results):
    """Predictions (N, S, L) against results (N, L) -> the share that is right, S lists of L."""
    return (predicted == results[:, None]).float().mean(dim=0).tolist()


# exchanging a thought -----------------------------------------------------------------------------


@torch.no_grad()
def solve_with_exchange(model, question, n, exchanged):
    """The answers (B,) if the thought with this number, counted from 1, is that which the model has
    about the next problem of the batch. 0: no thought is exchanged.

    The thoughts after it are the model's own, computed from what it has read until then.
    """
    cache = GrowingCache()
    state = model.read(model.wte(question), cache)[:, -1:]
    others = model.think(question, n).states.roll(-1, dims=0)  # (B, n + 1, C)
    for i in range(1, n + 1):
        thought = others[:, i - 1 : i] if i == exchanged else state
        state = model.read(thought, cache)
    state = model.read(model.embed(train_thoughts.ANSWER, len(question)), cache)
    return model.lm_head(state).argmax(dim=-1).squeeze(1)


def answer_with_other_result(problems, step, vocabulary):
    """What is the answer if step number `step`, counted from 1, had the result of the next problem
    of the batch? -> token ids (B,), or -1 if the answer is no number of the vocabulary.

    The operations that follow are the problem's own. 7-2+5 with 9 as the result of step 1 -> 14.
    """
    word_of = {i: word for word, i in vocabulary.items()}
    others = problems.results[:, step - 1].roll(-1)  # (B,)
    answers = []
    for question, other in zip(problems.question.tolist(), others.tolist()):
        value = int(word_of[other])
        for token in question[step + 1 : -1]:  # the operations after this step, without "?"
            value = calculate(value, word_of[token])
        answers.append(vocabulary.get(str(value), -1))
    return torch.tensor(answers, device=problems.results.device)


def calculate(value, word):
    """5, "+5" -> 10. The dot changes nothing."""
    if word == train_thoughts.NOTHING:
        return value
    number = int(word[1:])
    if word[0] == "+":
        return value + number
    if word[0] == "-":
        return value - number
    return value * number


class Exchange(NamedTuple):
    """What the answers are if one thought comes from another problem."""

    right: float  # share of the answers that are right all the same
    follows: float  # share that follows from the other problem's result and the own operations


def exchange(model, problems, n, per_step):
    """One Exchange for no thought, and one for each of n thoughts, exchanged alone."""
    truth = problems.results[:, -1]
    rows = []
    for exchanged in range(n + 1):
        answers = solve_with_exchange(model, problems.question, n, exchanged)
        expected = truth
        if exchanged > 0:
            step = (exchanged - 1) // per_step + 1  # the step whose place this thought has
            expected = answer_with_other_result(problems, step, model.vocabulary)
        right = (answers == truth).float().mean().item()
        follows = (answers == expected).float().mean().item()
        rows.append(Exchange(right, follows))
    return rows


# the figures --------------------------------------------------------------------------------------


def mean_table(tables):
    """Tables of equal size, one for each seed -> the table of their means."""
    return torch.tensor(tables).mean(dim=0)


def diagonal(table, per_step):
    """How well is the result of step i read where its thought is complete? One number for each
    step. With per_step thoughts for each step these are the states of thoughts per_step,
    2 * per_step, ..."""
    return [table[(i + 1) * per_step - 1][i] for i in range(len(table[0]))]


def draw_probe(title, tables, path):
    """A table of shares for each model: rows are states, columns are steps."""
    fig, axes = figure(title, "result of step", columns=len(tables), height=4.4)
    for ax, (name, runs) in zip(axes, tables.items()):
        table = mean_table(runs)
        rows, columns = table.shape
        ax.imshow(table, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for row in range(rows):
            for column in range(columns):
                value = table[row, column].item()
                colour = "black" if value > 0.5 else "white"
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
        ax.set_title(name, fontsize=11)
        ax.set_xticks(range(columns), range(1, columns + 1))
        labels = [f"thought {row + 1}" for row in range(rows - 1)] + ["last state"]
        ax.set_yticks(range(rows), labels if ax is axes[0] else [""] * rows)
        ax.grid(False)
    save_figure(fig, path)


def draw_exchange(title, runs, path):
    """Two shares of answers for each thought that is exchanged: means, and a dot for each seed."""
    fig, ax = figure(title, "thought that comes from another problem", "share of answers")
    labels = {
        "right": "the right answer to the problem",
        "follows": "the answer that follows from the other result",
    }
    for i, rows in enumerate(zip(*runs)):
        for column, (field, label) in enumerate(labels.items()):
            # Without an exchange the two shares are the same, and one bar is enough.
            if i == 0 and field == "follows":
                continue
            values = [getattr(row, field) for row in rows]
            position = i
            if i > 0:
                position = i + 0.4 * column - 0.2
            [bar] = ax.bar(position, mean_of(values), width=0.38, color=f"C{column}", alpha=0.8)
            ax.plot([position] * len(values), values, "k.")
            if i == 1:
                bar.set_label(label)
    ax.set_xticks(range(len(runs[0])), ["none", *range(1, len(runs[0]))])
    ax.set(ylim=(0, 1.03))
    fig.legend(loc="outside lower center", ncols=2)
    save_figure(fig, path)


def finding(tables, per_step):
    """The title of the first figure."""
    texts = {}
    for name, runs in tables.items():
        texts[name] = range_text([mean_of(diagonal(table, per_step)) for table in runs])
    return (
        f"The result of step i, read from thought i: {texts[THOUGHTS]} right\n"
        f"from the state at a pause token: {texts[PAUSE]}; with shuffled results: {texts[SHUFFLED]}"
    )


def finding_exchange(runs):
    """The title of the second figure."""
    own = range_text([run[0].right for run in runs])
    right = range_text([mean_of([row.right for row in run[1:]]) for run in runs])
    follows = range_text([mean_of([row.follows for row in run[1:]]) for run in runs])
    return (
        f"Own thoughts: {own} right. One thought of another problem: {right} right;\n"
        f"{follows} of the answers follow from the other problem's result"
    )


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    checkpoint = find_checkpoint(cfg)
    out = output_folder(cfg)

    # Only problems with most operations have a result for every step.
    trained = train_thoughts.Config(**checkpoint["config"])
    data = train_thoughts.load_data(trained)
    if data.vocabulary != checkpoint["vocabulary"]:
        fail("the problems are not those that the models were trained on: train them again")
    L = data.train.results.size(1)
    train = data.train.rows(data.train.level == L).to(device)
    val = data.val.rows(data.val.level == L).to(device)
    print(
        f"{len(train.level):,} problems of {L} operations for the probes, {len(val.level)} to read"
    )

    tables = {THOUGHTS: [], PAUSE: [], SHUFFLED: []}
    own_head = {THOUGHTS: [], PAUSE: []}
    exchanges = []
    n_classes = len(data.vocabulary)
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        set_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        for kind in (THOUGHTS, PAUSE):
            model = load_model(checkpoint, seed, kind, device)
            n = n_thoughts(kind, L, trained)
            states = states_of(model, train, n)  # (N, n + 1, C)
            val_states = states_of(model, val, n)
            predict = train_probe(states, train.results, n_classes, cfg, generator)
            tables[kind].append(share_right(predict(val_states), val.results))

            # What would the model say at this place? The head reads the state as a number.
            said = model.lm_head(val_states).argmax(dim=-1)  # (N, n + 1)
            own_head[kind].append(share_right(said[:, :, None].expand(-1, -1, L), val.results))

            if kind == THOUGHTS:
                order = torch.randperm(len(train.level), generator=generator).to(device)
                predict = train_probe(states, train.results[order], n_classes, cfg, generator)
                tables[SHUFFLED].append(share_right(predict(val_states), val.results))
                exchanges.append(exchange(model, val, n, trained.per_step))
        print(f"    seed {seed}: " + finding({k: v[-1:] for k, v in tables.items()}, 1), flush=True)

    # what came out
    title = finding(tables, trained.per_step)
    title_exchange = finding_exchange(exchanges)
    print(f"\n{title}\n{title_exchange}")
    for name, runs in own_head.items():
        shares = [mean_of(diagonal(table, trained.per_step)) for table in runs]
        print(f"read by the model's own head, {name}: {range_text(shares)}")
    save_metrics(
        out,
        name="demo_thoughts",
        tables=tables,
        own_head=own_head,
        exchanges=exchanges,
        finding=title,
        finding_exchange=title_exchange,
        seeds=cfg.seeds,
    )
    draw_probe(title, tables, out / "demo_thoughts.png")
    draw_exchange(title_exchange, exchanges, out / "demo_thoughts_exchange.png")
