"""roost.matching_native: the ids of the Python matcher, however the work is cut, on any vocabulary and any bytes."""

from __future__ import annotations

import copy
import ctypes
import gc
import hashlib
import json
import pickle
import random
import threading
import weakref
from importlib.resources import files
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from roost import WorldTokenizer, native
from roost.matching import PythonMatcher
from roost.matching_native import NativeMatcher

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())

WORLD = WorldTokenizer()
TOKENS = [WORLD.token_bytes(id) for id in range(WORLD.vocab_size)]
PYTHON = PythonMatcher(TOKENS)
NATIVE = NativeMatcher(TOKENS) if native.available() else None
BYTES = [b"", *(bytes([byte]) for byte in range(256))]
ISAS = native.supported_isas() if native.available() else ()


def world() -> NativeMatcher:
    assert NATIVE is not None
    return NATIVE


def articles() -> list[bytes]:
    lines = (files("roost") / "assets" / "udhr_subset.jsonl").read_text("utf-8").splitlines()
    return [article.encode() for line in lines for article in json.loads(line)["articles"]]


def hard_text(size: int) -> bytes:
    """Everything that could make cutting and remembering go wrong, mixed: scripts, runs, tokens, any bytes."""
    rng = random.Random(11)
    pieces = [*articles(), b"//" + b"-" * 63, b" " * 3000, b"-" * 40_000, rng.randbytes(20_000), bytes(500)]
    pieces += [b"".join(rng.choices(TOKENS, k=50)) for _ in range(2000)]
    pieces += [b"%d %d\n" % (n * n * 7919, n) for n in range(5000)]
    text = b""
    while len(text) < size:
        text += b"".join(rng.sample(pieces, 3000))
    return text[:size]


