"""Train mixers side by side on bytes of text, and say what came out: docs/learning.md.

    python scripts/text.py train [--models ..] [--rows DIR] [--minutes 8]
                                   # what is wanting of the runs; again after any interruption
    python scripts/text.py speed [--models ..] [--rows DIR] [--steps 60] [--minutes 3.3]
                                   # tokens a second alone, ours and the peers' in turns
    python scripts/text.py report [--rows DIR]     # the tables, the pictures, docs/learning/

The text is the Python that runs this (`learning/corpus.py`). All models have as many parameters as
GDN-2's, by the width of their SwiGLUs, the same state, tokens and schedule; each trains at every
learning rate for a tenth of the steps, and at the rate that ended lowest to the end. Those of
flash-linear-attention (`fla:gdn2`), where it is installed, have the same weights at first, the same
data and the rate of ours, so that only time should differ; `mamba_ssm:mamba2` and `:mamba3` are our
layers on mamba_ssm's ops. One run at a time: times count. All are launched alike, one kernel after
another, unless --graphs. `--small` is the same on a CPU. `speed` is described in
`learning/speed.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

import torch  # noqa: E402
from learning import speed, speed_page  # noqa: E402
from learning.corpus import Corpus, collect  # noqa: E402
from learning.models import MIXERS, PEERS, build, member_of, parameters  # noqa: E402
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
from learning.text_page import page, pictured  # noqa: E402
from learning.text_plan import FULL, SMALL, Experiment, sizes_of  # noqa: E402
from learning.training import Schedule, Trainer, tokens_per_second, train  # noqa: E402

from gdn2gen.base.environment import verifying  # noqa: E402
from gdn2gen.base.files import replace_file  # noqa: E402

PAGE: Final = ROOT / "docs/learning.md"
RECORD: Final = ROOT / "docs/learning/text.json"
SPEEDS: Final = ROOT / "docs/learning/speed.json"
# Minutes after which nothing begins.
_MINUTES: Final = {"train": 8.0, "speed": 3.3, "report": 0.0}
_TIMED_STEPS: Final = 60


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, given in _MINUTES.items():
        command = commands.add_parser(name)
        command.add_argument("--rows", type=folder_of_rows, default=Path("runs/text"))
        command.add_argument("--small", action="store_true", help="one small layer, on the CPU")
        command.add_argument("--models", nargs="+", choices=(*MIXERS, *PEERS))
        command.add_argument("--steps", type=at_least_one)
        command.add_argument("--graphs", action="store_true", help="replay steps as CUDA graphs")
        command.add_argument("--minutes", type=minutes, default=given, help="then nothing begins")
    args = parser.parse_args(words)
    if args.command != "report" and (why := refused(args.rows)):
        parser.error(why)
    if args.command == "speed":
        return _speed(args)
    experiment = _experiment(args.small, args.steps)
    return (_train if args.command == "train" else _report)(args, experiment)


def _experiment(small: bool, steps: int | None) -> Experiment:
    experiment = SMALL if small else FULL
    return experiment if steps is None else replace(experiment, steps=steps)


def _train(args: argparse.Namespace, experiment: Experiment) -> int:
    given = {
        "small": args.small,
        "steps": args.steps,
        "rows": str(args.rows.resolve()),
        "graphs": args.graphs,
    }
    paths = {
        model: _path(args.rows, experiment, model, args.graphs)
        for model in args.models or [*MIXERS, *PEERS]
    }
    wanted = [model for model, path in paths.items() if read_row(path) is None]
    failed = share("text:work", [(x, {"model": x, **given}) for x in wanted], 1, args.minutes)
    for line in failed:
        print(f"failed: {line}")
    return int(bool(failed) or any(read_row(paths[x]) is None for x in wanted))


def _speed(args: argparse.Namespace) -> int:
    """A peer that fails is a row that says so, and no failure of the command."""
    models = args.models or [*MIXERS, *PEERS]
    job = {"small": args.small, "graphs": args.graphs}
    steps = args.steps or _TIMED_STEPS
    failed = speed.measure(models, job, args.rows, args.minutes, steps=steps)
    for model, why in failed.items():
        print(f"failed: {model}: {why}")
    return int(any(x in MIXERS for x in failed))


def _path(rows: Path, experiment: Experiment, model: str, graphs: bool, *more: str) -> Path:
    how = ["small"] * experiment.small + ["graphs"] * graphs
    return path_of(rows, model, f"steps{experiment.steps}", *how, *more)


def work(job: Row) -> str:
    """One model: the search for its rate, then the run."""
    experiment = _experiment(job["small"], job["steps"])
    folder, model, graphs = Path(job["rows"]), job["model"], job["graphs"]
    lr = _rate(experiment, folder, member_of(model), graphs, job["until"])
    if time.time() > job["until"]:
        return "no time left, the same command goes on"
    if lr is None:
        return "diverged at every rate"
    started = time.perf_counter()
    row = _run(experiment, model, lr, experiment.steps, graphs)
    write_row(_path(folder, experiment, model, graphs), row)
    speed = row["tokens_per_second"]  # of runs of one block none is taken
    said = "" if speed is None else f", {speed:,.0f} tokens/s"
    return f"{time.perf_counter() - started:.0f} s, lr {lr:g}{said}"


def _rate(
    experiment: Experiment, folder: Path, model: str, graphs: bool, until: float
) -> float | None:
    """The rate that ended lowest; a peer has that of ours."""
    found: list[tuple[float, float]] = []
    for lr in experiment.rates:
        path = _path(folder, experiment, model, graphs, "search", f"lr{lr:g}")
        row = read_row(path)
        if row is None:
            if time.time() > until:
                return None
            row = _run(experiment, model, lr, experiment.search_steps, graphs)
            write_row(path, {**row, "search": True})
        if row["diverged"] is None:
            found.append((row["held_out"][-1][2], lr))
    return min(found)[1] if found else None


@cache
def _corpus(device: str, most: int) -> Corpus:
    return collect(device, most)


def _run(experiment: Experiment, model: str, lr: float, steps: int, graphs: bool) -> Row:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = _corpus(str(device), experiment.bytes)
    schedule = Schedule(steps, lr, least=0.1, look=experiment.every)
    schedule = replace(schedule, block=min(schedule.block, experiment.every, steps))
    shape = (schedule.block, experiment.batch, experiment.length)

    def block(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        made = corpus.windows(shape[0] * shape[1], shape[2], 10_007 * experiment.seed + number)
        return made[0].view(shape), made[1].view(shape)

    sizes, seen = sizes_of(experiment, model), []

    def after(trainer: Trainer) -> None:
        done = trainer.step_number
        if done % experiment.every == 0 or done == steps:
            seen.append([done, trainer.losses[-1][2], _held_out(trainer, experiment, corpus)])

    with verifying():
        trainer = Trainer(
            build(model, sizes, experiment.seed), schedule, block, device, graph=graphs
        )
        train([trainer], after)
    tokens = experiment.batch * experiment.length
    return {
        "model": model,
        "lr": lr,
        "small": experiment.small,
        "steps": steps,
        "tokens_per_step": tokens,
        "parameters": parameters(trainer.model),
        "inner": sizes.inner,
        "corpus": {"digest": corpus.digest, "files": corpus.files, "bytes": len(corpus.train)},
        "losses": trainer.losses,
        "held_out": seen,
        "diverged": trainer.diverged,
        "tokens_per_second": tokens_per_second(trainer, tokens, 1),
        "launched": trainer.launched,
        "seen": trainer.seen(),
    }


def _held_out(trainer: Trainer, experiment: Experiment, corpus: Corpus) -> float:
    """Nats a byte."""
    total = 0.0
    with trainer.testing():
        tokens, targets = corpus.held_out_windows(experiment.held_out, experiment.length)
        parts = (torch.split(x, experiment.batch) for x in (tokens, targets))
        for rows, wanted in zip(*parts, strict=True):
            total += float(trainer.model(rows, targets=wanted)) * len(rows)
    return total / experiment.held_out


def _report(args: argparse.Namespace, experiment: Experiment) -> int:
    """Rows from --rows join those on record; tables and pictures are made of all. Rows of --small
    are for a page of --small."""
    fresh = [x for x in read_rows(args.rows) if args.small or not x.get("small")]
    # what has no corpus is another script's
    runs = [x for x in fresh if "corpus" in x and not x.get("search")]
    rows = {_key(row): row for row in (*_recorded(RECORD), *runs)}
    _record(RECORD, [rows[key] for key in sorted(rows)])
    speeds = speed_page.merged(_recorded(SPEEDS), [row for row in fresh if row.get("speed")])
    _record(SPEEDS, speeds)
    put(PAGE, "speed", speed_page.page(speeds))
    shown = [x for x in rows.values() if x["steps"] == experiment.steps]
    put(PAGE, "text", page(shown))
    if shown:
        replace_file(RECORD.parent / "text.svg", pictured(shown))
    return 0


def _recorded(path: Path) -> list[Row]:
    found: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    return found


def _record(path: Path, rows: Sequence[Row]) -> None:
    if rows:
        replace_file(path, json.dumps({"rows": rows}, separators=(",", ":")) + "\n")


def _key(row: Row) -> tuple[Any, ...]:
    return row["corpus"]["digest"], row["model"], row["steps"], row["launched"] == "graph"


if __name__ == "__main__":
    sys.exit(main())
