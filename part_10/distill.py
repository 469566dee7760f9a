"""
Part 10: a small model learns from a large one. The student has a quarter of the teacher's
parameters. Does it learn more from the teacher's probabilities than from the text?

    python part_10/distill.py                        one seed -> part_10/out/distill.pt
    python part_10/distill.py --seeds=3              three seeds: how much is chance?
    python part_10/distill.py --sources=1,0.1,0.01   other shares of the training text
    python part_10/distill.py --steps=100            with fewer steps
    python part_10/distill.py --temperature=4        softer probabilities

Starts here. lr_scale, orthogonalize, Muon, make_optimizers and set_lr are those of part_4/train.py,
and get_batch is almost that. The texts and the teacher are loaded by compression.py.

In a text, the place after "Mia found the red" is followed by one word. A teacher can say more: hat
with probability 0.3, ball with 0.2, and so on. Distillation (Hinton et al. 2015, "Distilling the
knowledge in a neural network") trains the student on these probabilities. They are compared at a
temperature T: both models' logits are divided by T first, which makes the unlikely words count
more. The loss of a token is

    mix * T^2 KL(p_T || q_T) + (1 - mix) * cross-entropy of the next token in the text

where p is the teacher and q the student. The gradient of the first term shrinks like 1 / T^2, and
the factor T^2 makes up for it (section 2 of the paper). Three students learn side by side, from the
same weights, in the same steps, on the same batches. Only their lesson differs, and its learning
rate:

    text     mix = 0     the next token of the text
    both     mix = --mix
    logits   mix = 1     the teacher's probabilities alone

They do so for each source of text: a share of the training text, or texts that the teacher wrote
(Kim & Rush 2016, "Sequence-level knowledge distillation", who take the likeliest text; ours is
sampled). A written text is a sample of the teacher's probabilities, so "text" on this source and
"logits" learn from the same teacher: one sees a sample, the other the distribution.

The true entropy of the world is known. So every loss can be given as a gap, in nats per byte: how
much more than the lowest possible loss it is.

Shapes: B batch, T time, V vocabulary, N rows of an evaluation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from compression import Rows, document_ends, load_model, load_texts
from model import GPT, GPTConfig
from shared import (
    Log,
    fail,
    figure,
    output_folder,
    parse_args,
    pick_device,
    read_text,
    require,
    save_checkpoint,
    save_figure,
    save_metrics,
    set_seed,
)

LESSONS = ("text", "both", "logits")
WRITTEN = "written"


@dataclass
class Config:
    # lesson
    teacher: str = ""  # checkpoint of a model of the world; empty: part_4/out/base.pt
    sources: str = "1,0.02,written"  # shares of the training text, or "written": the teacher's own
    temperature: float = 1.0  # T, which softens the probabilities of teacher and student
    lessons: str = ",".join(LESSONS)  # which students learn, separated by commas
    mix: float = 0.5  # weight of the teacher in the lesson "both"; the text has the rest
    samples: int = 2048  # texts that the teacher writes
    # student
    n_layer: int = 2  # number of blocks
    n_head: int = 2  # query heads per block; all of them share one key/value head
    n_embd: int = 64  # channels of the residual stream
    # optimization
    steps: int = 150  # optimizer steps of each student
    batch_size: int = 24  # sequences per step
    lr: float = 0.02  # learning rate of Muon, for the hidden matrices; AdamW has 0.3 of it
    lr_logits: float = 0.04  # the same in the lesson "logits", which is less noisy than a text
    warmup: float = 0.1  # share of the steps in which the learning rate rises to its peak
    decay: float = 0.5  # share of the steps, at the end, in which it falls linearly to 0
    grad_clip: float = 1.0  # largest norm of the gradient; a larger one is scaled down
    # run
    held_out: int = 1000  # rows of the held-out text that are measured at the end; it has 913
    eval_every: int = 50  # steps between evaluations on a quarter of the held-out text
    seed: int = 0  # seed of all random numbers
    seeds: int = 1  # number of seeds to run: seed, seed + 1, ...
    device: str = ""  # cuda, mps or cpu; empty: the best available
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        assert self.eval_every > 0, f"eval_every={self.eval_every} must be at least 1"
        assert self.temperature > 0, f"temperature={self.temperature} must be above 0"
        assert self.n_embd % (2 * self.n_head) == 0, (
            f"n_embd={self.n_embd} must be divisible by 2 * n_head = {2 * self.n_head}"
        )
        for lesson in self.lessons.split(","):
            assert lesson in LESSONS, f"lessons={self.lessons} must be some of {','.join(LESSONS)}"
        sources = self.sources.split(",")
        assert len(set(sources)) == len(sources), f"sources={self.sources} names a source twice"
        for source in sources:
            assert source == WRITTEN or is_share(source), (
                f"sources={self.sources} must be shares above 0 and up to 1, or {WRITTEN}"
            )


def is_share(text):
    """Is this text a number above 0 and up to 1? "0.02" is."""
    is_number = text.replace(".", "", 1).isdecimal()
    return is_number and 0 < float(text) <= 1


# the lesson's mathematics -------------------------------------------------------------------------


def softened_kl(student_logits, teacher_logits, temperature):
    """KL(p_T || q_T) in nats, where p_T and q_T are teacher and student at this temperature.
    logits (..., V) -> (...). Zero if both say the same."""
    log_p = (teacher_logits / temperature).log_softmax(dim=-1)
    log_q = (student_logits / temperature).log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def distillation_loss(student_logits, teacher_logits, targets, mix, temperature):
    """mix * T^2 KL(p_T || q_T) + (1 - mix) * cross-entropy, the mean over all tokens.
    logits (B, T, V), targets (B, T). With mix = 0 the teacher is not needed and may be None."""
    loss = 0.0
    if mix > 0:
        kl = softened_kl(student_logits, teacher_logits, temperature)  # (B, T)
        loss = loss + mix * temperature**2 * kl.mean()
    if mix < 1:
        nats = F.cross_entropy(student_logits.flatten(0, 1), targets.flatten())
        loss = loss + (1 - mix) * nats
    return loss


def overlap(student_logits, teacher_logits):
    """The sum over the vocabulary of min(p, q), logits (..., V) -> (...): 1 if both models say the
    same, 0 if nothing is possible for both. It is 1 - TV(p, q). In speculative.py it is the chance
    that the teacher accepts a token that the student proposes."""
    p = teacher_logits.softmax(dim=-1)
    q = student_logits.softmax(dim=-1)
    return torch.minimum(p, q).sum(dim=-1)


def mix_of(lesson, cfg):
    """The weight of the teacher in a lesson."""
    return {"text": 0.0, "both": cfg.mix, "logits": 1.0}[lesson]


# data ---------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A text to learn from. A training row starts at one of the starts."""

    name: str
    ids: torch.Tensor  # (M,) token ids
    starts: torch.Tensor  # (S,) positions in ids
    length: int  # T, tokens in a row
    seconds: float  # of processor time that the teacher needed to write it


