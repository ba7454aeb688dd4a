"""CUDA graphs of every op over whole sequences: replays with other contents, capacity to spare.

Shapes at the capture are the capacity: sequences that are not there have no tokens, and tokens past
the last one are of nobody. Graphs of a few tokens are in test_recurrent_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import compiled_checks
import prefill_cases
import pytest
import torch
from compiled_checks import EVERY_OP
from gpu_support import DEVICE, Tensors, draw, moved, other_stream, sized
from prefill_cases import BF16, Case, Drawn
from torch import Tensor

from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import OPS
from gdn2gen.measure.accuracy import op_flags, public_op, run_op

pytestmark = pytest.mark.gpu

T: Final = 700
# Of at most six sequences: fewer of them, tokens of nobody at the end, and none at all.
LENGTHS: Final = (
    (0, 100, 101, 330, 331, 640, T),
    (0, 0, 640, 641, 641, 641, 641),
    (0, 350, 350, 699, T, T, T),
    (0, 0, 0, 0, 0, 0, 0),
)


def problem_of(op: str) -> Problem:
    return Problem(op=op, K=64, V=64, varlen=True, initial_state=True, final_state=True)


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of one call, after two that compile and work out launches, and what it returned."""
    with other_stream():
        for _ in range(2):
            call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    return graph, held


def lengths(*given: int) -> Tensor:
    return torch.tensor(given, device=DEVICE)


def batches(problem: Problem) -> list[tuple[Tensors, Tensors]]:
    """Other tensors and lengths, of the same shapes."""
    found = []
    for i, ends in enumerate(LENGTHS):
        inputs, grads = draw(problem, sized(1, T, 4, LENGTHS[0]), ("mixed", "layer")[i % 2])
        inputs["cu_seqlens"] = lengths(*ends)
        found.append((inputs, grads))
    return found


def refill(into: Tensors, other: Tensors) -> None:
    for name, x in into.items():
        x.copy_(other[name])


@pytest.mark.parametrize("level", ["lean", "fast"])
@pytest.mark.parametrize("op", OPS)
def test_training(op: str, level: str) -> None:
    problem = problem_of(op)

    def train(inputs: Tensors, grads: Tensors) -> Tensors:
        def call(**given: Any) -> Any:
            return public_op(op)(**given, disable_recompute=level == "fast")

        return run_op(call, problem, inputs, grads)

    (inputs, grads), *others = batches(problem)
    graph, held = captured(lambda: train(inputs, grads))
    for other_inputs, other_grads in (*others, batches(problem)[0]):
        expected = train(other_inputs, other_grads)
        refill(inputs, other_inputs)
        refill(grads, other_grads)
        for x in held.values():
            x.fill_(torch.nan)
        graph.replay()
        assert not moved(expected, held), (op, level)
        end = int(other_inputs["cu_seqlens"][-1])
        past = {x: y for x, y in held.items() if y.shape[:2] == (1, T)}
        assert past and not any(y[:, end:].any() for y in past.values()), "rows past the end"


@pytest.mark.parametrize("op", OPS)
def test_inference(op: str) -> None:
    problem = problem_of(op)
    flags = op_flags(problem)

    @torch.no_grad()
    def infer(inputs: Tensors) -> tuple[Tensor, Tensor | None]:
        return public_op(op)(**inputs, **flags, output_final_state=True)

    (inputs, _), *others = batches(problem)
    graph, (o, state) = captured(lambda: infer(inputs))
    assert state is not None
    for other, _ in others:
        expected = infer(other)
        refill(inputs, other)
        o.fill_(torch.nan)
        state.fill_(torch.nan)
        graph.replay()
        assert torch.equal(o, expected[0]) and torch.equal(state, expected[1])  # type: ignore[arg-type]


# Prefill for serving


PREFILL: Final = {
    **{op: Case(op=op, lengths=(70, 0, 128, 5, 0), every=64, K=64, V=64) for op in OPS},
    "bf16": Case(lengths=(70, 0, 128, 5, 0), dtype=BF16, state_dtype=BF16, every=128, v_first=True),
    "rows": Case(op="kda", lengths=None, N=5, T=130, every=64),
}
PREFILL = {x: replace(y, begins=(True, False, True, True, True)) for x, y in PREFILL.items()}
# Of the same shapes: as many tokens, other lengths, other padding, others begin anew.
CHANGES: Final[tuple[dict[str, Any], ...]] = (
    {"lengths": (0, 203, 0, 0, 0), "padding": (), "begins": (False,) * 5},
    {"lengths": (64, 64, 64, 11, 0), "padding": (0,), "begins": (True,) * 5},
    {},
)


def _prefill(case: Case, drawn: Drawn) -> Tensor:
    with torch.no_grad():
        o, _ = public_op(case.op)(**drawn.inputs, **drawn.serving, **case.flags)
    return o


