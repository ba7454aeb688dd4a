"""Times of whole passes, each by a recipe of its own and checked first. Needs a GPU.

    python scripts/recipe_times.py gdn2 long32k blocks2_states + blocks2_states_transitions
    python scripts/recipe_times.py gdn2 few8k lean pdl=signal + lean scan:max_segments=264 --kernels

A member and a shape, then recipes with `+` between them: a plan, or a level for the plan that is on
file there, and stages with the knobs that are changed of what is on file, `STAGE:KNOB=VALUE,...`,
or `KNOB=VALUE` for every stage that can have it. `lean@train4k` is what is on file for another
shape, `lean@gdn2:128/train4k` for another problem, with tiles that fit. A stage that the plan on
file has not takes the knobs of the one that it is a variant of, and its defaults where there is
none. Forward, and forward and backward, in ms of a CUDA graph, the L2 flushed before each; twice,
in turns. `--kernels` adds what the GPU spent in each kernel of a pass, in us, by the profiler.
`--into=DIR` checks each in full and merges it into the tuned file there, as a search would: knobs
that no search asks for have no other way into an entry.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

from stage_times import knob, problem_of  # noqa: E402

from gdn2gen.base.device import Device, present_device, toolchain  # noqa: E402
from gdn2gen.base.errors import ConfigError  # noqa: E402
from gdn2gen.base.terminal import command_line  # noqa: E402
from gdn2gen.family.problem import Problem  # noqa: E402
from gdn2gen.family.shapes import Shape, parse_shapes  # noqa: E402
from gdn2gen.kernels.config import Config, default_config  # noqa: E402
from gdn2gen.kernels.extras import EXTRAS  # noqa: E402
from gdn2gen.kernels.limits import Knob  # noqa: E402
from gdn2gen.kernels.plans import LEVELS, PLANS, level_of, plan_for  # noqa: E402
from gdn2gen.kernels.recipe import Recipe, fitted  # noqa: E402
from gdn2gen.kernels.stages import STAGES  # noqa: E402
from gdn2gen.kernels.validity import why_invalid  # noqa: E402
from gdn2gen.measure.check import CheckResult  # noqa: E402
from gdn2gen.measure.compiling import compile_side_by_side  # noqa: E402
from gdn2gen.measure.turn import in_turn  # noqa: E402
from gdn2gen.store.dispatch import find_recipe  # noqa: E402
from gdn2gen.tuning.gpu.jobs import RecipeTiming  # noqa: E402

TURNS: Final = 2


@dataclass(frozen=True)
class Candidate:
    """A recipe that is right, the words that named it, and how long it takes in each turn."""

    words: str
    recipe: Recipe
    checked: CheckResult
    times: list[RecipeTiming] = field(default_factory=list)


def recipe_of(problem: Problem, shape: Shape, device: Device, words: Sequence[str]) -> Recipe:
    """What is on file for the plan, changed as the words say."""
    first, *changes = words
    first, _, where = first.partition("@")
    level = first if first in LEVELS else level_of(plan_for(first, problem.op).name)
    member, _, other = where.rpartition("/")
    there = problem_of(member) if member else problem
    sizes = the_shape(other) if other else shape
    filed = find_recipe(there, sizes.regime, device, level=level).recipe
    if there != problem:
        filed = replace(filed.fitted(problem, device.arch), problem=problem)
    plan = filed.plan if first in LEVELS else PLANS[first]
    configs = {x: _nearest(x, filed, problem, device) for x in plan.stages}
    for written in changes:
        stage, found, knobs = written.partition(":")
        if found and stage not in configs:
            raise ConfigError(f"{plan.name} has the stages {', '.join(configs)}, not {stage!r}")
        changed = dict(map(knob, (knobs if found else written).split(",")))
        for name in [stage] if found else [*configs]:
            config = _changed(configs[name], changed)
            if "tile_step" in changed:
                config = _widened(config, problem, device)
            reason = why_invalid(config, problem, device.arch)
            if reason is None:
                configs[name] = config
            elif found:
                raise ConfigError(f"{name} [{config}]: {reason}")
    return Recipe.of(problem, plan.name, configs)


def the_shape(text: str) -> Shape:
    """One shape, which may be a packed batch."""
    shapes = parse_shapes(text)
    if len(shapes) > 1:
        raise ConfigError(f"give one shape, such as train4k, not {text!r}")
    return shapes[0]


def _nearest(stage: str, filed: Recipe, problem: Problem, device: Device) -> Config:
    """The config on file, or as near to that of the stage it is a variant of as it can have."""
    if stage in filed.by_stage:
        return filed[stage]
    default = default_config(stage, problem, BT=filed.BT, arch=device.arch)
    apart = stage.removesuffix("_transitions")
    given = filed.by_stage.get(apart) or filed.by_stage.get(f"{apart}_transitions")
    if given is None:
        return default
    domains = STAGES[stage].domains
    found = default.replace(**{x: y for x, y in given.items() if y in domains.get(x, ())})
    return found if why_invalid(found, problem, device.arch) is None else default


def _changed(config: Config, knobs: Mapping[str, Knob]) -> Config:
    """With those of the knobs that its stage has."""
    known = {*STAGES[config.stage].domains, *EXTRAS}
    return config.replace(**{name: x for name, x in knobs.items() if name in known})


def _widened(config: Config, problem: Problem, device: Device) -> Config:
    """With tiles of whole head dims as wide as its `tile_step` makes them, where it can."""
    found = fitted(config, problem, device.arch)
    return found if "tile_step" in found else config


def split(words: Sequence[str]) -> Iterator[list[str]]:
    """The recipes' words, between `+`."""
    found: list[str] = []
    for word in (*words, "+"):
        if word != "+":
            found.append(word)
        elif found:
            yield found
            found = []