def share_of_text(name, tok, text, block_size):
    """The first documents of the training text -> Source. name is their share, such as "0.02"."""
    ids = torch.tensor(tok.encode(text))
    starts = document_ends(tok, ids[:-block_size], text)
    n_documents = int(float(name) * len(starts))
    if n_documents == 0:
        fail(f"--sources: a share of {name} is less than one of the {len(starts):,} documents")
    return Source(name, ids, starts[:n_documents], block_size, 0.0)


def written_by(teacher, first, cfg, device):
    """Texts that the teacher writes at temperature 1, each after the token `first`, which is the
    blank line before a document -> Source."""
    start_time = time.process_time()
    block_size = teacher.cfg.block_size
    texts = []
    for start in range(0, cfg.samples, 128):
        n = min(128, cfg.samples - start)
        prompt = torch.full((n, 1), first, device=device)
        texts.append(teacher.generate(prompt, block_size).cpu())
    texts = torch.cat(texts)  # (cfg.samples, block_size)

    seconds = time.process_time() - start_time

    # One long text, like the other sources. A row has one token less than a text, because its
    # last token is only a target.
    starts = torch.arange(len(texts)) * block_size
    return Source(WRITTEN, texts.flatten(), starts, block_size - 1, seconds)


def load_sources(cfg, teacher, tok, device):
    """The texts that cfg.sources names -> a list of Source."""
    text = read_text(require("data/stories") / "train.txt")
    block_size = teacher.cfg.block_size
    sources = []
    for name in cfg.sources.split(","):
        if name == WRITTEN:
            first = tok.encode(text[: text.index("\n\n") + 2])[-1]
            sources.append(written_by(teacher, first, cfg, device))
        else:
            sources.append(share_of_text(name, tok, text, block_size))
    return sources


