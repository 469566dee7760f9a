"""
Tests of Part 1's demos: their mathematics against slower statements of it, and a tiny run of each.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import os
import subprocess
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn as nn

import demo_attention_by_hand
import demo_block
import demo_heads
import demo_mlp
import demo_positions
import demo_visualize_multi_head
from model import Attention, Block, GPTConfig, causal_mask
from shared import parse_args, save_checkpoint
from train import ALPHABET, GPT, get_batch, sinusoids
from train import Config as TrainConfig

HERE = Path(__file__).resolve().parent
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
CPU = torch.device("cpu")
CFG = GPTConfig(vocab_size=len(ALPHABET), block_size=8, n_layer=2, n_head=2, n_embd=16)
N = 4  # letters in a word

# One process runs all the demos, because importing torch takes longer than they do.
RUNNER = """
import json, runpy, sys, torch
folder, jobs = sys.argv[1:]
sys.path.insert(0, folder)
for name, *options in json.loads(jobs):
    torch.set_num_threads(2)
    sys.argv = [name, *options]
    runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
    print(f"{name} has used {torch.get_num_threads()} threads")
"""


def randomize(module, seed=0):
    """Makes every matrix random. The output projections of a new block are zero, which would hide
    the heads."""
    torch.manual_seed(seed)
    for p in module.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.4)
    return module


def assert_close(actual, expected):
    """The tolerance is relative to the largest number."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A file like that of train.py, with a small random model."""
    path = tmp_path_factory.mktemp("checkpoint") / "gpt.pt"
    model = randomize(GPT(CFG, "learned"))
    save_checkpoint(
        path,
        kind="gpt",
        gpt_config=asdict(CFG),
        weights=model.state_dict(),
        positions="learned",
    )
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, checkpoint):
    """A tiny run of each demo -> the folder with all that they write, and what they print."""
    folder = tmp_path_factory.mktemp("demos")
    common = [f"--out={folder}", "--device=cpu"]
    init = f"--init={checkpoint}"
    small_training = ["--steps=2", "--batch_size=4", "--block_size=6", "--seeds=2"]
    jobs = [
        ["demo_attention_by_hand", f"--out={folder}", "--tokens=one two three four"],
        ["demo_positions", *common, *small_training],
        ["demo_mlp", *common, "--widths=4,1", "--steps=4", "--seeds=2"],
        ["demo_heads", *common, init, "--batch_size=20"],
        ["demo_visualize_multi_head", *common, init, "--word=frog", "--batch_size=3"],
        ["demo_block", *common, init, "--depths=2,1", "--seeds=2", "--n_embd=16"],
    ]
    command = [sys.executable, "-c", RUNNER, str(HERE), json.dumps(jobs)]
    result = subprocess.run(command, env=ENV, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def read_numbers(made, name):
    return json.loads((made[0] / f"{name}.json").read_text())


def refuse(config, *options):
    """Asserts that these options of a demo end its run with exit code 2."""
    with pytest.raises(SystemExit) as error:
        parse_args(config, argv=list(options))
    assert error.value.code == 2


@pytest.mark.parametrize(
    "name",
    [
        "demo_attention_by_hand",
        "demo_positions_matrices",
        "demo_positions_products",
        "demo_mlp",
        "demo_heads_shapes",
        "demo_heads_ablation",
        "demo_visualize_multi_head",
        "demo_block",
    ],
)
def test_a_figure_is_a_picture(made, name):
    picture = (made[0] / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


@pytest.mark.parametrize("name", ["demo_positions", "demo_mlp", "demo_heads", "demo_block"])
def test_the_option_threads_is_obeyed(made, name):
    """Its default is 1. Before each demo there are 2, which others leave as they are."""
    assert f"{name} has used 1 threads" in made[1]
    assert "demo_visualize_multi_head has used 2 threads" in made[1]


# demo_attention_by_hand ---------------------------------------------------------------------------


def test_attention_by_hand_against_loops():
    inputs = demo_attention_by_hand.make_inputs(3, 4, seed=5)
    output = demo_attention_by_hand.attend_by_hand(inputs)["output = weights v"]
    for t in range(3):
        query = inputs.x[t] @ inputs.Wq
        exponentials = []
        for s in range(t + 1):
            score = query @ (inputs.x[s] @ inputs.Wk) / 2  # sqrt(D) = 2
            exponentials.append(math.exp(score))
        expected = np.zeros(4)
        for s in range(t + 1):
            expected += exponentials[s] / sum(exponentials) * (inputs.x[s] @ inputs.Wv)
        np.testing.assert_allclose(output[t], expected, atol=1e-12)


def test_the_comparison_with_the_model_can_fail():
    inputs = demo_attention_by_hand.make_inputs(3, 4, seed=5)
    steps = demo_attention_by_hand.attend_by_hand(inputs)
    assert max(demo_attention_by_hand.compare_with_model(inputs, steps)) < 1e-12

    steps["output = weights v"] = steps["output = weights v"] + 0.1
    differences = demo_attention_by_hand.compare_with_model(inputs, steps)
    assert differences.output == pytest.approx(0.1)
    assert differences.module == pytest.approx(0.1)
    assert differences.weights < 1e-12


def test_another_last_token_moves_the_last_output_only():
    inputs = demo_attention_by_hand.make_inputs(4, 4, seed=1)
    steps = demo_attention_by_hand.attend_by_hand(inputs)
    moved = demo_attention_by_hand.change_last_token(inputs, steps)
    assert moved[:-1].tolist() == [0, 0, 0]
    assert moved[-1] > 0.1


def test_demo_attention_by_hand_runs(made):
    numbers = read_numbers(made, "demo_attention_by_hand")
    assert numbers["tokens"] == ["one", "two", "three", "four"]
    np.testing.assert_allclose(np.sum(numbers["weights"], axis=1), np.ones(4))
    assert numbers["difference_module"] < 1e-9


def test_without_tokens_there_is_no_attention(capsys):
    refuse(demo_attention_by_hand.Config, "--tokens= ")
    assert "at least one word" in capsys.readouterr().err


# demo_positions -----------------------------------------------------------------------------------


def test_the_cosine_of_two_sinusoids_is_a_sum_over_their_distance():
    """Vaswani et al. 2017, section 3.5: each pair of channels adds cos(speed x distance)."""
    speeds = 10000.0 ** -(np.arange(0, 8, 2) / 8)
    cosines = demo_positions.cosines(sinusoids(6, 8))
    assert cosines[1, 4].item() == pytest.approx(np.cos(3 * speeds).mean(), abs=1e-5)


def test_distance_explains_sinusoids_and_not_noise():
    table = sinusoids(16, 64)
    assert demo_positions.explained_by_distance(table) == pytest.approx(1, abs=1e-4)

    shares = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(16, 64, generator=generator)
        shares.append(demo_positions.explained_by_distance(noise))
    expected = demo_positions.expected_of_noise(16)
    assert expected == pytest.approx(14 / 119)  # 15 means are fitted to 120 numbers
    assert np.mean(shares) == pytest.approx(expected, abs=0.03)


def test_share_of_the_rows_that_are_paired():
    """The bar of "ab|b" must look at the b, and the b after it at the a."""
    scores = torch.zeros(2, 4, 4)
    scores[0, 2, 1] = 1
    scores[0, 3, 0] = 1
    scores[1, 2, 1] = 1
    scores[1, 3, 1] = 1
    assert demo_positions.share_paired(scores).tolist() == [1, 0.5]


def test_the_scores_of_positions_are_those_of_the_model():
    """If all letters are alike, their softmax is the first block's attention."""
    model = randomize(GPT(CFG, "learned"))
    model.wte.weight.data[:] = model.wte.weight.data[0]
    model(torch.zeros(1, 8, dtype=torch.long))
    weights = demo_positions.position_scores(model).softmax(dim=-1)
    assert_close(weights, model.h[0].attn.weights[0])


def test_demo_positions_runs(made):
    numbers = read_numbers(made, "demo_positions")
    assert numbers["distance_sinusoids"] == pytest.approx(1, abs=1e-4)
    for name in ("distance_before", "distance_after", "longer", "paired_after", "accuracy"):
        assert len(numbers[name]) == 2
    assert numbers["distance_before"][0] != numbers["distance_before"][1]  # two seeds


@pytest.mark.parametrize("block_size", [2, 7])
def test_positions_that_make_no_words(block_size, capsys):
    refuse(demo_positions.Config, f"--block_size={block_size}")
    assert f"block_size={block_size}" in capsys.readouterr().err


# demo_mlp -----------------------------------------------------------------------------------------


def test_gelu_multiplies_with_four_channels():
    """The docstring's formula, for numbers near 0: gelu(z) + gelu(-z) is sqrt(2 / pi) z^2."""
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)) / 20

    def square(z):
        both = nn.functional.gelu(z) + nn.functional.gelu(-z)
        return both / math.sqrt(2 / math.pi)

    product = (square(a + b) - square(a - b)) / 4
    torch.testing.assert_close(product, a * b, atol=1e-4, rtol=0.05)


