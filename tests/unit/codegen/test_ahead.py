"""TileLang programs compiled by threads while other stages are launched."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
from tilelang_configs import tilelang_config

from gdn2gen.base.environment import cuda_compiler
from gdn2gen.codegen import nvrtc
from gdn2gen.codegen.background import compile_in_thread
from gdn2gen.codegen.build import load
from gdn2gen.codegen.programs import compiled_program
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.runtime import _loading, runner


def _module(compiled: Any, name: str = "made-up") -> ModuleType:
    module: Any = ModuleType(name)
    module.compiled = compiled
    return module


def test_programs_compile_side_by_side_and_launches_wait() -> None:
    both = threading.Barrier(2, timeout=20)  # neither passes before the other one runs, too
    modules: list[Any] = [_module(both.wait) for _ in range(2)]
    for module in modules:
        compile_in_thread(module)
    assert sorted(module.compiled() for module in modules) == [0, 1]


def test_a_module_is_compiled_once() -> None:
    calls: list[None] = []
    module: Any = _module(lambda: calls.append(None))
    for _ in range(3):
        compile_in_thread(module)
        module.compiled()
    assert len(calls) == 1


def test_a_module_with_two_programs_has_both_compiled() -> None:
    both = threading.Barrier(2, timeout=20)
    module: Any = _module(both.wait, "two programs")
    module.compiled_fold = both.wait
    compile_in_thread(module)
    assert sorted((module.compiled(), module.compiled_fold())) == [0, 1]


def test_what_the_compiler_raises_comes_with_the_launch() -> None:
    def broken() -> None:
        raise RuntimeError("no such instruction")

    module: Any = _module(broken)
    compile_in_thread(module)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such instruction"):
            module.compiled()


@pytest.mark.tilelang
def test_a_compiled_program_is_kept_and_runs_without_tilelang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of its own loads it; the compiler is not asked again, nor TileLang imported."""
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "tilelang"))
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path / "cache"))
    program = f"""
import sys
from pathlib import Path
from types import ModuleType
from gdn2gen.codegen.programs import compiled_program
def load():
    module = ModuleType({_NAME!r})
    return compiled_program(module, "compiled_fold", lambda: print("compiled anew"))
print(type(load()).__name__, "tilelang" in sys.modules)
kept = Path(sys.argv[1])
half = kept.read_bytes()[:1000]
kept.unlink()  # of the other one this process has pages
kept.write_bytes(half)
load()  # for which TileLang is imported
"""
    _compile()
    (kept,) = (tmp_path / "cache" / "programs").glob("*.so")
    assert kept.name.startswith(f"{_NAME}-compiled_fold-")
    assert _printed(program, str(kept))[:2] == ["Function False", "compiled anew"]
    assert not kept.exists()


_NAME: Final = "gdn2_scan_made_up"
# Of the stage that compiles soonest: what is kept of a program depends on none.
_PROGRAM: Final = tilelang_config("sum_decay", Problem())


def _compile() -> None:
    import tilelang

    module = load(render(Problem(), "sum_decay", _PROGRAM))
    target = {"kind": "cuda", "arch": "sm_90a"}
    compiled_program(
        ModuleType(_NAME),
        "compiled_fold",
        lambda: tilelang.compile(module.program(), target=target),
    )


def _printed(program: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_the_backward_is_planned_where_a_gradient_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the forward already, once, without a gradient of the final state."""
    asked: list[tuple[str, bool]] = []

    def launcher(self: runner.Runner, problem: Problem, stage: str) -> Any:
        asked.append((stage, problem.final_state))
        return lambda **_: None

    monkeypatch.setattr(runner.Runner, "launcher", launcher)
    made = runner.Runner(_with_tilelang(Problem(final_state=True)))
    for _ in range(2):
        made.plan_backward()
    backward = made.recipe.plan.backward
    assert asked == [(stage, False) for stage in backward]


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("compiles", [False, True])
def test_without_a_compiler_or_a_kept_program_the_default_in_triton_runs(
    compiles: bool,
    kept: bool,
    installed: bool,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    rendered: list[str] = []

    def render(problem: Problem, stage: str, config: Any) -> Any:
        rendered.append(config["language"])
        return None

    monkeypatch.setattr(nvrtc, "has_tilelang", lambda: installed)
    monkeypatch.setattr(_loading, "has_tilelang", lambda: installed)
    monkeypatch.setattr(_loading, "has_compiler", lambda: compiles and installed)
    monkeypatch.setattr(_loading, "are_kept", lambda _: kept)
    monkeypatch.setattr(_loading, "interpreted", lambda: False)
    monkeypatch.setattr(_loading, "render", render)
    monkeypatch.setattr(_loading.build, "load", lambda _: _module(lambda: None))
    monkeypatch.setattr(_loading, "direct_launch", lambda _: lambda **_: None)
    problem = Problem()
    runner.Runner(_with_tilelang(problem)).launcher(problem, "scan")
    serves = installed and (compiles or kept)
    missing = "neither nvcc" if installed else "pip install tilelang"
    assert rendered[-1] == ("tilelang" if serves else "triton")
    assert [missing in str(x.message) for x in recwarn] == [True] * (not serves)


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
    # TileLang would call that one, and no other
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert cuda_compiler.__wrapped__() is None


def _with_tilelang(problem: Problem) -> Recipe:
    recipe = Recipe.default(problem)
    scans = (recipe[stage].replace(language="tilelang") for stage in ("scan", "rescan"))
    return recipe.with_config(*scans)
