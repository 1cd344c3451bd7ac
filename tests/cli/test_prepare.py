"""`roost prepare`: flags, the table, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roost.cli import main
from roost.data.binidx import TokenFile
from roost.data.report import Counts, Report
from roost.data.sources import Source


def test_the_table_and_the_bad_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{\n{"text": "one"}\n{"text": "t"}\n{"text": "three"}\n')
    (tmp_path / "m.toml").write_text('[[source]]\nname = "lines"\npath = "a.jsonl"\nlanguage = "en"\n')
    out = str(tmp_path / "out")
    command = ["prepare", str(tmp_path / "m.toml"), "-o", out, "--bytes"]
    assert main(command) == 2
    assert "a.jsonl, line 2: expected an object" in capsys.readouterr().err
    assert main([*command, "--bad-lines", "skip", "--dedup", "--min-bytes", "2", "--shuffle", "1"]) == 0
    shown = capsys.readouterr()
    assert "bad line: " in shown.err and "a.jsonl, line 2" in shown.err
    assert "2 documents, 10 tokens in" in shown.out and "language en" in shown.out
    assert "1 bad line" in shown.out and "1 duplicate" in shown.out and "1 short" in shown.out
    report = json.loads(Path(f"{out}.report.json").read_text())
    assert report["dropped"] == {"bad line": 1, "duplicate": 1, "short": 1}
    assert len(TokenFile(out)) == 10


def test_what_a_budget_left_unread_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = Counts(documents=2, tokens=10, bytes=8, unread=3_500_000)
    report = Report("out", "", 257, [(Source("books", ("books.jsonl",), budget=10), counts)], [])
    monkeypatch.setattr("roost.cli.prepare.write", lambda *_, **__: report)
    for dropped, shown in ((0, " 3.5 MB not read"), (7, "7 over budget, 3.5 MB not read")):
        counts.drop("over budget", dropped)
        assert main(["prepare", "books.jsonl", "-o", str(tmp_path / "out"), "--bytes"]) == 0
        assert shown in capsys.readouterr().out


def test_a_vocabulary_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abab")
    lines = [f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)]
    (tmp_path / "v.txt").write_text("".join(lines) + "257 'ab' 2\n")
    vocabulary = ["--vocabulary", str(tmp_path / "v.txt")]
    assert main(["prepare", str(tmp_path / "a.txt"), "-o", str(tmp_path / "out"), *vocabulary]) == 0
    assert TokenFile(tmp_path / "out").tokens.tolist() == [257, 257, 0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.txt", "m.toml"], "a manifest comes alone"),
        (["a.txt", "--bytes", "--vocabulary", "a.txt"], "exclude each other"),
        (["none.txt"], "no such file"),
        (["a.txt", "--min-bytes", "-1"], "min_bytes is -1"),
    ],
)
def test_refused(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    Path("m.toml").write_text('[[source]]\nname = "a"\npath = "a.txt"\n')
    assert main(["prepare", *words, "-o", "out"]) == 2
    assert message in capsys.readouterr().err and not Path("out.bin").exists()