def test_products_of_neighbours():
    x = torch.tensor([[2.0, 3.0, 5.0]])
    assert demo_mlp.products(x).tolist() == [[10, 6, 15]]


def test_only_a_nonlinear_mlp_learns_products():
    cfg = demo_mlp.Config(n_embd=4, steps=150, batch_size=64, lr=0.03)
    assert demo_mlp.fit(16, nn.GELU(), cfg, 0, CPU) < 0.5
    assert demo_mlp.fit(16, nn.Identity(), cfg, 0, CPU) > 0.9


def test_widths_are_sorted_numbers():
    assert demo_mlp.parse_widths("4,0.5") == [0.5, 4]


@pytest.mark.parametrize("widths", ["0,1", "wide", "1,,2", ""])
def test_widths_that_are_no_widths(widths):
    with pytest.raises(SystemExit) as error:
        demo_mlp.parse_widths(widths)
    assert error.value.code == 2


def test_demo_mlp_runs(made):
    numbers = read_numbers(made, "demo_mlp")
    assert list(numbers["missed"])[:2] == ["GELU_1C", "GELU_4C"]
    assert len(numbers["missed"]) == 6
    for first, second in numbers["missed"].values():
        assert first != second  # two seeds


# demo_heads ---------------------------------------------------------------------------------------


