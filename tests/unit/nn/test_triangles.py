"""Attention over a window as causal attention of blocks, beside a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gdn2gen.nn import LanguageModel, _triangles, _windowed
from gdn2gen.nn._triangles import attended_by_triangles
from gdn2gen.nn._windowed import attended, window_mask


def _given(tokens: int, heads: int = 3, dim: int = 16) -> list[Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(2, tokens, heads, dim, dtype=torch.float64) for _ in range(3)]
    return [x.requires_grad_() for x in made]


@pytest.mark.parametrize(("window", "blocks"), [(2, 2), (5, 2), (8, 3), (33, 2), (64, 4)])
def test_as_by_a_mask(window: int, blocks: int) -> None:
    into = _given(window * blocks)
    found = attended_by_triangles(*into, window)
    wanted = attended(*into, window_mask(window * blocks, window, found.device))
    torch.testing.assert_close(found, wanted)
    # of another layout than o
    do = torch.randn_like(wanted.transpose(1, 2)).contiguous().transpose(1, 2)
    one, other = (torch.autograd.grad(x, into, do) for x in (found, wanted))
    torch.testing.assert_close(one, other)


def test_in_bf16() -> None:
    """As near to fp64 as one call of the same kernels with a mask."""
    exact = _given(128)
    into = [x.detach().bfloat16().requires_grad_() for x in exact]
    mask, do = window_mask(128, 32, exact[0].device), torch.randn_like(exact[0])
    wanted = attended(*exact, mask)
    right = (wanted, *torch.autograd.grad(wanted, exact, do))
    runs = attended_by_triangles(*into, 32), attended(*into, mask)
    off = []
    for run in runs:
        found = (run, *torch.autograd.grad(run, into, do.bfloat16()))
        assert all(x.dtype == torch.bfloat16 for x in found)
        pairs = zip(found, right, strict=True)
        off.append([((x.double() - y).norm() / y.norm()).item() for x, y in pairs])
    assert all(one < 1.5 * other for one, other in zip(*off, strict=True)), off


@pytest.mark.parametrize("sign", [1, -1])
def test_keys_that_no_sum_has_weighed(sign: int) -> None:
    """The last query of a block sees nothing of the one before, whose scores may be beyond
    whatever it knows: 1e4 above, or all the weight of the others."""
    q, k, v = _given(24)
    with torch.no_grad():
        k[:, :8] = sign * 1e4 * q[:, 15:16] / q[:, 15:16].square().sum(-1, keepdim=True)
    into = [q, k, v]
    found = attended_by_triangles(*into, 8)
    wanted = attended(*into, window_mask(24, 8, found.device))
    torch.testing.assert_close(found, wanted)
    do = torch.randn_like(wanted)
    one, other = (torch.autograd.grad(x, into, do) for x in (found, wanted))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert all(x.isfinite().all() for x in one)


def test_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients as by a mask, and the same bits with activations checkpointed."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "inner": 64}
    model = LanguageModel(61, **sizes, window=8)
    seen = torch.randint(61, (2, 25))
    calls = []

    def run() -> list[Tensor]:
        loss = model(seen[:, :-1], targets=seen[:, 1:])
        return [loss.detach(), *torch.autograd.grad(loss, [*model.parameters()])]

    def counted(*given: object) -> Tensor:
        calls.append(given)
        return attended_by_triangles(*given)

    masked = run()
    monkeypatch.setattr(_windowed, "_takes_windows", lambda _: True)
    monkeypatch.setattr(_triangles, "wanted", lambda *_: True)
    monkeypatch.setattr(_triangles, "attended_by_triangles", counted)
    found = run()
    assert len(calls) == 1
    torch.testing.assert_close(found, masked, atol=1e-6, rtol=1e-4)
    model.checkpoint_activations = True
    assert all(map(torch.equal, run(), found))
    assert len(calls) == 3


def test_not_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    q = torch.randn(1, 16, 2, 16)
    on_gpu = type("Anywhere", (), {"shape": q.shape, "is_cuda": True, "device": q.device})()
    monkeypatch.setattr(_triangles, "is_watched", lambda _: False)
    monkeypatch.delenv(_triangles.SWITCH, raising=False)
    assert not _triangles.wanted(on_gpu, on_gpu, on_gpu, 8)
    monkeypatch.setenv(_triangles.SWITCH, "1")
    assert _triangles.wanted(on_gpu, on_gpu, on_gpu, 8)
    assert not _triangles.wanted(on_gpu, on_gpu, on_gpu, 6)  # blocks of other sizes
    assert not _triangles.wanted(q, q, q, 8)  # of a CPU
