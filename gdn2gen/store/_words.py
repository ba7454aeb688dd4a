"""A recipe in words: what a call runs, where it came from and why, and what would tune it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gdn2gen.base.decay import WEAK
from gdn2gen.codegen.nvrtc import why_no_compiler
from gdn2gen.family.problem import OPTIONAL_FLAGS, Problem
from gdn2gen.family.shapes import SHAPES, shape_of
from gdn2gen.kernels.config import Config, language_of
from gdn2gen.store import tuned_files
from gdn2gen.store._nearest import TIERS, Match, Query, Refused, differing
from gdn2gen.store.format import Entry
from gdn2gen.store.verified import Place, is_verified

if TYPE_CHECKING:
    from gdn2gen.store.dispatch import Found


def tune_command(found: Found) -> str | None:
    """The command that would file an exact entry for the call, on its GPU; None if it has one.

    A packed batch whose tokens are no multiple of its sequences has no name on the command line:
    the packed shape that has one is close to it.
    """
    if found.source in ("exact", "forced", "pinned") or found.regime is None:
        return None
    problem, plain = found.recipe.problem, Problem()
    shape = shape_of(found.regime) or next(x for x in SHAPES.values() if x.cu_seqlens)
    K, V = problem.K, problem.V
    words = [f"gdn2gen tune --head-dim {K if K == V else f'{K},{V}'} --shapes {shape.name}"]
    words += [
        f"--{name.replace('_', '-')} {getattr(problem, name)}"
        for name in ("op", "dtype", "gate_dtype", "gate")
        if getattr(problem, name) != getattr(plain, name)
    ]
    words += [f"--lower-bound -{problem.bound}"] if problem.bound else []
    words += _norm_words(problem)
    return " ".join([*words, f"--level {found.recipe.level}", *_decay_words(found)])


def _decay_words(found: Found) -> list[str]:
    return [] if found.decay == WEAK else [f"--decay {found.decay}"]


def _norm_words(problem: Problem) -> list[str]:
    """Said where kernels could normalise q and k, and do not."""
    return [] if problem.l2norm == Problem(problem.op).l2norm else ["--no-l2norm"]


def generate_command(found: Found) -> str:
    """The command that makes a package of the recipe, as far as is known how it was found."""
    problem, regime = found.recipe.problem, found.regime
    words = ["--out", "DIR", "--op", problem.op, "--head-dim", f"{problem.K},{problem.V}"]
    words += ["--dtype", problem.dtype, "--gate-dtype", problem.gate_dtype]
    words += ["--gate", problem.gate, *_norm_words(problem)]
    words += ["--lower-bound", str(-problem.bound)] if problem.bound else []
    words.append(f"--with={','.join(problem.extras)}")
    if regime is not None and regime.tokens % regime.sequences == 0:
        tokens = regime.tokens // regime.sequences
        words += ["--shape", f"{regime.sequences}x{tokens}x{regime.heads}"]
    if found.device is not None:
        words += ["--target", found.device.slug]
    words += ["--level", found.recipe.level, *_decay_words(found)]
    words += [] if found.language is None else ["--language", found.language]
    return " ".join(["gdn2gen generate", *words])


def recipe_document(found: Found) -> dict[str, Any]:
    """What `explain_recipe` says, for a program that reads it."""
    recipe, regime, device = found.recipe, found.regime, found.device
    return {
        "problem": recipe.problem.document,
        "regime": None if regime is None else regime.key,
        "device": None if device is None else asdict(device),
        "level": recipe.level,
        "decay": found.decay,
        "tuned_decay": found.tuned_decay,
        "plan": recipe.plan.name,
        "configs": {config.stage: dict(config) for config in recipe.configs},
        "gate_apart": found.gate_apart,
        "source": found.source,
        "stale": found.stale,
        "file": found.file,
        "why": found.why,
        "verified": _refusal(found) is None,
        "tune": tune_command(found),
    }


def explain_recipe(found: Found, width: int = 100) -> str:
    """Several lines for a reader: what was asked, what runs, where it came from and why.

    And, unless an exact entry runs, the command that tunes one. Configs are folded at `width`.
    """
    recipe, device = found.recipe, found.device
    given, plan = [name for name in OPTIONAL_FLAGS if getattr(recipe.problem, name)], recipe.plan
    lines = [f"problem   {words_of(recipe.problem)}{' + ' + ', '.join(given) if given else ''}"]
    if found.regime is not None:
        lines.append(f"regime    {words_of_key(found.regime.key)}")
    if found.decay != WEAK:
        under = "" if found.tuned_decay == found.decay else f", kernels for {found.tuned_decay}"
        lines.append(f"decay     {found.decay}{under}")
    if found.gate_apart is not None:
        lines.append(f"gate      apart: {found.gate_apart}, in a kernel before the plan's")
    if device is not None:
        lines.append(f"device    {device.name} ({device.arch}, {device.sms} SMs)")
    lines.append(f"plan      {plan.name}")
    for title, stages in (("forward", plan.forward), ("backward", plan.backward)):
        lines.append(f"  {title}")
        lines += [_config_line(recipe[stage], width) for stage in stages]
    lines.append(f"source    {found.source}{' (a better entry is stale)' if found.stale else ''}")
    if found.file is not None:
        lines.append(f"file      {found.file}")
    lines.append(f"why       {found.why}")
    refusal = _refusal(found)
    if refusal is not None:
        lines.append(f"verified  {refusal}")
    command = tune_command(found)
    if command is not None:
        where = "" if device is None else f"on {device.name}: "
        lines.append(f"tune      {where}{command}")
    return "\n".join(lines)


def _refusal(found: Found) -> str | None:
    """Why a call is refused, and what mends it; None where it is not."""
    place, device = Place.of(found.recipe.problem), found.device
    if device is None or is_verified(*place, device.arch):
        return None
    return (
        f"not on {device.arch}: a call is refused without GDN2GEN_UNVERIFIED=1; `{place.command}` "
        "there"
    )


def _config_line(config: Config, width: int) -> str:
    text = f"    {config.stage:<13} {config}"
    indent = " " * min(18, width // 4)
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False)


def why_matched(best: Match, query: Query) -> str:
    """Which entry runs, and in what it is not the call's own."""
    entry, key = best.entry, query.problem.key
    words = [f"entry [{entry.label}] of {best.gpu}, {entry.provenance}"]
    if best.distance:
        words.append(f"its regime is the nearest to {words_of_key(query.regime.key)}")
    minor = differing(key, entry)
    if minor:
        given = ", ".join(f"{name}={key[name]}" for name in minor)
        words.append(f"the call has {given}, which moves the speed only a little")
    if TIERS[best.tier] == "transferred":
        words.append(f"nothing was measured on {query.device.name} itself")
    if entry.provenance == "predicted":
        words.append("ranked without a GPU, never timed")
    return "; ".join(words)


