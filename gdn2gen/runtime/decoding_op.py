"""The op of a recurrence over a few tokens: in torch.library, and past it where nobody looks on.

The op returns nothing and writes what it is given: o, a final state, slots of a pool. So one op
serves every call, and its schema says what it mutates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.family.decoding_reference import decode
from gdn2gen.family.recurrence import Recurrence
from gdn2gen.family.registry import recurrence_named
from gdn2gen.runtime.arguments import (
    TensorLayout,
    by_kernels,
    check_dense,
    check_devices,
)
from gdn2gen.runtime.decoding import BUFFERS, Plan, Read, decoding_name, known_plan, surroundings
from gdn2gen.runtime.decoding_checks import SERVING
from gdn2gen.runtime.head_dims import check_head_dims
from gdn2gen.runtime.signature import Options, Signature, decoding_signature

# Of a recurrence there is one library: `runtime.autograd` defines it, and this adds to it.
_Library: Any = torch.library.Library  # untyped in torch
_library = _Library("gdn2gen", "FRAGMENT")


@dataclass(frozen=True, eq=False)
class DecodingOp:
    """What torch knows of a recurrence's op over a few tokens."""

    signature: Signature
    call: Any


def decoding_op(recurrence: Recurrence) -> DecodingOp:
    """Make the op known to torch: once for each recurrence."""
    signature = decoding_signature(recurrence.name)
    name = f"{recurrence.name}_recurrent"
    _library.define(name + signature.decoding_schema)
    for key in ("CUDA", "CPU"):
        _library.impl(name, partial(_run, signature), key)
    torch.library.register_fake(f"gdn2gen::{name}", _fake, lib=_library)
    return DecodingOp(signature, getattr(torch.ops.gdn2gen, name).default)


def plan_of(
    signature: Signature,
    tensors: Sequence[Tensor | None],
    options: tuple[Any, ...],
    null_slot: int | None,
    read: Read | None = None,
) -> Plan:
    """The plan of a call on tensors that are data: those of the signature, and of `SERVING`.
    `read`: the `surroundings` that it is remembered for, if it is.

    An attribute of a tensor costs 0.1 us and more, and here each is asked for of all of them: the
    device by one pass in C, strides only where rows do not follow each other.
    """
    q = tensors[0]
    assert q is not None
    places = {*map(Tensor.get_device, [x for x in tensors if x is not None])}
    if len(places) > 1 or _HOST in places:
        named = zip((*signature.shown, *SERVING), tensors, strict=True)
        check_devices({name: None if x is None else TensorLayout.of(x) for name, x in named})
    try:
        given = [
            None if x is None else (x.shape, x.dtype, x.is_contiguous() or (x.layout, x.stride()))
            for x in tensors
        ]
    except RuntimeError:  # what is not dense has no strides, or no shape
        for name, x in zip((*signature.shown, *SERVING), tensors, strict=True):
            if x is not None:
                check_dense(name, torch.jagged if x.is_nested else x.layout)
        raise
    read = surroundings() if read is None else read
    plan = known_plan(signature, options, null_slot, q.device, read, *given)
    # a plan outlives what is on file
    name = decoding_name(signature)
    check_head_dims(name, q.dtype, q.device, plan.dims.K, plan.dims.V, read[2])
    return plan


# What `get_device` says of tensors that are on none, be it the host, or without data.
_HOST: Final = -1


def launch(
    plan: Plan,
    inputs: Sequence[Tensor | None],
    o: Tensor | None,
    final_state: Tensor | None = None,
    *,
    known: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """o and the final state, in the tensors that are given for them. `inputs` are those of the
    signature, indices, accepted tokens and the pool; `known`: none of them is negated lazily."""
    device = plan.device
    if device.type == "cuda" and torch._C._cuda_getDevice() != device.index:
        with torch.cuda.device(device.index):
            return launch(plan, inputs, o, final_state, known=known)
    if o is None:
        o = plan.make_o()
    if final_state is None and plan.make_final is not None:
        final_state = plan.make_final()
    plan.run([*inputs, o, final_state], known=known)
    return o, final_state


def _run(signature: Signature, *arguments: Any) -> None:
    count = len(signature.names) + len(BUFFERS)
    tensors, (*options, null_slot) = [*arguments[:count]], arguments[count:]
    *inputs, o, final_state = tensors
    device = inputs[0].device
    if not by_kernels(device):
        _reference(signature, tensors, Options(*options), null_slot)
        return
    flags = Options(*options)._replace(output_final_state=final_state is not None)
    plan = plan_of(signature, (*inputs, o), (*flags[: signature.options],), null_slot)
    launch(plan, inputs, o, final_state)


def _fake(*_: Any) -> None:
    """Nothing is returned."""


def _reference(
    signature: Signature, tensors: Sequence[Tensor | None], options: Options, null_slot: int | None
) -> None:
    count = len(signature.names)
    indices, accepted, pool, o, final_state = tensors[count:]
    assert o is not None
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        decode(
            recurrence_named(signature.op),
            dict(zip(signature.names, tensors[:count], strict=True)),
            o,
            final_state,
            state_pool=pool,
            ssm_state_indices=indices,
            num_accepted_tokens=accepted,
            null_slot=null_slot,
            scale=options.scale,
            use_qk_l2norm_in_kernel=options.l2norm,
            use_gate_in_kernel=options.gate_in_kernel,
            lower_bound=options.lower_bound,
            use_beta_sigmoid_in_kernel=options.beta_sigmoid,
            allow_neg_eigval=options.neg_eigval,
            state_v_first=options.state_v_first,
        )
