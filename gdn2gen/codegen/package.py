"""A package of kernels for one problem, which needs torch and triton but not gdn2gen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from gdn2gen.base.dtypes import DTYPE
from gdn2gen.codegen._mamba3_package import configs_of, mamba3_package_texts
from gdn2gen.codegen._package_arguments import of_recurrence
from gdn2gen.codegen._package_files import check_folder, write_package
from gdn2gen.codegen._package_text import filled, made_for, wrapped, wrapped_command
from gdn2gen.codegen.render import render, render_tables
from gdn2gen.codegen.templates import templates
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.problem import LEAST_BOUND, Problem
from gdn2gen.family.recurrence import Recurrence
from gdn2gen.family.registry import recurrence_named
from gdn2gen.kernels.config import language_of
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.operands import GIVEN_SEQUENCES
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.rows import row_of, unit_of
from gdn2gen.kernels.scans import MAX_SEGMENTS, SEGMENT
from gdn2gen.kernels.schedule import (
    OUTPUTS,
    Buffer,
    Step,
    given_inputs,
    gradients_of,
    outputs_of,
    read_by,
    schedule,
)

__all__ = [
    "check_folder",
    "configs_of",
    "generate_mamba3_package",
    "generate_package",
    "package_source",
    "package_texts",
]

TEMPLATE: Final = "package/__init__.py.jinja"


def generate_package(
    recipe: Recipe, out_dir: str | Path, command: str, *, origin: str = "", force: bool = False
) -> list[Path]:
    """Write one file per stage of the recipe's plan, an `__init__.py` with the op, its test and a
    README.

    `command` is what makes the package again, `origin` where its configs are from. The same
    arguments give the same bytes. An earlier package in `out_dir` is replaced as one: who looks
    sees the old or the new one. Raises InputError if the folder holds anything else, or (without
    `force`) files that were edited since they were generated.
    """
    return write_package(Path(out_dir), package_texts(recipe, command, origin), force=force)


def generate_mamba3_package(
    problem: Mamba3Problem,
    knobs: Mapping[str, Mapping[str, Knob]],
    out_dir: str | Path,
    command: str,
    *,
    origin: str = "",
    fast: bool = False,
    force: bool = False,
) -> list[Path]:
    """The same of Mamba-3's kernels over chunks, with these knobs by stage. `fast`: the package
    keeps the states before chunks for its backward unless a call says otherwise."""
    texts = mamba3_package_texts(problem, knobs, command=command, origin=origin, fast=fast)
    return write_package(Path(out_dir), texts, force=force)


def package_texts(recipe: Recipe, command: str, origin: str = "") -> dict[str, str]:
    """The files of a package by name; see `generate_package`."""
    texts = {f"{name}.py": source for name, source in _sources(recipe).items()}
    texts["__init__.py"] = package_source(recipe, command)
    beside = ("test_kernels.py", "README.md")
    return texts | {name: _beside(recipe, name, command, origin) for name in beside}


def package_source(recipe: Recipe, command: str) -> str:
    """The `__init__.py` of a package."""
    problem, plan = recipe.problem, recipe.plan
    recurrence = recurrence_named(problem.op)
    folded = _folded(recurrence)
    inputs = [*given_inputs(problem), *([GIVEN_SEQUENCES] if problem.varlen else [])]
    scalars = ["scale"] if recurrence.takes("scale") else []
    scalars += ["lower_bound"] if problem.gate == "sigmoid" else []
    kept = _shapes_read(recurrence, folded) | read_by(problem, plan.backward)
    forward = schedule(recipe, plan.forward, kept | {*OUTPUTS})
    gradients = gradients_of(problem)
    backward = schedule(recipe, plan.backward, tuple(gradients.values()))
    made = [x.name for step in forward for x in step.buffers]
    text = (
        templates()
        .get_template(TEMPLATE)
        .render(
            problem=problem,
            plan=plan,
            **of_recurrence(recurrence, problem),
            modules=sorted({x.module for x in (*forward, *backward)}),
            BT=recipe.BT,
            torch_dtype=_in_torch(problem.dtype),
            torch_gate_dtype=_in_torch(problem.gate_dtype),
            command=wrapped_command(command),
            inputs=inputs,
            scalars=scalars,
            gradients=[folded.get(name, "None") for name in (*inputs, *scalars)],
            saved=[name for name in (*inputs, *made) if name in kept],
            forward=forward,
            backward=backward,
            lower_bound=_least_bound(recipe),
            allocation=partial(_allocation, problem=problem),
            arguments=partial(_arguments, problem=problem),
            wrapped=wrapped,
            parts_of_heads=_parts_of_heads((*forward, *backward)),
            SEGMENT=SEGMENT,
            MAX_SEGMENTS=MAX_SEGMENTS,
            max_segments=recipe.saved_segments,
            most_segments=max(x.max_segments for x in (*forward, *backward)),
            every=plan.every if plan.every > 1 else 0,
            made_for={name: made_for(x) for name, x in _sources(recipe).items()},
        )
    )
    return text.rstrip() + "\n"


def _beside(recipe: Recipe, name: str, command: str, origin: str) -> str:
    """A file of the package that is no kernel's: from the template of its name."""
    problem = recipe.problem
    recurrence = recurrence_named(problem.op)
    languages = dict.fromkeys(language_of(x) for x in recipe.configs)
    text = (
        templates()
        .get_template(f"package/{name}.jinja")
        .render(
            problem=problem,
            recurrence=recurrence,
            name=recurrence.public.chunk,
            tied=recurrence.tied,
            given=given_inputs(problem),
            languages=" and ".join(["triton", *(x for x in languages if x != "triton")]),
            command=wrapped_command(command),
            origin=filled(origin),
        )
    )
    return text.rstrip() + "\n"


