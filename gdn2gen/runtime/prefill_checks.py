"""Checks of what a call over whole sequences takes for serving, beside its recurrence's tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdn2gen.base.errors import InputError
from gdn2gen.family.prefill import INTERMEDIATE_TOKENS
from gdn2gen.runtime.arguments import (
    Dims,
    TensorLayout,
    by_kernels,
    check_dense,
    check_devices,
    check_narrow,
)
from gdn2gen.runtime.decoding import Strided, slot_stride_of
from gdn2gen.runtime.decoding_checks import INDEX_DTYPES, check_null_slot, check_pool

POOLS = ("state_pool", "ssm_state_indices", "has_initial_state", "checkpoint_state_indices")
"""The tensors among them, in the order of the torch op."""


def check_prefill(
    dims: Dims,
    state_v_first: bool,
    q: tuple[str, Tensor],
    pools: Sequence[Tensor | None],
    *,
    initial: bool,
    null_slot: object,
    every: object,
    intermediate: bool,
) -> None:
    """Ranks, shapes, dtypes and devices of `POOLS`, and what goes with what. `q`: what its caller
    calls it, and itself. Raises InputError."""
    for name, x in zip(POOLS, pools, strict=True):
        if x is not None and not isinstance(x, Tensor):
            raise InputError(f"{name} must be a tensor or None, but got {type(x).__name__}")
    named = {
        name: None if x is None else TensorLayout.of(x)
        for name, x in zip(POOLS, pools, strict=True)
    }
    for name, layout in named.items():
        if layout is not None:
            check_dense(name, layout.layout)
    check_devices({q[0]: TensorLayout.of(q[1]), **named})
    pool, indices, flags, checkpoints = (named[name] for name in POOLS)
    check_pool(pool, indices, dims, state_v_first, initial=initial)
    if pools[0] is not None:
        if by_kernels(pools[0].device):
            check_narrow("state_pool", pools[0].dtype)
        slot_stride_of(Strided(pools[0].shape, pools[0].dtype, pools[0].stride()))
    check_null_slot(null_slot, indices is not None)
    for name, layout in (("ssm_state_indices", indices), ("has_initial_state", flags)):
        if layout is not None and tuple(layout.shape) != (dims.N,):
            raise InputError(
                f"{name} must be [N] with N={dims.N} sequences, but got {tuple(layout.shape)}"
            )
    if indices is not None and indices.dtype not in INDEX_DTYPES:
        raise InputError(f"ssm_state_indices must be int32 or int64, but got {indices.dtype}")
    if flags is not None and flags.dtype != torch.bool:
        raise InputError(f"has_initial_state must be bool, but got {flags.dtype}")
    if flags is not None and pool is None:
        raise InputError("has_initial_state is of state_pool, but got state_pool=None")
    _check_checkpoints(checkpoints, pool, dims, every, intermediate)


def _check_checkpoints(
    indices: TensorLayout | None,
    pool: TensorLayout | None,
    dims: Dims,
    every: object,
    intermediate: bool,
) -> None:
    if (indices is None) != (every is None):
        raise InputError(
            "checkpoint_state_indices say where the states after each checkpoint_every_n_tokens "
            "go: give both, or neither"
        )
    if indices is None:
        return
    if pool is None:
        raise InputError("checkpoint_state_indices name slots of state_pool, which is None")
    if intermediate:
        raise InputError(
            "return_intermediate_states and checkpoint_state_indices were given, but a call keeps "
            "states in one way: leave one out"
        )
    if type(every) is not int or every < 1 or every % INTERMEDIATE_TOKENS:
        raise InputError(
            f"checkpoint_every_n_tokens must be a multiple of {INTERMEDIATE_TOKENS}, at which all "
            f"chunks end, but got {every!r}"
        )
    shape = tuple(indices.shape)
    if len(shape) != 2 or shape[0] != dims.N:
        raise InputError(
            f"checkpoint_state_indices must be [N, C] with N={dims.N} sequences, but got {shape}"
        )
    if indices.dtype not in INDEX_DTYPES:
        raise InputError(
            f"checkpoint_state_indices must be int32 or int64, but got {indices.dtype}"
        )
