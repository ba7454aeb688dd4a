"""flash-linear-attention's layers trained on their own ops and on ours: the same losses."""

from __future__ import annotations

import importlib
from typing import Final

import pytest
import torch
from gpu_support import DEVICE
from layer_cases import THEIRS
from torch import Tensor, nn
from torch.nn import functional

from gdn2gen.integrations import fla

pytestmark = pytest.mark.gpu

WORDS: Final = 64
HIDDEN: Final = 128
STEPS: Final = 50


class Model(nn.Module):
    """Embeddings, two layers, and the embeddings' transpose."""

    def __init__(self, member: str) -> None:
        super().__init__()
        module, name = THEIRS[member]
        make = getattr(importlib.import_module(module), name)
        sizes = {"hidden_size": HIDDEN, "num_heads": 2, "head_dim": 64, "expand_v": 1.0}
        self.embeddings = nn.Embedding(WORDS, HIDDEN)
        nn.init.normal_(self.embeddings.weight, std=0.05)
        self.layers = nn.ModuleList(make(**sizes) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embeddings(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))[0]
        return functional.linear(self.norms[2](x), self.embeddings.weight)


def _losses(member: str) -> list[float]:
    torch.manual_seed(0)
    model = Model(member).to(DEVICE)
    tokens = torch.randint(0, WORDS, (4, 200), device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for _ in range(STEPS):
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("member", [*THEIRS])
def test_losses_agree(member: str) -> None:
    pytest.importorskip("fla.layers", exc_type=ImportError)
    theirs = _losses(member)
    assert theirs[-1] < 0.8 * theirs[0]
    try:
        fla.register()
        ours = _losses(member)
        assert not fla.refused()
    finally:
        fla.unregister()
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert abs(one - other) < 0.03 * theirs[0], (step, one, other)
