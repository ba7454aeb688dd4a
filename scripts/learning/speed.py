"""Tokens a second of each mixer, ours beside a peer's kernels: short runs, in turns.

Every model trains in a process of its own, so that one which dies takes no other along. They get
ready at the same time, for what takes long then is compilers, who want cores and not the GPU. Then
one mixer after the other is timed, ours and the peer's in turns of a few steps, while all others
wait: a turn is what a block of `text.py train` is, from a GPU at rest, data and steps, to a GPU at
rest. Turns that differ show what the host does beside it.

Data are bytes drawn at random: what a step takes does not depend on them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from gdn2gen.base.environment import verifying
from gdn2gen.base.outcome import Outcome
from gdn2gen.base.terminal import console, plain
from gdn2gen.base.worker import Worker
from learning.autotuning import Searched, searching
from learning.models import MIXERS, PEERS, build, member_of, parameters
from learning.rows import Row, environment, path_of, read_row, write_row
from learning.speed_page import tokens_a_second
from learning.text_plan import FULL, SMALL, Experiment, sizes_of
from learning.training import WARM, Schedule, Trainer, train_block

TURNS: Final = 6
# Of a mixer's turns, with those that are not timed: kept for them while models get ready.
_TURNS_SECONDS: Final = 12.0
_GRACE: Final = 20.0


def measure(
    models: Sequence[str], job: Row, rows: Path, minutes: float, *, steps: int
) -> dict[str, str]:
    """Measure the mixers of `models`, and write a row for each model; which failed, and why.

    A mixer whose rows are all there is left out; where one failed, all of it is measured again.
    `job`: small, graphs. After `minutes` no mixer begins.
    """
    until = time.monotonic() + 60 * minutes
    job = {**job, "rows": str(rows.resolve()), "turn": -(-steps // TURNS)}
    wanted = [pair for pair in pairs(models) if any(_lacks(rows, job, x) for x in pair)]
    names = [x for pair in wanted for x in pair]
    peers = sum(x in PEERS for x in names)
    job["threads"] = -(-(os.cpu_count() or 1) // max(1, peers))
    rows.mkdir(parents=True, exist_ok=True)
    with _processes(names) as sides:
        ready = until - _TURNS_SECONDS * len(wanted)
        with ThreadPoolExecutor(max(1, len(names))) as threads:
            [*threads.map(lambda side: side.prepare(job, ready), sides.values())]
        for pair in wanted:
            _measure_pair([sides[x] for x in pair], job, rows, until)
    return {x.model: x.failed for x in sides.values() if x.failed}


def pairs(models: Sequence[str]) -> list[list[str]]:
    """Ours and the peers' of each mixer."""
    found = [[x for x in (*MIXERS, *PEERS) if x in models and member_of(x) == y] for y in MIXERS]
    return [pair for pair in found if pair]


def _path(rows: Path, job: Row, model: str) -> Path:
    how = ["small"] * job["small"] + ["graphs"] * job["graphs"]
    return path_of(rows, "speed", model, f"steps{TURNS * job['turn']}", *how)


def _lacks(rows: Path, job: Row, model: str) -> bool:
    row = read_row(_path(rows, job, model))
    return row is None or row.get("failed", "no such word") is not None


