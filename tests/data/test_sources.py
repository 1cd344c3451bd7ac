"""Sources and manifests: keys, values, and the files a path means."""

from __future__ import annotations

from pathlib import Path

import pytest

from roost.data.sources import Manifest, Source, files_of, named_after, read_manifest


def test_files_directories_and_globs(tmp_path: Path) -> None:
    for name in ("b/x.py", "b/sub/y.py", "b/z.md", "b/.hidden/w.py", "a.jsonl", "c1.txt", "c2.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def found(*paths: str, **options: tuple[str, ...]) -> list[str]:
        source = Source("s", tuple(str(tmp_path / path) for path in paths), **options)  # pyright: ignore
        return [str(file.relative_to(tmp_path)) for file in files_of(source)]

    assert found("b") == ["b/sub/y.py", "b/x.py", "b/z.md"]
    assert found("b", include=("*.py",)) == ["b/sub/y.py", "b/x.py"]
    assert found("c*.txt", "a.jsonl", "c1.txt") == ["c1.txt", "c2.txt", "a.jsonl"]
    assert found("a.jsonl", "b/../a.jsonl") == ["a.jsonl"]
    assert found("**/*.py") == ["b/sub/y.py", "b/x.py"]
    for path, message in (("none*", "finds no files"), ("none", "no such file")):
        with pytest.raises(ValueError, match=message):
            found(path)


def test_sources_are_called_as_their_files() -> None:
    assert [source.name for source in named_after(["x/a.txt", "y/a.txt", "b.txt"])] == ["x/a.txt", "y/a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[source]]\nname = 'a'\n", "source 1: the key 'path' is missing"),
        ("[[source]]\nname = 'a'\npath = 'b'\nlicense = 'MIT'\n", "unknown key 'license'; did you mean 'licence'"),
        ("dedupe = true\n", "unknown key 'dedupe'; did you mean 'dedup'"),
        ("bad_lines = 'skp'\n[[source]]\nname = 'a'\npath = 'b'\n", "bad_lines is 'skp'; did you mean 'skip'"),
        ("dedup = 1\n[[source]]\nname = 'a'\npath = 'b'\n", "dedup is 1"),
        ("[[source]]\nname = 'a'\npath = 'b'\nweight = 0\n", "source 1: weight is 0"),
        ("[[source]]\nname = 'a'\npath = 'b'\nweight = nan\n", "weight is nan"),
        ("[[source]]\nname = 'a'\npath = 'b'\nbudget = -1\n", "budget is -1"),
        ("[[source]]\nname = 'a'\npath = 'b'\nbudget = '1M'\n", "budget is '1M'"),
        ("[[source]]\nname = 'a'\npath = 3\n", "path is 3; it must be text, or a list"),
        ("[[source]]\nname = 3\npath = 'b'\n", "name is 3; it must be text"),
        ("[[source]]\nname = 'a'\npath = 'b'\nmin_bytes = 9\nmax_bytes = 8\n", "max_bytes is 8, less than"),
        ("[[source]]\nname = 'a'\npath = 'b'\n" * 2, "two sources are called 'a'"),
        ("source = 3\n", r"written as \[\[source\]\]"),
        ("", "there are no sources"),
        ("[", "is not a manifest"),
    ],
)
def test_what_a_manifest_may_not_say(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / "m.toml")


def test_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no manifest at"):
        read_manifest(tmp_path / "none.toml")


def test_paths_are_relative_to_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text("shuffle = 3\n[[source]]\nname = 'a'\npath = ['x', '/y']\nweight = 2\n")
    expected = Source("a", (str(tmp_path / "x"), "/y"), weight=2)
    assert read_manifest(tmp_path / "m.toml") == Manifest((expected,), shuffle=3)
