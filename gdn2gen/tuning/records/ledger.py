"""Ledger: configs that were refused, and why; not tried again while nothing relevant changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from gdn2gen.base.errors import Gdn2genError
from gdn2gen.codegen.digests import digest_of
from gdn2gen.codegen.render import template_digest
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import OPS, recurrence_named
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.recipe import Recipe

PIPELINE: Final = "pipeline"
"""What stands for the stage where a whole recipe was refused."""


@dataclass(frozen=True)
class Refusal:
    """One refused config with its reason and all that it depends on.

    `stage` is `pipeline` for a whole recipe; `configs` then holds every stage's, else those of the
    recipe in which the stage failed: with problem and digests it is the reproducer.
    """

    reason: str
    stage: str
    config: dict[str, Knob]
    problem: dict[str, Any]
    gpu: str
    toolchain: dict[str, str]
    digest: str
    errors: dict[str, float] = field(default_factory=dict)
    plan: str = ""
    configs: dict[str, dict[str, Knob]] = field(default_factory=dict)
    date: str = ""

    @property
    def key(self) -> str:
        """Equal keys mean that the same thing would happen again."""
        parts = [self.stage, self.config, self.problem, self.gpu, self.toolchain, self.digest]
        if self.stage == PIPELINE:
            parts += [self.plan, self.configs]
        return json.dumps(parts, sort_keys=True)

    @property
    def id(self) -> str:
        """Eight hex digits of the key, to name the refusal by on a command line."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:8]

    @property
    def command(self) -> str:
        """The command that tries it again, on the same GPU."""
        return f"gdn2gen ledger --op {self.problem.get('op', OPS[0])} --retest {self.id}"

    @property
    def present_digest(self) -> str | None:
        """The digest it would have under the present templates; None if it cannot be built."""
        try:
            if self.stage != PIPELINE:
                return template_digest(Config.of(self.stage, self.config))
            return digest_of(self.recipe)
        except (Gdn2genError, KeyError, TypeError, AttributeError):
            return None

    @property
    def recipe(self) -> Recipe:
        """The whole recipe; a stage that was refused by itself among the others' defaults."""
        problem = Problem(**self.problem)
        if self.configs:
            configs = {name: Config.of(name, knobs) for name, knobs in self.configs.items()}
            return Recipe.of(problem, self.plan, configs)
        config = Config.of(self.stage, self.config)
        served = recurrence_named(problem.op).plans
        plan = next(name for name in served if self.stage in PLANS[name].stages)
        return Recipe.default(problem, plan, config.size("BT")).with_config(config)


class Ledger:
    """Append-only file of one JSON object per line; a torn last line is skipped on reading.

    A line `{"cleared": key}` takes back the refusals of that key before it.
    """

    def __init__(self, path: Path, gpu: str, toolchain: Mapping[str, str]) -> None:
        self.path = path
        self.gpu = gpu
        self.toolchain = dict(toolchain)
        self._reasons = {entry.key: entry.reason for entry in read_ledger(path)}

    def why_refused(self, problem: Problem, config: Config, digest: str) -> str | None:
        """Why this config of a stage was refused under this GPU, toolchain and template."""
        return self._reasons.get(self._refusal("", problem, config, digest).key)

    def why_recipe_refused(self, recipe: Recipe, digest: str) -> str | None:
        """Why a whole recipe was refused under this GPU, toolchain and templates."""
        return self._reasons.get(self._refusal_of("", recipe, digest).key)

    def add(
        self,
        reason: str,
        problem: Problem,
        config: Config,
        digest: str,
        *,
        errors: Mapping[str, float] | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        """File a refused config of one stage, with the recipe it failed in."""
        found = replace(self._refusal(reason, problem, config, digest), errors=dict(errors or {}))
        if recipe is not None:
            found = replace(found, plan=recipe.plan.name, configs=_knobs(recipe))
        self._append(found)

    def add_recipe(
        self,
        reason: str,
        recipe: Recipe,
        digest: str,
        errors: Mapping[str, float] | None = None,
    ) -> None:
        """File a recipe whose stages pass alone but fail together."""
        found = self._refusal_of(reason, recipe, digest)
        self._append(replace(found, errors=dict(errors or {})))

    def clear(self, refusal: Refusal) -> None:
        """Take a refusal back, so that its config is tried again."""
        self._reasons.pop(refusal.key, None)
        self._write({"cleared": refusal.key})

    def _refusal(self, reason: str, problem: Problem, config: Config, digest: str) -> Refusal:
        return Refusal(
            reason=reason,
            stage=config.stage,
            config=dict(config),
            problem=problem.document,
            gpu=self.gpu,
            toolchain=self.toolchain,
            digest=digest,
        )

    def _refusal_of(self, reason: str, recipe: Recipe, digest: str) -> Refusal:
        return Refusal(
            reason=reason,
            stage=PIPELINE,
            config={},
            problem=recipe.problem.document,
            gpu=self.gpu,
            toolchain=self.toolchain,
            digest=digest,
            plan=recipe.plan.name,
            configs=_knobs(recipe),
        )

    def _append(self, refusal: Refusal) -> None:
        if refusal.key in self._reasons:
            return
        self._reasons[refusal.key] = refusal.reason
        self._write(asdict(refusal))

    def _write(self, document: Mapping[str, Any]) -> None:
        append_line(self.path, document)


def _knobs(recipe: Recipe) -> dict[str, dict[str, Knob]]:
    return {config.stage: dict(config) for config in recipe.configs}


def append_line(path: Path, document: Mapping[str, Any]) -> None:
    """Add one JSON object, with the date, to a file of such lines; it is on the disk on return."""
    document = {**document, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(document) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if _ends_torn(path):
            line = b"\n" + line
        os.write(handle, line)
        os.fsync(handle)
    finally:
        os.close(handle)


def read_ledger(path: Path) -> list[Refusal]:
    """Every refusal in the file, oldest first; lines that are not one are left out."""
    return read_lines(path)[0]


def read_lines(path: Path) -> tuple[list[Refusal], list[str]]:
    """The refusals in the file, oldest first, and what is odd about its other lines."""
    found: list[Refusal] = []
    odd: list[str] = []
    if not path.exists():
        return found, odd
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            document = json.loads(line)
            if isinstance(document, dict) and "cleared" in document:
                found = [x for x in found if x.key != document["cleared"]]
            else:
                found.append(_refusal(document))
        except (ValueError, TypeError, RecursionError) as error:
            odd.append(f"line {number} of the ledger {path} is no refusal ({error})")
    return found, odd


_TYPES: Final[Mapping[str, type]] = {
    "reason": str,
    "stage": str,
    "config": dict,
    "problem": dict,
    "gpu": str,
    "toolchain": dict,
    "digest": str,
    "errors": dict,
    "plan": str,
    "configs": dict,
    "date": str,
}


def _refusal(document: Any) -> Refusal:
    """Raises TypeError unless `document` has the fields of a refusal, each of its type."""
    if not isinstance(document, dict):
        raise TypeError(f"it is a {type(document).__name__}")
    for name, value in document.items():
        if name in _TYPES and not isinstance(value, _TYPES[name]):
            raise TypeError(f"{name} is {value!r}")
    return Refusal(**document)


def _ends_torn(path: Path) -> bool:
    """Whether the last line was cut off, as by a kill in the middle of a write."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
