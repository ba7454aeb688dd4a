"""What the shapes, dtypes and flags of a call decide, looked up once: its sizes and its kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from gdn2gen import dispatch
from gdn2gen.arguments import IO_DTYPES
from gdn2gen.call import Call
from gdn2gen.device import Device, named_device, present_device
from gdn2gen.dispatch import Recipe, find_recipe, forced
from gdn2gen.launch import Runner, SizedRunner
from gdn2gen.plans import LEVELS, keeps_least
from gdn2gen.problem import Problem, Regime, bound_of


@dataclass(frozen=True, eq=False)
class Request:
    """The problem of a call, and its sizes. Those that are looked up are equal if identical."""

    problem: Problem
    call: Call


def make_request(
    q: torch.Size,
    v: torch.Size,
    g: torch.Size,
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    device: torch.device,
    initial_state: bool,
    A_log: bool,
    dt_bias: bool,
    sequences: int | None,
    scale: float,
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
) -> Request:
    """Of shapes, dtypes, what of the optional tensors is given, and the flags.

    `sequences` are those of a packed batch, else None.
    """
    B, T, H, K = q
    gate = "none"
    if gate_in_kernel:
        gate = "softplus" if lower_bound is None else "sigmoid"
    problem = Problem(
        op="gdn2",
        K=K,
        V=v[-1],
        dtype=IO_DTYPES[dtype],
        gate_dtype=IO_DTYPES[gate_dtype],
        l2norm=l2norm,
        gate=gate,
        has_A_log=A_log,
        has_dt_bias=dt_bias,
        varlen=sequences is not None,
        initial_state=initial_state,
        final_state=output_final_state,
        state_v_first=state_v_first,
        bound=bound_of(lower_bound) if gate == "sigmoid" and lower_bound is not None else 0,
    )
    call = Call(
        B=B,
        T=T,
        H=H,
        HV=v[2],
        HG=g[2],
        N=B if sequences is None else sequences,
        scale=scale,
        lower_bound=lower_bound,
        packed=sequences is not None,
        device=device,
    )
    return Request(problem, call)


known_request = lru_cache(maxsize=512)(make_request)
"""`make_request` for sizes that are numbers; those of a graph being traced may be symbols."""


_pinned: dict[str, Recipe] = {}


def level_token(level: str) -> str:
    """`level`, or a token for the forced recipe, which autograd's threads could not see."""
    if torch.compiler.is_compiling():
        return level  # context variables cannot be traced
    recipe = forced()
    if recipe is None:
        return level
    configs = "; ".join(f"{stage} {config}" for stage, config in recipe.configs.items())
    token = f"forced {recipe.plan.name}: {configs}"
    _pinned[token] = recipe
    return token


def find_runner(request: Request, level: str, gradient: bool = True) -> SizedRunner:
    """The kernels of a request that was looked up, at its sizes; `gradient`: is one wanted?

    Looked up in turn, by what else a recipe depends on: to find it took 17 us, and this takes 2.
    """
    return _found(request, level, gradient, dispatch.surroundings())


@lru_cache(maxsize=512)
def _found(
    request: Request, level: str, gradient: bool, _surroundings: tuple[Any, ...]
) -> SizedRunner:
    runner = runner_of(request, level)
    if not gradient and not keeps_least(runner.recipe.plan):
        # no use to have a scan keep states; unless only what keeps them is tuned
        leaner = runner_of(request, LEVELS[0], strict=False)
        if leaner.recipe.source == runner.recipe.source:
            runner = leaner
    return runner.at(request.call)


def runner_of(request: Request, level: str, strict: bool | None = None) -> Runner:
    """The kernels of a request, looked for anew; `strict` as in `find_recipe`."""
    problem, call = request.problem, request.call
    if level in _pinned:
        return _runner(replace(_pinned[level], problem=problem))
    # int: a graph traced for symbolic sizes is for these alone, since the recipe may depend on them
    regime = Regime(tokens=int(call.B * call.T), sequences=int(call.N), heads=int(call.HV))
    device = _device_of(call.device)
    return _runner(find_recipe(problem, regime, device, level=level, strict=strict))


@lru_cache(maxsize=4096)
def _runner(recipe: Recipe) -> Runner:
    return Runner(recipe)


def _device_of(device: torch.device) -> Device:
    # the interpreter stands in for the GPU that the defaults were chosen on
    return present_device(device.index) if device.type == "cuda" else named_device("sm_90")
