"""A decay's gate by itself, and calls that have theirs apart: in the interpreter, on a GPU.

Every buffer that a kernel has to write begins as NaN. Each check raises AssertionError, or returns
the worst error over the largest value, or what a test asks for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from unittest.mock import patch

import op_checks
import torch
from op_checks import LIMIT, activated, gate_parameters, make
from part_cases import Knobs, forced
from torch import Tensor

from gdn2gen.base.environment import verifying
from gdn2gen.base.errors import InputError, UnsupportedError
from gdn2gen.family.activations import activate_gate
from gdn2gen.measure.accuracy import public_op
from gdn2gen.ops import _gates
from gdn2gen.ops.decay_gate import decay_gate, prepared
from gdn2gen.runtime import decay_gate as kernels
from gdn2gen.runtime.passes import poisoned

SWITCH: Final = "GDN2GEN_GATE_APART"


@contextmanager
def apart(wanted: bool | None) -> Iterator[None]:
    """Every gate that can be is apart inside, or none; None is as calls find."""
    with patch.dict(os.environ):
        os.environ.pop(SWITCH, None)
        if wanted is not None:
            os.environ[SWITCH] = str(int(wanted))
        yield


@dataclass(frozen=True)
class Gate:
    """A call of the gate alone."""

    rows: tuple[int, ...] = (2, 37)
    heads: int = 3
    size: int = 24
    lower_bound: float | None = None
    dtype: torch.dtype = torch.float32
    parameters: tuple[str, ...] = ("A_log", "dt_bias")
    hostile: bool = False
    """Pre-activations and parameters far out on both sides."""
    knobs: Knobs = ()
    device: str = "cpu"

    def inputs(self) -> list[Tensor | None]:
        """x, A_log and dt_bias."""
        torch.manual_seed(0)
        far = 40.0 if self.hostile else 3.0
        x = far * torch.randn(*self.rows, self.heads, self.size)
        made = {
            "A_log": torch.randn(self.heads) * (3 if self.hostile else 1),
            "dt_bias": torch.randn(self.heads * self.size) * far,
        }
        found = [x.to(self.dtype), *(made[y] if y in self.parameters else None for y in made)]
        return [None if y is None else y.to(self.device) for y in found]


def gate(case: Gate) -> float:
    """g and gradients, twice the same bits; without gradients, too."""
    with forced(decay_gate=case.knobs, decay_gate_backward=case.knobs):
        return _gate(case)


def _gate(case: Gate) -> float:
    given = [None if x is None else x.requires_grad_() for x in case.inputs()]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in given]
    leaves, exact_leaves = ([x for x in y if x is not None] for y in (given, exact))
    with poisoned():
        g = decay_gate(*given, lower_bound=case.lower_bound)  # type: ignore[arg-type]
        dg = torch.randn_like(g)
        found = torch.autograd.grad(g, leaves, dg, retain_graph=True)
        again = torch.autograd.grad(g, leaves, dg)
        with torch.no_grad():
            plain = decay_gate(*given, lower_bound=case.lower_bound)  # type: ignore[arg-type]
    assert g.dtype == torch.float32 and torch.equal(g, plain)
    assert all(map(torch.equal, found, again))
    assert [x.dtype for x in found] == [x.dtype for x in leaves]
    wanted = activate_gate(*exact, case.lower_bound)  # type: ignore[arg-type]
    right = torch.autograd.grad(wanted, exact_leaves, dg.double())
    errors = [_error(g, wanted.detach())]
    errors += [_error(*pair) for pair in zip(found, right, strict=True)]
    return max(errors)


def _error(found: Tensor, wanted: Tensor) -> float:
    found = found.detach()
    assert found.isfinite().all()
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def not_finite(device: str = "cpu") -> bool:
    """Infinities are what they are in fp64, and NaN stays NaN and where it was."""
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 200.0, -200.0, 1.0, 2.0])
    x = x.to(device).view(1, 1, 8).requires_grad_()
    A_log = torch.zeros(1, device=device)
    for lower_bound in (None, -5.0):
        g = decay_gate(x, A_log, lower_bound=lower_bound)
        (dx,) = torch.autograd.grad(g.sum(), x)
        exact = x.detach().double().requires_grad_()
        wanted = activate_gate(exact, A_log.double(), None, lower_bound)
        (right,) = torch.autograd.grad(wanted.sum(), exact)
        close = {"rtol": 1e-6, "atol": 1e-30, "equal_nan": True}
        torch.testing.assert_close(g.double(), wanted, **close)
        assert torch.equal(dx.isnan(), right.isnan())
        torch.testing.assert_close(dx.double(), right, **close | {"atol": 1e-12})
    return True


# Calls


def call(op: str, lower_bound: float | None = None, **changes: Any) -> dict[str, Any]:
    """A call with all that kernels activate: two heads of K=32, V=64, in two sequences."""
    given = make(op, **changes) | gate_parameters(op) | activated(op)
    return given if lower_bound is None else given | {"lower_bound": lower_bound}


def beside_fp64(op: str, level: str, **changes: Any) -> dict[str, float]:
    """Errors of a call with its gate apart, and of all gradients."""
    function = partial(public_op(op), disable_recompute=level == "fast")
    with apart(True), patch.object(op_checks, "public_op", lambda _: function):
        return op_checks.compare(op, call(op, **changes))


def agree(op: str, device: str = "cpu", **changes: Any) -> bool:
    """Outputs and every gradient of a call, apart and not, are the same but for rounding; kernels
    ran, and the op was called without a gate."""
    found = []
    for wanted in (False, True):
        with apart(wanted), _watched() as seen:
            found.append(_all(call(op, **changes), op, device))
        assert len(seen) == wanted, "the gate ran apart once where it was to, and not otherwise"
    for name, one in found[0].items():
        other = found[1][name]
        assert one.dtype == other.dtype
        bound = LIMIT if one.dtype == torch.float32 else 2e-2
        assert float((one - other).abs().max()) <= bound * float(one.abs().max()), name
    return True


@contextmanager
def _watched() -> Iterator[list[Any]]:
    seen: list[Any] = []
    run = _gates.Gate.__call__

    def watched(self: Any, tensors: Any) -> Any:
        seen.append(tensors)
        return run(self, tensors)

    with patch.object(_gates.Gate, "__call__", watched):
        yield seen


@verifying()
def _all(
    given: dict[str, Any], op: str, device: str = "cpu", into: Any = None
) -> dict[str, Tensor]:
    leaves = {
        name: x.detach().to(device).requires_grad_(x.is_floating_point())
        if isinstance(x, Tensor)
        else x
        for name, x in given.items()
    }
    o, state = (into or public_op(op))(**leaves, output_final_state=True)
    wanted = [name for name, x in leaves.items() if isinstance(x, Tensor) and x.requires_grad]
    torch.manual_seed(1)
    towards = [torch.randn_like(o), torch.randn_like(state)]
    found = torch.autograd.grad([o, state], [leaves[name] for name in wanted], towards)
    return {"o": o.detach(), "state": state.detach(), **dict(zip(wanted, found, strict=True))}


def repeated(op: str, device: str = "cpu", parameters: torch.dtype = torch.float32) -> int:
    """Calls like one before have its bits, with gradients and without; how many gates ran by what
    was kept of the first."""
    seen: list[Any] = []
    forward = kernels.KnownGate.forward

    def watched(self: Any, *given: Tensor) -> Tensor:
        seen.append(self)
        return forward(self, *given)

    given = call(op)
    given["A_log"] = torch.tensor([-1.37, 1.71]).to(parameters)  # of which no exp is short
    given["dt_bias"] = given["dt_bias"].to(parameters)
    with apart(True), patch.object(kernels.KnownGate, "forward", watched):
        first = _all(given, op, device)
        for _ in range(2):
            again = _all(given, op, device)
            assert all(torch.equal(x, again[name]) for name, x in first.items())
        moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
        with torch.no_grad(), verifying():
            o, state = public_op(op)(**moved, output_final_state=True)
        assert torch.equal(o, first["o"]) and torch.equal(state, first["state"])
    return len(seen) - len({*map(id, seen)})


def compiled(op: str, device: str = "cpu", backend: str = "aot_eager") -> int:
    """One whole graph for all lengths, with the bits of eager mode; how many graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(public_op(op), fullgraph=True, backend=backend, dynamic=True)
    with apart(True):
        for T in (20, 33, 70):
            given = call(op, T=T)
            wanted = _all(given, op, device)
            found = _all(given, op, device, step)
            assert all(torch.equal(x, found[name]) for name, x in wanted.items())
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def opcheck(device: str = "cpu") -> bool:
    case = Gate(rows=(1, 9), device=device)
    for lower_bound in (None, -5.0):
        given = [x.requires_grad_() for x in case.inputs() if x is not None]
        torch.library.opcheck(kernels.GATE, (*given, lower_bound))
    return True


