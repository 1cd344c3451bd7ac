"""What tells that a directory holds a run, and what a killed one left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import tiny_model

from roost.training.config import TrainConfig
from roost.training.optim import optimiser
from roost.training.resume import (
    FINAL,
    UNFINISHED,
    Position,
    Trained,
    checkpoints,
    restore,
    save,
    tidy,
    trace_of_a_run,
)
from roost.training.start import check_start


@pytest.mark.parametrize(
    "name", ["step-3.pt", "step-3.dcp", "final.safetensors", "final.pth", "adapter.safetensors", "log.jsonl"]
)
def test_any_trace_of_a_run_protects_it(tmp_path: Path, name: str) -> None:
    for other in ("reference.safetensors", "step-x.pt", "bad-step-1.pt"):
        (tmp_path / other).touch()
    assert trace_of_a_run(tmp_path) is None
    (tmp_path / name).touch()
    holds = "a finished run" if name in FINAL else f"a run \\({name}\\): resume it"
    with pytest.raises(ValueError, match=f"holds {holds}"):
        check_start(str(tmp_path), resume=False)
    if name in FINAL:  # or it would be overwritten
        with pytest.raises(ValueError, match=f"holds a finished run \\({name}\\) and no checkpoint"):
            check_start(str(tmp_path), resume=True)
        (tmp_path / "step-3.pt").touch()
    assert check_start(str(tmp_path), resume=True) == tmp_path


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("settings", [], "not those of a checkpoint of step 2"),
        ("step", "x", "not those of a checkpoint of step 2"),
        ("step", 99, "not those of a checkpoint of step 2"),
        ("model", [], "not those of a checkpoint of step 2"),
        ("optimiser", {}, "state"),
        ("optimiser", {"state": {}, "param_groups": []}, "moments are not in it"),
        ("scaler", [], "dict"),
    ],
)
def test_a_checkpoint_with_other_contents_is_named(tmp_path: Path, key: str, value: object, message: str) -> None:
    model = tiny_model("finch-tiny").train()
    adam = optimiser(model, TrainConfig(steps=2))
    used = (p.square().sum() for name, p in model.named_parameters() if name != "emb.weight")  # an objective may
    sum(used, torch.zeros(())).backward()  # leave a parameter out
    adam.step()
    trained = Trained(model, adam, torch.amp.GradScaler("cpu", enabled=True))
    path = save(tmp_path, Position(2), trained, {"lr": 1.0}, keep=2)
    assert restore(tmp_path, trained, {"lr": 1.0}) == Position(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({**torch.load(path, weights_only=True), key: value}, path)
    with pytest.raises(ValueError, match=f"step-2.pt is damaged: delete it; the run then starts anew .*{message}"):
        restore(tmp_path, trained, {"lr": 1.0})
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_a_half_written_sharded_checkpoint_is_none_and_is_cleared(tmp_path: Path) -> None:
    for step in (10, 9):
        (tmp_path / f"step-{step}.dcp").mkdir()
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / "shard").touch()
    assert [path.name for path in checkpoints(tmp_path, "dcp")] == ["step-9.dcp", "step-10.dcp"]
    tidy(tmp_path, Position())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10.dcp", "step-9.dcp"]
