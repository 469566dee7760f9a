"""
Part 10, the space of sentences: what do the vectors of the autoencoder know, and how far can one go
in their space before the sentences break?

    python part_10/demo_semantic_space.py
    python part_10/demo_semantic_space.py --text="Mia found the red hat. Tom ran after it."
    python part_10/demo_semantic_space.py --seeds=3    with the autoencoders of three seeds

With --text, sentences of your own are encoded and decoded, compared with those of the world, and
put on the map. Two of them become the ends of the walk.

    map          a projection of held-out sentences onto the plane in which their kinds, or their
                 wordings, differ most
    kinship      are the vectors of two garments nearer to each other than those of a garment and
                 a tool? Only the words are exchanged, and the rest of the sentence is the same
    walk         straight from one sentence to another, decoded at every step
    noise        normal noise on every vector, more and more, until the sentences change
    arithmetic   A + (B' - B): B and B' differ in one thing only, for example in the colour; does
                 the sum decode to A with that one thing changed? ("king - man + woman" with
                 sentences, Mikolov et al. 2013)

The wordings come from demo_next_concept.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F

from demo_next_concept import ENDING, FINDING, OPENING, model_path
from shared import (
    fail,
    figure,
    load_checkpoint,
    match_sentence,
    output_folder,
    parse_args,
    pick_device,
    read_facts,
    read_text,
    require,
    save_figure,
    save_metrics,
    set_seed,
    story_patterns,
)
from train_sonar import Sonar, exact_share, held_out_sentences, load_documents, split_sentences

# What the sentences of a document are. The first two are the brief.
KINDS = ["brief", "brief", "opening", "finding", "event", "reaction", "ending", "the end"]
COLOURS = ["C0", "C2", "C3", "C4", "C5", "C1", "black"]
NOISES = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0]
WALK = 10  # steps of a walk

# What is changed -> the wordings of A and of B. "wording" changes the wording itself.
CHANGES = {
    "animal": (OPENING[0], OPENING[0]),
    "place": (OPENING[0], OPENING[0]),
    "colour": (FINDING[0], FINDING[0]),
    "thing": (FINDING[0], FINDING[0]),
    "hero": (FINDING[0], FINDING[0]),
    "hero, who opens\nonly B": (FINDING[0], "{hero} sat down and cried."),
    "wording": (FINDING[0], FINDING[0]),
}


@dataclass
class Config:
    sonar: str = ""  # checkpoint of the autoencoder; empty: part_10/out/sonar.pt
    text: str = ""  # sentences of your own to be put on the map; empty: none
    samples: int = 200  # trials of each change, and pairs of sentences to walk between
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # autoencoders to measure: those of seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        for name in ("samples", "seeds"):
            assert getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1"
        assert not self.sonar or self.seeds == 1, "--sonar is one autoencoder: use --seeds=1"


# walks, noise, arithmetic -------------------------------------------------------------------------


def walk(start, end, steps):
    """Vectors (D,) -> (steps + 1, D), in equal strides on the straight line between them."""
    share = torch.linspace(0, 1, steps + 1, device=start.device)[:, None]
    return start + share * (end - start)


def is_possible(patterns, sentence):
    """Does the world have such a sentence? The brief and the end count as well."""
    is_brief = sentence.startswith(("Write a story about a ", "End it "))
    return is_brief or sentence == "The end." or match_sentence(patterns, sentence) is not None


def walk_numbers(sonar, patterns, pairs):
    """From one sentence of each pair to the other -> a dict: the share of the decoded sentences on
    the way that the world has, and the mean number of different sentences."""
    starts = sonar.vectors_of([first for first, _ in pairs])
    ends = sonar.vectors_of([second for _, second in pairs])
    possible = 0
    distinct = 0
    for start, end in zip(starts, ends):
        sentences = sonar.sentences_of(walk(start, end, WALK))
        possible += sum(is_possible(patterns, sentence) for sentence in sentences[1:-1])
        distinct += len(set(sentences))
    return {"possible": possible / (len(pairs) * (WALK - 1)), "distinct": distinct / len(pairs)}


def change_trial(rng, vocabulary, change):
    """One trial of the arithmetic -> the sentences A, B, B' and the one that should come out."""
    wording_a, wording_b = CHANGES[change]
    slots_a = {slot: rng.choice(values) for slot, values in vocabulary.items()}
    slots_b = {slot: rng.choice(values) for slot, values in vocabulary.items()}
    a = wording_a.format(**slots_a)
    if change == "wording":
        other = FINDING[1]
        return a, wording_b.format(**slots_b), other.format(**slots_b), other.format(**slots_a)

    # A and B agree in the slot that changes, and B' has another value there.
    slot = change.split(",")[0]
    slots_b[slot] = slots_a[slot]
    new = rng.choice([value for value in vocabulary[slot] if value != slots_a[slot]])
    b = wording_b.format(**slots_b)
    b_changed = wording_b.format(**{**slots_b, slot: new})
    expected = wording_a.format(**{**slots_a, slot: new})
    return a, b, b_changed, expected


