"""`gdn2gen verify --tuned` and `gdn2gen report` of kernels that are in no plan, on a fake GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from part_entries import H200, PROBLEM, RULE, SHAPE, STEP_SHAPE, entry

from gdn2gen.base import outcome
from gdn2gen.base.errors import TunedFileWarning
from gdn2gen.base.outcome import Outcome
from gdn2gen.cli import program
from gdn2gen.family.mamba3_problem import MAMBA3, Mamba3Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.mamba3 import AROUND, MAMBA3_STEP, ONE_TOKEN
from gdn2gen.store.dispatch import reload
from gdn2gen.store.part_files import (
    PartEntry,
    merge_parts,
    parts_on_file,
    parts_path,
    stale_parts,
)
from gdn2gen.store.sharing import parts_of
from gdn2gen.tuning.recheck_parts import recheck_parts


class Gpu:
    """By warps: 1 is wrong, 2 crashes, 4 and the rule's take 1 ms, 8 takes 2."""

    def __init__(self, *_: Any) -> None:
        self.shapes: list[Shape] = []
        self.checked: list[int | None] = []

    def call(
        self, target: str, problem: Mamba3Problem, shape: Shape, *given: Any, timeout: float
    ) -> Outcome[Any]:
        assert problem == replace(PROBLEM, carried=problem.carried) and timeout > 0
        self.shapes.append(shape)
        if target.endswith("check_knobs"):
            BT, knobs = given
            self.checked.append(BT)
            assert problem.carried == (BT is None)
            wrong = any(x["num_warps"] == 1 for x in knobs.values())
            return Outcome(outcome.OK, ({"out": 2e-3}, "out is off" if wrong else ""))
        assert target.endswith("time_knobs")
        stage, BT, knobs = given
        if {**knobs, "BT": BT} == RULE[stage]:
            return Outcome(outcome.OK, 1.0)
        if knobs["num_warps"] == 2:
            return Outcome(outcome.CRASHED, detail="signal 11")
        return Outcome(outcome.OK, 2.0 if knobs["num_warps"] == 8 else 1.0)

    def close(self) -> None:
        self.shapes.clear()


@pytest.mark.parametrize(
    ("filed", "status", "said"),
    [
        (entry(), "holds", ""),
        (entry(kind=ONE_TOKEN), "holds", ""),
        (entry(ms=0.8), "slower", "25% slower than when it was filed"),
        (entry(ms=2.0, BH=2, num_warps=8), "slower", "100% slower than the rule's knobs"),
        (entry(num_warps=1), "wrong", "out is off"),
        (entry(BH=2, num_warps=2), "failed", "mamba3_prologue: crashed: signal 11"),
        (replace(entry(), templates={}), "stale", "mamba3_prologue, mamba3_prologue_backward"),
        (entry(num_warps=3), "stale", "mamba3_prologue, mamba3_prologue_backward"),
    ],
)
def test_verdicts(filed: PartEntry, status: str, said: str) -> None:
    gpu = Gpu()
    (result,) = recheck_parts([(MAMBA3, filed)], H200, gpu.call)
    assert (result.status, said in result.detail) == (status, True), result.detail
    assert result.holds == (status == "holds")
    shape = STEP_SHAPE if filed.kind == ONE_TOKEN else SHAPE
    assert {*gpu.shapes} == ({shape} if status != "stale" else set())
    if status == "holds":
        kernels = len(filed.knobs)
        assert (result.now_ms, result.default_ms) == (1.0 * kernels, 1.0 * kernels)
        assert gpu.checked == [None if filed.kind == ONE_TOKEN else RULE["mamba3_prologue"]["BT"]]


@pytest.mark.parametrize(
    ("filed", "status"),
    [
        (entry(), "renewed"),
        (entry(num_warps=1), "wrong"),
        (entry(num_warps=3), "failed"),
        (replace(entry(), at={"heads": 64, "groups": 1, "of": 2}), "failed"),
    ],
)
def test_a_stale_entry_is_renewed_if_it_passes(filed: PartEntry, status: str) -> None:
    stale = replace(filed, templates={x: "0" for x in filed.knobs})
    found = [*recheck_parts([(MAMBA3, stale), (MAMBA3, entry())], H200, Gpu().call, renew=True)]
    assert [x.status for x in found] == [status]  # the other is not stale, and not run
    renewed = found[0].renewed
    assert (renewed is not None) == (status == "renewed")
    if renewed is not None:
        assert renewed.knobs == filed.knobs and not stale_parts(renewed)
        assert renewed.errors == {"out": 2e-3}
        assert renewed.measured["mamba3_prologue"] == {"ms": 1.0, "default_ms": 1.0}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path / "tuned"))
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("gdn2gen.store.sharing.packaged_tuned_dir", lambda: tmp_path / "none")
    monkeypatch.setattr("gdn2gen.base.device.present_device", lambda: H200)
    monkeypatch.setattr("gdn2gen.base.device.has_gpu", lambda: True)
    monkeypatch.setattr("gdn2gen.tuning.gpu.parts.parts_worker", Gpu)
    reload()

    def filed(*entries: PartEntry) -> Path:
        path = parts_path(tmp_path / "tuned", MAMBA3, H200)
        merge_parts(path, {"gpu": H200.name}, entries)
        return path

    return filed


