"""What the tests on a GPU share: problems, recipes, bounds, and one run of the op."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import torch
from tilelang_configs import tilelang_recipe
from torch import Tensor

from gdn2gen.base.device import present_device
from gdn2gen.base.errors import BuildError
from gdn2gen.codegen.build import compile_ahead
from gdn2gen.codegen.render import Rendered, render
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import SHAPES, Shape
from gdn2gen.family.tolerances import slack_of
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.accuracy import public_op, run_op
from gdn2gen.measure.case_runs import case_inputs, errors_in_range
from gdn2gen.measure.cases import Case
from gdn2gen.store.dispatch import find_recipe, forced_recipe

DEVICE: Final = "cuda"
TRAIN: Final = SHAPES["train4k"]

_STATES: Final = Problem(initial_state=True, final_state=True)
_KDA: Final = replace(_STATES, op="kda")
_GDN: Final = replace(_STATES, op="gated_delta_rule")
_DELTA: Final = replace(_STATES, op="delta_rule")
_GLA, _SIMPLE_GLA = (
    Problem(op=op, initial_state=True, final_state=True) for op in ("gla", "simple_gla")
)
# Few, since each is some ten kernels to compile; K != V wherever the size is free, which shows a
# swapped transpose that square states hide.
PROBLEMS: Final[dict[str, Problem]] = {
    "fp32": replace(_STATES, dtype="fp32"),
    "fp16": replace(_STATES, dtype="fp16"),
    "bf16": _STATES,
    "stateless": Problem(),
    "packed": replace(_STATES, varlen=True),
    "softplus": replace(_STATES, V=64, gate="softplus", has_A_log=True, has_dt_bias=True),
    "sigmoid": replace(_STATES, K=64, gate="sigmoid", has_A_log=True, has_dt_bias=True),
    "v-first": replace(_STATES, K=32, state_v_first=True),
    "gate-bf16": replace(_STATES, V=32, gate_dtype="bf16"),
    "fp16-K64-V32": replace(_STATES, K=64, V=32, dtype="fp16"),
    "fp32-K32-V64": replace(_STATES, K=32, V=64, dtype="fp32"),
    "gdn": _GDN,
    "gdn-packed": replace(
        _GDN, V=64, varlen=True, gate="softplus", has_A_log=True, has_dt_bias=True
    ),
    "gdn-fp16-K64": replace(_GDN, K=64, dtype="fp16", beta_sigmoid=True, neg_eigval=True),
    "delta": replace(_DELTA, V=64),
    "delta-packed": replace(_DELTA, varlen=True),
    "gla": replace(_GLA, V=64),
    "gla-packed": replace(_GLA, varlen=True, state_v_first=True),
    "gla-fp16-K64": replace(_GLA, K=64, dtype="fp16"),
    "simple-gla": replace(_SIMPLE_GLA, V=64),
    "simple-gla-packed": replace(_SIMPLE_GLA, varlen=True, state_v_first=True),
    "simple-gla-fp16-K64": replace(_SIMPLE_GLA, K=64, dtype="fp16"),
    "kda": _KDA,
    "kda-packed": replace(_KDA, varlen=True),
    "kda-K64": replace(
        _KDA, K=64, V=64, gate="softplus", has_A_log=True, has_dt_bias=True, beta_sigmoid=True
    ),
    "kda-fp16-K32-V64": replace(
        _KDA, K=32, V=64, dtype="fp16", beta_sigmoid=True, neg_eigval=True, beta_fp32=True
    ),
}
LEVELS: Final = ("lean", "fast")
DEFAULTS: Final = ("default lean", "default fast", "default states")
# Plans whose stages are all in TileLang: what is tuned may hold few of them, the defaults none.
TILELANG: Final = ("tilelang lean", "tilelang states")
# Of a second member, whose kernels are of the same templates, fewer than of the first; of the first
# those of another form, too.
_FEWER: Final[dict[str, tuple[str, ...]]] = {
    "bf16": (*LEVELS, "centred lean"),
    "packed": (*LEVELS, "centred fast"),
    "sigmoid": (*LEVELS, "centred fast"),
    "gdn": ("lean", "fast", "tilelang direct", "tilelang direct_states"),
    "gdn-packed": ("lean", "fast", "tilelang direct"),
    "gdn-fp16-K64": ("fast", "tilelang direct_states"),
    "delta": ("lean", "tilelang direct"),
    "delta-packed": ("fast", "tilelang direct_states"),
    "gla": ("lean", "default linear_fast", "fast", "tilelang linear_fast", "centred linear"),
    "gla-packed": ("lean", "tilelang linear_states", "centred linear_fast"),
    "gla-fp16-K64": ("fast", "tilelang linear"),
    "simple-gla": ("lean", "tilelang linear_direct", "tilelang linear_direct_states"),
    "simple-gla-packed": ("fast", "tilelang linear_direct"),
    "simple-gla-fp16-K64": ("tilelang linear_direct_states",),
    "kda": (*LEVELS, "default states", *TILELANG, "centred lean"),
    "kda-packed": ("lean", "tilelang fast", "centred fast"),
    "kda-K64": ("lean", "tilelang fast", "centred fast"),
    "kda-fp16-K32-V64": ("fast",),
}
# Where the tuner opens its search of the largest chunks.
BY_64: Final = "default lean by 64"

# Relative error against fp64 (norm of the difference over norm of the reference) of any output or
# gradient. Worst measured on an H200: bf16 8e-3, fp16 8e-4 (3 more bits), fp32 7e-6 (tf32x3).
# Tighter than `gdn2gen verify`, which has to hold on every GPU.
_BOUNDS: Final = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 3e-5}
# I + T is ill-conditioned there, and gives back what 16 bits round off amplified: 2.6e-2 in bf16.
_AMPLIFIED: Final = {"correlated": 3.0}

Tensors = dict[str, Tensor]
Kernels = list[tuple[Problem, str, Config]]


def recipe_of(name: str, level: str) -> Recipe:
    """What train4k runs at `level` (tuned, if this GPU is), or the default of a level.

    Tests force it: what is compared bit for bit must not change its configs with the shape.
    """
    problem = PROBLEMS[name]
    if level == BY_64:
        return Recipe.default(problem, BT=64)
    which, _, plan = level.rpartition(" ")
    if which == "default":
        return Recipe.default(problem, plan)
    if which == "tilelang":
        return tilelang_recipe(problem, plan)
    if which == "centred":
        recipe = tilelang_recipe(problem, plan)
        for stage in ("prepare", "grad_key"):
            recipe = recipe.with_config(recipe[stage].replace(decay="centred"))
        return recipe
    device = present_device()
    return find_recipe(problem, TRAIN.regime, device, level=level, strict=False).recipe


def levels_of(name: str) -> tuple[str, ...]:
    """Those at which tests run a problem."""
    return _FEWER.get(name, LEVELS)


def at_levels(*names: str) -> list[tuple[str, str]]:
    """Each problem at each of its levels."""
    return [(name, level) for name in names for level in levels_of(name)]


def every_kernel() -> Kernels:
    """(problem, stage, config) of every kernel that the tests run, each source once."""
    wanted = at_levels(*PROBLEMS)
    wanted += [("bf16", level) for level in DEFAULTS]
    wanted += [(name, BY_64) for name in ("bf16", "fp16")]
    return kernels_of(recipe_of(*one) for one in wanted)


def kernels_of(recipes: Iterable[Recipe]) -> Kernels:
    """(problem, stage, config) of every kernel of the recipes, each source once."""
    kernels: dict[Rendered, tuple[Problem, str, Config]] = {}
    for recipe in recipes:
        for config in recipe.configs:
            source = render(recipe.problem, config.stage, config)
            kernels.setdefault(source, (recipe.problem, config.stage, config))
    return list(kernels.values())


def compile_all(kernels: Kernels) -> None:
    """Fill the compilers' caches on all cores: one by one, 100 kernels would take minutes.

    One that does not compile is left to the tests that launch it.
    """
    device = present_device()
    workers = min(14, max(2, (os.cpu_count() or 4) - 2))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        running = [pool.submit(compile_ahead, *kernel, device) for kernel in kernels]
        for future in running:
            error = future.exception()
            if error is not None and not isinstance(error, BuildError):
                raise error


def sized(B: int, T: int, H: int, cu_seqlens: tuple[int, ...] | None = None) -> Shape:
    return Shape(f"{B}x{T}x{H}", B, T, H, cu_seqlens)


def draw(
    problem: Problem,
    shape: Shape,
    pattern: str = "mixed",
    *,
    H: int | None = None,
    HG: int | None = None,
) -> tuple[Tensors, Tensors]:
    """Inputs of the op, and the gradients of its outputs. H, HG: fewer heads of q and k, and of the
    decay and what has its heads."""
    return case_inputs(Case("drawn", problem, shape, pattern, H=H, HG=HG), DEVICE)


def run(recipe: Recipe, inputs: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> Tensors:
    """One forward and backward of the public op with the kernels of `recipe`."""
    with forced_recipe(recipe):
        return run_op(public_op(recipe.problem.op), recipe.problem, inputs, grads)


def off(
    results: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    problem: Problem,
    pattern: str = "mixed",
    *,
    slack: float = 1.0,
) -> dict[str, str]:
    """Error of each result that is above the bound; empty if all is well."""
    bound = slack * _BOUNDS[problem.dtype] * _AMPLIFIED.get(pattern, 1.0)
    errors = errors_in_range(results, exact, problem.dtype)
    slacks = slack_of(problem.op)
    bounds = {name: bound * slacks.get(name, 1.0) for name in errors}
    return {
        name: f"{error:.1e} > {bounds[name]:.1e}"
        for name, error in errors.items()
        if not error <= bounds[name]
    }


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Names of the results that are not the same bits; a NaN counts as moved."""
    assert before.keys() == after.keys()
    return [name for name, x in before.items() if not torch.equal(x, after[name])]


def tokens_of(tensors: Mapping[str, Tensor], start: int, end: int) -> Tensors:
    """What belongs to tokens start..end of a batch row: all but states and cu_seqlens."""
    whole = [name for name in tensors if "state" in name or name == "cu_seqlens"]
    return {name: x[:, start:end] for name, x in tensors.items() if name not in whole}


def states_of(tensors: Mapping[str, Tensor], n: int) -> Tensors:
    """The states among `tensors`, of sequence n alone."""
    return {name: x[n : n + 1] for name, x in tensors.items() if "state" in name}


@contextmanager
def other_stream() -> Iterator[None]:
    """A stream of its own that starts after, and is waited for by, the current one."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def free_memory() -> None:
    """Give back what earlier tests left in torch's cache."""
    gc.collect()
    torch.cuda.empty_cache()
