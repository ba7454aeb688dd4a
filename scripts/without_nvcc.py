"""What TileLang's stages do on a machine that pip alone set up: compile them by nvcc and by NVRTC.

    python scripts/without_nvcc.py    # on a GPU that train4k is tuned for, with a CUDA toolkit

Each compiler serves two processes with caches of their own: the first compiles everything, the
second finds it. NVRTC's see no toolkit (CUDA_HOME leads nowhere), must neither start nvcc nor fall
back on Triton, and pass the tuner's full check. Where the headers of nvidia-cuda-cccl are not
installed, the toolkit's serve. Takes about three minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Final

CACHES: Final = ("GDN2GEN_CACHE_DIR", "TILELANG_CACHE_DIR", "TRITON_CACHE_DIR")
HIDDEN: Final = "/nonexistent"
SHAPE: Final = "train4k"


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        found = {name: _measure(name, Path(scratch)) for name in ("nvcc", "NVRTC")}
    print(f"{SHAPE}, lean: {'':24}" + "".join(f"{name:>10}" for name in found))
    for key in ("cold_s", "warm_s", "forward_ms", "forward_backward_ms"):
        cells = [x["cold" if key == "cold_s" else "warm"][key] for x in found.values()]
        print(f"{key:40}" + "".join(f"{cell:10.4f}" for cell in cells))
    for name, x in found.items():
        print(f"{name}: compilers started: {x['cold']['started']}; check: {x['cold']['check']}")
    print("languages:", found["NVRTC"]["cold"]["languages"])
    started = [word for x in found["NVRTC"].values() for word in x["started"] if word == "nvcc"]
    return 1 if started or found["NVRTC"]["cold"]["check"] != "passed" else 0


def _measure(name: str, scratch: Path) -> dict[str, dict[str, Any]]:
    environment = {**os.environ, **{x: str(scratch / name / x.lower()) for x in CACHES}}
    root = Path(__file__).resolve().parent.parent
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    if name == "NVRTC":
        environment["CUDA_HOME"] = HIDDEN
        paths += _headers(scratch)
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    found = {}
    for run in ("cold", "warm"):
        command = [sys.executable, __file__, run, name]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"{name}, {run}: exit code {done.returncode}; see above")
        found[run] = json.loads(done.stdout.splitlines()[-1])
        print(name, run, json.dumps(found[run]), flush=True)
    return found


def _headers(scratch: Path) -> list[str]:
    """A folder that makes up for nvidia-cuda-cccl, if it is not installed and a toolkit has it."""
    from gdn2gen.codegen.nvrtc import find_nvrtc

    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    if find_nvrtc() is not None:
        return []
    for place in ("include/cccl", "targets/x86_64-linux/include/cccl"):
        if (toolkit / place / "cuda/std/cassert").is_file():
            link = scratch / "site/nvidia/cu13/include/cccl"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(toolkit / place)
            print(f"headers of the toolkit make up for nvidia-cuda-cccl: {toolkit / place}")
            return [str(scratch / "site")]
    print(f"no headers of nvidia-cuda-cccl, neither installed nor in {toolkit}")
    return []


def child(run: str, compiler: str) -> None:
    """One process: the first step, the check, times. Prints what it found as JSON."""
    started: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen":
            program = arguments[1][0] if arguments[1] else arguments[0]
            started.append(Path(os.fsdecode(program)).name)

    sys.addaudithook(watch)
    warnings.filterwarnings("error", message=".*written in TileLang")
    import torch

    from gdn2gen.base.device import present_device
    from gdn2gen.base.environment import cuda_compiler, verifying
    from gdn2gen.codegen import nvrtc
    from gdn2gen.family.problem import Problem
    from gdn2gen.family.shapes import SHAPES
    from gdn2gen.measure.accuracy import inputs_of, output_gradients, public_op, run_op
    from gdn2gen.store.dispatch import find_recipe
    from gdn2gen.tuning.gpu.jobs import check_full, time_recipe

    problem, shape = Problem(), SHAPES[SHAPE]
    print(f"{compiler}: nvcc {cuda_compiler()}, {nvrtc.find_nvrtc()}", file=sys.stderr)
    assert (cuda_compiler() is None) == (compiler == "NVRTC")
    found = find_recipe(problem, shape.regime, present_device(), strict=False)
    languages = {config.stage: config["language"] for config in found.recipe.configs}
    assert "tilelang" in languages.values(), f"no stage is in TileLang: {found.why}"
    inputs, gradients = (
        inputs_of(problem, shape, "layer", 0, "cuda"),
        output_gradients(problem, shape, 0, "cuda"),
    )
    torch.cuda.synchronize()
    begun = time.monotonic()
    with verifying():
        run_op(public_op(problem.op), problem, inputs, gradients)
    torch.cuda.synchronize()
    seconds = time.monotonic() - begun
    check = "not run"
    if run == "cold" and compiler == "NVRTC":
        result = check_full(found.recipe)
        check = "passed" if result.ok else f"failed: {result.reason}"
        print({name: f"{error:.1e}" for name, error in result.errors.items()}, file=sys.stderr)
    timed = time_recipe(found.recipe, shape, False)
    figures = {
        f"{run}_s": round(seconds, 2),
        "forward_ms": round(timed.forward.median, 4),
        "forward_backward_ms": round(timed.forward_backward.median, 4),
        "source": found.source,
        "languages": languages,
        "started": sorted(set(started)),
        "check": check,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        child(sys.argv[1], sys.argv[2])
    elif len(sys.argv) == 1:
        sys.exit(main())
    else:
        sys.exit(__doc__)
