"""What the layers with q, k and v share: all but their gates and their ops."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn2gen.base.decay import check_decay
from gdn2gen.base.errors import InputError
from gdn2gen.family.activations import activate_gate
from gdn2gen.family.registry import RECURRENCES
from gdn2gen.nn._batch import Batch
from gdn2gen.nn._heads import Heads, split
from gdn2gen.nn._projected_norm import norm_of_projected
from gdn2gen.nn.cache import in_place, write
from gdn2gen.nn.convolution import ShortConvolution, convolve_batch
from gdn2gen.nn.layer import STATE, Layer, draw_rates, requires_gradient
from gdn2gen.nn.norm import GatedRMSNorm
from gdn2gen.nn.projections import Projected
from gdn2gen.runtime.head_dims import runs_here

Op = Callable[..., tuple[Tensor, Tensor | None]]

MODES: Final = ("chunk", "fused_recurrent")


class Mixer(Layer):
    """A layer that mixes tokens by a recurrence of the family:

        q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v))
        o = recurrence(q / |q|, k / |k|, v, gates of x)
        y = (RMSNorm(o) * activation(x W_g)) W_o

    A member is a subclass with its ops, its gates' projections, and `_gates`, which makes of the
    tokens what the ops take beside q, k and v. Gates are activated in the kernels where those can.
    It calls `_add_gate` and `_add_output` where flash-linear-attention's layer has these
    parameters, since an optimizer's state goes by their order.
    """

    _chunk: ClassVar[Op]
    _recurrent: ClassVar[Op | None] = None
    """The op over few tokens; without one every call goes to the op over chunks."""
    _gate_projections: ClassVar[tuple[str, ...]]
    """Names of the projections that `_gates` takes."""
    _sigmoid_projections: ClassVar[tuple[str, ...]] = ()
    """Those of them whose sigmoid it takes, for each channel."""
    _plain: ClassVar[bool] = False
    """Whether q and k are not normalised, and have no SiLU without a convolution."""
    _by_channel: ClassVar[bool] = False
    """Whether each channel decays by itself, so that the op is told what to expect of it."""
    _least_rate: ClassVar[float] = 1.0
    """exp(A_log) is drawn between this and 16."""
    expected_decay: str | None = None
    """What the op is told; see `gdn2gen.expected_decay`."""
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    o_norm: nn.Module

    def __init__(
        self,
        hidden_size: int,
        heads: Heads,
        *,
        mode: str,
        use_short_conv: bool,
        conv_size: int,
        conv_bias: bool,
        layer_idx: int | None,
        expected_decay: str | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        if expected_decay is not None:
            check_decay(expected_decay)
        self.expected_decay = expected_decay
        modes = MODES if type(self)._recurrent is not None else MODES[:1]
        if mode not in modes:
            raise InputError(f"mode must be one of {modes}, but got {mode!r}")
        self.heads = heads
        self.mode = mode
        self.use_short_conv = use_short_conv
        H, HV, K, V = heads.H, heads.HV, heads.K, heads.V
        self.q_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.k_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.v_proj = nn.Linear(hidden_size, HV * V, bias=False)
        self._add_before_convolutions()
        if use_short_conv:
            self.q_conv1d = ShortConvolution(H * K, conv_size, bias=conv_bias)
            self.k_conv1d = ShortConvolution(H * K, conv_size, bias=conv_bias)
            self.v_conv1d = ShortConvolution(HV * V, conv_size, bias=conv_bias)

    @abstractmethod
    def _gates(self, tokens: Projected) -> dict[str, Any]:
        """Arguments of both ops, made of the tokens [B, T, hidden]."""

    def _add_before_convolutions(self) -> None:
        """What flash-linear-attention's layer has between its projections and its convolutions."""

    def _add_gate(self, heads: int) -> None:
        """Rate and bias of a decay for each channel of so many heads, and the projection to it
        through V dims."""
        K, V = self.heads.K, self.heads.V
        self.f_proj = nn.Sequential(
            nn.Linear(self.hidden_size, V, bias=False), nn.Linear(V, heads * K, bias=False)
        )
        self._add_rates(heads, heads * K)

    def _add_rates(self, heads: int, decays: int) -> None:
        """Rate of so many heads, and bias of so many decays."""
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(decays, dtype=torch.float32))
        self._own_parameters()

    def _add_output(
        self, norm_eps: float, activation: str, g_proj: nn.Module | None = None
    ) -> None:
        """What comes after the recurrence: the gated norm and the projection back. `g_proj` is the
        gate's projection, by default one through V dims."""
        HV, V = self.heads.HV, self.heads.V
        self.g_proj = g_proj or nn.Sequential(
            nn.Linear(self.hidden_size, V, bias=False), nn.Linear(V, HV * V, bias=True)
        )
        self.o_norm = GatedRMSNorm(V, eps=norm_eps, activation=activation)
        self.o_proj = nn.Linear(HV * V, self.hidden_size, bias=False)

    def _reset_rates(self) -> None:
        if self._undecayed:
            draw_rates(self.A_log, self.dt_bias, self._least_rate)

    def _mix(self, batch: Batch, kept: dict[str, Tensor] | None) -> Tensor:
        heads = self.heads
        names = [x for x in self._gate_projections if x in self._sigmoid_projections]
        gates = [getattr(self, name) for name in names]
        tokens = Projected(batch.x, self._projections(), 3 if self.use_short_conv else 0, gates)
        q, k, v, tails = self._qkv(tokens, batch, kept)
        arguments = {
            "q": split(q, heads.H, heads.K),
            "k": split(k, heads.H, heads.K),
            "v": split(v, heads.HV, heads.V),
            **self._gates(tokens),
        }
        trains = requires_gradient(arguments)
        o = self._mixed(arguments, batch, kept, trains)
        if kept is not None:
            for name, tail in tails.items():
                write(kept, name, tail, trains=trains)
        y: Tensor = self.o_proj(self._normed(o, tokens).flatten(2))
        return y

    def _normed(self, o: Tensor, tokens: Projected) -> Tensor:
        """o [B, T, HV, V] through the norm and the output gate."""
        at_once = norm_of_projected(self.o_norm, o, tokens, self.g_proj)
        if at_once is not None:
            return at_once
        gate = split(tokens.by(self.g_proj), self.heads.HV, self.heads.V)
        y: Tensor = self.o_norm(o, gate)
        return y

    @property
    def recurrence(self) -> tuple[str, int, int]:
        chunk = type(self)._chunk.__name__
        op = next(x.name for x in RECURRENCES.values() if x.public.chunk == chunk)
        return op, self.heads.K, self.heads.V

    @torch.no_grad()
    def decay_of(self, x: Tensor) -> Tensor:
        made = self._gates(Projected(x, self._projections()))
        wide = torch.promote_types(x.dtype, torch.float32)
        if "g" not in made:
            return x.new_zeros(*x.shape[:2], self.heads.HV, 1, dtype=wide)
        g: Tensor = made["g"].to(wide)
        g = g[..., None] if g.dim() == 3 else g
        if not made.get("use_gate_in_kernel"):
            return g
        return activate_gate(g, self.A_log, self.dt_bias, made.get("lower_bound"))

    def _projections(self) -> list[nn.Module]:
        """Of the tokens: those that are convolved first."""
        names = ("q_proj", "k_proj", "v_proj", "g_proj", *self._gate_projections)
        return [getattr(self, name) for name in names]

    def _qkv(
        self, tokens: Projected, batch: Batch, kept: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """q, k and v, all heads beside each other; and the tails of the convolutions that the cache
        has yet to keep."""
        modules = {"q": self.q_proj, "k": self.k_proj, "v": self.v_proj}
        made = {name: tokens.by(module) for name, module in modules.items()}
        if not self.use_short_conv:
            q, k, v = made.values() if self._plain else map(functional.silu, made.values())
            return q, k, v, {}
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        names = [f"{name}_tail" for name in made]
        (q, k, v), tails = convolve_batch(convolutions, [*made.values()], names, batch, kept)
        return q, k, v, tails

    def _mixed(
        self, arguments: dict[str, Any], batch: Batch, kept: dict[str, Tensor] | None, trains: bool
    ) -> Tensor:
        """o [B, T, HV, V], and the state into the cache."""
        shared = {**arguments, "cu_seqlens": batch.cu_seqlens}
        if not self._plain:
            shared["use_qk_l2norm_in_kernel"] = True
        recurrent = type(self)._recurrent
        few = self.mode == "fused_recurrent" or (batch.single and self._steps(shared["q"]))
        if recurrent is not None and few and not trains:
            return self._step(recurrent, shared, batch, kept)
        # Promises of bounded gates are of the op over chunks alone.
        told = {"expected_decay": self.expected_decay} if self._by_channel else {}
        o, state = type(self)._chunk(
            **shared,
            **told,
            **self._chunk_options(),
            initial_state=None if kept is None else kept.get(STATE),
            output_final_state=kept is not None,
            cu_seqlens_cpu=batch.cu_seqlens_cpu,
        )
        if kept is not None and state is not None:
            write(kept, STATE, state, trains=trains)
        return o

    def _steps(self, q: Tensor) -> bool:
        """Whether one token goes to the op over few tokens: not where that would be refused."""
        recurrent: Any = type(self)._recurrent
        if recurrent is None or q.device.type != "cuda":
            return True
        return runs_here(recurrent.__name__, q.dtype, q.device, self.heads.K, self.heads.V)

    def _chunk_options(self) -> dict[str, Any]:
        """Arguments that the op over chunks takes, and the one over few tokens does not."""
        return {}

    def _step(
        self,
        recurrent: Op,
        shared: dict[str, Any],
        batch: Batch,
        kept: dict[str, Tensor] | None,
    ) -> Tensor:
        """o of a few tokens; states are read and written where they lie."""
        q = shared["q"]
        state = None
        if kept is not None:
            shape = (batch.sequences, self.heads.HV, self.heads.K, self.heads.V)
            state = in_place(kept, STATE, shape, q)
        o, _ = recurrent(**self._few(shared), state_pool=state)
        return o

    def _few(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of both ops by the names of the one over few tokens."""
        return arguments
