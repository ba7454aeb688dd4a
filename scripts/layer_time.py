"""What a layer costs on a GPU, and its two kernels beside the recurrence: milliseconds, medians.

    python scripts/layer_time.py [--layers gdn2 kda] [--batch 4] [--tokens 4096] [--sweep]

bf16, 2048 channels in 16 heads, Mamba's 4096 in 64. The kernels are the short convolutions of q, k
and v, and the gated norm; each is beside the floor, the time that a copy of its bytes would take
(inputs read once, outputs written once), and beside flash-linear-attention's modules where these
can be imported. A layer is timed with random weights, forward without gradients, and forward and
backward with all of them. Every run begins with the L2 flushed.
--sweep times configs of the kernels, for the rules in
kernels/parts.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.base.environment import verifying
from gdn2gen.base.terminal import Sheet, console
from gdn2gen.kernels.limits import Knob
from gdn2gen.measure.timing import copy_gbps, time_ms
from gdn2gen.nn.model import MIXERS
from gdn2gen.ops.parts import gated_rms_norm, short_convolution
from gdn2gen.runtime import parts

Run = Callable[[], Any]
HIDDEN: Final = 2048
HEADS: Final = 16
WIDTH: Final = 4
DTYPE: Final = torch.bfloat16
THEIRS: Final = {
    "gdn2": ("fla.layers.gdn2", "GatedDeltaNet2"),
    "kda": ("fla.layers.kda", "KimiDeltaAttention"),
    "gated_delta_rule": ("fla.layers.gated_deltanet", "GatedDeltaNet"),
    "delta_rule": ("fla.layers.delta_net", "DeltaNet"),
    "gla": ("fla.layers.gla", "GatedLinearAttention"),
    "mamba2": ("fla.layers.mamba2", "Mamba2"),
    "mamba3": ("fla.layers.mamba3", "Mamba3"),
}
# What layers take beside the hidden size, ours and theirs; Mamba's as it is by default.
SIZES: Final[dict[str, Any]] = {"num_heads": HEADS, "head_dim": HIDDEN // HEADS}
OURS: Final[dict[str, dict[str, Any]]] = {
    "mamba2": {},
    "mamba3": {},
    "gla": {**SIZES, "expand_v": 1.0},
}
OTHERS: Final[dict[str, dict[str, Any]]] = {
    "gated_delta_rule": {**SIZES, "expand_v": 1.0},
    "delta_rule": {"num_heads": HEADS},
    "gla": {"num_heads": HEADS, "expand_k": 1.0, "expand_v": 1.0},
    "mamba2": {"num_heads": 2 * HIDDEN // 64, "use_bias": False, "use_conv_bias": True},
    "mamba3": {},
}


@dataclass(frozen=True, eq=False)
class Part:
    """One of the two kernels: its directions, and the same by others."""

    name: str
    stages: tuple[str, str]
    forward: Run
    backward: Run
    both: Run
    """Forward and backward, by autograd."""
    bytes: tuple[int, int]
    """That each direction cannot do without."""
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
    module = _theirs("fla.modules", "ShortConvolution")
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
        partial(parts.convolve, *given, [], [], None, False),
        partial(parts.convolve_backward, dy, *given, [], [], []),
        differentiated(lambda: short_convolution(x, weight)[0], [*x, *weight]),
        (2 * once, 3 * once),
        theirs,
    )


def norm(batch: int, count: int, activation: str = "sigmoid") -> Part:
    dim = HIDDEN // HEADS
    x, gate = (tokens(batch, count, HEADS, dim).requires_grad_() for _ in range(2))
    weight = torch.randn(dim, device="cuda").to(DTYPE).requires_grad_()
    given = x.detach(), gate.detach(), weight.detach()
    theirs = None
    module = _theirs("fla.modules", "FusedRMSNormGated")
    if module is not None:
        one = module(dim, eps=1e-5, activation=activation).to("cuda", DTYPE)
        run = partial(one, x, gate)
        theirs = torch.no_grad()(run), differentiated(run, [x, gate, *one.parameters()])
    return Part(
        "gated norm",
        ("gated_norm", "gated_norm_backward"),
        partial(parts.norm, *given, 1e-5, activation),
        partial(parts.norm_backward, torch.randn_like(x), *given, 1e-5, activation),
        differentiated(
            lambda: gated_rms_norm(x, gate, weight, activation=activation), [x, gate, weight]
        ),
        (3 * x.nbytes, 5 * x.nbytes),
        theirs,
    )


def _theirs(module: str, name: str) -> Any:
    """flash-linear-attention's; None where it cannot be imported."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        console(stderr=True).print(f"without flash-linear-attention's {name}: {error}")
        return None


