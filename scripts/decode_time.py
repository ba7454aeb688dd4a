"""What a step of decoding costs: one token of B sequences at K = V = 128, on a GPU; of Mamba-2 at a
state of 128 and heads of 64, with skip, gate and one group of B and C, by selective_state_update.

    python scripts/decode_time.py [--op kda] [--batch 1 8] [--k-first] [--warm]
        [--knobs loads=ahead] [--sweep [BV=8,16 loads=ahead]]

Time is that of a CUDA graph of many calls, for one of them: each has slots of its own, so that no
state lies in the L2 (with --warm all have the same); the median of 20 replays. The floor is the
time that a copy of the same bytes would take: the state read and written, the token's tensors read,
o written. Host time is that of one call of 200, the least of six runs. Beside it
flash-linear-attention's op, where it is installed: it takes fp32 states and writes new ones; and of
Mamba-2 mamba_ssm's, on the same slots.
--knobs are run in place of the rule's. --sweep times every config that has such knobs, for the rule
in kernels/recurrent.py (decode_sweep.py). Figures of two versions compare if they are of one GPU,
taken in turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

import torch  # noqa: E402
from decode_sweep import domain, knob, sweep  # noqa: E402
from torch import Tensor  # noqa: E402

from gdn2gen import selective_state_update  # noqa: E402
from gdn2gen.base.environment import verifying  # noqa: E402
from gdn2gen.base.terminal import Sheet, console  # noqa: E402
from gdn2gen.family.inputs import make_inputs  # noqa: E402
from gdn2gen.family.registry import DECODING_OPS, recurrence_named  # noqa: E402
from gdn2gen.measure.timing import copy_gbps  # noqa: E402
from gdn2gen.ops import recurrent  # noqa: E402
from gdn2gen.runtime import decoding  # noqa: E402

Run = Callable[[int], Any]
DIM: Final = 128
SELECTIVE: Final = "mamba_ssm.ops.triton.selective_state_update"
# Of states that the calls of a graph take together: more than the L2 of any GPU so far.
COLD_BYTES: Final = 2**29
MOST_CALLS: Final = 200
REPLAYS: Final = 20
HOST_CALLS: Final = 200
STATES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Step:
    """A step of decoding, and the tensors that it takes."""

    op: str
    batch: int
    heads: int
    state: str
    v_first: bool
    warm: bool

    @property
    def stepped(self) -> bool:
        """Mamba-2, whose op and peer have mamba_ssm's words."""
        return recurrence_named(self.op).stepped

    @property
    def V(self) -> int:
        return 64 if self.stepped else DIM

    @property
    def state_bytes(self) -> int:
        return self.batch * self.heads * DIM * self.V * STATES[self.state].itemsize

    @property
    def calls(self) -> int:
        """Of a graph: enough to be timed, and so many that the states of all are in no cache."""
        return min(MOST_CALLS, max(20, -(-COLD_BYTES // self.state_bytes)))

    def inputs(self) -> dict[str, Tensor]:
        """A token of a layer in bf16, its gate before the activation."""
        made = make_inputs(
            self.batch, 1, self.heads, DIM, DIM, op=self.op,
            dtype=torch.bfloat16, gate_dtype=torch.bfloat16, device="cuda",
        )  # fmt: skip
        bias = recurrence_named(self.op).named.get("dt_bias")
        if bias is not None:
            made["g"].normal_()
            width = DIM if "K" in bias.symbols else 1
            made["A_log"] = torch.rand(self.heads, device="cuda")
            made["dt_bias"] = torch.rand(self.heads * width, device="cuda") - 4.0
        there = dict(recurrence_named(self.op).public.recurrent_names)
        return {there.get(name, name): x for name, x in made.items()}

    def selective_inputs(self) -> dict[str, Any]:
        """The same of Mamba-2, in mamba_ssm's words: slices of one projection, and what is one
        number a head repeated."""
        heads, P = self.heads, self.V
        sizes = [heads * P, heads * P, DIM, DIM, heads]
        row = torch.randn(self.batch, sum(sizes), device="cuda", dtype=torch.bfloat16)
        z, x, B, C, dt = torch.split(row, sizes, -1)
        rate, bias, D = torch.rand(3, heads, device="cuda")
        return {
            "x": x.view(self.batch, heads, P),
            "dt": dt[..., None].expand(-1, -1, P),
            "A": (-1.0 - rate)[:, None, None].expand(-1, P, DIM),
            "B": B[:, None],
            "C": C[:, None],
            "D": D[:, None].expand(-1, P),
            "z": z.view(self.batch, heads, P),
            "dt_bias": (bias - 4.0)[:, None].expand(-1, P),
            "dt_softplus": True,
        }

    def selective(self, function: Callable[..., Any], **keywords: Any) -> Run:
        """Call number i of an op with mamba_ssm's arguments, on slots of its own."""
        inputs = self.selective_inputs()
        sets = 1 if self.warm else self.calls
        slots = sets * self.batch
        shape = (slots, self.heads, self.V, DIM)
        pool = torch.randn(shape, device="cuda", dtype=STATES[self.state])
        rows = list(torch.randperm(slots, device="cuda").int().view(sets, self.batch))

        def run(i: int) -> None:
            function(pool, **inputs, state_batch_indices=rows[i % sets], **keywords)

        return run

    def mamba_ssm(self) -> Run | None:
        """None where its Triton files cannot be imported."""
        try:
            function = import_module(SELECTIVE).selective_state_update
        except Exception as error:  # its modules import much that may be missing
            console(stderr=True).print(f"without mamba_ssm: {error}")
            return None
        return self.selective(function)

    def flags(self) -> dict[str, Any]:
        """What a layer has the kernel do, as far as the op takes it."""
        wanted = {
            "use_qk_l2norm_in_kernel": True,
            "use_gate_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
            "state_v_first": self.v_first,
        }
        known = recurrence_named(self.op).public.recurrent_arguments
        return {name: x for name, x in wanted.items() if name in known}

    def ours(self) -> Run:
        """Call number i, on slots of its own, into buffers that are there."""
        if self.stepped:
            out = torch.empty(self.batch, self.heads, self.V, device="cuda", dtype=torch.bfloat16)
            return self.selective(selective_state_update, out=out)
        function = getattr(recurrent, recurrence_named(self.op).public.recurrent)
        inputs, flags = self.inputs(), self.flags()
        sets = 1 if self.warm else self.calls
        slots = sets * self.batch
        shape = (slots, self.heads, DIM, DIM)
        pool = torch.randn(shape, device="cuda", dtype=STATES[self.state])
        rows = list(torch.randperm(slots, device="cuda").int().view(sets, self.batch))
        out = torch.empty_like(inputs["v"])

        def run(i: int) -> None:
            function(**inputs, **flags, state_pool=pool, ssm_state_indices=rows[i % sets], out=out)

        return run

    def peer(self) -> Run | None:
        """The same by flash-linear-attention; None where it is not, or takes no such state. Of
        Mamba-2 by mamba_ssm."""
        if self.stepped:
            return self.mamba_ssm()
        public = recurrence_named(self.op).public
        if self.state != "fp32":
            return None
        try:
            function = getattr(import_module(public.fla), public.recurrent)
        except (ImportError, AttributeError):
            return None
        inputs, flags = self.inputs(), self.flags()
        sets = 1 if self.warm else self.calls
        shape = (sets, self.batch, self.heads, DIM, DIM)
        states = list(torch.randn(shape, device="cuda"))

        def run(i: int) -> None:
            function(**inputs, **flags, initial_state=states[i % sets], output_final_state=True)

        return run

    def floor_us(self) -> float:
        names = {"A_log", "dt_bias", "A", "D", "dt_softplus"}
        inputs = self.selective_inputs() if self.stepped else self.inputs()
        token = sum(
            x.nbytes // (self.V if name == "dt" else 1)  # repeated over a head
            for name, x in inputs.items()
            if name not in names
        )
        o = self.batch * self.heads * self.V * 2
        return (2 * self.state_bytes + token + o) / copy_gbps() / 1e3


def graph_us(run: Run, calls: int) -> float:
    """Microseconds of the GPU for one call."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(3):
            run(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i)
    for _ in range(3):
        graph.replay()
    event: Any = torch.cuda.Event
    times = []
    for _ in range(REPLAYS):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(float(start.elapsed_time(end)))
    return median(times) / calls * 1e3


def host_us(run: Run) -> float:
    """Microseconds of the host for one call."""
    best = float("inf")
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for i in range(HOST_CALLS):
            run(i)
        best = min(best, time.perf_counter() - started)
    torch.cuda.synchronize()
    return best / HOST_CALLS * 1e6


def row(step: Step) -> list[str]:
    ours, floor = step.ours(), step.floor_us()
    us, host = graph_us(ours, step.calls), host_us(ours)
    cells = [str(step.batch), step.state, f"{us:.2f}", f"{floor:.2f}", f"{us / floor:.2f}"]
    cells.append(f"{host:.1f}")
    del ours
    peer = step.peer()
    if peer is None:
        return [*cells, "-", "-"]
    try:
        peer(0)
    except Exception as error:  # another version's arguments: no reason to lose our own figures
        console(stderr=True).print(f"the peer's {step.op}: {error}")
        return [*cells, "-", "-"]
    return [*cells, f"{graph_us(peer, step.calls):.2f}", f"{host_us(peer):.1f}"]


@verifying()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=DECODING_OPS, default=list(DECODING_OPS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--state", nargs="+", choices=tuple(STATES), default=list(STATES))
    parser.add_argument("--k-first", action="store_true", help="states are [HV, K, V]")
    parser.add_argument("--warm", action="store_true", help="every call takes the same states")
    parser.add_argument("--knobs", nargs="+", type=knob, default=[], help="in place of the rule's")
    parser.add_argument("--sweep", nargs="*", type=domain, help="time every config, or every such")
    args = parser.parse_args()
    decoding.force(**dict(args.knobs))
    steps = [
        Step(op, batch, args.heads, state, not args.k_first, args.warm)
        for op in args.op
        for state in args.state
        for batch in args.batch
    ]
    with torch.no_grad():
        if args.sweep is not None:
            timed = [(str(x), x.ours, partial(graph_us, calls=x.calls)) for x in steps]
            sweep(timed, dict(args.sweep))
            return
        # a table for each op, as soon as it is there
        for op, of_op in groupby(steps, lambda step: step.op):
            peer = "mamba_ssm" if recurrence_named(op).stepped else "FLA"
            columns = ("B", "state", "us", "floor us", "x floor", "host us")
            sheet = Sheet(
                f"{op}: {torch.cuda.get_device_name()}, {copy_gbps():.0f} GB/s by a copy",
                (*columns, f"{peer} us", f"{peer} host us"),
                words=("state",),
            )
            for step in of_op:
                sheet.add(*row(step))
            console().print(sheet)


if __name__ == "__main__":
    main()
