"""The guards of conftest.py: each test here fails when its guard is off."""

from __future__ import annotations

import socket

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from typechecking import on_return


def test_uninitialised_memory_is_nan() -> None:
    assert torch.empty(1000).isnan().all()
    assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()


def test_annotations_are_checked_when_a_function_returns() -> None:
    @jaxtyped(typechecker=on_return)
    def double(x: Float[Tensor, "B T"], times: int = 2) -> Float[Tensor, "B T"]:
        if times < 0:
            raise ValueError("times is negative")
        return x.repeat(1, times - 1)

    assert double(torch.zeros(2, 3)).shape == (2, 3)
    for wrong in (
        lambda: double(torch.zeros(2)),
        lambda: double(torch.zeros(2, 3).long()),
        lambda: double(torch.zeros(2, 3), 3),
    ):
        with pytest.raises(TypeCheckError):
            wrong()
    with pytest.raises(ValueError, match="negative"):
        double("not a tensor", -1)  # pyright: ignore[reportArgumentType]


def test_the_hook_is_on() -> None:
    from roost import ops, tokenizer

    assert hasattr(ops.wkv, "__wrapped__") and not hasattr(tokenizer.WorldTokenizer.encode, "__wrapped__")


def test_nothing_outside_is_reached() -> None:
    with socket.socket() as outside, pytest.raises(RuntimeError, match="no network"):
        outside.connect(("192.0.2.1", 80))  # an address reserved for documentation
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
