"""
Tests of lora.py and demo_lora.py. The oracles are sums written out, plain models, gradients of
whole batches, and runs of the scripts on tiny models with random weights.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.nn as nn

import demo_lora
import lora
from lora import (
    MATRICES,
    Config,
    LoRALinear,
    adapters,
    add_adapters,
    answer_loss,
    backward,
    choose_parameters,
    collate,
    encode_records,
    fingerprint,
    load_adapter,
    make_batches,
    merge_adapters,
    save_adapter,
)
from model import GPT, GPTConfig
from shared import load_checkpoint, parse_args, save_checkpoint
from tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
CPU = torch.device("cpu")
LAYERS = 2

# The bytes alone, with the chat template of another model.
TEMPLATE = {"start": "<|im_start|>", "answer": "<|im_end|>", "end": "<|im_end|>", "next": ""}
TOK = Tokenizer(
    {bytes([i]): i for i in range(256)},
    special=["<|im_start|>", "<|im_end|>"],
    pattern=r"[\s\S]",
    template=TEMPLATE,
)


def make_model(seed=0, tied=True):
    """A small model with random weights. Those of a new model have zeros, which would hide what
    stands before them."""
    generator = torch.Generator().manual_seed(seed)
    cfg = GPTConfig(
        vocab_size=TOK.vocab_size,
        block_size=300,
        n_layer=LAYERS,
        n_head=4,
        n_kv_head=2,
        n_embd=16,
        mlp_dim=24,
        tied=tied,
        qk_norm=False,
    )
    model = GPT(cfg).eval()
    for p in model.parameters():
        if p.ndim == 2:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return model


def make_records(n=6):
    records = []
    for i in range(n):
        record = {
            "instruction": "say " + "a" * (3 * i),
            "input": "twice" if i % 2 else "",
            "output": "yes " * (i + 1),
        }
        records.append(record)
    return encode_records(records, TOK, 200)


def randomize(model, seed=1):
    """Random corrections, as if they had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for module in adapters(model).values():
        for p in (module.A, module.B):
            p.data = 0.2 * torch.randn(p.shape, generator=generator)


def logits_of(model):
    generator = torch.Generator().manual_seed(2)
    idx = torch.randint(256, (3, 20), generator=generator)
    with torch.no_grad():
        return model(idx)[0]


# the correction -----------------------------------------------------------------------------------


def test_a_correction_is_the_sum_that_the_paper_writes():
    linear = nn.Linear(5, 4, bias=False)
    layer = LoRALinear(linear, rank=2, alpha=6.0)
    layer.B.data = torch.randn(4, 2)
    x = torch.randn(3, 5)
    y = layer(x)
    assert y.shape == (3, 4)
    for row in range(3):
        for i in range(4):
            expected = 0.0
            for j in range(5):
                correction = sum(layer.B[i, k] * layer.A[k, j] for k in range(2))
                weight = linear.weight[i, j] + 6.0 / 2 * correction
                expected += weight * x[row, j]
            assert y[row, i].item() == pytest.approx(expected.item(), abs=1e-5)


def test_new_adapters_change_nothing_at_all():
    model = make_model()
    before = logits_of(model)
    add_adapters(model, "all", 3, 8.0)
    assert len(adapters(model)) == 7 * LAYERS
    assert torch.equal(logits_of(model), before)


def test_the_size_of_new_corrections():
    layer = LoRALinear(nn.Linear(400, 10, bias=False), rank=100, alpha=1.0)
    assert layer.A.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert (layer.B == 0).all()


def test_only_b_has_a_gradient_at_the_start():
    model = make_model()
    choose_parameters(model, Config(rank=2))
    backward(model, make_records(), 1, CPU)
    for module in adapters(model).values():
        assert (module.A.grad == 0).all()
        assert module.B.grad.abs().max() > 0


@pytest.mark.parametrize("chosen", ["all", "q,v", "down", "k,o,gate,up"])
def test_the_merged_model_equals_the_adapted_one(chosen):
    model = make_model()
    original = make_model()
    add_adapters(model, chosen, 3, 7.0)
    randomize(model)
    adapted = logits_of(model)
    assert (adapted - logits_of(original)).abs().max() > 0.1

    merge_adapters(model)
    assert not adapters(model)
    assert model.state_dict().keys() == original.state_dict().keys()
    assert (logits_of(model) - adapted).abs().max() < 1e-4

    # Only the chosen matrices have changed, each by a matrix of rank 3.
    names = list(MATRICES) if chosen == "all" else chosen.split(",")
    endings = tuple(f"{MATRICES[name]}.weight" for name in names)
    for name, p in original.state_dict().items():
        change = model.state_dict()[name] - p
        if name.endswith(endings):
            assert torch.linalg.matrix_rank(change, atol=1e-4) == 3
        else:
            assert (change == 0).all()


