"""Products by oneDNN against fp64, with their gradients, and when torch's own product is taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from roost.ops import product


def _all(multiply: object, x: Tensor, weight: Tensor, g: Tensor) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = multiply(x, weight)  # pyright: ignore[reportCallIssue]
    return [y, *torch.autograd.grad(y, (x, weight), g)]


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(2, 33, 48), torch.randn(80, 48)),
        (torch.randn(64, 80), torch.randn(48, 80)),
        (torch.randn(40, 31), torch.randn(17, 31)),
        (torch.randn(3, 21, 5, 32)[..., 2, :], torch.randn(5, 32, 24)[2].t()),
        (torch.randn(48, 64).t(), torch.randn(96, 80)[:, :48]),
        (torch.randn(2, 16, 48)[:, ::2], torch.randn(48, 80).t()),
    ],
    ids=["wide", "narrow", "odd", "slices", "transposed", "steps"],
)
def test_equal_to_fp64(x: Tensor, weight: Tensor) -> None:
    g = torch.randn(*x.shape[:-1], len(weight))
    exact = _all(F.linear, x.double(), weight.double(), g.double())
    for found, wanted in zip(_all(product.linear, x, weight, g), exact, strict=True):
        torch.testing.assert_close(found, wanted.float(), rtol=0, atol=2e-6 * wanted.abs().max().item())


def test_frozen_sides_get_no_gradient() -> None:
    x, weight = torch.randn(32, 8), torch.randn(4, 8)
    for side in (x, weight):
        for frozen in (x, weight):
            frozen.requires_grad_(frozen is side)
        product.linear(x, weight).sum().backward()
        assert side.grad is not None
        side.grad = None
    assert x.grad is None


def test_torch_multiplies_what_is_not_fp32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(product, "_product", lambda *_: taken.append("oneDNN"))
    x, weight = torch.randn(32, 8), torch.randn(4, 8)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float64):
            assert product.linear(x.to(dtype), weight.to(dtype)).equal(F.linear(x.to(dtype), weight.to(dtype)))
        assert product.linear(x[:1], weight).equal(F.linear(x[:1], weight))
        assert product.linear(x.to("meta"), weight.to("meta")).shape == (32, 4)
        with torch.autocast("cpu", torch.bfloat16):
            assert product.linear(x, weight).dtype == torch.bfloat16
    assert not taken


def test_the_answer_may_be_changed_in_place() -> None:
    x, weight = torch.randn(2, 16, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    y = product.linear(x, weight)
    y[:, 0] = 0.0
    y[:, 1].add_(1)
    y.sum().backward()
    assert x.grad is not None and not x.grad[:, 0].any() and x.grad[:, 1].any()


def test_functional_gradients() -> None:
    x, weight = torch.randn(32, 8), torch.randn(4, 8, requires_grad=True)
    found = torch.func.grad(lambda w: product.linear(x, w).square().sum())(weight.detach())
    (wanted,) = torch.autograd.grad(F.linear(x, weight).square().sum(), weight)
    torch.testing.assert_close(found, wanted)
