"""Gated DeltaNet-2 over whole sequences, for one problem; needs only torch and triton.

Per head, with the state S in R^{K x V} and elementwise `*` (arXiv 2605.22791):

    S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T
    o_t = scale * S_t^T q_t

Sizes, as the buffers below are given:

    B batch          T tokens of a sequence (of the whole packed batch; B = 1)
    H heads of q, k  HV heads of v, w, o     HG heads of g, b (H or HV)
    K, V head dims   N sequences             NT chunks over all sequences, BT tokens each
    NS segments of a sequence, `segment` chunks each
    NT2 blocks of 2 chunks over all sequences

Problem: gdn2 K=64 V=32 fp16, g fp32, l2norm, softplus gate, packed sequences
Plan:    blocks2_states
    forward   prepare, scan_blocks2
    backward  reverse_scan_blocks2, grad_blocks2

Each stage is a module beside this one, which says what it computes and with which config. All were
made by
    gdn2gen generate --out DIR --op gdn2 --head-dim 64,32 --dtype fp16 --gate-dtype fp32 --gate \
      softplus --with=A_log,dt_bias,varlen --level fast
"""

import hashlib

import torch
import triton

from . import (
    chunk_tables,
    grad_blocks2,
    prepare,
    reverse_scan_blocks2,
    scan_blocks2,
)

__all__ = ["chunk_gdn2"]

K, V = 64, 32
BT, NB = 32, 2  # tokens of a chunk, sub-blocks of 16 tokens in it
DTYPE, GATE_DTYPE = torch.float16, torch.float32


def _check_made_for_this(**digests):
    """Raise ImportError for a module of another package, whose buffers are of other sizes.

    What a module was made for is told by its docstring, however its lines are spaced.
    """
    for stage, digest in digests.items():
        made_for = globals()[stage].__doc__  # None under python -OO
        if made_for is None:
            continue
        words = " ".join(made_for.split())
        if hashlib.sha256(words.encode()).hexdigest()[:16] != digest:
            raise ImportError(
                f"{stage}.py and __init__.py of {__name__} were generated for different packages; "
                "generate them anew, with the command at the head of __init__.py"
            )


_check_made_for_this(
    chunk_tables="c0c6ab53b78cb5b2",
    grad_blocks2="f525fa3297be0358",
    prepare="5f9ed5524a5266fb",
    reverse_scan_blocks2="02322d86df9220d0",
    scan_blocks2="d745195e373e0ab3",
)


