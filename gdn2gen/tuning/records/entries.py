"""Entries of tuned files as the tuner sees them."""

from __future__ import annotations

from gdn2gen.family.problem import Problem, gate_parameters
from gdn2gen.family.registry import OPS, recurrence_named
from gdn2gen.family.shapes import Shape
from gdn2gen.store.tuned_files import Entry


def problem_of(entry: Entry, shape: Shape) -> Problem:
    """The problem as the tuner poses it: a gate has the parameters that a layer passes."""
    key = entry.problem_key
    flags = gate_parameters(str(key["op"]), str(key["gate"]))
    return Problem(**{**key, **flags, "varlen": shape.cu_seqlens is not None})  # type: ignore[arg-type]


def words_of(entry: Entry) -> str:
    """The entry's problem: `K=128 V=128 bf16`, and what else sets it off from the plainest one."""
    key = entry.problem_key
    op = "" if key["op"] == OPS[0] else f"{key['op']} "
    words = [f"{op}K={key['K']} V={key['V']} {key['dtype']}"]
    if key["gate"] != "none":
        words.append(f"{key['gate']} gate")
    if key["gate_dtype"] != "fp32":
        words.append(f"g {key['gate_dtype']}")
    taken = recurrence_named(str(key["op"])).normalises
    return ", ".join(words if key["l2norm"] == taken else [*words, "not normalised"])
