"""
Part 10: BoundlessBPE, byte-pair encoding whose tokens may grow across the borders of words, so that
" of the" can become one token (Schmidt et al. 2025, arXiv 2504.00178).

Starts here. Takes from part_4/tokenizer.py: PATTERN, split, pairs, merge, count_words.

    python part_10/boundless.py                                   the world's text
    python part_10/boundless.py --data=my.txt --vocab_size=4096   your own text
    python part_10/boundless.py --delete_at=0.9                   with deletions

As a library:

    tok = Tokenizer.train(text, vocab_size=4096)
    ids = tok.encode("Once upon a time")
    tok.decode(ids) == "Once upon a time"   # True for every text
    checkpoint = load_checkpoint("part_10/out/boundless.pt", "boundless")
    tok = Tokenizer.load(checkpoint["tokenizer"])

Plain BPE cuts the text into pre-tokens (words with the blank before them, punctuation, digits), and
no merge crosses their borders. Its vocabulary soon holds all frequent words, and what is added then
is rare. BoundlessBPE adds a second kind of merge. A *supermerge* joins two neighbouring pre-tokens,
and the result is a *superword*. It is allowed as soon as both sides are single tokens. At each step
the more frequent of the best merge and the best supermerge is made, and a tie goes to the
supermerge.

Ids: 0 to 255 are the bytes themselves, then come the tokens of merges and supermerges in the order
in which they were made, then the special tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import regex  # not re: \p{L} and \p{N} are Unicode's letters and numbers

from shared import (
    fail,
    output_folder,
    parse_args,
    read_text,
    require,
    save_checkpoint,
    save_metrics,
)

# The text is first cut into pre-tokens, by the same pattern as in Part 4.
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

# Only pre-tokens like these may take part in a supermerge: letters with their accents, spaces,
# underscores and apostrophes, and at least one letter. So a superword holds no punctuation, no
# digit and no line end.
JOINABLE = regex.compile(r"(?=.*\p{L})(?:\p{L}\p{M}*|[ _'\u2019])+")

# Limits of what is learned from, so that a step stays cheap.
MAX_WORDS = 30_000  # different pre-tokens, the most frequent ones; the others are left out
MAX_BYTES = 32  # a longer pre-token is counted in pieces of this size
MAX_RUN = 64  # pre-tokens in a row; a longer run without punctuation is cut, also in encoding
MAX_TEXT = 8_000_000  # characters; of a longer text only the beginning is learned from

SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]


@dataclass
class Config:
    data: str = "stories"  # stories (the built-in world), shakespeare (a download) or a text file
    vocab_size: int = 1024  # tokens in the vocabulary; a small text may give fewer

    # delete a token when one merge uses up at least this share of its occurrences; 0: never
    delete_at: float = 0.0

    # a text that is shown as tokens; empty: the beginning of the held-out text
    text: str = ""

    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        least = 256 + len(SPECIAL)
        assert self.vocab_size >= least, (
            f"vocab_size={self.vocab_size} must be at least {least}: 256 bytes and "
            f"{len(SPECIAL)} special tokens"
        )


# text -> pre-tokens -> runs -----------------------------------------------------------------------


def split(text):
    """The pre-tokens of a text. Joined, they are the text again.

    "Hello world's 2026" -> ["Hello", " world", "'s", " ", "2", "0", "2", "6"]
    """
    # JSON can carry half of a surrogate pair, which has no UTF-8 form. Replace it.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return regex.findall(PATTERN, text)


def runs_of(pretokens):
    """Groups pre-tokens that may be joined -> a list of runs, each a list of bytes.

    ["the", " king", ",", " my", " lord"] -> [[b"the", b" king"], [b","], [b" my", b" lord"]]

    A pre-token that must not be joined is a run of its own. Joined, the runs are the text again.
    """
    runs = []
    is_open = False  # may the next pre-token go into the last run?
    joinable = {}  # most pre-tokens occur many times, so the pattern is matched once for each
    for pretoken in pretokens:
        if pretoken not in joinable:
            joinable[pretoken] = JOINABLE.fullmatch(pretoken) is not None

        if joinable[pretoken] and is_open and len(runs[-1]) < MAX_RUN:
            runs[-1].append(pretoken.encode("utf-8"))
        else:
            runs.append([pretoken.encode("utf-8")])
        is_open = joinable[pretoken]
    return runs


def count_words(pretokens):
    """How often each different pre-token occurs -> Counter of bytes. Those that are longer than
    MAX_BYTES are counted in pieces."""
    counts = Counter()
    for word, frequency in Counter(pretokens).items():
        data = word.encode("utf-8")
        for start in range(0, len(data), MAX_BYTES):
            counts[data[start : start + MAX_BYTES]] += frequency
    return counts


# sequences of tokens ------------------------------------------------------------------------------


def pairs(sequence):
    """The neighbouring pairs in a list of tokens: one entry per possible merge.

    [a, b, a, b] -> [(a, b), (b, a), (a, b)]
    [a, a, a]    -> [(a, a)], because the a in the middle can be merged only once
    """
    found = []
    previous = None
    for pair in zip(sequence, sequence[1:]):
        if pair == previous:  # a run of one token: the previous pair already uses the left one
            previous = None
        else:
            found.append(pair)
            previous = pair
    return found


def merge(sequence, pair):
    """Replaces every occurrence of the pair in a list of tokens by one token, from left to right.

    merge([b"a", b"a", b"a", b"b"], (b"a", b"a")) -> [b"aa", b"a", b"b"]
    """
    left, right = pair
    merged = []
    for token in sequence:
        if token == right and merged and merged[-1] == left:
            merged[-1] += token  # now longer than left, so it cannot be merged twice
        else:
            merged.append(token)
    return merged


def shatter(sequence, token):
    """Replaces every occurrence of the token in a list of tokens by its single bytes.

    shatter([b"x", b"abc"], b"abc") -> [b"x", b"a", b"b", b"c"]
    """
    pieces = []
    for piece in sequence:
        if piece == token:
            pieces.extend(bytes([b]) for b in piece)
        else:
            pieces.append(piece)
    return pieces


class PairCounts:
    """Sequences of tokens, how often each of them occurs, and how often each pair of neighbours
    occurs in all of them.

    Both kinds of merges are learned with one of these. For merges the sequences are the different
    pre-tokens, as lists of bytes. For supermerges they are the different runs, as lists of
    pre-tokens.

    A merge costs only what it changes: `where` says which sequences contain a pair, and a pair
    whose count changed is pushed on the heap again. Its old entry is dropped when it comes to the
    top.

    blocker(pair) is the token that the pair has to wait for, or None if the pair may be merged.
    A pair that has to wait is put aside, and comes back with release(token).
    """

    def __init__(self, sequences, frequencies, blocker):
        self.sequences = sequences
        self.frequencies = frequencies
        self.blocker = blocker
        self.waiting = defaultdict(list)  # token -> the pairs that wait for it
        self.counts = defaultdict(int)  # pair -> how often it occurs
        self.where = defaultdict(set)  # pair -> indices of the sequences that contain it
        for i, sequence in enumerate(sequences):
            for pair in pairs(sequence):
                self.counts[pair] += frequencies[i]
                self.where[pair].add(i)

        # Python's heap gives the smallest first, so the counts in it are negative.
        self.heap = [(-count, pair) for pair, count in self.counts.items() if count > 1]
        heapify(self.heap)

    def push(self, pair):
        if self.counts[pair] > 1:
            heappush(self.heap, (-self.counts[pair], pair))

    def best(self):
        """The most frequent pair that may be merged. Of equals it is the one whose (left, right)
        bytes sort first. None if no such pair occurs twice."""
        while self.heap:
            count, pair = self.heap[0]
            is_stale = -count != self.counts[pair]
            blocker = None if is_stale else self.blocker(pair)
            if blocker is not None:
                self.waiting[blocker].append(pair)
            if not is_stale and blocker is None:
                return pair
            heappop(self.heap)
        return None

    def release(self, token):
        """The pairs that wait for this token may try again."""
        for pair in self.waiting.pop(token, []):
            self.push(pair)

    def merge(self, pair):
        """Merges the pair in all sequences."""
        changes = {}
        for i in self.where.pop(pair):
            changes[i] = merge(self.sequences[i], pair)
        self.replace(changes)

    def shatter(self, token):
        """Replaces the token by its bytes in all sequences."""
        changes = {}
        for i, sequence in enumerate(self.sequences):
            if token in sequence:
                changes[i] = shatter(sequence, token)
        self.replace(changes)

    def replace(self, changes):
        """changes: {index: the new sequence}. Brings the counts of pairs up to date."""
        changed = defaultdict(int)
        for i, sequence in changes.items():
            for pair in pairs(self.sequences[i]):
                changed[pair] -= self.frequencies[i]
            for pair in pairs(sequence):
                changed[pair] += self.frequencies[i]
                self.where[pair].add(i)
            self.sequences[i] = sequence

        for pair, difference in changed.items():
            self.counts[pair] += difference
            if difference:
                self.push(pair)


# learning -----------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One merge inside of words, and what follows from it."""

    pair: tuple  # (left, right)
    count: int  # how often the pair occurred
    is_word: bool  # whether a whole pre-token has become one token
    deleted: list  # the tokens that are deleted after it


