"""Checks of the public ops' arguments: bad input never reaches a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gdn2gen.base.errors import InputError, UnsupportedError
from gdn2gen.family.problem import HEAD_DIMS, check_lower_bound
from gdn2gen.runtime.sequences import check_cu_seqlens

IO_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Dims:
    """Sizes of one call: batch, tokens, heads of q and k, of v and w, of g and b, head dims, N."""

    B: int
    T: int
    H: int
    HV: int
    HG: int
    K: int
    V: int
    N: int


class TensorLayout(NamedTuple):
    """What of a tensor the checks look at."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout


_REQUIRED = ("q", "k", "v", "g", "b", "w")
_OPTIONAL = ("initial_state", "A_log", "dt_bias", "cu_seqlens", "cu_seqlens_cpu")
_PLAIN = frozenset({Tensor, torch.nn.Parameter, NoneType})


def is_watched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether something wants to see the ops themselves: a tracer, a mode, a subclass.

    If not, sizes are numbers.
    """
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or not _PLAIN.issuperset([type(x) for x in tensors])
    )


def check_arguments(
    tensors: tuple[Tensor | None, ...],
    cu_seqlens_cpu: Tensor | None,
    state_v_first: bool,
    *,
    known: bool = True,
) -> Dims:
    """Check ranks, shapes, dtypes, devices and cu_seqlens; return the sizes. Raises InputError.

    `tensors` are q, k, v, g, b, w, initial_state, A_log, dt_bias and cu_seqlens. With `known`, for
    tensors that nobody watches, only the values of cu_seqlens are looked at where all the rest
    passed before.
    """
    given = (*tensors, cu_seqlens_cpu)
    if not known or cu_seqlens_cpu is not None:
        _check_types(given)
    try:
        layouts = [None if x is None else (x.shape, x.dtype, x.device, x.layout) for x in given]
    except RuntimeError:  # what is nested has no shape
        for name, x in zip((*_REQUIRED, *_OPTIONAL), given, strict=True):
            _check_dense(name, torch.jagged if x is not None and x.is_nested else torch.strided)
        raise
    dims = (_known_dims if known else _check_layouts)(state_v_first, *layouts)
    cu_seqlens = tensors[-1]
    if cu_seqlens is not None and known:
        check_cu_seqlens(cu_seqlens, dims.T, cu_seqlens_cpu)
    return dims


def _check_types(given: tuple[object, ...]) -> None:
    for name, x in zip((*_REQUIRED, *_OPTIONAL), given, strict=True):
        if not (x is None or isinstance(x, Tensor)):
            wanted = "a tensor" if name in _REQUIRED else "a tensor or None"
            raise InputError(f"{name} must be {wanted}, but got {type(x).__name__}")


def _check_dense(name: str, layout: torch.layout) -> None:
    if layout is torch.jagged:
        raise InputError(
            f"{name} must be a dense tensor, but is nested; lay its sequences one after the other "
            f"in one row (B=1), and give cu_seqlens"
        )
    if layout is not torch.strided:
        raise InputError(
            f"{name} must be a dense tensor, but got {layout}; convert it with .to_dense()"
        )


def _check_layouts(
    state_v_first: bool,
    *given: tuple[torch.Size, torch.dtype, torch.device, torch.layout] | None,
) -> Dims:
    layouts = [None if x is None else TensorLayout(*x) for x in given]
    for name, x in zip((*_REQUIRED, *_OPTIONAL), layouts, strict=True):
        if x is not None:
            _check_dense(name, x.layout)
    optional = dict(zip(_OPTIONAL, layouts[len(_REQUIRED) :], strict=True))
    named = {}
    for name, x in zip(_REQUIRED, layouts, strict=False):
        if x is None:
            raise InputError(f"{name} must be a tensor, but got NoneType")
        named[name] = x
        if len(x.shape) != 4:
            raise InputError(
                f"{name} must be [B, T, heads, dim] with 4 dimensions, "
                f"but got shape {tuple(x.shape)}"
            )
    cu_seqlens, cu_seqlens_cpu = optional["cu_seqlens"], optional.pop("cu_seqlens_cpu")
    _check_devices({**named, **optional})
    B, T, H, K = named["q"].shape
    HV, V = named["v"].shape[2:]
    HG = named["g"].shape[2]
    if K == 0 or V == 0:
        raise InputError(f"head dims must be at least 1, but got K={K}, V={V}")
    if H == 0 or HV % H != 0:
        raise InputError(f"value heads must be a multiple of q's heads, but got HV={HV}, H={H}")
    if HG not in (H, HV):
        raise InputError(f"g must have H={H} or HV={HV} heads, but got {HG}")
    expected = {
        "k": (B, T, H, K),
        "v": (B, T, HV, V),
        "g": (B, T, HG, K),
        "b": (B, T, HG, K),
        "w": (B, T, HV, V),
    }
    for name, shape in expected.items():
        if tuple(named[name].shape) != shape:
            raise InputError(f"{name} must be {shape}, but got {tuple(named[name].shape)}")
    _check_dtypes(named)
    N = _sequences(B, cu_seqlens, cu_seqlens_cpu)
    dims = Dims(B, T, H, HV, HG, K, V, N)
    _check_optional(dims, optional, state_v_first)
    return dims


_known_dims = lru_cache(maxsize=1024)(_check_layouts)


def _sequences(B: int, cu_seqlens: TensorLayout | None, cu_seqlens_cpu: TensorLayout | None) -> int:
    """N, of a batch or as `cu_seqlens` says; its values are checked elsewhere."""
    if cu_seqlens is None:
        if cu_seqlens_cpu is not None:
            raise InputError("cu_seqlens_cpu was given without cu_seqlens")
        return B
    if B != 1:
        raise InputError(f"cu_seqlens wants B=1, but q has B={B}: flatten the batch into one row")
    shape, cpu = tuple(cu_seqlens.shape), cu_seqlens_cpu
    if len(shape) != 1 or shape[0] < 2:
        raise InputError(f"cu_seqlens must be [N+1] with N >= 1, but got shape {shape}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise InputError(f"cu_seqlens must be int32 or int64, but got {cu_seqlens.dtype}")
    if cpu is not None and (tuple(cpu.shape) != shape or cpu.device.type != "cpu"):
        raise InputError(
            f"cu_seqlens_cpu must be a copy of cu_seqlens on the CPU, shape {shape}, "
            f"but got {tuple(cpu.shape)} on {cpu.device}"
        )
    return shape[0] - 1


def check_gate(
    use_gate_in_kernel: bool,
    safe_gate: bool,
    lower_bound: float | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    """Check that the gate's options fit together. Raises InputError."""
    number = isinstance(lower_bound, int | float) and not isinstance(lower_bound, bool)
    if lower_bound is not None and not number:
        raise InputError(f"lower_bound must be a number, but got {type(lower_bound).__name__}")
    if not use_gate_in_kernel:
        for name, value in (("A_log", A_log), ("dt_bias", dt_bias), ("lower_bound", lower_bound)):
            if value is not None and not (name == "lower_bound" and safe_gate):
                raise InputError(f"{name} was given, but use_gate_in_kernel is False")
    elif A_log is None and lower_bound is None:
        raise InputError(
            "use_gate_in_kernel=True needs A_log, or lower_bound for the bounded gate; got neither"
        )
    if lower_bound is not None:
        check_lower_bound(lower_bound)
    if safe_gate and use_gate_in_kernel and lower_bound is None:
        raise InputError("safe_gate=True with use_gate_in_kernel=True needs lower_bound")


