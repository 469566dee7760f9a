"""
Tests of Part 8's demos: their mathematics against an integral, all subsets and loops, and a tiny
run of each script, with checkpoints that are made here.
"""

import itertools
import json
import math
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
import torch

import demo_critics
import demo_details
import demo_kl_penalty
import demo_overoptimization
import demo_rollout
import train_ppo
from model import GPT, ActorCritic, GPTConfig, RewardModel
from shared import load_checkpoint, parse_args, read_jsonl, read_log, save_checkpoint
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
TOK = Tokenizer({bytes([i]): i for i in range(256)})
END = TOK.special["<|end|>"]


def randomised(model, seed):
    """The model with random parameters, and gains near 1."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = 0.2 * torch.randn(p.shape, generator=generator)
        is_gain = p.ndim == 1 and p.data.mean() > 0.5
        p.data = 1 + noise if is_gain else noise
    return model


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_near(actual, expected, rtol=1e-4):
    """Equal up to rounding, which grows with the size of the numbers."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random SFT model, policy and reward model. Their tokens are bytes, and a story's
    prompt and answer fit in 360 of them."""
    folder = tmp_path_factory.mktemp("demos")
    cfg = GPTConfig(vocab_size=TOK.vocab_size, block_size=360, n_layer=1, n_head=2, n_embd=16)
    tokenizer = TOK.state()
    for kind, model in (("sft", GPT(cfg)), ("ppo", ActorCritic(cfg))):
        model = randomised(model, seed=len(kind) + ord(kind[0]))
        model.lm_head.weight.data[END] *= 4  # some answers end, others do not
        save_checkpoint(
            folder / f"{kind}.pt", kind=kind, tokenizer=tokenizer, **model.to_checkpoint()
        )
    rm = randomised(RewardModel(cfg, "mean"), seed=2)
    head = {"head": "mean", "bidirectional": False}
    save_checkpoint(
        folder / "rm.pt", kind="rm", tokenizer=tokenizer, head=head, **rm.to_checkpoint()
    )
    return folder


@pytest.fixture(scope="module")
def sft(folder):
    return load_checkpoint(folder / "sft.pt", "sft")


@pytest.fixture(scope="module")
def reference(sft):
    return GPT.load(sft)


@pytest.fixture(scope="module")
def rm(folder):
    checkpoint = load_checkpoint(folder / "rm.pt", "rm")
    return RewardModel.load(checkpoint, **checkpoint["head"])


@pytest.fixture(scope="module")
def val():
    """8 held-out stories."""
    _, val = train_ppo.load_data(train_ppo.Config())
    return train_ppo.encode_records(val, TOK, 360, 72)[:8]


@pytest.fixture
def run_script(monkeypatch):
    """run_script(name, options) runs a script in this process, because importing torch takes
    seconds."""
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def run_script(name, *options):
        script = str(HERE / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [script, "--device=cpu", *options])
        runpy.run_path(script, run_name="__main__")

    yield run_script
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def run_demo(run_script, tmp_path):
    """run_demo(name, options) -> the numbers that the demo wrote."""

    def run_demo(name, *options):
        run_script(name, f"--out={tmp_path}", *options)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        return json.loads((tmp_path / f"{name}.json").read_text())

    return run_demo


# demo_overoptimization.py -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, known", [(1, 0), (2, 0.193), (4, 0.636), (16, 1.835), (64, 3.175), (256, 4.549)]
)
def test_the_kl_of_best_of_n_by_an_integral(n, known):
    """The best of n has density n u^(n-1) at the policy's quantile u. So the KL is the integral of
    density times log density, whatever the scores, as long as there are no ties."""
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    density = n * u ** (n - 1)
    integral = torch.special.xlogy(density, density).mean().item()
    assert demo_overoptimization.best_of_n_kl(n) == pytest.approx(integral, abs=1e-4)
    assert demo_overoptimization.best_of_n_kl(n) == pytest.approx(known, abs=1e-3)


def test_ties_make_the_kl_smaller():
    """With 3 equally likely scores, the best of n is at most score k with probability (k/3)^n."""
    for n in (2, 4, 16):
        probabilities = [(k / 3) ** n - ((k - 1) / 3) ** n for k in (1, 2, 3)]
        kl = sum(p * math.log(3 * p) for p in probabilities)
        assert 0 < kl < demo_overoptimization.best_of_n_kl(n)


def test_best_of_n_by_all_subsets():
    score = normal(3, 7, seed=1)
    gold = normal(3, 7, seed=2)
    for n in range(1, 8):
        actual = demo_overoptimization.best_of(n, score, gold)
        expected = []
        for row in range(3):
            picked = []
            for subset in itertools.combinations(range(7), n):
                best = max(subset, key=lambda i: score[row, i].item())
                picked.append(gold[row, best].item())
            expected.append(sum(picked) / len(picked))
        assert_near(actual, torch.tensor(expected))


def test_best_of_256_has_no_overflow():
    score = normal(2, 256)
    curve = torch.stack([demo_overoptimization.best_of(2**i, score, score) for i in range(9)])
    assert (curve.diff(dim=0) > 0).all()
    assert_near(curve[8], score.max(dim=1).values)
    assert (curve[0] - score.mean(dim=1)).abs().max() < 1e-5


def test_the_fit_finds_the_curve_of_the_points():
    d = torch.tensor([demo_overoptimization.best_of_n_kl(2**i) ** 0.5 for i in range(9)])
    curve = demo_overoptimization.fit(d, d * (0.3 - 0.1 * d))
    assert curve.a == pytest.approx(0.3, abs=1e-4)
    assert curve.b == pytest.approx(0.1, abs=1e-4)
    assert curve.r2 == pytest.approx(1, abs=1e-5)
    assert demo_overoptimization.fit(d, normal(9)).r2 < 0.9


def test_the_title_says_where_gold_turns_and_what_is_noise():
    """Gold over n = 1, 2, 4 of 8 prompts. It rises, it loses the same for every prompt, or it loses
    for some prompts and gains for others."""
    rises = torch.tensor([[0.1, 0.2, 0.3]]).repeat(8, 1)
    turns = torch.tensor([[0.1, 0.3, 0.25]]).repeat(8, 1)
    signs = torch.tensor([1.0, -1.0] * 4)[:, None]
    noisy = turns + torch.tensor([0, 0, 0.3]) * signs
    summaries = {}
    for name, gold in (("A", rises), ("B", turns), ("C", noisy)):
        summaries[name] = demo_overoptimization.summarize(gold, gold, [1, 2, 4])
    assert [summary.best_n for summary in summaries.values()] == [4, 2, 2]
    assert summaries["B"].lost == pytest.approx(0.05)
    title = demo_overoptimization.make_title(summaries)
    expected = "Gold is highest at\nA: n = 4; B: n = 2, then -0.050;\nC: n = 2, then -0.050 (noise)"
    assert title == expected


def test_a_pair_batch_follows_the_chat_template():
    record = {"prompt": "é", "chosen": "a", "rejected": "bcd"}
    batch = demo_overoptimization.pair_batch([record], TOK, 360, "cpu")
    ids, starts, lengths = batch
    prompt = [TOK.special["<|user|>"], *"é".encode(), TOK.special["<|assistant|>"]]
    assert ids.tolist() == [[*prompt, 97, END, 0, 0], [*prompt, 98, 99, 100, END]]
    assert starts.tolist() == [4, 4]
    assert lengths.tolist() == [6, 8]


def test_a_reward_model_learns_its_pairs(sft):
    records = []
    for word in "abcdefgh":
        chosen = f"a {word} deer"
        rejected = f"a {word} goat"
        records.append({"prompt": "Write a story.", "chosen": chosen, "rejected": rejected})
    torch.manual_seed(0)
    model = demo_overoptimization.train_reward_model(sft, TOK, records, 25, "cpu")
    unseen = [{"prompt": "Write a story.", "chosen": "a x deer", "rejected": "a x goat"}]
    batch = demo_overoptimization.pair_batch(records + unseen, TOK, 360, "cpu")
    chosen, rejected = model(*batch).chunk(2)
    assert (chosen > rejected + 1).all()


@torch.no_grad()
def test_sampled_answers_and_their_scores(sft, rm, val):
    """Each answer alone. The reward is in standard deviations of all, and -2 without an end."""
    torch.manual_seed(0)
    policy = GPT.load(sft)
    policy.lm_head.weight.zero_()  # every token is as likely as any other: some answers do not end
    pool = []
    for record in val[:2]:
        batch, gold = demo_overoptimization.sample_answers(policy, TOK, record, 16, "cpu")
        pool.append(batch)
        assert gold.shape == (16,)
        assert set(gold.tolist()) <= {0.0, 1.0}
    score = demo_overoptimization.score_pool(rm, pool)

    raw = []
    ended = []
    for record, batch in zip(val, pool):
        start = len(record["prompt_ids"])
        for ids, length in zip(batch.ids.tolist(), batch.lengths.tolist()):
            assert ids[:start] == record["prompt_ids"]
            ended.append(END in ids[start:length])
            assert ended[-1] or length - start == 72
            row = torch.tensor([ids[:length]])
            raw.append(rm(row, torch.tensor([start]), torch.tensor([length])).item())
    raw = torch.tensor(raw)
    ended = torch.tensor(ended)
    assert 0 < ended.sum() < 32
    expected = ((raw - raw.mean()) / raw.std()).masked_fill(~ended, -2.0)
    assert_near(score.flatten(), expected, rtol=1e-3)


# demo_kl_penalty.py -------------------------------------------------------------------------------


def test_the_fit_of_rl_finds_the_curve_of_the_points():
    d = torch.tensor([0.0, 0.3, 0.7, 1.1, 1.9, 2.4])
    gain = 0.3 * d - 0.4 * torch.special.xlogy(d, d)
    curve = demo_kl_penalty.fit(d, gain)
    assert curve.a == pytest.approx(0.3, abs=1e-4)
    assert curve.b == pytest.approx(0.4, abs=1e-4)
    assert curve.r2 == pytest.approx(1, abs=1e-5)


def test_gold_fell_only_if_it_fell_in_every_seed():
    """Two seeds and ten iterations. Gold rises by 0.5 and stays, or it falls again in one seed, or
    in both, or it never rises."""
    d = torch.linspace(0, 2, 10).repeat(2, 1)
    rises = (d / 2).clamp(max=0.5) + 0.2
    falls = rises - (d - 1).clamp(min=0) * 0.4
    falls_once = torch.stack([falls[0], rises[1]])
    only_falls = 0.5 - 0.2 * d
    summaries = {}
    for beta, gold in ((0, falls), (0.1, falls_once), (0.2, rises), (0.3, only_falls)):
        curves = torch.stack([d, 3 * d, gold], dim=1)
        summaries[beta] = demo_kl_penalty.summarize(curves)

    assert summaries[0].kl == pytest.approx([4, 4])
    assert summaries[0].score == pytest.approx([6, 6])
    assert summaries[0].start == pytest.approx(0.2)
    assert summaries[0.2].best == summaries[0.2].end
    assert summaries[0.3].best == pytest.approx([0.5, 0.5]), "then it is best at the start"

    lines = demo_kl_penalty.make_title(summaries, 256).splitlines()
    assert [", then" in line for line in lines] == [True, False, False, True]
    assert lines[2] == "beta 0.2: gold 0.20 to 0.70, at 4.0 nats"
    assert lines[3].startswith("beta 0.3: gold 0.50, then 0.1")


@pytest.mark.parametrize(
    "demo, option",
    [
        (demo_kl_penalty, "--betas="),
        (demo_kl_penalty, "--betas=0,x"),
        (demo_kl_penalty, "--betas=0,-1"),
        (demo_kl_penalty, "--pairs=-1"),
        (demo_overoptimization, "--pairs=64,"),
        (demo_overoptimization, "--pairs=6.4"),
        (demo_overoptimization, "--samples=2"),
        (demo_rollout, "--show=64"),
        (demo_details, "--seeds=0"),
    ],
)
def test_bad_options_are_refused(demo, option, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(demo.Config, argv=[option])
    assert stop.value.code == 2
    message = capsys.readouterr().err.removeprefix("error: ").removeprefix("--")
    assert message.startswith(f"{option.removeprefix('--')} must ")


# demo_rollout.py ----------------------------------------------------------------------------------


def test_a_critic_of_its_own_is_refused(folder, run_script, tmp_path, capsys):
    sft = load_checkpoint(folder / "sft.pt", "sft")
    sft["weights"]["critic.wte.weight"] = sft["weights"]["wte.weight"]
    save_checkpoint(tmp_path / "ppo.pt", **{**sft, "kind": "ppo"})
    with pytest.raises(SystemExit) as stop:
        run_script(
            "demo_rollout",
            f"--init={tmp_path}/ppo.pt",
            f"--sft={folder}/sft.pt",
            f"--rm={folder}/rm.pt",
            f"--out={tmp_path}",
        )
    assert stop.value.code == 2
    assert "--init has a critic of its own" in capsys.readouterr().err


def test_the_exact_kl_by_hand(folder, reference, val):
    policy = ActorCritic.load(load_checkpoint(folder / "ppo.pt", "ppo"))
    torch.manual_seed(0)
    batch = train_ppo.rollout(policy, TOK, val[:3], train_ppo.Config(max_new_tokens=5), "cpu")
    kl = demo_rollout.exact_kl(policy, reference, batch)
    assert (kl[batch.mask] > 0).all()
    assert (kl[~batch.mask] == 0).all()

    p = policy(batch.ids[:, :-1])[0].double().softmax(dim=-1)
    q = reference(batch.ids[:, :-1])[0].double().softmax(dim=-1)
    expected = (p * (p / q).log()).sum(dim=-1)[batch.mask]
    assert_near(kl[batch.mask], expected.float(), rtol=1e-3)
    assert demo_rollout.exact_kl(policy, policy, batch).abs().max() == 0


def test_carriers():
    assert demo_rollout.carriers(torch.tensor([0.0, 6.0, 1.0, 3.0])) == 1
    assert demo_rollout.carriers(torch.tensor([2.0, 2.0, 1.9])) == 2

    kl = torch.tensor([[9.0, 6.0, 1.0, 3.0], [2.0, 2.0, 1.9, 9.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    share = demo_rollout.mean_carrier_share(kl, mask)
    assert share == pytest.approx((1 / 3 + 2 / 3) / 2), "the third answer has not moved"
    assert demo_rollout.mean_carrier_share(0 * kl, mask) is None


def test_explained():
    x = normal(5000, seed=1)
    noise = normal(5000, seed=2)
    assert demo_rollout.explained(x, x) == 1
    assert demo_rollout.explained(x, 0 * x) == pytest.approx(0, abs=1e-6)
    assert demo_rollout.explained(x + noise, x) == pytest.approx(0.5, abs=0.05)


def test_the_critic_is_asked_at_the_first_middle_and_last_token():
    """Answers of 5 tokens at places 1 to 5. The critic knows the truth at one of them."""
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[:, 1:6] = True
    rewards = normal(6, 8) * mask
    to_come = rewards.flip(1).cumsum(dim=1).flip(1)
    for name, place in (("first", 1), ("middle", 3), ("last", 5)):
        values = torch.zeros(6, 8)
        values[:, place] = to_come[:, place]
        r2 = demo_rollout.critic_r2(rewards, values, mask)
        for other in ("first", "middle", "last"):
            assert r2[other] == pytest.approx(float(other == name), abs=1e-5)


def test_token_names():
    ids = [*TOK.encode(" a\n"), END]
    assert demo_rollout.token_names(ids, TOK) == ["·", "a", "\\n", "<|end|>"]


# demo_details.py ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", demo_details.VARIANTS)
def test_only_the_bugs_trip_the_ratio_check(name, sft, reference, rm, val):
    variant = demo_details.VARIANTS[name]
    cfg = train_ppo.Config(steps=1, batch_size=8, max_new_tokens=12, **variant.options)
    policy, error = demo_details.train(variant, sft, reference, rm, TOK, val, cfg, "cpu")
    if variant.is_bug:
        assert error > 1e-2
    else:
        assert error < 1e-4

    for key, tensor in policy.state_dict().items():
        if key != "v_head.weight":
            assert not torch.equal(tensor, sft["weights"][key]), key


def test_the_variant_with_all_details_is_train_ppo(
    folder, sft, reference, rm, val, run_script, tmp_path
):
    """The demo's loop gives the weights that train_ppo.py gives, to the last bit."""
    sizes = {"steps": 3, "batch_size": 8, "max_new_tokens": 12, "kl_horizon": 50.0, "seed": 3}
    sizes["critic"] = "head"
    data = tmp_path / "data.jsonl"
    records = [{"instruction": record["instruction"], "input": ""} for record in val * 2]
    data.write_text("\n".join(json.dumps(record) for record in records))
    argv = [f"--{name}={value}" for name, value in sizes.items()]
    argv += [f"--data={data}", f"--init={folder}/sft.pt", f"--rm={folder}/rm.pt"]
    run_script("train_ppo", f"--out={tmp_path}", *argv)

    variant = demo_details.VARIANTS["all details"]
    cfg = train_ppo.Config(**sizes)
    prompts = train_ppo.encode_records(records[:14], TOK, 360, 12)
    policy, _ = demo_details.train(variant, sft, reference, rm, TOK, prompts, cfg, "cpu")
    expected = load_checkpoint(tmp_path / "ppo.pt", "ppo")["weights"]
    for key, tensor in policy.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_each_variant_changes_the_result(sft, reference, rm, val):
    """Two variants with the same weights would mean that an option does nothing."""
    weights = {}
    for name, variant in demo_details.VARIANTS.items():
        cfg = train_ppo.Config(
            steps=3,
            batch_size=8,
            max_new_tokens=12,
            kl_horizon=50.0,
            lr=5e-3,
            lr_value=0.2,
            critic="head",
            **variant.options,
        )
        policy, _ = demo_details.train(variant, sft, reference, rm, TOK, val, cfg, "cpu")
        weights[name] = policy.h[0].mlp.c_fc.weight
    for first, second in itertools.combinations(weights, 2):
        assert not torch.equal(weights[first], weights[second]), f"{first} = {second}"


