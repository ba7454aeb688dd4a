"""Run a recipe: its kernels loaded, its stages launched in order, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.family.prefill import plain
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.operands import GIVEN_SEQUENCES
from gdn2gen.kernels.recipe import Recipe, takes_segments
from gdn2gen.kernels.schedule import OUTPUTS, Step, given_inputs, gradients_of, saved_by, schedule
from gdn2gen.kernels.stage import Operand
from gdn2gen.kernels.stages import STAGES
from gdn2gen.runtime._loading import runnable, stage_launcher, table_launchers
from gdn2gen.runtime.bound import Bound
from gdn2gen.runtime.call import Call
from gdn2gen.runtime.layout import Layout
from gdn2gen.runtime.passes import Loaded, Pass, is_poisoned


class Runner:
    """A recipe with its kernels loaded; `at` the sizes of a call it runs either direction.

    `agreed_segments`, if given, are those that the forward saves, whatever the recipe says.
    """

    def __init__(self, recipe: Recipe, agreed_segments: int | None = None) -> None:
        self.recipe = recipe = runnable(recipe)
        self._agreed_segments = agreed_segments
        self.problem = recipe.problem
        self.backward_planned = False
        self._steps_of: dict[tuple[Any, ...], tuple[Loaded, ...]] = {}

    @cached_property
    def BT(self) -> int:
        return self.recipe.BT

    @cached_property
    def without_final_state(self) -> Problem:
        return replace(self.problem, final_state=False)

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Those that are given, in the order of the op's arguments, but for cu_seqlens."""
        return given_inputs(self.problem)

    @cached_property
    def gradients(self) -> tuple[str, ...]:
        """What the backward makes, by the kernels' names."""
        return tuple(gradients_of(self.problem).values())

    @cached_property
    def saved(self) -> tuple[Operand, ...]:
        """What the forward saves for the backward, in order."""
        return saved_by(self.recipe)

    @cached_property
    def kept_of_forward(self) -> tuple[str, ...]:
        return (*OUTPUTS, *(x.name for x in self.saved))

    def max_segments(self, stage: str) -> int:
        """`Recipe.max_segments`, or what was agreed on where that depends on what is saved."""
        of_forward = takes_segments(stage) or stage == self.recipe.plan.forward[-1]
        if self._agreed_segments is not None and of_forward:
            return self._agreed_segments
        return self.recipe.max_segments(stage)

    def at(self, call: Call) -> SizedRunner:
        """The same for all calls of these sizes."""
        # of a call without tokens the first stages launch nothing: others would be a pass's first
        return _sized(self._independent if call.T == 0 else self, call)

    @cached_property
    def _independent(self) -> Runner:
        recipe = self.recipe.independent()
        return self if recipe is self.recipe else Runner(recipe, self._agreed_segments)

    def layout_at(self, call: Call) -> Layout:
        """Of what the forward saves, as one buffer; formulas where sizes are symbols."""
        segments = self.max_segments(self.recipe.plan.forward[-1])
        return Layout.of(self.saved, self.problem, call.sizes(self.problem, self.BT, segments))

    def launcher(self, problem: Problem, stage_name: str) -> Callable[..., None]:
        """The launch function of a stage."""
        # who makes states may keep some of them for who asks (`PrefillProblem`)
        if not STAGES[stage_name].checkpoint_scalars:
            problem = plain(problem)
        return stage_launcher(problem, self.recipe[stage_name])

    def table_launchers(self) -> tuple[Callable[..., None], Callable[..., None]]:
        """Those of what a packed batch needs around the stages."""
        return table_launchers(plain(self.problem), self.BT)

    def plan_backward(self) -> None:
        """Render and load the backward now: what threads compile for it is then ready in time.

        Without a gradient of the final state, which a training step seldom has.
        """
        if not self.backward_planned:
            self.backward_planned = True
            self._steps(self.recipe.plan.backward, self.without_final_state, self.gradients, True)

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

    def inference_pass(self, call: Call, keep: tuple[str, ...] = OUTPUTS) -> Pass:
        """The forward where no gradient is wanted: `o`, and `final_state` if the problem has one.

        A serial scan then leaves no state behind at the start of segments.
        """
        forward = self.recipe.plan.forward
        steps = self._steps(forward, self.problem, self.kept_of_forward, True)
        parallel = {x for x in forward if self.recipe[x].get("segments") == "parallel"}
        whole = tuple(
            x if x.step.module in parallel else x._replace(step=replace(x.step, max_segments=1))
            for x in steps
        )
        return Pass(whole, keep, call, self.problem, self.BT)

    def _steps(self, *key: Any) -> tuple[Loaded, ...]:
        """`_make_steps`, looked up by one key: they load kernels."""
        if key not in self._steps_of:
            self._steps_of[key] = self._make_steps(*key)
        return self._steps_of[key]

    def _make_steps(
        self, stage_names: tuple[str, ...], problem: Problem, keep: tuple[str, ...], in_place: bool
    ) -> tuple[Loaded, ...]:
        recipe = replace(self.recipe, problem=problem)
        steps = schedule(recipe, stage_names, keep, in_place=in_place)
        return tuple(Loaded(self._agreed(step), self._launcher(step, problem)) for step in steps)

    def _agreed(self, step: Step) -> Step:
        if step.module not in STAGES:
            return step
        return replace(step, max_segments=self.max_segments(step.module))

    def _launcher(self, step: Step, problem: Problem) -> Callable[..., None]:
        if step.module in STAGES:
            return self.launcher(problem, step.module)
        launch, clear = self.table_launchers()
        return clear if step.function == "clear" else launch


