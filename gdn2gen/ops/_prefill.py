"""What the public ops over whole sequences do for serving: checks, then the stages around pools."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from gdn2gen.family.prefill import INTERMEDIATE_TOKENS
from gdn2gen.runtime.arguments import Dims
from gdn2gen.runtime.autograd import Op
from gdn2gen.runtime.decoding_checks import refuse_gradients
from gdn2gen.runtime.prefill import rows_of_states
from gdn2gen.runtime.prefill_checks import POOLS, check_prefill
from gdn2gen.runtime.prefill_op import run

_WHEN: Final = " with states in a pool or on the way"


class Serving(NamedTuple):
    """The keywords of serving, as callers give them: `family.prefill.PREFILL_KEYWORDS`."""

    state_pool: Tensor | None = None
    ssm_state_indices: Tensor | None = None
    has_initial_state: Tensor | None = None
    null_slot: Any = None
    checkpoint_every_n_tokens: Any = None
    checkpoint_state_indices: Tensor | None = None

    @property
    def pools(self) -> tuple[Tensor | None, ...]:
        """Those of `POOLS`."""
        return tuple([getattr(self, name) for name in POOLS])


NOT_SERVING: Final = Serving()


def serving_of(
    state_pool: Tensor | None,
    ssm_state_indices: Tensor | None,
    has_initial_state: Tensor | None,
    null_slot: Any,
    checkpoint_every_n_tokens: Any,
    checkpoint_state_indices: Tensor | None,
) -> Serving:
    """`NOT_SERVING` where none is given, as in most calls, which are quick about it."""
    if (
        state_pool is None
        and ssm_state_indices is None
        and has_initial_state is None
        and null_slot is None
        and checkpoint_every_n_tokens is None
        and checkpoint_state_indices is None
    ):
        return NOT_SERVING
    return Serving(
        state_pool,
        ssm_state_indices,
        has_initial_state,
        null_slot,
        checkpoint_every_n_tokens,
        checkpoint_state_indices,
    )


def prefill(
    op: Op,
    tensors: tuple[Tensor | None, ...],
    serving: Serving,
    dims: Dims,
    options: tuple[Any, ...],
    decay: str,
    cu_seqlens_cpu: Tensor | None,
    *,
    intermediate: bool,
    watched: bool,
) -> tuple[Any, ...]:
    """o, the final state or the pool if asked for, and with `intermediate` states on the way.

    `tensors` and `options` passed the checks of any call over whole sequences.
    """
    signature = op.signature
    state_v_first, output_final_state = options[5], options[4]
    q, v = tensors[0], tensors[signature.names.index("v")]
    assert q is not None and v is not None
    initial = tensors[signature.states[0]]
    pools = serving.pools
    every = serving.checkpoint_every_n_tokens
    check_prefill(
        dims,
        state_v_first,
        (signature.shown[0], q),
        pools,
        initial=initial is not None,
        null_slot=serving.null_slot,
        every=every,
        intermediate=intermediate,
    )
    refuse_gradients(signature, (*tensors, *pools), POOLS, _WHEN)
    o = v.new_empty(v.shape)
    inner = (dims.V, dims.K) if state_v_first else (dims.K, dims.V)
    final_state = states = None
    if output_final_state and serving.state_pool is None:
        double = any([x is not None and x.dtype == torch.float64 for x in tensors])
        dtype = torch.float64 if double else torch.float32
        final_state = q.new_empty((dims.N, dims.HV, *inner), dtype=dtype)
    if intermediate:
        states = _states(q, dims, inner, tensors[-1], cu_seqlens_cpu, watched=watched)
    call: Callable[..., None] = op.prefill if watched else _straight(op)
    rest = serving.null_slot, every or 0, decay
    call(*tensors, *pools, o, final_state, states, *options, *rest)
    found = final_state if serving.state_pool is None else serving.state_pool
    result = (o, found if output_final_state else None)
    if states is None:
        return result
    return (*result, states.view(q.shape[0], -1, *states.shape[1:]))


def _straight(op: Op) -> Callable[..., None]:
    """The op past torch's dispatcher, which nobody looks at."""
    return lambda *arguments: run(op.signature, *arguments)


def _states(
    q: Tensor,
    dims: Dims,
    inner: tuple[int, int],
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    *,
    watched: bool,
) -> Tensor:
    """Room for the states on the way: as many as there are where the host knows, else zeros past
    the last."""
    shape = (dims.HV, *inner)
    if cu_seqlens is None:
        rows = rows_of_states(dims.T, dims.B, packed=False)
        return q.new_empty((rows, *shape))
    known = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    if watched or known.device.type != "cpu":
        return q.new_zeros((rows_of_states(dims.T, dims.N, packed=True), *shape))
    ends = known.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    return q.new_empty((sum(-(-x // INTERMEDIATE_TOKENS) for x in lengths), *shape))
