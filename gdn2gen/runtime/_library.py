"""What the torch ops of a recurrence compute, and the fakes that tracers see instead.

What a forward saves is one buffer of bytes, in a layout that both ops know from what they agreed on
(`lookup.Agreement`), whose size is a formula of the sizes of the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdn2gen.family import reference
from gdn2gen.family.registry import recurrence_named
from gdn2gen.runtime._kernels import request_of, run_backward, run_forward, sequences_of
from gdn2gen.runtime._operands import readable
from gdn2gen.runtime.lookup import NOTHING, agreed_runner, make_request, saved_nbytes
from gdn2gen.runtime.signature import Options, Signature


def forward_op(signature: Signature, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final state (empty if not asked for), and what the backward wants saved."""
    tensors, cu_seqlens, options, agreement = signature.split(arguments)
    given = [x for x in tensors if x is not None]
    like = given[0]
    if agreement == NOTHING:
        named = Options(*options)
        o, state = _reference(signature, tensors, cu_seqlens, named)
        saved = like.new_empty(0, dtype=torch.uint8)
        return o, state if named.output_final_state else state.new_empty(0), saved
    request = request_of(signature, tensors, sequences_of(cu_seqlens), options)
    sized = agreed_runner(request, agreement)
    saved = like.new_empty(sized.layout.nbytes, dtype=torch.uint8)
    o, final_state, _ = run_forward(sized, given, cu_seqlens, sized.layout.split(saved))
    if final_state is None:
        final_state = like.new_empty(0, dtype=torch.float32)
    return o, final_state, saved


def forward_fake(signature: Signature, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, cu_seqlens, options, agreement = signature.split(arguments)
    sequences = sequences_of(cu_seqlens)
    named = dict(zip(signature.names, tensors, strict=False))
    q, v = named["q"], named["v"]
    assert q is not None and v is not None
    o = v.new_empty(v.shape)
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    shape: tuple[int, ...] = (0,)
    flags = Options(*options)
    if flags.output_final_state:
        inner = q.shape[-1], v.shape[-1]
        N = q.shape[0] if sequences is None else sequences
        shape = (N, v.shape[2], *(inner[::-1] if flags.state_v_first else inner))
    final_state = q.new_empty(shape, dtype=torch.float64 if double else torch.float32)
    nbytes = 0
    if agreement != NOTHING:
        # not looked up: sizes may be symbols
        request = request_of(signature, tensors, sequences, options, make_request)
        nbytes = saved_nbytes(request, agreement)
    return o, final_state, q.new_empty(nbytes, dtype=torch.uint8)


_ARRIVED = 4
"""do, dht, what was saved, and o come before the tensors of the forward, and after them how many
sequences are packed. Where kernels run, that stands for cu_seqlens: what they read was saved."""


def backward_op(signature: Signature, *arguments: Any) -> list[Tensor]:
    """Gradients of all tensors that are given, but for cu_seqlens."""
    do, dht, saved, o = arguments[:_ARRIVED]
    end = _ARRIVED + len(signature.names)
    tensors, cu_seqlens, options, agreement = signature.split(
        (*arguments[_ARRIVED:end], *arguments[end + 1 :])
    )
    if agreement == NOTHING:
        return _reference_gradients(signature, do, dht, tensors, cu_seqlens, Options(*options))
    sized = agreed_runner(request_of(signature, tensors, arguments[end], options), agreement)
    given = [x for x in tensors if x is not None]
    (saved,) = readable([saved])
    return run_backward(sized, do, dht, sized.layout.split(saved), o, given)


def backward_fake(signature: Signature, *arguments: Any) -> list[Tensor]:
    tensors = arguments[_ARRIVED : _ARRIVED + len(signature.names) - 1]
    return [x.new_empty(x.shape) for x in tensors if x is not None]


def _reference(
    signature: Signature,
    tensors: Sequence[Tensor | None],
    cu_seqlens: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    with _without_autocast():
        return reference.chunk(
            recurrence_named(signature.op),
            dict(zip(signature.names, (*tensors, cu_seqlens), strict=True)),
            scale=options.scale,
            use_qk_l2norm_in_kernel=options.l2norm,
            use_gate_in_kernel=options.gate_in_kernel,
            lower_bound=options.lower_bound,
            use_beta_sigmoid_in_kernel=options.beta_sigmoid,
            allow_neg_eigval=options.neg_eigval,
            state_v_first=options.state_v_first,
        )


def _without_autocast() -> torch.autocast:
    """Autocast would have the reference multiply in bf16, and its gradients where taken."""
    return torch.autocast("cpu", enabled=False)


def _reference_gradients(
    signature: Signature,
    do: Tensor,
    dht: Tensor | None,
    tensors: Sequence[Tensor | None],
    cu_seqlens: Tensor | None,
    options: Options,
) -> list[Tensor]:
    """By autograd, which the dispatcher has turned off where an op computes."""
    keys = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.ADInplaceOrView):
        keys = keys.remove(key)
    include = torch._C._dispatch_tls_local_include_set()
    guard = torch._C._ForceDispatchKeyGuard(include, keys)
    with guard, torch.enable_grad(), _without_autocast():
        leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
        o, state = _reference(signature, leaves, cu_seqlens, options)
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