def ms(run: Run) -> float:
    return time_ms(run).median


def part_rows(part: Part) -> Iterator[list[str]]:
    """A row for each direction, and one for both by autograd."""
    directions = (("forward", part.forward), ("backward", part.backward))
    for (name, run), nbytes in zip(directions, part.bytes, strict=True):
        took, floor = ms(run), nbytes / copy_gbps() / 1e6
        beside = ms(part.theirs[0]) if part.theirs and name == "forward" else None
        yield [part.name, name, f"{took:.4f}", f"{floor:.4f}", f"{took / floor:.2f}", _ms(beside)]
    beside = ms(part.theirs[1]) if part.theirs else None
    yield [part.name, "forward+backward", f"{ms(part.both):.4f}", "", "", _ms(beside)]


def layer_rows(member: str, batch: int, count: int) -> Iterator[list[str]]:
    x = tokens(batch, count, HIDDEN).requires_grad_()
    ours = MIXERS[member](HIDDEN, **OURS.get(member, SIZES)).to("cuda", DTYPE)
    found = _layer_times(lambda: ours(x), [x, *ours.parameters()])
    beside: tuple[float | None, float | None] = (None, None)
    make = _theirs(*THEIRS[member])
    if make is not None:
        try:
            layer = make(hidden_size=HIDDEN, **OTHERS.get(member, SIZES)).to("cuda", DTYPE)
            beside = _layer_times(lambda: layer(x)[0], [x, *layer.parameters()])
        except Exception as error:  # another version's arguments: no reason to lose our own figures
            console(stderr=True).print(f"flash-linear-attention's {member}: {error}")
    for name, took, other in zip(("forward", "forward+backward"), found, beside, strict=True):
        yield [f"layer {member}", name, f"{took:.3f}", "", "", _ms(other)]


def _layer_times(run: Callable[[], Tensor], into: list[Tensor]) -> tuple[float, float]:
    return ms(torch.no_grad()(run)), ms(differentiated(run, into))


def _ms(found: float | None) -> str:
    return "-" if found is None else f"{found:.4f}"


def sweep(part: Part) -> None:
    """Configs of either direction, the fastest first."""
    for stage, run in zip(part.stages, (part.forward, part.backward), strict=True):
        found = []
        for knobs in _knobs(stage):
            parts.force(stage, knobs)
            found.append((ms(run), knobs))
        parts.force(stage, None)
        sheet = Sheet(stage, (*found[0][1], "ms"), words=())
        for took, knobs in sorted(found, key=lambda x: x[0])[:8]:
            sheet.add(*map(str, knobs.values()), f"{took:.4f}")
        console().print(sheet)


def _knobs(stage: str) -> Iterator[dict[str, Knob]]:
    if stage.startswith("gated_norm"):
        for BR in (4, 8, 16, 32, 64):
            for warps in (2, 4, 8):
                for BT in (16, 32) if stage.endswith("backward") else (1, 2, 4):
                    yield {"BR": BR, "num_warps": warps, "BT": BT}
        return
    for BT in (32, 64, 128, 256):
        for BD in (128, 256):
            for ahead in (2, 4, 8):
                for warps in (2, 4):
                    yield {"BT": BT, "BD": BD, "ahead": ahead, "BR": warps, "num_warps": warps}


@verifying()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", nargs="*", choices=tuple(MIXERS), default=list(MIXERS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sweep", action="store_true", help="time configs of the kernels instead")
    args = parser.parse_args()
    torch.manual_seed(0)
    made = [make(args.batch, args.tokens) for make in (convolution, norm)]
    if args.sweep:
        for part in made:
            sweep(part)
        return
    # a table for each, as soon as it is there
    show("parts", [row for part in made for row in part_rows(part)])
    for member in args.layers:
        show(member, layer_rows(member, args.batch, args.tokens))


def show(title: str, rows: Iterable[Sequence[str]]) -> None:
    sheet = Sheet(
        f"{title}: {torch.cuda.get_device_name()}, {copy_gbps():.0f} GB/s by a copy",
        ("what", "direction", "ms", "floor ms", "x floor", "FLA ms"),
        words=("what", "direction"),
    )
    for row in rows:
        sheet.add(*row)
    console().print(sheet)


if __name__ == "__main__":
    main()