def chunk_gdn2(
    q,
    k,
    v,
    g,
    b,
    w,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=True,
    use_gate_in_kernel=True,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    lower_bound=None,
    state_v_first=False,
    A_log=None,
    dt_bias=None,
):
    """Return o [B, T, HV, V] and the final state (None unless asked for); differentiable.

    q: [B, T, H, K], queries; normalised in the kernel.
    k: [B, T, H, K], keys; normalised in the kernel.
    v: [B, T, HV, V], values; HV is a multiple of H.
    g: [B, T, H or HV, K], pre-activation of the log decay.
    b: [B, T, H or HV, K], erase gate.
    w: [B, T, HV, V], write gate.
    decay = -exp(A_log) * softplus(g + dt_bias) in natural log.
    A_log: [heads of g].
    dt_bias: [heads of g * K] or [heads of g, K].
    scale: of the output; K**-0.5 if None.
    cu_seqlens: [N+1] int32 or int64, rising from 0 to T. On a GPU only the kernels read it: other
        lengths may be written to it between replays of a CUDA graph. Tokens outside of all
        sequences get zeros. cu_seqlens_cpu, its copy on the host, is checked if it is given.

    Raises ValueError for anything that these kernels were not made for.
    """
    _refuse("use_qk_l2norm_in_kernel", use_qk_l2norm_in_kernel, True, "--no-l2norm")
    _refuse("use_gate_in_kernel", use_gate_in_kernel, True, "--gate none")
    _refuse("state_v_first", state_v_first, False, "--with state_v_first")
    _refuse("output_final_state", output_final_state, False, "--with final_state")
    _refuse("initial_state", initial_state, None, "--with initial_state")
    _refuse("lower_bound", lower_bound, None, "--gate sigmoid")

    for name, x in (("q", q), ("v", v), ("g", g)):
        _check_tensor(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, T, heads, dim], but got shape {tuple(x.shape)}")
    B, T, H, _ = q.shape
    HV, HG = v.shape[2], g.shape[2]
    if B * H * HV == 0 or HV % H or HG not in (H, HV):
        raise ValueError(
            f"B and H must be positive, HV a multiple of H, and g of H or HV heads, "
            f"but got B={B}, H={H}, HV={HV} and {HG} heads of g"
        )
    if not (q.is_cuda or (triton.knobs.runtime.interpret and q.device.type == "cpu")):
        raise ValueError(f"q must be on a GPU, but is on {q.device}; or set TRITON_INTERPRET=1")
    _check("q", q, (B, T, H, K), DTYPE, q.device)
    _check("k", k, (B, T, H, K), DTYPE, q.device)
    _check("v", v, (B, T, HV, V), DTYPE, q.device)
    _check("g", g, (B, T, HG, K), GATE_DTYPE, q.device)
    _check("b", b, (B, T, HG, K), DTYPE, q.device)
    _check("w", w, (B, T, HV, V), DTYPE, q.device)
    if cu_seqlens is None or B != 1:
        raise ValueError(f"these kernels need cu_seqlens and B=1, but got {cu_seqlens} and B={B}")
    _check_cu_seqlens(cu_seqlens, T, cu_seqlens_cpu)
    _check("cu_seqlens", cu_seqlens, tuple(cu_seqlens.shape), cu_seqlens.dtype, q.device)
    given_cu_seqlens = cu_seqlens.contiguous()
    _check_tensor("A_log", A_log)
    A_log = _readable(A_log.float())
    _check("A_log", A_log, (HG,), torch.float32, q.device)
    _check_tensor("dt_bias", dt_bias)
    dt_bias = _readable(dt_bias.float().reshape(-1))
    _check("dt_bias", dt_bias, (HG * K,), torch.float32, q.device)
    dt_bias = dt_bias.view(HG, K)
    scale = K**-0.5 if scale is None else float(scale)
    q, k, v, g, b, w = (_readable(x) for x in (q, k, v, g, b, w))
    o = _Function.apply(
        q, k, v, g, b, w, A_log, dt_bias, given_cu_seqlens, scale,
    )
    return o, None


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q, k, v, g, b, w, A_log, dt_bias, given_cu_seqlens, scale,
    ):
        with torch.cuda.device_of(q):
            B, T, H, _ = q.shape
            HV, HG = v.shape[2], g.shape[2]
            N = given_cu_seqlens.numel() - 1
            NT = T // BT + N  # at least as many as there are; those past the end do nothing
            NS, segment = 1, 2**24  # a sequence is one segment: lengths are not known on the host
            NT2 = NT // 2 + N

            # chunk_tables
            o = q.new_empty(B, T, HV, V)
            cu_seqlens = q.new_empty(N + 1, dtype=torch.int32)
            chunk_offsets = q.new_empty(N + 1, dtype=torch.int32)
            chunk_table = q.new_empty(NT, 2, dtype=torch.int32)
            chunk_tables.launch(
                given_cu_seqlens, o, cu_seqlens, chunk_offsets, chunk_table, n_sequences=N,
                n_chunks=NT, T=T, HV=HV,
            )

            # prepare
            q_rstd = q.new_empty(NT, HV, BT, dtype=torch.float32)
            k_rstd = q.new_empty(NT, HV, BT, dtype=torch.float32)
            A = q.new_empty(NT, HV, BT, BT)
            Aqk = q.new_empty(NT, HV, BT, BT)
            Qg = q.new_empty(NT, HV, BT, K)
            Y = q.new_empty(NT, HV, BT, K)
            Ktail = q.new_empty(NT, HV, BT, K)
            gamma_C = q.new_empty(NT, HV, K, dtype=torch.float32)
            gamma_B = q.new_empty(NT, HV, NB, K, dtype=torch.float32)
            prepare.launch(
                q, k, g, b, A_log, dt_bias, chunk_table, q_rstd, k_rstd, A, Aqk, Qg, Y, Ktail,
                gamma_C, gamma_B, n_chunks=NT, scale=scale, lower_bound=0.0, T=T, H=H, HV=HV, HG=HG,
            )
            del gamma_B

            # scan_blocks2
            h = q.new_empty(NT2, HV, V, K)
            R = q.new_empty(NT, HV, BT, V)
            scan_blocks2.launch(
                v, w, Qg, Y, Ktail, gamma_C, A, Aqk, cu_seqlens, chunk_offsets, o, h, R,
                n_sequences=N, T=T, HV=HV, NS=NS, segment=segment,
            )

        ctx.save_for_backward(
            q, k, v, g, b, w, A_log, dt_bias, o, cu_seqlens, chunk_offsets, chunk_table, q_rstd,
            k_rstd, A, Aqk, Qg, Y, Ktail, gamma_C, h, R,
        )
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx, do):
        if torch.is_grad_enabled():
            raise RuntimeError("chunk_gdn2 is differentiable once: leave out create_graph=True")
        (
            q, k, v, g, b, w, A_log, dt_bias, o, cu_seqlens, chunk_offsets, chunk_table, q_rstd,
            k_rstd, A, Aqk, Qg, Y, Ktail, gamma_C, h, R,
        ) = map(_readable, ctx.saved_tensors)  # hooks may have laid them out anew
        scale = ctx.scale
        do = _readable(do)
        with torch.cuda.device_of(q):
            B, T, H, _ = q.shape
            HV, HG = v.shape[2], g.shape[2]
            N = cu_seqlens.numel() - 1
            NT = T // BT + N  # at least as many as there are; those past the end do nothing
            NS, segment = 1, 2**24  # a sequence is one segment: lengths are not known on the host
            NT2 = NT // 2 + N

            # reverse_scan_blocks2
            dh = q.new_empty(NT2, HV, V, K)
            dX = q.new_empty(NT, HV, BT, V)
            dv = q.new_empty(B, T, HV, V)
            dw = q.new_empty(B, T, HV, V)
            z_dot = q.new_empty(NT, HV, BT, 2, dtype=torch.float32)
            reverse_scan_blocks2.launch(
                v, w, Qg, Y, Ktail, gamma_C, A, Aqk, do, cu_seqlens, chunk_offsets, dh, dX, dv, dw,
                z_dot, n_sequences=N, T=T, HV=HV, NS=NS, segment=segment,
            )

            # grad_blocks2
            dq = q.new_empty(B, T, HV, K)
            dk = q.new_empty(B, T, HV, K)
            dg = q.new_empty(B, T, HV, K, dtype=torch.float32)
            db = q.new_empty(B, T, HV, K)
            dA_log = q.new_zeros(NT, HV, K, dtype=torch.float32)
            ddt_bias = q.new_zeros(NT, HV, K, dtype=torch.float32)
            grad_blocks2.launch(
                q, k, g, b, A_log, dt_bias, q_rstd, k_rstd, gamma_C, Ktail, h, R, dh, dX, do, o,
                z_dot, chunk_offsets, chunk_table, dq, dk, dg, db, dA_log, ddt_bias, n_chunks=NT,
                scale=scale, lower_bound=0.0, T=T, H=H, HV=HV, HG=HG, n_sequences=N,
            )

            # clear: zeros for tokens of no sequence
            chunk_tables.clear(
                cu_seqlens, dq, dk, dv, dg, db, dw, n_sequences=N, T=T, HV=HV,
            )

        return (
            _fold(dq, q),
            _fold(dk, k),
            dv,
            _fold(dg, g),
            _fold(db, b),
            dw,
            dA_log.sum((0, 2)).view(HG, -1).sum(1),
            ddt_bias.sum(0).view(HG, -1, K).sum(1),
            None,
            None,
        )


