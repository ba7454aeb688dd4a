"""What every public op over a few tokens does with its arguments: checks, then one launch."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.base.errors import InputError
from gdn2gen.ops._known import short_key, whole_key
from gdn2gen.runtime.arguments import (
    by_kernels,
    check_dense,
    check_types,
    is_traced,
    is_watched,
)
from gdn2gen.runtime.decoding import Plan, Read, check_in_place, decoding_name, surroundings
from gdn2gen.runtime.decoding_checks import (
    SERVING,
    check_decoding,
    check_lengths,
    check_out,
    refuse_gradients,
)
from gdn2gen.runtime.decoding_op import DecodingOp, launch, plan_of
from gdn2gen.runtime.head_dims import check_head_dims
from gdn2gen.runtime.kinds import Kinds
from gdn2gen.runtime.options import (
    check_beta,
    check_flags,
    check_gate,
    check_scale,
)
from gdn2gen.runtime.signature import Options, Signature

Tensors = tuple[Tensor | None, ...]


def decode(
    op: DecodingOp,
    tensors: Tensors,
    serving: Tensors,
    *,
    scale: Any,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: Any = None,
    state_v_first: bool = False,
    null_slot: int | None,
) -> tuple[Tensor, Tensor | None]:
    """o, and the pool or the final state if `output_final_state`. `tensors` are those of the
    signature, `serving` those of `SERVING`; the others are called as by callers, and those with a
    default not every op has."""
    known = (
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        output_final_state,
        state_v_first,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
    )
    check_flags(*known, False, False, False)
    signature, given = op.signature, (*tensors, *serving)
    # what is returned as the state, unless it is none of the caller's
    pool = serving[2] if output_final_state else None
    # once: what the call is known by is what it runs, whatever another thread does meanwhile
    traced, key, read = is_traced(), None, None
    if not traced:
        read = surroundings()
        numbers = scale, lower_bound, null_slot
        short = short_key(signature, given, known, numbers, around(read))
        if short is not None and given[0] is not None:
            present = [x for x in given if x is not None]
            plan = _plans.seen(short, present)
            if plan is not None:
                o, state = launch_plan(signature, plan, given, known=True)
                return o, state if pool is None else pool
            key = None if is_watched(given) else _key(short, present)
            plan = None if key is None else _plans.get(key)
            if plan is not None:
                refuse_gradients(signature, given)
                if not any([x.is_neg() or x.requires_grad for x in present]):
                    _plans.note(short, present, plan)
                o, state = launch_plan(signature, plan, given)
                return o, state if pool is None else pool
    watched = traced or is_watched(given)
    parameters = {name: tensors[place] for name, place in signature.gate_parameters.items()}
    check_gate(signature, use_gate_in_kernel, False, lower_bound, **parameters)
    check_beta(use_beta_sigmoid_in_kernel, allow_neg_eigval)
    options = (
        check_scale(scale),
        float(lower_bound) if use_gate_in_kernel and lower_bound is not None else None,
        *known,
    )[: signature.options]
    if watched:
        _check_types(signature, tensors, serving)
    else:
        _check_dense(signature, tensors, serving)
    refuse_gradients(signature, given)
    q = tensors[0]
    if watched or q is None or not by_kernels(q.device):
        o, state = _by_op(op, tensors, serving, options, null_slot, watched=watched)
    else:
        plan = plan_of(signature, given, options, null_slot, read)
        if key is not None:
            _plans.keep(key, plan)
        o, state = launch_plan(signature, plan, given)
    return o, state if pool is None else pool


_plans: Kinds[Plan] = Kinds(2048)


def around(read: Read) -> tuple[Any, ...]:
    """What else than its arguments a call is known by."""
    return by_kernels, *read


def launch_plan(
    signature: Signature, plan: Plan, given: Tensors, known: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`given` are the tensors of the signature, and of `SERVING`; `known`: none of them is negated
    lazily. Raises InputError for what their values and places in memory say."""
    *inputs, out = given
    if out is not None:
        check_out(signature, given)
    cu_seqlens = inputs[plan.cu_seqlens]
    if cu_seqlens is not None:
        check_lengths(cu_seqlens, plan.dims.T)
    return launch(plan, inputs, out, known=known)


