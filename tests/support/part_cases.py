"""A layer's parts beside torch's own operations in fp64: in the interpreter, on a GPU.

Every buffer that a kernel has to write begins as NaN. Each check raises AssertionError, or returns
the worst error over the largest value, or that all was well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gdn2gen.family import parts_reference as reference
from gdn2gen.nn import LanguageModel, _rotary, _stream, _windowed, projections
from gdn2gen.nn._projected_norm import norm_of_projected
from gdn2gen.nn._rotary import cosines_and_sines, turned
from gdn2gen.nn.norm import GatedRMSNorm
from gdn2gen.ops import parts as ops
from gdn2gen.ops.parts import gated_rms_norm, short_convolution, short_convolution_step
from gdn2gen.runtime import part_calls, parts, stream_parts
from gdn2gen.runtime.passes import poisoned
from gdn2gen.runtime.stream_parts import StreamNorm

Knobs = tuple[tuple[str, int], ...]
# By the coarsest dtype that rounds them.
BOUNDS: Final = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Convolution:
    """A call: sizes, dtypes, and what is given beside the tokens."""

    channels: tuple[int, ...] = (64, 24, 40)
    B: int = 2
    T: int = 40
    width: int = 4
    lengths: tuple[int, ...] | None = None
    """Of packed sequences; tokens beyond are of the last one."""
    bias: bool = False
    tail: bool = False
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None
    views: bool = False
    """Of one packed projection."""
    knobs: Knobs = ()
    """In place of those by the rule."""
    backward: Knobs = ()
    """Likewise, of the backward alone."""
    device: str = "cpu"

    def inputs(self) -> dict[str, list[Tensor]]:
        torch.manual_seed(0)
        B = 1 if self.lengths else self.B
        N = len(self.lengths) if self.lengths else B
        wide = self.weight_dtype or self.dtype
        whole = torch.randn(B, self.T, sum(self.channels) + 8)[..., 8:]
        x = [*whole.to(self.device, self.dtype).split(self.channels, -1)]
        made = {
            "x": x if self.views else [part.contiguous() for part in x],
            "weight": [torch.randn(D, self.width).to(self.device, wide) for D in self.channels],
        }
        if self.bias:
            made["bias"] = [torch.randn(D).to(self.device, wide) for D in self.channels]
        if self.tail:
            shape = (N, self.width - 1)
            made["tail"] = [
                torch.randn(*shape, D).to(self.device, self.dtype) for D in self.channels
            ]
        return made

    def cu_seqlens(self) -> Tensor | None:
        if self.lengths is None:
            return None
        return torch.tensor([0, *self.lengths], device=self.device).cumsum(0)


def convolve(case: Convolution) -> float:
    """y, gradients and tails; without gradients the same bits."""
    with forced(short_conv=case.knobs, short_conv_backward=case.knobs + case.backward):
        return _convolve(case)


def _convolve(case: Convolution) -> float:
    given, cu_seqlens = case.inputs(), case.cu_seqlens()
    tail = given.pop("tail", None)
    leaves = {name: [_leaf(part) for part in group] for name, group in given.items()}
    exact = {name: [_leaf(part.double()) for part in group] for name, group in given.items()}
    with poisoned():
        y, none = short_convolution(**leaves, tail=tail, cu_seqlens=cu_seqlens)
        towards = [torch.randn_like(part) for part in y]
        found = torch.autograd.grad(y, _flat(leaves), towards, retain_graph=True)
        again = found
        if case.device != "cpu":  # one after another is the same there
            again = torch.autograd.grad(y, _flat(leaves), towards)
        plain, final = short_convolution(
            **given, tail=tail, output_final_tail=True, cu_seqlens=cu_seqlens
        )
    assert none is None and final is not None
    assert all(map(torch.equal, y, plain)) and all(map(torch.equal, found, again))
    wanted, last = [], []
    for i, part in enumerate(exact["x"]):
        bias = exact["bias"][i] if case.bias else None
        before = tail[i].double() if tail else None
        made = reference.short_convolution(part, exact["weight"][i], bias, before, cu_seqlens)
        wanted.append(made[0])
        last.append(made[1])
    right = torch.autograd.grad(wanted, _flat(exact), [part.double() for part in towards])
    assert all(torch.equal(a.double(), b) for a, b in zip(final, last, strict=True))
    return _worst([*y, *found], [*wanted, *right])


@contextmanager
def forced(**stages: Knobs) -> Iterator[None]:
    """Stages with these knobs, where there are any."""
    for stage, knobs in stages.items():
        parts.force(stage, dict(knobs) or None)
    try:
        yield
    finally:
        for stage in stages:
            parts.force(stage, None)


def step(case: Convolution) -> bool:
    """One token: the bits of a call with tails, and these where the old ones lay."""
    given = case.inputs()
    y, final = short_convolution(**given, output_final_tail=True)
    tail = given.pop("tail")
    places = [part.data_ptr() for part in tail]
    found = short_convolution_step(**given, tail=tail)
    assert all(map(torch.equal, found, y)) and final is not None
    assert all(map(torch.equal, tail, final)) and [x.data_ptr() for x in tail] == places
    return True


def bad_lengths(device: str = "cpu") -> bool:
    """What cu_seqlens holds on a GPU nobody looked at: nothing outside the batch is read."""
    whole = torch.full((1, 9, 8), torch.nan, device=device, dtype=torch.float16)
    whole[:, 2:7] = torch.randn(1, 5, 8)
    weight = torch.randn(8, 4, device=device).requires_grad_()
    for lengths in ([0, 90, -7, 5], [-9, -3, 2, 99], [4, 4, 4], [0, 0, 0]):
        x = whole[:, 2:7].requires_grad_()
        for words in (0, 1):
            with forced(short_conv_backward=(("words", words),)):
                y, _ = short_convolution(
                    [x], [weight], cu_seqlens=torch.tensor(lengths, device=device)
                )
                assert y[0].isfinite().all(), lengths
                found = torch.autograd.grad(y[0].sum(), (x, weight))
            assert all(part.isfinite().all() for part in found), lengths
    return True


@dataclass(frozen=True)
class Norm:
    """A call of the gated norm."""

    rows: tuple[int, ...] = (3, 45)
    size: int = 128
    activation: str = "silu"
    eps: float = 1e-5
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None
    knobs: Knobs = ()
    backward: Knobs = ()
    device: str = "cpu"


def norm(case: Norm) -> float:
    """y and gradients, twice the same."""
    with forced(gated_norm=case.knobs, gated_norm_backward=case.knobs + case.backward):
        return _norm(case)


def _norm(case: Norm) -> float:
    torch.manual_seed(0)
    wide = case.weight_dtype or case.dtype
    x, gate = (torch.randn(*case.rows, case.size).to(case.device, case.dtype) for _ in range(2))
    given = [_leaf(x), _leaf(3 * gate), _leaf(torch.randn(case.size).to(case.device, wide))]
    exact = [_leaf(part.double()) for part in given]
    options = case.eps, case.activation
    with poisoned():
        y = gated_rms_norm(*given, eps=case.eps, activation=case.activation)
        towards = torch.randn_like(y)
        found = torch.autograd.grad(y, given, towards, retain_graph=True)
        again = torch.autograd.grad(y, given, towards)
        with torch.no_grad():
            plain = gated_rms_norm(*given, eps=case.eps, activation=case.activation)
    assert torch.equal(y, plain) and all(map(torch.equal, found, again))
    wanted = reference.gated_rms_norm(exact[0], exact[1], exact[2], *options)
    right = torch.autograd.grad(wanted, exact, towards.double())
    return _worst([y, *found], [wanted, *right])


@dataclass(frozen=True)
class Stream:
    """A call of the norm of a residual stream."""

    rows: tuple[int, ...] = (3, 15)
    size: int = 128
    added: bool = True
    eps: float = 1e-5
    stream_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    knobs: tuple[tuple[str, int], ...] = ()
    device: str = "cpu"


def stream_norm(case: Stream) -> float:
    """The stream that goes on, which is a sum and nothing else; its norm, and every gradient."""
    stages = "stream_norm", "stream_norm_backward"
    with forced(**dict.fromkeys(stages, case.knobs)):
        return _stream_norm(case)


def _stream_norm(case: Stream) -> float:
    torch.manual_seed(0)
    norm = _stream.ResidualNorm(case.size, eps=case.eps).to(case.device, case.weight_dtype)
    with torch.no_grad():
        norm.weight.normal_()
    x, added = (torch.randn(*case.rows, case.size).to(case.device) for _ in range(2))
    given = [_leaf(x.to(case.stream_dtype)), norm.weight]
    if case.added:
        given.append(_leaf(added.to(case.dtype)))
    exact = [_leaf(part.double()) for part in given]
    other = case.dtype if case.dtype != case.stream_dtype else None
    with poisoned():
        with patch.object(_stream, "_narrow_dtype", lambda x: other or x.dtype):
            assert _stream._has_norm_kernels(given[0], *(given[2:] or [None]), norm.weight)
            both = norm(given[0], *given[2:])
            with torch.no_grad():
                plain = norm(given[0], *given[2:])
        towards = [torch.randn_like(part) for part in both]
        found = torch.autograd.grad(both, given, towards, retain_graph=True)
        again = torch.autograd.grad(both, given, towards)
    assert all(map(torch.equal, both, plain)) and all(map(torch.equal, found, again))
    assert both[1].dtype == case.dtype
    total = given[0] + given[2] if case.added else given[0]
    assert torch.equal(both[0], total.to(case.stream_dtype))
    total = exact[0] + exact[2] if case.added else exact[0]
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + case.eps)
    wanted = [total, total * scale * exact[1]]
    right = torch.autograd.grad(wanted, exact, [part.double() for part in towards])
    return _worst([*both, *found], [*wanted, *right])


def swiglu(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> float:
    """y and both gradients, also of gates that SiLU lets nothing or everything through."""
    torch.manual_seed(0)
    gate, up = (torch.randn(shape).to(device, dtype) for _ in range(2))
    gate.flatten()[:4] = torch.tensor([-200.0, -20.0, 0.0, 200.0])
    given = [_leaf(gate), _leaf(up)]
    exact = [_leaf(part.double()) for part in given]
    with poisoned():
        assert _stream._has_swiglu_kernels(*given)
        y = _stream.swiglu(*given)
        towards = torch.randn_like(y)
        found = torch.autograd.grad(y, given, towards)
    wanted = reference.swiglu(*exact)
    right = torch.autograd.grad(wanted, exact, towards.double())
    return _worst([y, *found], [wanted, *right])


def sigmoid_backward(rows: int, channels: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """Into columns of a matrix, and into one of its own; beside them nothing is written."""
    torch.manual_seed(0)
    y = torch.randn(rows, channels).sigmoid().to(device, dtype)
    y.flatten()[:2] = torch.tensor([0.0, 1.0])
    # read by its own strides, as gradients come
    dy = torch.randn(channels, rows).to(device, dtype).t()
    whole = torch.full((rows, channels + 24), torch.nan, device=device, dtype=dtype)
    alone = torch.full_like(y, torch.nan)
    for dx in (whole[:, 8:-16], alone):
        stream_parts.sigmoid_backward(dy, y, dx)
    assert whole[:, :8].isnan().all() and whole[:, -16:].isnan().all()
    assert torch.equal(whole[:, 8:-16], alone)
    exact = y.double()
    return _worst([alone], [dy.double() * exact * (1 - exact)])


@dataclass(frozen=True)
class ProjectedNorm:
    """A norm that projects its gate of rows that lie apart."""

    tokens: int = 70
    heads: int = 2
    size: int = 64
    rank: int = 32
    activation: str = "sigmoid"
    bias: bool = True
    dtype: torch.dtype = torch.float16
    knobs: Knobs = ()
    device: str = "cpu"


def projected_norm(case: ProjectedNorm) -> float:
    torch.manual_seed(0)
    M, H, D, R = case.tokens, case.heads, case.size, case.rank

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape).to(case.device, case.dtype)

    x, low, weight = made(1, M, H, D), made(M, R + 24)[:, 8:-16], made(D)
    proj, bias = made(H * D, R) * R**-0.5, made(H * D) if case.bias else None
    assert stream_parts.projects(x, low, proj, weight)
    with poisoned(), forced(projected_norm=case.knobs):
        y = stream_parts.projected_norm(x, low, proj, bias, weight, 0.1, case.activation)
    gate = low.double() @ proj.double().t() + (0 if bias is None else bias.double())
    gate = gate.view(1, M, H, D).to(case.dtype).double()
    wanted = reference.gated_rms_norm(x.double(), gate, weight.double(), 0.1, case.activation)
    return _worst([y], [wanted])


def projected_in_a_layer(device: str = "cpu") -> int:
    """How often the norm projected, of a layer's end with all that may be in its way."""
    torch.manual_seed(0)
    first, second = nn.Linear(24, 32, bias=False), nn.Linear(32, 2 * 64)
    pair = nn.Sequential(first, second).half().to(device)
    # which is of the same product as the other's first
    other = nn.Sequential(nn.Linear(24, 16, bias=False), nn.Linear(16, 8)).half().to(device)
    norm = GatedRMSNorm(64).half().to(device)
    x = torch.randn(2, 9, 24).to(device, torch.float16)
    o = torch.randn(2, 9, 2, 64).to(device, torch.float16)
    found = 0
    for switch, grad, watched, dtype in (
        *(("1", False, False, o.dtype), ("0", False, False, o.dtype)),
        *(("1", True, False, o.dtype), ("1", False, True, o.dtype)),
        ("1", False, False, torch.float32),
    ):
        hook = norm.register_forward_hook(lambda *_: None) if watched else None
        with (
            patch.dict(os.environ, {"GDN2GEN_NORM_PROJECTS": switch}),
            patch.object(projections, "_gains", lambda _: True),
            torch.set_grad_enabled(grad),
        ):
            tokens = projections.Projected(x.clone().requires_grad_(grad), [pair, other])
            y = norm_of_projected(norm, o.to(dtype), tokens, pair)
            gate = tokens.by(pair).unflatten(-1, (2, 64))
            if y is not None:
                found += 1
                assert float((y - norm(o, gate)).abs().max()) < 4e-3
        if hook is not None:
            hook.remove()
    return found


