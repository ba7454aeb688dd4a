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
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.timing import Timing
from gdn2gen.store import tuned_files
from gdn2gen.tuning.gpu import backend, jobs
from gdn2gen.tuning.gpu.jobs import RecipeTiming

H200 = named_device("H200")


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("recipe_times")


def made(script: Any, *words: str, shape: str = "long32k") -> Recipe:
    recipe: Recipe = script.recipe_of(Problem(), script.one_shape(shape), H200, words)
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


def test_a_variant_that_has_not_the_form_on_file_has_its_own(script: Any) -> None:
    """Of a serial scan one that keeps transitions has the language, and is parallel."""
    problem, shape = Problem("gated_delta_rule"), script.one_shape("long32k")
    found = script.recipe_of(problem, shape, H200, ["direct_blocks2_transitions"])
    scan = script.recipe_of(problem, shape, H200, ["direct"])["scan"]
    assert (scan["segments"], scan["language"]) == ("serial", "tilelang")
    kept = found["scan_transitions"]
    assert (kept["segments"], kept["language"], kept["BV"]) == ("parallel", "tilelang", 64)


def test_a_knob_alone_is_for_all_that_can_have_it(script: Any) -> None:
    found = made(script, "lean", "pdl=signal", shape="few8k")
    have = [x.stage for x in found.configs if x.get("pdl") == "signal"]
    assert "prepare" in have and found.plan.stages[-1] not in have
    assert found.independent() == made(script, "lean", shape="few8k")


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
        def __init__(self, device: Any) -> None:
            assert device == H200

        def compile(self, problem: Problem, config: Any) -> Future[None]:
            asked.append((problem, config))
            done: Future[None] = Future()
            done.set_result(None)
            return done

        def close(self) -> None:
            asked.append((Problem(), None))

    monkeypatch.setattr(backend, "WorkerBackend", Compilers)
    plain, other = made(script, "lean"), made(script, "lean", "prepare:chunks=8")
    script.compile_all([plain, other], H200, in_full=in_full)
    assert asked.pop() == (Problem(), None)
    own = [config for problem, config in asked if problem == plain.problem]
    assert {*own} == {*plain.configs, *other.configs} and len(own) == len({*own})
    in_states = [problem for problem, _ in asked if problem.final_state]
    assert len(in_states) == (len(own) if in_full else 0)


def test_what_is_filed_is_checked_in_full(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a search would: the faster of two stays, with the knobs that no search asks for."""
    errors = dict.fromkeys(("o", "dq", "dk", "dv", "dg", "db", "dw"), 3e-3)
    ok = SimpleNamespace(ok=True, errors=errors, reason="")
    monkeypatch.setattr(script, "present_device", lambda: H200)
    monkeypatch.setattr(jobs, "check_full", lambda recipe: ok)
    shape = script.one_shape("few8k")
    plain, other = (made(script, "lean", *x, shape="few8k") for x in ((), ("pdl=wait",)))

    def times(ms: float) -> list[RecipeTiming]:
        found = Timing(ms, ms, ms, 9)
        return [RecipeTiming(found, replace(found, median=ms + x), 300.0) for x in (1.0, 0.5)]

    assert "filed: " in script.file(plain, shape, times(2.0), tmp_path)
    assert "filed: " in script.file(other, shape, times(1.0), tmp_path)
    assert "no better" in script.file(plain, shape, times(2.0), tmp_path)
    read = tuned_files.load_tuned(tuned_files.tuned_path(tmp_path, "gdn2", H200))
    assert read is not None
    (entry,) = read.entries
    assert entry.configs == other.by_stage and entry.measured["forward_backward_ms"] == 1.5
    assert "pdl" in entry.configs["scan"]
    monkeypatch.setattr(
        jobs, "check_full", lambda recipe: SimpleNamespace(ok=False, errors={}, reason="dq")
    )
    assert script.file(plain, shape, times(0.1), tmp_path) == "wrong, dq"
