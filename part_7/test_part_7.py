"""
Tests of Part 7: pytest part_7. The oracles: `reference`, the trunk in float64 with or without a causal mask, one answer
at a time without padding, and Part 6's model. The script runs on a tiny SFT model and data set that are made here.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import importlib.util
import json
import math
import os
import random
import subprocess

import pytest
import torch
import torch.nn.functional as F

import train_rm
from model import GPT, GPTConfig, RewardModel
from shared import load_checkpoint, save_checkpoint
from tokenizer import Tokenizer
from train_rm import (Config, calibration, collate, evaluate, get_batch, length_probe, load_data, make_pair,
                      preference_loss, rewards, sample_pairs, shuffled)

SCRIPT = Path(__file__).resolve().parent / "train_rm.py"
TINY = dict(vocab_size=13, block_size=24, n_layer=2, n_head=4, n_embd=16, n_kv_head=2, mlp_dim=12)
END = 12
TOK = Tokenizer.train("the red fox saw the old dog. the dog ran to the fox. say it again. count to three. " * 4, 300)
KINDS = [("mean", 0), ("last", 0), ("mean", 1), ("last", 1)]

def randomised(model, seed=0, std=0.2):
    """Every parameter random, gains about 1: a projection that starts at zero would hide all that stands before it."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = (p.ndim == 1 and p.data.mean() > 0.5) + std * torch.randn(p.shape, generator=g)
    return model

def make(head="mean", bidirectional=0):
    return randomised(RewardModel(GPTConfig(**TINY), head, bidirectional))

def pairs(n=7, seed=0, good=None):
    """Pairs of answers as ids of the tiny vocabulary, of random lengths; with `good`, only the preferred have it."""
    rng, plain = random.Random(seed), [i for i in range(1, END) if i != good]
    words = lambda low, high: rng.choices(plain, k=rng.randint(low, high))
    found = [{"prompt": words(2, 7), "chosen": [*words(1, 9), END], "rejected": [*words(1, 9), END]} for _ in range(n)]
    for p in found if good else []:
        p["chosen"][rng.randrange(len(p["chosen"]) - 1)] = good
    return found

# the model -----------------------------------------------------------------------------------------------------------

def rms(x, gain):
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * gain

def turned(x, base):
    """x (H, T, D), each pair of channels turned by position * base ** (-2i / D)."""
    theta = base ** -(torch.arange(0, x.size(-1), 2) / x.size(-1)).double()
    angle = torch.outer(torch.arange(x.size(1)).double(), theta)
    x1, x2 = x.chunk(2, dim=-1)
    return x * angle.cos().repeat(1, 2) + torch.cat([-x2, x1], dim=-1) * angle.sin().repeat(1, 2)

