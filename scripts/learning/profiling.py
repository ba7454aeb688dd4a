"""What a GPU spends a step on: kernels by kind, the most expensive ones, and where it waits.

Kinds go by a kernel's name, and where that says nothing (elementwise passes) by torch's operation
that launched it. Replays of a CUDA graph have no such operation: their elementwise passes are one
kind.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from gdn2gen.base.terminal import Sheet

# The first that fits: of the kernel's name, of the operation that launched it, of the name again.
_BY_KERNEL: Final = (
    ("attention", r"flash|fmha|sdpa|cudnn::fusion"),
    ("optimizer", r"[Aa]dam|multi_tensor|lpnorm"),
    ("matmul", r"gemm|gemv|nvjet|cutlass|cublas|splitK|xmma"),
    ("loss", r"[Ss]oft[Mm]ax|nll_loss|[Cc]ross_?[Ee]ntropy"),
    ("recurrence and its parts", r"^\w+$"),  # Triton's and TileLang's: no template of C++
)
_BY_OPERATION: Final = (
    ("loss", r"softmax|nll_loss|cross_entropy"),
    ("optimizer", r"_foreach|_fused_adam"),
    ("casts and copies", r"::(_to_copy|copy_|to|contiguous|clone|cat|fill_|zero_)$"),
    ("norms", r"norm(?!al)"),
    ("embedding", r"embedding"),
    ("elementwise", r"^aten::"),
)
_BY_KERNEL_AGAIN: Final = (
    ("casts and copies", r"^Mem(cpy|set)|copy_kernel|CatArray|FillFunctor"),
    ("norms", r"norm|GammaBeta"),
    ("elementwise", r"elementwise"),
)
_ELSEWHERE: Final = "other kernels"
GAP_US: Final = 5.0
"""A shorter one is the GPU's own, from a kernel to the next."""


@dataclass(frozen=True)
class Ran:
    """A kernel or a copy on the GPU, in microseconds."""

    name: str
    start: float
    us: float
    operation: str = ""
    """That launched it, with the shapes it was given."""

    @property
    def kind(self) -> str:
        operation = self.operation.partition(" ")[0]
        asked = (_BY_KERNEL, self.name), (_BY_OPERATION, operation), (_BY_KERNEL_AGAIN, self.name)
        for table, name in asked:
            for kind, words in table:
                if re.search(words, name):
                    return kind
        return _ELSEWHERE


@dataclass
class Sum:
    launches: int = 0
    us: float = 0.0

    def add(self, ran: Ran) -> None:
        self.launches += 1
        self.us += ran.us


@dataclass(frozen=True)
class Seen:
    """One step."""

    ran: Sequence[Ran]
    launched_ms: float | None = None
    """How long the host took to launch all of it, without the profiler."""

    @property
    def span_us(self) -> float:
        """From the first to the last."""
        return max(x.start + x.us for x in self.ran) - min(x.start for x in self.ran)

    def gaps(self) -> list[tuple[float, Ran, Ran]]:
        """When nothing ran, between what and what; the longest first."""
        found: list[tuple[float, Ran, Ran]] = []
        last: Ran | None = None
        until = 0.0
        for x in sorted(self.ran, key=lambda x: x.start):
            if last is not None and x.start > until:
                found.append((x.start - until, last, x))
            if last is None or x.start + x.us >= until:
                last, until = x, x.start + x.us
        return sorted(found, key=lambda x: -x[0])

    def by(self, key: Callable[[Ran], str]) -> list[tuple[str, Sum]]:
        """Sums by a word, the most expensive first."""
        sums: dict[str, Sum] = {}
        for x in self.ran:
            sums.setdefault(key(x), Sum()).add(x)
        return sorted(sums.items(), key=lambda x: -x[1].us)

    def sheets(self, title: str, top: int) -> list[Any]:
        """What there is to print."""
        return [
            self._sums(f"{title}: kinds", "kind", self.by(lambda x: x.kind)),
            self._sums(f"{title}: operations", "operation", self.by(_operation)[:top]),
            self._sums(f"{title}: kernels", "kernel", self.by(lambda x: short(x.name))[:top]),
            self._idle(title),
        ]

    def _sums(self, title: str, what: str, sums: Iterable[tuple[str, Sum]]) -> Sheet:
        sheet = Sheet(title, (what, "launches", "ms", "of the step"), words=(what,))
        span = self.span_us
        for name, x in sums:
            sheet.add(name, str(x.launches), f"{x.us / 1e3:.3f}", f"{x.us / span:.1%}")
        return sheet

    def _idle(self, title: str) -> str:
        gaps = self.gaps()
        idle = sum(x for x, _, _ in gaps)
        long = [x for x in gaps if x[0] >= GAP_US]
        launched = "" if self.launched_ms is None else f"; launched in {self.launched_ms:.1f} ms"
        lines = [
            f"{title}: {self.span_us / 1e3:.2f} ms from the first of {len(self.ran)} launches to "
            f"the last{launched}; idle {idle / 1e3:.2f} ms, of which {len(long)} gaps of "
            f"{GAP_US:.0f} us and more are {sum(x for x, _, _ in long) / 1e3:.2f} ms"
        ]
        lines += [
            f"  {us:.0f} us between {short(x.name)} and {short(y.name)}" for us, x, y in long[:5]
        ]
        return "\n".join(lines)


