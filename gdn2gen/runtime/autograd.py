"""The ops in torch.library, and the same with autograd's own Function where no tracer looks on.

torch.library's wrappers cost 0.35 ms of a forward and backward on the host, as much as all the
rest together; at few heads and tokens the GPU would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gdn2gen.base.errors import UnsupportedError
from gdn2gen.family.problem import bound_of
from gdn2gen.runtime._kernels import (
    NAMES,
    request_of,
    run_backward,
    run_forward,
    run_inference,
    sequences_of,
)
from gdn2gen.runtime._library import backward_fake, backward_op, forward_fake, forward_op
from gdn2gen.runtime.lookup import NOTHING, agree, agree_while_compiling, find_runner
from gdn2gen.runtime.runner import SizedRunner

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
    if not (torch.compiler.is_compiling() or _has_symbols(tensors)):
        return agree(request_of(optional, sequences_of(cu_seqlens), options), level)
    q, _, _, g, _, _, *others = optional
    assert q is not None and g is not None
    given = [x is not None for x in (*others, cu_seqlens)]
    device = torch.device(q.device.type, q.device.index)
    dtypes = q.dtype, g.dtype
    _, lower_bound, *flags = options
    least = None if lower_bound is None else -float(bound_of(lower_bound))
    text: str = agree_while_compiling(*head_dims, device, level, *dtypes, *given, least, *flags)
    return text


def _has_symbols(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a tracer other than torch.compile has symbols for sizes, as make_fx may."""
    return any(type(size) is not int for x in tensors if x is not None for size in x.shape)


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
        return (None, None, *_once(partial(_gradients, ctx.sized), do, dht, *ctx.saved_tensors))


def _gradients(
    sized: SizedRunner, do: Tensor | None, dht: Tensor | None, *tensors: Tensor
) -> list[Tensor]:
    """Gradients of the inputs from what `_Function` saved."""
    inputs = len(sized.input_names)
    given, o, saved = tensors[:inputs], tensors[inputs], tensors[inputs + 1 :]
    named = dict(zip(sized.saved_names, saved, strict=True))
    do = torch.zeros_like(o) if do is None else do
    return run_backward(sized, do, dht, named, o, given)


def _once(gradients: Callable[..., Sequence[Tensor]], *tensors: Tensor | None) -> Sequence[Tensor]:
    """`gradients` of tensors, as a Function where a graph is made or many are asked for at once."""
    _refuse_batches(tensors)
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        found: tuple[Tensor, ...] = _Gradients.apply(gradients, *tensors)  # type: ignore[no-untyped-call]
        return found
    return gradients(*tensors)


def _refuse_batches(arrived: tuple[Tensor | None, ...]) -> None:
    """What autograd itself batches has no memory to read, and nothing here hears of it."""
    is_batched: Any = torch._C._functorch.is_legacy_batchedtensor  # untyped in torch
    if any([x is not None and is_batched(x) for x in arrived[:2]]):
        raise UnsupportedError(
            "gradients of chunk_gdn2 cannot be batched by is_grads_batched=True or vectorize=True; "
            "use torch.func.jacrev, or torch.vmap around autograd.grad"
        )


class _Gradients(torch.autograd.Function):
    """Gradients, which depend on all tensors in a way that has no derivative."""

    @staticmethod
    def forward(
        gradients: Callable[..., Sequence[Tensor]], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        return tuple(gradients(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(f"{_DIFFERENTIABLE}, not twice")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(_Gradients, info.batch_size, in_dims, inputs)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(f"{_DIFFERENTIABLE}, not forwards")


class _Transformed(torch.autograd.Function):
    """The ops for torch.func, whose transforms want a Function without `ctx` in `forward`."""

    @staticmethod
    def forward(
        options: tuple[Any, ...], agreement: str, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor, Tensor] = gdn2_forward(*tensors, *options, agreement)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        options, agreement, *tensors = inputs
        ctx.mark_non_differentiable(output[2])
        _save(ctx, (*tensors, *options, agreement), output)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dht: Tensor | None, _: Any) -> tuple[Any, ...]:
        return (None, None, *_tensor_gradients(ctx, do, dht))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(_Transformed, info.batch_size, in_dims, inputs)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(f"{_DIFFERENTIABLE}, not forwards")


def _one_by_one(
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    o, _, saved = output
    *options, agreement = inputs[_TENSORS:]
    *tensors, cu_seqlens = inputs[:_TENSORS]
    ctx.set_materialize_grads(False)
    ctx.options, ctx.agreement, ctx.sequences = options, agreement, sequences_of(cu_seqlens)
    # the caller may write the next batch's into it; the kernels read it once
    kept = cu_seqlens.clone() if agreement == NOTHING and cu_seqlens is not None else None
    ctx.save_for_backward(saved, o, *tensors, kept)


def _backward(ctx: Any, do: Tensor | None, dht: Tensor | None, _: Any) -> tuple[Any, ...]:
    return (*_tensor_gradients(ctx, do, dht), *[None] * (len(ctx.options) + 1))


def _tensor_gradients(ctx: Any, do: Tensor | None, dht: Tensor | None) -> list[Tensor | None]:
    """Gradients of the tensors of `NAMES`, by the op, from what `_save` kept."""
    saved, o, *tensors = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    dht = dht if ctx.options[_OUTPUT_FINAL_STATE] else None
    rest = (ctx.sequences, *ctx.options, ctx.agreement)
    arrived = do, dht, saved, o, *tensors
    _refuse_batches(arrived)
    if torch._C._are_functorch_transforms_active():  # of which an op knows nothing
        found = _once(lambda *given: gdn2_backward(*given, *rest), *arrived)
    else:
        found = gdn2_backward(*arrived, *rest)
    grads = iter(found)
    return [*[None if x is None else next(grads) for x in tensors[:-1]], None]


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
    torch.library.register_autograd(f"gdn2gen::{name}", backward, setup_context=save, lib=_library)
    return getattr(torch.ops.gdn2gen, name).default


gdn2_forward = _define("gdn2_forward", forward_op, forward_fake, _backward, _save)
gdn2_backward = _define("gdn2_backward", backward_op, backward_fake, _refuse_twice, None)
