"""Instruction tuning: conversations to ids with a loss mask, and batches that pack them without a leak.

    ids      encode(segment) of every segment, one behind the other, and token 0 at the end of a conversation
    mask     a token is a target when its segment is learned; segments end where roles do, so no token is in two roles
    target   of position t: ids[t + 1] where that is learned, else -1; a loss is due where the NEXT token is learned

Token 0 is learned with the answer before it. What follows the last learned token is left out: nothing learns from it,
and a conversation whose last message has no answer ends with the one that has.

Owns: the mask, what happens to conversations longer than a row, and the order of rows. A batch is a pure function of
(seed, step): rows are packed anew every epoch (`data/packing.py`) and drawn in a permutation of (seed, epoch). Every
conversation starts from the initial state, as `roost chat` does (cu_seqlens), and no position is padding.
Refuses to know: shapes of lines (`data/conversations.py`), models, devices.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from roost.checks import choice, instance, whole
from roost.data.batch import Batch, samples
from roost.data.conversations import ROLES, Faults, Template, Turn, parse_conversation, read_records
from roost.data.order import shuffled
from roost.data.packing import Packed, pack
from roost.data.sources import BadLines
from roost.tokenizer import WorldTokenizer

LongConversations = Literal["shorten", "drop"]
"""What to do with a conversation longer than a row: leave out its oldest exchanges, or all of it."""


class Document(NamedTuple):
    """ids (n,) uint16 (uint32 beyond 65,536 tokens) and whether each is learned, (n,) bool."""

    ids: NDArray[Any]
    loss: NDArray[np.bool_]


@dataclass(frozen=True)
class Report:
    """What became of the lines.

    kept       conversations (pairs for preferences) that are trained on
    tokens     their ids; learned: those that are targets
    bad_lines  lines that could not be used; first_bad: the first ten, each with file, line and reason
    shortened  conversations that lost turns_cut of their oldest turns to fit
    too_long   conversations left out because even their last exchange is too long, or by choice
    """

    kept: int
    tokens: int
    learned: int
    bad_lines: int
    first_bad: tuple[str, ...]
    shortened: int
    turns_cut: int
    too_long: int


@dataclass(frozen=True)
class Documents:
    """Conversations in memory: document i is [offsets[i], offsets[i + 1]) of ids and loss; 3 to 5 bytes a token."""

    ids: NDArray[Any]
    loss: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    report: Report

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> Document:
        part = slice(self.offsets[i], self.offsets[i + 1])
        return Document(self.ids[part], self.loss[part])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Positions that each document takes in a row, (n,): its ids but the last, which is only a target."""
        return np.diff(self.offsets) - 1

    @property
    def identity(self) -> dict[str, int | str]:
        """Tokens, and a digest of all ids, masks and borders."""
        digest = hashlib.sha256()
        for array in (self.ids.astype("<u4"), self.loss, self.offsets.astype("<i8")):
            digest.update(np.ascontiguousarray(array).data)
        return {"data_tokens": len(self.ids), "data_digest": digest.hexdigest()[:16]}