def test_merge_and_compare_measures_the_difference(monkeypatch):
    model = make_model()
    add_adapters(model, "all", 2, 4.0)
    randomize(model)
    records = make_records()
    assert lora.merge_and_compare(model, records, CPU) < 1e-4
    assert not adapters(model)

    # A merge that forgets the factor is seen.
    model = make_model()
    add_adapters(model, "all", 2, 4.0)
    randomize(model)
    monkeypatch.setattr(LoRALinear, "merged", lambda layer: layer.linear)
    assert lora.merge_and_compare(model, records, CPU) > 1e-2


def test_all_names_of_matrices_are_those_of_the_model():
    model = make_model()
    names = {name.split(".", 2)[2] for name in lora.matrices(model)}
    assert names == set(MATRICES.values())


# what is trained ----------------------------------------------------------------------------------


def train_a_little(model, chosen, steps=3, lr=0.01):
    optimizer = torch.optim.AdamW(chosen, lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        losses.append(backward(model, make_records(), 1, CPU))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


@pytest.mark.parametrize("method", ["lora", "full", "norms", "head"])
def test_what_a_method_changes(method):
    original = make_model().state_dict()
    model = make_model()
    chosen = choose_parameters(model, Config(method=method, matrices="q,up", rank=2))
    n_chosen = sum(p.numel() for p in chosen)
    if method == "lora":
        assert n_chosen == LAYERS * 2 * (16 + 16 + 16 + 24)  # r (in + out), twice in each layer
    elif method == "norms":
        assert n_chosen == (2 * LAYERS + 1) * 16
    elif method == "head":
        assert n_chosen == TOK.vocab_size * 16
    else:
        assert n_chosen == sum(p.numel() for p in make_model().parameters())

    losses = train_a_little(model, chosen)
    assert losses[-1] < losses[0]
    merge_adapters(model)

    changed = set()
    for name, p in model.state_dict().items():
        if not torch.equal(p, original[name]):
            changed.add(name)
    expected = {
        "lora": {name for name in original if name.endswith(("c_q.weight", "c_fc.weight"))},
        "norms": {name for name in original if "ln_" in name},
        "head": {"lm_head.weight"},
        "full": set(original),
    }
    assert changed == expected[method]

    # What was trained survives in a checkpoint, also if the head has left the embedding.
    again = GPT.load(model.to_checkpoint())
    assert torch.equal(logits_of(again), logits_of(model))


def test_frozen_weights_get_no_gradient():
    for method in ("lora", "norms", "head"):
        model = make_model()
        chosen = choose_parameters(model, Config(method=method))
        backward(model, make_records(), 1, CPU)
        with_gradient = [p for p in model.parameters() if p.grad is not None]
        assert {id(p) for p in with_gradient} == {id(p) for p in chosen}


def test_a_few_answers_are_learned_by_heart():
    model = make_model()
    chosen = choose_parameters(model, Config(method="full"))
    losses = train_a_little(model, chosen, steps=60, lr=0.02)
    assert losses[-1] < 0.1 * losses[0]
    answers = lora.respond(model, TOK, make_records(), 40, CPU)
    for record, answer in zip(make_records()[:3], answers):
        assert answer.text == record["output"] and answer.ended


def test_the_memory_of_training_by_hand():
    model = make_model()
    n_weights = sum(p.numel() for p in model.parameters())
    chosen = choose_parameters(model, Config(matrices="q", rank=2))
    n_chosen = LAYERS * 2 * (16 + 16)
    megabytes = lora.memory_of_training(model, chosen)
    assert megabytes == pytest.approx(4 * (n_weights + 4 * n_chosen) / 1e6)


# loss and batches ---------------------------------------------------------------------------------


def test_the_loss_counts_the_answers_alone():
    model = make_model()
    records = make_records()
    idx, targets = collate(records)
    n_answer_tokens = sum(len(record["answer_ids"]) for record in records)
    assert (targets >= 0).sum() == n_answer_tokens
    _, mean = model(idx, targets)
    total = answer_loss(model, idx, targets)
    assert total.item() == pytest.approx(mean.item() * n_answer_tokens, rel=1e-5)

    # each record alone, without padding, token by token
    expected = 0.0
    for record in records:
        ids = torch.tensor([record["prompt_ids"] + record["answer_ids"]])
        log_p = model(ids)[0][0].log_softmax(dim=-1)
        for t in range(len(record["prompt_ids"]), ids.size(1)):
            expected -= log_p[t - 1, ids[0, t]].item()
    assert total.item() == pytest.approx(expected, rel=1e-4)
    assert lora.val_loss(model, records, CPU) == pytest.approx(expected / n_answer_tokens, rel=1e-4)


@pytest.mark.parametrize("accum", [2, 3, 6])
def test_a_batch_in_parts_has_the_same_gradient(accum):
    records = make_records()
    gradients = []
    losses = []
    for parts in (1, accum):
        model = make_model()
        choose_parameters(model, Config(method="full"))
        losses.append(backward(model, records, parts, CPU))
        gradients.append([p.grad for p in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for whole, in_parts in zip(*gradients):
        assert (whole - in_parts).abs().max() < 1e-4 * whole.abs().max() + 1e-7


def test_a_prompt_in_the_chat_template_of_the_model():
    record = encode_records([{"instruction": "a", "input": "b", "output": "c"}], TOK, 20)[0]
    start, end = TOK.special["<|im_start|>"], TOK.special["<|im_end|>"]
    assert record["prompt_ids"] == [start, ord("a"), ord("\n"), ord("b"), end]
    assert record["answer_ids"] == [ord("c"), end]


def test_records_that_are_too_long_are_left_out(capsys):
    records = [{"instruction": "a" * n, "input": "", "output": "b"} for n in (3, 6, 7)]
    assert len(encode_records(records, TOK, 10)) == 2
    assert "1 of 3 records are longer than 10 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        encode_records(records, TOK, 3)
    assert "no record fits in 3 tokens" in capsys.readouterr().err


def records_of_lengths(lengths):
    return [{"prompt_ids": [1] * n, "answer_ids": [2], "number": i} for i, n in enumerate(lengths)]


def test_batches_use_every_record_once_in_a_round():
    records = records_of_lengths(range(1, 41))
    cfg = Config(steps=10, batch_size=4)
    batches = make_batches(records, cfg)
    assert [len(batch) for batch in batches] == [4] * 10
    first_group = [record["number"] for batch in batches[:8] for record in batch]
    assert len(set(first_group)) == 32

    # In 20 steps there are two rounds.
    batches = make_batches(records, Config(steps=24, batch_size=4))
    counts = [0] * 40
    for batch in batches:
        for record in batch:
            counts[record["number"]] += 1
    assert sum(counts) == 96 and min(counts) >= 2 and max(counts) <= 3

    # The seed decides, and fewer records than a group are enough.
    numbers = [[r["number"] for r in batch] for batch in make_batches(records, cfg)]
    assert numbers == [[r["number"] for r in batch] for batch in make_batches(records, cfg)]
    other = make_batches(records, Config(steps=10, batch_size=4, seed=1))
    assert numbers != [[r["number"] for r in batch] for batch in other]
    assert len(make_batches(records[:3], cfg)) == 10


def test_batches_have_little_padding_and_come_in_no_order():
    generator = torch.Generator().manual_seed(0)
    records = records_of_lengths(torch.randint(1, 200, (64,), generator=generator).tolist())
    batches = make_batches(records, Config(steps=8, batch_size=8))
    longest = [max(lora.n_tokens(record) for record in batch) for batch in batches]
    used = sum(lora.n_tokens(record) for batch in batches for record in batch)
    assert used > 0.85 * 8 * sum(longest)
    assert longest != sorted(longest)


def test_learning_rates_by_hand():
    cfg = Config(steps=10, warmup=0.2, decay=0.5)
    expected = [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert [lora.lr_scale(step, cfg) for step in range(10)] == pytest.approx(expected)


# data, answers ------------------------------------------------------------------------------------


def test_only_right_demonstrations_of_the_task_are_kept():
    records = lora.load_data(Config(task="problem"))
    for part in records:
        assert len(part) > 100
        for record in part:
            assert record["task"] == "problem"
            assert lora.judge(record, record["output"]).passed
    instructions = {record["instruction"] for record in records.train}
    assert not instructions & {record["instruction"] for record in records.val}


def test_records_of_the_users_own(tmp_path, capsys):
    path = tmp_path / "my.json"
    records = [{"instruction": str(i), "input": "", "output": "b"} for i in range(20)]
    path.write_text(json.dumps(records))
    data = lora.load_data(Config(data=str(path)))
    assert [record["instruction"] for record in data.val] == ["18", "19"]
    assert len(data.train) == 18

    path.write_text(json.dumps(records[:1]))
    with pytest.raises(SystemExit) as end:
        lora.load_data(Config(data=str(path)))
    assert end.value.code == 2
    assert "has 1 record; at least 2 are needed" in capsys.readouterr().err


def test_answers_are_the_likeliest_tokens():
    model = make_model(tied=False)
    records = make_records(20)
    answers = lora.respond(model, TOK, records, 12, CPU)
    assert len(answers) == 20
    for record, answer in zip(records, answers):
        ids = list(record["prompt_ids"])
        written = []
        ended = False
        while len(written) < 12 and not ended:
            token = model(torch.tensor([ids]))[0][0, -1].argmax().item()
            ids.append(token)
            ended = token == TOK.end
            if not ended:
                written.append(token)
        assert answer.text == TOK.decode(written)
        assert answer.ended == ended


def test_the_share_of_right_answers():
    records = [{"check": {"answer": "a fox"}}, {"check": {"answer": "2"}}, {}]
    answers = [lora.Answer("A fox.", True), lora.Answer("2", False), lora.Answer("x", True)]
    assert lora.share_passed(records, answers) == 0.5
    assert lora.share_passed([{}], answers[:1]) is None


def test_the_finding_says_what_came_out():
    before = lora.Evaluation([], 0.0, 6.0, 3.0)
    after = lora.Evaluation([], 0.5, 1.0, 3.25)
    records = [{"check": {}}] * 8 + [{}]  # the last one cannot be judged
    title = lora.finding(before, after, records)
    assert "0.00 to 0.50 of 8 held-out answers right" in title and "+0.250 nats" in title
    after = after._replace(gold=None, text_loss=2.5)
    title = lora.finding(before, after, records)
    assert "loss 6.00 to 1.00" in title and "-0.500 nats" in title


# adapter files ------------------------------------------------------------------------------------


def test_fingerprints_tell_weights_apart():
    model = make_model()
    print_of_model = fingerprint(model)
    assert print_of_model == fingerprint(make_model())
    assert print_of_model != fingerprint(make_model(seed=1))
    weight = model.h[1].mlp.c_proj.weight
    weight.data[3, 5] += 1e-6
    assert print_of_model != fingerprint(model)

    # The order counts, too: two rows are exchanged.
    model = make_model()
    weight = model.h[1].mlp.c_proj.weight
    weight.data = weight.data.flip(0)
    assert print_of_model != fingerprint(model)


def test_an_adapter_file_gives_the_same_model_again(tmp_path):
    model = make_model()
    base = fingerprint(model)
    add_adapters(model, "q,v,down", 3, 5.0)
    randomize(model)
    path = tmp_path / "lora.pt"
    cfg = parse_args(Config, argv=["--matrices=q,v,down", "--rank=3", "--alpha=5"])
    save_adapter(path, model, base, cfg)
    n_numbers = 3 * LAYERS * (16 + 16 + 16 + 8 + 24 + 16)
    weights = load_checkpoint(path, "lora")["weights"]
    assert sum(p.numel() for p in weights.values()) == n_numbers

    again = make_model()
    load_adapter(lora.read_adapter(path, base), again)
    assert torch.equal(logits_of(again), logits_of(model))


def test_an_adapter_of_another_model_is_one_line(tmp_path, capsys):
    model = make_model()
    add_adapters(model, "q", 1, 1.0)
    cfg = parse_args(Config, argv=["--matrices=q", "--rank=1"])
    save_adapter(tmp_path / "lora.pt", model, "abc", cfg)
    other = make_model(seed=1)
    with pytest.raises(SystemExit) as end:
        lora.read_adapter(tmp_path / "lora.pt", fingerprint(other))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "is an adapter of other weights than these: it belongs to smollm2" in error
    assert error.count("\n") == 1


# the scripts --------------------------------------------------------------------------------------


def run(script, *options):
    command = [sys.executable, str(script), "--device=cpu", *options]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "tiny.pt"
    save_checkpoint(path, kind="base", tokenizer=TOK.state(), **make_model().to_checkpoint())
    return path


TINY = ["--steps=3", "--batch_size=2", "--asked=4", "--held_out=2", "--eval_every=2"]


def test_train_merge_and_talk(base_path, tmp_path):
    options = [f"--model={base_path}", f"--out={tmp_path}"]
    done = run(FOLDER / "lora.py", *options, *TINY, "--merge", "--lr=0.01", "--rank=2")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "lora.json").read_text())
    assert metrics["before"]["val_loss"] > metrics["after"]["val_loss"]
    assert metrics["before"]["text_loss"] != metrics["after"]["text_loss"]
    assert metrics["merged_difference"] < 1e-4
    assert 0 < metrics["share"] < 0.5
    lines = [json.loads(line) for line in (tmp_path / "lora.jsonl").read_text().splitlines()]
    assert ["val_loss" in line for line in lines] == [False, True, True]
    assert (tmp_path / "lora.png").read_bytes().startswith(b"\x89PNG")

    # The merged checkpoint has the tokenizer and the whole context of the base model, and Part 6
    # talks to it.
    merged = load_checkpoint(tmp_path / "merged.pt", "sft")
    assert merged["tokenizer"] == TOK.state()
    assert merged["gpt_config"]["block_size"] == 300
    chat = FOLDER.parent / "part_6" / "chat.py"
    talk = ["--prompt=hello", "--max_new_tokens=4", "--temperature=0"]
    answer = run(chat, f"--model={tmp_path / 'merged.pt'}", *talk)
    assert answer.returncode == 0, answer.stderr
    assert "per second" in answer.stderr

    # The adapter file alone gives the same model again.
    again = [f"--model={base_path}", f"--out={tmp_path / 'again'}", *TINY, "--merge"]
    done = run(FOLDER / "lora.py", *again, f"--adapter={tmp_path / 'lora.pt'}")
    assert done.returncode == 0, done.stderr
    after = json.loads((tmp_path / "again" / "lora.json").read_text())["after"]
    assert after == pytest.approx(metrics["after"], rel=1e-5)
    merged_again = load_checkpoint(tmp_path / "again" / "merged.pt", "sft")["weights"]
    for name, p in merged["weights"].items():
        assert torch.equal(p, merged_again[name])


def test_the_comparison(base_path, tmp_path):
    options = [f"--model={base_path}", f"--out={tmp_path}", "--runs=head", *TINY]
    command = [sys.executable, str(FOLDER / "demo_lora.py"), *options]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "demo_lora.json").read_text())["results"]
    assert list(results) == ["head"] and results["head"][0]["method"] == "head"
    assert [line["step"] for line in results["head"][0]["log"]] == [1, 2]
    assert (tmp_path / "demo_lora.png").read_bytes().startswith(b"\x89PNG")


