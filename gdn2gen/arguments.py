"""Checks of the public ops' arguments: bad input never reaches a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdn2gen.errors import InputError, UnsupportedError
from gdn2gen.problem import HEAD_DIMS
from gdn2gen.sequences import check_cu_seqlens

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


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    state_v_first: bool,
) -> Dims:
    """Check ranks, shapes, dtypes and devices; return the sizes. Raises InputError."""
    named = {"q": q, "k": k, "v": v, "g": g, "b": b, "w": w}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise InputError(f"{name} must be a tensor, but got {type(x).__name__}")
        if x.dim() != 4:
            raise InputError(
                f"{name} must be [B, T, heads, dim] with 4 dimensions, "
                f"but got shape {tuple(x.shape)}"
            )
    optional = {
        "initial_state": initial_state,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "cu_seqlens": cu_seqlens,
    }
    for name, given in {**optional, "cu_seqlens_cpu": cu_seqlens_cpu}.items():
        if given is not None and not isinstance(given, Tensor):
            raise InputError(f"{name} must be a tensor or None, but got {type(given).__name__}")
    _check_devices({**named, **optional})
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    HG = g.shape[2]
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
    N = B
    if cu_seqlens is not None:
        if B != 1:
            raise InputError(
                f"cu_seqlens wants B=1, but q has B={B}: flatten the batch into one row"
            )
        check_cu_seqlens(cu_seqlens, T, cu_seqlens_cpu)
        N = cu_seqlens.numel() - 1
    elif cu_seqlens_cpu is not None:
        raise InputError("cu_seqlens_cpu was given without cu_seqlens")
    dims = Dims(B, T, H, HV, HG, K, V, N)
    _check_optional(dims, initial_state, A_log, dt_bias, state_v_first)
    return dims


def check_gate(
    use_gate_in_kernel: bool,
    safe_gate: bool,
    lower_bound: float | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    """Check that the gate's options fit together. Raises InputError."""
    if lower_bound is not None and not isinstance(lower_bound, int | float):
        raise InputError(f"lower_bound must be a number, but got {type(lower_bound).__name__}")
    if not use_gate_in_kernel:
        for name, value in (("A_log", A_log), ("dt_bias", dt_bias), ("lower_bound", lower_bound)):
            if value is not None and not (name == "lower_bound" and safe_gate):
                raise InputError(f"{name} was given, but use_gate_in_kernel is False")
    elif A_log is None and lower_bound is None:
        raise InputError(
            "use_gate_in_kernel=True needs A_log, or lower_bound for the bounded gate; got neither"
        )
    if lower_bound is not None and not -5.0 <= lower_bound < 0.0:
        raise InputError(f"`-5 <= lower_bound < 0` must hold, but got {lower_bound}")
    if safe_gate and use_gate_in_kernel and lower_bound is None:
        raise InputError("safe_gate=True with use_gate_in_kernel=True needs lower_bound")


def check_head_dims(K: int, V: int) -> None:
    """Raises UnsupportedError for head dims that no kernel was verified with."""
    for name, size in (("K", K), ("V", V)):
        if size not in HEAD_DIMS:
            raise UnsupportedError(
                f"head dim {name}={size} was not verified on a GPU; use one of {HEAD_DIMS}, "
                f"or pad with zeros"
            )


def _check_dtypes(named: dict[str, Tensor]) -> None:
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
    dims: Dims,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state_v_first: bool,
) -> None:
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


def _check_devices(tensors: dict[str, Tensor | None]) -> None:
    device = tensors["q"].device if tensors["q"] is not None else None
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise InputError(f"{name} must be on {device} like q, but is on {x.device}")
