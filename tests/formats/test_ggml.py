"""Blocks against ggml's own Python package: the same bytes out of the same numbers, the same numbers out of bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from roost.formats import ggml

TYPES = {
    "fp16": Type.F16,
    "bf16": Type.BF16,
    "q8_0": Type.Q8_0,
    "q4_0": Type.Q4_0,
    "q4_K": Type.Q4_K,
    "q6_K": Type.Q6_K,
}
STEPS = {"q8_0": 127, "q4_0": 8}
"""Steps from 0 to the largest number of a block."""


def numbers() -> Tensor:
    """64 rows over four decades, with a row and a block of zeros, and halves that rounding must send away from zero."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 64)[:, None]
    x[3], x[4, :32] = 0, 0
    x[5, :4] = torch.tensor([127.0, 0.5, -2.5, 0.49999997])
    x[5, 4:32] = 1
    return x


def packed(kind: str, x: Tensor) -> np.ndarray:
    return torch.cat(list(ggml.encode(kind, x))).numpy()


def unpacked(kind: str, raw: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    return ggml.decode(kind, torch.from_numpy(raw.copy()), shape)


@pytest.mark.parametrize("kind", ["fp16", "bf16", "q8_0", "q4_0"])
def test_bytes_are_those_of_the_gguf_package(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers()
    theirs = quants.quantize(x.numpy(), TYPES[kind]).view(np.uint8).reshape(-1)
    assert np.array_equal(packed(kind, x), theirs)
    monkeypatch.setattr(ggml, "_CHUNK", 256)  # the pieces do not show
    assert np.array_equal(packed(kind, x), theirs)
    assert len(theirs) == ggml.KINDS[kind].nbytes(x.numel())


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@given(x=arrays(np.float32, (3, 32), elements=st.floats(-1e4, 1e4, width=32).filter(lambda x: not 0 < abs(x) < 1e-30)))
def test_any_numbers(kind: str, x: np.ndarray) -> None:
    raw = packed(kind, torch.from_numpy(x))
    assert np.array_equal(raw, quants.quantize(x, TYPES[kind]).reshape(-1))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_K", "q6_K"])
def test_numbers_are_those_of_the_gguf_package(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (48, ggml.KINDS[kind].size), np.uint8)
    scales = {"q4_K": slice(0, 4), "q6_K": slice(208, 210)}.get(kind, slice(0, 2))
    raw[:, scales] = rng.standard_normal((48, (scales.stop - scales.start) // 2)).astype(np.float16).view(np.uint8)
    theirs = torch.from_numpy(quants.dequantize(raw, TYPES[kind]))
    shape = (16, theirs.numel() // 16)
    assert torch.equal(unpacked(kind, raw, shape), theirs.reshape(shape))
    monkeypatch.setattr(ggml, "_CHUNK", 1024)
    assert torch.equal(unpacked(kind, raw, shape), theirs.reshape(shape))
    half = ggml.decode(kind, torch.from_numpy(raw), shape, torch.bfloat16)
    assert torch.equal(half, theirs.reshape(shape).bfloat16())


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_error_is_that_of_the_format(kind: str) -> None:
    x = numbers()
    back = unpacked(kind, packed(kind, x), tuple(x.shape))
    step = x.reshape(-1, 32).abs().amax(1, keepdim=True) / STEPS[kind]
    error = (back - x).reshape(-1, 32).abs()
    steps = 0.5 if kind == "q8_0" else 1.0  # code 15 is 7 steps, so what would be 8 of the other sign loses one
    assert bool((error <= step * (steps + STEPS[kind] * 2**-11) + 2**-24 * STEPS[kind]).all())  # d is fp16


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_numbers_next_to_nothing_are_zero(kind: str) -> None:
    """Where 1 / d is infinite, ggml's own bytes depend on the processor."""
    x = torch.tensor([[1e-45, -1e-40, 0.0, 1e-39]]).repeat(1, 8)
    assert not unpacked(kind, packed(kind, x), (1, 32)).any()


def test_plain_floats_share_memory_and_keep_their_bits() -> None:
    x = torch.tensor([[float("nan"), float("-inf"), -0.0, 1e-45]])
    raw = torch.from_numpy(packed("fp32", x))
    back = ggml.decode("fp32", raw, (1, 4))
    assert back.data_ptr() == raw.data_ptr() and torch.equal(back.view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("fp16", 7e4, "a number of size 7e\\+04 does not fit fp16"),
        ("q8_0", 1e7, "too large for q8_0"),
        ("q4_0", 1e6, "too large for q4_0"),
        ("q4_0", float("nan"), "not finite"),
        ("q8_0", float("inf"), "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, value: float, message: str) -> None:
    x = torch.zeros(2, 32)
    x[1, 7] = value
    with pytest.raises(ValueError, match=message):
        packed(kind, x)


def test_rows_are_whole_blocks() -> None:
    with pytest.raises(ValueError, match="rows of 48 numbers are no whole q8_0 blocks of 32"):
        packed("q8_0", torch.zeros(2, 48))
