"""scripts/part_sweep.py: its configs are configs; what is wrong is said and is no time."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from script_module import load_script

from gdn2gen.family.parts import NormProblem
from gdn2gen.family.parts_reference import gated_rms_norm, short_convolution
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.stages import EVERY_STAGE
from gdn2gen.runtime import parts

part_sweep = load_script("part_sweep")
layer_parts = load_script("layer_parts")


@pytest.mark.parametrize("stage", part_sweep.STAGES)
def test_configs(stage: str) -> None:
    problem = EVERY_STAGE[stage].made_for()  # type: ignore[attr-defined]
    knobs = [*part_sweep.knobs_of(stage)]
    configs = {default_config(stage, problem).replace(**x) for x in knobs}
    assert len(configs) == len(knobs) > 10


def test_what_is_wrong_is_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of configs of one turn the result is another one, of those of two there is NaN; and one was
    not compiled."""
    exact = [torch.arange(1.0, 5.0)]
    seen: list[Any] = []

    def run() -> Any:
        knobs = parts._forced.get("gated_norm", {})
        seen.append(knobs)
        worse = {1: 0.05, 2: torch.nan}.get(int(knobs.get("BT", 4)), 0.0)
        return ([exact[0] + worse], ())

    configs = [{"BR": 8, "BT": BT} for BT in (1, 2, 4, 8, 16)]
    last = default_config("gated_norm", NormProblem()).replace(**configs[-1])
    monkeypatch.setattr(part_sweep, "knobs_of", lambda _: iter(configs))
    monkeypatch.setattr(part_sweep, "compile_all", lambda _: {last})
    monkeypatch.setattr(
        part_sweep,
        "time_ms",
        lambda run, *_, **__: run() and SimpleNamespace(median=3.0 / len(seen)),
    )
    monkeypatch.setattr(part_sweep, "in_graph", lambda run: SimpleNamespace(replay=run))
    swept = part_sweep.Swept("gated_norm", NormProblem(), run, 0.5, lambda: exact)
    wrong = part_sweep.sweep([swept])
    assert wrong == [
        "gated_norm BR=8 BT=1: off by 0.013",
        "gated_norm BR=8 BT=2: off by nan",
    ]
    said = capsys.readouterr().out
    assert "BT=16" not in said and "by the rule" in said
    assert not parts._forced and {int(x.get("BT", 0)) for x in seen} == {0, 1, 2, 4, 8}


def test_what_is_exact() -> None:
    torch.manual_seed(0)
    x, dy = ([torch.randn(2, 9, 8) for _ in range(3)] for _ in range(2))
    weight = [torch.randn(8, 4) for _ in x]
    found = layer_parts._exact_convolutions(x, weight, dy)
    leaves = [part.clone().requires_grad_() for part in (*x, *weight)]
    y = [short_convolution(leaves[i], leaves[3 + i])[0] for i in range(3)]
    torch.testing.assert_close(found, [*torch.autograd.grad(y, leaves, dy)])
    torch.testing.assert_close(layer_parts._exact_convolutions(x, weight), y)
    given = [x[0].requires_grad_(), x[1].requires_grad_(), torch.randn(8).requires_grad_()]
    norm = partial(gated_rms_norm, eps=1e-5, activation="silu")
    wanted = [*torch.autograd.grad(norm(*given), given, dy[0])]
    torch.testing.assert_close(layer_parts._exact(norm, given, dy[0]), wanted)
