"""The recurrence of Gated DeltaNet-2 and its chunk form in plain PyTorch: the only truth.

Source: Gated DeltaNet-2, arXiv 2605.22791. One head, rows are tokens, `*` is elementwise; state
S [K, V], decay g [K] (natural log, <= 0), erase gate b [K] in [0, 2], write gate w [V]:

    S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T
    o_t = scale * S_t^T q_t

A chunk of C tokens with entry state S0; G is the inclusive cumulative sum of g in the chunk:

    T_ij   = sum_d b_i k_i k_j exp(G_i - G_j)  (i > j)     E  = exp(G) * b * k       Z = w * v
    Aqk_ij = sum_d q_i k_j exp(G_i - G_j)      (i >= j)    Qg = exp(G) * q * scale
    R      = (I + T)^-1 (Z - E S0)
    O      = Qg S0 + Aqk R
    S_C    = Diag(exp G_C) S0 + (exp(G_C - G) * k)^T R

Every exponent here is a sum of g over consecutive tokens, never a difference of two cumulative
sums and never positive: both forms, and the gradients that autograd takes through them, are exact
for any g <= 0, g = -inf included (a full reset of the channel).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2gen.base.errors import InputError
from gdn2gen.family._chunk_form import Tokens, chunk_form

L2NORM_EPS = 1e-6
# Beyond it softplus(x) is x to the last bit of fp64; torch's default of 20 is off by 1e-10 there.
_SOFTPLUS_LINEAR = 40.0


def activate_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
) -> Tensor:
    """Turn the pre-activation `g` of the decay into the decay itself, in natural log, <= 0.

    -exp(A_log) * softplus(g + dt_bias), which needs A_log; or, with `lower_bound` < 0,
    lower_bound * sigmoid(exp(A_log) * (g + dt_bias)), where a missing A_log is a factor of 1.

    Args:
        g: [B, T, HG, K], any float dtype; the result has its shape and the promoted dtype.
        A_log: [HG].
        dt_bias: [HG * K] or [HG, K].
        lower_bound: limit of the decay per token, in nats; must be negative.
    """
    heads, dim = g.shape[-2:]
    if A_log is not None and A_log.shape != (heads,):
        raise InputError(f"A_log must be [{heads}], one per head of g, but got {[*A_log.shape]}")
    if dt_bias is not None:
        if dt_bias.shape not in ((heads * dim,), (heads, dim)):
            raise InputError(
                f"dt_bias must be [{heads * dim}] or [{heads}, {dim}], but got {[*dt_bias.shape]}"
            )
        g = g + dt_bias.view(heads, dim)
    factor = None if A_log is None else A_log.exp()[:, None]
    if lower_bound is not None:
        if not lower_bound < 0:
            raise InputError(f"lower_bound must be negative, but got {lower_bound}")
        return lower_bound * torch.sigmoid(g if factor is None else factor * g)
    if factor is None:
        raise InputError("the softplus gate needs A_log, got None; or give lower_bound")
    return -factor * F.softplus(g, threshold=_SOFTPLUS_LINEAR)


def l2norm(x: Tensor, eps: float = L2NORM_EPS) -> Tensor:
    """Scale the rows of `x` [..., K] to unit length: x * rsqrt(sum(x^2) + eps), dtype of x."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def recurrent_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    cu_seqlens: Tensor | None = None,
    state_v_first: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet-2 token by token, as the module's first equation says. Differentiable.

    HV is a multiple of H. Value head i reads q, k of head i // (HV / H), and g, b likewise.

    Args:
        q, k: [B, T, H, K]; with `use_qk_l2norm_in_kernel` they pass through `l2norm` first.
        v: [B, T, HV, V].
        g: [B, T, H or HV, K], decay in natural log, <= 0; with `use_gate_in_kernel` its
            pre-activation, which `activate_gate` takes with A_log, dt_bias and lower_bound.
        b: [B, T, H or HV, K], erase gate in [0, 1], or [0, 2] with negative eigenvalues.
        w: [B, T, HV, V], write gate.
        scale: factor of o; K**-0.5 if None.
        initial_state: [N, HV, K, V], or [N, HV, V, K] with `state_v_first`; zero if None.
        cu_seqlens: [N + 1] integers, 0 = first <= ... <= last = T: B is 1 and holds N sequences,
            some perhaps empty. N is B otherwise.
        compute_dtype: float32 or float64; by default float64 if any tensor is, else float32.

    Returns:
        o [B, T, HV, V] in the dtype of v, and the final state in the layout of the initial one
        and in the compute dtype.
    """
    return _run(
        _recurrent_form,
        (q, k, v, g, b, w),
        scale=scale,
        initial_state=initial_state,
        l2norm_qk=use_qk_l2norm_in_kernel,
        activate=use_gate_in_kernel,
        gate=_Gate(A_log, dt_bias, lower_bound),
        cu_seqlens=cu_seqlens,
        state_v_first=state_v_first,
        compute_dtype=compute_dtype,
    )


def chunk_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    cu_seqlens: Tensor | None = None,
    state_v_first: bool = False,
    compute_dtype: torch.dtype | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet-2 chunk by chunk: `recurrent_gdn2` to rounding, in fewer and larger products.

    Arguments and results are those of `recurrent_gdn2`; `chunk_size` C is a power of two.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise InputError(f"chunk_size must be a power of two, but got {chunk_size}")
    return _run(
        lambda tokens, state: chunk_form(tokens, state, chunk_size),
        (q, k, v, g, b, w),
        scale=scale,
        initial_state=initial_state,
        l2norm_qk=use_qk_l2norm_in_kernel,
        activate=use_gate_in_kernel,
        gate=_Gate(A_log, dt_bias, lower_bound),
        cu_seqlens=cu_seqlens,
        state_v_first=state_v_first,
        compute_dtype=compute_dtype,
    )


class _Gate(NamedTuple):
    """What `activate_gate` takes besides g."""

    A_log: Tensor | None
    dt_bias: Tensor | None
    lower_bound: float | None


def _run(
    form: Callable[[Tokens, Tensor], tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    *,
    scale: float | None,
    initial_state: Tensor | None,
    l2norm_qk: bool,
    activate: bool,
    gate: _Gate,
    cu_seqlens: Tensor | None,
    state_v_first: bool,
    compute_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Bring the arguments into the shape of `Tokens`, run `form` on each length, and undo."""
    _check_shapes(*inputs)
    if not activate and any(x is not None for x in gate):
        raise InputError("A_log, dt_bias and lower_bound need use_gate_in_kernel=True")
    dtype = _compute_dtype((*inputs, initial_state, gate.A_log, gate.dt_bias), compute_dtype)
    q, k, v, g, b, w = (x.to(dtype) for x in inputs)
    if l2norm_qk:
        q, k = l2norm(q), l2norm(k)
    if activate:
        A_log, dt_bias = (None if x is None else x.to(dtype) for x in gate[:2])
        g = activate_gate(g, A_log, dt_bias, gate.lower_bound)
    heads, (K, V) = v.shape[2], (q.shape[3], v.shape[3])
    q = q * (K**-0.5 if scale is None else scale)
    tokens = Tokens(*(_spread(x, heads) for x in (q, k, w * v, g, b)))

    lengths = None if cu_seqlens is None else _lengths(cu_seqlens, *q.shape[:2])
    N = q.shape[0] if lengths is None else len(lengths)
    state = _entry_state(initial_state, (N, heads, K, V), state_v_first, q)
    if lengths is None:
        o, state = form(tokens, state)
    else:
        parts = zip(tokens.split(lengths), torch.split(state, 1), strict=True)
        outputs, states = zip(*(form(part, entry) for part, entry in parts), strict=True)
        o, state = torch.cat(outputs, 2), torch.cat(states)
    o = o.transpose(1, 2).to(inputs[2].dtype)
    return _own(o), _own(state.mT if state_v_first else state)


