"""Tables of measured configs, and the replay of a search on one: what it prints and draws."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from script_module import load_script

from gdn2gen.base import outcome
from gdn2gen.base.device import named_device
from gdn2gen.base.outcome import Outcome
from gdn2gen.codegen.build import Resources
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import SHAPES
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.check import CheckResult
from gdn2gen.measure.timing import Timing
from gdn2gen.tuning import space
from gdn2gen.tuning.gpu.attempt import measure_config


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("search_value")


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
    made = {"gpu": "NVIDIA H200", "shape": "train4k", "stage": "rescan", "BT": 32, "rows": rows}
    path.write_text(json.dumps(made))
    script.replay(path)
    printed = capsys.readouterr().out
    needed = {name: int(n) for name, n in re.findall(r"(\w+): within 3% after (\d+)", printed)}
    assert 0 < needed["search"] <= needed["random"] <= len(rows)
    svg = ElementTree.parse(path.with_suffix(".svg")).getroot()
    assert len([x for x in svg.iter() if x.get("class") in ("line0", "line1", "line2")]) == 3


class Backend:
    """Gates and times as it was told."""

    device = named_device("H200")

    def __init__(self, gate: Outcome[CheckResult], timed: Outcome[dict[str, Timing]]) -> None:
        self.check = lambda recipe, full: gate
        self.time_stages = lambda recipe, stages, shape: timed


def test_a_config_is_measured_or_refused_with_the_reason() -> None:
    fits = Outcome(outcome.OK, Resources(100, 0, 1000, 128, 1.0))
    spills = Outcome(outcome.OK, Resources(255, 9999, 1000, 128, 1.0))
    right = Outcome(outcome.OK, CheckResult(True))
    wrong = Outcome(outcome.OK, CheckResult(False, {"dg": 0.4}, "dg is off"))
    timed = Outcome(outcome.OK, {"scan": Timing(2.0, 1.9, 2.1, 20)})
    died: Outcome[Any] = Outcome(outcome.CRASHED, detail="signal 6")
    base = Recipe.default(Problem(), "lean", 32)
    config = base.by_stage["scan"]
    for compiled, gate, times, ms, said in (
        (fits, right, timed, 2.0, ""),
        (Outcome(outcome.BUILD_ERROR, detail="ptxas died"), right, timed, None, "ptxas died"),
        (spills, right, timed, None, "spills 9999"),
        (fits, wrong, timed, None, "dg is off"),
        (fits, died, timed, None, "signal 6"),
        (fits, right, died, None, "signal 6"),
    ):
        backend: Any = Backend(gate, times)
        found = measure_config(backend, compiled, base, config, SHAPES["train4k"])
        assert found[0] == ms and said in found[1] and bool(said) == (ms is None)


def test_best_so_far(script: Any) -> None:
    assert script.best_so_far([None, 2.0, 3.0, None, 1.0]) == [float("inf"), 2.0, 2.0, 2.0, 1.0]
