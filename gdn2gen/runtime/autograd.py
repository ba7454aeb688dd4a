"""A recurrence's ops in torch.library, and the same with autograd's own Function for calls that no
tracer looks on.

torch.library's wrappers cost 0.35 ms of a forward and backward on the host, as much as all the
rest together; at few heads and tokens the GPU would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gdn2gen.base.errors import UnsupportedError
from gdn2gen.family.problem import bound_of
from gdn2gen.family.recurrence import Recurrence
from gdn2gen.runtime._derivatives import (
    differentiable,
    gradients_once,
    is_recorded,
    one_by_one,
    refuse_batches,
)
from gdn2gen.runtime._kernels import (
    as_lying,
    quick_gradients,
    request_of,
    run_backward,
    run_forward,
    run_gradients,
    run_inference,
    run_training,
    sequences_of,
)
from gdn2gen.runtime._library import backward_fake, backward_op, forward_fake, forward_op
from gdn2gen.runtime.arguments import Dims
from gdn2gen.runtime.bound import addresses_of
from gdn2gen.runtime.call import rows_of
from gdn2gen.runtime.lookup import NOTHING, agree, agree_while_compiling, find_runner, request_at
from gdn2gen.runtime.prefill_op import prefill_op
from gdn2gen.runtime.runner import SizedRunner
from gdn2gen.runtime.signature import Options, Signature, signature_of


@dataclass(frozen=True, eq=False)
class Op:
    """The ops over whole sequences that torch knows of a recurrence."""

    signature: Signature
    forward: Any
    backward: Any
    prefill: Any
    """That of serving, which has no backward; see `runtime.prefill_op`."""


def run(
    op: Op,
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    level: str,
    decay: str,
    dims: Dims,
    head_dims: tuple[int, int],
    *,
    by_kernels: bool,
    watched: bool,
    read: tuple[Any, ...] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """o and the final state (empty or None if not asked for), differentiable once.

    `tensors` and `options` (those of `Options` that it takes) are the arguments of the forward op.
    `level` and `decay` choose its kernels.
    `by_kernels`: else the reference computes, or nothing does; `watched`: something wants to see
    the ops themselves. `read`: the `surroundings`, where they were read before.
    """
    if has_tangents():
        _refuse_tangents(op.signature, tensors)
    if watched or not by_kernels:
        signature = op.signature
        agreement = NOTHING
        if by_kernels:
            agreement = _agree(signature, tensors, options, level, decay, head_dims)
        if torch._C._are_functorch_transforms_active():
            o, final_state, _ = _Transformed.apply(op, options, agreement, *tensors)  # type: ignore[no-untyped-call]
        else:
            o, final_state, _ = op.forward(*tensors, *options, agreement)
        return o, final_state
    request = request_at(dims, *options, rows=rows_of(op.signature, tensors))
    return run_known(tensors, lambda gradient: find_runner(request, level, gradient, decay, read))


def run_known(
    tensors: Sequence[Tensor | None],
    runner: Callable[[bool], SizedRunner],
    *,
    known: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`run` by kernels, past torch.library: those of `runner`, told if a gradient is wanted.

    `known`: the tensors lie as those kernels read them, and none is negated lazily."""
    *optional, cu_seqlens = tensors
    given: Sequence[Tensor] = [x for x in optional if x is not None]
    gradient = torch.is_grad_enabled() and any([x.requires_grad for x in given])
    sized = runner(gradient)
    if sized.rows and not known:
        sized, given = as_lying(sized, given)
        known = cu_seqlens is None or cu_seqlens.is_contiguous()
    lying = given if cu_seqlens is None else [*given, cu_seqlens]
    if not gradient:
        addresses = addresses_of(lying, known=known)
        return run_inference(sized, given, cu_seqlens, addresses)
    addresses = None if _saved_hooks(True) is not None else addresses_of(lying, known=known)
    # without wrappers of a transform that ended: they have no address
    apply = _Function.apply if addresses is None else _apply
    o, final_state = apply((sized, cu_seqlens, addresses), *given)
    return o, final_state


