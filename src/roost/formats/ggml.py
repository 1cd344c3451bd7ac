"""How ggml stores numbers: plain floats, and blocks of 32 or 256 small integers with a scale.

    q8_0   32 numbers, d fp16:            x = d q,              q int8
    q4_0   32 numbers, d fp16:            x = d (q - 8),        q in 0..15, number i beside number i + 16 in one byte
    q4_K  256 numbers, d and m fp16:      x = d s q - m t,      q in 0..15, 6-bit s and t for every 32 numbers
    q6_K  256 numbers, d fp16:            x = d s (q - 32),     q in 0..63, int8 s for every 16 numbers

q8_0 rounds to nearest, halves away from zero; q4_0 gives the number of largest size the code 0, so that it is exact but
for the rounding of d. The K forms are only read: llama.cpp's quantiser puts them into files that it calls q4_0.

Owns: these layouts, bit for bit those of ggml. Refuses to know: files, names and models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Kind(NamedTuple):
    """How one kind of tensor is stored: ggml's number for it, numbers in a block, bytes of a block."""

    code: int
    block: int
    size: int

    def nbytes(self, numbers: int) -> int:
        """Bytes of so many numbers, which must be a multiple of the block."""
        return numbers // self.block * self.size


KINDS = {
    "fp32": Kind(0, 1, 4),
    "fp16": Kind(1, 1, 2),
    "bf16": Kind(30, 1, 2),
    "q8_0": Kind(8, 32, 34),
    "q4_0": Kind(2, 32, 18),
    "q4_K": Kind(12, 256, 144),
    "q6_K": Kind(14, 256, 210),
}
"""Every kind that is read. All but the K forms are written."""
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The kinds that are plain numbers."""
UNREAD = {3: "q4_1", 6: "q5_0", 7: "q5_1", 9: "q8_1", 10: "q2_K", 11: "q3_K", 13: "q5_K", 15: "q8_K", 28: "fp64"}
"""ggml's numbers of other kinds that people meet, to name them."""

_CHUNK = 1 << 20  # numbers at a time: bounds the memory of intermediate results, stays near the cache


def encode(kind: str, value: Tensor) -> Iterator[Tensor]:
    """The bytes of `value` (any float tensor on the CPU) in pieces, uint8.

    Raises ValueError when numbers are not finite or too large for the kind, or when rows are not whole blocks.
    """
    block = KINDS[kind].block
    if value.shape[-1] % block:
        raise ValueError(f"rows of {value.shape[-1]} numbers are no whole {kind} blocks of {block}")
    pack = {"q8_0": _pack_q8_0, "q4_0": _pack_q4_0}.get(kind)
    flat = value.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK]
        packed = piece.to(FLOATS[kind]) if pack is None else pack(piece.float().view(-1, 32))
        if pack is None and packed.dtype != piece.dtype and not bool((packed.isfinite() | ~piece.isfinite()).all()):
            raise ValueError(f"a number of size {float(piece.abs().max()):.3g} does not fit {kind}")
        yield packed.contiguous().view(torch.uint8).reshape(-1)


def decode(kind: str, raw: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers in the bytes `raw` (uint8): plain floats as they are, sharing memory; blocks in `dtype`."""
    if kind in FLOATS:
        return raw.view(FLOATS[kind]).reshape(shape)
    blocks = raw.reshape(-1, KINDS[kind].size)
    out = torch.empty(len(blocks), KINDS[kind].block, dtype=dtype)
    step = _CHUNK // KINDS[kind].block
    for start in range(0, len(blocks), step):
        out[start : start + step] = _UNPACK[kind](blocks[start : start + step])
    return out.reshape(shape)


def _pack_q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(d)
    size = scaled.abs()
    whole = size.floor()
    q = torch.copysign(whole + (size - whole >= 0.5), scaled)  # adding 0.5 first would round 0.49999997 up
    return torch.cat([_scale(d, "q8_0"), q.to(torch.int8).view(torch.uint8)], 1)


def _pack_q4_0(x: Tensor) -> Tensor:
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))  # with its sign
    d = largest / -8
    q = (
        (x.double() * _inverse(d).double() + 8.5).clamp(0, 15).to(torch.uint8)
    )  # truncates: fp64 is free of double rounding
    return torch.cat([_scale(d, "q4_0"), q[:, :16] | q[:, 16:] << 4], 1)


def _inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where that is infinite: such a block is stored with the scale 0."""
    inverse = 1 / d
    return torch.where(inverse.isinf(), 0, inverse)


def _scale(d: Tensor, kind: str) -> Tensor:
    half = d.half()
    if not bool(half.isfinite().all()):
        raise ValueError(f"not finite, or too large for {kind}, whose scales are fp16")
    return half.view(torch.uint8)


def _half(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float16).float()


def _unpack_q8_0(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * raw[:, 2:].view(torch.int8).float()


def _unpack_q4_0(raw: Tensor) -> Tensor:
    q = raw[:, 2:]
    return _half(raw[:, :2]) * (torch.cat([q & 15, q >> 4], 1).float() - 8)


def _unpack_q4_k(raw: Tensor) -> Tensor:
    d, m = _half(raw[:, 0:2]), _half(raw[:, 2:4])
    a, b, c = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]  # 8 scales and 8 minima: low 6 bits; the last 4 in two parts
    s = torch.cat([a & 63, c & 15 | a >> 6 << 4], 1)
    t = torch.cat([b & 63, c >> 4 | b >> 6 << 4], 1)
    q = raw[:, 16:].reshape(-1, 4, 1, 32)
    q = torch.cat([q & 15, q >> 4], 2).reshape(-1, 8, 32)
    return ((d * s.float())[..., None] * q.float() - (m * t.float())[..., None]).flatten(1)


def _unpack_q6_k(raw: Tensor) -> Tensor:
    low, high = raw[:, :128].reshape(-1, 2, 2, 32), raw[:, 128:192].reshape(-1, 2, 1, 32)
    s, d = raw[:, 192:208].view(torch.int8), _half(raw[:, 208:210])
    low = torch.cat([low & 15, low >> 4], 2)  # 4 rows of 32 in each half of the block
    high = torch.cat([high & 3, high >> 2 & 3, high >> 4 & 3, high >> 6], 2)
    q = (low | high << 4).reshape(-1, 16, 16).float() - 32
    return ((d * s.float())[..., None] * q).flatten(1)


_UNPACK: dict[str, Callable[[Tensor], Tensor]] = {
    "q8_0": _unpack_q8_0,
    "q4_0": _unpack_q4_0,
    "q4_K": _unpack_q4_k,
    "q6_K": _unpack_q6_k,
}
