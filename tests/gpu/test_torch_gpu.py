"""The op within torch: dispatch, CUDA graphs, torch.compile, streams, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_support import (
    DEVICE,
    LEVELS,
    PROBLEMS,
    TRAIN,
    Tensors,
    at_levels,
    draw,
    moved,
    other_stream,
    recipe_of,
    run,
    sized,
)
from torch import Tensor

from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.accuracy import public_op, run_op
from gdn2gen.store.dispatch import forced_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

SMALL = sized(2, 333, 4)
SMALL_PACKED = sized(1, 333, 4, (0, 0, 100, 101, 333))


def call_at(level: str, op: str = "gdn2") -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The public op with the argument that asks for `level`."""

    def call(**arguments: Any) -> tuple[Tensor, Tensor | None]:
        return public_op(op)(**arguments, disable_recompute=level == "fast")

    return call


def test_a_plain_call_runs_what_dispatch_says() -> None:
    """Nothing forced: the recipe is found by the call's own shape, at both levels."""
    problem = PROBLEMS["stateless"]
    inputs, grads = draw(problem, TRAIN, "layer")
    for level in LEVELS:
        expected = run(recipe_of("stateless", level), inputs, grads)
        assert not moved(expected, run_op(call_at(level), problem, inputs, grads)), level


def test_disable_recompute_keeps_more() -> None:
    inputs, _ = draw(PROBLEMS["stateless"], TRAIN, "layer")
    leaves: dict[str, Any] = {name: x.requires_grad_() for name, x in inputs.items()}
    kept = {}
    for level in LEVELS:
        before = torch.cuda.memory_allocated(DEVICE)
        o, _ = call_at(level)(**leaves, use_qk_l2norm_in_kernel=True)
        kept[level] = torch.cuda.memory_allocated(DEVICE) - before
        del o
    assert kept["fast"] > 2 * kept["lean"]


@pytest.mark.parametrize("name", ["bf16", "packed", "softplus", "kda-packed"])
def test_another_stream(name: str) -> None:
    recipe = recipe_of(name, "lean")
    shape = SMALL_PACKED if recipe.problem.varlen else SMALL
    inputs, grads = draw(recipe.problem, shape, "layer")
    expected = run(recipe, inputs, grads)
    torch.cuda.synchronize()
    with other_stream():
        # some 10 ms: kernels on the wrong stream would run ahead of the copies
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        late = {name: x.clone() for name, x in inputs.items()}
        results = run(recipe, late, grads)
    assert not moved(expected, results)


@pytest.mark.parametrize(
    ("name", "level"), at_levels("bf16", "packed", "softplus", "kda-packed", "kda-K64")
)
def test_a_cuda_graph_replays_the_same_bits(name: str, level: str) -> None:
    """Captured once with a forward and a backward, then replayed on other inputs."""
    recipe = recipe_of(name, level)
    shape = SMALL_PACKED if recipe.problem.varlen else SMALL
    inputs, grads = draw(recipe.problem, shape, "layer")
    graph, held = capture(recipe, inputs, grads)
    other = {name: new_values(x) for name, x in inputs.items()}
    for values in (inputs, other, inputs):
        values = {name: x.clone() for name, x in values.items()}
        with torch.no_grad():
            for key, x in values.items():
                if x.is_floating_point():
                    inputs[key].copy_(x)
        graph.replay()
        results = {name: x.clone() for name, x in held.items()}
        assert not moved(run(recipe, values, grads), results)


def capture(
    recipe: Recipe, inputs: Tensors, grads: Tensors
) -> tuple[torch.cuda.CUDAGraph, Tensors]:
    """The graph of one `run`, and the tensors that a replay writes."""
    with other_stream():
        for _ in range(3):
            run(recipe, inputs, grads)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run(recipe, inputs, grads)
    return graph, held