class Encoder:
    """Turns to documents of at most `ctx` positions; counts what did not fit.

    Raises ValueError for a ctx below 1 and an unknown choice of `long`.
    """

    def __init__(self, tokenizer: WorldTokenizer, ctx: int, long: LongConversations = "shorten") -> None:
        instance("tokenizer", tokenizer, WorldTokenizer)
        choice("long", long, get_args(LongConversations))
        self.tokenizer, self.ctx, self.long = tokenizer, whole("ctx", ctx, 1), long
        self.shortened = self.turns_cut = self.too_long = 0

    def parts(self, turns: Sequence[Turn]) -> list[Document]:
        """One document per turn; the last one ends with token 0, learned when what stands before it is."""
        texts = [segment.text for turn in turns for segment in turn.segments]
        encoded = iter(self.tokenizer.encode_batch(texts))
        dtype = np.uint16 if self.tokenizer.vocab_size <= 65536 else np.uint32
        found: list[Document] = []
        for turn in turns:
            ids: list[int] = []
            loss: list[bool] = []
            for segment in turn.segments:
                some = next(encoded)
                ids += some
                loss += [segment.loss] * len(some)
            if len(found) == len(turns) - 1:
                ids.append(self.tokenizer.eod)
                loss.append(loss[-1])
            found.append(Document(np.array(ids, dtype), np.array(loss, np.bool_)))
        return found

    def first_kept(self, turns: Sequence[Turn], sizes: Sequence[int]) -> int | None:
        """The turn to go on with behind the system messages at the front, so that all fits; None when nothing does.

        sizes  tokens of each turn. A conversation goes on with a user's turn, so that none begins with an answer.
        Counts what is left out.
        """
        system = _front(turns)
        room = self.ctx + 1 - sum(sizes[:system])
        if sum(sizes[system:]) <= room:
            return system
        behind = list(accumulate(reversed(sizes)))[::-1]  # tokens of this turn and all after it
        starts = [i for i in range(system + 1, len(turns)) if turns[i].role == "user" and behind[i] <= room]
        if self.long == "drop" or not starts:
            self.too_long += 1
            return None
        self.shortened += 1
        self.turns_cut += starts[0] - system
        return starts[0]

    def encode(self, turns: Sequence[Turn]) -> Document | None:
        """The document of a conversation, or None when it does not fit."""
        parts = self.parts(turns)
        while not parts[-1].loss.any():
            parts.pop()
        last = parts[-1]
        end = int(np.flatnonzero(last.loss)[-1]) + 1
        parts[-1] = Document(last.ids[:end], last.loss[:end])
        turns = turns[: len(parts)]
        start = self.first_kept(turns, [len(part.ids) for part in parts])
        return None if start is None else joined(turns, parts, start)


def _front(turns: Sequence[Turn]) -> int:
    """How many system messages stand at the front."""
    return next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))


def joined(turns: Sequence[Turn], parts: Sequence[Document], start: int) -> Document:
    """The system messages at the front and the turns from `start` on, as one document."""
    kept = [*parts[: _front(turns)], *parts[start:]]
    return Document(np.concatenate([part.ids for part in kept]), np.concatenate([part.loss for part in kept]))


def collect(documents: Iterable[Document], encoder: Encoder, faults: Faults, each: int = 1) -> Documents:
    """All documents in memory, `each` of them counted as one. Raises ValueError when there are none."""
    found = list(documents)
    if not found:
        reasons = f"{faults.count} bad lines, {encoder.too_long} too long for ctx {encoder.ctx}"
        raise ValueError("\n".join([f"no conversation is left to train on: {reasons}", *faults.first]))
    ids = np.concatenate([document.ids for document in found])
    loss = np.concatenate([document.loss for document in found])
    offsets = np.cumsum([0, *(len(document.ids) for document in found)], dtype=np.int64)
    report = Report(
        kept=len(found) // each,
        tokens=len(ids),
        learned=int(loss.sum()),
        bad_lines=faults.count,
        first_bad=tuple(faults.first),
        shortened=encoder.shortened,
        turns_cut=encoder.turns_cut,
        too_long=encoder.too_long,
    )
    return Documents(ids, loss, offsets, report)


def check_roles(loss_on: object) -> tuple[str, ...]:
    """`loss_on` as a tuple. Raises ValueError unless it is some of the roles."""
    if not isinstance(loss_on, (tuple, list)) or not loss_on:
        raise ValueError(f"loss_on is {loss_on!r}; it must be a list of at least one of {', '.join(ROLES)}")
    for role in loss_on:  # pyright: ignore[reportUnknownVariableType]
        choice("loss_on", role, ROLES)
    return tuple(loss_on)  # pyright: ignore[reportUnknownArgumentType]


