"""One sequence: read a prompt in chunks, then write token by token.

Owns the invariant of what comes back: `state` has read the prompt and `tokens`, no more and no less, and the bytes of
`tokens` are `text`, also when a stop string, the caller or Ctrl-C cut the last token in two. Nothing of a stop string
is ever shown, and no character is shown in halves.
Refuses to know: how a token is chosen (sampling.py), chat formats, several sequences at a time.
"""

from __future__ import annotations

import codecs
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from roost.checks import instance, integers, whole
from roost.inference.sampling import (
    Penalties,
    Sampling,
    TokenLogprobs,
    draw,
    logprobs,
    probabilities,
    silent_ids,
    uncounted_ids,
)
from roost.inference.stop import StopFilter
from roost.models.native import LanguageModel
from roost.state import State
from roost.tokenizer import WorldTokenizer

Progress = Callable[[int, int], None]
"""Called with (tokens read, tokens in all) after every chunk."""

FinishReason = Literal["stop", "length", "closed"]
"""A stop string or stop id, `max_tokens`, or `Stream.close`."""


@dataclass(frozen=True)
class Usage:
    """What a call cost: tokens of the prompt, and tokens drawn (those of a stop string included)."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Completion:
    """What was written, and where the model stands.

    text           without the stop string; bytes that are not UTF-8 are U+FFFD
    tokens         ids whose bytes are `text`; the rest of a token that a stop string cut in two is encoded anew
    finish_reason  "stop", "length" or "closed"
    usage          token counts
    logprobs       one per drawn token that is wholly in the text; empty unless `Sampling.logprobs` > 0
    state          has read the prompt and `tokens`, never a stop string or stop id
    logits         (V,) for the token after `state`; with both, `stream(..., "", state=, logits=)` writes on
    seed           that draws the same tokens again
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...]
    state: State
    logits: Tensor
    seed: int


@torch.no_grad()
def read(
    model: LanguageModel,
    tokens: Sequence[int],
    state: State | None = None,
    *,
    chunk: int = 512,
    progress: Progress | None = None,
) -> tuple[Tensor, State]:
    """Read ids after `state` (None: from the beginning), `chunk` at a time: memory does not grow with the text.

    Returns the logits (V,) of what comes next and the state. Raises ValueError when there is nothing to read.
    """
    chunk, tokens = whole("chunk", chunk, 1), integers("tokens", tokens)
    if not tokens:
        raise ValueError("there are no tokens to read; give at least one (0 is the document boundary)")
    logits: Tensor | None = None
    for start in range(0, len(tokens), chunk):
        piece = torch.tensor([tokens[start : start + chunk]], dtype=torch.int64, device=model.device)
        logits, state = model(piece, state, last_only=True)
        if progress:
            progress(min(start + chunk, len(tokens)), len(tokens))
    assert logits is not None and state is not None
    return logits[0, -1], state


def stream(
    model: LanguageModel,
    tokenizer: WorldTokenizer,
    prompt: str | bytes | Sequence[int],
    params: Sampling | None = None,
    *,
    max_tokens: int = 256,
    state: State | None = None,
    logits: Tensor | None = None,
    chunk: int = 512,
    progress: Progress | None = None,
) -> Stream:
    """Read `prompt` (text, bytes or ids) after `state`, then write: iterate over the result for pieces of text.

    The prompt is read before this returns, and `progress` follows it. An empty prompt means the document boundary
    (id 0) without a state. With one it needs the `logits` that came with that state: a state alone does not say what
    comes next. `params` None = `Sampling()`.

    Raises ValueError for a negative max_tokens, ids out of range, a tokenizer or state that does not fit the model.
    """
    params = params or Sampling()
    instance("tokenizer", tokenizer, WorldTokenizer, "roost.load gives None for a model without a World vocabulary")
    instance("params", params, Sampling)
    max_tokens = whole("max_tokens", max_tokens, 0)
    vocab = model.config.vocab_size
    if tokenizer.vocab_size > vocab:
        raise ValueError(f"this tokenizer has {tokenizer.vocab_size} ids, the model only {vocab}: it needs another one")
    for name, ids in (("bans", params.bans), ("stop_ids", params.stop_ids)):
        if ids and max(ids) >= vocab:
            raise ValueError(f"{name} holds {max(ids)}, but the model has only {vocab} tokens")

    tokens = tokenizer.encode(prompt) if isinstance(prompt, (str, bytes)) else integers("prompt", prompt)
    if not tokens and state is None:
        tokens = [tokenizer.eod]
    if tokens:
        logits, state = read(model, tokens, state, chunk=chunk, progress=progress)
    elif logits is None or logits.shape != (vocab,):
        shape = "none" if logits is None else f"{tuple(logits.shape)} instead of {(vocab,)}"
        raise ValueError(
            "the prompt is empty, and a state alone does not say what comes next: give at least one token to read"
            f" after it, or the logits that came with it (got {shape})"
        )
    assert logits is not None and state is not None
    return Stream(model, tokenizer, params, max_tokens, len(tokens), state, logits)


def generate(
    model: LanguageModel,
    tokenizer: WorldTokenizer,
    prompt: str | bytes | Sequence[int],
    params: Sampling | None = None,
    *,
    max_tokens: int = 256,
    state: State | None = None,
    logits: Tensor | None = None,
    chunk: int = 512,
    progress: Progress | None = None,
) -> Completion:
    """`stream` to its end; the arguments are the same."""
    running = stream(
        model,
        tokenizer,
        prompt,
        params,
        max_tokens=max_tokens,
        state=state,
        logits=logits,
        chunk=chunk,
        progress=progress,
    )
    for _ in running:
        pass
    return running.result


