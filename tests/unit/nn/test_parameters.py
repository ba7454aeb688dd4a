"""Parameters are those of flash-linear-attention 0.6.0: names, order and shapes."""

from __future__ import annotations

from typing import Any, Final

import pytest
import torch
from layer_cases import HIDDEN, LAYERS, small, theirs

# By hidden size D, heads H and HV, head dims K and V, and W taps: what its layers have.
PARAMETERS: Final = {
    "gdn2": """A_log H; dt_bias H*K; q_proj.weight H*K D; k_proj.weight H*K D; v_proj.weight HV*V D;
        q_conv1d.weight H*K 1 W; k_conv1d.weight H*K 1 W; v_conv1d.weight HV*V 1 W;
        f_proj.0.weight V D; f_proj.1.weight H*K V; b_proj.weight H*K D; w_proj.weight HV*V D;
        g_proj.0.weight V D; g_proj.1.weight HV*V V; g_proj.1.bias HV*V; o_norm.weight V;
        o_proj.weight D HV*V""",
    "kda": """A_log HV; dt_bias HV*K; q_proj.weight H*K D; k_proj.weight H*K D;
        v_proj.weight HV*V D; q_conv1d.weight H*K 1 W; k_conv1d.weight H*K 1 W;
        v_conv1d.weight HV*V 1 W; f_proj.0.weight V D; f_proj.1.weight HV*K V; b_proj.weight HV D;
        g_proj.0.weight V D; g_proj.1.weight HV*V V; g_proj.1.bias HV*V; o_norm.weight V;
        o_proj.weight D HV*V""",
    "gated_delta_rule": """A_log HV; dt_bias HV; q_proj.weight H*K D; k_proj.weight H*K D;
        v_proj.weight HV*V D; a_proj.weight HV D; b_proj.weight HV D; q_conv1d.weight H*K 1 W;
        k_conv1d.weight H*K 1 W; v_conv1d.weight HV*V 1 W; g_proj.weight HV*V D; o_norm.weight V;
        o_proj.weight D HV*V""",
    "delta_rule": """q_proj.weight H*K D; k_proj.weight H*K D; v_proj.weight HV*V D;
        b_proj.weight HV D; q_conv1d.weight H*K 1 W; k_conv1d.weight H*K 1 W;
        v_conv1d.weight HV*V 1 W; o_norm.weight V; o_proj.weight D HV*V""",
    "gla": """q_proj.weight H*K D; k_proj.weight H*K D; v_proj.weight HV*V D; g_proj.weight HV*V D;
        gk_proj.0.weight R D; gk_proj.1.weight H*K R; gk_proj.1.bias H*K; o_proj.weight D HV*V;
        g_norm_swish_gate.weight V""",
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_v_heads": 4, "expand_v": 2.0, "conv_size": 3, "allow_neg_eigval": True},
    {"conv_bias": True},
    {"use_short_conv": False},
)


def _listed(member: str, **sizes: int) -> list[tuple[str, tuple[int, ...]]]:
    found = []
    for words in PARAMETERS[member].split(";"):
        name, *dims = words.split()
        factors = [[sizes.get(x, 1) for x in dim.split("*")] for dim in dims]
        found.append((name, tuple(torch.tensor(x).prod().item() for x in factors)))
    return found


@pytest.mark.parametrize("member", [*LAYERS])
def test_names_order_and_shapes(member: str) -> None:
    layer = small(member, num_v_heads=6, expand_v=0.5, conv_size=3)
    found = [(name, tuple(x.shape)) for name, x in layer.state_dict().items()]
    assert found == _listed(member, D=HIDDEN, H=2, HV=6, K=16, V=8, W=3, R=16)
    assert [*layer.state_dict()] == [name for name, _ in layer.named_parameters()]


@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "grouped", "bias", "no convolution"))
@pytest.mark.parametrize("member", [*LAYERS])
def test_state_dicts_load_both_ways(member: str, options: dict[str, Any]) -> None:
    """Where flash-linear-attention can be imported, which wants transformers."""
    pytest.importorskip("fla.layers", exc_type=ImportError)
    if member in ("delta_rule", "gla"):  # which have no groups of value heads there
        options = {name: x for name, x in options.items() if name != "num_v_heads"}
    if member == "gla":
        options = {name: x for name, x in options.items() if name != "allow_neg_eigval"}
    layer, ours = theirs(member, **options), small(member, **options)
    assert [*layer.state_dict()] == [*ours.state_dict()]
    ours.load_state_dict(layer.state_dict())
    layer.load_state_dict(small(member, **options).state_dict())
    for one, other in zip(layer.parameters(), small(member, **options).parameters(), strict=True):
        assert torch.equal(one, other)
        marked = hasattr(one, "_no_weight_decay"), hasattr(other, "_no_weight_decay")
        assert marked[0] == marked[1]
