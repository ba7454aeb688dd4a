"""Checks of what surrounds a call of the op: hooks, threads, autocast, transforms, tracers.

By the reference or by kernels in the interpreter; see op_checks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_checks import make, outputs

from gdn2gen import chunk_gdn2
from gdn2gen.base.errors import UnsupportedError

PACKED = {"cu_seqlens": (0, 7, 20)}


def _leaves(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.clone().requires_grad_() if x.is_floating_point() else x.clone()
        for name, x in inputs.items()
    }


def _grads(o: Tensor, leaves: dict[str, Any]) -> list[Tensor]:
    wanted = [x for x in leaves.values() if x.requires_grad]
    return [o.detach(), *torch.autograd.grad(o.float().sum(), wanted)]


def _train(inputs: dict[str, Any], function: Callable[..., Tensor] = outputs) -> list[Tensor]:
    leaves = _leaves(inputs)
    return _grads(function(**leaves), leaves)


def _same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def hooks(layout: str, watched: bool) -> str:
    """Hooks on saved tensors give back the same values, in another layout."""
    from torch.utils.flop_counter import FlopCounterMode

    def anew(x: Tensor) -> Tensor:
        if layout == "strided":
            return torch.stack((x, x), -1)[..., 0]
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    def hooked(**leaves: Any) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, anew):
            return outputs(**leaves)

    inputs = make(**PACKED)
    expected = _train(inputs)
    with FlopCounterMode(display=False) if watched else nullcontext():
        _same(_train(inputs, hooked), expected)
    return "done"


def cu_seqlens_written_to_before_the_backward(change: str) -> str:
    inputs = make(**PACKED)
    leaves, other = _leaves(inputs), torch.tensor([0, 15, 20])
    o = outputs(**leaves)
    if change == "data":
        leaves["cu_seqlens"].data.copy_(other)
    else:
        leaves["cu_seqlens"].copy_(other)
    _same(_grads(o, leaves), _train(inputs))
    return "done"


def autocast() -> str:
    inputs = make()
    expected = _train(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        _same(_train(inputs), expected)
    return "done"


def threads() -> str:
    inputs = make()
    expected, found = _train(inputs), []

    def work() -> None:
        found.append(_train(inputs))

    started = [Thread(target=work) for _ in range(3)]
    for one in started:
        one.start()
    for one in started:
        one.join()
    assert len(found) == len(started)
    for results in found:
        _same(results, expected)
    return "done"


def no_tokens() -> str:
    """Neither a token nor an initial state: nothing that the final state depends on."""
    for changes in ({"T": 0}, {"T": 0, "cu_seqlens": (0, 0, 0)}, {"B": 0, "T": 0}):
        inputs = make(**changes)
        assert [x.shape for x in _train(inputs)[1:]] == [
            x.shape for x in inputs.values() if x.is_floating_point()
        ]
    return "done"


def outputs_are_no_views() -> str:
    """Autograd lets nobody write to a view that an op with several outputs returns."""
    for T, state_v_first in ((20, False), (0, True)):
        leaves = _leaves(make(T=T, initial_state=True))
        flags = {"output_final_state": True, "state_v_first": state_v_first}
        for x in chunk_gdn2(**leaves, **flags):
            assert x is not None
            x.add_(1)
    return "done"


def vmap_of_nothing() -> str:
    inputs = make()
    none = inputs["v"].new_zeros(*inputs["v"].shape, 0)
    found = torch.vmap(lambda v: outputs(**inputs | {"v": v}), in_dims=-1)(none)
    assert found.shape == (0, *inputs["v"].shape)
    return "done"


def vmap_of_gradients() -> str:
    """Of an output that was computed outside of it."""
    leaves = _leaves(make(**PACKED))
    o = outputs(**leaves)
    seeds = torch.stack((torch.ones_like(o), o.detach()))

    def slope(seed: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(o, leaves["q"], seed, retain_graph=True)
        return found

    assert torch.equal(torch.vmap(slope)(seeds), torch.stack([*map(slope, seeds)]))
    return "done"


def gradients_in_batches() -> str:
    leaves = _leaves(make(T=2))
    o = outputs(**leaves)
    with pytest.raises(UnsupportedError, match=r"use torch\.func\.jacrev"):
        torch.autograd.grad(o, leaves["q"], torch.stack((o, o)), is_grads_batched=True)
    return "done"


def traced_with_symbols() -> str:
    """By make_fx, which is no compiler, at lengths that it does not know."""
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = make(**PACKED)

    def step(*given: Tensor) -> list[Tensor]:
        return _train(dict(zip(inputs, given, strict=True)))

    traced = make_fx(step, tracing_mode="symbolic")(*inputs.values())
    other = [*make(T=33, cu_seqlens=(0, 7, 20, 33)).values()]
    _same(traced(*other), step(*other))
    return "done"


def compiled_lower_bounds() -> str:
    """The second one becomes a symbol."""

    def step(bound: float, **inputs: Any) -> Tensor:
        flags = {"use_gate_in_kernel": True, "use_qk_l2norm_in_kernel": True}
        return chunk_gdn2(**inputs, **flags, lower_bound=bound)[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for bound in (-1.0, -2.5, -5.0, -4.75):
        inputs = make()
        found = _train(inputs, lambda **x: compiled(bound, **x))  # noqa: B023
        _same(found, _train(inputs, lambda **x: step(bound, **x)))  # noqa: B023
    return "done"
