"""Run one case of the accuracy suite: accuracy, causality or bitwise repetition."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.family.registry import recurrence_named
from gdn2gen.family.tolerances import (
    LIMITS,
    limit_of,
    over,
    roundings_of,
    slack_of,
    wider_limits,
)
from gdn2gen.measure.accuracy import (
    inputs_of,
    op_flags,
    output_gradients,
    public_op,
    relative_errors,
    run_op,
    run_reference,
)
from gdn2gen.measure.cases import Case
from gdn2gen.measure.decode_runs import run_calls

# What a value below the range of a dtype may lose, however small it is: fp16's last subnormal.
# Under a decay of -20 every gradient through the state lies there (exp(-20) = 2e-9).
LOST: Final = {"bf16": 0.0, "fp16": 2.0**-24, "fp32": 0.0}
# On a GPU; the interpreter is sequential, so twice is enough to see memory that was not written.
REPEATS: Final = {"cuda": 30, "cpu": 2}


@dataclass(frozen=True)
class Result:
    """What became of one case. `message` says why it failed and is empty otherwise."""

    name: str
    check: str
    passed: bool
    errors: dict[str, float] = field(default_factory=dict)
    """Relative error of every output and gradient (accuracy only)."""
    limit: float = 0.0
    message: str = ""
    seconds: float = 0.0
    wider: dict[str, float] = field(default_factory=dict)
    """Of those that may be off by more than `limit`."""

    @property
    def worst(self) -> tuple[str, float, float] | None:
        """Name, error and limit of the output that comes nearest to its limit."""
        found = [(x, error, self.wider.get(x, self.limit)) for x, error in self.errors.items()]
        return max(found, key=lambda x: x[1] / x[2] if x[2] else x[1], default=None)


def run_case(case: Case, device: str) -> Result:
    """Run `case` with the public op on `device`; what the op raises passes through.

    Buffers are filled with NaN before the kernels write them, so that what they leave out shows.
    """
    from gdn2gen.runtime.passes import poisoned

    started = time.perf_counter()
    with poisoned():
        result = _CHECKS[case.check](case, device)
    return replace(result, seconds=time.perf_counter() - started)


def case_inputs(case: Case, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of the op, and the gradients of its outputs."""
    inputs = inputs_of(case.problem, case.shape, case.pattern, 0, device)
    fewer = {"H": case.H, "HG": case.HG}
    for x in recurrence_named(case.problem.op).inputs:
        for place, symbol in enumerate(x.symbols):
            heads = fewer.get(symbol)
            if heads is not None and x.name in inputs:
                inputs[x.name] = _first_heads(inputs[x.name], place, heads, case.shape.H)
    state = inputs.get("initial_state")
    dims = (case.problem.V, case.problem.K)
    if state is not None and case.problem.state_v_first and state.shape[-2:] != dims:
        inputs["initial_state"] = state.mT.contiguous()
    return inputs, output_gradients(case.problem, case.shape, 0, device)


