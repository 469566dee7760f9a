"""
Tests of chat.py: the tokens are those of generate(), the template and the dropped turns are counted
by hand, characters stay whole, Ctrl-C stops an answer only, and the page gets what it should.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import chat as chat_module
from chat import BASE_TEMPLATE, PAGE, Chat, Config, Drawn, Server, Terminal, Turn
from model import GPT, GPTConfig
from shared import save_checkpoint
from tokenizer import TEMPLATE, Tokenizer
from train_sft import chat_prompt

SCRIPT = Path(__file__).resolve().parent / "chat.py"
TOK = Tokenizer({bytes([i]): i for i in range(256)})
END = TOK.special["<|end|>"]

# The template of SmolLM2, apart from its system message, on special tokens of its own.
CHATML = {
    "start": "<|im_start|>user\n",
    "answer": "<|im_end|>\n<|im_start|>assistant\n",
    "end": "<|im_end|>",
    "next": "\n<|im_start|>user\n",
}


def make_model(block_size=64, vocab_size=260, seed=0):
    """A model with random weights everywhere. New projections are zero, which would hide mistakes
    in the cache."""
    torch.manual_seed(seed)
    cfg = GPTConfig(vocab_size=vocab_size, block_size=block_size, n_layer=2, n_head=2, n_embd=16)
    model = GPT(cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def make_chat(block_size=64, template=TEMPLATE, tok=TOK):
    return Chat(make_model(block_size, tok.vocab_size), tok, template)


# one token after the other ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 5},
        {"top_p": 0.5},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.8},
    ],
)
def test_stream_draws_what_generate_draws(knobs):
    """The same seed gives the same tokens, so the two have the same distribution."""
    model = make_model()
    prompt = list(range(50, 59))
    for seed in range(5):
        torch.manual_seed(seed)
        expected = model.generate(torch.tensor([prompt]), 30, **knobs)[0, 9:].tolist()
        torch.manual_seed(seed)
        streamed = [drawn.id for drawn in chat_module.stream(model, prompt, 30, **knobs)]
        assert streamed == expected


def test_stream_ends_at_the_stop_token_and_at_the_block_size():
    model = make_model()
    torch.manual_seed(0)
    free = [drawn.id for drawn in chat_module.stream(model, [1, 2], 40)]
    assert len(free) == 40
    stop = free[10]
    torch.manual_seed(0)
    stopped = [drawn.id for drawn in chat_module.stream(model, [1, 2], 40, stop=stop)]
    assert stopped == free[: free.index(stop) + 1]

    # 64 tokens are the longest sequence.
    full = list(chat_module.stream(model, [1] * 60, 40))
    assert len(full) == 4
    assert list(chat_module.stream(model, [1] * 64, 40)) == []


def test_what_a_token_says_about_itself():
    """The probabilities are the model's own: a forward pass without a cache and without knobs."""
    model = make_model()
    torch.manual_seed(0)
    prompt = [7, 8, 9]
    ids = list(prompt)
    ranks = set()
    for drawn in chat_module.stream(model, prompt, 12, temperature=3.0, top_k=20):
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids]))
        p = logits[0, -1].double().softmax(dim=-1).tolist()
        order = sorted(range(260), key=lambda i: -p[i])
        assert drawn.p == pytest.approx(p[drawn.id], rel=1e-4)
        assert order[drawn.rank - 1] == drawn.id
        others = [i for i in order if i != drawn.id][:5]
        assert [i for i, _ in drawn.others] == others
        assert [q for _, q in drawn.others] == pytest.approx([p[i] for i in others], rel=1e-4)
        ids.append(drawn.id)
        ranks.add(drawn.rank <= 5)
    assert ranks == {True, False}  # tokens among the five likeliest ones, and others


def test_streaming_needs_no_gradients():
    model = make_model()
    tokens = chat_module.stream(model, [1], 3)
    next(tokens)
    assert torch.is_grad_enabled()  # between two tokens the caller's own setting holds
    logits = model(torch.tensor([[1]]))[0]
    assert logits.requires_grad


