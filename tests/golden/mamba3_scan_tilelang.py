"""Mamba-3's states and outputs, chunk by chunk of a sequence.

    P_ij  = decay_ij s_j <q_i, k_j>, i > j,   P_ii = lambda_i dt_i <q_i, k_i>
    y_i   = head_i S^T q_i + sum of P_ij v_j + D v_i,   out_i = y_i silu(z_i)
    S^T  <- S^T gamma_C + (v^T tail s) k

decay_ij is what the state keeps from token j to token i, head from the chunk's start to a token, tail from a token to
the chunk's end, gamma_C over all of it. One program per sequence, head and slice of values; the state is held transposed,
S^T [BV, N], in registers, and left for the backward as it is before each chunk. Rows of the other results are
tokens, so that scores are the left operand of the next product as they lie in registers. Rows after the last token are zeros.

The compiler gives the loads to a warp group of its own, and every tile a barrier: two programs share a multiprocessor.

    q            [B, T, H, N]  bf16  queries
    k            [B, T, H, N]  bf16  keys
    V            [B, T, H, P]  bf16  values
    within       [B, H, T]     fp32  scratch: log2 of the decay from the chunk's start to each token
    tail_decay   [B, H, T]     fp32  scratch: decay from each token to the chunk's end
    weight_s     [B, H, T]     fp32  scratch: s
    own_dt       [B, H, T]     fp32  scratch: lambda dt
    D            [H]           fp32  factor of a token's own value, added to o
    Z            [B, T, H, P]  bf16  output gate, before SiLU
    initial_ssm  [n, H, P, N]  fp32  state before the first token
    out          [B, T, H, P]  bf16  output
    ungated      [B, T, H, P]  bf16  output before its gate, y
    h            [M, H, P, N]  bf16  state at the chunk's start, transposed
    final_ssm    [n, H, P, N]  fp32  state after the last token

Problem: mamba3 K=128 V=64 bf16, angles=0, skip, gate, carried

Config:  BT=64 BV=64 keep=2 language=tilelang num_stages=2 num_warps=4
Template digest b96091b4f21d9d60; made by
    gdn2gen generate --dtype bf16 --with=angles:0,skip,gate,carried --stage mamba3_scan --config \
      BT=64,BV=64,keep=2,language=tilelang,num_stages=2,num_warps=4
"""

from functools import cache


