"""Around the kernels: gradients, tracers, and the buffers of a call."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_launches import FLAGS, GATED, Launched, make, recorded, train
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gdn2gen import chunk_gdn2
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.schedule import SUMMED
from gdn2gen.kernels.stages import STAGES
from gdn2gen.runtime import runner
from gdn2gen.runtime.passes import poisoned


@pytest.fixture(name="launched")
def _launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Launched]:
    yield from recorded(monkeypatch, tmp_path)


def test_gradients_where_they_are_asked_for(launched: Launched) -> None:
    for name in ("q", "g", "w"):
        inputs = make()
        leaf = inputs[name].requires_grad_()
        o, _ = chunk_gdn2(**inputs, **FLAGS)
        torch.autograd.backward(o.sum())
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape
        assert all(x.grad is None for x in inputs.values() if x is not leaf)
        assert not chunk_gdn2(**make(), **FLAGS)[0].requires_grad
        with torch.no_grad():
            assert not chunk_gdn2(**inputs, **FLAGS)[0].requires_grad


def test_a_second_backward(launched: Launched) -> None:
    inputs = {name: x.requires_grad_() for name, x in make().items()}
    o, state = chunk_gdn2(**inputs, **FLAGS)
    assert state is None
    leaves = [*inputs.values()]
    torch.autograd.grad(o.sum(), leaves, retain_graph=True)
    first = launched.looks()
    forward = sum(stage in ("prepare", "scan") for stage, *_ in launched)
    launched.clear()
    torch.autograd.grad(o.sum(), leaves)
    assert launched.looks() == first[forward:]
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(o.sum(), leaves)


def test_a_written_input_is_noticed(launched: Launched) -> None:
    inputs = {name: x.requires_grad_() for name, x in make().items()}
    o, _ = chunk_gdn2(**inputs, **FLAGS)
    with torch.no_grad():
        inputs["v"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(o.sum())


@pytest.mark.filterwarnings("ignore:::torch", "ignore:::gdn2gen")
def test_tracers_still_see_the_op(launched: Launched) -> None:
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    inputs = make()
    chunk_gdn2(**inputs, **FLAGS)
    with Log():
        chunk_gdn2(**inputs, **FLAGS)
    assert "gdn2gen.gdn2_forward.default" in seen

    def call(q: Tensor) -> Tensor:
        return chunk_gdn2(**inputs | {"q": q}, **FLAGS)[0]

    traced = torch.jit.trace(call, (inputs["q"].requires_grad_(),), check_trace=False)
    assert "gdn2gen::gdn2_forward" in str(traced.graph)


def test_nothing_is_kept_between_calls(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, weakref.ref[Tensor]] = {}

    def launcher(self: runner.Runner, problem: Problem, stage: str) -> Any:
        names = [x.name for x in self.recipe[stage].operands(problem)]

        def note(*tensors: Tensor, **_: Any) -> None:
            made.update(zip(names, map(weakref.ref, tensors), strict=True))

        return note

    monkeypatch.setattr(runner.Runner, "launcher", launcher)
    given = {name: x.requires_grad_() for name, x in make().items()}
    o, _ = chunk_gdn2(**given, **FLAGS)
    gc.collect()
    alive = {name for name, x in made.items() if x() is not None and x().numel()}  # type: ignore[union-attr]
    saved = {"A", "Aqk", "S_seg", "q_rstd", "k_rstd"}
    assert alive - {"o"} == {*given} | saved
    grads = torch.autograd.grad(o.sum(), [*given.values()])
    del o, grads
    gc.collect()
    assert {name for name, x in made.items() if x() is not None and x().numel()} == {*given}  # type: ignore[union-attr]


def test_poison_fills_what_the_kernels_write(launched: Launched) -> None:
    call = FLAGS | make() | GATED
    train(**call)  # looked up while nothing was poisoned
    launched.clear()
    with poisoned():
        train(**call)
    for stage, _, operands, _ in launched:
        for x in STAGES[stage].outputs:
            # dg takes the place of G, which is an input of its stage
            if x.name in operands and x.name != "dg" and operands[x.name].numel():
                zeroed = x.name in SUMMED
                right = operands[x.name] == 0 if zeroed else operands[x.name].isnan()
                assert right.all(), (stage, x.name)
