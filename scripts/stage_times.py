"""Times of single stages under given configs, each checked first. Needs a GPU.

    python scripts/stage_times.py gdn2 train4k blocks1 grad_blocks1:language=tilelang,chunks=16 ...
    python scripts/stage_times.py gdn2:256,512 train4k lean scan scan:language=tilelang,BV=64
    python scripts/stage_times.py gdn2 train4k lean --decay=layer --decay=strong prepare grad_key

A member, with head dims where they are not its usual ones, a shape, a plan, then stages of it with
the knobs in which each differs from its default; `STAGE` alone is the default, `STAGE:BT=32` that
of such chunks. The other stages are at theirs. Of Mamba-2: K = 128, V = 64, with the parameters of
its gate, D and z (shape mamba4k). `--decay`, a gate pattern or a file of one, may be
given several times, for a time each: a layer's without. A config that fails the tuner's quick check
is said to, and not timed; a fault of the GPU ends the script: give what is least sure last.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gdn2gen.base.device import present_device
from gdn2gen.base.errors import ConfigError, InputError
from gdn2gen.cli.options import parse_head_dim
from gdn2gen.family.decays import DecayPattern
from gdn2gen.family.problem import Problem, gate_parameters
from gdn2gen.family.registry import recurrence_named
from gdn2gen.family.shapes import Shape, parse_shapes
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.measure.timing import time_ms


def knob(written: str) -> tuple[str, Knob]:
    name, found, value = written.partition("=")
    if not found:
        raise ConfigError(f"a knob is written name=value, but got {written!r}")
    return name, int(value) if value.isdigit() else value


def recipes(
    problem: Problem, plan: str, given: Sequence[str], arch: str
) -> Iterator[tuple[str, Recipe]]:
    """Each stage that was asked for, and the plan with that stage alone off its default."""
    for written in given:
        stage, _, knobs = written.partition(":")
        changed = dict(map(knob, filter(None, knobs.split(","))))
        BT = changed.pop("BT", None)
        base = Recipe.default(problem, plan, None if BT is None else int(BT), arch=arch)
        if stage not in base.plan.stages:
            raise ConfigError(f"{plan} has the stages {', '.join(base.plan.stages)}, not {stage!r}")
        config = default_config(stage, problem, BT=base.BT, arch=arch).replace(**changed)
        reason = why_invalid(config, problem, arch)
        if reason is not None:
            raise ConfigError(f"{stage} [{config}]: {reason}")
        yield stage, base.with_config(config)


def problem_of(member: str) -> Problem:
    """As most layers call it."""
    op, _, head_dims = member.partition(":")
    usual = recurrence_named(op).usual
    K, V = parse_head_dim(head_dims or usual.head_dims[0])
    parameters: Mapping[str, Any] = gate_parameters(op, usual.gate)
    return Problem(op, K, V, gate=usual.gate, **parameters)


def one_shape(text: str) -> Shape:
    """Of rows: what a packed batch adds, these scripts do not hand over."""
    shapes = parse_shapes(text)
    if len(shapes) > 1 or shapes[0].cu_seqlens is not None:
        raise InputError(f"give one shape, and no packed batch, such as train4k, not {text!r}")
    return shapes[0]


def stage_call(
    recipe: Recipe, stage: str, shape: Shape, decay: str = "layer"
) -> Callable[[], object]:
    """Launches a stage on operands that the others make under such decays."""
    from gdn2gen.measure.accuracy import inputs_of, output_gradients
    from gdn2gen.measure.rows import stage_calls

    pattern = DecayPattern.load(decay) if decay.endswith(".json") else decay
    inputs = inputs_of(recipe.problem, shape, pattern, 0, "cuda")
    do = output_gradients(recipe.problem, shape, 0, "cuda")["o"]
    return dict(stage_calls(recipe, shape, inputs, do))[stage]


def main(member: str, shape: str, plan: str, *words: str) -> None:
    from gdn2gen.tuning.gpu.jobs import check_quick

    decays = [x.removeprefix("--decay=") for x in words if x.startswith("--decay=")] or ["layer"]
    given = [x for x in words if not x.startswith("--decay=")]
    sizes = one_shape(shape)
    for stage, recipe in list(recipes(problem_of(member), plan, given, present_device().arch)):
        checked = check_quick(recipe)
        title = f"{stage} [{recipe[stage]}]"
        if not checked.ok:
            print(f"{title}: wrong, {checked.reason}", flush=True)
            continue
        found = [time_ms(stage_call(recipe, stage, sizes, x)) for x in decays]
        worst = max(checked.errors.items(), key=lambda x: x[1])
        listed = ", ".join(f"{x.median:.3f}" for x in found)
        print(f"{title}: {listed} ms; {worst[0]} {worst[1]:.1e}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) <= 3 or "--help" in sys.argv:
        sys.exit(__doc__)
    main(*sys.argv[1:])
