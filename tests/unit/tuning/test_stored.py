"""What a search takes from tuned files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gdn2gen.base.device import Device, named_device
from gdn2gen.codegen.digests import templates_of
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config, default_config, default_of
from gdn2gen.kernels.limits import Place
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.recipe import Recipe, fitted
from gdn2gen.kernels.stages import STAGES
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.store import tuned_files
from gdn2gen.store._claims import always_checked
from gdn2gen.tuning.records.stored import Stored, lent_configs, stored_recipes
from gdn2gen.tuning.search.finalists import Finals

H200 = named_device("H200")
PROBLEM = Problem(K=64, V=64)
SHAPES = [Shape(f"heads{heads}", 1, 1024, heads) for heads in (1, 2, 4, 8, 16, 32, 64, 128)]


def numbered(number: int, plan: str = "lean") -> Recipe:
    """Told from others, and from the default, by its scan."""
    base = Recipe.default(PROBLEM, plan)
    knobs = {"BV": (16, 32, 64)[number % 3], "num_stages": 1 + number // 3, "num_warps": 8}
    return base.with_config(base["scan"].replace(**knobs))


def file_at(path: Path, shapes: list[Shape], **changes: Any) -> None:
    entries = [
        tuned_files.Entry(
            problem_key=PROBLEM.key,
            regime_key=shape.regime.key,
            level="lean",
            plan="lean",
            configs=numbered(number).by_stage,
            templates=templates_of(numbered(number)) | changes,
            measured={"forward_ms": 0.5, "forward_backward_ms": 2.0},
            gate=dict.fromkeys(always_checked("gdn2"), 4e-3),
            provenance="measured",
        )
        for number, shape in enumerate(shapes)
    ]
    tuned_files.merge_entries(path, tuned_files.metadata_for(H200, {}, "a test"), entries)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("gdn2gen.tuning.records.stored.packaged_tuned_dir", lambda: tmp_path)
    return tuned_files.tuned_path(tmp_path, "gdn2", H200)


@pytest.mark.parametrize("changes", [{}, {"scan": "0" * 16}], ids=["fitting", "stale"])
def test_recipes_of_all_searched_shapes_come_first(path: Path, changes: dict[str, str]) -> None:
    file_at(path, SHAPES, **changes)
    wanted = [SHAPES[7], SHAPES[0], SHAPES[6], SHAPES[1], SHAPES[4]]
    found = list(stored_recipes(PROBLEM, ["lean"], wanted, path, H200))
    exact, others = found[:5], found[5:]
    assert {dict(x.regime)["heads"] for x in exact} == {shape.H for shape in wanted}
    assert {dict(x.regime)["heads"] for x in others} == {4, 8, 32}  # four at most
    for x in found:
        number = [shape.H for shape in SHAPES].index(dict(x.regime)["heads"])
        assert x.recipe == numbered(number)


def test_recipes_of_other_plans_and_problems_are_left_out(path: Path) -> None:
    file_at(path, SHAPES[:2])
    assert not list(stored_recipes(PROBLEM, ["fast", "states"], SHAPES, path, H200))
    assert not list(stored_recipes(replace(PROBLEM, dtype="fp16"), ["lean"], SHAPES, path, H200))
    assert not list(stored_recipes(PROBLEM, ["lean"], SHAPES, path, named_device("A100")))


def _base(plan: str, BT: int | None = None) -> Recipe:
    """Where a search begins."""
    return Recipe.default(PROBLEM, plan, BT)


def test_a_final_has_the_recipe_on_file_of_its_own_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = [
        Stored(tuple(shape.regime.key.items()), numbered(number))
        for number, shape in enumerate(SHAPES)
    ]
    search: Any = SimpleNamespace(problem=PROBLEM, trials={}, base=_base)
    finals = Finals(search, stored)
    monkeypatch.setattr(finals, "_warm", lambda candidates: None)
    monkeypatch.setattr(finals, "_passes", lambda recipe: True)
    for number in (0, 5, 7):
        chosen = finals.choose(SHAPES[number], "lean")
        assert chosen == [Recipe.default(PROBLEM, "lean"), numbered(number)]
    assert finals.choose(SHAPES[5], "fast") == [Recipe.default(PROBLEM, "fast")]


def test_ones_own_recipe_on_file_comes_before_any_of_another_gate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many those are, and though the user's file, which is read first, has none but them.
    A final would file what is slower than what it had."""
    regime = tuple(SHAPES[0].regime.key.items())
    stored = [Stored(regime, numbered(x), own=x == 5) for x in range(6)]
    search: Any = SimpleNamespace(problem=PROBLEM, trials={}, base=_base)
    finals = Finals(search, stored)
    monkeypatch.setattr(finals, "_warm", lambda candidates: None)
    monkeypatch.setattr(finals, "_passes", lambda recipe: True)
    assert numbered(5) in finals.choose(SHAPES[0], "lean")


