"""
Tests of Part 9's demos: pytest part_9/test_demos_9.py. Their mathematics against sums by hand and by enumeration, and a
tiny run of each as a script, with checkpoints that are made here and a reward that a random model can get.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import itertools
import json
import math
import os
import re
import subprocess

import pytest
import torch

import demo_group_size as sizes
import demo_kl_estimators as kl
import demo_methods as methods
import train_grpo
from model import GPT, GPTConfig, RewardModel
from shared import ROOT, read_jsonl, require, save_checkpoint
from tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
TINY = dict(vocab_size=7, block_size=16, n_layer=1, n_head=2, n_embd=8)

def logps(n, V, seed):
    return torch.randn(n, V, generator=torch.Generator().manual_seed(seed)).log_softmax(dim=-1)

def rolled():
    """Two models that differ, and what the first one wrote to 8 prompts of one token."""
    torch.manual_seed(0)
    policy, reference = GPT(GPTConfig(**TINY)), GPT(GPTConfig(**TINY))
    for model in (policy, reference):
        for p in model.parameters():
            p.data += 0.3 * torch.randn_like(p)
    ids, logp = policy.generate(torch.arange(7).repeat(2)[:8, None], 6, stop=6, return_logp=True)
    mask = logp.isfinite()[:, 1:]
    with torch.no_grad():
        then = train_grpo.log_probs(reference, ids[:, :-1], mask)
    return policy, reference, {"ids": ids, "mask": mask, "then": then}

# demo_kl_estimators ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_moments_by_enumeration(kind):
    now, then = logps(5, 4, 0), logps(5, 4, 1)
    by_hand = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}[kind]
    means, variances = [], []
    for a, b in zip(now.double().tolist(), then.double().tolist()):
        values = [by_hand(x - y) for x, y in zip(a, b)]
        means.append(sum(math.exp(x) * v for x, v in zip(a, values)))
        variances.append(sum(math.exp(x) * (v - means[-1]) ** 2 for x, v in zip(a, values)))
    mean, sd = kl.moments(now, then, kind)
    assert mean == pytest.approx(sum(means) / 5, rel=1e-5)
    assert sd == pytest.approx((sum(variances) / 5) ** 0.5, rel=1e-5)
    exact = sum(math.exp(x) * (x - y) for x, y in zip(now.flatten().tolist(), then.flatten().tolist())) / 5
    assert (abs(mean - exact) < 1e-5) == (kind != "k2")  # k1 and k3 are unbiased as numbers

def test_gradients_on_average():
    """Of k1 nothing is left, of k2 the exact gradient; k3's is KL(reference || policy)'s at the same positions."""
    policy, _, batch = rolled()
    rows = kl.gradients(policy, batch)
    assert rows.shape == (7, sum(p.numel() for p in policy.parameters()))
    exact, k1, k2, k3 = rows[3:]
    assert k1.norm() < 1e-4 * exact.norm() and (k2 - exact).norm() < 1e-4 * exact.norm()
    now, then = train_grpo.log_probs(policy, batch["ids"][:, :-1], batch["mask"]), batch["then"]
    wanted = torch.autograd.grad((then.exp() * (then - now)).sum(), list(policy.parameters()))
    wanted = torch.cat([x.flatten() for x in wanted])
    assert (k3 - wanted).norm() < 1e-4 * wanted.norm() and (k3 - exact).norm() > 1e-2 * exact.norm()

def test_the_sampled_gradients_average_to_these():
    """One position: each token's gradient, weighted by its probability, sums to the row of the average."""
    policy, _, batch = rolled()
    first = {"mask": torch.zeros_like(batch["mask"]), "then": batch["then"][:1], "ids": batch["ids"].clone()}
    first["mask"][0, 0] = True
    with torch.no_grad():
        pi = train_grpo.log_probs(policy, first["ids"][:, :-1], first["mask"])[0].exp()
    total = 0
    for token in range(7):
        first["ids"][0, 1] = token  # causal: its own probability does not move
        rows = kl.gradients(policy, first)
        total += pi[token] * rows[:3]
    assert torch.allclose(total, rows[4:], atol=1e-5 * rows[3].norm().item() + 1e-6)

