"""Keeping freed memory for the next step, in place of giving it back to the system and asking for it anew.

Every step needs the same arrays. glibc maps and unmaps the large ones each time, and clearing fresh pages takes a few
per cent of a step; what it does with the others makes the peak depend on their sizes.

Owns: the two settings of glibc's allocator. They hold for the whole process, so that only a program sets them, never
the library by itself.
Refuses to know: what is allocated.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_MAPPED = 1 << 30


def keep_freed_memory() -> bool:
    """Whether the allocator took the setting: glibc does, others have none."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MAPPED) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
