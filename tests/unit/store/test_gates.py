"""Whether a call has its decay's gate apart, by what is on file with the gate and without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

import gdn2gen
from gdn2gen.base.device import named_device
from gdn2gen.base.environment import batch_invariant
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.family.shapes import SHAPES
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.store import pins
from gdn2gen.store.dispatch import explain_recipe, find_recipe, forced_recipe, recipe_document
from gdn2gen.store.gates import find_call, is_apart, without_gate
from gdn2gen.store.pins import Pin

H200: Final = named_device("H200")
TRAIN: Final = SHAPES["train4k"].regime
LAYER: Final = Problem(gate="softplus", gate_dtype="bf16", has_A_log=True, has_dt_bias=True)


@pytest.fixture(autouse=True)
def _by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("GDN2GEN_GATE_APART", raising=False)
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path))
    yield
    pins.forget()
    gdn2gen.reload()


@pytest.mark.parametrize("level", ["lean", "fast"])
@pytest.mark.parametrize("problem", [
    LAYER,
    replace(LAYER, op="kda", beta_sigmoid=True, neg_eigval=True),
    replace(LAYER, gate="sigmoid", bound=5),
    replace(LAYER, initial_state=True, final_state=True),
    replace(LAYER, op="gated_delta_rule", beta_sigmoid=True),
], ids=["gdn2", "kda", "bounded", "states", "a gate of heads"])  # fmt: skip
def test_a_layers_call_runs_what_is_tuned_without_a_gate(problem: Problem, level: str) -> None:
    found = find_call(problem, TRAIN, H200, level=level)
    plain = without_gate(problem)
    assert found == find_recipe(plain, TRAIN, H200, level=level) and found.source == "exact"
    assert found.recipe.problem == plain and plain.gate_dtype == "fp32"
    assert (plain.beta_sigmoid, plain.initial_state) == (
        problem.beta_sigmoid,
        problem.initial_state,
    )
    assert found.gate_apart == f"{problem.gate} of bf16" == recipe_document(found)["gate_apart"]
    assert f"gate      apart: {problem.gate} of bf16" in explain_recipe(found)


@pytest.mark.parametrize(
    ("problem", "regime"),
    [
        (Problem(), TRAIN),
        (replace(LAYER, varlen=True), SHAPES["varlen8k"].regime),  # the same plan either way
        (replace(LAYER, K=256, V=256), TRAIN),
        (LAYER, Regime(256, 1, 16)),
        (LAYER, Regime(1, 1, 1)),
    ],
    ids=["no gate", "packed", "wide", "few", "one"],
)
def test_others_run_what_they_ran(problem: Problem, regime: Regime) -> None:
    assert not is_apart(problem, regime, H200)
    found = find_call(problem, regime, H200)
    assert found == find_recipe(problem, regime, H200) and found.gate_apart is None


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDN2GEN_GATE_APART", "0")
    assert not is_apart(LAYER, TRAIN, H200)
    monkeypatch.setenv("GDN2GEN_GATE_APART", "1")
    assert is_apart(LAYER, Regime(1, 1, 1), H200) and not is_apart(Problem(), TRAIN, H200)
    monkeypatch.setenv("GDN2GEN_GATE_APART", "")
    assert is_apart(LAYER, TRAIN, H200)


def test_not_where_a_recipe_is_forced_or_results_may_not_depend_on_the_batch() -> None:
    with forced_recipe(Recipe.default(LAYER)):
        assert not is_apart(LAYER, TRAIN, H200)
    with batch_invariant():
        assert not is_apart(LAYER, TRAIN, H200)
    assert is_apart(LAYER, TRAIN, H200)


def test_what_is_slower_with_the_gates_bytes_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files, were the memory slower: bytes of the gate cost more than is won."""
    assert H200.memory_gbps is not None
    assert is_apart(LAYER, TRAIN, replace(H200, memory_gbps=H200.memory_gbps / 2))
    assert not is_apart(LAYER, TRAIN, replace(H200, memory_gbps=H200.memory_gbps / 8))
    assert not is_apart(LAYER, TRAIN, replace(H200, memory_gbps=None))


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_pinned_decides(strict: bool) -> None:
    """Ranks that take recipes run those: with the gate where they have it, else apart."""
    within = Pin(find_recipe(LAYER, TRAIN, H200).recipe, TRAIN, "lean", H200.name, H200.arch)
    plain = Pin(
        find_recipe(without_gate(LAYER), TRAIN, H200).recipe, TRAIN, "lean", H200.name, H200.arch
    )
    for pin, apart in ((within, False), (plain, True)):
        gdn2gen.pin({"recipes": [pin.document]}, strict=strict)
        for regime in (TRAIN, Regime(64, 1, 16)):
            assert is_apart(LAYER, regime, H200) == apart
            found = find_call(LAYER, regime, H200)
            assert (found.source, found.recipe.plan) == ("pinned", pin.recipe.plan)
        pins.forget()


def test_what_is_compiled_ahead_has_the_kernels_of_the_gate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gdn2gen.workflows import compiled

    seen: list[Any] = []
    monkeypatch.setattr(compiled, "_run", lambda tasks, *_: (seen.extend(tasks), ({}, None))[1])
    fields = {"gate": "softplus", "gate_dtype": "bf16", "has_A_log": True, "has_dt_bias": True}
    for backward in (False, True):
        seen.clear()
        made = compiled.compile_kernels(
            tmp_path / str(backward), target="H200", backward=backward, **fields
        )
        assert made.recipes == [find_recipe(without_gate(LAYER), TRAIN, H200).recipe]
        stages = [given[1] for name, given in seen if name == "ship_stage"]
        assert ("decay_gate" in stages, "decay_gate_backward" in stages) == (True, backward)
