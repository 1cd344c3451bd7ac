"""What tells that a directory holds a run, and what a killed one left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from roost.training.resume import UNFINISHED, Position, checkpoints, tidy, trace_of_a_run
from roost.training.start import check_start


@pytest.mark.parametrize(
    "name", ["step-3.pt", "step-3.dcp", "final.safetensors", "final.pth", "adapter.safetensors", "log.jsonl"]
)
def test_any_trace_of_a_run_protects_it(tmp_path: Path, name: str) -> None:
    for other in ("reference.safetensors", "step-x.pt", "bad-step-1.pt"):
        (tmp_path / other).touch()
    assert trace_of_a_run(tmp_path) is None
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"already holds a run \\({name}\\): resume it"):
        check_start(str(tmp_path), resume=False)
    assert check_start(str(tmp_path), resume=True) == tmp_path


def test_a_half_written_sharded_checkpoint_is_none_and_is_cleared(tmp_path: Path) -> None:
    for step in (10, 9):
        (tmp_path / f"step-{step}.dcp").mkdir()
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / "shard").touch()
    assert [path.name for path in checkpoints(tmp_path, "dcp")] == ["step-9.dcp", "step-10.dcp"]
    tidy(tmp_path, Position())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10.dcp", "step-9.dcp"]
