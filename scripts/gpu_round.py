"""What wants a GPU, in one command that ends in time: checks, searches and measurements.

    python scripts/gpu_round.py --list
    python scripts/gpu_round.py [--minutes 9] [--jobs 3] [--out DIR] STEP [STEP ...]

A STEP is a name of the list or a shell pattern ('check-*'), or a command of your own after a name:
'bench-256=gdn2gen bench --head-dim 256'. They begin in the order given, as many side by side as
--jobs says on each GPU of the host, for most of them wait for compilers; those that take times, or
much memory, have a GPU to themselves. What would not end before --minutes are over is cut off, what
has not begun is named as left. Each step's end is a line as it comes; in DIR stand `round.log`, all
that they printed, and `round.json`. Exit code 1 if a step failed, 3 if none did and some are left.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from gdn2gen.base.files import replace_file

ROOT: Final = Path(__file__).resolve().parent.parent
# Of plugins that a host happens to have at most xdist is loaded, where it is there: tests wait for
# compilers. tests/gpu prints failures as they happen, and so nothing of them at the end.
_PYTEST: Final = (
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python -m pytest -v --tb=short --no-summary "
    "--show-capture=no -p no:cacheprovider"
)
_SPREAD: Final = " -p xdist.plugin -n auto" if find_spec("xdist") else ""
_BESIDE: Final = f"{_PYTEST}{_SPREAD} -m 'gpu and not gpu_alone and not slow'"
_ALONE: Final = f"{_PYTEST} -m 'gpu_alone and not slow'"
_PEERS: Final = "gdn2gen bench --save --shapes"
# Each of them has its own context on the GPU, and imports all of torch.
_MOST_WORKERS: Final = 8
# What is begun with less than this left to it would only be cut off.
LEAST_S: Final = 20.0


@dataclass(frozen=True)
class Step:
    """One command: in words of a shell, after what it has in its environment (NAME=VALUE), and
    whether it must have a GPU to itself."""

    name: str
    command: str
    alone: bool = False
    least_s: float = LEAST_S


def _checks() -> list[Step]:
    """One step a file of tests, and those of each that must be alone."""
    steps = []
    for path in sorted((ROOT / "tests/gpu").glob("test_*_gpu.py")):
        name = path.stem.removeprefix("test_").removesuffix("_gpu").replace("_", "-")
        shown = path.relative_to(ROOT).as_posix()
        steps.append(Step(f"check-{name}", f"{_BESIDE} {shown}"))
        if "gpu_alone" in path.read_text():
            steps.append(Step(f"alone-{name}", f"{_ALONE} {shown}", alone=True))
    return steps


def steps() -> list[Step]:
    """All that are known by name."""
    made = _checks()
    scalar = ("gated_delta_rule", "delta_rule", "simple_gla", "gla")
    for op in ("gdn2", "kda", *scalar):
        made += [
            Step(f"verify-{op}", f"gdn2gen verify --op {op}"),
            Step(
                f"tune-{op}",
                f"gdn2gen tune --op {op} --head-dim 128 --shapes train4k --budget 3",
                True,
                60.0,
            ),
            Step(f"bench-{op}", f"{_PEERS} train2k,train4k,long32k --op {op} --vs fla", True, 60.0),
            Step(f"host-{op}", f"python scripts/host_time.py --op {op}", True),
            Step(f"decode-{op}", f"python scripts/decode_time.py --save --op {op}", True),
        ]
    for op in ("gdn2", "kda"):
        strong = f"--op {op} --head-dim 128 --decay strong"
        tune = f"gdn2gen tune {strong} --shapes train4k --budget 3"
        made += [
            Step(f"tune-strong-{op}", tune, True, 60.0),
            Step(f"bench-strong-{op}", f"{_PEERS} train4k {strong} --vs fla", True, 60.0),
        ]
    wide = "--head-dim 128,64"
    for op in ("mamba2", "mamba3"):
        bench = f"{_PEERS} mamba4k --op {op} {wide} --vs mamba_ssm"
        made += [
            Step(f"verify-{op}", f"gdn2gen verify --op {op} {wide}"),
            Step(f"tune-{op}", f"gdn2gen tune --op {op} --budget 3", True, 60.0),
            Step(f"bench-{op}", bench, True, 60.0),
        ]
    made.append(Step("decode-mamba2", "python scripts/decode_time.py --save --op mamba2", True))
    apart = "GDN2GEN_BOUND=0"
    for name in ("graphs", "packed", "recurrent", "bits", "faults", "torch"):
        made.append(Step(f"unbound-{name}", f"{apart} {_BESIDE} tests/gpu/test_{name}_gpu.py"))
    made += [
        Step("host-unbound", f"{apart} python scripts/host_time.py", True),
        Step("decode-unbound", f"{apart} python scripts/decode_time.py", True),
        Step("learn-recall", "python scripts/recall.py train --rows runs/recall --minutes 8", True),
        Step("learn-repeat", "python scripts/recall.py repeat --rows runs/recall", True, 180.0),
        Step("learn-text", "python scripts/text.py train --rows runs/text --minutes 8", True),
        Step("time-mamba3", "python scripts/mamba3_time.py", True, 60.0),
        Step("time-prefill", "python scripts/prefill_time.py", True, 30.0),
        Step("time-invariant", "python scripts/invariant_time.py", True, 30.0),
        Step("time-layers", "python scripts/layer_time.py --save", True, 60.0),
        Step(
            "model-speed",
            "python scripts/model_speed.py --vs fla --save --minutes 2",
            True,
            60.0,
        ),
        Step("sweep-layers", "python scripts/layer_time.py --sweep", True, 60.0),
        Step("head-dims-ours", "python scripts/head_dims.py ours", True, 60.0),
        Step("head-dims-compile", "python scripts/head_dims.py compile 96 160 192 256"),
        Step("head-dims-fla", "python scripts/head_dims.py measure 96 160 192 256", True, 120.0),
        Step("head-dims-transfer", "python scripts/head_dims.py transfer 192 256 128,64", True),
    ]
    return made


def chosen(words: Sequence[str], known: Sequence[Step]) -> list[Step]:
    """The steps that words name, in their order, each once; SystemExit where one names none."""
    found: dict[str, Step] = {}
    for word in words:
        name, given, command = word.partition("=")
        if given:
            found.setdefault(name, Step(name, command, alone=True))
            continue
        named = [step for step in known if fnmatch.fnmatchcase(step.name, name)]
        if not named:
            raise SystemExit(f"no step is called {name!r}: --list names those that there are")
        for step in named:
            found.setdefault(step.name, step)
    return list(found.values())


@dataclass
class Ended:
    """How a step ended: its exit code, or None where it was cut off or never began."""

    name: str
    code: int | None
    seconds: float
    last: str


@dataclass
class Round:
    """Steps on the GPUs of one host until a deadline."""

    waiting: list[Step]
    gpus: list[str]
    jobs: int
    deadline: float
    out: Path
    ended: list[Ended] = field(default_factory=list)
    _running: dict[str, int] = field(default_factory=dict)
    _alone: set[str] = field(default_factory=set)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def run(self) -> None:
        """All of them; in the order given, but for those that must wait for a GPU of their own."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "round.log").write_text("")
        threads = []
        with self._changed:
            while self.waiting:
                begun = self._next()
                if begun is None:
                    left = self.deadline - time.monotonic()
                    if all(step.least_s > left for step in self.waiting):
                        break
                    self._changed.wait(timeout=1.0)
                    continue
                thread = threading.Thread(target=self._run_one, args=begun)
                threads.append(thread)
                thread.start()
        for thread in threads:
            thread.join()
        for step in self.waiting:
            self._end(Ended(step.name, None, 0.0, "left: no time"), "")

    def _next(self) -> tuple[Step, str] | None:
        """The first step that some GPU is free for, taken from those that wait."""
        left = self.deadline - time.monotonic()
        held = set()  # a step that wants a GPU alone keeps what comes after it from the freest
        for step in self.waiting:
            if step.least_s > left:
                continue
            open_ = [x for x in self.gpus if x not in self._alone and x not in held]
            if not open_:
                return None
            gpu = min(open_, key=lambda x: self._running.get(x, 0))
            busy = self._running.get(gpu, 0)
            if busy and step.alone:
                held.add(gpu)
                continue
            if busy >= self.jobs:
                continue
            self.waiting.remove(step)
            self._running[gpu] = busy + 1
            if step.alone:
                self._alone.add(gpu)
            return step, gpu
        return None

    def _workers(self) -> int:
        """Processes of one step, so that all have a core where as many steps run as may."""
        cores = len(os.sched_getaffinity(0))
        return max(1, min(_MOST_WORKERS, cores // (self.jobs * len(self.gpus))))

    def _run_one(self, step: Step, gpu: str) -> None:
        began = time.monotonic()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"}
        environment["PYTEST_XDIST_AUTO_NUM_WORKERS"] = str(self._workers())
        words = shlex.split(step.command)
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if words[0] in ("python", "gdn2gen"):
            words[:1] = [sys.executable, *(["-m", "gdn2gen"] if words[0] == "gdn2gen" else [])]
        # by a shell's exec, which says 127 of a program that is not there; in a process group of
        # its own, so that what it started ends with it
        process = subprocess.Popen(
            ["/bin/sh", "-c", 'exec "$@"', "sh", *words],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=max(1.0, self.deadline - began))
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            printed, code = process.communicate()[0], None
        lines = printed.strip().splitlines() or [""]
        seconds = time.monotonic() - began
        with self._changed:
            self._end(Ended(step.name, code, round(seconds, 1), lines[-1].strip()), printed)
            self._running[gpu] -= 1
            self._alone.discard(gpu)
            self._changed.notify()

    def _end(self, ended: Ended, printed: str) -> None:
        self.ended.append(ended)
        code = "cut off" if ended.code is None else f"exit {ended.code}"
        print(f"{ended.name:24} {code:8} {ended.seconds:7.1f} s  {ended.last[:100]}", flush=True)
        with (self.out / "round.log").open("a") as log:
            log.write(f"===== {ended.name}: {code}, {ended.seconds} s\n{printed}\n")
        replace_file(self.out / "round.json", json.dumps([asdict(x) for x in self.ended], indent=1))


def _gpus() -> list[str]:
    """CUDA's numbers of the host's GPUs, those that the environment shows."""
    import torch

    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return shown.split(",")[:count] if shown else [str(x) for x in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the steps and their commands")
    parser.add_argument("--minutes", type=float, default=9.0, help="when all must have ended (9)")
    parser.add_argument("--jobs", type=int, default=3, help="steps at once on a GPU (3)")
    parser.add_argument("--out", type=Path, default=Path("gpu_round"), help="(gpu_round/)")
    parser.add_argument("steps", nargs="*", metavar="STEP")
    arguments = parser.parse_args()
    if arguments.list or not arguments.steps:
        for step in steps():
            print(f"{step.name:24} {'alone' if step.alone else '':6} {step.command}")
        return
    named = chosen(arguments.steps, steps())
    gpus = _gpus()
    if not gpus:
        raise SystemExit("no GPU was found: torch.cuda.device_count() is 0")
    deadline = time.monotonic() + 60.0 * arguments.minutes
    round_ = Round(named, gpus, arguments.jobs, deadline, arguments.out)
    round_.run()
    failed = [x for x in round_.ended if x.code]
    left = [x for x in round_.ended if x.code is None]
    raise SystemExit(1 if failed else 3 if left else 0)


if __name__ == "__main__":
    main()
