"""
Tests of distill.py. The oracles are examples by hand, torch's own functions, the same sums term by
term, and a run of the script with tiny sizes.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.nn.functional as F

import distill
from compression import Rows
from distill import (
    LESSONS,
    Config,
    Muon,
    Source,
    distillation_loss,
    evaluate,
    get_batch,
    lr_scale,
    make_optimizers,
    make_students,
    mix_of,
    orthogonalize,
    overlap,
    share_of_text,
    softened_kl,
    train,
    written_by,
)
from model import GPT, GPTConfig
from shared import load_checkpoint, parse_args, save_checkpoint
from tokenizer import SPECIAL, Tokenizer

FOLDER = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CPU = torch.device("cpu")
V = 11


def make_teacher(block_size=8, vocab_size=V):
    """A small model with random weights that is sure of what it says."""
    cfg = GPTConfig(vocab_size, block_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)
    teacher = GPT(cfg)
    generator = torch.Generator().manual_seed(0)
    for p in teacher.parameters():
        if p.ndim == 2:
            p.data = 0.5 * torch.randn(p.shape, generator=generator)
    return teacher


def make_logits(seed=0, shape=(2, 3, V)):
    """The logits of a student and of a teacher, in float64."""
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    return student, teacher, targets


# the mathematics ----------------------------------------------------------------------------------


def test_softened_kl_by_hand():
    """The teacher says 0.8 and 0.2, the student says 0.5 and 0.5. At temperature 2 the teacher's
    odds of 4 become odds of 2: 2/3 and 1/3."""
    teacher = torch.tensor([math.log(4), 0.0])
    student = torch.zeros(2)
    expected = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    assert softened_kl(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-5)
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert softened_kl(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_softened_kl_against_torch(temperature):
    student, teacher, _ = make_logits()
    expected = F.kl_div(
        (student / temperature).log_softmax(dim=-1),
        (teacher / temperature).softmax(dim=-1),
        reduction="none",
    ).sum(dim=-1)
    actual = softened_kl(student, teacher, temperature)
    torch.testing.assert_close(actual, expected)
    assert (actual > 0).all()
    torch.testing.assert_close(softened_kl(teacher, teacher, temperature), torch.zeros_like(actual))


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_the_loss_term_by_term(mix):
    student, teacher, targets = make_logits()
    T = 3.0
    total = 0.0
    for b in range(2):
        for t in range(3):
            p = (teacher[b, t] / T).softmax(dim=-1)
            q = (student[b, t] / T).softmax(dim=-1)
            nats = -student[b, t].log_softmax(dim=-1)[targets[b, t]]
            total += mix * T**2 * (p * (p / q).log()).sum() + (1 - mix) * nats
    actual = distillation_loss(student, teacher, targets, mix, T)
    torch.testing.assert_close(actual, total / 6)


def test_the_text_alone_needs_no_teacher():
    student, _, targets = make_logits()
    expected = F.cross_entropy(student.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(distillation_loss(student, None, targets, 0.0, 2.0), expected)


def gradient(mix, temperature, teacher, targets, student):
    student = student.clone().requires_grad_()
    distillation_loss(student, teacher, targets, mix, temperature).backward()
    return student.grad


def test_the_factor_t2_keeps_the_gradient_alive():
    """At a high temperature the gradient of the loss tends to the difference of the centred logits,
    divided by V (Hinton et al. 2015, eq. 4). Without the factor it would tend to zero."""
    student, teacher, targets = make_logits()
    actual = gradient(1.0, 1000.0, teacher, targets, student)
    difference = student - teacher
    centred = difference - difference.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(actual, centred / V / 6, rtol=0.02, atol=1e-4)


def test_the_gradient_of_the_text_is_that_of_the_teacher_on_average():
    """At temperature 1, and with targets that are drawn from the teacher: one is a noisy version of
    the other."""
    student, teacher, targets = make_logits()
    expected = gradient(1.0, 1.0, teacher, targets, student)
    average = torch.zeros_like(student)
    p = teacher.softmax(dim=-1)
    for token in range(V):
        for_token = gradient(0.0, 1.0, None, torch.full_like(targets, token), student)
        average += p[..., token : token + 1] * for_token
    torch.testing.assert_close(average, expected)


def test_overlap_by_hand():
    p = torch.tensor([0.7, 0.2, 0.1]).log()
    q = torch.tensor([0.1, 0.2, 0.7]).log()
    assert overlap(p, q).item() == pytest.approx(0.4)
    assert overlap(p, p).item() == pytest.approx(1)


# data ---------------------------------------------------------------------------------------------


def make_tokenizer():
    return Tokenizer({bytes([i]): i for i in range(256)}, SPECIAL)


def test_a_share_of_the_text_is_its_first_documents():
    tok = make_tokenizer()
    text = "".join(f"\n\nstory {i}." for i in range(20)) + "\n\nthe end of it all"
    whole = share_of_text("1", tok, text, 10)
    half = share_of_text("0.5", tok, text, 10)
    assert len(whole.starts) == 21
    assert half.starts.tolist() == whole.starts[:10].tolist()

    # A row starts with the last token of the blank line, and all of it is in the text.
    for start in whole.starts:
        assert tok.decode(whole.ids[start : start + 4].tolist()) in ("\nsto", "\nthe")
    assert whole.starts.max() + 10 < len(whole.ids)


def test_too_small_a_share_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        share_of_text("0.01", make_tokenizer(), "\n\na story.\n\nand another one", 8)
    assert end.value.code == 2
    assert "a share of 0.01 is less than one of the 2 documents" in capsys.readouterr().err


def test_batches():
    source = Source("1", torch.arange(100), torch.tensor([0, 20, 40]), 5, 0.0)
    x, y = get_batch(source, 3, 0, 8)
    assert x.shape == y.shape == (8, 5)
    assert set(x[:, 0].tolist()) <= {0, 20, 40}
    assert (y == x + 1).all()
    torch.manual_seed(1)
    assert (get_batch(source, 3, 0, 8)[0] == x).all()
    assert (get_batch(source, 4, 0, 8)[0] != x).any()
    assert (get_batch(source, 3, 1, 8)[0] != x).any()


def test_the_teacher_writes_what_it_finds_likely():
    torch.manual_seed(0)
    teacher = make_teacher()
    source = written_by(teacher, 4, Config(samples=600), CPU)
    texts = source.ids.view(600, 8)
    assert (texts[:, 0] == 4).all()
    assert source.starts.tolist() == list(range(0, 4800, 8))
    assert source.length == 7

    # The second token has the teacher's probabilities.
    counts = texts[:, 1].bincount(minlength=V)
    p = teacher(torch.tensor([[4]]))[0][0, 0].softmax(dim=-1)
    assert (counts / 600 - p).abs().max() < 0.06

    # A row never runs into the next text.
    x, y = get_batch(source, 0, 0, 50)
    assert (x[:, 0] == 4).all()
    rows = {tuple(row) for row in texts.tolist()}
    for inputs, targets in zip(x.tolist(), y.tolist()):
        assert (*inputs, targets[-1]) in rows


# optimizers ---------------------------------------------------------------------------------------


def test_orthogonalize_brings_singular_values_near_1():
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 30), (30, 12)):
        matrix = torch.randn(shape, generator=generator)
        values = torch.linalg.svdvals(orthogonalize(matrix))
        assert 0.6 < values.min() and values.max() < 1.3


def test_each_parameter_has_one_optimizer():
    model = make_teacher()
    muon, adamw = make_optimizers(model, 0.02)
    assert isinstance(muon, Muon)
    in_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    in_adamw = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert not in_muon & in_adamw
    assert muon.param_groups[0]["peak_lr"] == 0.02
    assert adamw.param_groups[0]["peak_lr"] == pytest.approx(0.006)
    for name, p in model.named_parameters():
        is_hidden = name.startswith("h.") and p.ndim == 2
        assert (id(p) in in_muon) == is_hidden
        assert (id(p) in in_adamw) != is_hidden


def test_lr_scale_by_hand():
    cfg = Config(steps=10, warmup=0.2, decay=0.5)
    scales = [lr_scale(step, cfg) for step in range(10)]
    assert scales == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


# train, evaluate ----------------------------------------------------------------------------------


def make_rows(tokens_per_row=7):
    generator = torch.Generator().manual_seed(3)
    idx = torch.randint(V, (9, tokens_per_row), generator=generator)
    targets = torch.randint(V, (9, tokens_per_row), generator=generator)
    targets[2, 4:] = -100
    return Rows(idx, targets, 200)


def test_evaluate_against_one_token_after_the_other():
    teacher = make_teacher()
    student = make_students(Config(n_embd=8, n_layer=1), teacher, 0, CPU)["text"]
    rows = make_rows()
    nats = 0.0
    mass = 0.0
    n = 0
    for inputs, targets in zip(rows.idx, rows.targets):
        for t, target in enumerate(targets.tolist()):
            if target < 0:
                continue
            q = student(inputs[None, : t + 1])[0][0, -1].softmax(dim=-1)
            p = teacher(inputs[None, : t + 1])[0][0, -1].softmax(dim=-1)
            nats -= q[target].log().item()
            mass += sum(min(a, b) for a, b in zip(p.tolist(), q.tolist()))
            n += 1
    result = evaluate({"text": student}, teacher, rows, CPU)["text"]
    assert result.loss == pytest.approx(nats / 200, rel=1e-5)
    assert result.overlap == pytest.approx(mass / n, rel=1e-5)
    assert evaluate({"teacher": teacher}, teacher, rows, CPU)["teacher"].overlap == pytest.approx(1)


def test_students_start_from_the_same_weights():
    teacher = make_teacher()
    students = make_students(Config(n_embd=8), teacher, 0, CPU)
    assert list(students) == list(LESSONS)
    first = students["text"].state_dict()
    for student in students.values():
        for name, weight in student.state_dict().items():
            assert torch.equal(weight, first[name])
    other = make_students(Config(n_embd=8), teacher, 1, CPU)["text"]
    assert not torch.equal(other.wte.weight, first["wte.weight"])


def train_small(cfg, teacher, source):
    students = make_students(cfg, teacher, 0, CPU)
    rows = make_rows()

    def log(step, loss, **values):
        pass

    lessons = train(students, teacher, source, rows, rows, 0, cfg, CPU, log, 0)
    return students, lessons


def test_training_side_by_side_is_training_alone():
    teacher = make_teacher()
    source = Source("1", torch.arange(200) % V, torch.arange(0, 190, 7), 7, 5.0)
    sizes = dict(n_embd=8, n_layer=1, steps=6, batch_size=4, eval_every=2)
    together, lessons = train_small(Config(**sizes), teacher, source)
    for lesson in LESSONS:
        alone, _ = train_small(Config(lessons=lesson, **sizes), teacher, source)
        for name, weight in alone[lesson].state_dict().items():
            torch.testing.assert_close(weight, together[lesson].state_dict()[name])

    # The seconds in which the teacher wrote the text count for all, those in which it reads it not
    # for the text alone.
    assert lessons["text"].seconds >= 5
    assert [step for step, _ in lessons["both"].curve] == [2, 4, 6]
    assert lessons["both"].best == min(loss for _, loss in lessons["both"].curve)


def test_the_schedule_sets_the_learning_rates(monkeypatch):
    """With a schedule that is zero nothing is learned."""
    monkeypatch.setattr(distill, "lr_scale", lambda step, cfg: 0.0)
    teacher = make_teacher()
    source = Source("1", torch.arange(200) % V, torch.arange(0, 190, 7), 7, 0.0)
    cfg = Config(n_embd=8, n_layer=1, steps=2, batch_size=4, eval_every=2, lessons="text")
    students, _ = train_small(cfg, teacher, source)
    expected = make_students(cfg, teacher, 0, CPU)["text"]
    assert torch.equal(students["text"].wte.weight, expected.wte.weight)


def test_learning_is_the_gradient_of_one_batch_alone():
    """Two equal steps with a learning rate of zero leave no gradient behind, and the temperature of
    the options is the one in the loss."""
    teacher = make_teacher()
    cfg = Config(n_embd=8, n_layer=1, temperature=3.0)
    student = make_students(cfg, teacher, 0, CPU)["both"]
    optimizers = make_optimizers(student, 0.1)
    distill.set_lr(optimizers, 0.0)
    rows = make_rows()
    x, y = rows.idx[:2], rows.targets[:2]
    teacher_logits = teacher(x)[0].detach()
    loss = distill.learn(student, optimizers, x, y, teacher_logits, 0.5, cfg)
    expected = distillation_loss(student(x)[0], teacher_logits, y, 0.5, 3.0)
    assert loss == pytest.approx(expected.item())
    assert all(p.grad is None for p in student.parameters())


def test_seconds_of_the_teacher(monkeypatch):
    """A clock that ticks at each look: a step takes 1 s for the teacher and 1 s for a student."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(distill.time, "process_time", lambda: next(ticks))
    teacher = make_teacher()
    source = Source("1", torch.arange(200) % V, torch.arange(0, 190, 7), 7, 5.0)
    cfg = Config(n_embd=8, n_layer=1, steps=6, batch_size=4, eval_every=6)
    _, lessons = train_small(cfg, teacher, source)
    assert {name: lesson.seconds for name, lesson in lessons.items()} == {
        "text": 11,
        "both": 17,
        "logits": 17,
    }


