"""The script that reads a profile: kernels, lines, and places between meetings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from script_module import load_script

PAGE = """"Kernel Name","scan_kernel",
"Address","Source","# Samples","Instructions Executed","stall_wait","stall_barrier","stall_wait (Not Issued)"
"0x0","      LDC R1, c[0x0][0x28]","2","4","2","0","1"
"0x10","      BAR.SYNC.DEFER_BLOCKING 0x0 ","60","4","0","60","60"
"0x20","      FADD R2, R2, R3","38","8","38","0","20"
"0x30","      EXIT ","0","0","0","0","0"
"Kernel Name","fold_kernel",
"Address","Source","# Samples","Instructions Executed","stall_wait","stall_barrier","stall_wait (Not Issued)"
"0x0","      EXIT ","1","1","1","0","0"
"""  # noqa: E501


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("stage_profile")


def test_a_page_is_kernels_of_lines(script: Any) -> None:
    (scan, lines), (fold, _) = script.kernels(PAGE)
    assert (scan, fold) == ("scan_kernel", "fold_kernel")
    assert [x.samples for x in lines] == [2, 60, 38, 0]
    assert lines[1].reasons == {"barrier": 60} and lines[2].executed == 8


def test_places_end_where_warps_meet(script: Any) -> None:
    _, lines = next(script.kernels(PAGE))
    assert [(x.first, len(x.lines)) for x in script.places(lines)] == [(0, 2), (2, 2)]
    told = "\n".join(script.summary("scan_kernel", lines, 5))
    assert "4 lines of text, 3 of them" in told and "barrier 60%, wait 40%" in told
    assert "62.0%  lines 0 to 1" in told and "38.0%  lines 2 to 3: wait 100%" in told


def test_it_reads_what_was_kept_and_says_what_it_wants(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--read", str(tmp_path)]) == 1
    assert "has no lines.csv" in capsys.readouterr().out
    (tmp_path / "0-scan").mkdir()
    (tmp_path / "0-scan/lines.csv").write_text(PAGE)
    assert script.main(["--read", str(tmp_path), "--top", "1"]) == 0
    told = capsys.readouterr().out
    assert "fold_kernel" in told and "lines 0 to 1" in told and "lines 2 to 3" not in told
    with pytest.raises(SystemExit):
        script.main(["gdn2", "train4k"])
    assert "give a member, a shape, a plan and stages" in capsys.readouterr().err
