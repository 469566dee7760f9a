"""
Part 10: write faster with the same words. A cheap draft guesses the next tokens, and the large
model checks all of them in a single pass.

    python part_10/speculative.py                    both experiments, about 3 min
    python part_10/speculative.py --model=base       the student of distill.py drafts for base
    python part_10/speculative.py --model=smollm2    copies from the context draft for SmolLM2
    python part_10/speculative.py --model=smollm2 --prompt="Repeat: The cat sat on the mat."
    python part_10/speculative.py --model=base --draft=distill --k=4 --prompt="Once there was a fox"

Starts here. The models and texts are loaded by compression.py.

A model that writes one token must read all its weights from memory. A pass over nine tokens reads
them once, too. But the next nine tokens are not known before they are written. In *speculative
decoding* (Leviathan et al. 2022, "Fast inference from transformers via speculative decoding"; Chen
et al. 2023) something cheap guesses k tokens. Then one pass of the large model, the target, gives
its probabilities at all k + 1 places. The guesses are checked from left to right:

    a guess x with the draft's probability q(x) and the target's p(x)
        is accepted with probability min(1, p(x) / q(x))
    the first guess that is not accepted is replaced by a token drawn from max(0, p - q),
        normalized, and the guesses behind it are thrown away
    if all k are accepted, the last place of the pass gives one more token for free

So a pass of the target brings 1 to k + 1 tokens. What is written has exactly the distribution p of
the target, whatever the draft says. x comes as an accepted guess with probability q(x) times
min(1, p(x) / q(x)), and that is min(p(x), q(x)). What p(x) lacks is max(0, p(x) - q(x)),
and this is where the replacements come from. A bad draft costs time and never quality. At
temperature 0 all probabilities are 0 or 1, and the rule becomes: accept what the target would have
written.

Two kinds of drafts:

    ModelDraft     a smaller model with the same tokenizer, here the student of distill.py
    LookupDraft    no model: find the last tokens earlier in the context and propose what followed
                   them there (Saxena 2023, "Prompt lookup decoding"). Good where a text is copied.

Shapes: k guesses, T tokens, V vocabulary. There is one text at a time (B = 1).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from compression import documentation, load_model, load_texts
from model import KVCache
from shared import (
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    save_figure,
    save_metrics,
    set_seed,
)

# Names of drafts on the command line. Anything else is the path of a checkpoint.
LOOKUP = "lookup"
DRAFTS = {"distill": "part_10/out/distill.pt"}

# SmolLM2's two tasks. In the first the answer stands in the context, in the second it does not.
COPY = "Repeat the following text word for word.\n\n"
FREE = "Write a short story about a fox who is looking for a red hat."


@dataclass
class Config:
    model: str = ""  # base, smollm2 or a checkpoint; empty: the experiments with both
    draft: str = ""  # distill, lookup or a checkpoint; empty: distill for base, else lookup
    k: int = 8  # guesses per pass; the experiment with base tries 1, 2, ..., k
    ngram: int = 3  # lookup searches for the last 3 tokens, then for the last 2, then for the last
    temperature: float = 1.0  # of base and of --prompt; the experiment with SmolLM2 is greedy
    max_new_tokens: int = 100  # tokens to write at most
    prompt: str = ""  # write one answer to this instead of the experiments; needs --model
    prompts: int = 8  # beginnings of held-out texts that base goes on from
    repeats: int = 3  # measurements of each speed; the median counts
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert not self.prompt or self.model, f"prompt={self.prompt} needs --model"
        assert not self.draft or self.model, f"draft={self.draft} needs --model"


# the lesson's mathematics -------------------------------------------------------------------------


def probabilities(logits, temperature):
    """The distribution from which the next token is drawn, logits (..., V) -> (..., V).
    Temperature 0 is greedy: the likeliest token has probability 1."""
    if temperature < 1e-6:
        likeliest = logits.argmax(dim=-1)
        return F.one_hot(likeliest, logits.size(-1)).type_as(logits)
    return (logits / temperature).softmax(dim=-1)


def residual(p, q):
    """What replaces a rejected guess: max(0, p - q), normalized (Leviathan et al. 2022, section
    2.3). p, q (V,) -> (V,)."""
    missing = (p - q).clamp(min=0)
    total = missing.sum()

    # Two equal distributions never reject. Only a rounding error could lead here.
    if total == 0:
        return p
    return missing / total


class Checked(NamedTuple):
    n_accepted: int  # guesses that stay, from the left
    token: int  # the token after them, which the target chooses


def check(drafted, q, p):
    """One step of the paper's algorithm 1. drafted: k guesses, q (k, V) the draft's probabilities
    from which they were drawn, p (k + 1, V) the target's at the same places and one more
    -> Checked."""
    k = len(drafted)
    places = torch.arange(k, device=p.device)
    guesses = torch.tensor(drafted, dtype=torch.long, device=p.device)

    # u < p(x) / q(x), without a division by zero
    u = torch.rand(k, dtype=p.dtype, device=p.device)
    accepted = u * q[places, guesses] < p[places, guesses]  # (k,)
    n_accepted = int(accepted.long().cumprod(dim=0).sum())  # up to the first that is not

    if n_accepted < k:
        last = residual(p[n_accepted], q[n_accepted])
    else:
        last = p[k]  # one more token for free
    return Checked(n_accepted, draw_token(last))


def draw_token(p):
    """Draws a token from the distribution p (V,)."""
    return torch.multinomial(p, 1).item()


def expected_tokens(alpha, k):
    """The mean number of tokens per pass if each guess is accepted with probability alpha,
    independently of the others: 1 + alpha + ... + alpha^k (Leviathan et al. 2022, eq. 1)."""
    if alpha == 1:
        return k + 1.0
    return (1 - alpha ** (k + 1)) / (1 - alpha)


def expected_speedup(alpha, k, cost, check_cost=1.0):
    """The expected factor of speed (Leviathan et al. 2022, theorem 3.8). cost: the time of one
    guess, as a share of one pass of the target over a single token. The paper assumes that a pass
    over k + 1 tokens takes as long as over one. check_cost says how much longer it really takes."""
    return expected_tokens(alpha, k) / (k * cost + check_cost)


# drafts -------------------------------------------------------------------------------------------


def make_cache(model, length):
    """A KVCache for one text of at most `length` tokens. model's own block_size may be far
    longer."""
    cfg = replace(model.cfg, block_size=length)
    return KVCache(cfg, 1, model.wte.weight.device, model.wte.weight.dtype)


def read(model, tokens, cache, n_last=1):
    """Reads the tokens that are not in the cache yet -> logits (n_last, V) of what follows each of
    the last n_last tokens."""
    new = tokens[cache.length :]
    idx = torch.tensor([new], device=model.wte.weight.device)
    hidden = model.trunk(idx, cache)[0, -n_last:]  # (n_last, C)
    return model.lm_head(hidden)


class ModelDraft:
    """A smaller model guesses."""

    def __init__(self, model):
        self.model = model
        self.vocab_size = model.cfg.vocab_size

    def start(self, tokens, length):
        """Reads a prompt, but for its last token. The text will have at most `length` tokens."""
        self.cache = make_cache(self.model, length)
        if len(tokens) > 1:
            read(self.model, tokens[:-1], self.cache)

    def propose(self, tokens, k, temperature):
        """Guesses at most k tokens -> a list of them, and their distributions (k, V)."""
        drafted = []
        distributions = []
        for _ in range(k):
            logits = read(self.model, tokens + drafted, self.cache)  # (1, V)
            q = probabilities(logits[0], temperature)
            drafted.append(draw_token(q))
            distributions.append(q)
        if not drafted:
            return [], None
        return drafted, torch.stack(distributions)

    def roll_back(self, length):
        """Forgets all but the first `length` tokens. Their keys and values stay in memory, and the
        next tokens overwrite them."""
        self.cache.length = min(self.cache.length, length)


class LookupDraft:
    """The context guesses: what followed the last tokens when they occurred before?"""

    def __init__(self, vocab_size, ngram):
        self.vocab_size = vocab_size
        self.ngram = ngram

    def start(self, tokens, length):
        pass

    def propose(self, tokens, k, temperature):
        """Guesses at most k tokens -> a list of them, and their distributions (k, V). Each guess
        is certain: all of the draft's probability is on it."""
        drafted = look_up(tokens, self.ngram, k)
        if not drafted:
            return [], None
        return drafted, F.one_hot(torch.tensor(drafted), self.vocab_size).float()

    def roll_back(self, length):
        pass


