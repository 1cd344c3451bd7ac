"""Preferences: pairs of answers to one prompt, as lines of a file and as batches.

    {"prompt": ..., "chosen": ..., "rejected": ...}   or "messages" in place of "prompt"

Owns: this shape; that both answers stand behind the same tokens, also where a long prompt was shortened; that a pair
is never divided, whatever share of a batch is asked for. A batch is a pure function of (seed, step).
Refuses to know: losses, where reference values come from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roost.checks import choice, instance, whole
from roost.data.batch import Batch, check_parts, samples
from roost.data.conversations import (
    Faults,
    Segment,
    Template,
    Turn,
    message_turns,
    object_of,
    read_records,
    text_of,
)
from roost.data.order import shuffled
from roost.data.sft import Document, Documents, Encoder, LongConversations, collect, joined, packed_batch
from roost.data.sources import BadLines
from roost.tokenizer import WorldTokenizer


class Pair(NamedTuple):
    """A prompt, of which nothing is learned, and two answers to it, of which all is learned but `Assistant:`."""

    prompt: tuple[Turn, ...]
    chosen: Turn
    rejected: Turn


def parse_pair(record: object, template: Template = "chat") -> Pair:
    """The pair of an object with "prompt" (text) or "messages", and "chosen" and "rejected" (text).

    Raises ValueError as `parse_conversation`, when the messages end with the assistant's, and for equal answers.
    """
    given = object_of(record)
    if ("prompt" in given) == ("messages" in given) or "chosen" not in given or "rejected" not in given:
        raise ValueError(f'expected "prompt" or "messages", "chosen" and "rejected", not the keys {sorted(given)}')
    answers = [text_of(given, key) for key in ("chosen", "rejected")]
    if template == "plain":
        prompt = (Turn("user", (Segment(text_of(given, "prompt"), False),)),)
        chosen, rejected = (Turn("assistant", (Segment(answer, True),)) for answer in answers)
    else:
        messages = given.get("messages")
        if messages is None:
            messages = [{"role": "user", "content": text_of(given, "prompt")}]
        prompt = tuple(_unlearned(turn) for turn in message_turns(messages, ()))
        if not prompt or prompt[-1].role not in ("user", "tool"):
            raise ValueError("the messages must end with one by 'user' or 'tool', which chosen and rejected answer")
        chosen, rejected = (_answer(key, answer) for key, answer in zip(("chosen", "rejected"), answers, strict=True))
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same text")
    return Pair(prompt, chosen, rejected)


def _unlearned(turn: Turn) -> Turn:
    return turn._replace(segments=tuple(segment._replace(loss=False) for segment in turn.segments))


def _answer(key: str, text: str) -> Turn:
    messages = [{"role": "user", "content": key}, {"role": "assistant", "content": text}]
    return message_turns(messages, ("assistant",))[-1]


def read_pairs(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: WorldTokenizer,
    ctx: int,
    *,
    template: Template = "chat",
    long: LongConversations = "shorten",
    bad_lines: BadLines = "fail",
) -> Documents:
    """All pairs of all jsonl files: document 2 i is the prompt with the chosen answer, 2 i + 1 with the rejected one.

    Arguments and errors as `read_conversations`; a prompt is shortened so that both answers fit behind the same rest.
    """
    choice("template", template, get_args(Template))
    choice("bad_lines", bad_lines, get_args(BadLines))
    encoder, faults, documents = Encoder(tokenizer, ctx, long), Faults(bad_lines), list[Document]()
    for pair in read_records(paths, lambda record: parse_pair(record, template), faults):
        turns = [*pair.prompt, pair.chosen]
        *prompt, chosen = encoder.parts(turns)
        (rejected,) = encoder.parts([pair.rejected])
        longer = max(len(chosen.ids), len(rejected.ids))
        start = encoder.first_kept(turns, [*(len(part.ids) for part in prompt), longer])
        if start is not None:
            documents += (joined(turns, [*prompt, answer], start) for answer in (chosen, rejected))
    return collect(documents, encoder, faults, each=2)


@dataclass(frozen=True)
class PairBatch(Batch):
    """Pairs in one row: sequences 2 i and 2 i + 1 are a prompt with its chosen and its rejected answer.

    reference  (2 n,) fp32, the reference's log-probability of each answer
    """

    reference: Tensor | None = None

    def split(self, parts: int) -> list[Batch]:
        """Equal shares of the pairs, in order. Raises ValueError when there are no such shares."""
        assert self.cu_seqlens is not None and self.reference is not None
        check_parts("pairs", len(self.reference) // 2, parts)
        size, shares = len(self.reference) // parts, list[Batch]()
        for first in range(0, len(self.reference), size):
            offsets = self.cu_seqlens[first : first + size + 1]
            part = slice(offsets[0], offsets[-1])
            inside = tuple(at - offsets[0] for at in offsets)
            share = self.reference[first : first + size]
            shares.append(PairBatch(self.inputs[:, part], self.targets[:, part], inside, share))
        return shares

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch on a device."""
        reference = None if self.reference is None else self.reference.to(device)
        return PairBatch(self.inputs.to(device), self.targets.to(device), self.cu_seqlens, reference)


class Reference(NamedTuple):
    """logprobs (2 n,) fp32 of the answers of `read_pairs`, and the fingerprint of the weights they come from."""

    logprobs: NDArray[np.float32]
    fingerprint: str


class PairLoader:
    """Batches of pairs, as a function of the step; an epoch's order is a permutation of (seed, epoch).

    documents  from `read_pairs`
    reference  from `reference_logprobs`
    batch      pairs a step
    seed       of the order, 0 <= seed < 2**64
    settings   what else decides a run (the objective's numbers); part of `identity`

    `windows` is the number of pairs. Raises ValueError when a number is out of range or the reference is of other data.
    """

    def __init__(
        self,
        documents: Documents,
        reference: Reference,
        batch: int,
        *,
        seed: int = 0,
        settings: Mapping[str, int | str] | None = None,
    ) -> None:
        instance("documents", documents, Documents, "see read_pairs")
        if reference.logprobs.shape != (len(documents),) or len(documents) % 2:
            raise ValueError(f"{len(documents)} documents and {reference.logprobs.shape} reference values are no pairs")
        self.documents, self.reference = documents, reference
        self.batch, self.seed = whole("batch", batch, 1), whole("seed", seed, 0, 2**64 - 1)
        self.windows = len(documents) // 2
        self.tokens_per_step = float(documents.lengths.sum()) / (self.windows / self.batch)
        about = {"task": "dpo", **documents.identity, "reference": reference.fingerprint, **(settings or {})}
        self._identity: dict[str, int | str] = {**about, "batch": self.batch, "data_seed": self.seed}

    @property
    def identity(self) -> Mapping[str, int | str]:
        """What decides the batches: the pairs, the reference's weights, batch, seed and `settings`."""
        return dict(self._identity)

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> PairBatch:
        """Share `part` of `parts` of one step's pairs, in one row.

        Raises ValueError when step is negative or `batch` pairs have no such share.
        """
        places = samples(self.batch, step, part, parts, "pairs")
        chosen = [shuffled(k, self.windows, self.seed) for k in places]
        numbers = [2 * i + side for i in chosen for side in (0, 1)]
        row = packed_batch(self.documents, numbers)
        return PairBatch(row.inputs, row.targets, row.cu_seqlens, torch.from_numpy(self.reference.logprobs[numbers]))
