"""
Tests of Part 8: pytest part_8. The oracles: `slow_gae`, a double loop in float64, rollouts recomputed one row and one
token at a time, and arithmetic by hand. The script runs on tiny checkpoints and a data set that are made here.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import functools
import json
import math
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch

from model import GPT, ActorCritic, GPTConfig, RewardModel
from shared import load_checkpoint, save_checkpoint
from tokenizer import Tokenizer
from train_ppo import (Config, encode, evaluate, gae, judged, learn, load_data, masked_mean, next_kl_coef, pick,
                       ppo_loss, rollout, shape_rewards, texts, value_loss, whiten)

SCRIPT = Path(__file__).resolve().parent / "train_ppo.py"
TINY = dict(vocab_size=13, block_size=24, n_layer=2, n_head=4, n_embd=16, n_kv_head=2, mlp_dim=12)
END = 12
TOK = Tokenizer.train("the red fox saw the old dog. the dog ran to the fox. say it again. count to three. " * 4, 300)
STUB = SimpleNamespace(special={"<|end|>": END}, decode=str)

def randomised(model, seed=0, std=0.2):
    """Every parameter random, gains about 1: a projection that starts at zero would hide all that stands before it."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = (p.ndim == 1 and p.data.mean() > 0.5) + std * torch.randn(p.shape, generator=g)
    return model

def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def ragged(lengths, T):
    """Rows whose answers start at index b and have `lengths` tokens, as a (B, T) mask."""
    pos, first = torch.arange(T), torch.arange(len(lengths))[:, None]
    return (pos >= first) & (pos < first + torch.tensor(lengths)[:, None])

@pytest.fixture(scope="module")
def models():
    """Policy, reference and reward model, none like another."""
    cfg = GPTConfig(**TINY)
    return randomised(ActorCritic(cfg)), randomised(GPT(cfg), 0, 0.17), randomised(RewardModel(cfg), 2)

def roll(models, policy=None, **knobs):
    """16 answers to prompts of 2 to 7 tokens; equal seeds give equal answers."""
    torch.manual_seed(0)
    records = [{"prompt": [1 + i % 11] * (2 + i % 6)} for i in range(16)]
    cfg = Config(**{"max_new_tokens": 8, "batch_size": 16, **knobs})
    return cfg, rollout(policy or models[0], *models[1:], STUB, records, cfg, "cpu")

# the mathematics -----------------------------------------------------------------------------------------------------

