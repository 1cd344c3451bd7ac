"""Which model --backend, --weights and --threads mean, and what cannot go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import roost
from commands import error
from roost import NativeModel, native
from roost.cli import main
from roost.cli.models import one_thread, open_model
from roost.formats import packed
from roost.inference.sampling import Sampling
from roost.inference.stream import generate
from tiny import tiny_model

native_only = pytest.mark.skipif(not native.available(), reason=native.why_not())


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "tiny.pth"
    tiny_model().save(path)
    return str(path)


@native_only
@pytest.mark.parametrize(
    ("options", "weights", "threads"),
    [
        ({"backend": "native"}, "bf16", 1),  # a small model: one thread
        ({"weights": "int8"}, "int8", 1),
        ({"threads": 2}, "bf16", 2),
        ({"backend": "native", "weights": "int4", "threads": 3}, "int4", 3),
    ],
)
def test_options_of_the_native_model(model: str, options: dict[str, Any], weights: str, threads: int) -> None:
    found, tokenizer = open_model(model, **options)
    assert isinstance(found, NativeModel) and (found.weights, found.threads) == (weights, threads)
    assert tokenizer.vocab_size == 257
    assert sorted(file.name for file in Path(model).parent.iterdir()) == [f"tiny.{weights}.roost", "tiny.pth"]


@native_only
def test_a_packed_file_and_a_model_that_ships_are_native_by_default(model: str) -> None:
    target = Path(model).with_name("tiny.int4.roost")
    assert main(["convert", model, str(target)]) == 0
    for name, weights in ((str(target), "int4"), ("nestling", "fp32")):
        found, _ = open_model(name)
        assert isinstance(found, NativeModel) and (found.weights, found.threads) == (weights, 1)


def test_everything_else_is_torch(model: str) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        (model, {}),
        (model, {"backend": "torch"}),
        ("nestling", {"backend": "torch"}),
    ]
    for name, options in cases:
        assert isinstance(open_model(name, **options)[0], roost.RWKV)
    assert open_model("nestling", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_without_the_library_a_model_that_ships_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "no compiler"))
    assert isinstance(open_model("nestling")[0], roost.RWKV)
    with pytest.raises(ValueError, match="no compiler"):
        open_model("nestling", weights="int8")


@native_only
def test_the_flags_arrive(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ["--temperature", "0", "--max-tokens", "12", "--preset", "openai"]
    assert main(["generate", model, "abc", "--backend", "native", "--weights", "int4", "--threads", "2", *fixed]) == 0
    rounded, tokenizer = roost.load(model, backend="native", weights="int4", keep=False)
    assert tokenizer is not None
    wanted = generate(rounded, tokenizer, "abc", Sampling.openai(temperature=0.0), max_tokens=12)
    assert capsys.readouterr().out == wanted.text + "\n"
    assert packed.open_packed(Path(model).with_name("tiny.int4.roost")).weights == "int4"


@native_only
def test_what_cannot_be_is_one_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    kept = str(Path(model).parent / "kept" / "tiny.int8.roost")
    Path(kept).parent.mkdir()
    assert main(["convert", model, kept]) == 0
    capsys.readouterr()
    before = sorted(Path(model).parent.iterdir())
    cases: list[tuple[str, str, tuple[str, ...]]] = [
        ("invalid choice: 'int3'", model, ("--weights", "int3")),
        ("invalid choice: 'foo'", model, ("--backend", "foo")),
        ("--threads is 0; it must be at least 1", model, ("--threads", "0")),
        ("--threads is 0; it must be at least 1", model, ("--backend", "torch", "--threads", "0")),
        ("--threads is 100000; it must be at most 256", model, ("--threads", "100000")),
        ("drop them, or --backend torch", model, ("--weights", "int8", "--backend", "torch")),
        ("drop them, or --backend torch", model, ("--threads", "2", "--backend", "torch")),
        ("dtype is torch.float32", model, ("--weights", "int8", "--dtype", "fp32")),
        ("device is meta; the native model runs on the CPU only", model, ("--weights", "int8", "--device", "meta")),
        ("holds int8 weights, not int4", kept, ("--weights", "int4")),
        ("packed for the native model", kept, ("--backend", "torch")),
    ]
    for message, name, flags in cases:
        for verb in (("generate", name, "x"), ("chat", name)):
            assert message in error(capsys, *verb, *flags), flags
    target = str(Path(model).with_name("new.int8.roost"))
    assert "--threads is 0" in error(capsys, "convert", model, target, "--threads", "0")
    assert "--threads is 257" in error(capsys, "convert", model, target, "--threads", "257")
    assert sorted(Path(model).parent.iterdir()) == before


def test_a_small_model_writes_with_one_torch_thread(model: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread(open_model(model)[0]):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
