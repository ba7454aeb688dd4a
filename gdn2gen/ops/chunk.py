"""The public ops. One import line away from flash-linear-attention's.

Tensors on a GPU run the generated kernels. Tensors on the CPU run the reference, so that a model's
own tests work anywhere; under TRITON_INTERPRET=1 they run the kernels in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from torch import Tensor

from gdn2gen.family.delta_rule import DELTA_RULE
from gdn2gen.family.gated_delta_rule import GATED_DELTA_RULE
from gdn2gen.family.gdn2 import GDN2
from gdn2gen.family.gla import GLA
from gdn2gen.family.kda import KDA
from gdn2gen.family.mamba2 import MAMBA2
from gdn2gen.family.simple_gla import SIMPLE_GLA
from gdn2gen.ops._call import call
from gdn2gen.ops._decay import decay_of
from gdn2gen.ops._docstring import documented
from gdn2gen.ops._prefill import serving_of
from gdn2gen.runtime.autograd import op_of
from gdn2gen.runtime.options import check_capacity, check_order
from gdn2gen.runtime.signature import renamed

_GDN2: Final = op_of(GDN2)
_KDA: Final = op_of(KDA)
_GATED_DELTA_RULE: Final = op_of(GATED_DELTA_RULE)
_DELTA_RULE: Final = op_of(DELTA_RULE)
_GLA: Final = op_of(GLA)
_SIMPLE_GLA: Final = op_of(SIMPLE_GLA)
SIMPLE_GLA_OP: Final = _SIMPLE_GLA
"""Which Mamba-2's op calls, as it does `MAMBA2_OP`, by the names of its own tensors."""
# The same for errors that name what was given in place of g.
_BY_GAMMA: Final = replace(_SIMPLE_GLA, signature=renamed(_SIMPLE_GLA.signature, g="g_gamma"))
_MAMBA2: Final = op_of(MAMBA2)
MAMBA2_OP: Final = _MAMBA2


@documented(GDN2)
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
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int | None = None,
    *,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int | None = None,
    checkpoint_every_n_tokens: int | None = None,
    checkpoint_state_indices: Tensor | None = None,
    expected_decay: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet-2 over whole sequences, in chunks (arXiv 2605.22791)."""
    if cu_seqlens is not None or cu_seqlens_cpu is not None or type(safe_gate) is not bool:
        check_order(cu_seqlens, cu_seqlens_cpu, safe_gate)
    return call(  # type: ignore[no-any-return]
        _GDN2,
        (q, k, v, g, b, w, initial_state, A_log, dt_bias, cu_seqlens),
        scale=scale,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        safe_gate=safe_gate,
        lower_bound=lower_bound,
        disable_recompute=disable_recompute,
        return_intermediate_states=return_intermediate_states,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        chunk_size=chunk_size,
        expected_decay=expected_decay,
        serving=serving_of(
            state_pool,
            ssm_state_indices,
            has_initial_state,
            null_slot,
            checkpoint_every_n_tokens,
            checkpoint_state_indices,
        ),
    )


@documented(KDA)
def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int | None = None,
    *,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int | None = None,
    checkpoint_every_n_tokens: int | None = None,
    checkpoint_state_indices: Tensor | None = None,
    expected_decay: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention over whole sequences, in chunks (arXiv 2510.26692)."""
    if use_graph is not False or max_num_seqs is not None:
        check_capacity(use_graph, max_num_seqs, cu_seqlens)
    return call(  # type: ignore[no-any-return]
        _KDA,
        (q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens),
        scale=scale,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        safe_gate=safe_gate,
        lower_bound=lower_bound,
        disable_recompute=disable_recompute,
        return_intermediate_states=return_intermediate_states,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        chunk_size=chunk_size,
        expected_decay=expected_decay,
        serving=serving_of(
            state_pool,
            ssm_state_indices,
            has_initial_state,
            null_slot,
            checkpoint_every_n_tokens,
            checkpoint_state_indices,
        ),
    )


