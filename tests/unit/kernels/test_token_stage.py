"""The stage over single tokens: its kernels compile without spills, and its configs by the rule."""

from __future__ import annotations

import itertools
import re
from typing import Final

import pytest

from gdn2gen.base.device import named_device
from gdn2gen.base.errors import InputError
from gdn2gen.codegen.build import compile_ahead, compile_kernel, launch_options, load
from gdn2gen.codegen.render import render
from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.limits import Place
from gdn2gen.kernels.recurrent import RECURRENT, knobs_for
from gdn2gen.kernels.validity import valid_configs, why_invalid

_POOL: Final = {"pool": True, "indexed": True}
_GATED: Final = {"gate": "softplus", "has_A_log": True, "has_dt_bias": True}
_GUESSED: Final = {**_POOL, "speculative": True, "accepted": True, "varlen": True}
H200: Final = named_device("H200")


def ruled(problem: DecodingProblem, sequences: int, heads: int = 16) -> Config:
    knobs = knobs_for(problem, sequences, heads, H200.sms)
    return default_config("recurrent", problem).replace(**knobs)


# Of sm_90 at K = V = 128, small batches and large ones: every op, one token and several; all pairs
# of them, and the rest of the product is slow.
COMPILED: Final = [
    pytest.param(DecodingProblem(op=op, **flags, **gate, state_v_first=v), batch, "sm_90",
                 id=f"{op}-{name}-{'V' if v else 'K'}-first-B{batch}",
                 marks=[pytest.mark.slow] * ((i + j + k) % 2))
    for (i, (op, gate)), (j, (name, flags)), (k, (v, batch)) in itertools.product(
        enumerate((("gdn2", _GATED), ("kda", {**_GATED, "beta_sigmoid": True}))),
        enumerate((("one", {**_POOL, "one_token": True}), ("guessed", _GUESSED))),
        enumerate(((False, 256), (True, 256), (True, 1))),
    )
] + [
    pytest.param(
        DecodingProblem(
            op="mamba2", V=64, **_POOL, one_token=True, strided=True, gate="softplus",
            gate_dtype="bf16", has_rate=True, has_dt_bias=True, has_D=True, has_z=True,
            tied_D=True, state_v_first=True,
        ),
        256, "sm_90", id="mamba2-one-V-first-B256",
    ),
    pytest.param(DecodingProblem(K=256, V=512, **_GUESSED, state_v_first=True), 64, "sm_90",
                 id="wide"),
    pytest.param(DecodingProblem(K=96, V=48, **_POOL, strided=True), 8, "sm_90", id="masked"),
    *(pytest.param(DecodingProblem(**_GUESSED, state_bf16=True), 64, arch, id=arch,
                   marks=[pytest.mark.slow] * (arch == "sm_86"))
      for arch in ("sm_80", "sm_86", "sm_100", "sm_120")),
]  # fmt: skip


@pytest.mark.parametrize(("problem", "batch", "arch"), COMPILED)
def test_kernels_compile_and_keep_the_state_in_registers(
    problem: DecodingProblem, batch: int, arch: str
) -> None:
    used = compile_ahead(problem, "recurrent", ruled(problem, batch), named_device(arch))
    assert used.spill_bytes == 0


# Of a decay of one number a head, whose loads ptxas spreads the most; and of Mamba-2.
SPREAD: Final = [
    DecodingProblem(op="gated_delta_rule", **_GATED, beta_sigmoid=True, state_v_first=True,
                    state_bf16=x, one_token=True, **_POOL)
    for x in (False, True)
] + [
    DecodingProblem(op="mamba2", V=64, gate="softplus", gate_dtype="bf16", has_rate=True,
                    has_dt_bias=True, state_v_first=True, state_bf16=True, one_token=True, **_POOL)
]  # fmt: skip


@pytest.mark.parametrize("problem", SPREAD, ids=["fp32", "bf16", "mamba2"])
def test_loads_ahead_are_all_under_way_before_anything_is_computed(
    problem: DecodingProblem,
) -> None:
    """In machine code: no load of 16 bytes, as a state's are, past the first sum over lanes."""
    behind = default_config("recurrent", problem, arch="sm_90")
    for config in (behind.replace(loads="ahead"), behind):
        module = load(render(problem, "recurrent", config))
        options = launch_options(config)
        kernel = compile_kernel(module, "recurrent_kernel", problem, "recurrent", options, H200)
        lines = kernel.asm["sass"].splitlines()
        loads = [i for i, x in enumerate(lines) if re.search(r"LDG\.E\.128", x)]
        first_sum = next(i for i, x in enumerate(lines) if "SHFL.BFLY" in x)
        past = sum(i > first_sum for i in loads)
        assert (past == 0) == (config["loads"] == "ahead")
        assert len(loads) >= config.size("BV") * problem.K // 256  # of both dtypes


