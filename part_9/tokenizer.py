"""
Part 9 - byte-level BPE, trained from scratch: text into the integers that a GPT reads, and back.

From part_8/tokenizer.py

Start from the 256 bytes, which spell any text; then again and again give the most frequent pair of neighbours
an id of its own (Sennrich et al. 2016, arXiv 1508.07909, algorithm 1; on bytes since GPT-2).

    tok = Tokenizer.train(text, vocab_size=1024)
    ids = tok.encode("Once upon a time")            # fast, tiktoken's Rust; tok.encode_slow is the same, readable
    tok.decode(ids) == "Once upon a time"           # True for every text

Ids: 0..255 are the bytes themselves, then the merges in the order they were learned, then the special tokens.

Not here: merges across pre-tokens ("of the" is never one token), and speed on a text that is one giant word,
a genome say, because a merge recounts every word that it touches.
"""
from collections import Counter, defaultdict
from heapq import heapify, heappop, heappush

import regex  # not re: \p{L} and \p{N} are Unicode's letters and numbers
import tiktoken

# Merges stay inside one match, as in GPT-4. In order: 've; a word with the space or mark before it; up to 3 digits;
# punctuation with its line ends; blanks up to a line end; blanks before the last one (that one joins the word); rest.
# Python's regex and tiktoken's engine read it alike (but for letters younger than the Unicode tables of either).
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]


def split(text):
    """
    The pre-tokens of a text; joined they are the text again.
    "Hello world's 2026" -> ["Hello", " world", "'s", " ", "202", "6"]
    """
    # JSON can carry half of a surrogate pair, which has no UTF-8; it becomes U+FFFD, as tiktoken does it
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return regex.findall(PATTERN, text)


def pairs(word):
    """
    The neighbours in one word, a list of tokens: one entry for each merge that could be made.
    [a, b, a, b] -> [(a, b), (b, a), (a, b)]
    [a, a, a]    -> [(a, a)], because the a in the middle can be merged only once
    """
    found, overlap = [], None
    for pair in zip(word, word[1:]):
        if pair == overlap:  # only in a run of one token, where the pair before took this one's left half
            overlap = None
        else:
            found.append(pair)
            overlap = pair
    return found


def merge(word, pair):
    """
    Every occurrence of the pair becomes one token, from left to right.
    merge([b"a", b"a", b"a", b"b"], (b"a", b"a")) -> [b"aa", b"a", b"b"]
    """
    left, right = pair
    merged = []
    for token in word:
        if token == right and merged and merged[-1] == left:
            merged[-1] += token  # longer than left now, so it is not merged twice
        else:
            merged.append(token)
    return merged


def train_ranks(text, n_merges):
    """
    Learn up to n_merges merges. Returns ranks, a dict token -> id: the 256 bytes first, then the merges in order.
    train_ranks("aaabdaaabac", 3) adds {b"aa": 256, b"ab": 257, b"aaab": 258}

    Each step takes the pair that occurs most often; of equals, the one whose (left, right) bytes sort first. It stops
    early when no pair occurs twice: a small text has no more to teach, so len(ranks) may be less than was asked for.

    A step costs what it changes: a word is kept once with its frequency, `where` says which words hold a pair, and a
    pair whose count changed is pushed on the heap again, its old entry dropped when it surfaces.
    """
    ranks = {bytes([i]): i for i in range(256)}
    words, freqs = [], []
    counts, where = defaultdict(int), defaultdict(set)  # pair -> occurrences in the text, pair -> indices of words
    for w, (piece, freq) in enumerate(Counter(split(text)).items()):
        words.append([bytes([b]) for b in piece.encode("utf-8")])
        freqs.append(freq)
        for pair in pairs(words[w]):
            counts[pair] += freq
            where[pair].add(w)
    heap = [(-count, pair) for pair, count in counts.items() if count > 1]
    heapify(heap)

    while heap and len(ranks) < 256 + n_merges:
        count, best = heappop(heap)
        if -count != counts[best]:
            continue  # stale: the count has changed since this entry was pushed
        # always a new key: between the same two borders the earlier merges leave one spelling of a token, not two
        ranks[best[0] + best[1]] = len(ranks)
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
    def __init__(self, ranks, special=SPECIAL):
        """ranks: dict token (bytes) -> id, the 256 bytes first, without gaps. special: names, they get the next ids."""
        self.special = {name: len(ranks) + i for i, name in enumerate(special)}
        self.ranks = ranks
        self.tokens = sorted(ranks, key=ranks.get) + [name.encode("utf-8") for name in special]
        self.vocab_size = len(self.tokens)  # what was really merged, not what was asked for
        # bytes of text behind each id, for nats per byte: a special token stands for no text at all
        self.n_bytes = [len(token) for token in self.tokens[:len(ranks)]] + [0] * len(special)
        self.encoding = tiktoken.Encoding("bpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special)

    @classmethod
    def train(cls, text, vocab_size, special=SPECIAL):
        """vocab_size counts bytes, merges and special tokens; a small text may end with a smaller one."""
        n_merges = vocab_size - 256 - len(special)
        assert n_merges >= 0, f"vocab_size must be at least {256 + len(special)} (bytes and specials), not {vocab_size}"
        return cls(train_ranks(text, n_merges), special)

    def encode(self, text):
        """Text -> list of ids. A user who spells "<|end|>" gets plain text, never special["<|end|>"]."""
        return self.encoding.encode_ordinary(text)

    def encode_slow(self, text):
        """
        The same ids as encode(), in the open: inside each pre-token, replay the merges in the order they were learned.
        With the three merges of "aaabdaaabac": "aab" -> a a b -> aa b (256 comes before 257) -> [256, 98]
        """
        ids = []
        for piece in split(text):
            word = [bytes([b]) for b in piece.encode("utf-8")]
            while known := [pair for pair in zip(word, word[1:]) if b"".join(pair) in self.ranks]:
                word = merge(word, min(known, key=lambda pair: self.ranks[b"".join(pair)]))
            ids.extend(self.ranks[token] for token in word)
        return ids

    def token_bytes(self, i):
        """The bytes of one id; a special token's are those of its name."""
        assert 0 <= i < self.vocab_size, f"id {i} is not in a vocabulary of {self.vocab_size}"
        return self.tokens[i]

    def decode(self, ids):
        """Ids -> text. A model may sample half a character: bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def state(self):
        """All there is, as plain lists of bytes and str: for a checkpoint, torch.load(weights_only=True) reads it."""
        return {"tokens": self.tokens[:len(self.ranks)], "special": list(self.special)}

    @classmethod
    def load(cls, state):
        return cls({token: i for i, token in enumerate(state["tokens"])}, state["special"])
