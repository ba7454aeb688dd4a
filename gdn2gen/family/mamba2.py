"""Mamba-2 (arXiv 2405.21060) as state-spaces/mamba takes it: the recurrence in plain PyTorch.

One head, rows are tokens; state h [P, N], x in R^P, B and C in R^N, A <= 0 and dt >= 0 numbers:

    h_t = exp(A dt_t) h_{t-1} + dt_t x_t B_t^T
    y_t = h_t C_t + D x_t                             out_t = y_t silu(z_t)

In the words of the family q = C, k = B, v = x, rate = A, and dt is a step: it decays, and it is
what a token writes. `MAMBA2` says so, and has kernels; the recurrence below is told apart from it
on purpose, to be their truth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from gdn2gen.family.recurrence import (
    HEAD_GATES,
    KEY,
    QUERY,
    SEQUENCES,
    STATE,
    VALUE,
    Decay,
    Input,
    Public,
    Recurrence,
    Usual,
)

if TYPE_CHECKING:
    from torch import Tensor

MAMBA2: Final = Recurrence(
    name="mamba2",
    title="Mamba-2",
    source="arXiv 2405.21060",
    inputs=(
        QUERY,
        KEY,
        VALUE,
        Input(
            "dt", "B T HV",
            "step, >= 0: what a token decays by and writes; with `use_gate_in_kernel` before "
            "softplus(dt + dt_bias)",
            "gate", draw="decay", apart=True,
        ),
        STATE,
        # one number for a head, a sum over all tokens and channels, as `RATE` is
        Input(
            "rate", "HV", "decay of a step of 1 in natural log, <= 0; -1 if None", "parameter",
            when="has_rate", draw="decay", slack=3.0,
        ),
        Input("dt_bias", "HV", "optional", "parameter", when="has_dt_bias", draw="bias"),
        Input("D", "HV V", "o grows by D v; none if None", "parameter", when="has_D"),
        Input(
            "z", "B T HV V", "o is then multiplied by silu(z); none if None",
            when="has_z", apart=True,
        ),
        SEQUENCES,
    ),
    decay=Decay("dt", HEAD_GATES),
    erase=None,
    write="dt",
    public=Public(
        chunk="chunk_mamba2",
        fla="",
        elsewhere="mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined",
        arguments=(
            "initial_state",
            "output_final_state",
            "use_gate_in_kernel",
            "rate",
            "dt_bias",
            "D",
            "z",
            "state_v_first",
            "cu_seqlens",
            "cu_seqlens_cpu",
            "disable_recompute",
        ),
        recurrent="fused_recurrent_mamba2",
        recurrent_arguments=(
            "initial_state",
            "output_final_state",
            "use_gate_in_kernel",
            "rate",
            "dt_bias",
            "D",
            "z",
            "state_v_first",
            "cu_seqlens",
        ),
    ),
    usual=Usual(head_dims=("128,64",), shapes=("mamba4k",), gate="softplus"),
    plans=("grouped",),
)  # fmt: skip


def step_sizes(
    dt: Tensor, dt_bias: Tensor | None, softplus: bool, limit: tuple[float, float]
) -> Tensor:
    """dt [B, T, H] as the recurrence takes it, in float32 or wider: biased, activated, limited."""
    import torch  # here: declarations load none
    import torch.nn.functional as F

    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if dt_bias is not None:
        dt = dt + dt_bias
    if softplus:
        dt = F.softplus(dt)
    least, most = limit
    return dt if least <= -math.inf and most == math.inf else dt.clamp(least, most)


def recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """Token by token; differentiable.

    Args:
        x, z: [B, T, H, P]. dt: [B, T, H]. A, dt_bias: [H]. B, C: [B, T, G, N], each group of which
            serves H / G heads that follow each other. D: [H] or [H, P].
        initial_states: one [H, P, N] for each row, or each packed sequence; zero if None.
        seq_idx: [B, T]: the state is 0 before a token whose number is not the one before it.
        cu_seqlens: [sequences + 1]: sequences that are packed in one row.

    Returns:
        out [B, T, H, P], and the states after the last token of each row or sequence.
    """
    import torch  # here: declarations load none
    import torch.nn.functional as F

    heads = x.shape[2]
    dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit)
    keys, queries = (y.repeat_interleave(heads // y.shape[2], 2) for y in (B, C))
    outputs, last = [], []
    for n, row, start, end in _sequences(x, cu_seqlens):
        h = x.new_zeros(heads, x.shape[3], B.shape[3])
        h = h if initial_states is None else initial_states[n]
        for t in range(start, end):
            if seq_idx is not None and t > start and seq_idx[row, t] != seq_idx[row, t - 1]:
                h = torch.zeros_like(h)
            added = (dt[row, t][:, None] * x[row, t])[..., None] * keys[row, t][:, None]
            h = (A * dt[row, t]).exp()[:, None, None] * h + added
            outputs.append((h @ queries[row, t][..., None]).squeeze(-1))
        last.append(h)
    y = torch.stack(outputs).view(x.shape) if outputs else x
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]) * x
    return y if z is None else y * F.silu(z), torch.stack(last)


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[int, int, int, int]]:
    """Number, row, first token and end of each."""
    if cu_seqlens is None:
        yield from ((row, row, 0, x.shape[1]) for row in range(x.shape[0]))
    else:
        ends = cu_seqlens.tolist()
        for n in range(len(ends) - 1):
            yield n, 0, ends[n], ends[n + 1]