@pytest.mark.parametrize("problem", SPREAD[1:], ids=["bf16", "mamba2"])
def test_four_tiles_share_a_token_in_registers(problem: DecodingProblem) -> None:
    """Twice the rows of a program of 16 in 168 registers, so that 12 are on a multiprocessor. What
    that spills is 0 bytes under Triton 3.6, and 16 under 3.9."""
    config = default_config("recurrent", problem, arch="sm_90").replace(
        BV=8, tiles=4, loads="ahead", maxnreg=168
    )
    used = compile_ahead(problem, "recurrent", config, H200)
    assert used.registers <= 168 and used.spill_bytes <= 32


def test_tiles_want_one_token_and_its_state() -> None:
    for flags in ({}, {"one_token": True}, {"initial_state": True}, {"pool": True, "varlen": True}):
        problem = DecodingProblem(state_v_first=True, **flags)
        config = default_config("recurrent", problem).replace(tiles=2)
        assert why_invalid(config, problem) is not None
    for flags in ({"initial_state": True}, {"pool": True}, {**_POOL, "speculative": True}):
        problem = DecodingProblem(state_v_first=True, one_token=True, **flags)
        assert why_invalid(default_config("recurrent", problem).replace(tiles=2), problem) is None


def test_loads_ahead_want_an_index() -> None:
    """Nothing leaves a kernel that takes every sequence: there is no branch to stand ahead of."""
    for flags in ({}, {"pool": True}, _POOL):
        problem = DecodingProblem(state_v_first=True, one_token=True, **flags)
        config = default_config("recurrent", problem)
        assert config["loads"] == "behind"
        reason = why_invalid(config.replace(loads="ahead"), problem)
        assert (reason is None) == problem.indexed, reason


@pytest.mark.parametrize("V", [16, 48, 128, 512])
@pytest.mark.parametrize("K", [16, 40, 96, 128, 256])
def test_the_rule_gives_valid_configs(K: int, V: int) -> None:
    flags = itertools.product((False, True), repeat=2)
    for (v_first, bf16), batch in itertools.product(flags, (0, 1, 8, 64, 4096)):
        problem = DecodingProblem(K=K, V=V, state_v_first=v_first, state_bf16=bf16)
        config = ruled(problem, batch)
        assert why_invalid(config, problem) is None
        assert config in [*valid_configs("recurrent", Place(problem, 1))]


def test_small_batches_are_cut_into_more_programs() -> None:
    def tiles(batch: int, **flags: bool) -> int:
        return ruled(DecodingProblem(**flags), batch).size("BV")

    assert [tiles(x, state_v_first=True) for x in (1, 8, 32, 256)] == [8, 8, 16, 16]
    assert tiles(1) == 16 and tiles(1, state_bf16=True) == 32 and tiles(256) == 64


def test_scalars_are_those_that_are_read() -> None:
    """Each costs a launch a little: of one token there are none of lengths."""
    plain = RECURRENT.scalars_of(DecodingProblem(one_token=True))
    assert plain == ("scale", "H", "HV", "HG")
    step = DecodingProblem(op="mamba2", one_token=True)
    assert RECURRENT.scalars_of(step) == ("H", "HV")
    skipping = {"op": "mamba2", "one_token": True, "has_D": True}
    assert RECURRENT.scalars_of(DecodingProblem(**skipping)) == ("H", "HV")
    assert RECURRENT.scalars_of(DecodingProblem(**skipping, tied_D=True))[2:] == ("D_row",)
    all_of_them = {*RECURRENT.scalars}
    for op in ("gdn2", "kda"):
        problem = DecodingProblem(op=op, gate="sigmoid", **_GUESSED, strided=True)
        assert {*RECURRENT.scalars_of(problem)} <= all_of_them


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"pool": True, "final_state": True}, "neither initial_state nor final_state"),
        ({"indexed": True}, "indexed needs pool"),
        ({"pool": True, "speculative": True}, "speculative needs indexed"),
        ({**_POOL, "accepted": True}, "accepted needs speculative"),
        ({"one_token": True, "varlen": True}, "no one_token"),
        ({"tied_D": True}, "tied_D needs has_D"),
    ],
)
def test_problems_that_cannot_be(flags: dict[str, bool], said: str) -> None:
    with pytest.raises(InputError, match=said):
        DecodingProblem(**flags)
