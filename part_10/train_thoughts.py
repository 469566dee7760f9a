"""
Part 10: thinking without words. Between the question and the answer a model takes a few steps of
thought that are vectors instead of words. Does that help as much as writing the steps down?

    python part_10/train_thoughts.py                     one seed
    python part_10/train_thoughts.py --seeds=3           three seeds: how much is chance?
    python part_10/train_thoughts.py --n_layer=2         two blocks: a chance for pause tokens
    python part_10/train_thoughts.py --curriculum=false  thoughts from the first step of training on
    python part_10/train_thoughts.py --kinds=thoughts,steps --per_step=2
                                                         only two of the arms, more thoughts
    python part_10/train_thoughts.py --data=my.jsonl     your own problems with solutions in steps

Starts here. The model is model.py's, with a method that reads vectors instead of tokens. lr_scale
is that of part_4/train.py.

A language model that writes the steps of a solution reads its own words: the last hidden state
becomes a word, and the embedding of this word is the next input. Coconut (Hao et al. 2024,
"Training large language models to reason in a continuous latent space") leaves out the word. The
last hidden state itself is the next input, and this is called a continuous thought.

The problems are those of Part 9's reasoning laboratory without their words. What is left is the
arithmetic, one token for each number or operation, filled up with "." to equal length:

    question    7 -2 +5 . . ?        in words: Tom had 7 plums. Tom gave 2 to Anna. ...
    steps       5 10 10 10           the result after each operation; "." changes nothing
    answer      = 10

Five kinds of models see the same problems in the same order, for as many optimizer steps:

    at_once        7 -2 +5 . . ?              = 10    the answer alone
    internalized   7 -2 +5 . . ?              = 10    the same after a curriculum, see below
    pause          7 -2 +5 . . ? P  P  P  P   = 10    tokens without content (Goyal et al. 2023)
    thoughts       7 -2 +5 . . ? t1 t2 t3 t4  = 10    continuous thoughts
    steps          7 -2 +5 . . ? 5  10 10 10  = 10    the steps are written, one number each

Nobody can say what a thought should contain, so there is nothing to train it on but the answer
behind it. Coconut's curriculum makes this easier. Training begins with all steps written. Then the
first step is replaced by a thought, then the first two, and so on (stage). internalized goes
through the same curriculum, but puts nothing in the place of a step (Deng et al. 2024, "From
explicit CoT to implicit CoT"). pause puts a token there that is always the same. So these two tell
apart what comes from the curriculum, from more computation, and from a thought that can carry
something on. Note that pause tokens need a second block. In the first one, keys and values come
from the embeddings alone, and those of a pause token are always the same.

Shapes: B batch, Q tokens of a question, L steps of a solution, n thoughts, T time, C channels,
        V vocabulary.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import re
import time
import zlib
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from shared import (
    Log,
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    read_jsonl,
    require,
    save_checkpoint,
    save_figure,
    save_metrics,
    set_seed,
)

KINDS = ("at_once", "internalized", "pause", "thoughts", "steps")
NOTHING, ASK, ANSWER, PAUSE = ".", "?", "=", "<pause>"
SPECIAL = [NOTHING, ASK, ANSWER, PAUSE]
EQUATION = re.compile(r"(\d+) ?([-+*]) ?(\d+) ?= ?(\d+)")


@dataclass
class Config:
    # data
    data: str = "stories"  # stories (the built-in world) or a JSONL file; "check" has the steps
    longest: int = 4  # operations; problems with more are left out
    # models
    kinds: str = ",".join(KINDS)  # which kinds of models are trained, separated by commas
    per_step: int = 1  # thoughts, or pause tokens, in the place of one written step
    curriculum: bool = True  # replace the written steps one after the other; false: all at once
    n_layer: int = 1  # number of blocks; with more of them there is less need for thoughts
    n_head: int = 4  # heads per block
    n_embd: int = 64  # channels of the residual stream
    # optimization
    steps: int = 1000  # optimizer steps for each model, all stages of the curriculum together
    batch_size: int = 128  # problems per step
    lr: float = 3e-3  # learning rate of AdamW
    warmup: float = 0.05  # share of the steps in which the learning rate rises to its peak
    decay: float = 0.25  # share of the steps, at the end, in which it falls linearly to 0
    grad_clip: float = 1.0  # largest norm of the gradient
    # run
    eval_every: int = 100  # steps between examinations on held-out problems; 0: only at the end
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.n_embd % (2 * self.n_head) == 0, (
            f"n_embd={self.n_embd} must be divisible by 2 * n_head = {2 * self.n_head}"
        )
        for kind in self.kinds.split(","):
            assert kind in KINDS, f"kinds={self.kinds} must be some of {','.join(KINDS)}"


# data ---------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A chain of operations: 7 - 2 = 5, 5 + 5 = 10."""

    words: list  # the first number and the operations: ["7", "-2", "+5"]
    results: list  # the number after each operation: ["5", "10"]