def read_conversations(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: WorldTokenizer,
    ctx: int,
    *,
    loss_on: Sequence[str] = ("assistant",),
    template: Template = "chat",
    long: LongConversations = "shorten",
    bad_lines: BadLines = "fail",
) -> Documents:
    """All conversations of all files, tokenised and masked (see `parse_conversation` for the shapes).

    ctx        positions a conversation may take; `long` says what becomes of a longer one: "shorten" leaves out its
               oldest exchanges, whole turns, and keeps system messages at the front; "drop" leaves it out
    bad_lines  "fail" at the first line that cannot be used, or "skip" and count

    Raises ValueError for unusable files and lines, and when nothing is left.
    """
    roles = check_roles(loss_on)
    choice("template", template, get_args(Template))
    choice("bad_lines", bad_lines, get_args(BadLines))
    encoder, faults = Encoder(tokenizer, ctx, long), Faults(bad_lines)
    conversations = read_records(paths, lambda record: parse_conversation(record, roles, template), faults)
    documents = (document for turns in conversations if (document := encoder.encode(turns)) is not None)
    return collect(documents, encoder, faults)


class SftLoader:
    """Batches of packed conversations, as a function of the step.

    documents  from `read_conversations`, none longer than ctx positions
    ctx        positions a row holds at most
    batch      rows a step; a share of them is concatenated to one row with cu_seqlens, so T varies a little
    seed       of the packing and the order, 0 <= seed < 2**64

    `windows` is the number of rows of an epoch, the same for all epochs; `tokens_per_step` is a mean.
    Raises ValueError when a number is out of range or a document does not fit.
    """

    def __init__(self, documents: Documents, ctx: int, batch: int, *, seed: int = 0) -> None:
        instance("documents", documents, Documents, "see read_conversations")
        self.documents, self.ctx = documents, whole("ctx", ctx, 1)
        self.batch, self.seed = whole("batch", batch, 1), whole("seed", seed, 0, 2**64 - 1)
        self._plans: dict[int, Packed] = {}
        self.windows = self._packed(0).rows
        self.tokens_per_step = float(documents.lengths.sum()) / (self.windows / self.batch)
        self._identity = {"task": "sft", **documents.identity, "ctx": self.ctx, "batch": self.batch}

    @property
    def identity(self) -> Mapping[str, int | str]:
        """What decides the batches: a digest of the documents, ctx, batch and seed."""
        return {**self._identity, "data_seed": self.seed}

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Share `part` of `parts` of one step's rows: inputs and targets (1, T), a sequence per conversation.

        Raises ValueError when step is negative or `batch` rows have no such share.
        """
        rows = samples(self.batch, step, part, parts)
        return packed_batch(self.documents, [i for k in rows for i in self._row(k).tolist()])

    def _row(self, sample: int) -> NDArray[np.int64]:
        """The documents of one row, by number."""
        return self._packed(sample // self.windows).row(shuffled(sample, self.windows, self.seed))

    def _packed(self, epoch: int) -> Packed:
        if epoch not in self._plans:
            mixed = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0]
            # a step may touch two epochs; other plans are dropped
            self._plans = {known: plan for known, plan in self._plans.items() if abs(known - epoch) == 1}
            self._plans[epoch] = pack(self.documents.lengths, self.ctx, int(mixed))
        return self._plans[epoch]


def packed_batch(documents: Documents, numbers: Sequence[int]) -> Batch:
    """Some documents in one row, (1, T) with their offsets: inputs, and targets -1 where nothing is learned."""
    chosen = [documents[i] for i in numbers]
    inputs = np.concatenate([document.ids[:-1] for document in chosen]).astype(np.int64)
    targets = np.concatenate(
        [np.where(document.loss[1:], document.ids[1:].astype(np.int64), -1) for document in chosen]
    )
    offsets = tuple(accumulate((len(document.ids) - 1 for document in chosen), initial=0))
    return Batch(torch.from_numpy(inputs)[None], torch.from_numpy(targets)[None], offsets)