def rotary(shape: tuple[int, ...], dtype: torch.dtype, rows: int = 1, device: str = "cpu") -> float:
    """y and its gradient of x [B, T, H, D], by angles of all rows, or of each of them."""
    torch.manual_seed(0)
    x = _leaf(torch.randn(shape).to(device, dtype))
    at = torch.arange(shape[1], device=device) + 7 * torch.arange(rows, device=device)[:, None]
    cos, sin = cosines_and_sines(at, shape[-1], 100.0)
    assert _rotary._has_kernel(x, cos, sin)
    with poisoned():
        y = turned(x, cos, sin)
        towards = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, towards)
    exact = _leaf(x.double())
    wanted = _rotary._formula(exact, cos.double(), sin.double())
    right = torch.autograd.grad(wanted, exact, towards.double())
    return _worst([y, dx], [wanted, *right])


@dataclass(frozen=True)
class Window:
    """Tokens, one after another, that attend over a window of rows in a ring."""

    seen: tuple[int, ...] = (0, 5, 71)
    """Tokens before, of each sequence."""
    window: int = 70
    heads: int = 2
    size: int = 24
    tokens: int = 3
    dtype: torch.dtype = torch.float32
    knobs: tuple[tuple[str, int], ...] = (("BT", 64), ("BW", 16))
    device: str = "cpu"


