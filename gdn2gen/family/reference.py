"""The recurrences of the family and their chunk form in plain PyTorch: the only truth.

One head, rows are tokens, `*` is elementwise; state S [K, V], decay g (natural log, <= 0), erase
factor e and write factor u. A `Recurrence` says which of its inputs these are, and whether there is
a number for each channel (g, e [K], u [V]) or one for the head. Where it has none, g = 0, e = 0 or
u = 1; where one input is both e and u, its gradient is the sum of both. Where one is a step, which
decays and writes, g = rate u and scale = 1, and o may be (o + D v) * silu(z) at the end.

    S_t = (I - k_t (e_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (u_t * v_t)^T
    o_t = scale * S_t^T q_t

A chunk of C tokens with entry state S0; G is the inclusive cumulative sum of g in the chunk:

    T_ij   = sum_d e_i k_i k_j exp(G_i - G_j)  (i > j)     E  = exp(G) * e * k       Z = u * v
    Aqk_ij = sum_d q_i k_j exp(G_i - G_j)      (i >= j)    Qg = exp(G) * q * scale
    R      = (I + T)^-1 (Z - E S0)
    O      = Qg S0 + Aqk R
    S_C    = Diag(exp G_C) S0 + (exp(G_C - G) * k)^T R

Every exponent here is a sum of g over consecutive tokens, never a difference of two cumulative
sums and never positive: both forms, and the gradients that autograd takes through them, are exact
for any g <= 0, g = -inf included (a full reset of the channel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2gen.base.errors import InputError
from gdn2gen.family._chunk_form import Tokens, chunk_form
from gdn2gen.family.activations import activate_gate, activate_step, l2norm
from gdn2gen.family.recurrence import Recurrence


class Options(TypedDict, total=False):
    """How a call is computed: keywords of the public ops, and `compute_dtype`."""

    scale: float | None
    """Factor of o; K**-0.5 if None."""
    use_qk_l2norm_in_kernel: bool
    """q and k pass through `l2norm` first."""
    use_gate_in_kernel: bool
    """The decay is given before `activate_gate`, which takes A_log, dt_bias and `lower_bound`."""
    lower_bound: float | None
    use_beta_sigmoid_in_kernel: bool
    """What erases and writes is given before its sigmoid; only where one input does both."""
    allow_neg_eigval: bool
    """That sigmoid counts twice."""
    state_v_first: bool
    """States are [N, HV, V, K]."""
    compute_dtype: torch.dtype | None
    """float32 or float64; by default float64 if any tensor is, else float32."""


def recurrent(
    recurrence: Recurrence, tensors: Mapping[str, Tensor | None], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]:
    """A recurrence token by token, as the module's first equation says. Differentiable.

    HV is a multiple of H, HG is H or HV. Value head i reads q, k of head i // (HV / H), and of what
    has HG heads head i // (HV / HG).

    Args:
        tensors: inputs by name, in the dims that the recurrence declares; optional ones may be None
            or missing. cu_seqlens, if given: [N + 1] integers, 0 = first <= ... <= last = T: B is 1
            and holds N sequences, some perhaps empty. N is B otherwise.
        options: see `Options`.

    Returns:
        o [B, T, HV, V] in the dtype of v, and the final state in the layout of the initial one
        and in the compute dtype.
    """
    return _run(_recurrent_form, recurrence, tensors, **options)


def chunk(
    recurrence: Recurrence,
    tensors: Mapping[str, Tensor | None],
    *,
    chunk_size: int = 64,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """A recurrence chunk by chunk: `recurrent` to rounding, in fewer and larger products.

    Arguments and results are those of `recurrent`; `chunk_size` C is a power of two.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise InputError(f"chunk_size must be a power of two, but got {chunk_size}")
    return _run(
        lambda tokens, state: chunk_form(tokens, state, chunk_size), recurrence, tensors, **options
    )


