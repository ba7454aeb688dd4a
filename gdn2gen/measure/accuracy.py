"""Errors of outputs and gradients against the fp64 reference, for the benchmark and the check."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.family.decays import DecayPattern
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import recurrence_named
from gdn2gen.family.shapes import Shape
from gdn2gen.runtime.dtypes import TORCH_DTYPE

OpFunction = Callable[..., tuple[Tensor, Tensor | None]]

# A bound on the decay per token where a problem with the sigmoid gate has none: FLA's own default.
LOWER_BOUND: Final = -5.0
# Of a gate's parameters, as in a freshly initialised layer; and where `strong` is asked for under a
# bound, which they take most tokens close to.
_USUAL: Final = {"rate": (1.0, 16.0), "bias": (-7.0, -2.0)}
_STRONG: Final = {"rate": (1.0, 1.3), "bias": (0.0, 1.0)}


def inputs_of(
    problem: Problem, shape: Shape, pattern: str | DecayPattern, seed: int, device: str
) -> dict[str, Tensor]:
    """Inputs of one call of `problem`: what its recurrence takes and its flags ask for.

    With a gate in the kernel the decay's input is a pre-activation, for which patterns mean little;
    it is then normal, larger where `strong` is asked for and a bound or a step allows it, and so is
    beta with its sigmoid there. Where q and k are not normalised in
    the kernel they are before, as a caller does: a delta rule with longer keys explodes.
    """
    from gdn2gen.family.inputs import make_inputs

    recurrence = recurrence_named(problem.op)
    inputs = make_inputs(
        shape.B,
        shape.T,
        shape.key_heads,
        problem.K,
        problem.V,
        op=problem.op,
        HV=shape.H,
        dtype=TORCH_DTYPE[problem.dtype],
        gate_dtype=TORCH_DTYPE[problem.gate_dtype],
        factor_dtype=TORCH_DTYPE[problem.dtype_of("factor")],
        device=device,
        pattern=pattern,
        seed=seed,
        cu_seqlens=shape.cu_seqlens,
        initial_state=problem.initial_state,
        rate=problem.has_rate,
    )
    if problem.initial_state and problem.state_v_first:
        inputs["initial_state"] = inputs["initial_state"].mT.contiguous()
    if problem.gate != "none" and recurrence.decay is not None:
        generator = torch.Generator(device).manual_seed(seed + 1)
        g = torch.empty_like(inputs[recurrence.decay.input]).normal_(generator=generator)
        strong = (problem.bound or recurrence.stepped) and pattern == "strong"
        inputs[recurrence.decay.input] = g.mul_(0.5).add_(3.0) if strong else g
        sizes = {"HG": shape.H, "HV": shape.H, "K": problem.K}
        for x in recurrence.optional:
            if x.draw in _USUAL and getattr(problem, x.when):
                drawn = torch.empty(math.prod(sizes[y] for y in x.symbols), device=device)
                drawn.uniform_(*(_STRONG if strong else _USUAL)[x.draw], generator=generator)
                inputs[x.name] = drawn.log() if x.draw == "rate" else drawn
    _draw_output(problem, shape, seed, inputs)
    if problem.beta_sigmoid and recurrence.erase is not None:
        generator = torch.Generator(device).manual_seed(seed + 3)
        inputs[recurrence.erase].normal_(generator=generator)
    if not problem.l2norm:
        for name in ("q", "k"):
            inputs[name] = torch.nn.functional.normalize(inputs[name], dim=-1)
    return inputs


def _draw_output(problem: Problem, shape: Shape, seed: int, inputs: dict[str, Tensor]) -> None:
    """What follows the recurrence, where `problem` has it: D, and the gate z."""
    v = inputs["v"]
    generator = torch.Generator(v.device).manual_seed(seed + 4)
    if problem.has_D:
        D = torch.empty(v.shape[2:], device=v.device)
        inputs["D"] = D.normal_(generator=generator)
    if problem.has_z:
        inputs["z"] = torch.empty_like(v).normal_(generator=generator)


def public_op(op: str) -> OpFunction:
    """Our op of a recurrence over whole sequences."""
    from gdn2gen.ops import chunk

    function: OpFunction = getattr(chunk, recurrence_named(op).public.chunk)
    return function


def op_flags(problem: Problem) -> dict[str, Any]:
    """The keywords that make the public op run `problem`; only those that the op takes."""
    flags = {
        "use_qk_l2norm_in_kernel": problem.l2norm,
        "use_gate_in_kernel": problem.gate != "none",
        "lower_bound": lower_bound_of(problem),
        "state_v_first": problem.state_v_first,
        "use_beta_sigmoid_in_kernel": problem.beta_sigmoid,
        "allow_neg_eigval": problem.neg_eigval,
    }
    taken = recurrence_named(problem.op).public.arguments
    return {name: value for name, value in flags.items() if name in taken}


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
    gradients = {"o": do.to(TORCH_DTYPE[problem.dtype])}
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
    leaves = _leaves(problem, inputs)
    o, state = function(**leaves, **op_flags(problem), output_final_state=problem.final_state)
    return _results(o, state, leaves, gradients)


def run_reference(
    problem: Problem, inputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The same as `run_op`, from the chunk form of the reference in fp64."""
    from gdn2gen.family import reference

    leaves = _leaves(problem, {name: _double(x) for name, x in inputs.items()})
    recurrence = recurrence_named(problem.op)
    flags = op_flags(problem)
    o, state = reference.chunk(recurrence, leaves, **flags, compute_dtype=torch.float64)
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


def _leaves(problem: Problem, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` in the order of the op's arguments; those with a gradient want one."""
    return {
        x.name: inputs[x.name].detach().requires_grad_(x.differentiable)
        for x in recurrence_named(problem.op).inputs
        if x.name in inputs
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
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    found = torch.autograd.grad(outputs, [*wanted.values()], seeds)
    results.update({f"d{name}": x for name, x in zip(wanted, found, strict=True)})
    return results
