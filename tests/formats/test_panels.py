"""Packed matrices against the table in src/native/pack.cpp, written here a second time in NumPy, element by element."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from roost import native
from roost.formats import panels
from roost.formats.panels import checksum, file_checksums, pack_matrix, packed_size, unpack_matrix
from roost.native import KINDS

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())
SHAPES = [(1, 1), (32, 64), (33, 65), (5, 100), (257, 256), (70, 448)]
INTEGERS = ("i8", "i8 fine", "i4")


def random_matrix(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Heavy tails, and rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(outputs, inputs, generator=generator) ** 3
    return w * torch.logspace(-3, 1, outputs)[:, None]


def bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def int8_parts(data: NDArray[np.uint8], outputs: int, inputs: int) -> tuple[Any, Any]:
    """Codes (N, K) and scales (N, groups), padding included."""
    padded = -(-inputs // 64) * 64
    groups = data.reshape(-1, padded // 64, 33 * 64)
    codes = groups[:, :, : 64 * 32].reshape(-1, padded // 64, 16, 32, 4)  # panel, group, quad, output, byte
    codes = codes.transpose(0, 3, 1, 2, 4).reshape(-1, padded)
    scales = bf16(np.ascontiguousarray(groups[:, :, 64 * 32 :]).view(np.uint16))  # panel, group, output
    return codes, scales.transpose(0, 2, 1).reshape(-1, padded // 64)


def int4_parts(data: NDArray[np.uint8], outputs: int, inputs: int) -> tuple[Any, Any, Any, Any]:
    """Codes (N, K), steps s and zeros z (N, groups), row scales R (N,), padding included."""
    padded = -(-inputs // 64) * 64
    rows = data.reshape(-(-outputs // 32), 18 * padded + 128)
    R = np.ascontiguousarray(rows[:, 18 * padded :]).view(np.float32).reshape(-1)
    groups = rows[:, : 18 * padded].reshape(-1, padded // 32, 18 * 32)
    octets = groups[:, :, : 16 * 32].reshape(-1, padded // 32, 4, 32, 4)  # panel, group, octet, output, byte
    codes = np.stack([octets & 15, octets >> 4], axis=-2)  # low halves are inputs 0..3 of the octet, high ones 4..7
    codes = codes.transpose(0, 3, 1, 2, 4, 5).reshape(-1, padded)
    s, z = (groups[:, :, at * 32 : (at + 1) * 32].transpose(0, 2, 1).reshape(-1, padded // 32) for at in (16, 17))
    return codes, s, z, R


def reference_unpack(kind: str, data: NDArray[np.uint8], outputs: int, inputs: int) -> NDArray[np.float32]:
    """The whole matrix, padded outputs and inputs included."""
    tall = -(-outputs // 32)
    if kind == "f32":
        return data.view(np.float32).reshape(tall, inputs, 32).transpose(0, 2, 1).reshape(tall * 32, -1)
    if kind == "w16":
        return bf16(data.view(np.uint16)).reshape(tall, inputs, 32).transpose(0, 2, 1).reshape(tall * 32, -1)
    if kind == "bf16":
        return bf16(data.view(np.uint16)).reshape(tall, -1, 32, 2).transpose(0, 2, 1, 3).reshape(tall * 32, -1)
    if kind == "i4":
        codes, s, z, R = int4_parts(data, outputs, inputs)
        steps = R[:, None] * s.astype(np.float32)
        zeros = z.astype(np.float32) / np.float32(16)
        return np.repeat(steps, 32, 1) * (codes.astype(np.float32) - np.repeat(zeros, 32, 1))
    codes, scales = int8_parts(data, outputs, inputs)
    return (codes.astype(np.float32) - 128) * np.repeat(scales, 64, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_layout(kind: str, shape: tuple[int, int]) -> None:
    data = pack_matrix(kind, random_matrix(*shape))
    assert data.nbytes == packed_size(kind, *shape)
    whole = reference_unpack(kind, data, *shape)
    assert np.array_equal(unpack_matrix(kind, data, *shape).numpy(), whole[: shape[0], : shape[1]])
    assert not whole[shape[0] :].any()
    if kind == "i4":  # a padded input may share a group with real ones: its code is 0, its activation will be
        codes, s, z, _ = int4_parts(data, *shape)
        assert not codes[:, shape[1] :].any() and not codes[shape[0] :].any()
        assert not s[shape[0] :].any() and not z[shape[0] :].any()
    else:
        assert not whole[:, shape[1] :].any()
    if kind in ("i8", "i8 fine"):
        codes, _ = int8_parts(data, *shape)
        assert (codes[shape[0] :] == 128).all() and (codes[:, shape[1] :] == 128).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_float_formats_hold_the_nearest_numbers(shape: tuple[int, int]) -> None:
    w = random_matrix(*shape)
    w[0, 0] = 1 + 2**-8  # a tie: to even
    assert torch.equal(unpack_matrix("f32", pack_matrix("f32", w), *shape), w)
    for kind in ("w16", "bf16"):
        assert torch.equal(unpack_matrix(kind, pack_matrix(kind, w), *shape), w.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_strides(dtype: torch.dtype) -> None:
    w = random_matrix(40, 70).to(torch.bfloat16).to(dtype)
    assert np.array_equal(pack_matrix("w16", w.T), pack_matrix("w16", w.T.float().contiguous()))


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_rounds_to_the_nearest_code_of_a_good_scale(shape: tuple[int, int]) -> None:
    w = random_matrix(*shape).numpy()
    codes, scales = int8_parts(pack_matrix("i8", torch.from_numpy(w)), *shape)
    step = np.repeat(scales, 64, 1)[: shape[0], : shape[1]].astype(np.float64)
    best = np.clip(np.rint(w / np.where(step > 0, step, 1)), -128, 127)
    found = codes[: shape[0], : shape[1]].astype(np.float64) - 128
    assert np.abs((found - best) * step).max() <= 1e-6 * np.abs(w).max()
    groups = np.pad(w, ((0, 0), (0, -shape[1] % 64))).reshape(shape[0], -1, 64)
    plain = bf16(round_to_bf16(np.abs(groups).max(-1) / np.float32(127)))[..., None]
    plain_error = np.square(groups - np.clip(np.rint(groups / plain), -127, 127) * plain).sum(-1)
    ours = np.square(w - found * step)
    ours = np.pad(ours, ((0, 0), (0, -shape[1] % 64))).reshape(shape[0], -1, 64).sum(-1)
    assert ours.sum() <= (0.95 if w.size > 2000 else 1 + 1e-5) * plain_error.sum()


def plain_int4_error(w: NDArray[np.float32]) -> float:
    """Squared error of rounding between the extremes of each group of 32, with a real scale and an integer zero."""
    groups = np.pad(w, ((0, 0), (0, -w.shape[1] % 32))).reshape(-1, 32).astype(np.float64)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    step = ((high - low) / 15)[:, None]
    zero = np.rint(-low[:, None] / step)
    return float(np.square(groups - step * (np.clip(np.rint(groups / step + zero), 0, 15) - zero)).sum())


@pytest.mark.parametrize("spread", [1, 3])
@pytest.mark.parametrize("shape", [(32, 64), (257, 256), (70, 448)])
def test_int4_rounds_to_the_nearest_code_of_a_good_grid(shape: tuple[int, int], spread: int) -> None:
    w = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) ** spread).numpy()
    codes, s, z, R = int4_parts(pack_matrix("i4", torch.from_numpy(w)), *shape)
    step = (np.repeat(s, 32, 1) * R[:, None].astype(np.float64))[: shape[0], : shape[1]]
    zero = np.repeat(z, 32, 1)[: shape[0], : shape[1]] / 16
    found = codes[: shape[0], : shape[1]]
    best = np.clip(np.rint(w / step + zero), 0, 15)
    assert np.abs(np.abs(w - step * (found - zero)) - np.abs(w - step * (best - zero))).max() <= 1e-5 * np.abs(w).max()
    assert np.square(w - step * (found - zero)).sum() <= (0.85 if spread == 1 else 0.92) * plain_int4_error(w)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_for_every_cut(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = random_matrix(200, 130)
    wanted = pack_matrix(kind, w)
    for threads in (2, 3, 7):
        assert np.array_equal(pack_matrix(kind, w, threads=threads), wanted)
        assert torch.equal(
            unpack_matrix(kind, wanted, 200, 130, threads=threads), unpack_matrix(kind, wanted, 200, 130)
        )
    monkeypatch.setattr(panels, "_CHUNK", 64 * 130)
    assert np.array_equal(pack_matrix(kind, w), wanted)
    for isa in native.supported_isas():
        with native.forced_isa(isa):
            assert np.array_equal(pack_matrix(kind, w), wanted)


def test_unusual_numbers() -> None:
    """Zeros, one sign only, one number among zeros, the tiniest and the largest: finite, and as near as the rest."""
    w = torch.zeros(8, 128)
    w[1] = 3.0
    w[2] = -3.0
    w[3, 5] = 1.0
    w[4] = torch.linspace(1e-38, 2e-38, 128)
    w[5] = torch.linspace(-1, 1, 128) * 3e38
    w[6] = torch.linspace(10, 11, 128)
    w[7, 0], w[7, 64:] = 1e-6, 1.0  # a group whose step rounds to 0 beside the other one's
    for kind, bound in (("i8", 0.004), ("i4", 0.035)):
        found = unpack_matrix(kind, pack_matrix(kind, w), 8, 128)
        assert found.isfinite().all() and not found[0].any() and found[4].abs().max() <= 3e-38
        for row in (1, 2, 3, 5, 6, 7):
            assert ((found[row] - w[row]) / w[row].abs().max()).abs().max() <= bound, (kind, row)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(kind: str, value: float) -> None:
    w = random_matrix(40, 40)
    w[39, 39] = value
    with pytest.raises(ValueError, match=r"NaN(,| or) infinity"):
        pack_matrix(kind, w)


def test_the_largest_numbers() -> None:
    """All that are finite are packed, but for those that bf16 would round to infinity."""
    largest = torch.finfo(torch.float32).max
    edge = torch.tensor(0x7F7F7FFF, dtype=torch.int32).view(torch.float32)
    for kind, value in (("f32", largest), ("f32", -largest), ("w16", float(edge)), ("bf16", -float(edge))):
        assert unpack_matrix(kind, pack_matrix(kind, torch.full((3, 70), value)), 3, 70).isfinite().all()
    above = torch.nextafter(edge, torch.tensor(torch.inf))
    assert above.isfinite() and above.bfloat16().isinf() and edge.bfloat16().isfinite()
    for kind, value in (("w16", float(above)), ("bf16", -float(above))):
        with pytest.raises(ValueError, match="too large for bf16"):
            pack_matrix(kind, torch.full((3, 70), value))


def test_refused() -> None:
    w = random_matrix(3, 4)
    for call, message in (
        (lambda: pack_matrix("i5", w), "kind is 'i5'; did you mean 'i"),
        (lambda: pack_matrix("i8", w[0]), r"the matrix is torch.float32 \(4,\)"),
        (lambda: pack_matrix("i8", w.int()), "must be floats on the CPU"),
        (lambda: pack_matrix("i8", w, threads=0), "threads is 0"),
        (lambda: pack_matrix("i8", w, threads=10**6), "threads is 1000000"),
        (lambda: unpack_matrix("i8", np.zeros(7, np.uint8), 3, 4), "has 2112 bytes, not 7"),
        (lambda: pack_matrix("i8", torch.zeros(0, 4)), r"the matrix is torch.float32 \(0, 4\)"),
        (lambda: pack_matrix("i8", torch.zeros(4, 0)), r"the matrix is torch.float32 \(4, 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_sizes_are_those_of_the_native_library() -> None:
    from ctypes import c_int, c_long

    size = native.function("roost_packed_size", [c_int, c_long, c_long], c_long)
    for number, kind in enumerate(KINDS):
        for shape in (*SHAPES, (65536, 2048)):
            assert packed_size(kind, *shape) == size(number, *shape)
    assert size(6, 1, 1) == size(0, 0, 1) == size(0, 2**40, 2**40) == -1


def reference_checksum(data: bytes) -> int:
    mask, P = 2**64 - 1, 0x9E3779B97F4A7C15

    def fold(a: int, b: int) -> int:
        return (a * b >> 64) ^ (a * b & mask)

    def hash_of(block: bytes) -> int:
        lanes = [(j + 1) * P & mask for j in range(4)]
        words = np.frombuffer(block + bytes(-len(block) % 64), "<u8").reshape(-1, 4, 2)
        for j in range(4):
            for a, b in words[:, j].tolist():
                lanes[j] = fold(lanes[j] ^ a, b ^ ((j + 1) * P & mask))
        h = len(block)
        for lane in lanes:
            h = fold(h ^ lane, P)
        return h

    blocks = [data[at : at + 2**20] for at in range(0, len(data), 2**20)]
    return hash_of(b"".join(hash_of(block).to_bytes(8, "little") for block in blocks))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000, 2**17 + 1, 2**20 - 1, 2**20, 2**20 + 1, 2**21 + 77])
def test_checksum(size: int, tmp_path: Path) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    wanted = reference_checksum(data.tobytes())
    assert checksum(data) == wanted
    (tmp_path / "x").write_bytes(b"abc" + data.tobytes())
    with (tmp_path / "x").open("rb") as file:
        for threads in (1, 2, 5):
            found = file_checksums(file.fileno(), [3, 0, 3], [size, 3, size // 2], threads=threads)
            assert found == [wanted, reference_checksum(b"abc"), reference_checksum(data[: size // 2].tobytes())]
        with pytest.raises(ValueError, match="cannot be read to its end"):
            file_checksums(file.fileno(), [3], [size + 1])
    with pytest.raises(ValueError, match="cannot be read to its end"):
        file_checksums(os.open(tmp_path, os.O_RDONLY), [0], [1])


def test_every_changed_bit_changes_the_checksum() -> None:
    data = np.random.default_rng(0).integers(0, 256, 200, np.uint8)
    seen = {checksum(data), checksum(data[:-1])}
    for at in range(8 * len(data)):
        other = data.copy()
        other[at // 8] ^= 1 << at % 8
        seen.add(checksum(other))
    assert len(seen) == 2 + 8 * len(data)
