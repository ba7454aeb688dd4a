"""The layer of DeltaNet."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from gdn2gen.nn._heads import Heads
from gdn2gen.nn.mixer import Mixer, Op
from gdn2gen.nn.norm import GroupedRMSNorm
from gdn2gen.nn.projections import Projected
from gdn2gen.ops.chunk import chunk_delta_rule
from gdn2gen.ops.recurrent import fused_recurrent_delta_rule


class DeltaNet(Mixer):
    """DeltaNet (arXiv 2406.06484): one factor a head that erases and writes, and no decay. Per
    head, with the state S in R^{K x V}:

        S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        o_t = K^-0.5 S_t^T q_t                                   beta = sigmoid(x W_b)

    q, k and v go through a short convolution with SiLU, q and k are normalised; the output goes
    through RMSNorm, with an output gate if wanted. Parameters are named, shaped and drawn as those
    of flash-linear-attention 0.6.0 with `use_beta=True`, so that state dicts load both ways.

    Args:
        hidden_size: channels of x and y.
        expand_v: V / K.
        head_dim: K. On a GPU K and V must be head dims that were verified there, or
            GDN2GEN_UNVERIFIED=1; the CPU's reference takes any.
        num_heads: H, heads of q and k.
        num_v_heads: HV, heads of v and beta, a multiple of H; H if None. Value head i reads q and k
            of head i // (HV / H).
        mode: "chunk" or "fused_recurrent": the op for calls that want no gradient; one token a
            sequence goes to the latter in any case.
        use_gate: RMSNorm(o) * silu(x W_g) instead of the norm alone.
        use_short_conv: otherwise q, k, v have SiLU alone.
        allow_neg_eigval: beta in [0, 2] instead of [0, 1].
        conv_size: 2 to 4 taps.
        conv_bias: whether the convolutions have one.
        layer_idx: under which a cache keeps this layer.
        norm_eps: of the output's RMSNorm.

    Raises:
        InputError: sizes below 1, heads that do not divide, unknown words.

    State: `{q,k,v,b,o}_proj.weight`, `{q,k,v}_conv1d.weight` [D, 1, conv_size], `o_norm.weight`
    [V]; with `use_gate` `g_proj.weight`.
    """

    _undecayed: ClassVar[tuple[str, ...]] = ()
    _gate_projections: ClassVar[tuple[str, ...]] = ("b_proj",)
    _chunk: ClassVar[Op] = staticmethod(chunk_delta_rule)
    _recurrent: ClassVar[Op | None] = staticmethod(fused_recurrent_delta_rule)

    def __init__(
        self,
        hidden_size: int = 1024,
        *,
        expand_v: float = 1.0,
        head_dim: int = 256,
        num_heads: int = 4,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_gate: bool = False,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
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
        )
        self.allow_neg_eigval = allow_neg_eigval
        self.use_gate = use_gate
        if use_gate:
            g_proj = nn.Linear(hidden_size, heads.HV * heads.V, bias=False)
            self._add_output(norm_eps, "silu", g_proj)
        else:
            self.o_norm = GroupedRMSNorm(heads.V, eps=norm_eps)
            self.o_proj = nn.Linear(heads.HV * heads.V, hidden_size, bias=False)

    def _add_before_convolutions(self) -> None:
        self.b_proj = nn.Linear(self.hidden_size, self.heads.HV, bias=False)

    def _projections(self) -> list[nn.Module]:
        gate = [self.g_proj] if self.use_gate else []
        return [self.q_proj, self.k_proj, self.v_proj, self.b_proj, *gate]

    def _gates(self, tokens: Projected) -> dict[str, Any]:
        beta = tokens.by(self.b_proj).sigmoid()
        return {"beta": 2 * beta if self.allow_neg_eigval else beta}

    def _normed(self, o: Tensor, tokens: Projected) -> Tensor:
        if self.use_gate:
            return super()._normed(o, tokens)
        y: Tensor = self.o_norm(o)
        return y