def _operation(ran: Ran) -> str:
    return ran.operation or short(ran.name)


def short(name: str) -> str:
    """A kernel's name without what all of its kind have: namespaces, and most of what templates
    were made for."""
    for noise in ("void ", "at::native::", "(anonymous namespace)::", "at::", "c10::", "std::"):
        name = name.replace(noise, "")
    head, _, rest = name.partition("<")
    found = re.findall(r"[A-Za-z_]*(?:[Ff]unctor|_kernel)[A-Za-z_]*", rest)
    inner = f" {' '.join(dict.fromkeys(found))}" if found else ""
    return f"{head}{inner}"[:90]


def profiled(step: Callable[[], Any], *, shapes: bool = True) -> Seen:
    """One call of `step`, which was called before.

    Raises RuntimeError where nothing ran on a GPU.
    """
    launched = _launching(step)
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[kinds.CPU, kinds.CUDA], record_shapes=shapes
    ) as profile:
        step()
        torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = ran_in(events)
    if not found:
        raise RuntimeError("the profiler saw nothing run on a GPU")
    return Seen(found, launched)


def _launching(step: Callable[[], Any]) -> float:
    """Milliseconds until all of a step is launched on a GPU at rest."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    spent = time.perf_counter() - began
    torch.cuda.synchronize()
    return 1e3 * spent


_ON_GPU: Final = ("kernel", "gpu_memcpy", "gpu_memset")


def ran_in(events: Iterable[dict[str, Any]]) -> list[Ran]:
    """What ran on the GPU of a trace, with the innermost operation that launched it."""
    events = [*events]
    operations: dict[Any, tuple[float, str]] = {}
    for x in events:
        number = x.get("args", {}).get("External id")
        if x.get("cat") != "cpu_op" or number is None:
            continue
        given = [y for y in x["args"].get("Input Dims", []) if y]
        words = f"{x['name']} {' '.join(_shape(y) for y in given[:3])}".rstrip()
        # of two with one number the inner one
        if number not in operations or x["dur"] < operations[number][0]:
            operations[number] = (x["dur"], words)
    return [
        Ran(x["name"], x["ts"], x["dur"], _launcher(x, operations))
        for x in events
        if x.get("cat") in _ON_GPU
    ]


def _launcher(event: dict[str, Any], operations: dict[Any, tuple[float, str]]) -> str:
    number = event.get("args", {}).get("External id")
    return operations.get(number, (0.0, ""))[1]


def _shape(sizes: Any) -> str:
    """Of a tensor, or of a list of them."""
    if sizes and isinstance(sizes[0], list):
        return f"{len(sizes)}*"
    return "x".join(map(str, sizes))
