"""The op on CPU tensors as if by the kernels, with launches that are recorded instead of made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn2gen import chunk_gdn2
from gdn2gen.base import paths
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.problem import Problem
from gdn2gen.ops import _call, _decode
from gdn2gen.runtime import arguments, decoding, lookup, runner

HEADS = 4
FLAGS: dict[str, Any] = {"use_qk_l2norm_in_kernel": True}
GATED: dict[str, Any] = {"use_gate_in_kernel": True, "A_log": torch.zeros(HEADS)}


class Launched(list[tuple[str, Any, dict[str, Tensor], dict[str, Any]]]):
    """Every launch: stage, config, operands by name (weakly held if asked), scalars."""

    def launcher(self, runner: runner.Runner, problem: Problem, stage: str) -> Any:
        config = runner.recipe[stage]
        names = [x.name for x in config.operands(problem)]

        def record(*tensors: Tensor, **scalars: Any) -> None:
            self.append((stage, config, dict(zip(names, tensors, strict=True)), scalars))

        return record

    def looks(self) -> list[Any]:
        """What does not differ between two calls of the same sizes."""
        return [
            (
                stage,
                config,
                {name: (x.shape, x.stride(), x.dtype) for name, x in operands.items()},
                {name: (type(x), x) for name, x in scalars.items()},
            )
            for stage, config, operands, scalars in self
        ]


def _ignore(*_: Tensor, **__: Any) -> None:
    """Stands for the kernels around those of the stages."""


def forget() -> None:
    _call._ready.clear()
    _decode._plans.clear()
    decoding.known_plan.cache_clear()
    for cached in (
        *(lookup.known_request, lookup._found, lookup._agreed, lookup._runner),
        *(runner._sized, arguments._known_dims),
    ):
        cached.cache_clear()


def recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Launched]:
    """A fixture's body: launches of this test, with no tuned files but those under `tmp_path`."""
    found = Launched()
    monkeypatch.setattr(_call, "by_kernels", lambda _: True)
    monkeypatch.setattr(runner.Runner, "launcher", lambda *given: found.launcher(*given))
    monkeypatch.setattr(runner.Runner, "table_launchers", lambda _: (_ignore, _ignore))
    monkeypatch.setattr(paths, "packaged_tuned_dir", lambda: tmp_path / "packaged")
    (tmp_path / "user").mkdir(exist_ok=True)
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path / "user"))
    monkeypatch.delenv("GDN2GEN_STRICT", raising=False)
    forget()
    yield found
    forget()


def make(**changes: Any) -> dict[str, Any]:
    sizes = {"B": 2, "T": 40, "H": 2, "HV": HEADS, "K": 32, "V": 64, "dtype": torch.bfloat16}
    return {**make_inputs(**(sizes | changes))}


def train(**arguments: Any) -> list[Tensor]:
    """Outputs, and gradients of all inputs."""
    leaves = {
        name: x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    outputs = [x for x in chunk_gdn2(**leaves) if x is not None]
    wanted = [x for x in leaves.values() if isinstance(x, Tensor) and x.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, wanted, [torch.ones_like(x) for x in outputs])]


def packed(*ends: int) -> dict[str, Any]:
    return make(B=1) | {"cu_seqlens": torch.tensor(ends)}