def test_what_is_on_file_stands_in_a_final_however_little_time_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside the default and the recipe that won for the level's other plan."""
    stored = [Stored(tuple(SHAPES[0].regime.key.items()), numbered(0))]
    search: Any = SimpleNamespace(problem=PROBLEM, trials={}, base=_base)
    finals = Finals(search, stored)
    monkeypatch.setattr(finals, "_warm", lambda candidates: None)
    monkeypatch.setattr(finals, "_passes", lambda recipe: True)
    monkeypatch.setattr(finals, "_carried", lambda shape, plan: [numbered(1), numbered(2)])
    default = Recipe.default(PROBLEM, "lean")
    assert finals.choose(SHAPES[0], "lean", 2) == [default, numbered(0), numbered(1)]
    assert finals.choose(SHAPES[1], "lean", 2) == [default, numbered(1)]


def test_a_plan_that_is_on_file_is_decided_though_its_stages_look_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By few trials: else a stale entry would give way to the level's slower plan."""
    on_file = Recipe.default(PROBLEM, "states")
    stored = [Stored(tuple(SHAPES[0].regime.key.items()), on_file)]
    search: Any = SimpleNamespace(problem=PROBLEM, trials={})
    finals = Finals(search, stored)
    sums = {"fast": 1.0, "states": 1.5}
    monkeypatch.setattr(finals._sums, "least", lambda shape, plan, kept=None: sums.get(plan, 2.0))
    assert not finals.is_behind(SHAPES[0], "states")
    assert finals.is_behind(SHAPES[1], "states")


def test_another_gate_lends_its_recipes_after_ones_own(path: Path) -> None:
    """They are what a call runs until the search has filed something better."""
    file_at(path, SHAPES[:1])
    gated = replace(PROBLEM, gate="softplus", gate_dtype="bf16", has_A_log=True)
    (lent,) = stored_recipes(gated, ["lean"], SHAPES[:1], path, H200)
    assert lent.recipe == Recipe.of(gated, "lean", numbered(0).by_stage)
    assert lent.is_for(SHAPES[0], "lean")
    own = replace(tuned_files.read_tuned(path).entries[0], problem_key=gated.key)  # type: ignore[union-attr]
    tuned_files.merge_entries(
        path,
        tuned_files.metadata_for(H200, {}, "a test"),
        [replace(own, configs=numbered(1).by_stage)],
    )
    first, second = stored_recipes(gated, ["lean"], SHAPES[:1], path, H200)
    assert first.recipe["scan"] == numbered(1)["scan"] != second.recipe["scan"]
    assert (lent.own, first.own, second.own) == (False, True, False)
    bounded = replace(gated, gate="sigmoid", bound=2)
    assert [x.recipe["scan"] for x in stored_recipes(bounded, ["lean"], SHAPES[:1], path, H200)]


def test_another_member_lends_its_recipes_after_ones_own(path: Path) -> None:
    """Their kernels are of the same templates, and so what is fast is nearly the same."""
    file_at(path, SHAPES[:2])
    kda = replace(PROBLEM, op="kda")
    own = tuned_files.tuned_path(path.parent.parent, "kda", H200)
    lent = [*stored_recipes(kda, ["lean"], SHAPES[:2], own, H200)]
    assert [x.recipe for x in lent] == [
        Recipe.of(kda, "lean", numbered(x).by_stage) for x in (0, 1)
    ]