N, P = 128, 64
BT, BV = 64, 64
IO = "bfloat16"
# exp2 and rsqrt by the hardware, flushing what is below 2^-126 to zero
PASSES = {"tl.enable_fast_math": True}


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile
    from tilelang.layout import make_swizzled_layout

    B, T, H, M = (
        tile.dynamic(name) for name in ("B", "T", "H", "M")
    )
    # a warp keeps whole rows, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def mamba3_scan(
        q: tile.Tensor([B, T, H, N], "bfloat16"),
        k: tile.Tensor([B, T, H, N], "bfloat16"),
        V: tile.Tensor([B, T, H, P], "bfloat16"),
        within: tile.Tensor([B, H, T], "float32"),
        tail_decay: tile.Tensor([B, H, T], "float32"),
        weight_s: tile.Tensor([B, H, T], "float32"),
        own_dt: tile.Tensor([B, H, T], "float32"),
        D: tile.Tensor([H], "float32"),
        Z: tile.Tensor([B, T, H, P], "bfloat16"),
        initial_ssm: tile.Tensor([B, H, P, N], "float32"),
        out: tile.Tensor([B, T, H, P], "bfloat16"),
        ungated: tile.Tensor([B, T, H, P], "bfloat16"),
        h: tile.Tensor([M, H, P, N], "bfloat16"),
        final_ssm: tile.Tensor([B, H, P, N], "float32"),
    ):
        # three dims: divisions in every address would be most of the instructions
        with tile.Kernel(P // BV, H, B, threads=128) as (i_v, i_h, i_n):
            # 2 programs to a multiprocessor: 128 registers a thread, of which the loads need few
            tile.annotate_min_blocks_per_sm(2)
            tile.annotate_producer_reg_dealloc(24)
            tile.annotate_consumer_reg_alloc(232)

            n_chunks = tile.ceildiv(T, BT)

            s_q = tile.alloc_shared([BT, N], IO)
            s_k = tile.alloc_shared([BT, N], IO)
            s_V = tile.alloc_shared([BT, BV], IO)
            s_within = tile.alloc_shared([BT], "float32")
            s_tail_decay = tile.alloc_shared([BT], "float32")
            s_weight_s = tile.alloc_shared([BT], "float32")
            s_own_dt = tile.alloc_shared([BT], "float32")
            # the state as products read it
            s_h = tile.alloc_shared([BV, N], IO)
            b_h = tile.alloc_fragment([BV, N], IO)
            b_S = tile.alloc_fragment([BV, N], "float32")
            b_added = tile.alloc_fragment([BV, BT], "float32")
            b_outer = tile.alloc_fragment([BV, BT], IO)
            b_P = tile.alloc_fragment([BT, BT], "float32")
            b_Pd = tile.alloc_fragment([BT, BT], IO)
            b_o = tile.alloc_fragment([BT, BV], "float32")
            b_od = tile.alloc_fragment([BT, BV], IO)
            s_out = tile.alloc_shared([BT, BV], IO)
            x_gamma = tile.alloc_local([1], "float32")
            x_skip = tile.alloc_local([1], "float32")
            b_zd = tile.alloc_fragment([BT, BV], IO)
            b_z = tile.alloc_fragment([BT, BV], "float32")
            b_sigmoid = tile.alloc_fragment([BT, BV], "float32")
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")
            x_skip[0] = D[i_h]

            for i, j in tile.Parallel(BV, N):
                b_S[i, j] = initial_ssm[i_n, i_h, i_v * BV + i, j]
            for i_t in tile.Pipelined(n_chunks, num_stages=2):
                i_row = i_t * BT
                tile.copy(q[i_n, i_row : i_row + BT, i_h, :], s_q)
                tile.copy(k[i_n, i_row : i_row + BT, i_h, :], s_k)
                tile.copy(within[i_n, i_h, i_row : i_row + BT], s_within)
                tile.copy(tail_decay[i_n, i_h, i_row : i_row + BT], s_tail_decay)
                tile.copy(weight_s[i_n, i_h, i_row : i_row + BT], s_weight_s)
                tile.copy(own_dt[i_n, i_h, i_row : i_row + BT], s_own_dt)
                tile.copy(V[i_n, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_V)

                # straight to registers, long before it is needed
                for i, j in tile.Parallel(BT, BV):
                    b_zd[i, j] = tile.if_then_else(i_row + i < T, Z[i_n, i_row + i, i_h, i_v * BV + j], 0)
                for i, j in tile.Parallel(BV, BT):
                    b_outer[i, j] = s_V[j, i]
                tile.copy(b_S, b_h)
                tile.tma_store_wait(2)
                tile.copy(b_h, s_h)
                tile.tma_copy(s_h, h[i_n * n_chunks + i_t, i_h, i_v * BV : (i_v + 1) * BV, :])
                # What waits for loads comes before products, which would be waited for there, and so does what
                # makes their operands.
                hold[0] = s_own_dt[0]
                # over all of the chunk, which may end early
                x_gamma[0] = tile.exp2(s_within[tile.min(T - i_row, BT) - 1])
                for i, j in tile.Parallel(BV, BT):
                    b_added[i, j] = tile.cast(b_outer[i, j], "float32") * (s_tail_decay[j] * s_weight_s[j])
                tile.copy(b_added, b_outer)
                hold[0] = s_tail_decay[0]
                for i, j in tile.Parallel(BV, N):
                    b_S[i, j] *= x_gamma[0]
                tile.wgmma_gemm(s_q, s_k, b_P, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(s_q, s_h, b_o, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(b_outer, s_k, b_S, policy=ROWS)
                tile.wait_wgmma(2)

                for i, j in tile.Parallel(BT, BT):
                    b_P[i, j] *= tile.if_then_else(i > j, tile.exp2(s_within[i] - s_within[j]) * s_weight_s[j], tile.if_then_else(i == j, s_own_dt[i], 0.0))
                tile.copy(b_P, b_Pd)
                tile.wait_wgmma(1)
                hold[0] = tile.cast(s_q[0, 0], "float32")

                for i, j in tile.Parallel(BT, BV):
                    b_o[i, j] = b_o[i, j] * tile.exp2(s_within[i]) + tile.cast(s_V[i, j], "float32") * x_skip[0]
                hold[0] = s_within[0]
                hold[0] = s_weight_s[0]
                hold[0] = s_own_dt[0]
                tile.copy(b_zd, b_z)
                tile.wgmma_gemm(b_Pd, s_V, b_o, policy=ROWS)
                tile.wait_wgmma(1)
                hold[0] = tile.cast(s_k[0, 0], "float32")

                # meanwhile
                for i, j in tile.Parallel(BT, BV):
                    b_sigmoid[i, j] = tile.rsqrt(1.0 + tile.exp2(b_z[i, j] * -1.4426950408889634))
                    b_sigmoid[i, j] *= b_sigmoid[i, j]
                    b_sigmoid[i, j] *= b_z[i, j]

                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_V[0, 0], "float32")

                tile.copy(b_o, b_od)
                tile.tma_store_wait(1)
                tile.copy(b_od, s_out)
                tile.tma_copy(s_out, ungated[i_n, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV])
                for i, j in tile.Parallel(BT, BV):
                    b_o[i, j] *= b_sigmoid[i, j]
                tile.copy(b_o, b_od)
                tile.tma_store_wait(0)
                tile.copy(b_od, s_out)
                tile.tma_copy(s_out, out[i_n, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV])
            tile.tma_store_wait(0)

            for i, j in tile.Parallel(BV, N):
                final_ssm[i_n, i_h, i_v * BV + i, j] = b_S[i, j]

    return mamba3_scan


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


def launch(
    q, k, V, within, tail_decay, weight_s, own_dt, D, Z, initial_ssm, out, ungated, h,
    final_ssm, *, T
):
    """Launch one program per sequence, head and slice of values on the current stream."""
    compiled()(q, k, V, within, tail_decay, weight_s, own_dt, D, Z, initial_ssm, out, ungated,
        h, final_ssm)
