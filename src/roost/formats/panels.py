"""Packed matrices: float weights in the panels that the native kernels read, and back.

Owns: the formats' sizes, and the calls. The layouts are in docs/native.md.
Refuses to know: models, files, and which matrix gets which format.
"""

from __future__ import annotations

from ctypes import byref, c_int, c_long, c_uint64, c_void_p
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roost import native
from roost.checks import choice, whole
from roost.native import KINDS, MOST_THREADS

_CHUNK = 1 << 24
"""Numbers converted to fp32 at a time: 64 MiB."""

Bytes = NDArray[np.uint8]


@cache
def _pack() -> Any:
    return native.function("roost_pack", [c_int, c_void_p, c_long, c_long, c_void_p, c_int])


@cache
def _unpack() -> Any:
    return native.function("roost_unpack", [c_int, c_void_p, c_long, c_long, c_void_p, c_int])


@cache
def _checksum() -> Any:
    return native.function("roost_checksum", [c_void_p, c_long, c_void_p])


@cache
def _checksum_file() -> Any:
    return native.function("roost_checksum_file", [c_int, c_void_p, c_void_p, c_int, c_void_p, c_int])


def packed_size(kind: str, outputs: int, inputs: int) -> int:
    """Bytes of a packed matrix (outputs, inputs): as src/native/model.h says, for where there is no library."""
    choice("kind", kind, KINDS)
    padded = -(-inputs // 64) * 64
    panel = {"f32": 128 * inputs, "w16": 64 * inputs, "bf16": 64 * padded, "i4": 18 * padded + 128}
    return -(-outputs // 32) * panel.get(kind, 33 * padded)


def pack_matrix(kind: str, w: Tensor, *, threads: int = 1) -> Bytes:
    """The bytes of `w`, (outputs, inputs) in any float dtype on the CPU.

    The same bytes for any number of threads and any instruction set. Raises ValueError for another shape, for NaN and
    infinity, for numbers that bf16 would round to infinity, and where the native library is missing.
    """
    choice("kind", kind, KINDS)
    if w.dim() != 2 or not w.numel() or not w.is_floating_point() or w.device.type != "cpu":
        raise ValueError(f"the matrix is {w.dtype} {tuple(w.shape)} on {w.device}; it must be floats on the CPU")
    threads = whole("threads", threads, 1, MOST_THREADS)
    outputs, inputs = w.shape
    out = np.empty(packed_size(kind, outputs, inputs), np.uint8)
    rows = max(32, _CHUNK // max(1, inputs) // 32 * 32)  # whole panels, which lie one after another
    for first in range(0, outputs, rows):
        part = w.detach()[first : first + rows].to(torch.float32).contiguous()
        to = out[packed_size(kind, first, inputs) :]
        native.check(_pack()(KINDS.index(kind), part.data_ptr(), len(part), inputs, to.ctypes.data, threads))
    return out


def unpack_matrix(kind: str, packed: Bytes, outputs: int, inputs: int, *, threads: int = 1) -> Tensor:
    """The numbers that packed bytes stand for: (outputs, inputs) fp32. ValueError for another size."""
    wanted = packed_size(kind, outputs, inputs)
    if packed.nbytes != wanted or not packed.flags.c_contiguous:
        raise ValueError(f"a packed {outputs} x {inputs} matrix ({kind}) has {wanted} bytes, not {packed.nbytes}")
    out = torch.empty(outputs, inputs)
    threads = whole("threads", threads, 1, MOST_THREADS)
    native.check(_unpack()(KINDS.index(kind), packed.ctypes.data, outputs, inputs, out.data_ptr(), threads))
    return out


def checksum(data: NDArray[Any]) -> int:
    """64-bit checksum of a contiguous array's bytes; its definition stands in src/native/checksum.cpp."""
    assert data.flags.c_contiguous
    out = c_uint64()
    native.check(_checksum()(data.ctypes.data, data.nbytes, byref(out)))
    return out.value


def file_checksums(descriptor: int, offsets: list[int], sizes: list[int], *, threads: int = 1) -> list[int]:
    """`checksum` of ranges of an open file, read without growing this process's memory. ValueError when cut short."""
    where, many = np.array(offsets, np.int64), np.array(sizes, np.int64)
    out = np.zeros(len(offsets), np.uint64)
    threads = whole("threads", threads, 1, MOST_THREADS)
    places = where.ctypes.data, many.ctypes.data, len(out), out.ctypes.data
    native.check(_checksum_file()(descriptor, *places, threads))
    return [int(one) for one in out]
