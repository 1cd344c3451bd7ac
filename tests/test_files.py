"""Atomic writing: the old file survives everything that can go wrong."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from roost.files import locked, replacing


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_the_old_file_survives(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(type(error)), replacing(target) as temporary:
        temporary.write_bytes(b"half of the n")
        raise error
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_replaces_with_ordinary_permissions(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with replacing(target) as temporary:
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    mask = os.umask(0)
    os.umask(mask)
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask


def test_links_permissions_and_long_names(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o600)
    link.symlink_to(real)
    with replacing(link) as temporary:
        temporary.write_bytes(b"new")
    assert link.is_symlink() and real.read_bytes() == b"new" and real.stat().st_mode & 0o777 == 0o600
    with replacing(tmp_path / ("n" * 255)) as temporary:
        temporary.write_bytes(b"x")


def test_only_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"), replacing(tmp_path / "pipe"):
        pass


def test_a_lock_has_one_holder_at_a_time(tmp_path: Path) -> None:
    """What a killed holder left is taken over, and nothing stays behind. (Processes: data/test_workers.py.)"""
    path = tmp_path / ".lock"
    path.touch()
    with locked(path, "this"):
        with pytest.raises(ValueError, match="another run is writing this"), locked(path, "this"):
            pass
        assert path.exists()
    assert not path.exists()
    with pytest.raises(KeyError), locked(path, "this"):
        raise KeyError
    with locked(path, "this"):
        path.unlink()  # as with a directory that vanishes
        with locked(path, "this"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_let_go_while_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that was opened is no longer the one that others lock."""
    import fcntl

    lock = fcntl.flock

    def late(file: object, how: int) -> None:
        (tmp_path / ".lock").unlink()
        lock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    message = "has just finished writing this: run again"
    with pytest.raises(ValueError, match=message), locked(tmp_path / ".lock", "this"):
        pass
    assert not list(tmp_path.iterdir())


def test_no_locks_on_this_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(_file: object, _how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / ".lock", "this"), locked(tmp_path / ".lock", "this"):
        pass


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"), replacing(tmp_path / "no" / "a"):
        pass
    with pytest.raises(ValueError, match="is a directory"), replacing(tmp_path):
        pass
