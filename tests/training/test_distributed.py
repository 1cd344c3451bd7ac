"""Two ranks make the steps of one process: replicas, shards, time cut over ranks, and a restart after a lost rank."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pytest
import torch

import ranks
from roost.checkpoint import load
from roost.cli import main
from roost.config import ModelConfig
from roost.data.batch import Batch
from roost.models.rwkv import RWKV
from roost.training.context_parallel import TimeShares, context_parallel, time_share
from roost.training.distributed import DataParallel, Sharded, process_group
from roost.training.loop import train
from roost.training.recipe import run_recipe
from roost.training.sharded_checkpoint import restore_sharded
from roost.training.state_tuning import add_time_state
from tiny import tiny_model
from training_runs import RECIPE, corpus_in, log

if TYPE_CHECKING:
    from roost.training.resume import Trained

TESTS = Path(__file__).parents[1]
SURROUNDINGS = {
    **os.environ,
    "PYTHONPATH": str(TESTS),
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else restarted ranks meet addresses of the lost ones: pytorch#135712
}


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


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
from roost.training import sharded_checkpoint
from roost.training.distributed import DataParallel, Sharded, process_group
from roost.training.loop import train
from tiny import tiny_model

out, kind, where = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def die():
    (out / "killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)

class Fatal(Noise):
    def batch_at(self, step, part=0, parts=1):
        if where == "step" and step == 3 and part == 1 and first:
            die()
        return super().batch_at(step, part, parts)

first, save, saves = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", sharded_checkpoint.save, []

def half_saved(*args, **options):
    save(*args, **options)
    saves.append(1)
    if where == "save" and len(saves) == 2 and first:  # after the shards of step 2, before their new name
        torch.distributed.barrier()
        if os.environ["RANK"] == "0":
            assert (out / "unfinished.dcp").is_dir() and (out / "step-1.dcp").is_dir()
            die()

sharded_checkpoint.save = half_saved
with process_group("cpu"):
    model = tiny_model()
    reducer = {"DataParallel": DataParallel, "Sharded": Sharded}[kind](model)
    numbers = config(out, save_every=1 if where == "save" else 2)
    train(model, Fatal(), numbers, reduce=reducer, resume=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind,where", [("DataParallel", "step"), ("Sharded", "step"), ("Sharded", "save")])
def test_a_lost_rank_restarts_the_run_from_its_checkpoint(kind: str, where: str, tmp_path: Path) -> None:
    """Lost in a step, or when the shards of a checkpoint are written and not yet named: the one before it stands."""
    script = tmp_path / "script.py"
    script.write_text(LOSES_A_RANK)
    run(*LAUNCH, "--max-restarts", "1", str(script), str(tmp_path / "a"), kind, where)
    assert (tmp_path / "a/killed").exists() and (tmp_path / "a/final.safetensors").exists()
    assert not (tmp_path / "a/unfinished.dcp").exists()
    train(tiny_model(), ranks.Noise(), ranks.config(tmp_path / "b"))
    ranks.close(ranks.losses(tmp_path / "a"), ranks.losses(tmp_path / "b"))


@pytest.mark.slow
def test_ranks_of_the_command_line(tmp_path: Path) -> None:
    """--shard and --context write the model that one process writes; the length in epochs is that of the data."""
    recipe, finals = tmp_path / "r.toml", dict[str, dict[str, torch.Tensor]]()
    text = RECIPE.format(data=corpus_in(tmp_path), out=tmp_path / "run").replace("steps = 60", "epochs = 0.05")
    recipe.write_text(text.replace("save_every = 3", "save_every = 2\neps = 1e-4"))
    for kind in ("", "--shard", "--context"):
        out = tmp_path / f"run{kind}"
        ranks_of = LAUNCH if kind else [sys.executable]
        run(*ranks_of, "-m", "roost", "train", str(recipe), *([kind] if kind else []), "--set", f"out={out}")
        finals[kind] = dict(load(out / "final.safetensors")[0].state_dict())
        assert (out / ("step-4.dcp" if kind == "--shard" else "step-4.pt")).exists()
        assert max(line["step"] for line in log(out)) == 6
    ranks.same(finals["--shard"], finals[""])
    ranks.same(finals["--context"], finals[""])


def test_what_the_command_line_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.format(data=corpus_in(tmp_path), out=tmp_path / "run"))
    cases = [
        (["--shard"], "--shard is for several processes"),
        (["--context"], "--context is for several processes"),
        (["--context", "--shard"], "not allowed with argument"),
    ]
    for words, message in cases:
        assert main(["train", str(recipe), *words]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda _group: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _group: 2)
    model = tiny_model()
    add_time_state(model)
    with pytest.raises(ValueError, match="a model with time_state cannot be sharded"):
        Sharded(model)


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


def test_runs_that_cannot_be_cut_along_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments would lose the state on all ranks but the first, and give wrong gradients; refused whoever asks."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.format(data=corpus_in(tmp_path), out=tmp_path / "run"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"segment": 8}, "and so not with segments"),
        ({"packing": "documents"}, "cu_seqlens cannot be cut over ranks"),
        ({"compile": True}, "does not go with compile = True"),
    ]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for keys, message in cases:
            with ExitStack() as entered, pytest.raises(ValueError, match=message):
                run_recipe(recipe, keys, reduce=lambda model: entered.enter_context(context_parallel(model)))
        model, ids = tiny_model(), torch.zeros(1, 3, dtype=torch.long)
        model.train()
        state = model(ids)[1]
        with context_parallel(model):
            model(ids)
            for given in ({"args": (ids, state)}, {"args": (ids,), "state": state}):
                with pytest.raises(ValueError, match="does not go with a given state"):
                    model(*given.pop("args"), **given)
            model.eval()
            model(ids, state=state)
        model.train()
        model(ids, state=state)
    finally:
        torch.distributed.destroy_process_group()


def test_a_damaged_sharded_checkpoint_is_named(tmp_path: Path) -> None:
    """With what a run then goes on from, where there is any."""
    nothing = cast("Trained", None)
    (tmp_path / "step-4.dcp").mkdir()
    with pytest.raises(ValueError, match=r"step-4.dcp is damaged: delete it; the run then starts anew"):
        restore_sharded(tmp_path, nothing, {})
    (tmp_path / "step-2.dcp").mkdir()
    with pytest.raises(ValueError, match=r"step-4.dcp is damaged: delete it; the run then goes on from step-2.dcp"):
        restore_sharded(tmp_path, nothing, {})


class Count:
    """Two rows of five tokens."""

    identity: ClassVar[dict[str, int | str]] = {"data": "count"}

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        ids = torch.arange(10).view(2, 5) + 10 * step
        return Batch(ids, ids + 1).split(parts)[part]


def test_shares_of_time() -> None:
    """Groups of two ranks have a row each, and cut it; together they have every token once."""
    data = TimeShares(Count(), 2)
    assert data.identity == Count.identity
    shares = [data.batch_at(1, part, 4).inputs.tolist() for part in range(4)]
    assert shares == [[[10, 11]], [[12, 13, 14]], [[15, 16]], [[17, 18, 19]]]
    assert data.batch_at(1).inputs.shape == (2, 5)
    halves = TimeShares(Count(), 2, accumulate=2)  # one group, whose ranks read its rows one after the other
    shares = [halves.batch_at(1, part, 4).inputs.tolist() for part in range(4)]
    assert shares == [[[10, 11]], [[15, 16]], [[12, 13, 14]], [[17, 18, 19]]]
    with pytest.raises(ValueError, match="2 shares cannot hold groups of 2 ranks that cut the time, 2 shares each"):
        halves.batch_at(0, 0, 2)
    with pytest.raises(ValueError, match="3 shares cannot hold groups of 2 ranks"):
        data.batch_at(0, 0, 3)
