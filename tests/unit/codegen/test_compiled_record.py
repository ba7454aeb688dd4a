"""What is on file of kernels that were compiled is believed of those alone, as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import compiled_record
import pytest
from compiled_record import RECORD, Record, given
from source_tree import ROOT

from gdn2gen.base.device import named_device
from gdn2gen.codegen.build import Resources
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import default_config

PROBLEM = Problem(K=32, V=32)
CONFIG = default_config("scan", PROBLEM)
SM_90 = named_device("sm_90")
USED = Resources(registers=96, spill_bytes=0, shared_bytes=4096, threads=128, seconds=9.0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The stages that the compiler was asked for, which took 5 s each."""
    stages: list[str] = []
    spent = iter(range(0, 1000, 5))

    def compile_ahead(problem: Any, stage: str, config: Any, device: Any) -> Resources:
        stages.append(stage)
        return USED

    monkeypatch.setattr(compiled_record.build, "compile_ahead", compile_ahead)
    monkeypatch.setattr(compiled_record, "_spent", lambda: float(next(spent)))
    for name in [x for x in os.environ if x.startswith(compiled_record._READ)]:
        if name not in compiled_record._KEPT:
            monkeypatch.delenv(name)
    yield stages


def test_what_is_on_file_is_not_compiled(tmp_path: Path, asked: list[str]) -> None:
    file = tmp_path / "record.json"
    for mode in ("believe", "update", "believe", "check"):
        used = Record("a", mode, file).compile_ahead(PROBLEM, "scan", CONFIG, SM_90)
        assert {**asdict(used), "seconds": 0} == {**asdict(USED), "seconds": 0}
    assert len(asked) == 3, "all but once after it was put there"
    (row,) = json.loads(file.read_text()).values()
    assert row["test"] == "a" and row["used"]["seconds"] == 5.0
    rescan = default_config("rescan", PROBLEM)
    Record("b", "update", file).compile_ahead(PROBLEM, "rescan", rescan, SM_90)
    assert [x["test"] for x in json.loads(file.read_text()).values()] == ["a", "b"]


def test_a_test_that_compiles_something_else_leaves_nothing_on_file(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, record = tmp_path / "record.json", Record("a", "update", tmp_path / "record.json")
    problems = [replace(PROBLEM, K=x) for x in (16, 64)]
    for problem in problems:
        record.compile_ahead(problem, "scan", CONFIG, SM_90)
    assert len(json.loads(file.read_text())) == 2
    Record("a", "update", file).compile_ahead(PROBLEM, "scan", CONFIG, SM_90)
    assert list(json.loads(file.read_text())) == [given(PROBLEM, "scan", CONFIG, SM_90)]
    monkeypatch.setattr(compiled_record, "_spent", lambda: 0.0)
    Record("a", "update", file).compile_ahead(PROBLEM, "scan", CONFIG, SM_90)
    assert json.loads(file.read_text()) == {}, "what is compiled at once is compiled again"


def test_what_another_triton_made_stays_on_file(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, found = tmp_path / "record.json", []
    for version in ("3.8.0", "3.9.0", "3.9.0"):
        monkeypatch.setattr(compiled_record.metadata, "version", lambda _, found=version: found)
        Record("a", "update", file).compile_ahead(PROBLEM, "scan", CONFIG, SM_90)
        found.append([x["triton"] for x in json.loads(file.read_text()).values()])
    assert found == [["3.8.0"], ["3.8.0", "3.9.0"], ["3.8.0", "3.9.0"]]


def test_what_is_not_true_is_found(tmp_path: Path, asked: list[str]) -> None:
    file = tmp_path / "record.json"
    key = given(PROBLEM, "scan", CONFIG, SM_90)
    file.write_text(json.dumps({key: {"test": "a", "used": asdict(USED) | {"registers": 95}}}))
    with pytest.raises(AssertionError):
        Record("a", "check", file).compile_ahead(PROBLEM, "scan", CONFIG, SM_90)


def test_whatever_decides_is_in_the_digest(
    monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    usual = given(PROBLEM, "scan", CONFIG, SM_90)
    assert usual is not None and usual == given(PROBLEM, "scan", CONFIG, SM_90)
    others = [
        given(replace(PROBLEM, dtype="fp16"), "scan", CONFIG, SM_90),
        given(PROBLEM, "scan", CONFIG.replace(num_warps=8), SM_90),
        given(PROBLEM, "scan", CONFIG, named_device("sm_80")),
    ]
    text = compiled_record.render(PROBLEM, "scan", CONFIG)
    with monkeypatch.context() as patch:
        changed = replace(text, source=text.source.replace("tl.dot(", "tl.dot( ", 1))
        assert changed.source != text.source
        patch.setattr(compiled_record, "render", lambda *_: changed)
        others.append(given(PROBLEM, "scan", CONFIG, SM_90))
    with monkeypatch.context() as patch:
        patch.setattr(compiled_record.metadata, "version", lambda _: "another")
        others.append(given(PROBLEM, "scan", CONFIG, SM_90))
    with monkeypatch.context() as patch:
        patch.setattr(compiled_record, "_sources", lambda _: iter(["compiled otherwise"]))
        others.append(given(PROBLEM, "scan", CONFIG, SM_90))
    for name in ("scan_kernel", "mamba3_scan_kernel"):  # that one's alone
        with monkeypatch.context() as patch:
            patch.setitem(compiled_record.build._OWN_OPTIONS, name, {"maxnreg": 64})
            others.append(given(PROBLEM, "scan", CONFIG, SM_90))
    assert others.pop() == usual
    assert len({usual, *others}) == 8 and None not in others
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/another/ptxas")
    assert given(PROBLEM, "scan", CONFIG, SM_90) is None


def test_what_is_on_file_is_of_tests_that_are_there() -> None:
    rows = json.loads(RECORD.read_text()).values()
    names = {row["test"].split("[")[0].split("::")[-1] for row in rows}
    text = (ROOT / "tests/unit/codegen/test_ahead_of_time.py").read_text()
    assert names and all(f"def {name}(" in text for name in names)


@pytest.mark.slow
def test_what_is_on_file_is_true() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    command += ["--compiled=check", "tests/unit/codegen/test_ahead_of_time.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
