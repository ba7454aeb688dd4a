"""Gradients of Mamba-3's queries, keys and values, chunk by chunk of a sequence, the last one first.

With dP_ji = <v_j, dy_i> and L_ji what the state keeps from token j to token i > j,

    P_ji = L_ji s_j <k_j, q_i>,   P_jj = lambda_j dt_j <k_j, q_j>,   dscores_ji = L_ji s_j dP_ji,   dscores_jj likewise
    dv_j = tail_j s_j dS^T k_j + sum of P_ji dy_i + D dy_j
    dk_j = tail_j s_j dS v_j + sum of dscores_ji q_i
    dq_i = head_i S dy_i + sum of dscores_ji k_j
    dS  <- gamma_C dS + sum of head_i dy_i q_i

head is the decay from the chunk's start to a token, tail from a token to the chunk's end, gamma_C over all of it. One
program per sequence and head; the state's gradient is held transposed, dS^T [P, N], in registers. q and k are as they
were turned, and so are their gradients: `mamba3_sums` turns these back where it adds heads up. What it needs beside them
are sums of a token's row, in fp32 and each in one order: of values for tokens that write, whose pairs are rows here,
and for tokens that read, of which each warp adds up what its rows have.

The compiler gives the loads to a warp group of its own, and every tile a barrier: two programs share a multiprocessor.

    q            [B, T, H, N]  bf16  queries
    k            [B, T, H, N]  bf16  keys
    V            [B, T, H, P]  bf16  values
    within       [B, H, T]     fp32  scratch: log2 of the decay from the chunk's start to each token
    tail_decay   [B, H, T]     fp32  scratch: decay from each token to the chunk's end
    weight_s     [B, H, T]     fp32  scratch: s
    own_dt       [B, H, T]     fp32  scratch: lambda dt
    D            [H]           fp32  factor of a token's own value, added to o
    dy           [B, T, H, P]  bf16  gradient of y
    h            [M, H, P, N]  bf16  state at the chunk's start, transposed
    dfinal_ssm   [n, H, P, N]  fp32  gradient of final_ssm
    dv           [B, T, H, P]  bf16  gradient of v
    dQ_head      [B, T, H, N]  bf16  scratch: gradient of each head's queries, biased and turned
    dK_head      [B, T, H, N]  bf16  scratch: gradient of each head's keys, biased and turned
    dtheta       [B, T, H, S]  fp32  scratch: gradient of each token's Theta
    sums         [B, H, 5, T]  fp32  scratch: rows of five sums of each token, by which its numbers have their gradients
    kept_part    [M, H, P]     fp32  scratch: <S, dS> of each tile and value
    dtheta_part  [M, H, 4, S]  fp32  scratch: sums of it after each tile, by quarters of the values

Problem: mamba3 K=128 V=64 bf16, skip

Config:  BT=64 language=tilelang num_stages=1 num_warps=4 pairs=1
Template digest 57c250cd6af079bb; made by
    gdn2gen generate --dtype bf16 --with=skip --stage mamba3_reverse_scan --config \
      BT=64,language=tilelang,num_stages=1,num_warps=4,pairs=1
"""

from functools import cache


