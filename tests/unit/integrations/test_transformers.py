"""Small random models of transformers that call flash-linear-attention's ops, on ours.

Where both can be imported; without a GPU the original ops could not run, so that the other side is
transformers' own operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import pytest
import torch

from gdn2gen.integrations import fla

pytestmark = [
    pytest.mark.slow,  # most of it is importing transformers
    pytest.mark.skipif(
        find_spec("transformers") is None or find_spec("fla") is None,
        reason="wants transformers and flash-linear-attention",
    ),
]

SHARED: Final[dict[str, Any]] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MODELS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "qwen3_next": ("Qwen3Next", {
        "head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 4,
        "shared_expert_intermediate_size": 32,
    }),
    "kimi_linear": ("KimiLinear", {
        "linear_head_dim": 16, "linear_num_heads": 2, "num_local_experts": 4, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16,
    }),
}  # fmt: skip


@pytest.fixture
def unregistered() -> Iterator[None]:
    yield
    fla.unregister()


def _model(kind: str) -> Any:
    name, sizes = MODELS[kind]
    try:
        home = import_module(f"transformers.models.{kind}")
        config = getattr(home, f"{name}Config")(**SHARED, **sizes)
    except ImportError:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    return getattr(home, f"{name}ForCausalLM")(config)


def _losses(kind: str, steps: int) -> list[float]:
    model = _model(kind)
    rows = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = model(rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _by_transformers(kind: str) -> Iterator[tuple[Any, Any]]:
    """Cells where a model's module keeps ops of flash-linear-attention, and its own in their
    place."""
    for x in vars(import_module(f"transformers.models.{kind}.modeling_{kind}")).values():
        names = getattr(getattr(x, "__code__", None), "co_freevars", ())
        if "implementation" in names and "torch_function" in names:
            cells = dict(zip(names, x.__closure__, strict=True))
            if cells["implementation"].cell_contents.__module__.startswith("fla."):
                yield cells["implementation"], cells["torch_function"].cell_contents


@pytest.mark.parametrize("kind", [*MODELS])
def test_a_model_trains_as_before(
    kind: str, unregistered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss over 50 steps, and the next tokens by a cache, step by step."""
    cells = [*_by_transformers(kind)]
    assert cells, "this version of transformers keeps ops in another way"
    with monkeypatch.context() as patch:
        for cell, own in cells:
            patch.setattr(cell, "cell_contents", own)
        wanted = _losses(kind, 50)
        tokens = _generated(kind)
    report = fla.register()
    places = [place for all_ in report.replaced.values() for place in all_]
    assert f"transformers.models.{kind}.modeling_{kind}" in places
    found = _losses(kind, 50)
    assert wanted[-1] < 0.7 * wanted[0], wanted
    assert found[:10] == pytest.approx(wanted[:10], rel=1e-4)
    assert found == pytest.approx(wanted, rel=0.02)
    assert torch.equal(_generated(kind), tokens)
    assert not fla.refused()


def _generated(kind: str) -> torch.Tensor:
    model = _model(kind).eval()
    row = torch.arange(3, 12)[None]
    with torch.no_grad():
        found: torch.Tensor = model.generate(row, max_new_tokens=8, do_sample=False)
    return found
