"""Where studies lie: a journal file, a database, or Optuna's proxy; and how one is opened."""

from __future__ import annotations

import os
import socket
import warnings
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import optuna
from optuna.storages import journal

from gdn2gen.errors import TuneError

_STARTUP_TRIALS: Final = 8
# Between asking for a trial and signing it lie milliseconds.
_UNSIGNED: Final = timedelta(minutes=1)


def open_storage(storage: str | Path | optuna.storages.BaseStorage) -> optuna.storages.BaseStorage:
    """Optuna storage at a URL, or in the journal file of that path; TuneError if neither opens.

    The journal takes 12 times less time per trial than SQLite, and one file serves several
    processes. Several hosts want the URL of a database server (0.3 s a trial on PostgreSQL), or
    `grpc://host:port` of an Optuna proxy (`optuna.storages.run_grpc_proxy_server`).
    """
    if isinstance(storage, optuna.storages.BaseStorage):
        return storage
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if str(storage).startswith("grpc://"):
            address = urlsplit(str(storage))
            return optuna.storages.GrpcStorageProxy(
                host=address.hostname or "localhost", port=address.port or 13000
            )
        if "://" in str(storage):
            return optuna.storages.RDBStorage(str(storage))
        return _open_journal(Path(storage).expanduser().resolve())
    except Exception as error:
        raise TuneError(
            f"the study storage {storage} cannot be opened ({type(error).__name__}: {error}); give "
            "another one, or move the file away to start afresh"
        ) from error


def _open_journal(path: Path) -> optuna.storages.BaseStorage:
    """Open a journal, without the torn last line that a kill in mid-write leaves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    lock = journal.JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
    finally:
        lock.release()
    return optuna.storages.JournalStorage(journal.JournalFileBackend(str(path)))


def open_study(
    storage: optuna.storages.BaseStorage, name: str, seed: int
) -> optuna.study.Study:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=_STARTUP_TRIALS,
            multivariate=True,
            group=True,
            constant_liar=True,
            seed=seed,
        )
        return optuna.create_study(
            storage=storage, sampler=sampler, study_name=name, load_if_exists=True
        )


def owner() -> str:
    """Signs a trial: which process of which host asked for it."""
    return f"{socket.gethostname()}:{os.getpid()}"


def is_gone(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether the process that asked for a trial ended; of another host it is not known."""
    signed: str | None = trial.user_attrs.get("owner")
    if signed is None:
        started = trial.datetime_start
        return started is None or datetime.now() - started > _UNSIGNED
    host, _, pid = signed.rpartition(":")
    if host != socket.gethostname():
        return False
    if int(pid) == os.getpid():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