def window_step(case: Window) -> float:
    """o, and the ring; rows of tokens that never were hold NaN."""
    torch.manual_seed(0)
    B, W, H, D = len(case.seen), case.window, case.heads, case.size
    ring = torch.randn(2, B, W, H, D).to(case.device, case.dtype)
    for b, seen in enumerate(case.seen):
        ring[:, b, seen:] = torch.nan
    kept = {"k": ring[0], "v": ring[1], "seen": torch.tensor(case.seen, device=case.device)}
    exact = {name: ring[i].double() for i, name in enumerate("kv")}
    found, wanted = [], []
    with poisoned(), forced(window_step=case.knobs):
        for t in range(case.tokens):
            q, k, v = torch.randn(3, B, 1, H, D).to(case.device, case.dtype)
            assert _windowed.steps_by_kernel(q, k, v, kept)
            turns = cosines_and_sines(kept["seen"][:, None], D, 100.0)
            rings = kept["k"], kept["v"], kept["seen"]
            found.append(stream_parts.window_step(q, k, v, *rings, *turns))
            qk = [turned(x, *turns).double() for x in (q, k)]
            wanted.append(_one_token(*qk, v.double(), exact, [x + t for x in case.seen]))
    assert kept["seen"].tolist() == [x + case.tokens for x in case.seen]
    for name, x in exact.items():
        torch.testing.assert_close(kept[name].double(), x, equal_nan=True, rtol=0.008, atol=1e-6)
    return _worst(found, wanted)


