"""The layer of Gated DeltaNet-2."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from gdn2gen.family.problem import check_lower_bound
from gdn2gen.nn._heads import Heads, split
from gdn2gen.nn.mixer import Mixer, Op
from gdn2gen.nn.projections import Projected
from gdn2gen.ops.chunk import chunk_gdn2
from gdn2gen.ops.recurrent import fused_recurrent_gdn2


class GatedDeltaNet2(Mixer):
    """Gated DeltaNet-2 (arXiv 2605.22791): a decay and an erase gate for each channel of the keys,
    a write gate for each channel of the values. Per head, with the state S in R^{K x V}:

        S_t = (I - k_t (b_t * k_t)^T) Diag(exp(g_t)) S_{t-1} + k_t (w_t * v_t)^T
        o_t = K^-0.5 S_t^T q_t
        g = -exp(A_log) * softplus(x W_f1 W_f2 + dt_bias),  b = sigmoid(x W_b),  w = sigmoid(x W_w)

    q, k and v go through a short convolution with SiLU, q and k are normalised; the output goes
    through RMSNorm with an output gate. Parameters are named, shaped and drawn as those of
    flash-linear-attention 0.6.0, so that state dicts load both ways.

    Args:
        hidden_size: channels of x and y.
        expand_v: V / K.
        head_dim: K. On a GPU K and V must be head dims that were verified there, or
            GDN2GEN_UNVERIFIED=1; the CPU's reference takes any.
        num_heads: H, heads of q, k, g and b.
        num_v_heads: HV, heads of v and w, a multiple of H; H if None. Value head i reads head
            i // (HV / H) of the others.
        mode: "chunk" or "fused_recurrent": the op for calls that want no gradient; one token a
            sequence goes to the latter in any case.
        use_short_conv: otherwise q, k, v have SiLU alone.
        allow_neg_eigval: b in [0, 2] instead of [0, 1].
        conv_size: 2 to 4 taps.
        conv_bias: whether the convolutions have one.
        layer_idx: under which a cache keeps this layer.
        norm_eps: of the output's RMSNorm.
        lower_bound: in [-5, 0): g = lower_bound * sigmoid(exp(A_log) * (x W_f1 W_f2 + dt_bias)).
        output_gate: "sigmoid", or "silu" as in the paper.
        expected_decay: "weak" or "strong", which may be set later, too: whose kernels run, of those
            tuned under either (`Observatory.decay` says which); what the process expects if None.

    Raises:
        InputError: sizes below 1, heads that do not divide, unknown words.

    State: `A_log` [H] and `dt_bias` [H*K] in fp32 (they stay there in `.bfloat16()`), marked
    `_no_weight_decay`; `{q,k,v,b,w,o}_proj.weight`, `{f,g}_proj.{0,1}.weight`, `g_proj.1.bias`,
    `{q,k,v}_conv1d.weight` [D, 1, conv_size], `o_norm.weight` [V].
    """

    _gate_projections: ClassVar[tuple[str, ...]] = ("f_proj", "b_proj", "w_proj")
    _sigmoid_projections: ClassVar[tuple[str, ...]] = ("b_proj", "w_proj")
    _chunk: ClassVar[Op] = staticmethod(chunk_gdn2)
    _by_channel: ClassVar[bool] = True
    _recurrent: ClassVar[Op | None] = staticmethod(fused_recurrent_gdn2)

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
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        lower_bound: float | None = None,
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
        if lower_bound is not None:
            check_lower_bound(lower_bound)
        self.lower_bound = lower_bound
        self.allow_neg_eigval = allow_neg_eigval
        self._add_gate(heads.H)
        self.b_proj = nn.Linear(hidden_size, heads.H * heads.K, bias=False)
        self.w_proj = nn.Linear(hidden_size, heads.HV * heads.V, bias=False)
        self._add_output(norm_eps, output_gate)

    def _gates(self, tokens: Projected) -> dict[str, Any]:
        heads = self.heads
        b = tokens.sigmoid(self.b_proj)
        return {
            "g": split(tokens.by(self.f_proj), heads.H, heads.K),
            "b": split(2 * b if self.allow_neg_eigval else b, heads.H, heads.K),
            "w": split(tokens.sigmoid(self.w_proj), heads.HV, heads.V),
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "use_gate_in_kernel": True,
            "lower_bound": self.lower_bound,
        }
