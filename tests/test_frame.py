"""The repository's frame: what is declared in one file agrees with the others, and what ships is there."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.metadata import entry_points, metadata, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
EXTRAS = metadata("roost").get_all("Provides-Extra") or []
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def pinned(name: str, python: str) -> list[Requirement]:
    """The pins of a package that apply to a Python version."""
    wanted = canonicalize_name(name)
    return [
        pin
        for pin in PINS
        if canonicalize_name(pin.name) == wanted
        and (pin.marker is None or pin.marker.evaluate({"python_version": python}))
    ]


@pytest.mark.parametrize("python", PYTHONS)
def test_everything_declared_is_pinned_once_and_allowed(python: str) -> None:
    declared = [Requirement(line) for line in requires("roost") or []]
    assert declared
    for requirement in declared:
        needed = any(
            requirement.marker is None or requirement.marker.evaluate({"python_version": python, "extra": extra})
            for extra in ("", *EXTRAS)
        )
        if requirement.name == "roost" or not needed:
            continue
        pins = pinned(requirement.name, python)
        assert len(pins) == 1, f"{requirement.name} has {len(pins)} pins for Python {python}"
        (exact,) = pins[0].specifier
        assert exact.operator == "==" and requirement.specifier.contains(exact.version, prereleases=True)


def test_what_runs_is_what_is_pinned() -> None:
    for name in ("numpy", "safetensors", "huggingface-hub", "rich", "jaxtyping"):
        pin = next(
            pin for pin in PINS if canonicalize_name(pin.name) == name and (not pin.marker or pin.marker.evaluate())
        )
        assert pin.specifier.contains(version(name)), f"{name} {version(name)} is installed; constraints.txt says {pin}"
    assert version("torch").split("+")[0] == "2.13.0"


def test_one_version_everywhere() -> None:
    number = version("roost")
    assert re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M) == [number]
    assert f"\nversion: {number}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {number} " in (ROOT / "CHANGELOG.md").read_text()


def test_entry_point_and_licence() -> None:
    (script,) = entry_points(group="console_scripts", name="roost")
    assert script.value == "roost.cli:main"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "BlinkDL" in (ROOT / "NOTICE").read_text()


def test_ci_runs_what_the_readme_tells_people_to_run() -> None:
    script, readme = (ROOT / ".ci/run").read_text(), (ROOT / "README.md").read_text()
    assert "make test" in script and "make check" in script
    assert "make test" in readme and "make demo" in readme


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(["make", f"PYTHON={old}", "test"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and not (tmp_path / ".venv").exists()
