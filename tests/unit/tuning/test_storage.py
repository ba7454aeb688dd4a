"""Where studies lie: what is no study is not touched, reading writes nothing, journals shrink."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from gdn2gen.base.device import named_device
from gdn2gen.base.errors import StoreError, TuneError
from gdn2gen.cli import program
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import SHAPES
from gdn2gen.store import tuned_files
from gdn2gen.tuning import tune, tune_without_gpu
from gdn2gen.tuning.records import journal, storage
from gdn2gen.tuning.records.storage import open_storage, open_study, read_storage

H200 = named_device("H200")
PHOTO = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


def _sqlite(path: Path, table: str) -> bytes:
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"CREATE TABLE {table} (a)")
        database.execute(f"INSERT INTO {table} VALUES (1)")
        database.commit()
    return path.read_bytes()


def _photo(path: Path) -> str:
    path.write_bytes(PHOTO)
    return "no journal of Optuna"


def _notes(path: Path) -> str:
    path.write_text("a line\nand a last one without an end")
    return "no journal of Optuna"


def _json_lines(path: Path) -> str:
    path.write_text('{"reason": "wrong"}\n{"reason":')
    return "no journal of Optuna"


def _database(path: Path) -> str:
    _sqlite(path, "studies")
    return f"whose URL is sqlite:///{path}"


@pytest.mark.parametrize("read", [True, False], ids=["report", "tune"])
@pytest.mark.parametrize("make", [_photo, _notes, _json_lines, _database])
def test_what_is_no_journal_is_refused_and_left_alone(tmp_path: Path, make, read: bool) -> None:
    path = tmp_path / "file"
    words = make(path)
    content, found = path.read_bytes(), path.stat()
    with pytest.raises(TuneError, match="was not changed") as raised:
        (read_storage if read else open_storage)(path)
    assert str(path) in str(raised.value) and words in str(raised.value)
    assert ("a path where nothing is" in str(raised.value)) != read
    assert path.read_bytes() == content
    assert path.stat().st_mtime_ns == found.st_mtime_ns
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("read", [True, False], ids=["report", "tune"])
def test_a_database_of_others_is_refused_and_left_alone(tmp_path: Path, read: bool) -> None:
    use = read_storage if read else open_storage
    places, photo = tmp_path / "places.sqlite", tmp_path / "photo.png"
    content = _sqlite(places, "bookmarks")
    photo.write_bytes(PHOTO)
    for path, words in ((places, "bookmarks"), (photo, "no SQLite database")):
        with pytest.raises(TuneError, match=words):
            use(f"sqlite:///{path}")
    assert places.read_bytes() == content
    assert photo.read_bytes() == PHOTO
    assert sorted(os.listdir(tmp_path)) == ["photo.png", "places.sqlite"]


@pytest.mark.parametrize("name", ["photo.png", "sqlite:///photo.png"])
def test_report_never_truncates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photo.png").write_bytes(PHOTO)
    assert program.main(["report", "--device", "H200", "--storage", name]) == 2
    assert "photo.png is not used" in capsys.readouterr().err
    assert Path("photo.png").read_bytes() == PHOTO
    assert os.listdir() == ["photo.png"]


@pytest.mark.parametrize("name", ["none.journal", "sqlite:///none.db"])
def test_report_says_that_a_storage_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert program.main(["report", "--device", "H200", "--storage", name]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert os.listdir() == []


def test_a_proxy_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("grpc")
    monkeypatch.setattr(storage, "_PROXY_SECONDS", 0.3)
    assert program.main(["report", "--device", "H200", "--storage", "grpc://localhost:1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gdn2gen report: the study storage grpc://localhost:1 cannot be opened")
    assert said.count("\n") == 1 and "file" not in said


def _search(storage: optuna.storages.BaseStorage, name: str, trials: int) -> optuna.study.Study:
    study = open_study(storage, name, 0)
    for number in range(trials):
        study.add_trial(create_trial(value=1.0 + number, user_attrs={"times": {"a": 1.0}}))
    return study


@pytest.mark.parametrize("scheme", ["", "sqlite:///"])
def test_reading_writes_nothing(tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "a study & more.file"
    storage = open_storage(f"{scheme}{path}")
    _search(storage, "one", 3)
    if not scheme:
        with path.open("ab") as file:  # as a kill in mid-write leaves it
            file.write(b'{"op_code":4,"wor')
    del storage
    content = path.read_bytes()
    path.chmod(0o444)
    (study,) = optuna.get_all_study_summaries(read_storage(f"{scheme}{path}"))
    assert (study.study_name, study.n_trials) == ("one", 3)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == [path.name]


def test_a_torn_line_goes_when_the_search_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    _search(open_storage(path), "one", 3)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"wor')
    open_storage(path)
    assert path.read_bytes() == whole
    for first in (b"", b'{"op', b'{"op_code":0,"worker_id":"x"'):
        path.write_bytes(first)
        open_storage(path)
        assert path.read_bytes() == b""


def test_a_damaged_journal_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    _search(open_storage(path), "one", 3)
    first, second, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, second[:9], b"\n", *others]))
    content = path.read_bytes()
    for use in (open_storage, read_storage):
        with pytest.raises(TuneError, match="cannot be opened"):
            use(path)
    assert path.read_bytes() == content


def _trials(storage: optuna.storages.BaseStorage) -> dict[str, list[tuple[object, ...]]]:
    found = {}
    for name in optuna.get_all_study_names(storage):
        trials = storage.get_all_trials(storage.get_study_id_from_name(name))
        found[name] = [
            (x.number, x.state, x.value, x.params, x.user_attrs, x.datetime_start) for x in trials
        ]
    return found


def test_a_large_journal_is_pruned_to_its_latest_studies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "study.journal"
    storage = open_storage(path)
    for name in ("old", "older", "new"):
        study = _search(storage, name, 20)
        for _ in range(3):
            trial = study.ask()
            trial.suggest_int("BT", 16, 64)
            trial.set_user_attr("owner", "elsewhere:1")
    study.tell(trial, 0.5)
    open_study(storage, "older", 0).ask()
    before = _trials(storage)
    assert {x[1] for x in before["new"]} == {TrialState.COMPLETE, TrialState.RUNNING}
    size = path.stat().st_size
    open_storage(path, prune=True)  # not large
    assert path.stat().st_size == size
    monkeypatch.setattr(journal, "_PRUNED_ABOVE", size - 1)
    monkeypatch.setattr(journal, "_PRUNED_TO", size * 3 // 4)
    open_storage(path)  # shared by hosts, perhaps
    open_storage(path, prune=True)  # in use
    assert path.stat().st_size == size
    path.chmod(0o640)
    del storage, study, trial
    pruned = _trials(open_storage(path, prune=True))
    assert sorted(pruned) == ["new", "older"]
    assert pruned == {name: before[name] for name in pruned}
    assert path.stat().st_size <= size * 3 // 4
    assert path.stat().st_mode & 0o777 == 0o640
    monkeypatch.setattr(journal, "_PRUNED_ABOVE", 0)
    monkeypatch.setattr(journal, "_PRUNED_TO", 0)
    last = open_storage(path, prune=True)
    assert [*_trials(last)] == ["older"]
    _search(last, "older", 1)  # and it goes on
    assert len(_trials(read_storage(path))["older"]) == len(before["older"]) + 1


_KILLED = """
import os, signal, sys
from gdn2gen.tuning.records.storage import open_storage
storage = open_storage(sys.argv[1])
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
storage.create_new_study([1], "one")
"""


def test_waiting_for_a_killed_process_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "study.journal"
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path)], check=False)
    assert done.returncode == -9
    assert os.path.islink(f"{path}.lock")
    monkeypatch.setattr(journal, "_SILENT_SECONDS", 0.1)
    monkeypatch.setattr(journal, "_GRACE_SECONDS", 3)
    started = time.monotonic()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        storage = open_storage(path)
    assert 3 <= time.monotonic() - started < 10
    (message,) = [str(x.message) for x in said if "waiting" in str(x.message)]
    assert f"{path}.lock" in message and "after 3 s" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_study(storage, "two", 0)
    assert not os.path.lexists(f"{path}.lock")


# To import what opens a study takes a process 4 s, which none spends here but the first.
_JOIN = """
import os, sys
from gdn2gen.tuning.records.storage import open_storage, open_study
waiting, ready = os.pipe()
others = []
for _ in range(4):
    other = os.fork()
    if not other:
        os.close(ready)
        os.read(waiting, 1)  # until all are there
        open_study(open_storage(sys.argv[1]), "one", 0)
        sys.exit()
    others.append(other)