@documented(GATED_DELTA_RULE)
def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    *,
    return_intermediate_states: bool = False,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int | None = None,
    checkpoint_every_n_tokens: int | None = None,
    checkpoint_state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet over whole sequences, in chunks (arXiv 2412.06464)."""
    return call(  # type: ignore[no-any-return]
        _GATED_DELTA_RULE,
        (q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens),
        scale=scale,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        disable_recompute=disable_recompute,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        return_intermediate_states=return_intermediate_states,
        chunk_size=chunk_size,
        serving=serving_of(
            state_pool,
            ssm_state_indices,
            has_initial_state,
            null_slot,
            checkpoint_every_n_tokens,
            checkpoint_state_indices,
        ),
    )


@documented(DELTA_RULE)
def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    *,
    return_intermediate_states: bool = False,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int | None = None,
    checkpoint_every_n_tokens: int | None = None,
    checkpoint_state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """DeltaNet over whole sequences, in chunks (arXiv 2406.06484)."""
    return call(  # type: ignore[no-any-return]
        _DELTA_RULE,
        (q, k, v, beta, initial_state, cu_seqlens),
        scale=scale,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        disable_recompute=disable_recompute,
        cu_seqlens_cpu=cu_seqlens_cpu,
        return_intermediate_states=return_intermediate_states,
        chunk_size=chunk_size,
        serving=serving_of(
            state_pool,
            ssm_state_indices,
            has_initial_state,
            null_slot,
            checkpoint_every_n_tokens,
            checkpoint_state_indices,
        ),
    )


@documented(GLA)
def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    disable_recompute: bool = False,
    *,
    return_intermediate_states: bool = False,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int | None = None,
    checkpoint_every_n_tokens: int | None = None,
    checkpoint_state_indices: Tensor | None = None,
    expected_decay: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention over whole sequences, in chunks (arXiv 2312.06635)."""
    return call(  # type: ignore[no-any-return]
        _GLA,
        (q, k, v, g, initial_state, cu_seqlens),
        scale=scale,
        output_final_state=output_final_state,
        disable_recompute=disable_recompute,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        return_intermediate_states=return_intermediate_states,
        expected_decay=expected_decay,
        serving=serving_of(
            state_pool,
            ssm_state_indices,
            has_initial_state,
            null_slot,
            checkpoint_every_n_tokens,
            checkpoint_state_indices,
        ),
    )


@documented(SIMPLE_GLA)
def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    *,
    return_intermediate_states: bool = False,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int | None = None,
    checkpoint_every_n_tokens: int | None = None,
    checkpoint_state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Simple gated linear attention over whole sequences, in chunks (arXiv 2405.21060)."""
    return call(  # type: ignore[no-any-return]
        _SIMPLE_GLA if g_gamma is None else _BY_GAMMA,
        (q, k, v, decay_of(v, g, g_gamma), initial_state, cu_seqlens),
        scale=scale,
        output_final_state=output_final_state,
        disable_recompute=disable_recompute,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        return_intermediate_states=return_intermediate_states,
        chunk_size=chunk_size,
        serving=serving_of(
            state_pool,
            ssm_state_indices,
            has_initial_state,
            null_slot,
            checkpoint_every_n_tokens,
            checkpoint_state_indices,
        ),
    )


@documented(MAMBA2)
def chunk_mamba2(
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
    cu_seqlens_cpu: Tensor | None = None,
    disable_recompute: bool = False,
    *,
    return_intermediate_states: bool = False,
    state_pool: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int | None = None,
    checkpoint_every_n_tokens: int | None = None,
    checkpoint_state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2 over whole sequences, in the words of the family (arXiv 2405.21060).

    As mamba_ssm takes it: `mamba_chunk_scan_combined`.
    """
    return call(  # type: ignore[no-any-return]
        _MAMBA2,
        (q, k, v, dt, initial_state, rate, dt_bias, D, z, cu_seqlens),
        scale=None,
        output_final_state=output_final_state,
        use_gate_in_kernel=use_gate_in_kernel,
        disable_recompute=disable_recompute,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        return_intermediate_states=return_intermediate_states,
        serving=serving_of(
            state_pool,
            ssm_state_indices,
            has_initial_state,
            null_slot,
            checkpoint_every_n_tokens,
            checkpoint_state_indices,
        ),
    )
