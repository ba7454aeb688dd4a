"""The ops in torch.library, and the same with autograd's own Function where no tracer looks on.

torch.library's wrappers cost 0.35 ms of a forward and backward on the host, as much as all the
rest together; at few heads and tokens the GPU would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdn2gen._kernels import NAMES, request_of, run_backward, run_forward, run_inference
from gdn2gen._lookup import find_runner
from gdn2gen._torch_ops import backward_fake, backward_kernels, forward_fake, forward_kernels
from gdn2gen.launch import SizedRunner

_TENSORS = len(NAMES)
_OUTPUT_FINAL_STATE = 4
"""Its place among the options that follow them."""


def run(
    watched: bool, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], level: str
) -> tuple[Tensor, Tensor | None]:
    """o and the final state (empty or None if not asked for), differentiable once.

    `tensors`, `options` and `level` are together the arguments of `forward_kernels`; `watched` says
    whether something wants to see the ops themselves.
    """
    if watched:
        o, final_state, _ = gdn2_forward(*tensors, *options, level)
        return o, final_state
    given = [x for x in tensors if x is not None]
    gradient = torch.is_grad_enabled() and any([x.requires_grad for x in given])
    sized = find_runner(request_of(tensors, options), level, gradient)
    if not gradient:
        return run_inference(sized, given)
    o, final_state = _Function.apply(sized, *given)  # type: ignore[no-untyped-call]
    return o, final_state


class _Function(torch.autograd.Function):
    """The backward runs the kernels that the forward found, on whatever thread it is.

    torch handles every argument in Python: the options are one, and what is not given is none.
    """

    @staticmethod
    def forward(ctx: Any, sized: SizedRunner, *given: Tensor) -> tuple[Tensor, Tensor | None]:
        o, final_state, saved = run_forward(sized, given)
        ctx.set_materialize_grads(False)
        ctx.sized = sized
        ctx.save_for_backward(*given, o, *saved)
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dht: Tensor | None) -> tuple[Any, ...]:
        sized, tensors = ctx.sized, ctx.saved_tensors
        inputs = len(sized.input_names)
        given, o, saved = tensors[:inputs], tensors[inputs], tensors[inputs + 1 :]
        grads = run_backward(sized, torch.zeros_like(o) if do is None else do, dht, saved, o, given)
        return (None, *grads, *[None] * (inputs - len(grads)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    o, _, saved = output
    ctx.set_materialize_grads(False)
    ctx.options = inputs[_TENSORS:]
    ctx.save_for_backward(*inputs[:_TENSORS], o, *saved)


def _backward(ctx: Any, do: Tensor | None, dht: Tensor | None, _: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    inputs, o, saved = tensors[:_TENSORS], tensors[_TENSORS], list(tensors[_TENSORS + 1 :])
    if do is None:
        do = torch.zeros_like(o)
    dht = dht if ctx.options[_OUTPUT_FINAL_STATE] else None
    grads = iter(gdn2_backward(do, dht, saved, o, *inputs, *ctx.options))
    found = [None if x is None else next(grads) for x in inputs[: _TENSORS - 1]]
    return (*found, None, *[None] * len(ctx.options))


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
