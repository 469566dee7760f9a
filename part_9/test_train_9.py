"""
Tests of Part 9's scripts: pytest part_9/test_train_9.py. Both run on a tiny checkpoint and data that are made here,
and are fed with nonsense. Two processes must have, on a stored rollout, the gradients of one.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import os
import socket
import subprocess

import pytest
import torch

from model import GPT, GPTConfig, RewardModel
from shared import load_checkpoint, save_checkpoint
from tokenizer import Tokenizer
from train_grpo import Config, encode, learn, load_data

FOLDER = Path(__file__).resolve().parent
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
TOK = Tokenizer.train("the red fox saw the old dog. the dog ran to the fox. say it again. count to three. " * 4, 300)

# One process imports torch, and runs the script once per line, each time in a child of its own.
SERVER = """
import json, os, runpy, sys, matplotlib.figure, tiktoken, torch, torch._dynamo
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
    """run(folder, script, *options) -> exit code, stdout, stderr."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], env=ENV, text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)

    def ask(folder, script, *argv):
        print(json.dumps([str(folder), str(FOLDER / script), *argv]), file=server.stdin, flush=True)
        return int(server.stdout.readline()), (folder / "stdout").read_text(), (folder / "stderr").read_text()

    yield ask
    server.kill()
    server.communicate()

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts, pairs, an SFT and a reward model, a reward of the user's, and each bad file that NONSENSE names."""
    folder = tmp_path_factory.mktemp("grpo")
    torch.manual_seed(0)
    cfg = GPTConfig(vocab_size=TOK.vocab_size, block_size=24, n_layer=1, n_head=2, n_embd=16)
    state = TOK.state()
    save_checkpoint(folder / "sft.pt", kind="sft", **GPT(cfg).to_checkpoint(), tokenizer=state)
    save_checkpoint(folder / "rm.pt", kind="rm", head={}, **RewardModel(cfg).to_checkpoint(), tokenizer=state)
    (folder / "half.pt").write_bytes((folder / "sft.pt").read_bytes()[:9000])
    ask = {"instruction": "say it", "input": "the dog", "check": {"answer": "the dog"}}
    lines = [json.dumps({**ask, "task": ("story", "say")[i % 2]}) for i in range(39)]
    lines.insert(3, json.dumps({**ask, "input": "the " * 90}))
    pair = json.dumps({"prompt": "say it", "chosen": "the dog", "rejected": "a fox ran"})
    write = lambda name, some: (folder / name).write_text("\n".join(some))
    write("data.jsonl", lines), write("pairs.jsonl", [pair] * 40), write("empty.jsonl", [])
    write("broken.jsonl", [*lines[:4], lines[4][:-5], *lines[5:]])
    write("bare.jsonl", ['{"instruction": "say it", "input": ""}'] * 30)
    write("mine.py", ["def length(record, answer):", "    return len(answer) + 0.5 * ('say' in record['instruction'])"])
    return folder

def options(folder, out, *more):
    sizes = ["--steps=3", "--batch_size=8", "--group=4", "--max_new_tokens=6", "--prompts=4", "--eval_every=2"]
    return [f"--data={folder}/data.jsonl", f"--init={folder}/sft.pt", f"--out={out}", *sizes, *more]

@pytest.mark.parametrize("more", [[], ["--reward=model", "--rm={0}/rm.pt", "--kl=k3"],
                                  ["--reward={0}/mine.py:length", "--scale_std", "--loss_norm=constant"]])
