"""
Tests of train_sft.py: what is in a batch, how answers are measured, and the script itself on a tiny
base model and tiny data that are made here.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import train_sft
from model import GPT, GPTConfig
from shared import ROOT, autocast_for, load_checkpoint, parse_args, save_checkpoint, set_seed
from tokenizer import Tokenizer
from train_sft import (
    Answer,
    Config,
    chat_prompt,
    collate,
    encode_records,
    evaluate,
    get_batch,
    grade,
    load_data,
    lr_scale,
    make_optimizers,
    order,
    pad,
    respond,
    set_lr,
    token_f1,
)

SCRIPT = ROOT / "part_6/train_sft.py"
END = 12
CONFIG = GPTConfig(vocab_size=13, block_size=24, n_layer=2, n_head=4, n_embd=16, mlp_dim=12)
TOK = Tokenizer({bytes([i]): i for i in range(256)})
USER = TOK.special["<|user|>"]
ASSISTANT = TOK.special["<|assistant|>"]
TOK_END = TOK.special["<|end|>"]


class TinyTokenizer:
    """What respond needs, for the vocabulary of 13 tokens."""

    end = END

    def decode(self, ids):
        return " ".join(str(i) for i in ids)


def make_model(cfg=CONFIG, std=0.3):
    """A model with random parameters, and gains near 1."""
    model = GPT(cfg)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise = std * torch.randn(p.shape, generator=generator)
        is_gain = p.ndim == 1
        p.data = 1 + noise if is_gain else noise
    return model


def make_records(n=7, seed=0):
    """Prompts and answers of many lengths, with levels 0, 1 and 2."""
    rng = random.Random(seed)
    records = []
    for i in range(n):
        prompt = [rng.randrange(END) for _ in range(rng.randint(2, 9))]
        answer = [rng.randrange(END) for _ in range(rng.randint(0, 9))]
        records.append({"prompt_ids": prompt, "answer_ids": [*answer, END], "level": i % 3})
    return records


def write_jsonl(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records))


# data ---------------------------------------------------------------------------------------------


def test_the_chat_template():
    record = {"instruction": "sag <|end|> für", "input": "", "output": "Füchse 🦊", "level": 3}
    (encoded,) = encode_records([record], TOK, 99)
    assert encoded["prompt_ids"] == [USER, *"sag <|end|> für".encode(), ASSISTANT]
    assert encoded["answer_ids"] == [*"Füchse 🦊".encode(), TOK_END]
    assert encoded["level"] == 3, "the other fields must stay"
    assert "prompt_ids" not in record, "the original must not change"

    record["input"] = "eins"
    assert chat_prompt(record, TOK) == [USER, *"sag <|end|> für\neins".encode(), ASSISTANT]
    assert chat_prompt({"prompt": "né"}, TOK) == [USER, *"né".encode(), ASSISTANT]


def test_records_that_do_not_fit_are_left_out(capsys):
    """<|user|>, prompt, <|assistant|>, answer and <|end|> are 1 + 1 + 1 + 6 + 1 = 10 tokens."""
    fits = {"instruction": "a", "input": "", "output": "é" * 3}
    too_long = {"instruction": "a", "input": "", "output": "é" * 3 + "!"}
    records = encode_records([too_long, fits], TOK, 10)
    assert [record["output"] for record in records] == ["é" * 3]
    assert "1 of 2 records are longer than 10 tokens: left out" in capsys.readouterr().out

    encode_records([fits], TOK, 10)
    assert capsys.readouterr().out == "", "nothing is said if everything fits"

    with pytest.raises(SystemExit) as end:
        encode_records([too_long], TOK, 10)
    assert end.value.code == 2
    assert "no record fits in 10 tokens" in capsys.readouterr().err


def test_a_users_file_is_split_without_overlap(tmp_path):
    records = [{"instruction": f"é {i}", "input": "", "output": "b"} for i in range(20)]
    write_jsonl(tmp_path / "data.jsonl", records)
    train, val = load_data(Config(data=str(tmp_path / "data.jsonl")))
    assert train == records[:18]
    assert val == records[18:]


def test_the_built_in_world_has_its_own_validation_file(tmp_path, monkeypatch):
    monkeypatch.setattr(train_sft, "require", lambda path: tmp_path / path)
    (tmp_path / "data/stories").mkdir(parents=True)
    for name in ("instructions", "instructions_val"):
        records = [{"instruction": name, "input": "", "output": str(i)} for i in range(3)]
        write_jsonl(tmp_path / f"data/stories/{name}.jsonl", records)
    train, val = load_data(Config())
    assert [record["instruction"] for record in train] == ["instructions"] * 3
    assert [record["instruction"] for record in val] == ["instructions_val"] * 3


def test_collate():
    """The last token of the prompt predicts the first of the answer; the end token is a target."""
    records = [
        {"prompt_ids": [1, 2, 3], "answer_ids": [4, END]},
        {"prompt_ids": [5], "answer_ids": [6, 7, 8, 9, END]},
        {"prompt_ids": [10, 11], "answer_ids": [END]},
    ]
    inputs, targets = collate(records)
    assert inputs.tolist() == [
        [1, 2, 3, 4, END],
        [5, 6, 7, 8, 9],
        [10, 11, END, 0, 0],
    ]
    assert targets.tolist() == [
        [-100, -100, 4, END, -100],
        [6, 7, 8, 9, END],
        [-100, END, -100, -100, -100],
    ]


def test_pad_keeps_the_rows_on_the_left():
    assert pad([[1], [2, 3, 4], [5, 6]], 9).tolist() == [[1, 9, 9], [2, 3, 4], [5, 6, 9]]


def test_order():
    records = make_records(60)
    levels = {}
    for curriculum in ("easy_first", "random", "anti"):
        indices = order(records, Config(curriculum=curriculum))
        assert sorted(indices) == list(range(60))
        assert indices == order(records, Config(curriculum=curriculum))
        assert indices != order(records, Config(curriculum=curriculum, seed=1)), (
            "the seed must shuffle, also within a level"
        )
        levels[curriculum] = [records[i]["level"] for i in indices]
    assert levels["easy_first"] == [0] * 20 + [1] * 20 + [2] * 20
    assert levels["anti"] == [2] * 20 + [1] * 20 + [0] * 20
    assert levels["random"] not in (levels["easy_first"], levels["anti"])


@pytest.mark.parametrize("curriculum", ["easy_first", "random", "anti"])
def test_records_without_a_level_are_only_shuffled(curriculum):
    indices = order([{}] * 9, Config(curriculum=curriculum))
    assert sorted(indices) == list(range(9))
    assert indices != list(range(9))


def first_tokens(records, step, cfg):
    inputs, _ = get_batch(records, step, cfg)
    return inputs[:, 0].tolist()


def test_steps_go_round_and_round_in_random_order():
    records = [{"prompt_ids": [i], "answer_ids": [END]} for i in range(10)]
    cfg = Config(batch_size=4, steps=5)
    assert first_tokens(records, 0, cfg) == [0, 1, 2, 3]
    assert first_tokens(records, 1, cfg) == [4, 5, 6, 7]
    assert first_tokens(records, 2, cfg) == [8, 9, 0, 1]
    assert first_tokens(records, 3, cfg) == [2, 3, 4, 5]


@pytest.mark.parametrize("steps", [2, 3, 7, 50])
@pytest.mark.parametrize("curriculum", ["easy_first", "anti"])
def test_a_curriculum_is_walked_through_from_end_to_end(curriculum, steps):
    """With any number of steps the first batch is the start of it, and the last is its end."""
    records = [{"prompt_ids": [i], "answer_ids": [END]} for i in range(10)]
    cfg = Config(batch_size=4, steps=steps, curriculum=curriculum)
    starts = []
    for step in range(steps):
        tokens = first_tokens(records, step, cfg)
        assert tokens == list(range(tokens[0], tokens[0] + 4))
        starts.append(tokens[0])
    assert starts[0] == 0
    assert starts[-1] == 6
    assert starts == sorted(starts)


@pytest.mark.parametrize("curriculum", ["easy_first", "random"])
def test_fewer_records_than_a_batch_still_make_batches(curriculum):
    records = [{"prompt_ids": [i], "answer_ids": [END]} for i in range(3)]
    cfg = Config(batch_size=4, steps=5, curriculum=curriculum)
    for step in range(5):
        tokens = first_tokens(records, step, cfg)
        assert len(tokens) == 4
        assert set(tokens) == {0, 1, 2}


# optimizers ---------------------------------------------------------------------------------------


def test_muon_gets_the_hidden_matrices_and_adamw_the_rest():
    model = GPT(CONFIG)
    muon, adamw = make_optimizers(model, Config(lr=0.5, lr_adamw=0.25, weight_decay=0.125))
    name_of = {id(p): name for name, p in model.named_parameters()}
    hidden = {name_of[id(p)] for p in muon.param_groups[0]["params"]}
    tables, gains = adamw.param_groups
    others = {name_of[id(p)] for p in tables["params"] + gains["params"]}
    assert hidden | others == set(name_of.values())
    assert not hidden & others
    assert {"wte.weight", "lm_head.weight", "ln_f.weight", "h.0.attn.q_norm.weight"} <= others
    assert {"h.0.attn.c_q.weight", "h.1.mlp.c_proj.weight"} <= hidden
    for optimizer, lr in ((muon, 0.5), (adamw, 0.25)):
        assert optimizer.param_groups[0]["lr"] == lr
        assert optimizer.param_groups[0]["weight_decay"] == 0.125

    set_lr([muon, adamw], 0.5)
    set_lr([muon, adamw], 0.1)
    assert muon.param_groups[0]["lr"] == pytest.approx(0.05), "a share of the peak"
    assert adamw.param_groups[0]["lr"] == pytest.approx(0.025)


def test_the_learning_rate_rises_holds_and_falls():
    cfg = Config(steps=100, warmup=0.1, decay=0.4)
    scales = [lr_scale(step, cfg) for step in range(101)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9:61] == [1.0] * 52
    assert scales[80] == pytest.approx(0.5)
    assert scales[99] == pytest.approx(1 / 40)
    assert scales[100] == 0


# answers and their measures -----------------------------------------------------------------------


def slow_answer(model, prompt, max_new_tokens):
    """Greedy, one row, no cache, no padding -> the new tokens."""
    answer = []
    while len(answer) < max_new_tokens and len(prompt) + len(answer) < model.cfg.block_size:
        logits, _ = model(torch.tensor([prompt + answer]))
        answer.append(logits[0, -1].argmax().item())
        if answer[-1] == END:
            break
    return answer


def test_respond():
    """150 records are two batches. The answers come in the order of the records."""
    model = make_model()
    records = make_records(150, seed=3)
    answers = respond(model, TinyTokenizer(), records, 12, temperature=0)
    assert len(answers) == 150
    for i in (*range(20), 127, 128, 149):
        expected = slow_answer(model, records[i]["prompt_ids"], 12)
        ended = expected[-1] == END
        if ended:
            expected = expected[:-1]
        assert answers[i].ids == expected
        assert answers[i].ended == ended
        assert answers[i].text == " ".join(str(token) for token in expected)
    ended = sum(answer.ended for answer in answers)
    assert 0 < ended < 150, "the test needs answers that end and answers that do not"


def test_an_answer_that_fills_the_context_has_not_ended():
    model = make_model()
    model.lm_head.weight.data[END] = 0  # with logit 0 the end token is never the likeliest
    records = [{"prompt_ids": [1] * 20}, {"prompt_ids": [2] * 3}]
    answers = respond(model, TinyTokenizer(), records, 12, temperature=0)
    assert [len(answer.ids) for answer in answers] == [4, 12]
    assert not answers[0].ended
    assert not answers[1].ended


@pytest.mark.parametrize(
    "answer, reference, expected",
    [
        ("a b c", "a b d d", 4 / 7),
        ("a a", "a", 2 / 3),
        ("a a b", "a a c", 2 / 3),
        ("b a", "a b", 1),
        ("né ja", "né nein", 1 / 2),
        ("", "", 1),
        ("", "a", 0),
    ],
)
def test_token_f1(answer, reference, expected):
    """A word that occurs twice counts twice."""
    assert token_f1(answer, reference) == pytest.approx(expected)
    assert token_f1(reference, answer) == pytest.approx(expected)


def test_grade():
    easy = {"task": "sum", "level": 1, "check": {"answer": "7"}, "output": "7"}
    hard = {**easy, "level": 2}
    story = {"check": {"must": ["fox", "dog"]}, "output": "a fox and a dog"}
    unchecked = {"output": "a b"}
    answers = [
        Answer([], "7", ended=True),
        Answer([], "8", ended=True),
        Answer([], "a fox", ended=False),
        Answer([], "a c", ended=False),
    ]
    shares = grade([easy, hard, story, unchecked], answers)
    assert shares == {
        "sum": 0.5,
        "sum level 1": 1.0,
        "sum level 2": 0.0,
        "story": 0.0,
        "story level 0": 0.0,
        "check answer": 0.5,
        "check has": 0.5,
        "check end": 0.0,
        "exact match": 0.25,
        "token F1": pytest.approx((1 + 0 + 4 / 7 + 1 / 2) / 4),
    }


def test_records_without_checks_get_no_gold_score():
    shares = grade([{"output": "ja"}], [Answer([], "ja", ended=True)])
    assert shares == {"exact match": 1.0, "token F1": 1.0}


def test_evaluate_is_the_mean_over_all_answer_tokens():
    """150 records are three batches, and their numbers of answer tokens differ."""
    model = make_model()
    records = make_records(150)
    nats = []
    for record in records:
        prompt = record["prompt_ids"]
        ids = prompt + record["answer_ids"]
        logits, _ = model(torch.tensor([ids[:-1]]))
        logp = logits[0].double().log_softmax(dim=-1)
        for t in range(len(prompt), len(ids)):
            nats.append(-logp[t - 1, ids[t]].item())
    actual = evaluate(model, records, "cpu", nullcontext)
    assert actual == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_one_batch_can_be_learned_by_heart_and_said():
    """The model then writes exactly the demonstrations, end tokens included."""
    torch.manual_seed(0)
    cfg = GPTConfig(vocab_size=13, block_size=24, n_layer=2, n_head=4, n_embd=32, mlp_dim=64)
    model = GPT(cfg)
    records = make_records(6)
    for i, record in enumerate(records):
        record["prompt_ids"][0] = i  # no two prompts are alike
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(80):
        _, loss = model(*get_batch(records, 0, Config(batch_size=6)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
    answers = respond(model, TinyTokenizer(), records, 12, temperature=0)
    for record, answer in zip(records, answers):
        assert answer.ended
        assert [*answer.ids, END] == record["answer_ids"]


# the script ---------------------------------------------------------------------------------------
# Importing torch takes seconds. So one process imports it, and makes a child for each run.

SERVER = """
import json
import os
import runpy
import sys

