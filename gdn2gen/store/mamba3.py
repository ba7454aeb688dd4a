"""What a call of Mamba-3 runs, and why: the knobs of its kernels over chunks, or its scan's recipe
and those of the kernels around it.

Knobs come from tuned/mamba3/parts, or from a rule on the sizes; the scan is `chunk_simple_gla`'s,
found where calls of that find theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gdn2gen.base.device import Device
from gdn2gen.base.errors import DispatchError
from gdn2gen.family.mamba3_problem import MAMBA3, Mamba3Problem
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.mamba3 import (
    AROUND,
    MAMBA3_AROUND,
    MAMBA3_STEP,
    ONE_TOKEN,
    known_around,
    mamba3_knobs,
    mamba3_step_knobs,
    tile_of,
)
from gdn2gen.kernels.mamba3_chunks import (
    CHUNKS,
    MAMBA3_CHUNK_STAGES,
    MAMBA3_TURNS,
    by_chunks,
    chunk_knobs,
    chunk_of,
)
from gdn2gen.kernels.mamba3_reverse_scan import REVERSE, reverse_rule, reverse_scans_at_once
from gdn2gen.kernels.plans import LEVELS
from gdn2gen.store.dispatch import Found, explain_recipe, find_recipe, recipe_document
from gdn2gen.store.part_files import PartEntry, nearest_parts, tuned_parts
from gdn2gen.store.verified import Place, is_verified


def scan_problem(problem: Mamba3Problem) -> Problem:
    """The problem of the calls of `chunk_simple_gla` that Mamba-3 makes."""
    return Problem(
        "simple_gla",
        problem.K,
        problem.V,
        problem.dtype,
        state_v_first=True,
        varlen=problem.packed,
        initial_state=problem.carried,
        final_state=problem.carried,
    )


def scan_shape(shape: Shape) -> Shape:
    """The sizes of those calls: q and k are each head's own."""
    return replace(shape, name=f"{shape.B}x{shape.T}x{shape.H}", groups=None)


@dataclass(frozen=True)
class Mamba3Found:
    """The kernels of a call."""

    problem: Mamba3Problem
    shape: Shape
    device: Device
    scan: Found | None
    """None where kernels of its own go over chunks."""
    knobs: dict[str, dict[str, Knob]]
    """Of its own kernels, and of a step of as many sequences, by stage."""
    sources: dict[str, str]
    """`tuned`, `transferred` from another GPU of the architecture, or `rule`; by stage."""

    def __str__(self) -> str:
        """What `gdn2gen explain` prints of it."""
        return self.words(100)

    @property
    def document(self) -> dict[str, Any]:
        """For JSON."""
        own = {x: {"config": dict(y), "source": self.sources[x]} for x, y in self.knobs.items()}
        if self.scan is None:
            return {"op": MAMBA3, "kernels": own}
        return {"op": MAMBA3, "scan": recipe_document(self.scan), "around": own}

    def words(self, width: int) -> str:
        """For people."""
        lines = [
            f"{stage}: {' '.join(f'{x}={y}' for x, y in knobs.items())} ({self.sources[stage]})"
            for stage, knobs in self.knobs.items()
        ]
        place = Place.of(self.problem)
        if not is_verified(*place, self.device.arch):
            lines.append(
                f"not verified on {self.device.arch}: a call is refused without "
                f"GDN2GEN_UNVERIFIED=1; `{place.command}` there"
            )
        dims = f"--head-dim {self.problem.K},{self.problem.V} --dtype {self.problem.dtype}"
        lines.append(
            f"tune on {self.device.name}: gdn2gen tune --op {MAMBA3} {dims} --shapes "
            f"{self.shape.name}"
        )
        if self.scan is not None:
            lines.append("the scan between them is chunk_simple_gla's:")
            lines.append(explain_recipe(self.scan, width))
        return "\n".join(lines)


def find_mamba3(
    problem: Mamba3Problem,
    shape: Shape,
    device: Device,
    *,
    level: str = "lean",
    strict: bool | None = None,
    kind: str | None = None,
) -> Mamba3Found:
    """What a call at `shape` runs. `level` and `strict` are those of `find_recipe`, for the scan:
    all other kernels are the same at either level. `kind`: `AROUND` or `CHUNKS`, whatever calls in
    this dtype run."""
    scan = None
    usual = CHUNKS if by_chunks(problem.dtype) else AROUND
    if (kind or usual) == AROUND:
        scan = find_recipe(
            scan_problem(problem), scan_shape(shape).regime, device, level=level, strict=strict
        )
    elif level not in LEVELS:
        raise DispatchError(f"level must be one of {', '.join(LEVELS)}, but got {level!r}")
    tokens, sequences = shape.B * shape.T, shape.regime.sequences
    known = known_around(problem, shape.H, shape.key_heads)
    # packages have stages over chunks alone
    at_once = None if kind or scan else _reverse(problem, shape, known, device)
    kind = AROUND if scan else CHUNKS
    tiled = nearest_parts(MAMBA3, kind, known, tokens, device)
    step = nearest_parts(MAMBA3, ONE_TOKEN, known, sequences, device)
    knobs = ruled(problem, shape, device, kind)
    sources = dict.fromkeys(knobs, "rule")
    for of, count, entry in (
        (kind, tokens, tiled),
        (REVERSE, tokens, at_once),
        (ONE_TOKEN, sequences, step),
    ):
        if entry is None:
            continue
        own = tuned_parts(MAMBA3, of, known, count, device) is entry
        for name, found in entry.knobs.items():
            knobs[name], sources[name] = dict(found), "tuned" if own else "transferred"
    return Mamba3Found(problem, shape, device, scan, knobs, sources)


def _reverse(
    problem: Mamba3Problem, shape: Shape, known: Mapping[str, str | int], device: Device
) -> PartEntry | None:
    """The entry by which a call's backward has its products in one stage, if it has."""
    if shape.cu_seqlens is not None or not reverse_scans_at_once(problem, 64, shape.T):
        return None
    return nearest_parts(MAMBA3, REVERSE, known, shape.B * shape.T, device)


def ruled(
    problem: Mamba3Problem, shape: Shape, device: Device, kind: str
) -> dict[str, dict[str, Knob]]:
    """Knobs of the kernels of a kind, `AROUND`, `CHUNKS` or `REVERSE`, and of a step of as many
    sequences, by the rules on sizes."""
    H, G, around = shape.H, shape.key_heads, kind == AROUND
    if kind == REVERSE:
        return reverse_rule(shape.B * shape.T, H, G, device.sms)
    BT = (tile_of if around else chunk_of)(problem.dtype, problem.state_size)
    tiles, by_rule = -(-shape.B * shape.T // BT), mamba3_knobs if around else chunk_knobs
    knobs = {
        stage.name: by_rule(stage, problem, tiles, H, G, device.sms)
        for stage in (MAMBA3_AROUND if around else MAMBA3_CHUNK_STAGES)
        if stage is not MAMBA3_TURNS or problem.rotated
    }
    step = mamba3_step_knobs(problem, shape.regime.sequences, H, device.sms)
    return {**knobs, MAMBA3_STEP.name: step}
