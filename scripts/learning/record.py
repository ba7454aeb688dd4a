"""Times of a GPU in a file of docs/, a row for each thing that was timed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gdn2gen.base.files import replace_file

Row = dict[str, Any]


def recorded(folder: Path) -> list[Row]:
    """All rows of a folder, each with the GPU it is of."""
    rows: list[Row] = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        rows += [{**row, "gpu": document["gpu"]} for row in document["rows"]]
    return rows


def record(path: Path, gpu: str, rows: Sequence[Mapping[str, Any]], key: Sequence[str]) -> None:
    """Add rows to the file of a GPU; one that is equal in `key` gives way."""
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = {tuple(row.get(name) for name in key): row for row in (*known, *rows)}
    lines = ",\n".join(json.dumps(row) for row in merged.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, f'{{"gpu": {json.dumps(gpu)}, "rows": [\n{lines}\n]}}\n')
