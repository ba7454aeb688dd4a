"""Times of configs of a layer's parts, for the rules of kernels/parts.py: `layer_time.py --sweep`.

What a GPU is to time was compiled before (`measure.compiling`). What each config makes is held
against fp64 on the GPU, at the size that is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.base.terminal import Sheet, console
from gdn2gen.family.parts import PartProblem
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.measure.compiling import compile_all
from gdn2gen.measure.timing import time_ms
from gdn2gen.runtime import parts

Run = Callable[[], Any]
Knobs = dict[str, Knob]
SHOWN: Final = 12
IN_GRAPH: Final = 4
"""Of those shown are timed as a graph, too, in which no launch waits for the host."""
BOUND: Final = 8e-3
"""On the largest error, as a part of the largest number: that of tests of bf16."""
RULE: Final[Knobs] = {}


@dataclass(frozen=True, eq=False)
class Swept:
    """A stage, what runs it, and what that should make."""

    stage: str
    problem: PartProblem
    run: Run
    floor_ms: float
    exact: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Found:
    """What was measured of one config."""

    knobs: Knobs
    ms: float
    error: float


def sweep(given: Sequence[Swept]) -> list[str]:
    """Times of each stage's configs in its run, the fastest first, beside that of the rule; the
    configs that were wrong, in words."""
    left_out = compile_all(
        (x.problem, _config(x, knobs)) for x in given for knobs in knobs_of(x.stage)
    )
    wrong = []
    for x in given:
        exact = x.exact()
        configs = [y for y in knobs_of(x.stage) if _config(x, y) not in left_out]
        found = [_measured(x, knobs, exact) for knobs in (RULE, *configs)]
        wrong += [
            f"{x.stage} {words_of(y.knobs)}: off by {y.error:.2g}"
            for y in found
            if not y.error < BOUND
        ]
        _show(x, found)
    return wrong


def _config(x: Swept, knobs: Knobs) -> Config:
    return default_config(x.stage, x.problem).replace(**knobs)


def _show(x: Swept, found: Sequence[Found]) -> None:
    sheet = Sheet(
        f"{x.stage}, floor {x.floor_ms:.4f} ms, {len(found)} configs",
        ("config", "ms", "of the floor", "in a graph", "of the floor", "error"),
        words=("config",),
    )
    right = sorted((y for y in found if y.error < BOUND), key=lambda y: y.ms)
    rows = right[:SHOWN] + [y for y in right[SHOWN:] if y.knobs == RULE]
    for i, y in enumerate(rows):
        graph = ["", ""]
        if i < IN_GRAPH or y.knobs == RULE:
            ms = _with(x.stage, y.knobs, lambda: time_ms(in_graph(x.run).replay, 5, 50).median)
            graph = [f"{ms:.4f}", f"{ms / x.floor_ms:.3f}"]
        alone = [f"{y.ms:.4f}", f"{y.ms / x.floor_ms:.3f}"]
        sheet.add(words_of(y.knobs), *alone, *graph, f"{y.error:.1e}")
    console().print(sheet)
    for y in found:  # all of them, for what cannot be seen in a dozen
        console().print(f"{x.stage} {y.ms:.4f} {words_of(y.knobs)}")


def words_of(knobs: Knobs) -> str:
    return " ".join(f"{name}={x}" for name, x in knobs.items()) or "by the rule"


def _measured(x: Swept, knobs: Knobs, exact: Sequence[Tensor]) -> Found:
    def measure() -> tuple[float, float]:
        error = worst(tensors_of(x.run()), exact)
        return time_ms(x.run, warmup_ms=5, rep_ms=25).median, error

    return Found(knobs, *_with(x.stage, knobs, measure))


def _with(stage: str, knobs: Knobs, measure: Callable[[], Any]) -> Any:
    parts.force(stage, knobs or None)
    try:
        return measure()
    finally:
        parts.force(stage, None)


def in_graph(run: Run) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def tensors_of(made: Any) -> list[Tensor]:
    """What a run returned, in order."""
    if isinstance(made, Tensor):
        return [made]
    return [x for part in made for x in tensors_of(part)]


def worst(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest error as a part of the largest number of its tensor; NaN where there is one."""
    errors = [
        (one.float() - other).abs().max() / other.abs().max()
        for one, other in zip(found, exact, strict=True)
    ]
    return float(torch.stack(errors).max())


def knobs_of(stage: str) -> Iterator[Knobs]:
    """Each once, though it may be of two grids."""
    yield from {_key(stage, x): x for x in _SWEPT[stage]()}.values()


def _grid(**domains: Sequence[Knob]) -> Iterator[Knobs]:
    for values in product(*domains.values()):
        yield dict(zip(domains, values, strict=True))


def _apart(usual: Knobs, switches: Sequence[str]) -> Iterator[Knobs]:
    """Without all switches, with all of them, with each alone, and without each."""
    off, on = ({name: x for name in switches} for x in (0, 1))
    yield from (usual | off, usual | on)
    for name in switches:
        yield from (usual | off | {name: 1}, usual | on | {name: 0})


def _short_conv() -> Iterator[Knobs]:
    for warps in (2, 4):
        shared: dict[str, Sequence[Knob]] = {"BR": (warps,), "num_warps": (warps,)}
        yield from _grid(
            **shared, BD=(128, 256), BT=(16,), ahead=(16,), early=(0,), read_once=(0, 1)
        )
        yield from _grid(**shared, BD=(128,), BT=(32,), ahead=(8,), early=(0, 1), read_once=(1,))