def learn_words(word_counts, size, delete_at=0.0):
    """Plain BPE: merges inside of pre-tokens until there are `size` tokens -> a list of Steps.

    With deletions (PickyBPE, Chizhov et al. 2024): a merge of a and b that uses up a share of at
    least delete_at of all a makes a superfluous. Its remaining occurrences fall apart into bytes,
    and its place in the vocabulary is free again. The same holds for b. Single bytes stay.
    """
    # The different pre-tokens as lists of bytes, the most frequent first.
    index_of = {}
    sequences = []
    frequencies = []
    for word, frequency in word_counts.most_common(MAX_WORDS):
        index_of[word] = len(sequences)
        sequences.append([bytes([b]) for b in word])
        frequencies.append(frequency)

    # A token can be made again after it was deleted, but never in two ways at once.
    vocabulary = {bytes([i]) for i in range(256)}

    def blocker(pair):
        token = pair[0] + pair[1]
        return token if token in vocabulary else None

    words = PairCounts(sequences, frequencies, blocker)
    occurrences = Counter()  # token -> how often it occurs
    for word, frequency in zip(sequences, frequencies):
        for token in word:
            occurrences[token] += frequency

    steps = []
    while len(vocabulary) < size:
        pair = words.best()
        if pair is None:
            break
        left, right = pair
        token = left + right
        count = words.counts[pair]

        # Which of the two sides has hardly any other use? (Intersection over self, IoS.)
        deleted = []
        for part in dict.fromkeys(pair):  # each once, also if left and right are equal
            share = count / occurrences[part]
            if delete_at > 0 and len(part) > 1 and share >= delete_at:
                deleted.append(part)

        words.merge(pair)
        vocabulary.add(token)
        occurrences[left] -= count
        occurrences[right] -= count
        occurrences[token] += count

        for part in deleted:
            words.shatter(part)
            vocabulary.remove(part)
            for b in part:
                occurrences[bytes([b])] += occurrences[part]
            occurrences[part] = 0
            words.release(part)

        is_word = token in index_of and sequences[index_of[token]] == [token]
        steps.append(Step(pair, count, is_word, deleted))
    return steps


