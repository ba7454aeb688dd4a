"""A package of kernels for one problem, which needs torch and triton but not gdn2gen."""

from __future__ import annotations

import ast
import hashlib
import textwrap
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Final

from gdn2gen.base.dtypes import DTYPE
from gdn2gen.codegen._package_files import write_package
from gdn2gen.codegen.render import render, render_tables
from gdn2gen.codegen.templates import templates
from gdn2gen.family.problem import LEAST_BOUND, Problem
from gdn2gen.kernels.operands import GIVEN_SEQUENCES
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.scans import SEGMENT
from gdn2gen.kernels.schedule import (
    OUTPUTS,
    Buffer,
    Step,
    given_inputs,
    gradients_of,
    read_by,
    schedule,
)

TEMPLATE: Final = "package/__init__.py.jinja"
_LINE: Final = 100
_GENERATE: Final = "gdn2gen generate "


def generate_package(
    recipe: Recipe, out_dir: str | Path, command: str, *, force: bool = False
) -> list[Path]:
    """Write one file per stage of the recipe's plan, and an `__init__.py` with `chunk_gdn2`.

    `command` is what makes the package again. The same arguments give the same bytes. An earlier
    package in `out_dir` is replaced as one: who looks sees the old or the new one. Raises
    InputError if the folder holds anything else, or (without `force`) files that were edited since
    they were generated.
    """
    texts = {f"{name}.py": source for name, source in _sources(recipe).items()}
    texts["__init__.py"] = package_source(recipe, command)
    return write_package(Path(out_dir), texts, force=force)


def package_source(recipe: Recipe, command: str) -> str:
    """The `__init__.py` of a package."""
    problem, plan = recipe.problem, recipe.plan
    inputs = [*given_inputs(problem), *([GIVEN_SEQUENCES] if problem.varlen else [])]
    scalars = ["scale", *(["lower_bound"] if problem.gate == "sigmoid" else [])]
    # of some inputs the backward needs the sizes and dtypes, if nothing else
    kept = {"q", "k", "v", "g", "b"} | read_by(problem, plan.backward)
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
            modules=sorted({x.module for x in (*forward, *backward)}),
            BT=recipe.BT,
            torch_dtype=_in_torch(problem.dtype),
            torch_gate_dtype=_in_torch(problem.gate_dtype),
            command=_wrapped_command(command),
            inputs=inputs,
            scalars=scalars,
            gradients=[_folded(gradients.get(name), name) for name in (*inputs, *scalars)],
            saved=[name for name in (*inputs, *made) if name in kept],
            forward=forward,
            backward=backward,
            lower_bound=_least_bound(recipe),
            allocation=partial(_allocation, problem=problem),
            arguments=partial(_arguments, problem=problem),
            wrapped=_wrapped,
            SEGMENT=SEGMENT,
            max_segments=recipe.saved_segments,
            made_for={name: _made_for(x) for name, x in _sources(recipe).items()},
        )
    )
    return text.rstrip() + "\n"


def _sources(recipe: Recipe) -> dict[str, str]:
    """Of the modules beside `__init__.py`, by name."""
    problem = recipe.problem
    found = {x.stage: render(problem, x.stage, x).source for x in recipe.configs}
    if problem.varlen:
        found["chunk_tables"] = render_tables(problem, recipe.BT).source
    return found


def _made_for(source: str) -> str:
    """Digest of the docstring of a module, as the package compares it."""
    words = " ".join((ast.get_docstring(ast.parse(source)) or "").split())
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _least_bound(recipe: Recipe) -> int:
    """Nats; kernels that count on the gate's bound must be given none below it."""
    counted_on = any(x.get("decay") == "bounded" for x in recipe.configs)
    return -recipe.problem.bound if counted_on else int(LEAST_BOUND)


def _allocation(buffer: Buffer, problem: Problem) -> str:
    """The expression that allocates a buffer, from its dims: `q.new_empty(NT, HV, BT, K)`."""
    if buffer.takes is not None:
        return buffer.takes
    dims = [x.replace("+", " + ") for x in (("0",) if buffer.idle else buffer.symbols)]
    kind = "new_zeros" if buffer.zeroed else "new_empty"
    dtype = [] if buffer.dtype == problem.dtype else [f"dtype={_in_torch(buffer.dtype)}"]
    return f"q.{kind}({', '.join([*dims, *dtype])})"


def _in_torch(dtype: str) -> str:
    return f"torch.{DTYPE[dtype].full_name}"


def _arguments(step: Step, problem: Problem) -> tuple[str, ...]:
    """Of the launch, in order."""
    values = {"n_sequences": "N", "n_chunks": "NT"}
    if problem.gate != "sigmoid":
        values["lower_bound"] = "0.0"
    return (*step.tensors, *(f"{name}={values.get(name, name)}" for name in step.scalars))


def _folded(gradient: str | None, name: str) -> str:
    """The gradient of an input from the kernels', which is per value head, or per chunk."""
    folds = {
        None: "None",
        "dA_log": "dA_log.sum((0, 2)).view(HG, -1).sum(1)",
        "ddt_bias": "ddt_bias.sum(0).view(HG, -1, K).sum(1)",
    }
    if name in ("q", "k", "g", "b"):
        return f"_fold({gradient}, {name})"
    return folds.get(gradient, str(gradient))


def _wrapped(words: Iterable[str], indent: int = 0) -> str:
    """Words with commas between them, in lines of at most 100 columns, each indented."""
    lines = textwrap.wrap(", ".join(words), _LINE - indent - 1)
    return "\n".join(" " * indent + line for line in lines) + ","


def _wrapped_command(command: str) -> str:
    # a backslash ends every line but the last, for the shell as for the docstring
    program, words = command[: len(_GENERATE)], command[len(_GENERATE) :]
    lines = textwrap.wrap(words, _LINE - 25, break_long_words=False, break_on_hyphens=False)
    return program + " \\\n        ".join(lines)


__all__ = ["generate_package", "package_source"]
