"""Kimi Delta Attention over whole sequences, for one problem; needs only torch and triton.

Per head, with the state S in R^{K x V} (arXiv 2510.26692):

    S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T
    o_t = scale * S_t^T q_t

Sizes, as the buffers below are given:

    B batch          T tokens of a sequence (of the whole packed batch; B = 1)
    H heads of q, k  HV heads of v, beta, o  HG heads of g (H or HV)
    K, V head dims   N sequences             NT chunks over all sequences, BT tokens each
    NS segments of a sequence, `segment` chunks each

Problem: kda K=64 V=32 fp16, g fp32, l2norm, softplus gate, packed sequences
Plan:    fast
    forward   prepare, scan
    backward  sum_decay, rescan, reverse_scan, grad_value, grad_key

Each stage is a module beside this one, which says what it computes and with which config. All were
made by
    gdn2gen generate --out DIR --op kda --head-dim 64,32 --dtype fp16 --gate-dtype fp32 --gate \
      softplus --with=A_log,dt_bias,varlen --level fast
"""

import hashlib

import torch
import triton

from . import (
    chunk_tables,
    grad_key,
    grad_value,
    prepare,
    rescan,
    reverse_scan,
    scan,
    sum_decay,
)

__all__ = ["chunk_kda"]

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
    chunk_tables="305ad06913aa402a",
    grad_key="c9f359efcaffc7be",
    grad_value="2ccd42e4b0b9511f",
    prepare="74050f8aa116a609",
    rescan="2ac4d373c1af9340",
    reverse_scan="c407e4599910970b",
    scan="93d188e3bba7f460",
    sum_decay="694cbd0ccc9543cd",
)


