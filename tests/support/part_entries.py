"""Entries on file of kernels that are in no plan, those of Mamba-3, as a search files them."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gdn2gen.base.device import named_device
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.shapes import NAMED_SHAPES, Shape
from gdn2gen.kernels.mamba3 import AROUND, MAMBA3_STEP, ONE_TOKEN, known_around
from gdn2gen.store.mamba3 import ruled
from gdn2gen.store.part_files import PartEntry, part_digest

H200 = named_device("H200")
SHAPE = NAMED_SHAPES["mamba4k"]
PROBLEM = Mamba3Problem(skip=True, gate=True)
STEP_SHAPE: Final = Shape("64x1x64", 64, 1, 64, groups=1)
RULE: Final = ruled(PROBLEM, SHAPE, H200, AROUND)
RULE |= {MAMBA3_STEP.name: ruled(PROBLEM, STEP_SHAPE, H200, AROUND)[MAMBA3_STEP.name]}


def entry(ms: float = 1.0, kind: str = AROUND, **knobs: int) -> PartEntry:
    """Of the rule's knobs and these, which took so long a kernel; on file with its digests."""
    stages = [x for x in RULE if (x == MAMBA3_STEP.name) == (kind == ONE_TOKEN)]
    made = PartEntry(
        kind=kind,
        at=known_around(PROBLEM, SHAPE.H, SHAPE.key_heads),
        tokens=64 if kind == ONE_TOKEN else SHAPE.B * SHAPE.T,
        knobs={x: {**RULE[x], **knobs} for x in stages},
        templates={},
        measured={x: {"ms": ms, "default_ms": 1.5} for x in stages},
        errors={"out": 1e-3, "dQ": 2e-3},
    )
    return replace(made, templates={x: part_digest(x, made) for x in stages})
