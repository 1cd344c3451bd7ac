"""A real Ctrl-C: SIGINT to a running process, sent once it writes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from tiny import tiny_model

pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGINT to one process is POSIX")
ENDLESS = ["--max-tokens", "10000000", *(flag for id in (0, *range(1, 33)) for flag in ("--ban", str(id)))]
"""No token ends the text, and no blank line does: newlines cannot be drawn."""
PATIENCE = 60
"""Seconds until a process that does not answer is killed; a good run needs two."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.pth"
    tiny_model().save(path)
    return str(path)


def started(*argv: str) -> subprocess.Popen[bytes]:
    """The command line as a process that is not deaf to SIGINT, whatever its parent is."""
    return subprocess.Popen(
        [sys.executable, "-m", "roost", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def written(pipe: IO[bytes] | None, count: int) -> bytes:
    """The next `count` bytes; blocks until they are there."""
    assert pipe
    data = pipe.read(count)
    assert len(data) == count, f"the program ended after {data!r}"
    return data


def test_chat_stops_the_reply_and_goes_on(model: str, tmp_path: Path) -> None:
    state = tmp_path / "s.state"
    with started("chat", model, "--seed", "1", *ENDLESS) as talk:
        try:
            assert talk.stdin and talk.stdout
            talk.stdin.write(f"hi\n/save {state}\n/quit\n".encode())
            talk.stdin.flush()
            greeting = talk.stdout.readline()
            assert b"/help lists the commands" in greeting
            written(talk.stdout, 20)  # of the reply, which would last for hours
            talk.send_signal(signal.SIGINT)
            out, err = talk.communicate(timeout=PATIENCE)
        finally:
            talk.kill()
    assert talk.returncode == 0 and b"Traceback" not in err and b"error" not in err
    assert out.count(b" (stopped)\n") == 1 and re.search(rb"\(saved .* to .*s\.state\)\n$", out) and state.is_file()


def test_generate_exits_130_and_keeps_what_it_wrote(model: str, tmp_path: Path) -> None:
    state = tmp_path / "s.state"
    with started("generate", model, "x", "--save", str(state), *ENDLESS) as writer:
        try:
            written(writer.stdout, 20)
            writer.send_signal(signal.SIGINT)
            _, err = writer.communicate(timeout=PATIENCE)
        finally:
            writer.kill()
    assert (writer.returncode, err) == (130, b"") and state.is_file()


IMPORT = """
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
sys.argv[0] = sys.argv[1]
import roost
"""


@pytest.mark.parametrize("program", ["/usr/bin/roost", "roost", "-m", "train.py"])
def test_ctrl_c_while_torch_loads_is_quiet_in_the_command_line(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT, program], capture_output=True, text=True, check=False)
    if program == "train.py":  # in a program of the user's it is the user's to catch
        assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr
    else:
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