def test_smoke(folder, run, tmp_path, more):
    out = tmp_path / "out"
    code, said, wrong = run(tmp_path, "train_grpo.py", *options(folder, out, *(m.format(folder) for m in more)))
    assert code == 0, wrong
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((out / "metrics.json").read_text())
    wanted = "reward gold kl entropy clip_fraction equal_groups length ended rollout_s update_s".split()
    assert [r["step"] for r in log] == [0, 1, 2] and all(set(wanted) <= set(r) for r in log) and "val_story" in log[1]
    assert {"sft_gold", "grpo_gold", "sft_say", "grpo_say", "kl"} <= set(metrics)
    assert metrics["first_ratio_error"] <= 1e-4
    if not more:
        assert all(r["reward"] == r["gold"] for r in log)
    if "--scale_std" in more:
        assert all(r["reward"] >= 0.5 for r in log)  # the user's function was asked, with the record
    assert "left out: 1" in said and said.count("  SFT:  ") == said.count("  GRPO: ") == 4 and "say" in said
    assert (out / "train_grpo.png").read_bytes().startswith(b"\x89PNG")
    policy = GPT.load(load_checkpoint(out / "grpo.pt", "grpo"))
    train, val = load_data(Config(data=f"{folder}/data.jsonl", max_new_tokens=6), TOK, 24)
    assert (len(train), len(val)) == (35, 4) and val[0]["prompt"] == encode(val[0], TOK)
    assert [r["task"] for r in val] == sorted((r["task"] for r in val), reverse=True)  # stories first
    assert policy(torch.tensor([val[0]["prompt"]]))[0].isfinite().all()

def test_a_constant_reward_gives_groups_that_teach_nothing(folder, run, tmp_path):
    (tmp_path / "one.py").write_text("def one(record, answer):\n    return 0.1\n")
    code, _, wrong = run(tmp_path, "train_grpo.py", *options(folder, tmp_path / "out", "--kl_coef=0"),
                         f"--reward={tmp_path}/one.py:one")
    assert code == 0, wrong
    assert all(json.loads(line)["equal_groups"] == 1 for line in (tmp_path / "out/log.jsonl").read_text().splitlines())
    before, after = load_checkpoint(folder / "sft.pt", "sft"), load_checkpoint(tmp_path / "out/grpo.pt", "grpo")
    assert all(torch.equal(v, after["weights"][k]) for k, v in before["weights"].items())

# two processes -------------------------------------------------------------------------------------------------------

WORKER = """
import os, sys; sys.path[:0] = sys.argv[1:3]
import torch, torch.distributed as dist
from model import GPT
from train_grpo import Config, learn
dist.init_process_group("gloo")
stored, rank = torch.load(sys.argv[3]), dist.get_rank()
policy, part = GPT.load(stored), stored["halves"][rank]
for norm in ("tokens", "sequence", "constant"):
    stats = learn(policy, torch.optim.SGD(policy.parameters(), lr=0.0), part, part["advantages"],
                  Config(**stored["knobs"], loss_norm=norm), torch.Generator())
    torch.save((stats, [p.grad for p in policy.parameters()]), f"{sys.argv[3]}.{norm}.{rank}")
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # no destructors: a process that is done first may abort in them
"""

def stored_rollout():
    """Eight answers of unequal length: the two halves have 9 and 21 tokens."""
    g, pos, lengths = torch.Generator().manual_seed(1), torch.arange(11), torch.tensor([1, 2, 2, 4, 8, 6, 5, 2])
    mask = (pos >= 2) & (pos < 2 + lengths[:, None])
    then = torch.randn(mask.sum(), 13, generator=g).log_softmax(dim=-1)
    return {"ids": torch.randint(13, (8, 12), generator=g), "mask": mask, "then": then,
            "logp": 0.3 * torch.randn(8, 11, generator=g) - 2.5, "advantages": torch.randn(8, generator=g)}

