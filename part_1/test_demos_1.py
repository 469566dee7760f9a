"""Part 1's demos: their mathematics against independent statements of it, and each script as a user runs it."""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import subprocess
from dataclasses import asdict

import numpy as np
import pytest
import torch

import demo_attention_by_hand as hand
import demo_block as block
import demo_heads as heads
import demo_mlp as mlp
import demo_positions as positions
from model import Attention, GPTConfig, causal_mask
from shared import save_checkpoint
from train import ALPHABET, GPT, sinusoids

HERE = Path(__file__).resolve().parent
CFG = GPTConfig(vocab_size=len(ALPHABET), block_size=8, n_layer=2, n_head=2, n_embd=16)
CPU = torch.device("cpu")

def randomised(module, seed=0):
    """Every matrix random: c_proj starts at zero and would hide the heads."""
    torch.manual_seed(seed)
    for p in module.parameters():
        p.ndim == 2 and torch.nn.init.normal_(p, std=0.4)
    return module

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("stack") / "gpt.pt"
    model = randomised(GPT(CFG, "learned"))
    save_checkpoint(path, kind="gpt", gpt_config=asdict(CFG), weights=model.state_dict(), positions="learned")
    return path

# positions -----------------------------------------------------------------------------------------------------------

def test_sinusoids_depend_on_distance_alone_and_noise_does_not():
    assert positions.explained(positions.cosines(sinusoids(16, 64))) == pytest.approx(1, abs=1e-4)
    noise = [positions.explained(positions.cosines(torch.randn(16, 64, generator=torch.Generator().manual_seed(s))))
             for s in range(40)]
    assert np.mean(noise) == pytest.approx(14 / 119, abs=0.03)  # 15 means fitted to 120 numbers

def test_cosine_of_sinusoids_is_the_papers_sum():
    speeds = 10000.0 ** -(np.arange(0, 8, 2) / 8)
    found = positions.cosines(sinusoids(6, 8))
    assert found[1, 4].item() == pytest.approx(np.cos(3 * speeds).mean(), abs=1e-5)

def test_paired():
    scores = torch.zeros(2, 4, 4)
    scores[0, 2, 1] = scores[0, 3, 0] = 1  # "ab|b": the | must look at b, the b at a
    scores[1, 2, 1] = scores[1, 3, 1] = 1
    assert positions.paired(scores).tolist() == [1, 0.5]

def test_position_scores_are_the_models_own():
    """With all letters alike, the first block's attention weights are the softmax of these scores."""
    model = randomised(GPT(CFG, "learned"))
    model.wte.weight.data[:] = model.wte.weight.data[0]
    model(torch.zeros(1, 8, dtype=torch.long))
    torch.testing.assert_close(positions.position_scores(model).softmax(dim=-1), model.h[0].attn.weights[0])

# attention by hand ---------------------------------------------------------------------------------------------------

def test_by_hand_against_loops_and_against_the_model():
    x, *W = hand.inputs(3, 4, seed=5)
    step = hand.by_hand(x, *W)
    for t in range(3):
        e = [math.exp(sum((x[t] @ W[0]) * (x[s] @ W[1])) / 2) for s in range(t + 1)]  # sqrt(D) = 2
        expected = sum(e[s] / sum(e) * (x[s] @ W[2]) for s in range(t + 1))
        np.testing.assert_allclose(step["output"][t], expected, atol=1e-12)
    assert max(hand.differences(step, *W)) < 1e-12
    step["output"] = step["output"] + 0.1
    assert max(hand.differences(step, *W)) > 0.05  # the check can fail

# heads ---------------------------------------------------------------------------------------------------------------

def test_head_by_head_is_the_module():
    attn, x, pos = randomised(Attention(CFG)), torch.randn(3, 8, 16), torch.arange(8)
    mask = causal_mask(pos, pos)
    expected = attn(x, mask)
    torch.testing.assert_close(heads.one_by_one(attn, x, mask), expected)
    steps = heads.trace(attn, x, mask)
    torch.testing.assert_close(steps[-1][1], expected)
    assert [tuple(a.shape) for _, a in steps[2:5]] == [(3, 8, 2, 8), (3, 2, 8, 8), (3, 2, 8, 8)]

