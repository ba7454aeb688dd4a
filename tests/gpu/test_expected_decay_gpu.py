"""On a GPU, and in its graphs, a call runs what is on file for the decay that it expects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gdn2gen
from gdn2gen.base.device import present_device
from gdn2gen.codegen.digests import templates_of
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.accuracy import inputs_of
from gdn2gen.store import tuned_files
from gdn2gen.store._claims import always_checked
from gdn2gen.store.dispatch import forced_recipe

pytestmark = pytest.mark.gpu

PROBLEM = Problem(K=64, V=64)
SHAPE = Shape("few", 2, 512, 4)
RECIPES = {"weak": Recipe.default(PROBLEM, BT=32), "strong": Recipe.default(PROBLEM, BT=16)}


@pytest.fixture
def on_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path))
    entries = [
        tuned_files.Entry(
            problem_key=PROBLEM.key,
            regime_key=SHAPE.regime.key,
            level="lean",
            plan="lean",
            configs=recipe.by_stage,
            templates=templates_of(recipe),
            measured={"forward_ms": 1.0, "forward_backward_ms": 2.0},
            gate=dict.fromkeys(always_checked("gdn2"), 1e-3),
            provenance="measured",
            decay=decay,
        )
        for decay, recipe in RECIPES.items()
    ]
    device = present_device()
    metadata = tuned_files.metadata_for(device, {}, "a test")
    tuned_files.merge_entries(tuned_files.tuned_path(tmp_path, "gdn2", device), metadata, entries)


def _train(run: Callable[..., tuple[Tensor, Tensor | None]], decay: str | None) -> list[Tensor]:
    inputs = inputs_of(PROBLEM, SHAPE, "strong", 0, "cuda")
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    told = {} if decay is None else {"expected_decay": decay}
    o, _ = run(**leaves, use_qk_l2norm_in_kernel=True, **told)
    return [o.detach(), *torch.autograd.grad(o.float().sum(), [*leaves.values()])]


def _same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("on_file")
def test_a_call_and_a_graph_run_what_is_for_their_decay() -> None:
    wanted = {}
    for decay, recipe in RECIPES.items():
        with forced_recipe(recipe):
            wanted[decay] = _train(gdn2gen.chunk_gdn2, None)
    assert not _same(wanted["weak"], wanted["strong"]), "they cannot be told apart"
    for decay in ("weak", "strong", "weak"):
        assert _same(_train(gdn2gen.chunk_gdn2, decay), wanted[decay]), decay
        with gdn2gen.expected_decay(decay):
            assert _same(_train(gdn2gen.chunk_gdn2, None), wanted[decay]), decay
    # o of chunks of 16 and of 32 has the same bits where hardly a token reaches the next
    inputs = inputs_of(PROBLEM, SHAPE, "layer", 0, "cuda")
    flags = {"use_qk_l2norm_in_kernel": True}
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        weak, _ = gdn2gen.chunk_gdn2(**inputs, **flags)
        with gdn2gen.expected_decay("strong"):
            strong, _ = gdn2gen.chunk_gdn2(**inputs, **flags)  # loads what it runs
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                o, _ = gdn2gen.chunk_gdn2(**inputs, **flags)
    graph.replay()  # whatever is expected by now
    torch.cuda.synchronize()
    assert torch.equal(o, strong) and not torch.equal(o, weak)
