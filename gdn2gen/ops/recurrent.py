"""The public ops over a few tokens of each sequence. One import line away from
flash-linear-attention's, and for serving: states in slots of a pool, in place.

Tensors on a GPU run one generated kernel. Tensors on the CPU run the reference; under
TRITON_INTERPRET=1 they run the kernel in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from torch import Tensor

from gdn2gen.base.errors import InputError
from gdn2gen.family.delta_rule import DELTA_RULE
from gdn2gen.family.gated_delta_rule import GATED_DELTA_RULE
from gdn2gen.family.gdn2 import GDN2
from gdn2gen.family.gla import GLA
from gdn2gen.family.kda import KDA
from gdn2gen.family.mamba2 import MAMBA2
from gdn2gen.family.simple_gla import SIMPLE_GLA
from gdn2gen.ops._decay import channels_of, decay_of, factor_of, refuse_decays, refuse_reverse
from gdn2gen.ops._decode import decode
from gdn2gen.ops._docstring import decoding_documented
from gdn2gen.runtime.decoding_op import decoding_op
from gdn2gen.runtime.signature import renamed

_GDN2: Final = decoding_op(GDN2)
_KDA: Final = decoding_op(KDA)
_GATED_DELTA_RULE: Final = decoding_op(GATED_DELTA_RULE)
_DELTA_RULE: Final = decoding_op(DELTA_RULE)
_GLA: Final = decoding_op(GLA)
_SIMPLE_GLA: Final = decoding_op(SIMPLE_GLA)
MAMBA2_STEP: Final = decoding_op(MAMBA2)
# The same for errors that name what was given in place of g.
_BY_GAMMA: Final = replace(_SIMPLE_GLA, signature=renamed(_SIMPLE_GLA.signature, g="g_gamma"))


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


@decoding_documented(GATED_DELTA_RULE)
def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet over a few tokens of each sequence (arXiv 2412.06464).

    Without g nothing decays; without beta it is 1: then there is nothing to activate (InputError).
    """
    refuse_decays("fused_recurrent_gated_delta_rule", ", or call fused_recurrent_kda", gk=gk, gv=gv)
    for name, x, flag in (
        ("g", g, use_gate_in_kernel and "use_gate_in_kernel"),
        ("beta", beta, use_beta_sigmoid_in_kernel and "use_beta_sigmoid_in_kernel"),
    ):
        if x is None and flag:
            raise InputError(
                f"{flag}=True activates {name}, but {name} is None: give it, or leave {flag} False"
            )
    return decode(
        _GATED_DELTA_RULE,
        (
            *(q, k, v, decay_of(v, g), factor_of(v, beta)),
            *(initial_state, A_log, dt_bias, cu_seqlens),
        ),
        (ssm_state_indices, num_accepted_tokens, state_pool, out),
        scale=scale,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        null_slot=null_slot,
    )


@decoding_documented(DELTA_RULE)
def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """DeltaNet over a few tokens of each sequence (arXiv 2406.06484).

    Without beta it is 1.
    """
    return decode(
        _DELTA_RULE,
        (q, k, v, factor_of(v, beta), initial_state, cu_seqlens),
        (ssm_state_indices, num_accepted_tokens, state_pool, out),
        scale=scale,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        null_slot=null_slot,
    )


@decoding_documented(GLA)
def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention over a few tokens of each sequence (arXiv 2312.06635).

    g of the equation is gk; without it nothing decays.
    """
    refuse_decays("fused_recurrent_gla", "", gv=gv)
    refuse_reverse("fused_recurrent_gla", reverse)
    return decode(
        _GLA,
        (q, k, v, channels_of(q, v, gk), initial_state, cu_seqlens),
        (ssm_state_indices, num_accepted_tokens, state_pool, out),
        scale=scale,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        null_slot=null_slot,
    )


@decoding_documented(SIMPLE_GLA)
def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Simple gated linear attention over a few tokens of each sequence (arXiv 2405.21060)."""
    refuse_reverse("fused_recurrent_simple_gla", reverse)
    return decode(
        _SIMPLE_GLA if g_gamma is None else _BY_GAMMA,
        (q, k, v, decay_of(v, g, g_gamma), initial_state, cu_seqlens),
        (ssm_state_indices, num_accepted_tokens, state_pool, out),
        scale=scale,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        null_slot=null_slot,
    )


@decoding_documented(MAMBA2)
def fused_recurrent_mamba2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_gate_in_kernel: bool = False,
    rate: Tensor | None = None,
    dt_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2 over a few tokens of each sequence (arXiv 2405.21060), in the words of the family;
    `selective_state_update` has those of state-spaces/mamba.

    q is C, k is B, v is x, rate is A. D may be one number a head, expanded: it is read as it lies.
    """
    return decode(
        MAMBA2_STEP,
        (q, k, v, dt, initial_state, rate, dt_bias, D, z, cu_seqlens),
        (ssm_state_indices, num_accepted_tokens, state_pool, out),
        scale=1.0,
        output_final_state=output_final_state,
        use_gate_in_kernel=use_gate_in_kernel,
        state_v_first=state_v_first,
        null_slot=null_slot,
    )