def slow_gae(rewards, values, mask, last_value, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, written as a double loop."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for b, row in enumerate(mask):
        at = row.nonzero()[:, 0].tolist()
        v = [values[b, t].item() for t in at] + [last_value[b].item()]
        delta = [rewards[b, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(at)]
        for i, t in enumerate(at):
            advantages[b, t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(at)))
    return advantages

@pytest.mark.parametrize("gamma, lam", [(1, 0.95), (0.9, 0.7), (1, 1), (1, 0)])
def test_gae(gamma, lam):
    """fp32 against float64 within 1e-5; rows of 1 to 8 tokens, two of them cut and bootstrapped."""
    mask, last = ragged([1, 8, 3, 5], 12), torch.tensor([0.0, 0.0, 1.5, -2.0])
    rewards, values = normal(4, 12, seed=1), normal(4, 12, seed=2)
    advantages, returns = gae(rewards, values, mask, last, gamma, lam)
    exact = slow_gae(rewards, values, mask, last, gamma, lam)
    torch.testing.assert_close(advantages.double(), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(returns, (advantages + values) * mask)
    other = gae(rewards.where(mask, 99.0), values.where(mask, 99.0), mask, last, gamma, lam)
    assert all(torch.equal(a, b) for a, b in zip(other, (advantages, returns)))  # prompts and padding are no matter
    for b in range(4):
        r, v = rewards[b][mask[b]], torch.cat([values[b][mask[b]], last[b:b + 1]])
        if (gamma, lam) == (1, 1):  # all that is still to come, less what was expected
            wanted = r.flip(0).cumsum(0).flip(0) + last[b] - v[:-1]
        elif lam == 0:  # the error of one step
            wanted = r + v[1:] - v[:-1]
        else:
            continue
        torch.testing.assert_close(advantages[b][mask[b]], wanted, atol=1e-5, rtol=0)

def test_whiten():
    """Huang et al.'s example, there with the mean kept: its first entry is .0508, with the unbiased variance .1394."""
    x, everything = torch.arange(1.2, 2.05, 0.1).view(3, 3), torch.ones(3, 3, dtype=torch.bool)
    assert (whiten(x, everything) + 1.6)[0, 0].item() == pytest.approx(0.0508, abs=1e-4)
    assert ((x - 1.6) / x.std() + 1.6)[0, 0].item() == pytest.approx(0.1394, abs=1e-4)
    mask, x = ragged([1, 8, 3, 5], 12), 3 * normal(4, 12) + 7
    white = whiten(x, mask)
    assert white[mask].mean().abs() < 1e-6 and white[mask].var(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert (white[~mask] == 0).all() and torch.equal(whiten(x.where(mask, -50.0), mask), white)
    assert masked_mean(x, mask).item() == pytest.approx(x[mask].mean().item(), rel=1e-6)

def test_ppo_loss():
    """clip 0.2; it acts where the ratio has left [0.8, 1.2] in the direction that the advantage likes."""
    one = torch.ones(1, 1, dtype=torch.bool)
    for ratio, advantage, wanted, acts in [(1.5, 1, -1.2, 1), (0.5, 1, -0.5, 0), (1.5, -1, 1.5, 0), (0.5, -1, 0.8, 1),
                                           (1.1, 1, -1.1, 0), (0.9, -1, 0.9, 0)]:
        logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
        loss, share = ppo_loss(logp, torch.zeros(1, 1), torch.tensor([[float(advantage)]]), one, 0.2)
        loss.backward()
        assert (loss.item(), share.item()) == (pytest.approx(wanted), acts)
        assert logp.grad.item() == pytest.approx(0 if acts else -advantage * ratio)  # held: no gradient
    mask, advantages, logp = ragged([1, 8, 3, 5], 12), normal(4, 12), normal(4, 12, seed=2).requires_grad_()
    loss, share = ppo_loss(logp, logp.detach(), advantages, mask, 0.2)
    loss.backward()  # at the first update it is the plain policy gradient, a mean over the batch's tokens
    torch.testing.assert_close(logp.grad, -advantages * mask / mask.sum())
    assert share == 0 and loss.item() == pytest.approx(-advantages[mask].mean().item(), abs=1e-6)

def test_value_loss():
    """clip 0.2, old value 0: of the value and the held one, the worse counts. Held and worse: no gradient."""
    one = torch.ones(1, 1, dtype=torch.bool)
    for value, target, wanted, slope in [(1.0, 0.0, 0.5, 1.0), (1.0, 1.0, 0.32, 0.0), (0.1, 1.0, 0.405, -0.9),
                                         (-1.0, -1.0, 0.32, 0.0)]:
        v = torch.tensor([[value]], requires_grad=True)
        loss = value_loss(v, torch.zeros(1, 1), torch.tensor([[target]]), one, 0.2)
        loss.backward()
        assert loss.item() == pytest.approx(wanted) and v.grad.item() == pytest.approx(slope)
    mask, v = ragged([1, 8, 3, 5], 12), normal(4, 12)
    wide = value_loss(v, v + 1, normal(4, 12, seed=2), mask, 99.0).item()
    assert wide == pytest.approx((v - normal(4, 12, seed=2))[mask].pow(2).mean().item() / 2, rel=1e-5)

def test_adaptive_controller():
    """Ziegler et al.: beta 0.15, target 6, horizon 10,000; 64 answers at a time."""
    for kl, error in [(6, 0), (6.6, 0.1), (12, 0.2), (600, 0.2), (5.4, -0.1), (0, -0.2)]:
        assert next_kl_coef(0.15, kl, 6, 64, 10_000) == pytest.approx(0.15 * (1 + error * 0.0064))

def test_log_probabilities_and_rewards():
    logits, ids = normal(2, 5, 13), torch.randint(13, (2, 5), generator=torch.Generator().manual_seed(1))
    for row, chosen, found in zip(logits.tolist(), ids.tolist(), pick(logits.log_softmax(-1), ids).tolist()):
        wanted = [math.log(math.exp(l[i]) / sum(map(math.exp, l))) for l, i in zip(row, chosen)]
        assert found == pytest.approx(wanted, abs=1e-5)
    mask, kl = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]]).bool(), torch.tensor([[9.0, 1, -2, 3], [9, 9, 4, 9]])
    rewards = shape_rewards(kl, torch.tensor([5.0, -2.0]), mask, 0.5)
    assert rewards.tolist() == [[0, -0.5, 1, 3.5], [0, 0, -4, 0]]