def _first_heads(x: Tensor, place: int, heads: int, of: int) -> Tensor:
    """The dim at `place` may hold others behind it, as that of dt_bias does."""
    return x.narrow(place, 0, x.shape[place] // of * heads).contiguous()


def _run(
    case: Case, inputs: Mapping[str, Tensor], grads: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return run_op(public_op(case.problem.op), case.problem, inputs, grads)


def errors_in_range(
    results: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: str
) -> dict[str, float]:
    """`relative_errors`, less what `dtype` cannot represent.

    The expected norm is widened so that LOST in every element counts as exactly LIMITS[dtype].
    """
    errors = relative_errors(results, expected)
    lost = LOST[dtype] / LIMITS[dtype]
    for name, exact in expected.items():
        norm = exact.double().norm().item()
        if norm > 0:
            errors[name] *= norm / (norm + lost * math.sqrt(exact.numel()))
    return errors


def _check_accuracy(case: Case, device: str) -> Result:
    inputs, grads = case_inputs(case, device)
    exact = run_reference(case.problem, inputs, grads)
    errors = errors_in_range(_run(case, inputs, grads), exact, case.problem.dtype)
    limit, roundings = limit_of(case.problem.dtype, case.pattern), roundings_of(case.problem)
    bad = over(errors, limit, case.problem.op, roundings)
    wrong = [f"{name} {error:.1e}" for name, error in bad.items()]
    message = f"above {limit:.1e}: {', '.join(wrong)}" if wrong else ""
    wider = wider_limits(limit, slack_of(case.problem.op), roundings)
    return Result(case.name, case.check, not wrong, errors, limit, message, wider=wider)


def _check_causality(case: Case, device: str) -> Result:
    """Change one token: outputs and gradients of the tokens before it must not move by a bit."""
    token = max(case.shape.T - 1 - case.shape.T // 4, 0) if case.shape.T > 32 else case.shape.T - 1
    inputs, grads = case_inputs(case, device)
    grads["o"][:, token:] = 0
    if "final_state" in grads:
        grads["final_state"].zero_()
    changed = {name: x.clone() for name, x in inputs.items()}
    recurrence = recurrence_named(case.problem.op)
    of_tokens = [x for x in recurrence.required if "T" in x.symbols]
    for x in of_tokens:
        changed[x.name][:, token] = inputs[x.name][:, 0] * 0.5
    if recurrence.decay is not None:
        # a step decays by a rate below 0
        changed[recurrence.decay.input][:, token] += 30 if recurrence.stepped else -30
    before, after = _run(case, inputs, grads), _run(case, changed, grads)
    names = ("o", *(f"d{x.name}" for x in of_tokens))
    moved = [x for x in names if not torch.equal(before[x][:, :token], after[x][:, :token])]
    message = f"token {token} moved earlier tokens of {', '.join(moved)}" if moved else ""
    return Result(case.name, case.check, not moved, message=message)


def _check_empty(case: Case, device: str) -> Result:
    """Without tokens the state passes through unchanged, and so does its gradient."""
    inputs, grads = case_inputs(case, device)
    leaves: dict[str, Any] = {name: x.requires_grad_() for name, x in inputs.items()}
    function = public_op(case.problem.op)
    o, state = function(**leaves, **op_flags(case.problem), output_final_state=True)
    assert state is not None
    initial, dht = inputs["initial_state"], grads["final_state"]
    (dh0,) = torch.autograd.grad([state], [initial], [dht])
    right = {
        "o": o.shape == inputs["v"].shape,
        "final_state": torch.equal(state, initial),
        "dinitial_state": torch.equal(dh0, dht),
    }
    bad = [name for name, fine in right.items() if not fine]
    message = f"wrong without tokens: {', '.join(bad)}" if bad else ""
    return Result(case.name, case.check, not bad, message=message)


def _check_repeat(case: Case, device: str) -> Result:
    """The same call gives the same bits."""
    inputs, grads = case_inputs(case, device)
    first = _run(case, inputs, grads)
    bad = [name for name, x in first.items() if not math.isfinite(x.double().norm().item())]
    if bad:
        return Result(case.name, case.check, False, message=f"not finite: {', '.join(bad)}")
    repeats = REPEATS[torch.device(device).type]
    for repeat in range(1, repeats):
        again = _run(case, inputs, grads)
        moved = [name for name, x in first.items() if not torch.equal(x, again[name])]
        if moved:
            message = f"call {repeat + 1} of {repeats} differs in {', '.join(moved)}"
            return Result(case.name, case.check, False, message=message)
    return Result(case.name, case.check, passed=True)


def _check_decoding(case: Case, device: str) -> Result:
    errors, message = run_calls(case, device)
    limit = LIMITS[case.problem.dtype]
    return Result(case.name, case.check, not message, errors, limit, message)


_CHECKS: Final = {
    "accuracy": _check_accuracy,
    "causality": _check_causality,
    "decoding": _check_decoding,
    "empty": _check_empty,
    "repeat": _check_repeat,
}
