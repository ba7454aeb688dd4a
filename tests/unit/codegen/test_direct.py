"""Direct launches: the first goes through Triton, later ones do not, what differs does again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from taken import having
from tilelang_configs import tilelang_by_chunk

from gdn2gen.base.device import named_device
from gdn2gen.codegen.build import load
from gdn2gen.codegen.direct import DirectKernel, direct_launch
from gdn2gen.codegen.fixed import FixedLaunch, fixed_launch
from gdn2gen.codegen.programs import programs_of
from gdn2gen.codegen.render import render
from gdn2gen.codegen.ship import ship_stage
from gdn2gen.codegen.sized import SizedLaunch, sized_launch
from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.plans import stages_of
from gdn2gen.kernels.recurrent import RECURRENT
from gdn2gen.kernels.stages import STAGES

X = torch.zeros(64)


class FakeKernel:
    """What DirectKernel uses of Triton's JITFunction; notes which way each launch took."""

    def __init__(
        self,
        *,
        arguments: tuple[str, ...] = ("x", "scale", "T"),
        specialised: tuple[str, ...] = (),
        anywhere: tuple[str, ...] = (),
    ) -> None:
        self.arg_names = [*arguments, "NT", "BT"]
        self.params = [
            SimpleNamespace(
                name=name,
                do_not_specialize=name not in specialised,
                do_not_specialize_on_alignment=name in anywhere,
            )
            for name in self.arg_names
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


# the forward in one kernel is in TileLang alone
@pytest.mark.parametrize("stage", [x for x in STAGES if not x.startswith("forward")])
def test_rendered_kernels_can_be_launched_directly(stage: str) -> None:
    """Only sizes and scalars that are not specialised, and every other argument by its name."""
    gated = Problem(gate="softplus", has_A_log=True, has_dt_bias=True, initial_state=True)
    problem = having(gated, stage)
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


# A launch whose scalars are always the same


def _fixed(fake: FakeKernel, scalars: tuple[int | float, ...] = (0.5, 70)) -> FixedLaunch:
    return FixedLaunch(DirectKernel(fake), 1, (8,), (None, *scalars), {"NT": 3, "BT": 32})


def test_a_fixed_launch_hands_over_addresses(device: SimpleNamespace) -> None:
    fake = FakeKernel()
    launch = _fixed(fake)
    for x in (X, X[4:], X[8:]):
        launch(x)
    assert len(fake.through_triton) == 1
    assert fake.direct[0][:6] == (8, 1, 1, "stream of 0", "function", "metadata")
    assert [given[9:] for given in fake.direct] == [
        (x.data_ptr(), 0.5, 70, 3, 32) for x in (X[4:], X[8:])
    ]


def test_what_lies_anywhere_is_launched_directly_if_its_kernel_does_not_mind(
    device: SimpleNamespace,
) -> None:
    minds, does_not = FakeKernel(), FakeKernel(anywhere=("x",))
    for fake in (minds, does_not):
        launch = _fixed(fake)
        for x in (X, X[1:], X[1:]):
            launch(x)
    assert (len(minds.through_triton), len(minds.direct)) == (3, 0)
    assert (len(does_not.through_triton), len(does_not.direct)) == (1, 2)


@pytest.mark.parametrize("how", ["long", "specialised"])
def test_a_fixed_launch_that_triton_compiles_anew(how: str, device: SimpleNamespace) -> None:
    fake = FakeKernel(specialised=("T",) if how == "specialised" else ())
    launch = _fixed(fake, (0.5, 2**31 if how == "long" else 70))
    for _ in range(3):
        launch(X)
    assert len(fake.through_triton) == 3 and not fake.direct


def test_a_rendered_kernel_over_tokens_has_a_fixed_launch() -> None:
    problem = DecodingProblem(pool=True, indexed=True, varlen=True)
    module = load(render(problem, "recurrent", default_config("recurrent", problem)))
    given = {name: i for i, name in enumerate(RECURRENT.scalars_of(problem))}
    launch = fixed_launch(module, {"n_sequences": 5, **given})
    operands = [x.name for x in RECURRENT.operands(problem)]
    names = [x.name for x in launch._direct.parameters]
    assert names == [*operands, *given, "K", "V", "BV"]
    assert launch._rest == (*given.values(), 128, 128, 16)
    assert launch._size == (5 * given["HV"] * 8, 1, 1)
    free = {"cu_seqlens", "ssm_state_indices"}
    assert [operands[i] for i in launch._aligned] == [x for x in operands if x not in free]


# Launches of several kernels, at one call's sizes


class FakeModule:
    """A launch as modules have it: a kernel at some sizes, a program in TileLang, a kernel."""

    SOURCE = """
def launch(x, y, *, scale, T):
    if T > 50:
        first_kernel[(T,)](x, scale, T, NT=3, BT=32, num_warps=4)
    compiled()(y, x, T)
    second_kernel[(8, 2)](y, scale, T, NT=5, BT=64)
"""

    def __init__(self, source: str = SOURCE) -> None:
        self.first, self.second = FakeKernel(), FakeKernel()
        self.programs: list[tuple[Any, ...]] = []
        self.asked = 0
        names = {
            "first_kernel": DirectKernel(self.first),
            "second_kernel": DirectKernel(self.second),
            "compiled": self._compiled,
        }
        exec(source, names)
        self.launch: Any = names["launch"]
        self.launch.of_module = True

    def _compiled(self) -> Any:
        self.asked += 1
        return lambda *given: self.programs.append(given)


Y = torch.zeros(64)


def test_a_sized_launch_finds_out_once_what_is_launched(device: SimpleNamespace) -> None:
    fake = FakeModule()
    launch = sized_launch(fake.launch, {"scale": 0.5, "T": 70})
    for x in (X, X[4:], X[8:]):
        launch(x, Y)
    assert len(fake.first.through_triton) == len(fake.second.through_triton) == 1
    assert [x[:4] for x in fake.first.direct] == [(70, 1, 1, "stream of 0")] * 2
    assert [x[9:] for x in fake.first.direct] == [
        (x.data_ptr(), 0.5, 70, 3, 32) for x in (X[4:], X[8:])
    ]
    assert [x[9:] for x in fake.second.direct] == [(Y.data_ptr(), 0.5, 70, 5, 64)] * 2
    assert [(y is Y, x.data_ptr(), T) for y, x, T in fake.programs] == [
        (True, x.data_ptr(), 70) for x in (X, X[4:], X[8:])
    ]
    assert fake.asked == 2, "the program is asked for in the first call, and once for the others"
    short = sized_launch(fake.launch, {"scale": 0.5, "T": 40})
    short(X, Y)
    short(X, Y)
    assert len(fake.first.direct) == 2 and len(fake.second.direct) == 4


@pytest.mark.parametrize("how", ["unaligned", "watched", "long"])
def test_a_sized_launch_that_is_not_as_in_most_calls(how: str, device: SimpleNamespace) -> None:
    fake = FakeModule()
    launch = sized_launch(fake.launch, {"scale": 0.5, "T": 2**31 if how == "long" else 70})
    for _ in range(2):
        launch(X, Y)
    before = len(fake.first.through_triton)
    if how == "watched":
        fake.second.pre_run_hooks.append(lambda *_: None)
    launch(X[1:] if how == "unaligned" else X, Y)
    seen = fake.second if how == "watched" else fake.first
    assert len(seen.through_triton) == before + 1
    assert len(fake.programs) == 3


def test_a_launch_that_looks_at_its_tensors_stays_as_it_is(device: SimpleNamespace) -> None:
    source = FakeModule.SOURCE.replace("compiled()(y, x, T)", "compiled()(y, x.shape[0], T)")
    fake = FakeModule(source)
    launch = sized_launch(fake.launch, {"scale": 0.5, "T": 70})
    for x in (X, X[4:]):
        launch(x, Y)
    assert [given[1] for given in fake.programs] == [64, 60]
    plain = sized_launch(lambda *tensors, **scalars: None, {"T": 3})
    assert not isinstance(plain, SizedLaunch), "only launches of rendered modules are looked into"


# What is compiled ahead is what is launched


def _ahead_configs() -> list[tuple[Problem, Config]]:
    """The default of every stage, segments side by side, and what there is in TileLang."""
    gated: dict[str, Any] = {"gate": "softplus", "has_A_log": True, "final_state": True}
    plain = Problem(**gated, has_dt_bias=True)
    found = []
    for problem in (plain, replace(plain, op="kda", varlen=True)):
        for stage in stages_of(problem.op):
            if STAGES[stage].every or stage.startswith("forward"):
                continue  # compiled in test_ahead_of_time and test_forward, 20 s and more each
            if stage == "scan_transitions" and problem.varlen:
                continue  # of sequences that are cut into segments
            default = default_config(stage, problem)
            found.append((problem, default))
            if default.get("segments") and not problem.varlen:
                found.append((problem, default.replace(segments="parallel")))
            if "scan" in stage:
                found.append((problem, found[-1][1].replace(language="tilelang")))
            elif stage != "reprepare_factors":
                found.append((problem, tilelang_by_chunk(stage, problem)))
    outside = Problem(op="gated_delta_rule", **gated)
    return found + [(outside, default_config(x, outside)) for x in ("prepare", "grad_key")]


@pytest.mark.parametrize(
    ("problem", "config"), _ahead_configs(), ids=lambda x: str(x)[:60] if x else ""
)
def test_kernels_are_compiled_ahead_as_they_are_launched(
    problem: Problem, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same options, tensors and scalars: of others Triton's cache would have no kernel."""
    stage = STAGES[config.stage]
    ahead: dict[str, Any] = {}

    def note(module: Any, kernel: Any, dtypes: Any, scalars: Any, options: Any, _: Any) -> None:
        ahead[kernel.__name__] = ({*dtypes, *scalars}, options)

    monkeypatch.setattr("gdn2gen.codegen.build.compile_for_triton", note)
    monkeypatch.setattr("gdn2gen.codegen.ship.keep_for", lambda *_: None)
    ship_stage(problem, config.stage, config, named_device("sm_90"), False)
    launch = direct_launch(load(render(problem, config.stage, config)))
    for name in programs_of(SimpleNamespace(**launch.__globals__)):
        monkeypatch.setitem(launch.__globals__, name, lambda: None)
    sizes = dict.fromkeys((stage.count, *stage.scalars), 64)
    noted = SizedLaunch(launch, sizes)._noted(len(config.operands(problem)))
    assert noted, "a launch does no more with its tensors than hand them on"
    launched = [x for x in noted if isinstance(x.what, DirectKernel)]
    for x in launched:
        kernel = x.what._kernel
        options = {name: y for name, y in x.named.items() if name not in kernel.arg_names}
        taken = {y.name for y in kernel.params if not y.is_constexpr}
        assert taken == {*kernel.arg_names[: len(x.arguments)]} | (taken & {*x.named})
        assert ahead[kernel.__name__] == (taken, options)
    assert {x.what._kernel.__name__ for x in launched} == {*ahead}