# the model -----------------------------------------------------------------------------------------------------------

def test_actor_critic_adds_a_value_head_that_is_0():
    sft = randomised(GPT(GPTConfig(**TINY)))
    policy, idx = ActorCritic.load(sft.to_checkpoint()), torch.arange(12).view(2, 6)
    assert set(policy.state_dict()) - set(sft.state_dict()) == {"v_head.weight"} and policy.v_head.bias is None
    logits, values = policy.act(idx)
    assert torch.equal(logits, sft(idx)[0]) and torch.equal(values, torch.zeros(2, 6))
    randomised(policy, seed=3)
    assert torch.equal(GPT.load(policy.to_checkpoint())(idx)[0], policy.act(idx)[0])  # what was trained writes alone
    assert torch.equal(ActorCritic.load(policy.to_checkpoint()).act(idx)[1], policy.act(idx)[1])

def test_causality(models):
    idx = torch.randint(END, (1, 10), generator=torch.Generator().manual_seed(1))
    before = torch.cat([*models[0].act(idx)[0][0].T, models[0].act(idx)[1][0]]).view(14, 10)  # logits, then V
    for t in range(10):
        other = idx.clone()
        other[0, t] = (idx[0, t] + 1) % END
        logits, values = models[0].act(other)
        moved = (torch.cat([logits[0].T, values]) - before).abs().amax(dim=0) > 0
        assert torch.equal(moved, torch.arange(10) >= t)

def test_gradient_flow():
    policy, idx = ActorCritic(GPTConfig(**TINY)), torch.randint(END, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = ragged([2, 4, 5], 9)
    loss = lambda values: value_loss(values, values.detach(), torch.ones(3, 9), mask, 0.2)
    loss(policy.act(idx)[1]).backward()
    touched = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"v_head.weight"}  # at 0 the critic learns first, and leaves the trunk alone
    randomised(policy).zero_grad()
    logits, values = policy.act(idx)
    logp = pick(logits[:, :-1].log_softmax(dim=-1), idx[:, 1:])
    (ppo_loss(logp, logp.detach(), normal(3, 8), mask[:, 1:], 0.2)[0] + loss(values)).backward()
    for name, p in policy.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name

