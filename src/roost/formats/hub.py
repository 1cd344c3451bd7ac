"""Weights from a hub: owner/name, owner/name@revision, or one file of a repository that holds several.

Owns: how such a name is told from a path, and which files are fetched (weights and their index, nothing else).
Refuses to know: what is inside the files. Downloading, caching and the progress bar are huggingface_hub's.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from roost.formats.storage import ENDINGS, choose

_ID = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>\w[\w./-]*?))?(/(?P<file>[^/@]+\.(pth|safetensors|gguf)))?"
)


def is_hub_id(name: str) -> bool:
    """Whether a name that is no existing path means a hub repository, or a file in one.

    "x/y.pth" is a path. "a/b/c.pth" is a file on the hub unless there is a directory a here.
    """
    match = _ID.fullmatch(name)
    if match is None or match["repo"].endswith(ENDINGS):
        return False
    return match["file"] is None or not Path(name.split("/")[0]).is_dir()


def download(name: str, *, endpoint: str | None = None, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The local directory or file of a hub name; what the cache holds already is not fetched again.

    Without a connection the cached copy is used. Raises ValueError when there is none, the repository or the revision
    does not exist, or it holds no weights or several models.
    """
    from huggingface_hub import HfApi, snapshot_download  # pyright: ignore[reportUnknownVariableType] (a bare dict)

    match = _ID.fullmatch(name)
    assert match is not None, name
    cache = None if cache_dir is None else Path(cache_dir)
    repo, revision, file = match["repo"], match["revision"], match["file"]
    try:
        info = HfApi(endpoint=endpoint).model_info(repo, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
    except Exception as error:  # the hub's client raises errors of its transport, which changes between versions
        cached = _cached(repo, revision, endpoint, cache)
        if cached is None:
            raise ValueError(
                f"{name} is no file here, and the hub could not be asked for it: {_one_line(error)}"
            ) from error
        return _pick(cached, file)
    if file is not None and file not in names:
        there = ", ".join(sorted(n for n in names if n.endswith(ENDINGS))[:8]) or "no weights"
        raise ValueError(f"{repo} has no file {file}; it has {there}")
    wanted = [file] if file is not None else _with_index(choose(names, repo), names)
    try:
        folder = snapshot_download(repo, revision=revision, endpoint=endpoint, cache_dir=cache, allow_patterns=wanted)
    except Exception as error:  # as above
        raise ValueError(f"downloading {name} failed: {_one_line(error)}") from error
    return _pick(Path(folder), file)


def _with_index(files: list[str], names: list[str]) -> list[str]:
    index = "model.safetensors.index.json" if files[0].endswith(".safetensors") else "pytorch_model.bin.index.json"
    return [*files, index] if len(files) > 1 and index in names else files


def _pick(folder: Path, file: str | None) -> Path:
    if file is None:
        return folder
    if not (folder / file).is_file():
        raise ValueError(f"the hub cannot be reached and {file} is not in the cache")
    return folder / file


def _cached(repo: str, revision: str | None, endpoint: str | None, cache: Path | None) -> Path | None:
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType] (a bare dict)
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            endpoint=endpoint,
            cache_dir=cache,
            local_files_only=True,
            allow_patterns=[],  # the folder as it is; a file that is not there is noticed when it is wanted
        )
    except LocalEntryNotFoundError:
        return None
    return Path(folder)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
