"""Beside a winner that refuses options of calls, a search files the best that serves all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_tuning import DEVICE, PROBLEM, SMALL, FakeBackend
from tilelang_configs import tilelang_config

from gdn2gen.family.shapes import Shape
from gdn2gen.kernels import plans
from gdn2gen.kernels.config import Config, language_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.timing import Timing
from gdn2gen.store import tuned_files
from gdn2gen.tuning.filing import entries_of
from gdn2gen.tuning.records.stored import Stored
from gdn2gen.tuning.run import tune
from gdn2gen.tuning.search.finalists import Finals
from gdn2gen.tuning.search.verdicts import Measured, Verdict, better, pick
from gdn2gen.tuning.views.progress import Progress

LEAN = Recipe.default(PROBLEM, "lean")
PARALLEL = LEAN.with_config(LEAN["scan"].replace(segments="parallel"))
BLOCKS = Recipe.default(PROBLEM, "blocks2")
FEW = BLOCKS.with_config(tilelang_config("grad_blocks2", PROBLEM))


def _finals(times: Mapping[Config, float], stored: tuple[Stored, ...] = ()) -> Finals:
    """After a search that took these times; every recipe passes the check."""
    trials: dict[str, Any] = {}
    for stage in {x.stage for x in times}:
        mine = sorted(((x, ms) for x, ms in times.items() if x.stage == stage), key=lambda x: x[1])
        trials[stage] = SimpleNamespace(ranked=lambda shape, mine=mine: mine)
    base: Callable[..., Recipe] = lambda plan, BT=None: Recipe.default(PROBLEM, plan, BT)  # noqa: E731
    search: Any = SimpleNamespace(problem=PROBLEM, trials={32: trials}, base=base)
    finals = Finals(search, stored)
    finals._warm = lambda recipes: None  # type: ignore[method-assign]
    finals._passes = lambda recipe: True  # type: ignore[method-assign]
    return finals


def _times() -> dict[Config, float]:
    """Blocks of two are the fastest, and those that serve every option slower than plan lean's,
    which is faster with one TileLang stage than all in Triton."""
    times = dict.fromkeys((*LEAN.configs, *BLOCKS.configs), 1.0)
    times[BLOCKS["grad_blocks2"]] = 3.0
    times[FEW["grad_blocks2"]] = 0.5
    times[tilelang_config("rescan", PROBLEM)] = 0.8
    return times


def test_the_plan_with_the_best_that_serves_all_is_decided_though_it_is_behind() -> None:
    times = _times()
    finals = _finals(times)
    assert not finals.is_behind(SMALL, "blocks2")
    assert not finals.is_behind(SMALL, "lean")  # whose stages take 6.8 ms for 5.5
    wide = LEAN.with_config(tilelang_config("rescan", PROBLEM))
    assert wide in finals.choose(SMALL, "lean", 2)
    # nothing of blocks is measured for calls with options, nor compiled: plan lean has better
    assert [x for x in finals.choose(SMALL, "blocks2") if x.serves_every_option] == [BLOCKS]
    assert wide in finals._likely(SMALL, "lean")
    # where they are faster than those of plan lean, it is behind in either
    times[BLOCKS["grad_blocks2"]] = 1.0
    assert _finals(times).is_behind(SMALL, "lean")


def test_one_plan_may_have_both() -> None:
    times = {**dict.fromkeys(LEAN.configs, 1.0), PARALLEL["scan"]: 0.5}
    times[LEAN["scan"].replace(num_stages=3)] = 0.9
    finals = _finals(times)
    chosen = finals.choose(SMALL, "lean", 2)
    # the default, the best in Triton, and the best of those that take packed sequences
    assert chosen[:3] == [LEAN, PARALLEL, LEAN.with_config(LEAN["scan"].replace(num_stages=3))]
    assert [x.serves_every_option for x in chosen[:3]] == [True, False, True]


def test_what_is_on_file_for_calls_with_options_stands_in_a_final() -> None:
    """However many others there are, and though its plan is behind by its stages."""
    at = tuple(SMALL.regime.key.items())
    scan = tilelang_config("scan", PROBLEM).replace(num_stages=4)
    wide = LEAN.with_config(scan)
    few = [
        LEAN.with_config(scan.replace(segments="parallel", max_segments=x)) for x in (64, 112, 132)
    ]
    finals = _finals(_times(), (*(Stored(at, x) for x in few), Stored(at, wide)))
    assert {wide, *few[:2]} <= {*finals.choose(SMALL, "lean", 2)}
    assert not finals.is_behind(SMALL, "lean")
    assert few[2] not in finals.choose(SMALL, "lean", 2)


def _measured(recipe: Recipe, ms: float) -> Measured:
    timing = Timing(ms, ms, ms, 10)
    return Measured(recipe, timing, timing, 0.0, {})


def test_a_tie_goes_to_what_serves_every_option() -> None:
    near, far = _measured(PARALLEL, 1.0), LEAN.with_config(LEAN["scan"].replace(num_stages=3))
    wide = far.with_config(LEAN["rescan"].replace(num_stages=3))
    winner, tied = pick([near, _measured(wide, 1.009)], LEAN)
    assert tied and winner.recipe == wide and wide.distance(LEAN) > PARALLEL.distance(LEAN)
    winner, tied = pick([near, _measured(wide, 1.02)], LEAN)
    assert not tied and winner.recipe == PARALLEL


@pytest.mark.parametrize(("lean_ms", "blocks_ms"), [(1.4, 1.5), (1.5, 1.4), (1.4, None)])
def test_of_a_levels_plans_the_fastest_that_serves_all_is_kept(
    lean_ms: float, blocks_ms: float | None
) -> None:
    default = _measured(LEAN, 2.0)
    wide = LEAN.with_config(tilelang_config("rescan", PROBLEM))
    of_blocks = None if blocks_ms is None else _measured(BLOCKS, blocks_ms)
    lean = Verdict(SMALL, "lean", _measured(PARALLEL, 1.3), default, False, default)
    lean = replace(lean, serving_all=_measured(wide, lean_ms))
    blocks = Verdict(SMALL, "lean", _measured(FEW, 1.0), default, False, of_blocks, of_blocks)
    best = better([lean, blocks])
    kept = best.serving_all
    assert best.winner.recipe == FEW and kept is not None
    assert kept.forward_backward.median == 1.4
    filed = entries_of(best)
    assert len({x.key for x in filed}) == len(filed) == (2 if kept.recipe == BLOCKS else 3)
    assert any(x.serves_every_option and x.plan == kept.recipe.plan.name for x in filed)
    # a winner that serves all is filed by itself, beside the best in Triton
    alone = better([replace(lean, winner=_measured(wide, 0.9)), blocks])
    assert alone.serving_all is None
    assert [x.needs_triton_alone for x in entries_of(alone)] == [False, True]


@pytest.fixture
def few_plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A search of one plan, in a cache of its own."""
    few = {level: names[:1] for level, names in plans.PLANS_OF.items()}
    monkeypatch.setattr(plans, "PLANS_OF", few)
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("GDN2GEN_TUNED_DIR", raising=False)
    monkeypatch.setattr("gdn2gen.tuning.records.stored.packaged_tuned_dir", lambda: tmp_path)