def test_two_processes_have_the_gradient_of_one(tmp_path):
    torch.manual_seed(0)
    policy, whole = GPT(GPTConfig(vocab_size=13, block_size=16, n_layer=2, n_embd=16)), stored_rollout()
    for p in policy.parameters():
        p.data += 0.1 * torch.randn(p.shape)  # projections that start at zero would leave no gradient behind them
    n = whole["mask"][:4].sum().item()
    halves = [{k: v[cut] for k, v in whole.items()} for cut in (slice(0, 4), slice(4, 8))]
    halves[0]["then"], halves[1]["then"] = whole["then"][:n], whole["then"][n:]
    knobs = {"minibatches": 1, "grad_clip": 1e9, "kl_coef": 0.5, "max_new_tokens": 9}
    torch.save({**policy.to_checkpoint(), "halves": halves, "knobs": knobs}, tmp_path / "stored")
    (tmp_path / "worker.py").write_text(WORKER)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    argv = [sys.executable, *launch, tmp_path / "worker.py", FOLDER, FOLDER.parent, tmp_path / "stored"]
    done = subprocess.run(list(map(str, argv)), env=ENV, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for norm in ("tokens", "sequence", "constant"):
        wanted = learn(policy, torch.optim.SGD(policy.parameters(), lr=0.0), whole, whole["advantages"],
                       Config(**knobs, loss_norm=norm), torch.Generator())
        for rank in (0, 1):
            stats, grads = torch.load(tmp_path / f"stored.{norm}.{rank}")
            for grad, p in zip(grads, policy.parameters(), strict=True):
                torch.testing.assert_close(grad, p.grad, atol=1e-6, rtol=1e-4)
            assert stats["loss"] == pytest.approx(wanted["loss"], rel=1e-4)

# DPO, and nonsense ---------------------------------------------------------------------------------------------------

def test_dpo_smoke(folder, run, tmp_path):
    out = tmp_path / "out"
    argv = [f"--data={folder}/pairs.jsonl", f"--init={folder}/sft.pt", f"--out={out}", "--steps=6", "--batch_size=8",
            "--eval_every=3", "--lr=0.01", "--beta=0.5", "--prompts=2", "--max_new_tokens=2"]
    code, said, wrong = run(tmp_path, "train_dpo.py", *argv)
    assert code == 0, wrong
    log = [json.loads(line) for line in (out / "train_dpo.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and log[-1]["loss"] < 0.6 and log[-1]["val_accuracy"] == 1
    assert {"accuracy", "margin", "seconds"} <= set(json.loads((out / "train_dpo.json").read_text()))
    assert (out / "train_dpo.png").exists() and load_checkpoint(out / "dpo.pt", "dpo")

NONSENSE = {  # name: (options, what the one line says)
    "unknown": (["--groups=3"], "no option --groups, did you mean --group?"),
    "type": (["--clip=small"], "--clip wants a float, got 'small'"),
    "group": (["--group=3"], "batch_size=8"),
    "alone": (["--group=1"], "group at least 2"),
    "kl": (["--kl=k4"], "kl=k4: it is exact, k1, k2 or k3"),
    "norm": (["--loss_norm=words"], "loss_norm is tokens, sequence or constant"),
    "missing": (["--data=nowhere.jsonl"], "there is no file nowhere.jsonl"),
    "empty": (["--data={0}/empty.jsonl"], "empty.jsonl is empty"),
    "broken": (["--data={0}/broken.jsonl"], "broken.jsonl line 5:"),
    "no check": (["--data={0}/bare.jsonl"], 'the judge wants a "check" in every record'),
    "no function": (["--reward={0}/mine.py:width"], "mine.py has no function width"),
    "no file": (["--reward=nowhere.py:f"], "it is judge, model, or FILE.py:FUNCTION"),
    "room": (["--max_new_tokens=23"], "smaller --max_new_tokens"),
    "no model": (["--init=nowhere.pt"], "no checkpoint at nowhere.pt"),
    "no rm": (["--reward=model", "--rm=nowhere.pt"], "no checkpoint at nowhere.pt"),
    "truncated": (["--init={0}/half.pt"], "half.pt is truncated or not a checkpoint"),
    "kind": (["--init={0}/rm.pt"], "rm.pt is a 'rm' checkpoint, wanted is 'sft'"),
    "nan": (["--kl_coef=inf"], "loss is nan at step"),
}

@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_one_line(folder, run, tmp_path, name):
    more, wanted = NONSENSE[name]
    argv = options(folder, tmp_path / "out", *(option.format(folder) for option in more))
    code, _, said = run(tmp_path, "train_grpo.py", *argv)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and wanted in said, said
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {"log.jsonl"}

def test_dpo_nonsense(folder, run, tmp_path):
    code, _, said = run(tmp_path, "train_dpo.py", f"--data={folder}/data.jsonl", f"--init={folder}/sft.pt")
    assert code == 2 and said.count("\n") == 1 and "data.jsonl line 1: field 'prompt' is missing" in said
