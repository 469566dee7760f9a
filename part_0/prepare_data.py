"""
Part 0 - a world whose truth is known: stories, instructions and preferences for every later part.

    python part_0/prepare_data.py                       # writes data/stories/ in seconds
    python part_0/prepare_data.py --seed=1 --out=other  # another world of the same kind, somewhere else

A story is drawn, never written by hand: who, where and what, then five stages with one of their sentences each. Every
draw has a known probability and no two ways give the same text, so -log p(text) is a sum over the draws. Its mean over
val.txt is the entropy of the source in nats per byte: the loss that no model can beat.

    train.txt, val.txt                           stories; about 60 % open with a brief that the story obeys
    instructions.jsonl, instructions_val.jsonl   briefs and small skills; the training stories are of mixed quality
    preferences.jsonl, preferences_val.jsonl     two answers to a brief, labelled by a noisy judge
    taxonomy.tsv                                 child, parent
    facts.json                                   patterns, vocabulary, true entropy, Bayes accuracy; written last
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from itertools import permutations
from math import exp, log
from random import Random
from time import time

from shared import ROOT, cli, judge

@dataclass
class Config:
    out: str = ""         # folder to write (default: data/stories)
    seed: int = 0         # another seed, another sample of the same world
    tau: float = 0.5      # temperature of the preference judge, in checks: small is sharp, large is noisy
    wrong: float = 0.25   # probability that a demonstration gets a required slot wrong, for each of them
    scale: float = 1.0    # multiplies the number of records in every file

    def __post_init__(self):
        assert self.tau > 0, f"tau must be positive, got {self.tau}"
        assert 0 <= self.wrong <= 1, f"wrong is a probability, got {self.wrong}"
        assert 0 < self.scale <= 100, f"scale must be in (0, 100], got {self.scale}"

# the vocabulary: every noun begins with a consonant, so "a" is always right ------------------------------------------

TREE = {
    "animal": {"pet": "cat dog rabbit hamster", "livestock": "cow horse sheep pig", "wildlife": "fox bear wolf deer"},
    "object": {"toy": "ball kite doll drum", "clothing": "hat coat shoe scarf", "food": "cake pear plum bun",
               "tool": "spoon hammer rope bucket"},
    "place": {"landscape": "lake river forest hill beach park garden", "building": "farm market school castle bridge"},
    "city": {"europe": "Paris Rome London Berlin", "asia": "Tokyo Delhi Seoul Hanoi",
             "africa": "Cairo Tunis Lagos Dakar"},
    "person": {"child": "boy girl", "adult": "farmer king teacher baker"},
}
LEAVES = {kind: " ".join(groups.values()).split() for kind, groups in TREE.items()}
NOUNS = [leaf for leaves in LEAVES.values() for leaf in leaves if leaf.islower()]
SLOTS = {
    "hero": "Tom Anna Ben Lucy Max Mia Sam Lily Tim Emma Jack Rosa Leo Nina Bob Ella Finn Kate Otto Zoe".split(),
    "animal": LEAVES["animal"],
    "place": LEAVES["city"],
    "colour": "red blue green yellow white black brown pink".split(),
    "thing": LEAVES["object"],
    "ends": ["happy", "sad"],
}
VOCABULARY = {**SLOTS, "helper": LEAVES["person"]}
SLOT_NATS = sum(log(len(values)) for values in SLOTS.values())  # each is drawn uniformly

# the grammar: (probability, sentence); a story is one sentence of each stage -----------------------------------------

OPENING = [
    (1 / 3, "One day, a {animal} named {hero} was in {place}."),
    (1 / 3, "Once there was a {animal} named {hero} in {place}."),
    (1 / 3, "Long ago, a {animal} named {hero} lived in {place}."),
]
FINDING = [
    (1 / 3, "There {hero} found the {colour} {thing}."),
    (1 / 3, "Then {hero} saw the {colour} {thing}."),
    (1 / 3, "Soon {hero} got the {colour} {thing}."),
]
EVENT = [
    (0.4, "But the wind took the {colour} {thing}."),
    (0.3, "Later the {colour} {thing} fell into water."),
    (0.2, "But one {helper} took the {colour} {thing}."),
    (0.1, "Later the {colour} {thing} was lost."),
]
CRY = "{hero} sat down and cried."
ASK = "So {hero} asked one {helper} for help."
NEXT = [  # NEXT[i] follows EVENT[i]: what the hero does depends on what happened
    [(0.6, "So {hero} ran after it."), (0.3, CRY), (0.1, ASK)],
    [(0.5, "So {hero} jumped after it."), (0.2, CRY), (0.3, ASK)],
    [(0.2, "So {hero} ran after that {helper}."), (0.2, CRY), (0.6, "So {hero} asked that {helper} to give it back.")],
    [(0.7, "So {hero} looked for it all day."), (0.1, CRY), (0.2, ASK)],
]
ENDING = {
    "happy": [
        (1 / 3, "At last {hero} had the {colour} {thing} again and was happy."),
        (1 / 3, "{hero} got the {colour} {thing} back and smiled."),
        (1 / 3, "At last the {colour} {thing} came back and {hero} was happy."),
    ],
    "sad": [
        (1 / 3, "At last {hero} lost the {colour} {thing} and was sad."),
        (1 / 3, "{hero} never saw the {colour} {thing} again."),
        (1 / 3, "At last {hero} went home sad without the {colour} {thing}."),
    ],
}
BRIEFS = [  # BRIEFS[level - 1]
    (0.15, "Write a story about a {animal} named {hero}."),
    (0.25, "Write a story about a {animal} named {hero} and the {colour} {thing}."),
    (0.60, "Write a story about a {animal} named {hero} and the {colour} {thing} in {place}."),
]
END_IT = {"happy": " End it happily.", "sad": " End it sadly."}
MUST = {"animal": "{animal}", "hero": "{hero}", "thing": "{colour} {thing}", "place": "{place}"}  # level n: first n + 1
P_BRIEF = 0.8  # of the documents of train.txt

def pick(rng, options):
    """One of [(probability, option), ...] -> (its index, -log of its probability in nats)."""
    u = rng.random()
    for i, (p, _) in enumerate(options):
        u -= p
        if u < 0:
            break
    return i, -log(p)

def draw_slots(rng):
    return {slot: values[int(len(values) * rng.random())] for slot, values in SLOTS.items()}  # rng.choice is slow

def tell(rng, slots):
    """A story of these slots -> (its five sentences, -log p of the draws in nats, those of the slots included)."""
    event = pick(rng, EVENT)
    stages = [OPENING, FINDING, EVENT, NEXT[event[0]], ENDING[slots["ends"]]]
    picks = [event if options is EVENT else pick(rng, options) for options in stages]
    story = [options[i][1] for options, (i, _) in zip(stages, picks)]
    nats = SLOT_NATS + sum(cost for _, cost in picks)
    if any("{helper}" in sentence for sentence in story):  # one person, drawn when first mentioned
        slots = {**slots, "helper": rng.choice(VOCABULARY["helper"])}
        nats += log(len(VOCABULARY["helper"]))
    return [sentence.format(**slots) for sentence in story], nats

def brief(slots, level):
    return (BRIEFS[level - 1][1] + END_IT[slots["ends"]]).format(**slots)

def document(rng):
    """One entry of train.txt: a story, often below a brief -> (text, -log p(text) in nats)."""
    slots = draw_slots(rng)
    story, nats = tell(rng, slots)
    if rng.random() >= P_BRIEF:
        return " ".join(story), nats - log(1 - P_BRIEF)
    i, cost = pick(rng, BRIEFS)
    return brief(slots, i + 1) + "\n" + " ".join(story), nats + cost - log(P_BRIEF)

def patterns():
    """The grammar as regular expressions, one for each sentence."""
    rows = [(i, s, None) for i, options in enumerate([OPENING, FINDING, EVENT]) for _, s in options]
    rows += [(3, s, None) for s in dict.fromkeys(s for options in NEXT for _, s in options)]  # each once, in order
    rows += [(4, s, end) for end, options in ENDING.items() for _, s in options]
    any_of = {slot: f"(?P<{slot}>{'|'.join(values)})" for slot, values in VOCABULARY.items()}
    return [{"stage": i, "regex": s.replace(".", r"\.").format(**any_of), "end": end} for i, s, end in rows]

def story_check(slots, level):
    must = [words.format(**slots) for words in list(MUST.values())[:level + 1]]
    return {"must": must, "ends": slots["ends"], "no_repeat": True, "patterns": "stories"}

def held_out(instruction, input=""):
    """True for the tenth of all compositions that only validation asks for; how a story ends is not part of it."""
    composition = instruction.split(" End it ")[0] + "\n" + input
    return int(hashlib.sha256(composition.encode()).hexdigest(), 16) % 10 == 0

def draw_brief(rng, val):
    """A brief on this side of the split -> (the slots that it fixes, level)."""
    while True:
        slots, level = draw_slots(rng), pick(rng, BRIEFS)[0] + 1
        if held_out(brief(slots, level)) == val:
            return {k: v for k, v in slots.items() if k == "ends" or "{" + k + "}" in BRIEFS[level - 1][1]}, level

# instructions: stories of mixed quality, and skills; a skill makes (instruction, input, output) of a level -----------

def change(rng, slots, slot):
    """The same slots with another value in one of them; the thing may change in its colour instead."""
    if slot == "thing":
        slot = rng.choice(["colour", "thing"])
    return {**slots, slot: rng.choice([value for value in SLOTS[slot] if value != slots[slot]])}

def demonstration(rng, fixed, level, wrong):
    """A well-formed story that gets each thing the brief asks for wrong with probability `wrong`."""
    slots = draw_slots(rng) | fixed
    for slot in [*list(MUST)[:level + 1], "ends"]:
        if rng.random() < wrong:
            slots = change(rng, slots, slot)
    return " ".join(tell(rng, slots)[0])

def qa(rng, level):
    slots = draw_slots(rng)
    story = tell(rng, slots)[0]
    question, output = rng.choice([
        ("Where was {hero}?", "in {place}"),
        ("What did {hero} find?", "the {colour} {thing}"),
        ("What animal is {hero}?", "a {animal}"),
    ])
    return question.format(**slots), " ".join(story[:level + 1]), output.format(**slots)

def listing(words):
    """Each with its article: a noun after a blank is the same token everywhere, one that begins a line is another."""
    return ", ".join(f"a {word}" for word in words)

def count(rng, level):
    words = rng.sample(NOUNS, rng.randint(level, 2 * level + 1))
    if rng.random() < 0.5:
        return "How many words are in the list?", listing(words), str(len(words))
    words = rng.choices(words[:2], k=len(words))
    word = rng.choice(words)
    return f"How many times is {word} in the list?", listing(words), str(words.count(word))

def add(rng, level):
    a = rng.randint(*[(0, 9), (10, 19), (10, 29)][level - 1])
    b = rng.randint(*[(0, 9), (0, 9), (10, 29)][level - 1])
    return f"What is {a} plus {b}?", "", str(a + b)

def reverse(rng, level):
    words = rng.sample(NOUNS, level + 1)
    return "Reverse the list.", listing(words), listing(words[::-1])

def sort(rng, level):
    words = rng.sample(NOUNS, level + 1)
    return "Sort the list.", listing(words), listing(sorted(words))

def spell(rng, level):
    word = rng.choice([w for w in NOUNS + SLOTS["colour"] + SLOTS["hero"] if min(len(w), 5) == level + 2])  # letters
    return f"Spell the word {word}.", "", "-".join(word)

def is_a(rng, level):
    """Level 1 asks for the kind, 2 for the group, 3 for the group with near misses: is a fox a kind of pet?"""
    kind = rng.choice(list(TREE))
    group = rng.choice(list(TREE[kind]))
    others = [list(TREE), [g for groups in TREE.values() for g in groups], list(TREE[kind])][level - 1]
    truth = kind if level == 1 else group
    asked = truth if rng.random() < 0.5 else rng.choice([other for other in others if other != truth])
    return f"Is a {rng.choice(TREE[kind][group].split())} a kind of {asked}?", "", "yes" if asked == truth else "no"

SKILLS = {"qa": qa, "count": count, "sum": add, "reverse": reverse, "sort": sort, "spell": spell, "is_a": is_a}

def story_record(rng, val, wrong):
    fixed, level = draw_brief(rng, val)
    story = demonstration(rng, fixed, level, 0 if val else wrong)
    return {"instruction": brief(fixed, level), "input": "", "output": story, "task": "story", "level": level,
            "check": story_check(fixed, level)}

def skill_record(rng, val):
    while True:
        task, level = rng.choice(list(SKILLS)), rng.randint(1, 3)
        instruction, input, output = SKILLS[task](rng, level)
        if held_out(instruction, input) == val:
            return {"instruction": instruction, "input": input, "output": output, "task": task, "level": level,
                    "check": {"answer": output}}

# preferences: two answers to a brief; two in five are bad in one of these ways ---------------------------------------

BAD = {  # way: from a right story, its slots and what the brief asked for, to the pieces of a bad answer
    "wrong slot": lambda rng, story, slots, asked: tell(rng, change(rng, slots, rng.choice(asked)))[0],
    "wrong ending": lambda rng, story, slots, asked: tell(rng, change(rng, slots, "ends"))[0],
    "other brief": lambda rng, story, slots, asked:
        tell(rng, change(rng, draw_slots(rng) | {"hero": slots["hero"]}, "hero"))[0],
    "changes midway": lambda rng, story, slots, asked:
        story[:2] + tell(rng, change(rng, slots, rng.choice(["hero", "thing"])))[0][2:],
    "rambling": lambda rng, story, slots, asked: story + tell(rng, draw_slots(rng))[0][-rng.randint(1, 2):],
    "repeated": lambda rng, story, slots, asked:
        sorted(story + [rng.choice(story)] * rng.randint(1, 3), key=story.index),
    "words missing": lambda rng, story, slots, asked: [w for w in " ".join(story).split() if rng.random() < 0.95],
    "wrong order": lambda rng, story, slots, asked: rng.choice(list(permutations(story))[1:]),
    "salad": lambda rng, story, slots, asked:
        [" ".join(rng.sample(words, len(words))) + "." for words in (sentence[:-1].split() for sentence in story)],
    "cut short": lambda rng, story, slots, asked: " ".join(story).split()[:rng.randint(1, 30)],
    "empty": lambda rng, story, slots, asked: [],
}

def bad_answer(rng, fixed, level, way):
    slots = draw_slots(rng) | fixed
    return " ".join(BAD[way](rng, tell(rng, slots)[0], slots, list(MUST)[:level + 1]))

def answer(rng, fixed, level, wrong):
    if rng.random() < 0.6:
        return demonstration(rng, fixed, level, wrong)
    way = rng.choices(list(BAD), [0.2 if way == "empty" else 1 for way in BAD])[0]  # an empty answer is rare
    return bad_answer(rng, fixed, level, way)

def preference(rng, val, wrong, tau, world):
    """Two answers, r* of each = checks held by the patterns in `world`; P(a chosen) = sigmoid((r*_a - r*_b) / tau)."""
    fixed, level = draw_brief(rng, val)
    check = story_check(fixed, level)
    gap = 0
    while gap == 0:
        a, b = answer(rng, fixed, level, wrong), answer(rng, fixed, level, wrong)
        r_a, r_b = (sum(judge({"check": check | {"patterns": world}}, text)[0].values()) for text in (a, b))
        gap = r_a - r_b
    p = 1 / (1 + exp(-gap / tau))
    if rng.random() >= p:
        a, b, gap, p = b, a, -gap, 1 - p
    return {"prompt": brief(fixed, level), "chosen": a, "rejected": b, "gap": gap, "label_p": p, "check": check}

# files; each has a random generator of its own, so that the size of one does not change another ----------------------

def write(path, lines, end="\n"):
    path.write_text("".join(line + end for line in lines), encoding="utf-8", newline="\n")

def write_stories(cfg, path, n):
    """Returns the entropy in nats per byte: documents are independent, and the blank line between two is certain."""
    rng = Random(f"{cfg.seed} {path.name}")
    documents = [document(rng) for _ in range(n)]
    text = "\n\n".join(text for text, _ in documents)
    write(path, [text], end="")
    return sum(nats for _, nats in documents) / len(text.encode())

def write_instructions(cfg, path, stories, skills):
    rng, val = Random(f"{cfg.seed} {path.name}"), "val" in path.name
    records = [story_record(rng, val, cfg.wrong) for _ in range(stories)]
    records += [skill_record(rng, val) for _ in range(skills)]
    rng.shuffle(records)
    write(path, [json.dumps(record) for record in records])

def write_preferences(cfg, path, n):
    """Returns the Bayes accuracy: how often a judge who knows r* would agree with the noisy labels."""
    rng = Random(f"{cfg.seed} {path.name}")
    pairs = [preference(rng, "val" in path.name, cfg.wrong, cfg.tau, str(path.parent)) for _ in range(n)]
    write(path, [json.dumps(pair) for pair in pairs])
    return sum(max(pair["label_p"], 1 - pair["label_p"]) for pair in pairs) / n

def write_world(cfg, folder):
    """Every file of the world into `folder`, facts.json last; returns the facts."""
    counts = {"train": 14_000, "val": 700, "preferences": 12_000, "preferences_val": 1000}
    counts |= {"stories": 6000, "skills": 6000, "stories_val": 1000, "skills_val": 600}
    counts = {name: max(1, round(n * cfg.scale)) for name, n in counts.items()}
    facts = {
        "changed": cfg.changed,  # shared.require refuses a world that was made with other settings
        "seed": cfg.seed, "tau": cfg.tau, "wrong": cfg.wrong, "p_brief": P_BRIEF, "briefs": BRIEFS, "counts": counts,
        "events": [{"p": p, "sentence": s, "next": dict(map(reversed, after))} for (p, s), after in zip(EVENT, NEXT)],
        "vocabulary": VOCABULARY,
        "patterns": patterns(),
    }
    write(folder / "facts.json", [json.dumps(facts)])  # the judge of the preferences reads the patterns
    write_stories(cfg, folder / "train.txt", counts["train"])
    entropy = write_stories(cfg, folder / "val.txt", counts["val"])
    write_instructions(cfg, folder / "instructions.jsonl", counts["stories"], counts["skills"])
    write_instructions(cfg, folder / "instructions_val.jsonl", counts["stories_val"], counts["skills_val"])
    write_preferences(cfg, folder / "preferences.jsonl", counts["preferences"])
    bayes = write_preferences(cfg, folder / "preferences_val.jsonl", counts["preferences_val"])
    edges = [(kind, "thing") for kind in TREE] + [(group, kind) for kind in TREE for group in TREE[kind]]
    edges += [(leaf, group) for groups in TREE.values() for group, leaves in groups.items() for leaf in leaves.split()]
    write(folder / "taxonomy.tsv", [f"{child}\t{parent}" for child, parent in edges])
    facts |= {"true_nats_per_byte": entropy, "bayes_accuracy": bayes}  # of val.txt, of preferences_val.jsonl
    write(folder / "facts.json", [json.dumps(facts, indent=1)])
    return facts

if __name__ == "__main__":
    cfg = cli(Config())
    start = time()
    name = ",".join(["stories"] + [f"{key}={value}" for key, value in cfg.changed.items()])
    out = Path(cfg.out).expanduser().resolve() if cfg.out else ROOT / "data" / name
    out.mkdir(parents=True, exist_ok=True)

    # a world is there when its facts.json is: it goes first and comes last, so nobody reads half of a world
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        facts = write_world(cfg, Path(folder))
        (out / "facts.json").unlink(missing_ok=True)
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == "facts.json"):
            path.replace(out / path.name)

    print(f"{out}: {facts['counts']['train']} stories and the rest in {time() - start:.1f} s")
    print(f"true entropy {facts['true_nats_per_byte']:.4f} nats per byte, Bayes accuracy {facts['bayes_accuracy']:.4f}")
