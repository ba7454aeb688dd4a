"""What templates are given: the problem, the config, and what follows from both.

Templates decide structure alone; what takes more than a comparison is worked out here.
"""

from __future__ import annotations

from gdn2gen.base import environment
from gdn2gen.base.dtypes import DTYPE
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import recurrence_named
from gdn2gen.kernels.anchors import anchor_range, chunk_loss
from gdn2gen.kernels.config import Config, language_of
from gdn2gen.kernels.glossary import what
from gdn2gen.kernels.stage import Operand, Stage


def context(problem: Problem, stage: Stage, config: Config) -> dict[str, object]:
    """Everything that a template may refer to, beside `digest` and `regenerate`."""
    common = {
        "problem": problem,
        "stage": stage,
        "config": config,
        "operands": [x.name for x in config.operands(problem)],
        "glossary": _glossary(problem, stage, config),
        # one number a head erases and writes: see `Recurrence.tied`
        "tied": recurrence_named(problem.op).tied,
        # of a forward scan, beside the state: "o", "h" (with R), or both
        "makes": "".join(x.name for x in stage.outputs if x.name in ("o", "h")),
    }
    if language_of(config) == "tilelang":
        return common | _triton_context(problem, config) | _tilelang_context(problem, stage, config)
    return common | _triton_context(problem, config) | {"operand_dtype": _operand_dtype(problem)}


def _triton_context(problem: Problem, config: Config) -> dict[str, object]:
    """For Triton kernels, which modules in either language may hold."""
    levels = []
    size = config.size("BT")
    while size > 1:
        levels.append(size)
        size //= 2
    return {
        "levels": levels,
        "solve": _solve_precision(str(config.get("solve", "ieee"))),
        # of products of states, which are in fp32
        "states": _solve_precision("tf32x3" if problem.dtype == "fp32" else "bf16x3"),
        "io_dtype": _in_triton(problem.dtype),
        "gate_dtype": _in_triton(problem.gate_dtype),
        "factor_dtype": _in_triton(problem.dtype_of("factor")),
        "precise": ', input_precision="tf32x3"' if problem.dtype == "fp32" else "",
        "anchor_range": anchor_range(problem, config.stage),
        "chunk_loss": chunk_loss(problem, config.size("BT")),
    }


def _tilelang_context(problem: Problem, stage: Stage, config: Config) -> dict[str, object]:
    sizes = {"NK": "K // BK", **({"N+1": "N1"} if problem.varlen else {"N": "B"})}
    tensors = []
    for operand in config.operands(problem):
        dims = [sizes.get(symbol, symbol) for symbol in _dims(problem, operand)]
        tensors.append((operand.name, dims, DTYPE[operand.dtype_in(problem)].full_name))
    symbols = dict.fromkeys(x for _, dims, _ in tensors for x in dims)
    return {
        "tensors": tensors,
        "symbols": [x for x in symbols if x.isidentifier() and x not in ("K", "V", "BT")],
        "sequences": "(N1 - 1)" if problem.varlen else "B",
        # Products and stores that others overlap with are of sm_90 and later; on sm_80, which has
        # none, configs have one stage of loads and no register hand-over, and each is waited for.
        "overlaps": config.size("num_stages") > 1 or config.get("maxnreg", 0) != 0,
        "tile_dtype": DTYPE[problem.dtype].full_name,
        "gate_tile_dtype": DTYPE[problem.gate_dtype].full_name,
    }


def _dims(problem: Problem, operand: Operand) -> list[str]:
    """Of the tensor as it lies in memory; the states of a caller may be transposed."""
    dims = operand.dims.split()
    if problem.state_v_first and dims[-2:] == ["K", "V"]:
        dims[-2:] = ["V", "K"]
    return dims


def _glossary(problem: Problem, stage: Stage, config: Config) -> list[str]:
    """A line for each operand: its symbol, shape, dtype and meaning."""
    rows = [
        (
            x.name,
            f"[{', '.join(_dims(problem, x))}]",
            x.dtype_in(problem),
            what(x.name, stage.name, problem),
        )
        for x in config.operands(problem)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, (*widths[:3], 0))) for row in rows]


def _operand_dtype(problem: Problem) -> str:
    """dtype of the operands of the score products.

    With l2norm in the kernel |q|, |k| <= 1 and every decay factor is <= 1, so fp16 cannot overflow
    and carries 3 more bits than bf16.
    """
    if problem.dtype == "bf16" and problem.l2norm:
        return "tl.float16"
    return _in_triton(problem.dtype)


def _solve_precision(solve: str) -> str:
    # Triton's interpreter multiplies exactly, and knows no bf16x3
    return "ieee" if solve == "bf16x3" and environment.interpreted() else solve


def _in_triton(dtype: str) -> str:
    return f"tl.{DTYPE[dtype].full_name}"
