"""Kernels loaded: launch functions of stages, and of what a packed batch needs around them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from types import ModuleType

import torch
from torch import Tensor

from gdn2gen.base.environment import interpreted
from gdn2gen.codegen import build
from gdn2gen.codegen.background import compile_in_thread
from gdn2gen.codegen.direct import direct_launch
from gdn2gen.codegen.fixed import fixed_launch
from gdn2gen.codegen.nvrtc import has_compiler, has_tilelang, why_no_compiler
from gdn2gen.codegen.programs import are_kept
from gdn2gen.codegen.render import render, render_tables
from gdn2gen.codegen.sized import sized_launch
from gdn2gen.family.compiled import Compiled
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config, in_triton, language_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.stages import STAGES


def runnable(recipe: Recipe) -> Recipe:
    """The recipe, or what does and keeps the same where nothing here compiles a stage of it that
    has no form in Triton."""
    alone = [x for x in recipe.plan.stages if "triton" not in STAGES[x].languages]
    if not (recipe.plan.instead and alone):
        return recipe
    if interpreted():
        return recipe.everywhere()
    modules = {x: build.load(render(recipe.problem, x, recipe[x])) for x in alone}
    if any(_only_triton(stage, module) for stage, module in modules.items()):
        return recipe.everywhere()
    return recipe


def stage_launcher(problem: Compiled, config: Config) -> Callable[..., None]:
    """The launch function of a stage, rendered and loaded."""
    stage = config.stage
    module = None if interpreted() else build.load(render(problem, stage, config))
    if language_of(config) != "triton" and (module is None or _only_triton(stage, module)):
        config, module = in_triton(config, problem), None
    if module is None:
        module = build.load(render(problem, stage, config))
    if interpreted():
        return _interpreting(module.launch)
    if language_of(config) == "tilelang":
        compile_in_thread(module)
    return direct_launch(module)


def launcher_if_any(problem: Compiled, config: Config) -> Callable[..., None] | None:
    """The launch function of a stage in TileLang that has no form in Triton; None where nothing
    here compiles it, and its caller has another way."""
    if interpreted():
        return None
    module = build.load(render(problem, config.stage, config))
    if not _compiles(module):
        return None
    compile_in_thread(module)
    return direct_launch(module)


def fixed_launcher(
    problem: Compiled, config: Config, scalars: Mapping[str, int | float]
) -> Callable[..., None]:
    """The launch of a Triton stage with one kernel, for these scalars: it takes tensors alone."""
    module = _module(problem, config)
    if interpreted():
        return partial(_interpreting(module.launch), **scalars)
    return fixed_launch(module, scalars)


@lru_cache(maxsize=512)
def _module(problem: Compiled, config: Config) -> ModuleType:
    return build.load(render(problem, config.stage, config))


def table_launchers(problem: Problem, BT: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """What makes the tables of a packed batch, and what clears gradients of no sequence."""
    module = build.load(render_tables(problem, BT))
    if interpreted():
        return _interpreting(module.launch), _interpreting(module.clear)
    # one for each dtype of cu_seqlens: a direct launch is for the dtypes of its first one
    by_dtype = {x: direct_launch(module) for x in (torch.int32, torch.int64)}
    return _ByDtype(by_dtype), direct_launch(module, "clear")


def launcher_of(module: ModuleType, function: str = "launch") -> Callable[..., None]:
    """A launch of a loaded module in Triton, for the dtypes of its first one."""
    launch = getattr(module, function)
    return _interpreting(launch) if interpreted() else direct_launch(module, function)


class _ByDtype:
    """A launch for each dtype of its first tensor."""

    def __init__(self, launches: Mapping[torch.dtype, Callable[..., None]]) -> None:
        self._launches = launches

    def __call__(self, given: Tensor, *others: Tensor, **scalars: int) -> None:
        self._launches[given.dtype](given, *others, **scalars)

    def of_dtype(self, dtype: torch.dtype) -> Callable[..., None]:
        return self._launches[dtype]

    def at(self, scalars: Mapping[str, int | float]) -> _ByDtype:
        return _ByDtype({x: sized_launch(y, scalars) for x, y in self._launches.items()})


def _interpreting(launch: Callable[..., None]) -> Callable[..., None]:
    from gdn2gen.codegen.interpreter import one_at_a_time  # imports Triton

    return one_at_a_time(launch)


def _compiles(module: ModuleType) -> bool:
    """Whether a module in TileLang can be compiled here, or was before."""
    return has_compiler() or (has_tilelang() and are_kept(module))


def _only_triton(stage_name: str, module: ModuleType) -> bool:
    """Whether a module in another language cannot be compiled here, and was not before; says so
    where that costs time."""
    if _compiles(module):
        return False
    remedy = "pip install tilelang"
    if has_tilelang():
        packages = "nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-cccl"
        remedy = f"name a CUDA toolkit in CUDA_HOME, or pip install {packages}"
    warnings.warn(
        f"the tuned {stage_name} is written in TileLang. {why_no_compiler()}: the slower default "
        f"in Triton runs instead. To have it, {remedy}",
        RuntimeWarning,
        stacklevel=2,
    )
    return True
