"""Several processes in one study: on a journal file, and on a PostgreSQL server."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import optuna
import pytest
from joined_tune import join
from optuna.trial import TrialState
from source_tree import ROOT

from gdn2gen.base.device import named_device
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import SHAPES
from gdn2gen.store import tuned_files
from gdn2gen.tuning import space
from gdn2gen.tuning.records import storage as tune_storage
from gdn2gen.tuning.records.places import open_ledger
from gdn2gen.tuning.records.storage import open_storage
from gdn2gen.tuning.search import trials as tune_trials
from gdn2gen.tuning.search.trials import StageTrials

DEVICE = named_device("H200")
# run time in seconds, and trials after which one is killed: a server takes 0.3 s for a trial; on a
# journal one process alone on two busy cores ends some 40 in 4 s
PACE = {"journal": (8.0, 20), "postgres": (14.0, 12)}


@pytest.fixture
def journal(tmp_path: Path) -> str:
    return str(tmp_path / "study.journal")


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of its own, on a socket in a folder of its own."""
    pytest.importorskip("psycopg2")
    programs = shutil.which("initdb") or next(
        iter(sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))), None
    )
    if programs is None:
        pytest.skip("no PostgreSQL server is installed")
    programs = Path(programs).resolve().parent
    # short, for a socket's path has at most 107 characters; not under a folder of root's alone
    folder = Path(f"/tmp/gdn2gen-pg-{os.getpid()}")
    folder.mkdir()
    user = None
    if os.getuid() == 0:  # the server refuses to run as root
        user = "postgres"
        shutil.chown(folder, user)
    try:
        data = folder / "data"
        subprocess.run(
            [programs / "initdb", "-U", "gdn2gen", "-A", "trust", "--no-sync", "-D", data],
            check=True,
            capture_output=True,
            user=user,
            cwd=folder,
        )
        server = subprocess.Popen(
            [programs / "postgres", "-D", data, "-k", folder, "-h", "", "-F"],
            stderr=subprocess.DEVNULL,
            user=user,
            cwd=folder,
        )
        try:
            ready = [programs / "pg_isready", "-h", folder, "-U", "gdn2gen"]
            for _ in range(100):
                if subprocess.run(ready, capture_output=True, check=False).returncode == 0:
                    break
                time.sleep(0.1)
            yield f"postgresql+psycopg2://gdn2gen@/postgres?host={folder}"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(20)
    finally:
        shutil.rmtree(folder)


def start(storage: str, folder: Path, seconds: float) -> BaseProcess:
    """Forked: to import what it needs takes a process 5 s, and there are four."""
    forked = multiprocessing.get_context("fork")
    process = forked.Process(target=_joined, args=(storage, folder, seconds))
    process.start()
    return process


def _joined(storage: str, folder: Path, seconds: float) -> None:
    os.environ["GDN2GEN_CACHE_DIR"] = str(folder / "cache")
    timed = join(storage, folder / "tuned", seconds)
    (folder / f"{os.getpid()}.json").write_text(json.dumps(timed))


def ended(process: BaseProcess) -> int | None:
    process.join(120)
    return process.exitcode


def trials(storage: str, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
    opened = open_storage(storage)
    names = optuna.study.get_all_study_names(opened)
    studies = [optuna.load_study(study_name=name, storage=opened) for name in names]
    return [x for study in studies for x in study.get_trials(deepcopy=False, states=states)]


def wait_for(storage: str, count: int) -> None:
    """Wait until the processes together have finished that many trials."""
    for _ in range(1200):
        time.sleep(0.1)
        try:
            if len(trials(storage, TrialState.COMPLETE)) >= count:
                return
        except Exception:  # the tables are only being made
            continue
    raise AssertionError("no trials within 120 s")


def test_a_study_behind_optunas_proxy(journal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc")
    monkeypatch.setattr(tune_storage, "_PROXY_SECONDS", 60.0)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = (
        "import optuna; from gdn2gen.tuning.records.storage import open_storage; "
        f"optuna.storages.run_grpc_proxy_server(open_storage({journal!r}), port={port})"
    )
    server = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", optuna.exceptions.ExperimentalWarning)
            proxy = open_storage(f"grpc://localhost:{port}")
        optuna.create_study(storage=proxy, study_name="one").add_trial(
            optuna.trial.create_trial(value=1.0)
        )
        assert [x.value for x in trials(journal, TrialState.COMPLETE)] == [1.0]
    finally:
        server.kill()
        server.wait()


def test_what_another_process_is_at_is_not_proposed(tmp_path, monkeypatch) -> None:
    """Unless it ended: then what it was at is left over."""
    storage = open_storage(str(tmp_path / "study.journal"))
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path))

    def join() -> StageTrials:
        return StageTrials(
            Problem(), "sum_decay", 32, [SHAPES["train4k"]], DEVICE,
            open_ledger("gdn2", DEVICE), "digest", storage
        )  # fmt: skip

    def ask(joined: StageTrials, name: str, most: int) -> set[str]:
        monkeypatch.setattr(tune_trials, "owner", lambda: f"{name}:1")
        proposals = (joined.propose() for _ in range(most))
        return {str(x.config) for x in proposals if x is not None}

    first, second = join(), join()
    valid = {str(x) for x in space.valid_configs("sum_decay", Problem(), DEVICE, 32)}
    at_one = ask(first, "one", 4)
    at_other = ask(second, "other", len(valid))
    assert len(at_one) == 4 and not at_one & at_other
    assert at_one | at_other == valid
    monkeypatch.setattr(tune_trials, "is_gone", lambda trial: trial.user_attrs["owner"] == "one:1")
    assert ask(join(), "third", len(valid)) == at_one


@pytest.mark.parametrize("kind", ["journal", pytest.param("postgres", marks=pytest.mark.slow)])
def test_processes_join_one_study_and_survive_a_kill(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    storage: str = request.getfixturevalue(kind)
    seconds, count = PACE[kind]
    processes = [start(storage, tmp_path, seconds) for _ in range(3)]
    wait_for(storage, count)
    processes[0].kill()
    assert ended(processes[0]) == -signal.SIGKILL
    timed = []
    for process in processes[1:]:
        assert ended(process) == 0
        timed.append(json.loads((tmp_path / f"{process.pid}.json").read_text()))
    # what one has timed the other does not time again, but for what both were at just then
    both = set(timed[0]) & set(timed[1])
    assert len(both) <= max(3, 0.2 * len(set(timed[0]) | set(timed[1])))
    file = tuned_files.load_tuned(tuned_files.tuned_path(tmp_path / "tuned", "gdn2", DEVICE))
    assert file is not None
    for entry in file.entries:
        assert entry.provenance == "measured" and not tuned_files.is_stale(entry)
    # one, and if it needs TileLang the best that does not beside it
    assert len(file.entries) == 1 + len(tuned_files.stand_ins(file.entries))
    # the next run takes over what the killed one was at, and knows all that the others found
    done = len(trials(storage, TrialState.COMPLETE))
    left = {x.user_attrs.get("owner") for x in trials(storage, TrialState.RUNNING)} - {None}
    assert all(str(owner).endswith(f":{processes[0].pid}") for owner in left)
    # in time enough to get to every chunk size: what was begun at one is only seen from there
    last = start(storage, tmp_path, 2 * seconds)
    assert ended(last) == 0
    # a trial without an owner may still be one that somebody is about to sign
    assert [x for x in trials(storage, TrialState.RUNNING) if "owner" in x.user_attrs] == []
    assert len(trials(storage, TrialState.COMPLETE)) > done