def _sources(recipe: Recipe) -> dict[str, str]:
    """Of the modules beside `__init__.py`, by name. Launches follow each other: what a package
    launches before a stage, and that it launches anything, is its caller's."""
    problem, recipe = recipe.problem, recipe.independent()
    found = {x.stage: render(problem, x.stage, x).source for x in recipe.configs}
    if problem.varlen:
        found["chunk_tables"] = render_tables(problem, recipe.BT).source
    return found


def _least_bound(recipe: Recipe) -> int:
    """Nats; kernels that count on the gate's bound must be given none below it."""
    counted_on = any(x.get("decay") == "bounded" for x in recipe.configs)
    return -recipe.problem.bound if counted_on else int(LEAST_BOUND)


def _allocation(buffer: Buffer, problem: Problem) -> str:
    """The expression that allocates a buffer, from its dims: `q.new_empty(NT, HV, BT, K)`."""
    if buffer.takes is not None:
        return buffer.takes
    dims = [x.replace("+", " + ") for x in buffer.symbols]
    kind = "new_zeros" if buffer.zeroed else "new_empty"
    dtype = [] if buffer.dtype == problem.dtype else [f"dtype={_in_torch(buffer.dtype)}"]
    return f"q.{kind}({', '.join([*dims, *dtype])})"


def _parts_of_heads(steps: Iterable[Step]) -> dict[str, int]:
    """Symbols of sums over so many heads of a group each, as `runtime.call.Call.sizes` has them."""
    symbols = {y for step in steps for x in step.buffers for y in x.symbols}
    return {x: int(x.removeprefix("HP")) for x in sorted(symbols) if x.startswith("HP")}


def _in_torch(dtype: str) -> str:
    return f"torch.{DTYPE[dtype].full_name}"


def _arguments(step: Step, problem: Problem) -> tuple[str, ...]:
    """Of the launch, in order."""
    values = {"n_sequences": "N", "n_chunks": "NT"}
    if problem.gate != "sigmoid":
        values["lower_bound"] = "0.0"
    # packages copy what does not lie in one piece
    values |= {
        row_of(x.name): f"HV * {problem.V // unit_of(x.symbols)}" if "V" in x.symbols else "HV"
        for x in recurrence_named(problem.op).inputs
        if x.apart
    }
    return (*step.tensors, *(f"{name}={values.get(name, name)}" for name in step.scalars))


def _folded(recurrence: Recurrence) -> dict[str, str]:
    """The gradient of each input from the kernels', which is per value head, or in parts."""
    made = {name: x.dims.split() for name, x in outputs_of(recurrence.name).items()}
    found = {}
    for x in recurrence.differentiable:
        gradient = recurrence.gradients[x.name]
        dims = made[gradient]
        parts = [i for i, symbol in enumerate(dims) if symbol not in ("HV", "HP", *x.symbols)]
        places = str(parts[0] if len(parts) == 1 else tuple(parts))
        whole = f"{gradient}.sum({places})" if parts else gradient
        if x.dtype == "parameter":
            heads, *rest = x.symbols
            found[x.name] = f"{whole}.view({', '.join([heads, '-1', *rest])}).sum(1)"
        else:
            found[x.name] = whole if dims == [*x.symbols] else f"_fold({whole}, {x.name})"
    return found


def _shapes_read(recurrence: Recurrence, folded: Mapping[str, str]) -> set[str]:
    """Inputs of which the backward needs sizes and dtypes, if nothing else."""
    sized = {recurrence.inputs[place].name for place in recurrence.sized_by}
    return sized | {name for name, words in folded.items() if words.startswith("_fold(")}
