"""Which parts of a model a name means, and which of them are trained.

A pattern is an official name ("emb.weight"), a run of its dotted parts ("att.key", "ln1", "blocks.0"), or a glob over
either ("blocks.*.att", "time_*").

Owns: that rule, and `requires_grad`.
Refuses to know: why a part is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import combinations

from torch import nn

from roost.checks import nearest


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name contains, between dots, what the pattern says."""
    return any(fnmatchcase(name, glob) for glob in (pattern, f"{pattern}.*", f"*.{pattern}", f"*.{pattern}.*"))


def select(names: Iterable[str], patterns: Sequence[str], what: str) -> list[str]:
    """The names that any pattern matches, in their own order.

    Raises ValueError for a pattern that matches none; the message begins with `what` and names the nearest part.
    """
    known = list(names)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in known):
            runs = dict.fromkeys(run for name in known for run in _runs(name.split(".")))
            raise ValueError(f"{what}: nothing is called {pattern!r}; did you mean {nearest(pattern, runs)!r}?")
    return [name for name in known if any(matches(name, pattern) for pattern in patterns)]


def _runs(parts: Sequence[str]) -> list[str]:
    """Everything a pattern can name in full."""
    return [".".join(parts[i:j]) for i, j in combinations(range(len(parts) + 1), 2)]


def freeze(model: nn.Module, frozen: Sequence[str] = (), trained: Sequence[str] | None = None) -> list[str]:
    """Train only some parameters: those that `trained` matches (None: all) and `frozen` does not; returns their names.

    Sets requires_grad of every parameter. Raises ValueError for a pattern that matches nothing, and when nothing is
    left to train; the model is then as it was.
    """
    names = [name for name, _ in model.named_parameters()]
    still = set(select(names, frozen, "freeze"))
    chosen = names if trained is None else select(names, trained, "train")
    kept = [name for name in chosen if name not in still]
    if not kept:
        raise ValueError(f"freeze {list(frozen)} leaves nothing to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)
        if name not in kept:
            parameter.grad = None
    return kept
