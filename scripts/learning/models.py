"""The mixers side by side in `gdn2gen.nn.LanguageModel`, and parts of GDN-2 alone.

All have the same width, depth and size of state. Mamba's layers have `expand` times the width in
heads of P channels, and as many channels N as make their state as large as that of the others.

    gdn2-erase    the erase gate alone: b for each channel, w one number a head
    gdn2-write    the write gate alone: w for each channel, b one number a head
    gdn2-untied   b and w one number a head each
    gdn2-tied     one number a head is both, as KDA has it

All four run GDN-2's kernels, with its decay. `fla:gdn2` and its like are flash-linear-attention's
layers in the same blocks, from the same weights; `mamba_ssm:mamba2` and its like are ours on
mamba_ssm's op (`mamba_peers.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from gdn2gen.base.errors import UnsupportedError
from gdn2gen.nn import Cache, GatedDeltaNet2, LanguageModel
from gdn2gen.nn.projections import Projected
from learning.mamba_peers import TheirMamba2, TheirMamba3

MIXERS: Final = ("gdn2", "kda", "gated_delta_rule", "mamba2", "mamba3")
ABLATIONS: Final = ("gdn2-erase", "gdn2-write", "gdn2-untied", "gdn2-tied")
PEERS: Final = (
    "fla:gdn2", "fla:kda", "fla:gated_delta_rule", "mamba_ssm:mamba2", "mamba_ssm:mamba3",
)  # fmt: skip
TITLES: Final = {
    "gdn2": "Gated DeltaNet-2",
    "kda": "KDA",
    "gated_delta_rule": "Gated DeltaNet",
    "mamba2": "Mamba-2",
    "mamba3": "Mamba-3",
    "gdn2-erase": "erase gate alone",
    "gdn2-write": "write gate alone",
    "gdn2-untied": "one number each",
    "gdn2-tied": "tied",
    "fla:gdn2": "Gated DeltaNet-2, FLA's layer",
    "fla:kda": "KDA, FLA's layer",
    "fla:gated_delta_rule": "Gated DeltaNet, FLA's layer",
    "mamba_ssm:mamba2": "Mamba-2, our layer on mamba_ssm's op",
    "mamba_ssm:mamba3": "Mamba-3, our layer on mamba_ssm's op",
}
_THEIRS: Final = {
    "gdn2": ("fla.layers.gdn2", "GatedDeltaNet2"),
    "kda": ("fla.layers.kda", "KimiDeltaAttention"),
    "gated_delta_rule": ("fla.layers.gated_deltanet", "GatedDeltaNet"),
}


@dataclass(frozen=True)
class Sizes:
    """Of a model, whatever its mixer is."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    head_dim: int
    inner: int | None = None
    """Of the SwiGLU; None for what `LanguageModel` takes."""
    expand: float = 1.0
    """Of Mamba's layers."""
    mamba_head_dim: int = 64
    window: int | None = None
    """Of the attention in every other block, where there is any."""

    @property
    def state(self) -> int:
        """Numbers that a layer keeps of a sequence, but for Mamba-3's and the convolutions' last
        tokens."""
        return self.heads * self.head_dim**2


def build(name: str, sizes: Sizes, seed: int) -> LanguageModel:
    """A model on the CPU, its weights drawn from `seed`.

    Raises UnsupportedError for a peer that cannot be imported.
    """
    torch.manual_seed(seed)
    member = member_of(name)
    if name.startswith("mamba_ssm:"):
        return _model(_ON_MAMBA_SSM[member], sizes, _options(member, sizes))
    ours = _model(member, sizes)
    if name == member:
        return ours
    theirs = _model(partial(Theirs, member=member), sizes, _options(member, sizes))
    # attention between them is ours on both sides
    wrapped = [f"{x}." for x, part in theirs.named_modules() if isinstance(part, Theirs)]
    weights = {}
    for name, x in ours.state_dict().items():
        inside = next((y for y in wrapped if name.startswith(y)), None)
        weights[name if inside is None else f"{inside}layer.{name.removeprefix(inside)}"] = x
    theirs.load_state_dict(weights)
    return theirs


def member_of(name: str) -> str:
    """The mixer of a model, ours or a peer's."""
    return name.rpartition(":")[2]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def with_parameters(name: str, sizes: Sizes, wanted: int, step: int = 8) -> Sizes:
    """`sizes` with the SwiGLU so wide, in steps of `step` channels, that the model has as near as
    may be `wanted` parameters: each channel is three vectors a layer."""
    member = member_of(name)
    with torch.device("meta"):
        least = parameters(_model(member, replace(sizes, inner=step)))
    steps = max(0, round((wanted - least) / (3 * sizes.hidden * sizes.layers * step)))
    return replace(sizes, inner=step * (1 + steps))


