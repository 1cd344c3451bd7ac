"""`roost bench` and `roost evaluate-quant`: every figure is recomputed, speeds by a clock that the test owns."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roost
from checkpoints import make_checkpoint
from commands import error
from roost import native
from roost.cli import main, measure, terminal
from roost.evaluation.quantisation import compare
from roost.formats import packed
from tiny import tiny_model

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())
TEXT = b"Any bytes: \x00 \xff \xc3, and then some that are not read."


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "tiny.pth"
    tiny_model().save(path)
    return str(path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is timed takes half a second."""
    ticks = count()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 2))


def in_json(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def in_table(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, list[list[str]], str]:
    """The first line, the cells of the others, and what stands below the table."""
    assert main([*argv]) == 0
    table, below = capsys.readouterr().out.split("\n\n", 1)
    head, *rows = table.splitlines()
    return " ".join(head.split()), [re.sub(" (?=[kM]?B )", "_", row).split() for row in rows], below


@torch.no_grad()
def zeros_in_decoding(model: str, tokens: int) -> float:
    """The share of zeros that torch finds in the inputs of `ffn.value` while one token is written over and over."""
    network, _ = roost.load(model)
    assert isinstance(network, roost.RWKV)
    shares: list[float] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shares.append(float((inputs[0] == 0).double().mean()))

    for block in network.layers:
        block.ffn.get_submodule("value").register_forward_pre_hook(look)
    state = None
    for _ in range(tokens + 1):
        _, state = network(torch.tensor([[100]]), state)
    return sum(shares) / len(shares)


@pytest.mark.usefixtures("clock")
def test_bench_in_json(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = in_json(capsys, "bench", model, "--weights", "int4,fp32", "--tokens", "5", "--threads", "2")
    assert [row["weights"] for row in found] == ["int4", "fp32"]
    zeros = zeros_in_decoding(model, 5)
    assert 0.2 < zeros < 0.8
    for row in found:
        target = tmp_path / f"again.{row['weights']}.roost"
        assert main(["convert", model, str(target)]) == 0
        assert row["file_bytes"] == target.stat().st_size
        assert (row["threads"], row["isa"]) == (2, native.isa())
        speeds = ("prefill_tokens_per_s", "decode_tokens_per_s", "decode_16_rows_tokens_per_s")
        assert [row[key] for key in speeds] == [512 / 0.5, 1 / 0.5, 16 / 0.5]
        assert row["weights_read_GB_per_s"] == pytest.approx(row["weight_bytes_per_token"] / 0.5 / 1e9)
    capsys.readouterr()
    exact = found[1]
    assert exact["ffn_zero_rate"] == pytest.approx(zeros, abs=1e-3)
    tensors = packed.open_packed(tmp_path / "again.fp32.roost").tensors
    whole = sum(one.data.nbytes for name, one in tensors.items() if name != "emb.weight")
    skipped = sum(one.data.nbytes for name, one in tensors.items() if name.endswith("ffn.value.weight"))
    assert exact["weight_bytes_per_token"] == pytest.approx(whole - exact["ffn_zero_rate"] * skipped, abs=1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.fp32.roost", "again.int4.roost", "tiny.pth"]


@pytest.mark.usefixtures("clock")
def test_bench_in_a_table(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("bench", model, "--tokens", "3")
    head, cells, below = in_table(capsys, *command)
    assert head == "weights file threads read t/s write t/s 16 rows GB/s zeros"
    wanted = [
        [
            row["weights"],
            terminal.size(row["file_bytes"]).replace(" ", "_"),
            "1",  # of a small model, without --threads
            "1,024",
            "2.0",
            "32.0",
            f"{row['weights_read_GB_per_s']:.1f}",
            f"{row['ffn_zero_rate']:.1%}",
        ]
        for row in in_json(capsys, *command)
    ]
    assert cells == wanted and [row[0] for row in cells] == ["fp32", "bf16", "int8", "int4"]
    assert "read: 512 tokens at once; write: one by one" in below


def test_bench_of_a_packed_file(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "tiny.int8.roost"
    assert main(["convert", model, str(target)]) == 0
    capsys.readouterr()
    (row,) = in_json(capsys, "bench", str(target), "--tokens", "2")
    assert row["weights"] == "int8" and row["file_bytes"] == target.stat().st_size
    assert all(0 < row[key] < math.inf for key in row if key.endswith("_per_s"))


@pytest.mark.parametrize("given", ["file", "standard input"])
@pytest.mark.usefixtures("clock")
def test_evaluate_quant_in_json(
    model: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT)))
    source = str(text) if given == "file" else "-"
    found = in_json(capsys, "evaluate-quant", model, source, "--tokens", "30", "--threads", "1")
    exact, _ = roost.load(model)  # torch
    ids = [byte + 1 for byte in TEXT[:30]]
    assert [row["weights"] for row in found] == ["fp32", "bf16", "int8", "int4"]
    for row in found:
        rounded, _ = roost.load(model, backend="native", weights=row["weights"], keep=False)
        wanted = compare(exact, rounded, ids)
        assert row["kl"] == pytest.approx(wanted.kl, rel=1e-3, abs=1e-9)
        assert row["kl_99"] == pytest.approx(wanted.kl_99, rel=1e-3, abs=1e-9)
        assert row["bits"] == pytest.approx(wanted.bits, rel=1e-6)
        assert row["exact_bits"] == pytest.approx(wanted.exact_bits, rel=1e-6)
        assert (row["top1"], row["tokens"], row["text_bytes"]) == (wanted.top1, 30, 30)
        assert row["decode_tokens_per_s"] == 2
    kl = [row["kl"] for row in found]
    assert kl[0] < 1e-9 < kl[1] < kl[2] < kl[3]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["text", "tiny.pth"]


@pytest.mark.usefixtures("clock")
def test_evaluate_quant_in_a_table(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    head, cells, below = in_table(capsys, "evaluate-quant", model, str(text), "--weights", "int8,int4")
    assert head == "weights file KL KL 99% same top bits/byte to fp32 write t/s"
    exact, tokenizer = roost.load(model)
    assert tokenizer is not None and [row[0] for row in cells] == ["int8", "int4"]
    for row in cells:
        rounded, _ = roost.load(model, backend="native", weights=row[0], keep=False)
        wanted = compare(exact, rounded, tokenizer.encode(TEXT))
        numbers = [float(cell.rstrip("%")) for cell in row[2:]]
        assert numbers[:2] == pytest.approx([wanted.kl, wanted.kl_99], rel=0.006)  # three digits are shown
        assert numbers[2] == pytest.approx(100 * wanted.top1, abs=0.006)
        assert numbers[3] == pytest.approx(wanted.bits / len(TEXT), abs=6e-5)
        assert numbers[4] == pytest.approx(100 * (wanted.bits / wanted.exact_bits - 1), abs=6e-4)
        assert row[-1] == "2.0"
    assert below == f"KL in nats a token; 50 tokens, 50 bytes of {text}; exact: fp32, native\n" and len(TEXT) == 50


def test_bytes_are_those_of_the_tokens_that_were_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text = tmp_path / "world.pth", tmp_path / "text"
    torch.save(make_checkpoint("6", vocab=65536), path)
    text.write_text("The Eiffel Tower is in the city of Paris")
    (row,) = in_json(capsys, "evaluate-quant", str(path), str(text), "--weights", "int8", "--tokens", "5")
    assert (row["tokens"], row["text_bytes"]) == (5, len("The Eiffel Tower"))


def test_the_text_that_ships(capsys: pytest.CaptureFixture[str]) -> None:
    _, cells, below = in_table(capsys, "evaluate-quant", "nestling", "--weights", "bf16", "--tokens", "64")
    assert cells[0][0] == "bf16" and "64 tokens, 64 bytes of the text that ships" in below


def test_bad_input_is_one_line(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, empty, pile, dove = (tmp_path / name for name in ("t.int8.roost", "empty", "pile.pth", "dove.pth"))
    assert main(["convert", model, str(kept)]) == 0
    capsys.readouterr()
    empty.write_bytes(b"")
    torch.save(make_checkpoint("6", vocab=300), pile)
    tiny_model("dove-tiny").save(dove)
    for verb in ("bench", "evaluate-quant"):
        assert "did you mean" in error(capsys, verb, str(tmp_path / "tinny.pth"))
        assert "--weights is 'int3'; did you mean 'int" in error(capsys, verb, model, "--weights", "fp32,int3")
        assert "--weights is ''" in error(capsys, verb, model, "--weights", "")
        assert "--threads is 0; it must be at least 1" in error(capsys, verb, model, "--threads", "0")
        assert "--threads is 257; it must be at most 256" in error(capsys, verb, model, "--threads", "257")
        assert "--tokens is 0; it must be at least 1" in error(capsys, verb, model, "--tokens", "0")
        assert "Dove" in error(capsys, verb, str(dove))
    assert "packed already: --weights goes with" in error(capsys, "bench", str(kept), "--weights", "int8")
    assert "name the checkpoint it was made from" in error(capsys, "evaluate-quant", str(kept))
    assert "is empty" in error(capsys, "evaluate-quant", model, str(empty))
    assert "no such file" in error(capsys, "evaluate-quant", model, str(tmp_path / "none"))
    assert "no World vocabulary" in error(capsys, "evaluate-quant", str(pile))


def test_without_the_library_the_reason_is_said(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "no compiler"))
    for verb in ("bench", "evaluate-quant"):
        assert "no compiler" in error(capsys, verb, model)