def look_up(tokens, ngram, k):
    """Finds the last `ngram` tokens earlier in the list, the latest place first, and returns the at
    most k tokens that followed them. If they do not occur, the same with fewer tokens.

    [1, 2, 3, 9, 1, 2], ngram 2, k 2 -> [3, 9]
    """
    for n in range(min(ngram, len(tokens) - 1), 0, -1):
        pattern = tokens[-n:]
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == pattern:
                return tokens[start + n : start + n + k]
    return []


# decoding -----------------------------------------------------------------------------------------


class Written(NamedTuple):
    """A text that was written, and how."""

    tokens: list  # the new tokens, with the stop token if there was one
    guessed: list  # for each of them: was it a guess of the draft?
    passes: int  # of the target, without that over the prompt

    # guesses that were accepted or rejected; those behind a rejected one are neither
    n_checked: int

    n_accepted: int
    seconds: float  # of processor time, without the pass over the prompt


@torch.no_grad()
def write(model, draft, prompt, max_new_tokens, k, temperature, stop=-1):
    """Continues a prompt (a list of tokens) by at most max_new_tokens tokens, up to and including
    the stop token -> Written. With k = 0 this is plain decoding, one pass for each token."""
    length = min(len(prompt) + max_new_tokens, model.cfg.block_size)
    tokens = list(prompt)
    guessed = []
    passes = 0
    n_checked = 0
    n_accepted = 0

    # Read the prompt, but for its last token, which the first pass reads.
    cache = make_cache(model, length)
    if len(tokens) > 1:
        read(model, tokens[:-1], cache)
    if k > 0:
        draft.start(tokens, length)

    start = time.process_time()
    while len(tokens) < length:
        # Guess. A pass adds one token more than there are accepted guesses.
        room = length - len(tokens) - 1
        drafted = []
        q = None
        if k > 0:
            drafted, q = draft.propose(tokens, min(k, room), temperature)

        # Check, with one pass over the last token and all guesses.
        logits = read(model, tokens + drafted, cache, len(drafted) + 1)  # (k + 1, V)
        p = probabilities(logits, temperature)
        if drafted:
            checked = check(drafted, q.to(p), p)
        else:
            checked = Checked(0, draw_token(p[0]))
        accepted = checked.n_accepted
        passes += 1
        n_checked += min(accepted + 1, len(drafted))
        n_accepted += accepted

        # Keep what was accepted, up to a stop token.
        new = drafted[:accepted] + [checked.token]
        is_guess = [True] * accepted + [False]
        stopped = stop in new
        if stopped:
            n_kept = new.index(stop) + 1
            new = new[:n_kept]
            is_guess = is_guess[:n_kept]
        tokens.extend(new)
        guessed.extend(is_guess)
        if stopped:
            break

        # Forget the rejected guesses. The last token has not been read by anyone yet.
        cache.length = len(tokens) - 1
        if k > 0:
            draft.roll_back(len(tokens) - 1)

    seconds = time.process_time() - start
    return Written(tokens[len(prompt) :], guessed, passes, n_checked, n_accepted, seconds)


