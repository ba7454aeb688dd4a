"""Mamba-2's op over whole sequences, one import line away from state-spaces/mamba's.

It runs `chunk_mamba2`, with q = C, k = B, v = x, rate = A: groups of B and C are read as heads of q
and k, and nothing is repeated in memory. dt x, D x and the gate z are made inside the kernels, and
so is softplus of dt; what limits of dt leave of it, and `seq_idx`, are torch's, on b l h numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2gen.base.errors import InputError, UnsupportedError
from gdn2gen.family.mamba2 import step_sizes
from gdn2gen.ops._call import call
from gdn2gen.ops._prefill import NOT_SERVING, Serving, serving_of
from gdn2gen.ops.chunk import MAMBA2_OP, SIMPLE_GLA_OP
from gdn2gen.runtime.signature import renamed

# Errors name what callers of Mamba's op give.
_NAME: Final = "mamba_chunk_scan_combined"
_SHARED: Final = {"q": "C", "k": "B", "v": "x", "initial_state": "initial_states"}
_MAMBA2: Final = replace(
    MAMBA2_OP, signature=renamed(MAMBA2_OP.signature, _NAME, rate="A", **_SHARED)
)
_SIMPLE_GLA: Final = replace(
    SIMPLE_GLA_OP, signature=renamed(SIMPLE_GLA_OP.signature, _NAME, g="dt", **_SHARED)
)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
    *,
    return_intermediate_states: bool = False,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int | None = None,
    checkpoint_every_n_tokens: int | None = None,
    checkpoint_state_indices: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-2 over whole sequences, in chunks (arXiv 2405.21060).

    Per head, with the state h [P, N]:

        h_t = exp(A dt_t) h_{t-1} + dt_t x_t B_t^T
        y_t = h_t C_t + D x_t                            out_t = y_t silu(z_t)

    b rows of l tokens; h heads; g groups of B and C, each of which serves h / g heads that follow
    each other. P and N are V and K of `chunk_simple_gla`: its limits hold here. dt and z may be
    slices of a projection, as in `chunk_mamba2`; x, B and C are copied, if they are.

    Args:
        x: [b, l, h, P] bfloat16, float16 or float32.
        dt: [b, l, h] bfloat16, float16 or float32: dt before its bias, activation and limits.
        A: [h] bfloat16, float16 or float32, <= 0.
        B: [b, l, g, N] like x.
        C: [b, l, g, N] like x.
        chunk_size: a power of two. Results are those of any, to rounding; how many tokens a chunk
            of the kernels has is tuned.
        D: [h] or [h, P]: factor of x in y; None for none.
        z: [b, l, h, P]: the gate; None for none.
        dt_bias: [h], added to dt; None for none.
        initial_states: [b, h, P, N] float32, or with `cu_seqlens` one for each sequence; zero if
            None.
        seq_idx: [b, l] int32 or int64: a token whose number is not that of the one before it starts
            from a state of 0. With `cu_seqlens`, which says it, too, it is not looked at.
        cu_seqlens: [sequences + 1] int32 or int64, rising from 0 to l: packed sequences, none of
            which sees another; wants b = 1.
        dt_softplus: dt = softplus(dt + dt_bias).
        dt_limit: least and most that dt is after that.
        return_final_states: also return the state after the last token of each row.
        return_varlen_states: also return those after the last of each packed sequence.
        state_dtype: float32 or None: states are float32.
        return_intermediate_states: also return the states before tokens 0, 64, 128, ... of each
            sequence, as the other ops of the family do; there is no backward then.
        state_pool: [slots, h, P, N] float32 or bfloat16: states, read and written in place, in
            place of `initial_states`; there is no backward then.
        ssm_state_indices, has_initial_state, null_slot: of that pool, as in `chunk_gdn2`.
        checkpoint_every_n_tokens, checkpoint_state_indices: slots for states on the way, as there.

    Returns:
        out [b, l, h, P] in the dtype of x; or a tuple of it, the final states [b, h, P, N] (the
        pool, if there is one), the packed sequences' [sequences, h, P, N], and those on the way
        [b, NT, h, P, N] in the dtype of x, as far as they are asked for.

    Raises:
        InputError: a wrong rank, shape, dtype, device or value, before any launch.
        UnsupportedError: head dims or options that were not verified.
    """
    _check_options(chunk_size, dt_softplus, dt_limit, return_final_states, return_varlen_states)
    serving = serving_of(
        state_pool,
        ssm_state_indices,
        has_initial_state,
        null_slot,
        checkpoint_every_n_tokens,
        checkpoint_state_indices,
    )
    if state_dtype not in (None, torch.float32):
        raise UnsupportedError(f"states are float32, but got state_dtype={state_dtype}")
    if return_varlen_states and cu_seqlens is None:
        raise InputError("return_varlen_states=True needs cu_seqlens, but got None")
    _check_tensors(x, dt, A, B, C, D, z, dt_bias, seq_idx)
    wants_states = return_final_states or return_varlen_states
    restarts = seq_idx is not None and cu_seqlens is None
    _check_serving(serving, return_intermediate_states, restarts)
    if state_pool is not None and (initial_states is not None or return_varlen_states):
        name = "return_varlen_states" if initial_states is None else "initial_states"
        raise InputError(
            f"{name} and state_pool were given, but with a pool each sequence's state comes from "
            f"its slot and goes there: leave {name} out"
        )
    if seq_idx is not None and cu_seqlens is None:
        steps = step_sizes(dt, dt_bias, dt_softplus, dt_limit)
        on_the_way: list[Tensor] = []
        found_y, states = _restarted(x, steps, A, B, C, D, z, initial_states, seq_idx, wants_states)
    else:
        # a softplus is above 0
        in_kernel = dt_softplus and dt_limit[0] == 0.0 and dt_limit[1] == math.inf
        if not in_kernel:
            dt, dt_bias = step_sizes(dt, dt_bias, dt_softplus, dt_limit), None
        D = D if D is None or D.dim() == 2 else D[:, None].expand(D.shape[0], x.shape[3])
        z = None if z is None else z.to(x.dtype)
        found_y, states, *on_the_way = call(
            _MAMBA2,
            (C, B, x, dt, initial_states, A, dt_bias, D, z, cu_seqlens),
            scale=None,
            output_final_state=wants_states,
            use_gate_in_kernel=in_kernel,
            disable_recompute=False,
            state_v_first=True,
            cu_seqlens_cpu=None,
            return_intermediate_states=return_intermediate_states,
            serving=serving,
        )
    found = [found_y]
    if states is not None:
        # of a packed row, the last sequence's state is the row's
        whole = cu_seqlens is None or state_pool is not None
        found += [states if whole else states[-1:]] if return_final_states else []
        found += [states] if return_varlen_states else []
    found += on_the_way
    return tuple(found) if len(found) > 1 else found[0]


