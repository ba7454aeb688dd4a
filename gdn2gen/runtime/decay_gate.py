"""A decay's gate by itself: launches, calls that are like one before, its ops in torch.library.

As with the other parts of a layer (`parts`, `part_calls`, `parts_ops`). Parameters are in fp32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.base.errors import UnsupportedError
from gdn2gen.family.parts import DecayGateProblem
from gdn2gen.kernels.parts import (
    DECAY_GATE,
    DECAY_GATE_BACKWARD,
    PartStage,
    decay_gate_knobs,
    decay_gate_turns,
)
from gdn2gen.kernels.rows import UNIT
from gdn2gen.runtime import part_calls, parts, parts_ops
from gdn2gen.runtime._operands import readable
from gdn2gen.runtime.dtypes import DTYPE_NAME
from gdn2gen.runtime.lookup import device_of
from gdn2gen.runtime.passes import empty, maker


def gate_problem(x: Tensor, lower_bound: float | None) -> DecayGateProblem:
    return DecayGateProblem(
        dtype=DTYPE_NAME[x.dtype],
        size=int(x.shape[-1]),
        gate="softplus" if lower_bound is None else "sigmoid",
    )


@lru_cache(maxsize=512)
def gating(stage: PartStage, problem: DecayGateProblem, device: torch.device) -> parts.Loaded:
    return parts._load(stage, problem, decay_gate_knobs(stage), device)


parts.ON_FORCE.append(gating.cache_clear)


class _Sizes:
    """Of a call: tokens, channels of all heads, and what launches are told of them."""

    def __init__(self, x: Tensor, lower_bound: float | None) -> None:
        self.channels = x.shape[-2] * x.shape[-1]
        self.tokens = x.numel() // self.channels if self.channels else 0
        self.scalars: dict[str, Any] = {"M": self.tokens, "units": self.channels // UNIT}
        if lower_bound is not None:
            self.scalars["lower_bound"] = lower_bound

    def of_backward(self, loaded: parts.Loaded, sms: int) -> tuple[dict[str, Any], int]:
        """Its scalars, and its rows of partial sums."""
        config = loaded.config
        rows = config.size("ahead") * config.size("BR")
        turns = decay_gate_turns(rows, self.tokens, self.channels, config.size("BD"), sms)
        return self.scalars | {"turns": turns}, -(-self.tokens // (turns * rows))


def gate(x: Tensor, A_log: Tensor, dt_bias: Tensor, lower_bound: float | None) -> Tensor:
    """g [..., HG, K] in fp32; A_log [HG] and dt_bias [HG * K] in fp32."""
    sizes, device = _Sizes(x, lower_bound), x.device
    g = empty(x.shape, torch.float32, device)
    if x.numel():
        loaded = gating(DECAY_GATE, gate_problem(x, lower_bound), device)
        with parts._on(device):
            loaded.launch(*readable([x, A_log, dt_bias]), g, **sizes.scalars)
    return g


def gate_backward(
    dg: Tensor, x: Tensor, A_log: Tensor, dt_bias: Tensor, lower_bound: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, A_log and dt_bias."""
    sizes, device = _Sizes(x, lower_bound), x.device
    dx, dA_log, ddt_bias = (empty(y.shape, y.dtype, device) for y in (x, A_log, dt_bias))
    if not x.numel():
        return dx, dA_log.zero_(), ddt_bias.zero_()
    loaded = gating(DECAY_GATE_BACKWARD, gate_problem(x, lower_bound), device)
    scalars, rows = sizes.of_backward(loaded, device_of(device).sms)
    partial = empty((rows, 2, sizes.channels), torch.float32, device)
    with parts._on(device):
        given = readable([x, A_log, dt_bias, dg])
        loaded.launch(*given, dx, dA_log, ddt_bias, partial, **scalars)
    return dx, dA_log, ddt_bias


# For tracers


