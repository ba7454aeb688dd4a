"""What came of each run, in a file of its own: what is there is not run again.

A row is written at one stroke when its run is over. Whatever ends a command before that costs the
runs that were under way, and the same command goes on with what is still wanting.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import torch

from gdn2gen.base.device import has_gpu, toolchain
from gdn2gen.base.environment import VERIFYING
from gdn2gen.base.files import check_replaceable, replace_file
from gdn2gen.base.outcome import Outcome
from gdn2gen.base.terminal import console, plain
from gdn2gen.base.worker import Worker

SCRIPTS: Final = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
_GRACE: Final = 100.0
_WEEK: Final = 7 * 24 * 60


def path_of(folder: Path, *words: object) -> Path:
    """The file of a run that these words tell from all others."""
    name = "_".join(str(x) for x in words)
    return folder / f"{name.replace(':', '-').replace('/', '-')}.json"


def write_row(path: Path, row: Mapping[str, Any]) -> None:
    replace_file(path, json.dumps({**row, "machine": machine()}, indent=None) + "\n")


def read_row(path: Path) -> Row | None:
    """None where there is none, or no row in it: such a file is named, and its run made again."""
    if not path.exists():
        return None
    try:
        row: Row = json.loads(path.read_bytes())
        if not isinstance(row, dict) or not isinstance(row.get("machine"), dict):
            raise ValueError("no machine is named in it")
    except ValueError as error:
        warnings.warn(f"{path} holds no row of a run ({error}): it does not count", stacklevel=2)
        return None
    return row


def read_rows(folder: Path) -> list[Row]:
    found = map(read_row, sorted(folder.glob("*.json")))
    return [row for row in found if row is not None]


def folder_of_rows(word: str) -> Path:
    """An option's folder, which may have to be made."""
    folder = Path(word)
    if folder.exists() and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{word} is a file, and rows want a folder")
    return folder


def at_least_one(word: str) -> int:
    """An option's whole number."""
    try:
        number = int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, but is {word}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {word}")
    return number


def minutes(word: str) -> float:
    """An option's time, of a week at most: a process is not waited for without an end."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 <= number <= _WEEK:
        raise argparse.ArgumentTypeError(f"must be from 0 to {_WEEK}, but is {word}")
    return number


def refused(folder: Path) -> str | None:
    """Why no row can be written there, before any run is made that would be lost; None if one can.
    Makes the folder."""
    try:
        check_replaceable(folder / "row.json")
    except OSError as error:
        return f"no row can be written: {error}"
    return None


def machine() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if has_gpu() else "CPU"
    return {"device": name, "date": time.strftime("%Y-%m-%d"), **dict(toolchain())}


def environment() -> dict[str, str]:
    """Of processes that run targets of this folder."""
    # what is on the path here stays on it: packages may lie in a folder that is named nowhere else
    paths = [str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "GDN2GEN_UNVERIFIED": VERIFYING,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def share(
    target: str, jobs: Sequence[tuple[str, Row]], processes: int, minutes: float
) -> list[str]:
    """Run `module:function` of this folder with each job, in processes that may die alone.

    After `minutes` no job begins, and those under way end by themselves (each has the time in
    `until`) or are ended `_GRACE` seconds later. Returns what failed, and why.
    """
    until = time.time() + 60 * minutes
    free: SimpleQueue[Worker] = SimpleQueue()
    workers = [Worker(environment()) for _ in range(min(processes, max(1, len(jobs))))]
    for worker in workers:
        free.put(worker)
    out = console()

    def run(job: tuple[str, Row]) -> str | None:
        name, given = job
        worker = free.get()
        try:
            left = until - time.time()
            if left <= 0:
                return f"{name}: no time left"
            outcome: Outcome[str] = worker.call(
                target, {**given, "until": until}, timeout=left + _GRACE
            )
        finally:
            free.put(worker)
        out.print(plain(f"{name}: {outcome.value if outcome.ok else outcome.reason}"))
        sys.stdout.flush()
        return None if outcome.ok else f"{name}: {outcome.reason}"

    threads = ThreadPoolExecutor(len(workers))
    try:
        return [x for x in threads.map(run, jobs) if x]
    finally:
        for worker in workers:
            worker.close()
        threads.shutdown(cancel_futures=True)
