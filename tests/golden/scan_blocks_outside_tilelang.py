"""Scan the chunks of a sequence in order, keeping what the backward needs.

One program per sequence, value head and slice of V; the state is held transposed, S^T [BV, K], so
that it is the left operand of every product and never leaves the registers. What each chunk adds is
written out, and what every 2 chunks start from. The compiler gives the loads to a warp group of its own,
which fills 2 stages of shared memory ahead of the products.

    X^T = v^T - (S^T k^T) k_head          R^T = X^T A^T
    O^T = (S^T q^T) q_head + R^T Aqk^T
    S^T <- S^T gamma_C + (R^T k_tail) k

where q_head, k_head and k_tail, one number a token, make Qg, E and Ktail of q and k.

    v              [B, T, HV, V]     bf16  values
    q              [B, T, H, K]      bf16  queries; normalised in the kernel
    k              [B, T, H, K]      bf16  keys; normalised in the kernel
    q_head         [NT, HV, BT]      fp32  scale / norm of q, decayed from the chunk's start
    k_head         [NT, HV, BT]      fp32  1 / norm of k, decayed from the chunk's start
    k_tail         [NT, HV, BT]      fp32  beta / norm of k, decayed to the chunk's end
    gamma_C        [NT, HV]          fp32  decay of the whole chunk
    A              [NT, HV, BT, BT]  bf16  inverse of I + T, lower triangle
    Aqk            [NT, HV, BT, BT]  bf16  decayed scores, lower triangle
    initial_state  [N, HV, K, V]     fp32  state before the first token
    o              [B, T, HV, V]     bf16  output
    h              [NT2, HV, V, K]   bf16  state at the block's start, transposed
    R              [NT, HV, BT, V]   bf16  u: a token adds (beta k) u^T to the state

Problem: gated_delta_rule K=128 V=128 bf16, g fp32, l2norm
Config:  BT=32 BV=64 language=tilelang num_stages=2 num_warps=4 segments=serial
Template digest da57d2159e9726b5; made by
    gdn2gen generate --op gated_delta_rule --head-dim 128,128 --dtype bf16 --gate-dtype fp32 \
      --gate none --with=initial_state --stage scan_blocks2 --config \
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

    B, T, HV, H, NT, NT2 = (
        tile.dynamic(name) for name in ("B", "T", "HV", "H", "NT", "NT2")
    )
    # a warp keeps whole rows of the state, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def scan_blocks2(
        v: tile.Tensor([B, T, HV, V], "bfloat16"),
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        q_head: tile.Tensor([NT, HV, BT], "float32"),
        k_head: tile.Tensor([NT, HV, BT], "float32"),
        k_tail: tile.Tensor([NT, HV, BT], "float32"),
        gamma_C: tile.Tensor([NT, HV], "float32"),
        A: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        initial_state: tile.Tensor([B, HV, K, V], "float32"),
        o: tile.Tensor([B, T, HV, V], "bfloat16"),
        h: tile.Tensor([NT2, HV, V, K], "bfloat16"),
        R: tile.Tensor([NT, HV, BT, V], "bfloat16"),
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
            s_k = tile.alloc_shared([BT, K], IO)
            s_v = tile.alloc_shared([BT, BV], IO)
            s_k_tail = tile.alloc_shared([BT], "float32")
            s_k_head = tile.alloc_shared([BT], "float32")
            s_A = tile.alloc_shared([BT, BT], IO)
            s_h = tile.alloc_shared([BV, K], IO)
            s_R = tile.alloc_shared([BT, BV], IO)
            s_q = tile.alloc_shared([BT, K], IO)
            s_q_head = tile.alloc_shared([BT], "float32")
            s_Aqk = tile.alloc_shared([BT, BT], IO)
            s_o = tile.alloc_shared([BT, BV], IO)
            b_o = tile.alloc_fragment([BV, BT], "float32")
            b_o_rows = tile.alloc_fragment([BT, BV], IO)
            b_S = tile.alloc_fragment([BV, K], "float32")
            b_Sd = tile.alloc_fragment([BV, K], IO)
            b_v = tile.alloc_fragment([BV, BT], IO)
            b_ES = tile.alloc_fragment([BV, BT], "float32")
            b_X = tile.alloc_fragment([BV, BT], IO)
            b_R = tile.alloc_fragment([BV, BT], "float32")
            b_Rd = tile.alloc_fragment([BV, BT], IO)
            b_outer = tile.alloc_fragment([BV, BT], IO)
            b_R_rows = tile.alloc_fragment([BT, BV], IO)
            # a thread's part of a result, in the order in which stores transpose it
            by_channels = tile.Fragment(
                [BT, BV],
                forward_thread_fn=lambda i, j: j // 16 * 32 + j % 8 * 4 + i % 8 // 2,
                forward_index_fn=lambda i, j: i // 8 * 4 + j % 16 // 8 * 2 + i % 2,
            )
            tile.annotate_layout({s_v: make_swizzled_layout(s_v), b_R_rows: by_channels, b_o_rows: by_channels})
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")
            x_gamma = tile.alloc_local([2], "float32")  # of a chunk, and of the next one
            x_gamma[1] = gamma_C[tile.min(i_first, NT - 1), i_h]

            for i, j in tile.Parallel(BV, K):
                b_S[i, j] = initial_state[i_n, i_h, j, i_v * BV + i]
            for i_t in tile.Pipelined(n_chunks, num_stages=2):
                i_c = i_first + i_t
                i_row = i_start + i_t * BT
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, :], s_k)
                tile.copy(v[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_v)
                tile.copy(k_head[i_c, i_h, :], s_k_head)
                tile.copy(A[i_c, i_h, :, :], s_A)
                tile.copy(k_tail[i_c, i_h, :], s_k_tail)
                tile.copy(q[i_b, i_row : i_row + BT, i_hq, :], s_q)
                tile.copy(q_head[i_c, i_h, :], s_q_head)
                tile.copy(Aqk[i_c, i_h, :, :], s_Aqk)

                x_gamma[0] = x_gamma[1]
                x_gamma[1] = gamma_C[i_first + tile.min(i_t + 1, n_chunks - 1), i_h]
                tile.copy(b_S, b_Sd)
                tile.wgmma_gemm(b_Sd, s_k, b_ES, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(b_Sd, s_q, b_o, transpose_B=True, clear_accum=True, policy=ROWS)
                # not as i_t % 2, which TileLang 0.1.15 takes for 101 of the threads where V is one tile
                if i_t // 2 * 2 == i_t:
                    tile.tma_store_wait(2)
                    tile.copy(b_Sd, s_h)
                    tile.tma_copy(s_h, h[i_block + i_t // 2, i_h, i_v * BV : (i_v + 1) * BV, :])
                for i, j in tile.Parallel(BV, BT):
                    b_v[i, j] = s_v[j, i]
                for i, j in tile.Parallel(BV, K):
                    b_S[i, j] *= x_gamma[0]
                tile.wait_wgmma(1)
                for i, j in tile.Parallel(BV, BT):
                    b_X[i, j] = tile.cast(b_v[i, j], "float32") - b_ES[i, j] * s_k_head[j]
                tile.wgmma_gemm(b_X, s_A, b_R, transpose_B=True, clear_accum=True, policy=ROWS)
                hold[0] = tile.cast(s_v[0, 0], "float32")
                hold[0] = tile.cast(s_k_head[0], "float32")

                tile.wait_wgmma(1)
                hold[0] = tile.cast(s_q[0, 0], "float32")

                for i, j in tile.Parallel(BV, BT):
                    b_o[i, j] *= s_q_head[j]
                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_A[0, 0], "float32")

                tile.copy(b_R, b_Rd)
                for i, j in tile.Parallel(BV, BT):
                    b_outer[i, j] = b_R[i, j] * s_k_tail[j]
                tile.wgmma_gemm(b_outer, s_k, b_S, policy=ROWS)
                tile.wgmma_gemm(b_Rd, s_Aqk, b_o, transpose_B=True, policy=ROWS)
                for i, j in tile.Parallel(BV, BT):
                    b_R_rows[j, i] = b_Rd[i, j]
                # of those stored since, a state may be or not
                tile.tma_store_wait(1)
                tile.copy(b_R_rows, s_R)
                tile.tma_copy(s_R, R[i_c, i_h, :, i_v * BV : (i_v + 1) * BV])
                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_k[0, 0], "float32")
                hold[0] = tile.cast(s_k_tail[0], "float32")
                hold[0] = tile.cast(s_Aqk[0, 0], "float32")
                hold[0] = tile.cast(s_q_head[0], "float32")

                for i, j in tile.Parallel(BV, BT):
                    b_o_rows[j, i] = b_o[i, j]
                tile.tma_store_wait(1)
                tile.copy(b_o_rows, s_o)
                tile.tma_copy(s_o, o[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV])

            tile.tma_store_wait(0)

    return scan_blocks2


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
    v, q, k, q_head, k_head, k_tail, gamma_C, A, Aqk, initial_state, o, h, R, *, n_sequences, T,
    HV, NS, segment, H
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(v, q, k, q_head, k_head, k_tail, gamma_C, A, Aqk, initial_state, o, h, R)
