"""Head dims of a call: those that kernels are made for, and have been verified at on such a GPU."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch

from gdn2gen.base import environment
from gdn2gen.base.device import present_device
from gdn2gen.base.errors import DeviceError, UnsupportedError
from gdn2gen.family.mamba3_problem import MAMBA3
from gdn2gen.family.problem import DIMS, USUAL_DIMS, check_head_dim
from gdn2gen.family.registry import OPS
from gdn2gen.runtime.dtypes import DTYPE_NAME
from gdn2gen.store import verified
from gdn2gen.store.surroundings import Surroundings


def check_head_dims(
    op: str,
    dtype: torch.dtype,
    device: torch.device,
    K: int,
    V: int,
    read: tuple[Any, ...] | None = None,
) -> tuple[int, int]:
    """K and V as numbers, which a tracer's symbols then are for good.

    `op`: what is looked up: a recurrence's name for its chunked op, the public name of another op.
    Raises UnsupportedError for head dims that kernels are not made for; and for those that `op` was
    not verified at in `dtype` on a GPU of this architecture, unless GDN2GEN_UNVERIFIED=1 or the
    recipe is forced. `read`: the `surroundings` that such calls are known by from then on.
    """
    dims = _known(K), _known(V)
    if dtype not in DTYPE_NAME:
        return dims  # refused as such
    if not passed_here(op, dtype, device, *dims):
        check_head_dim("K", dims[0])
        check_head_dim("V", dims[1])
        refusal = why_refused(op, dtype, device, *dims, read)
        if refusal is not None:
            raise UnsupportedError(refusal)
    return dims


def passed_here(op: str, dtype: torch.dtype, device: torch.device, K: int, V: int) -> bool:
    """Whether that is verified on such a GPU; in Triton's interpreter, on any."""
    return verified.is_verified(op, DTYPE_NAME[dtype], K, V, _arch(device))


def runs_here(op: str, dtype: torch.dtype, device: torch.device, K: int, V: int) -> bool:
    """Whether a call would not be refused, for one that has another op to go to."""
    if dtype not in DTYPE_NAME:
        return False
    around = Surroundings.of()
    allowed = around.unverified is not None or around.forced is not None
    return allowed or passed_here(op, dtype, device, K, V)


def why_refused(
    op: str,
    dtype: torch.dtype,
    device: torch.device,
    K: int,
    V: int,
    read: tuple[Any, ...] | None = None,
) -> str | None:
    """None where it runs though it was not verified, with a warning where the user wants that."""
    around = Surroundings.of(read)
    if around.forced is not None:
        return None
    allowed = around.unverified
    if allowed == environment.VERIFYING:
        return None
    verified.look_anew()  # another process may have filed it since
    if passed_here(op, dtype, device, K, V):
        return None
    said = _said(op, dtype, device, K, V)
    if allowed is not None:
        _warn_once(f"{said}, and GDN2GEN_UNVERIFIED={allowed} uses them")
        return None
    place = verified.Place(op, DTYPE_NAME[dtype], K, V)
    package = ""
    if op in (*OPS, MAMBA3):
        problem = f"--op {op} --head-dim {K},{V} --dtype {DTYPE_NAME[dtype]}"
        package = f"`gdn2gen generate {problem} --out DIR` makes a package of kernels that passed; "
    return (
        f"{said}: `{place.command}` compares them with the fp64 reference on the GPU at hand, and "
        f"calls run what passed; {package}GDN2GEN_UNVERIFIED=1 uses them as they are"
    )


# What torch.compiler.assume_constant_result marks a function with, but that imports torch._dynamo.
passed_here._dynamo_marked_constant = True  # type: ignore[attr-defined]
why_refused._dynamo_marked_constant = True  # type: ignore[attr-defined]
runs_here._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _arch(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    try:
        return present_device(device.index).arch
    except DeviceError:  # a tracer's tensors say that they are on a GPU where there is none
        return None


def _said(op: str, dtype: torch.dtype, device: torch.device, K: int, V: int) -> str:
    arch, place = _arch(device), verified.Place(op, DTYPE_NAME[dtype], K, V)
    where = f"a GPU of {arch}" if arch else "a GPU"
    others = verified.archs_of(*place)
    known = f" (they were on {', '.join(others)})" if others else ""
    before = verified.other_versions(place, arch)
    known = f" by this version (they were by {', '.join(before)})" if before else known
    return (
        f"{op}'s kernels for head dims K={K}, V={V} in {place.dtype} were not verified on "
        f"{where}{known}"
    )


def _known(size: int) -> int:
    """Found by comparing, since a tracer's symbol stays one in `int`; with the usual ones first."""
    found: int = next((known for known in (*USUAL_DIMS, *DIMS["V"]) if size == known), size)
    return int(found)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
