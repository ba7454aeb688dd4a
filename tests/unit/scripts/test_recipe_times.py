"""The script that times whole passes: what it makes of its words."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from script_module import load_script

from gdn2gen.base.device import named_device
from gdn2gen.base.errors import ConfigError
from gdn2gen.base.outcome import OK, Outcome
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import language_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure import compiling
from gdn2gen.measure.check import CheckResult
from gdn2gen.measure.timing import Timing
from gdn2gen.store import tuned_files
from gdn2gen.tuning.gpu import jobs
from gdn2gen.tuning.gpu.jobs import RecipeTiming

H200 = named_device("H200")


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("recipe_times")


def made(script: Any, *words: str, shape: str = "long32k") -> Recipe:
    recipe: Recipe = script.recipe_of(Problem(), script.the_shape(shape), H200, words)
    return recipe


def test_recipes_stand_between_signs(script: Any) -> None:
    words = ["lean", "pdl=wait", "+", "fast", "+", "+"]
    assert [*script.split(words)] == [["lean", "pdl=wait"], ["fast"]]


def test_a_level_is_what_is_on_file(script: Any) -> None:
    filed = made(script, "fast")
    assert filed.level == "fast" and filed == made(script, filed.plan.name)
    changed = made(script, "fast", "prepare:chunks=8")
    assert changed.distance(filed) == 1 and changed["prepare"]["chunks"] == 8


def test_variants_have_the_knobs_of_what_they_vary(script: Any) -> None:
    filed = made(script, "fast", shape="few8k")
    found, apart = (
        made(script, x, shape="few8k") for x in ("blocks2_states_transitions", "blocks2_states")
    )
    assert found.plan.name == "blocks2_states_transitions"
    for stage in apart.plan.stages:
        own = found.by_stage.get(stage) or found[f"{stage}_transitions"]
        assert all(apart[stage][name] == x for name, x in own.items()), (stage, filed)


def test_what_is_on_file_elsewhere(script: Any) -> None:
    assert made(script, "lean@train4k") == made(script, "lean", shape="train4k")
    small = script.recipe_of(
        Problem(K=64, V=64), script.the_shape("wide8k"), H200, ["lean@gdn2:128/wide8k"]
    )
    wide = made(script, "lean", shape="wide8k")
    assert small.plan == wide.plan and small.problem.K == 64
    assert all(x.get("BK", 64) <= 64 and x.get("BV", 64) <= 64 for x in small.configs)
    with pytest.raises(ConfigError, match="one shape"):
        made(script, "lean@train4k,wide8k")


def test_a_variant_that_has_not_the_form_on_file_has_its_own(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a serial scan one that keeps transitions has the language, and is parallel."""
    problem, shape = Problem("gated_delta_rule"), script.the_shape("train4k")
    filed = script.recipe_of(problem, shape, H200, ["direct"])
    serial = filed["scan"].replace(segments="serial", language="tilelang", BV=64, num_stages=3)
    monkeypatch.setattr(
        script, "find_recipe", lambda *_, **__: SimpleNamespace(recipe=filed.with_config(serial))
    )
    found = script.recipe_of(problem, shape, H200, ["direct_blocks2_transitions"])
    kept = found["scan_transitions"]
    assert (kept["segments"], kept["language"], kept["BV"]) == ("parallel", "tilelang", 64)


def test_a_knob_alone_is_for_all_that_can_have_it(script: Any) -> None:
    found = made(script, "lean", "pdl=signal", shape="few8k")
    have = [x.stage for x in found.configs if x.get("pdl") == "signal"]
    assert "prepare" in have and found.plan.stages[-1] not in have
    assert found.independent() == made(script, "lean", shape="few8k")


def test_what_is_on_file_for_other_head_dims(script: Any) -> None:
    """As it is where tiles are the same; else with tiles that fit."""
    shape = script.the_shape("train4k")
    for size, like, same in (((96, 96), 128, True), ((32, 32), 64, True), ((160, 160), 256, False)):
        problem = Problem(K=size[0], V=size[1])
        own, found = (
            script.recipe_of(x, shape, H200, [words])
            for x, words in (
                (replace(problem, K=like, V=like), "lean"),
                (problem, f"lean@gdn2:{like}/train4k"),
            )
        )
        assert found.problem == problem and found.plan == own.plan
        # in Triton no tiles are wider than 32 channels are
        pairs = zip(own.configs, found.configs, strict=True)
        assert all(a == b or language_of(a) == "triton" for a, b in pairs) == same
    words = ["whole_blocks2@gdn2:128/train4k", "grad_blocks2:chunks=4"]
    changed = script.recipe_of(Problem(K=96, V=96), shape, H200, words)
    assert changed["grad_blocks2"]["chunks"] == 4


