"""What Mamba-3's ops refuse, by the names of their arguments, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from gdn2gen.base.errors import InputError
from gdn2gen.family.mamba3 import States
from gdn2gen.runtime.dtypes import DTYPE_NAME

# Dims of each tensor by symbol: b rows, l tokens, h heads, g groups, n sequences.
_DIMS: Final = {
    "Q": "b l g N", "K": "b l g N", "V": "b l h P", "ADT": "b h l", "DT": "b h l", "Trap": "b h l",
    "Q_bias": "h N", "K_bias": "h N", "Angles": "b l h S", "D": "h", "Z": "b l h P",
}  # fmt: skip
# Of one token each.
_STEP_DIMS: Final = {
    name: " ".join(x for x in dims.split() if x != "l") for name, dims in _DIMS.items()
}
_STATE_DIMS: Final = ("n h S", "n h P N", "n h N", "n h P")
_OPTIONAL: Final = ("D", "Z", "cu_seqlens")
_IO: Final = ("Q", "K", "V")


def check(
    tensors: Mapping[str, Tensor | None],
    Input_States: object,
    chunk_size: object,
    flags: Mapping[str, object],
) -> States | None:
    """The input states by name, in float32 or wider but for v; of `mamba3_siso_combined`.

    Raises InputError.
    """
    for name, value in flags.items():
        if type(value) is not bool:
            raise InputError(f"{name} must be True or False, but got {value!r}")
    if type(chunk_size) is not int or chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise InputError(f"chunk_size must be a power of two, but got {chunk_size!r}")
    given = _check_types(tensors)
    cu_seqlens = given.pop("cu_seqlens", None)
    sizes = _check_sizes(given, _DIMS)
    count = sizes["b"]
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise InputError(
                f"cu_seqlens must be [sequences + 1] of at least one sequence, but got "
                f"{tuple(cu_seqlens.shape)}"
            )
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise InputError(f"cu_seqlens must be int32 or int64, but got {cu_seqlens.dtype}")
        if sizes["b"] != 1:
            raise InputError(
                f"cu_seqlens wants b = 1, but V has {sizes['b']} rows: flatten them into one"
            )
        count = cu_seqlens.shape[0] - 1
    return _check_states(Input_States, sizes | {"n": count}, given["V"])


def check_step(tensors: Mapping[str, Tensor | None], Input_States: object) -> States:
    """The same of `mamba3_siso_step`. Raises InputError."""
    given = _check_types(tensors)
    sizes = _check_sizes(given, _STEP_DIMS)
    states = _check_states(Input_States, sizes | {"n": sizes["b"]}, given["V"])
    if states is None:
        raise InputError(
            "a step needs Input_States, but got None; zeros are those before a sequence"
        )
    return states


def _check_types(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Those that were given."""
    given: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if x is None and name in _OPTIONAL:
            continue
        if not isinstance(x, Tensor):
            raise InputError(f"{name} must be a tensor, but got {type(x).__name__}")
        given[name] = x
    for name, x in given.items():
        if x.device != given["V"].device:
            raise InputError(f"{name} must be on {given['V'].device} like V, but is on {x.device}")
        if name != "cu_seqlens" and not x.is_floating_point():
            raise InputError(f"{name} must be of floating point, but got {x.dtype}")
    return given


def _check_sizes(given: Mapping[str, Tensor], dims: Mapping[str, str]) -> dict[str, int]:
    """Sizes by symbol."""
    for name, x in given.items():
        if x.dim() != len(dims[name].split()):
            raise InputError(
                f"{name} must be [{dims[name].replace(' ', ', ')}], but got {tuple(x.shape)}"
            )
    sizes: dict[str, int] = {}
    for name in ("V", "Q", "Angles"):
        for symbol, size in zip(dims[name].split(), given[name].shape, strict=True):
            sizes.setdefault(symbol, size)
    for name, x in given.items():
        wanted = tuple(sizes[symbol] for symbol in dims[name].split())
        if tuple(x.shape) != wanted:
            raise InputError(
                f"{name} must be [{dims[name].replace(' ', ', ')}] = {wanted}, but got "
                f"{tuple(x.shape)}"
            )
    if sizes["g"] == 0 or sizes["h"] % sizes["g"]:
        raise InputError(
            f"heads of V must be a multiple of the groups of Q, but got {sizes['h']} and "
            f"{sizes['g']}"
        )
    if 2 * sizes["S"] > sizes["N"]:
        raise InputError(
            f"Angles turn pairs of channels, at most N / 2 = {sizes['N'] // 2} of them, but got "
            f"S={sizes['S']}"
        )
    io = given["V"].dtype
    if io not in DTYPE_NAME and io != torch.float64:
        raise InputError(f"V must be bfloat16, float16 or float32, but got {io}")
    for name in _IO:
        if given[name].dtype != io:
            raise InputError(
                f"{name} must have the dtype of V, {io}, but got {given[name].dtype}; cast it with "
                ".to(V.dtype)"
            )
    return sizes


def _check_states(given: object, sizes: Mapping[str, int], V: Tensor) -> States | None:
    if given is None:
        return None
    if not isinstance(given, tuple | list) or len(given) != len(_STATE_DIMS):
        said = f"{len(given)} of them" if isinstance(given, tuple | list) else type(given).__name__
        raise InputError(f"Input_States must be a tuple of angle, ssm, k and v, but got {said}")
    for name, dims, x in zip(States._fields, _STATE_DIMS, given, strict=True):
        wanted = tuple(sizes[symbol] for symbol in dims.split())
        if not isinstance(x, Tensor):
            raise InputError(f"{name} of Input_States must be a tensor, but got {type(x).__name__}")
        if tuple(x.shape) != wanted:
            raise InputError(f"{name} of Input_States must be {wanted}, but got {tuple(x.shape)}")
        if x.device != V.device:
            raise InputError(
                f"{name} of Input_States must be on {V.device} like V, but is on {x.device}"
            )
        exact = name in ("angle", "ssm")
        if not x.is_floating_point() or (exact and x.dtype not in (torch.float32, torch.float64)):
            words = "float32" if exact else "of floating point"
            raise InputError(f"{name} of Input_States must be {words}, but got {x.dtype}")
    wide = torch.promote_types(V.dtype, torch.float32)
    angle, ssm, k, v = given
    return States(angle.to(wide), ssm.to(wide), k.to(wide), v)
