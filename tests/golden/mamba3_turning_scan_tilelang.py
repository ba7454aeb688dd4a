"""Mamba-3's states and outputs, chunk by chunk of a sequence, of queries and keys that are turned on the way.

    Theta_t = Theta_(t - 1) + 2 pi dt_t rate_t,   q_t = R(Theta_t) (Q_t + Q_bias),   k_t = R(Theta_t) (K_t + K_bias)
    P_ij  = decay_ij s_j <q_i, k_j>, i > j,   P_ii = lambda_i dt_i <q_i, k_i>
    y_i   = head_i S^T q_i + sum of P_ij v_j + D v_i,   out_i = y_i silu(z_i)
    S^T  <- S^T gamma_C + (v^T tail s) k

As `mamba3_scan`, whose products these are; q and k of a head pass through no memory, but are kept for the backward as
the states before chunks are. One program per sequence and head, of two groups of four warps.
One loads a chunk's tiles and makes products. The other turns rows of the group's Q and K where they lie in shared memory,
a chunk ahead: a lane has a pair of channels, a warp 16 tokens, and Theta is added up from chunk to chunk, in units of
2^-32 of a turn as int32, so that sums are exact in any order. Two programs share a multiprocessor.

    loaded  rows of Q and K are in a slot;   full  they are turned;   values  V and what belongs to tokens are there

    Q            [B, T, G, N]   bf16   queries, without biases
    K            [B, T, G, N]   bf16   keys, without biases
    Q_bias       [H, N]         fp32   added to queries
    K_bias       [H, N]         fp32   added to keys
    DT           [B, H, T]      fp32   steps
    rates        [B, HA, T, S]  fp32   scratch: half of tanh of each angle, of the head that all share or of each
    angle_state  [n, H, S]      fp32   Theta before the first token, radians
    V            [B, T, H, P]   bf16   values
    within       [B, H, T]      fp32   scratch: log2 of the decay from the chunk's start to each token
    tail_decay   [B, H, T]      fp32   scratch: decay from each token to the chunk's end
    weight_s     [B, H, T]      fp32   scratch: s
    own_dt       [B, H, T]      fp32   scratch: lambda dt
    D            [H]            fp32   factor of a token's own value, added to o
    Z            [B, T, H, P]   bf16   output gate, before SiLU
    initial_ssm  [n, H, P, N]   fp32   state before the first token
    out          [B, T, H, P]   bf16   output
    ungated      [B, T, H, P]   bf16   output before its gate, y
    h            [M, H, P, N]   bf16   state at the chunk's start, transposed
    final_ssm    [n, H, P, N]   fp32   state after the last token
    q            [B, T, H, N]   bf16   queries
    k            [B, T, H, N]   bf16   keys
    theta        [B, T, H, S]   int32  Theta of each token within its tile, in units of 2^-32 turns
    turns        [M, H, S]      int32  Theta before each tile, in units of 2^-32 turns
    last_angle   [n, H, S]      fp32   Theta after the last token, radians

Problem: mamba3 K=128 V=64 bf16, skip, gate, carried

Config:  BT=64 BV=64 ahead=1 keep=2 language=tilelang maxnreg=64 num_stages=2 num_warps=4
Template digest 467cbd1d6ce591b1; made by
    gdn2gen generate --dtype bf16 --with=skip,gate,carried --stage mamba3_turning_scan --config \
      BT=64,BV=64,ahead=1,keep=2,language=tilelang,maxnreg=64,num_stages=2,num_warps=4
"""

from functools import cache
from types import SimpleNamespace

