"""The World tokenizer: bytes in, ids out, and back.

Owns: what text and ids mean. Encoding is the greedy longest match over UTF-8 bytes, which loses nothing because every
byte has a token of its own; id 0 is the document boundary and stands for no bytes.
Refuses to know: how the longest match is found (roost.matching in Python, roost.matching_native in C++ where it was
built: the same ids), models, chat formats, normalisation (text is encoded as it comes), special strings inside text.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from itertools import accumulate, pairwise
from operator import index
from pathlib import Path
from typing import Any, Literal, SupportsIndex, cast, get_args

import numpy as np
from numpy.typing import NDArray

from roost import native
from roost.checks import instance, whole
from roost.matching import PythonMatcher, hard_pairs
from roost.matching_native import NativeMatcher
from roost.vocabulary import invert, official, read

Errors = Literal["replace", "strict", "ignore"]
"""What decoding does with bytes that are not UTF-8: U+FFFD per maximal invalid part, ValueError, or nothing."""

_WORLD_SIZE = 65536
_WORLD_RESERVED = 65530  # the first id of the official vocabulary's unassigned tail


class WorldTokenizer:
    """A vocabulary of byte strings and the greedy longest match over it.

    WorldTokenizer()              the official vocabulary rwkv_vocab_v20230424 (RWKV-4-World, Eagle, Finch)
    WorldTokenizer.byte_level()   ids 1..256 are the bytes 0..255
    WorldTokenizer.from_file(f)   any vocabulary in the official text form
    WorldTokenizer({1: b"a"...})  any vocabulary from memory; vocab_size defaults to the largest id + 1

    Two tokenizers are equal when their vocabularies are. Safe to share between threads; pickles.
    Raises ValueError unless ids are 1..2^24-1, tokens are not empty and differ, and all 256 bytes are tokens.
    """

    eod = 0
    """The document boundary: appended after each training document, decodes to nothing."""

    def __init__(self, tokens: Mapping[int, bytes] | None = None, vocab_size: int | None = None) -> None:
        if tokens is None:
            tokens = official()
            vocab_size = _WORLD_SIZE if vocab_size is None else vocab_size
        invert(tokens)
        largest = max(tokens)
        self.vocab_size = largest + 1 if vocab_size is None else vocab_size
        """Rows a model needs: one more than the largest id, assigned or reserved."""
        if self.vocab_size <= largest:
            raise ValueError(f"vocab_size is {vocab_size}, but the vocabulary has the id {largest}")
        self._tokens = [b""] * self.vocab_size
        for number, token in tokens.items():
            self._tokens[number] = token

    @classmethod
    def byte_level(cls) -> WorldTokenizer:
        """The first 257 ids of every World vocabulary: 0 and the single bytes (id k is byte k - 1)."""
        return cls({byte + 1: bytes([byte]) for byte in range(256)})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], vocab_size: int | None = None) -> WorldTokenizer:
        """Read lines "ID LITERAL BYTES", e.g. "264 '\\t ' 2" or "3028 b'\\xe4\\xbb' 2"; lines end in LF or CRLF.

        vocab_size defaults to 65536 when the largest id is 65529..65535 (the official file leaves its last ids out)
        and to the largest id + 1 otherwise. Nothing in the file is evaluated.
        Raises ValueError naming the line when the file is missing, not UTF-8, or malformed.
        """
        tokens = read(Path(path))
        if vocab_size is None and _WORLD_RESERVED - 1 <= max(tokens) < _WORLD_SIZE:
            vocab_size = _WORLD_SIZE
        try:
            return cls(tokens, vocab_size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of `text` (a str as its UTF-8 bytes); concatenated, their bytes are exactly the input.

        Raises ValueError for a lone surrogate (naming its index) and for anything but str or bytes.
        """
        return self._python.encode(_utf8(text)) if self._native is None else self.encode_array(text).tolist()

    def encode_array(self, text: str | bytes, threads: int = 1) -> NDArray[Any]:
        """`encode` as an array: (ids,) uint16, or uint32 when vocab_size is larger than 65,536.

        Several threads share a text of more than half a megabyte, cut where no token can cross; the ids are the same.
        Raises ValueError as `encode`, and for an impossible number of threads.
        """
        whole("threads", threads, 1, native.MOST_THREADS)
        if self._native is not None and isinstance(text, (str, bytes)):  # pyright: ignore[reportUnnecessaryIsInstance]
            try:
                return self._native.encode(text, threads)
            except UnicodeEncodeError:
                pass  # _utf8 says where
        return np.array(self._python.encode(_utf8(text)), np.uint16 if self.vocab_size <= _WORLD_SIZE else np.uint32)

    def encode_open(self, data: bytes) -> tuple[list[int], int]:
        """The ids at the beginning of `data` that no continuation can change, and how many bytes they are.

        Raises ValueError for anything but bytes: a str may end inside a character of the next one.
        """
        instance("data", data, bytes, "encode text first, or use StreamEncoder")
        return (self._native or self._python).encode_open(data)

    def encode_batch(self, texts: Iterable[str | bytes], threads: int = 1) -> list[list[int]]:
        """`encode` of each text, on several threads if wanted. Raises ValueError naming the text that it refuses."""
        return [ids.tolist() for ids in self.encode_arrays(texts, threads)]

    def encode_arrays(self, texts: Iterable[str | bytes], threads: int = 1) -> list[NDArray[Any]]:
        """`encode_batch` as arrays: (ids,) each, in the dtype of `encode_array`."""
        if isinstance(texts, (str, bytes)):
            raise ValueError("encode_batch wants several texts; use encode for one")
        whole("threads", threads, 1, native.MOST_THREADS)
        batch: list[bytes] = []
        for number, text in enumerate(texts):
            try:
                batch.append(_utf8(text))
            except ValueError as error:
                raise ValueError(f"text {number}: {error}") from error
        return self._native.encode_batch(batch, threads) if self._native else list(map(self.encode_array, batch))

    def is_boundary(self, left: str | bytes, right: str | bytes) -> bool:
        """True when no token can cross the seam, so that encode(left + right) == encode(left) + encode(right).

        Sufficient, not necessary; it looks at the last byte of `left` and the first of `right` only.
        """
        before, after = _utf8(left), _utf8(right)
        return not before or not after or bool(self._hard[before[-1] << 8 | after[0]])

    def token_bytes(self, id: SupportsIndex) -> bytes:
        """The bytes of one id; empty for 0 and for ids that are not assigned. Raises ValueError out of range."""
        return self._tokens[self._checked([id])[0]]

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The bytes of all ids (list, NumPy array, tensor ...); 0 and ids that are not assigned add none.

        Raises ValueError naming position and id when one is negative, >= vocab_size or no integer.
        """
        return self._joined(ids)[0]

    def decode(self, ids: Iterable[SupportsIndex], errors: Errors = "replace") -> str:
        """The text of all ids. Raises ValueError as `decode_bytes`, and for invalid UTF-8 when errors="strict"."""
        _check_errors(errors)
        data, numbers = self._joined(ids)
        try:
            return data.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            ends = list(accumulate(len(self._tokens[number]) for number in numbers))
            position = next(i for i, end in enumerate(ends) if end > error.start)
            raise ValueError(
                f"invalid UTF-8 ({error.reason}) at byte {error.start}, in id {numbers[position]} at position "
                f"{position}; decode with errors='replace' or use decode_bytes"
            ) from error

    def decode_with_offsets(self, ids: Iterable[SupportsIndex]) -> tuple[str, list[tuple[int, int]]]:
        """decode(ids) and, for each id, the characters [start, end) of that text which its bytes touch.

        An id inside a character has that character's span, so spans may overlap; an id without bytes has an empty one.
        """
        pieces = [self._tokens[number] for number in self._checked(ids)]
        data = b"".join(pieces)
        text = data.decode("utf-8", "replace")
        character = _characters(data, text)
        spans: list[tuple[int, int]] = []
        for left, right in pairwise(accumulate(map(len, pieces), initial=0)):
            spans.append((character[left], character[right - 1] + 1 if right > left else character[left]))
        return text, spans

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of vocab_size, each id's byte count (u32 little-endian), then all bytes."""
        counts = np.array([self.vocab_size, *map(len, self._tokens)], "<u4")
        return hashlib.sha256(counts.tobytes() + b"".join(self._tokens)).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WorldTokenizer) and self._tokens == other._tokens

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"WorldTokenizer(vocab_size={self.vocab_size}, tokens={sum(map(bool, self._tokens))})"

    def __reduce__(self) -> tuple[type[WorldTokenizer], tuple[dict[int, bytes], int]]:
        return WorldTokenizer, ({number: token for number, token in enumerate(self._tokens) if token}, self.vocab_size)

    @cached_property
    def _hard(self) -> NDArray[np.bool_]:
        return hard_pairs([token for token in self._tokens if token])

    @cached_property
    def _python(self) -> PythonMatcher:
        return PythonMatcher(self._tokens)

    @cached_property
    def _native(self) -> NativeMatcher | None:
        """Built when first needed; None where the native library is missing."""
        return NativeMatcher(self._tokens) if native.available() else None

    def _joined(self, ids: Iterable[SupportsIndex]) -> tuple[bytes, list[int] | NDArray[Any]]:
        """The bytes of all ids, and the ids, which are now known to be good."""
        array = _array(ids)
        if array is not None and self._native is not None:
            return self._native.decode(array), array
        numbers = self._checked(ids)
        return b"".join(map(self._tokens.__getitem__, numbers)), numbers

    def _checked(self, ids: Iterable[SupportsIndex]) -> list[int]:
        """The ids as Python integers, all of them in 0..vocab_size-1."""
        tolist = cast("Callable[[], Iterable[SupportsIndex]] | None", getattr(ids, "tolist", None))
        plain = ids if tolist is None else tolist()  # an array or a tensor: its elements are slow to index
        try:
            numbers = list(map(index, plain))
        except TypeError as error:
            raise ValueError(f"ids must be one flat sequence of integers: {error}") from error
        if numbers and not (min(numbers) >= 0 and max(numbers) < self.vocab_size):
            position, bad = next((i, n) for i, n in enumerate(numbers) if not 0 <= n < self.vocab_size)
            raise ValueError(f"id {bad} at position {position} is not in 0..{self.vocab_size - 1}")
        return numbers


