"""The tuner. Its parts are imported when first used: `import gdn2gen.tune` loads no optuna."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdn2gen.tune.offline import tune_without_gpu
    from gdn2gen.tune.report import ShapeResult, TuneReport
    from gdn2gen.tune.study import tune

__all__ = ["ShapeResult", "TuneReport", "tune", "tune_without_gpu"]

_HOMES = {
    "tune": "study",
    "tune_without_gpu": "offline",
    "ShapeResult": "report",
    "TuneReport": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