def _restarted(
    x: Tensor,
    steps: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor,
    wants_states: bool,
) -> tuple[Tensor, Tensor | None]:
    """Where sequences start anew within rows: a decay of all that was, which is no step's.

    Simple gated linear attention with v = dt x and g = A dt takes it, and torch makes the rest.
    """
    # the first token of a sequence forgets all before it: kernels are exact for that
    starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))[:, : x.shape[1]]
    decay = (A * steps).masked_fill(starts[..., None], -math.inf)
    y, states = call(
        _SIMPLE_GLA,
        (C, B, (x * steps[..., None]).to(x.dtype), decay, initial_states, None),
        scale=1.0,
        output_final_state=wants_states,
        disable_recompute=False,
        state_v_first=True,
        cu_seqlens_cpu=None,
    )
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None])
    if z is not None:
        y = y * F.silu(z)
    return y.to(x.dtype), states


def _check_options(
    chunk_size: object, dt_softplus: object, dt_limit: object, final: object, varlen: object
) -> None:
    flags = {
        "dt_softplus": dt_softplus,
        "return_final_states": final,
        "return_varlen_states": varlen,
    }
    for name, value in flags.items():
        if type(value) is not bool:
            raise InputError(f"{name} must be True or False, but got {value!r}")
    if type(chunk_size) is not int or chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise InputError(f"chunk_size must be a power of two, but got {chunk_size!r}")
    ends = dt_limit if isinstance(dt_limit, tuple | list) else ()
    if len(ends) != 2 or not all(isinstance(y, int | float) for y in ends):
        raise InputError(f"dt_limit must be two numbers, but got {dt_limit!r}")
    least, most = ends
    if not 0.0 <= least <= most:
        raise InputError(
            f"`0 <= dt_limit[0] <= dt_limit[1]` must hold, but got {dt_limit!r}: a step below 0 "
            "would let the state grow"
        )


