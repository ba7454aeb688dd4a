"""The public ops over a few tokens of each sequence. One import line away from
flash-linear-attention's, and for serving: states in slots of a pool, in place.

Tensors on a GPU run one generated kernel. Tensors on the CPU run the reference; under
TRITON_INTERPRET=1 they run the kernel in Triton's interpreter.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from gdn2gen.family.gdn2 import GDN2
from gdn2gen.family.kda import KDA
from gdn2gen.ops._decode import decode
from gdn2gen.ops._docstring import decoding_documented
from gdn2gen.runtime.decoding_op import decoding_op

_GDN2: Final = decoding_op(GDN2)
_KDA: Final = decoding_op(KDA)


@decoding_documented(GDN2)
def fused_recurrent_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet-2 over a few tokens of each sequence (arXiv 2605.22791)."""
    return decode(
        _GDN2,
        (q, k, v, g, b, w, initial_state, A_log, dt_bias, cu_seqlens),
        (ssm_state_indices, num_accepted_tokens, state_pool, out),
        scale=scale,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        lower_bound=lower_bound,
        state_v_first=state_v_first,
        null_slot=null_slot,
    )


@decoding_documented(KDA)
def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention over a few tokens of each sequence (arXiv 2510.26692)."""
    return decode(
        _KDA,
        (q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens),
        (ssm_state_indices, num_accepted_tokens, state_pool, out),
        scale=scale,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        lower_bound=lower_bound,
        state_v_first=state_v_first,
        null_slot=null_slot,
    )
