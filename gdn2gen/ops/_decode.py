"""What every public op over a few tokens does with its arguments: checks, then one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn2gen.base.errors import InputError
from gdn2gen.runtime.arguments import (
    by_kernels,
    check_beta,
    check_flags,
    check_gate,
    check_scale,
    check_types,
    is_watched,
)
from gdn2gen.runtime.decoding import decoding_name
from gdn2gen.runtime.decoding_checks import (
    SERVING,
    check_decoding,
    check_lengths,
    refuse_gradients,
)
from gdn2gen.runtime.decoding_op import DecodingOp, launch, plan_of
from gdn2gen.runtime.head_dims import check_head_dims
from gdn2gen.runtime.signature import Signature

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
    parameters = [tensors[place] for place in signature.parameters]
    check_gate(signature, use_gate_in_kernel, False, lower_bound, *parameters)
    check_beta(use_beta_sigmoid_in_kernel, allow_neg_eigval)
    options = (
        check_scale(scale),
        float(lower_bound) if use_gate_in_kernel and lower_bound is not None else None,
        *known,
    )[: signature.options]
    watched = is_watched(given)
    if watched:
        _check_types(signature, tensors, serving)
    refuse_gradients(signature, given)
    cu_seqlens, pool, q = tensors[-1], serving[2], tensors[0]
    if watched or q is None or not by_kernels(q.device):
        o, state = _by_op(op, tensors, serving, options, null_slot, watched=watched)
    else:
        plan = plan_of(signature, given, options, null_slot)
        if cu_seqlens is not None:
            check_lengths(cu_seqlens, plan.dims.T)
        o, state = launch(plan, q.device, given[:-1], serving[-1])
    return o, state if pool is None or not output_final_state else pool


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


def _check_types(signature: Signature, tensors: Tensors, serving: Tensors) -> None:
    check_types(signature, (*tensors, None))
    for name, x in zip(SERVING, serving, strict=True):
        if x is not None and not isinstance(x, Tensor):
            raise InputError(f"{name} must be a tensor or None, but got {type(x).__name__}")
