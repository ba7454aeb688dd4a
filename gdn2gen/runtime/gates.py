"""Whether a call has its decay's gate apart.

`store.gates` decides, by the call's sizes where these are numbers, and while a tracer looks on by
the usual ones, so that one graph serves all lengths.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.family.problem import Regime, bound_of
from gdn2gen.runtime.arguments import Dims
from gdn2gen.runtime.lookup import device_of, make_problem
from gdn2gen.runtime.signature import Signature
from gdn2gen.store.gates import is_apart
from gdn2gen.store.surroundings import Surroundings

_USUAL: Final = Regime(tokens=16384, sequences=4, heads=16)


def has_gate_apart(
    signature: Signature,
    tensors: tuple[Tensor | None, ...],
    dims: Dims,
    head_dims: tuple[int, int],
    options: tuple[Any, ...],
    level: str,
    decay: str,
    *,
    computed: bool,
    scan_apart: bool,
    watched: bool,
    read: tuple[Any, ...] | None = None,
) -> bool:
    """Of a call that passed its checks, with a gate; `computed`: by kernels. On a GPU alone, but
    where GDN2GEN_GATE_APART=1; never under transforms of torch.func, which the gate's op does not
    know. `read`: the `surroundings` that what is said here is remembered for, if it is.
    """
    g, said = tensors[signature.gate], _said(read)
    assert g is not None
    if said is False or torch._C._are_functorch_transforms_active():
        return False
    if said:
        return True
    if g.device.type != "cuda" or not computed:
        return False
    given = tuple([x is not None for x in tensors[signature.required :]])
    _, lower_bound, *flags = options
    least = None if lower_bound is None else -float(bound_of(lower_bound))
    dtypes = tuple([tensors[place].dtype for place in signature.typed_by])  # type: ignore[union-attr]
    wanted = signature.op, *head_dims, dtypes, given, least, *flags
    if watched:
        device = torch.device(g.device.type, g.device.index)
        return _is_apart(device, level, decay, scan_apart, read, None, *wanted)
    sizes = dims.B * dims.T, dims.N, dims.HV
    return _is_apart(g.device, level, decay, scan_apart, read, sizes, *wanted)


def _said(read: tuple[Any, ...] | None) -> bool | None:
    return Surroundings.of(read).gate_apart


def _is_apart(
    device: torch.device,
    level: str,
    decay: str,
    scan_apart: bool,
    read: tuple[Any, ...] | None,
    sizes: tuple[int, int, int] | None,
    *options: Any,
) -> bool:
    """`options` are those of `make_problem`."""
    regime = _USUAL if sizes is None else Regime(*sizes)
    given: dict[str, Any] = {"level": level, "decay": decay, "scan_apart": scan_apart, "read": read}
    return is_apart(make_problem(*options), regime, device_of(device), **given)


# What torch.compiler.assume_constant_result marks a function with, but that imports torch._dynamo.
_said._dynamo_marked_constant = True  # type: ignore[attr-defined]
_is_apart._dynamo_marked_constant = True  # type: ignore[attr-defined]
