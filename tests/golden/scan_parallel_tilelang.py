"""Scan the segments of a sequence side by side, exactly.

A segment takes the state to S_end = M S_start + U, and both follow from the same scan: U from
a zero state, M from the identity, with nothing written. Three kernels,

    fold           where the first segment ends; U and M of the others but the last; one program
                   per slice of their rows
    merge_kernel   the state at every segment's start, one after the other; in Triton
    scan           o, all segments at once

which is twice the work and a chain as short as one segment: for few heads and long sequences.
The state is held transposed, S^T [BV, K], so that it is the left operand of every product and
never leaves the registers. The compiler gives the loads to a warp group of its own, which fills
2 stages of shared memory ahead of the products.

    R^T = (w v)^T A^T + S^T Y^T          Y = -A E
    O^T = S^T Qg^T + R^T Aqk^T
    S^T <- S^T Diag(gamma_C) + R^T Ktail

    v        [B, T, HV, V]      bf16  values
    w        [B, T, HV, V]      bf16  write gate
    Qg       [NT, HV, BT, K]    bf16  queries, scaled and decayed from the chunk's start
    Y        [NT, HV, BT, K]    bf16  erasing keys through the inverse, -A E
    Ktail    [NT, HV, BT, K]    bf16  keys, decayed to the chunk's end
    gamma_C  [NT, HV, K]        fp32  decay of the whole chunk
    A        [NT, HV, BT, BT]   bf16  inverse of I + T, lower triangle
    Aqk      [NT, HV, BT, BT]   bf16  decayed scores, lower triangle
    o        [B, T, HV, V]      bf16  output
    S_seg    [N, HV, NS, V, K]  fp32  state at the segment's start, transposed
    M_seg    [N, HV, NS, K, K]  fp32  scratch: transition of all segments but first and last

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm
Config:  BT=32 BV=64 language=tilelang num_stages=2 num_warps=4 segments=parallel
Template digest 73d9a7b1c8869b0d; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with= --stage scan --config \
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

    B, T, HV, NT, NS = (
        tile.dynamic(name) for name in ("B", "T", "HV", "NT", "NS")
    )
    # a warp keeps whole rows of the state, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def fold(
        v: tile.Tensor([B, T, HV, V], "bfloat16"),
        w: tile.Tensor([B, T, HV, V], "bfloat16"),
        Qg: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        Y: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        Ktail: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        gamma_C: tile.Tensor([NT, HV, K], "float32"),
        A: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        o: tile.Tensor([B, T, HV, V], "bfloat16"),
        S_seg: tile.Tensor([B, HV, NS, V, K], "float32"),
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

            # past the first segment's rows of values, which starts from what is given
            i_slice = tile.if_then_else(i_x < V // BV, i_x, i_x + K // BV)
            i_v = i_slice % ((V + K) // BV)
            i_s = i_slice // ((V + K) // BV)
            n_chunks = tile.ceildiv(T, BT)
            i_first = i_n * n_chunks
            i_b = i_n
            i_start = 0
            n_tokens = T

            s_v = tile.alloc_shared([BT, BV], IO)
            s_w = tile.alloc_shared([BT, BV], IO)
            s_Z = tile.alloc_shared([BT, BV], IO)
            s_Y = tile.alloc_shared([BT, K], IO)
            s_Ktail = tile.alloc_shared([BT, K], IO)
            s_A = tile.alloc_shared([BT, BT], IO)
            s_gamma = tile.alloc_shared([K], "float32")
            b_S = tile.alloc_fragment([BV, K], "float32")
            b_Sd = tile.alloc_fragment([BV, K], IO)
            b_R = tile.alloc_fragment([BV, BT], "float32")
            b_Rd = tile.alloc_fragment([BV, BT], IO)
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")

            # Rows past V start at the identity. They lie past the end of v and w, where loads give
            # zeros.
            for i, j in tile.Parallel(BV, K):
                b_S[i, j] = tile.if_then_else(i_v * BV + i - V == j, 1.0, 0.0)
            for i_chunk in tile.Pipelined(
                tile.min(segment, n_chunks - i_s * segment), num_stages=2
            ):
                i_t = i_s * segment + i_chunk
                i_c = i_first + i_t
                i_row = i_start + i_t * BT
                tile.copy(Y[i_c, i_h, :, :], s_Y)
                tile.copy(v[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_v)
                tile.copy(w[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_w)
                tile.copy(A[i_c, i_h, :, :], s_A)
                tile.copy(gamma_C[i_c, i_h, :], s_gamma)
                tile.copy(Ktail[i_c, i_h, :, :], s_Ktail)

                tile.copy(b_S, b_Sd)
                tile.wgmma_gemm(b_Sd, s_Y, b_R, transpose_B=True, clear_accum=True, policy=ROWS)
                # meanwhile; rows past the end of the sequence are another one's
                for i, j in tile.Parallel(BT, BV):
                    s_Z[i, j] = tile.if_then_else(
                        i_t * BT + i < n_tokens,
                        tile.cast(s_v[i, j], "float32") * tile.cast(s_w[i, j], "float32"),
                        0.0,
                    )
                tile.wgmma_gemm(s_Z, s_A, b_R, transpose_A=True, transpose_B=True, policy=ROWS)
                for i, j in tile.Parallel(BV, K):
                    b_S[i, j] *= s_gamma[j]
                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_Y[0, 0], "float32")
                hold[0] = tile.cast(s_A[0, 0], "float32")
                hold[0] = tile.cast(s_v[0, 0], "float32")
                hold[0] = tile.cast(s_w[0, 0], "float32")

                tile.copy(b_R, b_Rd)
                tile.wgmma_gemm(b_Rd, s_Ktail, b_S, policy=ROWS)
                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_Ktail[0, 0], "float32")
                hold[0] = tile.cast(s_gamma[0], "float32")

            if i_v * BV < V:
                for i, j in tile.Parallel(BV, K):
                    S_seg[i_n, i_h, i_s + 1, i_v * BV + i, j] = b_S[i, j]
            else:
                for i, j in tile.Parallel(BV, K):
                    M_seg[i_n, i_h, i_s, i_v * BV - V + i, j] = b_S[i, j]

    return fold


@cache
def compiled_fold():
    """The program, compiled for the present GPU (10 s where no cache has it)."""
    import tilelang

    one_warp_loads()
    return tilelang.compile(fold_program(), pass_configs=LOADS)


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment"])
def merge_kernel(
    v,
    w,
    Qg,
    Y,
    Ktail,
    gamma_C,
    A,
    Aqk,
    o,
    S_seg,
    M_seg,
    T,
    HV,
    NS,
    segment,
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
    tl.store(S_seg + p_kept + 0 * K * V, b_S)
    if NS > 1:
        b_S = tl.load(S_seg + p_kept + 1 * K * V)
    for i_m in tl.range(1, NS - 1, num_stages=2):
        b_M = tl.load(M_seg + p_M + i_m * K * K)
        p_next = S_seg + p_kept + (i_m + 1) * K * V
        b_S = tl.dot(b_S, b_M, tl.load(p_next), input_precision="bf16x3")
        tl.store(p_next, b_S)


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, HV, NT, NS = (
        tile.dynamic(name) for name in ("B", "T", "HV", "NT", "NS")
    )
    # a warp keeps whole rows of the state, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def scan(
        v: tile.Tensor([B, T, HV, V], "bfloat16"),
        w: tile.Tensor([B, T, HV, V], "bfloat16"),
        Qg: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        Y: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        Ktail: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        gamma_C: tile.Tensor([NT, HV, K], "float32"),
        A: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        o: tile.Tensor([B, T, HV, V], "bfloat16"),
        S_seg: tile.Tensor([B, HV, NS, V, K], "float32"),
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

            s_v = tile.alloc_shared([BT, BV], IO)
            s_w = tile.alloc_shared([BT, BV], IO)
            s_Z = tile.alloc_shared([BT, BV], IO)
            s_Y = tile.alloc_shared([BT, K], IO)
            s_Ktail = tile.alloc_shared([BT, K], IO)
            s_A = tile.alloc_shared([BT, BT], IO)
            s_gamma = tile.alloc_shared([K], "float32")
            s_Qg = tile.alloc_shared([BT, K], IO)
            s_Aqk = tile.alloc_shared([BT, BT], IO)
            s_o = tile.alloc_shared([BT, BV], IO)
            b_o = tile.alloc_fragment([BV, BT], "float32")
            b_o_rows = tile.alloc_fragment([BT, BV], IO)
            b_S = tile.alloc_fragment([BV, K], "float32")
            b_Sd = tile.alloc_fragment([BV, K], IO)
            b_R = tile.alloc_fragment([BV, BT], "float32")
            b_Rd = tile.alloc_fragment([BV, BT], IO)
            # a thread's part of a result, in the order in which stores transpose it
            by_channels = tile.Fragment(
                [BT, BV],
                forward_thread_fn=lambda i, j: j // 16 * 32 + j % 8 * 4 + i % 8 // 2,
                forward_index_fn=lambda i, j: i // 8 * 4 + j % 16 // 8 * 2 + i % 2,
            )
            tile.annotate_layout({b_o_rows: by_channels})
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")

            for i, j in tile.Parallel(BV, K):
                b_S[i, j] = S_seg[i_n, i_h, i_s, i_v * BV + i, j]
            for i_chunk in tile.Pipelined(
                tile.min(segment, n_chunks - i_s * segment), num_stages=2
            ):
                i_t = i_s * segment + i_chunk
                i_c = i_first + i_t
                i_row = i_start + i_t * BT
                tile.copy(Y[i_c, i_h, :, :], s_Y)
                tile.copy(v[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_v)
                tile.copy(w[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_w)
                tile.copy(A[i_c, i_h, :, :], s_A)
                tile.copy(gamma_C[i_c, i_h, :], s_gamma)
                tile.copy(Ktail[i_c, i_h, :, :], s_Ktail)
                tile.copy(Qg[i_c, i_h, :, :], s_Qg)
                tile.copy(Aqk[i_c, i_h, :, :], s_Aqk)

                tile.copy(b_S, b_Sd)
                tile.wgmma_gemm(b_Sd, s_Y, b_R, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(b_Sd, s_Qg, b_o, transpose_B=True, clear_accum=True, policy=ROWS)
                # meanwhile; rows past the end of the sequence are another one's
                for i, j in tile.Parallel(BT, BV):
                    s_Z[i, j] = tile.if_then_else(
                        i_t * BT + i < n_tokens,
                        tile.cast(s_v[i, j], "float32") * tile.cast(s_w[i, j], "float32"),
                        0.0,
                    )
                tile.wgmma_gemm(s_Z, s_A, b_R, transpose_A=True, transpose_B=True, policy=ROWS)
                for i, j in tile.Parallel(BV, K):
                    b_S[i, j] *= s_gamma[j]
                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_Y[0, 0], "float32")
                hold[0] = tile.cast(s_Qg[0, 0], "float32")
                hold[0] = tile.cast(s_A[0, 0], "float32")
                hold[0] = tile.cast(s_v[0, 0], "float32")
                hold[0] = tile.cast(s_w[0, 0], "float32")

                tile.copy(b_R, b_Rd)
                tile.wgmma_gemm(b_Rd, s_Ktail, b_S, policy=ROWS)
                tile.wgmma_gemm(b_Rd, s_Aqk, b_o, transpose_B=True, policy=ROWS)
                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_Ktail[0, 0], "float32")
                hold[0] = tile.cast(s_Aqk[0, 0], "float32")
                hold[0] = tile.cast(s_gamma[0], "float32")

                for i, j in tile.Parallel(BV, BT):
                    b_o_rows[j, i] = b_o[i, j]
                tile.tma_store_wait(0)
                tile.copy(b_o_rows, s_o)
                tile.tma_copy(s_o, o[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV])

            tile.tma_store_wait(0)

    return scan


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
    v, w, Qg, Y, Ktail, gamma_C, A, Aqk, o, S_seg, M_seg, *, n_sequences, T, HV, NS, segment
):
    """Launch the three kernels on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    tensors = (
        v, w, Qg, Y, Ktail, gamma_C, A, Aqk, o, S_seg, M_seg,
    )
    if NS > 1:
        compiled_fold()(*tensors, segment)
    # one short product after the other: what more warps save in it is most of the time
    merge_kernel[(n_sequences * HV * (V // BM),)](
        v, w, Qg, Y, Ktail, gamma_C, A, Aqk, o, S_seg, M_seg, T, HV, NS, segment,
        K=K, V=V, BT=BT, BM=BM, num_warps=8, num_stages=1,
    )
    compiled()(*tensors, segment)
