"""Token files: the bytes of both halves, round trips, and every damage refused."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost.data.binidx import TokenFile, write_blocks, write_tokens

# Two documents, [5, 65535] and [], written out by hand from RWKV-LM's make_data.py and binidx.py.
INDEX = bytes.fromhex(
    "4d4d494449445800 00"  # MMIDIDX, two zero bytes
    "0100000000000000"  # version 1
    "08"  # uint16
    "0200000000000000"  # two items
    "0300000000000000"  # doc_idx has three entries
    "03000000 01000000"  # sizes in tokens, the closing 0 included
    "0000000000000000 0600000000000000"  # pointers in bytes
    "0000000000000000 0100000000000000 0200000000000000"  # doc_idx
)
BINARY = bytes.fromhex("0500 ffff 0000 0000")


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """The hand-written pair."""
    (tmp_path / "two.idx").write_bytes(INDEX)
    (tmp_path / "two.bin").write_bytes(BINARY)
    return tmp_path / "two"


def test_the_writer_gives_the_bytes_of_make_data(tmp_path: Path) -> None:
    assert write_tokens(tmp_path / "two", [[5, 65535], []]) == 4
    assert (tmp_path / "two.idx").read_bytes() == INDEX
    assert (tmp_path / "two.bin").read_bytes() == BINARY
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two.bin", "two.idx"]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_the_reader_takes_the_prefix_or_either_file(prefix: Path, suffix: str) -> None:
    file = TokenFile(f"{prefix}{suffix}")
    assert file.tokens.tolist() == [5, 65535, 0, 0]
    assert (len(file), file.count) == (4, 2)
    assert file.documents(0).tolist() == [5, 65535, 0]
    assert file.documents(1).tolist() == [0]
    assert not file.tokens.flags.writeable


def test_a_name_with_a_dot_is_a_prefix(tmp_path: Path) -> None:
    write_tokens(tmp_path / "world.v2", [[1]])
    assert (tmp_path / "world.v2.bin").is_file()
    assert TokenFile(tmp_path / "world.v2").tokens.tolist() == [1, 0]


@given(
    st.sampled_from([1, 257, 65536, 65537, 2**31 - 1]).flatmap(
        lambda vocab: st.tuples(
            st.just(vocab), st.lists(st.lists(st.integers(0, vocab - 1), max_size=9), max_size=6), st.booleans()
        )
    )
)
def test_round_trip(case: tuple[int, list[list[int]], bool]) -> None:
    vocab, documents, as_arrays = case
    given_documents = [np.array(d, np.int64) for d in documents] if as_arrays else documents
    with tempfile.TemporaryDirectory() as folder:
        total = write_tokens(Path(folder) / "x", iter(given_documents), vocab_size=vocab)
        file = TokenFile(Path(folder) / "x")
        assert file.tokens.tolist() == [i for document in documents for i in [*document, 0]]
        assert [file.documents(i).tolist() for i in range(file.count)] == [[*d, 0] for d in documents]
        assert total == len(file)
        assert file.tokens.dtype == (np.uint16 if vocab <= 65536 else np.int32)
        del file


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_the_reader_honours_the_dtype_byte(tmp_path: Path, code: int, dtype: str) -> None:
    tokens = np.array([100, 7, 0], dtype)
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 1, 2)
    (tmp_path / "x.idx").write_bytes(head + struct.pack("<iqqq", 3, 0, 0, 1))
    (tmp_path / "x.bin").write_bytes(tokens.tobytes())
    file = TokenFile(tmp_path / "x")
    assert file.tokens.dtype == np.dtype(dtype)
    assert file.tokens.tolist() == [100, 7, 0]


def test_a_document_may_span_several_items(tmp_path: Path) -> None:
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 3)
    (tmp_path / "x.idx").write_bytes(head + struct.pack("<3i3q3q", 1, 2, 1, 0, 2, 6, 0, 2, 3))
    (tmp_path / "x.bin").write_bytes(np.array([1, 2, 3, 4], "<u2").tobytes())
    file = TokenFile(tmp_path / "x")
    assert [file.documents(i).tolist() for i in range(file.count)] == [[1, 2, 3], [4]]


@pytest.mark.parametrize("i", [-1, 2])
def test_a_document_out_of_range_is_refused(prefix: Path, i: int) -> None:
    with pytest.raises(ValueError, match=f"document {i} does not exist: .* has 2"):
        TokenFile(prefix).documents(i)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_half_is_named(prefix: Path, suffix: str) -> None:
    Path(f"{prefix}{suffix}").unlink()
    with pytest.raises(ValueError, match=rf"no token file at .*two\{suffix}"):
        TokenFile(prefix)


@pytest.mark.parametrize("length", range(len(INDEX)))
def test_every_truncation_of_the_index_is_refused(prefix: Path, length: int) -> None:
    prefix.with_suffix(".idx").write_bytes(INDEX[:length])
    with pytest.raises(ValueError, match=r"is truncated|is not a token index"):
        TokenFile(prefix)


@pytest.mark.parametrize("length", range(len(BINARY)))
def test_every_truncation_of_the_tokens_is_refused(prefix: Path, length: int) -> None:
    prefix.with_suffix(".bin").write_bytes(BINARY[:length])
    with pytest.raises(ValueError, match=f"two.bin is truncated: {length} bytes, but two.idx describes 8"):
        TokenFile(prefix)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"X", "is not a token index"),
        (9, b"\2", "has version 2; only version 1"),
        (17, b"\7", "has dtype code 7"),
        (17, b"\0", "has dtype code 0"),
        (18, b"\3", "is truncated"),
        (18, b"\xff" * 8, "is truncated"),
        (18, b"\1", "is too long"),
        (34, b"\4", "is truncated"),
        (34, b"\2", "is too long"),
        (34, b"\xff\xff\xff\xff", "item 0 has a negative size"),
        (42, b"\2", "do not lie back to back"),
        (50, b"\7", "do not lie back to back"),
        (58, b"\1", "doc_idx does not climb"),
        (66, b"\3", "doc_idx does not climb"),
        (74, b"\1", "doc_idx does not climb"),
    ],
)
def test_a_damaged_index_is_refused(prefix: Path, offset: int, value: bytes, message: str) -> None:
    prefix.with_suffix(".idx").write_bytes(INDEX[:offset] + value + INDEX[offset + len(value) :])
    with pytest.raises(ValueError, match=message):
        TokenFile(prefix)


def test_an_index_without_doc_idx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 0, 0))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="doc_idx does not climb"):
        TokenFile(tmp_path / "x")


@pytest.mark.parametrize(
    ("documents", "vocab", "message"),
    [
        ([[1], [3, 257]], 257, "document 1 holds id 257, outside the vocabulary of 257"),
        ([[-1]], 257, "document 0 holds id -1"),
        ([[65536]], 65536, "holds id 65536"),
        ([[[1]]], 257, "document 0 is not a flat sequence of integers"),
        ([[1.5]], 257, "document 0 is not a flat sequence of integers"),
        ([[1]], 0, "vocab_size is 0"),
        ([[1]], 2**31, "vocab_size is 2147483648"),
    ],
)
def test_bad_ids_are_refused_and_the_old_pair_survives(
    prefix: Path, documents: list[list[int]], vocab: int, message: str
) -> None:
    arrays = [np.asarray(document) for document in documents]
    with pytest.raises(ValueError, match=message):
        write_tokens(prefix, arrays, vocab_size=vocab)
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["two.bin", "two.idx"]
    assert TokenFile(prefix).tokens.tolist() == [5, 65535, 0, 0]


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(("failing", "left"), [(1, BINARY), (2, bytes.fromhex("0100 0000 0200 0000"))])
def test_halves_of_two_pairs_are_never_a_pair(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, linked: bool, failing: int, left: bytes
) -> None:
    """A run that ends at either rename: the new stream is as long as the old one, so that no size would tell."""
    index, calls, replace = prefix.with_suffix(".idx"), list[Path](), Path.replace
    if linked:
        (prefix.parent / "far").mkdir()
        index.rename(prefix.parent / "far" / "two.idx")
        index.symlink_to(prefix.parent / "far" / "two.idx")

    def fail(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise OSError("the run ends here")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="the run ends here"):
        write_tokens(prefix, [[1], [2]])
    assert prefix.with_suffix(".bin").read_bytes() == left
    with pytest.raises(ValueError, match=r"no token file at .*two\.idx"):
        TokenFile(prefix)
    write_tokens(prefix, [[1], [2]])
    assert TokenFile(prefix).tokens.tolist() == [1, 0, 2, 0] and index.is_symlink() == linked


def test_a_disk_that_fails_before_the_renames_costs_nothing(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_tokens(prefix, [[1], [2]])
    assert TokenFile(prefix).tokens.tolist() == [5, 65535, 0, 0]


@pytest.mark.parametrize(("vocab", "dtype"), [(65536, np.uint16), (70000, np.int32)])
def test_blocks_write_what_documents_write(tmp_path: Path, vocab: int, dtype: type) -> None:
    write_tokens(tmp_path / "wanted", [[1, 2], [], [vocab - 1]], vocab_size=vocab)
    blocks = [np.array([1], dtype), np.array([2, 0, 0, vocab - 1, 0], dtype)]
    assert write_blocks(tmp_path / "found", iter(blocks), np.array([3, 1, 2]), vocab_size=vocab) == 6
    for ending in ("bin", "idx"):
        assert (tmp_path / f"found.{ending}").read_bytes() == (tmp_path / f"wanted.{ending}").read_bytes()
    with pytest.raises(ValueError, match="have 7 tokens by their sizes, but 6 were given"):
        write_blocks(tmp_path / "found", iter(blocks), np.array([3, 1, 3]), vocab_size=vocab)
    assert len(TokenFile(tmp_path / "found")) == 6


@pytest.mark.parametrize(("dtype", "code", "worst"), [("<u2", 8, 65535), ("<i4", 4, -1), ("<i4", 4, 300)])
def test_ids_of_another_vocabulary_are_named(tmp_path: Path, dtype: str, code: int, worst: int) -> None:
    tokens = np.array([100, 7, worst, 0], dtype)
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 1, 2)
    (tmp_path / "x.idx").write_bytes(head + struct.pack("<iqqq", 4, 0, 0, 1))
    (tmp_path / "x.bin").write_bytes(tokens.tobytes())
    file = TokenFile(tmp_path / "x")
    with pytest.raises(ValueError, match=rf"holds token id {worst} \(token 2 of the file\), outside 0..256"):
        file.check_ids(257)
    if worst > 0:
        file.check_ids(65536)
