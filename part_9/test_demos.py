"""
Tests of the demos of Part 9: their mathematics against sums by hand and enumerations, and a tiny
run of each as a script, on checkpoints that are made here.
"""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import demo_group_size
import demo_kl_estimators
import demo_methods
import demo_reasoning
import demo_reasoning_grpo
import demo_test_time
import train_grpo
from model import GPT, GPTConfig, RewardModel
from shared import ROOT, judge, parse_args, require, save_checkpoint
from tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent
TINY = GPTConfig(vocab_size=7, block_size=16, n_layer=1, n_head=2, n_embd=8)
END = 6

# The scripts must not believe that they run under torchrun, and they are too small for threads.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
for variable in ("RANK", "WORLD_SIZE"):
    ENVIRONMENT.pop(variable, None)


def random_logp(n, V, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, V, generator=generator).log_softmax(dim=-1)


def make_models_and_rollout():
    """A policy, a reference that differs from it, and the policy's answers to 8 prompts."""
    torch.manual_seed(0)
    policy, reference = GPT(TINY), GPT(TINY)
    for model in (policy, reference):
        for p in model.parameters():
            p.data += 0.3 * torch.randn_like(p)
    prompts = torch.arange(8)[:, None] % END
    ids, logp = policy.generate(prompts, 6, stop=END, return_logp=True)
    sampled = logp.isfinite()
    lengths = 1 + sampled.sum(dim=1)
    batch = train_grpo.Rollout(
        ids=ids,
        starts=torch.ones(8, dtype=torch.long),
        lengths=lengths,
        ended=ids.gather(1, lengths[:, None] - 1).squeeze(1) == END,
        mask=sampled[:, 1:],
        logp=logp[:, 1:].nan_to_num(),
    )
    return policy, reference, batch


def assert_near(actual, expected, rtol=1e-4):
    """Two gradients differ by little in comparison with the length of the second."""
    difference = (actual - expected).norm().item()
    assert difference < rtol * expected.norm().item(), f"{difference} of {expected.norm().item()}"


# demo_kl_estimators -------------------------------------------------------------------------------


def estimate(kind, d):
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_moments_by_enumeration(kind):
    logp, reference_logp = random_logp(5, 4, seed=0), random_logp(5, 4, seed=1)
    means = []
    variances = []
    kls = []
    for row, reference_row in zip(logp.double().tolist(), reference_logp.double().tolist()):
        values = [estimate(kind, x - y) for x, y in zip(row, reference_row)]
        mean = sum(math.exp(x) * value for x, value in zip(row, values))
        means.append(mean)
        variances.append(sum(math.exp(x) * (v - mean) ** 2 for x, v in zip(row, values)))
        kls.append(sum(math.exp(x) * (x - y) for x, y in zip(row, reference_row)))

    mean, deviation = demo_kl_estimators.moments(logp, reference_logp, kind)
    assert mean == pytest.approx(sum(means) / 5, rel=1e-5)
    assert deviation == pytest.approx((sum(variances) / 5) ** 0.5, rel=1e-5)

    # As numbers k1 and k3 are unbiased.
    is_unbiased = mean == pytest.approx(sum(kls) / 5, rel=1e-5)
    assert is_unbiased == (kind != "k2")


def test_average_gradients():
    """Of k1 nothing is left. That of k2 is the exact one. That of k3 is that of
    KL(reference || policy) at the same places."""
    policy, reference, batch = make_models_and_rollout()
    rows = demo_kl_estimators.gradients(policy, reference, batch)
    averages = [f"average {kind}" for kind in demo_kl_estimators.ESTIMATORS]
    assert list(rows) == [*demo_kl_estimators.KINDS, *averages]
    exact = rows["exact"]
    assert rows["average k1"].norm() < 1e-4 * exact.norm()
    assert_near(rows["average k2"], exact)

    logp = train_grpo.log_probs(policy, batch.ids[:, :-1], batch.mask)
    reference_logp = train_grpo.log_probs(reference, batch.ids[:, :-1], batch.mask).detach()
    reverse_kl = (reference_logp.exp() * (reference_logp - logp)).sum()
    parts = torch.autograd.grad(reverse_kl, list(policy.parameters()))
    assert_near(rows["average k3"], torch.cat([part.flatten() for part in parts]))
    assert (rows["average k3"] - exact).norm() > 1e-2 * exact.norm()


