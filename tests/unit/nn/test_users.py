"""Layers that have one number in a cache: which are one mistake, and which are none."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Iterator

import pytest
import torch
from layer_cases import small, tokens

from gdn2gen.base.errors import InputError
from gdn2gen.nn import Cache, SlidingWindowAttention
from gdn2gen.nn.layer import Layer

TOLD = "GatedDeltaNet2 at 0x[0-9a-f]+ and GatedDeltaNet2 at 0x[0-9a-f]+ have the same layer_idx=3"
X = tokens(1, 2)


@pytest.fixture(autouse=True)
def _told_of_all() -> Iterator[None]:
    """What is not expected is an error."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        yield


def _other() -> Layer:
    layer: Layer = small("gdn2")
    for x in layer.parameters():
        x.mul_(1.5)
    return layer


def test_two_layers_of_one_model_that_share_a_number() -> None:
    one, other, cache = small("gdn2"), _other(), Cache(1)
    one(X, cache=cache)
    with pytest.warns(UserWarning, match=f"{TOLD}.* give each a layer_idx of its own"):
        other(X, cache=cache)
    other(X, cache=cache)
    for layer in (one, other, one):  # until it is mended
        state = cache.layer(3)["state"].clone()
        if layer is other:
            layer(X, cache=cache)
            continue
        with pytest.raises(InputError, match=r"take turns under layer_idx=3 .* of its own"):
            layer(X, cache=cache)
        assert torch.equal(cache.layer(3)["state"], state)


def test_layers_of_two_kinds() -> None:
    one, cache = small("gdn2"), Cache(1)
    window = SlidingWindowAttention(32, num_heads=2, window=2, layer_idx=3)
    window(X, cache=cache)
    with pytest.warns(UserWarning, match=r"GatedDeltaNet2 at .* and SlidingWindowAttention at"):
        one(X, cache=cache)
    with pytest.raises(InputError, match=r"SlidingWindowAttention at .* and GatedDeltaNet2 at"):
        window(X, cache=cache)


def test_one_layer_after_another() -> None:
    """In its place, or for other sequences, or in a cache of its own."""
    layer, cache = small("gdn2"), Cache(1)
    layer(X, cache=cache)
    del layer
    gc.collect()
    other, third = _other(), small("gdn2")
    other(X, cache=cache)
    for turn in (third, other, third):
        cache.reset()
        turn(X, cache=cache)
    for again in (cache.copy(), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        other(X, cache=again)  # the last one was the third
    third(X, cache=cache)


def test_copies_in_turn() -> None:
    """Such as one that is compiled, for single tokens: its states are the other's."""
    layer, cache = small("gdn2"), Cache(1)
    twin = copy.deepcopy(layer)
    layer(X, cache=cache)
    with pytest.warns(UserWarning, match=TOLD):
        twin(X, cache=cache)
    for turn in (layer, twin, layer):
        turn(X, cache=cache)
