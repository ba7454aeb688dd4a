"""A recipe in words: what a call runs, where it came from and why, and what would tune it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import SHAPES, shape_of
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.plans import level_of

if TYPE_CHECKING:
    from gdn2gen.store.dispatch import Recipe


def tune_command(recipe: Recipe) -> str | None:
    """The command that would file an exact entry for the call, on its GPU; None if it has one.

    A packed batch whose tokens are no multiple of its sequences has no name on the command line:
    the packed shape that has one is close to it.
    """
    if recipe.source in ("exact", "forced") or recipe.regime is None:
        return None
    problem, plain = recipe.problem, Problem()
    shape = shape_of(recipe.regime) or next(x for x in SHAPES.values() if x.cu_seqlens)
    K, V = problem.K, problem.V
    words = [f"gdn2gen tune --head-dim {K if K == V else f'{K},{V}'} --shapes {shape.name}"]
    words += [
        f"--{name.replace('_', '-')} {getattr(problem, name)}"
        for name in ("op", "dtype", "gate_dtype", "gate")
        if getattr(problem, name) != getattr(plain, name)
    ]
    words += [f"--lower-bound -{problem.bound}"] if problem.bound else []
    words += [] if problem.l2norm else ["--no-l2norm"]
    return " ".join([*words, f"--level {level_of(recipe.plan.name)}"])


def recipe_document(recipe: Recipe) -> dict[str, Any]:
    """What `explain_recipe` says, for a program that reads it."""
    regime, device = recipe.regime, recipe.device
    return {
        "problem": recipe.problem.document,
        "regime": None if regime is None else regime.key,
        "device": None if device is None else asdict(device),
        "level": level_of(recipe.plan.name),
        "plan": recipe.plan.name,
        "configs": {stage: dict(recipe.configs[stage]) for stage in recipe.plan.stages},
        "source": recipe.source,
        "stale": recipe.stale,
        "file": recipe.file,
        "why": recipe.why,
        "tune": tune_command(recipe),
    }


def explain_recipe(recipe: Recipe, width: int = 100) -> str:
    """Several lines for a reader: what was asked, what runs, where it came from and why.

    And, unless an exact entry runs, the command that tunes one. Configs are folded at `width`.
    """
    flags = ("has_A_log", "has_dt_bias", "varlen", "initial_state", "final_state", "state_v_first")
    given = [name for name in flags if getattr(recipe.problem, name)]
    plan, device = recipe.plan, recipe.device
    lines = [f"problem   {words_of(recipe.problem)}{' + ' + ', '.join(given) if given else ''}"]
    if recipe.regime is not None:
        lines.append(f"regime    {words_of_key(recipe.regime.key)}")
    if device is not None:
        lines.append(f"device    {device.name} ({device.arch}, {device.sms} SMs)")
    lines.append(f"plan      {plan.name}")
    for title, stages in (("forward", plan.forward), ("backward", plan.backward)):
        lines.append(f"  {title}")
        lines += [_config_line(stage, recipe.configs[stage], width) for stage in stages]
    lines.append(f"source    {recipe.source}{' (a better entry is stale)' if recipe.stale else ''}")
    if recipe.file is not None:
        lines.append(f"file      {recipe.file}")
    lines.append(f"why       {recipe.why}")
    command = tune_command(recipe)
    if command is not None:
        where = "" if device is None else f"on {device.name}: "
        lines.append(f"tune      {where}{command}")
    return "\n".join(lines)


def _config_line(stage: str, config: Config, width: int) -> str:
    text = f"    {stage:<13} {config}"
    indent = " " * min(18, width // 4)
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False)


def words_of(problem: Problem) -> str:
    """The problem's key: `gdn2 K=128 V=128 dtype=bf16 ...`."""
    key = problem.key
    return f"{key.pop('op')} {words_of_key(key)}"


def words_of_key(key: Mapping[str, object]) -> str:
    """`K=128 V=128`."""
    return " ".join(f"{name}={value}" for name, value in key.items())
