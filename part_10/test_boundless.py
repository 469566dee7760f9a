"""
Tests of boundless.py and demo_boundless.py. The learner and the encoder are compared with slow ones
that are written in another way: they keep every word of the text, count everything afresh at every
step, and know nothing of the two phases.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import io
import json
import math
import os
import random
import subprocess
import time
import unicodedata

import numpy as np
import pytest
import tiktoken
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import boundless
import demo_boundless
from boundless import PATTERN, SPECIAL, Tokenizer, learn, runs_of, split
from model import GPT, GPTConfig
from shared import load_checkpoint, parse_args

FOLDER = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SYLLABLES = ["ba", "ko", "mi", "ra", "lu", "ten", "sha", "é", "ß", "語", "ый"]

# Plain BPE, BoundlessBPE, and deletions that come rarely and often.
SETTINGS = [
    {"supermerges": False},
    {},
    {"delete_at": 0.9},
    {"delete_at": 0.5},
    {"supermerges": False, "delete_at": 0.5},
]


def make_text(n_words, seed=0, vocabulary=60):
    """n_words words, a few of them very often (Zipf). Mostly blanks stand between them, so that
    phrases occur again and again."""
    rng = random.Random(seed)
    words = ["I", "a", "of", "the"]
    for _ in range(vocabulary):
        words.append("".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))))
    weights = [1 / (i + 1) for i in range(len(words))]
    between = [" "] * 20 + [", ", ".\n", "'s ", "'st ", " 17 ", "\n\n", "  ", "_", "-"]
    chosen = rng.choices(words, weights, k=n_words)
    return "".join(word + rng.choice(between) for word in chosen)


def make_repetitions(n_words, seed):
    """Words of the letters a and b, and only a few of them: here pairs overlap on both levels."""
    rng = random.Random(seed)
    words = ["a", "aa", "aab", "aaaa", "baa"]
    chosen = rng.choices(words, [8, 4, 2, 1, 1], k=n_words)
    return "".join(word + rng.choice([" "] * 15 + [".\n"]) for word in chosen)


def random_strings(n, seed):
    """Words, blanks, digits, scripts, emoji, combining marks, the names of special tokens, and code
    points from anywhere."""
    rng = random.Random(seed)
    anywhere = []
    for code in range(0x30000):
        if unicodedata.category(chr(code)) not in ("Cn", "Cs"):
            anywhere.append(chr(code))
    pools = [
        ["the", " of", " the", " a", "I", "don't", "WE'LL", "'S", "know'st", "_x_", "aaaaaa"],
        [" bako", " mira", " lu", "ten", " of the", " the a of"],
        [" ", "  ", "\n", "\r\n", "\t", " \n ", "\u00a0", "\u2028", "\u3000", "\x1c"],
        ["0", "7", "12345", " 2026", "٣", "½", "3.14"],
        ["語", "文文", " 漢字", "한국어", " привет", "عربي", "ไทย", "हिन्दी"],
        ["🦊", "👩‍👩‍👧", "🇩🇪", "\ufeff", "\u200d", "e\u0301", "\u0301", " o\u2019er"],
        [*SPECIAL, "<|", "!!!", "...\n", "$%&", "\x00"],
        anywhere,
    ]
    strings = []
    for _ in range(n):
        pieces = [rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 10))]
        strings.append("".join(pieces))
    return strings


# the slow ones ------------------------------------------------------------------------------------


def may_join(pretoken):
    """The rule of JOINABLE without a regular expression."""
    has_letter = False
    after_letter = False
    for character in pretoken:
        category = unicodedata.category(character)
        if category[0] == "L":
            has_letter = after_letter = True
        elif category[0] == "M":
            if not after_letter:
                return False
        elif character in " _'\u2019":
            after_letter = False
        else:
            return False
    return has_letter


def count_pairs(lists):
    """{pair: how often}. A pair that overlaps the one counted before it, as in a a a, does not
    count."""
    counts = {}
    for items in lists:
        counted_at = -2
        for i in range(len(items) - 1):
            if counted_at == i - 1 and items[i - 1] == items[i] == items[i + 1]:
                continue
            pair = (items[i], items[i + 1])
            counts[pair] = counts.get(pair, 0) + 1
            counted_at = i
    return counts


def best_of(counts):
    """(count, pair): the most frequent pair, and of equals the first by its bytes. (0, None) if
    none occurs twice."""
    counts = {pair: count for pair, count in counts.items() if count > 1}
    if not counts:
        return 0, None
    most = max(counts.values())
    return most, min(pair for pair, count in counts.items() if count == most)


def join(items, pair):
    """In place: every occurrence of the pair becomes one item, from left to right."""
    i = 0
    while i + 1 < len(items):
        if (items[i], items[i + 1]) == pair:
            items[i : i + 2] = [pair[0] + pair[1]]
        i += 1


def break_up(items, token):
    """In place: every occurrence of the token becomes its bytes."""
    for i in reversed(range(len(items))):
        if items[i] == token:
            items[i : i + 1] = [bytes([b]) for b in token]


def slow_learn(text, size, supermerges=True, delete_at=0.0):
    """The algorithm as the paper tells it -> the events, and the text as tokens at the end."""
    words = {}  # pre-token -> its tokens now
    occurring = []  # the tokens of every pre-token of the text; equal pre-tokens share a list
    runs = [[]]
    order = []  # the runs, and the pre-tokens that belong to none
    for pretoken in split(text):
        data = pretoken.encode()
        words.setdefault(data, [bytes([b]) for b in data])
        occurring.append(words[data])
        if not may_join(pretoken):
            runs.append([])
            order.append(data)
        else:
            if not runs[-1]:
                order.append(runs[-1])
            runs[-1].append(data)

    vocabulary = [bytes([i]) for i in range(256)]
    superwords = set()
    events = []
    while len(vocabulary) < size:
        word_counts = count_pairs(occurring)
        tokens = [token for word in occurring for token in word]
        allowed = {p: n for p, n in word_counts.items() if p[0] + p[1] not in vocabulary}
        word_count, word_pair = best_of(allowed)

        single = {data for data, word in words.items() if len(word) == 1} | superwords
        allowed = {}
        for pair, count in count_pairs(runs).items():
            is_new = pair[0] + pair[1] not in vocabulary
            if supermerges and is_new and pair[0] in single and pair[1] in single:
                allowed[pair] = count
        super_count, super_pair = best_of(allowed)

        if word_pair is None and super_pair is None:
            break
        if super_count >= word_count:
            events.append(("supermerge", *super_pair))
            vocabulary.append(super_pair[0] + super_pair[1])
            superwords.add(super_pair[0] + super_pair[1])
            for run in runs:
                join(run, super_pair)
            continue

        events.append(("merge", *word_pair))
        vocabulary.append(word_pair[0] + word_pair[1])
        for word in words.values():
            join(word, word_pair)
        for part in dict.fromkeys(word_pair):
            share = word_count / tokens.count(part)
            if delete_at and len(part) > 1 and share >= delete_at:
                events.append(("delete", part, b""))
                vocabulary.remove(part)
                for word in words.values():
                    break_up(word, part)

    final = []
    for item in order:
        for data in item if isinstance(item, list) else [item]:
            final.extend([data] if data in superwords else words[data])
    return events, final


def slow_encode(events, text):
    """Every event in its order, on the whole text -> its tokens. A chunk is a pre-token or a
    superword; a supermerge needs two neighbouring chunks that are one token each at its time."""
    chunks = []
    for pretoken in split(text):
        tokens = [bytes([b]) for b in pretoken.encode()]
        chunks.append({"tokens": tokens, "joins": may_join(pretoken), "is_super": False})

    for kind, left, right in events:
        if kind != "supermerge":
            for chunk in chunks:
                if chunk["is_super"]:
                    continue
                if kind == "merge":
                    join(chunk["tokens"], (left, right))
                else:
                    break_up(chunk["tokens"], left)
            continue
        i = 0
        while i + 1 < len(chunks):
            a, b = chunks[i], chunks[i + 1]
            if a["tokens"] == [left] and b["tokens"] == [right] and a["joins"] and b["joins"]:
                both = {"tokens": [left + right], "joins": True, "is_super": True}
                chunks[i : i + 2] = [both]
            i += 1
    return [token for chunk in chunks for token in chunk["tokens"]]


def tokens_of(tok, text):
    return [tok.token_bytes(i) for i in tok.encode(text)]


@pytest.fixture(scope="module")
def text():
    return make_text(6000, seed=1, vocabulary=400)


@pytest.fixture(scope="module", params=[{}, {"delete_at": 0.7}], ids=["kept", "deleted"])
def tok(request, text):
    return Tokenizer.train(text, 900, **request.param)


# pieces -------------------------------------------------------------------------------------------


def test_the_examples_of_the_docstrings():
    assert split("Hello world's 2026") == ["Hello", " world", "'s", " ", "2", "0", "2", "6"]
    runs = runs_of(["the", " king", ",", " my", " lord"])
    assert runs == [[b"the", b" king"], [b","], [b" my", b" lord"]]
    assert boundless.pairs(list("abab")) == [("a", "b"), ("b", "a"), ("a", "b")]
    assert boundless.pairs(list("aaa")) == [("a", "a")]
    assert boundless.merge([b"a", b"a", b"a", b"b"], (b"a", b"a")) == [b"aa", b"a", b"b"]
    assert boundless.shatter([b"x", b"abc"], b"abc") == [b"x", b"a", b"b", b"c"]
    assert [boundless.first_after([2, 5], now) for now in (-1, 2, 4, 5)] == [2, 5, 5, None]


def test_which_pretokens_may_join():
    for string in random_strings(3000, seed=3):
        for pretoken in split(string):
            assert (boundless.JOINABLE.fullmatch(pretoken) is not None) == may_join(pretoken)
    assert may_join("I") and may_join(" o\u2019") and may_join("_x")
    assert not may_join(" ") and not may_join("7") and not may_join(".") and not may_join(" -x")


def test_runs_hold_the_whole_text_and_have_a_largest_length():
    strings = [*random_strings(300, seed=4), "word " * 1000]
    for string in strings:
        runs = runs_of(split(string))
        assert b"".join(b"".join(run) for run in runs).decode() == string
        assert max((len(run) for run in runs), default=0) <= boundless.MAX_RUN
    assert len(runs[0]) == boundless.MAX_RUN


# learning -----------------------------------------------------------------------------------------


def test_a_text_by_hand():
    """Every pair occurs six times, so bytes decide between merges, and supermerges go first."""
    text = "x" + ".\nx ab cd" * 6
    learned = learn(text, 262)
    assert [tuple(event) for event in learned] == [
        ("merge", b" ", b"a"),
        ("merge", b" ", b"c"),
        ("merge", b" a", b"b"),
        ("supermerge", b"x", b" ab"),
        ("merge", b" c", b"d"),
        ("supermerge", b"x ab", b" cd"),
    ]
    assert tokens_of(Tokenizer(learned), " ab cd") == [b" ab", b" cd"]
    assert tokens_of(Tokenizer(learned), "xx ab cd") == [b"x", b"x", b" ab", b" cd"]


def test_a_tie_goes_to_the_supermerge():
    """ "I" and " I" stand side by side three times, and so do z and y."""
    events = learn("I I\nI I\nI I\nzy\nzy\nzy", 259)
    assert events == [
        ("merge", b" ", b"I"),
        ("supermerge", b"I", b" I"),
        ("merge", b"z", b"y"),
    ]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_the_learner_equals_the_slow_one(settings, seed):
    text = make_text(400, seed)
    slow, final = slow_learn(text, 420, **settings)
    events = learn(text, 420, **settings)
    assert [tuple(event) for event in events] == slow
    assert tokens_of(Tokenizer(events), text) == final

    kinds = {event.kind for event in events}
    assert ("supermerge" in kinds) == settings.get("supermerges", True)
    assert ("delete" in kinds) == ("delete_at" in settings)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_the_learner_equals_the_slow_one_where_pairs_overlap(settings, seed):
    text = make_repetitions(150, seed)
    slow, final = slow_learn(text, 10_000, **settings)
    events = learn(text, 10_000, **settings)
    assert [tuple(event) for event in events] == slow
    assert tokens_of(Tokenizer(events), text) == final


def test_a_deletion_by_hand():
    """ab occurs ten times, and abc takes nine of them: a share of 0.9."""
    text = "abc\n" * 9 + "abd"
    kept = learn(text, 10_000, delete_at=0.91)
    assert [tuple(event) for event in kept] == [("merge", b"a", b"b"), ("merge", b"ab", b"c")]
    events = learn(text, 10_000, delete_at=0.9)
    assert events == [*kept, ("delete", b"ab", b"")]
    tok = Tokenizer(events)
    assert b"ab" not in tok.ranks
    assert tok.vocab_size == 257 + len(SPECIAL)
    assert tokens_of(tok, "abd") == [b"a", b"b", b"d"]
    assert tokens_of(tok, "abc") == [b"abc"]


def test_a_deleted_word_has_to_wait_again():
    """ab is one token and could join k. Then abc deletes it, and it has to be made again first."""
    text = "abc\n" * 6 + "ab k\n" * 3
    slow, final = slow_learn(text, 10_000, delete_at=0.5)
    events = learn(text, 10_000, delete_at=0.5)
    assert [tuple(event) for event in events] == slow
    assert tokens_of(Tokenizer(events), text) == final
    assert events.index(("delete", b"ab", b"")) < events.index(("supermerge", b"ab", b" k"))
    assert events.count(("merge", b"a", b"b")) == 2


def test_a_word_whose_bytes_are_a_token_elsewhere_may_itself_be_two():
    """In xabc, a and bc become abc after xa was deleted. The word abc is then ab and c, and because
    the token exists these two are not merged. So this word must not join k."""
    words = {"xabc": 2, "xay": 12, "xaz": 11, "abc k": 2, "abd": 3, "abe": 3, "abf": 3, "abg": 2}
    words |= {"abh": 2, "bcd": 3, "bce": 3, "bcf": 2, "bcg": 2}
    text = "".join((word + "\n") * count for word, count in words.items())
    slow, final = slow_learn(text, 10_000, delete_at=0.5)
    events = learn(text, 10_000, delete_at=0.5)
    assert [tuple(event) for event in events] == slow
    assert tokens_of(Tokenizer(events), text) == final

    # Later xabc deletes abc. Stop before that.
    tok = Tokenizer(events[: events.index(("merge", b"a", b"bc")) + 1])
    assert b"abc" in tok.ranks and b" k" in tok.ranks
    assert tokens_of(tok, "abc k") == [b"ab", b"c", b" k"]


def test_both_sides_of_a_supermerge_were_single_tokens_when_it_was_made(tok):
    vocabulary = {bytes([i]) for i in range(256)}
    n_super = 0
    for event in tok.events:
        if event.kind == "delete":
            vocabulary.remove(event.left)
            continue
        assert event.left in vocabulary and event.right in vocabulary
        assert event.left + event.right not in vocabulary
        vocabulary.add(event.left + event.right)
        n_super += event.kind == "supermerge"
    assert n_super > 50
    assert vocabulary == set(tok.ranks)


def test_superwords_are_words_with_blanks_and_nothing_else(tok):
    assert len(tok.superwords) > 50
    for superword in tok.superwords:
        pretokens = split(superword.decode())
        assert len(pretokens) > 1
        assert all(may_join(pretoken) for pretoken in pretokens)


def test_without_supermerges_it_is_the_bpe_of_tiktoken(text):
    plain = Tokenizer.train(text, 700, supermerges=False)
    oracle = tiktoken.Encoding(
        "bpe", pat_str=PATTERN, mergeable_ranks=dict(plain.ranks), special_tokens={}
    )
    for string in [text, *random_strings(3000, seed=5)]:
        assert plain.encode(string) == oracle.encode_ordinary(string), repr(string)


@pytest.mark.parametrize("text", ["", "a", "abc", "I am", "zz"])
def test_learning_stops_when_no_pair_occurs_twice(text):
    tok = Tokenizer.train(text, 1024)
    assert tok.vocab_size == 256 + len(SPECIAL)
    assert tok.decode(tok.encode(text)) == text


def loop_seconds():
    """The processor time of four million steps of a loop: the clock of this machine."""
    start = time.process_time()
    seen = {}
    for i in range(4_000_000):
        seen[i % 5000] = i
    return time.process_time() - start


def test_a_megabyte_learns_4096_tokens_in_seconds():
    """It takes about 8 loop_seconds. Counting all pairs again at every step would take hours."""
    big = make_text(190_000, vocabulary=5000)
    assert len(big.encode()) > 1_000_000
    loop_before = loop_seconds()
    start = time.process_time()
    events = learn(big, 4092)
    seconds = time.process_time() - start
    assert len(events) == 4092 - 256
    slowest_loop = max(loop_before, loop_seconds())
    assert seconds < 40 * slowest_loop, f"{seconds:.1f} s, and a loop takes {slowest_loop:.1f} s"


# encoding and decoding ----------------------------------------------------------------------------


def test_encoding_equals_the_slow_one(tok, text):
    for string in [text[:3000], *random_strings(400, seed=6)]:
        assert tokens_of(tok, string) == slow_encode(tok.events, string), repr(string)


def test_encoding_equals_the_slow_one_where_pairs_overlap():
    tok = Tokenizer.train(make_repetitions(300, seed=9), 400, delete_at=0.5)
    assert tok.deletions
    for seed in range(60):
        string = make_repetitions(30, seed)
        assert tokens_of(tok, string) == slow_encode(tok.events, string), repr(string)


def test_decode_inverts_encode_for_any_unicode(tok):
    corner_cases = ["", "\ufeff", "\ufeff\ufeffx", "\U0010ffff", "\U000e0001", "\r\n \r"]
    for string in random_strings(2000, seed=7) + corner_cases:
        assert tok.decode(tok.encode(string)) == string


def test_decode_inverts_encode_for_random_bytes(tok):
    rng = random.Random(0)
    for _ in range(500):
        data = rng.randbytes(rng.randint(0, 40))
        for string in (data.decode("latin-1"), data.decode("utf-8", "replace")):
            assert tok.decode(tok.encode(string)) == string


def test_any_ids_decode(tok):
    rng = random.Random(1)
    ids = rng.choices(range(tok.vocab_size), k=3000)
    assert tok.decode(ids).encode()
    assert tok.decode(torch.tensor([104, 105])) == "hi"
    assert tok.decode("🦊".encode()[:2]) == "\ufffd"


def test_half_a_surrogate_pair_becomes_the_replacement_character(tok):
    assert tok.decode(tok.encode("a \ud83d b")) == "a \ufffd b"


def test_special_tokens_come_last_and_no_user_can_spell_them(tok):
    first = tok.vocab_size - len(SPECIAL)
    assert list(tok.special.values()) == list(range(first, tok.vocab_size))
    for name, i in tok.special.items():
        ids = tok.encode(f"say {name} twice {name}")
        assert not set(ids) & set(tok.special.values())
        assert tok.decode([i]) == name


def test_n_bytes_counts_the_text_and_no_special_token(tok, text):
    ids = tok.encode(text) + [tok.special["<|end|>"]]
    assert len(tok.n_bytes) == tok.vocab_size == 900
    assert sum(tok.n_bytes[i] for i in ids) == len(text.encode())


def test_the_state_survives_a_checkpoint(tok, text):
    file = io.BytesIO()
    torch.save(tok.state(), file)
    file.seek(0)
    loaded = Tokenizer.load(torch.load(file, weights_only=True))
    assert loaded.state() == tok.state()
    assert loaded.special == tok.special
    assert loaded.n_bytes == tok.n_bytes
    assert loaded.encode(text) == tok.encode(text)


def test_bad_sizes_and_ids_are_refused(tok):
    least = 256 + len(SPECIAL)
    assert Tokenizer.train("abab", least).vocab_size == least
    with pytest.raises(AssertionError, match=f"vocab_size={least - 1} must be at least {least}"):
        Tokenizer.train("abab", least - 1)
    for i in (-1, tok.vocab_size):
        with pytest.raises(AssertionError, match=f"id {i} is not in a vocabulary of 900"):
            tok.decode([i])


def test_long_texts_without_a_border_are_encoded_in_seconds(tok):
    rng = random.Random(2)
    letters = "".join(rng.choices("abklmortesh", k=5000))
    no_marks = make_text(20_000, seed=8).replace(".\n", " ").replace(", ", " ")
    start = time.process_time()
    for string in (letters, "a" * 50_000, no_marks, " " * 10_000):
        assert tok.decode(tok.encode(string)) == string
    assert time.process_time() - start < 12 * loop_seconds()


# demo_boundless -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_cut_tokenizer_is_one_that_stopped_earlier(settings):
    text = make_text(1500, seed=2)
    largest = Tokenizer.train(text, 500, **settings)
    for size in (260, 261, 300, 391, 500, 900):
        smaller = demo_boundless.cut(largest, size)
        assert smaller.state() == Tokenizer.train(text, min(size, 500), **settings).state()
    assert demo_boundless.cut(largest, 300).vocab_size == 300


def test_renyi_efficiency():
    assert demo_boundless.renyi_efficiency(list(range(50)) * 3, 50) == pytest.approx(1)
    assert demo_boundless.renyi_efficiency([7] * 20, 50) == pytest.approx(0)
    ids = [0] * 5 + [1] * 3 + [2]
    p = np.array([5, 3, 1]) / 9
    expected = np.log(np.sum(p**2.5)) / (1 - 2.5) / np.log(10)
    assert demo_boundless.renyi_efficiency(ids, 10) == pytest.approx(expected, rel=1e-12)

    # Near alpha = 1 it is Shannon's entropy.
    shannon = -np.sum(p * np.log(p)) / np.log(10)
    assert demo_boundless.renyi_efficiency(ids, 10, 1 + 1e-6) == pytest.approx(shannon, rel=1e-4)


def test_the_heaviest_tokens():
    tok = Tokenizer([])
    found = demo_boundless.heaviest_tokens(tok, list(b"aaaabb,"), n=2)
    total = 4**2.5 + 2**2.5 + 1
    assert [name for name, _ in found] == ["'a'", "'b'"]
    assert [share for _, share in found] == pytest.approx([4**2.5 / total, 2**2.5 / total])


def test_gains_and_titles():
    assert demo_boundless.gains([3, 1], [2, 2]) == [0.5, -0.5]
    title = demo_boundless.tokens_title(0.05, -0.02, 1024)
    assert "5.0% more" in title and "2.0% lower" in title
    title = demo_boundless.tokens_title(-0.05, 0.02, 1024)
    assert "5.0% fewer" in title and "2.0% higher" in title
    for bpe, joined, finding in (
        ([1.0], [0.9], "one seed"),
        ([1.0, 1.1], [0.8, 0.9], "BoundlessBPE is better"),
        ([0.8, 0.9], [1.0, 1.1], "BPE is better"),
        ([0.8, 1.0], [0.9, 1.1], "no difference"),
    ):
        assert f": {finding}\n" in demo_boundless.losses_title(bpe, joined, 1024)


def test_the_learning_rate_rises_holds_and_falls():
    scales = [demo_boundless.lr_scale(step, 100) for step in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9] == scales[50] == 1
    assert scales[99] == pytest.approx(0.02)


def test_nats_per_byte_of_a_model_that_guesses():
    """Without weights in its head a model gives every token 1 / V."""
    model = GPT(GPTConfig(vocab_size=10, block_size=8, n_layer=1, n_head=2, n_embd=8))
    torch.nn.init.zeros_(model.lm_head.weight)
    n_bytes = torch.arange(10)
    ids = torch.randint(10, (400,), generator=torch.Generator().manual_seed(0))
    y = ids[1 : 1 + 399 // 7 * 7]
    expected = len(y) * math.log(10) / n_bytes[y].sum().item()
    measured = demo_boundless.nats_per_byte(model, ids, 7, n_bytes, "cpu")
    assert measured == pytest.approx(expected, rel=1e-5)


def test_a_batch_depends_on_the_seed_and_the_step_alone():
    ids = torch.arange(100)
    x, y = demo_boundless.get_batch(ids, 7, 50, seed=1, step=2)
    assert torch.equal(y, x + 1)
    assert x.shape == (50, 7) and y.max() <= 99
    again, _ = demo_boundless.get_batch(ids, 7, 50, seed=1, step=2)
    other, _ = demo_boundless.get_batch(ids, 7, 50, seed=1, step=3)
    assert torch.equal(x, again) and not torch.equal(x, other)


def test_flops_of_a_step_are_those_that_torch_counts():
    """torch counts the products inside of the attention only where they are not fused."""
    cfg = GPTConfig(vocab_size=32, block_size=8, n_layer=2, n_head=4, n_kv_head=2, n_embd=16)
    model = GPT(cfg)
    x = torch.zeros(3, 8, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, x)[1].backward()
    counted = counter.get_total_flops() / 1e12
    assert demo_boundless.step_flops(model, 3) == pytest.approx(counted, rel=1e-9)


# scripts ------------------------------------------------------------------------------------------


def run(name, *options):
    command = [sys.executable, str(FOLDER / name), *options]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def test_boundless_as_a_script(tmp_path, text):
    data = tmp_path / "my.txt"
    data.write_text(text)
    done = run("boundless.py", f"--data={data}", "--vocab_size=600", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "600 tokens" in done.stdout
    checkpoint = load_checkpoint(tmp_path / "boundless.pt", "boundless")
    tok = Tokenizer.load(checkpoint["tokenizer"])
    train_text, val_text = boundless.load_texts(str(data))
    assert train_text + val_text == text
    assert tok.state() == Tokenizer.train(train_text, 600).state()

    metrics = json.loads((tmp_path / "boundless.json").read_text())
    assert metrics["vocab_size"] == 600
    rate = len(val_text.encode()) / len(tok.encode(val_text))
    assert metrics["bytes_per_token"]["held-out"]["boundless"] == pytest.approx(rate)
    assert len(metrics["first"]) > 10


def test_the_demo_as_a_script(tmp_path, text):
    data = tmp_path / "my.txt"
    data.write_text(text)
    options = ["--vocab_size=512", "--steps=12", "--batch_size=2", "--row=32", "--n_embd=16"]
    options += ["--seeds=2", "--device=cpu", f"--data={data}", f"--out={tmp_path}"]
    done = run("demo_boundless.py", *options)
    assert done.returncode == 0, done.stderr
    for name in ("demo_boundless", "demo_boundless_loss"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    results = json.loads((tmp_path / "demo_boundless.json").read_text())
    assert results["vocabulary"] == [384, 512, 768, 1024]
    curve = results["curves"]["BoundlessBPE"]
    assert curve["sizes"] == results["vocabulary"]
    assert curve["bytes_per_token"] == sorted(curve["bytes_per_token"])
    assert results["bytes_per_token_gain"]["BoundlessBPE"][-1] > 0
    assert all(len(losses) == 2 for losses in results["nats_per_byte"].values())
    assert results["steps"]["BPE"] == 12
    assert results["steps"]["BoundlessBPE"] > 12, "longer tokens allow more steps"


@pytest.mark.parametrize("name", ["boundless.py", "demo_boundless.py"])
@pytest.mark.parametrize(
    "content, message", [("", "is empty"), ("abcdefg", "data="), (None, "there is no file")]
)
def test_a_bad_text_ends_in_one_line(name, content, message, tmp_path):
    data = tmp_path / "my.txt"
    if content is not None:
        data.write_text(content)
    done = run(name, f"--data={data}", "--vocab_size=400", f"--out={tmp_path}")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "module, option, message",
    [
        (boundless, "--vocab_size=259", "vocab_size=259 must be at least 260"),
        (boundless, "--delete_at=1.5", "--delete_at=1.5 must be from 0 to 1"),
        (demo_boundless, "--vocab_size=300", "vocab_size=300 must be at least 320"),
        (demo_boundless, "--delete_at=0", "delete_at=0.0 must be above 0"),
        (demo_boundless, "--row=0", "--row=0 must be at least 1"),
        (demo_boundless, "--n_embd=12", "n_embd=12 must be divisible by 8"),
        (demo_boundless, "--n_embd=0", "--n_embd=0 must be at least 1"),
    ],
)
def test_bad_options_end_in_one_line(module, option, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(module.Config, argv=[option])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
