"""How long the first call takes in a process that has no compiler, no home and no cache, on a GPU.

    python scripts/cold_start.py [--op kda] [--shape few8k] [--keep DIR]

Compiles the kernels of that shape, forward, backward and one step of decoding, into a folder
(`gdn2gen compile`), then starts two processes with an empty environment but for the folder: PATH
and HOME lead nowhere, and the temporary folder is a fresh one. Each says how long imports, the
first forward and backward, the second ones and the first step of decoding took, which programs were
started, and which files were written. Exit code 1 if a compiler was started, or a call was not
right. Of the two the second one finds the files of Python and the driver in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

COMPILERS: Final = ("cc", "gcc", "g++", "clang", "nvcc", "ptxas", "cicc", "ld", "as")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--op", default="gdn2", help="(%(default)s)")
    parser.add_argument("--shape", default="few8k", help="(%(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="the folder (a temporary one)")
    args = parser.parse_args()
    from gdn2gen import compile_kernels
    from gdn2gen.family.registry import DECODING_OPS
    from gdn2gen.workflows.wanted import shapes_from

    (shape,) = shapes_from(args.shape)
    decode = f"1x1x{shape.H}" if args.op in DECODING_OPS else ()
    with tempfile.TemporaryDirectory() as scratch:
        started = time.monotonic()
        folder = args.keep or Path(scratch) / "kernels"
        compiled = compile_kernels(folder, shape, op=args.op, decode=decode)
        print(
            f"compiled {len(compiled.seconds)} kernels for {compiled.device.name} in "
            f"{time.monotonic() - started:.0f} s, {compiled.nbytes / 1e6:.1f} MB; lacks: "
            f"{compiled.lacks}"
        )
        wrong = 0
        for number in (1, 2):
            found = _child(args.op, shape.name, folder, Path(scratch) / f"tmp{number}")
            print(json.dumps(found), flush=True)
            wrong += bool(found["compilers"]) + (not found["same"])
    return 1 if wrong else 0


def _child(op: str, shape: str, folder: Path, temporary: Path) -> dict[str, Any]:
    temporary.mkdir()
    root = str(Path(__file__).resolve().parent.parent)
    kept = {
        x: os.environ[x] for x in ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES") if x in os.environ
    }
    environment = {
        **kept,
        "GDN2GEN_COMPILED_DIR": str(folder),
        "GDN2GEN_UNVERIFIED": "verify",
        "PATH": "/nonexistent",
        "CUDA_HOME": "/nonexistent",
        "HOME": "/dev/null/home",
        "TMPDIR": str(temporary),
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-B", __file__, "child", op, shape]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the process ended with exit code {done.returncode}; see above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(op: str, shape_name: str) -> None:
    """One process. Prints what it found as JSON."""
    begun = time.monotonic()
    started: list[str] = []
    written: list[str] = []

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen":
            started.append(" ".join(map(os.fsdecode, given[1] or [given[0]])))
        if event == "open" and isinstance(given[1], str) and given[1].strip("rb"):
            written.append(str(given[0]))

    sys.addaudithook(watch)
    import torch

    import gdn2gen
    from gdn2gen.family.inputs import make_inputs
    from gdn2gen.family.registry import recurrence_named
    from gdn2gen.measure.accuracy import public_op
    from gdn2gen.workflows.wanted import shapes_from

    (shape,) = shapes_from(shape_name)
    function = public_op(op)
    torch.empty(1, device="cuda")
    found: dict[str, Any] = {"imports_s": time.monotonic() - begun}
    sizes = (shape.H, 128, 128)
    given: dict[str, Any] = {
        name: x.requires_grad_() if x.is_floating_point() else x
        for name, x in make_inputs(
            shape.B, shape.T, *sizes, op=op, dtype=torch.bfloat16, device="cuda",
            cu_seqlens=shape.cu_seqlens,
        ).items()
    }  # fmt: skip
    leaves = [x for x in given.values() if x.requires_grad]
    torch.cuda.synchronize()

    def timed(run: Any) -> tuple[float, Any]:
        at = time.monotonic()
        made = run()
        torch.cuda.synchronize()
        return time.monotonic() - at, made

    flags = {"use_qk_l2norm_in_kernel": True}
    outputs = []
    for turn in ("first", "second"):
        found[f"{turn}_forward_s"], (o, _) = timed(lambda: function(**given, **flags))
        backward = timed(lambda o=o: torch.autograd.grad(o, leaves, o))
        found[f"{turn}_backward_s"], gradients = backward
        outputs.append([o, *gradients])
    rows = make_inputs(1, 1, *sizes, op=op, dtype=torch.bfloat16, device="cuda")
    step: Any = getattr(gdn2gen, str(recurrence_named(op).public.recurrent), None)
    if step is not None:
        with torch.no_grad():
            found["first_step_s"], _ = timed(lambda: step(**rows, **flags))
    same = all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(*outputs, strict=True))
    programs = [Path(x.partition(" ")[0]).name for x in started if "--version" not in x]
    found = {name: round(seconds, 3) for name, seconds in found.items()}
    found |= {"compilers": [x for x in programs if x.startswith(COMPILERS)], "started": programs}
    found |= {"written": written, "tilelang": "tilelang" in sys.modules, "same": bool(same)}
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        sys.exit(main())