def stress() -> list[bytes]:
    """Inputs on which tokenizers break: runs, every letter, every pair of bytes, back-off, random digits and bytes."""
    rng = random.Random(7)
    texts = [b" " * n for n in range(5000)]
    texts += [(chr(code) * (1 + code % 7)).encode() for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    texts += [bytes([a, b]) for a in range(256) for b in range(256)]
    texts += [(b"//" + b"-" * n) * 3 + b"x" for n in range(70)]
    texts += ["".join(rng.choices("01 ", k=rng.randrange(200))).encode() for _ in range(2000)]
    texts += [rng.randbytes(rng.randrange(400)) for _ in range(2000)]
    texts += [a + b for a, b in zip(rng.choices(TOKENS, k=5000), rng.choices(TOKENS, k=5000), strict=True)]
    return [*texts, b""]


HARD = hard_text(1_400_000)


def test_every_token_alone_and_every_stress_text() -> None:
    alone = world().encode_batch(TOKENS[1:])
    assert [ids.tolist() for ids in alone[:65529]] == [[id] for id in range(1, 65530)]
    texts = stress()
    assert [ids.tolist() for ids in world().encode_batch(texts)] == list(map(PYTHON.encode, texts))


@given(st.binary(max_size=400) | st.lists(st.sampled_from(TOKENS), max_size=40).map(b"".join))
@example(b"//" + b"-" * 63 + b"//" + b"-" * 64)
def test_any_bytes_once_and_many_times(data: bytes) -> None:
    wanted = PYTHON.encode(data)
    assert world().encode(data).tolist() == wanted
    repeated = (data + b"\n\x01") * 50  # long enough for the memory of units
    assert world().encode(repeated).tolist() == PYTHON.encode(repeated)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_memory_and_instruction_sets_change_nothing(isa: str) -> None:
    wanted = PYTHON.encode(HARD)
    with native.forced_isa(isa):
        matcher = NativeMatcher(TOKENS)
        for remember in (False, True, True):  # the second time the memory is full
            for threads in (1, 2, 3, 4):
                assert matcher.encode(HARD, threads, remember=remember).tolist() == wanted


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_batch_is_its_texts_alone(threads: int) -> None:
    texts = [b"", *articles()[::3], b"", HARD, *articles()[1::3], b"", HARD[:600_000], b"a", b""]
    batch = world().encode_batch(texts, threads)
    assert [ids.tolist() for ids in batch] == list(map(PYTHON.encode, texts))
    assert world().encode_batch([], threads) == []
    assert [ids.tolist() for ids in world().encode_batch([b"", b""], threads)] == [[], []]


def test_long_runs_without_a_boundary() -> None:
    for data in (b" " * 1_000_001, b"a" + b"-" * 700_000 + b"b", bytes(600_000), "ー".encode() * 200_000):
        wanted = PYTHON.encode(data)
        assert world().encode(data).tolist() == world().encode(data, 2).tolist() == wanted


def test_lengths_around_every_limit() -> None:
    for size in (*range(1, 140), *range(1000, 1100), *range(32_740, 32_850)):
        start = size * 37
        data = HARD[start : start + size]
        assert world().encode(data).tolist() == PYTHON.encode(data), size


def test_corpus_fingerprint() -> None:
    ids = [array for text in world().encode_batch(articles(), 2) for array in (text, np.zeros(1, np.uint16))]
    stream = np.concatenate(ids)
    assert (stream.dtype, len(stream)) == (np.uint16, 685_715)
    digest = hashlib.sha256(stream.astype("<u2").tobytes()).hexdigest()
    assert digest == "3d4f6c0c3b3397a9406bcc97abce8efa9fe7da45d92936ea8852ec6baeff2f88"


@given(
    st.sets(st.binary(min_size=2, max_size=6) | st.text("ab", min_size=2, max_size=40).map(str.encode), max_size=40),
    st.randoms(use_true_random=False),
)
def test_any_vocabulary_in_any_order(extra: set[bytes], rng: random.Random) -> None:
    tokens = [*BYTES[1:], *extra, *[b""] * rng.randrange(3)]
    rng.shuffle(tokens)
    tokens = [b"", *tokens]
    matcher = NativeMatcher(tokens)
    text = b"".join(rng.choices([*extra, b"a", b"b", b"\x00", b"\xff"], k=300))
    ids = matcher.encode(text)
    assert ids.tolist() == PythonMatcher(tokens).encode(text)
    assert matcher.decode(ids) == text


def test_a_vocabulary_beyond_16_bits() -> None:
    rng = random.Random(2)
    extra = {rng.randbytes(rng.randrange(2, 9)) for _ in range(40_000)} | {b"x" * 300, b"\x00" * 70}
    tokens = [*TOKENS, *sorted(extra - set(TOKENS))]
    matcher, reference = NativeMatcher(tokens), PythonMatcher(tokens)
    text = b"".join(rng.choices(tokens, k=60_000)) + HARD[:300_000]
    ids = matcher.encode(text, 2)
    assert ids.dtype == np.uint32 and ids.max() > 100_000
    assert ids.tolist() == matcher.encode(text).tolist() == reference.encode(text)
    assert matcher.decode(ids) == matcher.decode(ids.astype(np.int64)) == text


@given(st.lists(st.sampled_from([*TOKENS[1:], b"//" + b"-" * 40, b" " * 60]) | st.binary(max_size=5), max_size=12))
def test_an_open_end_is_that_of_the_python_matcher(pieces: list[bytes]) -> None:
    for end in accumulate(map(len, pieces), initial=0):
        data = b"".join(pieces)[:end]
        assert world().encode_open(data) == PYTHON.encode_open(data)


def test_an_open_end_of_a_long_text() -> None:
    assert world().encode_open(HARD[:200_000]) == PYTHON.encode_open(HARD[:200_000])
    assert world().encode_open(b" " * 50_000) == PYTHON.encode_open(b" " * 50_000)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i2", "i4", "i8", ">u2", ">i8"])
def test_decoding_every_type_of_integer(dtype: str) -> None:
    ids = np.array([0, 98, 33, 99, 200, 0, 127], dtype)
    assert world().decode(ids) == b"".join(TOKENS[id] for id in ids.tolist())
    assert world().decode(ids[::-2]) == b"".join(TOKENS[id] for id in ids[::-2].tolist())
    assert world().decode(ids[:0]) == b""


def test_decoding_every_id_and_every_end() -> None:
    ids = np.random.default_rng(4).permutation(65536).astype(np.uint16)
    assert world().decode(ids) == b"".join(TOKENS[id] for id in ids.tolist())
    for last in (65529, 65000, 40_000, 300, 98, 0):  # 128 bytes, ..., 1 byte, none at the end of the output
        for count in range(20):
            assert world().decode(np.array([98] * count + [last])) == b"a" * count + TOKENS[last]


@pytest.mark.parametrize("bad", [65536, -1, 2**31 - 1, -(2**31), 2**62, -(2**63)])
def test_an_id_outside_is_named(bad: int) -> None:
    with pytest.raises(ValueError, match=f"id {bad} at position 2 is not in 0..65535"):
        world().decode(np.array([1, 2, bad, 4], np.int64))


def test_what_is_refused() -> None:
    for threads in (0, -1, 257):
        with pytest.raises(ValueError, match=f"threads is {threads}; it must be 1 to 256"):
            world().encode(b"abc", threads)
    with pytest.raises(ValueError, match="no token for the single byte 200"):
        NativeMatcher([*BYTES[:201], *BYTES[202:]])
    with pytest.raises(ValueError, match=r"ids (98 and 257|257 and 98) are one token"):
        NativeMatcher([*BYTES, b"a"])
    with pytest.raises(ValueError, match="id 0 is not in 1"):
        NativeMatcher([b"zero", *BYTES])


def test_hostile_arguments_are_errors() -> None:
    """What no caller in Python can pass, straight to the C functions."""
    new = native.function("roost_tokenizer_new", [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p])
    handle = ctypes.c_void_p()
    for starts in ([0, 5, 3, 9], [2, 3, 4, 5]):
        offsets = np.array(starts, np.uint64)
        with pytest.raises(ValueError, match="token offsets must climb from 0"):
            native.check(new(b"123456789", offsets.ctypes.data, 3, ctypes.byref(handle)))
    matcher, ids, counts = world(), np.empty(4, np.uint16), np.empty(2, np.uint64)
    ends = np.array([4, 2], np.uint64)
    call = (b"abcd", ends.ctypes.data, 2, 1, 1, ids.ctypes.data, counts.ctypes.data)
    with pytest.raises(ValueError, match="ends of the documents must climb"):
        native.check(matcher._encode(matcher._handle, *call))
    size = ctypes.c_uint64()
    with pytest.raises(ValueError, match="ids must have 2 or 4 bytes"):
        native.check(matcher._count(matcher._handle, ids.ctypes.data, 4, 3, ctypes.byref(size)))
    wrong = np.array([98, 98], np.uint16)
    for size in (0, 1, 3):  # as if another thread had changed the ids after they were counted
        with pytest.raises(ValueError, match="changed while they were decoded"):
            native.check(matcher._decode(matcher._handle, wrong.ctypes.data, 2, 2, bytes(bytearray(size)), size))


def test_tables_are_small() -> None:
    assert world().table_bytes < 8 << 20


def test_python_threads_share_one_matcher() -> None:
    wanted = PYTHON.encode(HARD)
    results: list[bool] = []
    matcher = NativeMatcher(TOKENS)

    def work(threads: int) -> None:
        for _ in range(3):
            results.append(matcher.encode(HARD, threads).tolist() == wanted)

    workers = [threading.Thread(target=work, args=(1 + number % 2,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [True] * 18


def test_a_copy_shares_the_tables() -> None:
    matcher = NativeMatcher(BYTES)
    twin, handle = copy.copy(matcher), weakref.ref(matcher._handle)
    del matcher
    gc.collect()
    assert handle() is not None and twin.encode(b"abc").tolist() == [98, 99, 100]
    with pytest.raises(TypeError, match="NativeMatcher cannot be copied deeply"):
        copy.deepcopy(twin)
    with pytest.raises(TypeError, match="NativeMatcher cannot be pickled"):
        pickle.dumps(twin)
    del twin
    gc.collect()
    assert handle() is None
