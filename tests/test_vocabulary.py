"""roost.vocabulary: the packed official vocabulary, the text form in both variants, and files that are wrong."""

from __future__ import annotations

import hashlib
import lzma
import runpy
import unicodedata
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pyrwkv_tokenizer
import pytest
import rwkv

from roost.tokenizer import WorldTokenizer
from roost.vocabulary import official

PACK = Path(__file__).parents[1] / "tools" / "pack_vocabulary.py"
BYTES = [f"{byte + 1} {bytes([byte])!r} 1" for byte in range(256)]


@pytest.fixture(scope="module")
def tokens() -> dict[int, bytes]:
    return official()


def literal(token: bytes) -> str:
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)


def write(path: Path, lines: list[str], end: str = "\n") -> Path:
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def test_ids_are_contiguous_and_ordered_by_length_then_bytes(tokens: dict[int, bytes]) -> None:
    assert list(tokens) == list(range(1, 65530))
    assert list(tokens.values()) == sorted(set(tokens.values()), key=lambda token: (len(token), token))
    assert [tokens[byte + 1] for byte in range(256)] == [bytes([byte]) for byte in range(256)]


def test_lengths(tokens: dict[int, bytes]) -> None:
    last = {len(token): number for number, token in tokens.items()}
    assert [last[n] for n in range(1, 9)] == [256, 3319, 19232, 28343, 36201, 43902, 49918, 54803]
    assert [last[n] - last[n - 1] for n in (9, 10, 11)] == [3845, 2620, 1852]
    assert tokens[65529] == b" " * 128 and tokens[65528] == b"-" * 80 and tokens[65527] == b"#" * 80
    assert len(b"".join(tokens.values())) == 373_358


def test_what_the_tokens_hold(tokens: dict[int, bytes]) -> None:
    values = list(tokens.values())
    assert all(unicodedata.name(tokens[number].decode()).startswith("CJK ") for number in range(10250, 18494))
    broken = [token for token in values if literal(token).startswith("b")]
    assert len(broken) == 486 and sorted(map(len, broken)) == [1] * 128 + [2] * 358
    assert sum(len(token) == 2 and token[0] & 0xC0 == 0x80 for token in broken) == 11
    assert sum(b"\n" in token for token in values) == 154
    assert sum(b"\n\n" in token for token in values) == 34
    assert sum(b"\r" in token for token in values) == 31
    assert sum(token.startswith(b" ") for token in values) == 31_336
    assert sum(token.removeprefix(b" ").isdigit() for token in values) == 220
    assert len({token[:length] for token in values for length in range(len(token) + 1)}) == 116_079
    assert len({token[:2] for token in values if len(token) > 1}) == 3396


def test_the_packed_file_is_what_the_tool_makes() -> None:
    shipped = lzma.decompress((files("roost") / "assets" / "world.xz").read_bytes())
    source = Path(str(rwkv.__file__)).with_name("rwkv_vocab_v20230424.txt")
    assert runpy.run_path(str(PACK))["pack"](source) == shipped


def test_the_tool_refuses_another_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not rwkv_vocab_v20230424: sha256"):
        runpy.run_path(str(PACK))["pack"](write(tmp_path / "v.txt", BYTES))


@pytest.mark.parametrize(
    ("package", "size", "sha256"),
    [
        (pyrwkv_tokenizer, 1_093_733, "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"),
        (rwkv, 1_159_262, "8324476023347dec2964625ccb2075c864d250a9c6d9a74f36daba628de8c008"),
    ],
)
def test_both_variants_in_circulation_are_the_official_vocabulary(package: ModuleType, size: int, sha256: str) -> None:
    path = Path(str(package.__file__)).with_name("rwkv_vocab_v20230424.txt")
    assert (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) == (size, sha256)
    assert WorldTokenizer.from_file(path) == WorldTokenizer()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_form_round_trip(tokens: dict[int, bytes], tmp_path: Path, end: str) -> None:
    lines = [f"{number} {literal(token)} {len(token)}" for number, token in tokens.items()]
    assert WorldTokenizer.from_file(write(tmp_path / "v.txt", lines, end)) == WorldTokenizer()


