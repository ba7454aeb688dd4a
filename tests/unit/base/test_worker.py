"""Workers survive what their children do: crashes, hangs, errors, lost parents."""

from __future__ import annotations

import time

import pytest

from gdn2gen.base import _serve, outcome
from gdn2gen.base.worker import CompilePool, Worker


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


def test_calls_return_values_from_one_process(worker):
    first = worker.call("os:getpid", timeout=60)
    second = worker.call("os:getpid", timeout=60)
    assert first.ok and first.value == second.value
    assert worker.starts == 1


def test_a_crash_is_reported_with_its_signal_and_survived(worker):
    crashed = worker.call("os:abort", timeout=60)
    assert crashed.status == outcome.CRASHED
    assert "signal 6" in crashed.reason
    assert worker.call("os:getpid", timeout=60).ok
    assert worker.starts == 2


def test_an_exit_is_reported_with_its_code(worker):
    assert "exit code 7" in worker.call("os:_exit", 7, timeout=60).reason


def test_a_hang_ends_at_its_time_limit(worker):
    assert worker.call("os:getpid", timeout=60).ok
    started = time.monotonic()
    hung = worker.call("time:sleep", 600, timeout=0.5)
    assert time.monotonic() - started < 20
    assert hung.status == outcome.TIMEOUT
    assert "0.5 s" in hung.reason
    assert worker.call("os:getpid", timeout=60).ok


def test_an_exception_keeps_the_process(worker):
    pid = worker.call("os:getpid", timeout=60).value
    failed = worker.call("operator:truediv", 1, 0, timeout=60)
    assert failed.status == outcome.ERROR
    assert "ZeroDivisionError" in failed.reason
    assert worker.call("os:getpid", timeout=60).value == pid


def test_a_reply_that_cannot_be_sent_is_an_error(worker):
    assert worker.call("threading:Lock", timeout=60).status == outcome.ERROR
    assert worker.call("os:getpid", timeout=60).ok


def test_a_closed_worker_cancels():
    worker = Worker()
    worker.close()
    assert worker.call("os:getpid", timeout=60).status == outcome.CANCELLED


def test_a_pool_loses_only_the_request_that_crashed():
    pool = CompilePool(2)
    try:
        crash = pool.submit("os:abort", timeout=60)
        others = [pool.submit("os:getpid", timeout=60) for _ in range(3)]
        assert crash.result(60).status == outcome.CRASHED
        assert all(other.result(60).ok for other in others)
    finally:
        pool.close()


def test_closing_a_pool_does_not_wait_for_a_hang():
    pool = CompilePool(1)
    hung = pool.submit("time:sleep", 600, timeout=600)
    time.sleep(0.5)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 20
    assert hung.result(20).status == outcome.CANCELLED


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), outcome.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: an illegal memory access"), outcome.CUDA_ERROR),
        (RuntimeError("Triton Error [CUDA]: misaligned address"), outcome.CUDA_ERROR),
        (RuntimeError("out of resource: shared memory, Required: 300000"), outcome.RESOURCES),
        (RuntimeError("Failed to set the allowed dynamic shared memory size"), outcome.RESOURCES),
        (ValueError("no such thing"), outcome.ERROR),
    ],
)
def test_exceptions_are_sorted_by_what_must_follow(error, status):
    assert _serve.classify(error) == status


def test_a_build_error_is_told_from_other_errors():
    from gdn2gen.base.errors import BuildError

    assert _serve.classify(BuildError("does not compile")) == outcome.BUILD_ERROR
