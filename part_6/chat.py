"""
Part 6: talk to a model, in the terminal or on a page in the browser.

    python part_6/chat.py                                   the model of this part
    python part_6/chat.py --port=8000                       a page at http://127.0.0.1:8000
    python part_6/chat.py --model=part_8/out/ppo.pt         the model of a later part
    python part_6/chat.py --model=part_10/out/smollm2.pt    a model that people use
    python part_6/chat.py --prompt="What is a fox?"         one answer, and the program ends

Starts here. model.py and tokenizer.py are used as they are.

A chat is nothing but one long text. The chat template puts the questions and the answers into one
sequence of tokens, the model continues it token by token, and the program stops when the model
draws the end token. The model keeps nothing in mind between two answers: it reads the whole
conversation again each time, as far as it fits into its context.

The page is chat.html. It shows for every token how likely the model thought it was, and which
tokens the model would have liked as well.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import codecs
import importlib
import json
import re
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import torch

from model import GPT, KVCache, sample
from shared import as_json, fail, load_checkpoint, parse_args, pick_device, require, set_seed
from tokenizer import TEMPLATE, Tokenizer

# The language models with a tokenizer, from Part 4 on. Part 10 writes real models as "base".
KINDS = ("base", "gpt", "sft", "reinforce", "ppo", "grpo", "dpo")

HOST = "127.0.0.1"  # only this computer can open the page
PAGE = Path(__file__).resolve().parent / "chat.html"
LONGEST_REQUEST = 1_000_000  # bytes of one request of the page


@dataclass
class Config:
    model: str = "part_6/out/sft.pt"  # checkpoint of Parts 6 to 9, or of part_10/weights.py
    prompt: str = ""  # answer this once and end; empty: a conversation
    port: int = 0  # serve a page at this port of 127.0.0.1; 0: talk in the terminal
    temperature: float = 0.7  # below 1 likely tokens become likelier; 0: always the likeliest
    top_k: int = 0  # draw among this many likeliest tokens; 0: all
    top_p: float = 0.9  # draw among the likeliest tokens that have this probability together
    max_new_tokens: int = 400  # longest answer, in tokens

    # earlier questions and answers that the model reads again, at most; -1: all that fit, but none
    # for the models of this course, which were trained on single questions
    turns: int = -1

    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available

    def __post_init__(self):
        assert 0 <= self.port <= 65535, f"port={self.port} must be from 1 to 65535"
        assert self.turns >= -1, f"turns={self.turns} must be -1 or more"
        assert self.max_new_tokens > 0, f"max_new_tokens={self.max_new_tokens} must be at least 1"
        for name in KNOBS:
            value = getattr(self, name)
            assert check_knob(name, value) is not None, (
                f"{name}={value} must be {KNOBS[name].wanted}"
            )


class Knob(NamedTuple):
    """A setting that can be changed during a conversation."""

    whole: bool  # whether it must be a whole number
    low: float
    high: float
    wanted: str  # what is allowed, in words


KNOBS = {
    "temperature": Knob(False, 0, 100, "a number from 0 to 100"),
    "top_k": Knob(True, 0, 1_000_000, "a whole number from 0 (all tokens) to 1000000"),
    "top_p": Knob(False, 0, 1, "a number from 0 to 1"),
}


def check_knob(name, value):
    """The value of a knob, or None if it is not one that is allowed."""
    knob = KNOBS[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not knob.low <= value <= knob.high:
        return None
    if knob.whole:
        return int(value) if value == int(value) else None
    return value


def read_knob(name, text):
    """The same for what a user typed."""
    if not re.fullmatch(r"\d{1,9}(\.\d{0,20})?|\.\d{1,20}", text):
        return None
    return check_knob(name, float(text))


# the chat template --------------------------------------------------------------------------------

# TEMPLATE of tokenizer.py is how our own models are asked: start + question, then answer + what the
# model answers + end, then next + the next question, and so on. The checkpoint of a real model
# brings a template of its own.

# A base model was never asked anything. It continues a text, up to the end of the document.
BASE_TEMPLATE = {"start": "", "answer": "", "end": "<|endoftext|>", "next": ""}


class Turn(NamedTuple):
    question: str
    answer: str


class Chat(NamedTuple):
    """Everything that is needed to talk to a model."""

    model: GPT
    tok: Tokenizer
    template: dict

    @property
    def only_continues(self):
        """Whether this is a base model, for which there are no questions and answers."""
        return not self.template["answer"]

    @property
    def knows_single_questions(self):
        """Whether this is a model of this course, trained on one question and one answer."""
        return self.template == TEMPLATE

    @property
    def stop(self):
        """The id of the token that ends an answer, or -1 if there is none."""
        return self.tok.special.get(self.template["end"], -1)


def open_chat(checkpoint, path, device):
    """A checkpoint -> Chat."""
    if "tokenizer" not in checkpoint:
        fail(f"{path} has no tokenizer: models with one come from Part 4 on")
    tok = Tokenizer.load(checkpoint["tokenizer"])

    # Only the language model: the value head of a trainer has no place in a chat.
    weights = {}
    for name, tensor in checkpoint["weights"].items():
        if name.startswith(("wte.", "h.", "ln_f.", "lm_head.")):
            weights[name] = tensor
    model = GPT.load({"gpt_config": checkpoint["gpt_config"], "weights": weights})

    is_base = checkpoint["kind"] in ("base", "gpt")
    template = BASE_TEMPLATE if is_base else TEMPLATE
    template = checkpoint["tokenizer"].get("template", template)
    if template["answer"] and template["end"] not in tok.special:
        fail(f"{path}: the tokenizer has no token {template['end']}, which ends an answer")
    return Chat(model.to(device).eval(), tok, template)


def encode_chat(chat, turns, question):
    """Earlier turns and a new question in the chat template -> token ids. The answer comes next.

    The names of special tokens in the template become these tokens. In what people and models
    write they do not: a user who types "<|end|>" cannot end anything.
    """

    def special(name):
        return chat.tok.encoding.encode(chat.template[name], allowed_special="all")

    ids = special("start")
    for turn in turns:
        ids += chat.tok.encode(turn.question) + special("answer")
        ids += chat.tok.encode(turn.answer) + special("end") + special("next")
    return ids + chat.tok.encode(question) + special("answer")


class Prompt(NamedTuple):
    ids: list  # tokens to continue
    dropped: int  # number of oldest turns that the model does not see


def make_prompt(chat, turns, question, max_new_tokens):
    """As much of the conversation as fits -> Prompt.

    The oldest turns are dropped until there is room for an answer: for max_new_tokens, or at least
    for half of the context. A question that does not fit even alone gives a prompt that is too
    long.
    """
    block_size = chat.model.cfg.block_size
    room = min(max_new_tokens, block_size // 2)

    dropped = 0
    ids = encode_chat(chat, turns, question)
    while dropped < len(turns) and len(ids) > block_size - room:
        dropped += 1
        ids = encode_chat(chat, turns[dropped:], question)
    return Prompt(ids, dropped)


def problem_with(chat, prompt):
    """One line that says why a prompt cannot be answered, or None."""
    block_size = chat.model.cfg.block_size
    if not prompt.ids:
        return "the text is empty: the first token needs one before it"
    if len(prompt.ids) >= block_size:
        return (
            f"the message has {len(prompt.ids)} tokens and the model can read {block_size}, "
            "answer included: shorten it"
        )
    return None


def describe_dropped(dropped, block_size):
    """One line about the turns that the model does not see."""
    turns = "turn" if dropped == 1 else f"{dropped} turns"
    return f"the oldest {turns} of this conversation did not fit into {block_size} tokens: dropped"


# one token after the other ------------------------------------------------------------------------


class Drawn(NamedTuple):
    """A token, and what the model thought of it before any knob changed the probabilities."""

    id: int
    p: float  # its probability
    rank: int  # 1 for the likeliest token, 2 for the next one, ...
    others: list  # the likeliest other tokens, as (id, probability), the likeliest first


def describe(logits, drawn, n_others=5):
    """logits (V,) and the id of the drawn token -> Drawn."""
    p = logits.float().softmax(dim=-1)  # (V,)
    rank = int((p > p[drawn]).sum()) + 1
    top = p.topk(min(n_others + 1, len(p)))
    others = []
    for other, other_p in zip(top.indices.tolist(), top.values.tolist()):
        if other != drawn and len(others) < n_others:
            others.append((other, other_p))
    return Drawn(drawn, p[drawn].item(), rank, others)


@torch.no_grad()
def stream(model, prompt, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=-1):
    """Continues a list of token ids, and yields each token (Drawn) as soon as it is drawn, up to
    and including the stop token, and never beyond block_size.

    GPT.generate gives whole answers. This is the same loop for one row: with the same seed it draws
    the same tokens. The prompt is read in one forward pass. After that each token needs a forward
    pass of its own alone, because the cache holds the keys and values of everything before it.
    """
    assert len(prompt) > 0, "the prompt is empty: the first token needs one before it"
    weight = model.wte.weight
    cache = KVCache(model.cfg, 1, weight.device, weight.dtype)
    end = min(len(prompt) + max_new_tokens, model.cfg.block_size)
    new = torch.tensor([prompt], device=weight.device)  # (1, T)

    for _ in range(len(prompt), end):
        logits, _ = model(new, cache=cache)
        logits = logits[:, -1]  # (1, V)
        drawn = sample(logits, temperature, top_k, top_p)  # (1,)
        yield describe(logits[0], drawn.item())
        if drawn.item() == stop:
            return
        new = drawn[:, None]  # (1, 1)


class Piece(NamedTuple):
    """A drawn token together with the text that it completes."""

    drawn: Drawn
    text: str  # empty if the token ends within a character, and for the end token


def write(chat, prompt, cfg, **knobs):
    """Answers a prompt, and yields a Piece for each token.

    A character can have up to four bytes, and a token may end between them. So the text of a token
    is what has become complete with it: the decoder keeps the rest until the next token. Half a
    character at the very end is left out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    tokens = stream(chat.model, prompt.ids, cfg.max_new_tokens, **knobs, stop=chat.stop)
    for drawn in tokens:
        text = ""
        if drawn.id != chat.stop:
            text = decoder.decode(chat.tok.token_bytes(drawn.id))
        yield Piece(drawn, text)


