"""`gdn2gen tuned` of kernels that are in no plan: exported, imported, merged and compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from odd_files import document
from odd_files import entry as recipe_entry
from part_entries import H200, PROBLEM, SHAPE, entry

from gdn2gen.cli import program
from gdn2gen.family.mamba3_problem import MAMBA3
from gdn2gen.kernels.mamba3 import AROUND, MAMBA3_STEP, ONE_TOKEN
from gdn2gen.store.dispatch import reload
from gdn2gen.store.mamba3 import find_mamba3
from gdn2gen.store.part_files import (
    PartEntry,
    PartsFile,
    format_parts,
    merge_parts,
    part_digest,
    parts_on_file,
    parts_path,
)
from gdn2gen.store.tuned_files import metadata_for

METADATA = metadata_for(H200, {"triton": "3.6.0"}, "gdn2gen tune", "2026-01-02T03:04:05Z")


def write(path: Path, *entries: PartEntry, **metadata: Any) -> Path:
    path.write_text(format_parts(PartsFile({**METADATA, **metadata}, entries)))
    return path


def times(path: Path) -> dict[str, float]:
    """By kind of kernels, what each of them took."""
    return {x.kind: next(iter(x.measured.values()))["ms"] for x in parts_on_file(path)}


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where calls find entries, beside which none are packaged."""
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path / "user"))
    monkeypatch.setattr("gdn2gen.store.sharing.packaged_tuned_dir", lambda: tmp_path / "packaged")
    reload()
    return tmp_path / "user"


def test_what_is_exported_there_calls_find_here(
    user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a call, it passes over a user's stale entry where a packaged one is not."""
    fast = entry(num_warps=8)
    stale = replace(entry(0.5, ONE_TOKEN), templates={MAMBA3_STEP.name: "0"})
    merge_parts(parts_path(user, MAMBA3, H200), METADATA, [fast, stale])
    packaged = parts_path(tmp_path / "packaged", MAMBA3, H200)
    merge_parts(packaged, METADATA, [entry(0.5), entry(2.0, ONE_TOKEN)])
    out = tmp_path / "parts.json"
    words = ["tuned", "export", "--op", MAMBA3, "--device", "H200"]
    assert program.main([*words, "--to", str(out)]) == 0
    assert "wrote 2 entries of NVIDIA H200" in capsys.readouterr().out
    assert times(out) == {AROUND: 1.0, ONE_TOKEN: 2.0}
    assert program.main(words) == 0
    assert capsys.readouterr().out == out.read_text()
    there = tmp_path / "there"
    words = ["tuned", "import", str(out), "--out", str(there)]
    assert program.main(words) == program.EXIT_USAGE
    assert "holds entries of mamba3, and those of gdn2" in capsys.readouterr().err
    assert not there.exists()
    assert program.main([*words, "--op", MAMBA3]) == 0
    said = capsys.readouterr().out
    assert "2 of 2 entries" in said and f"GDN2GEN_TUNED_DIR={there}" in said
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(there))
    reload()
    scanned = replace(PROBLEM, dtype="bf16")
    found = find_mamba3(scanned, replace(SHAPE, B=64, T=1), H200)
    assert found.sources[MAMBA3_STEP.name] == "tuned"


