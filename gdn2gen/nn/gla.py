"""The layer of gated linear attention."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn2gen.base.errors import InputError
from gdn2gen.nn._heads import Heads, split
from gdn2gen.nn.mixer import Mixer, Op
from gdn2gen.nn.norm import GatedRMSNorm
from gdn2gen.nn.projections import Projected
from gdn2gen.ops.chunk import chunk_gla
from gdn2gen.ops.recurrent import fused_recurrent_gla


class GatedLinearAttention(Mixer):
    """Gated linear attention (arXiv 2312.06635): a decay for each channel of the keys, and nothing
    erased. Per head, with the state S in R^{K x V}:

        S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T
        o_t = K^-0.5 S_t^T q_t
        g = logsigmoid(x W_gk1 W_gk2 + bias) / gate_logit_normalizer

    q, k and v are projections of x, as they are, or after a short convolution with SiLU; the output
    goes through RMSNorm with a SiLU output gate. Parameters are named, shaped and drawn as those of
    flash-linear-attention 0.6.0, so that state dicts load both ways.

    Args:
        hidden_size: channels of x and y.
        expand_v: V / K.
        head_dim: K. On a GPU K and V must be head dims that were verified there, or
            GDN2GEN_UNVERIFIED=1; the CPU's reference takes any.
        num_heads: H, heads of q, k and g.
        num_v_heads: HV, heads of v, a multiple of H; H if None. Value head i reads head
            i // (HV / H) of the others.
        mode: "chunk" or "fused_recurrent": the op for calls that want no gradient; one token a
            sequence goes to the latter in any case.
        use_short_conv: whether q, k and v have one.
        conv_size: 2 to 4 taps.
        conv_bias: whether the convolutions have one.
        gate_logit_normalizer: above 0; the larger, the weaker is the decay.
        gate_low_rank_dim: channels that the gate's projection goes through.
        clamp_min: least that g is; None for no limit.
        layer_idx: under which a cache keeps this layer.
        norm_eps: of the output's RMSNorm.
        expected_decay: "weak" or "strong", which may be set later, too: whose kernels run, of those
            tuned under either (`Observatory.decay` says which); what the process expects if None.

    Raises:
        InputError: sizes below 1, heads that do not divide, unknown words.

    State: `{q,k,v,g,o}_proj.weight`, `gk_proj.{0,1}.weight`, `gk_proj.1.bias`,
    `g_norm_swish_gate.weight` [V]; with `use_short_conv` `{q,k,v}_conv1d.weight` [D, 1, conv_size].
    """

    _undecayed: ClassVar[tuple[str, ...]] = ()
    _gate_projections: ClassVar[tuple[str, ...]] = ("gk_proj",)
    _chunk: ClassVar[Op] = staticmethod(chunk_gla)
    _by_channel: ClassVar[bool] = True
    _recurrent: ClassVar[Op | None] = staticmethod(fused_recurrent_gla)
    _plain: ClassVar[bool] = True

    def __init__(
        self,
        hidden_size: int = 1024,
        *,
        expand_v: float = 2.0,
        head_dim: int = 128,
        num_heads: int = 4,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        gate_logit_normalizer: float = 16.0,
        gate_low_rank_dim: int = 16,
        clamp_min: float | None = None,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
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
        if gate_logit_normalizer <= 0:
            raise InputError(
                f"gate_logit_normalizer must be above 0, but got {gate_logit_normalizer}"
            )
        if gate_low_rank_dim < 1:
            raise InputError(f"gate_low_rank_dim must be at least 1, but got {gate_low_rank_dim}")
        self.gate_logit_normalizer = gate_logit_normalizer
        self.clamp_min = clamp_min
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, gate_low_rank_dim, bias=False),
            nn.Linear(gate_low_rank_dim, heads.H * heads.K, bias=True),
        )
        self.o_proj = nn.Linear(heads.HV * heads.V, hidden_size, bias=False)
        self.g_norm_swish_gate = GatedRMSNorm(heads.V, eps=norm_eps, activation="silu")

    def _add_before_convolutions(self) -> None:
        self.g_proj = nn.Linear(self.hidden_size, self.heads.HV * self.heads.V, bias=False)

    def _gates(self, tokens: Projected) -> dict[str, Any]:
        raw = tokens.by(self.gk_proj)
        wide = torch.promote_types(raw.dtype, torch.float32)
        g = functional.logsigmoid(raw.to(wide)) / self.gate_logit_normalizer
        g = g if self.clamp_min is None else g.clamp(min=self.clamp_min)
        return {"g": split(g, self.heads.H, self.heads.K)}

    def _few(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"gk" if name == "g" else name: x for name, x in arguments.items()}

    def _normed(self, o: Tensor, tokens: Projected) -> Tensor:
        gate = split(tokens.by(self.g_proj), self.heads.HV, self.heads.V)
        y: Tensor = self.g_norm_swish_gate(o, gate)
        return y
