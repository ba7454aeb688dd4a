"""(I + T)^-1 by halves, as templates/tilelang/lib/inverse.jinja has it, of -T."""

# mypy: disable-error-code="untyped-decorator"

from typing import Any

from one_forward.sizes import BT, GROUP, HALF, K


def inverse_of(tile: Any) -> Any:
    """The macro: s_A of the slot, from s_T, which has -T transposed; s_total has A22 meanwhile."""

    @tile.macro
    def halves(mine: Any) -> None:
        """A column of the inverse of either half a thread, by substitution."""
        x_A = tile.alloc_local([HALF], "float32")
        i_half = mine.i_thread // HALF * HALF
        for i in tile.unroll(HALF):
            x_A[i] = tile.if_then_else(i_half + i == mine.i_thread, 1.0, 0.0)
        for m in tile.unroll(HALF - 1):
            for i in tile.unroll(m + 1, HALF):
                x_A[i] += mine.s_T[i_half + m, i_half + i] * x_A[m]
        # A11 where T is not looked at, A22, transposed, where the totals of the decay were
        if mine.i_thread < HALF:
            for i in tile.unroll(HALF):
                mine.s_T[HALF + i, mine.i_thread] = x_A[i]
        else:
            for i in tile.unroll(HALF // 4):
                for c in tile.vectorized(4):
                    mine.s_total[
                        (mine.i_thread - HALF) * HALF // K,
                        (mine.i_thread - HALF) * HALF % K + i * 4 + c,
                    ] = x_A[i * 4 + c]

    @tile.macro
    def invert(own: Any, mine: Any) -> None:
        if mine.i_thread < BT:
            halves(mine)
        tile.sync_threads(mine.barrier, GROUP)
        # A21 = A22 (-T21 A11); of each quarter of A two columns of a row a thread
        x_A21 = tile.alloc_local([2], "float32")
        i_i = mine.i_thread * 2 // HALF
        i_j = mine.i_thread * 2 % HALF
        for c in tile.vectorized(2):
            own.s_A[mine.slot, i_i, i_j + c] = mine.s_T[HALF + i_i, i_j + c]
        for c in tile.vectorized(2):
            own.s_A[mine.slot, i_i, HALF + i_j + c] = 0.0
        for c in tile.unroll(2):
            x_A21[c] = mine.s_total[(i_j + c) * HALF // K, (i_j + c) * HALF % K + i_i]
        for c in tile.vectorized(2):
            own.s_A[mine.slot, HALF + i_i, HALF + i_j + c] = x_A21[c]
        for c in tile.vectorized(2):
            x_A21[c] = 0.0
        for m in tile.unroll(HALF):
            for c in tile.vectorized(2):
                x_A21[c] += mine.s_T[m, HALF + i_i] * mine.s_T[HALF + m, i_j + c]
        for c in tile.vectorized(2):
            mine.s_T[i_i, i_j + c] = x_A21[c]  # where T11 was
        tile.sync_threads(mine.barrier, GROUP)
        for c in tile.vectorized(2):
            x_A21[c] = 0.0
        for m in tile.unroll(HALF):
            for c in tile.vectorized(2):
                x_A21[c] += mine.s_total[m * HALF // K, m * HALF % K + i_i] * mine.s_T[m, i_j + c]
        for c in tile.vectorized(2):
            own.s_A[mine.slot, HALF + i_i, i_j + c] = x_A21[c]
        tile.sync_threads(mine.barrier, GROUP)

    return invert
