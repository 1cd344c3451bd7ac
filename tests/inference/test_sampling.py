"""Sampling: the reference vectors, the `rwkv` package's own numbers, and what no number may break."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import numpy as np
import pytest
import rwkv.utils
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from roost.inference import sampling
from roost.inference.sampling import (
    Penalties,
    Sampling,
    draw,
    logprobs,
    probabilities,
    silent_ids,
    uncounted_ids,
    uniform,
)
from roost.tokenizer import WorldTokenizer

Z = np.array([3, 2, 2, 1, 0, -1, -2, 0.5])
VECTORS = [
    ((1.0, 0.85, 0), [0.576117, 0.211942, 0.211942], [0.576117, 0.211942, 0.211942]),
    ((1.0, 0.6, 0), [0.576117, 0.211942, 0.211942], [0.731059, 0.268941]),
    ((2.0, 0.7, 0), [0.451863, 0.274069, 0.274069], [0.387456, 0.235004, 0.235004, 0.142537]),
    ((0.5, 0.7, 0), [0.786986, 0.106507, 0.106507], [1.0]),
    ((1.0, 0.99, 2), [0.731059, 0.268941], [0.731059, 0.268941]),
    ((0.0, 0.9, 0), [1.0], [1.0]),
]
WORLD = WorldTokenizer()


@pytest.mark.parametrize(("numbers", "last", "first"), VECTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_reference_vectors(
    numbers: tuple[float, float, int], last: list[float], first: list[float], dtype: torch.dtype
) -> None:
    temperature, top_p, top_k = numbers
    for order, expected in (("temperature_last", last), ("temperature_first", first)):
        params = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, order=order)  # pyright: ignore[reportArgumentType]
        p = probabilities(torch.tensor(Z, dtype=dtype), params)
        np.testing.assert_allclose(p[: len(expected)], expected, atol=6e-7)
        assert not p[len(expected) :].any()


def test_temperature_zero_takes_the_lowest_id_unless_strict() -> None:
    z = np.array([0.0, 1.0, 1.0])
    assert probabilities(z, Sampling(temperature=0.0)).tolist() == [0, 1, 0]
    assert probabilities(z, Sampling(temperature=0.0, order="temperature_first")).tolist() == [0, 1, 0]
    assert probabilities(z, Sampling(temperature=0.0, strict_ties=True)).tolist() == [0, 0.5, 0.5]


def test_strict_says_when_fp32_underflows() -> None:
    with pytest.raises(ValueError, match="underflows in fp32"):
        probabilities(np.zeros(65536), Sampling(temperature=0.01, strict_ties=True))


@pytest.mark.parametrize("top_p", [1.0, 0.999999, 0.99999])
def test_nucleus_never_turns_greedy(top_p: float) -> None:
    for seed in range(20):
        z = np.random.default_rng(seed).normal(0, 2, 65536)
        assert np.count_nonzero(probabilities(z, Sampling(top_p=top_p))) > 20000


@pytest.mark.parametrize("order", ["temperature_last", "temperature_first"])
def test_extreme_temperatures(order: Any) -> None:
    z = np.log([0.3, 0.3, 0.2, 0.2])
    cold = probabilities(z, Sampling(temperature=1e-300, order=order))
    np.testing.assert_allclose(cold, [0.5, 0.5, 0, 0])
    hot = probabilities(z, Sampling(temperature=1e300, order=order))
    np.testing.assert_allclose(hot, [0.25] * 4)


def test_min_p_and_top_k_ties() -> None:
    z = np.log([0.5, 0.2, 0.2, 0.1])
    np.testing.assert_allclose(probabilities(z, Sampling(min_p=0.3)), np.array([5, 2, 2, 0]) / 9)
    np.testing.assert_allclose(probabilities(z, Sampling(top_k=2)), np.array([5, 2, 0, 0]) / 7)
    hot = Sampling(temperature=1e9, min_p=0.9, order="temperature_first")
    np.testing.assert_allclose(probabilities(z, hot), [0.25] * 4, rtol=1e-6)
    even = Sampling(top_k=3, order="temperature_first")
    np.testing.assert_allclose(probabilities(np.zeros(5), even), np.array([1, 1, 1, 0, 0]) / 3)
    np.testing.assert_allclose(probabilities(np.zeros(5), Sampling(top_k=3)), np.array([1, 1, 1, 0, 0]) / 3)


@given(
    z=hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(-30, 30)),
    temperature=st.floats(0, 5),
    top_p=st.floats(0, 1),
    top_k=st.integers(0, 50),
    min_p=st.floats(0, 1),
    order=st.sampled_from(["temperature_last", "temperature_first"]),
)
def test_always_a_distribution_that_keeps_the_best(z: NDArray[np.float64], order: Any, **numbers: Any) -> None:
    before = z.copy()
    p = probabilities(z, Sampling(order=order, **numbers))
    assert np.array_equal(z, before)
    assert abs(p.sum() - 1) < 1e-12 and (p >= 0).all()
    assert p[z.argmax()] == p.max() > 0
    if numbers["top_k"]:
        assert np.count_nonzero(p) <= numbers["top_k"]


def test_bans_and_mask() -> None:
    p = probabilities(Z, Sampling(bans=(0, 3)), forbidden=np.arange(8) > 5)
    assert np.flatnonzero(p).tolist() == [1, 2, 4, 5]
    with pytest.raises(ValueError, match="every token is banned"):
        probabilities(Z, Sampling(bans=tuple(range(8))))
    with pytest.raises(ValueError, match="bans holds 8, but the model has only 8"):
        probabilities(Z, Sampling(bans=(8,)))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or inf"):
            probabilities(np.array([0, bad]), Sampling())
    with pytest.raises(ValueError, match=r"shape \(1, 8\)"):
        probabilities(Z[None], Sampling())


def test_penalties_of_the_reference() -> None:
    params = Sampling.chatrwkv()
    penalties = Penalties(uncounted=uncounted_ids(WORLD))
    for token in (100, 49, 100, 200):
        penalties = penalties.after(token, params.penalty_decay)
    assert penalties.counts == {100: pytest.approx(1.984047936), 49: 0.0, 200: 1.0}
    loss = {}
    for token in (100, 49, 200, 300):
        z = np.zeros(301)
        z[[token, 0]] = [5, 1]
        p = probabilities(z, Sampling(presence=0.2, frequency=0.2), penalties)
        loss[token] = 4 - np.log(p[token] / p[0])
    assert loss == pytest.approx({100: 0.596810, 49: 0.2, 200: 0.4, 300: 0.0}, abs=1e-6)


def test_uncounted_and_silent_ids() -> None:
    listed = "10 33 49 50 51 52 53 54 55 56 57 58 264 621 632 643 654 665 676 687 698 709"
    assert sorted(uncounted_ids(WORLD)) == [int(id) for id in listed.split()]
    assert sorted(uncounted_ids(WorldTokenizer.byte_level())) == [10, 33, *range(49, 59)]
    assert np.flatnonzero(silent_ids(WORLD, 65540)).tolist() == [0, *range(65530, 65540)]
    assert np.flatnonzero(silent_ids(WorldTokenizer.byte_level(), 257)).tolist() == [0]


def test_draws_follow_the_distribution_and_nothing_else() -> None:
    p = np.array([0.1, 0.0, 0.6, 0.3])
    drawn = [draw(p, 5, step) for step in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, p, atol=0.03)
    assert drawn[17] == draw(p, 5, 17)
    assert [draw(p, 6, step) for step in range(50)] != drawn[:50]
    numbers = {uniform(seed, step) for seed in (0, 1, 2**64 - 1) for step in range(1000)}
    assert len(numbers) == 3000 and min(numbers) >= 0 and max(numbers) < 1
    assert (uniform(0, 0), uniform(7, 3)) == (0.011546754286331562, 0.44205212947108785)  # in every version


@given(p=st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5]), min_size=1, max_size=12).filter(any), seed=st.integers(0, 99))
def test_draw_is_the_inverse_cdf_in_falling_order_with_ties_by_id(p: list[float], seed: int) -> None:
    order = sorted((id for id in range(len(p)) if p[id]), key=lambda id: (-p[id], id))
    target, passed = uniform(seed, 3) * sum(p), 0.0
    for id in order:
        passed += p[id]
        if passed > target:
            break
    assert draw(np.array(p), seed, 3) == id


def test_draw_survives_rounding() -> None:
    p = np.full(65536, 1 / 65536)
    assert {draw(p, 0, step) < 65536 for step in range(300)} == {True}


def test_logprobs_are_those_of_the_raw_logits() -> None:
    found = logprobs(torch.tensor(Z), 4, 3, WORLD)
    q = np.log(np.exp(Z) / np.exp(Z).sum())
    assert found.token == (4, WORLD.token_bytes(4), pytest.approx(q[4]))
    assert [(entry.id, entry.logprob) for entry in found.top] == [(i, pytest.approx(q[i])) for i in (0, 1, 2)]
    assert logprobs(Z, 0, 0, WORLD).top == ()
    assert len(logprobs(Z, 0, 100, WORLD).top) == 8


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature is -0.1; it must be a number >= 0"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"top_p": 1.5}, "top_p is 1.5; it must be a number >= 0 and <= 1"),
    ({"min_p": -1}, "min_p is -1"),
    ({"presence": float("inf")}, "presence is inf; it must be a number"),
    ({"frequency": None}, "frequency is None"),
    ({"penalty_decay": 2}, "penalty_decay is 2"),
    ({"top_k": -1}, "top_k is -1; it must be a whole number >= 0"),
    ({"top_k": 1.5}, "top_k is 1.5"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**64}, "below 2\\^64"),
    ({"logprobs": -1}, "logprobs is -1"),
    ({"bans": (-1,)}, "an id in bans is -1"),
    ({"stop_ids": 3}, "stop_ids is 3; it must be a tuple"),
    ({"stop": "end"}, "stop is 'end'; it must be a tuple"),
    ({"stop": ("",)}, "stop holds ''"),
    ({"order": "temperature_frist"}, "did you mean 'temperature_first'"),
    ({"temprature": 1}, "did you mean 'temperature'"),
    ({"strict_ties": True, "min_p": 0.1}, "strict_ties copies"),
]


@pytest.fixture(scope="module")
def users() -> Any:
    """The module as a user has it: without the type checks that conftest.py adds, so that its own checks answer."""
    spec = spec_from_file_location("sampling_without_hook", sampling.__file__)
    assert spec and spec.loader
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_fields(users: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        users.Sampling.chatrwkv(**fields)


def test_fields_may_be_ints_and_lists(users: Any) -> None:
    params = users.Sampling.openai(temperature=1, top_p=1, stop=["a"], bans=[3])
    assert (params.temperature, params.stop, params.bans) == (1.0, ("a",), (3,))
    assert params.order == "temperature_first" and hash(params) == hash(users.Sampling.openai(stop=("a",), bans=(3,)))


def captured(monkeypatch: pytest.MonkeyPatch, choose: Any = None) -> list[NDArray[np.float64]]:
    """The probabilities the package hands to its random generator, call by call; `choose` picks the token."""
    seen: list[NDArray[np.float64]] = []

    def choice(a: int, p: NDArray[Any]) -> int:
        seen.append(np.array(p, dtype=np.float64))
        return int(p.argmax()) if choose is None else choose(len(seen) - 1)

    monkeypatch.setattr(rwkv.utils.np.random, "choice", choice)
    return seen


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(2, 300),
    temperature=st.sampled_from([0.0, 0.5, 0.9, 1.0, 1.2, 2.0]),
    top_p=st.sampled_from([0.0, 0.2, 0.5, 0.85, 0.99]),
    top_k=st.sampled_from([0, 1, 5, 400]),
    coarse=st.booleans(),
)
def test_equals_the_rwkv_package(
    seed: int, size: int, temperature: float, top_p: float, top_k: int, coarse: bool
) -> None:
    z = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 4
    if coarse:
        z = z.round()  # many ties
        assume(not top_k)  # which of equal tokens top_k keeps is arbitrary in the package
    with pytest.MonkeyPatch.context() as patch:
        seen = captured(patch)
        rwkv.utils.PIPELINE.sample_logits(None, z.clone(), temperature, top_p, top_k)
    numbers: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    assert np.array_equal(probabilities(z, Sampling(strict_ties=True, **numbers)), seen[0])
    q = torch.softmax(z.double(), -1).sort(descending=True).values.cumsum(0)
    if temperature and (q - top_p).abs().min() > 1e-5:  # otherwise fp32 may cross top_p one token earlier or later
        np.testing.assert_allclose(probabilities(z, Sampling(**numbers)), seen[0], rtol=2e-5, atol=1e-12)


class _Scripted:
    """A model that gives the n-th row of a script, as the package's PIPELINE calls it."""

    def __init__(self, script: torch.Tensor) -> None:
        self.script, self.calls = script, 0

    def forward(self, tokens: list[int], state: Any) -> tuple[torch.Tensor, Any]:
        self.calls += 1
        return self.script[self.calls - 1].clone(), state