def arithmetic(sonar, vocabulary, change, n, rng):
    """The share of n trials in which A + (B' - B) decodes to A with the change."""
    trials = [change_trial(rng, vocabulary, change) for _ in range(n)]
    a, b, b_changed, expected = zip(*trials)
    vectors = sonar.vectors_of(list(a)) + sonar.vectors_of(list(b_changed))
    vectors = vectors - sonar.vectors_of(list(b))
    decoded = sonar.sentences_of(vectors)
    return sum(x == y for x, y in zip(decoded, expected)) / n


def kinship(sonar, vocabulary, parents):
    """Mean distance of two things of the same group (two garments), divided by that of two things
    of different groups. Below 1 the space knows that they are akin."""
    things = vocabulary["thing"]
    sentences = [FINDING[0].format(hero="Tom", colour="red", thing=thing) for thing in things]
    distance = torch.cdist(sonar.vectors_of(sentences), sonar.vectors_of(sentences))
    same = []
    different = []
    for i in range(len(things)):
        for j in range(i):
            is_same = parents[things[i]] == parents[things[j]]
            (same if is_same else different).append(distance[i, j].item())
    return sum(same) / len(same) / (sum(different) / len(different))


# a user's own sentences ---------------------------------------------------------------------------


def show_own(sonar, own, known):
    """Prints what comes back, and the nearest of the known sentences."""
    vectors = sonar.vectors_of(own)
    copies = sonar.sentences_of(vectors)
    known_vectors = F.normalize(sonar.vectors_of(known), dim=1)
    cosines = F.normalize(vectors, dim=1) @ known_vectors.T  # (own, known)
    for i, (sentence, copy) in enumerate(zip(own, copies)):
        best = int(cosines[i].argmax())
        print(f"\n{sentence}\n  comes back as  {copy}")
        print(f"  nearest        {known[best]}  (cosine {cosines[i, best]:.2f})")


# the figures --------------------------------------------------------------------------------------


def principal_axes(vectors):
    """Vectors (N, D) -> their mean (D,) and the two directions (2, D) of largest variance."""
    mean = vectors.mean(dim=0)
    _, _, axes = torch.linalg.svd(vectors - mean, full_matrices=False)
    return mean, axes[:2]


def group_means(sonar, groups):
    """{name: sentences} -> the mean vector of each group, (number of groups, D)."""
    return torch.stack([sonar.vectors_of(sentences).mean(dim=0) for sentences in groups.values()])


def named_by_mean(sonar, means, groups):
    """The share of the sentences whose nearest mean is that of their own group."""
    right = 0
    total = 0
    for i, sentences in enumerate(groups.values()):
        nearest = torch.cdist(sonar.vectors_of(sentences), means).argmin(dim=1)
        right += (nearest == i).sum().item()
        total += len(sentences)
    return right / total


