"""Calls over whole sequences for serving: states out of slots of a pool and back, and on the way.

The stages are those of any forward. Before them a kernel reads what sequences begin with, and after
them one writes what they ended with (`state_slots.py.jinja`), so that every scan serves. States on
the way are written by the scan itself, each once and in fp32 as it is carried: of the forms of the
scan one does that, so a recipe with another one has it exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.codegen.build import load
from gdn2gen.codegen.render import render_slots
from gdn2gen.family.prefill import INTERMEDIATE_TOKENS, PrefillProblem
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.rows import UNIT
from gdn2gen.runtime._kernels import named_inputs
from gdn2gen.runtime._loading import launcher_of
from gdn2gen.runtime.arguments import IO_DTYPES
from gdn2gen.runtime.decoding import Strided, slot_stride_of
from gdn2gen.runtime.lookup import Request, find_for
from gdn2gen.runtime.passes import empty
from gdn2gen.runtime.runner import Runner, SizedRunner
from gdn2gen.store.surroundings import Surroundings, surroundings


@dataclass(frozen=True, eq=False)
class Pools:
    """What a call is given beside the tensors of its recurrence, checked."""

    state_pool: Tensor | None = None
    ssm_state_indices: Tensor | None = None
    has_initial_state: Tensor | None = None
    checkpoint_state_indices: Tensor | None = None
    null_slot: int | None = None
    every: int = 0
    """Tokens from one state on the way to the next; 0 without any."""


def rows_of_states(tokens: int, sequences: int, packed: bool) -> int:
    """How many states of `return_intermediate_states` there may be."""
    if packed:
        return tokens // INTERMEDIATE_TOKENS + sequences
    return sequences * -(-tokens // INTERMEDIATE_TOKENS)


def run_prefill(
    request: Request,
    decay: str,
    given: Mapping[str, Tensor],
    cu_seqlens: Tensor | None,
    pools: Pools,
    o: Tensor,
    final_state: Tensor | None,
    states: Tensor | None,
) -> None:
    """Write o, the final state and the states on the way where they are given, and slots.

    `given` are the tensors that are given, by name, but for cu_seqlens; the problem of `request`
    has an initial and a final state where there is a pool.
    """
    device = request.call.device
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, torch.no_grad():
        _run(request, decay, given, cu_seqlens, pools, o, final_state, states)


def _run(
    request: Request,
    decay: str,
    given: Mapping[str, Tensor],
    cu_seqlens: Tensor | None,
    pools: Pools,
    o: Tensor,
    final_state: Tensor | None,
    states: Tensor | None,
) -> None:
    call, problem = request.call, request.problem
    slots = None if pools.state_pool is None else _Slots(problem, pools)
    kept: dict[str, Any] = {}
    if states is not None:
        kept = {"checkpoints": states, "checkpoint_slots": _rows(call, cu_seqlens)}
    elif slots is not None and slots.checkpoint_slots is not None:
        kept = {"checkpoints": pools.state_pool, "checkpoint_slots": slots.checkpoint_slots}
    sized = _sized(request, decay, kept, slots)
    into = {"o": o}
    if final_state is not None:
        into["final_state"] = final_state
    if slots is not None:
        inner = (problem.V, problem.K) if problem.state_v_first else (problem.K, problem.V)
        shape = (call.N, call.HV, *inner)
        initial = empty(shape, torch.float32, call.device)
        into["final_state"] = empty(shape, torch.float32, call.device)
        slots.read(initial)
        given = {**given, "initial_state": initial}
    tensors = named_inputs(sized, [given[x] for x in sized.input_names], cu_seqlens)
    found = sized.prefill(tensors | kept, into)
    if slots is not None:
        slots.put_back(found.get("cu_seqlens"), found["final_state"], o, call.T)


def _sized(request: Request, decay: str, kept: dict[str, Any], slots: _Slots | None) -> SizedRunner:
    call, checkpoints, odd = request.call, "", False
    if kept:
        table = kept["checkpoint_slots"]
        into_pool = slots is not None and kept["checkpoints"] is slots.pool
        every = slots.every if slots is not None and into_pool else INTERMEDIATE_TOKENS
        stride = kept["checkpoints"].stride(0) if len(kept["checkpoints"]) > 1 else 0
        if slots is not None and into_pool:
            stride = slots.stride
        odd = stride % UNIT != 0
        checkpoints = IO_DTYPES[kept["checkpoints"].dtype]
        call = replace(
            call,
            every=every,
            NC=table.shape[1],
            first_checkpoint=int(into_pool),
            slot_stride=stride if odd else stride // UNIT,
        )
    return _runner(request, decay, checkpoints, odd, surroundings()).at(call)


@lru_cache(maxsize=512)
def _runner(
    request: Request,
    decay: str,
    checkpoints: str,
    odd_slots: bool,
    read: tuple[Any, ...],
) -> Runner:
    apart, around = checkpoints != "", Surroundings.of(read)
    recipe = find_for(request, "lean", False, decay, around, scan_apart=apart).recipe
    if not checkpoints:
        return Runner(recipe)
    keeping = PrefillProblem.of(recipe.problem, checkpoints, odd_slots)
    return Runner(replace(recipe.keeping(), problem=keeping))


def _rows(call: Any, cu_seqlens: Tensor | None) -> Tensor:
    """[N, NC] int32: where the states on the way of each sequence go, one after the other."""
    columns = torch.arange(-(-call.T // INTERMEDIATE_TOKENS), device=call.device)
    if cu_seqlens is None:
        first = torch.arange(call.N, device=call.device) * len(columns)
    else:
        # as `chunk_tables` takes it: rising within the batch, whatever it holds
        ends = cu_seqlens.clamp(0, call.T).cummax(0).values
        counts = -((ends[:-1] - ends[1:]) // INTERMEDIATE_TOKENS)
        first = counts.cumsum(0) - counts
    return (first[:, None] + columns).to(torch.int32)


class _Slots:
    """The kernels between slots of a pool and the stages, on the tensors of one call."""

    def __init__(self, problem: Problem, pools: Pools) -> None:
        pool = pools.state_pool
        assert pool is not None
        self.pool, self.every = pool, pools.every
        self.stride = slot_stride_of(Strided(pool.shape, pool.dtype, pool.stride()))
        self._indices = _dense(pools.ssm_state_indices)
        flags = _dense(pools.has_initial_state)
        self._flags = None if flags is None else flags.view(torch.uint8)
        self._wanted = pools.checkpoint_state_indices
        if self._wanted is not None and self._wanted.stride(1) != 1:
            self._wanted = self._wanted.contiguous()
        self.checkpoint_slots = None
        if self._wanted is not None:
            shape, device = tuple(self._wanted.shape), self.pool.device
            self.checkpoint_slots = torch.empty(shape, dtype=torch.int32, device=device)
        odd = self.stride % UNIT != 0
        given = (self._indices, self._flags, self._wanted)
        self._launch, self._put_back = _launchers(
            problem, odd, self.pool.dtype, *(None if x is None else x.dtype for x in given)
        )
        self._scalars = {
            "slots": len(self.pool),
            "slot_stride": self.stride if odd else self.stride // UNIT,
            "null_slot": -1 if pools.null_slot is None else pools.null_slot,
        }

    def read(self, initial_state: Tensor) -> None:
        N, HV = initial_state.shape[:2]
        scalars = {"n_sequences": N, "HV": HV, **self._scalars}
        if self._wanted is not None:
            scalars |= {"NC": self._wanted.shape[1], "index_row": self._wanted.stride(0)}
        tensors = (self._indices, self._flags, self._wanted, self.checkpoint_slots)
        if N * HV > 0:
            self._launch(self.pool, *_given(*tensors), initial_state, **scalars)

    def put_back(self, cu_seqlens: Tensor | None, final: Tensor, o: Tensor, tokens: int) -> None:
        N, HV = final.shape[:2]
        scalars = {"n_sequences": N, "HV": HV, "T": tokens, **self._scalars}
        if self._wanted is not None:
            scalars |= {"NC": self._wanted.shape[1], "every": self.every}
        tensors = _given(self._indices, cu_seqlens, self.checkpoint_slots)
        if N * HV > 0:
            self._put_back(self.pool, *tensors, final, o, **scalars)


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


_MOST: Final = 256


@lru_cache(maxsize=_MOST)
def _launchers(
    problem: Problem,
    odd_slots: bool,
    _pool: torch.dtype,
    indices: torch.dtype | None,
    flags: torch.dtype | None,
    checkpoints: torch.dtype | None,
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Of one kind: a direct launch is for the dtypes of its first one."""
    module = load(
        render_slots(
            problem,
            indexed=indices is not None,
            flagged=flags is not None,
            checkpoints=checkpoints is not None,
            odd_slots=odd_slots,
        )
    )
    return launcher_of(module), launcher_of(module, "put_back")
