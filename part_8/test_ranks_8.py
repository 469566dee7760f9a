"""
Tests of Part 8's train_ppo.py in two processes: pytest part_8/test_ranks_8.py. A stored rollout, half of it to each,
must give the gradient that one process has from all of it; whitening and the stop of the epochs are over both.
"""
import sys; from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import os
import socket
import subprocess

import pytest
import torch

from model import ActorCritic, GPTConfig
from train_ppo import Config, gae, learn, shape_rewards, whiten

FOLDER = Path(__file__).resolve().parent
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}

UPDATE = """
def update(policy, batch, cfg):
    rewards = shape_rewards(batch["kl"], batch["score"], batch["mask"], cfg.kl_coef)
    advantages, returns = gae(rewards, batch["values"], batch["mask"], batch["last_value"], cfg.gamma, cfg.lam)
    white = whiten(advantages, batch["mask"])
    stats = learn(policy, torch.optim.SGD(policy.parameters(), lr=lr), batch, white, returns, cfg, torch.Generator())
    return {"white": white, "stats": stats, "grads": [p.grad for p in policy.parameters()]}
"""

WORKER = """
import os, sys; sys.path[:0] = sys.argv[1:3]
import torch, torch.distributed as dist
from model import ActorCritic
from train_ppo import Config, gae, learn, shape_rewards, whiten
dist.init_process_group("gloo")
stored, rank = torch.load(sys.argv[3]), dist.get_rank()
for name, lr, knobs in stored["runs"]:
    half = {k: v.chunk(2)[rank] for k, v in stored["batch"].items()}
    exec(stored["update"])
    torch.save(update(ActorCritic.load(stored), half, Config(**knobs)), f"{sys.argv[3]}.{name}.{rank}")
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # no destructors: a process that is done first may abort in them
"""

KNOBS = {"minibatches": 1, "epochs": 1, "grad_clip": 1e9, "max_kl": 1e9}
RUNS = [("gradient", 0.0, KNOBS), ("stop", 50.0, {**KNOBS, "epochs": 9, "max_kl": 2.0})]


def stored_rollout():
    """Eight answers of unequal length: the two halves have 9 and 21 tokens."""
    g, pos, lengths = torch.Generator().manual_seed(1), torch.arange(11), torch.tensor([1, 2, 2, 4, 8, 6, 5, 2])
    mask = (pos >= 2) & (pos < 2 + lengths[:, None])
    ids = torch.randint(13, (8, 12), generator=g)
    logp, kl, values = (0.3 * torch.randn(8, 11, generator=g) for _ in range(3))
    return {"ids": ids, "mask": mask, "logp": logp - 2.5, "kl": kl * mask, "values": values,
            "score": torch.randn(8, generator=g), "last_value": torch.zeros(8)}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    policy = ActorCritic(GPTConfig(vocab_size=13, block_size=16, n_layer=2, n_embd=16))
    for p in policy.parameters():
        p.data += 0.1 * torch.randn(p.shape)  # projections that start at zero would leave no gradient behind them
    torch.save({**policy.to_checkpoint(), "batch": stored_rollout(), "update": UPDATE, "runs": RUNS}, folder / "stored")
    (folder / "worker.py").write_text(WORKER)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    argv = [sys.executable, *launch, folder / "worker.py", FOLDER, FOLDER.parent, folder / "stored"]
    done = subprocess.run(list(map(str, argv)), env=ENV, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = {name: [torch.load(folder / f"stored.{name}.{rank}") for rank in (0, 1)] for name, _, _ in RUNS}
    return policy.to_checkpoint(), found


def alone(checkpoint, lr, knobs):
    names = {**globals(), "lr": lr}
    exec(UPDATE, names)
    return names["update"](ActorCritic.load(checkpoint), stored_rollout(), Config(**knobs))


def test_two_processes_have_the_gradient_of_one(two_processes):
    checkpoint, found = two_processes
    wanted = alone(checkpoint, 0.0, KNOBS)
    torch.testing.assert_close(torch.cat([f["white"] for f in found["gradient"]]), wanted["white"])
    for f in found["gradient"]:
        for grad, p in zip(f["grads"], wanted["grads"], strict=True):
            torch.testing.assert_close(grad, p, atol=1e-6, rtol=1e-4)
        for key in ("loss", "clip_fraction", "entropy"):  # the mean over both halves, known to both
            assert f["stats"][key] == pytest.approx(wanted["stats"][key], rel=1e-4)
        assert f["stats"]["step_kl"] == pytest.approx(wanted["stats"]["step_kl"], rel=1e-4)
    each = [alone_half["white"][alone_half["white"] != 0].mean().abs() for alone_half in found["gradient"]]
    assert min(each) > 0.01  # neither half is white by itself: the mean was taken over both


def test_both_stop_at_the_same_update(two_processes):
    """A process that went on alone would wait for ever for the other's gradient."""
    first, second = (f["stats"] for f in two_processes[1]["stop"])
    assert 1 <= len(first["loss"]) == len(second["loss"]) < 9 and first["step_kl"] == second["step_kl"] > 2