class StreamDecoder:
    """Decodes one stream of ids piece by piece: never half a character, never a lost tail.

    The pieces joined equal `tokenizer.decode(all_ids, errors)`, wherever the stream is split; at most 3 bytes (the
    beginning of a character) are held back. Malformed bytes are replaced as soon as they are known to be malformed.
    Raises ValueError as `decode` does.
    """

    def __init__(self, tokenizer: WorldTokenizer, errors: Errors = "replace") -> None:
        _check_errors(errors)
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, id: SupportsIndex) -> str:
        """The text that `id` completes: often one token's, "" inside a character."""
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """The end of the stream: an unfinished character as U+FFFD. The decoder is then ready for another stream."""
        try:
            return self._decoder.decode(b"", final=True)
        finally:
            self._decoder.reset()  # a strict decoder keeps what it refuses


class StreamEncoder:
    """Encodes one text piece by piece: the ids joined equal `tokenizer.encode(whole)`, wherever it is split.

    An id is given out as soon as no continuation can change it; at most the bytes of the longest token are held back.
    """

    def __init__(self, tokenizer: WorldTokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending = b""

    def push(self, text: str | bytes) -> list[int]:
        """The ids that `text` completes. Raises ValueError as `encode` does; the stream is then as it was before."""
        data = self._pending + _utf8(text)
        ids, used = self._tokenizer.encode_open(data)
        self._pending = data[used:]
        return ids

    def flush(self) -> list[int]:
        """The ids of what was held back. The encoder is then ready for another stream."""
        data, self._pending = self._pending, b""
        return self._tokenizer.encode(data)


def _characters(data: bytes, text: str) -> list[int]:
    """For each byte the index of its character in `text` (data decoded with "replace"), and len(text) for the end."""
    first = np.bitwise_and(np.frombuffer(data, np.uint8), 0xC0) != 0x80
    at = -1
    for valid in text.split("\ufffd"):
        if at >= 0:  # the replacement character before this piece: how many bytes made it?
            first[at] = True
            try:
                data[at : at + 4].decode()
                at += 3
            except UnicodeDecodeError as error:
                at += 3 if error.start else error.end
        else:
            at = 0
        at += len(valid.encode())
    return [*(np.cumsum(first) - 1).tolist(), len(text)]


def _utf8(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]  (callers without a type checker)
        raise ValueError(f"text must be str or bytes, not {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"lone surrogate {text[error.start]!r} at index {error.start} has no UTF-8; "
            "repair the text, or encode bytes, which may be anything"
        ) from error


def _array(ids: Iterable[SupportsIndex]) -> NDArray[Any] | None:
    """A NumPy array of integers or an integer tensor in the processor's memory, as a 1-D array; None for the rest."""
    view = getattr(ids, "__array__", None) if getattr(ids, "is_cpu", True) else None
    if view is None or getattr(ids, "requires_grad", False):
        return None
    try:
        array = np.asarray(ids)
    except TypeError:  # a tensor in a type that NumPy lacks: certainly not integers
        return None
    return array if array.ndim == 1 and array.dtype.kind in "iu" and array.dtype != np.uint64 else None


def _check_errors(errors: str) -> None:
    known = get_args(Errors)
    if errors not in known:
        near = difflib.get_close_matches(errors, known, 1, 0) or known
        raise ValueError(f"errors is {errors!r}; it must be one of {', '.join(known)} (did you mean {near[0]!r}?)")
