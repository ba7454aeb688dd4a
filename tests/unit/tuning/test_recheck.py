"""`gdn2gen verify --tuned` and `tune --only-failing`, on a fake GPU."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from gdn2gen.base import outcome
from gdn2gen.base.device import named_device
from gdn2gen.base.outcome import Outcome
from gdn2gen.cli import program
from gdn2gen.codegen.build import Resources
from gdn2gen.codegen.digests import templates_of
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.family.shapes import SHAPES, Shape, shape_of
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.check import CheckResult
from gdn2gen.measure.timing import Timing
from gdn2gen.store import tuned_files
from gdn2gen.store._claims import always_checked
from gdn2gen.tuning.gpu.jobs import RecipeTiming
from gdn2gen.tuning.recheck import Rechecked, amended, recheck, recheck_table
from gdn2gen.tuning.records.entries import problem_of, words_of
from gdn2gen.tuning.views.lines import lines

H200 = named_device("H200")


def entry(
    shape: Shape = SHAPES["train4k"], ms: float = 2.0, problem: Problem | None = None, **knobs: Any
) -> tuned_files.Entry:
    problem = problem or Problem()
    recipe = Recipe.default(problem, "lean")
    recipe = recipe.with_config(recipe["scan"].replace(**knobs))
    return tuned_files.Entry(
        problem_key=problem.key,
        regime_key=shape.regime.key,
        level="lean",
        plan="lean",
        configs=recipe.by_stage,
        templates=templates_of(recipe),
        measured={"forward_ms": ms / 4, "forward_backward_ms": ms},
        gate=dict.fromkeys(always_checked("gdn2"), 4e-3),
        provenance="measured",
    )


class FakeBackend:
    """By the scan's knobs: BV 16 spills, 32 is wrong, 128 crashes; 4 warps take 2 ms, others 3."""

    slots = 2

    def __init__(self, *_: Any, **__: Any) -> None:
        self.timed: list[str] = []
        self.gated_in_full: list[bool] = []
        self.closed = False

    def compile(self, problem: Problem, config: Config) -> Future[Outcome[Resources]]:
        future: Future[Outcome[Resources]] = Future()
        spilled = 9999 if config.get("BV") == 16 else 0
        future.set_result(Outcome(outcome.OK, Resources(100, spilled, 1000, 128, 1.0)))
        return future

    def check(self, recipe: Recipe, *, full: bool) -> Outcome[CheckResult]:
        self.gated_in_full.append(full)
        BV = recipe["scan"]["BV"]
        if BV == 128:
            return Outcome(outcome.CRASHED, detail="signal 6")
        wrong = CheckResult(False, {"o": 0.5}, "o is off by 5e-01")
        right = CheckResult(True, dict.fromkeys(always_checked("gdn2"), 3e-3))
        return Outcome(outcome.OK, wrong if BV == 32 else right)

    def time_recipe(
        self, recipe: Recipe, shape: Shape, *, with_peak: bool
    ) -> Outcome[RecipeTiming]:
        self.timed.append(shape.name)
        timing = Timing(*[2.0 if recipe["scan"]["num_warps"] == 4 else 3.0] * 3, 10)
        return Outcome(outcome.OK, RecipeTiming(timing, timing, 0.0))

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("filed", "status", "said"),
    [
        (entry(), "holds", ""),
        (entry(ms=1.95), "holds", ""),
        (entry(ms=1.6), "slower", "25% slower than when it was filed"),
        (entry(ms=3.0, num_warps=8), "slower", "50% slower than the default"),
        (entry(BV=32), "wrong", "o is off"),
        (entry(BV=16), "failed", "scan: spills 9999"),
        (entry(BV=128), "failed", "signal 6"),
        (replace(entry(), templates={}), "stale", "prepare, scan"),
    ],
)
def test_verdicts(filed: tuned_files.Entry, status: str, said: str) -> None:
    backend: Any = FakeBackend()
    (result,) = recheck([filed], backend, H200)
    assert (result.status, said in result.detail) == (status, True), result.detail
    assert result.holds == (status == "holds")
    assert bool(backend.timed) == (status in ("holds", "slower"))


@pytest.mark.parametrize(
    ("filed", "status"),
    [
        (entry(ms=1.95), "renewed"),
        (entry(ms=1.6), "slower"),
        (entry(BV=32), "wrong"),
        (entry(BV=128), "failed"),
    ],
)
def test_a_stale_entry_is_renewed_if_it_passes(filed: tuned_files.Entry, status: str) -> None:
    backend: Any = FakeBackend()
    stale = replace(filed, templates={})
    (result,) = recheck([stale], backend, H200, renew=True)
    assert (result.status, result.holds) == (status, status == "renewed")
    assert backend.gated_in_full == [True]
    assert (result.renewed is None) == (status != "renewed")
    if result.renewed is not None:
        assert result.renewed.configs == stale.configs
        assert result.renewed.templates == entry().templates
        assert result.renewed.measured["forward_backward_ms"] == 2.0
        assert result.renewed.gate == dict.fromkeys(always_checked("gdn2"), 3e-3)


