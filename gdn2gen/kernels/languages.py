"""What every kernel of a language is limited to, whatever its stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gdn2gen.kernels.limits import Limit

LANGUAGE_NAMES: Final = {"triton": "Triton", "tilelang": "TileLang"}
# Head dims that one tile is as wide as.
WHOLE_DIMS: Final = (32, 64, 128)
_TILES: Final = "its tiles are as wide as the head dim, in powers of two"
_AMPERE: Final = ("sm_80", "sm_86", "sm_89")
LANGUAGES: Final[Mapping[str, tuple[Limit, ...]]] = {
    "triton": (),
    "tilelang": (
        Limit("dtype", ("bf16", "fp16"), "its products have 16-bit operands"),
        Limit("num_warps", (4,), "a warp group computes"),
        Limit("K", WHOLE_DIMS, _TILES),
        Limit("V", WHOLE_DIMS, _TILES),
        Limit("arch", (None, *_AMPERE, "sm_90"), "others were not compiled for"),
        Limit("maxnreg", (0,), "that arch hands no registers to other warps", {"arch": _AMPERE}),
        # 0.1.15
        Limit(
            "num_stages",
            (1,),
            "its waits for asynchronous copies take a constant count there",
            {"arch": _AMPERE},
        ),
    ),
}