def test_equals_the_rwkv_package_through_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bans, penalties with decay, digits that do not count: every distribution of a scripted generation."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    pipeline = rwkv.utils.PIPELINE(None, "rwkv_vocab_v20230424")
    favourites = [49, 100, 33, 2000, 50, 100, 621, 3880, 709, 10]
    rounds = 25
    script = torch.randn(rounds, 65536, generator=torch.Generator().manual_seed(1)) * 2
    script[:, favourites] += 14
    script[:, 65530:] = script[:, 0] = -1e4  # the package masks neither
    args = rwkv.utils.PIPELINE_ARGS(temperature=1.3, top_p=0.9, token_ban=[2000, 7], alpha_presence=0.3)
    picks = [favourites[(step * 7) % len(favourites)] for step in range(rounds)]
    seen = captured(monkeypatch, lambda step: picks[step])
    pipeline.model = _Scripted(script)
    pipeline.generate("x", rounds, args)

    fields = {"temperature": 1.3, "top_p": 0.9, "bans": (2000, 7), "presence": 0.3}
    ours, strict = Sampling.chatrwkv(**fields), Sampling.chatrwkv(strict_ties=True, **fields)
    penalties = Penalties(uncounted=uncounted_ids(WORLD))
    assert len(seen) == rounds
    for step, token in enumerate(picks):
        assert np.array_equal(probabilities(script[step], strict, penalties), seen[step])
        np.testing.assert_allclose(probabilities(script[step], ours, penalties), seen[step], rtol=2e-5, atol=1e-12)
        penalties = penalties.after(token, ours.penalty_decay)
