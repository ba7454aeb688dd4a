"""Carry the gradient of the state back through all segments of a sequence side by side, exactly.

The mirror of the parallel scan: a segment takes the gradient to dS_start = dS_end M^T + W, where
W follows from a zero gradient at its end, and M^T from the identity without dO. Three kernels,

    fold           where the last segment starts; W and M of the others but the first; one
                   program per slice of their rows
    merge_kernel   the gradient at every segment's end, one after the other; in Triton
    reverse_scan   dh and dX, all segments at once

with the gradient of the state held transposed, dS^T [BV, K]. The compiler gives the loads to a
warp group of its own, which fills 2 stages of shared memory ahead of the products.

    dv^T = dO^T Aqk + (dS^T k^T) k_tail
    dS^T <- dS^T gamma_C + (dO^T q_head) q

where q_head and k_tail, one number a token, make Qg and Ktail of q and k.

    q        [B, T, H, K]       bf16  queries
    k        [B, T, H, K]       bf16  keys
    q_head   [NT, HV, BT]       fp32  scale, decayed from the chunk's start
    k_tail   [NT, HV, BT]       fp32  decay to the chunk's end
    gamma_C  [NT, HV]           fp32  decay of the whole chunk
    Aqk      [NT, HV, BT, BT]   bf16  decayed scores, lower triangle
    do       [B, T, HV, V]      bf16  gradient of o
    dh       [NT, HV, V, K]     bf16  gradient of the state at the chunk's end, transposed
    dv       [B, T, HV, V]      bf16  gradient of v
    dS_seg   [N, HV, NS, V, K]  fp32  scratch: gradient of the state at the segment's end
    M_seg    [N, HV, NS, K, K]  fp32  scratch: transition of all segments but first and last

Problem: simple_gla K=128 V=128 bf16, g fp32
Config:  BT=32 BV=64 language=tilelang num_stages=2 num_warps=4 segments=parallel
Template digest dc5a0bc5f1eedd73; made by
    gdn2gen generate --op simple_gla --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate \
      none --with= --stage reverse_scan --config \
      BT=32,BV=64,language=tilelang,num_stages=2,num_warps=4,segments=parallel
"""

from functools import cache

import triton
import triton.language as tl


K, V = 128, 128
BT, BV = 32, 64
BM = 16  # rows of a program of merge_kernel, which waits for one product after the other
IO = "bfloat16"