def test_the_steps_of_the_heads_end_in_the_modules_output():
    attn = randomize(Attention(CFG))
    x = torch.randn(3, 8, 16)
    mask = causal_mask(torch.arange(8), torch.arange(8))
    expected = attn(x, mask)
    assert_close(demo_heads.attend_head_by_head(attn, x, mask), expected)

    steps = demo_heads.trace(attn, x, mask)
    assert_close(steps[-1].tensor, expected)
    assert_close(steps[4].tensor, attn.weights)
    sizes = {"B": 3, "T": 8, "C": 16, "H": 2, "D": 8, "S": 8}
    for step in steps:
        assert list(step.tensor.shape) == [sizes[letter] for letter in step.layout]


def test_a_silent_head_has_no_columns_in_c_proj():
    model = randomize(GPT(CFG, "learned"))
    x = torch.randint(26, (50, 8))
    y = model(x)[:, N:].argmax(dim=-1)  # what the model says itself counts as right
    whole = demo_heads.correct_letters(model, x, y)
    silenced = demo_heads.correct_letters(model, x, y, silent=[(1, 1)])
    assert whole.all()
    assert not silenced.all()
    assert demo_heads.correct_letters(model, x, y).all()  # the hook is gone

    model.h[1].attn.c_proj.weight.data[:, 8:] = 0
    assert torch.equal(silenced, model(x)[:, N:].argmax(dim=-1) == y)


def test_cases_of_silent_heads():
    cases = demo_heads.list_cases(2, 2)
    assert cases == {
        "nothing": [],
        "layer 1, head 1": [(0, 0)],
        "layer 1, head 2": [(0, 1)],
        "layer 2, head 1": [(1, 0)],
        "layer 2, head 2": [(1, 1)],
        "all of layer 1 but head 1": [(0, 1)],
        "all of layer 1 but head 2": [(0, 0)],
        "all of layer 2 but head 1": [(1, 1)],
        "all of layer 2 but head 2": [(1, 0)],
        "all of layer 1": [(0, 0), (0, 1)],
        "all of layer 2": [(1, 0), (1, 1)],
    }


def test_the_error_is_that_of_a_mean_over_words():
    """Two words right, two wrong: a standard deviation of sqrt(1/3) over 4 words."""
    correct = torch.tensor([[True] * 3, [True] * 3, [False] * 3, [False] * 3])
    accuracy = demo_heads.mean_and_error(correct)
    assert accuracy.share == pytest.approx(0.5)
    assert accuracy.two_errors == pytest.approx(2 * math.sqrt(1 / 3) / 2)