def by_kind(documents):
    """{kind: its sentences}"""
    groups = {}
    for document in documents:
        for kind, sentence in zip(KINDS, document):
            groups.setdefault(kind, []).append(sentence)
    return groups


def by_wording(documents):
    """{wording of the opening: its sentences}"""
    groups = {wording.split(" {")[0].removesuffix(" a"): [] for wording in OPENING}
    for document in documents:
        for first_words, sentences in groups.items():
            if document[2].startswith(first_words):
                sentences.append(document[2])
    return {f"{name} ...": sentences for name, sentences in groups.items() if sentences}


def draw_map(sonar, train, val, own, path):
    """Held-out sentences in the plane of the means of their kinds, and openings in the plane of the
    means of their wordings. The means are those of training sentences -> the share of the sentences
    that the nearest mean names rightly, of both."""
    shares = []
    for groups_of in (by_kind, by_wording):
        means = group_means(sonar, groups_of(train))
        shares.append(named_by_mean(sonar, means, groups_of(val)))
    title = (
        f"The nearest mean names the kind of {shares[0]:.2f} of the held-out sentences,\n"
        f"and the wording of {shares[1]:.2f} of the openings"
    )
    fig, axes = figure(title, "first direction", columns=2, height=5.2)

    for ax, groups_of in zip(axes, (by_kind, by_wording)):
        mean, directions = principal_axes(group_means(sonar, groups_of(train)))

        for colour, (name, sentences) in zip(COLOURS, groups_of(val).items()):
            points = (sonar.vectors_of(sentences) - mean) @ directions.T  # (N, 2)
            ax.scatter(*points.T.cpu(), s=8, color=colour, label=name)
        if own and groups_of == by_kind:
            points = ((sonar.vectors_of(own) - mean) @ directions.T).cpu()
            ax.scatter(*points.T, s=120, color="black", marker="*", label="yours", zorder=5)
            for sentence, point in zip(own, points):
                ax.annotate(sentence[:24], point, fontsize=8)
        ax.legend(
            fontsize=9, ncols=2, markerscale=2, loc="upper center", bbox_to_anchor=(0.5, -0.14)
        )
    axes[0].set_title("kinds of sentences", fontsize=10)
    axes[0].set(ylabel="second direction")
    axes[1].set_title("openings by wording", fontsize=10)
    save_figure(fig, path)
    return shares