def test_microscope_ends_at_itself(monkeypatch):
    policy, reference, batch = rolled()
    monkeypatch.setattr(train_grpo, "rollout", lambda *_: batch)
    values, n, cosine, norm = kl.microscope(policy, reference, None, [{}] * 128, None, "cpu")
    assert n == [32, 64, 128] and cosine[-1][3] == pytest.approx(1) and norm[-1][3] == pytest.approx(1)
    assert values["exact"][0] == pytest.approx(values["k1"][0], rel=1e-4) and values["k1"][1] > 0

# demo_group_size ------------------------------------------------------------------------------------------------------

def test_pass_at_by_drawing_all_subsets():
    for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 0, 2), (4, 4, 2), (5, 3, 3)):
        draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert sizes.pass_at(n, c, k) == pytest.approx(sum(map(max, draws)) / len(draws))

def test_curve():
    held = torch.zeros(3, 16)
    held[0, :4], held[1, :] = 1, 1
    mean, half = sizes.curve(held)
    assert mean[0] == pytest.approx((0.25 + 1 + 0) / 3) and mean[15] == pytest.approx(2 / 3)
    assert half == pytest.approx(1.96 * torch.tensor([0.25, 1, 0]).std().item() / 3 ** 0.5)

def test_weights_by_hand():
    """Mean |reward - mean| of a group is 2 p (1 - p); the deviation is sqrt(8 / 7 p (1 - p))."""
    held = torch.tensor([[1.0] * c + [0.0] * (8 - c) for c in (0, 1, 4, 7)])
    by, share, extremes = sizes.weights(held, False)
    assert by[[0, 1, 4, 7]].tolist() == pytest.approx([0, 7 / 16, 1, 7 / 16]) and by[2].isnan()
    assert share.tolist() == [0.25, 0.25, 0, 0, 0.25, 0, 0, 0.25, 0] and extremes == pytest.approx(14 / 30)
    by, _, extremes = sizes.weights(held, True)
    assert by[1].item() == pytest.approx(math.sqrt(7) / 4, abs=1e-3) and extremes == pytest.approx(0.5695, abs=1e-3)

# demo_methods ---------------------------------------------------------------------------------------------------------

def test_wilson_is_where_the_truth_would_be_196_deviations_off():
    for p, n in ((0.0, 10), (0.25, 256), (1.0, 7)):
        for end in methods.wilson(p, n):
            assert abs(p - end) == pytest.approx(1.96 * math.sqrt(max(0, end * (1 - end)) / n), abs=1e-9)
    assert methods.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)

def test_best_of_n_keeps_each_prompts_best(monkeypatch):
    """Answers are numbers, the score likes small ones, gold is whether the record's own smallest was kept."""
    numbers = [3, 1, 2, 7, 9, 8, 4, 5, 4.5]
    monkeypatch.setattr(train_grpo, "rollout", lambda *_: {"mask": torch.ones(9, 2)})
    monkeypatch.setattr(train_grpo, "texts", lambda *_: numbers)
    monkeypatch.setattr(train_grpo, "judged", lambda records, kept: torch.tensor(
        [float(r == x) for r, x in zip(records, kept)]))
    score = lambda asked, batch, answers: -torch.tensor(numbers)
    assert methods.best_of_n(None, None, [1, 7, 5], 3, score, None, "cpu") == (pytest.approx(2 / 3), 18)

def test_launch_measures_one_child(monkeypatch, tmp_path):
    """Neither this process, which is larger, nor the child before it counts."""
    (tmp_path / "child.py").write_text("""
import json, shutil, sys
options = dict(a[2:].split("=") for a in sys.argv[1:])
held = b"x" * int(options["bytes"])
for name, text in {"a.json": '{"seconds": 3}', "a.jsonl": '{"step": 0, "length": 2.5}'}.items():
    open(options["out"] + "/" + name, "w").write(text)
""")
    monkeypatch.setattr(methods, "ROOT", tmp_path)
    policy = GPT(GPTConfig(**TINY))
    save_checkpoint(tmp_path / "a.pt", kind="x", config={"batch_size": 4}, **policy.to_checkpoint())
    (made, seconds, large, tokens), (_, _, small, _) = (
        methods.launch("child.py", tmp_path, torch.device("cpu"), bytes=n) for n in (100_000_000, 1))
    assert torch.equal(made.wte.weight, policy.wte.weight) and (seconds, tokens) == (3, 10)
    assert 90 < large - small < 110 and small < 60  # megabytes

