"""Products on AMX tiles: integers have the bits of AVX-512, and bf16 those of one row alone, for every number of rows.

They run where there is AMX, and anywhere with AVX-512 in `make test-amx`, whose library computes the tile instructions
after their published pseudo-code and stops the process where a machine would fault. All of test_native.py applies too.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from roost import native
from roost.formats.panels import pack_matrix, unpack_matrix
from roost.models.native import product

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=native.why_not()),
    pytest.mark.skipif(
        native.available() and "amx" not in native.supported_isas(),
        reason="this machine has no AMX; `make test-amx` emulates it",
    ),
]

ROWS = 40  # one tile that is not full, one to three tiles that overlap or not
WIDTHS = [32, 64, 96, 257]
INPUTS = [64, 128, 320, 896, 200]  # the last one is padded
INTEGERS = ["i8", "i8 fine", "i4"]


def operands(kind: str, N: int, K: int) -> tuple[np.ndarray, torch.Tensor]:
    """A packed matrix and rows whose sizes differ widely, some of them zero, some half zero after squared ReLU."""
    generator = torch.Generator().manual_seed(1000 * N + K)
    w = torch.randn(N, K, generator=generator) / K**0.5
    x = torch.randn(ROWS, K, generator=generator) * torch.logspace(-3, 3, ROWS)[:, None]
    x[1::5] = x[1::5].relu().square()
    x[3::7, : K // 2] = 0
    x[8] = 0
    return pack_matrix(kind, w), x


@pytest.mark.parametrize("K", INPUTS)
@pytest.mark.parametrize("N", WIDTHS)
@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_have_the_bits_of_avx512(kind: str, N: int, K: int) -> None:
    packed, x = operands(kind, N, K)
    with native.forced_isa("avx512"):
        wanted = product(kind, packed, N, K, x)
    with native.forced_isa("amx"):
        for M in range(1, ROWS + 1):
            found = product(kind, packed, N, K, x[:M], threads=1 + M % 3)
            assert torch.equal(found.view(torch.int32), wanted[:M].view(torch.int32)), M


@pytest.mark.parametrize("kind", INTEGERS)
def test_the_largest_sums_are_exact(kind: str) -> None:
    N, K = 32, 128
    signs = torch.where(torch.arange(K) % 3 == 0, -1.0, 1.0)
    packed, x = pack_matrix(kind, signs.expand(N, K).contiguous()), signs.expand(ROWS, K).contiguous()
    x[::2] *= -1
    with native.forced_isa("avx512"):
        wanted = product(kind, packed, N, K, x)
    with native.forced_isa("amx"):
        assert torch.equal(product(kind, packed, N, K, x), wanted)
    assert float(wanted[1].min()) == pytest.approx(K, rel=0.05)


@pytest.mark.parametrize("K", INPUTS)
@pytest.mark.parametrize("N", WIDTHS)
def test_bf16_has_the_bits_of_one_row_and_is_near_the_exact_product(N: int, K: int) -> None:
    packed, x = operands("bf16", N, K)
    exact = x.bfloat16().double() @ unpack_matrix("bf16", packed, N, K).double().T
    with native.forced_isa("amx"):
        wanted = torch.cat([product("bf16", packed, N, K, row[None]) for row in x])
        for M in range(2, ROWS + 1):
            found = product("bf16", packed, N, K, x[:M], threads=1 + M % 3)
            assert torch.equal(found.view(torch.int32), wanted[:M].view(torch.int32)), M
    errors = (wanted - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-30)
    assert float(errors.max()) < 1e-6