def test_a_change_needs_intervals_that_do_not_touch():
    assert demo_details.gold_interval([0.2, 0.5, 0.3], 100) == (0.2, 0.5)
    low, high = demo_details.gold_interval([0.5], 100)
    assert (low, high) == (pytest.approx(0.4), pytest.approx(0.6))

    results = {
        "all details": demo_details.Result([0.6, 0.7], [1, 1], [1e-6, 1e-6]),
        "no KL": demo_details.Result([0.65, 0.8], [1, 1], [1e-6, 1e-6]),
        "one epoch": demo_details.Result([0.3, 0.5], [1, 1], [1e-6, 1e-6]),
        "bug: late": demo_details.Result([0.1, 0.2], [1, 1], [1e-6, 2.0]),
    }
    assert demo_details.make_title(results, 100) == (
        "Gold with all details 0.65; one epoch 0.40\nThe ratio check stops: bug: late"
    )
    del results["one epoch"], results["bug: late"]
    assert demo_details.make_title(results, 100) == (
        "Gold with all details 0.65; no detail changes it by more than the noise\n"
        "The ratio check stops: nothing"
    )


# demo_critics.py ----------------------------------------------------------------------------------


def test_smooth_is_the_mean_with_the_neighbours():
    values = np.array([[0.0, 3.0, 0.0, 6.0], [1.0, 1.0, 1.0, 1.0]])
    expected = [[1.5, 1.0, 3.0, 3.0], [1.0, 1.0, 1.0, 1.0]]
    assert demo_critics.smooth(values) == pytest.approx(np.array(expected))


