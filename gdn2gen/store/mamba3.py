"""What a call of Mamba-3 runs, and why: its scan's recipe, and the knobs of the kernels around it.

The scan is `chunk_simple_gla`'s, found where calls of that find theirs; what is around it comes
from tuned/mamba3/parts, or from a rule on the sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gdn2gen.base.device import Device
from gdn2gen.family.mamba3_problem import MAMBA3, Mamba3Problem
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.mamba3 import (
    AROUND,
    MAMBA3_STAGES,
    MAMBA3_STEP,
    ONE_TOKEN,
    known_around,
    mamba3_knobs,
    mamba3_step_knobs,
    tile_of,
)
from gdn2gen.store.dispatch import Found, explain_recipe, find_recipe, recipe_document
from gdn2gen.store.part_files import nearest_parts
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
    scan: Found
    knobs: dict[str, dict[str, Knob]]
    """Of the kernels around the scan, and of a step of as many sequences, by stage."""
    sources: dict[str, str]
    """`tuned` or `rule`, by stage."""

    @property
    def document(self) -> dict[str, Any]:
        """For JSON."""
        around = {x: {"config": dict(y), "source": self.sources[x]} for x, y in self.knobs.items()}
        return {"op": MAMBA3, "scan": recipe_document(self.scan), "around": around}

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
        lines.append("the scan between them is chunk_simple_gla's:")
        return "\n".join([*lines, explain_recipe(self.scan, width)])


def find_mamba3(
    problem: Mamba3Problem,
    shape: Shape,
    device: Device,
    *,
    level: str = "lean",
    strict: bool | None = None,
) -> Mamba3Found:
    """What a call at `shape` runs. `level` and `strict` are those of `find_recipe`, for the scan:
    the kernels around it keep the same at either level."""
    scan = find_recipe(
        scan_problem(problem), scan_shape(shape).regime, device, level=level, strict=strict
    )
    tokens, sequences = shape.B * shape.T, shape.regime.sequences
    known = known_around(problem, shape.H, shape.key_heads)
    around = nearest_parts(MAMBA3, AROUND, known, tokens, device)
    step = nearest_parts(MAMBA3, ONE_TOKEN, known, sequences, device)
    knobs = ruled(problem, shape, device)
    sources = dict.fromkeys(knobs, "rule")
    for entry in (around, step):
        for name, found in ({} if entry is None else entry.knobs).items():
            knobs[name], sources[name] = dict(found), "tuned"
    return Mamba3Found(problem, shape, device, scan, knobs, sources)


def ruled(problem: Mamba3Problem, shape: Shape, device: Device) -> dict[str, dict[str, Knob]]:
    """Knobs of the kernels around the scan, and of a step of as many sequences, by the rule on
    sizes."""
    H, G, BT = shape.H, shape.key_heads, tile_of(problem.dtype, problem.state_size)
    tiles = -(-shape.B * shape.T // BT)
    knobs = {
        stage.name: mamba3_knobs(stage, problem, tiles, H, G, device.sms)
        for stage in MAMBA3_STAGES
        if stage is not MAMBA3_STEP
    }
    step = mamba3_step_knobs(problem, shape.regime.sequences, H, device.sms)
    return {**knobs, MAMBA3_STEP.name: step}
