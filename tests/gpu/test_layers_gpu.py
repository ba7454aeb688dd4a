"""Layers on a GPU: beside their equations, in pieces, as a graph, compiled, beside FLA's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
import torch
from gpu_support import DEVICE
from layer_cases import ALL, LAYERS, MAMBA, by_equations, taken, theirs
from mamba_equations import mamba_by_equations
from torch import Tensor
from two_processes import compare

from gdn2gen.nn import Cache, LanguageModel, _projected_norm, _stream, _triangles, _windowed
from gdn2gen.runtime import stream_parts
from gdn2gen.runtime.room import Room

pytestmark = pytest.mark.gpu

HIDDEN: Final = 256
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_v_heads": 4, "allow_neg_eigval": True, "lower_bound": -5.0, "conv_size": 3},
)


def _layer(member: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    torch.manual_seed(0)
    given = {"num_heads": 2, "head_dim": 64, "expand_v": 1.0, **options}
    if member in MAMBA:
        groups = 2 if "num_v_heads" in options else 1
        given = {**given, "num_heads": 8, "state_size": 128, "n_groups": groups}
    made = ALL[member](HIDDEN, layer_idx=0, **taken(member, given))
    return made.to(DEVICE, dtype)


def _tokens(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, HIDDEN, device=DEVICE).to(dtype)


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "grouped"))
@pytest.mark.parametrize("member", [*ALL])
def test_equations(member: str, options: dict[str, Any]) -> None:
    """In bf16, beside fp64 of the same weights: y and every gradient."""
    layer, x = _layer(member, **options), _tokens(2, 150).requires_grad_()
    exact = _layer(member, torch.float64, **options)
    exact.load_state_dict(layer.state_dict())
    rows = x.detach().double().requires_grad_()
    by = mamba_by_equations if member in MAMBA else by_equations
    wanted = torch.stack([by(exact, row) for row in rows])
    y = layer(x)
    assert _error(y, wanted) < 0.015
    towards = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *layer.parameters()], towards)
    right = torch.autograd.grad(wanted, [rows, *exact.parameters()], towards.double())
    names = ["x", *(name for name, _ in layer.named_parameters())]
    errors = {n: _error(a, b) for n, a, b in zip(names, found, right, strict=True)}
    assert max(errors.values()) < 0.03, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sigmoids_hand_back_together(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one product with what is convolved, as by their own; in fp32 under autocast."""
    layer = _layer("gdn2", dtype, num_heads=4, head_dim=128)
    x = _tokens(2, 150, dtype=dtype).requires_grad_()
    into, towards = [x, *layer.parameters()], torch.randn_like(x)
    holding, held = Room.holding, list[bool]()

    def watched(self: Room, gradients: list[Tensor | None]) -> Tensor | None:
        whole = holding(self, gradients)
        held.append(whole is not None)
        return whole

    monkeypatch.setattr(Room, "holding", watched)

    def run() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
            y = layer(x)
        return [y, *torch.autograd.grad(y, into, towards.to(y.dtype))]

    apart = run()
    monkeypatch.setenv("GDN2GEN_SLOPES_TOGETHER", "1")
    together = run()
    assert held == [True, True] and torch.equal(apart[0], together[0])
    assert max(map(_error, together, apart)) < 0.01


@pytest.mark.parametrize("member", ["gdn2", "kda"])
def test_a_norm_that_projects_its_gate(member: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = _layer(member, num_heads=4, head_dim=128), _tokens(2, 1031)
    seen = list[Tensor]()

    def watched(*given: Any) -> Tensor:
        seen.append(stream_parts.projected_norm(*given))
        return seen[-1]

    monkeypatch.setattr(_projected_norm, "projected_norm", watched)
    with torch.inference_mode():
        apart = layer(x)
        monkeypatch.setenv("GDN2GEN_NORM_PROJECTS", "1")
        together = layer(x)
    assert len(seen) == 1 and _error(together, apart) < 5e-3
    assert _error(layer(x.clone().requires_grad_()), apart) < 5e-3
    assert len(seen) == 1  # a gradient wants the gate


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.015), (torch.float32, 5e-3)])
@pytest.mark.parametrize("member", [*ALL])
def test_pieces(member: str, dtype: torch.dtype, near: float) -> None:
    """Prefill, then steps; packed; padded on either side: each near one pass over one sequence."""
    layer, x = _layer(member, dtype, num_v_heads=4), _tokens(2, 140, dtype=dtype)
    cache = Cache(2)
    with torch.inference_mode():
        whole = layer(x)
        parts = [layer(x[:, :131], cache=cache)]
        parts += [layer(x[:, t : t + 1], cache=cache) for t in range(131, 140)]
        assert _error(torch.cat(parts, 1), whole) < near
        lengths = torch.tensor([0, 61, 61, 140], device=DEVICE)
        packed = layer(x[:1], cu_seqlens=lengths)
        alone = torch.cat((layer(x[:1, :61]), layer(x[:1, 61:])), 1)
        assert _error(packed, alone) < near
        mask = torch.ones(2, 140, device=DEVICE)
        mask[0, :9] = mask[1, 70:] = 0
        padded = layer(x.masked_fill(mask[..., None] == 0, torch.nan), attention_mask=mask)
        assert _error(padded[0, 9:], layer(x[:1, 9:])[0]) < near
        assert _error(padded[1, :70], layer(x[1:, :70])[0]) < near
        assert not padded[mask == 0].any()