# Hooks are shown tensors of the dtypes that kernels saved, and not one buffer of bytes.
_saved_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks


def has_tangents() -> bool:
    """Whether forward-mode differentiation is under way, which `run` has to look into."""
    return torch.autograd.forward_ad._current_level >= 0


def _agree(
    signature: Signature,
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    level: str,
    decay: str,
    head_dims: tuple[int, int],
) -> str:
    """What forward and backward are to agree on; see `Agreement`."""
    *optional, cu_seqlens = tensors
    if not (torch.compiler.is_compiling() or _has_symbols(tensors)):
        request = request_of(signature, optional, sequences_of(cu_seqlens), options)
        return agree(request, level, decay)
    q = tensors[0]
    assert q is not None
    given = tuple([x is not None for x in tensors[signature.required :]])
    device = torch.device(q.device.type, q.device.index)
    _, lower_bound, *flags = options
    least = None if lower_bound is None else -float(bound_of(lower_bound))
    dtypes = tuple([tensors[place].dtype for place in signature.typed_by])  # type: ignore[union-attr]
    text: str = agree_while_compiling(
        device, level, decay, signature.op, *head_dims, dtypes, given, least, *flags
    )
    return text


def _has_symbols(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a tracer other than torch.compile has symbols for sizes, as make_fx may."""
    return any(type(size) is not int for x in tensors if x is not None for size in x.shape)


def _refuse_tangents(signature: Signature, tensors: tuple[Tensor | None, ...]) -> None:
    unpack_dual: Any = torch.autograd.forward_ad.unpack_dual  # untyped in torch
    for name, x in zip(signature.shown, tensors, strict=True):
        if x is not None and unpack_dual(x).tangent is not None:
            message = f"{name} has a tangent, but {differentiable(signature.op)}, not forwards"
            raise UnsupportedError(message)


class _Function(torch.autograd.Function):
    """The backward runs the kernels that the forward found, on whatever thread it is.

    torch handles every argument in Python: the options are one, and what is not given is none.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, *given: Tensor) -> tuple[Tensor, Tensor | None]:
        sized, cu_seqlens, addresses = call
        found = None
        if addresses is not None:
            found = run_training(sized, given, cu_seqlens, addresses)
        ctx.set_materialize_grads(False)
        ctx.sized, ctx.whole = sized, found is not None
        if found is not None:
            o, final_state, saved = found
            ctx.save_for_backward(*given, saved, o)
            return o, final_state
        o, final_state, pieces = run_forward(sized, given, cu_seqlens)
        ctx.save_for_backward(*given, o, *pieces)
        return o, final_state

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dht: Tensor | None) -> tuple[Any, ...]:
        sized, saved = ctx.sized, ctx.saved_tensors
        if ctx.whole and do is not None and dht is None and not is_recorded():
            found = quick_gradients(sized, do, saved)
            if found is not None:
                return (None, *found)
        gradients = partial(_gradients_of_whole if ctx.whole else _gradients, sized)
        op = sized.runner.problem.op
        return (None, *gradients_once(op, gradients, do, dht, *saved))


_Call = tuple[SizedRunner, Tensor | None, list[int] | None]
"""What a call runs, cu_seqlens, and where its tensors lie if kernels read them as they do."""
# What `Function.apply` does for a Function with a ctx, but for wrappers of transforms that ended.
_apply: Any = super(torch.autograd.Function, _Function).apply


def _gradients_of_whole(
    sized: SizedRunner, do: Tensor | None, dht: Tensor | None, *tensors: Tensor
) -> Sequence[Tensor]:
    """`_gradients` where what is saved is one buffer."""
    *given, saved, o = tensors
    do = torch.zeros_like(o) if do is None else do
    return run_gradients(sized, do, dht, saved, o, given)


def _gradients(
    sized: SizedRunner, do: Tensor | None, dht: Tensor | None, *tensors: Tensor
) -> list[Tensor]:
    """Gradients of the inputs from what `_Function` saved."""
    inputs = len(sized.input_names)
    given, o, saved = tensors[:inputs], tensors[inputs], tensors[inputs + 1 :]
    named = dict(zip(sized.saved_names, saved, strict=True))
    do = torch.zeros_like(o) if do is None else do
    return run_backward(sized, do, dht, named, o, given)


