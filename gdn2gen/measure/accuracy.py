"""Errors of outputs and gradients against the fp64 reference, for the benchmark and the gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape

OpFunction = Callable[..., tuple[Tensor, Tensor | None]]

DIFFERENTIABLE: Final = ("q", "k", "v", "g", "b", "w", "A_log", "dt_bias", "initial_state")
ERROR_NAMES: Final = ("o", "final_state", *(f"d{name}" for name in DIFFERENTIABLE))
TORCH_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A bound on the decay per token where a problem with the sigmoid gate has none: FLA's own default.
LOWER_BOUND: Final = -5.0


def inputs_of(
    problem: Problem, shape: Shape, regime: str, seed: int, device: str
) -> dict[str, Tensor]:
    """Inputs of one call of `problem`: q, k, v, g, b, w and what its flags ask for.

    With a gate in the kernel `g` is a pre-activation, for which regimes mean little; it is then
    normal, and A_log and dt_bias span the ranges of a freshly initialised layer. But for a bound on
    the decay, `strong` takes most tokens close to it.
    """
    from gdn2gen.family.inputs import make_inputs

    inputs = make_inputs(
        shape.B,
        shape.T,
        shape.H,
        problem.K,
        problem.V,
        dtype=TORCH_DTYPES[problem.dtype],
        gate_dtype=TORCH_DTYPES[problem.gate_dtype],
        device=device,
        regime=regime,
        seed=seed,
        cu_seqlens=shape.cu_seqlens,
        initial_state=problem.initial_state,
    )
    if problem.initial_state and problem.state_v_first:
        inputs["initial_state"] = inputs["initial_state"].mT.contiguous()
    if problem.gate != "none":
        generator = torch.Generator(device).manual_seed(seed + 1)
        inputs["g"] = torch.empty_like(inputs["g"]).normal_(generator=generator)
        rates, biases = (1.0, 16.0), (-7.0, -2.0)
        if problem.bound and regime == "strong":
            inputs["g"].mul_(0.5).add_(3.0)
            rates, biases = (1.0, 1.3), (0.0, 1.0)
        heads = inputs["g"].shape[2]
        if problem.has_A_log:
            decay = torch.empty(heads, device=device).uniform_(*rates, generator=generator)
            inputs["A_log"] = decay.log()
        if problem.has_dt_bias:
            bias = torch.empty(heads * problem.K, device=device)
            inputs["dt_bias"] = bias.uniform_(*biases, generator=generator)
    return inputs


def op_flags(problem: Problem) -> dict[str, Any]:
    """The keywords that make the public op run `problem`."""
    return {
        "use_qk_l2norm_in_kernel": problem.l2norm,
        "use_gate_in_kernel": problem.gate != "none",
        "lower_bound": lower_bound_of(problem),
        "state_v_first": problem.state_v_first,
    }


def lower_bound_of(problem: Problem) -> float | None:
    """The lower bound that a call of `problem` gives its gate, in nats; None for other gates."""
    if problem.gate != "sigmoid":
        return None
    return -float(problem.bound) if problem.bound else LOWER_BOUND


def output_gradients(problem: Problem, shape: Shape, seed: int, device: str) -> dict[str, Tensor]:
    """Random dO, and a random gradient of the final state where the problem has one."""
    generator = torch.Generator(device).manual_seed(seed + 2)
    size = (shape.B, shape.T, shape.H, problem.V)
    do = torch.empty(size, device=device).normal_(generator=generator)
    gradients = {"o": do.to(TORCH_DTYPES[problem.dtype])}
    if problem.final_state:
        state = (shape.regime.sequences, shape.H, problem.K, problem.V)
        if problem.state_v_first:
            state = (*state[:2], problem.V, problem.K)
        gradients["final_state"] = torch.empty(state, device=device).normal_(generator=generator)
    return gradients


def run_op(
    function: OpFunction,
    problem: Problem,
    inputs: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """One forward and backward of an op with the public signature: o, final_state, d<input>."""
    leaves = _leaves(inputs)
    o, state = function(**leaves, **op_flags(problem), output_final_state=problem.final_state)
    return _results(o, state, leaves, gradients)


def run_reference(
    problem: Problem, inputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The same as `run_op`, from the chunk form of the reference in fp64."""
    from gdn2gen.family import reference

    leaves = _leaves({name: _double(x) for name, x in inputs.items()})
    arguments: dict[str, Any] = {**leaves, **op_flags(problem), "compute_dtype": torch.float64}
    o, state = reference.chunk_gdn2(**arguments)
    exact = {name: _double(x) for name, x in gradients.items()}
    return _results(o, state if problem.final_state else None, leaves, exact)


def relative_errors(
    results: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """norm(result - expected) / norm(expected) of each tensor; inf where a value is not finite.

    Where the expected tensor is zero throughout, the norm of the result itself.
    """
    errors = {}
    for name, exact in expected.items():
        if name not in results:
            errors[name] = math.inf
            continue
        norm = exact.double().norm().item()
        difference = (results[name].double() - exact.double()).norm().item()
        error = difference / norm if norm > 0 else difference
        errors[name] = error if math.isfinite(error) else math.inf
    return errors


def _leaves(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: x.detach().requires_grad_() if name in DIFFERENTIABLE else x
        for name, x in inputs.items()
    }


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _results(
    o: Tensor,
    state: Tensor | None,
    leaves: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    results = {"o": o.detach()}
    outputs, seeds = [o], [gradients["o"].to(o.dtype)]
    if state is not None:
        results["final_state"] = state.detach()
        if "final_state" in gradients:
            outputs.append(state)
            seeds.append(gradients["final_state"].to(state.dtype))
    names = [name for name in DIFFERENTIABLE if name in leaves]
    found = torch.autograd.grad(outputs, [leaves[name] for name in names], seeds)
    results.update({f"d{name}": x for name, x in zip(names, found, strict=True)})
    return results
