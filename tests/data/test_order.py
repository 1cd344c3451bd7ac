"""The orders of windows; the vectors of the magic one were computed with Python's integers from RWKV-LM's formula."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost.data.order import magic, magic_prime, permutation, sequential, shuffled

MINIPILE = 1_498_226_207


@pytest.mark.parametrize(
    ("tokens", "ctx", "prime"),
    [
        (MINIPILE, 512, 2926181),
        (MINIPILE, 4096, 365759),
        (200_499, 512, 389),
        (332_115_325_534, 4096, 81082817),
    ],
)
def test_the_prime_is_found(tokens: int, ctx: int, prime: int) -> None:
    assert magic_prime(tokens // ctx) == prime


@pytest.mark.parametrize(
    ("prime", "windows"),
    [
        (2926181, {1: 1808479, 2: 2763108, 3: 2010037, 4: 1621597, 5: 743938}),
        (2926181, {17215: 527581, 40320: 1326902, 40321: 1232952, 2926180: 1117702, 2926181: 0, 2926182: 1808479}),
        (2926181, {10**9: 2709387}),
        (365759, {1: 226051, 2: 345372, 3: 251233, 4: 202663, 5: 92932}),
        (389, {1: 240, 2: 364, 3: 256, 4: 189, 5: 47, 388: 149, 389: 0}),
        (81082817, {1: 50111936}),
    ],
)
def test_the_magic_order_is_that_of_rwkv_lm(prime: int, windows: dict[int, int]) -> None:
    """RWKV-LM counts its samples ii from 1."""
    assert {ii: magic(ii - 1, prime) for ii in windows} == windows


def test_the_magic_order_visits_every_window_below_the_prime() -> None:
    assert sorted(magic(k, 389) for k in range(389)) == list(range(389))


@pytest.mark.parametrize("windows", range(12, 3000, 7))
def test_the_prime_against_trial_division(windows: int) -> None:
    wanted = [n for n in range(2, windows) if n % 3 == 2 and all(n % d for d in range(2, n))][-1:]
    if wanted and wanted[0] > int(0.9 * windows):
        assert magic_prime(windows) == wanted[0]
    else:
        with pytest.raises(ValueError, match=f"0.9 x {windows} and"):
            magic_prime(windows)


@pytest.mark.parametrize("windows", [0, 1, 2, 3, 10])
def test_few_windows_have_no_prime(windows: int) -> None:
    with pytest.raises(ValueError, match="choose order 'shuffle'"):
        magic_prime(windows)


def test_strong_pseudoprimes_are_no_primes() -> None:
    """3215031751 passes Miller-Rabin with the witnesses 2, 3, 5 and 7; it is 1 mod 3, its neighbours decide."""
    found = magic_prime(3215031752 + 2)
    assert found != 3215031751 and found % 3 == 2 and all(found % d for d in range(2, 56702))


@given(st.integers(1, 50), st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_an_epoch_visits_every_window_once(windows: int, seed: int, epoch: int) -> None:
    positions = range(epoch * windows, (epoch + 1) * windows)
    assert sorted(shuffled(k, windows, seed) for k in positions) == list(range(windows))
    assert [sequential(k, windows) for k in positions] == list(range(windows))


def test_the_permutation_is_fixed_and_read_only() -> None:
    found = permutation(9, 3, 0)
    assert found.tolist() == [7, 6, 4, 1, 3, 8, 0, 5, 2] and found.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1
