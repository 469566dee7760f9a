"""
Tests of Part 4's train.py as its users meet it: pytest part_4. Tiny runs, each in a process of its own: straight,
killed and resumed, interrupted, two under torchrun, and fed with nonsense.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import os
import random
import signal
import socket
import subprocess
import time
from contextlib import nullcontext

import pytest
import torch

from model import GPT, GPTConfig
from shared import load_checkpoint, save_checkpoint
from tokenizer import Tokenizer
from train import Config, backward, get_batch

TRAIN = Path(__file__).resolve().parent / "train.py"
STEPS = 30
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}


# Imports torch once, then runs the script once per line, each time in a child of its own. It ends that child as Python
# would, only without taking torch down piece by piece.
SERVER = """
import atexit, json, os, runpy, sys, matplotlib.figure, tiktoken, torch, torch._dynamo, torch.utils.tensorboard
for line in sys.stdin:
    folder, script, *argv = json.loads(line)
    if not (child := os.fork()):
        for fd, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.argv = [script, *argv]
        sys.path.insert(0, os.path.dirname(script))
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = 1
            sys.excepthook(*sys.exc_info())
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code or 0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-c", SERVER]
    process = subprocess.Popen(command, env=ENV, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def start(server, out, *more):
    """Starts the script -> its process id. finish() waits for it."""
    print(json.dumps([str(out.parent), str(TRAIN), *options(out, *more)]), file=server.stdin, flush=True)
    return int(server.stdout.readline())


def finish(server, out):
    """-> exit code, stdout, stderr of the script that was started."""
    code = int(server.stdout.readline())
    return code, (out.parent / "stdout").read_text(), (out.parent / "stderr").read_text()


def options(out, *more):
    """A run of seconds on a text that stands beside `out`."""
    text = out.parent / "text.txt"
    if not text.exists():
        words = "the a fox dog hen Mia Tom ran sat hid saw ate red big old".split()
        rng = random.Random(0)
        text.write_text(".\n".join(" ".join(rng.choices(words, k=7)) for _ in range(150)))
    sizes = "--n_layer=2 --n_head=2 --n_kv_head=1 --n_embd=16 --block_size=16 --vocab_size=280 --batch_size=4".split()
    return [f"--data={text}", f"--out={out}", f"--steps={STEPS}", "--eval_every=10", "--save_every=4", *sizes, *more]


def lines(out):
    text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]  # the last piece is empty, or being written


def wait_for_step(out, step):
    for _ in range(60_000):
        if any(r["step"] >= step for r in lines(out)):
            return
        time.sleep(0.005)
    pytest.fail((out.parent / "stderr").read_text())


@pytest.fixture(scope="module")
def straight(server, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "out"
    start(server, out)
    code, stdout, stderr = finish(server, out)
    assert code == 0, stderr
    return out, stdout


def test_smoke(straight):
    out, stdout = straight
    log, metrics = lines(out), json.loads((out / "metrics.json").read_text())
    assert [r["step"] for r in log] == list(range(STEPS))
    assert log[-1]["loss"] < log[0]["loss"] - 0.5 and log[-1]["val_loss"] == metrics["val_loss"] < log[9]["val_loss"]
    assert metrics["params"] > 10_000 and metrics["seconds"] > 0 and metrics["steps"] == STEPS
    assert "elapsed" in stdout and (out / "train.png").read_bytes().startswith(b"\x89PNG") and not list(out.glob(".*"))
    checkpoint = load_checkpoint(out / "base.pt", "base")
    assert GPT.load(checkpoint).cfg.vocab_size == Tokenizer.load(checkpoint["tokenizer"]).vocab_size == 280
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(out)).Reload().Scalars("loss")
    assert [e.value for e in events] == pytest.approx([r["loss"] for r in log], rel=1e-6)


def test_resume_after_kill_is_bit_exact(server, straight, tmp_path):
    out = tmp_path / "out"
    child = start(server, out)
    wait_for_step(out, 5)
    os.kill(child, signal.SIGKILL)
    assert finish(server, out)[0] == -signal.SIGKILL
    assert 4 <= load_checkpoint(out / "resume.pt", "resume")["step"] < STEPS and not (out / "base.pt").exists()
    start(server, out, "--resume=1")
    code, _, stderr = finish(server, out)
    assert code == 0, stderr
    wanted, found = (load_checkpoint(folder / "resume.pt", "resume") for folder in (straight[0], out))
    for name, p in wanted["weights"].items():
        assert torch.equal(p, found["weights"][name]), name
    assert str(wanted["optimizers"]) == str(found["optimizers"])
    assert lines(out) == lines(straight[0])


def test_ctrl_c(server, tmp_path):
    out = tmp_path / "out"
    child = start(server, out, "--steps=100000", "--save_every=1")
    wait_for_step(out, 3)
    os.kill(child, signal.SIGINT)
    code, _, stderr = finish(server, out)
    assert code == 130 and stderr.startswith("error: interrupted") and stderr.count("\n") == 1, stderr
    assert load_checkpoint(out / "resume.pt", "resume")["step"] >= 3 and not list(out.glob(".*"))


