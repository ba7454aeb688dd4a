"""Schedule: the launches of one direction in order, and when their buffers live. By symbols.

Who runs a recipe fills in the sizes of a call; who writes a package of it writes the same down.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final

from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import recurrence_named
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.operands import GIVEN_SEQUENCES, OUTPUT, TABLES
from gdn2gen.kernels.plans import stages_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.stage import Operand, has_operand, is_of
from gdn2gen.kernels.stages import STAGES

OUTPUTS: Final = ("o", "final_state")
# Chunks past the end of a packed batch write nothing, and these are summed over chunks.
SUMMED: Final = ("dA_log", "ddt_bias", "drate", "dD")
_STATES: Final = ("final_state", "dh0")
_TABLES: Final = "chunk_tables"


@dataclass(frozen=True)
class Buffer:
    """One output of a launch: its dims by symbol and dtype, or the buffer whose place it takes."""

    name: str
    symbols: tuple[str, ...]
    dtype: str
    """By the name that problems use."""
    takes: str | None = None
    cleared: bool = False
    """Whether it holds zeros from the start because no kernel clears what no sequence covers."""

    @classmethod
    def of(cls, operand: Operand, problem: Problem) -> Buffer:
        symbols = operand.dims.split()
        if problem.state_v_first and operand.name in _STATES:
            symbols[-2:] = symbols[:-3:-1]
        symbols = [str(-(-problem.V // 16)) if x == "NZ" else x for x in symbols]
        return cls(operand.name, tuple(symbols), operand.dtype_in(problem))

    @property
    def zeroed(self) -> bool:
        """Whether it has to hold zeros where no kernel writes."""
        return self.name in SUMMED or self.cleared

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple([int(x) if x.isdigit() else sizes[x] for x in self.symbols])


@dataclass(frozen=True)
class Step:
    """One launch: what is allocated before it, its arguments, and what is freed after it."""

    module: str
    """The stage, or `chunk_tables` for what a packed batch needs around them."""
    tensors: tuple[str, ...]
    """In the order of the kernel's arguments."""
    scalars: tuple[str, ...]
    count: str
    """The scalar that counts its programs, beside heads and slices."""
    buffers: tuple[Buffer, ...]
    freed: tuple[str, ...] = ()
    """Of the buffers up to here, those that nothing needs any more."""
    max_segments: int = 1
    """Of all heads and sequences together, as it was chosen for the stage's scan."""
    function: str = "launch"


def given_inputs(problem: Problem) -> tuple[str, ...]:
    """Tensors that a caller gives, in the order of the op's arguments, but for cu_seqlens."""
    inputs = recurrence_named(problem.op).differentiable
    return tuple(x.name for x in inputs if not x.when or getattr(problem, x.when))


def gradients_of(problem: Problem) -> Mapping[str, str]:
    """What the kernels call the gradient of each input that a problem of this op may have."""
    return recurrence_named(problem.op).gradients


def cleared_of(problem: Problem) -> tuple[Operand, ...]:
    """Gradients of what is given of tokens, in order: a packed batch's are cleared where no
    sequence lies. Those that a config says how many heads have are zeros from the start."""
    made = outputs_of(problem.op)
    gradients = gradients_of(problem)
    given = recurrence_named(problem.op).named
    tokens = [made[gradients[x]] for x in given_inputs(problem) if "T" in given[x].symbols]
    return tuple(x for x in tokens if "HP" not in x.dims.split())


def outputs_of(op: str) -> dict[str, Operand]:
    """What the kernels of a member may make, by name."""
    return {x.name: x for stage in stages_of(op) for x in STAGES[stage].outputs if is_of(x, op)}


def read_by(problem: Problem, stages: tuple[str, ...]) -> set[str]:
    """Operands that a chain of stages reads and does not make itself."""
    read: set[str] = set()
    made: set[str] = set()
    for name in stages:
        read |= {x.name for x in STAGES[name].inputs if has_operand(x, problem)} - made
        made |= {x.name for x in STAGES[name].outputs if has_operand(x, problem)}
    return read


