"""What every public op does with its arguments: checks, then one call of the recurrence's ops."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gdn2gen.base.errors import UnsupportedError
from gdn2gen.runtime import autograd
from gdn2gen.runtime.arguments import (
    Dims,
    by_kernels,
    check_arguments,
    check_beta,
    check_chunk_size,
    check_flags,
    check_gate,
    check_narrow,
    check_scale,
    is_watched,
)
from gdn2gen.runtime.head_dims import check_head_dims
from gdn2gen.runtime.signature import Signature


def call(
    op: autograd.Op,
    tensors: tuple[Tensor | None, ...],
    *,
    scale: Any,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: Any = None,
    disable_recompute: bool,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens_cpu: Tensor | None,
    chunk_size: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """o, and the final state or None. `tensors` are those of the signature; the others are called
    as by callers, and those with a default not every op has."""
    known = (
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        output_final_state,
        state_v_first,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
    )
    check_flags(*known, safe_gate, disable_recompute, return_intermediate_states)
    signature = op.signature
    parameters = [tensors[place] for place in signature.parameters]
    check_gate(signature, use_gate_in_kernel, safe_gate, lower_bound, *parameters)
    check_beta(use_beta_sigmoid_in_kernel, allow_neg_eigval)
    check_chunk_size(chunk_size)
    if return_intermediate_states:
        raise UnsupportedError("return_intermediate_states is not built yet; leave it False")
    watched = is_watched(tensors)
    dims = check_arguments(signature, tensors, cu_seqlens_cpu, state_v_first, known=not watched)
    factor = check_scale(scale)
    assert tensors[0] is not None
    computed = by_kernels(tensors[0].device)
    head_dims = dims.K, dims.V
    if computed:
        head_dims = check_head_dims(
            signature.op, tensors[0].dtype, tensors[0].device, dims.K, dims.V
        )
        tensors = _as_kernels_take(signature, tensors, dims)
    options = (
        factor,
        float(lower_bound) if use_gate_in_kernel and lower_bound is not None else None,
        *known,
    )[: signature.options]
    level = "fast" if disable_recompute else "lean"
    o, state = autograd.run(
        op, tensors, options, level, dims, head_dims, by_kernels=computed, watched=watched
    )
    return o, state if output_final_state else None


def _as_kernels_take(
    signature: Signature, tensors: tuple[Tensor | None, ...], dims: Dims
) -> tuple[Tensor | None, ...]:
    """Row after row, and parameters in fp32 with all their dims; float64 only the reference takes.

    Raises InputError for that.
    """
    for place in (0, signature.gate, *signature.states):
        x = tensors[place]
        if x is not None:
            check_narrow(signature.names[place], x.dtype)
    found = [None if x is None else x.contiguous() for x in tensors]
    for place in signature.parameters:
        x = found[place]
        if x is not None:
            x, symbols = x.float(), signature.dims[place]
            if len(x.shape) < len(symbols):
                x = x.view([getattr(dims, symbol) for symbol in symbols])
            found[place] = x
    return tuple(found)