def test_the_options_it_gives_exist():
    for script, more in methods.SCRIPTS.values():
        known = re.findall(r"^    (\w+): \w+ = ", (ROOT / script).read_text(), re.M)
        given = {"init", "steps", "seed", "device", "prompts", "out", *more}
        given |= set() if "dpo" in script else {"rm", "data", "batch_size"}
        assert given <= set(known)

# all three as scripts -------------------------------------------------------------------------------------------------

DRIVER = """
import functools, runpy, subprocess, sys
here, folder, *jobs = sys.argv[1:]
sys.path[:0] = [here, here + "/.."]
import torch, train_dpo, train_grpo
for module in (train_dpo, train_grpo):  # a few records are enough
    module.read_jsonl = lambda path, fields, read=module.read_jsonl: read(path, fields)[:150]
train_grpo.judged = lambda records, answers: torch.tensor([float(len(text) % 3 == 0) for text, _ in answers])
train_grpo.Config = functools.partial(train_grpo.Config, max_new_tokens=6)
run = subprocess.run
def stub(command, **options):  # in place of a train script, a copy of what one would have made
    if "-c" not in command:
        return run(command, **options)
    out = command[5].partition("=")[2]
    return run(["sh", "-c", 'mkdir -p "$2" && cp "$1"/made/* "$2" && echo 1000', "sh", folder, out], **options)
subprocess.run = stub
for job in jobs:
    name, *options = job.split()
    sys.argv = [name, "--device=cpu", f"--init={folder}/sft.pt", f"--out={folder}/out", *options]
    runpy.run_path(f"{here}/{name}.py", run_name="__main__")
"""

def test_smoke(tmp_path):
    val = require("data/stories") / "instructions_val.jsonl"
    tok = Tokenizer.train("\n".join(r["instruction"] for r in read_jsonl(val, ["instruction"])[:150]), 400)
    torch.manual_seed(0)
    cfg = GPTConfig(vocab_size=tok.vocab_size, block_size=128, n_layer=1, n_head=2, n_embd=8)
    (tmp_path / "made").mkdir()
    sft = {**GPT(cfg).to_checkpoint(), "tokenizer": tok.state()}
    save_checkpoint(tmp_path / "sft.pt", kind="sft", **sft)
    save_checkpoint(tmp_path / "made/a.pt", kind="ppo", **sft, config={"batch_size": 4})
    save_checkpoint(tmp_path / "rm.pt", kind="rm", head={}, **RewardModel(cfg).to_checkpoint(), tokenizer=tok.state())
    (tmp_path / "made/a.json").write_text('{"seconds": 0.5}')
    (tmp_path / "made/a.jsonl").write_text('{"step": 0, "length": 2.5}\n' * 3)
    jobs = ["demo_kl_estimators --steps=1 --batch_size=8 --prompts=32",
            "demo_group_size --steps=1 --batch_size=32 --samples=16 --prompts=4",
            f"demo_methods --rm={tmp_path}/rm.pt --steps=1 --batch_size=8 --prompts=4"]
    command = [sys.executable, "-c", DRIVER, FOLDER, tmp_path, *jobs]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {name: json.loads((tmp_path / f"out/demo_{name}.json").read_text())
             for name in ("kl_estimators", "group_size", "methods")}
    assert all((tmp_path / f"out/demo_{name}.png").read_bytes().startswith(b"\x89PNG") for name in found)
    shares = found["kl_estimators"]["of_none"]
    assert shares["none_1"] == shares["none_2"] == 1 and shares["exact_2"] > 0
    assert set(found["group_size"]["pass_at_1"]) == {"SFT", *sizes.RUNS}
    assert len(found["group_size"]["alike"]["16"]) == 1
    rows = found["methods"]
    assert {"SFT", "best of 2", *methods.SCRIPTS} < set(rows) and rows["PPO"][0][2] == 0.5 and rows["PPO"][0][4] == 30
    assert rows["DPO"][0][0] == rows["SFT"][0][0] and abs(rows["DPO"][0][1]) < 1e-5  # the copy is the SFT model
