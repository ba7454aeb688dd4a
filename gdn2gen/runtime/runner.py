"""Run a recipe: load its kernels, and have its stages launched in order, forward and backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from gdn2gen.base.environment import interpreted
from gdn2gen.codegen import build
from gdn2gen.codegen.background import compile_in_thread
from gdn2gen.codegen.direct import direct_launch
from gdn2gen.codegen.nvrtc import has_compiler
from gdn2gen.codegen.render import render, render_tables
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config, default_config, language_of
from gdn2gen.kernels.operands import GIVEN_SEQUENCES, GRADIENT_OF, OUTPUT, TABLES
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.stage import Operand, has_operand
from gdn2gen.kernels.stages import STAGES
from gdn2gen.runtime.call import Call
from gdn2gen.runtime.layout import Layout
from gdn2gen.runtime.passes import Buffer, Pass, Step, in_place_of

GRADIENTS = tuple(GRADIENT_OF.values())
OUTPUTS = ("o", "final_state")


class Runner:
    """A recipe with its kernels loaded; `at` the sizes of a call it runs either direction.

    `agreed_segments`, if given, are those that the forward saves, whatever the recipe says.
    """

    def __init__(self, recipe: Recipe, agreed_segments: int | None = None) -> None:
        self.recipe = recipe
        self._agreed_segments = agreed_segments
        self.problem = recipe.problem
        self.backward_planned = False
        self._steps_of: dict[tuple[Any, ...], tuple[Step, ...]] = {}

    @cached_property
    def BT(self) -> int:
        return self.recipe.BT

    @cached_property
    def without_final_state(self) -> Problem:
        return replace(self.problem, final_state=False)

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Those that are given, in the order of the op's arguments, but for cu_seqlens."""
        optional = {
            "initial_state": self.problem.initial_state,
            "A_log": self.problem.has_A_log,
            "dt_bias": self.problem.has_dt_bias,
        }
        return tuple(name for name in GRADIENT_OF if optional.get(name, True))

    @cached_property
    def saved(self) -> tuple[Operand, ...]:
        """What the forward saves for the backward, in order."""
        plan = self.recipe.plan
        made = {x.name: x for name in plan.forward for x in STAGES[name].outputs}
        wanted = {*plan.saves, "q_rstd", "k_rstd"}
        found = [x for x in made.values() if x.name in wanted]
        return tuple(x for x in (*found, *TABLES) if has_operand(x, self.problem))

    @cached_property
    def kept_of_forward(self) -> tuple[str, ...]:
        return (*OUTPUTS, *(x.name for x in self.saved))

    def max_segments(self, stage: str) -> int:
        """`Recipe.max_segments`, or what was agreed on where that depends on what is saved."""
        if self._agreed_segments is not None and stage in ("rescan", self.recipe.plan.forward[-1]):
            return self._agreed_segments
        return self.recipe.max_segments(stage)

    def at(self, call: Call) -> SizedRunner:
        """The same for all calls of these sizes."""
        return _sized(self, call)

    def layout_at(self, call: Call) -> Layout:
        """Of what the forward saves, as one buffer; formulas where sizes are symbols."""
        segments = self.max_segments(self.recipe.plan.forward[-1])
        return Layout.of(self.saved, self.problem, call.sizes(self.problem, self.BT, segments))

    def launcher(self, problem: Problem, stage_name: str) -> Callable[..., None]:
        """The launch function of a stage, rendered and loaded."""
        config = self.recipe[stage_name]
        if language_of(config) != "triton" and _only_triton(stage_name):
            config = default_config(stage_name, problem, BT=config.size("BT"))
        module = build.load(render(problem, stage_name, config))
        if interpreted():
            return _interpreting(module.launch)
        if language_of(config) == "tilelang":
            compile_in_thread(module)
        return direct_launch(module)

    def table_launchers(self) -> tuple[Callable[..., None], Callable[..., None]]:
        """What makes the tables of a packed batch, and what clears gradients of no sequence."""
        module = build.load(render_tables(self.problem, self.BT))
        if interpreted():
            return _interpreting(module.launch), _interpreting(module.clear)
        # one for each dtype of cu_seqlens: a direct launch is for the dtypes of its first one
        by_dtype = {x: direct_launch(module) for x in (torch.int32, torch.int64)}

        def launch(given: Tensor, *others: Tensor, **scalars: int) -> None:
            by_dtype[given.dtype](given, *others, **scalars)

        return launch, direct_launch(module, "clear")

    def plan_backward(self) -> None:
        """Render and load the backward now: what threads compile for it is then ready in time.

        Without a gradient of the final state, which a training step seldom has.
        """
        if not self.backward_planned:
            self.backward_planned = True
            self._steps(self.recipe.plan.backward, self.without_final_state, GRADIENTS, True)

    def sized_pass(
        self,
        stage_names: tuple[str, ...],
        problem: Problem,
        call: Call,
        keep: tuple[str, ...],
        *,
        in_place: bool = True,
    ) -> Pass:
        """`stage_names` in order at the sizes of `call`; it returns the tensors named in `keep`."""
        steps = self._steps(stage_names, problem, keep, in_place)
        return Pass(steps, keep, call, problem, self.BT)

    def inference_pass(self, call: Call) -> Pass:
        """The forward where no gradient is wanted: `o`, and `final_state` if the problem has one.

        A serial scan then leaves no state behind at the start of segments.
        """
        forward = self.recipe.plan.forward
        steps = self._steps(forward, self.problem, self.kept_of_forward, True)
        parallel = {x for x in forward if self.recipe[x].get("segments") == "parallel"}
        whole = tuple(x if x.name in parallel else replace(x, max_segments=1) for x in steps)
        return Pass(whole, OUTPUTS, call, self.problem, self.BT)

    def _steps(self, *key: Any) -> tuple[Step, ...]:
        """`_make_steps`, looked up by one key: they load kernels."""
        if key not in self._steps_of:
            self._steps_of[key] = self._make_steps(*key)
        return self._steps_of[key]

    def _make_steps(
        self, stage_names: tuple[str, ...], problem: Problem, keep: tuple[str, ...], in_place: bool
    ) -> tuple[Step, ...]:
        steps = []
        alive: set[str] = set()
        first_made: set[str] = set()
        plan = self.recipe.plan
        if problem.varlen and stage_names[0] == plan.forward[0]:
            steps.append(self._tables_step(problem))
            first_made = {x.name for x in steps[0].buffers}
        whole = stage_names[-1] == plan.backward[-1]
        clear = self._clear_step() if problem.varlen and whole else None
        for position, name in enumerate(stage_names):
            stage = STAGES[name]
            operands = stage.operands(problem)
            written = {x.name for x in stage.outputs} - first_made
            outputs = [x for x in operands if x.name in written]
            alive |= {x.name for x in operands}
            needed = {x.name for later in stage_names[position + 1 :] for x in STAGES[later].inputs}
            freed = alive - needed - {*keep, *(clear.tensors if clear else ())}
            alive -= freed
            config = self.recipe[name]
            steps.append(
                Step(
                    name,
                    self.launcher(problem, name),
                    tensors=tuple(x.name for x in operands),
                    scalars=(stage.count, *stage.scalars),
                    count=stage.count,
                    buffers=tuple(self._buffer(x, problem, config, in_place) for x in outputs),
                    freed=tuple(freed),
                    max_segments=self.max_segments(name),
                )
            )
        return (*steps, clear) if clear else tuple(steps)

    def _tables_step(self, problem: Problem) -> Step:
        """The tables of a packed batch; and o, which is cleared where no sequence lies."""
        made = (OUTPUT, *TABLES)
        return Step(
            "chunk_tables",
            self.table_launchers()[0],
            tensors=(GIVEN_SEQUENCES, *(x.name for x in made)),
            scalars=("n_sequences", "n_chunks", "T", "HV"),
            count="n_chunks",
            buffers=tuple(Buffer.of(x, problem) for x in made),
            freed=(GIVEN_SEQUENCES,),
            max_segments=1,
        )

    def _clear_step(self) -> Step:
        return Step(
            "clear",
            self.table_launchers()[1],
            tensors=("cu_seqlens", *GRADIENTS[:6]),
            scalars=("n_sequences", "T", "HV"),
            count="n_sequences",
            buffers=(),
            freed=(),
            max_segments=1,
        )

    def _buffer(self, x: Operand, problem: Problem, config: Config, in_place: bool) -> Buffer:
        buffer = Buffer.of(x, problem, in_place_of(x, problem) if in_place else None)
        return replace(buffer, idle=not config.form.uses(x))


