"""
Tests of prune.py. The oracles are masks by hand, least squares solved anew for each zero, and runs
of models whose first block is already pruned.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import prune
from compression import InputStatistics, Rows, matrices, watch_inputs
from model import GPT, GPTConfig
from prune import (
    METHODS,
    Config,
    bits_per_weight,
    draw_rows,
    inverse_factor,
    keep_of_matrix,
    keep_of_rows,
    keep_two_of_four,
    output_energy,
    output_error,
    pack_bitmap,
    prune_in_order,
    prune_model,
    restore,
    share_of_zeros,
    sparsegpt,
    time_products,
    unpack_bitmap,
    wanda_score,
    weights_of,
)
from shared import parse_args, save_checkpoint
from tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
BYTES = {bytes([i]): i for i in range(256)}


def make_inputs(n, count=200, seed=0):
    """Correlated inputs (count, n) in float64; some channels are louder than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, n, generator=generator, dtype=torch.float64)
    x = torch.randn(count, n, generator=generator, dtype=torch.float64) @ mixed
    return x * torch.logspace(-1, 1, n, dtype=torch.float64)[torch.randperm(n, generator=generator)]


def make_matrix(m, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


def watched(x):
    statistics = InputStatistics(x.size(1), "cpu")
    statistics.add(x)
    return statistics


def make_model(seed=0):
    """A small model with random weights, also where a new model has zeros."""
    tok = Tokenizer(BYTES)
    cfg = GPTConfig(tok.vocab_size, 24, n_layer=2, n_head=2, n_kv_head=2, n_embd=16)
    model = GPT(cfg).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim == 2:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return model, tok


def make_rows(N=6, T=12, seed=0):
    """Random rows, the last places of which are padding in every second row."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(0, 256, (N, T), generator=generator)
    targets = torch.randint(0, 256, (N, T), generator=generator)
    targets[::2, T - 4 :] = -100
    return Rows(idx, targets, 100)


# which weights stay -------------------------------------------------------------------------------

SCORE = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 8.0, 7.0]])


def test_keep_by_hand():
    whole = keep_of_matrix(SCORE, 0.5)
    assert whole.tolist() == [[False] * 4, [True] * 4]
    rows = keep_of_rows(SCORE, 0.5)
    assert rows.tolist() == [[False, False, True, True], [False, False, True, True]]
    quarter = keep_of_rows(SCORE, 0.25)
    assert quarter.tolist() == [[False, True, True, True], [False, True, True, True]]

    score = torch.tensor([[9.0, 1.0, 2.0, 8.0, 1.0, 2.0, 4.0, 3.0]])
    kept = keep_two_of_four(score)
    assert kept.tolist() == [[True, False, False, True, False, False, True, True]]


def test_equal_scores_still_give_the_right_number_of_zeros():
    assert keep_of_rows(torch.ones(3, 10), 0.7).sum(dim=1).tolist() == [3, 3, 3]
    assert keep_of_matrix(torch.ones(3, 10), 0.3).sum() == 21
    assert keep_of_rows(torch.ones(1, 100), 0.29).sum() == 71
    assert (keep_two_of_four(torch.ones(3, 8)).view(-1, 4).sum(dim=1) == 2).all()


def test_the_score_of_wanda_is_what_a_single_zero_costs():
    x = make_inputs(5)
    W = make_matrix(3, 5)
    score = wanda_score(W, x.norm(dim=0))
    for i in range(3):
        for j in range(5):
            without = W.clone()
            without[i, j] = 0
            cost = (x @ W.T - x @ without.T).square().sum()
            torch.testing.assert_close(score[i, j].square(), cost)


def test_wanda_is_magnitude_by_row_if_all_channels_are_equally_loud():
    W = make_matrix(6, 8)
    x = torch.eye(8) * 3
    by_row = prune.prune(W, None, "magnitude_row", 0.5)
    assert (prune.prune(W, watched(x), "wanda", 0.5) == by_row).all()

    # and with one loud channel it keeps that one
    x[2, 2] = 1000
    W[:, 2] = 0.01
    kept = prune.prune(W, watched(x), "wanda", 0.5)
    assert (kept[:, 2] == 0.01).all()
    assert (prune.prune(W, None, "magnitude_row", 0.5)[:, 2] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_numbers_of_zeros(method):
    W = make_matrix(6, 16).float()
    statistics = watched(make_inputs(16).float())
    pruned = prune.prune(W, statistics, method, 0.75)
    assert (pruned == 0).sum() == 72
    zeros_of_rows = (pruned == 0).sum(dim=1).tolist()
    if method in ("magnitude_row", "wanda"):
        assert zeros_of_rows == [12] * 6
    else:
        assert zeros_of_rows != [12] * 6

    pruned = prune.prune(W, statistics, method, "2:4")
    assert ((pruned == 0).view(-1, 4).sum(dim=1) == 2).all()
    if method != "sparsegpt":
        assert (pruned == W)[pruned != 0].all()


# sparsegpt ----------------------------------------------------------------------------------------


def damped(gram):
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def test_inverse_factor():
    x = make_inputs(7)
    gram = x.T @ x
    U = inverse_factor(gram)
    assert (U == U.triu()).all()
    identity = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U @ damped(gram), identity)

    # fewer inputs than channels: the gram matrix alone has no inverse
    x = x[:3]
    assert inverse_factor(x.T @ x).isfinite().all()


def sparsegpt_slowly(W, gram, sparsity, width):
    """Algorithm 1 without a triangular factor: for each column the inverse of the rest of H is
    computed anew, and for each zero a least-squares problem is solved."""
    H = damped(gram)
    W = W.clone()
    m, n = W.shape
    for start in range(0, n, width):
        end = min(start + width, n)
        score = torch.zeros(m, end - start, dtype=W.dtype)
        for j in range(start, end):
            corner = torch.linalg.inv(H[j:, j:])[0, 0]
            score[:, j - start] = W[:, j] ** 2 / corner
        if sparsity == "2:4":
            order = score.argsort(dim=1)[:, :2]
            zero = torch.zeros_like(score, dtype=torch.bool).scatter(1, order, True)
        else:
            n_zeros = int(sparsity * score.numel())
            zero = score <= score.flatten().sort().values[n_zeros - 1]

        for j in range(start, end):
            for i in range(m):
                if zero[i, j - start]:
                    # the change d of W[i, j:] that makes d H d^T smallest, given d_0 = -w
                    change = torch.linalg.solve(H[j + 1 :, j + 1 :], H[j + 1 :, j]) * W[i, j]
                    W[i, j + 1 :] += change
                    W[i, j] = 0
    return W


@pytest.mark.parametrize("sparsity, width", [(0.5, 5), (0.25, 12), ("2:4", 12)])
def test_sparsegpt_against_least_squares(sparsity, width):
    x = make_inputs(12)
    W = make_matrix(4, 12)
    gram = x.T @ x

    # 2:4 is chosen for four columns at a time, whatever the width is
    width_slowly = 4 if sparsity == "2:4" else width
    expected = sparsegpt_slowly(W, gram, sparsity, width_slowly)
    before = W.clone()
    torch.testing.assert_close(sparsegpt(W, gram, sparsity, width), expected)
    assert (W == before).all()


def test_sparsegpt_without_correlations_changes_nothing_but_the_zeros():
    W = make_matrix(4, 12)
    loudness = torch.arange(1, 13, dtype=torch.float64)
    pruned = sparsegpt(W, torch.diag(loudness.square()), 0.5)

    # the damping adds 1 % of the mean loudness to each channel
    norm = (loudness.square() + 0.01 * loudness.square().mean()).sqrt()
    expected = W.masked_fill(~keep_of_matrix(wanda_score(W, norm), 0.5), 0)
    torch.testing.assert_close(pruned, expected)


def test_the_order_of_the_errors_with_correlated_inputs():
    x = make_inputs(32, count=500).float()
    W = make_matrix(24, 32).float()
    statistics = {"W": watched(x)}
    energy = output_energy({"W": W}, statistics)
    errors = {}
    for method in METHODS:
        pruned = {"W": prune.prune(W, statistics["W"], method, 0.5)}
        errors[method] = output_error({"W": W}, pruned, statistics, energy)

        # against the outputs themselves
        difference = x @ W.T - x @ pruned["W"].T
        expected = difference.square().sum() / (x @ W.T).square().sum()
        assert errors[method] == pytest.approx(expected.item(), rel=1e-3)
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude_row"]


# models -------------------------------------------------------------------------------------------


def test_prune_model_and_restore():
    model, _ = make_model()
    before = weights_of(model)
    embedding = model.wte.weight.clone()
    prune_model(model, {}, "magnitude_row", 0.25)
    assert share_of_zeros(model) == pytest.approx(0.25, abs=0.01)
    assert (model.wte.weight == embedding).all()
    for name, linear in matrices(model).items():
        assert (linear.weight == prune.prune(before[name], None, "magnitude_row", 0.25)).all()
    restore(model, before)
    for name, linear in matrices(model).items():
        assert (linear.weight == before[name]).all()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_in_order_is_about_the_inputs_that_a_block_really_gets(method):
    model, _ = make_model()
    rows = make_rows()
    prune_in_order(model, rows, method, 0.5)

    # the same by hand: the first block, then statistics of the model, then the second block
    other, _ = make_model()
    for block in ("h.0.", "h.1."):
        statistics = watch_inputs(other, rows)
        with torch.no_grad():
            for name, linear in matrices(other).items():
                if name.startswith(block):
                    linear.weight.copy_(prune.prune(linear.weight, statistics[name], method, 0.5))
    for name, linear in matrices(model).items():
        torch.testing.assert_close(linear.weight, matrices(other)[name].weight)

    # and it differs from statistics of the dense model, in the second block alone
    dense, _ = make_model()
    prune_model(dense, watch_inputs(dense, rows), method, 0.5)
    same = []
    for name, linear in matrices(dense).items():
        same.append(torch.allclose(linear.weight, matrices(model)[name].weight, atol=1e-5))
    assert all(same[:7])
    assert not all(same[7:])

    # no hook stays behind
    assert all(not linear._forward_pre_hooks for linear in matrices(model).values())


def test_draws_have_no_row_in_common():
    rows = make_rows(N=7)
    draws = [draw_rows(rows, draw, 3) for draw in range(3)]
    assert [len(draw.idx) for draw in draws] == [3, 2, 2]
    seen = torch.cat([draw.idx for draw in draws]).tolist()
    assert sorted(seen) == sorted(rows.idx.tolist())
    assert (draws[1].targets == rows.targets[[1, 4]]).all()


# what a zero is worth -----------------------------------------------------------------------------


def test_bitmap_by_hand():
    W = torch.tensor([[0.0, 3.0, 0.0, 0.0], [5.0, 0.0, 0.0, 7.0]])
    bitmap = pack_bitmap(W)
    assert bitmap.bits.tolist() == [2 + 16 + 128]
    assert bitmap.values.tolist() == [3, 5, 7]
    assert (unpack_bitmap(bitmap, W.shape) == W).all()


def test_bits_per_weight():
    W = make_matrix(16, 24)
    for sparsity in (0.5, "2:4"):
        pruned = prune.prune(W, None, "magnitude", sparsity)
        bitmap = pack_bitmap(pruned)
        assert (unpack_bitmap(bitmap, W.shape) == pruned).all()
        assert bits_per_weight(bitmap, 16) == 9
        assert bits_per_weight(bitmap, 4) == 3
    assert bits_per_weight(pack_bitmap(W), 16) == 17


def test_time_products():
    weights = [make_matrix(32, 64).float()]
    timed = time_products(weights, {64: torch.randn(64, 1)}, repeats=3)
    assert timed["dense"] == {"time": 1.0, "memory": 1.0}
    assert timed["50% zeros, dense"]["memory"] == 1

    # 1024 values and 1024 columns of 4 bytes each, and 33 places where a row begins
    assert timed["50% zeros, CSR"]["memory"] == (1024 * 8 + 33 * 4) / (2048 * 4)
    assert all(ratios["time"] > 0 for ratios in timed.values())


def test_csr_computes_the_same():
    W = prune.prune(make_matrix(32, 64), None, "magnitude", 0.9)
    x = make_matrix(64, 1)
    torch.testing.assert_close(prune.compressed_rows(W) @ x, W @ x)


# the script ---------------------------------------------------------------------------------------


def run(*options):
    command = [sys.executable, str(FOLDER / "prune.py"), "--device=cpu", *options]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def save_model(path, **content):
    model, tok = make_model()
    save_checkpoint(path, kind="base", tokenizer=tok.state(), **model.to_checkpoint(), **content)


def test_the_script_with_a_users_model(tmp_path):
    path = tmp_path / "my.pt"
    save_model(path)
    options = ["--rows=3", "--held_out=3", "--block_size=16", "--repeats=2", "--draws=2"]
    options += ["--sparsity=0.5,2:4", f"--model={path}"]
    done = run(f"--out={tmp_path}", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    [result] = json.loads((tmp_path / "prune.json").read_text())["results"].values()
    settings = result["settings"]

    # two sparsities; the two magnitudes once, the two other methods for both draws
    assert len(settings) == 2 * (2 + 2 * 2)
    for setting in settings:
        assert setting["zeros"] == pytest.approx(0.5, abs=0.01)
        assert setting["nats"] != result["dense"]
        assert 0 < setting["error"] < 1
    nats = {(s["method"], s["sparsity"], s["draw"]): s["nats"] for s in settings}
    assert nats["wanda", "0.5", 0] != nats["wanda", "0.5", 1]
    assert nats["magnitude", "2:4", 0] == nats["magnitude_row", "2:4", 0]
    assert len(result["loudest"]) == 14
    assert result["worth"]["bits, 0.5"] == {"16": 9.0, "4": 3.0}
    assert (tmp_path / "prune.png").read_bytes().startswith(b"\x89PNG")

    # block after block has another result
    cfg = parse_args(Config, argv=[*options, "--in_order", "--method=wanda"])
    in_order = prune.examine(str(path), cfg, torch.device("cpu"))
    assert in_order["settings"][0]["nats"] != nats["wanda", "0.5", 0]
    assert in_order["dense"] == result["dense"]


def test_the_finding_names_best_and_worst():
    settings = []
    for method, nats in [("magnitude", 2.5), ("wanda", 1.5), ("wanda", 1.7)]:
        settings.append({"method": method, "sparsity": "0.5", "nats": nats})
    cfg = Config(method="magnitude,wanda", sparsity="0.3,0.5,2:4")
    title = prune.finding({"base": {"dense": 1.0, "settings": settings}}, cfg)
    assert title.endswith("base: wanda +0.600, magnitude +1.500")
    assert "50%" in title


@pytest.mark.parametrize(
    "option, message",
    [
        ("--method=wanda,best", "method=wanda,best must be some of magnitude,"),
        ("--sparsity=0.5,2", "sparsity=0.5,2 must be 2:4 or numbers between 0 and 1"),
        ("--sparsity=half", "sparsity=half must be 2:4 or numbers between 0 and 1"),
        ("--sparsity=0", "sparsity=0 must be 2:4 or numbers between 0 and 1"),
        ("--draws=0", "draws=0 must be at least 1"),
        ("--rows=0", "rows=0 must be at least 1"),
        ("--held_out=0", "held_out=0 must be at least 1"),
        ("--repeats=0", "repeats=0 must be at least 1"),
        ("--in_order=2", "wants true or false"),
    ],
)
def test_bad_options_end_in_one_line(option, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(Config, argv=[option])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_models_end_in_one_line(tmp_path, capsys):
    other = tmp_path / "other.pt"
    save_checkpoint(other, kind="sonar")
    odd = tmp_path / "odd.pt"
    tok = Tokenizer(BYTES)
    model = GPT(GPTConfig(tok.vocab_size, 24, n_layer=1, n_head=3, n_kv_head=3, n_embd=18))
    save_checkpoint(odd, kind="base", tokenizer=tok.state(), **model.to_checkpoint())

    save_model(tmp_path / "my.pt")
    with pytest.raises(SystemExit):
        cfg = Config(draws=10**6, held_out=1)
        prune.examine(str(tmp_path / "my.pt"), cfg, torch.device("cpu"))
    assert "--draws=1000000 needs as many rows, the text has" in capsys.readouterr().err

    messages = {
        "nowhere.pt": "there is no nowhere.pt",
        str(other): "expected 'base' or",
        str(odd): "h.0.attn.c_q has 18 inputs: 2:4 needs a multiple of 4",
    }
    for name, message in messages.items():
        with pytest.raises(SystemExit) as end:
            prune.examine(name, Config(), torch.device("cpu"))
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
