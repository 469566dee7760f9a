"""
Tests of train_hierarchy.py and demo_hierarchy.py. The oracles are the distance in the Poincare
ball, masks and brackets computed by loops, ancestors looked up one by one, and both scripts run.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.nn.functional as F

import demo_hierarchy
import train_hierarchy
from train_hierarchy import (
    KINDS,
    LARGEST_RADIUS,
    BracketTask,
    Config,
    PairTask,
    Pointer,
    StoryTask,
    Transformer,
    attention_scores,
    hyperbolic_distance,
    lift,
    lorentz_inner,
    scale_mask,
    sentence_index,
    summary_weights,
)

FOLDER = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
STOP = 9  # the token that ends a sentence, in these tests
SCALES = "words,sentences,story,story"


def normal(*shape, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


@pytest.fixture
def exact(monkeypatch):
    """Distances without the smoothing at 0."""
    monkeypatch.setattr(train_hierarchy, "SMOOTHING", 0.0)


# distances ----------------------------------------------------------------------------------------


def ball_distance(v, w):
    """The distance of two lifted vectors by another model of the same space, the Poincare ball: the
    points tanh(|v| / 2) v / |v|, and arcosh(1 + 2 |p - q|^2 / ((1 - |p|^2) (1 - |q|^2)))."""
    p = math.tanh(v.norm() / 2) * v / v.norm()
    q = math.tanh(w.norm() / 2) * w / w.norm()
    gap = (p - q).square().sum()
    return math.acosh(1 + 2 * gap / ((1 - p.square().sum()) * (1 - q.square().sum())))


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_the_distance_is_that_of_the_poincare_ball(exact, dim):
    v, w = normal(6, dim), normal(7, dim, seed=2)
    actual = hyperbolic_distance(lift(v), lift(w))
    for i in range(6):
        for j in range(7):
            assert actual[i, j].item() == pytest.approx(ball_distance(v[i], w[j]), rel=1e-9)


def test_lifted_points_are_on_the_hyperboloid():
    x = lift(normal(5, 3))
    assert (x[:, 0] > 0).all()
    torch.testing.assert_close(lorentz_inner(x, x).diagonal(), -torch.ones(5).double())


def test_a_vector_is_as_far_from_the_origin_as_it_is_long(exact):
    v = normal(4, 3)
    origin = lift(torch.zeros(1, 3).double())
    torch.testing.assert_close(hyperbolic_distance(lift(v), origin)[:, 0], v.norm(dim=1))


def test_near_the_origin_space_is_flat(exact):
    v, w = 1e-3 * normal(4, 3), 1e-3 * normal(5, 3, seed=2)
    curved = hyperbolic_distance(lift(v), lift(w))
    torch.testing.assert_close(curved, torch.cdist(v, w), rtol=1e-4, atol=0)


def test_far_from_the_origin_the_way_leads_through_the_middle(exact):
    """Two points at a right angle and at radius r are 2 r - log 2 apart, nearly the way through the
    origin, as two leaves of a tree are. In the plane it would be 1.41 r."""
    v = torch.tensor([[5.5, 0.0]]).double()
    w = torch.tensor([[0.0, 5.5]]).double()
    distance = hyperbolic_distance(lift(v), lift(w)).item()
    assert distance == pytest.approx(11 - math.log(2), abs=1e-3)


def test_fp32_keeps_distances_above_a_tenth():
    """The largest error is at LARGEST_RADIUS, where 7 digits of -<x, y> leave only 3 of u."""
    directions = F.normalize(normal(60, 2), dim=1)
    v = LARGEST_RADIUS * directions
    expected = hyperbolic_distance(lift(v), lift(v))
    actual = hyperbolic_distance(lift(v.float()), lift(v.float())).double()
    error = (actual - expected).abs()
    assert error.max() < 0.2
    assert (error / expected)[expected > 1].max() < 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0.0, 1.0, 1e3])
def test_scores_and_gradients_are_finite_everywhere(kind, length):
    """Also where a query and a key are equal, and where a length is beyond the largest radius."""
    q = (length * F.normalize(normal(4, 3, dtype=torch.float32), dim=1)).requires_grad_()
    k = q.detach().clone().requires_grad_()
    scores = attention_scores(q, k, kind, torch.tensor(2.0))
    scores.softmax(dim=-1)[:, 0].sum().backward()
    assert scores.isfinite().all()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()


def test_scores_in_fp32_are_those_in_float64():
    for kind in KINDS:
        q, k = normal(2, 3, 5, 4), normal(2, 3, 6, 4, seed=2)
        expected = attention_scores(q, k, kind, 1.5)
        actual = attention_scores(q.float(), k.float(), kind, 1.5).double()
        assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_dot_product_is_that_of_pytorch():
    q, k, v = normal(2, 3, 5, 4), normal(2, 3, 5, 4, seed=2), normal(2, 3, 5, 4, seed=3)
    expected = F.scaled_dot_product_attention(q, k, v)
    actual = attention_scores(q, k, "dot", 1.0).softmax(dim=-1) @ v
    torch.testing.assert_close(actual, expected)


def test_distances_prefer_the_nearest_key_and_dot_products_the_longest():
    q = torch.tensor([[1.0, 0.0]])
    k = torch.tensor([[1.1, 0.1], [4.0, 0.0], [-1.0, 0.0]])
    best = {kind: attention_scores(q, k, kind, 1.0).argmax().item() for kind in KINDS}
    assert best == {"dot": 1, "euclidean": 0, "hyperbolic": 0}


# scales -------------------------------------------------------------------------------------------


def test_a_full_stop_belongs_to_the_sentence_that_it_ends():
    is_end = torch.tensor([[0, 1, 0, 0, 1, 0]]).bool()
    assert sentence_index(is_end).tolist() == [[0, 0, 1, 1, 1, 2]]


def test_a_summary_is_the_mean_of_a_sentence():
    sentence = torch.tensor([[0, 0, 1, 1, 1, 2]])
    x = normal(1, 6, 3)
    summary = summary_weights(sentence, 4).double() @ x
    torch.testing.assert_close(summary[0, 0], x[0, :2].mean(dim=0))
    torch.testing.assert_close(summary[0, 1], x[0, 2:5].mean(dim=0))
    assert (summary[0, 3] == 0).all(), "a sentence that does not exist"


def test_scale_mask_against_loops():
    sentence = torch.tensor([[0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 2, 3]])
    mask = scale_mask(sentence, ["words", "sentences", "story"], 5)
    assert mask.shape == (2, 3, 7, 12)
    for b in range(2):
        for t in range(7):
            own = sentence[b, t]
            for s in range(7):
                assert mask[b, 0, t, s] == (s <= t and sentence[b, s] == own)
                assert mask[b, 1, t, s] == (s == t)
                assert mask[b, 2, t, s] == (s <= t)
            for n in range(5):
                assert not mask[b, 0, t, 7 + n] and not mask[b, 2, t, 7 + n]
                # a summary may be used if its last word came before the own sentence
                assert mask[b, 1, t, 7 + n] == (n < own)


# models -------------------------------------------------------------------------------------------


def make_transformer(scales=SCALES, kind="dot", head_dim=4):
    """A model with random parameters. Its projections would start at zero and hide a leak."""
    cfg = Config(task="stories", kind=kind, head_dim=head_dim, scales=scales, n_embd=16)
    model = Transformer(cfg, 10, 20, 10, n_sentence=8)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model


IDX = torch.tensor([[1, 2, 3, STOP, 4, 5, STOP, 6, 7, 8, STOP, 1, 2, 3]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scales", ["words,words", "sentences,sentences", "story,story", SCALES])
@torch.no_grad()
def test_no_leak_bit_by_bit(kind, scales):
    """Whatever becomes of token t, also if a sentence now ends there, nothing before t moves."""
    model = make_transformer(scales, kind)
    before = model(IDX, IDX == STOP)
    for t in range(IDX.size(1)):
        for token in (0, STOP):
            changed = IDX.clone()
            changed[0, t] = token
            if torch.equal(changed, IDX):
                continue
            after = model(changed, changed == STOP)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t], before[:, t])


@torch.no_grad()
def test_what_each_scale_sees():
    """Word 5 stands in the second of four sentences. What follows it there are tokens 5 and 6."""
    changed = IDX.clone()
    changed[0, 5] = 0
    moved = {}
    for scale in ("words", "sentences", "story"):
        model = make_transformer(f"{scale},{scale}")
        difference = (model(IDX, IDX == STOP) - model(changed, changed == STOP)).abs().amax(dim=2)
        moved[scale] = (difference[0] > 0).nonzero().flatten().tolist()
    assert moved["words"] == [5, 6]
    assert moved["sentences"] == [5, *range(7, 14)], "the summary counts from the next sentence on"
    assert moved["story"] == list(range(5, 14))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient(kind):
    model = make_transformer(SCALES, kind)
    loss = F.cross_entropy(model(IDX, IDX == STOP).flatten(0, 1), IDX.flatten())
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name

    pointer = Pointer(Config(kind=kind), 20)
    pointer(torch.tensor([1, 2]), torch.tensor([[3, 4], [5, 6]])).softmax(dim=1)[0, 0].backward()
    for name, p in pointer.named_parameters():
        assert p.grad.abs().sum() > 0, name


def test_all_arms_have_equally_many_parameters():
    def count(model):
        return sum(p.numel() for p in model.parameters())

    by_scales = {count(make_transformer(scales)) for scales in demo_hierarchy.SCALES.values()}
    by_kind = {count(make_transformer(SCALES, kind)) for kind in KINDS}
    pointers = {count(Pointer(Config(kind=kind), 20)) for kind in KINDS}
    assert len(by_scales) == len(by_kind) == len(pointers) == 1


# the task of pairs --------------------------------------------------------------------------------


def slow_closest(query, candidates, parents):
    """Climb from the query until one of the candidates is met."""
    node = query
    while node in parents:
        node = parents[node]
        if node in candidates:
            return node
    return None


def test_the_balanced_tree():
    parents = train_hierarchy.balanced_tree(branches=3, depth=5)
    assert len(parents) == 363
    assert sorted(set(parents.values())) == list(range(121)), "inner nodes"
    depths = [len(train_hierarchy.ancestors(node, parents)) for node in range(364)]
    assert [depths.count(level) for level in range(6)] == [1, 3, 9, 27, 81, 243]


def test_the_answer_is_the_closest_ancestor():
    task = PairTask(Config(task="tree"))
    questions = list(zip(*task.batch(200, torch.Generator().manual_seed(3))))
    assert len(questions) == 200
    for query, candidates in questions:
        answer, *wrong = candidates.tolist()
        assert slow_closest(query.item(), [answer, *wrong], task.parents) == answer
        assert answer not in wrong
        for candidate in (answer, *wrong):
            assert not task.hidden[query, candidate], "a held-out pair is in a training question"


def test_held_out_questions_are_about_hidden_pairs():
    task = PairTask(Config(task="tree"))
    query, candidates = task.val_hidden
    assert task.hidden[query, candidates[:, 0]].all()
    assert (task.ranks[query, candidates[:, 0]] > 1).all(), "a parent is never held out"
    share = task.hidden.sum() / (task.ranks.isfinite() & (task.ranks > 1)).sum()
    assert share.item() == pytest.approx(0.1, abs=0.03)


def test_the_map_ranks_the_nearest_points():
    ranks = train_hierarchy.map_ranks(30, seed=4)
    points = torch.rand(30, 2, generator=torch.Generator().manual_seed(4))
    for q in range(30):
        others = [c for c in range(30) if c != q]
        others.sort(key=lambda c: math.dist(points[q], points[c]))
        assert [ranks[q, c].item() for c in others[:5]] == [1, 2, 3, 4, 5]
        assert not ranks[q].isfinite()[others[5:]].any()


@pytest.mark.parametrize("kind", ["euclidean", "hyperbolic"])
def test_a_pointer_learns_one_batch(kind):
    task = PairTask(Config(task="tree"))
    model = Pointer(Config(kind=kind, head_dim=8), 364)
    batch = task.batch(32, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(80):
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


# brackets and stories -----------------------------------------------------------------------------


def test_brackets_against_a_stack():
    task = BracketTask(Config(task="brackets"))
    tokens, types, depths = task.batch(50, torch.Generator().manual_seed(5))
    for row in range(50):
        stack = []
        for token, kind, depth in zip(*[x[row].tolist() for x in (tokens, types, depths)]):
            if token < task.TYPES:
                stack.append(token)
            else:
                assert stack.pop() == token - task.TYPES, "a bracket closes the innermost one"
            assert depth == len(stack) <= task.DEPTH
            assert kind == (stack[-1] if stack else task.TYPES)
    assert depths.max() >= 6


def test_only_hard_brackets_are_judged():
    """A model that repeats the type of the last opening bracket is right after opening brackets
    only, and these do not count."""

    class Repeater(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(1, 1)

        def forward(self, tokens):
            return F.one_hot(tokens % 4, 14).float()

    task = BracketTask(Config(task="brackets"))
    assert task.evaluate(Repeater())["type"] == pytest.approx(0.25, abs=0.03), "chance"


def test_copied_words_by_hand():
    task = StoryTask(Config(task="stories"))
    words = "Write a story about a dog named Sam . Sam saw a dog . Sam was sad . Mia saw Mia ."
    ids = [task.BEGIN] + [task.number[word] for word in words.split()]
    row = torch.zeros(task.BLOCK_SIZE + 1, dtype=torch.long)
    row[: len(ids)] = torch.tensor(ids)
    targets = row[1:][task.copied(row[None])[0]].tolist()
    assert targets == [task.number[word] for word in ("Sam", "dog", "Sam")]


def test_padding_has_no_loss():
    task = StoryTask(Config(task="stories"))
    model = task.make_model(Config(task="stories", n_embd=16))
    losses = task.word_losses(model, task.val[:5])
    assert ((losses > 0) == (task.val[:5, 1:] != task.PAD)).all()
    assert losses[losses > 0].mean().item() == pytest.approx(math.log(len(task.number)), rel=0.2)


# the demo's words ---------------------------------------------------------------------------------


def test_compare_needs_ranges_that_do_not_overlap():
    assert demo_hierarchy.compare([0.7, 0.8], [0.5, 0.6]) == "above"
    assert demo_hierarchy.compare([0.5, 0.6], [0.7, 0.8]) == "below"
    assert demo_hierarchy.compare([0.5, 0.7], [0.6, 0.8]) == "no difference from"


# the scripts --------------------------------------------------------------------------------------

# Runs the scripts one after the other in one process, because importing torch takes longest.
DRIVER = """
import runpy, sys
here, *jobs = sys.argv[1:]
sys.path[:0] = [here, here + "/.."]
for job in jobs:
    name, *options = job.split()
    sys.argv = [name, "--device=cpu", *options]
    runpy.run_path(f"{here}/{name}.py", run_name="__main__")