def test_a_student_becomes_like_its_teacher():
    """On its own text, the teacher's probabilities teach a tiny student more than samples do."""
    torch.manual_seed(0)
    teacher = make_teacher()
    source = written_by(teacher, 4, Config(samples=64), CPU)
    cfg = Config(n_embd=16, n_layer=1, steps=100, batch_size=16, eval_every=100, temperature=1.0)
    students = make_students(cfg, teacher, 0, CPU)
    torch.manual_seed(1)
    held_out = written_by(teacher, 4, Config(samples=64), CPU).ids.view(64, 8)
    rows = Rows(held_out[:, :-1], held_out[:, 1:], 1000)
    before = evaluate(students, teacher, rows, CPU)["text"].overlap
    train(students, teacher, source, rows, rows, 0, cfg, CPU, lambda *a, **k: None, 0)
    after = evaluate(students, teacher, rows, CPU)
    assert before < 0.6
    assert after["logits"].overlap > 0.8
    assert after["logits"].overlap > after["text"].overlap + 0.05
    assert after["logits"].loss < after["text"].loss


def test_mix_of_the_lessons():
    cfg = Config(mix=0.3)
    assert [mix_of(lesson, cfg) for lesson in ("text", "both", "logits")] == [0, 0.3, 1]


# the script ---------------------------------------------------------------------------------------


