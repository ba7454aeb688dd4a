"""Checks of what a call over a few tokens takes beside the tensors of its recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdn2gen.base.errors import InputError, UnsupportedError
from gdn2gen.runtime.arguments import (
    Dims,
    TensorLayout,
    check_dense,
    check_devices,
    check_layouts,
    check_state_dtype,
)
from gdn2gen.runtime.signature import Signature

SERVING = ("ssm_state_indices", "num_accepted_tokens", "state_pool", "out")
"""What a call takes beside the tensors of its signature, in the order of the torch op."""
INDEX_DTYPES = (torch.int32, torch.int64)
INT64 = range(-(2**63), 2**63)
Layout = tuple[torch.Size, torch.dtype, torch.device, torch.layout]


def check_decoding(
    signature: Signature,
    state_v_first: bool,
    null_slot: int | None,
    tensors: Sequence[Layout | None],
    serving: Sequence[Layout | None],
) -> Dims:
    """Check ranks, shapes, dtypes and devices of both; return the sizes. Raises InputError."""
    dims = check_layouts(signature, state_v_first, *tensors, None)
    named = {
        name: None if x is None else TensorLayout(*x)
        for name, x in zip(SERVING, serving, strict=True)
    }
    for name, x in named.items():
        if x is not None:
            check_dense(name, x.layout)
    first = tensors[0]
    assert first is not None
    check_devices({signature.shown[0]: TensorLayout(*first), **named})
    indices, accepted, pool, out = (named[name] for name in SERVING)
    given = dict(zip(signature.names, tensors, strict=True))
    check_pool(pool, indices, dims, state_v_first, initial=given["initial_state"] is not None)
    _check_accepted(accepted, indices)
    check_null_slot(null_slot, indices is not None)
    if indices is not None:
        _check_indices(indices, accepted, dims, packed=given["cu_seqlens"] is not None)
    v, shown = given["v"], signature.shown[signature.names.index("v")]
    assert v is not None
    if out is not None and (tuple(out.shape), out.dtype) != (tuple(v[0]), v[1]):
        raise InputError(
            f"out must be {tuple(v[0])} in the dtype of {shown}, {v[1]}, "
            f"but got {tuple(out.shape)} in {out.dtype}"
        )
    return dims


def check_pool(
    pool: TensorLayout | None,
    indices: TensorLayout | None,
    dims: Dims,
    state_v_first: bool,
    *,
    initial: bool,
) -> None:
    """The pool, and what goes with it. Raises InputError."""
    if pool is not None and initial:
        raise InputError(
            "initial_state and state_pool were given, but a state comes from one: write it into "
            "the pool's slot, or leave state_pool out"
        )
    if pool is None and indices is not None:
        raise InputError("ssm_state_indices name slots of state_pool, but got state_pool=None")
    if pool is None:
        return
    inner = (dims.V, dims.K) if state_v_first else (dims.K, dims.V)
    if len(pool.shape) != 4 or tuple(pool.shape[1:]) != (dims.HV, *inner):
        wanted = f"[slots, {', '.join(map(str, (dims.HV, *inner)))}]"
        raise InputError(
            f"state_pool must be {wanted} (state_v_first={state_v_first}), "
            f"but got {tuple(pool.shape)}"
        )
    check_state_dtype("state_pool", pool.dtype, narrow=True)
    if indices is None and pool.shape[0] < dims.N:
        raise InputError(
            f"state_pool must have a slot for each of N={dims.N} sequences, but has "
            f"{pool.shape[0]}; or give ssm_state_indices"
        )


def _check_accepted(accepted: TensorLayout | None, indices: TensorLayout | None) -> None:
    if accepted is not None and (indices is None or len(indices.shape) != 2):
        shape = None if indices is None else tuple(indices.shape)
        raise InputError(
            "num_accepted_tokens says which slot of ssm_state_indices [N, 1+S] is read, but got "
            f"ssm_state_indices of shape {shape}"
        )


def check_null_slot(null_slot: object, indexed: bool) -> None:
    """Raises InputError unless it is an index or None, and goes with indices."""
    if null_slot is None:
        return
    if isinstance(null_slot, bool) or not isinstance(null_slot, int):
        raise InputError(f"null_slot must be an int or None, but got {type(null_slot).__name__}")
    if not indexed:
        raise InputError(
            "null_slot is of ssm_state_indices, but got ssm_state_indices=None; leave it out"
        )
    if null_slot not in INT64:
        raise InputError(
            f"null_slot must be an index, which has 64 bits, but got {null_slot}; leave it out "
            "where an index below 0 is padding"
        )


def _check_indices(
    indices: TensorLayout, accepted: TensorLayout | None, dims: Dims, *, packed: bool
) -> None:
    shape = tuple(indices.shape)
    if len(shape) not in (1, 2) or shape[0] != dims.N or 0 in shape[1:]:
        raise InputError(
            f"ssm_state_indices must be [N] or [N, 1+S] with N={dims.N} sequences, but got {shape}"
        )
    if indices.dtype not in INDEX_DTYPES:
        raise InputError(f"ssm_state_indices must be int32 or int64, but got {indices.dtype}")
    if len(shape) == 2 and not packed and shape[1] < dims.T:
        raise InputError(
            f"ssm_state_indices must name a slot for each of T={dims.T} tokens, [N, T] at least, "
            f"but got {shape}; give [N] to keep the state after the last token alone"
        )
    if accepted is not None:
        if tuple(accepted.shape) != (dims.N,):
            raise InputError(
                f"num_accepted_tokens must be [N] with N={dims.N} sequences, "
                f"but got {tuple(accepted.shape)}"
            )
        if accepted.dtype not in INDEX_DTYPES:
            raise InputError(
                f"num_accepted_tokens must be int32 or int64, but got {accepted.dtype}"
            )


def check_lengths(cu_seqlens: Tensor, tokens: int) -> None:
    """Raises InputError unless cu_seqlens rises within 0 .. `tokens`, if it lies on the host."""
    if cu_seqlens.device.type != "cpu":
        return
    values = cu_seqlens.tolist()
    if values[0] < 0 or values[-1] > tokens or values != sorted(values):
        raise InputError(
            f"cu_seqlens must rise within 0 .. T={tokens}, but got "
            f"{values if len(values) <= 8 else f'{values[:4]}...{values[-2:]}'}"
        )


def check_out(signature: Signature, given: Sequence[Tensor | None]) -> None:
    """That `out`, the last of `given` (tensors of the signature, and of `SERVING`), is none that
    programs still read while others write it. Raises InputError. Of tensors that are data.

    What has a number for each element of o, as v does, a program reads before it writes there, so
    that it may be written over. Of the others each is read by several: q by those of all blocks of
    V. Told by addresses alone, which takes 1 us of a call: of tensors that share memory and begin
    apart a layer's buffer is made, in which they lie beside each other.
    """
    *inputs, out = given
    if out is None:
        return
    address = out.data_ptr()
    if address == 0 or [x.data_ptr() for x in given if x is not None].count(address) == 1:
        return
    for place, x in enumerate(inputs):
        if x is None or x.data_ptr() != address:
            continue
        if place < len(signature.names):
            name, like_o = signature.shown[place], signature.dims[place] == _O
        else:
            name, like_o = SERVING[place - len(signature.names)], False
        if not (like_o and x.dtype == out.dtype and x.stride() == out.stride()):
            raise InputError(
                f"out begins where {name} does, which is read while out is written: give out "
                "memory of its own"
            )


_O = ("B", "T", "HV", "V")


def refuse_gradients(
    signature: Signature,
    tensors: Sequence[Any],
    others: Sequence[str] = SERVING,
    when: str = "",
) -> None:
    """Raises UnsupportedError where autograd would want a gradient of an input: of the signature's,
    or of `others`."""
    if torch.is_grad_enabled():
        for name, x in zip((*signature.shown, *others), tensors, strict=True):
            if x is not None and x.requires_grad:
                trains = signature.public.replace("fused_recurrent_", "chunk_")
                instead = f", or {trains}, which has one" if trains != signature.public else ""
                raise UnsupportedError(
                    f"{signature.public} has no backward{when}, but {name} requires a gradient: "
                    f"call it under torch.no_grad() or torch.inference_mode(){instead}"
                )
