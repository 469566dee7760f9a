"""
Tests of Part 6: pytest part_6. The oracles: `slow_generate`, one row at a time without a cache, Part 5's model, and the
loss written down token by token. The script runs on a tiny base model and data set that are made here.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import importlib.util
import json
import os
import random
import subprocess
from contextlib import nullcontext

import pytest
import torch

from model import GPT, GPTConfig
from shared import load_checkpoint, save_checkpoint
from tokenizer import Tokenizer
from train_sft import Config, encode, evaluate, get_batch, gold, load_data, order, pad, respond, token_f1

SCRIPT = Path(__file__).resolve().parent / "train_sft.py"
TINY = dict(vocab_size=13, block_size=24, n_layer=2, n_head=4, n_embd=16, n_kv_head=2, mlp_dim=12)
END = 12
TOK = Tokenizer.train("the red fox saw the old dog. the dog ran to the fox. say it again. count to three. " * 4, 300)
WORDS = "the red fox saw old dog ran to say it".split()

def randomised(model, seed=0, std=0.2):
    """Every parameter random, gains about 1: a projection that starts at zero would hide all that stands before it."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = (p.ndim == 1 and p.data.mean() > 0.5) + std * torch.randn(p.shape, generator=g)
    return model

def make(std=0.3, **sizes):
    return randomised(GPT(GPTConfig(**{**TINY, **sizes})), std=std)

def tokens(*shape, seed=1):
    return torch.randint(END, shape, generator=torch.Generator().manual_seed(seed))

def records(n=7, seed=0):
    """Prompts and answers of many lengths, as ids of the tiny vocabulary."""
    rng = random.Random(seed)
    words = lambda low, high: [rng.randrange(END) for _ in range(rng.randint(low, high))]
    return [{"prompt": words(2, 9), "answer": [*words(0, 9), END], "level": i % 3} for i in range(n)]

# the loss ------------------------------------------------------------------------------------------------------------

def nats(model, r):
    """-log p of each answer token, one record alone, in float64."""
    ids = r["prompt"] + r["answer"]
    logp = model(torch.tensor([ids[:-1]]))[0][0].double().log_softmax(dim=-1)
    return [-logp[t - 1, ids[t]].item() for t in range(len(r["prompt"]), len(ids))]

def test_loss_is_the_mean_over_all_answer_tokens():
    """fp32 against float64 within 1e-5. Not the mean of the rows' means: with unequal lengths that is another one."""
    model, rows = make(), records()
    per_row = [nats(model, r) for r in rows]
    count = sum(map(len, per_row))
    loss = model(*get_batch(rows, 0, Config(batch_size=len(rows))))[1].item()
    assert loss == pytest.approx(sum(map(sum, per_row)) / count, rel=1e-5)
    assert abs(loss - sum(sum(row) / len(row) for row in per_row) / len(rows)) > 1e-3
    many = records(70)  # more than one batch of evaluate
    exact = [x for r in many for x in nats(model, r)]
    assert evaluate(model, many, Config(), "cpu", nullcontext) == pytest.approx(sum(exact) / len(exact), rel=1e-5)

def test_labels_are_the_answer_and_its_end():
    record = {"instruction": "say it", "input": "the dog <|end|>", "output": "the dog"}
    prompt, answer = encode(record, TOK)
    special = TOK.special
    ends = prompt[0], prompt[-1], answer[-1]
    assert ends == (special["<|user|>"], special["<|assistant|>"], special["<|end|>"])
    assert TOK.decode(prompt[1:-1]) == "say it\nthe dog <|end|>" and TOK.decode(answer[:-1]) == "the dog"
    assert not set(special.values()) & set(prompt[1:-1])  # a user who spells a special token gets text
    assert TOK.decode(encode({**record, "input": ""}, TOK)[0][1:-1]) == "say it"
    rows = [{"prompt": prompt, "answer": answer}, {"prompt": [1, 2], "answer": [3, special["<|end|>"]]}]
    x, y = get_batch(rows, 0, Config(batch_size=2))
    n = len(prompt)
    assert x[0].tolist() == (prompt + answer)[:-1] and y[0].tolist() == [-100] * (n - 1) + answer
    assert x[0, n - 1] == special["<|assistant|>"] and y[0, n - 1] == answer[0]  # the last prompt token is asked first
    assert y[1].tolist() == [-100, 3, special["<|end|>"]] + [-100] * (y.size(1) - 3)

