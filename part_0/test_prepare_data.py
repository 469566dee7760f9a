"""
Tests of prepare_data.py. What the world says of itself must be true: its entropy, the noise of its
labels, its checks and its splits.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import os
import re
import subprocess
from collections import Counter, defaultdict
from random import Random
from typing import NamedTuple

import pytest

import prepare_data
from shared import judge, parse_args

SCRIPT = Path(prepare_data.__file__)
FILES = [
    "train.txt",
    "val.txt",
    "instructions.jsonl",
    "instructions_val.jsonl",
    "problems.jsonl",
    "problems_val.jsonl",
    "preferences.jsonl",
    "preferences_val.jsonl",
    "taxonomy.tsv",
    "facts.json",
]


def make_world(folder, *options):
    """Write a world of a tenth of the usual size."""
    folder.mkdir()
    cfg = parse_args(prepare_data.Config, argv=["--scale=0.1", *options])
    prepare_data.write_world(cfg, folder)
    return folder


def read_records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_documents(path):
    return path.read_text().split("\n\n")


def read_taxonomy(folder):
    """[[child, parent], ...]"""
    lines = (folder / "taxonomy.tsv").read_text().splitlines()
    return [line.split("\t") for line in lines]


def split_sentences(text):
    return re.split(r"(?<=\.) ", text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world") / "stories")


@pytest.fixture(scope="module")
def facts(folder):
    return json.loads((folder / "facts.json").read_text())


def checks_of(folder, check, text):
    """{name: whether it holds}, with the sentence patterns of the world in this folder."""
    return judge({"check": {**check, "patterns": str(folder)}}, text).checks


# --------------------------------------------------------------------------------------------------
# The entropy


class Reading(NamedTuple):
    """One way to read a sentence by the patterns of facts.json."""

    stage: int
    values: dict  # {slot: word}


def readings_of(facts, sentence):
    readings = []
    for pattern in facts["patterns"]:
        match = re.fullmatch(pattern["regex"], sentence)
        if match:
            readings.append(Reading(pattern["stage"], match.groupdict()))
    return readings


def kind_of(text):
    """Is a document a story, a few statements, or a problem?"""
    if "Think step by step.\n" in text:
        return "problem"
    return "story" if re.search(r"\bnamed\b", text) else "statement"


def nats_from_text(facts, text):
    """-log p of a document, from its text and facts.json alone."""
    read = {"story": nats_of_story, "statement": nats_of_statements, "problem": nats_of_problem}
    kind = kind_of(text)
    return read[kind](facts, text) - math.log(facts["p_kind"][kind])


def nats_of_statements(facts, text):
    """Six statements, each one of 72 edges in one of four wordings."""
    statements = split_sentences(text)  # "What is a fox? It is a wild animal." is one
    assert len(statements) == 6, text
    return len(statements) * math.log(72 * 4)


# How a sentence of a problem changes the number: the sign, and the regex of the sentence.
CHANGES = [
    ("+", r"(?P<name>\w+) found (?P<n>\d+) more\."),
    ("+", r"(?P<other>\w+) gave (?P<name>\w+) (?P<n>\d+) more\."),
    ("-", r"(?P<name>\w+) lost (?P<n>\d+)\."),
    ("-", r"(?P<name>\w+) gave (?P<n>\d+) to (?P<other>\w+)\."),
    ("*", r"Then (?P<name>\w+) had (?P<n>twice) as many\."),
    ("+", r"(?P<next>\w+) had (?P<n>\d+) more than (?P<name>\w+)\."),
    ("-", r"(?P<next>\w+) had (?P<n>\d+) fewer than (?P<name>\w+)\."),
]
BEGINNING = r"(\w+) had (\d+) (\w+)\."


class Solved(NamedTuple):
    """A problem that was solved from its words."""

    steps: list
    nats: float  # -log p of the problem, given how many operations it has


def solve(text):
    """Reads a problem sentence by sentence, keeps the number, and counts what else could have been
    drawn at each point -> Solved."""
    *sentences, question = re.split(r"(?<=\.) ", text.removesuffix(" Think step by step."))
    name, value, things = re.fullmatch(BEGINNING, sentences[0]).groups()
    value = int(value)
    assert 2 <= value <= 20
    nats = math.log(20 * 16 * 19)  # who, what, and a number from 2 to 20
    names = 19  # people who are not in the problem yet

    steps = []
    distractors = 0
    for sentence in sentences[1:]:
        if re.fullmatch(BEGINNING, sentence):
            distractors += 1
            assert things not in sentence
            continue

        fitting = [(sign, re.fullmatch(regex, sentence)) for sign, regex in CHANGES]
        [(sign, match)] = [(sign, match) for sign, match in fitting if match]
        found = match.groupdict()
        assert found["name"] == name, text

        # From 1 to 99: three operations add, three take away, and one doubles.
        possible = 3 * (value < 99) + 3 * (value > 1) + (2 * value <= 99)
        nats += math.log(possible)
        if sign == "*":
            n, result = 2, 2 * value
        else:
            n = int(found["n"])
            result = value + n if sign == "+" else value - n
            nats += math.log(min(9, 99 - value if sign == "+" else value - 1))
        assert 1 <= result <= 99
        steps.append(f"{value}{sign}{n}={result}")
        value = result

        if found.get("other") or found.get("next"):
            nats += math.log(names)
            names -= 1
        name = found.get("next") or name

    if len(steps) >= 3:
        nats += math.log(2)
    if distractors:
        # Who, how many, what else, and after which sentence.
        nats += math.log(names * 19 * 15 * (len(steps) + 1))
    assert distractors <= (len(steps) >= 3), text
    assert question == f"How many {things} did {name} have in the end?"
    return Solved(steps, nats)


def nats_of_problem(facts, text):
    """A problem with one, two or three operations, and its solution, which is certain."""
    asked, solution = text.split("\n")
    solved = solve(asked)
    answer = solved.steps[-1].split("=")[1]
    assert solution == " ".join(step + "." for step in solved.steps) + f" The answer is {answer}."
    return solved.nats + math.log(3) + math.log(1 - facts["held_out_problems"])


def nats_of_story(facts, text):
    """-log p of a story."""
    vocabulary = facts["vocabulary"]
    nats = 0.0
    for slot in ("hero", "animal", "place", "colour", "thing", "ends"):
        nats += math.log(len(vocabulary[slot]))

    # Is there a brief, and of which level?
    if "\n" in text:
        brief, text = text.split("\n")
        level = 1
        if " and the " in brief:
            level = 2
        if " in " in brief:
            level = 3
        level_p, _ = facts["briefs"][level - 1]
        nats -= math.log(facts["p_brief"] * level_p / (1 - facts["held_out_share"]))
    else:
        nats -= math.log(1 - facts["p_brief"])

    # Every sentence must have exactly one reading, or else the text would have several.
    sentences = split_sentences(text)
    values = {}
    for stage, sentence in enumerate(sentences):
        readings = readings_of(facts, sentence)
        assert [reading.stage for reading in readings] == [stage], text
        values.update(readings[0].values)
    assert len(sentences) == 5, text

    # Which event and which reaction were drawn?
    template = text
    for slot in ("colour", "thing", "hero", "helper"):
        template = re.sub(rf"\b{values.get(slot)}\b", "{" + slot + "}", template)
    _, _, event_sentence, reaction, _ = split_sentences(template)
    for event in facts["events"]:
        if event["sentence"] == event_sentence:
            nats -= math.log(event["p"] * event["next"][reaction])

    # The three other stages have three sentences each, all with the same probability.
    nats += 3 * math.log(3)
    if "helper" in values:
        nats += math.log(len(vocabulary["helper"]))
    return nats


def test_text_alone_gives_back_the_probability(facts):
    rng = Random(1)
    kinds = Counter()
    for _ in range(400):
        document = prepare_data.document(rng)
        assert document.nats == pytest.approx(nats_from_text(facts, document.text), rel=1e-10)
        assert kind_of(document.text) == document.kind
        kinds[document.kind] += 1
    assert set(kinds) == set(prepare_data.P_KIND)


def test_entropy_of_val_is_what_facts_say(folder, facts):
    documents = read_documents(folder / "val.txt")
    nats = sum(nats_from_text(facts, document) for document in documents)
    size = len((folder / "val.txt").read_bytes())
    assert facts["true_nats_per_byte"] == pytest.approx(nats / size, rel=1e-9)

    for kind, entropy in facts["true_nats_per_byte_by_kind"].items():
        of_kind = [document for document in documents if kind_of(document) == kind]
        nats = sum(nats_from_text(facts, document) for document in of_kind)
        size = sum(len(document) for document in of_kind)
        assert entropy == pytest.approx(nats / size, rel=1e-9)


def entropy(*probabilities):
    return -sum(p * math.log(p) for p in probabilities)


def test_mean_nats_approach_the_entropy_by_hand(monkeypatch):
    by_hand = sum(math.log(n) for n in (20, 12, 12, 8, 16, 2))  # the slots
    by_hand += 3 * math.log(3)  # three stages with three sentences each

    # The events, and the reactions to each of them.
    by_hand += entropy(0.4, 0.3, 0.2, 0.1)
    by_hand += 0.4 * entropy(0.6, 0.3, 0.1)
    by_hand += 0.3 * entropy(0.5, 0.2, 0.3)
    by_hand += 0.2 * entropy(0.2, 0.2, 0.6)
    by_hand += 0.1 * entropy(0.7, 0.1, 0.2)

    # A helper is drawn if the event or the reaction mentions one.
    helper_p = 0.2 + 0.4 * 0.1 + 0.3 * 0.3 + 0.1 * 0.2
    by_hand += helper_p * math.log(6)

    # A brief, and its level. Here no brief is held out; the next test has the other case.
    by_hand += entropy(0.8, 0.2) + 0.8 * entropy(0.15, 0.25, 0.6)
    monkeypatch.setattr(prepare_data, "held_out", lambda *composition: False)
    monkeypatch.setattr(prepare_data, "held_out_share", lambda: 0.0)

    rng = Random(2)
    nats = [prepare_data.story_document(rng)[1] for _ in range(4000)]
    mean = sum(nats) / len(nats)
    standard_error = math.sqrt(sum((x - mean) ** 2 for x in nats)) / len(nats)
    assert abs(mean - by_hand) < 4 * standard_error


def test_share_of_briefs_that_are_held_out_is_exact():
    """Counted level by level, with the split itself as the only thing in common."""
    vocabulary = prepare_data.VOCABULARY
    held = []
    for animal in vocabulary["animal"]:
        for hero in vocabulary["hero"]:
            held.append(prepare_data.held_out(f"Write a story about a {animal} named {hero}.\n"))
    level_1 = sum(held) / len(held)

    # The two other levels have so many briefs that their shares are close to a tenth.
    level_2_and_3 = (prepare_data.held_out_share() - 0.15 * level_1) / 0.85
    assert level_2_and_3 == pytest.approx(0.1, abs=0.002)
    assert level_1 == pytest.approx(0.1, abs=0.06)


def test_probabilities_of_all_documents_add_up_to_one(monkeypatch):
    """A world so small that chance meets every document of it, with some briefs held out."""
    slots = {slot: values[:1] for slot, values in prepare_data.SLOTS.items()}
    slots["hero"] = ["Tom", "Mia", "Ben", "Sam"]
    monkeypatch.setattr(prepare_data, "SLOTS", slots)
    monkeypatch.setattr(prepare_data, "SLOT_NATS", math.log(4))
    monkeypatch.setattr(prepare_data, "OPENING", [(1.0, "{hero} found a {thing}.")])
    monkeypatch.setattr(prepare_data, "FINDING", [(1.0, "found.")])
    monkeypatch.setattr(prepare_data, "BRIEFS", [(0.3, "Of {hero}."), (0.7, "Of {hero} now.")])
    monkeypatch.setattr(prepare_data, "EVENT", [(0.25, "wind."), (0.75, "water.")])
    monkeypatch.setattr(prepare_data, "NEXT", [[(1.0, "ran.")], [(1.0, "swam.")]])
    monkeypatch.setattr(prepare_data, "ENDING", {"happy": [(1.0, "good.")]})
    monkeypatch.setattr(prepare_data, "END_IT", {"happy": " End it happily."})

    held = ["Of Tom.\n", "Of Mia.\n", "Of Ben now.\n"]
    monkeypatch.setattr(prepare_data, "held_out", lambda composition: composition in held)
    prepare_data.held_out_share.cache_clear()
    try:
        assert prepare_data.held_out_share() == pytest.approx(0.3 * 2 / 4 + 0.7 * 1 / 4)
        rng = Random(0)
        documents = dict(prepare_data.story_document(rng) for _ in range(3000))
    finally:
        prepare_data.held_out_share.cache_clear()

    assert len(documents) == 8 + 10  # without a brief, and with one of the five that remain
    assert sum(math.exp(-nats) for nats in documents.values()) == pytest.approx(1, rel=1e-9)
    assert not any(text.startswith(brief) for text in documents for brief in held)


def test_probabilities_of_all_short_problems_add_up_to_one(monkeypatch):
    """Few people, things and numbers: chance meets every problem of one or two operations."""
    slots = {**prepare_data.SLOTS, "hero": ["Tom", "Mia", "Ben"], "thing": ["plum", "ball"]}
    monkeypatch.setattr(prepare_data, "SLOTS", slots)
    monkeypatch.setattr(prepare_data, "FIRST_NUMBERS", [2, 3])
    monkeypatch.setattr(prepare_data, "LARGEST_DRAWN", 1)
    monkeypatch.setattr(prepare_data, "LARGEST", 4)
    monkeypatch.setattr(prepare_data, "MOST_OPERATIONS", 2)
    monkeypatch.setattr(prepare_data, "held_out", lambda sentence: "Tom had 2" in sentence)
    prepare_data.held_out_problems.cache_clear()
    try:
        assert prepare_data.held_out_problems() == pytest.approx(2 / 12)
        rng = Random(0)
        documents = dict(prepare_data.problem_document(rng) for _ in range(20_000))
    finally:
        prepare_data.held_out_problems.cache_clear()
    assert sum(math.exp(-nats) for nats in documents.values()) == pytest.approx(1, rel=1e-9)


def test_entropy_of_a_world_of_eight_documents(monkeypatch, tmp_path):
    """Three fair coins (how it ends, what happens, brief or not) are 3 log 2 nats per document."""
    slots = {slot: values[:1] for slot, values in prepare_data.SLOTS.items()}
    slots["ends"] = ["happy", "sad"]
    monkeypatch.setattr(prepare_data, "SLOTS", slots)
    monkeypatch.setattr(prepare_data, "SLOT_NATS", math.log(2))
    monkeypatch.setattr(prepare_data, "P_BRIEF", 0.5)

    monkeypatch.setattr(prepare_data, "OPENING", [(1.0, "{hero}.")])
    monkeypatch.setattr(prepare_data, "FINDING", [(1.0, "found.")])
    monkeypatch.setattr(prepare_data, "BRIEFS", [(1.0, "Write.")])
    monkeypatch.setattr(prepare_data, "held_out", lambda *composition: False)
    monkeypatch.setattr(prepare_data, "held_out_share", lambda: 0.0)
    monkeypatch.setattr(prepare_data, "EVENT", [(0.5, "wind."), (0.5, "water.")])
    monkeypatch.setattr(prepare_data, "NEXT", [[(1.0, "ran.")], [(1.0, "swam.")]])
    ending = {"happy": [(1.0, "good.")], "sad": [(1.0, "bad.")]}
    monkeypatch.setattr(prepare_data, "ENDING", ending)
    monkeypatch.setattr(prepare_data, "P_KIND", {"story": 1.0})

    cfg = parse_args(prepare_data.Config, argv=[])
    nats_per_byte = prepare_data.write_documents(cfg, tmp_path / "val.txt", 64).all
    assert len(set(read_documents(tmp_path / "val.txt"))) == 8
    size = len((tmp_path / "val.txt").read_bytes())
    assert nats_per_byte == pytest.approx(64 * 3 * math.log(2) / size, rel=1e-12)


def test_events_come_as_often_as_they_should(folder, facts):
    documents = read_documents(folder / "train.txt")
    stories = [text.split("\n")[-1] for text in documents if kind_of(text) == "story"]
    for event in facts["events"]:
        regex = re.sub(r"\{\w+\}", r"\\w+", event["sentence"])
        observed = sum(re.search(regex, story) is not None for story in stories)
        p = event["p"]
        standard_deviation = math.sqrt(len(stories) * p * (1 - p))
        assert abs(observed - len(stories) * p) < 4 * standard_deviation, event["sentence"]


# --------------------------------------------------------------------------------------------------
# The checks


def test_right_stories_pass_all_checks(folder):
    rng = Random(3)
    for _ in range(200):
        val = rng.random() < 0.5
        fixed, level = prepare_data.draw_brief(rng, val)
        text = prepare_data.demonstration(rng, fixed, level, 0)
        checks = checks_of(folder, prepare_data.story_check(fixed, level), text)
        assert all(checks.values()), (text, checks)


def test_stories_obey_the_brief_above_them(folder):
    regex = r"about a (\w+) named (\w+)(?: and the (\w+ \w+))?(?: in (\w+))?\. "
    for document in read_documents(folder / "train.txt"):
        if "\n" not in document or kind_of(document) != "story":
            continue
        brief, story = document.split("\n")
        must = [word for word in re.search(regex, brief).groups() if word]
        ends = "happy" if "happily" in brief else "sad"
        checks = checks_of(folder, {"must": must, "ends": ends}, story)
        assert all(checks.values()), document


def test_only_possible_reactions_pass(folder):
    """Of all pairs of an event and a reaction exactly those pass that the world can draw."""
    slots = {slot: values[0] for slot, values in prepare_data.VOCABULARY.items()}
    reactions = {sentence for options in prepare_data.NEXT for _, sentence in options}
    passed = 0
    for (_, event), options in zip(prepare_data.EVENT, prepare_data.NEXT):
        possible = [sentence for _, sentence in options]
        for reaction in reactions:
            stages = [prepare_data.OPENING[0][1], prepare_data.FINDING[0][1], event, reaction]
            stages.append(prepare_data.ENDING["happy"][0][1])
            checks = checks_of(folder, {}, " ".join(stages).format(**slots))
            assert checks["patterns"] == (reaction in possible), (event, reaction)
            passed += checks["patterns"]
    assert passed == 12 and len(reactions) == 7


FAILING_CHECK = {
    "wrong slot": "has:",
    "wrong ending": "ends",
    "other brief": "has:",
    "changes midway": "agree",
    "rambling": "patterns",
    "repeated": "no_repeat",
    "words missing": "patterns",
    "wrong order": "patterns",
    "salad": "patterns",
    "cut short": "patterns",
    "empty": "patterns",
}


@pytest.mark.parametrize("way", FAILING_CHECK)
def test_each_way_of_being_bad_fails_its_check(folder, way):
    rng = Random(way)
    not_noticed = 0
    for _ in range(100):
        fixed, level = prepare_data.draw_brief(rng, False)
        text = prepare_data.bad_answer(rng, fixed, level, way)
        checks = checks_of(folder, prepare_data.story_check(fixed, level), text)
        held = [holds for name, holds in checks.items() if name.startswith(FAILING_CHECK[way])]
        not_noticed += all(held)

    # Each word stays with probability 0.95, so sometimes all words of a story stay.
    allowed = 25 if way == "words missing" else 0
    assert not_noticed <= allowed


def test_every_way_of_being_bad_is_tested():
    assert set(FAILING_CHECK) == set(prepare_data.BAD)


def share_right(folder, name):
    """The share of stories that pass all their checks."""
    stories = [record for record in read_records(folder / name) if record["task"] == "story"]
    right = 0
    for record in stories:
        right += all(checks_of(folder, record["check"], record["output"]).values())
    return right / len(stories)


def test_demonstrations_leave_something_to_learn(folder):
    assert 0.2 < share_right(folder, "instructions.jsonl") < 0.45
    assert share_right(folder, "instructions_val.jsonl") == 1


def answer_to_question(question, story):
    """The answer to a "qa" exercise."""
    if question[0] == "Where":
        return re.search(r" (in \w+)\.", story)[1]
    if question[1] == "animal":
        return "a " + re.search(r"(?:^A|, a|was a) (\w+)", story)[1]
    return re.search(r"(?:found|saw|got) (the \w+ \w+)\.", story)[1]


def answer_to_skill(record, parents):
    """The right answer to an exercise, worked out from its words alone."""
    task = record["task"]
    question = re.findall(r"\w+", record["instruction"])
    words = re.findall(r"a (\w+)", record["input"])

    if task == "qa":
        return answer_to_question(question, record["input"])
    if task == "sum":
        return str(int(question[2]) + int(question[4]))
    if task == "count":
        if question[2] == "words":
            return str(len(words))
        return str(words.count(question[4]))
    if task == "reverse":
        return "a " + ", a ".join(reversed(words))
    if task == "sort":
        return "a " + ", a ".join(sorted(words))
    if task == "spell":
        return "-".join(question[-1])

    assert task == "is_a"
    child = next(word for word in question if word in parents)
    parent = parents[child]
    grandparent = parents[parent]
    answers = {
        1: article(parent),
        2: article(grandparent),
        3: f"{article(parent)}, and so {article(grandparent)}",
    }
    return answers[record["level"]]


def article(noun):
    """The noun with its article, unless it is a city."""
    if noun[0].isupper():
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def test_skills_are_answered_right(folder):
    parents = dict(read_taxonomy(folder))
    records = read_records(folder / "instructions.jsonl")
    records += read_records(folder / "instructions_val.jsonl")

    levels = defaultdict(set)
    for record in records:
        if record["task"] not in prepare_data.SKILLS:
            continue
        assert record["output"] == answer_to_skill(record, parents), record
        assert judge(record, record["output"]).passed, record
        levels[record["task"]].add(record["level"])

    assert levels == {task: {1, 2, 3} for task in prepare_data.SKILLS}


def test_statements_are_the_edges_of_the_tree_in_four_wordings(folder):
    """Every edge below the five kinds in every wording, and nothing else."""
    expected = set()
    for child, parent in read_taxonomy(folder):
        if parent == "thing":
            continue
        child, parent = article(child), article(parent)
        expected.add(f"{child[0].upper()}{child[1:]} is {parent}.")
        expected.add(f"Everybody knows that {child} is {parent}.")
        expected.add(f"We call {child} {parent}.")
        expected.add(f"What is {child}? It is {parent}.")
    assert len(expected) == 72 * 4

    said = Counter()
    for text in read_documents(folder / "train.txt"):
        if kind_of(text) == "statement":
            said.update(split_sentences(text))
    assert set(said) <= expected and len(said) > 250


def test_questions_about_the_taxonomy_use_other_words_than_the_text(folder):
    text = (folder / "train.txt").read_text()
    for record in read_records(folder / "instructions.jsonl"):
        if record["task"] == "is_a":
            assert record["instruction"] not in text
            if record["level"] == 2:
                child = record["instruction"].removesuffix("?").split(" thing is ")[-1]
                assert f"{child} is {record['output']}." not in text


def problems_of(folder, name):
    """The problems in a file of instructions."""
    records = read_records(folder / name)
    return [record for record in records if record["task"].startswith("problem")]


def test_problems_are_solved_right(folder):
    """Each problem is solved from its words. Its check has the steps and the number, and in
    validation the demonstration passes."""
    levels = defaultdict(set)
    for name in FILES[2:6]:
        for record in problems_of(folder, name):
            solved = solve(record["instruction"])
            assert record["level"] == len(solved.steps)
            levels[name].add(record["level"])
            assert record["check"]["number"] == solved.steps[-1].split("=")[1]

            in_steps = record["task"] == "problem"
            assert record["instruction"].endswith("Think step by step.") == in_steps
            assert record["check"].get("steps") == (solved.steps if in_steps else None)
            if name in ("instructions_val.jsonl", "problems_val.jsonl"):
                verdict = judge(record, record["output"])
                assert verdict.passed and (not in_steps or all(verdict.steps)), record

    assert levels["instructions.jsonl"] == levels["instructions_val.jsonl"] == {1, 2, 3}
    assert levels["problems.jsonl"] == set(range(1, 5))
    assert levels["problems_val.jsonl"] == set(range(1, 7)), "longer than any in training"


def test_a_quarter_of_the_problems_for_training_is_solved_wrong(folder):
    """In both files, so that reinforcement learning has something to improve."""
    for name in ("instructions.jsonl", "problems.jsonl"):
        records = problems_of(folder, name)
        wrong = 0
        for record in records:
            verdict = judge(record, record["output"])
            wrong += not verdict.passed
        # A wrong step leads to a wrong number, because the steps after it go on from there.
        standard_deviation = math.sqrt(0.25 * 0.75 * len(records))
        assert abs(wrong - 0.25 * len(records)) < 4 * standard_deviation, (name, wrong)


def test_a_quarter_of_the_flawed_problems_has_one_error():
    rng = Random(5)
    records = []
    for i in range(1000):
        records.append(prepare_data.problem_record(rng, False, 0.25, 1 + i % 6, True))
    wrong = [record for record in records if not all(judge(record, record["output"]).steps)]
    standard_deviation = math.sqrt(0.25 * 0.75 * len(records))
    assert abs(len(wrong) - 0.25 * len(records)) < 4 * standard_deviation

    for record in wrong:
        # One step is miscalculated, and the others go on from it.
        errors = 0
        value = None
        for step in record["output"].split(". The")[0].split(". "):
            left, result = step.split("=")
            errors += eval(left) != int(result)
            assert value in (None, re.split(r"[-+*]", left)[0])
            value = result
        assert errors == 1, record
        assert record["output"].endswith(f"The answer is {value}.")


def test_no_held_out_problem_is_in_the_pretraining_text(folder):
    """The first sentence decides: no problem of the text or of training begins like one of those
    for validation."""
    first = {"train": set(), "val": set()}
    for name in ("train.txt", "val.txt"):
        texts = [text for text in read_documents(folder / name) if kind_of(text) == "problem"]
        first["train"] |= {text.split(". ")[0] for text in texts}
    for name in FILES[2:6]:
        side = "val" if name.endswith("_val.jsonl") else "train"
        first[side] |= {r["instruction"].split(". ")[0] for r in problems_of(folder, name)}
    assert len(first["train"]) > 500 and len(first["val"]) > 100
    assert not first["train"] & first["val"]


def test_taxonomy_is_one_tree_of_four_levels(folder):
    edges = read_taxonomy(folder)
    parents = dict(edges)
    assert len(parents) == len(edges), "a node has two parents"

    def depth(node):
        if node == "thing":
            return 1
        return 1 + depth(parents[node])

    leaves = set(parents) - set(parents.values())
    assert {depth(leaf) for leaf in leaves} == {4}


# --------------------------------------------------------------------------------------------------
# The splits, the labels and the files


def compositions(records, key):
    """What the records ask for, without the ending."""
    return {record[key].split(" End it ")[0] + "\n" + record.get("input", "") for record in records}


def test_no_composition_is_in_train_and_val(folder):
    def both(suffix):
        instructions = read_records(folder / f"instructions{suffix}.jsonl")
        preferences = read_records(folder / f"preferences{suffix}.jsonl")
        return compositions(instructions, "instruction") | compositions(preferences, "prompt")

    train = both("")
    val = both("_val")
    assert train and val and not train & val


def test_no_held_out_brief_is_in_the_pretraining_text(folder):
    briefs = set()
    for name in ("train.txt", "val.txt"):
        for document in read_documents(folder / name):
            if "\n" in document and kind_of(document) == "story":
                briefs.add(document.split("\n")[0].split(" End it ")[0])
    assert len(briefs) > 500
    assert not any(prepare_data.held_out(brief + "\n") for brief in briefs)

    for name in ("instructions_val.jsonl", "preferences_val.jsonl"):
        for record in read_records(folder / name):
            asked = record.get("instruction", record.get("prompt"))
            assert asked.split(" End it ")[0] not in briefs


def test_fewer_than_500_words(folder):
    texts = [(folder / name).read_text() for name in ("train.txt", "val.txt")]
    for name in ("instructions", "instructions_val", "preferences", "preferences_val"):
        for record in read_records(folder / f"{name}.jsonl"):
            for key in ("instruction", "input", "output", "prompt", "chosen", "rejected"):
                texts.append(record.get(key, ""))

    text = " ".join(texts)
    assert text.isascii()
    assert len(set(re.findall(r"[A-Za-z]+|\d+", text))) < 500


def test_labels_are_as_noisy_as_they_say(folder, facts):
    pairs = read_records(folder / "preferences.jsonl")
    for pair in pairs:
        chosen_checks = checks_of(folder, pair["check"], pair["chosen"])
        rejected_checks = checks_of(folder, pair["check"], pair["rejected"])
        gap = sum(chosen_checks.values()) - sum(rejected_checks.values())
        assert pair["gap"] == gap != 0
        label_p = 1 / (1 + math.exp(-gap / facts["tau"]))
        assert pair["label_p"] == pytest.approx(label_p, abs=1e-12)

    # A label is right if the better answer was chosen.
    right_p = [max(pair["label_p"], 1 - pair["label_p"]) for pair in pairs]
    right = sum(pair["gap"] > 0 for pair in pairs)
    assert right < len(pairs)
    standard_deviation = math.sqrt(sum(p * (1 - p) for p in right_p))
    assert abs(right - sum(right_p)) < 4 * standard_deviation


def test_bayes_accuracy(folder, facts):
    pairs = read_records(folder / "preferences_val.jsonl")
    right_p = [max(pair["label_p"], 1 - pair["label_p"]) for pair in pairs]
    assert facts["bayes_accuracy"] == pytest.approx(sum(right_p) / len(right_p))


def test_a_judge_with_a_tiny_tau_makes_no_errors(folder):
    rng = Random(4)
    for _ in range(50):
        pair = prepare_data.preference(rng, False, 0.25, 1e-4, str(folder))
        assert pair["gap"] > 0 and pair["label_p"] == 1


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    again = make_world(tmp_path / "again")
    other = make_world(tmp_path / "other", "--seed=1")
    for name in FILES:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name
        if name != "taxonomy.tsv":  # the tree is the same in every world
            assert (folder / name).read_bytes() != (other / name).read_bytes(), name


def run_script(cwd, *options):
    environment = {**os.environ, "PYTHONHASHSEED": "7"}  # the order of sets must not matter
    command = [sys.executable, SCRIPT, *options]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_script_writes_where_it_is_told(folder, tmp_path):
    out = tmp_path / "world"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    done = run_script(tmp_path, "--scale=0.1", "--out=world")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {"mine.txt", *FILES}
    assert [path.name for path in tmp_path.iterdir()] == ["world"], "a temporary folder is left"
    for name in FILES:
        # facts.json names the changed options, and --out is not one of them.
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("a file")
    done = run_script(tmp_path, "--out=taken")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("option", ["--tau=0", "--wrong=2", "--scale=0", "--sede=1"])
def test_a_wrong_option_is_one_line(capsys, option):
    with pytest.raises(SystemExit) as stopped:
        parse_args(prepare_data.Config, argv=[option])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
