"""The layer of Kimi Delta Attention."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from gdn2gen.base.errors import InputError
from gdn2gen.family.problem import check_lower_bound
from gdn2gen.nn._heads import Heads, split
from gdn2gen.nn.mixer import Mixer, Op
from gdn2gen.nn.projections import Projected
from gdn2gen.ops.chunk import chunk_kda
from gdn2gen.ops.recurrent import fused_recurrent_kda


class KimiDeltaAttention(Mixer):
    """Kimi Delta Attention (arXiv 2510.26692): a decay for each channel of the keys, and one factor
    a head that erases and writes. Per head, with the state S in R^{K x V}:

        S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T
        o_t = K^-0.5 S_t^T q_t
        g = -exp(A_log) * softplus(x W_f1 W_f2 + dt_bias),  beta = sigmoid(x W_b)

    q, k and v go through a short convolution with SiLU, q and k are normalised; the output goes
    through RMSNorm with an output gate. Parameters are named, shaped and drawn as those of
    flash-linear-attention 0.6.0, so that state dicts load both ways.

    Args:
        hidden_size: channels of x and y.
        expand_v: V / K.
        head_dim: K. On a GPU K and V must be head dims that were verified there, or
            GDN2GEN_UNVERIFIED=1; the CPU's reference takes any.
        num_heads: H, heads of q and k.
        num_v_heads: HV, heads of v, g and beta, a multiple of H; H if None. Value head i reads q
            and k of head i // (HV / H).
        mode: "chunk" or "fused_recurrent": the op for calls that want no gradient; one token a
            sequence goes to the latter in any case.
        use_short_conv: otherwise q, k, v have SiLU alone.
        allow_neg_eigval: beta in [0, 2] instead of [0, 1].
        safe_gate: the decay is bounded, which needs `lower_bound`; A_log is then 0 at first.
        lower_bound: in [-5, 0): g = lower_bound * sigmoid(exp(A_log) * (x W_f1 W_f2 + dt_bias)).
        conv_size: 2 to 4 taps.
        conv_bias: whether the convolutions have one.
        layer_idx: under which a cache keeps this layer.
        norm_eps: of the output's RMSNorm.
        output_gate: "sigmoid", or "silu".
        expected_decay: "weak" or "strong", which may be set later, too: whose kernels run, of those
            tuned under either (`Observatory.decay` says which); what the process expects if None.

    Raises:
        InputError: sizes below 1, heads that do not divide, unknown words, `safe_gate` alone.

    State: `A_log` [HV] and `dt_bias` [HV*K] in fp32 (they stay there in `.bfloat16()`), marked
    `_no_weight_decay`; `{q,k,v,b,o}_proj.weight`, `{f,g}_proj.{0,1}.weight`, `g_proj.1.bias`,
    `{q,k,v}_conv1d.weight` [D, 1, conv_size], `o_norm.weight` [V].
    """

    _gate_projections: ClassVar[tuple[str, ...]] = ("f_proj", "b_proj")
    _chunk: ClassVar[Op] = staticmethod(chunk_kda)
    _by_channel: ClassVar[bool] = True
    _recurrent: ClassVar[Op | None] = staticmethod(fused_recurrent_kda)

    def __init__(
        self,
        hidden_size: int = 2048,
        *,
        expand_v: float = 1.0,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        output_gate: str = "sigmoid",
        expected_decay: str | None = None,
    ) -> None:
        heads = Heads.of(num_heads, num_v_heads, head_dim, expand_v)
        super().__init__(
            hidden_size,
            heads,
            mode=mode,
            use_short_conv=use_short_conv,
            conv_size=conv_size,
            conv_bias=conv_bias,
            layer_idx=layer_idx,
            expected_decay=expected_decay,
        )
        if safe_gate and lower_bound is None:
            raise InputError("safe_gate=True needs lower_bound, such as -5.0")
        if lower_bound is not None:
            check_lower_bound(lower_bound)
        self.safe_gate = safe_gate
        self.lower_bound = lower_bound
        self.allow_neg_eigval = allow_neg_eigval
        self._add_gate(heads.HV)
        self.b_proj = nn.Linear(hidden_size, heads.HV, bias=False)
        self._add_output(norm_eps, output_gate)

    @torch.no_grad()
    def _reset_rates(self) -> None:
        super()._reset_rates()
        if self.safe_gate:
            self.A_log.zero_()

    def _gates(self, tokens: Projected) -> dict[str, Any]:
        return {
            "g": split(tokens.by(self.f_proj), self.heads.HV, self.heads.K),
            "beta": tokens.by(self.b_proj),
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "use_gate_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
            "allow_neg_eigval": self.allow_neg_eigval,
            "lower_bound": self.lower_bound,
        }

    def _chunk_options(self) -> dict[str, Any]:
        return {"safe_gate": self.safe_gate}
