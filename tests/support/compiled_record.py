"""What kernels that take a compiler long have taken, on file by all that the compiler is given.

What is given is a kernel's text, its operands and options, the target, the compilers' versions:
a kernel any of which has changed is compiled, as one that is not on file is.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from gdn2gen.base import dtypes
from gdn2gen.base.device import Device
from gdn2gen.base.environment import cuda_compiler
from gdn2gen.codegen import build, faults, nvrtc
from gdn2gen.codegen.build import Resources, launch_options
from gdn2gen.codegen.render import render
from gdn2gen.family.compiled import Compiled
from gdn2gen.kernels.config import Config, language_of
from gdn2gen.kernels.stages import EVERY_STAGE

RECORD: Final = Path(__file__).parents[1] / "unit/codegen/ahead_of_time.json"
# Seconds of a core that compiling takes at least, for a kernel to be put on file.
LONG: Final = 2.0
_COMPILERS: Final = {
    "triton": ("triton",),
    "tilelang": (
        *("triton", "tilelang", "apache-tvm-ffi"),
        *("nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cuda-cccl"),
    ),
}
# Variables that compilers read, but for where they keep what they have compiled.
_READ: Final = ("TRITON_", "TILELANG_", "LLVM_", "MLIR_", "NVCC_", "NVPTX_", "DISABLE_")
_KEPT: Final = ("TRITON_CACHE_DIR", "TILELANG_CACHE_DIR")


class Record:
    """Of one test, whose name is beside what it compiled.

    What is on file is believed; or compiled, too, and compared ("check"); or put there anew, where
    it took long ("update").
    """

    def __init__(self, test: str, mode: str = "believe", file: Path = RECORD) -> None:
        self._test, self._mode, self._file = test, mode, file
        self._met: set[str] = set()

    def compile_ahead(
        self, problem: Compiled, stage: str, config: Config, device: Device
    ) -> Resources:
        """As gdn2gen.codegen.build does, but that what is on file is believed."""
        key = given(problem, stage, config, device)
        known = self._known().get(key)
        if known is not None and self._mode == "believe":
            return Resources(**known["used"])
        started = _spent()
        used = build.compile_ahead(problem, stage, config, device)
        took = _spent() - started
        found = asdict(used) | {"seconds": round(took, 1)}
        if known is not None and self._mode == "check":
            assert {**known["used"], "seconds": found["seconds"]} == found, self._test
        if self._mode == "update" and key is not None:
            self._met.add(key)
            self._put(key, found if took >= LONG else None)
        return used

    def _known(self) -> dict[str | None, Any]:
        with suppress(FileNotFoundError):
            return dict(json.loads(self._file.read_text()))
        return {}

    def _put(self, key: str, used: dict[str, Any] | None) -> None:
        """Instead of what this test had put there, compiled beside the same Triton."""
        own = {"test": self._test, "triton": _version("triton")}
        stays = self._met - {key}
        known = {
            x: y for x, y in self._known().items() if x in stays or not own.items() <= y.items()
        }
        if used is not None:
            known[key] = {**own, "used": used}
        rows = dict(sorted(known.items(), key=lambda x: (x[1]["test"], x[1]["triton"], x[0])))
        self._file.write_text(json.dumps(rows, indent=1) + "\n")


def given(problem: Compiled, stage_name: str, config: Config, device: Device) -> str | None:
    """A digest of all that decides what a compiler makes of a stage; None where more decides."""
    language, stage = language_of(config), EVERY_STAGE[stage_name]
    if any(x.startswith(_READ) and x not in _KEPT for x in os.environ):
        return None
    # less the digest of its template: that is another one where only another kernel's text is
    text = re.sub(r"(?m)^Template digest \w+", "", render(problem, stage_name, config).source)
    parts = [
        *(f"{x} {_version(x)}" for x in _COMPILERS[language]),
        _nvcc() if language == "tilelang" else "",
        *_sources(text),
        device.arch,
        text,
        *(f"{x.name} {x.dtype_in(problem)}" for x in stage.operands(problem)),
        *stage.scalars_of(problem),
        *(f"{x}={n}" for x, n in sorted(launch_options(config).items())),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _version(package: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return "none"


@cache
def _nvcc() -> str:
    """What it says of its version and build, where TileLang would call one; else NVRTC serves."""
    found = cuda_compiler()
    if found is None:
        return ""
    command = [found, "--version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _sources(text: str) -> Iterator[str]:
    """Of what hands a kernel to its compiler and judges what comes back; of other kernels' options
    nothing, which are added with each of them."""
    for module in (faults, nvrtc, dtypes):
        yield inspect.getsource(module)
    for name, value in sorted(vars(build).items()):
        constant = name.startswith("_") and name.isupper()
        if constant and isinstance(value, dict):
            yield from (f"{name} {x} {y}" for x, y in value.items() if x in text or "_" not in x)
        elif constant:
            yield f"{name} {value}"
        elif getattr(value, "__module__", None) == build.__name__:
            yield inspect.getsource(value)


def _spent() -> float:
    """Seconds of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