def get_batch(source, step, seed, batch_size):
    """The batch of a step: inputs (batch_size, T), and targets, the same text shifted by one. It
    depends on the seed and the step alone, so all students of a source see the same batches."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    choice = torch.randint(len(source.starts), (batch_size, 1), generator=generator)
    window = source.ids[source.starts[choice] + torch.arange(source.length + 1)]
    return window[:, :-1], window[:, 1:]


def true_entropy():
    """The true entropy of the world, in nats per byte."""
    facts = json.loads(read_text(require("data/stories") / "facts.json"))
    return facts["true_nats_per_byte"]


# learning rate and optimizers ---------------------------------------------------------------------


def lr_scale(step, cfg):
    """The learning rate of a step (0, 1, ...) as a share of its peak: warm up, hold, then decay
    linearly to 0 (WSD, Hu et al. 2024)."""
    rise = (step + 1) / max(1.0, cfg.warmup * cfg.steps)  # the first step learns already
    fall = (cfg.steps - step) / max(1.0, cfg.decay * cfg.steps)  # and the last step still does
    return max(0.0, min(1.0, rise, fall))


def orthogonalize(matrix):
    """Brings the singular values of a matrix (rows, columns) near 1 and keeps its singular vectors:
    five steps of a Newton-Schulz iteration (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    dtype = torch.bfloat16 if matrix.is_cuda else torch.float32  # many CPUs only emulate bf16
    x = matrix.to(dtype)

    # The wide form makes the products x x^T small. Scaling brings all singular values below 1.
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)

    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x

    if tall:
        x = x.T
    return x.to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024, "Muon"), for hidden matrices. All directions of
    a matrix get updates of the same size. An update has RMS 0.2 lr."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                # Nesterov momentum: the running mean of the gradients, one step ahead.
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(state["momentum"], group["momentum"])

                # An orthogonal matrix has RMS 1 / sqrt(its longer side). Bring it to 0.2.
                update = orthogonalize(ahead) * 0.2 * max(p.shape) ** 0.5
                p.sub_(group["lr"] * update)


