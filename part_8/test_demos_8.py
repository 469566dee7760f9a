"""
Tests of Part 8's demos: pytest part_8/test_demos_8.py. Their mathematics against an integral, all subsets and double
precision, and a tiny run of each as a script, with checkpoints that are made here.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import itertools
import json
import math
import os
import subprocess

import pytest
import torch

import demo_details as details
import demo_kl_penalty as leash
import demo_overoptimization as over
import demo_rollout as one
import train_ppo
from model import GPT, ActorCritic, GPTConfig, RewardModel
from shared import load_checkpoint, read_jsonl, require, save_checkpoint
from tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}

def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def randomised(model, seed):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = (p.ndim == 1 and p.data.mean() > 0.5) + 0.2 * torch.randn(p.shape, generator=g)
    return model

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An SFT and a reward model, tiny and random, with a tokenizer that leaves the stories' prompts room to answer."""
    folder = tmp_path_factory.mktemp("demos")
    some = read_jsonl(require("data/stories") / "preferences.jsonl", ["prompt"])[:150]
    tok = Tokenizer.train("\n".join(r["prompt"] for r in some), 400)
    cfg = GPTConfig(vocab_size=tok.vocab_size, n_layer=1, n_head=2, n_embd=16, block_size=128)
    save_checkpoint(folder / "sft.pt", kind="sft", **randomised(GPT(cfg), 0).to_checkpoint(), tokenizer=tok.state())
    save_checkpoint(folder / "ppo.pt", kind="ppo", **randomised(ActorCritic(cfg), 1).to_checkpoint(),
                    tokenizer=tok.state())
    save_checkpoint(folder / "rm.pt", kind="rm", head={"head": "mean", "bidirectional": 0}, tokenizer=tok.state(),
                    **randomised(RewardModel(cfg), 2).to_checkpoint())
    return folder

@pytest.fixture(scope="module")
def loaded(folder):
    """-> the SFT checkpoint, the reference, the reward model, the tokenizer, held-out prompts."""
    saved, scorer = load_checkpoint(folder / "sft.pt", "sft"), load_checkpoint(folder / "rm.pt", "rm")
    tok = Tokenizer.load(saved["tokenizer"])
    val = train_ppo.load_data(train_ppo.Config(prompts=8), tok, 128)[1]
    return saved, GPT.load(saved), RewardModel.load(scorer, **scorer["head"]), tok, val

# demo_overoptimization ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, known", [(1, 0), (2, 0.193), (4, 0.636), (16, 1.835), (64, 3.175), (256, 4.549)])
def test_kl_of_best_of_n_by_an_integral(n, known):
    """The best of n has density n u^(n - 1) at the policy's quantile u: KL is the integral of n u^(n-1) log(n u^(n-1)),
    whatever the scores, if they are continuous."""
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    density = n * u ** (n - 1)
    assert over.kl_of(n) == pytest.approx(torch.special.xlogy(density, density).mean().item(), abs=1e-4)
    assert over.kl_of(n) == pytest.approx(known, abs=1e-3)

def test_ties_make_the_kl_smaller():
    """Of 3 scores, equally likely, the best of n has powers for its distribution; the formula bounds its KL."""
    for n in (2, 4, 16):
        best = [(k / 3) ** n - ((k - 1) / 3) ** n for k in (1, 2, 3)]
        exact = sum(p * math.log(3 * p) for p in best)
        assert 0 < exact < over.kl_of(n)

def test_best_of_by_all_subsets():
    proxy, gold = normal(3, 7, seed=1), normal(3, 7, seed=2)
    for n in range(1, 8):
        for row in range(3):
            subsets = [list(s) for s in itertools.combinations(range(7), n)]
            picked = [gold[row, s][proxy[row, s].argmax()].item() for s in subsets]
            assert over.best_of(n, proxy, gold)[row].item() == pytest.approx(sum(picked) / len(picked), abs=1e-5)

def test_best_of_256_has_no_overflow():
    proxy = normal(2, 256)
    curve = torch.stack([over.best_of(2 ** i, proxy, proxy) for i in range(9)])
    assert (curve.diff(dim=0) > 0).all() and torch.allclose(curve[8], proxy.max(dim=1).values)
    assert torch.allclose(curve[0], proxy.mean(dim=1), atol=1e-5)

def test_fit_finds_what_made_the_points():
    d = torch.tensor([over.kl_of(2 ** i) ** 0.5 for i in range(9)])
    a, b, r2 = over.fit(d, d * (0.3 - 0.1 * d))
    assert (a, b, r2) == (pytest.approx(0.3, abs=1e-4), pytest.approx(0.1, abs=1e-4), pytest.approx(1))
    assert over.fit(d, normal(9))[2] < 0.9

