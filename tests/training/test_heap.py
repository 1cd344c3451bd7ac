"""Freed memory is there for the next step."""

import subprocess
import sys
from textwrap import dedent

import pytest

FAULTS = """
    import resource, numpy
    from roost.training.heap import keep_freed_memory
    {set}
    def step():
        return [numpy.ones(1 << 18) for _ in range(8)]
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_no_page_is_asked_for_twice() -> None:
    def faults(setting: str) -> int:
        code = dedent(FAULTS.format(set=setting))
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)

    assert faults("assert keep_freed_memory()") < 1000 < faults("pass")
