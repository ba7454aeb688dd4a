"""Where studies lie: a journal file, a database, or Optuna's proxy; and how one is opened."""

from __future__ import annotations

import os
import random
import socket
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

import optuna

from gdn2gen.base.errors import TuneError
from gdn2gen.tuning.records.journal import open_journal, read_journal

_STARTUP_TRIALS: Final = 8
# Between asking for a trial and signing it lie milliseconds.
_UNSIGNED: Final = timedelta(minutes=1)
# Of two processes that begin one SQLite file at once, one failed in 7 of 10 pairs.
_BEGINNINGS: Final = 20
_BEGINNING_SECONDS: Final = 0.1
# A proxy that is only being started answered after 1.4 s.
_PROXY_SECONDS: Final = 10.0
# Any one of them: another process may have made the first alone.
_OPTUNA_TABLES: Final = frozenset({"studies", "trials", "version_info", "alembic_version"})


def open_storage(
    storage: str | Path | optuna.storages.BaseStorage, *, prune: bool = False
) -> optuna.storages.BaseStorage:
    """Optuna storage at a URL, or in the journal file of that path, to write to.

    The journal takes 12 times less time per trial than SQLite, and one file serves several
    processes. Several hosts want the URL of a database server (0.3 s a trial on PostgreSQL), or
    `grpc://host:port` of an Optuna proxy (`optuna.storages.run_grpc_proxy_server`). `prune`: of a
    journal that has grown large only the latest studies are kept.

    Raises TuneError if it does not open, or is a file that holds something else; such a file is
    left as it is.
    """
    if isinstance(storage, optuna.storages.BaseStorage):
        return storage
    with _explained(storage):
        if str(storage).startswith("grpc://"):
            return _open_proxy(str(storage))
        if "://" in str(storage):
            _check_sqlite(str(storage), missing=True)
            return _open_database(str(storage))
        return open_journal(_path(storage), prune=prune)


def read_storage(storage: str | Path) -> optuna.storages.BaseStorage:
    """Like `open_storage`, to read from: nothing is created or changed, and missing is an error."""
    with _explained(storage):
        if str(storage).startswith("grpc://"):
            return _open_proxy(str(storage))
        if "://" in str(storage):
            file = _check_sqlite(str(storage), missing=False)
            url = str(storage) if file is None else f"sqlite:///{_read_only(file)}&uri=true"
            return optuna.storages.RDBStorage(url, skip_table_creation=True)
        return read_journal(_path(storage))


@contextmanager
def _explained(storage: str | Path) -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    except TuneError:
        raise
    except Exception as error:
        away = "" if "://" in str(storage) else ", or move the file away to start afresh"
        raise TuneError(
            f"the study storage {storage} cannot be opened ({type(error).__name__}: {error}); give "
            f"another one{away}"
        ) from error


def _path(storage: str | Path) -> Path:
    return Path(storage).expanduser().resolve()


def _open_proxy(url: str) -> optuna.storages.BaseStorage:
    """Raises ConnectionError, not at the first trial, where no server answers."""
    address = urlsplit(url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        proxy = optuna.storages.GrpcStorageProxy(
            host=address.hostname or "localhost", port=address.port or 13000
        )
    proxy.wait_server_ready(timeout=_PROXY_SECONDS)
    return proxy


def _open_database(url: str) -> optuna.storages.BaseStorage:
    """Several processes may begin a database at once: who finds another's tables looks again."""
    for attempt in range(_BEGINNINGS):
        try:
            return optuna.storages.RDBStorage(url)
        except Exception as error:
            if attempt == _BEGINNINGS - 1 or not _is_begun_elsewhere(error):
                raise
            time.sleep(random.uniform(0.5, 1.5) * _BEGINNING_SECONDS)
    raise AssertionError


def _is_begun_elsewhere(error: BaseException | None) -> bool:
    """Whether a table or a row was there already, as PostgreSQL, MySQL and SQLite say it."""
    words = ("already exists", "duplicate", "unique constraint", "is locked")
    while error is not None:
        if any(word in str(error).lower() for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_sqlite(url: str, *, missing: bool) -> Path | None:
    """The file of an SQLite URL, None for other URLs and databases in memory.

    Raises TuneError, without a change to the file, if it holds anything but studies.
    """
    from sqlalchemy.engine import make_url

    parts = make_url(url)
    named = parts.database or ""
    if parts.get_backend_name() != "sqlite" or named in ("", ":memory:") or "uri" in parts.query:
        return None
    file = Path(named)
    reason = None
    if not file.exists():
        reason = None if missing else "there is no such file"
    elif not file.is_file():
        reason = "it is no regular file"
    elif file.stat().st_size > 0:
        reason = _why_no_studies(file)
    if reason is not None:
        raise TuneError(
            f"the study storage {url} is not used: {reason}; it was not changed. Give a database "
            f"that `gdn2gen tune` wrote{', or a path where nothing is' if missing else ''}"
        )
    return file


def _why_no_studies(file: Path) -> str | None:
    try:
        with closing(sqlite3.connect(_read_only(file), uri=True)) as database:
            rows = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = {name for (name,) in rows}
    except sqlite3.DatabaseError as error:
        # another process that begins the same database holds it for a moment
        return None if "locked" in str(error) else f"it is no SQLite database ({error})"
    if tables and not tables & _OPTUNA_TABLES:
        return f"its tables ({', '.join(sorted(tables)[:5])}) are not those of Optuna"
    return None


def _read_only(file: Path) -> str:
    return f"file:{quote(str(file.resolve()))}?mode=ro"


def open_study(storage: optuna.storages.BaseStorage, name: str, seed: int) -> optuna.study.Study:
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
