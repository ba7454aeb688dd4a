"""Scan the chunks of a sequence in order, keeping what the backward needs.

One program per sequence, value head and slice of V; the state is held transposed, S^T [BV, K], so
that it is the left operand of every product and never leaves the registers. What each chunk starts
from and adds is written out, so that the backward has no scan to redo. The compiler gives the loads to
a warp group of its own, which fills 2 stages of shared memory ahead of the products.

    R^T = (w v)^T A^T + S^T Y^T          Y = -A E
    O^T = S^T Qg^T + R^T Aqk^T
    S^T <- S^T Diag(gamma_C) + R^T Ktail

    v        [B, T, HV, V]     bf16  values
    w        [B, T, HV, V]     bf16  write gate
    Qg       [NT, HV, BT, K]   bf16  queries, scaled and decayed from the chunk's start
    Y        [NT, HV, BT, K]   bf16  erasing keys through the inverse, -A E
    Ktail    [NT, HV, BT, K]   bf16  keys, decayed to the chunk's end
    gamma_C  [NT, HV, K]       fp32  decay of the whole chunk
    A        [NT, HV, BT, BT]  bf16  inverse of I + T, lower triangle
    Aqk      [NT, HV, BT, BT]  bf16  decayed scores, lower triangle
    o        [B, T, HV, V]     bf16  output
    h        [NT, HV, V, K]    bf16  state at the chunk's start, transposed
    R        [NT, HV, BT, V]   bf16  what each token adds to the state

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm
Config:  BT=32 BV=64 language=tilelang num_stages=2 num_warps=4 segments=serial
Template digest 56a959d52661441d; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with= --stage scan_states --config \
      BT=32,BV=64,language=tilelang,num_stages=2,num_warps=4,segments=serial
"""

from functools import cache


K, V = 128, 128
BT, BV = 32, 64
IO = "bfloat16"


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, HV, NT = (
        tile.dynamic(name) for name in ("B", "T", "HV", "NT")
    )
    # a warp keeps whole rows of the state, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def scan_states(
        v: tile.Tensor([B, T, HV, V], "bfloat16"),
        w: tile.Tensor([B, T, HV, V], "bfloat16"),
        Qg: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        Y: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        Ktail: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        gamma_C: tile.Tensor([NT, HV, K], "float32"),
        A: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        o: tile.Tensor([B, T, HV, V], "bfloat16"),
        h: tile.Tensor([NT, HV, V, K], "bfloat16"),
        R: tile.Tensor([NT, HV, BT, V], "bfloat16"),
        segment: tile.int32,
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

            s_v = tile.alloc_shared([BT, BV], IO)
            s_w = tile.alloc_shared([BT, BV], IO)
            s_Z = tile.alloc_shared([BT, BV], IO)
            s_Y = tile.alloc_shared([BT, K], IO)
            s_Ktail = tile.alloc_shared([BT, K], IO)
            s_A = tile.alloc_shared([BT, BT], IO)
            s_gamma = tile.alloc_shared([K], "float32")
            s_h = tile.alloc_shared([BV, K], IO)
            s_R = tile.alloc_shared([BT, BV], IO)
            s_Qg = tile.alloc_shared([BT, K], IO)
            s_Aqk = tile.alloc_shared([BT, BT], IO)
            s_o = tile.alloc_shared([BT, BV], IO)
            b_o = tile.alloc_fragment([BV, BT], "float32")
            b_o_rows = tile.alloc_fragment([BT, BV], IO)
            b_S = tile.alloc_fragment([BV, K], "float32")
            b_Sd = tile.alloc_fragment([BV, K], IO)
            b_R = tile.alloc_fragment([BV, BT], "float32")
            b_Rd = tile.alloc_fragment([BV, BT], IO)
            b_R_rows = tile.alloc_fragment([BT, BV], IO)
            # a thread's part of a result, in the order in which stores transpose it
            by_channels = tile.Fragment(
                [BT, BV],
                forward_thread_fn=lambda i, j: j // 16 * 32 + j % 8 * 4 + i % 8 // 2,
                forward_index_fn=lambda i, j: i // 8 * 4 + j % 16 // 8 * 2 + i % 2,
            )
            tile.annotate_layout({b_R_rows: by_channels, b_o_rows: by_channels})
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")

            tile.clear(b_S)
            for i_t in tile.Pipelined(n_chunks, num_stages=2):
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
                tile.tma_store_wait(2)
                tile.copy(b_Sd, s_h)
                tile.tma_copy(s_h, h[i_c, i_h, i_v * BV : (i_v + 1) * BV, :])
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
                for i, j in tile.Parallel(BV, BT):
                    b_R_rows[j, i] = b_Rd[i, j]
                tile.tma_store_wait(2)
                tile.copy(b_R_rows, s_R)
                tile.tma_copy(s_R, R[i_c, i_h, :, i_v * BV : (i_v + 1) * BV])
                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_Ktail[0, 0], "float32")
                hold[0] = tile.cast(s_Aqk[0, 0], "float32")
                hold[0] = tile.cast(s_gamma[0], "float32")

                for i, j in tile.Parallel(BV, BT):
                    b_o_rows[j, i] = b_o[i, j]
                tile.tma_store_wait(2)
                tile.copy(b_o_rows, s_o)
                tile.tma_copy(s_o, o[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV])

            tile.tma_store_wait(0)

    return scan_states


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
    v, w, Qg, Y, Ktail, gamma_C, A, Aqk, o, h, R, *, n_sequences, T, HV, NS, segment
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(v, w, Qg, Y, Ktail, gamma_C, A, Aqk, o, h, R, segment)
