"""Files are replaced at one stroke, and nothing but regular files is ever written."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdn2gen.base.device import named_device
from gdn2gen.base.errors import FileError
from gdn2gen.base.files import check_replaceable, locked, replace_file
from gdn2gen.cli import program
from gdn2gen.tuning import packages

# In place of the root that tests may run as, who may write whatever its permissions.
_NOBODY = 65534


@pytest.fixture
def umask() -> Iterator[None]:
    """Whatever the umask, it is 0o027 here."""
    old = os.umask(0o027)
    yield
    os.umask(old)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _fifo(path: Path) -> str:
    os.mkfifo(path)
    return "a FIFO"


def _socket(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as open_socket:
        open_socket.bind(str(path))
    return "a socket"


def _folder(path: Path) -> str:
    path.mkdir()
    return "a folder"


def _to_device(path: Path) -> str:
    path.symlink_to("/dev/null")
    return "a character device"


@pytest.mark.parametrize("make", [_fifo, _socket, _folder, _to_device])
def test_only_regular_files_are_written(tmp_path: Path, make) -> None:
    path = tmp_path / "out"
    kind = make(path)
    for write in (lambda: replace_file(path, "text"), lambda: check_replaceable(path)):
        before = os.lstat(path)
        with pytest.raises(FileError, match=f"out is {kind}; only a regular file"):
            write()
        assert os.lstat(path) == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_device_by_its_name() -> None:
    for path in ("/dev/null", "/dev/zero"):
        with pytest.raises(FileError, match="is a character device"):
            check_replaceable(path)


def test_a_pipe_through_proc(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(FileError, match="is a FIFO"):
            replace_file(f"/proc/self/fd/{writing}", "text")
    finally:
        os.close(reading)
        os.close(writing)
    with open(tmp_path / "gone", "w") as file:
        (tmp_path / "gone").unlink()
        with pytest.raises(FileError, match="no path of its own"):
            replace_file(f"/proc/self/fd/{file.fileno()}", "text")
    assert os.listdir(tmp_path) == []


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there/file", tmp_path / "link"
    link.symlink_to("there/file")
    replace_file(link, "new")  # where nothing is yet
    replace_file(link, "newer")
    assert os.readlink(link) == "there/file"
    assert target.read_text() == "newer"
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]
    assert os.listdir(tmp_path / "there") == ["file"]


@pytest.mark.usefixtures("umask")
def test_permissions_are_the_old_ones_or_the_umask(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("")
    for mode in (0o600, 0o664, 0o640):
        old.chmod(mode)
        replace_file(old, "text")
        assert _mode(old) == mode
    replace_file(new, b"\x00bytes")
    assert _mode(new) == 0o640
    assert new.read_bytes() == b"\x00bytes"


@pytest.mark.usefixtures("umask")
def test_commands_write_with_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "is_proven", lambda _: True)  # 20 s
    page, exported, package = tmp_path / "page.html", tmp_path / "h200.json", tmp_path / "package"
    made = {"report --device H200 --out": page, "tuned export --device H200 --to": exported}
    made["generate --head-dim 64 --target sm_90 --out"] = package
    for command, path in made.items():
        assert program.main([*command.split(), str(path)]) == 0
    capsys.readouterr()
    files = [page, exported, *package.iterdir()]
    assert {_mode(path) for path in files} == {0o640}
    assert _mode(package) == 0o750


@pytest.mark.parametrize(
    "command", ["report --device H200 --out", "tuned export --device H200 --to"]
)
def test_commands_refuse_what_is_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert program.main([*command.split(), str(tmp_path / "pipe")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'pipe'} is a FIFO" in said and "GDN2GEN_TUNED_DIR" not in said
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        replace_file(path, "new")
    assert raised.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_process_left_goes_after_an_hour(tmp_path: Path) -> None:
    path = tmp_path / "file"
    program = f"""
import os, signal
from gdn2gen.base import files
files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.replace_file({str(path)!r}, "new")
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    other = tmp_path / ".filed.0.tmp"
    other.write_text("of another file")
    replace_file(path, "new")
    assert left.exists()  # whoever writes it may be at it still
    for x in (left, other):
        os.utime(x, (time.time() - 4000,) * 2)
    replace_file(path, "newer")
    assert sorted(tmp_path.iterdir()) == sorted([path, other])


def test_names_as_long_as_names_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    replace_file(path, "text")
    assert os.listdir(tmp_path) == [path.name]


def test_read_only_means_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o444)
    if os.geteuid() == 0:
        allowed = os.access
        monkeypatch.setattr(os, "access", lambda x, how: x != path and allowed(x, how))
    with pytest.raises(FileError, match="read-only"):
        replace_file(path, "new")
    assert path.read_text() == "old"


def test_errors_name_what_was_given(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file/below", tmp_path / "file/below/deeper"):
        for write in (check_replaceable, lambda x: replace_file(x, "text")):
            with pytest.raises(NotADirectoryError) as raised:
                write(path)
            assert raised.value.filename == str(path)


def test_a_lock_is_no_link_and_waits_for_no_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="a FIFO"), locked(tmp_path / "pipe"):
        pass
    with pytest.raises(OSError, match="link"), locked(tmp_path / "link"):
        pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_who_may_read_a_lock_can_hold_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with locked(lock):
        pass
    lock.chmod(0o644)
    for folder in (tmp_path, *tmp_path.parents):
        if folder == Path("/tmp"):
            break
        folder.chmod(0o755)
    program = f"""
import os
from pathlib import Path
from gdn2gen.base.files import locked
os.setuid({_NOBODY})
with locked(Path({str(lock)!r})):
    print("held")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "held\n", done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "verify --interpreter --json out",
        "bench --json out",
        "bench --save",
        "verify --tuned --json out",
        "report --device H200 --out out",
    ],
)
def test_where_nothing_can_be_written_nothing_is_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured first")

    monkeypatch.chdir(tmp_path)
    os.mkfifo("out")
    Path("docs/results").mkdir(parents=True)
    os.mkfifo("docs/results/nvidia-h200.json")
    monkeypatch.setattr("gdn2gen.base.device.has_gpu", lambda: True)
    monkeypatch.setattr("gdn2gen.base.device.present_device", lambda: named_device("H200"))
    for work in ("measure.rows.bench_shapes", "measure.suite.verify", "store.sharing.on_file"):
        monkeypatch.setattr(f"gdn2gen.{work}", never)
    assert program.main(command.split()) == 2
    assert "is a FIFO" in capsys.readouterr().err
