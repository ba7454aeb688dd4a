"""Every fault costs its trial alone: templates broken on purpose, real workers, a real GPU.

The same with a fake device: test_worker.py, test_study.py and test_joined.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Final

import optuna
import pytest
from fault_templates import BrokenBackend, broken_package, dyadic_prepare, environment
from optuna.trial import FrozenTrial, TrialState

from gdn2gen.base import outcome
from gdn2gen.base.device import present_device
from gdn2gen.base.outcome import Outcome
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.check import CheckResult
from gdn2gen.store import tuned_files
from gdn2gen.tuning.records.ledger import read_ledger
from gdn2gen.tuning.records.places import open_ledger, storage_path
from gdn2gen.tuning.records.storage import open_storage

# beside a kernel that hangs, others get the GPU by turns, and late
pytestmark = [pytest.mark.gpu, pytest.mark.gpu_alone]

PROBLEM: Final = Problem(K=64, V=64)
SOUND: Final = Recipe.default(PROBLEM, "lean")
# maxnreg of a dyadic prepare -> what is wrong with it
FAULTS: Final[dict[Knob, str]] = {
    80: "illegal access",
    128: "hang",
    168: "out of memory",
    208: "abort in the compiler",
}
# Forms of prepare that a search tries first, so that it meets both faults within a minute.
BROKEN_FORMS: Final[dict[Knob, str]] = {"log": "illegal access", "tree": "abort in the compiler"}
# The worker is warm and the kernels are compiled: a check takes a second, and the hang a minute.
HANG_SECONDS: Final = 15.0
# A check with the hang is in its kernel by then.
UNDER_WAY_SECONDS: Final = 5.0


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokenBackend]:
    package = broken_package(tmp_path_factory.mktemp("broken"), "maxnreg", FAULTS)
    backend = BrokenBackend(present_device(), package)
    try:
        faulty = [broken(x) for x in FAULTS.values() if x != "abort in the compiler"]
        compiles = [backend.compile(PROBLEM, config) for config in (*SOUND.configs, *faulty)]
        for compiled in compiles:
            assert compiled.result().ok, compiled.result().reason
        yield backend
    finally:
        backend.close()


def broken(fault: str) -> Config:
    (maxnreg,) = [value for value, name in FAULTS.items() if name == fault]
    return dyadic_prepare(PROBLEM, maxnreg=maxnreg)


def check_of(backend: BrokenBackend, fault: str) -> Outcome[CheckResult]:
    return backend.check(SOUND.with_config(broken(fault)), full=False)


def check_sound(backend: BrokenBackend) -> None:
    """A trial without a fault passes; before a fault, so that its check finds a warm worker."""
    checked = backend.check(SOUND, full=False)
    assert checked.ok, checked.reason
    assert checked.get().ok, checked.get().reason


def test_an_illegal_access_costs_one_trial(backend: BrokenBackend) -> None:
    """The process goes with it, for nothing runs any more in its context."""
    check_sound(backend)
    starts = backend.worker.starts
    failed = check_of(backend, "illegal access")
    assert failed.status == outcome.CUDA_ERROR, failed.reason
    assert "illegal memory access" in failed.reason
    check_sound(backend)
    assert backend.worker.starts == starts + 1


def test_memory_that_is_not_there_costs_one_trial_and_no_process(backend: BrokenBackend) -> None:
    check_sound(backend)
    starts = backend.worker.starts
    failed = check_of(backend, "out of memory")
    assert failed.status == outcome.OUT_OF_MEMORY, failed.reason
    check_sound(backend)
    assert backend.worker.starts == starts


def test_a_hang_costs_one_trial(backend: BrokenBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends at the time limit, not with the kernel, which spins for a minute."""
    check_sound(backend)
    started = time.monotonic()
    with monkeypatch.context() as shorter:
        shorter.setattr("gdn2gen.tuning.gpu.backend.GATE_SECONDS", HANG_SECONDS)
        failed = check_of(backend, "hang")
    assert failed.status == outcome.TIMEOUT, failed.reason
    assert time.monotonic() - started < HANG_SECONDS + 20
    check_sound(backend)


def test_a_killed_worker_costs_one_trial(backend: BrokenBackend) -> None:
    """kill -9 in the middle of a check: of the one that hangs, which is sure to be under way."""
    check_sound(backend)
    process = backend.worker._process
    assert process is not None
    killer = threading.Timer(UNDER_WAY_SECONDS, process.kill)
    killer.start()
    failed = check_of(backend, "hang")
    killer.join()
    assert failed.status == outcome.CRASHED, failed.reason
    assert "signal 9" in failed.reason
    check_sound(backend)


def test_an_abort_in_the_compiler_costs_one_compile(backend: BrokenBackend) -> None:
    """LLVM aborts the process that it runs in; what compiles beside it, and after it, goes on."""
    crash = backend.compile(PROBLEM, broken("abort in the compiler"))
    others = [backend.compile(PROBLEM, config) for config in SOUND.configs]
    assert crash.result().status == outcome.CRASHED, crash.result().reason
    assert "signal 6" in crash.result().reason and "LLVM ERROR" in crash.result().reason
    others += [backend.compile(PROBLEM, config) for config in SOUND.configs]
    assert [x.result().reason for x in others if not x.result().ok] == []


