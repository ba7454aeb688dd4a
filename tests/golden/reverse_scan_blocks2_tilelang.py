"""Carry the gradient of the state through the chunks of a sequence, last to first; dv and dw.

One program per sequence, value head and slice of V; the mirror of the scan, with the gradient of
the state held transposed, dS^T [BV, K]. What the last of every 2 chunks ends with is written out. The compiler gives the loads to a warp group of its own,
which fills 2 stages of shared memory ahead of the products.

    dR^T = dO^T Aqk + dS^T Ktail^T        dX^T = dR^T A
    dS^T <- dS^T Diag(gamma_C) + dO^T Qg + dR^T Y          Y = -A E
    dv = dX w         dw = dX v

    v        [B, T, HV, V]     bf16  values
    w        [B, T, HV, V]     bf16  write gate
    Qg       [NT, HV, BT, K]   bf16  queries, scaled and decayed from the chunk's start
    Y        [NT, HV, BT, K]   bf16  erasing keys through the inverse, -A E
    Ktail    [NT, HV, BT, K]   bf16  keys, decayed to the chunk's end
    gamma_C  [NT, HV, K]       fp32  decay of the whole chunk
    A        [NT, HV, BT, BT]  bf16  inverse of I + T, lower triangle
    Aqk      [NT, HV, BT, BT]  bf16  decayed scores, lower triangle
    do       [B, T, HV, V]     bf16  gradient of o
    dh       [NT2, HV, V, K]   bf16  gradient of the state at the block's end, transposed
    dX       [NT, HV, BT, V]   bf16  gradient of X = w v - E S, where R = A X
    dv       [B, T, HV, V]     bf16  gradient of v
    dw       [B, T, HV, V]     bf16  gradient of w
    z_dot    [NT, HV, BT, NZ]  fp32  <dX, w v>, by 16 values

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm
Config:  BT=32 BV=64 language=tilelang num_stages=2 num_warps=4 segments=serial
Template digest 7c54915f5f849df9; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with= --stage reverse_scan_blocks2 --config \
      BT=32,BV=64,language=tilelang,num_stages=2,num_warps=4,segments=serial
"""

from functools import cache


