"""Carry the gradient of the state through the chunks of a sequence, last to first.

One program per sequence, value head and slice of V; the mirror of the scan, with the gradient of
the state held transposed, dS^T [BV, K]. The compiler gives the loads to a warp group of its own,
which fills 2 stages of shared memory ahead of the products.

    dR^T = dO^T Aqk + dS^T Ktail^T        dX^T = dR^T A
    dS^T <- dS^T Diag(gamma_C) + dO^T Qg + dR^T Y          Y = -A E

    Qg             [NT, HV, BT, K]   bf16   queries, scaled and decayed from the chunk's start
    Y              [NT, HV, BT, K]   bf16   erasing keys through the inverse, -A E
    Ktail          [NT, HV, BT, K]   bf16   keys, decayed to the chunk's end
    gamma_C        [NT, HV, K]       fp32   decay of the whole chunk
    A              [NT, HV, BT, BT]  bf16   inverse of I + T, lower triangle
    Aqk            [NT, HV, BT, BT]  bf16   decayed scores, lower triangle
    do             [B, T, HV, V]     bf16   gradient of o
    dht            [N, HV, K, V]     fp32   gradient of final_state
    cu_seqlens     [N+1]             int32  first token of each sequence
    chunk_offsets  [N+1]             int32  first chunk of each sequence
    dh             [NT, HV, V, K]    bf16   gradient of the state at the chunk's end, transposed
    dX             [NT, HV, BT, V]   bf16   gradient of X = w v - E S, where R = A X
    dX_rest        [NT, HV, BT, V]   bf16   what rounding dX to 16 bits left
    dh0            [N, HV, K, V]     fp32   gradient of initial_state

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm, packed sequences
Config:  BT=32 BV=64 language=tilelang num_stages=2 num_warps=4 segments=serial
Template digest 64a507d7ca73a44d; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with=varlen,initial_state,final_state --stage reverse_scan --config \
      BT=32,BV=64,language=tilelang,num_stages=2,num_warps=4,segments=serial
"""

from functools import cache


