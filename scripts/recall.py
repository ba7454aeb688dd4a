"""Train mixers side by side on recall, and say what came out: docs/learning.md.

    python scripts/recall.py train [--tasks ..] [--models ..] [--rows DIR] [--minutes 9]
                                   # what is wanting of the runs; again after any interruption
    python scripts/recall.py report [--rows DIR]   # the table, the pictures, docs/learning/
    python scripts/recall.py repeat [--steps 2000] [--models ..] [--rows DIR]
                                   # the same run twice with deterministic algorithms: the same bits

Each mixer, and GDN-2 with some of its gates, learns each task (`learning/tasks.py`) at every
learning rate with seed 0; the rate with the least loss on new rows then trains the other seeds. A
job is one mixer on one task: its runs go beside each other on the GPU, and --processes jobs at a
time. `--small` is the same in minutes on a CPU, with a few keys and one layer.
"""

from __future__ import annotations

import os

# what deterministic products of cuBLAS want, before it is loaded
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

import torch  # noqa: E402
from learning.models import ABLATIONS, MIXERS, TITLES, Sizes, build, parameters  # noqa: E402
from learning.plots import Panel, Point, picture  # noqa: E402
from learning.report import NOTHING, interval, put, table  # noqa: E402
from learning.rows import Row, path_of, read_row, read_rows, share, write_row  # noqa: E402
from learning.tasks import IGNORED, TASKS, Task  # noqa: E402
from learning.training import Schedule, Trainer, tokens_per_second, train  # noqa: E402

from gdn2gen.base.environment import verifying  # noqa: E402
from gdn2gen.base.files import replace_file  # noqa: E402

PAGE: Final = ROOT / "docs/learning.md"
RECORD: Final = ROOT / "docs/learning/recall.json"
# Rows of tests, and those on which a rate is chosen, are from seeds that no training has.
_HELD_OUT: Final = 1_000_000_007


@dataclass(frozen=True)
class Experiment:
    """What all runs share."""

    tasks: dict[str, Task]
    hidden: int = 128
    layers: int = 2
    heads: int = 2
    head_dim: int = 64
    batch: int = 64
    steps: int = 3000
    rates: tuple[float, ...] = (7e-4, 2e-3, 6e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    test_rows: int = 512

    def sizes(self, task: Task) -> Sizes:
        return Sizes(
            task.vocabulary,
            self.hidden,
            self.layers,
            self.heads,
            self.head_dim,
            mamba_head_dim=self.head_dim,
        )


FULL: Final = Experiment(TASKS)
_FEW: Final[dict[str, Any]] = {"keys": 8, "values": 8, "noise": 4}
SMALL: Final = Experiment(
    {
        "mqar": replace(
            TASKS["mqar"], **_FEW, pairs=(2, 4), length=16, tests=((2, 16), (4, 16), (4, 32))
        ),
        "single-needle": replace(
            TASKS["single-needle"], **_FEW, length=16, tests=((1, 16), (1, 32))
        ),
        "multi-needle": replace(
            TASKS["multi-needle"], **_FEW, pairs=(1, 2), asked=1, length=16,
            tests=((2, 16), (2, 32)),
        ),
    },
    hidden=32, layers=1, heads=1, head_dim=32, batch=16, steps=300, rates=(1e-2, 3e-2),
    seeds=(0, 1), test_rows=64,
)  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "report", "repeat"):
        command = commands.add_parser(name)
        command.add_argument("--rows", type=Path, default=Path("runs/recall"))
        command.add_argument("--small", action="store_true", help="a few keys, on the CPU")
        command.add_argument("--models", nargs="*", choices=(*MIXERS, *ABLATIONS))
        command.add_argument("--tasks", nargs="*", choices=tuple(TASKS), default=list(TASKS))
        command.add_argument("--steps", type=int)
        command.add_argument("--processes", type=int, default=4, help="jobs at a time (4)")
        command.add_argument("--minutes", type=float, default=9.0, help="then nothing begins (9)")
    args = parser.parse_args(words)
    experiment = SMALL if args.small else FULL
    if args.steps is not None:
        experiment = replace(experiment, steps=args.steps)
    run = {"train": _train, "report": _report, "repeat": _repeat}[args.command]
    return run(args, experiment)


def _train(args: argparse.Namespace, experiment: Experiment) -> int:
    models = args.models or [*MIXERS, *ABLATIONS]
    jobs = [
        (f"{task} {model}", {"task": task, "model": model, **_given(args)})
        for task in args.tasks
        for model in models
        if _wanting(experiment, args.rows, task, model)
    ]
    print(f"{len(jobs)} of {len(models) * len(args.tasks)} jobs want something", flush=True)
    failed = share("recall:work", jobs, args.processes, args.minutes)
    for line in failed:
        print(f"failed: {line}")
    return int(bool(failed))