def _run(
    form: Callable[[Tokens, Tensor], tuple[Tensor, Tensor]],
    recurrence: Recurrence,
    tensors: Mapping[str, Tensor | None],
    *,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Bring the arguments into the shape of `Tokens`, run `form` on each length, and undo."""
    given = {name: x for name, x in tensors.items() if x is not None}
    _check_shapes(recurrence, given)
    dtype = _compute_dtype(given.values(), compute_dtype)
    x = {name: y.to(dtype) if y.is_floating_point() else y for name, y in given.items()}
    if use_qk_l2norm_in_kernel:
        x |= {name: l2norm(x[name]) for name in ("q", "k")}
    _activate_decay(recurrence, x, use_gate_in_kernel, lower_bound)
    _activate_beta(recurrence, x, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    tokens = _tokens(recurrence, x, scale)

    (B, T, _, K), (heads, V) = x["q"].shape, x["v"].shape[2:]
    cu_seqlens = x.get("cu_seqlens")
    lengths = None if cu_seqlens is None else _lengths(cu_seqlens, B, T)
    N = B if lengths is None else len(lengths)
    state = _entry_state(x.get("initial_state"), (N, heads, K, V), state_v_first, x["q"])
    if lengths is None:
        o, state = form(tokens, state)
    else:
        parts = zip(tokens.split(lengths), torch.split(state, 1), strict=True)
        outputs, states = zip(*(form(part, entry) for part, entry in parts), strict=True)
        o, state = torch.cat(outputs, 2), torch.cat(states)
    o = _finish(o.transpose(1, 2), x).to(given["v"].dtype)
    return _own(o), _own(state.mT if state_v_first else state)


def _activate_decay(
    recurrence: Recurrence, x: dict[str, Tensor], activate: bool, lower_bound: float | None
) -> None:
    A_log, dt_bias = x.get("A_log"), x.get("dt_bias")
    if activate and recurrence.decay is not None and recurrence.stepped:
        x[recurrence.decay.input] = activate_step(x[recurrence.decay.input], dt_bias)
    elif activate and recurrence.decay is not None:
        if not recurrence.bounded and A_log is None and lower_bound is None:
            raise InputError(f"the gate of {recurrence.name} needs A_log, got None")
        name = recurrence.decay.input
        g = activate_gate(_by_channel(x[name]), A_log, dt_bias, lower_bound)
        x[name] = g.view(x[name].shape)
    elif activate:
        raise InputError(f"{recurrence.name} has no decay; leave use_gate_in_kernel out")
    elif not (A_log is None and dt_bias is None and lower_bound is None):
        raise InputError("A_log, dt_bias and lower_bound need use_gate_in_kernel=True")


def _activate_beta(
    recurrence: Recurrence, x: dict[str, Tensor], sigmoid: bool, twice: bool
) -> None:
    if sigmoid and recurrence.erase is not None and recurrence.tied:
        beta = torch.sigmoid(x[recurrence.erase])
        x[recurrence.erase] = 2 * beta if twice else beta
    elif sigmoid:
        raise InputError(f"{recurrence.name} has no beta whose sigmoid could be taken")
    elif twice:
        raise InputError("allow_neg_eigval=True needs use_beta_sigmoid_in_kernel=True")


def _tokens(recurrence: Recurrence, x: Mapping[str, Tensor], scale: float | None) -> Tokens:
    q, k, v = x["q"], x["k"], x["v"]
    none = v.new_zeros(*v.shape[:3], 1)
    decay, erase, write = recurrence.decay, recurrence.erase, recurrence.write
    if scale is None:
        scale = 1.0 if recurrence.stepped else q.shape[3] ** -0.5
    return Tokens(
        *(
            _spread(y, v.shape[2])
            for y in (
                q * scale,
                k,
                v if write is None else _by_channel(x[write]) * v,
                none if decay is None else _by_channel(_log_decay(recurrence, x, decay.input)),
                none if erase is None else _by_channel(x[erase]),
            )
        )
    )


def _log_decay(recurrence: Recurrence, x: Mapping[str, Tensor], name: str) -> Tensor:
    """Natural log; of a step, a rate times it."""
    return x.get("rate", -1.0) * x[name] if recurrence.stepped else x[name]


def _finish(o: Tensor, x: Mapping[str, Tensor]) -> Tensor:
    """o [B, T, HV, V] with its skip, and through its gate, where they are given."""
    if "D" in x:
        o = o + x["D"].view(o.shape[2:]) * x["v"]
    return o * F.silu(x["z"]) if "z" in x else o


def _by_channel(x: Tensor) -> Tensor:
    """x [B, T, heads, channels], one channel where it has a number for each head."""
    return x if x.ndim == 4 else x[..., None]


def _own(x: Tensor) -> Tensor:
    """x row after row, and no view: of what an op returns, autograd lets no view be written to."""
    return x.clone(memory_format=torch.contiguous_format) if x._is_view() else x.contiguous()


def _check_shapes(recurrence: Recurrence, given: Mapping[str, Tensor]) -> None:
    """Refuse what broadcasting would take silently, such as a gate of the wrong rank."""
    names = {x.name for x in recurrence.required}
    if not names <= given.keys() <= recurrence.named.keys():
        odd = sorted((names - given.keys()) | (given.keys() - recurrence.named.keys()))
        raise InputError(
            f"{recurrence.name} takes {[*recurrence.named]}; missing or unknown: {odd}"
        )
    q, v = given["q"], given["v"]
    if q.ndim != 4 or v.ndim != 4:
        raise InputError(
            f"q and v must be [B, T, heads, dim], but got {[*q.shape]} and {[*v.shape]}"
        )
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    if H == 0 or HV % H:
        raise InputError(f"the heads of v must be a multiple of those of q, but got {HV} and {H}")
    sizes = {"B": {B}, "T": {T}, "H": {H}, "HV": {HV}, "HG": {H, HV}, "K": {K}, "V": {V}}
    for x in recurrence.required:
        wanted, found = [sizes[symbol] for symbol in x.symbols], [*given[x.name].shape]
        if len(found) != len(wanted) or any(
            size not in known for size, known in zip(found, wanted, strict=True)
        ):
            words = ", ".join(" or ".join(map(str, sorted(known))) for known in wanted)
            raise InputError(f"{x.name} must be [{words}], but got {found}")


def _compute_dtype(tensors: Iterable[Tensor], wish: torch.dtype | None) -> torch.dtype:
    if wish is None:
        double = any(x.dtype == torch.float64 for x in tensors)
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