def _one_token(q: Tensor, k: Tensor, v: Tensor, ring: dict[str, Tensor], seen: list[int]) -> Tensor:
    """o in fp64, sequence by sequence, and the token into the ring."""
    rows = []
    for b, before in enumerate(seen):
        W = ring["k"].shape[1]
        ring["k"][b, before % W], ring["v"][b, before % W] = k[b, 0], v[b, 0]
        there = {name: x[b, : min(before + 1, W)] for name, x in ring.items()}
        scores = torch.einsum("hd,whd->hw", q[b, 0], there["k"]) * q.shape[-1] ** -0.5
        rows.append(torch.einsum("hw,whd->hd", scores.softmax(-1), there["v"]))
    return torch.stack(rows)[:, None]


def model_by_kernels(device: str = "cpu") -> float:
    """A model's loss and gradients by the kernels between its mixers, beside those without, in
    fp32; and that checkpoints change no bit."""
    torch.manual_seed(0)
    model = LanguageModel(
        13, hidden_size=32, num_layers=2, num_heads=2, head_dim=32, window=4, init_std=0.2, inner=24
    ).to(device)
    tokens = torch.randint(13, (2, 10), device=device)

    def run() -> list[Tensor]:
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        return [loss.detach(), *torch.autograd.grad(loss, [*model.parameters()])]

    with patch.object(StreamNorm, "apply", wraps=StreamNorm.apply) as seen:
        found = run()
    assert seen.call_count == 4
    model.checkpoint_activations = True
    assert all(map(torch.equal, run(), found))
    model.checkpoint_activations = False
    with patch.object(_stream, "by_kernels", lambda device: False):
        wanted = run()
    return _worst(found, [x.double() for x in wanted])


