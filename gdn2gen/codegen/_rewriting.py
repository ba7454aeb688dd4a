"""What `pdl` and `programs` change in a rendered text; without them it is what templates say.

The first is written into every kernel of a pass, where it begins and where it is launched, and the
second replaces the grid of one: templates would say either by conditions everywhere. What concerns
a kernel alone, as `merge` and `reach` of the parallel scans do, is in its template.
"""

from __future__ import annotations

import hashlib
from typing import Final

from gdn2gen.codegen import _dependent, _resident
from gdn2gen.family.compiled import Compiled
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.extras import follows_tables, is_first, known

# What each writes, and no code or comment beside it: entries on file name its digest.
_WRITTEN: Final = {"pdl": _dependent.WRITTEN, "programs": _resident.WRITTEN}


def rewritten(source: str, problem: Compiled, config: Config) -> str:
    """The text of a stage with its config's extras."""
    extras = known(config)
    if not {"pdl", "programs"} & {*extras}:
        return source
    assert isinstance(problem, Problem)
    if "programs" in extras:
        source = _resident.resident(source, problem, config)
    if "pdl" in extras:
        stage = config.stage
        first = is_first(stage, problem.op) and not follows_tables(stage, problem)
        source = _dependent.dependent(source, first=first, says=extras["pdl"] == "signal")
    return source


def with_extras(digest: str, config: Config) -> str:
    """The digest of a template, and of what is written into its text for this config."""
    written = [text for name, text in _WRITTEN.items() if name in known(config)]
    if not written:
        return digest
    return hashlib.sha256("".join([digest, *written]).encode()).hexdigest()[:16]
