"""A forward in one kernel: what the scan reads of a chunk passes through no memory.

    T_ij   = D_ij <k_i, k_j> beta_j of normalised keys, i > j            A = (I + T)^-1
    Aqk_ij = D_ij <q_i, k_j> beta_j scale of normalised queries, i >= j
    q_head = gamma scale / |q|      k_head = gamma / |k|      k_tail = (gamma_C / gamma) beta / |k|
                                                                gamma = exp(cumulative decay)

D_ij is what the state keeps from token j to token i.

    X^T = v^T - (S^T k^T) k_head          R^T = X^T A^T
    O^T = (S^T q^T) q_head + R^T Aqk^T
    S^T <- S^T gamma_C + (R^T k_tail) k

where q_head, k_head and k_tail, one number a token, make Qg, E and Ktail of q and k.

Two programs, a cluster, take a head of a sequence. One group of 128 threads scans, in the second, and
all others prepare, in turn, each every seventh chunk, into a slot of shared memory. What the
first program makes is copied to the second, what is ready first first:

    chunk    0   1   2   3   4   5   6   7   8 ...
    program  0   1   0   1   0   1   0   0   1
    group    0   0   1   1   2   2   3   0   0
    slot     0   1   2   3   4   5   6   7   8

A slot has q and k as they are, A, Aqk, and a number a token each of q_head, k_head and k_tail. It is
`full` once it was made and copied, `empty` once it was scanned. A group loads the q and
k of its next chunk while it prepares this one, into another slot: no group only loads.

    q              [B, T, H, K]       bf16  queries; normalised in the kernel
    k              [B, T, H, K]       bf16  keys; normalised in the kernel
    g              [B, T, HG]         fp32  log decay
    beta           [B, T, HV]         bf16  factor of what a token erases and writes
    v              [B, T, HV, V]      bf16  values
    initial_state  [N, HV, K, V]      fp32  state before the first token
    o              [B, T, HV, V]      bf16  output
    q_rstd         [NT, HV, BT]       fp32  1 / norm of q
    k_rstd         [NT, HV, BT]       fp32  1 / norm of k
    k_beta         [NT, HV, BT]       fp32  beta, after its activation
    A              [NT, HV, BT, BT]   bf16  inverse of I + T, lower triangle
    Aqk            [NT, HV, BT, BT]   bf16  decayed scores, lower triangle
    q_head         [NT, HV, BT]       fp32  scale / norm of q, decayed from the chunk's start
    k_head         [NT, HV, BT]       fp32  1 / norm of k, decayed from the chunk's start
    k_tail         [NT, HV, BT]       fp32  beta / norm of k, decayed to the chunk's end
    gamma_C        [NT, HV]           fp32  decay of the whole chunk
    log_decay      [NT, HV, BT]       fp32  decay of each token, log2
    S_seg          [N, HV, NS, V, K]  fp32  state at the segment's start, transposed
    final_state    [N, HV, K, V]      fp32  state after the last token

Problem: gated_delta_rule K=64 V=64 bf16, g fp32, l2norm
Config:  BT=32 BV=64 language=tilelang num_stages=3 num_warps=4
Template digest e819ba863863d2b1; made by
    gdn2gen generate --op gated_delta_rule --head-dim 64,64 --dtype bf16 --gate-dtype fp32 \
      --gate none --with=initial_state,final_state --stage forward_outside --config \
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
# chunks from one of a group's to its next; slots; tiles of a slot; numbers of a token in it
TURN, SLOTS, COPIES, NUMBERS = 2 * GROUPS + 1, 4 * GROUPS + 2, 4, 4
log2e = 1.4426950408889634
# exp2 of this is 0 in fp32: a clamp that changes no result, and keeps g = -inf out of differences.
smallest_log2 = -150.0
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
    from tilelang.layout import make_swizzled_layout

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
            own.s_v[stage * BT : stage * BT + BT, :],
            barrier=own.values[stage],
        )
        if tile.shuffle_elect(GROUP):
            tile.barrier_arrive(own.values[stage])

    @tile.macro
    def store_o(x, own, b_o_rows, i_t):
        tile.copy(b_o_rows, own.s_o)
        tile.fence_proxy_async()
        tile.sync_threads(1, GROUP)
        tile.tma_copy(
            own.s_o,
            x.o[
                own.i_b,
                i_t * BT : (i_t + 1) * BT,
                own.i_h,
                :,
            ],
        )

    @tile.macro
    def products(x, own, b_S, b_Sd, b_v, b_ES, b_X, b_R, b_Rd, b_outer, b_o, b_o_rows, i_t, slot):
        tile.wgmma_gemm(
            b_Sd, own.s_kq[slot, 0:BT, :], b_ES, transpose_B=True, clear_accum=True, policy=ROWS
        )
        if i_t > 0:
            store_o(x, own, b_o_rows, i_t - 1)  # meanwhile
        tile.mbarrier_wait_parity(own.values[i_t % 2], i_t // 2 % 2)
        for i, j in tile.Parallel(BV, BT):
            b_v[i, j] = own.s_v[i_t % 2 * BT + j, i]
        for i, j in tile.Parallel(BV, K):
            b_S[i, j] *= own.s_numbers[slot, 3, 0]
        tile.wait_wgmma(0)
        for i, j in tile.Parallel(BV, BT):
            b_X[i, j] = tile.cast(b_v[i, j], "float32") - b_ES[i, j] * own.s_numbers[slot, 0, j]
        tile.wgmma_gemm(
            b_X, own.s_A[slot, :, :], b_R, transpose_B=True, clear_accum=True, policy=ROWS
        )
        # behind R, which is awaited first
        tile.wgmma_gemm(
            b_Sd, own.s_kq[slot, BT : 2 * BT, :], b_o,
            transpose_B=True, clear_accum=True, policy=ROWS,
        )
        tile.wait_wgmma(1)  # R, but not o
        tile.copy(b_R, b_Rd)
        for i, j in tile.Parallel(BV, BT):
            b_outer[i, j] = b_R[i, j] * own.s_numbers[slot, 1, j]
        tile.wgmma_gemm(b_outer, own.s_kq[slot, 0:BT, :], b_S, policy=ROWS)
        tile.wait_wgmma(1)  # o, but not the state
        for i, j in tile.Parallel(BV, BT):
            b_o[i, j] *= own.s_numbers[slot, 2, j]
        tile.wgmma_gemm(b_Rd, own.s_Aqk[slot, :, :], b_o, transpose_B=True, policy=ROWS)

    @tile.macro
    def scan(x, own):
        """S^T [BV, K] stays in the group's registers, as in the stage scan."""
        i_thread = tile.get_thread_binding()
        b_S = tile.alloc_fragment([BV, K], "float32")
        b_Sd = tile.alloc_fragment([BV, K], IO)
        b_v = tile.alloc_fragment([BV, BT], IO)
        b_ES = tile.alloc_fragment([BV, BT], "float32")
        b_X = tile.alloc_fragment([BV, BT], IO)
        b_R = tile.alloc_fragment([BV, BT], "float32")
        b_Rd = tile.alloc_fragment([BV, BT], IO)
        b_outer = tile.alloc_fragment([BV, BT], IO)
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
        # whose turn it is, and how many turns all groups had: by division they would be waited for
        turn = tile.alloc_local([2], "int32")
        turn[0] = 0
        turn[1] = 0

        load_values(x, own, 0)
        if own.n_chunks > 1:
            load_values(x, own, 1)
        for i, j in tile.Parallel(BV, K):
            b_S[i, j] = x.initial_state[own.i_b, own.i_h, j, i]

        for i_n in tile.serial(own.n_chunks):
            # known to be a warp's, so that descriptors are not made anew for each product
            i_t = tile.shfl_sync(i_n, 0)
            slot = tile.shfl_sync(turn[0] + turn[1] % 2 * TURN, 0)
            if i_t == n_kept[0] * x.segment:
                for i, j in tile.Parallel(BV, K):
                    x.S_seg[own.i_b, own.i_h, n_kept[0], i, j] = b_S[i, j]
                n_kept[0] += 1
            tile.copy(b_S, b_Sd)
            tile.mbarrier_wait_parity(own.full[slot], turn[1] // 2 % 2)
            products(
                x, own, b_S, b_Sd, b_v, b_ES, b_X, b_R, b_Rd, b_outer, b_o, b_o_rows, i_t, slot
            )
            tile.wait_wgmma(0)
            # one lane for its warp, whose others are as far: they made the same products
            if i_thread % (GROUP // WARPS) == 0:
                tile.mbarrier_arrive(own.empty[slot], turn[0] % 2)
            turn[0] += 1
            if turn[0] == TURN:
                turn[0] = 0
                turn[1] += 1
            for i, j in tile.Parallel(BV, BT):
                b_o_rows[j, i] = b_o[i, j]
            tile.tma_store_wait(0)
            # this chunk's values were read, and o of the last one is stored
            tile.sync_threads(1, GROUP)
            if i_t + 2 < own.n_chunks:
                load_values(x, own, i_t + 2)
        store_o(x, own, b_o_rows, own.n_chunks - 1)
        tile.tma_store_wait(0)
        for i, j in tile.Parallel(BV, K):
            x.final_state[own.i_b, own.i_h, j, i] = b_S[i, j]

    @tile.macro
    def load_chunk(x, own, mine, i_t, slot):
        """q and k into the slot, and a token's numbers a thread, for the chunk's turn."""
        row = i_t * BT
        tile.tma_copy(
            x.k[own.i_b, row : row + BT, mine.x_head[0], :],
            own.s_kq[slot, 0:BT, :],
            barrier=own.loaded[mine.group],
        )
        tile.tma_copy(
            x.q[own.i_b, row : row + BT, mine.x_head[0], :],
            own.s_kq[slot, BT : 2 * BT, :],
            barrier=own.loaded[mine.group],
        )
        if mine.i_thread < BT:
            mine.x_beta[0] = 0.0
            mine.x_g[0] = 0.0
            if row + mine.i_thread < own.T:
                mine.x_beta[0] = tile.cast(x.beta[own.i_b, row + mine.i_thread, own.i_h], "float32")
                mine.x_g[0] = tile.cast(x.g[own.i_b, row + mine.i_thread, mine.x_head[1]], "float32")
        if tile.shuffle_elect(GROUP):
            tile.barrier_arrive(own.loaded[mine.group])

    @tile.macro
    def sum_decay(own, mine, x_G):
        """x_G: a token's decay in log2, that since the chunk's start, and that to its end.

        A token a lane of one warp. Neither sum is a difference of others: a strong decay would leave
        nothing of it. The clamp is no maximum, which would drop a NaN.
        """
        mine.x_g[0] = mine.x_g[0] * log2e
        mine.x_g[0] = tile.if_then_else(mine.x_g[0] < smallest_log2, smallest_log2, mine.x_g[0])
        x_G[0] = mine.x_g[0]
        x_G[1] = mine.x_g[0]
        x_G[2] = mine.x_g[0]
        for n in (1, 2, 4, 8, 16):
            x_G[3] = tile.shfl_up(x_G[1], n)
            x_G[1] += tile.if_then_else(mine.i_thread >= n, x_G[3], 0.0)
            x_G[3] = tile.shfl_down(x_G[2], n)
            x_G[2] += tile.if_then_else(mine.i_thread < BT - n, x_G[3], 0.0)
        x_G[3] = tile.shfl_down(x_G[2], 1)
        x_G[2] = tile.if_then_else(mine.i_thread < BT - 1, x_G[3], 0.0)
        own.s_G[mine.group, mine.i_thread] = x_G[1]

    @tile.macro
    def write_numbers(x, own, mine, i_c, x_G):
        """What a token has of norms, beta and decay: for the scan, the scores, and the backward."""
        i = mine.i_thread
        k_row = tile.rsqrt(own.s_squares[mine.group, i] + 1e-6)
        q_rstd = tile.rsqrt(own.s_squares[mine.group, BT + i] + 1e-6)
        q_row = x.scale * q_rstd
        x.k_rstd[i_c, own.i_h, i] = k_row
        x.q_rstd[i_c, own.i_h, i] = q_rstd
        column = k_row * mine.x_beta[0]
        x.k_beta[i_c, own.i_h, i] = mine.x_beta[0]
        own.s_row[mine.group, i] = k_row
        own.s_row[mine.group, BT + i] = q_row
        own.s_column[mine.group, i] = column
        head = tile.exp2(x_G[1])
        tail = tile.exp2(x_G[2])
        x.log_decay[i_c, own.i_h, i] = x_G[0]
        if i == BT - 1:
            x.gamma_C[i_c, own.i_h] = head
            own.s_numbers[mine.slot, 3, 0] = head
        for n, number, name in (
            (0, k_row * head, x.k_head),
            (1, column * tail, x.k_tail),
            (2, q_row * head, x.q_head),
        ):
            own.s_numbers[mine.slot, n, i] = number
            name[i_c, own.i_h, i] = number

    @tile.macro
    def score(x, own, mine, i_c):
        """-T transposed to s_T, and Aqk."""
        # of keys and queries as they are: products of inputs are exact, and norms are factors of them
        b_scores = tile.alloc_fragment([2 * BT, 2 * BT], "float32")
        x_G = tile.alloc_local([4], "float32")
        tile.wgmma_gemm(
            own.s_kq[mine.slot, :, :], own.s_kq[mine.slot, :, :], b_scores,
            transpose_B=True, clear_accum=True,
        )
        if mine.i_thread < BT:
            sum_decay(own, mine, x_G)
        tile.wait_wgmma(0)
        for i, j in tile.Parallel(2 * BT, 2 * BT):
            if i == j:
                own.s_squares[mine.group, i] = b_scores[i, j]
        tile.sync_threads(mine.barrier, GROUP)
        if mine.i_thread < BT:
            write_numbers(x, own, mine, i_c, x_G)
        tile.sync_threads(mine.barrier, GROUP)
        # of all pairs, and masked afterwards: under a condition each of them would be a branch
        for i, j in tile.Parallel(2 * BT, 2 * BT):
            if j < BT:
                b_scores[i, j] *= own.s_row[mine.group, i] * own.s_column[mine.group, j]
                b_scores[i, j] *= tile.exp2(own.s_G[mine.group, i % BT] - own.s_G[mine.group, j])
        for i, j in tile.Parallel(2 * BT, 2 * BT):
            if j < BT:
                if i < BT:
                    own.s_T[mine.group, j, i] = tile.if_then_else(i > j, -b_scores[i, j], 0.0)
                else:
                    own.s_Aqk[mine.slot, i - BT, j] = tile.if_then_else(
                        i - BT >= j, b_scores[i, j], 0.0
                    )
        tile.fence_proxy_async()
        tile.sync_threads(mine.barrier, GROUP)

    @tile.macro
    def copy_tile(own, mine, part, number):
        """To the slot of the program that scans: a thread of a warp each."""
        if tile.And(own.i_v == 0, mine.i_thread == number * WARP):
            tile.copy_cluster(
                part, part, dst_block=1, remote_barrier=own.full[mine.slot]
            )

    @tile.macro
    def copy_early(own, mine):
        """What of the slot is ready before A is."""
        copy_tile(own, mine, own.s_Aqk[mine.slot, :, :], 1)
        copy_tile(own, mine, own.s_numbers[mine.slot, :, :], 2)

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
    def hand_over(x, own, mine, i_c):
        """The slot, or what is left to copy of it, to the group that scans."""
        tile.fence_proxy_async()
        tile.sync_threads(mine.barrier, GROUP)
        copy_tile(own, mine, own.s_A[mine.slot, :, :], 0)
        # as many arrivals as of a slot that is copied
        if tile.And(own.i_v == 1, mine.i_thread < COPIES):
            tile.mbarrier_arrive(own.full[mine.slot])
        tile.copy(own.s_A[mine.slot, :, :], x.A[i_c, own.i_h, :, :], disable_tma=True)
        tile.copy(own.s_Aqk[mine.slot, :, :], x.Aqk[i_c, own.i_h, :, :], disable_tma=True)

    @tile.macro
    def prepare(x, own, group):
        """A text for all groups: two, and the scan's, do not stay where instructions are kept."""
        i_thread = tile.get_thread_binding()
        x_beta = tile.alloc_local([1], "float32")
        x_g = tile.alloc_local([1], "float32")
        # of q and k, and of the decay: held, as each load would divide again
        x_head = tile.alloc_local([2], "int32")
        x_head[0] = own.i_hq
        x_head[1] = own.i_hg
        first = 2 * group + own.i_v  # chunk
        mine = SimpleNamespace(
            group=group, barrier=2 + group, slot=first, i_thread=i_thread, i_warp=i_thread // WARP,
            x_head=x_head, x_beta=x_beta, x_g=x_g,
        )
        n_own = tile.ceildiv(own.n_chunks - first, TURN)
        if first < own.n_chunks:
            load_chunk(x, own, mine, first, first)

        for i_n in tile.serial(n_own):
            # the same of a whole warp, so that ptxas keeps what depends on it once a warp
            group_now = tile.shfl_sync(group, 0)
            i_t = 2 * group_now + own.i_v + i_n * TURN
            # within its bounds, which TileLang does not see: it would divide by SLOTS
            first_now = tile.min(tile.max(2 * group_now + own.i_v, 0), TURN - 1)
            slot_now = first_now + i_n % 2 * TURN
            now = SimpleNamespace(
                **(vars(mine) | dict(group=group_now, barrier=2 + group_now, slot=slot_now))
            )
            # held, as it would be made again, in 64 bits, for each number of a token
            i_c = tile.shfl_sync(own.i_b * own.n_chunks + i_t, 0)
            tile.mbarrier_wait_parity(own.loaded[now.group], i_n % 2)
            copy_tile(own, now, own.s_kq[slot_now, :, :], 3)
            score(x, own, now, i_c)
            if i_n + 1 < n_own:
                i_next = i_t + TURN
                # of its two slots the other one
                slot = first_now + (i_n + 1) % 2 * TURN
                tile.mbarrier_wait_parity(own.empty[slot], ((i_n + 1) // 2 + 1) % 2)
                load_chunk(x, own, now, i_next, slot)
            invert(own, now)
            hand_over(x, own, now, i_c)

    @tile.prim_func
    def forward_outside(
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        g: tile.Tensor([B, T, HG], "float32"),
        beta: tile.Tensor([B, T, HV], "bfloat16"),
        v: tile.Tensor([B, T, HV, V], "bfloat16"),
        initial_state: tile.Tensor([B, HV, K, V], "float32"),
        o: tile.Tensor([B, T, HV, V], "bfloat16"),
        q_rstd: tile.Tensor([NT, HV, BT], "float32"),
        k_rstd: tile.Tensor([NT, HV, BT], "float32"),
        k_beta: tile.Tensor([NT, HV, BT], "float32"),
        A: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        q_head: tile.Tensor([NT, HV, BT], "float32"),
        k_head: tile.Tensor([NT, HV, BT], "float32"),
        k_tail: tile.Tensor([NT, HV, BT], "float32"),
        gamma_C: tile.Tensor([NT, HV], "float32"),
        log_decay: tile.Tensor([NT, HV, BT], "float32"),
        S_seg: tile.Tensor([B, HV, NS, V, K], "float32"),
        final_state: tile.Tensor([B, HV, K, V], "float32"),
        scale: tile.float32,
        segment: tile.int32,
    ):
        threads = (GROUP, 1 + GROUPS)
        with tile.Kernel(2, HV, B, threads=threads, cluster_dims=2) as (i_v, i_h, i_b):
            s_kq = tile.alloc_shared([SLOTS, 2 * BT, K], IO)  # keys, then queries
            s_A = tile.alloc_shared([SLOTS, BT, BT], IO)
            s_Aqk = tile.alloc_shared([SLOTS, BT, BT], IO)
            # k_head, k_tail and q_head; gamma_C is the first of the last row
            s_numbers = tile.alloc_shared([SLOTS, NUMBERS, BT], "float32")
            s_v = tile.alloc_shared([2 * BT, BV], IO)  # of this chunk and the next
            s_o = tile.alloc_shared([BT, BV], IO)
            # of the groups that prepare: what belongs to rows and columns of scores
            s_squares = tile.alloc_shared([GROUPS + 1, 2 * BT], "float32")
            s_row = tile.alloc_shared([GROUPS + 1, 2 * BT], "float32")
            s_column = tile.alloc_shared([GROUPS + 1, BT], "float32")
            s_G = tile.alloc_shared([GROUPS + 1, BT], "float32")  # decay since the chunk's start
            # rows so long that what a warp writes of the scores lies in banks of its own
            s_T = tile.alloc_shared([GROUPS + 1, BT, BT + 4], "float32")
            full = tile.alloc_cluster_barrier([COPIES] * SLOTS)
            empty = tile.alloc_cluster_barrier([WARPS] * SLOTS)
            loaded = tile.alloc_barrier([1] * (GROUPS + 1))
            values = tile.alloc_barrier([1] * 2)
            # threads read it by columns, which so lie in banks of their own
            tile.annotate_layout({s_v: make_swizzled_layout(s_v)})
            x = SimpleNamespace(
                q=q, k=k, g=g, beta=beta,
                v=v, initial_state=initial_state, o=o, q_rstd=q_rstd,
                k_rstd=k_rstd, k_beta=k_beta, A=A, Aqk=Aqk,
                q_head=q_head, k_head=k_head, k_tail=k_tail, gamma_C=gamma_C,
                log_decay=log_decay, S_seg=S_seg, final_state=final_state, scale=scale,
                segment=segment,
            )
            own = SimpleNamespace(
                i_v=i_v, i_h=i_h, i_b=i_b, i_hq=i_h // (HV // H), i_hg=i_h // (HV // HG), T=T,
                n_chunks=tile.ceildiv(T, BT), s_kq=s_kq, s_A=s_A, s_Aqk=s_Aqk, s_numbers=s_numbers,
                s_v=s_v, s_o=s_o, s_squares=s_squares, s_row=s_row, s_column=s_column, s_G=s_G,
                s_T=s_T, full=full, empty=empty, loaded=loaded, values=values,
            )

            # one chain of branches: after several apart ptxas would wait for each product
            if tile.And(tile.get_thread_binding(1) == 0, i_v == 1):
                scan(x, own)
            else:
                prepare(x, own, tile.get_thread_binding(1) - i_v)
            # the other program may write here, and be written to, until both are through
            tile.cluster_sync()

    return forward_outside


@cache
def compiled():
    """The program, compiled for the present GPU (10 s where no cache has it)."""
    import tilelang

    return tilelang.compile(program(), pass_configs=PASSES)


def launch(
    q, k, g, beta, v, initial_state, o, q_rstd, k_rstd, k_beta, A, Aqk, q_head, k_head, k_tail,
    gamma_C, log_decay, S_seg, final_state, *, n_sequences, scale, T, H, HV, HG, NS, segment
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    if T == 0:  # no tile that TMA could load
        final_state.copy_(initial_state)
        return
    compiled()(q, k, g, beta, v, initial_state, o, q_rstd, k_rstd, k_beta, A, Aqk, q_head,
        k_head, k_tail, gamma_C, log_decay, S_seg, final_state, scale, segment)
