"""Recall: rows ask for what they said, models learn it on the CPU, runs go on where they were."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from script_module import load_script

from gdn2gen.base.files import replace_file
from gdn2gen.family.decays import DecayPattern
from gdn2gen.nn import Cache, GatedDeltaNet2, KimiDeltaAttention

recall = load_script("recall")
from learning import models, report, rows, tasks, training  # noqa: E402

TINY = replace(
    tasks.TASKS["mqar"], keys=4, values=4, noise=2, pairs=(2,), length=8, tests=((2, 8), (2, 12))
)
LEARNER = replace(
    recall.SMALL, tasks={"mqar": TINY}, head_dim=16, heads=2, steps=150, rates=(1e-2,)
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What is asked for


def _pairs_of(row: list[int], task: Any) -> dict[int, list[int]]:
    """What follows each key that a row tells of, by its own rules."""
    first = task.keys + task.values
    mark = first + task.noise
    if task.kind == "mqar":
        told = iter(zip(row[::2], row[1::2], strict=False))
        found: dict[int, list[int]] = {}
        for key, value in told:
            if key >= task.keys or not task.keys <= value < first:
                break
            found[key] = [value]
        return found
    return {row[i + 1]: row[i + 2 : i + 4] for i, x in enumerate(row) if x == mark}


@pytest.mark.parametrize("name", tasks.TASKS)
def test_rows_ask_for_what_they_said(name: str) -> None:
    task = tasks.TASKS[name]
    for test in (None, task.tests[-1]):
        tokens, targets = task.rows(24, 5, "cpu", test)
        assert tokens.shape == (24, task.length if test is None else test[1])
        assert int(tokens.min()) >= 0 and int(tokens.max()) < task.vocabulary
        sizes = set()
        for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
            told = _pairs_of(row, task)
            places = [i for i, x in enumerate(wanted) if x != tasks.IGNORED]
            if task.kind == "mqar":
                asked = [row[i] for i in places]
                assert sorted(asked) == sorted(told) and min(places) >= 2 * len(told)
                assert [wanted[i] for i in places] == [told[key][0] for key in asked]
            else:
                ask = task.vocabulary - 1
                starts = [i for i, x in enumerate(row) if x == ask]
                asked = [row[i + 1] for i in starts]
                assert len(asked) == len(set(asked)) == min(len(told), task.asked)
                assert starts[-1] == len(row) - tasks.NEEDLE
                answers = [told[key] for key in asked]
                assert [row[i + 2 : i + 4] for i in starts] == answers
                assert places == [i + 1 + n for i in starts for n in (0, 1)]
                assert [wanted[i] for i in places] == [x for pair in answers for x in pair]
            sizes.add(len(told))
        assert sizes == ({test[0]} if test else sizes & {*task.pairs}) and sizes


def test_a_seed_is_its_rows() -> None:
    task = tasks.TASKS["multi-needle"]
    one, again, other = (task.rows(3, seed, "cpu") for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    with pytest.raises(ValueError, match="90 pairs want 270 of 256 tokens"):
        replace(tasks.TASKS["mqar"], pairs=(90,))


# Who is asked


@pytest.mark.parametrize("name", [*models.MIXERS, *models.ABLATIONS])
def test_models_have_states_of_one_size(name: str) -> None:
    sizes = recall.SMALL.sizes(recall.SMALL.tasks["mqar"])
    model, cache = models.build(name, sizes, 0), Cache(2)
    with torch.no_grad():
        model(torch.zeros(2, 3, dtype=torch.int64), cache=cache)
    kept = cache.layer(0)
    assert kept["ssm" if name == "mamba3" else "state"].numel() == 2 * sizes.state
    weights = models.build(name, sizes, 0).state_dict()
    assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items())


def test_tied_gates_are_kdas() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_heads": 2, "head_dim": 16}
    tied, kda, x = models.Tied(32, **sizes), KimiDeltaAttention(32, **sizes), torch.randn(2, 9, 32)
    kda.load_state_dict(tied.state_dict())
    torch.testing.assert_close(tied(x), kda(x))


@pytest.mark.parametrize("kind", [models.EraseAlone, models.WriteAlone, models.Untied])
def test_a_number_a_head_is_all_channels_alike(kind: type[models.Ablated]) -> None:
    """As GDN-2 with the rows of its projection repeated."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_heads": 2, "head_dim": 16}
    some, both, x = kind(32, **sizes), GatedDeltaNet2(32, **sizes), torch.randn(2, 9, 32)
    weights = some.state_dict()
    for name in kind.numbers:
        weights[f"{name}.weight"] = weights[f"{name}.weight"].repeat_interleave(16, 0)
    both.load_state_dict(weights)
    torch.testing.assert_close(some(x), both(x))
    assert len(weights) == len(both.state_dict())


