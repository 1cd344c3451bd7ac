"""Writing files so that a crash, a full disk, Ctrl-C or a second run never costs the old one; reading TOML.

Owns: the rule "temporary name in the same directory, sync, rename", the lock that one process at a time holds, and one
kind of error for a disk that will not.
Refuses to know: what the bytes mean.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PREFIX, _SUFFIX = ".roost-", ".tmp"  # temporary files: prefix, process, random, suffix


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on any error removed.

    A link is followed and what it points to replaced; an existing file keeps its permissions. Raises ValueError when
    the directory does not exist or `path` is something else than a file; OSError from the disk passes through.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ValueError(f"cannot write {path}: the directory {target.parent} does not exist")
    mode = 0
    if target.exists():
        mode = target.stat().st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"cannot write {path}: it is {'a directory' if target.is_dir() else 'not a regular file'}")
    temporary = target.with_name(f"{_PREFIX}{os.getpid()}-{secrets.token_hex(8)}{_SUFFIX}")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    mode = mode or temporary.stat().st_mode  # what the umask allows; safetensors makes its files private
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(stat.S_IMODE(mode))
        temporary.replace(target)
    except BaseException as error:
        with suppress(FileNotFoundError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno and error.filename is None:  # as of a full disk
            error.filename = os.fspath(path)
        raise
    with suppress(OSError):  # the rename itself, where directories can be synced
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def clear_abandoned(directory: Path) -> None:
    """Remove the temporary files in `directory` whose process was killed; those of living processes stay."""
    for path in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
        owner = path.name.removeprefix(_PREFIX).split("-")[0]
        try:
            os.kill(int(owner), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (ValueError, PermissionError):  # not ours to judge
            continue


@contextmanager
def locked(path: Path, what: object) -> Generator[None, None, None]:
    """Hold the lock file `path` inside the block: one process at a time writes `what`.

    The lock is the system's (flock) and ends with its process, however that dies. Where there is none (Windows, some
    file systems of networks) nothing is locked. Raises ValueError at once when another one holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return

    def is_ours() -> bool:
        """False when the file that was opened is gone: the holder before removed it, or somebody its directory."""
        try:
            return os.path.samestat(os.fstat(held.fileno()), path.stat())
        except FileNotFoundError:
            return False

    with path.open("ab") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing {what}: wait for its end, or choose another name") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        if not is_ours():
            raise ValueError(f"another run has just finished writing {what}: run again")
        try:
            yield
        finally:
            if is_ours():
                path.unlink()


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Generator[None, None, None]:
    """Turn what torch and safetensors raise when a write fails into OSError with the path."""
    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"could not write {path}: {error}") from error


def read_toml(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """The tables of a file that is a `what`. Raises ValueError for a missing file, for bad TOML and for a directory."""
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ValueError(f"no {what} at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{path} is not a {what}: {error}") from error