class _Mark(NamedTuple):
    """A place in the written text where the state is known: after `read` tokens, `end` bytes."""

    end: int
    read: int
    state: State
    logits: Tensor


class Stream(Iterator[str]):
    """Text as it is written; made by `stream`. Once exhausted or closed, `result` holds the rest.

    Interrupting it anywhere (Ctrl-C too) is safe: `close` goes back to the text that was yielded.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: WorldTokenizer,
        params: Sampling,
        max_tokens: int,
        prompt_tokens: int,
        state: State,
        logits: Tensor,
    ) -> None:
        self._model, self._tokenizer, self._params = model, tokenizer, params
        self._max_tokens, self._prompt_tokens = max_tokens, prompt_tokens
        self._seed = secrets.randbits(64) if params.seed is None else params.seed
        self._penalties = Penalties(uncounted=uncounted_ids(tokenizer) if params.spare_digits else frozenset())
        silent = silent_ids(tokenizer, model.config.vocab_size)
        self._may_stop, self._may_not_stop = np.array(silent), np.array(silent)
        self._may_stop[list(params.stop_ids)] = False
        self._may_not_stop[list(params.stop_ids)] = True
        self._filter = StopFilter(params.stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # drawn, whether the model has read them or not; never a stop id
        self._drawn = 0
        self._logprobs: list[TokenLogprobs] = []
        self._pieces: list[tuple[str, int]] = []  # yielded, with the bytes yielded so far
        self._marks = deque([_Mark(0, 0, state, logits)])  # from the last one not after the yielded text onwards
        self._result: Completion | None = None

    def __next__(self) -> str:
        """The next piece, never empty. Raises StopIteration at the end."""
        while self._result is None:
            if piece := self._step():
                return piece
        raise StopIteration

    @property
    def result(self) -> Completion:
        """What was written. Raises ValueError while the text goes on: exhaust the stream or `close` it first."""
        if self._result is None:
            raise ValueError("the text is not finished: exhaust the stream, or close() it")
        return self._result

    def close(self) -> Completion:
        """Stop here. The result holds the text yielded so far, and a state that has read exactly that."""
        return self._result or self._finish("closed", self._yielded, "")

    @property
    def _yielded(self) -> int:
        return self._pieces[-1][1] if self._pieces else 0

    def _step(self) -> str:
        """Draw one token; the piece of text that it decides (often one token's, perhaps none)."""
        self._catch_up()
        params, at = self._params, self._marks[-1]
        if len(self._ids) >= self._max_tokens:
            return self._end("length", self._filter.flush())
        forbidden = self._may_not_stop if len(self._ids) < params.min_tokens else self._may_stop
        token = draw(probabilities(at.logits, params, self._penalties, forbidden), self._seed, len(self._ids))
        self._drawn += 1
        if token in params.stop_ids:
            return self._end("stop", self._filter.flush())
        if params.logprobs:
            self._logprobs.append(logprobs(at.logits, token, params.logprobs, self._tokenizer))
        self._penalties = self._penalties.after(token, params.penalty_decay)
        self._ids.append(token)
        released, stopped = self._filter.push(self._tokenizer.token_bytes(token))
        if stopped:
            return self._end("stop", released)
        piece = self._decoder.decode(released)
        if piece:
            pending, _ = self._decoder.getstate()
            self._pieces.append((piece, self._filter.released - len(pending)))
        return piece

    def _catch_up(self) -> None:
        """Let the model read the token drawn last, unless it has; forget places that no cut can go back to."""
        at = self._marks[-1]
        if at.read < len(self._ids):
            token = self._ids[at.read]
            logits, state = read(self._model, [token], at.state)
            self._marks.append(_Mark(at.end + len(self._tokenizer.token_bytes(token)), at.read + 1, state, logits))
        while len(self._marks) > 1 and self._marks[1].end <= self._yielded:
            self._marks.popleft()

    def _end(self, reason: FinishReason, released: bytes) -> str:
        """Finish by itself; `released` are the last bytes of the text."""
        piece = self._decoder.decode(released, final=True)
        self._finish(reason, self._filter.released, piece)
        return piece

    def _finish(self, reason: FinishReason, end: int, tail: str) -> Completion:
        """The result for the first `end` bytes; `tail` is the text after the pieces already yielded."""
        marks = self._marks.copy()
        while marks[-1].end > end:
            marks.pop()
        at = marks[-1]
        tokens, whole, state, logits = self._ids[: at.read], at.read, at.state, at.logits
        if at.end < end:  # the cut is inside or right behind the next token
            token = self._ids[at.read]
            kept = self._tokenizer.token_bytes(token)[: end - at.end]
            whole += len(kept) == len(self._tokenizer.token_bytes(token))
            rest = self._tokenizer.encode(kept)
            logits, state = read(self._model, rest, state)
            tokens = tokens + rest
        self._result = Completion(
            "".join(piece for piece, _ in self._pieces) + tail,
            tuple(tokens),
            reason,
            Usage(self._prompt_tokens, self._drawn),
            tuple(self._logprobs[:whole]),
            state,
            logits,
            self._seed,
        )
        return self._result