FLAGS = (
    "output_final_state",
    "use_qk_l2norm_in_kernel",
    "use_gate_in_kernel",
    "safe_gate",
    "disable_recompute",
    "return_intermediate_states",
    "state_v_first",
)


def check_flags(*given: object) -> None:
    """Raises InputError unless each of `FLAGS` is True or False: `"no"` would pass for True."""
    if not _BOOL.issuperset(map(type, given)):
        for name, value in zip(FLAGS, given, strict=True):
            if type(value) is not bool:
                raise InputError(f"{name} must be True or False, but got {value!r}")


_BOOL = frozenset({bool})


def check_head_dims(size: int, name: str = "K") -> int:
    """One that kernels were verified with, as a number, which a tracer's symbol then is for good.

    Raises UnsupportedError for all others.
    """
    for known in HEAD_DIMS:
        if size == known:
            return known
    raise UnsupportedError(
        f"head dim {name}={size} was not verified on a GPU; use one of {HEAD_DIMS}, "
        f"or pad with zeros"
    )


def _check_dtypes(named: Mapping[str, TensorLayout]) -> None:
    dtype = named["q"].dtype
    if dtype not in IO_DTYPES and dtype != torch.float64:
        raise InputError(f"q must be bfloat16, float16 or float32, but got {dtype}")
    for name in ("k", "v", "b", "w"):
        if named[name].dtype != dtype:
            raise InputError(
                f"{name} must have the dtype of q, {dtype}, but got {named[name].dtype}; "
                f"cast it with .to(q.dtype)"
            )
    g = named["g"].dtype
    if g not in IO_DTYPES and g != torch.float64:
        raise InputError(f"g must be bfloat16, float16 or float32, but got {g}")


def _check_optional(
    dims: Dims, optional: Mapping[str, TensorLayout | None], state_v_first: bool
) -> None:
    initial_state, A_log, dt_bias = (optional[x] for x in ("initial_state", "A_log", "dt_bias"))
    if initial_state is not None:
        inner = (dims.V, dims.K) if state_v_first else (dims.K, dims.V)
        shape = (dims.N, dims.HV, *inner)
        if tuple(initial_state.shape) != shape:
            raise InputError(
                f"initial_state must be {shape} (N sequences; state_v_first={state_v_first}), "
                f"but got {tuple(initial_state.shape)}"
            )
        if initial_state.dtype not in (torch.float32, torch.float64):
            raise InputError(f"initial_state must be float32, but got {initial_state.dtype}")
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x is not None and x.dtype not in IO_DTYPES and x.dtype != torch.float64:
            raise InputError(f"{name} must be bfloat16, float16 or float32, but got {x.dtype}")
    if A_log is not None and tuple(A_log.shape) != (dims.HG,):
        raise InputError(f"A_log must be [{dims.HG}], but got {tuple(A_log.shape)}")
    if dt_bias is not None and tuple(dt_bias.shape) not in (
        (dims.HG * dims.K,),
        (dims.HG, dims.K),
    ):
        raise InputError(
            f"dt_bias must be [{dims.HG * dims.K}] or [{dims.HG}, {dims.K}], "
            f"but got {tuple(dt_bias.shape)}"
        )


def _check_devices(layouts: Mapping[str, TensorLayout | None]) -> None:
    device = layouts["q"].device if layouts["q"] is not None else None
    for name, x in layouts.items():
        if x is not None and x.device != device:
            raise InputError(f"{name} must be on {device} like q, but is on {x.device}")
