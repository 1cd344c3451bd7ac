"""One packed matrix: a product is what its format says, on every instruction set, for every height and thread count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from roost import native
from roost.formats.panels import pack_matrix, unpack_matrix
from roost.models.native import product
from roost.native import KINDS

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


SHAPES = [(1, 1, 1), (33, 65, 2), (64, 64, 7), (96, 200, 13), (257, 896, 3)]


def exact_product(kind: str, packed: np.ndarray, N: int, K: int, x: torch.Tensor) -> torch.Tensor:
    """What the format says, in fp64: its own weights times activations rounded as the format rounds them."""
    w = unpack_matrix(kind, packed, N, K).double()
    if kind == "bf16":
        x = x.bfloat16()
    elif kind not in ("f32", "w16"):
        full = 32512 if kind == "i8 fine" else 127
        padded = torch.nn.functional.pad(x, (0, -K % 64)).unflatten(-1, (-1, 64))
        scale = padded.abs().amax(-1, keepdim=True) / full
        x = (torch.where(scale > 0, padded / scale, 0).round() * scale).flatten(-2)[:, :K]
    return x.double() @ w.T


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_what_the_format_says(shape: tuple[int, int, int], kind: str, isa: str) -> None:
    if isa not in native.supported_isas():
        pytest.skip(f"this machine has no {isa}")
    N, K, M = shape
    generator = torch.Generator().manual_seed(N)
    w = torch.randn(N, K, generator=generator).bfloat16().float() / K**0.5
    x = torch.randn(M, K, generator=generator)
    packed = pack_matrix(kind, w)
    with native.forced_isa(isa):
        results = [product(kind, packed, N, K, x, threads=threads) for threads in (1, 2, 5)]
    wanted = exact_product(kind, packed, N, K, x)
    # fp32 sums; a rounding of an activation that falls on the other side of a tie moves one step of 1/127 or 1/32512
    assert error(results[0], wanted) < (5e-4 if kind in ("i8", "i4") else 2e-6)
    assert all(torch.equal(results[0], other) for other in results)
    for row in range(M):
        with native.forced_isa(isa):
            assert torch.equal(product(kind, packed, N, K, x[row : row + 1])[0], results[0][row])


@pytest.mark.parametrize("isa", native.supported_isas() if native.available() else ())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e-36, 1e30])
def test_unusual_activations(kind: str, isa: str, value: float) -> None:
    """Rounding to integers hides neither NaN nor infinity, and the tiniest numbers do not become large ones."""
    x, w = torch.ones(3, 130), torch.full((40, 130), 0.5)
    x[1] = 0.0
    x[1, 77] = value
    with native.forced_isa(isa):
        found = product(kind, pack_matrix(kind, w), 40, 130, x, threads=2)
    assert ((found[[0, 2]] - 65) / 65).abs().max() < 0.02
    if np.isfinite(value):
        assert (found[1] - 0.5 * value).abs().max() < max(0.02 * value, 1e-33)
    else:
        assert not found[1].isfinite().any()


@pytest.mark.parametrize(
    "x", [torch.ones(2, 63), torch.ones(64), torch.ones(2, 64).double(), torch.ones(2, 64, device="meta")]
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_multiplied(x: torch.Tensor) -> None:
    packed = pack_matrix("i8", torch.ones(32, 64))
    with pytest.raises(ValueError, match=r"x is torch\..*; it must be \(M, 64\) fp32 on the CPU"):
        product("i8", packed, 32, 64, x)
    with pytest.raises(ValueError, match="another size"):
        product("i8", packed[:-1], 32, 64, torch.ones(2, 64))