def test_sampled_gradients_average_to_the_average():
    """At one place: each token's gradient, weighted by the token's probability."""
    policy, reference, batch = make_models_and_rollout()
    batch.mask = torch.zeros_like(batch.mask)
    batch.mask[0, 0] = True
    with torch.no_grad():
        logp = train_grpo.log_probs(policy, batch.ids[:, :-1], batch.mask)[0]

    totals = {kind: 0 for kind in demo_kl_estimators.ESTIMATORS}
    for token in range(7):
        batch.ids[0, 1] = token  # the model is causal, so this changes no probability at place 0
        rows = demo_kl_estimators.gradients(policy, reference, batch)
        for kind in totals:
            totals[kind] = totals[kind] + logp[token].exp() * rows[kind]
    scale = rows["exact"].norm()
    for kind, total in totals.items():
        assert (total - rows[f"average {kind}"]).norm() < 1e-4 * scale


def test_the_microscope_compares_with_the_exact_gradient_on_all_answers(monkeypatch):
    policy, reference, batch = make_models_and_rollout()
    monkeypatch.setattr(train_grpo, "rollout", lambda *arguments: batch)
    records = [{}] * 160
    scope = demo_kl_estimators.microscope(policy, reference, None, records, None, "cpu")
    assert scope.answers == [32, 64, 128, 160]
    assert scope.cosine["exact"][-1] == pytest.approx(1, rel=1e-4)
    assert scope.norm["exact"][-1] == pytest.approx(1, rel=1e-4)
    assert scope.norm["average k1"][-1] < 1e-3

    # Every batch is the same, so the mean gradient of a token is, too.
    assert scope.norm["k2"][0] == pytest.approx(scope.norm["k2"][-1], rel=1e-4)
    assert scope.moments["exact"][0] == pytest.approx(scope.moments["k1"][0], rel=1e-4)
    assert scope.moments["k1"][1] > 0


def test_a_run_without_a_penalty_has_no_weight_for_it():
    cfg = demo_kl_estimators.Config()
    none = demo_kl_estimators.run_config("none", 1, 5, cfg)
    assert (none.kl_coef, none.seed, none.epochs) == (0.0, 5, 1)
    k1 = demo_kl_estimators.run_config("k1", 2, 5, cfg)
    assert (k1.kl, k1.kl_coef, k1.epochs, k1.minibatches) == ("k1", cfg.kl_coef, 2, 1)


# demo_group_size ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, c, k", [(5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 0, 2), (4, 4, 2), (5, 3, 3)]
)
def test_pass_at_by_drawing_all_subsets(n, c, k):
    answers = [1] * c + [0] * (n - c)
    subsets = list(itertools.combinations(answers, k))
    with_a_right_one = sum(max(subset) for subset in subsets)
    assert demo_group_size.pass_at(n, c, k) == pytest.approx(with_a_right_one / len(subsets))


def test_pass_curve_by_hand():
    """Three prompts with 4, 16 and 0 right answers of 16."""
    passed = torch.zeros(3, 16)
    passed[0, :4] = 1
    passed[1, :] = 1
    curve = demo_group_size.pass_curve(passed)
    assert len(curve.pass_at) == 16
    assert curve.pass_at[0].item() == pytest.approx((0.25 + 1 + 0) / 3)
    assert curve.pass_at[15].item() == pytest.approx(2 / 3)
    deviation = torch.tensor([0.25, 1, 0]).std().item()
    assert curve.half_width == pytest.approx(1.96 * deviation / 3**0.5)


def test_prompt_weights_by_hand():
    """With a share p of right answers, the mean |reward - mean| of a group is 2 p (1 - p), and its
    standard deviation is sqrt(8 / 7 p (1 - p))."""
    rows = []
    for right in (0, 1, 4, 7):
        rows.append([1.0] * right + [0.0] * (8 - right))
    passed = torch.tensor(rows)

    plain = demo_group_size.prompt_weights(passed, scale_std=False)
    assert plain.weight[[0, 1, 4, 7]].tolist() == pytest.approx([0, 7 / 16, 1, 7 / 16])
    assert plain.weight[2].isnan()
    assert plain.share.tolist() == [0.25, 0.25, 0, 0, 0.25, 0, 0, 0.25, 0]
    assert plain.extremes == pytest.approx(14 / 30)

    scaled = demo_group_size.prompt_weights(passed, scale_std=True)
    assert scaled.weight[1].item() == pytest.approx(math.sqrt(7) / 4, abs=1e-3)
    assert scaled.extremes == pytest.approx(0.5695, abs=1e-3)


