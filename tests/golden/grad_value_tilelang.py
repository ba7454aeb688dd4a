"""The value side of the gradients: dv, dw, and the gradients of the two score matrices.

    dv   = dX w         dw = dX v                   X = w v - (gamma b k) S, R = A X
    dT   = -strict lower triangle of dX R^T         dAqk = strict lower triangle of dO R^T
    <q, dq> = <dO, O>   <k, dk> = <dX, 2 R - w v>   what the backward of the norms projects out

One program per CHUNKS chunks and value head. The compiler gives the loads to a warp group of its own,
and every tile a barrier of its own.

    v              [B, T, HV, V]     bf16  values
    w              [B, T, HV, V]     bf16  write gate
    R              [NT, HV, BT, V]   bf16  what each token adds to the state
    dX             [NT, HV, BT, V]   bf16  gradient of X = w v - E S, where R = A X
    dX_rest        [NT, HV, BT, V]   bf16  what rounding dX to 16 bits left
    do             [B, T, HV, V]     bf16  gradient of o
    o              [B, T, HV, V]     bf16  output
    dT             [NT, HV, BT, BT]  bf16  gradient of T, strict lower triangle
    dAqk           [NT, HV, BT, BT]  bf16  gradient of Aqk, strict lower triangle
    dAqk_diagonal  [NT, HV, BT]      fp32  gradient of Aqk's diagonal: <do, R>
    dv             [B, T, HV, V]     bf16  gradient of v
    dw             [B, T, HV, V]     bf16  gradient of w
    q_dot          [NT, HV, BT]      fp32  <q, dq> of the normalised q
    k_dot          [NT, HV, BT]      fp32  <k, dk> of the normalised k

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm
Config:  BT=32 BV=128 chunks=4 language=tilelang maxnreg=80 num_stages=1 num_warps=4
Template digest f10409c937f61b68; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with= --stage grad_value --config \
      BT=32,BV=128,chunks=4,language=tilelang,maxnreg=80,num_stages=1,num_warps=4
"""

from functools import cache


