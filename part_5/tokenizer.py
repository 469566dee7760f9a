"""
Part 5: byte-level byte-pair encoding, trained from scratch. It turns text into the integers that a
GPT reads, and back.

From part_4/tokenizer.py

Begin with the 256 bytes, which can spell any text. Then, again and again, give the most frequent
pair of neighbours an id of its own (Sennrich et al. 2016, algorithm 1; on bytes since GPT-2).

    tok = Tokenizer.train(text, vocab_size=1024)
    ids = tok.encode("Once upon a time")    # tiktoken's Rust; encode_slow is the same, readable
    tok.decode(ids) == "Once upon a time"   # True for every text

Ids: 0 to 255 are the bytes themselves, then come the merges in the order in which they were
learned, then the special tokens.

Not here: merges that cross pre-tokens ("of the" is never one token).
"""

from collections import Counter, defaultdict
from heapq import heapify, heappop, heappush

import regex  # not re: \p{L} and \p{N} are Unicode's letters and numbers
import tiktoken

# The text is first cut into pre-tokens, and merges never cross their borders. This is GPT-4's
# pattern, except that it cuts numbers into groups of up to three digits. Here each digit is a
# token, as in Qwen's tokenizer: in 47 + 5 a model must see that the 7 and the 5 give a carry, and a
# single token for 47 would hide its digits. With single digits 0.55 and 0.65 of Part 9's problems
# with three operations are solved, with groups 0.50 and 0.45 (two seeds). Python's regex and
# tiktoken's engine read the pattern the same way, except for letters that are newer than the
# Unicode tables of one of them.
PATTERN = "|".join(
    [
        r"'(?i:[sdmt]|ll|ve|re)",  # the end of a contraction: 's, 've
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with the space or mark before it
        r"\p{N}",  # a single digit
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation, with the line ends after it
        r"\s*[\r\n]",  # white space up to a line end
        r"\s+(?!\S)",  # white space, but for its last character, which belongs to the next word
        r"\s+",  # any other white space
    ]
)

# Limits of what is learned from, so that no text takes more than about a minute. Tiny Shakespeare,
# 1.1 MB, has 15,258 different words, and the longest has 16 bytes.
MAX_WORDS = 30_000  # the most frequent ones; the others are left out
MAX_BYTES = 32  # a longer word, such as a line without blanks, is counted in pieces of this size

SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]


def split(text, pattern=PATTERN):
    """The pre-tokens of a text. Joined, they are the text again.

    "Hello world's 2026" -> ["Hello", " world", "'s", " ", "2", "0", "2", "6"]
    """
    # JSON can carry half of a surrogate pair, which has no UTF-8 form. Like tiktoken, replace it.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return regex.findall(pattern, text)


def pairs(word):
    """The neighbouring pairs in one word, a list of tokens: one entry per possible merge.

    [a, b, a, b] -> [(a, b), (b, a), (a, b)]
    [a, a, a]    -> [(a, a)], because the a in the middle can be merged only once
    """
    found = []
    previous = None
    for pair in zip(word, word[1:]):
        if pair == previous:  # a run of one token: the previous pair already uses the left one
            previous = None
        else:
            found.append(pair)
            previous = pair
    return found


def merge(word, pair):
    """Replaces every occurrence of the pair in a word by one token, from left to right.

    merge([b"a", b"a", b"a", b"b"], (b"a", b"a")) -> [b"aa", b"a", b"b"]
    """
    left, right = pair
    merged = []
    for token in word:
        if token == right and merged and merged[-1] == left:
            merged[-1] += token  # now longer than left, so it cannot be merged twice
        else:
            merged.append(token)
    return merged


def count_words(text):
    """How often each different pre-token occurs -> Counter of bytes. Those that are longer than
    MAX_BYTES are counted in pieces."""
    counts = Counter()
    for word, freq in Counter(split(text)).items():
        data = word.encode("utf-8")
        for start in range(0, len(data), MAX_BYTES):
            counts[data[start : start + MAX_BYTES]] += freq
    return counts