def _table_of(drawn: Drawn, columns: int) -> Tensor:
    """Checkpoints' slots with as many columns; -1 in those that are not there."""
    given: Tensor = drawn.serving["checkpoint_state_indices"]
    table = given.new_full((len(given), columns), -1)
    table[:, : given.shape[1]] = given[:, :columns]
    return table


@pytest.mark.parametrize("name", PREFILL)
def test_prefill(name: str) -> None:
    """Slots, padding, checkpoints and lengths of each replay are those in memory then."""
    case = PREFILL[name]
    drawn = prefill_cases.draw(case, DEVICE)
    slots, columns = len(drawn.storage), drawn.serving["checkpoint_state_indices"].shape[1]
    drawn.serving["checkpoint_state_indices"] = _table_of(drawn, columns)
    graph, o = captured(lambda: _prefill(case, drawn))
    for changes in CHANGES:
        rowwise = {x: y for x, y in changes.items() if x != "lengths" or case.lengths}
        other_case = replace(case, **rowwise)
        other = prefill_cases.draw(other_case, DEVICE)
        # what of the other case is past this pool's end names no slot here, and has no row
        other.storage = _rows_of(other, slots)
        other.serving["state_pool"] = _pool_in(other.storage, drawn)
        other.serving["checkpoint_state_indices"] = _table_of(other, columns)
        o_exact, storage_exact = prefill_cases.exact(other_case, other)
        for x, y in drawn.inputs.items():
            y.copy_(other.inputs[x])
        for x, y in drawn.serving.items():
            if isinstance(y, Tensor) and x != "state_pool":
                y.copy_(other.serving[x])
        drawn.storage.copy_(other.storage)
        before = drawn.storage.clone()
        o.fill_(torch.nan)
        graph.replay()
        prefill_cases.compare(other_case, drawn, before, o, o_exact, storage_exact)


def _rows_of(other: Drawn, slots: int) -> Tensor:
    storage = other.storage.new_full((slots, other.storage.shape[1]), prefill_cases.SENTINEL)
    count = min(slots, len(other.storage))
    storage[:count] = other.storage[:count]
    return storage


def _pool_in(storage: Tensor, like: Drawn) -> Tensor:
    shape = like.serving["state_pool"].shape
    return storage[:, : shape[1:].numel()].unflatten(1, shape[1:])


@pytest.mark.parametrize("op", ["gdn2", "gated_delta_rule"])
def test_states_on_the_way(op: str) -> None:
    problem = problem_of(op)
    flags = op_flags(problem)

    @torch.no_grad()
    def infer(inputs: Tensors) -> Any:
        call: Any = public_op(op)
        return call(**inputs, **flags, output_final_state=True, return_intermediate_states=True)

    (inputs, _), *others = batches(problem)
    graph, held = captured(lambda: infer(inputs))
    for other, _ in others:
        expected = infer(other)
        refill(inputs, other)
        for x in held:
            x.fill_(torch.nan)
        graph.replay()
        for x, y in zip(held, expected, strict=True):
            assert torch.equal(x, y)


# torch.compile


def steps_of(name: str) -> Iterator[Tensors]:
    """Inputs of calls of one size: other contents, other lengths."""
    for i, ends in enumerate(((0, 3, 90), (0, 3, 90), (0, 3, 90), (0, 64, 80), (0, 90, 90))):
        _, given = compiled_checks.drawn(name, 90, packed=True)
        inputs = {
            x: y.to(DEVICE) * (1 if x == "cu_seqlens" else 1 + i / 8) for x, y in given.items()
        }
        if "g" in inputs:
            inputs["g"] = -inputs["g"].abs()
        inputs["cu_seqlens"] = lengths(*ends)
        yield inputs


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("op", compiled_checks.PLAIN)
def test_compiled(op: str, mode: str) -> None:
    """Whole graphs, replayed with other contents: eager mode's bits, forward and backward."""
    torch._dynamo.reset()
    function = compiled_checks.both(op)
    step = torch.compile(function, fullgraph=True, mode=mode)
    for i, inputs in enumerate(steps_of(op)):
        expected = compiled_checks.train_both(function, inputs)
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled_checks.train_both(step, inputs)
        assert not moved(expected, found), i


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", [x for x in EVERY_OP if x not in compiled_checks.PLAIN])
def test_compiled_with_what_is_around_it(name: str, mode: str) -> None:
    """Where Inductor makes some of what surrounds the kernels."""
    torch._dynamo.reset()
    function, _ = compiled_checks.drawn(name, 90, packed=True)
    step = torch.compile(function, fullgraph=True, mode=mode)
    for inputs in steps_of(name):
        expected = compiled_checks.train(function, inputs)
        torch.compiler.cudagraph_mark_step_begin()
        found = [x.clone() for x in compiled_checks.train(step, inputs)]
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)