def test_the_default_is_timed_once_for_each_shape() -> None:
    backend: Any = FakeBackend()
    results = list(recheck([entry(), entry(num_stages=3), entry(SHAPES["wide8k"])], backend, H200))
    assert [x.default_ms for x in results] == [2.0, 2.0, 2.0]
    assert backend.timed == ["train4k", "train4k", "train4k", "wide8k", "wide8k"]


def test_shapes_and_problems_of_entries() -> None:
    for shape in SHAPES.values():
        assert shape_of(entry(shape).regime) == shape
    assert shape_of(Regime(60, 3, 2)) == Shape("3x20x2", 3, 20, 2)
    assert shape_of(Regime(61, 3, 2)) is None
    gated = entry(problem=Problem(gate="softplus", has_A_log=True))
    assert words_of(gated) == "K=128 V=128 bf16, softplus gate"
    plain = entry(problem=Problem(K=64, V=32, dtype="fp16", gate_dtype="fp16", l2norm=False))
    assert words_of(plain) == "K=64 V=32 fp16, g fp16, not normalised"
    problem = problem_of(gated, SHAPES["varlen8k"])
    assert problem.has_A_log and problem.has_dt_bias and problem.varlen


@pytest.fixture
def fake_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path))
    monkeypatch.setattr("gdn2gen.store.sharing.packaged_tuned_dir", lambda: tmp_path / "none")
    for name in ("gdn2gen.base.device", "gdn2gen.tuning.run"):
        monkeypatch.setattr(f"{name}.present_device", lambda: H200)
    monkeypatch.setattr("gdn2gen.base.device.has_gpu", lambda: True)
    monkeypatch.setattr("gdn2gen.tuning.gpu.backend.WorkerBackend", FakeBackend)
    metadata = tuned_files.metadata_for(H200, {"triton": "3.6.0"}, "gdn2gen tune")

    def file(*entries: tuned_files.Entry) -> None:
        tuned_files.merge_entries(tuned_files.tuned_path(tmp_path, "gdn2", H200), metadata, entries)

    return file


def test_verify_tuned(fake_gpu, capsys, tmp_path):
    fake_gpu(entry(), entry(SHAPES["wide8k"]))
    out = tmp_path / "out.json"
    assert program.main(["verify", "--tuned", "--json", str(out)]) == 0
    assert "2 of 2 entries hold" in capsys.readouterr().out
    assert '"holds"' in out.read_text()
    fake_gpu(entry(SHAPES["few8k"], BV=32))
    assert program.main(["verify", "--tuned"]) == 1
    said = capsys.readouterr().out
    assert "2 of 3 entries hold" in said and "--only-failing" in said
    assert program.main(["verify", "--tuned", "bf16-*"]) == program.EXIT_USAGE


def test_renewed_entries_are_filed(fake_gpu, capsys, tmp_path):
    stale = replace(entry(), templates={"scan": "0" * 16})
    fake_gpu(stale, entry(SHAPES["wide8k"]))
    path = tuned_files.tuned_path(tmp_path, "gdn2", H200)
    assert program.main(["verify", "--tuned"]) == 1
    assert "1 of 2 entries hold" in capsys.readouterr().out
    assert program.main(["verify", "--tuned", "--renew"]) == 0
    assert "renewed" in capsys.readouterr().out
    file = tuned_files.load_tuned(path)
    assert [tuned_files.stale_stages(x) for x in file.entries] == [[], []]
    assert file.metadata["command"].endswith("gdn2gen verify --tuned --renew")
    assert program.main(["verify", "--renew"]) == program.EXIT_USAGE
    assert "--tuned" in capsys.readouterr().err


def test_only_failing_tunes_the_rest(fake_gpu, capsys, monkeypatch):
    fake_gpu(entry(), entry(SHAPES["wide8k"], BV=32))
    tuned: list[str] = []
    monkeypatch.setattr("gdn2gen.cli.tune.search", lambda args, *_: tuned.append(args.shapes))
    command = ["tune", "--head-dim", "128", "--only-failing", "--level", "lean", "--shapes"]
    assert program.main([*command, "train4k,wide8k,long16k"]) == 0
    assert tuned == ["wide8k,long16k"]
    assert "2 of 3 shapes to tune: wide8k, long16k" in capsys.readouterr().out
    assert program.main([*command, "train4k"]) == 0
    assert len(tuned) == 1 and "0 of 1" in capsys.readouterr().out