def test_a_killed_tune_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of a tuner that has met an illegal access and an abort; the next one decides.

    Of what was finished nothing is lost or measured again; what was in flight is taken over; the
    broken forms are in the ledger, each with its reason, and not in the entry.
    """
    package, device = broken_package(tmp_path, "decay", BROKEN_FORMS), present_device()
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", environment(package)["GDN2GEN_CACHE_DIR"])
    storage, ledger = storage_path("gdn2", device), open_ledger("gdn2", device).path
    met = {("log", outcome.CUDA_ERROR), ("tree", outcome.CRASHED)}
    first = start_tune(package, minutes=3.0)
    try:
        wait_for(lambda: met <= refused(ledger) and len(searched(storage)) >= 3, first)
        workers = children(first.pid)
    finally:
        first.kill()
        first.wait()
    assert workers
    wait_for(lambda: not any(is_alive(pid) for pid in workers))
    done = trials(storage, TrialState.COMPLETE)

    second = start_tune(package, minutes=0.5)
    assert second.wait(300) == 0, said(package)
    after = trials(storage, TrialState.COMPLETE)
    assert {key: x.value for key, x in done.items()} == {key: after[key].value for key in done}
    configs = [(study, *sorted(x.params.items())) for (study, _), x in after.items()]
    assert len(configs) == len({*configs})
    # of the default chunk size, which every run searches; of the others in flight may be left
    running = trials(storage, TrialState.RUNNING).items()
    assert [x for (study, _), x in running if "/BT32/" in study and "owner" in x.user_attrs] == []
    assert met <= refused(ledger)
    prepared = [x for (study, _), x in after.items() if "/prepare/" in study]
    assert prepared and not {x.params["decay"] for x in prepared} & BROKEN_FORMS.keys()
    file = tuned_files.load_tuned(tuned_files.tuned_path(package / "filed", "gdn2", device), device)
    assert file is not None
    assert file.entries and len(file.entries) == 1 + len(tuned_files.stand_ins(file.entries))
    for entry in file.entries:
        assert entry.provenance == "measured"
        assert entry.configs["prepare"]["decay"] not in BROKEN_FORMS


def start_tune(package: Path, minutes: float) -> subprocess.Popen[bytes]:
    """`gdn2gen tune` of a small shape, with the templates of `package`."""
    options = {
        "--op": "gdn2",
        "--head-dim": "64",
        "--shapes": "2x1024x8",
        "--level": "lean",
        "--budget": str(minutes),
        "--out": str(package / "filed"),
    }
    inherited = {name: x for name, x in os.environ.items() if name != "GDN2GEN_TUNED_DIR"}
    with (package / "said").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "gdn2gen", "tune", *chain.from_iterable(options.items())],
            env=inherited | environment(package),
            stdout=log,
            stderr=log,
        )


def said(package: Path) -> str:
    return (package / "said").read_text(errors="replace")[-3000:]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until `condition` holds, while `process` runs; at most three minutes."""
    end = time.monotonic() + 180
    while not condition():
        assert process is None or process.poll() is None, "the tuner ended before it was killed"
        assert time.monotonic() < end, "three minutes were not enough"
        time.sleep(0.5)


def trials(storage: Path, *states: TrialState) -> dict[tuple[str, int], FrozenTrial]:
    """Trials in these states, by the name of their study and their number."""
    opened = open_storage(storage)
    names = optuna.get_all_study_names(opened)
    studies = [optuna.load_study(study_name=name, storage=opened) for name in names]
    return {
        (study.study_name, x.number): x
        for study in studies
        for x in study.get_trials(deepcopy=False, states=states)
    }


def searched(storage: Path) -> list[FrozenTrial]:
    """Completed trials that the search asked for: those of defaults have no owner."""
    found = trials(storage, TrialState.COMPLETE).values()
    return [x for x in found if "owner" in x.user_attrs]


def refused(ledger: Path) -> set[tuple[Knob, str]]:
    """The decay of each prepare that was refused, with the status."""
    found = [x for x in read_ledger(ledger) if x.stage == "prepare"]
    return {(x.config["decay"], x.reason.partition(":")[0]) for x in found}


def children(parent: int) -> list[int]:
    statuses = Path("/proc").glob("[0-9]*/status")
    return [int(x.parent.name) for x in statuses if f"PPid:\t{parent}\n" in read(x)]


def is_alive(pid: int) -> bool:
    """Neither gone nor a zombie, which an orphan stays where nobody reaps it."""
    status = read(Path(f"/proc/{pid}/status"))
    return bool(status) and "State:\tZ" not in status


def read(path: Path) -> str:
    """A file of a process, which may be gone; empty then."""
    try:
        return path.read_text()
    except OSError:
        return ""
