"""A package of kernels, tuned first or as they are on file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gdn2gen.base.decay import check_decay, expected
from gdn2gen.base.device import has_gpu, present_device
from gdn2gen.base.errors import InputError
from gdn2gen.codegen.package import check_folder
from gdn2gen.family.mamba3_problem import MAMBA3, usual_mamba3_problem
from gdn2gen.family.problem import Problem, check_fields
from gdn2gen.family.registry import CHANNEL_OPS, STEP_OPS
from gdn2gen.family.shapes import parse_shapes
from gdn2gen.store.dispatch import reload
from gdn2gen.store.sharing import device_called
from gdn2gen.tuning.mamba3_packages import Mamba3Package, make_mamba3
from gdn2gen.tuning.packages import Package, make
from gdn2gen.workflows.tune import tune


def generate(
    out_dir: str | Path,
    *,
    op: str = "gdn2",
    head_dim: int = 128,
    value_dim: int | None = None,
    dtype: str = "bf16",
    shape: str | None = None,
    level: str = "lean",
    decay: str | None = None,
    language: str | None = None,
    target: str | None = None,
    tune_minutes: float | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
    **fields: object,
) -> Package | Mamba3Package:
    """Write a package of kernels to `out_dir`, as `gdn2gen generate` does.

    head_dim, value_dim: K, a multiple of 8 from 16 to 256, and V, one from 16 to 512 (K if None).
    shape: the name of a shape, or sizes BxTxH, whose tuned configs are taken (train4k; of
        `op="mamba2"` and `"mamba3"` mamba4k).
    decay: `weak` or `strong`, whose entries are taken (None: what this process expects, see
        `gdn2gen.expected_decay`).
    language: `triton` for a package that does not need TileLang.
    target: GPU or architecture; by default the present GPU, or sm_90 where there is none.
    tune_minutes: search for so long first, at this shape and level, and file what wins, as
        `gdn2gen.tune` with these words does; None takes what is on file.
    fields: of `family.problem.Problem`, such as gate, gate_dtype, l2norm, varlen, initial_state.

    Of `op="mamba3"` head_dim is N, value_dim P, and the fields are those of `Mamba3Problem`: D and
    Z are given and half of the channels rotated unless they say otherwise.

    Recipes that never ran at these head dims are compiled and checked first (see `prove`). Raises
    UnsupportedError for other head dims and under TRITON_INTERPRET=1, BuildError and TuneError
    where nothing right compiles, and InputError for a folder that holds anything but an earlier
    package.
    """
    usual = "mamba4k" if op in (*STEP_OPS, MAMBA3) else "train4k"
    shapes = parse_shapes(usual if shape is None else shape)
    if len(shapes) != 1:
        raise InputError(f"a package is made for one shape, but got {shape!r}")
    if language not in (None, "triton"):
        raise InputError(f"a package is as tuned or language='triton', but got {language!r}")
    wanted = shapes[0]
    expects = expected() if decay is None else check_decay(decay, "decay")
    if tune_minutes is not None:
        check_folder(Path(out_dir), force=force)  # before minutes are spent
        words: dict[str, Any] = {"op": op, "head_dim": head_dim, "value_dim": value_dim, **fields}
        if op in CHANNEL_OPS:
            words["decay"] = expects
        words |= {"dtype": dtype, "levels": level, "target": target}
        tune(wanted, budget_minutes=tune_minutes, **words)
        reload()
    present = target is None and has_gpu()
    device = present_device() if present else device_called(target or "sm_90")
    given: dict[str, Any] = dict(
        present=present, level=level, language=language, force=force, say=say
    )
    if op == MAMBA3:
        asked = usual_mamba3_problem(head_dim, value_dim, dtype, dict(fields))
        asked = replace(asked, packed=asked.packed or wanted.cu_seqlens is not None)
        return make_mamba3(asked, wanted, device, out_dir, **given)
    V = head_dim if value_dim is None else value_dim
    check_fields(Problem, fields)
    problem = Problem(op=op, K=head_dim, V=V, dtype=dtype, **fields)  # type: ignore[arg-type]
    problem = replace(problem, varlen=problem.varlen or wanted.cu_seqlens is not None)
    return make(problem, wanted, device, out_dir, decay=expects, **given)
