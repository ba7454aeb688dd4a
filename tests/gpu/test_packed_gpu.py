"""Packed batches: lengths that change under graphs, streams and compilation, and any content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from gpu_support import DEVICE, TRAIN, Tensors, draw, moved, other_stream, run, sized
from tilelang_configs import tilelang_recipe
from torch import Tensor

from gdn2gen.base.device import present_device
from gdn2gen.family.problem import Problem
from gdn2gen.measure.accuracy import OpFunction, op_flags, public_op, run_op
from gdn2gen.runtime.passes import poisoned
from gdn2gen.store.dispatch import find_recipe

pytestmark = pytest.mark.gpu

T = 700
LENGTHS = ((0, 100, 101, 330, T), (0, 0, 640, 641, T), (0, 350, 350, 699, T))
PROBLEMS = {
    f"K{size}": Problem(K=size, V=size, varlen=True, initial_state=True, final_state=True)
    for size in (64, 128)
}
PROBLEMS["kda-K64"] = replace(PROBLEMS["K64"], op="kda", beta_sigmoid=True, beta_fp32=True)


@pytest.fixture(params=PROBLEMS, name="problem")
def _problem(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]


def batch(problem: Problem) -> tuple[Tensors, Tensors]:
    return draw(problem, sized(1, T, 4, LENGTHS[0]))


def lengths(*given: int) -> Tensor:
    return torch.tensor(given, device=DEVICE)


def train(problem: Problem, inputs: Tensors, grads: Tensors, call: Any = None) -> Tensors:
    return run_op(call or public_op(problem.op), problem, inputs, grads)


def fresh(problem: Problem, inputs: Tensors, grads: Tensors, given: tuple[int, ...]) -> Tensors:
    return train(problem, inputs | {"cu_seqlens": lengths(*given)}, grads)


@pytest.mark.parametrize("how", ["data", "kernel"])
def test_lengths_written_where_no_version_counts(how: str, problem: Problem) -> None:
    inputs, grads = batch(problem)
    inputs["cu_seqlens"] = lengths(*LENGTHS[0])
    train(problem, inputs, grads)
    for given in LENGTHS[1:]:
        expected = fresh(problem, inputs, grads, given)
        if how == "data":
            inputs["cu_seqlens"].data.copy_(lengths(*given))
        else:
            torch.from_dlpack(inputs["cu_seqlens"]).copy_(lengths(*given))
        assert not moved(expected, train(problem, inputs, grads))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_graph_replays_other_lengths(dtype: torch.dtype, problem: Problem) -> None:
    inputs, grads = batch(problem)
    inputs["cu_seqlens"] = lengths(*LENGTHS[0]).to(dtype)
    with other_stream():
        for _ in range(2):
            train(problem, inputs, grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = train(problem, inputs, grads)
    for given in (*LENGTHS[1:], LENGTHS[0]):
        expected = fresh(problem, inputs, grads, given)
        inputs["cu_seqlens"].copy_(lengths(*given))
        for x in held.values():
            x.fill_(torch.nan)
        graph.replay()
        assert not moved(expected, held), given


def test_two_streams_share_lengths(problem: Problem) -> None:
    """The second asks for tables while the first, which was asked before, still sleeps."""
    inputs, grads = batch(problem)
    expected = fresh(problem, inputs, grads, LENGTHS[0])
    inputs["cu_seqlens"] = lengths(*LENGTHS[0])
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(first):
        torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
        slow = train(problem, inputs, grads)
    with torch.cuda.stream(second):
        quick = train(problem, inputs, grads)
    torch.cuda.synchronize()
    assert not moved(expected, quick)
    assert not moved(expected, slow)


def test_no_call_waits_for_the_gpu(problem: Problem) -> None:
    inputs, grads = batch(problem)
    train(problem, inputs, grads)
    inputs["cu_seqlens"] = lengths(*LENGTHS[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(problem, inputs, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


WILD = {
    "ends early": (0, 9, 25, 30, 130),
    "starts late": (123, 124, 300, 301, T),
    "ends late": (0, 39, 60, 699, 10**9),
    "falls": (0, 650, 100, 30, T),
    "far out": (-(2**40), 12, -5, 2**40, 3),
    "empty": (T, T, T, T, T),
}


@pytest.mark.parametrize(
    ("problem", "tilelang"),
    [*((x, False) for x in PROBLEMS), ("kda-K64", True)],
    indirect=["problem"],
)
@pytest.mark.parametrize("name", WILD)
def test_whatever_cu_seqlens_holds(name: str, problem: Problem, tilelang: bool) -> None:
    """As if it held what lies within the batch; the rest is zero, also over buffers of NaN."""
    inputs, grads = batch(problem)
    right: list[int] = []
    for x in WILD[name]:
        right.append(max(min(max(x, 0), T), *right[-1:], 0))
    start, end = right[0], right[-1]
    recipe = find_recipe(problem, TRAIN.regime, present_device(), strict=False).recipe
    if tilelang:
        recipe = tilelang_recipe(problem, "fast")
    with poisoned():
        found = run(recipe, inputs | {"cu_seqlens": lengths(*WILD[name])}, grads)
        expected = run(recipe, inputs | {"cu_seqlens": lengths(*right)}, grads)
    assert not moved(expected, found)
    for key, x in found.items():
        if "state" not in key:
            assert not x[:, :start].any() and not x[:, end:].any(), key
        assert x.isfinite().all(), key
    cut = {
        key: x if "state" in key or key == "cu_seqlens" else x[:, start:end].contiguous()
        for key, x in inputs.items()
    }
    cut["cu_seqlens"] = lengths(*(x - start for x in right))
    cut_grads = {
        key: x if "state" in key else x[:, start:end].contiguous() for key, x in grads.items()
    }
    alone = run(recipe, cut, cut_grads)
    inside = {key: x if "state" in key else x[:, start:end] for key, x in found.items()}
    assert not moved(alone, inside)


def test_inference_mode(problem: Problem) -> None:
    inputs, _ = batch(problem)
    op, flags = public_op(problem.op), op_flags(problem)
    expected, _ = op(**inputs, **flags)
    with torch.inference_mode():
        given: Any = {name: x.clone() for name, x in inputs.items()}
        o, _ = op(**given, **flags)
    assert torch.equal(o, expected)


# torch.compile


def block_of(problem: Problem) -> OpFunction:
    op = public_op(problem.op)

    def block(**arguments: Any) -> tuple[Tensor, Tensor | None]:
        o, state = op(**(arguments | {"v": arguments["v"] * 2}))
        return o * 0.5, state

    return block


def compiled(block: OpFunction, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(block, fullgraph=True, **options)


def near(expected: Tensors, found: Tensors) -> list[str]:
    """Inductor joins roundings around the op: 2 bits of bf16."""
    return [
        name
        for name, x in expected.items()
        if not (found[name].float() - x.float()).norm() <= 8e-3 * x.float().norm()
    ]


def test_compiled_lengths_within_the_batch(problem: Problem) -> None:
    block = block_of(problem)
    step = compiled(block)
    inputs, grads = batch(problem)
    for given in (*LENGTHS, *WILD.values()):
        expected = train(problem, inputs | {"cu_seqlens": lengths(*given)}, grads, block)
        found = train(problem, inputs | {"cu_seqlens": lengths(*given)}, grads, step)
        assert not near(expected, found), given
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("level", ["lean", "fast"])
def test_one_graph_serves_all_lengths(level: str, problem: Problem) -> None:
    plain = replace(problem, varlen=False)
    keeps = {"disable_recompute": level == "fast"}
    block = block_of(problem)
    step = partial(compiled(block, dynamic=True), **keeps)
    for tokens in (100, 333, 64, 1000, 4096, 70, 129, 200, 31, 500):
        inputs, grads = draw(plain, sized(2, tokens, 4))
        expected = train(plain, inputs, grads, partial(block, **keeps))
        assert not near(expected, train(plain, inputs, grads, step)), tokens
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_reduce_overhead(packed: bool, problem: Problem) -> None:
    chosen = replace(problem, varlen=packed)
    block = block_of(problem)
    step = compiled(block, mode="reduce-overhead")
    inputs, grads = draw(chosen, sized(1, T, 4, LENGTHS[0] if packed else None))
    for given in (LENGTHS[0], *LENGTHS):
        if packed:
            inputs["cu_seqlens"].copy_(lengths(*given))
        expected = train(chosen, inputs, grads, block)
        torch.compiler.cudagraph_mark_step_begin()
        found = train(chosen, inputs, grads, step)
        assert not near(expected, {name: x.clone() for name, x in found.items()}), given
