"""Mamba-3 tuned: a climb over the knobs around its scan, what it files, what calls find."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from gdn2gen.base import outcome, paths
from gdn2gen.base.device import named_device
from gdn2gen.base.errors import StoreError, TunedFileWarning, TuneError
from gdn2gen.base.outcome import Outcome
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.shapes import NAMED_SHAPES
from gdn2gen.kernels.mamba3 import AROUND, MAMBA3_PROLOGUE, ONE_TOKEN, known_around
from gdn2gen.kernels.mamba3_chunks import (
    CHUNKS,
    MAMBA3_CHUNK_STAGES,
    MAMBA3_OUTPUT,
    chunk_knobs,
)
from gdn2gen.kernels.mamba3_reverse_scan import (
    MAMBA3_REVERSE_SCAN,
    MAMBA3_REVERSE_STAGES,
    REVERSE,
)
from gdn2gen.store._part_claims import check_part
from gdn2gen.store.dispatch import reload
from gdn2gen.store.mamba3 import find_mamba3, scan_problem
from gdn2gen.store.part_files import (
    merge_parts,
    nearest_parts,
    parts_on_file,
    parts_path,
    stale_parts,
    tuned_parts,
)
from gdn2gen.tuning.mamba3 import STEP_SEQUENCES, Mamba3Report, neighbours, tune_mamba3
from gdn2gen.tuning.views.progress import Progress

H200 = named_device("H200")
SHAPE = NAMED_SHAPES["mamba4k"]
PROBLEM = Mamba3Problem(skip=True, gate=True)
# whose kernels are around a scan
SCANNED = replace(PROBLEM, dtype="fp32")


class Gpu:
    """Stands in for a worker: kernels take as long as their knobs are far from the best."""

    BEST: Final = {"BT": 64, "BH": 2, "num_warps": 8, "BR": 16, "BV": 32}

    def __init__(self, wrong: str = "", reverse: float = 1.0) -> None:
        self.now, self.wrong, self.reverse = 0.0, wrong, reverse
        self.timed: list[dict[str, Any]] = []
        self.checked: list[Any] = []

    def clock(self) -> float:
        return self.now

    def call(self, target: str, problem: Any, shape: Any, *given: Any, timeout: float) -> Any:
        self.now += 2.0
        if target.endswith("check_knobs"):
            self.checked.append(given)
            assert problem.carried == (given[0] is None)
            return Outcome(outcome.OK, ({"out": 1e-3}, self.wrong))
        stage, BT, knobs = given
        knobs = {**knobs, "BT": BT}
        self.timed.append({"stage": stage, **knobs})
        if stage in ("mamba3_epilogue", "mamba3_output") and knobs["num_warps"] == 1:
            return Outcome(outcome.CRASHED, detail="signal 11")
        fixed = {"mamba3_step": "BT", "mamba3_turns": "num_warps", "mamba3_rotate": "num_warps"}
        steps = [abs(self._log(y) - self._log(self.BEST[x])) for x, y in knobs.items()
                 if x in self.BEST and x != fixed.get(stage)]  # fmt: skip
        least = self.reverse if stage == MAMBA3_REVERSE_SCAN.name else 1.0
        return Outcome(outcome.OK, least + 0.1 * sum(steps))

    @staticmethod
    def _log(value: int) -> int:
        return value.bit_length()


def scan(*given: Any, **options: Any) -> Any:
    scan.asked = (given, options)  # type: ignore[attr-defined]
    return SimpleNamespace(results=[1], table=lambda: "the scan")


def tuned(
    folder: Path, gpu: Gpu, minutes: float = 100.0, problem: Any = PROBLEM, **options: Any
) -> Mamba3Report:
    return tune_mamba3(
        problem, [SHAPE], H200,
        budget_minutes=minutes, out_dir=folder, progress=Progress(), call=gpu.call, clock=gpu.clock,
        command="gdn2gen tune --op mamba3", **{"scan": scan, **options},
    )  # fmt: skip


def test_it_climbs_to_the_best_and_files_it(tmp_path: Path) -> None:
    gpu = Gpu()
    scan.asked = None  # type: ignore[attr-defined]
    report = tuned(tmp_path, gpu)
    assert scan.asked is None and report.scan is None  # type: ignore[attr-defined]
    chunks, *steps = report.entries
    assert chunks.kind == CHUNKS
    assert {x: dict(y) for x, y in chunks.knobs.items()} == {
        "mamba3_turns": {"BT": 64, "BH": 2, "num_warps": 1},
        "mamba3_rotate": {"BT": 64, "BH": 2, "num_warps": 1},
        "mamba3_states": {"BT": 64, "BV": 32, "num_warps": 8, "maxnreg": 128},
        "mamba3_output": {"BT": 64, "BH": 2, "BV": 32, "num_warps": 8, "maxnreg": 128},
        "mamba3_gate": {"BT": 64, "BR": 16, "num_warps": 8},
        "mamba3_reverse_states": {"BT": 64, "BV": 32, "num_warps": 8, "maxnreg": 128},
        "mamba3_gradient": {
            **{"BT": 64, "BH": 2, "BV": 32, "num_warps": 8, "maxnreg": 168, "parts": 3}
        },
    }
    assert [x.tokens for x in steps] == [*STEP_SEQUENCES]
    assert all(x.knobs["mamba3_step"]["BR"] == 16 for x in steps)
    for entry in report.entries:
        for times in entry.measured.values():
            assert times["ms"] == 1.0 <= times["default_ms"]
    assert len(gpu.checked) == len(report.entries)
    assert parts_on_file(parts_path(tmp_path, "mamba3", H200)) == sorted(
        report.entries, key=lambda x: x.key
    )
    frozen = [json.dumps(x, sort_keys=True) for x in gpu.timed if x["stage"] != "mamba3_step"]
    assert len(frozen) == len({*frozen})  # nothing twice


def test_around_a_scan_it_climbs_after_that(tmp_path: Path) -> None:
    report = tuned(tmp_path, Gpu(), problem=SCANNED)
    (problem, shapes, device), options = scan.asked  # type: ignore[attr-defined]
    assert (problem.op, problem.K, problem.V) == ("simple_gla", 128, 64)
    assert (shapes[0].H, shapes[0].key_heads, device) == (64, 64, H200)
    assert options["levels"] == ("lean", "fast") and options["budget_minutes"] < 100
    around = report.entries[0]
    assert (around.kind, report.scan.table()) == (AROUND, "the scan")  # type: ignore[union-attr]
    assert {x: dict(y) for x, y in around.knobs.items()} == {
        f"mamba3_{x}": {"BT": 64, "BH": 2, "num_warps": 8}
        for x in ("prologue", "prologue_backward", "epilogue", "epilogue_backward")
    }


def test_what_fails_its_check_is_not_filed(tmp_path: Path) -> None:
    report = tuned(tmp_path, Gpu(wrong="dK 4e-01"), problem=SCANNED)
    assert report.entries == [] and "dK 4e-01" in report.skipped["around at mamba4k"]
    assert not parts_path(tmp_path, "mamba3", H200).exists()

    def no_scan(*_: Any, **__: Any) -> Any:
        raise TuneError("no default config works")

    with pytest.raises(TuneError, match=r"(?s)no default config works.*dK 4e-01"):
        tuned(tmp_path, Gpu(wrong="dK 4e-01"), scan=no_scan, problem=SCANNED)
    with pytest.raises(TuneError, match="chunks at mamba4k: dK 4e-01"):
        tuned(tmp_path, Gpu(wrong="dK 4e-01"))


def test_time_that_is_over_leaves_the_rules_knobs(tmp_path: Path) -> None:
    gpu = Gpu()
    report = tuned(tmp_path, gpu, minutes=0.01)
    stages = (*MAMBA3_CHUNK_STAGES, *MAMBA3_CHUNK_STAGES, *MAMBA3_CHUNK_STAGES)
    # and the three other forms of a backward in one stage
    assert len(gpu.timed) == len((*stages, *MAMBA3_REVERSE_STAGES)) + 3 + len(STEP_SEQUENCES)
    rule = chunk_knobs(MAMBA3_OUTPUT, PROBLEM, 4 * 64, 64, 1, H200.sms)
    assert report.entries[0].knobs["mamba3_output"] == rule | {"BT": 64}


def test_a_reverse_scan_is_filed_where_it_is_faster(folder: Path) -> None:
    """Than the two stages that it stands for, of 1.0 ms each; and calls find it."""
    known = known_around(PROBLEM, 64, 1)
    for ms, filed in ((1.0, False), (0.8, True)):
        report = tuned(folder, Gpu(reverse=ms))
        entries = [x for x in report.entries if x.kind == REVERSE]
        assert len(entries) == filed
        assert ("reverse at mamba4k" in report.skipped) != filed
        reload()
        found = nearest_parts("mamba3", REVERSE, known, 16384, H200)
        assert (found is not None) == filed
    assert {x: dict(y) for x, y in entries[0].knobs.items()} == {
        "mamba3_reverse_scan": {"BT": 64, "num_warps": 4, "pairs": 2},
        "mamba3_sums": {
            **{"BT": 64, "BH": 2, "num_warps": 8},
            **{"order": "heads", "BG": 1, "num_stages": 1},
        },
    }
    told = find_mamba3(PROBLEM, SHAPE, H200)
    assert told.sources["mamba3_reverse_scan"] == "tuned" and "mamba3_sums: BT=64" in told.words(80)
    assert not stale_parts(entries[0])
    check_part(entries[0], H200.name, "sm_90")


@pytest.mark.parametrize("wrong", ["", "dQ 4e-01"])
def test_forms_of_a_backward_in_one_stage_that_are_faster(folder: Path, wrong: str) -> None:
    """And where one of them is wrong, the forms that the rule has."""

    class Streams(Gpu):
        def call(self, target: str, *given: Any, timeout: float) -> Any:
            found = super().call(target, *given, timeout=timeout)
            knobs = given[-1]
            if knobs.get("mamba3_reverse_scan", {}).get("pairs") == 1:
                return Outcome(outcome.OK, ({"dQ": 1e-3}, wrong))
            if isinstance(found.value, float) and isinstance(knobs, dict):
                by_tokens = 0.5 * (knobs.get("order") == "tokens")
                once = 0.1 * (knobs.get("pairs") == 1)
                return Outcome(outcome.OK, found.value - once - by_tokens)
            return found

    entry = next(x for x in tuned(folder, Streams(reverse=0.8)).entries if x.kind == REVERSE)
    check_part(entry, H200.name, "sm_90")
    if wrong:
        assert entry.knobs["mamba3_reverse_scan"]["pairs"] == 2
        assert entry.knobs["mamba3_sums"]["order"] == "heads"
        return
    assert dict(entry.knobs["mamba3_sums"]) == {
        **{"BT": 64, "BH": 2, "num_warps": 8},
        **{"order": "tokens", "BG": 64, "num_stages": 1},
    }
    assert dict(entry.knobs["mamba3_reverse_scan"]) == {**{"BT": 64, "num_warps": 4, "pairs": 1}}
    for times in entry.measured.values():
        assert times["default_ms"] > times["ms"]


def test_without_tiles_of_its_size_there_is_no_reverse_scan(folder: Path) -> None:
    class Smaller(Gpu):
        BEST: Final = {**Gpu.BEST, "BT": 32}

    report = tuned(folder, Smaller(reverse=0.1))
    assert report.skipped["reverse at mamba4k"] == (
        "it takes tiles of 64 tokens, and those of 32 are faster"
    )
    narrow = tuned(folder, Gpu(reverse=0.1), problem=replace(PROBLEM, head_dim=128))
    assert not [x for x in narrow.entries if x.kind == REVERSE] and not narrow.skipped


def test_heads_of_a_program_are_of_one_group() -> None:
    shape = replace(SHAPE, H=6, groups=3)
    knobs = {"BT": 32, "BH": 2, "num_warps": 1}
    found = [*neighbours(MAMBA3_PROLOGUE, knobs, shape)]
    assert found == [{**knobs, "BH": 1}, {**knobs, "num_warps": 2}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of tuned files, beside which there are none."""
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path))
    monkeypatch.setattr(paths, "packaged_tuned_dir", lambda: tmp_path / "packaged")
    reload()
    return tmp_path


