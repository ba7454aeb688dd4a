"""Bound passes in the ways that torch lets a call be used: none may give what another call made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from faked_driver import Driver, Launch, faked
from recorded_launches import FLAGS, make
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gdn2gen import chunk_gdn2
from gdn2gen.base.errors import UnsupportedError

STREAM = [0]


@pytest.fixture(name="driver")
def _driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Driver]:
    STREAM[0] = 0
    monkeypatch.delenv("GDN2GEN_BOUND", raising=False)
    yield from faked(monkeypatch, tmp_path, STREAM)


@pytest.fixture(name="leaves")
def _leaves(driver: Driver) -> dict[str, Tensor]:
    """Inputs of a kind that is bound, forward and backward."""
    found = {name: x.requires_grad_() for name, x in make().items()}
    for _ in range(4):
        with torch.no_grad():
            chunk_gdn2(**found, **FLAGS)
        _gradients(chunk_gdn2(**found, **FLAGS)[0], found)
    _forget(driver)
    return found


def _gradients(o: Tensor, leaves: dict[str, Tensor], **flags: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(o, [*leaves.values()], torch.ones_like(o), **flags)


def _taken(driver: Driver) -> list[Launch]:
    """What was launched since, all of it bound."""
    assert not driver.through_triton
    found = [*driver.launched]
    driver.launched.clear()
    return found


def _forget(driver: Driver) -> None:
    driver.launched.clear()
    driver.through_triton.clear()


def _memory(x: Tensor) -> range:
    return range(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size())


def test_a_backward_may_run_twice(driver: Driver, leaves: dict[str, Tensor]) -> None:
    """From the same saved tensors, which the first run leaves alone, into gradients of its own."""
    o, _ = chunk_gdn2(**leaves, **FLAGS)
    node: Any = o.grad_fn
    saved = [_memory(x) for x in node.saved_tensors]
    _forget(driver)
    first = _gradients(o, leaves, retain_graph=True)
    one = _taken(driver)
    second = _gradients(o, leaves)
    other = _taken(driver)
    assert one and [x.name for x in one] == [x.name for x in other]

    def of_saved(launches: list[Launch]) -> list[list[int | None]]:
        """Where operands lie in what was saved."""
        return [
            [y if any(y in memory for memory in saved) else None for y in x.addresses]
            for x in launches
        ]

    assert of_saved(one) == of_saved(other)
    assert any(y is not None for x in of_saved(one) for y in x)
    apart = {x.data_ptr() for x in first}.isdisjoint(x.data_ptr() for x in second)
    assert apart and not any(x.data_ptr() in memory for x in (*first, *second) for memory in saved)


def test_two_graphs_at_once_save_apart(driver: Driver, leaves: dict[str, Tensor]) -> None:
    """Backward in the order of a stack, or not: each reads what its own forward saved."""
    outputs = [chunk_gdn2(**leaves, **FLAGS)[0] for _ in range(3)]
    nodes: list[Any] = [o.grad_fn for o in outputs]
    saved = [_memory(node.saved_tensors[-1]) for node in nodes]
    assert len(set(saved)) == 3
    for place in (1, 0, 2):
        _forget(driver)
        _gradients(outputs[place], leaves, retain_graph=True)  # what is freed may be anything
        read = {y for x in _taken(driver) for y in x.addresses}
        assert [any(y in memory for y in read) for memory in saved] == [
            i == place for i in range(3)
        ]


def test_inference_mode_makes_inference_tensors(driver: Driver, leaves: dict[str, Tensor]) -> None:
    given = {name: x.detach() for name, x in leaves.items()}
    for _ in range(4):
        _forget(driver)
        with torch.inference_mode():
            o, _ = chunk_gdn2(**given, **FLAGS)
        assert o.is_inference() and o.grad_fn is None
    assert _taken(driver)
    o, _ = chunk_gdn2(**leaves, **FLAGS)
    assert _taken(driver) and not o.is_inference() and o.requires_grad


def test_a_gradient_that_is_wanted_no_more(driver: Driver, leaves: dict[str, Tensor]) -> None:
    """And again: the kind of a call is told apart by which tensors want gradients."""
    assert chunk_gdn2(**leaves, **FLAGS)[0].requires_grad
    for x in leaves.values():
        x.requires_grad_(False)
    for _ in range(3):
        assert chunk_gdn2(**leaves, **FLAGS)[0].grad_fn is None
    leaves["v"].requires_grad_()
    for _ in range(3):
        o, _ = chunk_gdn2(**leaves, **FLAGS)
        _forget(driver)
        (dv,) = _gradients(o, {"v": leaves["v"]})
        assert dv.shape == leaves["v"].shape
    assert _taken(driver)


def test_what_was_written_to_is_refused(driver: Driver, leaves: dict[str, Tensor]) -> None:
    o, _ = chunk_gdn2(**leaves, **FLAGS)
    with torch.no_grad():
        leaves["k"].mul_(2)
    _forget(driver)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _gradients(o, leaves)
    assert not _taken(driver)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_runs_a_forward_in_a_backward(
    reentrant: bool, driver: Driver, leaves: dict[str, Tensor]
) -> None:
    def block(*given: Tensor) -> Tensor:
        return chunk_gdn2(**dict(zip(leaves, given, strict=True)), **FLAGS)[0]

    o: Any = checkpoint(block, *leaves.values(), use_reentrant=reentrant)
    first = [x.name for x in [*driver.launched, *driver.through_triton]]
    _forget(driver)
    o.backward(torch.ones_like(o))
    again = [x.name for x in [*driver.launched, *driver.through_triton]]
    assert first and len(again) > len(first)
    assert all(x.grad is not None and x.grad.shape == x.shape for x in leaves.values())


class _Named(Tensor):
    """A subclass that torch's own operations keep."""


