"""What the name of a model means: a path that exists, then a model that ships, then a hub name.

Owns: that order, and what to say when it is none of them.
Refuses to know: what is inside files.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from roost.config import PRESETS
from roost.formats.hub import download, is_hub_id
from roost.formats.storage import ENDINGS

SHIPPED = {"nestling": "nestling.safetensors"}
"""Models that come with the package: their names and their files in the assets directory."""
ASSETS = Path(__file__).parents[1] / "assets"
"""Where they are."""


def resolve(x: str | os.PathLike[str], endpoint: str | None, cache_dir: str | os.PathLike[str] | None) -> Path:
    """The file or directory that `x` means. Raises ValueError naming the nearest thing that exists."""
    try:
        path, name = Path(x), os.fspath(x)
    except TypeError as error:
        raise ValueError(f"{x!r} is a {type(x).__name__}: give a path or the name of a model") from error
    if not name or "\0" in name:
        raise ValueError(f"{name!r} is neither a path nor the name of a model")
    if path.exists():
        return path
    if name in SHIPPED:
        asset = ASSETS / SHIPPED[name]
        if not asset.is_file():
            raise ValueError(f"{name} is not in this installation ({asset.name} is missing): install the package again")
        return asset
    if is_hub_id(name):
        return download(name, endpoint=endpoint, cache_dir=cache_dir)
    if name.endswith((*ENDINGS, ".bin")) or "/" in name or path.is_absolute():
        near = _nearest_file(path)
        raise ValueError(f"no such file: {name}" + (f"; did you mean {near}?" if near else ""))
    if name in PRESETS:
        raise ValueError(f"{name} names sizes, not weights: RWKV(PRESETS[{name!r}]) makes a fresh model")
    near = difflib.get_close_matches(name, SHIPPED, 1, 0.0)
    raise ValueError(
        f"no file, directory or model called {name!r}; the nearest model that ships is {near[0]!r}, and a hub name has"
        " the form 'owner/name'"
    )


def _nearest_file(path: Path) -> Path | None:
    if not path.parent.is_dir():
        return None
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1)
    return path.parent / near[0] if near else None