K, V = 128, 128
BT, BV = 32, 64
IO = "bfloat16"


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, HV, NT, NT2, NZ = (
        tile.dynamic(name) for name in ("B", "T", "HV", "NT", "NT2", "NZ")
    )
    from tilelang.layout import make_swizzled_layout

    # a warp keeps whole rows of the state, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def reverse_scan_blocks2(
        v: tile.Tensor([B, T, HV, V], "bfloat16"),
        w: tile.Tensor([B, T, HV, V], "bfloat16"),
        Qg: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        Y: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        Ktail: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        gamma_C: tile.Tensor([NT, HV, K], "float32"),
        A: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        do: tile.Tensor([B, T, HV, V], "bfloat16"),
        dh: tile.Tensor([NT2, HV, V, K], "bfloat16"),
        dX: tile.Tensor([NT, HV, BT, V], "bfloat16"),
        dv: tile.Tensor([B, T, HV, V], "bfloat16"),
        dw: tile.Tensor([B, T, HV, V], "bfloat16"),
        z_dot: tile.Tensor([NT, HV, BT, NZ], "float32"),
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
            s_do = tile.alloc_shared([BT, BV], IO)
            s_Qg = tile.alloc_shared([BT, K], IO)
            s_Y = tile.alloc_shared([BT, K], IO)
            s_Ktail = tile.alloc_shared([BT, K], IO)
            s_A = tile.alloc_shared([BT, BT], IO)
            s_Aqk = tile.alloc_shared([BT, BT], IO)
            s_gamma = tile.alloc_shared([K], "float32")
            s_dh = tile.alloc_shared([BV, K], IO)
            s_dX = tile.alloc_shared([BT, BV], IO)
            s_w = tile.alloc_shared([BT, BV], IO)
            s_v = tile.alloc_shared([BT, BV], IO)
            s_dv = tile.alloc_shared([BT, BV], IO)
            s_dw = tile.alloc_shared([BT, BV], IO)
            b_dS = tile.alloc_fragment([BV, K], "float32")
            b_dSd = tile.alloc_fragment([BV, K], IO)
            b_dR = tile.alloc_fragment([BV, BT], "float32")
            b_dRd = tile.alloc_fragment([BV, BT], IO)
            b_dX = tile.alloc_fragment([BV, BT], "float32")
            b_dXd = tile.alloc_fragment([BV, BT], IO)
            b_dX_rows = tile.alloc_fragment([BT, BV], IO)
            b_dv_rows = tile.alloc_fragment([BT, BV], IO)
            b_dw_rows = tile.alloc_fragment([BT, BV], IO)
            b_products = tile.alloc_fragment([BV // 16, 16, BT], "float32")
            b_z = tile.alloc_fragment([BV // 16, BT], "float32")
            # a thread's part of a result, in the order in which stores transpose it
            by_channels = tile.Fragment(
                [BT, BV],
                forward_thread_fn=lambda i, j: j // 16 * 32 + j % 8 * 4 + i % 8 // 2,
                forward_index_fn=lambda i, j: i // 8 * 4 + j % 16 // 8 * 2 + i % 2,
            )
            tile.annotate_layout({s_w: make_swizzled_layout(s_w), s_v: make_swizzled_layout(s_v), b_dX_rows: by_channels, b_dv_rows: by_channels, b_dw_rows: by_channels})
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
                tile.copy(A[i_c, i_h, :, :], s_A)
                tile.copy(gamma_C[i_c, i_h, :], s_gamma)
                tile.copy(Qg[i_c, i_h, :, :], s_Qg)
                tile.copy(Y[i_c, i_h, :, :], s_Y)
                tile.copy(w[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_w)
                tile.copy(v[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_v)

                tile.copy(b_dS, b_dSd)
                tile.wgmma_gemm(s_do, s_Aqk, b_dR, transpose_A=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(b_dSd, s_Ktail, b_dR, transpose_B=True, policy=ROWS)
                # where a block ends
                if i_t % 2 == 1 or i_back == 0:
                    tile.tma_store_wait(3)
                    tile.copy(b_dSd, s_dh)
                    tile.tma_copy(s_dh, dh[i_block + i_t // 2, i_h, i_v * BV : (i_v + 1) * BV, :])
                for i, j in tile.Parallel(BV, K):
                    b_dS[i, j] *= s_gamma[j]
                tile.wgmma_gemm(s_do, s_Qg, b_dS, transpose_A=True, policy=ROWS)
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
                for i, j in tile.Parallel(BV, BT):
                    b_dv_rows[j, i] = tile.cast(b_dX[i, j] * tile.cast(s_w[j, i], "float32"), IO)
                    b_dw_rows[j, i] = tile.cast(b_dX[i, j] * tile.cast(s_v[j, i], "float32"), IO)
                    b_products[i // 16, i % 16, j] = (
                        b_dX[i, j] * tile.cast(s_v[j, i], "float32") * tile.cast(s_w[j, i], "float32")
                    )
                # by 16 rows, which a warp has all of: no warp waits for another
                tile.reduce_sum(b_products, b_z, dim=1)
                for i, j in tile.Parallel(BV // 16, BT):
                    z_dot[i_c, i_h, j, i_v * (BV // 16) + i] = b_z[i, j]
                hold[0] = tile.cast(s_w[0, 0], "float32")
                hold[0] = tile.cast(s_v[0, 0], "float32")

                tile.tma_store_wait(0)
                tile.copy(b_dX_rows, s_dX)
                tile.copy(b_dv_rows, s_dv)
                tile.copy(b_dw_rows, s_dw)
                tile.tma_copy(s_dX, dX[i_c, i_h, :, i_v * BV : (i_v + 1) * BV])
                tile.tma_copy(s_dv, dv[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV])
                tile.tma_copy(s_dw, dw[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV])
                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_Y[0, 0], "float32")
                hold[0] = tile.cast(s_gamma[0], "float32")

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
    v, w, Qg, Y, Ktail, gamma_C, A, Aqk, do, dh, dX, dv, dw, z_dot, *, n_sequences, T, HV, NS,
    segment
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(v, w, Qg, Y, Ktail, gamma_C, A, Aqk, do, dh, dX, dv, dw, z_dot)
