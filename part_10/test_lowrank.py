"""
Tests of lowrank.py. The oracles are the theorem of Eckart and Young, SVD-LLM's formula with an
inverse, the covariance of the outputs, and approximations found by alternating least squares.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import lowrank
from compression import Rows, matrices, mean_loss
from lowrank import (
    Config,
    Directions,
    LowRank,
    count_parameters,
    factorize,
    install,
    output_directions,
    rank_for_share,
    rank_of,
    spectrum,
    square_root,
    time_per_token,
    weight_directions,
)
from model import GPT, GPTConfig
from shared import parse_args, save_checkpoint
from tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
BYTES = {bytes([i]): i for i in range(256)}


def make_inputs(n, count=300, seed=0):
    """Correlated inputs (count, n); some channels are louder than others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return x * torch.logspace(-1, 1, n)[torch.randperm(n, generator=generator)]


def make_matrix(m, n, seed=1):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def make_model(seed=0):
    """A small model with random weights, also where a new model has zeros."""
    tok = Tokenizer(BYTES)
    cfg = GPTConfig(tok.vocab_size, 24, n_layer=2, n_head=2, n_kv_head=1, n_embd=16)
    model = GPT(cfg).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim == 2:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return model, tok


def product(factors):
    return factors.up @ factors.down


def loss_of_outputs(W, other, x):
    """The sum of |W x - W' x|^2 over the inputs x (N, n)."""
    return (x.double() @ (W - other).double().T).square().sum().item()


# the mathematics ----------------------------------------------------------------------------------


def test_square_root():
    x = make_inputs(8)
    gram = x.T @ x
    S = square_root(gram)
    assert (S == S.tril()).all()
    damped = gram + 1e-4 * gram.diagonal().mean() * torch.eye(8)
    torch.testing.assert_close(S @ S.T, damped, rtol=1e-4, atol=1e-2)

    # fewer inputs than channels
    few = x[:3]
    assert square_root(few.T @ few).isfinite().all()


@pytest.mark.parametrize("m, n", [(6, 10), (10, 6), (8, 8)])
def test_all_directions_together_are_the_matrix(m, n):
    W = make_matrix(m, n)
    x = make_inputs(n)
    for directions in (weight_directions(W), output_directions(W, x.T @ x)):
        assert directions.U.shape == (m, min(m, n))
        torch.testing.assert_close(
            product(factorize(W, directions, min(m, n))), W, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_errors_are_the_singular_values_that_are_left_out(rank):
    W = make_matrix(9, 12)
    directions = weight_directions(W)
    error = (W - product(factorize(W, directions, rank))).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(W)[rank:].square().sum())

    x = make_inputs(12)
    directions = output_directions(W, x.T @ x)
    error = loss_of_outputs(W, product(factorize(W, directions, rank)), x)
    assert error == pytest.approx(
        torch.linalg.svdvals(x @ W.T)[rank:].square().sum().item(), rel=1e-2
    )


def test_the_result_is_that_of_svd_llm():
    """Wang et al. 2024 write U_r Sigma_r V_r^T S^-1."""
    W = make_matrix(9, 12)
    x = make_inputs(12)
    S = square_root(x.T @ x).double()
    U, values, Vh = torch.linalg.svd(W.double() @ S, full_matrices=False)
    expected = U[:, :4] @ torch.diag(values[:4]) @ Vh[:4] @ torch.linalg.inv(S)
    found = product(factorize(W, output_directions(W, x.T @ x), 4))
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)


def test_no_other_matrix_of_this_rank_keeps_the_outputs_better():
    """Alternating least squares from random starts finds no better factors."""
    W = make_matrix(7, 9).double()
    x = make_inputs(9).double()
    gram = x.T @ x
    best = product(factorize(W.float(), output_directions(W.float(), gram.float()), 3)).double()
    of_ours = loss_of_outputs(W, best, x)
    plain = product(factorize(W, weight_directions(W), 3))
    assert of_ours < 0.9 * loss_of_outputs(W, plain, x)

    for seed in range(3):
        up = make_matrix(7, 3, seed + 10).double()
        for _ in range(200):
            down = torch.linalg.pinv(up) @ W
            up = W @ gram @ down.T @ torch.linalg.inv(down @ gram @ down.T)
        found = loss_of_outputs(W, up @ down, x)
        assert found >= of_ours * (1 - 1e-3)
        assert found == pytest.approx(of_ours, rel=0.05)


def test_the_directions_are_the_principal_directions_of_the_outputs():
    W = make_matrix(6, 9)
    x = make_inputs(9, count=400)
    y = (x @ W.T).double()
    _, vectors = torch.linalg.eigh(y.T @ y)
    U = output_directions(W, x.T @ x).U.double()
    alignment = (U * vectors.flip(1)).sum(dim=0).abs()
    assert (alignment > 0.99).all()


