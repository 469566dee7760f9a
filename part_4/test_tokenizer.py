"""
Tests of Part 4's tokenizer: pytest part_4/test_tokenizer.py. Every text is made here, nothing is read from disk.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import io
import random
import time
import unicodedata

import pytest
import torch

from tokenizer import SPECIAL, Tokenizer, merge, pairs, split, train_ranks

WIKIPEDIA = "aaabdaaabac"  # https://en.wikipedia.org/wiki/Byte_pair_encoding
SYLLABLES = ["ba", "ko", "mi", "ra", "lu", "ten", "sha", "or", "ing", "é", "ß", "語", "文", "🦊", "ый", "ق"]


def make_text(n_words, seed=0, vocabulary=2000):
    """n_words words, a few of them very often (Zipf), with marks, digits, line ends and contractions between."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(vocabulary)]
    weights = [1 / (i + 1) for i in range(vocabulary)]
    between = [" "] * 12 + [", ", ".\n", "'s ", " 17 ", "\n\n", "  ", "!? "]
    return "".join(word + rng.choice(between) for word in rng.choices(words, weights, k=n_words))


def naive_ranks(text, n_merges):
    """The same rule said again with ids instead of bytes, everything counted afresh at every step."""
    words = [list(piece.encode("utf-8")) for piece in split(text)]
    tokens = [bytes([i]) for i in range(256)]
    for new in range(256, 256 + n_merges):
        counts = {}
        for word in words:
            i, last = 0, -2  # last: where the latest counted pair began, if the next one would overlap it
            while i + 1 < len(word):
                pair = (word[i], word[i + 1])
                if not (last == i - 1 and word[i - 1] == word[i] == word[i + 1]):
                    counts[pair] = counts.get(pair, 0) + 1
                    last = i
                i += 1
        if not counts or max(counts.values()) < 2:
            break
        most = max(counts.values())
        a, b = min((p for p in counts if counts[p] == most), key=lambda p: (tokens[p[0]], tokens[p[1]]))
        tokens.append(tokens[a] + tokens[b])
        for word in words:
            i = 0
            while i + 1 < len(word):
                if word[i] == a and word[i + 1] == b:
                    word[i:i + 2] = [new]
                i += 1
    return tokens


def random_strings(n, seed):
    """Words, blanks, digits, scripts, emoji, combining marks, special tokens' names, and code points from anywhere."""
    rng = random.Random(seed)
    # letters that only the newest Unicode knows may be cut differently by Python's regex and tiktoken's: not drawn
    anywhere = [chr(c) for c in range(0x30000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    pools = [
        ["the", " The", "don't", "WE'LL", "'S", "'ſ", "x", "banana", "aaaaaa", "kokomi", " shaing", "raten" * 30],
        [" ", "  ", "\n", "\r\n", "\t", " \n ", "\u00a0", "\u2028", "\u3000", "\x1c", "\x85", "   \n\n  "],
        ["0", "7", "12345", " 2026", "٣", "½", "Ⅷ", "3.14"],
        ["語", "文文", "漢字", "한국어", "привет", "عربي", "ไทย", "हिन्दी"],
        ["🦊", "👩‍👩‍👧", "🇩🇪", "👍🏽", "\ufeff", "\u200d"],
        ["e\u0301", "\u0301", "a\u0308\u0323", "\u0300\u0301", "n\u0303o"],
        SPECIAL + ["<|", "|>", "<|end", "!!!", "...\n", "$%&", "\x00"],
        SYLLABLES,
        anywhere,
    ]
    return ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 8))) for _ in range(n)]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(make_text(20_000), 1024)


def test_wikipedia_example():
    tok = Tokenizer.train(WIKIPEDIA, 256 + 3 + len(SPECIAL))
    assert [tok.token_bytes(i) for i in (256, 257, 258)] == [b"aa", b"ab", b"aaab"]  # Z=aa, Y=ab, X=ZY
    assert tok.encode(WIKIPEDIA) == tok.encode_slow(WIKIPEDIA) == [258, ord("d"), 258, ord("a"), ord("c")]
    assert tok.encode_slow("aab") == [256, ord("b")]  # as its docstring says


def test_docstring_examples():
    assert split("Hello world's 2026") == ["Hello", " world", "'s", " ", "202", "6"]
    assert pairs(list("abab")) == [("a", "b"), ("b", "a"), ("a", "b")]
    assert merge([b"a", b"a", b"a", b"b"], (b"a", b"a")) == [b"aa", b"a", b"b"]


@pytest.mark.parametrize("n", range(2, 10))
def test_overlapping_pairs_are_counted_as_often_as_they_are_merged(n):
    word = [b"a"] * n
    assert len(pairs(word)) == n - len(merge(word, (b"a", b"a"))) == n // 2


def test_ties_go_to_the_pair_whose_bytes_sort_first():
    # three pairs, twice each; then (" a", "b") still goes before ("z", "y"), although " a" is the newer token
    assert list(train_ranks("zy ab.zy ab", 3))[256:] == [b" a", b" ab", b"zy"]


@pytest.mark.parametrize("seed", range(4))
def test_incremental_trainer_equals_naive_trainer(seed):
    text = make_text(300, seed, vocabulary=60)
    assert list(train_ranks(text, 150)) == naive_ranks(text, 150)


