"""What a process that was warmed up still has to load: nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

import gdn2gen
from gdn2gen.base.environment import verifying
from gdn2gen.codegen import build
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.measure.mamba3_runs import mamba3_arguments, mamba3_inputs

DRAW: Final = ("layer", 0, "cpu")
SIZES = {"K": 32, "V": 32, "op": "kda", "dtype": torch.float32}


@verifying()
def nothing_is_loaded_after() -> list[tuple[str, str, str | None]]:
    """Calls, shapes and levels of what was warmed up."""
    warmed = gdn2gen.warmup(
        "2x20x2",
        op="kda",
        head_dim=32,
        dtype="fp32",
        levels=("lean", "fast"),
        final_state=True,
        serving=True,
        decode=["3x1x2", "2x2x2"],
        decode_fields={"pool": True, "indexed": True},
    )
    loaded = build.load.cache_info().misses
    given = make_inputs(2, 23, 2, **SIZES)
    given["v"].requires_grad_()
    for fast in (False, True):
        flags = {"use_qk_l2norm_in_kernel": True, "disable_recompute": fast}
        o, state = gdn2gen.chunk_kda(**given, **flags, output_final_state=True)
        torch.autograd.grad([o, state], given["v"], [o, state], retain_graph=True)
        torch.autograd.grad(o, given["v"], o)
    rows = make_inputs(3, 1, 2, **SIZES)
    with torch.no_grad():
        gdn2gen.fused_recurrent_kda(
            **rows,
            use_qk_l2norm_in_kernel=True,
            state_pool=torch.zeros(5, 2, 32, 32),
            ssm_state_indices=torch.tensor([4, 0, 2], dtype=torch.int32),
        )
    with torch.no_grad():
        gdn2gen.chunk_kda(
            **make_inputs(2, 70, 2, **SIZES),
            use_qk_l2norm_in_kernel=True,
            state_pool=torch.zeros(5, 2, 32, 32),
            ssm_state_indices=torch.tensor([4, 0], dtype=torch.int32),
            has_initial_state=torch.tensor([True, False]),
            checkpoint_every_n_tokens=64,
            checkpoint_state_indices=torch.tensor([[1], [2]], dtype=torch.int32),
        )
    assert build.load.cache_info().misses == loaded, "a kernel was not warmed up"
    return [(x.call, x.shape.name, x.level) for x in warmed]


@verifying()
def decoding_is_as_asked() -> bool:
    """Each field of a decoding problem makes the kernel that `gdn2gen compile` makes for it."""
    from gdn2gen.family.problem import Problem, gate_parameters
    from gdn2gen.family.shapes import Shape
    from gdn2gen.runtime import decoding
    from gdn2gen.workflows.wanted import decoding_problem_from

    made = []
    load = decoding.fixed_launcher

    def noting(problem: object, *given: object) -> object:
        made.append(problem)
        return load(problem, *given)  # type: ignore[arg-type]

    decoding.fixed_launcher = noting  # type: ignore[assignment]
    try:
        for T, fields in (
            (1, {"pool": True, "indexed": True, "strided": True}),
            (1, {"pool": True, "indexed": True, "odd_slots": True, "state_bf16": True}),
            (1, {"initial_state": True, "one_token": False}),
            (3, {"pool": True, "indexed": True, "speculative": True, "accepted": True}),
            (3, {"one_token": True, "final_state": True}),
            (2, {"varlen": True, "pool": True, "one_token": False, "strided": True}),
        ):
            shape = Shape(f"2x{T}x2", 2, T, 2)
            decoding.known_plan.cache_clear()
            gdn2gen.warmup(
                (), op="kda", head_dim=32, dtype="fp32", decode=shape, decode_fields=fields
            )
            problem = Problem(op="kda", K=32, V=32, dtype="fp32")
            assert made[-1] == decoding_problem_from(problem, fields, shape), (T, fields, made[-1])
        # and what a member has beside: a rate, a skip and a gate
        own = {"gate": "softplus", **gate_parameters("mamba2", "softplus"), "has_dt_bias": True}
        served = {"pool": True, "indexed": True, "strided": True}
        gdn2gen.warmup(
            (), op="mamba2", head_dim=32, dtype="fp32", decode=(token := Shape("2x1x2", 2, 1, 2)),
            decode_fields=served, **own,
        )  # fmt: skip
        problem = Problem(op="mamba2", K=32, V=32, dtype="fp32", **own)
        assert made[-1] == decoding_problem_from(problem, served, token), made[-1]
    finally:
        decoding.fixed_launcher = load
    return True


@verifying()
def nothing_of_mamba3_is_loaded_after(backward: bool) -> list[tuple[str, str, str | None]]:
    """Its calls, shapes and levels; of a level that was not asked for the scan's kernels were not
    loaded."""
    K = 40 if backward else 56  # that no other check has loaded kernels of
    sizes = Mamba3Problem(dtype="fp32", state_size=K, head_dim=16, angles=6, skip=True, gate=True)
    given = {"op": "mamba3", "head_dim": K, "value_dim": 16, "dtype": "fp32", "angles": 6}
    given["backward"] = backward
    warmed = gdn2gen.warmup("1x9x1", **given)
    before = build.load.cache_info().misses
    call_all(sizes, fast=False, backward=backward)
    assert build.load.cache_info().misses == before, "a kernel of level lean was not warmed up"
    more = gdn2gen.warmup("1x9x1", levels="fast", decode="2x1x1", **given)
    loaded = build.load.cache_info().misses
    assert (loaded > before + 1) == backward  # the step, and what keeps more for a backward
    call_all(sizes, fast=True, backward=backward)
    token = mamba3_inputs(replace(sizes, carried=True), Shape("a", 3, 1, 1), *DRAW)
    for name in ("Q", "K", "V", "Z", "Angles"):
        token[name] = token[name][:, 0]
    for name in ("ADT", "DT", "Trap"):
        token[name] = token[name][..., 0]
    with torch.no_grad():
        gdn2gen.mamba3_siso_step(**mamba3_arguments(token))
    assert build.load.cache_info().misses == loaded, "a kernel was not warmed up"
    return [(x.call, x.shape.name, x.level) for x in (*warmed, *more)]


def call_all(problem: Mamba3Problem, *, fast: bool, backward: bool) -> None:
    made = mamba3_inputs(problem, Shape("b", 1, 12, 1), *DRAW)
    made["V"].requires_grad_(backward)
    out = gdn2gen.mamba3_siso_combined(**made, disable_recompute=fast)
    if backward:
        torch.autograd.grad(out, made["V"], out)
