"""Training runs as CUDA graphs beside each other on streams, and what is watched of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from script_module import load_script

recall = load_script("recall")
models, training = (importlib.import_module(f"learning.{x}") for x in ("models", "training"))

pytestmark = pytest.mark.gpu
EXPERIMENT = replace(recall.FULL, steps=60, batch=8)
TASK = EXPERIMENT.tasks["mqar"]


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _trainer(model: str, seed: int = 0, **options: Any) -> Any:
    made = recall._trainer(EXPERIMENT, TASK, model, 2e-3, seed)
    made._wants_graph = options.get("graph", True)
    return made


@pytest.mark.parametrize("model", [*models.MIXERS, *models.ABLATIONS])
def test_a_graph_is_the_run(model: str, deterministic: None) -> None:
    """Bit for bit as one kernel after another; no alarm is raised."""
    eager, graph = _trainer(model, graph=False), _trainer(model)
    for trainer in (eager, graph):
        training.train([trainer])
    assert (eager.launched, graph.launched) == ("eager", "graph")
    assert graph.digest() == eager.digest()
    assert graph.seen()["alarms"] == [] and graph.losses[-1][1] < graph.losses[0][1]


def test_runs_beside_each_other(deterministic: None) -> None:
    alone = _trainer("gdn2", 2)
    training.train([alone])
    several = [_trainer("gdn2", seed) for seed in (0, 1, 2)]
    training.train(several)
    assert several[2].digest() == alone.digest() != several[0].digest()


def test_rows_are_made_on_the_gpu() -> None:
    one, again = (TASK.rows(4, 1, "cuda") for _ in range(2))
    assert all(x.is_cuda and torch.equal(x, y) for x, y in zip(one, again, strict=True))
    assert sys.modules["learning.tasks"].IGNORED in one[1]