@pytest.mark.parametrize("seed", range(4))
def test_incremental_trainer_equals_naive_trainer_on_runs(seed):
    rng = random.Random(seed)
    text = " ".join("".join(rng.choices("aab", k=rng.randint(1, 12))) for _ in range(120))
    tokens = naive_ranks(text, 500)
    assert list(train_ranks(text, 500)) == tokens
    assert len(set(tokens)) == len(tokens)  # no token is learned twice in two spellings


def test_training_is_deterministic():
    text = make_text(2000)
    assert Tokenizer.train(text, 600).state() == Tokenizer.train(text, 600).state()


def test_encode_equals_encode_slow(tok):
    for text in random_strings(20_000, seed=1):
        assert tok.encode(text) == tok.encode_slow(text), repr(text)


def test_encode_equals_encode_slow_on_runs():
    rng = random.Random(0)
    tok = Tokenizer.train(" ".join("".join(rng.choices("aab", k=rng.randint(1, 30))) for _ in range(400)), 500)
    for _ in range(500):
        text = "".join(rng.choices("aab", k=rng.randint(1, 150)))  # tiktoken has another algorithm above 100 bytes
        assert tok.encode(text) == tok.encode_slow(text), text


def test_every_token_encodes_to_itself(tok):
    whole = [i for i in range(128, tok.special[SPECIAL[0]]) if "\ufffd" not in tok.decode([i])]
    assert len(whole) > 500
    for i in whole:
        assert tok.encode(tok.decode([i])) == [i]


def test_round_trip_of_any_unicode(tok):
    for text in random_strings(2000, seed=2) + ["", "\ufeff", "\ufeff\ufeffx", "\U0010ffff", "\U000e0001"]:
        assert tok.decode(tok.encode(text)) == text
        assert "".join(split(text)) == text


def test_half_a_surrogate_pair_becomes_the_replacement_character(tok):
    text = "a \ud83d b"  # json.loads gives this for "a \ud83d b"
    assert tok.encode(text) == tok.encode_slow(text) == tok.encode("a \ufffd b")
    assert Tokenizer.train(text, 300).decode(tok.encode(text)) == "a \ufffd b"


def test_half_a_character_decodes_without_an_error(tok):
    assert tok.decode("🦊".encode()[:2]) == "\ufffd"
    assert tok.decode(torch.tensor([104, 105])) == "hi"


def test_special_tokens_come_last_and_no_user_can_spell_them(tok):
    assert list(tok.special.values()) == list(range(tok.vocab_size - len(SPECIAL), tok.vocab_size))
    for name, i in tok.special.items():
        ids = tok.encode(f"say {name} twice {name}")
        assert not set(ids) & set(tok.special.values())
        assert tok.decode(ids) == f"say {name} twice {name}"
        assert tok.decode([i]) == name and tok.token_bytes(i) == name.encode()


def test_n_bytes_counts_the_text_and_no_special_token(tok):
    text = make_text(500, seed=3)
    ids = tok.encode(text) + [tok.special["<|end|>"]]
    assert len(tok.n_bytes) == tok.vocab_size
    assert sum(tok.n_bytes[i] for i in ids) == len(text.encode())


def test_state_survives_a_checkpoint(tok):
    file = io.BytesIO()
    torch.save(tok.state(), file)
    file.seek(0)
    again = Tokenizer.load(torch.load(file, weights_only=True))
    assert again.state() == tok.state() and again.special == tok.special
    text = make_text(200, seed=4)
    assert again.encode(text) == tok.encode(text)


@pytest.mark.parametrize("text, merges", [("", 0), ("a", 0), ("abc", 0), ("aaa", 0), ("abab", 1), (WIKIPEDIA, 3)])
def test_training_stops_when_no_pair_occurs_twice(text, merges):
    tok = Tokenizer.train(text, 1024)
    assert tok.vocab_size == 256 + merges + len(SPECIAL)
    assert tok.decode(tok.encode(text)) == text


def test_bad_sizes_and_ids_say_their_value(tok):
    assert Tokenizer.train("abab", 256 + len(SPECIAL)).vocab_size == 256 + len(SPECIAL)
    with pytest.raises(AssertionError, match="at least 260 .* not 259"):
        Tokenizer.train("abab", 259)
    for i in (-100, tok.vocab_size):
        with pytest.raises(AssertionError, match=f"id {i} is not in a vocabulary of 1024"):
            tok.decode([i])


def loop_seconds():
    """Four million steps of Python: about a second of a core, more where the core is shared."""
    start, seen = time.process_time(), {}
    for i in range(4_000_000):
        seen[i % 5000] = i
    return time.process_time() - start

def test_a_megabyte_trains_in_seconds():
    """In 0.8 loop_seconds, and never in 3: counting all pairs again at every merge needs far more."""
    text = make_text(200_000, vocabulary=5000)
    assert len(text.encode()) > 1_000_000
    before, start = loop_seconds(), time.process_time()
    assert len(train_ranks(text, 764)) == 1020
    seconds = time.process_time() - start
    assert seconds < 3 * max(before, loop_seconds()), f"{seconds:.1f} s"
