"""Checks of the public ops' tensors: bad input never reaches a kernel. And who is to compute.

Options are checked in `runtime.options`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from types import NoneType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from gdn2gen.base.environment import interpreted
from gdn2gen.base.errors import InputError
from gdn2gen.family.problem import DTYPES
from gdn2gen.runtime.dtypes import TORCH_DTYPE
from gdn2gen.runtime.sequences import check_cu_seqlens
from gdn2gen.runtime.signature import Signature

IO_DTYPES = {TORCH_DTYPE[name]: name for name in DTYPES}


@dataclass(frozen=True, eq=False)
class Dims:
    """Sizes of one call, by the symbols of `family.recurrence`; the same object for the same ones,
    which is quicker to look up by than all that they are of."""

    B: int
    T: int
    H: int
    HV: int
    HG: int
    K: int
    V: int
    N: int
    key: tuple[Any, ...]
    """What `lookup.make_request` takes before the options."""


class TensorLayout(NamedTuple):
    """What of a tensor the checks look at."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout

    @classmethod
    def of(cls, x: Tensor) -> TensorLayout:
        return cls(x.shape, x.dtype, x.device, x.layout)


_COPY = "cu_seqlens_cpu"
_PLAIN = frozenset({Tensor, torch.nn.Parameter, NoneType})


def is_watched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether something wants to see the ops themselves: a tracer, a mode, a subclass.

    If not, sizes are numbers.
    """
    return is_traced() or not _PLAIN.issuperset(map(type, tensors))


def is_traced() -> bool:
    """Whether a tracer or a mode wants to see them, whatever the tensors are."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )


def by_kernels(device: torch.device) -> bool:
    """Whether kernels compute: not on the CPU, unless they are interpreted, nor without data."""
    return device.type not in ("cpu", "meta") or (device.type == "cpu" and interpreted())


_HOST: Final = -1
"""What `get_device` says of tensors that are on none, be it the host, or without data."""


def device_of(given: Sequence[Tensor]) -> torch.device | None:
    """The device of all that are given; None where they are on several. By one pass in C."""
    places = {*map(Tensor.get_device, given)}
    if len(places) != 1:
        return None
    device = given[0].device
    if _HOST in places and any([x.device != device for x in given]):
        return None
    return device


def check_arguments(
    signature: Signature,
    tensors: tuple[Tensor | None, ...],
    cu_seqlens_cpu: Tensor | None,
    state_v_first: bool,
    *,
    known: bool = True,
) -> Dims:
    """Check ranks, shapes, dtypes, devices and cu_seqlens; return the sizes. Raises InputError.

    `tensors` are those of `signature`. With `known`, for tensors that nobody watches, only the
    values of cu_seqlens are looked at where all the rest passed before.
    """
    given = (*tensors, cu_seqlens_cpu)
    if not known or cu_seqlens_cpu is not None:
        check_types(signature, given)
    try:
        layouts = [None if x is None else (x.shape, x.dtype, x.device, x.layout) for x in given]
    except RuntimeError:  # what is nested has no shape
        for name, x in zip((*signature.shown, _COPY), given, strict=True):
            check_dense(name, torch.jagged if x is not None and x.is_nested else torch.strided)
        raise
    dims = (_known_dims if known else check_layouts)(signature, state_v_first, *layouts)
    cu_seqlens = tensors[-1]
    if cu_seqlens is not None and known:
        check_cu_seqlens(cu_seqlens, dims.T, cu_seqlens_cpu)
    return dims


def check_types(signature: Signature, given: tuple[object, ...]) -> None:
    for name, x in zip((*signature.shown, _COPY), given, strict=True):
        if not (x is None or isinstance(x, Tensor)):
            required = name in signature.shown[: signature.required]
            wanted = "a tensor" if required else "a tensor or None"
            raise InputError(f"{name} must be {wanted}, but got {type(x).__name__}")


def check_dense(name: str, layout: torch.layout) -> None:
    if layout is torch.jagged:
        raise InputError(
            f"{name} must be a dense tensor, but is nested; lay its sequences one after the other "
            f"in one row (B=1), and give cu_seqlens"
        )
    if layout is not torch.strided:
        raise InputError(
            f"{name} must be a dense tensor, but got {layout}; convert it with .to_dense()"
        )


