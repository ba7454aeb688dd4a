"""`gdn2gen tuned` and `gdn2gen ledger`: files that the tuner writes, moved, compared and listed."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gdn2gen.base import outcome, paths
from gdn2gen.base.device import known_device, named_device, slug_of
from gdn2gen.base.outcome import Outcome
from gdn2gen.cli import program
from gdn2gen.codegen.build import Resources
from gdn2gen.codegen.digests import digest_of
from gdn2gen.codegen.render import template_digest
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.plans import plan_named
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.check import CheckResult
from gdn2gen.store import sharing, tuned_files
from gdn2gen.store._claims import always_checked
from gdn2gen.store.dispatch import find_recipe
from gdn2gen.tuning.records.ledger import Ledger, read_ledger
from gdn2gen.tuning.retest import retest, why_not_in_force

H200 = named_device("H200")
TOOLCHAIN = {"triton": "3.6.0", "torch": "2.11.0", "driver": "580"}
METADATA = tuned_files.metadata_for(H200, TOOLCHAIN, "gdn2gen tune", "2026-01-02T03:04:05Z")


def entry(tokens: int, ms: float, **knobs: Any) -> tuned_files.Entry:
    problem = Problem()
    configs = {stage: default_config(stage, problem) for stage in plan_named("lean").stages}
    configs["scan"] = configs["scan"].replace(**knobs)
    return tuned_files.Entry(
        problem_key=problem.key,
        regime_key=Regime(tokens, 4, 16).key,
        level="lean",
        plan="lean",
        configs=configs,
        templates={stage: template_digest(config) for stage, config in configs.items()},
        measured={"forward_ms": ms / 4, "forward_backward_ms": ms},
        gate=dict.fromkeys(always_checked("gdn2"), 4e-3),
        provenance="measured",
    )


def write(path: Path, *entries: tuned_files.Entry, gpu: str = "NVIDIA H200") -> Path:
    ordered = tuple(sorted(entries, key=lambda x: x.key))
    tuned_files.write_tuned(path, tuned_files.TunedFile({**METADATA, "gpu": gpu}, ordered))
    return path


def test_export_takes_what_calls_find(tmp_path, monkeypatch, capsys):
    """A user's entry before a packaged one, whatever their times, unless it is stale."""
    user, packaged = tmp_path / "user", tmp_path / "packaged"
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(user))
    monkeypatch.setattr(sharing, "packaged_tuned_dir", lambda: packaged)
    monkeypatch.setattr(paths, "packaged_tuned_dir", lambda: packaged)
    stale = replace(entry(4000, 1.0), templates={})
    write(tuned_files.tuned_path(user, "gdn2", H200), entry(1000, 3.0), entry(2000, 1.0), stale)
    others = [entry(1000, 2.0), entry(3000, 1.0), entry(4000, 2.0)]
    write(tuned_files.tuned_path(packaged, "gdn2", H200), *others)
    out = tmp_path / "all.json"
    assert program.main(["tuned", "export", "--device", "H200", "--to", str(out)]) == 0
    assert "4 entries" in capsys.readouterr().out
    kept = tuned_files.load_tuned(out).entries
    times = {x.regime.tokens: x.measured["forward_backward_ms"] for x in kept}
    assert times == {1000: 3.0, 2000: 1.0, 3000: 1.0, 4000: 2.0}
    for tokens, folder in ((1000, user), (2000, user), (3000, packaged), (4000, packaged)):
        found = find_recipe(Problem(), Regime(tokens, 4, 16), H200)
        assert (found.source, Path(found.file).parents[1]) == ("exact", folder), tokens
    assert program.main(["tuned", "export", "--device", "H200"]) == 0
    assert json.loads(capsys.readouterr().out)["_metadata"]["gpu"] == "NVIDIA H200"


def test_export_says_where_it_looked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path))
    assert program.main(["tuned", "export", "--device", "RTX 4090"]) == program.EXIT_USAGE
    assert str(tmp_path) in capsys.readouterr().err


