"""
Part 10: the tokenizer that Part 4 trained, loaded from a checkpoint.

From part_9/tokenizer.py

    tok = Tokenizer.load(checkpoint["tokenizer"])
    ids = tok.encode("Once upon a time")
    tok.decode(ids) == "Once upon a time"   # True for every text

Ids: 0 to 255 are the bytes themselves, then come the merges in the order in which they were
learned, then the special tokens.
"""

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

SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]

# The chat template. A conversation is start, request, answer, what the model answers, end; then
# next, request, answer, and so on. These are texts with the names of special tokens in them, and
# the end is the name of one special token.
TEMPLATE = {
    "start": "<|user|>",
    "answer": "<|assistant|>",
    "end": "<|end|>",
    "next": "<|user|>",
}


class Tokenizer:
    def __init__(self, ranks, special=SPECIAL, pattern=PATTERN, template=TEMPLATE):
        """ranks: a dict token (bytes) -> id, the 256 bytes first, without gaps.
        special: names of special tokens, which get the next ids.
        pattern: the regular expression that cuts a text into pre-tokens.
        template: the texts around the messages of a conversation, as in TEMPLATE."""
        self.special = {name: len(ranks) + i for i, name in enumerate(special)}
        self.ranks = ranks
        self.pattern = pattern
        self.template = template
        self.end = self.special.get(template["end"])  # the id of the token that ends an answer
        self.tokens = sorted(ranks, key=ranks.get) + [name.encode("utf-8") for name in special]
        self.vocab_size = len(self.tokens)  # what was really merged, not what was asked for

        # The bytes of text behind each id, for nats per byte. A special token stands for no text.
        self.n_bytes = [len(token) for token in self.tokens[: len(ranks)]] + [0] * len(special)
        self.encoding = tiktoken.Encoding(
            "bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special
        )

    def encode(self, text):
        """Text -> list of ids. A user who types "<|end|>" gets plain text, not the special id."""
        return self.encoding.encode_ordinary(text)

    def chat_prompt(self, text):
        """A request in the chat template -> list of ids. The answer comes right after them."""
        before = self.encoding.encode(self.template["start"], allowed_special="all")
        after = self.encoding.encode(self.template["answer"], allowed_special="all")
        return [*before, *self.encode(text), *after]

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
            "template": self.template,
        }

    @classmethod
    def load(cls, state):
        """The tokenizer that state() described."""
        ranks = {token: i for i, token in enumerate(state["tokens"])}
        pattern = state.get("pattern", PATTERN)  # older checkpoints do not name it
        template = state.get("template", TEMPLATE)  # nor do those of a base model
        return cls(ranks, state["special"], pattern, template)
