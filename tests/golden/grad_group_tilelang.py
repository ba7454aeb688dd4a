"""The key side of the gradients where heads share q and k of their group: dq, dk, ddt and drate.

A program goes through some heads of a group one after the other. Through the state, where v and dY are a head's,

    dq_i += head_i (dY S^T)_i          dk_j += tail_j step_j (v dS^T)_j
    taken_i = head_i <dY_i, (q S)_i>   written_j = tail_j <v_j, (k dS)_j>     kept = gamma_C <S, dS>

and through the scores, whose gradient dP = dY v^T is summed over the heads first:

    dscores_ij = sum of decay_ij step_j dP_ij          dq += dscores k          dk += dscores^T q
    step_pairs_j = sum over i of decay_ij dP_ij <q_i, k_j>
    decay_pairs_t = sum over j < t <= i of step_j decay_ij dP_ij <q_i, k_j>

decay_ij is what the state keeps from token j to token i, head from the chunk's start to a token, tail from a
token to the chunk's end, and gamma_C over all of it. dq and dk are summed over heads in the accumulators of
their products, so that what a token takes and writes is read off products with q and k instead, over values.
fold_heads_kernel, in Triton, adds up slices of channels and takes decays to tokens. No term of it is taken from
another, so that it is exact however strong the decay is.

grad_group: one program per chunk, HEADS heads of a group and slice of K. Rows are tokens, of pairs those that
write; of <S, dS> they are values. The compiler gives the loads to a warp group of its own, and every tile a
barrier of its own.

    q            [B, T, H, K]      bf16  queries
    k            [B, T, H, K]      bf16  keys
    rate         [HV]              fp32  decay of a step of 1
    dt           [B, T, HV]        bf16  step: what a token decays by and writes
    dt_bias      [HV]              fp32  added to dt before its activation
    log_decay    [NT, HV, BT]      fp32  decay of each token, log2
    step         [NT, HV, BT]      fp32  step of each token, after its activation
    h            [NT, HV, V, K]    bf16  state at the chunk's start, transposed
    v            [B, T, HV, V]     bf16  values
    dh           [NT, HV, V, K]    bf16  gradient of the state at the chunk's end, transposed
    dy           [B, T, HV, V]     bf16  gradient of o before its gate
    dq           [B, T, HP, K]     bf16  gradient of q: sums over heads of a group
    dk           [B, T, HP, K]     bf16  gradient of k: sums over heads of a group
    decay_pairs  [NT, HV, BT]      fp32  scratch: gradient of the log decay, of pairs
    step_pairs   [NT, HV, BT]      fp32  scratch: the same of what a token writes, by its step
    taken        [NT, HV, NK, BT]  fp32  scratch: <q, dY S^T>: sums over a slice of channels
    written      [NT, HV, NK, BT]  fp32  scratch: <k, v dS^T>: the same
    kept         [NT, HV, NK]      fp32  scratch: <S, dS>: the same
    ddt          [B, T, HV]        bf16  gradient of dt
    drate        [NT, HV]          fp32  gradient of rate: sums over the chunk's tokens
    ddt_bias     [NT, HV]          fp32  gradient of dt_bias: sums over the chunk's tokens

Problem: mamba2 K=128 V=64 bf16, g bf16, softplus gate
Config:  BK=64 BT=64 heads=16 language=tilelang maxnreg=128 num_stages=1 num_warps=4 pairs=once
Template digest dd6d587e4f14164b; made by
    gdn2gen generate --op mamba2 --head-dim 128,64 --dtype bf16 --gate-dtype bf16 --gate \
      softplus --with=dt_bias,rate,D,z --stage grad_group --config \
      BK=64,BT=64,heads=16,language=tilelang,maxnreg=128,num_stages=1,num_warps=4,pairs=once
"""

from functools import cache

import triton
import triton.language as tl