def _model(
    mixer: str | Callable[..., nn.Module], sizes: Sizes, options: dict[str, Any] | None = None
) -> LanguageModel:
    if options is None:
        assert isinstance(mixer, str)
        options = _options(mixer, sizes)
    return LanguageModel(
        sizes.vocabulary,
        hidden_size=sizes.hidden,
        num_layers=sizes.layers,
        mixer=_ABLATED.get(mixer, mixer) if isinstance(mixer, str) else mixer,
        inner=sizes.inner,
        window=sizes.window,
        **options,
    )


def _options(mixer: str, sizes: Sizes) -> dict[str, Any]:
    if not mixer.startswith("mamba"):
        return {"num_heads": sizes.heads, "head_dim": sizes.head_dim, "expand_v": 1.0}
    state, rest = divmod(sizes.state, round(sizes.expand * sizes.hidden))
    if rest:
        raise ValueError(f"no size of Mamba's state makes it {sizes.state} numbers: {sizes}")
    return {
        "head_dim": sizes.mamba_head_dim,
        "expand": sizes.expand,
        "state_size": state,
    }


class Ablated(GatedDeltaNet2):
    """GDN-2 of whose gates some are one number a head."""

    numbers: ClassVar[tuple[str, ...]]
    """Which: b_proj, w_proj."""
    tied: ClassVar[bool] = False

    def __init__(self, hidden_size: int, **options: Any) -> None:
        super().__init__(hidden_size, **options)
        for name in self.numbers:
            setattr(self, name, nn.Linear(hidden_size, self.heads.H, bias=False))
        if self.tied:
            del self.w_proj

    def _gates(self, tokens: Projected) -> dict[str, Any]:
        heads = self.heads
        b = self._gate(tokens, "b_proj", heads.K)
        return {
            "g": torch.unflatten(tokens.by(self.f_proj), -1, (heads.H, heads.K)),
            "b": b,
            # K = V here
            "w": b if self.tied else self._gate(tokens, "w_proj", heads.V),
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "use_gate_in_kernel": True,
        }

    def _gate(self, tokens: Projected, name: str, dim: int) -> Tensor:
        made = tokens.sigmoid(getattr(self, name))
        if name not in self.numbers:
            return torch.unflatten(made, -1, (self.heads.H, dim))
        return made[..., None].expand(*made.shape, dim).contiguous()


class EraseAlone(Ablated):
    numbers = ("w_proj",)


class WriteAlone(Ablated):
    numbers = ("b_proj",)


class Untied(Ablated):
    numbers = ("b_proj", "w_proj")


class Tied(Ablated):
    numbers = ("b_proj",)
    tied = True
    _gate_projections = ("f_proj", "b_proj")


_ABLATED: Final[dict[str, type[Ablated]]] = dict(
    zip(ABLATIONS, (EraseAlone, WriteAlone, Untied, Tied), strict=True)
)


_ON_MAMBA_SSM: Final = {"mamba2": TheirMamba2, "mamba3": TheirMamba3}


class Theirs(nn.Module):
    """flash-linear-attention's layer, called as ours are."""

    def __init__(
        self, hidden_size: int, *, member: str, layer_idx: int, norm_eps: float, **options: Any
    ) -> None:
        super().__init__()
        module, name = _THEIRS[member]
        try:
            make = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UnsupportedError(
                f"{module}.{name} cannot be imported ({error}): pip install "
                f"flash-linear-attention, or leave fla:{member} out"
            ) from error
        self.layer = make(
            hidden_size=hidden_size, layer_idx=layer_idx, norm_eps=norm_eps, **options
        )

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        if cache is None:
            y: Tensor = self.layer(x)[0]
            return y
        kept = cache.of_layer(self.layer.layer_idx, x.shape[0])
        y = self.layer(x, past_key_values=_Past(kept), use_cache=True)[0]
        return y


class _Past:
    """What its layers take for their cache, of one layer, kept in ours.

    A layer returns its state in a new tensor. That one is kept, but for a graph, which has to find
    it where it was: there it is copied, as a model on its layers would have to do.
    """

    def __init__(self, kept: dict[str, Tensor]) -> None:
        self._kept = kept

    def __len__(self) -> int:
        """More than the number of any layer that is in here."""
        return sys.maxsize if self._kept else 0

    def __getitem__(self, _: int) -> dict[str, Any]:
        tails = [x for name, x in self._kept.items() if name.startswith("tail")]
        return {"recurrent_state": self._kept["state"], "conv_state": tuple(tails) or None}

    def update(
        self,
        *,
        recurrent_state: Tensor,
        conv_state: tuple[Tensor, ...] | None = None,
        **_: Any,
    ) -> None:
        new = {"state": recurrent_state}
        new |= {f"tail{place}": x for place, x in enumerate(conv_state or ())}
        capturing = recurrent_state.is_cuda and torch.cuda.is_current_stream_capturing()
        for name, x in new.items():
            if not capturing:
                self._kept[name] = x
            elif x is not self._kept[name]:
                self._kept[name].copy_(x)