def test_a_member_of_other_plans_lends_configs_of_the_stages_that_both_have(path: Path) -> None:
    """What is fast for KDA's grad_key is so for GLA's, whose plans have other names."""
    file_at(path, SHAPES[:2])
    gla = Problem("gla", l2norm=False)
    own = tuned_files.tuned_path(path.parent.parent, "gla", H200)

    def lent(problem: Problem, plan: str, device: Device = H200) -> list[Config]:
        stages = PLANS[plan].stages
        return [*lent_configs(problem, [plan], stages, SHAPES[:2], own, device)]

    shared = set(PLANS["linear"].stages) & set(PLANS["lean"].stages)
    expected = {fitted(numbered(x)[name], gla, "sm_90") for x in (0, 1) for name in shared}
    found = lent(gla, "linear")
    assert set(found) == expected and len(found) == len(expected)
    assert all(why_invalid(x, gla, "sm_90") is None for x in found)
    assert not lent(replace(gla, dtype="fp16"), "linear")
    assert not lent(gla, "linear", named_device("A100"))
    assert not lent(PROBLEM, "lean")  # which are recipes of its own plan


def test_the_nearest_head_dims_lend_their_recipes_with_tiles_that_fit(path: Path) -> None:
    """Only these, and those of the problem's own alone where there are any."""
    file_at(path, SHAPES[2:4])
    wide = Recipe.default(Problem(K=256, V=256), "lean", 16)
    shape = SHAPES[0]
    entry = tuned_files.Entry(
        problem_key=wide.problem.key,
        regime_key=shape.regime.key,
        level="lean",
        plan="lean",
        configs=wide.by_stage,
        templates=templates_of(wide),
        measured={"forward_ms": 0.5, "forward_backward_ms": 2.0},
        gate=dict.fromkeys(always_checked("gdn2"), 4e-3),
        provenance="measured",
    )
    tuned_files.merge_entries(path, tuned_files.metadata_for(H200, {}, "a test"), [entry])

    def lent(problem: Problem) -> list[Recipe]:
        return [x.recipe for x in stored_recipes(problem, ["lean"], [shape], path, H200)]

    assert lent(PROBLEM) == [numbered(0), numbered(1)]
    small = replace(PROBLEM, K=48, V=40)
    assert lent(small) == [numbered(x).fitted(small, "sm_90") for x in (0, 1)]
    assert all(why_invalid(config, small) is None for x in lent(small) for config in x.configs)
    near = replace(PROBLEM, K=192, V=192)
    (found,) = lent(near)
    assert found.BT == 16 and found["scan"] == wide["scan"]


def test_a_stage_whose_form_does_not_serve_a_size_takes_its_default() -> None:
    tuned = Recipe.default(PROBLEM)
    tuned = tuned.with_config(
        tuned["scan"].replace(language="tilelang", num_stages=4),
        tuned["grad_key"].replace(BK=64, num_stages=3),
    )
    odd = replace(PROBLEM, K=40, V=24)
    found = tuned.fitted(odd)
    assert found["scan"] == default_config("scan", odd)
    assert found["grad_key"] == tuned["grad_key"].replace(BV=32)
    assert tuned.fitted(PROBLEM) == tuned


def test_a_tile_of_two_head_dims_fits_both() -> None:
    """Rows of a parallel scan's program are of values, and of the transition."""
    scan = next(x for x in STAGES["scan"].forms if (x.language, x.name) == ("triton", "parallel"))
    wide = default_of("scan", scan, Place(PROBLEM, 32)).replace(BV=64)
    tuned = Recipe.default(PROBLEM).with_config(wide)
    for size in ((64, 32), (24, 96)):
        problem = replace(PROBLEM, K=size[0], V=size[1])
        assert tuned.fitted(problem)["scan"] == wide.replace(BV=32)
        default = default_of("scan", scan, Place(problem, 32))
        assert default["BV"] == 32 and why_invalid(default, problem) is None