def fold_program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile
    from tilelang.layout import make_swizzled_layout

    B, T, H, NT, HV, NS = (
        tile.dynamic(name) for name in ("B", "T", "H", "NT", "HV", "NS")
    )
    # a warp keeps whole rows of the state, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def fold(
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        q_head: tile.Tensor([NT, HV, BT], "float32"),
        k_tail: tile.Tensor([NT, HV, BT], "float32"),
        gamma_C: tile.Tensor([NT, HV], "float32"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        do: tile.Tensor([B, T, HV, V], "bfloat16"),
        dh: tile.Tensor([NT, HV, V, K], "bfloat16"),
        dv: tile.Tensor([B, T, HV, V], "bfloat16"),
        dS_seg: tile.Tensor([B, HV, NS, V, K], "float32"),
        M_seg: tile.Tensor([B, HV, NS, K, K], "float32"),
        segment: tile.int32,
    ):
        # three dims: divisions in every address would be a third of all instructions, or 5 of 6
        with tile.Kernel(
            (V + K) // BV * (NS - 1) - K // BV, HV, B, threads=128
        ) as (i_x, i_h, i_n):
            # 2 programs to a multiprocessor: 128 registers a thread, of which the loads need few
            tile.annotate_min_blocks_per_sm(2)
            tile.annotate_producer_reg_dealloc(24)
            tile.annotate_consumer_reg_alloc(232)

            # past the last segment's rows of values, which starts from what is given
            i_slice = tile.if_then_else(i_x < V // BV, i_x, i_x + K // BV)
            i_v = i_slice % ((V + K) // BV)
            i_s = NS - 1 - i_slice // ((V + K) // BV)
            n_chunks = tile.ceildiv(T, BT)
            i_first = i_n * n_chunks
            i_b = i_n
            i_start = 0
            n_tokens = T

            # held in a variable: the compiler would divide again for every load
            i_hq = tile.alloc_var("int32")
            i_hq = i_h // (HV // H)
            s_do = tile.alloc_shared([BT, BV], IO)
            s_q = tile.alloc_shared([BT, K], IO)
            s_q_head = tile.alloc_shared([BT], "float32")
            b_dS = tile.alloc_fragment([BV, K], "float32")
            b_do = tile.alloc_fragment([BV, BT], IO)
            b_outer = tile.alloc_fragment([BV, BT], IO)
            tile.annotate_layout({s_do: make_swizzled_layout(s_do)})
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")
            x_gamma = tile.alloc_local([2], "float32")  # of a chunk, and of the next one
            x_gamma[1] = gamma_C[tile.min(i_first + tile.min((i_s + 1) * segment, n_chunks) - 1, NT - 1), i_h]

            # rows past V start at the identity, and lie past the end of dO, where loads give zeros
            for i, j in tile.Parallel(BV, K):
                b_dS[i, j] = tile.if_then_else(i_v * BV + i - V == j, 1.0, 0.0)
            for i_chunk in tile.Pipelined(
                tile.min(segment, n_chunks - i_s * segment), num_stages=2
            ):
                i_t = tile.min((i_s + 1) * segment, n_chunks) - 1 - i_chunk
                i_c = i_first + i_t
                i_row = i_start + i_t * BT
                tile.copy(do[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_do)
                tile.copy(q_head[i_c, i_h, :], s_q_head)
                tile.copy(q[i_b, i_row : i_row + BT, i_hq, :], s_q)

                x_gamma[0] = x_gamma[1]
                x_gamma[1] = gamma_C[i_first + tile.max(i_t - 1, 0), i_h]
                for i, j in tile.Parallel(BV, BT):
                    b_do[i, j] = s_do[j, i]
                for i, j in tile.Parallel(BV, K):
                    b_dS[i, j] *= x_gamma[0]
                for i, j in tile.Parallel(BV, BT):
                    b_outer[i, j] = tile.cast(b_do[i, j], "float32") * s_q_head[j]
                tile.wgmma_gemm(b_outer, s_q, b_dS, policy=ROWS)
                hold[0] = tile.cast(s_do[0, 0], "float32")
                hold[0] = tile.cast(s_q_head[0], "float32")

                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_q[0, 0], "float32")

            if i_v * BV < V:
                for i, j in tile.Parallel(BV, K):
                    dS_seg[i_n, i_h, i_s - 1, i_v * BV + i, j] = b_dS[i, j]
            else:
                for i, j in tile.Parallel(BV, K):
                    M_seg[i_n, i_h, i_s - 1, i_v * BV - V + i, j] = b_dS[i, j]

    return fold


@cache
def compiled_fold():
    """The program, compiled for the present GPU (10 s where no cache has it)."""
    import tilelang

    one_warp_loads()
    return tilelang.compile(fold_program(), pass_configs=LOADS)


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment", "H"])
def merge_kernel(
    q,
    k,
    q_head,
    k_tail,
    gamma_C,
    Aqk,
    do,
    dh,
    dv,
    dS_seg,
    M_seg,
    T,
    HV,
    NS,
    segment,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
):
    i_v = tl.program_id(0) % (V // BM)
    i_nh = tl.program_id(0) // (V // BM)
    o_k = tl.arange(0, K)
    o_v = i_v * BM + tl.arange(0, BM)
    b_S = tl.zeros([BM, K], tl.float32)
    p_kept = i_nh.to(tl.int64) * NS * K * V + o_v[:, None] * K + o_k[None, :]
    p_M = i_nh.to(tl.int64) * NS * K * K + o_k[:, None] * K + o_k[None, :]
    tl.store(dS_seg + p_kept + (NS - 1) * K * V, b_S)
    if NS > 1:
        b_S = tl.load(dS_seg + p_kept + (NS - 2) * K * V)
    for i_m in tl.range(1, NS - 1, num_stages=2):
        b_M = tl.load(M_seg + p_M + (NS - 2 - i_m) * K * K)
        p_next = dS_seg + p_kept + (NS - 2 - i_m) * K * V
        b_S = tl.dot(b_S, b_M, tl.load(p_next), input_precision="bf16x3")
        tl.store(p_next, b_S)


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile
    from tilelang.layout import make_swizzled_layout

    B, T, H, NT, HV, NS = (
        tile.dynamic(name) for name in ("B", "T", "H", "NT", "HV", "NS")
    )
    # a warp keeps whole rows of the state, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def reverse_scan(
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        q_head: tile.Tensor([NT, HV, BT], "float32"),
        k_tail: tile.Tensor([NT, HV, BT], "float32"),
        gamma_C: tile.Tensor([NT, HV], "float32"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        do: tile.Tensor([B, T, HV, V], "bfloat16"),
        dh: tile.Tensor([NT, HV, V, K], "bfloat16"),
        dv: tile.Tensor([B, T, HV, V], "bfloat16"),
        dS_seg: tile.Tensor([B, HV, NS, V, K], "float32"),
        M_seg: tile.Tensor([B, HV, NS, K, K], "float32"),
        segment: tile.int32,
    ):
        # three dims: divisions in every address would be a third of all instructions, or 5 of 6
        with tile.Kernel(
            V // BV * NS, HV, B, threads=128
        ) as (i_x, i_h, i_n):
            # 2 programs to a multiprocessor: 128 registers a thread, of which the loads need few
            tile.annotate_min_blocks_per_sm(2)
            tile.annotate_producer_reg_dealloc(24)
            tile.annotate_consumer_reg_alloc(232)

            i_v = i_x % (V // BV)
            i_s = i_x // (V // BV)
            n_chunks = tile.ceildiv(T, BT)
            i_first = i_n * n_chunks
            i_b = i_n
            i_start = 0
            n_tokens = T

            # held in a variable: the compiler would divide again for every load
            i_hq = tile.alloc_var("int32")
            i_hq = i_h // (HV // H)
            s_do = tile.alloc_shared([BT, BV], IO)
            s_q = tile.alloc_shared([BT, K], IO)
            s_q_head = tile.alloc_shared([BT], "float32")
            s_k = tile.alloc_shared([BT, K], IO)
            s_k_tail = tile.alloc_shared([BT], "float32")
            s_Aqk = tile.alloc_shared([BT, BT], IO)
            s_dh = tile.alloc_shared([BV, K], IO)
            s_dX = tile.alloc_shared([BT, BV], IO)
            b_dS = tile.alloc_fragment([BV, K], "float32")
            b_do = tile.alloc_fragment([BV, BT], IO)
            b_outer = tile.alloc_fragment([BV, BT], IO)
            b_dSd = tile.alloc_fragment([BV, K], IO)
            b_dSk = tile.alloc_fragment([BV, BT], "float32")
            b_dR = tile.alloc_fragment([BV, BT], "float32")
            b_dX_rows = tile.alloc_fragment([BT, BV], IO)
            # a thread's part of a result, in the order in which stores transpose it
            by_channels = tile.Fragment(
                [BT, BV],
                forward_thread_fn=lambda i, j: j // 16 * 32 + j % 8 * 4 + i % 8 // 2,
                forward_index_fn=lambda i, j: i // 8 * 4 + j % 16 // 8 * 2 + i % 2,
            )
            tile.annotate_layout({s_do: make_swizzled_layout(s_do), b_dX_rows: by_channels})
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")
            x_gamma = tile.alloc_local([2], "float32")  # of a chunk, and of the next one
            x_gamma[1] = gamma_C[tile.min(i_first + tile.min((i_s + 1) * segment, n_chunks) - 1, NT - 1), i_h]

            for i, j in tile.Parallel(BV, K):
                b_dS[i, j] = dS_seg[i_n, i_h, i_s, i_v * BV + i, j]
            for i_chunk in tile.Pipelined(
                tile.min(segment, n_chunks - i_s * segment), num_stages=2
            ):
                i_t = tile.min((i_s + 1) * segment, n_chunks) - 1 - i_chunk
                i_c = i_first + i_t
                i_row = i_start + i_t * BT
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, :], s_k)
                tile.copy(do[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_do)
                tile.copy(Aqk[i_c, i_h, :, :], s_Aqk)
                tile.copy(q_head[i_c, i_h, :], s_q_head)
                tile.copy(q[i_b, i_row : i_row + BT, i_hq, :], s_q)
                tile.copy(k_tail[i_c, i_h, :], s_k_tail)

                x_gamma[0] = x_gamma[1]
                x_gamma[1] = gamma_C[i_first + tile.max(i_t - 1, 0), i_h]
                tile.copy(b_dS, b_dSd)
                tile.wgmma_gemm(b_dSd, s_k, b_dSk, transpose_B=True, clear_accum=True, policy=ROWS)
                for i, j in tile.Parallel(BV, BT):
                    b_do[i, j] = s_do[j, i]
                tile.wgmma_gemm(b_do, s_Aqk, b_dR, clear_accum=True, policy=ROWS)
                tile.tma_store_wait(1)
                tile.copy(b_dSd, s_dh)
                tile.tma_copy(s_dh, dh[i_c, i_h, i_v * BV : (i_v + 1) * BV, :])
                for i, j in tile.Parallel(BV, K):
                    b_dS[i, j] *= x_gamma[0]
                for i, j in tile.Parallel(BV, BT):
                    b_outer[i, j] = tile.cast(b_do[i, j], "float32") * s_q_head[j]
                tile.wgmma_gemm(b_outer, s_q, b_dS, policy=ROWS)
                hold[0] = tile.cast(s_do[0, 0], "float32")
                hold[0] = tile.cast(s_q_head[0], "float32")

                tile.wait_wgmma(1)
                hold[0] = tile.cast(s_Aqk[0, 0], "float32")
                hold[0] = tile.cast(s_k[0, 0], "float32")

                for i, j in tile.Parallel(BV, BT):
                    b_dR[i, j] = b_dR[i, j] + b_dSk[i, j] * s_k_tail[j]
                for i, j in tile.Parallel(BV, BT):
                    b_dX_rows[j, i] = b_dR[i, j]
                tile.tma_store_wait(1)
                tile.copy(b_dX_rows, s_dX)
                tile.tma_copy(s_dX, dv[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV])

                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_k_tail[0], "float32")
                hold[0] = tile.cast(s_q[0, 0], "float32")

            tile.tma_store_wait(0)

    return reverse_scan


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
    return tilelang.compile(program(), pass_configs=LOADS)


def launch(
    q, k, q_head, k_tail, gamma_C, Aqk, do, dh, dv, dS_seg, M_seg, *, n_sequences, T, HV, NS,
    segment, H
):
    """Launch the three kernels on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    tensors = (
        q, k, q_head, k_tail, gamma_C, Aqk, do, dh, dv, dS_seg, M_seg,
    )
    if NS > 1:
        compiled_fold()(*tensors, segment)
    # one short product after the other: what more warps save in it is most of the time
    merge_kernel[(n_sequences * HV * (V // BM),)](
        q, k, q_head, k_tail, gamma_C, Aqk, do, dh, dv, dS_seg, M_seg, T, HV, NS, segment, H,
        K=K, V=V, BT=BT, BM=BM, num_warps=8, num_stages=1,
    )
    compiled()(*tensors, segment)
