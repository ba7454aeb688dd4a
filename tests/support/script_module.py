"""A script of scripts/ as a module."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from source_tree import ROOT


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    if (folder := str(ROOT / "scripts")) not in sys.path:  # where scripts find each other
        sys.path.append(folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module