@pytest.mark.parametrize("member", [*ALL])
def test_a_graph_of_one_token_is_replayed(member: str) -> None:
    """The cache's tensors stay where they are: a graph goes on where the last token left them."""
    layer, x, cache = _layer(member), _tokens(3, 40), Cache(3)
    token = x[:, :1].clone()
    with torch.inference_mode():
        layer(x[:, :20], cache=cache)
        plain, warm = cache.copy(), cache.copy()
        layer(token, cache=warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(token, cache=cache)
        for t in range(20, 40):
            token.copy_(x[:, t : t + 1])
            graph.replay()
            assert torch.equal(out, layer(x[:, t : t + 1], cache=plain))


def test_a_graph_of_a_model_that_attends_is_replayed() -> None:
    """Attention's cache turns around its window in a graph, too; prompts are longer than it."""
    torch.manual_seed(0)
    model = LanguageModel(
        64, hidden_size=256, num_layers=2, num_heads=2, head_dim=128, window=32, init_std=0.2
    )
    model = model.to(DEVICE).bfloat16()
    tokens, cache = torch.randint(64, (3, 90), device=DEVICE), Cache(3)
    token = tokens[:, :1].clone()
    with torch.inference_mode():
        model(tokens[:, :20], cache=cache)
        plain, warm = cache.copy(), cache.copy()
        model(token, cache=warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(token, cache=cache)
        for t in range(20, 90):
            token.copy_(tokens[:, t : t + 1])
            graph.replay()
            assert torch.equal(out, model(tokens[:, t : t + 1], cache=plain))
        assert _error(out, model(tokens)[:, -1:]) < 0.03


@pytest.mark.parametrize("autocast", [False, True])
def test_generate_by_a_graph(autocast: bool) -> None:
    """The same tokens, likeliest and drawn, past the window's end; and a call after it."""
    torch.manual_seed(0)
    model = LanguageModel(
        64, hidden_size=256, num_layers=2, num_heads=2, head_dim=128, window=32, init_std=0.2
    )
    model = model.to(DEVICE) if autocast else model.to(DEVICE).bfloat16()
    tokens = torch.randint(64, (3, 20), device=DEVICE)

    def run(graph: bool, temperature: float) -> Tensor:
        drawn = torch.Generator(DEVICE).manual_seed(0)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return model.generate(tokens, 40, temperature=temperature, generator=drawn, graph=graph)

    for temperature in (0.0, 1.0):
        wanted = run(False, temperature)
        assert wanted[:, 20:].unique().numel() > 3
        assert torch.equal(run(True, temperature), wanted)
        assert torch.equal(run(False, temperature), wanted)


def test_a_model_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of fp32 weights by the kernels between its mixers, as by torch's own
    operations; tokens are projected by one function in both."""
    torch.manual_seed(0)
    model = LanguageModel(
        64, hidden_size=256, num_layers=2, num_heads=2, head_dim=128, window=32, init_std=0.1
    ).to(DEVICE)
    tokens = torch.randint(64, (3, 91), device=DEVICE)

    def run() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        return [loss, *torch.autograd.grad(loss, [*model.parameters()])]

    found = run()
    monkeypatch.setattr(_stream, "by_kernels", lambda device: False)
    for one, other in zip(found, run(), strict=True):
        assert one.dtype == other.dtype
        assert _error(one, other) < 0.03
    monkeypatch.undo()
    model.checkpoint_activations = True
    for one, other in zip(run(), found, strict=True):
        assert _error(one, other) < 1e-3  # flash kernels add up dq in any order


@pytest.mark.parametrize("window", [1, 33, 64])
def test_windows_by_flash_kernels(window: int) -> None:
    """o and gradients as by a mask in fp32; with every key scaled up, so that a wrong one shows."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(3, 150, 4, 64, device=DEVICE).bfloat16() for _ in range(4))
    k = 4 * k
    into = [x.requires_grad_() for x in (q, k, v)]
    assert _windowed._takes_windows(q)
    found = _windowed.attended_within(q, k, v, window)
    mask = _windowed.window_mask(150, window, q.device)
    wanted = _windowed.attended(*(x.float() for x in into), mask)
    assert _error(found, wanted) < 0.01
    gradients = torch.autograd.grad(found, into, do)
    right = torch.autograd.grad(wanted, into, do.float())
    if window == 1:  # what a softmax of one says of q and k is nothing but rounding
        assert all(x.norm() < 1e-3 * do.norm() for x in (*gradients[:2], *right[:2]))
        gradients, right = gradients[2:], right[2:]
    for one, other in zip(gradients, right, strict=True):
        assert _error(one, other) < 0.02
    # compiled, too
    compiled = torch.compile(_windowed.attended_within, fullgraph=True)
    assert _error(compiled(q, k, v, window), wanted) < 0.01


@pytest.mark.parametrize(("window", "blocks", "dim"), [(64, 2, 64), (96, 3, 128), (2048, 2, 128)])
def test_windows_by_triangles(
    monkeypatch: pytest.MonkeyPatch, window: int, blocks: int, dim: int
) -> None:
    """o and gradients by cuDNN's kernels as by a mask in fp32; in a graph the same bits of o."""
    torch.manual_seed(0)
    shape = 2, window * blocks, 4, dim
    q, k, v, do = (torch.randn(shape, device=DEVICE).bfloat16() for _ in range(4))
    k = 4 * k
    into = [x.requires_grad_() for x in (q, k, v)]
    monkeypatch.setenv(_triangles.SWITCH, "1")
    if not _triangles.wanted(q, k, v, window):
        pytest.skip("another GPU's")
    found = _windowed.attended_within(q, k, v, window)
    assert "Triangles" in type(found.grad_fn).__name__
    mask = _windowed.window_mask(shape[1], window, q.device)
    wanted = _windowed.attended(*(x.float() for x in into), mask)
    assert _error(found, wanted) < 0.01
    gradients = torch.autograd.grad(found, into, do)
    right = torch.autograd.grad(wanted, into, do.float())
    for one, other in zip(gradients, right, strict=True):
        assert _error(one, other) < 0.02
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        again = _windowed.attended_within(q, k, v, window)
    graph.replay()
    assert torch.equal(again, found)


@pytest.mark.parametrize("member", [*LAYERS])
def test_compiled(member: str) -> None:
    """By Inductor in one graph: y and gradients near those without."""
    # all layers share one forward, which Dynamo compiles eight times and no more
    torch._dynamo.reset()
    layer, x = _layer(member), _tokens(2, 130).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True)
    into = [x, *layer.parameters()]
    y, found = layer(x), compiled(x)
    assert _error(found, y) < 0.015
    towards = torch.randn_like(y)
    wanted = torch.autograd.grad(y, into, towards)
    for one, other in zip(torch.autograd.grad(found, into, towards), wanted, strict=True):
        assert _error(one, other) < 0.03
    cache = Cache(2)
    with torch.no_grad():
        layer(x[:, :129], cache=cache)
        assert _error(compiled(x[:, 129:], cache=cache), y[:, 129:]) < 0.02


@pytest.mark.parametrize("options", [{}, {"num_v_heads": 4}], ids=("plain", "grouped"))
@pytest.mark.parametrize("member", [*LAYERS])
def test_beside_flash_linear_attention(member: str, options: dict[str, Any]) -> None:
    """Its layer with the same weights, in both modes."""
    pytest.importorskip("fla.layers", exc_type=ImportError)
    if options and member in ("delta_rule", "gla"):
        pytest.skip("has no groups of value heads there")
    layer = theirs(member, HIDDEN, 64, **options).to(DEVICE).bfloat16()
    ours, x = _layer(member, **options), _tokens(2, 150)
    layer.load_state_dict(ours.state_dict())
    assert _error(ours(x), layer(x)[0]) < 0.02
    with torch.no_grad():
        layer.eval()
        assert _error(ours(x[:, :1]), layer(x[:, :1])[0]) < 0.02


def test_two_gpus_as_one(tmp_path: Path) -> None:
    """By DDP and by FSDP2, in fp32."""
    if torch.cuda.device_count() < 2:
        pytest.skip("wants two GPUs")
    compare(DEVICE, "nccl", tmp_path, near=1e-3)
