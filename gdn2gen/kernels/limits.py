"""Where a kernel is to run, and what its knobs may be there."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Final

from gdn2gen.family.compiled import Compiled

Knob = int | str
Domain = tuple[Knob, ...]
# What `BT`, `arch` and fields of the problem may be, by their names.
Where = Mapping[str, Container[object]]

# Chunk sizes. BT is shared by all stages of a plan: it is the unit of the workspace between them.
CHUNKS: Final = (16, 32, 64)
# `num_stages` of loops that need not be fed as far ahead as the scans.
LOADS_AHEAD: Final = (1, 2, 3)
FP32: Final[Where] = {"dtype": ("fp32",)}
# Head dims whose tiles take twice the registers and shared memory of those of 128.
WIDE: Final = range(128 + 1, 512 + 1)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a kernel is to run: all that a form's limits and defaults may depend on."""

    problem: Compiled
    BT: int
    arch: str | None = None
    """As in `sm_90`; None where it is not known: then nothing that depends on it is refused."""
    multiple: int = 1
    """Head dims count as the next multiple of it: tiles of some languages come in such steps."""

    def __contains__(self, name: str) -> bool:
        return name in ("BT", "arch") or hasattr(self.problem, name)

    def __getitem__(self, name: str) -> object:
        """`BT`, `arch`, or a field of the problem."""
        value = getattr(self if name in ("BT", "arch") else self.problem, name)
        return rounded_up(value, self.multiple) if name in ("K", "V") else value

    def is_in(self, where: Where) -> bool:
        return all(self[name] in values for name, values in where.items())


def rounded_up(size: int, multiple: int) -> int:
    """The next multiple, or `size` where it is one."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Limit:
    """What `name`, a knob or what a `Place` knows, may only be where all of `where` holds."""

    name: str
    values: tuple[object, ...]
    why: str
    where: Where = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """Values of knobs, where all of `where` holds."""

    knobs: Mapping[str, Knob]
    where: Where = field(default_factory=dict)
