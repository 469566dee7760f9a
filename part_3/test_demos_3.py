"""Part 3's demos on norms, RoPE and SwiGLU: their mathematics against an independent statement, a smoke run of each."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import demo_norms
import demo_rope
import demo_swiglu
from model import GPT, GPTConfig, RMSNorm

HERE = Path(__file__).resolve().parent
SIZES = dict(block_size=8, n_layer=1, n_head=2, n_embd=16)
TINY = ["--steps=10", "--batch_size=2", "--seeds=2", *(f"--{key}={value}" for key, value in SIZES.items())]

RUNNER = """
import json, runpy, sys
folder, jobs = sys.argv[1:]
sys.path.insert(0, folder)
for name, *options in json.loads(jobs):
    sys.argv = [name, *options]
    runpy.run_path(f"{folder}/demo_{name}.py", run_name="__main__")
"""

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One process runs all the demos with tiny sizes, because importing torch takes longer than they do -> out/."""
    folder = tmp_path_factory.mktemp("demos")
    (folder / "text.txt").write_text("the fox ran. Tom hid the dog. " * 40)
    common = [f"--out={folder}", f"--data={folder / 'text.txt'}", *TINY]
    jobs = [(name, *common) for name in ("norms", "rope", "swiglu")]
    done = subprocess.run([sys.executable, "-c", RUNNER, str(HERE), json.dumps(jobs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder

def numbers(made, name):
    return json.loads((made / f"demo_{name}.json").read_text())

def test_layernorm_against_torch():
    ours, theirs = demo_norms.LayerNorm(16), torch.nn.LayerNorm(16)
    x = 3 + 2 * torch.randn(5, 16)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)

def test_swap_replaces_every_norm_and_nothing_else():
    torch.manual_seed(0)
    before = GPT(GPTConfig(**SIZES))
    torch.manual_seed(0)
    after = demo_norms.swap(GPT(GPTConfig(**SIZES)), demo_norms.LayerNorm)
    count = lambda model, kind: sum(isinstance(m, kind) for m in model.modules())
    assert count(after, RMSNorm) == 0 and count(after, demo_norms.LayerNorm) == count(before, RMSNorm) == 5
    for name, p in before.named_parameters():
        assert torch.equal(p, after.get_parameter(name)), name

def test_layer_grads():
    model, x = GPT(GPTConfig(**{**SIZES, "n_layer": 2})), torch.randint(256, (2, 9))
    model(x[:, :-1], x[:, 1:])[1].backward()
    for found, block in zip(demo_norms.layer_grads(model), model.h):
        flat = torch.cat([m.weight.grad.flatten() for m in block.modules() if isinstance(m, torch.nn.Linear)])
        assert found == pytest.approx(flat.norm().item(), rel=1e-5) and found > 0

def test_turned_against_complex_numbers():
    x, pos = torch.randn(16), torch.tensor([0, 1, 7, 100])
    theta = 10000.0 ** (-torch.arange(8) / 8)
    wanted = torch.complex(x[:8], x[8:]) * torch.polar(torch.ones(4, 8), pos[:, None] * theta)
    torch.testing.assert_close(demo_rope.turned(x, pos, 10000.0), torch.cat([wanted.real, wanted.imag], dim=-1))

def test_shift_error_is_rounding_and_can_fail(monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, 32)
    assert 0 < demo_rope.shift_error(q, k, 10000.0) < 1e-2
    monkeypatch.setattr(demo_rope, "turned", lambda x, pos, base: x + pos[:, None].float().sin())  # added, not turned
    assert demo_rope.shift_error(q, k, 10000.0) > 1

@pytest.mark.parametrize("kind, moves", [("none", False), ("learned", True), ("sinusoidal", True), ("RoPE", True)])
def test_placed(kind, moves):
    """Without positions one layer's last output does not know the order of the bytes before; with any, it does."""
    torch.manual_seed(0)
    model = demo_rope.Placed(GPTConfig(**SIZES), kind)
    for name, p in model.named_parameters():
        if name != "table":
            p.data += 0.2 * torch.randn(p.shape)
    a, b = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[4, 3, 1, 2, 5, 6]])
    assert ((model(a)[0][0, -1] - model(b)[0][0, -1]).abs().max() > 1e-4).item() == moves
    assert (model.table.requires_grad, model.table.abs().max() > 0) == (kind == "learned", True)

def test_placed_with_rope_is_the_model():
    torch.manual_seed(0)
    wanted = GPT(GPTConfig(**SIZES))
    model = demo_rope.Placed(GPTConfig(**SIZES), "RoPE")
    model.load_state_dict(wanted.state_dict(), strict=False)
    x = torch.randint(256, (2, 8))
    assert torch.equal(model(x)[0], wanted(x)[0])

def test_equal_parameters_and_equal_rest():
    cfg = GPTConfig(**SIZES)
    models = {kind: demo_swiglu.build(kind, cfg, 0) for kind in demo_swiglu.KINDS}
    assert len({sum(p.numel() for p in model.parameters()) for model in models.values()}) == 1
    for model in models.values():
        assert torch.equal(model.h[0].attn.c_q.weight, models["SwiGLU"].h[0].attn.c_q.weight)

def test_plain_mlps():
    x = torch.randn(3, 16)
    for kind, act in (("ReLU", lambda z: z.clamp(min=0)), ("ReLU squared", lambda z: z.clamp(min=0) ** 2)):
        mlp = demo_swiglu.KINDS[kind](GPTConfig(**SIZES))
        mlp.c_proj.weight.data.normal_()
        torch.testing.assert_close(mlp(x), act(x @ mlp.c_fc.weight.T) @ mlp.c_proj.weight.T)

def test_verdict():
    assert demo_swiglu.verdict([1.0], [2.0]) == "one seed, no verdict"
    assert demo_swiglu.verdict([1.0, 1.5], [1.4, 2.0]) == "no difference"
    assert demo_swiglu.verdict([1.0, 1.2], [1.4, 2.0]) == "better"
    assert demo_swiglu.verdict([1.4, 2.0], [1.0, 1.2]) == "worse"

def test_smoke_norms(made):
    found = numbers(made, "norms")
    assert found["RMSNorm_ms"] > found["RMSNorm_alone"] > 0 and len(found["LayerNorm_val"]) == 2
    assert (made / "demo_norms.png").exists()

def test_smoke_rope(made):
    found = numbers(made, "rope")
    assert list(found["past"]) == demo_rope.KINDS and found["read_length"] == 32
    assert (made / "demo_rope.png").exists() and (made / "demo_rope_length.png").exists()

def test_smoke_swiglu(made):
    found = numbers(made, "swiglu")
    assert list(found["val"]) == list(demo_swiglu.KINDS) and all(len(v) == 2 for v in found["val"].values())
    assert (made / "demo_swiglu.png").exists()
