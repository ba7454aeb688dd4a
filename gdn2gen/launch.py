"""Run a recipe: allocate the workspace, launch the stages in order, free what no stage needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdn2gen import build
from gdn2gen.config import default_config, language_of
from gdn2gen.knobs import interpreted
from gdn2gen.problem import Problem
from gdn2gen.render import render
from gdn2gen.sequences import chunk_tables, count_chunks
from gdn2gen.stages import SEGMENT, STAGES, Operand

if TYPE_CHECKING:
    from gdn2gen.dispatch import Recipe

TORCH_DTYPE = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int32": torch.int32,
}
# Chunks past the end of a packed batch write nothing, and these two are summed over chunks.
_SUMMED = ("dA_log", "ddt_bias")

STAGE_INPUTS = {name: frozenset(x.name for x in stage.inputs) for name, stage in STAGES.items()}

_poisoned = False


def poison(enabled: bool) -> None:
    """Fill every buffer with NaN before the kernels write it: what was left out then shows."""
    global _poisoned
    _poisoned = enabled


@dataclass(frozen=True)
class Call:
    """Sizes and scalars of one call, by the symbols of the stage contracts."""

    B: int
    T: int
    H: int
    HV: int
    HG: int
    N: int
    scale: float
    lower_bound: float | None
    packed: bool
    device: torch.device

    def chunks(self, BT: int) -> int:
        return count_chunks(self.T, self.N, BT, self.packed)

    def segments(self, BT: int) -> tuple[int, int]:
        """Segments of a sequence, and chunks of a segment.

        Sequences of a packed batch are one segment each: their lengths are not known on the host.
        """
        if self.packed:
            return 1, 2**24
        return max(1, -(-self.T // (BT * SEGMENT))), SEGMENT

    def sizes(self, problem: Problem, BT: int) -> dict[str, int]:
        return {
            "B": self.B,
            "T": self.T,
            "H": self.H,
            "HV": self.HV,
            "HG": self.HG,
            "N": self.N,
            "N+1": self.N + 1,
            "NT": self.chunks(BT),
            "NS": self.segments(BT)[0],
            "BT": BT,
            "NB": BT // 16,
            "K": problem.K,
            "V": problem.V,
            "2": 2,
        }


@dataclass(frozen=True)
class _Contract:
    """A stage's operands for one problem: argument names in order, and what it writes."""

    names: tuple[str, ...]
    outputs: tuple[Operand, ...]


@lru_cache(maxsize=1024)
def _contract(stage_name: str, problem: Problem) -> _Contract:
    stage = STAGES[stage_name]
    operands = stage.operands(problem)
    written = {x.name for x in stage.outputs}
    return _Contract(
        tuple(x.name for x in operands), tuple(x for x in operands if x.name in written)
    )


class Runner:
    """A recipe with its kernels loaded; call `run` with the stages of one direction."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.problem = recipe.problem
        self._launchers: dict[tuple[Problem, str], Callable[..., None]] = {}

    @cached_property
    def BT(self) -> int:
        return self.recipe.configs[self.recipe.plan.forward[0]].size("BT")

    def launcher(self, problem: Problem, stage_name: str) -> Callable[..., None]:
        key = (problem, stage_name)
        if key not in self._launchers:
            config = self.recipe.configs[stage_name]
            if interpreted() and language_of(config) != "triton":
                # Triton's interpreter stands in for a GPU, and interprets nothing else
                config = default_config(stage_name, problem, BT=config.size("BT"))
            module = build.load(render(problem, stage_name, config))
            self._launchers[key] = module.launch
        return self._launchers[key]

    def run(
        self,
        stage_names: Iterable[str],
        problem: Problem,
        call: Call,
        tensors: Mapping[str, Tensor],
        keep: Iterable[str],
        *,
        in_place: bool = True,
        observe: Callable[[str, Callable[[], None]], None] | None = None,
    ) -> dict[str, Tensor]:
        """Launch `stage_names` in order and return the tensors named in `keep`.

        `tensors` are the inputs by name. Every output is allocated when its stage comes, and
        dropped after the last stage that reads it. `observe` is given each stage's name and a
        callable that launches it again on the same buffers.
        """
        names = list(stage_names)
        alive = dict(tensors)
        kept = set(keep)
        sizes = call.sizes(problem, self.BT)
        with _device_guard(call.device):
            for position, name in enumerate(names):
                for operand in _contract(name, problem).outputs:
                    reused = in_place_of(operand, problem) if in_place else None
                    alive[operand.name] = (
                        empty(operand, problem, sizes, call.device)
                        if reused is None
                        else alive[reused]
                    )
                launch = self._bind(problem, name, call, alive)
                launch()
                if observe is not None:
                    observe(name, launch)
                needed = kept.union(*(STAGE_INPUTS[later] for later in names[position + 1 :]))
                alive = {key: value for key, value in alive.items() if key in needed}
        return {key: alive[key] for key in kept if key in alive}

    def _bind(
        self, problem: Problem, name: str, call: Call, alive: Mapping[str, Tensor]
    ) -> Callable[[], None]:
        stage = STAGES[name]
        launcher = self.launcher(problem, name)
        contract = _contract(name, problem)
        arguments: dict[str, Any] = {x: alive[x] for x in contract.names}
        per_sequence = stage.template in ("scan", "reverse_scan")
        if per_sequence:
            arguments["n_sequences"] = call.N
        else:
            arguments["n_chunks"] = call.chunks(self.BT)
        NS, segment = call.segments(self.BT)
        for scalar in stage.scalars:
            if scalar not in ("NS", "segment"):
                arguments[scalar] = getattr(call, scalar)
        if "NS" in stage.scalars:
            arguments |= {"NS": NS, "segment": segment}
        if arguments.get("lower_bound", 0.0) is None:
            arguments["lower_bound"] = 0.0
        programs = call.N if per_sequence else call.chunks(self.BT)

        def launch() -> None:
            if programs * call.HV > 0:
                launcher(**arguments)

        return launch


def in_place_of(operand: Operand, problem: Problem) -> str | None:
    """The buffer that this output takes the place of, if it does.

    A program of grad_key reads its part of G before it writes the same part of dg.
    """
    return "G" if operand.name == "dg" and problem.gate_dtype == "fp32" else None


def empty(
    operand: Operand, problem: Problem, sizes: Mapping[str, int], device: torch.device
) -> Tensor:
    """A buffer for one output of a stage; `sizes` gives the value of every symbol in dims."""
    shape = [sizes[symbol] for symbol in operand.dims.split()]
    if problem.state_v_first and operand.name in ("final_state", "dh0"):
        shape[-2:] = shape[:-3:-1]
    dtype = TORCH_DTYPE[operand.dtype_in(problem)]
    if operand.name in _SUMMED:
        return torch.zeros(shape, dtype=dtype, device=device)
    if _poisoned and dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device)


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
    problem = replace(runner.problem, final_state=has_dht)
    keep = ("dq", "dk", "dv", "dg", "db", "dw", "dh0", "dA_log", "ddt_bias")
    return runner.run(runner.recipe.plan.backward, problem, call, {**tensors, **tables}, keep)


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