@pytest.mark.parametrize("op", ["all", MAMBA3])
def test_verify_tuned_takes_them_up(
    op: str, file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file(entry(), entry(kind=ONE_TOKEN))
    out = tmp_path / "out.json"
    assert program.main(["verify", "--tuned", "--op", op, "--json", str(out)]) == 0
    assert "2 of 2 entries hold" in capsys.readouterr().out
    rows = json.loads(out.read_text())["entries"]
    assert [x["status"] for x in rows] == ["holds", "holds"]
    assert rows[0]["entry"] == entry().label and rows[0]["now_ms"] == 4.0
    file(entry(num_warps=1))
    assert program.main(["verify", "--tuned", "--op", op]) == 1
    said = capsys.readouterr().out
    assert "1 of 2 entries hold" in said and "gdn2gen tune --op mamba3" in said
    assert "--only-failing" not in said


def test_renewed_ones_are_filed(
    file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(replace(entry(), templates={}), entry(kind=ONE_TOKEN))
    assert program.main(["verify", "--tuned"]) == 1
    assert program.main(["verify", "--tuned", "--renew"]) == 0
    assert "1 of 1 entries hold" in capsys.readouterr().out.split("renewed")[-1]
    assert [stale_parts(x) for x in parts_on_file(path)] == [[], []]
    assert json.loads(path.read_text())["command"] == "gdn2gen verify --tuned --renew"


@pytest.mark.parametrize("op", ["all", MAMBA3])
def test_nothing_on_file_is_said(
    op: str, file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["verify", "--tuned", "--op", op]) != 0
    assert "nothing is tuned for" in capsys.readouterr().err
    assert program.main(["report", "--device", "H200", "--op", MAMBA3]) != 0
    assert "nothing of this op is tuned" in capsys.readouterr().err


def test_the_report_shows_them(
    file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = replace(entry(kind=ONE_TOKEN), measured={MAMBA3_STEP.name: {"ms": "soon"}})
    file(replace(entry(), templates={}), odd)
    words = ["report", "--device", "H200", "--op", MAMBA3]
    out = tmp_path / "page.html"
    assert program.main([*words, "--out", str(out)]) == 0
    said, page = capsys.readouterr().out, out.read_text()
    assert "5 kernels in no plan" in said
    for word in ("mamba3_prologue_backward", "16384 tokens, bf16, 64 heads", "1.50x", "stale"):
        assert word in page, word
    assert "64 sequences" in page and "dQ 2.0e-03" in page
    assert program.main([*words, "--json"]) == 0
    rows = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert [x["tuned_ms"] for x in rows] == [1.0, 1.0, 1.0, 1.0, None]
    assert {x["stale"] for x in rows[:4]} == {True} and rows[0]["speedup"] == 1.5


def test_a_users_entry_stands_before_a_packaged_one_unless_it_is_stale(
    file: Callable[..., Path], tmp_path: Path
) -> None:
    packaged = parts_path(tmp_path / "none", MAMBA3, H200)
    merge_parts(packaged, {"gpu": H200.name}, [entry(ms=3.0), entry(ms=3.0, kind=ONE_TOKEN)])
    file(entry(), replace(entry(kind=ONE_TOKEN), templates={}))
    found = {x.kind: next(iter(x.measured.values()))["ms"] for x in parts_of(MAMBA3, H200)}
    assert found == {AROUND: 1.0, ONE_TOKEN: 3.0}


@pytest.mark.parametrize(
    "changes",
    [{"knobs": {"mamba3_step": 1}}, {"measured": {}}, {"at": []}, {"tokens": 0}, {"errors": None}],
)
def test_what_is_no_entry_is_refused_when_it_is_read(
    changes: dict[str, Any], file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(entry(kind=ONE_TOKEN))
    document = json.loads(path.read_text())
    document["entries"][0] |= changes
    path.write_text(json.dumps(document))
    with pytest.warns(TunedFileWarning, match="does not hold entries"):
        assert program.main(["verify", "--tuned", "--op", MAMBA3]) != 0
    assert "nothing is tuned" in capsys.readouterr().err
