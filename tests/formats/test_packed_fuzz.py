"""The mutation fuzzer of packed and GGUF files works, and its first cases hold; `make fuzz` goes on from there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from roost import native

SCRIPT = Path(__file__).parents[1] / "fuzz/files.py"


@pytest.mark.skipif(not native.available(), reason=native.why_not())
def test_a_few_mutated_files() -> None:
    command = [sys.executable, str(SCRIPT), "--seed", "0", "--count", "60", "--seconds", "300"]
    done = subprocess.run(
        [*command, "--native-library", native.library()._name], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("60 files: ") and " 0 refused" not in done.stdout and " 0 ran" not in done.stdout