class Side:
    """A model in its process, and how it fares."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.failed: str | None = None
        self.found: Row = {}
        self.turns: list[Row] = []
        # or Triton keeps those of flash-linear-attention alone, and a second run searches again
        self._worker = Worker({**environment(), "TRITON_CACHE_AUTOTUNING": "1"})

    def prepare(self, job: Row, until: float) -> None:
        if time.monotonic() > until:
            self.failed = "no time left"
            return
        found = self._call("prepare", job, until)
        self.found = found or {}
        if found is not None:
            say(f"{self.model}: ready after {found['ready']:.0f} s")

    def turn(self, job: Row, until: float, *, counts: bool = True) -> None:
        found = self._call("turn", job, until + _GRACE)
        if found is not None and counts:
            self.turns.append(found)

    def _call(self, what: str, job: Row, until: float) -> Row | None:
        left = max(1.0, until - time.monotonic())
        given = {**job, "model": self.model}
        outcome: Outcome[Row] = self._worker.call(f"{__name__}:{what}", given, timeout=left)
        if outcome.ok:
            return outcome.get()
        self.failed = outcome.reason
        say(f"{self.model}: {self.failed}")
        return None

    def row(self, job: Row, at: float) -> Row:
        last = self.turns[-1] if self.turns else {}
        peaks = [x["peak_mib"] for x in self.turns if x["peak_mib"] is not None]
        return {
            "speed": True,
            "model": self.model,
            "failed": self.failed,
            "at": at,
            "turn": job["turn"],
            "small": job["small"],
            "graphs": job["graphs"],
            "seconds": [x["seconds"] for x in self.turns],
            "peak_mib": max(peaks, default=None),
            "loss": last.get("loss"),
            **self.found,
            "launched": last.get("launched", "graph" if job["graphs"] else "eager"),
        }

    def close(self) -> None:
        self._worker.close()


@contextmanager
def _processes(models: Sequence[str]) -> Iterator[dict[str, Side]]:
    sides = {x: Side(x) for x in models}
    try:
        yield sides
    finally:
        for side in sides.values():
            side.close()


def _measure_pair(sides: Sequence[Side], job: Row, rows: Path, until: float) -> None:
    """In turns, of which each side begins every second; the first of each is not timed."""
    for number in range(-1, TURNS):
        for side in sides if number % 2 else sides[::-1]:
            if side.failed is None and number < 0 and time.monotonic() > until:
                side.failed = "no time left"
            if side.failed is None:
                side.turn(job, until, counts=number >= 0)
    at = time.time()
    for side in sides:
        row = side.row(job, at)
        write_row(_path(rows, job, side.model), row)
        if side.failed is None:
            low, middle, high = tokens_a_second(row)
            say(f"{side.model}: {middle:,.0f} tokens/s ({low:,.0f} to {high:,.0f})")
        side.close()  # its memory is the others'


def say(words: str) -> None:
    console().print(plain(words))


# In a process of its own from here on.


@dataclass
class _Ready:
    trainer: Trainer
    blocks: int = 0


_ready: dict[str, _Ready] = {}


def prepare(job: Row) -> Row:
    """Build a model, and take its first steps: kernels compile, are searched and chosen."""
    started = time.perf_counter()
    experiment = SMALL if job["small"] else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, peer = job["model"], job["model"] in PEERS and device.type == "cuda"
    lock = Path(job["rows"]) / "search.lock"
    sizes = sizes_of(experiment, model)
    with verifying(), searching(job["threads"], lock) if peer else nullcontext(Searched()) as cost:
        trainer = Trainer(
            build(model, sizes, experiment.seed),
            _schedule(experiment, job["turn"]),
            lambda number: _random_bytes(experiment, job["turn"], number, device),
            device,
            graph=job["graphs"],
        )
        train_block([trainer], 0, WARM + 1)
    _ready[model] = _Ready(trainer)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # ten models wait on one GPU
    return {
        "tokens_per_step": experiment.batch * experiment.length,
        "parameters": parameters(trainer.model),
        "inner": sizes.inner,
        "ready": time.perf_counter() - started,
        "searched": vars(cost),
    }


def turn(job: Mapping[str, Any]) -> Row:
    """So many steps of the model that is ready, timed."""
    ready = _ready[job["model"]]
    trainer = ready.trainer
    ready.blocks += 1
    on_gpu = trainer.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with verifying():
        seconds = train_block([trainer], ready.blocks, job["turn"])
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    trainer.end_block(job["turn"], seconds)
    if trainer.diverged is not None:
        raise ArithmeticError(f"the loss is not finite at step {trainer.diverged}")
    return {
        "seconds": seconds,
        "peak_mib": peak,
        "loss": trainer.losses[-1][1],
        "launched": trainer.launched,
    }


def _schedule(experiment: Experiment, steps: int) -> Schedule:
    """Of more steps than are taken: it is never at its end, where the observatory looks."""
    most = WARM + 2 + (TURNS + 1) * steps
    return Schedule(most, experiment.rates[0], block=steps, look=most)


def _random_bytes(
    experiment: Experiment, steps: int, number: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(number)
    shape = (steps, experiment.batch, experiment.length + 1)
    drawn = torch.randint(experiment.sizes.vocabulary, shape, generator=generator, device=device)
    return drawn[..., :-1].contiguous(), drawn[..., 1:].contiguous()