def new_values(x: Tensor) -> Tensor:
    return x * 0.75 if x.is_floating_point() else x


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["stateless", "kda", "gdn", "simple-gla"])
def test_torch_compile_takes_the_whole_graph(name: str, backend: str) -> None:
    """No graph break in or around the op; outputs and gradients are those of eager mode."""
    problem = PROBLEMS[name]
    op = public_op(problem.op)

    def block(**arguments: Any) -> tuple[Tensor, Tensor | None]:
        o, state = op(**(arguments | {"v": arguments["v"] * 2}))
        return o * 0.5, state

    inputs, grads = draw(problem, TRAIN, "layer")
    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    expected = run_op(block, problem, inputs, grads)
    assert not moved(expected, run_op(compiled, problem, inputs, grads))


@pytest.mark.parametrize(("name", "level"), [("bf16", "lean"), ("kda-fp16-K32-V64", "fast")])
def test_autocast_leaves_the_op_alone(name: str, level: str) -> None:
    problem, recipe = PROBLEMS[name], recipe_of(name, level)
    inputs, grads = draw(problem, SMALL)
    expected = run(recipe, inputs, grads)
    with torch.autocast("cuda", torch.bfloat16):
        results = run(recipe, inputs, grads)
    assert not moved(expected, results)
    assert results["final_state"].dtype == torch.float32
    assert results["dg"].dtype == torch.float32
    assert all(results[f"d{x}"].dtype == y.dtype for x, y in inputs.items())


def test_a_projection_under_autocast_feeds_the_op() -> None:
    """As in a layer: autocast makes bf16 q, k, v; their gradients reach fp32 weights."""
    recipe = recipe_of("bf16", "lean")
    inputs, grads = draw(recipe.problem, SMALL)
    hidden = torch.randn(2, 333, 4 * 128, device=DEVICE)
    weight = (torch.randn(4 * 128, 4 * 128, device=DEVICE) / 22).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16), forced_recipe(recipe):
        projected = torch.nn.functional.linear(hidden, weight).view(2, 333, 4, 128)
        call: dict[str, Any] = inputs | {"q": projected, "v": projected}
        op = public_op(recipe.problem.op)
        o, state = op(**call, use_qk_l2norm_in_kernel=True, output_final_state=True)
    assert o.dtype == torch.bfloat16
    assert state is not None
    (found,) = torch.autograd.grad([o, state], [weight], [grads["o"], grads["final_state"]])
    assert found.dtype == torch.float32
    assert found.isfinite().all() and found.any()


@pytest.mark.parametrize(
    ("which", "names"), [("bf16", ("q", "g", "initial_state")), ("kda", ("k", "beta"))]
)
def test_only_what_is_asked_for_has_a_gradient(which: str, names: tuple[str, ...]) -> None:
    """With one leaf among constants its gradient is that of a call with all leaves."""
    problem, recipe = PROBLEMS[which], recipe_of(which, "lean")
    op = public_op(problem.op)
    inputs, grads = draw(problem, SMALL)
    expected = run(recipe, inputs, grads)
    call: dict[str, Any] = dict(inputs)
    for name in names:
        leaf = inputs[name].clone().requires_grad_()
        with forced_recipe(recipe):
            o, state = op(
                **(call | {name: leaf}), use_qk_l2norm_in_kernel=True, output_final_state=True
            )
        assert state is not None
        (found,) = torch.autograd.grad([o, state], [leaf], [grads["o"], grads["final_state"]])
        assert torch.equal(found, expected[f"d{name}"]), name


@pytest.mark.parametrize("layout", ["strided", "shifted"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["packed", "kda-packed"])
def test_hooks_that_lay_out_anew_what_was_saved(name: str, level: str, layout: str) -> None:
    """Launched by address, or through TMA: what a hook gives back is copied where it must be."""
    problem = PROBLEMS[name]
    inputs, grads = draw(problem, SMALL_PACKED, "layer")
    call = call_at(level, problem.op)
    expected = run_op(call, problem, inputs, grads)

    def anew(x: Tensor) -> Tensor:
        if layout == "strided":
            return torch.stack((x, x), -1)[..., 0]
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    def hooked(**arguments: Any) -> tuple[Tensor, Tensor | None]:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, anew):
            return call(**arguments)

    assert not moved(expected, run_op(hooked, problem, inputs, grads))