"""


def test_all_scripts_run(tmp_path):
    edges = tmp_path / "edges.tsv"
    edges.write_text("b\ta\nc\tb\nd\tb\ne\tc\nf\tc\ng\te\n\nh\tg\ni\th\nj\ti\nk\tj\nl\tk\n")
    jobs = [
        f"train_hierarchy --steps=2 --eval_every=1 --data={edges} --out={tmp_path}/tree",
        f"train_hierarchy --steps=2 --task=map --kind=dot --head_dim=3 --out={tmp_path}/map",
        f"train_hierarchy --steps=2 --task=brackets --out={tmp_path}/brackets",
        f"train_hierarchy --steps=2 --task=stories --scales={SCALES} --out={tmp_path}/stories",
        f"demo_hierarchy --steps=1 --tasks=tree,stories --out={tmp_path}/demo",
        f"demo_hierarchy --steps=1 --tasks=map --seeds=2 --out={tmp_path}/demo2",
    ]
    command = [sys.executable, "-c", DRIVER, str(FOLDER), *jobs]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    expected = {
        "tree": {"seen", "held_out"},
        "map": {"seen", "held_out"},
        "brackets": {"type", "depth"},
        "stories": {"nats", "nats_copied"},
    }
    for task, measures in expected.items():
        metrics = json.loads((tmp_path / task / "train_hierarchy.json").read_text())
        assert measures <= set(metrics) and metrics["steps"] == 2
        assert len((tmp_path / task / "train_hierarchy.jsonl").read_text().splitlines()) == 2
        assert (tmp_path / task / "train_hierarchy.png").stat().st_size > 5000

    demo = json.loads((tmp_path / "demo/demo_hierarchy.json").read_text())
    assert set(demo["tree"]) == set(demo_hierarchy.arms_of("tree", [2, 4, 8, 16]))
    assert len(demo["tree"]["hyperbolic 2"]) == 1
    assert set(demo["stories"]) == set(demo_hierarchy.SCALES)
    assert (tmp_path / "demo/demo_hierarchy.png").exists()
    assert (tmp_path / "demo/demo_hierarchy_scales.png").exists()
    demo = json.loads((tmp_path / "demo2/demo_hierarchy.json").read_text())
    assert len(demo["map"]["dot 2"]) == 2
    assert demo["map"]["dot 2"][0]["seen"] != demo["map"]["dot 2"][1]["seen"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("b\ta\nc\tb\na\tc\n", "cycle"),
        ("b\ta\nc\ta\nb\tc\n", "'b' already has a parent"),
        ("b a\n", "line 1: expected CHILD<tab>PARENT"),
        ("b\ta\nc\ta\n", "no node has a grandparent"),
        ("", "is empty"),
    ],
)
def test_a_bad_tree_is_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "edges.tsv"
    path.write_text(text)
    with pytest.raises(SystemExit) as error:
        PairTask(Config(task="tree", data=str(path)))
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(4))
def test_a_small_tree_has_a_held_out_pair(tmp_path, seed):
    path = tmp_path / "edges.tsv"
    path.write_text("dog\tpet\npet\tanimal\ncat\tpet\nwolf\twild\nwild\tanimal\n")
    task = PairTask(Config(task="tree", data=str(path), seed=seed))
    assert len(task.hidden_pairs) > 0
    assert (task.ranks[task.hidden] > 1).all(), "a parent is never held out"


def test_bad_options_end_with_one_line():
    """The options of one script in a process of its own: exit code 2 and a single line."""
    command = [sys.executable, str(FOLDER / "train_hierarchy.py"), "--kind=curved"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "kind=curved must be one of" in done.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head_dim": 0}, "head_dim=0 must be at least 1"),
        ({"task": "tre"}, "task=tre must be one of"),
        ({"task": "map", "data": "edges.tsv"}, "it needs task=tree"),
        ({"scales": "words,pages"}, "'pages' is not one of"),
        ({"task": "stories", "scales": "words,words,story"}, "must be divisible by"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(AssertionError, match=message):
        Config(**options)
