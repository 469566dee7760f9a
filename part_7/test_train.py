"""
Tests of train_rm.py: the loss by hand, what is in a batch, whether labels teach, and the script
itself on a tiny SFT model and tiny data that are made here.
"""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import train_rm
from model import GPT, GPTConfig, RewardModel
from shared import ROOT, load_checkpoint, parse_args, save_checkpoint, set_seed
from tokenizer import Tokenizer
from train_rm import (
    Answer,
    Config,
    against_truth,
    chat_prompt,
    collate,
    encode_records,
    evaluate,
    get_batch,
    load_data,
    lr_scale,
    make_optimizers,
    preference_loss,
    rewards,
    sample_pairs,
    story_prompts,
)

SCRIPT = ROOT / "part_7/train_rm.py"
END = 12
CONFIG = GPTConfig(vocab_size=13, block_size=24, n_layer=2, n_head=4, n_embd=16, mlp_dim=12)
TOK = Tokenizer({bytes([i]): i for i in range(256)})
USER = TOK.special["<|user|>"]
ASSISTANT = TOK.special["<|assistant|>"]
TOK_END = TOK.special["<|end|>"]


def make_pairs(n=7, seed=0, good=None):
    """n pairs of random prompts and answers. With a `good` token, each preferred answer has it once
    and no other text has it."""
    rng = random.Random(seed)
    plain = [i for i in range(1, END) if i != good]

    def words(shortest, longest):
        return rng.choices(plain, k=rng.randint(shortest, longest))

    pairs = []
    for _ in range(n):
        pair = {"prompt_ids": words(2, 7)}
        pair["chosen_ids"] = [*words(1, 9), END]
        pair["rejected_ids"] = [*words(1, 9), END]
        if good is not None:
            place = rng.randrange(len(pair["chosen_ids"]) - 1)
            pair["chosen_ids"][place] = good
        pairs.append(pair)
    return pairs


def write_jsonl(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records))


# the loss -----------------------------------------------------------------------------------------


def test_bradley_terry_by_hand():
    chosen = torch.tensor([1.0, 0.5, -3.0])
    rejected = torch.tensor([1.0, -1.5, 4.0])
    expected = []
    for c, r in zip(chosen.tolist(), rejected.tolist()):
        probability = 1 / (1 + math.exp(-(c - r)))
        expected.append(-math.log(probability))
    for i in range(3):
        loss = preference_loss(chosen[i : i + 1], rejected[i : i + 1])
        assert loss.item() == pytest.approx(expected[i], rel=1e-5)
    assert expected[0] == pytest.approx(math.log(2))

    loss = preference_loss(chosen, rejected).item()
    assert loss == pytest.approx(sum(expected) / 3, rel=1e-5)
    shifted = preference_loss(chosen + 7, rejected + 7).item()
    assert shifted == pytest.approx(loss, rel=1e-5), "only differences may count"


def test_bradley_terry_is_finite_for_huge_differences():
    loss = preference_loss(torch.tensor([-500.0]), torch.tensor([500.0]))
    assert loss.item() == pytest.approx(1000)


def test_margin_by_hand():
    chosen = torch.tensor([2.0, 0.25, -1.0])
    rejected = torch.tensor([0.5, 0.0, 1.0])
    loss = preference_loss(chosen, rejected, "margin", margin=1.0)
    assert loss.item() == pytest.approx((0 + 0.75 + 3) / 3)
    loss = preference_loss(chosen, rejected, "margin", margin=2.0)
    assert loss.item() == pytest.approx((0.5 + 1.75 + 4) / 3)