def test_equally_loud_inputs_without_correlation_make_both_methods_equal():
    W = make_matrix(8, 8)
    plain = product(factorize(W, weight_directions(W), 3))
    outputs = product(factorize(W, output_directions(W, 5 * torch.eye(8)), 3))
    torch.testing.assert_close(plain, outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m, n", [(576, 576), (192, 576), (1536, 576), (64, 128)])
@pytest.mark.parametrize("share", [0.4, 0.8, 1.0])
def test_the_rank_for_a_share(m, n, share):
    rank = rank_for_share(share, m, n)
    assert rank * (m + n) <= share * m * n + 1e-3
    assert (rank + 1) * (m + n) > share * m * n


def test_ranks_have_limits():
    assert rank_for_share(0.001, 8, 8) == 1
    assert rank_for_share(2.0, 8, 8) == 8
    assert rank_for_share(2.0, 4, 16) == 4
    assert rank_of("rank 5", 8, 8) == 5
    assert rank_of("rank 50", 4, 16) == 4
    assert rank_of("0.5", 8, 8) == 2


# models -------------------------------------------------------------------------------------------


def test_the_module():
    W = make_matrix(6, 10)
    factors = factorize(W, weight_directions(W), 2)
    module = LowRank(factors)
    x = make_matrix(3, 10, seed=5)
    torch.testing.assert_close(module(x), x @ product(factors).T)
    assert count_parameters({"W": module}) == 2 * (6 + 10)


def test_install():
    model, _ = make_model()
    idx = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(0))
    rows = Rows(idx[:, :-1], idx[:, 1:], 44)
    before = mean_loss(model, rows)
    dense = dict(matrices(model))

    # with all directions the model is the same, with one direction it is not
    losses = []
    for rank in (1000, 1):
        modules = {}
        for name, linear in dense.items():
            W = linear.weight.detach()
            modules[name] = LowRank(factorize(W, weight_directions(W), rank))
        install(model, modules)
        assert not set(dense) & set(matrices(model))
        losses.append(mean_loss(model, rows))
    assert losses[0] == pytest.approx(before, abs=1e-4)
    assert abs(losses[1] - before) > 0.01

    ratio, milliseconds = time_per_token(model, dense, modules, repeats=2, n_tokens=100)
    assert ratio > 0 and milliseconds > 0
    install(model, dense)
    assert mean_loss(model, rows) == before
    assert list(matrices(model)) == list(dense)


def test_spectrum_by_hand():
    directions = Directions(None, torch.tensor([3.0, 2.0, 1.0, 1.0]))
    line = spectrum({"W": directions}, n_points=5)["W"]
    assert line == pytest.approx([0, 9 / 15, 13 / 15, 14 / 15, 1])


# the script ---------------------------------------------------------------------------------------


def save_model(path):
    model, tok = make_model()
    save_checkpoint(path, kind="base", tokenizer=tok.state(), **model.to_checkpoint())


def test_the_script_with_a_users_model(tmp_path):
    path = tmp_path / "my.pt"
    save_model(path)
    options = ["--rows=3", "--held_out=3", "--block_size=16", "--repeats=1", f"--model={path}"]
    command = [sys.executable, str(FOLDER / "lowrank.py"), "--device=cpu", f"--out={tmp_path}"]
    done = subprocess.run(
        [*command, *options, "--share=0.8,0.4"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    [result] = json.loads((tmp_path / "lowrank.json").read_text())["results"].values()
    found = {(s["method"], s["label"]): s for s in result["settings"]}
    assert len(found) == 4
    for (_, label), setting in found.items():
        assert float(label) - 0.15 < setting["share"] <= float(label)
        assert setting["nats"] != result["dense"]
        assert setting["time"] > 0
    for label in ("0.8", "0.4"):
        assert found["whitened", label]["error"] < found["svd", label]["error"]
    assert found["svd", "0.8"]["error"] < found["svd", "0.4"]["error"]
    for name in ("lowrank", "lowrank_spectra"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    # given ranks: with the full rank nothing is lost
    cfg = parse_args(Config, argv=[*options, "--rank=2,100"])
    result = lowrank.examine(str(path), cfg, torch.device("cpu"))
    found = {(s["method"], s["label"]): s for s in result["settings"]}
    assert found["whitened", "rank 100"]["nats"] == pytest.approx(result["dense"], abs=1e-4)
    assert found["whitened", "rank 100"]["share"] > 1
    assert found["svd", "rank 2"]["nats"] != pytest.approx(result["dense"], abs=1e-4)


def test_the_finding_takes_the_largest_share_below_1():
    settings = []
    for method, share, nats in [("svd", 0.5, 3.0), ("svd", 0.9, 2.0), ("svd", 1.3, 1.0)]:
        settings.append({"method": method, "share": share, "nats": nats})
    result = {"dense": 1.0, "settings": settings}
    title = lowrank.finding({"base": result}, Config(method="svd"))
    assert title.endswith("base, 90% of the parameters: svd +1.000")


@pytest.mark.parametrize(
    "option, message",
    [
        ("--method=svd,best", "method=svd,best must be some of svd,whitened"),
        ("--share=0.5,3", "share=0.5,3 must be numbers above 0 and at most 2"),
        ("--share=half", "share=half must be numbers above 0 and at most 2"),
        ("--rank=0", "rank=0 must be integers above 0"),
        ("--rank=2,1.5", "rank=2,1.5 must be integers above 0"),
        ("--rows=0", "rows=0 must be at least 1"),
        ("--repeats=0", "repeats=0 must be at least 1"),
    ],
)
def test_bad_options_end_in_one_line(option, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(Config, argv=[option])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as end:
        lowrank.examine("nowhere.pt", Config(), torch.device("cpu"))
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: there is no nowhere.pt\n"