# rollout -------------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("budget", [1e9, 0.3])
def test_rollout_row_by_row(models, budget):
    """Within 1e-4 of a walk along each row alone. Beyond the budget: cut, no score, no penalty, bootstrapped with V."""
    policy, reference, rm = models
    cfg, batch = roll(models, kl_budget=budget)
    kinds = set()
    for b, (ids, n) in enumerate(zip(batch["ids"].tolist(), batch["starts"].tolist())):
        end = next((t + 1 for t in range(n, n + 8) if ids[t] == END), n + 8)  # one past the answer
        ended, row = ids[end - 1] == END, torch.tensor([ids[:end]])
        logits, values = policy.act(row)
        logp, other = logits[0].log_softmax(dim=-1), reference(row)[0][0].log_softmax(dim=-1)
        exact = sum((logp[t].exp() * (logp[t] - other[t])).sum().item() for t in range(n - 1, end - 1))
        spent, stop, cut = 0.0, end, False
        for t in range(n, end):
            spent += (logp[t - 1, ids[t]] - other[t - 1, ids[t]]).item()
            if spent > budget and ids[t] != END:
                stop, cut = t + 1, True
                break
        raw = rm(row, torch.tensor([n]), torch.tensor([end])).clamp(-cfg.score_clip, cfg.score_clip).item()
        score = 0.0 if cut else raw if ended else cfg.missing_end
        kinds.add("cut" if cut else "ended" if ended else "missing end")
        assert batch["mask"][b].nonzero()[:, 0].tolist() == list(range(n - 1, stop - 1))
        assert (batch["lengths"][b], batch["ended"][b], batch["cut"][b]) == (end, ended, cut)
        near = functools.partial(pytest.approx, abs=1e-4)
        for t in range(n - 1, stop - 1):
            assert batch["logp"][b, t].item() == near(logp[t, ids[t + 1]].item())
            assert batch["kl"][b, t].item() == near((logp[t, ids[t + 1]] - other[t, ids[t + 1]]).item())
            assert batch["values"][b, t].item() == near(values[0, t].item())
        assert batch["exact_kl"][b].item() == near(exact) and exact > 0 and batch["score"][b].item() == near(score)
        assert batch["last_value"][b].item() == near(values[0, stop - 1].item() if cut else 0)
        rewards = shape_rewards(batch["kl"], batch["score"], batch["mask"], 0.0)[b]
        assert rewards.nonzero().tolist() == ([] if cut else [[end - 2]])  # index t is about token t + 1
    assert kinds == ({"ended", "missing end"} if budget > 1 else {"ended", "missing end", "cut"})

def test_kl_of_a_policy_with_itself_is_0(models):
    _, batch = roll((models[0], models[0], models[2]))
    assert batch["kl"].abs().max() < 1e-5 and batch["exact_kl"].abs().max() < 1e-5

def test_texts_and_gold(models):
    _, batch = roll(models)
    for b, (text, ended) in enumerate(texts(batch, STUB)):
        row = batch["ids"][b, batch["starts"][b]:batch["lengths"][b]].tolist()
        assert text == str(row[:-1] if ended else row) and ended == (row[-1] == END)
    record = {"check": {"answer": "7"}}
    assert judged([record] * 4, [("7", True), ("8", True), ("7 ", True), ("7", False)]) == 0.5
    assert math.isnan(judged([record, {}], [("7", True)] * 2))

def test_evaluate_is_over_all_records(models):
    records, cfg = [{"prompt": [1 + i % 11]} for i in range(130)], Config(max_new_tokens=3)
    torch.manual_seed(0)
    gold, reward, kl, answers = evaluate(*models, STUB, records, cfg, "cpu")
    torch.manual_seed(0)
    parts = [rollout(*models, STUB, part, cfg, "cpu") for part in (records[:128], records[128:])]
    assert math.isnan(gold) and answers == sum((texts(part, STUB) for part in parts), [])
    assert reward == pytest.approx(torch.cat([part["score"] for part in parts]).mean().item(), rel=1e-4)
    assert kl == pytest.approx(torch.cat([part["exact_kl"] for part in parts]).mean().item(), rel=1e-4)

# learn ---------------------------------------------------------------------------------------------------------------

def update(policy, cfg, batch, lr=1e-4):
    rewards = shape_rewards(batch["kl"], batch["score"], batch["mask"], cfg.kl_coef)
    advantages, returns = gae(rewards, batch["values"], batch["mask"], batch["last_value"], cfg.gamma, cfg.lam)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, eps=1e-5, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    return learn(policy, optimizer, batch, whiten(advantages, batch["mask"]), returns, cfg, generator)

def fresh():
    return randomised(ActorCritic(GPTConfig(**TINY)))

def test_the_first_ratio_is_1_unless_sampler_and_scorer_differ(models):
    policy = fresh()
    assert update(policy, *roll(models, policy))["first_ratio_error"] < 1e-4
    policy = fresh()
    policy.generate = functools.partial(policy.generate, temperature=0.7)
    assert update(policy, *roll(models, policy))["first_ratio_error"] > 0.05
    cfg, batch = roll(models)
    batch["logp"] = batch["logp"].roll(1, dims=1)
    assert update(fresh(), cfg, batch)["first_ratio_error"] > 0.05