def test_what_holds_no_longer_makes_way_for_what_is_found(fake_gpu, capsys, monkeypatch, tmp_path):
    """An entry that outranks the new one by the time it once took would stay for ever."""
    lying, wrong = entry(ms=1.0), entry(SHAPES["wide8k"], ms=1.0, BV=32)
    crashing, holding = entry(SHAPES["few8k"], ms=1.0, BV=128), entry(SHAPES["long16k"])
    fake_gpu(lying, wrong, crashing, holding)
    path = tuned_files.tuned_path(tmp_path, "gdn2", H200)
    left: dict[str, Any] = {}

    def search(*_: Any) -> None:
        left.update({shape_of(x.regime).name: x for x in tuned_files.load_tuned(path).entries})
        fake_gpu(entry(ms=1.9, num_stages=3), entry(SHAPES["few8k"], ms=2.0, num_stages=3))

    monkeypatch.setattr("gdn2gen.cli.tune.search", search)
    command = ["tune", "--head-dim", "128", "--only-failing", "--level", "lean", "--shapes"]
    assert program.main([*command, "train4k,wide8k,few8k,long16k"]) == 0
    assert "wrong results were taken out" in capsys.readouterr().out
    assert left == {
        "train4k": replace(lying, measured={"forward_backward_ms": 2.0}),
        "few8k": replace(crashing, measured={}, provenance="predicted"),
        "long16k": holding,
    }
    now = {shape_of(x.regime).name: x for x in tuned_files.load_tuned(path).entries}
    assert [now[name].configs["scan"]["num_stages"] for name in ("train4k", "few8k")] == [3, 3]
    assert now["long16k"] == holding


def test_entries_for_strong_decay_are_timed_under_it(fake_gpu, capsys, monkeypatch, tmp_path):
    """One that was timed under a model's own decays is held to no time of then."""
    drawn: list[str] = []
    made = FakeBackend.__init__

    def listen(self: FakeBackend, *given: Any, **named: Any) -> None:
        drawn.extend(named.values())
        made(self, *given, **named)

    monkeypatch.setattr(FakeBackend, "__init__", listen)
    strong = replace(entry(SHAPES["few8k"], ms=1.0), decay="strong")
    strong = replace(strong, measured=strong.measured | {"pattern": "strong"})
    seen = replace(strong, measured=strong.measured | {"pattern": "mqar"}, level="fast")
    fake_gpu(entry(), strong, seen)
    assert program.main(["verify", "--tuned"]) == 1
    assert drawn == ["layer", "strong"]
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of 3 entries hold" in said and "lean, strong decay" in said
    slower = next(x for x in recheck([strong], FakeBackend(), H200))  # type: ignore[arg-type]
    assert slower.status == "slower" and amended(slower).measured["pattern"] == "strong"
    backend: Any = FakeBackend()
    (held,) = recheck([replace(seen, templates={})], backend, H200, renew=True)
    assert held.renewed is not None
    assert (held.renewed.decay, held.renewed.measured["pattern"]) == ("strong", "strong")
    weak, other = lines([strong, entry(SHAPES["few8k"])], H200, ())
    assert (weak.level, other.level) == ("lean", "lean, strong decay"), "as a report has them"
    tuned: list[str] = []
    monkeypatch.setattr("gdn2gen.cli.tune.search", lambda args, *_: tuned.append(args.shapes))
    command = ["tune", "--head-dim", "128", "--only-failing", "--level", "lean", "--shapes"]
    assert program.main([*command, "train4k,few8k", "--decay", "strong"]) == 0
    assert (tuned, drawn[-1]) == (["train4k,few8k"], "strong"), "few8k is slower than it was"


def test_both_need_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("gdn2gen.base.device.has_gpu", lambda: False)
    assert program.main(["verify", "--tuned"]) == program.EXIT_USAGE
    assert "no GPU" in capsys.readouterr().err
    assert program.main(["tune", "--only-failing"]) == program.EXIT_USAGE
    assert "present GPU" in capsys.readouterr().err


def test_what_slower_entries_of_a_size_are_for_is_said() -> None:
    """A report has the fastest alone."""

    def of_scan(ms: float, **knobs: Any) -> tuned_files.Entry:
        return entry(ms=ms, **knobs)

    few = of_scan(1.0, language="tilelang", BV=64, segments="parallel")
    wide, alone = of_scan(1.5, language="tilelang", BV=64), of_scan(2.0)
    entries = [few, wide, alone]
    table = recheck_table(Rechecked(x, SHAPES["train4k"], "holds") for x in entries)
    console = Console(width=140, record=True, file=StringIO())
    console.print(table)
    rows = [x.split("lean")[0] for x in console.export_text().splitlines() if "train4k" in x]
    words = [x.replace("│", "").strip() for x in rows]
    assert words == ["train4k", "train4k, every option", "train4k, Triton alone"]
    assert [x.entry for x in lines(entries[::-1], H200, ())] == [few]
    assert [x.entry for x in lines([alone, wide], H200, ())] == [wide]
