"""Carry the gradient of the state through the chunks of a sequence, last to first; dv.

One program per sequence, value head and slice of V; the mirror of the scan, with the gradient of
the state held transposed, dS^T [BV, K]. What the last of every 2 chunks ends with is written out. The compiler gives the loads to a warp group of its own,
which fills 2 stages of shared memory ahead of the products.

    dR^T = dO^T Aqk + (dS^T k^T) k_tail        dX^T = dR^T A
    dS^T <- dS^T gamma_C + (dO^T q_head) q - (dX^T k_head) k

where q_head, k_head and k_tail, one number a token, make Qg, E and Ktail of q and k.
    dv = dX

    q        [B, T, H, K]      bf16  queries; normalised in the kernel
    k        [B, T, H, K]      bf16  keys; normalised in the kernel
    q_head   [NT, HV, BT]      fp32  scale / norm of q, decayed from the chunk's start
    k_head   [NT, HV, BT]      fp32  1 / norm of k, decayed from the chunk's start
    k_tail   [NT, HV, BT]      fp32  beta / norm of k, decayed to the chunk's end
    gamma_C  [NT, HV]          fp32  decay of the whole chunk
    A        [NT, HV, BT, BT]  bf16  inverse of I + T, lower triangle
    Aqk      [NT, HV, BT, BT]  bf16  decayed scores, lower triangle
    do       [B, T, HV, V]     bf16  gradient of o
    dht      [N, HV, K, V]     fp32  gradient of final_state
    dh       [NT2, HV, V, K]   bf16  gradient of the state at the block's end, transposed
    dv       [B, T, HV, V]     bf16  gradient of v

Problem: gated_delta_rule K=128 V=128 bf16, g fp32, l2norm
Config:  BT=32 BV=64 language=tilelang num_stages=2 num_warps=4 segments=serial
Template digest 7c54915f5f849df9; made by
    gdn2gen generate --op gated_delta_rule --head-dim 128,128 --dtype bf16 --gate-dtype fp32 \
      --gate none --with=final_state --stage reverse_scan_blocks2 --config \
      BT=32,BV=64,language=tilelang,num_stages=2,num_warps=4,segments=serial
"""

from functools import cache


