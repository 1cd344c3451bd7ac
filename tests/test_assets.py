"""What ships: every file is accounted for, and the example is the document its README says it is."""

from __future__ import annotations

import json
from importlib.resources import files

from roost.data.normalise import normalise

ASSETS = files("roost") / "assets"
LANGUAGES = "es fr de ru el ar he hi bn th zh ja ko am ka en"


def test_the_readme_lists_every_asset() -> None:
    text = (ASSETS / "README.md").read_text("utf8")
    names = {asset.name for asset in ASSETS.iterdir()} - {"README.md"}
    assert {name for name in names if f"| `{name}` |" in text} == names


def test_the_example_is_the_held_out_articles() -> None:
    lines = (ASSETS / "udhr_subset.jsonl").read_text("utf8").splitlines()
    rows = {row["code"]: row for row in map(json.loads, lines)}
    parts = [
        "\n\n".join([rows[code]["name"], *(rows[code]["articles"][number - 1] for number in range(26, 31))])
        for code in LANGUAGES.split()
    ]
    example = (ASSETS / "example.txt").read_text("utf8")
    assert example == normalise("\n\n".join(parts))
    assert 30_000 <= len(example.encode()) <= 60_000
    assert len({rows[code]["script"] for code in LANGUAGES.split()}) == 13