def check_layouts(
    signature: Signature,
    state_v_first: bool,
    *given: tuple[torch.Size, torch.dtype, torch.device, torch.layout] | None,
) -> Dims:
    """`check_arguments` of what says all but the values: `TensorLayout`s of the signature's tensors
    and of the copy of cu_seqlens."""
    layouts = [None if x is None else TensorLayout(*x) for x in given]
    for name, x in zip((*signature.shown, _COPY), layouts, strict=True):
        if x is not None:
            check_dense(name, x.layout)
    *tensors, copy = layouts
    required = [
        _check_rank(name, dims, x)
        for name, dims, x in zip(signature.shown, signature.dims, tensors, strict=True)
        if name in signature.shown[: signature.required]
    ]
    check_devices(dict(zip(signature.shown, tensors, strict=True)))
    sizes = signature.bind([required[place].shape for place in signature.sized_by])
    _check_heads(signature, sizes)
    for name, dims, x in zip(signature.shown, signature.dims, required, strict=False):
        shape = tuple([sizes[symbol] for symbol in dims])
        if tuple(x.shape) != shape:
            raise InputError(f"{name} must be {shape}, but got {tuple(x.shape)}")
    _check_dtypes(signature, required)
    least = 0 if signature.decoding else 1
    sequences = _sequences(tensors[-1], sizes["B"], copy, signature.shown[0], least)
    sizes["N"] = sizes["B"] if sequences is None else sequences
    for place in range(signature.required, len(tensors)):
        x = tensors[place]
        if x is not None:
            _check_optional(signature, place, x, sizes, state_v_first)
            if signature.roles[place] == "io":
                _check_like(signature, place, x, sizes, required[0].dtype)
    shapes = tuple([required[place].shape for place in signature.sized_by])
    dtypes = tuple([required[place].dtype for place in signature.typed_by])
    others = tuple([x is not None for x in tensors[signature.required : -1]])
    key = (signature.op, shapes, dtypes, required[0].device, others, sequences)
    return Dims(**sizes, key=key)


_known_dims = lru_cache(maxsize=1024)(check_layouts)


def _check_rank(name: str, dims: tuple[str, ...], x: TensorLayout | None) -> TensorLayout:
    if x is None:
        raise InputError(f"{name} must be a tensor, but got NoneType")
    if len(x.shape) != len(dims):
        words = ", ".join(_WORDS.get(symbol, symbol) for symbol in dims)
        raise InputError(
            f"{name} must be [{words}] with {len(dims)} dimensions, but got shape {tuple(x.shape)}"
        )
    return x


_WORDS = {"H": "heads", "HV": "heads", "HG": "heads", "K": "dim", "V": "dim"}


def _check_heads(signature: Signature, sizes: Mapping[str, int]) -> None:
    """Head dims, and how the numbers of heads go together."""
    K, V, H, HV, HG = (sizes[symbol] for symbol in ("K", "V", "H", "HV", "HG"))
    if K == 0 or V == 0:
        raise InputError(f"head dims must be at least 1, but got K={K}, V={V}")
    if H == 0 or HV % H != 0:
        first = signature.shown[0]
        raise InputError(
            f"value heads must be a multiple of {first}'s heads, but got HV={HV}, H={H}; "
            f"tensors are [B, T, heads, dim]"
        )
    if HG != H and HG != HV:  # Dynamo (torch 2.13) finds no symbol in a tuple
        name = signature.shown[signature.gate]
        raise InputError(f"{name} must have H={H} or HV={HV} heads, but got {HG}")


