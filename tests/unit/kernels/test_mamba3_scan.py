"""Which calls of Mamba-3 have their states and outputs made in one stage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gdn2gen.base.environment import batch_invariant
from gdn2gen.base.errors import ConfigError
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.mamba3_scan import MAMBA3_SCAN, scan_problem, scans_at_once
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.runtime import mamba3_loaded

USUAL = Mamba3Problem()
SMS = 132


@pytest.mark.parametrize(
    ("change", "BT", "T", "programs", "wanted"),
    [
        ({}, 64, 4096, 256, True),
        ({"carried": True, "gate": True, "skip": True}, 64, 132, 66, True),
        ({"state_size": 64, "head_dim": 128}, 64, 4, 66, True),
        ({}, 64, 4096, 65, False),
        ({}, 64, 4095, 256, False),
        ({}, 64, 0, 256, False),
        ({}, 32, 4096, 256, False),
        ({"packed": True}, 64, 4096, 256, False),
        ({"dtype": "fp16"}, 64, 4096, 256, False),
        ({"dtype": "fp32"}, 64, 4096, 256, False),
        ({"state_size": 96}, 64, 4096, 256, False),
        ({"head_dim": 80}, 64, 4096, 256, False),
    ],
)
def test_which_calls(change: dict[str, object], BT: int, T: int, programs: int, wanted: bool):
    problem = replace(USUAL, **change)
    assert scans_at_once(problem, BT, T, programs, SMS) == wanted
    if wanted:
        own = scan_problem(problem)
        assert why_invalid(default_config(MAMBA3_SCAN.name, own), own, "sm_90") is None


def test_what_it_was_not_written_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="keep must be one of"):
        default_config(MAMBA3_SCAN.name, USUAL).replace(keep=3)
    config = default_config(MAMBA3_SCAN.name, USUAL)
    assert "sm_100" in str(why_invalid(config, USUAL, "sm_100"))
    assert "128" in str(why_invalid(config, replace(USUAL, state_size=96), "sm_90"))


def test_without_a_compiler_a_call_takes_two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    given = (USUAL, 0, 64, 128, 4, 64, torch.device("cpu"))
    made = object()
    monkeypatch.setattr(mamba3_loaded, "launcher_if_any", lambda *_: made)
    assert mamba3_loaded.scan_launch(*given, -1) is made
    monkeypatch.setattr(mamba3_loaded, "launcher_if_any", lambda *_: None)
    assert mamba3_loaded.scan_launch(*given, -2) is None
    monkeypatch.setattr(mamba3_loaded, "launcher_if_any", lambda *_: made)
    mamba3_loaded.force_scan(False)
    try:
        assert mamba3_loaded.scan_launch(*given, -3) is None
        mamba3_loaded.force_scan(True)
        few = (*given[:4], 1, 1, given[6])
        assert mamba3_loaded.scan_launch(*few, -3) is made
    finally:
        mamba3_loaded.force_scan(None)
    assert mamba3_loaded.scan_launch(*few, -3) is None
    mamba3_loaded._scan_launch.cache_clear()


def test_calls_whose_bits_may_not_depend_on_the_batch_take_two_stages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As do packed sequences, of which each has then the bits that it has in a row of its own."""
    made = object()
    monkeypatch.setattr(mamba3_loaded, "_scan_launch", lambda *_: made)
    in_rows = (USUAL, 0, 64, 128, 4, 64, torch.device("cpu"), 0)
    packed = (replace(USUAL, packed=True), *in_rows[1:])
    assert mamba3_loaded.scan_launch(*packed) is None
    assert mamba3_loaded.scan_launch(*in_rows) is made, "the mode changes something"
    with batch_invariant():
        assert mamba3_loaded.scan_launch(*in_rows) is None
        assert mamba3_loaded.scan_launch(*packed) is None


def test_more_rows_than_a_grid_has_take_two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    made: object = object()
    monkeypatch.setattr(mamba3_loaded, "_scan_launch", lambda *_: made)
    found: list[object] = [
        mamba3_loaded.scan_launch(USUAL, 0, 64, 4, rows, 1, torch.device("cpu"), 0)
        for rows in (65535, 65536)
    ]
    assert found == [made, None]
