"""Run a decoding case of the accuracy suite: calls over a few tokens, as servers and layers make.

Each call is compared with the fp64 reference: o, and the states where they lie. Slots that no index
names must keep their bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.family.decoding_reference import decode
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import recurrence_named
from gdn2gen.family.shapes import Shape
from gdn2gen.family.tolerances import LIMITS
from gdn2gen.measure.accuracy import inputs_of, relative_errors
from gdn2gen.measure.cases import Case
from gdn2gen.runtime.dtypes import TORCH_DTYPE

HEADS: Final = 8
# Sequences at which tiles are as large as they get, on a GPU.
MANY: Final = {"cuda": 300, "cpu": 4}
# Slots beside those that sequences have, which nothing may write; and what is in them.
_GUARDS: Final = 3
_GUARDED: Final = 1024.0


@dataclass(frozen=True)
class Call:
    """Tokens of each sequence, one number for a batch; and how states are given."""

    name: str
    tokens: tuple[int, ...]
    states: str
    """`pool`: in slots that indices name, one of them none; `guessed`: a slot after each token;
    `given`: initial and final states."""
    state_dtype: str = "fp32"
    v_first: bool = False
    in_kernel: bool = True
    """Norms, gate and the sigmoid of beta, as far as the op has them."""


def calls(device: str) -> tuple[Call, ...]:
    """What a case runs."""
    return (
        Call("token", (1,) * 5, "pool", v_first=True),
        Call("many", (1,) * MANY[torch.device(device).type], "pool", state_dtype="bf16"),
        Call("guessed", (3, 1, 0, 4), "guessed", in_kernel=False),
        Call("given", (4, 4), "given", v_first=True),
    )


def run_calls(
    case: Case, device: str, wanted: Sequence[Call] | None = None
) -> tuple[dict[str, float], str]:
    """Errors by call and tensor, and what is wrong, if anything is; of the calls that are `wanted`,
    else of those that a case runs.

    All have the limit of the case's dtype; that of states in a narrower one is brought to it.
    """
    errors: dict[str, float] = {}
    wrong = []
    limit = LIMITS[case.problem.dtype]
    for call in wanted or calls(device):
        found, touched = _run(case.problem, call, device)
        found["states"] *= limit / max(limit, LIMITS[call.state_dtype])
        for name, error in found.items():
            errors[f"{call.name}: {name}"] = error
            if not error <= limit:
                wrong.append(f"{call.name}: {name} {error:.1e} above {limit:.1e}")
        wrong += [f"{call.name}: {touched}"] if touched else []
    return errors, ", ".join(wrong)


def _run(problem: Problem, call: Call, device: str) -> tuple[dict[str, float], str]:
    from gdn2gen.ops import recurrent

    public = recurrence_named(problem.op).public
    asked = _asked(problem, call)
    batch = len({*call.tokens}) == 1
    ends = torch.tensor([0, *call.tokens]).cumsum(0).tolist()
    B, T = (len(call.tokens), call.tokens[0]) if batch else (1, ends[-1])
    shape = Shape(call.name, B, T, HEADS, None if batch else tuple(ends))
    inputs = inputs_of(replace(asked, varlen=not batch), shape, "layer", 0, device)
    flags: dict[str, Any] = {
        "use_qk_l2norm_in_kernel": asked.l2norm,
        "use_gate_in_kernel": asked.gate != "none",
        "use_beta_sigmoid_in_kernel": asked.beta_sigmoid,
        "state_v_first": call.v_first,
    }
    flags = {name: x for name, x in flags.items() if name in public.recurrent_arguments}
    serving = _states(asked, call, device, v_first=flags.get("state_v_first", False))
    exact: dict[str, Any] = {name: _exact(x) for name, x in serving.items()}
    o = torch.full_like(inputs["v"], float("nan"))
    there = dict(public.recurrent_names)
    _, state = getattr(recurrent, public.recurrent)(
        **{there.get(name, name): x for name, x in inputs.items()},
        **serving, **flags, output_final_state=True, out=o,
    )  # fmt: skip
    right = {"o": torch.zeros_like(o, dtype=torch.float64)}
    right["states"] = exact.get("state_pool", torch.zeros_like(_exact(state)))
    final = right["states"] if call.states == "given" else None
    exact |= {name: _exact(x) for name, x in inputs.items()}
    given = {name: exact.pop(name) for name in (*inputs, "initial_state") if name in exact}
    decode(recurrence_named(problem.op), given, right["o"], final, **exact, **flags)
    guards = _GUARDS if "state_pool" in serving else 0
    touched = "" if (state[:guards] == _GUARDED).all() else "a slot that no index names was written"
    right["states"] = right["states"][guards:]
    return relative_errors({"o": o, "states": state[guards:]}, right), touched


def _asked(problem: Problem, call: Call) -> Problem:
    """The problem with what the kernel is asked to do beside the recurrence."""
    member = recurrence_named(problem.op)
    takes = member.public.recurrent_arguments
    gated = call.in_kernel and "use_gate_in_kernel" in takes
    return replace(
        problem,
        initial_state=False,
        final_state=False,
        l2norm="use_qk_l2norm_in_kernel" in takes,
        gate="softplus" if gated else "none",
        has_A_log=gated and "A_log" in member.named,
        has_dt_bias=gated,
        beta_sigmoid=call.in_kernel and "use_beta_sigmoid_in_kernel" in takes,
        has_D=call.in_kernel and "D" in takes,
        has_z=call.in_kernel and "z" in takes,
    )


def _states(problem: Problem, call: Call, device: str, *, v_first: bool) -> dict[str, Tensor]:
    """Random states, and what says which are whose. Guards are the pool's first slots."""
    N, dtype = len(call.tokens), TORCH_DTYPE[call.state_dtype]
    inner = (problem.V, problem.K) if v_first else (problem.K, problem.V)
    generator = torch.Generator(device).manual_seed(7)

    def states(count: int) -> Tensor:
        found = torch.empty(count, HEADS, *inner, device=device)
        return found.normal_(generator=generator).to(dtype)

    if call.states == "given":
        return {"initial_state": states(N)}
    width = max(call.tokens) if call.states == "guessed" else 1
    pool = states(_GUARDS + N * width)
    pool[:_GUARDS] = _GUARDED
    order = torch.randperm(N * width, device=device, generator=generator).int() + _GUARDS
    if call.states == "guessed":
        accepted = torch.arange(N, device=device, dtype=torch.int32) % width + 1
        rows = order.view(N, width)
        return {"state_pool": pool, "ssm_state_indices": rows, "num_accepted_tokens": accepted}
    order[-1] = -1
    return {"state_pool": pool, "ssm_state_indices": order}


def _exact(x: Tensor) -> Tensor:
    """A copy, in fp64 where it is no index."""
    return x.double() if x.is_floating_point() else x.clone()
