"""The verb of fine-tuning: an adapter becomes part of its model.

Owns: what is printed about it.
Refuses to know: what a merge computes (roost.training.adapters).
"""

from __future__ import annotations

import argparse

from roost.cli import terminal


def merge(args: argparse.Namespace) -> int:
    """Write the model that a base computes with its adapter."""
    from roost.checkpoint import DTYPES
    from roost.training.adapters import merge_files

    terminal.check_writable(args.out, args.base, args.adapter)
    print(f"wrote {merge_files(args.base, args.adapter, args.out, DTYPES.get(args.dtype))}")
    return 0
