"""The accuracy suite, and what it files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdn2gen.base import device as devices
from gdn2gen.base.errors import InputError
from gdn2gen.family.decays import DecayPattern
from gdn2gen.measure import suite
from gdn2gen.measure.case_runs import Result
from gdn2gen.store.verified import Place, check_fileable, file_found
from gdn2gen.workflows.tune import own_folder


@dataclass(frozen=True)
class Verified:
    """What the suite found, and what calls make of it."""

    results: list[Result]
    where: str
    """The GPU, or what stood in for one."""
    passed: frozenset[Place] = frozenset()
    """Where all of the suite has passed: calls run there."""
    failed: frozenset[Place] = frozenset()
    """Where something failed: calls are refused."""
    filed_in: Path | None = None
    """Where both were filed."""

    @property
    def ok(self) -> bool:
        return all(result.passed for result in self.results)


def verify(
    cases: str | Sequence[str] = (),
    *,
    op: str | None = None,
    head_dim: int | tuple[int, int] | None = None,
    decays: DecayPattern | None = None,
    interpreter: bool | None = None,
    workers: int | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> Verified:
    """Compare every output and gradient with the fp64 reference, as `gdn2gen verify` does.

    cases: names or shell patterns such as `bf16-*` (all). op: of one recurrence (all).
    head_dim: K, or K and V, whose suite runs alone, in every dtype.
    decays: those of trained gates instead, at their head dims (`nn.Observatory.pattern`); nothing
    is filed of them.
    interpreter: in Triton's interpreter, at small sizes (None: only where there is no GPU).
    workers: processes that run cases beside each other (None: one to two cores, at most 8, and as
    many as the GPU has 12 GB for).

    On a GPU what has passed and what failed is filed, and holds for later calls. Cases that fail
    raise nothing: see `Verified.ok`. Raises InputError where no case is selected, and for workers
    that are no number of processes.
    """
    if workers is not None and (type(workers) is not int or workers < 1):
        raise InputError(f"workers must be an int of at least 1, or None, but got {workers!r}")
    patterns = [cases] if isinstance(cases, str) else list(cases)
    interpret = not devices.has_gpu() if interpreter is None else interpreter
    dims = (head_dim, head_dim) if isinstance(head_dim, int) else head_dim
    if decays is not None and dims is not None:
        raise InputError(f"decays bring their own head dims, but got head_dim={head_dim}, too")
    if not interpret and decays is None:
        check_fileable(own_folder())
    options: dict[str, Any] = {
        "interpreter": interpret,
        "op": op,
        "head_dim": dims,
        "decays": decays,
        "on_result": on_result,
        "workers": workers,
    }
    results = suite.verify(patterns, **options)
    if interpret:
        return Verified(results, "Triton's interpreter, small sizes")
    device = devices.present_device()
    if decays is not None:
        return Verified(results, device.name)
    cases_there_are = suite.select_cases([], interpreter=False, op=op, head_dim=dims)
    passed, failed = suite.verdicts(cases_there_are, results)
    path = None
    if passed | failed:
        there, tools = own_folder(), devices.toolchain()
        words = ["gdn2gen verify", *(["--op", op] if op else [])]
        words += ["--head-dim", ",".join(map(str, dims))] if dims else []
        command = " ".join(words)
        few = suite.less_than_their_own(cases_there_are, passed)
        path = file_found(there, passed, failed, device, command=command, toolchain=tools, few=few)
    return Verified(results, device.name, frozenset(passed), frozenset(failed), path)
