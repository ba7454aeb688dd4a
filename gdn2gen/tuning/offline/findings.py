"""What a search without a GPU has found out: on file as it happens, so that a later run goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gdn2gen.base.errors import Gdn2genError
from gdn2gen.codegen.build import Resources
from gdn2gen.codegen.digests import digest_of
from gdn2gen.codegen.render import template_digest
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.tuning.records.ledger import Ledger, append_line


class Findings:
    """Compiled configs and checked recipes of one problem on one target.

    What was refused is in the ledger, where `gdn2gen ledger` and a later search find it. Both hold
    as long as the toolchain and the templates are the same.
    """

    def __init__(self, path: Path, problem: Problem, ledger: Ledger) -> None:
        self.path, self.problem, self.ledger = path, problem, ledger
        self.compiled: dict[Config, Resources] = {}
        self.passed: set[str] = set()
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        for line in lines:
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, Gdn2genError):
                continue  # torn, or of a version that wrote other lines: it is found out again

    def why_refused(self, config: Config) -> str | None:
        return self.ledger.why_refused(self.problem, config, template_digest(config))

    def compiles(self, config: Config, resources: Resources) -> None:
        self.compiled[config] = resources
        key = self._key(template_digest(config))
        knobs = {"stage": config.stage, "config": dict(config)}
        append_line(self.path, {"key": key, **knobs, "resources": asdict(resources)})

    def refuse(self, config: Config, reason: str) -> None:
        self.ledger.add(reason, self.problem, config, template_digest(config))

    def why_wrong(self, recipe: Recipe) -> str | None:
        """Why a recipe was refused before; see `has_passed` for the contrary."""
        return self.ledger.why_recipe_refused(recipe, digest_of(recipe))

    def has_passed(self, recipe: Recipe) -> bool:
        return self._key(str(recipe), digest_of(recipe)) in self.passed

    def passes(self, recipe: Recipe) -> None:
        key = self._key(str(recipe), digest_of(recipe))
        self.passed.add(key)
        append_line(self.path, {"passed": key, "pipeline": str(recipe)})

    def is_wrong(self, recipe: Recipe, reason: str) -> None:
        self.ledger.add_recipe(reason, recipe, digest_of(recipe))

    def _take(self, document: dict[str, Any]) -> None:
        if "passed" in document:
            self.passed.add(document["passed"])
            return
        config = Config.of(document["stage"], document["config"])
        fits = why_invalid(config, self.problem) is None
        if fits and document["key"] == self._key(template_digest(config)):
            self.compiled[config] = Resources(**document["resources"])

    def _key(self, *of: str) -> str:
        """All that what was found depends on."""
        content = [self.problem.document, self.ledger.toolchain, *of]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
