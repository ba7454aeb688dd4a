"""One budget over every member: shares, what is left out, and a run that goes on."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from gdn2gen.base.errors import TuneError
from gdn2gen.cli import program, tune
from gdn2gen.family.registry import OPS
from gdn2gen.workflows.every import (
    Finished,
    Job,
    finished_table,
    jobs,
    tune_every,
    usual_sizes,
)

JOBS: Final = [Job("gdn2", "128", 3.0), Job("gdn2", "64", 2.0), Job("mamba3", "128,64", 1.0)]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _run(record: Path, search: Any, clock: Clock, budget: float = 60.0, **asked: Any) -> Any:
    said: list[str] = []
    found = tune_every(
        JOBS, search,
        budget_minutes=budget, record=record, asked=asked, clock=clock, say=said.append,
    )  # fmt: skip
    return found, said


def _report(*gains: float) -> Any:
    return SimpleNamespace(results=[SimpleNamespace(speedup=x) for x in gains])


def test_time_is_shared_and_what_is_not_used_goes_to_the_rest(tmp_path: Path) -> None:
    clock, given = Clock(), []

    def search(job: Job, minutes: float) -> Any:
        given.append((job.name, minutes))
        clock.now += 60 * (minutes if job.head_dim == "64" else minutes / 2)
        return _report(2.0, 8.0)

    found, _ = _run(tmp_path / "record.json", search, clock)
    assert given == [("gdn2 128", 30.0), ("gdn2 64", 30.0), ("mamba3 128,64", 15.0)]
    assert found[0] == Finished("gdn2 128", 15.0, 2, pytest.approx(4.0))
    assert not (tmp_path / "record.json").exists()


def test_what_fails_costs_itself_alone(tmp_path: Path) -> None:
    def search(job: Job, minutes: float) -> Any:
        if job.head_dim == "64":
            raise TuneError("no default config works")
        return _report(1.5)

    found, said = _run(tmp_path / "record.json", search, Clock())
    assert [x.failure for x in found] == ["", "no default config works", ""]
    assert any("gdn2 64 is left out" in x for x in said)
    shown = io.StringIO()
    from rich.console import Console

    Console(file=shown, width=120).print(finished_table(found))
    for words in ("gdn2 128", "1.50x", "no default config works", "mamba3 128,64"):
        assert words in shown.getvalue()


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    record, clock, given = tmp_path / "record.json", Clock(), []

    def stopped(job: Job, minutes: float) -> Any:
        clock.now += 60 * minutes
        if job.op == "mamba3":
            raise KeyboardInterrupt
        return _report(2.0)

    with pytest.raises(KeyboardInterrupt):
        _run(record, stopped, clock, level="both")

    def search(job: Job, minutes: float) -> Any:
        given.append((job.name, minutes))
        return _report(3.0)

    found, said = _run(record, search, Clock(), level="both")
    assert given == [("mamba3 128,64", 10.0)]
    assert [x.gain for x in found] == pytest.approx([2.0, 2.0, 3.0])
    assert "2 of 3 searches were done before" in said[0]
    # then all begins anew, and so it does for other words
    given.clear()
    _run(record, search, Clock(), level="both")
    assert len(given) == 3
    with pytest.raises(KeyboardInterrupt):
        _run(record, stopped, clock, level="both")
    given.clear()
    _run(record, search, Clock(), level="lean")
    assert len(given) == 3


def test_a_record_that_cannot_be_read_counts_for_nothing(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    record.write_text('{"asked": {}, "done": [{"name": 1}]}')
    found, _ = _run(record, lambda *_: _report(2.0), Clock())
    assert len(found) == 3


def test_every_member_has_its_jobs() -> None:
    found = jobs(usual_sizes() | {"mamba3": (("128,64",), 1)}, ("lean", "fast"))
    assert {x.op for x in found} == {*OPS, "mamba3"}
    assert [x.head_dim for x in found if x.op == "gdn2"] == ["128", "64"]
    weights = {x.op: x.weight for x in found}
    # more shapes and more stages take more time
    assert weights["gdn2"] > weights["mamba2"] > 0 < weights["mamba3"]
    assert weights["gdn2"] > weights["gla"]


def test_the_command_searches_each_at_its_own_sizes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def search(args: Any, folder: Path, levels: Any, storage: Any) -> Any:
        asked.append((args.op, args.head_dim, args.shapes, args.gate))
        return _report(2.0)

    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "search", search)
    words = ["tune", "--op", "all", "--budget", "90", "--target", "H200", "--out"]
    assert program.main([*words, str(tmp_path)]) == 0
    assert len(asked) == 2 * (len(OPS) - 1) + 2
    assert ("kda", "64", asked[0][2], "none") in asked
    assert ("mamba2", "128,64", "mamba4k", "softplus") in asked
    assert ("mamba3", "128,64", "mamba4k", "none") in asked
    assert "Every member" in capsys.readouterr().out
    assert program.main([*words, str(tmp_path), "--head-dim", "128"]) == 2
    assert "takes no --head-dim" in capsys.readouterr().err
