"""Calls of Mamba-3's ops on random tensors, which load all that such calls want."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.measure.mamba3_runs import mamba3_arguments, mamba3_inputs
from gdn2gen.ops.mamba3 import mamba3_siso_combined, mamba3_siso_step
from gdn2gen.workflows.mamba3 import check_step_shape


def call_mamba3(
    problem: Mamba3Problem, shape: Shape, level: str, place: torch.device, *, backward: bool
) -> None:
    """Over whole sequences, once without gradients, and with `backward` once with them: of the
    output alone, and where states come in, of the states that go out, too."""
    made = _drawn(problem, shape, place)
    op = partial(
        mamba3_siso_combined,
        return_final_states=problem.carried,
        disable_recompute=level == "fast",
    )
    with torch.no_grad():
        op(**mamba3_arguments(made))
    if backward:
        # wherever the caller is
        with torch.inference_mode(False), torch.enable_grad():
            made = _drawn(problem, shape, place)
            leaves = [x.requires_grad_() for x in made.values() if x.is_floating_point()]
            found = op(**mamba3_arguments(made))
            outputs = [found] if isinstance(found, Tensor) else [*found]
            for count in dict.fromkeys((1, len(outputs))):
                torch.autograd.grad(
                    outputs[:count],
                    leaves,
                    [torch.ones_like(x) for x in outputs[:count]],
                    retain_graph=count < len(outputs),
                    allow_unused=True,
                )
    _wait(place)


def call_mamba3_step(problem: Mamba3Problem, shape: Shape, place: torch.device) -> None:
    """Of one token of as many sequences."""
    check_step_shape(shape)
    dense = replace(shape, cu_seqlens=None)
    made = _drawn(replace(problem, carried=True, packed=False), dense, place)
    for name in ("Q", "K", "V", "Z", "Angles"):
        if name in made:
            made[name] = made[name][:, 0]
    for name in ("ADT", "DT", "Trap"):
        made[name] = made[name][..., 0]
    with torch.no_grad():
        mamba3_siso_step(**mamba3_arguments(made))
    _wait(place)


def _drawn(problem: Mamba3Problem, shape: Shape, place: torch.device) -> dict[str, Tensor]:
    return mamba3_inputs(problem, shape, "layer", 0, str(place))


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize()