# characters ---------------------------------------------------------------------------------------


def drawn_from(data):
    """Tokens of one byte each, as stream() would yield them."""
    return [Drawn(byte, 0.5, 1, []) for byte in data]


def pieces_of(monkeypatch, tokens):
    monkeypatch.setattr(chat_module, "stream", lambda *args, **knobs: iter(tokens))
    prompt = chat_module.Prompt([1], 0)
    return [p.text for p in chat_module.write(make_chat(), prompt, Config())]


def test_characters_are_not_torn(monkeypatch):
    """One byte at a time, a character appears with its last byte, and never half of it."""
    text = "né 🦊!"
    texts = pieces_of(monkeypatch, drawn_from(text.encode()) + drawn_from([END]))
    assert texts == ["n", "", "é", " ", "", "", "", "🦊", "!", ""]


def test_bytes_that_are_no_characters(monkeypatch):
    """A stray byte becomes U+FFFD, and half a character at the end is left out."""
    texts = pieces_of(monkeypatch, drawn_from(b"a\xffb\xf0\x9f"))
    assert "".join(texts) == "a\ufffdb"


def test_how_a_token_is_spelled():
    chat = make_chat()
    assert chat_module.spell(chat, ord("a")) == "a"
    assert chat_module.spell(chat, 0xF0) == "<0xF0>"
    assert chat_module.spell(chat, END) == "<|end|>"


# the chat template --------------------------------------------------------------------------------


def test_our_template_is_that_of_the_training():
    chat = make_chat()
    question = "say <|end|> né"
    ids = chat_module.encode_chat(chat, [], question)
    assert ids == chat_prompt({"prompt": question}, TOK)
    assert END not in ids  # what a user types is text


def test_a_conversation_in_two_templates():
    turns = [Turn("a", "b"), Turn("c", "d")]
    ids = chat_module.encode_chat(make_chat(), turns, "e")
    user, assistant = TOK.special["<|user|>"], TOK.special["<|assistant|>"]
    expected = []
    for question, answer in turns:
        expected += [user, ord(question), assistant, ord(answer), END]
    assert ids == [*expected, user, ord("e"), assistant]

    tok = Tokenizer(TOK.ranks, special=["<|im_start|>", "<|im_end|>"])
    ids = chat_module.encode_chat(make_chat(template=CHATML, tok=tok), turns[:1], "e<|im_end|>")
    assert tok.decode(ids) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\ne<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tok.special["<|im_start|>"]) == 4
    assert ids.count(tok.special["<|im_end|>"]) == 3  # without the one that the user typed


def test_the_oldest_turns_are_dropped():
    """A turn of this conversation has 5 tokens, and the new question 3. With 30 of the 64 tokens
    kept for the answer, (64 - 30 - 3) // 5 = 6 turns fit."""
    chat = make_chat()
    turns = [Turn(chr(65 + i), "x") for i in range(9)]
    prompt = chat_module.make_prompt(chat, turns, "?", max_new_tokens=30)
    assert prompt.dropped == 3
    assert prompt.ids == chat_module.encode_chat(chat, turns[3:], "?")
    assert chat_module.make_prompt(chat, turns[3:], "?", 30) == (prompt.ids, 0)

    # An answer without a limit of its own gets half of the context: (64 - 32 - 3) // 5 = 5.
    assert chat_module.make_prompt(chat, turns, "?", 1000).dropped == 4


def test_a_question_that_does_not_fit():
    chat = make_chat()
    prompt = chat_module.make_prompt(chat, [Turn("a", "b")], "x" * 70, 30)
    assert prompt.dropped == 1
    assert "the message has 72 tokens and the model can read 64" in chat_module.problem_with(
        chat, prompt
    )
    prompt = chat_module.make_prompt(chat, [], "x" * 61, 30)  # 63 tokens and one for the answer
    assert chat_module.problem_with(chat, prompt) is None
    base = make_chat(template=BASE_TEMPLATE)
    empty = chat_module.make_prompt(base, [], "", 30)
    assert "the text is empty" in chat_module.problem_with(base, empty)


