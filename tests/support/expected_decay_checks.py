"""What a call expects of its decay chooses its kernels, also those of its backward, however it is
said and whoever looks on: with two entries on file, told apart by the bits of their results."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch_checks import make, outputs

import gdn2gen
from gdn2gen.base.device import named_device
from gdn2gen.codegen.render import template_digest
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.store._claims import always_checked
from gdn2gen.store.dispatch import forced_recipe
from gdn2gen.store.tuned_files import Entry, TunedFile, metadata_for, tuned_path, write_tuned

PROBLEM = Problem(K=32, V=32, dtype="fp32")
AT = Regime(tokens=20, sequences=1, heads=1).key
RECIPES = {
    "weak": Recipe.default(PROBLEM, "lean", BT=32),
    "strong": Recipe.default(PROBLEM, "lean", BT=16),
}


def entry(decay: str) -> Entry:
    recipe = RECIPES[decay]
    return Entry(
        *(PROBLEM.key, AT, "lean", "lean"),
        configs=recipe.by_stage,
        templates={x.stage: template_digest(x) for x in recipe.configs},
        measured={"forward_ms": 1.0, "forward_backward_ms": 2.0},
        gate=dict.fromkeys(always_checked("gdn2"), 1e-6),
        provenance="measured",
        decay=decay,
    )


def train(forward: Callable[..., Tensor]) -> list[Tensor]:
    """o and gradients; whatever is expected while they are asked for."""
    leaves = {name: x.detach().requires_grad_() for name, x in make(T=20).items()}
    o = forward(**leaves)
    return [o, *torch.autograd.grad(o.sum(), [*leaves.values()])]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def told(decay: str) -> Callable[..., Tensor]:
    return lambda **x: outputs(**x, expected_decay=decay)


def told_while_computed(decay: str) -> Callable[..., Tensor]:
    """By the process, which expects something else again when the backward comes."""

    def forward(**given: Any) -> Tensor:
        with gdn2gen.expected_decay(decay):
            return outputs(**given)

    return forward


def checkpointed(decay: str) -> Callable[..., Tensor]:
    """Computed once more by the backward."""
    return lambda **x: checkpoint(told(decay), use_reentrant=False, **x)  # type: ignore[no-any-return]


def compiled() -> Callable[[str], Callable[..., Tensor]]:
    """One compiled function, which is told by the process before it is called."""
    torch._dynamo.reset()
    step = torch.compile(outputs, backend="aot_eager", fullgraph=True)

    def by(decay: str) -> Callable[..., Tensor]:
        def forward(**given: Any) -> Tensor:
            with gdn2gen.expected_decay(decay):
                return step(**given)

        return forward

    return by


def compiled_and_told() -> Callable[[str], Callable[..., Tensor]]:
    torch._dynamo.reset()
    step = torch.compile(outputs, backend="aot_eager", fullgraph=True)
    return lambda decay: lambda **x: step(**x, expected_decay=decay)


WAYS: dict[str, Callable[[], Callable[[str], Callable[..., Tensor]]]] = {
    "call": lambda: told,
    "process": lambda: told_while_computed,
    "checkpointed": lambda: checkpointed,
    "compiled": compiled,
    "compiled and told": compiled_and_told,
}


def expected(folder: str, *ways: str) -> str:
    wanted = _file(folder)
    assert not same(wanted["weak"], wanted["strong"]), "they cannot be told apart"
    assert same(train(outputs), wanted["weak"]), "weak unless somebody says otherwise"
    for way in ways:
        torch._dynamo.utils.counters.clear()
        by = WAYS[way]()
        for decay in ("strong", "weak", "strong"):
            assert same(train(by(decay)), wanted[decay]), (way, decay)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == 2 * ("compiled" in way), f"{graphs} graphs: one for each word"
    recipes = gdn2gen.pin()["recipes"]
    assert all(x["regime"] == AT for x in recipes)
    ran = sorted((x.get("decay", "weak"), x["configs"]["scan"]["BT"]) for x in recipes)
    told_on = [("strong", 16), ("weak", 32)]
    assert ran == told_on, "what ran is told to other processes with its decay"
    return "done"


def _file(folder: str) -> dict[str, list[Tensor]]:
    """Put both entries on file; what each makes."""
    os.environ["GDN2GEN_TUNED_DIR"] = folder
    path = tuned_path(Path(folder), "gdn2", named_device("sm_90"))
    metadata = metadata_for(named_device("sm_90"), {}, "test", "2026")
    write_tuned(path, TunedFile(metadata, (entry("weak"), entry("strong"))))
    wanted = {}
    for decay, recipe in RECIPES.items():
        with forced_recipe(recipe):
            wanted[decay] = train(outputs)
    return wanted


def serving(folder: str) -> str:
    """A prefill runs what it is told to expect, too."""
    _file(folder)
    inputs = make(T=20)
    found = {}
    for decay, recipe in RECIPES.items():
        with forced_recipe(recipe):
            forced = _prefill(inputs, "weak")
        found[decay] = _prefill(inputs, decay)
        assert torch.equal(found[decay], forced), decay
    assert not torch.equal(found["weak"], found["strong"])
    return "done"


def _prefill(inputs: dict[str, Any], decay: str) -> Tensor:
    pool = torch.zeros(1, 1, 32, 32)
    return outputs(**inputs, state_pool=pool, expected_decay=decay)
