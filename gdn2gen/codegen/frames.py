"""A pass's launches as the driver takes them: a call writes where its tensors lie, and no more.

Triton's launcher packs every argument of every launch, and TileLang's programs take torch's tensors
one by one: 5 to 14 us a launch, of which the driver's part is 2. What does not change from call to
call (kernels, grids, scalars, shapes) lies ready here in the form that is handed on: parameters of
`cuLaunchKernelEx`, those of TileLang's kernels with their tensor maps (`_recorded`), or arguments
of tvm-ffi's C functions, whose tensors are DLTensors. Addresses have one place each, which all
launches of the pass point at, and one in each tensor map.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from gdn2gen.base.environment import binds_launches
from gdn2gen.codegen._frame import CODES, Frame
from gdn2gen.codegen._ready import ADDRESS, Described, Kernel, Launch, Program, ready
from gdn2gen.codegen._recorded import recorded

__all__ = ["ADDRESS", "Described", "Frame", "Frames", "Launch"]


class Frames:
    """The frames of a pass, one for each thread that runs it."""

    def __init__(
        self, launches: Sequence[Kernel | Program], tensors: Sequence[Described], device: int
    ) -> None:
        self._launches, self._tensors, self._device = launches, tensors, device
        self._of_thread = threading.local()

    @classmethod
    def of(
        cls,
        launches: Sequence[Launch],
        tensors: Sequence[Described],
        device: int,
        compiled: Any = None,
    ) -> Frames | None:
        """None where one of them has to go through its own launcher, or all do, as the environment
        says. `compiled` is what was, if their kernels do not know it."""
        if not binds_launches() or any(x.dtype not in CODES for x in tensors):
            return None
        found: list[Kernel | Program] = []
        for launch in launches:
            if 0 in launch.grid:  # Triton's launcher leaves it out, and the driver refuses it
                continue
            known = ready(launch, device, compiled)
            if known is None:
                return None
            if isinstance(known, Program):
                found += recorded(known, tensors, device)
            else:
                found.append(known)
        return cls(found, tensors, device)

    def take(self) -> Frame | None:
        """This thread's frame, to be given back. None the first time that a thread asks, which has
        to go another way: Triton's launcher and TileLang's programs give a thread its context. And
        None while it is taken: a finaliser may call in the middle of a call."""
        own = self._of_thread.__dict__
        frame: Frame | None = own.pop("frame", None)
        if frame is None:
            asked = own["asked"] = own.get("asked", 0) + 1
            if asked == 2:
                return Frame(self._launches, self._tensors, self._device)
        return frame

    def give(self, frame: Frame) -> None:
        self._of_thread.__dict__["frame"] = frame