def kernels_to_compile(
    recipes: Sequence[Recipe], *, in_full: bool
) -> Iterator[tuple[Problem, Config]]:
    """Those of all recipes, and of their checks."""
    from gdn2gen.measure.check import full_problem

    for recipe in recipes:
        for problem in (recipe.problem, *([full_problem(recipe.problem)] if in_full else [])):
            yield from ((problem, config) for config in recipe.configs)


def kernels_of(recipe: Recipe, shape: Shape) -> list[tuple[str, float]]:
    """The kernels of a forward and a backward in their order, and microseconds of each."""
    import torch

    from gdn2gen.measure.accuracy import inputs_of, output_gradients, public_op, run_op
    from gdn2gen.measure.check import forced

    problem = recipe.problem
    inputs = inputs_of(problem, shape, "layer", 0, "cuda")
    grads = output_gradients(problem, shape, 0, "cuda")
    with forced(recipe):
        for _ in range(3):
            run_op(public_op(problem.op), problem, inputs, grads)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            run_op(public_op(problem.op), problem, inputs, grads)
            torch.cuda.synchronize()
    events = sorted(seen.events() or (), key=lambda x: x.time_range.start)
    on_gpu = [x for x in events if x.device_type.name == "CUDA"]
    return [(x.name, x.time_range.elapsed_us()) for x in on_gpu]


def file(candidate: Candidate, shape: Shape, folder: Path) -> str:
    """Merge what was checked in full into the tuned file of the present GPU; what came of it."""
    from gdn2gen.store import tuned_files
    from gdn2gen.tuning.filing import entries_of
    from gdn2gen.tuning.search.verdicts import Measured, Verdict

    recipe, times, device = candidate.recipe, candidate.times, present_device()
    best = min(times, key=lambda x: x.forward_backward.median)
    peak = max(x.peak_mib for x in times)
    errors = dict(candidate.checked.errors)
    measured = Measured(recipe, best.forward, best.forward_backward, peak, errors)
    entries = entries_of(Verdict(shape, recipe.level, measured, None, tied=False))
    path = tuned_files.tuned_path(folder, recipe.problem.op, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = command_line("python scripts/recipe_times.py", less=("--into", "--turn"))
    metadata = tuned_files.metadata_for(device, toolchain(), command)
    merged = tuned_files.merge_entries(path, metadata, entries)
    filed = any(x in merged.entries for x in entries)
    return f"{'filed' if filed else 'no better than what is there'}: {path}"


def checked_recipes(
    asked: Sequence[tuple[Sequence[str], Recipe]], full: bool
) -> Iterator[Candidate]:
    """Those recipes that are right, each compiled; says what came of all."""
    from gdn2gen.tuning.gpu.jobs import check_full, check_quick

    for own, recipe in asked:
        checked = check_full(recipe) if full else check_quick(recipe)
        worst = max(checked.errors.items(), key=lambda x: x[1], default=("nothing", 0.0))
        said = f"{worst[0]} {worst[1]:.1e}" if checked.ok else f"wrong, {checked.reason}"
        print(f"{' '.join(own)}: {said}\n    {recipe}", flush=True)
        if checked.ok:
            yield Candidate(" ".join(own), recipe, checked)


def time_all(candidates: Sequence[Candidate], shape: Shape) -> None:
    """Each in each turn; the first has its peak memory, too."""
    from gdn2gen.tuning.gpu.jobs import time_recipe

    for turn in range(TURNS):
        for each in candidates:
            found = time_recipe(each.recipe, shape, with_peak=turn == 0)
            each.times.append(found)
            peak = f"; {found.peak_mib:.0f} MiB" if turn == 0 else ""
            both = found.forward_backward.median
            print(f"{each.words}: {found.forward.median:.4f} / {both:.4f} ms{peak}", flush=True)


def main(member: str, shape: str, *words: str) -> None:
    problem, sizes = problem_of(member), the_shape(shape)
    given = [x for x in words if not x.startswith("--")]
    folders, turns = (
        [Path(x.removeprefix(name)) for x in words if x.startswith(name)]
        for name in ("--into=", "--turn=")
    )
    device = present_device()
    asked = [(own, recipe_of(problem, sizes, device, own)) for own in split(given)]
    if not turns:  # else the cores are busy with the others
        compile_side_by_side(
            kernels_to_compile([x for _, x in asked], in_full=bool(folders)), device
        )
    candidates = [*checked_recipes(asked, full=bool(folders))]
    with in_turn(turns[0] if turns else None):
        time_all(candidates, sizes)
        for each in candidates if "--kernels" in words else ():
            print(each.words)
            for name, us in kernels_of(each.recipe, sizes):
                print(f"    {us:8.1f}  {name[:80]}", flush=True)
        for folder in folders:
            for each in candidates:
                print(f"{each.words}: {file(each, sizes, folder)}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) <= 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    main(*sys.argv[1:])
