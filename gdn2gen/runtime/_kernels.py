"""A call's kernels on its tensors, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn2gen.codegen.choosing import chooser
from gdn2gen.family.registry import recurrence_named
from gdn2gen.kernels.operands import GIVEN_SEQUENCES
from gdn2gen.kernels.schedule import outputs_of
from gdn2gen.runtime._operands import readable, row_between
from gdn2gen.runtime.bound import addresses_of
from gdn2gen.runtime.lookup import Request, known_request
from gdn2gen.runtime.runner import SAVED, SizedRunner
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
    q = tensors[0]
    assert q is not None
    request: Request = make(
        signature.op,
        tuple([tensors[place].shape for place in signature.sized_by]),  # type: ignore[union-attr]
        tuple([tensors[place].dtype for place in signature.typed_by]),  # type: ignore[union-attr]
        q.device,
        tuple([x is not None for x in tensors[signature.required :]]),
        sequences,
        *options,
    )
    return request


def sequences_of(cu_seqlens: Tensor | None) -> int | None:
    """How many sequences are packed."""
    return None if cu_seqlens is None else cu_seqlens.numel() - 1


def as_lying(sized: SizedRunner, given: Sequence[Tensor]) -> tuple[SizedRunner, Sequence[Tensor]]:
    """The kernels, and `given` as they read them. Where rows do not lie as far apart as they did
    (hooks on saved tensors may lay any of them out anew), kernels for rows without gaps."""
    rows = sized.rows
    if not rows:
        return sized, readable(given)
    if any([row and row_between(x, 1) != row for x, row in zip(given, rows, strict=True)]):
        return sized.dense, readable(given)
    others = iter(readable([x for x, row in zip(given, rows, strict=True) if not row]))
    return sized, [x if row else next(others) for x, row in zip(given, rows, strict=True)]


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
    sized, given = as_lying(sized, given)
    inputs = named_inputs(sized, given, cu_seqlens)
    results = sized.forward(inputs, into)
    sized.training.learn(inputs, None if cu_seqlens is None else cu_seqlens.dtype)
    return results["o"], results.get("final_state"), [results[x] for x in sized.saved_names]


def run_inference(
    sized: SizedRunner,
    given: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    addresses: list[int] | None,
) -> tuple[Tensor, Tensor | None]:
    """o, and the final state if asked for, where no gradient is wanted. `addresses` are those of
    all tensors, if kernels can read them as they lie."""
    packed = None if cu_seqlens is None else cu_seqlens.dtype
    if addresses is not None:
        made = sized.inference.run(addresses, packed)
        if made is not None:
            return made[0], made[1] if sized.runner.problem.final_state else None
    sized, given = as_lying(sized, given)
    inputs = named_inputs(sized, given, cu_seqlens)
    results = sized.infer(inputs)
    sized.inference.learn(inputs, packed)
    return results["o"], results.get("final_state")


def run_training(
    sized: SizedRunner, given: Sequence[Tensor], cu_seqlens: Tensor | None, addresses: list[int]
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """`run_forward` on tensors that lie at `addresses` as kernels read them, with what is saved as
    one buffer; None where that is not known yet."""
    made = sized.training.run(addresses, None if cu_seqlens is None else cu_seqlens.dtype)
    if made is None:
        return None
    if sized.runner.problem.final_state:
        return made[0], made[1], made[2]
    return made[0], None, made[1]


def named_inputs(
    sized: SizedRunner, given: Sequence[Tensor], cu_seqlens: Tensor | None
) -> dict[str, Tensor]:
    """`given`, which lie as kernels read them, by name, with cu_seqlens as they do."""
    tensors = dict(zip(sized.input_names, given, strict=True))
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
    sized, given = as_lying(sized, given)
    found = {**saved, "o": o, "do": do}
    if dht is not None:
        found["dht"] = dht
    tensors = dict(zip(sized.input_names, given, strict=True))
    tensors |= zip(found, readable([*found.values()]), strict=True)
    grads = sized.backward(tensors)
    folds = _folds(sized.runner.problem.op)
    return [folds[name](grads[grad], tensors[name]) for name, grad in sized.gradient_names]


def quick_gradients(
    sized: SizedRunner, do: Tensor, saved: Sequence[Tensor]
) -> Sequence[Tensor] | None:
    """`run_gradients` without one of the final state, from the inputs, the buffer and o. None where
    one of these cannot be read as it lies."""
    lying = *saved, do
    addresses = None if sized.rows else addresses_of(lying)
    return None if addresses is None else _gradients_at(sized, addresses, lying)


def run_gradients(
    sized: SizedRunner,
    do: Tensor,
    dht: Tensor | None,
    saved: Tensor,
    o: Tensor,
    given: Sequence[Tensor],
) -> Sequence[Tensor]:
    """`run_backward` from what `run_training` saved."""
    arrived: tuple[Tensor, ...] = (do,) if dht is None else (do, dht)
    lying: tuple[Tensor, ...] = (*given, saved, o, *arrived)
    addresses = None if sized.rows else addresses_of(lying)
    if addresses is None:  # a sum's gradient is one number, in all places
        sized, given = as_lying(sized, given)
        lying = (*given, *readable((saved, o, *arrived)))
        addresses = addresses_of(lying, known=True)
    return _gradients_at(sized, addresses, lying)


def _gradients_at(
    sized: SizedRunner, addresses: list[int] | None, lying: tuple[Tensor, ...]
) -> Sequence[Tensor]:
    """Of the inputs, which come first in `lying`; then what the forward saved, o, do, and dht."""
    inputs = len(sized.input_names)
    last = len(lying) == inputs + 4
    quick = sized.backwards[last]
    made = None if addresses is None else quick.run(addresses, None)
    if made is not None:
        folded = sized.folded.get(last) or _folded(sized, last, lying[:inputs], made)
        return folded.of(made, lying)
    given, (saved, o, do, *rest) = lying[:inputs], lying[inputs:]
    dht = rest[0] if last else None
    grads = run_backward(sized, do, dht, sized.layout.split(saved), o, given)
    names = (*sized.input_names, SAVED, "o", "do", "dht")
    quick.learn(dict(zip(names, lying, strict=False)), None)
    return grads


def _folded(
    sized: SizedRunner, dht: bool, given: Sequence[Tensor], made: Sequence[Tensor]
) -> _Folded:
    """Gradients of inputs, of what the backward makes, for all calls of these sizes."""
    folds, order = _folds(sized.runner.problem.op), sized.made_backwards(dht)
    places = [order.index(grad) for _, grad in sized.gradient_names]
    wanted = [
        None if made[place].shape == x.shape else folds[name]
        for (name, _), place, x in zip(sized.gradient_names, places, given, strict=True)
    ]
    found = sized.folded[dht] = _Folded(chooser(places), tuple(wanted) if any(wanted) else None)
    return found


class _Folded(NamedTuple):
    """How gradients of the inputs are found among what a backward makes."""

    chosen: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    folds: tuple[_Fold | None, ...] | None
    """How each is summed; None where none of them is."""

    def of(self, made: Sequence[Tensor], given: Sequence[Tensor]) -> Sequence[Tensor]:
        """`given` are the inputs, whatever follows them."""
        found = self.chosen(made)
        if self.folds is None:
            return found
        pairs = zip(self.folds, found, given, strict=False)
        return [x if fold is None else fold(x, y) for fold, x, y in pairs]


@dataclass(frozen=True)
class _Fold:
    """How a kernel's gradient becomes that of its input, which may lack dims and heads of it."""

    lacking: tuple[int, ...]
    """Dims that the input does not have, such as chunks."""
    heads: int
    """The dim of heads in what is left: several value heads may read one of the input."""

    @classmethod
    def of(cls, found: Sequence[str], dims: Sequence[str]) -> _Fold:
        """`found` are the dims of the gradient, and `dims` those of the input, by symbol."""
        places = enumerate(found)
        lacking = tuple(i for i, x in places if x not in dims and x not in ("HV", "HP"))
        (heads,) = (i for i, x in enumerate(dims) if x in ("H", "HV", "HG"))
        return cls(lacking, heads)

    def __call__(self, grad: Tensor, x: Tensor) -> Tensor:
        """Summed to the shape of x, in its dtype."""
        if grad.shape == x.shape:
            return grad
        if self.lacking:
            grad = grad.sum(self.lacking)
        if grad.shape != x.shape:
            # no -1 in its place: without tokens it could be anything
            readers = grad.shape[self.heads] // x.shape[self.heads]
            before, after = x.shape[: self.heads + 1], x.shape[self.heads + 1 :]
            grad = grad.view(*before, readers, *after)
            # read as it is: a copy in fp32 would be three times what there is to read
            grad = grad.sum(self.heads + 1, dtype=torch.float32)
        return grad.to(x.dtype)


@cache
def _folds(op: str) -> Mapping[str, _Fold]:
    """Of every input that has a gradient."""
    recurrence, made = recurrence_named(op), outputs_of(op)
    return {
        x.name: _Fold.of(made[recurrence.gradients[x.name]].dims.split(), x.symbols)
        for x in recurrence.differentiable
    }
