"""A forward in one kernel (`scripts/one_forward`): is it right, and how fast, on sm_90.

    python scripts/one_forward_time.py [--op kda] [--shapes train4k wide8k 1x64x16 ...]

Every check against the fp64 reference and against prepare's own results comes first, from one chunk
up, so that where a run stops says what it stopped at; then times, each of a CUDA graph of several
forwards: of the op as it is on file, of prepare and scan alone, of the one kernel, and of variants
of it that leave something out, whose results are wrong and whose times say where the time goes.
Programs are compiled first, several at once (30 s each).

    python scripts/one_forward_time.py --compile KEY=VALUE,...

compiles one of them, with the options of `program`, and says what it takes; no GPU is needed.
"""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

import torch  # noqa: E402
from one_forward.program import PASSES, program  # noqa: E402
from one_forward.sizes import BT, K, V  # noqa: E402

from gdn2gen.base.environment import hush_tilelang, verifying  # noqa: E402
from gdn2gen.family import reference  # noqa: E402
from gdn2gen.family.inputs import PATTERNS, make_inputs  # noqa: E402
from gdn2gen.family.registry import recurrence_named  # noqa: E402
from gdn2gen.family.tolerances import limit_of  # noqa: E402
from gdn2gen.measure.accuracy import relative_errors  # noqa: E402

Options = dict[str, Any]
Tensors = dict[str, torch.Tensor]
VARIANTS: Final[dict[str, Options]] = {
    "one kernel": {},
    "o and state alone": {"keeps": False},
    "one frame alone": {"frames": False},
    "without the scan": {"without": "scan"},
    "without the prepare": {"without": "prepare"},
}
STARTS: Final[Options] = {"starts": True}
# Sequences, tokens, heads, patterns: a chunk; less than one; each slot once, and twice; a tail.
CHECKS: Final = (
    (1, 32, 1, ("layer",)),
    (1, 7, 1, ("layer",)),
    (1, 64, 1, ("layer",)),
    (1, 128, 2, ("layer",)),
    (2, 200, 3, ("layer", "mixed")),
    (2, 1100, 8, PATTERNS),
    (4, 4096, 16, ("layer",)),
)
LIMIT: Final = limit_of("bf16", "layer")
# As filed for train4k on an NVIDIA H200.
PREPARE: Final = {
    "decay": "anchored", "BK": 128, "chunks": 4, "solve": "halves",
    "maxnreg": 80, "num_stages": 1, "num_warps": 4,
}  # fmt: skip
SCAN: Final = {"segments": "serial", "BV": 64, "num_stages": 4, "num_warps": 4}
SHAPES: Final = ("train4k", "wide8k", "few8k", "1x16x16", "1x64x16", "1x256x16", "1x1024x16")
SCALE: Final = K**-0.5


def written(options: Options) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())


def read(text: str) -> dict[str, Any]:
    """The options that `written` wrote."""
    words = dict(word.split("=") for word in text.split(",") if word)
    flags = {"True": True, "False": False}
    return {name: flags.get(value, value) for name, value in words.items()}


def compiled(options: Options, target: str | dict[str, str] = "auto") -> Any:
    import tilelang

    from gdn2gen.codegen.nvrtc import compiler_for

    hush_tilelang()
    with compiler_for("cuda" if target == "auto" else None):
        return tilelang.compile(program(**options), target=target, pass_configs=PASSES)


def compile_all(several: list[Options]) -> None:
    """Into TileLang's cache, each in a process of its own."""
    command = [sys.executable, __file__, "--for-present", "--compile"]
    running = [subprocess.Popen([*command, written(options)]) for options in several]
    if any(process.wait() != 0 for process in running):
        raise SystemExit("a program does not compile")


