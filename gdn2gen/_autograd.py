"""The ops in torch.library, and the same with autograd's own Function where no tracer looks on.

torch.library's wrappers cost 0.35 ms of a forward and backward on the host, as much as all the
rest together; at few heads and tokens the GPU would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdn2gen._kernels import (
    NAMES,
    request_of,
    run_backward,
    run_forward,
    run_inference,
    sequences_of,
)
from gdn2gen._lookup import NOTHING, agree, agree_while_compiling, find_runner
from gdn2gen._torch_ops import backward_fake, backward_op, forward_fake, forward_op
from gdn2gen.errors import UnsupportedError
from gdn2gen.launch import SizedRunner

_TENSORS = len(NAMES)
_OUTPUT_FINAL_STATE = 4
"""Its place among the options that follow them."""
_DIFFERENTIABLE = (
    "outputs of chunk_gdn2 can be differentiated once, backwards (autograd.grad, backward, "
    "torch.func.grad, vjp, jacrev)"
)


def run(
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    level: str,
    head_dims: tuple[int, int],
    *,
    by_kernels: bool,
    watched: bool,
) -> tuple[Tensor, Tensor | None]:
    """o and the final state (empty or None if not asked for), differentiable once.

    `tensors` and `options` are the arguments of `forward_op`. `by_kernels`: else the reference
    computes, or nothing does; `watched`: something wants to see the ops themselves.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        _refuse_tangents(tensors)
    if watched or not by_kernels:
        agreement = _agree(tensors, options, level, head_dims) if by_kernels else NOTHING
        if torch._C._are_functorch_transforms_active():
            o, final_state, _ = _Transformed.apply(options, agreement, *tensors)  # type: ignore[no-untyped-call]
        else:
            o, final_state, _ = gdn2_forward(*tensors, *options, agreement)
        return o, final_state
    *optional, cu_seqlens = tensors
    given = [x for x in optional if x is not None]
    gradient = torch.is_grad_enabled() and any([x.requires_grad for x in given])
    sized = find_runner(request_of(optional, sequences_of(cu_seqlens), options), level, gradient)
    if not gradient:
        return run_inference(sized, given, cu_seqlens)
    o, final_state = _Function.apply(sized, cu_seqlens, *given)  # type: ignore[no-untyped-call]
    return o, final_state


def _agree(
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    level: str,
    head_dims: tuple[int, int],
) -> str:
    """What forward and backward are to agree on; see `Agreement`."""
    *optional, cu_seqlens = tensors
    if not torch.compiler.is_compiling():
        return agree(request_of(optional, sequences_of(cu_seqlens), options), level)
    q, _, _, g, _, _, *others = optional
    assert q is not None and g is not None
    given = [x is not None for x in (*others, cu_seqlens)]
    device = torch.device(q.device.type, q.device.index)
    dtypes = q.dtype, g.dtype
    text: str = agree_while_compiling(*head_dims, device, level, *dtypes, *given, *options[1:])
    return text


def _refuse_tangents(tensors: tuple[Tensor | None, ...]) -> None:
    unpack_dual: Any = torch.autograd.forward_ad.unpack_dual  # untyped in torch
    for name, x in zip(NAMES, tensors, strict=True):
        if x is not None and unpack_dual(x).tangent is not None:
            raise UnsupportedError(f"{name} has a tangent, but {_DIFFERENTIABLE}, not forwards")


class _Function(torch.autograd.Function):
    """The backward runs the kernels that the forward found, on whatever thread it is.

    torch handles every argument in Python: the options are one, and what is not given is none.
    """

    @staticmethod
    def forward(
        ctx: Any, sized: SizedRunner, cu_seqlens: Tensor | None, *given: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        o, final_state, saved = run_forward(sized, given, cu_seqlens)
        ctx.set_materialize_grads(False)
        ctx.sized = sized
        ctx.save_for_backward(*given, o, *saved)
        return o, final_state

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dht: Tensor | None) -> tuple[Any, ...]:
        sized, tensors = ctx.sized, ctx.saved_tensors
        inputs = len(sized.input_names)
        given, o, saved = tensors[:inputs], tensors[inputs], tensors[inputs + 1 :]
        named = dict(zip(sized.saved_names, saved, strict=True))
        do = torch.zeros_like(o) if do is None else do
        if not torch.is_grad_enabled():
            return (None, None, *run_backward(sized, do, dht, named, o, given))
        # create_graph=True: gradients that depend on the inputs, though nobody can say how
        with torch.no_grad():
            grads = run_backward(sized, do, dht, named, o, given)
        sources = [x for x in (do, dht, *given) if x is not None]
        return (None, None, *_Gradients.apply(len(grads), *grads, *sources))  # type: ignore[no-untyped-call]


