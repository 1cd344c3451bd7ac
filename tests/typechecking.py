"""The type checker that the import hook of conftest.py uses: beartype, applied when a function has returned.

A public function either refuses an argument with its own message or its annotations hold: what it raises passes
unchanged, and when it returns, all arguments and the result must fit together in type, dtype and shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype


def on_return(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check only the twin that jaxtyping calls after the real function: it takes the result as an argument, `ret0`."""
    return beartype(function) if "ret0" in function.__code__.co_varnames else function
