"""Which window comes when: pure functions of the position.

Owns: three orders of `windows` windows. A position is the number of a sample, counted from 0 over the whole run.
    sequential   position mod windows
    shuffle      epoch e = position // windows reads in an order of its own, which (seed, e) alone decides
    magic        RWKV-LM's: f i^3 mod p with i = position + 1, p the largest prime below `windows` that is 2 mod 3
                 (then cubing is one-to-one) and f = floor(p (sqrt(5) - 1) / 2); every window below p once in p samples
Refuses to know: tokens, batches, ranks. A rank or a micro-batch asks for other positions; the order stays.
"""

from __future__ import annotations

from functools import lru_cache
from math import sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Order = Literal["shuffle", "sequential", "magic"]
"""The names of the orders."""

_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # they decide every number below 3.3e24


def sequential(position: int, windows: int) -> int:
    """The window at a position: the file from its beginning, again and again."""
    return position % windows


def shuffled(position: int, windows: int, seed: int) -> int:
    """The window at a position: every epoch in an order of its own."""
    epoch, place = divmod(position, windows)
    return int(permutation(windows, seed, epoch)[place])


@lru_cache(maxsize=2)  # a batch touches one border between epochs unless the file is tiny
def permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The numbers 0..count-1 in the order that (seed, epoch) decides: (count,) int64, read-only, 8 bytes each."""
    key = np.array([seed, epoch], np.uint64)  # a list with a large seed would pass through float64
    order = np.random.Generator(np.random.Philox(key=key)).permutation(count)
    order.setflags(write=False)
    return order


def magic(position: int, prime: int) -> int:
    """The window at a position, as RWKV-LM's `my_pile_stage` loaders read it (its sample ii is position + 1).

    Reduced after each product, so that it is exact in 64 bits too; f as there, in double precision.
    """
    factor = int(prime * (sqrt(5) - 1) / 2)
    place = (position + 1) % prime
    return place * place % prime * place % prime * factor % prime


def magic_prime(windows: int) -> int:
    """The prime of the magic order: the largest p = 2 mod 3 with p < windows. `windows` = tokens // ctx.

    Raises ValueError where p is at most 0.9 windows: RWKV-LM refuses too, since the windows from p on are never read.
    """
    for number in range(windows - 1, int(0.9 * windows), -1):
        if number % 3 == 2 and _is_prime(number):
            return number
    raise ValueError(
        f"no prime for the magic order lies between 0.9 x {windows} and {windows} windows: too few tokens for this ctx;"
        " choose order 'shuffle' or a smaller ctx"
    )


def _is_prime(number: int) -> bool:
    """Miller-Rabin with witnesses that leave no doubt in this range."""
    if number < 2 or any(number % witness == 0 for witness in _WITNESSES):
        return number in _WITNESSES
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for witness in _WITNESSES:
        power = pow(witness, odd, number)
        if power in (1, number - 1):
            continue
        if not any((power := power * power % number) == number - 1 for _ in range(twos - 1)):
            return False
    return True