def _short_conv_backward() -> Iterator[Knobs]:
    """Words of two channels: through registers, of which 16 warps have room on a multiprocessor, or
    through shared memory, of which 21, 19 or 16 have. Runs as long as makes them as many as 132
    multiprocessors take at once (4 x 4096 tokens of 6144 channels), or a third."""
    words: dict[str, Sequence[Knob]] = {"words": (1,), "overlap": (1,), "read_once": (0,)}
    words |= {"BD": (128,)}
    staged = words | {"early": (0,), "num_stages": (3, 4, 5)}
    for most, BT, of_two in ((96, 296, 320), (104, 320, 344), (128, 376, 376)):
        one = staged | {"maxnreg": (most,), "BR": (1,), "num_warps": (1,)}
        yield from _grid(BT=(128, BT), ahead=(4,), **one)
        two = one | {"BD": (256,), "num_warps": (2,), "num_stages": (4,)}
        yield from _grid(BT=(of_two,), ahead=(4,), **two)
    wide = one | {"num_stages": (3,)}
    yield from _grid(BT=(376,), ahead=(8,), **wide)
    for warps in (1, 2):
        shared = words | {"BR": (warps,), "num_warps": (warps,), "maxnreg": (128,)}
        yield from _grid(BT=(128, 376), ahead=(4,), early=(1,), **shared)
        yield from _grid(BT=(128, 376), ahead=(4,), early=(0,), prefetch=(1,), **shared)
    # and what each of them is worth
    usual: Knobs = {"BR": 2, "num_warps": 2, "ahead": 4, "early": 1, "BT": 128, "BD": 128}
    yield from _apart(usual | {"maxnreg": 128}, ("words", "overlap", "read_once"))
    best: Knobs = {"BR": 1, "num_warps": 1, "ahead": 4, "early": 0, "BT": 296, "BD": 128}
    best |= {"maxnreg": 96, "num_stages": 4, "words": 1}
    yield from _apart(best, ("overlap", "read_once"))


def _gated_norm() -> Iterator[Knobs]:
    yield from _grid(BR=(8, 16), num_warps=(4, 8), BT=(1,), early=(0,), read_once=(0, 1))
    yield from _grid(BR=(4,), num_warps=(2, 4), BT=(1,), early=(0,), read_once=(1,))
    yield from _grid(BR=(8, 16), num_warps=(4, 8), BT=(2,), early=(1,), read_once=(1,))


def _gated_norm_backward() -> Iterator[Knobs]:
    """Eight or sixteen elements of a lane: through registers, of eight 32 warps have room and of
    sixteen 16, or through shared memory, of sixteen 20 or 24. Rows of 128 of 4 x 4096 tokens of 16
    heads are then programs of 31, 25 and 21 turns."""
    words: dict[str, Sequence[Knob]] = {"words": (1,), "overlap": (1,), "read_once": (0,)}
    words |= {"spread": (1,)}
    for BR, warps in ((16, 4), (8, 2), (4, 1)):
        shared = words | {"BR": (BR,), "num_warps": (warps,)}
        yield from _grid(**shared, BT=(32, 128 // warps), early=(1,))
        yield from _grid(**shared, BT=(21, 25, 32), early=(0,), num_stages=(3, 4))
    for BR, warps in ((8, 4), (4, 2), (2, 1)):
        shared = words | {"BR": (BR,), "num_warps": (warps,)}
        yield from _grid(**shared, BT=(32,), early=(0,), num_stages=(3, 4))
    # and what each of them is worth
    usual: Knobs = {"BR": 16, "num_warps": 4, "BT": 32, "early": 1}
    yield from _apart(usual, ("words", "spread", "overlap", "read_once"))


def _projected_norm() -> Iterator[Knobs]:
    """A tile to a program, three or four programs to a multiprocessor; or turns of tiles, for which
    a program holds its rows of the projection, with loads ahead."""
    yield from _grid(BM=(64,), num_warps=(4,), turns=(1,), maxnreg=(0, 128))
    yield from _grid(BM=(32,), num_warps=(4,), turns=(1,))
    yield from _grid(BM=(128,), num_warps=(8,), turns=(1, 2))
    for BM, warps in ((64, 4), (32, 4), (128, 8)):
        most = (0, 128) if BM == 32 else (0,)
        yield from _grid(
            BM=(BM,), num_warps=(warps,), turns=(2, 4, 8), num_stages=(2, 3), maxnreg=most
        )
    yield from _grid(BM=(64,), num_warps=(4, 8), turns=(2, 4), num_stages=(1,))


def _decay_gate() -> Iterator[Knobs]:
    """Lanes of 4 channels of a tile, or of 8; 1 to 8 tiles under way."""
    for BD, BR, warps in ((128, 4, 4), (128, 2, 2), (128, 8, 8), (256, 2, 4), (512, 1, 4)):
        yield from _grid(BD=(BD,), BR=(BR,), num_warps=(warps,), ahead=(1, 2, 4, 8))
    yield from _grid(BD=(128,), BR=(8,), num_warps=(4,), ahead=(1, 2, 4))


_SWEPT: Final[Mapping[str, Callable[[], Iterator[Knobs]]]] = {
    "short_conv": _short_conv,
    "short_conv_backward": _short_conv_backward,
    "gated_norm": _gated_norm,
    "gated_norm_backward": _gated_norm_backward,
    "projected_norm": _projected_norm,
    "decay_gate": _decay_gate,
    "decay_gate_backward": _decay_gate,
}
STAGES: Final = tuple(_SWEPT)


def _key(stage: str, knobs: Knobs) -> tuple[Any, ...]:
    return (stage, *sorted(knobs.items()))
