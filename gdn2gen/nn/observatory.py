"""What becomes of a model's kernels in training: gradients, states, and the decay of its gates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from gdn2gen.base.decay import WEAK
from gdn2gen.base.errors import InputError
from gdn2gen.family.decays import LEVELS, DecayPattern, Quantiles
from gdn2gen.family.registry import CHANNEL_OPS
from gdn2gen.family.strength import strength_of, strong_share
from gdn2gen.nn.cache import Cache
from gdn2gen.nn.layer import Layer
from gdn2gen.nn.mixer import Mixer

GROUPS: Final = 8
"""Of channels of a head, by how much they forget."""
LARGEST: Final = 65504.0
"""Of fp16, in which kernels of such inputs take a state into their products."""


@dataclass(frozen=True)
class Sighting:
    """What was seen after one step."""

    step: int
    alarms: tuple[str, ...]
    """What is not finite, or too large; empty where all is well."""
    gradient: float
    """The norm of all gradients; 0 where there are none."""
    states: tuple[float, ...]
    """The largest value that each layer hands on to later tokens."""
    decays: tuple[tuple[Quantiles, ...], ...]
    """Of each layer and head, over tokens and channels: decays in nats at `LEVELS`."""
    strong: tuple[float, ...] = ()
    """Of each layer: the part of its heads' chunks of 32 tokens in which a channel loses more than
    2^-96, which is what kernels take time for; 0 where the decay is no channel's."""


