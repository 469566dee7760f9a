"""
Part 10, the next concept: what happens if several sentences may follow, and a model must write one
vector?

    python part_10/demo_next_concept.py              one seed
    python part_10/demo_next_concept.py --seeds=3    three seeds: how much is chance?

The three families of Large Concept Models in train_lcm.py, beside a GPT on the same stories. The
GPT has about the parameters of the autoencoder and an LCM together, and it is trained for about as
many seconds as the autoencoder and the Two-Tower LCM together.

    l2           distance of the predicted vector from the true one, root mean square per number,
                 with the true sentences before it as context; half of the paper's point is that
                 this number misleads
    l2 after     the same after the vector was decoded to a sentence and that was encoded again
    possible     share of the decoded sentences that can follow: the right kind, hero and thing
    TV           in one context 200 samples of what happens next, against the known probabilities:
                 total variation, half of the sum of the absolute differences; mean over contexts
    gold         share of whole stories that pass all checks of the judge
    same hero    share of the stories that speak of the same hero and thing throughout
    as asked     share of the stories that have all words that the brief asks for

In worlds with K equally likely continuations of every sentence, K = 1 is the control: where only
one sentence can follow, its vector is also the mean, and a regression should be as good as any.

The wordings OPENING, FINDING and ENDING are those of part_0/prepare_data.py, equally likely each.
What happens next and with which probability is read from data/stories/facts.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import re
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch

import train_lcm
from model import GPTConfig
from shared import (
    ROOT,
    figure,
    output_folder,
    parse_args,
    pick_device,
    read_facts,
    require,
    save_figure,
    save_metrics,
    set_seed,
)
from train_lcm import Config as TrainConfig
from train_lcm import Writer, load_writer, prompts_of, story_records, vectorize, verdicts, write
from train_sonar import (
    THE_END,
    load_documents,
    lr_scale,
    make_optimizers,
    pad,
    set_lr,
    split_sentences,
    update,
)

OUT = Path(__file__).resolve().parent / "out"

OPENING = [
    "One day, a {animal} named {hero} was in {place}.",
    "Once there was a {animal} named {hero} in {place}.",
    "Long ago, a {animal} named {hero} lived in {place}.",
]
FINDING = [
    "There {hero} found the {colour} {thing}.",
    "Then {hero} saw the {colour} {thing}.",
    "Soon {hero} got the {colour} {thing}.",
]
ENDING = {
    "happy": [
        "At last {hero} had the {colour} {thing} again and was happy.",
        "{hero} got the {colour} {thing} back and smiled.",
        "At last the {colour} {thing} came back and {hero} was happy.",
    ],
    "sad": [
        "At last {hero} lost the {colour} {thing} and was sad.",
        "{hero} never saw the {colour} {thing} again.",
        "At last {hero} went home sad without the {colour} {thing}.",
    ],
}

# The places of the sentences in a document. 0 and 1 are the brief.
OPENING_PLACE, FINDING_PLACE, EVENT_PLACE, REACTION_PLACE, ENDING_PLACE, END_PLACE = range(2, 8)

# The rows of the table: name, kind of model, and options for writing.
ROWS = {
    "Base": ("base", {}),
    "Two-Tower": ("two_tower", {}),
    "one denoising step": ("two_tower", {"denoising_steps": 1}),
    "Quant": ("quant", {}),
    "tokens, temperature 1": ("token", {}),
    "tokens, greedy": ("token", {"temperature": 0}),
}
COLOURS = {
    "exact mean": "gray",
    "Base": "C3",
    "Two-Tower": "C2",
    "one denoising step": "C5",
    "Quant": "C1",
    "tokens, temperature 1": "C0",
    "tokens, greedy": "C4",
}
KINDS = ("base", "two_tower", "quant", "token")
DENOISING_STEPS = (1, 2, 5, 10, 20)
GUIDANCE = (1.0, 1.5, 2.0, 5.0)
WORLDS = (1, 3)  # K, equally likely continuations


@dataclass
class Config:
    prompts: int = 300  # held-out briefs
    positions: int = 20  # contexts in which the next event is sampled
    samples: int = 200  # samples in each of them

    # steps of training in the worlds with K continuations, as a share of those of train_lcm.py
    share: float = 0.5

    models: str = ""  # folder for the trained models; empty: out/ beside this script
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("prompts", "positions", "samples", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert 0 < self.share <= 1, f"share={self.share} must be above 0 and at most 1"


# what can follow ----------------------------------------------------------------------------------


class Option(NamedTuple):
    """One thing that can come next: its probability, and its sentences, all equally likely."""

    p: float
    sentences: list


BRIEF = re.compile(
    r"Write a story about a (?P<animal>\w+) named (?P<hero>\w+)"
    r"(?: and the (?P<colour>\w+) (?P<thing>\w+))?(?: in (?P<place>\w+))?\. End it (?P<ends>\w+)\."
)


def parse(template, sentence):
    """The slots of a sentence that a template made, or None if it is no such sentence."""
    names = re.findall(r"\{(\w+)\}", template)
    pattern = re.escape(template)
    for name in names:
        pattern = pattern.replace(re.escape("{" + name + "}"), rf"(?P<{name}>\w+)")
    match = re.fullmatch(pattern, sentence)
    return match.groupdict() if match else None


def known_slots(facts, context):
    """What a context (a list of sentences) says: {"hero": "Mia", ...}, with its event as an index.

    Only the sentences that the world has are understood. This reads true documents.
    """
    slots = BRIEF.fullmatch(" ".join(context[:2])).groupdict()
    slots = {name: value for name, value in slots.items() if value}
    slots["ends"] = {"happily": "happy", "sadly": "sad"}[slots["ends"]]

    events = [event["sentence"] for event in facts["events"]]
    for sentence in context[2:]:
        for template in OPENING + FINDING + events:
            found = parse(template, sentence)
            if found:
                slots |= found
                if template in events:
                    slots["event"] = events.index(template)
    return slots


def fill(template, slots, vocabulary):
    """All sentences that a template stands for. What the slots do not say can be anything."""
    names = re.findall(r"\{(\w+)\}", template)
    choices = [[slots[name]] if name in slots else vocabulary[name] for name in names]
    return [template.format(**dict(zip(names, values))) for values in product(*choices)]


def next_options(facts, context):
    """The Options for the sentence after this context, a list of true sentences."""
    slots = known_slots(facts, context)
    place = len(context)
    if place == END_PLACE:
        return [Option(1.0, [THE_END])]

    if place == EVENT_PLACE:
        templates = [(event["p"], event["sentence"]) for event in facts["events"]]
    elif place == REACTION_PLACE:
        reactions = facts["events"][slots["event"]]["next"]
        templates = [(p, sentence) for sentence, p in reactions.items()]
    else:
        wordings = {
            OPENING_PLACE: OPENING,
            FINDING_PLACE: FINDING,
            ENDING_PLACE: ENDING[slots["ends"]],
        }[place]
        templates = [(1 / len(wordings), sentence) for sentence in wordings]
    return [Option(p, fill(text, slots, facts["vocabulary"])) for p, text in templates]


def total_variation(options, sentences):
    """How far samples are from the known probabilities, from 0 to 1. A sentence that cannot follow
    counts as an option of probability 0."""
    option_of = {}
    for i, option in enumerate(options):
        for sentence in option.sentences:
            option_of[sentence] = i
    counts = Counter(option_of.get(sentence) for sentence in sentences)

    difference = counts[None] / len(sentences)
    for i, option in enumerate(options):
        difference += abs(counts[i] / len(sentences) - option.p)
    return difference / 2


# the models ---------------------------------------------------------------------------------------


def run(script, out, device, **options):
    """Runs a train script in a process of its own."""
    options = {"out": out, "device": device.type, **options}
    command = [sys.executable, str(ROOT / "part_10" / script)]
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(command)
    if done.returncode != 0:
        sys.exit(done.returncode)  # the script has already printed why


def model_path(kind, seed, device, models=""):
    """The checkpoint of a model, which is trained if it is missing. Those of seed 0 stand where
    train_sonar.py and train_lcm.py write by themselves, unless another folder is given."""
    if seed == 0 and not models and kind in ("sonar", "two_tower"):
        return require(f"part_10/out/{'sonar' if kind == 'sonar' else 'lcm'}.pt")

    folder = Path(models or OUT).resolve() / f"demo_next_concept.{kind}.{seed}"
    if seed == 0 and not models:
        folder = OUT / f"kind={kind}"
    if kind == "sonar":
        if not (folder / "sonar.pt").exists():
            run("train_sonar.py", folder, device, seed=seed)
        return folder / "sonar.pt"

    sonar = model_path("sonar", seed, device, models)
    if not (folder / "lcm.pt").exists():
        run("train_lcm.py", folder, device, kind=kind, seed=seed, sonar=sonar)
    return folder / "lcm.pt"


class Prediction(NamedTuple):
    """The next sentence of each of N contexts."""

    sentences: list
    vectors: torch.Tensor  # (N, D): what the model wrote; of the token model the encoded sentences


def predict(writer, contexts, **options):
    """Samples the sentence after each context. Contexts are lists of equally many sentences
    -> Prediction."""
    sonar = writer.sonar
    if writer.kind == "token":
        sentences = next_sentences_by_tokens(writer, contexts, **options)
        return Prediction(sentences, sonar.vectors_of(sentences))

    # Many contexts are the same, and a sentence needs to be encoded only once.
    known = sorted({sentence for context in contexts for sentence in context})
    place_of = {sentence: i for i, sentence in enumerate(known)}
    index = torch.tensor([[place_of[sentence] for sentence in context] for context in contexts])
    x = sonar.vectors_of(known)[index]  # (N, S, D)
    vectors = [writer.next_vectors(part, only_last=True, **options)[:, 0] for part in x.split(1000)]
    vectors = torch.cat(vectors)
    return Prediction(sonar.sentences_of(vectors), vectors)


def next_sentences_by_tokens(writer, contexts, temperature=1.0):
    """The token model writes up to the next full stop."""
    tok = writer.sonar.tok
    end = tok.special["<|end|>"]
    [full_stop] = tok.encode(".")
    device = writer.model.wte.weight.device
    rows = []
    for context in contexts:
        rows.append(tok.encode(" ".join(context[:2]) + "\n") + tok.encode(" ".join(context[2:])))
    idx, lengths = pad(rows, end)

    sentences = []
    for part, part_lengths in zip(idx.split(500), lengths.split(500)):
        written = writer.model.generate(
            part.to(device),
            30,
            temperature=temperature,
            lengths=part_lengths.to(device),
            stop=full_stop,
        )
        for row, length in zip(written.tolist(), part_lengths.tolist()):
            answer = row[length:]
            if full_stop in answer:
                answer = answer[: answer.index(full_stop) + 1]
            if answer[0] == end:
                sentences.append(THE_END)
            else:
                sentences.append(tok.decode(answer).strip() or "?")
    return sentences


# measurements -------------------------------------------------------------------------------------


def true_documents(records):
    """The brief, the demonstrated story and the end, as lists of sentences."""
    documents = []
    for record in records:
        text = record["instruction"] + "\n" + record["output"]
        documents.append([*split_sentences(text), THE_END])
    return documents


def distance(a, b):
    """Vectors (N, D) each -> the mean distance, root mean square per number."""
    return (a - b).square().mean(dim=1).sqrt().mean().item()


def with_true_context(facts, writer, documents, **options):
    """Every sentence of every story is predicted from the true ones before it -> a dict of l2, l2
    after decoding and encoding, and the share of sentences that are possible, by place and mean."""
    sonar = writer.sonar
    by_place = {"l2": [], "l2_after": [], "possible": []}
    for place in range(OPENING_PLACE, END_PLACE + 1):
        contexts = [document[:place] for document in documents]
        prediction = predict(writer, contexts, **options)
        truth = sonar.vectors_of([document[place] for document in documents])
        again = sonar.vectors_of(prediction.sentences)

        possible = 0
        for context, sentence in zip(contexts, prediction.sentences):
            possible += any(sentence in option.sentences for option in next_options(facts, context))
        by_place["l2"].append(distance(prediction.vectors, truth))
        by_place["l2_after"].append(distance(again, truth))
        by_place["possible"].append(possible / len(documents))

    results = {}
    for name, values in by_place.items():
        results[name] = sum(values) / len(values)
        results[f"{name}_by_place"] = values
    if writer.kind == "token":
        results["l2"] = None  # it writes no vector
    return results


def exact_mean(facts, writer, documents):
    """The same for the best possible regression: the mean of the vectors of all true options,
    weighted with their probabilities."""
    sonar = writer.sonar
    by_place = {"l2": [], "l2_after": [], "possible": []}
    for place in range(OPENING_PLACE, END_PLACE + 1):
        means = []
        possible = []
        for document in documents:
            options = next_options(facts, document[:place])
            mean = torch.zeros(sonar.dim, device=writer.mean.device)
            for option in options:
                mean += option.p * sonar.vectors_of(option.sentences).mean(dim=0)
            means.append(mean)
            possible.append({sentence for option in options for sentence in option.sentences})
        means = torch.stack(means)
        truth = sonar.vectors_of([document[place] for document in documents])
        decoded = sonar.sentences_of(means)
        hits = sum(sentence in sentences for sentence, sentences in zip(decoded, possible))
        by_place["l2"].append(distance(means, truth))
        by_place["l2_after"].append(distance(sonar.vectors_of(decoded), truth))
        by_place["possible"].append(hits / len(documents))

    results = {}
    for name, values in by_place.items():
        results[name] = sum(values) / len(values)
        results[f"{name}_by_place"] = values
    return results


def sampled_events(facts, writer, documents, place, samples, **options):
    """In each context the next sentence is sampled many times -> a dict: the mean total variation
    from the known probabilities, and the mean number of different sentences."""
    contexts = [document[:place] for document in documents]
    repeated = [context for context in contexts for _ in range(samples)]
    sentences = predict(writer, repeated, **options).sentences

    variations = []
    distinct = []
    for i, context in enumerate(contexts):
        own = sentences[i * samples : (i + 1) * samples]
        variations.append(total_variation(next_options(facts, context), own))
        distinct.append(len(set(own)))
    return {
        "tv": sum(variations) / len(variations),
        "tv_by_context": variations,
        "distinct": sum(distinct) / len(distinct),
    }


def noise_floor(facts, documents, place, samples, generator):
    """The total variation that samples from the known probabilities themselves have."""
    variations = []
    for document in documents:
        options = next_options(facts, document[:place])
        p = torch.tensor([option.p for option in options])
        drawn = torch.multinomial(p, samples, replacement=True, generator=generator)
        sentences = [options[i].sentences[0] for i in drawn.tolist()]
        variations.append(total_variation(options, sentences))
    return sum(variations) / len(variations)


def whole_stories(writer, records, **options):
    """The model writes a story to each brief -> a dict: gold, coherence, the stop rule, cost."""
    stories = write(writer, prompts_of(records), **options)
    results = verdicts(records, stories)
    n = len(records)

    as_asked = 0
    for verdict in results:
        as_asked += all(value for name, value in verdict.checks.items() if name.startswith("has:"))
    lengths = [len(sentences) for sentences in stories.sentences]

    # The cosines to THE_END where the story should go on, and where it should stop.
    before = [max(row[:5]) for row in stories.end_cosines if len(row) > 5]
    at_end = [row[5] for row in stories.end_cosines if len(row) > 5]
    return {
        "gold": sum(verdict.passed for verdict in results) / n,
        "same_hero": sum(verdict.checks["agree"] for verdict in results) / n,
        "as_asked": as_asked / n,
        "ended": sum(stories.ended) / n,
        "five_sentences": sum(length == 5 for length in lengths) / n,
        "largest_cosine_before_the_end": max(before, default=None),
        "smallest_cosine_at_the_end": min(at_end, default=None),
        "seconds_per_story": stories.seconds / n,
        "positions_per_story": stories.positions / n,
        "first": " ".join(stories.sentences[0]),
    }


# worlds with K continuations ----------------------------------------------------------------------


def k_templates(facts, k, ends):
    """The k wordings that each of the five sentences of a story may have in the world of K = k."""
    events = [event for event in facts["events"] if "{helper}" not in event["sentence"]]
    reactions = ["So {hero} ran after it.", "{hero} sat down and cried."]
    reactions.append("So {hero} looked for it all day.")
    stages = [OPENING, FINDING, [event["sentence"] for event in events], reactions, ENDING[ends]]
    return [stage[:k] for stage in stages]


def k_documents(facts, k, documents, generator):
    """Documents of the world of K = k with the briefs of these documents. A brief that leaves
    something open is left out: it would have more continuations."""
    results = []
    for document in documents:
        slots = known_slots(facts, document[:2])
        if "place" not in slots:
            continue
        sentences = document[:2]
        for templates in k_templates(facts, k, slots["ends"]):
            choice = torch.randint(k, (), generator=generator).item()
            sentences = [*sentences, templates[choice].format(**slots)]
        results.append([*sentences, THE_END])
    return results


def train_on(documents, kind, sonar, share, seed, device):
    """What the flat body of train_lcm.py does, for a part of its steps -> Writer."""
    set_seed(seed)
    cfg = TrainConfig(kind=kind)
    cfg.steps = max(1, round(share * cfg.steps))
    vectors = vectorize(sonar, documents, cfg.given)
    mean = vectors.x.flatten(0, 1).mean(dim=0)
    std = vectors.x.flatten(0, 1).std(dim=0).clamp(min=1e-3)
    x = (vectors.x - mean) / std

    gpt_cfg = GPTConfig(
        vocab_size=sonar.tok.vocab_size, n_layer=cfg.n_layer, n_embd=cfg.n_embd, n_kv_head=4
    )
    model = train_lcm.make_model(kind, gpt_cfg, sonar.dim, cfg).to(device)
    optimizers = make_optimizers(model, cfg)
    for step in range(cfg.steps):
        set_lr(optimizers, lr_scale(step, cfg))
        choice = torch.randint(len(x), (cfg.batch_size,))
        loss = model.loss(x[choice].to(device), vectors.is_target[choice].to(device))
        update(model, loss, optimizers, cfg.grad_clip)
    return Writer(kind, model.requires_grad_(False), sonar, mean.to(device), std.to(device))


def k_gold(facts, writer, k, documents):
    """The share of stories in which every sentence is one of the k possible ones, and which end."""
    stories = write(writer, [document[:2] for document in documents])
    right = 0
    for document, sentences, ended in zip(documents, stories.sentences, stories.ended):
        slots = known_slots(facts, document[:2])
        stages = k_templates(facts, k, slots["ends"])
        possible = [[template.format(**slots) for template in stage] for stage in stages]
        fits = all(sentence in options for sentence, options in zip(sentences, possible))
        right += ended and len(sentences) == len(stages) and fits
    return right / len(documents)


# the figures --------------------------------------------------------------------------------------


def draw_one_context(facts, writers, document, samples, path):
    """One context: where the true options lie, where Base and Two-Tower write, and how often each
    event is sampled. -> the numbers of the title."""
    context = document[:EVENT_PLACE]
    options = next_options(facts, context)
    names = ["wind", "water", "somebody", "lost"]
    sampled = {}
    variation = {}
    for name, kind in (("Base", "base"), ("Two-Tower", "two_tower"), ("tokens", "token")):
        sampled[name] = predict(writers[kind], [context] * samples)
        variation[name] = total_variation(options, sampled[name].sentences)
    distinct = len(set(sampled["Base"].sentences))

    title = (
        f"One context, {samples} samples: Base writes {distinct} sentence"
        f"{'s' if distinct > 1 else ''} (TV {variation['Base']:.2f}),\nTwo-Tower TV "
        f"{variation['Two-Tower']:.2f}, tokens TV {variation['tokens']:.2f}"
    )
    fig, (left, right) = figure(title, columns=2, height=4.4)

    # The plane of the first two principal components of the true options.
    sonar = writers["base"].sonar
    sentences = [sentence for option in options for sentence in option.sentences]
    true = sonar.vectors_of(sentences)
    center = true.mean(dim=0)
    _, _, axes = torch.linalg.svd(true - center, full_matrices=False)

    def project(vectors):
        return ((vectors - center) @ axes[:2].T).cpu().numpy()

    cloud = project(sampled["Two-Tower"].vectors)
    left.scatter(*cloud.T, s=8, color="C2", alpha=0.5, label="Two-Tower, samples")
    start = 0
    for i, (name, option) in enumerate(zip(names, options)):
        own = project(true[start : start + len(option.sentences)])
        start += len(option.sentences)
        left.scatter(*own.T, s=40, color="black", marker="x", label=None if i else "possible")
        x, y = own.mean(axis=0)
        left.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=10)
    point = project(sampled["Base"].vectors[:1])
    left.scatter(*point.T, s=130, color="C3", marker="*", label="Base", zorder=5)
    left.set(xlabel="first principal component", ylabel="second principal component")
    left.legend(fontsize=8)

    # How often is each event sampled?
    shares = {"known": [option.p for option in options] + [0.0]}
    for name, prediction in sampled.items():
        of_option = []
        for option in options:
            hits = sum(sentence in option.sentences for sentence in prediction.sentences)
            of_option.append(hits / samples)
        shares[name] = [*of_option, 1 - sum(of_option)]
    colours = {**COLOURS, "known": "gray", "tokens": "C0"}
    for i, (name, values) in enumerate(shares.items()):
        places = [j + 0.2 * (i - 1.5) for j in range(len(values))]
        right.bar(places, values, 0.2, color=colours[name], label=name)
    right.set_xticks(range(5), [*names, "not\npossible"], fontsize=9)
    right.set(ylabel="share of the samples", ylim=(0, 1.05))
    right.legend(fontsize=8)
    save_figure(fig, path)
    return {"distinct_of_base": distinct, "tv": variation, "shares": shares}


def spread(rows, name):
    """The values of one number over the seeds -> their mean and themselves."""
    values = [row[name] for row in rows]
    return sum(values) / len(values), values


def draw_table(title, table, sweeps, worlds, path):
    """l2 and gold by row of the table, gold and l2 by denoising steps, gold by K."""
    fig, axes = figure(title, rows=2, columns=2, height=7)
    for ax, name, label in (
        (axes[0, 0], "l2", "l2 of the next vector"),
        (axes[0, 1], "gold", "gold of whole stories"),
    ):
        rows = [row for row in table if table[row][0].get(name) is not None]
        for row in rows:
            mean, values = spread(table[row], name)
            ax.barh(row, mean, color=COLOURS[row])
            ax.plot(values, [row] * len(values), "k.", markersize=5)
        ax.invert_yaxis()
        ax.set(xlabel=label)
        ax.tick_params(axis="y", labelsize=9)

    ax = axes[1, 0]
    for name, marker, label in (("gold", "o", "gold"), ("l2", "s", "l2")):
        steps = list(sweeps[0]["denoising"])
        columns = [[sweep["denoising"][step][name] for sweep in sweeps] for step in steps]
        means = [sum(column) / len(column) for column in columns]
        [line] = ax.plot(steps, means, marker=marker, label=label)
        lows = [min(column) for column in columns]
        highs = [max(column) for column in columns]
        ax.fill_between(steps, lows, highs, alpha=0.2, color=line.get_color())
    ax.set(xscale="log", xlabel="denoising steps of Two-Tower", ylabel="gold; l2", ylim=(0, 1.03))
    ax.set_xticks(steps, steps)
    ax.minorticks_off()
    ax.legend(loc="lower right")

    ax = axes[1, 1]
    for i, (kind, label) in enumerate((("base", "Base"), ("two_tower", "Two-Tower"))):
        for j, k in enumerate(worlds[0]):
            values = [world[k][kind] for world in worlds]
            place = j + 0.35 * (i - 0.5)
            mean = sum(values) / len(values)
            ax.bar(place, mean, 0.33, color=COLOURS[label], label=None if j else label)
            ax.plot([place] * len(values), values, "k.", markersize=5)
    ax.set_xticks(range(len(worlds[0])), [f"K = {k}" for k in worlds[0]])
    ax.set(xlabel="equally likely continuations", ylabel="share of right stories", ylim=(0, 1.25))
    ax.legend(loc="upper center", ncols=2)
    save_figure(fig, path)


def range_text(values):
    """The range of several numbers: "0.42 to 0.47", or one number if they are the same."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def finding(table):
    """The title of the table's figure. Is the paper's finding there in every seed?"""
    _, base_l2 = spread(table["Base"], "l2")
    _, tower_l2 = spread(table["Two-Tower"], "l2")
    _, base_gold = spread(table["Base"], "gold")
    _, tower_gold = spread(table["Two-Tower"], "gold")
    wins = all(a < b for a, b in zip(base_l2, tower_l2))
    loses = all(a < b for a, b in zip(base_gold, tower_gold))
    first = "Base is nearer to the next vector" if wins else "Base is not always nearer"
    second = "and tells worse stories" if loses else "and tells stories as good"
    return (
        f"{first} (l2 {range_text(base_l2)} against {range_text(tower_l2)})\n"
        f"{second} (gold {range_text(base_gold)} against {range_text(tower_gold)} of Two-Tower)"
    )


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    facts = read_facts(require("data/stories") / "facts.json")
    out = output_folder(cfg)
    records = story_records(cfg.prompts)
    documents = true_documents(records)
    train, _ = load_documents("stories")

    # Contexts whose brief leaves nothing open, so that only the event is uncertain.
    contexts = [document for document in documents if "place" in known_slots(facts, document[:2])]
    contexts = contexts[: cfg.positions]

    table = {"exact mean": [], **{row: [] for row in ROWS}}
    sweeps = []
    worlds = []
    start = time.time()
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        writers = {}
        for kind in KINDS:
            writers[kind] = load_writer(model_path(kind, seed, device, cfg.models), device)
        set_seed(seed)

        # the table
        table["exact mean"].append(exact_mean(facts, writers["base"], documents[:100]))
        for row, (kind, options) in ROWS.items():
            writer = writers[kind]
            result = with_true_context(facts, writer, documents, **options)
            for name, place in (("event", EVENT_PLACE), ("reaction", REACTION_PLACE)):
                sampled = sampled_events(facts, writer, contexts, place, cfg.samples, **options)
                result[f"tv_{name}"] = sampled["tv"]
                result[f"tv_{name}_by_context"] = sampled["tv_by_context"]
                result[f"distinct_{name}"] = sampled["distinct"]
            result |= whole_stories(writer, records, **options)
            if kind != "token":
                result["gold_snapped"] = whole_stories(writer, records, snap=True, **options)[
                    "gold"
                ]
            table[row].append(result)
            print(f"seed {seed}, {row}: gold {result['gold']:.2f}", flush=True)

        # denoising steps and guidance
        sweep = {"denoising": {}, "guidance": {}}
        few = records[:100]
        tower = writers["two_tower"]
        for steps in DENOISING_STEPS:
            options = {"denoising_steps": steps}
            l2 = with_true_context(facts, tower, documents[:100], **options)["l2"]
            gold = whole_stories(tower, few, **options)["gold"]
            sweep["denoising"][steps] = {"l2": l2, "gold": gold}
        for scale in GUIDANCE:
            options = {"guidance": scale}
            tv = sampled_events(facts, tower, contexts, EVENT_PLACE, cfg.samples, **options)["tv"]
            gold = whole_stories(tower, few, **options)["gold"]
            sweep["guidance"][scale] = {"tv": tv, "gold": gold}
        sweeps.append(sweep)

        # worlds with K continuations
        world = {}
        generator = torch.Generator().manual_seed(seed)
        for k in WORLDS:
            own = k_documents(facts, k, train, generator)
            own_val = k_documents(facts, k, documents, generator)
            world[k] = {}
            for kind in ("base", "two_tower"):
                writer = train_on(own, kind, writers["base"].sonar, cfg.share, seed, device)
                world[k][kind] = k_gold(facts, writer, k, own_val)
            print(f"seed {seed}, K = {k}: {world[k]}", flush=True)
        worlds.append(world)

        # The picture shows the context in which Two-Tower is as good as in the median context.
        if seed == cfg.seed:
            variations = table["Two-Tower"][0]["tv_event_by_context"]
            order = sorted(range(len(contexts)), key=variations.__getitem__)
            median = contexts[order[len(order) // 2]]
            picture = out / "demo_next_concept.png"
            one = draw_one_context(facts, writers, median, cfg.samples, picture)

    # the table in print: means over the seeds
    floor = {}
    generator = torch.Generator().manual_seed(cfg.seed)
    for name, place in (("event", EVENT_PLACE), ("reaction", REACTION_PLACE)):
        floor[name] = noise_floor(facts, contexts, place, cfg.samples, generator)
    columns = {
        "l2": "l2",
        "l2_after": "l2 after",
        "possible": "possible",
        "tv_event": "TV event",
        "tv_reaction": "TV next",
        "distinct_event": "distinct",
        "gold": "gold",
        "gold_snapped": "snapped",
        "same_hero": "same hero",
        "as_asked": "as asked",
        "five_sentences": "stops",
        "positions_per_story": "positions",
        "seconds_per_story": "s/story",
    }
    print(f"\n{'':22}" + "".join(f"{label:>10}" for label in columns.values()))
    for row, results in table.items():
        cells = []
        for name in columns:
            known = [result[name] for result in results if result.get(name) is not None]
            cells.append(f"{sum(known) / len(known):10.3f}" if known else f"{'-':>10}")
        print(f"{row:22}" + "".join(cells))
    print(f"samples from the truth itself have TV {floor['event']:.3f} and {floor['reaction']:.3f}")
    for sweep in sweeps:
        print("denoising steps, gold:", {k: v["gold"] for k, v in sweep["denoising"].items()})
        print("guidance, gold and TV:", sweep["guidance"])

    title = finding(table)
    print(title)
    save_metrics(
        out,
        name="demo_next_concept",
        table=table,
        sweeps=sweeps,
        worlds=worlds,
        one_context=one,
        noise_floor=floor,
        prompts=len(records),
        contexts=len(contexts),
        samples=cfg.samples,
        seconds=time.time() - start,
        seed=cfg.seed,
        seeds=cfg.seeds,
    )
    draw_table(title, table, sweeps, worlds, out / "demo_next_concept_table.png")
