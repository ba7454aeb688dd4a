"""Of the warps to which TileLang gives the loads only the one that loads waits.

The others would wait beside it, and for ever once two phases of a barrier have passed them by: on
an H200, training on three streams ended so after some hundred steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any, Final

import pytest
from tilelang_configs import tilelang_config

from gdn2gen.codegen.build import load
from gdn2gen.codegen.nvrtc import has_tilelang
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem

pytestmark = pytest.mark.skipif(not has_tilelang(), reason="TileLang is not installed")

BEGINS: Final = "  if (((int)threadIdx.x) < 128) {\n"
ENDS: Final = "    if (((int)threadIdx.x) >= 32) return;\n"
MARK: Final = ["-std=c++20", "-DONE_WARP_LOADS"]


def handed_over(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """The text in CUDA that the module's program is compiled from."""
    import tilelang
    from tilelang.cache.cuda_binary_cache import CUDABinaryCache
    from tilelang.contrib import nvcc

    sources: list[str] = []

    def compile_cuda(source: str, *_: object, **__: object) -> bytes:
        sources.append(source)
        raise RuntimeError("the text is all that is wanted")

    monkeypatch.setattr(nvcc, "compile_cuda", compile_cuda)
    monkeypatch.setattr(CUDABinaryCache, "load", lambda *_: None)
    target = {"kind": "cuda", "arch": "sm_90a"}
    monkeypatch.setattr(tilelang, "compile", partial(tilelang.compile, target=target))
    was_on = tilelang.is_cache_enabled()
    tilelang.disable_cache()
    try:
        with suppress(Exception):  # TileLang puts it into one of its own
            module.compiled.__wrapped__()
    finally:
        if was_on:
            tilelang.enable_cache()
    return sources[0]


@pytest.mark.resolved  # by whatever TileLang pip chooses
@pytest.mark.parametrize("stage", ["rescan", pytest.param("grad_key", marks=pytest.mark.slow)])
def test_warps_that_load_nothing_end(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(K=64, V=64)
    source = handed_over(load(render(problem, stage, tilelang_config(stage, problem))), monkeypatch)
    loads = source.split(BEGINS)[1].split("  } else {\n")[0]
    before, ends, after = loads.partition(ENDS)
    assert ends and ".wait(" not in before and "tma_load" not in before
    assert ".wait(" in after and "tma_load" in after


@pytest.fixture
def compile_loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """TileLang's compiler as a module leaves it, that returns the text that it would compile."""
    from tilelang.contrib import nvcc

    monkeypatch.setattr(nvcc, "compile_cuda", lambda source, *_, **__: source)
    problem = Problem(K=64, V=64)
    module = load(render(problem, "rescan", tilelang_config("rescan", problem)))
    module.one_warp_loads()
    known = nvcc.compile_cuda
    module.one_warp_loads()
    assert nvcc.compile_cuda is known, "once, however many modules there are"
    yield known


def test_programs_of_others_are_left_alone(compile_loads: Callable[..., Any]) -> None:
    text = f"{BEGINS}    mbarrier[3].wait((i_n & 1) ^ 1);\n"
    assert compile_loads(text, "cubin", options=["-std=c++20"]) == text
    assert compile_loads(text, "cubin") == text
    assert compile_loads(text, "cubin", options=MARK) == text.replace(BEGINS, BEGINS + ENDS)
    without = "  tl::wgmma();\n"
    assert compile_loads(without, "cubin", options=MARK) == without


WAITS: Final = "    mbarrier[3].wait(((i_n & 1) ^ 1));\n"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(f"  for (;;) {{\n  {BEGINS}{WAITS}", id="within a loop"),
        pytest.param(f"  if (128 <= ((int)threadIdx.x)) {{\n{WAITS}", id="the other way round"),
        pytest.param(f"{BEGINS}    s_k[0] = 0;\n  }}\n{BEGINS}{WAITS}", id="a fill before"),
        pytest.param(f"{BEGINS}    s_k[0] = 0;\n  }}\n", id="a fill alone"),
    ],
)
def test_a_text_that_is_not_known_is_refused(text: str, compile_loads: Callable[..., Any]) -> None:
    """As another TileLang may write it: rather no kernel than one that may wait for ever."""
    with pytest.raises(RuntimeError, match="loads in a place that is not known"):
        compile_loads(text, "cubin", options=MARK)
