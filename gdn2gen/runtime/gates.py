"""A call with its decay's gate apart: whether it is one, and its tensors without that gate.

`store.gates` decides, by the kernel's sizes where these are numbers, and while a tracer looks on by
the usual ones, so that one graph serves all lengths.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.family.problem import Regime, bound_of
from gdn2gen.runtime.arguments import Dims
from gdn2gen.runtime.dtypes import DTYPE_NAME
from gdn2gen.runtime.lookup import device_of, make_problem
from gdn2gen.runtime.signature import Signature
from gdn2gen.store.gates import can_be_apart, forced_apart, is_apart

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
    scan_apart: bool,
    watched: bool,
) -> bool:
    """Of a call that passed its checks, with a gate. On a GPU alone, but where
    GDN2GEN_GATE_APART=1; never under transforms of torch.func, which the gate's op does not know.
    """
    g = tensors[signature.gate]
    assert g is not None
    if torch._C._are_functorch_transforms_active() or g.layout != torch.strided:
        return False
    given = tuple([x is not None for x in tensors[signature.required :]])
    _, lower_bound, *flags = options
    least = None if lower_bound is None else -float(bound_of(lower_bound))
    dtypes = tuple([tensors[place].dtype for place in signature.typed_by])  # type: ignore[union-attr]
    wanted = signature.op, *head_dims, dtypes, given, least, *flags
    if watched:
        device = torch.device(g.device.type, g.device.index)
        return _decided(device, level, decay, scan_apart, None, *wanted)
    sizes = dims.B * dims.T, dims.N, dims.HV
    return _decided(g.device, level, decay, scan_apart, sizes, *wanted)


def _decided(
    device: torch.device,
    level: str,
    decay: str,
    scan_apart: bool,
    sizes: tuple[int, int, int] | None,
    *options: Any,
) -> bool:
    """`options` are those of `make_problem`."""
    said, dtypes = forced_apart(), options[3]
    if said is False or (said is None and device.type != "cuda"):
        return False
    if any(x not in DTYPE_NAME for x in dtypes):  # fp64, which the reference alone takes
        return bool(said)
    problem = make_problem(*options)
    if said:
        return can_be_apart(problem)
    regime = _USUAL if sizes is None else Regime(*sizes)
    given: dict[str, Any] = {"level": level, "decay": decay, "scan_apart": scan_apart}
    return is_apart(problem, regime, device_of(device), **given)


# What torch.compiler.assume_constant_result marks a function with, but that imports torch._dynamo.
_decided._dynamo_marked_constant = True  # type: ignore[attr-defined]


def parameters_of(
    signature: Signature, tensors: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """A_log and dt_bias."""
    places = signature.gate_parameters
    return tensors[places["A_log"]], tensors[places["dt_bias"]]


def without_gate(
    signature: Signature, tensors: tuple[Tensor | None, ...], g: Tensor
) -> tuple[Tensor | None, ...]:
    """The tensors of the call that reads the decay g."""
    dropped = signature.gate_parameters.values()
    return tuple(
        [
            g if place == signature.gate else None if place in dropped else x
            for place, x in enumerate(tensors)
        ]
    )
