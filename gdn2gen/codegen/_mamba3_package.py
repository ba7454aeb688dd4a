"""A package of Mamba-3's kernels over chunks, which needs torch and triton but not gdn2gen."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Final

from gdn2gen.base.dtypes import DTYPE
from gdn2gen.base.environment import without_assembly
from gdn2gen.base.errors import TemplateError
from gdn2gen.codegen._package_text import filled, made_for, wrapped, wrapped_command
from gdn2gen.codegen._part_launches import Launch, launches_of, summed
from gdn2gen.codegen.render import render
from gdn2gen.codegen.templates import templates
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.mamba3_chunks import MAMBA3_CHUNK_STAGES, chunk_problem
from gdn2gen.kernels.stage import Operand

NAME: Final = "mamba3_siso_combined"
_FILES: Final = ("__init__.py", "test_kernels.py", "README.md")
# What kernels are given by a call, by the names of their operands, and its dims; `when` is a flag
# of the problem.
_GIVEN: Final = (
    Operand("Q", "B T G N"),
    Operand("K", "B T G N"),
    Operand("V", "B T H P"),
    Operand("ADT", "B H T", "fp32"),
    Operand("DT", "B H T", "fp32"),
    Operand("Trap", "B H T", "trap"),
    Operand("Q_bias", "H N", "weight"),
    Operand("K_bias", "H N", "weight"),
    Operand("Angles", "B T H S", "angle"),
    Operand("D", "H", "weight", "skip"),
    Operand("Z", "B T H P", when="gate"),
    Operand("angle_state", "n H S", "fp32", "carried"),
    Operand("initial_ssm", "n H P N", "fp32", "carried"),
)
_TILES: Final = ("tiles", "tile_starts")
# Gradients of the results, and what a turn of all tokens changes by the last state; without a gate
# the gradient before it is that of the result.
_ARRIVING: Final = ("dout", "dfinal_ssm", "dlast_angle", "dlast_turn")
_UNGATED: Final = "dy"
# What stages call the gradient of an input, in parts or not; elsewhere d and its name.
_GRADIENTS: Final = {"D": "down"}
# Made again in the backward where it was not kept.
REMADE: Final = "h"
# Sizes by symbol, in the words of the package.
_SYMBOLS: Final = {"M": "n_tiles", "n": "n_sequences"}
_SIZES: Final = ("B", "T", "H", "G", "N", "P", "S", *_SYMBOLS.values())
_SCALARS: Final = (*_SIZES, "angle_row", "angle_head", "keep")


def configs_of(
    problem: Mamba3Problem, knobs: Mapping[str, Mapping[str, Knob]]
) -> dict[str, tuple[Mamba3Problem, Config]]:
    """What each stage of a package is rendered for, by the stages that there are."""
    found = {}
    for stage in MAMBA3_CHUNK_STAGES:
        if stage.name in knobs:
            own = chunk_problem(stage, problem)
            config = default_config(stage.name, own).replace(**knobs[stage.name])
            found[stage.name] = (own, config)
    return found


def mamba3_package_texts(
    problem: Mamba3Problem,
    knobs: Mapping[str, Mapping[str, Knob]],
    *,
    command: str,
    origin: str,
    fast: bool,
) -> dict[str, str]:
    """The files of a package by name. `fast`: what `disable_recompute` is by default."""
    configs = configs_of(problem, knobs)
    # in fp32, whose packages run in the interpreter, too
    with without_assembly() if problem.dtype == "fp32" else nullcontext():
        sources = {x: render(own, x, config).source for x, (own, config) in configs.items()}
    texts = {f"{name}.py": source for name, source in sources.items()}
    words = _words(problem, configs, sources)
    words |= {"command": wrapped_command(command), "origin": filled(origin), "fast": fast}
    for name in _FILES:
        template = templates().get_template(f"package/mamba3/{name}.jinja")
        texts[name] = template.render(**words).rstrip() + "\n"
    return texts


def _words(
    problem: Mamba3Problem,
    configs: Mapping[str, tuple[Mamba3Problem, Config]],
    sources: Mapping[str, str],
) -> dict[str, Any]:
    """For the templates."""
    given = [x for x in _GIVEN if x.when == "always" or getattr(problem, x.when)]
    inputs = [x.name for x in given] + ([*_TILES] if problem.packed else [])
    forward, backward = launches_of(
        [x for x in MAMBA3_CHUNK_STAGES if x.name in configs],
        lambda stage: chunk_problem(stage, problem),
        inputs,
        _ARRIVING if problem.gate else (*_ARRIVING, _UNGATED),
    )
    made = [x.name for step in forward for x in step.makes]
    read = {x for step in backward for x in step.reads}
    gradients = {x.name: _gradient(x, backward) for x in given}
    # tokens may be of no sequence, and chunks of no tokens
    leaving = {x.partition(".")[0] for x in gradients.values()} if problem.packed else set()
    zeroed = {*leaving, "out"} if leaving else leaving
    first = {int(config["BT"]) for _, config in configs.values()}
    if len(first) != 1:
        raise TemplateError(f"stages of a package share a tile, but BT is {sorted(first)}")
    of_heads = [int(config["BH"]) for _, config in configs.values() if "BH" in config]
    return {
        "name": NAME,
        "problem": problem,
        "modules": sorted(sources),
        "made_for": {name: made_for(x) for name, x in sources.items()},
        "BT": first.pop(),
        "of_heads": math.lcm(1, *of_heads),
        "given": {x.name for x in given},
        "inputs": inputs,
        # for the backward, which wants the first angles only to say that they have no gradient
        "saved": [x for x in inputs if x != "angle_state" or not problem.rotated],
        "forward": forward,
        "backward": backward,
        "remade": [x for x in forward if REMADE in [y.name for y in x.makes]],
        "kept": [x for x in made if x in read and x != REMADE],
        "gradients": gradients,
        "dtypes": {x.name: in_torch(x.dtype_in(problem)) for x in given},
        "in_torch": in_torch,
        "allocation": partial(_allocation, zeroed=zeroed),
        "arguments": _arguments,
        "wrapped": wrapped,
    }


def in_torch(dtype: str) -> str:
    return f"torch.{DTYPE[dtype].full_name}"


def _shape_of(dims: str) -> str:
    """The sizes of dims by symbol, in the words of the package."""
    found = [_SYMBOLS.get(x, x) for x in dims.split()]
    unknown = [x for x in found if x not in _SIZES]
    if unknown:
        raise TemplateError(f"a package knows no size {', '.join(unknown)} of [{dims}]")
    return f"({found[0]},)" if len(found) == 1 else f"({', '.join(found)})"


def _allocation(x: Operand, launch: Launch, zeroed: Collection[str]) -> str:
    """The expression that makes room for what a launch writes."""
    kind = "new_zeros" if x.name in zeroed else "new_empty"
    return f"V.{kind}({_shape_of(x.dims)}, dtype={in_torch(x.dtype_in(launch.problem))})"


def _arguments(launch: Launch, instead: Mapping[str, str] | None = None) -> list[str]:
    """Of the launch, in order; `instead`: expressions in place of some names."""
    unknown = [x for x in launch.scalars if x not in _SCALARS]
    if unknown:
        raise TemplateError(f"{launch.module} takes {', '.join(unknown)}, which no package knows")
    shown = [(instead or {}).get(x, x) for x in launch.tensors]
    assert isinstance(launch.problem, Mamba3Problem)
    zeros = () if launch.problem.rotated else ("angle_row", "angle_head")
    return [*shown, *(f"{x}={0 if x in zeros else x}" for x in launch.scalars)]


def _gradient(x: Operand, backward: list[Launch]) -> str:
    """The expression of an input's gradient, from what the backward's launches make."""
    if x.name == "angle_state":
        return "dangle_state"
    made = {y.name.lower(): y for step in backward for y in step.makes}
    name = _GRADIENTS.get(x.name, f"d{x.name}").lower()
    for known in (name, f"{name}_part"):
        if known in made:
            return summed(made[known], x.dims)
    if x.name == "Angles":  # none of its channels is turned
        return "torch.zeros_like(Angles)"
    raise TemplateError(
        f"no stage of {NAME} makes {name} or {name}_part, the gradient of {x.name}; made are "
        f"{', '.join(sorted(made))}"
    )