def test_an_extended_file_and_every_escape(tmp_path: Path) -> None:
    extra = {
        300: "'\\\\\\'\\\"\\n\\r\\t\\x07'",
        65_536: "'\\u2028\u2029x'",
        70_000: '"it\'s \\U0001f642"',
        299: "b'\\xe0\\xa4\\\\n'",
    }
    wanted = {300: "\\'\"\n\r\t\x07", 65_536: "\u2028\u2029x", 70_000: "it's 🙂"}
    sizes = {299: 4, **{number: len(text.encode()) for number, text in wanted.items()}}
    lines = BYTES + [f"{number} {text} {sizes[number]}" for number, text in extra.items()]
    tokenizer = WorldTokenizer.from_file(write(tmp_path / "v.txt", lines))
    assert tokenizer.vocab_size == 70_001
    assert {number: tokenizer.token_bytes(number).decode() for number in wanted} == wanted
    assert tokenizer.token_bytes(299) == b"\xe0\xa4\\n"
    assert tokenizer.encode("it's 🙂" + "\u2028\u2029x") == [70_000, 65_536]


def test_vocab_size_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "v.txt", BYTES)
    assert WorldTokenizer.from_file(path).vocab_size == 257
    assert WorldTokenizer.from_file(path, vocab_size=512).vocab_size == 512
    for largest, size in ((65_528, 65_529), (65_529, 65_536), (65_535, 65_536), (65_536, 65_537)):
        write(path, [*BYTES, f"{largest} 'ab' 2"])
        assert WorldTokenizer.from_file(path).vocab_size == size
    with pytest.raises(ValueError, match="vocab_size is 512, but the vocabulary has the id 65536"):
        WorldTokenizer.from_file(path, vocab_size=512)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "is not of the form"),
        ("257", "is not of the form"),
        ("257 'ab'", "is not of the form"),
        ("257 ab 2", "is not of the form"),
        ("257 'ab\" 2", "is not of the form"),
        ("257 'a'b' 3", "is not of the form"),
        ("257 'a' 'b' 2", "is not of the form"),
        ("x 'ab' 2", "is not of the form"),
        ("-1 'ab' 2", "is not of the form"),
        ("257 'ab' two", "is not of the form"),
        ("257 b'é' 1", "is not of the form"),
        ("257 __import__('os').getcwd() 2", "is not of the form"),
        ("257 'ab\\' 2", "is not of the form"),
        ("257 'ab' 3", "has 2 bytes, but the line says 3"),
        ("257 '' 0", "must have a byte"),
        ("0 'ab' 2", r"id 0 must be in 1\.\.16777215"),
        ("16777216 'ab' 2", "id 16777216 must be in"),
        ("256 'ab' 2", r"id 256 already has the token b'\\xff'"),
        ("257 'A' 1", "the token b'A' already has the id 66"),
        ("257 '\\q' 1", r"unknown escape \\q"),
        ("257 '\\xz1' 1", r"unknown escape \\x"),
        ("257 '\\Uffffffff' 1", r"unknown escape \\Uffffffff"),
        ("257 '\\ud800' 3", "surrogates not allowed"),
        ("257 b'\\u4f60' 3", "latin-1"),
    ],
)
def test_a_malformed_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "v.txt", [*BYTES, line, "300 'after' 5"])
    with pytest.raises(ValueError, match=rf"v\.txt, line 257: .*{message}"):
        WorldTokenizer.from_file(path)


def test_files_that_are_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no vocabulary file at"):
        WorldTokenizer.from_file(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="no vocabulary file at"):
        WorldTokenizer.from_file(tmp_path)
    (tmp_path / "binary").write_bytes(b"1 'a' 1\n\xff")
    with pytest.raises(ValueError, match="byte 8 is not UTF-8"):
        WorldTokenizer.from_file(tmp_path / "binary")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="line 1: '' is not of the form"):
        WorldTokenizer.from_file(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"v\.txt: no token for the single byte 0x00"):
        WorldTokenizer.from_file(write(tmp_path / "v.txt", BYTES[1:]))


def test_vocabularies_from_memory_are_checked_too() -> None:
    single = {byte + 1: bytes([byte]) for byte in range(256)}
    for tokens, message in (
        ({}, "no token for the single byte 0x00"),
        (single | {257: b""}, "id 257 is empty"),
        (single | {257: b"ab", 258: b"ab"}, "ids 257 and 258 are both the token b'ab'"),
        (single | {0: b"ab"}, r"id 0 is not in 1\.\.16777215"),
        (single | {2**24: b"ab"}, "id 16777216 is not in"),
    ):
        with pytest.raises(ValueError, match=message):
            WorldTokenizer(tokens)
