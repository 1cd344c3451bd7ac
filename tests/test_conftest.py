"""The guards of conftest.py: each test here fails when its guard is off."""

from __future__ import annotations

import socket

import pytest
import torch
from jaxtyping import TypeCheckError


def test_uninitialised_memory_is_nan() -> None:
    assert torch.empty(1000).isnan().all()
    assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()


def test_annotations_are_checked() -> None:
    from roost.ops import wkv

    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(TypeCheckError):
        wkv(x.long(), x, x, x, x[0, 0])


def test_nothing_outside_is_reached() -> None:
    with socket.socket() as outside, pytest.raises(RuntimeError, match="no network"):
        outside.connect(("192.0.2.1", 80))  # an address reserved for documentation
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