def test_padding_on_the_right_changes_nothing():
    model = make()
    x, y = get_batch(records(), 0, Config(batch_size=7))
    logits, loss = model(x, y)
    wide_x = torch.cat([x, tokens(7, 4)], dim=1)
    wide_y = torch.cat([y, torch.full((7, 4), -100)], dim=1)
    wide_logits, wide_loss = model(wide_x, wide_y)
    torch.testing.assert_close(wide_logits[:, :x.size(1)], logits, atol=1e-5, rtol=1e-5)
    assert wide_loss.item() == pytest.approx(loss.item(), rel=1e-6)

def test_without_ignored_labels_it_is_part_5():
    path = SCRIPT.parent.parent / "part_5/model.py"
    spec = importlib.util.spec_from_file_location("part_5_model", path)
    part_5 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(part_5)
    ours = make(n_expert=3)
    theirs, idx = part_5.GPT(part_5.GPTConfig(**TINY, n_expert=3)), tokens(2, 16)
    theirs.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours(idx, idx), theirs(idx, idx)))
    assert torch.equal(ours.generate(idx, 8, temperature=0), theirs.generate(idx, 8, temperature=0))

def test_causality():
    model, idx = make(), tokens(1, 16)
    before = model(idx)[0]
    for t in range(16):
        other = idx.clone()
        other[0, t] = (idx[0, t] + 1) % END
        moved = (model(other)[0] - before).abs().amax(dim=-1)[0]
        assert torch.equal(moved[:t], torch.zeros(t)) and (moved[t:] > 0).all()

def test_gradient_flow():
    """Into every parameter; into logits only where an answer token is asked for."""
    model, rows = make(), records()
    x, y = get_batch(rows, 0, Config(batch_size=len(rows)))
    kept = []

    def keep(module, given, logits):
        logits.retain_grad()
        kept.append(logits)

    model.lm_head.register_forward_hook(keep)
    model(x, y)[1].backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    assert torch.equal(kept[0].grad.abs().sum(dim=-1) > 0, y != -100)
    matters = (y != -100).flip(1).cumsum(dim=1).flip(1) > 0  # an answer token stands at or after it
    never_read = torch.ones(13, dtype=torch.bool).index_fill(0, x[matters], False)
    assert never_read.any() and torch.equal(model.wte.weight.grad.abs().sum(dim=1) == 0, never_read)

def test_bf16_is_near_fp32():
    model, batch = make(std=0.1), get_batch(records(), 0, Config(batch_size=7))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*batch)[1]
    assert rough.dtype == torch.float32 and rough.item() == pytest.approx(model(*batch)[1].item(), rel=2e-2)

# generate ------------------------------------------------------------------------------------------------------------

def slow_generate(model, prompt, max_new_tokens, stop):
    """Greedy, one row, no cache, no padding."""
    row = list(prompt)
    while len(row) < len(prompt) + max_new_tokens and not (len(row) > len(prompt) and row[-1] == stop):
        row.append(model(torch.tensor([row]))[0][0, -1].argmax().item())
    return row