def test_a_silent_head_is_one_whose_columns_of_c_proj_are_zero():
    model = randomised(GPT(CFG, "learned"))
    x = torch.randint(26, (50, 8))
    y = model(x)[:, 4:].argmax(dim=-1)  # what it says itself counts as right
    whole, without = heads.right(model, x, y), heads.right(model, x, y, [(1, 0)])
    assert whole.all() and not without.all() and heads.right(model, x, y).all()  # the hook has gone
    model.h[1].attn.c_proj.weight.data[:, :8] = 0
    assert torch.equal(without, model(x)[:, 4:].argmax(dim=-1) == y)

# the MLP, the block --------------------------------------------------------------------------------------------------

def test_gelu_multiplies_in_four_channels():
    """ab from gelu alone, as the docstring says; an identity in its place misses all of the variance."""
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)) / 20  # where the square is good
    square = lambda z: torch.nn.functional.gelu(z) + torch.nn.functional.gelu(-z)
    second = 2 * math.sqrt(2 / math.pi)  # gelu(z) + gelu(-z) = sqrt(2 / pi) z^2 + ...
    assert torch.allclose((square(a + b) - square(a - b)) / (2 * second), a * b, atol=1e-4, rtol=0.05)
    cfg = mlp.Config(n_embd=4, steps=150, batch_size=64, lr=0.03)
    assert mlp.fit(16, torch.nn.GELU(), cfg, 0, CPU) < 0.5 < 0.9 < mlp.fit(16, torch.nn.Identity(), cfg, 0, CPU)

def test_slope_and_measure():
    assert block.slope([2, 4, 8], [3 * n ** -0.5 for n in (2, 4, 8)]) == pytest.approx(-0.5)
    length, cosine = block.measure(torch.tensor([[[3.0, 4.0], [0.0, 5.0]]]))
    assert (length, cosine) == (pytest.approx(5), pytest.approx(0.8))

def test_last_gradients_by_depth():
    """Xiong et al. 2020, theorem 1: flat in post-norm, a slope of about -1/2 in pre-norm."""
    cfg = block.Config(n_embd=32, batch_size=4)
    last = {kind: [np.mean([block.at_start(kind, depth, cfg, seed, CPU)[2][-1] for seed in (0, 1)])
                   for depth in (2, 8)] for kind in block.KINDS[:2]}
    assert -0.7 < block.slope([2, 8], last["pre-norm"]) < -0.3 < block.slope([2, 8], last["post-norm"]) < 0.2

def test_post_norm_keeps_the_length_and_no_residual_makes_tokens_alike():
    cfg = block.Config(n_embd=32, batch_size=2)
    length = {kind: block.at_start(kind, 6, cfg, 0, CPU)[0] for kind in block.KINDS}
    assert length["post-norm"][-1] == pytest.approx(32**0.5, rel=0.01)
    assert length["pre-norm"][-1] > 1.2 * 32**0.5
    cosine = {kind: block.at_start(kind, 6, cfg, 0, CPU)[1][-1] for kind in block.KINDS}
    assert cosine["no residual"] > 0.95 > cosine["pre-norm"]

# scripts -------------------------------------------------------------------------------------------------------------

SMOKE = {
    "demo_positions": (["--steps=2", "--batch_size=4", "--block_size=6"], ["_matrices", "_products"], "distance_after"),
    "demo_attention_by_hand": (["--tokens=one two three"], [""], "difference_module"),
    "demo_heads": (["--batch_size=20", "--init"], ["_shapes", "_ablation"], "right"),
    "demo_mlp": (["--widths=1,4", "--steps=4"], [""], "missed"),
    "demo_block": (["--depths=1,2", "--seeds=1", "--n_embd=16", "--init"], [""], "pre-norm"),
}

@pytest.mark.parametrize("name", SMOKE)
def test_smoke(name, tmp_path, checkpoint):
    options, figures, key = SMOKE[name]
    options = [f"--init={checkpoint}" if option == "--init" else option for option in options]
    done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *options, "--device=cpu", f"--out={tmp_path}"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert key in json.loads((tmp_path / f"{name}.json").read_text())
    assert all((tmp_path / f"{name}{end}.png").stat().st_size > 10_000 for end in figures)
