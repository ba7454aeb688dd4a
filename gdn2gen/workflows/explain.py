"""Which recipe a call runs, and why."""

from __future__ import annotations

from typing import Any

from gdn2gen.family.mamba3_problem import MAMBA3, usual_mamba3_problem
from gdn2gen.store.dispatch import Found
from gdn2gen.store.gates import find_call
from gdn2gen.store.mamba3 import Mamba3Found
from gdn2gen.workflows.mamba3 import explain_mamba3
from gdn2gen.workflows.wanted import (
    Shapes,
    at,
    expected_from,
    present_or,
    problem_from,
    shapes_from,
    usual_shapes,
)


def explain(
    shapes: Shapes | None = None,
    *,
    op: str = "gdn2",
    head_dim: int = 128,
    value_dim: int | None = None,
    dtype: str = "bf16",
    level: str = "lean",
    decay: str | None = None,
    target: str | None = None,
    strict: bool | None = None,
    **fields: Any,
) -> list[Found] | list[Mamba3Found]:
    """What calls at these shapes run, one for each, as `gdn2gen explain` prints it.

    shapes: names, or sizes BxTxH (train4k; of Mamba's ops mamba4k).
    head_dim, value_dim: K, and V (K if None).
    level: `lean`, or `fast`, what `disable_recompute=True` asks for.
    decay: `weak` or `strong`, what calls expect (None: what this process does, see
    `gdn2gen.expected_decay`).
    target: a GPU or an architecture; by default the present GPU, or sm_90 where there is none.
    strict: raise DispatchError for all but exact entries (None: as GDN2GEN_STRICT says).
    fields: of `family.problem.Problem`, such as gate, gate_dtype, l2norm, varlen, initial_state.

    Of `op="mamba3"` head_dim is N, value_dim P, the fields those of `Mamba3Problem`, and what is
    found the recipe of its scan and the knobs of the kernels around it.

    `Found.recipe` has the plan and the configs, `.source` and `.why` where they come from;
    `print` shows it as the command does; `store.dispatch.recipe_document` makes a dict of it.
    """
    shapes = usual_shapes(shapes, op)
    if op == MAMBA3:
        asked = usual_mamba3_problem(head_dim, value_dim, dtype, fields)
        return explain_mamba3(asked, shapes, level, target, strict)
    problem = problem_from(op, head_dim, value_dim, dtype, fields)
    device, _ = present_or(target)
    options: dict[str, Any] = {"level": level, "decay": expected_from(decay), "strict": strict}
    return [
        find_call(at(problem, shape), shape.regime, device, **options)
        for shape in shapes_from(shapes)
    ]
