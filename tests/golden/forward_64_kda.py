"""A forward in one kernel: what the scan reads of a chunk passes through no memory.

    T     = strict lower triangle of  (gamma k) (beta k / gamma)^T        A = (I + T)^-1
    Aqk   = lower triangle of  scale (gamma q) (beta k / gamma)^T
    Qg    = scale gamma q      E = gamma k      Y = -A E      Ktail = (gamma_C / gamma) beta k
                                                                gamma = exp(cumulative decay)

    R^T = v^T A^T + S^T Y^T          Y = -A E
    O^T = S^T Qg^T + R^T Aqk^T
    S^T <- S^T Diag(gamma_C) + R^T Ktail

Two programs, a cluster, take a head of a sequence. One group of 128 threads scans, in the first, and
all others prepare, in turn, each a chunk of 7, into a slot of its own in shared memory. What the
second program makes is copied to the first, what is ready first first:

    chunk    0   1   2   3   4   5   6   7 ...
    program  1   0   1   0   1   0   1   1
    group    0   0   1   1   2   2   3   0
    slot     0   1   2   3   4   5   6   0

A slot is `full` once it was made and copied, `empty` once it was scanned. What a
group reads it loads itself, one chunk ahead: no group only loads. A chunk in which a channel loses
more than 2^-RANGE is scored frame by frame, and so is exact, too.

    q       [B, T, H, K]       bf16  queries; normalised in the kernel
    k       [B, T, H, K]       bf16  keys; normalised in the kernel
    g       [B, T, HG, K]      fp32  log decay
    beta    [B, T, HV]         bf16  factor of what a token erases and writes
    v       [B, T, HV, V]      bf16  values
    o       [B, T, HV, V]      bf16  output
    q_rstd  [NT, HV, BT]       fp32  1 / norm of q
    k_rstd  [NT, HV, BT]       fp32  1 / norm of k
    k_beta  [NT, HV, BT]       fp32  beta, after its activation
    A       [NT, HV, BT, BT]   bf16  inverse of I + T, lower triangle
    Aqk     [NT, HV, BT, BT]   bf16  decayed scores, lower triangle
    S_seg   [N, HV, NS, V, K]  fp32  state at the segment's start, transposed

Problem: kda K=64 V=64 bf16, g fp32, l2norm
Config:  BT=32 BV=64 language=tilelang num_stages=3 num_warps=4
Template digest 837f2a4aaacb28b8; made by
    gdn2gen generate --op kda --head-dim 64,64 --dtype bf16 --gate-dtype fp32 --gate none \
      --with= --stage forward --config \
      BT=32,BV=64,language=tilelang,num_stages=3,num_warps=4
"""

from functools import cache
from types import SimpleNamespace

