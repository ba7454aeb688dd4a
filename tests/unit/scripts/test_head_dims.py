"""What a head costs by its head dim: the tables and the chart; measuring needs a GPU."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from xml.etree import ElementTree

import pytest
from script_module import load_script

from gdn2gen.base import outcome
from gdn2gen.base.device import named_device
from gdn2gen.base.outcome import Outcome
from gdn2gen.codegen.build import Resources
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.measure.check import CheckResult
from gdn2gen.measure.timing import Timing
from gdn2gen.measure.turn import in_turn
from gdn2gen.store.dispatch import find_recipe
from gdn2gen.tuning.gpu.jobs import RecipeTiming

head_dims = load_script("head_dims")
WITH = {"toolchain": {"triton": "3.6.0"}}
TIMES = [
    {"K": 64, "V": 64, "source": "exact", "ours": [0.2, 0.8], "fla": None, **WITH},
    {"K": 96, "V": 96, "source": "exact", "ours": [0.28, 1.23], "fla": [1.12, 4.92]},
    {"K": 128, "V": 64, "source": "default", "ours": [0.30, 1.42], "fla": None},
]
TRANSFER = [
    {"K": 96, "V": 96, "level": "lean", "tuned": 1.23, "transferred": None, "default": 2.1}
    | {"from": "K=128 V=128"},
    {"K": 192, "V": 192, "level": "lean", "tuned": 2.0, "transferred": 2.5, "default": 5.0}
    | {"from": "K=256 V=256"},
]


def test_tables_and_chart(tmp_path: Path) -> None:
    path, page = tmp_path / "gpu.json", tmp_path / "page.md"
    about = {"gpu": "NVIDIA H200", "shape": "train4k"}
    path.write_text(json.dumps({**about, "times": TIMES, "transfer": TRANSFER}))
    page.write_text("before\n<!-- gpu:begin -->\n<!-- gpu:end -->\nafter\n")
    head_dims.plot(path, page)
    shown = page.read_text()
    assert shown.startswith("before\n") and shown.endswith("after\n")
    # nanoseconds for each of 4 * 4096 * 16 tokens and heads
    wanted = "| 96, 96 | exact | 0.280 | 1.120 | 4.00 | 1.068 | 1.230 | 4.920 | 4.00 | 4.692 |"
    assert wanted in shown
    assert "| 128, 64 | default | 0.300 | - | - | 1.144 | 1.420 | - | - | 5.417 |" in shown
    assert "| 96, 96 | lean | 1.230 | none | - | K=128 V=128 | 2.100 |" in shown
    assert "| 192, 192 | lean | 2.000 | 2.500 | 1.25 | K=256 V=256 | 5.000 |" in shown
    assert "NVIDIA H200, train4k; triton 3.6.0." in shown
    svg = ElementTree.fromstring(path.with_suffix(".svg").read_text())
    drawn = [x.get("class") for x in svg.iter() if x.tag.endswith("path")]
    assert [x for x in drawn if x != "grid"] == ["fla forward", "fla", "ours forward", "ours"]
    # squares alone
    assert len([x for x in svg.iter() if "dot" in x.get("class", "")]) == 6


def test_sizes_are_read_as_the_commands_read_them() -> None:
    assert (head_dims.problem_of("96").K, head_dims.problem_of("96").V) == (96, 96)
    assert (head_dims.problem_of("256,512").K, head_dims.problem_of("256,512").V) == (256, 512)


def test_what_breaks_one_side_breaks_a_process_of_its_own() -> None:
    assert head_dims.in_a_process("problem_of", "96").get() == head_dims.problem_of("96")
    failed = head_dims.in_a_process("times_of", "ours", head_dims.problem_of("96"))
    assert not failed.ok and "GPU" in failed.reason.upper().replace("CUDA", "GPU")


def test_sizes_of_ours_are_timed_when_all_others_are_ready_or_have_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What does not run keeps no other from its turn."""
    kept: dict[str, Outcome[list[float]]] = {}

    def times(_: str, name: str, problem: Problem, turn: str) -> Outcome[list[float]]:
        assert name == "ours"
        if problem.K == 48:
            return Outcome(outcome.ERROR, detail="no such size")
        with in_turn(Path(turn)):
            ready = Path(f"{turn}.ready").read_text().splitlines()
        return Outcome(outcome.OK, [float(problem.K), float(len(ready))])

    monkeypatch.setattr(head_dims, "in_a_process", times)
    monkeypatch.setattr(head_dims, "MOST_OF_OURS", 3)
    monkeypatch.setattr(head_dims, "_keep", lambda size, found: kept.update({size: found["ours"]}))
    head_dims.measure_ours(["64", "48", "96", "128"])
    assert not kept["48"].ok
    assert [kept[x].get() for x in ("64", "96", "128")] == [[64.0, 2.0], [96.0, 2.0], [128.0, 1.0]]


