"""One's own text to a token file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roost import WorldTokenizer
from roost.cli import main
from roost.data.binidx import TokenFile
from roost.data.prepare import prepare


def test_files_and_lines_become_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"plain \xff bytes")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("один", "", "two")))
    for tokenizer in (WorldTokenizer(), WorldTokenizer.byte_level()):
        found = prepare([tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "out", tokenizer)
        file = TokenFile(tmp_path / "out")
        assert found == (4, len(file)) and file.count == 4
        texts = [tokenizer.decode_bytes(file.documents(i)) for i in range(4)]
        assert texts == [b"plain \xff bytes", "один".encode(), b"", b"two"]
        assert all(file.documents(i)[-1] == 0 for i in range(4))


@pytest.mark.parametrize("line", ['{"text": "\\ud800"}', "{", "[]", '{"txt": "a"}', '{"text": 3}', ""])
def test_bad_lines_are_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2: expected an object"):
        prepare([tmp_path / "b.jsonl"], tmp_path / "out", WorldTokenizer.byte_level())
    assert not (tmp_path / "out.bin").exists()


def test_nothing_to_write(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    for name, message in (("none", "no such file"), ("empty.txt", "is empty"), ("empty.jsonl", "is empty")):
        with pytest.raises(ValueError, match=message):
            prepare([tmp_path / name], tmp_path / "out", WorldTokenizer.byte_level())


def test_from_own_text_to_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two commands of the README."""
    (tmp_path / "book.txt").write_text("A short book, read again and again. " * 60)
    book = str(tmp_path / "book")
    assert main(["prepare", f"{book}.txt", "-o", book, "--bytes"]) == 0
    assert "1 document, 2,161 tokens" in capsys.readouterr().out
    recipe = tmp_path / "book.toml"
    recipe.write_text(f'model = "finch-tiny"\ndata = "{book}"\nctx = 32\nbatch = 2\nsteps = 3\nout = "{book}-run"\n')
    assert main(["train", str(recipe)]) == 0
    assert "loss" in capsys.readouterr().out and (tmp_path / "book-run" / "final.safetensors").is_file()
