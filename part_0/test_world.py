"""The world of prepare_data.py: what it says of itself (entropy, label noise, checks, splits) is true."""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import os
import re
import subprocess
from collections import Counter, defaultdict
from random import Random

import pytest

import prepare_data as world
from shared import cli, judge

SCRIPT = Path(world.__file__)
FILES = ["train.txt", "val.txt", "instructions.jsonl", "instructions_val.jsonl", "preferences.jsonl",
         "preferences_val.jsonl", "taxonomy.tsv", "facts.json"]


def make(folder, *options):
    folder.mkdir()
    world.write_world(cli(world.Config(), argv=["--scale=0.1", *options]), folder)
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("world") / "stories")


@pytest.fixture(scope="module")
def facts(folder):
    return json.loads((folder / "facts.json").read_text())


def checks_of(folder, check, text):
    return judge({"check": {**check, "patterns": str(folder)}}, text)[0]


def matches(facts, sentence):
    """All (stage, values, end) that fit a sentence."""
    found = [(p["stage"], re.fullmatch(p["regex"], sentence), p["end"]) for p in facts["patterns"]]
    return [(stage, m.groupdict(), end) for stage, m, end in found if m]


# ---------------------------------------------------------------------------------------------------------------------
# the entropy

def nats_from_text(facts, text):
    """-log p of a document from its text and facts.json alone; every sentence must have exactly one reading."""
    nats = sum(math.log(len(facts["vocabulary"][k])) for k in ("hero", "animal", "place", "colour", "thing", "ends"))
    if "\n" in text:
        given, text = text.split("\n")
        level = 3 if " in " in given else 2 if " and the " in given else 1
        nats -= math.log(facts["p_brief"] * facts["briefs"][level - 1][0])
    else:
        nats -= math.log(1 - facts["p_brief"])
    readings = [matches(facts, sentence) for sentence in re.split(r"(?<=\.) ", text)]
    assert all(len(reading) == 1 for reading in readings), text
    assert [reading[0][0] for reading in readings] == [0, 1, 2, 3, 4], text
    values = {k: v for reading in readings for k, v in reading[0][1].items()}
    plain = text
    for slot in ("colour", "thing", "hero", "helper"):
        plain = re.sub(rf"\b{values.get(slot)}\b", "{" + slot + "}", plain)
    _, _, happened, after, _ = re.split(r"(?<=\.) ", plain)
    event = next(event for event in facts["events"] if event["sentence"] == happened)
    nats -= math.log(event["p"] * event["next"][after])
    return nats + 3 * math.log(3) + math.log(len(facts["vocabulary"]["helper"])) * ("helper" in values)


def test_text_alone_gives_back_the_probability(facts):
    rng = Random(1)
    for _ in range(200):
        text, nats = world.document(rng)
        assert nats == pytest.approx(nats_from_text(facts, text), abs=1e-9)


def test_entropy_of_val_is_what_facts_say(folder, facts):
    text = (folder / "val.txt").read_bytes()
    nats = sum(nats_from_text(facts, document) for document in text.decode().split("\n\n"))
    assert facts["true_nats_per_byte"] == pytest.approx(nats / len(text), rel=1e-9)


def test_mean_nats_approach_the_entropy_by_hand():
    def entropy(*p):
        return -sum(x * math.log(x) for x in p)

    hand = sum(math.log(n) for n in (20, 12, 12, 8, 16, 2)) + 3 * math.log(3)  # slots, three paraphrases
    hand += entropy(.4, .3, .2, .1)
    hand += .4 * entropy(.6, .3, .1) + .3 * entropy(.5, .2, .3) + .2 * entropy(.2, .2, .6) + .1 * entropy(.7, .1, .2)
    hand += (.2 + .4 * .1 + .3 * .3 + .1 * .2) * math.log(6)  # a helper
    hand += entropy(.8, .2) + .8 * entropy(.15, .25, .6)
    rng = Random(2)
    nats = [world.document(rng)[1] for _ in range(4000)]
    mean = sum(nats) / len(nats)
    spread = math.sqrt(sum((x - mean) ** 2 for x in nats)) / len(nats)
    assert abs(mean - hand) < 4 * spread