def test_each_epoch_takes_each_answer_once_and_max_kl_stops_it(models):
    cfg, batch = roll(models, epochs=3, minibatches=4, max_kl=1e9)
    policy, rows = fresh(), []
    act = policy.act
    policy.act = lambda ids, mask: (rows.append(ids.tolist()), act(ids, mask))[1]
    stats = update(policy, cfg, batch)
    epochs = [sum(rows[i:i + 4], []) for i in (0, 4, 8)]
    assert len(rows) == len(stats["clip_fraction"]) == 12 and epochs[0] != epochs[1] != epochs[2]
    assert all(sorted(epoch) == sorted(batch["ids"][:, :-1].tolist()) for epoch in epochs)
    cfg.max_kl = 0.05
    stats = update(fresh(), cfg, batch, lr=0.1)  # the first step alone goes too far
    assert len(stats["clip_fraction"]) == 1 and stats["step_kl"] > 0.05

def test_only_the_policy_learns(models):
    policy, before = fresh(), [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    update(policy, *roll(models, policy))
    assert all(torch.equal(v, old[k]) for m, old in zip(models, before) for k, v in m.state_dict().items())
    assert all(not torch.equal(p, q) for p, q in zip(policy.parameters(), models[0].parameters()))  # a copy of it

def test_it_learns_what_is_rewarded_and_then_says_it():
    """One batch of prompts, reward for "7, end", and greedy generation returns it."""
    torch.manual_seed(0)
    policy, reference = (cls(GPTConfig(**TINY)) for cls in (ActorCritic, GPT))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3, eps=1e-5, weight_decay=0.0)
    rm = lambda ids, starts, lengths: 1.0 * (ids.gather(1, starts[:, None])[:, 0] == 7) - 0.2 * (lengths - starts - 2)
    cfg = Config(max_new_tokens=5, missing_end=-1.0, kl_coef=0.0, max_kl=0.5)
    records, generator = [{"prompt": [1 + i % 4] * (1 + i % 3)} for i in range(48)], torch.Generator().manual_seed(0)
    for _ in range(40):
        batch = rollout(policy, reference, rm, STUB, records, cfg, "cpu")
        rewards = shape_rewards(batch["kl"], batch["score"], batch["mask"], 0.0)
        advantages, returns = gae(rewards, batch["values"], batch["mask"], batch["last_value"], 1.0, 0.95)
        learn(policy, optimizer, batch, whiten(advantages, batch["mask"]), returns, cfg, generator)
    policy.generate = functools.partial(policy.generate, temperature=0)
    assert texts(rollout(policy, reference, rm, STUB, records[:4], cfg, "cpu"), STUB) == [("[7]", True)] * 4

# the script ----------------------------------------------------------------------------------------------------------
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
    """run(folder, *options) -> exit code, stdout, stderr."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(folder, *argv):
        print(json.dumps([str(folder), str(SCRIPT), *argv]), file=server.stdin, flush=True)
        return int(server.stdout.readline()), (folder / "stdout").read_text(), (folder / "stderr").read_text()

    yield ask
    server.kill()
    server.communicate()

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts, an SFT and a reward model, and each bad file that NONSENSE names."""
    folder = tmp_path_factory.mktemp("ppo")
    torch.manual_seed(0)
    cfg = GPTConfig(vocab_size=TOK.vocab_size, block_size=24, n_layer=1, n_head=2, n_embd=16)
    rm, state = {"kind": "rm", "head": {}, **RewardModel(cfg).to_checkpoint()}, TOK.state()
    save_checkpoint(folder / "sft.pt", kind="sft", **GPT(cfg).to_checkpoint(), tokenizer=state)
    save_checkpoint(folder / "rm.pt", **rm, tokenizer=state)
    save_checkpoint(folder / "other.pt", **rm, tokenizer={**state, "tokens": state["tokens"][:-1]})
    (folder / "half.pt").write_bytes((folder / "sft.pt").read_bytes()[:9000])
    ask = {"instruction": "say it", "input": "the dog", "check": {"answer": "the dog"}}
    lines = [json.dumps(ask)] * 39
    lines.insert(3, json.dumps({**ask, "input": "the " * 90}))
    write = lambda name, some: (folder / name).write_text("\n".join(some))
    write("data.jsonl", lines), write("empty.jsonl", [])
    write("broken.jsonl", [*lines[:4], lines[4][:-5], *lines[5:]])
    write("field.jsonl", [*lines[:6], '{"instruction": "say it"}'])
    return folder