def test_the_script(tmp_path):
    # A small teacher: the real one takes 90 s to train.
    tok = Tokenizer({bytes([i]): i for i in range(256)} | {b"\n\n": 256})
    teacher = make_teacher(block_size=24, vocab_size=tok.vocab_size)
    path = tmp_path / "teacher.pt"
    save_checkpoint(path, kind="base", tokenizer=tok.state(), **teacher.to_checkpoint())

    sizes = [
        f"--teacher={path}",
        "--steps=2",
        "--batch_size=2",
        "--n_embd=8",
        "--n_layer=1",
        "--samples=3",
        "--held_out=9",
    ]
    options = [f"--out={tmp_path}", "--seeds=2", "--sources=0.02,written", "--lessons=text,logits"]
    command = [sys.executable, str(FOLDER / "distill.py"), "--device=cpu", *options, *sizes]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "distill.json").read_text())
    assert list(metrics["results"]) == ["0.02", "written"]
    for runs in metrics["results"].values():
        assert [list(run) for run in runs] == [["text", "logits"]] * 2
    assert len((tmp_path / "distill.jsonl").read_text().splitlines()) == 2 * 2 * 2
    assert (tmp_path / "distill.png").read_bytes().startswith(b"\x89PNG")

    # The student can be loaded like any base model.
    checkpoint = load_checkpoint(tmp_path / "distill.pt", "base")
    student = GPT.load(checkpoint)
    assert student.cfg.n_embd == 8
    assert student.cfg.vocab_size == Tokenizer.load(checkpoint["tokenizer"]).vocab_size


@pytest.mark.parametrize(
    "option, message",
    [
        ("--sources=0", "sources=0 must be shares above 0 and up to 1, or written"),
        ("--sources=1,2", "sources=1,2 must be shares above 0 and up to 1, or written"),
        ("--sources=half", "sources=half must be shares above 0 and up to 1, or written"),
        ("--lessons=books", "lessons=books must be some of text,both,logits"),
        ("--temperature=0", "temperature=0.0 must be above 0"),
        ("--mix=1.5", "mix=1.5 must be from 0 to 1"),
        ("--eval_every=0", "eval_every=0 must be at least 1"),
        ("--samples=0", "samples=0 must be at least 1"),
        ("--n_embd=10", "n_embd=10 must be divisible by 2 * n_head = 4"),
    ],
)
def test_bad_options_end_in_one_line(option, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(Config, argv=[option])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