# measuring ----------------------------------------------------------------------------------------


def median(values):
    return torch.tensor(values, dtype=torch.float64).median().item()


def mark_guesses(tok, written):
    """The text with square brackets around what the draft guessed."""
    pieces = []
    inside = False
    run = []
    for token, is_guess in zip(written.tokens, written.guessed):
        if is_guess != inside:
            pieces.append(tok.decode(run))
            pieces.append("[" if is_guess else "]")
            run = []
            inside = is_guess
        run.append(token)
    pieces.append(tok.decode(run))
    if inside:
        pieces.append("]")
    return "".join(pieces)


def median_seconds(actions, repeats):
    """The median time of each action, {name: function} -> {name: seconds}. The actions take turns,
    because a processor is not equally fast at all times."""
    seconds = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            start = time.process_time()
            action()
            seconds[name].append(time.process_time() - start)
    return {name: median(times) for name, times in seconds.items()}


class Costs(NamedTuple):
    """What the steps of decoding take, after a text of some length."""

    seconds: float  # one token by plain decoding
    guess: float  # one guess, as a share of these seconds
    check: dict  # {k: one pass over k + 1 tokens, and the check of k guesses}, likewise


@torch.no_grad()
def measure_costs(model, draft, context, ks, temperature, repeats=15):
    """How long do a guess and a check take, after `context` tokens? -> Costs."""
    room = model.cfg.block_size - max(ks) - 1
    if room < 1:
        fail(f"--k={max(ks)} does not fit: this model reads {model.cfg.block_size} tokens")
    context = min(context, room)
    length = context + max(ks) + 1
    tokens = torch.randint(model.cfg.vocab_size, (length,)).tolist()
    cache = make_cache(model, length)
    read(model, tokens[:context], cache)
    draft.start(tokens[: context + 1], length)
    uniform = torch.full((max(ks), model.cfg.vocab_size), 1 / model.cfg.vocab_size)

    def plain():
        cache.length = context
        p = probabilities(read(model, tokens[: context + 1], cache), temperature)
        draw_token(p[0])

    def guess():
        draft.roll_back(context)
        draft.propose(tokens[: context + 1], 1, temperature)

    def check_guesses(k):
        cache.length = context
        logits = read(model, tokens[: context + k + 1], cache, k + 1)
        p = probabilities(logits, temperature)
        check(tokens[context + 1 : context + k + 1], uniform[:k].to(p), p)

    actions = {"plain": plain, "guess": guess}
    for k in ks:
        actions[k] = partial(check_guesses, k)
    seconds = median_seconds(actions, repeats)
    one_token = seconds["plain"]
    checks = {k: seconds[k] / one_token for k in ks}
    return Costs(one_token, seconds["guess"] / one_token, checks)


