"""The small language model and its attention: decoding, training, torch's machinery."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from gdn2gen.base.errors import InputError
from gdn2gen.nn import Cache, LanguageModel, SlidingWindowAttention

WORDS = 13


def _model(**options: Any) -> LanguageModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16}
    return LanguageModel(WORDS, **{**sizes, "init_std": 0.2, **options})


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(WORDS, shape, generator=torch.Generator().manual_seed(1))


def test_attention_sees_its_window() -> None:
    """Beside a loop over tokens, in fp64; what it sees goes by distances, not by positions."""
    torch.manual_seed(0)
    layer = SlidingWindowAttention(24, num_heads=2, window=3).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    q, k, v = ((x @ p.weight.T).view(2, 7, 2, 12) for p in layer._projections())
    for t in range(7):
        seen = range(max(0, t - 2), t + 1)
        angles = [(t - s) * 10000.0 ** (-torch.arange(6).double() / 6) for s in seen]
        turned = [torch.polar(torch.ones(6).double(), a) for a in angles]
        ours = torch.complex(q[:, t, :, :6], q[:, t, :, 6:])
        theirs = [torch.complex(k[:, s, :, :6], k[:, s, :, 6:]) for s in seen]
        pairs = zip(theirs, turned, strict=True)
        scores = torch.stack([(ours * turn * key.conj()).real.sum(-1) for key, turn in pairs], -1)
        weights = (scores / 12**0.5).softmax(-1)
        o = torch.einsum("bhs,bshd->bhd", weights, v[:, seen.start : seen.stop])
        wanted = o.flatten(1) @ layer.o_proj.weight.T
        torch.testing.assert_close(layer(x)[:, t], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [1, 4, 64])
def test_attention_in_pieces(window: int) -> None:
    """Rows of the cache before a sequence are no tokens; sequences begin anew alone."""
    torch.manual_seed(0)
    layer = SlidingWindowAttention(24, num_heads=2, window=window, layer_idx=0)
    x, cache = torch.randn(2, 9, 24), Cache(2)
    with torch.no_grad():
        parts = [layer(x[:, :2], cache=cache), layer(x[:, 2:6], cache=cache)]
        place = cache.layer(0)["k"].data_ptr()
        parts += [layer(x[:, t : t + 1], cache=cache) for t in range(6, 9)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x))
        assert cache.layer(0)["k"].data_ptr() == place
        # a few tokens after single ones, whose rows lie in no order, and one after these
        more = torch.cat((x, torch.randn(2, 4, 24)), 1)
        parts += [layer(more[:, 9:12], cache=cache), layer(more[:, 12:], cache=cache)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(more))
        cache.reset(torch.tensor([1]))
        torch.testing.assert_close(layer(x[:, :1], cache=cache)[1], layer(x[1:, :1])[0])


def test_a_token_moves_no_other() -> None:
    """It takes the row of the one that leaves the window; sequences are at rows of their own."""
    layer, x = SlidingWindowAttention(8, num_heads=1, window=4, layer_idx=0), torch.randn(2, 9, 8)
    cache = Cache(2)
    with torch.no_grad():
        layer(x[:, :6], cache=cache)
        cache.reset(torch.tensor([1]))
        before = cache.copy().layer(0)
        y = layer(x[:, 6:7], cache=cache)
    torch.testing.assert_close(y[0], layer(x[:1, :7])[0, 6:])
    torch.testing.assert_close(y[1], layer(x[1:, 6:7])[0])
    after = cache.layer(0)
    assert after["seen"].tolist() == [7, 1]
    for name in "kv":
        changed = (after[name] != before[name]).any(-1)[..., 0]
        assert changed.nonzero().tolist() == [[0, 6 % 4], [1, 0]]


@pytest.mark.parametrize("options", [{"mixer": "kda"}, {"window": 4}], ids=("kda", "hybrid"))
def test_decoding_is_one_pass(options: dict[str, Any]) -> None:
    model, tokens, cache = _model(**options), _tokens(2, 9), Cache(2)
    with torch.no_grad():
        whole = model(tokens)
        parts = [model(tokens[:, :5], cache=cache)]
        parts += [model(tokens[:, t : t + 1], cache=cache) for t in range(5, 9)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        found = tokens
        for _ in range(6):
            found = torch.cat((found, model(found)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(tokens, 6), found)
    assert torch.equal(model.generate(tokens, 6, graph=True), found)  # without a GPU, none
    assert found[:, 9:].unique().numel() > 1


def test_tokens_are_drawn_by_their_chances() -> None:
    model, tokens = _model(num_layers=1), _tokens(1, 3)
    with torch.no_grad():
        chances = (model(tokens)[0, -1] / 2).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    rows = tokens.expand(4000, -1)
    drawn = model.generate(rows, 1, temperature=2.0, generator=generator)[:, -1]
    found = drawn.bincount(minlength=WORDS) / 4000
    assert (found - chances).abs().max() < 0.03 and (found > 0).sum() > 3
    coldest = model.generate(tokens, 4, temperature=1e-45, generator=generator)
    assert torch.equal(coldest, model.generate(tokens, 4))


def test_it_learns() -> None:
    """A sequence by heart, in bf16 with weights in fp32; and goes on with it."""
    model, row = _model(window=8), _tokens(1, 9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(16):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(row[:, :-1], targets=row[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.dtype == torch.float32 and loss < 0.1
    assert torch.equal(model.generate(row[:, :4], 5), row)


def test_checkpoints_and_one_graph() -> None:
    """The same loss and gradients when activations are computed again, and from one graph."""
    model, tokens = _model(window=4, num_layers=2), _tokens(1, 9)
    given = tokens[:, :-1], tokens[:, 1:]
    wanted = _gradients(model, *given)
    model.checkpoint_activations = True
    torch.testing.assert_close(_gradients(model, *given), wanted)
    model.checkpoint_activations = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_gradients(compiled, *given), wanted, rtol=1e-4, atol=1e-5)


def _gradients(model: Any, tokens: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    loss = model(tokens, targets=targets)
    return [loss.detach(), *torch.autograd.grad(loss, [*model.parameters()])]


def test_parameters() -> None:
    """One table of embeddings; every other block attends; all is drawn, on a later device too."""
    with torch.device("meta"):
        model = _model(num_layers=4, window=4, init_std=0.02, num_v_heads=4)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    model.reset_parameters()
    assert all(p.isfinite().all() for p in model.parameters())
    attends = [isinstance(block.mixer, SlidingWindowAttention) for block in model.blocks]
    assert attends == [False, True, False, True]
    wide, narrow = model.blocks[1].mixer.q_proj.weight, model.blocks[1].mixer.o_proj.weight
    assert 0.018 < wide.std() < 0.022 and 0.018 < narrow.std() * 8**0.5 < 0.022
    assert sum("embeddings" in name for name in model.state_dict()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"mixer": "rwkv"},
            "mixer must be one of 'gdn2', 'kda', 'gated_delta_rule', 'delta_rule', 'gla', "
            "'mamba2', 'mamba3', but got",
        ),
        ({"num_layers": 0}, "num_layers must be at least 1, but got 0"),
        ({"inner": -1}, "inner must be at least 1, but got -1"),
        ({"window": 0}, "window must be at least 1, but got 0"),
        ({"window": 2, "attention_heads": 5}, "num_heads times an even head dim"),
    ],
)
def test_models_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        _model(**options)


def test_calls_that_do_not_fit() -> None:
    model = _model(num_layers=1)
    with pytest.raises(InputError, match=r"must be \[B, T\], but got \(3,\) and None"):
        model(_tokens(3))
    with pytest.raises(InputError, match=r"\(1, 3\) and \(1, 2\)"):
        model(_tokens(1, 3), targets=_tokens(1, 2))
    with pytest.raises(InputError, match="cache is of 2 sequences"):
        model(_tokens(1, 3), cache=Cache(2))
    with pytest.raises(InputError, match=r"\[B, T\] with T >= 1"):
        model.generate(_tokens(1, 0), 1)
    with pytest.raises(InputError, match="must not be negative, but got -1"):
        model.generate(_tokens(1, 1), -1)
    with pytest.raises(InputError, match="must not be negative, but got 1 and nan"):
        model.generate(_tokens(1, 1), 1, temperature=torch.nan)
