"""Passes bound to their launches: what a repeated call does, counted; and when it does otherwise.

So do calls over a few tokens, which are one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from faked_driver import Driver, Launch, faked
from recorded_launches import FLAGS, HEADS, make, packed
from torch import Tensor

from gdn2gen import chunk_gdn2, chunk_mamba2, fused_recurrent_gdn2
from gdn2gen.base.errors import InputError, UnsupportedError
from gdn2gen.codegen.frames import Described, Frames
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.check import forced
from gdn2gen.ops import _call, _decode
from gdn2gen.runtime import bound, decoding, decoding_op, kinds, passes
from gdn2gen.runtime.bound import Made, Worked

STREAM = [0]
Run = Callable[[], Any]


@pytest.fixture(name="made")
def _made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every buffer that is allocated; none is freed, so that no address comes twice."""
    found: list[Tensor] = []
    maker = passes.maker

    def noting(*of: Any) -> Callable[[], Tensor]:
        allocate = maker(*of)

        def make_one() -> Tensor:
            found.append(allocate())
            return found[-1]

        return make_one

    monkeypatch.setattr(passes, "maker", noting)
    return found


@pytest.fixture(name="driver")
def _driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made: list[Tensor]
) -> Iterator[Driver]:
    STREAM[0] = 0
    monkeypatch.delenv("GDN2GEN_BOUND", raising=False)
    yield from faked(monkeypatch, tmp_path, STREAM)


def _infer(inputs: dict[str, Any]) -> Run:
    def run() -> Tensor:
        with torch.no_grad():
            return chunk_gdn2(**inputs, **FLAGS)[0]

    return run