def _check_serving(serving: Serving, intermediate: object, restarts: bool) -> None:
    """That what goes to slots is of whole sequences; the kernels' op checks the rest."""
    if type(intermediate) is not bool:
        raise InputError(
            f"return_intermediate_states must be True or False, but got {intermediate!r}"
        )
    if restarts and (intermediate or serving is not NOT_SERVING):
        raise UnsupportedError(
            "seq_idx was given without cu_seqlens, but states in a pool or on the way are those of "
            "whole sequences: pack them, and say where they begin by cu_seqlens"
        )


def _check_tensors(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    """By the names of Mamba's op, before anything is computed; the kernels' op checks the rest."""
    given = {"x": x, "dt": dt, "A": A, "B": B, "C": C}
    optional = {"D": D, "z": z, "dt_bias": dt_bias, "seq_idx": seq_idx}
    given |= {name: y for name, y in optional.items() if y is not None}
    for name, y in given.items():
        if not isinstance(y, Tensor):
            raise InputError(f"{name} must be a tensor, but got {type(y).__name__}")
        if y.device != x.device:
            raise InputError(f"{name} must be on {x.device} like x, but is on {y.device}")
    if x.dim() != 4 or B.dim() != 4:
        raise InputError(
            f"x must be [b, l, h, P] and B [b, l, g, N], but got {tuple(x.shape)} and "
            f"{tuple(B.shape)}"
        )
    (b, length, h, P), (g, N) = x.shape, B.shape[2:]
    if g == 0 or h % g:
        raise InputError(f"heads of x must be a multiple of the groups of B, but got {h} and {g}")
    shapes: dict[str, list[tuple[int, ...]]] = {
        "dt": [(b, length, h)],
        "A": [(h,)],
        "B": [(b, length, g, N)],
        "C": [(b, length, g, N)],
        "D": [(h,), (h, P)],
        "z": [(b, length, h, P)],
        "dt_bias": [(h,)],
        "seq_idx": [(b, length)],
    }
    for name, wanted in shapes.items():
        if name in given and tuple(given[name].shape) not in wanted:
            words = " or ".join(map(str, wanted))
            raise InputError(f"{name} must be {words}, but got {tuple(given[name].shape)}")
    for name in ("B", "C"):
        if given[name].dtype != x.dtype:
            raise InputError(
                f"{name} must have the dtype of x, {x.dtype}, but got {given[name].dtype}; cast it "
                "with .to(x.dtype)"
            )
    for name in ("dt", "A", "D", "z", "dt_bias"):
        if name in given and not given[name].is_floating_point():
            raise InputError(f"{name} must be of floating point, but got {given[name].dtype}")
    if seq_idx is not None and seq_idx.dtype not in (torch.int32, torch.int64):
        raise InputError(f"seq_idx must be int32 or int64, but got {seq_idx.dtype}")
