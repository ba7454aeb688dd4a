"""A group that prepares: every SLOTS-th chunk of the head, into the group's slot."""

# mypy: disable-error-code="untyped-decorator"

from types import SimpleNamespace
from typing import Any

from one_forward.frames import factors_of
from one_forward.inverse import inverse_of
from one_forward.sizes import (
    BT,
    COPIES,
    GROUP,
    IO,
    PART,
    PARTS,
    RANGE,
    SLOTS,
    K,
    log2e,
    smallest_log2,
)


def prepare_of(tile: Any, tied: bool, keeps: bool, frames: bool, prepares: bool) -> Any:
    """The macro, of the program's arguments `x`, its tiles and place `own`, and which group."""
    factors, invert = factors_of(tile, tied), inverse_of(tile)

    @tile.macro
    def load_chunk(x: Any, own: Any, mine: Any, row: Any) -> None:
        loaded = own.loaded
        for half in tile.unroll(2):
            # 64 channels of a tile lie together in shared memory
            tile.tma_copy(
                x.k[own.i_b, row : row + BT, own.i_h, half * 64 : half * 64 + 64],
                mine.s_kq[0:BT, half * 64 : half * 64 + 64],
                barrier=loaded[mine.group],
            )
            tile.tma_copy(
                x.q[own.i_b, row : row + BT, own.i_h, half * 64 : half * 64 + 64],
                mine.s_kq[BT : 2 * BT, half * 64 : half * 64 + 64],
                barrier=loaded[mine.group],
            )
        tile.tma_copy(
            x.g[own.i_b, row : row + BT, own.i_h, :], mine.s_g, barrier=loaded[mine.group]
        )
        if tied:
            # 32 numbers that lie apart, held in registers until the chunk's turn
            if mine.i_thread < BT:
                mine.x_beta[0] = 0.0
                if row + mine.i_thread < own.T:
                    mine.x_beta[0] = tile.cast(
                        x.b[own.i_b, row + mine.i_thread, own.i_h], "float32"
                    )
        else:
            tile.tma_copy(
                x.b[own.i_b, row : row + BT, own.i_h, :], mine.s_b, barrier=loaded[mine.group]
            )
        if tile.shuffle_elect(GROUP):
            tile.barrier_arrive(loaded[mine.group])

    @tile.macro
    def norms_and_decay(x: Any, mine: Any) -> None:
        """s_rstd, s_self; x_G, but for what lies before the thread's own tokens, and x_C."""
        # a token with itself, where no decay lies between, and the norms, from one product
        b_norms = tile.alloc_fragment([2 * BT, 2 * BT], "float32")
        tile.clear(b_norms)
        tile.gemm(mine.s_kq, mine.s_kq, b_norms, transpose_B=True)
        for i, j in tile.Parallel(2 * BT, 2 * BT):
            if i == j:
                mine.s_rstd[i] = tile.rsqrt(b_norms[i, j] + 1e-6)
            if i + BT == j:
                mine.s_self[i] = b_norms[i, j] * x.scale
        if tied and mine.i_thread < BT:
            mine.s_beta[mine.i_thread] = mine.x_beta[0]
        for i in tile.unroll(PART):
            for c in tile.vectorized(2):
                mine.x_G[i, c] = mine.s_g[mine.i_token + i, mine.i_channel + c] * log2e
        for i, c in tile.grid(PART, 2):
            mine.x_G[i, c] = tile.if_then_else(
                mine.x_G[i, c] < smallest_log2, smallest_log2, mine.x_G[i, c]
            )
        for i in tile.unroll(1, PART):
            for c in tile.unroll(2):
                mine.x_G[i, c] += mine.x_G[i - 1, c]
        for c in tile.vectorized(2):
            mine.s_total[mine.i_part, mine.i_channel + c] = mine.x_G[PART - 1, c]
        tile.sync_threads(mine.barrier, GROUP)
        for c in tile.unroll(2):
            mine.x_before[c] = 0.0
            mine.x_C[c] = 0.0
        for m in tile.unroll(PARTS):
            for c in tile.unroll(2):
                mine.x_before[c] += tile.if_then_else(
                    m < mine.i_part, mine.s_total[m, mine.i_channel + c], 0.0
                )
                mine.x_C[c] += mine.s_total[m, mine.i_channel + c]

    @tile.macro
    def write_factors(x: Any, own: Any, mine: Any, stamp: Any) -> None:
        """-E, Qg, k / gamma and gamma_C; `stamp` where a channel is out of the first frame."""
        for i in tile.unroll(PART):
            for c in tile.unroll(2):
                mine.x_G[i, c] += mine.x_before[c]
        factors.write_rows(own, mine, x.scale, 0.0)
        for i in tile.unroll(PART):
            for c in tile.vectorized(2):
                mine.x_k[i, c] *= factors.beta(mine, i) * tile.exp2(-mine.x_G[i, c])
            for c in tile.vectorized(2):
                own.s_keys[mine.slot, mine.i_token + i, mine.i_channel + c] = mine.x_k[i, c]
        for c in tile.unroll(2):
            mine.x_gamma[c] = tile.exp2(mine.x_C[c])
        if mine.i_part == 0:
            for c in tile.vectorized(2):
                own.s_gamma[mine.slot, mine.i_channel + c] = mine.x_gamma[c]
            for c in tile.unroll(2):
                if mine.x_C[c] < -RANGE:
                    mine.s_T[0, BT] = stamp
        tile.fence_proxy_async()
        tile.sync_threads(mine.barrier, GROUP)

    @tile.macro
    def score(x: Any, own: Any, mine: Any, stamp: Any) -> None:
        """-T transposed to s_T, and Aqk but for its diagonal."""
        b_scores = tile.alloc_fragment([2 * BT, BT], "float32")
        tile.clear(b_scores)
        tile.gemm(
            own.s_rows[mine.slot, :, :], own.s_keys[mine.slot, :, :], b_scores, transpose_B=True
        )
        for i, j in tile.Parallel(2 * BT, BT):
            if i < BT:
                mine.s_T[j, i] = b_scores[i, j]
            else:
                own.s_Aqk[mine.slot, i - BT, j] = tile.if_then_else(i - BT > j, b_scores[i, j], 0.0)
        if frames and mine.s_T[0, BT] == stamp:
            factors.later_frames(own, mine, x.scale, stamp)

    @tile.macro
    def write_tail(own: Any, mine: Any) -> None:
        """The diagonal of Aqk, and Ktail in place of k / gamma."""
        if mine.i_thread >= GROUP - BT:
            i_own = mine.i_thread - (GROUP - BT)
            own.s_Aqk[mine.slot, i_own, i_own] = (
                mine.s_self[i_own]
                * mine.s_rstd[i_own]
                * mine.s_rstd[BT + i_own]
                * (mine.s_beta[i_own] if tied else 1.0)
            )
        for i in tile.unroll(PART):
            for c in tile.vectorized(2):
                own.s_keys[mine.slot, mine.i_token + i, mine.i_channel + c] = (
                    mine.x_k[i, c] * mine.x_gamma[c]
                )

    @tile.macro
    def write_Y(own: Any, mine: Any) -> None:
        """Y in place of -E."""
        b_Y = tile.alloc_fragment([BT, K], "float32")
        tile.clear(b_Y)
        tile.gemm(own.s_A[mine.slot, :, :], own.s_rows[mine.slot, 0:BT, :], b_Y)
        tile.sync_threads(mine.barrier, GROUP)
        tile.copy(b_Y, own.s_rows[mine.slot, 0:BT, :])

    @tile.macro
    def hand_over(own: Any, mine: Any) -> None:
        """The slot to the group that scans, and a copy of it to the other program's."""
        other = 1 - own.i_v
        slot = mine.slot
        tile.fence_proxy_async()
        tile.sync_threads(mine.barrier, GROUP)
        if mine.i_thread == 0:
            tile.copy_cluster(
                own.s_rows[slot, :, :], own.s_rows[slot, :, :],
                dst_block=other, remote_barrier=own.full[slot],
            )  # fmt: skip
            tile.copy_cluster(
                own.s_keys[slot, :, :], own.s_keys[slot, :, :],
                dst_block=other, remote_barrier=own.full[slot],
            )  # fmt: skip
            tile.copy_cluster(
                own.s_A[slot, :, :], own.s_A[slot, :, :],
                dst_block=other, remote_barrier=own.full[slot],
            )  # fmt: skip
            tile.copy_cluster(
                own.s_Aqk[slot, :, :], own.s_Aqk[slot, :, :],
                dst_block=other, remote_barrier=own.full[slot],
            )  # fmt: skip
            tile.copy_cluster(
                own.s_gamma[slot, :], own.s_gamma[slot, :],
                dst_block=other, remote_barrier=own.full[slot],
            )  # fmt: skip
        # as many arrivals as the other program gets
        if mine.i_thread < COPIES:
            tile.mbarrier_arrive(own.full[slot])

    @tile.macro
    def prepare(x: Any, own: Any, group: Any) -> None:
        i_thread = tile.get_thread_binding() - GROUP * (group + 1)
        s_kq = tile.alloc_shared([2 * BT, K], IO)
        # of the gates, one or the other
        s_b = None if tied else tile.alloc_shared([BT, K], IO)
        s_beta = tile.alloc_shared([BT], "float32") if tied else None
        x_beta = tile.alloc_local([1], "float32") if tied else None
        s_g = tile.alloc_shared([BT, K], "float32")
        s_self = tile.alloc_shared([BT], "float32")
        s_total = tile.alloc_shared([PARTS, K], "float32")
        s_rstd = tile.alloc_shared([2 * BT], "float32")
        # rows so long that what a warp writes of the scores lies in banks of its own
        s_T = tile.alloc_shared([BT, BT + 4], "float32")
        x_G = tile.alloc_local([PART, 2], "float32")
        x_k = tile.alloc_local([PART, 2], "float32")
        x_before = tile.alloc_local([2], "float32")
        x_C = tile.alloc_local([2], "float32")
        x_gamma = tile.alloc_local([2], "float32")
        slot = 2 * group + own.i_v  # and the first chunk
        i_part = i_thread // (K // 2)
        mine = SimpleNamespace(
            group=group, barrier=2 + group, slot=slot, i_thread=i_thread,
            i_channel=i_thread % (K // 2) * 2, i_part=i_part, i_token=i_part * PART,
            s_kq=s_kq, s_b=s_b, s_beta=s_beta, x_beta=x_beta, s_g=s_g, s_self=s_self,
            s_total=s_total, s_rstd=s_rstd, s_T=s_T,
            x_G=x_G, x_k=x_k, x_before=x_before, x_C=x_C, x_gamma=x_gamma,
        )  # fmt: skip
        n_own = tile.ceildiv(own.n_chunks - slot, SLOTS)
        if i_thread == 0:
            s_T[0, BT] = 0.0  # no stamp
            s_T[0, BT + 1] = 0.0
        if i_thread < BT:
            s_T[i_thread, BT + 2] = 0.0
        if prepares and slot < own.n_chunks:
            load_chunk(x, own, mine, slot * BT)

        for i_n in tile.serial(n_own):
            i_t = slot + i_n * SLOTS
            i_c = own.i_b * own.n_chunks + i_t
            stamp = tile.cast((i_n + 1) * 64, "float32")
            if prepares:
                tile.mbarrier_wait_parity(own.loaded[group], i_n % 2)
                norms_and_decay(x, mine)
            tile.mbarrier_wait_parity(own.empty[slot], (i_n + 1) % 2)
            if prepares:
                write_factors(x, own, mine, stamp)
                if keeps and i_thread < BT:
                    x.k_rstd[i_c, own.i_h, i_thread] = s_rstd[i_thread]
                    x.q_rstd[i_c, own.i_h, i_thread] = s_rstd[BT + i_thread]
                score(x, own, mine, stamp)
            tile.sync_threads(mine.barrier, GROUP)
            if prepares and i_n + 1 < n_own:
                load_chunk(x, own, mine, (i_t + SLOTS) * BT)
            if prepares:
                write_tail(own, mine)
                invert(own, mine)
                write_Y(own, mine)
                if keeps:
                    tile.copy(own.s_A[slot, :, :], x.A[i_c, own.i_h, :, :], disable_tma=True)
                    tile.copy(own.s_Aqk[slot, :, :], x.Aqk[i_c, own.i_h, :, :], disable_tma=True)
            hand_over(own, mine)

    return prepare
