"""Values and memory that a model may hand over: NaN, infinities, views of any alignment.

In both languages and every form of their kernels, at K = V = 64 and 128.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import not_finite
import pytest
import torch
from gpu_support import DEVICE, Kernels, Tensors, draw, kernels_of, moved, run, sized
from tilelang_configs import tilelang_config
from torch import Tensor

from gdn2gen.codegen.package import generate_package
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.accuracy import run_op
from gdn2gen.runtime import call

pytestmark = pytest.mark.gpu

BT: Final = 32
_STATES: Final = Problem(K=64, V=64, initial_state=True, final_state=True)
_WIDE: Final = replace(_STATES, K=128, V=128)
_SOFTPLUS: Final = replace(_STATES, gate="softplus", has_A_log=True, has_dt_bias=True)
_BOUNDED: Final = replace(_SOFTPLUS, gate="sigmoid", bound=2)
_KDA: Final = replace(_STATES, op="kda")
_KDA_PACKED: Final = replace(
    _SOFTPLUS, op="kda", varlen=True, beta_sigmoid=True, neg_eigval=True, beta_fp32=True
)
_GDN: Final = replace(_WIDE, op="gated_delta_rule")
_GDN_PACKED: Final = replace(
    _SOFTPLUS, op="gated_delta_rule", varlen=True, beta_sigmoid=True, neg_eigval=True
)
_DELTA_FP16: Final = replace(_STATES, op="delta_rule", dtype="fp16")
_SIMPLE_GLA: Final = Problem("simple_gla", K=64, V=64, initial_state=True, final_state=True)
_GLA: Final = replace(_SIMPLE_GLA, op="gla")
_DYADIC: Final = ("log", "tree")


def _config(stage: str, problem: Problem, language: str, knobs: dict[str, Knob]) -> Config:
    made = tilelang_config if language == "tilelang" else default_config
    config = made(stage, problem, BT=BT)
    given = {name: value for name, value in knobs.items() if name in config}
    if knobs.get("decay") in _DYADIC:
        given |= {"BK": 32, "num_warps": 1} if stage == "prepare" else {"chunks": 1}
    if stage == "grad_key" and "decay" in knobs:
        given["decay"] = "bounded" if knobs["decay"] == "bounded" else "log"
    given = {name: value for name, value in given.items() if name in config}
    return config.replace(**given) if given else config


def _recipe(problem: Problem, language: str, plan: str = "lean", **knobs: Knob) -> Recipe:
    configs = {x: _config(x, problem, language, knobs) for x in PLANS[plan].stages}
    return Recipe.of(problem, plan, configs)


def _recipes() -> dict[str, Recipe]:
    made = {}
    for language in ("triton", "tilelang"):
        made |= {
            f"{language}": _recipe(_STATES, language),
            f"{language}-K128": _recipe(_WIDE, language, "fast"),
            f"{language}-softplus": _recipe(_SOFTPLUS, language, "states"),
            f"{language}-bounded": _recipe(_BOUNDED, language, "fast", decay="bounded"),
            f"{language}-packed": _recipe(replace(_STATES, varlen=True), language),
            f"{language}-packed-softplus": _recipe(
                replace(_SOFTPLUS, varlen=True), language, "states"
            ),
            f"{language}-parallel": _recipe(_STATES, language, "fast", segments="parallel"),
            f"kda-{language}": _recipe(_KDA, language),
            f"kda-{language}-K128": _recipe(replace(_WIDE, op="kda"), language, "fast"),
            f"kda-{language}-packed-softplus": _recipe(_KDA_PACKED, language, "states"),
        }
    made |= {
        "gdn-tilelang": _recipe(_GDN, "tilelang", "direct"),
        "gdn-tilelang-packed": _recipe(_GDN_PACKED, "tilelang", "direct_states"),
        "gdn-tilelang-parallel": _recipe(
            replace(_GDN, V=64), "tilelang", "direct", segments="parallel"
        ),
        "delta-tilelang-fp16": _recipe(_DELTA_FP16, "tilelang", "direct_states"),
        "simple-gla-tilelang-parallel": _recipe(
            _SIMPLE_GLA, "tilelang", "linear_direct", segments="parallel"
        ),
        "tilelang-blocks": _recipe(_WIDE, "tilelang", "blocks1"),
        "triton-blocks": _recipe(_STATES, "triton", "blocks2"),
        "tilelang-whole": _recipe(_WIDE, "tilelang", "whole_blocks2"),
        "tilelang-whole-K64": _recipe(_STATES, "tilelang", "whole_blocks1_states"),
        "kda-tilelang-whole": _recipe(replace(_WIDE, op="kda"), "tilelang", "whole_blocks2"),
        "tilelang-blocks-parallel": _recipe(
            _STATES, "tilelang", "blocks2_states", segments="parallel"
        ),
        "kda-tilelang-blocks-parallel": _recipe(
            replace(_KDA, K=128, V=128), "tilelang", "blocks2_states", segments="parallel"
        ),
        "simple-gla-tilelang-packed": _recipe(
            replace(_SIMPLE_GLA, varlen=True), "tilelang", "linear_direct_states"
        ),
    }
    made["kda-tilelang-bounded"] = _recipe(
        replace(_BOUNDED, op="kda"), "tilelang", "fast", decay="bounded"
    )
    made["triton-log"] = _recipe(_STATES, "triton", decay="log")
    made["triton-tree"] = _recipe(_SOFTPLUS, "triton", "fast", decay="tree")
    return made


RECIPES: Final = _recipes()


@pytest.fixture(scope="module", autouse=True)
def compiled(compile_once: Callable[[str, Kernels], None]) -> None:
    compile_once("values", kernels_of(RECIPES.values()))


@pytest.mark.parametrize("name", RECIPES)
def test_nan_comes_out_and_goes_no_further_than_its_chunk(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every input and gradient; segments are of one chunk."""
    monkeypatch.setattr(call, "SEGMENT", 1)
    recipe = RECIPES[name]
    found = not_finite.faults(recipe.problem, BT, lambda *given: run(recipe, *given), DEVICE)
    assert not found