def test_another_gpu_of_the_architecture_runs_by_them_too(folder: Path) -> None:
    """Mamba-3's backward in one stage runs by an entry alone: an H100 had none."""
    tuned(folder, Gpu())
    known = known_around(PROBLEM, 64, 1)
    own = nearest_parts("mamba3", CHUNKS, known, 16384, H200)
    for name, found in (("H100", own), ("sm_90", own), ("A100", None), ("sm_100", None)):
        device = named_device(name)
        assert nearest_parts("mamba3", CHUNKS, known, 16384, device) == found
        assert tuned_parts("mamba3", CHUNKS, known, 16384, device) is None
    sources = find_mamba3(PROBLEM, SHAPE, named_device("H100")).sources
    assert {*sources.values()} == {"transferred"}
    # its own are before those, whatever these took
    path = parts_path(folder, "mamba3", H200)
    other = parts_path(folder, "mamba3", named_device("H100"))
    other.write_text(path.read_text().replace('"ms": 1.0', '"ms": 0.9'))
    reload()
    mine = nearest_parts("mamba3", CHUNKS, known, 16384, named_device("H100"))
    assert mine != own and tuned_parts("mamba3", CHUNKS, known, 16384, named_device("H100")) == mine
    # what cannot be read, or says of no GPU, is nobody's
    other.unlink()
    path.write_text(path.read_text().replace('"arch": "sm_90"', '"arch": 7'))
    reload()
    assert nearest_parts("mamba3", CHUNKS, known, 16384, named_device("H100")) is None


