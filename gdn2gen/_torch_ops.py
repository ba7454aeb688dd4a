"""What the torch ops under the public ones compute, and the fakes that torch.compile traces.

The forward returns what the backward of its plan wants saved; names and order are the plan's
(`saved_names`), so that the fake, the kernels and the backward agree.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from gdn2gen import launch
from gdn2gen.arguments import IO_DTYPES
from gdn2gen.call import Call
from gdn2gen.device import Device, named_device, present_device
from gdn2gen.dispatch import Recipe, find_recipe, forced
from gdn2gen.launch import Runner
from gdn2gen.problem import Problem, Regime
from gdn2gen.stages import STAGES, Operand, has_operand


def _problem(
    q: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
) -> Problem:
    gate = "none"
    if gate_in_kernel:
        gate = "softplus" if lower_bound is None else "sigmoid"
    return Problem(
        op="gdn2",
        K=q.shape[-1],
        V=v.shape[-1],
        dtype=IO_DTYPES[q.dtype],
        gate_dtype=IO_DTYPES[g.dtype],
        l2norm=l2norm,
        gate=gate,
        has_A_log=A_log is not None,
        has_dt_bias=dt_bias is not None,
        varlen=cu_seqlens is not None,
        initial_state=initial_state is not None,
        final_state=output_final_state,
        state_v_first=state_v_first,
    )


def _call(
    q: Tensor,
    v: Tensor,
    g: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    lower_bound: float | None,
) -> Call:
    B, T, H, _ = q.shape
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    return Call(
        B=B,
        T=T,
        H=H,
        HV=v.shape[2],
        HG=g.shape[2],
        N=N,
        scale=scale,
        lower_bound=lower_bound,
        packed=cu_seqlens is not None,
        device=q.device,
    )


@lru_cache(maxsize=4096)
def _runner(recipe: Recipe) -> Runner:
    return Runner(recipe)


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


def _find_runner(problem: Problem, call: Call, level: str) -> Runner:
    if level in _pinned:
        return _runner(replace(_pinned[level], problem=problem))
    # int: a graph traced for symbolic sizes is for these alone, since the recipe may depend on them
    regime = Regime(tokens=int(call.B * call.T), sequences=int(call.N), heads=int(call.HV))
    return _runner(find_recipe(problem, regime, _device_of(call.device), level=level))


def _device_of(device: torch.device) -> Device:
    # the interpreter stands in for the GPU that the defaults were chosen on
    return present_device(device.index) if device.type == "cuda" else named_device("sm_90")


def saved_names(runner: Runner) -> list[str]:
    """Tensors that the forward saves for the backward, in order."""
    problem = runner.problem
    made = [x for name in runner.recipe.plan.forward for x in STAGES[name].outputs]
    wanted = {*runner.recipe.plan.saves, "q_rstd", "k_rstd"}
    return [x.name for x in made if x.name in wanted and has_operand(x, problem)]


def _saved_operands(runner: Runner) -> list[Operand]:
    made = {x.name: x for name in runner.recipe.plan.forward for x in STAGES[name].outputs}
    return [made[name] for name in saved_names(runner)]


def forward_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
    level: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """o, the final state (empty if not asked for), and what the backward wants saved."""
    inputs = {"q": q, "k": k, "v": v, "g": g, "b": b, "w": w}
    optional = {
        "initial_state": initial_state,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "cu_seqlens": cu_seqlens,
    }
    tensors = inputs | {name: x for name, x in optional.items() if x is not None}
    flags = (l2norm, gate_in_kernel, output_final_state, state_v_first)
    call = _call(q, v, g, cu_seqlens, scale, lower_bound)
    problem = _problem(
        q, v, g, initial_state, A_log, dt_bias, cu_seqlens, lower_bound, *flags
    )
    runner = _find_runner(problem, call, level)
    if any(x.requires_grad for x in tensors.values()):
        runner.plan_backward()
    names = saved_names(runner)
    results = launch.forward(runner, call, tensors, names)
    final_state = results["final_state"] if output_final_state else q.new_empty(0).float()
    return results["o"], final_state, [results[name] for name in names]


def forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
    level: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    call = _call(q, v, g, cu_seqlens, scale, lower_bound)
    o = torch.empty_like(v)
    final_state = q.new_empty(0, dtype=torch.float32)
    if output_final_state:
        inner = (v.shape[-1], q.shape[-1]) if state_v_first else (q.shape[-1], v.shape[-1])
        final_state = q.new_empty((call.N, call.HV, *inner), dtype=torch.float32)
    flags = (l2norm, gate_in_kernel, output_final_state, state_v_first)
    problem = _problem(
        q, v, g, initial_state, A_log, dt_bias, cu_seqlens, lower_bound, *flags
    )
    runner = _find_runner(problem, call, level)
    sizes = call.sizes(problem, runner.BT)
    saved = [launch.empty(x, problem, sizes, q.device) for x in _saved_operands(runner)]
    return o, final_state, saved


def backward_kernels(
    do: Tensor,
    dht: Tensor | None,
    saved: list[Tensor],
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
    level: str,
) -> list[Tensor]:
    """Gradients of q, k, v, g, b, w, and of what is given of initial_state, A_log, dt_bias."""
    inputs = {"q": q, "k": k, "v": v, "g": g, "b": b, "w": w}
    optional = {"initial_state": initial_state, "A_log": A_log, "dt_bias": dt_bias}
    inputs |= {name: x for name, x in optional.items() if x is not None}
    flags = (l2norm, gate_in_kernel, output_final_state, state_v_first)
    tensors = inputs | {"do": do.contiguous(), "o": o}
    if dht is not None:
        tensors["dht"] = dht.contiguous()
    if cu_seqlens is not None:
        tensors["cu_seqlens"] = cu_seqlens
    call = _call(q, v, g, cu_seqlens, scale, lower_bound)
    problem = _problem(
        q, v, g, initial_state, A_log, dt_bias, cu_seqlens, lower_bound, *flags
    )
    runner = _find_runner(problem, call, level)
    tensors |= dict(zip(saved_names(runner), saved, strict=True))
    grads = launch.backward(runner, call, tensors, has_dht=dht is not None)
    names = {"initial_state": "dh0", "dt_bias": "ddt_bias"}
    return [_fold(grads[names.get(name, f"d{name}")], name, x) for name, x in inputs.items()]


def _fold(grad: Tensor, name: str, x: Tensor) -> Tensor:
    """Sum a kernel's gradient per value head, or per chunk, to the shape of its input."""
    if name == "A_log":
        return grad.sum((0, 2)).view(x.shape[0], -1).sum(1)
    if name == "dt_bias":
        return grad.sum(0).view(x.shape[0], -1, x.shape[1]).sum(1)
    if grad.shape == x.shape:
        return grad
    B, T, heads, dim = x.shape
    return grad.view(B, T, heads, grad.shape[2] // heads, dim).float().sum(3).to(x.dtype)


def backward_fake(
    do: Tensor,
    dht: Tensor | None,
    saved: list[Tensor],
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
    level: str,
) -> list[Tensor]:
    given = (q, k, v, g, b, w, initial_state, A_log, dt_bias)
    return [torch.empty_like(x) for x in given if x is not None]