def train_ranks(text, n_merges):
    """Learns up to n_merges merges -> ranks, a dict token -> id: first the 256 bytes, then the
    merges in order.

    train_ranks("aaabdaaabac", 3) adds {b"aa": 256, b"ab": 257, b"aaab": 258}

    Each step merges the pair that occurs most often; of equals, the one whose (left, right) bytes
    sort first. It stops early when no pair occurs twice: a small text has no more to teach, so
    len(ranks) may be less than was asked for.

    A step costs only what it changes: each different word is kept once with its frequency, `where`
    says which words contain a pair, and a pair whose count changed is pushed on the heap again. Its
    old entry is dropped when it comes to the top.
    """
    ranks = {bytes([i]): i for i in range(256)}

    # Count every pair of neighbours, once for each time that its word occurs.
    words = []  # each different pre-token, as a list of tokens
    freqs = []  # how often it occurs
    counts = defaultdict(int)  # pair -> how often it occurs in the text
    where = defaultdict(set)  # pair -> indices of the words that contain it
    for w, (word, freq) in enumerate(count_words(text).most_common(MAX_WORDS)):
        words.append([bytes([b]) for b in word])
        freqs.append(freq)
        for pair in pairs(words[w]):
            counts[pair] += freq
            where[pair].add(w)

    # Python's heap gives the smallest first, so the counts in it are negative.
    heap = [(-count, pair) for pair, count in counts.items() if count > 1]
    heapify(heap)

    while heap and len(ranks) < 256 + n_merges:
        count, best = heappop(heap)
        if -count != counts[best]:
            continue  # stale: the count has changed since this entry was pushed

        # The new token is always a new key: the same bytes are never merged in two ways.
        ranks[best[0] + best[1]] = len(ranks)

        # Rewrite the words that contain the pair, and note how the counts of pairs change.
        changed = defaultdict(int)
        for w in where.pop(best):
            for pair in pairs(words[w]):
                changed[pair] -= freqs[w]
            words[w] = merge(words[w], best)
            for pair in pairs(words[w]):
                changed[pair] += freqs[w]
                where[pair].add(w)

        for pair, difference in changed.items():
            counts[pair] += difference
            if difference and counts[pair] > 1:
                heappush(heap, (-counts[pair], pair))
    return ranks


class Tokenizer:
    def __init__(self, ranks, special=SPECIAL, pattern=PATTERN):
        """ranks: a dict token (bytes) -> id, the 256 bytes first, without gaps.
        special: names of special tokens, which get the next ids.
        pattern: the regular expression that cuts a text into pre-tokens."""
        self.special = {name: len(ranks) + i for i, name in enumerate(special)}
        self.ranks = ranks
        self.pattern = pattern
        self.tokens = sorted(ranks, key=ranks.get) + [name.encode("utf-8") for name in special]
        self.vocab_size = len(self.tokens)  # what was really merged, not what was asked for

        # The bytes of text behind each id, for nats per byte. A special token stands for no text.
        self.n_bytes = [len(token) for token in self.tokens[: len(ranks)]] + [0] * len(special)
        self.encoding = tiktoken.Encoding(
            "bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special
        )

    @classmethod
    def train(cls, text, vocab_size, special=SPECIAL):
        """A tokenizer for this text. vocab_size counts bytes, merges and special tokens; a small
        text may end with a smaller vocabulary."""
        n_merges = vocab_size - 256 - len(special)
        assert n_merges >= 0, (
            f"vocab_size={vocab_size} must be at least {256 + len(special)} (bytes and specials)"
        )
        return cls(train_ranks(text, n_merges), special)

    def encode(self, text):
        """Text -> list of ids. A user who types "<|end|>" gets plain text, not the special id."""
        return self.encoding.encode_ordinary(text)

    def encode_slow(self, text):
        """The same ids as encode(), in the open: in each pre-token, replay the merges in the order
        in which they were learned.

        With the three merges of "aaabdaaabac": "aab" -> a a b -> aa b (256 before 257) -> [256, 98]
        """
        ids = []
        for piece in split(text, self.pattern):
            word = [bytes([b]) for b in piece.encode("utf-8")]
            while True:
                known = [pair for pair in zip(word, word[1:]) if pair[0] + pair[1] in self.ranks]
                if not known:
                    break
                first = min(known, key=lambda pair: self.ranks[pair[0] + pair[1]])
                word = merge(word, first)
            ids.extend(self.ranks[token] for token in word)
        return ids

    def token_bytes(self, i):
        """The bytes of one id. Those of a special token are its name's."""
        assert 0 <= i < self.vocab_size, f"id {i} is not in a vocabulary of {self.vocab_size}"
        return self.tokens[i]

    def decode(self, ids):
        """Ids -> text. A model may sample half a character: bytes that are not valid UTF-8 become
        U+FFFD."""
        text = b"".join(self.token_bytes(i) for i in ids)
        return text.decode("utf-8", errors="replace")

    def state(self):
        """Everything as plain lists of bytes and strings, for a checkpoint."""
        return {
            "tokens": self.tokens[: len(self.ranks)],
            "special": list(self.special),
            "pattern": self.pattern,
        }

    @classmethod
    def load(cls, state):
        """The tokenizer that state() described."""
        ranks = {token: i for i, token in enumerate(state["tokens"])}
        pattern = state.get("pattern", PATTERN)  # older checkpoints do not name it
        return cls(ranks, state["special"], pattern)