def test_the_comparison_calls_overlapping_ranges_no_difference():
    def make_run(gold, text_loss):
        before = {"gold": 0.0, "val_loss": 6.0, "text_loss": 3.0}
        after = {"gold": gold, "val_loss": 1.0, "text_loss": text_loss}
        return {"before": before, "after": after, "share": 0.01}

    low = [make_run(0.4, 3.1), make_run(0.45, 3.1), make_run(0.5, 3.2)]
    high = [make_run(0.6, 3.2), make_run(0.65, 3.3), make_run(0.7, 3.4)]
    title = demo_lora.finding({"lora": low, "full": high})
    assert "learned: LoRA less, forgotten: no difference (3 seeds)" in title
    title = demo_lora.finding({"lora": high, "full": low})
    assert "learned: LoRA more, forgotten: no difference (3 seeds)" in title

    # One seed says nothing about a difference, so the title has only the numbers.
    title = demo_lora.finding({"lora": high[1:2], "full": low[:1]})
    assert "learned: LoRA 0.65, full 0.40, forgotten: LoRA 0.30, full 0.10 (1 seed)" in title
    assert "LoRA with 1.0%" in title


@pytest.mark.parametrize(
    "module, option, message",
    [
        (lora, "--method=half", "method=half must be one of lora, full, norms, head"),
        (lora, "--matrices=q,w", "matrices=q,w must be all or some of q,k,v,o,gate,up,down"),
        (lora, "--rank=0", "rank=0 must be at least 1"),
        (lora, "--alpha=0", "alpha=0.0 must be above 0"),
        (lora, "--accum=9", "accum=9 must be at most batch_size=4"),
        (demo_lora, "--runs=lora,half", "runs=lora,half must be some of lora,full,"),
    ],
)
def test_bad_options_end_in_one_line(module, option, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(module.Config, argv=[option])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_an_adapter_needs_its_method(capsys):
    with pytest.raises(SystemExit):
        parse_args(Config, argv=["--adapter=x.pt", "--method=full"])
    assert "--adapter needs --method=lora" in capsys.readouterr().err


def test_an_unknown_task_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        lora.load_data(Config(task="fly"))
    assert end.value.code == 2
    assert "--task=fly must be one of count, is_a," in capsys.readouterr().err
