"""Every op as torch.compile and opcheck see it: whole graphs, one for all lengths.

By the reference, or by interpreted kernels; each function raises AssertionError or returns what a
test asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gdn2gen
from gdn2gen.base.environment import verifying
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.registry import OPS, recurrence_named
from gdn2gen.measure.accuracy import public_op
from gdn2gen.runtime import parts_ops

Drawn = tuple[Callable[..., Tensor], dict[str, Tensor]]


def flags_of(op: str) -> dict[str, Any]:
    return {"use_qk_l2norm_in_kernel": True} if recurrence_named(op).normalises else {}


def _chunk(op: str, T: int, packed: bool) -> Drawn:
    sizes: dict[str, Any] = {"op": op, "HV": 2, "cu_seqlens": (0, 3, T) if packed else None}
    flags = flags_of(op)

    def run(**given: Any) -> Tensor:
        o, state = public_op(op)(**given, **flags, output_final_state=True)
        assert state is not None
        return o.sum(0).sum(0) @ state.sum(0)

    return run, {**make_inputs(1, T, 1, 32, 32, **sizes)}


def _mamba(T: int, packed: bool) -> Drawn:
    generator = torch.Generator().manual_seed(T)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    given = {"x": draw(1, T, 2, 32), "dt": draw(1, T, 2), "A": -draw(2).abs()}
    given |= {"B": draw(1, T, 1, 32), "C": draw(1, T, 1, 32), "D": draw(2), "z": draw(1, T, 2, 32)}
    if packed:
        given["cu_seqlens"] = torch.tensor([0, 3, T])

    def run(**tensors: Any) -> Tensor:
        found: Any = gdn2gen.mamba_chunk_scan_combined(
            **tensors, chunk_size=64, dt_softplus=True, return_final_states=not packed
        )
        return found if packed else found[0].sum() + found[1].sum()

    return run, given


def _parts(T: int, packed: bool) -> Drawn:
    generator = torch.Generator().manual_seed(T)
    shapes = {"x": (1, T, 16), "gate": (1, T, 16), "weight": (16, 4), "scale": (16,)}
    given = {x: torch.randn(shape, generator=generator) for x, shape in shapes.items()}
    if packed:
        given["cu_seqlens"] = torch.tensor([0, 3, T])

    def run(**tensors: Any) -> Tensor:
        x, gate, weight = tensors["x"], tensors["gate"], tensors["weight"]
        lengths = tensors.get("cu_seqlens")
        (y, z), _ = gdn2gen.short_convolution([x, gate], [weight, weight], cu_seqlens=lengths)
        return gdn2gen.gated_rms_norm(y, z, tensors["scale"])

    return run, given


_SPECIAL = {"mamba2": _mamba, "parts": _parts}
PLAIN = tuple(op for op in OPS if op not in _SPECIAL)
"""Those that are called by their own names."""
EVERY_OP = (*PLAIN, *_SPECIAL)


def drawn(name: str, T: int, packed: bool) -> Drawn:
    return _SPECIAL[name](T, packed) if name in _SPECIAL else _chunk(name, T, packed)


def train(call: Callable[..., Tensor], given: dict[str, Tensor]) -> list[Tensor]:
    leaves = {
        x: y.detach().requires_grad_() if y.is_floating_point() else y for x, y in given.items()
    }
    result = call(**leaves)
    wanted = [x for x in leaves.values() if x.requires_grad]
    return [result, *torch.autograd.grad(result.sum(), wanted)]


def both(op: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """o and the final state of an op, with nothing around it that a compiler could sum otherwise.

    What `drawn` calls ends in sums over tokens, whose order Inductor chooses: gradients there are
    of the order of 10^4, and those that are 0 by cancelling (dg of the first token) are off by
    what either order rounds.
    """
    flags = flags_of(op)

    def run(**given: Any) -> tuple[Tensor, Tensor]:
        o, state = public_op(op)(**given, **flags, output_final_state=True)
        assert state is not None
        return o, state

    return run


def train_both(
    call: Callable[..., tuple[Tensor, Tensor]], given: dict[str, Tensor]
) -> dict[str, Tensor]:
    """o, the final state and d<input>, from gradients that are drawn."""
    leaves = {
        x: y.detach().requires_grad_() if y.is_floating_point() else y for x, y in given.items()
    }
    found = call(**leaves)
    generator = torch.Generator(found[0].device).manual_seed(5)
    seeds = [torch.empty_like(x).normal_(generator=generator) for x in found]
    wanted = {x: y for x, y in leaves.items() if y.requires_grad}
    grads = torch.autograd.grad(found, [*wanted.values()], seeds)
    o, state = (x.detach() for x in found)
    return {"o": o, "state": state, **{f"d{x}": y for x, y in zip(wanted, grads, strict=True)}}


@verifying()
def lengths_of(name: str, packed: bool) -> int:
    """How many whole graphs serve forward and backward at two lengths, with eager's results."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    function, _ = drawn(name, 20, packed)
    step = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (20, 33):
        _, given = drawn(name, T, packed)
        for x, y in zip(train(step, given), train(function, given), strict=True):
            torch.testing.assert_close(x, y)
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count


@verifying()
def opcheck_parts() -> bool:
    """torch's own checks of the ops of a layer's parts."""
    x, gate = (torch.randn(1, 9, 16).requires_grad_() for _ in range(2))
    weight, scale = torch.randn(16, 4).requires_grad_(), torch.randn(16).requires_grad_()
    lengths = torch.tensor([0, 4, 9])
    torch.library.opcheck(parts_ops.CONVOLVE, ([x], [weight], [], [], lengths, True))
    torch.library.opcheck(parts_ops.NORM, (x, gate, scale, 1e-5, "silu"))
    with torch.no_grad():
        one = [y.detach().clone() for y in (x[:, :1], weight, torch.randn(1, 3, 16), x[:, :1])]
        torch.library.opcheck(parts_ops.STEP, ([one[0]], [one[1]], [], [one[2]], [one[3]]))
    return True


@verifying()
def opcheck_backward(op: str) -> bool:
    """And of the backward of an op over whole sequences, as the reference computes it."""
    _, given = drawn(op, 20, packed=True)
    member = recurrence_named(op)
    if op == "mamba2":  # by the names of Mamba's own op
        names = {"C": "q", "B": "k", "x": "v", "A": "rate"}
        given = {names.get(name, name): x for name, x in given.items()}
        given["D"] = given["D"][:, None].expand(-1, given["v"].shape[-1])
    tensors = [given.get(x.name) for x in member.inputs]
    flags = [None, None, member.normalises, False, True, False]
    flags += [False, False] if member.activates_beta else []
    ops = torch.ops.gdn2gen
    forward, backward = (getattr(ops, f"{op}_{x}").default for x in ("forward", "backward"))
    with torch.no_grad():
        o, state, saved = forward(*tensors, *flags, "nothing")
        arrived = (torch.ones_like(o), torch.ones_like(state), saved, o)
        tests = ("test_schema", "test_faketensor")
        arguments = (*arrived, *tensors, 2, *flags, "nothing")
        torch.library.opcheck(backward, arguments, test_utils=tests)
    return True