def test_nothing_on_file_is_said(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tuned", "export", "--op", MAMBA3, "--device", "H200"]
    assert program.main(words) == program.EXIT_USAGE
    assert str(parts_path(user, MAMBA3, H200)) in capsys.readouterr().err


def test_a_merge_keeps_the_faster_one_that_is_not_stale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = replace(entry(0.5), templates={})
    one = write(tmp_path / "one.json", entry(1.0), entry(2.0, ONE_TOKEN))
    two = write(tmp_path / "two.json", stale, entry(1.5, ONE_TOKEN))
    to = write(tmp_path / "to.json", entry(3.0, ONE_TOKEN))
    assert program.main(["tuned", "merge", str(one), str(two), "--to", str(to)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "2 of 2 entries" in said[0] and "stale" not in said[0]
    assert "1 of 2 entries" in said[1] and "1 are of other templates" in said[1]
    assert times(to) == {AROUND: 1.0, ONE_TOKEN: 1.5}
    before = to.read_bytes()
    assert program.main(["tuned", "merge", str(one), "--to", str(to)]) == 0
    assert to.read_bytes() == before


def _changed(**changes: Any) -> PartEntry:
    return replace(entry(), **changes)


def _knob(stage: str, **knobs: int | str) -> PartEntry:
    """With knobs of one kernel that no search files; its digests are as they were filed."""
    odd = entry()
    odd = replace(odd, knobs=odd.knobs | {stage: {**odd.knobs[stage], **knobs}})
    return replace(odd, templates={x: part_digest(x, odd) for x in odd.knobs})


_OF_ONE = {"mamba3_epilogue": entry().knobs["mamba3_epilogue"]}


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (_changed(measured={x: {"ms": 0.0, "default_ms": 1.0} for x in entry().knobs}), "above 0"),
        (_changed(measured={x: {"ms": 1.0} for x in entry().knobs}), "default_ms must be"),
        (entry(1e-4), "takes 0.0"),
        (entry(1e-4, ONE_TOKEN), "takes 0.02"),
        (_changed(errors={"out": 0.5}), "of at most 0.034, but has out 0.5"),
        (_changed(errors={"out": float("nan")}), "has out nan"),
        (_changed(errors={}), "has none"),
        (_changed(kind="odd"), "kind must be one of"),
        (_changed(knobs=_OF_ONE), "knobs are given for ['mamba3_epilogue']"),
        (_changed(at={**entry().at, "state_size": 128.0}), "at.state_size must be an integer"),
        (_changed(at={**entry().at, "state_size": 100}), "of no problem that there is"),
        (_changed(at={**entry().at, "colour": 1}), "of no problem that there is"),
        (_changed(at={**entry().at, "groups": 3}), "heads must be a multiple of groups"),
        (_changed(at={**entry().at, "dtype": "fp8"}), "at.dtype must be one of"),
        (
            _knob("mamba3_epilogue", pdl="wait"),
            "pdl=wait: only stages of plans have kernels before",
        ),
    ],
)
def test_what_cannot_be_true_is_refused(
    odd: PartEntry, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it comes in: a merge keeps what claims to be faster."""
    good, bad = write(tmp_path / "good.json", entry()), write(tmp_path / "bad.json", odd)
    out = tmp_path / "out"
    for words in (
        ["merge", str(good), str(bad), "--to", str(out / "to.json")],
        ["import", str(bad), "--op", MAMBA3, "--out", str(out)],
    ):
        assert program.main(["tuned", *words]) == program.EXIT_USAGE
        err = " ".join(capsys.readouterr().err.split())
        assert "bad.json cannot be used" in err and said in err, err
    assert not out.exists()


def test_kernels_of_an_entry_share_a_tile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = entry()
    first = next(iter(odd.knobs))
    odd = replace(odd, knobs=odd.knobs | {first: {**odd.knobs[first], "BT": 16}})
    assert {x["BT"] for x in odd.knobs.values()} == {16, 32}
    bad = write(tmp_path / "bad.json", odd)
    assert program.main(["tuned", "import", str(bad), "--op", MAMBA3]) == program.EXIT_USAGE
    assert "share BT" in capsys.readouterr().err


def test_files_of_two_kinds_are_not_taken_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, recipes = write(tmp_path / "parts.json", entry()), tmp_path / "recipes.json"
    recipes.write_text(document(recipe_entry(1000)))
    for words in (
        ["diff", str(parts), str(recipes)],
        ["merge", str(parts), "--to", str(recipes)],
        ["merge", str(recipes), "--to", str(parts)],
    ):
        assert program.main(["tuned", *words]) == program.EXIT_USAGE
        assert "give files of one kind" in capsys.readouterr().err
    assert times(parts) == {AROUND: 1.0}


def test_diff_lists_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.json", entry(), entry(kind=ONE_TOKEN))
    new = write(tmp_path / "new.json", entry(0.5, num_warps=8))
    assert program.main(["tuned", "diff", str(old), str(old)]) == 0
    assert capsys.readouterr().out == "the same entries\n"
    assert program.main(["tuned", "diff", str(old), str(new), "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [x["ratio"] for x in rows] == [0.5, None]
    assert rows[0]["knobs"]["mamba3_epilogue.num_warps"]["new"] == 8
    assert rows[0]["old"]["knobs"] == entry().knobs and rows[1]["new"] is None
    assert program.main(["tuned", "diff", str(old), str(new)]) == 1
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "4.0000 -> 2.0000 ms (0.50x)" in said and "only in the old file" in said


@pytest.mark.parametrize("name", ["arch", "sms"])
def test_a_gpu_that_is_not_said_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write(tmp_path / "bad.json", entry(), **{name: None})
    assert program.main(["tuned", "import", str(bad), "--op", MAMBA3]) == program.EXIT_USAGE
    assert f"{name} must be of" in capsys.readouterr().err


def test_a_gpu_that_no_table_lists_is_what_its_file_says(
    user: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = {"gpu": "NVIDIA H20", "arch": "sm_90", "sms": 78}
    source = write(tmp_path / "theirs.json", entry(), **gpu)
    assert program.main(["tuned", "import", str(source), "--op", MAMBA3]) == 0
    assert program.main(["tuned", "export", "--op", MAMBA3, "--device", "NVIDIA H20"]) == 0
    assert '"sms": 78' in capsys.readouterr().out


def test_an_entry_without_knobs_is_stale_whatever_its_digests_say(
    user: Path, tmp_path: Path
) -> None:
    """A file could name what stands for a digest where there is none."""
    odd = entry(num_warps=3)
    merge_parts(parts_path(user, MAMBA3, H200), METADATA, [odd])
    found = find_mamba3(replace(PROBLEM, dtype="fp32"), SHAPE, H200)
    assert {*found.sources.values()} == {"rule"}
