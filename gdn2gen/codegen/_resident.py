"""prepare in TileLang with as many programs as run at once: its text with another grid.

A program has a head, and takes every `n_slots`th chunk of it, of all sequences, until none is left.
Which sequence a chunk is of takes a product and no division: of six loads each would divide, 40
instructions before it begins. In a variable that is assigned in the loop it could not be kept:
TileLang 0.1.15 assigns it in the warps that compute alone, and those that load read what it was.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from gdn2gen.base.errors import TemplateError
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.extras import RESIDENT


class _Edit(NamedTuple):
    """A place in the text, once and no more, and what stands there then."""

    pattern: str
    text: str


_SLOTS: Final = '''def slots(n_chunks, heads):
    """Programs for each head, so that all of them run at once on the present GPU."""
    return min(n_chunks, max(1, PROGRAMS * multiprocessors(torch.cuda.current_device()) // heads))


@cache
def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


'''
_RECIPROCAL: Final = '''def reciprocal_of(n_chunks, n_all):
    """2^44 / n_chunks, rounded up: times one of n_all chunks it says which sequence that is of."""
    found = -(-(2**44) // n_chunks)
    if n_all * (found * n_chunks - 2**44) >= 2**44:
        raise OverflowError(f"{n_all} chunks in sequences of {n_chunks}: too many to be told apart")
    return found


'''
_COMMON: Final = (
    _Edit(
        r"One program per CHUNKS chunks and value head\.",
        "Each program takes chunks until none is left.",
    ),
    _Edit(r"(from functools import cache\n\n)", r"\1import torch\n"),
    _Edit(r"(?m)^BT, CHUNKS = (\d+), 1$", r"BT = \1\nPROGRAMS = {programs}  # to a multiprocessor"),
    _Edit(r"( {8}lower_bound: tile\.float32,\n)", r"\1        n_slots: tile.int32,\n"),
    _Edit(r"(compiled\(\)\(\n[^()]*lower_bound)\n", r"\1,\n        slots(n_chunks, HV),\n"),
    _Edit(r"(?m)^(def launch\()$", _SLOTS + r"\1"),
    _Edit(r"Launch one program per CHUNKS chunks and value head on", "Launch the program on"),
)
_DENSE: Final = (
    _Edit(
        r"with tile\.Kernel\(\n.*CHUNKS\), HV, B, (threads=\d+)\n *\) as \(i_x, i_h, i_b\):\n",
        r"with tile.Kernel(n_slots, HV, \1) as (i_x, i_h):\n",
    ),
    _Edit(r" +i_first = i_x \* CHUNKS\n", ""),
    _Edit(r"( {8}n_slots: tile\.int32,\n)", r"\1        reciprocal: tile.int64,\n"),
    _Edit(r"(slots\(n_chunks, HV\)),\n", r"\1, reciprocal_of(-(-T // BT), n_chunks),\n"),
    _Edit(r"(?m)^(def launch\()$", _RECIPROCAL + r"\1"),
    _Edit(
        r"tile\.Pipelined\(\n.*CHUNKS, n_chunks - i_first\), (num_stages=\d)\n *\):\n"
        r"( +)i_c = .*\n *i_row = .*\n",
        r"tile.Pipelined(tile.ceildiv(NT - i_x, n_slots), \1):\n"
        r"\2i_c = i_x + i_n * n_slots\n"
        r"\2# i_c // n_chunks, for reciprocal is 2^44 / n_chunks, rounded up\n"
        r'\2i_b = tile.cast(tile.cast(i_c, "int64") * reciprocal >> 44, "int32")\n'
        r"\2i_row = (i_c - i_b * n_chunks) * BT\n",
    ),
)
_PACKED: Final = (
    _Edit(
        r"with tile\.Kernel\(\n.*CHUNKS\), HV, (threads=\d+)\n *\) as \(i_x, i_h\):\n",
        r"with tile.Kernel(n_slots, HV, \1) as (i_x, i_h):\n",
    ),
    _Edit(r" +i_first = i_x \* CHUNKS\n *n_own = .*\n", ""),
    _Edit(
        r"tile\.Pipelined\(\n.*n_own, n_chunks - i_first\), (num_stages=\d)\n *\):\n( +)i_c = .*\n",
        r"tile.Pipelined(tile.ceildiv(NT - i_x, n_slots), \1):\n\2i_c = i_x + i_n * n_slots\n",
    ),
)
WRITTEN: Final = repr((_COMMON, _DENSE, _PACKED, dict(RESIDENT)))
"""All that is written into a text, and where, for digests."""
# Where all of a module is one kernel.
_ALONE: Final = _COMMON[-1].pattern


def resident(source: str, problem: Problem, config: Config) -> str:
    """The text of prepare with programs that take chunks until none is left."""
    for edit in (*_COMMON, *(_PACKED if problem.varlen else _DENSE)):
        text = edit.text.replace("{programs}", str(RESIDENT[config["maxnreg"]]))
        source, count = re.subn(edit.pattern, text, source)
        if count != 1 and not (count == 0 and edit.pattern == _ALONE):
            raise TemplateError(
                f"prepare's text has {count} places, not one, that read {edit.pattern!r}"
            )
    return source