def say_resources(options: Options) -> None:
    """Registers and stack of a thread, shared memory, by the compiler for sm_90."""
    from tilelang.cache.cuda_binary_cache import CUDABinaryCache

    from gdn2gen.codegen import build

    binaries: list[bytes] = []
    save = CUDABinaryCache.save

    def keep(key: str, kind: str, binary: bytes) -> Any:
        binaries.append(bytes(binary))
        return save(key, kind, binary)

    CUDABinaryCache.save = keep
    kernel = compiled(options, {"kind": "cuda", "arch": "sm_90a"})
    CUDABinaryCache.save = save
    used = build._register_use(binaries[-1]) if binaries else "kept compiled: not known"
    shared = build._dynamic_shared_bytes(kernel.get_host_source())
    print(f"{written(options) or 'as it is'}: registers and stack {used}, {shared} B shared")


def drawn(op: str, B: int, T: int, H: int, pattern: str = "layer", starts: bool = False) -> Tensors:
    return make_inputs(
        B, T, H, K, V, op=op, dtype=torch.bfloat16, device="cuda", pattern=pattern,
        initial_state=starts,
    )  # fmt: skip


def room(x: Tensors, segment: int) -> Tensors:
    """What the kernel writes, full of NaN; and a state to start from, which not all read."""
    B, T, H, _ = x["q"].shape
    NT = -(-T // BT)
    shapes = {
        "initial_state": (B, H, K, V),
        "o": (B, T, H, V),
        "final_state": (B, H, K, V),
        "q_rstd": (B * NT, H, BT),
        "k_rstd": (B * NT, H, BT),
        "A": (B * NT, H, BT, BT),
        "Aqk": (B * NT, H, BT, BT),
        "S_seg": (B, H, -(-NT // segment), V, K),
    }
    half = ("o", "A", "Aqk")
    return {
        name: torch.full(
            shape, float("nan"), device="cuda",
            dtype=torch.bfloat16 if name in half else torch.float32,
        )
        for name, shape in shapes.items()
    }  # fmt: skip


def run(kernel: Any, x: Tensors, out: Tensors, segment: int) -> None:
    tied = "beta" in x
    gates = (x["g"], x["beta" if tied else "b"], x["v" if tied else "w"])
    state = x.get("initial_state", out["initial_state"])
    results = [out[name] for name in out if name != "initial_state"]
    kernel(x["q"], x["k"], x["v"], *gates, state, *results, SCALE, segment)


def again(kernel: Any, x: Tensors, out: Tensors, segment: int, _: int) -> None:
    run(kernel, x, out, segment)


def beside(op: str, stage: str) -> ModuleType:
    """Prepare or scan, in TileLang, as on file."""
    from gdn2gen.codegen.build import load
    from gdn2gen.codegen.render import render
    from gdn2gen.family.problem import Problem
    from gdn2gen.kernels.config import default_config

    problem = Problem(op)
    config = default_config(stage, problem, BT=BT, arch="sm_90")
    own: dict[str, Any] = PREPARE if stage == "prepare" else SCAN
    return load(render(problem, stage, config.replace(language="tilelang", **own)))


class Stages:
    """Prepare, then scan."""

    def __init__(self, op: str, x: Tensors, segment: int) -> None:
        B, T, H, _ = x["q"].shape
        NT = B * -(-T // BT)
        self.out = room(x, segment)
        for name in ("Qg", "Y", "Ktail"):
            self.out[name] = torch.empty(NT, H, BT, K, device="cuda", dtype=torch.bfloat16)
        self.out["gamma_C"] = torch.empty(NT, H, K, device="cuda")
        self.out["k_beta"] = torch.empty(NT, H, BT, device="cuda")
        scalars = {
            "scale": SCALE, "lower_bound": 0.0, "n_chunks": NT, "n_sequences": B, "T": T,
            "H": H, "HV": H, "HG": H, "NS": self.out["S_seg"].shape[2], "segment": segment,
        }  # fmt: skip
        given = self.out | x | scalars
        self.launches = []
        for stage in ("prepare", "scan"):
            launch = beside(op, stage).launch
            names = inspect.signature(launch).parameters
            self.launches.append(partial(launch, **{name: given[name] for name in names}))

    def __call__(self) -> None:
        for launch in self.launches:
            launch()


def check(op: str, kernel: Any, x: Tensors, words: str, limit: float = LIMIT) -> None:
    """o and the state against the fp64 reference, the rest against prepare and scan; bits twice."""
    segment = 4
    out, again = room(x, segment), room(x, segment)
    run(kernel, x, out, segment)
    run(kernel, x, again, segment)
    torch.cuda.synchronize()
    exact = {name: value.double() for name, value in x.items()}
    o, state = reference.chunk(
        recurrence_named(op), exact, use_qk_l2norm_in_kernel=True, compute_dtype=torch.float64
    )
    expected = {"o": o, "final_state": state}
    if "initial_state" not in x:
        stages = Stages(op, x, segment)
        stages()
        kept = ("q_rstd", "k_rstd", "A", "Aqk", "S_seg")
        expected |= {name: stages.out[name] for name in kept}
    errors = relative_errors(out, expected)
    print(words, " ".join(f"{name} {x:.1e}" for name, x in errors.items()), flush=True)
    if not max(errors.values()) < limit:
        raise SystemExit(f"{words}: wrong")
    for name in expected:
        if not torch.equal(out[name], again[name]):
            raise SystemExit(f"{words}: {name} was of other bits the second time")


def check_causal(op: str, kernel: Any) -> None:
    """A token that forgets all, and is in no first frame, moves no bit before it."""
    x = drawn(op, 2, 96, 4)
    before, after = room(x, 4), room(x, 4)
    run(kernel, x, before, 4)
    x["g"][:, 45] = -300.0
    run(kernel, x, after, 4)
    if not torch.equal(before["o"][:, :45], after["o"][:, :45]):
        raise SystemExit("a token moved what lies before it")
    print("causal, bit for bit", flush=True)


def check_all(op: str, kernel: Any) -> None:
    for B, T, H, patterns in CHECKS:
        for pattern in patterns:
            limit = limit_of("bf16", pattern)
            check(op, kernel, drawn(op, B, T, H, pattern), f"{B}x{T}x{H} {pattern}", limit)
    check_causal(op, kernel)
    kernel = compiled({"op": op} | STARTS)
    check(op, kernel, drawn(op, 2, 300, 3, "mixed", starts=True), "from a state")


def time_shape(op: str, word: str, kernels: Mapping[str, Any], segment: int) -> None:
    from decode_time import graph_us
    from prefill_time import forward

    from gdn2gen.family.shapes import parse_shapes
    from gdn2gen.ops import chunk

    (shape,) = parse_shapes(word)
    B, T, H = shape.B, shape.T, shape.H
    calls = 5 if B * T * H >= 2**16 else 20
    x = drawn(op, B, T, H)
    rows = {}
    if B == 1:
        function = getattr(chunk, recurrence_named(op).public.chunk)
        rows["the op, on file"] = graph_us(forward(op, T, H, function, "cuda"), calls)
    stages = Stages(op, x, segment)
    rows["prepare + scan"] = graph_us(lambda _: stages(), calls)
    out = room(x, segment)
    for name, kernel in kernels.items():
        rows[name] = graph_us(partial(again, kernel, x, out, segment), calls)
    chunks = -(-T // BT)
    for name, us in rows.items():
        print(f"{word:>10} {name:<20} {us:9.1f} us {us / chunks:7.3f} us a chunk", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=("gdn2", "kda"), default="gdn2")
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--segment", type=int, default=32)
    parser.add_argument("--only-time", action="store_true", help="no checks: for a profiler")
    parser.add_argument("--compile", type=read)
    parser.add_argument("--for-present", action="store_true", help="compile for the present GPU")
    given = parser.parse_args()
    if given.compile is not None:
        if given.for_present:
            compiled(given.compile)
        else:
            say_resources(given.compile)
        return
    op = {"op": given.op}
    compile_all([op | options for options in (*VARIANTS.values(), STARTS)])
    kernels = {name: compiled(op | options) for name, options in VARIANTS.items()}
    with verifying():
        if not given.only_time:
            check_all(given.op, kernels["one kernel"])
        for word in given.shapes:
            time_shape(given.op, word, kernels, given.segment)


if __name__ == "__main__":
    main()
