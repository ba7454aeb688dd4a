"""Batch-invariant mode: which bits may not change, and how far prefill and decode are apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gdn2gen
from gdn2gen.base.device import named_device
from gdn2gen.base.environment import is_batch_invariant
from gdn2gen.family.prefill import PrefillProblem
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.runtime.runner import Runner
from gdn2gen.store.dispatch import find_recipe

Check = Callable[..., Any]


# Of every op on a GPU; a plan of each kind here.
@pytest.mark.parametrize(("op", "level"), [("gdn2", "lean"), ("gated_delta_rule", "fast")])
def test_a_sequence_alone_and_among_others(op: str, level: str, interpreter: Check) -> None:
    assert interpreter("invariant_checks:alone_and_among_others", op, level), "the check can fail"


@pytest.mark.parametrize("op", ["simple_gla"])
def test_however_it_is_called(op: str, interpreter: Check) -> None:
    interpreter("invariant_checks:traced_and_with_checkpoints", op)


@pytest.mark.parametrize(
    ("op", "dtype"),
    [("gdn2", torch.bfloat16), ("gated_delta_rule", torch.float32)],
)
def test_prefill_and_decode_agree(op: str, dtype: torch.dtype, interpreter: Check) -> None:
    assert interpreter("invariant_checks:prefill_then_decode", op, dtype) < 1


def test_decoding(interpreter: Check) -> None:
    interpreter("invariant_checks:decoding_knobs", "gdn2")


def test_the_mode_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDN2GEN_BATCH_INVARIANT", "1")
    assert is_batch_invariant()
    with gdn2gen.batch_invariant(False):
        assert not is_batch_invariant()
        with gdn2gen.batch_invariant():
            assert is_batch_invariant()
    assert is_batch_invariant()
    monkeypatch.delenv("GDN2GEN_BATCH_INVARIANT")
    assert not is_batch_invariant()


@pytest.mark.parametrize("level", ["lean", "fast"])
@pytest.mark.parametrize("op", ["gdn2", "gated_delta_rule", "gla", "mamba2"])
def test_no_sequence_is_cut_into_segments(op: str, level: str) -> None:
    """Neither forward nor backward, however long it is and whether packed or not: where it is cut
    would depend on how many others there are."""
    device, few = named_device("H200"), Regime(tokens=100_000, sequences=1, heads=1)
    for varlen in (False, True):
        problem = Problem(op=op, varlen=varlen)
        assert find_recipe(problem, few, device, level=level).saved_segments > 1
        with gdn2gen.batch_invariant():
            found = find_recipe(problem, few, device, level=level)
        assert found.saved_segments == 1
        runner = Runner(found.recipe, found.agreed_segments)
        plan = found.recipe.plan
        scans = [x for x in plan.stages if "scan" in x]
        assert all(found.recipe[x].get("segments", "serial") == "serial" for x in scans)
        if level == "lean":  # calls that keep states on the way have the bits of those that do not
            keeping = PrefillProblem.of(problem, "bf16", False)
            assert why_invalid(found.recipe[plan.forward[-1]], keeping) is None
        assert {runner.max_segments(x) for x in scans if "reverse" not in x} == {1}