def served(op: str, device: str = "cpu") -> bool:
    """Prefill into slots of a pool, and states on the way."""
    found = []
    for wanted in (False, True):
        given = call(op, B=1, T=96, initial_state=False)
        given = {x: y.to(device) if isinstance(y, Tensor) else y for x, y in given.items()}
        pool = torch.zeros(2, 2, 32, 64, device=device)
        slots = torch.tensor([1], dtype=torch.int32, device=device)
        with apart(wanted), torch.no_grad(), verifying(), _watched() as seen:
            o, _ = public_op(op)(**given, state_pool=pool, ssm_state_indices=slots)
            more = public_op(op)(**given, return_intermediate_states=True)
        assert len(seen) == 2 * wanted
        found.append([o, pool, more[0], more[2]])
    for one, other in zip(*found, strict=True):
        assert float((one - other).abs().max()) <= LIMIT * float(one.abs().max())
    return True


def refuses_twice(op: str | None) -> bool:
    """A gradient of a gradient is refused, of a call and of the gate alone, also where torch would
    do without what it takes for no part of the graph; by the op, too."""
    given = call(op or "gdn2")
    g, A_log = (given[x].requires_grad_() for x in ("g", "A_log"))
    for ran in range(3):
        if op is not None:
            with apart(True), verifying():
                y, _ = public_op(op)(**given)
        elif ran == 2:
            y = kernels.GATE(*prepared(g, A_log, None, None), None)
        else:
            y = decay_gate(g, A_log)
        for into in (g, A_log):
            (once,) = torch.autograd.grad(y.square().sum(), into, create_graph=True)
            try:
                torch.autograd.grad(once.square().sum() + g.sum() + A_log.sum(), [g, A_log])
            except UnsupportedError as error:
                assert "differentiated once" in str(error)
            else:
                raise AssertionError("a second derivative was none")
    return True