K, V = 128, 128
BT, BV = 32, 64
IO = "bfloat16"


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    NT, HV, B, T, N, N1 = (
        tile.dynamic(name) for name in ("NT", "HV", "B", "T", "N", "N1")
    )
    # a warp keeps whole rows of the state, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def reverse_scan(
        Qg: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        Y: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        Ktail: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        gamma_C: tile.Tensor([NT, HV, K], "float32"),
        A: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        do: tile.Tensor([B, T, HV, V], "bfloat16"),
        dht: tile.Tensor([N, HV, K, V], "float32"),
        cu_seqlens: tile.Tensor([N1], "int32"),
        chunk_offsets: tile.Tensor([N1], "int32"),
        dh: tile.Tensor([NT, HV, V, K], "bfloat16"),
        dX: tile.Tensor([NT, HV, BT, V], "bfloat16"),
        dX_rest: tile.Tensor([NT, HV, BT, V], "bfloat16"),
        dh0: tile.Tensor([N, HV, K, V], "float32"),
    ):
        # three dims: divisions in every address would be a third of all instructions, or 5 of 6
        with tile.Kernel(
            V // BV, HV, (N1 - 1), threads=128
        ) as (i_v, i_h, i_n):
            i_first = chunk_offsets[i_n]
            n_chunks = chunk_offsets[i_n + 1] - i_first
            i_b = 0
            i_start = cu_seqlens[i_n]
            n_tokens = cu_seqlens[i_n + 1] - i_start

            s_do = tile.alloc_shared([BT, BV], IO)
            s_own_do = tile.alloc_shared([BT, BV], IO)
            s_Qg = tile.alloc_shared([BT, K], IO)
            s_Y = tile.alloc_shared([BT, K], IO)
            s_Ktail = tile.alloc_shared([BT, K], IO)
            s_A = tile.alloc_shared([BT, BT], IO)
            s_Aqk = tile.alloc_shared([BT, BT], IO)
            s_gamma = tile.alloc_shared([K], "float32")
            s_dh = tile.alloc_shared([BV, K], IO)
            s_dX = tile.alloc_shared([BT, BV], IO)
            s_dX_rest = tile.alloc_shared([BT, BV], IO)
            b_dS = tile.alloc_fragment([BV, K], "float32")
            b_dSd = tile.alloc_fragment([BV, K], IO)
            b_dR = tile.alloc_fragment([BV, BT], "float32")
            b_dRd = tile.alloc_fragment([BV, BT], IO)
            b_dX = tile.alloc_fragment([BV, BT], "float32")
            b_dXd = tile.alloc_fragment([BV, BT], IO)
            b_dX_rows = tile.alloc_fragment([BT, BV], IO)
            b_rest_rows = tile.alloc_fragment([BT, BV], IO)
            # a thread's part of a result, in the order in which stores transpose it
            by_channels = tile.Fragment(
                [BT, BV],
                forward_thread_fn=lambda i, j: j // 16 * 32 + j % 8 * 4 + i % 8 // 2,
                forward_index_fn=lambda i, j: i // 8 * 4 + j % 16 // 8 * 2 + i % 2,
            )
            tile.annotate_layout({b_dX_rows: by_channels, b_rest_rows: by_channels})
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")

            for i, j in tile.Parallel(BV, K):
                b_dS[i, j] = dht[i_n, i_h, j, i_v * BV + i]
            for i_back in tile.Pipelined(n_chunks, num_stages=2):
                i_t = n_chunks - 1 - i_back
                i_c = i_first + i_t
                i_row = i_start + i_t * BT
                tile.copy(do[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_do)
                tile.copy(Aqk[i_c, i_h, :, :], s_Aqk)
                tile.copy(Ktail[i_c, i_h, :, :], s_Ktail)
                tile.copy(A[i_c, i_h, :, :], s_A)
                tile.copy(gamma_C[i_c, i_h, :], s_gamma)
                tile.copy(Qg[i_c, i_h, :, :], s_Qg)
                tile.copy(Y[i_c, i_h, :, :], s_Y)

                # rows past the end of the sequence are another one's
                for i, j in tile.Parallel(BT, BV):
                    s_own_do[i, j] = tile.if_then_else(
                        i_t * BT + i < n_tokens, s_do[i, j], tile.cast(0, IO)
                    )
                tile.copy(b_dS, b_dSd)
                tile.wgmma_gemm(s_own_do, s_Aqk, b_dR, transpose_A=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(b_dSd, s_Ktail, b_dR, transpose_B=True, policy=ROWS)
                tile.tma_store_wait(2)
                tile.copy(b_dSd, s_dh)
                tile.tma_copy(s_dh, dh[i_c, i_h, i_v * BV : (i_v + 1) * BV, :])
                for i, j in tile.Parallel(BV, K):
                    b_dS[i, j] *= s_gamma[j]
                tile.wgmma_gemm(s_own_do, s_Qg, b_dS, transpose_A=True, policy=ROWS)
                tile.wait_wgmma(1)
                hold[0] = tile.cast(s_Aqk[0, 0], "float32")
                hold[0] = tile.cast(s_Ktail[0, 0], "float32")

                tile.copy(b_dR, b_dRd)
                tile.wgmma_gemm(b_dRd, s_A, b_dX, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(b_dRd, s_Y, b_dS, policy=ROWS)
                tile.wait_wgmma(1)
                hold[0] = tile.cast(s_do[0, 0], "float32")
                hold[0] = tile.cast(s_Qg[0, 0], "float32")
                hold[0] = tile.cast(s_A[0, 0], "float32")

                tile.copy(b_dX, b_dXd)
                for i, j in tile.Parallel(BV, BT):
                    b_dX_rows[j, i] = b_dXd[i, j]
                    b_rest_rows[j, i] = tile.cast(b_dX[i, j] - tile.cast(b_dXd[i, j], "float32"), IO)
                tile.tma_store_wait(1)
                tile.copy(b_dX_rows, s_dX)
                tile.copy(b_rest_rows, s_dX_rest)
                tile.tma_copy(s_dX, dX[i_c, i_h, :, i_v * BV : (i_v + 1) * BV])
                tile.tma_copy(s_dX_rest, dX_rest[i_c, i_h, :, i_v * BV : (i_v + 1) * BV])
                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_Y[0, 0], "float32")
                hold[0] = tile.cast(s_gamma[0], "float32")

            tile.tma_store_wait(0)

            for i, j in tile.Parallel(BV, K):
                dh0[i_n, i_h, j, i_v * BV + i] = b_dS[i, j]

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
    Qg, Y, Ktail, gamma_C, A, Aqk, do, dht, cu_seqlens, chunk_offsets, dh, dX, dX_rest, dh0, *,
    n_sequences, T, HV, NS, segment
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    if T == 0:  # no tile that TMA could load
        dh0.copy_(dht)
        return
    compiled()(Qg, Y, Ktail, gamma_C, A, Aqk, do, dht, cu_seqlens, chunk_offsets, dh, dX,
        dX_rest, dh0)
