"""The key side of the gradients, the decay outside of the products: dq, dk and dg.

Through the state first,

    dQg = dO S^T       dKtail = v dS^T       dgamma_C = <S, dS>

then through the scores, of which D_ij is what the state keeps from token j to token i:

    dq_i += scale sum_j D_ij dAqk_ij k_j
    dk_j +=       sum_i D_ij (scale dAqk_ij q_i)
    dg_t +=       sum over j < t <= i of D_ij (scale dAqk_ij <q_i, k_j>)

No term of dg is taken from another, so that it is exact however strong the decay is.
fold_decay_kernel adds up the parts that slices of channels have in it.

grad_key: one program per CHUNKS chunks, value head and slice of K. Tiles of channels are held
transposed, [BK, BT]: a channel is a row, so that each result is the next product's left operand and
stays in registers. The compiler gives the loads to a warp group of its own, and every tile a barrier of
its own. What folds is in Triton.

    q          [B, T, H, K]      bf16  queries
    k          [B, T, H, K]      bf16  keys
    g          [B, T, HG]        fp32  log decay
    log_decay  [NT, HV, BT]      fp32  decay of each token, log2
    gamma_C    [NT, HV]          fp32  decay of the whole chunk
    h          [NT, HV, V, K]    bf16  state at the chunk's start, transposed
    v          [B, T, HV, V]     bf16  values
    dh         [NT, HV, V, K]    bf16  gradient of the state at the chunk's end, transposed
    do         [B, T, HV, V]     bf16  gradient of o
    dq         [B, T, HV, K]     bf16  gradient of q, per value head
    dk         [B, T, HV, K]     bf16  gradient of k, per value head
    dg_part    [NT, HV, NK, BT]  fp32  gradient of the log decay: sums over a slice of channels
    dg         [B, T, HV]        fp32  gradient of g, per value head

Problem: simple_gla K=128 V=128 bf16, g fp32
Config:  BK=64 BT=32 BV=128 chunks=4 decay=outside language=tilelang maxnreg=128 num_stages=1 num_warps=4
Template digest e1e8776c8b490078; made by
    gdn2gen generate --op simple_gla --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate \
      none --with= --stage grad_key --config \
      BK=64,BT=32,BV=128,chunks=4,decay=outside,language=tilelang,maxnreg=128,num_stages=1,num_warps=4
"""

from functools import cache

import triton
import triton.language as tl


