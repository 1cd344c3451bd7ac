"""roost.tokenizer, from text to ids: its vectors, its laws, a naive longest match, and any vocabulary."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import subprocess
import sys
from importlib.resources import files
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from roost.tokenizer import WorldTokenizer

WORLD = WorldTokenizer()
TOKENS = {number: token for number in range(WORLD.vocab_size) if (token := WORLD.token_bytes(number))}
IDS = {token: number for number, token in TOKENS.items()}

VECTORS: list[tuple[str | bytes, list[int]]] = [
    ("", []),
    (
        "Today is a beautiful day. 今天是美好的一天。",
        [33520, 4600, 332, 59219, 21509, 47, 33, 10381, 11639, 13091, 15597, 11685, 14734, 10250, 11639, 10080],
    ),
    ("User: hi\n\nAssistant:", [24281, 59, 4571, 261, 5585, 41693, 59]),
    ("\nElon Musk has", [11, 994, 2098, 29435, 21800]),
    ("1234567", [632, 654, 676, 56]),
    (" 2024", [3493, 644]),
    ("000", [620, 49]),
    (" 00", [3473]),
    ("🙂", [3319, 2417]),
    ("é", [2503]),
    ("€", [9863]),
    ("👨\u200d👩\u200d👧", [3319, 146, 169, 9810, 3319, 146, 170, 9810, 3319, 146, 168]),
    (b"\xff", [256]),
    (b"\x00", [1]),
    (b"\xe4\xbb", [3028]),
    (b"\xed\xa0\x80", [238, 161, 129]),
    (b"\x82\xac", [2412]),
    ("안녕하세요", [18815, 3266, 150, 19052, 18777, 18862]),
    ("こんにちは", [10115, 10165, 10136, 10127, 10139]),
    ("नमस्ते", [9473, 9477, 9484, 9495, 9469, 9492]),
    ("مرحبا", [2949, 2934, 2930, 2925, 2924]),
    ("한국어", [43875, 18830]),
    ("សួស្តី", [9707, 2999, 190, 9707, 9709, 2999, 144, 2999, 185]),
    (" " * 129, [65529, 33]),
    ("-" * 81, [65528, 46]),
    ("xxxxx", [27514, 121]),
    ("a  b", [98, 267, 99]),
    (" leading", [52107]),
    ("a\r\nb", [98, 263, 99]),
    ("\r\n\r\n", [19244]),
    ("def f(x):\n    return x+1\n", [7334, 337, 41, 121, 501, 28352, 42178, 355, 44, 50, 11]),
    ("好。\n\nUser:", [11685, 28329, 11, 24281, 59]),
    ("ok. \n\nUser:", [2095, 47, 3336, 24281, 59]),
    ("<|endoftext|>", [61, 125, 25258, 7588, 2318, 125, 63]),
    ("\ufeff", [19125]),
    ("\ufffd", [19232]),
]


def greedy(ids: dict[bytes, int], data: bytes) -> list[int]:
    """Longest match, written as plainly as possible."""
    longest = 128 if ids is IDS else max(map(len, ids))
    found: list[int] = []
    while data:
        length = next(n for n in range(min(longest, len(data)), 0, -1) if data[:n] in ids)
        found.append(ids[data[:length]])
        data = data[length:]
    return found


def udhr() -> list[dict[str, Any]]:
    lines = (files("roost") / "assets" / "udhr_subset.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("text", "ids"), VECTORS, ids=lambda value: ascii(value)[:24])
def test_vectors(text: str | bytes, ids: list[int]) -> None:
    data = text.encode() if isinstance(text, str) else text
    assert WORLD.encode(text) == WORLD.encode(data) == greedy(IDS, data) == ids
    assert WORLD.decode_bytes(ids) == data
    assert WORLD.decode(ids) == data.decode("utf-8", "replace")
    assert all(type(number) is int for number in WORLD.encode(text))


def test_corpus_fingerprint_and_tokens_per_language() -> None:
    counts: dict[str, int] = {}
    ids: list[int] = []
    for language in udhr():
        batch = WORLD.encode_batch(language["articles"])
        counts[language["code"]] = sum(map(len, batch))
        for article in batch:
            ids += [*article, WORLD.eod]
    assert len(ids) == 685_715
    digest = hashlib.sha256(np.array(ids, "<u2").tobytes()).hexdigest()
    assert digest == "3d4f6c0c3b3397a9406bcc97abce8efa9fe7da45d92936ea8852ec6baeff2f88"
    wanted = {"en": 1547, "zh": 2153, "de": 2691, "ru": 2874, "ja": 2879, "ko": 2417, "ar": 3848, "hi": 7352}
    wanted |= {"vi": 3615, "th": 6779, "km": 13019, "am": 15220, "chr": 18262, "dv": 27536}
    assert {code: counts[code] for code in wanted} == wanted


def test_every_token_alone_is_its_own_id() -> None:
    assert WORLD.encode_batch(TOKENS.values()) == [[number] for number in TOKENS]
    assert list(TOKENS) == list(range(1, 65530))


def test_token_pairs_and_byte_pairs_match_the_naive_algorithm() -> None:
    chosen = random.Random(1).choices(list(TOKENS.values()), k=4000)
    pairs = [a + b for a, b in zip(chosen[::2], chosen[1::2], strict=True)]
    pairs += [bytes([a, b]) for a in range(256) for b in range(256)]
    assert WORLD.encode_batch(pairs) == [greedy(IDS, pair) for pair in pairs]


def test_the_hard_pairs_of_the_official_vocabulary() -> None:
    soft = {token[i : i + 2] for token in TOKENS.values() for i in range(len(token) - 1)}
    assert len(soft) == 8333
    pairs = ((bytes([a]), bytes([b])) for a in range(256) for b in range(256))
    assert all(WORLD.is_boundary(left, right) == (left + right not in soft) for left, right in pairs)


def test_boundaries_of_chat_text() -> None:
    for left, right in [
        (":", " "),
        ("\n", "User"),
        ("\n", "A"),
        ("ok.", "\n\n"),
        ("hi", "\n"),
        ("！", "\n"),
        ("」", "\n"),
    ]:
        assert WORLD.is_boundary(left, right)
    for left, right in [("。", "\n"), ("…", "\n"), ("，", "\n"), (" ", "\n"), ("\n", "\n"), ("a", "b")]:
        assert not WORLD.is_boundary(left, right)
    assert WORLD.is_boundary("", "a") and WORLD.is_boundary(b"a", b"")


@given(st.text(), st.text())
def test_a_boundary_separates(left: str, right: str) -> None:
    if WORLD.is_boundary(left, right):
        assert WORLD.encode(left + right) == WORLD.encode(left) + WORLD.encode(right)


@settings(deadline=None)
@given(st.binary(max_size=300) | st.lists(st.sampled_from(list(TOKENS.values())), max_size=20).map(b"".join))
@example(b"//" + b"-" * 63 + b"//" + b"-" * 64)
def test_bytes_survive_and_no_token_could_be_longer(data: bytes) -> None:
    ids = WORLD.encode(data)
    assert WORLD.decode_bytes(ids) == data
    assert ids == greedy(IDS, data)


@given(st.text())
def test_text_survives(text: str) -> None:
    assert WORLD.decode(WORLD.encode(text), "strict") == text


@settings(deadline=None)
@given(st.sets(st.binary(min_size=2, max_size=6) | st.text("ab", min_size=2, max_size=9).map(str.encode)), st.data())
def test_any_vocabulary_in_any_order(extra: set[bytes], data: st.DataObject) -> None:
    numbers = data.draw(st.permutations(range(257, 257 + len(extra))))
    tokens = {byte + 1: bytes([byte]) for byte in range(256)} | dict(zip(numbers, extra, strict=True))
    tokenizer = WorldTokenizer(tokens)
    text = data.draw(st.lists(st.sampled_from([*sorted(extra), b"a", b"b", b"\x00"])).map(b"".join))
    assert tokenizer.encode(text) == greedy({token: number for number, token in tokens.items()}, text)


def test_a_long_run_without_boundary() -> None:
    assert WORLD.encode(" " * 1_000_000) == [65529] * 7812 + WORLD.encode(" " * 64)
    assert WORLD.encode("a" + "-" * 200_000 + "b") == [98, *[65528] * 2500, 99]


def test_a_document_cut_at_any_boundaries_is_exact() -> None:
    data = "".join(udhr()[9]["articles"]).encode()
    whole = WORLD.encode(data)
    cuts = [i for i in range(1, len(data)) if WORLD.is_boundary(data[:i], data[i:])]
    chosen = [0, *sorted(random.Random(3).sample(cuts, 200)), len(data)]
    parts = [WORLD.encode(data[a:b]) for a, b in pairwise(chosen)]
    assert [number for part in parts for number in part] == whole


BYTES = WorldTokenizer.byte_level()


@given(st.binary())
def test_byte_level(data: bytes) -> None:
    assert BYTES.encode(data) == [byte + 1 for byte in data]
    assert BYTES.decode_bytes(BYTES.encode(data)) == data


def test_sizes() -> None:
    assert (BYTES.vocab_size, BYTES.eod) == (257, 0)
    assert (WORLD.vocab_size, WORLD.eod) == (65536, 0)


@pytest.mark.parametrize("text", ["ab\ud800", "ab\udfffc"])
def test_lone_surrogates_are_refused_with_their_index(text: str) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud(800|fff)' at index 2"):
        WORLD.encode(text)
    with pytest.raises(ValueError, match="text 1: lone surrogate"):
        WORLD.encode_batch(["fine", text])


@pytest.mark.usefixtures("unchecked")
def test_wrong_types_are_refused() -> None:
    for text in (None, 3, ["a"], bytearray(b"a")):
        with pytest.raises(ValueError, match=f"text must be str or bytes, not {type(text).__name__}"):
            WORLD.encode(text)  # type: ignore[arg-type]
    for text in ("abc", b"abc"):
        with pytest.raises(ValueError, match="use encode for one"):
            WORLD.encode_batch(text)  # type: ignore[arg-type]


def test_equality_fingerprint_pickle_and_repr() -> None:
    assert WorldTokenizer() == WORLD and hash(WORLD) == hash(WorldTokenizer())
    assert WORLD != BYTES and WORLD != "WORLD" and WorldTokenizer(TOKENS) != WORLD
    assert WorldTokenizer(TOKENS, 65536) == WORLD
    assert WORLD.fingerprint == "680dfca5ee7ba5e916f865cf7f2bdc22595ae0ea8cc61be9d59f6e41e7ab42e5"
    assert len({WORLD.fingerprint, BYTES.fingerprint, WorldTokenizer(TOKENS).fingerprint}) == 3
    swapped = TOKENS | {65528: TOKENS[65529], 65529: TOKENS[65528]}
    assert WorldTokenizer(swapped, 65536).fingerprint != WORLD.fingerprint
    copy = pickle.loads(pickle.dumps(WORLD))
    assert copy == WORLD and copy.encode("User: hi") == WORLD.encode("User: hi")
    assert repr(WORLD) == "WorldTokenizer(vocab_size=65536, tokens=65529)"


def test_importing_reads_no_vocabulary() -> None:
    code = (
        "import sys; opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "import roost.tokenizer as t; early = 'world.xz' in ' '.join(opened)\n"
        "t.WorldTokenizer(); sys.exit(early or 'world.xz' not in ' '.join(opened))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
