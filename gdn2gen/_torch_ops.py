"""What the torch ops under the public ones compute, and the fakes that torch.compile traces.

The forward returns what the backward of its plan wants saved; names and order are the plan's
(`Runner.saved`), so that the fake, the kernels and the backward agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2gen._kernels import request_of, run_backward, run_forward
from gdn2gen._lookup import find_runner, make_request, runner_of
from gdn2gen.passes import empty


def forward_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
    level: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """o, the final state (empty if not asked for), and what the backward wants saved."""
    tensors = (q, k, v, g, b, w, initial_state, A_log, dt_bias, cu_seqlens)
    flags = (l2norm, gate_in_kernel, output_final_state, state_v_first)
    sized = find_runner(request_of(tensors, (scale, lower_bound, *flags)), level)
    given = [x for x in tensors if x is not None]
    o, final_state, saved = run_forward(sized, given)
    if final_state is None:
        final_state = q.new_empty(0, dtype=torch.float32)
    return o, final_state, saved


def forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
    level: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    tensors = (q, k, v, g, b, w, initial_state, A_log, dt_bias, cu_seqlens)
    flags = (l2norm, gate_in_kernel, output_final_state, state_v_first)
    # not looked up: sizes may be symbols
    request = request_of(tensors, (scale, lower_bound, *flags), make_request)
    problem, call = request.problem, request.call
    o = torch.empty_like(v)
    final_state = q.new_empty(0, dtype=torch.float32)
    if output_final_state:
        inner = (v.shape[-1], q.shape[-1]) if state_v_first else (q.shape[-1], v.shape[-1])
        final_state = q.new_empty((call.N, call.HV, *inner), dtype=torch.float32)
    runner = runner_of(request, level)
    sizes = call.sizes(problem, runner.BT, runner.recipe.saved_segments)
    return o, final_state, [empty(x, problem, sizes, q.device) for x in runner.saved]


def backward_kernels(
    do: Tensor,
    dht: Tensor | None,
    saved: list[Tensor],
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
    level: str,
) -> list[Tensor]:
    """Gradients of q, k, v, g, b, w, and of what is given of initial_state, A_log, dt_bias."""
    tensors = (q, k, v, g, b, w, initial_state, A_log, dt_bias, cu_seqlens)
    flags = (l2norm, gate_in_kernel, output_final_state, state_v_first)
    sized = find_runner(request_of(tensors, (scale, lower_bound, *flags)), level)
    return run_backward(sized, do, dht, saved, o, [x for x in tensors if x is not None])


def backward_fake(
    do: Tensor,
    dht: Tensor | None,
    saved: list[Tensor],
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    lower_bound: float | None,
    l2norm: bool,
    gate_in_kernel: bool,
    output_final_state: bool,
    state_v_first: bool,
    level: str,
) -> list[Tensor]:
    given = (q, k, v, g, b, w, initial_state, A_log, dt_bias)
    return [torch.empty_like(x) for x in given if x is not None]
