"""mamba_ssm's functions on ours, in a stand-in for its modules: it is not run here."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from inspect import signature
from types import ModuleType
from typing import Any

import pytest
import torch
from layer_cases import HIDDEN, small, tokens
from mamba_checks import CASES, draw
from torch import Tensor

import gdn2gen
from gdn2gen.base.errors import UnsupportedError
from gdn2gen.integrations import mamba

MAMBA2 = "mamba_ssm.ops.triton.ssd_combined"
STEP = "mamba_ssm.ops.triton.selective_state_update"
MAMBA3 = "mamba_ssm.ops.triton.mamba3.mamba3_siso_combined"


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> str:
    return "theirs"


def _stand_in(ours: Any) -> Any:
    """A function of the same arguments, which are mamba_ssm's."""

    def theirs(*args: Any, **keywords: Any) -> str:
        return "theirs"

    theirs.__name__ = theirs.__qualname__ = ours.__name__
    theirs.__signature__ = signature(ours)  # type: ignore[attr-defined]
    return theirs


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    names = ["mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.mamba3"]
    made = {name: ModuleType(name) for name in (*names, MAMBA2, STEP, MAMBA3, "a_layer")}
    functions = {
        MAMBA2: [mamba_split_conv1d_scan_combined, _stand_in(gdn2gen.mamba_chunk_scan_combined)],
        STEP: [_stand_in(gdn2gen.selective_state_update)],
        MAMBA3: [_stand_in(gdn2gen.mamba3_siso_combined)],
    }
    for name, module in made.items():
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        for function in functions.get(name, ()):
            setattr(module, function.__name__, function)
            setattr(made["a_layer"], function.__name__, function)
    yield made
    mamba.unregister()


def test_ours_stand_for_theirs_and_give_way(theirs: dict[str, ModuleType]) -> None:
    layer = theirs["a_layer"]
    report = mamba.register()
    assert len(report.replaced) == 4 and not report.missing
    assert all("a_layer" in places for places in report.replaced.values())
    made, options = draw(CASES["layer"])
    inputs = {**made, **options, "chunk_size": 64}
    ours = gdn2gen.mamba_chunk_scan_combined(**inputs)
    assert isinstance(ours, Tensor)
    assert torch.equal(layer.mamba_chunk_scan_combined(**inputs), ours)
    with pytest.warns(RuntimeWarning, match="runs as it was: states are float32"):
        assert layer.mamba_chunk_scan_combined(**inputs, state_dtype=torch.bfloat16) == "theirs"
    assert sum(mamba.refused()[f"{MAMBA2}.mamba_chunk_scan_combined"].values()) == 1
    mamba.unregister()
    assert layer.mamba_chunk_scan_combined(**inputs) == "theirs"
    assert layer.mamba_split_conv1d_scan_combined is mamba_split_conv1d_scan_combined


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_groups": 2, "bias": True, "conv_bias": False, "dt_limit": (0.01, 0.05)},
        {"n_groups": 2, "norm_before_gate": True},
        {"rmsnorm": False},
    ],
)
def test_what_its_layers_train_on(theirs: dict[str, ModuleType], options: dict[str, Any]) -> None:
    """The layer as mamba_ssm's calls it in training, beside ours; y and all gradients."""
    mamba.register()
    layer, x = small("mamba2", **options), tokens(2, 20)
    norm = layer.norm
    y = theirs["a_layer"].mamba_split_conv1d_scan_combined(
        layer.in_proj(x),
        layer.conv1d.weight.squeeze(1),
        layer.conv1d.bias,
        layer.dt_bias,
        -layer.A_log.exp(),
        D=layer.D,
        chunk_size=256,
        seq_idx=None,
        activation="silu",
        rmsnorm_weight=None if norm is None else norm.weight,
        rmsnorm_eps=1e-6 if norm is None else norm.eps,
        outproj_weight=layer.out_proj.weight,
        outproj_bias=layer.out_proj.bias,
        headdim=layer.head_dim,
        ngroups=layer.n_groups,
        norm_before_gate=layer.norm_before_gate,
        dt_limit=layer.dt_limit,
    )
    assert not mamba.refused()
    torch.testing.assert_close(y, layer(x))
    into = [*layer.parameters()]
    found = torch.autograd.grad(y.square().sum(), into)
    wanted = torch.autograd.grad(layer(x).square().sum(), into)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seq_idx": torch.zeros(1, 4, dtype=torch.int32)}, "seq_idx is given, which ours does"),
        ({"activation": "relu"}, "there is no SiLU after the convolution"),
        ({"headdim": None}, "headdim is not given, nor is D"),
        ({"D": None}, "D is not given, which ours needs"),
        ({"zxbcdt": torch.zeros(1, 4, 34)}, "channels beside those of z, x, B, C and dt"),
    ],
)
def test_what_ours_refuse_runs_as_it_was(
    theirs: dict[str, ModuleType], change: dict[str, Any], said: str
) -> None:
    mamba.register()
    given = {
        "zxbcdt": torch.zeros(1, 4, 26), "conv1d_weight": torch.zeros(16, 4), "conv1d_bias": None,
        "dt_bias": torch.zeros(2), "A": -torch.ones(2), "D": torch.ones(2), "chunk_size": 64,
        "headdim": 4,
    }  # fmt: skip
    function = theirs["a_layer"].mamba_split_conv1d_scan_combined
    assert isinstance(function(**given), Tensor)
    with pytest.warns(RuntimeWarning, match=re.escape(said)):
        assert function(**given | change) == "theirs"


