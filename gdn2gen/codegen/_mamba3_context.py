"""What templates around Mamba-3's scan are given beside what those of a layer's parts are."""

from __future__ import annotations

from gdn2gen.base import environment
from gdn2gen.base.dtypes import DTYPE
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.languages import TILED_BY
from gdn2gen.kernels.slices import NARROWEST
from gdn2gen.kernels.stage import Stage


def mamba3_context(problem: Mamba3Problem, config: Config) -> dict[str, object]:
    N, P, S = problem.state_size, problem.head_dim, problem.angles
    BV = int(config["BV"]) if "BV" in config else P
    BN, BS, BP = _covering(N - 2 * S), _covering(S), _covering(P)
    return {
        "S": S,
        # channels that are not rotated
        "rest": N > 2 * S,
        # the sides of a row: c what is rotated, r what is not
        "sides": [*(["c"] if S else []), *(["r"] if N > 2 * S else [])],
        "BN": BN,
        "BS": BS,
        "BP": BP,
        # which columns of a tile there are, where it is wider
        "inside": {
            "s": "o_s < S" if BS != S else "",
            "c": "o_c < 2 * S" if BS != S else "",
            "r": "o_r < N" if BN != N - 2 * S else "",
            "p": "o_p < P" if BP != P else "",
        },
        # sine and cosine by the GPU's own instructions
        "approximate": problem.dtype != "fp32" and environment.knows_assembly(),
        # slices of values, and whether the last one is wider than what there is
        "n_v": -(-P // BV),
        "narrow": P % BV != 0,
        # products as exact as fp32 has them
        "exact": problem.dtype == "fp32",
        "precise": ', input_precision="tf32x3"' if problem.dtype == "fp32" else "",
        "trap_dtype": f"tl.{DTYPE[problem.trap_dtype].full_name}",
        "angle_dtype": f"tl.{DTYPE[problem.angle_dtype].full_name}",
    }


def tilelang_context(problem: Mamba3Problem, stage: Stage) -> dict[str, object]:
    """What templates in TileLang are given instead."""
    tensors = [
        (
            x.name,
            # of a batch the sequences are its rows
            ["B" if y == "n" else y for y in x.dims.split()],
            DTYPE[x.dtype_in(problem)].full_name,
        )
        for x in stage.operands(problem)
    ]
    return {
        "stage": stage,
        "tensors": tensors,
        "symbols": [*dict.fromkeys(y for _, dims, _ in tensors for y in dims if y not in "NP")],
        "tile_dtype": DTYPE[problem.dtype].full_name,
        # they are of sm_90 alone, which has products and stores that others overlap with
        "overlaps": True,
        # for pieces that programs of other ops share: no tile is wider than its head dim
        "outside": False,
        "k_width": problem.K,
        "v_width": problem.V,
        "tiled_by": TILED_BY,
        "k_past": False,
        "v_past": False,
    }


def _covering(size: int) -> int:
    """A power of two, and no tile is narrower than 16."""
    return 1 << (max(size, NARROWEST) - 1).bit_length()