K, V = 64, 64
BT, BV = 32, 64
HALF = BT // 2
IO = "bfloat16"
GROUP, GROUPS = 128, 3  # threads; groups that prepare, in the program that scans
WARP, WARPS = 32, 4  # threads of a warp, and warps of a group
SLOTS, COPIES = 2 * GROUPS + 1, 5  # tiles of a slot
# of a thread that prepares: a channel, and a part of the tokens, where these are summed; else
# eight channels of every sixteenth token
PARTS = 2
PART = BT // PARTS
ROW_TOKENS = BT // 16
# factors stay within 2^RANGE of their anchor; an anchor below all
RANGE, BELOW = 104.0, -1e30
# 2^smallest_log2 and exp(smallest_log) are 0 in fp32: a clamp changes no result, and keeps
# g = -inf out of differences
log2e, smallest_log2, smallest_log = 1.4426950408889634, -150.0, -104.0
PASSES = {
    "tl.enable_fast_math": True,
    # roles and barriers are all written out
    "tl.disable_warp_specialized": True,
    "tl.disable_thread_storage_sync": True,
    "tl.disable_shared_memory_reuse": True,
    # what a warp does with T and with Aqk is decided once, not for each of its elements
    "tl.loop_unswitching_allow_non_trivial_else": True,
}


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, H, HG, HV, NT, NS = (
        tile.dynamic(name) for name in ("B", "T", "H", "HG", "HV", "NT", "NS")
    )
    # a warp keeps whole rows of the state, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.macro
    def load_values(x, own, i_t):
        stage = i_t % 2
        row = i_t * BT
        tile.tma_copy(
            x.v[own.i_b, row : row + BT, own.i_h, :],
            own.s_kq[GROUPS, stage * BT : stage * BT + BT, :],
            barrier=own.values[stage],
        )
        if tile.shuffle_elect(GROUP):
            tile.barrier_arrive(own.values[stage])

    @tile.macro
    def write_values(own, i_t):
        tile.mbarrier_wait_parity(own.values[i_t % 2], i_t // 2 % 2)

    @tile.macro
    def store_o(x, own, b_o_rows, i_t):
        tile.copy(b_o_rows, own.s_o)
        tile.fence_proxy_async()
        tile.sync_threads(1, GROUP)
        tile.tma_copy(own.s_o, x.o[own.i_b, i_t * BT : (i_t + 1) * BT, own.i_h, :])

    @tile.macro
    def products(x, own, b_S, b_Sd, b_R, b_Rd, b_o, b_o_rows, i_t, slot):
        tile.wgmma_gemm(
            b_Sd, own.s_rows[slot, 0:BT, :], b_R, transpose_B=True, clear_accum=True, policy=ROWS
        )
        tile.wgmma_gemm(
            own.s_kq[GROUPS, (i_t % 2) * BT : (i_t % 2) * BT + BT, :], own.s_A[slot, :, :], b_R,
            transpose_A=True, transpose_B=True, policy=ROWS,
        )
        tile.wgmma_gemm(
            b_Sd, own.s_rows[slot, BT : 2 * BT, :], b_o,
            transpose_B=True, clear_accum=True, policy=ROWS,
        )
        for i, j in tile.Parallel(BV, K):
            b_S[i, j] *= own.s_gamma[slot, j]
        if i_t > 0:
            store_o(x, own, b_o_rows, i_t - 1)  # meanwhile
        tile.wait_wgmma(1)  # R, but not o
        tile.copy(b_R, b_Rd)
        tile.wgmma_gemm(b_Rd, own.s_keys[slot, :, :], b_S, policy=ROWS)
        tile.wgmma_gemm(b_Rd, own.s_Aqk[slot, :, :], b_o, transpose_B=True, policy=ROWS)

    @tile.macro
    def scan(x, own):
        """S^T [BV, K] stays in the group's registers, as in the stage scan."""
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
        tile.clear(b_o_rows)  # it is stored a chunk later, which TileLang does not see
        n_kept = tile.alloc_local([1], "int32")
        n_kept[0] = 0
        # the slot, and how often, modulo 2, it came before: by division they would be waited for
        turn = tile.alloc_local([2], "int32")
        turn[0] = 0
        turn[1] = 0

        load_values(x, own, 0)
        if own.n_chunks > 1:
            load_values(x, own, 1)
        tile.clear(b_S)
        write_values(own, 0)
        tile.sync_threads(1, GROUP)

        for i_n in tile.serial(own.n_chunks):
            # known to be a warp's, so that descriptors are not made anew for each product
            i_t = tile.shfl_sync(i_n, 0)
            slot = tile.shfl_sync(turn[0], 0)
            if i_t == n_kept[0] * x.segment:
                for i, j in tile.Parallel(BV, K):
                    x.S_seg[own.i_b, own.i_h, n_kept[0], i, j] = b_S[i, j]
                n_kept[0] += 1
            tile.copy(b_S, b_Sd)
            tile.mbarrier_wait_parity(own.full[slot], turn[1])
            products(x, own, b_S, b_Sd, b_R, b_Rd, b_o, b_o_rows, i_t, slot)
            turn[0] += 1
            if turn[0] == SLOTS:
                turn[0] = 0
                turn[1] = 1 - turn[1]
            if i_t + 1 < own.n_chunks:
                write_values(own, i_t + 1)
            tile.wait_wgmma(0)
            # one lane for its warp, whose others are as far: they made the same products
            if i_thread % (GROUP // WARPS) == 0:
                tile.mbarrier_arrive(own.empty[slot], 1 - slot % 2)
            for i, j in tile.Parallel(BV, BT):
                b_o_rows[j, i] = b_o[i, j]
            tile.tma_store_wait(0)
            # the next chunk's values are there, this one's were read, and o of the last one stored
            tile.sync_threads(1, GROUP)
            if i_t + 2 < own.n_chunks:
                load_values(x, own, i_t + 2)
        store_o(x, own, b_o_rows, own.n_chunks - 1)
        tile.tma_store_wait(0)

    @tile.macro
    def sum_decay(own, mine):
        """Over either half of the tokens, in place, a channel a thread."""
        for i in tile.unroll(PART):
            for c in tile.vectorized(1):
                mine.x_G[i, c] = own.s_g[mine.group, mine.i_token + i, mine.i_channel + c]
        for c in tile.unroll(1):
            mine.x_G[0, c] *= log2e
            mine.x_G[0, c] = tile.if_then_else(
                mine.x_G[0, c] < smallest_log2, smallest_log2, mine.x_G[0, c]
            )
        for i in tile.unroll(1, PART):
            for c in tile.unroll(1):
                mine.x_G[i, c] = tile.if_then_else(
                    mine.x_G[i, c] < smallest_log, smallest_log, mine.x_G[i, c]
                )
        for i in tile.unroll(1, PART):
            for c in tile.unroll(1):
                mine.x_G[i, c] = mine.x_G[i, c] * log2e + mine.x_G[i - 1, c]
        for i in tile.unroll(PART):
            for c in tile.vectorized(1):
                own.s_g[mine.group, mine.i_token + i, mine.i_channel + c] = mine.x_G[i, c]

    @tile.macro
    def make_rows(own, mine, scale):
        """k, normalised, to x_k; -E and Qg to x_rows; the decay's sum to x_sum.

        Here a thread has eight channels of every sixteenth token, so that it reads and writes 16 bytes
        at a time: where a token lies takes more instructions than what is done with its channels.
        """
        for h in tile.unroll(2):
            for c in tile.vectorized(4):
                mine.x_before[4 * h + c] = own.s_g[mine.group, PART - 1, mine.i_lane + 4 * h + c]
        for n in tile.unroll(ROW_TOKENS):
            mine.x_rstd[0] = tile.rsqrt(own.s_squares[mine.group, mine.i_row + 16 * n] + 1e-6)
            mine.x_rstd[1] = tile.rsqrt(own.s_squares[mine.group, BT + mine.i_row + 16 * n] + 1e-6) * scale
            for h in tile.unroll(2):
                for c in tile.vectorized(4):
                    mine.x_sum[n, 4 * h + c] = own.s_g[
                        mine.group, mine.i_row + 16 * n, mine.i_lane + 4 * h + c
                    ]
            for c in tile.vectorized(8):
                mine.x_read[0, c] = own.s_kq[mine.group, mine.i_row + 16 * n, mine.i_lane + c]
            for c in tile.vectorized(8):
                mine.x_read[1, c] = own.s_kq[mine.group, BT + mine.i_row + 16 * n, mine.i_lane + c]
            for h in tile.unroll(4):
                for c in tile.vectorized(2):
                    if n >= ROW_TOKENS // 2:
                        mine.x_sum[n, 2 * h + c] += mine.x_before[2 * h + c]
                for c in tile.vectorized(2):
                    mine.x_k[n, 2 * h + c] = (
                        tile.cast(mine.x_read[0, 2 * h + c], "float32") * mine.x_rstd[0]
                    )
                for c in tile.vectorized(2):
                    mine.x_factor[c] = tile.exp2(mine.x_sum[n, 2 * h + c])
                for c in tile.vectorized(2):
                    mine.x_rows[0, n, 2 * h + c] = -(
                        mine.x_k[n, 2 * h + c]
                        * mine.x_factor[c]
                    )
                for c in tile.vectorized(2):
                    mine.x_rows[1, n, 2 * h + c] = (
                        tile.cast(mine.x_read[1, 2 * h + c], "float32")
                        * mine.x_rstd[1]
                        * mine.x_factor[c]
                    )

    @tile.macro
    def store_rows(own, mine):
        for n in tile.unroll(ROW_TOKENS):
            for c in tile.vectorized(8):
                own.s_rows[mine.slot, mine.i_row + 16 * n, mine.i_lane + c] = mine.x_rows[0, n, c]
            for c in tile.vectorized(8):
                own.s_rows[mine.slot, BT + mine.i_row + 16 * n, mine.i_lane + c] = (
                    mine.x_rows[1, n, c]
                )

    @tile.macro
    def write_frame(own, mine, scale, x_anchor):
        """-E, Qg and keys of one frame, zero outside of it."""
        for i in tile.unroll(PART):
            for c in tile.unroll(1):
                x = mine.x_G[i, c] - x_anchor[c]
                row = tile.if_then_else(tile.And(x <= 0.0, x >= -RANGE), tile.exp2(x), 0.0)
                key = (
                    tile.cast(
                        own.s_kq[mine.group, mine.i_token + i, mine.i_channel + c], "float32"
                    )
                    * tile.rsqrt(own.s_squares[mine.group, mine.i_token + i] + 1e-6)
                )
                own.s_rows[mine.slot, mine.i_token + i, mine.i_channel + c] = -(
                    key
                    * row
                )
                own.s_rows[mine.slot, BT + mine.i_token + i, mine.i_channel + c] = (
                    tile.cast(
                        own.s_kq[mine.group, BT + mine.i_token + i, mine.i_channel + c], "float32"
                    )
                    * (tile.rsqrt(own.s_squares[mine.group, BT + mine.i_token + i] + 1e-6) * scale)
                    * row
                )
                own.s_keys[mine.slot, mine.i_token + i, mine.i_channel + c] = (
                    key
                    * own.s_beta[mine.group, mine.i_token + i]
                    * tile.if_then_else(x >= -RANGE, tile.exp2(-x), 0.0)
                )

    @tile.macro
    def later_frames(own, mine, scale, stamp):
        """The scores of rows that are not in the first frame, with factors in range.

        A frame's rows are its anchor and what lies up to RANGE below, its columns these and all
        earlier tokens; every row of a channel is in one frame. The next anchor is the first token
        below the frame. `stamp` in s_T's margin says that there is one more, and which rows are
        written: the others keep what the first product gave them, so that a later token's decay
        moves no bit of theirs.
        """
        x_anchor = tile.alloc_local([1], "float32")
        x_next = tile.alloc_local([1], "float32")
        # products of 32 rows, by mma: with one of wgmma here, ptxas waits for each of the kernel's
        b_T = tile.alloc_fragment([BT, BT], "float32")
        b_Aqk = tile.alloc_fragment([BT, BT], "float32")
        tile.clear(b_T)
        tile.clear(b_Aqk)
        for i in tile.unroll(PART):
            for c in tile.vectorized(1):
                mine.x_G[i, c] = own.s_g[mine.group, mine.i_token + i, mine.i_channel + c]
        for i in tile.unroll(PART):
            for c in tile.unroll(1):
                mine.x_G[i, c] += tile.if_then_else(
                    mine.i_part > 0, own.s_g[mine.group, PART - 1, mine.i_channel + c], 0.0
                )
        for c in tile.unroll(1):
            x_anchor[c] = 0.0
        for i in tile.unroll(PART):
            for c in tile.unroll(1):
                if mine.x_G[i, c] < -RANGE:
                    own.s_T[mine.group, mine.i_token + i, BT + 2] = stamp
        for i_frame in tile.serial(BT):
            if own.s_T[mine.group, 0, BT] == stamp + i_frame:
                tile.sync_threads(mine.barrier, GROUP)
                write_frame(own, mine, scale, x_anchor)
                for c in tile.unroll(1):
                    x_next[c] = BELOW
                for i in tile.unroll(PART):
                    for c in tile.unroll(1):
                        x_next[c] = tile.max(
                            x_next[c],
                            tile.if_then_else(
                                mine.x_G[i, c] - x_anchor[c] < -RANGE, mine.x_G[i, c], BELOW
                            ),
                        )
                for c in tile.unroll(1):
                    own.s_total[mine.group, mine.i_part, mine.i_channel + c] = x_next[c]
                tile.sync_threads(mine.barrier, GROUP)
                for c in tile.unroll(1):
                    x_anchor[c] = tile.max(
                        own.s_total[mine.group, 0, mine.i_channel + c],
                        own.s_total[mine.group, 1, mine.i_channel + c],
                    )
                    if x_anchor[c] > BELOW:
                        own.s_T[mine.group, 0, BT] = stamp + i_frame + 1
                tile.gemm(
                    own.s_rows[mine.slot, 0:BT, :], own.s_keys[mine.slot, :, :], b_T,
                    transpose_B=True,
                )
                tile.gemm(
                    own.s_rows[mine.slot, BT : 2 * BT, :], own.s_keys[mine.slot, :, :], b_Aqk,
                    transpose_B=True,
                )
                tile.sync_threads(mine.barrier, GROUP)
        make_rows(own, mine, scale)
        store_rows(own, mine)
        # Ktail, which cannot be made of k / gamma
        for n in tile.unroll(ROW_TOKENS):
            for c in tile.unroll(8):
                mine.x_k[n, c] *= (
                    tile.exp2(
                        own.s_g[mine.group, BT - 1, mine.i_lane + c]
                        + mine.x_before[c]
                        - mine.x_sum[n, c]
                    )
                    * own.s_beta[mine.group, mine.i_row + 16 * n]
                )
        for c in tile.unroll(8):
            mine.x_gamma[c] = 1.0
        for i, j in tile.Parallel(BT, BT):
            if own.s_T[mine.group, i, BT + 2] == stamp:
                own.s_T[mine.group, j, i] = b_T[i, j]
                own.s_Aqk[mine.slot, i, j] = tile.if_then_else(i > j, b_Aqk[i, j], 0.0)

    @tile.macro
    def copy_early(own, mine):
        """What of the slot is ready before A is: a thread of a warp each."""
        slot = mine.slot
        if tile.And(own.i_v == 1, mine.i_thread == 0 * WARP):
            tile.copy_cluster(
                own.s_keys[slot, :, :], own.s_keys[slot, :, :],
                dst_block=0, remote_barrier=own.full[slot],
            )
        if tile.And(own.i_v == 1, mine.i_thread == 1 * WARP):
            tile.copy_cluster(
                own.s_Aqk[slot, :, :], own.s_Aqk[slot, :, :],
                dst_block=0, remote_barrier=own.full[slot],
            )
        if tile.And(own.i_v == 1, mine.i_thread == 2 * WARP):
            tile.copy_cluster(
                own.s_gamma[slot, :], own.s_gamma[slot, :],
                dst_block=0, remote_barrier=own.full[slot],
            )

    @tile.macro
    def substitute(own, mine, x_A, x_T, first, rows):
        """Four rows of a half's inverse, from `first` on, in the place of T's four columns there.

        x_A has a column from that row on, and moves up by four. What is past the half is of no use.
        """
        i_half = mine.i_thread % BT // HALF * HALF
        for m in tile.unroll(4):
            for i in tile.unroll(rows // 4):
                for c in tile.vectorized(4):
                    x_T[i * 4 + c] = own.s_T[
                        mine.group, i_half + first + m, i_half + first + i * 4 + c
                    ]
            for i in tile.unroll(m + 1, rows):
                x_A[i] += x_T[i] * x_A[m]
        tile.sync_warp()  # all its threads have read what each writes a part of
        for m in tile.unroll(4):
            own.s_T[mine.group, i_half + first + m, mine.i_thread % BT] = x_A[m]
        for i in tile.unroll(rows - 4):
            x_A[i] = x_A[i + 4]

    @tile.macro
    def halves(own, mine):
        """A column of the inverse of either half a thread, by substitution.

        In two loops of few instructions: three warps wait for the one that does it, and what runs
        once is fetched no faster than it runs.
        """
        x_A = tile.alloc_local([HALF], "float32")
        x_T = tile.alloc_local([HALF], "float32")
        for i in tile.unroll(HALF):
            x_A[i] = tile.if_then_else(i == mine.i_thread % HALF, 1.0, 0.0)
        for n in tile.unroll(HALF // 8, unroll_factor=1):
            substitute(own, mine, x_A, x_T, n * 4, HALF)
        for n in tile.unroll(HALF // 8, unroll_factor=1):
            substitute(own, mine, x_A, x_T, HALF // 2 + n * 4, HALF // 2)

    @tile.macro
    def invert(own, mine):
        """s_A of the slot, from s_T, which has -T transposed."""
        # the last warp: the first has loads to start
        if mine.i_warp == WARPS - 1:
            halves(own, mine)
        tile.sync_threads(mine.barrier, GROUP)
        copy_early(own, mine)
        # A21 = A22 (-T21 A11); of each quarter of A two columns of a row a thread
        x_A21 = tile.alloc_local([2], "float32")
        x_A22 = tile.alloc_local([4], "float32")
        i_i = mine.i_thread * 2 // HALF
        i_j = mine.i_thread * 2 % HALF
        for c in tile.vectorized(2):
            own.s_A[mine.slot, i_i, i_j + c] = own.s_T[mine.group, i_i, i_j + c]
        for c in tile.vectorized(2):
            own.s_A[mine.slot, i_i, HALF + i_j + c] = 0.0
        for c in tile.vectorized(2):
            own.s_A[mine.slot, HALF + i_i, HALF + i_j + c] = own.s_T[
                mine.group, HALF + i_i, HALF + i_j + c
            ]
        for c in tile.vectorized(2):
            x_A21[c] = 0.0
        for m in tile.unroll(HALF):
            for c in tile.vectorized(2):
                x_A21[c] += own.s_T[mine.group, m, HALF + i_i] * own.s_T[mine.group, m, i_j + c]
        for c in tile.vectorized(2):
            own.s_T[mine.group, HALF + i_i, i_j + c] = x_A21[c]  # where T is not looked at
        tile.sync_threads(mine.barrier, GROUP)
        for c in tile.vectorized(2):
            x_A21[c] = 0.0
        for n in tile.unroll(HALF // 4):
            for m in tile.vectorized(4):
                x_A22[m] = own.s_T[mine.group, HALF + i_i, HALF + n * 4 + m]
            for m in tile.unroll(4):
                for c in tile.vectorized(2):
                    x_A21[c] += x_A22[m] * own.s_T[mine.group, HALF + n * 4 + m, i_j + c]
        for c in tile.vectorized(2):
            own.s_A[mine.slot, HALF + i_i, i_j + c] = x_A21[c]
        tile.sync_threads(mine.barrier, GROUP)

    @tile.macro
    def load_chunk(x, own, mine, row, i_hq, i_hg):
        loaded = own.loaded
        tile.tma_copy(
            x.k[own.i_b, row : row + BT, i_hq, :],
            own.s_kq[mine.group, 0:BT, :],
            barrier=loaded[mine.group],
        )
        tile.tma_copy(
            x.q[own.i_b, row : row + BT, i_hq, :],
            own.s_kq[mine.group, BT : 2 * BT, :],
            barrier=loaded[mine.group],
        )
        tile.tma_copy(
            x.g[own.i_b, row : row + BT, i_hg, :],
            own.s_g[mine.group, :, :],
            barrier=loaded[mine.group],
        )
        # 32 numbers that lie apart, held in registers until the chunk's turn
        if mine.i_thread < BT:
            mine.x_beta[0] = 0.0
            if row + mine.i_thread < own.T:
                mine.x_beta[0] = tile.cast(x.beta[own.i_b, row + mine.i_thread, own.i_h], "float32")
        if tile.shuffle_elect(GROUP):
            tile.barrier_arrive(loaded[mine.group])

    @tile.macro
    def norms_and_decay(x, own, mine):
        """s_squares, s_self; in s_g the decay summed, but for what lies before the second half."""
        # a token with itself, where no decay lies between, and the norms, from one product
        b_norms = tile.alloc_fragment([2 * BT, 2 * BT], "float32")
        tile.wgmma_gemm(
            own.s_kq[mine.group, :, :], own.s_kq[mine.group, :, :], b_norms,
            transpose_B=True, clear_accum=True,
        )
        sum_decay(own, mine)
        tile.wait_wgmma(0)
        for i, j in tile.Parallel(2 * BT, 2 * BT):
            if i == j:
                own.s_squares[mine.group, i] = b_norms[i, j]
            if i + BT == j:
                own.s_self[mine.group, i] = b_norms[i, j]
        if mine.i_thread < BT:
            own.s_beta[mine.group, mine.i_thread] = mine.x_beta[0]
        tile.sync_threads(mine.barrier, GROUP)

    @tile.macro
    def write_factors(x, own, mine, i_n, stamp):
        """-E, Qg, k / gamma and gamma_C; `stamp` where a channel is out of the first frame.

        All is made in registers, packed, before the slot is waited for: it is scanned meanwhile.
        """
        make_rows(own, mine, x.scale)
        for n in tile.unroll(ROW_TOKENS):
            for h in tile.unroll(4):
                for c in tile.vectorized(2):
                    mine.x_k[n, 2 * h + c] *= (
                        tile.exp2(-mine.x_sum[n, 2 * h + c])
                        * own.s_beta[mine.group, mine.i_row + 16 * n]
                    )
                for c in tile.vectorized(2):
                    mine.x_keys[n, 2 * h + c] = mine.x_k[n, 2 * h + c]
        tile.mbarrier_wait_parity(own.empty[mine.slot], (i_n + 1) % 2)
        store_rows(own, mine)
        for n in tile.unroll(ROW_TOKENS):
            for c in tile.vectorized(8):
                own.s_keys[mine.slot, mine.i_row + 16 * n, mine.i_lane + c] = mine.x_keys[n, c]
        if mine.i_row == 15:  # of the last token, too
            for h in tile.unroll(2):
                for c in tile.vectorized(4):
                    own.s_gamma[mine.slot, mine.i_lane + 4 * h + c] = tile.exp2(
                        mine.x_sum[ROW_TOKENS - 1, 4 * h + c]
                    )
            for c in tile.unroll(8):
                if mine.x_sum[ROW_TOKENS - 1, c] < -RANGE:
                    own.s_T[mine.group, 0, BT] = stamp
        tile.fence_proxy_async()
        tile.sync_threads(mine.barrier, GROUP)

    @tile.macro
    def score(x, own, mine, stamp):
        """-T transposed to s_T, and Aqk but for its diagonal."""
        b_scores = tile.alloc_fragment([2 * BT, BT], "float32")
        tile.clear(b_scores)
        tile.gemm(
            own.s_rows[mine.slot, :, :], own.s_keys[mine.slot, :, :], b_scores, transpose_B=True
        )
        for i, j in tile.Parallel(2 * BT, BT):
            if i < BT:
                own.s_T[mine.group, j, i] = b_scores[i, j]
            else:
                own.s_Aqk[mine.slot, i - BT, j] = tile.if_then_else(i - BT > j, b_scores[i, j], 0.0)
        for h in tile.unroll(2):
            for c in tile.vectorized(4):
                mine.x_gamma[4 * h + c] = own.s_gamma[mine.slot, mine.i_lane + 4 * h + c]
        if own.s_T[mine.group, 0, BT] == stamp:
            later_frames(own, mine, x.scale, stamp)

    @tile.macro
    def write_tail(own, mine, scale):
        """The diagonal of Aqk, and Ktail in place of k / gamma."""
        if mine.i_warp == 1:
            i_own = mine.i_thread % BT
            own.s_Aqk[mine.slot, i_own, i_own] = (
                own.s_self[mine.group, i_own]
                * scale
                * tile.rsqrt(own.s_squares[mine.group, i_own] + 1e-6)
                * tile.rsqrt(own.s_squares[mine.group, BT + i_own] + 1e-6)
                * own.s_beta[mine.group, i_own]
            )
        for n in tile.unroll(ROW_TOKENS):
            for h in tile.unroll(4):
                for c in tile.vectorized(2):
                    mine.x_keys[n, 2 * h + c] = mine.x_k[n, 2 * h + c] * mine.x_gamma[2 * h + c]
            for c in tile.vectorized(8):
                own.s_keys[mine.slot, mine.i_row + 16 * n, mine.i_lane + c] = mine.x_keys[n, c]
        tile.fence_proxy_async()

    @tile.macro
    def write_norms(x, own, mine, i_c):
        """What the backward is to have of them, by one warp."""
        i_own = mine.i_thread % BT
        x.k_rstd[i_c, own.i_h, i_own] = tile.rsqrt(own.s_squares[mine.group, i_own] + 1e-6)
        x.q_rstd[i_c, own.i_h, i_own] = tile.rsqrt(own.s_squares[mine.group, BT + i_own] + 1e-6)
        x.k_beta[i_c, own.i_h, i_own] = own.s_beta[mine.group, i_own]

    @tile.macro
    def write_Y(x, own, mine, i_c):
        """Y in place of -E; what is kept of A and Aqk."""
        b_Y = tile.alloc_fragment([BT, K], "float32")
        tile.clear(b_Y)
        tile.gemm(own.s_A[mine.slot, :, :], own.s_rows[mine.slot, 0:BT, :], b_Y)
        tile.copy(own.s_A[mine.slot, :, :], x.A[i_c, own.i_h, :, :], disable_tma=True)
        tile.copy(own.s_Aqk[mine.slot, :, :], x.Aqk[i_c, own.i_h, :, :], disable_tma=True)
        tile.sync_threads(mine.barrier, GROUP)
        tile.copy(b_Y, own.s_rows[mine.slot, 0:BT, :])

    @tile.macro
    def hand_over(own, mine):
        """The slot, or a copy of it, to the group that scans."""
        slot = mine.slot
        tile.fence_proxy_async()
        tile.sync_threads(mine.barrier, GROUP)
        if tile.And(own.i_v == 1, mine.i_thread == 0 * WARP):
            tile.copy_cluster(
                own.s_rows[slot, :, :], own.s_rows[slot, :, :],
                dst_block=0, remote_barrier=own.full[slot],
            )
        if tile.And(own.i_v == 1, mine.i_thread == 1 * WARP):
            tile.copy_cluster(
                own.s_A[slot, :, :], own.s_A[slot, :, :],
                dst_block=0, remote_barrier=own.full[slot],
            )
        # as many arrivals as of a slot that is copied
        if tile.And(own.i_v == 0, mine.i_thread < COPIES):
            tile.mbarrier_arrive(own.full[slot])

    @tile.macro
    def prepare(x, own, group):
        """A text for all groups: two, and the scan's, do not stay where instructions are kept."""
        i_thread = tile.get_thread_binding()
        x_beta = tile.alloc_local([1], "float32")
        x_G = tile.alloc_local([PART, 1], "float32")
        x_sum = tile.alloc_local([ROW_TOKENS, 8], "float32")
        x_before = tile.alloc_local([8], "float32")
        x_k = tile.alloc_local([ROW_TOKENS, 8], "float32")
        x_read = tile.alloc_local([2, 8], IO)
        x_rows = tile.alloc_local([2, ROW_TOKENS, 8], IO)
        x_keys = tile.alloc_local([ROW_TOKENS, 8], IO)
        x_factor = tile.alloc_local([2], "float32")
        x_rstd = tile.alloc_local([2], "float32")
        x_gamma = tile.alloc_local([8], "float32")
        slot = 2 * group + 1 - own.i_v  # and the first chunk
        i_part = i_thread // K
        mine = SimpleNamespace(
            group=group, barrier=2 + group, slot=slot, i_thread=i_thread, i_warp=i_thread // WARP,
            i_channel=i_thread % K, i_part=i_part, i_token=i_part * PART,
            i_row=i_thread // (K // 8), i_lane=i_thread % (K // 8) * 8, x_G=x_G, x_sum=x_sum,
            x_before=x_before, x_k=x_k, x_read=x_read, x_rows=x_rows, x_keys=x_keys,
            x_factor=x_factor, x_rstd=x_rstd, x_gamma=x_gamma, x_beta=x_beta,
        )
        n_own = tile.ceildiv(own.n_chunks - slot, SLOTS)
        if i_thread == 0:
            own.s_T[group, 0, BT] = 0.0  # no stamp
            # heads of q and k, and of the decay: a division each, or a register, for every load
            own.s_T[group, 0, BT + 1] = tile.cast(own.i_hq, "float32")
            own.s_T[group, 0, BT + 3] = tile.cast(own.i_hg, "float32")
        if i_thread < BT:
            own.s_T[group, i_thread, BT + 2] = 0.0
        if slot < own.n_chunks:
            load_chunk(x, own, mine, slot * BT, own.i_hq, own.i_hg)

        for i_n in tile.serial(n_own):
            # the same of a whole warp, so that ptxas keeps what depends on it once a warp
            group_now = tile.shfl_sync(group, 0)
            slot_now = 2 * group_now + 1 - own.i_v
            now = SimpleNamespace(
                **(vars(mine) | dict(group=group_now, barrier=2 + group_now, slot=slot_now))
            )
            i_t = slot + i_n * SLOTS
            i_c = own.i_b * own.n_chunks + i_t
            stamp = tile.cast((i_n + 1) * 64, "float32")
            tile.mbarrier_wait_parity(own.loaded[now.group], i_n % 2)
            norms_and_decay(x, own, now)
            write_factors(x, own, now, i_n, stamp)
            score(x, own, now, stamp)
            tile.sync_threads(now.barrier, GROUP)
            if i_n + 1 < n_own:
                load_chunk(
                    x, own, now, (i_t + SLOTS) * BT,
                    tile.cast(own.s_T[now.group, 0, BT + 1], "int32"),
                    tile.cast(own.s_T[now.group, 0, BT + 3], "int32"),
                )
            write_tail(own, now, x.scale)
            if now.i_warp == 2:
                write_norms(x, own, now, i_c)
            invert(own, now)
            write_Y(x, own, now, i_c)
            hand_over(own, now)

    @tile.prim_func
    def forward(
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        g: tile.Tensor([B, T, HG, K], "float32"),
        beta: tile.Tensor([B, T, HV], "bfloat16"),
        v: tile.Tensor([B, T, HV, V], "bfloat16"),
        o: tile.Tensor([B, T, HV, V], "bfloat16"),
        q_rstd: tile.Tensor([NT, HV, BT], "float32"),
        k_rstd: tile.Tensor([NT, HV, BT], "float32"),
        k_beta: tile.Tensor([NT, HV, BT], "float32"),
        A: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        S_seg: tile.Tensor([B, HV, NS, V, K], "float32"),
        scale: tile.float32,
        segment: tile.int32,
    ):
        threads = (GROUP, 1 + GROUPS)
        with tile.Kernel(2, HV, B, threads=threads, cluster_dims=2) as (i_v, i_h, i_b):
            s_rows = tile.alloc_shared([SLOTS, 2 * BT, K], IO)  # -E, then Y = -A E; and Qg
            s_keys = tile.alloc_shared([SLOTS, BT, K], IO)  # k / gamma, then Ktail
            s_A = tile.alloc_shared([SLOTS, BT, BT], IO)
            s_Aqk = tile.alloc_shared([SLOTS, BT, BT], IO)
            s_gamma = tile.alloc_shared([SLOTS, K], "float32")
            s_o = tile.alloc_shared([BT, BV], IO)
            # of the groups that prepare: what they load, and what they keep; where one group scans,
            # the last tile of s_kq is that of v
            s_kq = tile.alloc_shared([GROUPS + 1, 2 * BT, K], IO)
            s_beta = tile.alloc_shared([GROUPS + 1, BT], "float32")
            s_g = tile.alloc_shared([GROUPS + 1, BT, K], "float32")
            s_self = tile.alloc_shared([GROUPS + 1, BT], "float32")
            s_total = tile.alloc_shared([GROUPS + 1, PARTS, K], "float32")
            s_squares = tile.alloc_shared([GROUPS + 1, 2 * BT], "float32")
            # rows so long that what a warp writes of the scores lies in banks of its own
            s_T = tile.alloc_shared([GROUPS + 1, BT, BT + 4], "float32")
            full = tile.alloc_cluster_barrier([COPIES] * SLOTS)
            empty = tile.alloc_cluster_barrier([WARPS] * SLOTS)
            loaded = tile.alloc_barrier([1] * (GROUPS + 1))
            values = tile.alloc_barrier([1] * 2)
            x = SimpleNamespace(
                q=q, k=k, g=g, beta=beta,
                v=v, o=o, q_rstd=q_rstd, k_rstd=k_rstd,
                k_beta=k_beta, A=A, Aqk=Aqk, S_seg=S_seg,
                scale=scale, segment=segment,
            )
            own = SimpleNamespace(
                i_v=i_v, i_h=i_h, i_b=i_b, i_hq=i_h // (HV // H), i_hg=i_h // (HV // HG),
                T=T, n_chunks=tile.ceildiv(T, BT), s_rows=s_rows, s_keys=s_keys, s_A=s_A,
                s_Aqk=s_Aqk, s_gamma=s_gamma, s_o=s_o,
                s_kq=s_kq, s_beta=s_beta, s_g=s_g, s_self=s_self,
                s_total=s_total, s_squares=s_squares, s_T=s_T,
                full=full, empty=empty, loaded=loaded, values=values,
            )

            # one chain of branches: after several apart ptxas would wait for each product
            if tile.And(tile.get_thread_binding(1) == 0, i_v == 0):
                scan(x, own)
            else:
                prepare(x, own, tile.get_thread_binding(1) - 1 + i_v)
            # the other program may write here, and be written to, until both are through
            tile.cluster_sync()

    return forward


@cache
def compiled():
    """The program, compiled for the present GPU (10 s where no cache has it)."""
    import tilelang

    return tilelang.compile(program(), pass_configs=PASSES)


def launch(
    q, k, g, beta, v, o, q_rstd, k_rstd, k_beta, A, Aqk, S_seg, *, n_sequences, scale, T, H, HV,
    HG, NS, segment
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(q, k, g, beta, v, o, q_rstd, k_rstd, k_beta, A, Aqk, S_seg, scale, segment)
