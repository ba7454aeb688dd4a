"""Where a NaN or an infinity among the inputs must come out, and where it must not.

Against the recurrence in fp64, token by token, which spreads it just as far as the equation does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gdn2gen.family import reference
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import recurrence_named
from gdn2gen.family.shapes import Shape
from gdn2gen.measure.accuracy import op_flags
from gdn2gen.measure.case_runs import case_inputs
from gdn2gen.measure.cases import Case

Tensors = dict[str, Tensor]
Run = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensors]


@dataclass(frozen=True)
class Layout:
    """Sizes for chunks of BT tokens: whole ones before and after the token that is changed."""

    BT: int
    packed: bool

    @property
    def token(self) -> int:
        return self.BT + 6

    @property
    def shape(self) -> Shape:
        # the second sequence ends 4 tokens before `token`, which lies in the rest of its chunk
        ends = (0, 9, self.token - 4, self.token - 4, 2 * self.BT + 12)
        return Shape("not-finite", 1, ends[-1], 2, ends if self.packed else None)

    def chunk(self, spot: Spot) -> slice:
        """The tokens of the chunk that `spot` is in, or that reads it first; all for parameters."""
        if spot.name in ("A_log", "dt_bias") or spot.part == "head":
            return slice(None)
        if spot.name == "initial_state":
            first = self.token - 4 if self.packed else 0
        elif spot.name == "final_state":
            first = self.token - 4 + self.BT if self.packed else 2 * self.BT
        else:
            first = self.token - 4 if self.packed else self.BT
        return slice(first, first + self.BT)


@dataclass(frozen=True)
class Spot:
    """What is not finite: one value of the first head, all of one token's, or all of the head's."""

    name: str
    """An input, or o or final_state: then its gradient."""
    value: float = float("nan")
    part: Literal["value", "token", "head"] = "value"

    def __str__(self) -> str:
        where = "" if self.part == "value" else f", the whole {self.part}"
        return f"{self.value} in {self.name}{where}"

    def put(self, tensors: Tensors, token: int) -> Tensors:
        """`tensors` with it, if they have that name."""
        if self.name not in tensors:
            return tensors
        x = tensors[self.name].clone()
        if "state" in self.name:
            x[-1, 0, 3, 5] = self.value
        elif self.name == "A_log":
            x[0] = self.value
        elif self.name == "dt_bias":
            x.view(-1)[3] = self.value
        else:
            rows = slice(None) if self.part == "head" else token
            channel = 3 if self.part == "value" else slice(None)
            x[(0, rows, 0, channel)[: x.ndim]] = self.value  # of beta, a head is one value
        return {**tensors, self.name: x}


def spots(problem: Problem) -> Iterator[Spot]:
    """NaN in every tensor, and infinities in those that may have none."""
    recurrence = recurrence_named(problem.op)
    per_token = [x.name for x in recurrence.required]
    decay = recurrence.decay and recurrence.decay.input
    flags = {
        "initial_state": problem.initial_state,
        "final_state": problem.final_state,
        "A_log": problem.has_A_log,
        "dt_bias": problem.has_dt_bias,
    }
    for name in (*per_token, "o", *(name for name, given in flags.items() if given)):
        yield Spot(name)
    if decay:
        yield from (Spot(decay, part="token"), Spot(decay, part="head"))
    yield from (Spot(name, value=float("inf")) for name in per_token if name != decay)


def faults(
    problem: Problem, BT: int, run: Run, device: str, chosen: Iterable[Spot] | None = None
) -> list[str]:
    """What is wrong with `run`, which gives the op's outputs and gradients; none if all is well.

    Whatever depends on a NaN is one; what does not depend on it is moved by no bit, or is in its
    chunk, where the products of the chunk form may spread it.
    """
    layout = Layout(BT, problem.varlen)
    case = Case("not-finite", problem, layout.shape, "layer")
    inputs, grads = case_inputs(case, device)
    clean = run(inputs, grads)
    found = [f"not finite without cause: {x}" for x, y in clean.items() if not y.isfinite().all()]
    for spot in spots(problem) if chosen is None else chosen:
        given = spot.put(inputs, layout.token), spot.put(grads, layout.token)
        right = _recurrence(problem, *given)
        for name, x in run(*given).items():
            words = _compare(x, clean[name], right[name], layout, spot)
            found += [f"{spot}: {words} in {name}"] if words else []
    return found


def _compare(x: Tensor, clean: Tensor, right: Tensor, layout: Layout, spot: Spot) -> str:
    lost = ~right.isfinite() & x.isfinite()
    if lost.any():
        return f"{int(lost.sum())} of {int((~right.isfinite()).sum())} are finite"
    moved = x.isfinite() & (x != clean)
    if math.isnan(spot.value) and moved.any():
        return f"{int(moved.sum())} are finite, but moved"
    spread = right.isfinite() & ~x.isfinite()
    if x.ndim >= 3 and x.shape[1] == layout.shape.T:
        spread[:, layout.chunk(spot), 0] = False
    return f"spread to {int(spread.sum())} that do not depend on it" if spread.any() else ""


def _recurrence(
    problem: Problem, inputs: Mapping[str, Tensor], grads: Mapping[str, Tensor]
) -> Tensors:
    recurrence = recurrence_named(problem.op)
    leaves: dict[str, Any] = {
        name: x.double().requires_grad_() if name in recurrence.gradients else x
        for name, x in inputs.items()
    }
    flags = op_flags(problem)
    o, state = reference.recurrent(recurrence, leaves, **flags, compute_dtype=torch.float64)
    outputs, seeds = [o], [grads["o"].double()]
    results = {"o": o.detach()}
    if problem.final_state:
        outputs, seeds = [o, state], [*seeds, grads["final_state"].double()]
        results["final_state"] = state.detach()
    names = [name for name in recurrence.gradients if name in leaves]
    found = torch.autograd.grad(outputs, [leaves[name] for name in names], seeds)
    return results | {f"d{name}": x for name, x in zip(names, found, strict=True)}