def _given(args: argparse.Namespace) -> Row:
    return {"small": args.small, "steps": args.steps, "rows": str(args.rows.resolve())}


def _wanting(experiment: Experiment, rows: Path, task: str, model: str) -> bool:
    first = _searched(experiment, rows, task, model)
    if len(first) < len(experiment.rates):
        return True
    best = _best(first)
    return best is not None and any(
        read_row(_path(rows, experiment, task, model, best, seed)) is None
        for seed in experiment.seeds
    )


def _searched(experiment: Experiment, rows: Path, task: str, model: str) -> list[Row]:
    """Rows of the first seed at all rates, as far as there are any."""
    seed = experiment.seeds[0]
    paths = (_path(rows, experiment, task, model, lr, seed) for lr in experiment.rates)
    return [row for row in map(read_row, paths) if row is not None]


def _best(rows: Sequence[Row]) -> float | None:
    """The rate with the least loss on new rows; None where all diverged."""
    fine = [row for row in rows if row["diverged"] is None]
    return min(fine, key=lambda row: float(row["validation"]))["lr"] if fine else None


def _path(rows: Path, experiment: Experiment, task: str, model: str, lr: float, seed: int) -> Path:
    return path_of(rows, task, model, f"lr{lr:g}", f"seed{seed}", f"steps{experiment.steps}")


def _gates(path: Path) -> Path:
    """The decays of a run, for `gdn2gen verify --pattern`; of its row's path."""
    return path.parent / "gates" / path.name


def work(job: Row) -> str:
    """One mixer on one task: what is wanting of the search, then of the other seeds."""
    torch.set_num_threads(1)
    experiment = SMALL if job["small"] else FULL
    if job["steps"] is not None:
        experiment = replace(experiment, steps=job["steps"])
    folder, task, model = Path(job["rows"]), job["task"], job["model"]
    started, done = time.perf_counter(), 0
    done += _runs(experiment, folder, task, model, [(x, 0) for x in experiment.rates])
    best = _best(_searched(experiment, folder, task, model))
    if best is None:
        return "diverged at every rate"
    if time.time() < job["until"]:
        done += _runs(experiment, folder, task, model, [(best, s) for s in experiment.seeds])
    return f"{done} runs in {time.perf_counter() - started:.0f} s, lr {best:g}"


def _runs(
    experiment: Experiment, folder: Path, task: str, model: str, wanted: list[tuple[float, int]]
) -> int:
    """Train what has no row yet, beside each other, and write the rows."""
    paths = {run: _path(folder, experiment, task, model, *run) for run in wanted}
    missing = [run for run, path in paths.items() if read_row(path) is None]
    with verifying():
        made = [_trainer(experiment, experiment.tasks[task], model, *run) for run in missing]
        if made:
            train(made)
        for (lr, seed), trainer in zip(missing, made, strict=True):
            row = _row(experiment, experiment.tasks[task], trainer, len(made))
            named = {"task": task, "model": model, "lr": lr, "seed": seed}
            write_row(paths[lr, seed], {**named, **row})
            if trainer.observatory is not None and trainer.diverged is None:
                trainer.observatory.pattern(f"{task}-{model}").save(_gates(paths[lr, seed]))
    return len(missing)