def _own(x: Tensor) -> Tensor:
    """x row after row, and no view: of what an op returns, autograd lets no view be written to."""
    return x.clone(memory_format=torch.contiguous_format) if x._is_view() else x.contiguous()


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor) -> None:
    """Refuse what broadcasting would take silently, such as a gate of the wrong rank."""
    if q.ndim != 4 or v.ndim != 4:
        raise InputError(
            f"q and v must be [B, T, heads, dim], but got {[*q.shape]} and {[*v.shape]}"
        )
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    if H == 0 or HV % H:
        raise InputError(f"the heads of v must be a multiple of those of q, but got {HV} and {H}")
    wanted = {
        "k": (k, {H}, K),
        "v": (v, {HV}, V),
        "g": (g, {H, HV}, K),
        "b": (b, {H, HV}, K),
        "w": (w, {HV}, V),
    }
    for name, (x, heads, dim) in wanted.items():
        if x.ndim != 4 or x.shape[:2] != (B, T) or x.shape[2] not in heads or x.shape[3] != dim:
            either = " or ".join(map(str, sorted(heads)))
            raise InputError(f"{name} must be [{B}, {T}, {either}, {dim}], but got {[*x.shape]}")


def _compute_dtype(tensors: tuple[Tensor | None, ...], wish: torch.dtype | None) -> torch.dtype:
    if wish is None:
        double = any(x is not None and x.dtype == torch.float64 for x in tensors)
        return torch.float64 if double else torch.float32
    if wish not in (torch.float32, torch.float64):
        raise InputError(f"compute_dtype must be torch.float32 or torch.float64, but got {wish}")
    return wish


