"""Small prefills by recipes that are given, each checked first: what a rule for few may gain.

    python scripts/prefill_recipes.py gdn2 1x1024x16 prepare:chunks=2 + BT=64 scan:num_stages=2

A member and a shape, then recipes with `+` between them: stages of the forward with the knobs that
are changed of what a call would run, `STAGE:KNOB=VALUE,...`; with `BT=64` first in chunks of 64,
where a stage keeps its language and form if these have such chunks. What a call would run is timed
with them, first. Each makes o and the final state as the fp64 reference does, under decays of
layers and strong ones, and the same bits in 10 calls; what does not is said, and not timed.
Microseconds of one of 20 forwards in a CUDA graph, each on its own inputs (prefill_time.py), in two
turns; and what the GPU spent in each kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

import torch  # noqa: E402
from decode_steps import graph_us  # noqa: E402
from prefill_time import CALLS, DIM, forward, launches  # noqa: E402
from recipe_times import split  # noqa: E402
from stage_times import knob, one_shape  # noqa: E402

from gdn2gen.base.device import Device, present_device  # noqa: E402
from gdn2gen.base.environment import verifying  # noqa: E402
from gdn2gen.base.errors import ConfigError  # noqa: E402
from gdn2gen.base.terminal import console  # noqa: E402
from gdn2gen.family import reference  # noqa: E402
from gdn2gen.family.problem import Problem  # noqa: E402
from gdn2gen.family.registry import recurrence_named  # noqa: E402
from gdn2gen.family.shapes import Shape  # noqa: E402
from gdn2gen.family.tolerances import LIMITS  # noqa: E402
from gdn2gen.kernels.config import Config, default_config, default_of  # noqa: E402
from gdn2gen.kernels.extras import known  # noqa: E402
from gdn2gen.kernels.limits import Place  # noqa: E402
from gdn2gen.kernels.recipe import Recipe  # noqa: E402
from gdn2gen.kernels.validity import why_invalid  # noqa: E402
from gdn2gen.measure.accuracy import inputs_of, op_flags, public_op, relative_errors  # noqa: E402
from gdn2gen.measure.check import forced  # noqa: E402
from gdn2gen.measure.compiling import compile_all  # noqa: E402
from gdn2gen.store.dispatch import find_recipe  # noqa: E402

REPEATS: Final = 10
TURNS: Final = 2
PATTERNS: Final = ("layer", "strong")


def recipe_of(usual: Recipe, device: Device, words: Sequence[str]) -> Recipe:
    """What a call runs, changed as the words say. Of the backward nothing is run."""
    recipe, changes = usual, list(words)
    if changes and changes[0].startswith("BT="):
        recipe = in_chunks_of(int(changes.pop(0).removeprefix("BT=")), recipe, device)
    for written in changes:
        stage, found, knobs = written.partition(":")
        if not found or stage not in recipe.plan.forward:
            forward = ", ".join(recipe.plan.forward)
            raise ConfigError(f"STAGE:KNOB=VALUE,... of {forward}, or BT=64 first: {written!r}")
        config = recipe[stage].replace(**dict(map(knob, knobs.split(","))))
        reason = why_invalid(config, recipe.problem, device.arch)
        if reason is not None:
            raise ConfigError(f"{stage} [{config}]: {reason}")
        recipe = recipe.with_config(config)
    return recipe


def in_chunks_of(BT: int, usual: Recipe, device: Device) -> Recipe:
    """The same in such chunks: a stage has its form's default, with what of its knobs is valid."""
    place, found = Place(usual.problem, BT, device.arch), {}
    for name in usual.plan.stages:
        found[name] = default_config(name, usual.problem, BT=BT, arch=device.arch)
        if name in usual.plan.forward and usual[name].form.serves(place):
            found[name] = _nearest(usual[name], place, device)
    return Recipe.of(usual.problem, usual.plan.name, found)


def _nearest(config: Config, place: Place, device: Device) -> Config:
    """In its form: each knob as it is where that may be there, else the first that may."""
    domains = config.form.domains(place)
    knobs = {x: config[x] if config[x] in y else y[0] for x, y in domains.items()}
    found = default_of(config.stage, config.form, place).replace(**knobs)
    kept = found.replace(**known(config))
    return found if why_invalid(kept, place.problem, device.arch) else kept


def why_wrong(recipe: Recipe, shape: Shape) -> str:
    """What of o and the final state is wrong; "" if nothing is."""
    problem = recipe.problem
    for pattern in PATTERNS:
        inputs = inputs_of(problem, shape, pattern, 0, "cuda")
        made: list[dict[str, torch.Tensor]] = []
        with forced(recipe), torch.no_grad():
            for _ in range(REPEATS):
                o, state = public_op(problem.op)(
                    **inputs, **op_flags(problem), output_final_state=True
                )
                assert state is not None
                made.append({"o": o, "final_state": state})
        doubles = {x: y.double() for x, y in inputs.items()}
        o, state = reference.chunk(
            recurrence_named(problem.op), doubles, **op_flags(problem), compute_dtype=torch.float64
        )
        errors = relative_errors(made[0], {"o": o, "final_state": state})
        limit = LIMITS[problem.dtype]
        wrong = [f"{x} is off by {y:.1e} of {limit:.0e}" for x, y in errors.items() if y > limit]
        moved = [x for x, y in made[0].items() if any(not torch.equal(y, z[x]) for z in made)]
        wrong += [f"{x} has other bits in another call" for x in moved]
        if wrong:
            return f"{pattern}: {', '.join(wrong)}"
    return ""


@verifying()
def main(op: str, written: str, *words: str) -> None:
    shape, device = one_shape(written), present_device()
    problem = Problem(op, DIM, DIM, final_state=True)
    usual = find_recipe(problem, shape.regime, device, level="lean").recipe
    given: list[tuple[str, Recipe, list[float]]] = [("as it is", usual, [])]
    given += [(" ".join(x), recipe_of(usual, device, x), []) for x in split(words)]
    failed = compile_all(
        (problem, recipe[x]) for _, recipe, _ in given for x in recipe.plan.forward
    )
    sound = []
    for name, recipe, times in given:
        lost = [x for x in recipe.plan.forward if recipe[x] in failed]
        wrong = f"{', '.join(lost)} did not compile" if lost else why_wrong(recipe, shape)
        console().print(f"{name}: {wrong or 'right'}")
        for stage in recipe.plan.forward:
            console().print(f"    {stage} [{recipe[stage]}]")
        if not wrong:
            sound.append((name, recipe, times))
    function: Any = public_op(op)
    for _ in range(TURNS):
        for _, recipe, times in sound:
            with forced(recipe):
                run = forward(op, shape.T, shape.H, function, "cuda")
                times.append(graph_us(run, CALLS))
    for name, recipe, times in sound:
        with forced(recipe):
            seen = launches(forward(op, shape.T, shape.H, function, "cuda"))
        alone = ", ".join(f"{x.removesuffix('_kernel')[:24]} {us:.1f}" for x, us in seen)
        console().print(f"{name}: {', '.join(f'{x:.1f}' for x in times)} us; alone {alone}")


if __name__ == "__main__":
    if len(sys.argv) <= 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    main(*sys.argv[1:])