class Speed(NamedTuple):
    """What came out for one number of guesses."""

    k: int
    acceptance: float  # share of the checked guesses that were accepted; NaN if there were none
    tokens_per_pass: float
    tokens_per_second: float
    speedup: float  # median over prompts and repeats of plain seconds / seconds, per token
    same: float  # share of the texts that are those of plain decoding; 1 if greedy


def compare(model, draft, prompts, ks, max_new_tokens, temperature, repeats, stop=-1):
    """Writes all prompts with plain decoding (k = 0) and with each number of guesses in ks, taking
    turns -> a list of Speed, plain decoding first."""
    ks = [0, *ks]
    texts = {k: [] for k in ks}
    for _ in range(repeats):
        for prompt in prompts:
            for k in ks:
                written = write(model, draft, prompt, max_new_tokens, k, temperature, stop)
                texts[k].append(written)

    speeds = []
    for k in ks:
        ratios = []
        same = 0
        for plain, written in zip(texts[0], texts[k]):
            plain_seconds = plain.seconds / len(plain.tokens)
            ratios.append(plain_seconds / (written.seconds / len(written.tokens)))
            same += written.tokens == plain.tokens

        n_checked = sum(written.n_checked for written in texts[k])
        n_accepted = sum(written.n_accepted for written in texts[k])
        n_tokens = sum(len(written.tokens) for written in texts[k])
        passes = sum(written.passes for written in texts[k])
        rate = median([len(written.tokens) / written.seconds for written in texts[k]])
        acceptance = n_accepted / n_checked if n_checked > 0 else float("nan")
        share = same / len(texts[k])
        speeds.append(Speed(k, acceptance, n_tokens / passes, rate, median(ratios), share))
    return speeds


def print_speeds(speeds):
    print("  k  accepted  tokens per pass  tokens per second  speed-up  same text")
    for speed in speeds:
        print(
            f"{speed.k:3}  {speed.acceptance:8.3f}  {speed.tokens_per_pass:15.2f}  "
            f"{speed.tokens_per_second:17.1f}  {speed.speedup:8.2f}  {speed.same:9.2f}"
        )


# the experiments ----------------------------------------------------------------------------------


def load_draft(name, target, tok, cfg, device):
    """A draft for a target: by its name in DRAFTS, "lookup", or the path of a checkpoint."""
    if name == LOOKUP:
        return LookupDraft(tok.vocab_size, cfg.ngram)
    model, draft_tok = load_model(DRAFTS.get(name, name), device)
    if draft_tok.state() != tok.state():
        fail(f"--draft={name} has another tokenizer than the model: its guesses are other tokens")
    if model.cfg.block_size < target.cfg.block_size:
        fail(
            f"--draft={name} reads {model.cfg.block_size} tokens, and the model "
            f"{target.cfg.block_size}: the draft must not be shorter"
        )
    return ModelDraft(model)


