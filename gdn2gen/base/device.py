"""Device: the GPU that a kernel is built for; the present one (asked lazily), or a named target.

Importing this module queries no GPU and imports neither torch nor triton.
"""

from __future__ import annotations

import difflib
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Final

from gdn2gen.base.errors import DeviceError


@dataclass(frozen=True)
class Device:
    """What tuning and dispatch know of a GPU."""

    name: str
    """Exact name, as the driver reports it; of a bare target, the architecture."""
    slug: str
    """File name of its tuned entries, as in `nvidia-h200`."""
    arch: str
    """Architecture, as in `sm_90`."""
    sms: int
    """Streaming multiprocessors; of a bare target, those of its commonest GPU."""
    shared_bytes: int
    """Shared memory that one block may opt in to, in bytes."""
    memory_gbps: float | None = None
    """Memory bandwidth of the data sheet in GB/s (1e9 bytes); None where it is not known."""


def slug_of(name: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


_KIB: Final = 1024
# architecture -> shared bytes per block (opt-in), SMs of its commonest GPU
_ARCHES: Final = {
    "sm_80": (163 * _KIB, 108),
    "sm_86": (99 * _KIB, 82),
    "sm_89": (99 * _KIB, 128),
    "sm_90": (227 * _KIB, 132),
    "sm_100": (227 * _KIB, 148),
    "sm_120": (99 * _KIB, 188),
}
# name as the driver reports it, architecture, SMs, GB/s, other names (after the prefixes that
# `_loose` drops)
_GPUS: Final = (
    ("NVIDIA A100-SXM4-80GB", "sm_80", 108, 2039.0, ("a100", "a100 80gb", "a100 sxm")),
    ("NVIDIA A100-SXM4-40GB", "sm_80", 108, 1555.0, ("a100 40gb",)),
    ("NVIDIA A100 80GB PCIe", "sm_80", 108, 1935.0, ("a100 pcie",)),
    ("NVIDIA A100-PCIE-40GB", "sm_80", 108, 1555.0, ("a100 40gb pcie",)),
    ("NVIDIA A30", "sm_80", 56, 933.0, ()),
    ("NVIDIA A10", "sm_86", 72, 600.0, ()),
    ("NVIDIA A10G", "sm_86", 80, 600.0, ()),
    ("NVIDIA A40", "sm_86", 84, 696.0, ()),
    ("NVIDIA RTX A6000", "sm_86", 84, 768.0, ("a6000",)),
    ("NVIDIA GeForce RTX 3090", "sm_86", 82, 936.0, ("3090",)),
    ("NVIDIA GeForce RTX 3090 Ti", "sm_86", 84, 1008.0, ("3090 ti",)),
    ("NVIDIA L4", "sm_89", 58, 300.0, ()),
    ("NVIDIA L40", "sm_89", 142, 864.0, ()),
    ("NVIDIA L40S", "sm_89", 142, 864.0, ()),
    ("NVIDIA RTX 6000 Ada Generation", "sm_89", 142, 960.0, ("rtx 6000 ada", "6000 ada")),
    ("NVIDIA GeForce RTX 4090", "sm_89", 128, 1008.0, ("4090",)),
    ("NVIDIA H100 80GB HBM3", "sm_90", 132, 3352.0, ("h100", "h100 sxm", "h100 sxm5")),
    ("NVIDIA H100 PCIe", "sm_90", 114, 2039.0, ()),
    ("NVIDIA H100 NVL", "sm_90", 132, 3938.0, ()),
    ("NVIDIA H200", "sm_90", 132, 4800.0, ("h200 sxm", "h200 141gb")),
    ("NVIDIA H200 NVL", "sm_90", 132, 4800.0, ()),
    ("NVIDIA GH200 480GB", "sm_90", 132, 4000.0, ("gh200", "gh200 96gb")),
    ("NVIDIA GH200 144G HBM3e", "sm_90", 132, 4900.0, ("gh200 144gb",)),
    ("NVIDIA B200", "sm_100", 148, 8000.0, ()),
    ("NVIDIA GB200", "sm_100", 152, 8000.0, ()),
    ("NVIDIA GeForce RTX 5080", "sm_120", 84, 960.0, ("5080",)),
    ("NVIDIA GeForce RTX 5090", "sm_120", 170, 1792.0, ("5090",)),
    (
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        "sm_120",
        188,
        1792.0,
        ("rtx pro 6000 blackwell", "rtx pro 6000", "pro 6000"),
    ),
    (
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "sm_120",
        188,
        1792.0,
        ("rtx pro 6000 blackwell max-q", "rtx pro 6000 max-q"),
    ),
    (
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "sm_120",
        188,
        1597.0,
        ("rtx pro 6000 blackwell server", "rtx pro 6000 server"),
    ),
)


def has_gpu() -> bool:
    """Whether torch sees an NVIDIA GPU here."""
    import torch

    return torch.version.hip is None and torch.cuda.is_available()


def present_device(index: int | None = None) -> Device:
    """The GPU number `index` of this process, by default torch's current one.

    Raises DeviceError where there is no NVIDIA GPU. The answer is remembered for each index.
    """
    import torch

    if index is None:
        initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if not initialized and not has_gpu():
            raise DeviceError(_no_gpu())
        index = torch.cuda.current_device()
    return _device_at(index)


@cache
def _device_at(index: int) -> Device:
    import torch

    if not has_gpu():
        raise DeviceError(_no_gpu())
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise DeviceError(
            f"GPU number {index} was asked for, but torch sees {count}, numbered from 0; "
            "check CUDA_VISIBLE_DEVICES"
        )
    found = torch.cuda.get_device_properties(index)
    arch = f"sm_{found.major}{found.minor}"
    shared = getattr(found, "shared_memory_per_block_optin", 0)
    slug = slug_of(found.name)
    known = _by_slug().get(slug)
    return Device(
        name=found.name,
        slug=slug,
        arch=arch,
        sms=found.multi_processor_count,
        shared_bytes=shared or _shared_bytes(arch),
        memory_gbps=known.memory_gbps if known else None,
    )


def _no_gpu() -> str:
    import torch

    if torch.version.hip is not None:
        reason = f"this torch {torch.__version__} is built for AMD, and only NVIDIA is supported"
    elif torch.version.cuda is None:
        reason = f"this torch {torch.__version__} is built without CUDA"
    else:
        reason = f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees none"
    return (
        f"no GPU is present: {reason}. Check nvidia-smi and CUDA_VISIBLE_DEVICES, or install a "
        "CUDA build of torch. What measures nothing (explain, generate, report, and a tune that "
        "predicts) takes a named GPU instead"
    )


def named_device(name: str) -> Device:
    """The GPU or bare architecture of that name; queries no GPU.

    Takes a slug (`nvidia-h200`), the driver's name, a loose one (`H100 PCIe`, `rtx 4090`), or a
    bare target (`sm_90`). Raises DeviceError for an unknown name.
    """
    wanted = _loose(name)
    found = _by_loose_name().get(wanted)
    if found is not None:
        return found
    # at 0.6, the usual, an MI300X is close to an RTX 3090; at 0.7 an H2000 still is to an H200
    near = difflib.get_close_matches(wanted, _by_loose_name(), n=3, cutoff=0.7)
    hint = ", ".join(dict.fromkeys(_by_loose_name()[x].slug for x in near))
    raise DeviceError(
        f"unknown GPU {name!r}{'; did you mean ' + hint + '?' if hint else '.'} "
        f"Give a bare target ({', '.join(_ARCHES)}) or one of NVIDIA's GPUs: "
        f"{', '.join(_by_slug())}"
    )


def known_device(name: str) -> Device | None:
    """Like `named_device`, but None for an unknown name."""
    return _by_loose_name().get(_loose(name))


def filed_device(name: str, arch: str, sms: int) -> Device:
    """The GPU that a tuned file is of, by what the file says: it may be one that no table lists."""
    slug = slug_of(name)
    known = _by_slug().get(slug)
    gbps = known.memory_gbps if known else None
    return Device(name, slug, arch, sms, _shared_bytes(arch), gbps)


def _shared_bytes(arch: str) -> int:
    return _ARCHES.get(arch, (48 * _KIB, 0))[0]


def is_name_of(name: str, gpu: str) -> bool:
    """Whether `name` is the driver's name `gpu`, a slug of it, or it but for spelling."""
    return _loose(name) == _loose(gpu)


def _loose(name: str) -> str:
    """Letters and digits only, without `nvidia` and `geforce`."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return letters.removeprefix("nvidia").removeprefix("geforce")


@cache
def _by_slug() -> dict[str, Device]:
    gpus = (
        Device(name, slug_of(name), arch, sms, _ARCHES[arch][0], gbps)
        for name, arch, sms, gbps, _ in _GPUS
    )
    return {gpu.slug: gpu for gpu in gpus}


@cache
def _by_loose_name() -> dict[str, Device]:
    names = {
        _loose(arch): Device(arch, arch, arch, sms, shared)
        for arch, (shared, sms) in _ARCHES.items()
    }
    for full_name, _, _, _, others in _GPUS:
        gpu = _by_slug()[slug_of(full_name)]
        for name in (full_name, *others):
            names[_loose(name)] = gpu
    return names


def toolchain() -> dict[str, str]:
    """Versions of what compiles and runs the kernels; what is not installed is left out.

    Keys: python, torch, triton, tilelang, ptxas (the one that Triton calls), driver. Imports none
    of them.
    """
    return dict(_toolchain())


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Those that are installed, without importing them."""
    versions = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


@cache
def _toolchain() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    versions |= versions_of(("torch", "triton", "tilelang"))
    for name, version in (("ptxas", _ptxas_version()), ("driver", _driver_version())):
        if version is not None:
            versions[name] = version
    return versions


def _ptxas_version() -> str | None:
    path = os.environ.get("TRITON_PTXAS_PATH")
    if not path:
        spec = util.find_spec("triton")
        if spec is None or spec.origin is None:
            return None
        path = str(Path(spec.origin).parent / "backends/nvidia/bin/ptxas")
    return _first_match([path, "--version"], r"\bV(\d[\d.]*)")


def _driver_version() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    match = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", text)
    if match is not None:
        return match[1]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _first_match(query, r"(\d[\d.]+)")


def _first_match(command: list[str], pattern: str) -> str | None:
    """First group of `pattern` in what `command` prints; None if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(pattern, done.stdout)
    return match[1] if match else None
