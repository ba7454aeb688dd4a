"""Every output and gradient against the fp64 reference, at real sizes."""

from __future__ import annotations

import pytest
import torch
from gpu_support import BY_64, PROBLEMS, draw, levels_of, off, recipe_of, run, sized
from torch import Tensor

from gdn2gen.family.inputs import PATTERNS
from gdn2gen.family.registry import recurrence_named
from gdn2gen.family.shapes import Shape
from gdn2gen.measure.accuracy import run_reference
from gdn2gen.runtime.passes import poisoned

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

# 2011 is prime: the last chunk is never full. The reference takes 120 KB per token and head.
LONG = sized(1, 2011, 4)
# dA_log has one value per head: with fewer heads its norm could be small by chance.
WIDE = sized(2, 1003, 8)
GROUPED = sized(1, 1003, 8)
# Of members that lack a decay, or erase nothing.
LESS = ("delta", "gla", "gla-fp16-K64", "simple-gla", "simple-gla-fp16-K64")
DOCUMENTS = sized(1, 2011, 4, (0, 0, 1, 64, 64, 193, 1200, 1999, 2011, 2011))


def check(
    name: str, shape: Shape, pattern: str, *, H: int | None = None, HG: int | None = None
) -> None:
    """Hold the levels of a problem against one run of the reference."""
    problem = PROBLEMS[name]
    inputs, grads = draw(problem, shape, pattern, H=H, HG=HG)
    exact = run_reference(problem, inputs, grads)
    for level in levels_of(name):
        with poisoned():
            results = run(recipe_of(name, level), inputs, grads)
        assert results.keys() == exact.keys()
        assert not off(results, exact, problem, pattern), level


def patterns_of(name: str) -> tuple[str, ...]:
    """Those that differ: of a member without a decay they are few."""
    decays = recurrence_named(PROBLEMS[name].op).decay is not None
    return PATTERNS if decays else ("layer", "sparse", "correlated")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        (name, pattern)
        for name in ("bf16", "fp16", "fp32", "kda", "gdn", "gdn-fp16-K64", *LESS)
        for pattern in patterns_of(name)
    ],
)
def test_every_pattern(name: str, pattern: str) -> None:
    check(name, LONG, pattern)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_defaults_of_the_largest_chunks(name: str) -> None:
    problem = PROBLEMS[name]
    inputs, grads = draw(problem, LONG)
    exact = run_reference(problem, inputs, grads)
    with poisoned():
        results = run(recipe_of(name, BY_64), inputs, grads)
    assert not off(results, exact, problem)


@pytest.mark.parametrize(
    "name", ["v-first", "gate-bf16", "fp16-K64-V32", "fp32-K32-V64", "kda-fp16-K32-V64"]
)
def test_head_dims_that_differ(name: str) -> None:
    check(name, WIDE, "mixed")


@pytest.mark.parametrize("name", ["softplus", "sigmoid", "kda-K64"])
def test_gates_in_the_kernel(name: str) -> None:
    check(name, WIDE, "layer")


@pytest.mark.parametrize("HG", [2, 8])
@pytest.mark.parametrize("name", ["bf16", "softplus", "kda", "gdn", *LESS])
def test_grouped_value_heads(name: str, HG: int) -> None:
    """Two heads of q and k serve eight value heads; their gradients are sums over groups."""
    check(name, GROUPED, "layer", H=2, HG=HG)


@pytest.mark.parametrize(("HV", "H"), [(17, 1), (20, 4)])
@pytest.mark.parametrize("name", ["kda", "kda-K64"])
def test_value_heads_that_no_program_of_sixteen_is_full_of(name: str, HV: int, H: int) -> None:
    """What turns beta about takes 16 heads at a time."""
    check(name, sized(2, 333, HV), "layer", H=H)


@pytest.mark.parametrize("pattern", ["layer", "mixed"])
@pytest.mark.parametrize(
    "name",
    ["packed", "kda-packed", "gdn-packed", "delta-packed", "gla-packed", "simple-gla-packed"],
)
def test_packed_documents(name: str, pattern: str) -> None:
    check(name, DOCUMENTS, pattern)


@pytest.mark.parametrize("T", [1, 16, 64, 65])
@pytest.mark.parametrize("name", ["bf16", "kda", "gdn", *LESS])
def test_few_tokens(name: str, T: int) -> None:
    check(name, sized(3, T, 2), "mixed")


@pytest.mark.parametrize(
    ("name", "level"),
    [("bf16", "lean"), ("kda", "lean"), ("kda", "tilelang lean"), ("gdn", "tilelang direct")],
)
def test_no_tokens(name: str, level: str) -> None:
    """The state and its gradient pass through."""
    inputs, grads = draw(PROBLEMS[name], sized(2, 0, 4))
    results = run(recipe_of(name, level), inputs, grads)
    assert results["o"].shape == inputs["v"].shape
    assert torch.equal(results["final_state"], inputs["initial_state"])
    assert torch.equal(results["dinitial_state"], grads["final_state"])


@pytest.mark.parametrize(
    ("name", "level"),
    [
        *(("bf16", "lean"), ("kda", "lean"), ("kda", "tilelang states")),
        *(("gdn", "tilelang direct"), ("simple-gla", "tilelang linear_direct")),
    ],
)
def test_resets_to_the_last_bit(name: str, level: str) -> None:
    """g = -inf forgets a channel: as -300 does, and without a NaN in any gradient."""
    problem = PROBLEMS[name]
    inputs, grads = draw(problem, sized(1, 1003, 4), "sparse")
    inputs["g"] = inputs["g"].masked_fill(inputs["g"] <= -300, -torch.inf)
    assert inputs["g"].isinf().any()
    exact = run_reference(problem, inputs, grads)
    with poisoned():
        results = run(recipe_of(name, level), inputs, grads)
    assert not off(results, exact, problem)


def test_strided_inputs() -> None:
    """Slices of one fused projection are read as their contiguous copies are."""
    problem, recipe = PROBLEMS["bf16"], recipe_of("bf16", "lean")
    inputs, grads = draw(problem, sized(2, 300, 4))
    names = ("q", "k", "v", "b", "w")
    fused = torch.cat([inputs[name] for name in names], -1)
    sizes = [inputs[name].shape[-1] for name in names]
    slices: dict[str, Tensor] = dict(zip(names, torch.split(fused, sizes, -1), strict=True))
    assert not any(x.is_contiguous() for x in slices.values())
    before, after = run(recipe, inputs, grads), run(recipe, {**inputs, **slices}, grads)
    for name, x in before.items():
        assert torch.equal(x, after[name]), name
