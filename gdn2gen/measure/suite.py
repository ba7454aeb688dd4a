"""The accuracy suite, for the present GPU or Triton's interpreter.

Cases run in worker processes, each one after another: a fault, an abort or a hang fails the case
that caused it, and a new worker goes on with the next one. Most of the time goes into compilers, so
several workers share a GPU; what fails beside others is run again alone, and that is what counts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from fnmatch import fnmatchcase
from queue import SimpleQueue
from threading import Lock
from typing import Final

from gdn2gen.base.environment import VERIFYING
from gdn2gen.base.errors import InputError
from gdn2gen.base.outcome import Outcome
from gdn2gen.base.terminal import Sheet
from gdn2gen.base.worker import Worker
from gdn2gen.family.decays import DecayPattern
from gdn2gen.family.mamba3_problem import HEAD_DIMS, STATE_SIZES
from gdn2gen.measure.case_runs import Result, run_case
from gdn2gen.measure.cases import CASES, Case, cases_drawn, cases_of
from gdn2gen.measure.mamba3_cases import MAMBA3_CASES, Mamba3Case, mamba3_cases_of
from gdn2gen.measure.mamba3_runs import run_mamba3_case
from gdn2gen.store.verified import Place

# A case compiles up to seven kernels, some of which take 20 s each where nothing is cached.
TIMEOUT_S: Final = 600.0
# Beside each other: they wait for compilers. The fp64 reference takes 120 KB a token and head, 1 GB
# of the largest case; what more there is for each is a margin, and not measured.
MOST_WORKERS: Final = 8
_BYTES_OF_WORKER: Final = 12 * 2**30

AnyCase = Case | Mamba3Case


def _entry(case: AnyCase) -> str:
    """What a worker calls for it."""
    run = run_mamba3_case if isinstance(case, Mamba3Case) else run_case
    return f"{run.__module__}:{run.__name__}"


def select_cases(
    patterns: Sequence[str],
    *,
    interpreter: bool,
    op: str | None = None,
    head_dim: tuple[int, int] | None = None,
    decays: DecayPattern | None = None,
) -> list[AnyCase]:
    """Cases for a GPU, or for the interpreter, whose names match one of the shell patterns.

    No patterns select all, no `op` those of all recurrences; those of K and V `head_dim`, those of
    trained gates' `decays`, or the suite's. Raises InputError if nothing is selected.
    """
    given = _cases_of(head_dim) if decays is None else cases_drawn(decays, op)
    cases = [
        case for case in given if case.interpreter == interpreter and op in (None, case.problem.op)
    ]
    chosen = [
        case
        for case in cases
        if not patterns or any(fnmatchcase(case.name, pattern) for pattern in patterns)
    ]
    if not chosen:
        names = [case.name for case in cases]
        near = [x for pattern in patterns for x in _near(pattern, names)]
        raise InputError(
            f"no case matches {', '.join(map(repr, patterns))}; there are {len(names)}, such as "
            f"{', '.join(dict.fromkeys(near or names[:4])) or 'none'}: `gdn2gen verify --list` "
            "prints them, and shell patterns choose among them"
        )
    return chosen


def _near(pattern: str, names: Sequence[str]) -> Sequence[str]:
    """Some names that have what a shell pattern spells out, or else are like it."""
    bare = pattern.strip("*?")
    return [x for x in names if bare and bare in x][:4] or get_close_matches(bare, names, n=4)


def _cases_of(head_dim: tuple[int, int] | None) -> tuple[AnyCase, ...]:
    """The whole suite, or that of one pair of head dims, which Mamba-3's tiles need not serve."""
    if head_dim is None:
        return (*CASES, *MAMBA3_CASES)
    K, V = head_dim
    served = K in STATE_SIZES and V in HEAD_DIMS
    return (*cases_of(K, V), *(mamba3_cases_of(K, V) if served else ()))


