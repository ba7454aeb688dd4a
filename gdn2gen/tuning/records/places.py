"""Where the records of a GPU lie in the cache folder: its studies, its ledger, its findings."""

from __future__ import annotations

from pathlib import Path

from gdn2gen.base.device import Device, toolchain
from gdn2gen.base.paths import cache_dir
from gdn2gen.tuning.records.ledger import Ledger, read_ledger


def open_ledger(op: str, device: Device) -> Ledger:
    """The ledger of this GPU under the present toolchain."""
    path = cache_dir() / "ledger" / op / f"{device.slug}.jsonl"
    return Ledger(path, device.name, _versions())


def ledgers(op: str) -> list[Ledger]:
    """The ledgers of all GPUs that were tuned for here, under the present toolchain."""
    found = []
    for path in sorted((cache_dir() / "ledger" / op).glob("*.jsonl")):
        gpus = {refusal.gpu for refusal in read_ledger(path)}
        found += [Ledger(path, gpu, _versions()) for gpu in sorted(gpus)]
    return found


def _versions() -> dict[str, str]:
    """The toolchain, without Python's own version, which changes no kernel."""
    return {name: version for name, version in toolchain().items() if name != "python"}


def storage_path(op: str, device: Device) -> Path:
    """Where the searches of a GPU lie unless a storage is named."""
    return cache_dir() / "studies" / f"{op}-{device.slug}.journal"


def findings_path(op: str, device: Device) -> Path:
    """Where the findings of searches without a GPU lie."""
    return cache_dir() / "studies" / f"{op}-{device.slug}.predicted.jsonl"