class SizedRunner:
    """A runner at the sizes of one call."""

    def __init__(self, runner: Runner, call: Call) -> None:
        self.runner = runner
        self.call = call
        self.input_names = runner.inputs
        self.saved_names = tuple(x.name for x in runner.saved)
        self.gradient_names = tuple((name, GRADIENT_OF[name]) for name in runner.inputs)

    def forward(
        self, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Output `o`, `final_state` if the problem has one, and what the backward wants saved.

        `tensors` are the inputs by name, and `given_cu_seqlens` for a packed batch. What is saved
        lies in the tensors of `into`, if they are given.
        """
        return self._forward.run(tensors, into or {})

    def infer(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs alone, the same bits."""
        return self._inference.run(tensors)

    def backward(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of every input, from `do`, `dht` if given, the inputs and what was saved."""
        chosen = self._backward_with_dht if "dht" in tensors else self._backward
        return chosen.run(tensors)

    @cached_property
    def layout(self) -> Layout:
        """Of what the forward saves, as one buffer."""
        return self.runner.layout_at(self.call)

    @cached_property
    def _forward(self) -> Pass:
        runner = self.runner
        stages, keep = runner.recipe.plan.forward, runner.kept_of_forward
        return runner.sized_pass(stages, runner.problem, self.call, keep)

    @cached_property
    def _inference(self) -> Pass:
        return self.runner.inference_pass(self.call)

    @cached_property
    def _backward(self) -> Pass:
        return self._backward_of(self.runner.without_final_state)

    @cached_property
    def _backward_with_dht(self) -> Pass:
        return self._backward_of(self.runner.problem)

    def _backward_of(self, problem: Problem) -> Pass:
        stages = self.runner.recipe.plan.backward
        return self.runner.sized_pass(stages, problem, self.call, GRADIENTS)


@lru_cache(maxsize=512)  # of 22 KB
def _sized(runner: Runner, call: Call) -> SizedRunner:
    return SizedRunner(runner, call)


def _interpreting(launch: Callable[..., None]) -> Callable[..., None]:
    from gdn2gen.codegen.interpreter import one_at_a_time  # imports Triton

    return one_at_a_time(launch)


def _only_triton(stage_name: str) -> bool:
    """Whether other languages cannot be compiled here; says so where that costs time."""
    if interpreted():
        return True  # Triton's interpreter stands in for a GPU, and interprets nothing else
    if has_compiler():
        return False
    warnings.warn(
        f"the tuned {stage_name} is written in TileLang, and there is nothing to compile it with, "
        "neither nvcc (in CUDA_HOME, CUDA_PATH, on PATH or in /usr/local/cuda) nor NVRTC with its "
        "headers: the slower default in Triton runs instead. To have NVRTC: pip install "
        "nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-cccl",
        RuntimeWarning,
        stacklevel=2,
    )
    return True


def stage_calls(
    runner: Runner, call: Call, tensors: Mapping[str, Tensor]
) -> list[tuple[str, Callable[[], None]]]:
    """Every stage of the plan, forward then backward, as a callable that launches it again.

    Each runs on the buffers that a whole pass filled, so that its time is that of real operands.
    `tensors` holds the inputs, and `do` for the backward.
    """
    calls: list[tuple[str, Callable[[], None]]] = []
    plan = runner.recipe.plan
    stages = (*plan.forward, *plan.backward)
    whole = runner.sized_pass(stages, runner.problem, call, keep=(), in_place=False)
    given = {GIVEN_SEQUENCES if x == "cu_seqlens" else x: y for x, y in tensors.items()}
    whole.run(given, observe=lambda name, launch: calls.append((name, launch)))
    return calls
