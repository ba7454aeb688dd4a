"""The group that scans: S^T [BV, K] stays in its registers, as in the stage scan."""

# mypy: disable-error-code="untyped-decorator"

from typing import Any

from one_forward.sizes import BT, BV, GROUP, IO, SLOTS, WARPS, K

BARRIER = 1  # of the group's threads


def scan_of(tile: Any, tied: bool, keeps: bool, starts: bool, scans: bool) -> Any:
    """The macro, of the program's arguments `x`, its tiles and place `own`."""
    rows = tile.GemmWarpPolicy.FullRow

    @tile.macro
    def load_values(x: Any, own: Any, i_t: Any) -> None:
        stage = i_t % 2
        row = i_t * BT
        tile.tma_copy(
            x.v[own.i_b, row : row + BT, own.i_h, own.i_v * BV : (own.i_v + 1) * BV],
            own.s_v[stage, :, :],
            barrier=own.values[stage],
        )
        if not tied:
            tile.tma_copy(
                x.w[own.i_b, row : row + BT, own.i_h, own.i_v * BV : (own.i_v + 1) * BV],
                own.s_w[stage, :, :],
                barrier=own.values[stage],
            )
        if tile.shuffle_elect(GROUP):
            tile.barrier_arrive(own.values[stage])

    @tile.macro
    def write_values(own: Any, i_t: Any) -> None:
        """Z = w v takes the place of v, which it is where the gates are tied."""
        stage = i_t % 2
        tile.mbarrier_wait_parity(own.values[stage], i_t // 2 % 2)
        if not tied:
            for i, j in tile.Parallel(BT, BV):
                own.s_v[stage, i, j] = tile.cast(own.s_v[stage, i, j], "float32") * tile.cast(
                    own.s_w[stage, i, j], "float32"
                )
            tile.fence_proxy_async()

    @tile.macro
    def products(own: Any, b_S: Any, b_Sd: Any, b_R: Any, b_Rd: Any, b_o: Any, i_t: Any) -> None:
        slot = i_t % SLOTS
        tile.wgmma_gemm(
            b_Sd, own.s_rows[slot, 0:BT, :], b_R, transpose_B=True, clear_accum=True, policy=rows
        )
        tile.wgmma_gemm(
            own.s_v[i_t % 2, :, :], own.s_A[slot, :, :], b_R,
            transpose_A=True, transpose_B=True, policy=rows,
        )  # fmt: skip
        tile.wgmma_gemm(
            b_Sd, own.s_rows[slot, BT : 2 * BT, :], b_o,
            transpose_B=True, clear_accum=True, policy=rows,
        )  # fmt: skip
        for i, j in tile.Parallel(BV, K):
            b_S[i, j] *= own.s_gamma[slot, j]
        tile.wait_wgmma(1)  # R, but not o
        tile.copy(b_R, b_Rd)
        tile.wgmma_gemm(b_Rd, own.s_keys[slot, :, :], b_S, policy=rows)
        tile.wgmma_gemm(b_Rd, own.s_Aqk[slot, :, :], b_o, transpose_B=True, policy=rows)

    @tile.macro
    def scan(x: Any, own: Any) -> None:
        i_thread = tile.get_thread_binding()
        b_S = tile.alloc_fragment([BV, K], "float32")
        b_Sd = tile.alloc_fragment([BV, K], IO)
        b_R = tile.alloc_fragment([BV, BT], "float32")
        b_Rd = tile.alloc_fragment([BV, BT], IO)
        b_o = tile.alloc_fragment([BV, BT], "float32")
        b_o_rows = tile.alloc_fragment([BT, BV], IO)
        # a thread's part of a result, in the order in which stores transpose it
        by_channels = tile.Fragment(
            [BT, BV],
            forward_thread_fn=lambda i, j: j // 16 * 32 + j % 8 * 4 + i % 8 // 2,
            forward_index_fn=lambda i, j: i // 8 * 4 + j % 16 // 8 * 2 + i % 2,
        )
        tile.annotate_layout({b_o_rows: by_channels})
        n_kept = tile.alloc_local([1], "int32")
        n_kept[0] = 0

        load_values(x, own, 0)
        if own.n_chunks > 1:
            load_values(x, own, 1)
        if starts:
            for i, j in tile.Parallel(BV, K):
                b_S[i, j] = x.initial_state[own.i_b, own.i_h, j, own.i_v * BV + i]
        else:
            tile.clear(b_S)
        write_values(own, 0)
        tile.sync_threads(BARRIER, GROUP)

        for i_t in tile.serial(own.n_chunks):
            slot = i_t % SLOTS
            if keeps and i_t == n_kept[0] * x.segment:
                for i, j in tile.Parallel(BV, K):
                    x.S_seg[own.i_b, own.i_h, n_kept[0], own.i_v * BV + i, j] = b_S[i, j]
                n_kept[0] += 1
            tile.copy(b_S, b_Sd)
            tile.mbarrier_wait_parity(own.full[slot], i_t // SLOTS % 2)
            if scans:
                products(own, b_S, b_Sd, b_R, b_Rd, b_o, i_t)
            if i_t + 1 < own.n_chunks:
                write_values(own, i_t + 1)
            if scans:
                tile.wait_wgmma(0)
            else:
                tile.clear(b_o)
            if i_thread % (GROUP // WARPS) == 0:
                tile.mbarrier_arrive(own.empty[slot], 0)
                tile.mbarrier_arrive(own.empty[slot], 1)
            for i, j in tile.Parallel(BV, BT):
                b_o_rows[j, i] = b_o[i, j]
            tile.tma_store_wait(0)
            # Z of the next chunk is there, that of this one was read, and o of the last one stored
            tile.sync_threads(BARRIER, GROUP)
            if i_t + 2 < own.n_chunks:
                load_values(x, own, i_t + 2)
            tile.copy(b_o_rows, own.s_o)
            tile.fence_proxy_async()
            tile.sync_threads(BARRIER, GROUP)
            tile.tma_copy(
                own.s_o,
                x.o[
                    own.i_b,
                    i_t * BT : (i_t + 1) * BT,
                    own.i_h,
                    own.i_v * BV : (own.i_v + 1) * BV,
                ],
            )
        tile.tma_store_wait(0)
        for i, j in tile.Parallel(BV, K):
            x.final_state[own.i_b, own.i_h, j, own.i_v * BV + i] = b_S[i, j]

    return scan