def test_states_of_the_layers_op(theirs: dict[str, ModuleType]) -> None:
    mamba.register()
    function = theirs["a_layer"].mamba_split_conv1d_scan_combined
    y, state = function(
        torch.randn(1, 4, 26), torch.randn(16, 4), None, torch.zeros(2), -torch.ones(2),
        torch.ones(2, 4), 64, return_final_states=True,
    )  # fmt: skip
    assert y.shape == (1, 4, 8) and state.shape == (1, 2, 4, 4)


def test_the_step_of_its_layers(theirs: dict[str, ModuleType]) -> None:
    """As Mamba-2's layers call it; and Mamba-1's, which has no heads, as it was."""
    mamba.register()
    function = theirs["a_layer"].selective_state_update
    x, dt, B = torch.randn(3, 4, 16), torch.randn(3, 4), torch.randn(3, 2, 24)
    state, A, D = torch.randn(3, 4, 16, 24), -torch.rand(4), torch.randn(4)
    given = {
        "x": x, "dt": dt[..., None].expand(-1, -1, 16), "B": B, "C": torch.randn_like(B),
        "A": A[:, None, None].expand(-1, 16, 24), "D": D[:, None].expand(-1, 16),
        "dt_bias": D[:, None].expand(-1, 16), "z": None, "dt_softplus": True,
    }  # fmt: skip
    other = state.clone()
    y = function(state, **given)
    assert not mamba.refused()
    assert torch.equal(y, gdn2gen.selective_state_update(other, **given))
    assert torch.equal(state, other)
    flat = (torch.zeros(3, 64, 16), torch.zeros(3, 64), torch.zeros(3, 64), torch.zeros(64, 16))
    with pytest.warns(RuntimeWarning, match=r"kernels for heads of Mamba-2.* call mamba_ssm's"):
        assert function(*flat, torch.zeros(3, 16), torch.zeros(3, 16)) == "theirs"


@pytest.mark.parametrize("member", ["mamba2", "mamba3"])
def test_its_layers_run_on_ours(member: str) -> None:
    """Where it can be imported: state dicts of ours load there and the other way, and both give the
    same; without a GPU its own kernels could not run."""
    home = pytest.importorskip(f"mamba_ssm.modules.{member}", exc_type=ImportError)
    make = getattr(home, member.capitalize())
    sizes = {"d_model": HIDDEN, "d_state": 8, "headdim": 16, "ngroups": 2}
    layer, ours, x = make(**sizes), small(member, n_groups=2), tokens(2, 20)
    assert [*layer.state_dict()] == [*ours.state_dict()]
    ours.load_state_dict(layer.state_dict())
    layer.load_state_dict(ours.state_dict())
    if member == "mamba3":  # whose norms of B and C are kernels of its own
        layer.B_norm, layer.C_norm = ours.B_norm, ours.C_norm
    try:
        mamba.register()
        y = layer(x)
        assert not mamba.refused()
        torch.testing.assert_close(y, ours(x))
        found = torch.autograd.grad(y.square().sum(), [*layer.parameters()])
        wanted = torch.autograd.grad(ours(x).square().sum(), [*ours.parameters()])
        torch.testing.assert_close(found, wanted)
    finally:
        mamba.unregister()


def test_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.raises(UnsupportedError, match=re.escape("pip install mamba-ssm")):
        mamba.register()
