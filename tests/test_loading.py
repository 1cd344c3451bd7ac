"""roost.load: which model a call means, and the packed file beside a checkpoint."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import roost
from roost import NativeModel, WorldTokenizer, native
from roost.formats import gguf, packed
from tiny import tiny_model

native_only = pytest.mark.skipif(not native.available(), reason=native.why_not())
IDS = torch.arange(20)[None]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.pth"
    tiny_model().save(path)
    return path


@native_only
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_the_packed_file_is_made_once_and_used_again(checkpoint: Path, weights: str) -> None:
    model, tokenizer = roost.load(checkpoint, backend="native", weights=weights, threads=2)
    kept = checkpoint.with_name(f"model.{weights}.roost")
    assert kept.is_file() and model.threads == 2 and model.weights == weights
    assert tokenizer is not None and tokenizer.vocab_size == 257
    made = kept.stat().st_mtime_ns
    again, _ = roost.load(checkpoint, backend="native", weights=weights)
    assert kept.stat().st_mtime_ns == made and torch.equal(again(IDS)[0], model(IDS)[0])
    direct, _ = roost.load(kept)
    assert isinstance(direct, NativeModel) and torch.equal(direct(IDS)[0], model(IDS)[0])
    assert direct.fingerprint == roost.load(checkpoint)[0].fingerprint


@native_only
@pytest.mark.parametrize(
    "fault", ["changed checkpoint", "truncated", "flipped", "cut short", "older", "another format"]
)
def test_a_stale_or_damaged_cache_is_made_again(checkpoint: Path, fault: str) -> None:
    roost.load(checkpoint, backend="native", weights="int8")
    kept = checkpoint.with_name("model.int8.roost")
    if fault == "changed checkpoint":
        tiny_model(seed=5).save(checkpoint)
    elif fault == "another format":
        model, _ = roost.load(checkpoint)
        packed.pack(model.state_dict(), model.config, kept, weights_format="bf16", source=packed.source_of(checkpoint))
    else:
        data = bytearray(kept.read_bytes())
        data[-1] ^= fault == "flipped"
        data[8] = fault != "older"
        kept.write_bytes({"truncated": data[:-1], "cut short": data[:20]}.get(fault, data))
    model, _ = roost.load(checkpoint, backend="native", weights="int8")
    fresh, _ = roost.load(checkpoint, backend="native", weights="int8", keep=False)
    assert torch.equal(model(IDS)[0], fresh(IDS)[0]) and model.fingerprint == fresh.fingerprint
    assert torch.equal(roost.load(kept)[0](IDS)[0], fresh(IDS)[0])  # and the file is good again


@native_only
@pytest.mark.parametrize("what", ["by hand", "by hand, damaged", "newer", "text", "empty", "a directory", "a link"])
def test_what_is_no_copy_of_ours_is_never_replaced(checkpoint: Path, what: str) -> None:
    kept, other = checkpoint.with_name("model.int8.roost"), tiny_model(seed=5)
    if what.startswith("by hand"):
        packed.pack(other.state_dict(), other.config, kept, weights_format="int8")
    elif what == "newer":
        roost.load(checkpoint, backend="native", weights="int8")
    elif what == "a directory":
        kept.mkdir()
    elif what == "a link":
        kept.symlink_to("nowhere")
    else:
        kept.write_text("a text" * (what == "text"))
    if what in ("newer", "by hand, damaged"):
        data = bytearray(kept.read_bytes())
        data[8 if what == "newer" else -1] ^= 2
        kept.write_bytes(data)
    before = kept.read_bytes() if kept.is_file() else kept.is_symlink()
    model, _ = roost.load(checkpoint, backend="native", weights="int8")
    assert (kept.read_bytes() if kept.is_file() else kept.is_symlink()) == before
    wanted, _ = roost.load(checkpoint, backend="native", weights="int8", keep=False)
    assert torch.equal(model(IDS)[0], wanted(IDS)[0]) and model.fingerprint == wanted.fingerprint
    assert sorted(file.name for file in checkpoint.parent.iterdir()) == ["model.int8.roost", "model.pth"]


@native_only
def test_one_shard_that_changed_is_noticed(tmp_path: Path) -> None:
    """Though total size and newest time stay as they were."""
    folder = tmp_path / "model"
    weights = list(tiny_model().state_dict().items())
    folder.mkdir()
    for number, part in enumerate((weights[:9], weights[9:]), 1):
        torch.save(dict(part), folder / f"pytorch_model-{number:05d}-of-00002.bin")
    first, second = sorted(folder.glob("*.bin"))
    for file, time in ((first, 10**9), (second, 2 * 10**9)):
        os.utime(file, ns=(time, time))
    roost.load(folder, backend="native", weights="int8")
    kept = folder / "model.int8.roost"
    made, source = kept.stat().st_mtime_ns, packed.source_of(folder)
    assert list(source) == [first.name, second.name] and source[first.name] == [first.stat().st_size, 10**9]
    roost.load(folder, backend="native", weights="int8")
    assert kept.stat().st_mtime_ns == made
    os.utime(first, ns=(5, 5))
    roost.load(folder, backend="native", weights="int8")
    assert kept.stat().st_mtime_ns != made and packed.summary(kept).source == packed.source_of(folder)


@native_only
def test_the_vocabulary_of_a_file_is_found_beside_a_kept_copy_too(tmp_path: Path) -> None:
    own = WorldTokenizer({id: bytes([(id + 60) % 256]) for id in range(1, 257)}, 257)
    model = tiny_model()
    gguf.save(tmp_path / "own.gguf", model.config, model.state_dict(), own)
    for _ in range(2):
        assert roost.load(tmp_path / "own.gguf", backend="native")[1] == own
    assert (tmp_path / "own.gguf.bf16.roost").is_file()


@native_only
def test_nothing_is_left_behind_where_nothing_may_be_kept(checkpoint: Path) -> None:
    model, _ = roost.load(checkpoint, backend="native", weights="int8", keep=False)
    assert sorted(file.name for file in checkpoint.parent.iterdir()) == ["model.pth"]
    model(IDS)  # its file is gone, its memory is not
    assets = Path(roost.__file__).parent / "assets"
    before = sorted(assets.iterdir())
    roost.load("nestling", backend="native", weights="int4")
    assert sorted(assets.iterdir()) == before


@pytest.fixture
def read_only(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """No file can be made beside the checkpoint, not even by root, to whom modes mean nothing; the names tried."""
    original, tried = os.open, list[str]()

    def guarded(path: str | Path, flags: int, mode: int = 0o777, **rest: Any) -> int:
        if flags & os.O_CREAT and Path(path).parent == checkpoint.parent:
            tried.append(Path(path).name)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, flags, mode, **rest)

    monkeypatch.setattr(os, "open", guarded)
    checkpoint.parent.chmod(0o500)
    yield tried
    checkpoint.parent.chmod(0o700)


@native_only
def test_a_directory_that_cannot_be_written(checkpoint: Path, read_only: list[str]) -> None:
    model, _ = roost.load(checkpoint, backend="native", weights="int8")
    assert len(read_only) == 1 and [file.name for file in checkpoint.parent.iterdir()] == ["model.pth"]
    wanted, _ = roost.load(checkpoint, backend="native", weights="int8", keep=False)
    assert len(read_only) == 1 and torch.equal(model(IDS)[0], wanted(IDS)[0])


@native_only
def test_what_was_kept_is_used_where_nothing_can_be_written(
    checkpoint: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = roost.load(checkpoint, backend="native", weights="int8")
    tried = request.getfixturevalue("read_only")
    monkeypatch.setattr(packed, "pack", None)
    model, _ = roost.load(checkpoint, backend="native", weights="int8")
    assert tried == [] and torch.equal(model(IDS)[0], wanted(IDS)[0])


@native_only
def test_several_threads_share_one_model(checkpoint: Path) -> None:
    model, _ = roost.load(checkpoint, backend="native", weights="int8", threads=2)
    wanted, found = model(IDS)[0], list[bool]()
    threads = [
        threading.Thread(target=lambda: found.extend(torch.equal(model(IDS)[0], wanted) for _ in range(20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


@native_only
def test_generation_and_scores_take_either_model() -> None:
    model, tokenizer = roost.load("nestling", backend="native", weights="fp32", threads=1)
    other, _ = roost.load("nestling")
    assert tokenizer is not None
    greedy = roost.Sampling(temperature=0)
    a = roost.generate(model, tokenizer, "In the beginning", greedy, max_tokens=40)
    b = roost.generate(other, tokenizer, "In the beginning", greedy, max_tokens=40)
    assert a.text == b.text and a.state.tokens == b.state.tokens
    scores = [roost.bits_per_byte(one, tokenizer, "a text to be scored").bits for one in (model, other)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@native_only
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "cuda"}, "cuda"),
        ({"backend": "native", "weights": "int5"}, "int"),
        ({"backend": "native", "threads": 0}, "threads"),
        ({"backend": "native", "threads": 100_000}, "threads"),
        ({"backend": "native", "dtype": torch.bfloat16}, "dtype"),
        ({"backend": "native", "device": "meta"}, "CPU"),
        ({"backend": "native", "dtype": torch.float32, "weights": "int4"}, "takes weights='int4'"),
        ({"weights": "int8"}, "backend='native'"),
        ({"threads": 2}, "backend='native'"),
        ({"keep": False}, "backend='native'"),
        ({"keep": True, "backend": "torch"}, "backend='native'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(checkpoint: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roost.load(checkpoint, **arguments)  # type: ignore[call-overload]
    assert sorted(file.name for file in checkpoint.parent.iterdir()) == ["model.pth"]


@native_only
def test_a_packed_file_is_native_and_is_what_it_is(checkpoint: Path) -> None:
    roost.load(checkpoint, backend="native", weights="int8")
    kept = checkpoint.with_name("model.int8.roost")
    for keep in (True, False):  # it is what `keep` is about: used, and still there
        assert roost.load(kept, backend="native", keep=keep)[0].weights == "int8" and kept.is_file()
    with pytest.raises(ValueError, match="packed"):
        roost.load(kept, backend="torch")
    with pytest.raises(ValueError, match="int8"):
        roost.load(kept, backend="native", weights="int4")


def test_dove_has_no_native_form(tmp_path: Path) -> None:
    tiny_model("dove-tiny").save(tmp_path / "dove.pth")
    with pytest.raises(ValueError, match="Dove"):
        roost.load(tmp_path / "dove.pth", backend="native")
    assert [file.name for file in tmp_path.iterdir()] == ["dove.pth"]


def test_without_the_library_the_reason_is_said(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "no compiler"))
    with pytest.raises(ValueError, match="no compiler"):
        roost.load(checkpoint, backend="native")
    assert roost.load(checkpoint)[0](IDS)[0].shape == (1, 20, 257)
