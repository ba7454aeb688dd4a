"""The replay of a search on a table of all configs, and what it prints and draws."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gdn2gen.device import named_device
from gdn2gen.tune import space

SCRIPT = Path(__file__).parents[2] / "scripts" / "search_value.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("search_value", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _rows(script: Any) -> list[dict[str, Any]]:
    """Times that follow from the knobs, with one config in five refused."""
    rows: list[dict[str, Any]] = []
    configs = space.valid_configs("rescan", script.PROBLEM, named_device("H200"), 32)
    for number, config in enumerate(configs):
        ms = 1.0 + abs(config.size("BV") - 64) / 64 + 0.3 * (config["num_warps"] != 4)
        ms += 0.1 * abs(config.size("num_stages") - 3) + 0.05 * (config["language"] == "triton")
        rows.append({"config": dict(config), "ms": None if number % 5 == 4 else ms})
    return rows


def test_the_search_asks_for_every_config_once(script: Any) -> None:
    rows = _rows(script)
    table = {script.Config.of("rescan", x["config"]): x["ms"] for x in rows}
    device = named_device("H200")
    times = list(script.searched(table, "rescan", 32, device, seed=1))
    assert len(times) == len(table)
    assert sorted(x or 0.0 for x in times) == sorted(x or 0.0 for x in table.values())


def test_what_a_replay_prints_and_draws(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.SEEDS = 4
    path = tmp_path / "table.json"
    rows = _rows(script)
    made = {"gpu": "NVIDIA H200", "stage": "rescan", "BT": 32, "rows": rows}
    path.write_text(json.dumps(made))
    script.replay(path)
    printed = capsys.readouterr().out
    needed = {name: int(n) for name, n in re.findall(r"(\w+): within 3% after (\d+)", printed)}
    assert 0 < needed["search"] <= needed["random"] <= len(rows)
    svg = ElementTree.parse(path.with_suffix(".svg")).getroot()
    assert len([x for x in svg.iter() if x.get("class") in ("line0", "line1")]) == 2


def test_best_so_far(script: Any) -> None:
    assert script.best_so_far([None, 2.0, 3.0, None, 1.0]) == [float("inf"), 2.0, 2.0, 2.0, 1.0]