N, P, S = 128, 64, 32
BT, BV = 64, 64
IO = "bfloat16"
GROUP = 128  # threads
ROWS_OF = BT // 4  # tokens that a warp turns
PASSES = {
    # exp2, rsqrt, sine and cosine by the hardware, flushing what is below 2^-126 to zero
    "tl.enable_fast_math": True,
    # roles and barriers are all written out
    "tl.disable_warp_specialized": True,
    "tl.disable_thread_storage_sync": True,
    "tl.disable_shared_memory_reuse": True,
}


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, G, H, HA, M = (
        tile.dynamic(name) for name in ("B", "T", "G", "H", "HA", "M")
    )
    # a warp keeps whole rows, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.macro
    def turn(x, own):
        """Rows of a chunk in their slot, biased and turned, a chunk after the other."""
        i_thread = tile.get_thread_binding()
        lane = i_thread % 32
        warp = tile.shfl_sync(i_thread // 32, 0)
        row = warp * ROWS_OF
        x_word = tile.alloc_local([2], "float32")
        x_bias = tile.alloc_local([4, 2], "float32")
        x_io = tile.alloc_local([2], IO)
        for a in tile.unroll(2):
            for e in tile.vectorized(2):
                x_bias[a, e] = x.Q_bias[own.i_h, 64 * a + 2 * lane + e]
        for a in tile.unroll(2):
            for e in tile.vectorized(2):
                x_bias[2 + a, e] = x.K_bias[own.i_h, 64 * a + 2 * lane + e]
        x_rate = tile.alloc_local([1, ROWS_OF], "float32")
        x_turned = tile.alloc_local([1, ROWS_OF], "int32")
        x_before = tile.alloc_local([1], "int32")
        x_within = tile.alloc_local([1], "int32")  # of the warps before
        x_total = tile.alloc_local([1], "int32")
        x_theta = tile.alloc_local([1], "int32")
        x_cos = tile.alloc_local([1], "float32")
        x_sin = tile.alloc_local([1], "float32")
        x_sum = tile.alloc_local([1], "float32")  # no number where one of its terms is none
        x_x = tile.alloc_local([1], "float32")
        x_dt = tile.alloc_local([4], "float32")
        x_head = tile.alloc_local([1], "int32")  # of rates: a division once, and not for each
        x_head[0] = own.i_h % own.HA
        x_x[0] = x.angle_state[own.i_n, own.i_h, lane]
        x_x[0] *= 0.15915494309189535  # 1 / 2 pi
        x_before[0] = tile.cast(
            tile.floor(
                tile.min(
                    (x_x[0] - tile.floor(x_x[0] + 0.5)) * 4294967296.0,
                    2147483520.0,
                )
                + 0.5
            ),
            "int32",
        )
        for n in tile.unroll(ROWS_OF):
            x_rate[0, n] = tile.if_then_else(
                row + n < own.T,
                x.rates[own.i_n, x_head[0], row + n, lane],
                0.0,
            )

        for i_m in tile.serial(own.n_chunks):
            # known to be a warp's
            i_t = tile.shfl_sync(i_m, 0)
            slot = i_t % 2
            tile.mbarrier_wait_parity(own.loaded[slot], i_t // 2 % 2)
            x_sum[0] = 0.0
            x_total[0] = 0
            for m in tile.unroll(ROWS_OF // 4):
                for e in tile.vectorized(4):
                    x_dt[e] = own.s_dt[slot, row + 4 * m + e]
                for e in tile.unroll(4):
                    x_x[0] = x_dt[e] * x_rate[0, 4 * m + e]
                    x_sum[0] += x_x[0]
                    x_total[0] += tile.cast(
                        tile.floor(
                            tile.min(
                                (x_x[0] - tile.floor(x_x[0] + 0.5)) * 4294967296.0,
                                2147483520.0,
                            )
                            + 0.5
                        ),
                        "int32",
                    )
                    x_turned[0, 4 * m + e] = x_total[0]
            own.s_turns[slot, warp, lane] = x_total[0]
            # of the next chunk, in the registers of these, which are added up; past the end zeros
            for n in tile.unroll(ROWS_OF):
                x_rate[0, n] = tile.if_then_else(
                    (i_t + 1) * BT + row + n < own.T,
                    x.rates[own.i_n, x_head[0], (i_t + 1) * BT + row + n, lane],
                    0.0,
                )

            tile.sync_threads(2, GROUP)
            x_within[0] = 0
            x_total[0] = 0
            for i in tile.unroll(GROUP // 32):
                if i < warp:
                    x_within[0] += own.s_turns[slot, i, lane]
                x_total[0] += own.s_turns[slot, i, lane]
            if warp == 0:
                x.turns[own.i_n * own.n_chunks + i_t, own.i_h, lane] = x_before[0]
            for n in tile.unroll(ROWS_OF):
                x_theta[0] = x_turned[0, n] + x_within[0]
                if i_t * BT + row + n < own.T:
                    x.theta[own.i_n, i_t * BT + row + n, own.i_h, lane] = tile.max(
                        x_theta[0], -2147483647
                    )
                x_theta[0] += x_before[0]
                x_x[0] = tile.cast(x_theta[0], "float32") * 1.4629180792671596e-09  # pi / 2^31
                x_cos[0] = tile.cos(x_x[0])
                x_sin[0] = tile.sin(x_x[0])
                for e in tile.vectorized(2):
                    x_io[e] = own.s_q[slot, row + n, 2 * lane + e]
                for e in tile.unroll(2):
                    x_word[e] = tile.cast(x_io[e], "float32") + x_bias[0, e]
                x_io[0] = x_word[0] * x_cos[0] - x_word[1] * x_sin[0]
                x_io[1] = x_word[1] * x_cos[0] + x_word[0] * x_sin[0]
                for e in tile.vectorized(2):
                    own.s_q[slot, row + n, 2 * lane + e] = x_io[e]
                for e in tile.vectorized(2):
                    x_io[e] = own.s_q[slot, row + n, 64 + 2 * lane + e]
                for e in tile.unroll(2):
                    x_word[e] = tile.cast(x_io[e], "float32") + x_bias[1, e]
                for e in tile.unroll(2):
                    x_io[e] = x_word[e]
                for e in tile.vectorized(2):
                    own.s_q[slot, row + n, 64 + 2 * lane + e] = x_io[e]
                for e in tile.vectorized(2):
                    x_io[e] = own.s_k[slot, row + n, 2 * lane + e]
                for e in tile.unroll(2):
                    x_word[e] = tile.cast(x_io[e], "float32") + x_bias[2, e]
                x_io[0] = x_word[0] * x_cos[0] - x_word[1] * x_sin[0]
                x_io[1] = x_word[1] * x_cos[0] + x_word[0] * x_sin[0]
                for e in tile.vectorized(2):
                    own.s_k[slot, row + n, 2 * lane + e] = x_io[e]
                for e in tile.vectorized(2):
                    x_io[e] = own.s_k[slot, row + n, 64 + 2 * lane + e]
                for e in tile.unroll(2):
                    x_word[e] = tile.cast(x_io[e], "float32") + x_bias[3, e]
                for e in tile.unroll(2):
                    x_io[e] = x_word[e]
                for e in tile.vectorized(2):
                    own.s_k[slot, row + n, 64 + 2 * lane + e] = x_io[e]
            x_before[0] += x_total[0]
            if (tile.reinterpret(x_sum[0], "uint32") & 0x7FFFFFFF) >= 0x7F800000:
                # a token whose angle is no number, which no integer is
                for n in tile.unroll(ROWS_OF, unroll_factor=1):
                    if i_t * BT + row + n < own.T:
                        x_x[0] = own.s_dt[slot, row + n] * x.rates[
                            own.i_n, x_head[0], i_t * BT + row + n, lane
                        ]
                        if (tile.reinterpret(x_x[0], "uint32") & 0x7FFFFFFF) >= 0x7F800000:
                            x_theta[0] = 0x7FC00000
                            x_x[0] = tile.reinterpret(x_theta[0], "float32")
                            for e in tile.unroll(2):
                                own.s_q[slot, row + n, 2 * lane + e] = x_x[0]
                                own.s_k[slot, row + n, 2 * lane + e] = x_x[0]
                            x.theta[own.i_n, i_t * BT + row + n, own.i_h, lane] = -2147483648
            # products read what was written here
            tile.fence_proxy_async()
            tile.sync_threads(2, GROUP)
            if i_thread == 0:
                tile.mbarrier_arrive(own.full[slot])
        if warp == 0:
            x_x[0] = tile.cast(x_before[0], "float32")
            if x_x[0] < 0.0:
                x_x[0] += 4294967296.0
            x.last_angle[own.i_n, own.i_h, lane] = x_x[0] * 1.4629180792671596e-09

    @tile.macro
    def load_chunk(x, own, i_g, i_t):
        """Into the slot of a chunk that all warps are through with."""
        slot = i_t % 2
        row = i_t * BT
        tile.tma_copy(
            x.Q[own.i_n, row : row + BT, i_g, 0:64],
            own.s_q[slot, :, 0:64],
            barrier=own.loaded[slot],
        )
        tile.tma_copy(
            x.Q[own.i_n, row : row + BT, i_g, 64:128],
            own.s_q[slot, :, 64:128],
            barrier=own.loaded[slot],
        )
        tile.tma_copy(
            x.K[own.i_n, row : row + BT, i_g, 0:64],
            own.s_k[slot, :, 0:64],
            barrier=own.loaded[slot],
        )
        tile.tma_copy(
            x.K[own.i_n, row : row + BT, i_g, 64:128],
            own.s_k[slot, :, 64:128],
            barrier=own.loaded[slot],
        )
        tile.tma_copy(
            x.DT[own.i_n, own.i_h, row : row + BT],
            own.s_dt[slot, :],
            barrier=own.loaded[slot],
        )
        tile.tma_copy(
            x.within[own.i_n, own.i_h, row : row + BT],
            own.s_numbers[slot, 0, :],
            barrier=own.values[slot],
        )
        tile.tma_copy(
            x.tail_decay[own.i_n, own.i_h, row : row + BT],
            own.s_numbers[slot, 1, :],
            barrier=own.values[slot],
        )
        tile.tma_copy(
            x.weight_s[own.i_n, own.i_h, row : row + BT],
            own.s_numbers[slot, 2, :],
            barrier=own.values[slot],
        )
        tile.tma_copy(
            x.own_dt[own.i_n, own.i_h, row : row + BT],
            own.s_numbers[slot, 3, :],
            barrier=own.values[slot],
        )
        tile.tma_copy(
            x.V[own.i_n, row : row + BT, own.i_h, :],
            own.s_V[slot, :, :],
            barrier=own.values[slot],
        )
        if tile.shuffle_elect(GROUP):
            tile.barrier_arrive(own.loaded[slot])
            tile.barrier_arrive(own.values[slot])

    @tile.macro
    def scan(x, own):
        """S^T [BV, N] stays in the group's registers."""
        b_h = tile.alloc_fragment([BV, N], IO)
        b_S = tile.alloc_fragment([BV, N], "float32")
        b_added = tile.alloc_fragment([BV, BT], "float32")
        b_outer = tile.alloc_fragment([BV, BT], IO)
        b_P = tile.alloc_fragment([BT, BT], "float32")
        b_Pd = tile.alloc_fragment([BT, BT], IO)
        b_o = tile.alloc_fragment([BT, BV], "float32")
        b_od = tile.alloc_fragment([BT, BV], IO)
        x_group = tile.alloc_local([1], "int32")  # of Q and K: a division once, not for each load
        x_group[0] = own.i_h // (own.H // own.G)
        x_gamma = tile.alloc_local([1], "float32")
        x_skip = tile.alloc_local([1], "float32")
        x_skip[0] = x.D[own.i_h]
        b_zd = tile.alloc_fragment([BT, BV], IO)
        b_z = tile.alloc_fragment([BT, BV], "float32")
        b_sigmoid = tile.alloc_fragment([BT, BV], "float32")

        load_chunk(x, own, x_group[0], 0)
        if own.n_chunks > 1:
            load_chunk(x, own, x_group[0], 1)
        for i, j in tile.Parallel(BV, N):
            b_S[i, j] = x.initial_ssm[own.i_n, own.i_h, i, j]
        for i_m in tile.serial(own.n_chunks):
            # known to be a warp's, so that descriptors are not made anew for each product
            i_t = tile.shfl_sync(i_m, 0)
            slot = i_t % 2
            row = i_t * BT
            # straight to registers, long before it is needed
            for i, j in tile.Parallel(BT, BV):
                b_zd[i, j] = tile.if_then_else(
                    row + i < own.T, x.Z[own.i_n, row + i, own.i_h, j], 0
                )
            tile.mbarrier_wait_parity(own.values[slot], i_t // 2 % 2)
            for i, j in tile.Parallel(BV, BT):
                b_outer[i, j] = own.s_V[slot, j, i]
            tile.copy(b_S, b_h)
            # what the last chunk stores was read by now, of s_h, too
            tile.tma_store_wait(0)
            tile.sync_threads(1, GROUP)
            tile.copy(b_h, own.s_h)
            tile.fence_proxy_async()
            tile.sync_threads(1, GROUP)
            tile.tma_copy(
                own.s_h[:, 0:64],
                x.h[own.i_n * own.n_chunks + i_t, own.i_h, :, 0:64],
            )
            tile.tma_copy(
                own.s_h[:, 64:128],
                x.h[own.i_n * own.n_chunks + i_t, own.i_h, :, 64:128],
            )
            # over all of the chunk, which may end early
            x_gamma[0] = tile.exp2(own.s_numbers[slot, 0, tile.min(own.T - row, BT) - 1])
            for i, j in tile.Parallel(BV, BT):
                b_added[i, j] = tile.cast(b_outer[i, j], "float32") * (
                    own.s_numbers[slot, 1, j] * own.s_numbers[slot, 2, j]
                )
            tile.copy(b_added, b_outer)
            for i, j in tile.Parallel(BV, N):
                b_S[i, j] *= x_gamma[0]
            tile.mbarrier_wait_parity(own.full[slot], i_t // 2 % 2)
            tile.wgmma_gemm(
                own.s_q[slot, :, :], own.s_k[slot, :, :], b_P,
                transpose_B=True, clear_accum=True, policy=ROWS,
            )
            tile.wgmma_gemm(
                own.s_q[slot, :, :], own.s_h, b_o,
                transpose_B=True, clear_accum=True, policy=ROWS,
            )
            tile.wgmma_gemm(b_outer, own.s_k[slot, :, :], b_S, policy=ROWS)
            tile.tma_copy(
                own.s_q[slot, :, 0:64],
                x.q[own.i_n, row : row + BT, own.i_h, 0:64],
            )
            tile.tma_copy(
                own.s_q[slot, :, 64:128],
                x.q[own.i_n, row : row + BT, own.i_h, 64:128],
            )
            tile.tma_copy(
                own.s_k[slot, :, 0:64],
                x.k[own.i_n, row : row + BT, own.i_h, 0:64],
            )
            tile.tma_copy(
                own.s_k[slot, :, 64:128],
                x.k[own.i_n, row : row + BT, own.i_h, 64:128],
            )
            tile.wait_wgmma(2)
            for i, j in tile.Parallel(BT, BT):
                b_P[i, j] *= tile.if_then_else(
                    i > j,
                    tile.exp2(own.s_numbers[slot, 0, i] - own.s_numbers[slot, 0, j])
                    * own.s_numbers[slot, 2, j],
                    tile.if_then_else(i == j, own.s_numbers[slot, 3, i], 0.0),
                )
            tile.copy(b_P, b_Pd)
            tile.wait_wgmma(1)
            for i, j in tile.Parallel(BT, BV):
                b_o[i, j] = b_o[i, j] * tile.exp2(own.s_numbers[slot, 0, i]) + (
                    tile.cast(own.s_V[slot, i, j], "float32") * x_skip[0]
                )
            tile.wgmma_gemm(b_Pd, own.s_V[slot, :, :], b_o, policy=ROWS)
            tile.wait_wgmma(1)
            # meanwhile
            tile.copy(b_zd, b_z)
            for i, j in tile.Parallel(BT, BV):
                b_sigmoid[i, j] = tile.rsqrt(1.0 + tile.exp2(b_z[i, j] * -1.4426950408889634))
                b_sigmoid[i, j] *= b_sigmoid[i, j]
                b_sigmoid[i, j] *= b_z[i, j]
            tile.wait_wgmma(0)
            # all warps' products have read the state, and what is kept of it was read
            tile.tma_store_wait(0)
            tile.sync_threads(1, GROUP)
            tile.copy(b_o, b_od)
            tile.copy(b_od, own.s_h[:, 0:64])
            for i, j in tile.Parallel(BT, BV):
                b_o[i, j] *= b_sigmoid[i, j]
            tile.copy(b_o, b_od)
            tile.copy(b_od, own.s_out)
            tile.tma_store_wait(0)
            tile.fence_proxy_async()
            tile.sync_threads(1, GROUP)
            tile.tma_copy(own.s_h[:, 0:64], x.ungated[own.i_n, row : row + BT, own.i_h, :])
            tile.tma_copy(own.s_out, x.out[own.i_n, row : row + BT, own.i_h, :])
            # no warp reads this slot any more
            if i_t + 2 < own.n_chunks:
                load_chunk(x, own, x_group[0], i_t + 2)
        tile.tma_store_wait(0)
        for i, j in tile.Parallel(BV, N):
            x.final_ssm[own.i_n, own.i_h, i, j] = b_S[i, j]

    @tile.prim_func
    def mamba3_turning_scan(
        Q: tile.Tensor([B, T, G, N], "bfloat16"),
        K: tile.Tensor([B, T, G, N], "bfloat16"),
        Q_bias: tile.Tensor([H, N], "float32"),
        K_bias: tile.Tensor([H, N], "float32"),
        DT: tile.Tensor([B, H, T], "float32"),
        rates: tile.Tensor([B, HA, T, S], "float32"),
        angle_state: tile.Tensor([B, H, S], "float32"),
        V: tile.Tensor([B, T, H, P], "bfloat16"),
        within: tile.Tensor([B, H, T], "float32"),
        tail_decay: tile.Tensor([B, H, T], "float32"),
        weight_s: tile.Tensor([B, H, T], "float32"),
        own_dt: tile.Tensor([B, H, T], "float32"),
        D: tile.Tensor([H], "float32"),
        Z: tile.Tensor([B, T, H, P], "bfloat16"),
        initial_ssm: tile.Tensor([B, H, P, N], "float32"),
        out: tile.Tensor([B, T, H, P], "bfloat16"),
        ungated: tile.Tensor([B, T, H, P], "bfloat16"),
        h: tile.Tensor([M, H, P, N], "bfloat16"),
        final_ssm: tile.Tensor([B, H, P, N], "float32"),
        q: tile.Tensor([B, T, H, N], "bfloat16"),
        k: tile.Tensor([B, T, H, N], "bfloat16"),
        theta: tile.Tensor([B, T, H, S], "int32"),
        turns: tile.Tensor([M, H, S], "int32"),
        last_angle: tile.Tensor([B, H, S], "float32"),
    ):
        with tile.Kernel(H, B, threads=(GROUP, 2)) as (i_h, i_n):
            # of two programs a multiprocessor has 128 registers a thread: whoever turns needs fewer
            tile.annotate_min_blocks_per_sm(2)
            s_q = tile.alloc_shared([2, BT, N], IO)
            s_k = tile.alloc_shared([2, BT, N], IO)
            s_V = tile.alloc_shared([2, BT, BV], IO)
            # within, tail_decay, weight_s, own_dt; and DT, which comes with rows
            s_numbers = tile.alloc_shared([2, 4, BT], "float32")
            s_dt = tile.alloc_shared([2, BT], "float32")
            s_turns = tile.alloc_shared([2, GROUP // 32, 32], "int32")
            # the state as products read it; then y in its first columns
            s_h = tile.alloc_shared([BV, N], IO)
            s_out = tile.alloc_shared([BT, BV], IO)
            loaded = tile.alloc_barrier([1] * 2)
            full = tile.alloc_barrier([1] * 2)
            values = tile.alloc_barrier([1] * 2)
            x = SimpleNamespace(
                Q=Q, K=K, Q_bias=Q_bias, K_bias=K_bias,
                DT=DT, rates=rates, angle_state=angle_state, V=V,
                within=within, tail_decay=tail_decay, weight_s=weight_s, own_dt=own_dt,
                D=D, Z=Z, initial_ssm=initial_ssm, out=out,
                ungated=ungated, h=h, final_ssm=final_ssm, q=q,
                k=k, theta=theta, turns=turns, last_angle=last_angle,
            )
            own = SimpleNamespace(
                i_n=i_n, i_h=i_h, T=T, H=H, G=G, HA=HA, n_chunks=tile.ceildiv(T, BT),
                s_q=s_q, s_k=s_k, s_V=s_V, s_numbers=s_numbers, s_dt=s_dt, s_turns=s_turns,
                s_h=s_h, s_out=s_out, loaded=loaded, full=full, values=values,
            )
            # one chain of branches: after several apart ptxas would wait for each product
            if tile.get_thread_binding(1) == 0:
                tile.inc_max_nreg(192)
                scan(x, own)
            else:
                tile.dec_max_nreg(64)
                turn(x, own)

    return mamba3_turning_scan


@cache
def compiled():
    """The program, compiled for the present GPU (10 s where no cache has it)."""
    import tilelang

    return tilelang.compile(program(), pass_configs=PASSES)


def launch(
    Q, K, Q_bias, K_bias, DT, rates, angle_state, V, within, tail_decay, weight_s, own_dt, D, Z,
    initial_ssm, out, ungated, h, final_ssm, q, k, theta, turns, last_angle, *, T
):
    """Launch one program per sequence and head on the current stream."""
    compiled()(Q, K, Q_bias, K_bias, DT, rates, angle_state, V, within, tail_decay, weight_s,
        own_dt, D, Z, initial_ssm, out, ungated, h, final_ssm, q, k, theta, turns,
        last_angle)