def knobs_of(cfg):
    """{name: value} of the settings that can be changed during a conversation."""
    return {name: getattr(cfg, name) for name in KNOBS}


# the terminal -------------------------------------------------------------------------------------

HELP = """\
/temperature 0.7   how daring the choice is: 0 always takes the likeliest token
/top_k 40          draw among the 40 likeliest tokens; 0: all
/top_p 0.9         draw among the likeliest tokens that have 0.9 of the probability together
/reset             forget the conversation
/quit              end the program, like Ctrl-D
Ctrl-C             stop an answer"""

# A model may write any byte. In a terminal, control characters would move the cursor or change the
# colours, so all of them but the line break and the tab are shown as U+FFFD.
CONTROL = dict.fromkeys([*range(32), *range(127, 160)], "\ufffd")
CONTROL |= {ord("\n"): "\n", ord("\t"): "\t"}


class Terminal:
    """A conversation in the terminal. Ctrl-C stops an answer, and not the program."""

    def __init__(self, chat, cfg):
        self.chat = chat
        self.cfg = cfg
        self.turns = []
        self.answering = False
        self.stopped = False

    def on_interrupt(self, signal_number, frame):
        """The signal handler for Ctrl-C. The answer looks at `stopped` after each token."""
        if self.answering:
            self.stopped = True
        else:
            print("\n/quit or Ctrl-D ends the program\n> ", end="", flush=True)

    def run(self):
        """Reads lines until /quit or the end of the input."""
        signal.signal(signal.SIGINT, self.on_interrupt)

        # With this module, which Windows lacks, the arrow keys edit the line and bring back others.
        with suppress(ImportError):
            importlib.import_module("readline")

        print("/help lists the commands")
        while True:
            # input() raises EOFError at the end of the input, and then there is no line.
            line = None
            with suppress(EOFError):
                line = input("> ").strip()
            if line is None:
                print()
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                print(self.command(line))
            elif line:
                self.answer(line)

    def command(self, line):
        """Obeys a line that begins with a slash -> what to print."""
        name, _, value = line[1:].partition(" ")
        value = value.strip()
        if name == "help":
            return HELP
        if name == "reset":
            self.turns = []
            return "the conversation starts again"
        if name not in KNOBS:
            return f"there is no command /{name}, /help lists all of them"
        if not value:
            return f"{name} is {getattr(self.cfg, name)}"

        number = read_knob(name, value)
        if number is None:
            return f"/{name} wants {KNOBS[name].wanted}, got {value!r}"
        setattr(self.cfg, name, number)
        return f"{name} is {number}"

    def answer(self, question):
        """Prints the answer to a question while it is being written, and remembers both."""
        self.turns = kept_turns(self.chat, self.turns, self.cfg)
        prompt = make_prompt(self.chat, self.turns, question, self.cfg.max_new_tokens)
        problem = problem_with(self.chat, prompt)
        if problem:
            print(f"({problem})")
            return
        if prompt.dropped:
            self.turns = self.turns[prompt.dropped :]
            print(f"({describe_dropped(prompt.dropped, self.chat.model.cfg.block_size)})")

        self.answering = True
        self.stopped = False
        text, line = self.print_answer(prompt)
        self.answering = False
        print(f"\n({line})")
        self.turns.append(Turn(question, text))

    def print_answer(self, prompt):
        """Prints the answer token by token -> its text, and a line about its speed."""
        texts = []
        count = 0
        start = time.time()
        for piece in write(self.chat, prompt, self.cfg, **knobs_of(self.cfg)):
            texts.append(piece.text)
            count += 1
            print(piece.text.translate(CONTROL), end="", flush=True)
            if self.stopped:
                break
        speed = count / max(time.time() - start, 1e-9)

        ended = count > 0 and piece.drawn.id == self.chat.stop
        line = f"{count} tokens, {speed:.1f} per second"
        if self.stopped:
            line += ", stopped"
        elif not ended:
            line += ", cut off: it may not be longer"
        return "".join(texts), line