def test_the_title_of_the_critics_says_what_they_explain_and_reach():
    def made(explained, gold, seconds):
        first = np.array([explained, explained, 9.0, 9.0])
        return demo_critics.Run(first, np.zeros(4), np.array([1.0, 2.0, 3.0, seconds]), gold)

    runs = {
        "none": [made(0.0, 0.5, 10.0)],
        "head": [made(-0.1, 0.6, 10.0), made(0.1, 0.7, 30.0)],
        "rm": [made(0.6, 0.8, 25.0)],
    }
    assert demo_critics.make_title(runs) == (
        "Explained variance in the first half: none 0.00, gold 0.50 in 10 s\n"
        "head 0.00, gold 0.65 in 20 s; rm 0.60, gold 0.80 in 25 s"
    )


# the scripts --------------------------------------------------------------------------------------


def test_demo_rollout_runs(folder, run_demo):
    metrics = run_demo(
        "demo_rollout",
        f"--init={folder}/ppo.pt",
        f"--sft={folder}/sft.pt",
        f"--rm={folder}/rm.pt",
        "--prompts=4",
        "--show=2",
    )
    expected = metrics["score"] - 0.05 * metrics["kl_paid"]
    assert metrics["reward"] == pytest.approx(expected)
    assert 0 < metrics["tokens"] <= 72
    assert metrics["mean_kl"] > 0


