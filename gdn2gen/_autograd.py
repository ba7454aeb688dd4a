"""The ops in torch.library, and the same with autograd's own Function where no tracer looks on.

torch.library's wrappers cost 0.35 ms of a forward and backward on the host, as much as all the
rest together; at few heads and tokens the GPU would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gdn2gen._torch_ops import backward_fake, backward_kernels, forward_fake, forward_kernels

_TENSORS = 10
"""Tensor arguments of the forward, cu_seqlens being the last of them."""
_OUTPUT_FINAL_STATE = 4
"""Its place among the options that follow them."""


def run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """o and the final state (empty if not asked for), differentiable once.

    The arguments are those of `forward_kernels`.
    """
    tensors = [x for x in arguments[:_TENSORS] if x is not None]
    if _is_watched(tensors):
        o, final_state, _ = gdn2_forward(*arguments)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        o, final_state = _Function.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        o, final_state, _ = forward_kernels(*arguments)
    return o, final_state


def _is_watched(tensors: Sequence[Tensor]) -> bool:
    """Whether something wants to see the ops themselves: a tracer, a mode, a subclass."""
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or torch._C._are_functorch_transforms_active()
        or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    o, _, saved = output
    ctx.set_materialize_grads(False)
    ctx.options = inputs[_TENSORS:]
    ctx.save_for_backward(*inputs[:_TENSORS], o, *saved)


def _gradients(
    ctx: Any, do: Tensor | None, dht: Tensor | None, backward: Callable[..., list[Tensor]]
) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    inputs, o, saved = tensors[:_TENSORS], tensors[_TENSORS], list(tensors[_TENSORS + 1 :])
    if do is None:
        do = torch.zeros_like(o)
    dht = dht if ctx.options[_OUTPUT_FINAL_STATE] else None
    grads = iter(backward(do, dht, saved, o, *inputs, *ctx.options))
    found = [None if x is None else next(grads) for x in inputs[: _TENSORS - 1]]
    return (*found, None, *[None] * len(ctx.options))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output = forward_kernels(*arguments)
        _save(ctx, arguments, output)
        return output[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dht: Tensor | None) -> tuple[Any, ...]:
        return _gradients(ctx, do, dht, backward_kernels)


def _backward(ctx: Any, do: Tensor | None, dht: Tensor | None, _: Any) -> tuple[Any, ...]:
    return _gradients(ctx, do, dht, gdn2_backward)


# torch.library.custom_op would do all this in one call, but imports torch._dynamo on the first
# launch: 2 s of a cold start.
_Library: Any = torch.library.Library  # untyped in torch
_library = _Library("gdn2gen", "DEF")


def _define(name: str, kernels: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    _library.define(name + torch.library.infer_schema(kernels, mutates_args=()))
    for key in ("CUDA", "CPU"):
        _library.impl(name, kernels, key)
    torch.library.register_fake(f"gdn2gen::{name}", fake, lib=_library)
    return getattr(torch.ops.gdn2gen, name).default


gdn2_forward = _define("gdn2_forward", forward_kernels, forward_fake)
gdn2_backward = _define("gdn2_backward", backward_kernels, backward_fake)
torch.library.register_autograd(
    "gdn2gen::gdn2_forward", _backward, setup_context=_save, lib=_library
)
