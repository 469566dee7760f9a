"""Tests of tokenizer.py. Every text is made here, nothing is read from disk."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import io
import random
import time
import unicodedata

import pytest
import torch

import tokenizer
from tokenizer import SPECIAL, Tokenizer, count_words, merge, pairs, split, train_ranks

WIKIPEDIA = "aaabdaaabac"  # https://en.wikipedia.org/wiki/Byte_pair_encoding
SYLLABLES = [
    *["ba", "ko", "mi", "ra", "lu", "ten", "sha", "or", "ing"],
    *["é", "ß", "語", "文", "🦊", "ый", "ق"],
]


def make_text(n_words, seed=0, vocabulary=2000):
    """n_words words, a few of them very often (Zipf). Between them stand blanks, marks, digits,
    line ends and contractions."""
    rng = random.Random(seed)
    words = []
    for _ in range(vocabulary):
        words.append("".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))))
    weights = [1 / (i + 1) for i in range(vocabulary)]
    between = [" "] * 12 + [", ", ".\n", "'s ", " 17 ", "\n\n", "  ", "!? "]
    chosen = rng.choices(words, weights, k=n_words)
    return "".join(word + rng.choice(between) for word in chosen)


def make_runs(n_words, longest, seed):
    """Words of the letters a and b, with long runs of a: here pairs overlap."""
    rng = random.Random(seed)
    words = []
    for _ in range(n_words):
        words.append("".join(rng.choices("aab", k=rng.randint(1, longest))))
    return " ".join(words)


def count_pairs(words):
    """{(left, right): how often} in words that are lists of ids. A pair that overlaps the one that
    was counted before it, as in a a a, does not count."""
    counts = {}
    for word in words:
        counted_at = -2
        for i in range(len(word) - 1):
            overlaps = counted_at == i - 1 and word[i - 1] == word[i] == word[i + 1]
            if not overlaps:
                pair = (word[i], word[i + 1])
                counts[pair] = counts.get(pair, 0) + 1
                counted_at = i
    return counts


def naive_tokens(text, n_merges):
    """The rule of train_ranks once more, with ids instead of bytes. Everything is counted afresh at
    every step. -> the bytes of all tokens"""
    words = [list(piece.encode("utf-8")) for piece in split(text)]
    tokens = [bytes([i]) for i in range(256)]
    for new_id in range(256, 256 + n_merges):
        counts = count_pairs(words)
        if not counts or max(counts.values()) < 2:
            break

        most = max(counts.values())
        candidates = [pair for pair in counts if counts[pair] == most]
        left, right = min(candidates, key=lambda pair: (tokens[pair[0]], tokens[pair[1]]))
        tokens.append(tokens[left] + tokens[right])
        for word in words:
            i = 0
            while i + 1 < len(word):
                if word[i] == left and word[i + 1] == right:
                    word[i : i + 2] = [new_id]
                i += 1
    return tokens


def random_strings(n, seed):
    """Words, blanks, digits, scripts, emoji, combining marks, the names of special tokens, and code
    points from anywhere."""
    rng = random.Random(seed)

    # Python's regex and tiktoken's engine may disagree about letters that only the newest Unicode
    # has, so code points without a category are not drawn.
    anywhere = []
    for code in range(0x30000):
        if unicodedata.category(chr(code)) not in ("Cn", "Cs"):
            anywhere.append(chr(code))

    pools = [
        ["the", " The", "don't", "WE'LL", "'S", "'ſ", "x", "banana", "aaaaaa", "kokomi"],
        [" shaing", "raten" * 30],
        [" ", "  ", "\n", "\r\n", "\t", " \n ", "\u00a0", "\u2028", "\u3000", "\x1c", "\x85"],
        ["   \n\n  ", "\n\n"],
        ["0", "7", "12345", " 2026", "٣", "½", "Ⅷ", "3.14"],
        ["語", "文文", "漢字", "한국어", "привет", "عربي", "ไทย", "हिन्दी"],
        ["🦊", "👩‍👩‍👧", "🇩🇪", "👍🏽", "\ufeff", "\u200d"],
        ["e\u0301", "\u0301", "a\u0308\u0323", "\u0300\u0301", "n\u0303o"],
        [*SPECIAL, "<|", "|>", "<|end", "!!!", "...\n", "$%&", "\x00"],
        SYLLABLES,
        anywhere,
    ]
    strings = []
    for _ in range(n):
        pieces = [rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 8))]
        strings.append("".join(pieces))
    return strings


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(make_text(20_000), 1024)


# training -----------------------------------------------------------------------------------------


def test_the_example_of_wikipedia():
    """Z = aa, Y = ab, X = ZY, and the text becomes X d X a c."""
    tok = Tokenizer.train(WIKIPEDIA, 256 + 3 + len(SPECIAL))
    assert [tok.token_bytes(i) for i in (256, 257, 258)] == [b"aa", b"ab", b"aaab"]
    expected = [258, ord("d"), 258, ord("a"), ord("c")]
    assert tok.encode(WIKIPEDIA) == expected
    assert tok.encode_slow(WIKIPEDIA) == expected
    assert tok.encode_slow("aab") == [256, ord("b")]  # as its docstring says


def test_the_examples_of_the_docstrings():
    assert split("Hello world's 2026") == ["Hello", " world", "'s", " ", "2", "0", "2", "6"]
    assert pairs(list("abab")) == [("a", "b"), ("b", "a"), ("a", "b")]
    assert pairs(list("aaa")) == [("a", "a")]
    assert merge([b"a", b"a", b"a", b"b"], (b"a", b"a")) == [b"aa", b"a", b"b"]
    assert list(train_ranks(WIKIPEDIA, 3).items())[256:] == [
        (b"aa", 256),
        (b"ab", 257),
        (b"aaab", 258),
    ]


@pytest.mark.parametrize("n", range(2, 10))
def test_overlapping_pairs_are_counted_as_often_as_they_are_merged(n):
    word = [b"a"] * n
    merges = n - len(merge(word, (b"a", b"a")))
    assert len(pairs(word)) == merges == n // 2


def test_of_equally_frequent_pairs_the_first_by_its_bytes_is_merged():
    # Three pairs occur twice. Then (" a", "b") still comes before ("z", "y"), although it is newer.
    assert list(train_ranks("zy ab.zy ab", 3))[256:] == [b" a", b" ab", b"zy"]


@pytest.mark.parametrize("seed", range(4))
def test_the_incremental_trainer_equals_the_naive_one(seed):
    text = make_text(300, seed, vocabulary=60)
    assert list(train_ranks(text, 150)) == naive_tokens(text, 150)


@pytest.mark.parametrize("seed", range(4))
def test_the_incremental_trainer_equals_the_naive_one_where_pairs_overlap(seed):
    text = make_runs(120, longest=12, seed=seed)
    tokens = naive_tokens(text, 500)
    assert list(train_ranks(text, 500)) == tokens
    assert len(set(tokens)) == len(tokens)  # no token is learned twice in two ways


def test_training_is_deterministic():
    text = make_text(2000)
    assert Tokenizer.train(text, 600).state() == Tokenizer.train(text, 600).state()


@pytest.mark.parametrize(
    "text, merges", [("", 0), ("a", 0), ("abc", 0), ("aaa", 0), ("abab", 1), (WIKIPEDIA, 3)]
)
def test_training_stops_when_no_pair_occurs_twice(text, merges):
    tok = Tokenizer.train(text, 1024)
    assert tok.vocab_size == 256 + merges + len(SPECIAL)
    assert tok.decode(tok.encode(text)) == text


def loop_seconds():
    """The processor time of four million steps of a loop: the clock of this machine."""
    start = time.process_time()
    seen = {}
    for i in range(4_000_000):
        seen[i % 5000] = i
    return time.process_time() - start


def test_a_long_word_is_counted_in_pieces():
    counts = count_words("é" * 40 + " a a")
    assert counts == {"é".encode() * 16: 2, "é".encode() * 8: 1, b" a": 2}
    text = "xyz" * 5000
    tok = Tokenizer.train(text, 262)
    assert tok.decode(tok.encode(text)) == text
    assert len(tok.encode(text)) < 0.5 * len(text)


def test_only_the_most_frequent_words_are_learned_from(monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_WORDS", 1)
    ranks = train_ranks("aa aa aa bb bb", 9)
    assert b" aa" in ranks
    assert b"bb" not in ranks


def test_a_megabyte_trains_in_seconds():
    """It takes about 0.8 loop_seconds. Counting all pairs again at every merge would need far more
    than 3."""
    text = make_text(200_000, vocabulary=5000)
    assert len(text.encode()) > 1_000_000
    loop_before = loop_seconds()
    start = time.process_time()
    assert len(train_ranks(text, 764)) == 1020
    seconds = time.process_time() - start
    slowest_loop = max(loop_before, loop_seconds())
    assert seconds < 3 * slowest_loop, f"{seconds:.1f} s, and a loop takes {slowest_loop:.1f} s"


# encoding and decoding ----------------------------------------------------------------------------


def test_encode_equals_encode_slow(tok):
    for text in random_strings(20_000, seed=1):
        assert tok.encode(text) == tok.encode_slow(text), repr(text)


def test_encode_equals_encode_slow_where_pairs_overlap():
    rng = random.Random(0)
    tok = Tokenizer.train(make_runs(400, longest=30, seed=0), 500)
    for _ in range(500):
        # tiktoken has another algorithm for words above 100 bytes.
        text = "".join(rng.choices("aab", k=rng.randint(1, 150)))
        assert tok.encode(text) == tok.encode_slow(text), text


def test_every_token_encodes_to_itself(tok):
    whole = []
    for i in range(128, tok.special[SPECIAL[0]]):
        if "\ufffd" not in tok.decode([i]):  # not a part of a character
            whole.append(i)
    assert len(whole) > 500
    for i in whole:
        assert tok.encode(tok.decode([i])) == [i]


def test_decode_inverts_encode_for_any_unicode(tok):
    corner_cases = ["", "\ufeff", "\ufeff\ufeffx", "\U0010ffff", "\U000e0001"]
    for text in random_strings(2000, seed=2) + corner_cases:
        assert tok.decode(tok.encode(text)) == text
        assert "".join(split(text)) == text


def test_half_a_surrogate_pair_becomes_the_replacement_character(tok):
    text = "a \ud83d b"  # json.loads gives this for "a \\ud83d b"
    assert tok.encode(text) == tok.encode("a \ufffd b")
    assert tok.encode_slow(text) == tok.encode("a \ufffd b")
    assert Tokenizer.train(text, 300).decode(tok.encode(text)) == "a \ufffd b"


def test_half_a_character_decodes_without_an_error(tok):
    assert tok.decode("🦊".encode()[:2]) == "\ufffd"
    assert tok.decode(torch.tensor([104, 105])) == "hi"


def test_special_tokens_come_last_and_no_user_can_spell_them(tok):
    first = tok.vocab_size - len(SPECIAL)
    assert list(tok.special.values()) == list(range(first, tok.vocab_size))
    for name, i in tok.special.items():
        text = f"say {name} twice {name}"
        ids = tok.encode(text)
        assert not set(ids) & set(tok.special.values())
        assert tok.decode(ids) == text
        assert tok.decode([i]) == name
        assert tok.token_bytes(i) == name.encode()


def test_n_bytes_counts_the_text_and_no_special_token(tok):
    text = make_text(500, seed=3)
    ids = tok.encode(text) + [tok.special["<|end|>"]]
    assert len(tok.n_bytes) == tok.vocab_size
    assert sum(tok.n_bytes[i] for i in ids) == len(text.encode())


def test_bad_sizes_and_ids_are_refused(tok):
    least = 256 + len(SPECIAL)
    assert Tokenizer.train("abab", least).vocab_size == least
    with pytest.raises(AssertionError, match="vocab_size=259 must be at least 260"):
        Tokenizer.train("abab", 259)
    for i in (-100, tok.vocab_size):
        with pytest.raises(AssertionError, match=f"id {i} is not in a vocabulary of 1024"):
            tok.decode([i])


def test_the_state_survives_a_checkpoint(tok):
    file = io.BytesIO()
    torch.save(tok.state(), file)
    file.seek(0)
    loaded = Tokenizer.load(torch.load(file, weights_only=True))
    assert loaded.state() == tok.state()
    assert loaded.special == tok.special
    assert loaded.n_bytes == tok.n_bytes
    text = make_text(200, seed=4)
    assert loaded.encode(text) == tok.encode(text)


def test_another_pattern_is_used_and_saved():
    """With this pattern every blank is a pre-token of its own, so " th" cannot be merged."""
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b" th": 257}
    other = Tokenizer(ranks, pattern=r"\S+|\s")
    for tok in (other, Tokenizer.load(other.state())):
        assert tok.encode(" th") == tok.encode_slow(" th") == [32, 256]
    assert Tokenizer(ranks).encode(" th") == [257]


def test_a_state_without_a_pattern_has_ours(tok):
    """Checkpoints of the first version of this file do not name the pattern."""
    old_state = {name: value for name, value in tok.state().items() if name != "pattern"}
    assert Tokenizer.load(old_state).state() == tok.state()