class _Transformed(torch.autograd.Function):
    """The ops for torch.func, whose transforms want a Function without `ctx` in `forward`."""

    @staticmethod
    def forward(
        op: Op, options: tuple[Any, ...], agreement: str, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor, Tensor] = op.forward(*tensors, *options, agreement)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, options, agreement, *tensors = inputs
        ctx.mark_non_differentiable(output[2])
        _save(ctx, tensors, options, agreement, output)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dht: Tensor | None, _: Any) -> tuple[Any, ...]:
        return (None, None, None, *_tensor_gradients(ctx.op, ctx, do, dht))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return one_by_one(_Transformed, info.batch_size, in_dims, inputs)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(f"{differentiable(ctx.op.signature.op)}, not forwards")


def _save(
    ctx: Any,
    tensors: Sequence[Tensor | None],
    options: Sequence[Any],
    agreement: str,
    output: tuple[Any, ...],
) -> None:
    o, _, saved = output
    *tensors, cu_seqlens = tensors
    ctx.set_materialize_grads(False)
    ctx.options, ctx.agreement, ctx.sequences = options, agreement, sequences_of(cu_seqlens)
    # the caller may write the next batch's into it; the kernels read it once
    kept = cu_seqlens.clone() if agreement == NOTHING and cu_seqlens is not None else None
    ctx.save_for_backward(saved, o, *tensors, kept)


def _tensor_gradients(
    op: Op, ctx: Any, do: Tensor | None, dht: Tensor | None
) -> list[Tensor | None]:
    """Gradients of the tensors of a call, by the op, from what `_save` kept."""
    saved, o, *tensors = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    dht = dht if Options(*ctx.options).output_final_state else None
    rest = (ctx.sequences, *ctx.options, ctx.agreement)
    arrived = do, dht, saved, o, *tensors
    refuse_batches(op.signature.op, arrived)
    if torch._C._are_functorch_transforms_active():  # of which an op knows nothing
        found = gradients_once(op.signature.op, lambda *given: op.backward(*given, *rest), *arrived)
    else:
        found = op.backward(*arrived, *rest)
    grads = iter(found)
    return [*[None if x is None else next(grads) for x in tensors[:-1]], None]


# torch.library.custom_op would do all this in one call, but imports torch._dynamo on the first
# launch: 2 s of a cold start.
_Library: Any = torch.library.Library  # untyped in torch
_library = _Library("gdn2gen", "DEF")


def op_of(recurrence: Recurrence) -> Op:
    """Make the ops known to torch: once for each recurrence."""
    signature = signature_of(recurrence.name)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        tensors, cu_seqlens, options, agreement = signature.split(inputs)
        _save(ctx, (*tensors, cu_seqlens), options, agreement, output)

    def backward(ctx: Any, do: Tensor | None, dht: Tensor | None, _: Any) -> tuple[Any, ...]:
        return (*_tensor_gradients(op, ctx, do, dht), *[None] * (len(ctx.options) + 1))

    def refuse_twice(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(f"{differentiable(signature.op)}, not twice")

    def define(name: str, schema: str, kernels: Any, fake: Any, *differentiation: Any) -> Any:
        _library.define(name + schema)
        for key in ("CUDA", "CPU"):
            _library.impl(name, partial(kernels, signature), key)
        full_name = f"gdn2gen::{name}"
        torch.library.register_fake(full_name, partial(fake, signature), lib=_library)
        backward, setup = differentiation
        torch.library.register_autograd(full_name, backward, setup_context=setup, lib=_library)
        return getattr(torch.ops.gdn2gen, name).default

    names = f"{signature.op}_forward", f"{signature.op}_backward"
    op = Op(
        signature,
        define(names[0], signature.forward_schema, forward_op, forward_fake, backward, save),
        define(names[1], signature.backward_schema, backward_op, backward_fake, refuse_twice, None),
        prefill_op(recurrence),
    )
    return op