def options(folder, out, *more):
    sizes = ["--steps=3", "--batch_size=8", "--max_new_tokens=6", "--prompts=4", "--eval_every=2"]
    inputs = [f"--data={folder}/data.jsonl", f"--init={folder}/sft.pt", f"--rm={folder}/rm.pt"]
    return [*inputs, f"--out={out}", *sizes, *more]

def test_smoke(folder, run, tmp_path):
    out, given = tmp_path / "out", (folder / "sft.pt").read_bytes()
    code, said, wrong = run(tmp_path, *options(folder, out))
    assert code == 0, wrong
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((out / "metrics.json").read_text())
    wanted = "reward gold kl entropy clip_fraction explained_variance length ended rollout_s score_s update_s".split()
    assert [r["step"] for r in log] == [0, 1, 2] and all(set(wanted) <= set(r) for r in log) and "val_gold" in log[1]
    assert {"sft_gold", "ppo_gold", "kl", "seconds"} <= set(metrics) and metrics["first_ratio_error"] <= 1e-4
    assert "left out: 1" in said and said.count("  SFT: ") == said.count("  PPO: ") == 4
    assert (out / "train_ppo.png").read_bytes().startswith(b"\x89PNG") and (folder / "sft.pt").read_bytes() == given
    policy = GPT.load(load_checkpoint(out / "ppo.pt", "ppo"))
    train, val = load_data(Config(data=f"{folder}/data.jsonl", max_new_tokens=6), TOK, 24)
    assert (len(train), len(val)) == (35, 4) and val[0]["prompt"] == encode(val[0], TOK)
    assert policy(torch.tensor([val[0]["prompt"]]))[0].isfinite().all()

NONSENSE = {  # name: (options, what the one line says)
    "unknown": (["--stepz=3"], "no option --stepz, did you mean --steps?"),
    "type": (["--clip=small"], "--clip wants a float, got 'small'"),
    "minibatches": (["--minibatches=3"], "batch_size=8"),
    "missing": (["--data=nowhere.jsonl"], "there is no file nowhere.jsonl"),
    "empty": (["--data={0}/empty.jsonl"], "empty.jsonl is empty"),
    "broken": (["--data={0}/broken.jsonl"], "broken.jsonl line 5:"),
    "field": (["--data={0}/field.jsonl"], "field.jsonl line 7: field 'input' is missing"),
    "room": (["--max_new_tokens=23"], "smaller --max_new_tokens"),
    "no model": (["--init=nowhere.pt"], "no checkpoint at nowhere.pt"),
    "no rm": (["--rm=nowhere.pt"], "no checkpoint at nowhere.pt"),
    "truncated": (["--init={0}/half.pt"], "half.pt is truncated or not a checkpoint"),
    "foreign": (["--rm={0}/data.jsonl"], "data.jsonl is truncated or not a checkpoint"),
    "kind": (["--rm={0}/sft.pt"], "sft.pt is a 'sft' checkpoint, wanted is 'rm'"),
    "tokenizer": (["--rm={0}/other.pt"], "another tokenizer or a shorter context"),
    "nan": (["--lr=1e30", "--max_kl=1e30"], "loss is nan at step"),
}

@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_one_line(folder, run, tmp_path, name):
    more, wanted = NONSENSE[name]
    code, _, said = run(tmp_path, *options(folder, tmp_path / "out", *(option.format(folder) for option in more)))
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and wanted in said, said
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {"log.jsonl"}
