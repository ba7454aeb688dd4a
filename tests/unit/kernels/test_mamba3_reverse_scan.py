"""Which calls of Mamba-3 have the products of their backward in one stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gdn2gen.base.environment import batch_invariant
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.mamba3_reverse_scan import (
    MAMBA3_REVERSE_SCAN,
    MAMBA3_SUMS,
    other_starts,
    reverse_rule,
    reverse_scan_problem,
    reverse_scans_at_once,
    sums_problem,
)
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.measure.mamba3_runs import mamba3_inputs
from gdn2gen.runtime import mamba3_chunks
from gdn2gen.runtime import mamba3_reverse_scan as runtime
from gdn2gen.runtime.mamba3_loaded import force

USUAL = Mamba3Problem()
MADE: Any = object()


@pytest.mark.parametrize(
    ("change", "BT", "T", "wanted"),
    [
        ({}, 64, 4096, True),
        ({"carried": True, "gate": True, "skip": True, "trap_dtype": "bf16"}, 64, 132, True),
        ({"state_size": 64, "angles": 0}, 64, 4, True),
        ({"state_size": 128, "angles": 64}, 64, 4, True),
        ({"head_dim": 128}, 64, 4096, False),
        ({}, 64, 4095, False),
        ({}, 64, 0, False),
        ({}, 32, 4096, False),
        ({"packed": True}, 64, 4096, False),
        ({"dtype": "fp16"}, 64, 4096, False),
        ({"dtype": "fp32"}, 64, 4096, False),
        ({"state_size": 96}, 64, 4096, False),
    ],
)
def test_which_calls(change: dict[str, Any], BT: int, T: int, wanted: bool) -> None:
    problem = replace(USUAL, **change)
    assert reverse_scans_at_once(problem, BT, T) == wanted
    if wanted:
        for stage, own in (
            (MAMBA3_REVERSE_SCAN, reverse_scan_problem(problem)),
            (MAMBA3_SUMS, sums_problem(problem)),
        ):
            assert why_invalid(default_config(stage.name, own), own, "sm_90") is None
            # what is compiled knows all operands of a call, but for what it is not given
            given = {x.name for x in stage.operands(problem)}
            assert {x.name for x in stage.operands(own)} == given


def test_what_it_was_not_written_for_is_refused() -> None:
    config = default_config(MAMBA3_REVERSE_SCAN.name, USUAL)
    assert "sm_100" in str(why_invalid(config, USUAL, "sm_100"))
    wide = replace(USUAL, head_dim=128)
    assert "all values of a head" in str(why_invalid(config, wide, "sm_90"))


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is on file for such calls, if anything is, and kernels that need no compiler."""
    found: list[Any] = []
    monkeypatch.setattr(runtime, "_scan", lambda *_: MADE)
    monkeypatch.setattr(runtime, "loaded", lambda problem, stage, knobs, device: (stage, knobs))
    monkeypatch.setattr(runtime, "nearest_parts", lambda *_: found[0] if found else None)
    yield found
    runtime.force_reverse_scan(None)


def launches(problem: Mamba3Problem = USUAL, T: int = 4096, sequences: int = 4) -> Any:
    return runtime.launches_at_once(problem, 64, T, sequences, 64, 1, torch.device("cpu"), 0)


def test_a_call_takes_it_where_an_entry_says_so(entry: list[Any]) -> None:
    assert launches() is None, "nothing was measured"
    entry.append(SimpleNamespace(knobs={"mamba3_sums": {"BT": 64, "BH": 2, "num_warps": 8}}))
    scan, (stage, knobs) = launches()
    assert scan is MADE and (stage, knobs["BH"], knobs["num_warps"]) == ("mamba3_sums", 2, 8)
    assert launches(T=4095) is None and launches(sequences=65536) is None
    assert launches(replace(USUAL, packed=True)) is None
    with batch_invariant():
        assert launches() is None
    runtime.force_reverse_scan(False)
    assert launches() is None


