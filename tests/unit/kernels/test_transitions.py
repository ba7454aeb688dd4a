"""Plans that keep the transitions of segments: what they serve, save, and are tried for."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gdn2gen.base.device import named_device
from gdn2gen.codegen.package import package_source
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.family.registry import OPS, RECURRENCES
from gdn2gen.family.shapes import parse_shapes
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.plans import PLANS, keeps_least, level_of
from gdn2gen.kernels.recipe import Recipe, has_use, is_served, takes_segments
from gdn2gen.kernels.schedule import saved_by, schedule
from gdn2gen.kernels.stages import STAGES
from gdn2gen.measure.timing import call_of
from gdn2gen.runtime.runner import Runner
from gdn2gen.store.dispatch import find_recipe
from gdn2gen.tuning import space

NAMES = ("blocks2_transitions", "blocks2_states_transitions")
DIRECT = tuple(f"direct_{x}" for x in NAMES)
SERVED = [
    *((op, plan) for op in ("gdn2", "kda") for plan in NAMES),
    *((op, plan) for op in ("gated_delta_rule", "delta_rule") for plan in DIRECT),
]
H200 = named_device("H200")


def test_they_are_of_two_members_each_and_no_level_s_first() -> None:
    assert tuple(x for x in PLANS if "transitions" in x) == (*NAMES, *DIRECT)
    for op in OPS:
        plans = {*RECURRENCES[op].plans}
        assert {*NAMES, *DIRECT} & plans == {plan for served, plan in SERVED if served == op}
    for names in (NAMES, DIRECT):
        assert [level_of(x) for x in names] == ["lean", "fast"]
        assert [keeps_least(PLANS[x]) for x in names] == [True, False]


@pytest.mark.parametrize(("op", "plan"), SERVED)
def test_they_keep_the_transitions_beside_what_is_kept_instead(op: str, plan: str) -> None:
    problem = Problem(op, initial_state=True, final_state=True)
    recipe = Recipe.default(problem, plan, arch="sm_90")
    apart = Recipe.default(problem, PLANS[plan].instead, arch="sm_90")
    own = {x.name for x in saved_by(recipe)}
    assert own == {x.name for x in saved_by(apart)} | {"M_seg"}
    reverse = "reverse_scan_blocks2_transitions"
    step = next(x for x in schedule(recipe, recipe.plan.backward, ()) if x.module == reverse)
    assert "M_seg" in step.tensors and "M_seg" not in {x.name for x in step.buffers}


@pytest.mark.parametrize(("op", "plan"), [SERVED[0], SERVED[1], SERVED[4], SERVED[5]])
def test_the_backward_has_the_segments_of_the_forward(op: str, plan: str) -> None:
    recipe = Recipe.default(Problem(op), plan, arch="sm_90")
    scan = recipe.plan.forward[-1]
    recipe = recipe.with_config(recipe[scan].replace(max_segments=64))
    reverse = "reverse_scan_blocks2_transitions"
    assert takes_segments(reverse) and not takes_segments("reverse_scan_blocks2")
    assert recipe.max_segments(reverse) == recipe.saved_segments == 64
    assert Runner(recipe).max_segments(reverse) == 64
    assert (
        Runner(recipe, 112).max_segments(reverse) == Runner(recipe, 112).max_segments(scan) == 112
    )
    rescans = [x for x in STAGES if x.startswith("rescan")]
    assert {x for x in STAGES if takes_segments(x)} == {*rescans, reverse}


@pytest.mark.parametrize(("op", "names"), [("gdn2", NAMES), ("delta_rule", DIRECT)])
def test_others_run_what_keeps_none(op: str, names: tuple[str, ...]) -> None:
    plain = Problem(op)
    for changes in ({"varlen": True}, {"K": 96}, {"V": 256}):
        problem = replace(plain, **changes)
        assert not any(is_served(x, problem, "sm_90") for x in names)
    for plan in names:
        recipe = Recipe.default(plain, plan, arch="sm_90")
        assert is_served(plan, plain, "sm_90") and is_served(plan, plain, "sm_80")
        assert recipe.fitted(replace(plain, K=96), "sm_90").plan.name == PLANS[plan].instead
        assert recipe.everywhere().plan.name == PLANS[plan].instead
        assert recipe.keeping().plan.name == PLANS[plan].instead
        assert not recipe.serves_every_option


def test_a_search_tries_them_where_sequences_have_three_segments() -> None:
    shapes = {x: parse_shapes(x)[0].regime for x in ("train4k", "few8k", "long16k", "long32k")}
    for plan in (*NAMES, *DIRECT):
        found = [name for name, regime in shapes.items() if has_use(plan, regime)]
        assert found == ["few8k", "long16k", "long32k"]
        assert not has_use(plan, Regime(tokens=2048, sequences=1, heads=4))
    whole = {x for x in PLANS if x.startswith("whole")}
    others = [x for x in PLANS if "transitions" not in x and x not in whole]
    assert all(has_use(x, y) for x in others for y in shapes.values())
    # one chain a sequence, where others have segments
    for plan in whole:
        assert [name for name, regime in shapes.items() if has_use(plan, regime)] == ["train4k"]
        assert has_use(plan, Regime(2048, 1, 4)) and has_use(plan, Regime(8192, 1, 64))


def test_a_search_starts_with_programs_of_128_rows() -> None:
    """One wave of them at long32k, where reverse_scan_blocks2 folds two."""
    for op in ("gdn2", "gated_delta_rule"):
        starts = space.starts("reverse_scan_blocks2_transitions", Problem(op), H200, 32)
        (wide,) = (x for x in starts if x["language"] == "tilelang")
        assert (wide["BV"], wide["num_stages"]) == (128, 3)
        assert "max_segments" not in wide


def test_no_call_runs_them_unless_an_entry_says_so() -> None:
    for op in ("gdn2", "kda", "gated_delta_rule", "delta_rule"):
        for level in ("lean", "fast"):
            found = find_recipe(Problem(op, K=64, V=128), Regime(32768, 1, 16), H200, level=level)
            assert "transitions" not in found.recipe.plan.name


@pytest.mark.parametrize(
    ("shape", "most", "segments"),
    [
        ("few8k", 132, (8, 32)),
        ("few8k", 264, (16, 16)),
        ("few8k", 64, (8, 32)),
        ("long32k", 132, (8, 128)),
        ("long32k", 264, (16, 64)),
        ("1x2048x4", 132, (2, 32)),
        ("1x2048x4", 264, (4, 16)),
        ("train4k", 264, (4, 32)),
    ],
)
def test_more_segments_than_usual_may_be_shorter(
    shape: str, most: int, segments: tuple[int, int]
) -> None:
    call = call_of(Problem(), parse_shapes(shape)[0], torch.device("cpu"))
    assert call.segments(32, most) == segments


def test_a_package_cuts_sequences_as_calls_do() -> None:
    recipe = Recipe.default(Problem(), "blocks2_states_transitions", arch="sm_90")
    scan = recipe.plan.forward[-1]
    for most in (132, 264):
        source = package_source(recipe.with_config(recipe[scan].replace(max_segments=most)), "-")
        (text,) = re.findall(r"def _segments\(.*?\n\n\n", source, re.DOTALL)
        own: dict[str, Any] = {"triton": SimpleNamespace(cdiv=lambda x, y: -(-x // y)), "BT": 32}
        exec(text, own)
        assert f"_segments(T, N * HV, {most})" in source
        for shape in ("few8k", "long32k", "1x2048x4", "1x40x4"):
            sizes = parse_shapes(shape)[0]
            call = call_of(Problem(), sizes, torch.device("cpu"))
            assert own["_segments"](sizes.T, sizes.B * sizes.H, most) == call.segments(32, most)


def test_a_search_times_a_scan_with_all_that_runs_its_segments() -> None:
    def moved(stage: str, plan: str, **knobs: int) -> tuple[str, ...]:
        config = default_config(stage, Problem()).replace(**knobs)
        return space.stages_moved(config, plan)

    reverse = "reverse_scan_blocks2_transitions"
    assert moved("scan", "lean", max_segments=264) == ("rescan",)
    assert moved("scan", "blocks2", max_segments=64) == ("rescan_blocks2",)
    own = moved("scan_transitions", NAMES[0], max_segments=264)
    assert own == ("rescan_blocks2", reverse)
    assert moved("scan_blocks2_transitions", NAMES[1], max_segments=64) == (reverse,)
    assert moved("scan_blocks2", "blocks2_states", max_segments=64) == ()
    assert moved("reverse_scan", "lean", max_segments=64) == moved("scan", "lean") == ()
    assert moved("rescan_blocks2", "blocks2") == moved(reverse, NAMES[1]) == ()