os.close(waiting), os.close(ready)
sys.exit(max(os.waitpid(x, 0)[1] for x in others) > 0)
"""


def test_processes_may_begin_a_database_together(tmp_path: Path) -> None:
    """Before, one of two failed in 7 of 10 pairs."""
    url = f"sqlite:///{tmp_path}/study.db"
    command = [sys.executable, "-c", _JOIN, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert optuna.get_all_study_names(read_storage(url)) == ["one"]


def _tune(out: Path, **changes: object) -> None:
    tune_without_gpu(Problem(), H200, [SHAPES["train4k"]], budget_minutes=1, out_dir=out, **changes)


class _Never:
    """Stands for compilers that must not be asked."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"{name} was asked for before the folder was looked at")


def _device(path: Path) -> str:
    path.symlink_to("/dev/null")
    return "/dev/null is a character device"


def _fifo(path: Path) -> str:
    os.mkfifo(path)
    return "is a FIFO"


def _folder(path: Path) -> str:
    path.mkdir()
    return "is a folder"


def _truncated(path: Path) -> str:
    path.write_text("{")
    return "truncated or not JSON"


def _of_another_gpu(path: Path) -> str:
    metadata = tuned_files.metadata_for(named_device("H100"), {}, "test")
    tuned_files.write_tuned(path, tuned_files.TunedFile(metadata, ()))
    return "is of the GPU 'NVIDIA H100"


@pytest.mark.parametrize("make", [_device, _fifo, _folder, _truncated, _of_another_gpu])
def test_where_nothing_can_be_filed_nothing_is_searched(tmp_path: Path, make) -> None:
    path = tuned_files.tuned_path(tmp_path, "gdn2", H200)
    path.parent.mkdir()
    with pytest.raises(StoreError, match=make(path)):
        _tune(tmp_path, backend=_Never())


def test_a_file_in_place_of_the_folder_is_said_before_the_search(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        _tune(tmp_path / "out", backend=_Never())


def test_a_search_on_a_gpu_looks_first_too(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    options = {"budget_minutes": 1.0, "out_dir": tmp_path / "out", "backend": _Never()}
    with pytest.raises(StoreError, match="cannot be written"):
        tune(Problem(), [SHAPES["train4k"]], H200, storage=tmp_path / "journal", **options)
    assert os.listdir(tmp_path) == ["out"]
