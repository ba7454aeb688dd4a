"""Where things lie in the source tree, and how processes that tests start find them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

SUPPORT: Final = Path(__file__).resolve().parent
ROOT: Final = SUPPORT.parents[1]


def python_path() -> str:
    """PYTHONPATH for a process that imports gdn2gen and the modules of this folder."""
    mine = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), str(SUPPORT), *filter(None, [mine])])