def checkpointed(op: str) -> bool:
    """By torch's checkpoints, which call it once more in the backward."""
    function = public_op(op)

    def run(**given: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, **given, use_reentrant=False)

    with apart(True):
        wanted, found = _all(call(op), op), _all(call(op), op, into=run)
    assert all(torch.equal(x, found[name]) for name, x in wanted.items())
    return True


def agree_by_kernels(op: str, changes: dict[str, Any]) -> bool:
    return agree(op, **changes)


def refusals() -> list[str]:
    x, two = torch.zeros(1, 2, 8), torch.zeros(2)
    calls: list[tuple[Tensor, dict[str, Any]]] = [
        (x, {}),
        (x, {"A_log": torch.zeros(3)}),
        (x, {"A_log": two, "dt_bias": torch.zeros(8)}),
        (x, {"lower_bound": 1.0}),
        (torch.zeros(8), {"A_log": two}),
    ]
    found = []
    for given, words in calls:
        try:
            decay_gate(given, **words)
        except InputError as error:
            found.append(str(error))
    return found


def no_tokens() -> bool:
    x, A_log, dt_bias = (torch.zeros(n, requires_grad=True) for n in (0, 2, 16))
    g = decay_gate(x.view(0, 2, 8), A_log, dt_bias)
    found = torch.autograd.grad(g.sum(), (x, A_log, dt_bias))
    assert g.shape == (0, 2, 8) and not any(y.any() for y in found)
    return True
