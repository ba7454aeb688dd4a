"""Gated DeltaNet-2 over whole sequences, for one problem; needs only torch and triton.

Per head, with the state S in R^{K x V} and elementwise `*` (arXiv 2605.22791):

    S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T
    o_t = scale * S_t^T q_t

Sizes, as the buffers below are given:

    B batch          T tokens of a sequence
    H heads of q, k  HV heads of v, w, o     HG heads of g, b (H or HV)
    K, V head dims   N sequences             NT chunks over all sequences, BT tokens each
    NS segments of a sequence, `segment` chunks each

Problem: gdn2 K=64 V=128 fp32, g fp32, l2norm
Plan:    lean
    forward   prepare, scan
    backward  reprepare, rescan, reverse_scan, grad_value, grad_key

Each stage is a module beside this one, which says what it computes and with which config. All were
made by
    gdn2gen generate --out DIR --op gdn2 --head-dim 64,128 --dtype fp32 --gate-dtype fp32 --gate \
      none --with=initial_state,final_state --level lean
"""

import hashlib

import torch
import triton

from . import (
    grad_key,
    grad_value,
    prepare,
    reprepare,
    rescan,
    reverse_scan,
    scan,
)

__all__ = ["chunk_gdn2"]

K, V = 64, 128
BT, NB = 32, 2  # tokens of a chunk, sub-blocks of 16 tokens in it
DTYPE, GATE_DTYPE = torch.float32, torch.float32


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
    grad_key="52c2cf71302904e3",
    grad_value="215e5ea4d76ab1c8",
    prepare="bfc8ed11c77fa6aa",
    reprepare="a0f182f9b81470a8",
    rescan="d4eef6427c8f9227",
    reverse_scan="dc1bb544ef2fb9e8",
    scan="39ea41aa53339413",
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
    use_gate_in_kernel=False,
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
    g: [B, T, H or HV, K], log decay, <= 0.
    b: [B, T, H or HV, K], erase gate.
    w: [B, T, HV, V], write gate.
    scale: of the output; K**-0.5 if None.
    initial_state: [N, HV, K, V] float32; zero if None.

    Raises ValueError for anything that these kernels were not made for.
    """
    _refuse("use_qk_l2norm_in_kernel", use_qk_l2norm_in_kernel, True, "--no-l2norm")
    _refuse("use_gate_in_kernel", use_gate_in_kernel, False, "--gate softplus")
    _refuse("state_v_first", state_v_first, False, "--with state_v_first")
    _refuse("A_log", A_log, None, "--with A_log and a --gate")
    _refuse("dt_bias", dt_bias, None, "--with dt_bias and a --gate")
    _refuse("cu_seqlens", cu_seqlens, None, "--with varlen")
    _refuse("cu_seqlens_cpu", cu_seqlens_cpu, None, "--with varlen")
    _refuse("lower_bound", lower_bound, None, "--gate sigmoid")
    if not isinstance(output_final_state, bool):
        raise ValueError(f"output_final_state must be a bool, but got {output_final_state!r}")

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
    shape = (B, HV, K, V)
    if initial_state is None:
        initial_state = q.new_zeros(shape, dtype=torch.float32)
    _check("initial_state", initial_state, shape, torch.float32, q.device)
    initial_state = _readable(initial_state)
    scale = K**-0.5 if scale is None else float(scale)
    q, k, v, g, b, w = (_readable(x) for x in (q, k, v, g, b, w))
    o, final_state = _Function.apply(
        q, k, v, g, b, w, initial_state, scale,
    )
    return o, final_state if output_final_state else None


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q, k, v, g, b, w, initial_state, scale,
    ):
        with torch.cuda.device_of(q):
            B, T, H, _ = q.shape
            HV, HG = v.shape[2], g.shape[2]
            N = B
            NT = B * triton.cdiv(T, BT)
            NS, segment = _segments(T, N * HV, 132)

            # prepare
            q_rstd = q.new_empty(NT, HV, BT)
            k_rstd = q.new_empty(NT, HV, BT)
            A = q.new_empty(NT, HV, BT, BT)
            Aqk = q.new_empty(NT, HV, BT, BT)
            Qg = q.new_empty(NT, HV, BT, K)
            Y = q.new_empty(NT, HV, BT, K)
            Ktail = q.new_empty(NT, HV, BT, K)
            gamma_C = q.new_empty(NT, HV, K)
            gamma_B = q.new_empty(NT, HV, NB, K)
            if NT > 0:
                prepare.launch(
                    q, k, g, b, q_rstd, k_rstd, A, Aqk, Qg, Y, Ktail, gamma_C, gamma_B,
                    n_chunks=NT, scale=scale, lower_bound=0.0, T=T, H=H, HV=HV, HG=HG,
                )
            del gamma_B

            # scan
            o = q.new_empty(B, T, HV, V)
            S_seg = q.new_empty(N, HV, NS, V, K)
            final_state = q.new_empty(N, HV, K, V)
            scan.launch(
                v, w, Qg, Y, Ktail, gamma_C, A, Aqk, initial_state, o, S_seg, final_state,
                n_sequences=N, T=T, HV=HV, NS=NS, segment=segment,
            )

        ctx.save_for_backward(
            q, k, v, g, b, w, q_rstd, k_rstd, A, Aqk, o, S_seg,
        )
        ctx.scale = scale
        return o, final_state

    @staticmethod
    def backward(ctx, do, dht):
        if torch.is_grad_enabled():
            raise RuntimeError("chunk_gdn2 is differentiable once: leave out create_graph=True")
        (
            q, k, v, g, b, w, q_rstd, k_rstd, A, Aqk, o, S_seg,
        ) = map(_readable, ctx.saved_tensors)  # hooks may have laid them out anew
        scale = ctx.scale
        do, dht = _readable(do), _readable(dht)
        with torch.cuda.device_of(q):
            B, T, H, _ = q.shape
            HV, HG = v.shape[2], g.shape[2]
            N = B
            NT = B * triton.cdiv(T, BT)
            NS, segment = _segments(T, N * HV, 132)

            # reprepare
            G = q.new_empty(B, T, HV, K)
            Qg = q.new_empty(NT, HV, BT, K)
            Y = q.new_empty(NT, HV, BT, K)
            Ktail = q.new_empty(NT, HV, BT, K)
            gamma_C = q.new_empty(NT, HV, K)
            if NT > 0:
                reprepare.launch(
                    q, k, g, b, q_rstd, k_rstd, A, G, Qg, Y, Ktail, gamma_C, n_chunks=NT,
                    scale=scale, lower_bound=0.0, T=T, H=H, HV=HV, HG=HG,
                )

            # rescan
            h = q.new_empty(NT, HV, V, K)
            R = q.new_empty(NT, HV, BT, V)
            rescan.launch(
                v, w, Y, Ktail, gamma_C, A, S_seg, h, R, n_sequences=N, T=T, HV=HV, NS=NS,
                segment=segment,
            )

            # reverse_scan
            dh = q.new_empty(NT, HV, V, K)
            dX = q.new_empty(NT, HV, BT, V)
            dh0 = q.new_empty(N, HV, K, V)
            reverse_scan.launch(
                Qg, Y, Ktail, gamma_C, A, Aqk, do, dht, dh, dX, dh0, n_sequences=N, T=T, HV=HV,
                NS=NS, segment=segment,
            )
            del Qg, Y, Ktail

            # grad_value
            dT = q.new_empty(NT, HV, BT, BT)
            dAqk = q.new_empty(NT, HV, BT, BT)
            dAqk_diagonal = q.new_empty(NT, HV, BT)
            dv = q.new_empty(B, T, HV, V)
            dw = q.new_empty(B, T, HV, V)
            q_dot = q.new_empty(NT, HV, BT)
            k_dot = q.new_empty(NT, HV, BT)
            if NT > 0:
                grad_value.launch(
                    v, w, R, dX, do, o, dT, dAqk, dAqk_diagonal, dv, dw, q_dot, k_dot, n_chunks=NT,
                    T=T, HV=HV,
                )

            # grad_key
            dq = q.new_empty(B, T, HV, K)
            dk = q.new_empty(B, T, HV, K)
            dg = G  # each part of G is read before dg is written there
            db = q.new_empty(B, T, HV, K)
            if NT > 0:
                grad_key.launch(
                    q, k, g, b, q_rstd, k_rstd, G, gamma_C, h, R, dh, dX, dT, dAqk, dAqk_diagonal,
                    do, q_dot, k_dot, dq, dk, dg, db, n_chunks=NT, scale=scale, lower_bound=0.0,
                    T=T, H=H, HV=HV, HG=HG,
                )

        return (
            _fold(dq, q),
            _fold(dk, k),
            dv,
            _fold(dg, g),
            _fold(db, b),
            dw,
            dh0,
            None,
        )


def _segments(T, heads, most):
    """Segments of a sequence, at most `most` of all heads together, and chunks of a segment."""
    chunks = max(1, triton.cdiv(T, BT))
    NS = min(triton.cdiv(chunks, 32), max(1, most // max(1, heads)))
    segment = triton.cdiv(chunks, NS)
    return triton.cdiv(chunks, segment), segment


def _fold(grad, x):
    """Sum a gradient per value head to the heads of its input, in its dtype."""
    if grad.shape == x.shape:
        return grad.to(x.dtype)
    heads = x.shape[2]
    return grad.unflatten(2, (heads, grad.shape[2] // heads)).float().sum(3).to(x.dtype)


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