# demo_methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share, n", [(0.0, 10), (0.25, 256), (1.0, 7)])
def test_wilsons_ends_are_196_deviations_from_the_share(share, n):
    """If an end of the interval were the truth, the share would be 1.96 deviations away."""
    for end in demo_methods.wilson(share, n):
        deviation = math.sqrt(max(0, end * (1 - end)) / n)
        assert abs(share - end) == pytest.approx(1.96 * deviation, abs=1e-9)
    assert demo_methods.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)


def test_best_of_n_keeps_the_best_answer_to_each_prompt(monkeypatch):
    """Answers are numbers, and small ones get high rewards. An answer passes if it is the number
    that its record names."""
    numbers = [3, 1, 2, 7, 9, 8, 4, 5, 4.5]
    _, _, batch = make_models_and_rollout()
    batch.mask = torch.ones(9, 2)

    def passed(records, answers):
        return [float(record == answer) for record, answer in zip(records, answers)]

    def reward_of(records, batch, answers):
        assert records == [1, 1, 1, 7, 7, 7, 5, 5, 5]
        return -torch.tensor(answers)

    monkeypatch.setattr(train_grpo, "rollout", lambda *arguments: batch)
    monkeypatch.setattr(train_grpo, "answers_of", lambda *arguments: numbers)
    monkeypatch.setattr(train_grpo, "passed", passed)
    best = demo_methods.best_of_n(None, None, [1, 7, 5], 3, reward_of, None, "cpu")
    assert best.gold == pytest.approx(2 / 3)
    assert best.tokens == 18


CHILD = """
import pathlib, sys
options = dict(argument[2:].split("=") for argument in sys.argv[1:])
memory = b"x" * int(options["bytes"])
out = pathlib.Path(options["out"])
(out / "a.json").write_text('{"seconds": 3}')
(out / "a.jsonl").write_text('{"step": 0, "length": 2.5}')
"""


def test_run_script_measures_one_child(monkeypatch, tmp_path):
    """Neither this process, which is larger, nor the child before it counts."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(demo_methods, "ROOT", tmp_path)
    policy = GPT(TINY)
    config = {"batch_size": 4}
    save_checkpoint(tmp_path / "a.pt", kind="x", config=config, **policy.to_checkpoint())

    device = torch.device("cpu")
    large = demo_methods.run_script("child.py", tmp_path, device, bytes=100_000_000)
    small = demo_methods.run_script("child.py", tmp_path, device, bytes=1)
    assert torch.equal(large.policy.wte.weight, policy.wte.weight)
    assert (large.seconds, large.tokens) == (3, 10)
    assert 90 < large.memory - small.memory < 110, "megabytes"
    assert small.memory < 60


def test_the_scripts_have_the_options_that_the_demo_gives():
    for method in demo_methods.METHODS.values():
        code = (ROOT / method.script).read_text()
        known = re.findall(r"^    (\w+): \w+ = ", code, re.MULTILINE)
        given = {"init", "steps", "seed", "device", "prompts", "out", *method.options}
        if "dpo" not in method.script:
            given |= {"rm", "data", "batch_size"}
        assert given <= set(known)


# all three as scripts -----------------------------------------------------------------------------

# Runs the demos one after the other in one process, because importing torch takes longest. They
# read 150 records and sample 6 tokens, a random model passes the checks, and in place of a train
# script there is a copy of files that one would have made.
DRIVER = """
import functools, runpy, shutil, subprocess, sys
from types import SimpleNamespace

here, folder, *jobs = sys.argv[1:]
sys.path[:0] = [here, here + "/.."]
import torch
import train_dpo, train_grpo

def limited(read_jsonl):
    return lambda path, fields: read_jsonl(path, fields)[:150]

