"""What the command line saves: never over its inputs, not lost to a closed pipe, nothing half-written after SIGTERM."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from roost import State
from roost.cli import main
from tiny import tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.pth"
    tiny_model().save(path)
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_inputs_are_not_overwritten(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = tmp_path / "book.txt"
    book.write_text("Some text.")
    before = book.read_bytes(), model.read_bytes()
    for words in (
        ("read", model, book, "--save", book),
        ("read", model, book, "--save", model),
        ("generate", model, "hi", "--save", model),
    ):
        assert "it is what is being read" in refused(capsys, *words)
    assert (book.read_bytes(), model.read_bytes()) == before
    directory = tmp_path / "model"
    directory.mkdir()
    weights = directory / "model.pth"
    tiny_model().save(weights)
    before = book.read_bytes(), weights.read_bytes()
    assert "it is what is being read" in refused(capsys, "generate", directory, "hi", "--save", weights)
    (tmp_path / "n.bin").write_bytes(b"text")
    assert "it is what is being read" in refused(capsys, "prepare", tmp_path / "n.bin", "-o", tmp_path / "n")
    assert (tmp_path / "n.bin").read_bytes() == b"text"
    assert (book.read_bytes(), weights.read_bytes()) == before


def test_chat_does_not_save_over_its_model(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = model.read_bytes()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hello\n/save {model}\n/quit\n"))
    threads = torch.get_num_threads()
    assert main(["chat", str(model), "--max-tokens", "9"]) == 0
    assert "it is what is being read" in capsys.readouterr().out
    assert model.read_bytes() == before and torch.get_num_threads() == threads


@pytest.mark.parametrize("target", ["/dev/null", "/proc/x", "no/such/place"])
def test_bad_targets_are_refused_before_the_work(target: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "generate", model, "hi", "--save", target)
    assert f"cannot save to {target}" in message and message.count("\n") == 1


def test_an_empty_state_name_is_not_ignored(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no state file" in refused(capsys, "generate", model, "hi", "--state", "")


def test_a_closed_pipe_keeps_the_state(tmp_path: Path, model: Path) -> None:
    state = tmp_path / "s.state"
    command = [
        sys.executable,
        "-m",
        "roost",
        "generate",
        str(model),
        "hi",
        "--max-tokens",
        "5000",
        "--save",
        str(state),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141 and errors == b""
    assert State.load(state).tokens[0] > 2


def test_sigterm_unwinds(tmp_path: Path) -> None:
    """A process told to end while it writes removes its temporary file; the old file stays."""
    target = tmp_path / "old.bin"
    target.write_bytes(b"old")
    code = (
        "import sys, time, roost.cli.verbs as verbs\n"
        "from roost.files import replacing\n"
        "def busy(args):\n"
        f"    with replacing({str(target)!r}) as temporary:\n"
        "        temporary.write_bytes(b'half'); print('writing', flush=True); time.sleep(60)\n"
        "import roost.cli as cli\n"
        "cli.VERBS['info'] = cli.VERBS['info']._replace(run=busy)\n"
        "sys.exit(cli.main(['info', 'x']))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.slow
def test_closed_descriptors(model: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m roost info {model} >&-", shell=True, stderr=subprocess.PIPE, check=False
    )
    assert done.returncode == 0 and done.stderr == b""