def draw_limits(title, exact, sums, path):
    """Noise until the sentences break, and how often arithmetic works. Both are lists with one dict
    for each seed."""
    fig, (left, right) = figure(title, columns=2, height=4.4)
    for i, row in enumerate(exact):
        left.plot(list(row), list(row.values()), "o-", label=f"autoencoder {i + 1}")
    left.set(xlabel="standard deviation of the noise", ylabel="share of sentences unchanged")
    left.set(ylim=(0, 1.03))
    left.legend(fontsize=9)

    for change in CHANGES:
        values = [row[change] for row in sums]
        right.barh(change, sum(values) / len(values), color="C0")
        right.plot(values, [change] * len(values), "k.")
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=9)
    right.set(xlabel="share of right sums A + (B' - B)", xlim=(0, 1.03))
    save_figure(fig, path)


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    own = split_sentences(cfg.text)
    if cfg.text and not own:
        fail("--text has no sentence")
    if cfg.sonar:
        load_checkpoint(cfg.sonar, "sonar")  # a wrong file ends here, before anything slow
    folder = require("data/stories")
    vocabulary = read_facts(folder / "facts.json")["vocabulary"]
    patterns = story_patterns(folder / "facts.json")
    train, val = load_documents("stories")
    held_out = held_out_sentences(train, val).all
    out = output_folder(cfg)

    parents = dict(line.split("\t") for line in read_text(folder / "taxonomy.tsv").splitlines())
    exact = []
    sums = []
    walks = []
    kinships = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        set_seed(seed)
        path = cfg.sonar or model_path("sonar", seed, device)
        sonar = Sonar.load(load_checkpoint(path, "sonar")).to(device)
        rng = Random(seed)

        sentences = rng.sample(held_out, min(1000, len(held_out)))
        exact.append({noise: exact_share(sonar, sentences, noise) for noise in NOISES})
        sums.append(
            {change: arithmetic(sonar, vocabulary, change, cfg.samples, rng) for change in CHANGES}
        )

        kinships.append(kinship(sonar, vocabulary, parents))

        # walks between two sentences of the same kind, and between two of different kinds
        same = []
        different = []
        for _ in range(cfg.samples // 4 + 1):
            first, second = rng.sample(val, 2)
            place, other = rng.sample(range(2, 7), 2)
            same.append((first[place], second[place]))
            different.append((first[place], second[other]))
        walks.append(
            {
                "same kind": walk_numbers(sonar, patterns, same),
                "different kinds": walk_numbers(sonar, patterns, different),
            }
        )
        if seed == cfg.seed:
            first_sonar = sonar

    # two walks in words: between two findings, or between the user's own sentences
    ends = [FINDING[0].format(hero="Mia", colour="red", thing="hat")]
    ends.append(FINDING[1].format(hero="Tom", colour="blue", thing="kite"))
    if len(own) >= 2:
        ends = own[:2]
    elif not own:
        ends.append(ENDING["sad"][1].format(hero="Tom", colour="blue", thing="kite"))
    for first, second in zip(ends, ends[1:]):
        start, end = first_sonar.vectors_of([first, second])
        print(f"\nfrom  {first}\nto    {second}")
        for i, sentence in enumerate(first_sonar.sentences_of(walk(start, end, WALK))):
            print(f"  {i / WALK:.1f}  {sentence}")
    if own:
        show_own(first_sonar, own, held_out)

    # what came out
    shares = draw_map(first_sonar, train[:2000], val, own, out / "demo_semantic_space.png")
    print(f"\nthe nearest mean names {shares[0]:.3f} of the kinds, {shares[1]:.3f} of the wordings")
    print("distance within a group of things / between groups: ", end="")
    print("  ".join(f"{ratio:.2f}" for ratio in kinships))
    print(f"\n{'noise':>8}  share of sentences unchanged, each autoencoder")
    for noise in NOISES:
        print(f"{noise:8.1f}  " + "  ".join(f"{row[noise]:.3f}" for row in exact))
    print("\nshare of right sums A + (B' - B)")
    for change in CHANGES:
        print(f"  {' '.join(change.split()):28}" + "  ".join(f"{row[change]:.2f}" for row in sums))
    for i, row in enumerate(walks):
        for name, numbers in row.items():
            print(
                f"walk {i + 1}, {name}: {numbers['possible']:.2f} of the sentences on the way are "
                f"possible, {numbers['distinct']:.1f} of {WALK + 1} different"
            )

    # The largest noise that 95 % of the sentences survive in every autoencoder.
    survived = [noise for noise in NOISES if min(row[noise] for row in exact) >= 0.95]
    lowest = {change: min(row[change] for row in sums) for change in CHANGES}
    good = sum(value >= 0.95 for value in lowest.values())
    title = (
        f"Noise up to {max(survived, default=0):.1f} leaves 95 % of the sentences as they were;\n"
        f"arithmetic works for {good} of {len(CHANGES)} changes (95 % right or more)"
    )
    print(title)
    save_metrics(
        out,
        name="demo_semantic_space",
        exact=exact,
        arithmetic=sums,
        walks=walks,
        kinds_by_nearest_mean=shares[0],
        wordings_by_nearest_mean=shares[1],
        kinship=kinships,
        samples=cfg.samples,
        seed=cfg.seed,
        seeds=cfg.seeds,
    )
    draw_limits(title, exact, sums, out / "demo_semantic_space_limits.png")