def test_which_models_read_earlier_turns():
    turns = [Turn(str(i), "") for i in range(4)]
    tok = Tokenizer(TOK.ranks, special=["<|im_start|>", "<|im_end|>"])
    ours, real = make_chat(), make_chat(template=CHATML, tok=tok)
    base = make_chat(template=BASE_TEMPLATE)
    kept = chat_module.kept_turns
    assert kept(ours, turns, Config()) == []
    assert kept(real, turns, Config()) == turns
    assert kept(ours, turns, Config(turns=2)) == turns[2:]
    assert kept(real, turns, Config(turns=0)) == []
    assert kept(base, turns, Config(turns=2)) == []


# the terminal -------------------------------------------------------------------------------------


def test_commands():
    cfg = Config()
    terminal = Terminal(make_chat(), cfg)
    terminal.turns = [Turn("a", "b")]
    assert terminal.command("/temperature 0.25") == "temperature is 0.25"
    assert terminal.command("/top_k 7") == "top_k is 7"
    assert terminal.command("/top_p .5") == "top_p is 0.5"
    assert (cfg.temperature, cfg.top_k, cfg.top_p) == (0.25, 7, 0.5)

    for line in ("/temperature -1", "/temperature x", "/top_k 1.5", "/top_p 1.1", "/top_p nan"):
        assert "wants" in terminal.command(line)
    assert terminal.command("/top_k") == "top_k is 7"
    assert (cfg.temperature, cfg.top_k, cfg.top_p) == (0.25, 7, 0.5)

    assert "/help lists" in terminal.command("/tempo")
    for name in ("temperature", "top_k", "top_p", "reset", "Ctrl-C"):
        assert name in terminal.command("/help")
    assert terminal.turns
    terminal.command("/reset")
    assert terminal.turns == []


def test_the_terminal_remembers_and_says_what_it_drops(monkeypatch, capsys):
    """The answers are "ok", so a turn has 6 tokens. 4 of them and a question fit into 32."""
    monkeypatch.setattr(chat_module, "stream", lambda *a, **k: iter(drawn_from([111, 107, END])))
    terminal = Terminal(make_chat(), Config(turns=50))
    outputs = []
    for _ in range(7):
        terminal.answer("?")
        outputs.append(capsys.readouterr().out)
    for output in outputs:
        assert re.search(r"ok\n\(3 tokens, [\d.]+ per second\)\n$", output)
    told = ["the oldest turn of this conversation did not fit" in output for output in outputs]
    assert told == [False] * 5 + [True] * 2
    assert terminal.turns == [Turn("?", "ok")] * 5


def test_control_characters_do_not_reach_the_terminal(monkeypatch, capsys):
    text = drawn_from(b"a\x1b[2Jb\tc\nd\r")
    monkeypatch.setattr(chat_module, "stream", lambda *a, **k: iter(text))
    Terminal(make_chat(), Config()).answer("?")
    assert capsys.readouterr().out.startswith("a\ufffd[2Jb\tc\nd\ufffd\n(")


# the page -----------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A server at a free port, with a tiny chat."""
    server = Server((chat_module.HOST, 0), chat_module.Handler)
    server.chat = make_chat()
    server.cfg = Config(max_new_tokens=20)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