def test_import_keeps_the_faster(tmp_path, capsys):
    source = write(tmp_path / "theirs.json", entry(1000, 2.0), entry(2000, 2.0))
    own = write(tuned_files.tuned_path(tmp_path / "own", "gdn2", H200), entry(1000, 1.0))
    assert program.main(["tuned", "import", str(source), "--out", str(tmp_path / "own")]) == 0
    said = capsys.readouterr().out
    assert "1 of 2 entries" in said and "GDN2GEN_TUNED_DIR" in said
    times = [x.measured["forward_backward_ms"] for x in tuned_files.load_tuned(own).entries]
    assert sorted(times) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("gpu", "arch", "sms"),
    [
        ("NVIDIA H20", "sm_90", 78),
        ("NVIDIA GeForce RTX 4080", "sm_89", 76),
        ("NVIDIA B300 SXM6 AC", "sm_103", 148),
    ],
)
def test_a_gpu_that_no_table_lists_is_what_its_file_says(
    tmp_path, monkeypatch, capsys, gpu, arch, sms
):
    assert known_device(gpu) is None
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path / "cache"))
    metadata = {**METADATA, "gpu": gpu, "arch": arch, "sms": sms}
    source = tmp_path / "theirs.json"
    tuned_files.write_tuned(source, tuned_files.TunedFile(metadata, (entry(65536, 1.0),)))
    assert program.main(["tuned", "import", str(source)]) == 0
    for name in (gpu, slug_of(gpu)):
        assert program.main(["explain", "--device", name, "--shape", "4x16384x16"]) == 0
        said = capsys.readouterr().out
        assert f"device    {gpu} ({arch}, {sms} SMs)" in said and "source    exact" in said
    out = tmp_path / "page.html"
    assert program.main(["report", "--device", gpu, "--out", str(out)]) == 0
    assert gpu in out.read_text()
    assert program.main(["tuned", "export", "--device", gpu]) == 0
    assert program.main(["ledger", "--device", gpu]) == 0
    assert program.main(["explain", "--device", "H300"]) == program.EXIT_USAGE


def test_merge_says_what_is_stale(tmp_path, capsys):
    older = replace(entry(1000, 2.0), templates={})
    source = write(tmp_path / "a.json", older, entry(2000, 2.0))
    assert program.main(["tuned", "merge", str(source), "--to", str(tmp_path / "b.json")]) == 0
    assert "1 are of other templates" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", '{"_metadata": {"schema": 99}}'])
def test_a_file_that_cannot_be_read_changes_nothing(tmp_path, capsys, text):
    good = write(tmp_path / "good.json", entry(1000, 2.0))
    (tmp_path / "bad.json").write_text(text)
    files = [str(good), str(tmp_path / "bad.json")]
    assert (
        program.main(["tuned", "merge", *files, "--to", str(tmp_path / "to.json")])
        == program.EXIT_USAGE
    )
    assert "bad.json" in capsys.readouterr().err
    assert not (tmp_path / "to.json").exists()


def test_files_of_two_gpus_are_not_merged(tmp_path, capsys):
    files = [
        str(write(tmp_path / f"{gpu}.json", entry(1000, 2.0), gpu=gpu)) for gpu in ("one", "two")
    ]
    assert (
        program.main(["tuned", "merge", *files, "--to", str(tmp_path / "to")]) == program.EXIT_USAGE
    )
    assert "one, two" in capsys.readouterr().err


def test_files_of_two_ops_are_not_merged(tmp_path, capsys):
    """Nor is one imported where calls of its op do not look."""
    own = entry(1000, 2.0)
    key = {**own.problem_key, "op": "kda"}
    errors = dict.fromkeys(always_checked("kda"), 4e-3)
    other = write(tmp_path / "kda.json", replace(own, problem_key=key, gate=errors))
    one, out = write(tmp_path / "gdn2.json", own), tmp_path / "out"
    for words, said in (
        (["merge", str(one), str(other), "--to", str(out / "to.json")], "of gdn2, kda"),
        (["import", str(other), "--out", str(out)], "holds entries of kda"),
    ):
        assert program.main(["tuned", *words]) == program.EXIT_USAGE
        assert said in capsys.readouterr().err
    assert not out.exists()
    assert program.main(["tuned", "import", str(other), "--op", "kda", "--out", str(out)]) == 0
    assert (out / "kda/nvidia-h200.json").is_file()


def test_diff(tmp_path, capsys):
    old = write(tmp_path / "old.json", entry(1000, 2.0), entry(2000, 1.0), entry(3000, 1.0))
    new = write(tmp_path / "new.json", entry(1000, 1.5, BV=32), entry(3000, 1.0), entry(4000, 1.0))
    assert program.main(["tuned", "diff", str(old), str(old)]) == 0
    assert program.main(["tuned", "diff", str(old), str(new)]) == 1
    found = {x.label.split("tokens=")[1].split()[0]: x for x in _diff(old, new)}
    assert {*found} == {"1000", "2000", "4000"}
    assert found["1000"].knobs == {"scan.BV": (64, 32)}
    assert found["1000"].ratio == pytest.approx(0.75)
    assert found["2000"].new is None and found["4000"].old is None
    assert "only in the new file" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def _diff(old: Path, new: Path) -> list[sharing.Difference]:
    return sharing.diff(sharing.load_file(old), sharing.load_file(new))


