"""What a config's extras change in a rendered text; without extras it is what it was.

Templates would say the same by conditions, each of which changes the digests of all that is tuned.
"""

from __future__ import annotations

import hashlib
import inspect
from functools import cache
from types import ModuleType

from gdn2gen.codegen import _dependent, _merging, _reaching, _resident
from gdn2gen.codegen._dependent import dependent
from gdn2gen.codegen._merging import merging
from gdn2gen.codegen._reaching import reaching
from gdn2gen.codegen._resident import resident
from gdn2gen.family.compiled import Compiled
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.extras import AHEAD, follows_tables, is_first, known


def rewritten(source: str, problem: Compiled, config: Config) -> str:
    """The text of a stage with its config's extras."""
    extras = known(config)
    if not extras:
        return source
    assert isinstance(problem, Problem)
    if "programs" in extras:
        source = resident(source, problem, config)
    if "merge" in extras:
        source = merging(source, AHEAD[extras["merge"]])
    if "reach" in extras:
        source = reaching(source, int(extras["reach"]))
    if "pdl" in extras:
        stage = config.stage
        first = is_first(stage, problem.op) and not follows_tables(stage, problem)
        source = dependent(source, first=first, says=extras["pdl"] == "signal")
    return source


def with_extras(digest: str, config: Config) -> str:
    """The digest of a template, and of what is written into its text for this config."""
    if not known(config):
        return digest
    # what is on file with others stays what it is
    own = _digest(_reaching) if "reach" in known(config) else ""
    written = f"{digest}{_digest(_dependent, _merging, _resident)}{own}"
    return hashlib.sha256(written.encode()).hexdigest()[:16]


@cache
def _digest(*modules: ModuleType) -> str:
    return hashlib.sha256("".join(map(inspect.getsource, modules)).encode()).hexdigest()[:16]
