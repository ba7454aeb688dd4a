"""Packed batches: tables for any content of cu_seqlens, and what no sequence covers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gdn2gen
from gdn2gen.base.errors import InputError
from gdn2gen.family.inputs import make_inputs
from gdn2gen.runtime.sequences import check_cu_seqlens


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["rising", "partly", "wild"])
def test_tables(kind: str, dtype: torch.dtype, interpreter: Callable[..., Any]) -> None:
    interpreter("packed_checks:tables", kind, dtype)


@pytest.mark.parametrize("level", ["lean", "fast"])
@pytest.mark.parametrize(
    "given",
    [
        pytest.param([0, 9, 25], id="ends early"),
        pytest.param([7, 9, 9, 40], id="starts late"),
        pytest.param([0, 39, 60], id="ends late"),
        pytest.param([0, 5500, 40], id="falls"),
        pytest.param([-3, 12, 5, 10**12], id="wild"),
        pytest.param([40, 40, 40], id="empty"),
    ],
)
def test_whatever_cu_seqlens_holds(
    given: list[int], level: str, interpreter: Callable[..., Any]
) -> None:
    errors = interpreter("packed_checks:any_contents", given, level)
    assert max(errors.values()) < 1e-6, errors


def test_what_the_host_knows_is_checked() -> None:
    right, wrong = torch.tensor([0, 20, 40]), torch.tensor([0, 50, 40])
    check_cu_seqlens(right, 40, right.int())
    with pytest.raises(InputError, match=r"must be a copy of cu_seqlens, \[0, 20, 40\], but got"):
        check_cu_seqlens(right, 40, wrong)
    with pytest.raises(InputError, match=r"must not fall, but cu_seqlens\[1\]=50"):
        check_cu_seqlens(wrong, 40)
    elsewhere = torch.empty(3, dtype=torch.int64, device="meta")
    with pytest.raises(InputError, match="must not fall"):
        check_cu_seqlens(elsewhere, 40, wrong)
    check_cu_seqlens(elsewhere, 40)  # nobody waits for a device to know


@pytest.mark.parametrize("change", ["data", "numpy", "in place"])
def test_cu_seqlens_written_to_behind_a_version(change: str) -> None:
    inputs: dict[str, Any] = {**make_inputs(1, 40, 1, 32, 32, cu_seqlens=(0, 20, 40))}
    gdn2gen.chunk_gdn2(**inputs)
    other = torch.tensor([0, 7, 40])
    if change == "data":
        inputs["cu_seqlens"].data.copy_(other)
    elif change == "numpy":
        inputs["cu_seqlens"].numpy()[:] = other.numpy()
    else:
        inputs["cu_seqlens"].copy_(other)
    expected, _ = gdn2gen.chunk_gdn2(**inputs | {"cu_seqlens": other})
    assert torch.equal(gdn2gen.chunk_gdn2(**inputs)[0], expected)
    inputs["cu_seqlens"].data[1] = 41
    with pytest.raises(InputError, match=r"cu_seqlens\[1\]=41"):
        gdn2gen.chunk_gdn2(**inputs)


def test_packed_in_inference_mode() -> None:
    with torch.inference_mode():
        inputs: dict[str, Any] = {**make_inputs(1, 40, 1, 32, 32, cu_seqlens=(0, 20, 40))}
        o, _ = gdn2gen.chunk_gdn2(**inputs)
    outside = {name: x.clone() for name, x in inputs.items()}
    assert torch.equal(o, gdn2gen.chunk_gdn2(**outside)[0])


def test_room_for_sequences_as_flash_linear_attention_is_told() -> None:
    """Those that are not there have no tokens: their states pass through."""
    given: dict[str, Any] = {**make_inputs(1, 40, 1, 32, 32, op="kda", cu_seqlens=(0, 20, 40))}
    flags: dict[str, Any] = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    o, state = gdn2gen.chunk_kda(**given, **flags)
    padded = given | {"cu_seqlens": torch.tensor([0, 20, 40, 40, 40])}
    room = {"use_graph": True, "max_num_seqs": 4}
    o_padded, states = gdn2gen.chunk_kda(**padded, **flags, **room)
    assert state is not None and states is not None
    assert torch.equal(o, o_padded) and torch.equal(states[:2], state) and not states[2:].any()
    for changes, words in (
        ({"max_num_seqs": 4}, "wants cu_seqlens of 5 numbers, but got 3 numbers: repeat"),
        ({"max_num_seqs": 4, "cu_seqlens": None}, "but got None"),
        ({"max_num_seqs": True}, "max_num_seqs must be an int or None, but got bool"),
        ({"use_graph": 1}, "use_graph must be True or False"),
    ):
        with pytest.raises(InputError, match=words):
            gdn2gen.chunk_kda(**given | changes)