def parse_problem(equations):
    """The equations of a solution -> Problem, or None if they are no chain, in which each equation
    begins with the result of the one before.

    ["7-2=5", "5+5=10"] -> Problem(["7", "-2", "+5"], ["5", "10"])
    """
    words = []
    results = []
    for equation in equations:
        left, sign, number, result = EQUATION.fullmatch(equation).groups()
        if not words:
            words.append(left)
        elif left != results[-1]:
            return None
        words.append(sign + number)
        results.append(result)
    return Problem(words, results)


def held_out(problem):
    """Does a problem belong to validation? A hash of all its numbers and operations decides, so
    that no problem of the examination was seen in training with other names or things."""
    return zlib.crc32(" ".join(problem.words).encode()) % 10 == 0


def read_problems(cfg):
    """The problems that cfg.data names -> problems for training, and problems for validation."""
    if cfg.data == "stories":
        folder = require("data/stories")
        records = read_jsonl(folder / "problems.jsonl", ["instruction"])
        records += read_jsonl(folder / "problems_val.jsonl", ["instruction"])
    else:
        records = read_jsonl(cfg.data, [])

    train = []
    val = []
    for number, record in enumerate(records, start=1):
        equations = record.get("check", {}).get("steps")
        if not equations:
            fail(f'{cfg.data} record {number}: "check" has no "steps" like ["7-2=5", "5+5=10"]')
        problem = parse_problem(equations)
        if problem is None:
            fail(f"{cfg.data} record {number}: a step must begin with the result of the one before")
        if len(problem.results) > cfg.longest:
            continue
        if held_out(problem):
            val.append(problem)
        else:
            train.append(problem)

    if not train or not val:
        fail(
            f"--data={cfg.data} has {len(train)} problems for training and {len(val)} for "
            f"validation with at most {cfg.longest} operations: both need at least 1"
        )
    return train, val


class Problems(NamedTuple):
    """N problems as tensors of token ids."""

    question: torch.Tensor  # (N, Q) first number, operations, dots up to the longest, "?"
    results: torch.Tensor  # (N, L) the result after each operation; a dot keeps the one before
    level: torch.Tensor  # (N,) number of operations

    def rows(self, chosen):
        return Problems(self.question[chosen], self.results[chosen], self.level[chosen])

    def to(self, device):
        return Problems(self.question.to(device), self.results.to(device), self.level.to(device))


def encode(problems, vocabulary, longest):
    """A list of Problem -> Problems. vocabulary is {word: id}."""
    questions = []
    results = []
    levels = []
    for problem in problems:
        n_missing = longest - len(problem.results)
        words = problem.words + [NOTHING] * n_missing + [ASK]
        numbers = problem.results + [problem.results[-1]] * n_missing
        questions.append([vocabulary[word] for word in words])
        results.append([vocabulary[number] for number in numbers])
        levels.append(len(problem.results))
    return Problems(torch.tensor(questions), torch.tensor(results), torch.tensor(levels))


class Data(NamedTuple):
    vocabulary: dict  # {word: id}
    train: Problems
    val: Problems


def load_data(cfg):
    """Reads the problems -> Data."""
    train, val = read_problems(cfg)
    words = set()
    for problem in train + val:
        words.update(problem.words, problem.results)
    vocabulary = {word: i for i, word in enumerate(SPECIAL + sorted(words))}
    longest = max(len(problem.results) for problem in train + val)
    encoded = [encode(problems, vocabulary, longest) for problems in (train, val)]
    return Data(vocabulary, *encoded)


