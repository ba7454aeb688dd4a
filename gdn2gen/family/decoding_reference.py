"""Decoding in plain PyTorch: what the mode `recurrent` computes, with states in slots of a pool.

The recurrence itself is `reference.recurrent`'s, one sequence after the other. What lies around it
is said here once: which slot is read, which are written and when, and what is padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Unpack

import torch
from torch import Tensor

from gdn2gen.family.recurrence import Recurrence
from gdn2gen.family.reference import Options, recurrent


def decode(
    recurrence: Recurrence,
    tensors: Mapping[str, Tensor | None],
    o: Tensor,
    final_state: Tensor | None = None,
    *,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int | None = None,
    **options: Unpack[Options],
) -> None:
    """Write `o`, `final_state` if it is given, and slots of `state_pool`. Not differentiable.

    An index below 0, equal to `null_slot` or past the pool's end names no slot. A sequence that
    would read such a one gets zeros in its rows of o, and writes no slot; so does a row of o that
    no sequence covers.

    Args:
        tensors: those of `reference.recurrent`, by name; what cu_seqlens holds is taken within
            0 .. T, and may end before T.
        o: [B, T, HV, V].
        final_state: [N, HV, K, V] as `state_v_first` in the options says; not with a pool.
        state_pool: [slots, HV, K, V], or as the options say: read and written in place.
        ssm_state_indices: [N], slots of the sequences, or [N, 1+S]: the state after token t goes
            to slot [n, t], if that is one. Without it sequence n has slot n.
        num_accepted_tokens: [N], within 1 .. 1+S or taken as such: slot [n, accepted - 1] is read
            (slot [n, 0] without it).
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    spans = spans_of(given, o)
    made = torch.zeros_like(o)  # o may be v, which is read until the last token
    initial = given.pop("initial_state", None)
    rowwise = {x.name for x in recurrence.inputs if x.symbols[:2] == ("B", "T")}

    def known(slot: int) -> bool:
        return state_pool is not None and 0 <= slot < len(state_pool) and slot != null_slot

    for n, (row, start, end) in enumerate(spans):
        own: dict[str, Tensor | None] = {
            name: x[row : row + 1, start:end] if name in rowwise else x for name, x in given.items()
        }
        slots, read = _slots(n, ssm_state_indices, num_accepted_tokens)
        if state_pool is not None and not known(read):
            continue
        state = state_pool[read : read + 1] if state_pool is not None else None
        if initial is not None:
            state = initial[n : n + 1]
        after = slots if ssm_state_indices is not None and ssm_state_indices.ndim == 2 else None
        pieces = [(0, end - start)] if after is None else [(t, t + 1) for t in range(end - start)]
        for first, last in pieces:
            piece = {
                name: x[:, first:last] if x is not None and name in rowwise else x
                for name, x in own.items()
            }
            values, state = recurrent(recurrence, {**piece, "initial_state": state}, **options)
            made[row, start + first : start + last] = values[0]
            if after is not None and first < len(after) and known(after[first]):
                assert state_pool is not None
                state_pool[after[first]] = state[0].to(state_pool.dtype)
        if state_pool is not None and after is None and end > start:
            assert state is not None
            state_pool[read] = state[0].to(state_pool.dtype)
        elif final_state is not None:
            assert state is not None
            final_state[n] = state[0].to(final_state.dtype)
    o.copy_(made)


def spans_of(given: dict[str, Tensor], o: Tensor) -> list[tuple[int, int, int]]:
    """Of each sequence: its row of the batch, and its first and last token in it."""
    B, T = o.shape[:2]
    cu_seqlens = given.pop("cu_seqlens", None)
    if cu_seqlens is None:
        return [(n, 0, T) for n in range(B)]
    ends = [min(max(int(x), 0), T) for x in cu_seqlens.tolist()]
    return [(0, start, max(start, end)) for start, end in pairwise(ends)]


def _slots(n: int, indices: Tensor | None, accepted: Tensor | None) -> tuple[list[int], int]:
    """Slots of a sequence, and that which is read."""
    if indices is None:
        return [n], n
    slots: list[int] = indices[n].reshape(-1).tolist()
    if accepted is None:
        return slots, slots[0]
    return slots, slots[min(max(int(accepted[n]), 1), len(slots)) - 1]
