"""Files that hold odd things: the commands show what they can, and name what is odd."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from odd_files import H200, document, entry, put

from gdn2gen.base import device
from gdn2gen.cli import program
from gdn2gen.codegen.render import template_digest
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.plans import plan_named
from gdn2gen.store.format import entry_to
from gdn2gen.tuning.records.ledger import Ledger
from gdn2gen.tuning.records.places import open_ledger


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("gdn2gen.store.sharing.packaged_tuned_dir", lambda: tmp_path / "none")


ODD_METADATA: list[dict[str, Any]] = [
    {"toolchain": ...},
    {"toolchain": ["triton"]},
    {"toolchain": {"triton": 3, "torch": None}},
    {"date": ...},
    {"date": 20260102},
    {"command": ["\ud800"]},
]


@pytest.mark.parametrize("metadata", ODD_METADATA, ids=str)
def test_report_of_odd_metadata(metadata: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    put(tmp_path / "cache/tuned", document(entry(), **metadata))
    assert program.main(["report", "--device", "H200", "--out", str(tmp_path / "x.html")]) == 0
    assert "1.441" in capsys.readouterr().out
    assert "1.441" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"measured": {"forward_backward_ms": 1.441, "peak_mib": "much"}}, "measured.peak_mib"),
        ({"measured": {"forward_backward_ms": 1.441, "spread": [1]}}, "measured.spread"),
        ({"measured": {"forward_backward_ms": 1.441, "n": 10**400}}, "measured.n"),
    ],
    ids=str,
)
def test_report_of_odd_figures_names_them(
    changes: dict[str, Any], named: str, tmp_path: Path, capsys: Any
) -> None:
    put(tmp_path / "cache/tuned", document(entry(**changes)))
    with pytest.warns(UserWarning, match=re.escape(named)):
        assert program.main(["report", "--device", "H200", "--out", str(tmp_path / "x.html")]) == 0
    assert "1.441" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tokens", "sequences", "heads"])
@pytest.mark.parametrize("size", [-1, 10**400])
def test_sizes_beyond_a_float_are_no_entry(name: str, size: int, tmp_path: Path) -> None:
    regime = Regime(16384, 4, 16).key | {name: size}
    put(tmp_path / "cache/tuned", document(entry(regime_key=regime)))
    with pytest.warns(UserWarning, match=rf"regime\.{name} must be"):
        assert program.main(["explain", "--device", "H200"]) == 0


def test_processors_beyond_a_float_are_no_gpu(tmp_path: Path) -> None:
    put(tmp_path / "cache/tuned", document(entry(), sms=10**400))
    with pytest.warns(UserWarning, match=r"_metadata\.sms must be"):
        assert program.main(["explain", "--device", "H100 PCIe"]) == 0


@pytest.mark.parametrize("level", [[], {}, None, 5, "\ud800"], ids=str)
def test_an_entry_of_an_odd_level_is_named_and_kept(
    level: Any, tmp_path: Path, capsys: Any
) -> None:
    odd = entry_to(entry(1000)) | {"level": level}
    path = put(tmp_path / "cache/tuned", document(entry(), odd))
    other = tmp_path / "other.json"
    other.write_text(document(entry(2000)))
    out = str(tmp_path / "x.html")
    with pytest.warns(UserWarning, match="level must be one of"):
        assert program.main(["report", "--device", "H200", "--out", out]) == 0
        assert program.main(["tuned", "import", str(other)]) == 0
        assert program.main(["tuned", "diff", str(other), str(path)]) == 1
        assert program.main(["explain", "--device", "H200"]) == 0
    assert odd in json.loads(path.read_text())["entries"], "a merge loses nothing"
    assert "cannot read differ" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="level must be one of"):
        assert program.main(["tuned", "diff", str(other), str(path), "--json"]) == 1
    said = capsys.readouterr()
    assert "cannot read differ" in said.err
    assert [json.loads(line)["old"] for line in said.out.splitlines()] == [None]


LEDGER_LINES = [
    "[]", "5", "null", '"x"', "{", "{}", '{"cleared": []}', '{"reason": 5}',
    '{"reason": "r", "stage": "scan", "config": [], "problem": {}, "gpu": "NVIDIA H200", '
    '"toolchain": {}, "digest": "d"}',
    '{"reason": "r", "stage": "scan", "config": {}, "problem": {}, "gpu": "NVIDIA H200", '
    '"toolchain": {}, "digest": "d", "date": 5}',
]  # fmt: skip


@pytest.mark.parametrize("line", LEDGER_LINES)
def test_ledger_of_odd_lines(line: str, tmp_path: Path, capsys: Any) -> None:
    book = open_ledger("gdn2", H200)
    config = default_config("scan", Problem())
    book.add("a reason", Problem(), config, template_digest(config))
    with book.path.open("a") as file:
        file.write(line + "\n")
    if line.startswith('{"cleared"'):
        assert program.main(["ledger", "--device", "H200"]) == 0
    else:
        with pytest.warns(UserWarning, match="line 2 of the ledger"):
            assert program.main(["ledger", "--device", "H200", "--all"]) == 0
    assert "a reason" in capsys.readouterr().out
    assert len(Ledger(book.path, H200.name, book.toolchain)._reasons) == 1


def test_a_refusal_of_an_odd_problem_or_config_is_listed(capsys: Any) -> None:
    book = open_ledger("gdn2", H200)
    odd: dict[str, Any] = {"reason": "r", "gpu": H200.name, "toolchain": {}, "digest": "d"}
    lines = [
        {**odd, "stage": "nope", "config": {"BT": [1]}, "problem": {"x": 1}},
        {**odd, "stage": "pipeline", "config": {}, "problem": {"K": "a"}, "configs": {"scan": 5}},
    ]
    book.path.parent.mkdir(parents=True)
    book.path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert program.main(["ledger", "--device", "H200", "--all"]) == 0
    assert "2 stages" in capsys.readouterr().out.replace("1 stages", "2 stages")


def row(shape: str = "train4k", level: str = "lean", ms: Any = 6.0) -> dict[str, Any]:
    fla = {"forward_backward": {"median": ms}}
    problem = dict(Problem().key)
    return {"shape": {"name": shape}, "problem": problem, "level": level, "fla": fla}


def results(folder: Path, *rows: Any, **changes: Any) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps({"schema": 1, "gpu": "NVIDIA H200", "rows": [*rows]} | changes))
    return path


@pytest.mark.parametrize(
    "odd",
    [{}, [], 5, row(level=[]), row(ms="x"), {**row(), "shape": None}, {**row(), "problem": 1}],
    ids=str,
)
def test_odd_rows_of_results_are_named(odd: Any, tmp_path: Path, capsys: Any) -> None:
    put(tmp_path / "cache/tuned", document(entry()))
    path = results(tmp_path, odd, row())
    words = ["report", "--device", "H200", "--results", str(path), "--out", str(tmp_path / "x")]
    with pytest.warns(UserWarning, match="row 0 of the results"):
        assert program.main(words) == 0
    assert "4.16x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpu": "NVIDIA H100 80GB HBM3"}, "results of 'NVIDIA H100 80GB HBM3'"),
        ({"gpu": None}, "should name its gpu"),
        ({"rows": {}}, "should name its rows"),
        ({"schema": 9}, "not a file of results"),
    ],
)
def test_results_of_another_gpu_are_refused(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: Any
) -> None:
    put(tmp_path / "cache/tuned", document(entry()))
    path = results(tmp_path, row(), **changes)
    words = ["report", "--device", "H200", "--results", str(path), "--out", str(tmp_path / "x")]
    assert program.main(words) == program.EXIT_USAGE
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_flas_time_at_another_level_is_labelled(tmp_path: Path, capsys: Any) -> None:
    put(tmp_path / "cache/tuned", document(entry(level="fast", plan="fast", configs=_fast())))
    out = tmp_path / "x.html"
    words = ["report", "--device", "H200", "--results", str(results(tmp_path, row()))]
    assert program.main([*words, "--out", str(out)]) == 0
    assert "4.16x (lean)" in capsys.readouterr().out
    assert "4.16x (lean)" in out.read_text() and "6.000 (lean)" in out.read_text()
    results(tmp_path, row(), row(level="fast", ms=5.0))
    assert program.main([*words, "--out", str(out)]) == 0
    assert "3.47x" in (said := capsys.readouterr().out) and "(lean)" not in said


def _fast() -> dict[str, Any]:
    problem = Problem()
    return {stage: default_config(stage, problem) for stage in plan_named("fast").stages}
