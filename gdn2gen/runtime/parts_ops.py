"""The ops of a layer's parts: in torch.library for tracers, by autograd's own Function otherwise.

As with the recurrences' ops (see `autograd`), whose library this adds to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdn2gen.runtime import parts
from gdn2gen.runtime.room import Room, room_of

_Library: Any = torch.library.Library  # untyped in torch
_library = _Library("gdn2gen", "FRAGMENT")

Tensors = Sequence[Tensor]


def _define(
    name: str,
    schema: str,
    kernels: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., Any] | None = None,
) -> Any:
    _library.define(name + schema)
    for key in ("CUDA", "CPU"):
        _library.impl(name, kernels, key)
    torch.library.register_fake(f"gdn2gen::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"gdn2gen::{name}", backward, setup_context=setup, lib=_library
        )
    return getattr(torch.ops.gdn2gen, name).default


# Short convolutions


def _like(x: Tensors) -> list[Tensor]:
    return [part.new_empty(part.shape) for part in x]


def _convolve(
    x: Tensors,
    weight: Tensors,
    bias: Tensors,
    tail: Tensors,
    cu_seqlens: Tensor | None,
    final: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    made = parts.convolve(x, weight, bias, tail, cu_seqlens, final)
    return made.y, made.final_tail, made.places


def _convolve_fake(
    x: Tensors,
    weight: Tensors,
    bias: Tensors,
    tail: Tensors,
    cu_seqlens: Tensor | None,
    final: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    N = x[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kept = weight[0].shape[1] - 1
    tails = [part.new_empty((N, kept, part.shape[2])) for part in x if final]
    tables = 0 if cu_seqlens is None else 2
    places = [x[0].new_empty((x[0].shape[1],), dtype=torch.int32) for _ in range(tables)]
    return _like(x), tails, places


def _convolve_backward(
    dy: Tensors, x: Tensors, weight: Tensors, bias: Tensors, tail: Tensors, places: Tensors
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return parts.convolve_backward(dy, x, weight, bias, tail, places)


def _convolve_backward_fake(
    dy: Tensors, x: Tensors, weight: Tensors, bias: Tensors, tail: Tensors, places: Tensors
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return _like(x), _like(weight), _like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, weight, bias, tail, _, _ = inputs
    places = output[2]
    ctx.counts = [len(group) for group in (x, weight, bias, tail, places)]
    ctx.save_for_backward(*x, *weight, *bias, *tail, *places)


def _groups(ctx: Any) -> list[list[Tensor]]:
    saved = list(ctx.saved_tensors)
    return [[saved.pop(0) for _ in range(count)] for count in ctx.counts]


def _gradients(ctx: Any, dy: Tensors, _tails: Any, _places: Any) -> tuple[Any, ...]:
    x, weight, bias, tail, places = _groups(ctx)
    # a y that nobody used has none
    dy = [torch.zeros_like(part) if d is None else d for d, part in zip(dy, x, strict=True)]
    dx, dweight, dbias = _CONVOLVE_BACKWARD(dy, x, weight, bias, tail, places)
    return dx, dweight, dbias, [None] * len(tail), None, None


_CONVOLVE_BACKWARD: Final = _define(
    "short_convolution_backward",
    "(Tensor[] dy, Tensor[] x, Tensor[] weight, Tensor[] bias, Tensor[] tail, Tensor[] places)"
    " -> (Tensor[], Tensor[], Tensor[])",
    _convolve_backward,
    _convolve_backward_fake,
)
CONVOLVE: Final = _define(
    "short_convolution",
    "(Tensor[] x, Tensor[] weight, Tensor[] bias, Tensor[] tail, Tensor? cu_seqlens, bool final)"
    " -> (Tensor[], Tensor[], Tensor[])",
    _convolve,
    _convolve_fake,
    _gradients,
    _save,
)


class _Convolution(torch.autograd.Function):
    """The same without torch.library's wrappers: all tensors side by side."""

    @staticmethod
    def forward(
        ctx: Any,
        counts: tuple[int, ...],
        room: Room | None,
        cu_seqlens: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.into = room  # not `room`, which says where those of y are wanted
        rest = list(tensors)
        x, weight, bias, tail = ([rest.pop(0) for _ in range(count)] for count in counts)
        made = parts.convolve(x, weight, bias, tail, cu_seqlens, False)
        ctx.counts = [*counts, len(made.places)]
        ctx.save_for_backward(*tensors, *made.places)
        return tuple(made.y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> tuple[Any, ...]:
        x, weight, bias, tail, places = _groups(ctx)
        found = parts.convolve_backward(dy, x, weight, bias, tail, places, ctx.into)
        return (None, None, None, *found[0], *found[1], *found[2], *[None] * len(tail))


def convolve(
    x: Tensors,
    weight: Tensors,
    bias: Tensors,
    tail: Tensors,
    cu_seqlens: Tensor | None,
    *,
    watched: bool,
) -> list[Tensor]:
    """Short convolutions, differentiable once in x, weight and bias. `watched`: something wants to
    see the op itself."""
    if watched:
        y: list[Tensor] = CONVOLVE(x, weight, bias, tail, cu_seqlens, False)[0]
        return y
    counts = (len(x), len(weight), len(bias), len(tail))
    made: tuple[Tensor, ...] = _Convolution.apply(  # type: ignore[no-untyped-call]
        counts, room_of(x), cu_seqlens, *x, *weight, *bias, *tail
    )
    return [*made]


def _step_fake(*_: Any) -> None:
    """Nothing is returned."""


STEP: Final = _define(
    "short_convolution_step",
    "(Tensor[] x, Tensor[] weight, Tensor[] bias, Tensor(a!)[] tail, Tensor(b!)[] y) -> ()",
    parts.convolve_step,
    _step_fake,
)


# The gated norm


def _norm_fake(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    return x.new_empty(x.shape)


def _norm_backward_fake(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dgate, dweight = _like((x, gate, weight))
    return dx, dgate, dweight


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, weight, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(x, gate, weight)


def _norm_gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return (*_NORM_BACKWARD(dy, *ctx.saved_tensors, ctx.eps, ctx.activation), None, None)


_NORM_BACKWARD: Final = _define(
    "gated_rms_norm_backward",
    "(Tensor dy, Tensor x, Tensor gate, Tensor weight, float eps, str activation)"
    " -> (Tensor, Tensor, Tensor)",
    parts.norm_backward,
    _norm_backward_fake,
)
NORM: Final = _define(
    "gated_rms_norm",
    "(Tensor x, Tensor gate, Tensor weight, float eps, str activation) -> Tensor",
    parts.norm,
    _norm_fake,
    _norm_gradients,
    _save_norm,
)


class _Norm(torch.autograd.Function):
    """The same without torch.library's wrappers."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = parts.norm(*inputs)
        _save_norm(ctx, inputs, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, gate, weight = ctx.saved_tensors
        found = parts.norm_backward(dy, x, gate, weight, ctx.eps, ctx.activation)
        return (*found, None, None)


def norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str, *, watched: bool
) -> Tensor:
    """The gated RMSNorm, differentiable once."""
    run: Any = NORM if watched else _Norm.apply
    y: Tensor = run(x, gate, weight, eps, activation)
    return y