def test_entropy_of_a_world_of_eight_documents(monkeypatch, tmp_path):
    """Three fair coins (how it ends, what happens, brief or not) are 3 log 2 per document, whatever the text."""
    monkeypatch.setattr(world, "SLOTS", {**{k: v[:1] for k, v in world.SLOTS.items()}, "ends": ["happy", "sad"]})
    monkeypatch.setattr(world, "SLOT_NATS", math.log(2))
    monkeypatch.setattr(world, "P_BRIEF", 0.5)
    for name, options in {"OPENING": ["{hero}."], "FINDING": ["found."], "BRIEFS": ["Write."]}.items():
        monkeypatch.setattr(world, name, [(1.0, option) for option in options])
    monkeypatch.setattr(world, "EVENT", [(0.5, "wind."), (0.5, "water.")])
    monkeypatch.setattr(world, "NEXT", [[(1.0, "ran.")], [(1.0, "swam.")]])
    monkeypatch.setattr(world, "ENDING", {"happy": [(1.0, "good.")], "sad": [(1.0, "bad.")]})
    cfg = cli(world.Config(), argv=[])
    entropy = world.write_stories(cfg, tmp_path / "val.txt", 64)
    text = (tmp_path / "val.txt").read_text()
    assert len(set(text.split("\n\n"))) == 8
    assert entropy == pytest.approx(64 * 3 * math.log(2) / len(text), rel=1e-12)


def test_events_come_as_often_as_they_should(folder, facts):
    stories = [document.split("\n")[-1] for document in (folder / "train.txt").read_text().split("\n\n")]
    for event in facts["events"]:
        regex = re.sub(r"\{\w+\}", r"\\w+", event["sentence"])
        n, p = sum(bool(re.search(regex, story)) for story in stories), event["p"]
        assert abs(n - len(stories) * p) < 4 * math.sqrt(len(stories) * p * (1 - p)), event["sentence"]


# ---------------------------------------------------------------------------------------------------------------------
# the checks

def test_gold_stories_pass(folder):
    rng = Random(3)
    for _ in range(200):
        fixed, level = world.draw_brief(rng, rng.random() < 0.5)
        text = world.demonstration(rng, fixed, level, 0)
        checks = checks_of(folder, world.story_check(fixed, level), text)
        assert all(checks.values()), (text, checks)


def test_stories_obey_the_brief_above_them(folder):
    for document in (folder / "train.txt").read_text().split("\n\n"):
        if "\n" in document:
            given, story = document.split("\n")
            words = re.findall(r"about a (\w+) named (\w+)(?: and the (\w+ \w+))?(?: in (\w+))?\. ", given)[0]
            check = {"must": [w for w in words if w], "ends": "happy" if "happily" in given else "sad"}
            assert all(checks_of(folder, check, story).values()), document


@pytest.mark.parametrize("way, fails", {
    "wrong slot": "has:", "wrong ending": "ends", "other brief": "has:", "changes midway": "agree",
    "rambling": "patterns", "repeated": "no_repeat", "wrong order": "patterns", "salad": "patterns",
    "cut short": "patterns", "empty": "patterns", "words missing": "patterns",
}.items())
def test_each_way_of_being_bad_fails_its_check(folder, way, fails):
    rng, spared = Random(way), 0
    for _ in range(100):
        fixed, level = world.draw_brief(rng, False)
        text = world.bad_answer(rng, fixed, level, way)
        checks = checks_of(folder, world.story_check(fixed, level), text)
        spared += all(held for name, held in checks.items() if name.startswith(fails))
    assert spared <= (25 if way == "words missing" else 0)  # each word stays with probability .95: sometimes all do


def test_every_way_of_being_bad_is_tested():
    marks = test_each_way_of_being_bad_fails_its_check.pytestmark[0].args[1]
    assert {way for way, _ in marks} == set(world.BAD)


def test_demonstrations_leave_something_to_learn(folder):
    records = [r for r in read(folder / "instructions.jsonl") if r["task"] == "story"]
    share = sum(all(checks_of(folder, r["check"], r["output"]).values()) for r in records) / len(records)
    assert 0.2 < share < 0.45
    gold = [r for r in read(folder / "instructions_val.jsonl") if r["task"] == "story"]
    assert all(all(checks_of(folder, r["check"], r["output"]).values()) for r in gold)


def right_answer(record, parents):
    """The answer to a skill, worked out from its words alone."""
    task, words = record["task"], re.findall(r"a (\w+)", record["input"])
    asked = re.findall(r"\w+", record["instruction"])
    if task == "sum":
        return str(int(asked[2]) + int(asked[4]))
    if task == "count":
        return str(len(words) if asked[2] == "words" else words.count(asked[4]))
    if task == "reverse":
        return "a " + ", a ".join(reversed(words))
    if task == "sort":
        return "a " + ", a ".join(sorted(words))
    if task == "spell":
        return "-".join(asked[-1])
    if task == "is_a":
        ancestors, node = [], asked[2]
        while node in parents:
            node = parents[node]
            ancestors.append(node)
        return "yes" if asked[-1] in ancestors else "no"
    regex = {"Where": r" (in \w+)\.", "What": r"(?:found|saw|got) (the \w+ \w+)\."}[asked[0]]
    return re.search(r"(?:^A|, a|was a) (\w+)" if asked[1] == "animal" else regex, record["input"])[1]


