"""Candidate: a whole pipeline that the tuner may run, in a form that crosses process borders."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gdn2gen.codegen.render import template_digest
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config, default_config, language_of
from gdn2gen.kernels.plans import plan_named

if TYPE_CHECKING:
    from gdn2gen.store.dispatch import Recipe


@dataclass(frozen=True)
class Candidate:
    """A problem, a plan by name, and one config for each of its stages."""

    problem: Problem
    plan: str
    configs: tuple[Config, ...]

    @classmethod
    def of(cls, problem: Problem, plan: str, configs: Mapping[str, Config]) -> Candidate:
        """Take the configs of the plan's stages out of `configs` (KeyError if one is missing)."""
        return cls(problem, plan, tuple(configs[stage] for stage in plan_named(plan).stages))

    @classmethod
    def default(
        cls, problem: Problem, plan: str, BT: int | None = None, *, arch: str | None = None
    ) -> Candidate:
        """Every stage at its default for `arch`, in chunks of BT tokens (None: the default)."""
        stages = plan_named(plan).stages
        configs = (default_config(x, problem, BT=BT, arch=arch) for x in stages)
        return cls(problem, plan, tuple(configs))

    @property
    def by_stage(self) -> dict[str, Config]:
        return {config.stage: config for config in self.configs}

    @property
    def BT(self) -> int:
        return self.configs[0].size("BT")

    @property
    def templates(self) -> dict[str, str]:
        """Digest of each stage's template."""
        return {config.stage: template_digest(config) for config in self.configs}

    @property
    def digest(self) -> str:
        """Digest over the templates of all stages."""
        return hashlib.sha256("".join(self.templates.values()).encode()).hexdigest()[:16]

    @property
    def needs_triton_alone(self) -> bool:
        """Whether no stage is in another language, which not every machine can compile."""
        return all(language_of(config) == "triton" for config in self.configs)

    def with_config(self, config: Config) -> Candidate:
        """The same pipeline with one stage's config exchanged."""
        return Candidate.of(self.problem, self.plan, {**self.by_stage, config.stage: config})

    def for_problem(self, problem: Problem) -> Candidate:
        return Candidate(problem, self.plan, self.configs)

    def distance(self, other: Candidate) -> int:
        """Number of knobs in which two candidates of one plan differ."""
        pairs = zip(self.configs, other.configs, strict=True)
        return sum(a[name] != b[name] for a, b in pairs for name in a)

    def recipe(self) -> Recipe:
        """The recipe that the ops would run for this candidate."""
        from dataclasses import replace

        from gdn2gen.store.dispatch import default_recipe

        recipe = default_recipe(self.problem, self.plan)
        why = "a candidate of the tuner"
        return replace(recipe, configs=self.by_stage, source="forced", why=why)

    def __str__(self) -> str:
        return f"{self.plan}: " + "; ".join(f"{x.stage} [{x}]" for x in self.configs)