def test_spared_heads_are_counted_within_the_errors():
    cases = demo_heads.list_cases(1, 3)
    accuracies = {name: demo_heads.Accuracy(0.2, 0.01) for name in cases}
    accuracies["nothing"] = demo_heads.Accuracy(0.9, 0.01)
    accuracies["layer 1, head 2"] = demo_heads.Accuracy(0.885, 0.01)
    assert demo_heads.count_spared(accuracies, cases) == 1


def test_demo_heads_runs(made):
    numbers = read_numbers(made, "demo_heads")
    assert list(numbers["right"]) == list(demo_heads.list_cases(2, 2))
    assert numbers["words"] == 20
    assert numbers["difference_heads"] < 1e-4


def test_a_checkpoint_of_another_part_is_refused(tmp_path, capsys):
    path = tmp_path / "gpt.pt"
    save_checkpoint(path, kind="gpt", gpt_config=asdict(CFG), weights={})
    for demo in (demo_heads, demo_visualize_multi_head):
        with pytest.raises(SystemExit):
            demo.load_model(demo.Config(init=str(path)), path, CPU)
        assert "must be a checkpoint of part_1/train.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        demo_block.measure_trained_stack(path, demo_block.Config(init=str(path)), CPU)
    assert "must be a checkpoint of part_1/train.py" in capsys.readouterr().err


# demo_visualize_multi_head ------------------------------------------------------------------------


def test_the_shares_of_a_head_that_reads_backwards():
    """In the answer's rows layer 1 looks at the letter to say, and layer 2 at the token itself."""
    weights = torch.zeros(2, 3, 2, 8, 8)  # (L, B, H, T, T)
    text = "abcd|dcb"
    answer = "dcba"
    for row in range(8):
        weights[1, :, :, row, row] = 1
        if row >= N:
            weights[0, :, :, row, text.index(answer[row - N])] = 1
    on_letter = demo_visualize_multi_head.share_on_letter(weights, N)
    on_itself = demo_visualize_multi_head.share_on_itself(weights, N)
    assert on_letter.tolist() == [[1, 1], [0, 0]]
    assert on_itself.tolist() == [[0, 0], [1, 1]]


def test_the_weights_are_those_of_every_layer():
    model = randomize(GPT(CFG, "learned"))
    idx = torch.randint(26, (5, 8))
    weights = demo_visualize_multi_head.attention_weights(model, idx)
    assert weights.shape == (2, 5, 2, 8, 8)
    assert_close(weights.sum(dim=-1), torch.ones(2, 5, 2, 8))
    assert_close(weights[1], model.h[1].attn.weights)


def test_demo_visualize_multi_head_runs(made):
    numbers = read_numbers(made, "demo_visualize_multi_head")
    for layer in (1, 2):
        for head in (1, 2):
            for kind in ("next_letter", "itself"):
                assert 0 <= numbers[f"layer_{layer}_head_{head}_{kind}"] <= 1


@pytest.mark.parametrize("word", ["FROG", "fr|g", "fr g", ""])
def test_a_word_with_other_characters_than_letters(word, capsys):
    refuse(demo_visualize_multi_head.Config, f"--word={word}")
    assert f"word={word} must have letters" in capsys.readouterr().err


def test_a_word_of_another_length(tmp_path, checkpoint):
    script = HERE / "demo_visualize_multi_head.py"
    options = [f"--init={checkpoint}", "--word=frogs", f"--out={tmp_path}"]
    command = [sys.executable, script, *options]
    result = subprocess.run(command, env=ENV, text=True, capture_output=True)
    assert result.returncode == 2
    assert "--word=frogs must have 4 letters" in result.stderr
    assert result.stderr.count("\n") == 1


# demo_block ---------------------------------------------------------------------------------------


def test_slope_of_a_power():
    depths = [2, 4, 8]
    values = [3 * depth**-0.5 for depth in depths]
    assert demo_block.fit_slope(depths, values) == pytest.approx(-0.5)


def test_length_and_cosine_of_two_tokens():
    x = torch.tensor([[[3.0, 4.0], [0.0, 10.0]]])
    assert demo_block.mean_length(x) == pytest.approx(7.5)
    assert demo_block.mean_cosine(x) == pytest.approx(0.8)


