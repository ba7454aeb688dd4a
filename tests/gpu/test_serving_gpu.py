"""Prefill for serving and batch-invariant mode on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Final

import decoding_cases
import invariant_checks
import prefill_cases
import pytest
import torch
from gpu_support import DEVICE, Tensors, draw, moved, sized
from prefill_cases import BF16, FP32, Case

import gdn2gen
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import DECODING_OPS, OPS
from gdn2gen.measure.accuracy import public_op, run_op

pytestmark = pytest.mark.gpu

LAYER: Final = Case(K=128, V=128, H=4, HV=4, every=64, dtype=BF16)
ALL_OF_MAMBA2: Final = ("rate", "dt_bias", "D", "z")
MAMBA2: Final = replace(LAYER, op="mamba2", V=64, H=1, HV=8, beside=ALL_OF_MAMBA2)
CASES: Final = {
    "fp32": [Case(op=op, every=64) for op in OPS],
    "a layer's sizes": [replace(LAYER, op=op) for op in OPS],
    "mamba2": [
        *(replace(MAMBA2, v_first=x, state_dtype=BF16 if x else FP32) for x in (False, True)),
        replace(MAMBA2, H=2, HV=6, dtype=torch.float16, every=128, gap=3),
        replace(MAMBA2, lengths=None, padding=(1,), T=1000),
        replace(MAMBA2, lengths=(5000, 64, 0, 3000), every=1024, beside=("D",)),
    ],
    "V first": [replace(LAYER, op=op, v_first=True, state_dtype=BF16) for op in ("gdn2", "kda")],
    "other dims": [Case(K=96, V=192, H=2, HV=4, every=64, dtype=BF16), Case(K=80, V=48, every=128)],
    "slots at odd places": [replace(LAYER, gap=3), replace(LAYER, gap=5, state_dtype=BF16)],
    "tokens of nobody": [replace(LAYER, uncovered=200)],
    "a batch": [replace(LAYER, lengths=None, padding=(1,), T=x) for x in (64, 130, 1000)],
    "padding at slot 0": [replace(LAYER, null_slot=0, padding=(0, 3), every=0)],
    "long": [replace(LAYER, lengths=(5000, 64, 0, 3000), every=1024)],
}


@pytest.mark.parametrize("name", CASES)
def test_beside_fp64(name: str) -> None:
    prefill_cases.check_all(CASES[name], DEVICE)


@pytest.mark.parametrize("op", OPS)
def test_states_on_the_way(op: str) -> None:
    for case in (Case(op=op), replace(LAYER, op=op), replace(LAYER, op=op, lengths=None, T=1000)):
        prefill_cases.intermediate(case, DEVICE)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("op", OPS)
def test_pieces_have_the_bits_of_one_call(op: str, dtype: torch.dtype) -> None:
    with gdn2gen.batch_invariant():
        prefill_cases.in_pieces(op, DEVICE, dtype)


def test_slots_past_2_to_the_31_elements() -> None:
    """The last slots of a pool of 9 GB in bf16, of which nothing else is touched."""
    size = 4 * 128 * 128
    slots = 2**32 // size + 40
    pool = torch.zeros(slots, size, dtype=BF16, device=DEVICE).unflatten(1, (4, 128, 128))
    case = replace(LAYER, state_dtype=BF16, padding=(), begins=None)
    drawn = prefill_cases.draw(case, DEVICE)
    near = {**drawn.serving}
    far = {x: y for x, y in near.items()}
    first = slots - len(drawn.storage)
    pool[first:] = near["state_pool"]
    far["state_pool"] = pool
    for name in ("ssm_state_indices", "checkpoint_state_indices"):
        far[name] = torch.where(near[name] < 0, near[name], near[name] + first)
    with torch.no_grad():
        o, _ = public_op(case.op)(**drawn.inputs, **near, **case.flags)
        o_far, _ = public_op(case.op)(**drawn.inputs, **far, **case.flags)
    assert torch.equal(o, o_far) and torch.equal(pool[first:], near["state_pool"])
    assert not pool[:first].any()


# Batch-invariant mode


@pytest.fixture(name="invariant")
def _invariant() -> Iterator[None]:
    with gdn2gen.batch_invariant():
        yield


LENGTHS: Final = (0, 700, 701, 1725, 5000)


def _rows(found: Tensors, start: int, end: int, n: int) -> Tensors:
    shared = ("A_log", "dt_bias")
    return {
        x: y[n : n + 1] if "state" in x else y[:, start:end]
        for x, y in found.items()
        if not any(name in x for name in shared)
    }


@pytest.mark.parametrize("level", ["lean", "fast"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("heads", "group"), [(2, 1), (16, 4)])
def test_a_sequence_alone_and_among_others(
    op: str, level: str, heads: int, group: int, invariant: None
) -> None:
    """Packed, alone, and in a row beside itself: o, states and every gradient."""
    problem = Problem(op=op, varlen=True, initial_state=True, final_state=True)
    rows = replace(problem, varlen=False)
    inputs, grads = draw(problem, sized(1, LENGTHS[-1], heads, LENGTHS), H=heads // group)

    def call(**given: object) -> object:
        return public_op(op)(**given, disable_recompute=level == "fast")  # type: ignore[arg-type]

    packed = run_op(call, problem, inputs, grads)  # type: ignore[arg-type]
    for n, (start, end) in enumerate(pairwise(LENGTHS)):
        own = {x: y for x, y in inputs.items() if x != "cu_seqlens"}
        alone = {x: y.contiguous() for x, y in _rows(own, start, end, n).items()}
        seeds = {x: y.contiguous() for x, y in _rows(grads, start, end, n).items()}
        expected = _rows(packed, start, end, n)
        found = run_op(call, rows, alone, seeds)  # type: ignore[arg-type]
        assert not moved(expected, {x: found[x] for x in expected}), n
        twice = {x: torch.cat([y, y]) for x, y in alone.items()}
        seeds = {x: torch.cat([y, y]) for x, y in seeds.items()}
        found = run_op(call, rows, twice, seeds)  # type: ignore[arg-type]
        assert not moved(expected, {x: found[x][1:] for x in expected}), n


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("op", DECODING_OPS)
def test_decoding_alone_and_among_others(op: str, v_first: bool, invariant: None) -> None:
    """A step of 200 sequences, which takes other tiles without the mode, and of each of three."""
    case = decoding_cases.Case(
        op=op, N=200, K=128, V=128, H=8, HV=8, dtype=BF16, states="initial", v_first=v_first
    )
    drawn = decoding_cases.draw(case, DEVICE)
    step = decoding_cases.public_op(op)
    with torch.no_grad():
        o, state = step(**drawn.inputs, **case.flags, output_final_state=True)
        assert state is not None
        for n in (0, 77, 199):
            row = {name: x[n : n + 1].contiguous() for name, x in drawn.inputs.items()}
            alone, after = step(**row, **case.flags, output_final_state=True)
            assert after is not None
            assert torch.equal(alone[0], o[n]) and torch.equal(after[0], state[n]), n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", DECODING_OPS)
def test_prefill_and_decode_agree(op: str, dtype: torch.dtype) -> None:
    assert invariant_checks.prefill_then_decode(op, dtype, DEVICE) < 1
