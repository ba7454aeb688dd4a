"""Tables and pictures of what came out of `scripts/recall.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from learning.models import ABLATIONS, MIXERS, TITLES
from learning.plots import Panel, Point, picture
from learning.recall_plan import Experiment, best_rate
from learning.report import NOTHING, interval, table
from learning.rows import Row
from learning.tasks import Task

Scores = dict[tuple[int, int], list[float]]


def chosen(rows: Sequence[Row], experiment: Experiment, task: str, model: str) -> list[Row]:
    """The runs that count: all seeds at the best rate of the first."""
    mine = [x for x in rows if (x["task"], x["model"]) == (task, model)]
    mine = [x for x in mine if x["steps"] == experiment.steps]
    best = best_rate([x for x in mine if x["seed"] == experiment.seeds[0]])
    runs = [x for x in mine if x["lr"] == best and x["seed"] in experiment.seeds]
    return sorted(runs, key=lambda row: int(row["seed"]))


def scores(runs: Sequence[Row]) -> Scores:
    """Parts of answers that were right, of each test by its pairs and length; a run that diverged
    has none right."""
    tests: list[Any] = next((x["tests"] for x in runs if "tests" in x), [])
    found: Scores = {(pairs, length): [] for pairs, length, _ in tests}
    for run in runs:
        by_test = {(pairs, length): right for pairs, length, right in run.get("tests", [])}
        for test, values in found.items():
            values.append(by_test.get(test, 0.0))
    return found


def pages(rows: Sequence[Row], experiment: Experiment) -> str:
    """A table for each task: percent of answers that are right, of each mixer at each test; and one
    of the runs."""
    if not rows:
        return NOTHING
    parts, runs_of = [], {}
    for name, task in experiment.tasks.items():
        found = {x: chosen(rows, experiment, name, x) for x in (*MIXERS, *ABLATIONS)}
        runs_of[name] = {x: y for x, y in found.items() if y}
        if runs_of[name]:
            parts += [f"**{name}**: answers that are right, %", ""]
            parts += [_of_task(task, runs_of[name]), ""]
    parts += [*_of_runs(runs_of), *_decays(rows, experiment), *_remarks(rows)]
    return "\n".join(parts).rstrip()


def _of_task(task: Task, runs: dict[str, list[Row]]) -> str:
    """Tests below each other, mixers side by side."""
    found = {model: scores(mine) for model, mine in runs.items()}
    lines = [
        [
            f"{test[0]} x {test[1]}",
            *(interval(x[test]).percent() if x.get(test) else "-" for x in found.values()),
        ]
        for test in task.tests
    ]
    return table(["pairs x length", *(TITLES[x] for x in runs)], lines)


def _of_runs(runs_of: dict[str, dict[str, list[Row]]]) -> list[str]:
    """What was run: at which rate, and the loss on new rows, seed by seed."""
    lines = []
    for task, runs in runs_of.items():
        for model, mine in runs.items():
            losses = ", ".join(
                "diverged" if x["diverged"] is not None else f"{x['validation']:.2g}" for x in mine
            )
            parameters = f"{mine[0]['parameters']:,}"
            lines.append([f"{task}, {TITLES[model]}", f"{mine[0]['lr']:g}", parameters, losses])
    titles = ("", "rate", "parameters", "loss on new rows, a seed each")
    return ["**Runs**", "", table(titles, lines), ""] if lines else []


def _decays(rows: Sequence[Row], experiment: Experiment) -> list[str]:
    """What trained gates do, of the first seed's best runs."""
    lines = []
    for task in experiment.tasks:
        for model in MIXERS:
            for run in chosen(rows, experiment, task, model)[:1]:
                heads = [head for layer in run["seen"].get("decays", []) for head in layer]
                if heads:
                    least, middle, most = (
                        (f"{x[0]:.3g}", f"{x[len(x) // 2]:.3g}", f"{x[-1]:.3g}")
                        for x in (sorted(head[level] for head in heads) for level in (1, 4, 7))
                    )
                    words = (", ".join(x) for x in (least, middle, most))
                    lines.append([f"{task}, {TITLES[model]}", *words])
    if not lines:
        return []
    said = "**Decay of the trained gates**, nats a token: the strongest head, the middle one, the "
    titles = ("", "strongest 1% of a head's", "half", "weakest 1%")
    return [f"{said}weakest", "", table(titles, lines), ""]


def _remarks(rows: Sequence[Row]) -> list[str]:
    """What went wrong, and on what it ran."""
    diverged = sorted({f"{x['task']} {x['model']} lr {x['lr']:g} seed {x['seed']}"
                       for x in rows if x["diverged"] is not None})  # fmt: skip
    alarms = sorted({f"{x['task']} {x['model']}: {alarm}"
                     for x in rows for alarm in x["seen"].get("alarms", [])})  # fmt: skip
    machines = sorted({", ".join(f"{k} {v}" for k, v in x["machine"].items()) for x in rows})
    return [
        f"- diverged: {', '.join(diverged) or 'none'}",
        f"- alarms of the observatory: {', '.join(alarms[:10]) or 'none'}",
        *(f"- {machine}" for machine in machines),
    ]


def repeated(rows: Sequence[Row]) -> str:
    """Of each mixer that ran twice, whether it was the same."""
    if not rows:
        return NOTHING
    titles = ("", "steps", "launched", "the same bits", "loss at the end")
    lines = [
        [
            f"{TITLES[x['model']]}, {x['task']}",
            str(x["steps"]),
            x["launched"],
            "yes" if x["same"] else "NO",
            "diverged" if x["diverged"] is not None else f"{x['last_loss']:.4f}",
        ]
        for x in rows
    ]
    return table(titles, lines)


def pictures(rows: Sequence[Row], experiment: Experiment) -> dict[str, str]:
    """Curves over pairs, or over lengths where a task has one pair: of the mixers, and of GDN-2's
    gates."""
    found = {}
    for name, models in (("recall", MIXERS), ("gates", ("gdn2", *ABLATIONS))):
        panels = []
        for task in experiment.tasks:
            curves = {TITLES[x]: chosen(rows, experiment, task, x) for x in models}
            panel = _panel(task, experiment.tasks[task], {x: y for x, y in curves.items() if y})
            panels += [panel] if panel.curves else []
        if panels:
            found[name] = picture(panels)
    return found


def _panel(name: str, task: Task, runs: dict[str, list[Row]]) -> Panel:
    over_length = len({pairs for pairs, _ in task.tests}) == 1
    # beyond the length of training, where all numbers of pairs are tested
    lengths = {length for _, length in task.tests}
    shown = min((x for x in lengths if x > task.length), default=task.length)
    curves = {}
    for title, mine in runs.items():
        points = [
            Point(length if over_length else pairs, *(x or 0.0 for x in interval(values)))
            for (pairs, length), values in scores(mine).items()
            if over_length or length == shown
        ]
        curves[title] = sorted(points)
    below = "length" if over_length else f"pairs, of {shown} tokens"
    title = f"{name}, trained on {task.length}"
    return Panel(title, below, curves, 0.0, 1.0, log=True, percent=True)
