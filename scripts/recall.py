"""Train mixers side by side on recall, and say what came out: docs/learning.md.

    python scripts/recall.py train [--tasks ..] [--models ..] [--rows DIR] [--minutes 8]
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
from dataclasses import replace
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

import torch  # noqa: E402
from learning.models import ABLATIONS, MIXERS, build, parameters  # noqa: E402
from learning.recall_page import chosen, pages, pictures, repeated  # noqa: E402
from learning.recall_plan import FULL, SMALL, Experiment, best_rate  # noqa: E402
from learning.report import put  # noqa: E402
from learning.rows import (  # noqa: E402
    Row,
    at_least_one,
    folder_of_rows,
    minutes,
    path_of,
    read_row,
    read_rows,
    refused,
    share,
    write_row,
)
from learning.tasks import IGNORED, TASKS, Task  # noqa: E402
from learning.training import Schedule, Trainer, tokens_per_second, train  # noqa: E402

from gdn2gen.base.environment import verifying  # noqa: E402
from gdn2gen.base.files import replace_file  # noqa: E402

PAGE: Final = ROOT / "docs/learning.md"
RECORD: Final = ROOT / "docs/learning/recall.json"
# Rows of tests, and those on which a rate is chosen, are from seeds that no training has.
_HELD_OUT: Final = 1_000_000_007


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "report", "repeat"):
        command = commands.add_parser(name)
        command.add_argument("--rows", type=folder_of_rows, default=Path("runs/recall"))
        command.add_argument("--small", action="store_true", help="a few keys, on the CPU")
        command.add_argument("--models", nargs="+", choices=(*MIXERS, *ABLATIONS))
        command.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
        command.add_argument("--steps", type=at_least_one)
        command.add_argument("--processes", type=at_least_one, default=4, help="jobs at a time (4)")
        command.add_argument("--minutes", type=minutes, default=8.0, help="then nothing begins (8)")
    args = parser.parse_args(words)
    if args.command != "report" and (why := refused(args.rows)):
        parser.error(why)
    experiment = SMALL if args.small else FULL
    if args.steps is not None:
        experiment = replace(experiment, steps=args.steps)
    run = {"train": _train, "report": _report, "repeat": _repeat}[args.command]
    return run(args, experiment)


def _train(args: argparse.Namespace, experiment: Experiment) -> int:
    models = dict.fromkeys(args.models or [*MIXERS, *ABLATIONS])
    every = [(task, model) for task in dict.fromkeys(args.tasks) for model in models]
    wanted = [x for x in every if _wanting(experiment, args.rows, *x)]
    print(f"{len(wanted)} of {len(every)} jobs want something", flush=True)
    jobs = [(f"{x} {y}", {"task": x, "model": y, **_given(args)}) for x, y in wanted]
    failed = share("recall:work", jobs, args.processes, args.minutes)
    for line in failed:
        print(f"failed: {line}")
    if left := [" ".join(x) for x in wanted if _wanting(experiment, args.rows, *x)]:
        print(f"still wanting, the same command goes on with it: {', '.join(left)}")
    return int(bool(failed or left))


def _given(args: argparse.Namespace) -> Row:
    return {"small": args.small, "steps": args.steps, "rows": str(args.rows.resolve())}


def _wanting(experiment: Experiment, rows: Path, task: str, model: str) -> bool:
    first = _searched(experiment, rows, task, model)
    if len(first) < len(experiment.rates):
        return True
    best = best_rate(first)
    return best is not None and any(
        read_row(_path(rows, experiment, task, model, best, seed)) is None
        for seed in experiment.seeds
    )


def _searched(experiment: Experiment, rows: Path, task: str, model: str) -> list[Row]:
    """Rows of the first seed at all rates, as far as there are any."""
    seed = experiment.seeds[0]
    paths = (_path(rows, experiment, task, model, lr, seed) for lr in experiment.rates)
    return [row for row in map(read_row, paths) if row is not None]


def _path(rows: Path, experiment: Experiment, task: str, model: str, lr: float, seed: int) -> Path:
    named = (task, model, f"lr{lr:g}", f"seed{seed}", f"steps{experiment.steps}")
    return path_of(rows, *named, *_size(experiment))


def _size(experiment: Experiment) -> list[str]:
    return ["small"] if experiment.small else []


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
    best = best_rate(_searched(experiment, folder, task, model))
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
        "small": experiment.small,
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


def _tested(
    trainer: Trainer, task: Task, count: int, test: tuple[int, int] | None
) -> tuple[float, float]:
    """Loss, and the part of answers that are right, on new rows: 64 of them at a time."""
    place = 0 if test is None else 1 + task.tests.index(test)
    loss = right = asked = 0.0
    with trainer.testing():
        tokens, targets = task.rows(count, _HELD_OUT + place, trainer.device, test)
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
        path = path_of(
            args.rows, "repeat", task, model, f"steps{experiment.steps}", *_size(experiment)
        )
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
        "small": experiment.small,
        "steps": experiment.steps,
        "same": digests[0] == digests[1],
        "digests": digests,
        "diverged": made.diverged,
        "launched": made.launched,
        "last_loss": made.losses[-1][1],
    }


def _report(args: argparse.Namespace, experiment: Experiment) -> int:
    """Rows from --rows join those on record; table and pictures are made of all. Rows of --small
    are for a page of --small."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {"rows": [], "repeats": []}
    # what is of no task is another script's
    fresh = [x for x in read_rows(args.rows) if "task" in x and (args.small or not x.get("small"))]
    runs = {_key(row): row for row in (*known["rows"], *(x for x in fresh if "lr" in x))}
    twice = (*known["repeats"], *(x for x in fresh if "same" in x))
    repeats = {(x["task"], x["model"], x["steps"]): x for x in twice}
    rows = [runs[key] for key in sorted(runs)]
    document = {"rows": rows, "repeats": [repeats[key] for key in sorted(repeats)]}
    if runs or repeats:
        replace_file(RECORD, json.dumps(document, separators=(",", ":")) + "\n")
    for task in experiment.tasks:
        for model in MIXERS:
            _keep_gates(args.rows, experiment, task, model, rows)
    put(PAGE, "recall", pages(rows, experiment))
    put(PAGE, "repeats", repeated(document["repeats"]))
    for name, text in pictures(rows, experiment).items():
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


if __name__ == "__main__":
    sys.exit(main())
