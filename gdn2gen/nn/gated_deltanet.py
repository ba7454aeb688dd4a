"""The layer of Gated DeltaNet."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from gdn2gen.nn._heads import Heads
from gdn2gen.nn.mixer import Mixer, Op
from gdn2gen.nn.projections import Projected
from gdn2gen.ops.chunk import chunk_gated_delta_rule
from gdn2gen.ops.recurrent import fused_recurrent_gated_delta_rule


class GatedDeltaNet(Mixer):
    """Gated DeltaNet (arXiv 2412.06464): one decay a head, and one factor a head that erases and
    writes. Per head, with the state S in R^{K x V}:

        S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        o_t = K^-0.5 S_t^T q_t
        g = -exp(A_log) * softplus(x W_a + dt_bias),  beta = sigmoid(x W_b)

    q, k and v go through a short convolution with SiLU, q and k are normalised; the output goes
    through RMSNorm with an output gate. Parameters are named, shaped and drawn as those of
    flash-linear-attention 0.6.0 with `use_gate=True`, so that state dicts load both ways.

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
        conv_size: 2 to 4 taps.
        conv_bias: whether the convolutions have one.
        layer_idx: under which a cache keeps this layer.
        norm_eps: of the output's RMSNorm.
        output_gate: "silu", or "sigmoid".

    Raises:
        InputError: sizes below 1, heads that do not divide, unknown words.

    State: `A_log` [HV] and `dt_bias` [HV] in fp32 (they stay there in `.bfloat16()`), marked
    `_no_weight_decay`; `{q,k,v,a,b,g,o}_proj.weight`, `{q,k,v}_conv1d.weight` [D, 1, conv_size],
    `o_norm.weight` [V].
    """

    _gate_projections: ClassVar[tuple[str, ...]] = ("a_proj", "b_proj")
    _chunk: ClassVar[Op] = staticmethod(chunk_gated_delta_rule)
    _recurrent: ClassVar[Op | None] = staticmethod(fused_recurrent_gated_delta_rule)
    _least_rate: ClassVar[float] = 0.0

    def __init__(
        self,
        hidden_size: int = 2048,
        *,
        expand_v: float = 2.0,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        output_gate: str = "silu",
    ) -> None:
        super().__init__(
            hidden_size,
            Heads.of(num_heads, num_v_heads, head_dim, expand_v),
            mode=mode,
            use_short_conv=use_short_conv,
            conv_size=conv_size,
            conv_bias=conv_bias,
            layer_idx=layer_idx,
        )
        self.allow_neg_eigval = allow_neg_eigval
        self._add_rates(self.heads.HV, self.heads.HV)
        g_proj = nn.Linear(hidden_size, self.heads.HV * self.heads.V, bias=False)
        self._add_output(norm_eps, output_gate, g_proj)

    def _add_before_convolutions(self) -> None:
        self.a_proj = nn.Linear(self.hidden_size, self.heads.HV, bias=False)
        self.b_proj = nn.Linear(self.hidden_size, self.heads.HV, bias=False)

    def _gates(self, tokens: Projected) -> dict[str, Any]:
        return {
            "g": tokens.by(self.a_proj),
            "beta": tokens.by(self.b_proj),
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "use_gate_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
            "allow_neg_eigval": self.allow_neg_eigval,
        }