def _fake(x: Tensor, A_log: Tensor, dt_bias: Tensor, lower_bound: float | None) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _backward_fake(
    dg: Tensor, x: Tensor, A_log: Tensor, dt_bias: Tensor, lower_bound: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), A_log.new_empty(A_log.shape), dt_bias.new_empty(dt_bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.lower_bound = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dg: Tensor) -> tuple[Any, ...]:
    return (*_BACKWARD(dg, *ctx.saved_tensors, ctx.lower_bound), None)


def _refuse_twice(ctx: Any, *_: Any) -> Any:
    raise UnsupportedError("a decay's gate can be differentiated once, backwards, not twice")


_TENSORS: Final = "Tensor x, Tensor A_log, Tensor dt_bias, float? lower_bound"
_BACKWARD: Final = parts_ops._define(
    "decay_gate_backward",
    f"(Tensor dg, {_TENSORS}) -> (Tensor, Tensor, Tensor)",
    gate_backward,
    _backward_fake,
    _refuse_twice,
)
GATE: Final = parts_ops._define(
    "decay_gate", f"({_TENSORS}) -> Tensor", gate, _fake, _gradients, _save
)


# For all others


class KnownGate(part_calls._Call):
    """The gate of such tensors."""

    def __init__(
        self, x: Tensor, A_log: Tensor, dt_bias: Tensor, lower_bound: float | None
    ) -> None:
        super().__init__(x.device)
        self.bound, self._problem = lower_bound, gate_problem(x, lower_bound)
        self._sizes = _Sizes(x, lower_bound)
        device = x.device
        self._make_g = maker(tuple(x.shape), torch.float32, device)
        self._make_dx = maker(tuple(x.shape), x.dtype, device)
        self._make_parameters = [
            maker(tuple(y.shape), torch.float32, device) for y in (A_log, dt_bias)
        ]
        loaded = gating(DECAY_GATE, self._problem, device)
        self._forward = part_calls._Sized(loaded, self._sizes.scalars)
        self._backward: tuple[part_calls._Sized, Any] | None = None

    def __call__(self, *given: Tensor) -> Tensor:
        """g, differentiable once, of x, A_log and dt_bias like those."""
        if not part_calls.wants_gradient(given):
            return self.forward(*given)
        g: Tensor = _Gate.apply(self, *given)  # type: ignore[no-untyped-call]
        return g

    def forward(self, *given: Tensor) -> Tensor:
        if not self.is_usual(given, False):
            x, A_log, dt_bias = given
            return gate(x, A_log, dt_bias, self.bound)
        g = self._make_g()
        self._forward(*given, g)
        return g

    def backward(
        self, dg: Tensor, x: Tensor, A_log: Tensor, dt_bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = x, A_log, dt_bias, dg
        if not self.is_usual(given, False):
            return gate_backward(dg, x, A_log, dt_bias, self.bound)
        if self._backward is None:
            self._backward = self._plan_backward()
        launch, make_partial = self._backward
        dA_log, ddt_bias = (make() for make in self._make_parameters)
        dx = self._make_dx()
        launch(*given, dx, dA_log, ddt_bias, make_partial())
        return dx, dA_log, ddt_bias

    def _plan_backward(self) -> tuple[part_calls._Sized, Any]:
        loaded = gating(DECAY_GATE_BACKWARD, self._problem, self.device)
        scalars, rows = self._sizes.of_backward(loaded, device_of(self.device).sms)
        shape = rows, 2, self._sizes.channels
        return part_calls._Sized(loaded, scalars), maker(shape, torch.float32, self.device)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: KnownGate, *given: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*given)
        return call.forward(*given)

    @staticmethod
    def backward(ctx: Any, dg: Tensor) -> tuple[Any, ...]:
        """Where a graph is made of it by the op, which refuses: what `once_differentiable` returns
        hangs together with nothing, and what goes through it would be left out without a word."""
        if torch.is_grad_enabled():
            return (None, *_BACKWARD(dg, *ctx.saved_tensors, ctx.call.bound))
        return (None, *ctx.call.backward(dg, *ctx.saved_tensors))
