"""Search for the fastest configs that pass the accuracy check, and file them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdn2gen.base.decay import WEAK
from gdn2gen.base.errors import InputError
from gdn2gen.base.paths import packaged_tuned_dir, user_tuned_dir
from gdn2gen.family.mamba3_problem import MAMBA3, usual_mamba3_problem
from gdn2gen.workflows.mamba3 import tune_mamba3
from gdn2gen.workflows.wanted import (
    Shapes,
    levels_from,
    present_or,
    problem_from,
    shapes_from,
    tuned_under,
    usual_shapes,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gdn2gen.tuning import TuneReport
    from gdn2gen.tuning.mamba3 import Mamba3Report
    from gdn2gen.tuning.views.progress import Progress


def tune(
    shapes: Shapes | None = None,
    *,
    op: str = "gdn2",
    head_dim: int = 128,
    value_dim: int | None = None,
    dtype: str = "bf16",
    budget_minutes: float = 20.0,
    levels: str | Iterable[str] = ("lean", "fast"),
    decay: str | Path = WEAK,
    target: str | None = None,
    out_dir: str | Path | None = None,
    storage: str | None = None,
    progress: Progress | None = None,
    **fields: Any,
) -> TuneReport | Mamba3Report:
    """Tune one problem at these shapes, as `gdn2gen tune` does; what won is filed.

    budget_minutes: time to spend, over all shapes.
    levels: `lean`, `fast`, or both.
    decay: what calls expect that find the entries: `weak`, or `strong`, which is timed at -20 nats
    in every token; or a file of decays that a model had (`nn.Observatory.pattern().save`), filed as
    strong. Where the decay is no channel's, nothing depends on it. Needs a GPU if it is not `weak`.
    target: None for the present GPU; without one, and for a named target, kernels are compiled,
    checked in Triton's interpreter, ranked and filed as predicted.
    out_dir: the folder of tuned files (None: in a source tree its own, else the user's).
    storage: an Optuna storage that several GPUs or hosts share.
    The rest is as in `gdn2gen.explain`. Of `op="mamba3"` the scan is tuned and filed as one of
    `simple_gla` at these levels, then the kernels around it, which have none.

    `TuneReport.results` has the winner of each shape and level with its times, errors and recipe.
    Calls of this process find what was filed. Raises TuneError where nothing could be filed.
    """
    shapes = usual_shapes(shapes, op)
    folder = own_folder() if out_dir is None else Path(out_dir)
    word, pattern = tuned_under(decay)
    if op == MAMBA3:
        if word != WEAK:
            raise InputError(f"kernels of {op} take as long under any decay, but got {decay!r}")
        return tune_mamba3(
            usual_mamba3_problem(head_dim, value_dim, dtype, fields),
            shapes,
            budget_minutes=budget_minutes,
            levels=levels,
            target=target,
            out_dir=folder,
            storage=storage,
            progress=progress,
        )
    problem = problem_from(op, head_dim, value_dim, dtype, fields)
    device, present = present_or(target)
    options: dict[str, Any] = {
        "problem": problem,
        "shapes": shapes_from(shapes),
        "device": device,
        "budget_minutes": budget_minutes,
        "out_dir": folder,
        "levels": levels_from(levels),
    }
    if progress is not None:
        options["progress"] = progress
    if present:
        from gdn2gen.tuning import tune as search

        return search(**options, storage=storage, decay=word, pattern=pattern)
    if word != WEAK:
        raise InputError(
            f"nothing is timed without a GPU, and only times depend on decay, but got {decay!r}"
        )
    if storage is not None:
        raise InputError(f"storage is for studies on a GPU, and none is used here; got {storage!r}")
    from gdn2gen.tuning import tune_without_gpu

    return tune_without_gpu(**options)


def own_folder() -> Path:
    """Where entries are filed unless a folder is named."""
    named = os.environ.get("GDN2GEN_TUNED_DIR")
    return packaged_tuned_dir() if in_source_tree() and not named else user_tuned_dir()


def in_source_tree() -> bool:
    """Whether gdn2gen runs from its source tree, so that `tuned/` there may be written."""
    return (packaged_tuned_dir().parent / "pyproject.toml").is_file()
