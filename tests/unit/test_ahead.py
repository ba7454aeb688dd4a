"""TileLang programs compiled by threads while other stages are launched."""

from __future__ import annotations

import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gdn2gen import launch
from gdn2gen.ahead import launch_when_compiled
from gdn2gen.config import default_config
from gdn2gen.dispatch import Recipe, default_recipe
from gdn2gen.knobs import cuda_compiler
from gdn2gen.problem import Problem


def _module(compiled: Any) -> ModuleType:
    module: Any = ModuleType("made-up")
    module.compiled = compiled
    return module


def test_programs_compile_side_by_side_and_launches_wait() -> None:
    both = threading.Barrier(2, timeout=20)  # neither passes before the other one runs, too
    launched: list[int] = []
    launches = [
        launch_when_compiled(_module(both.wait), lambda x: launched.append(x)) for _ in range(2)
    ]
    for number, awaited in enumerate(launches):
        awaited(x=number)
        awaited(x=number)
    assert launched == [0, 0, 1, 1]


def test_a_module_is_compiled_once() -> None:
    calls: list[None] = []
    module = _module(lambda: calls.append(None))
    for _ in range(3):
        launch_when_compiled(module, lambda: None)()
    assert len(calls) == 1


def test_what_the_compiler_raises_comes_with_the_launch() -> None:
    def broken() -> None:
        raise RuntimeError("no such instruction")

    awaited = launch_when_compiled(_module(broken), lambda: pytest.fail("launched"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such instruction"):
            awaited()


def test_the_backward_is_planned_where_a_gradient_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the forward already, once, without a gradient of the final state."""
    asked: list[tuple[str, bool]] = []

    def launcher(self: launch.Runner, problem: Problem, stage: str) -> Any:
        asked.append((stage, problem.final_state))
        return lambda **_: None

    monkeypatch.setattr(launch.Runner, "launcher", launcher)
    runner = launch.Runner(_with_tilelang(Problem(final_state=True)))
    for _ in range(2):
        runner.plan_backward()
    backward = runner.recipe.plan.backward
    assert asked == [(stage, False) for stage in backward]


@pytest.mark.parametrize("compiler", [None, "/usr/bin/nvcc"])
def test_without_nvcc_the_default_in_triton_runs(
    compiler: str | None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    rendered: list[str] = []

    def render(problem: Problem, stage: str, config: Any) -> Any:
        rendered.append(config["language"])
        return None

    monkeypatch.setattr(launch, "cuda_compiler", lambda: compiler)
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "render", render)
    monkeypatch.setattr(launch.build, "load", lambda _: _module(lambda: None))
    monkeypatch.setattr(launch, "direct_launch", lambda _: lambda **_: None)
    problem = Problem()
    launch.Runner(_with_tilelang(problem)).launcher(problem, "scan")
    assert rendered == ["triton" if compiler is None else "tilelang"]
    assert ["needs nvcc" in str(x.message) for x in recwarn] == [True] * (compiler is None)


def test_nvcc_is_looked_for_where_it_may_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda_compiler.__wrapped__() == str(nvcc)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert cuda_compiler.__wrapped__() == str(nvcc)


def _with_tilelang(problem: Problem) -> Recipe:
    recipe = default_recipe(problem)
    configs = {**recipe.configs}
    for stage in ("scan", "rescan"):
        configs[stage] = default_config(stage, problem).replace(language="tilelang")
    return Recipe(problem, recipe.plan, configs, "forced", "a test asked for it")