def test_calls_find_the_nearest_entry(folder: Path) -> None:
    tuned(folder, Gpu())
    known = known_around(PROBLEM, 64, 1)
    for tokens, found in (
        (16384, True),
        (32768, True),
        (8192, True),
        (32769, False),
        (8191, False),
    ):
        assert (nearest_parts("mamba3", CHUNKS, known, tokens, H200) is not None) == found
    near = nearest_parts("mamba3", ONE_TOKEN, known, 100, H200)
    assert near is not None and near.tokens == 64
    assert nearest_parts("mamba3", CHUNKS, known | {"heads": 32}, 16384, H200) is None
    found = find_mamba3(PROBLEM, SHAPE, H200)
    assert found.sources == dict.fromkeys(found.knobs, "tuned") | {"mamba3_step": "tuned"}
    assert found.knobs["mamba3_gradient"]["BT"] == 64 and found.scan is None
    assert {*found.document} == {"op", "kernels"}
    other = find_mamba3(PROBLEM, replace(SHAPE, H=32), H200)
    assert {*other.sources.values()} == {"rule"} and "(rule)" in other.words(100)
    scanned = find_mamba3(SCANNED, SHAPE, H200)
    assert scanned.scan is not None and scanned.scan.recipe.problem == scan_problem(SCANNED)
    assert {*scanned.document} == {"op", "scan", "around"}


