"""A package of kernels for one problem, which needs torch and triton but not gdn2gen."""

from __future__ import annotations

import ast
import hashlib
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gdn2gen.base.dtypes import DTYPE
from gdn2gen.codegen.render import render, render_tables
from gdn2gen.codegen.templates import templates
from gdn2gen.family.problem import LEAST_BOUND, Problem
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.operands import GIVEN_SEQUENCES, GRADIENT_OF, OUTPUT, TABLES
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.scans import SEGMENT
from gdn2gen.kernels.stage import Operand, Stage, has_operand
from gdn2gen.kernels.stages import STAGES
from gdn2gen.runtime._package_files import write_package
from gdn2gen.runtime.passes import SUMMED, in_place_of

TEMPLATE: Final = "package/__init__.py.jinja"
_LINE: Final = 100
_GENERATE: Final = "gdn2gen generate "


@dataclass(frozen=True)
class Step:
    """One stage as the package launches it, or what a packed batch needs around them."""

    stage: str
    """The module."""
    buffers: tuple[tuple[str, str], ...]
    """Name of each output, and the expression that allocates it."""
    arguments: tuple[str, ...]
    """Of `launch`, in order."""
    per_chunk: bool
    """One program per chunk, so that there is nothing to launch without tokens."""
    freed: tuple[str, ...]
    """Buffers that nothing reads after this stage."""
    max_segments: int | None = None
    """For what runs segments; None for the others."""
    function: str = "launch"


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
    inputs = _inputs(problem)
    scalars = ["scale", *(["lower_bound"] if problem.gate == "sigmoid" else [])]
    kept = _kept(problem, plan.forward, plan.backward)
    forward = _steps(recipe, plan.forward, kept | {"o", "final_state"})
    gradients = {name: GRADIENT_OF[name] for name in inputs if name != GIVEN_SEQUENCES}
    backward = _steps(recipe, plan.backward, {*gradients.values()})
    if problem.varlen:
        forward, backward = _around(forward, backward)
    made = [name for step in forward for name, _ in step.buffers]
    text = (
        templates()
        .get_template(TEMPLATE)
        .render(
            problem=problem,
            plan=plan,
            modules=sorted({x.stage for x in (*forward, *backward)}),
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


def _inputs(problem: Problem) -> list[str]:
    """Tensor arguments of the autograd function."""
    flags = {
        "initial_state": problem.initial_state,
        "A_log": problem.has_A_log,
        "dt_bias": problem.has_dt_bias,
        GIVEN_SEQUENCES: problem.varlen,
    }
    return ["q", "k", "v", "g", "b", "w", *(name for name, given in flags.items() if given)]


def _kept(problem: Problem, forward: Iterable[str], backward: Iterable[str]) -> set[str]:
    """What the backward reads and does not make itself."""
    needed: set[str] = {"q", "k", "v", "g", "b"}  # their sizes and dtypes, if nothing else
    made = {"do", "dht"}
    for name in backward:
        stage = STAGES[name]
        needed |= {x.name for x in stage.inputs if has_operand(x, problem)} - made
        made |= {x.name for x in stage.outputs}
    return needed


def _steps(recipe: Recipe, names: tuple[str, ...], kept: set[str]) -> list[Step]:
    problem, steps = recipe.problem, []
    alive: dict[str, None] = {}
    for position, name in enumerate(names):
        stage = STAGES[name]
        config = recipe[name]
        outputs = [x for x in stage.outputs if has_operand(x, problem)]
        alive |= dict.fromkeys(x.name for x in outputs)
        later = {x.name for other in names[position + 1 :] for x in STAGES[other].inputs}
        freed = [x for x in alive if x not in later | kept]
        alive = {x: None for x in alive if x not in freed}
        if position == len(names) - 1:
            freed = []
        steps.append(
            Step(
                stage=name,
                buffers=tuple((x.name, _allocation(x, problem, config)) for x in outputs),
                arguments=_arguments(stage, problem),
                per_chunk=stage.count == "n_chunks",
                freed=tuple(freed),
                max_segments=recipe.max_segments(name) if "NS" in stage.scalars else None,
            )
        )
    return steps


def _around(forward: list[Step], backward: list[Step]) -> tuple[list[Step], list[Step]]:
    """The stages of a packed batch: after its tables are made, and before gradients are cleared."""
    tables = Step(
        stage="chunk_tables",
        buffers=(
            (OUTPUT.name, "q.new_empty(B, T, HV, V)"),
            ("cu_seqlens", "q.new_empty(N + 1, dtype=torch.int32)"),
            ("chunk_offsets", "q.new_empty(N + 1, dtype=torch.int32)"),
            ("chunk_table", "q.new_empty(NT, 2, dtype=torch.int32)"),
        ),
        arguments=(GIVEN_SEQUENCES, OUTPUT.name, *(x.name for x in TABLES), *_words("N NT T HV")),
        per_chunk=False,
        freed=(),
    )
    rest = [
        replace(step, buffers=tuple(x for x in step.buffers if x[0] != OUTPUT.name))
        for step in forward
    ]
    gradients = [f"d{name}" for name in ("q", "k", "v", "g", "b", "w")]
    arguments = ("cu_seqlens", *gradients, *_words("N T HV"))
    clear = Step("chunk_tables", (), arguments, False, (), function="clear")
    return [tables, *rest], [*backward, clear]


def _words(scalars: str) -> list[str]:
    names = {"N": "n_sequences", "NT": "n_chunks"}
    return [f"{names.get(x, x)}={x}" for x in scalars.split()]


def _allocation(operand: Operand, problem: Problem, config: Config) -> str:
    """The expression that allocates an output, from its dims: `q.new_empty(NT, HV, BT, K)`."""
    reused = in_place_of(operand, problem)
    if reused is not None:
        return reused
    dims = operand.dims.split() if config.form.uses(operand) else ["0"]
    if problem.state_v_first and operand.name in ("final_state", "dh0"):
        dims[-2:] = dims[:-3:-1]
    kind = "new_zeros" if operand.name in SUMMED else "new_empty"
    dtype = operand.dtype_in(problem)
    words = [*dims, *([] if dtype == problem.dtype else [f"dtype={_in_torch(dtype)}"])]
    return f"q.{kind}({', '.join(words)})"


def _in_torch(dtype: str) -> str:
    return f"torch.{DTYPE[dtype].full_name}"


def _arguments(stage: Stage, problem: Problem) -> tuple[str, ...]:
    unread = {} if problem.gate == "sigmoid" else {"lower_bound": "0.0"}
    count = {"n_sequences": "n_sequences=N", "n_chunks": "n_chunks=NT"}[stage.count]
    return (
        *(x.name for x in stage.operands(problem)),
        count,
        *(f"{name}={unread.get(name, name)}" for name in stage.scalars),
    )


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