K, V = 128, 64
BT, BK, HEADS = 64, 64, 16
IO = "bfloat16"
BH = 16  # heads of a program of fold_heads_kernel
# exp2 by the hardware, flushing what is below 2^-126 to zero
PASSES = {"tl.enable_fast_math": True}


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile
    from tilelang.layout import make_swizzled_layout

    B, T, H, HV, NT, HP = (
        tile.dynamic(name) for name in ("B", "T", "H", "HV", "NT", "HP")
    )
    # a warp keeps whole rows, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def grad_group(
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        log_decay: tile.Tensor([NT, HV, BT], "float32"),
        step: tile.Tensor([NT, HV, BT], "float32"),
        h: tile.Tensor([NT, HV, V, K], "bfloat16"),
        v: tile.Tensor([B, T, HV, V], "bfloat16"),
        dh: tile.Tensor([NT, HV, V, K], "bfloat16"),
        dy: tile.Tensor([B, T, HV, V], "bfloat16"),
        dq: tile.Tensor([B, T, HP, K], "bfloat16"),
        dk: tile.Tensor([B, T, HP, K], "bfloat16"),
        decay_pairs: tile.Tensor([NT, HV, BT], "float32"),
        step_pairs: tile.Tensor([NT, HV, BT], "float32"),
        taken: tile.Tensor([NT, HV, K // BK, BT], "float32"),
        written: tile.Tensor([NT, HV, K // BK, BT], "float32"),
        kept: tile.Tensor([NT, HV, K // BK], "float32"),
    ):
        # HP programs of a chunk, as many to each group, times the slices of channels
        with tile.Kernel(
            HP * (K // BK), tile.ceildiv(T, BT), B, threads=128
        ) as (i_x, i_n, i_b):
            # 2 programs to a multiprocessor: 128 registers a thread, of which the loads need few
            tile.annotate_min_blocks_per_sm(2)
            tile.annotate_producer_reg_dealloc(24)
            tile.annotate_consumer_reg_alloc(232)

            i_c = i_b * tile.ceildiv(T, BT) + i_n
            i_row = i_n * BT
            i_k = i_x % (K // BK)
            i_p = i_x // (K // BK)
            o_k = i_k * BK
            # held in variables: the compiler would divide again for every load
            i_hq = tile.alloc_var("int32")
            i_first = tile.alloc_var("int32")
            n_heads = tile.alloc_var("int32")
            i_hq = i_p // (HP // H)
            i_first = i_p % (HP // H) * HEADS
            n_heads = tile.min(HV // H - i_first, HEADS)
            i_first = i_first + i_hq * (HV // H)
            i_thread = tile.get_thread_binding()

            s_q = tile.alloc_shared([BT, BK], IO)
            s_k = tile.alloc_shared([BT, BK], IO)
            s_h = tile.alloc_shared([V, BK], IO)
            s_dh = tile.alloc_shared([V, BK], IO)
            s_v = tile.alloc_shared([BT, V], IO)
            s_dy = tile.alloc_shared([BT, V], IO)
            s_log_decay = tile.alloc_shared([BT], "float32")
            s_step = tile.alloc_shared([BT], "float32")
            s_G = tile.alloc_shared([BT], "float32")
            s_head = tile.alloc_shared([BT], "float32")
            s_tail = tile.alloc_shared([BT], "float32")
            s_steps = tile.alloc_shared([BT], "float32")
            x_sum = tile.alloc_local([4], "float32")
            # rows so long that what a warp reads and writes of them lies in banks of its own
            s_scores = tile.alloc_shared([BT, BT + 8], "float32")
            s_pairs = tile.alloc_shared([BT, BT], "bfloat16")
            s_pairs_rest = tile.alloc_shared([BT, BT], "bfloat16")
            s_later = tile.alloc_shared([BT, BT], "bfloat16")
            s_kept = tile.alloc_shared([V], "float32")
            s_dscores = tile.alloc_shared([BT, BT], IO)
            s_dq = tile.alloc_shared([BT, BK], IO)
            s_dk = tile.alloc_shared([BT, BK], IO)

            b_dq = tile.alloc_fragment([BT, BK], "float32")
            b_dk = tile.alloc_fragment([BT, BK], "float32")
            b_out = tile.alloc_fragment([BT, BK], IO)
            b_scores = tile.alloc_fragment([BT, BT], "float32")
            b_dscores = tile.alloc_fragment([BT, BT], "float32")
            b_rounded = tile.alloc_fragment([BT, BT], "bfloat16")
            # of a head: products of pairs, then of values
            b_dP = tile.alloc_fragment([BT, BT], "float32")
            b_SdS = tile.alloc_fragment([V, V], "float32")
            b_qS = tile.alloc_fragment([BT, V], "float32")
            b_kdS = tile.alloc_fragment([BT, V], "float32")
            b_read = tile.alloc_fragment([BT, V], IO)
            b_written = tile.alloc_fragment([BT, V], IO)
            b_sum = tile.alloc_fragment([BT], "float32")
            b_taken = tile.alloc_fragment([BT], "float32")
            b_sent = tile.alloc_fragment([BT], "float32")
            b_decay = tile.alloc_fragment([BT], "float32")
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")

            # scores of the group, of all channels: the last slice is the program's own, and stays
            tile.clear(b_scores)
            for n in tile.serial(K // BK):
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, (i_k + 1 + n) % (K // BK) * BK : (i_k + 1 + n) % (K // BK) * BK + BK], s_k)
                tile.copy(q[i_b, i_row : i_row + BT, i_hq, (i_k + 1 + n) % (K // BK) * BK : (i_k + 1 + n) % (K // BK) * BK + BK], s_q)
                tile.gemm(s_k, s_q, b_scores, transpose_B=True, policy=ROWS)
            for i, j in tile.Parallel(BT, BT):
                s_scores[i, j] = b_scores[i, j]
            for i, j in tile.Parallel(BT, BT):
                s_later[i, j] = tile.if_then_else(j >= i, tile.cast(1, "bfloat16"), tile.cast(0, "bfloat16"))
            tile.clear(b_dscores)
            tile.clear(b_dq)
            tile.clear(b_dk)

            for n in tile.Pipelined(n_heads, num_stages=1):
                i_h = i_first + n
                tile.copy(log_decay[i_c, i_h, :], s_log_decay)
                tile.copy(step[i_c, i_h, :], s_step)
                tile.copy(v[i_b, i_row : i_row + BT, i_h, :], s_v)
                tile.copy(dy[i_b, i_row : i_row + BT, i_h, :], s_dy)
                tile.copy(h[i_c, i_h, :, o_k : o_k + BK], s_h)
                tile.copy(dh[i_c, i_h, :, o_k : o_k + BK], s_dh)

                if i_thread < 32:
                    x_sum[0] = s_log_decay[2 * i_thread]
                    x_sum[1] = x_sum[0] + s_log_decay[2 * i_thread + 1]
                    x_sum[2] = tile.shfl_up(x_sum[1], 1)
                    x_sum[1] += tile.if_then_else(i_thread >= 1, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_up(x_sum[1], 2)
                    x_sum[1] += tile.if_then_else(i_thread >= 2, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_up(x_sum[1], 4)
                    x_sum[1] += tile.if_then_else(i_thread >= 4, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_up(x_sum[1], 8)
                    x_sum[1] += tile.if_then_else(i_thread >= 8, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_up(x_sum[1], 16)
                    x_sum[1] += tile.if_then_else(i_thread >= 16, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_up(x_sum[1], 1)
                    x_sum[0] += tile.if_then_else(i_thread >= 1, x_sum[2], 0.0)
                    for n in tile.unroll(2):
                        s_G[2 * i_thread + n] = x_sum[n]
                        s_head[2 * i_thread + n] = tile.exp2(x_sum[n])
                elif i_thread < 64:
                    x_sum[0] = s_log_decay[2 * i_thread - 63]
                    x_sum[1] = x_sum[0] + s_log_decay[2 * i_thread - 64]
                    x_sum[2] = tile.shfl_down(x_sum[1], 1)
                    x_sum[1] += tile.if_then_else(i_thread < 63, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_down(x_sum[1], 2)
                    x_sum[1] += tile.if_then_else(i_thread < 62, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_down(x_sum[1], 4)
                    x_sum[1] += tile.if_then_else(i_thread < 60, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_down(x_sum[1], 8)
                    x_sum[1] += tile.if_then_else(i_thread < 56, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_down(x_sum[1], 16)
                    x_sum[1] += tile.if_then_else(i_thread < 48, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_down(x_sum[1], 1)
                    x_sum[2] = tile.if_then_else(i_thread < 63, x_sum[2], 0.0)
                    x_sum[0] += x_sum[2]
                    x_sum[3] = s_step[2 * i_thread - 63]
                    s_tail[2 * i_thread - 63] = tile.exp2(x_sum[2])
                    s_steps[2 * i_thread - 63] = x_sum[3]
                    x_sum[3] = s_step[2 * i_thread - 64]
                    s_tail[2 * i_thread - 64] = tile.exp2(x_sum[0])
                    s_steps[2 * i_thread - 64] = x_sum[3]
                # pairs. What waits for loads, or goes different ways, lies between products: they would be waited for there
                tile.wgmma_gemm(s_v, s_dy, b_dP, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wait_wgmma(0)

                hold[0] = s_log_decay[0]
                hold[0] = s_step[0]
                for i, j in tile.Parallel(BT, BT):
                    b_dP[i, j] = tile.if_then_else(j >= i, b_dP[i, j] * tile.exp2(s_G[j] - s_G[i]), 0.0)
                for i, j in tile.Parallel(BT, BT):
                    b_dscores[i, j] += b_dP[i, j] * s_steps[i]
                    b_dP[i, j] *= s_scores[i, j]
                tile.reduce_sum(b_dP, b_sum, dim=1)
                for i, j in tile.Parallel(BT, BT):
                    b_dP[i, j] *= s_steps[i]
                # in two parts, which have 16 bits of it
                tile.copy(b_dP, b_rounded)
                tile.copy(b_rounded, s_pairs)
                for i, j in tile.Parallel(BT, BT):
                    b_dP[i, j] -= tile.cast(b_rounded[i, j], "float32")
                tile.copy(b_dP, b_rounded)
                tile.copy(b_rounded, s_pairs_rest)
                hold[0] = tile.cast(s_h[0, 0], "float32")
                hold[0] = tile.cast(s_dh[0, 0], "float32")
                # [t, j]: sums over i >= t
                tile.wgmma_gemm(s_later, s_pairs, b_dP, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(s_later, s_pairs_rest, b_dP, transpose_B=True, policy=ROWS)
                tile.wgmma_gemm(s_q, s_h, b_qS, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(s_k, s_dh, b_kdS, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wait_wgmma(2)

                for i, j in tile.Parallel(BT, BT):
                    b_dP[i, j] = tile.if_then_else(j < i, b_dP[i, j], 0.0)
                tile.reduce_sum(b_dP, b_decay, dim=1)
                tile.wait_wgmma(1)

                for i, j in tile.Parallel(BT, V):
                    b_qS[i, j] *= tile.cast(s_dy[i, j], "float32")
                tile.reduce_sum(b_qS, b_taken, dim=1)
                tile.wait_wgmma(0)

                for i, j in tile.Parallel(BT, V):
                    b_kdS[i, j] *= tile.cast(s_v[i, j], "float32")
                tile.reduce_sum(b_kdS, b_sent, dim=1)
                # b_qS and b_kdS now hold what the state is read by, and what is written to it
                for i, j in tile.Parallel(BT, V):
                    b_qS[i, j] = tile.cast(s_dy[i, j], "float32") * s_head[i]
                tile.copy(b_qS, b_read)
                for i, j in tile.Parallel(BT, V):
                    b_kdS[i, j] = tile.cast(s_v[i, j], "float32") * (s_tail[i] * s_steps[i])
                tile.copy(b_kdS, b_written)
                # <S, dS> as the diagonal of a product, over values
                tile.wgmma_gemm(s_dh, s_h, b_SdS, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(b_read, s_h, b_dq, policy=ROWS)
                tile.wgmma_gemm(b_written, s_dh, b_dk, policy=ROWS)
                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_h[0, 0], "float32")
                hold[0] = tile.cast(s_dh[0, 0], "float32")

                for i, j in tile.Parallel(V, V):
                    if i == j:
                        s_kept[i] = b_SdS[i, j]
                tile.sync_threads()
                if i_thread < 32:
                    x_sum[0] = s_kept[i_thread] + s_kept[i_thread + 32]
                    x_sum[0] += tile.shfl_xor(x_sum[0], 16)
                    x_sum[0] += tile.shfl_xor(x_sum[0], 8)
                    x_sum[0] += tile.shfl_xor(x_sum[0], 4)
                    x_sum[0] += tile.shfl_xor(x_sum[0], 2)
                    x_sum[0] += tile.shfl_xor(x_sum[0], 1)
                    if i_thread == 0:
                        kept[i_c, i_h, i_k] = x_sum[0] * s_head[BT - 1]
                for i in tile.Parallel(BT):
                    taken[i_c, i_h, i_k, i] = b_taken[i] * s_head[i]
                    written[i_c, i_h, i_k, i] = b_sent[i] * s_tail[i]
                if i_k == 0:
                    for i in tile.Parallel(BT):
                        step_pairs[i_c, i_h, i] = b_sum[i]
                        decay_pairs[i_c, i_h, i] = b_decay[i]
                hold[0] = tile.cast(s_v[0, 0], "float32")
                hold[0] = tile.cast(s_dy[0, 0], "float32")

            # through the scores of all heads
            tile.copy(b_dscores, b_rounded)
            tile.copy(b_rounded, s_dscores)
            tile.gemm(s_dscores, s_k, b_dq, transpose_A=True, policy=ROWS)
            tile.gemm(s_dscores, s_q, b_dk, policy=ROWS)
            tile.copy(b_dq, b_out)
            tile.copy(b_out, s_dq)
            tile.copy(s_dq, dq[i_b, i_row : i_row + BT, i_p, o_k : o_k + BK])
            tile.copy(b_dk, b_out)
            tile.copy(b_out, s_dk)
            tile.copy(s_dk, dk[i_b, i_row : i_row + BT, i_p, o_k : o_k + BK])

    return grad_group


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


@triton.jit(do_not_specialize=["T", "HV", "dt_row"])
def fold_heads_kernel(
    rate,
    dt,
    dt_bias,
    step,
    decay_pairs,
    step_pairs,
    taken,
    written,
    kept,
    ddt,
    drate,
    ddt_bias,
    T,
    HV,
    dt_row,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
):
    """ddt and what its rate has of it, of a chunk and BH heads: sums over the slices of channels."""
    i_c = tl.program_id(0)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_t = tl.arange(0, BT)
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)

    m_h = o_h < HV
    m_th = (o_t < n_rows)[:, None] & m_h[None, :]
    # what the token before it writes: of the first one, nothing
    m_before = (o_t > 0)[:, None] & m_th
    i_tile = i_c.to(tl.int64) * HV + o_h
    p_token = i_tile[None, :] * BT + o_t[:, None]
    b_taken = tl.zeros([BT, BH], tl.float32)
    b_written = tl.zeros([BT, BH], tl.float32)
    b_before = tl.zeros([BT, BH], tl.float32)
    b_kept = tl.zeros([BH], tl.float32)
    for i_k in range(0, K // BK):
        p_part = (i_tile * (K // BK) + i_k)[None, :] * BT + o_t[:, None]
        b_taken += tl.load(taken + p_part, mask=m_th, other=0.0)
        b_written += tl.load(written + p_part, mask=m_th, other=0.0)
        b_before += tl.load(written + p_part - 1, mask=m_before, other=0.0)
        b_kept += tl.load(kept + i_tile * (K // BK) + i_k, mask=m_h, other=0.0)
    b_before *= tl.load(step + p_token - 1, mask=m_before, other=0.0)
    b_dg = tl.load(decay_pairs + p_token, mask=m_th, other=0.0)
    b_dg += tl.cumsum(b_taken, 0, reverse=True) + tl.cumsum(b_before, 0) + b_kept[None, :]
    b_dg = tl.where(m_th, b_dg, 0.0)
    b_dstep = tl.load(step_pairs + p_token, mask=m_th, other=0.0) + b_written
    b_step = tl.load(step + p_token, mask=m_th, other=0.0)
    tl.store(drate + i_tile, tl.sum(b_dg * b_step, 0), mask=m_h)
    b_dstep += b_dg * tl.load(rate + o_h, mask=m_h, other=0.0)[None, :]
    # through the activation
    p_dt = (i_start + o_t)[:, None] * dt_row + o_h[None, :]
    b_x = tl.load(dt + p_dt, mask=m_th, other=0.0).to(tl.float32)
    b_x += tl.load(dt_bias + o_h, mask=m_h, other=0.0)[None, :]
    b_dstep *= 1.0 / (1.0 + tl.exp(-b_x))
    tl.store(ddt_bias + i_tile, tl.sum(tl.where(m_th, b_dstep, 0.0), 0), mask=m_h)
    p_ddt = (i_start + o_t)[:, None] * HV + o_h[None, :]
    tl.store(ddt + p_ddt, b_dstep.to(tl.bfloat16), mask=m_th)


def launch(
    q, k, rate, dt, dt_bias, log_decay, step, h, v, dh, dy, dq, dk, decay_pairs, step_pairs,
    taken, written, kept, ddt, drate, ddt_bias, *, n_chunks, T, H, HV, dt_row
):
    """Launch both kernels on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(q, k, log_decay, step, h, v, dh, dy, dq, dk, decay_pairs, step_pairs, taken,
        written, kept)
    fold_heads_kernel[(n_chunks, -(-HV // BH))](
        rate, dt, dt_bias, step, decay_pairs, step_pairs, taken, written, kept, ddt, drate,
        ddt_bias, T, HV, dt_row,
        K=K, BT=BT, BK=BK, BH=BH, num_warps=1,
    )
