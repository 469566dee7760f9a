"""
Part 0: a world whose truth is known. It gives every later part its stories, its instructions and
its preferences.

    python part_0/prepare_data.py                       # writes data/stories/ in seconds
    python part_0/prepare_data.py --seed=1 --out=other  # another world of the same kind

A document of the text is a story, a statement about the taxonomy, or a problem in arithmetic with
its solution. Each is drawn at random. A story, for example: first who, where and what, then one
sentence for each of five stages. The probability of every draw is known, and different draws never
give the same text. So -log p of a text is a sum over its draws. The mean of this sum per byte of
val.txt is the entropy of the source in nats per byte, which is the loss that no model can beat.

    train.txt, val.txt                          documents; most stories begin with a brief that they
                                                obey, never with one that is held out for validation
    instructions.jsonl, instructions_val.jsonl  briefs, skills and problems, each with an answer;
                                                many of the answers for training have faults
    problems.jsonl, problems_val.jsonl          problems alone, each solved in steps, one in four of
                                                those for training with a fault; those for
                                                validation are also longer than any in training
    preferences.jsonl, preferences_val.jsonl    two answers to a brief, labelled by a noisy judge
    taxonomy.tsv                                child, parent
    facts.json                                  patterns, vocabulary, true entropy, Bayes accuracy
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import functools
import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from itertools import permutations, product
from math import exp, log
from random import Random
from time import time
from typing import NamedTuple

from shared import ROOT, judge, parse_args, sweep


@dataclass
class Config:
    # output folder; empty: data/stories, with the changed options added to the name
    out: str = ""

    seed: int = 0  # seed of all random numbers
    tau: float = 0.5  # temperature of the preference judge, in checks; a large one means more noise

    # probability that a demonstration gets a thing wrong that the brief asks for, for each thing;
    # also the probability that a solved problem has a wrong step
    wrong: float = 0.25

    scale: float = 1.0  # factor on the number of records in every file

    def __post_init__(self):
        assert self.tau > 0, f"tau must be positive, got {self.tau}"
        assert 0 <= self.wrong <= 1, f"wrong must be a probability, got {self.wrong}"
        assert 0 < self.scale <= 100, f"scale must be above 0 and at most 100, got {self.scale}"


# --------------------------------------------------------------------------------------------------
# The vocabulary

# Every noun begins with a consonant, so that the article "a" is always right.
TREE = {
    "animal": {
        "pet": "cat dog rabbit hamster",
        "farm animal": "cow horse sheep pig",
        "wild animal": "fox bear wolf deer",
    },
    "object": {
        "toy": "ball kite doll drum",
        "garment": "hat coat shoe scarf",
        "food": "cake pear plum bun",
        "tool": "spoon hammer rope bucket",
    },
    "place": {
        "place outdoors": "lake river forest hill beach park garden",
        "building": "farm market school castle bridge",
    },
    "city": {
        "city in Europe": "Paris Rome London Berlin",
        "city in Asia": "Tokyo Delhi Seoul Hanoi",
        "city in Africa": "Cairo Tunis Lagos Dakar",
    },
    "person": {
        "child": "boy girl",
        "adult": "farmer king teacher baker",
    },
}
LEAVES = {kind: " ".join(groups.values()).split() for kind, groups in TREE.items()}
NOUNS = [leaf for leaves in LEAVES.values() for leaf in leaves if leaf.islower()]  # no cities

HEROES = (
    "Tom Anna Ben Lucy Max Mia Sam Lily Tim Emma Jack Rosa Leo Nina Bob Ella Finn Kate Otto Zoe"
)

# The slots of a story. The value of each slot is drawn uniformly.
SLOTS = {
    "hero": HEROES.split(),
    "animal": LEAVES["animal"],
    "place": LEAVES["city"],
    "colour": "red blue green yellow white black brown pink".split(),
    "thing": LEAVES["object"],
    "ends": ["happy", "sad"],
}
SLOT_NATS = sum(log(len(values)) for values in SLOTS.values())  # -log p of one draw of all slots

# A story has a helper only if one of its sentences mentions one, so the helper is drawn later.
VOCABULARY = {**SLOTS, "helper": LEAVES["person"]}


def with_article(noun):
    """ "fox" -> "a fox", "animal" -> "an animal". A city has no article."""
    if noun in LEAVES["city"]:
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def capital(sentence):
    """The same sentence with a capital letter at its beginning."""
    return sentence[0].upper() + sentence[1:]


def plural(noun):
    """ "plum" -> "plums"."""
    return "scarves" if noun == "scarf" else noun + "s"


# --------------------------------------------------------------------------------------------------
# The grammar. A story has one sentence from each of five stages. An option is (probability, text).

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

# What the hero does next depends on what happened: NEXT[i] follows EVENT[i].
CRY = "{hero} sat down and cried."
ASK = "So {hero} asked one {helper} for help."
NEXT = [
    [
        (0.6, "So {hero} ran after it."),
        (0.3, CRY),
        (0.1, ASK),
    ],
    [
        (0.5, "So {hero} jumped after it."),
        (0.2, CRY),
        (0.3, ASK),
    ],
    [
        (0.2, "So {hero} ran after that {helper}."),
        (0.2, CRY),
        (0.6, "So {hero} asked that {helper} to give it back."),
    ],
    [
        (0.7, "So {hero} looked for it all day."),
        (0.1, CRY),
        (0.2, ASK),
    ],
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

# A brief asks for a story. BRIEFS[level - 1] is the brief of a level, from 1 to 3. A brief of a
# higher level asks for more: level n asks for the first n + 1 parts of MUST, and for an ending.
BRIEFS = [
    (0.15, "Write a story about a {animal} named {hero}."),
    (0.25, "Write a story about a {animal} named {hero} and the {colour} {thing}."),
    (0.60, "Write a story about a {animal} named {hero} and the {colour} {thing} in {place}."),
]
MUST = {"animal": "{animal}", "hero": "{hero}", "thing": "{colour} {thing}", "place": "{place}"}
END_IT = {"happy": " End it happily.", "sad": " End it sadly."}
P_BRIEF = 0.8  # share of the stories in train.txt and val.txt that begin with a brief

# A statement says of a thing what kind of thing it is, one step up the tree.
STATEMENTS = [
    (0.25, "{child} is {parent}."),
    (0.25, "Everybody knows that {child} is {parent}."),
    (0.25, "We call {child} {parent}."),
    (0.25, "What is {child}? It is {parent}."),
]
N_STATEMENTS = 6  # in one document, which is then about as long as a story

# A problem begins with how many things somebody has. Each operation changes the number, and the
# question asks for the number in the end. {n} is a number and {other} a person who is new in the
# problem. After the two comparisons the problem goes on with that person.
START = "{name} had {n} {things}."
OPERATIONS = [
    ("+", "{name} found {n} more."),
    ("+", "{other} gave {name} {n} more."),
    ("-", "{name} lost {n}."),
    ("-", "{name} gave {n} to {other}."),
    ("*", "Then {name} had twice as many."),
    ("+", "{other} had {n} more than {name}."),
    ("-", "{other} had {n} fewer than {name}."),
]
COMPARISONS = ("more than", "fewer than")
QUESTION = "How many {things} did {name} have in the end?"
STEP_BY_STEP = " Think step by step."  # after the question: the solution begins with its steps
CONCLUSION = "The answer is {n}."

MOST_OPERATIONS = 3  # in the text and in the instructions
FIRST_NUMBERS = range(2, 21)  # somebody has 2 to 20 things, because "1 plums" is wrong
LARGEST_DRAWN = 9  # the number of an operation is drawn up to this one
LARGEST = 99  # no number in a problem or in its solution is larger

# What a document of the text is.
P_KIND = {"story": 0.77, "statement": 0.18, "problem": 0.05}


class Pick(NamedTuple):
    """One option that was drawn from a list of (probability, text)."""

    index: int
    text: str
    nats: float  # -log of its probability


def pick(rng, options):
    """Draw one of [(probability, text), ...] -> Pick."""
    u = rng.random()
    for index, (probability, text) in enumerate(options):
        u -= probability
        if u < 0:
            break

    # If rounding kept u above 0 to the end, the last option is the one that was drawn.
    return Pick(index, text, -log(probability))


def draw_slots(rng):
    """A value for every slot: {"hero": "Mia", ...}."""
    slots = {}
    for slot, values in SLOTS.items():
        slots[slot] = values[int(len(values) * rng.random())]  # rng.choice takes longer
    return slots


def tell(rng, slots):
    """Draw a story with these slots -> (its five sentences, -log p in nats).

    The nats count every draw, also those of the slots.
    """
    # The event comes first, because what the hero does next depends on it.
    event = pick(rng, EVENT)
    opening = pick(rng, OPENING)
    finding = pick(rng, FINDING)
    reaction = pick(rng, NEXT[event.index])
    ending = pick(rng, ENDING[slots["ends"]])

    stages = [opening, finding, event, reaction, ending]
    nats = SLOT_NATS + sum(stage.nats for stage in stages)

    # A story has one helper at most, so the event and the reaction speak of the same person.
    if any("{helper}" in stage.text for stage in stages):
        slots = {**slots, "helper": rng.choice(VOCABULARY["helper"])}
        nats += log(len(VOCABULARY["helper"]))

    return [stage.text.format(**slots) for stage in stages], nats


def brief(slots, level):
    """The text that asks for a story with these slots."""
    _, sentence = BRIEFS[level - 1]
    return (sentence + END_IT[slots["ends"]]).format(**slots)


def held_out(composition):
    """Does this composition belong to validation? A hash puts one tenth of them there.

    A composition is the part of an exercise that must be new to a model that is examined. In a
    brief it is everything but the ending, so that no brief is in training with one ending and in
    validation with the other.
    """
    digest = hashlib.sha256(composition.encode()).hexdigest()
    return int(digest, 16) % 10 == 0


def brief_held_out(slots, level):
    """Does a brief belong to validation?"""
    _, sentence = BRIEFS[level - 1]
    return held_out(sentence.format(**slots) + "\n")


@functools.cache
def held_out_share():
    """The probability that a brief, drawn at random, belongs to validation: an exact count."""
    share = 0.0
    for probability, sentence in BRIEFS:
        # All briefs of a level are equally likely.
        named = [slot for slot in SLOTS if "{" + slot + "}" in sentence]
        held = 0
        total = 0
        for values in product(*[SLOTS[slot] for slot in named]):
            held += held_out(sentence.format(**dict(zip(named, values))) + "\n")
            total += 1
        share += probability * held / total
    return share


def story_document(rng):
    """Draw a story that often has a brief above it -> (text, nats). The nats are -log p(text).

    A brief that belongs to validation is drawn again, together with its slots: a model must not
    have read it before it is asked. All other briefs become more likely by the factor 1 / (1 - q),
    where q is the probability of drawing again.
    """
    slots = draw_slots(rng)
    if rng.random() >= P_BRIEF:
        sentences, nats = tell(rng, slots)
        return " ".join(sentences), nats - log(1 - P_BRIEF)

    chosen = pick(rng, BRIEFS)
    while brief_held_out(slots, chosen.index + 1):
        slots = draw_slots(rng)
        chosen = pick(rng, BRIEFS)

    sentences, nats = tell(rng, slots)
    text = brief(slots, chosen.index + 1) + "\n" + " ".join(sentences)
    return text, nats + chosen.nats - log(P_BRIEF) + log(1 - held_out_share())


def edges():
    """The edges of the tree below its five kinds: [(child, parent)]."""
    pairs = []
    for kind, groups in TREE.items():
        for group, leaves in groups.items():
            pairs.append((group, kind))
            pairs += [(leaf, group) for leaf in leaves.split()]
    return pairs


def statement_document(rng):
    """Draw a few statements about the taxonomy -> (text, nats)."""
    pairs = edges()
    statements = []
    nats = 0.0
    for _ in range(N_STATEMENTS):
        child, parent = pairs[int(len(pairs) * rng.random())]
        wording = pick(rng, STATEMENTS)
        text = wording.text.format(child=with_article(child), parent=with_article(parent))
        statements.append(capital(text))
        nats += log(len(pairs)) + wording.nats
    return " ".join(statements), nats


class Problem(NamedTuple):
    """A problem in arithmetic and its solution."""

    sentences: list  # what is told; the first sentence gives the number at the beginning
    question: str
    steps: list  # one equation for each operation: ["7-2=5", "5+5=10"]
    answer: int
    nats: float  # -log p of all draws, but for the number of operations


class Uniform:
    """Draws from lists, each member equally likely, and adds up -log p of what was drawn."""

    def __init__(self, rng):
        self.rng = rng
        self.nats = 0.0

    def __call__(self, options):
        self.nats += log(len(options))
        return options[int(len(options) * self.rng.random())]


def calculate(sign, a, b):
    """a + b, a - b or a * b."""
    if sign == "+":
        return a + b
    if sign == "-":
        return a - b
    return a * b


def possible_numbers(sign, value):
    """The numbers that an operation may add to `value`, take away from it, or multiply it by, so
    that the result is from 1 to LARGEST."""
    numbers = [2] if sign == "*" else range(1, LARGEST_DRAWN + 1)
    return [n for n in numbers if 1 <= calculate(sign, value, n) <= LARGEST]


def draw_problem(rng, operations):
    """Draw a problem with this number of operations -> Problem."""
    draw = Uniform(rng)
    name = draw(SLOTS["hero"])
    things = plural(draw(SLOTS["thing"]))
    value = draw(FIRST_NUMBERS)
    new_names = [other for other in SLOTS["hero"] if other != name]

    sentences = [START.format(name=name, n=value, things=things)]
    steps = []
    for _ in range(operations):
        # An operation that would leave the range of numbers cannot be drawn.
        possible = [option for option in OPERATIONS if possible_numbers(option[0], value)]
        sign, sentence = draw(possible)
        n = 2 if sign == "*" else draw(possible_numbers(sign, value))
        other = None
        if "{other}" in sentence:
            other = draw(new_names)
            new_names.remove(other)

        sentences.append(sentence.format(name=name, other=other, n=n))
        result = calculate(sign, value, n)
        steps.append(f"{value}{sign}{n}={result}")
        value = result

        # After a comparison the problem goes on with the other person.
        if any(word in sentence for word in COMPARISONS):
            name = other

    # Half of the longer problems have a distractor, somewhere after the first sentence. It is about
    # another person and other things, and changes nothing.
    if operations >= 3 and draw([True, False]):
        other_things = [thing for thing in SLOTS["thing"] if plural(thing) != things]
        distractor = START.format(
            name=draw(new_names),
            n=draw(FIRST_NUMBERS),
            things=plural(draw(other_things)),
        )
        place = draw(range(1, operations + 2))
        sentences.insert(place, distractor)

    question = QUESTION.format(name=name, things=things)
    return Problem(sentences, question, steps, value, draw.nats)


def request(problem, in_steps):
    """The text that asks for the solution of a problem."""
    text = " ".join([*problem.sentences, problem.question])
    return text + STEP_BY_STEP if in_steps else text


def solution(steps, answer, in_steps):
    """The steps and the answer, or the answer alone."""
    sentences = [step + "." for step in steps] if in_steps else []
    return " ".join([*sentences, CONCLUSION.format(n=answer)])


def problem_held_out(problem):
    """Does a problem belong to validation? Its first sentence decides."""
    return held_out(problem.sentences[0])


@functools.cache
def held_out_problems():
    """The probability that a problem, drawn at random, belongs to validation: an exact count."""
    held = 0
    total = 0
    for name, thing, n in product(SLOTS["hero"], SLOTS["thing"], FIRST_NUMBERS):
        held += held_out(START.format(name=name, things=plural(thing), n=n))
        total += 1
    return held / total


def problem_document(rng):
    """Draw a problem and below it its solution -> (text, nats). The solution itself is certain: a
    reader who can calculate needs 0 nats for it."""
    operations = rng.randint(1, MOST_OPERATIONS)
    problem = draw_problem(rng, operations)
    while problem_held_out(problem):
        problem = draw_problem(rng, operations)

    text = request(problem, True) + "\n" + solution(problem.steps, problem.answer, True)
    return text, problem.nats + log(MOST_OPERATIONS) + log(1 - held_out_problems())


DOCUMENTS = {
    "story": story_document,
    "statement": statement_document,
    "problem": problem_document,
}


class Document(NamedTuple):
    """One entry of train.txt or val.txt."""

    kind: str
    text: str
    nats: float  # -log p(text)


def document(rng):
    """Draw an entry of train.txt or val.txt -> Document."""
    kind = pick(rng, [(p, kind) for kind, p in P_KIND.items()])
    text, nats = DOCUMENTS[kind.text](rng)
    return Document(kind.text, text, kind.nats + nats)


def patterns():
    """The grammar as regular expressions, one for each sentence: a list of dicts with the stage
    (0 to 4), the regex, the ending that the sentence belongs to (or None), and the regexes of the
    sentences that it may follow (or None, if it may follow every sentence of the stage before)."""
    any_of = {slot: f"(?P<{slot}>{'|'.join(values)})" for slot, values in VOCABULARY.items()}

    def regex(sentence):
        return sentence.replace(".", r"\.").format(**any_of)

    rows = []
    for stage, options in enumerate([OPENING, FINDING, EVENT]):
        for _, sentence in options:
            rows.append({"stage": stage, "regex": regex(sentence), "end": None, "after": None})

    # A reaction may follow several events, but it needs only one pattern.
    events_before = {}
    for (_, event), options in zip(EVENT, NEXT):
        for _, sentence in options:
            events_before.setdefault(sentence, []).append(regex(event))
    for sentence, events in events_before.items():
        rows.append({"stage": 3, "regex": regex(sentence), "end": None, "after": events})

    for end, options in ENDING.items():
        for _, sentence in options:
            rows.append({"stage": 4, "regex": regex(sentence), "end": end, "after": None})
    return rows


def required(level):
    """The parts of a story that a brief of this level asks for, besides its ending."""
    return list(MUST)[: level + 1]


def story_check(slots, level):
    """The "check" of a record, which shared.judge reads: what a story for this brief must hold."""
    must = [MUST[part].format(**slots) for part in required(level)]
    return {"must": must, "ends": slots["ends"], "no_repeat": True, "patterns": "stories"}


def fixed_slots(slots, level):
    """The slots that a brief of this level fixes: those that it names, and the ending."""
    _, sentence = BRIEFS[level - 1]
    fixed = {}
    for slot, value in slots.items():
        if slot == "ends" or "{" + slot + "}" in sentence:
            fixed[slot] = value
    return fixed


def draw_brief(rng, val):
    """Draw a brief on one side of the split -> (the slots that it fixes, its level)."""
    while True:
        slots = draw_slots(rng)
        level = pick(rng, BRIEFS).index + 1
        if brief_held_out(slots, level) == val:
            return fixed_slots(slots, level), level


# --------------------------------------------------------------------------------------------------
# Instructions, first kind: stories of mixed quality


def change(rng, slots, slot):
    """The same slots, but with another value in one of them.

    A "thing" is a colour and an object ("the red ball"). It changes in one of the two.
    """
    if slot == "thing":
        slot = rng.choice(["colour", "thing"])
    others = [value for value in SLOTS[slot] if value != slots[slot]]
    return {**slots, slot: rng.choice(others)}


def demonstration(rng, fixed, level, wrong):
    """A well-formed story. It gets each thing that the brief asks for wrong with probability
    `wrong`, so that alignment has something to improve later."""
    slots = draw_slots(rng) | fixed
    for slot in [*required(level), "ends"]:
        if rng.random() < wrong:
            slots = change(rng, slots, slot)

    sentences, _ = tell(rng, slots)
    return " ".join(sentences)


def story_record(rng, val, wrong):
    """One brief with its demonstration. Those for validation have no faults."""
    fixed, level = draw_brief(rng, val)
    story = demonstration(rng, fixed, level, 0 if val else wrong)
    return {
        "instruction": brief(fixed, level),
        "input": "",
        "output": story,
        "task": "story",
        "level": level,
        "check": story_check(fixed, level),
    }


# --------------------------------------------------------------------------------------------------
# Instructions, second kind: skills. Each function makes one exercise of a level from 1 to 3.


class Exercise(NamedTuple):
    instruction: str
    input: str
    output: str
    composition: str = ""  # what must be new in validation; empty: instruction and input


def qa(rng, level):
    """A question about a story. At a higher level more of the story stands around the answer."""
    slots = draw_slots(rng)
    sentences, _ = tell(rng, slots)

    question, output = rng.choice(
        [
            ("Where was {hero}?", "in {place}"),
            ("What did {hero} find?", "the {colour} {thing}"),
            ("What animal is {hero}?", "a {animal}"),
        ]
    )
    story = " ".join(sentences[: level + 1])
    return Exercise(question.format(**slots), story, output.format(**slots))


def listing(words):
    """Words as a list: "a ball, a kite".

    Each word follows an article and a space. Without the article, the first word of a line would
    be another token than the same word further on.
    """
    return ", ".join(f"a {word}" for word in words)


def count(rng, level):
    """How many words are in a list, or how often one word is in it."""
    words = rng.sample(NOUNS, rng.randint(level, 2 * level + 1))
    if rng.random() < 0.5:
        return Exercise("How many words are in the list?", listing(words), str(len(words)))

    words = rng.choices(words[:2], k=len(words))
    word = rng.choice(words)
    question = f"How many times is {word} in the list?"
    return Exercise(question, listing(words), str(words.count(word)))


def add(rng, level):
    """The sum of two numbers."""
    first_range = {1: (2, 9), 2: (10, 19), 3: (20, 49)}
    a = rng.randint(*first_range[level])
    b = rng.randint(1, LARGEST_DRAWN)
    return Exercise(f"What is {a} plus {b}?", "", str(a + b))


def reverse(rng, level):
    """A list of level + 1 words, backwards."""
    words = rng.sample(NOUNS, level + 1)
    return Exercise("Reverse the list.", listing(words), listing(words[::-1]))


def sort(rng, level):
    """A list of level + 1 words in the order of the alphabet."""
    words = rng.sample(NOUNS, level + 1)
    return Exercise("Sort the list.", listing(words), listing(sorted(words)))


def spell(rng, level):
    """The letters of a word. It has three letters at level 1, four at level 2, else more."""
    words = NOUNS + SLOTS["colour"] + SLOTS["hero"]
    word = rng.choice([word for word in words if min(len(word), 5) == level + 2])
    return Exercise(f"Spell the word {word}.", "", "-".join(word))


# The questions of is_a, in words that the text does not use.
IS_A = {
    1: ["What sort of thing is {child}?", "How would you classify {child}?"],
    2: [
        "In general, what sort of thing is {child}?",
        "In general, how would you classify {child}?",
    ],
    3: ["Explain what {child} is.", "Explain how you would classify {child}."],
}


def is_a(rng, level):
    """A question about the taxonomy. Level 1 goes one step up the tree (a fox is a wild animal).
    Level 2 goes two steps at once (a fox is an animal), which the text never says. Level 3 asks for
    one step and then the other. In validation, no question of this level has been asked about the
    same thing before."""
    kind = rng.choice(list(TREE))
    group = rng.choice(list(TREE[kind]))
    leaf = rng.choice(TREE[kind][group].split())
    child, parent, grandparent = [with_article(noun) for noun in (leaf, group, kind)]

    if level == 1:
        answer = parent
    elif level == 2:
        answer = grandparent
    else:
        answer = f"{parent}, and so {grandparent}"

    question = rng.choice(IS_A[level]).format(child=child)
    return Exercise(question, "", answer, f"is_a {level} {leaf}")


SKILLS = {
    "qa": qa,
    "count": count,
    "sum": add,
    "reverse": reverse,
    "sort": sort,
    "spell": spell,
    "is_a": is_a,
}


def skill_record(rng, val):
    """One exercise on one side of the split."""
    while True:
        # One exercise in three is about the taxonomy, because there are many things to ask about.
        task = rng.choice([*SKILLS, "is_a", "is_a"])
        level = rng.randint(1, 3)
        exercise = SKILLS[task](rng, level)
        composition = exercise.composition or exercise.instruction + "\n" + exercise.input
        if held_out(composition) == val:
            break

    return {
        "instruction": exercise.instruction,
        "input": exercise.input,
        "output": exercise.output,
        "task": task,
        "level": level,
        "check": {"answer": exercise.output},
    }


# --------------------------------------------------------------------------------------------------
# Instructions, third kind: problems in arithmetic, with the answer alone or with its steps


def wrong_steps(rng, steps):
    """The same steps with an error in one of them. The steps after it go on from the wrong number.

    ["7-2=5", "5+5=10"] -> ["7-2=6", "6+5=11"]
    """
    # An error that leads out of the range of numbers is drawn again.
    while True:
        bad = rng.randrange(len(steps))
        error = rng.choice([-10, -2, -1, 1, 2, 10])

        value = int(re.match(r"\d+", steps[0])[0])
        spoiled = []
        results = []
        for i, step in enumerate(steps):
            sign, n = re.search(r"([-+*])(\d+)=", step).groups()
            result = calculate(sign, value, int(n))
            if i == bad:
                result += error
            spoiled.append(f"{value}{sign}{n}={result}")
            results.append(result)
            value = result
        if min(results) >= 1 and max(results) <= LARGEST:
            return spoiled


def problem_record(rng, val, wrong, operations, in_steps):
    """One problem with its solution. A solution for training has an error with probability
    `wrong`; those for validation have none."""
    problem = draw_problem(rng, operations)
    while problem_held_out(problem) != val:
        problem = draw_problem(rng, operations)

    steps = problem.steps
    if not val and rng.random() < wrong:
        steps = wrong_steps(rng, steps)
    answer = steps[-1].split("=")[1]

    check = {"number": str(problem.answer)}
    if in_steps:
        check["steps"] = problem.steps
    return {
        "instruction": request(problem, in_steps),
        "input": "",
        "output": solution(steps, answer, in_steps),
        "task": "problem" if in_steps else "problem_at_once",
        "level": operations,
        "check": check,
    }


# --------------------------------------------------------------------------------------------------
# Bad answers to a brief. Each function spoils a right story in one way. It gets the sentences of
# the story, its slots and the parts that the brief asks for, and returns the pieces of the answer.


def wrong_slot(rng, story, slots, asked):
    """Another story, in which one thing differs from the brief."""
    sentences, _ = tell(rng, change(rng, slots, rng.choice(asked)))
    return sentences


def wrong_ending(rng, story, slots, asked):
    """Another story, which ends sadly instead of happily, or the other way round."""
    sentences, _ = tell(rng, change(rng, slots, "ends"))
    return sentences


def other_brief(rng, story, slots, asked):
    """A story for some other brief, with another hero."""
    other = draw_slots(rng) | {"hero": slots["hero"]}
    sentences, _ = tell(rng, change(rng, other, "hero"))
    return sentences


def changes_midway(rng, story, slots, asked):
    """After two sentences the hero or the thing is suddenly another one."""
    other = change(rng, slots, rng.choice(["hero", "thing"]))
    sentences, _ = tell(rng, other)
    return story[:2] + sentences[2:]


def rambling(rng, story, slots, asked):
    """After its ending the story goes on with the end of another story."""
    sentences, _ = tell(rng, draw_slots(rng))
    return story + sentences[-rng.randint(1, 2) :]


def repeated(rng, story, slots, asked):
    """One sentence stands there up to four times in a row."""
    sentence = rng.choice(story)
    copies = [sentence] * rng.randint(1, 3)
    return sorted(story + copies, key=story.index)


def words_missing(rng, story, slots, asked):
    """Every word is left out with probability 0.05."""
    words = " ".join(story).split()
    return [word for word in words if rng.random() < 0.95]


def wrong_order(rng, story, slots, asked):
    """The right sentences in a wrong order."""
    orders = list(permutations(story))
    return rng.choice(orders[1:])  # the first one is the right order


def salad(rng, story, slots, asked):
    """The words of every sentence in a random order."""
    sentences = []
    for sentence in story:
        words = sentence.removesuffix(".").split()
        sentences.append(" ".join(rng.sample(words, len(words))) + ".")
    return sentences


def cut_short(rng, story, slots, asked):
    """The first 1 to 30 words."""
    words = " ".join(story).split()
    return words[: rng.randint(1, 30)]


def empty(rng, story, slots, asked):
    """No answer at all."""
    return []


BAD = {
    "wrong slot": wrong_slot,
    "wrong ending": wrong_ending,
    "other brief": other_brief,
    "changes midway": changes_midway,
    "rambling": rambling,
    "repeated": repeated,
    "words missing": words_missing,
    "wrong order": wrong_order,
    "salad": salad,
    "cut short": cut_short,
    "empty": empty,
}
BAD_WEIGHTS = [0.2 if way == "empty" else 1 for way in BAD]  # an empty answer is rare


def bad_answer(rng, fixed, level, way):
    """An answer to a brief that is bad in one of the ways in BAD."""
    slots = draw_slots(rng) | fixed
    story, _ = tell(rng, slots)
    pieces = BAD[way](rng, story, slots, required(level))
    return " ".join(pieces)


# --------------------------------------------------------------------------------------------------
# Preferences: two answers to a brief, and which of them a noisy judge prefers


def answer(rng, fixed, level, wrong):
    """Three answers in five are demonstrations. The others are bad in a random way."""
    if rng.random() < 0.6:
        return demonstration(rng, fixed, level, wrong)

    way = rng.choices(list(BAD), BAD_WEIGHTS)[0]
    return bad_answer(rng, fixed, level, way)


def checks_held(check, text):
    """The true reward r* of an answer: the number of its checks that hold."""
    verdict = judge({"check": check}, text)
    return sum(verdict.checks.values())


def preference(rng, val, wrong, tau, world):
    """Two answers to one brief with a noisy label (Bradley and Terry 1952).

    The judge prefers answer a with probability sigmoid((r*_a - r*_b) / tau), where r* is the number
    of checks that hold. `world` is the folder whose patterns are used for the checks.
    """
    fixed, level = draw_brief(rng, val)
    check = story_check(fixed, level)
    check_here = {**check, "patterns": world}

    # A pair of equally good answers would teach nothing, so it is drawn again.
    gap = 0
    while gap == 0:
        a = answer(rng, fixed, level, wrong)
        b = answer(rng, fixed, level, wrong)
        gap = checks_held(check_here, a) - checks_held(check_here, b)

    # exp() would overflow if tau were tiny, hence the limit.
    label_p = 1 / (1 + exp(min(-gap / tau, 700)))
    chosen, rejected = a, b
    if rng.random() >= label_p:  # the judge prefers b
        chosen, rejected = b, a
        gap = -gap
        label_p = 1 - label_p

    return {
        "prompt": brief(fixed, level),
        "chosen": chosen,
        "rejected": rejected,
        "gap": gap,
        "label_p": label_p,
        "check": check,
    }


# --------------------------------------------------------------------------------------------------
# Files. Each has its own random generator, so that the size of one does not change another.


def generator(cfg, path):
    return Random(f"{cfg.seed} {path.name}")


def is_validation(path):
    return path.stem.endswith("_val")


def write_text(path, text):
    path.write_text(text, encoding="utf-8", newline="\n")


def write_lines(path, lines):
    write_text(path, "".join(line + "\n" for line in lines))


class Entropy(NamedTuple):
    """The true entropy of a file, in nats per byte."""

    all: float  # of the whole file
    by_kind: dict  # of the documents of each kind, without the blank lines between them


def write_documents(cfg, path, number):
    """Write documents with a blank line between them -> Entropy.

    The documents are independent of each other, and the blank lines are certain. So the nats of
    the whole file are the sum of the nats of its documents.
    """
    rng = generator(cfg, path)
    documents = [document(rng) for _ in range(number)]
    text = "\n\n".join(entry.text for entry in documents)
    write_text(path, text)

    by_kind = {}
    for kind in P_KIND:
        of_kind = [entry for entry in documents if entry.kind == kind]
        if of_kind:
            size = sum(len(entry.text.encode()) for entry in of_kind)
            by_kind[kind] = sum(entry.nats for entry in of_kind) / size
    return Entropy(sum(entry.nats for entry in documents) / len(text.encode()), by_kind)


def write_instructions(cfg, path, stories, skills, problems):
    """Write this many stories, exercises and problems, shuffled."""
    rng = generator(cfg, path)
    val = is_validation(path)
    records = [story_record(rng, val, cfg.wrong) for _ in range(stories)]
    records += [skill_record(rng, val) for _ in range(skills)]
    for _ in range(problems):
        operations = rng.randint(1, MOST_OPERATIONS)
        in_steps = rng.random() < 0.8
        records.append(problem_record(rng, val, cfg.wrong, operations, in_steps))
    rng.shuffle(records)
    write_lines(path, [json.dumps(record) for record in records])


def write_problems(cfg, path, number, most_operations):
    """Write problems that are solved in steps, as many of each number of operations."""
    rng = generator(cfg, path)
    val = is_validation(path)
    records = []
    for i in range(number):
        operations = 1 + i % most_operations
        records.append(problem_record(rng, val, cfg.wrong, operations, in_steps=True))
    rng.shuffle(records)
    write_lines(path, [json.dumps(record) for record in records])


def write_preferences(cfg, path, number):
    """Write pairs of answers. Returns the Bayes accuracy, which no reward model can beat.

    A judge who knows r* always names the better answer. The Bayes accuracy is how often the noisy
    labels are expected to agree.
    """
    rng = generator(cfg, path)
    val = is_validation(path)
    world = str(path.parent)
    pairs = [preference(rng, val, cfg.wrong, cfg.tau, world) for _ in range(number)]
    write_lines(path, [json.dumps(pair) for pair in pairs])
    return sum(max(pair["label_p"], 1 - pair["label_p"]) for pair in pairs) / number


def taxonomy():
    """The edges of the whole tree, from the top down: [(child, parent)]."""
    return [(kind, "thing") for kind in TREE] + edges()


def event_facts():
    """What can happen, and what the hero does next with which probability."""
    events = []
    for (probability, sentence), reactions in zip(EVENT, NEXT):
        next_p = {reaction: p for p, reaction in reactions}
        events.append({"p": probability, "sentence": sentence, "next": next_p})
    return events


def write_world(cfg, folder):
    """Write every file of the world into `folder`, facts.json last. Returns the facts."""
    counts = {
        "train": 18_000,
        "val": 900,
        "preferences": 12_000,
        "preferences_val": 1000,
        "stories": 4800,
        "skills": 6400,
        "problems": 2400,
        "stories_val": 1000,
        "skills_val": 600,
        "problems_val": 600,
        "laboratory": 16_000,
        "laboratory_val": 1200,
    }
    counts = {name: max(1, round(number * cfg.scale)) for name, number in counts.items()}

    facts = {
        "changed": cfg.changed,  # shared.require refuses a world that has other settings
        "seed": cfg.seed,
        "tau": cfg.tau,
        "wrong": cfg.wrong,
        "p_kind": P_KIND,
        "p_brief": P_BRIEF,
        "held_out_share": held_out_share(),
        "held_out_problems": held_out_problems(),
        "briefs": BRIEFS,
        "counts": counts,
        "events": event_facts(),
        "vocabulary": VOCABULARY,
        "patterns": patterns(),
    }

    # The judge of the preferences already needs the patterns.
    write_text(folder / "facts.json", json.dumps(facts))

    write_documents(cfg, folder / "train.txt", counts["train"])
    entropy = write_documents(cfg, folder / "val.txt", counts["val"])

    path = folder / "instructions.jsonl"
    write_instructions(cfg, path, counts["stories"], counts["skills"], counts["problems"])
    path = folder / "instructions_val.jsonl"
    write_instructions(
        cfg, path, counts["stories_val"], counts["skills_val"], counts["problems_val"]
    )

    path = folder / "problems.jsonl"
    write_problems(cfg, path, counts["laboratory"], 4)
    path = folder / "problems_val.jsonl"
    write_problems(cfg, path, counts["laboratory_val"], 6)

    write_preferences(cfg, folder / "preferences.jsonl", counts["preferences"])
    path = folder / "preferences_val.jsonl"
    bayes_accuracy = write_preferences(cfg, path, counts["preferences_val"])

    write_lines(folder / "taxonomy.tsv", [f"{child}\t{parent}" for child, parent in taxonomy()])

    facts["true_nats_per_byte"] = entropy.all  # of val.txt
    facts["true_nats_per_byte_by_kind"] = entropy.by_kind
    facts["bayes_accuracy"] = bayes_accuracy  # of preferences_val.jsonl
    write_text(folder / "facts.json", json.dumps(facts, indent=1) + "\n")
    return facts


def replace_world(folder, out):
    """Move a finished world into `out`.

    Other scripts take a world as complete when its facts.json is there. So the old facts.json goes
    first and the new one comes last, and nobody reads half of a world.
    """
    out_facts = out / "facts.json"
    out_facts.unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name != "facts.json":
            path.replace(out / path.name)
    (folder / "facts.json").replace(out_facts)


if __name__ == "__main__":
    cfg = parse_args(Config)
    start = time()

    # A world with other settings goes to a folder of its own.
    if cfg.out:
        out = Path(cfg.out).expanduser().resolve()
    else:
        settings = [f"{key}={value}" for key, value in cfg.changed.items()]
        out = ROOT / "data" / ",".join(["stories", *settings])
    out.mkdir(parents=True, exist_ok=True)

    # An interrupted run must not leave a broken world, so all files are first written elsewhere.
    sweep(out.parent, ".prepare_data.*")
    with tempfile.TemporaryDirectory(prefix=".prepare_data.", dir=out.parent) as folder:
        facts = write_world(cfg, Path(folder))
        replace_world(Path(folder), out)

    documents = facts["counts"]["train"]
    entropy = facts["true_nats_per_byte"]
    print(f"{out}: {documents} documents and the other files in {time() - start:.1f} s")
    print(f"true entropy {entropy:.4f} nats per byte, Bayes accuracy {facts['bayes_accuracy']:.4f}")