def last_gradient(kind, depth, cfg):
    """The gradient norm in the last layer, as a mean over two seeds."""
    norms = []
    for seed in (0, 1):
        stack = demo_block.measure_new_stack(kind, depth, cfg, seed, CPU)
        assert len(stack.gradients) == depth
        norms.append(stack.gradients[-1])
    return np.mean(norms)


def test_the_last_gradient_falls_with_the_depth_in_pre_norm_only():
    """Xiong et al. 2020, theorem 1: a slope of about -1/2 in pre-norm, and 0 in post-norm."""
    cfg = demo_block.Config(n_embd=32, batch_size=4)
    slopes = {}
    for kind in ("pre-norm", "post-norm"):
        norms = [last_gradient(kind, depth, cfg) for depth in (2, 8)]
        slopes[kind] = demo_block.fit_slope([2, 8], norms)
    assert -0.7 < slopes["pre-norm"] < -0.3
    assert -0.3 < slopes["post-norm"] < 0.2


def test_post_norm_keeps_the_length_and_no_residual_makes_tokens_alike():
    cfg = demo_block.Config(n_embd=32, batch_size=2)
    stacks = {}
    for kind in demo_block.KINDS:
        stacks[kind] = demo_block.measure_new_stack(kind, 6, cfg, 0, CPU)
        assert len(stacks[kind].lengths) == 7
    normed_length = math.sqrt(32)
    assert stacks["post-norm"].lengths[-1] == pytest.approx(normed_length, rel=0.01)
    assert stacks["pre-norm"].lengths[-1] > 1.2 * normed_length
    assert stacks["no residual"].cosines[-1] > 0.95
    assert stacks["pre-norm"].cosines[-1] < 0.95


def test_the_trained_stack_is_measured_as_the_model_computes_it(checkpoint):
    """The last length must be that of the stream which the model's last norm gets."""
    cfg = demo_block.Config(batch_size=6)
    lengths = demo_block.measure_trained_stack(checkpoint, cfg, CPU)
    model = randomize(GPT(CFG, "learned"))
    streams = []
    model.ln_f.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0]))
    x, _ = get_batch(-1, TrainConfig(batch_size=6), 8)
    model(x)
    assert len(lengths) == 3
    expected = streams[0].norm(dim=-1).mean().item()
    assert lengths[-1] == pytest.approx(expected, rel=1e-4)


def test_a_new_block_shows_what_each_kind_adds():
    """Its branches give 0, so only residuals and norms act."""
    block = Block(CFG)
    x = torch.randn(2, 8, 16)
    mask = causal_mask(torch.arange(8), torch.arange(8))
    assert torch.equal(demo_block.apply_block(block, x, mask, "pre-norm"), x)
    normed = nn.functional.layer_norm(x, (16,))
    post_norm = demo_block.apply_block(block, x, mask, "post-norm")
    torch.testing.assert_close(post_norm, normed, atol=1e-3, rtol=1e-3)
    for kind in ("no residual", "no residual, no norm"):
        assert not demo_block.apply_block(block, x, mask, kind).any()


def test_without_norms_the_length_of_the_input_matters():
    block = randomize(Block(CFG))
    x = torch.randn(2, 8, 16)
    mask = causal_mask(torch.arange(8), torch.arange(8))
    growth = {}
    for kind in ("no residual", "no residual, no norm"):
        short = demo_block.apply_block(block, x, mask, kind)
        long = demo_block.apply_block(block, 10 * x, mask, kind)
        growth[kind] = (long.norm() / short.norm()).item()
    assert growth["no residual"] == pytest.approx(1, abs=0.01)
    assert growth["no residual, no norm"] > 3


def test_demo_block_runs(made):
    numbers = read_numbers(made, "demo_block")
    assert numbers["depths"] == [1, 2]
    for kind in ("pre-norm", "post-norm", "no_residual", "no_residual_no_norm"):
        assert len(numbers[kind]["slope"]) == 2
        assert numbers[kind]["last_gradient"] > 0
    assert len(numbers["lengths_trained"]) == 3


@pytest.mark.parametrize("depths", ["4", "4,4", "0,2", "two,4", ""])
def test_depths_without_a_slope(depths):
    with pytest.raises(SystemExit) as error:
        demo_block.parse_depths(depths)
    assert error.value.code == 2
