"""A layer's kernels beside its recurrence, as layer_time.py times them: the short convolutions of
q, k and v, the gated norm, and a decay's gate by itself, with what they should make, and the same
by others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.base.terminal import console
from gdn2gen.family import parts_reference
from gdn2gen.family.activations import activate_gate
from gdn2gen.family.parts import (
    ConvolutionProblem,
    DecayGateProblem,
    NormProblem,
    PartProblem,
    ProjectedNormProblem,
)
from gdn2gen.ops.decay_gate import decay_gate
from gdn2gen.ops.parts import gated_rms_norm, short_convolution
from gdn2gen.runtime import decay_gate as decay_gates
from gdn2gen.runtime import parts, stream_parts

Run = Callable[[], Any]
Exact = Callable[[], list[Tensor]]
HIDDEN: Final = 2048
HEADS: Final = 16
WIDTH: Final = 4
DTYPE: Final = torch.bfloat16


@dataclass(frozen=True, eq=False)
class Part:
    """One of the kernels: its directions, and the same by others."""

    name: str
    stages: tuple[str, str]
    problem: PartProblem
    forward: Run
    backward: Run
    both: Run
    """Forward and backward, by autograd."""
    bytes: tuple[int, int]
    """That each direction cannot do without."""
    exact: tuple[Exact, Exact]
    """What each direction should make, computed in fp64."""
    theirs: tuple[Run, Run] | None
    """Forward; forward and backward."""


def tokens(batch: int, count: int, *dims: int) -> Tensor:
    return torch.randn(batch, count, *dims, device="cuda").to(DTYPE)


def differentiated(forward: Callable[[], Tensor | list[Tensor]], into: list[Tensor]) -> Run:
    made = forward()
    y = [made] if isinstance(made, Tensor) else made
    towards = [torch.randn_like(part) for part in y]

    def run() -> None:
        made = forward()
        torch.autograd.grad([made] if isinstance(made, Tensor) else made, into, towards)

    return run


def convolution(batch: int, count: int) -> Part:
    x = [tokens(batch, count, HIDDEN).requires_grad_() for _ in range(3)]
    weight = [torch.randn(HIDDEN, WIDTH, device="cuda").to(DTYPE).requires_grad_() for _ in x]
    given = [part.detach() for part in x], [part.detach() for part in weight]
    dy = [torch.randn_like(part) for part in given[0]]
    once = sum(part.nbytes for part in x)
    theirs = None
    module = their_module("fla.modules", "ShortConvolution")
    if module is not None:
        convolutions = [
            module(HIDDEN, WIDTH, bias=False, activation="silu").to("cuda", DTYPE) for _ in x
        ]

        def run() -> list[Tensor]:
            return [one(part)[0] for one, part in zip(convolutions, x, strict=True)]

        weights = [p for one in convolutions for p in one.parameters()]
        theirs = torch.no_grad()(run), differentiated(run, [*x, *weights])
    return Part(
        "short convolutions",
        ("short_conv", "short_conv_backward"),
        ConvolutionProblem(width=WIDTH),
        partial(parts.convolve, *given, [], [], None, False),
        partial(parts.convolve_backward, dy, *given, [], [], []),
        differentiated(lambda: short_convolution(x, weight)[0], [*x, *weight]),
        (2 * once, 3 * once),
        (partial(_exact_convolutions, *given), partial(_exact_convolutions, *given, dy)),
        theirs,
    )


def norm(batch: int, count: int, activation: str = "sigmoid") -> Part:
    dim = HIDDEN // HEADS
    x, gate = (tokens(batch, count, HEADS, dim).requires_grad_() for _ in range(2))
    weight = torch.randn(dim, device="cuda").to(DTYPE).requires_grad_()
    given = x.detach(), gate.detach(), weight.detach()
    dy = torch.randn_like(given[0])
    exact = partial(parts_reference.gated_rms_norm, eps=1e-5, activation=activation)
    theirs = None
    module = their_module("fla.modules", "FusedRMSNormGated")
    if module is not None:
        one = module(dim, eps=1e-5, activation=activation).to("cuda", DTYPE)
        run = partial(one, x, gate)
        theirs = torch.no_grad()(run), differentiated(run, [x, gate, *one.parameters()])
    return Part(
        "gated norm",
        ("gated_norm", "gated_norm_backward"),
        NormProblem(size=dim, activation=activation),
        partial(parts.norm, *given, 1e-5, activation),
        partial(parts.norm_backward, dy, *given, 1e-5, activation),
        differentiated(
            lambda: gated_rms_norm(x, gate, weight, activation=activation), [x, gate, weight]
        ),
        (3 * x.nbytes, 5 * x.nbytes),
        (partial(_exact, exact, given), partial(_exact, exact, given, dy)),
        theirs,
    )


def projected(batch: int, count: int) -> tuple[PartProblem, Run, int, Exact]:
    """The norm that projects its gate, without gradients: its problem, a run, the bytes that it
    cannot do without, and what it should make."""
    dim = HIDDEN // HEADS
    x, low = tokens(batch, count, HEADS, dim), tokens(batch, count, dim).flatten(0, 1)
    proj = (torch.randn(HIDDEN, dim, device="cuda") * dim**-0.5).to(DTYPE)
    bias, weight = (torch.randn(n, device="cuda").to(DTYPE) for n in (HIDDEN, dim))
    problem = ProjectedNormProblem(size=dim, rank=dim, bias=True)

    def exact() -> list[Tensor]:
        rounded = torch.nn.functional.linear(low.double(), proj.double(), bias.double()).to(DTYPE)
        given = x.double(), rounded.view(x.shape).double(), weight.double()
        return [parts_reference.gated_rms_norm(*given, 1e-5, "sigmoid")]

    run = partial(stream_parts.projected_norm, x, low, proj, bias, weight, 1e-5, "sigmoid")
    return problem, run, 2 * x.nbytes + low.nbytes, exact


def gate(batch: int, count: int) -> Part:
    dim = HIDDEN // HEADS
    x = tokens(batch, count, HEADS, dim).requires_grad_()
    A_log = torch.randn(HEADS, device="cuda").requires_grad_()
    dt_bias = torch.randn(HIDDEN, device="cuda").requires_grad_()
    given = x.detach(), A_log.detach(), dt_bias.detach()
    dg = torch.randn(given[0].shape, device="cuda")
    return Part(
        "decay's gate",
        ("decay_gate", "decay_gate_backward"),
        DecayGateProblem(size=dim),
        partial(decay_gates.gate, *given, None),
        partial(decay_gates.gate_backward, dg, *given, None),
        differentiated(lambda: decay_gate(x, A_log, dt_bias), [x, A_log, dt_bias]),
        (x.nbytes + dg.nbytes, 2 * x.nbytes + dg.nbytes),
        (partial(_exact, activate_gate, given), partial(_exact, activate_gate, given, dg)),
        None,
    )


def _exact(
    forward: Callable[..., Tensor], given: Sequence[Tensor], dy: Tensor | None = None
) -> list[Tensor]:
    """What `forward` makes of these in fp64; with dy their gradients."""
    leaves = [part.double().requires_grad_(dy is not None) for part in given]
    y = forward(*leaves)
    found = [y] if dy is None else torch.autograd.grad(y, leaves, dy.double())
    return [part.float() for part in found]


def _exact_convolutions(
    x: Sequence[Tensor], weight: Sequence[Tensor], dy: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """One tensor after the other, so that fp64 has room; dx of all before dweight of all."""
    towards: Sequence[Tensor | None] = [None] * len(x) if dy is None else dy
    found = [
        _exact(lambda *given: parts_reference.short_convolution(*given)[0], part, into)
        for *part, into in zip(x, weight, towards, strict=True)
    ]
    return [part for group in zip(*found, strict=True) for part in group]


def their_module(module: str, name: str) -> Any:
    """flash-linear-attention's; None where it cannot be imported."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        console(stderr=True).print(f"without flash-linear-attention's {name}: {error}")
        return None