def why_for_weak() -> str:
    """What is said where strong decay is expected, and the entry was tuned under weak decay."""
    return "nothing that serves is tuned under strong decay, so it is what weak decay has"


def why_triton(entry: Entry) -> str:
    """Why TileLang cannot be compiled here, and what was looked for instead."""
    why = why_no_compiler()
    if entry.needs_triton_alone:
        return f"{why}: looked for entries that need Triton alone"
    stages = ", ".join(x for x, config in entry.configs.items() if language_of(config) != "triton")
    return f"{why}, and no entry needs Triton alone: {stages} run Triton's default configs"


def why_refused(refused: Refused) -> str:
    """Which entry was nearer, and which of the call's options it does not take."""
    return f"the entry [{refused.match.entry.label}] does not serve the call: {refused.why}"


def why_passed(passed: Match) -> str:
    """Which entry was nearer, and which of its templates changed."""
    stages = ", ".join(tuned_files.stale_stages(passed.entry))
    return (
        f"passed over the stale entry [{passed.entry.label}] of {passed.path}, for the templates "
        f"of {stages} changed since it was checked; `gdn2gen tune` checks it again"
    )


def words_of(problem: Problem) -> str:
    """The problem's key: `gdn2 K=128 V=128 dtype=bf16 ...`."""
    key = problem.key
    return f"{key.pop('op')} {words_of_key(key)}"


def words_of_key(key: Mapping[str, object]) -> str:
    """`K=128 V=128`."""
    return " ".join(f"{name}={value}" for name, value in key.items())