@pytest.mark.parametrize("kind", ["bt", "margin"])
def test_centring_pulls_the_sum_to_zero_and_leaves_the_difference(kind):
    """It adds center * (chosen + rejected)^2, here 0.01 * 3^2. Both gradients are 0.02 * 3."""
    chosen = torch.tensor([1.0], requires_grad=True)
    rejected = torch.tensor([2.0], requires_grad=True)
    without = preference_loss(chosen, rejected, kind)
    added = preference_loss(chosen, rejected, kind, center=0.01) - without
    assert added.item() == pytest.approx(0.09, rel=1e-4)
    gradients = torch.autograd.grad(added, (chosen, rejected))
    assert [gradient.item() for gradient in gradients] == pytest.approx([0.06, 0.06], rel=1e-4)

    opposite = preference_loss(chosen, -chosen, kind, center=9.0)
    assert opposite.item() == preference_loss(chosen, -chosen, kind).item()


# data ---------------------------------------------------------------------------------------------


def test_pairs_follow_the_chat_template():
    record = {"prompt": "sag <|end|> für", "chosen": "Füchse 🦊", "rejected": "", "gap": 3}
    (pair,) = encode_records([record], TOK, 99)
    assert pair["prompt_ids"] == [USER, *"sag <|end|> für".encode(), ASSISTANT]
    assert pair["chosen_ids"] == [*"Füchse 🦊".encode(), TOK_END]
    assert pair["rejected_ids"] == [TOK_END]
    assert pair["gap"] == 3


def test_instructions_follow_the_chat_template():
    record = {"instruction": "add é", "input": "", "output": ""}
    assert chat_prompt(record, TOK) == [USER, *"add é".encode(), ASSISTANT]
    record["input"] = "1 2"
    assert chat_prompt(record, TOK) == [USER, *"add é\n1 2".encode(), ASSISTANT]


@pytest.mark.parametrize("side, other", [("chosen", "rejected"), ("rejected", "chosen")])
def test_pairs_that_do_not_fit_are_left_out(side, other, capsys):
    """Prompt, answer and end token have 3 + 6 + 1 = 10 tokens, or one more."""
    fits = {"prompt": "a", side: "é" * 3, other: ""}
    too_long = {"prompt": "a", side: "é" * 3 + "!", other: ""}
    pairs = encode_records([too_long, fits], TOK, 10)
    assert [pair[side] for pair in pairs] == ["é" * 3]
    assert "1 of 2 pairs are longer than 10 tokens: left out" in capsys.readouterr().out


def test_a_users_file_is_split_without_overlap(tmp_path):
    records = [{"prompt": str(i), "chosen": "é", "rejected": "b"} for i in range(20)]
    write_jsonl(tmp_path / "data.jsonl", records)
    train, val = load_data(Config(data=str(tmp_path / "data.jsonl")))
    assert [record["prompt"] for record in train] == [str(i) for i in range(18)]
    assert [record["prompt"] for record in val] == ["18", "19"]


def test_collate():
    pairs = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, END], "rejected_ids": [END]},
        {"prompt_ids": [4], "chosen_ids": [5], "rejected_ids": [6, 7, 8, END]},
    ]
    ids, starts, lengths = collate(pairs)
    assert ids.tolist() == [
        [1, 2, 3, END, 0],
        [4, 5, 0, 0, 0],
        [1, 2, END, 0, 0],
        [4, 6, 7, 8, END],
    ]
    assert starts.tolist() == [2, 1, 2, 1]
    assert lengths.tolist() == [4, 2, 3, 5]