WORKER = """
import sys; sys.path[:0] = sys.argv[1:3]
from contextlib import nullcontext
import torch, torch.distributed as dist, train
from model import GPT
stored = torch.load(sys.argv[3])
dist.init_process_group("gloo")
model, rank = GPT.load(stored), dist.get_rank()
net = torch.nn.parallel.DistributedDataParallel(model)
x, y = train.get_batch(stored["ids"], torch.arange(80), 5, train.Config(batch_size=8), 16)
mine, scaler = slice(4 * rank, 4 * rank + 4), torch.amp.GradScaler("cpu", enabled=False)
train.backward(net, x[mine], y[mine], 2, nullcontext, scaler)
torch.save([p.grad for p in model.parameters()], f"{sys.argv[3]}.{rank}")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """torchrun, first on a stored batch, then the script itself for two steps."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER)
    torch.manual_seed(0)
    model, ids = GPT(GPTConfig(vocab_size=13, block_size=16, n_layer=2, n_embd=16)), torch.randint(13, (100,))
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape)  # projections that start at zero would leave no gradient behind them
    torch.save({**model.to_checkpoint(), "ids": ids}, folder / "stored")
    stored = [folder / "worker.py", TRAIN.parent, TRAIN.parent.parent, folder / "stored"]
    for command in (stored, [TRAIN, *options(folder / "out", "--steps=2")]):  # each with a store of its own
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
        argv = [sys.executable, *launch, f"--master_port={port}", *map(str, command)]
        done = subprocess.run(argv, env=ENV, text=True, capture_output=True, timeout=240)
        assert done.returncode == 0, done.stderr
    return folder, model, ids


def test_two_processes_have_the_gradient_of_one(two_processes):
    """With accumulation: 2 processes x 2 micro-batches of 2 rows against one batch of 8."""
    folder, model, ids = two_processes
    x, y = get_batch(ids, torch.arange(80), 5, Config(batch_size=8), 16)
    backward(model, x, y, 1, nullcontext, torch.amp.GradScaler("cpu", enabled=False))
    for rank in (0, 1):
        for p, grad in zip(model.parameters(), torch.load(folder / f"stored.{rank}"), strict=True):
            torch.testing.assert_close(grad, p.grad, atol=1e-7, rtol=1e-4)


def test_the_script_under_torchrun(straight, two_processes):
    """The first step's loss and norm of the gradient are those of one process, and each step is logged once."""
    log, wanted = lines(two_processes[0] / "out"), lines(straight[0])
    assert [r["step"] for r in log] == [0, 1]
    assert log[0]["loss"] == pytest.approx(wanted[0]["loss"], rel=1e-5)
    assert log[0]["grad_norm"] == pytest.approx(wanted[0]["grad_norm"], rel=1e-4)


NONSENSE = {  # name: (options, what the one line says)
    "unknown": (["--stepz=3"], "no option --stepz, did you mean --steps?"),
    "type": (["--steps=three"], "--steps wants an int, got 'three'"),
    "accum": (["--accum=3"], "batch_size=4"),
    "heads": (["--n_head=3"], "n_embd=16"),
    "layers": (["--n_layer=0"], "n_layer at least 1"),
    "device": (["--device=tpu"], "--device=tpu is not available here"),
    "dtype": (["--dtype=fp8"], "--dtype=fp8: it is fp32, bf16"),
    "missing": (["--data=nowhere.txt"], "there is no file nowhere.txt"),
    "empty": (["--data={0}/empty.txt"], "empty.txt is empty"),
    "binary": (["--data={0}/binary.txt"], "binary.txt is not UTF-8 text"),
    "short": (["--data={0}/short.txt"], "tokens to validate on, but one block is 16 + 1"),
    "vocabulary": (["--vocab_size=100"], "vocab_size must be at least 260"),
    "never": (["--eval_every=0"], "eval_every=0"),
    "file": (["--out={0}/empty.txt"], "is a file, a folder is wanted"),
    "nan": (["--lr=1e20", "--lr_adamw=1e20"], "loss is nan at step"),
    "nothing": (["--resume=1"], "no checkpoint at"),
    "truncated": (["--resume=1"], "truncated or not a checkpoint of this project"),
    "foreign": (["--resume=1"], "truncated or not a checkpoint of this project"),
    "kind": (["--resume=1"], "is a 'base' checkpoint, wanted is 'resume'"),
    "sizes": (["--resume=1", "--n_layer=1"], "other"),
    "seed": (["--resume=1", "--seed=1"], "other"),
    "done": (["--resume=1"], "is at step 30 already"),
    "rate": (["--resume=1", "--lr=0.5"], "other"),
}


@pytest.fixture(scope="module")
def nonsense(straight, tmp_path_factory):
    """A folder with every bad file that NONSENSE names; each case writes to its own NAME/out."""
    folder, point = tmp_path_factory.mktemp("nonsense"), (straight[0] / "resume.pt").read_bytes()
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "short.txt").write_text("only a few words, " * 3)
    for name in NONSENSE:
        (folder / name / "out").mkdir(parents=True)
    for name in ("sizes", "seed", "done", "rate"):
        (folder / name / "out/resume.pt").write_bytes(point)
    (folder / "truncated/out/resume.pt").write_bytes(point[:len(point) // 2])
    torch.save([1, 2, 3], folder / "foreign/out/resume.pt")
    save_checkpoint(folder / "kind/out/resume.pt", kind="base")
    return folder


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_one_line(server, nonsense, name):
    more, wanted = NONSENSE[name]
    out = nonsense / name / "out"
    start(server, out, *(option.format(nonsense) for option in more))
    code, _, said = finish(server, out)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and wanted in said, said
    left = {path.name for path in out.iterdir() if "tfevents" not in path.name}
    assert left <= {"resume.pt", "log.jsonl"}, left
