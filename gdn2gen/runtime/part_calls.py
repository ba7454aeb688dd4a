"""Calls of a layer's parts that are like one before: all but their tensors is known.

To look at shapes, make a problem and look up its kernels takes longer than these run on a GPU; so
what a call of the same kind (`kinds`) did is kept: its buffers, and its launches at its sizes.
What is not as in most calls (tensors that do not lie as kernels read them, another device current,
buffers that begin as NaN) goes through `parts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdn2gen.codegen.sized import sized_launch
from gdn2gen.kernels.parts import (
    GATED_NORM,
    GATED_NORM_BACKWARD,
    SHORT_CONV,
    SHORT_CONV_BACKWARD,
    partial_rows,
)
from gdn2gen.runtime import parts
from gdn2gen.runtime.bound import addresses_of
from gdn2gen.runtime.kinds import Kinds
from gdn2gen.runtime.passes import is_poisoned, maker
from gdn2gen.runtime.room import Room, room_of

Tensors = Sequence[Tensor]
KNOWN: Final[Kinds[Any]] = Kinds(1024)
"""Calls by what decides them beside their tensors; `parts.force` forgets all."""
parts.ON_FORCE.append(KNOWN.clear)


class _Sized:
    """A launch at a call's sizes. What it comes to is worked out when it is called again: of
    lengths that come once nothing is."""

    def __init__(self, loaded: parts.Loaded, scalars: dict[str, Any]) -> None:
        self._launch, self._scalars = loaded.launch, scalars
        self._sized: Any = None
        self._called = False

    def __call__(self, *tensors: Tensor) -> None:
        if self._sized is None:
            if not self._called:
                self._called = True
                self._launch(*tensors, **self._scalars)
                return
            self._sized = sized_launch(self._launch, self._scalars)
        self._sized(*tensors)


class _Call:
    """Where a call's kernels run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def is_usual(self, tensors: Tensors, known: bool) -> bool:
        """Whether kernels read them as they lie, on the current device. `known`: they are in rows
        as those of the call that this is of."""
        device = self.device
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            return False
        return addresses_of(tensors, known=known) is not None and not is_poisoned()