View = Callable[[Tensor, int], Tensor]


def _off_by(x: Tensor, elements: int) -> Tensor:
    """The same values, contiguous, at an address that is no multiple of 16."""
    memory = torch.empty(x.numel() + 16, dtype=x.dtype, device=x.device)
    view = memory[elements : elements + x.numel()].view(x.shape)
    assert view.data_ptr() % 16
    return view.copy_(x)


def _lazily_negative(x: Tensor, _: int) -> Tensor:
    view: Tensor = torch._neg_view(-x)
    assert view.is_neg()
    return view


@pytest.mark.parametrize("how", [_off_by, _lazily_negative])
@pytest.mark.parametrize(
    "name",
    [
        *("triton", "tilelang", "tilelang-K128", "tilelang-softplus", "tilelang-packed"),
        *("kda-triton", "kda-tilelang-K128", "kda-tilelang-packed-softplus"),
        *("gdn-tilelang", "gdn-tilelang-packed", "simple-gla-tilelang-parallel"),
        "tilelang-blocks-parallel",
    ],
)
def test_views_are_read_as_their_copies_are(name: str, how: View) -> None:
    """Each tensor that a kernel reads, alone and all together."""
    recipe = RECIPES[name]
    problem = recipe.problem
    ends = (0, 40, 41, 300) if problem.varlen else None
    inputs, grads = draw(problem, sized(1 if ends else 2, 300, 2, ends))
    right = run(recipe, inputs, grads)
    floating = [x for x, y in inputs.items() if y.is_floating_point()]
    for chosen in ([x] for x in (*floating, *grads)):
        assert not moved(right, run(recipe, *_changed(inputs, grads, chosen, how))), chosen
    every = [*(inputs if how is _off_by else floating), *grads]
    for elements in (1, 3):
        changed = _changed(inputs, grads, every, how, elements)
        assert not moved(right, run(recipe, *changed)), elements


@pytest.mark.parametrize("name", ["tilelang", "kda-tilelang"])
def test_packages_copy_views_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPES[name]
    module = f"values_in_{name.replace('-', '_')}"
    generate_package(recipe, tmp_path / module, "gdn2gen generate")
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module(module)
    (public,) = package.__all__
    op = getattr(package, public)
    inputs, grads = draw(recipe.problem, sized(2, 300, 2))
    right = run_op(op, recipe.problem, inputs, grads)
    for how in (_off_by, _lazily_negative):
        changed = _changed(inputs, grads, [*inputs, *grads], how)
        assert not moved(right, run_op(op, recipe.problem, *changed)), how


def _changed(
    inputs: Tensors, grads: Tensors, chosen: list[str], how: View, elements: int = 1
) -> tuple[Tensors, Tensors]:
    changed = [
        {name: how(x, elements) if name in chosen else x for name, x in tensors.items()}
        for tensors in (inputs, grads)
    ]
    return changed[0], changed[1]
