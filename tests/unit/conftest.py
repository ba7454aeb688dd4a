"""What tests share that run kernels in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from source_tree import python_path

from gdn2gen.base.outcome import Outcome
from gdn2gen.base.worker import Worker


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Calls `module:function` of tests/support, in one process where kernels are interpreted; each
    finds nothing that others left there."""
    worker = Worker(
        {
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": python_path(),
            "GDN2GEN_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
            "OMP_NUM_THREADS": "1",
        }
    )

    # what it has imported stays, and is not looked through for garbage
    assert worker.call("interpreting:prepare", timeout=120).ok

    def call(name: str, *args: Any) -> Any:
        outcome: Outcome[Any] = worker.call("interpreting:alone", name, *args, timeout=300)
        assert outcome.ok, outcome.reason
        return outcome.get()

    yield call
    worker.close()


@pytest.fixture(params=["reference", "kernels"])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls a function of the test module's CHECKS, here or where kernels are interpreted."""
    checks = request.module.CHECKS
    if request.param == "reference":
        return lambda name, *given: getattr(checks, name)(*given)
    interpreter: Callable[..., Any] = request.getfixturevalue("interpreter")
    return lambda name, *given: interpreter(f"{checks.__name__}:{name}", *given)