def beginnings(model, tok, n, length=12):
    """The first tokens of n held-out texts of the world -> lists of tokens."""
    rows = load_texts("base", model, tok, model.cfg.block_size, 1, 2 * n).held_out
    long_enough = rows.targets[:, length] >= 0
    return rows.idx[long_enough][:n, :length].tolist()


def check_length(prompt, model):
    """Fails if a prompt leaves no room for an answer."""
    longest = model.cfg.block_size - 1
    if not 1 <= len(prompt) <= longest:
        fail(f"a prompt of {len(prompt)} tokens: this model accepts from 1 to {longest}")


def try_base(cfg, device):
    """The student of distill.py drafts for its teacher, with 1 to cfg.k guesses -> a dict for the
    results and the figure."""
    model, tok = load_model("base", device)
    draft_name = cfg.draft or "distill"
    draft = load_draft(draft_name, model, tok, cfg, device)
    prompts = beginnings(model, tok, cfg.prompts)
    ks = list(range(1, cfg.k + 1))

    costs = measure_costs(model, draft, 20, ks, cfg.temperature, repeats=50)
    speeds = compare(model, draft, prompts, ks, cfg.max_new_tokens, cfg.temperature, cfg.repeats)
    formula = []
    corrected = []
    for speed in speeds[1:]:
        k = speed.k
        formula.append(expected_speedup(speed.acceptance, k, costs.guess))
        corrected.append(expected_speedup(speed.acceptance, k, costs.guess, costs.check[k]))

    print(f"\nbase at temperature {cfg.temperature}: the draft proposes, the base model checks")
    print(f"plain decoding takes {1000 * costs.seconds:.2f} ms for a token")
    print(f"a guess takes {costs.guess:.2f} of it")
    print("a check of 1, 2, ... guesses:   ", *[f"{costs.check[k]:.2f}" for k in ks])
    print_speeds(speeds)
    print("speed-up by the paper's formula:", *[f"{value:.2f}" for value in formula])
    print("with the real cost of a check:  ", *[f"{value:.2f}" for value in corrected])
    return {
        "name": "base",
        "draft": draft_name,
        "speeds": [speed._asdict() for speed in speeds],
        "costs": costs._asdict(),
        "formula": formula,
        "corrected": corrected,
    }


def copy_prompt():
    """A request to repeat a piece of Python's documentation, about 130 tokens long."""
    _, held_out = documentation()
    paragraphs = held_out.split("\n\n")
    chosen = next(text for text in paragraphs if 450 < len(text) < 550)
    return COPY + " ".join(chosen.split())