class Event(NamedTuple):
    """What happened to the vocabulary. Encoding replays the events in their order."""

    kind: str  # merge, supermerge or delete
    left: bytes  # the left side of the pair, or the deleted token
    right: bytes = b""  # the right side of the pair; empty for a deletion


def learn(text, size, supermerges=True, delete_at=0.0):
    """Learns from a text until there are `size` tokens, bytes included -> a list of Events.
    supermerges=False is plain BPE. It stops early when no pair occurs twice.

    Supermerges change nothing inside of words, so all merges can be learned first, with their
    counts. Then they are played again beside the supermerges, and the larger count goes first
    ("Faster Superword Tokenization", arXiv 2604.05192).
    """
    pretokens = split(text[:MAX_TEXT])
    steps = learn_words(count_words(pretokens), size, delete_at)

    # The different runs as lists of pre-tokens. A single pre-token has no neighbour to join.
    sequences = []
    frequencies = []
    if supermerges:
        run_counts = Counter(tuple(run) for run in runs_of(pretokens) if len(run) > 1)
        for run, frequency in run_counts.items():
            sequences.append(list(run))
            frequencies.append(frequency)

    # A supermerge has to wait until both sides are single tokens. Those of one byte always are.
    vocabulary = {bytes([i]) for i in range(256)}
    unlocked = {bytes([i]) for i in range(256)}

    def blocker(pair):
        for side in pair:
            if side not in unlocked:
                return side
        token = pair[0] + pair[1]
        return token if token in vocabulary else None

    runs = PairCounts(sequences, frequencies, blocker)
    events = []
    next_step = 0
    while len(vocabulary) < size:
        step = steps[next_step] if next_step < len(steps) else None
        super_pair = runs.best()
        if step is None and super_pair is None:
            break

        # The larger count goes first. A tie goes to the supermerge.
        step_count = step.count if step is not None else 0
        super_count = runs.counts[super_pair] if super_pair is not None else 0
        if super_count >= step_count:
            token = super_pair[0] + super_pair[1]
            events.append(Event("supermerge", *super_pair))
            vocabulary.add(token)
            unlocked.add(token)
            runs.merge(super_pair)
            continue

        token = step.pair[0] + step.pair[1]
        next_step += 1
        events.append(Event("merge", *step.pair))
        vocabulary.add(token)
        if step.is_word:
            unlocked.add(token)
            runs.release(token)

        # A deleted token is not a single token any more, so its supermerges wait again.
        for part in step.deleted:
            events.append(Event("delete", part))
            vocabulary.remove(part)
            unlocked.discard(part)
    return events


