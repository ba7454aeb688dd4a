"""What templates are given: the problem, the config, and what follows from both.

Templates decide structure alone; what takes more than a comparison is worked out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Final

from gdn2gen.base import environment
from gdn2gen.base.dtypes import DTYPE
from gdn2gen.codegen._glossary import aligned
from gdn2gen.codegen._part_context import part_context
from gdn2gen.codegen._token_context import token_context
from gdn2gen.family.compiled import Compiled
from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.family.parts import PartProblem
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import STEP_OPS, recurrence_named
from gdn2gen.kernels.anchors import CENTRED_RANGE, anchor_range, chunk_loss
from gdn2gen.kernels.config import Config, language_of
from gdn2gen.kernels.extras import AHEAD, OFF, known
from gdn2gen.kernels.feedback import feeds_back
from gdn2gen.kernels.glossary import what
from gdn2gen.kernels.limits import rounded_up
from gdn2gen.kernels.recurrent import TokenStage
from gdn2gen.kernels.rows import UNIT
from gdn2gen.kernels.slices import covering, slices_of
from gdn2gen.kernels.stage import OF, Operand, Stage

_PAIR_PRECISION: Final = {
    "fp16": ', input_precision="tf32"',
    "fp32": ', input_precision="tf32x3"',
}
# BM of merge_kernel: the rows of values that a program takes.
_MERGED_ROWS: Final = 16


@dataclass(frozen=True)
class DimSlice:
    """A slice of a head dim, as a template names what it has of it."""

    n: str
    """Ends the names of its variables: "" where it is the only one, else its number."""
    start: int
    width: str
    """As kernels write it: the head dim's name where the slice is all of it."""
    o: str
    """The variable of its offsets."""
    inside: str
    """Which of them are within the head dim, over a row of tiles; "" where all are."""
    dim: str

    @property
    def columns(self) -> str:
        return f"({self.inside})[None, :]" if self.inside else ""

    @property
    def rows(self) -> str:
        return f"({self.inside})[:, None]" if self.inside else ""

    def reach(self, count: str) -> str:
        """The mask of a row of a tensor that there is where `count` is not 0."""
        count = f"tl.minimum({count}, 1)" if self.inside else count
        return f"{self.o} < {self.dim} * {count}"


def dim_slices(dim: str, size: int) -> list[DimSlice]:
    """Of the head dim called `dim`; offsets are o_k0, o_k1, or o_k where one slice is enough."""
    found = slices_of(size)
    whole = len(found) == 1 and found[0].width == size
    named = []
    for number, x in enumerate(found):
        n = str(number) if len(found) > 1 else ""
        o = f"o_{dim.lower()}{n}"
        inside = f"{o} < {dim}" if x.start + x.width > size else ""
        named.append(DimSlice(n, x.start, dim if whole else str(x.width), o, inside, dim))
    return named


def context(problem: Compiled, stage: Stage, config: Config) -> dict[str, object]:
    """Everything that a template may refer to, beside `digest` and `regenerate`."""
    if isinstance(problem, PartProblem):
        return part_context(problem, stage, config)
    assert isinstance(problem, Problem)
    recurrence = recurrence_named(problem.op)
    common = {
        "problem": problem,
        "stage": stage,
        "config": config,
        "operands": [x.name for x in config.operands(problem)],
        "glossary": _glossary(problem, stage, config),
        # one number a head erases and writes: see `Recurrence.tied`
        "tied": recurrence.tied,
        "erases": recurrence.erases,
        # the decay, if there is one, is outside of products over channels: one number a head
        "outside": recurrence.decays_by in OF["outside"],
        "decays": recurrence.decay is not None,
        # what rounding takes of A's elements goes to their neighbours
        "feeds_back": feeds_back(problem),
        # of a forward scan, beside the state: "o", "h" (with R), or both
        "makes": "".join(x.name for x in stage.outputs if x.name in ("o", "h")),
    }
    if language_of(config) == "tilelang":
        return common | _triton_context(problem, config) | _tilelang_context(problem, stage, config)
    common |= _triton_context(problem, config)
    if isinstance(stage, TokenStage) and isinstance(problem, DecodingProblem):
        # slices of one width together
        groups = [[*x] for _, x in groupby(dim_slices("K", problem.K), lambda x: x.width)]
        return common | token_context(stage, problem, config) | {"k_groups": groups}
    own = {
        "operand_dtype": _operand_dtype(problem),
        # scalars that say how far rows of some operands lie apart
        "rows": list(stage.rows_of(problem)),
        "token_factors": partial(_token_factors, recurrence.erases),
        # of states that are kept on the way: how their distances are given
        "slot_unit": "" if getattr(problem, "odd_slots", False) else f" * {UNIT}",
    }
    return common | own


def _token_factors(erases: bool, of_q: bool, of_k: bool) -> list[str]:
    """What scans that read q and k themselves load for a chunk's tokens beside tiles."""
    of_keys = [*(["b_k_head"] if erases else []), "b_k_tail"]
    return [*(["b_q_head"] if of_q else []), *(of_keys if of_k else [])]


