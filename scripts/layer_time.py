"""What a layer costs on a GPU, and its kernels beside the recurrence: milliseconds, medians.

    python scripts/layer_time.py [--layers gdn2 kda] [--batch 4] [--tokens 4096] [--save]
    python scripts/layer_time.py --only layers [--minutes 4] [--alone] | --sweep [STAGE ...]

bf16, 2048 channels in 16 heads, Mamba's 4096 in 64. The kernels are the short convolutions of q, k
and v, the gated norm, and a decay's gate by itself; each is beside the floor, the time that a copy
of its bytes would take (inputs read once, outputs written once), and beside
flash-linear-attention's modules where there are such and these can be imported. A layer is timed
with random weights, forward without gradients, and forward and backward with all of them. Every run
begins with the L2 flushed.
Rows are printed as they are measured: all of ours first, then flash-linear-attention's, layer by
layer, whose first call tries its configs, compiled side by side and each timed for 20 ms, for up to
a minute; --minutes begins no other of its layers after that, and --alone none at all. --save keeps
rows in docs/layers/, one as soon as it is there, and makes the table of docs/experiments.md of all
that are kept. --turn FILE is for several of these commands, a layer each, that share a GPU: they
compile, and try the configs of flash-linear-attention's, side by side, say so in FILE.ready, and
time one at a time once FILE is there. --sweep times configs of the kernels, of all or of these
stages, for the rules in kernels/parts.py, and checks what they make; it fails if one is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

import torch  # noqa: E402
from layer_parts import (  # noqa: E402
    DTYPE,
    HEADS,
    HIDDEN,
    Part,
    convolution,
    differentiated,
    gate,
    norm,
    projected,
    their_module,
    tokens,
)
from learning import autotuning  # noqa: E402
from learning.record import Row, record, recorded  # noqa: E402
from learning.report import NOTHING, put, table  # noqa: E402
from learning.rows import machine  # noqa: E402
from part_sweep import STAGES, Swept, sweep  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from gdn2gen.base.device import slug_of  # noqa: E402
from gdn2gen.base.environment import verifying  # noqa: E402
from gdn2gen.base.terminal import Sheet, console, plain  # noqa: E402
from gdn2gen.measure.timing import copy_gbps, time_ms  # noqa: E402
from gdn2gen.measure.turn import in_turn  # noqa: E402
from gdn2gen.nn.model import MIXERS  # noqa: E402

RECORDS: Final = ROOT / "docs/layers"
PAGE: Final = ROOT / "docs/experiments.md"
KEY: Final = ("what", "direction", "batch", "tokens")
COLUMNS: Final = ("what", "direction", "ms", "floor ms", "x floor", "FLA ms", "FLA / ours")
DIRECTIONS: Final = ("forward", "forward+backward")
Run = Callable[[], Any]
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
    "gated_delta_rule": {**SIZES, "expand_v": 1.0},
    "gla": {**SIZES, "expand_v": 1.0},
}
OTHERS: Final[dict[str, dict[str, Any]]] = {
    "gated_delta_rule": {**SIZES, "expand_v": 1.0},
    "delta_rule": {"num_heads": HEADS},
    "gla": {"num_heads": HEADS, "expand_k": 1.0, "expand_v": 1.0},
    "mamba2": {"num_heads": 2 * HIDDEN // 64, "use_bias": False, "use_conv_bias": True},
    "mamba3": {},
}

# Each of several processes that compile at the same time.
THREADS: Final = 4

_IN_FP32: Final = ("A_log", "dt_bias", "D", "B_bias", "C_bias")


def ms(run: Run) -> float:
    return time_ms(run).median


def part_rows(part: Part) -> Iterator[Row]:
    """A row for each direction, and one for both by autograd."""
    directions = (("forward", part.forward), ("backward", part.backward))
    for (name, run), nbytes in zip(directions, part.bytes, strict=True):
        floor = nbytes / copy_gbps() / 1e6
        fla = ms(part.theirs[0]) if part.theirs and name == "forward" else None
        yield _row(part.name, name, ms(run), fla, floor)
    fla = ms(part.theirs[1]) if part.theirs else None
    yield _row(part.name, "forward+backward", ms(part.both), fla)


def swept_of(part: Part) -> Iterator[Swept]:
    """Its directions, as a sweep takes them."""
    runs = zip(part.stages, (part.forward, part.backward), part.bytes, part.exact, strict=True)
    for stage, run, nbytes, exact in runs:
        yield Swept(stage, part.problem, run, nbytes / copy_gbps() / 1e6, exact)


def layer_rows(member: str, x: Tensor) -> Iterator[Row]:
    """Ours, forward, and with the backward."""
    ours = MIXERS[member](HIDDEN, **OURS.get(member, SIZES)).to(x.device, DTYPE)
    found = _layer_times(lambda: ours(x), [x, *ours.parameters()])
    for name, took in zip(DIRECTIONS, found, strict=True):
        yield _row(f"layer {member}", name, took)


def their_times(member: str, x: Tensor) -> tuple[float | None, ...]:
    """Of flash-linear-attention's layer, forward and with the backward; None for what does not
    run."""
    make, found = their_module(*THEIRS[member]), list[float | None]()
    try:
        layer = None if make is None else their_layer(member, make, x)
        if layer is not None:
            with autotuning.alone():
                for took in _layer_times(lambda: layer(x)[0], [x, *layer.parameters()]):
                    found.append(took)
    except Exception as error:  # another version's arguments: no reason to lose what follows
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        console(stderr=True).print(plain(f"flash-linear-attention's {member}: {said}"))
    return tuple(found + [None] * (len(DIRECTIONS) - len(found)))


def called(member: str, x: Tensor, peer: bool, lock: Path) -> None:
    """Ours and theirs once, forward and backward: all is compiled, and theirs have chosen. `lock`
    is held while a config of theirs is timed."""
    ours = MIXERS[member](HIDDEN, **OURS.get(member, SIZES)).to(x.device, DTYPE)
    differentiated(lambda: ours(x), [x, *ours.parameters()])()
    make = their_module(*THEIRS[member]) if peer else None
    if make is None:
        return
    theirs = their_layer(member, make, x)
    # what does not run says so where it is timed
    with suppress(Exception), autotuning.searching(THREADS, lock):
        differentiated(lambda: theirs(x)[0], [x, *theirs.parameters()])()


def their_layer(member: str, make: Any, x: Tensor) -> nn.Module:
    """Without causal_conv1d its Mamba-2 cannot train: then as in evaluation, where the same layer
    is Triton's convolution, mamba_ssm's scan and a norm, with gradients all the same."""
    layer: nn.Module = make(hidden_size=HIDDEN, **OTHERS.get(member, SIZES)).to(x.device, DTYPE)
    for name in _IN_FP32 if member.startswith("mamba") else ():
        if hasattr(layer, name):  # as mamba_ssm's ops want them, and ours keep them
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach().float()))
    return layer.train(member != "mamba2" or find_spec("causal_conv1d") is not None)


def _row(
    what: str, direction: str, took: float, fla: float | None = None, floor: float | None = None
) -> Row:
    return {"what": what, "direction": direction, "ms": took, "floor_ms": floor, "fla_ms": fla}


def _layer_times(run: Callable[[], Tensor], into: list[Tensor]) -> Iterator[float]:
    """Forward, then with the backward, which may not run where the forward does."""
    yield ms(torch.no_grad()(run))
    yield ms(differentiated(run, into))


@verifying()
def main() -> None:
    args = _arguments()
    torch.manual_seed(0)
    made = [make(args.batch, args.tokens) for make in (convolution, norm, gate)]
    if args.sweep is not None:
        problem, run, nbytes, exact = projected(args.batch, args.tokens)
        floor = nbytes / copy_gbps() / 1e6
        swept = [x for part in made for x in swept_of(part)]
        swept.append(Swept("projected_norm", problem, run, floor, exact))
        wrong = sweep([x for x in swept if x.stage in (args.sweep or STAGES)])
        if wrong:
            raise SystemExit("\n".join(wrong))
        return
    x = tokens(args.batch, args.tokens, HIDDEN).requires_grad_()
    if args.turn is not None and args.only != "parts":
        for member in args.layers:
            called(member, x, not args.alone, Path(f"{args.turn}.search"))
    with in_turn(args.turn):
        measure(args, made, x)


def measure(args: argparse.Namespace, made: Sequence[Part], x: Tensor) -> None:
    """Kernels, our layers, and theirs until the time is over."""
    until = time.monotonic() + 60 * args.minutes
    rows = Rows(args.batch, args.tokens, args.save)
    if args.only != "layers":
        for part in made:
            rows.add(part_rows(part))
    if args.only != "parts":
        of_layers = {member: rows.add(layer_rows(member, x)) for member in args.layers}
        for member, ours in of_layers.items():
            if args.alone or time.monotonic() > until:
                continue
            both = zip(ours, their_times(member, x), strict=True)
            rows.add({**row, "fla_ms": other} for row, other in both if other is not None)
    rows.show()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", nargs="*", choices=tuple(MIXERS), default=list(MIXERS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--only", choices=("parts", "layers"))
    parser.add_argument("--alone", action="store_true", help="not flash-linear-attention's layers")
    parser.add_argument("--minutes", type=float, default=5.0, help="then none of those begins (5)")
    parser.add_argument("--save", action="store_true", help="keep rows in docs/layers")
    parser.add_argument("--turn", type=Path, metavar="FILE", help="share the GPU (see above)")
    parser.add_argument(
        "--sweep", nargs="*", choices=STAGES, help="time configs of the kernels instead"
    )
    return parser.parse_args()


class Rows:
    """Those of a run, by what they are of: printed, and with `save` kept, as they come."""

    def __init__(self, batch: int, count: int, save: bool) -> None:
        self._size = {"batch": batch, "tokens": count}
        self._save = save
        self._rows: dict[tuple[Any, ...], Row] = {}

    def add(self, rows: Iterable[Row]) -> list[Row]:
        """Rows as they are measured; a later one of the same thing takes the place of the first."""
        made = []
        for row in rows:
            whole = {**self._size, **row}
            self._rows[tuple(whole[name] for name in KEY)] = whole
            made.append(row)
            console().print("  ".join(cells_of(whole)))
            if self._save:
                gpu = torch.cuda.get_device_name()
                path = RECORDS / f"{slug_of(gpu)}.json"
                known = [x for x in (recorded(RECORDS)) if x["gpu"] == gpu]
                record(path, gpu, [_with_fla({**whole, "machine": machine()}, known)], KEY)
                put(PAGE, "layers", page(recorded(RECORDS)))
        return made

    def show(self) -> None:
        sheet = Sheet(
            f"{torch.cuda.get_device_name()}, {copy_gbps():.0f} GB/s by a copy",
            COLUMNS,
            words=("what", "direction"),
        )
        for row in self._rows.values():
            sheet.add(*cells_of(row))
        console().print(sheet)


def _with_fla(row: Row, known: Sequence[Row]) -> Row:
    """What was measured of flash-linear-attention stays, where a new row lacks it."""
    if row["fla_ms"] is None:
        for other in known:
            if all(other[name] == row[name] for name in KEY):
                return {**row, "fla_ms": other["fla_ms"]}
    return row


def cells_of(row: Row) -> list[str]:
    floor, fla, took = row["floor_ms"], row["fla_ms"], row["ms"]
    return [
        row["what"],
        row["direction"],
        f"{took:.4f}",
        "-" if floor is None else f"{floor:.4f}",
        "-" if floor is None else f"{took / floor:.2f}",
        "-" if fla is None else f"{fla:.4f}",
        "-" if fla is None else f"{fla / took:.2f}",
    ]


def page(rows: Sequence[Row]) -> str:
    """A table for each GPU and size."""
    parts = []
    for gpu, batch, count in dict.fromkeys((x["gpu"], x["batch"], x["tokens"]) for x in rows):
        mine = [x for x in rows if (x["gpu"], x["batch"], x["tokens"]) == (gpu, batch, count)]
        dates = sorted({x["machine"]["date"] for x in mine})
        about = {**mine[-1]["machine"], "date": " to ".join(dict.fromkeys((dates[0], dates[-1])))}
        words = ", ".join(f"{name} {value}" for name, value in about.items())
        lines = [cells_of(x) for x in mine]
        parts += [f"{batch} x {count} tokens; {words}", "", table(COLUMNS, lines), ""]
    return "\n".join(parts).rstrip() or NOTHING


if __name__ == "__main__":
    main()
