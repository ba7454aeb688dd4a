"""What runs is what was rendered, and a call answers wherever its files may lie."""

from __future__ import annotations

import errno
import importlib.util
import inspect
import os
import pwd
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gdn2gen.base import folders, paths
from gdn2gen.base.device import named_device
from gdn2gen.base.errors import TunedFileWarning
from gdn2gen.codegen import build, programs
from gdn2gen.codegen.render import Rendered, render
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.kernels.config import default_config
from gdn2gen.store.dispatch import find_recipe

PROBLEM = Problem()
CACHES = ("GDN2GEN_CACHE_DIR", "TRITON_CACHE_DIR", "TILELANG_CACHE_DIR")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The system's temporary folder; caches are where the environment says from now on."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name in CACHES:
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is undone
        monkeypatch.delenv(name)
    remembered = (folders.private_dir, paths._trusted, paths._warn_of_tuned_dir, build.load)
    for function in remembered:
        function.cache_clear()
    yield folder
    for function in remembered:
        function.cache_clear()
    paths._settled.clear()


@pytest.fixture
def cache(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    for name in CACHES:
        monkeypatch.setenv(name, str(folder))
    return folder


@pytest.fixture
def rendered() -> Rendered:
    return render(PROBLEM, "scan", default_config("scan", PROBLEM))


def _plant(cache: Path, rendered: Rendered, text: str) -> Path:
    path = cache / "kernels" / f"{rendered.module_name}.py"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", ["", "raise SystemExit('planted')", "def launch(", "\0"])
def test_a_source_that_lies_there_is_not_run(cache: Path, rendered: Rendered, text: str) -> None:
    path = _plant(cache, rendered, text)
    module = build.load(rendered)
    assert callable(module.launch) and module.__file__ == str(path)
    assert path.read_text() == rendered.source


def test_one_changed_digit_is_not_run(cache: Path, rendered: Rendered) -> None:
    path = _plant(cache, rendered, rendered.source.replace("128", "129"))
    assert build.load(rendered).K == PROBLEM.K
    assert path.read_text() == rendered.source


def test_a_planted_bytecode_is_not_run(
    cache: Path, rendered: Rendered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "pycache_prefix", None)  # beside its source, where others plant it
    path = _plant(cache, rendered, rendered.source)
    compiled = Path(importlib.util.cache_from_source(str(path)))
    compiled.parent.mkdir()
    code = importlib._bootstrap_external._code_to_hash_pyc(  # type: ignore[attr-defined]
        compile("raise SystemExit('planted')", str(path), "exec"), b"0" * 8, False
    )
    compiled.write_bytes(code)
    assert callable(build.load(rendered).launch)


def test_the_source_read_back_is_what_was_rendered(cache: Path, rendered: Rendered) -> None:
    """Triton compiles what `inspect` reads, and TileLang does so long after the import."""
    module = build.load(rendered)
    assert module.__file__ is not None
    Path(module.__file__).write_text("raise SystemExit('planted')\n" * 400)
    assert inspect.getsource(module.launch) in rendered.source
    assert "".join(module.scan_kernel.src.split()) in "".join(rendered.source.split())


def test_a_source_that_cannot_be_written_runs(
    cache: Path, rendered: Rendered, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "replace_file", full)
    module = build.load(rendered)
    assert module.__file__ is not None and not Path(module.__file__).exists()
    assert inspect.getsource(module.launch) in rendered.source


def test_code_is_not_kept_where_others_write(
    cache: Path, temporary: Path, rendered: Rendered
) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.warns(RuntimeWarning, match=r"others may write to .*GDN2GEN_CACHE_DIR") as said:
        module = build.load(rendered)
        paths.code_dir("kernels")
    assert len(said) == 1 and module.__file__ is not None
    private = temporary / f"gdn2gen-{os.geteuid()}"
    assert Path(module.__file__).parent == private / "kernels"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("mode", "group", "trusted"),
    [
        (0o755, "any", True),
        (0o775, "own", True),  # a group of the user alone, where umask is 002
        (0o775, "any", False),
        (0o777, "own", False),
        (0o1777, "own", False),  # entries are their owners', but anyone may add one
    ],
)
def test_folders_that_others_write(tmp_path: Path, mode: int, group: str, trusted: bool) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    if os.geteuid() == 0:
        os.chown(folder, 0, 0 if group == "own" else 1)
    elif (group == "own") != (os.getegid() == os.geteuid()):
        pytest.skip("only root chooses a folder's group")
    folder.chmod(mode)
    assert (folders.why_untrusted(folder) is None) == trusted
    assert (folders.why_untrusted(folder / "inner") is None) == (trusted or mode == 0o1777)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_is_another_users_is_not_trusted(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.touch()
    assert folders.why_untrusted(folder) is None and folders.is_trusted_file(file)
    for path in (folder, file):
        os.chown(path, 12345, 12345)
    assert "belongs to user 12345" in str(folders.why_untrusted(folder))
    assert not folders.is_trusted_file(file)


def test_a_private_folder_that_another_has_taken(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = temporary / f"gdn2gen-{os.geteuid()}"
    taken.symlink_to(temporary)
    found = folders.private_dir()
    assert found.parent == temporary and found != taken
    assert stat.S_IMODE(found.stat().st_mode) == 0o700


def _kept_program(name: str, content: bytes = b"a library") -> Path:
    folder = paths.code_dir("programs")
    path = folder / "new"
    path.write_bytes(content)
    path.chmod(0o600)
    return path.rename(folder / f"{name}-{programs._digest(path.read_bytes(), name)}.so")


def test_a_kept_program_is_the_one_that_was_kept(cache: Path) -> None:
    path = _kept_program("scan")
    assert programs._kept("scan") == path
    assert programs._kept("rescan") is None
    renamed = path.rename(path.with_name(path.name.replace("scan", "rescan")))
    assert programs._kept("rescan") is None and not renamed.exists()


@pytest.mark.parametrize("content", [b"", b"a libr", b"another one"])
def test_a_kept_program_that_changed_is_made_anew(cache: Path, content: bytes) -> None:
    path = _kept_program("scan")
    path.write_bytes(content)
    module, program = ModuleType("scan"), object()
    name = programs._name(module, "compiled")
    _kept_program(name).write_bytes(content)
    assert programs.compiled_program(module, "compiled", lambda: program) is program  # type: ignore[arg-type, return-value]
    assert programs._kept("scan") is None and not path.exists()


def test_a_kept_program_that_others_could_write_is_not_loaded(cache: Path) -> None:
    path = _kept_program("scan")
    path.chmod(0o666)
    assert programs._kept("scan") is None
    path = _kept_program("scan")
    link = path.with_name("elsewhere")
    path.rename(link)
    path.symlink_to(link)
    assert programs._kept("scan") is None


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"HOME": "/dev/null"}, CACHES),
        ({"HOME": None}, CACHES),
        ({"HOME": "/dev/null", "TRITON_CACHE_DIR": "{tmp}"}, (CACHES[0], CACHES[2])),
        ({"GDN2GEN_CACHE_DIR": "~nosuchuser/x"}, CACHES[:1]),
        ({"TRITON_CACHE_DIR": "/dev/null/x"}, CACHES[1:2]),
    ],
)
def test_a_call_answers_without_a_home(
    environment: dict[str, str | None],
    named: tuple[str, ...],
    tmp_path: Path,
    temporary: Path,
    rendered: Rendered,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one warning, however many kernels are loaded."""

    def no_entry(_: object) -> None:
        raise KeyError("no passwd entry")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value.format(tmp=tmp_path))
    with pytest.warns(RuntimeWarning) as said:
        for _ in range(2):
            build.load.cache_clear()
            assert callable(build.load(rendered).launch)
    assert len(said) == 1, [str(x.message) for x in said]
    words = str(said[0].message)
    assert [x for x in CACHES if x in words] == list(named)
    private = temporary / f"gdn2gen-{os.geteuid()}"
    for name in {*named} - {"GDN2GEN_CACHE_DIR"}:
        assert Path(os.environ[name]).parent == private
    assert (paths.cache_dir() == private) == ("GDN2GEN_CACHE_DIR" in named)


@pytest.mark.parametrize("sign", ["statvfs", "write"])
def test_a_full_disk_is_noticed(
    sign: str, cache: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    if sign == "write":
        monkeypatch.setattr(tempfile, "TemporaryFile", full)
    else:
        room = SimpleNamespace(f_blocks=1 << 20, f_bavail=3, f_frsize=4096)
        monkeypatch.setattr(os, "statvfs", lambda _: room)
    words = {"statvfs": "its disk has 12 KiB left", "write": "Disk quota exceeded"}[sign]
    with pytest.warns(RuntimeWarning, match=rf"GDN2GEN_CACHE_DIR \({cache}: .*{words}"):
        assert paths.cache_dir().parent == temporary


@pytest.mark.parametrize("value", ["~nosuchuser/x", "{tmp}/nothing", "{tmp}/file"])
def test_a_folder_of_tuned_files_that_cannot_be_read(
    value: str, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", value.format(tmp=tmp_path))
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.warns(TunedFileWarning, match="no tuned files are read from") as said:
        for tokens in (1000, 16384):
            found = find_recipe(PROBLEM, Regime(tokens, 4, 16), named_device("H200"))
            assert [x.stage for x in found.recipe.configs] == [*found.recipe.plan.stages]
    assert len(said) == 1, [str(x.message) for x in said]


def test_a_folder_of_tuned_files_may_come_later(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path / "own"))
    with pytest.warns(TunedFileWarning):
        assert paths.to_be_read(tmp_path / "own") == tmp_path / "own"
    (tmp_path / "own").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paths.to_be_read(tmp_path / "own") == tmp_path / "own"


def test_a_kernel_compiles_without_a_home(tmp_path: Path) -> None:
    """As `tune` compiles, in a process of its own, whose Triton asks for its cache by itself."""
    program = """
from gdn2gen.codegen.build import compile_ahead
from gdn2gen.kernels.config import default_config
from gdn2gen.base.device import named_device
from gdn2gen.family.problem import Problem
problem = Problem(K=32, V=32)
config = default_config("sum_decay", problem)
print(compile_ahead(problem, "sum_decay", config, named_device("sm_90")).registers)
"""
    clean = {name: x for name, x in os.environ.items() if name not in CACHES}
    environment = {**clean, "HOME": "/dev/null", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1


def test_what_the_machine_lacks_is_no_fault_of_the_config(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "has_compiler", lambda: False)
    tilelang = default_config("scan", PROBLEM).replace(language="tilelang")
    with pytest.raises(FileNotFoundError, match="neither nvcc nor NVRTC"):
        build.compile_ahead(PROBLEM, "scan", tilelang, named_device("sm_90"))
    monkeypatch.setattr(build, "_compile_triton", full)
    with pytest.raises(OSError, match="No space left"):
        build.compile_ahead(PROBLEM, "scan", default_config("scan", PROBLEM), named_device("sm_90"))