def saved_by(recipe: Recipe) -> tuple[Operand, ...]:
    """What the forward makes and the backward reads, but for the output, in order."""
    problem, plan = recipe.problem, recipe.plan
    wanted = read_by(problem, plan.backward) - {*OUTPUTS}
    outputs = [x for name in plan.forward for x in STAGES[name].outputs]
    made = {x.name: x for x in outputs if has_operand(x, problem)}
    return tuple(x for x in (*made.values(), *TABLES) if x.name in wanted)


def schedule(
    recipe: Recipe,
    stages: tuple[str, ...],
    keep: Collection[str],
    *,
    in_place: bool = True,
) -> tuple[Step, ...]:
    """The launches of `stages`, and of what a packed batch needs around them.

    A buffer is freed after the last launch that reads it, but for those named in `keep` and those
    that are left at the end. `in_place`: outputs may take the place of what is read before them.
    """
    problem, plan = recipe.problem, recipe.plan
    steps = [_tables(problem)] if problem.varlen and stages[0] == plan.forward[0] else []
    before = {x.name for step in steps for x in step.buffers}
    alive = dict.fromkeys(x.name for step in steps for x in step.buffers)
    last = [_clear(problem)] if problem.varlen and stages[-1] == plan.backward[-1] else []
    kept = {*keep, *(name for step in last for name in step.tensors)}
    for position, name in enumerate(stages):
        stage = STAGES[name]
        config = recipe[name]
        operands = config.operands(problem)
        made = [x for x in operands if x in stage.outputs and x.name not in before]
        alive |= dict.fromkeys(x.name for x in made)
        rest = stages[position + 1 :]
        reads = [(STAGES[later].inputs, recipe[later].operands(problem)) for later in rest]
        needed = {x.name for inputs, given in reads for x in given if x in inputs} | kept
        freed = [x for x in alive if x not in needed] if rest else []
        alive = {x: None for x in alive if x not in freed}
        steps.append(
            Step(
                name,
                tensors=tuple(x.name for x in operands),
                scalars=(stage.count, *stage.scalars_of(problem)),
                count=stage.count,
                buffers=tuple(_buffer(x, problem, config, in_place) for x in made),
                freed=tuple(freed),
                max_segments=recipe.max_segments(name),
            )
        )
    return (*steps, *last)


def _tables(problem: Problem) -> Step:
    """The tables of a packed batch; and o, which is cleared where no sequence lies."""
    made = (OUTPUT, *TABLES)
    return Step(
        _TABLES,
        tensors=(GIVEN_SEQUENCES, *(x.name for x in made)),
        scalars=("n_sequences", "n_chunks", "T", "HV"),
        count="n_chunks",
        buffers=tuple(Buffer.of(x, problem) for x in made),
    )


def _clear(problem: Problem) -> Step:
    """Gradients of tokens are cleared where no sequence lies."""
    return Step(
        _TABLES,
        tensors=("cu_seqlens", *(x.name for x in cleared_of(problem))),
        scalars=("n_sequences", "T", "HV"),
        count="n_sequences",
        buffers=(),
        function="clear",
    )


def _buffer(operand: Operand, problem: Problem, config: Config, in_place: bool) -> Buffer:
    # a program of grad_key reads its part of G before it writes the same part of dg
    shares = (
        in_place
        and (operand.name, operand.of, problem.gate_dtype) == ("dg", "channel", "fp32")
        and any(x.name == "G" for x in config.operands(problem))
    )
    buffer = Buffer.of(operand, problem)
    if "NK" in buffer.symbols:
        slices = str(-(-problem.K // config.size("BK")))
        symbols = tuple(slices if x == "NK" else x for x in buffer.symbols)
        buffer = replace(buffer, symbols=symbols)
    if "HP" in buffer.symbols:
        parts = f"HP{config.size('heads')}"
        symbols = tuple(parts if x == "HP" else x for x in buffer.symbols)
        # of what lies by tokens: those of no sequence have zeros
        by_tokens = "T" in buffer.symbols
        buffer = replace(buffer, symbols=symbols, cleared=problem.varlen and by_tokens)
    return replace(buffer, takes="G" if shares else None)