def try_lookup(cfg, device):
    """Lookup drafts for a real model where it copies and where it does not -> a dict for the
    results and the figure."""
    name = cfg.model or "smollm2"
    draft_name = cfg.draft or LOOKUP
    model, tok = load_model(name, device)
    draft = load_draft(draft_name, model, tok, cfg, device)
    ks = sorted({max(1, cfg.k // 2), cfg.k})
    costs = measure_costs(model, draft, 200, ks, 0.0)
    print(f"\n{name}, greedy: the draft is {draft_name}")
    print(f"plain decoding takes {1000 * costs.seconds:.0f} ms for a token")
    for k in ks:
        print(f"a check of {k} guesses takes {costs.check[k]:.2f} times as long")

    result = {"name": Path(name).stem, "draft": draft_name, "costs": costs._asdict(), "tasks": {}}
    for task, request in {"copy": copy_prompt(), "free": FREE}.items():
        prompt = tok.chat_prompt(request)
        check_length(prompt, model)
        speeds = compare(model, draft, [prompt], ks, cfg.max_new_tokens, 0.0, cfg.repeats, tok.end)
        shown = write(model, draft, prompt, cfg.max_new_tokens, cfg.k, 0.0, tok.end)
        print(f"\n{task}: {mark_guesses(tok, shown)}\n")
        print_speeds(speeds)
        result["tasks"][task] = [speed._asdict() for speed in speeds]
    return result


def answer_once(cfg, device):
    """Writes one answer, plainly and with the draft, and shows what was guessed."""
    model, tok = load_model(cfg.model, device)
    name = cfg.draft or ("distill" if cfg.model == "base" else LOOKUP)
    draft = load_draft(name, model, tok, cfg, device)

    # A base model goes on with a text. All others are asked in their chat template.
    if cfg.model == "base":
        prompt = tok.encode(cfg.prompt)
    else:
        prompt = tok.chat_prompt(cfg.prompt)
    check_length(prompt, model)

    plain = write(model, draft, prompt, cfg.max_new_tokens, 0, cfg.temperature, tok.end)
    written = write(model, draft, prompt, cfg.max_new_tokens, cfg.k, cfg.temperature, tok.end)
    print(mark_guesses(tok, written))
    print(
        f"\n{len(written.tokens)} tokens in {written.passes} passes, {written.n_accepted} of "
        f"{written.n_checked} checked guesses accepted, "
        f"{len(written.tokens) / written.seconds:.1f} tokens per second; "
        f"without a draft {len(plain.tokens) / plain.seconds:.1f}"
    )


# the figure ---------------------------------------------------------------------------------------


def draw_base(ax, base):
    """The speed-up over k, measured and expected."""
    speeds = base["speeds"][1:]
    ks = [speed["k"] for speed in speeds]
    ax.plot(ks, [speed["speedup"] for speed in speeds], "o-", label="measured")
    ax.plot(ks, base["formula"], "s--", label="the paper's formula")
    ax.plot(ks, base["corrected"], "^:", label="... with the real cost of a check")
    ax.axhline(1, color="black", linewidth=1, label="plain decoding")
    ax.set(xlabel="guesses per pass, k", ylabel="speed-up", title=f"base, draft: {base['draft']}")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=9)


def draw_copying(ax, copying):
    """The speed-up of the two tasks."""
    for i, (task, speeds) in enumerate(copying["tasks"].items()):
        places = [place + 0.4 * i - 0.2 for place in range(len(speeds) - 1)]
        heights = [speed["speedup"] for speed in speeds[1:]]
        label = {"copy": "repeats a text", "free": "writes a story"}[task]
        bars = ax.bar(places, heights, width=0.36, hatch=["", "//"][i], label=label)
        texts = [f"{speed['tokens_per_pass']:.1f} tokens\nper pass" for speed in speeds[1:]]
        ax.bar_label(bars, texts, fontsize=9, padding=4, backgroundcolor="white")
    ks = [speed["k"] for speed in speeds[1:]]
    ax.axhline(1, color="black", linewidth=1, label="plain decoding")
    ax.set_xticks(range(len(ks)), [f"k = {k}" for k in ks])
    ax.set(ylabel="speed-up", title=f"{copying['name']}, draft: {copying['draft']}")
    ax.margins(y=0.2)
    ax.legend(fontsize=9)


def finding(results):
    """The title of the figure: the best speed-up of base, and that of the largest k for drafts from
    the context."""
    parts = []
    if "base" in results:
        best = max(results["base"]["speeds"][1:], key=lambda speed: speed["speedup"])
        draft = results["base"]["draft"]
        parts.append(f"base, draft {draft}: at best {best['speedup']:.2f} times (k = {best['k']})")
    if "copying" in results:
        for task, words in (("copy", "repeats a text"), ("free", "writes a story")):
            name = results["copying"]["name"]
            speed = results["copying"]["tasks"][task][-1]
            parts.append(f"{name} {words}: {speed['speedup']:.2f} times (k = {speed['k']})")
    return "Speed with a draft, as a multiple of plain decoding\n" + "\n".join(parts)


def draw(title, results, path):
    """One panel for each experiment."""
    fig, axes = figure(title, columns=len(results), height=5.2)
    panels = [axes] if len(results) == 1 else list(axes)
    for ax, (name, result) in zip(panels, results.items()):
        if name == "base":
            draw_base(ax, result)
        else:
            draw_copying(ax, result)
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    set_seed(cfg.seed)

    # Times are those of the processor, which other programs do not disturb. With one thread they
    # are the seconds that a user waits.
    torch.set_num_threads(1)
    if cfg.prompt:
        answer_once(cfg, device)
        sys.exit()

    out = output_folder(cfg)
    results = {}
    if cfg.model in ("", "base"):
        results["base"] = try_base(cfg, device)
    if cfg.model != "base":
        results["copying"] = try_lookup(cfg, device)

    title = finding(results)
    save_metrics(out, name="speculative", results=results, finding=title, config=asdict(cfg))
    draw(title, results, out / "speculative.png")