def _fold(grad, x):
    """Sum a gradient per value head to the heads of its input, in its dtype."""
    if grad.shape == x.shape:
        return grad.to(x.dtype)
    heads = x.shape[2]
    return grad.unflatten(2, (heads, grad.shape[2] // heads)).float().sum(3).to(x.dtype)


def _check_cu_seqlens(cu_seqlens, T, cpu):
    _check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must be [N+1] with N >= 1, but got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, but got {cu_seqlens.dtype}")
    if cpu is not None:
        _check_tensor("cu_seqlens_cpu", cpu)
        _check("cu_seqlens_cpu", cpu, tuple(cu_seqlens.shape), cpu.dtype, torch.device("cpu"))
    elif not cu_seqlens.is_cuda:
        cpu = cu_seqlens
    if cpu is None:
        return
    values = cpu.tolist()
    if values[0] != 0 or values[-1] != T or values != sorted(values):
        raise ValueError(f"cu_seqlens must rise from 0 to T={T}, but got {values}")


def _readable(x):
    """x, or a copy of what kernels cannot read: strides, lazy signs, no multiple of 16 bytes."""
    x = x.contiguous().resolve_neg()
    if torch.compiler.is_compiling():
        return x
    try:
        address = x.data_ptr()
    except RuntimeError:  # inside of vmap, or a fake
        raise ValueError(
            "these kernels take tensors that lie in memory: torch.func's transforms, batched "
            "gradients and tensors without data need gdn2gen.chunk_gdn2"
        ) from None
    # zeros that torch did not write down have no address either
    return x if address % 16 == 0 and (address or x.numel() == 0) else x.clone()


def _check_tensor(name, x):
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, but got {type(x).__name__}")


def _check(name, x, shape, dtype, device):
    _check_tensor(name, x)
    if tuple(x.shape) != shape or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{name} must be {shape} {dtype} on {device}, "
            f"but got {tuple(x.shape)} {x.dtype} on {x.device}"
        )


def _refuse(name, value, compiled, option):
    """Raise ValueError for a value that the kernels were not compiled for."""
    # identity, since a tensor's == is elementwise
    if value is not compiled:
        shown = f"{type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
        raise ValueError(
            f"these kernels were made for {name}={compiled!r}, but got {shown}; "
            f"generate them anew, `gdn2gen generate` with {option}"
        )