class _Gradients(torch.autograd.Function):
    """The first `count` tensors, which depend on all others in a way that has no derivative."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(f"{_DIFFERENTIABLE}, not twice")


class _Transformed(torch.autograd.Function):
    """The ops for torch.func: its transforms ask for a Function that keeps `ctx` out of `forward`.
    """

    @staticmethod
    def forward(
        options: tuple[Any, ...], agreement: str, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor, Tensor] = gdn2_forward(*tensors, *options, agreement)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        options, agreement, *tensors = inputs
        o, _, saved = output
        ctx.mark_non_differentiable(saved)
        ctx.options, ctx.agreement = options, agreement
        ctx.save_for_backward(saved, o, *tensors)

    @staticmethod
    def backward(ctx: Any, do: Tensor, dht: Tensor, _: Any) -> tuple[Any, ...]:
        dht_asked = dht if ctx.options[_OUTPUT_FINAL_STATE] else None
        tensors = ctx.saved_tensors[2:-1]
        grads = iter(
            _TransformedBackward.apply(  # type: ignore[no-untyped-call]
                ctx.options, ctx.agreement, do, dht_asked, *ctx.saved_tensors
            )
        )
        return (None, None, *[None if x is None else next(grads) for x in tensors], None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(_Transformed, info.batch_size, in_dims, inputs)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(f"{_DIFFERENTIABLE}, not forwards")


class _TransformedBackward(torch.autograd.Function):
    """The gradients, which have none themselves."""

    @staticmethod
    def forward(
        options: tuple[Any, ...],
        agreement: str,
        do: Tensor,
        dht: Tensor | None,
        saved: Tensor,
        o: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        sequences = sequences_of(tensors[-1])
        arguments = (do, dht, saved, o, *tensors, sequences, *options, agreement)
        return tuple(gdn2_backward(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(f"{_DIFFERENTIABLE}, not twice")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(_TransformedBackward, info.batch_size, in_dims, inputs)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(f"{_DIFFERENTIABLE}, not forwards")


def _one_by_one(
    function: Any, batch_size: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """vmap as a loop: its dim may be any, and B is taken where sequences are packed."""

    def chosen(x: Any, dim: Any, i: int) -> Any:
        return x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x

    outputs = [
        function.apply(*[chosen(x, dim, i) for x, dim in zip(inputs, in_dims, strict=True)])
        for i in range(batch_size)
    ]
    stacked = tuple(torch.stack(column) for column in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    o, _, saved = output
    *options, agreement = inputs[_TENSORS:]
    *tensors, cu_seqlens = inputs[:_TENSORS]
    ctx.set_materialize_grads(False)
    ctx.options, ctx.agreement, ctx.sequences = options, agreement, sequences_of(cu_seqlens)
    # the kernels read it once; the caller may write the next batch's into it
    kept = cu_seqlens if agreement == NOTHING else None
    ctx.save_for_backward(saved, o, *tensors, kept)


def _backward(ctx: Any, do: Tensor | None, dht: Tensor | None, _: Any) -> tuple[Any, ...]:
    saved, o, *tensors = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    dht = dht if ctx.options[_OUTPUT_FINAL_STATE] else None
    rest = (ctx.sequences, *ctx.options, ctx.agreement)
    grads = iter(gdn2_backward(do, dht, saved, o, *tensors, *rest))
    found = [None if x is None else next(grads) for x in tensors[:-1]]
    return (*found, None, *[None] * (len(ctx.options) + 1))


def _refuse_twice(ctx: Any, *_: Any) -> Any:
    raise UnsupportedError(f"{_DIFFERENTIABLE}, not twice")


# torch.library.custom_op would do all this in one call, but imports torch._dynamo on the first
# launch: 2 s of a cold start.
_Library: Any = torch.library.Library  # untyped in torch
_library = _Library("gdn2gen", "DEF")


def _define(
    name: str, kernels: Callable[..., Any], fake: Callable[..., Any], backward: Any, save: Any
) -> Any:
    _library.define(name + torch.library.infer_schema(kernels, mutates_args=()))
    for key in ("CUDA", "CPU"):
        _library.impl(name, kernels, key)
    torch.library.register_fake(f"gdn2gen::{name}", fake, lib=_library)
    torch.library.register_autograd(
        f"gdn2gen::{name}", backward, setup_context=save, lib=_library
    )
    return getattr(torch.ops.gdn2gen, name).default


gdn2_forward = _define("gdn2_forward", forward_op, forward_fake, _backward, _save)
gdn2_backward = _define("gdn2_backward", backward_op, backward_fake, _refuse_twice, None)