def test_skills_are_answered_right(folder):
    parents = dict(line.split("\t") for line in (folder / "taxonomy.tsv").read_text().splitlines())
    seen, said = defaultdict(set), Counter()
    for record in read(folder / "instructions.jsonl") + read(folder / "instructions_val.jsonl"):
        if record["task"] != "story":
            animal = "animal" in record["instruction"] and record["task"] == "qa"
            assert record["output"] == "a " * animal + right_answer(record, parents), record
            assert judge(record, record["output"])[2]
            seen[record["task"]].add(record["level"])
            said[record["output"]] += record["task"] == "is_a"
    assert seen == {task: {1, 2, 3} for task in world.SKILLS}
    assert 0.35 < said["yes"] / (said["yes"] + said["no"]) < 0.65


def test_taxonomy_is_one_tree_of_four_levels(folder):
    edges = [line.split("\t") for line in (folder / "taxonomy.tsv").read_text().splitlines()]
    parents = dict(edges)
    assert len(parents) == len(edges)

    def depth(node):
        return 1 if node == "thing" else 1 + depth(parents[node])

    assert {depth(node) for node in parents if node not in parents.values()} == {4}


# ---------------------------------------------------------------------------------------------------------------------
# the splits, the labels, the files

def test_no_composition_is_in_train_and_val(folder):
    def compositions(name, key):
        return {r[key].split(" End it ")[0] + "\n" + r.get("input", "") for r in read(folder / name)}

    train = compositions("instructions.jsonl", "instruction") | compositions("preferences.jsonl", "prompt")
    val = compositions("instructions_val.jsonl", "instruction") | compositions("preferences_val.jsonl", "prompt")
    assert train and val and not train & val


def test_fewer_than_500_words(folder):
    text = " ".join((folder / name).read_text() for name in FILES[:2])
    for name in FILES[2:6]:
        keys = ("instruction", "input", "output", "prompt", "chosen", "rejected")
        text += " ".join(r.get(key, "") + " " for r in read(folder / name) for key in keys)
    assert text.isascii()
    assert len(set(re.findall(r"[A-Za-z]+|\d+", text))) < 500


def test_labels_are_as_noisy_as_they_say(folder, facts):
    pairs = read(folder / "preferences.jsonl")
    for pair in pairs:
        r_chosen, r_rejected = (sum(checks_of(folder, pair["check"], pair[k]).values()) for k in ("chosen", "rejected"))
        assert pair["gap"] == r_chosen - r_rejected != 0
        assert pair["label_p"] == pytest.approx(1 / (1 + math.exp(-pair["gap"] / facts["tau"])), abs=1e-12)
    right = [max(pair["label_p"], 1 - pair["label_p"]) for pair in pairs]
    agreed = sum(pair["gap"] > 0 for pair in pairs)
    assert agreed < len(pairs)
    assert abs(agreed - sum(right)) < 4 * math.sqrt(sum(p * (1 - p) for p in right))


def test_bayes_accuracy(folder, facts):
    p = [pair["label_p"] for pair in read(folder / "preferences_val.jsonl")]
    assert facts["bayes_accuracy"] == pytest.approx(sum(max(x, 1 - x) for x in p) / len(p))


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    again, other = make(tmp_path / "again"), make(tmp_path / "other", "--seed=1")
    for name in FILES:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name
        assert (folder / name).read_bytes() != (other / name).read_bytes() or name == "taxonomy.tsv", name


def script(where, *options):
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    return subprocess.run([sys.executable, SCRIPT, *options], cwd=where, env=env, capture_output=True, text=True)


def test_the_script_writes_where_it_is_told(folder, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "mine.txt").write_text("keep")
    ran = script(tmp_path, "--scale=0.1", "--out=w")
    assert ran.returncode == 0, ran.stderr
    assert {path.name for path in (tmp_path / "w").iterdir()} == {"mine.txt", *FILES}
    assert [path.name for path in tmp_path.iterdir()] == ["w"]  # no temporary folder is left
    for name in FILES:
        assert (tmp_path / "w" / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("a file")
    ran = script(tmp_path, "--out=taken")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--tau=0", "--wrong=2", "--scale=0", "--sede=1"])
def test_a_wrong_option_is_one_line(capsys, option):
    with pytest.raises(SystemExit) as stopped:
        cli(world.Config(), argv=[option])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