def test_demo_rollout_before_ppo(folder, run_demo):
    """The SFT model has no KL to itself, and a critic of zeros explains nothing."""
    metrics = run_demo(
        "demo_rollout",
        f"--init={folder}/sft.pt",
        f"--sft={folder}/sft.pt",
        f"--rm={folder}/rm.pt",
        "--prompts=4",
    )
    assert metrics["mean_kl"] == 0
    assert metrics["half_kl_share"] is None
    assert metrics["critic_first"] == pytest.approx(0, abs=1e-6)


def test_demo_details_runs(folder, run_demo):
    metrics = run_demo(
        "demo_details",
        f"--init={folder}/sft.pt",
        f"--rm={folder}/rm.pt",
        "--steps=1",
        "--batch_size=4",
        "--prompts=4",
        "--seeds=2",
    )
    for name in demo_details.VARIANTS:
        assert len(metrics[f"{name}: gold"]) == 2
    assert min(metrics["bug: sampled at 0.7: ratio"]) > 1e-2
    assert max(metrics["one epoch: ratio"]) < 1e-4


def test_demo_overoptimization_runs(folder, run_demo):
    metrics = run_demo(
        "demo_overoptimization",
        f"--init={folder}/sft.pt",
        "--pairs=8,40",
        "--rm_steps=1",
        "--prompts=2",
        "--samples=8",
    )
    assert metrics["n"] == [1, 2, 4, 8]
    assert len(metrics["8 pairs: gold"]) == 4
    score = metrics["40 pairs: score"]
    assert sorted(score) == score, "the best of more answers has a higher score"


