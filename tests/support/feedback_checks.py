"""A chunk's inverse as it is rounded where heads have few channels, and what comes of it.

Those that run kernels are for a process in which these are interpreted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

BT = K = 32
GROUP = 16


_WHOLE: Final = """

@triton.jit
def whole(x, y, N: tl.constexpr):
    p = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(y + p, feed_back(tl.load(x + p), N).to(tl.bfloat16).to(tl.float32))
"""


def keys() -> dict[str, Tensor]:
    """A chunk of one head of 32 channels, whose keys are much alike, and nothing decays.

    All of so few bits that T is exact in fp32: what is off in A is off by its rounding.
    """
    rng, size = torch.Generator().manual_seed(5), (1, BT, 1, K)
    common = torch.randint(0, 2, (K,), generator=rng) * 2 - 1
    k = common * torch.randint(2, 4, size, generator=rng) / 16
    b = 1.75 + 0.25 * torch.randint(0, 2, size, generator=rng)
    x = {"q": k, "k": k, "b": b}
    return {name: y.bfloat16() for name, y in x.items()} | {"g": torch.zeros(size)}


def exact(x: dict[str, Tensor]) -> Tensor:
    """(I + T)^-1 in fp64."""
    k, b = (x[name].double()[0, :, 0] for name in ("k", "b"))
    T = ((b * k) @ k.T).tril(-1)
    return torch.linalg.inv(torch.eye(BT, dtype=torch.float64) + T).tril()


def changed(A: Tensor, how: str) -> Tensor:
    """With tokens out of sight of others, or one whose row is NaN from some token on."""
    if how == "out of sight":
        A[8:, 0] = 0.0
        A[24:, 1:8] *= 1e-6
    if how == "nan":
        A[20:, 5] = torch.nan
    return A


def near(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def in_rows(A: Tensor) -> Tensor:
    """What rounding takes of 16 in a row goes to the first, if a fourth of that is more."""
    groups = A.unflatten(-1, (-1, GROUP))
    found = near(groups)
    lost = (groups - found).sum(-1)
    first = found[..., 0]
    found[..., 0] = torch.where(4 * lost.abs() <= first.abs(), near(first + lost), first)
    return found.flatten(-2)


def in_columns(A: Tensor) -> Tensor:
    """What it takes of a row's element goes to that of the next row."""
    found, lost = torch.zeros_like(A), torch.zeros_like(A[0])
    for i, row in enumerate(A):
        row = row + torch.where(4 * lost.abs() <= row.abs(), lost, 0.0)
        found[i] = near(row)
        lost = row - found[i]
    return found


def of_the_helper(how: str) -> tuple[bool, bool]:
    """Whether `feed_back` of the Triton prepare makes of A what it should, and what is nearest."""
    from gdn2gen.codegen.build import load
    from gdn2gen.codegen.render import render
    from gdn2gen.family.problem import Problem
    from gdn2gen.kernels.config import default_config

    problem = Problem(K=K, V=K)
    rendered = render(problem, "prepare", default_config("prepare", problem))
    whole: Any = load(replace(rendered, source=rendered.source + _WHOLE)).whole
    given = changed(exact(keys()), how).float()
    found = torch.full(given.shape, torch.inf)
    whole[(1,)](given, found, len(given))
    rows = in_rows(given.double()), near(given)
    first, second = (torch.equal(found.nan_to_num(7.0), x.float().nan_to_num(7.0)) for x in rows)
    return first, second


def errors(op: str, K: int, decay: str = "") -> dict[str, float]:
    """Of the default recipe for keys that are much alike, at the sizes of the check."""
    from gdn2gen.family.problem import Problem
    from gdn2gen.family.registry import recurrence_named
    from gdn2gen.kernels.recipe import Recipe
    from gdn2gen.measure.accuracy import public_op, run_op
    from gdn2gen.measure.case_runs import errors_in_range
    from gdn2gen.measure.check import RAGGED, drawn, forced
    from gdn2gen.measure.check import exact as reference

    problem = Problem(op, K=K, V=K)
    recipe = Recipe.default(problem, recurrence_named(op).plans[0], BT)
    if decay:
        knobs = {"decay": decay, "BK": 32, "num_warps": 1}
        recipe = recipe.with_config(recipe["prepare"].replace(**knobs))
    inputs, grads = drawn(problem, RAGGED, "correlated", "cpu")
    with forced(recipe):
        made = run_op(public_op(op), problem, inputs, grads)
    return errors_in_range(made, reference(problem, RAGGED, "correlated", "cpu"), "bf16")