REQUEST = {"question": "hi", "turns": [], "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def fetch(server, path="/", body=None, host=None, kind="application/json"):
    """One request -> the response, which can be read."""
    port = server.server_address[1]
    connection = http.client.HTTPConnection(chat_module.HOST, port, timeout=20)
    headers = {"Host": host or f"{chat_module.HOST}:{port}"}
    method = "GET"
    if body is not None:
        method = "POST"
        headers["Content-Type"] = kind
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
    connection.request(method, path, body, headers)
    return connection.getresponse()


def test_the_page(server):
    response = fetch(server)
    text = response.read().decode()
    assert response.status == 200
    assert text == PAGE.read_text(encoding="utf-8")
    assert fetch(server, "/nowhere").status == 404
    facts = json.loads(fetch(server, "/model").read())
    assert facts["block_size"] == 64
    assert facts["vocab_size"] == 260
    assert facts["knobs"] == {"temperature": 0.7, "top_k": 0, "top_p": 0.9}
    assert facts["reads_history"] is False


def test_the_page_loads_nothing_from_elsewhere():
    text = PAGE.read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"\bsrc=|@import|url\(|<link rel=\"stylesheet", text)
    assert "innerHTML" not in text  # what a model writes must stay text


def test_an_answer_on_the_page(server):
    """The lines are the tokens of stream() with the same seed, and then the facts."""
    request = {**REQUEST, "temperature": 0.8, "top_k": 50}
    torch.manual_seed(3)
    lines = [json.loads(line) for line in fetch(server, "/answer", request)]
    chat = server.chat
    prompt = chat_module.encode_chat(chat, [], "hi")
    torch.manual_seed(3)
    expected = list(chat_module.stream(chat.model, prompt, 20, temperature=0.8, top_k=50, stop=END))
    assert len(lines) == len(expected) + 1
    for line, drawn in zip(lines, expected):
        assert line["token"] == chat_module.spell(chat, drawn.id)
        assert line["p"] == pytest.approx(drawn.p, rel=1e-4)
        assert line["rank"] == drawn.rank
        assert len(line["others"]) == 5
    done = lines[-1]["done"]
    assert done["tokens"] == len(expected)
    assert done["prompt_tokens"] == len(prompt)
    assert done["ended"] == (expected[-1].id == END)


def test_a_token_arrives_before_the_next_one_is_drawn(server, monkeypatch):
    first_was_read = threading.Event()

    def slow_stream(*args, **knobs):
        yield drawn_from(b"a")[0]
        assert first_was_read.wait(20)
        yield drawn_from(b"b")[0]

    monkeypatch.setattr(chat_module, "stream", slow_stream)
    response = fetch(server, "/answer", REQUEST)
    assert json.loads(response.readline())["text"] == "a"
    first_was_read.set()
    assert json.loads(response.readline())["text"] == "b"
    assert "done" in json.loads(response.readline())


def test_an_answer_ends_when_the_browser_hangs_up(server, monkeypatch):
    ended = threading.Event()

    def endless_stream(*args, **knobs):
        try:
            while not ended.wait(0.001):
                yield drawn_from(b"a")[0]
        finally:
            ended.set()

    monkeypatch.setattr(chat_module, "stream", endless_stream)
    response = fetch(server, "/answer", REQUEST)
    response.readline()
    response.close()
    assert ended.wait(20)


def test_the_page_hears_what_was_dropped(server):
    server.cfg = Config(max_new_tokens=20, turns=50)
    request = {**REQUEST, "turns": [["a", "b"]] * 12}
    first = json.loads(fetch(server, "/answer", request).readline())
    # (64 - 20 - 4) // 5 = 8 turns of 5 tokens fit beside a question of 4.
    assert first["kept"] == 8
    assert "the oldest 4 turns of this conversation did not fit" in first["note"]
    long = {**REQUEST, "question": "x" * 100}
    lines = list(fetch(server, "/answer", long))
    assert "shorten it" in json.loads(lines[0])["problem"]
    assert len(lines) == 1


