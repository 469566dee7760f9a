"""Part 2's demos: their mathematics against an independent statement, and a smoke run of each."""
import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import demo_batches
import demo_overfit
import demo_sampling
from model import GPT, GPTConfig
from shared import save_checkpoint

HERE = Path(__file__).resolve().parent
SIZES = dict(block_size=8, n_layer=1, n_head=2, n_embd=16)
TINY = ["--steps=10", "--batch_size=2", *(f"--{key}={value}" for key, value in SIZES.items())]

RUNNER = """
import json, runpy, sys
folder, jobs = sys.argv[1:]
sys.path.insert(0, folder)
for name, *options in json.loads(jobs):
    sys.argv = [name, *options]
    runpy.run_path(f"{folder}/demo_{name}.py", run_name="__main__")
"""

def tiny_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES))
    for p in model.parameters():  # projections that start at zero would hide the attention
        p.data += 0.2 * torch.randn(p.shape)
    return model

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One process runs all the demos with tiny sizes, because importing torch takes longer than they do -> out/."""
    folder = tmp_path_factory.mktemp("demos")
    (folder / "text.txt").write_text("the fox ran. Tom hid the dog. " * 40)
    common = [f"--out={folder}", f"--data={folder / 'text.txt'}", *TINY]
    model = tiny_model()
    save_checkpoint(folder / "gpt.pt", kind="gpt", gpt_config=asdict(model.cfg), weights=model.state_dict())
    jobs = [
        ("batches", *common),
        ("overfit", *common, "--sizes=50,0", "--seeds=2"),
        ("sampling", f"--out={folder}", f"--init={folder / 'gpt.pt'}", "--samples=2", "--length=6", "--draws=200"),
    ]
    done = subprocess.run([sys.executable, "-c", RUNNER, str(HERE), json.dumps(jobs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder

def numbers(made, name):
    return json.loads((made / f"demo_{name}.json").read_text())

def test_loss_by_position_against_one_row_at_a_time():
    model, ids = tiny_model(), torch.randint(256, (8 * 70 + 5,))
    found = demo_batches.loss_by_position(model, ids, 8, torch.device("cpu"))
    wanted = torch.zeros(8)
    for row in range(70):
        logits, _ = model(ids[None, 8 * row:8 * row + 8])
        for t in range(8):
            wanted[t] -= logits[0, t].log_softmax(dim=-1)[ids[8 * row + t + 1]].item() / 70
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)

def test_entropy_after_one():
    """a is followed by b or c alike, both by a: one bit, half of the time."""
    ids = torch.tensor(list(b"abac" * 5000 + b"a"))
    assert demo_batches.entropy_after_one(ids) == pytest.approx(math.log(2) / 2, abs=1e-6)
    assert demo_batches.entropy_after_one(torch.tensor(list(b"ab" * 50))) == pytest.approx(0, abs=1e-9)

def test_parting():
    found = torch.tensor([[0, 5.0, 5.0], [10, 4.0, 4.3], [20, 3.0, 3.05], [30, 2.0, 2.2], [40, 1.0, 2.5]])
    assert demo_overfit.parting(found, 0.1) == 30  # what closed again at 20 does not count
    assert demo_overfit.parting(found, 0.25) == 40
    assert demo_overfit.parting(found, 2.0) is None
    assert demo_overfit.parting(found, -1.0) == 0

def test_shares_against_softmax():
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    def check(wanted, **knobs):
        found = demo_sampling.shares(p.log(), 40000, **knobs)
        torch.testing.assert_close(found, torch.tensor(wanted) / sum(wanted), atol=0.012, rtol=0)
    check([0.5, 0.3, 0.15, 0.05])
    check([0.25, 0.09, 0.0225, 0.0025], temperature=0.5)
    check([0.5, 0.3, 0.15, 0.0], top_k=3)
    check([0.5, 0.3, 0.0, 0.0], top_p=0.7)

def test_scores_of_texts():
    import re
    patterns = [(0, re.compile(r"A (fox|dog) ran\."), None)]
    texts = ["fox ran. It", "dog ran. Bo", "fix ran. It", "fox r"]  # after "A ": two fit, one does not, one has no end
    found = demo_sampling.score("A ", texts, {"fox", "dog", "ran"}, patterns)
    assert found["sentences"] == pytest.approx(2 / 3)
    assert found["words"] == pytest.approx(6 / 7)  # fox ran dog ran fix ran fox; the last word of a text may be cut
    assert demo_sampling.distinct(["a b a b .", "a b ."]) == pytest.approx(2 / 4)  # ab ba ab, ab
    assert demo_sampling.distinct(["x"]) == 0

def test_smoke_batches(made):
    found = numbers(made, "batches")
    assert found["first_after_0"] == pytest.approx(math.log(256), abs=0.1)
    assert found["last_after_10"] < found["last_after_0"]
    assert (made / "demo_batches.png").exists() and (made / "demo_batches_loss.png").exists()

def test_smoke_overfit(made):
    found = numbers(made, "overfit")
    assert found["sizes"] == [50, 1080] and [len(gap) for gap in found["gap"]] == [2, 2]
    assert (made / "demo_overfit.png").exists()

def test_smoke_sampling(made):
    found = numbers(made, "sampling")
    assert found["kept"]["top-k 3"] <= 3 and len(found["scores"]) == 14
    assert found["scores"]["temperature=1.0"] == found["scores"]["top_p=1.0"] == found["scores"]["top_k=256"]
    assert all(0 <= share <= 1 for score in found["scores"].values() for share in score.values())
    assert (made / "demo_sampling.png").exists() and (made / "demo_sampling_bars.png").exists()