def test_finding_says_where_gold_turns_and_what_is_noise():
    """Gold over n = 1, 2, 4: one model rises, one loses the same everywhere, one now gains and now loses."""
    rise, turn = torch.tensor([[0.1, 0.2, 0.3]]).repeat(8, 1), torch.tensor([[0.1, 0.3, 0.25]]).repeat(8, 1)
    noisy = turn + torch.tensor([0, 0, 0.3]) * torch.tensor([1.0, -1.0] * 4)[:, None]
    found = {name: over.summary(gold, gold, [1, 2, 4]) for name, gold in (("A", rise), ("B", turn), ("C", noisy))}
    assert [of["best_n"] for of in found.values()] == [4, 2, 2] and found["B"]["lost"] == pytest.approx(0.05)
    assert over.finding(found) == "Gold is highest at: A n = 4; B n = 2, then -0.050;\nC n = 2, then -0.050 (noise)"

def test_a_reward_model_learns_its_pairs(loaded):
    saved, _, _, tok, _ = loaded
    pairs = [{"prompt": "Write a story.", "chosen": f"a {w} deer", "rejected": f"a {w} goat"} for w in "abcdefgh"]
    cfg = over.Config(rm_steps=25)
    torch.manual_seed(0)
    model = over.train_rm(saved, tok, pairs, cfg, "cpu")
    asked = train_ppo.encode({"instruction": "Write a story.", "input": ""}, tok)
    for word in "abxz":  # x and z it has not seen
        rewards = [model(torch.tensor([row]), torch.tensor([len(asked)]), torch.tensor([len(row)])).item() for row in
                   (asked + tok.encode(f"a {word} {animal}") + [tok.special["<|end|>"]] for animal in ("deer", "goat"))]
        assert rewards[0] > rewards[1] + 1

def test_answers_and_their_scores(loaded):
    """Row by row: an answer's length and end, its reward in the pool's standard deviations, -2 where it has no end."""
    saved, _, rm, tok, val = loaded
    torch.manual_seed(0)
    policy = GPT.load(saved)
    policy.lm_head.weight.data[tok.special["<|end|>"]] *= 3  # so that some answers end
    pool = [over.answer(policy, tok, record, 16, "cpu") for record in val[:2]]
    proxy, raw, ended = over.score(rm, pool), [], []
    for record, batch in zip(val, pool):
        assert (batch["starts"] == len(record["prompt"])).all() and ((0 <= batch["gold"]) & (batch["gold"] <= 1)).all()
        for ids, start, length in zip(batch["ids"].tolist(), batch["starts"].tolist(), batch["lengths"].tolist()):
            answer = ids[start:length]
            ended.append(tok.special["<|end|>"] in answer)
            assert ended[-1] or len(answer) == 72
            with torch.no_grad():
                raw.append(rm(torch.tensor([ids[:length]]), torch.tensor([start]), torch.tensor([length])).item())
    raw, ended = torch.tensor(raw), torch.tensor(ended)
    assert 0 < ended.sum() < 32
    wanted = ((raw - raw.mean()) / raw.std()).where(ended, torch.tensor(-2.0))
    torch.testing.assert_close(proxy.flatten(), wanted, atol=1e-4, rtol=0)

# demo_kl_penalty ------------------------------------------------------------------------------------------------------

def test_the_fit_of_rl_finds_what_made_the_points():
    d = torch.tensor([0.0, 0.3, 0.7, 1.1, 1.9, 2.4])
    gain = d * (0.3 - 0.4 * torch.where(d > 0, d, 1).log())
    assert leash.fit(d, gain) == (pytest.approx(0.3, abs=1e-4), pytest.approx(0.4, abs=1e-4), pytest.approx(1))

def test_gold_fell_only_if_it_fell_in_every_seed():
    """Two seeds, ten iterations: gold rises by 0.5 and stays, or falls again in one seed, or in both."""
    d = torch.linspace(0, 2, 10).repeat(2, 1)
    rise = (d / 2).clamp(max=0.5) + 0.2
    fall = rise - (d - 1).clamp(min=0) * 0.4
    curves = {beta: torch.stack([d, 3 * d, gold], dim=1) for beta, gold in
              ((0, fall), (0.1, torch.stack([fall[0], rise[1]])), (0.2, rise))}
    found = {beta: leash.summary(each) for beta, each in curves.items()}
    assert found[0]["kl"] == pytest.approx([4, 4]) and found[0]["score"] == pytest.approx([6, 6])
    assert found[0]["start"] == pytest.approx(0.2) and found[0.2]["best"] == found[0.2]["end"]
    never = leash.summary(torch.stack([d, 3 * d, 0.5 - 0.2 * d], dim=1))  # gold that only falls is best at its start
    assert never["best"] == pytest.approx([0.5, 0.5]) and "gold 0.50, then 0.1" in leash.finding({0: never}, 256)
    lines = leash.finding(found, 256).splitlines()
    assert [", then" in line for line in lines] == [True, False, False] and "gold 0.20 to 0.7" in lines[2]

