"""Run a recipe: allocate the workspace, launch the stages in order, free what no stage needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdn2gen import build
from gdn2gen.ahead import compile_in_thread
from gdn2gen.call import Call
from gdn2gen.config import Config, default_config, language_of
from gdn2gen.direct import direct_launch
from gdn2gen.knobs import cuda_compiler, interpreted
from gdn2gen.problem import Problem
from gdn2gen.render import render
from gdn2gen.sequences import chunk_tables
from gdn2gen.stages import STAGES, Operand

if TYPE_CHECKING:
    from gdn2gen.dispatch import Recipe

TORCH_DTYPE = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int32": torch.int32,
}
# Chunks past the end of a packed batch write nothing, and these two are summed over chunks.
SUMMED = ("dA_log", "ddt_bias")

GRADIENTS = ("dq", "dk", "dv", "dg", "db", "dw", "dh0", "dA_log", "ddt_bias")

_poisoned = False


def poison(enabled: bool) -> None:
    """Fill every buffer with NaN before the kernels write it: what was left out then shows."""
    global _poisoned
    _poisoned = enabled


@dataclass(frozen=True)
class _Buffer:
    """One output of a stage: the buffer whose place it takes, or its dims by symbol and dtype."""

    name: str
    takes: str | None
    symbols: tuple[str, ...]
    dtype: torch.dtype
    zeroed: bool

    @classmethod
    def of(cls, operand: Operand, problem: Problem, takes: str | None = None) -> _Buffer:
        symbols = operand.dims.split()
        if problem.state_v_first and operand.name in ("final_state", "dh0"):
            symbols[-2:] = symbols[:-3:-1]
        dtype = TORCH_DTYPE[operand.dtype_in(problem)]
        return cls(operand.name, takes, tuple(symbols), dtype, operand.name in SUMMED)

    def allocate(self, sizes: Mapping[str, int], device: torch.device) -> Tensor:
        if self.symbols == ("0",):
            return _nothing(self.dtype, device)
        shape = [sizes[symbol] for symbol in self.symbols]
        if self.zeroed:
            return torch.zeros(shape, dtype=self.dtype, device=device)
        if _poisoned and self.dtype.is_floating_point:
            return torch.full(shape, float("nan"), dtype=self.dtype, device=device)
        return torch.empty(shape, dtype=self.dtype, device=device)


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Stands for scratch that a config makes no use of; nobody writes to it."""
    return torch.empty(0, dtype=dtype, device=device)


@dataclass(frozen=True)
class _Step:
    """One stage of a pass: what is allocated, launched with which arguments, and freed."""

    name: str
    launch: Callable[..., None]
    tensors: tuple[str, ...]
    scalars: tuple[str, ...]
    count: str
    """The scalar that counts its programs."""
    buffers: tuple[_Buffer, ...]
    freed: tuple[str, ...]


