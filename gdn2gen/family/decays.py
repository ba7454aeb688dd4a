"""Decays that trained gates had, on file: a pattern that inputs are drawn from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from gdn2gen.base.decay import STRONG, WEAK
from gdn2gen.base.errors import InputError
from gdn2gen.base.files import replace_file
from gdn2gen.family.registry import OPS

LEVELS: Final = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
"""The parts of all tokens that lie below a quantile."""
SCHEMA: Final = 1

LAYER: Final = "layer"
"""Of `inputs.PATTERNS`: what a layer has as it is drawn."""
PATTERN_UNDER: Final[Mapping[str, str]] = {WEAK: LAYER, STRONG: "strong"}
"""Of `inputs.PATTERNS`: what kernels are timed under for calls that expect such a decay."""

Quantiles = tuple[float, ...]
"""Decays in natural log, <= 0, at `LEVELS`: from the strongest to the weakest."""


@dataclass(frozen=True)
class DecayPattern:
    """The decay of the heads of a trained model.

    Channels of a head go in groups, from those that forget most to those that forget least, since
    one head has both; a decay of one number a head is one group. Within a group a token's decay is
    drawn by itself: how one token's follows from the last one's is not kept.
    """

    name: str
    """What it is called where cases are listed."""
    op: str
    """The recurrence that had it."""
    K: int
    V: int
    layers: tuple[tuple[tuple[Quantiles, ...], ...], ...]
    """Layers, heads, groups of channels."""

    @property
    def heads(self) -> tuple[tuple[Quantiles, ...], ...]:
        """Of all layers."""
        return tuple(head for layer in self.layers for head in layer)

    def save(self, path: Path | str) -> None:
        """Write it for `gdn2gen verify --pattern`, in place of what was there."""
        replace_file(path, json.dumps({"schema": SCHEMA, **asdict(self)}) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> DecayPattern:
        """Raises InputError for what `save` did not write, and OSError where nothing is."""
        raw = Path(path).read_bytes()
        try:
            found = json.loads(raw)
            if found.pop("schema") != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}")
            pattern = cls(**{**found, "layers": _tuples(found["layers"])})
            _check(pattern)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is no pattern of decay ({error}); gdn2gen.nn.Observatory.pattern().save "
                "writes them"
            ) from error
        return pattern


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


def _check(pattern: DecayPattern) -> None:
    """Raise ValueError for what cannot be drawn from."""
    if pattern.op not in OPS or not isinstance(pattern.name, str):
        raise ValueError(f"op must be one of {OPS}, but is {pattern.op!r}")
    if not (type(pattern.K) is type(pattern.V) is int and min(pattern.K, pattern.V) >= 1):
        raise ValueError(
            f"K and V must be whole numbers from 1 on, but are {pattern.K!r}, {pattern.V!r}"
        )
    if not pattern.heads or not all(pattern.heads):
        raise ValueError("it has no head, or one without channels")
    for quantiles in (group for head in pattern.heads for group in head):
        numbers = len(quantiles) == len(LEVELS) and all(map(math.isfinite, quantiles))
        if not numbers or sorted(quantiles) != [*quantiles] or quantiles[-1] > 0:
            raise ValueError(
                f"quantiles must be {len(LEVELS)} rising numbers <= 0, but are {quantiles}"
            )


Drawn = str | DecayPattern
"""What inputs are drawn by: one of `inputs.PATTERNS`, or what was seen of a model."""


def name_of(pattern: Drawn) -> str:
    """What it is called where figures are filed."""
    return pattern if isinstance(pattern, str) else pattern.name