def reference(model, ids, causal):
    """One row without padding -> the raw score of each token, (T,), in float64."""
    w, cfg = {name: p.detach().double() for name, p in model.state_dict().items()}, model.cfg
    x, T = w["wte.weight"][ids], len(ids)
    seen = torch.ones(T, T).tril().bool() if causal else torch.ones(T, T).bool()
    for i in range(cfg.n_layer):
        linear = lambda name, x: x @ w[f"h.{i}.{name}.weight"].T
        y = rms(x, w[f"h.{i}.ln_1.weight"])
        q, k, v = (linear(f"attn.c_{n}", y).view(T, -1, cfg.head_dim).transpose(0, 1) for n in "qkv")
        q, k = (turned(rms(z, w[f"h.{i}.attn.{n}_norm.weight"]), cfg.rope_base) for z, n in ((q, "q"), (k, "k")))
        k, v = (z.repeat_interleave(cfg.n_head // cfg.n_kv_head, dim=0) for z in (k, v))
        scores = (q @ k.transpose(1, 2) / math.sqrt(cfg.head_dim)).masked_fill(~seen, -math.inf)
        x = x + linear("attn.c_proj", (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(T, -1))
        y = rms(x, w[f"h.{i}.ln_2.weight"])
        x = x + linear("mlp.c_proj", F.silu(linear("mlp.c_gate", y)) * linear("mlp.c_fc", y))
    x = rms(x, w["ln_f.weight"])
    before = torch.cat([torch.zeros(1, cfg.n_embd), x[:-1]])  # the state in which each token was chosen
    return 10 * (x @ w["after.weight"][0] + (before * w["lm_head.weight"][ids]) @ w["suits.weight"][0])

@pytest.mark.parametrize("head, bidirectional", KINDS)
def test_rewards_against_the_reference(head, bidirectional):
    """fp32 against float64 within 1e-4 of a spread of about 10. Over the answer only; batch-mates change nothing."""
    model, rows = make(head, bidirectional), pairs()
    model.shift.fill_(0.5), model.scale.fill_(2.0)
    for side, found in zip(("chosen", "rejected"), rewards(model, rows, "cpu", batch=3)):
        for p, reward in zip(rows, found.tolist(), strict=True):
            scores = reference(model, p["prompt"] + p[side], causal=not bidirectional)[len(p["prompt"]):].tolist()
            exact = sum(scores) / len(scores) if head == "mean" else scores[-1]
            assert reward == pytest.approx((exact - 0.5) * 2, abs=1e-4)

@pytest.mark.parametrize("head, bidirectional", KINDS)
def test_padding_changes_nothing(head, bidirectional):
    model, (ids, starts, lengths) = make(head, bidirectional), collate(pairs())
    before = model(ids, starts, lengths)
    junk = torch.randint(13, (len(ids), 24), generator=torch.Generator().manual_seed(1))
    wide = F.pad(ids, (0, 24 - ids.size(1))).where(torch.arange(24) < lengths[:, None], junk)
    torch.testing.assert_close(model(wide, starts, lengths), before, atol=1e-5, rtol=0)
    alone = [model(ids[b:b + 1, :n], starts[b:b + 1], lengths[b:b + 1]) for b, n in enumerate(lengths.tolist())]
    torch.testing.assert_close(torch.cat(alone), before, atol=1e-5, rtol=0)

def test_which_scores_count():
    """Tokens 3, 4, 5 are the answer, the end token is 5."""
    starts, lengths = torch.tensor([3, 1]), torch.tensor([6, 8])
    for head, wanted in (("mean", [4.0, 4.0]), ("last", [5.0, 7.0])):
        model = make(head)
        model.token_scores = lambda idx, lengths: torch.arange(8.0).expand(2, 8)
        assert model(torch.zeros(2, 8, dtype=torch.long), starts, lengths).tolist() == wanted

@pytest.mark.parametrize("bidirectional", [0, 1])
def test_causality(bidirectional):
    """Causal: nothing before a changed token moves. An encoder: everything does, except for a change in the padding."""
    model, lengths = make(bidirectional=bidirectional), torch.tensor([10])
    idx = torch.randint(END, (1, 12), generator=torch.Generator().manual_seed(1))
    before = model.token_scores(idx, lengths)
    for t in range(12):
        other = idx.clone()
        other[0, t] = (idx[0, t] + 1) % END
        moved = (model.token_scores(other, lengths) - before)[0, :10] != 0
        wanted = torch.full((10,), t < 10) if bidirectional else torch.arange(10) >= t
        assert torch.equal(moved, wanted), t

def test_the_trunk_is_part_6s():
    path = SCRIPT.parent.parent / "part_6/model.py"
    spec = importlib.util.spec_from_file_location("part_6_model", path)
    part_6 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(part_6)
    ours, theirs = randomised(GPT(GPTConfig(**TINY))), part_6.GPT(part_6.GPTConfig(**TINY))
    theirs.load_state_dict(ours.state_dict())
    idx = collate(pairs())[0]
    assert all(torch.equal(a, b) for a, b in zip(ours(idx, idx), theirs(idx, idx)))
    assert torch.equal(ours.generate(idx, 6, temperature=0), theirs.generate(idx, 6, temperature=0))

def test_load_from_sft_starts_the_head_alone():
    sft = randomised(GPT(GPTConfig(**TINY))).to_checkpoint()
    model = RewardModel.load(sft, head="last", bidirectional=1)
    new = {name for name in model.state_dict() if name not in sft["weights"]}
    assert new == {"after.weight", "suits.weight", "shift", "scale"}
    assert (model.head, model.bidirectional) == ("last", 1) and set(sft["weights"]) <= set(model.state_dict())
    assert all(torch.equal(p, sft["weights"][name]) for name, p in model.state_dict().items() if name not in new)
    for broken in ("h.0.ln_1.weight", "wte.weight", "ln_f.weight"):
        with pytest.raises(AssertionError, match=f"trunk does not fit: .*{broken}"):
            RewardModel.load({**sft, "weights": {k: v for k, v in sft["weights"].items() if k != broken}})
    with pytest.raises(AssertionError, match="trunk does not fit: .*h.1.attn"):  # layers that have no place
        RewardModel.load({**sft, "gpt_config": {**sft["gpt_config"], "n_layer": 1}})

def test_gradients_are_the_same_to_the_bit_each_time():
    """With threads, too: indexing a table by ids adds up its gradient in any order, an embedding in one."""
    model, batch, found = make("mean", 0), collate(pairs() * 40), []
    torch.set_num_threads(2)
    for _ in range(6):
        model.zero_grad()
        model(*batch).sum().backward()
        found.append(model.lm_head.weight.grad.clone())
    torch.set_num_threads(1)
    assert all(torch.equal(found[0], grad) for grad in found)

def test_checkpoint_round_trip():
    model, batch = make("last", 1), collate(pairs())
    model.shift.fill_(0.3), model.scale.fill_(1.7)
    copy = RewardModel.load(model.to_checkpoint(), head="last", bidirectional=1)
    assert torch.equal(copy(*batch), model(*batch))

def test_head_starts_at_the_published_size():
    """N(0, 1 / (C + 1)): with 1,024 channels the standard deviation is known within 7 %. The rest is the logit: ten
    times that, and the first loss is 584 nats, and the first steps undo what the trunk knows."""
    model = RewardModel(GPTConfig(vocab_size=2, n_layer=1, n_head=1, n_kv_head=1, head_dim=2, n_embd=1024, mlp_dim=1))
    assert model.after.weight.std().item() == pytest.approx(1025 ** -0.5, rel=0.07) and model.after.bias is None
    torch.nn.init.zeros_(model.after.weight)
    ids = torch.tensor([[0, 1, 1, 0]])
    logits = model.lm_head(model.trunk(ids))[0]
    wanted = [0.0] + [logits[t - 1, ids[0, t]].item() for t in (1, 2, 3)]
    assert model.token_scores(ids, torch.tensor([4]))[0].tolist() == pytest.approx(wanted, abs=1e-4)

@pytest.mark.parametrize("head, bidirectional", KINDS)
def test_gradient_flow(head, bidirectional):
    model, (ids, starts, lengths) = make(head, bidirectional), collate(pairs())
    preference_loss(*model(ids, starts, lengths).chunk(2), center=0.01).backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    real = torch.arange(ids.size(1)) < lengths[:, None]
    never_read = torch.ones(13, dtype=torch.bool).index_fill(0, ids[real], False)
    assert never_read[0] and (~real).any()  # 0 is the padding's id and nothing else
    assert torch.equal(model.wte.weight.grad.abs().sum(dim=1) == 0, never_read)

# the loss, and what is measured --------------------------------------------------------------------------------------

def test_bradley_terry():
    chosen, rejected = torch.tensor([1.0, 0.5, -3.0]), torch.tensor([1.0, -1.5, 4.0])
    by_hand = [-math.log(1 / (1 + math.exp(-(c - r)))) for c, r in zip(chosen.tolist(), rejected.tolist())]
    for i, wanted in enumerate(by_hand):
        assert preference_loss(chosen[i:i + 1], rejected[i:i + 1]).item() == pytest.approx(wanted, rel=1e-5)
    loss = preference_loss(chosen, rejected)
    assert loss.item() == pytest.approx(sum(by_hand) / 3, rel=1e-6) == F.softplus(rejected - chosen).mean().item()
    assert preference_loss(chosen[:1], rejected[:1]).item() == pytest.approx(math.log(2))
    assert preference_loss(chosen + 7, rejected + 7).item() == pytest.approx(loss.item(), rel=1e-6)  # differences alone
    assert preference_loss(torch.tensor([-500.0]), torch.tensor([500.0])).item() == 1000  # not infinite

def test_margin():
    chosen, rejected = torch.tensor([2.0, 0.25, -1.0]), torch.tensor([0.5, 0.0, 1.0])
    assert preference_loss(chosen, rejected, "margin", margin=1.0).item() == pytest.approx((0 + 0.75 + 3) / 3)
    assert preference_loss(chosen, rejected, "margin", margin=2.0).item() == pytest.approx((0.5 + 1.75 + 4) / 3)

def test_centring():
    """+ center * (r_c + r_r)^2: it moves both towards 0, and the difference not at all."""
    for kind in ("bt", "margin"):
        c, r = torch.tensor([1.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
        off, on = preference_loss(c, r, kind), preference_loss(c, r, kind, center=0.01)
        assert (on - off).item() == pytest.approx(0.09, rel=1e-4)
        grads = torch.autograd.grad(on - off, (c, r))
        assert [g.item() for g in grads] == pytest.approx([0.06, 0.06], rel=1e-4)
        assert (preference_loss(-c, c, kind, center=9.0) - preference_loss(-c, c, kind)).item() == 0

def test_calibration():
    tau, logit = 0.5, lambda p: math.log(p / (1 - p))
    true = torch.tensor([logit(0.75), logit(0.75), logit(0.15), logit(0.95)]) * tau
    claimed, known, error = calibration(true / tau, true, tau)
    assert error == pytest.approx(0, abs=1e-6)
    assert claimed[7].item() == pytest.approx(0.75) and claimed.isnan().sum() == 7  # empty bins
    gap = torch.tensor([logit(0.25), logit(0.25), logit(0.15), 99.0])  # 99: the last bin, not one after it
    claimed, known, error = calibration(gap, true, tau)
    assert error == pytest.approx((2 * 0.5 + 0 + 0.05) / 4, abs=1e-5)
    assert known[2].item() == pytest.approx(0.75) and known[9].item() == pytest.approx(0.95)

def test_length_probe():
    pair = lambda a, b: {"chosen": [0] * a, "rejected": [0] * b}
    longer, shorter, equal = pair(5, 2), pair(1, 2), pair(3, 3)
    assert length_probe([longer] * 3 + [shorter], [longer, longer, shorter, equal]) == 0.625
    assert length_probe([shorter] * 3 + [longer], [longer, longer, shorter, equal]) == 0.375  # learned on train alone

def train_on(model, data, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        loss = preference_loss(*model(*get_batch(data, step, Config(batch_size=16))).chunk(2), center=0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model

@pytest.mark.parametrize("head", ["mean", "last"])
def test_labels_teach_and_shuffled_labels_do_not(head):
    """Answers with token 5 are preferred. A control that beats chance (0.5 +- 4 standard errors) has a leak: by the
    order in the batch, say. Normalised as the script does it, rewards have mean 0 and variance 1."""
    torch.manual_seed(0)
    train, val = pairs(200, 1, good=5), pairs(200, 2, good=5)
    model = train_on(RewardModel(GPTConfig(**TINY), head), train, 60 if head == "mean" else 100)
    assert evaluate(model, val, "cpu")[0] > 0.9
    assert 0.5 - 4 * 0.036 < evaluate(model, shuffled(val, 0), "cpu")[0] < 0.5 + 4 * 0.036
    answers = torch.cat(rewards(model, val, "cpu"))
    model.shift.copy_(answers.mean()), model.scale.copy_(1 / answers.std())
    after = torch.cat(rewards(model, val, "cpu"))
    assert after.mean().abs() < 1e-5 and after.var().item() == pytest.approx(1, rel=1e-4)
    assert torch.equal(after.argsort(), answers.argsort())
    control = train_on(RewardModel(GPTConfig(**TINY), head), shuffled(train, 3), 40)
    assert 0.5 - 4 * 0.036 < evaluate(control, shuffled(val, 4), "cpu")[0] < 0.5 + 4 * 0.036

def test_overfit_one_batch():
    torch.manual_seed(0)
    rows = pairs(6)
    model = train_on(RewardModel(GPTConfig(**TINY)), rows, 60)
    accuracy, gap = evaluate(model, rows, "cpu")
    assert accuracy == 1 and gap.min() > 2

# data ----------------------------------------------------------------------------------------------------------------

def test_pairs_are_templated():
    pair = make_pair({"prompt": "say <|end|>", "chosen": "the dog", "rejected": "", "gap": 3}, TOK)
    special = TOK.special
    assert (pair["prompt"][0], pair["prompt"][-1]) == (special["<|user|>"], special["<|assistant|>"])
    assert TOK.decode(pair["prompt"][1:-1]) == "say <|end|>" and not set(special.values()) & set(pair["prompt"][1:-1])
    assert pair["chosen"] == [*TOK.encode("the dog"), special["<|end|>"]] and pair["rejected"] == [special["<|end|>"]]
    ids, starts, lengths = collate([pair, {"prompt": [1], "chosen": [2], "rejected": [3, 4]}])
    n = len(pair["prompt"])
    assert starts.tolist() == [n, 1, n, 1] and lengths.tolist() == [n + len(pair["chosen"]), 2, n + 1, 3]
    assert ids[3, :4].tolist() == [1, 3, 4, 0] and ids[0, :lengths[0]].tolist() == pair["prompt"] + pair["chosen"]

def test_a_round_sees_every_pair_once():
    data = [{"prompt": [i], "chosen": [END] * (1 + i % 5), "rejected": [END]} for i in range(1, 65)]
    seen = [get_batch(data, step, Config(batch_size=4))[0][:4, 0].tolist() for step in range(32)]
    first, second = sum(seen[:16], []), sum(seen[16:], [])
    assert sorted(first) == sorted(second) == list(range(1, 65)) and first != second
    assert all(len(get_batch(data[:5], step, Config(batch_size=4))[0]) >= 2 for step in range(20))  # fewer than a group

def test_sampled_pairs_follow_the_noisy_judge(monkeypatch):
    """P(the better one is preferred) = sigmoid(gap / tau), here sigmoid(2) = 0.881, within 4 standard errors."""
    ask = {"prompt": [1], "check": {"must": ["fox", "dog"]}}
    good, bad, end = TOK.encode("fox dog"), TOK.encode("the"), TOK.special["<|end|>"]
    answers = [(good, True), (bad, False), (bad, True), (bad, True)]  # a pair with a gap of 3, then a tie
    monkeypatch.setattr(train_rm, "respond", lambda model, tok, records, cfg: answers * (len(records) // 4))
    found = sample_pairs(None, TOK, [ask] * 2000, Config(), tau=1.5)
    assert len(found) == 1000 and all(p["prompt"] == [1] for p in found)
    right = sum(p["chosen"] == [*good, end] and p["rejected"] == bad and p["gap"] == 3 for p in found)
    wrong = sum(p["rejected"] == [*good, end] and p["chosen"] == bad and p["gap"] == -3 for p in found)
    assert right + wrong == 1000 and right / 1000 == pytest.approx(0.881, abs=4 * 0.0103)

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

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs and an SFT model, and each bad file that NONSENSE names. Some pairs fill the context to its last token."""
    folder = tmp_path_factory.mktemp("rm")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=TOK.vocab_size, block_size=24, n_layer=1, n_head=2, n_embd=16))
    save_checkpoint(folder / "sft.pt", kind="sft", **model.to_checkpoint(), tokenizer=TOK.state())
    save_checkpoint(folder / "kind.pt", kind="base", **model.to_checkpoint(), tokenizer=TOK.state())
    (folder / "half.pt").write_bytes((folder / "sft.pt").read_bytes()[:9000])
    full = 24 - len(make_pair({"prompt": "say", "chosen": "", "rejected": ""}, TOK)["prompt"]) - 1
    longest = "!" * next(n for n in range(99) if len(TOK.encode("!" * n)) == full)
    lines = [json.dumps({"prompt": "say", "chosen": a, "rejected": longest}) for a in ("the red fox", "the") * 20]
    lines.insert(3, json.dumps({"prompt": "say", "chosen": "the " * 90, "rejected": "dog"}))
    write = lambda name, some: (folder / name).write_text("\n".join(some))
    write("data.jsonl", lines), write("empty.jsonl", []), write("one.jsonl", lines[:1])
    write("broken.jsonl", [*lines[:4], lines[4][:-5], *lines[5:]])
    write("field.jsonl", [*lines[:6], '{"prompt": "say", "chosen": "it"}'])
    return folder

def options(folder, out, *more):
    sizes = ["--steps=12", "--batch_size=4", "--eval_every=6"]
    return [f"--data={folder}/data.jsonl", f"--init={folder}/sft.pt", f"--out={out}", *sizes, *more]

@pytest.mark.parametrize("more", [[], ["--head=last", "--bidirectional=1", "--loss=margin", "--shuffle_labels=1"]])
def test_smoke(folder, run, tmp_path, more):
    out = tmp_path / "out"
    code, said, wrong = run(tmp_path, *options(folder, out, *more))
    assert code == 0, wrong
    assert "1 of 36 pairs have over 24 tokens: left out" in said
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((out / "metrics.json").read_text())
    assert [r["step"] for r in log] == list(range(12)) and [r["step"] for r in log if "accuracy" in r] == [5, 11]
    assert metrics["accuracy"] == log[-1]["accuracy"] and metrics["steps"] == 12 and metrics["seconds"] > 0
    checkpoint = load_checkpoint(out / "rm.pt", "rm")
    model = RewardModel.load(checkpoint, **checkpoint["head"])
    answers = torch.cat(rewards(model, load_data(Config(data=f"{folder}/data.jsonl"), TOK, 24)[1], "cpu"))
    assert answers.mean().abs() < 1e-4 and answers.var().item() == pytest.approx(1, rel=1e-3)
    assert (model.head, model.bidirectional) == (("last", 1) if more else ("mean", 0))

NONSENSE = {  # name: (options, what the one line says)
    "unknown": (["--stepz=3"], "no option --stepz, did you mean --steps?"),
    "type": (["--steps=three"], "--steps wants an int, got 'three'"),
    "head": (["--head=first"], "head=first"),
    "loss": (["--loss=dpo"], "loss=dpo"),
    "missing": (["--data=nowhere.jsonl"], "there is no file nowhere.jsonl"),
    "empty": (["--data={0}/empty.jsonl"], "empty.jsonl is empty"),
    "one": (["--data={0}/one.jsonl"], "no pair is left"),
    "broken": (["--data={0}/broken.jsonl"], "broken.jsonl line 5:"),
    "field": (["--data={0}/field.jsonl"], "field.jsonl line 7: field 'rejected' is missing"),
    "no model": (["--init=nowhere.pt"], "no checkpoint at nowhere.pt"),
    "truncated": (["--init={0}/half.pt"], "half.pt is truncated or not a checkpoint"),
    "foreign": (["--init={0}/data.jsonl"], "data.jsonl is truncated or not a checkpoint"),
    "kind": (["--init={0}/kind.pt"], "kind.pt is a 'base' checkpoint, wanted is 'sft'"),
    "nan": (["--lr=1e20", "--lr_adamw=1e20"], "loss is nan at step"),
}

@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_one_line(folder, run, tmp_path, name):
    more, wanted = NONSENSE[name]
    code, _, said = run(tmp_path, *options(folder, tmp_path / "out", *(option.format(folder) for option in more)))
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and wanted in said, said
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {"log.jsonl"}