def chunk_kda(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=True,
    use_gate_in_kernel=True,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    lower_bound=None,
    state_v_first=False,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    A_log=None,
    dt_bias=None,
):
    """Return o [B, T, HV, V] and the final state (None unless asked for); differentiable.

    q: [B, T, H, K], queries; normalised in the kernel.
    k: [B, T, H, K], keys; normalised in the kernel.
    v: [B, T, HV, V], values; HV is a multiple of H.
    g: [B, T, H or HV, K], pre-activation of the log decay.
    beta: [B, T, HV], factor of what a token erases and writes.
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
    _refuse("use_beta_sigmoid_in_kernel", use_beta_sigmoid_in_kernel, False, "--with beta_sigmoid")
    _refuse("allow_neg_eigval", allow_neg_eigval, False, "--with beta_sigmoid,neg_eigval")
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
    _check("beta", beta, (B, T, HV), DTYPE, q.device)
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
    q, k, v, g, beta = (_readable(x) for x in (q, k, v, g, beta))
    o = _Function.apply(
        q, k, v, g, beta, A_log, dt_bias, given_cu_seqlens, scale,
    )
    return o, None


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q, k, v, g, beta, A_log, dt_bias, given_cu_seqlens, scale,
    ):
        with torch.cuda.device_of(q):
            B, T, H, _ = q.shape
            HV, HG = v.shape[2], g.shape[2]
            N = given_cu_seqlens.numel() - 1
            NT = T // BT + N  # at least as many as there are; those past the end do nothing
            NS, segment = 1, 2**24  # a sequence is one segment: lengths are not known on the host

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
            k_beta = q.new_empty(NT, HV, BT, dtype=torch.float32)
            A = q.new_empty(NT, HV, BT, BT)
            Aqk = q.new_empty(NT, HV, BT, BT)
            Qg = q.new_empty(NT, HV, BT, K)
            Y = q.new_empty(NT, HV, BT, K)
            Ktail = q.new_empty(NT, HV, BT, K)
            gamma_C = q.new_empty(NT, HV, K, dtype=torch.float32)
            gamma_B = q.new_empty(NT, HV, NB, K, dtype=torch.float32)
            prepare.launch(
                q, k, g, beta, A_log, dt_bias, chunk_table, q_rstd, k_rstd, k_beta, A, Aqk, Qg, Y,
                Ktail, gamma_C, gamma_B, n_chunks=NT, scale=scale, lower_bound=0.0, T=T, H=H,
                HV=HV, HG=HG,
            )
            del gamma_B

            # scan
            S_seg = q.new_empty(N, HV, NS, V, K, dtype=torch.float32)
            scan.launch(
                v, Qg, Y, Ktail, gamma_C, A, Aqk, cu_seqlens, chunk_offsets, o, S_seg,
                n_sequences=N, T=T, HV=HV, NS=NS, segment=segment,
            )

        ctx.save_for_backward(
            q, k, v, g, A_log, dt_bias, o, cu_seqlens, chunk_offsets, chunk_table, q_rstd, k_rstd,
            k_beta, A, Aqk, Qg, Y, Ktail, gamma_C, S_seg,
        )
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx, do):
        if torch.is_grad_enabled():
            raise RuntimeError("chunk_kda is differentiable once: leave out create_graph=True")
        (
            q, k, v, g, A_log, dt_bias, o, cu_seqlens, chunk_offsets, chunk_table, q_rstd, k_rstd,
            k_beta, A, Aqk, Qg, Y, Ktail, gamma_C, S_seg,
        ) = map(_readable, ctx.saved_tensors)  # hooks may have laid them out anew
        scale = ctx.scale
        do = _readable(do)
        with torch.cuda.device_of(q):
            B, T, H, _ = q.shape
            HV, HG = v.shape[2], g.shape[2]
            N = cu_seqlens.numel() - 1
            NT = T // BT + N  # at least as many as there are; those past the end do nothing
            NS, segment = 1, 2**24  # a sequence is one segment: lengths are not known on the host

            # sum_decay
            G = q.new_empty(B, T, HV, K, dtype=torch.float32)
            sum_decay.launch(
                g, A_log, dt_bias, chunk_table, G, n_chunks=NT, scale=scale, lower_bound=0.0, T=T,
                H=H, HV=HV, HG=HG,
            )

            # rescan
            h = q.new_empty(NT, HV, V, K)
            R = q.new_empty(NT, HV, BT, V)
            rescan.launch(
                v, Y, Ktail, gamma_C, A, S_seg, cu_seqlens, chunk_offsets, h, R, n_sequences=N,
                T=T, HV=HV, NS=NS, segment=segment,
            )

            # reverse_scan
            dh = q.new_empty(NT, HV, V, K)
            dX = q.new_empty(NT, HV, BT, V)
            reverse_scan.launch(
                Qg, Y, Ktail, gamma_C, A, Aqk, do, cu_seqlens, chunk_offsets, dh, dX,
                n_sequences=N, T=T, HV=HV, NS=NS, segment=segment,
            )

            # grad_value
            dT = q.new_empty(NT, HV, BT, BT)
            dAqk = q.new_empty(NT, HV, BT, BT)
            dAqk_diagonal = q.new_empty(NT, HV, BT, dtype=torch.float32)
            dv = q.new_empty(B, T, HV, V)
            beta_dot = q.new_empty(NT, HV, BT, dtype=torch.float32)
            q_dot = q.new_empty(NT, HV, BT, dtype=torch.float32)
            k_dot = q.new_empty(NT, HV, BT, dtype=torch.float32)
            grad_value.launch(
                v, R, dX, do, o, chunk_table, dT, dAqk, dAqk_diagonal, dv, beta_dot, q_dot, k_dot,
                n_chunks=NT, T=T, HV=HV,
            )

            # grad_key
            dq = q.new_empty(B, T, HV, K)
            dk = q.new_empty(B, T, HV, K)
            dg = G  # each part of G is read before dg is written there
            dbeta_part = q.new_empty(NT, HV, 4, BT, dtype=torch.float32)
            dbeta = q.new_empty(B, T, HV)
            dA_log = q.new_zeros(NT, HV, K, dtype=torch.float32)
            ddt_bias = q.new_zeros(NT, HV, K, dtype=torch.float32)
            grad_key.launch(
                q, k, g, A_log, dt_bias, q_rstd, k_rstd, k_beta, G, gamma_C, h, R, dh, dX, dT,
                dAqk, dAqk_diagonal, do, beta_dot, q_dot, k_dot, chunk_table, dq, dk, dg,
                dbeta_part, dbeta, dA_log, ddt_bias, n_chunks=NT, scale=scale, lower_bound=0.0,
                T=T, H=H, HV=HV, HG=HG,
            )

            # clear: zeros for tokens of no sequence
            chunk_tables.clear(
                cu_seqlens, dq, dk, dv, dg, dbeta, n_sequences=N, T=T, HV=HV,
            )

        return (
            _fold(dq, q),
            _fold(dk, k),
            dv,
            _fold(dg, g),
            dbeta,
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
            "gradients and tensors without data need gdn2gen.chunk_kda"
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
