"""The public ops. One import line away from flash-linear-attention's.

Tensors on a GPU run the generated kernels. Tensors on the CPU run the reference, so that a model's
own tests work anywhere; under TRITON_INTERPRET=1 they run the kernels in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from gdn2gen.family.gdn2 import GDN2
from gdn2gen.ops._call import call
from gdn2gen.runtime.autograd import op_of

_GDN2: Final = op_of(GDN2)


def chunk_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet-2 over whole sequences, in chunks (arXiv 2605.22791).

    Per head, with the state S in R^{K x V} and elementwise `*`:

        S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T
        o_t = scale * S_t^T q_t

    Args:
        q, k: [B, T, H, K], bfloat16, float16 or float32. K in {32, 64, 128}. With float16, states
            and w * v above 65504 make o and the final state inf or NaN, and gradients of the state
            lose digits below 2^-10 and vanish below 2^-24: scale v and the initial state down (o
            and states are linear in them), or the loss up, or use bfloat16.
        v: [B, T, HV, V], dtype of q. HV a multiple of H: value head i reads q, k of head
            i // (HV / H). V in {32, 64, 128}.
        g: [B, T, H or HV, K], bfloat16, float16 or float32: decay in natural log, <= 0 (any size,
            -inf too); with `use_gate_in_kernel` its pre-activation.
        b: erase gate, [B, T, H or HV, K] like g, dtype of q, in [0, 1], or [0, 2].
        w: write gate, [B, T, HV, V], dtype of q, usually in [0, 1].
        scale: of the output; K**-0.5 if None.
        initial_state: [N, HV, K, V] float32, one per sequence; zero if None.
        output_final_state: return the state after the last token.
        use_qk_l2norm_in_kernel: normalise q and k by x / sqrt(sum(x^2) + 1e-6).
        use_gate_in_kernel: decay = -exp(A_log) * softplus(g + dt_bias), or with `lower_bound`
            decay = lower_bound * sigmoid(exp(A_log) * (g + dt_bias)).
        A_log: [heads of g] float; optional with `lower_bound`.
        dt_bias: [heads of g * K], or [heads of g, K]; optional.
        cu_seqlens: [N+1] int32 or int64, rising from 0 to T: packed sequences; wants B = 1. On a
            GPU only the kernels read it: other lengths may be written to it between replays of a
            CUDA graph. What they hold is taken within 0 .. T and rising; o and gradients of tokens
            that no sequence covers are zero.
        cu_seqlens_cpu: its copy on the host, which is checked if it is given.
        safe_gate: the decay is bounded; needs `lower_bound` where the gate is in the kernel.
        lower_bound: least decay, in [-5, 0).
        disable_recompute: keep more of the forward for a faster backward (the level "fast").
        return_intermediate_states: not built yet; UnsupportedError.
        state_v_first: states are [N, HV, V, K].

    Returns:
        o [B, T, HV, V] in the dtype of v, and the final state (float32) or None.

    Raises:
        InputError: a wrong rank, shape, dtype, device or value, before any launch.
        UnsupportedError: head dims or options that were not verified.
    """
    return call(
        _GDN2,
        (q, k, v, g, b, w, initial_state, A_log, dt_bias, cu_seqlens),
        cu_seqlens_cpu,
        scale,
        lower_bound,
        output_final_state,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        safe_gate,
        disable_recompute,
        return_intermediate_states,
        state_v_first,
    )


__all__: list[Any] = ["chunk_gdn2"]