def get_batch(problems, step, seed, batch_size):
    """The batch of a step. It depends on the seed and the step alone, so all kinds of models see
    the same problems in the same order."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    chosen = torch.randint(len(problems.level), (batch_size,), generator=generator)
    return problems.rows(chosen)


# the lesson's mathematics -------------------------------------------------------------------------


class GrowingCache:
    """The keys and values so far, as in model.py's KVCache.

    KVCache writes them into one large tensor. Here gradients flow back through the thoughts, and
    what they need must not be overwritten. So each new key is put behind the old ones in a new
    tensor.
    """

    def __init__(self):
        self.kv = {}  # {layer: (k, v)}, (B, G, S, D) each
        self.length = 0  # tokens stored so far

    def update(self, layer, k, v):
        """Appends one layer's new keys and values (B, G, T, D) -> all so far, (B, G, S, D)."""
        if layer in self.kv:
            old_k, old_v = self.kv[layer]
            k = torch.cat([old_k, k], dim=2)
            v = torch.cat([old_v, v], dim=2)
        self.kv[layer] = (k, v)
        return k, v


class Thinking(NamedTuple):
    """A model that has read a question and has thought about it n times."""

    # The last hidden state after the question and after each thought, (B, n + 1, C). State i is
    # thought i + 1 of a model that has continuous thoughts.
    states: torch.Tensor
    cache: GrowingCache


class Thinker(GPT):
    """A GPT that can have thoughts. kind is one of KINDS, and vocabulary is {word: id}."""

    def __init__(self, cfg, kind, vocabulary):
        super().__init__(cfg)
        self.kind = kind
        self.vocabulary = vocabulary

    def read(self, x, cache):
        """Input vectors x (B, T, C), which follow what is in the cache -> their last hidden states
        (B, T, C). This is GPT.trunk without the table that makes vectors of tokens."""
        mask, cos, sin = self.positions(x.size(1), cache, x.device)
        for block in self.h:
            x = block(x, mask, cos, sin, cache)
        cache.length += x.size(1)
        return self.ln_f(x)

    def embed(self, word, B):
        """The embedding of one word, for each of B rows -> (B, 1, C)."""
        ids = torch.full((B, 1), self.vocabulary[word], device=self.wte.weight.device)
        return self.wte(ids)

    def think(self, question, n):
        """Reads the questions (B, Q) and thinks n times -> Thinking.

        A continuous thought is the last hidden state, fed back as the next input (Hao et al. 2024,
        section 3). Each needs the one before, so they are computed one after the other. Pause
        tokens are known in advance and are read in one pass.
        """
        cache = GrowingCache()
        x = self.wte(question)  # (B, Q, C)
        if self.kind == "pause":
            pauses = self.embed(PAUSE, len(question)).expand(-1, n, -1)
            hidden = self.read(torch.cat([x, pauses], dim=1), cache)  # (B, Q + n, C)
            return Thinking(hidden[:, question.size(1) - 1 :], cache)

        state = self.read(x, cache)[:, -1:]  # (B, 1, C)
        states = [state]
        for _ in range(n):
            state = self.read(state, cache)
            states.append(state)
        return Thinking(torch.cat(states, dim=1), cache)

    def forward(self, question, written, n):
        """The logits of what comes after n thoughts: question (B, Q), written (B, W) -> the W + 1
        tokens that have a target, (B, W + 1, V): the written steps, and the answer behind "=".
        """
        states, cache = self.think(question, n)
        W = written.size(1)
        x = torch.cat([self.wte(written), self.embed(ANSWER, len(question))], dim=1)
        hidden = self.read(x, cache)  # (B, W + 1, C)

        # The hidden state before each written step, before "=", and before the answer. That before
        # "=" goes: this token always comes, so there is nothing to predict.
        before = torch.cat([states[:, -1:], hidden], dim=1)  # (B, W + 2, C)
        before = torch.cat([before[:, :W], before[:, W + 1 :]], dim=1)  # (B, W + 1, C)
        return self.lm_head(before)

    @torch.no_grad()
    def solve(self, question, n, n_written):
        """Thinks n times, writes n_written steps and the answer, always the likeliest number
        -> (B, n_written + 1) token ids, the answer last."""
        states, cache = self.think(question, n)
        state = states[:, -1:]
        numbers = []
        for _ in range(n_written):
            number = self.lm_head(state).argmax(dim=-1)  # (B, 1)
            numbers.append(number)
            state = self.read(self.wte(number), cache)
        state = self.read(self.embed(ANSWER, len(question)), cache)
        numbers.append(self.lm_head(state).argmax(dim=-1))
        return torch.cat(numbers, dim=1)