def _triton_context(problem: Problem, config: Config) -> dict[str, object]:
    """For Triton kernels, which modules in either language may hold."""
    k_slices = dim_slices("K", problem.K)
    levels = []
    size = config.size("BT")
    while size > 1:
        levels.append(size)
        size //= 2
    return {
        "levels": levels,
        # of programs, or loops, that take all channels at once
        "k_slices": k_slices,
        "v_slices": dim_slices("V", problem.V),
        # a range of at least all channels
        "k_covered": "K" if covering(problem.K) == problem.K else str(covering(problem.K)),
        "sliced": lambda name: [f"{name}{x.n}" for x in k_slices],
        **_tiles(problem, config),
        "folded": _folded(problem, config),
        # of the parallel scans: bits below which fold leaves out what has decayed, 0 where all
        # counts; steps that loads are ahead of products of cut halves, 0 where those are not cut
        "reach": known(config).get("reach", 0),
        "cut_ahead": AHEAD.get(known(config).get("merge", OFF), 0),
        "solve": _solve_precision(str(config.get("solve", "ieee"))),
        # of products of states, which are in fp32
        "states": _solve_precision("tf32x3" if problem.dtype == "fp32" else "bf16x3"),
        "io_dtype": _in_triton(problem.dtype),
        "gate_dtype": _in_triton(problem.gate_dtype),
        "factor_dtype": _in_triton(problem.dtype_of("factor")),
        "precise": ', input_precision="tf32x3"' if problem.dtype == "fp32" else "",
        "anchor_range": anchor_range(problem, config.stage),
        "chunk_loss": chunk_loss(problem, config.size("BT")),
        # of pairs of tokens in grad_blocks, whose factors are out of the range of fp16
        "pairs_in_fp32": problem.dtype == "fp16",
        "pair_precision": _PAIR_PRECISION.get(problem.dtype, ""),
        # groups of 16 values, and the power of two that covers them
        "n_z": str(-(-problem.V // 16)),
        "z_covered": str(1 << (-(-problem.V // 16) - 1).bit_length()),
    }


def _tiles(problem: Problem, config: Config) -> dict[str, str]:
    """Tiles of a head dim that programs or loops take one at a time: how many of BK and of BV, and
    what of the last one is within the head dim, of rows and of columns, too; "" where all is."""
    found = {}
    for dim, tile in (("K", "BK"), ("V", "BV")):
        x = dim.lower()
        partial = tile in config and getattr(problem, dim) % config.size(tile) != 0
        found[f"n_{x}"] = f"({dim} // {tile} + 1)" if partial else f"({dim} // {tile})"
        found[f"{x}_columns"] = f"(o_{x} < {dim})[None, :]" if partial else ""
    found["k_inside"] = found["k_columns"].removesuffix("[None, :]").strip("()")
    found["v_rows"] = found["v_columns"].replace("None, :", ":, None")
    return found


def _folded(problem: Problem, config: Config) -> dict[str, str]:
    """Of the parallel scans: how many programs take the rows of values, those of the transition
    between a segment's ends, and both; the first row of the transition; and what is within it."""
    BV = config.get("BV")
    V_left, K_left = (x % BV if isinstance(BV, int) else 0 for x in (problem.V, problem.K))
    values = "(V // BV + 1)" if V_left else "V // BV"
    transition = "(K // BV + 1)" if K_left else "K // BV"
    first = f"{values} * BV" if V_left else "V"
    return {
        "of_values": values,
        "of_transition": transition,
        "both": f"({values} + {transition})" if V_left or K_left else "(V + K) // BV",
        "divisor": f"({values} + {transition})" if V_left or K_left else "((V + K) // BV)",
        "first": first,
        "rows": f"(o_v - {first} < K)[:, None]" if K_left else "",
        # and those of merge_kernel, BM rows of values each
        "merged": "(V // BM + 1)" if problem.V % _MERGED_ROWS else "(V // BM)",
    }


def _tilelang_context(problem: Problem, stage: Stage, config: Config) -> dict[str, object]:
    sizes = {
        "NK": _tiles(problem, config)["n_k"].strip("()"),
        **({"N+1": "N1"} if problem.varlen else {"N": "B"}),
    }
    tensors = []
    for operand in config.operands(problem):
        dims = [sizes.get(symbol, symbol) for symbol in _dims(problem, operand)]
        tensors.append((operand.name, dims, DTYPE[operand.dtype_in(problem)].full_name))
    symbols = dict.fromkeys(x for _, dims, _ in tensors for x in dims)
    tiled_by = config.form.tiled_by
    K, V = (rounded_up(x, tiled_by) for x in (problem.K, problem.V))
    k_past, v_past = K != problem.K, V != problem.V
    return {
        # how wide tiles of whole head dims are, whether past their ends, their name, and what loads
        # and stores of whole tiles name
        "tiled_by": tiled_by,
        "k_width": K,
        "v_width": V,
        "k_past": k_past,
        "v_past": v_past,
        "k_tile": "KT" if k_past else "K",
        "v_tile": "VT" if v_past else "V",
        "k_all": "0:KT" if k_past else ":",
        "v_all": "0:VT" if v_past else ":",
        "tensors": tensors,
        "symbols": [x for x in symbols if x.isidentifier() and x not in ("K", "V", "BT")],
        "sequences": "(N1 - 1)" if problem.varlen else "B",
        # Products and stores that others overlap with are of sm_90 and later; on sm_80, which has
        # none, configs have one stage of loads and no register hand-over, and each is waited for.
        # Stages of groups are of sm_90 alone.
        "overlaps": config.size("num_stages") > 1
        or config.get("maxnreg", 0) != 0
        or problem.op in STEP_OPS,
        # of 64 rows of a state each
        "warp_groups": max(1, config.size("BV") // 64) if stage.is_chain and "BV" in config else 1,
        "centred_range": CENTRED_RANGE,
        # the widest power of two that values come in slices of
        "v_slice": V & -V,
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
    return aligned(rows)


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
