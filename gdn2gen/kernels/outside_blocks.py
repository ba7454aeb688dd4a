"""grad_blocks where the decay is outside of products: a block is one tile of its tokens.

A state between two chunks of a block is the block's first and what the first chunk's tokens add to
it, each decayed by one number. So a token of the second chunk meets those of the first as it meets
its own chunk's, through <dO, R> and <dX, R> and what the state keeps from one to the other, and no
state has to be made: the gradients of a block of two chunks of 32 are those of a chunk of 64 whose
R and dX are known. A program has all channels of its tokens where 128 hold them, and takes from its
own dq and dk what the backward of the norms projects out. Then no stage reads o for it, nor v; and
dX is dv, which is read where the reverse scan writes it for the caller.
"""

from __future__ import annotations

from typing import Final

from gdn2gen.family.registry import LINEAR_OPS, OUTSIDE_OPS
from gdn2gen.kernels.limits import FP32, Limit, Place, Setting
from gdn2gen.kernels.stage import Form

BLOCK_OPS: Final = tuple(x for x in OUTSIDE_OPS if x not in LINEAR_OPS)
OUTSIDE: Final = Limit(
    "op", BLOCK_OPS, "a decay per channel is inside of products, as in decay=anchored"
)
_HALVES: Final = ("bf16", "fp16")
# So that a program has all channels of its tokens: of 32, 64 or 128.
_ALL_CHANNELS: Final = tuple(
    Limit(
        "BK",
        (size,),
        "a program has all channels of its tokens",
        {"K": range(size // 2 + 1 if size > 32 else 1, size + 1), "dtype": _HALVES},
    )
    for size in (32, 64, 128)
)


def outside_triton(every: int) -> Form:
    """The form in Triton of blocks of so many chunks."""
    return Form(
        "outside",
        "triton",
        "grad_blocks_outside",
        knobs={
            "chunks": (1,),
            "BK": (16, 32, 64, 128),
            "num_warps": (2, 4, 8),
            "num_stages": (1, 2),
            "maxnreg": (0, 96, 128, 168),
        },
        defaults=(
            Setting({"BK": 128, "num_warps": 8}),
            Setting({"BK": 64, "num_warps": 4}, {"K": range(1, 64 + 1)}),
            Setting({"BK": 32, "num_warps": 4}, {"K": range(1, 32 + 1)}),
            Setting({"BK": 16, "num_warps": 4}, FP32),
        ),
        leads={"op": OUTSIDE_OPS},
        limits=(OUTSIDE, *_ALL_CHANNELS),
    )


def _why_not(place: Place) -> str | None:
    """Its head dims: of others a state is another number of tiles."""
    found = {name: getattr(place.problem, name, 0) for name in ("K", "V")}
    if all(size in (64, 128) for size in found.values()):
        return None
    return (
        f"grad_blocks in TileLang takes K and V of 64 or 128, not K={found['K']} V={found['V']}: "
        "others were not compiled for; use Triton's form"
    )


def outside_tilelang(every: int) -> Form:
    """The form in TileLang of blocks of so many chunks: 64 tokens are the rows of one product."""
    return Form(
        "outside",
        "tilelang",
        "grad_blocks_outside",
        knobs={
            "chunks": tuple(x for x in (1, 2, 4, 8, 16) if x >= every),
            "BK": (64, 128),
            "num_warps": (4,),
            "num_stages": (1, 2),
            "maxnreg": (168, 128),
        },
        defaults=(
            Setting({"chunks": 16, "BK": 128}),
            Setting({"BK": 64, "num_stages": 2}, {"K": (64,), "V": (64,)}),
            Setting({"BK": 64}, {"K": (64,)}),
        ),
        limits=(
            OUTSIDE,
            *_ALL_CHANNELS,
            Limit("dtype", ("bf16",), "factors of keys as they are may leave the range of fp16"),
            Limit("BT", (64 // every,), "its tiles are those of 64 tokens"),
            *(
                Limit("num_stages", (1,), "two do not fit", {dim: range(65, 513)})
                for dim in ("K", "V")
            ),
            *(
                Limit("maxnreg", (168,), "two programs do not fit", {dim: range(65, 513)})
                for dim in ("K", "V")
            ),
            Limit("varlen", (False,), "packed sequences are in Triton's forms alone"),
            Limit("arch", (None, "sm_90"), "others were not compiled for"),
        ),
        refuses=_why_not,
    )
