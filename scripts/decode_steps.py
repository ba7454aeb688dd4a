"""Steps of decoding and what times them: one token of B sequences at K = V = 128, on a GPU; of
Mamba-2 at a state of 128 and heads of 64. Beside each the ops of other libraries that can be
imported, by the name of the library: on the same slots where they take a pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen import selective_state_update
from gdn2gen.base.terminal import console
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.registry import recurrence_named
from gdn2gen.measure.timing import copy_gbps
from gdn2gen.ops import recurrent

Run = Callable[[int], Any]
DEVICE = "cuda"
DIM: Final = 128
# Where an op may be, the first that can be imported.
SELECTIVE: Final = ("mamba_ssm.ops.triton.selective_state_update",)
FLASHINFER: Final = ("flashinfer.gdn_decode",)
VLLM: Final = (
    "vllm.third_party.flash_linear_attention.ops",
    "vllm.model_executor.layers.fla.ops",
)
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
    in_order: bool = False
    """Whether a call's slots follow each other, as the states of an op without a pool do."""

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
            dtype=torch.bfloat16, gate_dtype=torch.bfloat16, device=DEVICE,
        )  # fmt: skip
        bias = recurrence_named(self.op).named.get("dt_bias")
        if bias is not None:
            made["g"].normal_()
            width = DIM if "K" in bias.symbols else 1
            made["A_log"] = torch.rand(self.heads, device=DEVICE)
            made["dt_bias"] = torch.rand(self.heads * width, device=DEVICE) - 4.0
        there = dict(recurrence_named(self.op).public.recurrent_names)
        return {there.get(name, name): x for name, x in made.items()}

    def selective_inputs(self) -> dict[str, Any]:
        """The same of Mamba-2, in mamba_ssm's words: slices of one projection, and what is one
        number a head repeated."""
        heads, P = self.heads, self.V
        sizes = [heads * P, heads * P, DIM, DIM, heads]
        row = torch.randn(self.batch, sum(sizes), device=DEVICE, dtype=torch.bfloat16)
        z, x, B, C, dt = torch.split(row, sizes, -1)
        rate, bias, D = torch.rand(3, heads, device=DEVICE)
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

    def slots(self) -> tuple[Tensor, list[Tensor]]:
        """A pool with V first (or K first, as asked), and which slots each call has: its own, or,
        if they are warm, the same."""
        sets = 1 if self.warm else self.calls
        inner = (self.V, DIM)  # K = V, but for Mamba-2, whose V is first
        shape = (sets * self.batch, self.heads, *inner)
        pool = torch.randn(shape, device=DEVICE, dtype=STATES[self.state])
        shuffled = torch.arange if self.in_order else torch.randperm
        order = shuffled(sets * self.batch, device=DEVICE).int()
        return pool, list(order.view(sets, self.batch))

    def selective(self, function: Callable[..., Any], **keywords: Any) -> Run:
        """Call number i of an op with mamba_ssm's arguments, on slots of its own."""
        inputs = self.selective_inputs()
        pool, rows = self.slots()

        def run(i: int) -> None:
            function(pool, **inputs, state_batch_indices=rows[i % len(rows)], **keywords)

        return run

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
            out = torch.empty(self.batch, self.heads, self.V, device=DEVICE, dtype=torch.bfloat16)
            return self.selective(selective_state_update, out=out)
        function = getattr(recurrent, recurrence_named(self.op).public.recurrent)
        inputs, flags = self.inputs(), self.flags()
        pool, rows = self.slots()
        out = torch.empty_like(inputs["v"])

        def run(i: int) -> None:
            indices = rows[i % len(rows)]
            function(**inputs, **flags, state_pool=pool, ssm_state_indices=indices, out=out)

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


def peers(step: Step) -> Iterator[tuple[str, Run]]:
    """What can be imported and takes such a step."""
    if step.stepped:
        function = _found(SELECTIVE, "selective_state_update")
        if function is not None:
            yield "mamba_ssm", step.selective(function)
        return
    made = _fla(step)
    if made is not None:
        yield "FLA", made
    if step.op != "gated_delta_rule" or not step.v_first:
        return
    function = _found(VLLM, "fused_recurrent_gated_delta_rule_packed_decode")
    if function is not None:
        yield "vLLM", _vllm(step, function)
    function = _found(FLASHINFER, "gated_delta_rule_decode_pretranspose")
    if function is not None:
        yield "FlashInfer", _flashinfer(step, function)


def _found(places: tuple[str, ...], name: str) -> Callable[..., Any] | None:
    for place in places:
        try:
            function: Callable[..., Any] = getattr(import_module(place), name)
            return function
        except Exception as error:  # their modules import much that may be missing
            console(stderr=True).print(f"without {place}: {error}")
    return None


def _fla(step: Step) -> Run | None:
    """flash-linear-attention's takes fp32 states and writes new ones; None of others."""
    public = recurrence_named(step.op).public
    if step.state != "fp32" or not public.fla:
        return None
    function = _found((public.fla,), public.recurrent)
    if function is None:
        return None
    inputs, flags = step.inputs(), step.flags()
    sets = 1 if step.warm else step.calls
    states = list(torch.randn((sets, step.batch, step.heads, DIM, DIM), device=DEVICE))

    def run(i: int) -> None:
        function(**inputs, **flags, initial_state=states[i % sets], output_final_state=True)

    return run


def _vllm(step: Step, function: Callable[..., Any]) -> Run:
    """On the same kind of pool; q, k and v of a token lie in one row. Slot 0 is padding there."""
    x = step.inputs()
    pool, rows = step.slots()
    out = torch.empty_like(x["v"])
    mixed = torch.cat([x[name].flatten(1) for name in "qkv"], 1)
    gates = x["g"].squeeze(1), x["beta"].squeeze(1), x["A_log"], x["dt_bias"]

    def run(i: int) -> None:
        indices = rows[i % len(rows)]
        function(mixed, *gates, DIM**-0.5, pool, out, indices, use_qk_l2norm_in_kernel=True)

    return run


def _flashinfer(step: Step, function: Callable[..., Any]) -> Run:
    """On the same kind of pool."""
    x = step.inputs()
    pool, rows = step.slots()
    out = torch.empty_like(x["v"])
    given = {"A_log": x["A_log"], "a": x["g"], "dt_bias": x["dt_bias"], "b": x["beta"]}
    given |= {name: x[name] for name in "qkv"}

    def run(i: int) -> None:
        function(
            **given, state=None, scale=DIM**-0.5, output=out, use_qk_l2norm=True,
            initial_state=pool, initial_state_indices=rows[i % len(rows)],
        )  # fmt: skip

    return run


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
