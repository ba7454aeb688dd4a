"""Mamba-2's op on slices of one projection, as a layer has them: dt and z are read as they lie.

In Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import gdn2gen
from gdn2gen.kernels.rows import FARTHEST, UNIT
from gdn2gen.runtime import autograd
from gdn2gen.runtime.runner import SizedRunner
from gdn2gen.store import verified

B, T, H, N, P = 2, 20, 2, 16, 16
NAMES = ("dt", "z")


def _projection() -> Tensor:
    """Rows of v, dt and z, which begin at multiples of 16 bytes, and of something else."""
    return torch.randn(B, T, H * P + 4 + H * P + 4, generator=torch.Generator().manual_seed(0))


def _slices(x: Tensor, first: int = 0) -> dict[str, Tensor]:
    v, dt, z = x[..., first : first + H * P], x[..., H * P :][..., :H], x[..., H * P + 4 :]
    z = z[..., first : first + H * P]
    return {"v": v.unflatten(-1, (H, P)), "dt": dt, "z": z.unflatten(-1, (H, P))}


@contextmanager
def _seen() -> Iterator[list[dict[str, int]]]:
    """Addresses of what kernels read, pass after pass."""
    found: list[dict[str, int]] = []

    def watched(run: Any) -> Any:
        def with_addresses(self: SizedRunner, tensors: dict[str, Tensor], *rest: Any) -> Any:
            found.append({x: tensors[x].data_ptr() for x in NAMES})
            return run(self, tensors, *rest)

        return with_addresses

    names = ("forward", "infer", "backward")
    with (
        patch.object(SizedRunner, names[0], watched(SizedRunner.forward)),
        patch.object(SizedRunner, names[1], watched(SizedRunner.infer)),
        patch.object(SizedRunner, names[2], watched(SizedRunner.backward)),
        patch.dict(os.environ, {"GDN2GEN_UNVERIFIED": "1"}),
        # of what is not verified every call looks anew, and none would be a known one
        patch.object(verified, "look_anew", lambda: None),
    ):
        yield found


def _run(given: dict[str, Tensor], packed: bool) -> tuple[Tensor, ...]:
    """o, the final state and, if anything wants it, the gradients of what is given."""
    B, T = given["v"].shape[:2]
    k = torch.linspace(-1, 1, B * T * N).view(B, T, 1, N)
    if packed:
        k, given = k.view(1, B * T, 1, N), {x: y.flatten(0, 1)[None] for x, y in given.items()}
    o, state = gdn2gen.chunk_mamba2(
        k.flip(1),
        k,
        **given,
        use_gate_in_kernel=True,
        rate=-torch.ones(H),
        D=torch.ones(H, P),
        output_final_state=True,
        cu_seqlens=torch.tensor([0, 7, B * T]) if packed else None,
    )
    assert state is not None
    if not o.requires_grad:
        return o, state
    grads = torch.autograd.grad((o.square().sum() + state.sum()), list(given.values()))
    return o.detach(), state.detach(), *grads


def slices(packed: bool, hooks: bool) -> list[list[str]]:
    """What was read where it lies: forward, backward, and where no gradient is wanted; three times
    over, since a known call goes another way. Of `hooks`, tensors that were saved are laid out
    anew."""
    given = _slices(_projection().requires_grad_())
    given = {x: y.detach().requires_grad_() for x, y in given.items()}
    assert not any(x.is_contiguous() for x in given.values())
    lying = {x: y.data_ptr() for x, y in given.items()}
    dense = {x: y.detach().contiguous().requires_grad_() for x, y in given.items()}
    expected = _with_environment(dense, packed)
    read = []
    for _ in range(3):
        with _seen() as seen:
            if hooks:
                with torch.autograd.graph.saved_tensors_hooks(
                    lambda x: x.clone(memory_format=torch.contiguous_format), lambda x: x
                ):
                    found = _run(given, packed)
            else:
                found = _run(given, packed)
            with torch.no_grad():
                inferred = _run(given, packed)
        for x, y in zip((*found, *inferred), (*expected, *expected[:2]), strict=True):
            assert torch.equal(x, y)
        read += [[x for x in NAMES if addresses[x] == lying[x]] for addresses in seen]
    return read


def _with_environment(given: dict[str, Tensor], packed: bool) -> tuple[Tensor, ...]:
    with _seen():
        return _run(given, packed)


def copied() -> list[list[str]]:
    """The same of rows that no kernel reads as they lie: that begin elsewhere, overlap, are not as
    far apart everywhere, or lie the other way round."""
    plain = _slices(_projection())
    shifted = _slices(torch.cat([_projection()] * 2, -1), 1)
    bent = _projection()[:, :, None].expand(-1, -1, 2, -1).contiguous().flatten(1, 2)[:, 3 : T + 3]
    kinds = [
        {**plain, "v": shifted["v"], "z": shifted["z"]},
        {x: y[:, :1].expand_as(y) for x, y in plain.items()},
        _slices(bent),
        {x: y.transpose(0, 1).contiguous().transpose(0, 1) for x, y in plain.items()},
        {x: torch._neg_view(-y) for x, y in plain.items()},
    ]
    read = []
    for given in kinds:
        expected = _with_environment({x: y.contiguous() for x, y in given.items()}, False)
        with _seen() as seen:
            found = _run(given, False)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        (addresses,) = seen
        read.append([x for x in NAMES if addresses[x] == given[x].data_ptr()])
    return read


def far() -> list[list[str]]:
    """The same of rows as far apart as kernels read them, and one unit farther: of what lies
    between them nothing is touched, and so takes no memory."""
    plain = {x: y[:1, :3].contiguous() for x, y in _slices(_projection()).items()}
    read = []
    for row in (FARTHEST, FARTHEST + UNIT):
        given = dict(plain)
        for name in NAMES:
            dense = plain[name]
            strides = (3 * row, row, *dense.stride()[2:])
            given[name] = torch.empty_strided(dense.shape, strides).copy_(dense)
        expected = _with_environment(plain, False)
        with _seen() as seen:
            found = _run(given, False)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        (addresses,) = seen
        read.append([x for x in NAMES if addresses[x] == given[x].data_ptr()])
    return read


def after_an_odd_address() -> list[list[int]]:
    """How far rows lie apart for kernels that are handed addresses, of z and dt: where dt begins at
    an odd one, and in later calls, with the same strides, does not."""
    wide = torch.randn(B * T * 9 + 4, generator=torch.Generator().manual_seed(1))
    odd, even = (wide.as_strided((B, T, H), (T * 9, 9, 1), first) for first in (1, 4))
    plain = _slices(_projection())
    plain["v"] = plain["v"].contiguous()
    found: list[list[int]] = []
    run = autograd.run_inference

    def watched(sized: SizedRunner, given: Any, cu_seqlens: Any, addresses: Any) -> Any:
        if addresses is not None:
            apart = [0 if x.is_contiguous() else x.stride(1) for x in given]
            assert apart == [*(sized.rows or (0,) * len(given))]
            found.append([x for x in apart if x])
        # else they are looked at again
        return run(sized, given, cu_seqlens, addresses)

    with patch.object(autograd, "run_inference", watched):
        for dt in (odd, even, even, even, odd, odd):
            given = {**plain, "dt": dt}
            expected = _with_environment({x: y.contiguous() for x, y in given.items()}, False)
            assert all(map(torch.equal, _with_environment(given, False), expected))
    return found
