"""Head dims that were never tuned: the recipe of the nearest ones on file, with tiles that fit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gdn2gen.base.device import Device
from gdn2gen.base.paths import packaged_tuned_dir, user_tuned_dir
from gdn2gen.family.problem import USUAL_DIMS, Problem, Regime
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.store import dispatch, tuned_files
from gdn2gen.store._words import words_of
from gdn2gen.store.dispatch import Found
from gdn2gen.store.tuned_files import Entry


def dims_apart(problem: Problem, entry: Entry) -> float:
    """How far the head dims of an entry are: the sum of |log2| of the ratios of K and of V."""
    return _apart(problem, *_dims(entry))


def find_recipe_of_any_size(
    problem: Problem, regime: Regime, device: Device, **options: Any
) -> Found:
    """`dispatch.find_recipe`; where that has only a default for unusual head dims,
    what it finds for the nearest ones on file, as `transferred`: never timed at these, and not
    compiled yet.

    A call takes no such recipe by itself: what compiles at one head dim may not at another.
    """
    found = dispatch.find_recipe(problem, regime, device, **options)
    if found.source != "default" or is_usual(problem):
        return found
    return transferred(problem, regime, device, **options) or found


def transferred(problem: Problem, regime: Regime, device: Device, **options: Any) -> Found | None:
    """What `dispatch.find_recipe` finds for the nearest other head dims on file, with tiles that
    fit; None where nothing is on file."""
    others = set(_dims_on_file(problem.op)) - {(problem.K, problem.V)}
    for K, V in sorted(others, key=lambda x: _apart(problem, *x)):
        near = _there(replace(problem, K=K, V=V), problem, regime, device, **options)
        if near.source != "default":
            return replace(
                near,
                recipe=near.recipe.fitted(problem, device.arch),
                source="transferred",
                why=f"nothing is tuned for {words_of(problem)}: of the nearest head dims, K={K} "
                f"V={V}, with tiles that fit, and not timed at these; there {near.why}",
            )
    return None


def _there(
    other: Problem, problem: Problem, regime: Regime, device: Device, **options: Any
) -> Found:
    """What is found for `other`: of its size one that serves packed sequences, too, where the
    fastest has forms that `problem` cannot take and that one has none such. In their place are
    defaults, in Triton: of K = V = 64 the fastest is in one kernel, whose tiles of values are as
    wide as those of keys, so that K = 40, V = 80 has it not."""
    found = dispatch.find_recipe(other, regime, device, **options)
    if found.source == "default" or _keeps_forms(found.recipe, problem, device):
        return found
    packed = dispatch.find_recipe(replace(other, varlen=True), regime, device, **options)
    served = packed.source == found.source and _keeps_forms(packed.recipe, problem, device)
    return packed if served else found


def _keeps_forms(recipe: Recipe, problem: Problem, device: Device) -> bool:
    fitted = recipe.fitted(problem, device.arch)
    if fitted.plan is not recipe.plan:
        return False
    pairs = zip(recipe.configs, fitted.configs, strict=True)
    return all(config.form is other.form for config, other in pairs)


def is_usual(problem: Problem) -> bool:
    """Whether its head dims are of those that most models have, of which every pair has run."""
    return problem.K in USUAL_DIMS and problem.V in USUAL_DIMS


def _dims_on_file(op: str) -> Iterator[tuple[int, int]]:
    """Of every GPU, of which `find_recipe` takes the one at hand or one like it."""
    for folder in (user_tuned_dir(), packaged_tuned_dir()):
        for path in sorted((folder / op).glob("*.json")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `find_recipe` says what could not be read
                file = tuned_files.read_tuned(path)
            yield from map(_dims, () if file is None else file.entries)


def _dims(entry: Entry) -> tuple[int, int]:
    return int(entry.problem_key["K"]), int(entry.problem_key["V"])


def _apart(problem: Problem, K: int, V: int) -> float:
    return abs(math.log2(problem.K / K)) + abs(math.log2(problem.V / V))
