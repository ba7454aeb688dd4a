"""Where a stage's kernels spend their time: Nsight Compute's samples, by reason and by place.

    python scripts/stage_profile.py gdn2 train4k whole forward grad_key:language=tilelang,chunks=16
    python scripts/stage_profile.py --read DIR [--top 15]    # what was measured before, once more

Words as in stage_times.py. Each stage's launch is compiled first and then profiled by `ncu` in a
process of its own, on the operands of a pass; DIR (--out, or a new folder of the system's) has its
page of details and the lines of its compiled text with their samples. Of each kernel are printed:
how often a scheduler issued, its text and how much of it ran, what its warps waited for, and the
places between two meetings (barriers, waits, branches) that most samples are from.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

from stage_times import one_shape, problem_of, recipes, stage_call  # noqa: E402

from gdn2gen.base.device import present_device  # noqa: E402

_NCU: Final = ("ncu", "--clock-control", "none", "--set", "full", "--profile-from-start", "off")
_LINES: Final = "lines.csv"
# Where warps may wait for others or for what they began, or go elsewhere: one place ends there.
_MEETING: Final = re.compile(r"\b(BAR|WARPSYNC|SYNCS|DEPBAR|BRA|BSYNC|EXIT)\b")
_BYTES: Final = 16  # of an instruction


@dataclass(frozen=True)
class Line:
    """An instruction: its samples by what the warp waited for, and how often warps executed it."""

    text: str
    executed: int
    reasons: Counter[str]

    @property
    def samples(self) -> int:
        return self.reasons.total()


@dataclass(frozen=True)
class Place:
    """Instructions from one meeting to the next, by their numbers in the text."""

    first: int
    lines: tuple[Line, ...]

    @property
    def reasons(self) -> Counter[str]:
        return sum((x.reasons for x in self.lines), Counter())


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("given", nargs="*", metavar="WORD", help="member, shape, plan, stages")
    parser.add_argument("--top", type=int, default=12, help="places shown of a kernel (12)")
    parser.add_argument("--out", type=Path, help="where what was measured is kept")
    parser.add_argument("--read", type=Path, metavar="DIR", help="print what is there")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.read is not None:
        return _print(args.read, args.top)
    if len(args.given) < 4:
        parser.error("give a member, a shape, a plan and stages, or --read DIR")
    if args.launch:
        _launch(*args.given)
        return 0
    out = args.out or Path(tempfile.mkdtemp(prefix="stage_profile_"))
    for i, stage in enumerate(args.given[3:]):
        folder = out / f"{i}-{stage.partition(':')[0]}"
        folder.mkdir(parents=True, exist_ok=True)
        if not _measure([*args.given[:3], stage], folder):
            return 1
    print(f"kept in {out}")
    return _print(out, args.top)


def _launch(member: str, shape: str, plan: str, *stages: str) -> None:
    """The pass once, and then each stage alone where a profiler looks."""
    import torch

    from gdn2gen.base.environment import verifying

    with verifying():
        for stage, recipe in recipes(problem_of(member), plan, stages, present_device().arch):
            call = stage_call(recipe, stage, one_shape(shape))
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def _measure(given: Sequence[str], folder: Path) -> bool:
    """Profile one stage; what `ncu` has of it comes into the folder. False if that failed."""
    launch = [sys.executable, __file__, "--launch", *given]
    report = folder / "report"
    commands = (
        (launch, None),  # compiles, which under ncu would take as long again
        ([*_NCU, "-f", "-o", str(report), *launch], None),
        (["ncu", "--import", f"{report}.ncu-rep", "--page", "details"], folder / "details.txt"),
        (["ncu", "--import", f"{report}.ncu-rep", "--page", "source", "--csv"], folder / _LINES),
    )
    for command, kept in commands:
        try:
            ran = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            print(f"there is no {command[0]} here: it comes with CUDA, as Nsight Compute")
            return False
        if ran.returncode:
            print("\n".join((ran.stdout + ran.stderr).splitlines()[-8:]))
            return False
        if kept is not None:
            kept.write_text(ran.stdout)
    return True


def kernels(text: str) -> Iterator[tuple[str, list[Line]]]:
    """Name and lines of each kernel on a page `source` that `ncu` wrote as CSV."""
    name, columns, lines = "", list[str](), list[Line]()
    for row in csv.reader(text.splitlines()):
        if row[:1] == ["Kernel Name"]:
            if name:
                yield name, lines
            name, columns, lines = row[1], [], []
        elif name and not columns:
            columns = row
        elif name and len(row) == len(columns):
            lines.append(_line(dict(zip(columns, row, strict=True))))
    if name:
        yield name, lines


def _line(row: dict[str, str]) -> Line:
    reasons = {
        column.removeprefix("stall_"): int(value or 0)
        for column, value in row.items()
        if column.startswith("stall_") and not column.endswith("(Not Issued)")
    }
    executed = int(row["Instructions Executed"] or 0)
    return Line(row["Source"].strip(), executed, Counter({x: n for x, n in reasons.items() if n}))


def places(lines: Sequence[Line]) -> list[Place]:
    """The text cut after each meeting."""
    found, first = [], 0
    for i, line in enumerate(lines):
        if _MEETING.search(line.text) or i + 1 == len(lines):
            found.append(Place(first, tuple(lines[first : i + 1])))
            first = i + 1
    return found


def summary(name: str, lines: Sequence[Line], top: int) -> list[str]:
    """What is printed of a kernel."""
    samples = max(1, sum(x.samples for x in lines))
    ran = [x for x in lines if x.executed]
    executed = sum(x.executed for x in lines)
    told = [
        f"{name}: {samples} samples, {executed / 1e6:.1f} million instructions of warps; "
        f"{len(lines)} lines of text, {len(ran)} of them ({len(ran) * _BYTES / 1024:.0f} KB) run",
        f"  of warps' time: {_shares(sum((x.reasons for x in lines), Counter()), samples, 8)}",
    ]
    for place in sorted(places(lines), key=lambda x: -x.reasons.total())[:top]:
        here = place.reasons
        if here.total() * 100 < samples:
            break
        most = max(place.lines, key=lambda x: x.samples)
        last = place.first + len(place.lines) - 1
        told.append(
            f"  {here.total() / samples:5.1%}  lines {place.first} to {last}: "
            f"{_shares(here, here.total(), 3)}; most at `{most.text}`"
        )
    return told


def _shares(reasons: Counter[str], total: int, most: int) -> str:
    return ", ".join(f"{x} {n / total:.0%}" for x, n in reasons.most_common(most))


def _print(out: Path, top: int) -> int:
    found = sorted(out.rglob(_LINES))
    if not found:
        print(f"{out} has no {_LINES}, which a run of this script leaves there")
        return 1
    for path in found:
        for name, lines in kernels(path.read_text()):
            print("\n".join(summary(name, lines, top)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