class KnownNorm(_Call):
    """A gated norm of such tensors."""

    def __init__(
        self, x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str
    ) -> None:
        super().__init__(x.device)
        self._options = eps, activation
        self._problem = parts.norm_problem(x, weight, activation)
        self._scalars = {"eps": eps, "M": x.numel() // self._problem.size}
        shape = tuple(x.shape)
        self._make_like_x = maker(shape, x.dtype, x.device)
        self._make_dweight = maker(tuple(weight.shape), weight.dtype, x.device)
        self._forward = _Sized(self._loaded(GATED_NORM), self._scalars)
        self._backward: tuple[_Sized, Any] | None = None

    def _loaded(self, stage: Any) -> parts.Loaded:
        return parts.norming(stage, self._problem, int(self._scalars["M"]), self.device)

    def __call__(self, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        given = x, gate, weight
        if not self.is_usual(given, True):
            return parts.norm(*given, *self._options)
        y = self._make_like_x()
        self._forward(*given, y)
        return y

    def backward(
        self, dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = x, gate, weight, dy
        if not self.is_usual(given, False):
            return parts.norm_backward(dy, x, gate, weight, *self._options)
        if self._backward is None:
            self._backward = self._plan_backward()
        launch, make_partial = self._backward
        found = self._make_like_x(), self._make_like_x(), self._make_dweight()
        launch(*given, *found, make_partial())
        return found

    def _plan_backward(self) -> tuple[_Sized, Any]:
        loaded = self._loaded(GATED_NORM_BACKWARD)
        BT, BR = loaded.config.size("BT"), loaded.config.size("BR")
        rows = partial_rows(BT, BR, 1, int(self._scalars["M"]))
        partial = maker((rows, self._problem.size), torch.float32, self.device)
        return _Sized(loaded, self._scalars), partial


class KnownConvolution(_Call):
    """Short convolutions of such tensors, of rows of sequences, without tails."""

    def __init__(self, x: Tensors, weight: Tensors, bias: Tensors) -> None:
        super().__init__(x[0].device)
        self.counts = len(x), len(weight), len(bias)
        self._problem = parts.convolution_problem(x, weight, bias)
        self._B, self._T = x[0].shape[:2]
        self._channels = sum(part.shape[2] for part in x)
        device = self.device
        self._make_y = [maker(tuple(part.shape), part.dtype, device) for part in x]
        self._make_parameters = [
            maker(tuple(part.shape), part.dtype, device) for part in (*weight, *bias)
        ]
        sizes = {"B": self._B, "T": self._T}
        scalars = {**sizes, "N": self._B, **parts.sizes(self._problem, x)}
        self._forward = _Sized(self._loaded(SHORT_CONV), scalars)
        self._backwards: dict[Any, tuple[_Sized, Any]] = {}
        """By how rows of x lie, which hooks on saved tensors may change, and where dx does."""

    def _loaded(self, stage: Any) -> parts.Loaded:
        return parts.convolving(stage, self._problem, self._B, self._T, self._channels, self.device)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Of x, weight and bias, one after the other."""
        if not self.is_usual(tensors, True):
            x, weight, bias = self.groups(tensors)
            return parts.convolve(x, weight, bias, (), None, False).y
        y = [make() for make in self._make_y]
        self._forward(*tensors, *y)
        return y

    def groups(self, tensors: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        n, m, _ = self.counts
        return tensors[:n], tensors[n : n + m], tensors[n + m :]

    def backward(self, dy: Tensors, tensors: Tensors, room: Room | None) -> tuple[Tensor, ...]:
        """Gradients of x, weight and bias."""
        x, weight, bias = self.groups(tensors)
        lying = (*weight, *bias, *dy)
        if not (self.is_usual(lying, False) and all(parts.in_rows(part) is part for part in x)):
            made = parts.convolve_backward(dy, x, weight, bias, (), (), room)
            return (*made[0], *made[1], *made[2])
        if room is None:
            dx = [make() for make in self._make_y]
        else:
            dx = room.empty(self._B, self._T, x[0])
        rows = tuple([part.stride() for part in x])
        key = rows, room
        found = self._backwards.get(key)
        if found is None:
            found = self._backwards[key] = self._plan_backward(x, dx)
        launch, make_partial = found
        of_parameters = [make() for make in self._make_parameters]
        launch(*tensors, *dy, *dx, *of_parameters, make_partial())
        return (*dx, *of_parameters)

    def _plan_backward(self, x: Tensors, dx: Tensors) -> tuple[_Sized, Any]:
        loaded = self._loaded(SHORT_CONV_BACKWARD)
        rows = partial_rows(loaded.config.size("BT"), loaded.config.size("BR"), self._B, self._T)
        sums = self._problem.width + self._problem.bias
        partial = maker((rows, sums, self._channels), torch.float32, self.device)
        scalars = {"B": self._B, "T": self._T, **parts.sizes(self._problem, x, dx)}
        return _Sized(loaded, scalars), partial


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: KnownNorm, *given: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*given)
        return call(*given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.call.backward(dy, *ctx.saved_tensors))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: tuple[KnownConvolution, Room | None], *given: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*given)
        return tuple(call[0](*given))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> tuple[Any, ...]:
        known, room = ctx.call
        return (None, *known.backward(dy, ctx.saved_tensors, room))


# What `Function.apply` does for a Function with a ctx, but for wrappers of transforms that ended.
_apply_norm: Any = super(torch.autograd.Function, _Norm).apply
_apply_convolution: Any = super(torch.autograd.Function, _Convolution).apply


def wants_gradient(tensors: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any([x.requires_grad for x in tensors])


def norm(call: KnownNorm, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    if not wants_gradient((x, gate, weight)):
        return call(x, gate, weight)
    y: Tensor = _apply_norm(call, x, gate, weight)
    return y


def convolve(call: KnownConvolution, tensors: Tensors) -> list[Tensor]:
    if not wants_gradient(tensors):
        return call(*tensors)
    room = room_of(tensors[: call.counts[0]])
    return [*_apply_convolution((call, room), *tensors)]