K, V = 128, 128
BT, BV = 32, 64
IO = "bfloat16"


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile
    from tilelang.layout import make_swizzled_layout

    B, T, H, NT, HV, NT2 = (
        tile.dynamic(name) for name in ("B", "T", "H", "NT", "HV", "NT2")
    )
    # a warp keeps whole rows of the state, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def reverse_scan_blocks2(
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        q_head: tile.Tensor([NT, HV, BT], "float32"),
        k_head: tile.Tensor([NT, HV, BT], "float32"),
        k_tail: tile.Tensor([NT, HV, BT], "float32"),
        gamma_C: tile.Tensor([NT, HV], "float32"),
        A: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        do: tile.Tensor([B, T, HV, V], "bfloat16"),
        dht: tile.Tensor([B, HV, K, V], "float32"),
        dh: tile.Tensor([NT2, HV, V, K], "bfloat16"),
        dv: tile.Tensor([B, T, HV, V], "bfloat16"),
    ):
        # three dims: divisions in every address would be a third of all instructions, or 5 of 6
        with tile.Kernel(
            V // BV, HV, B, threads=128
        ) as (i_v, i_h, i_n):
            n_chunks = tile.ceildiv(T, BT)
            i_first = i_n * n_chunks
            i_b = i_n
            i_start = 0
            n_tokens = T

            i_block = i_n * tile.ceildiv(n_chunks, 2)
            # held in a variable: the compiler would divide again for every load
            i_hq = tile.alloc_var("int32")
            i_hq = i_h // (HV // H)
            s_do = tile.alloc_shared([BT, BV], IO)
            s_q = tile.alloc_shared([BT, K], IO)
            s_q_head = tile.alloc_shared([BT], "float32")
            s_k = tile.alloc_shared([BT, K], IO)
            s_k_tail = tile.alloc_shared([BT], "float32")
            s_Aqk = tile.alloc_shared([BT, BT], IO)
            s_k_head = tile.alloc_shared([BT], "float32")
            s_A = tile.alloc_shared([BT, BT], IO)
            s_dh = tile.alloc_shared([BV, K], IO)
            s_dX = tile.alloc_shared([BT, BV], IO)
            b_dS = tile.alloc_fragment([BV, K], "float32")
            b_do = tile.alloc_fragment([BV, BT], IO)
            b_outer = tile.alloc_fragment([BV, BT], IO)
            b_dSd = tile.alloc_fragment([BV, K], IO)
            b_dSk = tile.alloc_fragment([BV, BT], "float32")
            b_dR = tile.alloc_fragment([BV, BT], "float32")
            b_dRd = tile.alloc_fragment([BV, BT], IO)
            b_dX = tile.alloc_fragment([BV, BT], "float32")
            b_erased = tile.alloc_fragment([BV, BT], IO)
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
            x_gamma[1] = gamma_C[tile.min(i_first + tile.max(n_chunks - 1, 0), NT - 1), i_h]

            for i, j in tile.Parallel(BV, K):
                b_dS[i, j] = dht[i_n, i_h, j, i_v * BV + i]
            for i_back in tile.Pipelined(n_chunks, num_stages=2):
                i_t = n_chunks - 1 - i_back
                i_c = i_first + i_t
                i_row = i_start + i_t * BT
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, :], s_k)
                tile.copy(do[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_do)
                tile.copy(Aqk[i_c, i_h, :, :], s_Aqk)
                tile.copy(q_head[i_c, i_h, :], s_q_head)
                tile.copy(q[i_b, i_row : i_row + BT, i_hq, :], s_q)
                tile.copy(k_tail[i_c, i_h, :], s_k_tail)
                tile.copy(A[i_c, i_h, :, :], s_A)
                tile.copy(k_head[i_c, i_h, :], s_k_head)

                x_gamma[0] = x_gamma[1]
                x_gamma[1] = gamma_C[i_first + tile.max(i_t - 1, 0), i_h]
                tile.copy(b_dS, b_dSd)
                tile.wgmma_gemm(b_dSd, s_k, b_dSk, transpose_B=True, clear_accum=True, policy=ROWS)
                for i, j in tile.Parallel(BV, BT):
                    b_do[i, j] = s_do[j, i]
                tile.wgmma_gemm(b_do, s_Aqk, b_dR, clear_accum=True, policy=ROWS)
                # where a block ends
                if i_t % 2 == 1 or i_back == 0:
                    tile.tma_store_wait(1)
                    tile.copy(b_dSd, s_dh)
                    tile.tma_copy(s_dh, dh[i_block + i_t // 2, i_h, i_v * BV : (i_v + 1) * BV, :])
                for i, j in tile.Parallel(BV, K):
                    b_dS[i, j] *= x_gamma[0]
                for i, j in tile.Parallel(BV, BT):
                    b_outer[i, j] = tile.cast(b_do[i, j], "float32") * s_q_head[j]
                tile.wgmma_gemm(b_outer, s_q, b_dS, policy=ROWS)
                hold[0] = tile.cast(s_do[0, 0], "float32")
                hold[0] = tile.cast(s_q_head[0], "float32")

                tile.wait_wgmma(1)
                hold[0] = tile.cast(s_Aqk[0, 0], "float32")

                for i, j in tile.Parallel(BV, BT):
                    b_dR[i, j] = b_dR[i, j] + b_dSk[i, j] * s_k_tail[j]
                tile.copy(b_dR, b_dRd)
                tile.wgmma_gemm(b_dRd, s_A, b_dX, clear_accum=True, policy=ROWS)
                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_A[0, 0], "float32")
                hold[0] = tile.cast(s_q[0, 0], "float32")

                for i, j in tile.Parallel(BV, BT):
                    b_erased[i, j] = b_dX[i, j] * -s_k_head[j]
                tile.wgmma_gemm(b_erased, s_k, b_dS, policy=ROWS)
                for i, j in tile.Parallel(BV, BT):
                    b_dX_rows[j, i] = b_dX[i, j]
                tile.tma_store_wait(0)
                tile.copy(b_dX_rows, s_dX)
                tile.tma_copy(s_dX, dv[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV])

                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_k_tail[0], "float32")
                hold[0] = tile.cast(s_k[0, 0], "float32")
                hold[0] = tile.cast(s_k_head[0], "float32")

            tile.tma_store_wait(0)

    return reverse_scan_blocks2


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
    q, k, q_head, k_head, k_tail, gamma_C, A, Aqk, do, dht, dh, dv, *, n_sequences, T, HV, NS,
    segment, H
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(q, k, q_head, k_head, k_tail, gamma_C, A, Aqk, do, dht, dh, dv)