def test_a_pass_sees_every_pair_once_in_a_new_order():
    pairs = []
    for i in range(1, 65):
        pairs.append({"prompt_ids": [i], "chosen_ids": [END] * (1 + i % 5), "rejected_ids": [END]})
    cfg = Config(batch_size=4)
    passes = [[], []]
    previous_longest = 0
    for step in range(32):
        ids, _, lengths = get_batch(pairs, step, cfg)
        chosen = ids[:4, 0].tolist()
        assert ids[4:, 0].tolist() == chosen, "both answers of a pair are in the same batch"
        passes[step // 16] += chosen

        # Steps 0 to 7 make one group, which is sorted by length.
        if step % 8 > 0:
            assert lengths.max() >= previous_longest
        previous_longest = lengths.max()
    assert sorted(passes[0]) == list(range(1, 65))
    assert sorted(passes[1]) == list(range(1, 65))
    assert passes[0] != passes[1]
    assert not torch.equal(get_batch(pairs, 0, cfg)[0], get_batch(pairs, 8, cfg)[0])


def test_the_seed_changes_the_order():
    pairs = make_pairs(40)
    first = get_batch(pairs, 0, Config(batch_size=4, seed=0))[0]
    second = get_batch(pairs, 0, Config(batch_size=4, seed=1))[0]
    assert first.shape != second.shape or not torch.equal(first, second)


def test_fewer_pairs_than_a_batch_still_make_batches():
    pairs = make_pairs(5)
    for step in range(20):
        ids, _, _ = get_batch(pairs, step, Config(batch_size=4))
        assert len(ids) >= 2


def test_only_stories_are_asked_for(tmp_path):
    records = [
        {"instruction": "tell é", "input": "", "task": "story"},
        {"instruction": "count", "input": "1", "task": "count"},
    ]
    write_jsonl(tmp_path / "instructions.jsonl", records)
    (story,) = story_prompts(tmp_path / "instructions.jsonl", TOK)
    assert story["instruction"] == "tell é"
    assert story["prompt_ids"] == [USER, *"tell é".encode(), ASSISTANT]


def test_sampled_pairs_follow_the_noisy_judge(monkeypatch):
    """The better answer is preferred with probability sigmoid(gap / tau), here sigmoid(3 / 1.5) =
    0.881, within 4 standard errors. Ties are left out."""
    good = Answer(TOK.encode("fox dog"), "fox dog", ended=True)
    cut_off = Answer(TOK.encode("the"), "the", ended=False)
    bad = Answer(TOK.encode("the"), "the", ended=True)

    def fake_respond(policy, tok, records, max_new_tokens):
        assert max_new_tokens == 72
        return [good, cut_off, bad, bad] * (len(records) // 4)

    monkeypatch.setattr(train_rm, "respond", fake_respond)
    record = {"prompt_ids": [1], "check": {"must": ["fox", "dog"]}}
    pairs = sample_pairs(None, TOK, [record] * 2000, Config(), tau=1.5)
    assert len(pairs) == 1000

    right = 0
    for pair in pairs:
        answers = [pair["chosen_ids"], pair["rejected_ids"]]
        if pair["gap"] > 0:
            right += 1
        else:
            answers.reverse()
        assert answers == [[*good.ids, TOK_END], cut_off.ids], "only an ended answer has an end"
        assert abs(pair["gap"]) == 3
        assert pair["prompt_ids"] == [1]
    standard_error = (0.881 * 0.119 / 1000) ** 0.5
    assert right / 1000 == pytest.approx(0.881, abs=4 * standard_error)


# optimizers ---------------------------------------------------------------------------------------


def test_muon_gets_the_hidden_matrices_and_adamw_the_rest():
    model = RewardModel(CONFIG, head="mean")
    cfg = Config(lr=0.5, lr_adamw=0.25, lr_head=0.75, weight_decay=0.125)
    muon, adamw = make_optimizers(model, cfg)
    name_of = {id(p): name for name, p in model.named_parameters()}
    hidden = {name_of[id(p)] for p in muon.param_groups[0]["params"]}
    tables, gains, head = adamw.param_groups
    others = {name_of[id(p)] for p in tables["params"] + gains["params"] + head["params"]}
    assert [name_of[id(p)] for p in head["params"]] == ["score_head.weight"]
    assert head["lr"] == head["peak_lr"] == 0.75
    assert hidden | others == set(name_of.values())
    assert not hidden & others
    assert {"score_head.weight", "lm_head.weight", "wte.weight", "ln_f.weight"} <= others
    assert {"h.0.attn.c_q.weight", "h.1.mlp.c_proj.weight"} <= hidden
    assert muon.param_groups[0]["lr"] == 0.5
    assert adamw.param_groups[0]["lr"] == 0.25
    assert muon.param_groups[0]["weight_decay"] == 0.125
    assert tables["weight_decay"] == 0.125
    assert gains["weight_decay"] == 0
    assert all(p.ndim == 1 for p in gains["params"])


def test_the_learning_rate_rises_holds_and_falls():
    cfg = Config(steps=100, warmup=0.1, decay=0.4)
    scales = [lr_scale(step, cfg) for step in range(101)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9:61] == [1.0] * 52
    assert scales[80] == pytest.approx(0.5)
    assert scales[99] == pytest.approx(1 / 40)
    assert scales[100] == 0


# learning and measuring ---------------------------------------------------------------------------


def train_on(model, pairs, steps):
    """A plain loop, without anything from train_rm.py's main body."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        batch = get_batch(pairs, step, Config(batch_size=16))
        chosen, rejected = model(*batch).chunk(2)
        loss = preference_loss(chosen, rejected, center=0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("head, steps", [("mean", 60), ("last", 100)])
def test_labels_teach(head, steps):
    """Answers with token 5 are preferred. The model finds that out."""
    torch.manual_seed(0)
    train = make_pairs(200, seed=1, good=5)
    val = make_pairs(200, seed=2, good=5)
    model = train_on(RewardModel(CONFIG, head), train, steps)
    assert evaluate(model, val, "cpu").accuracy > 0.9


def test_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    pairs = make_pairs(6)
    model = train_on(RewardModel(CONFIG), pairs, 60)
    result = evaluate(model, pairs, "cpu")
    assert result.accuracy == 1
    assert result.gap.min() > 2


def test_evaluation_joins_its_batches_in_order():
    """150 pairs are three batches. Each pair alone must give the same rewards."""
    torch.manual_seed(0)
    model = RewardModel(CONFIG)
    pairs = make_pairs(150)
    chosen, rejected = rewards(model, pairs, "cpu")
    assert chosen.shape == rejected.shape == (150,)
    scale = chosen.abs().max().item()
    for i in (0, 63, 64, 130, 149):
        alone = model(*collate([pairs[i]]))
        together = torch.stack([chosen[i], rejected[i]])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5 * scale)

    result = evaluate(model, pairs, "cpu")
    right = 0
    for c, r in zip(chosen.tolist(), rejected.tolist()):
        if c > r:
            right += 1
    assert result.accuracy == pytest.approx(right / 150)
    torch.testing.assert_close(result.gap, chosen - rejected)


def test_against_truth_by_hand():
    """The model disagrees with the labels of the last two pairs, and the first of these labels is
    wrong."""
    pairs = [{"gap": 1}, {"gap": 2}, {"gap": -1}, {"gap": 3}]
    truth = against_truth(torch.tensor([0.5, 2.0, -1.0, -0.1]), pairs, tau=0.5)
    expected = 0.0
    for size in (1, 2, 1, 3):
        expected += 1 / (1 + math.exp(-size / 0.5)) / 4
    assert truth["bayes_accuracy"] == pytest.approx(expected, rel=1e-5)
    assert truth["true_order"] == 0.75
    assert truth["true_order_gap_1"] == 1
    assert truth["true_order_gap_2"] == 1
    assert truth["true_order_gap_3"] == 0


# the script ---------------------------------------------------------------------------------------
# Importing torch takes seconds. So one process imports it, and makes a child for each run.

SERVER = """
import json
import os
import runpy
import sys
from pathlib import Path

import tiktoken
import torch
import torch._dynamo

for line in sys.stdin:
    folder, world, script, argv = json.loads(line)
    child = os.fork()
    if child == 0:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
        os.chdir(folder)
        sys.path[:0] = [os.path.dirname(script), os.path.dirname(os.path.dirname(script))]
        if world:
            import shared
            shared.require = lambda path: Path(world) / path
        sys.argv = [script, *argv]
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = 1
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        os._exit(code or 0)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture(scope="module")
def run():
    """run(folder, *options) runs the script in this folder -> its exit code, stdout and stderr.
    With a `world`, everything that the script requires is taken from that folder."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def ask(folder, *argv, script=SCRIPT, world=""):
        request = json.dumps([str(folder), str(world), str(script), argv])
        print(request, file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return code, (folder / "stdout").read_text(), (folder / "stderr").read_text()

    yield ask
    server.kill()
    server.communicate()


def make_sft(path, kind="sft", block_size=40):
    torch.manual_seed(0)
    cfg = GPTConfig(vocab_size=260, block_size=block_size, n_layer=1, n_head=2, n_embd=16)
    model = GPT(cfg)
    # Projections that are zero would hide the blocks.
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.1)
    save_checkpoint(path, kind=kind, **model.to_checkpoint(), tokenizer=TOK.state())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An SFT model and 41 pairs, one of which is too long. Half of the others fill the context to
    its last token. The last 5, which are held out, have the opposite labels, so that no one can
    mistake them for training data. And the bad files that BAD_INPUT names."""
    folder = tmp_path_factory.mktemp("rm")
    make_sft(folder / "sft.pt")
    make_sft(folder / "base.pt", kind="base")
    (folder / "half.pt").write_bytes((folder / "sft.pt").read_bytes()[:9000])

    longest = "!" * (40 - len("<say>") - len("."))
    pairs = []
    for _ in range(20):
        pairs.append({"prompt": "say", "chosen": "the réd fox", "rejected": longest})
        pairs.append({"prompt": "say", "chosen": "the 🦊", "rejected": "it"})
    pairs.insert(3, {"prompt": "say", "chosen": "the " * 90, "rejected": "dog"})
    for pair in pairs[36:]:
        pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    write_jsonl(folder / "data.jsonl", pairs)

    lines = (folder / "data.jsonl").read_text().split("\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "one.jsonl").write_text(lines[0])
    (folder / "long.jsonl").write_text("\n".join([lines[3]] * 4))
    (folder / "broken.jsonl").write_text("\n".join([*lines[:4], lines[4][:-5], *lines[5:]]))
    (folder / "field.jsonl").write_text("\n".join([*lines[:6], '{"prompt": "a", "chosen": "b"}']))
    return folder


def options(folder, out, *more):
    return [
        f"--data={folder}/data.jsonl",
        f"--init={folder}/sft.pt",
        f"--out={out}",
        "--steps=12",
        "--batch_size=4",
        "--eval_every=6",
        "--grad_clip=0.3",
        *more,
    ]


def replay(cfg, sft_path):
    """The training once more, in other words -> the loss and the gradient's norm of each step."""
    set_seed(cfg.seed)
    records, _ = load_data(cfg)
    pairs = encode_records(records, TOK, 40)
    sft = load_checkpoint(sft_path, "sft")
    model = RewardModel.load(sft, head=cfg.head, bidirectional=cfg.bidirectional)
    optimizers = make_optimizers(model, cfg)
    losses = []
    norms = []
    for step in range(cfg.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_scale(step, cfg)
        ids, starts, lengths = get_batch(pairs, step, cfg)
        half = len(ids) // 2
        chosen = model(ids[:half], starts[:half], lengths[:half])
        rejected = model(ids[half:], starts[half:], lengths[half:])
        loss = preference_loss(chosen, rejected, cfg.loss, cfg.margin, cfg.center)
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--head=last", "--bidirectional", "--loss=margin", "--margin=2", "--center=0.1"],
    ],
)
def test_a_run(folder, run, tmp_path, more):
    out = tmp_path / "out"
    argv = options(folder, out, *more)
    code, stdout, stderr = run(tmp_path, *argv)
    assert code == 0, stderr
    assert "1 of 36 pairs are longer than 40 tokens: left out" in stdout
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((out / "metrics.json").read_text())
    assert [line["step"] for line in log] == list(range(12))
    assert [line["step"] for line in log if "accuracy" in line] == [5, 11]
    assert metrics["accuracy"] == log[-1]["accuracy"]
    assert metrics["steps"] == 12
    assert metrics["seconds"] > 0

    # Every step did what it should: batches, loss, schedule, clipping, update.
    cfg = parse_args(Config, argv=argv)
    losses, norms = replay(cfg, folder / "sft.pt")
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-2)
    assert [line["grad_norm"] for line in log] == pytest.approx(norms, rel=2e-2)
    assert max(norms) > cfg.grad_clip, "otherwise nothing is clipped"

    # The checkpoint holds the model that was measured, and its rewards are normalized.
    checkpoint = load_checkpoint(out / "rm.pt", "rm")
    model = RewardModel.load(checkpoint, **checkpoint["head"])
    expected_kind = ("last", True) if more else ("implicit", False)
    assert (model.head, model.bidirectional) == expected_kind
    train, val = load_data(cfg)
    tok = Tokenizer.load(checkpoint["tokenizer"])
    train = encode_records(train, tok, 40)
    val = encode_records(val, tok, 40)
    assert evaluate(model, val, "cpu").accuracy == pytest.approx(metrics["accuracy"])
    assert evaluate(model, train, "cpu").accuracy != pytest.approx(metrics["accuracy"])
    answers = torch.cat(rewards(model, val, "cpu"))
    assert answers.mean().abs() < 1e-3
    assert answers.var().item() == pytest.approx(1, rel=1e-3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A built-in world of a few pairs, for the runs without --data, and an SFT model for it."""
    world = tmp_path_factory.mktemp("world")
    stories = world / "data/stories"
    stories.mkdir(parents=True)
    (world / "part_6/out").mkdir(parents=True)
    make_sft(world / "part_6/out/sft.pt", block_size=120)
    (stories / "facts.json").write_text('{"tau": 0.5}')
    rng = random.Random(0)
    for name, n in (("preferences", 40), ("preferences_val", 12)):
        pairs = []
        for i in range(n):
            gap = rng.choice([1, 2, 3, 4, -1])
            pair = {"prompt": f"say é {i}", "chosen": "a fox", "rejected": "x" * (1 + i % 7)}
            pairs.append({**pair, "gap": gap})
        write_jsonl(stories / f"{name}.jsonl", pairs)
    for name, n in (("instructions", 30), ("instructions_val", 40)):
        records = []
        for i in range(n):
            task = "story" if i % 3 else "count"
            record = {"instruction": f"tell {name} {i}", "input": "", "task": task}
            records.append({**record, "check": {"must": ["e"], "no_repeat": True}})
        write_jsonl(stories / f"{name}.jsonl", records)
    return world


@pytest.fixture
def one_thread():
    """As many threads as the script has, so that both sample the same tokens."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_with_pairs_of_the_policy(world, run, tmp_path, one_thread):
    out = tmp_path / "out"
    sizes = ["--steps=4", "--batch_size=8", "--policy_pairs=15", "--max_new_tokens=80"]
    code, stdout, stderr = run(tmp_path, f"--out={out}", *sizes, world=world)
    assert code == 0, stderr
    assert (out / "train_rm.png").read_bytes()[:4] == b"\x89PNG"

    # The script draws its first random numbers in this order: the reward model, the policy, then
    # the answers to the training prompts and to the held-out ones.
    cfg = Config(policy_pairs=15, max_new_tokens=80, steps=4, batch_size=8)
    set_seed(0)
    sft = load_checkpoint(world / "part_6/out/sft.pt", "sft")
    RewardModel.load(sft)
    policy = GPT.load(sft)
    stories = world / "data/stories"
    prompts = story_prompts(stories / "instructions.jsonl", TOK)[:15]
    policy_train = sample_pairs(policy, TOK, prompts, cfg, 0.5)
    prompts = story_prompts(stories / "instructions_val.jsonl", TOK)
    policy_val = sample_pairs(policy, TOK, prompts, cfg, 0.5)
    assert 0 < len(policy_train) < 15
    total = 40 + len(policy_train)
    assert f"{total} pairs, {len(policy_train)} of them written by the policy, and 12" in stdout

    # Rewards are normalized on what the policy writes, and the truth is in metrics.json.
    checkpoint = load_checkpoint(out / "rm.pt", "rm")
    model = RewardModel.load(checkpoint, **checkpoint["head"])
    answers = torch.cat(rewards(model, policy_val, "cpu"))
    assert answers.mean().abs() < 1e-3
    assert answers.std().item() == pytest.approx(1, rel=1e-3)

    metrics = json.loads((out / "metrics.json").read_text())
    result = evaluate(model, policy_val, "cpu")
    assert metrics["policy_accuracy"] == pytest.approx(result.accuracy)
    truth = against_truth(result.gap, policy_val, 0.5)
    assert metrics["policy_true_order"] == pytest.approx(truth["true_order"])

    world_cfg = Config(data=str(stories / "preferences_val.jsonl"))
    records = sum(load_data(world_cfg), [])
    val = encode_records(records, TOK, 120)
    result = evaluate(model, val, "cpu")
    assert metrics["accuracy"] == pytest.approx(result.accuracy)
    for name, value in against_truth(result.gap, val, 0.5).items():
        assert metrics[name] == pytest.approx(value, nan_ok=True), name


# Options, and what the one line of the error says. {0} is the folder.
BAD_INPUT = {
    "unknown option": (["--stepz=3"], "no option --stepz, did you mean --steps?"),
    "wrong type": (["--steps=three"], "--steps wants an int, got 'three'"),
    "no steps": (["--steps=0"], "steps=0 must be at least 1"),
    "unknown head": (["--head=first"], "head=first must be implicit, mean or last"),
    "implicit encoder": (["--bidirectional"], "bidirectional needs --head=mean or last"),
    "unknown loss": (["--loss=dpo"], "loss=dpo must be bt or margin"),
    "no file": (["--data=nowhere.jsonl"], "there is no file nowhere.jsonl"),
    "empty file": (["--data={0}/empty.jsonl"], "empty.jsonl is empty"),
    "one pair": (["--data={0}/one.jsonl"], "has 1 pair; at least 2 are needed"),
    "nothing fits": (["--data={0}/long.jsonl"], "no pair fits in the SFT model's 40 tokens"),
    "broken line": (["--data={0}/broken.jsonl"], "broken.jsonl line 5:"),
    "missing field": (["--data={0}/field.jsonl"], "line 7: field 'rejected' is missing"),
    "no checkpoint": (["--init=nowhere.pt"], "no checkpoint at nowhere.pt"),
    "truncated": (["--init={0}/half.pt"], "half.pt is truncated or not a checkpoint"),
    "foreign file": (["--init={0}/data.jsonl"], "data.jsonl is truncated or not a checkpoint"),
    "wrong kind": (["--init={0}/base.pt"], "base.pt is a 'base' checkpoint, expected 'sft'"),
    "diverged": (["--lr=1e20", "--lr_adamw=1e20"], "loss is nan at step"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_in_one_line(folder, run, tmp_path, name):
    more, message = BAD_INPUT[name]
    more = [option.format(folder) for option in more]
    code, _, stderr = run(tmp_path, *options(folder, tmp_path / "out", *more))
    assert code == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert message in stderr
    written = {path.name for path in (tmp_path / "out").glob("*")}
    assert written <= {"log.jsonl"}


def files_in(folder):
    """All files but Python's cache."""
    files = {path for path in folder.rglob("*") if path.is_file()}
    return {path for path in files if path.suffix != ".pyc"}


def test_a_broken_file_is_found_before_anything_is_built(folder, run, tmp_path):
    """On a fresh clone, with neither data/ nor any checkpoint."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "part_7", clone / "part_7", ignore=shutil.ignore_patterns("out"))
    shutil.copy(ROOT / "shared.py", clone)
    before = files_in(clone)
    script = clone / "part_7/train_rm.py"
    code, stdout, stderr = run(tmp_path, f"--data={folder}/broken.jsonl", script=script)
    assert code == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert "broken.jsonl line 5:" in stderr
    assert stdout == ""
    assert files_in(clone) == before