class Runner:
    """A recipe with its kernels loaded; call `run` with the stages of one direction."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.problem = recipe.problem
        self._passes: dict[tuple[Any, ...], tuple[_Step, ...]] = {}
        self._backward_planned = False

    @cached_property
    def BT(self) -> int:
        return self.recipe.configs[self.recipe.plan.forward[0]].size("BT")

    @cached_property
    def without_final_state(self) -> Problem:
        return replace(self.problem, final_state=False)

    def launcher(self, problem: Problem, stage_name: str) -> Callable[..., None]:
        """The launch function of a stage, rendered and loaded."""
        config = self.recipe.configs[stage_name]
        if language_of(config) != "triton" and _only_triton(stage_name):
            config = default_config(stage_name, problem, BT=config.size("BT"))
        module = build.load(render(problem, stage_name, config))
        if interpreted():
            launch: Callable[..., None] = module.launch
            return launch
        if language_of(config) == "tilelang":
            compile_in_thread(module)
        return direct_launch(module)

    def plan_backward(self) -> None:
        """Render and load the backward now: what threads compile for it is then ready in time.

        Without a gradient of the final state, which a training step seldom has.
        """
        if not self._backward_planned:
            self._backward_planned = True
            self._pass(self.recipe.plan.backward, self.without_final_state, GRADIENTS, True)

    def run(
        self,
        stage_names: tuple[str, ...],
        problem: Problem,
        call: Call,
        tensors: Mapping[str, Tensor],
        keep: tuple[str, ...],
        *,
        in_place: bool = True,
        observe: Callable[[str, Callable[[], None]], None] | None = None,
    ) -> dict[str, Tensor]:
        """Launch `stage_names` in order and return the tensors named in `keep`.

        `tensors` are the inputs by name. Every output is allocated when its stage comes, and
        dropped after the last stage that reads it. `observe` is given each stage's name and a
        callable that launches it again on the same buffers.
        """
        steps = self._pass(stage_names, problem, keep, in_place)
        alive = dict(tensors)
        sizes, scalars = call.sizes(problem, self.BT), call.scalars(self.BT)
        with _device_guard(call.device):
            for step in steps:
                for buffer in step.buffers:
                    alive[buffer.name] = (
                        buffer.allocate(sizes, call.device)
                        if buffer.takes is None
                        else alive[buffer.takes]
                    )
                arguments: dict[str, Any] = {name: alive[name] for name in step.tensors}
                arguments |= {name: scalars[name] for name in step.scalars}
                launch = partial(step.launch, **arguments)
                if scalars[step.count] * call.HV > 0:
                    launch()
                    if observe is not None:
                        observe(step.name, launch)
                for name in step.freed:
                    del alive[name]
        return {name: alive[name] for name in keep if name in alive}

    def _pass(self, *key: Any) -> tuple[_Step, ...]:
        """`_steps`, looked up by one key: finding out again took half of a call on the host."""
        if key not in self._passes:
            self._passes[key] = self._steps(*key)
        return self._passes[key]

    def _steps(
        self, stage_names: tuple[str, ...], problem: Problem, keep: tuple[str, ...], in_place: bool
    ) -> tuple[_Step, ...]:
        steps = []
        alive: set[str] = set()
        for position, name in enumerate(stage_names):
            stage = STAGES[name]
            operands = stage.operands(problem)
            written = {x.name for x in stage.outputs}
            outputs = [x for x in operands if x.name in written]
            alive |= {x.name for x in operands}
            needed = {x.name for later in stage_names[position + 1 :] for x in STAGES[later].inputs}
            freed = alive - needed - {*keep}
            alive -= freed
            config = self.recipe.configs[name]
            steps.append(
                _Step(
                    name,
                    self.launcher(problem, name),
                    tensors=tuple(x.name for x in operands),
                    scalars=(stage.count, *stage.scalars),
                    count=stage.count,
                    buffers=tuple(self._buffer(x, problem, config, in_place) for x in outputs),
                    freed=tuple(freed),
                )
            )
        return tuple(steps)

    def _buffer(self, x: Operand, problem: Problem, config: Config, in_place: bool) -> _Buffer:
        buffer = _Buffer.of(x, problem, in_place_of(x, problem) if in_place else None)
        return replace(buffer, symbols=("0",)) if x.is_idle(config) else buffer


def _only_triton(stage_name: str) -> bool:
    """Whether other languages cannot be compiled here; says so where that costs time."""
    if interpreted():
        return True  # Triton's interpreter stands in for a GPU, and interprets nothing else
    if cuda_compiler() is not None:
        return False
    warnings.warn(
        f"the tuned {stage_name} is written in TileLang, which needs nvcc, and none was found in "
        "CUDA_HOME, CUDA_PATH, on PATH or in /usr/local/cuda: the slower default in Triton runs "
        "instead. Install the CUDA toolkit, or say where it is with CUDA_HOME",
        RuntimeWarning,
        stacklevel=2,
    )
    return True


def in_place_of(operand: Operand, problem: Problem) -> str | None:
    """The buffer that this output takes the place of, if it does.

    A program of grad_key reads its part of G before it writes the same part of dg.
    """
    return "G" if operand.name == "dg" and problem.gate_dtype == "fp32" else None


def empty(
    operand: Operand, problem: Problem, sizes: Mapping[str, int], device: torch.device
) -> Tensor:
    """A buffer for one output of a stage; `sizes` gives the value of every symbol in dims."""
    return _Buffer.of(operand, problem).allocate(sizes, device)


def forward(
    runner: Runner, call: Call, tensors: Mapping[str, Tensor], save: Iterable[str]
) -> dict[str, Tensor]:
    """Output `o`, `final_state` if the problem has one, and the tensors named in `save`."""
    tables = packed_tables(tensors, call, runner.BT)
    keep = ("o", "final_state", *save)
    return runner.run(
        runner.recipe.plan.forward, runner.problem, call, {**tensors, **tables}, keep
    )


def backward(
    runner: Runner, call: Call, tensors: Mapping[str, Tensor], has_dht: bool
) -> dict[str, Tensor]:
    """Gradients of every input, from `do` (and `dht`), the inputs and what the forward saved."""
    tables = packed_tables(tensors, call, runner.BT)
    problem = runner.problem if has_dht else runner.without_final_state
    return runner.run(runner.recipe.plan.backward, problem, call, {**tensors, **tables}, GRADIENTS)


def packed_tables(tensors: Mapping[str, Tensor], call: Call, BT: int) -> dict[str, Tensor]:
    if not call.packed:
        return {}
    tables = chunk_tables(tensors["cu_seqlens"], call.T, BT)
    return {
        "chunk_table": tables.chunk_table,
        "chunk_offsets": tables.chunk_offsets,
        "cu_seqlens": tables.cu_seqlens,
    }


def stage_calls(
    runner: Runner, call: Call, tensors: Mapping[str, Tensor]
) -> list[tuple[str, Callable[[], None]]]:
    """Every stage of the plan, forward then backward, as a callable that launches it again.

    Each runs on the buffers that a whole pass filled, so that its time is that of real operands.
    `tensors` holds the inputs, and `do` for the backward.
    """
    calls: list[tuple[str, Callable[[], None]]] = []
    runner.run(
        (*runner.recipe.plan.forward, *runner.recipe.plan.backward),
        runner.problem,
        call,
        {**tensors, **packed_tables(tensors, call, runner.BT)},
        keep=(),
        in_place=False,
        observe=lambda name, launch: calls.append((name, launch)),
    )
    return calls


def _device_guard(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()