BAD_REQUESTS = {
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe{",
    "no object": [1],
    "no question": {**REQUEST, "question": None},
    "no turns": {**REQUEST, "turns": 3},
    "half a turn": {**REQUEST, "turns": [["a"]]},
    "a turn of numbers": {**REQUEST, "turns": [[1, 2]]},
    "hot": {**REQUEST, "temperature": 101},
    "cold": {**REQUEST, "temperature": -1},
    "no number": {**REQUEST, "top_p": "1"},
    "a truth value": {**REQUEST, "top_p": True},
    "not a number": {**REQUEST, "top_p": float("nan")},
    "a share of a token": {**REQUEST, "top_k": 1.5},
    "missing": {"question": "", "turns": []},
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests(server, name):
    assert fetch(server, "/answer", BAD_REQUESTS[name]).status == 400


def test_other_web_sites_are_refused(server):
    """Their pages can send a form here, or let their own name point to 127.0.0.1."""
    assert fetch(server, "/answer", REQUEST, kind="text/plain").status == 403
    assert fetch(server, "/answer", REQUEST, host="evil.example:80").status == 403
    assert fetch(server, "/", host="evil.example").status == 403
    port = server.server_address[1]
    assert fetch(server, "/", host=f"localhost:{port}").status == 200


# the script ---------------------------------------------------------------------------------------


def make_checkpoint(path, kind="sft", block_size=64, **changes):
    """A tiny checkpoint; changes replace entries of it, and None removes one."""
    model = make_model(block_size)
    content = {**model.to_checkpoint(), "tokenizer": TOK.state(), **changes}
    content = {name: value for name, value in content.items() if value is not None}
    save_checkpoint(path, kind=kind, **content)
    return model


@pytest.mark.parametrize("kind", chat_module.KINDS)
def test_all_kinds_of_checkpoints_open(tmp_path, kind):
    """PPO's checkpoint may have a value head. A base model has no template unless it brings one."""
    model = make_model()
    weights = {**model.state_dict(), "value_head.weight": torch.zeros(1, 16)}
    is_base = kind in ("base", "gpt")
    state = TOK.state()
    if is_base:
        del state["template"]  # the tokenizers of Parts 4 and 5 have none
    checkpoint = {**model.to_checkpoint(), "weights": weights, "tokenizer": state}
    opened = chat_module.open_chat({**checkpoint, "kind": kind}, "x.pt", "cpu")
    assert opened.only_continues == is_base
    assert opened.stop == TOK.special["<|endoftext|>" if is_base else "<|end|>"]
    idx = torch.tensor([[1, 2, 3]])
    assert torch.equal(opened.model(idx)[0], model(idx)[0])

    state = {**TOK.state(), "special": ["<|im_start|>", "<|im_end|>"], "template": CHATML}
    opened = chat_module.open_chat({**checkpoint, "kind": kind, "tokenizer": state}, "x.pt", "cpu")
    assert opened.template == CHATML
    assert opened.stop == opened.tok.special["<|im_end|>"]


def start(*argv):
    """The script in a process of its own, whose input and output are bytes."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_one_answer(tmp_path):
    """stdout is the answer and nothing else."""
    model = make_checkpoint(tmp_path / "sft.pt")
    options = ["--temperature=0", "--max_new_tokens=12", "--device=cpu"]
    process = start(f"--model={tmp_path}/sft.pt", "--prompt=hé", *options)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert re.fullmatch(rb"12 tokens, [\d.]+ per second, cut off: it may not be longer\n", stderr)

    ids = chat_prompt({"prompt": "hé"}, TOK)
    answer = model.generate(torch.tensor([ids]), 12, temperature=0)[0, len(ids) :].tolist()
    text = b"".join(TOK.token_bytes(i) for i in answer).decode("utf-8", "replace")
    shown = text.translate(chat_module.CONTROL).rstrip("\ufffd")
    assert stdout.decode().rstrip("\n\ufffd") == shown.rstrip("\n\ufffd")


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path):
    """An answer of 200,000 tokens is stopped, and the next line is still obeyed."""
    make_checkpoint(tmp_path / "sft.pt", block_size=200_000)
    process = start(f"--model={tmp_path}/sft.pt", "--max_new_tokens=200000", "--device=cpu")
    process.stdin.write(b"hi\n")
    process.stdin.flush()
    text = b""
    while len(text.partition(b"\n> ")[2]) < 50:  # the answer has begun
        text += os.read(process.stdout.fileno(), 1000)
    process.send_signal(signal.SIGINT)
    while b", stopped)\n> " not in text:
        text += os.read(process.stdout.fileno(), 1000)
    stdout, stderr = process.communicate(b"/top_k 3\n", timeout=60)  # and the end of the input
    assert stdout.startswith(b"top_k is 3\n")
    assert process.returncode == 0
    assert stderr == b""


def test_a_port_in_use(tmp_path):
    """The port is tried before anything else: the checkpoint does not even exist."""
    with socket.create_server((chat_module.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        process = start(f"--port={port}", "--model=nowhere.pt")
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (
        stderr
        == f"error: --port={port} is in use, or not allowed here: choose another one\n".encode()
    )


def test_the_script_serves_the_page(tmp_path):
    make_checkpoint(tmp_path / "sft.pt")
    with socket.create_server((chat_module.HOST, 0)) as free:
        port = free.getsockname()[1]
    process = start(f"--model={tmp_path}/sft.pt", f"--port={port}", "--device=cpu")
    text = b""
    while b"in a browser" not in text:
        text += os.read(process.stdout.fileno(), 1000)
    connection = http.client.HTTPConnection(chat_module.HOST, port, timeout=20)
    connection.request("GET", "/")
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    assert stderr == b""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    make_checkpoint(folder / "sft.pt")
    make_checkpoint(folder / "rm.pt", kind="rm")
    make_checkpoint(folder / "no_tok.pt", kind="gpt", tokenizer=None)
    make_checkpoint(folder / "no_end.pt", tokenizer={**TOK.state(), "special": ["<|endoftext|>"]})
    (folder / "half.pt").write_bytes((folder / "sft.pt").read_bytes()[:9000])
    return folder


# Options, and what the one line of the error says. {0} is the folder.
BAD_INPUT = {
    "no checkpoint": (["--model=nowhere.pt"], "there is no nowhere.pt"),
    "wrong kind": (["--model={0}/rm.pt"], "rm.pt is a 'rm' checkpoint, expected 'base'"),
    "truncated": (["--model={0}/half.pt"], "half.pt is truncated or not a checkpoint"),
    "no tokenizer": (["--model={0}/no_tok.pt"], "no_tok.pt has no tokenizer"),
    "no end token": (["--model={0}/no_end.pt"], "the tokenizer has no token <|end|>"),
    "too hot": (["--temperature=200"], "temperature=200.0 must be a number from 0 to 100"),
    "no top_p": (["--top_p=2"], "top_p=2.0 must be from 0 to 1"),
    "no port": (["--port=65536"], "port=65536 must be from 1 to 65535"),
    "turns": (["--turns=-2"], "turns=-2 must be -1 or more"),
    "too long": (["--model={0}/sft.pt", "--prompt=" + "x" * 90], "shorten it"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_in_one_line(run, folder, name):
    more, message = BAD_INPUT[name]
    more = [option.format(folder) for option in more]
    code, stdout, stderr = run(folder, *more)
    assert code == 2, stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert message in stderr
    assert stdout == ""


# Runs scripts in children of one process that has imported torch already, one after the other.
SERVER = """
import json
import os
import runpy
import sys

import tiktoken
import torch

for line in sys.stdin:
    folder, script, argv = json.loads(line)
    child = os.fork()
    if child == 0:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
        os.chdir(folder)
        sys.stdin = open(os.devnull)
        sys.path[:0] = [os.path.dirname(script), os.path.dirname(os.path.dirname(script))]
        sys.argv = [script, *argv]
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = 1
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        os._exit(code or 0)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture(scope="module")
def run():
    """run(folder, *options) runs the script in this folder -> its exit code, stdout and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def ask(folder, *argv):
        print(json.dumps([str(folder), str(SCRIPT), argv]), file=process.stdin, flush=True)
        code = int(process.stdout.readline())
        return code, (folder / "stdout").read_text(), (folder / "stderr").read_text()

    yield ask
    process.kill()
    process.communicate()