K, V = 128, 128
BT, BK, CHUNKS = 32, 64, 4
IO = "bfloat16"
BH = 16  # heads of a program of fold_decay_kernel
# exp2 and division by the hardware, flushing what is below 2^-126 to zero
PASSES = {"tl.enable_fast_math": True}


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, H, HG, NT, HV = (
        tile.dynamic(name) for name in ("B", "T", "H", "HG", "NT", "HV")
    )
    # a warp keeps whole channels, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def grad_key(
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        g: tile.Tensor([B, T, HG], "float32"),
        log_decay: tile.Tensor([NT, HV, BT], "float32"),
        gamma_C: tile.Tensor([NT, HV], "float32"),
        h: tile.Tensor([NT, HV, V, K], "bfloat16"),
        v: tile.Tensor([B, T, HV, V], "bfloat16"),
        dh: tile.Tensor([NT, HV, V, K], "bfloat16"),
        do: tile.Tensor([B, T, HV, V], "bfloat16"),
        dq: tile.Tensor([B, T, HV, K], "bfloat16"),
        dk: tile.Tensor([B, T, HV, K], "bfloat16"),
        dg_part: tile.Tensor([NT, HV, K // BK, BT], "float32"),
        dg: tile.Tensor([B, T, HV], "float32"),
        scale: tile.float32,
        lower_bound: tile.float32,
    ):
        with tile.Kernel(
            tile.ceildiv(tile.ceildiv(T, BT), CHUNKS) * (K // BK), HV, B, threads=128
        ) as (i_x, i_h, i_b):
            n_chunks = tile.ceildiv(T, BT)

            # 2 programs to a multiprocessor: 128 registers a thread, of which the loads need few
            tile.annotate_min_blocks_per_sm(2)
            tile.annotate_producer_reg_dealloc(24)
            tile.annotate_consumer_reg_alloc(232)

            i_k = i_x % (K // BK)
            i_first = i_x // (K // BK) * CHUNKS
            # held in a variable: the compiler would divide again for every load
            i_hq = tile.alloc_var("int32")
            i_hq = i_h // (HV // H)
            o_k = i_k * BK
            i_thread = tile.get_thread_binding()

            s_q = tile.alloc_shared([BT, BK], IO)
            s_k = tile.alloc_shared([BT, BK], IO)
            s_v = tile.alloc_shared([BT, V], IO)
            s_do = tile.alloc_shared([BT, V], IO)
            s_h = tile.alloc_shared([V, BK], IO)
            s_dh = tile.alloc_shared([V, BK], IO)
            s_log_decay = tile.alloc_shared([BT], "float32")
            # gradients of pairs, of scores without their decay
            s_dA = tile.alloc_shared([BT, BT], IO)
            s_dq = tile.alloc_shared([BT, BK], IO)
            s_dk = tile.alloc_shared([BT, BK], IO)
            # rows so long that what a warp writes of their transpose lies in banks of its own
            s_products = tile.alloc_shared([BT, BK + 4], "float32")
            s_written = tile.alloc_shared([BT, BK + 4], "float32")
            s_sums = tile.alloc_shared([2, BT], "float32")
            s_later = tile.alloc_shared([BT, BT], "bfloat16")
            s_pairs = tile.alloc_shared([BT, BT], "bfloat16")
            s_pairs_rest = tile.alloc_shared([BT, BT], "bfloat16")
            # decay since the chunk's start; its exponential, and that of the decay to the chunk's end
            s_G = tile.alloc_shared([BT], "float32")
            s_head = tile.alloc_shared([BT], "float32")
            s_tail = tile.alloc_shared([BT], "float32")
            x_G = tile.alloc_local([2], "float32")

            b_dq = tile.alloc_fragment([BK, BT], "float32")
            b_dk = tile.alloc_fragment([BK, BT], "float32")
            b_q = tile.alloc_fragment([BK, BT], "float32")
            b_k = tile.alloc_fragment([BK, BT], "float32")
            b_first = tile.alloc_fragment([BK, BT], IO)
            b_dAqk = tile.alloc_fragment([BT, BT], "float32")
            b_qk = tile.alloc_fragment([BT, BT], "float32")
            b_D = tile.alloc_fragment([BT, BT], "float32")
            b_later = tile.alloc_fragment([BT, BT], "float32")
            b_SdS = tile.alloc_fragment([BK, BK], "float32")
            b_dgamma = tile.alloc_fragment([BK], "float32")
            b_dg = tile.alloc_fragment([BT], "float32")
            x_gamma = tile.alloc_local([1], "float32")
            b_products = tile.alloc_fragment([BT, BK], "float32")
            b_sum = tile.alloc_fragment([BT], "float32")
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")

            for i, j in tile.Parallel(BT, BT):
                s_later[i, j] = tile.if_then_else(i >= j, tile.cast(1, "bfloat16"), tile.cast(0, "bfloat16"))
            for i_n in tile.Pipelined(
                tile.min(CHUNKS, n_chunks - i_first), num_stages=1
            ):
                i_c = i_b * n_chunks + i_first + i_n
                i_row = (i_first + i_n) * BT

                tile.copy(h[i_c, i_h, :, o_k : o_k + BK], s_h)
                tile.copy(do[i_b, i_row : i_row + BT, i_h, :], s_do)
                tile.copy(dh[i_c, i_h, :, o_k : o_k + BK], s_dh)
                tile.copy(v[i_b, i_row : i_row + BT, i_h, :], s_v)
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, o_k : o_k + BK], s_k)
                tile.copy(q[i_b, i_row : i_row + BT, i_hq, o_k : o_k + BK], s_q)
                tile.copy(log_decay[i_c, i_h, :], s_log_decay)

                x_gamma[0] = gamma_C[i_c, i_h]
                # a token a thread, which reads all of the chunk
                if i_thread < BT:
                    x_G[0] = 0.0
                    x_G[1] = 0.0
                    for m in tile.unroll(BT):
                        x_G[0] += tile.if_then_else(m <= i_thread, s_log_decay[m], 0.0)
                        x_G[1] += tile.if_then_else(m > i_thread, s_log_decay[m], 0.0)
                    s_G[i_thread] = x_G[0]
                    s_head[i_thread] = tile.exp2(x_G[0])
                    s_tail[i_thread] = tile.exp2(x_G[1])
                tile.sync_threads()
                hold[0] = tile.cast(s_log_decay[0], "float32")

                # dO v^T, which another stage would have to read both for
                tile.clear(b_dAqk)
                tile.gemm(s_do, s_v, b_dAqk, transpose_B=True)
                # pairs of queries and keys as they are: products of inputs are exact, and norms are factors of them
                tile.clear(b_qk)
                tile.gemm(s_q, s_k, b_qk, transpose_B=True)
                # through the state
                tile.clear(b_dq)
                tile.gemm(s_h, s_do, b_dq, transpose_A=True, transpose_B=True, policy=ROWS)
                tile.clear(b_dk)
                tile.gemm(s_dh, s_v, b_dk, transpose_A=True, transpose_B=True, policy=ROWS)
                # rows of S dS as the diagonal of a product: cheaper than reading both tiles again
                tile.clear(b_SdS)
                tile.gemm(s_dh, s_h, b_SdS, transpose_A=True, policy=ROWS)
                for i, j in tile.Parallel(BK, BK):
                    b_SdS[i, j] = tile.if_then_else(i == j, b_SdS[i, j], 0.0)
                tile.reduce_sum(b_SdS, b_dgamma, dim=1)

                # gradients of pairs, and what of dg they are
                for i, j in tile.Parallel(BT, BT):
                    b_D[i, j] = tile.if_then_else(i >= j, tile.exp2(s_G[i] - s_G[j]), 0.0)
                for i, j in tile.Parallel(BT, BT):
                    b_dAqk[i, j] = tile.if_then_else(i >= j, b_dAqk[i, j] * b_D[i, j], 0.0)
                    s_dA[i, j] = b_dAqk[i, j]
                # a pair counts for those tokens that are behind the first of both, and not behind the other: summed over
                # it and all later ones by a product with ones, of the first 8 bits and of the next 8
                for i, j in tile.Parallel(BT, BT):
                    b_D[i, j] = b_dAqk[i, j] * b_qk[i, j] * scale
                    b_D[i, j] = tile.if_then_else(i > j, b_D[i, j], 0.0)
                    s_pairs[i, j] = tile.cast(b_D[i, j], "bfloat16")
                    s_pairs_rest[i, j] = tile.cast(
                        b_D[i, j] - tile.cast(tile.cast(b_D[i, j], "bfloat16"), "float32"), "bfloat16"
                    )
                tile.clear(b_later)
                tile.gemm(s_later, s_pairs_rest, b_later, transpose_A=True)
                tile.gemm(s_later, s_pairs, b_later, transpose_A=True)

                for i, j in tile.Parallel(BK, BT):
                    b_k[i, j] = tile.cast(s_k[j, i], "float32")
                    b_q[i, j] = tile.cast(s_q[j, i], "float32") * scale
                    b_first[i, j] = b_k[i, j]
                    b_dq[i, j] *= s_head[j]
                    b_dk[i, j] *= s_tail[j]
                hold[0] = tile.cast(s_k[0, 0], "float32")
                hold[0] = tile.cast(s_q[0, 0], "float32")

                # What a token takes from the state decays by its own and all earlier tokens of the chunk, and what it
                # writes by all later ones; what the chunk starts from by all, as what the last one takes.
                for i, j in tile.Parallel(BK, BT):
                    s_products[j, i] = b_q[i, j] * b_dq[i, j] + (
                        tile.if_then_else(j == BT - 1, x_gamma[0] * b_dgamma[i], 0.0)
                    )
                    s_written[j, i] = b_k[i, j] * b_dk[i, j]
                # Summed where a token is a row: channels are spread over all warps, which would wait for each other.
                for i, j in tile.Parallel(BT, BK):
                    b_products[i, j] = s_products[i, j]
                tile.reduce_sum(b_products, b_sum, dim=1)
                for i in tile.Parallel(BT):
                    s_sums[0, i] = b_sum[i]
                for i, j in tile.Parallel(BT, BK):
                    b_products[i, j] = s_written[i, j]
                tile.reduce_sum(b_products, b_sum, dim=1)
                for i in tile.Parallel(BT):
                    s_sums[1, i] = b_sum[i]
                for i, j in tile.Parallel(BT, BT):
                    b_later[i, j] = tile.if_then_else(i > j, b_later[i, j] + s_sums[1, j], s_sums[0, j])
                tile.reduce_sum(b_later, b_dg, dim=1)
                for i in tile.Parallel(BT):
                    dg_part[i_c, i_h, i_k, i] = b_dg[i]

                # through the scores
                tile.gemm(b_first, s_dA, b_dq, transpose_B=True, policy=ROWS)
                for i, j in tile.Parallel(BK, BT):
                    b_first[i, j] = b_q[i, j]
                tile.gemm(b_first, s_dA, b_dk, policy=ROWS)
                # what the last chunk stores from these tiles is on its way meanwhile
                tile.tma_store_wait(0)
                tile.sync_threads()
                # b_q holds scale q, and b_dq the gradient of q over scale
                for i, j in tile.Parallel(BK, BT):
                    s_dq[j, i] = b_dq[i, j] * scale
                    s_dk[j, i] = b_dk[i, j]

                tile.tma_copy(s_dq, dq[i_b, i_row : i_row + BT, i_h, o_k : o_k + BK])
                tile.tma_copy(s_dk, dk[i_b, i_row : i_row + BT, i_h, o_k : o_k + BK])
            tile.tma_store_wait(0)

    return grad_key


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


@triton.jit(do_not_specialize=["T", "H", "HV", "HG"])
def fold_decay_kernel(
    dg_part,
    dg,
    T,
    H,
    HV,
    HG,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
):
    """dg of a chunk, BH heads at a time: sums over the slices of channels."""
    i_c = tl.program_id(0)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_t = tl.arange(0, BT)
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)
    m_h = o_h < HV
    m_th = (o_t < n_rows)[:, None] & m_h[None, :]
    i_tile = i_c.to(tl.int64) * HV + o_h
    b_dg = tl.zeros([BT, BH], tl.float32)
    for i_k in range(0, K // BK):
        p_part = (i_tile * (K // BK) + i_k)[None, :] * BT + o_t[:, None]
        b_dg += tl.load(dg_part + p_part, mask=m_th, other=0.0)
    p_dg = (i_start + o_t)[:, None] * HV + o_h[None, :]
    tl.store(dg + p_dg, b_dg.to(tl.float32), mask=m_th)


def launch(
    q, k, g, log_decay, gamma_C, h, v, dh, do, dq, dk, dg_part, dg, *, scale, lower_bound,
    n_chunks, T, H, HV, HG
):
    """Launch all kernels on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(
        q, k, g, log_decay, gamma_C, h, v, dh, do, dq, dk, dg_part, dg, scale, lower_bound
    )
    fold_decay_kernel[(n_chunks, -(-HV // BH))](
        dg_part, dg, T, H, HV, HG,
        K=K, BT=BT, BK=BK, BH=BH, num_warps=1,
    )