def test_tiles_of_whole_head_dims_are_as_wide_as_their_steps_make_them(script: Any) -> None:
    problem, shape = Problem(K=160, V=160), script.the_shape("train4k")
    found = script.recipe_of(problem, shape, H200, ("lean", "tile_step=64"))
    filed = script.recipe_of(problem, shape, H200, ("lean",))
    for config in found.configs:
        own = filed[config.stage]
        assert config.get("tile_step") == (64 if language_of(own) == "tilelang" else None)
    assert filed["prepare"]["BK"] == 160 and found["prepare"]["BK"] == 192
    assert filed["grad_key"]["BV"] == 160 and found["grad_key"]["BV"] == 192


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lean", "grad_group:heads=8"), "has the stages"),
        (("lean", "prepare:chunks"), "name=value"),
        (("blocks2", "prepare:maxnreg=64"), "four do not fit"),
    ],
)
def test_other_words_are_refused(script: Any, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(script, *words)


@pytest.mark.parametrize("in_full", [False, True])
def test_each_kernel_is_compiled_once_before_any_check(
    script: Any, in_full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Problem, Any]] = []

    class Compilers:
        def __init__(self, slots: int) -> None:
            assert slots >= 1

        def submit(self, target: str, *given: Any, timeout: float) -> Future[Outcome[None]]:
            problem, stage, config, device = given
            assert target.endswith(":compile_ahead") and stage == config.stage and timeout > 0
            assert device == H200
            asked.append((problem, config))
            done: Future[Outcome[None]] = Future()
            done.set_result(Outcome(OK))
            return done

        def close(self) -> None:
            asked.append((Problem(), None))

    monkeypatch.setattr(compiling, "CompilePool", Compilers)
    plain, other = made(script, "lean"), made(script, "lean", "prepare:chunks=8")
    wanted = script.kernels_to_compile([plain, other], in_full=in_full)
    compiling.compile_side_by_side(wanted, H200)
    assert asked.pop() == (Problem(), None)
    own = [config for problem, config in asked if problem == plain.problem]
    assert {*own} == {*plain.configs, *other.configs} and len(own) == len({*own})
    in_states = [problem for problem, _ in asked if problem.final_state]
    assert len(in_states) == (len(own) if in_full else 0)


def test_the_faster_of_two_is_filed(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a search would: the faster of two stays, with the knobs that no search asks for."""
    errors = dict.fromkeys(("o", "dq", "dk", "dv", "dg", "db", "dw"), 3e-3)
    monkeypatch.setattr(script, "present_device", lambda: H200)
    shape = script.the_shape("few8k")
    plain, other = (made(script, "lean", *x, shape="few8k") for x in ((), ("pdl=wait",)))

    def candidate(recipe: Recipe, ms: float) -> Any:
        found = Timing(ms, ms, ms, 9)
        times = [RecipeTiming(found, replace(found, median=ms + x), 300.0) for x in (1.0, 0.5)]
        return script.Candidate("lean", recipe, CheckResult(True, errors), times)

    assert "filed: " in script.file(candidate(plain, 2.0), shape, tmp_path)
    assert "filed: " in script.file(candidate(other, 1.0), shape, tmp_path)
    assert "no better" in script.file(candidate(plain, 2.0), shape, tmp_path)
    read = tuned_files.load_tuned(tuned_files.tuned_path(tmp_path, "gdn2", H200))
    assert read is not None
    (entry,) = read.entries
    assert entry.configs == other.by_stage and entry.measured["forward_backward_ms"] == 1.5
    assert "pdl" in entry.configs["scan"]


@pytest.mark.parametrize("full", [False, True])
def test_what_is_wrong_is_neither_timed_nor_filed(
    script: Any, full: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is to be filed is checked in full."""
    monkeypatch.setattr(script, "present_device", lambda: H200)
    asked: list[str] = []

    def check(name: str) -> Any:
        def found(recipe: Recipe) -> CheckResult:
            asked.append(name)
            return CheckResult(recipe.level == "lean", {"dq": 3e-3}, "dq is off")

        return found

    for name in ("check_full", "check_quick"):
        monkeypatch.setattr(jobs, name, check(name))
    recipes = [([level], made(script, level, shape="few8k")) for level in ("lean", "fast")]
    found = [*script.checked_recipes(recipes, full)]
    assert [x.words for x in found] == ["lean"] and not found[0].times
    assert asked == ["check_full" if full else "check_quick"] * 2
    assert "lean: dq 3.0e-03" in (said := capsys.readouterr().out)
    assert "fast: wrong, dq is off" in said