@pytest.mark.parametrize("level", ["lean", "fast"])
def test_of_the_nearest_head_dims_is_transferred_what_is_served_there(
    monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """Of 192 the fastest have configs that K = 96 has not beside V = 200, but others of theirs."""
    monkeypatch.setattr(head_dims, "_device", lambda: named_device("NVIDIA H200"))
    problem = head_dims.problem_of("96,200")
    near, regime = Problem(K=192, V=192), head_dims.SHAPE.regime
    fastest = find_recipe(near, regime, head_dims._device(), level=level)
    assert any(why_invalid(x, problem, "sm_90") for x in fastest.recipe.configs)
    recipes, origin = head_dims._recipes_of(problem, level)
    assert origin == "K=192 V=192"
    assert [x["language"] for x in recipes["transferred"].configs].count("tilelang") >= 4


class Backend:
    """Every compile and check comes out well; times are by how often it was asked."""

    def __init__(self, _: object) -> None:
        self.compiled: list[tuple[Problem, Config]] = []
        self.checked: list[Recipe] = []
        self.timed: list[Recipe] = []
        self.closed = False

    def compile(self, problem: Problem, config: Config) -> Future[Outcome[Resources]]:
        self.compiled.append((problem, config))
        future: Future[Outcome[Resources]] = Future()
        spilled = 9999 if config.get("BV") == 16 else 0
        future.set_result(Outcome(outcome.OK, Resources(128, spilled, 1024, 128, 1.0)))
        return future

    def check(self, recipe: Recipe, *, full: bool) -> Outcome[CheckResult]:
        assert not full
        self.checked.append(recipe)
        return Outcome(outcome.OK, CheckResult(True))

    def time_recipe(
        self, recipe: Recipe, shape: object, *, with_peak: bool
    ) -> Outcome[RecipeTiming]:
        self.timed.append(recipe)
        ms = Timing.of([float(len(self.timed))])
        return Outcome(outcome.OK, RecipeTiming(ms, ms, 0.0))

    def close(self) -> None:
        self.closed = True


def test_transfer_compiles_a_config_once_and_checks_what_never_ran(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, rows = Backend(None), []
    monkeypatch.setattr("gdn2gen.tuning.gpu.backend.WorkerBackend", lambda _: backend)
    monkeypatch.setattr(head_dims, "_device", lambda: named_device("NVIDIA H200"))
    monkeypatch.setattr(head_dims, "_add", lambda _, row: rows.append(row))
    head_dims.transfer(["192", "96"])
    assert [(x["K"], x["level"]) for x in rows] == [
        (192, "lean"),
        (192, "fast"),
        (96, "lean"),
        (96, "fast"),
    ]
    # the H200's own file has both, and others beside them
    assert all(x["tuned"] and x["transferred"] and x["default"] and x["from"] for x in rows)
    assert len(backend.compiled) == len(set(backend.compiled)) and backend.closed
    assert len(backend.timed) == 12 and backend.checked == backend.timed[1::3]


def test_transfer_says_none_of_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend, rows = Backend(None), []
    monkeypatch.setattr("gdn2gen.tuning.gpu.backend.WorkerBackend", lambda _: backend)
    monkeypatch.setattr(head_dims, "_device", lambda: named_device("NVIDIA H200"))
    monkeypatch.setattr(head_dims, "_add", lambda _, row: rows.append(row))
    recipe = Recipe.default(head_dims.problem_of("96"), "lean", arch="sm_90")
    spilling = recipe.with_config(recipe["scan"].replace(BV=16))
    given = {"tuned": None, "transferred": spilling, "default": recipe}
    monkeypatch.setattr(head_dims, "_recipes_of", lambda *_: (given, "K=128 V=128"))
    head_dims.transfer(["96"])
    assert [(x["tuned"], x["transferred"], x["default"]) for x in rows] == [
        (None, None, 1.0),
        (None, None, 2.0),
    ]
    assert "refused: scan: resources: spills 9999 bytes" in capsys.readouterr().out
    assert not backend.checked