# encoding and decoding ----------------------------------------------------------------------------


def first_after(indices, now):
    """The first of some increasing indices that is larger than `now`, or None."""
    place = bisect_right(indices, now)
    return indices[place] if place < len(indices) else None


def replay(sequence, events, merges, deletions):
    """Applies events to a list of tokens, in the order in which they were learned -> the new list.

    merges: {pair: indices of the events that merge it}. deletions: {token: indices of the events
    that delete it}. An event that lies before the last one that was applied is over: a deleted
    token must not be made again by its old merge.
    """
    now = -1
    while True:
        # Which events apply to the list as it is now?
        upcoming = []
        for pair in zip(sequence, sequence[1:]):
            upcoming.append(first_after(merges.get(pair, ()), now))
        for token in sequence:
            upcoming.append(first_after(deletions.get(token, ()), now))

        upcoming = [index for index in upcoming if index is not None]
        if not upcoming:
            return sequence

        # Apply the first of them.
        now = min(upcoming)
        event = events[now]
        if event.kind == "delete":
            sequence = shatter(sequence, event.left)
        else:
            sequence = merge(sequence, (event.left, event.right))


class Tokenizer:
    def __init__(self, events, special=SPECIAL):
        """events: what learn() returned. special: names of special tokens, which come last."""
        self.events = [Event(*event) for event in events]
        self.merges = defaultdict(list)  # pair -> indices of the events
        self.supermerges = defaultdict(list)  # pair -> indices of the events
        self.deletions = defaultdict(list)  # token -> indices of the events
        self.superwords = set()

        # The tokens that are left at the end, in the order in which they were made.
        alive = {bytes([i]): True for i in range(256)}
        for index, event in enumerate(self.events):
            pair = (event.left, event.right)
            token = event.left + event.right
            if event.kind == "delete":
                self.deletions[token].append(index)
                del alive[token]
                continue
            if event.kind == "merge":
                self.merges[pair].append(index)
            else:
                self.supermerges[pair].append(index)
                self.superwords.add(token)
            alive[token] = True

        self.ranks = {token: i for i, token in enumerate(alive)}
        self.special = {name: len(self.ranks) + i for i, name in enumerate(special)}
        self.tokens = list(self.ranks) + [name.encode("utf-8") for name in special]
        self.vocab_size = len(self.tokens)  # what was really learned, not what was asked for

        # The bytes of text behind each id, for nats per byte. A special token stands for no text.
        self.n_bytes = [len(token) for token in self.ranks] + [0] * len(special)
        self.known_words = {}  # pre-token -> its ids; most pre-tokens of a text occur many times

    @classmethod
    def train(cls, text, vocab_size, supermerges=True, delete_at=0.0, special=SPECIAL):
        """A tokenizer for this text. vocab_size counts bytes, tokens and special tokens; a small
        text may end with a smaller vocabulary. supermerges=False is plain BPE."""
        size = vocab_size - len(special)
        assert size >= 256, (
            f"vocab_size={vocab_size} must be at least {256 + len(special)} (bytes and specials)"
        )
        return cls(learn(text, size, supermerges, delete_at), special)

    def encode(self, text):
        """Text -> list of ids. A user who types "<|end|>" gets plain text, not the special id.

        A supermerge joins whole pre-tokens, whatever they look like inside. So the supermerges come
        first, and each pre-token that no supermerge has joined is then encoded by itself. That a
        supermerge was learned means that both sides were single tokens at that moment, in this text
        as in the training text, because the same pre-token goes through the same merges everywhere.
        """
        ids = []
        for run in runs_of(split(text)):
            if len(run) > 1:
                run = replay(run, self.events, self.supermerges, {})
            for piece in run:
                if piece in self.superwords:
                    ids.append(self.ranks[piece])
                else:
                    ids.extend(self.encode_word(piece))
        return ids

    def encode_word(self, word):
        """One pre-token (bytes) -> list of ids."""
        if word not in self.known_words:
            tokens = [bytes([b]) for b in word]
            tokens = replay(tokens, self.events, self.merges, self.deletions)
            self.known_words[word] = [self.ranks[token] for token in tokens]
        return self.known_words[word]

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
        events = []
        for event in self.events:
            # torch's safe loader refuses empty bytes, so a deletion is saved without its right side
            events.append(list(event) if event.right else [event.kind, event.left])
        return {"events": events, "special": list(self.special)}

    @classmethod
    def load(cls, state):
        """The tokenizer that state() described."""
        return cls(state["events"], state["special"])


