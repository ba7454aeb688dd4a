"""Head dims of a call: those that kernels are made for, and have been verified at on such a GPU."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from gdn2gen.base import environment
from gdn2gen.base.device import present_device
from gdn2gen.base.errors import DeviceError, UnsupportedError
from gdn2gen.family.problem import USUAL_DIMS, check_head_dim
from gdn2gen.runtime.dtypes import DTYPE_NAME
from gdn2gen.store import verified
from gdn2gen.store.dispatch import forced


def check_head_dims(
    op: str, dtype: torch.dtype, device: torch.device, K: int, V: int
) -> tuple[int, int]:
    """K and V as numbers, which a tracer's symbols then are for good.

    Raises UnsupportedError for head dims that kernels are not made for; and for those that `op` was
    not verified at in `dtype` on a GPU of this architecture, unless GDN2GEN_UNVERIFIED=1 or the
    recipe is forced.
    """
    dims = _known(K), _known(V)
    if dtype not in DTYPE_NAME or passed_here(op, dtype, device, *dims):
        return dims  # other dtypes are refused as such
    check_head_dim("K", dims[0])
    check_head_dim("V", dims[1])
    allowed = environment.VERIFYING if forced() is not None else environment.unverified()
    if allowed == environment.VERIFYING:
        return dims
    said = _said(op, dtype, device, *dims)
    if allowed is None:
        raise UnsupportedError(
            f"{said}: `gdn2gen verify --op {op} --head-dim {dims[0]},{dims[1]}` compares them with "
            "the fp64 reference on the GPU at hand, and calls run what passed; `gdn2gen generate` "
            "makes a package of kernels that passed; GDN2GEN_UNVERIFIED=1 uses them as they are"
        )
    _warn_once(f"{said}, and GDN2GEN_UNVERIFIED={allowed} uses them")
    return dims


def passed_here(op: str, dtype: torch.dtype, device: torch.device, K: int, V: int) -> bool:
    """Whether that is verified on such a GPU; in Triton's interpreter, on any."""
    return verified.is_verified(op, DTYPE_NAME[dtype], K, V, _arch(device))


# What torch.compiler.assume_constant_result marks a function with, but that imports torch._dynamo.
passed_here._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _arch(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    try:
        return present_device(device.index).arch
    except DeviceError:  # a tracer's tensors say that they are on a GPU where there is none
        return None


def _said(op: str, dtype: torch.dtype, device: torch.device, K: int, V: int) -> str:
    name, arch = DTYPE_NAME[dtype], _arch(device)
    known = verified.archs_of(op, name, K, V)
    where = f"a GPU of {arch}" if arch else "a GPU"
    others = f" (they were on {', '.join(known)})" if known else ""
    return (
        f"{op}'s kernels for head dims K={K}, V={V} in {name} were not verified on {where}{others}"
    )


def _known(size: int) -> int:
    """Found by comparing with the usual ones first, which a tracer need not be asked for."""
    for known in USUAL_DIMS:
        if size == known:
            return known
    return int(size)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
