"""The tuner: recipes, compiled, checked and timed on a GPU or ranked without one, and filed.

    space     the configs that are worth a trial
    records   studies, refusals and entries on file
    views     what a reader sees of them
    gpu       the worker that owns the GPU
    search    which config next
    filing    what a verdict leaves behind
    recheck   do the entries on file still hold
    recheck_parts  the same of kernels that are in no plan
    retest    refused configs, tried again
    run       search the present GPU, and file the best
    offline   what can be done without a GPU
    proof     what is known of kernels before they go into a package
    mamba3_packages  packages of Mamba-3's kernels
    packages  packages of kernels that have not run yet
    mamba3    Mamba-3: the scan, and the kernels around it

Imported when first used, so that `import gdn2gen.tuning` loads no optuna.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdn2gen.tuning.offline.run import tune_without_gpu
    from gdn2gen.tuning.run import tune
    from gdn2gen.tuning.views.report import ShapeResult, TuneReport

__all__ = ["ShapeResult", "TuneReport", "tune", "tune_without_gpu"]

_HOMES = {
    "tune": "run",
    "tune_without_gpu": "offline.run",
    "ShapeResult": "views.report",
    "TuneReport": "views.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