def _trainer(experiment: Experiment, task: Task, model: str, lr: float, seed: int) -> Trainer:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    schedule = Schedule(experiment.steps, lr)
    shape = (schedule.block, experiment.batch, task.length)

    def block(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        made = task.rows(shape[0] * shape[1], 10_007 * (seed + 1) + number, device)
        return made[0].view(shape), made[1].view(shape)

    return Trainer(build(model, experiment.sizes(task), seed), schedule, block, device)


def _row(experiment: Experiment, task: Task, trainer: Trainer, beside: int) -> Row:
    """What came of a run."""
    speed = tokens_per_second(trainer, experiment.batch * task.length, beside)
    row = {
        "steps": experiment.steps,
        "parameters": parameters(trainer.model),
        "losses": [[step, loss] for step, loss, _ in trainer.losses],
        "diverged": trainer.diverged,
        "seconds": trainer.losses[-1][2],
        "beside": beside,
        "tokens_per_second": speed,
        "launched": trainer.launched,
        "seen": trainer.seen(),
    }
    if trainer.diverged is None:
        row["validation"] = _tested(trainer, task, experiment.test_rows, None)[0]
        row["tests"] = [
            [*test, _tested(trainer, task, experiment.test_rows, test)[1]] for test in task.tests
        ]
    return row


@torch.no_grad()
def _tested(
    trainer: Trainer, task: Task, count: int, test: tuple[int, int] | None
) -> tuple[float, float]:
    """Loss, and the part of answers that are right, on new rows: 64 of them at a time."""
    place = 0 if test is None else 1 + task.tests.index(test)
    tokens, targets = task.rows(count, _HELD_OUT + place, trainer.device, test)
    loss = right = asked = 0.0
    with trainer.on_stream():
        for rows, wanted in zip(torch.split(tokens, 64), torch.split(targets, 64), strict=True):
            logits = trainer.model(rows).float()
            counts = wanted != IGNORED
            flat, answers = logits[counts], wanted[counts]
            loss += float(torch.nn.functional.cross_entropy(flat, answers, reduction="sum"))
            right += float((flat.argmax(-1) == answers).sum())
            asked += float(counts.sum())
    return loss / asked, right / asked


def _repeat(args: argparse.Namespace, experiment: Experiment) -> int:
    """Each mixer twice on the first task, one run at a time: losses and weights bit for bit."""
    torch.use_deterministic_algorithms(True)
    if args.steps is None and not args.small:
        experiment = replace(experiment, steps=2000)
    task, different = args.tasks[0], []
    for model in args.models or MIXERS:
        path = path_of(args.rows, "repeat", task, model, f"steps{experiment.steps}")
        row = read_row(path)
        if row is None:
            row = _repeated(experiment, task, model)
            write_row(path, row)
        same = "the same bits twice" if row["same"] else "DIFFERENT"
        print(f"{model}: {experiment.steps} steps, {same}, {row['launched']}", flush=True)
        if not row["same"] or row["diverged"] is not None:
            different.append(model)
    return int(bool(different))


def _repeated(experiment: Experiment, task: str, model: str) -> Row:
    digests, made = [], None
    for _ in range(2):
        made = _trainer(experiment, experiment.tasks[task], model, experiment.rates[0], 0)
        with verifying():
            train([made])
        digests.append(made.digest())
    assert made is not None
    return {
        "task": task,
        "model": model,
        "steps": experiment.steps,
        "same": digests[0] == digests[1],
        "digests": digests,
        "diverged": made.diverged,
        "launched": made.launched,
        "last_loss": made.losses[-1][1],
    }


def _report(args: argparse.Namespace, experiment: Experiment) -> int:
    """Rows from --rows join those on record; table and pictures are made of all."""
    known = json.loads(RECORD.read_text())["rows"] if RECORD.exists() else []
    rows = {_key(row): row for row in (*known, *read_rows(args.rows)) if "lr" in row}
    if rows:
        document = {"rows": [rows[key] for key in sorted(rows)]}
        replace_file(RECORD, json.dumps(document, separators=(",", ":")) + "\n")
    for task in experiment.tasks:
        for model in MIXERS:
            _keep_gates(args.rows, experiment, task, model, list(rows.values()))
    put(PAGE, "recall", pages(list(rows.values()), experiment))
    for name, text in pictures(list(rows.values()), experiment).items():
        replace_file(RECORD.parent / f"{name}.svg", text)
    return 0


def _keep_gates(
    folder: Path, experiment: Experiment, task: str, model: str, rows: Sequence[Row]
) -> None:
    """Decays of the first seed's best run beside the record, where they are at hand."""
    for run in chosen(rows, experiment, task, model)[:1]:
        path = _gates(_path(folder, experiment, task, model, run["lr"], run["seed"]))
        if path.exists():
            replace_file(RECORD.parent / "gates" / f"{task}-{model}.json", path.read_text())


def _key(row: Row) -> tuple[str, str, int, float, int]:
    return row["task"], row["model"], row["steps"], row["lr"], row["seed"]


Scores = dict[tuple[int, int], list[float]]


def chosen(rows: Sequence[Row], experiment: Experiment, task: str, model: str) -> list[Row]:
    """The runs that count: all seeds at the best rate of the first."""
    mine = [x for x in rows if (x["task"], x["model"]) == (task, model)]
    mine = [x for x in mine if x["steps"] == experiment.steps]
    best = _best([x for x in mine if x["seed"] == experiment.seeds[0]])
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
    """A table for each task: percent of answers that are right, of each mixer at each test."""
    parts = []
    for name, task in experiment.tasks.items():
        runs = {x: chosen(rows, experiment, name, x) for x in (*MIXERS, *ABLATIONS)}
        if not any(runs.values()):
            continue
        titles = ["pairs x length", *(f"{pairs} x {length}" for pairs, length in task.tests)]
        lines = [
            [
                f"{TITLES[model]} (lr {mine[0]['lr']:g}, {len(mine)} seeds, "
                f"{mine[0]['parameters']:,} parameters)",
                *(
                    interval(values).percent() if (values := scores(mine).get(test)) else "-"
                    for test in task.tests
                ),
            ]
            for model, mine in runs.items()
            if mine
        ]
        parts += [f"**{name}**: answers that are right, %", "", table(titles, lines), ""]
    parts += [*_decays(rows, experiment), *_remarks(rows)]
    return "\n".join(parts).rstrip() if rows else NOTHING


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


if __name__ == "__main__":
    sys.exit(main())
