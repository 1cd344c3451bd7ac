"""Every known trap, sprung on purpose: each must move the oracle's logits far beyond any tolerance in the tests.

Owns: the flips of eps, of the order w, k, v, r, g, of mix and 1 - mix, of decay and output, of u and exp(u), and of
`time_state`. The bound is a thousand times the tolerance of the comparison with the `rwkv` package in test_oracle.py,
so that comparison cannot pass with any of them wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from checkpoints import Version, small_arrays
from roost.evaluation import oracle

Weights = dict[str, np.ndarray]

TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 300, 60)]


def moved(flipped: np.ndarray, expected: np.ndarray) -> bool:
    """Whether the largest change is more than a fifth of the logits' standard deviation."""
    return float(np.abs(flipped - expected).max() / expected.std()) > 0.2


def rename_bonus(weights: Weights) -> Weights:
    """Raw u read as a logarithm."""
    return {name.replace("time_faaaa", "time_first"): value for name, value in weights.items()}


def one_minus_mix(weights: Weights) -> Weights:
    """mix taken for maa, or maa for mix."""
    vectors = ("time_mix_", "time_maa_")
    return {
        name: 1 - value if any(x in name for x in vectors) and not name.endswith(("_w1", "_w2")) else value
        for name, value in weights.items()
    }


def permute_low_rank(weights: Weights) -> Weights:
    """Blocks read as r, w, k, v, g instead of w, k, v, r, g."""
    order = [3, 0, 1, 2, 4]
    return {name: value[order] if name.endswith("time_maa_w2") else value for name, value in weights.items()}


def permute_targets(weights: Weights) -> Weights:
    """Both low-rank matrices in another order: the pairs still fit, the targets do not."""
    order = [3, 0, 1, 2, 4]
    out = permute_low_rank(weights)
    for name, value in weights.items():
        if name.endswith("time_maa_w1"):
            out[name] = value.reshape(len(value), 5, -1)[:, order].reshape(value.shape)
    return out


def keep_time_state(weights: Weights) -> Weights:
    """`time_state` taken as [h, key, value]."""
    return {name: value.transpose(0, 2, 1) if name.endswith("time_state") else value for name, value in weights.items()}


FLIPS: list[tuple[Callable[[Weights], Weights], Version]] = [
    (rename_bonus, "5.1"),
    (rename_bonus, "5.2"),
    (one_minus_mix, "4"),
    (one_minus_mix, "5.0"),
    (one_minus_mix, "5.2"),
    (one_minus_mix, "6"),
    (permute_low_rank, "6"),
    (permute_targets, "6"),
    (keep_time_state, "6"),
]


@pytest.mark.parametrize(("flip", "version"), [pytest.param(f, c, id=f"{f.__name__}-{c}") for f, c in FLIPS])
def test_flipping_a_tensor_is_visible(flip: Callable[[Weights], Weights], version: Version) -> None:
    weights = small_arrays(version, time_state=version == "6")
    expected, _ = oracle.forward(weights, TOKENS)
    flipped, _ = oracle.forward(flip(weights), TOKENS)
    assert moved(flipped, expected)


@pytest.mark.parametrize("version", ["5.0", "5.1", "5.2", "6"])
def test_flipping_the_group_norm_eps_is_visible(version: Version) -> None:
    weights = small_arrays(version, time_state=version == "6")
    expected, _ = oracle.forward(weights, TOKENS)
    flipped, _ = oracle.forward(weights, TOKENS, group_norm_eps=1e-5)
    assert moved(flipped, expected)


@pytest.mark.parametrize("version", ["5.1", "5.2", "6"])
def test_decay_before_the_output_is_visible(version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = small_arrays(version, time_state=version == "6")
    expected, _ = oracle.forward(weights, TOKENS)

    def decayed_first(
        r: np.ndarray, k: np.ndarray, v: np.ndarray, w: np.ndarray, u: np.ndarray, start: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        y, state = np.zeros_like(v), start.copy()
        for t in range(len(r)):
            outer = np.einsum("hi,hj->hij", k[t], v[t])
            state = w[t][:, :, None] * state
            y[t] = np.einsum("hi,hij->hj", r[t], state + u[:, :, None] * outer)
            state = state + outer
        return y, state

    monkeypatch.setattr(oracle, "wkv_heads", decayed_first)
    flipped, _ = oracle.forward(weights, TOKENS)
    assert moved(flipped, expected)