def compiled() -> bool:
    """Each op is one node, whose gradients are those without a compiler."""
    torch.manual_seed(0)
    x, gate = torch.randn(2, 1, 9, 16).requires_grad_()
    weight, scale = torch.randn(16, 4).requires_grad_(), torch.randn(16).requires_grad_()
    into = [x, gate, weight, scale]

    def run(cu_seqlens: Tensor) -> Tensor:
        (y, z), _ = short_convolution([x, gate], [weight, weight], cu_seqlens=cu_seqlens)
        return gated_rms_norm(y, z, scale)

    def one(tail: Tensor) -> Tensor:
        with torch.no_grad():
            return short_convolution_step([x[:, :1]], [weight], tail=[tail])[0]

    lengths, tail = torch.tensor([0, 4, 9]), torch.randn(1, 3, 16)
    both = [run, torch.compile(run, fullgraph=True, backend="aot_eager")]
    results = [(y, *torch.autograd.grad(y.sum(), into)) for y in (f(lengths) for f in both)]
    torch.testing.assert_close(*results)
    tails = tail.clone(), tail.clone()
    steps = one(tails[0]), torch.compile(one, fullgraph=True, backend="aot_eager")(tails[1])
    assert torch.equal(*steps) and torch.equal(*tails)
    return True


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _flat(groups: dict[str, list[Tensor]]) -> list[Tensor]:
    return [part for group in groups.values() for part in group]


def _worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    errors = []
    for one, other in zip(found, wanted, strict=True):
        assert one.isfinite().all()
        errors.append(float((one.double() - other).abs().max() / other.abs().max()))
    return max(errors)


def known(device: str = "cpu") -> int:
    """Calls like one before give its bits, by what was kept of it; how many of them were.

    With a gradient and without, of views, and of a saved tensor that a hook laid out anew.
    """
    torch.manual_seed(0)
    part_calls.KNOWN.clear()
    whole = torch.randn(2, 9, 40, device=device)
    x = [_leaf(whole[..., :16]), _leaf(whole[..., 16:])]
    weight = [_leaf(torch.randn(part.shape[2], 4, device=device)) for part in x]
    shapes = (5, 16), (5, 16), (16,)
    rows, gate, scale = (_leaf(torch.randn(*shape, device=device)) for shape in shapes)
    seen: list[Any] = []
    look = part_calls.KNOWN.seen

    def watched(*given: Any) -> Any:
        seen.append(look(*given))
        return seen[-1]

    def run() -> list[Tensor]:
        y = [*short_convolution(x, weight)[0], gated_rms_norm(rows, gate, scale)]
        if not torch.is_grad_enabled():
            return y
        into = [*x, *weight, rows, gate, scale]
        return [*y, *torch.autograd.grad(y, into, [part.detach().clone() for part in y])]

    wanted = run()
    anew = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.new_empty(*t.shape, 2)[..., 0].copy_(t)
    )
    with (
        patch.object(ops, "interpreted", lambda: False),
        patch.object(part_calls.KNOWN, "seen", watched),
    ):
        for _ in range(3):
            assert all(map(torch.equal, run(), wanted))
        with torch.no_grad():
            assert all(map(torch.equal, run(), wanted)) and all(map(torch.equal, run(), wanted))
        with anew:
            assert all(map(torch.equal, run(), wanted))
        rows = _leaf(
            rows.new_empty(16, 5).t().copy_(rows.detach())
        )  # another kind, which is copied
        assert all(map(torch.equal, run(), wanted))
    part_calls.KNOWN.clear()
    return sum(call is not None for call in seen)
