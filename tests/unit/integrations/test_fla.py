"""flash-linear-attention's functions on ours, in a stand-in for its modules: it is not run here."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import layer_cases
import pytest
import torch
from layer_cases import LAYERS, small, tokens
from torch import Tensor, nn

import gdn2gen
from gdn2gen.base.errors import UnsupportedError
from gdn2gen.family.inputs import make_inputs
from gdn2gen.integrations import fla

CALLS: list[str] = []


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_context: Any = None,
    **kwargs: Any,
) -> tuple[str, None]:
    CALLS.append("chunk_kda")
    return "theirs", None


def causal_conv1d(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    backend: str = "triton",
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[str, None]:
    CALLS.append("causal_conv1d")
    return "theirs", None


def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> str:
    CALLS.append("rms_norm_gated")
    return "theirs"


class Block(nn.Module):
    """As transformers' models keep functions."""

    def __init__(self) -> None:
        super().__init__()
        self.op = sys.modules["fla.ops.kda"].chunk_kda


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Modules in place of flash-linear-attention's, and of a model that has its ops by name."""
    homes = {
        "fla.ops.kda": chunk_kda,
        "fla.modules.convolution": causal_conv1d,
        "fla.modules.fused_norm_gate": rms_norm_gated,
    }
    names = ("fla", "fla.ops", "fla.modules", "fla.ops.gdn2", "fla.layers.kda", "a_model", *homes)
    made = {name: ModuleType(name) for name in names}
    for name, function in homes.items():
        setattr(made[name], function.__name__, function)
    made["fla.layers.kda"].chunk_kda = chunk_kda  # type: ignore[attr-defined]
    made["a_model"].renamed = chunk_kda  # type: ignore[attr-defined]
    for name, module in made.items():
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    CALLS.clear()
    yield made
    fla.unregister()


def test_ours_stand_for_theirs_and_give_way(theirs: dict[str, ModuleType]) -> None:
    block = Block()
    report = fla.register(block)
    (name,) = (x for x in report.replaced if x.endswith("chunk_kda"))
    assert {*report.replaced[name]} >= {"fla.ops.kda", "fla.layers.kda", "a_model", "Block"}
    assert "has no attribute 'chunk_gdn2'" in report.missing["fla.ops.gdn2.chunk_gdn2"]
    assert "fla.ops.gdn2.chunk_gdn2: not replaced" in str(report)
    given = make_inputs(1, 20, 2, 16, 16, op="kda")
    wanted = gdn2gen.chunk_kda(**given, use_qk_l2norm_in_kernel=True)[0]
    home = theirs["fla.ops.kda"].chunk_kda
    for function in (home, theirs["a_model"].renamed, block.op, theirs["fla.layers.kda"].chunk_kda):
        o, state = function(**given, use_qk_l2norm_in_kernel=True, cp_context=None, chunk_size=64)
        assert torch.equal(o, wanted) and state is None
    positional = home(*(given[x] for x in ("q", "k", "v", "g", "beta")), 0.5)[0]
    assert torch.equal(positional, gdn2gen.chunk_kda(**given, scale=0.5)[0])
    assert not CALLS and fla.register(block).replaced == {}
    fla.unregister(block)
    assert theirs["fla.ops.kda"].chunk_kda is chunk_kda and block.op is chunk_kda
    assert theirs["a_model"].renamed is chunk_kda


def test_what_ours_refuse_runs_as_it_was(theirs: dict[str, ModuleType]) -> None:
    """Keywords that ours have not, head dims and dtypes: said once, counted always."""
    fla.register()
    function = theirs["fla.ops.kda"].chunk_kda
    given = make_inputs(1, 4, 2, 16, 16, op="kda")
    with pytest.warns(RuntimeWarning, match="runs as it was: cp_context is given, which ours does"):
        assert function(**given, cp_context=object()) == ("theirs", None)
    assert function(**given, cp_context=object()) == ("theirs", None)
    with pytest.warns(RuntimeWarning, match="k must be"):
        assert function(**given | {"k": given["k"][:, 1:]}) == ("theirs", None)
    counts = fla.refused()["fla.ops.kda.chunk_kda"]
    assert sorted(counts.values()) == [1, 2] and CALLS == ["chunk_kda"] * 3


def test_convolutions_and_norms(theirs: dict[str, ModuleType]) -> None:
    fla.register()
    x, weight, scale = torch.randn(2, 5, 8), torch.randn(8, 4), torch.randn(8)
    convolve = theirs["fla.modules.convolution"].causal_conv1d
    y, state = convolve(x=x, weight=weight, activation="silu", backend="triton")
    assert torch.equal(y, gdn2gen.short_convolution([x], [weight])[0][0]) and state is None
    norm = theirs["fla.modules.fused_norm_gate"].rms_norm_gated
    found = norm(x, x + 1, scale, None, "swish", eps=0.1)
    assert torch.equal(found, gdn2gen.gated_rms_norm(x, x + 1, scale, eps=0.1, activation="silu"))
    assert not CALLS
    for words in ({"activation": None}, {"activation": "silu", "output_final_state": True}):
        with pytest.warns(RuntimeWarning, match="runs as it was"):
            assert convolve(x, weight, **words) == ("theirs", None)
    with pytest.warns(RuntimeWarning, match="residual is given"):
        assert norm(x, x, scale, None, residual=x) == "theirs"


def test_what_an_original_calls_is_its_own(theirs: dict[str, ModuleType]) -> None:
    """Its dispatchers import the function that they are reached from."""

    def chunk_kda(q: Tensor, again: bool = True) -> Any:
        return theirs["fla.ops.kda"].chunk_kda(q, again=False) if again else "theirs"

    theirs["fla.ops.kda"].chunk_kda = chunk_kda  # type: ignore[attr-defined]
    fla.register()
    with pytest.warns(RuntimeWarning, match="k, v, g, beta is not given"):
        assert theirs["fla.ops.kda"].chunk_kda(torch.zeros(1)) == "theirs"


@pytest.mark.parametrize("member", [*LAYERS])
def test_its_layers_run_on_ours(member: str) -> None:
    """Where it can be imported; without a GPU its own kernels could not run."""
    pytest.importorskip("fla.layers", exc_type=ImportError)
    gate = {"use_gate": True} if member == "delta_rule" else {}  # a norm alone stays its own
    layer, ours, x = layer_cases.theirs(member, **gate), small(member, **gate), tokens(2, 70)
    layer.load_state_dict(ours.state_dict())
    try:
        fla.register()
        y = layer(x)[0]
        torch.testing.assert_close(y, ours(x))
        found = torch.autograd.grad(y.square().sum(), [*layer.parameters()])
        wanted = torch.autograd.grad(ours(x).square().sum(), [*ours.parameters()])
        torch.testing.assert_close(found, wanted)
        assert not fla.refused()
    finally:
        fla.unregister()


def test_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(UnsupportedError, match=re.escape("cannot be imported")):
        fla.register()