import tiktoken
import torch
import torch._dynamo

for line in sys.stdin:
    folder, script, argv = json.loads(line)
    child = os.fork()
    if child == 0:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
        os.chdir(folder)
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
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def ask(folder, *argv, script=SCRIPT):
        request = json.dumps([str(folder), str(script), argv])
        print(request, file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return code, (folder / "stdout").read_text(), (folder / "stderr").read_text()

    yield ask
    server.kill()
    server.communicate()


@pytest.fixture
def one_thread():
    """As many threads as the script has, so that both sample the same tokens."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_base(path, kind="base"):
    cfg = GPTConfig(vocab_size=260, block_size=16, n_layer=1, n_head=2, n_embd=16)
    model = make_model(cfg, std=0.1)
    save_checkpoint(path, kind=kind, **model.to_checkpoint(), tokenizer=TOK.state())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model and 41 demonstrations, one of which is too long. The last 5 are held out. They
    answer otherwise than the others, so that no one can mistake them for training data, and some
    have a check. And the bad files that BAD_INPUT names."""
    folder = tmp_path_factory.mktemp("sft")
    make_base(folder / "base.pt")
    make_base(folder / "rm.pt", kind="rm")
    (folder / "half.pt").write_bytes((folder / "base.pt").read_bytes()[:9000])

    rng = random.Random(0)
    records = []
    for i in range(40):
        word = rng.choice(["réd", "🦊", "dog", "an old one"])
        record = {"instruction": "say it", "input": word, "output": word, "level": i % 3}
        records.append(record)
    records.insert(3, {"instruction": "the " * 90, "input": "", "output": "dog"})
    for record in records[36:]:
        record["output"] = "zz"
    for record in records[36:38]:
        record.update(task="story", check={"must": ["e"]})
    records[38].update(task="count", check={"answer": "3"})
    write_jsonl(folder / "data.jsonl", records)
    for record in records:
        record.pop("check", None)
    write_jsonl(folder / "unchecked.jsonl", records)

    lines = (folder / "data.jsonl").read_text().split("\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "one.jsonl").write_text(lines[0])
    (folder / "long.jsonl").write_text("\n".join([lines[3]] * 4))
    (folder / "broken.jsonl").write_text("\n".join([*lines[:4], lines[4][:-5], *lines[5:]]))
    (folder / "field.jsonl").write_text("\n".join([*lines[:6], '{"instruction": "", "input": ""}']))
    array = [json.loads(lines[1]), {"instruction": "say it", "input": None, "output": ""}]
    (folder / "array.json").write_text(json.dumps(array))
    return folder


def options(folder, out, *more):
    return [
        f"--data={folder}/data.jsonl",
        f"--init={folder}/base.pt",
        f"--out={out}",
        "--block_size=40",
        "--steps=12",
        "--batch_size=8",
        "--max_new_tokens=6",
        "--prompts=2",
        "--eval_every=6",
        "--grad_clip=0.3",
        "--warmup=0.25",
        *more,
    ]


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def replay(cfg, folder):
    """The training once more, in other words -> the model, and each step's loss and norm of the
    gradient."""
    set_seed(cfg.seed)
    records, _ = load_data(cfg)
    records = encode_records(records, TOK, cfg.block_size)
    records = [records[i] for i in order(records, cfg)]
    base = load_checkpoint(folder / "base.pt", "base")
    base["gpt_config"]["block_size"] = cfg.block_size
    model = GPT.load(base)
    autocast = autocast_for(torch.device("cpu"), cfg.dtype or "fp32")
    optimizers = make_optimizers(model, cfg)
    peaks = [cfg.lr, cfg.lr_adamw]
    losses = []
    norms = []
    for step in range(cfg.steps):
        for optimizer, peak in zip(optimizers, peaks):
            for group in optimizer.param_groups:
                group["lr"] = peak * lr_scale(step, cfg)
        inputs, targets = get_batch(records, step, cfg)
        model.zero_grad()
        with autocast():
            logits, _ = model(inputs)
        is_target = targets != -100
        logp = logits[is_target].float().log_softmax(dim=-1)
        loss = -logp.gather(1, targets[is_target][:, None]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return model, losses, norms


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--curriculum=easy_first", "--weight_decay=0.5", "--seed=3"],
        ["--curriculum=anti", "--decay=0.9", "--lr=0.02", "--lr_adamw=0.01"],
        ["--dtype=bf16"],
    ],
    ids=str,
)
def test_a_run(folder, run, tmp_path, one_thread, more):
    out = tmp_path / "out"
    argv = options(folder, out, *more)
    code, stdout, stderr = run(tmp_path, *argv)
    assert code == 0, stderr
    assert "1 of 36 records are longer than 40 tokens: left out" in stdout
    assert "35 demonstrations, 5 held out" in stdout
    log = read_log(out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert [line["step"] for line in log] == list(range(12))
    assert [line["step"] for line in log if "val_loss" in line] == [5, 11]
    assert metrics["val_loss"] == log[-1]["val_loss"] != log[5]["val_loss"]
    assert metrics["steps"] == 12
    assert metrics["seconds"] > 0

    # Every step did what it should: batches, loss, schedule, clipping, update.
    cfg = parse_args(Config, argv=argv)
    model, losses, norms = replay(cfg, folder)
    rel = 1e-2 if cfg.dtype == "bf16" else 1e-3
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=rel)
    assert [line["grad_norm"] for line in log] == pytest.approx(norms, rel=5 * rel)
    assert max(norms) > cfg.grad_clip, "otherwise nothing is clipped"
    rates = [cfg.lr * lr_scale(step, cfg) for step in range(12)]
    assert [line["lr"] for line in log] == pytest.approx(rates)

    # The checkpoint holds the trained model, and its loss is the one that was measured.
    checkpoint = load_checkpoint(out / "sft.pt", "sft")
    assert checkpoint["changed"]["steps"] == 12
    assert checkpoint["config"]["lr"] == cfg.lr
    assert checkpoint["gpt_config"]["block_size"] == 40
    assert checkpoint["tokenizer"] == TOK.state()
    saved = GPT.load(checkpoint)
    for name, p in saved.state_dict().items():
        expected = model.state_dict()[name]
        torch.testing.assert_close(p, expected, rtol=rel, atol=rel * expected.abs().max().item())
    train, val = load_data(cfg)
    train = encode_records(train, TOK, 40)
    val = encode_records(val, TOK, 40)
    autocast = autocast_for(torch.device("cpu"), cfg.dtype or "fp32")
    assert evaluate(saved, val, "cpu", autocast) == pytest.approx(metrics["val_loss"], rel=1e-4)
    assert evaluate(saved, train, "cpu", autocast) != pytest.approx(metrics["val_loss"], rel=0.05)

    # The answers are samples of the trained model, to two held-out stories and two other tasks.
    # Until then the script has drawn random numbers only to initialize the model. Records
    # without a task count as stories, so here the stories are the first two records.
    stories = [record for record in val if record.get("task", "story") == "story"][:2]
    others = [record for record in val if record.get("task", "story") != "story"][:2]
    set_seed(cfg.seed)
    GPT.load(checkpoint)
    answers = respond(saved, TOK, stories + others, 6)
    for name, share in grade(stories + others, answers).items():
        assert metrics[name.replace(" ", "_")] == pytest.approx(share), name
    assert metrics["gold_pass"] == metrics["story"]
    assert metrics["ended"] == sum(answer.ended for answer in answers) / 3
    assert f"{metrics['story']:.3f} of 2 held-out stories pass all checks" in stdout
    assert (out / "train_sft.png").read_bytes()[:4] == b"\x89PNG"


def test_bf16_is_used(folder, run, tmp_path):
    """The losses of the first step are near, but not the same."""
    losses = {}
    for dtype in ("fp32", "bf16"):
        out = tmp_path / dtype
        code, stdout, stderr = run(tmp_path, *options(folder, out, "--steps=1"), f"--dtype={dtype}")
        assert code == 0, stderr
        assert f"cpu {dtype}" in stdout
        losses[dtype] = read_log(out)[0]["loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["bf16"] != pytest.approx(losses["fp32"], rel=1e-6)


def test_data_without_checks(folder, run, tmp_path):
    """There is no gold score then, and the rest still works."""
    out = tmp_path / "out"
    argv = options(folder, out, f"--data={folder}/unchecked.jsonl", "--steps=1")
    code, stdout, stderr = run(tmp_path, *argv)
    assert code == 0, stderr
    assert "no gold score: the records have no checks" in stdout
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["gold_pass"] is None
    assert metrics["token_F1"] >= metrics["exact_match"]
    assert (out / "sft.pt").exists()


# Options, and what the one line of the error says. {0} is the folder.
BAD_INPUT = {
    "unknown option": (["--stepz=3"], "no option --stepz, did you mean --steps?"),
    "wrong type": (["--steps=three"], "--steps wants an int, got 'three'"),
    "no steps": (["--steps=0"], "steps=0 must be at least 1"),
    "no prompts": (["--prompts=0"], "prompts=0 must be at least 1"),
    "no tokens": (["--max_new_tokens=-1"], "max_new_tokens=-1 must be at least 1"),
    "unknown curriculum": (["--curriculum=hard"], "curriculum=hard must be one of easy_first"),
    "unknown dtype": (["--dtype=fp16"], "dtype=fp16 must be fp32 or bf16"),
    "no file": (["--data=nowhere.jsonl"], "there is no file nowhere.jsonl"),
    "empty file": (["--data={0}/empty.jsonl"], "empty.jsonl is empty"),
    "one record": (["--data={0}/one.jsonl"], "has 1 record; at least 2 are needed"),
    "broken line": (["--data={0}/broken.jsonl"], "broken.jsonl line 5:"),
    "missing field": (["--data={0}/field.jsonl"], "line 7: field 'output' is missing"),
    "no text": (["--data={0}/array.json"], "record 2: field 'input' must be a string, got null"),
    "nothing fits": (["--data={0}/long.jsonl"], "no record fits in 40 tokens"),
    "no checkpoint": (["--init=nowhere.pt"], "no checkpoint at nowhere.pt"),
    "truncated": (["--init={0}/half.pt"], "half.pt is truncated or not a checkpoint"),
    "foreign file": (["--init={0}/data.jsonl"], "data.jsonl is truncated or not a checkpoint"),
    "wrong kind": (["--init={0}/rm.pt"], "rm.pt is a 'rm' checkpoint, expected 'base'"),
    "not a folder": (["--out={0}/empty.jsonl"], "is a file, but it must be a folder"),
    "diverged": (["--lr=1e20", "--lr_adamw=1e20"], "loss is nan at step"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_in_one_line(folder, run, tmp_path, name):
    more, message = BAD_INPUT[name]
    more = [option.format(folder) for option in more]
    code, _, stderr = run(tmp_path, *options(folder, tmp_path / "out", *more))
    assert code == 2, stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert message in stderr
    written = {path.name for path in (tmp_path / "out").glob("*")}
    assert written <= {"log.jsonl"}


def files_in(folder):
    """All files but Python's cache."""
    files = {path for path in folder.rglob("*") if path.is_file()}
    return {path for path in files if path.suffix != ".pyc"}


def test_a_broken_file_is_found_before_anything_is_built(folder, run, tmp_path):
    """On a fresh clone, with neither data/ nor any checkpoint."""
    clone = tmp_path / "clone"
    ignore = shutil.ignore_patterns("out", "data", "__pycache__", ".*", "*.png")
    shutil.copytree(ROOT, clone, ignore=ignore)
    before = files_in(clone)
    script = clone / "part_6/train_sft.py"
    code, stdout, stderr = run(tmp_path, f"--data={folder}/broken.jsonl", script=script)
    assert code == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert "broken.jsonl line 5:" in stderr
    assert stdout == ""
    assert files_in(clone) == before