# the command line ---------------------------------------------------------------------------------


def load_texts(data):
    """--data -> training text and held-out text. The world has files for both; of any other text
    the last 10 % are held out."""
    if data == "stories":
        folder = require("data/stories")
        return read_text(folder / "train.txt"), read_text(folder / "val.txt")
    text = read_text(data)
    n_train = int(0.9 * len(text))
    return text[:n_train], text[n_train:]


def bytes_per_token(tok, text):
    """The mean number of bytes that a token of this text stands for."""
    return len(text.encode("utf-8")) / len(tok.encode(text))


def show_tokens(tok, text):
    """A text as its tokens, with bars between them, on one line."""
    pieces = []
    for i in tok.encode(text):
        pieces.append(tok.token_bytes(i).decode("utf-8", errors="replace"))
    return "|".join(pieces).replace("\n", "\\n")


def superwords_by_use(tok, text):
    """The superwords that occur in a text, the most frequent first -> [(superword, how often)]."""
    counts = Counter()
    for i in tok.encode(text):
        token = tok.token_bytes(i)
        if token in tok.superwords:
            counts[token.decode("utf-8")] += 1
    return counts.most_common()


if __name__ == "__main__":
    cfg = parse_args(Config)
    train_text, val_text = load_texts(cfg.data)

    # BoundlessBPE, and plain BPE of the same size beside it
    start = time.process_time()
    tok = Tokenizer.train(train_text, cfg.vocab_size, delete_at=cfg.delete_at)
    seconds = time.process_time() - start
    plain = Tokenizer.train(train_text, cfg.vocab_size, supermerges=False)
    if not tok.events and cfg.vocab_size > 256 + len(SPECIAL):
        fail(f"--data={cfg.data} is too small: no pair of neighbours occurs twice in it")
    out = output_folder(cfg)

    # what it found
    kinds = Counter(event.kind for event in tok.events)
    print(
        f"{tok.vocab_size:,} tokens in {seconds:.1f} s of processor time: 256 bytes, "
        f"{kinds['merge']:,} merges, {kinds['supermerge']:,} supermerges, "
        f"{kinds['delete']:,} deletions, "
        f"{len(tok.special)} special tokens"
    )
    first = [(e.left + e.right).decode() for e in tok.events if e.kind == "supermerge"]
    longest = sorted(first, key=len, reverse=True)
    by_use = superwords_by_use(tok, val_text)
    print("the first superwords:", *[repr(superword) for superword in first[:8]])
    print("the longest:", *[repr(superword) for superword in longest[:4]])
    print("the most frequent in held-out text:", *[f"{s!r} {n}" for s, n in by_use[:8]])

    # what it buys
    rates = {}
    for name, text in (("training", train_text), ("held-out", val_text)):
        bpe = bytes_per_token(plain, text)
        boundless = bytes_per_token(tok, text)
        rates[name] = {"bpe": bpe, "boundless": boundless}
        print(
            f"bytes per token of {name} text: {bpe:.3f} with BPE ({plain.vocab_size:,} tokens), "
            f"{boundless:.3f} with BoundlessBPE ({boundless / bpe - 1:+.1%})"
        )
    sample = cfg.text or val_text[:200]
    print(show_tokens(tok, sample))

    save_checkpoint(
        out / "boundless.pt", kind="boundless", changed=cfg.changed, tokenizer=tok.state()
    )
    save_metrics(
        out,
        name="boundless",
        vocab_size=tok.vocab_size,
        bpe_vocab_size=plain.vocab_size,
        events=dict(kinds),
        bytes_per_token=rates,
        first=first[:50],
        longest=longest[:50],
        most_frequent=by_use[:50],
        seconds=seconds,
    )
    print(f"wrote {out / 'boundless.pt'}")
