"""Passes: buffers laid out as torch would, operands in the order that the kernels take them in."""

from __future__ import annotations

import ast
from dataclasses import replace
from functools import partial

import pytest
import torch
from taken import having
from tilelang_configs import tilelang_config

from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config, default_config, language_of
from gdn2gen.kernels.plans import stages_of
from gdn2gen.kernels.schedule import Buffer
from gdn2gen.kernels.stages import STAGES
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.runtime import passes
from gdn2gen.runtime.layout import strides_of
from gdn2gen.runtime.passes import allocator


@pytest.mark.parametrize("shape", [(2, 3, 4), (5,), (2, 0, 3), (0,), (1, 0, 4, 2), (3, 1, 1)])
def test_strides_are_those_of_torch(shape: tuple[int, ...]) -> None:
    assert strides_of(shape) == torch.empty(shape).stride()
    if shape:
        made = torch.empty_strided(shape, strides_of(shape))
        assert made.is_contiguous()


def test_programs_are_told_how_far_rows_of_an_input_lie_apart() -> None:
    """Of a slice of a projection as torch says; else as if a dim of one had no distance."""
    apart = torch.empty(2, 5, 48)[..., 16:].view(2, 5, 4, 8)
    assert passes._described(apart).strides == (240, 48, 8, 1)
    one = torch.empty(1, 5, 4, 8).as_strided((1, 5, 4, 8), (3, 32, 8, 1))
    assert passes._described(one).strides == (160, 32, 8, 1)


def test_buffers_on_a_gpu_skip_the_dispatcher_where_torch_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer = Buffer("x", ("N", "V"), "bf16")
    sizes, device = {"N": 3, "V": 4}, torch.device("cuda", 1)
    quick = object()
    monkeypatch.setattr(passes, "_empty_on_gpu", lambda *given: (quick, given))
    assert allocator(buffer, sizes, device)() == (quick, ((3, 4), (4, 1), torch.bfloat16))
    assert allocator(buffer, sizes, torch.device("cpu"))().shape == (3, 4)
    monkeypatch.setattr(passes, "_empty_on_gpu", None)
    plain = allocator(buffer, sizes, device)
    assert isinstance(plain, partial) and plain.func is torch.empty
    assert plain.keywords == {"dtype": torch.bfloat16, "device": device}


_PROBLEM = Problem(
    gate="softplus", has_A_log=True, has_dt_bias=True, initial_state=True, final_state=True
)


def _configs() -> list[Config]:
    """The default of every stage, and what there is in TileLang for batches of both kinds."""
    scans = ("scan", "scan_states", "rescan", "reverse_scan")
    in_tilelang = [
        tilelang_config(stage, _PROBLEM)
        for stage in stages_of("gdn2")
        if stage not in scans and any(x.language == "tilelang" for x in STAGES[stage].forms)
    ]
    packed = replace(_PROBLEM, varlen=True)
    return [
        *(
            default_config(stage, having(_PROBLEM, stage))
            for stage in STAGES
            if not stage.startswith("forward")
        ),
        *(default_config(stage, _PROBLEM).replace(language="tilelang") for stage in scans),
        *(x for x in in_tilelang if why_invalid(x, packed, "sm_90") is None),
    ]


@pytest.mark.parametrize("config", _configs(), ids=lambda x: f"{x.stage}-{language_of(x)}")
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_launches_take_the_operands_in_their_order(config: Config, packed: bool) -> None:
    """A pass hands the tensors over by position, and the scalars by name."""
    problem = having(replace(_PROBLEM, varlen=packed), config.stage)
    tree = ast.parse(render(problem, config.stage, config).source)
    (launch,) = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "launch"]
    stage = STAGES[config.stage]
    assert [x.arg for x in launch.args.args] == [x.name for x in config.operands(problem)]
    assert {x.arg for x in launch.args.kwonlyargs} == {stage.count, *stage.scalars_of(problem)}
