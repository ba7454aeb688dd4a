"""The package once more, with templates broken on purpose, for tests of what a fault costs.

The copy stands in a folder of its own: processes that import gdn2gen from there make kernels that
misbehave at single values of one knob of prepare's dyadic form (`decay` of log or tree).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import gdn2gen
from gdn2gen.base.device import Device
from gdn2gen.base.paths import templates_dir
from gdn2gen.base.worker import CompilePool, Worker, compile_slots
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.tuning.gpu.backend import WorkerBackend

TEMPLATE: Final = "triton/stages/prepare.py.jinja"
# Lines of the template, each there once, that a fault comes after.
_IN_KERNEL: Final = "    i_tile = tl.program_id(0).to(tl.int64)\n"
_IN_LAUNCH: Final = '    """Launch one program per chunk and value head on the current stream."""\n'

# past all that 47 bits address, where nothing is ever mapped
_WILD_STORE: Final = "    tl.store(A + 2**46, 0.0)\n"
# LLVM takes such an operand number for a bug of its own, and aborts
_BAD_ASSEMBLY: Final = """\
    tl.inline_asm_elementwise("mov.u32 $9, 0;", "=r", [], tl.int32, is_pure=False, pack=1)
"""
_CLOCK: Final = (
    'tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], tl.int64, '
    "is_pure=False, pack=1)"
)
# One program alone, until the GPU's clock is a minute on: a hang that ends even if no kill does it.
_SPIN: Final = f"""\
    if i_tile == 0:
        now = {_CLOCK}
        end = now + 60_000_000_000
        while now < end:
            now = {_CLOCK}
"""
_ALLOCATION: Final = """\
    import torch

    torch.empty(2**46, dtype=torch.uint8, device="cuda")
"""
FAULTS: Final = {
    "illegal access": (_IN_KERNEL, _WILD_STORE),
    "hang": (_IN_KERNEL, _SPIN),
    "abort in the compiler": (_IN_KERNEL, _BAD_ASSEMBLY),
    "out of memory": (_IN_LAUNCH, _ALLOCATION),
}


def broken_package(folder: Path, knob: str, faults: Mapping[Knob, str]) -> Path:
    """Copy the package and its templates to `folder`; `faults` names one for values of `knob`."""
    package = Path(gdn2gen.__file__).resolve().parent
    ignored = shutil.ignore_patterns("__pycache__", "_data")
    shutil.copytree(package, folder / "gdn2gen", ignore=ignored)
    shutil.copytree(templates_dir(), folder / "templates")
    path = folder / "templates" / TEMPLATE
    text = path.read_text()
    for value, name in faults.items():
        place, code = FAULTS[name]
        assert text.count(place) == 1, f"{TEMPLATE} has not just one line {place.strip()!r}"
        condition = f"{{% if config[{knob!r}] == {value!r} %}}\n"
        text = text.replace(place, f"{place}{condition}{code}{{% endif %}}\n")
    path.write_text(text)
    return folder


def environment(package: Path) -> dict[str, str]:
    """What makes a process import gdn2gen from `package`, and keep its own files there."""
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        # else `python -m` puts the current folder first, which may be the source tree
        "PYTHONSAFEPATH": "1",
        "GDN2GEN_CACHE_DIR": str(package / "cache"),
    }


def dyadic_prepare(problem: Problem, **knobs: Knob) -> Config:
    """A config that the broken template serves."""
    config = default_config("prepare", problem)
    return config.replace(decay="tree", BK=32, num_warps=1).replace(**knobs)


class BrokenBackend(WorkerBackend):
    """The real backend, whose processes import gdn2gen from `package`."""

    def __init__(self, device: Device, package: Path) -> None:
        self.device, self.slots = device, compile_slots()
        self._pool = CompilePool(self.slots, environment(package))
        self._worker = Worker(environment(package))

    @property
    def worker(self) -> Worker:
        return self._worker
