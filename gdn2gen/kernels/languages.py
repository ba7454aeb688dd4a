"""What every kernel of a language is limited to, whatever its stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gdn2gen.kernels.limits import Limit

LANGUAGE_NAMES: Final = {"triton": "Triton", "tilelang": "TileLang"}
# Of head dims as TileLang tiles them: TMA writes to multiples of 128 bytes, which 32 channels of
# gamma_C are, and tiles in registers are at least 32 values wide. Loads past a head dim give zeros.
TILED_BY: Final = 32
# Columns of 16 bits that lie together in shared memory, as products want them: 128 bytes. Of forms
# that have kernels for head dims of 64 and 128 alone, whose tiles all others fill.
PANEL: Final = 64
TILED_DIMS: Final = {
    "K": tuple(range(TILED_BY, 257, TILED_BY)),
    "V": tuple(range(TILED_BY, 513, TILED_BY)),
}
AMPERE: Final = ("sm_80", "sm_86", "sm_89")
_ON_AMPERE: Final = {"arch": AMPERE}


def multiple_of(language: str, arch: str | None, tiled_by: int = TILED_BY) -> int:
    """What tiles round head dims up to, of a form's; without TMA, nothing fills them."""
    return tiled_by if language == "tilelang" and arch not in AMPERE else 1


LANGUAGES: Final[Mapping[str, tuple[Limit, ...]]] = {
    "triton": (),
    "tilelang": (
        Limit("dtype", ("bf16", "fp16"), "its products have 16-bit operands"),
        Limit("num_warps", (4,), "a warp group computes"),
        *(
            Limit(dim, (32, 64, 128), "other head dims were compiled for sm_90 alone", _ON_AMPERE)
            for dim in ("K", "V")
        ),
        Limit("arch", (None, *AMPERE, "sm_90"), "others were not compiled for"),
        Limit("maxnreg", (0,), "that arch hands no registers to other warps", _ON_AMPERE),
        # 0.1.15
        Limit(
            "num_stages",
            (1,),
            "its waits for asynchronous copies take a constant count there",
            _ON_AMPERE,
        ),
    ),
}