# The ledger


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path))
    now = {**TOOLCHAIN, "python": "3.12"}
    monkeypatch.setattr("gdn2gen.tuning.records.places.toolchain", lambda: now)
    path = tmp_path / "ledger/gdn2/nvidia-h200.jsonl"
    book = Ledger(path, H200.name, TOOLCHAIN)
    for number, reason in ((1, "resources: spills 900 bytes"), (2, "wrong result: dg is off")):
        config = refused(number)
        book.add(reason, Problem(), config, template_digest(config))
    book.add("timeout", Problem(), refused(3), "another digest")
    return book


def refused(num_stages: int) -> Config:
    return default_config("grad_value", Problem()).replace(num_stages=num_stages)


def test_ledger_lists_what_is_in_force(book, capsys):
    assert program.main(["ledger", "--device", "H200", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [x["config"]["num_stages"] for x in lines] == [1, 2]
    assert all(x["reproduce"].endswith(f"--retest {x['id']}") for x in lines)
    assert len({x["id"] for x in lines}) == 2
    assert program.main(["ledger", "--device", "H200", "--all", "--json"]) == 0
    gone = json.loads(capsys.readouterr().out.splitlines()[2])
    assert gone["not_in_force"] == "its templates changed"


def test_ledger_filters(book, capsys):
    assert program.main(["ledger", "--device", "H200", "--reason", "spills"]) == 0
    said = capsys.readouterr().out
    assert "grad_value" in said and "dg is off" not in said and "--retest" in said
    assert program.main(["ledger", "--device", "H200", "--stage", "scan"]) == 0
    said = capsys.readouterr().out
    assert said == "no refusals of --stage scan in force (--all shows the rest)\n"


def test_ledger_without_a_gpu_lists_all_there_are(book, capsys, monkeypatch):
    monkeypatch.setattr("gdn2gen.base.device.has_gpu", lambda: False)
    assert program.main(["ledger"]) == 0
    assert "spills" in capsys.readouterr().out
    assert program.main(["ledger", "--retest"]) == program.EXIT_USAGE
    assert "no GPU" in capsys.readouterr().err


def test_another_toolchain_is_named(book):
    (first, *_) = read_ledger(book.path)
    other = Ledger(book.path, H200.name, {**TOOLCHAIN, "triton": "3.9.0"})
    assert why_not_in_force(first, other) == "triton changed"
    assert why_not_in_force(first, book) == ""
    assert "gone" in why_not_in_force(replace(first, config={"BT": 31}), book)


class FakeBackend:
    """Compiles everything; the check refuses loads two ahead."""

    slots = 1

    def __init__(self) -> None:
        self.checked: list[tuple[Recipe, bool]] = []

    def compile(self, problem: Problem, config: Config) -> Future[Outcome[Resources]]:
        future: Future[Outcome[Resources]] = Future()
        future.set_result(Outcome(outcome.OK, Resources(100, 0, 1000, 128, 1.0)))
        return future

    def check(self, recipe: Recipe, *, full: bool) -> Outcome[CheckResult]:
        self.checked.append((recipe, full))
        wrong = recipe["grad_value"]["num_stages"] == 2
        result = CheckResult(False, {"dg": 0.4}, "dg is off") if wrong else CheckResult(True)
        return Outcome(outcome.OK, result)


def test_retest_clears_what_passes(book):
    whole = Recipe.default(Problem(), "lean")
    book.add_recipe("wrong together", whole, digest_of(whole))
    backend: Any = FakeBackend()
    results = list(retest(read_ledger(book.path), book, backend, H200))
    assert [x.passed for x in results] == [True, False, True, True]
    assert results[1].reason == "wrong result: dg is off"
    assert [full for _, full in backend.checked] == [False, False, False, True]
    left = read_ledger(book.path)
    assert [x.config["num_stages"] for x in left] == [2]
    config = refused(1)
    digest = template_digest(config)
    again = Ledger(book.path, H200.name, TOOLCHAIN)
    assert again.why_refused(Problem(), config, digest) is None
    again.add("spills again", Problem(), config, digest)
    assert len(read_ledger(book.path)) == 2


def test_what_has_no_config_any_more_stays(book):
    (first, *_) = read_ledger(book.path)
    gone = replace(first, config={"BT": 31})
    (result,) = retest([gone], book, FakeBackend(), H200)
    assert not result.passed and "nothing to try" in result.reason
