"""Writing files so that a crash, a full disk or Ctrl-C never costs the old one.

Owns: the rule "temporary name in the same directory, sync, rename".
Refuses to know: what the bytes mean.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on any error removed.

    Raises ValueError when the directory does not exist or `path` is a directory; OSError from the disk passes through.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"cannot write {target}: the directory {target.parent} does not exist")
    if target.is_dir():
        raise ValueError(f"cannot write {target}: it is a directory")
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp made it private
        temporary.replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    with suppress(OSError):  # the rename itself, where directories can be synced
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