def kept_turns(chat, turns, cfg):
    """The earlier turns that the model may see, as far as they fit."""
    if chat.only_continues or cfg.turns == 0:
        return []
    if cfg.turns == -1:
        return [] if chat.knows_single_questions else turns
    return turns[-cfg.turns :]


# the page -----------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What the page sends for one answer."""

    question: str
    turns: list  # the conversation so far, as Turns
    knobs: dict


def read_request(body):
    """The bytes that the page sent -> Request, or None if they are something else."""
    content = None
    with suppress(ValueError):
        content = json.loads(body)
    if not isinstance(content, dict) or not isinstance(content.get("question"), str):
        return None
    if not isinstance(content.get("turns"), list):
        return None

    turns = []
    for pair in content["turns"]:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            return None
        turns.append(Turn(*pair))

    knobs = {}
    for name in KNOBS:
        value = check_knob(name, content.get(name))
        if value is None:
            return None
        knobs[name] = value
    return Request(content["question"], turns, knobs)


def spell(chat, i):
    """How the page shows a token by itself: its text, or its bytes if they are half a character, as
    "<0xF0><0x9F>"."""
    token = chat.tok.token_bytes(i)
    text = token.decode("utf-8", errors="replace")
    if "\ufffd" in text:
        return "".join(f"<0x{byte:02X}>" for byte in token)
    return text