def test_loops_over_tokens_are_of_so_many_heads(entry: list[Any]) -> None:
    """A kernel that has been tuned for other groups takes no call of these."""
    for BG, order in ((64, "tokens"), (16, "heads")):
        knobs = {"BT": 64, "BH": 8, "num_warps": 8, "order": "tokens", "BG": BG, "num_stages": 3}
        entry[:] = [SimpleNamespace(knobs={"mamba3_sums": knobs})]
        _, (_, found) = launches()
        assert found["order"] == order and (found["BG"] == BG) == (order == "tokens")


def test_a_search_begins_with_all_forms() -> None:
    rule = reverse_rule(16384, 64, 1, 132)
    starts = other_starts(rule, 64, 1)
    names = ("order", "BG", "num_warps", "num_stages")
    assert [tuple(x[y] for y in names) for x in starts[MAMBA3_SUMS.name]] == [
        ("tokens", 64, 4, 1),
        ("tokens", 64, 4, 3),
    ]
    assert [x["pairs"] for x in starts[MAMBA3_REVERSE_SCAN.name]] == [1]
    # too few heads of a group, too many, or as many as no tile has
    for sizes in ((4, 1), (128, 1), (24, 2)):
        assert other_starts(rule, *sizes)[MAMBA3_SUMS.name] == []
    for stage, language in ((MAMBA3_SUMS, "triton"), (MAMBA3_REVERSE_SCAN, "tilelang")):
        for knobs in (rule[stage.name], *starts[stage.name]):
            given = {"num_stages": 1, **knobs, "language": language}
            assert why_invalid(Config.of(stage.name, given), USUAL, "sm_90") is None


def test_the_scan_has_the_knobs_on_file(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"mamba3_reverse_scan": {"BT": 64, "num_warps": 4, "pairs": 1}}
    monkeypatch.setattr(runtime, "loaded", lambda *_: MADE)
    monkeypatch.setattr(runtime, "launcher_if_any", lambda _, config: config)
    for knobs, wanted in ((found, 1), ({"mamba3_reverse_scan": {"BT": 64}}, 2)):
        entry = SimpleNamespace(knobs=knobs)
        monkeypatch.setattr(runtime, "nearest_parts", lambda *_, entry=entry: entry)
        runtime._scan.cache_clear()
        config, _ = launches()
        assert config["pairs"] == wanted
    runtime._scan.cache_clear()


def test_it_can_be_forced(entry: list[Any]) -> None:
    runtime.force_reverse_scan(True)
    assert launches() is not None and launches(T=4094) is None
    runtime.force_reverse_scan(None)
    assert launches() is None


def test_without_a_compiler_a_call_takes_the_others(
    entry: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.force_reverse_scan(True)
    monkeypatch.setattr(runtime, "_scan", lambda *_: None)
    assert launches() is None


def test_what_is_timed_by_itself_has_the_knobs_forced_by_then(
    entry: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the tuner times one after the other: a launch kept from before has those of the first."""
    ran: list[dict[str, Any]] = []

    def loading(_: Any, stage: str, knobs: dict[str, Any], __: Any) -> Any:
        return lambda *_, **__: ran.append(knobs) if stage == "mamba3_sums" else None

    monkeypatch.setattr(runtime, "_scan", lambda *_: lambda *_, **__: None)
    monkeypatch.setattr(runtime, "loaded", loading)
    for name in ("chunk_launch", "scan_launch"):
        monkeypatch.setattr(mamba3_chunks, name, lambda *_: lambda *_, **__: None)
    entry.append(SimpleNamespace(knobs={}))
    made = mamba3_inputs(USUAL, Shape("small", 1, 64, 8, groups=1), "layer", 0, "cpu")
    numbers, biases = [made[x] for x in ("ADT", "DT", "Trap")], [made["Q_bias"], made["K_bias"]]
    given = mamba3_chunks.Given(
        made["Q"], made["K"], made["V"], numbers, biases, made["Angles"], None, None, None, None,
        [], 64,
    )  # fmt: skip
    stage = mamba3_chunks.launches(given, torch.zeros_like(made["V"]))["mamba3_sums"]
    for BH in (2, 4):
        force("mamba3_sums", {"BH": BH})
        try:
            stage()
        finally:
            force("mamba3_sums", None)
    assert [x["BH"] for x in ran] == [2, 4]