@pytest.mark.parametrize("sizes", [{}, {"window": 5, "sink": 2}, {"n_expert": 4}, {"n_kv_head": 1}])
def test_ragged_rows_are_each_row_alone(sizes):
    model, prompts = make(block_size=32, **sizes), [r["prompt"] for r in records(12, seed=3)]
    lengths = torch.tensor([len(p) for p in prompts])
    free = [slow_generate(model, p, 12, stop=-1) for p in prompts]
    stop = free[0][len(prompts[0]) + 3]  # a token that the model likes to write
    wanted = [slow_generate(model, p, 12, stop) for p in prompts]
    assert len({len(row) - len(p) for row, p in zip(wanted, prompts)}) > 1  # some rows stop, or stop earlier
    for prompt_pad in (stop, 0):  # what the padding is made of is no matter
        out = model.generate(pad(prompts, prompt_pad), 12, temperature=0, lengths=lengths, stop=stop)
        assert out.size(1) == max(map(len, wanted))
        for row, answer in zip(out.tolist(), wanted):
            assert row[:len(answer)] == answer and set(row[len(answer):]) <= {stop, prompt_pad}
    out = model.generate(pad(prompts, 0), 12, temperature=0, lengths=lengths)
    assert [row[:len(p) + 12] for row, p in zip(out.tolist(), prompts)] == free

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_is_the_scorers(temperature):
    """At the temperature of the sampling; NaN in the prompt and after the end."""
    torch.manual_seed(0)
    model, prompts = make(), [r["prompt"] for r in records(12, seed=3)]
    lengths = torch.tensor([len(p) for p in prompts])
    ids, logp = model.generate(pad(prompts, END), 10, temperature, lengths=lengths, stop=END, return_logp=True)
    scored = (model(ids[:, :-1])[0] / temperature).log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    ends = 0
    for b, n in enumerate(lengths.tolist()):
        answer = ids[b, n:n + 10].tolist()
        last = n + (answer.index(END) + 1 if END in answer else len(answer))
        ends += END in answer
        assert logp[b, :n].isnan().all() and logp[b, last:].isnan().all()
        torch.testing.assert_close(logp[b, n:last], scored[b, n - 1:last - 1], atol=1e-5, rtol=0)
    assert 0 < ends < 12

def test_sampling_follows_the_model():
    """4,000 rows of two prompt lengths: frequencies of the first token within 4 standard errors."""
    torch.manual_seed(1)
    model, prompts = make(), [[1, 2, 3], [4, 5, 6, 7, 8]]
    out = model.generate(pad(prompts * 2000, 0), 1, lengths=torch.tensor([3, 5] * 2000))
    for i, prompt in enumerate(prompts):
        p = model(torch.tensor([prompt]))[0][0, -1].softmax(dim=-1)
        share = out[i::2, len(prompt)].bincount(minlength=13) / 2000
        assert ((share - p).abs() < 4 * (p * (1 - p) / 2000).sqrt() + 1e-3).all()

def test_respond():
    model, rows = make(), records(9, seed=3)
    answers = respond(model, type("", (), {"special": {"<|end|>": END}}), rows, Config(max_new_tokens=12), 0.0, batch=4)
    for r, (ids, ended) in zip(rows, answers, strict=True):
        row = slow_generate(model, r["prompt"], 12, END)[len(r["prompt"]):]
        assert ids + [END] * ended == row and ended == (row[-1] == END) and END not in ids

# data, curriculum, measures ------------------------------------------------------------------------------------------

def test_order():
    rows = records(60)
    kinds = ("easy_first", "random", "anti")
    levels = {c: [rows[i]["level"] for i in order(rows, Config(curriculum=c))] for c in kinds}
    assert levels["easy_first"] == sorted(levels["random"]) and levels["anti"] == sorted(levels["random"], reverse=True)
    assert levels["random"] not in (levels["easy_first"], levels["anti"])
    for c in levels:
        perm = order(rows, Config(curriculum=c))
        assert sorted(perm) == list(range(60)) and perm == order(rows, Config(curriculum=c))
        assert perm != order(rows, Config(curriculum=c, seed=1))  # ties are shuffled
    assert sorted(order([{}] * 9, Config(curriculum="anti"))) == list(range(9))  # a user's records have no level

