"""Bytes of the Python that runs this: its standard library and the packages that are installed.

A corpus that every machine has, though not the same one: rows say its size and digest, and only
those of one digest are compared. Files go in the order of a digest of their names, so that what is
held out, one file in twenty, is of all packages alike.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

VOCABULARY: Final = 256
_END: Final = b"\0"
"""After each file."""
_HELD_OUT: Final = 20
"""One file in so many."""


@dataclass(frozen=True)
class Corpus:
    """Bytes as uint8 tensors on the device."""

    train: Tensor
    held_out: Tensor
    files: int
    digest: str

    def windows(self, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets [count, length] int64, from anywhere in what is trained on."""
        generator = torch.Generator(self.train.device).manual_seed(seed)
        starts = torch.randint(
            len(self.train) - length, (count, 1), device=self.train.device, generator=generator
        )
        return self._cut(self.train, starts, length)

    def held_out_windows(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """The same of what is held out, evenly spread and always the same ones."""
        most = len(self.held_out) - length - 1
        starts = torch.linspace(0, most, count, dtype=torch.float64).long()[:, None]
        return self._cut(self.held_out, starts.to(self.held_out.device), length)

    def _cut(self, of: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
        places = starts + torch.arange(length + 1, device=of.device)
        rows = of[places].long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def collect(
    device: torch.device | str, most: int = 64 * 2**20, folders: dict[str, Path] | None = None
) -> Corpus:
    """Python files below `folders` (by default of this Python), at most `most` bytes of them.

    Raises ValueError where they do not make two windows.
    """
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    taken, digest, files = 0, hashlib.sha256(), 0
    for name, path in _files(_folders() if folders is None else folders):
        if taken >= most:
            break
        text = path.read_bytes()
        held_out = int.from_bytes(name[:8], "big") % _HELD_OUT == 0
        parts[held_out].append(text + _END)
        digest.update(text + _END)
        taken, files = taken + len(text) + 1, files + 1
    if not parts[False] or not parts[True]:
        raise ValueError(f"{files} Python files are no corpus: give folders that have more")
    train, rest = (
        torch.frombuffer(bytearray(b"".join(parts[x])), dtype=torch.uint8).to(device)
        for x in (False, True)
    )
    return Corpus(train, rest, files, digest.hexdigest()[:16])


def _folders() -> dict[str, Path]:
    return {name: Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")}


def _files(folders: dict[str, Path]) -> Iterator[tuple[bytes, Path]]:
    """Each file once, in the order of what its name below its folder hashes to."""
    found: dict[bytes, Path] = {}
    roots = {str(folder) for folder in folders.values()}
    for kind, folder in folders.items():
        for root, inner, names in os.walk(folder):
            # packages lie below the standard library's folder in some installations
            inner[:] = [x for x in inner if os.path.join(root, x) not in roots]
            for name in names:
                if name.endswith(".py"):
                    path = Path(root, name)
                    named = f"{kind}/{path.relative_to(folder).as_posix()}"
                    found[hashlib.sha256(named.encode(errors="surrogateescape")).digest()] = path
    return iter(sorted(found.items()))
