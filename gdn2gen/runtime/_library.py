"""What the torch ops under the public ones compute, and the fakes that tracers see instead.

What a forward saves is one buffer of bytes, in a layout that both ops know from what they agreed on
(`_lookup.Agreement`), whose size is a formula of the sizes of the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2gen.family import reference
from gdn2gen.runtime._kernels import request_of, run_backward, run_forward, sequences_of
from gdn2gen.runtime._operands import readable
from gdn2gen.runtime.lookup import NOTHING, agreed_runner, make_request, saved_nbytes


def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
    agreement: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final state (empty if not asked for), and what the backward wants saved."""
    tensors = (q, k, v, g, b, w, initial_state, A_log, dt_bias)
    flags = (l2norm, gate_in_kernel, output_final_state, state_v_first)
    if agreement == NOTHING:
        o, state = _reference(tensors, cu_seqlens, scale, lower_bound, *flags)
        saved = q.new_empty(0, dtype=torch.uint8)
        return o, state if output_final_state else state.new_empty(0), saved
    request = request_of(tensors, sequences_of(cu_seqlens), (scale, lower_bound, *flags))
    sized = agreed_runner(request, agreement)
    saved = q.new_empty(sized.layout.nbytes, dtype=torch.uint8)
    given = [x for x in tensors if x is not None]
    o, final_state, _ = run_forward(sized, given, cu_seqlens, sized.layout.split(saved))
    if final_state is None:
        final_state = q.new_empty(0, dtype=torch.float32)
    return o, final_state, saved


def forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
    agreement: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (q, k, v, g, b, w, initial_state, A_log, dt_bias)
    flags = (l2norm, gate_in_kernel, output_final_state, state_v_first)
    sequences = sequences_of(cu_seqlens)
    o = v.new_empty(v.shape)
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    shape: tuple[int, ...] = (0,)
    if output_final_state:
        inner = (v.shape[-1], q.shape[-1]) if state_v_first else (q.shape[-1], v.shape[-1])
        shape = (q.shape[0] if sequences is None else sequences, v.shape[2], *inner)
    final_state = q.new_empty(shape, dtype=torch.float64 if double else torch.float32)
    nbytes = 0
    if agreement != NOTHING:
        # not looked up: sizes may be symbols
        request = request_of(tensors, sequences, (scale, lower_bound, *flags), make_request)
        nbytes = saved_nbytes(request, agreement)
    return o, final_state, q.new_empty(nbytes, dtype=torch.uint8)


def backward_op(
    do: Tensor,
    dht: Tensor | None,
    saved: Tensor,
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    sequences: int | None,
    scale: float | None,
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
    agreement: str,
) -> list[Tensor]:
    """Gradients of q, k, v, g, b, w, and of what is given of initial_state, A_log, dt_bias.

    Where kernels run, `sequences` stands for cu_seqlens: what they read of it was saved.
    """
    tensors = (q, k, v, g, b, w, initial_state, A_log, dt_bias)
    flags = (l2norm, gate_in_kernel, output_final_state, state_v_first)
    if agreement == NOTHING:
        return _reference_gradients(do, dht, tensors, cu_seqlens, scale, lower_bound, *flags)
    request = request_of(tensors, sequences, (scale, lower_bound, *flags))
    sized = agreed_runner(request, agreement)
    given = [x for x in tensors if x is not None]
    (saved,) = readable([saved])
    return run_backward(sized, do, dht, sized.layout.split(saved), o, given)


def backward_fake(
    do: Tensor,
    dht: Tensor | None,
    saved: Tensor,
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    sequences: int | None,
    scale: float | None,
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
    agreement: str,
) -> list[Tensor]:
    given = (q, k, v, g, b, w, initial_state, A_log, dt_bias)
    return [x.new_empty(x.shape) for x in given if x is not None]


def _reference(
    tensors: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    scale: float | None,
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
) -> tuple[Tensor, Tensor]:
    q, k, v, g, b, w, initial_state, A_log, dt_bias = tensors
    assert q is not None and k is not None and v is not None
    assert g is not None and b is not None and w is not None
    with _without_autocast():
        return reference.chunk_gdn2(
            *(q, k, v, g, b, w),
            scale=scale,
            initial_state=initial_state,
            use_qk_l2norm_in_kernel=l2norm,
            use_gate_in_kernel=gate_in_kernel,
            A_log=A_log,
            dt_bias=dt_bias,
            lower_bound=lower_bound,
            cu_seqlens=cu_seqlens,
            state_v_first=state_v_first,
        )


def _without_autocast() -> torch.autocast:
    """Autocast would have the reference multiply in bf16, and its gradients where taken."""
    return torch.autocast("cpu", enabled=False)


def _reference_gradients(
    do: Tensor,
    dht: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    *options: float | bool | None,
) -> list[Tensor]:
    """By autograd, which the dispatcher has turned off where an op computes."""
    keys = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.ADInplaceOrView):
        keys = keys.remove(key)
    include = torch._C._dispatch_tls_local_include_set()
    guard = torch._C._ForceDispatchKeyGuard(include, keys)
    with guard, torch.enable_grad(), _without_autocast():
        leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
        o, state = _reference(tuple(leaves), cu_seqlens, *options)  # type: ignore[arg-type]
        given = [x for x in leaves if x is not None]
        results, arrived = [o], [do]
        if dht is not None and state.requires_grad:  # not where no token or state was read
            results.append(state)
            arrived.append(dht)
        grads = torch.autograd.grad(results, given, arrived, allow_unused=True)
    # no gradient may share memory with what arrived
    return [
        torch.zeros_like(x, memory_format=torch.contiguous_format)
        if grad is None
        else grad.clone(memory_format=torch.contiguous_format)
        for x, grad in zip(given, grads, strict=True)
    ]
