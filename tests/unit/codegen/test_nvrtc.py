"""TileLang's kernels compiled by NVRTC, where there is no CUDA toolkit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from source_tree import python_path

from gdn2gen.base.errors import BuildError
from gdn2gen.codegen import nvrtc
from gdn2gen.codegen.nvrtc import Nvrtc, find_nvrtc

CU13 = ("cu13/lib/libnvrtc.so.13", "cu13/include/cuda_fp16.h")
CU12 = ("cuda_nvrtc/lib/libnvrtc.so.12", "cuda_runtime/include/cuda_fp16.h")
CCCL = "cu13/include/cccl/cuda/std/cassert"


@pytest.mark.parametrize(
    ("version", "installed", "found"),
    [
        ("13.0", (*CU13, CCCL), (CU13[0], "cu13/include", "cu13/include/cccl")),
        (None, (*CU13, CCCL), (CU13[0], "cu13/include", "cu13/include/cccl")),
        (
            "12.8",
            (*CU12, *CU13, CCCL),
            (CU12[0], "cuda_runtime/include", "cu13/include/cccl", "cu13/include"),
        ),
        (
            "12.6",
            (*CU12, "cuda_cccl/include/cuda/std/cassert"),
            (CU12[0], "cuda_runtime/include", "cuda_cccl/include"),
        ),
        ("13.0", CU13, None),
        ("13.0", (CU13[1], CCCL), None),
        ("13.0", (), None),
    ],
)
def test_nvrtc_is_found_among_wheels(
    version: str | None,
    installed: tuple[str, ...],
    found: tuple[str, ...] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever of the folders of one namespace a wheel was installed to."""
    half = len(installed) // 2
    roots = [tmp_path / "a", tmp_path / "b"]
    for root, names in zip(roots, (installed[:half], installed[half:]), strict=True):
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
    spec = SimpleNamespace(submodule_search_locations=list(map(str, roots)))
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(torch.version, "cuda", version)
    result = find_nvrtc.__wrapped__()
    if found is None:
        assert result is None
        return
    assert result is not None
    paths = [x.relative_to(tmp_path).parts[1:] for x in (result.library, *result.headers)]
    expected = [Path(x).parts for x in found]
    # a folder around cccl is given, too, where it is not that of the other headers already
    assert paths[: len(expected)] == expected
    assert paths[len(expected) :] in ([], [("cu13", "include")])


def test_tilelang_is_handed_what_nvcc_would_get(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compile_it(*given: Any) -> bytes:
        asked.append(given)
        return b"binary"

    monkeypatch.setattr(nvrtc, "find_nvrtc", lambda: SimpleNamespace(compile=compile_it))
    options = ["-std=c++20", "--use_fast_math"]
    assert nvrtc._compile_cuda("source", "cubin", ["-arch=sm_90a"], options) == b"binary"
    assert asked == [("source", "sm_90a", options)]
    with pytest.raises(BuildError, match="cannot make a ptx"):
        nvrtc._compile_cuda("source", "ptx", ["-arch=sm_90a"], options)


def test_tilelang_keeps_nvcc_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilelang.contrib import nvcc

    before = nvcc.compile_cuda
    monkeypatch.setattr(nvcc, "compile_cuda", before)  # so that it is put back
    monkeypatch.setattr(nvrtc, "_hand_over", cache(nvrtc._hand_over.__wrapped__))
    monkeypatch.setattr(nvrtc, "cuda_compiler", lambda: "/usr/bin/nvcc")
    with nvrtc.compiler_for("cuda"):
        assert nvcc.compile_cuda is before
    monkeypatch.setattr(nvrtc, "cuda_compiler", lambda: None)
    with nvrtc.compiler_for():
        assert nvcc.compile_cuda is nvrtc._compile_cuda
    monkeypatch.setattr(nvcc, "compile_cuda", before)
    with nvrtc.compiler_for():
        assert nvcc.compile_cuda is before, "what was put before it since then stays"


def test_nvrtc_is_handed_over_once_to_threads_that_come_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The later one would take away what the first one's module has put before it."""
    import tilelang.backend.target  # noqa: F401  (or they would come when that is there)

    times: list[int] = []
    another = Event()

    def hand_over() -> None:
        times.append(1)
        if len(times) > 1:
            another.set()
        another.wait(timeout=0.5)

    monkeypatch.setattr(nvrtc, "_hand_over", cache(hand_over))
    monkeypatch.setattr(nvrtc, "cuda_compiler", lambda: None)
    with ThreadPoolExecutor(2) as threads:
        for x in [threads.submit(nvrtc.compiler_for) for _ in range(2)]:
            x.result()
    assert times == [1]


needs_nvrtc = pytest.mark.skipif(find_nvrtc() is None, reason="NVRTC is not installed")


@needs_nvrtc
def test_what_nvrtc_says_is_in_the_error() -> None:
    found = find_nvrtc()
    assert isinstance(found, Nvrtc)
    with pytest.raises(BuildError, match=r"NVRTC 1\d\.\d+ does not compile for sm_90a"):
        found.compile("int f( {", "sm_90a", ())


@needs_nvrtc
@pytest.mark.parametrize(
    ("stage", "registers"),
    [("scan", 240), pytest.param("prepare", 80, marks=pytest.mark.slow)],
)
def test_a_kernel_compiles_without_nvcc(stage: str, registers: int, tmp_path: Path) -> None:
    """With as many registers as by nvcc, none of them spilled."""
    caches = {x: str(tmp_path) for x in ("TILELANG_CACHE_DIR", "GDN2GEN_CACHE_DIR")}
    environment = {
        **os.environ,
        **caches,
        "CUDA_HOME": "/nonexistent",
        "PYTHONPATH": python_path(),
    }
    command = [sys.executable, "-c", _COMPILE, stage]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{registers} 0"


_COMPILE = """
import os, sys
def watch(event, arguments):
    assert event != "subprocess.Popen" or "nvcc" not in os.path.basename(str(arguments[0]))
sys.addaudithook(watch)
from tilelang_configs import tilelang_by_chunk
from gdn2gen.codegen.build import compile_ahead
from gdn2gen.kernels.config import default_config
from gdn2gen.base.device import named_device
from gdn2gen.family.problem import Problem
stage, problem = sys.argv[1], Problem()
scan = default_config("scan", problem).replace(language="tilelang")
config = scan if stage == "scan" else tilelang_by_chunk(stage, problem)
used = compile_ahead(problem, stage, config, named_device("sm_90"))
print(used.registers, used.spill_bytes)
"""


@needs_nvrtc
def test_waits_for_the_launch_before_are_known() -> None:
    """Which nvcc knows by itself."""
    found = find_nvrtc()
    assert isinstance(found, Nvrtc)
    templates = Path(importlib.util.find_spec("tilelang").origin).parent / "src"  # type: ignore
    source = """extern "C" __global__ void kernel(int *x) {
        cudaGridDependencySynchronize();
        cudaTriggerProgrammaticLaunchCompletion();
        *x = 1;
    }"""
    options = [f"-I{templates}", "-std=c++17"]
    assert b"kernel" in found.compile(source, "sm_90a", options)
    assert nvrtc._declared("int x;") == ""
    assert "griddepcontrol.wait" in nvrtc._declared(source)
