"""Prefill for serving in plain PyTorch: sequences that go on from slots of a pool, with states kept
on the way.

The recurrence itself is `reference.chunk`'s. What lies around it is said here once: which slot is
read, which are written and when, and what is padding; the words are those of
`decoding_reference`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

from torch import Tensor

from gdn2gen.family.decoding_reference import spans_of
from gdn2gen.family.recurrence import Recurrence
from gdn2gen.family.reference import Options, chunk


def prefill(
    recurrence: Recurrence,
    tensors: Mapping[str, Tensor | None],
    o: Tensor,
    final_state: Tensor | None = None,
    states: Tensor | None = None,
    *,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int | None = None,
    every: int = 0,
    checkpoint_state_indices: Tensor | None = None,
    **options: Unpack[Options],
) -> None:
    """Write `o`, `final_state` and `states` if they are given, and slots of `state_pool`.

    Args:
        tensors, o, final_state, state_pool, null_slot: as in `decoding_reference.decode`.
        ssm_state_indices: [N], slots of the sequences; without it sequence n has slot n.
        has_initial_state: [N]: a sequence begins with what lies in its slot, or with zeros.
        every: tokens from one state that is kept to the next.
        states: [rows, HV, K, V], or as the options say: those before tokens 0, `every`, ... of all
            sequences, one after the other.
        checkpoint_state_indices: [N, C]: the slots of those after `every`, 2 `every`, ... tokens.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    spans = spans_of(given, o)
    initial = given.pop("initial_state", None)
    rowwise = {x.name for x in recurrence.inputs if x.symbols[:2] == ("B", "T")}
    o.zero_()

    def known(slot: int) -> bool:
        return state_pool is not None and 0 <= slot < len(state_pool) and slot != null_slot

    row_of_states = 0
    for n, (row, start, end) in enumerate(spans):
        slot = n if ssm_state_indices is None else int(ssm_state_indices[n])
        padding = state_pool is not None and not known(slot)
        state = None if initial is None else initial[n : n + 1]
        if state_pool is not None and not padding:
            begins = has_initial_state is None or bool(has_initial_state[n])
            state = state_pool[slot : slot + 1] if begins else None
        targets = [] if padding else _targets(checkpoint_state_indices, n)
        for first in range(start, max(end, start + 1), every or max(end - start, 1)):
            last = min(first + every, end) if every else end
            piece: dict[str, Tensor | None] = {
                name: x[row : row + 1, first:last] if name in rowwise else x
                for name, x in given.items()
            }
            values, after = chunk(recurrence, {**piece, "initial_state": state}, **options)
            if states is not None and first < end:
                states[row_of_states] = 0 if state is None else state[0].to(states.dtype)
                row_of_states += 1
            if not padding:
                o[row, first:last] = values[0]
            state = after
            passed = last - start
            if every and last > first and passed % every == 0 and passed // every <= len(targets):
                target = targets[passed // every - 1]
                if state_pool is not None and known(target):
                    state_pool[target] = state[0].to(state_pool.dtype)
        assert state is not None
        if state_pool is not None and not padding and end > start:
            state_pool[slot] = state[0].to(state_pool.dtype)
        if final_state is not None:
            final_state[n] = state[0].to(final_state.dtype)


def _targets(indices: Tensor | None, n: int) -> Sequence[int]:
    found: list[int] = [] if indices is None else indices[n].tolist()
    return found
