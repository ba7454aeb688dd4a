"""TileLang's kernels as known calls launch them, past their host code: the bits of the programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest
import torch
from gpu_support import Kernels, Tensors, draw, kernels_of, moved, recipe_of, run, sized
from recorded_launches import forget

from gdn2gen.codegen import frames
from gdn2gen.codegen._ready import Kernel
from gdn2gen.runtime.bound import Bound

pytestmark = pytest.mark.gpu

RECIPES: Final = (
    ("bf16", "lean"),
    ("packed", "tilelang lean"),
    ("kda", "tilelang lean"),
    ("gla", "tilelang linear"),
)
CALLS: Final = 6
"""The first ones compile, bind, and give autograd's thread its own memory."""


@pytest.fixture(scope="module")
def compiled(compile_once: Callable[[str, Kernels], None]) -> None:
    compile_once("recorded", kernels_of(recipe_of(*x) for x in RECIPES))


@pytest.fixture(name="found")
def _found(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the programs of a pass became when it was bound."""
    found: list[Any] = []
    record = frames.recorded

    def noting(*of: Any) -> Sequence[Any]:
        found.extend(record(*of))
        return found[-1:]

    monkeypatch.setattr(frames, "recorded", noting)
    return found


def calls(name: str, level: str, given: tuple[Tensors, Tensors]) -> Tensors:
    """The last one, of inputs that lie elsewhere in each."""
    forget()
    for _ in range(CALLS):
        inputs, grads = ({key: x.clone() for key, x in y.items()} for y in given)
        results = run(recipe_of(name, level), inputs, grads)
    return results


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("tokens", [40, 1000])
@pytest.mark.parametrize(("name", "level"), RECIPES)
def test_the_same_bits(
    name: str, level: str, tokens: int, found: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = recipe_of(name, level).problem
    lengths = (0, tokens // 3, tokens) if problem.varlen else None
    given = draw(problem, sized(1, tokens, 4, lengths))
    made: list[Bound] = []
    bound = Bound.run

    def noting(self: Bound, addresses: list[int]) -> Any:
        results = bound(self, addresses)
        made.extend([self] if results is not None else [])
        return results

    monkeypatch.setattr(Bound, "run", noting)
    monkeypatch.setenv("GDN2GEN_BOUND", "programs")
    expected = calls(name, level, given)
    assert found and not any(isinstance(x, Kernel) for x in found)
    found.clear()
    monkeypatch.delenv("GDN2GEN_BOUND")
    made.clear()
    results = calls(name, level, given)
    assert made and found and all(isinstance(x, Kernel) for x in found)
    torch.cuda.synchronize()
    assert not moved(expected, results)
    forget()