def test_demo_critics_runs(folder, run_demo, tmp_path):
    metrics = run_demo(
        "demo_critics",
        f"--init={folder}/sft.pt",
        f"--rm={folder}/rm.pt",
        "--steps=3",
        "--batch_size=4",
        "--prompts=4",
        "--device=cpu",
    )
    assert metrics["none: explained"] == [pytest.approx([0, 0, 0], abs=1e-5)]
    assert metrics["head: explained"][0][0] == pytest.approx(0, abs=1e-5)
    assert abs(metrics["rm: explained"][0][0]) > 1e-3
    log = read_log(tmp_path / "demo_critics.rm.0")
    assert metrics["rm: gold"] == [[record["gold"] for record in log]]


def test_demo_kl_penalty_runs(folder, run_demo, tmp_path):
    metrics = run_demo(
        "demo_kl_penalty",
        f"--init={folder}/sft.pt",
        "--pairs=9",
        "--rm_steps=1",
        "--betas=0.5",
        "--steps=2",
        "--batch_size=4",
    )
    log = tmp_path / "demo_kl_penalty.ppo.0.5.0" / "log.jsonl"
    first, last = read_log(log.parent, log.stem)
    assert metrics["beta 0.5: start"] == pytest.approx(first["gold"])
    assert metrics["beta 0.5: kl"] == pytest.approx([max(last["kl"], 0)], rel=1e-4, abs=1e-6)
    assert metrics["beta 0.5: score"] == pytest.approx([last["reward"]])
    assert last["beta"] == 0.5
    assert len(read_jsonl(tmp_path / "demo_kl_penalty.rm.0" / "pairs.jsonl", ["prompt"])) == 10