def lasting_plan(
    op: DecodingOp, given: Tensors, options: Options, null_slot: int | None, read: Read
) -> Plan | None:
    """The plan of a call that has been made, if its kernel reads all that was `given` where it
    lies, so that a caller may know such calls by what these were made of, and by the `surroundings`
    that were `read` before; else None."""
    present = [x for x in given if x is not None]
    if not by_kernels(present[0].device) or is_watched(given):
        return None
    if any([x.is_neg() or x.requires_grad for x in present]):
        return None
    plan = plan_of(op.signature, given, options[: op.signature.options], null_slot, read)
    return None if plan.copied else plan


_LOOK: Final = attrgetter("shape", "dtype")


def _key(short: tuple[Any, ...], present: Sequence[Tensor]) -> tuple[Any, ...] | None:
    """With how all lie, since rows are read where they are."""
    return whole_key(short, present, _LOOK, _lying)


def _lying(present: Sequence[Tensor]) -> Sequence[Any]:
    found = [*map(Tensor.is_contiguous, present)]
    if all(found):
        return found
    return [x.is_contiguous() or (x.layout, x.stride()) for x in present]


def _by_op(
    op: DecodingOp,
    tensors: Tensors,
    serving: Tensors,
    options: tuple[Any, ...],
    null_slot: int | None,
    *,
    watched: bool,
) -> tuple[Tensor, Tensor | None]:
    """The same as a node of torch's: for tracers, and for tensors that no kernel runs on."""
    signature = op.signature
    state_v_first, output_final_state = options[5], options[4]
    layouts = [None if x is None else (x.shape, x.dtype, x.device, x.layout) for x in tensors]
    others = [None if x is None else (x.shape, x.dtype, x.device, x.layout) for x in serving]
    dims = check_decoding(signature, state_v_first, null_slot, layouts, others)
    named = dict(zip(signature.names, tensors, strict=True))
    q, v, initial, cu_seqlens = (named[x] for x in ("q", "v", "initial_state", "cu_seqlens"))
    assert q is not None and v is not None
    if by_kernels(q.device):
        check_head_dims(decoding_name(signature), q.dtype, q.device, dims.K, dims.V)
    if cu_seqlens is not None and not watched:
        check_lengths(cu_seqlens, dims.T)
    *indices, out = serving
    if not watched:
        check_in_place(serving[2], out)
        check_out(signature, (*tensors, *serving))
    o = v.new_empty(v.shape) if out is None else out
    final_state = None
    if output_final_state and serving[2] is None:
        inner = (dims.V, dims.K) if state_v_first else (dims.K, dims.V)
        double = any([x is not None and x.dtype == torch.float64 for x in tensors])
        dtype = torch.float64 if double else torch.float32
        dtype = dtype if initial is None else initial.dtype
        final_state = q.new_empty((dims.N, dims.HV, *inner), dtype=dtype)
    op.call(*tensors, *indices, o, final_state, *options, null_slot)
    return o, final_state


def _check_dense(signature: Signature, tensors: Tensors, serving: Tensors) -> None:
    """That nothing is nested, which has no shape to check."""
    for name, x in zip((*signature.shown, *SERVING), (*tensors, *serving), strict=True):
        if isinstance(x, Tensor) and x.is_nested:
            check_dense(name, torch.jagged)


def _check_types(signature: Signature, tensors: Tensors, serving: Tensors) -> None:
    check_types(signature, (*tensors, None))
    for name, x in zip(SERVING, serving, strict=True):
        if x is not None and not isinstance(x, Tensor):
            raise InputError(f"{name} must be a tensor or None, but got {type(x).__name__}")