V = 128
BT, CHUNKS = 32, 4
IO = "bfloat16"


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, HV, NT = (
        tile.dynamic(name) for name in ("B", "T", "HV", "NT")
    )

    @tile.prim_func
    def grad_value(
        v: tile.Tensor([B, T, HV, V], "bfloat16"),
        w: tile.Tensor([B, T, HV, V], "bfloat16"),
        R: tile.Tensor([NT, HV, BT, V], "bfloat16"),
        dX: tile.Tensor([NT, HV, BT, V], "bfloat16"),
        dX_rest: tile.Tensor([NT, HV, BT, V], "bfloat16"),
        do: tile.Tensor([B, T, HV, V], "bfloat16"),
        o: tile.Tensor([B, T, HV, V], "bfloat16"),
        dT: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        dAqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        dAqk_diagonal: tile.Tensor([NT, HV, BT], "float32"),
        dv: tile.Tensor([B, T, HV, V], "bfloat16"),
        dw: tile.Tensor([B, T, HV, V], "bfloat16"),
        q_dot: tile.Tensor([NT, HV, BT], "float32"),
        k_dot: tile.Tensor([NT, HV, BT], "float32"),
    ):
        with tile.Kernel(
            tile.ceildiv(tile.ceildiv(T, BT), CHUNKS), HV, B, threads=128
        ) as (i_x, i_h, i_b):
            n_chunks = tile.ceildiv(T, BT)

            # 3 programs to a multiprocessor: 80 registers a thread, of which the loads need few
            tile.annotate_min_blocks_per_sm(3)
            tile.annotate_producer_reg_dealloc(24)
            tile.annotate_consumer_reg_alloc(136)

            i_first = i_x * CHUNKS

            s_v = tile.alloc_shared([BT, V], IO)
            s_w = tile.alloc_shared([BT, V], IO)
            s_R = tile.alloc_shared([BT, V], IO)
            s_dX = tile.alloc_shared([BT, V], IO)
            s_dX_rest = tile.alloc_shared([BT, V], IO)
            s_do = tile.alloc_shared([BT, V], IO)
            s_o = tile.alloc_shared([BT, V], IO)
            s_dv = tile.alloc_shared([BT, V], IO)
            s_dw = tile.alloc_shared([BT, V], IO)
            b_dX = tile.alloc_fragment([BT, V], "float32")
            b_dT = tile.alloc_fragment([BT, BT], "float32")
            b_dAqk = tile.alloc_fragment([BT, BT], "float32")
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")
            b_q = tile.alloc_fragment([BT, V], "float32")
            b_k = tile.alloc_fragment([BT, V], "float32")
            b_q_dot = tile.alloc_fragment([BT], "float32")
            b_k_dot = tile.alloc_fragment([BT], "float32")

            for i_n in tile.Pipelined(
                tile.min(CHUNKS, n_chunks - i_first), num_stages=1
            ):
                i_c = i_b * n_chunks + i_first + i_n
                i_row = (i_first + i_n) * BT

                tile.copy(dX[i_c, i_h, :, :], s_dX)
                tile.copy(R[i_c, i_h, :, :], s_R)
                tile.copy(do[i_b, i_row : i_row + BT, i_h, :], s_do)
                tile.copy(o[i_b, i_row : i_row + BT, i_h, :], s_o)
                tile.copy(w[i_b, i_row : i_row + BT, i_h, :], s_w)
                tile.copy(v[i_b, i_row : i_row + BT, i_h, :], s_v)
                tile.copy(dX_rest[i_c, i_h, :, :], s_dX_rest)

                tile.clear(b_dT)
                tile.gemm(s_dX, s_R, b_dT, transpose_B=True)
                tile.clear(b_dAqk)
                tile.gemm(s_do, s_R, b_dAqk, transpose_B=True)
                for i, j in tile.Parallel(BT, BT):
                    dT[i_c, i_h, i, j] = tile.if_then_else(i > j, -b_dT[i, j], 0.0)
                    dAqk[i_c, i_h, i, j] = tile.if_then_else(i > j, b_dAqk[i, j], 0.0)
                    if i == j:
                        dAqk_diagonal[i_c, i_h, i] = b_dAqk[i, j]
                for i, j in tile.Parallel(BT, V):
                    b_dX[i, j] = tile.cast(s_dX[i, j], "float32") + tile.cast(s_dX_rest[i, j], "float32")
                # what the last chunk stores from these tiles is on its way meanwhile
                tile.tma_store_wait(0)
                tile.sync_threads()
                for i, j in tile.Parallel(BT, V):
                    s_dv[i, j] = b_dX[i, j] * tile.cast(s_w[i, j], "float32")
                    s_dw[i, j] = b_dX[i, j] * tile.cast(s_v[i, j], "float32")
                for i, j in tile.Parallel(BT, V):
                    b_q[i, j] = tile.cast(s_do[i, j], "float32") * tile.cast(s_o[i, j], "float32")
                for i, j in tile.Parallel(BT, V):
                    b_k[i, j] = b_dX[i, j] * (
                        2.0 * tile.cast(s_R[i, j], "float32")
                        - tile.cast(s_v[i, j], "float32") * tile.cast(s_w[i, j], "float32")
                    )
                tile.reduce_sum(b_q, b_q_dot, dim=1)
                tile.reduce_sum(b_k, b_k_dot, dim=1)
                for i in tile.Parallel(BT):
                    q_dot[i_c, i_h, i] = b_q_dot[i]
                    k_dot[i_c, i_h, i] = b_k_dot[i]
                tile.sync_threads()
                hold[0] = tile.cast(s_v[0, 0], "float32")
                hold[0] = tile.cast(s_w[0, 0], "float32")
                hold[0] = tile.cast(s_R[0, 0], "float32")
                hold[0] = tile.cast(s_dX[0, 0], "float32")
                hold[0] = tile.cast(s_dX_rest[0, 0], "float32")
                hold[0] = tile.cast(s_do[0, 0], "float32")
                hold[0] = tile.cast(s_o[0, 0], "float32")

                tile.tma_copy(s_dv, dv[i_b, i_row : i_row + BT, i_h, :])
                tile.tma_copy(s_dw, dw[i_b, i_row : i_row + BT, i_h, :])
            tile.tma_store_wait(0)

    return grad_value


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
    v, w, R, dX, dX_rest, do, o, dT, dAqk, dAqk_diagonal, dv, dw, q_dot, k_dot, *, n_chunks, T,
    HV
):
    """Launch one program per CHUNKS chunks and value head on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(
        v, w, R, dX, dX_rest, do, o, dT, dAqk, dAqk_diagonal, dv, dw, q_dot, k_dot
    )
