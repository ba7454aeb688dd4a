"""Mamba-3's ops, over whole sequences and of one token, one import line away from
state-spaces/mamba's.

The first runs the kernels of `chunk_simple_gla`, once (`family.mamba3_form`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2gen.family.mamba3 import States, one_token
from gdn2gen.family.mamba3_form import (
    Ends,
    Inputs,
    after,
    before,
    carried_in,
    carried_out,
    state_in,
)
from gdn2gen.family.mamba3_problem import MAMBA3, STEP
from gdn2gen.ops._mamba3_checks import check, check_step
from gdn2gen.ops.chunk import chunk_simple_gla
from gdn2gen.runtime import mamba3 as kernels
from gdn2gen.runtime.arguments import is_watched
from gdn2gen.runtime.head_dims import check_head_dims
from gdn2gen.runtime.mamba3_chunk_ops import chosen, run_chunks
from gdn2gen.runtime.mamba3_ops import Around, serves
from gdn2gen.runtime.sequences import check_cu_seqlens


def mamba3_siso_combined(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    ADT: Tensor,
    DT: Tensor,
    Trap: Tensor,
    Q_bias: Tensor,
    K_bias: Tensor,
    Angles: Tensor,
    D: Tensor | None = None,
    Z: Tensor | None = None,
    Input_States: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    chunk_size: int = 64,
    return_final_states: bool = False,
    cu_seqlens: Tensor | None = None,
    disable_recompute: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mamba-3, one input and one output a head, over whole sequences, in chunks (arXiv 2603.15569:
    the exponential-trapezoidal rule, with rotations that depend on the data).

    Per head, with the state h [P, N]; R(Theta) turns channels 2i and 2i + 1 by angle i, for i below
    S, and leaves the rest:

        lambda_t = sigmoid(Trap_t)
        Theta_t = Theta_{t-1} + DT_t pi tanh(Angles_t)    mod 2 pi
        q_t = R(Theta_t) (Q_t + Q_bias)                   k_t = R(Theta_t) (K_t + K_bias)
        h_t = exp(ADT_t) (h_{t-1} + (1 - lambda_t) DT_t v_{t-1} k_{t-1}^T) + lambda_t DT_t v_t k_t^T
        y_t = h_t q_t + D v_t                             out_t = y_t silu(Z_t)

    b rows of l tokens; h heads; g groups of Q and K, each of which serves h / g heads that follow
    each other. N and P are K and V of `chunk_simple_gla`: its limits hold here. How A comes about
    is the caller's: mamba_ssm's layer and flash-linear-attention's, which differ in it, both give
    A times dt.

    Args:
        Q, K: [b, l, g, N] bfloat16, float16 or float32: C and B, normalised, without biases.
        V: [b, l, h, P] like Q.
        ADT: [b, h, l] of floating point, <= 0: the logarithm of the decay.
        DT: [b, h, l] of floating point, >= 0.
        Trap: [b, h, l] of floating point: lambda before its sigmoid.
        Q_bias, K_bias: [h, N] of floating point.
        Angles: [b, l, h, S] of floating point, S up to N / 2: before tanh. One of them for all
            heads may come as a view (`.expand`).
        D: [h]: factor of v in y; None for none.
        Z: [b, l, h, P]: the gate; None for none.
        Input_States: what `return_final_states` returned of the part before, for each row, or with
            `cu_seqlens` for each sequence: Theta [sequences, h, S] float32, h [sequences, h, P, N]
            float32, k [sequences, h, N] and v [sequences, h, P] of floating point. Zeros if None.
        chunk_size: a power of two. Results are those of any, to rounding; how many tokens a chunk
            of the kernels has is tuned.
        return_final_states: also return the four states after the last tokens.
        cu_seqlens: [sequences + 1] int32 or int64, rising from 0 to l: packed sequences, none of
            which sees another; wants b = 1.
        disable_recompute: keep more of the scan's forward for a faster backward (the level "fast"),
            as in the other ops of the family.

    Returns:
        out [b, l, h, P] in the dtype of V; or a tuple of it and the states: Theta in radians, from
        0 to 2 pi, h and k float32, v in the dtype of V. All have gradients. No output depends on a
        later token, to the last bit.

    Raises:
        InputError: a wrong rank, shape, dtype, device or value, before any launch.
        UnsupportedError: head dims that were not verified.
    """
    tensors = {
        "Q": Q, "K": K, "V": V, "ADT": ADT, "DT": DT, "Trap": Trap, "Q_bias": Q_bias,
        "K_bias": K_bias, "Angles": Angles, "D": D, "Z": Z, "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    flags = {"return_final_states": return_final_states, "disable_recompute": disable_recompute}
    states = check(tensors, Input_States, chunk_size, flags)
    if cu_seqlens is not None and not is_watched((V, cu_seqlens)):
        check_cu_seqlens(cu_seqlens, V.shape[1])
    if V.shape[1] == 0:
        given = [*tensors.values(), *(states or ())]
        out = _nothing_of(V, [x for x in given if x is not None and x.requires_grad])
        return _nothing(out, K, Angles, states, return_final_states, cu_seqlens)
    ends = Ends(V.shape[0], V.shape[1], cu_seqlens, V.device)
    x = Inputs(
        Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z, states, cu_seqlens, ends
    )  # fmt: skip
    around = None
    if serves(x):
        check_head_dims(MAMBA3, V.dtype, V.device, K.shape[3], V.shape[3])
        if chosen(x):
            made, last, angle = run_chunks(x, state_in(x), disable_recompute)
            return (made, *carried_out(x, angle, last)) if return_final_states else made
        around = Around(x)
    state, first = carried_in(x)
    q, k, decay, own, angle = before(x) if around is None else around.before()
    o, ssm = chunk_simple_gla(
        q,
        k,
        V,
        decay,
        scale=1.0,
        initial_state=state,
        output_final_state=return_final_states,
        state_v_first=True,
        cu_seqlens=cu_seqlens,
        disable_recompute=disable_recompute,
    )
    out = after(x, o, own, first) if around is None else around.after(o, own, first)
    return out if ssm is None else (out, *carried_out(x, angle, ssm))


def mamba3_siso_step(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    ADT: Tensor,
    DT: Tensor,
    Trap: Tensor,
    Q_bias: Tensor,
    K_bias: Tensor,
    Angles: Tensor,
    D: Tensor | None = None,
    Z: Tensor | None = None,
    Input_States: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """One token of `mamba3_siso_combined` for each sequence, forward only in kernels.

    Args: as there, without the dim of tokens: Q, K [b, g, N]; V, Z [b, h, P]; ADT, DT, Trap [b, h];
        Angles [b, h, S]; Input_States as there, which are read and not written.

    Returns:
        out [b, h, P] in the dtype of V, and the list of states after the token. Where a gradient is
        wanted, torch's own operations compute it.

    Raises:
        InputError: a wrong rank, shape, dtype, device or value, before any launch; no Input_States.
        UnsupportedError: head dims that were not verified.
    """
    tensors = {
        "Q": Q, "K": K, "V": V, "ADT": ADT, "DT": DT, "Trap": Trap, "Q_bias": Q_bias,
        "K_bias": K_bias, "Angles": Angles, "D": D, "Z": Z,
    }  # fmt: skip
    states = check_step(tensors, Input_States)
    given = [x for x in (*tensors.values(), *states) if x is not None]
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    problem = None if wanted or is_watched(given) else kernels.step_problem(tensors)
    if problem is None:
        out, made = one_token(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z, states)
        return out, [*made]
    check_head_dims(STEP, V.dtype, V.device, problem.K, problem.V)
    out, angle, ssm, k = kernels.step(problem, tensors, states)
    return out, [states.angle if angle is None else angle, ssm, k, V]


def _nothing_of(V: Tensor, inputs: list[Tensor]) -> Tensor:
    """No rows, of which each input has a gradient of zeros: others wait for one in training."""
    out = V.new_empty(V.shape)
    return sum((0 * x.sum().to(V.dtype) for x in inputs), out) if torch.is_grad_enabled() else out


def _nothing(
    out: Tensor,
    K: Tensor,
    Angles: Tensor,
    states: States | None,
    return_final_states: bool,
    cu_seqlens: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of no tokens: states are what they were."""
    if not return_final_states:
        return out
    if states is not None:
        return out, states.angle, states.ssm, states.k, states.v.to(out.dtype)
    count = out.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h, P, N = out.shape[2], out.shape[3], K.shape[3]
    wide = torch.promote_types(out.dtype, torch.float32)
    return (
        out,
        out.new_zeros(count, h, Angles.shape[3], dtype=wide),
        out.new_zeros(count, h, P, N, dtype=wide),
        out.new_zeros(count, h, N, dtype=wide),
        out.new_zeros(count, h, P),
    )
