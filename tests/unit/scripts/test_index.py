"""scripts/README.md names every script, and no other."""

from __future__ import annotations

import re

from source_tree import ROOT

FOLDER = ROOT / "scripts"


def test_every_script_has_its_row() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (FOLDER / "README.md").read_text(), flags=re.M)
    named = [name.rstrip("/") for row in rows for name in re.findall(r"`(.+?)`", row)]
    there = [
        path.name for path in FOLDER.iterdir()
        if path.suffix in (".py", ".c") or (path / "__init__.py").exists()
    ]  # fmt: skip
    assert sorted(named) == sorted(there)
