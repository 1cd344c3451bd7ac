"""Two ranks make the steps of one process: replicas, shards, time cut over ranks, and a restart after a lost rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import ranks
from roost.config import ModelConfig
from roost.data.batch import Batch
from roost.models.rwkv import RWKV
from roost.training.context_parallel import TimeShares, context_parallel, time_share
from roost.training.distributed import DataParallel, process_group
from roost.training.loop import train
from tiny import tiny_model

TESTS = Path(__file__).parents[1]
SURROUNDINGS = {
    **os.environ,
    "PYTHONPATH": str(TESTS),
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else restarted ranks meet addresses of the lost ones: pytorch#135712
}


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=SURROUNDINGS)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", ["replicas", pytest.param("sharded", marks=pytest.mark.slow), "context"])
def test_two_ranks(case: str, tmp_path: Path) -> None:
    """See ranks.py; a case imports torch once and forks."""
    run(sys.executable, str(TESTS / "ranks.py"), case, str(tmp_path))


LOSES_A_RANK = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from ranks import Noise, config
from roost.training.distributed import DataParallel, Sharded, process_group
from roost.training.loop import train
from tiny import tiny_model

class Fatal(Noise):
    def batch_at(self, step, part=0, parts=1):
        if step == 3 and part == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            Path(sys.argv[1], "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch_at(step, part, parts)

with process_group("cpu"):
    model = tiny_model()
    reducer = {"DataParallel": DataParallel, "Sharded": Sharded}[sys.argv[2]](model)
    train(model, Fatal(), config(Path(sys.argv[1])), reduce=reducer, resume=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DataParallel", "Sharded"])
def test_a_lost_rank_restarts_the_run_from_its_checkpoint(kind: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LOSES_A_RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(*launch, "--max-restarts", "1", str(script), str(tmp_path / "a"), kind)
    assert (tmp_path / "a/killed").exists() and (tmp_path / "a/final.safetensors").exists()
    train(tiny_model(), ranks.Noise(), ranks.config(tmp_path / "b"))
    ranks.close(ranks.losses(tmp_path / "a"), ranks.losses(tmp_path / "b"))


def test_alone_there_is_nothing_to_join() -> None:
    with pytest.raises(ValueError, match="start it with `torchrun"), process_group():
        pass
    with pytest.raises(ValueError, match="kind"), process_group("tpu"):
        pass
    with pytest.raises(ValueError, match="enter `process_group"):
        DataParallel(tiny_model())


def test_what_cannot_be_cut_along_time() -> None:
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="packs several sequences"):
        time_share(Batch(ids, ids, (0, 1, 3)), 0, 2)
    with pytest.raises(ValueError, match="has rows of 3 token"):
        time_share(Batch(ids, ids), 0, 4)
    dove = RWKV(ModelConfig("dove", 1, 32, 257))
    with pytest.raises(ValueError, match="this model is Dove"), context_parallel(dove):
        pass


class Count:
    """Two rows of five tokens."""

    identity: ClassVar[dict[str, int | str]] = {"data": "count"}

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        ids = torch.arange(10).view(2, 5) + 10 * step
        return Batch(ids, ids + 1).split(parts)[part]


def test_shares_of_time() -> None:
    """Groups of two ranks have a row each, and cut it; together they have every token once."""
    data = TimeShares(Count(), 2)
    assert data.identity == Count.identity and data.steps_per_epoch is None
    shares = [data.batch_at(1, part, 4).inputs.tolist() for part in range(4)]
    assert shares == [[[10, 11]], [[12, 13, 14]], [[15, 16]], [[17, 18, 19]]]
    assert data.batch_at(1).inputs.shape == (2, 5)
    with pytest.raises(ValueError, match="3 shares cannot hold groups of 2 ranks"):
        data.batch_at(0, 0, 3)