def _spread(x: Tensor, heads: int) -> Tensor:
    """[B, T, H, D] -> [B, heads, T, D]; each head serves heads / H neighbours."""
    if x.shape[2] != heads:
        x = x.repeat_interleave(heads // x.shape[2], dim=2)
    return x.transpose(1, 2)


def _lengths(cu_seqlens: Tensor, B: int, T: int) -> list[int]:
    """Lengths of the N sequences that are packed in the T tokens."""
    if B != 1:
        raise InputError(f"cu_seqlens needs a packed batch of B=1, but got B={B}")
    if cu_seqlens.ndim != 1:
        raise InputError(f"cu_seqlens must be [N + 1], but got {[*cu_seqlens.shape]}")
    ends: list[int] = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    if not lengths or ends[0] != 0 or ends[-1] != T or min(lengths) < 0:
        raise InputError(f"cu_seqlens must rise from 0 to T={T}, but got {ends}")
    return lengths


def _entry_state(
    initial_state: Tensor | None, shape: tuple[int, int, int, int], v_first: bool, like: Tensor
) -> Tensor:
    """The initial state as [N, HV, K, V] in the compute dtype; never the caller's own memory."""
    if initial_state is None:
        return like.new_zeros(shape)
    state = initial_state.mT if v_first and initial_state.ndim == 4 else initial_state
    if state.shape != shape:
        wanted = (*shape[:2], *shape[:1:-1]) if v_first else shape
        raise InputError(f"initial_state must be {[*wanted]}, but got {[*initial_state.shape]}")
    # A final state that aliased its argument (no tokens) would be refused by torch.library.
    return state.to(like.dtype, copy=True)


def _recurrent_form(tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    q, k, z, decay, erase = tokens
    rows = (q, k, z, decay.exp(), erase * k)
    outputs = []
    # unbind and not indexing: the backward of T indexings would write T^2 tokens.
    for q_t, k_t, z_t, alpha, erase_key in zip(*(x.unbind(2) for x in rows), strict=True):
        state = alpha[..., None] * state
        r = z_t - (erase_key[..., None, :] @ state).squeeze(-2)
        state = state + k_t[..., None] * r[..., None, :]
        outputs.append((q_t[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 2) if outputs else z, state
