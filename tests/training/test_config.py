"""The numbers of a run: a rate falls, never rises."""

from __future__ import annotations

import pytest

from roost import TrainConfig
from roost.training.optim import learning_rate


def test_the_rate_ends_at_a_tenth_unless_said() -> None:
    assert TrainConfig(steps=1).lr_final == pytest.approx(6e-5)
    config = TrainConfig(steps=100, lr=1e-5)
    assert config.lr_final == pytest.approx(1e-6)
    assert learning_rate(99, config, 100.0) < 1.1e-6
    assert TrainConfig(steps=1, lr=1e-5, lr_final=0).lr_final == 0
    assert TrainConfig(steps=1, lr=1e-5, lr_final=1e-5).lr_final == 1e-5
    with pytest.raises(ValueError, match=r"lr_final is 6e-05, above lr = 1e-05"):
        TrainConfig(steps=1, lr=1e-5, lr_final=6e-5)
