"""The token files of a run: whether they belong to its model, and held-out ones as validation streams.

Owns: that a file and a model share a vocabulary, which PREFIX.report.json tells where `prepare` wrote one and the ids
themselves tell in part; names, domains and languages of validation streams; the bytes that an id stands for.
Refuses to know: recipes, weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from roost.data.binidx import TokenFile
from roost.data.report import read_report
from roost.tokenizer import WorldTokenizer
from roost.training.validation import Held


class Valid(NamedTuple):
    """A held-out token file. Without a domain or language: the one that its PREFIX.report.json names, if just one."""

    path: str
    domain: str = ""
    language: str = ""


def check_vocabulary(file: TokenFile, tokenizer: WorldTokenizer | None, vocab_size: int) -> dict[str, Any]:
    """The report of a token file ({} without one), known to be of the model's vocabulary.

    Reads the file, unless its dtype cannot hold an id of vocab_size or more. Raises ValueError, naming both, for the
    report of another vocabulary, and for ids outside 0..vocab_size-1.
    """
    path = Path(f"{file.path.with_suffix('')}.report.json")
    report = read_report(path)
    found = report.get("tokenizer")
    if tokenizer is not None and found not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{file.path} was made with a vocabulary of {report.get('vocab_size')} ids ({found[:9]}, says {path.name}),"
            f" the model's has {tokenizer.vocab_size} ids ({tokenizer.fingerprint[:9]}): prepare the text again with"
            " the model's, or name the model's file with the key 'vocabulary'"
        )
    file.check_ids(vocab_size)
    return report


def held_out(streams: Sequence[Valid], tokenizer: WorldTokenizer | None, vocab_size: int) -> dict[str, Held]:
    """The validation streams, by the names of their files (whole paths where two are the same).

    Raises ValueError as `TokenFile` and `check_vocabulary`, and for fewer than 2 tokens.
    """
    if not streams:
        return {}
    lengths, found = byte_lengths(tokenizer, vocab_size), dict[str, Held]()
    names = [Path(path).name for path, _, _ in streams]
    for (path, domain, language), name in zip(streams, names, strict=True):
        file = TokenFile(path)
        if len(file) < 2:
            raise ValueError(f"valid {path} has {len(file)} token(s); at least 2 are needed")
        report = check_vocabulary(file, tokenizer, vocab_size)
        about = domain or _only(report, "domains"), language or _only(report, "languages")
        tokens = torch.from_numpy(file.tokens.astype("int64"))
        found[path if names.count(name) > 1 else name] = Held(tokens, lengths, *about)
    return found


def byte_lengths(tokenizer: WorldTokenizer | None, vocab_size: int) -> Tensor:
    """Bytes each id of a model stands for, (V,) int64: 0 for ids that stand for none, and without a tokenizer."""
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    if tokenizer is not None:
        known = range(tokenizer.vocab_size)
        lengths[: len(known)] = torch.tensor([len(tokenizer.token_bytes(i)) for i in known])
    return lengths


def _only(report: dict[str, Any], group: str) -> str:
    names = list(report.get(group, ()))
    return names[0] if len(names) == 1 and names != ["unknown"] else ""
