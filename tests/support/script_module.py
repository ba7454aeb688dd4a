"""A script of scripts/ as a module."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from source_tree import ROOT


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look for the module of their class there
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
