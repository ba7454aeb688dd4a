"""Carry the gradient of the state through the chunks of a sequence, last to first.

One program per sequence, value head and slice of V; the mirror of the scan, with the gradient of
the state held transposed, dS^T [BV, K]. The compiler gives the loads to a warp group of its own,
which fills 2 stages of shared memory ahead of the products.

    dv^T = dO^T Aqk + dS^T Ktail^T
    dS^T <- dS^T Diag(gamma_C) + dO^T Qg

    Qg       [NT, HV, BT, K]   bf16  queries, scaled and decayed from the chunk's start
    Ktail    [NT, HV, BT, K]   bf16  keys, decayed to the chunk's end
    gamma_C  [NT, HV, K]       fp32  decay of the whole chunk
    Aqk      [NT, HV, BT, BT]  bf16  decayed scores, lower triangle
    do       [B, T, HV, V]     bf16  gradient of o
    dh       [NT, HV, V, K]    bf16  gradient of the state at the chunk's end, transposed
    dv       [B, T, HV, V]     bf16  gradient of v

Problem: gla K=128 V=128 bf16, g fp32
Config:  BT=32 BV=64 language=tilelang num_stages=2 num_warps=4 segments=serial
Template digest 64a507d7ca73a44d; made by
    gdn2gen generate --op gla --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with= --stage reverse_scan --config \
      BT=32,BV=64,language=tilelang,num_stages=2,num_warps=4,segments=serial
"""

from functools import cache


K, V = 128, 128
BT, BV = 32, 64
IO = "bfloat16"


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    NT, HV, B, T = (
        tile.dynamic(name) for name in ("NT", "HV", "B", "T")
    )
    # a warp keeps whole rows of the state, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def reverse_scan(
        Qg: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        Ktail: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        gamma_C: tile.Tensor([NT, HV, K], "float32"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        do: tile.Tensor([B, T, HV, V], "bfloat16"),
        dh: tile.Tensor([NT, HV, V, K], "bfloat16"),
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

            s_do = tile.alloc_shared([BT, BV], IO)
            s_Qg = tile.alloc_shared([BT, K], IO)
            s_Ktail = tile.alloc_shared([BT, K], IO)
            s_Aqk = tile.alloc_shared([BT, BT], IO)
            s_gamma = tile.alloc_shared([K], "float32")
            s_dh = tile.alloc_shared([BV, K], IO)
            s_dX = tile.alloc_shared([BT, BV], IO)
            b_dS = tile.alloc_fragment([BV, K], "float32")
            b_dSd = tile.alloc_fragment([BV, K], IO)
            b_dR = tile.alloc_fragment([BV, BT], "float32")
            b_dXd = tile.alloc_fragment([BV, BT], IO)
            b_dX_rows = tile.alloc_fragment([BT, BV], IO)
            # a thread's part of a result, in the order in which stores transpose it
            by_channels = tile.Fragment(
                [BT, BV],
                forward_thread_fn=lambda i, j: j // 16 * 32 + j % 8 * 4 + i % 8 // 2,
                forward_index_fn=lambda i, j: i // 8 * 4 + j % 16 // 8 * 2 + i % 2,
            )
            tile.annotate_layout({b_dX_rows: by_channels})
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")

            tile.clear(b_dS)
            for i_back in tile.Pipelined(n_chunks, num_stages=2):
                i_t = n_chunks - 1 - i_back
                i_c = i_first + i_t
                i_row = i_start + i_t * BT
                tile.copy(do[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_do)
                tile.copy(Aqk[i_c, i_h, :, :], s_Aqk)
                tile.copy(Ktail[i_c, i_h, :, :], s_Ktail)
                tile.copy(gamma_C[i_c, i_h, :], s_gamma)
                tile.copy(Qg[i_c, i_h, :, :], s_Qg)

                tile.copy(b_dS, b_dSd)
                tile.wgmma_gemm(s_do, s_Aqk, b_dR, transpose_A=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(b_dSd, s_Ktail, b_dR, transpose_B=True, policy=ROWS)
                tile.tma_store_wait(1)
                tile.copy(b_dSd, s_dh)
                tile.tma_copy(s_dh, dh[i_c, i_h, i_v * BV : (i_v + 1) * BV, :])
                for i, j in tile.Parallel(BV, K):
                    b_dS[i, j] *= s_gamma[j]
                tile.wgmma_gemm(s_do, s_Qg, b_dS, transpose_A=True, policy=ROWS)
                tile.wait_wgmma(1)
                hold[0] = tile.cast(s_Aqk[0, 0], "float32")
                hold[0] = tile.cast(s_Ktail[0, 0], "float32")

                tile.copy(b_dR, b_dXd)
                for i, j in tile.Parallel(BV, BT):
                    b_dX_rows[j, i] = b_dXd[i, j]
                tile.tma_store_wait(1)
                tile.copy(b_dX_rows, s_dX)
                tile.tma_copy(s_dX, dv[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV])

                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_do[0, 0], "float32")
                hold[0] = tile.cast(s_Qg[0, 0], "float32")
                hold[0] = tile.cast(s_gamma[0], "float32")

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
    Qg, Ktail, gamma_C, Aqk, do, dh, dv, *, n_sequences, T, HV, NS, segment
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(Qg, Ktail, gamma_C, Aqk, do, dh, dv)