def as_message(chat, piece):
    """A Piece -> what the page gets for it: one line of JSON is one token."""
    others = [[spell(chat, i), p] for i, p in piece.drawn.others]
    return {
        "text": piece.text,
        "token": spell(chat, piece.drawn.id),
        "end": piece.drawn.id == chat.stop,
        "p": piece.drawn.p,
        "rank": piece.drawn.rank,
        "others": others,
    }


class Server(ThreadingHTTPServer):
    """Each request has a thread of its own, and one answer is written at a time."""

    daemon_threads = True  # they end with the program
    lock = threading.Lock()
    chat = None  # Chat, set before the first request is read
    cfg = None


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, GET /model says which model it talks to, and POST /answer is an answer."""

    timeout = 60  # seconds; a browser that hangs must not keep the others waiting

    def do_GET(self):
        if self.is_foreign():
            self.send("403 only for pages of this program\n", "text/plain", status=403)
        elif self.path == "/":
            self.send(PAGE.read_text(encoding="utf-8"), "text/html")
        elif self.path == "/model":
            cfg, chat = self.server.cfg, self.server.chat
            facts = {
                "model": cfg.model,
                "block_size": chat.model.cfg.block_size,
                "vocab_size": chat.tok.vocab_size,
                "params": sum(p.numel() for p in chat.model.parameters()),
                "only_continues": chat.only_continues,
                "reads_history": bool(kept_turns(chat, [Turn("", "")], cfg)),
                "knobs": knobs_of(cfg),
            }
            self.send(as_json(facts), "application/json")
        else:
            self.send("404 there is no such page\n", "text/plain", status=404)

    def do_POST(self):
        # A page of another web site can send us a request, but not with this content type.
        length = self.headers.get("Content-Length", "")
        is_json = self.headers.get("Content-Type") == "application/json"
        if self.path != "/answer" or self.is_foreign() or not is_json:
            self.send("403 only for pages of this program\n", "text/plain", status=403)
            return
        if not re.fullmatch(r"\d{1,9}", length) or int(length) > LONGEST_REQUEST:
            self.send("400 the request is too long\n", "text/plain", status=400)
            return
        request = read_request(self.rfile.read(int(length)))
        if request is None:
            self.send("400 the request is not one of the page's\n", "text/plain", status=400)
            return

        # The browser closes the connection when the user stops an answer. Then writing fails, and
        # the answer ends.
        with suppress(OSError), self.server.lock:
            self.send_head("application/x-ndjson")
            self.send_answer(request)

    def send_answer(self, request):
        """Streams an answer, one line of JSON per token, and at the end its speed."""
        chat, cfg = self.server.chat, self.server.cfg
        turns = kept_turns(chat, request.turns, cfg)
        prompt = make_prompt(chat, turns, request.question, cfg.max_new_tokens)
        problem = problem_with(chat, prompt)
        if problem:
            self.send_line({"problem": problem})
            return
        if prompt.dropped:
            line = describe_dropped(prompt.dropped, chat.model.cfg.block_size)
            self.send_line({"note": line, "kept": len(turns) - prompt.dropped})

        count = 0
        start = time.time()
        for piece in write(chat, prompt, cfg, **request.knobs):
            self.send_line(as_message(chat, piece))
            count += 1
        ended = count > 0 and piece.drawn.id == chat.stop
        speed = count / max(time.time() - start, 1e-9)
        facts = {"tokens": count, "speed": speed, "ended": ended, "prompt_tokens": len(prompt.ids)}
        self.send_line({"done": facts})

    def is_foreign(self):
        """Whether the browser asked for another host's page and was led here by a false address."""
        port = self.server.server_address[1]
        return self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}")

    def send_head(self, kind, status=200):
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def send(self, text, kind, status=200):
        self.send_head(kind, status)
        self.wfile.write(text.encode("utf-8", "replace"))

    def send_line(self, content):
        self.wfile.write(as_json(content).encode("utf-8") + b"\n")

    def log_message(self, *args):
        """Nothing is printed for each request."""