def test_entries_of_other_templates_are_passed_over(folder: Path) -> None:
    report = tuned(folder, Gpu())
    stale = replace(report.entries[0], templates={"mamba3_output": "another"})
    merge_parts(report.path, {"gpu": H200.name}, [stale])
    assert nearest_parts("mamba3", CHUNKS, known_around(PROBLEM, 64, 1), 16384, H200) is None


def test_files_that_are_not_ours_stay(folder: Path) -> None:
    path = parts_path(folder, "mamba3", H200)
    path.parent.mkdir(parents=True)
    path.write_text("[]")
    with pytest.raises(StoreError, match="no schema"):
        tuned(folder, Gpu())
    assert path.read_text() == "[]"
    with pytest.warns(TunedFileWarning, match="rule on sizes"):
        assert nearest_parts("mamba3", AROUND, {}, 1, H200) is None
    path.unlink()
    tuned(folder, Gpu())
    with pytest.raises(StoreError, match="is of the GPU 'NVIDIA H200'"):
        merge_parts(path, {"gpu": "NVIDIA H100"}, [])


@pytest.mark.slow
def test_a_worker_times_and_checks_what_it_is_given(interpreter: Callable[..., Any]) -> None:
    ran, errors, wrong, wrong_step = interpreter("mamba3_checks:timed_and_checked")
    assert len(ran) == 11 and wrong == wrong_step == ""
    assert {"out", "dQ", "dAngles", "dZ"} <= {*errors} and 0 < max(errors.values()) < 1e-4


def test_tuned_knobs_compute_the_same(tmp_path: Path, interpreter: Callable[..., Any]) -> None:
    """Of another tile, and with two heads a program, filed for what stands in for a GPU."""
    device, small = named_device("sm_90"), Mamba3Problem(
        dtype="fp32", state_size=24, head_dim=16, angles=6, skip=True, gate=True
    )  # fmt: skip
    entry = tuned(tmp_path / "other", Gpu(), problem=SCANNED).entries[0]
    knobs = {x: {**y, "BT": 32, "BH": 2, "num_warps": 1} for x, y in entry.knobs.items()}
    entry = replace(entry, at=known_around(small, 2, 1), tokens=40, knobs=knobs)
    merge_parts(parts_path(tmp_path, "mamba3", device), {"gpu": device.name}, [entry])
    found = interpreter("mamba3_checks:tuned_and_not", str(tmp_path))
    assert 0 < max(found.values()) < 1e-5
