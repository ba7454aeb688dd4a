"""Run Mamba-3's cases of the accuracy suite: its ops beside the recurrence in fp64."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.mamba3 import States, recurrent
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.family.tolerances import limit_of, narrowings, wider_limits
from gdn2gen.measure.case_runs import REPEATS, Result, errors_in_range
from gdn2gen.measure.mamba3_cases import Mamba3Case
from gdn2gen.runtime.dtypes import DTYPE_NAME, TORCH_DTYPE

Named = dict[str, Tensor]
# dt of a layer that begins to learn, log-uniform.
_STEPS: Final = (1e-3, 0.1)


def mamba3_inputs(
    problem: Mamba3Problem, shape: Shape, pattern: str, seed: int, device: str
) -> Named:
    """The op's tensors by name, of Input_States one by one as `States` calls them.

    ADT decays as `inputs.PATTERNS` say of a decay per head, whatever DT is.
    """
    B, T, H, N, P = shape.B, shape.T, shape.H, problem.state_size, problem.head_dim
    scan = make_inputs(
        *(B, T, shape.key_heads, N, P),
        op="simple_gla",
        HV=H,
        dtype=TORCH_DTYPE[problem.dtype],
        device=device,
        pattern=pattern,
        seed=seed,
        cu_seqlens=shape.cu_seqlens,
    )
    rng = torch.Generator(device).manual_seed(seed + 1)

    def normal(*size: int, of: str = "fp32") -> Tensor:
        return torch.randn(size, device=device, generator=rng).to(TORCH_DTYPE[of])

    low, high = map(math.log, _STEPS)
    DT = torch.empty(B, H, T, device=device).uniform_(low, high, generator=rng).exp_()
    made = {
        "Q": scan["q"], "K": scan["k"], "V": scan["v"],
        "ADT": scan["g"].transpose(1, 2).contiguous(), "DT": DT,
        "Trap": normal(B, H, T, of=problem.trap_dtype),
        "Q_bias": 1.0 + 0.1 * normal(H, N), "K_bias": 1.0 + 0.1 * normal(H, N),
        "Angles": normal(B, T, H, problem.angles, of=problem.angle_dtype),
    }  # fmt: skip
    if problem.skip:
        made["D"] = normal(H)
    if problem.gate:
        made["Z"] = normal(B, T, H, P, of=problem.dtype)
    if problem.carried:
        n, turn = shape.regime.sequences, 2 * math.pi
        angle = torch.empty(n, H, problem.angles, device=device).uniform_(0, turn, generator=rng)
        made |= {"angle": angle, "ssm": normal(n, H, P, N), "k": normal(n, H, N)}
        made["v"] = normal(n, H, P, of=problem.dtype)
    if "cu_seqlens" in scan:
        made["cu_seqlens"] = scan["cu_seqlens"]
    return made


def mamba3_arguments(made: Mapping[str, Any]) -> dict[str, Any]:
    """The op's keywords."""
    found = dict(made)
    if "ssm" in found:
        found["Input_States"] = tuple(found.pop(name) for name in States._fields)
    return found


def mamba3_results(
    made: Named, op: Callable[..., Any], *, wide: bool = False, peer: bool = False
) -> tuple[Named, Named]:
    """Outputs and gradients of an op with `mamba3_siso_combined`'s arguments, and those of the
    recurrence in fp64, by name; `wide`: the op's in fp64, too. Of a `peer` some outputs may have no
    gradient: those of its inputs are of the others then, on both sides."""
    floating = {x: y for x, y in made.items() if y.is_floating_point()}
    exact = {x: y.double().requires_grad_() for x, y in floating.items()}
    ours = {x: (y.double() if wide else y).clone().requires_grad_() for x, y in floating.items()}
    found = pointing(op(**mamba3_arguments({**made, **ours}), return_final_states=True))
    out, states = recurrent(**mamba3_arguments({**made, **exact}))
    right = pointing((out, *states))
    rng = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=rng).to(x.device) for x in right]
    with_one = [i for i, x in enumerate(found) if x.requires_grad or not peer]
    given = torch.autograd.grad(
        [found[i] for i in with_one],
        [*ours.values()],
        [seeds[i].to(found[i].dtype) for i in with_one],
        allow_unused=peer,
        materialize_grads=peer,
    )
    wanted = torch.autograd.grad(
        [right[i] for i in with_one], [*exact.values()], [seeds[i].double() for i in with_one],
        allow_unused=peer, materialize_grads=peer,
    )  # fmt: skip
    names = ("out", *(f"last {x}" for x in States._fields))
    mine = dict(zip(names, (x.detach() for x in found), strict=True))
    theirs = dict(zip(names, (x.detach() for x in right), strict=True))
    mine |= {f"d{x}": y for x, y in zip(ours, given, strict=True)}
    theirs |= {f"d{x}": y for x, y in zip(exact, wanted, strict=True)}
    return mine, theirs


