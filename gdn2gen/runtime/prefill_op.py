"""The op of a recurrence over whole sequences for serving, in torch.library.

It returns nothing and writes what it is given, as the op over a few tokens does: o, a final state,
states on the way, slots of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gdn2gen.family.prefill import INTERMEDIATE_TOKENS
from gdn2gen.family.prefill_reference import prefill
from gdn2gen.family.recurrence import Recurrence
from gdn2gen.family.registry import recurrence_named
from gdn2gen.runtime._kernels import request_of, sequences_of
from gdn2gen.runtime.arguments import by_kernels
from gdn2gen.runtime.prefill import Pools, run_prefill
from gdn2gen.runtime.prefill_checks import POOLS
from gdn2gen.runtime.signature import Options, Signature, signature_of

# Of a recurrence there is one library: `runtime.autograd` defines it, and this adds to it.
_Library: Any = torch.library.Library  # untyped in torch
_library = _Library("gdn2gen", "FRAGMENT")
_WRITTEN = ("o", "final_state", "states")


def prefill_op(recurrence: Recurrence) -> Any:
    """Make the op known to torch: once for each recurrence. Returns it."""
    signature = signature_of(recurrence.name)
    name = f"{recurrence.name}_prefill"
    _library.define(name + signature.prefill_schema)
    for key in ("CUDA", "CPU"):
        _library.impl(name, partial(run, signature), key)
    torch.library.register_fake(f"gdn2gen::{name}", _fake, lib=_library)
    return getattr(torch.ops.gdn2gen, name).default


def _fake(*_: Any) -> None:
    """Nothing is returned."""


def run(signature: Signature, *arguments: Any) -> None:
    """The op itself: tensors of the signature, `POOLS`, what is written, `Options`, null_slot,
    the tokens between checkpoints and what is expected of the decay."""
    first = len(signature.names)
    second = first + len(POOLS)
    third = second + len(_WRITTEN)
    tensors, pools, written = arguments[:first], arguments[first:second], arguments[second:third]
    *options, null_slot, every, decay = arguments[third:]
    o, final_state, states = written
    device = tensors[0].device
    if not by_kernels(device):
        if device.type != "meta":
            _reference(signature, tensors, pools, written, Options(*options), null_slot, every)
        return
    *optional, cu_seqlens = tensors
    pooled = pools[0] is not None
    flags = Options(*options)._replace(output_final_state=pooled or final_state is not None)
    state = signature.states[0]
    # what a pool holds is given, too
    seen = [pools[0] if i == state and pooled else x for i, x in enumerate(optional)]
    request = request_of(signature, seen, sequences_of(cu_seqlens), flags[: signature.options])
    given = {x: y for x, y in zip(signature.names, optional, strict=False) if y is not None}
    named = dict(zip(POOLS, pools, strict=True))
    run_prefill(
        request,
        decay,
        given,
        cu_seqlens,
        Pools(**named, null_slot=null_slot, every=every),
        o,
        final_state,
        states,
    )


def _reference(
    signature: Signature,
    tensors: Sequence[Tensor | None],
    pools: Sequence[Tensor | None],
    written: Sequence[Tensor | None],
    options: Options,
    null_slot: int | None,
    every: int,
) -> None:
    o, final_state, states = written
    assert o is not None
    named: dict[str, Any] = dict(zip(POOLS, pools, strict=True))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        prefill(
            recurrence_named(signature.op),
            dict(zip(signature.names, tensors, strict=True)),
            o,
            final_state,
            states,
            **named,
            null_slot=null_slot,
            every=every if states is None else INTERMEDIATE_TOKENS,
            scale=options.scale,
            use_qk_l2norm_in_kernel=options.l2norm,
            use_gate_in_kernel=options.gate_in_kernel,
            lower_bound=options.lower_bound,
            use_beta_sigmoid_in_kernel=options.beta_sigmoid,
            allow_neg_eigval=options.neg_eigval,
            state_v_first=options.state_v_first,
        )
