"""Direct launches: the first goes through Triton, later ones do not, what differs does again."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gdn2gen.codegen.build import load
from gdn2gen.codegen.direct import DirectKernel, direct_launch
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.stages import STAGES

X = torch.zeros(64)


class FakeKernel:
    """What DirectKernel uses of Triton's JITFunction; notes which way each launch took."""

    def __init__(
        self,
        *,
        arguments: tuple[str, ...] = ("x", "scale", "T"),
        specialised: tuple[str, ...] = (),
    ) -> None:
        self.arg_names = [*arguments, "NT", "BT"]
        self.params = [
            SimpleNamespace(do_not_specialize=name not in specialised) for name in self.arg_names
        ]
        self.pre_run_hooks: list[Callable[..., None]] = []
        self.through_triton: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []
        self.compiled = SimpleNamespace(
            run=lambda *arguments: self.direct.append(arguments),
            function="function",
            packed_metadata="metadata",
        )

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*arguments: Any, **named: Any) -> Any:
            self.through_triton.append((grid, arguments, named))
            return self.compiled

        return launch


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The present device, as Triton's driver would give it."""
    from triton.runtime import driver

    present = SimpleNamespace(index=0)
    active = SimpleNamespace(
        get_current_device=lambda: present.index,
        get_current_stream=lambda index: f"stream of {index}",
    )
    monkeypatch.setattr(driver, "_active", active)
    return present


def _launch(kernel: DirectKernel, x: torch.Tensor = X, T: int = 70) -> None:
    kernel[(8, 2)](x, 0.5, T, NT=3, BT=32, num_warps=4)


def test_the_second_launch_hands_the_compiled_kernel_its_arguments(device: SimpleNamespace) -> None:
    fake = FakeKernel()
    kernel = DirectKernel(fake)
    _launch(kernel)
    assert len(fake.through_triton) == 1 and not fake.direct
    _launch(kernel, T=71)
    assert len(fake.through_triton) == 1
    (given,) = fake.direct
    assert given[:6] == (8, 2, 1, "stream of 0", "function", "metadata")
    assert given[6:9] == (None, None, None)
    assert given[9:] == (X.data_ptr(), 0.5, 71, 3, 32)


def test_every_device_compiles_its_own(device: SimpleNamespace) -> None:
    fake = FakeKernel()
    kernel = DirectKernel(fake)
    _launch(kernel)
    device.index = 1
    _launch(kernel)
    assert len(fake.through_triton) == 2 and not fake.direct
    _launch(kernel)
    assert fake.direct[0][3] == "stream of 1"


@pytest.mark.parametrize(
    ("x", "T"), [(X[1:], 70), (X, 2**31), (X, -(2**31) - 1)], ids=["unaligned", "long", "low"]
)
def test_what_triton_compiles_anew_goes_through_it(
    x: torch.Tensor, T: int, device: SimpleNamespace
) -> None:
    fake = FakeKernel()
    kernel = DirectKernel(fake)
    _launch(kernel, x, T)
    _launch(kernel)
    _launch(kernel, x, T)
    assert len(fake.through_triton) == 3 and not fake.direct
    _launch(kernel)
    assert len(fake.direct) == 1


def test_every_tensor_has_to_be_aligned(device: SimpleNamespace) -> None:
    fake = FakeKernel(arguments=("x", "y", "T"))
    kernel = DirectKernel(fake)
    for y in (X, X[4:], X[1:], X):
        kernel[(8,)](X, y, 70, NT=3, BT=32)
    assert [y.data_ptr() for _, (_, y, _), _ in fake.through_triton] == [
        x.data_ptr() for x in (X, X[1:])
    ]
    assert [given[9:] for given in fake.direct] == [
        (X.data_ptr(), y.data_ptr(), 70, 3, 32) for y in (X[4:], X)
    ]


def test_a_kernel_that_is_specialised_on_sizes_always_goes_through_triton(
    device: SimpleNamespace,
) -> None:
    fake = FakeKernel(specialised=("T",))
    kernel = DirectKernel(fake)
    for _ in range(3):
        _launch(kernel)
    assert len(fake.through_triton) == 3 and not fake.direct


def test_a_profiler_sees_every_launch(
    device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    fake = FakeKernel()
    kernel = DirectKernel(fake)
    _launch(kernel)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
    _launch(kernel)
    assert len(fake.through_triton) == 2 and not fake.direct
    monkeypatch.undo()
    fake.pre_run_hooks.append(lambda *_: None)
    _launch(kernel)
    assert len(fake.through_triton) == 3


@pytest.mark.parametrize("stage", STAGES)
def test_rendered_kernels_can_be_launched_directly(stage: str) -> None:
    """Only sizes and scalars that are not specialised, and every other argument by its name."""
    problem = Problem(gate="softplus", has_A_log=True, has_dt_bias=True, initial_state=True)
    module = load(render(problem, stage, default_config(stage, problem)))
    launch = direct_launch(module)
    kernels = [x for x in launch.__globals__.values() if isinstance(x, DirectKernel)]
    assert kernels and launch.__kwdefaults__ == module.launch.__kwdefaults__
    assert not any(isinstance(x, DirectKernel) for x in vars(module).values())
    operands = {x.name for x in STAGES[stage].operands(problem)}
    for kernel in kernels:
        first = [parameter.name in operands for parameter in kernel._kernel.params]
        assert first == sorted(first, reverse=True)
        for parameter in kernel._kernel.params:
            plain = parameter.name in operands or parameter.is_constexpr
            assert plain or parameter.do_not_specialize, parameter.name


def test_modules_without_triton_kernels_are_left_as_they_are() -> None:
    module: Any = ModuleType("other")
    module.launch = lambda: None
    assert direct_launch(module) is module.launch
