"""Times of whole passes, each by a recipe of its own and checked first. Needs a GPU.

    python scripts/recipe_times.py gdn2 long32k blocks2_states + blocks2_states_transitions
    python scripts/recipe_times.py gdn2 few8k lean pdl=signal + lean scan:max_segments=264 --kernels

A member and a shape, then recipes with `+` between them: a plan, or a level for the plan that is
on file there, and stages with the knobs that are changed of what is on file,
`STAGE:KNOB=VALUE,...`, or `KNOB=VALUE` for every stage that can have it. A stage that the plan on
file has not takes the knobs of the one that it is a variant of, and its defaults where there is
none. Forward, and forward and backward, in ms of a CUDA graph, the L2 flushed before each; twice,
in turns. `--kernels` adds what the GPU spent in each kernel of a pass, in us, by the profiler.
`--into=DIR` checks each in full and merges it into the tuned file there, as a search would: knobs
that no search asks for have no other way into an entry.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

from stage_times import knob, one_shape, problem_of  # noqa: E402

from gdn2gen.base.device import Device, present_device, toolchain  # noqa: E402
from gdn2gen.base.errors import ConfigError  # noqa: E402
from gdn2gen.base.terminal import command_line  # noqa: E402
from gdn2gen.family.problem import Problem  # noqa: E402
from gdn2gen.family.shapes import Shape  # noqa: E402
from gdn2gen.kernels.config import Config, default_config  # noqa: E402
from gdn2gen.kernels.extras import EXTRAS  # noqa: E402
from gdn2gen.kernels.limits import Knob  # noqa: E402
from gdn2gen.kernels.plans import LEVELS, PLANS, level_of, plan_for  # noqa: E402
from gdn2gen.kernels.recipe import Recipe  # noqa: E402
from gdn2gen.kernels.stages import STAGES  # noqa: E402
from gdn2gen.kernels.validity import why_invalid  # noqa: E402
from gdn2gen.store.dispatch import find_recipe  # noqa: E402
from gdn2gen.tuning.gpu.jobs import RecipeTiming  # noqa: E402

TURNS: Final = 2


def recipe_of(problem: Problem, shape: Shape, device: Device, words: Sequence[str]) -> Recipe:
    """What is on file for the plan, changed as the words say."""
    first, *changes = words
    level = first if first in LEVELS else level_of(plan_for(first, problem.op).name)
    filed = find_recipe(problem, shape.regime, device, level=level).recipe
    plan = filed.plan if first in LEVELS else PLANS[first]
    configs = {x: _nearest(x, filed, problem, device) for x in plan.stages}
    for written in changes:
        stage, found, knobs = written.partition(":")
        if found and stage not in configs:
            raise ConfigError(f"{plan.name} has the stages {', '.join(configs)}, not {stage!r}")
        changed = dict(map(knob, (knobs if found else written).split(",")))
        for name in [stage] if found else [*configs]:
            config = _changed(configs[name], changed)
            reason = why_invalid(config, problem, device.arch)
            if reason is None:
                configs[name] = config
            elif found:
                raise ConfigError(f"{name} [{config}]: {reason}")
    return Recipe.of(problem, plan.name, configs)


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


def split(words: Sequence[str]) -> Iterator[list[str]]:
    """The recipes' words, between `+`."""
    found: list[str] = []
    for word in (*words, "+"):
        if word != "+":
            found.append(word)
        elif found:
            yield found
            found = []


def compile_all(recipes: Sequence[Recipe], device: Device, *, in_full: bool) -> None:
    """Compile all kernels side by side, each once: one after the other, as checks ask for them, six
    stages in TileLang take a minute of one core and leave 15 idle."""
    from concurrent.futures import wait

    from gdn2gen.measure.check import full_problem
    from gdn2gen.tuning.gpu.backend import WorkerBackend

    asked: dict[tuple[Problem, Config], None] = {}
    for recipe in recipes:
        problems = [recipe.problem, *([full_problem(recipe.problem)] if in_full else [])]
        asked |= {(x, config): None for x in problems for config in recipe.configs}
    backend = WorkerBackend(device)
    try:
        wait([backend.compile(*x) for x in asked])  # what fails there, the check says
    finally:
        backend.close()


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


def file(recipe: Recipe, shape: Shape, found: Sequence[RecipeTiming], folder: Path) -> str:
    """Check it in full and merge it into the tuned file of the present GPU; what came of it."""
    from gdn2gen.store import tuned_files
    from gdn2gen.tuning.filing import entries_of
    from gdn2gen.tuning.gpu.jobs import check_full
    from gdn2gen.tuning.search.verdicts import Measured, Verdict

    device, checked = present_device(), check_full(recipe)
    if not checked.ok:
        return f"wrong, {checked.reason}"
    best = min(found, key=lambda x: x.forward_backward.median)
    peak = max(x.peak_mib for x in found)
    measured = Measured(recipe, best.forward, best.forward_backward, peak, dict(checked.errors))
    entries = entries_of(Verdict(shape, recipe.level, measured, None, tied=False))
    path = tuned_files.tuned_path(folder, recipe.problem.op, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = tuned_files.metadata_for(device, toolchain(), command_line())
    merged = tuned_files.merge_entries(path, metadata, entries)
    filed = any(x in merged.entries for x in entries)
    return f"{'filed' if filed else 'no better than what is there'}: {path}"


def main(member: str, shape: str, *words: str) -> None:
    from gdn2gen.tuning.gpu.jobs import check_quick, time_recipe

    problem, sizes, device = problem_of(member), one_shape(shape), present_device()
    given = [x for x in words if not x.startswith("--")]
    timed: list[tuple[list[str], Recipe, list[RecipeTiming]]] = []
    asked = [(own, recipe_of(problem, sizes, device, own)) for own in split(given)]
    compile_all([x for _, x in asked], device, in_full=any(x.startswith("--into=") for x in words))
    for own, recipe in asked:
        checked = check_quick(recipe)
        worst = max(checked.errors.items(), key=lambda x: x[1], default=("nothing", 0.0))
        said = f"{worst[0]} {worst[1]:.1e}" if checked.ok else f"wrong, {checked.reason}"
        print(f"{' '.join(own)}: {said}\n    {recipe}", flush=True)
        if checked.ok:
            timed.append((own, recipe, []))
    for turn in range(TURNS):
        for own, recipe, times in timed:
            found = time_recipe(recipe, sizes, with_peak=turn == 0)
            times.append(found)
            peak = f"; {found.peak_mib:.0f} MiB" if turn == 0 else ""
            both = found.forward_backward.median
            print(f"{' '.join(own)}: {found.forward.median:.4f} / {both:.4f} ms{peak}", flush=True)
    for folder in (x.removeprefix("--into=") for x in words if x.startswith("--into=")):
        for own, recipe, times in timed:
            print(f"{' '.join(own)}: {file(recipe, sizes, times, Path(folder))}", flush=True)
    for own, recipe, _ in timed if "--kernels" in words else ():
        print(" ".join(own))
        for name, us in kernels_of(recipe, sizes):
            print(f"    {us:8.1f}  {name[:80]}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