N, P, S = 128, 64, 32
BT = 64
IO = "bfloat16"
# exp2 by the hardware, flushing what is below 2^-126 to zero
PASSES = {"tl.enable_fast_math": True}


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, H, M = (
        tile.dynamic(name) for name in ("B", "T", "H", "M")
    )
    # a warp keeps whole rows, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def mamba3_reverse_scan(
        q: tile.Tensor([B, T, H, N], "bfloat16"),
        k: tile.Tensor([B, T, H, N], "bfloat16"),
        V: tile.Tensor([B, T, H, P], "bfloat16"),
        within: tile.Tensor([B, H, T], "float32"),
        tail_decay: tile.Tensor([B, H, T], "float32"),
        weight_s: tile.Tensor([B, H, T], "float32"),
        own_dt: tile.Tensor([B, H, T], "float32"),
        D: tile.Tensor([H], "float32"),
        dy: tile.Tensor([B, T, H, P], "bfloat16"),
        h: tile.Tensor([M, H, P, N], "bfloat16"),
        dfinal_ssm: tile.Tensor([B, H, P, N], "float32"),
        dv: tile.Tensor([B, T, H, P], "bfloat16"),
        dQ_head: tile.Tensor([B, T, H, N], "bfloat16"),
        dK_head: tile.Tensor([B, T, H, N], "bfloat16"),
        dtheta: tile.Tensor([B, T, H, S], "float32"),
        sums: tile.Tensor([B, H, 5, T], "float32"),
        kept_part: tile.Tensor([M, H, P], "float32"),
        dtheta_part: tile.Tensor([M, H, 4, S], "float32"),
    ):
        with tile.Kernel(H, B, threads=128) as (i_h, i_n):
            # 2 programs to a multiprocessor: 128 registers a thread, of which the loads need few
            tile.annotate_min_blocks_per_sm(2)
            tile.annotate_producer_reg_dealloc(24)
            tile.annotate_consumer_reg_alloc(232)

            n_chunks = tile.ceildiv(T, BT)

            s_V = tile.alloc_shared([BT, P], IO)
            s_dy = tile.alloc_shared([BT, P], IO)
            s_k = tile.alloc_shared([BT, N], IO)
            s_q = tile.alloc_shared([BT, N], IO)
            s_h = tile.alloc_shared([P, N], IO)
            s_within = tile.alloc_shared([BT], "float32")
            s_tail_decay = tile.alloc_shared([BT], "float32")
            s_weight_s = tile.alloc_shared([BT], "float32")
            s_own_dt = tile.alloc_shared([BT], "float32")
            # dS as products read it; then dk on its way
            s_dS = tile.alloc_shared([P, N], IO)
            # dv, and then dq, on their way
            s_dq0 = tile.alloc_shared([BT, 64], IO)
            s_dq1 = tile.alloc_shared([BT, 64], IO)
            # rows are tokens that write
            s_dscores = tile.alloc_shared([BT, BT], IO)
            # of P dP what the tokens of a warp have of each token that reads
            s_read = tile.alloc_shared([4, BT], "float32")
            s_sums = tile.alloc_shared([5, BT], "float32")
            b_dS = tile.alloc_fragment([P, N], "float32")
            b_rounded = tile.alloc_fragment([P, N], IO)
            b_kept = tile.alloc_fragment([P, P], "float32")
            b_scores = tile.alloc_fragment([BT, BT], "float32")
            b_dP = tile.alloc_fragment([BT, BT], "float32")
            b_P = tile.alloc_fragment([BT, BT], IO)
            b_dscores = tile.alloc_fragment([BT, BT], IO)
            b_read = tile.alloc_fragment([4, BT // 4, BT], "float32")
            b_reads = tile.alloc_fragment([4, BT], "float32")
            b_dot0 = tile.alloc_fragment([BT], "float32")
            b_sum0 = tile.alloc_fragment([BT], "float32")
            b_met = tile.alloc_fragment([BT, P], "float32")
            b_dv = tile.alloc_fragment([BT, P], "float32")
            b_dvd = tile.alloc_fragment([BT, P], IO)
            b_dk = tile.alloc_fragment([BT, 64], "float32")
            b_dq = tile.alloc_fragment([BT, 64], "float32")
            b_dd = tile.alloc_fragment([BT, 64], IO)
            b_turn0 = tile.alloc_fragment([BT, 32], "float32")
            b_across = tile.alloc_fragment([4, P // 4, 32], "float32")
            b_sums = tile.alloc_fragment([4, 32], "float32")
            x_L = tile.alloc_local([2], "float32")
            x_gamma = tile.alloc_local([1], "float32")
            x_skip = tile.alloc_local([1], "float32")

            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")
            x_skip[0] = D[i_h]

            for i, j in tile.Parallel(P, N):
                b_dS[i, j] = dfinal_ssm[i_n, i_h, i, j]
            for i_back in tile.Pipelined(n_chunks, num_stages=1):
                i_t = n_chunks - 1 - i_back
                i_row = i_t * BT
                i_tile = i_n * n_chunks + i_t
                # in the order in which tiles are given back: each waits for those before it
                tile.copy(dy[i_n, i_row : i_row + BT, i_h, :], s_dy)
                tile.copy(V[i_n, i_row : i_row + BT, i_h, :], s_V)
                tile.copy(within[i_n, i_h, i_row : i_row + BT], s_within)
                tile.copy(tail_decay[i_n, i_h, i_row : i_row + BT], s_tail_decay)
                tile.copy(weight_s[i_n, i_h, i_row : i_row + BT], s_weight_s)
                tile.copy(own_dt[i_n, i_h, i_row : i_row + BT], s_own_dt)
                tile.copy(h[i_tile, i_h, :, :], s_h)
                tile.copy(q[i_n, i_row : i_row + BT, i_h, :], s_q)
                tile.copy(k[i_n, i_row : i_row + BT, i_h, :], s_k)

                tile.copy(b_dS, b_rounded)
                # no tile of the last chunk is stored from any more
                tile.tma_store_wait(0)
                tile.copy(b_rounded, s_dS)
                # whatever waits for loads comes before products, which would be waited for there one by one
                hold[0] = tile.cast(s_V[0, 0], "float32")
                hold[0] = tile.cast(s_dy[0, 0], "float32")
                hold[0] = tile.cast(s_k[0, 0], "float32")
                hold[0] = tile.cast(s_q[0, 0], "float32")
                hold[0] = tile.cast(s_h[0, 0], "float32")

                hold[0] = s_within[0]
                hold[0] = s_tail_decay[0]
                hold[0] = s_weight_s[0]
                hold[0] = s_own_dt[0]
                # <S, dS> of each value, as the diagonal of a product
                tile.wgmma_gemm(s_h, s_dS, b_kept, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(s_k, s_q, b_scores, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(s_V, s_dy, b_dP, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wait_wgmma(2)

                for i, j in tile.Parallel(P, P):
                    b_kept[i, j] = tile.if_then_else(i == j, b_kept[i, j], 0.0)
                tile.reduce_sum(b_kept, b_dot0, dim=1)
                for i in tile.Parallel(P):
                    kept_part[i_tile, i_h, i] = b_dot0[i]
                tile.wait_wgmma(0)

                for i, j in tile.Parallel(BT, BT):
                    x_L[0] = tile.if_then_else(j > i and i_row + j < T, tile.exp2(s_within[j] - s_within[i]), 0.0)
                    x_L[1] = tile.if_then_else(i == j, s_own_dt[i], x_L[0] * s_weight_s[i])
                    b_P[i, j] = b_scores[i, j] * x_L[1]
                    b_dscores[i, j] = b_dP[i, j] * x_L[1]
                    b_dP[i, j] *= b_scores[i, j]
                    b_scores[i, j] = tile.if_then_else(i == j, b_dP[i, j], 0.0)
                    b_dP[i, j] *= x_L[0]
                tile.copy(b_dscores, s_dscores)
                tile.wgmma_gemm(s_k, s_dS, b_dv, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.reduce_sum(b_scores, b_dot0, dim=1)
                tile.reduce_sum(b_dP, b_sum0, dim=1)
                for w, i, j in tile.Parallel(4, BT // 4, BT):
                    b_read[w, i, j] = b_dP[w * (BT // 4) + i, j] * s_weight_s[w * (BT // 4) + i]
                tile.reduce_sum(b_read, b_reads, dim=1)
                for w, j in tile.Parallel(4, BT):
                    s_read[w, j] = b_reads[w, j]
                for i in tile.Parallel(BT):
                    s_sums[0, i] = b_sum0[i]
                    s_sums[1, i] = b_sum0[i] + b_dot0[i]

                tile.wait_wgmma(0)

                for i, j in tile.Parallel(BT, P):
                    b_met[i, j] = b_dv[i, j] * tile.cast(s_V[i, j], "float32")
                tile.reduce_sum(b_met, b_sum0, dim=1)
                for i in tile.Parallel(BT):
                    s_sums[4, i] = b_sum0[i]
                    s_sums[2, i] = s_read[0, i] + s_read[1, i] + (s_read[2, i] + s_read[3, i])

                for i, j in tile.Parallel(BT, P):
                    b_dv[i, j] *= s_tail_decay[i] * s_weight_s[i]
                tile.wgmma_gemm(b_P, s_dy, b_dv, policy=ROWS)
                # meanwhile
                for i, j in tile.Parallel(BT, P):
                    b_dvd[i, j] = tile.cast(s_dy[i, j], "float32") * tile.exp2(s_within[i])
                tile.copy(b_dvd, s_dq1)
                tile.wait_wgmma(0)

                for i, j in tile.Parallel(BT, P):
                    b_dv[i, j] += tile.cast(s_dy[i, j], "float32") * x_skip[0]
                tile.copy(b_dv, b_dvd)
                tile.copy(b_dvd, s_dq0)
                tile.tma_copy(s_dq0, dv[i_n, i_row : i_row + BT, i_h, :])
                # over all of the chunk, which may end early
                x_gamma[0] = tile.exp2(s_within[tile.min(T - i_row, BT) - 1])
                for i, j in tile.Parallel(P, N):
                    b_dS[i, j] *= x_gamma[0]
                tile.wgmma_gemm(s_dq1, s_q, b_dS, transpose_A=True, policy=ROWS)
                tile.wgmma_gemm(s_q, s_h, b_dv, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wait_wgmma(1)

                if i_t > 0:
                    for w, i, j in tile.Parallel(4, P // 4, 32):
                        b_across[w, i, j] = b_dS[w * (P // 4) + i, 2 * j] * tile.cast(s_h[w * (P // 4) + i, 2 * j + 1], "float32")
                    for w, i, j in tile.Parallel(4, P // 4, 32):
                        b_across[w, i, j] -= b_dS[w * (P // 4) + i, 2 * j + 1] * tile.cast(s_h[w * (P // 4) + i, 2 * j], "float32")
                    tile.reduce_sum(b_across, b_sums, dim=1)
                    for w, j in tile.Parallel(4, 32):
                        dtheta_part[i_tile - 1, i_h, w, j] = b_sums[w, j]

                tile.wait_wgmma(0)

                for i, j in tile.Parallel(BT, P):
                    b_met[i, j] = b_dv[i, j] * tile.cast(s_dy[i, j], "float32")
                tile.reduce_sum(b_met, b_sum0, dim=1)
                for i in tile.Parallel(BT):
                    s_sums[3, i] = b_sum0[i]

                hold[0] = tile.cast(s_dy[0, 0], "float32")

                tile.wgmma_gemm(s_V, s_dS[:, 0:64], b_dk, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(s_dq1, s_h[:, 0:64], b_dq, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(s_dscores, s_k[:, 0:64], b_dq, transpose_A=True, policy=ROWS)
                tile.wait_wgmma(2)

                for i, j in tile.Parallel(BT, 64):
                    b_dk[i, j] *= s_tail_decay[i] * s_weight_s[i]
                tile.wgmma_gemm(s_dscores, s_q[:, 0:64], b_dk, policy=ROWS)
                tile.wait_wgmma(1)

                for i, j in tile.Parallel(BT, 32):
                    b_turn0[i, j] = b_dq[i, 2 * j + 1] * tile.cast(s_q[i, 2 * j], "float32")
                for i, j in tile.Parallel(BT, 32):
                    b_turn0[i, j] -= b_dq[i, 2 * j] * tile.cast(s_q[i, 1 + 2 * j], "float32")

                tile.copy(b_dq, b_dd)
                # dv is out of it
                tile.tma_store_wait(0)
                tile.copy(b_dd, s_dq0)
                tile.wait_wgmma(0)

                for i, j in tile.Parallel(BT, 32):
                    b_turn0[i, j] += b_dk[i, 2 * j + 1] * tile.cast(s_k[i, 2 * j], "float32")
                for i, j in tile.Parallel(BT, 32):
                    b_turn0[i, j] -= b_dk[i, 2 * j] * tile.cast(s_k[i, 1 + 2 * j], "float32")

                for i, j in tile.Parallel(BT, 32):
                    dtheta[i_n, i_row + i, i_h, j] = b_turn0[i, j]
                tile.copy(b_dk, b_dd)
                tile.copy(b_dd, s_dS[:, 0:64])
                tile.wgmma_gemm(s_V, s_dS[:, 64:128], b_dk, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(s_dq1, s_h[:, 64:128], b_dq, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(s_dscores, s_k[:, 64:128], b_dq, transpose_A=True, policy=ROWS)
                tile.wait_wgmma(2)
                hold[0] = tile.cast(s_V[0, 0], "float32")

                for i, j in tile.Parallel(BT, 64):
                    b_dk[i, j] *= s_tail_decay[i] * s_weight_s[i]
                hold[0] = s_within[0]
                hold[0] = s_tail_decay[0]
                hold[0] = s_weight_s[0]
                hold[0] = s_own_dt[0]
                tile.wgmma_gemm(s_dscores, s_q[:, 64:128], b_dk, policy=ROWS)
                tile.wait_wgmma(1)
                hold[0] = tile.cast(s_h[0, 0], "float32")

                tile.copy(b_dq, b_dd)
                tile.copy(b_dd, s_dq1)
                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_q[0, 0], "float32")

                hold[0] = tile.cast(s_k[0, 0], "float32")

                tile.copy(b_dk, b_dd)
                tile.copy(b_dd, s_dS[:, 64:128])
                tile.tma_copy(s_dS, dK_head[i_n, i_row : i_row + BT, i_h, :])
                tile.tma_copy(s_dq0, dQ_head[i_n, i_row : i_row + BT, i_h, 0:64])
                tile.tma_copy(s_dq1, dQ_head[i_n, i_row : i_row + BT, i_h, 64:128])
                tile.tma_copy(s_sums, sums[i_n, i_h, :, i_row : i_row + BT])
            tile.tma_store_wait(0)

    return mamba3_reverse_scan


# a mark on programs for `one_warp_loads`, and for whoever keeps what was compiled
LOADS = {"tl.device_compile_flags": ["-DONE_WARP_LOADS"]}


def one_warp_loads():
    """Of the four warps to which TileLang gives the loads, let only the one that loads go on.

    One thread loads, and waits until a tile was read before it fills it again. All four warps wait
    with it, and a wait tells the phases of its barrier by one bit: a warp that is held up while two
    of them pass waits for the next, and at the end for one that never comes.
    """
    import re

    from tilelang.contrib import nvcc

    compile_cuda = nvcc.compile_cuda
    if compile_cuda.__name__ == "compile_loads":
        return
    begin = re.compile(
        r"^  if \(\(\(int\)threadIdx\.x\) < 128\) \{\n"
        r"(    tl::warpgroup_reg_dealloc<\d+>\(\);\n)?",
        re.MULTILINE,
    )
    end = "    if (((int)threadIdx.x) >= 32) return;\n"

    def compile_loads(source, *arguments, options=None, **named):
        if "-DONE_WARP_LOADS" in (options or ()):
            # whoever loads waits for the phase before the one that others wait for
            loads = re.search(r"\.wait\(.*\^ 1\)", source) is not None
            source, found = begin.subn(lambda x: x[0] + end, source)
            if found != loads or found != source.count("threadIdx.x) < 128) {"):
                raise RuntimeError(
                    "TileLang's text has loads in a place that is not known: install tilelang 0.1.15"
                )
        return compile_cuda(source, *arguments, options=options, **named)

    nvcc.compile_cuda = compile_loads


@cache
def compiled():
    """The program, compiled for the present GPU (10 s where no cache has it)."""
    import tilelang

    one_warp_loads()
    return tilelang.compile(program(), pass_configs=PASSES | LOADS)


def launch(
    q, k, V, within, tail_decay, weight_s, own_dt, D, dy, h, dfinal_ssm, dv, dQ_head, dK_head,
    dtheta, sums, kept_part, dtheta_part, *, T
):
    """Launch one program per sequence and head on the current stream."""
    compiled()(q, k, V, within, tail_decay, weight_s, own_dt, D, dy, h, dfinal_ssm, dv,
        dQ_head, dK_head, dtheta, sums, kept_part, dtheta_part)