def open_port(port):
    """A Server that holds this port, before anything slow begins."""
    server = None
    with suppress(OSError):
        server = Server((HOST, port), Handler)
    if server is None:
        fail(f"--port={port} is in use, or not allowed here: choose another one")
    return server


def leave(signal_number, frame):
    """The signal handler for Ctrl-C while the page is served."""
    print("\nthe page is closed")
    sys.exit(0)


# main ---------------------------------------------------------------------------------------------


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="replace")

    # port and model: what can be wrong comes first
    server = open_port(cfg.port) if cfg.port else None
    path = require(cfg.model)
    chat = open_chat(load_checkpoint(path, KINDS), cfg.model, device)
    set_seed(cfg.seed)  # after the model, whose first weights are random

    # one answer
    terminal = Terminal(chat, cfg)
    if cfg.prompt:
        prompt = make_prompt(chat, [], cfg.prompt, cfg.max_new_tokens)
        problem = problem_with(chat, prompt)
        if problem:
            fail(problem)
        _, line = terminal.print_answer(prompt)
        print(flush=True)
        print(line, file=sys.stderr)
        sys.exit(0)

    # a conversation
    params = sum(p.numel() for p in chat.model.parameters())
    print(f"{cfg.model}: {params:,} parameters, {chat.model.cfg.block_size} tokens of context")
    if chat.only_continues:
        print("this is a base model: it continues each text, and does not know the ones before it")
    elif chat.knows_single_questions and cfg.turns == -1:
        print(
            "it was trained on single questions and reads no earlier ones; --turns=5 changes that"
        )
    if server is None:
        terminal.run()
    else:
        signal.signal(signal.SIGINT, leave)
        server.chat = chat
        server.cfg = cfg
        print(f"open http://{HOST}:{cfg.port} in a browser; Ctrl-C ends the program", flush=True)
        server.serve_forever()
