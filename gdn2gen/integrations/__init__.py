"""Other libraries' models on these ops, without a change to them.

fla    register, unregister: flash-linear-attention's ops, and so its layers and models
mamba  the same: mamba_ssm's
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_MODULES = ("fla", "mamba")


def __getattr__(name: str) -> ModuleType:
    """`gdn2gen.integrations.fla.register()` after `import gdn2gen` alone; neither loads the other's
    library before."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