def make_optimizers(model, lr):
    """Muon for the blocks' matrices with this learning rate, AdamW with 0.3 of it for all other
    parameters -> a list of both."""
    hidden = []
    others = []
    for name, p in model.named_parameters():
        if p.ndim == 2 and name.startswith("h."):
            hidden.append(p)
        else:
            others.append(p)

    muon = Muon(hidden, lr=lr)
    adamw = torch.optim.AdamW(others, lr=0.3 * lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def set_lr(optimizers, scale):
    """Sets every learning rate to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


# train, evaluate ----------------------------------------------------------------------------------


def make_students(cfg, teacher, seed, device):
    """One student for each lesson, all with the same weights -> {lesson: GPT}."""
    student_cfg = GPTConfig(
        vocab_size=teacher.cfg.vocab_size,
        block_size=teacher.cfg.block_size,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        n_kv_head=1,
        n_embd=cfg.n_embd,
    )
    students = {}
    for lesson in cfg.lessons.split(","):
        set_seed(seed)
        students[lesson] = GPT(student_cfg).to(device)
    return students


def learn(student, optimizers, x, y, teacher_logits, mix, cfg):
    """One step of one student -> its loss."""
    logits, _ = student(x)
    loss = distillation_loss(logits, teacher_logits, y, mix, cfg.temperature)
    loss.backward()

    torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


class Evaluation(NamedTuple):
    loss: float  # nats per byte
    overlap: float  # with the teacher, the mean over all tokens


@torch.no_grad()
def evaluate(models, teacher, rows, device):
    """Each model on the held-out rows -> {name: Evaluation}."""
    nats = dict.fromkeys(models, 0.0)
    shared_mass = dict.fromkeys(models, 0.0)
    for start in range(0, len(rows.idx), 64):
        x = rows.idx[start : start + 64].to(device)  # (64, T)
        y = rows.targets[start : start + 64].to(device)
        counts = y >= 0
        teacher_logits = teacher(x)[0][counts]  # (tokens, V)
        for name, model in models.items():
            logits = model(x)[0][counts]
            nats[name] += F.cross_entropy(logits, y[counts], reduction="sum").item()
            shared_mass[name] += overlap(logits, teacher_logits).sum().item()

    n_tokens = (rows.targets >= 0).sum().item()
    result = {}
    for name in models:
        result[name] = Evaluation(nats[name] / rows.bytes, shared_mass[name] / n_tokens)
    return result


def every_fourth(rows, tok):
    """A quarter of the rows of an evaluation, which is enough to see how training goes."""
    idx = rows.idx[::4]
    targets = rows.targets[::4]
    counted = targets[targets >= 0]
    return Rows(idx, targets, torch.tensor(tok.n_bytes)[counted].sum().item())


class Lesson(NamedTuple):
    """What came out of one student."""

    loss: float  # nats per byte of the held-out text
    overlap: float  # with the teacher's probabilities
    seconds: float  # of processor time for training, with the teacher's share
    best: float  # lowest loss of all evaluations, on a quarter of the held-out text
    curve: list  # [step, loss] of these evaluations


def train(students, teacher, source, rows, few_rows, seed, cfg, device, log, first_step):
    """Trains all students of a source side by side -> {lesson: Lesson}. rows are all held-out rows,
    few_rows a quarter of them. What it logs begins at first_step, because sources share a log.

    The teacher reads each batch once, for all students. Its seconds count in full for each student
    that needs it, as if that student had been alone.
    """
    optimizers = {}
    for lesson, student in students.items():
        lr = cfg.lr_logits if lesson == "logits" else cfg.lr
        optimizers[lesson] = make_optimizers(student, lr)
    seconds = dict.fromkeys(students, source.seconds)
    curves = {lesson: [] for lesson in students}

    for step in range(cfg.steps):
        x, y = get_batch(source, step, seed, cfg.batch_size)
        x = x.to(device)
        y = y.to(device)

        # The text alone needs no teacher.
        start = time.process_time()
        teacher_logits = None
        if any(mix_of(lesson, cfg) > 0 for lesson in students):
            with torch.no_grad():
                teacher_logits, _ = teacher(x)
        teacher_seconds = time.process_time() - start

        losses = {}
        for lesson, student in students.items():
            start = time.process_time()
            mix = mix_of(lesson, cfg)
            set_lr(optimizers[lesson], lr_scale(step, cfg))
            losses[lesson] = learn(student, optimizers[lesson], x, y, teacher_logits, mix, cfg)
            seconds[lesson] += time.process_time() - start
            if mix > 0:
                seconds[lesson] += teacher_seconds

        values = {"source": source.name, "seed": seed, **losses}
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            for lesson, evaluation in evaluate(students, teacher, few_rows, device).items():
                values[f"{lesson}_val"] = evaluation.loss
                curves[lesson].append([step + 1, evaluation.loss])
        log(first_step + step, loss=sum(losses.values()), **values)

    result = {}
    for lesson, evaluation in evaluate(students, teacher, rows, device).items():
        best = min(loss for _, loss in curves[lesson])
        result[lesson] = Lesson(*evaluation, seconds[lesson], best, curves[lesson])
    return result


# the figure ---------------------------------------------------------------------------------------


def mean_of(values):
    return sum(values) / len(values)


def range_text(values):
    """The range of several numbers: "0.042 to 0.047", or one number if they are the same."""
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def describe(source):
    """What a source is called in the figure."""
    if source == WRITTEN:
        return "texts written\nby the teacher"
    return f"{100 * float(source):g} % of\nthe training text"


def gaps(runs, lesson, entropy):
    """The gap to the true entropy of one lesson, for each seed, in nats per byte."""
    return [run[lesson].loss - entropy for run in runs]


def draw(title, results, teacher_loss, entropy, path):
    """The gap to the true entropy, one group of bars for each source of text."""
    fig, ax = figure(title, height=5)
    ax.set_ylabel("held-out loss above the true entropy\n(nats per byte)")
    names = {"text": "the text", "both": "text and teacher", "logits": "teacher's probabilities"}
    hatches = {"text": "", "both": "//", "logits": ".."}
    lessons = list(next(iter(results.values()))[0])
    for i, lesson in enumerate(lessons):
        positions = [place + 0.26 * (i - 1) for place in range(len(results))]
        columns = [gaps(runs, lesson, entropy) for runs in results.values()]
        means = [mean_of(column) for column in columns]
        bars = ax.bar(positions, means, width=0.24, hatch=hatches[lesson], label=names[lesson])
        ax.bar_label(bars, [f"{mean:.3f}" for mean in means], fontsize=9, padding=8)

        # from the lowest to the highest seed
        for position, column in zip(positions, columns):
            ax.plot([position, position], [min(column), max(column)], color="black")

    label = f"teacher, {teacher_loss - entropy:.3f}"
    ax.axhline(teacher_loss - entropy, color="black", linestyle="--", label=label)
    ax.set_xticks(range(len(results)), [describe(source) for source in results])
    fig.legend(loc="outside lower center", ncols=4)
    save_figure(fig, path)


def finding(results, entropy):
    """The title of the figure: the gap of each lesson."""
    lines = []
    for source, runs in results.items():
        name = describe(source).replace("\n", " ")
        texts = [f"{lesson} {range_text(gaps(runs, lesson, entropy))}" for lesson in runs[0]]
        lines.append(f"{name}: {', '.join(texts)}")
    return "Gap of a student to the true entropy, by what it learns from\n" + "\n".join(lines)


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)
    set_seed(cfg.seed)
    teacher, tok = load_model(cfg.teacher or "base", device)
    out = output_folder(cfg)

    # the texts: the held-out rows are measured at the end, and a quarter of them on the way
    rows = load_texts("base", teacher, tok, teacher.cfg.block_size, 1, cfg.held_out).held_out
    few_rows = every_fourth(rows, tok)
    entropy = true_entropy()
    sources = load_sources(cfg, teacher, tok, device)
    teacher_loss = evaluate({"teacher": teacher}, teacher, rows, device)["teacher"].loss

    # All sources and lessons of a seed start from the same weights.
    results = {source.name: [] for source in sources}
    log = Log(out, cfg.seeds * len(sources) * cfg.steps, name="distill")
    first_step = 0
    best = None  # the student most like the teacher
    best_overlap = 0.0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for source in sources:
            students = make_students(cfg, teacher, seed, device)
            run = train(
                students, teacher, source, rows, few_rows, seed, cfg, device, log, first_step
            )
            results[source.name].append(run)
            first_step += cfg.steps
            for lesson, student in students.items():
                if run[lesson].overlap > best_overlap:
                    best = student
                    best_overlap = run[lesson].overlap
                    best_name = f"{lesson}, source {source.name}"

    # the draft of speculative.py
    save_checkpoint(
        out / "distill.pt",
        kind="base",
        changed=cfg.changed,
        step=cfg.steps,
        config=asdict(cfg),
        tokenizer=tok.state(),
        **best.to_checkpoint(),
    )

    # what came out
    sizes = {"teacher": n_parameters(teacher), "student": n_parameters(best)}
    print(f"\nteacher {sizes['teacher']:,} parameters, student {sizes['student']:,}")
    print(f"true entropy {entropy:.4f} nats per byte, teacher {teacher_loss:.4f}")
    print("source    lesson   gap (nats per byte)   overlap with teacher   processor seconds")
    for source, runs in results.items():
        for lesson in runs[0]:
            gap = range_text(gaps(runs, lesson, entropy))
            likeness = range_text([run[lesson].overlap for run in runs])
            seconds = mean_of([run[lesson].seconds for run in runs])
            print(f"{source:9} {lesson:8} {gap:21} {likeness:22} {seconds:.0f}")
    print(f"{out / 'distill.pt'}: the student most like the teacher ({best_name})")

    title = finding(results, entropy)
    as_dicts = {}
    for source, runs in results.items():
        as_dicts[source] = []
        for run in runs:
            as_dicts[source].append({lesson: run[lesson]._asdict() for lesson in run})
    save_metrics(
        out,
        name="distill",
        results=as_dicts,
        finding=title,
        saved=best_name,
        params=sizes,
        teacher_loss=teacher_loss,
        true_nats_per_byte=entropy,
        config=asdict(cfg),
    )
    draw(title, results, teacher_loss, entropy, out / "distill.png")