def _sequences(
    cu_seqlens: TensorLayout | None,
    B: int,
    cu_seqlens_cpu: TensorLayout | None,
    first: str,
    least: int,
) -> int | None:
    """How many are packed, as `cu_seqlens` says; its values are checked elsewhere."""
    if cu_seqlens is None:
        if cu_seqlens_cpu is not None:
            raise InputError("cu_seqlens_cpu was given without cu_seqlens")
        return None
    if B != 1:
        raise InputError(
            f"cu_seqlens wants B=1, but {first} has B={B}: flatten the batch into one row"
        )
    shape, cpu = tuple(cu_seqlens.shape), cu_seqlens_cpu
    if len(shape) != 1 or shape[0] < least + 1:
        raise InputError(f"cu_seqlens must be [N+1] with N >= {least}, but got shape {shape}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise InputError(f"cu_seqlens must be int32 or int64, but got {cu_seqlens.dtype}")
    if cpu is not None and (tuple(cpu.shape) != shape or cpu.device.type != "cpu"):
        raise InputError(
            f"cu_seqlens_cpu must be a copy of cu_seqlens on the CPU, shape {shape}, "
            f"but got {tuple(cpu.shape)} on {cpu.device}"
        )
    return shape[0] - 1


def _check_dtypes(signature: Signature, required: list[TensorLayout]) -> None:
    first = signature.shown[0]
    dtype = required[0].dtype
    for name, role, x in zip(signature.shown, signature.roles, required, strict=False):
        if name == first or role not in ("io", "factor"):
            _check_dtype(name, x)
        elif x.dtype != dtype and not (role == "factor" and x.dtype == torch.float32):
            wide, cast = "", f".to({first}.dtype)"
            if role == "factor" and dtype != torch.float32:
                wide, cast = " or torch.float32,", f"{cast} or .float()"
            raise InputError(
                f"{name} must have the dtype of {first}, {dtype},{wide} but got {x.dtype}; "
                f"cast it with {cast}"
            )


def _check_dtype(name: str, x: TensorLayout) -> None:
    if x.dtype not in IO_DTYPES and x.dtype != torch.float64:
        raise InputError(f"{name} must be bfloat16, float16 or float32, but got {x.dtype}")


def _check_optional(
    signature: Signature, place: int, x: TensorLayout, sizes: Mapping[str, int], state_v_first: bool
) -> None:
    name, role, found = signature.shown[place], signature.roles[place], tuple(x.shape)
    if role in ("index", "io"):  # see _sequences, and _check_like
        return
    shape = tuple([sizes[symbol] for symbol in signature.dims[place]])
    if role == "state":
        if state_v_first:
            shape = (*shape[:-2], shape[-1], shape[-2])
        if found != shape:
            raise InputError(
                f"{name} must be {shape} (N sequences; state_v_first={state_v_first}), "
                f"but got {found}"
            )
        check_state_dtype(name, x.dtype, narrow=signature.decoding)
        return
    _check_dtype(name, x)
    if found not in (shape, (prod(shape),)):
        whole = f"[{', '.join(map(str, shape))}]"
        wanted = whole if len(shape) == 1 else f"[{prod(shape)}] or {whole}"
        raise InputError(f"{name} must be {wanted}, but got {found}")


def _check_like(
    signature: Signature, place: int, x: TensorLayout, sizes: Mapping[str, int], dtype: torch.dtype
) -> None:
    """An optional tensor of tokens: all its dims, and the first one's dtype."""
    name, first = signature.names[place], signature.names[0]
    shape = tuple([sizes[symbol] for symbol in signature.dims[place]])
    if tuple(x.shape) != shape:
        raise InputError(f"{name} must be {shape}, but got {tuple(x.shape)}")
    if x.dtype != dtype:
        raise InputError(
            f"{name} must have the dtype of {first}, {dtype}, but got {x.dtype}; "
            f"cast it with .to({first}.dtype)"
        )


def check_state_dtype(name: str, dtype: torch.dtype, *, narrow: bool) -> None:
    """Raises InputError unless states may be of that dtype; `narrow`: bf16, too."""
    if dtype not in (torch.float32, torch.float64) and not (narrow and dtype == torch.bfloat16):
        wanted = "float32 or bfloat16" if narrow else "float32"
        raise InputError(f"{name} must be {wanted}, but got {dtype}")


def check_narrow(name: str, dtype: torch.dtype) -> None:
    """Raises InputError for float64, which only the reference takes."""
    if dtype == torch.float64:
        raise InputError(f"{name} must be float32 or narrower, but got {dtype}; cast it")


def check_devices(layouts: Mapping[str, TensorLayout | None]) -> None:
    (first, device), *others = ((name, x.device) for name, x in layouts.items() if x is not None)
    for name, other in others:
        if other != device:
            raise InputError(f"{name} must be on {device} like {first}, but is on {other}")
