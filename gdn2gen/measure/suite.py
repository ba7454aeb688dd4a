"""The accuracy suite, for the present GPU or Triton's interpreter.

Cases run in a worker process, one after another: a fault, an abort or a hang fails the case that
caused it, and a new worker goes on with the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Final

from gdn2gen.base.environment import VERIFYING
from gdn2gen.base.errors import InputError
from gdn2gen.base.outcome import Outcome
from gdn2gen.base.terminal import Sheet
from gdn2gen.base.worker import Worker
from gdn2gen.measure.case_runs import Result, run_case
from gdn2gen.measure.cases import CASES, Case, cases_of
from gdn2gen.store.verified import Place

# A case compiles up to seven kernels, some of which take 20 s each where nothing is cached.
TIMEOUT_S: Final = 600.0
_RUN_CASE: Final = f"{run_case.__module__}:{run_case.__name__}"


def select_cases(
    patterns: Sequence[str],
    *,
    interpreter: bool,
    op: str | None = None,
    head_dim: tuple[int, int] | None = None,
) -> list[Case]:
    """Cases for a GPU, or for the interpreter, whose names match one of the shell patterns.

    No patterns select all, no `op` those of all recurrences; those of K and V `head_dim`, or the
    suite's. Raises InputError if nothing is selected.
    """
    given = CASES if head_dim is None else cases_of(*head_dim)
    cases = [
        case for case in given if case.interpreter == interpreter and op in (None, case.problem.op)
    ]
    chosen = [
        case
        for case in cases
        if not patterns or any(fnmatchcase(case.name, pattern) for pattern in patterns)
    ]
    if not chosen:
        raise InputError(
            f"no case matches {', '.join(map(repr, patterns))}; there are: "
            f"{', '.join(case.name for case in cases)}"
        )
    return chosen


def verify(
    patterns: Sequence[str] = (),
    *,
    interpreter: bool,
    op: str | None = None,
    head_dim: tuple[int, int] | None = None,
    on_result: Callable[[Result], None] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[Result]:
    """Run the cases that `select_cases` selects; raises InputError if there is none.

    `on_result` is given each result as it comes.
    """
    device = "cpu" if interpreter else "cuda"
    cases = select_cases(patterns, interpreter=interpreter, op=op, head_dim=head_dim)
    interpret = "1" if interpreter else "0"
    worker = Worker({"TRITON_INTERPRET": interpret, "GDN2GEN_UNVERIFIED": VERIFYING})
    results: list[Result] = []
    try:
        for case in cases:
            outcome: Outcome[Result] = worker.call(_RUN_CASE, case, device, timeout=timeout_s)
            result = outcome.value
            if result is None:
                result = Result(case.name, case.check, passed=False, message=outcome.reason)
            results.append(result)
            if on_result is not None:
                on_result(result)
    finally:
        worker.close()
    return results


def verdicts(suite: Sequence[Case], results: Sequence[Result]) -> tuple[set[Place], set[Place]]:
    """Where all that the suite has passed, and where something failed."""
    passed = {result.name for result in results if result.passed}
    failed = {result.name for result in results if not result.passed}
    places = {case.name: Place.of(case.problem) for case in suite}
    wanting = {place for name, place in places.items() if name not in passed}
    failing = {place for name, place in places.items() if name in failed}
    return set(places.values()) - wanting, failing


def results_table(results: Sequence[Result]) -> Sheet:
    """One line per case: its check, its worst error beside the limit, and the verdict."""
    from rich.text import Text

    table = Sheet(
        "Accuracy: relative error against the fp64 reference",
        ("case", "check", "worst", "error", "limit", "s", "verdict"),
        words=("case", "check", "worst", "verdict"),
    )
    for result in results:
        worst = result.worst
        name, error = ("", "") if worst is None else (worst[0], f"{worst[1]:.1e}")
        limit = f"{result.limit:.1e}" if result.limit else ""
        verdict = Text("ok") if result.passed else Text("FAILED", style="red")
        seconds = f"{result.seconds:.1f}"
        table.add(result.name, result.check, name, error, limit, seconds, verdict)
    return table