def _train(inputs: dict[str, Any], **flags: Any) -> Run:
    leaves = {
        name: x.clone().requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    wanted = [x for x in leaves.values() if x.requires_grad]

    def run() -> tuple[Tensor, ...]:
        outputs = [x for x in chunk_gdn2(**leaves, **FLAGS, **flags) if x is not None]
        return torch.autograd.grad(outputs, wanted, [torch.ones_like(x) for x in outputs])

    return run


def _bound(run: Run, driver: Driver) -> list[Launch]:
    """What a call launches once its passes are bound."""
    for _ in range(4):
        run()
    driver.launched.clear()
    driver.through_triton.clear()
    run()
    assert not driver.through_triton
    return [*driver.launched]


@pytest.mark.parametrize("layout", ["batch", "packed"])
@pytest.mark.parametrize("direction", ["infer", "train", "states"])
def test_bound_passes_launch_what_passes_do(layout: str, direction: str, driver: Driver) -> None:
    """The same kernels, grids and scalars, on tensors that go together in the same way."""
    inputs = make() if layout == "batch" else packed(0, 20, 40)
    flags = {"output_final_state": True} if direction == "states" else {}
    run = _infer(inputs) if direction == "infer" else _train(inputs, **flags)
    run()
    general = [*driver.through_triton]
    quick = _bound(run, driver)
    assert len(general) == len(quick) >= (2 if direction == "infer" else 5)
    seen: dict[int, int] = {}
    for x, y in zip(general, quick, strict=True):
        assert x._replace(addresses=()) == y._replace(addresses=())
        for one, other in zip(x.addresses, y.addresses, strict=True):
            if one:  # of no elements it has no address
                assert seen.setdefault(one, other) == other, x.name


def _early(launches: list[Launch]) -> dict[str, bool]:
    return {x.name: x.dependent for x in launches}


@pytest.mark.parametrize("layout", ["batch", "packed"])
def test_launches_depend_on_programs_where_kernels_wait(layout: str, driver: Driver) -> None:
    """Through Triton, and bound: of a pass all but the first, and none of a call without tokens."""
    inputs = make() if layout == "batch" else packed(0, 20, 40)
    flags = {"output_final_state": True}
    recipe = Recipe.default(Problem(K=32, V=64)).dependent()
    follows = {x: False for x in ("chunk_tables_kernel", "prepare_kernel", "reprepare_kernel")}
    with forced(recipe):
        run = _train(inputs, **flags)
        driver.through_triton.clear()
        run()
        general = _early(driver.through_triton)
        quick = _early(_bound(run, driver))
        driver.through_triton.clear()
        if layout == "batch":
            _train(make(T=0), **flags)()
            assert driver.through_triton and not any(_early(driver.through_triton).values())
    assert general == quick and len(quick) >= 7
    if layout == "packed":
        follows |= {"prepare_kernel": True, "clear_kernel": False}
    assert quick == {x: follows.get(x, True) for x in quick}


def _mamba2(given: dict[str, Tensor], train: bool) -> Run:
    k = torch.randn(1, 40, 1, 32)

    def run() -> Any:
        with torch.set_grad_enabled(train):
            o, _ = chunk_mamba2(k, k, **given, use_gate_in_kernel=True)
            return torch.autograd.grad(o.sum(), [*given.values()]) if train else o

    return run


@pytest.mark.parametrize("train", [False, True])
def test_rows_that_lie_apart_are_read_there(
    train: bool, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mamba-2's dt and z as slices of a projection, beside calls whose rows have no gaps."""
    monkeypatch.setenv("GDN2GEN_UNVERIFIED", "1")
    x = torch.randn(1, 40, 144)
    v = torch.randn(1, 40, 2, 32)
    slices = {"v": v, "dt": x[..., 64:66], "z": x[..., 80:].view(1, 40, 2, 32)}
    assert not any(slices[name].is_contiguous() for name in ("dt", "z"))
    tensors = {True: slices, False: {name: y.contiguous() for name, y in slices.items()}}
    for given in tensors.values():
        for y in given.values():
            y.requires_grad_(train)
    runs = {apart: _mamba2(given, train) for apart, given in tensors.items()}
    for apart in (True, False, True):
        launches = _bound(runs[apart], driver)
        addresses = {y for launch in launches for y in launch.addresses}
        for name, y in tensors[apart].items():
            assert y.data_ptr() in addresses, name
        scans = [x for x in launches if x.name.startswith("scan_group")]
        assert len(scans) == 1
        for scan in scans:
            rows = (144 // 8,) if apart else (64 // 8,)
            assert scan.scalars[5:] == rows
        steps = [x for x in launches if "step_kernel" in x.name or "fold" in x.name]
        assert {x.scalars[-1] for x in steps} == {144 if apart else 2}


def test_a_repeated_call_looks_nothing_up(
    driver: Driver, made: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does, counted: it must not grow unnoticed."""
    inputs = make()
    infer, train = _infer(inputs), _train(inputs)
    launches = {run: len(_bound(run, driver)) for run in (infer, train)}

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a known call needs none of it")

    for module, name in (
        (_call, "_key"),
        (_call, "check_arguments"),
        (_call, "check_gate"),
        (_call, "_as_kernels_take"),
        (_call, "find_runner"),
        (kinds, "_Guards"),
        (passes.Pass, "run"),
        (bound.Bound, "__init__"),
    ):
        monkeypatch.setattr(module, name, never)
    # o and what lies between stages; with a backward what is saved, and seven more for gradients
    for run, buffers in ((infer, 2), (train, 3 + 7)):
        made.clear()
        driver.launched.clear()
        run()
        assert len(made) == buffers
        assert len(driver.launched) == launches[run] and not driver.through_triton


def test_a_repeated_step_looks_nothing_up(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, pool = make(B=3, T=1), torch.zeros(5, HEADS, 32, 64)
    slots = torch.tensor([4, 0, 2], dtype=torch.int32)
    made: list[tuple[int, ...]] = []
    maker = decoding.maker

    def noting(shape: tuple[int, ...], *of: Any) -> Callable[[], Tensor]:
        allocate = maker(shape, *of)
        return lambda: made.append(shape) or allocate()  # type: ignore[func-returns-value]

    monkeypatch.setattr(decoding, "maker", noting)

    def step(**changes: Any) -> Tensor:
        given = rows | {"state_pool": pool, "ssm_state_indices": slots} | changes
        return fused_recurrent_gdn2(**given, **FLAGS)[0]

    first = step()
    (general,) = driver.through_triton
    (quick,) = _bound(step, driver)
    operands = {x.data_ptr() for x in (*rows.values(), pool, slots)}
    same = [i for i, x in enumerate(general.addresses) if x in operands]
    assert len(same) == len(operands) == len(general.addresses) - 1
    assert [general.addresses[i] for i in same] == [quick.addresses[i] for i in same]
    assert general._replace(addresses=()) == quick._replace(addresses=())
    for module, name in (
        (_decode, "_key"),
        (_decode, "check_gate"),
        (_decode, "plan_of"),
        (_decode, "refuse_gradients"),
        (decoding_op, "known_plan"),
        (kinds, "_Guards"),
    ):
        monkeypatch.setattr(module, name, None)
    made.clear()
    driver.launched.clear()
    assert step().shape == first.shape
    assert made == [tuple(first.shape)] and len(driver.launched) == 1
    monkeypatch.undo()
    for changes in ({"ssm_state_indices": slots[:2]}, {"state_pool": pool.half()}):
        with pytest.raises(InputError):
            step(**changes)


def test_the_current_stream_is_that_of_the_call(driver: Driver) -> None:
    run = _train(make())
    _bound(run, driver)
    for stream in (0, 2**40 + 7, 5):
        STREAM[0] = stream
        driver.launched.clear()
        run()
        assert {x.stream for x in driver.launched} == {stream}


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "negated": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_kernels_cannot_read_as_it_lies_is_copied_as_ever(odd: str, driver: Driver) -> None:
    inputs = make()
    _bound(_infer(inputs), driver)
    driver.launched.clear()
    given = inputs | {"v": ODD[odd](inputs["v"])}
    _infer(given)()
    assert driver.through_triton and not driver.launched
    lying = {address for x in driver.through_triton for address in x.addresses}
    assert given["v"].data_ptr() not in lying


def test_bad_input_of_a_known_kind_is_refused(driver: Driver) -> None:
    inputs = packed(0, 20, 40)
    _bound(_infer(inputs), driver)
    driver.launched.clear()
    for changes, words in (
        ({"cu_seqlens": torch.tensor([0, 50, 40])}, "must not fall"),
        ({"v": inputs["v"][:, :-1]}, "v must be"),
        ({"v": inputs["v"].to("meta")}, "must be on"),
        ({"b": inputs["b"].half()}, "dtype of q"),
        ({"scale": True}, "scale must be"),
    ):
        with pytest.raises(InputError, match=words):
            _infer(inputs | changes)()
    assert not driver.launched


@pytest.mark.parametrize("what", ["hooks", "poison", "watched", "a kernel", "thread"])
def test_other_surroundings_run_the_pass_itself(
    what: str, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make()
    run = _train(inputs)
    _bound(run, driver)
    driver.launched.clear()
    shown: list[Tensor] = []
    if what == "hooks":

        def show(x: Tensor) -> Tensor:
            shown.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(show, lambda x: x):
            run()
        assert shown and all(x.dtype != torch.uint8 for x in shown)
    elif what == "poison":
        monkeypatch.setattr(passes, "_poisoned", True)
        run()
    elif what == "watched":
        from triton import knobs

        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
        run()
    elif what == "a kernel":  # is watched, the last one of the forward
        runners = [y for x in _call._ready.values() for y in x._runners.values()]
        (forward,) = [y for x in runners for y in x.training._bound.values()]
        forward._hooks[-1].append(lambda *_: None)
        run()
    else:
        found = []

        def work() -> None:
            for _ in range(3):  # a context first, then frames of its own
                driver.through_triton.clear()
                run()
                found.append(bool(driver.through_triton))

        thread = Thread(target=work)
        thread.start()
        thread.join()
        assert found == [True, True, False]
        return
    assert driver.through_triton and not driver.launched


def test_the_environment_turns_it_off(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDN2GEN_BOUND", "0")
    run = _train(make())
    for _ in range(4):
        driver.through_triton.clear()
        run()
        assert driver.through_triton and not driver.launched


def test_an_environment_that_changed_is_noticed(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make()
    run = _infer(inputs)
    _bound(run, driver)
    monkeypatch.setenv("GDN2GEN_STRICT", "1")
    with pytest.raises(Exception, match=r"GDN2GEN_STRICT|strict"):
        run()


def test_gradients_are_taken_once(driver: Driver) -> None:
    inputs = {name: x.requires_grad_() for name, x in make().items()}
    _bound(lambda: torch.autograd.grad(chunk_gdn2(**inputs, **FLAGS)[0].sum(), inputs["q"]), driver)
    o, _ = chunk_gdn2(**inputs, **FLAGS)
    (slope,) = torch.autograd.grad(o.float().sum(), inputs["q"], create_graph=True)
    with pytest.raises(UnsupportedError, match="not twice"):
        torch.autograd.grad(slope.sum(), inputs["q"])


def test_a_launch_that_fails_says_so(driver: Driver) -> None:
    run = _infer(make())
    _bound(run, driver)
    driver.fails_with = 700
    with pytest.raises(
        RuntimeError, match=r"launch 1 of \d of a pass failed: CUDA error 700, no su"
    ):
        run()


def test_a_launch_without_programs_is_left_out(driver: Driver) -> None:
    """As by Triton's launcher; the driver would refuse it."""
    run = _infer(make())
    _bound(run, driver)
    (ready,) = _call._ready.values()
    (sized,) = ready._runners.values()
    (found,) = sized.inference._bound.values()
    assert found is not None
    tensors = [Described((), (), torch.uint8)] * 99
    steps = [x.launch for x in sized._inference._steps]
    launches = [y for x in steps for y in x.launches(range(99))]
    frame = Frames.of([x._replace(grid=(0, 3)) for x in launches], tensors, 0)
    assert frame is not None and not frame._launches
    assert len(Frames.of(launches, tensors, 0)._launches) == len(launches)  # type: ignore[union-attr]


def test_without_tokens_the_pass_itself_runs(driver: Driver) -> None:
    """What has no elements has no address; without sequences there is nothing to launch either."""
    for sizes in ({"T": 0}, {"B": 0, "T": 0}):
        run = _train(make(**sizes))
        for _ in range(4):
            assert not any(x.numel() for x in run())
        assert not driver.launched


def test_buffers_share_memory_where_they_do_not_live_together() -> None:
    def buffer(name: str, size: int) -> Made:
        return Made(name, Described((size,), (1,), torch.uint8), lambda: torch.empty(0), False)

    steps = [
        Worked(None, (), (buffer("a", 300), buffer("b", 100)), (), ("a",)),
        Worked(None, (), (buffer("c", 200), buffer("d", 200)), (), ("b", "c")),
        Worked(None, (), (buffer("e", 128),), (), ()),
    ]
    buffers = {x.name: x for step in steps for x in step.made}
    offsets, nbytes = bound._offsets(steps, buffers, {})
    assert offsets == {"a": 0, "b": 384, "c": 0, "d": 512, "e": 0}
    assert nbytes == 768


def test_a_kind_is_forgotten_with_the_others_only(driver: Driver) -> None:
    """Lengths that differ from call to call are told apart, whichever way they are looked up."""
    runs = {T: _infer(make(T=T)) for T in (16, 24, 40, 48, 56, 64)}
    for _ in range(5):
        for T, run in runs.items():
            assert run().shape[1] == T
    driver.through_triton.clear()
    for run in runs.values():
        run()
    assert not driver.through_triton
    (seen,) = _call._ready._seen.values()
    assert len(seen) == kinds._MOST


def test_too_much_for_one_buffer_stays_many(
    driver: Driver, made: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bound, "MOST", 1000)
    run = _infer(make())
    for _ in range(4):
        run()
    made.clear()
    run()
    assert len(made) > 2 and not driver.launched