# demo_rollout ---------------------------------------------------------------------------------------------------------

def test_exact_kl(loaded, folder):
    _, reference, _, _, val = loaded
    policy, ids = ActorCritic.load(load_checkpoint(folder / "ppo.pt", "ppo")), torch.tensor([val[0]["prompt"]])
    kl = one.exact_kl(policy, reference, ids)
    assert kl.shape == (1, ids.size(1) - 1) and (kl > 0).all()
    p, q = (model.double()(ids)[0][0, 2].softmax(dim=-1) for model in (policy, reference))
    reference.float()
    assert kl[0, 2].item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-4)
    assert one.exact_kl(reference, reference, ids).abs().max() == 0

def test_carriers_and_explained():
    assert one.carriers(torch.tensor([0.0, 6.0, 1.0, 3.0])) == 1 and one.carriers(torch.tensor([2.0, 2.0, 1.9])) == 2
    x, noise = normal(5000, seed=1), normal(5000, seed=2)
    assert one.explained(x, x) == 1 and one.explained(x, 0 * x) == pytest.approx(0)
    assert one.explained(x + noise, x) == pytest.approx(0.5, abs=0.05)

# demo_details ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, trips", [("all details", 0), ("bug: sampled at 0.7", 1), ("bug: scored one late", 1)])
def test_only_the_bugs_trip_the_ratio_check(loaded, name, trips):
    saved, reference, rm, tok, val = loaded
    cfg = details.Config(steps=1, batch_size=8)
    policy, error = details.train(name, saved, reference, rm, tok, val, cfg, 0, "cpu")
    assert (error > 1e-2) == bool(trips) and (trips or error < 1e-4)
    assert any(not torch.equal(p, saved["weights"][n]) for n, p in policy.state_dict().items() if n != "v_head.weight")

def test_finding_needs_intervals_apart():
    assert details.interval([0.2, 0.5, 0.3], 100) == (0.2, 0.5)
    assert details.interval([0.5], 100) == (pytest.approx(0.4), pytest.approx(0.6))
    found = {name: {"gold": gold, "ratio": [ratio]} for name, gold, ratio in (
        ("all details", [0.6, 0.7], 1e-6), ("no KL", [0.65, 0.8], 1e-6), ("one epoch", [0.3, 0.5], 1e-6),
        ("bug: late", [0.1, 0.2], 2.0))}
    assert details.finding(found, 100) == "Gold 0.65; changed: one epoch 0.40\nThe ratio check stops: bug: late"

# the scripts ----------------------------------------------------------------------------------------------------------

TINY = {
    "demo_rollout": ["--init={0}/ppo.pt", "--sft={0}/sft.pt", "--rm={0}/rm.pt", "--prompts=4", "--show=2"],
    "demo_details": ["--init={0}/sft.pt", "--rm={0}/rm.pt", "--steps=1", "--batch_size=4", "--prompts=4", "--seeds=2"],
    "demo_overoptimization": ["--init={0}/sft.pt", "--pairs=8,40", "--rm_steps=1", "--prompts=2", "--samples=8"],
    "demo_kl_penalty": ["--init={0}/sft.pt", "--pairs=9", "--rm_steps=1", "--betas=0.5", "--steps=2",
                        "--batch_size=4"],
}

@pytest.mark.parametrize("name", TINY)
def test_smoke(folder, tmp_path, name):
    command = [sys.executable, str(FOLDER / f"{name}.py"), f"--out={tmp_path}", *(x.format(folder) for x in TINY[name])]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    if name == "demo_rollout":
        assert found["reward"] == pytest.approx(found["score"] - 0.05 * found["kl_paid"]) and 0 < found["tokens"] <= 72
    elif name == "demo_details":
        assert all(len(found[f"{variant}: gold"]) == 2 for variant in details.VARIANTS)
        assert min(found["bug: sampled at 0.7: ratio"]) > 1e-2 and max(found["one epoch: ratio"]) < 1e-4
    elif name == "demo_kl_penalty":
        first, last = read_jsonl(tmp_path / "demo_kl_penalty.ppo.0.5.0" / "log.jsonl", ["gold", "beta"])
        assert found["beta 0.5: start"] == pytest.approx(first["gold"])  # SFT's own answers
        assert found["beta 0.5: kl"] == pytest.approx([max(last["kl"], 0)], abs=1e-6) and last["beta"] == 0.5
        assert found["beta 0.5: score"] == pytest.approx([last["reward"]])
    else:
        score = found["40 pairs: score"]
        assert found["n"] == [1, 2, 4, 8] and sorted(score) == score and len(found["8 pairs: gold"]) == 4
