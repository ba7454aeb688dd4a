"""Derivatives that torch may ask for around a recurrence's ops: taken once, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gdn2gen.base.errors import UnsupportedError
from gdn2gen.runtime.signature import signature_of


def differentiable(op: str) -> str:
    return (
        f"outputs of {signature_of(op).public} can be differentiated once, backwards "
        "(autograd.grad, backward, torch.func.grad, vjp, jacrev)"
    )


def gradients_once(
    op: str, gradients: Callable[..., Sequence[Tensor]], *tensors: Tensor | None
) -> Sequence[Tensor]:
    """`gradients` of tensors, as a Function where a graph is made or many are asked for at once."""
    refuse_batches(op, tensors)
    if is_recorded():
        found: tuple[Tensor, ...] = _Gradients.apply(op, gradients, *tensors)  # type: ignore[no-untyped-call]
        return found
    return gradients(*tensors)


def is_recorded() -> bool:
    """Whether what a backward computes is to be a node of a graph itself."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def refuse_batches(op: str, arrived: tuple[Tensor | None, ...]) -> None:
    """What autograd itself batches has no memory to read, and nothing here hears of it."""
    is_batched: Any = torch._C._functorch.is_legacy_batchedtensor  # untyped in torch
    if any([x is not None and is_batched(x) for x in arrived[:2]]):
        raise UnsupportedError(
            f"gradients of {signature_of(op).public} cannot be batched by is_grads_batched=True or "
            "vectorize=True; use torch.func.jacrev, or torch.vmap around autograd.grad"
        )


class _Gradients(torch.autograd.Function):
    """Gradients, which depend on all tensors in a way that has no derivative."""

    @staticmethod
    def forward(
        op: str, gradients: Callable[..., Sequence[Tensor]], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        return tuple(gradients(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(f"{differentiable(ctx.op)}, not twice")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return one_by_one(_Gradients, info.batch_size, in_dims, inputs)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(f"{differentiable(ctx.op)}, not forwards")


def one_by_one(
    function: Any, batch_size: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """vmap as a loop: its dim may be any, and B is taken where sequences are packed."""

    def chosen(x: Any, dim: Any, i: int) -> Any:
        return x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x

    if batch_size == 0:  # nothing to choose from: the shapes are those of zeros
        inputs = tuple(
            x.new_zeros(x.movedim(dim, 0).shape[1:])
            if isinstance(x, Tensor) and dim is not None
            else x
            for x, dim in zip(inputs, in_dims, strict=True)
        )
        in_dims = (None,) * len(inputs)
    outputs = [
        function.apply(*[chosen(x, dim, i) for x, dim in zip(inputs, in_dims, strict=True)])
        for i in range(max(batch_size, 1))
    ]
    stacked = tuple(torch.stack(column)[:batch_size] for column in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)
