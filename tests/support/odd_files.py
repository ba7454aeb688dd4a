"""Tuned files and results that may hold anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gdn2gen.base.device import named_device
from gdn2gen.codegen.render import template_digest
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.plans import plan_named
from gdn2gen.store import tuned_files
from gdn2gen.store._claims import always_checked
from gdn2gen.store.format import entry_to

H200 = named_device("H200")


def entry(tokens: int = 16384, **changes: Any) -> tuned_files.Entry:
    problem = Problem()
    configs = {stage: default_config(stage, problem) for stage in plan_named("lean").stages}
    return tuned_files.Entry(
        **{
            "problem_key": problem.key,
            "regime_key": Regime(tokens, 4, 16).key,
            "level": "lean",
            "plan": "lean",
            "configs": configs,
            "templates": {stage: template_digest(config) for stage, config in configs.items()},
            "measured": {"forward_ms": 0.3, "forward_backward_ms": 1.441},
            "gate": dict.fromkeys(always_checked("gdn2"), 4e-3),
            "provenance": "measured",
            **changes,
        }
    )


def document(*entries: Any, **metadata: Any) -> str:
    """A tuned file whose entries and metadata may be anything."""
    made = tuned_files.metadata_for(H200, {"triton": "3.6.0"}, "gdn2gen tune") | metadata
    raw = [entry_to(x) if isinstance(x, tuned_files.Entry) else x for x in entries]
    kept = {name: x for name, x in made.items() if x is not ...}
    return json.dumps({"_metadata": kept, "entries": raw})


def put(folder: Path, text: str) -> Path:
    path = tuned_files.tuned_path(folder, "gdn2", H200)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
