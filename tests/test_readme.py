"""The README is true: its Python runs, its commands exist, its links and files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from roost import NativeModel, native
from roost.cli import parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return [code for name, code in re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M) if name == language]


def test_the_python_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, fast = blocks("python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    if native.available():
        exec(compile(fast, "README.md", "exec"), names)
        assert isinstance(names["fast"], NativeModel) and isinstance(names["ids"], np.ndarray)
    assert len(capsys.readouterr().out) > 20 and (tmp_path / "human.state").is_file()


COMMANDS = [line[2:].split("   ")[0] for block in blocks("console") for line in block.splitlines() if line[:2] == "$ "]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("roost ")])
def test_commands_parse(command: str) -> None:
    parse(shlex.split(command)[1:])


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"^[A-Z]{4,}$", README, re.M)
    (line,) = [line for line in README.splitlines() if line.startswith("docs/")]
    for page in line.removeprefix("docs/").split("·"):
        assert (ROOT / "docs" / f"{page.strip()}.md").is_file(), page


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    wanted = [shlex.split(line, comments=True)[1] for line in COMMANDS if line.startswith("make ")]
    assert {"demo", "test"} <= set(wanted) <= set(targets)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_file_map_is_the_tree() -> None:
    (tree,) = [block for block in blocks("") if block.startswith("src/roost/")]
    named = set(re.findall(r"(?<![\w/])([\w]+(?:\.py|/))", tree.split("tests/")[0])) - {"roost/"}
    here = {f"{path.name}{'/' * path.is_dir()}" for path in (ROOT / "src" / "roost").iterdir()}
    missing = {n for n in here if not n.startswith(("_", "py.typed"))} - named
    assert not missing, f"the README's file map lacks {missing}"
