"""The op on CPU tensors as if by the kernels, down to the driver's functions, which note launches.

Kernels are rendered and loaded, and what would compile them says what it would have compiled.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from recorded_launches import forget

from gdn2gen.base import paths
from gdn2gen.codegen import _driver, fixed
from gdn2gen.codegen.direct import DirectKernel, direct_launch
from gdn2gen.ops import _call, _decode
from gdn2gen.runtime import _loading

_SIZES = {"i32": ("<i", 4), "fp32": ("<f", 4), "i64": ("<q", 8)}
_HIDDEN = 2
_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class Launch(NamedTuple):
    name: str
    grid: tuple[int, ...]
    threads: int
    stream: int
    addresses: tuple[int, ...]
    scalars: tuple[float, ...]
    dependent: bool = False
    """Whether it may begin before the launch before it has ended."""


class Driver:
    """Notes launches that come to the driver, and those that go through Triton."""

    def __init__(self) -> None:
        self.launched: list[Launch] = []
        self.through_triton: list[Launch] = []
        self.fails_with = 0
        self.functions: list[tuple[str, list[str]]] = []
        address, count = ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)
        launch = ctypes.CFUNCTYPE(ctypes.c_int, address, address, address, address)
        ask = ctypes.CFUNCTYPE(ctypes.c_int, address, ctypes.c_size_t, count, count)
        words = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))
        self.cuLaunchKernelEx = launch(self._launch)
        self.cuFuncGetParamInfo = ask(self._ask)
        self.cuGetErrorString = words(self._words)

    def function(self, name: str, kinds: list[str]) -> int:
        self.functions.append((name, kinds))
        return len(self.functions)

    def _ask(self, function: int, place: int, offset: Any, size: Any) -> int:
        _, kinds = self.functions[function - 1]
        if place >= len(kinds) + _HIDDEN:
            return 1
        size[0] = 8 if place >= len(kinds) or kinds[place][0] == "*" else _SIZES[kinds[place]][1]
        return 0

    def _launch(self, config: int, function: int, parameters: int, extra: int | None) -> int:
        assert not extra
        name, kinds = self.functions[function - 1]
        *size, _, stream, attributes, many = struct.unpack("<8IQQQ", ctypes.string_at(config, 56))
        assert many == bool(attributes)
        if many:  # the attribute's number, and its value
            words = struct.unpack("<9Q", ctypes.string_at(attributes, 72))
            assert words == (_SERIALIZATION, 1, *[0] * 7)
        count = len(kinds) + _HIDDEN
        places = struct.unpack(f"<{count}Q", ctypes.string_at(parameters, 8 * count))
        found: list[Any] = []
        for place, kind in zip(places, [*kinds, *["*"] * _HIDDEN], strict=True):
            form, nbytes = ("<Q", 8) if kind[0] == "*" else _SIZES[kind]
            found += struct.unpack(form, ctypes.string_at(place, nbytes))
        assert found[len(kinds) :] == [0] * _HIDDEN
        tensors = sum(x[0] == "*" for x in kinds)
        addresses, scalars = tuple(found[:tensors]), tuple(found[tensors : len(kinds)])
        place = name, tuple(size[:3]), size[3], stream, addresses, scalars
        self.launched.append(Launch(*place, bool(many)))
        return self.fails_with

    def _words(self, code: int, words: Any) -> int:
        words[0] = b"no such luck"
        return 0


class _Kernel:
    """What `DirectKernel` uses of Triton's JITFunction."""

    def __init__(self, kernel: Any, driver: Driver) -> None:
        self.params, self.arg_names = kernel.params, kernel.arg_names
        self.name, self._driver = kernel.__name__, driver
        self.pre_run_hooks: list[Any] = []
        self._compiled: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*arguments: Any, **named: Any) -> Any:
            rest = [named[x] for x in self.arg_names[len(arguments) :]]
            pairs = [*zip(self.params, (*arguments, *rest), strict=True)]
            given = [y for x, y in pairs if not x.is_constexpr]
            tensors = [x for x in given if hasattr(x, "data_ptr")]
            scalars = tuple(struct.unpack("<f", struct.pack("<f", x))[0] if isinstance(x, float)
                            else x for x in given[len(tensors) :])  # fmt: skip
            kinds = [_kind(x) for x in given]
            where = tuple([x.data_ptr() for x in tensors])
            threads, size = 32 * named["num_warps"], (*grid, 1, 1)[:3]
            early = named.get("launch_pdl", False)
            noted = Launch(self.name, size, threads, 0, where, scalars, early)
            self._driver.through_triton.append(noted)
            if self._compiled is None:
                types = {x.name: "constexpr" if x.is_constexpr else _kind(y) for x, y in pairs}
                self._compiled = SimpleNamespace(
                    run=self._again(threads, early),
                    function=self._driver.function(self.name, kinds),
                    packed_metadata=(),
                    metadata=SimpleNamespace(
                        num_warps=named["num_warps"], shared=64, name="x", launch_pdl=early
                    ),
                    src=SimpleNamespace(signature=types),
                )
            return self._compiled

        return launch

    def _again(self, threads: int, early: bool) -> Callable[..., None]:
        """Triton's launcher, without its binder."""

        def run(*given: Any) -> None:
            arguments = [x for x, y in zip(given[9:], self.params, strict=True)
                         if not y.is_constexpr]  # fmt: skip
            noted = Launch(self.name, given[:3], threads, given[3], (), tuple(arguments), early)
            self._driver.through_triton.append(noted)

        return run


def _kind(x: Any) -> str:
    return "*bf16" if hasattr(x, "data_ptr") else "fp32" if isinstance(x, float) else "i32"


def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stream: list[int]) -> Iterator[Driver]:
    """A fixture's body: its launches, with no tuned files; `stream` holds the current stream."""
    from triton.runtime import driver as tritons

    found = Driver()

    def launch_of(module: Any, function: str = "launch") -> Any:
        launch = direct_launch(module, function)
        for name, x in [*launch.__globals__.items()]:
            if isinstance(x, DirectKernel):
                launch.__globals__[name] = DirectKernel(_Kernel(x._kernel, found))
        return launch

    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: stream[0])
    monkeypatch.setattr(tritons, "_active", active)
    monkeypatch.setattr(_driver, "driver", lambda: found)
    monkeypatch.setattr(_loading, "direct_launch", launch_of)
    monkeypatch.setattr(fixed, "DirectKernel", lambda x: DirectKernel(_Kernel(x, found)))
    for module in (_call, _decode):
        monkeypatch.setattr(module, "by_kernels", lambda _: True)
    monkeypatch.setattr(paths, "packaged_tuned_dir", lambda: tmp_path / "packaged")
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path))
    monkeypatch.delenv("GDN2GEN_STRICT", raising=False)
    forget()
    yield found
    forget()