@pytest.mark.usefixtures("few_plans")
def test_a_search_files_it_after_the_same_checks(tmp_path: Path) -> None:
    """Serial scans in TileLang fail the full check: another one is found in their place."""

    def verdict(config: Config) -> str | None:
        serial = config.get("segments") == "serial" and language_of(config) == "tilelang"
        return "wrong in full" if serial and config.stage == "scan" else None

    def speed(config: Config, shape: Shape) -> float:
        if config.get("segments") == "parallel":
            return 0.3
        return 0.6 if language_of(config) == "tilelang" else 1.0

    backend = FakeBackend(verdict, speed)
    report = tune(
        PROBLEM,
        [SMALL],
        DEVICE,
        budget_minutes=2.5,
        out_dir=tmp_path / "tuned",
        levels=("lean",),
        backend=backend,
        clock=backend.clock,
        progress=Progress(),
    )
    file = tuned_files.read_tuned(report.path)
    assert file is not None
    found = {(x.needs_triton_alone, x.serves_every_option): x for x in file.entries}
    assert {*found} == {(False, False), (False, True), (True, False)}
    wide = found[False, True]
    assert language_of(wide.configs["scan"]) == "triton"
    assert wide.configs["reverse_scan"]["segments"] == "serial"
    for entry in file.entries:
        assert (entry.recipe_for(PROBLEM), True) in backend.checked
        assert entry.gate and entry.measured["n"]
    # the next search begins with it, and ends with nothing slower
    again = FakeBackend(verdict, speed)
    tune(
        PROBLEM,
        [SMALL],
        DEVICE,
        budget_minutes=0.3,
        out_dir=tmp_path / "tuned",
        levels=("lean",),
        backend=again,
        clock=again.clock,
        progress=Progress(),
        storage=tmp_path / "other.journal",
    )
    assert (wide.recipe_for(PROBLEM), True) in again.checked
    assert tuned_files.read_tuned(report.path) == file
