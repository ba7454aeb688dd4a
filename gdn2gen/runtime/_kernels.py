"""A call's kernels on its tensors, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gdn2gen.kernels.stages import GIVEN_SEQUENCES
from gdn2gen.runtime._operands import readable
from gdn2gen.runtime.lookup import Request, known_request
from gdn2gen.runtime.runner import SizedRunner
from gdn2gen.runtime.signature import Signature


def request_of(
    signature: Signature,
    tensors: Sequence[Tensor | None],
    sequences: int | None,
    options: Sequence[Any],
    make: Any = known_request,
) -> Request:
    """What a call asks for, with its tensors but for cu_seqlens.

    `sequences` are those of a packed batch; `options` are `Options`.
    """
    q, gate = tensors[0], tensors[signature.gate]
    assert q is not None and gate is not None
    request: Request = make(
        signature.op,
        tuple([tensors[place].shape for place in signature.sized_by]),  # type: ignore[union-attr]
        q.dtype,
        gate.dtype,
        q.device,
        tuple([x is not None for x in tensors[signature.required :]]),
        sequences,
        *options,
    )
    return request


def sequences_of(cu_seqlens: Tensor | None) -> int | None:
    """How many sequences are packed."""
    return None if cu_seqlens is None else cu_seqlens.numel() - 1


def run_forward(
    sized: SizedRunner,
    given: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    into: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """o, the final state if asked for, and what the backward wants saved, in `into` if given.

    `given` are the tensors that are given, but for cu_seqlens, in order.
    """
    runner = sized.runner
    if not runner.backward_planned and any(x.requires_grad for x in given):
        runner.plan_backward()
    results = sized.forward(_named(sized, given, cu_seqlens), into)
    return results["o"], results.get("final_state"), [results[x] for x in sized.saved_names]


def run_inference(
    sized: SizedRunner, given: Sequence[Tensor], cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """o, and the final state if asked for, where no gradient is wanted."""
    results = sized.infer(_named(sized, given, cu_seqlens))
    return results["o"], results.get("final_state")


def _named(
    sized: SizedRunner, given: Sequence[Tensor], cu_seqlens: Tensor | None
) -> dict[str, Tensor]:
    tensors = dict(zip(sized.input_names, readable(given), strict=True))
    if cu_seqlens is not None:
        (tensors[GIVEN_SEQUENCES],) = readable([cu_seqlens])
    return tensors


def run_backward(
    sized: SizedRunner,
    do: Tensor,
    dht: Tensor | None,
    saved: Mapping[str, Tensor],
    o: Tensor,
    given: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of `given`. Hooks on saved tensors may have laid any of them out anew."""
    found = {**dict(zip(sized.input_names, given, strict=True)), **saved, "o": o, "do": do}
    if dht is not None:
        found["dht"] = dht
    tensors = dict(zip(found, readable([*found.values()]), strict=True))
    grads = sized.backward(tensors)
    return [_fold(grads[grad], name, tensors[name]) for name, grad in sized.gradient_names]


def _fold(grad: Tensor, name: str, x: Tensor) -> Tensor:
    """Sum a kernel's gradient per value head, or per chunk, to the shape of its input."""
    if grad.shape == x.shape:
        return grad
    if name == "A_log":
        return grad.sum((0, 2)).view(x.shape[0], -1).sum(1)
    if name == "dt_bias":
        return grad.sum(0).view(x.shape[0], -1, x.shape[1]).sum(1)
    B, T, heads, dim = x.shape
    return grad.view(B, T, heads, grad.shape[2] // heads, dim).float().sum(3).to(x.dtype)