def test_a_step_takes_the_records_in_their_order():
    rows = [{"prompt": [i], "answer": [END]} for i in range(10)]
    first = lambda step, cfg: get_batch(rows, step, cfg)[0][:, 0].tolist()
    cfg = Config(batch_size=4, steps=5)
    assert [first(step, cfg) for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    cfg.curriculum = "easy_first"  # once through, whatever the number of steps
    assert first(0, cfg) == [0, 1, 2, 3] and first(4, cfg) == [6, 7, 8, 9]

def test_token_f1():
    cases = [("a b c", "a b d d", 4 / 7), ("a a", "a", 2 / 3), ("b a", "a b", 1), ("", "", 1), ("", "a", 0)]
    for answer, wanted, f1 in cases:
        assert token_f1(answer, wanted) == pytest.approx(f1) == token_f1(wanted, answer)

def test_gold():
    task = {"task": "sum", "level": 1, "check": {"answer": "7"}, "output": "7"}
    shares = gold([task, {**task, "level": 2}, {"output": "a b"}], [("7", True), ("8", True), ("a c", False)])
    assert shares == {"sum": 0.5, "sum level 1": 1.0, "sum level 2": 0.0, "check answer": 0.5, "exact match": 1 / 3,
                      "token F1": 0.5}

def test_too_long_is_counted_and_left_out(tmp_path, capsys):
    path = write(tmp_path, 20, [{"instruction": "the " * 90, "input": "", "output": "dog"}])
    train, val = load_data(Config(data=str(path)), TOK, 40)
    assert (len(train), len(val)) == (17, 2) and "1 of 18 records" in capsys.readouterr().out
    assert all(len(r["prompt"]) + len(r["answer"]) <= 40 for r in train + val)
    with pytest.raises(SystemExit) as end:
        load_data(Config(data=str(path)), TOK, 5)
    assert end.value.code == 2 and "no record is left" in capsys.readouterr().err

def test_overfit_one_batch_and_say_it():
    torch.manual_seed(0)
    model, rows = GPT(GPTConfig(**TINY | dict(n_embd=32, mlp_dim=64))), records(6)
    for i, r in enumerate(rows):
        r["prompt"][0] = i  # no two prompts alike
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(80):
        loss = model(*get_batch(rows, 0, Config(batch_size=6)))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    answers = respond(model, type("", (), {"special": {"<|end|>": END}}), rows, Config(max_new_tokens=12), 0.0)
    assert [ids + [END] for ids, _ in answers] == [r["answer"] for r in rows] and all(ended for _, ended in answers)

# the script ----------------------------------------------------------------------------------------------------------
# One process imports torch, and runs the script once per line, each time in a child of its own.

SERVER = """
import json, os, runpy, sys, tiktoken, torch, torch._dynamo
for line in sys.stdin:
    folder, script, *argv = json.loads(line)
    if not (child := os.fork()):
        for fd, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.argv, code = [script, *argv], 0
        sys.path.insert(0, os.path.dirname(script))
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = 1
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        os._exit(code or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

@pytest.fixture(scope="module")
def run():
    """run(folder, *options) -> exit code, stdout, stderr."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(folder, *argv):
        print(json.dumps([str(folder), str(SCRIPT), *argv]), file=server.stdin, flush=True)
        return int(server.stdout.readline()), (folder / "stdout").read_text(), (folder / "stderr").read_text()

    yield ask
    server.kill()
    server.communicate()

def write(folder, n, more=(), name="data.jsonl"):
    """n records in Alpaca's fields, two of the last ten with a check of their own."""
    rng = random.Random(0)
    lines = [{"instruction": "say it", "input": word, "output": word} for word in rng.choices(WORDS, k=n - len(more))]
    for r in lines[-2:]:
        r.update(task="story", level=1, check={"answer": r["output"]})
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in [*more, *lines]))
    return path

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data and a base model, and each bad file that NONSENSE names."""
    folder = tmp_path_factory.mktemp("sft")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=TOK.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=16))
    save_checkpoint(folder / "base.pt", kind="base", **model.to_checkpoint(), tokenizer=TOK.state())
    save_checkpoint(folder / "kind.pt", kind="rm", **model.to_checkpoint(), tokenizer=TOK.state())
    (folder / "half.pt").write_bytes((folder / "base.pt").read_bytes()[:9000])
    torch.save([1, 2, 3], folder / "foreign.pt")
    lines = write(folder, 40, [{"instruction": "the " * 90, "input": "", "output": "dog"}]).read_text().splitlines()
    (folder / "empty.jsonl").touch()
    (folder / "broken.jsonl").write_text("\n".join([*lines[:4], lines[4][:-5], *lines[5:]]))
    (folder / "field.jsonl").write_text("\n".join([*lines[:6], '{"instruction": "say it", "input": ""}']))
    array = [json.loads(lines[1]), {"instruction": 1, "input": None, "output": ""}]
    (folder / "array.json").write_text(json.dumps(array))
    return folder

def options(folder, out, *more):
    sizes = ["--block_size=24", "--steps=12", "--batch_size=8", "--max_new_tokens=6", "--prompts=4", "--eval_every=6"]
    return [f"--data={folder}/data.jsonl", f"--init={folder}/base.pt", f"--out={out}", *sizes, *more]

def test_smoke(folder, run, tmp_path):
    out = tmp_path / "out"
    code, said, wrong = run(tmp_path, *options(folder, out))
    assert code == 0, wrong
    assert "1 of 36 records have over 24 tokens: left out" in said
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((out / "metrics.json").read_text())
    assert [r["step"] for r in log] == list(range(12)) and log[-1]["loss"] < log[0]["loss"]
    assert [r["step"] for r in log if "val_loss" in r] == [5, 11] and metrics["val_loss"] == log[-1]["val_loss"]
    assert 0 <= metrics["gold_pass"] <= 1 and metrics["steps"] == 12 and metrics["seconds"] > 0
    assert metrics["token_F1"] >= metrics["exact_match"]
    checkpoint = load_checkpoint(out / "sft.pt", "sft")
    assert checkpoint["changed"]["steps"] == 12 and checkpoint["gpt_config"]["block_size"] == 24
    assert GPT.load(checkpoint).cfg.vocab_size == Tokenizer.load(checkpoint["tokenizer"]).vocab_size == TOK.vocab_size

NONSENSE = {  # name: (options, what the one line says)
    "unknown": (["--stepz=3"], "no option --stepz, did you mean --steps?"),
    "type": (["--steps=three"], "--steps wants an int, got 'three'"),
    "curriculum": (["--curriculum=hard"], "curriculum=hard must be one of easy_first"),
    "missing": (["--data=nowhere.jsonl"], "there is no file nowhere.jsonl"),
    "empty": (["--data={0}/empty.jsonl"], "empty.jsonl is empty"),
    "broken": (["--data={0}/broken.jsonl"], "broken.jsonl line 5:"),
    "field": (["--data={0}/field.jsonl"], "field.jsonl line 7: field 'output' is missing"),
    "array": (["--data={0}/array.json"], "array.json record 2: field 'input' is missing or not text"),
    "too long": (["--block_size=4"], "no record is left"),
    "no model": (["--init=nowhere.pt"], "no checkpoint at nowhere.pt"),
    "truncated": (["--init={0}/half.pt"], "half.pt is truncated or not a checkpoint"),
    "foreign": (["--init={0}/foreign.pt"], "foreign.pt is truncated or not a checkpoint"),
    "kind": (["--init={0}/kind.pt"], "kind.pt is a 'rm' checkpoint, wanted is 'base'"),
    "file": (["--out={0}/empty.jsonl"], "is a file, a folder is wanted"),
    "nan": (["--lr=1e20", "--lr_adamw=1e20"], "loss is nan at step"),
}

@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_one_line(folder, run, tmp_path, name):
    more, wanted = NONSENSE[name]
    code, _, said = run(tmp_path, *options(folder, tmp_path / "out", *(option.format(folder) for option in more)))
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and wanted in said, said
    left = {path.name for path in (tmp_path / "out").glob("*")}
    assert left <= {"log.jsonl"}, left