# What they learn


def _learnt(model: str, experiment: Any = LEARNER) -> tuple[Any, float, float]:
    (name,) = experiment.tasks
    task = experiment.tasks[name]
    trainer = recall._trainer(experiment, task, model, experiment.rates[0], 0)
    training.train([trainer])
    return trainer, *recall._tested(trainer, task, 64, task.tests[0])


# A model that only knows which values a row has, and not whose they are: ln 2, and half of the
# answers. Of one that forgets at once see below.
@pytest.mark.parametrize(
    ("model", "most"),
    [
        ("gdn2", 0.1),
        ("mamba3", 0.6),
        pytest.param("kda", 0.1, marks=pytest.mark.slow),
        pytest.param("gated_delta_rule", 0.2, marks=pytest.mark.slow),
        pytest.param("mamba2", 0.6, marks=pytest.mark.slow),
    ],
)
def test_mixers_learn_to_recall(model: str, most: float) -> None:
    longer = replace(LEARNER, steps=300) if model == "mamba2" else LEARNER
    trainer, loss, right = _learnt(model, longer)
    assert trainer.diverged is None and trainer.launched == "eager"
    assert loss < most < math.log(2) and right > 0.6
    assert trainer.seen()["alarms"] == []


def test_a_gate_that_forgets_at_once_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the margins above would see: exp(g) is 0."""
    made = models.build

    def broken(*given: Any) -> Any:
        model = made(*given)
        for block in model.blocks:
            torch.nn.init.constant_(block.mixer.A_log, 9.0)
            block.mixer.A_log.requires_grad_(False)
        return model

    monkeypatch.setattr(recall, "build", broken)
    _, loss, right = _learnt("gdn2")
    assert loss > math.log(2) and right < 0.65


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "steps", "least"),
    [("mqar", 300, 0.9), ("single-needle", 300, 0.9), ("multi-needle", 600, 0.5)],
)
def test_the_small_experiment(task: str, steps: int, least: float, tmp_path: Path) -> None:
    """As `--small` has it: the command, its processes and its rows; an eighth is chance. Of two
    needles a seed may know no more after 300 steps than which values there are, a third."""
    words = ["--small", "--models", "gdn2", "--tasks", task, "--rows", str(tmp_path)]
    assert recall.main(["train", *words, "--processes", "1", "--steps", str(steps)]) == 0
    small = replace(recall.SMALL, steps=steps)
    found = recall.chosen(rows.read_rows(tmp_path), small, task, "gdn2")
    assert len(found) == 2 and all(x["tests"][0][2] > least for x in found)


# Runs


def _experiment() -> Any:
    return replace(LEARNER, steps=2, rates=(1e-2, 2e-2), seeds=(0, 1, 2), test_rows=8)


def test_runs_that_have_a_row_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "SMALL", _experiment())
    job = {"small": True, "steps": None, "rows": str(tmp_path), "task": "mqar", "model": "gdn2"}
    assert recall.work({**job, "until": 0.0}).startswith("2 runs")
    assert recall._wanting(_experiment(), tmp_path, "mqar", "gdn2")
    assert recall.work({**job, "until": math.inf}).startswith("2 runs")
    assert len([*tmp_path.glob("*.json")]) == 4
    gates = DecayPattern.load(next((tmp_path / "gates").iterdir()))
    assert (gates.op, gates.K, gates.name) == ("gdn2", 16, "mqar-gdn2")
    lost = next(tmp_path.glob("*seed2*"))
    lost.unlink()
    assert recall._wanting(_experiment(), tmp_path, "mqar", "gdn2")
    assert recall.work({**job, "until": math.inf}).startswith("1 runs")
    assert lost.exists() and not recall._wanting(_experiment(), tmp_path, "mqar", "gdn2")
    row = json.loads(lost.read_text())
    assert row["tests"][1][:2] == [2, 12] and row["machine"]["torch"] == torch.__version__


def test_runs_beside_each_other_are_those_alone() -> None:
    experiment = _experiment()
    made = [recall._trainer(experiment, TINY, "kda", 1e-2, seed) for seed in (0, 1)]
    training.train(made)
    alone = recall._trainer(experiment, TINY, "kda", 1e-2, 1)
    training.train([alone])
    assert made[1].digest() == alone.digest() != made[0].digest()


def test_the_same_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "SMALL", _experiment())
    words = ["repeat", "--small", "--models", "gdn2", "--tasks", "mqar", "--rows", str(tmp_path)]
    try:
        assert recall.main(words) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    (path,) = tmp_path.iterdir()
    row = json.loads(path.read_text())
    assert row["same"] and len({*row["digests"]}) == 1
    path.write_text(json.dumps(row | {"same": False}))
    assert recall.main(words) == 1  # what is on file counts
    torch.use_deterministic_algorithms(False)


def test_a_run_that_diverges_says_so() -> None:
    experiment = replace(_experiment(), steps=3)
    one, other = (recall._trainer(experiment, TINY, "gdn2", lr, 0) for lr in (math.nan, 1e-2))
    training.train([one, other])
    assert (one.diverged, other.diverged) == (3, None)
    row = recall._row(experiment, TINY, one, 2)
    assert "tests" not in row and any("not finite" in x for x in row["seen"]["alarms"])
    assert recall.best_rate([{**row, "lr": 1.0}]) is None


def test_processes_share_jobs() -> None:
    jobs = [("a", {"x": 1}), ("b", {"x": 2})]
    assert rows.share("json:dumps", jobs, 1, minutes=1.0) == []
    (failed,) = rows.share("json:loads", jobs[:1], 1, minutes=1.0)
    assert failed.startswith("a: error: TypeError")
    assert rows.share("json:dumps", jobs, 1, minutes=0.0) == [f"{x}: no time left" for x in "ab"]


def test_rates_rise_and_fall() -> None:
    schedule = training.Schedule(100, 1.0)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] == pytest.approx(
        0.1, abs=1e-3
    )


# What is said of them


def _row(model: str, seed: int, lr: float, right: float) -> dict[str, Any]:
    return {
        "task": "mqar", "model": model, "seed": seed, "lr": lr, "steps": 2, "diverged": None,
        "validation": lr, "tests": [[2, 8, right], [2, 12, right / 2]], "parameters": 1234,
        "seen": {
            "alarms": ["step 1: the state"], "decays": [[[-3, -2.5] + [-0.5] * 5 + [-0.1, 0]]],
        },
        "machine": {"device": "CPU"},
    }  # fmt: skip


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "SMALL", _experiment())
    page, record = tmp_path / "learning.md", tmp_path / "learning/recall.json"
    monkeypatch.setattr(recall, "PAGE", page)
    monkeypatch.setattr(recall, "RECORD", record)
    page.write_text(
        "before\n<!-- recall:begin -->\nold\n<!-- recall:end -->\nafter\n"
        "<!-- repeats:begin -->\n<!-- repeats:end -->\n"
    )
    words = ["report", "--small", "--rows", str(tmp_path / "rows")]
    assert recall.main(words) == 0
    assert page.read_text().split("\n")[2] == report.NOTHING
    made = [_row("gdn2", seed, 1e-2, right) for seed, right in enumerate((0.9, 0.8, 1.0))]
    made += [_row("gdn2", 0, 2e-2, 0.1), _row("gdn2-tied", 0, 1e-2, 0.5)]
    made.append(_row("kda", 0, 1e-2, 0.5) | {"diverged": 2})
    for row in made:
        rows.write_row(rows.path_of(tmp_path / "rows", *map(row.get, ("model", "seed", "lr"))), row)
    twice = {"same": False, "steps": 2, "launched": "graph", "diverged": None, "last_loss": 0.5}
    rows.write_row(tmp_path / "rows/twice.json", {"task": "mqar", "model": "kda", **twice})
    assert recall.main(words) == 0
    text = page.read_text()
    assert "| KDA, mqar | 2 | graph | NO | 0.5000 |" in text
    assert "| mqar, Gated DeltaNet-2 | -2.5, -2.5, -2.5 | -0.5, -0.5, -0.5 | -0.1" in text
    # 4.303 * 0.1 / sqrt(3) = 24.8, and more than all cannot be right
    assert "| pairs x length | Gated DeltaNet-2 | tied |" in text
    assert "| 2 x 8 | 90.0 (65 to 100) | 50.0 |" in text
    assert "| 2 x 12 | 45.0 (33 to 57) | 25.0 |" in text
    assert "| mqar, Gated DeltaNet-2 | 0.01 | 1,234 | 0.01, 0.01, 0.01 |" in text
    assert "- diverged: mqar kda lr 0.01 seed 0" in text and "mqar gdn2: step 1: the state" in text
    for name in ("recall", "gates"):
        drawn = (record.parent / f"{name}.svg").read_text()
        ElementTree.fromstring(drawn)
        assert "Gated DeltaNet-2" in drawn and "prefers-color-scheme: dark" in drawn
    before = record.read_text()
    for path in (tmp_path / "rows").iterdir():
        path.unlink()
    assert recall.main(words) == 0 and record.read_text() == before and page.read_text() == text


def test_intervals() -> None:
    assert report.interval([0.5]) == (0.5, None)
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5)
    assert report.interval([1.0, 1.0]).percent() == "100.0 ± 0"
    assert report.interval([0.0, 0.1]).percent() == "5.0 (0 to 69)"


def test_the_page_is_what_the_record_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, record = tmp_path / "learning.md", tmp_path / "learning/recall.json"
    page.write_text(recall.PAGE.read_text())
    if recall.RECORD.exists():
        replace_file(record, recall.RECORD.read_text())
    before = recall.PAGE.read_text()
    monkeypatch.setattr(recall, "PAGE", page)
    monkeypatch.setattr(recall, "RECORD", record)
    assert recall.main(["report", "--rows", str(tmp_path / "none")]) == 0
    assert page.read_text() == before, "run: python scripts/recall.py report"


@pytest.mark.parametrize(
    "raw",
    (b"{trunc", b"\xff\xfe", b"[1]", b"3", b"{}", b'"machine"', b'["machine"]', b'{"machine":1}'),
)
def test_a_file_that_holds_no_row_does_not_count(raw: bytes, tmp_path: Path) -> None:
    rows.write_row(tmp_path / "a.json", {"x": 1})
    (tmp_path / "b.json").write_bytes(raw)
    with pytest.warns(UserWarning, match=r"b\.json holds no row of a run"):
        assert rows.read_row(tmp_path / "b.json") is None
    with pytest.warns(UserWarning, match=r"b\.json holds no row of a run"):
        assert [row["x"] for row in rows.read_rows(tmp_path)] == [1]


@pytest.mark.parametrize(
    ("words", "said"),
    (
        (["--steps", "0"], "--steps: must be at least 1, but is 0"),
        (["--processes", "-1"], "--processes: must be at least 1, but is -1"),
        (["--tasks"], "--tasks: expected at least one argument"),
        (["--steps", "1.5"], "--steps: must be a whole number, but is 1.5"),
        (["--minutes", "nan"], "--minutes: must be from 0 to 10080, but is nan"),
        (["--minutes", "inf"], "--minutes: must be from 0 to 10080, but is inf"),
        (["--minutes", "-1"], "--minutes: must be from 0 to 10080, but is -1"),
        (["--minutes", "x"], "--minutes: must be from 0 to 10080, but is x"),
        (["--rows", "/proc/none"], "error: no row can be written: "),
        (["--models"], "--models: expected at least one argument"),
        (["--rows", __file__], "is a file, and rows want a folder"),
    ),
)
def test_words_that_say_nothing_to_train(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        recall.main(["train", *words])
    assert said in capsys.readouterr().err


def test_what_still_wants_a_run_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Time that ran out between two runs of a job; of one that was named twice, once."""
    asked: list[str] = []

    def share(target: str, jobs: list[tuple[str, Any]], *more: float) -> list[str]:
        asked.extend(name for name, _ in jobs)
        return []

    monkeypatch.setattr(recall, "share", share)
    words = ["train", "--small", "--tasks", "mqar", "--models", "kda", "kda"]
    assert recall.main([*words, "--rows", str(tmp_path)]) == 1 and asked == ["mqar kda"]
    assert "still wanting" in capsys.readouterr().out


def test_small_rows_are_not_those_of_the_full_size(tmp_path: Path) -> None:
    same = replace(recall.SMALL, steps=7), replace(recall.SMALL, steps=7, small=False)
    small, full = (recall._path(tmp_path, x, "mqar", "kda", 1e-2, 0) for x in same)
    assert small != full