class Observatory:
    """Looks at a model in training every so many steps.

        observatory = Observatory(model, every=100)
        for step, (tokens, targets) in enumerate(batches):
            model(tokens, targets=targets).backward()
            sighting = observatory.look(step, tokens)
            if sighting and sighting.alarms: ...
            optimizer.step() ...
        observatory.pattern().save("gates.json")    # gdn2gen verify --pattern gates.json

    Gates that learn to recall come to forget some channels at once, which other kernels are faster
    for. A training loop says so where it is seen:

            if sighting:
                observatory.expect()       # every layer is told `observatory.decay(place)`

    A look is a forward of its own, without gradients and as in `model.eval()`, that keeps what the
    layers would keep for later tokens; it changes nothing of the training, and the host waits for
    it.

    Args:
        model: a `LanguageModel`, or what is called with tokens and `cache` as it is; its layers are
            those of `gdn2gen.nn`, or of their base, `nn.layer.Layer`.
        every: steps from one look to the next.
        largest: what a state may be.
        tokens: how many are looked at, of the first sequences.

    Raises:
        InputError: no such layer, or numbers below 1.
    """

    def __init__(
        self, model: nn.Module, *, every: int = 100, largest: float = LARGEST, tokens: int = 8192
    ) -> None:
        for name, value in (("every", every), ("largest", largest), ("tokens", tokens)):
            if not value >= 1:
                raise InputError(f"{name} must be at least 1, but got {value}")
        self.model = model
        self.every = every
        self.largest = largest
        self.tokens = tokens
        self.layers = [x for x in model.modules() if isinstance(x, Layer)]
        if not self.layers:
            raise InputError(
                f"{type(model).__name__} has no layer of gdn2gen.nn whose state decays"
            )
        self.sightings: list[Sighting] = []
        self._groups: list[list[list[Quantiles]]] = []

    def look(self, step: int, tokens: Tensor) -> Sighting | None:
        """What there is to see after `step` with the batch [B, T]; None where none is due."""
        return None if step % self.every else self.look_now(step, tokens)

    @torch.no_grad()
    def look_now(self, step: int, tokens: Tensor) -> Sighting:
        """The same, at any step. Raises InputError where there are no tokens, or a layer was not
        called with them."""
        if tokens.dim() < 2 or tokens.numel() == 0:
            raise InputError(
                f"tokens must be [B, T] with one token at least, but got {tuple(tokens.shape)}"
            )
        rows = tokens[: max(1, self.tokens // max(1, tokens.shape[1]))]
        cache, seen = Cache(rows.shape[0]), dict[int, tuple[Tensor, Tensor]]()
        with self._listening(seen), _evaluating(self.model):
            self.model(rows, cache=cache)
        self._check_called(seen)
        found = [seen[place][0].tolist() for place in range(len(self.layers))]
        shares = torch.stack([seen[place][1].cpu() for place in range(len(self.layers))])
        groups = [[head[1:] for head in layer] for layer in found]
        kept = [cache.layer(index) for index in sorted(cache.layers)]
        states = torch.stack([_largest(x) for x in kept]).tolist() if kept else []
        sighting = Sighting(
            step,
            tuple(self._alarms(states, groups)),
            self._gradient(),
            tuple(states),
            tuple(tuple(tuple(head[0]) for head in layer) for layer in found),
            tuple(shares.tolist()),
        )
        self._groups = groups
        self.sightings.append(sighting)
        return sighting

    def pattern(self, name: str = "trained") -> DecayPattern:
        """The decay that was seen last.

        Raises InputError where nothing was seen, it is not finite, or layers are of several
        recurrences or sizes.
        """
        if not self._groups:
            raise InputError("nothing was seen yet: call look_now, or look after every step")
        numbers = (x for layer in self._groups for head in layer for group in head for x in group)
        if not all(map(math.isfinite, numbers)):
            raise InputError("the decay that was seen last is not finite, and nothing to draw from")
        kinds = {x.recurrence for x in self.layers}
        if len(kinds) > 1:
            raise InputError(f"a pattern is of one recurrence at one K and V, but got {kinds}")
        ((op, K, V),) = kinds
        layers = tuple(
            tuple(tuple(tuple(group) for group in head) for head in layer) for layer in self._groups
        )
        return DecayPattern(name, op, K, V, layers)

    def decay(self, place: int | None = None) -> str:
        """`weak` or `strong`, as a layer's decay was seen last, by its place among `layers`; of all
        layers together if None. For `expected_decay`, of the layers or of the process.

        Strong from a tenth of all chunks on (`Sighting.strong`; `family.strength` has the times
        that this is from). Of the model's layers those count whose channels decay by themselves; a
        model that has none is weak. Raises InputError where nothing was seen.
        """
        if not self.sightings:
            raise InputError("nothing was seen yet: call look_now, or look after every step")
        shares = self.sightings[-1].strong
        if place is not None:
            return strength_of(shares[place])
        counted = [x for x, y in zip(shares, self.layers, strict=True) if _by_channel(y)]
        return strength_of(sum(counted) / len(counted)) if counted else WEAK

    def expect(self) -> None:
        """Tell each layer what was seen of its decay last, as its attribute `expected_decay`: its
        later calls run the kernels that are fastest under it, on this process. Ranks that are to
        run the same kernels have to be told the same: see one rank's `decay`, and set the attribute
        everywhere.
        """
        for place, layer in enumerate(self.layers):
            if isinstance(layer, Mixer) and _by_channel(layer):
                layer.expected_decay = self.decay(place)

    @contextmanager
    def _listening(self, seen: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Inside, quantiles of each layer's decay come in as it is called, and how much of it is
        strong."""

        def listen(place: int) -> Any:
            def hook(layer: Layer, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
                decay = layer.decay_of(given[0] if given else named["x"])
                zero = torch.zeros((), dtype=torch.float64)
                share = strong_share(decay) if _by_channel(layer) else zero
                seen[place] = _quantiles(decay), share

            return hook

        handles = [
            layer.register_forward_pre_hook(listen(place), with_kwargs=True)
            for place, layer in enumerate(self.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_called(self, seen: dict[int, tuple[Tensor, Tensor]]) -> None:
        missed = {id(x) for place, x in enumerate(self.layers) if place not in seen}
        if missed:
            names = [name for name, x in self.model.named_modules() if id(x) in missed]
            raise InputError(
                f"the model did not call its layers {', '.join(names)} with these tokens: look at "
                "the part of it that calls all it has"
            )

    def _alarms(self, states: list[float], groups: list[list[list[Quantiles]]]) -> Iterator[str]:
        for kind, wrong in self._not_finite().items():
            if wrong:
                more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                yield f"not finite: {kind} {', '.join(wrong[:3])}{more}"
        for layer, most in enumerate(states):
            if not most <= self.largest:
                yield f"the state of layer {layer} reaches {most:.3g}, above {self.largest:.6g}"
        for layer, heads in enumerate(groups):
            if not all(math.isfinite(x) for head in heads for group in head for x in group):
                yield f"not finite: the decay of layer {self.layers[layer].layer_idx}"

    def _not_finite(self) -> dict[str, list[str]]:
        """Names of parameters that are not, and of those whose gradients are not."""
        named = dict(self.model.named_parameters())
        gradients = {name: _values(x.grad) for name, x in named.items() if x.grad is not None}
        found = {}
        for kind, tensors in (("the parameter", named), ("the gradient of", gradients)):
            fine: list[bool] = []
            if tensors:  # the host waits once
                fine = torch.stack([x.isfinite().all() for x in tensors.values()]).tolist()
            found[kind] = [name for name, ok in zip(tensors, fine, strict=True) if not ok]
        return found

    def _gradient(self) -> float:
        gradients = [_values(x.grad) for x in self.model.parameters() if x.grad is not None]
        norms = [x.float().norm() for x in gradients]
        return float(torch.stack(norms).norm()) if norms else 0.0


def _by_channel(layer: Layer) -> bool:
    return layer.recurrence[0] in CHANNEL_OPS


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is dropped, for which numbers would be drawn, nor averaged."""
    training = [x for x in model.modules() if x.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _values(gradient: Tensor) -> Tensor:
    """Its numbers; those that there are of a sparse one."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _largest(kept: dict[str, Tensor]) -> Tensor:
    """NaN where something is; 0 of nothing."""
    floats = [x for x in kept.values() if x.is_floating_point() and x.numel()]
    most = [x.abs().amax().float() for x in floats]
    return torch.stack(most).amax() if most else torch.zeros(())


def _quantiles(decay: Tensor) -> Tensor:
    """Of the decay [B, T, heads, dim]: [heads, 1 + groups, levels], of all channels, then of groups
    by their medians."""
    channels = decay.flatten(0, 1).permute(1, 2, 0).sort(-1).values  # [heads, dim, tokens]
    heads, dim, count = channels.shape
    order = channels[..., count // 2].argsort(stable=True, dim=-1)
    channels = channels.gather(1, order[..., None].expand_as(channels))
    parts = [channels.reshape(heads, n, -1).sort(-1).values for n in (1, math.gcd(dim, GROUPS))]
    return torch.cat([_at_levels(part) for part in parts], 1)


def _at_levels(values: Tensor) -> Tensor:
    """Of rising values [.., n]: the nearest ones, [.., levels]."""
    last = values.shape[-1] - 1
    places = [round(level * last) for level in LEVELS]
    return values[..., torch.tensor(places, device=values.device)]
