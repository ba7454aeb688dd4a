"""`gdn2gen report`: what the page is made of, and that it says what is on file."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from gdn2gen.base.device import named_device
from gdn2gen.cli import program
from gdn2gen.codegen.digests import templates_of
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import SHAPES
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.store import tuned_files
from gdn2gen.store._claims import always_checked
from gdn2gen.tuning.records.ledger import Ledger
from gdn2gen.tuning.records.places import open_ledger, storage_path
from gdn2gen.tuning.records.storage import open_storage
from gdn2gen.tuning.search.trials import StageTrials
from gdn2gen.tuning.views import charts, page
from gdn2gen.tuning.views.charts import Bar
from gdn2gen.tuning.views.lines import fla_times, lines

H200 = named_device("H200")
SHAPE = SHAPES["train4k"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path / "tuned"))
    monkeypatch.setattr("gdn2gen.store.sharing.packaged_tuned_dir", lambda: tmp_path / "none")
    return tmp_path


def search(ledger: Ledger, stage: str, BT: int, trials: int, digest: str = "d") -> None:
    """A search whose times follow from one knob; every fourth config is refused."""
    storage = open_storage(storage_path("gdn2", H200))
    problem = Problem()
    found = StageTrials(problem, stage, BT, [SHAPE], H200, ledger, digest, storage)
    found.record(default_config(stage, problem, BT=BT), {SHAPE.name: 2.0})
    for number in range(trials):
        proposal = found.propose()
        assert proposal is not None
        if number % 4 == 3:
            found.refuse(proposal, "resources: spills 900 bytes")
        else:
            ms = 1.0 + 0.1 * proposal.config.size("num_warps") + 0.001 * number
            found.succeed(proposal, {SHAPE.name: ms})


def file(tmp_path, templates=None):
    problem = Problem()
    recipe = Recipe.default(problem, "lean")
    measured = {
        "forward_ms": 0.5,
        "forward_backward_ms": 2.0,
        "default_forward_backward_ms": 2.5,
        "peak_mib": 1800.0,
    }
    entry = tuned_files.Entry(
        problem_key=problem.key,
        regime_key=SHAPE.regime.key,
        level="lean",
        plan="lean",
        configs=recipe.by_stage,
        templates=templates_of(recipe) if templates is None else templates,
        measured=measured,
        gate={**dict.fromkeys(always_checked("gdn2"), 4e-3), "db": 6e-3},
        provenance="measured",
    )
    metadata = tuned_files.metadata_for(H200, {"triton": "3.6.0"}, "gdn2gen tune")
    tuned_files.merge_entries(
        tuned_files.tuned_path(tmp_path / "tuned", "gdn2", H200), metadata, [entry]
    )


def test_the_page_says_what_is_on_file(folders, capsys):
    file(folders)
    ledger = open_ledger("gdn2", H200)
    ledger.add_recipe("wrong result: dg <b>", Recipe.default(Problem()), "d")
    search(ledger, "scan", 32, 12)
    search(ledger, "grad_key", 16, 10)
    out = folders / "deep/page.html"
    assert program.main(["report", "--device", "H200", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "1.25x" in said and "1 entries, searches of 2 stages" in said
    text = out.read_text()
    words = ("NVIDIA H200", "train4k, lean", "<h3>K=128 V=128 bf16</h3>", "1.25x", "db 6.0e-03")
    for word in (*words, "triton 3.6.0", "whole pipeline"):
        assert word in text, word
    assert re.search(r"<td>scan</td><td class=\"text\">resources</td><td>3</td>", text)
    # self-contained: nothing is fetched, nothing runs
    assert not re.search(r"(src|href)=|url\(|<script", text)
    assert_closed(text)
    for chart in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(chart)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass


def assert_closed(text: str) -> None:
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []


def test_the_latest_study_of_a_stage_counts(folders):
    ledger = open_ledger("gdn2", H200)
    search(ledger, "scan", 32, 12)
    search(ledger, "scan", 32, 5, digest="later")
    search(ledger, "scan", 16, 3)
    search(ledger, "scan", 64, 3)
    storage = open_storage(storage_path("gdn2", H200))
    found = page.searches(storage, "gdn2", H200, first=[64])
    assert [(x.BT, len(x.complete)) for x in found] == [(64, 4), (16, 4), (32, 5)]
    assert page.searches(storage, "gdn2", named_device("RTX 4090")) == []


def test_what_a_search_tells(folders):
    # of few knobs: which one times follow from shows in 40 trials
    search(open_ledger("gdn2", H200), "rescan", 32, 40)
    (found,) = page.searches(open_storage(storage_path("gdn2", H200)), "gdn2", H200)
    assert found.default_ms == 2.0 and found.best_ms < 1.5
    assert f"num_warps={found.best.params['num_warps']}" in found.best_knobs
    assert next(iter(found.importances)) == "num_warps"
    columns = found.slices()["num_warps"]
    assert list(columns) == ["2", "4", "8"]
    assert min(columns["2"]) == found.best_ms
    assert page.refused([found], [])["rescan", "resources"] == 10


def test_a_stale_entry_is_marked_and_fla_beside_it(folders, tmp_path):
    file(folders, templates={})
    (entry,) = tuned_files.load_tuned(
        tuned_files.tuned_path(tmp_path / "tuned", "gdn2", H200)
    ).entries
    row = {
        "shape": {"name": "train4k"},
        "problem": dict(Problem().key),
        "level": "lean",
        "fla": {"forward_backward": {"median": 6.0}},
    }
    (line,) = lines([entry], H200, fla_times([row])[0])
    assert line.stale and line.to_fla == pytest.approx(3.0)
    assert line.to_floor is not None and 1 < line.to_floor < 10
    (other,) = lines([entry], H200, fla_times([{**row, "shape": {"name": "few8k"}}])[0])
    assert other.fla_ms is None
    fast = {**row, "level": "fast", "fla": {"forward_backward": {"median": 5.0}}}
    for rows, ms in (([fast, row], 6.0), ([row, fast], 6.0), ([fast], 5.0)):
        (line,) = lines([entry], H200, fla_times(rows)[0])
        assert line.fla_ms == ms
        assert line.of_fla == ("" if ms == 6.0 else " (fast)"), "another level is named"


def test_nothing_on_file_is_an_error(folders, capsys):
    assert program.main(["report", "--device", "H200", "--out", str(folders / "x.html")]) == 2
    assert "gdn2gen tune" in capsys.readouterr().err
    assert not (folders / "x.html").exists()


def test_charts_of_little():
    assert charts.dots({}) == "" and charts.progress([None, None]) == ""
    for chart in (
        charts.bars([]),
        charts.bars([("a <b>", [Bar("tuned", 0.0, "0 & 0")])]),
        charts.dots({"1": [1.0], "2": [1.0]}),
        charts.progress([1.0]),
        charts.progress([3.0, None, 1.0, 2.0]),
    ):
        ElementTree.fromstring(chart)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1.0, 1.0, [1.0]),
        (0.9, 2.1, [1.0, 1.5, 2.0]),
        (0.21, 0.25, [0.22, 0.24]),
        (3.0, 9.0, [4.0, 6.0, 8.0]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert charts._ticks(low, high) == pytest.approx(ticks)