def stage(step, cfg, L):
    """How many written steps are replaced at a step of training? From 0 to L.

    The curriculum has L + 1 stages of equal length (Hao et al. 2024, figure 2). Without it, and for
    the model that answers at once, all steps are replaced from the beginning.
    """
    if not cfg.curriculum:
        return L
    return min(L, step * (L + 1) // cfg.steps)


def n_replaced(kind, step, cfg, L):
    """How many written steps does a model of this kind do without, at a step of training?"""
    if kind == "steps":
        return 0
    if kind == "at_once":
        return L
    return stage(step, cfg, L)


def n_thoughts(kind, replaced, cfg):
    """How many thoughts, or pause tokens, stand in the place of the replaced steps?"""
    return replaced * cfg.per_step if kind in ("pause", "thoughts") else 0


def loss_of(model, problems, replaced, cfg):
    """The loss in nats per number: a mean over the steps that are still written, and the answer."""
    n = n_thoughts(model.kind, replaced, cfg)
    written = problems.results[:, replaced:]  # (B, W)
    targets = torch.cat([written, problems.results[:, -1:]], dim=1)  # (B, W + 1)
    logits = model(problems.question, written, n)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# train, examine -----------------------------------------------------------------------------------


def build_model(kind, data, cfg):
    """A new model of this kind. All kinds have the same parameters and the same first weights."""
    longest = data.train.results.size(1)
    gpt_cfg = GPTConfig(
        vocab_size=len(data.vocabulary),
        block_size=data.train.question.size(1) + longest * max(1, cfg.per_step) + 1,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        n_kv_head=cfg.n_head,
        n_embd=cfg.n_embd,
    )
    return Thinker(gpt_cfg, kind, data.vocabulary)


def lr_scale(step, cfg):
    """The learning rate of a step (0, 1, ...) as a share of its peak: warm up, hold, then decay
    linearly to 0 (WSD, Hu et al. 2024)."""
    rise = (step + 1) / max(1.0, cfg.warmup * cfg.steps)  # the first step learns already
    fall = (cfg.steps - step) / max(1.0, cfg.decay * cfg.steps)  # and the last step still does
    return max(0.0, min(1.0, rise, fall))


def examine(model, problems, replaced, cfg):
    """The share of right answers by number of operations -> {operations: share}."""
    n = n_thoughts(model.kind, replaced, cfg)
    numbers = model.solve(problems.question, n, problems.results.size(1) - replaced)
    right = numbers[:, -1] == problems.results[:, -1]  # (N,)
    shares = {}
    for level in problems.level.unique().tolist():
        shares[level] = right[problems.level == level].float().mean().item()
    return shares


def train(model, data, seed, cfg, device, log=None, first_step=0):
    """Trains a model on data.train. What it logs has the name of its kind, and steps that go on
    from first_step, because several models share a log."""
    L = data.train.results.size(1)
    val = data.val.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.01
    )
    for step in range(cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * lr_scale(step, cfg)

        # forward and backward
        replaced = n_replaced(model.kind, step, cfg, L)
        batch = get_batch(data.train, step, seed, cfg.batch_size).to(device)
        loss = loss_of(model, batch, replaced, cfg)
        loss.backward()

        # update, with the gradient's norm limited
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if log is not None:
            values = {"kind": model.kind, "seed": seed, "replaced": replaced, "loss": loss.item()}
            if cfg.eval_every > 0 and (step + 1) % cfg.eval_every == 0:
                shares = examine(model, val, replaced, cfg)
                values["right"] = sum(shares.values()) / len(shares)
            log(first_step + step, **values)


# the figure ---------------------------------------------------------------------------------------


def mean_of(values):
    return sum(values) / len(values)


def range_text(values):
    """The range of several numbers: "0.42 to 0.47", or one number if they are the same."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def at_level(runs, level):
    """The share of right answers to problems with this number of operations, for each seed."""
    return [run["right"][level] for run in runs]


def draw(title, results, path):
    """The share of right answers by number of operations, one line for each kind of model."""
    fig, ax = figure(title, "operations in the problem", "share of right answers, held out")
    for (kind, runs), marker in zip(results.items(), "osD^v"):
        levels = list(runs[0]["right"])
        columns = [at_level(runs, level) for level in levels]
        means = [mean_of(column) for column in columns]
        [line] = ax.plot(levels, means, marker=marker, label=kind.replace("_", " "))
        lows = [min(column) for column in columns]
        highs = [max(column) for column in columns]
        ax.fill_between(levels, lows, highs, alpha=0.2, color=line.get_color())
    ax.set_xticks(levels)
    ax.set(ylim=(0, 1.03))
    ax.legend(loc="lower left")
    save_figure(fig, path)


def finding(results):
    """The title of the figure: who is right how often, on the problems with most operations?"""
    first = next(iter(results.values()))
    level = max(first[0]["right"])
    parts = []
    for kind, runs in results.items():
        parts.append(f"{kind.replace('_', ' ')} {range_text(at_level(runs, level))}")
    half = (len(parts) + 1) // 2
    lines = [", ".join(parts[:half]), ", ".join(parts[half:])]
    return f"Right answers to problems of {level} operations:\n" + "\n".join(lines).strip()


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    data = load_data(cfg)
    out = output_folder(cfg)
    L = data.train.results.size(1)
    print(f"{len(data.train.level):,} problems for training, {len(data.val.level):,} held out")

    kinds = cfg.kinds.split(",")
    results = {kind: [] for kind in kinds}
    models = {}  # {seed: {kind: weights}}
    log = Log(out, cfg.seeds * len(kinds) * cfg.steps, name="train_thoughts")
    steps_done = 0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        models[seed] = {}
        for kind in kinds:
            # all kinds start from the same weights
            set_seed(seed)
            model = build_model(kind, data, cfg).to(device)
            start = time.time()
            train(model, data, seed, cfg, device, log, steps_done)
            seconds = time.time() - start
            steps_done += cfg.steps

            # the examination, timed
            replaced = n_replaced(kind, cfg.steps, cfg, L)
            start = time.time()
            right = examine(model, data.val.to(device), replaced, cfg)
            results[kind].append(
                {"right": right, "seconds": seconds, "seconds_to_answer": time.time() - start}
            )
            models[seed][kind] = model.state_dict()
            shares = "  ".join(f"{level}: {share:.2f}" for level, share in right.items())
            print(f"    seed {seed}, {kind}: {shares}  ({seconds:.0f} s)", flush=True)

    # demo_thoughts.py looks into these models
    save_checkpoint(
        out / "thoughts.pt",
        kind="thoughts",
        changed=cfg.changed,
        config=asdict(cfg),
        gpt_config=asdict(model.cfg),
        vocabulary=data.vocabulary,
        models=models,
    )

    # what came out
    print("\nshare of right answers by number of operations, and seconds of training")
    for kind, runs in results.items():
        texts = [f"{range_text(at_level(runs, level)):>14}" for level in runs[0]["right"]]
        seconds = mean_of([run["seconds"] for run in runs])
        print(f"{kind:14}" + "".join(texts) + f"{seconds:8.0f}")
    title = finding(results)
    save_metrics(
        out,
        name="train_thoughts",
        results=results,
        finding=title,
        held_out=data.val.level.bincount().tolist(),
        params=sum(p.numel() for p in model.parameters()),
        **{name: getattr(cfg, name) for name in ("steps", "seed", "seeds", "per_step")},
    )
    draw(title, results, out / "train_thoughts.png")