def pointing(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs with an angle by where it points."""
    out, angle, *rest = found
    return (out, angle.cos() + 2 * angle.sin(), *rest)


def run_mamba3_case(case: Mamba3Case, device: str) -> Result:
    """Run `case` with the public ops on `device`; what they raise passes through.

    Buffers are filled with NaN before the kernels write them, so that what they leave out shows.
    """
    from gdn2gen.runtime.passes import poisoned

    started = time.perf_counter()
    with poisoned():
        result = _CHECKS[case.check](case, device)
    return replace(result, seconds=time.perf_counter() - started)


def _combined(**arguments: Any) -> Any:
    from gdn2gen.ops.mamba3 import mamba3_siso_combined

    return mamba3_siso_combined(**arguments)


def _op_of(case: Mamba3Case) -> Callable[..., Any]:
    return partial(_combined, disable_recompute=case.level == "fast")


def _inputs(case: Mamba3Case, device: str) -> Named:
    return mamba3_inputs(case.problem, case.shape, case.pattern, 0, device)


def _check_accuracy(case: Mamba3Case, device: str) -> Result:
    made = _inputs(case, device)
    mine, theirs = mamba3_results(made, _op_of(case))
    return _judged(case, mine, theirs)


def _judged(case: Mamba3Case, mine: Named, theirs: Named) -> Result:
    """Each within the limit of the case's dtype, and what rounding to its own takes beside it."""
    dtype = case.problem.dtype
    limit, errors = limit_of(dtype, case.pattern), errors_in_range(mine, theirs, dtype)
    taken = narrowings(dtype, {x: DTYPE_NAME[y.dtype] for x, y in mine.items()})
    wider = wider_limits(limit, {}, taken)
    wrong = [f"{x} {y:.1e}" for x, y in errors.items() if not y <= wider.get(x, limit)]
    message = f"above {limit:.1e}: {', '.join(wrong)}" if wrong else ""
    return Result(case.name, case.check, not wrong, errors, limit, message, wider=wider)


def _check_steps(case: Mamba3Case, device: str) -> Result:
    """Token by token, with the states of the token before, is the whole."""
    from gdn2gen.ops.mamba3 import mamba3_siso_step

    made = _inputs(case, device)
    exact = {x: y.double() if y.is_floating_point() else y for x, y in made.items()}
    whole, last = recurrent(**mamba3_arguments(exact))
    states: Any = mamba3_arguments(made)["Input_States"]
    tokens = [x for x in made if x not in States._fields]
    outputs = []
    for t in range(case.shape.T):
        out, states = mamba3_siso_step(
            **{x: _token(x, made[x], t) for x in tokens}, Input_States=tuple(states)
        )
        outputs.append(out)
    names = ("out", *(f"last {x}" for x in States._fields))
    mine = dict(zip(names, pointing((torch.stack(outputs, 1), *states)), strict=True))
    theirs = dict(zip(names, pointing((whole, *last)), strict=True))
    return _judged(case, mine, theirs)


def _token(name: str, x: Tensor, t: int) -> Tensor:
    if name in ("ADT", "DT", "Trap"):
        return x[..., t]
    return x[:, t] if name in ("Q", "K", "V", "Z", "Angles") else x


def _check_causality(case: Mamba3Case, device: str) -> Result:
    """Change later tokens: no output before them may move by a bit."""
    token = case.shape.T - case.shape.T // 4
    made = _inputs(case, device)
    changed = {x: y.clone() for x, y in made.items()}
    for name in ("Q", "K", "V", "Z", "Angles"):
        if name in changed:
            changed[name][:, token:] *= -3.0
    for name in ("ADT", "DT", "Trap"):
        changed[name][..., token:] *= 2.5
    before, after = (_combined(**mamba3_arguments(x)) for x in (made, changed))
    if not torch.equal(before[:, :token], after[:, :token]):
        message = f"tokens from {token} on moved out of earlier ones"
        return Result(case.name, case.check, False, message=message)
    moved = not torch.equal(before[:, token], after[:, token])
    return Result(case.name, case.check, moved, message="" if moved else "nothing moved at all")


def _check_repeat(case: Mamba3Case, device: str) -> Result:
    """The same call gives the same bits, gradients included."""
    made = _inputs(case, device)
    leaves = {x: y.requires_grad_() for x, y in made.items() if y.is_floating_point()}

    def run() -> Named:
        found = _combined(**mamba3_arguments({**made, **leaves}), return_final_states=True)
        seeds = [torch.ones_like(x) for x in found]
        gradients = torch.autograd.grad(found, [*leaves.values()], seeds)
        named = dict(zip(("out", *States._fields), (x.detach() for x in found), strict=True))
        return named | {f"d{x}": y for x, y in zip(leaves, gradients, strict=True)}

    first = run()
    bad = [name for name, x in first.items() if not math.isfinite(x.double().norm().item())]
    if bad:
        return Result(case.name, case.check, False, message=f"not finite: {', '.join(bad)}")
    repeats = REPEATS[torch.device(device).type]
    for repeat in range(1, repeats):
        again = run()
        moved = [name for name, x in first.items() if not torch.equal(x, again[name])]
        if moved:
            message = f"call {repeat + 1} of {repeats} differs in {', '.join(moved)}"
            return Result(case.name, case.check, False, message=message)
    return Result(case.name, case.check, True)


def _check_empty(case: Mamba3Case, device: str) -> Result:
    """Without tokens the states pass through unchanged."""
    made = _inputs(case, device)
    out, *states = _combined(**mamba3_arguments(made), return_final_states=True)
    right = {"out": out.shape == made["V"].shape}
    right |= {x: torch.equal(y, made[x]) for x, y in zip(States._fields, states, strict=True)}
    bad = [name for name, fine in right.items() if not fine]
    message = f"wrong without tokens: {', '.join(bad)}" if bad else ""
    return Result(case.name, case.check, not bad, message=message)


_CHECKS: Final[Mapping[str, Callable[[Mamba3Case, str], Result]]] = {
    "accuracy": _check_accuracy,
    "causality": _check_causality,
    "empty": _check_empty,
    "repeat": _check_repeat,
    "steps": _check_steps,
}
