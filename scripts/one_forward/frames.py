"""Factors of a chunk's pairs, and its scores where they do not lie in one frame."""

# mypy: disable-error-code="untyped-decorator"

from typing import Any, NamedTuple

from one_forward.sizes import BELOW, BT, GROUP, PART, RANGE


class Factors(NamedTuple):
    """The macros, and by which a key writes."""

    write_rows: Any
    later_frames: Any
    beta: Any


def factors_of(tile: Any, tied: bool) -> Factors:
    """Of the program's tiles `own`, and of a group's own tiles and its threads' `mine`."""

    def gate(mine: Any, i: Any, c: Any) -> Any:
        """By which a key erases."""
        if tied:
            return 1.0
        return tile.cast(mine.s_b[mine.i_token + i, mine.i_channel + c], "float32")

    def beta(mine: Any, i: Any) -> Any:
        """By which a key writes."""
        return mine.s_beta[mine.i_token + i] if tied else 1.0

    @tile.macro
    def write_rows(own: Any, mine: Any, scale: Any, zero: Any) -> None:
        """k, normalised, to x_k; -E and Qg of the thread's part. `zero` is added to the decay."""
        for i in tile.unroll(PART):
            for c in tile.vectorized(2):
                mine.x_k[i, c] = (
                    tile.cast(mine.s_kq[mine.i_token + i, mine.i_channel + c], "float32")
                    * mine.s_rstd[mine.i_token + i]
                )
            for c in tile.vectorized(2):
                own.s_rows[mine.slot, mine.i_token + i, mine.i_channel + c] = -(
                    mine.x_k[i, c] * gate(mine, i, c) * tile.exp2(mine.x_G[i, c] + zero)
                )
            for c in tile.vectorized(2):
                own.s_rows[mine.slot, BT + mine.i_token + i, mine.i_channel + c] = (
                    tile.cast(mine.s_kq[BT + mine.i_token + i, mine.i_channel + c], "float32")
                    * (mine.s_rstd[BT + mine.i_token + i] * scale)
                    * tile.exp2(mine.x_G[i, c] + zero)
                )

    @tile.macro
    def write_frame(own: Any, mine: Any, scale: Any, x_anchor: Any) -> None:
        """-E, Qg and keys of one frame, zero outside of it."""
        for i in tile.unroll(PART):
            for c in tile.unroll(2):
                x = mine.x_G[i, c] - x_anchor[c]
                row = tile.if_then_else(tile.And(x <= 0.0, x >= -RANGE), tile.exp2(x), 0.0)
                key = (
                    tile.cast(mine.s_kq[mine.i_token + i, mine.i_channel + c], "float32")
                    * mine.s_rstd[mine.i_token + i]
                )
                own.s_rows[mine.slot, mine.i_token + i, mine.i_channel + c] = -(
                    key * gate(mine, i, c) * row
                )
                own.s_rows[mine.slot, BT + mine.i_token + i, mine.i_channel + c] = (
                    tile.cast(mine.s_kq[BT + mine.i_token + i, mine.i_channel + c], "float32")
                    * (mine.s_rstd[BT + mine.i_token + i] * scale)
                    * row
                )
                own.s_keys[mine.slot, mine.i_token + i, mine.i_channel + c] = (
                    key * beta(mine, i) * tile.if_then_else(x >= -RANGE, tile.exp2(-x), 0.0)
                )

    @tile.macro
    def later_frames(own: Any, mine: Any, scale: Any, stamp: Any) -> None:
        """The scores of rows that are not in the first frame, with factors in range.

        A frame's rows are its anchor and what lies up to RANGE below, its columns these and all
        earlier tokens; every row of a channel is in one frame. The next anchor is the first token
        below the frame. `stamp` in s_T's margin says that there is one more, and which rows are
        written: the others keep what the first product gave them, so that a later token's decay
        moves no bit of theirs.
        """
        x_anchor = tile.alloc_local([2], "float32")
        x_next = tile.alloc_local([2], "float32")
        # products of 32 rows, by mma: with one of wgmma here, ptxas waits for each of the kernel's
        b_T = tile.alloc_fragment([BT, BT], "float32")
        b_Aqk = tile.alloc_fragment([BT, BT], "float32")
        tile.clear(b_T)
        tile.clear(b_Aqk)
        for c in tile.unroll(2):
            x_anchor[c] = 0.0
        for i in tile.unroll(PART):
            for c in tile.unroll(2):
                if mine.x_G[i, c] < -RANGE:
                    mine.s_T[mine.i_token + i, BT + 2] = stamp
        for i_frame in tile.serial(BT):
            if mine.s_T[0, BT] == stamp + i_frame:
                tile.sync_threads(mine.barrier, GROUP)
                write_frame(own, mine, scale, x_anchor)
                for c in tile.unroll(2):
                    x_next[c] = BELOW
                for i in tile.unroll(PART):
                    for c in tile.unroll(2):
                        x_next[c] = tile.max(
                            x_next[c],
                            tile.if_then_else(
                                mine.x_G[i, c] - x_anchor[c] < -RANGE, mine.x_G[i, c], BELOW
                            ),
                        )
                for c in tile.unroll(2):
                    mine.s_total[mine.i_part, mine.i_channel + c] = x_next[c]
                tile.sync_threads(mine.barrier, GROUP)
                for c in tile.unroll(2):
                    x_anchor[c] = tile.max(
                        mine.s_total[0, mine.i_channel + c], mine.s_total[1, mine.i_channel + c]
                    )
                    if x_anchor[c] > BELOW:
                        mine.s_T[0, BT] = stamp + i_frame + 1
                tile.gemm(
                    own.s_rows[mine.slot, 0:BT, :], own.s_keys[mine.slot, :, :], b_T,
                    transpose_B=True,
                )  # fmt: skip
                tile.gemm(
                    own.s_rows[mine.slot, BT : 2 * BT, :], own.s_keys[mine.slot, :, :], b_Aqk,
                    transpose_B=True,
                )  # fmt: skip
                tile.sync_threads(mine.barrier, GROUP)
        # a zero that the compiler does not know of: it would keep the exponentials in registers
        # that it has not, of chunks without such frames, too
        write_rows(own, mine, scale, mine.s_T[0, BT + 1])
        # Ktail, which cannot be made of k / gamma
        for c in tile.unroll(2):
            mine.x_gamma[c] = 1.0
        for i in tile.unroll(PART):
            for c in tile.unroll(2):
                mine.x_k[i, c] *= beta(mine, i) * tile.exp2(mine.x_C[c] - mine.x_G[i, c])
        for i, j in tile.Parallel(BT, BT):
            if mine.s_T[i, BT + 2] == stamp:
                mine.s_T[j, i] = b_T[i, j]
                own.s_Aqk[mine.slot, i, j] = tile.if_then_else(i > j, b_Aqk[i, j], 0.0)

    return Factors(write_rows, later_frames, beta)