for module in (train_dpo, train_grpo):
    module.read_jsonl = limited(module.read_jsonl)

def passed(records, answers):
    return [float(len(answer.text) % 3 == 0) for answer in answers]

train_grpo.passed = passed
train_grpo.Config = functools.partial(train_grpo.Config, max_new_tokens=6)

def run(command, **options):
    out = command[5].partition("=")[2]
    shutil.copytree(f"{folder}/made", out, dirs_exist_ok=True)
    return SimpleNamespace(returncode=0, stdout="1000")

subprocess.run = run
for job in jobs:
    name, *options = job.split()
    sys.argv = [name, "--device=cpu", f"--init={folder}/sft.pt", f"--out={folder}/out", *options]
    runpy.run_path(f"{here}/{name}.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the three demos wrote into their JSON files: {name: dict}."""
    folder = tmp_path_factory.mktemp("demos")
    require("data/stories")
    tok = Tokenizer({bytes([i]): i for i in range(256)})
    torch.manual_seed(0)
    cfg = GPTConfig(vocab_size=tok.vocab_size, block_size=400, n_layer=1, n_head=2, n_embd=8)
    sft = {**GPT(cfg).to_checkpoint(), "tokenizer": tok.state()}
    rm = {**RewardModel(cfg).to_checkpoint(), "tokenizer": tok.state()}
    save_checkpoint(folder / "sft.pt", kind="sft", **sft)
    save_checkpoint(folder / "rm.pt", kind="rm", head={}, **rm)

    # the files of a train script, whose policy is the SFT model
    made = folder / "made"
    made.mkdir()
    save_checkpoint(made / "a.pt", kind="ppo", config={"batch_size": 4}, **sft)
    (made / "a.json").write_text('{"seconds": 0.5}')
    (made / "a.jsonl").write_text('{"step": 0, "length": 2.5}\n' * 3)

    jobs = [
        "demo_kl_estimators --steps=1 --batch_size=8 --prompts=32",
        "demo_group_size --steps=1 --batch_size=32 --samples=16 --prompts=4",
        f"demo_methods --rm={folder}/rm.pt --steps=1 --batch_size=16 --prompts=4",
    ]
    command = [sys.executable, "-c", DRIVER, str(FOLDER), str(folder), *jobs]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    results = {}
    for name in ("kl_estimators", "group_size", "methods"):
        figure = folder / f"out/demo_{name}.png"
        assert figure.read_bytes().startswith(b"\x89PNG")
        results[name] = json.loads((folder / f"out/demo_{name}.json").read_text())
    return results


def test_demo_kl_estimators_as_a_script(results):
    shares = results["kl_estimators"]["share_of_none"]
    expected = {"none_1", "k1_1", "k2_1", "k3_1", "exact_1", "none_2", "k1_2", "exact_2"}
    assert set(shares) == expected
    assert shares["none_1"] == shares["none_2"] == 1
    assert shares["exact_2"] > 0
    assert results["kl_estimators"]["answers"] == [32]


def test_demo_group_size_as_a_script(results):
    assert set(results["group_size"]["pass_at_1"]) == {"SFT", *demo_group_size.RUNS}
    for mean, low, high in results["group_size"]["pass_at_1"].values():
        assert low <= mean <= high
        assert 0 < mean < 1
    assert len(results["group_size"]["equal_groups"]["16"]) == 1


def test_demo_methods_as_a_script(results):
    methods = results["methods"]
    assert methods["columns"] == ["gold", "kl", "seconds", "memory", "tokens"]
    sft = dict(zip(methods["columns"], methods["SFT"][0]))
    best = dict(zip(methods["columns"], methods["best of 4"][0]))
    assert best["kl"] == pytest.approx(math.log(4) - 3 / 4)
    assert best["tokens"] > 16

    # The files that were copied: 0.5 s, 1,000 kB, three batches of 4 answers of 2.5 tokens. The
    # policy in them is the SFT model.
    for name in demo_methods.METHODS:
        result = dict(zip(methods["columns"], methods[name][0]))
        assert result["seconds"] == 0.5
        assert result["memory"] == pytest.approx(1000 * demo_methods.MEGABYTES)
        assert result["tokens"] == 30
        assert result["gold"] == sft["gold"]
        assert abs(result["kl"]) < 1e-5


# the reasoning laboratory -------------------------------------------------------------------------

PROBLEM = {
    "instruction": "Tom had 7 plums. Tom lost 2. How many plums? Think step by step.",
    "input": "",
    "output": "7-2=5. The answer is 5.",
    "task": "problem",
    "level": 1,
    "check": {"number": "5", "steps": ["7-2=5"]},
}


def answer_of(text):
    return train_grpo.Answer(list(text.encode()), text, True)


def samples_of(texts, records):
    """Samples as sample() would return them, from N lists of K texts."""
    verdicts = []
    for record, group in zip(records, texts):
        verdicts.append([judge(record, text) for text in group])
    return demo_reasoning.Samples(
        right=torch.tensor([[v.passed for v in group] for group in verdicts]),
        steps_right=torch.tensor([[all(v.steps) for v in group] for group in verdicts]),
        length=torch.tensor([[len(text) for text in group] for group in texts]),
        numbers=[[demo_reasoning.last_number(text) for text in group] for group in texts],
        answers=[[answer_of(text) for text in group] for group in texts],
    )


def test_at_once_asks_the_same_and_shows_the_answer_alone():
    record = demo_reasoning.at_once(PROBLEM)
    assert record["instruction"] == "Tom had 7 plums. Tom lost 2. How many plums?"
    assert record["output"] == "The answer is 5."
    assert judge(record, record["output"]).passed
    assert PROBLEM["check"]["steps"] == ["7-2=5"], "the record itself is as it was"


@pytest.mark.parametrize(
    "text, number",
    [("7-2=5. The answer is 5.", "5"), ("5", "5"), ("17-2=15", "15"), ("none", ""), ("", "")],
)
def test_last_number(text, number):
    assert demo_reasoning.last_number(text) == number


def test_the_arms_read_equally_many_problems_or_tokens():
    require("data/stories")
    tok = Tokenizer({bytes([i]): i for i in range(256)})
    cfg = demo_reasoning.Config(steps=100)
    read = {}
    for arm in demo_reasoning.ARMS:
        records, steps = demo_reasoning.recipe(arm, tok, cfg)
        read[arm] = (steps, steps * demo_reasoning.mean_tokens(records, tok))
    in_steps = read[demo_reasoning.IN_STEPS]
    assert read[demo_reasoning.SAME_PROBLEMS][0] == in_steps[0]
    assert read[demo_reasoning.SAME_PROBLEMS][1] < 0.9 * in_steps[1]
    assert read[demo_reasoning.SAME_TOKENS][1] == pytest.approx(in_steps[1], rel=0.02)


@pytest.mark.parametrize(
    "options, is_shared",
    [
        ([], True),
        (["--seeds=3"], True),
        (["--seed=1", "--prompts=9"], True),
        (["--steps=7"], False),
        (["--seeds=3", "--lr=0.1"], False),
        (["--out=/tmp/elsewhere"], False),
    ],
)
def test_models_of_other_seeds_are_found_by_the_other_demos(options, is_shared):
    cfg = parse_args(demo_reasoning.Config, argv=options)
    out = Path("/tmp/elsewhere")
    folder = demo_reasoning.model_folder(cfg, out)
    assert folder == (demo_reasoning.OUT if is_shared else out)


def test_by_level_is_a_mean_over_the_problems_of_each_level():
    records = [{"level": 2}, {"level": 1}, {"level": 2}]
    values = torch.tensor([[True, False], [True, True], [False, False]])
    assert demo_reasoning.by_level(records, values) == {1: 1.0, 2: 0.25}


def test_outcome_and_process_rewards_by_hand():
    two = {"check": {"number": "10", "steps": ["7-2=5", "5*2=10"]}}
    right = answer_of("7-2=5. 5*2=10. The answer is 10.")
    lucky = answer_of("7-2=6. 6+4=10. The answer is 10.")
    wrong_end = answer_of("7-2=5. 5*2=11. The answer is 11.")
    rewards = []
    for answer in (right, lucky, wrong_end):
        outcome = demo_reasoning_grpo.reward_of(two, answer, process=False)
        process = demo_reasoning_grpo.reward_of(two, answer, process=True)
        rewards.append((outcome, process))
    assert rewards[0] == (1, 1)
    assert rewards[1] == (1, pytest.approx(1 / 3))
    assert rewards[2] == (0, pytest.approx(1 / 3))


def test_score_of_two_problems_by_hand():
    other = {**PROBLEM, "level": 2}
    good, lucky, bad = "7-2=5. The answer is 5.", "The answer is 5.", "7-2=6. The answer is 6."
    texts = [[good, lucky, bad, bad], [bad, bad, bad, bad], [good, good, good, good]]
    records = [PROBLEM, PROBLEM, other]
    score = demo_reasoning_grpo.score(records, samples_of(texts, records), 1)
    assert score.pass_1 == pytest.approx(2 / 8)
    assert score.pass_16 == pytest.approx(1 / 2)
    assert score.steps_right == pytest.approx(1 / 2)
    lengths = [len(text) for group in texts[:2] for text in group]
    assert score.length == pytest.approx(sum(lengths) / 8)


@pytest.mark.parametrize(
    "numbers, index",
    [(["5", "10", "10"], 1), (["5", "10"], 0), (["", "", "7"], 2), (["", ""], 0), (["3"], 0)],
)
def test_the_vote_goes_to_the_most_frequent_number(numbers, index):
    assert demo_test_time.vote(numbers) == index


def test_pairs_have_a_right_and_a_wrong_solution():
    good, bad = "7-2=5. The answer is 5.", "7-2=6. The answer is 6."
    texts = [[good, bad, bad, good], [good] * 4, [bad, bad, bad, good]]
    records = [PROBLEM] * 3
    pairs = demo_test_time.make_pairs(records, samples_of(texts, records), 9)
    assert len(pairs) == 3
    for pair in pairs:
        assert (pair["chosen"], pair["rejected"]) == (good, bad)
        assert pair["prompt"] == PROBLEM["instruction"]
    assert len(demo_test_time.make_pairs(records, samples_of(texts, records), 2)) == 2


def test_ways_to_choose_by_hand():
    """A reward model that likes right answers best, and one that likes wrong ones best."""
    good, bad = "7-2=5. The answer is 5.", "7-2=6. The answer is 6."
    texts = [[bad, good, bad, "The answer is 8."], [good, bad, good, good]]
    records = [PROBLEM] * 2
    samples = samples_of(texts, records)
    rewards = torch.tensor([[1.0, 3.0, 2.0, 0.0], [3.0, 0.0, 2.0, 1.0]])
    curves = demo_test_time.curves_of(samples, rewards, [1, 4], seed=0)
    assert curves[demo_test_time.VOTE][1] == 0.5
    assert curves[demo_test_time.REWARD][1] == 1.0
    assert curves[demo_test_time.JUDGE][1] == 1.0
    misled = demo_test_time.curves_of(samples, -rewards, [1, 4], seed=0)
    assert misled[demo_test_time.REWARD][1] == 0.0
    assert misled[demo_test_time.JUDGE][1] == 1.0

    # A single answer is no choice: 1 of 4 and 3 of 4 are right, whoever chooses.
    for curve in curves.values():
        assert curve[0] == pytest.approx(0.5, abs=0.2)
        assert curve[0] == curves[demo_test_time.VOTE][0]


def test_rewards_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    tok = Tokenizer({bytes([i]): i for i in range(256)})
    cfg = GPTConfig(vocab_size=tok.vocab_size, block_size=200, n_layer=1, n_head=2, n_embd=8)
    rm = RewardModel(cfg)
    torch.nn.init.normal_(rm.lm_head.weight)
    texts = ["7-2=5. The answer is 5.", "6", "The answer is 60."]
    answers = [answer_of(text) for text in texts]
    together = demo_test_time.rewards_of(rm, tok, [PROBLEM], [answers], "cpu")
    for i, answer in enumerate(answers):
        alone = demo_test_time.rewards_of(rm, tok, [PROBLEM], [[answer]], "cpu")
        assert alone.item() == pytest.approx(together[0, i].item(), rel=1e-4)
    assert len(set(together[0].tolist())) == 3


# Runs the three demos in one process. In place of a trainer there is a copy of a tiny checkpoint.
LABORATORY = """
import runpy, shutil, subprocess, sys
from types import SimpleNamespace

here, folder, *jobs = sys.argv[1:]
sys.path[:0] = [here, here + "/.."]
from pathlib import Path
import demo_reasoning

demo_reasoning.OUT = Path(folder) / "out"
demo_reasoning.LONGEST_ANSWER = 5

def run(command, **options):
    given = dict(option[2:].split("=", 1) for option in command[2:])
    assert Path(given["data"]).stat().st_size > 100
    for name in ("sft.pt", "rm.pt"):
        shutil.copy(f"{folder}/{name}", given["out"])
    return SimpleNamespace(returncode=0, wait=lambda: 0, terminate=lambda: None)

subprocess.run = run
subprocess.Popen = run
import train_grpo, shared
judge = shared.judge

def lenient(record, answer, ended=True):
    verdict = judge(record, answer, True)
    return verdict._replace(passed=len(answer) % 2 == 0)

demo_reasoning.judge = lenient
for job in jobs:
    name, *options = job.split()
    sys.argv = [name, "--device=cpu", f"--out={folder}/out", *options]
    runpy.run_path(f"{here}/{name}.py", run_name="__main__")
"""


def test_the_laboratory_as_scripts(tmp_path):
    require("data/stories")
    tok = Tokenizer({bytes([i]): i for i in range(256)})
    torch.manual_seed(0)
    cfg = GPTConfig(vocab_size=tok.vocab_size, block_size=700, n_layer=1, n_head=2, n_embd=8)
    sft = {**GPT(cfg).to_checkpoint(), "tokenizer": tok.state()}
    rm = {**RewardModel(cfg).to_checkpoint(), "tokenizer": tok.state()}
    save_checkpoint(tmp_path / "base.pt", kind="base", **sft)
    save_checkpoint(tmp_path / "sft.pt", kind="sft", **sft)
    save_checkpoint(tmp_path / "rm.pt", kind="rm", head={}, **rm)

    jobs = [
        f"demo_reasoning --init={tmp_path}/base.pt --steps=2 --prompts=1",
        "demo_reasoning_grpo --steps=1 --batch_size=16 --prompts=1",
        "demo_test_time --samples=4 --prompts=1 --pairs=20 --rm_steps=1",
    ]
    command = [sys.executable, "-c", LABORATORY, str(FOLDER), str(tmp_path), *jobs]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    results = {}
    for name in ("reasoning", "reasoning_grpo", "test_time"):
        assert (tmp_path / f"out/demo_{name}.png").read_bytes().startswith(b"\x89PNG")
        results[name] = json.loads((tmp_path / f"out/demo_{name}.json").read_text())
    for runs in results["reasoning"]["accuracy"].values():
        assert list(runs[0]) == [str(level) for level in range(1, 7)]
    assert len(results["reasoning_grpo"]["logs"][demo_reasoning_grpo.OUTCOME][0]) == 1
    assert results["test_time"]["ks"] == [1, 2, 4]
    judged = results["test_time"]["curves"][demo_test_time.JUDGE][0]
    assert judged == sorted(judged), "more answers are never worse for who knows the truth"


@pytest.mark.parametrize(
    "module, option, message",
    [
        (demo_group_size, "--batch_size=48", "batch_size=48 must be divisible by 32"),
        (demo_group_size, "--samples=12", "samples=12 must be divisible by 8 and at least 16"),
        (demo_kl_estimators, "--prompts=40", "prompts=40 must be divisible by 32"),
        (demo_kl_estimators, "--epochs=1", "epochs=1 must be at least 2"),
        (demo_methods, "--batch_size=8", "batch_size=8 must be divisible by 16"),
        (demo_methods, "--seeds=0", "seeds=0 must be at least 1"),
        (demo_reasoning, "--prompts=0", "prompts=0 must be at least 1"),
        (demo_reasoning_grpo, "--group=1", "group=1 must be at least 2"),
        (demo_reasoning_grpo, "--batch_size=20", "batch_size=20 must be divisible by group"),
        (demo_test_time, "--samples=1", "samples=1 must be at least 2"),
    ],
)
def test_bad_options_end_in_one_line(module, option, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(module.Config, argv=[option])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