def test_a_subclass_goes_its_own_way(driver: Driver, leaves: dict[str, Tensor]) -> None:
    given = {name: x.detach() for name, x in leaves.items()}
    given["v"] = given["v"].as_subclass(_Named)
    for _ in range(3):
        chunk_gdn2(**given, **FLAGS)
    parameters = {name: torch.nn.Parameter(x.detach()) for name, x in leaves.items()}
    _forget(driver)
    for _ in range(3):
        o, _ = chunk_gdn2(**parameters, **FLAGS)
        _gradients(o, parameters)
    assert _taken(driver)


def test_batched_gradients_are_refused_once_passes_are_bound(
    driver: Driver, leaves: dict[str, Tensor]
) -> None:
    """They have no address, by which a bound pass finds out."""
    for _ in range(4):
        _gradients(chunk_gdn2(**leaves, **FLAGS)[0], leaves)
    _forget(driver)
    o = chunk_gdn2(**leaves, **FLAGS)[0]
    assert driver.launched and not driver.through_triton
    _forget(driver)
    with pytest.raises(UnsupportedError, match="cannot be batched"):
        torch.autograd.grad(o, leaves["q"], torch.ones(2, *o.shape), is_grads_batched=True)
    assert not driver.launched and not driver.through_triton


def test_a_backward_in_another_thread_than_its_forward(
    driver: Driver, leaves: dict[str, Tensor]
) -> None:
    """As on a GPU, whose gradients autograd computes in a thread of its own."""
    found: list[tuple[int, int]] = []
    outputs = [chunk_gdn2(**leaves, **FLAGS)[0] for _ in range(4)]
    driver.launched.clear()

    def work() -> None:
        for o in outputs:
            _gradients(o, leaves)
            found.append((len(driver.launched), len(driver.through_triton)))
            _forget(driver)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    launches = found[-1][0]
    assert launches and found == [(0, launches), (launches, 0), (launches, 0), (launches, 0)]


def test_deterministic_algorithms_change_nothing(driver: Driver, leaves: dict[str, Tensor]) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        _gradients(chunk_gdn2(**leaves, **FLAGS)[0], leaves)
    finally:
        torch.use_deterministic_algorithms(before)
    assert _taken(driver)