def verify(
    patterns: Sequence[str] = (),
    *,
    interpreter: bool,
    op: str | None = None,
    head_dim: tuple[int, int] | None = None,
    decays: DecayPattern | None = None,
    on_result: Callable[[Result], None] | None = None,
    timeout_s: float = TIMEOUT_S,
    workers: int | None = None,
) -> list[Result]:
    """Run the cases that `select_cases` selects, in its order; raises InputError if there is none.

    `on_result` is given each result as it comes, both of a case that is run again. `workers`:
    processes that run cases; None for one to two cores, as far as the GPU's memory goes.
    """
    cases = select_cases(patterns, interpreter=interpreter, op=op, head_dim=head_dim, decays=decays)
    device = "cpu" if interpreter else "cuda"
    count = min(workers or _workers(device), len(cases))
    lock, given = Lock(), on_result or (lambda _: None)

    def tell(result: Result) -> None:
        with lock:
            given(result)

    found = {x.name: x for x in _run(cases, device, count, timeout_s, tell)}
    again = [x for x in cases if not found[x.name].passed] if count > 1 else []
    found |= {x.name: x for x in _run(again, device, 1, timeout_s, tell)}
    return [found[x.name] for x in cases]


def _workers(device: str) -> int:
    most = min(MOST_WORKERS, (os.cpu_count() or 1) // 2)
    if device == "cuda":
        import torch

        most = min(most, torch.cuda.mem_get_info()[0] // _BYTES_OF_WORKER)
    return max(1, most)


def _run(
    cases: Sequence[AnyCase],
    device: str,
    count: int,
    timeout_s: float,
    tell: Callable[[Result], None],
) -> list[Result]:
    """Results of the cases, each told as it comes, by `count` workers."""
    interpret = "1" if device == "cpu" else "0"
    pool = [
        Worker({"TRITON_INTERPRET": interpret, "GDN2GEN_UNVERIFIED": VERIFYING})
        for _ in range(count)
    ]
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in pool:
        free.put(worker)

    def run(case: AnyCase) -> Result:
        worker = free.get()
        try:
            outcome: Outcome[Result] = worker.call(_entry(case), case, device, timeout=timeout_s)
        finally:
            free.put(worker)
        found = outcome.value
        if found is None:
            found = Result(case.name, case.check, passed=False, message=outcome.reason)
        tell(found)
        return found

    threads = ThreadPoolExecutor(count)
    try:
        return list(threads.map(run, cases))
    finally:
        for worker in pool:
            worker.close()
        threads.shutdown(cancel_futures=True)


def verdicts(suite: Sequence[AnyCase], results: Sequence[Result]) -> tuple[set[Place], set[Place]]:
    """Where all that the suite has passed, and where something failed."""
    passed = {result.name for result in results if result.passed}
    failed = {result.name for result in results if not result.passed}
    places = {x.name: _place_of(x) for x in suite}
    wanting = {place for name, place in places.items() if name not in passed}
    failing = {place for name, place in places.items() if name in failed}
    return set(places.values()) - wanting, failing


def less_than_their_own(suite: Sequence[AnyCase], places: Collection[Place]) -> list[Place]:
    """Those of which the suite has fewer cases than that of their head dims alone: what failed in
    that one may not even be asked here."""
    counts = Counter(map(_place_of, suite))
    own = {dims: Counter(map(_place_of, _on_a_gpu(*dims))) for dims in {(x.K, x.V) for x in places}}
    return [x for x in places if counts[x] < own[x.K, x.V][x]]


def _on_a_gpu(K: int, V: int) -> list[AnyCase]:
    return [x for x in _cases_of((K, V)) if not x.interpreter]


def _place_of(case: AnyCase) -> Place:
    return Place.of(case.problem)._replace(op=case.op)


def results_table(results: Sequence[Result]) -> Sheet:
    """One line per case: its check, the error nearest to its limit, that limit, and the verdict."""
    from rich.text import Text

    table = Sheet(
        "Accuracy: relative error against the fp64 reference",
        ("case", "check", "worst", "error", "limit", "s", "verdict"),
        words=("case", "check", "worst", "verdict"),
    )
    for result in results:
        worst = result.worst
        name, error = ("", "") if worst is None else (worst[0], f"{worst[1]:.1e}")
        limit = f"{worst[2]:.1e}" if worst is not None and worst[2] else ""
        verdict = Text("ok") if result.passed else Text("FAILED", style="red")
        seconds = f"{result.seconds:.1f}"
        table.add(result.name, result.check, name, error, limit, seconds, verdict)
    return table
