"""Worker: a process of its own for requests that may crash or hang, and a pool of them to compile.

A worker that dies or overruns its time limit costs its request, not the study: the outcome says
what happened, and the next request starts a fresh process.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from gdn2gen.base import outcome
from gdn2gen.base.errors import TuneError
from gdn2gen.base.outcome import Outcome

_KILL_SECONDS: Final = 30.0
_LOG_TAIL: Final = 4000


class Worker:
    """One child process, started at the first call and again after it was lost.

    Calls are answered one at a time; `close` may come from any thread and ends a call in flight.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._env = dict(env or {})
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self._closed = False
        self.starts = 0

    def call(self, target: str, *args: Any, timeout: float) -> Outcome[Any]:
        """Run `module:function` with `args` in the child; at most `timeout` seconds.

        Never raises for what the function does. Raises TuneError if a stuck child cannot be killed.
        """
        with self._lock:
            if self._closed:
                return Outcome(outcome.CANCELLED, detail="the worker is closed")
            connection = self._started()
            try:
                connection.send((target, args))
                if not connection.poll(timeout):
                    self._stop()
                    if self._closed:
                        return Outcome(outcome.CANCELLED, detail="the worker was closed")
                    return Outcome(outcome.TIMEOUT, detail=f"no answer within {timeout:g} s")
                status, value, detail = connection.recv()
            except (EOFError, OSError):
                return self._lost()
            if status == outcome.CUDA_ERROR:
                self._stop()
            return Outcome(status, value, detail)

    def close(self) -> None:
        """Kill the child; a call in flight returns as cancelled."""
        self._closed = True
        process = self._process
        if process is not None:
            _kill(process)
        with self._lock:
            self._stop()
            self._log.close()

    def _started(self) -> Connection:
        if self._connection is not None and self._process is not None:
            if self._process.poll() is None:
                return self._connection
            self._stop()
        here, there = Pipe()
        self._log.seek(0)
        self._log.truncate()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gdn2gen.base._serve", str(there.fileno())],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=_environment(self._env),
                start_new_session=True,
            )
        finally:
            there.close()
        self._connection = here
        self.starts += 1
        return self._connection

    def _lost(self) -> Outcome[Any]:
        """The pipe broke: say how the child ended, with the last of what it printed."""
        process = self._process
        assert process is not None
        try:
            code = process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _LOG_TAIL))
        words = self._log.read().decode(errors="replace").strip().splitlines()
        self._stop()
        if self._closed:
            return Outcome(outcome.CANCELLED, detail="the worker was closed")
        if code is None:
            ending = "the pipe closed"
        else:
            ending = f"signal {-code}" if code < 0 else f"exit code {code}"
        return Outcome(outcome.CRASHED, detail=": ".join([ending, *_telling(words)]))

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            _kill(self._process)
            try:
                self._process.wait(_KILL_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise TuneError(
                    f"worker {self._process.pid} could not be killed within {_KILL_SECONDS:g} s: "
                    "its kernel hangs in the driver; reset the GPU, then start the same command "
                    "again, which resumes the study"
                ) from error
            self._process = None


class CompilePool:
    """Workers that answer in parallel: a compiler that aborts takes only its own request along."""

    def __init__(self, slots: int, env: Mapping[str, str] | None = None) -> None:
        # Many processes that each start a thread per core only get in each other's way.
        environment = {"OMP_NUM_THREADS": "1", **(env or {})}
        self._workers = [Worker(environment) for _ in range(slots)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(slots, thread_name_prefix="compile")
        self.slots = slots

    def submit(self, target: str, *args: Any, timeout: float) -> Future[Outcome[Any]]:
        """Queue a call of `module:function`; the time limit counts from its own start."""
        return self._threads.submit(self._call, target, args, timeout)

    def _call(self, target: str, args: tuple[Any, ...], timeout: float) -> Outcome[Any]:
        worker = self._idle.get()
        try:
            return worker.call(target, *args, timeout=timeout)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Drop what is queued and kill what runs."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True)


def compile_slots() -> int:
    """Processes to compile in: all cores but two (the tuner and the GPU's worker), at least 1."""
    return max(1, len(os.sched_getaffinity(0)) - 2)


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    package_parent = str(Path(__file__).resolve().parents[2])
    paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **extra}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the child with everything it started (ptxas among them)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()


def _telling(lines: list[str]) -> list[str]:
    """The line of a crash log that says most: an assertion or a fatal error, else the last."""
    for line in lines:
        if any(word in line for word in ("Assertion", "LLVM ERROR", "Fatal", "CUDA error")):
            return [line.strip()[:300]]
    return [lines[-1].strip()[:300]] if lines else []
