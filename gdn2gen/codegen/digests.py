"""Digests of the templates that a recipe's kernels come from."""

from __future__ import annotations

import hashlib

from gdn2gen.codegen.render import template_digest
from gdn2gen.kernels.recipe import Recipe


def templates_of(recipe: Recipe) -> dict[str, str]:
    """Digest of each stage's template, by stage."""
    return {config.stage: template_digest(config) for config in recipe.configs}


def digest_of(recipe: Recipe) -> str:
    """Digest over the templates of all stages: 16 hex digits."""
    return hashlib.sha256("".join(templates_of(recipe).values()).encode()).hexdigest()[:16]