SAVED: Final = "saved"
"""Among the inputs of a backward: what a forward saved, as one buffer."""


class Quickly:
    """A pass by its bound launches, once it has run; see `Bound`."""

    def __init__(self, bind: Callable[[Mapping[str, Tensor]], Bound | None]) -> None:
        self._bind = bind
        self._bound: dict[torch.dtype | None, Bound | None] = {}
        self._tries = 4
        """Kernels may be compiled for other arguments first."""

    def run(self, addresses: list[int], packed: torch.dtype | None) -> list[Tensor] | None:
        """What the pass makes, in order; None where it has to run itself. `packed` is the dtype of
        cu_seqlens."""
        bound = self._bound.get(packed)
        return None if bound is None or is_poisoned() else bound.run(addresses)

    def learn(self, inputs: Mapping[str, Tensor], packed: torch.dtype | None) -> None:
        """Bind the pass, which has run on `inputs`: by name, in the order of addresses."""
        if self._tries and self._bound.get(packed) is None:
            self._bound[packed] = self._bind(inputs)
            self._tries -= self._bound[packed] is None


class SizedRunner:
    """A runner at the sizes of one call."""

    def __init__(self, runner: Runner, call: Call) -> None:
        self.runner = runner
        self.call = call
        self.input_names = runner.inputs
        rows = dict(call.rows)
        self.rows = tuple(rows.get(x, 0) for x in runner.inputs) if rows else ()
        """How far rows of each input lie apart, 0 where they do not; nothing where none do."""
        self.saved_names = tuple(x.name for x in runner.saved)
        gradients = gradients_of(runner.problem)
        self.gradient_names = tuple((name, gradients[name]) for name in runner.inputs)
        self.folded: dict[bool, Any] = {}
        """Kept by who sums gradients over what their inputs lack; by whether there is a dht."""

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

    def prefill(
        self, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The same in the tensors of `into`, and where sequences of a packed batch lie."""
        return self._prefill.run(tensors, into)

    def backward(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of every input, from `do`, `dht` if given, the inputs and what was saved."""
        chosen = self._backward_with_dht if "dht" in tensors else self._backward
        return chosen.run(tensors)

    @cached_property
    def inference(self) -> Quickly:
        """`infer`."""
        return Quickly(lambda inputs: self._inference.bound(inputs))

    @cached_property
    def training(self) -> Quickly:
        """`forward`: outputs, and what is saved as one buffer."""
        return Quickly(lambda inputs: self._forward.bound(inputs, saved=self.layout))

    @cached_property
    def backwards(self) -> tuple[Quickly, Quickly]:
        """`backward`, from what `training` saved: without `dht`, and with it."""
        given = SAVED, self.layout
        return (
            Quickly(lambda inputs: self._backward.bound(inputs, given)),
            Quickly(lambda inputs: self._backward_with_dht.bound(inputs, given)),
        )

    @cached_property
    def dense(self) -> SizedRunner:
        """The same for inputs whose rows do not lie apart; what it saves is laid out alike."""
        return self.runner.at(replace(self.call, rows=()))

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
    def _prefill(self) -> Pass:
        return self.runner.inference_pass(self.call, (*OUTPUTS, "cu_seqlens"))

    @cached_property
    def _backward(self) -> Pass:
        return self._backward_of(self.runner.without_final_state)

    @cached_property
    def _backward_with_dht(self) -> Pass:
        return self._backward_of(self.runner.problem)

    def made_backwards(self, dht: bool) -> tuple[str, ...]:
        """What the backward returns, in order."""
        return (self._backward_with_dht if dht else self._backward).kept

    def _backward_of(self, problem: Problem) -> Pass:
        stages = self.runner.recipe.plan.backward
        return self.runner.sized_pass(stages, problem, self.call, self.runner.gradients)


@lru_cache(maxsize=512)  # of 22 KB
def _sized(runner: Runner, call: Call) -> SizedRunner:
    return SizedRunner(runner, call)


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
