"""Knobs that a config may have beside those of its form, and says nothing of where they are off.

Searches try two of them (`tuning.space`), and without them a kernel is what it was, to the letter.
What `merge` and `reach` change is in the templates of the parallel scans (as `cut_ahead` and
`reach`), and `tile_step` is another number in others. What `pdl` and `programs` change is written
into the rendered text (`codegen._rewriting`): only with these has a kernel another digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import CHANNEL_OPS, recurrence_named
from gdn2gen.kernels.limits import Domain, Knob, Place
from gdn2gen.kernels.plans import PLANS, Plan, stages_of
from gdn2gen.kernels.slices import covering
from gdn2gen.kernels.stage import Form

OFF: Final = "off"
EXTRAS: Final[Mapping[str, Domain]] = {
    # A launch that begins before the one before it in the pass has ended (programmatic dependent
    # launch). `wait`: the stage's kernels begin as soon as all programs before them have ended or
    # said that they may, and wait for what those made. `signal`: and all say so as they begin.
    "pdl": ("wait", "signal"),
    # As many programs as run at once, each of which takes chunks until none is left.
    "programs": ("resident",),
    # Of the parallel scans: shorter steps of the chain of products over segments. `cut`: halves of
    # what is multiplied are cut, and loads are two steps ahead; `near`: one, as without the knob.
    "merge": ("cut", "near"),
    # Of the parallel scans whose decay is outside of products: fold leaves out what has decayed
    # below so many bits, and what has nothing left of a segment's start.
    "reach": (32, 64, 100),
    # In TileLang: whole head dims are in tiles as wide as the next multiple of it. Of 64 a row of
    # 160 is three copies of 128 bytes, the last of which is half zeros, and not five of 64.
    "tile_step": (32, 64),
}
AHEAD: Final[Mapping[Knob, int]] = {"cut": 2, "near": 1}
"""Steps of merge_kernel from a load to its use: of two, K = 128 takes 156 KB of shared memory."""
_SINCE: Final = 90
"""Number of the first architecture whose launches may depend on programs of others."""
_TAKE_ALL: Final = ("anchored", "bounded")
"""Forms of prepare whose programs may take chunks until none is left."""
# Members that decay by one number a head, and whose keys erase what they write.
_BOUNDED_OPS: Final = ("gated_delta_rule",)
# Programs to a multiprocessor that a TileLang kernel of so many registers a thread is made for.
RESIDENT: Final[Mapping[Knob, int]] = {0: 1, 64: 4, 80: 3, 128: 2}


def is_first(stage: str, op: str) -> bool:
    """Whether a pass of some plan that serves the recurrence begins with it."""
    return any(stage in (x.forward[0], x.backward[0]) for x in _plans(op))


def is_last(stage: str, op: str) -> bool:
    """Whether one ends with it."""
    return any(stage in (x.forward[-1], x.backward[-1]) for x in _plans(op))


def follows_tables(stage: str, problem: Problem) -> bool:
    """Whether the tables of a packed batch are made in the launch before it."""
    return problem.varlen and any(stage == x.forward[0] for x in _plans(problem.op))


def known(knobs: Mapping[str, Knob]) -> dict[str, Knob]:
    """Those of `knobs` that are extras and are on."""
    return {name: x for name, x in knobs.items() if name in EXTRAS and x != OFF}


def why_no_extra(knobs: Mapping[str, Knob], form: Form, stage: str, place: Place) -> str | None:
    """Why a config of that form cannot have the extras that it has, or None."""
    given = known(knobs)
    if "pdl" in given:
        reason = _why_no_pdl(str(given["pdl"]), stage, place)
        if reason is not None:
            return f"pdl={given['pdl']}: {reason}"
    if "programs" in given:
        reason = _why_not_resident(knobs, form, stage)
        if reason is not None:
            return f"programs={given['programs']}: {reason}"
    if "merge" in given:
        reason = _why_not_merged(form, place)
        if reason is not None:
            return f"merge={given['merge']}: {reason}"
    if "reach" in given:
        reason = _why_not_reaching(form, place)
        if reason is not None:
            return f"reach={given['reach']}: {reason}"
    if "tile_step" in given:
        reason = _why_not_tiled(form, place)
        if reason is not None:
            return f"tile_step={given['tile_step']}: {reason}"
    return None


def _why_no_pdl(value: str, stage: str, place: Place) -> str | None:
    problem = place.problem
    if not isinstance(problem, Problem) or stage not in stages_of(problem.op):
        return "only stages of plans have kernels before and after them in a pass"
    if stage.startswith("forward"):
        return "its groups begin by turns, so that none of them begins for all of the program"
    if place.arch is not None and not can_depend(place.arch):
        return f"{place.arch} has no launches that depend on programs; sm_90 and later have"
    if value == "signal" and is_last(stage, problem.op):
        return "a pass ends with it, and what comes next is not known; use pdl=wait"
    if value == "wait" and is_first(stage, problem.op):
        return "a pass begins with it, and what came before is not known; use pdl=signal"
    return None


def can_depend(arch: str) -> bool:
    """Whether launches there may depend on programs of those before."""
    return _number(arch) >= _SINCE


def _number(arch: str) -> int:
    """90 of `sm_90`; 0 of what is no such name, as a file may have it."""
    number = arch.removeprefix("sm_")
    return int(number) if number.isdecimal() else 0


def _why_not_resident(knobs: Mapping[str, Knob], form: Form, stage: str) -> str | None:
    if stage != "prepare" or form.language != "tilelang" or form.name not in _TAKE_ALL:
        return f"only prepare in TileLang has it, of decay={' or '.join(_TAKE_ALL)}"
    if knobs["chunks"] != 1:
        return f"a program takes one chunk after the other: chunks=1, not {knobs['chunks']}"
    return None


def _why_not_merged(form: Form, place: Place) -> str | None:
    if form.name != "parallel" or "M_seg" not in form.scratch:
        return "only parallel scans that make their own transitions have it"
    problem = place.problem
    if not isinstance(problem, Problem) or problem.dtype == "fp32":
        return "products of fp32 problems are of tf32"
    if covering(problem.K) != problem.K or problem.K > 128:
        return f"it is for transitions of one tile, of 128 channels at most, not {problem.K}"
    return None


def _why_not_reaching(form: Form, place: Place) -> str | None:
    if form.name != "parallel":
        return "only parallel scans fold segments"
    problem = place.problem
    if not isinstance(problem, Problem) or problem.op not in _BOUNDED_OPS:
        return f"it is for members whose steps a decay bounds: {', '.join(_BOUNDED_OPS)}"
    if not problem.l2norm:
        return "only steps of normalised keys are bounded by their decay; it wants l2norm"
    whole = all(covering(x) == x and 64 <= x <= 128 for x in (problem.K, problem.V))
    return None if whole else f"it is for K and V of 64 or 128, not {problem.K} and {problem.V}"


def _why_not_tiled(form: Form, place: Place) -> str | None:
    problem = place.problem
    old = place.arch is not None and not can_depend(place.arch)
    if form.language != "tilelang" or old:
        return "only what loads by TMA fills tiles past a head dim, in TileLang on sm_90"
    if not isinstance(problem, Problem) or problem.op not in CHANNEL_OPS:
        return f"it is for members whose decay is a channel's: {', '.join(CHANNEL_OPS)}"
    return None


def _plans(op: str) -> list[Plan]:
    return [PLANS[x] for x in recurrence_named(op).plans]
